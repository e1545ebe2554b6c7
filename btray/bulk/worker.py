"""What the actors of all jobs on archives have in common: parts of the worklist in, their files written, counts out."""

from __future__ import annotations

import json
import time
import warnings
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import ray

from btray import storage
from btray.bulk import runs
from btray.bulk.lots import Prefetcher, objects_of
from btray.bulk.part_files import read_tally, write_part
from btray.bulk.runs import Run
from btray.core.allocator import keep_freed_memory
from btray.storage import FileInfo
from btray.storage.read_many import ReadResult

Row = dict[str, Any]
Seconds = defaultdict[str, float]
"""Time spent by stage."""


class PartWorker(ABC):
    """Reads the objects of one part after another and writes one file for each. A job says what their rows are."""

    schema: pa.Schema
    """Of the rows; one of its columns is error_code."""
    write_options: dict[str, Any] = {}  # noqa: RUF012 - never changed
    """Of pyarrow.parquet.write_table."""

    def __init__(self, run: Run, reader: Prefetcher, patience: float) -> None:
        keep_freed_memory()  # of images and of whole parts
        self.run = run
        self._reader = reader
        self._patience = patience
        self._sees_output = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Ray's own code behind this property warns of its age
            self._died_before = ray.get_runtime_context().was_current_actor_reconstructed

    @abstractmethod
    def rows(self, lot: Sequence[FileInfo], answers: Sequence[ReadResult], seconds: Seconds) -> list[Row]:
        """The rows that some objects become; grows the `seconds` of the job's own stages."""

    def summed_up(self, rows: Sequence[Row], objects: Sequence[FileInfo]) -> dict[str, Any]:
        """What else a job wants to know of a part at the end; its numbers are added up by `bulk_report.Totals`."""
        return {}

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Parts as `segments.parts` gives them -> columns part, tally (JSON)."""
        tallies = []
        with storage.retry_timeout(self._patience):
            if not self._sees_output:
                runs.require_seen(self.run)
                self._sees_output = True
            for part in batch.to_pylist():
                objects = objects_of(part)
                if self._died_before:
                    runs.note_attempt(self.run, part["part"], objects[0].uri)
                tallies.append(json.dumps(self._part(self.run.part_uri(part["part"]), objects)))
        return pa.table({"part": batch["part"], "tally": pa.array(tallies, pa.string())})

    def _part(self, uri: str, objects: Sequence[FileInfo]) -> dict[str, Any]:
        """Counts of one part. Where its file is there, by an attempt that was cut off, they come from that file."""
        written = read_tally(uri)
        if written is not None:
            return written | {"reused": True}
        seconds: Seconds = defaultdict(float)
        rows: list[Row] = []
        for lot, answers in self._reader.lots(objects, seconds):
            rows += self.rows(lot, answers, seconds)
        tally = _tally(rows, objects, seconds) | self.summed_up(rows, objects)
        started = time.perf_counter()
        if not write_part(uri, rows, self.schema, tally, **self.write_options):
            # another attempt at this part, whose answer is lost, was quicker
            return (read_tally(uri) or tally) | {"reused": True}
        seconds["write"] = time.perf_counter() - started
        return tally | {"seconds": seconds, "reused": False}


def _tally(rows: Sequence[Row], objects: Sequence[FileInfo], seconds: Seconds) -> dict[str, Any]:
    rejected = Counter(row["error_code"] for row in rows if row["error_code"] is not None)
    return {
        "objects": len(objects),
        "frames": len(rows) - rejected.total(),
        "bytes": sum(info.size for info in objects),
        "labels": Counter(row["label"] for row in rows if row.get("label") is not None),
        "rejected": rejected,
        "seconds": dict(seconds),
    }
