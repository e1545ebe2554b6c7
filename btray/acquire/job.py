"""Merge data sets from several sources into one folder of images with a manifest that names the source of each."""

from __future__ import annotations

import io
import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from btray import storage
from btray.acquire.config import AcquireConfig
from btray.acquire.sources import Contents, LabelledFile, Source, opened, parse_sources
from btray.acquire.unpack import LeftOut, UnpackLimits
from btray.core.errors import UserError
from btray.data.labels import class_order
from btray.storage import StorageError, user_error

MANIFEST_SCHEMA = pa.schema([(name, pa.string()) for name in ("uri", "label", "split", "patient_id", "source")])

_log = logging.getLogger(__name__)
_THREADS = 16
_BATCH = 512
_LISTED = 200  # files left out that dataset.json names, for each source; all are counted
_NO_SPLIT = "unsplit"


@dataclass(frozen=True, kw_only=True)
class _Brought:
    """What one source brought into the data set."""

    source: Source
    acquired_at: str
    sha256: str | None
    rows: list[dict[str, str | None]]
    left_out: list[LeftOut]
    bytes: int


def acquire(config: AcquireConfig) -> str:
    """Bring all sources into `config.out` and return the URI of its manifest.

    Below `config.out` stand afterwards `images/<source>/...`, `config.yaml`, `dataset.json` and, written last,
    `manifest.parquet`, whose URIs are relative to it. A `patient_id` is taken as given: the same one in two sources
    counts as the same patient. Images are not decoded. Running again replaces every file by the same content.

    Raises `UserError` for anything that stops a source from being taken as a whole. Single files that are not taken
    are counted and named in dataset.json under `left_out`.
    """
    out = storage.resolve(config.out)
    try:
        sources = parse_sources(config, out)
        cache = Path(config.cache or "~/.cache/btray").expanduser().absolute()
        if any(source.kind in {"http", "archive"} for source in sources):
            storage.require_writable(str(cache), "--cache")
        shown = config.model_copy(update={"source": tuple(source.shown for source in sources)})
        storage.write_text(storage.join(out, "config.yaml"), shown.to_yaml())
        brought = [_bring(source, config, cache, out) for source in sources]
        return _write(brought, out)
    except StorageError as error:
        raise user_error(error) from error


def _bring(source: Source, config: AcquireConfig, cache: Path, out: str) -> _Brought:
    limits = UnpackLimits(
        max_bytes=int(config.max_unpacked_gb * 1e9), max_files=config.max_files, max_ratio=config.max_ratio
    )
    acquired_at = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    with opened(source, cache=cache, limits=limits) as contents:
        outcomes = _copy(contents, storage.join(out, "images", source.name), source.name)
    rows: list[dict[str, str | None]] = []
    left_out = list(contents.left_out)
    size = 0
    for file, outcome in zip(contents.files, outcomes, strict=True):
        if isinstance(outcome, StorageError):
            left_out.append(LeftOut(name=file.uri, reason=outcome.code))
            continue
        size += outcome
        rows.append(
            {
                "uri": f"images/{source.name}/{file.path}",
                "label": file.label,
                "split": file.split,
                "patient_id": file.patient_id,
                "source": source.name,
            }
        )
    if not rows:
        raise UserError(f"{source.shown}: none of its {len(left_out)} files could be taken ({_reasons(left_out)})")
    return _Brought(
        source=source, acquired_at=acquired_at, sha256=contents.sha256, rows=rows, left_out=left_out, bytes=size
    )


def _copy(contents: Contents, target: str, name: str) -> list[int | StorageError]:
    """Copy the files below `target`; for each, in order, its size in bytes or why it cannot be read.

    A store that is down ends the job, for a set with holes would pass for the whole one.
    """

    def copy(file: LabelledFile) -> int | StorageError:
        try:
            data = storage.read_bytes(file.uri)
        except StorageError as error:
            if error.retryable:
                raise
            return error
        storage.write_bytes(storage.join(target, file.path), data)
        return len(data)

    outcomes: list[int | StorageError] = []
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with (
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
        ThreadPoolExecutor(_THREADS) as pool,
    ):
        task = progress.add_task(f"copying {name}", total=len(contents.files))
        for start in range(0, len(contents.files), _BATCH):
            outcomes += pool.map(copy, contents.files[start : start + _BATCH])
            progress.update(task, completed=len(outcomes))
    return outcomes


