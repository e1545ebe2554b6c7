"""Assess a bundle on labelled images: its metrics, and the plots and the page that show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from btray import storage
from btray.core.errors import UserError
from btray.data.duplicates import have_twin
from btray.data.fingerprint import Fingerprints, ShortFingerprints
from btray.data.frames import FrameSource, Rejection
from btray.data.rejections import REJECTED
from btray.data.splits import subjects
from btray.evaluation import plots
from btray.evaluation.grouped import measure_outliers, measure_part
from btray.evaluation.metrics import (
    Abstention,
    Evaluation,
    LabelSets,
    OutOfDistribution,
    compute_metrics,
    reliability,
    wilson_interval,
    worst_errors,
)
from btray.evaluation.parts import Outliers, Part
from btray.evaluation.report import render_report
from btray.evaluation.scoring import Scores
from btray.model.abstention import label_sets
from btray.model.bundle import Bundle
from btray.model.classifier import Classifier
from btray.model.manifest import Manifest

_SHOWN_ERRORS = 12  # three rows of the grid
_NO_SOURCE = "(no source)"

Labels = npt.NDArray[np.int64]
Probabilities = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Assessment:
    """What was measured, and the files that show it, by name."""

    metrics: Evaluation
    files: dict[str, bytes]


@dataclass(frozen=True)
class _Answered:
    """A model's answers to n frames, as the figures need them; those to outliers may be among them."""

    labels: Labels
    """Class indices, int [n]; -1: an outlier."""
    probabilities: Probabilities
    """Calibrated, [n, classes]."""
    groups: Labels
    """Numbers, int [n], equal for frames of one patient, and for pictures that look alike."""
    scores: Scores

    @classmethod
    def of(cls, manifest: Manifest, table: pa.Table, scores: Scores) -> Self:
        """Read the labels of scored rows of `table`, and calibrate the answers by `manifest`."""
        rows = table.take(scores.row)
        labels = pc.index_in(rows["label"], pa.array(manifest.classes)).fill_null(-1).to_numpy().astype(np.int64)
        temperature = manifest.calibration.temperature
        probabilities = Classifier.calibrated(scores.answers.logits, temperature) if len(labels) else np.zeros((0, 0))
        named = pc.coalesce(rows["patient_id"], pa.array(scores.patients, pa.string()))
        rows = rows.set_column(rows.schema.get_field_index("patient_id"), "patient_id", named)
        return cls(labels, probabilities, subjects(rows, scores.fingerprints), scores)

    def where(self, chosen: npt.NDArray[np.bool_]) -> _Answered:
        return _Answered(
            self.labels[chosen], self.probabilities[chosen], self.groups[chosen], self.scores.where(chosen)
        )

    def part(self, manifest: Manifest) -> Part:
        known = self.where(self.labels >= 0)
        outliers = self.outliers(manifest)
        return measure_part(known.labels, known.probabilities, manifest.classes, known.groups, outliers)

    def by_source(self, manifest: Manifest, table: pa.Table) -> dict[str, Part] | None:
        """Measure each source that `table` names; None if it names none."""
        sources = np.array(table["source"].take(self.scores.row).fill_null(_NO_SOURCE).to_pylist(), object)
        names = sorted(set(sources.tolist()))
        return None if names == [_NO_SOURCE] else {name: self.where(sources == name).part(manifest) for name in names}

    def outliers(self, manifest: Manifest) -> Outliers | None:
        is_outlier = self.labels < 0
        if not is_outlier.any():
            return None
        confidence, thresholds, ood_scores = self.probabilities.max(1), manifest.thresholds, self.scores.ood_scores
        flagged = None
        if ood_scores is not None and thresholds.ood_score is not None:
            flagged = ood_scores[is_outlier] > thresholds.ood_score
        return measure_outliers(
            confidence[is_outlier],
            confidence[~is_outlier],
            self.groups[is_outlier],
            abstain_below=thresholds.abstain_below,
            flagged=flagged,
        )


