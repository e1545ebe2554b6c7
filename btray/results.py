"""The results table: one row a frame in Parquet files below `model_id=.../run_date=...`, each written by one put."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset

from btray import runs, storage
from btray.errors import UserError
from btray.keys import Keys
from btray.outcomes import CLASSIFIED, REJECTED, Outcomes
from btray.part_files import Product
from btray.runs import Run
from btray.settled import note_keys, of_run, outcomes_of
from btray.storage import FileInfo
from btray.storage_errors import typed

if TYPE_CHECKING:
    from btray.classifier import Prediction

SCHEMA = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("etag", pa.string(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("frame", pa.int32(), nullable=False),
        pa.field("study_uid", pa.string()),
        pa.field("series_uid", pa.string()),
        pa.field("instance_uid", pa.string()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error_code", pa.string()),
        pa.field("error", pa.string()),
        pa.field("retryable", pa.bool_(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("confidence", pa.float32()),
        pa.field("probabilities", pa.map_(pa.string(), pa.float32())),
        pa.field("abstained", pa.bool_(), nullable=False),
        pa.field("out_of_distribution", pa.bool_(), nullable=False),
        pa.field("ood_score", pa.float32()),
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("classified_at", pa.timestamp("us", "UTC"), nullable=False),
    ]
)
"""Columns of the files; `model_id` and `run_date` stand in their paths."""
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
        "frame": prediction.frame,
        "status": prediction.status,
        "error_code": prediction.error_code,
        "error": prediction.error,
        "retryable": prediction.retryable or prediction.error_code in RETRIED,
        "label": prediction.label,
        "confidence": prediction.confidence,
        "probabilities": list(prediction.probabilities.items()) if prediction.status == "ok" else None,
        "abstained": prediction.abstained,
        "out_of_distribution": prediction.out_of_distribution,
        "ood_score": prediction.ood_score,
        "run_id": run_id,
        "classified_at": classified_at,
    }


def product(model_id: str) -> Product:
    """The files of one model's rows."""
    return Product(
        folder=lambda run_date: f"model_id={model_id}/run_date={run_date}", schema=SCHEMA, part_objects=_PART_OBJECTS
    )


# ---- reading back


def current(uri: str, *, model_id: str | None = None, columns: Sequence[str] | None = None) -> pa.Table:
    """The latest row of each key (uri, frame, etag, model_id): what an analyst counts, with `model_id` and `run_date`.

    `model_id` and `columns` narrow it down; what is left is held in memory, so a table too large for that is better
    read with the view of docs/classify.md. Raises UserError where there is no table.
    """
    root = storage.resolve(uri)
    table = _dataset(root)
    if table is None:
        raise UserError(f"{root} holds no results; give the --output of a classify job.")
    wanted = list(dict.fromkeys([*KEY, "classified_at", "run_id", *(columns or table.schema.names)]))
    chosen = None if model_id is None else pc.field("model_id") == model_id
    with typed(root):
        rows = table.to_table(columns=wanted, filter=chosen)
    rows = rows.sort_by([("classified_at", "ascending"), ("run_id", "ascending")])
    numbered = rows.select(list(KEY)).append_column("row", pa.array(range(len(rows)), pa.int64()))
    latest = numbered.group_by(list(KEY)).aggregate([("row", "max")])["row_max"]
    return rows.take(latest.take(pc.sort_indices(latest))).select(list(columns or table.schema.names))


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


def _dataset(root: str) -> pa.dataset.Dataset | None:
    """The files below `root`, with the columns of their paths; None where there are none."""
    filesystem, path = storage.arrow_filesystem(root)
    with typed(root):
        try:
            found = pa.dataset.dataset(
                path,
                schema=pa.schema([*SCHEMA, *PARTITIONS]),
                filesystem=filesystem,
                format="parquet",
                partitioning=pa.dataset.partitioning(PARTITIONS, flavor="hive"),
                ignore_prefixes=[".", "_"],
            )
        except FileNotFoundError:
            return None
    return found if found.files else None
