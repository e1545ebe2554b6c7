"""One run at a time on an output: a lock file on a local one, numbered objects in a store.

The kernel frees the lock file of a process that ends, however it ends. In object storage a run holds the lease by the
object with the highest number below `_lease/`. It makes that object by a put that fails if the object is there, so that
one of several runs wins, and rewrites it every few seconds; nobody else writes it. A run that has watched the highest
one for EXPIRY seconds without a change makes the next number. No clock but its own counts, and the only condition that
the store has to know is `If-None-Match: *`.

The highest object stays when the lease is given back, and older ones are removed by the next holder alone: so a run
that was suspended, and may even write its own object again, finds the newer number as soon as it looks.
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
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta

from btray import storage
from btray.core.errors import UserError
from btray.storage import StorageError
from btray.storage.errors import storage_errors_for

_log = logging.getLogger(__name__)

NAME = "_lease"
HEARTBEAT = 4.0
"""Seconds between two signs of life."""
EXPIRY = 20.0
"""Seconds without one after which the holder counts as dead."""


def hold(output: str) -> AbstractContextManager[Callable[[], None]]:
    """Hold the lease of `output` for the block; gives a check that raises UserError once another run has taken it.

    Waits EXPIRY seconds for the lease of a holder that was killed, and says so.

    Raises:
        UserError: a run that is alive holds it, or the store does not heed `If-None-Match: *`.
        StorageError: the store fails.
    """
    folder = storage.join(output, NAME)
    return _hold_in_store(folder) if storage.is_remote(output) else _hold_locally(storage.join(folder, "lock"))


@dataclass(frozen=True)
class Holder:
    """The process that holds a lease, by what it wrote there."""

    host: str = "?"
    pid: int | str = "?"
    since: str = "?"
    token: str = ""
    """Unlike host and process id it is never used again."""
    beat: int = 0
    """Grows with each sign of life."""
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

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"

    def refusal(self, uri: str) -> UserError:
        """Return the error for another run that wants the lease at `uri`."""
        return UserError(f"{_output(uri)} is being written by another run ({self}); wait for its end, or stop it")


def _output(uri: str) -> str:
    return uri.rpartition(f"/{NAME}")[0]


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
def _hold_in_store(folder: str) -> Iterator[Callable[[], None]]:
    lease = Lease(folder)
    lease.take()
    beating = threading.Thread(target=lease.keep, name="lease", daemon=True)
    beating.start()
    try:
        yield lease.check
    finally:
        lease.ended.set()
        beating.join()
        lease.release()


class Lease:
    """The lease of one run in object storage."""

    def __init__(self, folder: str) -> None:
        """Name the folder of its objects; nothing is written yet."""
        self.folder = folder
        self.number = 0
        self.lost = False
        self.ended = threading.Event()
        self._holder = Holder.this_process()
        self._renewed = time.monotonic()
        self._renewing = threading.Lock()

    def take(self) -> None:
        """Make the next object, if there is none, if the lease was given back, or once its holder counts as dead."""
        watched = None
        while True:
            now = time.monotonic()
            state = number, holder = self._latest()
            if state != watched:
                if watched is not None and not holder.released:
                    raise holder.refusal(self.folder)  # it was written while this run watched
                # from the end of this look to the start of the last: this process too may be suspended in between
                watched, deadline = state, time.monotonic() + EXPIRY
                if not holder.released:
                    until = datetime.now().astimezone() + timedelta(seconds=EXPIRY)
                    _log.warning(
                        "%s may be in use by another run (%s): waiting until %s for a sign of life of it",
                        _output(self.folder), holder, f"{until:%H:%M:%S}",
                    )  # fmt: skip
            if (holder.released or now > deadline) and self._create(number + 1, holder):
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
        for attempt in range(4):  # again if that took as long: what was seen then says nothing of now
            if self.lost or time.monotonic() - self._renewed <= EXPIRY:
                break
            if attempt == 3:
                raise StorageError("unavailable", self.folder, f"renewing the lease takes more than {EXPIRY:.0f} s")
            self._renew()
        if self.lost:
            raise UserError(
                f"another run has taken over {_output(self.folder)}, since this one gave no sign of life for "
                f"{EXPIRY:.0f} s; let that one continue"
            )

    def release(self) -> None:
        """Give the lease back, so that the next run need not wait."""
        try:
            if not self.lost:
                self._renew(released=True)
        except StorageError as error:
            _log.warning("the lease could not be given back and will run out by itself: %s", error)

    def _renew(self, *, released: bool = False) -> None:
        with self._renewing:
            self._holder = replace(self._holder, beat=self._holder.beat + 1, released=released)
            now = time.monotonic()  # others count from the write on, which must not be earlier
            storage.write_bytes(self._uri(self.number), self._content())
            self.lost = self.lost or not self._is_highest()
            self._renewed = now

    def _create(self, number: int, before: Holder) -> bool:
        """Return whether the lease is now ours, after `before`. Raises UserError if the store heeds no condition."""
        uri, now = self._uri(number), time.monotonic()
        if not storage.write_new(uri, self._content()) and self._read(number).token != self._holder.token:
            return False  # the token is ours if the answer to a first request got lost
        self.number = number
        # Of two puts on one name the second has to fail: the lease and the files of parts rest on that.
        overwritten = storage.write_new(uri, self._content())
        if not self._is_highest():  # others have come and removed this number, since `number - 1` was the highest
            return False
        if overwritten:
            self._remove([storage.name(uri)])
            raise UserError(
                f"{_output(self.folder)}: this store overwrites an object although the request forbids it "
                "(If-None-Match: *), so that two runs could write the same rows; update the store, or name an output "
                "in another one"
            )
        # Either the one before, which may have come back to life, sees this object when it looks after its next sign of
        # life, or that sign is seen here.
        if self._read(number - 1) != before:
            self._remove([storage.name(uri)])
            return False
        self._renewed = now
        self._remove([name for name in self._names() if name < storage.name(uri)])
        return True

    def _is_highest(self) -> bool:
        return self._names()[-1:] <= [storage.name(self._uri(self.number))]

    def _remove(self, names: list[str]) -> None:
        with suppress(StorageError):  # whoever may write there need not be allowed to delete
            for name in names:
                storage.delete(storage.join(self.folder, name))

    def _latest(self) -> tuple[int, Holder]:
        """Return the highest number, 0 if there is none, and its holder."""
        number = max((int(name[:8]) for name in self._names()), default=0)
        return number, self._read(number)

    def _read(self, number: int) -> Holder:
        """Return who holds a number; a lease that was given back if there is none."""
        with storage.suppress_missing():
            return Holder.parse(storage.read_bytes(self._uri(number)))
        return Holder(released=True)

    def _names(self) -> list[str]:
        return [name for name in storage.list_names(self.folder, missing_ok=True) if name[:8].isdecimal()]

    def _uri(self, number: int) -> str:
        return storage.join(self.folder, f"{number:08d}.json")

    def _content(self) -> bytes:
        return self._holder.to_json().encode()