def assess(
    bundle: Bundle,
    table: pa.Table,
    scores: Scores,
    *,
    measured_on: str,
    curves: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    learnt_from: Fingerprints | ShortFingerprints | None = None,
    validation: Mapping[str, Scores] | None = None,
) -> Assessment:
    """Compute the metrics and draw the plots and the report.

    Args:
        bundle: the model.
        table: labelled images, with `labelled.SCHEMA`; a label that is none of the model's classes marks an outlier.
        scores: answers to rows of `table`, the model's unless they have out-of-distribution scores already.
        measured_on: the images, for a reader, such as "the test split of s3://bucket/data".
        curves: arguments of `plots.learning_curves`, if these are to be shown.
        notes: lines that the reader of the report must see first.
        learnt_from: fingerprints of what the model was trained and validated with, if known.
        validation: answers of networks that had not learnt from these images, by what was held out.

    Raises:
        UserError: there is no image of the model's classes, or not one of them could be read.
    """
    manifest, rejected = bundle.manifest, len(scores.rejected)
    if scores.ood_scores is None:
        scores = scores.compared_with(bundle.ood)
    answered = _Answered.of(manifest, table, scores)
    known = answered.where(answered.labels >= 0)
    if len(known.labels) == 0:
        if not rejected:
            raise UserError(f"{measured_on}: all images are outliers; add some of the model's classes")
        raise UserError(f"{measured_on}: not one image of the model's classes could be read; see {REJECTED}")
    labels, probabilities = known.labels, known.probabilities
    metrics = measure(manifest, answered, table, measured_on=measured_on, learnt_from=learnt_from)
    if validation:
        parts = {name: _Answered.of(manifest, table, part).part(manifest) for name, part in validation.items()}
        whole = _Answered.of(manifest, table, Scores.concatenate([*validation.values()]))
        if len(parts) > 1:
            parts["all"] = whole.part(manifest)
        # Where whole sources were held out, these are the same parts again.
        metrics = replace(metrics, validation=parts | (whole.by_source(manifest, table) or {}))
    figures = {
        "confusion_matrix": plots.confusion_matrix(metrics.confusion_matrix),
        "roc_curves": plots.roc_curves(labels, probabilities, manifest.classes),
        "reliability": plots.reliability_diagram(labels, probabilities),
        "risk_coverage": plots.risk_coverage_curve(labels, probabilities, manifest.thresholds.abstain_below),
    }
    if curves:
        figures["learning_curves"] = plots.learning_curves(**curves)
    figures["worst_errors"] = _draw_worst_errors(manifest, table["uri"].take(known.scores.row), labels, probabilities)
    given = rejected + len(np.unique(scores.row))
    unread = [f"{rejected} of {given} images could not be read and are in no figure."] if rejected else []
    page = render_report(metrics, manifest, figures=figures, notes=[*unread, *notes])
    files = {f"{name}.png": png for name, png in figures.items()}
    return Assessment(metrics, files | {"metrics.json": metrics.to_json(), "report.html": page.encode()})


def measure(
    manifest: Manifest,
    answered: _Answered,
    table: pa.Table,
    *,
    measured_on: str,
    learnt_from: Fingerprints | ShortFingerprints | None,
) -> Evaluation:
    """Compute the content of `metrics.json`; what the model has no threshold for is None.

    Args:
        manifest: of the model.
        answered: its answers to n frames of known classes, and to outliers.
        table: as for `assess`.
        measured_on: as for `assess`.
        learnt_from: as for `assess`.
    """
    known = answered.where(answered.labels >= 0)
    labels, probabilities, scores = known.labels, known.probabilities, known.scores
    classes, thresholds = manifest.classes, manifest.thresholds
    twins = clean = abstention = conformal = out_of_distribution = None
    if learnt_from is not None:
        kept = ~have_twin(scores.fingerprints, learnt_from)
        twins = int((~kept).sum())
        clean = compute_metrics(labels[kept], probabilities[kept], classes) if kept.any() else None
    if thresholds.abstain_below is not None:
        answers = probabilities.max(1) >= thresholds.abstain_below
        count, correct = int(answers.sum()), int((probabilities.argmax(1) == labels)[answers].sum())
        abstention = Abstention(
            threshold=thresholds.abstain_below,
            answered=count,
            coverage=count / len(labels),
            accuracy_answered=correct / count if count else None,
            accuracy_answered_ci95=wilson_interval(correct, count) if count else None,
        )
    if thresholds.conformal is not None:
        sets = label_sets(probabilities, thresholds.conformal)
        conformal = LabelSets(
            error_rate=thresholds.conformal_error,
            threshold=thresholds.conformal,
            coverage=float(sets[np.arange(len(labels)), labels].mean()),
            mean_set_size=float(sets.sum(1).mean()),
        )
    if scores.ood_scores is not None and thresholds.ood_score is not None:
        flagged = int((scores.ood_scores > thresholds.ood_score).sum())
        out_of_distribution = OutOfDistribution(
            threshold=thresholds.ood_score, flagged=flagged, share=flagged / len(labels)
        )
    return Evaluation(
        **vars(compute_metrics(labels, probabilities, classes)),
        clean=clean,
        twins=twins,
        ece_uncalibrated=reliability(labels, Classifier.calibrated(scores.answers.logits, 1.0)).ece,
        abstention=abstention,
        conformal=conformal,
        out_of_distribution=out_of_distribution,
        by_patients=measure_part(labels, probabilities, classes, known.groups),
        outliers=answered.outliers(manifest),
        sources=answered.by_source(manifest, table),
        validation=None,
        measured_on=measured_on,
        rejected=len(scores.rejected),
        model_id=manifest.model_id,
    )


def _draw_worst_errors(
    manifest: Manifest, uris: pa.ChunkedArray, labels: Labels, probabilities: Probabilities
) -> bytes:
    """Draw the most confident errors as the network saw them; a scan of several frames shows its first.

    Pictures are not kept while images are scored, since there may be many: those few are read again.
    """
    chosen = worst_errors(labels, probabilities, _SHOWN_ERRORS)
    names = uris.take(chosen).to_pylist()
    read = zip(chosen, names, FrameSource(manifest.preprocess).from_uris(names), strict=True)
    classes, predicted = manifest.classes, probabilities.argmax(1)
    shown = [
        plots.WrongAnswer(
            frame=frames[0],
            true=classes[labels[index]],
            predicted=classes[predicted[index]],
            confidence=float(probabilities[index].max()),
            name=storage.name(uri),
        )
        for index, uri, frames in read
        if not isinstance(frames, Rejection) and not frames.names_patient(0)
    ]
    return plots.error_grid(shown, errors=int((predicted != labels).sum()), total=len(labels))
