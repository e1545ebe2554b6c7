"""Inputs that could not be used: named in the log, listed in a file, counted against a limit."""

from __future__ import annotations

import csv
import io
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from btray.core.errors import ThresholdExceeded, UserError
from btray.core.notice import percent
from btray.data.frames import FRAMES_PER_SCAN

_log = logging.getLogger(__name__)

_NAMED = 20
REJECTED = "rejected.csv"


def rejections_in(survey: pa.Table) -> pa.Table:
    """Return the rejected rows of what `feeds.survey` gives, with columns row, code, message."""
    bad = survey.filter(pc.not_equal(survey["code"], ""))
    return pa.table(
        {"row": bad["sample"].to_numpy() // FRAMES_PER_SCAN, "code": bad["code"], "message": bad["message"]}
    )


def report_rejections(rejected: pa.Table, table: pa.Table) -> None:
    """Log which inputs of `table` were rejected (columns row, code, message), the first ones by name."""
    entries = rejected.to_pylist()
    for entry in entries[:_NAMED]:
        _log.warning("rejected: %s (%s): %s", table["uri"][entry["row"]], entry["code"], entry["message"])
    if len(entries) > _NAMED:
        _log.warning("... and %d more; all are in %s", len(entries) - _NAMED, REJECTED)


def rejections_csv(rejected: pa.Table, table: pa.Table) -> bytes:
    """Return a CSV file of every rejected input with its code and the reason."""
    rows = [(table["uri"][entry["row"]].as_py(), entry["code"], entry["message"]) for entry in rejected.to_pylist()]
    return as_csv(("uri", "error_code", "error"), rows)


def require_found(codes: Iterable[str] | Mapping[str, int], total: int, source: str) -> None:
    """Raise UserError if not one of the `total` inputs that `source` names is there; `codes` as below."""
    if total and Counter(codes)["not_found"] == total:
        raise UserError(
            f"{source}: not one of the {total} files that it names was found; check how they are spelt, and where "
            "relative names start: at the folder of the list"
        )


def enforce_max_rejected(codes: Iterable[str] | Mapping[str, int], total: int, limit: float) -> None:
    """Raise ThresholdExceeded if more than the share `limit` of `total` inputs was rejected, with one of `codes` each.

    `codes` may be counted already.
    """
    counts = Counter(codes)
    rejected = counts.total()
    if total and rejected / total > limit:
        code, count = counts.most_common(1)[0]
        raise ThresholdExceeded(
            f"{rejected} of {total} inputs were rejected ({percent(rejected / total)}), above --max-rejected "
            f"{limit:g}; most often {code} ({count}); mend the data or raise --max-rejected"
        )


def as_csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """Return a CSV file; file names that are not UTF-8 are written with escapes."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue().encode("utf-8", "backslashreplace")
