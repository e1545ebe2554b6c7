"""The training job: prepare -> fit, once or in rounds -> calibrate -> refit -> assess -> save."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from itertools import chain

import numpy as np
import pyarrow as pa

from btray import storage
from btray.core import logs
from btray.core.cluster import connected
from btray.core.errors import UserError
from btray.data.fingerprint import unpack
from btray.data.rejections import REJECTED, enforce_max_rejected, rejections_csv, report_rejections
from btray.data.splits import subjects
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
from btray.training.run import TrainResult, claim_run, fit, is_finished, record_finished

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
        trained, rounds = _fit_in_rounds(data) if data.rounds else _fit_once(data)
        limits = _calibrate(data, rounds)
        final, test = _score_test(_refit(replace(trained, limits=limits)))
        assessment = _assess(final, rounds, test)
    saved = save_bundle(_with_agreement(final, rounds), config.out, {**assessment.files, **(files or {})})
    record_finished(source)
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
        """Choose the training images, without outliers, from which the distribution of features is taken."""
        plan = self.data.plan
        rows = plan.rows(plan.train[plan.labels[plan.train] >= 0])
        return np.random.default_rng(plan.config.seed).permutation(rows)[:REFERENCE_IMAGES]

    def with_distribution(self, reference: Scores) -> TrainedModel:
        """Return the same with the distribution of features that its answers to `reference_rows` give."""
        ood = Distribution.fit(reference.answers.features) if len(reference.row) else None
        return replace(self, limits=replace(self.limits, ood=ood))


@dataclass(frozen=True)
class Round:
    """A network, and what it says of the images that were held out of its training, outliers among them."""

    model: TrainedModel
    held_out: Scores

    @classmethod
    def of(cls, model: TrainedModel) -> Round:
        """Score what the plan of the model's data holds out."""
        plan = model.data.plan
        held = plan.rows(np.concatenate([plan.validation, plan.held_outliers]))
        reference, held_out = model.score(model.reference_rows(), held)
        model = model.with_distribution(reference)
        return cls(model, held_out.compared_with(model.limits.ood))

    @property
    def known(self) -> Scores:
        """Those of the held-out images that are no outliers."""
        return self.held_out.where(self.model.data.plan.labels_of_rows(self.held_out.row) >= 0)


def _fit_once(data: TrainingData) -> tuple[TrainedModel, dict[str, Round]]:
    """Train without the images that are held out, and score these."""
    validated = Round.of(TrainedModel(data, fit(data)))
    return validated.model, {"held out": validated}


def _fit_in_rounds(data: TrainingData) -> tuple[TrainedModel, dict[str, Round]]:
    """Train once without each part, and score it; then on all images, for the mean of the rounds' best epochs."""
    rounds: dict[str, Round] = {}
    for number, (name, held) in enumerate(data.rounds.items(), start=1):
        part = data.without(name)
        plan = part.plan
        if len(plan.validation) == 0 or np.count_nonzero(plan.class_counts()) < 2:
            _log.warning("%s is not held out: without it, there is nothing to learn that it could be tested with", name)
            continue
        if unknown := int(held.sum()) - len(plan.validation) - len(plan.held_outliers):
            _log.warning("%d images of %s are not tested: nothing else shows their class", unknown, name)
        _log.info("round %d of %d: without %s, %d images", number, len(data.rounds), name, len(plan.validation))
        rounds[name] = Round.of(_refit(TrainedModel(part, fit(part)), without_held=True))
    if not rounds:
        raise UserError(
            f"not one of {len(data.rounds)} {data.plan.config.validate_by} can be held out: the others have too few "
            "classes; give --validate-by patients"
        )
    best = [best_record(validated.model.result.history).epoch for validated in rounds.values()]
    epochs = max(1, round(float(np.mean(best))))
    _log.info("training on all images for %d epochs, the mean of the best ones, %s", epochs, ", ".join(map(str, best)))
    return TrainedModel(data, fit(replace(data, plan=data.plan.on_everything(epochs)))), rounds


def _calibrate(data: TrainingData, rounds: Mapping[str, Round]) -> Limits:
    """Calibrate on images that the networks have not learnt from. The distribution of features is that of one round.

    With several rounds it is left out: the features of different networks cannot be compared.
    """
    known = Scores.concatenate([validated.known for validated in rounds.values()])
    rows, position = np.unique(known.row, return_inverse=True)
    limits = calibrate(
        data.plan.config,
        known,
        data.plan.labels_of_rows(known.row),
        classes=data.plan.classes,
        subjects=subjects(data.source.table.take(rows), None)[position],
    )
    (*_, last) = rounds.values()
    return replace(limits, ood=None if data.rounds else last.model.limits.ood)


