"""Group-aware, stratified splits: what belongs together never lies on both sides; and what leaks between given ones.

Rows belong together that share a patient_id (and the source, if it is known), that look alike by their fingerprints
(the same picture, or neighbouring slices), or, if no patient is known, whose files are neighbours: slices of a patient
usually carry neighbouring numbers, so the files of one class and source, in the order of folders and numbers, are cut
into a few large blocks, where two neighbours look least alike: there one patient ends and the next begins. What looks
alike elsewhere comes along to the block of the first of them; the neighbours of that do not, else chains would weld
whole classes into one group.
"""

from __future__ import annotations

import itertools
import logging
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from sklearn.model_selection import StratifiedGroupKFold

from btray.core.errors import ThresholdExceeded, UserError
from btray.core.notice import percent
from btray.data.duplicates import Numbers, components, near_pairs, numbered
from btray.data.fingerprint import ALIKE, Fingerprints, distances
from btray.storage.packed import path_of

_log = logging.getLogger(__name__)

BLOCKS = 7
"""Blocks that the files of a class are cut into, if no patients are named: few, for each cut parts a patient's slices.

With 7, the default share of 15 % is one block of each class, and 3 to 5 folds can be made.
"""
# Of how many folds a share to hold out is made up at most.
_MOST_FOLDS = 10


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
        share = percent(leaked / images, 0)
        message = f"{leaked} of {images} {split} images ({share}) of {source} show an image that is learnt from"
        if on_leak == "fail":
            raise ThresholdExceeded(f"{message}; --on-leak drop leaves those out of training, jobs/audit.py lists them")
        if on_leak == "warn":
            _log.warning(
                "LEAK: %s: figures on all of them partly measure memory; see the clean ones, or use --on-leak drop.",
                message,
            )
        else:
            _log.info("%s; the %d twins are left out of training", message, int(leak.learnt.sum()))


