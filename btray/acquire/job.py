"""Merge data sets from several sources into one folder of images with a manifest that names the source of each."""

from __future__ import annotations

import io
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from btray import storage
from btray.acquire.config import AcquireConfig
from btray.acquire.paths import StorablePaths
from btray.acquire.sources import Contents, LabelledFile, Source, opened, parse_sources
from btray.acquire.unpack import LeftOut, UnpackLimits
from btray.core.console import ProgressLine
from btray.core.errors import UserError
from btray.core.notice import percent
from btray.data.labels import class_order, label_twins, require_classes
from btray.storage import StorageError

MANIFEST_SCHEMA = pa.schema([(name, pa.string()) for name in ("uri", "label", "split", "patient_id", "source")])

_log = logging.getLogger(__name__)
_THREADS = 16  # copying waits for stores, not for the CPU
_BATCH = 512  # files between two steps of the progress line
_LISTED = 200  # files left out that dataset.json names, for each source; all are counted
_NO_SPLIT = "unsplit"

Counts = dict[str, dict[str, int]]
"""Images by class, then by split."""


@dataclass(frozen=True)
class LeftOutFiles:
    """The files of one source that were not taken, as dataset.json names them."""

    count: int
    reasons: dict[str, int]
    files: list[LeftOut]
    """The first ones."""

    @classmethod
    def of(cls, left_out: Sequence[LeftOut]) -> LeftOutFiles:
        """Count the files by reason."""
        reasons = dict(sorted(Counter(item.reason for item in left_out).items()))
        return cls(len(left_out), reasons, sorted(left_out, key=lambda item: (item.reason, item.name))[:_LISTED])

    @property
    def summary(self) -> str:
        """The reasons, each with its number of files."""
        return ", ".join(f"{reason} {number}" for reason, number in self.reasons.items())


@dataclass(frozen=True, kw_only=True)
class SourceRecord:
    """What dataset.json says of one source."""

    name: str
    uri: str
    kind: str
    sha256: str | None
    license: str | None
    acquired_at: str
    images: int
    bytes: int
    counts: Counts
    left_out: LeftOutFiles
    warnings: Sequence[str]
    """What is probably not meant so, folders that look like no class say, and what to do about it."""


@dataclass(frozen=True, kw_only=True)
class DatasetRecord:
    """The content of dataset.json."""

    format_version: int = 1
    btray_version: str
    manifest: str = "manifest.parquet"
    classes: Sequence[str]
    images: int
    bytes: int
    counts: Counts
    sources: Sequence[SourceRecord]


def acquire(config: AcquireConfig) -> str:
    """Bring all sources into `config.out` and return the URI of its manifest.

    Below `config.out` stand afterwards `images/<source>/...`, `config.yaml`, `dataset.json` and, written last,
    `manifest.parquet`, whose URIs are relative to it. A `patient_id` is taken as given, and so is a manifest's
    `source`; other images have the name of their --source. Images are not decoded. Running again replaces every file by
    the same content. Single files that are not taken are counted and named in dataset.json under `left_out`.

    Raises:
        UserError: a source cannot be taken as a whole.
    """
    out = config.out
    config.check()
    sources = parse_sources(config, out)
    cache = Path(config.cache or "~/.cache/btray").expanduser().absolute()
    if any(source.kind in {"http", "archive"} for source in sources):
        storage.require_writable(str(cache), "--cache")
    shown = config.model_copy(update={"source": tuple(source.shown for source in sources)})
    storage.write_text(storage.join(out, "config.yaml"), shown.to_yaml())
    acquired = [_acquire_source(source, config, cache, out) for source in sources]
    require_classes(config.classes, [file.label for _, files in acquired for file in files], "no source")
    return _write(acquired, out)


def _acquire_source(
    source: Source, config: AcquireConfig, cache: Path, out: str
) -> tuple[SourceRecord, list[LabelledFile]]:
    limits = UnpackLimits(
        max_bytes=int(config.max_unpacked_gb * 1e9), max_files=config.max_files, max_ratio=config.max_ratio
    )
    acquired_at = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    opening = opened(source, cache=cache, limits=limits, encoding=config.archive_encoding, classes=config.classes)
    with opening as everything:
        contents = _storable(everything)
        copied = _copy(contents, storage.join(out, "images", source.name), source.name)
    sizes = {file: size for file, size in zip(contents.files, copied, strict=True) if isinstance(size, int)}
    left_out = LeftOutFiles.of([*contents.left_out, *(item for item in copied if isinstance(item, LeftOut))])
    if not sizes:
        raise UserError(f"{source.shown}: none of its {left_out.count} files could be taken ({left_out.summary})")
    record = SourceRecord(
        name=source.name,
        uri=source.shown,
        kind=source.kind,
        sha256=contents.sha256,
        license=source.license,
        acquired_at=acquired_at,
        images=len(sizes),
        bytes=sum(sizes.values()),
        counts=_count(sizes),
        left_out=left_out,
        warnings=contents.warnings,
    )
    return record, list(sizes)


