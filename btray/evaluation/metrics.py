"""Metrics of a classifier on labelled images: the types that `metrics.json` is written from, and their computation."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Self

import numpy as np
from pydantic import TypeAdapter
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support, roc_auc_score

from btray.core.errors import UserError
from btray.evaluation.parts import Interval, Outliers, Part

FORMAT_VERSION = 1
"""Of `metrics.json`; rises when a key changes its meaning or goes."""
ECE_BINS = 15  # as in Guo et al. 2017: figures of other papers can be compared
TEMPERATURE_RANGE = (0.05, 20.0)
BOOTSTRAP_SAMPLES = 2000  # the quantiles then vary by less than the third decimal that is shown

_Z95 = 1.959963984540054  # 95 % of a normal distribution lie within so many deviations


@dataclass(frozen=True, kw_only=True)
class ClassMetrics:
    """Metrics of one class against all others; None where no image defines them."""

    precision: float | None
    """Share of the images predicted as this class that belong to it; None if none is predicted so."""
    recall: float | None
    """Share of the images of this class that are predicted so (sensitivity); None if there is none."""
    f1: float | None
    """Harmonic mean of precision and recall; None if the class neither occurs nor is predicted."""
    auroc: float | None
    """Area under the ROC curve of the class's probability; None if the class, or every other, is absent."""
    support: int
    """Images of this class."""


@dataclass(frozen=True, kw_only=True)
class ConfusionMatrix:
    """Images counted by true and predicted class."""

    labels: list[str]
    """Classes, in the order of rows and columns."""
    matrix: list[list[int]]
    """Counts, [classes, classes]: rows are true classes, columns predicted ones."""


@dataclass(frozen=True, kw_only=True)
class BootstrapIntervals:
    """95 % percentile intervals over images drawn with replacement; see `bootstrap_intervals`."""

    accuracy: Interval
    """Of the accuracy."""
    macro_f1: Interval
    """Of the macro-F1."""


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Metrics over n images. Shares, F1, AUROC and ECE run from 0 to 1; macro means are over the classes that occur."""

    n: int
    """Images that were read and classified."""
    accuracy: float
    """Share of the images whose most probable class is the true one."""
    accuracy_ci95: Interval
    """95 % Wilson interval of the accuracy."""
    macro_f1: float
    """Mean F1."""
    bootstrap_ci95: BootstrapIntervals
    """95 % bootstrap intervals."""
    auroc_macro: float | None
    """Mean AUROC of one class against the rest; None if one class alone occurs."""
    ece: float
    """Expected calibration error of the calibrated confidence, in `ECE_BINS` bins."""
    per_class: dict[str, ClassMetrics]
    """By label."""
    confusion_matrix: ConfusionMatrix
    """Which classes are taken for which."""


@dataclass(frozen=True, kw_only=True)
class Abstention:
    """Abstention below a confidence, measured on these images."""

    threshold: float
    """Confidence below which the model abstains."""
    answered: int
    """Images at or above it."""
    coverage: float
    """Their share."""
    accuracy_answered: float | None
    """Accuracy on them; None if there is none."""
    accuracy_answered_ci95: Interval | None
    """Its 95 % Wilson interval."""


@dataclass(frozen=True, kw_only=True)
class LabelSets:
    """Label sets of split conformal prediction (Sadinle et al. 2019, arXiv:1609.00451), measured on these images."""

    error_rate: float | None
    """Share of sets that may miss the true label, for which the threshold was chosen."""
    threshold: float
    """Probability from which a label belongs to the set."""
    coverage: float
    """Share of the sets that hold the true label."""
    mean_set_size: float
    """Labels per set."""


@dataclass(frozen=True, kw_only=True)
class OutOfDistribution:
    """How many images are unlike the training images."""

    threshold: float
    """Score above which an image is flagged."""
    flagged: int
    """Images above it."""
    share: float
    """Their share."""


@dataclass(frozen=True, kw_only=True)
class Evaluation(Metrics):
    """The content of `metrics.json` (docs/trust.md): metrics over all images, and what tells how far to trust them."""

    clean: Metrics | None
    """Metrics over the images with no twin among those that the model learnt from; None if not known, or if none is."""
    twins: int | None
    """Images with such a twin; None if not known. Not in the file, where `clean.n` tells it."""
    ece_uncalibrated: float
    """Expected calibration error without the temperature."""
    abstention: Abstention | None
    """None if the model never abstains."""
    conformal: LabelSets | None
    """None if the model gives no label sets."""
    out_of_distribution: OutOfDistribution | None
    """None if the model keeps no distribution of its training images."""
    by_patients: Part | None = None
    """The same images with intervals over patients; None if not measured."""
    outliers: Outliers | None = None
    """Of images that `--outliers` names, which are in no other figure; None if there is none."""
    sources: dict[str, Part] | None = None
    """By source; None if the data name none."""
    validation: dict[str, Part] | None = None
    """What networks that had not learnt from them said of the training images, by what was held out, and `all`; None if
    the model was not trained just now."""
    measured_on: str
    """The images, for a reader."""
    rejected: int
    """Images that could not be read, which are in no other figure."""
    model_id: str
    """The model."""
    format_version: int = FORMAT_VERSION
    """Version of the file's format."""

    def to_json(self) -> bytes:
        """Return `metrics.json`, strict JSON. `clean` has n 0 and null for all else if every image has a twin."""
        record = asdict(self)
        if record.pop("twins") is not None and self.clean is None:
            record["clean"] = {field.name: None for field in fields(Metrics)} | {"n": 0}
        return json.dumps(record, indent=2, allow_nan=False).encode()

    @classmethod
    def from_json(cls, body: bytes) -> Self:
        """Read what `to_json` wrote. Raises UserError if it is something else."""
        try:
            record = json.loads(body)
            images, clean = record["n"], record["clean"]
            record["twins"] = clean and images - clean["n"]
            record["clean"] = clean and (clean if clean["n"] else None)
            return TypeAdapter(cls).validate_python(record)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"metrics.json is not of this version of btray: {str(error).splitlines()[0]}") from error


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
    """Mean top confidence in each bin; NaN if the bin is empty."""

    @property
    def accuracy(self) -> np.ndarray:
        """Share of correct predictions in each bin; NaN if the bin is empty."""
        return np.divide(self.correct, self.count, out=np.full(len(self.count), np.nan), where=self.count > 0)

    @property
    def ece(self) -> float:
        """Expected calibration error: the gap between confidence and accuracy, averaged over images; 0 to 1."""
        return float(np.nansum(self.count * np.abs(self.accuracy - self.confidence)) / self.count.sum())


