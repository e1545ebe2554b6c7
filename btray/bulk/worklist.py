"""The worklist of a run: the objects to read, in sealed shards that are there whole or not at all, cut into parts.

A shard (a file `NUMBER.segment`) is created if there is none and never overwritten, so that of two drivers that
both believe the run theirs one seals it and the other learns that it lost. An empty shard says that none will follow.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from btray import storage
from btray.core.errors import UserError
from btray.pacs.address import series_of
from btray.storage import FileInfo

SCHEMA = pa.schema(
    {"part": pa.int32(), "uri": pa.string(), "etag": pa.string(), "size": pa.int64(), "place": pa.string()}
)
"""Columns of a shard. `part` counts from 0 within the shard, `place` is where the bytes are if that is not `uri`."""
_PART_SCHEMA = pa.schema([("part", pa.string()), *((field.name, pa.list_(field.type)) for field in [*SCHEMA][1:])])
PART_OBJECTS = 512
"""Objects of a part that are always welcome; parts grow above that with the archive."""
_SHARE = 256  # of what was listed so far, a part is at most this one, so that there are many for all workers
# Objects. The first shards are small, so that the first rows do not wait for the listing.
_FIRST_SHARD = 1024
_LARGEST_SHARD = 32_768
_LONGEST_WAIT = 10.0  # seconds for a shard to fill, if the listing is slow
_LEAST_PART = 32  # objects
_POLL = 0.5  # seconds

_SUFFIX = ".segment"  # Parquet, but not by name: readers of OUTPUT/**/*.parquet do not skip folders that begin with _
_END = "end.json"
_CLOSED = "closed"


@dataclass(frozen=True)
class PartLimits:
    """The most that a part has, whose rows its worker holds until it writes them."""

    objects: int = _LARGEST_SHARD
    bytes: int = 256 << 20


class WorklistWriter:
    """Seals objects into shards, from number `first` on, cut into parts.

    `check` is called before each write; it raises if the run no longer belongs to this process. Raises UserError if
    another process has sealed a shard.
    """

    def __init__(
        self,
        folder: str,
        first: int = 0,
        *,
        listed: int = 0,
        limits: PartLimits = PartLimits(),
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Continue after the `first` shards that are sealed already and have so many objects that were `listed`."""
        self.folder = folder
        self.shards = first
        self._listed = listed
        self._limits = limits
        self._check = check
        self._waiting: list[FileInfo] = []
        self._since = time.monotonic()

    def add(self, objects: Sequence[FileInfo]) -> bool:
        """Add objects, or none, as time passes; return True if that sealed a shard."""
        if not self._waiting:
            self._since = time.monotonic()
        self._waiting += objects
        size = min(_FIRST_SHARD << min(self.shards, 16), _LARGEST_SHARD)
        if len(self._waiting) < size and not (self._waiting and time.monotonic() - self._since > _LONGEST_WAIT):
            return False
        self._seal(last=False)
        return True

    def end(self, *, complete: bool) -> None:
        """Say that no shard follows: because the archive is listed, or because listing it failed."""
        if complete and self._waiting:
            self._seal(last=True)
        self._check()
        storage.write_json(storage.join(self.folder, _END), {"segments": self.shards, "complete": complete})

    def _seal(self, *, last: bool) -> None:
        columns = {name: [getattr(info, name) for info in self._waiting] for name in SCHEMA.names[1:]}
        self._listed += len(self._waiting)
        parts = cut_into_parts(self._waiting, self._limits, listed=self._listed, taper=last)
        body = io.BytesIO()
        pa.parquet.write_table(pa.table({"part": parts, **columns}, schema=SCHEMA), body, compression="zstd")
        self._check()
        uri, shard = _shard_uri(self.folder, self.shards), body.getvalue()
        # The same bytes may be there already: from this put, if its answer was lost and it was repeated.
        if not storage.write_new(uri, shard) and storage.read_bytes(uri) != shard:
            raise UserError(f"{uri} was sealed by another run, which has taken over this one; let that one continue")
        self.shards += 1
        self._waiting = []


