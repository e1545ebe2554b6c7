"""The search: its space, which trials are worth their cost, and that a killed search resumes without a difference."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from btray import storage
from btray.core.config import JobConfig
from btray.core.errors import UserError
from btray.model.bundle import load_bundle
from btray.model.config import NetworkConfig
from btray.model.network import build_network
from btray.training import prepare, tuning
from btray.training.config import SpaceConfig, TrainConfig, TuneConfig
from btray.training.history import EpochRecord
from btray.training.tuning import (
    Announcer,
    EarlyStopping,
    concurrency,
    cpus_of_a_trial,
    default_point,
    domains,
    trial_config,
    tune,
    varied_settings,
)
from btray.training.tuning_report import TrialRecord, accuracy_against_cost, by_score, frontier, table_csv, table_text
from tests.conftest import ROOT
from tests.helpers.training_helpers import latest_report, tiny, write_tree
from tools.processes import descendants, is_alive

SMALL = SpaceConfig(
    width=(1.0, 2.0), depth=(0,), kernel=(3,), squeeze_excite=(0.25,), pooling=("average_max",), dropout=(0.0, 0.0),
    learning_rate=(1e-3, 3e-2), weight_decay=(0.05, 0.05), label_smoothing=(0.1, 0.1), mixup=(0.0,),
)  # fmt: skip


def trial(name: str, gflop: float, macro_f1: float | None, state: Any = "finished") -> TrialRecord:
    best = None if macro_f1 is None else epoch_of(macro_f1)
    return TrialRecord(
        trial=name, state=state, epochs=3, best=best, gflop=gflop, parameters=1000, seconds=3.0, settings={"width": 1.0}
    )


def epoch_of(macro_f1: float) -> EpochRecord:
    return EpochRecord(
        epoch=2, train_loss=1.0, learning_rate=0.001, images=40, images_per_second=9.0, feed_ratio=1.0, val_loss=1.0,
        val_macro_f1=macro_f1, val_accuracy=macro_f1, score=macro_f1, rejected=0, seconds=1.0,
    )  # fmt: skip


# ---- the space


def test_every_point_of_the_default_space_is_a_network_that_can_be_built() -> None:
    config = TuneConfig(data="d", out="o")
    drawn = domains(config.space)
    seen = set()
    for _ in range(40):
        point = {name: value.sample() if hasattr(value, "sample") else value for name, value in drawn.items()}
        trained = trial_config(config, point, "t")
        assert type(trained) is TrainConfig
        assert all(width % 8 == 0 for width in trained.network.widths)
        assert NetworkConfig.model_validate(trained.network.model_dump()) == trained.network
        build_network(trained.network, 4)
        seen.add((trained.network.widths, trained.network.depths, trained.network.kernel))
    assert len(seen) > 5


def test_the_config_as_it_is_given_is_a_trial_and_one_outside_the_space_is_none() -> None:
    config = TuneConfig(data="d", out="o")
    point = default_point(config)
    assert point is not None
    trained = trial_config(config, point, "t")
    assert (trained.network, trained.optimiser) == (config.network, config.optimiser)
    outside = config.optimiser.model_copy(update={"learning_rate": 0.5})
    assert default_point(config.model_copy(update={"optimiser": outside})) is None


def test_a_setting_with_one_value_is_fixed() -> None:
    assert varied_settings(SMALL) == ["width", "learning_rate"]
    assert domains(SMALL)["mixup"] == 0.0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--space.learning-rate", "0.1,0.01"], r"--space\.learning-rate.*LOW <= HIGH"),
        (["--space.learning-rate", "0,0.01"], "above 0"),
        (["--space.dropout", "0.2,1.5"], "below 1"),
        (["--space.kernel", "4"], r"--space\.kernel"),
        (["--space.widht", "4"], "widht"),
        (["--reduction", "1"], "--reduction"),
        (["--init-from", "m"], r"--space\.width varies it: give one value"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused_in_one_line(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        TuneConfig.from_command_line(["--data", "d", "--out", "o", *flags], "tune")
    assert "\n" not in str(caught.value)


def test_flags_of_training_and_of_the_space_go_together() -> None:
    flags = ["--data", "d", "--out", "o", "--space.width", "1,2", "--space.dropout", "0.1,0.2", "--network.depths"]
    config = TuneConfig.from_command_line([*flags, "1,1,1,1", "--num-workers", "2"], "tune")
    assert config.space.width == (1.0, 2.0)
    assert config.space.dropout == (0.1, 0.2)
    assert isinstance(config, JobConfig)
    assert config.network.depths == (1, 1, 1, 1)
    assert config.worker_range == (2, 2)


# ---- the report


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_nothing_beats_the_frontier_and_what_it_leaves_out_is_beaten(points: list[tuple[int, int]]) -> None:
    trials = [trial(f"t{number}", cost, f1 / 5) for number, (cost, f1) in enumerate(points)]
    best = {(cost, f1) for cost, f1, _ in frontier(trials)}
    everything = {(one.gflop, one.macro_f1) for one in trials}

    def beaten(one: Any, other: Any) -> bool:
        return other[0] <= one[0] and other[1] >= one[1] and other != one

    assert not any(beaten(one, other) for one in best for other in everything)
    assert all(one in best or any(beaten(one, other) for other in everything) for one in everything)


def test_the_table_has_every_trial_best_first_and_failed_ones_last() -> None:
    trials = [
        trial("a", 1.0, 0.5),
        trial("b", 2.0, None, "failed"),
        trial("c", 3.0, 0.9),
        trial("d", 4.0, 0.7, "stopped"),
    ]
    read = list(csv.DictReader(io.StringIO(table_csv(trials).decode())))
    assert [line["trial"] for line in read] == ["c", "d", "a", "b"]
    columns = (
        "trial state epochs score val_macro_f1 val_accuracy val_loss gflop parameters images_per_second seconds error"
    )
    assert list(read[0]) == [*columns.split(), "width"]
    assert [line["score"] for line in read] == ["0.9", "0.7", "0.5", ""]
    lines = table_text(trials, ["width"]).splitlines()
    assert [line.split()[0] for line in lines] == ["trial", "c", "d", "a", "b"]
    assert [line.endswith("*") for line in lines] == [False, True, False, True, False]


def test_the_plot_is_a_picture_of_all_trials() -> None:
    trials = [
        trial("a", 0.1, 0.5),
        trial("b", 0.2, None, "failed"),
        trial("c", 0.4, 0.9),
        trial("d", 0.4, 0.7, "stopped"),
    ]
    pictures = [
        np.asarray(Image.open(io.BytesIO(accuracy_against_cost(some, by_score(some)[0], images=50))).convert("RGB"))
        for some in (trials, trials[:3], trials[:1])
    ]
    assert all(picture.std() > 5 for picture in pictures)
    assert not np.array_equal(pictures[0], pictures[1])


# ---- how many at a time, and for how long


@pytest.mark.parametrize(
    ("cluster", "workers", "wanted", "expected"),
    [
        ((8, True), "1", None, (8, 1.0)),
        ((8, True), "2", None, (4, 2.0)),
        ((8, True), "1", 3, (3, 8 / 3)),
        ((2, True), "1", 6, (2, 1.0)),
        ((2, True), "4", None, (1, 2.0)),
        # the head of a cluster that has no worker yet: no CPU counts as one
        ((1, False), "1", None, (1, 1.0)),
        ((1, False), "1", 6, (6, 0.9)),
        ((1, False), "2:4", 3, (3, 3.6)),
    ],
)
def test_trials_at_a_time_are_what_the_machine_holds_or_what_a_cluster_may_grow_to(
    monkeypatch: pytest.MonkeyPatch, cluster: tuple[int, bool], workers: str, wanted: int | None, expected: Any
) -> None:
    at_a_time, share = expected
    of_a_cluster(monkeypatch, *cluster)
    config = TuneConfig(data="d", out="o", num_workers=workers, concurrent=wanted)
    assert concurrency(config) == at_a_time
    assert cpus_of_a_trial(config, at_a_time) == pytest.approx(share)


def of_a_cluster(monkeypatch: pytest.MonkeyPatch, cpus: int, own: bool) -> None:
    for module in (tuning, prepare):
        monkeypatch.setattr(module, "cpus", lambda: float(cpus))
    monkeypatch.setattr(tuning, "started_ray_here", lambda: own)


def test_no_more_trials_at_a_time_than_there_are_or_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    of_a_cluster(monkeypatch, 64, True)
    assert concurrency(TuneConfig(data="d", out="o", trials=5)) == 5
    monkeypatch.setattr(tuning, "gpus", lambda: 3)
    monkeypatch.setattr(prepare, "require_gpus", lambda: 3)
    assert concurrency(TuneConfig(data="d", out="o", trials=5, use_gpu=True)) == 3


def test_a_weak_trial_is_asked_to_end_and_never_killed(tmp_path: Path) -> None:
    """Killed, its run would keep its CPUs: see EarlyStopping."""
    scheduler = EarlyStopping(str(tmp_path), time_attr="epoch", max_t=10, grace_period=1, reduction_factor=2)
    scheduler.set_search_properties("score", "max")
    trials = [SimpleNamespace(trial_id=name, config={}) for name in ("good", "weak")]
    for trial in trials:
        scheduler.on_trial_add(None, trial)

    def result(trial: Any, epoch: int, score: float) -> str:
        return scheduler.on_trial_result(None, trial, {"epoch": epoch, "score": score})

    for epoch in (1, 2, 3):
        assert [result(trials[0], epoch, 0.9), result(trials[1], epoch, 0.1)] == ["CONTINUE", "CONTINUE"]
        assert [path.parent.name for path in tmp_path.glob("*/stop")] == ["weak"]
        (tmp_path / "weak" / "stop").unlink()  # as a resumed run does


@pytest.mark.parametrize(
    ("told", "cause"),
    [
        ("ray.exceptions.RayTaskError: ray::trial()\n  File x\nValueError: too odd\n", "ValueError: too odd"),
        ("Traceback:\n  raise\nbtray.core.errors.UserError: it diverged; lower it\n", "it diverged; lower it"),
    ],
)
def test_a_trial_that_fails_is_one_line_with_its_settings_and_its_cause(
    told: str, cause: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "error.txt").write_text(f"Failure # 1 (occurred at noon)\n{told}\n")
    config = TuneConfig(data="d", out="o", space=SMALL)
    failed = SimpleNamespace(
        trial_id="ab12", error_file=str(tmp_path / "error.txt"), config={"width": 2.0, "learning_rate": 0.5},
        last_result={"epoch": 3},
    )  # fmt: skip
    Announcer(config, "runs/search").on_trial_error(1, [failed], failed)
    (line,) = caplog.messages
    assert "\n" not in line
    assert line.startswith("trial ab12 (width 2, learning_rate 0.5) failed after 3 epochs: " + cause)
    assert line.endswith("runs/search/ab12/error.txt")


# ---- the search itself


def small_search(data: str, out: Path, **changes: Any) -> TuneConfig:
    trained = tiny(data, out).model_dump(exclude={"name", "storage"})
    few = {"trials": 3, "epochs": 3, "grace": 1, "space": SMALL, "refit_epochs": 1, "search": "random"}
    return TuneConfig(**{**trained, **few, **changes})


def table_of(config: TuneConfig) -> list[dict[str, str]]:
    text = storage.read_text(storage.join(storage.resolve(config.storage_uri), config.name, "trials.csv"))
    return list(csv.DictReader(io.StringIO(text)))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    labels = ("glioma", "no_tumor", "pituitary")
    return write_tree(
        tmp_path_factory.mktemp("pictures"),
        {f"Training/{label}": 24 for label in labels} | {f"Testing/{label}": 5 for label in labels},
    )


@pytest.mark.cluster
def test_a_trial_that_fails_before_it_reports_is_a_row_with_its_settings_and_its_failure(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(point: dict[str, Any], **_: Any) -> None:
        raise UserError(f"width {point['width']} does not fit; give less")

    monkeypatch.setattr(tuning, "_run_trial", fails)
    config = small_search("d", tmp_path / "model", trials=2)
    data: Any = SimpleNamespace(plan=SimpleNamespace(run_uri=str(tmp_path / "run"), classes=("glioma", "no_tumor")))
    records = tuning._search(config, data)
    rows = list(csv.DictReader(io.StringIO(table_csv(records).decode())))
    assert [(line["state"], line["epochs"]) for line in rows] == [("failed", "0")] * 2
    assert {line["trial"] for line in rows} == {
        path.parent.name for path in (tmp_path / "run").glob("search/*/error.txt")
    }
    assert [line["error"] for line in rows] == [f"width {line['width']} does not fit; give less" for line in rows]


@pytest.mark.cluster
@pytest.mark.soak
@pytest.mark.parametrize("search", ["random", "optuna"])
def test_the_best_trial_becomes_the_bundle_and_the_same_command_changes_nothing(
    ray_session: None, pictures: str, tmp_path: Path, search: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_search(pictures, tmp_path / "model", search=search)
    assert tune(config) == config.out
    said = capsys.readouterr().out
    assert len(set(re.findall(r"^trial (\S+)  epoch 1/\d+  val macro-F1 \d", said, re.MULTILINE))) == 3
    rows = table_of(config)
    assert len(rows) == 3
    assert {"finished"} <= {line["state"] for line in rows} <= {"finished", "stopped"}
    assert any(float(line["width"]) == 1.0 and float(line["learning_rate"]) == 0.02 for line in rows), "as given"
    bundle = load_bundle(config.out)
    best = rows[0]
    assert float(best["score"]) == max(float(line["score"]) for line in rows)
    assert bundle.manifest.training["name"] == best["trial"]
    assert bundle.manifest.training["optimiser"]["learning_rate"] == float(best["learning_rate"])
    assert {"trials.csv", "trials.png", "MODEL_CARD.md"} <= set(bundle.manifest.files)
    assert "test split" in storage.read_json(storage.join(config.out, "metrics.json"))["measured_on"]
    tune(config)
    assert table_of(config) == rows
    assert load_bundle(config.out).manifest.model_id == bundle.manifest.model_id
    with pytest.raises(UserError, match=r"another trials;.*--out"):
        tune(config.model_copy(update={"trials": 5}))


@pytest.mark.cluster
@pytest.mark.soak
def test_a_search_goes_on_without_a_trial_that_fails_and_says_so_in_one_line(
    ray_session: None,
    pictures: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    # The config as it is given is the first trial; the second one diverges.
    space = SMALL.model_copy(update={"width": (1.0,), "learning_rate": (0.02, 1e30)})
    config = small_search(pictures, tmp_path / "model", trials=2, space=space)
    assert tune(config) == config.out
    said = capfd.readouterr()
    own = [record.getMessage() for record in caplog.records if record.name == "btray.training.tuning"]
    (failed,) = [line for line in own if "failed" in line]
    assert re.match(r"trial \S+ \(learning_rate .*\) failed after \d epochs: training diverged: .*txt$", failed)
    assert "Traceback" not in said.out + said.err
    assert sorted((line["state"], line["error"][:17]) for line in table_of(config)) == [
        ("failed", "training diverged"),
        ("finished", ""),
    ]


@pytest.mark.cluster
@pytest.mark.soak
def test_the_labels_of_the_test_split_change_no_trial_and_not_which_one_is_chosen(
    ray_session: None, pictures: str, tmp_path: Path
) -> None:
    mixed = tmp_path / "mixed"
    names = sorted(storage.list_names(storage.join(pictures, "Training")))
    for place, label in enumerate(names):
        for split, source in (("Training", label), ("Testing", names[(place + 1) % len(names)])):
            (mixed / split / label).mkdir(parents=True)
            for info in storage.list_files(storage.join(pictures, split, source)):
                storage.write_bytes(str(mixed / split / label / storage.name(info.uri)), storage.read_bytes(info.uri))
    seen = []
    for number, data in enumerate((pictures, str(mixed))):
        # grace: whom ASHA stops before the end depends on which of two trials at a time comes to a rung first
        config = small_search(data, tmp_path / f"model{number}", trials=2, grace=3)
        tune(config)
        timed = ("trial", "seconds", "images_per_second")
        seen.append([{key: value for key, value in line.items() if key not in timed} for line in table_of(config)])
    assert seen[0] == seen[1]


@pytest.mark.cluster
@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_a_killed_search_is_resumed_by_the_same_command(pictures: str, tmp_path: Path) -> None:
    config = small_search(pictures, tmp_path / "model", trials=4, epochs=6)
    written = tmp_path / "config.yaml"
    written.write_text(config.to_yaml())
    command = [sys.executable, str(ROOT / "jobs" / "tune.py"), "--config", str(written)]
    environment = os.environ | {"RAY_ADDRESS": "local", "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    environment["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.1"  # so often reports are taken over; an epoch is shorter
    trials = Path(config.storage_uri, config.name, "trials")

    def reported() -> dict[str, int]:
        return {path.name: latest_report(path).get("epoch", 0) for path in trials.glob("*")}

    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 400
            while job.poll() is None and (len(reported()) < 3 or not any(reported().values())):
                assert time.monotonic() < deadline
                time.sleep(0.1)
        finally:
            started = descendants(job.pid)
            job.kill()
            job.wait()
            for pid in filter(is_alive, started):
                os.kill(pid, signal.SIGKILL)
    before = {path.parent.name: path.read_text().splitlines() for path in trials.glob("*/history.jsonl")}
    epochs = reported()
    assert any(epochs.values())
    assert not Path(config.out, "bundle.json").exists()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    rows = table_of(config)
    assert len(rows) == 4
    assert before.keys() <= {line["trial"] for line in rows}, "no trial was begun anew under another name"
    for trial, lines in before.items():
        after = (trials / trial / "history.jsonl").read_text().splitlines()
        kept = epochs[trial]
        assert after[:kept] == lines[:kept]
        assert [json.loads(line)["epoch"] for line in after] == list(range(1, len(after) + 1))
    load_bundle(config.out)
