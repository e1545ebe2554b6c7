"""What an archive holds: prefix, manifest, S3 Inventory, file list or pack, streamed; nothing grows with the archive.

A prefix and an inventory give every object but directory markers and hidden ones; a manifest and a file list give what
they name, whose size and entity tag are asked for, many at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import translate
from itertools import islice
from re import compile as compile_pattern
from typing import Any
from urllib.parse import unquote_plus

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from btray import storage
from btray.errors import UserError
from btray.packs import describe_pack, is_pack, list_pack
from btray.storage import FileInfo, StorageError
from btray.storage_errors import typed

_DESCRIBED_AT_A_TIME = 1024
_DESCRIBERS = 32
_CSV_BLOCK = 4 << 20  # bytes
_INVENTORY_COLUMNS = {  # name in a CSV's fileSchema -> name in Parquet
    "Bucket": "bucket",
    "Key": "key",
    "IsLatest": "is_latest",
    "IsDeleteMarker": "is_delete_marker",
    "Size": "size",
    "LastModifiedDate": "last_modified_date",
    "ETag": "e_tag",
}
_KINDS = (
    "a folder or prefix, a manifest (.parquet, .csv) with the column uri, an S3 manifest.json, a list (.txt) or a "
    "packed archive"
)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which objects of an archive are meant."""

    include: Sequence[str] = ()
    """Globs, of which one must match; none: all. `*` matches `/` too; below a prefix the path from there is matched."""
    exclude: Sequence[str] = ()
    """Globs of which none may match."""
    since: datetime | None = None
    """Only objects modified at this time or later; what has no known time counts."""
    outside: str = ""
    """A folder whose objects are left out: the output, where it lies within the input."""

    def filter(self, root: str, objects: Iterable[FileInfo]) -> Iterator[FileInfo]:
        """Those of `objects` that are meant; `root` is what the globs' paths start from."""
        included, excluded = _matcher(self.include), _matcher(self.exclude)
        oldest = self.since.timestamp() if self.since else 0.0
        below, outside = root.rstrip("/") + "/", self.outside.rstrip("/") + "/"
        for info in objects:
            path = info.uri.removeprefix(below)
            if self.outside and info.uri.startswith(outside):
                continue
            if self.include and not included(path):
                continue
            if excluded(path) or 0 < info.modified < oldest:
                continue
            yield info


def list_archive(uri: str, selection: Selection) -> Iterator[FileInfo]:
    """Every object of the archive that `selection` means, as it is listed; one may come twice from a manifest.

    What cannot be examined has size 0 and an empty etag: reading it tells why.

    Raises, when the first item is asked for or later:
        UserError: the archive is not there, is of no known kind, or its manifest cannot be read.
        StorageError: listing failed half-way.
    """
    root = storage.resolve(uri)
    kind = _kind(root)
    if kind is None:
        yield from selection.filter(root, _listed(root))
        return
    try:
        with typed(root):
            yield from selection.filter(_top(root, kind), _readable(root, kind))
    except StorageError as error:
        if error.retryable:
            raise
        raise storage.user_error(error) from error


def _top(root: str, kind: Callable[[str], Iterator[FileInfo]]) -> str:
    """Where the paths that globs match begin."""
    return str(describe_pack(root)["root"]) if kind is list_pack else root.rpartition("/")[0]


def _readable(root: str, read: Callable[[str], Iterator[FileInfo]]) -> Iterator[FileInfo]:
    try:
        yield from read(root)
    except pa.ArrowException as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{root} cannot be read ({reason}); write it again, as Parquet or UTF-8 CSV.") from error


def _listed(root: str) -> Iterator[FileInfo]:
    found = False
    try:
        for info in storage.list_files(root):
            found = True
            yield info
    except StorageError as error:
        if found:
            raise
        raise storage.user_error(error) from error
    if not found:
        raise UserError(f"{root} holds no file; give {_KINDS}.")


def _matcher(globs: Sequence[str]) -> Callable[[str], bool]:
    patterns = [compile_pattern(translate(glob)) for glob in globs]
    return lambda path: any(pattern.match(path) for pattern in patterns)


def _kind(root: str) -> Callable[[str], Iterator[FileInfo]] | None:
    """How `root` is read where it is a file that names others; None: it is listed."""
    kinds: dict[str, Callable[[str], Iterator[FileInfo]]] = {
        ".parquet": lambda root: _described(_located(root, _parquet_uris(root))),
        ".csv": lambda root: _described(_located(root, _csv_uris(root))),
        ".txt": lambda root: _described(_located(root, _lines(root))),
        "manifest.json": _inventory,
    }
    found = next((read for end, read in kinds.items() if root.lower().endswith(end)), None)
    try:
        if found is not None and not storage.is_folder(root):
            return found
        return list_pack if is_pack(root) else None
    except StorageError as error:
        raise storage.user_error(error) from error


# ---- manifests and lists


def _parquet_uris(manifest: str) -> Iterator[str | None]:
    with _opened(manifest) as file:
        table = pa.parquet.ParquetFile(file)
        column = _uri_column(manifest, table.schema_arrow.names)
        for batch in table.iter_batches(columns=[column]):
            yield from batch.column(0).cast(pa.string()).to_pylist()


def _csv_uris(manifest: str) -> Iterator[str | None]:
    with _opened(manifest) as file:
        header = pa.csv.open_csv(file).schema.names
    column = _uri_column(manifest, header)
    with _opened(manifest) as file:
        for batch in _csv_batches(file, header, [column]):
            yield from batch.column(0).to_pylist()


