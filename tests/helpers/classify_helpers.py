"""Archives with good and bad objects, and a job on them in a process of its own that can be killed."""

from __future__ import annotations

import gzip
import io
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import UTC, datetime
from multiprocessing.process import BaseProcess
from pkgutil import resolve_name
from threading import Lock
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote_plus

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
import ray

from btray import phantoms, storage
from btray.bulk import runs, table, worklist
from btray.bulk.classify_worker import PartClassifier
from btray.bulk.config import ArchiveConfig, ClassifyConfig
from btray.bulk.driver import ArchiveJob, Done
from btray.bulk.listing.completed import records_of
from btray.bulk.listing.sealing import Listing
from btray.bulk.report import ClassifyTally, PartTally, RunReport, Totals
from btray.bulk.runs import RUN, Run
from btray.bulk.worker import PartActor, ReadActor, objects_of
from btray.launch import COMMANDS
from btray.model.bundle import load_bundle
from btray.model.drift import Profile
from btray.model.prediction import Prediction
from btray.storage import FileInfo, lease
from tests.helpers.scan_corpus import bad_scans, good_scans
from tools.processes import named, until

Contents = dict[str, bytes]

_IN_PARQUET = {
    "Bucket": "bucket",
    "Key": "key",
    "IsLatest": "is_latest",
    "IsDeleteMarker": "is_delete_marker",
    "Size": "size",
    "LastModifiedDate": "last_modified_date",
    "ETag": "e_tag",
}
FIELDS = tuple(_IN_PARQUET)
"""Of an inventory."""

QUICK_LEASE = (0.5, 4.0)
"""Seconds between signs of life and until a killed driver counts as dead."""

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["btray.bulk.classify", "tests.helpers.classify_helpers"])


def mixed_objects(good: int) -> Contents:
    """`good` small phantoms, and a bad object of every kind there is, spread among them; one scan has pages."""
    pictures = [phantoms.encoded_phantom("glioma", seed) for seed in range(12)]
    objects = {f"day/{number:04d}.jpg": pictures[number % len(pictures)] for number in range(good)}
    for number, (name, (data, _)) in enumerate(bad_scans().items()):
        objects[f"day/{number * max(1, good // len(bad_scans())):04d} {name}"] = data
    return objects | {"pages.tif": good_scans()["tiff_pages"]}


def write_objects(root: str, objects: Contents) -> None:
    for name, data in objects.items():
        storage.write_bytes(storage.join(root, name), data)


def write_inventory(bucket: str, kind: str, rows: list[dict[str, Any]], *, fields: tuple[str, ...] = FIELDS) -> str:
    """An S3 Inventory report on objects of `bucket`, as S3 writes it; its URI. What rows leave out is usual."""
    name, usual = bucket.removeprefix("s3://"), {"IsLatest": True, "IsDeleteMarker": False, "Size": 7, "ETag": "e"}
    full = [usual | {"Bucket": name, "LastModifiedDate": "2026-11-01T00:00:00.000Z"} | row for row in rows]
    body = io.BytesIO()
    if kind == "Parquet":
        columns: dict[str, Any] = {_IN_PARQUET[field]: [row[field] for row in full] for field in fields}
        times = [datetime.fromisoformat(time) for time in columns["last_modified_date"]]
        pq.write_table(pa.table(columns | {"last_modified_date": pa.array(times, pa.timestamp("ms"))}), body)
    else:
        encoded = [row | {"Key": quote_plus(row["Key"])} for row in full]
        lines = [",".join(f'"{"" if row[field] is None else row[field]}"' for field in fields) for row in encoded]
        body.write(gzip.compress("\n".join(lines).encode()))
    file = f"inventory/data/1.{'parquet' if kind == 'Parquet' else 'csv.gz'}"
    storage.write_bytes(storage.join(bucket, file), body.getvalue())
    report = {
        "sourceBucket": name,
        "destinationBucket": f"arn:aws:s3:::{name}",
        "fileFormat": kind,
        "fileSchema": ", ".join(fields),
        "files": [{"key": file, "size": len(body.getvalue())}],
    }
    manifest = storage.join(bucket, "inventory", "manifest.json")
    storage.write_json(manifest, report)
    return manifest


