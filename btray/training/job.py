"""The training job: prepare -> fit -> calibrate -> refit -> assess -> save."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa

from btray import storage
from btray.core import logs
from btray.core.cluster import connected
from btray.data.fingerprint import unpack
from btray.data.rejections import REJECTED, enforce_max_rejected, rejections_csv, report_rejections
from btray.evaluation.assessment import Assessment, assess
from btray.evaluation.report import model_card, summary
from btray.evaluation.scoring import Scores, score
from btray.model.bundle import FINGERPRINTS, Bundle, make_bundle, pack_fingerprints, save_bundle
from btray.model.classifier import interpret
from btray.model.drift import REFERENCE, Profile
from btray.model.manifest import TrainedOn
from btray.model.ood import REFERENCE_IMAGES, Distribution
from btray.model.precision import measure_agreement
from btray.training.calibration import Limits, calibrate
from btray.training.config import TrainConfig
from btray.training.history import HISTORY, as_lines, best_record
from btray.training.plan import Indices
from btray.training.prepare import TrainingData, in_splits, prepare, read_source
from btray.training.run import TrainResult, claim_run, fit, is_finished

_log = logging.getLogger(__name__)


def train(config: TrainConfig, *, files: Mapping[str, bytes] | None = None) -> str:
    """Train by `config` and return the URI of the bundle, which holds `files` too.

    A run of the same name in the same storage is resumed where it was interrupted; one that is finished is left alone.

    Raises:
        UserError: the input is unusable, or --out is taken.
        ThresholdExceeded: more than `max_rejected` of the images cannot be read; for those of the test split, which
            are read last, after the bundle is written.
    """
    logs.bind(run_id=config.name)
    config.check()
    source = read_source(config)
    if is_finished(source):
        print(f"run {config.name!r} is finished, and its images are the same; --overwrite assesses it anew", flush=True)
        return config.out
    with connected(dashboard=True):
        data = prepare(source)
        claim_run(data)
        trained = TrainedModel(data, fit(data))
        calibrated, validation = _calibrate(trained)
        final, test = _score_test(calibrated, _refit(calibrated))
        assessment = _assess(calibrated, final, validation, test)
    saved = save_bundle(_with_agreement(calibrated, final), config.out, {**assessment.files, **(files or {})})
    print(summary(assessment.metrics), flush=True)
    report = storage.join(config.out, "report.html")
    print(f"model {saved.manifest.model_id}; report {report}; run {data.plan.run_uri}", flush=True)
    enforce_max_rejected(
        test.rejected["code"].to_pylist(), int(in_splits(source.table, "test").sum()), config.max_rejected
    )
    return config.out


@dataclass(frozen=True)
class TrainedModel:
    """A trained network, the images that it learnt from, and its calibrated limits."""

    data: TrainingData
    result: TrainResult
    limits: Limits = field(default_factory=Limits)

    def bundle(self) -> Bundle:
        """Return the model as it is published."""
        data, plan = self.data, self.data.plan
        return make_bundle(
            weights=self.result.weights,
            classes=plan.classes,
            network=plan.config.network,
            preprocess=plan.config.preprocess,
            **vars(self.limits),
            training=plan.config.model_dump(mode="json"),
            data=TrainedOn(
                uri=plan.config.data,
                fingerprint=data.digest(),
                counts=data.counts(),
                rejected=len(data.rejected),
                leak={split: leaked for split, (leaked, _) in data.leak.tested.items()},
                on_leak=plan.config.on_leak,
                # The config may say otherwise: the run may have been longer before, or have ended by --patience.
                epochs=len(self.result.history),
                best_epoch=best_record(self.result.history).epoch,
                refit_epochs=self.result.refit_epochs,
                patient_ids=data.source.table["patient_id"].null_count < len(data.source.table),
            ),
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def score(self, *groups: Indices) -> list[Scores]:
        """Score groups of rows of the source, all in one pass, which starts the actors once."""
        config, rows = self.data.plan.config, np.concatenate(groups)
        uris = self.data.source.table["uri"].take(rows)
        scores = score(self.bundle(), rows, uris, batch_size=config.batch_size, use_gpu=config.use_gpu)
        return [scores.of_rows(group) for group in groups]

    def reference_rows(self) -> Indices:
        """Choose the training images from which the distribution of features is taken."""
        plan = self.data.plan
        return np.random.default_rng(plan.config.seed).permutation(plan.rows(plan.train))[:REFERENCE_IMAGES]


def _calibrate(model: TrainedModel) -> tuple[TrainedModel, Scores]:
    """Calibrate on the validation images, which the network has not learnt from; returns their scores too."""
    plan = model.data.plan
    reference, validation = model.score(model.reference_rows(), plan.rows(plan.validation))
    labels = plan.labels_of_rows(validation.row)
    limits = calibrate(plan.config, validation, labels, reference.answers.features)
    return replace(model, limits=limits), validation


def _refit(calibrated: TrainedModel) -> TrainedModel:
    """Train the best network on all images for a few more epochs; the same model if that is not configured.

    Temperature and thresholds stay: they need images that the network has not learnt from, and none is left. A val
    split that the source brings is never learnt from.
    """
    data, plan, result = calibrated.data, calibrated.data.plan, calibrated.result
    epochs = plan.config.refit_epochs
    if epochs == 0 or in_splits(data.source.table, "val").any():
        return calibrated
    _log.info("refit: %d more epochs on all %d images, including those held out", epochs, len(plan.samples))
    refitted = fit(replace(data, plan=plan.refit(result.weights, len(result.history))))
    return replace(calibrated, result=TrainResult(refitted.weights, result.history, len(refitted.history)))


def _score_test(calibrated: TrainedModel, final: TrainedModel) -> tuple[TrainedModel, Scores]:
    """Score the test split, once. A refit moves features: the distribution of the training images' is fitted again."""
    test_rows = np.flatnonzero(in_splits(final.data.source.table, "test"))
    if final is calibrated:
        (test,) = final.score(test_rows)
        return final, test
    reference, test = final.score(final.reference_rows(), test_rows)
    limits = replace(final.limits, ood=Distribution.fit(reference.answers.features))
    return replace(final, limits=limits), test


