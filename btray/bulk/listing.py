"""From the archive to the worklist: what is listed, less what is completed, sealed while it is classified."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from btray import storage
from btray.bulk import worklist
from btray.bulk.completed import etag_of_unselected
from btray.bulk.config import ArchiveConfig
from btray.bulk.worklist import WorklistWriter
from btray.data.key_set import Keys, KeySet, keys_of
from btray.storage import FileInfo, StorageError

_AT_A_TIME = 1024
_MOST_AT_A_TIME = 32_768
_AGAIN = 5.0  # seconds


class NewObjects:
    """Filters listed objects for those that are not completed and come for the first time, and counts the others."""

    def __init__(self, completed: Iterable[Keys], scratch: str, reason: str = "") -> None:
        """Keep the keys of `completed` objects, and of each new one, so that it comes once, in the folder `scratch`.

        What was left out for this `reason` is completed, too; see `completed.etag_of_unselected`.
        """
        self._reason = reason
        self.known = KeySet(Path(scratch))
        for keys in completed:
            self.known.add(keys)
        self.unchanged = 0

    def among(self, objects: Iterable[FileInfo]) -> Iterator[FileInfo]:
        """Yield the new ones, in their order."""
        iterator, most = iter(objects), _AT_A_TIME
        while chunk := list(islice(iterator, most)):
            most = min(2 * most, _MOST_AT_A_TIME)  # the first rows do not wait, the many cost less each
            once = list({(info.uri, info.etag): info for info in chunk}.values())
            keys = keys_of([(info.uri, info.etag) for info in once])
            known = self.known.contains(keys)
            if self._reason:
                unselected = [(info.uri, etag_of_unselected(info.etag, self._reason)) for info in once]
                known |= self.known.contains(keys_of(unselected))
            self.known.add(keys[~known])
            new = [info for info, skip in zip(once, known, strict=True) if not skip]
            self.unchanged += len(chunk) - len(new)
            yield from new


@dataclass(eq=False, repr=False)
class Listing(threading.Thread):
    """Writes the worklist of a run in the background; that of a resumed run continues after its last shard."""

    folder: str
    """Of the worklist."""
    config: ArchiveConfig
    listed: Iterator[FileInfo]
    new_objects: Callable[[], NewObjects]
    """Called in the thread, since it may read a large table."""
    check: Callable[[], None]
    """Nothing is sealed once it raises: another run has the lease."""
    begun: threading.Event = field(default_factory=threading.Event)
    """Set once there is a shard or the listing has ended."""
    cancelled: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None
    """What stopped the listing, after it has ended."""
    complete: bool = False
    """All is listed."""
    objects: int = 0
    """Of the worklist; grows while it is written, as `unchanged` does."""
    unchanged: int = 0

    def __post_init__(self) -> None:
        """Make the thread, which waits for `start`."""
        super().__init__(name="listing", daemon=True)

    def run(self) -> None:
        """Write the worklist; called by the thread."""
        with storage.retry_timeout(self.config.patience):
            try:
                self._write()
            except BaseException as error:  # it is raised again by the thread that waits for the rows
                self.error = error
            finally:
                self.begun.set()

    def _write(self) -> None:
        shards, complete = worklist.sealed_shards(self.folder)
        if not complete:
            worklist.reopen(self.folder)
        if shards:
            self.begun.set()
        new = None if complete else self.new_objects()
        for uri in shards:
            shard = worklist.read_shard(uri)
            self.objects += len(shard)
            if new is not None:
                new.known.add(keys_of(list(zip(shard["uri"].to_pylist(), shard["etag"].to_pylist(), strict=True))))
        if new is not None:
            self._seal(new, WorklistWriter(self.folder, len(shards), check=self.check))
        self.complete = True

    def _seal(self, new: NewObjects, writer: WorklistWriter) -> None:
        before, limit = self.objects, self.config.limit
        objects = islice(new.among(self.listed), None if limit is None else max(0, limit - before))
        try:
            while chunk := list(islice(objects, _AT_A_TIME)):
                if self.cancelled.is_set():
                    return
                if writer.add(chunk):
                    self.begun.set()
                self.objects += len(chunk)
                self.unchanged = max(0, new.unchanged - before)
            self.unchanged = max(0, new.unchanged - before)
            writer.end(complete=True)
        except BaseException as error:
            self.error = error
            # Readers of the worklist wait for more, so it is tried until it works or nobody reads any more.
            ended = False
            while not ended:
                with suppress(StorageError):
                    writer.end(complete=False)
                    break
                ended = self.cancelled.wait(_AGAIN)
            raise
