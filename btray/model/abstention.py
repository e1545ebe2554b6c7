"""Answers that a model had better not give alone: abstention below a confidence, and conformal sets of labels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

NEVER = 1.01
"""A confidence that no answer reaches: the model abstains from everything."""

Labels = npt.NDArray[np.int64]
Probabilities = npt.NDArray[np.floating]


@dataclass(frozen=True)
class RiskCoverage:
    """The risk-coverage curve (El-Yaniv & Wiener 2010, JMLR 11:1605): one step per distinct confidence, falling."""

    threshold: npt.NDArray[np.float64]
    """Images of at least this confidence are answered, [steps]."""
    coverage: npt.NDArray[np.float64]
    """Share of the images that is answered, [steps], rising to 1."""
    accuracy: npt.NDArray[np.float64]
    """Accuracy on these, [steps]."""
    answered: npt.NDArray[np.int64]
    """Number of these, [steps]."""


def risk_coverage(labels: Labels, probabilities: Probabilities) -> RiskCoverage:
    """Return the curve of n >= 1 images, `labels` int [n] and `probabilities` [n, classes]."""
    confidence = probabilities.max(1)
    order = np.argsort(-confidence, kind="stable")
    correct = np.cumsum((probabilities.argmax(1) == labels)[order])
    falling = confidence[order]
    # A threshold cannot part images of equal confidence, so they are one step: the last of them counts.
    last = np.append(np.flatnonzero(np.diff(falling)), len(falling) - 1)
    answered = last + 1
    return RiskCoverage(falling[last].astype(np.float64), answered / len(labels), correct[last] / answered, answered)


def threshold_for_accuracy(labels: Labels, probabilities: Probabilities, target: float) -> float:
    """Return the lowest confidence to answer from so that accuracy on what is answered is at least `target`, 0 to 1.

    `NEVER` if not even the surest answers are that good. Arguments as for `risk_coverage`; to be chosen on validation
    images, never on those that are measured.
    """
    curve = risk_coverage(labels, probabilities)
    good = np.flatnonzero(curve.accuracy >= target)
    return float(curve.threshold[good[-1]]) if len(good) else NEVER


def conformal_threshold(labels: Labels, probabilities: Probabilities, error_rate: float) -> float:
    """Return the probability from which a label belongs to an image's set, so that sets seldom miss the true label.

    Split conformal prediction (Sadinle et al. 2019, doi:10.1080/01621459.2017.1395341): on images like these n the true
    label is outside its set with a probability of at most `error_rate`, between 0 and 1. If n is too small for that,
    return 0, so that every label is in every set. Arguments as for `risk_coverage`.
    """
    true = np.sort(probabilities[np.arange(len(labels)), labels])
    rank = math.floor((len(labels) + 1) * error_rate)
    return float(true[rank - 1]) if rank >= 1 else 0.0


def label_sets(probabilities: Probabilities, threshold: float) -> npt.NDArray[np.bool_]:
    """Return the labels of each image's set, bool [n, classes]; the most probable one is always in it."""
    inside = probabilities >= threshold
    inside[np.arange(len(inside)), probabilities.argmax(1)] = True
    return inside
