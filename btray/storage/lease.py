"""One run at a time on an output: a lock file on a local one, a lease kept alive by conditional puts on S3.

The kernel frees the lock file of a process that ends, however it ends. The lease in object storage is one object that
its holder rewrites every few seconds. A run that finds it unchanged for EXPIRY seconds, by the store's clock or by
watching, takes it over with a put on condition that it is still the same, so that one of several wins.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from btray import storage
from btray.core.errors import UserError
from btray.storage import StorageError, s3
from btray.storage.errors import storage_errors_for

_log = logging.getLogger(__name__)

NAME = "_lease.json"
HEARTBEAT = 4.0
"""Seconds between two signs of life."""
EXPIRY = 20.0
"""Seconds without one after which the holder counts as dead."""


def hold(output: str) -> AbstractContextManager[Callable[[], None]]:
    """Hold the lease of `output` for the block; gives a check that raises UserError once another run has taken it.

    Waits up to EXPIRY for the lease of a holder that was killed.

    Raises:
        UserError: a run that is alive holds it.
        StorageError: the store fails.
    """
    uri = storage.join(output, NAME)
    return _hold_in_store(uri) if storage.is_remote(output) else _hold_locally(uri)


@dataclass(frozen=True)
class Holder:
    """The process that holds a lease, by what it wrote there."""

    host: str = "?"
    pid: int | str = "?"
    since: str = "?"
    token: str = ""
    """Unlike host and process id it is never used again."""
    beat: int = 0
    """Grows with each sign of life, so that the object's entity tag changes."""
    released: bool = False
    """Whether the lease was given back."""

    @classmethod
    def this_process(cls) -> Holder:
        """Describe this process."""
        return cls(socket.gethostname(), os.getpid(), datetime.now(UTC).isoformat(timespec="seconds"), uuid.uuid4().hex)

    @classmethod
    def parse(cls, text: str | bytes) -> Holder:
        """Read what a holder wrote."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError):
            return cls()  # a local holder has the lock already and is just writing

    def to_json(self) -> str:
        """Return the content of the lease."""
        return json.dumps(asdict(self))

    def refusal(self, uri: str) -> UserError:
        """Return the error for another run that wants the lease at `uri`."""
        return UserError(
            f"{uri.removesuffix('/' + NAME)} is being written by another run (process {self.pid} on {self.host} since "
            f"{self.since}); wait for its end, or stop it"
        )


@contextmanager
def _hold_locally(path: str) -> Iterator[Callable[[], None]]:
    with storage_errors_for(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - it is closed below, which frees the lock
    with file:
        with storage_errors_for(path):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise Holder.parse(file.read()).refusal(path) from None
            file.truncate(0)
            file.write(Holder.this_process().to_json())
            file.flush()
        yield lambda: None


@contextmanager
def _hold_in_store(uri: str) -> Iterator[Callable[[], None]]:
    lease = _Lease(uri)
    lease.take()
    beating = threading.Thread(target=lease.keep, name="lease", daemon=True)
    beating.start()
    try:
        yield lease.check
    finally:
        lease.ended.set()
        beating.join()
        lease.release()


class _Lease:
    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.holder = Holder.this_process()
        self.etag = ""
        self.lost = False
        self.renewed = time.monotonic()
        self._renewing = threading.Lock()  # two renewals at once would each spoil the other's condition
        self.ended = threading.Event()

    def take(self) -> None:
        """Write the lease if there is none, if it was given back, or if its holder is dead."""
        first_seen, since = "", time.monotonic()
        while True:
            lease = self._look()
            if lease is None:
                if self._write(None):
                    return
                continue
            holder, etag, age = lease
            if etag != first_seen:
                if first_seen and not holder.released:
                    raise holder.refusal(self.uri)  # it was written while this run watched
                first_seen, since = etag, time.monotonic()
                if not holder.released and age <= EXPIRY:
                    _log.info("waiting up to %.0f s for the lease of another run", EXPIRY - age)
            # watched as well, since the clock of a store, or of a proxy before it, may stand still
            free = holder.released or age > EXPIRY or time.monotonic() - since > EXPIRY
            if free and self._write(etag):
                return
            time.sleep(HEARTBEAT / 8)

    def keep(self) -> None:
        """Show signs of life until the block ends or another run has taken over."""
        while not self.ended.wait(HEARTBEAT) and not self.lost:
            try:
                self._renew()
            except StorageError as error:  # a store that is down: nobody else can take the lease there either
                _log.warning("the lease could not be renewed: %s", error)

    def check(self) -> None:
        """Raise UserError if the lease is lost; a process that was suspended for so long does not know it yet."""
        if not self.lost and time.monotonic() - self.renewed > EXPIRY:
            self._renew()
        if self.lost:
            raise UserError(
                f"another run has taken over {self.uri.removesuffix('/' + NAME)}, since this one gave no sign of life "
                f"for {EXPIRY:.0f} s; let that one continue"
            )

    def _renew(self) -> None:
        with self._renewing:
            self.lost = self.lost or not self._write(self.etag)

    def release(self) -> None:
        """Give the lease back, so that the next run need not wait."""
        try:
            if not self.lost:
                self._write(self.etag, released=True)
        except StorageError as error:
            _log.warning("the lease could not be given back and will run out by itself: %s", error)

    def _write(self, etag: str | None, *, released: bool = False) -> bool:
        """Return whether the lease is now ours: it was written, or was by a request whose response got lost."""
        self.holder = replace(self.holder, beat=self.holder.beat + 1, released=released)
        written = s3.put_if(self.uri, self.holder.to_json().encode(), etag)
        if written is None:
            lease = self._look()
            if lease is None or lease[0].token != self.holder.token:
                return False
            written = lease[1]
        self.etag = written
        self.renewed = time.monotonic()
        return True

    def _look(self) -> tuple[Holder, str, float] | None:
        """Return holder, entity tag and age in seconds, by the store's own clock; None if there is no lease."""
        with storage.suppress_missing():
            data, etag, headers = s3.read_tagged(self.uri)
            now, then = (parsedate_to_datetime(headers[name]) for name in ("date", "last-modified"))
            return Holder.parse(data), etag, (now - then).total_seconds()
        return None
