"""Whether today's answers look like those of before: counts that add up over parts and nights, compared by PSI.

The population stability index of two histograms is the sum over their bins of (p - q) ln(p / q), symmetric and 0 where
they agree (Siddiqi, Credit Risk Scorecards, 2006; its statistics: Yurdakul 2018). By common usage up to 0.1 is no
change, above 0.25 a large one. Few images give a large index by chance: with n images in b bins about b / n of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

REFERENCE = "reference.json"
"""The file of a bundle that holds the profile of its validation images."""
RUNS_BEFORE = "runs before"
"""What a run is compared with, by its name in reports; the other is the model's validation images."""
LARGE = 0.25
"""Index from which on the answers have changed."""
CONFIDENCE_EDGES = tuple(np.linspace(0, 1, 21).round(2).tolist())
OOD_EDGES = (*np.linspace(0, 4, 17).tolist(), float("inf"))
"""Scores are about 1 for training images."""

# A bin that is empty on one side counts as this share; the index would be infinite.
_LEAST_SHARE = 1e-4


@dataclass
class Profile:
    """How many frames got which label, confidence and out-of-distribution score."""

    labels: Counter[str] = field(default_factory=Counter)
    confidence: list[int] = field(default_factory=lambda: [0] * (len(CONFIDENCE_EDGES) - 1))
    """Counts between CONFIDENCE_EDGES."""
    ood_score: list[int] = field(default_factory=lambda: [0] * (len(OOD_EDGES) - 1))
    """Counts between OOD_EDGES; all 0 where the model gives no score."""
    abstained: int = 0
    out_of_distribution: int = 0

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]]) -> Self:
        """Of rows with label, confidence, ood_score, abstained and out_of_distribution, as in the results table."""
        kept = list(rows)
        scores = [row["ood_score"] for row in kept if row["ood_score"] is not None]
        return cls(
            labels=Counter(row["label"] for row in kept),
            confidence=_counts([row["confidence"] for row in kept], CONFIDENCE_EDGES),
            ood_score=_counts(scores, OOD_EDGES),
            abstained=sum(row["abstained"] for row in kept),
            out_of_distribution=sum(row["out_of_distribution"] for row in kept),
        )

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Self:
        """What `to_json` gave."""
        return cls(**{**said, "labels": Counter(said["labels"])})

    def to_json(self) -> dict[str, Any]:
        """As plain numbers."""
        return {**vars(self), "labels": dict(self.labels)}

    def add(self, other: Profile) -> None:
        """Count the frames of `other` too."""
        self.labels.update(other.labels)
        self.confidence = [a + b for a, b in zip(self.confidence, other.confidence, strict=True)]
        self.ood_score = [a + b for a, b in zip(self.ood_score, other.ood_score, strict=True)]
        self.abstained += other.abstained
        self.out_of_distribution += other.out_of_distribution

    @property
    def frames(self) -> int:
        """How many there are."""
        return self.labels.total()


def psi_terms(reference: Sequence[float], observed: Sequence[float]) -> list[float]:
    """Each bin's share of the population stability index of two histograms; all 0 where one is empty."""
    before, now = np.asarray(reference, float), np.asarray(observed, float)
    if before.sum() == 0 or now.sum() == 0:
        return [0.0] * len(before)
    p, q = (np.maximum(counts / counts.sum(), _LEAST_SHARE) for counts in (now, before))
    return [float(term) for term in (p - q) * np.log(p / q)]


def drift(reference: Profile, observed: Profile) -> dict[str, Any]:
    """PSI of `observed` against `reference`: of the label mix, in all and by label, of confidence and of the score.

    The score's is None where the model gives none.
    """
    names = sorted({*reference.labels, *observed.labels})
    terms = psi_terms([reference.labels[name] for name in names], [observed.labels[name] for name in names])
    return {
        "frames": reference.frames,
        "labels": sum(terms),
        "by_label": dict(zip(names, terms, strict=True)),
        "confidence": sum(psi_terms(reference.confidence, observed.confidence)),
        "ood_score": sum(psi_terms(reference.ood_score, observed.ood_score)) if sum(observed.ood_score) else None,
    }


def _counts(values: Sequence[float], edges: Sequence[float]) -> list[int]:
    """A value on an edge counts above it, but for the last edge."""
    within = np.clip(np.asarray(values, float), edges[0], edges[-1])
    places = np.clip(np.searchsorted(edges, within, side="right") - 1, 0, len(edges) - 2)
    counts: list[int] = np.bincount(places.astype(np.int64), minlength=len(edges) - 1).tolist()
    return counts
