"""`jobs/evaluate.py` measures a bundle on labelled scans; what could not be read is counted and named, never lost."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image, ImageOps

from btray import phantoms, storage
from btray.core import cluster
from btray.core.errors import ThresholdExceeded, UserError
from btray.data.fingerprint import fingerprints, thumbnails
from btray.data.labelled import read_labelled
from btray.data.labels import CANONICAL
from btray.data.scans import decode
from btray.evaluation import scoring
from btray.evaluation.assessment import assess
from btray.evaluation.config import EvaluateConfig
from btray.evaluation.job import evaluate
from btray.evaluation.metrics import compute_metrics
from btray.model.bundle import FINGERPRINTS, load_bundle, pack_fingerprints, save_bundle
from btray.model.classifier import Classifier
from tests.helpers.local_data import run_here
from tests.helpers.tiny_bundle import FILES, random_bundle, saved_bundle

pytestmark = pytest.mark.cluster

CONTRACT = {"n", "accuracy", "accuracy_ci95", "macro_f1", "auroc_macro", "ece", "per_class", "confusion_matrix"}
PLOTS = {"confusion_matrix.png", "roc_curves.png", "reliability.png", "risk_coverage.png", "worst_errors.png"}
PAGES = {"metrics.json", "report.html", "predictions.csv", "rejected.csv", "config.yaml"}


def rows(uri: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(storage.read_text(uri))))


def strict_json(uri: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(storage.read_text(uri), parse_constant=refuse)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("bundle") / "model")
    saved_bundle(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four test and two training slices of each class, and two files that are none."""
    folder = tmp_path / "data"
    phantoms.write_data_set(str(folder), per_class={"Training": 2, "Testing": 4}, seed=3)
    (folder / "Testing" / "glioma" / "broken.jpg").write_bytes(b"<html>502 Bad Gateway</html>")
    (folder / "Testing" / "no_tumor" / "empty, with comma.jpg").write_bytes(b"")
    return folder


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classify in this process, for what does not depend on Ray's actors, which take seconds to start."""
    run_here(monkeypatch)


def settings(model: str, data: object, out: object, **changes: Any) -> EvaluateConfig:
    return EvaluateConfig(**{"model": model, "data": str(data), "out": str(out), "max_rejected": 0.5, **changes})


