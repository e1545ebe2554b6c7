"""What classify has written: the results table, one row per frame, and the table of series and studies.

Both are Parquet files below `model_id=...`, each written by one put.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from btray import storage
from btray.core.errors import UserError
from btray.data.slice_facts import UIDS
from btray.model.prediction import ADDED, COLUMNS, arrow_field
from btray.storage.errors import storage_errors_for

SCHEMA = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("etag", pa.string(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        arrow_field("frame"),
        *(arrow_field(name) for name in UIDS),
        *(arrow_field(name) for name in COLUMNS if name not in ("frame", *UIDS, *ADDED)),
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("classified_at", pa.timestamp("us", "UTC"), nullable=False),
        *(arrow_field(name) for name in ADDED),
    ]
)
"""Columns of the files, in their order; `model_id` and `run_date` stand in their paths."""
PARTITIONS = pa.schema([("model_id", pa.string()), ("run_date", pa.string())])
KEY = ("uri", "frame", "etag", "model_id")


def current(uri: str, *, model_id: str | None = None, columns: Sequence[str] | None = None) -> pa.Table:
    """Return the latest row of each key (uri, frame, etag, model_id), with `model_id` and `run_date`.

    `model_id` and `columns` narrow it down; what is left is held in memory, so a table too large for that is better
    read with the view of docs/classify.md. Raises UserError if there is no table.
    """
    from pyarrow import dataset  # it loads pandas, which nobody needs who only writes

    root = storage.resolve(uri)
    filesystem, path = storage.arrow_filesystem(root)
    with storage_errors_for(root):
        try:
            table = dataset.dataset(
                path,
                # older files lack the columns that were added since: they are null
                schema=pa.schema([*SCHEMA, *PARTITIONS]),
                filesystem=filesystem,
                format="parquet",
                partitioning=dataset.partitioning(PARTITIONS, flavor="hive"),
                ignore_prefixes=[".", "_"],
            )
        except FileNotFoundError:
            table = None
        if table is None or not table.files:
            raise UserError(f"{root} holds no results; give the --output of a classify job.")
        needed = list(dict.fromkeys([*KEY, "classified_at", "run_id", *(columns or table.schema.names)]))
        chosen = None if model_id is None else pc.field("model_id") == model_id
        rows = table.to_table(columns=needed, filter=chosen)
    rows = rows.sort_by([("classified_at", "ascending"), ("run_id", "ascending")])
    numbered = rows.select(list(KEY)).append_column("row", pa.array(range(len(rows)), pa.int64()))
    latest = numbered.group_by(list(KEY)).aggregate([("row", "max")])["row_max"]
    return rows.take(latest.take(pc.sort_indices(latest))).select(list(columns or table.schema.names))


def studies(uri: str, model_id: str) -> Iterator[pa.Table]:
    """Yield the table of series and studies of one model, file by file: all rows of a study are next to each other."""
    folder = storage.join(storage.resolve(uri), f"model_id={model_id}")
    with storage.suppress_missing():
        for info in storage.list_files(folder):
            yield pa.parquet.read_table(pa.BufferReader(storage.read_bytes(info.uri)))
