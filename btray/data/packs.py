"""Packed archives: many small objects as the rows of few Parquet shards, which are read several times faster.

A pack is a folder with `pack.json`, which is written when a run has ended, and `shards/*.parquet` with the columns of
SCHEMA. An object that changed stands there again; the row of the latest run counts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from btray import storage
from btray.core.errors import UserError
from btray.data.key_set import Keys, KeySet, keys_of
from btray.storage import FileInfo
from btray.storage.packed import member_uri

DESCRIPTION = "pack.json"
FORMAT = 1
SCHEMA = pa.schema(
    [
        pa.field("data", pa.large_binary()),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("etag", pa.string(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("error_code", pa.string()),
        pa.field("error", pa.string()),
        pa.field("retryable", pa.bool_(), nullable=False),
    ]
)
"""Bytes and identifiers of an object; `data` is null where it could not be read. The small columns stand behind it, so
that they are one read with the footer."""
SHARDS = "shards"
_AT_A_TIME = 16  # shards
_LISTED = ["uri", "path", "etag", "size", "error_code", "retryable"]


def is_pack(uri: str) -> bool:
    """Whether `uri` is the folder of a packed archive. Raises StorageError where that cannot be told."""
    return storage.exists(storage.join(uri, DESCRIPTION))


def describe_pack(uri: str) -> dict[str, Any]:
    """What pack.json says. Raises UserError for one of a newer format."""
    said: dict[str, Any] = storage.read_json(storage.join(uri, DESCRIPTION))
    if said.get("format_version") != FORMAT:
        raise UserError(
            f"{uri} is a packed archive of format {said.get('format_version')}, which this version cannot read; "
            "update btray"
        )
    return said


def describe(uri: str, *, root: str, manifest: str | None) -> None:
    """Write pack.json: `root` is what the paths start from, `manifest` the name of the labelled manifest's copy."""
    storage.write_json(storage.join(uri, DESCRIPTION), {"format_version": FORMAT, "root": root, "manifest": manifest})


def list_pack(uri: str) -> Iterator[FileInfo]:
    """Every object of the pack, once: original URI, size and etag, and its member URI as the place of its bytes.

    Streams; what was listed is remembered on disk. Raises StorageError.
    """
    describe_pack(uri)
    with tempfile.TemporaryDirectory() as scratch:
        listed = KeySet(Path(scratch))
        for shard, rows in _shards(uri):
            keys = keys_of([(row["uri"], "") for row in rows])
            newest = ~listed.contains(keys)
            listed.add(keys[newest])
            for number, row in enumerate(rows):
                if newest[number]:
                    place = member_uri(shard, number, row["path"])
                    yield FileInfo(row["uri"], row["size"], row["etag"], 0.0, place)


def packed_keys(uri: str) -> Iterator[Keys]:
    """Keys of the objects that need not be packed again: all but those that the store withheld."""
    for _, rows in _shards(uri):
        yield keys_of([(row["uri"], row["etag"]) for row in rows if not row["retryable"]])


def _shards(uri: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """URI and rows without data of every shard, the latest run's first."""
    folder = storage.join(uri, SHARDS)
    listed = storage.list_names(folder, missing_ok=True)
    names = [name for name in reversed(listed) if name.endswith(".parquet") and name[0] != "."]
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        for start in range(0, len(names), _AT_A_TIME):
            some = names[start : start + _AT_A_TIME]
            yield from pool.map(_read_rows, [storage.join(folder, name) for name in some])


def _read_rows(shard: str) -> tuple[str, list[dict[str, Any]]]:
    with storage.open_ranges(shard) as file, storage.storage_errors_for(shard):
        table = pa.parquet.read_table(file, columns=_LISTED)
    return shard, table.to_pylist()
