"""What a run reports while it trains: a line per epoch, `history.jsonl`, TensorBoard events, metrics, MLflow."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from btray import storage
from btray.core import metrics
from btray.core.errors import UserError
from btray.training.config import TrainConfig
from btray.training.history import HISTORY, EpochRecord, as_lines, best_record

_log = logging.getLogger(__name__)

_MLFLOW = "mlflow_run"
# Fields that Prometheus gets under their own name; core/metrics.py describes them.
_EXPORTED = ("epoch", "val_loss", "val_macro_f1", "images_per_second", "feed_ratio", "rejected")


class Tracker:
    """Reports the epochs of a run, from rank 0. Files are written whole, so that object storage serves like a disk."""

    def __init__(self, run_uri: str, config: TrainConfig) -> None:
        self.run_uri = run_uri
        self.config = config
        self._mlflow = _MlflowRun(config, run_uri) if config.mlflow else None

    def epoch_ended(self, history: Sequence[EpochRecord]) -> None:
        """Report the last record of `history`, the records of all epochs so far."""
        record = history[-1]
        shown = {"epochs": self.config.epochs, "_progress": progress_line(history, self.config.epochs)}
        _log.info("epoch ended", extra={**asdict(record), **shown})
        exported = {f"btray_train_{name}": getattr(record, name) for name in _EXPORTED}
        metrics.record(exported | {"btray_train_loss": record.train_loss}, run_id=self.config.name)
        # All epochs again: object storage cannot append, and one that was trained twice stands once.
        storage.write_text(storage.join(self.run_uri, HISTORY), as_lines(history))
        numbers = {key: value for key, value in asdict(record).items() if key != "epoch" and value is not None}
        self._write_events(numbers, record.epoch)
        if self._mlflow:
            self._mlflow.log(numbers, record.epoch)

    def _write_events(self, numbers: Mapping[str, float], epoch: int) -> None:
        """Write one TensorBoard file per epoch; that of an epoch trained again after a failure is replaced.

        The writer is closed before the file is stored: its flush() leaves events in its queue.
        """
        with tempfile.TemporaryDirectory(prefix="btray-events-") as folder:
            with SummaryWriter(folder) as writer:
                for key, value in numbers.items():
                    writer.add_scalar(key, value, epoch)
            (path,) = Path(folder).iterdir()
            storage.upload_file(path, storage.join(self.run_uri, "tensorboard", f"events.out.tfevents.{epoch:06d}"))

    def close(self) -> None:
        """End the run in MLflow."""
        if self._mlflow:
            self._mlflow.end()


def progress_line(history: Sequence[EpochRecord], epochs: int) -> str:
    """Describe the last epoch: losses, macro-F1 and its best if images are held out, images per second, time left."""
    record, recent = history[-1], history[-5:]  # the time left follows the pace of the last few epochs
    left = (epochs - record.epoch) * sum(row.seconds for row in recent) / len(recent)
    validation = "on all images"
    if record.val_macro_f1 is not None:
        best = best_record(history)
        validation = (
            f"val loss {_loss_text(record.val_loss)}  "
            f"val macro-F1 {record.val_macro_f1:.3f} (best {best.val_macro_f1:.3f} in epoch {best.epoch})"
        )
    return (
        f"epoch {record.epoch}/{epochs}  loss {_loss_text(record.train_loss)}  {validation}  "
        f"{record.images_per_second:.0f} images/s  {_minutes(left)} left"
    )


def summary_line(history: Sequence[EpochRecord]) -> str:
    """Describe a completed run: epochs, duration, last loss, and the best epoch if images are held out."""
    last, best = history[-1], best_record(history)
    duration = _minutes(sum(record.seconds for record in history))
    kept = "on all images"
    if best.val_macro_f1 is not None:
        kept = f"best val macro-F1 {best.val_macro_f1:.3f} in epoch {best.epoch}"
    return f"trained {last.epoch} epochs in {duration}  loss {_loss_text(last.train_loss)}  {kept}"


def _loss_text(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.3f}"


def _minutes(seconds: float) -> str:
    return "{}:{:02d}".format(*divmod(int(seconds), 60))


class _MlflowRun:
    """A run of MLflow, which a resumed run here continues there."""

    def __init__(self, config: TrainConfig, run_uri: str) -> None:
        self._client = require_mlflow().MlflowClient(tracking_uri=config.mlflow)
        experiment = self._client.get_experiment_by_name("btray")
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment("btray")
        uri = storage.join(run_uri, _MLFLOW)
        self._run_id = storage.read_text(uri) if storage.exists(uri) else ""
        # It may be another server than before, or the run was deleted there: searching finds none then.
        if self._run_id and self._client.search_runs([experiment_id], f"attributes.run_id = '{self._run_id}'"):
            self._client.update_run(self._run_id, status="RUNNING")
            return
        self._run_id = self._client.create_run(experiment_id, run_name=config.name).info.run_id
        storage.write_text(uri, self._run_id)
        # Only now: the config of a resumed run may differ, and MLflow refuses to change a parameter.
        for key, value in flatten(config.model_dump(mode="json")).items():
            self._client.log_param(self._run_id, key, value)

    def log(self, numbers: Mapping[str, float], epoch: int) -> None:
        for key, value in numbers.items():
            self._client.log_metric(self._run_id, key, value, step=epoch)

    def end(self) -> None:
        self._client.set_terminated(self._run_id)


def require_mlflow() -> Any:
    """Import mlflow; raises UserError with the remedy if it is not installed."""
    try:
        import mlflow
    except ImportError as error:
        raise UserError("--mlflow needs the extra: pip install 'btray[mlflow]'") from error
    return mlflow


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
