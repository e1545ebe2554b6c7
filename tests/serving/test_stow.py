"""What a PACS pushes by STOW-RS is classified as everywhere else, answered in the standard's terms, and not kept."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from btray.model.classifier import Classifier
from btray.model.studies import Reader, StudyCollector
from btray.serving.access import make_key
from tests.helpers.dicom_files import IDENTIFIERS, mr_slice, slice_file, write
from tests.helpers.hospital_archive import ROOT, instance, pixels_of
from tests.helpers.serving_helpers import Running, problem, running

STOW, CLASSIFY = "/dicomweb/studies", "/v1/classify"
RELATED = 'multipart/related; type="application/dicom"; boundary=b'
LIMITS = {"max_images": 8, "max_frames": 20, "max_body_mb": 4}
REPORT = write(mr_slice(pixels_of(0), SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11", SOPInstanceUID=f"{ROOT}.7"))


@pytest.fixture(scope="module")
def service(model: str) -> Iterator[Running]:
    with running(model=model, limits=LIMITS) as served:
        yield served


def related(objects: Sequence[bytes], kind: str = "application/dicom") -> bytes:
    head = f"\r\n--b\r\nContent-Type: {kind}\r\n\r\n".encode()
    return b"".join(head + data for data in objects) + b"\r\n--b--\r\n"


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


def test_what_is_pushed_is_not_kept_and_its_log_names_no_patient(
    service: Running, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="btray")
    pushed(service, [*study(1), instance(1, 0, 5)[:-5000], REPORT], 202)
    assert f"{ROOT}.7" in caplog.text, "what is passed over is named"
    assert not [name for name in IDENTIFIERS if name in caplog.text]
