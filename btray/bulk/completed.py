"""Which objects of a table are completed: from the key files of its runs, which are few and large, else from its rows.

A run's key files lie beside its run.json. The table stays the truth: they count only if it holds as many files of that
run as they were made of. If a run that has ended has none, because it was killed before it wrote them, they are made
when its rows are read.
"""

from __future__ import annotations

import io
import logging
import tempfile
from collections.abc import Iterator
from itertools import count, groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from btray import storage
from btray.bulk.runs import Run, folders, has_ended, run_folder, run_of
from btray.data.key_set import Keys, keys_of
from btray.storage import FileInfo, StorageError
from btray.storage.parquet import read_undamaged
from btray.storage.read_many import in_threads

_log = logging.getLogger(__name__)

CLASSIFIED, REJECTED, WITHHELD = range(3)
"""Outcomes, the better first: an answer, a final rejection, and a rejection that is due to the store, not the bytes."""

RECORD = np.dtype([("key", "S16"), ("at", "<i8"), ("outcome", "u1")])
"""One row of the table: key by `btray.data.key_set`, microseconds since 1970, and one of the outcomes."""
Records = npt.NDArray[np.void]

_FORMAT = 1  # of RECORD and of the digests in it
_INDEX = "keys.json"
_KEYS = "keys"
_FILE_RECORDS = 1 << 20

COLUMNS = ["uri", "etag", "status", "error_code", "error", "retryable", "classified_at"]
_SMALL = 4 << 20  # bytes: files below it are read whole, with one request

_IN_MEMORY = 1 << 20  # records
_PILES = 256


class CompletedIndex:
    """The outcomes of the objects that one model has classified, below the root `output` of a table."""

    def __init__(self, output: str, model_id: str) -> None:
        """Read nothing yet."""
        self._output = output
        self._model_id = model_id
        self._table = storage.join(output, f"model_id={model_id}")
        self.damaged: list[str] = []
        """Files that were found to be damaged; the objects that they held are not completed."""

    def keys(self, *, retry_rejected: bool = False, write_missing: bool = False) -> Iterator[Keys]:
        """Yield keys of the objects that need not be read again: last classified, or rejected for good.

        With `retry_rejected` only classified ones. With `write_missing` ended runs that have no key files get some,
        which needs the lease. The memory this takes does not grow with the table.
        """
        with tempfile.TemporaryDirectory() as scratch:
            latest = LatestOutcomes(Path(scratch))
            for run_id, files in groupby(table_files(self._table), key=lambda info: run_of(info.uri)):
                for records in self._read(files) if run_id is None else self._of_run(run_id, files, write_missing):
                    latest.add(records)
            yield from latest.keys(CLASSIFIED if retry_rejected else REJECTED)

    def write(self, run: Run) -> None:
        """Write the key files of a run all of whose files are there, so that later runs need not open those."""
        files = _files_of(storage.join(run.output, run.parts), run.run_id)
        for _ in self._write_key_files(run.folder, files):
            pass

    def _of_run(self, run_id: str, files: Iterator[FileInfo], write_missing: bool) -> Iterator[Records]:
        folder = run_folder(self._output, self._model_id, run_id)
        try:
            index = storage.read_json(storage.join(folder, _INDEX), missing_ok=True)
            if index is not None and index["format"] == _FORMAT:
                matches = sum(1 for _ in files) == index["files"]
                files = _files_of(self._table, run_id)
                if matches:
                    for number in range(index["key_files"]):
                        body = storage.read_bytes(_key_file(folder, number))
                        yield np.load(io.BytesIO(body), allow_pickle=False)
                    return
                # somebody has removed some, so that their objects are classified again
            else:
                index = None
        except (StorageError, ValueError, EOFError, KeyError, TypeError) as error:
            if isinstance(error, StorageError) and error.code not in {"failed", "not_found"}:
                raise
            _log.warning("the key files of %s are damaged and made anew: %s", folder, " ".join(str(error).split()))
            index = None
        # what came of damaged key files comes again, which does no harm
        if index is None and write_missing and has_ended(folder):
            yield from self._write_key_files(folder, files)
        else:
            yield from self._read(files)

    def _write_key_files(self, folder: str, files: Iterator[FileInfo]) -> Iterator[Records]:
        """Yield the records of a run's table `files`, and write them into key files below its own `folder` as well."""
        key_files, damaged_before = 0, len(self.damaged)
        numbers = count()
        for records in _concatenated(self._read(info for info, _ in zip(files, numbers, strict=False))):
            _write_records(_key_file(folder, key_files), records)
            key_files += 1
            yield records
        # last: key files without their index do not count
        index = {"format": _FORMAT, "files": next(numbers) - len(self.damaged) + damaged_before, "key_files": key_files}
        storage.write_json(storage.join(folder, _INDEX), index)

    def _read(self, files: Iterator[FileInfo]) -> Iterator[Records]:
        """Yield records of the rows in files of the table; memory holds some files at a time."""
        for info, records in in_threads(_read_file, files):
            if records is None:
                self.damaged.append(info.uri)
            else:
                yield from records