def compute_metrics(labels: np.ndarray, probabilities: np.ndarray, classes: Sequence[str]) -> Metrics:
    """Return the metrics of n images; what is undefined is None, never NaN.

    The predicted class has the highest probability, the first of several that are equal. Macro means are over the
    classes that occur in `labels` (and, for AUROC, for which it is defined).

    Args:
        labels: class indices, int [n].
        probabilities: [n, classes], each row sums to 1.
        classes: names of the columns.

    Raises:
        UserError: there is no image, or the model gives probabilities that are not finite.
        ValueError: the arrays do not fit together.
    """
    labels, probabilities = _checked(labels, probabilities)
    if len(set(classes)) != len(classes) or len(classes) != probabilities.shape[1]:
        raise ValueError(f"{probabilities.shape[1]} columns of probabilities need as many different classes: {classes}")
    names, indices = [str(name) for name in classes], list(range(len(classes)))
    predicted = probabilities.argmax(axis=1)
    confusion = confusion_matrix(labels, predicted, labels=indices)
    # NaN tells an undefined value from a true 0; `per_class` turns it into None.
    scores = precision_recall_fscore_support(labels, predicted, labels=indices, zero_division=np.nan)
    aurocs = [auroc(labels, probabilities, index) for index in indices]
    defined_aurocs = [area for area in aurocs if area is not None]
    correct = int(np.trace(confusion))
    return Metrics(
        n=len(labels),
        accuracy=correct / len(labels),
        accuracy_ci95=wilson_interval(correct, len(labels)),
        macro_f1=float(scores[2][scores[3] > 0].mean()),
        bootstrap_ci95=bootstrap_intervals(confusion),
        auroc_macro=float(np.mean(defined_aurocs)) if defined_aurocs else None,
        ece=reliability(labels, probabilities).ece,
        per_class={
            name: ClassMetrics(
                precision=_none_if_nan(precision),
                recall=_none_if_nan(recall),
                f1=_none_if_nan(f1),
                auroc=area,
                support=int(support),
            )
            for name, precision, recall, f1, support, area in zip(names, *scores, aurocs, strict=True)
        },
        confusion_matrix=ConfusionMatrix(labels=names, matrix=confusion.tolist()),
    )


