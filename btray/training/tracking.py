"""What a run reports while it trains: a line per epoch, `history.jsonl`, TensorBoard events, metrics, MLflow."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from btray import storage
from btray.core import metrics
from btray.core.config import flatten
from btray.core.errors import UserError
from btray.reports.page import number
from btray.training.config import TrainConfig
from btray.training.history import HISTORY, EpochRecord, as_lines, best_record

_log = logging.getLogger(__name__)

_MLFLOW = "mlflow_run"
_RATE_SECONDS = 5.0
# Fields that Prometheus gets under their own name; core/metrics.py describes them.
_EXPORTED = ("epoch", "val_loss", "val_macro_f1", "images_per_second", "feed_ratio", "rejected")


class Tracker:
    """Reports the epochs of a run, from rank 0. Files are written whole, so that object storage serves like a disk."""

    def __init__(self, run_uri: str, config: TrainConfig) -> None:
        self.run_uri, self.config = run_uri, config
        self._mlflow = require_mlflow().MlflowClient(tracking_uri=config.mlflow) if config.mlflow else None
        self._mlflow_run = _open_mlflow_run(self._mlflow, config, run_uri) if config.mlflow else ""

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
        # One TensorBoard file per epoch: that of an epoch trained again after a failure is replaced.
        events = storage.join(self.run_uri, "tensorboard", f"events.out.tfevents.{record.epoch:06d}")
        with tempfile.TemporaryDirectory(prefix="btray-events-") as folder:
            with SummaryWriter(
                folder
            ) as writer:  # closed before the file is stored: flush() leaves events in its queue
                for key, value in numbers.items():
                    writer.add_scalar(key, value, record.epoch)
            (path,) = Path(folder).iterdir()
            storage.upload_file(path, events)
        if self._mlflow:
            for key, value in numbers.items():
                self._mlflow.log_metric(self._mlflow_run, key, value, step=record.epoch)

    def close(self) -> None:
        """End the run in MLflow."""
        if self._mlflow:
            self._mlflow.set_terminated(self._mlflow_run)


def progress_line(history: Sequence[EpochRecord], epochs: int) -> str:
    """Describe the last epoch: losses, macro-F1 and its best if images are held out, images per second, time left."""
    record, recent = history[-1], history[-5:]  # the time left follows the pace of the last few epochs
    left = (epochs - record.epoch) * sum(row.seconds for row in recent) / len(recent)
    # Over a few seconds the rate is mostly that of starting and waiting.
    rate = f"{record.images_per_second:.0f} images/s  " if record.seconds >= _RATE_SECONDS else ""
    validation = "not validated"
    if record.val_macro_f1 is not None:
        best = best_record(history)
        validation = (
            f"val loss {number(record.val_loss, 'not finite')}  "
            f"val macro-F1 {record.val_macro_f1:.3f} (best {best.val_macro_f1:.3f} in epoch {best.epoch})"
        )
    return (
        f"epoch {record.epoch}/{epochs}  loss {number(record.train_loss, 'not finite')}  {validation}  "
        f"{rate}{_minutes(left)} left"
    )


def summary_line(history: Sequence[EpochRecord]) -> str:
    """Describe a completed run: epochs, duration, last loss, and the best epoch if images are held out."""
    last, best = history[-1], best_record(history)
    duration = _minutes(sum(record.seconds for record in history))
    kept = "not validated"
    if best.val_macro_f1 is not None:
        kept = f"best val macro-F1 {best.val_macro_f1:.3f} in epoch {best.epoch}"
    return f"trained {last.epoch} epochs in {duration}  loss {number(last.train_loss, 'not finite')}  {kept}"


def _minutes(seconds: float) -> str:
    return "{}:{:02d}".format(*divmod(int(seconds), 60))


def _open_mlflow_run(client: Any, config: TrainConfig, run_uri: str) -> str:
    """Create a run of MLflow, or continue the one of a run that is resumed here; returns its id there."""
    experiment = client.get_experiment_by_name("btray")
    experiment_id = experiment.experiment_id if experiment else client.create_experiment("btray")
    uri = storage.join(run_uri, _MLFLOW)
    run_id = storage.read_text(uri) if storage.exists(uri) else ""
    # It may be another server than before, or the run was deleted there: searching finds none then.
    if run_id and client.search_runs([experiment_id], f"attributes.run_id = '{run_id}'"):
        client.update_run(run_id, status="RUNNING")
        return run_id
    run_id = str(client.create_run(experiment_id, run_name=config.name).info.run_id)
    storage.write_text(uri, run_id)
    # Only now: the config of a resumed run may differ, and MLflow refuses to change a parameter.
    for key, value in flatten(config.model_dump(mode="json")).items():
        client.log_param(run_id, key, value)
    return run_id


def require_mlflow() -> Any:
    """Import mlflow; raises UserError with the remedy if it is not installed."""
    try:
        import mlflow
    except ImportError as error:
        raise UserError("--mlflow needs the extra: pip install 'btray[mlflow]'") from error
    return mlflow
