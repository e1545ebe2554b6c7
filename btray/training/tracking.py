"""What a run leaves to look at while it goes: a line an epoch, `history.jsonl`, TensorBoard events, MLflow."""

from __future__ import annotations

import json
import logging
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from btray import storage
from btray.core import metrics
from btray.core.errors import UserError
from btray.training.config import TrainConfig

_log = logging.getLogger(__name__)

HISTORY = "history.jsonl"
_MLFLOW = "mlflow_run"

Record = dict[str, Any]
"""One epoch: epoch (from 1), train_loss, val_loss, val_macro_f1, val_accuracy, learning_rate, images (that all workers
trained on, without those of before a checkpoint in its midst), images_per_second, ... A loss that is not finite is
None."""


class Tracker:
    """Writes what one process reports. Files go to storage whole, so that object storage serves as well as a disk."""

    def __init__(self, run_uri: str, config: TrainConfig) -> None:
        self.run_uri = run_uri
        self.epochs = config.epochs
        self._run_id = config.name
        self._mlflow = _MlflowRun(config, run_uri) if config.mlflow else None

    def epoch_ended(self, history: list[Record]) -> None:
        """Report the last record of `history`, the records of all epochs so far."""
        record = history[-1]
        shown = {**record, "epochs": self.epochs, "_progress": progress_line(history, self.epochs)}
        _log.info("epoch ended", extra=shown)
        _export_epoch(self._run_id, record)
        storage.write_text(storage.join(self.run_uri, HISTORY), as_lines(history))
        numbers = {key: value for key, value in record.items() if key != "epoch" and value is not None}
        self._write_events(numbers, record["epoch"])
        if self._mlflow:
            self._mlflow.log(numbers, record["epoch"])

    def _write_events(self, numbers: Record, epoch: int) -> None:
        """One file an epoch, closed before it is stored: the writer's flush() leaves events in its queue.

        An epoch that is done again after a failure replaces its file.
        """
        with tempfile.TemporaryDirectory(prefix="btray-events-") as folder:
            with SummaryWriter(folder) as writer:
                for key, value in numbers.items():
                    writer.add_scalar(key, value, epoch)
            (path,) = Path(folder).iterdir()
            storage.upload_file(path, storage.join(self.run_uri, "tensorboard", f"events.out.tfevents.{epoch:06d}"))

    def close(self) -> None:
        """End the run for everyone who listens."""
        if self._mlflow:
            self._mlflow.end()


def finite(record: Record) -> Record:
    """The record with None for numbers that are not finite, which JSON does not have."""
    return {name: value if value is None or math.isfinite(value) else None for name, value in record.items()}


def as_lines(history: Sequence[Mapping[str, Any]]) -> str:
    """The text of HISTORY: a line of JSON an epoch."""
    return "".join(json.dumps(record, allow_nan=False) + "\n" for record in history)


def progress_line(history: list[Record], epochs: int) -> str:
    """One epoch for a human: loss, validation macro-F1 and its best where there is one, images/s, time left."""
    record = history[-1]
    left = (epochs - record["epoch"]) * sum(row["seconds"] for row in history[-5:]) / len(history[-5:])
    held_out = "  on all images"
    if record["val_macro_f1"] is not None:
        best = max(history, key=lambda row: row["score"])
        held_out = (
            f"  val loss {_shown(record['val_loss'])}  "
            f"val macro-F1 {record['val_macro_f1']:.3f} (best {best['val_macro_f1']:.3f} in epoch {best['epoch']})"
        )
    return (
        f"epoch {record['epoch']}/{epochs}  loss {_shown(record['train_loss'])}{held_out}  "
        f"{record['images_per_second']:.0f} images/s  {int(left) // 60}:{int(left) % 60:02d} left"
    )


def _shown(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.3f}"


class _MlflowRun:
    """The same numbers in MLflow, where the extra is installed; one run there for a run here, however often resumed."""

    def __init__(self, config: TrainConfig, run_uri: str) -> None:
        self._client = require_mlflow().MlflowClient(tracking_uri=config.mlflow)
        kept = storage.join(run_uri, _MLFLOW)
        before = storage.read_text(kept) if storage.exists(kept) else None
        if before is not None and self._goes_on(before):
            self._run_id = before
            self._client.update_run(before, status="RUNNING")
            return
        experiment = self._client.get_experiment_by_name("btray")
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment("btray")
        self._run_id = self._client.create_run(experiment_id, run_name=config.name).info.run_id
        storage.write_text(kept, self._run_id)
        for key, value in _flat(config.model_dump(mode="json")).items():
            self._client.log_param(self._run_id, key, value)

    def _goes_on(self, run_id: str) -> bool:
        """Whether the server has the run: it may be another server than before, or the run was deleted there."""
        try:
            return bool(self._client.get_run(run_id).info.lifecycle_stage == "active")
        except require_mlflow().exceptions.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False

    def log(self, numbers: Record, epoch: int) -> None:
        for key, value in numbers.items():
            self._client.log_metric(self._run_id, key, value, step=epoch)

    def end(self) -> None:
        self._client.set_terminated(self._run_id)


def require_mlflow() -> Any:
    """The mlflow module; raises UserError with the remedy where it is not installed."""
    try:
        import mlflow
    except ImportError as error:
        raise UserError("--mlflow needs the extra: pip install 'btray[mlflow]'") from error
    return mlflow


def _flat(values: Record, prefix: str = "") -> Record:
    flat: Record = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _export_epoch(run_id: str, epoch: Mapping[str, Any]) -> None:
    """An epoch of training ended with the record that the history keeps."""
    metrics.record(
        {
            "btray_train_epoch": epoch["epoch"],
            "btray_train_loss": epoch["train_loss"],
            "btray_train_val_loss": epoch["val_loss"],
            "btray_train_val_macro_f1": epoch["val_macro_f1"],
            "btray_train_images_per_second": epoch["images_per_second"],
            "btray_train_feed_ratio": epoch.get("feed_ratio"),
            "btray_train_rejected": epoch.get("rejected"),
        },
        run_id=run_id,
    )