def _csv_batches(
    file: Any, columns: Sequence[str], wanted: Sequence[str], *, header: bool = True
) -> Iterator[pa.RecordBatch]:
    """All values as text; of a file without a header `columns` are its names."""
    yield from pa.csv.open_csv(
        file,
        read_options=pa.csv.ReadOptions(block_size=_CSV_BLOCK, column_names=None if header else list(columns)),
        parse_options=pa.csv.ParseOptions(newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(
            column_types=dict.fromkeys(columns, pa.string()), include_columns=list(wanted)
        ),
    )


def _lines(listing: str) -> Iterator[str]:
    with _opened(listing) as file:
        rest = b""
        while block := file.read(_CSV_BLOCK):
            *lines, rest = (rest + block).split(b"\n")
            yield from (_text(listing, line) for line in lines if line.strip())
        if rest.strip():
            yield _text(listing, rest)


def _text(listing: str, line: bytes) -> str:
    try:
        return line.decode().rstrip("\r")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{listing}: the line {line!r} is no UTF-8; write the list as UTF-8, one URI a line."
        ) from error


def _uri_column(manifest: str, names: Sequence[str]) -> str:
    found = next((name for name in names if name.strip().casefold() == "uri"), None)
    if found is None:
        raise UserError(f"{manifest} has no column uri (it has {', '.join(names)}); name the column of URIs so.")
    return found


def _located(source: str, uris: Iterator[str | None]) -> Iterator[str]:
    """Absolute URIs; relative ones start at the folder of `source`."""
    folder = source.rpartition("/")[0]
    for number, uri in enumerate(uris, start=1):
        if not (uri or "").strip():
            raise UserError(f"{source}, row {number}: uri is empty; fill it or drop the row.")
        absolute = "://" in str(uri) or str(uri).startswith(("/", "~"))
        try:
            yield storage.resolve(str(uri) if absolute else storage.join(folder, str(uri)))
        except UserError as error:
            raise UserError(f"{source}, row {number}: {error}") from error


def _described(uris: Iterator[str]) -> Iterator[FileInfo]:
    with ThreadPoolExecutor(_DESCRIBERS) as pool:
        while chunk := list(islice(uris, _DESCRIBED_AT_A_TIME)):
            yield from pool.map(_describe, chunk)


def _describe(uri: str) -> FileInfo:
    try:
        return storage.describe(uri)
    except StorageError:
        return FileInfo(uri, 0, "", 0.0)


# ---- S3 Inventory


def _inventory(root: str) -> Iterator[FileInfo]:
    """The objects of an S3 Inventory report: the latest versions that are no delete markers, hidden ones aside."""
    try:
        report = json.loads(storage.read_text(root))
        files = [str(file["key"]) for file in report["files"]]
        kind, bucket = str(report["fileFormat"]), str(report["destinationBucket"]).rpartition(":")[2]
        columns = [name.strip() for name in str(report["fileSchema"]).split(",")]
    except StorageError as error:
        raise storage.user_error(error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{root} is no S3 Inventory manifest ({error!r}); give {_KINDS}.") from error
    if kind not in ("CSV", "Parquet"):
        raise UserError(f"{root}: an inventory as {kind} is not read; have S3 write it as Parquet or CSV.")
    for key in files:
        # a report that was downloaded has its files beside it
        uri = f"s3://{bucket}/{key}" if storage.is_remote(root) else storage.join(root.rpartition("/")[0], key)
        rows = _inventory_parquet(uri) if kind == "Parquet" else _inventory_csv(uri, columns)
        yield from (info for info in map(_inventory_entry, rows) if info is not None)


def _inventory_parquet(uri: str) -> Iterator[dict[str, Any]]:
    with _opened(uri) as file:
        table = pa.parquet.ParquetFile(file)
        present = [name for name in _INVENTORY_COLUMNS.values() if name in table.schema_arrow.names]
        for batch in table.iter_batches(columns=present):
            yield from batch.to_pylist()


def _inventory_csv(uri: str, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Keys are URL-encoded in CSV, and only there."""
    wanted = [name for name in _INVENTORY_COLUMNS if name in columns]
    filesystem, path = storage.arrow_filesystem(uri)
    with filesystem.open_input_stream(path, compression="gzip" if path.endswith(".gz") else None) as file:
        for batch in _csv_batches(file, columns, wanted, header=False):
            for row in batch.to_pylist():
                named = {_INVENTORY_COLUMNS[name]: value for name, value in row.items()}
                yield named | {"key": unquote_plus(named["key"])}


def _inventory_entry(row: dict[str, Any]) -> FileInfo | None:
    if str(row.get("is_latest", True)).lower() == "false" or str(row.get("is_delete_marker")).lower() == "true":
        return None
    key, size = row["key"], int(row.get("size") or 0)
    if (size == 0 and key.endswith(("/", "_$folder$"))) or any(p.startswith((".", "_")) for p in key.split("/")):
        return None
    modified = row.get("last_modified_date")
    if isinstance(modified, str):
        modified = datetime.fromisoformat(modified)
    if modified is not None and modified.tzinfo is None:
        modified = modified.replace(tzinfo=UTC)
    etag = (row.get("e_tag") or "").strip('"')
    return FileInfo(f"s3://{row['bucket']}/{key}", size, etag, modified.timestamp() if modified else 0.0)


def _opened(uri: str) -> Any:
    filesystem, path = storage.arrow_filesystem(uri)
    return filesystem.open_input_file(path)
