"""The training job: data -> plan -> Ray Train -> the best network -> calibration -> bundle with its evaluation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import ray.train
from ray.train.torch import TorchTrainer

from btray import storage
from btray.assess import Assessment, assess, model_card_of, summary
from btray.bundle import Bundle, make_bundle, require_free, save_bundle
from btray.cluster import connected, cpus
from btray.errors import UserError
from btray.evaluation import fit_temperature
from btray.frames import FRAMES_PER_SCAN
from btray.initial import read_initial_weights
from btray.loop import load_state, train_loop
from btray.planning import (
    StreamSplit,
    TrainingData,
    counts,
    datasets,
    fingerprint,
    prepare,
    training_classes,
    worker_range,
)
from btray.rejections import rejections_in, report_rejections
from btray.scoring import score
from btray.settings import TrainConfig
from btray.tracking import Record, require_mlflow
from btray.worklist import read_labelled

RUN = "run.json"
# What may differ between two calls that mean the same run.
_FREE_TO_CHANGE = {"out", "storage", "epochs", "num_workers", "patience", "max_rejected", "max_failures", "mlflow"}


@dataclass(frozen=True)
class _Trained:
    """The best network of a run, and all its epochs."""

    weights: dict[str, Any]
    history: list[Record]


def train(config: TrainConfig) -> str:
    """Train by `config` and return the URI of the bundle.

    A run of the same name in the same storage is taken up where it was cut off. Raises UserError for unusable input
    and ThresholdExceeded where more than `max_rejected` of the images cannot be read.
    """
    out, run_uri = storage.resolve(config.out), storage.join(storage.resolve(config.storage_uri), config.name)
    require_free(out)
    if config.mlflow:
        require_mlflow()
    table = read_labelled(config.data)
    classes = training_classes(table, config.data)
    initial = read_initial_weights(config.init_from, config.network, len(classes)) if config.init_from else None
    with connected():
        data = prepare(config, table, classes, run_uri, initial)
        _claim_run(data)
        trained = _fit(data)
        bundle, assessment = _finish(data, trained)
    saved = save_bundle(bundle, out, assessment.files)
    print(summary(assessment.metrics), flush=True)
    print(f"model {saved.manifest.model_id}; report {storage.join(out, 'report.html')}; run {run_uri}", flush=True)
    return out


def _claim_run(data: TrainingData) -> None:
    """Write down what the run is, or see that the run of this name is the same one. Raises UserError."""
    plan = data.plan
    now = {
        "config": plan.config.model_dump(mode="json", exclude=_FREE_TO_CHANGE),
        "classes": list(plan.classes),
        "data": fingerprint(data),
    }
    where = storage.join(plan.run_uri, RUN)
    if storage.exists(where):
        then = storage.read_json(where)
        different = _first_difference(then, now)
        if different:
            raise UserError(
                f"run {plan.config.name!r} in {storage.resolve(plan.config.storage_uri)} was started with another "
                f"{different}; give another --name to start a new run, or the same {different} to go on with it"
            )
    storage.write_json(where, now)
    storage.write_text(storage.join(plan.run_uri, "config.yaml"), plan.config.to_yaml())


def _first_difference(then: Any, now: Any, key: str = "") -> str | None:
    """The dotted name of the first setting that differs."""
    if isinstance(then, dict) and isinstance(now, dict):
        for name in {**then, **now}:
            different = _first_difference(then.get(name), now.get(name), f"{key}.{name}".lstrip("."))
            if different:
                return different.removeprefix("config.")
        return None
    return None if then == now else key


def _fit(data: TrainingData) -> _Trained:
    """Run Ray Train and bring back the best epoch's network."""
    plan, config = data.plan, data.plan.config
    least, most = worker_range(config)
    # Streaming decodes while the workers train, and must find CPUs left over; else the pipeline waits for ever.
    share = min(1.0, cpus() * (0.5 if plan.streaming else 1.0) / most)
    filesystem, path = storage.arrow_filesystem(storage.resolve(config.storage_uri))
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"plan": plan, "threads": max(1, int(cpus() / most))},
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
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),  # type: ignore[call-arg]  # Train V2 has it
        ),
        datasets=datasets(data),
        dataset_config=StreamSplit() if plan.streaming else ray.train.DataConfig(datasets_to_split=[]),
    )
    result = trainer.fit()
    if result.checkpoint is None or not result.best_checkpoints:
        raise RuntimeError(f"run {plan.run_uri} ended without a checkpoint")
    best, _ = max(result.best_checkpoints, key=lambda pair: float(pair[1]["score"]))
    return _Trained(_read_state(best)["evaluated"], _read_state(result.checkpoint)["history"])


def _read_state(checkpoint: ray.train.Checkpoint) -> dict[str, Any]:
    with checkpoint.as_directory() as folder:
        return load_state(folder)


def _finish(data: TrainingData, trained: _Trained) -> tuple[Bundle, Assessment]:
    """Calibrate on the validation images, then read the labels of the test split, once, and measure."""
    plan, table = data.plan, data.table
    splits = np.array(table["split"].to_pylist(), object)
    test_rows = np.flatnonzero(splits == "test")
    validation_rows = np.unique(plan.samples[plan.validation] // FRAMES_PER_SCAN)
    rows = np.concatenate([validation_rows, test_rows])
    uncalibrated = _bundle(data, trained, temperature=1.0)
    scores = score(uncalibrated, rows, table["uri"].take(rows), batch_size=plan.config.batch_size)
    validation = scores.of_rows(validation_rows)
    label_of_row = dict(zip((plan.samples // FRAMES_PER_SCAN).tolist(), plan.labels.tolist(), strict=True))
    labels = np.array([label_of_row[row] for row in validation.row.tolist()], np.int64)
    bundle = _bundle(data, trained, temperature=fit_temperature(validation.logits, labels))
    test = scores.of_rows(test_rows)
    measured, measured_on, notes = test, f"the test split of {plan.config.data}", []
    if len(test.row) == 0:
        measured, measured_on = validation, f"the validation images of {plan.config.data}"
        missing = "not one readable image in their" if len(test_rows) else "no"
        notes = [
            f"The data have {missing} test split: these figures are of the validation images, by which the best epoch "
            "and the temperature were chosen, and are too high."
        ]
        report_rejections(test.rejected, table)
    report_rejections(measured.rejected, table)
    assessment = assess(bundle, table, measured, measured_on=measured_on, history=trained.history, notes=notes)
    files = assessment.files | {
        "MODEL_CARD.md": model_card_of(bundle.manifest, assessment.metrics).encode(),
        "config.yaml": plan.config.to_yaml().encode(),
        "history.jsonl": "".join(json.dumps(record) + "\n" for record in trained.history).encode(),
    }
    return bundle, Assessment(assessment.metrics, files)


def _bundle(data: TrainingData, trained: _Trained, *, temperature: float) -> Bundle:
    plan = data.plan
    return make_bundle(
        weights=trained.weights,
        classes=plan.classes,
        network=plan.config.network,
        preprocess=plan.config.preprocess,
        temperature=temperature,
        training=plan.config.model_dump(mode="json"),
        data={
            "uri": plan.config.data,
            "fingerprint": fingerprint(data),
            "counts": counts(data),
            "rejected": len(rejections_in(data.survey)),
            "patient_ids": data.table["patient_id"].null_count < len(data.table),
        },
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
