"""The actor of all jobs on archives: parts of the worklist in, their files written, tallies out."""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import pyarrow as pa
import ray

from btray import storage
from btray.bulk import runs
from btray.bulk.clinical.pseudonyms import Pseudonyms
from btray.bulk.report import PartTally
from btray.bulk.runs import Run, read_tally, write_part
from btray.storage import FileInfo, StorageError
from btray.storage.read_many import ReadResult, read_many, read_patiently

# What an actor holds at a time, twice: one batch is read while the one before it is worked on.
_BATCH_OBJECTS = 64
_BATCH_BYTES = 64 << 20

Row = dict[str, Any]
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
    ) -> None:
        """Start the thread that reads ahead; `pseudonyms` are those that objects are listed with."""
        self._pseudonyms = pseudonyms
        self._threads = threads
        self._patience = patience
        self._max_bytes = max_bytes
        self._most = max(_BATCH_OBJECTS, least)
        self._reader = ThreadPoolExecutor(1)

    def batches(
        self, objects: Sequence[FileInfo], seconds: dict[str, float]
    ) -> Iterator[tuple[list[FileInfo], list[ReadResult]]]:
        """Yield objects with their bytes; `seconds["read"]` grows by the time spent waiting for them."""
        batches: list[list[FileInfo]] = []
        size = 0
        for info in objects:
            if not batches or len(batches[-1]) == self._most or size + info.size > _BATCH_BYTES:
                batches.append([])
                size = 0
            batches[-1].append(info)
            size += info.size
        reading = [self._reader.submit(self._read, batch) for batch in batches[:1]]
        for number, batch in enumerate(batches):
            started = time.perf_counter()
            results = reading.pop().result()
            seconds["read"] += time.perf_counter() - started
            reading += [self._reader.submit(self._read, following) for following in batches[number + 1 : number + 2]]
            yield batch, results

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


class PartProcessor(Protocol):
    """What a job makes of the objects of its parts. Each actor makes one of its own."""

    schema: pa.Schema
    """Of the rows; one of its columns is error_code."""
    write_options: dict[str, Any]
    """Of pyarrow.parquet.write_table."""
    reader: Prefetcher

    @property
    def tally_type(self) -> type[PartTally]:
        """Return the class of what `tally` returns."""

    def choose(self, objects: Sequence[FileInfo], seconds: Seconds) -> tuple[Sequence[FileInfo], list[Row]]:
        """Return which objects are to be read, and the rows of the others."""

    def rows(self, objects: Sequence[FileInfo], results: Sequence[ReadResult], seconds: Seconds) -> list[Row]:
        """Return the rows that some objects become; `seconds` grows by those of the job's own stages."""

    def tally(self, rows: Sequence[Row], objects: Sequence[FileInfo], seconds: Seconds) -> PartTally:
        """Return the counts of a whole part."""


class PartActor:
    """The actor: has its processor turn the objects of one part after another into rows, and writes a file of each."""

    def __init__(
        self, make_processor: Callable[[Run, int], PartProcessor], run: Run, patience: float, cpus: int
    ) -> None:
        """Make the processor for `run`; called by Ray, also when it starts a dead actor again."""
        self.run = run
        self.processor = make_processor(run, cpus)
        self._patience = patience
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the property is public, but Ray's own code behind it is deprecated
            self._died_before = ray.get_runtime_context().was_current_actor_reconstructed

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Turn parts as `worklist.read_parts` gives them into columns part, tally (JSON)."""
        tallies = []
        with storage.retry_timeout(self._patience):
            runs.require_visible(self.run)
            for part in batch.to_pylist():
                objects = objects_of(part)
                if self._died_before:
                    runs.note_attempt(self.run, part["part"], objects[0].uri)
                tallies.append(self._part(self.run.part_uri(part["part"]), objects).model_dump_json())
        return pa.table({"part": batch["part"], "tally": pa.array(tallies, pa.string())})

    def _part(self, uri: str, objects: Sequence[FileInfo]) -> PartTally:
        """Write the file of one part and return its tally, or that of the file if an earlier attempt has written it."""
        processor = self.processor
        written = read_tally(uri, processor.tally_type)
        if written is None:
            seconds: Seconds = defaultdict(float)
            chosen, rows = processor.choose(objects, seconds)
            for some, results in processor.reader.batches(chosen, seconds):
                rows += processor.rows(some, results, seconds)
            tally = processor.tally(rows, objects, seconds)
            started = time.perf_counter()
            if write_part(uri, rows, processor.schema, tally, **processor.write_options):
                return tally.model_copy(update={"seconds": seconds | {"write": time.perf_counter() - started}})
            # another attempt at this part, whose tally is lost, was quicker
            written = read_tally(uri, processor.tally_type) or tally
        return written.model_copy(update={"reused": True})


def objects_of(part: dict[str, Any]) -> list[FileInfo]:
    """Return the objects of one part, as `worklist.read_parts` gives it."""
    columns = (part[name] for name in ("uri", "size", "etag", "place"))
    return [FileInfo(uri, size, etag, 0.0, place) for uri, size, etag, place in zip(*columns, strict=True)]
