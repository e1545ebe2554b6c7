"""The client on a real Orthanc, alone and behind a proxy that cuts, throttles and lies: each instance comes once."""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from btray.pacs import client as module
from btray.pacs.address import Address, first_of
from btray.pacs.client import INSTANCE, SERIES, STUDY, DicomWeb
from btray.pacs.config import PacsConfig
from btray.storage import StorageError
from tests.helpers.authority import private_authority
from tests.helpers.dicom_files import slice_file
from tests.helpers.hospital_archive import ROOT, instance
from tests.helpers.orthanc import Orthanc
from tests.helpers.s3_proxy import Request, http_proxy

STUDY_NUMBER, OTHER = 7, 8
"""Of the studies of this file."""
STUDY_UID, SERIES_UID = f"{ROOT}.{STUDY_NUMBER}", f"{ROOT}.{STUDY_NUMBER}.0"
FILES = {f"{SERIES_UID}.{number}": instance(STUDY_NUMBER, 0, number) for number in range(12)}

Behaviour = Callable[[Request, int], None]
"""What is done with a request, of which so many came before."""


@pytest.fixture(scope="module", autouse=True)
def _uploaded(orthanc: Orthanc) -> None:
    orthanc.upload([*FILES.values(), *(instance(OTHER, series, 0, Modality="CT") for series in range(3))])


@pytest.fixture
def service(orthanc: Orthanc, access: PacsConfig) -> DicomWeb:
    return DicomWeb(orthanc.root, access)


@contextmanager
def behind(
    orthanc: Orthanc, access: PacsConfig, behave: Behaviour, **options: Any
) -> Iterator[tuple[DicomWeb, list[str]]]:
    """Give a client behind a proxy, and the paths that it asks for."""
    paths: list[str] = []

    def numbered(request: Request) -> None:
        paths.append(request.path.partition("/dicom-web/")[2])
        behave(request, len(paths) - 1)

    with http_proxy(orthanc.url, numbered) as url:
        yield DicomWeb(f"{url}/dicom-web", access, **options), paths


def uids_of(found: Iterator[Any], tag: str) -> list[str]:
    return [first_of(one, tag) for one in found]


def cut(request: Request, share: float) -> None:
    """Answer the first part of the real answer and end as a server does that dies: nothing tells that it is short."""
    real = request.answer

    def answer(status: int, body: bytes, headers: dict[str, str]) -> None:
        real(status, body[: int(len(body) * share)], {k: v for k, v in headers.items() if k != "Content-Length"})

    with pytest.MonkeyPatch.context() as patch:  # the next request on this connection has the same handler
        patch.setattr(request, "answer", answer)
        request.forward()


@pytest.mark.parametrize("page", [1, 2, 3, 200])
def test_queries_are_paged_until_a_page_is_empty_and_give_each_answer_once(
    service: DicomWeb, monkeypatch: pytest.MonkeyPatch, page: int
) -> None:
    monkeypatch.setattr(module, "_PAGE", page)
    assert sorted(uids_of(service.instances(STUDY_UID, SERIES_UID), INSTANCE)) == sorted(FILES)
    assert sorted(uids_of(service.series(f"{ROOT}.{OTHER}"), SERIES)) == [f"{ROOT}.{OTHER}.{n}" for n in range(3)]
    assert {STUDY_UID, f"{ROOT}.{OTHER}"} <= set(uids_of(service.studies(), STUDY))
    assert service.count(STUDY_UID, SERIES_UID) == len(FILES)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        (f"StudyInstanceUID={ROOT}.7,{ROOT}.8", {7, 8}), (f"StudyInstanceUID={ROOT}.7,1.2.3", {7}),
        ("ModalitiesInStudy=C*&StudyDate=20200304", {8}), ("ModalitiesInStudy=MR&StudyDate=20200304-", {7}),
        ("StudyDate=-20200303", set()), ("StudyDate=20200301-20200305&ModalitiesInStudy=CT,MR", {7, 8}),
    ],
)  # fmt: skip
def test_wildcards_lists_and_ranges_reach_the_pacs_as_they_are_spelled(
    orthanc: Orthanc, access: PacsConfig, query: str, expected: set[int]
) -> None:
    address = Address.parse(f"{orthanc.address}?{query}")
    with behind(orthanc, access, lambda request, _: request.forward()) as (service, paths):
        found = set(uids_of(service.studies(address), STUDY))
        assert {n for n in (7, 8) if f"{ROOT}.{n}" in found} == expected
        assert not any("%" in path for path in paths)


def test_files_come_as_they_are_stored(service: DicomWeb) -> None:
    assert dict(service.retrieve_series(STUDY_UID, SERIES_UID, list(FILES))) == FILES
    some = list(FILES)[3:6]
    assert list(service.retrieve_instances(STUDY_UID, SERIES_UID, some)) == [(uid, FILES[uid]) for uid in some]
    assert service.retrieve_instance(STUDY_UID, SERIES_UID, some[0]) == FILES[some[0]]
    assert len(service.metadata(STUDY_UID, SERIES_UID)) == len(FILES)