def cut_into_parts(objects: Sequence[FileInfo], limits: PartLimits, *, listed: int, taper: bool) -> list[int]:
    """Return the part of each object: many parts, so that a small archive keeps all workers busy.

    None has more than its `limits` or, above PART_OBJECTS, a 256th of what was `listed`, these objects included, so
    that a large archive has no millions of files. The first ones are small, so that rows come early. With `taper` each
    part is an eighth of what is left: the last ones are small, so that no worker idles long while another ends (guided
    self-scheduling, Polychronopoulos & Kuck, IEEE Trans. Comput. 1987). A series of a PACS, which is retrieved whole,
    is not cut, if that can be avoided.
    """
    largest = min(limits.objects, max(PART_OBJECTS, listed // _SHARE))
    eighths = taper or largest <= PART_OBJECTS
    early = largest if taper or listed > len(objects) else _LEAST_PART
    parts: list[int] = []
    part = count = size = most = 0
    series = ""
    for number, info in enumerate(objects):
        before, series = series, series_of(info.uri)
        full = count >= most and (series != before or count >= largest)
        if not count or full or size + info.size > limits.bytes:
            left = len(objects) - number * taper
            most = min(early, largest, max(_LEAST_PART, -(-left // 8)) if eighths else largest)
            early *= 2
            part, count, size = part + (count > 0), 0, 0
        parts.append(part)
        count, size = count + 1, size + info.size
    return parts


def sealed_shards(folder: str) -> tuple[list[str], bool]:
    """Return the URIs of the sealed shards of a worklist, and whether they are all that there will be."""
    names = storage.list_names(folder, missing_ok=True)
    shards = [storage.join(folder, name) for name in names if name.endswith(_SUFFIX)]
    return shards, _END in names and storage.read_json(storage.join(folder, _END))["complete"]


def reopen(folder: str) -> None:
    """Forget that listing failed, because it is resumed."""
    storage.delete(storage.join(folder, _END))


def close(folder: str) -> list[str]:
    """Let nobody seal a shard from now on, however late; return the URIs of those that are there."""
    storage.write_bytes(storage.join(folder, _CLOSED), b"")
    while True:
        shards, _ = sealed_shards(folder)
        if storage.write_new(_shard_uri(folder, len(shards)), b""):
            return shards


def is_closed(folder: str) -> bool:
    """Return whether `close` was begun."""
    return storage.exists(storage.join(folder, _CLOSED))


def remove(folder: str) -> None:
    """Remove a worklist, except what closes it: the mark and the empty last shard."""
    names = storage.list_names(folder, missing_ok=True)
    kept = {_CLOSED, *[name for name in names if name.endswith(_SUFFIX)][-1:]} if _CLOSED in names else set()
    storage.delete_many([storage.join(folder, name) for name in names if name not in kept])


def read_shard(uri: str) -> pa.Table:
    """Return one shard, with the columns of SCHEMA; no rows if it is the one that closes. Raises StorageError."""
    data = storage.read_bytes(uri)
    return pa.parquet.read_table(pa.BufferReader(data)) if data else SCHEMA.empty_table()


def part_ids(uri: str, shard: pa.Table) -> list[str]:
    """Return the ids of the parts of a shard."""
    count = int(pc.max(shard["part"]).as_py()) + 1 if len(shard) else 0
    return [f"{storage.name(uri).removesuffix(_SUFFIX)}-{part:03d}" for part in range(count)]


def read_parts(folder: str, over: Callable[[], bool] = lambda: False) -> Iterator[pa.Table]:
    """Yield each part of a worklist as one row (part, and lists of uri, etag, size, place), as shards are sealed.

    Ends when the worklist does, or when no shard comes and the run is `over`.
    """
    shards = 0
    while True:
        uri, shard = _shard_uri(folder, shards), None
        with storage.suppress_missing():
            shard = read_shard(uri)
        if shard is None:
            end = storage.read_json(storage.join(folder, _END), missing_ok=True)
            if (end and end["segments"] <= shards) or over():
                return
            time.sleep(_POLL)
            continue
        if not len(shard):
            return
        for part, part_id in enumerate(part_ids(uri, shard)):
            rows = shard.filter(pc.equal(shard["part"], part)).drop_columns("part")
            yield pa.Table.from_pylist([{"part": part_id, **rows.to_pydict()}], _PART_SCHEMA)
        shards += 1


def _shard_uri(folder: str, number: int) -> str:
    return storage.join(folder, f"{number:05d}{_SUFFIX}")