def _refit(trained: TrainedModel, *, without_held: bool = False) -> TrainedModel:
    """Train the best network for a few more epochs, unaltered; the same model if that is not configured.

    On all images, or without those that are held out. In the first case temperature and thresholds stay: they need
    images that the network has not learnt from, and none is left. A val split that the source brings is never learnt
    from.
    """
    data, plan, result = trained.data, trained.data.plan, trained.result
    epochs = plan.config.refit_epochs
    if epochs == 0 or in_splits(data.source.table, "val").any():
        return trained
    samples = plan.train if without_held else plan.samples
    _log.info("refit: %d more epochs on %d images", epochs, len(samples))
    refit = plan.refit(result.weights, len(result.history), without_held=without_held)
    refitted = fit(replace(data, plan=refit))
    changed = TrainResult(refitted.weights, result.history, len(refitted.history))
    return replace(trained, result=changed, limits=replace(trained.limits, ood=None))  # a refit moves features


def _score_test(model: TrainedModel) -> tuple[TrainedModel, Scores]:
    """Score the test split, once; and give the model the distribution of its features if it has none."""
    test_rows = np.flatnonzero(in_splits(model.data.source.table, "test"))
    if model.limits.ood is not None:
        (test,) = model.score(test_rows)
        return model, test
    reference, test = model.score(model.reference_rows(), test_rows)
    return model.with_distribution(reference), test


def _with_agreement(final: TrainedModel, rounds: Mapping[str, Round]) -> Bundle:
    """Return the final model with how far it agrees with itself in bfloat16, on the validation images."""
    bundle, rows = final.bundle(), np.concatenate([validated.known.row for validated in rounds.values()])
    uris = final.data.source.table["uri"].take(np.unique(rows)).to_pylist()
    return replace(bundle, manifest=bundle.manifest.model_copy(update={"bf16": measure_agreement(bundle, uris)}))


def _assess(final: TrainedModel, rounds: Mapping[str, Round], test: Scores) -> Assessment:
    """Measure on the test split and write plots and texts; on the validation images if no test image is readable.

    The validation images were scored by networks that had not learnt from them, and are measured by these networks'
    own distributions.
    """
    data, plan, table = final.data, final.data.plan, final.data.source.table
    bundle, prints = final.bundle(), unpack(data.used["fingerprint"].to_pylist())
    report_rejections(test.rejected, table)
    if len(test.rejected):
        rejected = pa.concat_tables([data.rejected, test.rejected])
        storage.write_bytes(storage.join(plan.run_uri, REJECTED), rejections_csv(rejected, table))
    validation = {name: validated.held_out for name, validated in rounds.items()}
    # The final network of several rounds validates nothing: the curves are those of the round that validates most.
    shown = max((validated.model for validated in rounds.values()), key=lambda model: len(model.data.plan.validation))
    curves = {
        "history": [asdict(record) for record in shown.result.history],
        "train_images": len(shown.data.plan.train),
        "val_images": len(shown.data.plan.validation),
    }
    if len(test.row):
        measured_on = f"the test split of {plan.config.data}"
        assessment = assess(
            bundle, table, test, measured_on=measured_on, learnt_from=prints, validation=validation, curves=curves
        )
    else:
        scores = Scores.concatenate([*validation.values()])
        report_rejections(scores.rejected, table)
        missing = "not one readable image in their" if len(test.rejected) else "no"
        note = (
            f"The data have {missing} test split: these figures are of the validation images, by which the best epoch "
            "and the temperature were chosen, and are too high. They were answered by the network as it was before it "
            "learnt from these images too."
        )
        measured_on = f"the validation images of {plan.config.data}"
        assessment = assess(
            bundle, table, scores, measured_on=measured_on, notes=[note], validation=validation, curves=curves
        )
    answers = chain.from_iterable(
        interpret(validated.known.answers, bundle.manifest, validated.model.limits.ood) for validated in rounds.values()
    )
    files = assessment.files | {
        "MODEL_CARD.md": model_card(bundle.manifest, assessment.metrics).encode(),
        "config.yaml": plan.config.to_yaml().encode(),
        HISTORY: as_lines(final.result.history).encode(),
        FINGERPRINTS: pack_fingerprints(prints),
        # Later answers are compared with those to images that the network had not learnt from.
        REFERENCE: Profile.of(map(vars, answers)).model_dump_json().encode(),
    }
    return Assessment(assessment.metrics, files)
