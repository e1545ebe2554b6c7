"""What a PACS pushes by STOW-RS is classified as everywhere else, answered in the standard's terms, and not kept."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from btray.core.errors import UserError
from btray.model.classifier import Classifier
from btray.model.studies import Reader, StudyCollector
from btray.serving.access import make_key
from btray.serving.config import ServeConfig
from btray.serving.dicomweb.pending import PendingStudies, StillStudies
from tests.helpers.dicom_files import IDENTIFIERS, mr_slice, slice_file, write
from tests.helpers.hospital_archive import ROOT, instance, pixels_of
from tests.helpers.pushes import RELATED, STOW, related
from tests.helpers.serving_helpers import Running, problem, running

CLASSIFY = "/v1/classify"
LIMITS = {"max_images": 8, "max_frames": 20, "max_body_mb": 4}
REPORT = write(mr_slice(pixels_of(0), SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11", SOPInstanceUID=f"{ROOT}.7"))


@pytest.fixture(scope="module")
def service(model: str) -> Iterator[Running]:
    with running(model=model, limits=LIMITS) as served:
        yield served


def pushed(service: Running, objects: Sequence[bytes], status: int, path: str = STOW) -> dict[str, Any]:
    """Push objects, and return what the answer says of each SOP Instance UID: 0, a warning or a failure."""
    answer = service.post(path, related(objects), RELATED, headers={"Accept": "application/dicom+json"})
    assert (answer.status_code, answer.headers["Content-Type"]) == (status, "application/dicom+json"), answer.text
    content = answer.json()
    assert content["00081190"] == {"vr": "UR"}, "nothing can be retrieved from here"
    said: dict[str, Any] = {}
    for sequence, reason in (("00081199", "00081196"), ("00081198", "00081197"), ("0008119A", "00081197")):
        for number, item in enumerate(content.get(sequence, {"Value": []})["Value"]):
            name = item["00081155"]["Value"][0] if "00081155" in item else f"nameless {number}"
            said[name] = item[reason]["Value"][0] if reason in item else 0
            assert sequence == "0008119A" or item["00081150"]["Value"][0].startswith("1.2.840.10008.5.1.4.1.1.")
    return said


def study(series: int = 2, slices: int = 3) -> list[bytes]:
    return [instance(1, number, place) for number in range(series) for place in range(slices)]


def test_a_pushed_study_is_answered_per_instance_and_as_a_whole_as_predict_answers_it(
    service: Running, classifier: Classifier
) -> None:
    files = study()
    names = pushed(service, files, 200)
    assert list(names.values()) == [0] * len(files)
    content = service.post(CLASSIFY, related(files), RELATED).json()
    predictions = classifier.predict(files)
    assert list(names) == [prediction.instance_uid for prediction in predictions]
    for result, prediction in zip(content["results"], predictions, strict=True):
        assert (result["instance_uid"], result["label"]) == (prediction.instance_uid, prediction.label)
        assert result["probabilities"] == pytest.approx(prediction.probabilities, abs=1e-5)
    collector = StudyCollector(Reader.of(classifier.manifest))
    collector.add(predictions)
    results = service.post("/v1/studies", json={"frames": content["results"]}).json()["results"]
    for result, decision in zip(results, collector.decisions(), strict=True):
        assert (result["level"], result["label"]) == (decision.level, decision.verdict.label)
        assert result["probabilities"] == pytest.approx(decision.verdict.probabilities, abs=1e-5)


def test_each_instance_that_is_not_classified_has_the_reason_of_the_standard(service: Running) -> None:
    good, damaged = instance(1, 0, 0), instance(1, 0, 1)[:-5000]
    foreign = slice_file(pixels_of(1), syntax="1.2.840.10008.1.2.1", SOPInstanceUID=f"{ROOT}.8", StudyInstanceUID="1.2")
    video = write(mr_slice(pixels_of(1), SOPInstanceUID=f"{ROOT}.9"), syntax="1.2.840.10008.1.2.4.100", streams=[b"x"])
    huge = slice_file(np.zeros((9000, 8000), np.uint8), SOPInstanceUID=f"{ROOT}.10", PixelData=b"\0\0")
    nameless = slice_file(pixels_of(1), SOPInstanceUID=None)
    found = pushed(service, [good, damaged, REPORT, video, nameless, b"\xff\xd8\xff\xe0 no DICOM"], 202)
    assert found == {
        f"{ROOT}.1.0.0": 0,
        f"{ROOT}.1.0.1": 0xC000,
        f"{ROOT}.7": 0xB006,
        f"{ROOT}.9": 0xC122,
        "nameless 0": 0xC000,
        "nameless 1": 0xC000,
    }
    own = slice_file(pixels_of(1), SOPInstanceUID=f"{ROOT}.11", Manufacturer="btray")
    assert pushed(service, [own], 202) == {f"{ROOT}.11": 0xB006}, "an answer of btray is no input"
    assert pushed(service, [REPORT], 202) == {f"{ROOT}.7": 0xB006}, "an archive need not know what is no slice"
    assert pushed(service, [damaged], 409) == {f"{ROOT}.1.0.1": 0xC000}
    assert list(pushed(service, [huge[:2000]], 409).values()) == [0xA700]
    assert pushed(service, [good, foreign], 202, f"{STOW}/{ROOT}.1") == {f"{ROOT}.1.0.0": 0, f"{ROOT}.8": 0xA900}
    assert pushed(service, [foreign], 409, f"{STOW}/{ROOT}.1") == {f"{ROOT}.8": 0xA900}


@pytest.mark.parametrize(
    ("body", "kind", "status", "code"),
    [
        (related([b"x"])[:-6], RELATED, 400, "bad_body"),
        (b"\r\n--b--\r\n", RELATED, 400, "bad_body"),
        (b"", RELATED, 400, "bad_body"),
        (related([b"x"]), 'multipart/related; type="application/dicom"', 400, "bad_body"),
        (
            related([b"x"]),
            'multipart/related; type="application/dicom+json"; boundary=b',
            415,
            "unsupported_media_type",
        ),
        (related([b"x"]), "multipart/form-data; boundary=b", 415, "unsupported_media_type"),
        (b"x", "application/dicom", 415, "unsupported_media_type"),
        (related([b"x"] * 9), RELATED, 413, "too_many_images"),
        (related([instance(1, 0, 0)] * 8) + bytes(4_000_000), RELATED, 413, "too_large"),
        (related([slice_file(np.zeros((21, 64, 64), np.uint8))]), RELATED, 413, "too_many_frames"),
    ],
)
def test_a_request_that_is_none_is_refused_as_a_whole(
    service: Running, body: bytes, kind: str, status: int, code: str
) -> None:
    problem(service.post(STOW, body, kind), status, code)


def test_the_answer_is_json_and_a_study_in_the_path_is_a_uid(service: Running) -> None:
    xml = {"Accept": "application/dicom+xml"}
    problem(service.post(STOW, related(study()), RELATED, headers=xml), 406, "not_acceptable")
    problem(service.post(f"{STOW}/..%2f1", related(study()), RELATED), 404, "not_found")
    problem(service.post(f"{STOW}/PLANTED", related(study()), RELATED), 400, "bad_request")


def test_only_who_has_a_key_may_push(model: str, tmp_path: Path) -> None:
    key = make_key(str(tmp_path / "keys"), "pacs")
    with running(model=model, keys=str(tmp_path / "keys")) as service:
        problem(service.post(STOW, related(study()), RELATED), 401, "unauthorized")
        answer = service.post(STOW, related(study()), RELATED, headers={"Authorization": f"Bearer {key}"})
        assert answer.status_code == 200


def test_what_is_classified_waits_for_its_report_and_names_no_patient(
    model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="btray")
    pending = tmp_path / "pending"
    settings = {"report_to": "dicomweb+http://127.0.0.1:1/root", "pending": str(pending)}
    with running(model=model, **settings) as service:
        pushed(service, [REPORT], 202)
        pushed(service, [instance(2, 0, 0)[:-5000]], 409)
        assert PendingStudies(str(pending)).marks() == {}, "nothing of it can be reported"
        pushed(service, [instance(1, 0, 0), instance(1, 0, 1), instance(3, 0, 0), REPORT], 202)
        pushed(service, [instance(1, 0, 2)], 200)
        marks = PendingStudies(str(pending)).marks()
        assert {study_uid: len(names) for study_uid, names in marks.items()} == {f"{ROOT}.1": 2, f"{ROOT}.3": 1}
        for path in pending.iterdir():
            path.unlink()
        pending.rmdir()
        pending.write_text("")  # a folder that cannot be written to
        answer = service.post(STOW, related([instance(1, 0, 0)]), RELATED)
        problem(answer, 503, "unavailable")
        assert answer.headers["Retry-After"]
    assert f"{ROOT}.7" in caplog.text, "what is passed over is named"
    assert not [name for name in IDENTIFIERS if name in caplog.text + json.dumps(list(marks))]


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("dicomweb://me:PLANTED@pacs/root", "credentials"),
        ("dicomweb+http://pacs/root", "clear text"),
        ("pacs", "names no"),
    ],
)
def test_an_archive_to_report_to_is_one_that_can_be_trusted(
    model: str, tmp_path: Path, address: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"model": model, "report_to": address, "pending": str(tmp_path)}
    with pytest.raises(UserError, match=words) as refused:
        ServeConfig(**settings).check()
    assert "PLANTED" not in str(refused.value)
    with pytest.raises(UserError, match=words), running(**settings):
        pass
    monkeypatch.setenv("BTRAY_PACS_USER", "me")
    with pytest.raises(UserError, match="BTRAY_PACS_PASSWORD"):
        ServeConfig(**settings | {"report_to": "dicomweb://pacs/root"}).check()
    with pytest.raises(ValidationError, match="pending"):
        ServeConfig(model=model, report_to="dicomweb://pacs/root")


# ---- what waits


def test_a_push_while_a_study_is_reported_makes_it_wait_again(place: str) -> None:
    pending = PendingStudies(place)
    pending.add("1.2")
    pending.add("1.2")
    pending.add("1.3")
    before = pending.marks()
    pending.add("1.2")
    pending.remove(before["1.2"])
    pending.remove(before["1.2"])  # as a second process would
    left = pending.marks()
    assert (len(left["1.2"]), left["1.3"]) == (1, before["1.3"])
    assert not left["1.2"] & before["1.2"]


def test_a_study_is_still_after_a_quiet_time_of_the_watchers_own_clock() -> None:
    still = StillStudies(quiet=60)
    a, b, more = frozenset({"a"}), frozenset({"b"}), frozenset({"a", "c"})
    assert still.of({"1": a}, 1000.0) == [], "however long it has waited for a process that was away"
    assert still.of({"1": a, "2": b}, 1059.0) == []
    assert still.of({"1": a, "2": b}, 1060.0) == ["1"]
    assert still.of({"1": more, "2": b}, 1061.0) == [], "it grows"
    assert still.of({"1": more, "2": b}, 1121.0) == ["2", "1"]
    still.again("2", 1121.0, 300.0)
    assert still.of({"1": more, "2": b}, 1420.0) == ["1"]
    assert still.of({"1": more, "2": b}, 1421.0) == ["1", "2"]
    still.again("2", 1421.0, 300.0)
    assert still.of({"2": more}, 1500.0) == []
    assert still.of({"2": more}, 1560.0) == ["2"], "a push ends a pause"


def test_strange_names_in_the_folder_of_marks_are_no_studies(tmp_path: Path) -> None:
    for name in ("1.2", "_lease", ".x.tmp", "x_1", "1.2_", "..%2f_1"):
        (tmp_path / name).write_text("")
    assert set(PendingStudies(str(tmp_path)).marks()) == {"1.2"}
    assert len(os.listdir(tmp_path)) == 6
