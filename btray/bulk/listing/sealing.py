"""From the archive to the worklist: what is listed, less what is completed, sealed while it is classified."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from btray import storage
from btray.bulk import worklist
from btray.bulk.config import ArchiveConfig
from btray.bulk.listing.archive import Archive
from btray.bulk.listing.new_objects import NewObjects
from btray.bulk.listing.objects import Counts
from btray.bulk.worklist import PartLimits, WorklistWriter
from btray.storage import FileInfo, StorageError

Filter = Callable[[Iterator[FileInfo]], Iterator[FileInfo]]
_AGAIN = 5.0  # seconds


def new_batches(
    new: NewObjects, archive: Archive, without_erased: Filter, limit: int | None, before: int = 0
) -> Iterator[list[FileInfo]]:
    """Yield the new objects of an archive that were not erased, batch by batch, up to `limit` less those `before`."""
    left = None if limit is None else max(0, limit - before)
    for found in new.among(archive) if left != 0 else ():
        objects = list(without_erased(iter(found)))[:left]
        yield objects
        if left is not None:
            left -= len(objects)
            if left == 0:
                return


@dataclass(eq=False, repr=False)
class Listing(threading.Thread):
    """Writes the worklist of a run in the background; that of a resumed run continues after its last shard."""

    folder: str
    """Of the worklist."""
    config: ArchiveConfig
    new_objects: Callable[[], tuple[NewObjects, Archive]]
    """Called in the thread, since it may read a large table: what tells new objects, and where they are looked for."""
    without_erased: Filter
    limits: PartLimits
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
    of_files: Mapping[str, Counts] = field(default_factory=dict)
    """Of an inventory: see `NewObjects.of_files`."""

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
        new, archive = (None, None) if complete else self.new_objects()
        for uri in shards:
            shard = worklist.read_shard(uri)
            self.objects += len(shard)
            if new is not None:
                new.leave_out(shard)
        if new is not None and archive is not None:
            self._seal(new, archive, self._writer(len(shards)))
            self.of_files = new.of_files
        self.complete = True

    def _writer(self, shards: int) -> WorklistWriter:
        return WorklistWriter(self.folder, shards, listed=self.objects, limits=self.limits, check=self.check)

    def _seal(self, new: NewObjects, archive: Archive, writer: WorklistWriter) -> None:
        before = self.objects
        try:
            for objects in new_batches(new, archive, self.without_erased, self.config.limit, before):
                if self.cancelled.is_set():
                    return
                if writer.add(objects):
                    self.begun.set()
                self.objects += len(objects)
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
