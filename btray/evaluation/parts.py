"""The figures of a part of the images, a source or a round of validation: the types that `metrics.json` has of them."""

from __future__ import annotations

from dataclasses import dataclass

FEW = 10
"""Groups below which a figure says too little to be compared."""

Interval = tuple[float, float]
"""Lower and upper end."""


@dataclass(frozen=True, kw_only=True)
class ClassInPart:
    """Figures of a class that occurs in a part."""

    recall: float
    """Share of its images that are predicted so."""
    recall_ci95: Interval
    """95 % Wilson interval that counts groups, not images."""
    f1: float
    """Within the part."""
    support: int
    """Images."""
    groups: int
    """Patients, or groups of pictures that look alike."""


@dataclass(frozen=True, kw_only=True)
class Outliers:
    """What becomes of images that show none of the classes, as `--outliers` names them."""

    n: int
    """Images."""
    groups: int
    """Patients, or groups of pictures that look alike."""
    flagged: int | None
    """Images marked as out of distribution; None if the model keeps no distribution."""
    abstained: int | None
    """Images from which the model abstains; None if it never abstains."""
    rejected: int
    """Images of which one of the two holds."""
    share: float
    """Of the images that are rejected."""
    share_ci95: Interval
    """95 % Wilson interval that counts groups, not images."""
    auroc: float | None
    """How well a low confidence tells them from images of the classes; None if there is none of these."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Figures of a part; what its images do not define is None. Intervals are over groups, not images."""

    n: int
    """Images of known classes."""
    groups: int
    """Patients, or groups of pictures that look alike."""
    macro_f1: float | None
    """Mean F1 over the classes that occur; None if fewer than two do."""
    macro_f1_ci95: Interval | None
    """95 % percentile interval of drawing groups with replacement."""
    recall: float | None
    """Share of the images predicted rightly, if one class alone occurs; else None."""
    recall_ci95: Interval | None
    """95 % Wilson interval."""
    accuracy: float | None
    accuracy_at_90: float | None = None
    """Accuracy on the surest 90 % of the images: what abstaining from the rest would give; earlier bundles lack it."""
    ece: float | None
    """Expected calibration error."""
    per_class: dict[str, ClassInPart]
    """Of the classes that occur."""
    outliers: Outliers | None
    """None if there is none in this part."""
