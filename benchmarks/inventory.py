"""Measure what a night costs to find the new objects of an archive: an S3 Inventory joined with a table's key files.

python benchmarks/inventory.py --objects 2000000 [20000000] --new 1000 [--nights 10]

Makes, for each number of objects, an inventory (Parquet, as S3 writes it) and a results table with the key files of
all objects but the new ones, and runs the job on archives on it: Ray, its tasks, the worklist and the actors are those
of a night; only that the actors read and classify nothing. Prints seconds, objects per second, the peak memory of the
driver and of the largest task, and when the first shard of the worklist was sealed; then the same for the next night,
which is given the same inventory again. By these rates it prints what 10^8 and 10^9 objects take: two sizes tell what a
start costs from what an object costs, and what the key files cost that are read again in each round is measured apart.
The goals: with ten times as many objects the driver takes at most 1.1 times the memory, and an object 1.2 times the
time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import checkout  # noqa: F401 - makes `tools` importable
import numpy as np
import pyarrow as pa
import pyarrow.parquet

from btray import storage
from btray.bulk import table
from btray.bulk.config import ArchiveConfig
from btray.bulk.driver import ArchiveJob, run_archive
from btray.bulk.listing import join, new_objects
from btray.bulk.listing import tasks as tasks_module
from btray.bulk.listing.completed import CompletedIndex, RunKeys
from btray.bulk.listing.key_files import CLASSIFIED, FILE_RECORDS, FIRST_BYTES, RECORD, HeldKeys, KeySource, Records
from btray.bulk.listing.tasks import Tasks
from btray.bulk.report import PartTally, RunReport
from btray.bulk.runs import Run, run_folder
from btray.bulk.worker import Row, Seconds
from btray.data.key_set import keys_of
from btray.storage import FileInfo
from tools.processes import command_line, cpu_seconds, descendants

_MODEL = "benchmark"
_FILE_ROWS, _GROUP_ROWS = 1 << 21, 1 << 18  # of the inventory
_PART_OBJECTS = 32_768
_LOOK = 0.25  # seconds
_GET, _LIST, _INVENTORY = 0.0004 / 1000, 0.005 / 1000, 0.0025 / 1e6  # dollars: S3 Standard in us-east-1


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=int, nargs="+", default=[2_000_000])
    parser.add_argument("--new", type=int, default=1000)
    parser.add_argument("--nights", type=int, default=10, help="runs that have classified the others")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)  # this process is the job on an input and an output
    arguments = parser.parse_args()
    if arguments.run:
        run_archive(Listing(ArchiveConfig(input=arguments.run[0], output=arguments.run[1])))
        return
    results = {}
    for objects in arguments.objects:
        with tempfile.TemporaryDirectory(prefix="btray-inventory-") as folder:
            make(Path(folder), objects, objects - arguments.new, arguments.nights)
            results[f"{objects} objects"] = measured(Path(folder), objects)
            results[f"{objects} objects"]["the same again"] = measured(Path(folder), objects)
    print(json.dumps(results, indent=2))
    print(projection(results, arguments.new))


def projection(results: dict[str, dict[str, Any]], new: int) -> str:
    """Return a table of what a night takes at larger archives by the measured rates, here and on ten such nodes."""
    sizes = sorted((result["objects"], result["seconds"]) for result in results.values())
    (first, few), (last, many) = sizes[0], sizes[-1]
    each = (many - few) / (last - first) if last > first else many / last
    fixed, scan = max(0.0, many - each * last), scan_seconds()
    lines = [
        f"Measured: {1e6 * each:.2f} us per object and {fixed:.0f} s besides; {1e9 * scan:.0f} ns of CPU for a key in "
        f"a round; {new} new objects.",
        "",
        "| objects | nodes | time to find what is new | S3 requests | requests, $ | inventory, $ |",
        "|---|---|---|---|---|---|",
    ]
    for objects in (10**8, 10**9):
        for nodes in (1, 10):
            tasks = nodes * (os.cpu_count() or 1)
            minutes = (fixed + each * objects / nodes + scan * objects * _rounds(objects, tasks) / tasks) / 60
            gets, lists = _requests(objects, tasks)
            dollars = gets * _GET + lists * _LIST
            lines.append(
                f"| {objects:.0e} | {nodes} | {minutes:.0f} min | {gets + lists:,.0f} | {dollars:.2f} "
                f"| {objects * _INVENTORY:.2f} |"
            )
    return "\n".join(lines)


def _requests(objects: int, tasks: int) -> tuple[float, float]:
    """Return GETs and LISTs of a night: the inventory by column and row group, a piece of each key file, the table."""
    columns, groups = 5, objects / _GROUP_ROWS
    key_files, partitions = objects / FILE_RECORDS, min(FIRST_BYTES, tasks * tasks_module._PARTITIONS)
    gets = groups * (3 + columns) + key_files * (2 + _rounds(objects, tasks) * partitions)
    return gets, objects / _PART_OBJECTS / 1000


def _rounds(objects: int, tasks: int) -> int:
    """Return in how many rounds so many objects are joined."""
    rounds, size = 0, new_objects._FIRST_ROUND
    while objects > 0:
        objects, size = objects - size * tasks, min(4 * size, new_objects._LARGEST_ROUND)
        rounds += 1
    return rounds


def scan_seconds() -> float:
    """Return the CPU time that a task spends on each record of the key files of its partition, but for reading it."""
    random = np.random.default_rng(0)
    keys, each = np.frombuffer(random.bytes(16 << 20), "S16"), 1 << 16

    def records() -> Records:
        some = np.zeros(each, RECORD)
        some["key"] = np.frombuffer(random.bytes(16 * each), "S16")
        return some

    sources = [HeldKeys(records()) for _ in range(64)]
    began = time.process_time()
    join._completed(keys, sources[:1], 0, FIRST_BYTES, CLASSIFIED)
    once = time.process_time() - began
    join._completed(keys, sources, 0, FIRST_BYTES, CLASSIFIED)
    return (time.process_time() - began - 2 * once) / each / (len(sources) - 1)


# ---- the archive


def make(folder: Path, objects: int, done: int, nights: int) -> None:
    """Write an inventory, and the key files of `nights` runs that have classified all but the last objects."""
    random = np.random.default_rng(0)
    files: list[str] = []
    keys = (keys_of(list(zip(uris, etags, strict=True))) for uris, etags in _written(folder, objects, random, files))
    runs = [RunKeys(run_folder(str(folder / "table"), _MODEL, f"20260101T{night:06d}-aa")) for night in range(nights)]
    seen = 0
    for some in keys:
        records = np.zeros(max(0, min(len(some), done - seen)), RECORD)
        records["key"], records["outcome"], records["at"] = some[: len(records)], CLASSIFIED, 1
        seen += len(some)
        for run, share in zip(runs, np.array_split(records, nights), strict=True):
            run.add(share)
    parts = -(-done // (nights * _PART_OBJECTS))
    for night, run in enumerate(runs):
        run.conclude(parts)
        for part in range(parts):
            uri = storage.join(str(folder / "table"), table.folder(_MODEL, "2026-01-01"))
            storage.write_bytes(f"{uri}/part-20260101T{night:06d}-aa-{part:05d}-000.parquet", b"")
    manifest = {
        "destinationBucket": "arn:aws:s3:::archive",
        "fileFormat": "Parquet",
        "fileSchema": "Bucket, Key, Size, LastModifiedDate, ETag",
        "files": [{"key": file, "size": (folder / file).stat().st_size} for file in files],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def _written(
    folder: Path, objects: int, random: np.random.Generator, files: list[str]
) -> Iterator[tuple[list[str], list[str]]]:
    """Write the files of the inventory, add their names to `files`, and yield the objects of each."""
    for start in range(0, objects, _FILE_ROWS):
        numbers = range(start, min(objects, start + _FILE_ROWS))
        keys = [f"hospital/studies/{number // 200:07d}/series/{number:010d}.dcm" for number in numbers]
        etags = random.bytes(16 * len(keys)).hex()
        columns = {
            "bucket": pa.array(["archive"] * len(keys)),
            "key": pa.array(keys),
            "size": random.integers(20_000, 600_000, len(keys)),
            "last_modified_date": pa.array(np.full(len(keys), 1_760_000_000_000), pa.timestamp("ms")),
            "e_tag": pa.array([etags[place : place + 32] for place in range(0, len(etags), 32)]),
        }
        files.append(f"{start:010d}.parquet")
        pa.parquet.write_table(pa.table(columns), folder / files[-1], row_group_size=_GROUP_ROWS)
        yield [f"s3://archive/{key}" for key in keys], columns["e_tag"].to_pylist()


# ---- the job


class Marker:
    """What an actor makes of the objects of a part: a row each, and nothing is read."""

    schema = pa.schema({"uri": pa.string(), "etag": pa.string(), "error_code": pa.string()})
    write_options: dict[str, Any] = {}  # noqa: RUF012 - never changed
    tally_type = PartTally
    tally = staticmethod(PartTally.of)
    key_columns = ()

    def __init__(self, run: Run, cpus: int) -> None:
        """Need nothing."""

    def lots(self, objects: Sequence[FileInfo], seconds: Seconds) -> Iterator[Any]:
        """Yield all objects."""
        yield objects

    def rows(self, objects: Sequence[FileInfo], lot: Any, seconds: Seconds) -> list[Row]:
        """Return a row of each object."""
        return [{"uri": info.uri, "etag": info.etag, "error_code": None} for info in lot]

    def records(self, rows: Sequence[Row]) -> Records:
        """Say that all are classified."""
        records = np.zeros(len(rows), RECORD)
        records["key"] = keys_of([(row["uri"], row["etag"]) for row in rows])
        records["at"], records["outcome"] = int(1e6 * time.time()), CLASSIFIED
        return records


class Listing(ArchiveJob):
    """The job on archives, of which only the listing does what it always does."""

    name = "classify"
    schema = Marker.schema

    def __init__(self, config: ArchiveConfig) -> None:
        """Belong to the model of the table."""
        super().__init__(config, group=_MODEL)
        self.completed: CompletedIndex = CompletedIndex(self.output, _MODEL)

    def folder(self, run_date: str) -> str:
        """Return the folder of rows."""
        return table.folder(_MODEL, run_date)

    def outcomes(self, tasks: Tasks) -> Sequence[KeySource]:
        """Return what the key files say."""
        return self.completed.sources(tasks)

    def processor(self) -> Callable[[Run, int], Marker]:
        """Return what makes the processor of an actor."""
        return Marker

    def conclude(self, run: Run, report: RunReport) -> RunReport:
        """Say when the first shard was sealed, and end."""
        sealed = [info.modified for info in storage.list_files(run.worklist) if info.uri.endswith(".segment")]
        first = min(sealed, default=None)
        print(json.dumps({"new": report.objects, "unchanged": report.unchanged, "first_sealed": first}))
        return report


def measured(folder: Path, objects: int) -> dict[str, Any]:
    """Run the job in a process of its own; return what it took."""
    command = [sys.executable, __file__, "--run", str(folder / "manifest.json"), str(folder / "table")]
    began, started = time.time(), time.perf_counter()
    job = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    watch = Watch(job.pid)
    output, _ = job.communicate()
    seconds = time.perf_counter() - started
    watch.end()
    if job.returncode:
        sys.exit(job.returncode)
    told = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    return {
        "objects": objects,
        "new": told["new"],
        "unchanged": told["unchanged"],
        "seconds": round(seconds, 1),
        "objects_per_s": round(objects / seconds),
        "cpu_seconds": round(sum(watch.cpu.values()), 1),
        "cpu_us_per_object": round(1e6 * sum(watch.cpu.values()) / objects, 2),
        "first_shard_sealed_after_s": round(told["first_sealed"] - began, 1) if told["first_sealed"] else None,
        "driver_peak_mb": round(watch.peak[job.pid]),
        "task_peak_mb": round(max(watch.tasks.values(), default=0)),
    }


class Watch(threading.Thread):
    """Follows a process and all that it starts: CPU seconds by process, peak memory of it and of Ray's tasks, in MB."""

    def __init__(self, root: int) -> None:
        """Begin to look."""
        super().__init__(daemon=True)
        self._root, self._ended = root, threading.Event()
        self.cpu: dict[int, float] = {}
        self.peak: dict[int, float] = {}
        self.tasks: dict[int, float] = {}
        self.start()

    def run(self) -> None:
        """Look until the end; called by the thread."""
        while not self._ended.wait(_LOOK):
            for pid in (self._root, *descendants(self._root)):
                self.cpu[pid] = max(self.cpu.get(pid, 0.0), cpu_seconds(pid))
                self.peak[pid] = max(self.peak.get(pid, 0.0), _peak_mb(pid))
                if b"listing_task" in command_line(pid):
                    self.tasks[pid] = self.peak[pid]

    def end(self) -> None:
        """Look no more."""
        self._ended.set()
        self.join()


def _peak_mb(pid: int) -> float:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:  # the process has ended
        return 0.0
    return next((int(line.split()[1]) / 1000 for line in status.splitlines() if line.startswith("VmHWM")), 0.0)


if __name__ == "__main__":
    main()
