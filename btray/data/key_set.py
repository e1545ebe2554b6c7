"""A set of the keys of objects that grows on disk, not in memory, and is asked for many keys at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Keys = npt.NDArray[np.bytes_]

_WIDTH = 16  # bytes: among 10^9 keys two are equal by chance once in 10^20 archives
_IN_MEMORY = 1 << 20  # keys
_AT_A_TIME = 1 << 16  # pairs


def keys_of(pairs: Sequence[tuple[str, str]]) -> Keys:
    """Return the digests [n] of pairs (uri, etag)."""
    digests = [
        hashlib.blake2b(f"{uri}\0{etag}".encode("utf-8", "backslashreplace"), digest_size=_WIDTH).digest()
        for uri, etag in pairs
    ]
    return np.array(digests, f"S{_WIDTH}")


def keys_of_columns(uris: pa.ChunkedArray, etags: pa.ChunkedArray) -> Keys:
    """Return the digests [n] of a column of URIs and one of etags: those of `keys_of`, in less time and memory."""
    digests = []
    for start in range(0, len(uris), _AT_A_TIME):
        some = (column.slice(start, _AT_A_TIME).cast(pa.binary()).to_pylist() for column in (uris, etags))
        pairs = map(b"\0".join, zip(*some, strict=True))
        digests.append(b"".join([hashlib.blake2b(pair, digest_size=_WIDTH).digest() for pair in pairs]))
    return np.frombuffer(b"".join(digests), f"S{_WIDTH}")


class KeySet:
    """Keys in sorted runs, each at least twice as long as the next; long ones are memory-mapped files of `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._runs: list[Keys] = []
        self._written = 0

    def add(self, keys: Keys) -> None:
        """Add keys; some may be in it."""
        if len(keys):
            self._runs.append(np.sort(keys))
        # merged as in a log-structured tree: each key is merged, and so written, log(n) times
        while len(self._runs) > 1 and len(self._runs[-2]) < 2 * len(self._runs[-1]):
            shorter, longer = sorted((self._runs.pop(), self._runs.pop()), key=len)
            self._runs.append(self._merged(longer, shorter))

    def contains(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Return which of `keys` [n] are in the set. Many at a time cost less each: they are looked up in order."""
        order = np.argsort(keys)
        ascending = keys[order]
        contained = np.zeros(len(keys), bool)
        for held in self._runs:
            places = np.minimum(np.searchsorted(held, ascending), len(held) - 1)
            contained[order] |= held[places] == ascending
        return contained

    def _merged(self, longer: Keys, shorter: Keys) -> Keys:
        if len(longer) + len(shorter) < _IN_MEMORY:
            return np.sort(np.concatenate([longer, shorter]), kind="stable")  # stable: linear on two sorted runs
        path = self._folder / f"{self._written:06d}.keys"
        self._written += 1
        with path.open("wb") as file:
            begun = 0
            for start in range(0, len(longer), _IN_MEMORY):  # as many at a time as fit into memory
                block = longer[start : start + _IN_MEMORY]
                last = start + _IN_MEMORY >= len(longer)
                end = len(shorter) if last else int(np.searchsorted(shorter, block[-1]))
                np.sort(np.concatenate([block, shorter[begun:end]]), kind="stable").tofile(file)
                begun = end
        for merged in (longer, shorter):
            if isinstance(merged, np.memmap):
                Path(str(merged.filename)).unlink()
        return np.memmap(path, longer.dtype, mode="r")
