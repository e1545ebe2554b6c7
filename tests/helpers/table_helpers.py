"""Rows of the results table, and tables made of them by hand."""

from __future__ import annotations

import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from btray import results, storage
from btray.bulk import table
from btray.bulk.listing.archive import Archive
from btray.bulk.listing.completed import CompletedIndex
from btray.bulk.listing.key_files import CLASSIFIED, REJECTED
from btray.bulk.listing.new_objects import NewObjects
from btray.bulk.listing.objects import chunks_of
from btray.bulk.listing.tasks import LocalTasks
from btray.bulk.report import PartTally
from btray.bulk.runs import write_part
from btray.model.prediction import Prediction
from btray.storage import FileInfo

NIGHT = datetime(2026, 11, 22, 2, tzinfo=UTC)


def row(
    name: str, code: str | None = None, *, night: int = 0, frame: int = 0, label_set: tuple[str, ...] = ()
) -> dict[str, Any]:
    info = FileInfo(f"s3://b/{name}", 7, "e", 0.0)
    answer = {"label": "glioma", "confidence": 0.75, "probabilities": {"glioma": 0.75, "no_tumor": 0.25}}
    rejection = {"status": "rejected", "error_code": code, "error": "why"}
    fields: dict[str, Any] = rejection if code else answer | {"label_set": label_set}
    at = NIGHT + timedelta(days=night)
    return table.row_of(Prediction(index=0, frame=frame, **fields), info, run_id=f"{at:%Y%m%d}", classified_at=at)


def write(place: str, name: str, *rows: dict[str, Any], model: str = "1e10") -> bool:
    uri = storage.join(place, table.folder(model, "2026-11-22"), f"{name}.parquet")
    return write_part(uri, rows, table.SCHEMA, PartTally(objects=len(rows)))


def done_of(place: str, *, retry_rejected: bool = False, write_missing: bool = False) -> set[str]:
    """Names of the objects of the table that no later run reads again."""
    with tempfile.TemporaryDirectory() as scratch:
        tasks = LocalTasks(Path(scratch))
        sources = CompletedIndex(place, "1e10").sources(tasks, write_missing=write_missing)
        names = {uri.rpartition("/")[2] for uri in results.current(place)["uri"].to_pylist()} | {"new"}
        listed = [FileInfo(f"s3://b/{name}", 7, "e", 0.0) for name in names]
        new = NewObjects(sources, tasks, scratch, worst=CLASSIFIED if retry_rejected else REJECTED)
        found = {info.uri.rpartition("/")[2] for some in new.among(Archive(chunks_of(listed))) for info in some}
    assert new.unchanged == len(names) - len(found)
    return names - found


def write_a_table_of_many_nights(place: str) -> None:
    """Objects whose rows of several nights differ: classified again, then withheld, then classified; with frames."""
    write(
        place, "1", *(row("pages", frame=frame) for frame in range(3)), row("once"), row("hidden"), row("bad", "empty")
    )
    write(place, "3", row("pages", "throttled", night=2), row("hidden", "throttled", night=2), row("bad", night=2))
    write(place, "2", *(row("pages", frame=frame, night=1) for frame in range(2)), row("back", "unavailable", night=1))
    write(place, "4", row("back", night=3), *(row("grown", frame=frame, night=3) for frame in range(2)))
    write(place, "0", row("grown", "forbidden"), row("lost", night=4), row("lost", "truncated", night=5))
