"""Computation of the figures of a part of the images, with intervals over groups that depend on each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from sklearn.metrics import roc_auc_score

from btray.evaluation.metrics import (
    BOOTSTRAP_SAMPLES,
    accuracy_and_macro_f1,
    f1_scores,
    percentile_interval,
    reliability,
    wilson_interval,
)
from btray.evaluation.parts import ClassInPart, Interval, Outliers, Part
from btray.model.abstention import risk_coverage

Numbers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.floating]

# Bootstrap samples drawn at a time, so that memory stays bounded with many groups.
_DRAWN = 100


def measure_part(
    labels: Numbers, probabilities: Floats, classes: Sequence[str], groups: Numbers, outliers: Outliers | None = None
) -> Part:
    """Compute the figures of n images, none of which is an outlier.

    Args:
        labels: class indices, int [n].
        probabilities: [n, classes], each row sums to 1.
        classes: names of the columns.
        groups: numbers, int [n], equal for images that depend on each other.
        outliers: those of the part.
    """
    n, count = len(labels), len(np.unique(groups))
    if n == 0:
        nothing = dict.fromkeys(
            ("macro_f1", "macro_f1_ci95", "recall", "recall_ci95", "accuracy", "accuracy_at_90", "ece")
        )
        return Part(n=0, groups=0, per_class={}, outliers=outliers, **nothing)
    by_group = confusions_by_group(labels, probabilities.argmax(axis=1), groups, len(classes))
    confusion = by_group.sum(axis=0)
    accuracy, macro_f1 = (float(value) for value in accuracy_and_macro_f1(confusion))
    f1 = f1_scores(confusion)
    per_class = {}
    for index in np.unique(labels).tolist():
        support, own = int(confusion[index].sum()), int((by_group[:, index].sum(axis=1) > 0).sum())
        recall = float(confusion[index, index] / support)
        per_class[classes[index]] = ClassInPart(
            recall=recall,
            recall_ci95=wilson_interval(recall * own, own),
            f1=float(f1[index]),
            support=support,
            groups=own,
        )
    several = len(per_class) > 1
    curve = risk_coverage(labels, probabilities)
    return Part(
        n=n,
        groups=count,
        macro_f1=macro_f1 if several else None,
        macro_f1_ci95=group_bootstrap(by_group) if several else None,
        recall=None if several else accuracy,
        recall_ci95=None if several else wilson_interval(accuracy * count, count),
        accuracy=accuracy,
        accuracy_at_90=float(curve.accuracy[np.searchsorted(curve.coverage, 0.9)]),
        ece=reliability(labels, probabilities).ece,
        per_class=per_class,
        outliers=outliers,
    )


def confusions_by_group(labels: Numbers, predicted: Numbers, groups: Numbers, classes: int) -> Numbers:
    """Count n images by group, true class and predicted class, int [groups, classes, classes]; arguments are [n]."""
    _, number = np.unique(groups, return_inverse=True)
    counts = np.zeros((number.max(initial=-1) + 1, classes, classes), np.int64)
    np.add.at(counts, (number, labels, predicted), 1)
    return counts


def group_bootstrap(by_group: Numbers, samples: int = BOOTSTRAP_SAMPLES) -> Interval:
    """Return the 95 % percentile interval of macro-F1 if whole groups are drawn with replacement.

    Slices of a patient are right or wrong together: an interval over images would be too narrow (Field & Welsh 2007,
    Bootstrapping clustered data, doi:10.1111/j.1467-9868.2007.00593.x).

    Args:
        by_group: images counted by group, true class and predicted class, int [groups, classes, classes].
        samples: bootstrap samples to draw.
    """
    random, count = np.random.default_rng(0), len(by_group)  # a fixed seed: equal counts give equal intervals
    values: list[float] = []
    for start in range(0, samples, _DRAWN):
        times = random.multinomial(count, np.full(count, 1 / count), min(_DRAWN, samples - start))
        values += accuracy_and_macro_f1(np.tensordot(times, by_group, 1))[1].tolist()
    return percentile_interval(np.array(values))


def measure_outliers(
    confidence: Floats,
    known_confidence: Floats,
    groups: Numbers,
    *,
    abstain_below: float | None,
    flagged: npt.NDArray[np.bool_] | None,
) -> Outliers:
    """Count how many of n outliers are rejected.

    Args:
        confidence: the model's in its answers to them, [n].
        known_confidence: that in its answers to images of known classes.
        groups: numbers, int [n], equal for images that depend on each other.
        abstain_below: confidence below which the model abstains, if it does.
        flagged: which of them are out of distribution, bool [n], if that is known.
    """
    n, count = len(confidence), len(np.unique(groups))
    abstained = None if abstain_below is None else confidence < abstain_below
    marks = [mark for mark in (abstained, flagged) if mark is not None]
    rejected = int(np.any(marks, axis=0).sum()) if marks else 0
    is_outlier = np.repeat([True, False], [n, len(known_confidence)])
    return Outliers(
        n=n,
        groups=count,
        flagged=None if flagged is None else int(flagged.sum()),
        abstained=None if abstained is None else int(abstained.sum()),
        rejected=rejected,
        share=rejected / n,
        share_ci95=wilson_interval(rejected / n * count, count),
        auroc=float(roc_auc_score(is_outlier, -np.concatenate([confidence, known_confidence])))
        if len(known_confidence)
        else None,
    )
