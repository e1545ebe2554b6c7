"""The training job: data -> plan -> Ray Train -> best network -> calibration -> refit -> bundle with evaluation."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.train
from ray.train.torch import TorchTrainer

from btray import storage
from btray.core import logs
from btray.core.cluster import connected, cpus
from btray.core.console import ProgressLine
from btray.core.errors import Stopped, UserError
from btray.data.fingerprint import unpack
from btray.data.frames import FRAMES_PER_SCAN
from btray.data.labelled import read_labelled
from btray.data.rejections import REJECTED, enforce_max_rejected, rejections_csv, rejections_in, report_rejections
from btray.evaluation.assessment import Assessment, assess, model_card_of, summary
from btray.evaluation.scoring import Scores, score
from btray.model.bundle import FINGERPRINTS, Bundle, make_bundle, pack_fingerprints, require_free, save_bundle
from btray.model.drift import REFERENCE
from btray.model.ood import REFERENCE_IMAGES, Distribution
from btray.training.calibration import Limits, choose_limits, profile_of
from btray.training.config import TrainConfig
from btray.training.feeds import TRAINING_CPUS, Plan
from btray.training.preemption import stoppable
from btray.training.prepare import (
    StreamSplit,
    TrainingData,
    counts,
    data_digest,
    datasets,
    prepare,
    refit_plan,
    training_classes,
    worker_range,
)
from btray.training.pretrained import read_initial_weights
from btray.training.tracking import HISTORY, Record, as_lines, require_mlflow
from btray.training.train_loop import DIVERGED, load_state, train_loop

_log = logging.getLogger(__name__)

RUN = "run.json"
# What may differ between two calls that mean the same run.
RUN_MAY_CHANGE = frozenset({
    "out", "storage", "epochs", "num_workers", "patience", "max_rejected", "max_failures", "mlflow", "abstain_below",
    "abstain_target", "conformal_error", "refit_epochs",
})  # fmt: skip


@dataclass(frozen=True)
class TrainResult:
    """The best network of a run, and all its epochs."""

    weights: dict[str, Any]
    history: list[Record]
    refitted: int = 0
    """Epochs in which the network then learnt from all images."""

    @property
    def best_epoch(self) -> int:
        """The one whose network it is, or was before the refit."""
        return int(max(self.history, key=lambda record: record["score"])["epoch"])


def train(config: TrainConfig, *, files: Mapping[str, bytes] | None = None) -> str:
    """Train by `config` and return the URI of the bundle, which holds `files` too.

    A run of the same name in the same storage is taken up where it was cut off. Raises UserError for unusable input
    and ThresholdExceeded where more than `max_rejected` of the images cannot be read; of the test split's, which are
    read last, after the bundle is written.
    """
    out, run_uri = storage.resolve(config.out), storage.join(storage.resolve(config.storage_uri), config.name)
    logs.bind(run_id=config.name)
    require_destinations(config)
    if config.mlflow:
        require_mlflow()
    table = read_labelled(config.data)
    classes = training_classes(table, config.data)
    initial = read_initial_weights(config.init_from, config.network, len(classes)) if config.init_from else None
    with connected():
        data = prepare(config, table, classes, run_uri, initial)
        claim_run(run_uri, data, config, RUN_MAY_CHANGE)
        trained = fit(data)
        bundle, assessment, unread = _finish(data, trained)
    saved = save_bundle(bundle, out, {**assessment.files, **(files or {})})
    print(summary(assessment.metrics), flush=True)
    print(f"model {saved.manifest.model_id}; report {storage.join(out, 'report.html')}; run {run_uri}", flush=True)
    enforce_max_rejected(unread, table["split"].to_pylist().count("test"), config.max_rejected)
    return out


def require_destinations(config: TrainConfig) -> None:
    """Raise UserError unless the bundle can be written to --out, and the run to --storage."""
    out = storage.resolve(config.out)
    require_free(out)
    storage.require_writable(out, "--out")
    if config.storage is not None:
        storage.require_writable(storage.resolve(config.storage), "--storage")


def claim_run(folder: str, data: TrainingData, config: TrainConfig, may_change: Set[str]) -> None:
    """Write down what the run in `folder` is, or see that the run of this name is the same one. Raises UserError.

    Files count by where they lie, not by how the way there is written.
    """
    said = config.model_dump(mode="json", exclude=set(may_change))
    places = {name: storage.resolve(said[name]) for name in ("data", "init_from") if said[name]}
    now = {"config": said | places, "classes": list(data.plan.classes), "data": data_digest(data)}
    where = storage.join(folder, RUN)
    if storage.exists(where):
        different = _first_difference(storage.read_json(where), now)
        if different:
            raise UserError(
                f"run {config.name!r} in {storage.resolve(config.storage_uri)} was started with another "
                f"{different}; give another --name to start a new run, or the same {different} to go on with it"
            )
    storage.write_json(where, now)
    storage.write_text(storage.join(folder, "config.yaml"), config.to_yaml())


def _first_difference(then: Any, now: Any, key: str = "") -> str | None:
    """The dotted name of the first setting that differs."""
    if isinstance(then, dict) and isinstance(now, dict):
        for name in {**then, **now}:
            different = _first_difference(then.get(name), now.get(name), f"{key}.{name}".lstrip("."))
            if different:
                return different.removeprefix("config.")
        return None
    return None if then == now else key


def fit(data: TrainingData, *, within: float | None = None, callbacks: Sequence[Any] = ()) -> TrainResult:
    """Run Ray Train and bring back the best epoch's network.

    `within` is how many CPUs the run may take; default: all of the cluster. `callbacks` are Ray Train's. Raises Stopped
    where the run was asked to end.
    """
    plan, config = data.plan, data.plan.config
    least, most = worker_range(config)
    room = cpus() if within is None else within
    # Streaming decodes while the workers train, and must find CPUs left over; else the pipeline waits for ever.
    share = min(TRAINING_CPUS, room * (0.5 if plan.streaming else TRAINING_CPUS) / most)
    filesystem, path = storage.arrow_filesystem(storage.resolve(config.storage_uri))
    trainer = TorchTrainer(
        train_loop,
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
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1, checkpoint_score_attribute="score"),
            callbacks=[*callbacks],
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),  # type: ignore[call-arg]  # Train V2 has it
        ),
        datasets=datasets(data),
        dataset_config=StreamSplit() if plan.streaming else ray.train.DataConfig(datasets_to_split=[]),
    )
    with stoppable(plan.run_uri) as asked, ProgressLine("starting the workers"):
        result = trainer.fit()
        if asked():
            raise Stopped(f"run {plan.run_uri} was stopped and has written a checkpoint; the same command goes on")
    if result.checkpoint is None or not result.best_checkpoints:
        raise RuntimeError(f"run {plan.run_uri} ended without a checkpoint")
    return TrainResult(best_weights(result.best_checkpoints, config.name), _read_state(result.checkpoint)["history"])


def best_weights(checkpoints: Sequence[tuple[ray.train.Checkpoint, dict[str, Any]]], run: str) -> dict[str, Any]:
    """The network of the checkpoint with the highest score. Raises UserError where training diverged before it."""
    best, record = max(checkpoints, key=lambda pair: float(pair[1]["score"]))
    weights: dict[str, Any] = _read_state(best)["evaluated"]
    if record["score"] <= DIVERGED or not all(tensor.isfinite().all() for tensor in weights.values()):
        raise UserError(
            f"training diverged: run {run!r} has no epoch with a finite loss and finite weights; lower "
            "--optimiser.learning-rate, or set --optimiser.clip-norm, and give another --name; where the refit alone "
            "diverged, --refit-epochs 0 does without it"
        )
    return weights


def _read_state(checkpoint: ray.train.Checkpoint) -> dict[str, Any]:
    with checkpoint.as_directory() as folder:
        return load_state(folder)


def _finish(data: TrainingData, trained: TrainResult) -> tuple[Bundle, Assessment, pa.Table]:
    """Calibrate on the validation images, refit, then read the labels of the test split, once, and measure.

    Third, the test images that could not be read: columns row, code, message.
    """
    plan, table = data.plan, data.table
    reference_rows, validation_rows = _reference_rows(plan), _rows_at(plan, plan.validation)
    scores = _score(data, trained, np.concatenate([reference_rows, validation_rows]))
    validation, reference = scores.of_rows(validation_rows), scores.of_rows(reference_rows)
    first_limits = choose_limits(plan.config, validation, _labels_of(plan, validation.row), reference.answers.features)
    # of the network as it was before it learnt from these images too
    profile = profile_of(_bundle(data, trained, first_limits), validation)
    final, limits = _refit(data, trained), first_limits
    test_rows = np.flatnonzero(np.array(table["split"].to_pylist(), object) == "test")
    if final is not trained:
        scores = _score(data, final, np.concatenate([reference_rows, test_rows]))
        limits = replace(limits, ood=Distribution.fit(scores.of_rows(reference_rows).answers.features))
        test = scores.of_rows(test_rows)
    else:
        test = _score(data, trained, test_rows)
    bundle = _bundle(data, final, limits)
    if len(test.row):
        assessment = _assess(data, trained, bundle, test, None)
    else:  # what the first network answers is measured by what it knew of itself
        assessment = _assess(data, trained, replace(bundle, ood=first_limits.ood), test, validation)
    assessment.files[REFERENCE] = json.dumps(profile.to_json()).encode()
    if len(test.rejected):
        rejected = pa.concat_tables([rejections_in(data.survey), test.rejected])
        storage.write_bytes(storage.join(plan.run_uri, REJECTED), rejections_csv(rejected, table))
    return bundle, assessment, test.rejected


def _refit(data: TrainingData, trained: TrainResult) -> TrainResult:
    """Go on with the best network on all images for a few epochs; `trained` itself where that is not wanted."""
    plan = data.plan
    if plan.config.refit_epochs == 0 or "val" in data.table["split"].to_pylist():
        return trained
    _log.info("%d more epochs on all %d images, the held-out ones too", plan.config.refit_epochs, len(plan.samples))
    refitted = fit(replace(data, plan=refit_plan(plan, trained.weights, len(trained.history))))
    return TrainResult(refitted.weights, trained.history, len(refitted.history))


def _score(data: TrainingData, trained: TrainResult, rows: npt.NDArray[np.int64]) -> Scores:
    """What the network, not yet calibrated, says of some rows."""
    config, uris = data.plan.config, data.table["uri"].take(rows)
    bundle = _bundle(data, trained, Limits())
    return score(bundle, rows, uris, batch_size=config.batch_size, use_gpu=config.use_gpu)


def _assess(
    data: TrainingData, trained: TrainResult, bundle: Bundle, test: Scores, validation: Scores | None
) -> Assessment:
    """Metrics, plots and texts on the test split; where it has no readable image, on the validation images."""
    plan, table = data.plan, data.table
    report_rejections(test.rejected, table)
    prints = unpack(data.used["fingerprint"].to_pylist())
    if validation is None:
        measured, measured_on, notes, learnt_from = test, f"the test split of {plan.config.data}", [], prints
    else:
        report_rejections(validation.rejected, table)
        measured, measured_on, learnt_from = validation, f"the validation images of {plan.config.data}", None
        missing = "not one readable image in their" if len(test.rejected) else "no"
        notes = [
            f"The data have {missing} test split: these figures are of the validation images, by which the best epoch "
            "and the temperature were chosen, and are too high. They were answered by the network as it was before it "
            "learnt from these images too."
        ]
    assessment = assess(
        bundle,
        table,
        measured,
        measured_on=measured_on,
        history=trained.history,
        notes=notes,
        learnt_from=learnt_from,
    )
    files = assessment.files | {
        "MODEL_CARD.md": model_card_of(bundle.manifest, assessment.metrics).encode(),
        "config.yaml": plan.config.to_yaml().encode(),
        HISTORY: as_lines(trained.history).encode(),
        FINGERPRINTS: pack_fingerprints(prints),
    }
    return Assessment(assessment.metrics, files)


def _rows_at(plan: Plan, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The rows that samples belong to, ascending, each once."""
    return np.unique(plan.samples[positions] // FRAMES_PER_SCAN)


def _reference_rows(plan: Plan) -> npt.NDArray[np.int64]:
    """Training rows from which the distribution of features is taken."""
    rows = _rows_at(plan, plan.train)
    return np.random.default_rng(plan.config.seed).permutation(rows)[:REFERENCE_IMAGES]


def _labels_of(plan: Plan, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Label numbers of rows that were trained on or validated with."""
    label_of_row = dict(zip((plan.samples // FRAMES_PER_SCAN).tolist(), plan.labels.tolist(), strict=True))
    return np.array([label_of_row[row] for row in rows.tolist()], np.int64)


def _bundle(data: TrainingData, trained: TrainResult, limits: Limits) -> Bundle:
    plan = data.plan
    return make_bundle(
        weights=trained.weights,
        classes=plan.classes,
        network=plan.config.network,
        preprocess=plan.config.preprocess,
        temperature=limits.temperature,
        thresholds=limits.thresholds,
        ood=limits.ood,
        training=plan.config.model_dump(mode="json"),
        data={
            "uri": plan.config.data,
            "fingerprint": data_digest(data),
            "counts": counts(data),
            "rejected": len(rejections_in(data.survey)),
            "leak": {split: leaked for split, (leaked, _) in data.leak.tested.items()},
            "on_leak": plan.config.on_leak,
            # What the config says may differ: the run may have been longer before, or have ended by --patience.
            "epochs": len(trained.history),
            "best_epoch": trained.best_epoch,
            "refit_epochs": trained.refitted,
            "patient_ids": data.table["patient_id"].null_count < len(data.table),
        },
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
