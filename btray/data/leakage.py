"""Leakage: images of a split that tests which also stand in one that is learnt from, and what training does about it.

Only pixels are compared, by fingerprints; no label is read.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from btray.core.errors import ThresholdExceeded

_log = logging.getLogger(__name__)

# What is learnt from comes before what tests it: an image leaks from a later split into an earlier one.
_ORDER = {"train": 0, "val": 1, "test": 2}


@dataclass(frozen=True)
class Leak:
    """What leaks among n images."""

    learnt: npt.NDArray[np.bool_]
    """Which images have a twin in a split that tests them, [n]."""
    tested: Mapping[str, tuple[int, int]]
    """Of each split that tests: how many of its images have a twin in an earlier split, and how many it has."""


def find_leak(splits: npt.NDArray[np.object_], groups: npt.NDArray[np.int64]) -> Leak:
    """Compare the splits of n images ("train" or None, "val", "test"); equal numbers in `groups` [n] show the same."""
    place = np.array([_ORDER[split or "train"] for split in splits], np.int64)
    latest = np.zeros(groups.max(initial=-1) + 1, np.int64)
    earliest = np.full(len(latest), len(_ORDER), np.int64)
    np.maximum.at(latest, groups, place)
    np.minimum.at(earliest, groups, place)
    twin_before = earliest[groups] < place
    tested = {
        split: (int((twin_before & (place == index)).sum()), int((place == index).sum()))
        for split, index in _ORDER.items()
        if index and (place == index).any()
    }
    return Leak(latest[groups] > place, tested)


def answer_leak(leak: Leak, on_leak: str, source: str) -> None:
    """Say how much leaks; with `on_leak` "fail" raise ThresholdExceeded for it."""
    for split, (leaked, images) in leak.tested.items():
        if not leaked:
            continue
        what = (
            f"{leaked} of {images} {split} images ({leaked / images:.0%}) of {source} show an image that is learnt from"
        )
        if on_leak == "fail":
            raise ThresholdExceeded(f"{what}; --on-leak drop leaves those out of training, jobs/audit.py lists them")
        if on_leak == "warn":
            _log.warning(
                "LEAK: %s: figures on all of them partly measure memory; see the clean ones, or use --on-leak drop.",
                what,
            )
        else:
            _log.info("%s; the %d twins are left out of training", what, int(leak.learnt.sum()))
