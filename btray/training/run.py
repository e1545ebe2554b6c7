"""A run of Ray Train: its identity, its execution, and the network that it brings back."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

import ray.train
from ray.train.torch import TorchTrainer

from btray import storage
from btray.core.cluster import cpus
from btray.core.console import ProgressLine
from btray.core.errors import Stopped, UserError
from btray.model.bundle import require_free
from btray.training.checkpoints import Checkpoint, StateDict
from btray.training.config import TrainConfig
from btray.training.feeds import TRAINING_CPUS, StreamSplit
from btray.training.history import DIVERGED, EpochRecord, best_record
from btray.training.preemption import stoppable
from btray.training.prepare import TrainingData, worker_range
from btray.training.tracking import flatten, require_mlflow, summary_line
from btray.training.train_loop import train_loop

RUN = "run.json"
# Settings that may differ between two commands for the same run: none changes an epoch that is already trained.
RUN_MAY_CHANGE = frozenset({
    "out", "storage", "epochs", "num_workers", "patience", "max_rejected", "max_failures", "mlflow", "abstain_below",
    "abstain_target", "conformal_error", "refit_epochs",
})  # fmt: skip


@dataclass(frozen=True)
class TrainResult:
    """The best network of a run, and the record of all its epochs."""

    weights: StateDict
    history: list[EpochRecord]
    refit_epochs: int = 0
    """Epochs in which the network then learnt from all images."""

    @property
    def best_epoch(self) -> int:
        """The epoch whose network it is, or was before the refit."""
        return best_record(self.history).epoch


def require_destinations(config: TrainConfig) -> None:
    """Raise UserError unless the bundle can be written to --out, the run to --storage and its numbers to --mlflow."""
    out = storage.resolve(config.out)
    require_free(out)
    storage.require_writable(out, "--out")
    if config.storage is not None:
        storage.require_writable(storage.resolve(config.storage), "--storage")
    if config.mlflow:
        require_mlflow()


def claim_run(data: TrainingData, may_change: Set[str]) -> None:
    """Record the identity of the run; raise UserError if the run of its name in the same storage has another one.

    Paths are compared when resolved: `scans` and `./scans/` are the same.
    """
    plan, config = data.plan, data.plan.config
    settings = config.model_dump(mode="json", exclude=set(may_change))
    resolved = {name: storage.resolve(settings[name]) for name in ("data", "init_from") if settings[name]}
    identity = {"config": settings | resolved, "classes": list(plan.classes), "data": data.digest()}
    uri = storage.join(plan.run_uri, RUN)
    if storage.exists(uri):
        before, now = flatten(storage.read_json(uri)), flatten(identity)
        different = next((name for name in before | now if before.get(name) != now.get(name)), "")
        different = different.removeprefix("config.")
        if different:
            raise UserError(
                f"run {config.name!r} in {storage.resolve(config.storage_uri)} was started with another "
                f"{different}; give another --name to start a new run, or the same {different} to resume this one"
            )
    storage.write_json(uri, identity)
    storage.write_text(storage.join(plan.run_uri, "config.yaml"), config.to_yaml())


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
    filesystem, path = storage.arrow_filesystem(storage.resolve(config.storage_uri))
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
        # Frames in memory are not split: every worker holds all of them.
        dataset_config=StreamSplit() if plan.streaming else ray.train.DataConfig(datasets_to_split=[]),
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
            "--optimiser.learning-rate, or set --optimiser.clip-norm, and give another --name; if the refit alone "
            "diverged, --refit-epochs 0 does without it"
        )
    return weights