def test_what_is_not_there_or_too_large_is_told_and_the_rest_comes(orthanc: Orthanc, access: PacsConfig) -> None:
    service = DicomWeb(orthanc.root, access, patience=1, max_bytes=max(map(len, FILES.values())))
    gone, large = f"{SERIES_UID}.99", f"{SERIES_UID}.98"
    uids = {"StudyInstanceUID": STUDY_UID, "SeriesInstanceUID": SERIES_UID, "SOPInstanceUID": large}
    orthanc.upload([data := slice_file(np.zeros((999, 999), np.uint16), **uids)])
    try:
        for retrieve in (service.retrieve_series, service.retrieve_instances):
            found = dict(retrieve(STUDY_UID, SERIES_UID, [*FILES, gone, large]))
            assert {uid: getattr(found.pop(uid), "code", data) for uid in (gone, large)} == {
                gone: "not_found", large: "too_large",
            }  # fmt: skip
            assert found == FILES
        lost = dict(service.retrieve_series(STUDY_UID, f"{SERIES_UID}.5", [gone]))
        assert getattr(lost[gone], "code", None) == "not_found"
    finally:
        orthanc.remove(large)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.61, 0.95, 0.9999])
def test_an_answer_that_was_cut_is_noticed_and_what_is_missing_asked_for_again(
    orthanc: Orthanc, access: PacsConfig, share: float
) -> None:
    def first_cut(request: Request, number: int) -> None:
        cut(request, share) if number == 0 else request.forward()

    with behind(orthanc, access, first_cut) as (service, paths):
        results = list(service.retrieve_series(STUDY_UID, SERIES_UID, list(FILES)))
        assert len(results) == len(FILES)
        assert dict(results) == FILES
        assert len(paths) >= (1 if share > 0.99 else 2), "all of the series, or single instances of it"
    with behind(orthanc, access, first_cut) as (service, paths):
        uid = next(iter(FILES))
        assert service.retrieve_instance(STUDY_UID, SERIES_UID, uid) == FILES[uid]
        assert len(paths) == 2
    with behind(orthanc, access, first_cut) as (service, _):
        assert sorted(uids_of(service.instances(STUDY_UID, SERIES_UID), INSTANCE)) == sorted(FILES)


@pytest.mark.parametrize(("status", "headers"), [(429, {"Retry-After": "1"}), (503, {}), (504, {}), (500, {})])
def test_a_pacs_that_is_busy_for_a_while_is_waited_for(
    orthanc: Orthanc, access: PacsConfig, status: int, headers: dict[str, str]
) -> None:
    def busy(request: Request, number: int) -> None:
        request.answer(status, b"", dict(headers)) if number in (0, 2, 4) else request.forward()

    with behind(orthanc, access, busy, patience=20) as (service, _):
        assert sorted(uids_of(service.instances(STUDY_UID, SERIES_UID), INSTANCE)) == sorted(FILES)
        assert dict(service.retrieve_series(STUDY_UID, SERIES_UID, list(FILES))) == FILES


@pytest.mark.parametrize(("status", "code"), [(503, "throttled"), (500, "unavailable"), (403, "forbidden")])
def test_a_pacs_that_never_gives_anything_is_told_for_each_instance_after_one_patience(
    orthanc: Orthanc, access: PacsConfig, status: int, code: str
) -> None:
    with behind(orthanc, access, lambda request, _: request.answer(status, b"", {}), patience=0.5) as (service, _):
        results = list(service.retrieve_series(STUDY_UID, SERIES_UID, list(FILES)))
        assert [(uid, getattr(result, "code", None)) for uid, result in results] == [(uid, code) for uid in FILES]
        with pytest.raises(StorageError) as caught:
            next(service.studies())
        assert caught.value.code == code


def test_one_instance_that_the_pacs_fails_at_does_not_hold_up_the_others(orthanc: Orthanc, access: PacsConfig) -> None:
    broken = f"{SERIES_UID}.4"

    def behave(request: Request, _: int) -> None:
        request.answer(500, b"", {}) if broken in request.path else request.forward()

    with behind(orthanc, access, behave, patience=60) as (service, paths):
        results = dict(service.retrieve_instances(STUDY_UID, SERIES_UID, list(FILES)))
        assert getattr(results.pop(broken), "code", None) == "unavailable"
        assert results == {uid: data for uid, data in FILES.items() if uid != broken}
        assert len(paths) == len(FILES) - 1 + module._AGAIN


def test_a_server_that_does_not_page_is_an_error_and_no_loop(orthanc: Orthanc, access: PacsConfig) -> None:
    def same(request: Request, _: int) -> None:
        request.path = re.sub(r"offset=\d+", "offset=0", request.path)
        request.forward()

    with behind(orthanc, access, same) as (service, _), pytest.raises(StorageError, match="same page"):
        list(service.instances(STUDY_UID, SERIES_UID))


