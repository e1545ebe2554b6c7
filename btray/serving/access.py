"""Who may ask: API keys, made here, kept as digests and revocable while the service runs; without keys this machine.

A file has one line per key: its name and the SHA-256 of the key. A key is 256 random bits, which nobody guesses or
looks up in a table, so one round of SHA-256 without salt is as safe as a slow hash and costs far less per request.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
import time
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Self

from starlette.datastructures import Headers
from starlette.types import Scope

from btray import storage
from btray.core.errors import UserError
from btray.serving.config import is_loopback
from btray.serving.problems import Problem
from btray.storage import StorageError

_log = logging.getLogger(__name__)

_PREFIX = "btray_"  # lets secret scanners find a key that was committed somewhere
_HEADER = "# API keys of btray: name and SHA-256 of each. Delete a line to revoke its key.\n"
REREAD = 5.0
"""Seconds until a revoked or a new key counts."""
_PATIENCE = 1.0  # seconds that a request waits for the file


def make_key(file: str, name: str) -> str:
    """Add a key to `file` and return it; nothing keeps it. Raises UserError or StorageError if it cannot be used."""
    uri = storage.resolve(file)
    entries = _read_file(uri, missing_ok=True)
    if any(name == known for known, _ in entries):
        raise UserError(f"{file} has a key named {name} already; revoke it, or take another --name")
    key = _PREFIX + secrets.token_urlsafe(32)
    _write_file(uri, [*entries, (name, _digest(key))])
    return key


def revoke_key(file: str, name: str) -> None:
    """Take the keys named `name` out of `file`. Raises UserError if there is none."""
    uri = storage.resolve(file)
    entries = _read_file(uri)
    kept = [entry for entry in entries if entry[0] != name]
    if len(kept) == len(entries):
        known = ", ".join(sorted({known for known, _ in entries})) or "none"
        raise UserError(f"{file} has no key named {name}; it has {known}")
    _write_file(uri, kept)


@dataclass
class KeyRing:
    """The keys of a file, read again every `REREAD` seconds."""

    uri: str
    _digests: list[bytes]
    _read_at: float
    _reading: asyncio.Future[None] | None = None
    reader: Executor = field(default_factory=lambda: ThreadPoolExecutor(1, "keys"))
    """One thread, for `refresh` alone: it waits for no other work there, and runs once at a time."""

    @classmethod
    def of(cls, file: str) -> Self:
        """Read the keys of `file`. Raises UserError if it cannot be used."""
        uri = storage.resolve(file)
        return cls(uri, _digests_in(uri), time.monotonic())

    @property
    def stale(self) -> bool:
        """Return whether `refresh` would read the file."""
        return time.monotonic() - self._read_at > REREAD

    def refresh(self) -> None:
        """Read the file again if it is time. A file that is gone or damaged holds no key: everyone is refused."""
        if not self.stale:  # several requests may have asked for it
            return
        try:
            self._digests = _digests_in(self.uri)
        except UserError as error:
            # A store that is down for a minute must not lock everyone out.
            if not (isinstance(error, StorageError) and error.retryable):
                self._digests = []
            _log.warning("API keys: %s; %s", error, "the old ones hold" if self._digests else "no key is accepted")
        finally:  # not before: a store that is down may take longer than REREAD to say so
            self._read_at = time.monotonic()

    async def refreshed(self) -> None:
        """Wait until the file has been read again, or a second: then the old keys hold until it has."""
        if self._reading is None or self._reading.done():
            self._reading = asyncio.get_running_loop().run_in_executor(self.reader, self.refresh)
        await asyncio.wait({self._reading}, timeout=_PATIENCE)

    def accepts(self, key: str) -> bool:
        """Return whether `key` is one of them, in the same time for a wrong key as for a right one."""
        digest = bytes.fromhex(_digest(key))
        return sum(hmac.compare_digest(known, digest) for known in self._digests) > 0  # a sum: all are compared


@dataclass(frozen=True)
class Access:
    """Who may ask: whoever has a key; if there are no keys, this machine alone, unless all may."""

    keys: KeyRing | None
    insecure: bool
    """Answer every machine without a key."""
    sees_callers: bool = True
    """A request's client is the caller, not a proxy that others reach."""

    async def check(self, scope: Scope) -> None:
        """Raise Problem unless the caller may ask."""
        headers = Headers(scope=scope)
        if self.keys is not None:
            if self.keys.stale:
                await self.keys.refreshed()
            scheme, _, bearer = headers.get("authorization", "").partition(" ")
            key = bearer if scheme.lower() == "bearer" else headers.get("x-api-key", "")
            if not self.keys.accepts(key.strip()):
                raise Problem(401, "unauthorized", "no key, or an unknown one: send Authorization: Bearer KEY")
        elif not self.insecure:
            if not self.sees_callers:
                detail = "this service has no API keys, and the HAProxy before it hides who asks: set keys"
                raise Problem(403, "forbidden", detail)
            # The name that the request was sent to counts too: a page of another site could have its own name point to
            # 127.0.0.1 (DNS rebinding) and have a browser of this machine ask.
            client, host = scope.get("client"), headers.get("host", "")
            name = host.rpartition(":")[0] if ":" in host and not host.endswith("]") else host
            if client is None or not is_loopback(client[0]) or not is_loopback(name):
                raise Problem(403, "forbidden", "this service has no API keys and answers requests to localhost alone")


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def _digests_in(uri: str) -> list[bytes]:
    return [bytes.fromhex(digest) for _, digest in _read_file(uri)]


def _read_file(uri: str, *, missing_ok: bool = False) -> list[tuple[str, str]]:
    """Return (name, SHA-256) of each key."""
    if missing_ok and not storage.exists(uri):
        return []
    text = storage.read_text(uri)
    entries = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split("#")[0].split()
        if words and (len(words) != 2 or not re.fullmatch("[0-9a-f]{64}", words[1])):
            raise UserError(f"{uri}, line {number}: expected a name and a SHA-256; btray key writes such lines")
        if words:
            entries.append((words[0], words[1]))
    return entries


def _write_file(uri: str, entries: list[tuple[str, str]]) -> None:
    storage.write_text(uri, _HEADER + "".join(f"{name} {digest}\n" for name, digest in entries))
