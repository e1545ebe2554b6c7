"""What became of the objects in a table: from the key files of its runs, which are few and large, else from the table.

A run's key files lie beside its run.json. The table stays the truth: they count only where it holds as many files of
that run as they were made of. Where a run that has ended has none, by an earlier version or a kill, they are made when
it is read.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from itertools import groupby, islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from btray import storage
from btray.bulk.outcomes import CLASSIFIED, RECORD, REJECTED, WITHHELD, Records, records
from btray.bulk.runs import has_ended, run_of
from btray.data.key_set import keys_of
from btray.storage import FileInfo
from btray.storage.errors import storage_errors_for

_FORMAT = 1  # of RECORD and of the digests in it
_INDEX = "keys.json"
_KEYS = "keys"
_FILE_RECORDS = 1 << 20

_COLUMNS = ["uri", "etag", "status", "retryable", "classified_at"]
_READERS = 16  # files at a time
_SMALL = 4 << 20  # bytes: files below it are read whole, with one request


def outcomes_of(table: str, run_folder: Callable[[str], str], *, note: bool) -> Iterator[Records]:
    """Records of all rows in the folder `table`, run by run; `run_folder` gives a run's own folder from its id.

    With `note` ended runs without key files get some. Memory holds some files at a time.
    """
    for run_id, files in groupby(_files(table), key=lambda info: run_of(info.uri)):
        if run_id is None:
            yield from _read(files)
        else:
            yield from _of_run(run_folder(run_id), files, lambda: of_run(table, run_id), note=note)  # noqa: B023


def _of_run(
    folder: str, files: Iterator[FileInfo], files_again: Callable[[], Iterator[FileInfo]], *, note: bool
) -> Iterator[Records]:
    index = _index(folder)
    if index is None and note and has_ended(folder):
        return note_keys(folder, files)
    if index is None:
        return _read(files)
    if sum(1 for _ in files) == index["files"]:
        return _noted(folder, index)
    return _read(files_again())  # somebody has removed some, so that their objects are classified again


def note_keys(folder: str, files: Iterator[FileInfo]) -> Iterator[Records]:
    """The records of a run's table `files`, of which its key files are made on the way, below its own `folder`."""
    held: list[Records] = []
    parts = count = 0

    def counted() -> Iterator[FileInfo]:
        nonlocal count
        for info in files:
            count += 1
            yield info

    for found in _read(counted()):
        yield found
        held.append(found)
        if sum(map(len, held)) >= _FILE_RECORDS:
            _write(folder, parts, held)
            held, parts = [], parts + 1
    if held:
        _write(folder, parts, held)
        parts += 1
    storage.write_json(storage.join(folder, _INDEX), {"format": _FORMAT, "files": count, "key_files": parts})


def of_run(table: str, run_id: str) -> Iterator[FileInfo]:
    """The files of one run in a folder of the table."""
    return (info for info in _files(table) if run_of(info.uri) == run_id)


def _index(folder: str) -> dict[str, Any] | None:
    with storage.suppress_missing():
        index: dict[str, Any] = storage.read_json(storage.join(folder, _INDEX))
        return index if index["format"] == _FORMAT else None
    return None


def _noted(folder: str, index: dict[str, Any]) -> Iterator[Records]:
    for number in range(index["key_files"]):
        yield np.load(io.BytesIO(storage.read_bytes(_key_file(folder, number))), allow_pickle=False)


def _write(folder: str, number: int, held: list[Records]) -> None:
    body = io.BytesIO()
    np.save(body, np.concatenate([*held, np.empty(0, RECORD)]))
    storage.write_bytes(_key_file(folder, number), body.getvalue())


def _key_file(folder: str, number: int) -> str:
    return storage.join(folder, _KEYS, f"{number:05d}.npy")


# ---- the table


def _files(folder: str) -> Iterator[FileInfo]:
    with storage.suppress_missing():
        yield from (info for info in storage.list_files(folder) if info.uri.endswith(".parquet"))


def _read(files: Iterator[FileInfo]) -> Iterator[Records]:
    """Records of the rows in files of the table."""
    with ThreadPoolExecutor(_READERS) as pool:
        while some := list(islice(files, 4 * _READERS)):
            # Arrow's own threads, and new ones, would not know how patient this one is with a store that is away
            reading = [pool.submit(copy_context().run, _records_of, info) for info in some]
            for read in reading:
                yield from read.result()


def _records_of(info: FileInfo) -> list[Records]:
    with storage_errors_for(info.uri), _opened(info) as file:
        table = pa.parquet.ParquetFile(file, pre_buffer=False)
        return [_records(batch) for batch in table.iter_batches(65_536, columns=_COLUMNS, use_threads=False)]


def _opened(info: FileInfo) -> Any:
    return pa.BufferReader(storage.read_bytes(info.uri)) if info.size < _SMALL else storage.open_ranges(info.uri)


def _records(rows: pa.RecordBatch) -> Records:
    keys = keys_of(list(zip(rows["uri"].to_pylist(), rows["etag"].to_pylist(), strict=True)))
    at = rows["classified_at"].cast(pa.timestamp("us", "UTC")).cast(pa.int64()).to_numpy()
    retryable = rows["retryable"].to_numpy(zero_copy_only=False)
    ok = pc.equal(rows["status"], "ok").to_numpy(zero_copy_only=False)
    return records(keys, at, np.where(ok, CLASSIFIED, np.where(retryable, WITHHELD, REJECTED)).astype(np.uint8))
