"""Which of many images are the same: candidates by hashing in bands, then groups. Cost is near linear, never all pairs.

Fingerprints are hashed by p-stable projections (Datar et al. 2004, doi:10.1145/997817.997857): near ones fall into the
same bucket of at least one band all but surely, others hardly ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree

from btray.data.fingerprint import (
    LENGTH,
    SAME_FINGERPRINT,
    SAME_IMAGE,
    VIEWS,
    Fingerprints,
    ShortFingerprints,
    distances,
    frequencies,
    is_short,
    lengthened,
    shortened,
)

Numbers = npt.NDArray[np.int64]
Pairs = Numbers

# Chosen on pairs of real slices that correlate by 0.99 to 0.9995: all share a bucket, and of other images a pair in
# some thousand does.
_BANDS, _PROJECTIONS, _CELL = 24, 16, 1.4
# The typical deviation of fingerprints of different slices, once each frequency is weighted by its root.
_SPREAD = 0.85
# In a larger bucket each image is paired with this many that come next by a further projection: crowds of one image
# are joined as well, and cost stays linear.
_WINDOW = 24
# Numbers of a fingerprint, of the lowest frequencies, that are compared first. They hold most of it: hardly any pair of
# different images of a bucket is left, however many share it.
_LOWEST = 16
_ROUNDING = 1.0001
# Rounds of `verified_pairs`; on the public data set the first one finds every group.
_ROUNDS = 4
# Images or pairs worked on at a time, and bands, so that memory stays bounded.
_CHUNK = 10_000
_BANDS_HELD = 8


def near_pairs(prints: Fingerprints, *, within: float) -> tuple[Pairs, npt.NDArray[np.float32]]:
    """Find pairs of fingerprints [n, VIEWS, LENGTH] that lie at most `within` apart, nearest first.

    Returns their positions int64 [p, 2], each pair once, the smaller first, and their distances [p]. In crowds of more
    than some dozen only pairs that hold the crowd together are given. Blank images have no pair. Besides `prints` and
    the pairs it holds some 250 bytes per image.
    """
    codes = np.zeros(0, np.int64)  # of pairs: the first position times n, plus the second
    for view in range(VIEWS):
        for found in _candidates(prints[:, view], within=within, seed=view):
            codes = np.unique(np.concatenate([codes, *found]))  # the same pairs come again in every band and view
    pairs = np.stack(np.divmod(codes, max(1, len(prints))), axis=1)
    apart = [np.zeros(0, np.float32)]
    for start in range(0, len(pairs), _CHUNK):
        part = pairs[start : start + _CHUNK]
        apart.append(distances(prints[part[:, 0]], prints[part[:, 1]]))
    distance = np.concatenate(apart)
    near = np.flatnonzero(distance <= within)
    near = near[np.argsort(distance[near], kind="stable")]
    return pairs[near], distance[near]


def group_by_fingerprint(prints: Fingerprints, *, within: float = SAME_FINGERPRINT) -> Numbers:
    """Return group numbers int64 [n]: equal for fingerprints at most `within` apart, also through others."""
    pairs, _ = near_pairs(prints, within=within)
    return components(len(prints), pairs)


def have_twin(prints: Fingerprints, among: Fingerprints | ShortFingerprints) -> npt.NDArray[np.bool_]:
    """Return, bool [n], which fingerprints [n, VIEWS, LENGTH] have one of the same image in `among`, m whole or short.

    Also through others of `prints`: what is the same as a twin is one.
    """
    if is_short(among):
        prints, among = lengthened(shortened(prints)), lengthened(among)
    group = group_by_fingerprint(np.concatenate([prints, among]))
    return np.isin(group[: len(prints)], group[len(prints) :])


def components(count: int, pairs: Pairs) -> Numbers:
    """Return the number, int64 [count], of the connected component of each of `count` nodes with edges [p, 2]."""
    if not count:
        return np.zeros(0, np.int64)
    graph = coo_array((np.ones(len(pairs), np.int8), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)


def numbered(values: pa.Array | pa.ChunkedArray) -> Numbers:
    """Return numbers int64 [n] from 0, equal for equal values, in the order in which those first occur."""
    encoded = pc.dictionary_encode(values)
    return np.asarray((encoded.combine_chunks() if isinstance(values, pa.ChunkedArray) else encoded).indices, np.int64)


def verified_pairs(
    count: int, pairs: Pairs, correlate: Callable[[Pairs], npt.NDArray[np.float32]]
) -> tuple[Pairs, npt.NDArray[np.float32], int]:
    """Return those of `pairs` [p, 2] of `count` images that hold groups of one image together, and their correlations.

    `pairs` come nearest first, as from `near_pairs`; `correlate` compares the pictures of some of them. Each round
    compares a spanning forest of nearest pairs between the groups known so far, so that a crowd of n copies costs n
    comparisons and not n squared, and all together at most 4 a picture. Also returns how many were compared.
    """
    same, values = np.zeros((0, 2), np.int64), np.zeros(0, np.float32)
    group, left, compared = np.arange(count), pairs, 0
    for _ in range(_ROUNDS):
        left = left[group[left[:, 0]] != group[left[:, 1]]]
        chosen = _spanning_forest(group[left])
        if not len(chosen):
            break
        correlation = correlate(left[chosen])
        compared += len(chosen)
        passed = correlation >= SAME_IMAGE
        same = np.concatenate([same, left[chosen][passed]])
        values = np.concatenate([values, correlation[passed]])
        group = components(count, same)
        left = np.delete(left, chosen, axis=0)
    return same, values, compared


def _spanning_forest(pairs: Pairs) -> Numbers:
    """Return positions of the pairs [p, 2], nearest first, of a minimum spanning forest; an edge may occur often."""
    if not len(pairs):
        return np.zeros(0, np.int64)
    nodes, ends = np.unique(pairs, return_inverse=True)
    ends = np.sort(ends.reshape(-1, 2), axis=1)
    _, nearest = np.unique(ends[:, 0] * len(nodes) + ends[:, 1], return_index=True)
    ranks = (nearest + 1.0, (ends[nearest, 0], ends[nearest, 1]))  # a weight of 0 would be no edge
    forest = minimum_spanning_tree(coo_array(ranks, shape=(len(nodes), len(nodes))).tocsr())
    return np.sort(forest.data.astype(np.int64)) - 1


def _candidates(prints: npt.NDArray[np.float16], *, within: float, seed: int) -> Iterator[list[Numbers]]:
    """Yield codes of pairs, some more than once, of fingerprints [n, LENGTH] of one view that share a bucket.

    Pairs whose lowest frequencies alone lie further than `within` apart are left out.
    """
    random = np.random.default_rng(seed)
    order = np.argsort(frequencies(), kind="stable")
    weight = (np.sqrt(frequencies()) / _SPREAD).astype(np.float32)
    used = np.flatnonzero(prints.any(1))
    lowest = prints[used[:, None], order[:_LOWEST]].astype(np.float32)
    for _ in range(0, _BANDS, _BANDS_HELD):
        bands = [
            (
                random.normal(size=(LENGTH, _PROJECTIONS)).astype(np.float32),
                random.random(_PROJECTIONS, np.float32),
                random.integers(1, 2**62, _PROJECTIONS),
            )
            for _ in range(_BANDS_HELD)
        ]
        keys = np.empty((_BANDS_HELD, len(used)), np.int64)
        places = np.empty((_BANDS_HELD, len(used)), np.float32)
        for start in range(0, len(used), _CHUNK):
            part = slice(start, start + _CHUNK)
            points = prints[used[part]].astype(np.float32) * weight
            for band, (directions, shifts, factors) in enumerate(bands):
                projected = points @ directions
                cells = np.floor(projected / _CELL + shifts).astype(np.int64)
                keys[band, part] = (cells * factors).sum(1)
                places[band, part] = projected[:, 0]
        found = (
            used[pairs]
            for band in range(_BANDS_HELD)
            for pairs in _pairs_in_buckets(keys[band], places[band], lowest, within=within)
        )
        yield [pairs[:, 0] * len(prints) + pairs[:, 1] for pairs in found]


def _pairs_in_buckets(
    keys: Numbers, place: npt.NDArray[np.float32], lowest: npt.NDArray[np.float32], *, within: float
) -> Iterator[Pairs]:
    """Pair equal keys [n], the smaller position first, [p, 2]: all of a small bucket, neighbours of a large one.

    Only pairs whose `lowest` numbers, [n, _LOWEST], lie at most `within` apart.
    """
    order = np.lexsort((place, keys))
    ranked, lowest = keys[order], lowest[order]
    for step in range(1, min(_WINDOW, len(keys) - 1) + 1):
        shared = np.flatnonzero(ranked[:-step] == ranked[step:])
        if not len(shared):
            break
        for start in range(0, len(shared), _CHUNK):
            first = shared[start : start + _CHUNK]
            apart = np.square(lowest[first] - lowest[first + step]).sum(1)
            first = first[apart <= within**2 * _ROUNDING]
            yield np.sort(np.stack([order[first], order[first + step]], 1), axis=1)
