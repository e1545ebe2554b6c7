"""Which objects of a table are completed: from the key files of its runs, which are few and large, else from its rows.

A run's key files lie beside its run.json. The table stays the truth: they count only if it holds as many files of that
run as they were made of. If a run that has ended has none, because it was killed before it wrote them, they are made
when its rows are read.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from btray import storage
from btray.bulk.listing.key_files import (
    CLASSIFIED,
    FIRST_BYTES,
    RECORD,
    REJECTED,
    WITHHELD,
    KeyFile,
    KeyFileWriter,
    KeySource,
    Records,
    concatenated,
    key_file_uri,
    unselected,
    write_key_file,
)
from btray.bulk.listing.tasks import Tasks
from btray.bulk.runs import folders, has_ended, run_folder, run_of
from btray.bulk.table import table_files
from btray.data.key_set import Keys, keys_of
from btray.storage import FileInfo, StorageError
from btray.storage.parquet import read_undamaged
from btray.storage.read_many import in_threads

_log = logging.getLogger(__name__)

_FORMAT = 2  # of key files and of the digests in them
_INDEX = "keys.json"
_KEYS = "keys"

COLUMNS = ["uri", "etag", "status", "error_code", "error", "retryable", "classified_at"]
_SMALL = 4 << 20  # bytes: files below it are read whole, with one request


class CompletedIndex:
    """The outcomes of the objects that one model has classified, below the root `output` of a table."""

    def __init__(self, output: str, model_id: str) -> None:
        """Read nothing yet."""
        self._output = output
        self._model_id = model_id
        self._table = storage.join(output, f"model_id={model_id}")
        self.damaged: list[str] = []
        """Files that were found to be damaged; the objects that they held are not completed."""

    def sources(self, tasks: Tasks, *, write_missing: bool = False) -> list[KeySource]:
        """Return the outcomes of all objects: key files, and what `tasks` keep of the rows that have none.

        With `write_missing` ended runs that have no key files get some, which needs the lease. The memory this takes
        does not grow with the table.
        """
        files = self.table_files()
        sources: list[KeySource] = []
        without: set[str] = set()
        for run_id, key_files in in_threads(lambda run_id: self._key_files(run_id, files[run_id]), files):
            sources += key_files or ()
            if key_files is None:
                without.add(run_id)
        for run_id in without:
            rows = self._read(info for info in table_files(self._table) if (run_of(info.uri) or "") == run_id)
            folder = run_folder(self._output, self._model_id, run_id)
            if run_id and write_missing and has_ended(folder):
                damaged_before = len(self.damaged)
                writer = RunKeys(folder)
                for records in rows:
                    writer.add(records)
                writer.conclude(files[run_id] - len(self.damaged) + damaged_before)
                sources += _open(folder, writer.files)
            else:
                sources += map(tasks.keep, concatenated(rows))
        return sources

    def table_files(self) -> Counter[str]:
        """Return how many files of the table each run has written; those that no run wrote are counted under ""."""
        return Counter(run_of(info.uri) or "" for info in table_files(self._table))

    def _key_files(self, run_id: str, files: int) -> list[KeyFile] | None:
        """Return the key files of a run that has so many `files` in the table; None if there are none that count."""
        if not run_id:
            return None
        folder = run_folder(self._output, self._model_id, run_id)
        try:
            index = storage.read_json(storage.join(folder, _INDEX), missing_ok=True)
            # Fewer files: somebody has removed some, so that their objects are classified again.
            if index is None or index["format"] != _FORMAT or index["files"] != files:
                return None
            return _open(folder, index["key_files"])
        except (StorageError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, StorageError) and error.code not in {"failed", "not_found"}:
                raise
            _log.warning("the key files of %s are damaged and made anew: %s", folder, " ".join(str(error).split()))
            return None

    def _read(self, files: Iterable[FileInfo]) -> Iterator[Records]:
        """Yield records of the rows in files of the table; memory holds some files at a time."""
        for info, records in in_threads(_read_file, files):
            if records is None:
                self.damaged.append(info.uri)
            else:
                yield from records


class RunKeys(KeyFileWriter):
    """Writes the key files of one run, and last their index, without which they do not count."""

    def __init__(self, folder: str) -> None:
        """Write below the `folder` of a run."""
        super().__init__(storage.join(folder, _KEYS))
        self._run = folder

    def conclude(self, files: int) -> None:
        """Write what is left, and that it all is of so many `files` of the table."""
        self.flush()
        index = {"format": _FORMAT, "files": files, "key_files": self.files}
        storage.write_json(storage.join(self._run, _INDEX), index)


def _open(folder: str, count: int) -> list[KeyFile]:
    """Open the first `count` key files of a run."""
    uris = (key_file_uri(storage.join(folder, _KEYS), number) for number in range(count))
    return [key_file for _, key_file in in_threads(lambda uri: KeyFile.open(storage.describe(uri)), uris)]


def forget(output: str, keys: Keys) -> None:
    """Take keys out of all key files of a table."""
    for folder in folders(output):
        for name in storage.list_names(storage.join(folder, _KEYS), missing_ok=True):
            uri = storage.join(folder, _KEYS, name)
            if not uri.endswith(".keys"):
                storage.delete(uri)  # of an older format: the next run makes it anew of the rows that are left
                continue
            records = KeyFile.open(storage.describe(uri)).read(0, FIRST_BYTES)
            kept = records[~np.isin(records["key"], keys)]
            if len(kept) < len(records):
                write_key_file(uri, kept)


# ---- the table


def _read_file(info: FileInfo) -> list[Records] | None:
    """Return the records of one file; None if it is damaged."""

    def read(file: Any) -> list[Records]:
        table = pa.parquet.ParquetFile(file, pre_buffer=False)
        return [records_of(batch) for batch in table.iter_batches(65_536, columns=COLUMNS, use_threads=False)]

    whole = storage.read_bytes(info.uri) if info.size < _SMALL else None
    return read_undamaged(info.uri, read, whole)


def records_of(rows: pa.RecordBatch) -> Records:
    """Return one record for each of some rows, which have COLUMNS."""
    records = np.empty(len(rows), RECORD)
    keys = keys_of(list(zip(rows["uri"].to_pylist(), rows["etag"].to_pylist(), strict=True)))
    for number in np.flatnonzero(pc.equal(rows["error_code"], "not_selected").fill_null(False).to_numpy(False)):
        keys[number] = unselected(keys[number : number + 1], rows["error"][int(number)].as_py())[0]
    records["key"] = keys
    records["at"] = rows["classified_at"].cast(pa.timestamp("us", "UTC")).cast(pa.int64()).to_numpy()
    retryable = rows["retryable"].to_numpy(zero_copy_only=False)
    ok = pc.equal(rows["status"], "ok").to_numpy(zero_copy_only=False)
    records["outcome"] = np.where(ok, CLASSIFIED, np.where(retryable, WITHHELD, REJECTED))
    return records
