"""Key files: what became of the objects of a table, 25 bytes each, in few files that are read by ranges of keys.

A key file is a table of 257 numbers, where each first byte of the keys begins, and then the records, sorted by key. So
whoever joins one partition of the keys reads that piece of each file, with one request.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from btray import storage
from btray.data.key_set import Keys
from btray.storage import FileInfo
from btray.storage.ranges import read_range

CLASSIFIED, REJECTED, WITHHELD = range(3)
"""Outcomes, the better first: an answer, a final rejection, and a rejection that is due to the store, not the bytes."""

RECORD = np.dtype([("key", "S16"), ("at", "<i8"), ("outcome", "u1")])
"""What became of an object: key by `btray.data.key_set`, microseconds since 1970, and one of the outcomes."""
Records = npt.NDArray[np.void]

Halves = tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]
"""Keys [n] as the numbers that their first and their last eight bytes are: these sort as the bytes do, but quicker."""

FIRST_BYTES = 256
_BEGINS = np.dtype("<u4")
_HEADER = (FIRST_BYTES + 1) * _BEGINS.itemsize
FILE_RECORDS = 1 << 20


class KeySource(Protocol):
    """Records, sorted by key, of which pieces are read."""

    def read(self, first: int, end: int) -> Records:
        """Return the records whose keys begin with a byte from `first` to before `end`."""

    def count(self, first: int, end: int) -> int:
        """Return how many these are, without reading them."""


class HeldKeys:
    """Records in memory."""

    def __init__(self, records: Records) -> None:
        """Sort the records."""
        self._records = latest(records)
        self.begins = _begins_of(self._records)

    def read(self, first: int, end: int) -> Records:
        """Return some of the records; see `KeySource.read`."""
        return self._records[self.begins[first] : self.begins[end]]

    def count(self, first: int, end: int) -> int:
        """Return how many records there are; see `KeySource.count`."""
        return int(self.begins[end] - self.begins[first])


@dataclass(frozen=True)
class KeyFile:
    """A key file and the table at its beginning."""

    uri: str
    begins: npt.NDArray[np.uint32]

    @classmethod
    def open(cls, info: FileInfo) -> KeyFile:
        """Read the table. Raises ValueError if the file does not hold what it says, StorageError if it is not there."""
        begins = np.frombuffer(read_range(info.uri, 0, _HEADER), _BEGINS)
        if len(begins) <= FIRST_BYTES or info.size != _HEADER + int(begins[-1]) * RECORD.itemsize:
            raise ValueError(f"{info.uri} is not a whole key file")
        return cls(info.uri, begins)

    def read(self, first: int, end: int) -> Records:
        """Return some of the records, with one request; see `KeySource.read`."""
        start, stop = (_HEADER + int(self.begins[byte]) * RECORD.itemsize for byte in (first, end))
        return np.frombuffer(read_range(self.uri, start, stop), RECORD) if stop > start else np.empty(0, RECORD)

    def count(self, first: int, end: int) -> int:
        """Return how many records there are; see `KeySource.count`."""
        return int(self.begins[end]) - int(self.begins[first])


class KeyFileWriter:
    """Writes records into key files of a folder as they come; memory holds those of one file."""

    def __init__(self, folder: str) -> None:
        """Write nothing yet; files that are there already are replaced."""
        self._folder = folder
        self._held: list[Records] = []
        self._count = 0
        self.files = 0
        """Key files that were written."""

    def add(self, records: Records) -> None:
        """Add records, in any order."""
        self._held.append(records)
        self._count += len(records)
        if self._count >= FILE_RECORDS:
            self.flush()

    def flush(self) -> None:
        """Write what is held."""
        if self._count:
            write_key_file(key_file_uri(self._folder, self.files), latest(np.concatenate(self._held)))
            self.files += 1
            self._held, self._count = [], 0


def key_file_uri(folder: str, number: int) -> str:
    """Return the URI of a key file of `folder`."""
    return storage.join(folder, f"{number:05d}.keys")


def write_key_file(uri: str, records: Records) -> None:
    """Write one key file; `records` are sorted by key."""
    body = io.BytesIO()
    body.write(_begins_of(records).astype(_BEGINS).tobytes())
    body.write(records.tobytes())
    storage.write_bytes(uri, body.getvalue())


def _begins_of(records: Records) -> npt.NDArray[np.int64]:
    """Return the numbers [257] of the first record of each first byte, and of all records."""
    firsts: npt.NDArray[Any] = np.ascontiguousarray(records).view(np.uint8).reshape(-1, RECORD.itemsize)[:, 0]
    return np.searchsorted(firsts, np.arange(FIRST_BYTES + 1))


def concatenated(parts: Iterator[Records]) -> Iterator[Records]:
    """Yield the same records, as many at a time as one key file holds."""
    held: list[Records] = []
    for records in parts:
        held.append(records)
        if sum(map(len, held)) >= FILE_RECORDS:
            yield np.concatenate(held)
            held = []
    if held:
        yield np.concatenate(held)


def latest(records: Records) -> Records:
    """Return the latest record of each key, sorted by key. Of two at the same moment the worse one counts."""
    high, low = halves(records["key"])
    order = np.lexsort((records["outcome"], records["at"], low, high))
    high, low = high[order], low[order]
    last = np.append((high[1:] != high[:-1]) | (low[1:] != low[:-1]), True)[: len(order)]
    kept: Records = records[order[last]]
    return kept


def halves(keys: Keys) -> Halves:
    """Return the first and the last eight bytes of keys [n]."""
    numbers = np.ascontiguousarray(keys).view(">u8").reshape(-1, 2)
    return numbers[:, 0].astype(np.uint64), numbers[:, 1].astype(np.uint64)


def unselected(keys: Keys, reason: str) -> Keys:
    """Return the keys by which objects are completed that were left out: for the same reason alone.

    They begin as the objects' own keys do, and so are of the same partition.
    """
    mask = bytes(8) + hashlib.blake2b(reason.encode(), digest_size=8).digest()
    changed = np.ascontiguousarray(keys).view(np.uint8).reshape(-1, len(mask)) ^ np.frombuffer(mask, np.uint8)
    return changed.view(f"S{len(mask)}").ravel()
