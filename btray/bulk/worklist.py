"""The worklist of a run: what is to be read, in sealed segments that are there whole or not at all, cut into parts.

A segment is created where there is none and never written over, so that of two drivers that believe the run theirs
one seals it and the other learns that it is not. An empty segment says that none will follow.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from btray import storage
from btray.core.errors import UserError
from btray.storage import FileInfo, StorageError

SEGMENT = pa.schema(
    [
        ("part", pa.int32()),
        ("uri", pa.string()),
        ("etag", pa.string()),
        ("size", pa.int64()),
        ("place", pa.string()),
    ]
)
PART_BYTES = 256 << 20
# The first segments are small, so that the first rows do not wait for the listing.
_FIRST_SEGMENT = 1024
_LARGEST_SEGMENT = 32_768
_LEAST_PART = 32  # objects
_POLL = 0.5  # seconds

_SUFFIX = ".segment"  # Parquet, but not by name: readers of OUTPUT/**/*.parquet do not skip folders that begin with _
_OLD_SUFFIX = ".parquet"
_END = "end.json"
_CLOSED = "closed"


class WorklistWriter:
    """Seals objects into segments, from number `first` on, cut into parts of at most `part_objects`.

    Before each `check` is asked, which raises where the run is no longer this process's. Raises UserError where
    another process has sealed the segment.
    """

    def __init__(
        self, folder: str, part_objects: int, first: int = 0, *, check: Callable[[], None] = lambda: None
    ) -> None:
        self.folder = folder
        self.part_objects = part_objects
        self.segments = first
        self._check = check
        self._waiting: list[FileInfo] = []

    def add(self, objects: Sequence[FileInfo]) -> bool:
        """Add objects; True where that sealed a segment."""
        self._waiting += objects
        size = min(_FIRST_SEGMENT << min(self.segments, 16), _LARGEST_SEGMENT)
        return len(self._waiting) >= size and self._seal()

    def end(self, *, complete: bool) -> None:
        """Say that no segment follows: because the archive is listed, or because listing it failed."""
        if complete and self._waiting:
            self._seal(last=True)
        self._check()
        storage.write_json(storage.join(self.folder, _END), {"segments": self.segments, "complete": complete})

    def _seal(self, *, last: bool = False) -> bool:
        table = pa.Table.from_pydict(
            {
                "part": _cut(self._waiting, self.part_objects, taper=last),
                "uri": [info.uri for info in self._waiting],
                "etag": [info.etag for info in self._waiting],
                "size": [info.size for info in self._waiting],
                "place": [info.place for info in self._waiting],
            },
            schema=SEGMENT,
        )
        body = io.BytesIO()
        pa.parquet.write_table(table, body, compression="zstd")
        self._check()
        _create(_segment_uri(self.folder, self.segments), body.getvalue())
        self.segments += 1
        self._waiting = []
        return True


def _cut(objects: Sequence[FileInfo], limit: int, *, taper: bool) -> list[int]:
    """The part of each object: so many that a small archive keeps all workers busy, none too large for memory.

    With `taper` each part is an eighth of what is left: the last ones are small, so that no worker idles long while
    another ends (guided self-scheduling, Polychronopoulos & Kuck, IEEE Trans. Comput. 1987).
    """
    parts: list[int] = []
    part = count = size = most = 0
    for number, info in enumerate(objects):
        if count in (0, most) or size + info.size > PART_BYTES:
            left = len(objects) - number * taper
            most = min(limit, max(_LEAST_PART, -(-left // 8)))
            part, count, size = part + (count > 0), 0, 0
        parts.append(part)
        count, size = count + 1, size + info.size
    return parts


def _create(uri: str, segment: bytes) -> None:
    if storage.write_new(uri, segment) or storage.read_bytes(uri) == segment:  # the latter: an answer that got lost
        return
    raise UserError(f"{uri} was sealed by another run, which has taken this one over; let that one go on")


def sealed(folder: str) -> tuple[list[str], bool]:
    """URIs of the sealed segments of a worklist, and whether they are all that there will be."""
    names = storage.list_names(folder, missing_ok=True)
    segments = [storage.join(folder, name) for name in names if name.endswith(_SUFFIX)]
    return segments, _END in names and storage.read_json(storage.join(folder, _END))["complete"]


def reopen(folder: str) -> None:
    """Forget that listing failed, since it is taken up."""
    storage.delete(storage.join(folder, _END))


def close(folder: str) -> list[str]:
    """Let nobody seal a segment from now on, however late; URIs of those that are there."""
    storage.write_bytes(storage.join(folder, _CLOSED), b"")
    while True:
        segments, _ = sealed(folder)
        if storage.write_new(_segment_uri(folder, len(segments)), b""):
            return segments


def is_closed(folder: str) -> bool:
    """Whether `close` was begun."""
    return storage.exists(storage.join(folder, _CLOSED))


def remove(folder: str) -> None:
    """Remove a worklist, but for what closes it."""
    names = storage.list_names(folder, missing_ok=True)
    kept = {_CLOSED, *[name for name in names if name.endswith(_SUFFIX)][-1:]} if _CLOSED in names else set()
    storage.delete_many([storage.join(folder, name) for name in names if name not in kept])


def rename_old(folder: str) -> None:
    """Give the segments of a version before this one the names that they have now."""
    for name in storage.list_names(folder, missing_ok=True):
        if name.endswith(_OLD_SUFFIX):
            uri = storage.join(folder, name)
            storage.write_new(uri.removesuffix(_OLD_SUFFIX) + _SUFFIX, storage.read_bytes(uri))
            storage.delete(uri)


def read_segment(uri: str) -> pa.Table:
    """One segment, with the columns of SEGMENT; no rows where it is the one that closes. Raises StorageError."""
    data = storage.read_bytes(uri)
    return pa.parquet.read_table(pa.BufferReader(data)) if data else SEGMENT.empty_table()


def part_ids(segment: str) -> list[str]:
    """The parts of a sealed segment, by its URI."""
    table = read_segment(segment)
    number = int(storage.name(segment).partition(".")[0])
    return [_part_id(number, part) for part in range(_count_of_parts(table))]


def _count_of_parts(segment: pa.Table) -> int:
    return int(pc.max(segment["part"]).as_py()) + 1 if len(segment) else 0


def _part_id(segment: int, part: int) -> str:
    return f"{segment:05d}-{part:03d}"


def parts(folder: str, over: Callable[[], bool] = lambda: False) -> Iterator[pa.Table]:
    """Each part of a worklist as one row (part, and lists of uri, etag, size, place), as segments are sealed.

    Ends when the worklist does, or when no segment comes and the run is `over`.
    """
    number = 0
    while True:
        try:
            segment = read_segment(_segment_uri(folder, number))
        except StorageError as error:
            if error.code != "not_found":
                raise
            if _ends_at(folder, number) or over():
                return
            time.sleep(_POLL)
            continue
        if not len(segment):
            return
        yield from _parts_of(number, segment)
        number += 1


_LISTS = ("uri", "etag", "size", "place")


def _parts_of(number: int, segment: pa.Table) -> Iterator[pa.Table]:
    for part in range(_count_of_parts(segment)):
        rows = segment.filter(pc.equal(segment["part"], part))
        yield pa.table(
            {"part": [_part_id(number, part)]}
            | {name: pa.array([rows[name].to_pylist()], pa.list_(SEGMENT.field(name).type)) for name in _LISTS}
        )


def _ends_at(folder: str, number: int) -> bool:
    with storage.suppress_missing():
        return bool(storage.read_json(storage.join(folder, _END))["segments"] <= number)
    return False


def _segment_uri(folder: str, number: int) -> str:
    return storage.join(folder, f"{number:05d}{_SUFFIX}")
