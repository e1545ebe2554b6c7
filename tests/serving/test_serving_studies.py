"""Callers get one answer for a series or study by the rule that the table has, however many requests it took."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from btray.model.classifier import Classifier
from btray.model.prediction import as_record
from btray.model.studies import Reader, StudyCollector
from btray.phantoms import phantom
from tests.helpers.dicom_files import SERIES, slice_file
from tests.helpers.nifti_files import write_nifti
from tests.helpers.serving_helpers import Running, bundle_at, problem, running, scan

CLASSIFY, STUDIES = "/v1/classify", "/v1/studies"
DICOM = "application/dicom"


@pytest.fixture(scope="module")
def service(model: str) -> Iterator[Running]:
    with running(model=model, limits={"max_images": 4}) as served:
        yield served


def study() -> list[bytes]:
    """Return two series of six and three slices; one file of the first is cut."""
    labels = ("glioma", "no_tumor", "meningioma")
    files = [
        slice_file(
            phantom(labels[number % 3], number, size=64), SeriesInstanceUID=f"{SERIES}.{number // 6}", InstanceNumber=1,
            ImagePositionPatient=[0, 0, float(-number)], SOPInstanceUID=f"{SERIES}.9.{number}",
        )
        for number in range(9)
    ]  # fmt: skip
    files[4] = files[4][:-2000]
    return files


def test_a_study_that_took_several_requests_is_decided_as_predict_decides_it(
    service: Running, classifier: Classifier
) -> None:
    files = study()
    predictions = classifier.predict(files)
    reader = Reader.of(classifier.manifest)
    expected = StudyCollector(reader)
    expected.add(predictions)
    frames: list[dict[str, Any]] = []
    for start in range(0, len(files), 4):  # the last one is alone
        part = [("images", ("scan", data)) for data in files[start : start + 4]]
        frames += service.post(CLASSIFY, files=part, params={"each": "true"}).json()["results"]
    assert [frame["status"] for frame in frames] == [prediction.status for prediction in predictions]
    answer = service.post(STUDIES, json={"frames": frames})
    assert answer.status_code == 200, answer.text
    content = answer.json()
    assert (content["model_id"], content["rule"]) == (classifier.model_id, str(reader))
    decisions = list(expected.decisions())
    assert [result["level"] for result in content["results"]] == ["series", "series", "study"]
    good = [number for number, prediction in enumerate(predictions) if prediction.status == "ok"]
    for result, decision in zip(content["results"], decisions, strict=True):
        assert (result["study_uid"], result["series_uid"]) == (decision.study_uid, decision.series_uid)
        verdict = asdict(decision.verdict)
        of_level = [n for n in good if decision.series_uid in (None, predictions[n].series_uid)]
        assert result["key_frames"] == [of_level[number] for number in verdict.pop("key_frames")]
        assert result["probabilities"] == pytest.approx(verdict.pop("probabilities"), abs=1e-5)
        assert result["confidence"] == pytest.approx(verdict.pop("confidence"), abs=1e-5)
        assert {name: result[name] for name in verdict} == verdict
    assert [result["rejected"] for result in content["results"]] == [1, 0, 1]


def test_frames_that_no_one_rule_decides_are_refused(service: Running, classifier: Classifier) -> None:
    (frame,) = service.post(CLASSIFY, study()[0], DICOM).json()["results"]
    shares = frame["probabilities"]
    for frames, status, code in (
        ([], 422, "invalid"),
        ([frame, frame | {"model_id": "another"}], 422, "invalid"),
        ([frame | {"model_id": "another"}], 404, "not_found"),
        ([frame | {"probabilities": {"glioma": 1.0}}], 422, "invalid"),
        ([frame | {"probabilities": shares | {"glioma": 1.5}}], 422, "invalid"),
        ([frame | {"status": "good"}], 422, "invalid"),
        ([frame | {"study_uid": "x" * 256}], 422, "invalid"),
    ):
        problem(service.post(STUDIES, json={"frames": frames}), status, code)
    problem(service.post(STUDIES, b"{", "application/json"), 400, "bad_body")
    problem(service.post(STUDIES, b" " * 4_000_001, "application/json"), 413, "too_large")
    alone = {name: value for name, value in frame.items() if name not in ("study_uid", "series_uid")}
    assert service.post(STUDIES, json={"frames": [alone]}).json()["results"] == [], "it belongs to no series"


def test_all_of_a_study_can_be_answered_by_one_of_two_models(model: str, tmp_path: Path) -> None:
    canary = bundle_at(tmp_path, "canary", seed=1)
    with running(model=model, canary={"model": canary, "share": 0.5}) as service:
        for model_id in service.served():
            answers = [service.post(CLASSIFY, scan(), "image/jpeg", params={"model_id": model_id}) for _ in range(6)]
            assert {answer.json()["model_id"] for answer in answers} == {model_id}
        problem(service.post(CLASSIFY, scan(), "image/jpeg", params={"model_id": "gone"}), 404, "not_found")


def test_a_long_volume_is_explained_part_by_part(service: Running, classifier: Classifier) -> None:
    volume = np.stack([phantom("glioma", seed, size=64) for seed in range(10)], axis=-1)
    data = write_nifti(volume)
    problem(
        service.post(CLASSIFY, data, "application/octet-stream", params={"explain": "true"}),
        413,
        "too_many_explanations",
    )
    first: int | None = 0
    results: list[dict[str, Any]] = []
    while first is not None:
        parameters = {"explain": "true", "first_frame": first}
        content = service.post(CLASSIFY, data, "application/octet-stream", params=parameters).json()
        assert len(content["results"]) <= 4
        results += content["results"]
        first = content.get("next_frame")
    expected = [as_record(prediction) for prediction in classifier.predict([data])]
    assert [result["frame"] for result in results] == list(range(10))
    assert [result["position_mm"] for result in results] == [record["position_mm"] for record in expected]
    for result, record in zip(results, expected, strict=True):
        assert result["probabilities"] == pytest.approx(record["probabilities"], abs=1e-5)
        assert result["explanation"]["label"] == record["label"]


def test_parts_are_of_one_image_that_has_them(service: Running) -> None:
    small = io.BytesIO()
    Image.fromarray(phantom("glioma", 1, size=64)).save(small, "PNG")
    for data in (small.getvalue(), scan()):
        assert "next_frame" not in service.post(CLASSIFY, data, "image/png", params={"first_frame": 0}).json()
        problem(service.post(CLASSIFY, data, "image/png", params={"first_frame": 1}), 422, "invalid")
    two = [("images", ("a", scan())), ("images", ("b", scan()))]
    problem(service.post(CLASSIFY, files=two, params={"first_frame": 0}), 422, "invalid")
    (bad,) = service.post(CLASSIFY, b"text", "image/png", params={"each": "true"}).json()["results"]
    assert (bad["status"], bad["error_code"]) == ("rejected", "not_an_image")
