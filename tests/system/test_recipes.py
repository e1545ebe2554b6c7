"""The comparison of recipes: its rows are measured on the same patients, and its page says what its table holds."""

from __future__ import annotations

import csv
import importlib
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from benchmarks import attention, recipes
from btray.data.config import PreprocessConfig
from btray.data.fingerprint import LENGTH, VIEWS
from btray.data.labelled import SCHEMA
from btray.data.preprocess import make_frame
from btray.phantoms import CLASSES, phantom
from btray.training.config import TrainConfig
from tests.conftest import ROOT

SOURCES = {"large": 240, "middle": 120, "small": 40}
ARGUMENTS = Namespace(epochs=5, outliers="other")


@pytest.fixture(scope="module")
def table() -> pa.Table:
    """Three sources of patients with four slices each; metastases are in the small one alone."""
    rows = []
    for source, count in SOURCES.items():
        labels = ("glioma", "no_tumor", "other") + ("metastasis",) * (source == "small")
        for number in range(count):
            label, patient = labels[number // 4 % len(labels)], f"{source}-{number // 4}"
            rows.append({"uri": f"/{source}/{number}.jpg", "label": label, "patient_id": patient, "source": source})
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def divided(table: pa.Table, name: str, seed: int = 0) -> tuple[set[str], set[str], int]:
    """Files that a row learns from, files that it is measured on, and its epochs."""
    prints = np.zeros((len(table), VIEWS, LENGTH), np.float16)  # like no other
    images, epochs = recipes._divide(name, seed, table, prints, ARGUMENTS)
    split = np.array(images["split"].to_pylist(), object)
    uris = np.array(images["uri"].to_pylist(), object)
    return set(uris[split != "val"]), set(uris[split == "val"]), epochs


def test_rows_of_a_seed_are_measured_on_the_same_patients_and_no_patient_is_cut(table: pa.Table) -> None:
    patient = dict(zip(table["uri"].to_pylist(), table["patient_id"].to_pylist(), strict=True))
    rare = {row["uri"] for row in table.to_pylist() if row["label"] == "metastasis"}
    learnt, held, _ = divided(table, "default")
    assert 0.2 < len(held) / len(table) < 0.3
    for name in ("mixup", "25 % of patients", "100 % of patients", "1 source", "2 sources"):
        some, same, _ = divided(table, name)
        assert same == (held if name == "mixup" else held - rare), name
        assert not {patient[uri] for uri in some} & {patient[uri] for uri in same}, name
    assert divided(table, "default", seed=1)[1] != held
    assert learnt | held == set(patient)


def test_the_learning_curve_rises_in_nested_steps_and_takes_as_many_steps_on_fewer_images(table: pa.Table) -> None:
    shares = [divided(table, f"{share} % of patients") for share in (25, 50, 100)]
    assert shares[0][0] < shares[1][0] < shares[2][0]
    sources = [divided(table, name) for name in ("1 source", "2 sources")]
    assert {uri.split("/")[1] for uri in sources[0][0]} == {"large"}
    assert {uri.split("/")[1] for uri in sources[1][0]} == {"large", "middle"}
    shown = [len(learnt) * epochs for learnt, _, epochs in (*shares, *sources)]
    assert max(shown) < 1.25 * min(shown)


def test_a_source_that_is_left_out_is_measured_whole(table: pa.Table) -> None:
    learnt, held, epochs = divided(table, "without middle")
    assert held == {f"/middle/{number}.jpg" for number in range(SOURCES["middle"])}
    assert not learnt & held
    assert epochs == ARGUMENTS.epochs


@pytest.mark.parametrize("name", [*recipes.NETWORKS, *recipes.ABLATION])
def test_every_recipe_is_a_valid_command(name: str) -> None:
    flags = (recipes.NETWORKS | recipes.ABLATION)[name]
    arguments = Namespace(outliers="other", squeezenet=Path("/weights.safetensors"))
    row = {"epochs": 7, "size": 160, "seed": 3}
    config = TrainConfig.from_command_line(recipes._command(row, flags, Path("/out"), arguments), "train")
    assert (config.epochs, config.preprocess.size, config.seed, config.refit_epochs) == (7, 160, 3, 0)
    assert (config.optimiser.freeze_epochs == config.epochs) == ("frozen" in name)
    assert (config.init_from == "/weights.safetensors") == ("squeezenet" in name)


def test_a_row_of_another_schedule_is_another_row(tmp_path: Path) -> None:
    path, key = tmp_path / "table.csv", {"row": "default", "seed": 0, "epochs": 5, "size": 192}
    assert not recipes._is_in(path, key)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*key, "macro_f1"])
        writer.writeheader()
        writer.writerow({**key, "macro_f1": 0.5})
    assert recipes._is_in(path, key)
    for change in ({"seed": 1}, {"epochs": 10}, {"size": 160}, {"row": "mixup"}):
        assert not recipes._is_in(path, key | change)


def test_the_page_holds_the_rows_once_however_often_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    made = importlib.import_module("recipes_page")
    with (tmp_path / "recipes.csv").open("w", newline="") as file:
        writer: Any = None
        for row in ("default", "cnn", "mixup", "without f44", "25 % of patients", "100 % of patients", "1 source"):
            for seed in (0, 1):
                values: dict[str, Any] = {"row": row, "seed": seed, "epochs": 5, "size": 192, "parameters": 2350000}
                values |= {"gflop": 0.475, "images_per_cpu_second": 90.0, "macro_f1": 0.7 + seed / 10, "ece": 0.04}
                values |= {"macro_f1_ci95": "0.650 to 0.850", "by_source": "f44=0.700 vqamed=0.400"}
                writer = writer or csv.DictWriter(file, list(values))
                if not file.tell():
                    writer.writeheader()
                writer.writerow(values)
    page = tmp_path / "model.md"
    page.write_text(f"before\n{''.join(made.MARKS)}after\n")
    argv = ["--table", f"{tmp_path}/recipes.csv", "--page", str(page), "--images", f"{tmp_path}/images"]
    monkeypatch.setattr("sys.argv", ["recipes_page.py", *argv])
    made.main()
    once = page.read_text()
    made.main()
    assert page.read_text() == once
    assert once.startswith("before\n")
    assert once.endswith("after\n")
    assert (
        once.count("| default | 2 | 5 | 192 | 2.35 | 0.47 | 90 | 0.750 (0.650 to 0.850) | 0.040 | 0.70 | 0.40 |") == 2
    )
    assert once.count("without f44") == 1
    for name in ("recipes", "learning_curve"):
        assert f"](images/{name}.png)" in once
        assert Image.open(tmp_path / "images" / f"{name}.png").width > 800


@pytest.mark.parametrize("label", CLASSES)
def test_heat_is_shared_out_whole_among_the_ground_the_rim_and_the_inside_of_a_head(label: str) -> None:
    frame = make_frame(phantom(label, 5), PreprocessConfig())
    parts = attention._parts(frame)
    area = attention._shares(np.ones((1, *frame.shape), np.float32), parts[None])
    assert sum(area.values()) == pytest.approx(1, abs=0.01)
    assert area["inside"] > area["rim"] > 0.05
    assert frame[parts == 0].mean() < 20
    middle = np.zeros((1, *frame.shape), np.float32)
    middle[0, 90:102, 90:102] = 1
    assert attention._shares(middle, parts[None])["inside"] == 1
