"""The rows of erased objects in the Parquet files of an output: found, chosen by SQL, and taken out file by file."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet

from btray import storage
from btray.bulk import table
from btray.bulk.erasure.erased import ErasedObjects
from btray.bulk.runs import TALLY
from btray.core.errors import UserError
from btray.data import packs
from btray.storage import FileInfo
from btray.storage.parquet import read_undamaged
from btray.storage.read_many import in_threads

_SMALL = 4 << 20  # bytes: files below it are read whole, with one request
_PARTITION = re.compile(r"/(model_id|run_date)=([^/]*)(?=/)")
_Result = TypeVar("_Result")


def read_files(
    files: Iterable[FileInfo], columns: Sequence[str], use: Callable[[FileInfo, pa.Table], _Result], damaged: list[str]
) -> Iterator[_Result]:
    """Yield what `use` makes of each file and those of `columns` that it has; damaged files are added to `damaged`."""

    def read(info: FileInfo) -> _Result | None:
        def read_columns(file: Any) -> pa.Table:
            parquet = pa.parquet.ParquetFile(file, pre_buffer=False)
            return parquet.read([name for name in columns if name in parquet.schema_arrow.names], use_threads=False)

        rows = read_undamaged(info.uri, read_columns, storage.read_bytes(info.uri) if info.size < _SMALL else None)
        return None if rows is None else use(info, rows)

    for info, result in in_threads(read, files):
        if result is None:
            damaged.append(info.uri)
        else:
            yield result


def select_uris(files: Iterable[FileInfo], condition: str, columns: Sequence[str]) -> set[str]:
    """Return the URIs of the rows of which a condition in DuckDB's SQL holds.

    Rows have `columns`, and `model_id` and `run_date` from the path; columns that a file lacks are null.

    Raises UserError if DuckDB does not take the condition.
    """
    import duckdb  # takes half a second to import, and the other ways to choose do without

    types = {field.name: field.type for field in table.SCHEMA}
    chosen: set[str] = set()
    with duckdb.connect(config={"enable_external_access": "false"}) as database:

        def select(uri: str, rows: pa.Table) -> None:
            for name in columns:
                if name not in rows.column_names:
                    rows = rows.append_column(name, pa.nulls(len(rows), types.get(name, pa.string())))
            partitions = dict(_PARTITION.findall(uri))
            for name in table.PARTITIONS.names:
                rows = rows.append_column(name, pa.array([partitions.get(name)] * len(rows), pa.string()))
            database.register("rows_of_file", rows)
            # on a line of its own, in case the condition ends with a comment
            found = database.execute(f"SELECT DISTINCT uri FROM rows_of_file WHERE ({condition}\n)").fetchall()  # noqa: S608
            chosen.update(uri for (uri,) in found)

        try:
            select("", pa.table({name: pa.array([], types.get(name, pa.string())) for name in columns}))
            for info, rows in read_files(files, columns, lambda info, rows: (info, rows), []):
                select(info.uri, rows)
        except duckdb.Error as error:
            raise UserError(f"--where {condition}: {' '.join(str(error).split())}") from error
    return chosen


def take_out(info: FileInfo, erased: ErasedObjects) -> None:
    """Write one file again, by one put, without the rows of erased objects."""
    rows = pa.parquet.read_table(pa.BufferReader(storage.read_bytes(info.uri)))
    kept = rows.filter(pa.array(~held(rows["uri"], erased)))
    metadata = rows.schema.metadata or {}
    if TALLY in metadata:
        tally = without_frames(json.loads(metadata[TALLY]), erased)
        kept = kept.replace_schema_metadata(metadata | {TALLY: json.dumps(tally)})
    options = packs.write_options(rows.schema) if "data" in rows.column_names else {}
    body = io.BytesIO()
    pa.parquet.write_table(kept, body, **{"compression": "zstd", **options})
    storage.write_bytes(info.uri, body.getvalue())


def held(uris: pa.ChunkedArray, erased: ErasedObjects) -> npt.NDArray[np.bool_]:
    """Return which URIs of a column [n] were erased; each is hashed once."""
    encoded = uris.combine_chunks().dictionary_encode()
    return erased.hold(encoded.dictionary.to_pylist())[encoded.indices.to_numpy()]


def without_frames(report: dict[str, Any], erased: ErasedObjects) -> dict[str, Any]:
    """Return a tally, or run.json, of whose frames that are shown to people those of erased objects are left out."""
    left = {}
    for name in {"least_certain", "most_tumor"} & report.keys():
        gone = erased.hold([frame["uri"] for frame in report[name]])
        left[name] = [frame for frame, erase in zip(report[name], gone, strict=True) if not erase]
    return report | left
