"""The results table as it is written: one row a frame in Parquet files below `model_id=.../run_date=...`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from btray import storage
from btray.bulk import runs
from btray.bulk.completed import note_keys, of_run, outcomes_of
from btray.bulk.outcomes import CLASSIFIED, REJECTED, Outcomes
from btray.bulk.part_files import Product
from btray.bulk.runs import Run
from btray.data.key_set import Keys
from btray.model.prediction import ADDED, COLUMNS, Prediction, arrow_field, as_row
from btray.storage import FileInfo

SCHEMA = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("etag", pa.string(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        arrow_field("frame"),
        pa.field("study_uid", pa.string()),
        pa.field("series_uid", pa.string()),
        pa.field("instance_uid", pa.string()),
        *(arrow_field(name) for name in COLUMNS if name != "frame" and name not in ADDED),
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("classified_at", pa.timestamp("us", "UTC"), nullable=False),
        *(arrow_field(name) for name in ADDED),
    ]
)
"""Columns of the files, in their order; `model_id` and `run_date` stand in their paths."""
PARTITIONS = pa.schema([("model_id", pa.string()), ("run_date", pa.string())])
KEY = ("uri", "frame", "etag", "model_id")

RETRIED = frozenset({"not_found", "forbidden", "throttled", "unavailable", "changed"})
"""Codes of rejections that say something of the store or of its permissions, not of the bytes: a later run tries again.

A run's prediction is not retryable where the object is missing or forbidden, since asking again at once is useless."""

_PART_OBJECTS = 512


def row_of(prediction: Prediction, info: FileInfo, *, run_id: str, classified_at: datetime) -> dict[str, Any]:
    """What the table holds of one frame, or of one object that gave none; all but `model_id` and `run_date`."""
    return {
        "uri": info.uri,
        "etag": info.etag,
        "size": info.size,
        **as_row(prediction),
        "retryable": prediction.retryable or prediction.error_code in RETRIED,
        "run_id": run_id,
        "classified_at": classified_at,
    }


def product(model_id: str) -> Product:
    """The files of one model's rows."""
    return Product(
        folder=lambda run_date: f"model_id={model_id}/run_date={run_date}", schema=SCHEMA, part_objects=_PART_OBJECTS
    )


# ---- what of it is done


def done_keys(output: str, model_id: str, *, retry_rejected: bool = False, note: bool = False) -> Iterator[Keys]:
    """Keys of the objects that need not be read again for this model: at last classified, or rejected for good.

    With `retry_rejected` only classified ones; with `note` ended runs that have no key files get some, which needs the
    lease. The memory this takes does not grow with the table.
    """
    with tempfile.TemporaryDirectory() as scratch:
        outcomes = Outcomes(Path(scratch))
        table = storage.join(output, f"model_id={model_id}")
        for found in outcomes_of(table, lambda run_id: runs.folder_of(output, model_id, run_id), note=note):
            outcomes.add(found)
        yield from outcomes.settled(CLASSIFIED if retry_rejected else REJECTED)


def note_done(run: Run) -> None:
    """Leave key files of a run all of whose files are there, so that later nights need not open those."""
    for _ in note_keys(run.folder, of_run(storage.join(run.output, run.parts), run.run_id)):
        pass
