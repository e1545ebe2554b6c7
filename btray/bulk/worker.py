"""The actors of all jobs on archives: parts of the worklist in, their files written, tallies out.

Either one actor does all of a part, or an actor reads and decodes it and another one does the rest. Only the one that
writes a part's file decides what its rows are, so both ways give each object once.
"""

from __future__ import annotations

import pickle
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
import ray

from btray import storage
from btray.bulk import runs
from btray.bulk.clinical.pseudonyms import Pseudonyms
from btray.bulk.listing.key_files import Records, latest
from btray.bulk.report import PartTally
from btray.bulk.runs import Run, read_rows, read_tally, write_part
from btray.core.cluster import own_cpus
from btray.pacs.source import PacsSource
from btray.storage import FileInfo, StorageError
from btray.storage.read_many import ReadResult, read_many, read_patiently

# What an actor holds at a time, twice: one batch is read while the one before it is worked on.
_BATCH_OBJECTS = 64
_BATCH_BYTES = 64 << 20
# What is decoded of a part ahead of the actor that writes it. Few parts hold more, if their scans have many pages; that
# actor reads the rest itself, and so no memory depends on what an archive holds.
_AHEAD_BYTES = 256 << 20

Row = dict[str, Any]
Batch = tuple[list[int], list[ReadResult]]
"""Numbers of objects, and what each of them holds."""
Seconds = defaultdict[str, float]
"""Time spent by stage."""


class Prefetcher:
    """Reads batches of at most `least` or 64 objects, whichever is more, and 64 MiB; `threads` objects at a time."""

    def __init__(
        self,
        *,
        threads: int,
        patience: float,
        max_bytes: int,
        least: int = 1,
        pseudonyms: Pseudonyms | None = None,
        pacs: PacsSource | None = None,
    ) -> None:
        """Start the thread that reads ahead, from `pacs` if there is one.

        `pseudonyms` are those that objects are listed with.
        """
        self._pseudonyms = pseudonyms
        self._pacs = pacs
        self._threads = threads
        self._patience = patience
        self._max_bytes = max_bytes
        self._most = max(_BATCH_OBJECTS, least)
        self._reader = ThreadPoolExecutor(1)

    def batches(self, objects: Sequence[FileInfo], seconds: dict[str, float]) -> Iterator[Batch]:
        """Begin to read, and return what yields the numbers of objects with their bytes, each object once.

        They come in their order, those of a PACS in its order. `seconds["read"]` grows by the time spent waiting.
        """
        reading = self._from_pacs(objects) if self._pacs else self._from_files(objects)
        return self._read_ahead(reading, self._reader.submit(next, reading, None), seconds)

    def _read_ahead(
        self, reading: Iterator[Batch], ahead: Future[Batch | None], seconds: dict[str, float]
    ) -> Iterator[Batch]:
        """Yield the batches of `reading`, of which the first is being read already, and read the next one meanwhile."""
        while True:
            started = time.perf_counter()
            batch = ahead.result()
            seconds["read"] += time.perf_counter() - started
            if batch is None:
                return
            ahead = self._reader.submit(next, reading, None)
            yield batch

    def _from_files(self, objects: Sequence[FileInfo]) -> Iterator[Batch]:
        numbers: list[int] = []
        size = 0
        for number, info in enumerate(objects):
            if numbers and (len(numbers) == self._most or size + info.size > _BATCH_BYTES):
                yield numbers, self._read([objects[one] for one in numbers])
                numbers, size = [], 0
            numbers.append(number)
            size += info.size
        if numbers:
            yield numbers, self._read([objects[one] for one in numbers])

    def _from_pacs(self, objects: Sequence[FileInfo]) -> Iterator[Batch]:
        known, pacs = self._pseudonyms, self._pacs
        assert pacs is not None  # noqa: S101 - as `batches` has seen
        numbers: list[int] = []
        results: list[ReadResult] = []
        size = 0
        for number, result in pacs.read([known.place(info.place) if known else info.uri for info in objects]):
            numbers.append(number)
            if isinstance(result, StorageError):
                results.append(known.conceal_error(result, objects[number]) if known else result)
            else:
                results.append(result)
                size += len(result)
            if len(numbers) == self._most or size > _BATCH_BYTES:
                yield numbers, results
                numbers, results, size = [], [], 0
        if numbers:
            yield numbers, results

    def _read(self, batch: Sequence[FileInfo]) -> list[ReadResult]:
        def read(objects: Sequence[FileInfo]) -> list[ReadResult]:
            return read_many(
                [info.place or info.uri for info in objects],
                etags=[info.etag for info in objects],
                threads=self._threads,
                max_bytes=self._max_bytes,
            )

        known = self._pseudonyms
        results = read_patiently([known.reveal(info) for info in batch] if known else batch, read, self._patience)
        for number, info in enumerate(batch):
            result = results[number]
            # No later run could tell which bytes it was that this row speaks of.
            if not info.etag and not isinstance(result, StorageError):
                detail = "it could not be examined when it was listed, and now it can be read"
                results[number] = StorageError("changed", info.uri, detail)
            elif known and isinstance(result, StorageError):
                results[number] = known.conceal_error(result, info)
        return results


