"""Metrics of a classifier on labelled images: what `metrics.json` holds, calibration and the worst errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support, roc_auc_score

from btray.core.errors import UserError

ECE_BINS = 15
TEMPERATURE_RANGE = (0.05, 20.0)
BOOTSTRAP_SAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """Images by top confidence in equal-width bins (Guo et al. 2017, arXiv:1706.04599); arrays are [bins]."""

    edges: np.ndarray
    """[bins + 1], from 0 to 1; a bin holds its upper edge, not its lower one."""
    count: np.ndarray
    """Images in each bin."""
    correct: np.ndarray
    """Images in each bin whose predicted class is the true one."""
    confidence: np.ndarray
    """Mean top confidence in each bin; NaN where the bin is empty."""

    @property
    def accuracy(self) -> np.ndarray:
        """Share of right predictions in each bin; NaN where the bin is empty."""
        return np.divide(self.correct, self.count, out=np.full(len(self.count), np.nan), where=self.count > 0)

    @property
    def ece(self) -> float:
        """Expected calibration error: the gap between confidence and accuracy, averaged over images; 0 to 1."""
        return float(np.nansum(self.count * np.abs(self.accuracy - self.confidence)) / self.count.sum())


def compute_metrics(labels: np.ndarray, probabilities: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """Return the content of `metrics.json` (see docs), ready for strict JSON: what is undefined is None, never NaN.

    `labels` are class indices [n], `probabilities` [n, classes], one name in `classes` for each column. The predicted
    class has the highest probability, the first of several that are equal. AUROC is one class against the rest. Macro
    means are over the classes that occur in `labels` (and, for AUROC, where it is defined). The rows of the confusion
    matrix are true classes, its columns predicted ones.

    Raises `UserError` where there is no image or the model gives no finite probabilities, `ValueError` where the
    arrays do not fit together.
    """
    labels, probabilities = _checked(labels, probabilities)
    if len(set(classes)) != len(classes) or len(classes) != probabilities.shape[1]:
        raise ValueError(f"{probabilities.shape[1]} columns of probabilities need as many different classes: {classes}")
    predicted = probabilities.argmax(axis=1)
    indices = list(range(len(classes)))
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, predicted, labels=indices, zero_division=np.nan
    )
    aurocs = [auroc(labels, probabilities, index) for index in indices]
    confusion = confusion_matrix(labels, predicted, labels=indices)
    correct = int((predicted == labels).sum())
    return {
        "n": len(labels),
        "accuracy": correct / len(labels),
        "accuracy_ci95": list(wilson_interval(correct, len(labels))),
        "macro_f1": float(f1[support > 0].mean()),
        "bootstrap_ci95": bootstrap_intervals(confusion),
        "auroc_macro": _mean([value for value in aurocs if value is not None]),
        "ece": reliability(labels, probabilities).ece,
        "per_class": {
            str(name): {
                "precision": _defined(precision[index]),
                "recall": _defined(recall[index]),
                "f1": _defined(f1[index]),
                "auroc": aurocs[index],
                "support": int(support[index]),
            }
            for index, name in enumerate(classes)
        },
        "confusion_matrix": {
            "labels": [str(name) for name in classes],
            "matrix": confusion.tolist(),
        },
    }


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927, doi:10.1080/01621459.1927.10502953); `trials` is at least 1."""
    interval = binomtest(successes, trials).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


def bootstrap_intervals(confusion: np.ndarray, samples: int = BOOTSTRAP_SAMPLES) -> dict[str, list[float]]:
    """95 % percentile intervals of accuracy and macro_f1 (Efron 1979, doi:10.1214/aos/1176344552).

    `confusion` counts images, int [classes, classes], rows true. Drawing n images with replacement is drawing their
    cells from a multinomial distribution, so no image is needed; the same counts give the same intervals. Macro means
    are over the classes that occur in a sample.
    """
    n, size = int(confusion.sum()), len(confusion)
    drawn = np.random.default_rng(0).multinomial(n, confusion.ravel() / n, samples).reshape(-1, size, size)
    right = np.diagonal(drawn, axis1=1, axis2=2)
    true, said = drawn.sum(2), drawn.sum(1)
    f1 = 2 * right / np.maximum(true + said, 1)
    values = {"accuracy": right.sum(1) / n, "macro_f1": (f1 * (true > 0)).sum(1) / (true > 0).sum(1)}
    return {name: np.quantile(drawn_values, (0.025, 0.975)).tolist() for name, drawn_values in values.items()}


