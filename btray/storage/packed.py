"""How `btray.storage` reads one scan of a packed archive (see `btray.data.packs`); use that module instead.

A member URI is `SHARD.parquet#ROW/PATH`: the row of a shard, and the path that the object had, for people and for what
goes by names. A shard is read whole, once for all its members that are asked for together.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple, Self

import pyarrow as pa
import pyarrow.parquet

from btray.storage.errors import FAILURES, StorageError, check_file

_MEMBER = re.compile(r"(?P<shard>.+\.parquet)#(?P<row>\d+)/(?P<path>.+)", re.DOTALL)
_LOADING = threading.Lock()
OF_FRAMES = ("frames", "preprocessing", "scan", "fingerprint", "slices")
"""Columns that only the shards of a frame pack have; see `btray.data.packs`."""


class DamagedShard(StorageError):
    """A shard that is not a Parquet file any more: this says nothing of its scans, which a later run may read whole."""

    retryable = True


def member_uri(shard: str, row: int, path: str) -> str:
    """Return the URI of one row of a shard."""
    return f"{shard}#{row}/{path}"


def is_member(uri: str) -> bool:
    """Return whether `uri` is that of a packed scan."""
    return _parse(uri) is not None


def path_of(uri: str) -> str:
    """Return the path that a packed scan had; any other URI as it is."""
    member = _parse(uri)
    return member["path"] if member else uri


def shard_of(uri: str) -> str | None:
    """Return the URI of the shard that holds a packed scan; None for any other URI."""
    member = _parse(uri)
    return member["shard"] if member else None


class PackedFrames(bytes):
    """The frames of a scan, or nothing if it has none, as a frame pack holds them instead of the scan's own bytes."""

    row: dict[str, Any]
    """All else that the pack holds of it."""

    @classmethod
    def of(cls, frames: bytes, row: dict[str, Any]) -> Self:
        """Copy `frames`."""
        packed = cls(frames)
        packed.row = row
        return packed


def read(uri: str, read_whole: Callable[[str], bytes], max_bytes: int | None) -> bytes:
    """Return the bytes of a member; `read_whole` reads its shard. Raises StorageError, also the one of its packing."""
    member = _parse(uri)
    if member is None:
        raise ValueError(f"{uri} is not a member of a packed archive")
    with _LOADING:  # of the threads that want members of one shard the first reads it
        shard = _load_shard(member["shard"], read_whole)
    if isinstance(shard, str):
        raise DamagedShard("failed", uri, shard)
    number = int(member["row"])
    if number >= len(shard.rows):
        raise StorageError("not_found", uri, f"the shard has {len(shard.rows)} rows")
    row = shard.rows[number]
    if row["path"] != member["path"]:
        raise StorageError("changed", uri, "its shard has lost rows since it was listed")
    if row["error_code"] is not None and row.get("scan") is None:  # else it was read, and rejected
        raise StorageError(row["error_code"], uri, row["error"] or "when it was packed")
    data = shard.data[number]
    if "scan" in row:
        return PackedFrames.of(data.as_buffer() if data.is_valid else b"", row)
    check_file(uri, len(data.as_buffer()), max_bytes)
    return bytes(data.as_buffer())


def _parse(uri: str) -> re.Match[str] | None:
    return _MEMBER.fullmatch(uri) if ".parquet#" in uri else None  # the pattern alone is slow on most other names


class _Shard(NamedTuple):
    data: pa.LargeBinaryArray
    rows: list[dict[str, Any]]
    """Its other columns."""


@lru_cache(maxsize=2)  # the one that is read and the one before it, of which threads may still read members
def _load_shard(uri: str, read_whole: Callable[[str], bytes]) -> _Shard | str:
    """Return its rows, or what is wrong with it: that is cached too, or each of its members would read it again."""
    try:
        file = pa.parquet.ParquetFile(pa.BufferReader(read_whole(uri)), page_checksum_verification=True)
        others = ["path", "error_code", "error", *(name for name in OF_FRAMES if name in file.schema_arrow.names)]
        table = file.read(["data", *others])
        rows = table.select(others).to_pylist()
        return _Shard(table["data"].combine_chunks(), rows)
    except (*FAILURES, pa.ArrowException, KeyError) as error:
        return f"its shard is damaged: {error}"
