"""Which of the objects of an archive are new, found round by round while it is listed."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial, reduce
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from btray.bulk.clinical.pseudonyms import Pseudonyms
from btray.bulk.listing.archive import Archive
from btray.bulk.listing.join import join, split
from btray.bulk.listing.key_files import REJECTED, KeySource
from btray.bulk.listing.objects import NOTHING, Chunk, Counts, added, objects_of, table_of
from btray.bulk.listing.tasks import Tasks
from btray.data.key_set import KeySet, keys_of, keys_of_columns
from btray.storage import FileInfo

# Objects of a round, for each task that runs at a time. The first rounds are small, so that the first rows do not wait.
# Each round reads all key files: the larger it is, the less a large archive costs, and the more of it Ray stores, which
# is 130 bytes an object.
_FIRST_ROUND, _LARGEST_ROUND = 1 << 16, 1 << 23
_ROUND_SECONDS = 20.0  # after which a round ends that waits for a slow listing
_AT_A_TIME = 32_768  # objects


class NewObjects:
    """Filters listed objects for those that are not completed and come for the first time, and counts the others."""

    def __init__(
        self,
        sources: Sequence[KeySource],
        tasks: Tasks,
        scratch: str,
        *,
        worst: int = REJECTED,
        reason: str = "",
        pseudonyms: Pseudonyms | None = None,
    ) -> None:
        """Join with the records of `sources`: those whose latest outcome is `worst` or better are completed.

        What was left out for this `reason` is completed, too. Objects come under their `pseudonyms`, and so do the
        errors of listing them. The keys of objects that may come again are kept in the folder `scratch`.
        """
        self._sources, self._tasks = sources, tasks
        self._shared = tasks.start(list, sources)  # once for all tasks, and not with each
        self._worst, self._reason, self._pseudonyms = worst, reason, pseudonyms
        self._known = KeySet(Path(scratch))
        self._any_known = False
        self.unchanged = 0
        self.of_files: dict[str, Counts] = {}
        """What the files of an inventory that were listed so far count, by their URIs."""

    def leave_out(self, objects: pa.Table) -> None:
        """Count these objects, with columns uri and etag, as ones that came before."""
        self._any_known = True
        self._known.add(keys_of_columns(objects["uri"], objects["etag"]))

    def among(self, archive: Archive) -> Iterator[list[FileInfo]]:
        """Yield the new ones of an archive, as they are found; in their order if all is done in one process.

        Yields none at a time while time passes, so that whoever holds some does not wait for more.

        Raises UserError and StorageError as the chunks of the archive do, and if it holds none that counts.
        """
        for table in self._joined(archive):
            for start in range(0, len(table) or 1, _AT_A_TIME):
                objects = objects_of(table.slice(start, _AT_A_TIME))
                yield self._once(objects) if archive.may_repeat or self._any_known else objects

    def _once(self, objects: list[FileInfo]) -> list[FileInfo]:
        once = list({(info.uri, info.etag): info for info in objects}.values())
        keys = keys_of([(info.uri, info.etag) for info in once])
        known = self._known.contains(keys)
        self._known.add(keys[~known])
        new = [info for info, skip in zip(once, known, strict=True) if not skip]
        self.unchanged += len(objects) - len(new)
        return new

    def _joined(self, archive: Archive) -> Iterator[pa.Table]:
        """Yield the objects that are not completed, round by round; if nothing is, as they are listed."""
        parallel, partitions = self._tasks.parallel, self._tasks.partitions if self._sources else 1
        largest, begun, held, count = _FIRST_ROUND, time.monotonic(), list[Sequence[Any]](), 0
        for listed, pieces in self._split(archive, partitions):
            begun = begun if held else time.monotonic()
            if listed:
                held.append(pieces)
                count += listed
            slow = time.monotonic() - begun > _ROUND_SECONDS
            if held and (not self._sources or count >= largest * parallel or slow):
                yield from self._round(held, count)
                largest, held, count = min(4 * largest, _LARGEST_ROUND), [], 0
            else:
                yield table_of([])
        yield from self._round(held, count)

    def _split(self, archive: Archive, partitions: int) -> Iterator[tuple[int, Sequence[Any]]]:
        """Yield of each chunk how many objects it has, and what stands for its pieces; some are listed ahead."""
        waiting = deque[Sequence[Any]]()
        for chunk in chain(self._chunks(archive), [None] * self._tasks.parallel):
            if chunk is not None:
                listing = partial(split, keyed=bool(self._sources))
                waiting.append(self._tasks.start(listing, chunk, self._pseudonyms, partitions, returns=partitions + 1))
            if waiting and (chunk is None or len(waiting) >= self._tasks.parallel):
                first, *pieces = waiting.popleft()
                source, unchanged, counts = self._tasks.result(first)
                self.of_files[source] = added(self.of_files.get(source, NOTHING), counts)
                self.unchanged += unchanged
                yield counts[0] - unchanged, pieces
        with self._listing_errors():
            archive.require_some(*reduce(added, self.of_files.values(), NOTHING)[1:])

    def _chunks(self, archive: Archive) -> Iterator[Chunk]:
        with self._listing_errors():
            yield from archive.chunks

    def _listing_errors(self) -> AbstractContextManager[None]:
        return self._pseudonyms.listing_errors() if self._pseudonyms else nullcontext()

    def _round(self, held: list[Sequence[Any]], count: int) -> Iterator[pa.Table]:
        """Yield the objects of the pieces that are not completed, one partition after the other."""
        if not self._sources:
            yield from (self._tasks.result(piece) for pieces in held for piece in pieces)
            return
        arguments = (self._shared, self._worst, self._reason)
        by_partition, joining = deque(zip(*held, strict=True)), deque[Any]()
        held.clear()  # so that each piece is freed once its task has ended
        partitions = len(by_partition)
        self.unchanged += count
        while by_partition or joining:
            # no more than run at a time: Ray would start a process for each
            while by_partition and len(joining) < self._tasks.parallel:
                number, pieces = partitions - len(by_partition), by_partition.popleft()
                joining.append(self._tasks.start(join, number, partitions, *arguments, *pieces))
            new = self._tasks.result(joining.popleft())
            self.unchanged -= len(new)
            yield new
