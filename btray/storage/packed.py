"""How `btray.storage` reads a scan out of a packed archive (see `btray.data.packs`); use that module instead.

A member URI is `SHARD.parquet#ROW/PATH`: the row of a shard, and the path that the object had, for people and for what
goes by names. A shard is read whole, once for all its members that are asked for together.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from functools import lru_cache

import pyarrow as pa
import pyarrow.parquet

from btray.storage.errors import FAILURES, StorageError, check_size

_MEMBER = re.compile(r"(?P<shard>.+\.parquet)#(?P<row>\d+)/(?P<path>.+)", re.DOTALL)
_LOADING = threading.Lock()


class DamagedShard(StorageError):
    """A shard that is no Parquet file any more: that says nothing of its scans, which a later run may find whole."""

    retryable = True


def member_uri(shard: str, row: int, path: str) -> str:
    """The URI of one row of a shard."""
    return f"{shard}#{row}/{path}"


def is_member(uri: str) -> bool:
    """Whether `uri` is that of a packed scan."""
    return ".parquet#" in uri and _MEMBER.fullmatch(uri) is not None


def path_of(uri: str) -> str:
    """The path that a packed scan had; any other URI as it is."""
    found = _MEMBER.fullmatch(uri) if ".parquet#" in uri else None
    return found["path"] if found else uri


def read(uri: str, read_whole: Callable[[str], bytes], max_bytes: int | None) -> bytes:
    """The bytes of a member; `read_whole` reads its shard. Raises StorageError, also what packing it met with."""
    shard_uri, row = _parsed(uri)
    with _LOADING:  # of the threads that want members of one shard the first reads it
        shard = _shard(shard_uri, read_whole)
    if isinstance(shard, str):
        raise DamagedShard("failed", uri, shard)
    if row >= len(shard):
        raise StorageError("not_found", uri, f"the shard has {len(shard)} rows")
    if (code := shard["error_code"][row].as_py()) is not None:
        raise StorageError(code, uri, shard["error"][row].as_py() or "when it was packed")
    data = shard["data"][row]
    check_size(uri, len(data.as_buffer()), max_bytes)
    return bytes(data.as_buffer())


def _parsed(uri: str) -> tuple[str, int]:
    found = _MEMBER.fullmatch(uri)
    if found is None:
        raise ValueError(f"{uri} is no member of a packed archive")
    return found["shard"], int(found["row"])


@lru_cache(maxsize=2)
def _shard(uri: str, read_whole: Callable[[str], bytes]) -> pa.Table | str:
    """Its rows, or what is wrong with it: that is remembered too, or each of its members would read it again."""
    body, columns = read_whole(uri), ["data", "error_code", "error"]
    try:
        table = pa.parquet.read_table(pa.BufferReader(body), columns=columns, page_checksum_verification=True)
        return table.select(columns)
    except (*FAILURES, pa.ArrowException, KeyError) as error:
        return f"its shard is damaged: {error}"
