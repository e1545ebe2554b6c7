"""Group-aware, stratified splits: what belongs together never lies on both sides; and what leaks between given ones.

Rows belong together that share a patient_id, that are known to show the same picture (`duplicate_of`), or, if no
patient is known, whose files are neighbours: slices of one patient usually carry neighbouring numbers, so each run of
numbered files (one folder, one name but for the number) is cut into contiguous blocks. A picture's twins elsewhere come
along to the block of the first of them; the twins' neighbours do not, else chains of twins would weld whole classes
into one group.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from sklearn.model_selection import StratifiedGroupKFold

from btray.core.errors import ThresholdExceeded, UserError
from btray.data.duplicates import components
from btray.storage.packed import path_of

_log = logging.getLogger(__name__)

BLOCK = 25
"""Files in a block of a long run."""
LEAST_BLOCKS = 10
"""Blocks that a shorter run is cut into, so that a small class can be split too."""


SPLIT_ORDER = ("train", "val", "test")
"""What is learnt from comes before what tests it: an image leaks from a later split into an earlier one."""

Numbers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Leak:
    """Which of n images leak between splits. Only pictures count; no label is read."""

    learnt: Flags
    """Which images have a twin in a split that tests them, [n]."""
    tested: Mapping[str, tuple[int, int]]
    """Of each split that tests: how many of its images have a twin in an earlier split, and how many it has."""


def group_occurrence(ranks: Numbers, groups: Numbers) -> Flags:
    """Return, bool [n, splits], in which splits the group of each of n images has images.

    Args:
        ranks: int [n], the place of each image's split in SPLIT_ORDER; -1: none.
        groups: int [n], from 0; equal numbers show the same picture.
    """
    occurs = np.zeros((groups.max(initial=-1) + 1, len(SPLIT_ORDER)), bool)
    occurs[groups[ranks >= 0], ranks[ranks >= 0]] = True
    return np.asarray(occurs[groups])


def have_earlier_twin(ranks: Numbers, groups: Numbers) -> Flags:
    """Return, bool [n], which images have one of their group in an earlier split. Arguments as `group_occurrence`."""
    earlier = np.arange(len(SPLIT_ORDER)) < ranks[:, None]
    return np.asarray((group_occurrence(ranks, groups) & earlier).any(1))


def find_leak(splits: npt.NDArray[np.object_], groups: Numbers) -> Leak:
    """Compare the splits of n images ("train" or None, "val", "test"); equal numbers in `groups` [n] show the same."""
    ranks = np.array([SPLIT_ORDER.index(split or "train") for split in splits], np.int64)
    leaked = have_earlier_twin(ranks, groups)
    later = np.arange(len(SPLIT_ORDER)) > ranks[:, None]
    tested = {
        split: (int(leaked[ranks == rank].sum()), int((ranks == rank).sum()))
        for rank, split in enumerate(SPLIT_ORDER)
        if rank and (ranks == rank).any()
    }
    return Leak(np.asarray((group_occurrence(ranks, groups) & later).any(1)), tested)


def report_leak(leak: Leak, on_leak: str, source: str) -> None:
    """Log how much leaks; with `on_leak` "fail" raise ThresholdExceeded for it."""
    for split, (leaked, images) in leak.tested.items():
        if not leaked:
            continue
        message = (
            f"{leaked} of {images} {split} images ({leaked / images:.0%}) of {source} show an image that is learnt from"
        )
        if on_leak == "fail":
            raise ThresholdExceeded(f"{message}; --on-leak drop leaves those out of training, jobs/audit.py lists them")
        if on_leak == "warn":
            _log.warning(
                "LEAK: %s: figures on all of them partly measure memory; see the clean ones, or use --on-leak drop.",
                message,
            )
        else:
            _log.info("%s; the %d twins are left out of training", message, int(leak.learnt.sum()))


def hold_out(table: pa.Table, *, fraction: float, seed: int, duplicate_of: np.ndarray | None) -> Flags:
    """Choose whole groups such that each class is held out in a share near `fraction`.

    Of every class with at least two groups at least one is held out and at least one kept; a class with one group is
    kept whole, with a warning. The choice depends on the seed, names, labels and groups, not on the order of the rows.

    Args:
        table: rows with uri, label and patient_id, as from `labelled.read_labelled`; n rows.
        fraction: share to hold out, above 0 and below 1.
        seed: of the random choice.
        duplicate_of: int [n]; rows with an equal value show the same picture; -1 (or None): not known.

    Returns:
        bool [n], true if held out.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction {fraction} must lie between 0 and 1")
    group = group_rows(table, duplicate_of)
    classes, label = np.unique(_column(table, "label"), return_inverse=True)
    counts = np.zeros((group.max(initial=-1) + 1, len(classes)), np.int64)
    np.add.at(counts, (group, label), 1)
    choice = _Choice(counts, fraction, np.random.default_rng(seed))
    choice.represent_classes()
    choice.fill()
    choice.approach()
    for index, name in enumerate(classes):
        if not choice.held[counts[:, index] > 0].any():
            _log.warning(
                "No image of class %r can be held out: they all belong to groups needed for training.", str(name)
            )
    return np.asarray(choice.held[group], bool)


