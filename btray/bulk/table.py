"""The results table as it is written: one row per frame in Parquet files below `model_id=.../run_date=...`."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from btray.storage import FileInfo

if TYPE_CHECKING:
    from btray.model.classifier import Prediction

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


def folder(model_id: str, run_date: str) -> str:
    """Return the folder of a model's files, below the table's root, of runs that began on a day (YYYY-MM-DD, UTC)."""
    return f"model_id={model_id}/run_date={run_date}"


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