def _with_agreement(calibrated: TrainedModel, final: TrainedModel) -> Bundle:
    """Return the final model with how far it agrees with itself in bfloat16, on the validation images."""
    plan, bundle = calibrated.data.plan, final.bundle()
    uris = calibrated.data.source.table["uri"].take(plan.rows(plan.validation)).to_pylist()
    return replace(bundle, manifest=bundle.manifest.model_copy(update={"bf16": measure_agreement(bundle, uris)}))


def _assess(calibrated: TrainedModel, final: TrainedModel, validation: Scores, test: Scores) -> Assessment:
    """Measure on the test split and write plots and texts; on the validation images if no test image is readable.

    The validation images were scored by the network before the refit, and are measured by its own limits.
    """
    data, plan, table = final.data, final.data.plan, final.data.source.table
    bundle, prints = final.bundle(), unpack(data.used["fingerprint"].to_pylist())
    report_rejections(test.rejected, table)
    if len(test.rejected):
        rejected = pa.concat_tables([data.rejected, test.rejected])
        storage.write_bytes(storage.join(plan.run_uri, REJECTED), rejections_csv(rejected, table))
    history = [asdict(record) for record in final.result.history]
    if len(test.row):
        measured_on = f"the test split of {plan.config.data}"
        assessment = assess(bundle, table, test, measured_on=measured_on, history=history, learnt_from=prints)
    else:
        report_rejections(validation.rejected, table)
        missing = "not one readable image in their" if len(test.rejected) else "no"
        note = (
            f"The data have {missing} test split: these figures are of the validation images, by which the best epoch "
            "and the temperature were chosen, and are too high. They were answered by the network as it was before it "
            "learnt from these images too."
        )
        measured_on = f"the validation images of {plan.config.data}"
        measured = replace(bundle, ood=calibrated.limits.ood)
        assessment = assess(measured, table, validation, measured_on=measured_on, history=history, notes=[note])
    reference = calibrated.bundle()
    answers = map(vars, interpret(validation.answers, reference.manifest, reference.ood))
    files = assessment.files | {
        "MODEL_CARD.md": model_card(bundle.manifest, assessment.metrics).encode(),
        "config.yaml": plan.config.to_yaml().encode(),
        HISTORY: as_lines(final.result.history).encode(),
        FINGERPRINTS: pack_fingerprints(prints),
        # Later answers are compared with those to images that the network had not learnt from.
        REFERENCE: Profile.of(answers).model_dump_json().encode(),
    }
    return Assessment(assessment.metrics, files)