def _write(brought: Sequence[_Brought], out: str) -> str:
    rows = sorted((row for one in brought for row in one.rows), key=lambda row: str(row["uri"]))
    _warn_of_others(out, {storage.join(out, str(row["uri"])) for row in rows})
    summary = _summary(brought, rows)
    storage.write_json(storage.join(out, "dataset.json"), summary)
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA), file)
    manifest = storage.join(out, "manifest.parquet")
    storage.write_bytes(manifest, file.getvalue())
    _show(summary)
    return manifest


def _warn_of_others(out: str, mine: set[str]) -> None:
    others = [info.uri for info in storage.list_files(storage.join(out, "images")) if info.uri not in mine]
    if others:
        _log.warning(
            "%d files below %s/images are not of this run and stand not in its manifest, such as %s; "
            "delete them if nothing else needs them",
            len(others),
            out,
            others[0],
        )


def _summary(brought: Sequence[_Brought], rows: Sequence[dict[str, str | None]]) -> dict[str, Any]:
    return {
        "format_version": 1,
        "btray_version": version("btray"),
        "manifest": "manifest.parquet",
        "classes": list(class_order(str(row["label"]) for row in rows)),
        "images": len(rows),
        "bytes": sum(one.bytes for one in brought),
        "counts": _counts(rows),
        "sources": [
            {
                "name": one.source.name,
                "uri": one.source.shown,
                "kind": one.source.kind,
                "sha256": one.sha256,
                "license": one.source.license,
                "acquired_at": one.acquired_at,
                "images": len(one.rows),
                "bytes": one.bytes,
                "counts": _counts(one.rows),
                "left_out": {
                    "count": len(one.left_out),
                    "reasons": dict(sorted(Counter(item.reason for item in one.left_out).items())),
                    "files": [{"name": item.name, "reason": item.reason} for item in _listed(one.left_out)],
                },
            }
            for one in brought
        ],
    }


def _counts(rows: Sequence[dict[str, str | None]]) -> dict[str, dict[str, int]]:
    """Images by class, then by split."""
    found = Counter((str(row["label"]), row["split"] or _NO_SPLIT) for row in rows)
    classes = class_order(label for label, _ in found)
    return {label: {split: number for (of, split), number in sorted(found.items()) if of == label} for label in classes}


def _listed(left_out: Sequence[LeftOut]) -> list[LeftOut]:
    return sorted(left_out, key=lambda item: (item.reason, item.name))[:_LISTED]


def _reasons(left_out: Sequence[LeftOut]) -> str:
    return ", ".join(f"{reason} {number}" for reason, number in Counter(item.reason for item in left_out).most_common())


def _show(summary: dict[str, Any]) -> None:
    """Say how balanced the classes are, and what was left out."""
    console = Console(highlight=False, markup=False)
    sources = [source["name"] for source in summary["sources"]]
    splits = sorted({split for by_split in summary["counts"].values() for split in by_split})
    table = Table("class", "images", "share", *splits, *(sources if len(sources) > 1 else []))
    for column in table.columns[1:]:
        column.justify = "right"
    totals = {label: sum(by_split.values()) for label, by_split in summary["counts"].items()}
    for label, total in totals.items():
        by_source = [sum(source["counts"].get(label, {}).values()) for source in summary["sources"]]
        cells = [total, f"{total / summary['images']:.1%}"]
        cells += [summary["counts"][label].get(split, 0) for split in splits]
        table.add_row(label, *map(str, cells + (by_source if len(sources) > 1 else [])))
    console.print(table)
    console.print(f"{summary['images']} images; {_balance(totals)}")
    for source in summary["sources"]:
        if source["left_out"]["count"]:
            reasons = ", ".join(f"{reason} {number}" for reason, number in source["left_out"]["reasons"].items())
            console.print(
                f"{source['name']}: {source['left_out']['count']} files left out ({reasons}), see dataset.json"
            )


def _balance(totals: dict[str, int]) -> str:
    largest, smallest = max(totals, key=totals.__getitem__), min(totals, key=totals.__getitem__)
    if len(totals) == 1:
        return f"{largest} is the only class: training needs two"
    if totals[largest] == totals[smallest]:
        return f"{len(totals)} classes of the same size"
    return f"{len(totals)} classes; {largest} has {totals[largest] / totals[smallest]:.1f} times as many as {smallest}"
