"""A run of Ray Train: its identity, its execution, and the network that it brings back."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray.train
import yaml
from ray.train.torch import TorchTrainer

from btray import storage
from btray.core.cluster import cpus
from btray.core.console import ProgressLine
from btray.core.errors import Stopped, UserError
from btray.data.preprocess import preprocess_digest
from btray.data.rejections import REJECTED, rejections_csv
from btray.model.config import MANIFEST
from btray.training.checkpoints import Checkpoint, StateDict
from btray.training.feeds import TRAINING_CPUS
from btray.training.history import DIVERGED, EpochRecord
from btray.training.plan import run_folder
from btray.training.preemption import stoppable
from btray.training.prepare import Source, TrainingData, worker_range
from btray.training.tracking import summary_line
from btray.training.train_loop import train_loop

_log = logging.getLogger(__name__)

RUN = "run.json"
# Settings that change nothing of the model of a run that has ended.
_WITHOUT_EFFECT = {
    "num_workers", "max_rejected", "max_failures", "mlflow", "concurrent", "gpu_cache_gb", "checkpoint_minutes",
    "compile",
}  # fmt: skip


@dataclass(frozen=True)
class TrainResult:
    """The best network of a run, and the record of all its epochs."""

    weights: StateDict
    history: list[EpochRecord]
    refit_epochs: int = 0
    """Epochs in which the network then learnt from all images."""


def is_finished(source: Source) -> bool:
    """Return whether --out holds what this command made of the same files, so that nothing is left to do."""
    config = source.config
    record = storage.join(config.out, config.record)
    run = storage.read_json(storage.join(run_folder(config), RUN), missing_ok=True)
    made = storage.exists(storage.join(config.out, MANIFEST)) and storage.exists(record)
    if config.overwrite or run is None or not made or run.get("listing") != source.listing_digest():
        return False
    if run.get("preprocessing") not in (None, preprocess_digest(config.preprocess)):  # None: of an earlier version
        return False
    settings = config.model_dump(mode="json", exclude=_WITHOUT_EFFECT)
    return storage.differing_setting(yaml.safe_load(storage.read_text(record)), settings) is None


def claim_run(data: TrainingData) -> None:
    """Record the identity of the run. One of the same name in the same storage must have the same.

    Raises:
        UserError: it has another one; with `overwrite` it is deleted instead.
    """
    plan, config = data.plan, data.plan.config
    settings = config.model_dump(mode="json", exclude=set(config.may_change))
    identity = {
        "config": settings,
        "classes": list(plan.classes),
        # Other versions of libraries may make other frames by the same settings.
        "preprocessing": preprocess_digest(config.preprocess),
        "data": data.digest(),
    }
    uri = storage.join(plan.run_uri, RUN)
    before = storage.read_json(uri, missing_ok=True)
    different = before and storage.differing_setting(before, identity)
    if different and config.overwrite:
        _log.info("run %r was made with another %s: it is deleted", config.name, different.removeprefix("config."))
        filesystem, path = storage.arrow_filesystem(config.storage_uri)
        for name in storage.list_names(config.storage_uri):
            if name == config.name or name.startswith(
                tuple(f"{config.name}.{kind}-" for kind in ("round", "final", "refit"))
            ):
                filesystem.delete_dir(f"{path}/{name}")
        if len(data.rejected):  # the list was in that folder
            storage.write_bytes(storage.join(plan.run_uri, REJECTED), rejections_csv(data.rejected, data.source.table))
    elif different:
        different = different.removeprefix("config.")
        raise UserError(
            f"run {config.name!r} in {config.storage_uri} was started with another {different}; give another "
            f"{'--name' if config.storage else '--out'} to start a new run, the same {different} to resume this one, "
            "or --overwrite to replace it"
        )
    # Without the listing: what --out may hold was not made of these files, or not yet.
    storage.write_json(uri, identity)
    storage.write_text(storage.join(plan.run_uri, "config.yaml"), config.to_yaml())


def record_finished(source: Source) -> None:
    """Record, for `is_finished`, that --out holds what was made of these files, as they were listed."""
    uri = storage.join(run_folder(source.config), RUN)
    storage.write_json(uri, storage.read_json(uri) | {"listing": source.listing_digest()})


def fit(data: TrainingData, *, within: float | None = None, callbacks: Sequence[Any] = ()) -> TrainResult:
    """Run Ray Train, from the run's latest checkpoint if it has one, and bring back the best epoch's network.

    Args:
        data: the images and the plan of the run.
        within: CPUs that the run may take; default: all of the cluster.
        callbacks: Ray Train's.

    Raises:
        Stopped: SIGTERM came; the run has written a checkpoint.
        UserError: no epoch has finite weights.
    """
    plan, config = data.plan, data.plan.config
    least, most = worker_range(config)
    room = cpus() if within is None else within
    # Streaming decodes while the workers train, and must find CPUs left over; else the pipeline waits for ever.
    share = min(TRAINING_CPUS, room * (0.5 if plan.streaming else TRAINING_CPUS) / most)
    filesystem, path = storage.arrow_filesystem(config.storage_uri)
    trainer = TorchTrainer(
        train_loop,
        # A worker reserves fewer CPUs than it has threads: the rest is for decoding.
        train_loop_config={"plan": plan, "threads": max(1, int(room / most))},
        scaling_config=ray.train.ScalingConfig(
            num_workers=least if least == most else (least, most),  # type: ignore[arg-type]  # elastic
            use_gpu=config.use_gpu,
            resources_per_worker={"CPU": share} | ({"GPU": 1} if config.use_gpu else {}),
        ),
        run_config=ray.train.RunConfig(
            name=config.name,
            storage_path=path,
            storage_filesystem=filesystem,
            # Of workers; Ray does not count those that a spot notice announced.
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
            # Ray keeps the latest checkpoint, to resume from, besides the best one.
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1, checkpoint_score_attribute="score"),
            callbacks=[*callbacks],
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),  # type: ignore[call-arg]  # Train V2 has it
        ),
        datasets=data.datasets(),
        # Nothing is split: every worker holds all frames, or reads its own share of them.
        dataset_config=ray.train.DataConfig(datasets_to_split=[]),
    )
    with stoppable(plan.run_uri) as stop_requested, ProgressLine("starting the workers") as line:
        result = trainer.fit()
        if stop_requested():
            raise Stopped(f"run {plan.run_uri} was stopped after writing a checkpoint; the same command resumes it")
        if result.checkpoint is None or not result.best_checkpoints:
            raise RuntimeError(f"run {plan.run_uri} ended without a checkpoint")
        history = Checkpoint.load(result.checkpoint).history
        line.update(summary_line(history))
    return TrainResult(best_weights(result.best_checkpoints, config.name), history)


def best_weights(checkpoints: Sequence[tuple[ray.train.Checkpoint, dict[str, Any]]], run: str) -> StateDict:
    """Return the evaluated network of the checkpoint with the highest score; `checkpoints` are with their metrics.

    Raises UserError if training diverged before the first one.
    """
    best, metrics = max(checkpoints, key=lambda pair: float(pair[1]["score"]))
    weights = Checkpoint.load(best).evaluated
    # The score of a refit's epoch is its number, so weights that diverged there do not show in it.
    if metrics["score"] <= DIVERGED or not all(tensor.isfinite().all() for tensor in weights.values()):
        raise UserError(
            f"training diverged: run {run!r} has no epoch with a finite loss and finite weights; lower "
            "--optimiser.learning-rate, or set --optimiser.clip-norm, and give another --out; if the refit alone "
            "diverged, --refit-epochs 0 does without it"
        )
    return weights
