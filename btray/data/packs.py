"""Packed archives: many small objects as the rows of few Parquet shards, which are read several times faster.

A pack is a folder with `pack.json`, which is written when a run has ended, and `shards/*.parquet` with the columns of
SCHEMA. An object that changed has another row; the one of the latest run counts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from btray import storage
from btray.core.errors import UserError
from btray.data.key_set import Keys, KeySet, keys_of
from btray.storage import FileInfo
from btray.storage.packed import member_uri
from btray.storage.parquet import read_undamaged

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
"""Bytes and identifiers of an object; `data` is null if it could not be read. The small columns come after it, so
that they are one read together with the footer."""
# Scans are compressed already; the checksum of each page is verified when it is read.
WRITE_OPTIONS: dict[str, Any] = {
    "compression": {name: "none" if name == "data" else "zstd" for name in SCHEMA.names},
    "use_dictionary": [name for name in SCHEMA.names if name != "data"],
    "write_statistics": [name for name in SCHEMA.names if name != "data"],
    "write_page_checksum": True,
}
"""Of pyarrow.parquet.write_table, for a shard."""
SHARDS = "shards"
_AT_A_TIME = 16  # shards whose footers are read at once
_LISTED = ["uri", "path", "etag", "size", "error_code", "retryable"]


@dataclass(frozen=True)
class Pack:
    """The content of pack.json."""

    root: str
    """The folder that the packed paths start from."""
    manifest: str | None
    """Name of the copy of the labelled manifest, if one was packed."""


def is_pack(uri: str) -> bool:
    """Return whether `uri` is the folder of a packed archive. Raises StorageError if that cannot be told."""
    return storage.exists(storage.join(uri, DESCRIPTION))


def describe_pack(uri: str) -> Pack:
    """Read pack.json. Raises UserError for one of a newer format."""
    content = storage.read_json(storage.join(uri, DESCRIPTION))
    if content.get("format_version") != FORMAT:
        raise UserError(
            f"{uri} is a packed archive of format {content.get('format_version')}, which this version cannot read; "
            "update btray"
        )
    return Pack(content["root"], content["manifest"])


def write_description(uri: str, pack: Pack) -> None:
    """Write pack.json, which makes `uri` a pack."""
    storage.write_json(storage.join(uri, DESCRIPTION), {"format_version": FORMAT, **asdict(pack)})


def list_pack(uri: str) -> Iterator[FileInfo]:
    """Yield every object of the pack, once: original URI, size and etag, and its member URI as the place of its bytes.

    Streams; what was listed is kept on disk. Raises StorageError.
    """
    describe_pack(uri)
    with tempfile.TemporaryDirectory() as scratch:
        listed = KeySet(Path(scratch))
        for shard, rows in _shards(uri):
            if rows is None:
                raise UserError(f"{shard} is damaged; run jobs/pack.py again, which packs anew what it held")
            keys = keys_of([(row["uri"], "") for row in rows])
            newest = ~listed.contains(keys)
            listed.add(keys[newest])  # on disk: a pack may hold 10^8 objects
            for number in np.flatnonzero(newest).tolist():
                row = rows[number]
                yield FileInfo(row["uri"], row["size"], row["etag"], 0.0, member_uri(shard, number, row["path"]))


def packed_keys(uri: str, damaged: list[str]) -> Iterator[Keys]:
    """Yield keys of the objects that need not be packed again: all but those that the store withheld.

    Shards that are damaged are added to `damaged`; what they held is to be packed again.
    """
    for shard, rows in _shards(uri):
        if rows is None:
            damaged.append(shard)
        else:
            yield keys_of([(row["uri"], row["etag"]) for row in rows if not row["retryable"]])


def _shards(uri: str) -> Iterator[tuple[str, list[dict[str, Any]] | None]]:
    """Yield URI and rows, without data, of every shard, the latest run's first; None for those of a damaged one."""
    folder = storage.join(uri, SHARDS)
    names = storage.list_names(folder, missing_ok=True)
    shards = [storage.join(folder, name) for name in reversed(names) if name.endswith(".parquet") and name[0] != "."]

    def read_rows(shard: str) -> tuple[str, list[dict[str, Any]] | None]:
        def read(file: Any) -> list[dict[str, Any]]:
            return list(pa.parquet.read_table(file, columns=_LISTED).select(_LISTED).to_pylist())

        return shard, read_undamaged(shard, read)

    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        for start in range(0, len(shards), _AT_A_TIME):  # not all at once: their rows would fill the memory
            yield from pool.map(read_rows, shards[start : start + _AT_A_TIME])