def test_a_study_that_is_removed_while_it_is_listed_has_nothing_and_a_wrong_root_is_an_error(
    orthanc: Orthanc, access: PacsConfig
) -> None:
    with behind(orthanc, access, lambda request, _: request.answer(404, b"", {})) as (service, _):
        assert [*service.series(STUDY_UID), *service.instances(STUDY_UID, SERIES_UID)] == []
        with pytest.raises(StorageError) as caught:
            next(service.studies())
        assert caught.value.code == "not_found"


def test_a_redirect_is_not_followed_with_credentials(orthanc: Orthanc, access: PacsConfig) -> None:
    def elsewhere(request: Request, _: int) -> None:
        request.answer(302, b"", {"Location": orthanc.root + "/studies"})

    with behind(orthanc, access, elsewhere) as (service, paths):
        with pytest.raises(StorageError, match="302"):
            next(service.studies())
        assert len(paths) == 1


@pytest.mark.parametrize("settings", [{}, {"pacs_user": "btray", "pacs_password": "wrong"}, {"pacs_token": "wrong"}])
def test_without_its_credentials_nothing_is_given_and_the_line_names_the_variables(
    orthanc: Orthanc, settings: dict[str, str]
) -> None:
    service = DicomWeb(orthanc.root, PacsConfig(**settings))
    with pytest.raises(StorageError, match=r"forbidden|refused.*BTRAY_PACS_USER") as caught:
        next(service.studies())
    assert (caught.value.code, caught.value.exit_code) == ("forbidden", 2)


def test_https_is_verified_and_a_certificate_of_the_client_is_shown(
    orthanc: Orthanc, access: PacsConfig, tmp_path: Path
) -> None:
    folder = private_authority(tmp_path)
    files = {name: str(folder / name) for name in ("ca.crt", "ca.key", "server.crt", "server.key")}
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(files["server.crt"], files["server.key"])
    tls.load_verify_locations(files["ca.crt"])
    tls.verify_mode = ssl.CERT_REQUIRED
    known = {"pacs_ca": files["ca.crt"], "pacs_cert": files["server.crt"], "pacs_key": files["server.key"]}
    with http_proxy(orthanc.url, Request.forward, tls) as url:
        root = f"{url}/dicom-web"
        assert root.startswith("https://")
        for missing in (None, "pacs_ca", "pacs_cert"):
            settings = {name: file for name, file in known.items() if missing is None or not name.startswith(missing)}
            if missing == "pacs_cert":
                del settings["pacs_key"]
            service = DicomWeb(root, PacsConfig(**orthanc.credentials, **settings), patience=0.5)
            if missing is None:
                assert service.retrieve_instance(STUDY_UID, SERIES_UID, f"{SERIES_UID}.0") == FILES[f"{SERIES_UID}.0"]
                continue
            with pytest.raises(StorageError, match="BTRAY_PACS_CA" if missing == "pacs_ca" else "unavailable|answer"):
                next(service.studies())
        other = url.replace("127.0.0.1", "localhost")
        with pytest.raises(StorageError, match="of another machine"):
            next(DicomWeb(f"{other}/dicom-web", PacsConfig(**orthanc.credentials, **known)).studies())


def test_what_is_stored_is_counted_and_what_is_refused_named(service: DicomWeb, orthanc: Orthanc) -> None:
    files = [instance(9, 0, number) for number in range(3)]
    stored = service.store(files)
    assert (stored.stored, stored.failed) == ({f"{ROOT}.9.0.{n}" for n in range(3)}, {})
    assert service.store(files[:1]).stored == {f"{ROOT}.9.0.0"}
    assert service.store([instance(9, 0, 5)], study=f"{ROOT}.9").stored == {f"{ROOT}.9.0.5"}
    wrong = service.store([instance(10, 0, 6)], study=f"{ROOT}.9")
    assert f"{ROOT}.10.0.6" not in wrong.stored
    assert f"{ROOT}.10.0.6" in wrong.failed


def test_killed_in_mid_answer_thrice_the_series_comes_whole(tmp_path: Path) -> None:
    files = {f"{ROOT}.1.0.{number}": instance(1, 0, number) for number in range(150)}
    with Orthanc(tmp_path / "orthanc") as server:
        server.upload(files.values())
        service = DicomWeb(server.root, PacsConfig(**server.credentials), patience=60)
        kills = iter([5, 40, 80])
        next_kill, found = next(kills), {}
        for uid, data in service.retrieve_series(f"{ROOT}.1", f"{ROOT}.1.0", list(files)):
            found[uid] = data
            if len(found) == next_kill:
                server.kill()
                server.start()
                next_kill = next(kills, -1)
    assert next_kill == -1
    assert found == files