def k_folds(table: pa.Table, *, k: int, seed: int, duplicate_of: np.ndarray | None) -> Numbers:
    """Return fold numbers 0..k-1, int [n]: groups are never cut, and classes spread as evenly as groups allow.

    Arguments as for `hold_out`.

    Raises:
        UserError: there are fewer groups than folds, or no class has k images.
    """
    group, labels = group_rows(table, duplicate_of), _column(table, "label")
    most = np.unique(labels, return_counts=True)[1].max(initial=0)
    if not 2 <= k <= min(group.max(initial=-1) + 1, most):
        raise UserError(
            f"{k} folds cannot be made of {group.max(initial=-1) + 1} groups and at most {most} images per class: "
            "choose 2 or more folds, and no more than there are groups and images."
        )
    order = np.argsort(group, kind="stable")  # the splitter's choice must not depend on the order of the rows
    folds = np.empty(len(table), np.int64)
    splitter = StratifiedGroupKFold(k, shuffle=True, random_state=seed)
    for fold, (_, members) in enumerate(splitter.split(labels[order], labels[order], group[order])):
        folds[order[members]] = fold
    return folds


# ---- groups


def group_rows(table: pa.Table, duplicate_of: Sequence[int | None] | np.ndarray | None) -> Numbers:
    """Return group numbers from 0, int [n]: what belongs together, as the module's text says.

    Arguments as for `hold_out`. The numbers do not depend on the order of the rows: groups are numbered by their first
    rows in the order of folders, names and numbers.
    """
    uris = [path_of(uri) for uri in _column(table, "uri")]
    keys = [_run_key(uri) for uri in uris]
    order = np.array(sorted(range(len(uris)), key=lambda row: (keys[row], uris[row])), dtype=np.int64)
    if duplicate_of is None:
        duplicate_of = np.full(len(uris), -1, np.int64)
    if len(duplicate_of) != len(uris):
        raise ValueError(f"duplicate_of has {len(duplicate_of)} entries for {len(uris)} rows")
    twins = np.array([-1 if value is None else value for value in duplicate_of], np.int64)[order]
    patients = _column(table, "patient_id")[order]
    together = _components(patients, twins)
    with_patient = {part for part, patient in zip(together, patients, strict=True) if patient is not None}
    home: dict[int, tuple[str, int]] = {}
    for part, block in zip(together, _blocks([keys[row][:2] for row in order]), strict=True):
        home.setdefault(part, ("patient", part) if part in with_patient else ("block", block))
    numbers: dict[tuple[str, int], int] = {}
    group = np.empty(len(uris), np.int64)
    group[order] = [numbers.setdefault(home[part], len(numbers)) for part in together]
    return group


def _column(table: pa.Table, name: str) -> np.ndarray:
    return np.array(table[name].to_pylist(), dtype=object)


def _run_key(uri: str) -> tuple[str, str, int]:
    """Return folder, name without its last number, and that number (-1: none), of `folder/p (550).jpg` for example."""
    folder, _, name = uri.rpartition("/")
    match = re.fullmatch(r"(.*?)([0-9]+)([^0-9]*)", name, re.DOTALL)
    return (folder, f"{match[1]}/{match[3]}", int(match[2])) if match else (folder, name, -1)


