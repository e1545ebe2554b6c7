"""S3 Inventory: the reports by which S3 lists a bucket of any size, Parquet or CSV files named by a manifest.json."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote_plus

import pyarrow.parquet

from btray import storage
from btray.core.errors import UserError
from btray.data.manifests import csv_batches, open_for_arrow
from btray.storage import FileInfo

_NEEDED = ("Bucket", "Key", "Size", "ETag")
_COLUMNS = {  # name in a CSV's fileSchema -> name in Parquet, as LastModifiedDate -> last_modified_date
    name: re.sub(r"\B(?=[A-Z])", "_", name).lower()
    for name in (*_NEEDED, "IsLatest", "IsDeleteMarker", "LastModifiedDate")
}
_UNKNOWN_TIME = datetime.fromtimestamp(0, UTC)


def named_in_inventory(root: str) -> Iterator[FileInfo]:
    """Yield the objects of an S3 Inventory report that a listing of its bucket would give: the latest versions.

    Raises UserError if none counts, or if a field is missing without which no later run could tell what is new.
    """
    try:
        report = json.loads(storage.read_text(root))
        files = [str(file["key"]) for file in report["files"]]
        kind, bucket = str(report["fileFormat"]), str(report["destinationBucket"]).rpartition(":")[2]
        fields = [name.strip() for name in str(report["fileSchema"]).split(",")]
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
        for row in _rows(uri, kind, [_COLUMNS.get(field, field) for field in fields]):
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


def _rows(uri: str, kind: str, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of one file by the names of Parquet; a CSV, which has no header, has `columns`.

    Keys are URL-encoded in a CSV, and only there: with `+` for a space, as S3 does.
    """
    if kind == "Parquet":
        with open_for_arrow(uri) as file:
            table = pyarrow.parquet.ParquetFile(file)
            for batch in table.iter_batches(columns=_present(uri, table.schema_arrow.names)):
                yield from batch.to_pylist()
        return
    filesystem, path = storage.arrow_filesystem(uri)
    present = _present(uri, columns)
    with filesystem.open_input_stream(path, compression="gzip" if path.endswith(".gz") else None) as file:
        for batch in csv_batches(file, columns, present, header=False):
            yield from (row | {"key": unquote_plus(row["key"])} for row in batch.to_pylist())


def _present(uri: str, names: Collection[str]) -> list[str]:
    """Return which of the fields that are read a file has. Raises UserError if one that is needed is missing."""
    missing = [field for field in _NEEDED if _COLUMNS[field] not in names]
    if missing:
        raise UserError(
            f"{uri} has no field {' and '.join(missing)}; add it to the fields of the inventory's configuration in S3."
        )
    return [name for name in _COLUMNS.values() if name in names]


def _entry(row: dict[str, Any]) -> FileInfo | None:
    """Return the object of a row; None for old versions, delete markers, folders and hidden objects."""
    if str(row.get("is_latest", True)).lower() == "false" or str(row.get("is_delete_marker")).lower() == "true":
        return None
    key, size = row["key"], int(row.get("size") or 0)
    if (size == 0 and key.endswith(("/", "_$folder$"))) or storage.is_hidden(key):
        return None
    modified = datetime.fromisoformat(str(row.get("last_modified_date") or _UNKNOWN_TIME))
    if modified.tzinfo is None:
        modified = modified.replace(tzinfo=UTC)
    etag = (row.get("e_tag") or "").strip('"')
    return FileInfo(f"s3://{row['bucket']}/{key}", size, etag, modified.timestamp())
