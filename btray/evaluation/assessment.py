"""Assess a bundle on labelled images: its metrics, and the plots and the page that show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
from btray.evaluation import plots
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
from btray.evaluation.report import render_report
from btray.evaluation.scoring import Scores
from btray.model.abstention import label_sets
from btray.model.bundle import Bundle
from btray.model.classifier import Classifier
from btray.model.manifest import Manifest

_SHOWN_ERRORS = 12  # three rows of the grid

Labels = npt.NDArray[np.int64]
Probabilities = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Assessment:
    """What was measured, and the files that show it, by name."""

    metrics: Evaluation
    files: dict[str, bytes]


def assess(
    bundle: Bundle,
    table: pa.Table,
    scores: Scores,
    *,
    measured_on: str,
    history: Sequence[Mapping[str, Any]] = (),
    notes: Sequence[str] = (),
    learnt_from: Fingerprints | ShortFingerprints | None = None,
) -> Assessment:
    """Compute the metrics and draw the plots and the report.

    Args:
        bundle: the model.
        table: labelled images, columns uri and label.
        scores: the model's answers to rows of `table`.
        measured_on: the images, for a reader, such as "the test split of s3://bucket/data".
        history: epochs of the training, if learning curves are to be shown; see `plots.learning_curves`.
        notes: lines that the reader of the report must see first.
        learnt_from: fingerprints of what the model was trained and validated with, if known.

    Raises:
        UserError: not one image could be read.
    """
    manifest, rejected = bundle.manifest, len(scores.rejected)
    if len(scores.row) == 0:
        raise UserError(f"{measured_on}: not one image could be read; see {REJECTED}")
    labels = pc.index_in(table["label"].take(scores.row), pa.array(manifest.classes)).to_numpy().astype(np.int64)
    probabilities = Classifier.calibrated(scores.answers.logits, manifest.calibration.temperature)
    metrics = measure(bundle, scores, labels, probabilities, measured_on=measured_on, learnt_from=learnt_from)
    figures = {
        "confusion_matrix": plots.confusion_matrix(metrics.confusion_matrix),
        "roc_curves": plots.roc_curves(labels, probabilities, manifest.classes),
        "reliability": plots.reliability_diagram(labels, probabilities),
        "risk_coverage": plots.risk_coverage_curve(labels, probabilities, manifest.thresholds.abstain_below),
    }
    if history:
        counts = manifest.data.counts
        figures["learning_curves"] = plots.learning_curves(
            history,
            train_images=sum(counts["train"].values()),
            val_images=sum(counts["validation"].values()),
        )
    figures["worst_errors"] = _draw_worst_errors(manifest, table["uri"].take(scores.row), labels, probabilities)
    unread = [f"{rejected} of {len(table)} images could not be read and are in no figure."] if rejected else []
    page = render_report(metrics, manifest, figures=figures, notes=[*unread, *notes])
    files = {f"{name}.png": png for name, png in figures.items()}
    return Assessment(metrics, files | {"metrics.json": metrics.to_json(), "report.html": page.encode()})


def measure(
    bundle: Bundle,
    scores: Scores,
    labels: Labels,
    probabilities: Probabilities,
    *,
    measured_on: str,
    learnt_from: Fingerprints | ShortFingerprints | None,
) -> Evaluation:
    """Compute the content of `metrics.json`; what the model has no threshold for is None.

    Args:
        bundle: the model.
        scores: its answers to n frames.
        labels: class indices, int [n].
        probabilities: calibrated, [n, classes].
        measured_on: as for `assess`.
        learnt_from: as for `assess`.
    """
    classes, thresholds = bundle.manifest.classes, bundle.manifest.thresholds
    twins = clean = abstention = conformal = out_of_distribution = None
    if learnt_from is not None:
        kept = ~have_twin(scores.fingerprints, learnt_from)
        twins = int((~kept).sum())
        clean = compute_metrics(labels[kept], probabilities[kept], classes) if kept.any() else None
    if thresholds.abstain_below is not None:
        answered = probabilities.max(1) >= thresholds.abstain_below
        count, correct = int(answered.sum()), int((probabilities.argmax(1) == labels)[answered].sum())
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
    if bundle.ood is not None and thresholds.ood_score is not None:
        flagged = int((bundle.ood.scores(scores.answers.features) > thresholds.ood_score).sum())
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
        measured_on=measured_on,
        rejected=len(scores.rejected),
        model_id=bundle.manifest.model_id,
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