def auroc(labels: np.ndarray, probabilities: np.ndarray, index: int) -> float | None:
    """Area under the ROC curve of class `index` against the rest; None where the class, or every other, is absent."""
    positive = np.asarray(labels) == index
    if positive.all() or not positive.any():
        return None
    return float(roc_auc_score(positive, np.asarray(probabilities)[:, index]))


def reliability(labels: np.ndarray, probabilities: np.ndarray, bins: int = ECE_BINS) -> Reliability:
    """Sort images into `bins` equal-width bins of top confidence. Arguments and errors as for `compute_metrics`."""
    labels, probabilities = _checked(labels, probabilities)
    edges = np.linspace(0.0, 1.0, bins + 1)
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    where = np.digitize(confidence, edges[1:-1], right=True)
    count = np.bincount(where, minlength=bins)
    total = np.bincount(where, weights=confidence, minlength=bins)
    return Reliability(
        edges=edges,
        count=count,
        correct=np.bincount(where[correct], minlength=bins),
        confidence=np.divide(total, count, out=np.full(bins, np.nan), where=count > 0),
    )


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the temperature by which to divide logits [n, classes] so that their NLL is least (arXiv:1706.04599).

    It lies within `TEMPERATURE_RANGE`. It is 1.0, which changes nothing, where no temperature can be fitted: no image,
    logits that are not finite or all alike, or no error at all (the likelihood then only grows as temperature falls).
    """
    logits, labels = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits {logits.shape} must be [n, classes] and labels {labels.shape} [n]")
    if not len(labels) or not np.isfinite(logits).all():
        return 1.0
    rows = np.arange(len(labels))
    if (logits[rows, labels] >= logits.max(axis=1)).all():
        return 1.0

    # By the logarithm: the loss has one minimum along it, and halving counts as much as doubling.
    def nll(log_temperature: float) -> float:
        return -float(log_softmax(logits / np.exp(log_temperature), axis=1)[rows, labels].mean())

    bounds = np.log(TEMPERATURE_RANGE)
    found = minimize_scalar(nll, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    if not found.success or found.fun >= nll(0.0):
        return 1.0
    return float(np.clip(np.exp(found.x), *TEMPERATURE_RANGE))


def worst_errors(labels: np.ndarray, probabilities: np.ndarray, k: int) -> np.ndarray:
    """Return the indices of at most `k` wrongly classified images, the most confident error first, equals in order."""
    labels, probabilities = _checked(labels, probabilities)
    wrong = np.flatnonzero(probabilities.argmax(axis=1) != labels)
    return wrong[np.argsort(-probabilities[wrong].max(axis=1), kind="stable")][: max(k, 0)]


def _checked(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1]:
        raise ValueError(f"probabilities {probabilities.shape} must be [n, classes] and labels {labels.shape} [n]")
    if not len(labels):
        raise UserError("0 images are left to evaluate; give --data at least one readable labelled image")
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= probabilities.shape[1]:
        raise ValueError(f"labels must be integers from 0 to {probabilities.shape[1] - 1}")
    broken = np.flatnonzero(~np.isfinite(probabilities).all(axis=1))
    if len(broken):
        raise UserError(
            f"the model gives probabilities that are not finite for {len(broken)} of {len(labels)} images (the first "
            f"is number {broken[0]}): its training diverged; train it again with a lower --optimiser.learning-rate"
        )
    if probabilities.min() < -1e-3 or not np.allclose(probabilities.sum(axis=1), 1.0, atol=1e-2):
        raise ValueError("each row of probabilities must be at least 0 and sum to 1: apply softmax to logits first")
    # float32 softmax passes 1 by a rounding error, which would fall outside the last bin.
    return labels, probabilities.clip(0.0, 1.0)


def _defined(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
