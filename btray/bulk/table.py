"""The rows of the results table as they are written; `btray.results` says what its columns are."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any

from btray import storage
from btray.model.prediction import Prediction, as_row
from btray.results import KEY, PARTITIONS, SCHEMA
from btray.storage import FileInfo

__all__ = ["KEY", "PARTITIONS", "RETRIED", "SCHEMA", "folder", "row_of", "table_files"]

RETRIED = frozenset({"not_found", "forbidden", "archived", "withheld", "throttled", "unavailable", "changed"})
"""Codes of rejections that are due to the store or its permissions, not to the bytes: a later run tries again.

The prediction itself is not retryable if the object is missing or forbidden, since another try at once is useless."""


def folder(model_id: str, run_date: str) -> str:
    """Return the folder of a model's files, below the table's root, of runs that began on a day (YYYY-MM-DD, UTC)."""
    return f"model_id={model_id}/run_date={run_date}"


def row_of(prediction: Prediction, info: FileInfo, *, run_id: str, classified_at: datetime) -> dict[str, Any]:
    """Return the row of one frame, or of one object that gave none; `model_id` and `run_date` stand in the path."""
    return {
        "uri": info.uri,
        "etag": info.etag,
        "size": info.size,
        **as_row(prediction),
        "retryable": prediction.retryable or prediction.error_code in RETRIED,
        "run_id": run_id,
        "classified_at": classified_at,
    }


def table_files(folder: str) -> Iterator[FileInfo]:
    """Yield the files of the table below `folder`; below `_` is what is no data."""
    with storage.suppress_missing():
        for info in storage.list_files(folder):
            if info.uri.endswith(".parquet") and "/_" not in info.uri.removeprefix(folder):
                yield info
