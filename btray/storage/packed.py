"""How `btray.storage` reads one scan of a packed archive (see `btray.data.packs`); use that module instead.

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

from btray.storage.errors import FAILURES, StorageError, check_file

_MEMBER = re.compile(r"(?P<shard>.+\.parquet)#(?P<row>\d+)/(?P<path>.+)", re.DOTALL)
_LOADING = threading.Lock()


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


def read(uri: str, read_whole: Callable[[str], bytes], max_bytes: int | None) -> bytes:
    """Return the bytes of a member; `read_whole` reads its shard. Raises StorageError, also the one of its packing."""
    member = _parse(uri)
    if member is None:
        raise ValueError(f"{uri} is not a member of a packed archive")
    with _LOADING:  # of the threads that want members of one shard the first reads it
        shard = _load_shard(member["shard"], read_whole)
    if isinstance(shard, str):
        raise DamagedShard("failed", uri, shard)
    row = int(member["row"])
    if row >= len(shard):
        raise StorageError("not_found", uri, f"the shard has {len(shard)} rows")
    if shard["path"][row].as_py() != member["path"]:
        raise StorageError("changed", uri, "its shard has lost rows since it was listed")
    if (code := shard["error_code"][row].as_py()) is not None:
        raise StorageError(code, uri, shard["error"][row].as_py() or "when it was packed")
    data = shard["data"][row].as_buffer()
    check_file(uri, len(data), max_bytes)
    return bytes(data)


def _parse(uri: str) -> re.Match[str] | None:
    return _MEMBER.fullmatch(uri) if ".parquet#" in uri else None  # the pattern alone is slow on most other names


@lru_cache(maxsize=2)  # the one that is read and the one before it, of which threads may still read members
def _load_shard(uri: str, read_whole: Callable[[str], bytes]) -> pa.Table | str:
    """Return its rows, or what is wrong with it: that is cached too, or each of its members would read it again."""
    body, columns = read_whole(uri), ["data", "path", "error_code", "error"]
    try:
        table = pa.parquet.read_table(pa.BufferReader(body), columns=columns, page_checksum_verification=True)
        return table.select(columns)
    except (*FAILURES, pa.ArrowException, KeyError) as error:
        return f"its shard is damaged: {error}"
