"""What evaluate says of sources and of outliers: each image in its part, outliers in no figure but their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from btray import phantoms, storage
from btray.core.errors import UserError
from btray.data.labelled import read_labelled
from btray.evaluation.config import EvaluateConfig
from btray.evaluation.job import evaluate
from btray.model.classifier import Classifier
from tests.helpers.local_data import run_here
from tests.helpers.tiny_bundle import saved_bundle

ROWS = [
    *(("glioma", "f44", patient) for patient in "aabbc"),
    *(("no_tumor", "f44", patient) for patient in "ddde"),
    *(("no_tumor", "ms", patient) for patient in "aabbb"),
    *(("other", "f44", patient) for patient in "xyz"),
    *(("other", "odd", patient) for patient in "xx"),
]


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(monkeypatch)


@pytest.fixture
def data(tmp_path: Path) -> str:
    lines = ["uri,label,source,patient_id"]
    for number, (label, source, patient) in enumerate(ROWS):
        kind = "pituitary" if label == "other" else label
        Path(tmp_path, f"{number}.png").write_bytes(phantoms.encoded_phantom(kind, number))
        lines.append(f"{number}.png,{label},{source},{patient}")
    Path(tmp_path, "manifest.csv").write_text("\n".join(lines))
    return str(tmp_path / "manifest.csv")


def settings(tmp_path: Path, data: str, **changes: Any) -> EvaluateConfig:
    saved_bundle(tmp_path / "model", classes=changes.pop("classes_known", ("glioma", "no_tumor")))
    return EvaluateConfig(model=str(tmp_path / "model"), data=data, out=str(tmp_path / "out"), **changes)


def test_each_source_is_measured_by_itself_and_outliers_only_as_rejected(tmp_path: Path, data: str) -> None:
    config = settings(tmp_path, data, outliers="other", abstain_below=0.7)
    evaluate(config)
    metrics = json.loads(storage.read_text(storage.join(config.out, "metrics.json")))
    predictions = Classifier.load(config.model, abstain_below=0.7).predict(read_labelled(data)["uri"].to_pylist())
    right = np.array([answer.label == label for answer, (label, *_) in zip(predictions, ROWS, strict=True)])
    labels, sources, _ = map(np.array, zip(*ROWS, strict=True))
    assert metrics["n"] == 14
    assert np.sum(metrics["confusion_matrix"]["matrix"]) == 14
    assert metrics["accuracy"] == pytest.approx(right[labels != "other"].mean())
    f44, ms, odd = (metrics["sources"][name] for name in ("f44", "ms", "odd"))
    assert [(part["n"], part["groups"]) for part in (f44, ms, odd)] == [(9, 5), (5, 2), (0, 0)]
    assert f44["accuracy"] == pytest.approx(right[(sources == "f44") & (labels != "other")].mean())
    assert f44["recall"] is None
    assert ms["macro_f1"] is None
    assert ms["recall"] == pytest.approx(right[sources == "ms"].mean())
    assert ms["recall_ci95"][0] <= ms["recall"] <= ms["recall_ci95"][1]
    abstained = np.array([answer.abstained for answer in predictions])
    for part, where in ((metrics, labels == "other"), (f44, (sources == "f44") & (labels == "other"))):
        assert part["outliers"]["n"] == where.sum()
        assert part["outliers"]["rejected"] == part["outliers"]["abstained"] == abstained[where].sum()
    assert odd["outliers"]["n"] == 2
    page = storage.read_text(storage.join(config.out, "report.html"))
    assert "Results by source" in page
    assert "Too few patients to say" in page
    table = storage.read_text(storage.join(config.out, "predictions.csv"))
    assert table.count(",other,") == 5, "they are answered, and each answer is kept"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "'other', which is none of the model's classes"),
        ({"outliers": "lymphoma"}, "--outliers lymphoma: .* has no such label"),
        ({"outliers": "no tumour"}, "--outliers no_tumor: the model knows this class"),
        ({"outliers": "other", "classes_known": ("glioma", "meningioma")}, "'no_tumor', which is none"),
    ],
    ids=str,
)
def test_a_label_that_is_neither_known_nor_named_is_refused(
    tmp_path: Path, data: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        evaluate(settings(tmp_path, data, **changes))
    assert "\n" not in str(caught.value)


def test_nothing_but_outliers_is_one_line(tmp_path: Path, data: str) -> None:
    lines = Path(data).read_text().splitlines()
    Path(data).write_text("\n".join([lines[0], *(line for line in lines if ",other," in line)]))
    with pytest.raises(UserError, match="all images are outliers"):
        evaluate(settings(tmp_path, data, outliers="other"))
