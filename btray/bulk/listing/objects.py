"""Listed objects as columns, which a task filters, hashes and joins without making a Python object of each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from btray.storage import FileInfo

SCHEMA = pa.schema({"uri": pa.string(), "etag": pa.string(), "size": pa.int64(), "place": pa.string()})
"""The columns of listed objects: the fields of `FileInfo` that all who come after the listing need."""

_FIRST, _MOST = 1024, 1 << 18  # objects
_SECONDS = 2.0


Counts = tuple[int, int, int, int]
"""Of objects: how many are chosen, and how many `Listed` says were seen, counted and inside."""
NOTHING: Counts = (0, 0, 0, 0)


def added(some: Counts, more: Counts) -> Counts:
    """Return the sums of counts."""
    return some[0] + more[0], some[1] + more[1], some[2] + more[2], some[3] + more[3]


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
    unchanged: int = 0
    """How many more objects are chosen, all of which are completed."""
    source: str = ""
    """The file of an inventory that names them."""

    @classmethod
    def completed(cls, counts: Counts, source: str) -> Listed:
        """Return what stands for a file that names completed objects alone."""
        unchanged, seen, counted, inside = counts
        return cls(table_of([]), seen, counted, inside, unchanged, source)

    @property
    def counts(self) -> Counts:
        """What was counted."""
        return len(self.objects) + self.unchanged, self.seen, self.counted, self.inside

    def __call__(self) -> Listed:
        """Return itself: a chunk that needs no more work."""
        return self


Chunk = Callable[[], Listed]
"""Some objects of an archive, to be listed by whoever calls it, here or in a task."""


def chunks_of(objects: Iterable[FileInfo]) -> Iterator[Listed]:
    """Yield objects as they are listed, more and more at a time, but never later than some seconds after their listing.

    So the first rows do not wait, however slow the listing is, and the many cost less each. While a listing that has
    begun gives nothing, chunks without objects say that time passes.
    """
    pager, most = _Pager(objects), _FIRST
    try:
        while (held := pager.take(most)) is not None:
            yield Listed(table_of(held))
            most = min(2 * most, _MOST)
    finally:
        pager.cancel()


class _Pager(threading.Thread):
    """Takes objects from a listing while somebody waits for them, so that one that hangs holds back none of the others.

    It is a daemon, so that the job may end meanwhile.
    """

    def __init__(self, objects: Iterable[FileInfo]) -> None:
        super().__init__(name="pager", daemon=True)
        self._objects = iter(objects)
        self._changed = threading.Condition()
        self._held: list[FileInfo] = []
        self._wanted = 0
        self._context = Context()
        self._ended = self._cancelled = False
        self._error: BaseException | None = None

    def take(self, most: int) -> list[FileInfo] | None:
        """Return up to `most` objects as soon as they are listed, after some seconds fewer; None: there are no more.

        The first object is waited for, however long it takes, since it shows that the archive is there. Raises what
        the listing raises.
        """
        with self._changed:
            if not self.is_alive() and not self._ended:
                self.start()
                self._want(most)
                self._changed.wait_for(lambda: self._held or self._ended)
            self._want(most)
            self._changed.wait_for(lambda: len(self._held) >= most or self._ended, _SECONDS)
            self._wanted = 0
            if self._error is not None:
                raise self._error
            taken, self._held = self._held, []
            return None if self._ended and not taken else taken

    def cancel(self) -> None:
        """Take no more, once the listing gives another object or ends."""
        with self._changed:
            self._cancelled = True
            self._changed.notify_all()

    def _want(self, most: int) -> None:
        # whoever waits says how long a store is waited for
        self._wanted, self._context = most, copy_context()
        self._changed.notify_all()

    def run(self) -> None:
        """Take objects until the listing ends; called by the thread."""
        try:
            while not self._ended:
                with self._changed:
                    self._changed.wait_for(lambda: self._wanted > len(self._held) or self._cancelled)
                    if self._cancelled:
                        break
                    context = self._context
                self._ended = context.run(self._list)
        except BaseException as error:  # raised again by `take`
            self._error = error
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _list(self) -> bool:
        """Take as many as are wanted; return whether there are no more."""
        for info in self._objects:
            with self._changed:
                self._held.append(info)
                enough = len(self._held) >= self._wanted or self._cancelled
                if enough or len(self._held) == 1:
                    self._changed.notify_all()
                if enough:
                    return False
        return True


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
