"""Every output of btray holds the same fields of a prediction: one that is added to a single output is noticed."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tritonclient.http as triton

from btray import cli
from btray.bulk.table import SCHEMA, row_of
from btray.data.fingerprint import NO_FINGERPRINT, unpack
from btray.data.frames import Rejection
from btray.data.scans import ScanRejected, SliceInfo, decode
from btray.evaluation.job import predictions_csv
from btray.evaluation.scoring import Scores
from btray.model.bundle import Bundle, save_bundle
from btray.model.classifier import Classifier
from btray.model.manifest import Thresholds
from btray.model.ood import Distribution
from btray.model.prediction import ANSWER, COLUMNS, SLICE, Prediction, as_record, csv_cells
from btray.phantoms import encoded_phantom
from btray.storage import FileInfo
from tests.helpers.dicom_files import slice_file
from tests.helpers.nifti_files import write_nifti
from tests.helpers.serving_helpers import Running, running
from tests.helpers.tiny_bundle import FILES, random_bundle

SCANS = [encoded_phantom(label, seed) for seed in range(4) for label in ("glioma", "no_tumor")]
NOISE = np.random.default_rng(0).integers(0, 256, (200, 200), dtype=np.uint8)
OBJECT = {"uri", "etag", "size"}
"""What the results table says of the object and not of the prediction."""
RUN = {"run_id", "classified_at"}
"""What it says of the run."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A saved bundle that fills every field: it abstains, gives label sets and scores."""
    plain = Classifier(random_bundle())
    frames = [frame for scan in SCANS for frame in plain.frames([scan])[0]]  # type: ignore[union-attr]
    second = sorted(plain.predict([SCANS[0]])[0].probabilities.values())[-2]
    made = random_bundle(
        ood=Distribution.fit(plain.answer(np.stack(frames)).features),
        thresholds=Thresholds(abstain_below=1.0, ood_score=0.0, conformal=second, conformal_error=0.1),
    )
    return save_bundle(made, str(tmp_path_factory.mktemp("bundle") / "model"), FILES)


@pytest.fixture(scope="module")
def prediction(bundle: Bundle) -> Prediction:
    (said,) = Classifier(bundle).predict([SCANS[0]])
    assert all(getattr(said, name) not in (None, (), {}, False) for name in ANSWER), "a field has no value to be shown"
    return said


@pytest.fixture(scope="module")
def service(bundle: Bundle) -> Iterator[Running]:
    with running(model=bundle.uri) as served:
        yield served


def as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def test_every_field_is_of_the_answer_or_says_what_it_is_an_answer_to() -> None:
    names = {field.name for field in fields(Prediction)}
    assert names - {*ANSWER, *SLICE} == {
        "index", "uri", "frame", "status", "error_code", "error", "retryable", "engine", "model_id",
    }  # fmt: skip
    assert names - set(COLUMNS) == {"index", "uri", "model_id"}, "these stand elsewhere in the table, or nowhere"


def test_the_results_table_has_the_columns_and_values(bundle: Bundle, prediction: Prediction) -> None:
    assert set(SCHEMA.names) == {*COLUMNS, *OBJECT, *RUN}
    row = row_of(prediction, FileInfo("a.png", 7, "e", 0.0), run_id="r", classified_at=datetime.now(UTC))
    (read,) = pa.Table.from_pylist([row], schema=SCHEMA).to_pylist()
    assert dict(read["probabilities"]) == pytest.approx(prediction.probabilities)
    assert tuple(read["label_set"]) == prediction.label_set
    assert read["engine"] == "frozen float32"
    for name in set(COLUMNS) - {"probabilities", "label_set"}:
        assert read[name] == pytest.approx(getattr(prediction, name)), name


def test_the_columns_of_the_first_tables_stand_where_they_stood_and_new_ones_follow() -> None:
    first = [
        "uri", "etag", "size", "frame", "study_uid", "series_uid", "instance_uid", "status", "error_code", "error",
        "retryable", "label", "confidence", "probabilities", "abstained", "out_of_distribution", "ood_score", "run_id",
        "classified_at",
    ]  # fmt: skip
    assert SCHEMA.names[: len(first)] == first
    assert all(SCHEMA.field(name).nullable for name in SCHEMA.names[len(first) :])
    assert [field.name for field in SCHEMA if not field.nullable] == [
        "uri", "etag", "size", "frame", "status", "retryable", "abstained", "out_of_distribution", "run_id",
        "classified_at",
    ]  # fmt: skip


VOLUME = write_nifti(np.random.default_rng(5).integers(0, 4000, (60, 50, 3)).astype(np.uint16))


