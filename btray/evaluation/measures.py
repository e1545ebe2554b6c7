"""All that `metrics.json` holds of one set of scored images: as published, clean, and what the marks are worth."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from btray.data.duplicates import have_twin
from btray.data.fingerprint import Fingerprints
from btray.evaluation.metrics import compute_metrics, reliability, wilson_interval
from btray.evaluation.scoring import Scores
from btray.model.abstention import label_sets
from btray.model.bundle import Bundle
from btray.model.classifier import Classifier

Labels = npt.NDArray[np.int64]
Probabilities = npt.NDArray[np.float32]


def measure(bundle: Bundle, labels: Labels, scores: Scores, learnt_from: Fingerprints | None) -> dict[str, Any]:
    """`evaluation.compute_metrics` of n scored frames with `labels` int [n], and beside it:

    - `clean`: the same over the images with no twin in `learnt_from`, the fingerprints of the images that the model was
      trained or validated with; None where these are not known, and with n 0 where no image is clean;
    - `ece_uncalibrated`: ECE without the temperature;
    - `abstention`, `conformal`, `out_of_distribution`: what the model's marks are worth; None where it makes none.
    """
    classes, manifest = bundle.manifest.classes, bundle.manifest
    probabilities = Classifier.calibrated(scores.answers.logits, manifest.calibration.temperature)
    whole = compute_metrics(labels, probabilities, classes)
    clean = None
    if learnt_from is not None:
        kept = ~have_twin(scores.fingerprints, learnt_from)
        clean = compute_metrics(labels[kept], probabilities[kept], classes) if kept.any() else _nothing_in(whole)
    return whole | {
        "clean": clean,
        "ece_uncalibrated": reliability(labels, Classifier.calibrated(scores.answers.logits, 1.0)).ece,
        "abstention": _abstention(bundle, labels, probabilities),
        "conformal": _conformal(bundle, labels, probabilities),
        "out_of_distribution": _out_of_distribution(bundle, scores),
    }


def _nothing_in(metrics: dict[str, Any]) -> dict[str, Any]:
    return dict.fromkeys(metrics, None) | {"n": 0}


def _abstention(bundle: Bundle, labels: Labels, probabilities: Probabilities) -> dict[str, Any] | None:
    threshold = bundle.manifest.thresholds.abstain_below
    if threshold is None:
        return None
    answered = probabilities.max(1) >= threshold
    count, right = int(answered.sum()), int((probabilities.argmax(1) == labels)[answered].sum())
    return {
        "threshold": threshold,
        "answered": count,
        "coverage": count / len(labels),
        "accuracy_answered": right / count if count else None,
        "accuracy_answered_ci95": list(wilson_interval(right, count)) if count else None,
    }


def _conformal(bundle: Bundle, labels: Labels, probabilities: Probabilities) -> dict[str, Any] | None:
    limits = bundle.manifest.thresholds
    if limits.conformal is None:
        return None
    sets = label_sets(probabilities, limits.conformal)
    return {
        "error_rate": limits.conformal_error,
        "threshold": limits.conformal,
        "coverage": float(sets[np.arange(len(labels)), labels].mean()),
        "mean_set_size": float(sets.sum(1).mean()),
    }


def _out_of_distribution(bundle: Bundle, scores: Scores) -> dict[str, Any] | None:
    threshold = bundle.manifest.thresholds.ood_score
    if bundle.ood is None or threshold is None:
        return None
    flagged = int((bundle.ood.scores(scores.answers.features) > threshold).sum())
    return {"threshold": threshold, "flagged": flagged, "share": flagged / len(scores.row)}
