"""From the archive to the worklist: what is listed, less what is completed, sealed while it is classified."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from btray import storage
from btray.bulk import worklist
from btray.bulk.config import ArchiveConfig
from btray.bulk.runs import Run
from btray.bulk.worklist import WorklistWriter
from btray.data.key_set import KeySet, keys_of
from btray.storage import FileInfo, StorageError

_AT_A_TIME = 1024
_MOST_AT_A_TIME = 32_768
_AGAIN = 5.0  # seconds


class NewObjects:
    """Filters listed objects for those that are not completed and come for the first time, and counts the others."""

    def __init__(self, completed: KeySet) -> None:
        """Add the keys of new objects to `completed`, so that each comes once."""
        self.completed = completed
        self.unchanged = 0

    def among(self, objects: Iterable[FileInfo]) -> Iterator[FileInfo]:
        """Yield the new ones, in their order."""
        iterator, most = iter(objects), _AT_A_TIME
        while chunk := list(islice(iterator, most)):
            most = min(2 * most, _MOST_AT_A_TIME)  # the first rows do not wait, the many cost less each
            once = list({(info.uri, info.etag): info for info in chunk}.values())
            keys = keys_of([(info.uri, info.etag) for info in once])
            known = self.completed.contains(keys)
            self.completed.add(keys[~known])
            new = [info for info, skip in zip(once, known, strict=True) if not skip]
            self.unchanged += len(chunk) - len(new)
            yield from new


class Listing(threading.Thread):
    """Writes the worklist of a run in the background; that of a resumed run continues after its last shard.

    Nothing is sealed once `check` raises: another run has the lease.
    `begun` is set once there is a shard or the listing has ended, `complete` when all is listed. After it has ended
    `error` is what stopped it. The counts grow while it runs: `objects` of the worklist, and `unchanged` ones.
    """

    def __init__(
        self,
        run: Run,
        config: ArchiveConfig,
        listed: Iterator[FileInfo],
        completed: Callable[[], KeySet],
        check: Callable[[], None],
    ) -> None:
        """Take what is `listed`; `completed` is called in the thread, since it may read a large table."""
        super().__init__(name="listing", daemon=True)
        self.begun = threading.Event()
        self.cancelled = threading.Event()
        self.error: BaseException | None = None
        self.complete = False
        self.objects = 0
        self.unchanged = 0
        self._worklist = run.worklist
        self._config = config
        self._listed = listed
        self._completed = completed
        self._check = check

    def run(self) -> None:
        """Write the worklist; called by the thread."""
        with storage.retry_timeout(self._config.patience):
            try:
                self._write()
            except BaseException as error:  # it is raised again by the thread that waits for the rows
                self.error = error
            finally:
                self.begun.set()

    def _write(self) -> None:
        shards, complete = worklist.sealed_shards(self._worklist)
        if not complete:
            worklist.reopen(self._worklist)
        if shards:
            self.begun.set()
        known = None if complete else self._completed()
        for uri in shards:
            shard = worklist.read_shard(uri)
            self.objects += len(shard)
            if known is not None:
                known.add(keys_of(list(zip(shard["uri"].to_pylist(), shard["etag"].to_pylist(), strict=True))))
        if known is not None:
            writer = WorklistWriter(self._worklist, len(shards), check=self._check)
            self._seal(NewObjects(known), writer)
        self.complete = True

    def _seal(self, new: NewObjects, writer: WorklistWriter) -> None:
        before, limit = self.objects, self._config.limit
        objects = islice(new.among(self._listed), None if limit is None else max(0, limit - before))
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
            self._end_incomplete(writer)
            raise

    def _end_incomplete(self, writer: WorklistWriter) -> None:
        """Tell readers of the worklist that no more comes.

        Until then they wait for more, so it is tried until it works or nobody reads any more.
        """
        while True:
            try:
                writer.end(complete=False)
            except StorageError:
                if not self.cancelled.wait(_AGAIN):
                    continue
            return
