"""Validation by sources and folds: each image is answered by a network that had not seen its source or fold."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from btray import storage
from btray.core.errors import UserError
from btray.data.frames import FRAMES_PER_SCAN
from btray.data.labelled import read_labelled
from btray.model.bundle import load_bundle
from btray.model.classifier import Classifier
from btray.model.network import build_network
from btray.training import job
from btray.training.config import TrainConfig, TuneConfig
from btray.training.history import EpochRecord
from btray.training.job import train
from btray.training.plan import Plan
from btray.training.prepare import TrainingData, read_source
from btray.training.run import TrainResult, is_finished
from tests.helpers.local_data import run_here
from tests.helpers.training_helpers import PREPROCESS, easy_picture, prepared, tiny

BOTH = [("glioma", "1", "a", ""), ("no_tumor", "2", "b", "")]
PATIENTS = [(label, number) for label in ("glioma", "no_tumor") for number in range(6)]
KINDS = {"glioma": 0, "no_tumor": 1, "other": 2, "abscess": 3}


def write_manifest(folder: Path, rows: list[tuple[str, str, str, str]]) -> str:
    """Write pictures and a manifest of rows (label, patient, source, split); returns its path."""
    lines = ["uri,label,patient_id,source,split"]
    folder.mkdir(parents=True, exist_ok=True)
    for number, (label, patient, source, split) in enumerate(rows):
        Path(folder, f"{number}.png").write_bytes(easy_picture(KINDS[label], number))
        lines.append(f"{number}.png,{label},{patient},{source},{split}")
    Path(folder, "manifest.csv").write_text("\n".join(lines))
    return str(folder / "manifest.csv")


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(monkeypatch)


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two sources with 8 patients of each class and of outliers, two slices each; one alone has abscesses."""
    rows = [
        (label, f"{label}{patient}", source, "")
        for source in "ab"
        for label in ("glioma", "no_tumor", "other")
        for patient in range(8)
        for _ in range(2)
    ]
    rows += [("abscess", f"abscess{patient}", "b", "") for patient in range(6)]
    rows += [(label, f"test{number}", "c", "test") for label in ("glioma", "no_tumor", "other") for number in range(4)]
    return write_manifest(tmp_path_factory.mktemp("sources"), rows)


class FakeTraining:
    """Stands for Ray Train: networks of random weights, each another one, and which samples each would have learnt."""

    def __init__(self) -> None:
        self.plans: dict[str, Plan] = {}
        self.weights: dict[str, dict[str, torch.Tensor]] = {}

    def __call__(self, data: TrainingData) -> TrainResult:
        plan = data.plan
        self.plans[plan.config.name] = plan
        torch.manual_seed(len(self.plans))
        network = build_network(plan.config.network, len(plan.classes))
        torch.nn.init.normal_(network.head.weight, std=2.0)
        self.weights[plan.config.name] = network.state_dict()
        best = min(plan.config.epochs, 2 * len(self.plans))  # 2 epochs for the first run, 4 for the second
        measured = len(plan.validation) > 0
        records = [
            EpochRecord(
                epoch=epoch, train_loss=1.0, learning_rate=0.1, images=1, images_per_second=1.0, feed_ratio=1.0,
                val_loss=1.0 if measured else None, val_macro_f1=0.5 if measured else None,
                val_accuracy=0.5 if measured else None, rejected=0, seconds=1.0,
                score=1.0 - abs(best - epoch) / 100 if measured else float(epoch),
            )
            for epoch in range(1, plan.config.epochs + 1)
        ]  # fmt: skip
        return TrainResult(self.weights[plan.config.name], records)


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> FakeTraining:
    fake = FakeTraining()
    monkeypatch.setattr(job, "fit", fake)
    return fake


def read_json(config: TrainConfig, name: str) -> Any:
    return json.loads(storage.read_text(storage.join(config.out, name)))