def hold_out(table: pa.Table, *, fraction: float, seed: int, prints: Fingerprints | None) -> Flags:
    """Choose whole groups such that each class is held out in a share near `fraction`: some folds of `k_folds`.

    Of every class with two groups at least one is held out and one kept, wherever groups of several classes allow both;
    a class with one group is kept whole, with a warning. The choice depends on the seed, names, labels and groups, not
    on the order of the rows.

    Args:
        table: rows with uri, label, patient_id and source, as from `labelled.read_labelled`; n rows.
        fraction: share to hold out, above 0 and below 1.
        seed: of the random choice.
        prints: of the images, [n, VIEWS, LENGTH], if they are known.

    Returns:
        bool [n], true if held out.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction {fraction} must lie between 0 and 1")
    group = group_rows(table, prints)
    classes, label = np.unique(_column(table, "label"), return_inverse=True)
    counts = np.zeros((group.max(initial=-1) + 1, len(classes)), np.int64)
    np.add.at(counts, (group, label), 1)
    held = np.zeros(len(counts), bool)
    most = min(_MOST_FOLDS, len(counts), int(counts.sum(axis=0).max(initial=0)))
    share = Fraction(fraction).limit_denominator(max(1, most))
    if 0 < share < 1:
        # Groups of different size are dealt out by size, not by chance: the seed also says which folds they are.
        folds = (_folds(label, group, share.denominator, seed) + seed) % share.denominator
        held[group[folds < share.numerator]] = True
    present = counts > 0
    order = np.argsort(counts.sum(axis=1), kind="stable")  # what is moved is small
    for index in np.argsort(present.sum(axis=0), kind="stable"):  # rare classes first
        if not present[~held, index].any():
            held[order[present[order, index]][-1]] = False
    for index in np.argsort(present.sum(axis=0), kind="stable"):
        spare = present[~held].sum(axis=0) > 1
        if not present[held, index].any():
            free = order[~held[order] & present[order, index] & (spare | ~present[order]).all(axis=1)]
            held[free[:1]] = True
            if not len(free):
                _log.warning(
                    "No image of class %r can be held out: they all belong to groups needed for training.",
                    str(classes[index]),
                )
    return held[group]


def leave_out_sources(table: pa.Table) -> dict[str, Flags]:
    """Return of each source, by name, which rows are its own, bool [n].

    Raises:
        UserError: there are fewer than two sources, or rows without one.
    """
    sources = _column(table, "source")
    names = sorted({source for source in sources if source})
    if len(names) < 2 or None in sources:
        found = f"{len(names)} ({', '.join(names)})" if names else "none"
        unnamed = f", and {(sources == None).sum()} images without one" * (None in sources)  # noqa: E711 - of each
        raise UserError(
            f"--validate-by sources needs two sources or more, and each image's: the data name {found}{unnamed}; give "
            "a manifest with the column source, as jobs/acquire.py makes it of several --source, or --validate-by folds"
        )
    return {name: sources == name for name in names}


def k_folds(table: pa.Table, *, k: int, seed: int, prints: Fingerprints | None) -> Numbers:
    """Return fold numbers 0..k-1, int [n]: groups are never cut, and classes spread as evenly as groups allow.

    Arguments as for `hold_out`.

    Raises:
        UserError: there are fewer groups than folds, or no class has k images.
    """
    group, labels = group_rows(table, prints), _column(table, "label")
    most = np.unique(labels, return_counts=True)[1].max(initial=0)
    if not 2 <= k <= min(group.max(initial=-1) + 1, most):
        raise UserError(
            f"{k} folds cannot be made of {group.max(initial=-1) + 1} groups and at most {most} images per class: "
            "choose 2 or more folds, and no more than there are groups and images."
        )
    return _folds(labels, group, k, seed)


def _folds(labels: npt.NDArray[np.generic], group: Numbers, k: int, seed: int) -> Numbers:
    order = np.argsort(group, kind="stable")  # the splitter's choice must not depend on the order of the rows
    folds = np.empty(len(group), np.int64)
    splitter = StratifiedGroupKFold(k, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a class has fewer images than there are folds
        for fold, (_, members) in enumerate(splitter.split(labels[order], labels[order], group[order])):
            folds[order[members]] = fold
    return folds


# ---- groups


def group_rows(table: pa.Table, prints: Fingerprints | None) -> Numbers:
    """Return group numbers from 0, int [n]: what belongs together, as the module's text says.

    Arguments as for `hold_out`. The numbers do not depend on the order of the rows: groups are numbered by their first
    rows in the order of folders, names and numbers.
    """
    uris = [path_of(uri) for uri in _column(table, "uri")]
    count, classes = len(uris), list(zip(_sources(table), _column(table, "label"), strict=True))
    keys = [(kind, *_run_key(uri), uri) for kind, uri in zip(classes, uris, strict=True)]
    order = np.array(sorted(range(count), key=keys.__getitem__), dtype=np.int64)
    block: list[int] = []  # of each row in order: a number that no other class uses
    for _, run in itertools.groupby(order, lambda row: classes[row]):
        rows = np.array(list(run))
        block += (len(block) + _blocks(len(rows), None if prints is None else prints[rows])).tolist()
    part = subjects(table, prints)[order]
    _, first, number = np.unique(part, return_index=True, return_inverse=True)
    named = np.isin(part, part[_column(table, "patient_id")[order] != None])  # noqa: E711 - of each element
    group = np.empty(count, np.int64)
    group[order] = numbered(pa.array(np.where(named, count + number, np.array(block, np.int64)[first[number]])))
    return group


def subjects(table: pa.Table, prints: Fingerprints | None) -> Numbers:
    """Return numbers int [n], equal for rows of one patient, or that look alike, also through others.

    Arguments as for `hold_out`. A row of which neither is known has a number of its own. One patient_id in two sources
    is two patients.
    """
    count = len(table)
    patients, sources = _column(table, "patient_id"), _sources(table)
    known = np.flatnonzero(patients != None)  # noqa: E711 - of each element
    names = [f"{sources[row]}/{patients[row]}" for row in known]
    # rows are joined with their patient, a node after those of the rows, and with what looks alike
    ties = [np.stack([known, numbered(pa.array(names, pa.string())) + count], axis=1)]
    if prints is not None:
        if len(prints) != count:
            raise ValueError(f"prints has {len(prints)} entries for {count} rows")
        ties.append(near_pairs(prints, within=ALIKE)[0])
    return components(2 * count, np.concatenate(ties))[:count]


def _blocks(size: int, prints: Fingerprints | None) -> Numbers:
    """Return for each of a run of files, 1 or more, the number of its block, from 0."""
    count = min(BLOCKS, size)
    cuts = np.arange(1, count) * size // count
    slack = size // (4 * count)  # no block is shorter than half of what it would be if all were equal
    if prints is not None and slack:
        change = distances(prints[:-1], prints[1:])  # from each file to the next
        cuts = np.array([cut - slack + change[cut - slack - 1 : cut + slack].argmax() for cut in cuts], np.int64)
    return np.searchsorted(cuts, np.arange(size), side="right")


def _sources(table: pa.Table) -> list[str]:
    """Return the source of each row, empty if it is not known."""
    return [source or "" for source in _column(table, "source")]


def _column(table: pa.Table, name: str) -> np.ndarray:
    return np.array(table[name].to_pylist(), dtype=object)


def _run_key(uri: str) -> tuple[str, str, int]:
    """Return folder, name without its last number, and that number (-1: none), of `folder/p (550).jpg` for example."""
    folder, _, name = uri.rpartition("/")
    match = re.fullmatch(r"(.*?)([0-9]+)([^0-9]*)", name, re.DOTALL)
    return (folder, f"{match[1]}/{match[3]}", int(match[2])) if match else (folder, name, -1)