class LatestOutcomes:
    """The latest outcome of each key. Many records are kept in `folder`, in piles by the first byte of their keys."""

    def __init__(self, folder: Path) -> None:
        """Use `folder`, which is empty, once the records are too many for the memory."""
        self._folder = folder
        self._held: list[Records] = []
        self._count = 0

    def add(self, records: Records) -> None:
        """Add records, in any order."""
        self._held.append(records)
        self._count += len(records)
        if self._count >= _IN_MEMORY:
            self._spill()

    def keys(self, worst: int) -> Iterator[Keys]:
        """Yield the keys whose latest outcome is `worst` or better. Of two at the same moment the worse one counts."""
        if any(self._folder.iterdir()):
            self._spill()
            for pile in self._folder.iterdir():
                yield _keys_of_latest(np.fromfile(pile, RECORD), worst)
        elif self._held:
            yield _keys_of_latest(np.concatenate(self._held), worst)

    def _spill(self) -> None:
        records = np.concatenate([*self._held, np.empty(0, RECORD)])
        self._held, self._count = [], 0
        first_bytes: npt.NDArray[Any] = records.view(np.uint8).reshape(-1, RECORD.itemsize)[:, 0]
        order = np.argsort(first_bytes, kind="stable")
        ends = np.cumsum(np.bincount(first_bytes, minlength=_PILES))
        for number, some in enumerate(np.split(records[order], ends[:-1])):
            if len(some):
                with (self._folder / f"{number:03d}.pile").open("ab") as file:
                    some.tofile(file)


def _keys_of_latest(records: Records, worst: int) -> Keys:
    ordered = records[np.lexsort((records["outcome"], records["at"], records["key"]))]
    last = np.append(ordered["key"][1:] != ordered["key"][:-1], True)[: len(ordered)]
    keys: Keys = ordered["key"][last & (ordered["outcome"] <= worst)]
    return keys


# ---- key files


def _concatenated(parts: Iterator[Records]) -> Iterator[Records]:
    """Yield the same records, as many at a time as one key file holds."""
    held: list[Records] = []
    for records in parts:
        held.append(records)
        if sum(map(len, held)) >= _FILE_RECORDS:
            yield np.concatenate(held)
            held = []
    if held:
        yield np.concatenate(held)


def forget(output: str, keys: Keys) -> None:
    """Take keys out of all key files of a table."""
    for folder in folders(output):
        for name in storage.list_names(storage.join(folder, _KEYS), missing_ok=True):
            uri = storage.join(folder, _KEYS, name)
            records = np.load(io.BytesIO(storage.read_bytes(uri)), allow_pickle=False)
            kept = records[~np.isin(records["key"], keys)]
            if len(kept) < len(records):
                _write_records(uri, kept)


def _write_records(uri: str, records: Records) -> None:
    body = io.BytesIO()
    np.save(body, records)
    storage.write_bytes(uri, body.getvalue())


def _key_file(folder: str, number: int) -> str:
    return storage.join(folder, _KEYS, f"{number:05d}.npy")


# ---- the table


def table_files(folder: str) -> Iterator[FileInfo]:
    """Yield the files of the table below `folder`; below `_` is what is no data."""
    with storage.suppress_missing():
        for info in storage.list_files(folder):
            if info.uri.endswith(".parquet") and "/_" not in info.uri.removeprefix(folder):
                yield info


def _files_of(folder: str, run_id: str) -> Iterator[FileInfo]:
    return (info for info in table_files(folder) if run_of(info.uri) == run_id)


def _read_file(info: FileInfo) -> list[Records] | None:
    """Return the records of one file; None if it is damaged."""

    def read(file: Any) -> list[Records]:
        table = pa.parquet.ParquetFile(file, pre_buffer=False)
        return [records_of(batch) for batch in table.iter_batches(65_536, columns=COLUMNS, use_threads=False)]

    whole = storage.read_bytes(info.uri) if info.size < _SMALL else None
    return read_undamaged(info.uri, read, whole)


def etag_of_unselected(etag: str, reason: str) -> str:
    """Return the etag by which an object is completed that was left out: for the same reason alone."""
    return f"{etag}\0{reason}"


def records_of(rows: pa.RecordBatch) -> Records:
    """Return one record for each of some rows, which have COLUMNS."""
    records = np.empty(len(rows), RECORD)
    etags = rows["etag"].to_pylist()
    for number in np.flatnonzero(pc.equal(rows["error_code"], "not_selected").fill_null(False).to_numpy(False)):
        etags[number] = etag_of_unselected(etags[number], rows["error"][int(number)].as_py())
    records["key"] = keys_of(list(zip(rows["uri"].to_pylist(), etags, strict=True)))
    records["at"] = rows["classified_at"].cast(pa.timestamp("us", "UTC")).cast(pa.int64()).to_numpy()
    retryable = rows["retryable"].to_numpy(zero_copy_only=False)
    ok = pc.equal(rows["status"], "ok").to_numpy(zero_copy_only=False)
    records["outcome"] = np.where(ok, CLASSIFIED, np.where(retryable, WITHHELD, REJECTED))
    return records