def _storable(contents: Contents) -> Contents:
    """Leave out the files whose names no file system holds, or holds only one of: objects may have any key."""
    paths, files, left_out = StorablePaths(), [], list(contents.left_out)
    for file in sorted(contents.files, key=lambda file: "//" in file.path):  # of two for one path the plain one stays
        path, reason = paths.take(file.path)
        if reason is None:
            files.append(replace(file, path=path))
        else:
            left_out.append(LeftOut(file.path, reason))
    return replace(contents, files=files, left_out=left_out)


def _copy(contents: Contents, target: str, name: str) -> list[int | LeftOut]:
    """Copy the files below `target`; return for each, in order, its size in bytes or why it is left out.

    A store that is down ends the job, for a set with holes would pass for the whole one.
    """

    def copy(file: LabelledFile) -> int | LeftOut:
        try:
            data = storage.read_bytes(file.uri)
        except StorageError as error:
            if error.retryable:
                raise
            return LeftOut(file.uri, error.code)  # a broken file of the source costs itself alone
        storage.write_bytes(storage.join(target, file.path), data)
        return len(data)

    copied: list[int | LeftOut] = []
    with ProgressLine(keep=False) as progress, ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(contents.files), _BATCH):
            copied += pool.map(copy, contents.files[start : start + _BATCH])
            progress.update(f"copying {name}: {len(copied)} of {len(contents.files)} files")
    return copied


def _write(acquired: Sequence[tuple[SourceRecord, list[LabelledFile]]], out: str) -> str:
    rows = sorted(
        (f"images/{source.name}/{file.path}", file.label, file.split, file.patient_id, file.source or source.name)
        for source, files in acquired
        for file in files
    )
    images = {storage.join(out, uri) for uri, *_ in rows}
    others = [info.uri for info in storage.list_files(storage.join(out, "images")) if info.uri not in images]
    if others:
        _log.warning(
            "%d files below %s/images are not of this run and not in its manifest, such as %s; "
            "delete them if nothing else needs them",
            len(others),
            out,
            others[0],
        )
    sources = [source for source, _ in acquired]
    counts = _count(file for _, files in acquired for file in files)
    record = DatasetRecord(
        btray_version=version("btray"),
        classes=list(counts),
        images=len(rows),
        bytes=sum(source.bytes for source in sources),
        counts=counts,
        sources=sources,
    )
    storage.write_json(storage.join(out, "dataset.json"), asdict(record))
    # the manifest comes last: where there is one, all that it names is there
    file = io.BytesIO()
    pq.write_table(pa.table(list(map(list, zip(*rows, strict=True))), schema=MANIFEST_SCHEMA), file)
    manifest = storage.join(out, record.manifest)
    storage.write_bytes(manifest, file.getvalue())
    _print_balance(record)
    return manifest


def _count(files: Iterable[LabelledFile]) -> Counts:
    splits: dict[str, list[str]] = {}
    for file in files:
        splits.setdefault(file.label, []).append(file.split or _NO_SPLIT)
    return {label: dict(sorted(Counter(splits[label]).items())) for label in class_order(splits)}


def _print_balance(dataset: DatasetRecord) -> None:
    """Print how balanced the classes are, and what was left out."""
    console = Console(highlight=False, markup=False)
    sources = dataset.sources if len(dataset.sources) > 1 else []
    splits = sorted({split for by_split in dataset.counts.values() for split in by_split})
    table = Table("class", "images", "share", *splits, *(source.name for source in sources))
    for column in table.columns[1:]:
        column.justify = "right"
    totals = {label: sum(by_split.values()) for label, by_split in dataset.counts.items()}
    for label, total in totals.items():
        by_split = [dataset.counts[label].get(split, 0) for split in splits]
        by_source = [sum(source.counts.get(label, {}).values()) for source in sources]
        table.add_row(label, *map(str, [total, percent(total / dataset.images), *by_split, *by_source]))
    console.print(table)
    largest, smallest = max(totals, key=totals.__getitem__), min(totals, key=totals.__getitem__)
    if len(totals) == 1:
        balance = f"{largest} is the only class: training needs two"
    elif totals[largest] == totals[smallest]:
        balance = f"{len(totals)} classes of the same size"
    else:
        times = totals[largest] / totals[smallest]
        balance = f"{len(totals)} classes; {largest} has {times:.1f} times as many as {smallest}"
    console.print(f"{dataset.images} images; {balance}")
    for twins in label_twins(dataset.counts) if sources else ():
        console.print(f"{twins}: training refuses them")
    for source in dataset.sources:
        if source.warnings:
            console.print(f"{source.name}: {'; '.join(source.warnings)}", soft_wrap=True)
        if source.left_out.count:
            left_out = source.left_out
            console.print(f"{source.name}: {left_out.count} files left out ({left_out.summary}), see dataset.json")
