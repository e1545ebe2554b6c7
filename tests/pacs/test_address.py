"""An address is a service and a query that names no patient; anything else is refused, and no credential is quoted."""

from __future__ import annotations

from typing import Any

import pytest

from btray.core.errors import UserError
from btray.pacs.address import Address, InstanceUrl, series_of


def element(*values: Any) -> dict[str, Any]:
    return {"vr": "LO", "Value": list(values)}


def test_an_address_is_https_and_clear_text_is_for_loopback_alone() -> None:
    assert Address.parse("dicomweb://pacs:8443/a/dicom-web/").root == "https://pacs:8443/a/dicom-web"
    for host in ("127.0.0.1", "localhost", "[::1]"):
        assert Address.parse(f"dicomweb+http://{host}:8042/r").root == f"http://{host}:8042/r"
    with pytest.raises(UserError, match=r"clear text.*--insecure"):
        Address.parse("dicomweb+http://pacs/r")
    assert Address.parse("dicomweb+http://pacs/r", insecure=True).root == "http://pacs/r"


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("dicomweb://someone:SECRET@pacs/r", "BTRAY_PACS_USER"),
        ("dicomweb://SECRET@pacs/r?StudyDate=20260101", "BTRAY_PACS_TOKEN"),
        ("dicomweb://pacs/r?token=SECRET", "chooses no studies"),
        ("dicomweb://pacs/r?PatientName=SECRET", "names no patient"),
        ("dicomweb:///r", "names no PACS"),
        ("dicomweb://pacs:x/r", "names no PACS"),
        ("dicomweb://pacs/r?StudyDate=yesterday", "YYYYMMDD"),
        ("dicomweb://pacs/r?Modality=", "no value"),
        ("dicomweb://pacs/r#SECRET", "#"),
    ],
)
def test_what_is_no_address_is_refused_in_one_line_without_what_may_be_secret(uri: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        Address.parse(uri)
    assert "SECRET" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_uids_dates_and_a_modality_are_sent_as_they_are_and_nothing_else_is() -> None:
    address = Address.parse(
        "dicomweb://pacs/r?StudyDate=20261101-&ModalitiesInStudy=M*&StudyInstanceUID=1.2,1.3&StudyDescription=Ann*"
        "&SeriesDescription=t1 post&Modality=MR,CT&SeriesDate=20261101"
    )
    assert address.sent("study") == {"StudyDate": "20261101-", "ModalitiesInStudy": "M*", "StudyInstanceUID": "1.2,1.3"}
    assert address.sent("series") == {"SeriesDate": "20261101"}


@pytest.mark.parametrize(
    ("query", "value", "expected"),
    [
        ("StudyDate=20261101-", "20261101", True), ("StudyDate=20261101-", "20261031", False),
        ("StudyDate=-20261101", "20261101", True), ("StudyDate=-20261101", "20261102", False),
        ("StudyDate=20261101", "20261101", True), ("StudyDate=20261101", "20261102", False),
        ("StudyDate=20261101-20261130", "20261130", True), ("StudyDate=20261101-20261130", "20261201", False),
        ("StudyDescription=*BRAIN*", "mr brain w/o", True), ("StudyDescription=brain", "mr brain", False),
        ("StudyDescription=a[1]*", "A[1] head", True), ("StudyDescription=a[1]", "a1", False),
        ("StudyDescription=head,neck", "Neck", True), ("ModalitiesInStudy=MR", "CT", False),
        ("ModalitiesInStudy=CT,MR", "MR", True), ("StudyInstanceUID=1.2,1.3", "1.3", True),
        ("StudyInstanceUID=1.2", "1.20", False),
    ],
)  # fmt: skip
def test_what_is_found_is_compared_here(query: str, value: str, expected: bool) -> None:
    address = Address.parse(f"dicomweb://pacs/r?{query}")
    tags = {"StudyDate": "00080020", "StudyDescription": "00081030", "ModalitiesInStudy": "00080061"}
    tag = tags.get(query.partition("=")[0], "0020000D")
    assert address.matches("study", {tag: element(value)}) == expected
    assert address.matches("series", {}), "a term of a study says nothing of a series"


def test_an_answer_without_the_element_fulfils_only_what_the_pacs_was_asked_for() -> None:
    assert Address.parse("dicomweb://pacs/r?ModalitiesInStudy=MR").matches("study", {})
    assert not Address.parse("dicomweb://pacs/r?ModalitiesInStudy=MR,CT").matches("study", {})
    assert not Address.parse("dicomweb://pacs/r?StudyDescription=*").matches("study", {"00081030": {"vr": "LO"}})


def test_the_url_of_an_instance_says_where_it_is() -> None:
    url = InstanceUrl("https://pacs/r", "1.2", "1.2.3", "1.2.3.4")
    assert InstanceUrl.parse(str(url)) == url
    assert series_of(str(url)) == "https://pacs/r/studies/1.2/series/1.2.3"
    for other in ("s3://bucket/studies/1/series/2/instances/3", "https://pacs/studies/1/series/a/instances/3", "/x"):
        assert InstanceUrl.parse(other) is None
    assert series_of("/folder/instances/1") == "/folder/instances/1"