def right_of(config: TrainConfig, training: FakeTraining, run: str, refit: str = "") -> tuple[int, int]:
    """Classify what a run validates with by its own network, after `refit`: how many are right, of how many."""
    bundle, plan = load_bundle(config.out), training.plans[run]
    classifier = Classifier(replace(bundle, weights=training.weights[run + refit]))
    table = read_labelled(config.data).take(plan.rows(plan.validation))
    answers = classifier.predict(table["uri"].to_pylist())
    pairs = zip(answers, table["label"].to_pylist(), strict=True)
    return sum(answer.label == label for answer, label in pairs), len(answers)


def test_each_source_is_answered_by_the_network_without_it_and_the_last_one_learns_from_all(
    two_sources: str, training: FakeTraining, tmp_path: Path
) -> None:
    config = tiny(two_sources, tmp_path / "model", validate_by="sources", outliers=" other", epochs=6)
    train(config)
    assert list(training.plans) == ["train.round-1", "train.round-2", "train.final-3"], "3 is the mean of 2 and 4"
    metrics, bundle = read_json(config, "metrics.json"), load_bundle(config.out)
    assert bundle.manifest.classes == ("glioma", "no_tumor", "abscess")
    assert bundle.manifest.data.counts["train"] == {"glioma": 32, "no_tumor": 32, "abscess": 6, "other": 32}
    # nothing is to be learnt of abscesses without b, so b is tested without them
    assert {name: part["n"] for name, part in metrics["validation"].items()} == {"a": 32, "b": 32, "all": 64}
    assert {name: part["groups"] for name, part in metrics["validation"].items()} == {"a": 16, "b": 16, "all": 32}
    for name, part in metrics["validation"].items():
        assert part["outliers"]["n"] == (32 if name == "all" else 16)
        assert set(part["per_class"]) == {"glioma", "no_tumor"}
        assert part["macro_f1_ci95"][0] <= part["macro_f1"] <= part["macro_f1_ci95"][1]
    for name, run in (("a", "train.round-1"), ("b", "train.round-2")):
        right, images = right_of(config, training, run)
        assert metrics["validation"][name]["accuracy"] == pytest.approx(right / images)
    sources = np.array(read_labelled(two_sources)["source"].to_pylist())
    for run, learnt in (("train.round-1", {"b"}), ("train.round-2", {"a"}), ("train.final-3", {"a", "b"})):
        plan = training.plans[run]
        assert set(sources[plan.samples[plan.train] // FRAMES_PER_SCAN]) == learnt
        assert len(plan.train) + len(plan.validation) + len(plan.held_outliers) == 102 - 6 * (run == "train.round-2")
    assert (metrics["n"], metrics["outliers"]["n"], list(metrics["sources"])) == (8, 4, ["c"])
    assert bundle.manifest.data.epochs == 3
    assert bundle.manifest.thresholds.ood_score is not None
    assert bundle.ood is not None
    assert bundle.manifest.study_rule is not None, "32 patients with two slices each"
    assert sum(read_json(config, "reference.json")["labels"].values()) == 64, "outliers do not count"
    card = storage.read_text(storage.join(config.out, "MODEL_CARD.md"))
    assert "fewer than 10" in card
    assert "Validation:" in card
    trained = dict(training.plans)
    train(config)
    assert training.plans == trained, "it is finished"


def test_what_a_source_is_tested_with_was_not_learnt_as_a_picture_of_another_source(
    training: FakeTraining, tmp_path: Path
) -> None:
    rows = [(label, f"{patient}", source, "") for source in "ab" for label, patient in PATIENTS]
    manifest = write_manifest(tmp_path / "data", rows)
    shared = {(number, number + len(PATIENTS)) for number in (0, 1, 7)}
    for number, twin in shared:
        shutil.copy(tmp_path / "data" / f"{number}.png", tmp_path / "data" / f"{twin}.png")
    train(tiny(manifest, tmp_path / "model", validate_by="sources", epochs=2, refit_epochs=1))
    of_a, of_b = set(range(12)), set(range(12, 24))
    learnt = {name: set(plan.rows(plan.train).tolist()) for name, plan in training.plans.items()}
    assert learnt["train.round-1"] == learnt["train.round-1.refit-2-1"] == of_b - {twin for _, twin in shared}
    assert learnt["train.round-2"] == of_a - {number for number, _ in shared}
    assert learnt["train.final-2"] == of_a | of_b
    assert set(training.plans["train.round-1"].rows(training.plans["train.round-1"].validation)) == of_a


def test_a_run_is_finished_once_its_bundle_is_made_of_the_files_that_are_there(
    training: FakeTraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [(label, patient, "a", "") for label, patient in PATIENTS] + [("glioma", "0", "a", "test")]
    config = tiny(write_manifest(tmp_path / "data", rows), tmp_path / "model", epochs=1, validation=0.3)
    train(config)
    assert is_finished(read_source(config))
    write_manifest(tmp_path / "data", [*rows, ("no_tumor", "0", "a", "test")])
    assert not is_finished(read_source(config))
    with monkeypatch.context() as patch:
        patch.setattr(job, "save_bundle", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert not is_finished(read_source(config)), "the bundle was tested with fewer images"
    train(config)
    assert is_finished(read_source(config))


def test_without_a_test_split_the_answers_of_all_folds_are_measured_after_each_refit(
    two_sources: str, training: FakeTraining, tmp_path: Path
) -> None:
    table = read_labelled(two_sources)
    rows = [(row["label"], row["patient_id"], row["source"], "") for row in table.to_pylist() if row["split"] != "test"]
    manifest = write_manifest(tmp_path / "data", rows)
    config = tiny(
        manifest, tmp_path / "model", validate_by="folds", folds=2, outliers="other", epochs=4, refit_epochs=1
    )
    train(config)
    rounds, refit = ("train.round-1", "train.round-2"), ".refit-4-1"
    order = [name for run in rounds for name in (run, run + refit)]
    assert list(training.plans) == [*order, "train.final-3", "train.refit-3-1"]
    for run in rounds:
        held, learnt = training.plans[run], training.plans[run + refit].train
        assert set(learnt) == set(held.train), "what is held out of a round is held out of its refit"
        assert not set(learnt) & {*held.validation, *held.held_outliers}
    assert len(training.plans["train.refit-3-1"].train) == 102
    metrics = read_json(config, "metrics.json")
    assert metrics["n"] == metrics["validation"]["all"]["n"] == 70
    assert metrics["outliers"]["n"] == 32
    assert set(metrics["sources"]) == {"a", "b"}
    assert metrics["accuracy"] == pytest.approx(metrics["validation"]["all"]["accuracy"])
    assert list(metrics["validation"]) == ["fold 1", "fold 2", "all", "a", "b"]
    assert {name: metrics["validation"][name] for name in "ab"} == metrics["sources"], "over both folds"
    right = [right_of(config, training, run, refit)[0] for run in rounds]
    assert sum(right) / 70 == pytest.approx(metrics["accuracy"])


def test_held_out_patients_are_answered_by_the_network_before_the_refit(
    two_sources: str, training: FakeTraining, tmp_path: Path
) -> None:
    config = tiny(two_sources, tmp_path / "model", outliers="other", refit_epochs=1, epochs=2)
    train(config)
    assert list(training.plans) == ["train", "train.refit-2-1"]
    parts = read_json(config, "metrics.json")["validation"]
    part = parts["held out"]
    assert part["n"] == parts["a"]["n"] + parts["b"]["n"]
    right, images = right_of(config, training, "train")
    assert (part["n"], part["accuracy"]) == (images, pytest.approx(right / images))
    assert part["outliers"]["n"] > 0


def test_folds_hold_each_sample_out_once_and_cut_no_patient(two_sources: str, tmp_path: Path) -> None:
    data = prepared(tiny(two_sources, tmp_path, validate_by="folds", folds=4, outliers="other"))
    assert np.array(list(data.rounds.values())).sum(axis=0).tolist() == [1] * len(data.plan.samples)
    assert list(data.rounds) == ["fold 1", "fold 2", "fold 3", "fold 4"]
    assert data.plan.train.tolist() == list(range(len(data.plan.samples)))
    table = data.source.table.take(data.plan.samples // 1024)
    patients = [
        f"{source}/{one}"
        for source, one in zip(*table.select(["source", "patient_id"]).to_pydict().values(), strict=True)
    ]
    for name in data.rounds:
        plan = data.without(name).plan
        assert not {patients[index] for index in plan.train} & {patients[index] for index in plan.validation}
        sides = [plan.train, plan.validation, plan.held_outliers]
        assert sorted(np.concatenate(sides).tolist()) == list(range(len(patients)))
        assert set(plan.labels[plan.validation]) == {0, 1, 2}, "each class is in each fold"
        assert set(plan.labels[plan.held_outliers]) == {-1}
        assert sum(plan.class_counts()) == (plan.labels[plan.train] >= 0).sum()
    assert data.digest() != prepared(tiny(two_sources, tmp_path, outliers="other")).digest()


def test_outliers_are_of_no_class_and_some_patients_of_theirs_are_held_out(two_sources: str, tmp_path: Path) -> None:
    plan = prepared(tiny(two_sources, tmp_path, outliers="other")).plan
    assert set(plan.labels[plan.validation]) == {0, 1, 2}
    assert set(plan.labels[plan.held_outliers]) == {-1}
    assert (plan.labels[plan.train] == -1).sum() + len(plan.held_outliers) == 32
    assert plan.label_names(plan.held_outliers[:1]) == ["other"]
    optimiser = plan.config.optimiser.model_copy(update={"class_balance": "sampling"})
    balanced = replace(plan, config=plan.config.model_copy(update={"optimiser": optimiser}))
    assert set(plan.labels[balanced.epoch_order(0)].tolist()) == {-1, 0, 1, 2}


def test_ct_among_the_training_images_is_left_out_only_when_asked(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "data", [(label, f"{label}{one}", "", "") for label, one in PATIENTS])
    y, x = (np.mgrid[0:256, 0:256] - 127.5) / 115
    radius = np.hypot(x / 0.8, y)
    skull = np.select([radius >= 1, radius > 0.9], [0, 255], 90).astype(np.uint8)
    Image.fromarray(skull).save(tmp_path / "data" / "3.png")
    preprocess = PREPROCESS.model_copy(update={"size": 96})
    used = {}
    for leave_out in ((), ("ct",)):
        data = prepared(tiny(manifest, tmp_path / "model", leave_out=leave_out, preprocess=preprocess))
        used[leave_out] = set(data.plan.samples // FRAMES_PER_SCAN)
    assert used[()] - used[("ct",)] == {3}
    assert len(used[("ct",)]) == len(PATIENTS) - 1


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([("glioma", "1", "", ""), ("no_tumor", "2", "", "")], {"validate_by": "sources"}, "column source"),
        (BOTH, {"validate_by": "folds", "folds": 5}, "5 folds"),
        ([*BOTH, ("glioma", "3", "b", "val")], {"validate_by": "sources"}, "val split"),
        (BOTH, {"outliers": "lymphoma"}, "--outliers lymphoma"),
        (BOTH, {"outliers": "glioma"}, "at least two classes"),
    ],
)
def test_what_cannot_be_held_out_is_one_line(
    tmp_path: Path, rows: list[tuple[str, str, str, str]], changes: dict[str, Any], message: str
) -> None:
    manifest = write_manifest(tmp_path / "data", rows * 2)
    with pytest.raises(UserError, match=message) as caught:
        train(tiny(manifest, tmp_path / "model", **changes))
    assert "\n" not in str(caught.value)


def test_a_search_compares_trials_on_one_split() -> None:
    with pytest.raises(ValueError, match="patients"):
        TuneConfig(data="d", out="o", validate_by="folds")  # type: ignore[arg-type]  # as a YAML file may say