class Piece(Protocol):
    """Some of what an object becomes."""

    @property
    def index(self) -> int:
        """Return the number of the object among those that were given to be read."""

    @property
    def nbytes(self) -> int:
        """Return the memory that it takes."""


class PartReader(Protocol):
    """Reads the objects of parts, and decodes them. Each actor makes one of its own."""

    def lots(self, objects: Sequence[FileInfo], seconds: Seconds) -> Iterator[Sequence[Piece]]:
        """Begin to read `objects`, and return what yields all of them, each in consecutive pieces.

        `seconds` grows by those of the reader's stages.
        """


class PartProcessor(PartReader, Protocol):
    """What a job makes of the objects of its parts. Each actor makes one of its own."""

    schema: pa.Schema
    """Of the rows; one of its columns is error_code."""
    write_options: dict[str, Any]
    """Of pyarrow.parquet.write_table."""

    @property
    def tally_type(self) -> type[PartTally]:
        """Return the class of what `tally` returns."""

    def rows(self, objects: Sequence[FileInfo], lot: Any, seconds: Seconds) -> list[Row]:
        """Return the rows of one lot of `objects`; `seconds` grows by those of the job's own stages."""

    def tally(self, rows: Sequence[Row], objects: Sequence[FileInfo], seconds: Seconds) -> PartTally:
        """Return the counts of a whole part."""

    @property
    def key_columns(self) -> Sequence[str]:
        """Return the columns that `records` needs."""

    def records(self, rows: Sequence[Row]) -> Records:
        """Return what became of the objects of a part, for the key files of the run; none if it has no such files."""


@dataclass(frozen=True)
class _Reading:
    """What was read of a part ahead of the actor that writes it."""

    lots: list[Sequence[Piece]]
    rest: list[FileInfo]
    """The objects that were left to be read: those that are not in `lots`."""
    seconds: Seconds


class _Actor:
    """What the actors have in common: they count the attempts at a part once they have died."""

    def __init__(self, run: Run, patience: float) -> None:
        self.run = run
        self._patience = patience
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the property is public, but Ray's own code behind it is deprecated
            self._died_before = ray.get_runtime_context().was_current_actor_reconstructed

    def _note_attempt(self, part: dict[str, Any]) -> None:
        if self._died_before:
            runs.note_attempt(self.run, part["part"], part["uri"][0], actor=type(self).__name__)


