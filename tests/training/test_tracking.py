"""What a run reports: the line per epoch, the history file, TensorBoard events, MLflow."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event

from btray import storage
from btray.training.config import TrainConfig
from btray.training.history import HISTORY, EpochRecord
from btray.training.tracking import Tracker, progress_line, require_mlflow, summary_line


def record(epoch: int, f1: float) -> EpochRecord:
    return EpochRecord(
        epoch=epoch,
        train_loss=1.5 / epoch,
        learning_rate=0.001,
        images=3600,
        images_per_second=120.0,
        feed_ratio=0.99,
        val_loss=1.0 / epoch,
        val_macro_f1=f1,
        val_accuracy=f1,
        score=f1,
        rejected=0,
        seconds=30.0,
    )


HISTORY_OF_THREE = [record(1, 0.5), record(2, 0.9), record(3, 0.8)]


def events_in(path: Path) -> list[Event]:
    """Read TFRecords: length (8 bytes), its checksum (4), the event, its checksum (4)."""
    data, events, start = path.read_bytes(), [], 0
    while start < len(data):
        (length,) = struct.unpack_from("<Q", data, start)
        events.append(Event.FromString(data[start + 12 : start + 12 + length]))
        start += length + 16
    return events


def points(run: Path) -> dict[int, float]:
    """val_macro_f1 by epoch, from all event files of a run."""
    events = [event for path in (run / "tensorboard").iterdir() for event in events_in(path)]
    return {
        event.step: round(value.simple_value, 6)
        for event in events
        for value in event.summary.value
        if value.tag == "val_macro_f1"
    }


def test_the_progress_line_says_loss_best_epoch_speed_and_time_left() -> None:
    line = progress_line(HISTORY_OF_THREE, epochs=7)
    for part in ("epoch 3/7", "loss 0.500", "macro-F1 0.800", "best 0.900 in epoch 2", "120 images/s", "2:00 left"):
        assert part in line


def test_the_progress_line_of_a_diverged_epoch_says_so_and_names_the_best() -> None:
    diverged = replace(record(4, 0.1), train_loss=None, val_loss=None, score=-1.0)
    line = progress_line([*HISTORY_OF_THREE, diverged], epochs=7)
    assert "loss not finite  val loss not finite" in line
    assert "best 0.900 in epoch 2" in line


def test_the_summary_line_says_how_long_a_run_took_and_which_epoch_is_the_best() -> None:
    line = summary_line(HISTORY_OF_THREE)
    assert line == "trained 3 epochs in 1:30  loss 0.500  best val macro-F1 0.900 in epoch 2"
    refit = [replace(row, val_loss=None, val_macro_f1=None, val_accuracy=None) for row in HISTORY_OF_THREE]
    assert summary_line(refit) == "trained 3 epochs in 1:30  loss 0.500  not validated"


def test_every_epoch_is_in_the_history_and_in_the_events_as_soon_as_it_has_ended(tmp_path: Path) -> None:
    tracker = Tracker(str(tmp_path), TrainConfig(data="x", out="y"))
    for count in (1, 2, 3):
        tracker.epoch_ended(HISTORY_OF_THREE[:count])
        lines = (tmp_path / HISTORY).read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["epoch"] for line in lines] == list(range(1, count + 1))
        assert points(tmp_path) == dict(list({1: 0.5, 2: 0.9, 3: 0.8}.items())[:count])
    tracker.close()


def test_an_epoch_that_is_trained_again_after_a_failure_is_recorded_once(tmp_path: Path) -> None:
    for finished in (0, 1):
        tracker = Tracker(str(tmp_path), TrainConfig(data="x", out="y"))
        for count in range(finished + 1, 3 + finished):
            tracker.epoch_ended(HISTORY_OF_THREE[:count])
        tracker.close()
    assert sorted(points(tmp_path)) == [1, 2, 3]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 3


@pytest.mark.s3
def test_history_and_events_go_to_object_storage_too(bucket: str) -> None:
    run = storage.join(bucket, "run")
    tracker = Tracker(run, TrainConfig(data="x", out="y"))
    tracker.epoch_ended(HISTORY_OF_THREE)
    tracker.close()
    assert storage.list_names(run) == [HISTORY, "tensorboard"]


@pytest.fixture
def mlflow_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    pytest.importorskip("mlflow", reason="MLFLOW ABSENT: that runs are logged to it is NOT shown here")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # what the light client can write without a server
    return f"file:{tmp_path / 'mlruns'}"


def mlflow_runs(uri: str) -> tuple[Any, list[Any]]:
    """A client, and the runs that it finds."""
    client = require_mlflow().MlflowClient(tracking_uri=uri)
    return client, list(client.search_runs([client.get_experiment_by_name("btray").experiment_id]))


def test_mlflow_gets_the_config_and_every_number(mlflow_uri: str, tmp_path: Path) -> None:
    tracker = Tracker(str(tmp_path), TrainConfig(data="x", out="y", mlflow=mlflow_uri))
    for count in (1, 2):
        tracker.epoch_ended(HISTORY_OF_THREE[:count])
    tracker.close()
    client, (run,) = mlflow_runs(mlflow_uri)
    assert run.data.params["network.architecture"] == "mobile_cnn"
    assert [point.value for point in client.get_metric_history(run.info.run_id, "val_macro_f1")] == [0.5, 0.9]
    assert run.info.status == "FINISHED"


def test_a_resumed_run_continues_its_run_of_mlflow(mlflow_uri: str, tmp_path: Path) -> None:
    for epochs in (1, 2):  # the config may change, which a parameter of MLflow may not
        tracker = Tracker(str(tmp_path), TrainConfig(data="x", out="y", mlflow=mlflow_uri, epochs=epochs))
        tracker.epoch_ended(HISTORY_OF_THREE[:epochs])
    client, (run,) = mlflow_runs(mlflow_uri)
    assert run.info.status == "RUNNING"
    assert [point.value for point in client.get_metric_history(run.info.run_id, "val_macro_f1")] == [0.5, 0.9]
    tracker.close()
    Tracker(str(tmp_path), TrainConfig(data="x", out="y", mlflow=mlflow_uri))
    assert mlflow_runs(mlflow_uri)[1][0].info.status == "RUNNING"
    client.delete_run(run.info.run_id)
    Tracker(str(tmp_path), TrainConfig(data="x", out="y", mlflow=mlflow_uri))
    assert [found.info.run_id == run.info.run_id for found in mlflow_runs(mlflow_uri)[1]] == [False]
    other = mlflow_uri + "-elsewhere"
    Tracker(str(tmp_path), TrainConfig(data="x", out="y", mlflow=other))
    assert len(mlflow_runs(other)[1]) == 1
