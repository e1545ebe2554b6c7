"""Which objects are done: a set of their keys that grows on disk, not in memory, and answers a thousand at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.bytes_]

_WIDTH = 16  # bytes: among 10^9 keys two are equal by chance once in 10^20 archives
_IN_MEMORY = 1 << 20  # keys


def keys_of(pairs: Sequence[tuple[str, str]]) -> Keys:
    """Digests [n] of (uri, etag)."""
    digests = [
        hashlib.blake2b(f"{uri}\0{etag}".encode("utf-8", "backslashreplace"), digest_size=_WIDTH).digest()
        for uri, etag in pairs
    ]
    return np.array(digests, f"S{_WIDTH}")


class KeySet:
    """Keys in sorted runs: the latest in memory, older ones as memory-mapped files of `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: list[npt.NDArray[Any]] = []
        self._latest: Keys = np.empty(0, f"S{_WIDTH}")

    def add(self, keys: Keys) -> None:
        """Add keys; some may be in it."""
        self._latest = np.sort(np.concatenate([self._latest, keys]), kind="stable")
        if len(self._latest) >= _IN_MEMORY:
            path = self._folder / f"{len(self._files):06d}.npy"
            np.save(path, self._latest)
            self._files.append(np.load(path, mmap_mode="r"))
            self._latest = self._latest[:0]

    def contains(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Whether each of `keys` [n] is in the set."""
        found = np.zeros(len(keys), bool)
        for held in [*self._files, self._latest]:
            if len(held):
                places = np.minimum(np.searchsorted(held, keys), len(held) - 1)
                found |= held[places] == keys
        return found