def job(model: str, source: str, output: str, **changes: Any) -> ClassifyConfig:
    """With one actor unless said otherwise: starting them is what takes time."""
    return ClassifyConfig(**{"model": model, "input": source, "output": output, "actors": 1, **changes})


def run_report(**changes: Any) -> RunReport:
    """Return the report of a run that did nothing, but for `changes`."""
    facts: dict[str, Any] = {"run_id": "run", "started_at": "", "ended_at": "", "resumed": False, "config": {}}
    return Totals(PartTally).report(unchanged=0, **facts).model_copy(update=changes)


def plain_rows(output: str) -> pa.Table:
    """What a reader sees that knows nothing of this project, whether it skips names that begin with _ or takes all."""
    filesystem, path = storage.arrow_filesystem(output)
    files = filesystem.get_file_info(pa.fs.FileSelector(path, recursive=True))
    table = pq.ParquetDataset(path, filesystem=filesystem)  # has more files if a run has written since
    assert {file.path for file in files if file.path.endswith(".parquet")} <= {*table.files}
    return table.read()


def report_of(output: str) -> dict[str, Any]:
    """Return run.json of the latest run."""
    uris = [
        storage.join(output, "_runs", model, run, RUN)
        for model in storage.list_names(storage.join(output, "_runs"))
        for run in storage.list_names(storage.join(output, "_runs", model))
    ]
    report: dict[str, Any] = storage.read_json(max(uris, key=lambda uri: uri.split("/")[-2]))
    return report


def keys_of(rows: pa.Table) -> list[tuple[str, int]]:
    return sorted(zip(rows["uri"].to_pylist(), rows["frame"].to_pylist(), strict=True))


def part_classifier(patch: pytest.MonkeyPatch, model: str, *, cpus: int = 1, **changes: Any) -> PartClassifier:
    """Return what classifies in an actor of the job, in this process; `changes` replace settings."""
    patch.setattr("btray.bulk.classify_worker.logs.begin_in_worker", lambda *_, **__: None)
    run = Run(run_id="run", group="model", parts="parts", output="out", request={})
    config = job(model, "in", "out", **{"engine": "eager", "threads": 4, "patience": 1.0, **changes})
    return PartClassifier(config, load_bundle(model).manifest.model_id, None, run, cpus)


def without_ray(patch: pytest.MonkeyPatch) -> None:
    """Let jobs work on their parts in this process, one after the other: all of a run but what Ray does."""

    def bare(kind: type, run: Run, **attributes: Any) -> Any:
        actor = kind.__new__(kind)
        vars(actor).update(run=run, _patience=1.0, _died_before=False, **attributes)
        return actor

    def process(job: ArchiveJob, run: Run, done: Done, listing: Listing, check: Callable[[], None]) -> None:
        listing.join()
        writer, make_reader = bare(PartActor, run, processor=job.processor()(run, 1)), job.reader()
        reader = make_reader and bare(ReadActor, run, reader=make_reader(run), _decoding=Lock())
        for parts in worklist.read_parts(run.worklist):
            for row in writer(reader(parts) if reader else parts).to_pylist():
                done.add(row)

    patch.setattr("btray.bulk.driver._process", process)
    for module in ("btray.bulk.classify_worker.logs", "btray.core.logs"):
        patch.setattr(f"{module}.begin_in_worker", lambda *_, **__: None)


def interrupt_after(patch: pytest.MonkeyPatch, parts: int) -> list[str]:
    """Interrupt a job on its next part after so many; return the files of these, as they come."""
    make, made = PartActor._part, list[str]()

    def part(actor: PartActor, uri: str, *more: Any) -> Any:
        if len(made) == parts:
            raise KeyboardInterrupt
        made.append(uri)
        return make(actor, uri, *more)

    patch.setattr(PartActor, "_part", part)
    return made