def test_what_is_written_is_the_contract_and_what_the_classifier_says(
    ray_session: None, model: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(model, data, tmp_path / "out")
    assert evaluate(config) == str(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == PLOTS | PAGES
    metrics = strict_json(str(tmp_path / "out" / "metrics.json"))
    assert set(metrics) >= CONTRACT
    assert metrics["n"] == 20
    assert metrics["rejected"] == 2
    assert "test split" in metrics["measured_on"]
    assert metrics["confusion_matrix"]["labels"] == list(CANONICAL)
    assert np.sum(metrics["confusion_matrix"]["matrix"]) == 20
    assert [metrics["per_class"][label]["support"] for label in CANONICAL] == [4] * 5

    classifier = Classifier.load(model)
    assert metrics["model_id"] == classifier.model_id
    table = read_labelled(str(data))
    listed = [row for row in table.to_pylist() if row["split"] == "test"]
    predictions = classifier.predict([row["uri"] for row in listed])
    readable = [(row, answer) for row, answer in zip(listed, predictions, strict=True) if answer.status == "ok"]
    labels = np.array([CANONICAL.index(row["label"]) for row, _ in readable])
    expected = compute_metrics(labels, np.array([list(p.probabilities.values()) for _, p in readable]), CANONICAL)
    for key in ("accuracy", "macro_f1", "auroc_macro"):
        assert metrics[key] == pytest.approx(getattr(expected, key), abs=1e-6), key
    assert metrics["confusion_matrix"] == asdict(expected.confusion_matrix)

    written = rows(str(tmp_path / "out" / "predictions.csv"))
    assert [row["uri"] for row in written] == [row["uri"] for row, _ in readable]
    assert [row["predicted"] for row in written] == [prediction.label for _, prediction in readable]
    assert [float(row["confidence"]) for row in written] == pytest.approx([p.confidence for _, p in readable], abs=1e-5)
    resolved = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert EvaluateConfig(**resolved) == config
    assert f"accuracy {metrics['accuracy']:.3f}" in capsys.readouterr().out
    assert "2 of 22 images could not be read" in (tmp_path / "out" / "report.html").read_text()


def test_rejected_files_are_named_and_above_the_limit_the_job_ends_with_3_after_writing(
    here: None, model: str, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(ThresholdExceeded) as caught:
        evaluate(settings(model, data, out, max_rejected=0.05))
    message = str(caught.value)
    assert "--max-rejected" in message
    assert "2 of 22" in message
    assert "\n" not in message
    assert {path.name for path in out.iterdir()} == PLOTS | PAGES
    codes = {Path(row["uri"]).name: row["error_code"] for row in rows(str(out / "rejected.csv"))}
    assert codes == {"broken.jpg": "not_an_image", "empty, with comma.jpg": "empty"}
    assert strict_json(str(out / "metrics.json"))["n"] == 20
    assert evaluate(settings(model, data, out, max_rejected=2 / 22)) == str(out), "the limit itself is allowed"


def test_where_not_one_image_can_be_read_the_list_of_why_is_still_written(
    here: None, model: str, tmp_path: Path
) -> None:
    for label in ("glioma", "no_tumor"):
        storage.write_bytes(str(tmp_path / "data" / label / "x.jpg"), b"no image")
    with pytest.raises(UserError) as caught:
        evaluate(settings(model, tmp_path / "data", tmp_path / "out", max_rejected=1.0))
    assert "\n" not in str(caught.value)
    assert "rejected.csv" in str(caught.value)
    assert [row["error_code"] for row in rows(str(tmp_path / "out" / "rejected.csv"))] == ["not_an_image"] * 2


def test_the_report_counts_unread_images_among_those_that_were_given(here: None, model: str, data: Path) -> None:
    table = read_labelled(str(data))
    broken = [number for number, uri in enumerate(table["uri"].to_pylist()) if "broken" in uri]
    rows = np.array([*broken, *(set(range(3)) - set(broken))])
    bundle = load_bundle(model)
    assessment = assess(bundle, table, scoring.score(bundle, rows, table["uri"].take(rows)), measured_on="some")
    assert f"{len(broken)} of {len(rows)} images could not be read".encode() in assessment.files["report.html"]


def test_data_without_a_test_split_are_measured_whole_and_classes_may_be_absent(
    here: None, model: str, data: Path, tmp_path: Path
) -> None:
    part = tmp_path / "part"
    part.mkdir()
    for label in ("glioma", "pituitary"):
        (data / "Training" / label).rename(part / f"{label}_tumor")
    evaluate(settings(model, part, tmp_path / "out"))
    metrics = strict_json(str(tmp_path / "out" / "metrics.json"))
    assert (metrics["n"], metrics["rejected"]) == (4, 0)
    assert "all of" in metrics["measured_on"]
    assert metrics["per_class"]["no_tumor"]["support"] == 0
    assert metrics["per_class"]["no_tumor"]["recall"] is None


def test_data_of_one_class_are_measured(here: None, model: str, data: Path, tmp_path: Path) -> None:
    one = tmp_path / "one"
    one.mkdir()
    (data / "Training" / "no_tumor").rename(one / "no_tumor")
    evaluate(settings(model, one, tmp_path / "out"))
    metrics = strict_json(str(tmp_path / "out" / "metrics.json"))
    assert (metrics["n"], metrics["per_class"]["no_tumor"]["support"]) == (2, 2)
    assert metrics["auroc_macro"] is None
    assert {path.name for path in (tmp_path / "out").iterdir()} == PLOTS | PAGES


def test_a_gpu_is_asked_for_where_it_is_wanted_and_refused_where_there_is_none(
    ray_session: None, model: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"^--use-gpu: this machine has no GPU"):
        evaluate(settings(model, data, tmp_path / "out", use_gpu=True))
    monkeypatch.setattr(scoring, "cpus", lambda: 8.0)
    for gpus, blocks, use_gpu, actors in ((2, 9, True, 2), (4, 3, True, 3), (0, 9, True, 1), (2, 9, False, 8)):
        monkeypatch.setattr(scoring, "gpus", lambda found=gpus: found)
        options = scoring.actor_options(blocks, use_gpu=use_gpu)
        assert (options["num_gpus"], options["compute"].max_size) == (1 if use_gpu else None, actors)
        assert options["num_cpus"] < 1


def test_a_label_that_the_model_does_not_know_is_refused_before_anything_is_written(
    model: str, data: Path, tmp_path: Path
) -> None:
    (data / "Testing" / "glioma").rename(data / "Testing" / "lymphoma")
    with pytest.raises(UserError, match="lymphoma"):
        evaluate(settings(model, data, tmp_path / "out"))
    with pytest.raises(UserError, match="--model-id"):
        evaluate(settings(model, data, tmp_path / "out", model_id="0" * 32))
    assert not (tmp_path / "out").exists()


@pytest.mark.s3
def test_bundle_data_and_report_may_lie_in_object_storage(ray_session: None, bucket: str) -> None:
    saved_bundle(f"{bucket}/model")
    phantoms.write_data_set(f"{bucket}/data", per_class={"Training": 1}, seed=3)
    out = f"{bucket}/out"
    assert evaluate(settings(f"{bucket}/model", f"{bucket}/data", out)) == out
    assert set(storage.list_names(out)) == PLOTS | PAGES
    assert strict_json(f"{out}/metrics.json")["n"] == 5


def test_images_with_a_twin_among_those_learnt_from_are_left_out_of_the_clean_figures(
    here: None, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    learnt = sorted((data / "Training").glob("*/*"))
    own = storage.join(str(tmp_path), "model")
    prints = np.stack([fingerprints(thumbnails(decode(path.read_bytes()).frames[0])[None])[0] for path in learnt])
    save_bundle(random_bundle(), own, {**FILES, FINGERPRINTS: pack_fingerprints(prints)})
    copies = []
    for number, path in enumerate(learnt[:6]):  # under another name, mirrored, smaller, and in another format
        picture = ImageOps.mirror(Image.open(path)) if number % 2 else Image.open(path)
        copies.append(data / "Testing" / path.parent.name / f"copy{number}.png")
        picture.resize([side * 2 // 3 for side in picture.size]).save(copies[-1])
    # in one batch each: the last bits of an answer depend on how many images stand beside it
    evaluate(settings(own, data, tmp_path / "out", batch_size=64))
    metrics = strict_json(str(tmp_path / "out" / "metrics.json"))
    assert metrics["n"] == 26
    assert metrics["clean"]["n"] == 20
    for copy in copies:
        copy.unlink()
    evaluate(settings(own, data, tmp_path / "again", batch_size=64))
    alone = strict_json(str(tmp_path / "again" / "metrics.json"))
    assert alone["clean"] == metrics["clean"]
    assert {name: alone[name] for name in alone["clean"]} == alone["clean"], "without twins both are the same"
    assert "6 of these 26 images" in (tmp_path / "out" / "report.html").read_text()
    assert "20 images" in capsys.readouterr().out


def test_where_every_image_was_learnt_from_no_figure_is_clean(here: None, data: Path, tmp_path: Path) -> None:
    prints = [
        fingerprints(thumbnails(decode(path.read_bytes()).frames[0])[None])[0]
        for path in sorted((data / "Testing").glob("*/0*.jpg"))
    ]
    own = storage.join(str(tmp_path), "model")
    save_bundle(random_bundle(), own, {**FILES, FINGERPRINTS: pack_fingerprints(np.stack(prints))})
    evaluate(settings(own, data, tmp_path / "out"))
    clean = strict_json(str(tmp_path / "out" / "metrics.json"))["clean"]
    assert clean["n"] == 0
    assert clean["accuracy"] is None


def test_a_bundle_without_fingerprints_claims_nothing_about_clean_images(
    here: None, model: str, data: Path, tmp_path: Path
) -> None:
    evaluate(settings(model, data, tmp_path / "out", abstain_below=0.5))
    metrics = strict_json(str(tmp_path / "out" / "metrics.json"))
    assert metrics["clean"] is None
    assert metrics["out_of_distribution"] is None
    assert metrics["conformal"] is None
    written = rows(str(tmp_path / "out" / "predictions.csv"))
    answered = [row for row in written if float(row["confidence"]) >= 0.5]
    assert metrics["abstention"]["answered"] == len(answered)
    right = sum(row["label"] == row["predicted"] for row in answered)
    assert metrics["abstention"]["accuracy_answered"] == (right / len(answered) if answered else None)


@pytest.mark.parametrize(("given", "device"), [(["0"], "cuda"), ([], "cpu")])
def test_a_worker_takes_no_gpu_that_ray_did_not_give_it(
    monkeypatch: pytest.MonkeyPatch, given: list[str], device: str
) -> None:
    context = SimpleNamespace(get_accelerator_ids=lambda: {"GPU": given})
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.get_runtime_context", lambda: context)
    assert cluster.own_device() == device
