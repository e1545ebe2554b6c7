"""Listed objects as columns, which a task filters, hashes and joins without making a Python object of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from btray.storage import FileInfo

SCHEMA = pa.schema({"uri": pa.string(), "etag": pa.string(), "size": pa.int64(), "place": pa.string()})
"""The columns of listed objects: the fields of `FileInfo` that all who come after the listing need."""

_FIRST, _MOST = 1024, 1 << 18  # objects
_SECONDS = 2.0


@dataclass(frozen=True)
class Listed:
    """Objects that are listed."""

    objects: pa.Table
    """Those that are chosen, with the columns of SCHEMA."""
    seen: int = 0
    """How many their source names, old versions and the like included; 0: the source counts itself."""
    counted: int = 0
    """How many of these count."""
    inside: int = 0
    """How many of these lie in the output."""

    def __call__(self) -> Listed:
        """Return itself: a chunk that needs no more work."""
        return self


Chunk = Callable[[], Listed]
"""Some objects of an archive, to be listed by whoever calls it, here or in a task."""


def chunks_of(objects: Iterable[FileInfo]) -> Iterator[Listed]:
    """Yield objects as they are listed, more and more at a time, but never later than some seconds after their listing.

    So the first rows do not wait, however slow the listing is, and the many cost less each.
    """
    most, held, begun = _FIRST, list[FileInfo](), 0.0
    for info in objects:
        begun = begun if held else time.monotonic()
        held.append(info)
        if len(held) >= most or time.monotonic() - begun > _SECONDS:
            yield Listed(table_of(held))
            most, held = min(2 * most, _MOST), []
    if held:
        yield Listed(table_of(held))


def table_of(objects: Sequence[FileInfo]) -> pa.Table:
    """Return objects as columns.

    They are made of buffers: `pa.array` would import pandas, which a night with nothing new does without.
    """
    sizes = np.fromiter((info.size for info in objects), np.int64, len(objects))
    columns = {name: _texts([getattr(info, name) for info in objects]) for name in ("uri", "etag", "place")}
    columns["size"] = pa.Array.from_buffers(pa.int64(), len(objects), [None, pa.py_buffer(sizes)])
    return pa.Table.from_arrays([columns[name] for name in SCHEMA.names], schema=SCHEMA)


def _texts(values: Sequence[str]) -> pa.Array:
    encoded = [value.encode("utf-8", "backslashreplace") for value in values]
    ends = np.zeros(len(encoded) + 1, np.int32)
    np.cumsum([len(text) for text in encoded], out=ends[1:])
    return pa.StringArray.from_buffers(len(encoded), pa.py_buffer(ends), pa.py_buffer(b"".join(encoded)))


def objects_of(table: pa.Table) -> list[FileInfo]:
    """Return the objects of a table with the columns of SCHEMA; no time of any is known."""
    columns = (table[name].to_pylist() for name in SCHEMA.names)
    return [FileInfo(uri, size, etag, 0.0, place or "") for uri, etag, size, place in zip(*columns, strict=True)]
