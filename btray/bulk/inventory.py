"""S3 Inventory: the reports by which S3 lists a bucket of any size, Parquet or CSV files named by a manifest.json."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote_plus

import pyarrow.parquet

from btray import storage
from btray.core.errors import UserError
from btray.data.manifests import csv_batches, open_for_arrow
from btray.storage import FileInfo, StorageError

_COLUMNS = {  # name in a CSV's fileSchema -> name in Parquet
    "Bucket": "bucket",
    "Key": "key",
    "IsLatest": "is_latest",
    "IsDeleteMarker": "is_delete_marker",
    "Size": "size",
    "LastModifiedDate": "last_modified_date",
    "ETag": "e_tag",
}
_NEEDED = ("Bucket", "Key", "Size", "ETag")


def named_in_inventory(root: str) -> Iterator[FileInfo]:
    """Yield the objects of an S3 Inventory report that a listing of its bucket would give: the latest versions.

    Raises UserError if none counts, or if a field is missing without which no later run could tell what is new.
    """
    try:
        report = json.loads(storage.read_text(root))
        files = [str(file["key"]) for file in report["files"]]
        kind, bucket = str(report["fileFormat"]), str(report["destinationBucket"]).rpartition(":")[2]
        columns = [name.strip() for name in str(report["fileSchema"]).split(",")]
    except StorageError as error:
        raise storage.user_error(error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{root} is not a valid S3 Inventory manifest ({error!r}); give the manifest.json that S3 wrote."
        ) from error
    if kind not in ("CSV", "Parquet"):
        raise UserError(f"{root}: an inventory as {kind} is not read; have S3 write it as Parquet or CSV.")
    seen = counted = 0
    for key in files:
        # a report that was downloaded has its files beside it
        uri = f"s3://{bucket}/{key}" if storage.is_remote(root) else storage.join(root.rpartition("/")[0], key)
        for row in _parquet_rows(uri) if kind == "Parquet" else _csv_rows(uri, columns):
            info = _entry(row)
            seen += 1
            if info is not None:
                counted += 1
                yield info
    if not counted:
        raise UserError(
            f"{root} names {seen} objects, of which none counts: old versions and markers do not, and no object whose "
            "key has a part that begins with . or _; give such a prefix itself as the input."
        )


def _require(uri: str, present: Collection[str], names: Mapping[str, str]) -> None:
    """Raise UserError unless all needed fields are present, by the `names` that they have in this kind of file."""
    missing = [field for field in _NEEDED if names[field] not in present]
    if missing:
        raise UserError(
            f"{uri} has no field {' and '.join(missing)}; add it to the fields of the inventory's configuration in S3."
        )


def _parquet_rows(uri: str) -> Iterator[dict[str, Any]]:
    with open_for_arrow(uri) as file:
        table = pyarrow.parquet.ParquetFile(file)
        _require(uri, table.schema_arrow.names, _COLUMNS)
        present = [name for name in _COLUMNS.values() if name in table.schema_arrow.names]
        for batch in table.iter_batches(columns=present):
            yield from batch.to_pylist()


def _csv_rows(uri: str, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a CSV report, where keys are URL-encoded, and only there: with `+` for a space, as S3 does."""
    _require(uri, columns, {name: name for name in _COLUMNS})
    present = [name for name in _COLUMNS if name in columns]
    filesystem, path = storage.arrow_filesystem(uri)
    with filesystem.open_input_stream(path, compression="gzip" if path.endswith(".gz") else None) as file:
        for batch in csv_batches(file, columns, present, header=False):
            for row in batch.to_pylist():
                named = {_COLUMNS[name]: value for name, value in row.items()}
                yield named | {"key": unquote_plus(named["key"])}


def _entry(row: dict[str, Any]) -> FileInfo | None:
    """Return the object of a row; None for old versions, delete markers, folders and hidden objects."""
    if str(row.get("is_latest", True)).lower() == "false" or str(row.get("is_delete_marker")).lower() == "true":
        return None
    key, size = row["key"], int(row.get("size") or 0)
    if (size == 0 and key.endswith(("/", "_$folder$"))) or any(p.startswith((".", "_")) for p in key.split("/")):
        return None
    modified = row.get("last_modified_date") or None
    if isinstance(modified, str):
        modified = datetime.fromisoformat(modified)
    if modified is not None and modified.tzinfo is None:
        modified = modified.replace(tzinfo=UTC)
    etag = (row.get("e_tag") or "").strip('"')
    return FileInfo(f"s3://{row['bucket']}/{key}", size, etag, modified.timestamp() if modified else 0.0)
