"""From the archive to the worklist: what is listed, less what is done, sealed in segments while they are classified."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import pyarrow.compute as pc

from btray import storage
from btray.bulk import worklist as segments
from btray.bulk.runs import Run
from btray.bulk.worklist import WorklistWriter
from btray.data.key_set import KeySet, keys_of
from btray.storage import FileInfo, StorageError

_AT_A_TIME = 1024
_MOST_AT_A_TIME = 32_768
_AGAIN = 5.0  # seconds


class NewObjects:
    """Those of listed objects that are not done and come for the first time, and how many there were."""

    def __init__(self, done: KeySet) -> None:
        self.done = done
        self.listed = 0
        self.unchanged = 0

    def of(self, objects: Iterable[FileInfo]) -> Iterator[FileInfo]:
        """The new ones, in their order."""
        iterator, most = iter(objects), _AT_A_TIME
        while chunk := list(islice(iterator, most)):
            most = min(2 * most, _MOST_AT_A_TIME)  # the first rows do not wait, the many cost less each
            self.listed += len(chunk)
            once = list({(info.uri, info.etag): info for info in chunk}.values())
            keys = keys_of([(info.uri, info.etag) for info in once])
            known = self.done.contains(keys)
            self.done.add(keys[~known])
            new = [info for info, skip in zip(once, known, strict=True) if not skip]
            self.unchanged += len(chunk) - len(new)
            yield from new


class Listing(threading.Thread):
    """Writes the worklist of a run in the background; a run that is taken up goes on behind its last segment.

    Nothing is sealed once `check` raises: another run has the lease.
    `begun` is set once there is a segment or the listing has ended, `complete` when all is listed. After it has ended
    `error` is what stopped it. The counts grow while it runs: `objects` and `bytes` of the worklist, `unchanged` ones.
    """

    def __init__(
        self,
        run: Run,
        found: Iterator[FileInfo],
        done_before: Callable[[], KeySet],
        *,
        limit: int | None,
        part_objects: int,
        patience: float,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(name="listing", daemon=True)
        self.begun = threading.Event()
        self.cancelled = threading.Event()
        self.error: BaseException | None = None
        self.complete = False
        self.objects = 0
        self.bytes = 0
        self.unchanged = 0
        self._of = run
        self._found = found
        self._done_before = done_before
        self._limit = limit
        self._part_objects = part_objects
        self._patience = patience
        self._check = check

    def run(self) -> None:
        """The thread."""
        with storage.retry_timeout(self._patience):
            try:
                self._write()
            except BaseException as error:  # it is raised again by the thread that waits for the rows
                self.error = error
            finally:
                self.begun.set()

    def _write(self) -> None:
        folder = self._of.worklist
        sealed, complete = segments.sealed(folder)
        if not complete:
            segments.reopen(folder)
        if sealed:
            self.begun.set()
        done = None if complete else self._done_before()
        for uri in sealed:
            segment = segments.read_segment(uri)
            self._count(len(segment), pc.sum(segment["size"]).as_py())
            if done is not None:
                done.add(keys_of(list(zip(segment["uri"].to_pylist(), segment["etag"].to_pylist(), strict=True))))
        if done is not None:
            self._seal(done, WorklistWriter(folder, self._part_objects, len(sealed), check=self._check))
        self.complete = True

    def _seal(self, done: KeySet, writer: WorklistWriter) -> None:
        new = NewObjects(done)
        before, limit = self.objects, self._limit
        objects = islice(new.of(self._found), None if limit is None else max(0, limit - before))
        try:
            while chunk := list(islice(objects, _AT_A_TIME)):
                if self.cancelled.is_set():
                    return
                if writer.add(chunk):
                    self.begun.set()
                self._count(len(chunk), sum(info.size for info in chunk))
                self.unchanged = max(0, new.unchanged - before)
            self.unchanged = max(0, new.unchanged - before)
            writer.end(complete=True)
        except BaseException as error:
            self.error = error
            self._end_incomplete(writer)
            raise

    def _end_incomplete(self, writer: WorklistWriter) -> None:
        """Tell who reads the worklist that no more comes; until then they wait for more, so it is tried until it works
        or nobody reads any more."""
        while True:
            try:
                writer.end(complete=False)
            except StorageError:
                if not self.cancelled.wait(_AGAIN):
                    continue
            return

    def _count(self, objects: int, size: int) -> None:
        self.objects += objects
        self.bytes += size