class ReadActor(_Actor):
    """The actor of the first of two stages: adds to each part what its objects become, decoded.

    Ray calls it from two threads, so that one part is read while another one is decoded.
    """

    def __init__(self, make_reader: Callable[[Run], PartReader], run: Run, patience: float) -> None:
        """Make the reader for `run`; called by Ray, also when it starts a dead actor again."""
        super().__init__(run, patience)
        self.reader = make_reader(run)
        self._decoding = threading.Lock()

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Add a column, read, to parts as `worklist.read_parts` gives them: null if the part's file is there."""
        column = []
        with storage.retry_timeout(self._patience):
            runs.require_visible(self.run)
            for part in batch.to_pylist():
                done = read_tally(self.run.part_uri(part["part"]), PartTally) is not None
                column.append(None if done else pickle.dumps(self._read(part), protocol=5))
        return batch.append_column("read", pa.array(column, pa.large_binary()))

    def _read(self, part: dict[str, Any]) -> _Reading:
        seconds: Seconds = defaultdict(float)
        lots: list[Sequence[Piece]] = []
        objects = objects_of(part)
        coming, held = self.reader.lots(objects, seconds), 0
        with self._decoding:
            self._note_attempt(part)  # here, or a part that is read beside one that kills would be blamed as often
            for lot in coming:
                lots.append(lot)
                held += sum(piece.nbytes for piece in lot)
                if held > _AHEAD_BYTES:
                    cut = lot[-1].index  # of which there may be more pieces
                    lots = [[piece for piece in lot if piece.index != cut] for lot in lots]
                    break
        there = {piece.index for lot in lots for piece in lot}
        return _Reading(lots, [info for index, info in enumerate(objects) if index not in there], seconds)


class PartActor(_Actor):
    """The actor: has its processor turn the objects of one part after another into rows, and writes a file of each."""

    def __init__(
        self,
        make_processor: Callable[[Run, int], PartProcessor],
        run: Run,
        patience: float,
        actors: int = 1,
        gpu_share: float = 0.0,
    ) -> None:
        """Make the processor for `run`; called by Ray, also when it starts a dead actor again.

        It may keep its share of the CPUs of its node busy: see `own_cpus`.
        """
        super().__init__(run, patience)
        self.processor = make_processor(run, own_cpus(actors, gpu_share))

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Turn parts as `worklist.read_parts` or a ReadActor gives them into columns part, tally (JSON) and records."""
        readings = batch["read"] if "read" in batch.column_names else [None] * len(batch)
        parts = batch.select([name for name in batch.column_names if name != "read"]).to_pylist()
        tallies, records = [], []
        with storage.retry_timeout(self._patience):
            runs.require_visible(self.run)
            for part, read in zip(parts, readings, strict=True):
                self._note_attempt(part)
                # made by a ReadActor of this job: as trustworthy as all that Ray hands over, which is pickled too
                reading = pickle.loads(read.as_buffer()) if read is not None and read.is_valid else None  # noqa: S301
                tally, of_objects = self._part(self.run.part_uri(part["part"]), objects_of(part), reading)
                tallies.append(tally.model_dump_json())
                records.append(latest(of_objects).tobytes())
        columns = {"tally": pa.array(tallies, pa.string()), "records": pa.array(records, pa.binary())}
        return pa.table({"part": batch["part"], **columns})

    def _part(
        self, uri: str, objects: Sequence[FileInfo], reading: _Reading | None = None
    ) -> tuple[PartTally, Records]:
        """Write the file of one part; return its tally and records, or those of the file of an earlier attempt."""
        processor = self.processor
        written = read_tally(uri, processor.tally_type)
        if written is None:
            read = reading or _Reading([], list(objects), defaultdict(float))
            seconds = read.seconds
            rows = [row for lot in read.lots for row in processor.rows(objects, lot, seconds)]
            for lot in processor.lots(read.rest, seconds):
                rows += processor.rows(read.rest, lot, seconds)
            tally = processor.tally(rows, objects, seconds)
            started = time.perf_counter()
            if write_part(uri, rows, processor.schema, tally, **processor.write_options):
                seconds["write"] += time.perf_counter() - started
                return tally.model_copy(update={"seconds": seconds}), processor.records(rows)
            # another attempt at this part, whose tally is lost, was quicker
            written = read_tally(uri, processor.tally_type) or tally
        rows = read_rows(uri, processor.key_columns)
        return written.model_copy(update={"reused": True}), processor.records(rows)


def objects_of(part: dict[str, Any]) -> list[FileInfo]:
    """Return the objects of one part, as `worklist.read_parts` gives it."""
    columns = (part[name] for name in ("uri", "size", "etag", "place"))
    return [FileInfo(uri, size, etag, 0.0, place) for uri, size, etag, place in zip(*columns, strict=True)]
