"""The objects that were erased from an output: keyed hashes of their URIs, so that no later run takes them again.

The hashes lie in OUTPUT/_erased. Their key lies beside them: it keeps equal objects of two outputs from being told as
equal, but whoever may read the output can test whether a URI that he knows was erased.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from btray import storage
from btray.storage import FileInfo

FOLDER = "_erased"
_KEY = "key.json"
_HASHES, _REPORT = ".hashes", ".json"


class ErasedObjects:
    """The erased objects of one output, as they are when it is made."""

    def __init__(self, output: str) -> None:
        """Read the hashes; none if nothing was ever erased."""
        self._folder = storage.join(output, FOLDER)
        self._hashes: set[str] = set()
        self._key = b""
        self.left_out = 0
        """Objects that `without` has left out so far."""
        names = storage.list_names(self._folder, missing_ok=True)
        self.names = [name.removesuffix(_HASHES) for name in names if name.endswith(_HASHES)]
        """Names of erasures."""
        self.interrupted = [name for name in self.names if name + _REPORT not in names]
        """Names of those that have no report yet."""
        for name in names:
            if name.endswith(_HASHES):
                self._hashes.update(storage.read_text(storage.join(self._folder, name)).split())
            elif name == _KEY:
                self._read_key()

    def hold(self, uris: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Return which of `uris` [n] were erased."""
        if not self._hashes:
            return np.zeros(len(uris), bool)
        return np.array([self._hash(uri) in self._hashes for uri in uris], bool)

    def without(self, objects: Iterator[FileInfo]) -> Iterator[FileInfo]:
        """Yield the objects that were not erased, and count the others."""
        if not self._hashes:
            yield from objects
            return
        for info in objects:
            if self._hash(info.uri) in self._hashes:
                self.left_out += 1
            else:
                yield info

    def add(self, uris: Collection[str], *, name: str, keep: bool) -> None:
        """Add objects; with `keep` as the file `name`, which needs the lease of the output."""
        if not self._key:
            self._key = secrets.token_bytes(32)
            if keep:
                storage.write_json(storage.join(self._folder, _KEY), {"key": self._key.hex()})
        hashes = sorted(map(self._hash, uris))
        self._hashes.update(hashes)
        if keep:
            storage.write_text(storage.join(self._folder, name + _HASHES), "\n".join(hashes))

    def conclude(self, name: str, report: dict[str, Any]) -> str:
        """Write the report of the erasure `name`, and of those that were interrupted before; return its URI."""
        for done in (*self.interrupted, name):
            uri = storage.join(self._folder, done + _REPORT)
            storage.write_json(uri, report)
        return uri

    def _read_key(self) -> None:
        self._key = bytes.fromhex(storage.read_json(storage.join(self._folder, _KEY))["key"])

    def _hash(self, uri: str) -> str:
        # escapes as in CSV files, so that a name that is not UTF-8 has the hash of what stands there
        return hashlib.blake2b(uri.encode("utf-8", "backslashreplace"), digest_size=16, key=self._key).hexdigest()
