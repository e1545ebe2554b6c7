"""API keys: made here, kept as digests, revocable while the service runs.

A file has a line for each key: its name and the SHA-256 of the key. A key is 256 random bits, which nobody guesses or
looks up in a table, so one round of SHA-256 without salt is as safe as a slow hash, and does not cost one a request.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import threading
import time
from dataclasses import dataclass, field
from typing import Self

from btray import storage
from btray.core.errors import UserError
from btray.storage import StorageError, user_error

_log = logging.getLogger(__name__)

_PREFIX = "btray_"  # lets secret scanners find a key that was committed somewhere
_HEADER = "# API keys of btray: name and SHA-256 of each. Delete a line to revoke its key.\n"
REREAD = 5.0
"""Seconds after which a revoked or a new key counts."""


def make_key(file: str, name: str) -> str:
    """Add a key to `file` and return it; nothing keeps it. Raises UserError where the file cannot be used."""
    uri = storage.resolve(file)
    entries = _read_file(uri, missing_ok=True)
    if any(name == known for known, _ in entries):
        raise UserError(f"{file} has a key named {name} already; revoke it, or take another --name")
    key = _PREFIX + secrets.token_urlsafe(32)
    _write_file(uri, [*entries, (name, _digest(key))])
    return key


def revoke_key(file: str, name: str) -> None:
    """Take the keys named `name` out of `file`. Raises UserError where there is none."""
    uri = storage.resolve(file)
    entries = _read_file(uri)
    kept = [entry for entry in entries if entry[0] != name]
    if len(kept) == len(entries):
        known = ", ".join(sorted({known for known, _ in entries})) or "none"
        raise UserError(f"{file} has no key named {name}; it has {known}")
    _write_file(uri, kept)


@dataclass
class KeyRing:
    """The keys of a file, read again every `REREAD` seconds. Thread-safe."""

    uri: str
    _digests: list[bytes]
    _read_at: float
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, file: str) -> Self:
        """The keys of `file`. Raises UserError where it cannot be used."""
        uri = storage.resolve(file)
        return cls(uri, _digests_in(uri), time.monotonic())

    @property
    def stale(self) -> bool:
        """Whether `refresh` would read the file."""
        return time.monotonic() - self._read_at > REREAD

    def refresh(self) -> None:
        """Read the file again where it is time. A file that is gone or spoilt holds no key: everyone is refused."""
        with self._lock:
            if not self.stale:
                return
            self._read_at = time.monotonic()
            try:
                self._digests = _digests_in(self.uri)
            except UserError as error:
                away = isinstance(error.__cause__, StorageError) and error.__cause__.retryable
                if not away:
                    self._digests = []
                _log.warning("API keys: %s; %s", error, "the old ones hold" if away else "no key is accepted")

    def accepts(self, key: str) -> bool:
        """Whether `key` is one of them; takes as long for a wrong key as for a right one."""
        digest = bytes.fromhex(_digest(key))
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(known, digest)
        return found


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def _digests_in(uri: str) -> list[bytes]:
    return [bytes.fromhex(digest) for _, digest in _read_file(uri)]


def _read_file(uri: str, *, missing_ok: bool = False) -> list[tuple[str, str]]:
    """(name, SHA-256) of each key."""
    try:
        text = storage.read_text(uri)
    except StorageError as error:
        if error.code == "not_found" and missing_ok:
            return []
        raise user_error(error) from error
    entries = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or len(words[1]) != 64 or not set(words[1]) <= set("0123456789abcdef"):
            raise UserError(f"{uri}, line {number}: expected a name and a SHA-256; btray key writes such lines")
        entries.append((words[0], words[1]))
    return entries


def _write_file(uri: str, entries: list[tuple[str, str]]) -> None:
    try:
        storage.write_text(uri, _HEADER + "".join(f"{name} {digest}\n" for name, digest in entries))
    except StorageError as error:
        raise user_error(error) from error
