"""Drift: whether today's answers look like earlier ones. Counts that add up over parts and runs, compared by PSI.

The population stability index of two histograms is the sum over their bins of (p - q) ln(p / q), symmetric and 0 if
they agree (Siddiqi, Credit Risk Scorecards, 2006; its statistics: Yurdakul 2018). By common usage up to 0.1 is no
change, above 0.25 a large one. Few images give a large index by chance, so that an alarm needs FRAMES_PER_BIN.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

REFERENCE = "reference.json"
"""The file of a bundle that holds the profile of its validation images."""
RUNS_BEFORE = "runs before"
"""What a run is compared with, by its name in reports; the other is the model's validation images."""
LARGE = 0.25
"""Index from which on the answers have changed."""
FRAMES_PER_BIN = 20
"""Frames per bin of the finest histogram, on both sides, from which on an index tells something.

Two samples of one distribution, each of 100 frames in 20 bins, differ by more than LARGE in up to 9 of 10 cases; of 400
frames in less than 1 of 100, whatever the distribution (tests/model/test_drift.py draws them)."""
CONFIDENCE_EDGES = tuple(np.linspace(0, 1, 21).round(2).tolist())
OOD_EDGES = (*np.linspace(0, 4, 17).tolist(), float("inf"))
"""Scores are about 1 for training images."""

# A bin that is empty on one side counts as this share; the index would be infinite.
_LEAST_SHARE = 1e-4


class Profile(BaseModel):
    """How many frames got which label, confidence and out-of-distribution score. Profiles add up."""

    model_config = ConfigDict(frozen=True)

    labels: Counter[str] = Field(default_factory=Counter)
    confidence: list[int] = [0] * (len(CONFIDENCE_EDGES) - 1)
    """Counts between CONFIDENCE_EDGES."""
    ood_score: list[int] = [0] * (len(OOD_EDGES) - 1)
    """Counts between OOD_EDGES; all 0 if the model gives no score."""
    abstained: int = 0
    out_of_distribution: int = 0

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]]) -> Self:
        """Count rows with the fields of an answer: label, confidence, ood_score, abstained and out_of_distribution."""
        rows = list(rows)
        return cls(
            labels=Counter(row["label"] for row in rows),
            confidence=_counts([row["confidence"] for row in rows], CONFIDENCE_EDGES),
            ood_score=_counts([row["ood_score"] for row in rows if row["ood_score"] is not None], OOD_EDGES),
            abstained=sum(row["abstained"] for row in rows),
            out_of_distribution=sum(row["out_of_distribution"] for row in rows),
        )

    def __add__(self, other: Self) -> Self:
        """Return the profile of the frames of both."""
        return type(self)(
            labels=self.labels + other.labels,
            confidence=np.add(self.confidence, other.confidence).tolist(),
            ood_score=np.add(self.ood_score, other.ood_score).tolist(),
            abstained=self.abstained + other.abstained,
            out_of_distribution=self.out_of_distribution + other.out_of_distribution,
        )

    @property
    def frames(self) -> int:
        """Number of frames."""
        return self.labels.total()


class Drift(BaseModel):
    """PSI of a profile against a reference."""

    model_config = ConfigDict(frozen=True)

    frames: int
    """Frames of the reference."""
    observed: int = 0
    """Frames that were compared with it."""
    labels: float
    """Index of the label mix."""
    by_label: dict[str, float]
    """Each label's share of it."""
    confidence: float
    """Index of the confidence."""
    ood_score: float | None
    """Index of the out-of-distribution score; None if the model gives none."""

    @property
    def frames_needed(self) -> int:
        """Number of frames on each side from which on these indices are no play of chance."""
        return FRAMES_PER_BIN * max(len(CONFIDENCE_EDGES) - 1, len(self.by_label))

    @property
    def is_telling(self) -> bool:
        """Whether there are enough frames for an alarm."""
        return min(self.frames, self.observed) >= self.frames_needed


def psi_terms(reference: Sequence[float], observed: Sequence[float]) -> list[float]:
    """Return each bin's share of the population stability index of two histograms; all 0 if one is empty."""
    before, now = np.asarray(reference, float), np.asarray(observed, float)
    if before.sum() == 0 or now.sum() == 0:
        return [0.0] * len(before)
    p, q = (np.maximum(counts / counts.sum(), _LEAST_SHARE) for counts in (now, before))
    return [float(term) for term in (p - q) * np.log(p / q)]


def drift(reference: Profile, observed: Profile) -> Drift:
    """Return the PSI of `observed` against `reference`."""
    names = sorted({*reference.labels, *observed.labels})
    terms = psi_terms([reference.labels[name] for name in names], [observed.labels[name] for name in names])
    return Drift(
        frames=reference.frames,
        observed=observed.frames,
        labels=sum(terms),
        by_label=dict(zip(names, terms, strict=True)),
        confidence=sum(psi_terms(reference.confidence, observed.confidence)),
        ood_score=sum(psi_terms(reference.ood_score, observed.ood_score)) if sum(observed.ood_score) else None,
    )


def _counts(values: Sequence[float], edges: Sequence[float]) -> list[int]:
    """Return a histogram. A value on an edge counts above it, but for the last edge; one beyond, in the last bin."""
    counts: list[int] = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0].tolist()
    return counts
