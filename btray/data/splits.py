"""Group-aware, stratified splits: what belongs together never lies on both sides; and what leaks between given ones.

Rows belong together that share a patient_id, that are known to show the same picture (`duplicate_of`), or, if no
patient is known, whose files are neighbours: slices of one patient usually carry neighbouring numbers, so each run of
numbered files (one folder, one name but for the number) is cut into contiguous blocks. A picture's twins elsewhere come
along to the block of the first of them; the twins' neighbours do not, else chains of twins would weld whole classes
into one group.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from sklearn.model_selection import StratifiedGroupKFold

from btray.core.errors import ThresholdExceeded, UserError
from btray.data.duplicates import Numbers, components, numbered
from btray.storage.packed import path_of

_log = logging.getLogger(__name__)

BLOCK = 25
"""Files in a block of a long run."""
LEAST_BLOCKS = 10
"""Blocks that a shorter run is cut into, so that a small class can be split too."""


SPLIT_ORDER = ("train", "val", "test")
"""What is learnt from comes before what tests it: an image leaks from a later split into an earlier one."""

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
    held = _choose_groups(counts, fraction, np.random.default_rng(seed))
    for index, name in enumerate(classes):
        if not held[counts[:, index] > 0].any():
            _log.warning(
                "No image of class %r can be held out: they all belong to groups needed for training.", str(name)
            )
    return held[group]


def _choose_groups(counts: Numbers, fraction: float, random: np.random.Generator) -> Flags:
    """Choose the groups to hold out, bool [groups], by each group's images of each class, int [groups, classes]."""
    shuffled, present = random.permutation(len(counts)), counts > 0
    target, held = fraction * counts.sum(axis=0), np.zeros(len(counts), bool)

    def allowed(groups: Numbers) -> Numbers:
        """Return those of `groups` that leave another group of each of their classes to learn from."""
        last = present.sum(axis=0) - present[held].sum(axis=0) < 2
        return np.asarray(groups[~held[groups] & ~(present[groups] & last).any(axis=1)])

    def distance(added: Numbers | int) -> npt.NDArray[np.float64]:
        """Return how far the shares would be off, summed over classes, with `added` images of each class."""
        reached = counts[held].sum(axis=0) + added
        return np.asarray((np.abs(reached - target) / np.maximum(target, 1)).sum(axis=-1))

    # A group of each class, rare ones first: the first that fits, or the one that overshoots least.
    for index in np.argsort(present.sum(axis=0), kind="stable"):
        candidates = allowed(shuffled[present[shuffled, index]])
        if held[present[:, index]].any() or not len(candidates):  # one held out for another class had this one too
            continue
        room = target - counts[held].sum(axis=0)
        fitting = candidates[((counts[candidates] <= room) | ~present[candidates]).all(axis=1)]
        held[fitting[0] if len(fitting) else candidates[distance(counts[candidates]).argmin()]] = True
    # Then what fits, in random order.
    room, spare = target - counts[held].sum(axis=0), present.sum(axis=0) - present[held].sum(axis=0) - 1
    for group in shuffled[~held[shuffled]]:
        if (~present[group] | ((counts[group] <= room) & (spare > 0))).all():
            held[group] = True
            room, spare = room - counts[group], spare - present[group]
    # At last, while that comes nearer to the target than falling short of it, what overshoots; rounding is no approach.
    while len(candidates := allowed(shuffled)):
        distances = distance(counts[candidates])
        if distances.min() >= distance(0) - 1e-12:
            break
        held[candidates[distances.argmin()]] = True
    return held


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
    count = len(uris)
    given = [None] * count if duplicate_of is None else duplicate_of
    twins = np.array([-1 if twin is None else twin for twin in given], np.int64)
    if len(twins) != count:
        raise ValueError(f"duplicate_of has {len(twins)} entries for {count} rows")
    keys = [_run_key(uri) for uri in uris]
    order = np.array(sorted(range(count), key=lambda row: (keys[row], uris[row])), dtype=np.int64)
    block: list[int] = []  # of each row in order: a number that no other run uses
    for _, rows in itertools.groupby(order, lambda row: keys[row][:2]):
        size = len(list(rows))
        pieces = -(-size // min(BLOCK, max(1, size // LEAST_BLOCKS)))
        block += [len(block) + place * pieces // size for place in range(size)]
    patients, twins = _column(table, "patient_id")[order], twins[order]
    known, twinned = np.flatnonzero(patients != None), np.flatnonzero(twins >= 0)  # noqa: E711 - of each element
    # rows are joined by a common patient or picture, nodes after those of the rows, also through others
    ties = [
        (known, numbered(pa.array(patients[known])) + count),
        (twinned, numbered(pa.array(twins[twinned])) + 2 * count),
    ]
    part = components(3 * count, np.concatenate([np.stack(tie, axis=1) for tie in ties]))[:count]
    _, first, number = np.unique(part, return_index=True, return_inverse=True)
    home = np.where(np.isin(part, part[known]), count + number, np.array(block, np.int64)[first[number]])
    group = np.empty(count, np.int64)
    group[order] = numbered(pa.array(home))
    return group


def _column(table: pa.Table, name: str) -> np.ndarray:
    return np.array(table[name].to_pylist(), dtype=object)


def _run_key(uri: str) -> tuple[str, str, int]:
    """Return folder, name without its last number, and that number (-1: none), of `folder/p (550).jpg` for example."""
    folder, _, name = uri.rpartition("/")
    match = re.fullmatch(r"(.*?)([0-9]+)([^0-9]*)", name, re.DOTALL)
    return (folder, f"{match[1]}/{match[3]}", int(match[2])) if match else (folder, name, -1)
