"""Validation by sources and folds: each image is answered by a network that had not seen its source or fold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from btray import storage
from btray.core.errors import UserError
from btray.model.bundle import load_bundle
from btray.training.config import TrainConfig, TuneConfig
from btray.training.history import best_record, read_history
from btray.training.job import train
from btray.training.plan import run_folder
from tests.helpers.training_helpers import easy_picture, prepared, tiny

pytestmark = pytest.mark.cluster

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


def parts_of(config: TrainConfig) -> Any:
    return json.loads(storage.read_text(storage.join(config.out, "metrics.json")))


def test_each_source_is_answered_by_a_network_without_it_and_all_train_the_last_one(
    ray_session: None, two_sources: str, tmp_path: Path
) -> None:
    config = tiny(two_sources, tmp_path / "model", validate_by="sources", outliers=" other", epochs=3)
    train(config)
    metrics, bundle = parts_of(config), load_bundle(config.out)
    assert bundle.manifest.classes == ("glioma", "no_tumor", "abscess")
    assert bundle.manifest.data.counts["train"] == {"glioma": 32, "no_tumor": 32, "abscess": 6, "other": 32}
    # nothing is to be learnt of abscesses without b, so b is tested without them
    assert {name: part["n"] for name, part in metrics["validation"].items()} == {"a": 32, "b": 32, "all": 64}
    assert {name: part["groups"] for name, part in metrics["validation"].items()} == {"a": 16, "b": 16, "all": 32}
    assert {name: part["outliers"]["n"] for name, part in metrics["validation"].items()} == {
        "a": 16,
        "b": 16,
        "all": 32,
    }
    for part in metrics["validation"].values():
        assert set(part["per_class"]) == {"glioma", "no_tumor"}
        assert part["macro_f1_ci95"][0] <= part["macro_f1"] <= part["macro_f1_ci95"][1]
    assert (metrics["n"], metrics["outliers"]["n"]) == (8, 4)
    assert list(metrics["sources"]) == ["c"]
    runs = Path(run_folder(config)).parent
    best = [best_record(read_history(str(runs / f"train.round-{number}"))).epoch for number in (1, 2)]
    epochs = round(float(np.mean(best)))
    history = read_history(str(runs / f"train.final-{epochs}"))
    assert (len(history), {record.val_loss for record in history}) == (epochs, {None})
    assert bundle.manifest.data.epochs == epochs
    assert bundle.manifest.thresholds.ood_score is not None
    card = storage.read_text(storage.join(config.out, "MODEL_CARD.md"))
    assert "fewer than 10" in card
    assert "Validation:" in card
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*.jsonl")}
    train(config)
    assert before == {path: path.stat().st_mtime_ns for path in runs.rglob("*.jsonl")}, "it is finished"


def test_folds_hold_each_sample_out_once_and_cut_no_patient(
    ray_session: None, two_sources: str, tmp_path: Path
) -> None:
    data = prepared(tiny(two_sources, tmp_path, validate_by="folds", folds=4, outliers="other"))
    assert np.array(list(data.rounds.values())).sum(axis=0).tolist() == [1] * len(data.plan.samples)
    assert list(data.rounds) == ["fold 1", "fold 2", "fold 3", "fold 4"]
    assert data.plan.train.tolist() == list(range(len(data.plan.samples)))
    table = data.source.table.take(data.plan.samples // 1024)
    patients = [
        f"{source}/{one}"
        for source, one in zip(*table.select(["source", "patient_id"]).to_pydict().values(), strict=True)
    ]
    for held in data.rounds.values():
        plan = data.plan.hold_out(held, 1)
        assert not {patients[index] for index in plan.train} & {patients[index] for index in plan.validation}
        sides = [plan.train, plan.validation, plan.held_outliers]
        assert sorted(np.concatenate(sides).tolist()) == list(range(len(patients)))
        assert set(plan.labels[plan.validation]) == {0, 1, 2}, "each class is in each fold"
        assert set(plan.labels[plan.held_outliers]) == {-1}
        assert sum(plan.class_counts()) == (plan.labels[plan.train] >= 0).sum()
    assert data.digest() != prepared(tiny(two_sources, tmp_path, outliers="other")).digest()


def test_outliers_are_of_no_class_and_some_patients_of_theirs_are_held_out(
    ray_session: None, two_sources: str, tmp_path: Path
) -> None:
    plan = prepared(tiny(two_sources, tmp_path, outliers="other")).plan
    assert set(plan.labels[plan.validation]) == {0, 1, 2}
    assert set(plan.labels[plan.held_outliers]) == {-1}
    assert (plan.labels[plan.train] == -1).sum() + len(plan.held_outliers) == 32
    assert plan.label_names(plan.held_outliers[:1]) == ["other"]
    optimiser = plan.config.optimiser.model_copy(update={"class_balance": "sampling"})
    balanced = replace(plan, config=plan.config.model_copy(update={"optimiser": optimiser}))
    assert set(plan.labels[balanced.epoch_order(0)].tolist()) == {-1, 0, 1, 2}


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([("glioma", "1", "", ""), ("no_tumor", "2", "", "")], {"validate_by": "sources"}, "column source"),
        ([("glioma", "1", "a", ""), ("no_tumor", "2", "b", "")], {"validate_by": "folds", "folds": 5}, "5 folds"),
        ([("glioma", "1", "a", ""), ("no_tumor", "2", "b", "val")], {"validate_by": "sources"}, "val split"),
        ([("glioma", "1", "a", ""), ("no_tumor", "2", "b", "")], {"outliers": "lymphoma"}, "--outliers lymphoma"),
        ([("glioma", "1", "a", ""), ("no_tumor", "2", "b", "")], {"outliers": "glioma"}, "at least two classes"),
    ],
)
def test_what_cannot_be_held_out_is_one_line(
    ray_session: None, tmp_path: Path, rows: list[tuple[str, str, str, str]], changes: dict[str, Any], message: str
) -> None:
    manifest = write_manifest(tmp_path / "data", rows * 2)
    with pytest.raises(UserError, match=message) as caught:
        train(tiny(manifest, tmp_path / "model", **changes))
    assert "\n" not in str(caught.value)


def test_a_search_compares_trials_on_one_split() -> None:
    with pytest.raises(ValueError, match="patients"):
        TuneConfig(data="d", out="o", validate_by="folds")