def wilson_interval(successes: float, trials: float) -> Interval:
    """Return the 95 % interval of a proportion (Wilson 1927, doi:10.1080/01621459.1927.10502953); `trials` >= 1.

    Neither need be whole: of images that depend on each other, only as many count as are independent.
    """
    share, z = successes / trials, _Z95
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + (z / (2 * trials)) ** 2)
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap_intervals(confusion: np.ndarray, samples: int = BOOTSTRAP_SAMPLES) -> BootstrapIntervals:
    """Return the 95 % percentile intervals of accuracy and macro-F1 (Efron 1979, doi:10.1214/aos/1176344552).

    Macro means are over the classes that occur in a sample.

    Args:
        confusion: images counted by true class (row) and predicted class, int [classes, classes].
        samples: bootstrap samples to draw.
    """
    n, size = int(confusion.sum()), len(confusion)
    # Drawing n images with replacement is drawing their cells from a multinomial distribution. The fixed seed makes
    # equal counts give equal intervals.
    drawn = np.random.default_rng(0).multinomial(n, confusion.ravel() / n, samples).reshape(-1, size, size)
    accuracy, macro_f1 = accuracy_and_macro_f1(drawn)
    return BootstrapIntervals(accuracy=percentile_interval(accuracy), macro_f1=percentile_interval(macro_f1))


def percentile_interval(values: np.ndarray) -> Interval:
    """Return the ends between which 95 % of the values lie."""
    low, high = np.quantile(values, (0.025, 0.975)).tolist()
    return low, high


def accuracy_and_macro_f1(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return accuracy and macro-F1, over the classes that occur, of confusion matrices, [..., classes, classes]."""
    true = confusion.sum(-1)
    macro_f1 = (f1_scores(confusion) * (true > 0)).sum(-1) / (true > 0).sum(-1)
    return np.diagonal(confusion, axis1=-2, axis2=-1).sum(-1) / true.sum(-1), macro_f1


def f1_scores(confusion: np.ndarray) -> np.ndarray:
    """Return F1 by class, [..., classes], of confusion matrices; 0 if a class neither occurs nor is predicted."""
    correct = np.diagonal(confusion, axis1=-2, axis2=-1)
    return np.asarray(2 * correct / np.maximum(confusion.sum(-1) + confusion.sum(-2), 1))


def auroc(labels: np.ndarray, probabilities: np.ndarray, index: int) -> float | None:
    """Return the AUROC of class `index` against the rest; None if the class, or every other, is absent."""
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
    bin_of = np.digitize(confidence, edges[1:-1], right=True)
    count = np.bincount(bin_of, minlength=bins)
    total = np.bincount(bin_of, weights=confidence, minlength=bins)
    return Reliability(
        edges=edges,
        count=count,
        correct=np.bincount(bin_of[correct], minlength=bins),
        confidence=np.divide(total, count, out=np.full(bins, np.nan), where=count > 0),
    )


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the temperature by which to divide logits for the least NLL (Guo et al. 2017, arXiv:1706.04599).

    It lies within `TEMPERATURE_RANGE`. It is 1.0, which changes nothing, if none can be fitted: no image, logits that
    are not finite or all alike, or no error at all (the likelihood then only grows as the temperature falls).

    Args:
        logits: [n, classes].
        labels: class indices, int [n].
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
    minimum = minimize_scalar(nll, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    if not minimum.success or minimum.fun >= nll(0.0):
        return 1.0
    return float(np.clip(np.exp(minimum.x), *TEMPERATURE_RANGE))


def worst_errors(labels: np.ndarray, probabilities: np.ndarray, k: int) -> np.ndarray:
    """Return the indices of at most `k` wrongly classified images, the most confident error first, equals in order."""
    labels, probabilities = _checked(labels, probabilities)
    wrong = np.flatnonzero(probabilities.argmax(axis=1) != labels)
    return wrong[np.argsort(-probabilities[wrong].max(axis=1), kind="stable")][: max(k, 0)]


def _checked(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both as arrays, probabilities clipped to 0 to 1; the errors are those of `compute_metrics`."""
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
    # A float32 softmax exceeds 1 by a rounding error, which would fall outside the last bin.
    return labels, probabilities.clip(0.0, 1.0)


def _none_if_nan(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