def test_what_the_file_says_of_a_slice_stands_in_each_output(
    service: Running,
    bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    slices = Classifier(bundle).predict([VOLUME])
    assert [(p.frame, p.plane, p.position_mm, p.spacing_mm) for p in slices] == [
        (number, "axial", number, 1.0) for number in range(3)
    ]
    rows = [row_of(p, FileInfo("a.nii", 7, "e", 0.0), run_id="r", classified_at=datetime.now(UTC)) for p in slices]
    facts = [{name: getattr(p, name) for name in SLICE} for p in slices]
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    assert table.select(list(SLICE)).to_pylist() == facts
    (path := tmp_path / "a.nii").write_bytes(VOLUME)
    monkeypatch.setattr("sys.argv", ["btray", "predict", "--model", bundle.uri, "--json", str(path)])
    cli.main()
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [{name: record[name] for name in SLICE} for record in records] == facts
    results = service.post("/v1/classify", VOLUME, "application/octet-stream").json()["results"]
    assert [(r["frame"], r["plane"], r["position_mm"], r["spacing_mm"]) for r in results] == [
        (number, "axial", number, 1.0) for number in range(3)
    ]
    described = service.get("/openapi.json").json()["components"]["schemas"]["ImageAnswer"]["properties"]
    assert set(SLICE) <= described.keys()


def test_no_picture_shows_a_frame_with_text_burned_in(service: Running) -> None:
    pixels = np.random.default_rng(5).integers(0, 4000, (60, 50)).astype(np.uint16)
    for burned, shown in (("NO", True), ("YES", False)):
        data = slice_file(pixels, BurnedInAnnotation=burned)
        (result,) = service.post("/v1/classify?explain=true", data, "application/dicom").json()["results"]
        assert (result["burned_in"], "explanation" in result) == (not shown, shown)


def test_a_rejection_says_what_the_header_said() -> None:
    info = SliceInfo(study_uid="1.2", series_uid="1.2.3", modality="MR", description="of DOE^JANE", patient_key="key")
    error = ScanRejected("truncated", "pixels end")
    error.info = info
    said = Prediction.of_rejection(Rejection.of(error), index=0, uri=None, model_id="m")
    assert (said.study_uid, said.series_uid, said.modality) == ("1.2", "1.2.3", "MR")
    assert "DOE" not in repr(said) + repr(info) + json.dumps(as_record(said))


def test_a_rejection_has_no_answer_in_any_output() -> None:
    said = Prediction.of_rejection(Rejection("empty", "no bytes", False), index=0, uri=None, model_id="m")
    row = row_of(said, FileInfo("a.png", 0, "e", 0.0), run_id="r", classified_at=datetime.now(UTC))
    assert all(not row[name] for name in (*ANSWER, "engine"))
    assert (row["probabilities"], row["label_set"]) == (None, None)
    pa.Table.from_pylist([row], schema=SCHEMA)


def test_the_command_prints_them_all_as_json_and_on_the_terminal(
    bundle: Bundle,
    prediction: Prediction,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "scan.jpg"
    path.write_bytes(SCANS[0])
    monkeypatch.setattr("sys.argv", ["btray", "predict", "--model", bundle.uri, "--json", str(path)])
    cli.main()
    record = json.loads(capsys.readouterr().out)
    assert set(record) == {field.name for field in fields(Prediction)} - {"index"}
    assert {name: record[name] for name in ANSWER} == as_json({name: getattr(prediction, name) for name in ANSWER})
    monkeypatch.setattr("sys.argv", ["btray", "predict", "--model", bundle.uri, str(path)])
    cli.main()
    header, line = capsys.readouterr().out.splitlines()
    shown = {
        **{name: name for name in ("label", "confidence")},
        "probabilities": "  ".join(f"{label:>5}" for label in bundle.manifest.classes),
        "abstained": "ABSTAINED",
        "label_set": "one of: " + ", ".join(prediction.label_set),
        "out_of_distribution": "UNLIKE THE TRAINING IMAGES",
        "ood_score": f"ood_score {prediction.ood_score:.1f}",
    }
    assert set(shown) == set(ANSWER), "say how the terminal shows it"
    assert [name for name, text in shown.items() if text not in header + line] == []


def test_the_service_answers_with_them_and_openapi_describes_them(
    service: Running, bundle: Bundle, prediction: Prediction
) -> None:
    (result,) = service.post("/v1/classify", SCANS[0], "image/jpeg").json()["results"]
    assert set(result) == {"index", "name", "frame", "status", "model_id", *ANSWER}
    values = {name: pytest.approx(value) for name, value in prediction.probabilities.items()}
    assert result["probabilities"] == values
    schema = service.get("/openapi.json").json()
    described = schema["components"]["schemas"]["ImageAnswer"]["properties"]
    assert set(described) == {*result, *SLICE, "error_code", "error", "explanation"}
    assert all(described[name]["description"] for name in described if name != "explanation")
    answer = schema["paths"]["/v1/classify"]["post"]["responses"]["200"]["content"]["application/json"]
    example = answer["example"]["results"]
    assert set(example[0]) == set(result)
    _, bad = service.post("/v1/classify", files=[("images", SCANS[0]), ("images", b"no image")]).json()["results"]
    assert set(bad) == set(example[1]) == {"index", "name", "frame", "status", "model_id", "error_code", "error"}


def inferred(service: Running, *images: bytes, binary: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the outputs that the metadata describes, and those of an answer, by their names."""
    with triton.InferenceServerClient(service.url.removeprefix("http://")) as client:
        metadata = {entry["name"]: entry for entry in client.get_model_metadata("btray")["outputs"]}
        tensor = triton.InferInput("image", [len(images)], "BYTES")
        tensor.set_data_from_numpy(np.array(images, np.object_))
        asked = None if binary else [triton.InferRequestedOutput(name, binary_data=False) for name in metadata]
        answer = client.infer("btray", [tensor], outputs=asked)
        return metadata, {entry["name"]: answer.as_numpy(entry["name"]) for entry in answer.get_response()["outputs"]}


def texts(values: np.ndarray) -> list[str]:
    return [value if isinstance(value, str) else value.decode() for value in values.tolist()]


@pytest.mark.parametrize("binary", [True, False])
def test_the_inference_protocol_gives_what_the_file_says(service: Running, binary: bool) -> None:
    pixels = np.random.default_rng(5).integers(0, 4000, (60, 50)).astype(np.uint16)
    dicom = slice_file(pixels, BurnedInAnnotation="YES", ImagePositionPatient=[0, 0, -1])
    _, given = inferred(service, dicom, SCANS[0], dicom[:-100], binary=binary)
    said = decode(dicom).slices
    assert said is not None
    assert texts(given["error_code"]) == ["", "", "truncated"]
    for name in SLICE:
        value = getattr(said[0], name)
        assert value is not None, "a fact has no value to be shown"
        if isinstance(value, float):
            np.testing.assert_array_equal(given[name], np.array([value, np.nan, value], np.float32), name)
        else:
            text = "true" if value is True else value
            assert texts(given[name]) == [text, "", text], name
    burned = [slice_file(pixels, BurnedInAnnotation=said) for said in ("NO", None)]
    assert texts(inferred(service, *burned, binary=binary)[1]["burned_in"]) == ["false", ""]


def test_the_inference_protocol_gives_them_as_outputs(service: Running, bundle: Bundle, prediction: Prediction) -> None:
    classes = bundle.manifest.classes
    metadata, given = inferred(service, SCANS[0], b"no image")
    assert list(given) == list(metadata) == [*ANSWER, "error_code", *SLICE]
    for name, values in given.items():
        shape = [2 if side == -1 else side for side in metadata[name]["shape"]]
        assert list(values.shape) == shape, name
    assert given["label"].tolist() == [str(prediction.label).encode(), b""]
    assert [name for name, inside in zip(classes, given["label_set"][0], strict=True) if inside] == list(
        prediction.label_set
    )
    np.testing.assert_allclose(given["ood_score"], [prediction.ood_score, -1], rtol=1e-4)
    np.testing.assert_allclose(given["confidence"], [prediction.confidence, -1], rtol=1e-4)
    assert given["abstained"].tolist() == given["out_of_distribution"].tolist() == [True, False]


def test_the_csv_of_an_evaluation_has_a_column_of_each(bundle: Bundle, prediction: Prediction) -> None:
    classifier = Classifier(bundle)
    (frames,) = classifier.frames([SCANS[0]])
    nothing = pa.table({"row": [], "code": [], "message": []})
    answers = classifier.answer(np.stack(frames))  # type: ignore[arg-type]
    scores = Scores(np.zeros(1, np.int64), answers, unpack([NO_FINGERPRINT]), nothing, np.array([None]))
    table = pa.table({"uri": ["a.jpg"], "label": ["glioma"]})
    header, line = csv.reader(io.StringIO(predictions_csv(bundle, table, scores).decode()))
    by_title = dict(zip(header, line, strict=True))
    shares = [f"p_{label}" for label in bundle.manifest.classes]
    assert header == [
        "uri", "label", "predicted", "confidence", *shares, "abstained", "label_set", "out_of_distribution", "ood_score"
    ]  # fmt: skip
    assert len(header) == 2 + len(csv_cells(prediction)) == 2 + len(ANSWER) - 1 + len(shares)
    assert by_title["predicted"] == prediction.label
    assert by_title["label_set"].split(";") == list(prediction.label_set)
    assert (by_title["abstained"], by_title["ood_score"]) == ("true", f"{prediction.ood_score:.6f}")


def test_predictions_are_described_without_torch() -> None:
    code = "import sys, btray; btray.Prediction; print(sorted({'torch', 'ray', 's3fs', 'PIL'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
