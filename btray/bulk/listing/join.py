"""The anti-join of listed objects with those that are completed: partition by partition of their keys.

Objects are split by the first byte of their keys, so that each partition is joined with its piece of each key file, and
no memory grows with the archive or with the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from btray.bulk.clinical.pseudonyms import Pseudonyms
from btray.bulk.listing.key_files import (
    FIRST_BYTES,
    RECORD,
    Halves,
    KeySource,
    Records,
    halves,
    latest,
    unselected,
)
from btray.bulk.listing.objects import Chunk, objects_of, table_of
from btray.data.key_set import Keys, keys_of_columns
from btray.storage.read_many import in_threads

Mask = npt.NDArray[np.bool_]
_HELD = 1 << 21  # records of sources
_KEY = "key"
_WIDTH = 16


def split(chunk: Chunk, pseudonyms: Pseudonyms | None, partitions: int, *, keyed: bool) -> list[Any]:
    """List the objects of a chunk; return what it counts, and then its objects with their keys in `partitions` tables.

    What it counts is `Listed.source`, `unchanged` and `counts`. Without `keyed` the objects stay in one table, which
    has no keys.
    """
    with pseudonyms.listing_errors() if pseudonyms else nullcontext():
        listed = chunk()
    objects = listed.objects
    if pseudonyms:
        objects = table_of([pseudonyms.conceal(info) for info in objects_of(objects)])
    counts = (listed.source, listed.unchanged, listed.counts)
    if not keyed:
        return [counts, objects]
    keys = keys_of_columns(objects["uri"], objects["etag"])
    column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(_WIDTH), len(keys), [None, pa.py_buffer(keys)])
    objects = objects.append_column(_KEY, column)
    if partitions == 1:
        return [counts, objects]
    places = keys.view(np.uint8).reshape(-1, _WIDTH)[:, 0].astype(int) * partitions // FIRST_BYTES
    ordered = objects.take(np.argsort(places, kind="stable"))
    ends = np.cumsum(np.bincount(places, minlength=partitions)).tolist()
    return [counts, *(ordered.slice(start, end - start) for start, end in zip([0, *ends[:-1]], ends, strict=True))]


def join(
    partition: int, partitions: int, sources: Sequence[KeySource], worst: int, reason: str, *pieces: pa.Table
) -> pa.Table:
    """Return the objects of one partition that are not completed: whose latest outcome is not `worst` or better.

    What was left out for this `reason` is completed, too.
    """
    objects = pa.concat_tables(pieces)
    if not len(objects):
        return objects.drop_columns(_KEY)
    keys = _keys_in(objects)
    # a first byte b is of the partition b * partitions // 256
    first, end = (-(-number * FIRST_BYTES // partitions) for number in (partition, partition + 1))
    wanted = np.concatenate([keys, unselected(keys, reason)]) if reason else keys
    known = _completed(wanted, sources, first, end, worst)
    if reason:
        known = known[: len(keys)] | known[len(keys) :]
    return objects.filter(_mask(~known)).drop_columns(_KEY)


def _mask(chosen: Mask) -> pa.BooleanArray:
    """Return a mask for Arrow; `pa.array` would import pandas, which a night with nothing new does without."""
    bits = pa.py_buffer(np.packbits(chosen, bitorder="little"))
    return pa.BooleanArray.from_buffers(pa.bool_(), len(chosen), [None, bits])


def _keys_in(objects: pa.Table) -> Keys:
    column = objects[_KEY].combine_chunks()
    return np.frombuffer(column.buffers()[1], f"S{_WIDTH}", len(column), column.offset * _WIDTH)


def _completed(keys: Keys, sources: Sequence[KeySource], first: int, end: int, worst: int) -> Mask:
    """Return which of `keys` [n] have `worst` or better as their latest outcome, by the records of a range of keys."""
    high, low = halves(keys)
    order = np.lexsort((low, high))
    ordered = high[order], low[order]
    once = np.append(True, (np.diff(ordered[0]) != 0) | (np.diff(ordered[1]) != 0))[: len(keys)]
    wanted = ordered[0][once], ordered[1][once]
    found = [np.empty(0, RECORD)]
    for records in _read(sources, first, end):
        theirs = halves(records["key"])
        if len(records) < len(wanted[0]):  # the fewer are looked up among the more
            found.append(records[_places(theirs, wanted) >= 0])
        else:
            places = _places(wanted, theirs)
            found.append(records[places[places >= 0]])
    outcomes = latest(np.concatenate(found))
    done = np.empty(len(keys), bool)
    done[order] = _places(ordered, halves(outcomes["key"][outcomes["outcome"] <= worst])) >= 0
    return done


def _read(sources: Sequence[KeySource], first: int, end: int) -> Iterator[Records]:
    """Yield the records of each source in a range of keys; memory holds those of several at a time."""
    lot, held = list[KeySource](), 0
    for source in sources:
        lot.append(source)
        held += source.count(first, end)
        if held >= _HELD or source is sources[-1]:
            yield from (records for _, records in in_threads(lambda source: source.read(first, end), lot))
            lot, held = [], 0


def _places(keys: Halves, among: Halves) -> npt.NDArray[np.int64]:
    """Return where each of `keys` stands in `among`, or -1; both are sorted, and `among` has each key once."""
    places = np.full(len(keys[0]), -1)
    if not len(among[0]):
        return places
    begins = np.searchsorted(among[0], keys[0])
    # Keys that begin alike stand side by side. By chance there are none, but the answer must not rest on it.
    step = 0
    while step == 0 or (among[0][step:] == among[0][:-step]).any():
        at = np.minimum(begins + step, len(among[0]) - 1)
        same = (among[0][at] == keys[0]) & (among[1][at] == keys[1])
        places[same] = at[same]
        step += 1
    return places