def without_reading(patch: pytest.MonkeyPatch, code_of: Callable[[FileInfo], str | None] = lambda info: None) -> None:
    """Let the classify job give each object a row without reading it: an answer, or a rejection with its code."""

    def row_of(info: FileInfo, run: Run, at: datetime) -> dict[str, Any]:
        code = code_of(info)
        answer = {"label": "glioma", "confidence": 0.75, "probabilities": {"glioma": 0.75, "no_tumor": 0.25}}
        rejection = {"status": "rejected", "error_code": code, "error": code}
        fields: dict[str, Any] = rejection if code else answer
        return table.row_of(Prediction(index=0, **fields), info, run_id=run.run_id, classified_at=at)

    def parts_of(run: Run) -> Iterator[pa.Table]:
        for part in worklist.read_parts(run.worklist):
            objects = objects_of(part.to_pylist()[0])
            rows = [row_of(info, run, datetime.now(UTC)) for info in objects]
            answered = [row for row in rows if row["label"]]
            labels = Counter(row["label"] for row in answered)
            tally = ClassifyTally.of(rows, objects, {}, labels=labels, profile=Profile.of(answered))
            runs.write_part(run.part_uri(part["part"][0].as_py()), rows, table.SCHEMA, tally)
            records = records_of(pa.RecordBatch.from_pylist(rows, table.SCHEMA)).tobytes()
            yield pa.table({"part": part["part"], "tally": [tally.model_dump_json()], "records": [records]})

    def processed(make: Any, run: Run, **how: Any) -> Any:
        return SimpleNamespace(iter_batches=lambda **how: parts_of(run))

    patch.setattr("btray.core.cluster.connected", lambda **options: nullcontext())
    patch.setattr("btray.bulk.pipeline.process_parts", processed)


# ---- killing


def start(config: ArchiveConfig, *, address: str | None = None, uses_ray: bool = True) -> BaseProcess:
    """The job as a driver of its own, on the test's Ray cluster or that at `address`, or `without_ray`."""
    if uses_ray:
        address = address or ray.get_runtime_context().gcs_address
    process = _forks.Process(target=_drive, args=(config, address, dict(os.environ)))
    process.start()
    return process


def _drive(config: ArchiveConfig, address: str | None, environment: dict[str, str]) -> None:
    (function,) = (function for kind, function in COMMANDS.values() if kind is type(config))
    os.environ.update(environment | ({"RAY_ADDRESS": address} if address else {}))
    if address is None:
        without_ray(pytest.MonkeyPatch())
    lease.HEARTBEAT, lease.EXPIRY = QUICK_LEASE
    storage.reconnect()
    resolve_name(function)(config)


def classify_killed_thrice(
    patch: pytest.MonkeyPatch, config: ClassifyConfig, look: Callable[[], None] = lambda: None, *, uses_ray: bool = True
) -> None:
    """Run the job to its end in this process after three drivers were killed, the first just after an actor of its own.

    Each is killed when it has written a part, or some moments later; what readers see just before is `look`'s to check.
    """
    from btray.bulk.classify import classify

    patch.setattr(lease, "EXPIRY", QUICK_LEASE[1])
    chance = random.Random(5)
    for number in range(3):
        before = len(part_files(config.output))
        driver = start(config, uses_ray=uses_ray)
        until(lambda: len(part_files(config.output)) > before or not driver.is_alive(), "a part")  # noqa: B023
        time.sleep(chance.random() / 5)
        look()
        assert driver.is_alive(), "it ended before it could be killed: give it more to do"
        if uses_ray and number == 0:
            os.kill(chance.choice(until(actors)), signal.SIGKILL)
            time.sleep(chance.random() / 5)
        driver.kill()
        driver.join()
    if not uses_ray:
        without_ray(patch)
    classify(config)


def actors(kind: str = "PartActor") -> list[int]:
    """Process ids of the actors of this test's own cluster that classify, or of those that only read."""
    return named(kind.encode(), os.getpid())


def part_files(output: str) -> list[str]:
    try:
        return [info.uri for info in storage.list_files(output) if info.uri.endswith(".parquet")]
    except storage.StorageError:
        return []