def _components(patients: np.ndarray, twins: np.ndarray) -> list[int]:
    """Join rows by a common patient or a common picture, also through others; return the component of each row."""
    nodes: dict[object, int] = {}
    edges = [
        (row, nodes.setdefault(tie, len(patients) + len(nodes)))
        for row, (patient, twin) in enumerate(zip(patients, twins.tolist(), strict=True))
        for tie in (("patient", patient) if patient is not None else None, ("twin", twin) if twin >= 0 else None)
        if tie is not None
    ]
    joined = components(len(patients) + len(nodes), np.array(edges, dtype=np.int64).reshape(-1, 2))
    return joined[: len(patients)].tolist()


def _blocks(runs: Sequence[tuple[str, str]]) -> list[int]:
    """Return the contiguous block of each row of sorted runs, as a number that no other run uses."""
    sizes = Counter(runs)
    first: dict[tuple[str, str], int] = {}  # first row of each run
    block: list[int] = []
    for row, run in enumerate(runs):
        size = sizes[run]
        pieces = -(-size // min(BLOCK, max(1, size // LEAST_BLOCKS)))
        block.append(first.setdefault(run, row) + (row - first[run]) * pieces // size)
    return block


# ---- choice


class _Choice:
    """The groups held out so far, bool [groups], chosen by each group's images of each class, int [groups, classes]."""

    def __init__(self, counts: np.ndarray, fraction: float, random: np.random.Generator) -> None:
        self.held = np.zeros(len(counts), bool)
        self._counts = counts
        self._target = fraction * counts.sum(axis=0)
        self._reached = np.zeros(counts.shape[1], np.int64)
        self._spare = (counts > 0).sum(axis=0) - 1  # groups of each class that may still be held out
        self._shuffled = random.permutation(len(counts))

    def represent_classes(self) -> None:
        """Hold out a group of each class, rare ones first: the first that fits, or the one that overshoots least."""
        for index in np.argsort(self._spare, kind="stable"):
            candidates = self._allowed(self._shuffled[self._counts[self._shuffled, index] > 0])
            if self._reached[index] or not len(candidates):  # a group held out for another class had this one too
                continue
            fitting = candidates[self._fits(candidates)]
            best = [0] if len(fitting) else [self._distance(candidates).argmin()]
            self._take((fitting if len(fitting) else candidates)[best])

    def fill(self) -> None:
        """Hold out what fits, in random order."""
        candidates = self._shuffled
        while len(candidates := self._allowed(candidates[self._fits(candidates)])):
            counts = self._counts[candidates]
            fits = (counts.cumsum(axis=0) <= self._target - self._reached) | (counts == 0)
            spared = ((counts > 0).cumsum(axis=0) <= self._spare) | (counts == 0)
            together = (fits & spared).all(axis=1)  # true up to the first group for which there is no room left
            self._take(candidates if together.all() else candidates[: together.argmin()])

    def approach(self) -> None:
        """Hold out more while that comes nearer to the target than falling short of it."""
        while len(candidates := self._allowed(self._shuffled)):
            distances = self._distance(candidates)
            if distances.min() >= self._distance(None) - 1e-12:  # rounding must not count as an improvement
                return
            self._take(candidates[[distances.argmin()]])

    def _take(self, groups: np.ndarray) -> None:
        self.held[groups] = True
        self._reached += self._counts[groups].sum(axis=0)
        self._spare -= (self._counts[groups] > 0).sum(axis=0)

    def _allowed(self, groups: np.ndarray) -> np.ndarray:
        last_one = ((self._counts[groups] > 0) & (self._spare < 1)).any(axis=1)
        return groups[~self.held[groups] & ~last_one]

    def _fits(self, groups: np.ndarray) -> np.ndarray:
        room = self._target - self._reached
        return ((self._counts[groups] <= room) | (self._counts[groups] == 0)).all(axis=1)

    def _distance(self, groups: np.ndarray | None) -> np.ndarray:
        """Return how far the shares would be off, summed over classes, with each of `groups` added (None: nothing)."""
        added = 0 if groups is None else self._counts[groups]
        return (np.abs(self._reached + added - self._target) / np.maximum(self._target, 1)).sum(axis=-1)
