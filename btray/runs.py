"""What a run over an archive leaves below OUTPUT/_runs/GROUP/RUN: its plan, its worklist, and at the end run.json.

The worklist is written while the archive is listed, in sealed segments that are there whole or not at all, cut into
parts; each part becomes one file of the output, whose name follows from the part. So a run that was killed is taken up
where it was: segments that are there are not listed again, and a part whose file is there is done.
"""

from __future__ import annotations

import io
import secrets
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from btray import storage
from btray.local_files import TEMPORARY
from btray.part_files import Product, write_part
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

# Attempts at a part by actors that had died before. Ray itself would never give up a part that kills each of them.
_ATTEMPTS = 5
_CLOSERS = 16  # threads

_RUNS = "_runs"
_PLAN = "plan.json"
_END = "end.json"
RUN = "run.json"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run: where its rows go and where it keeps its worklist."""

    run_id: str
    """Sorts by the time at which the run began."""
    group: str
    """Runs of one group follow one another: the model_id, say."""
    parts: str
    """Folder of its files, below the output."""
    output: str
    request: dict[str, Any]
    """What its worklist follows from: the same request takes the run up."""

    @property
    def folder(self) -> str:
        return storage.join(_folder(self.output, self.group), self.run_id)

    @property
    def worklist(self) -> str:
        return storage.join(self.folder, "worklist")

    def part_uri(self, part_id: str) -> str:
        """The output's file for one part."""
        return storage.join(self.output, self.parts, f"part-{self.run_id}-{part_id}.parquet")


def _folder(output: str, group: str) -> str:
    return storage.join(output, _RUNS, group)


def begin(output: str, group: str, request: dict[str, Any], product: Product) -> tuple[Run, bool]:
    """The unfinished run of this group with this request, and True; else a new run, whose plan is written, and False.

    An unfinished run with another request is given up: what it has written stays. Needs the lease.
    """
    for run in _unfinished(output, group):
        if run.request == request:
            _remove_temporaries(run)
            return run, True
        _close(run, product)
        finish(run, {"state": "given up", "request": run.request})
    now = datetime.now(UTC)
    run = Run(
        run_id=f"{now:%Y%m%dT%H%M%S%f}-{secrets.token_hex(4)}",
        group=group,
        parts=product.folder(f"{now:%Y-%m-%d}"),
        output=output,
        request=request,
    )
    storage.write_json(storage.join(run.folder, _PLAN), asdict(run) | {"output": None})
    return run, False


def _unfinished(output: str, group: str) -> Iterator[Run]:
    """From the latest back to the last one that ended: every run settles those before it."""
    for name in reversed(_names(_folder(output, group))):
        folder = storage.join(_folder(output, group), name)
        if storage.exists(storage.join(folder, RUN)):
            return
        try:
            plan = storage.read_json(storage.join(folder, _PLAN))
        except StorageError as error:
            if error.code == "not_found":  # killed before its first word
                continue
            raise
        yield Run(**plan | {"output": output})


def _close(run: Run, product: Product) -> None:
    """Take the names of the parts that a given-up run has not written: an empty file stands at each.

    A worker that outlived its driver then finds its part written, whenever it comes, and no row of it gets in between
    the rows of the run that classifies those objects now.
    """
    segments, _ = sealed(run.worklist)
    written = set(_names(storage.join(run.output, run.parts)))
    open_parts = [uri for segment in segments for uri in _part_uris(run, segment) if storage.name(uri) not in written]
    with ThreadPoolExecutor(_CLOSERS) as pool:
        list(pool.map(lambda uri: write_part(uri, [], product.schema, {}), open_parts))


def _part_uris(run: Run, segment: str) -> list[str]:
    number = storage.name(segment).partition(".")[0]
    parts_in_it = pc.max(read_segment(segment)["part"]).as_py() + 1
    return [run.part_uri(_part_id(int(number), part)) for part in range(parts_in_it)]


def _part_id(segment: int, part: int) -> str:
    return f"{segment:05d}-{part:03d}"


def finish(run: Run, report: dict[str, Any]) -> str:
    """Write run.json, which ends the run, then remove its worklist; return the URI of run.json."""
    uri = storage.join(run.folder, RUN)
    storage.write_json(uri, report)
    for name in _names(run.worklist):
        storage.delete(storage.join(run.worklist, name))
    return uri


def note_attempt(run: Run, part_id: str, first_uri: str) -> None:
    """Count an attempt at a part by an actor that has died before. Raises RuntimeError where there were too many."""
    before = [name for name in _names(run.worklist) if name.startswith(f"attempt-{part_id}-")]
    if len(before) >= _ATTEMPTS:
        raise RuntimeError(
            f"part {part_id} of run {run.run_id}, which begins with {first_uri}, seems to kill its worker (out of "
            "memory?): leave the object out with --exclude, or use fewer --actors"
        )
    storage.write_bytes(storage.join(run.worklist, f"attempt-{part_id}-{len(before)}"), b"")


def reports(output: str, group: str) -> Iterator[dict[str, Any]]:
    """run.json of the runs of a group that did something, the latest first."""
    for name in reversed(_names(_folder(output, group))):
        uri = storage.join(_folder(output, group), name, RUN)
        if storage.exists(uri):
            report: dict[str, Any] = storage.read_json(uri)
            if report.get("objects"):
                yield report


def _names(folder: str) -> list[str]:
    try:
        return storage.list_names(folder)
    except StorageError as error:
        if error.code == "not_found":
            return []
        raise


def _remove_temporaries(run: Run) -> None:
    """What a killed writer left beside the files of a local table; object storage has no such thing."""
    if storage.is_remote(run.output):
        return
    for folder in (storage.join(run.output, run.parts), run.worklist, run.folder):
        for name in _names(folder):
            if name.startswith(".") and name.endswith(TEMPORARY):
                storage.delete(storage.join(folder, name))


# ---- the worklist


class WorklistWriter:
    """Seals objects into segments, from number `first` on, cut into parts of at most `part_objects`."""

    def __init__(self, folder: str, part_objects: int, first: int = 0) -> None:
        self.folder = folder
        self.part_objects = part_objects
        self.segments = first
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
        storage.write_bytes(_segment_uri(self.folder, self.segments), body.getvalue())
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


def sealed(folder: str) -> tuple[list[str], bool]:
    """URIs of the sealed segments of a worklist, and whether they are all that there will be."""
    names = _names(folder)
    segments = [storage.join(folder, name) for name in names if name.endswith(".parquet") and not name.startswith(".")]
    return segments, _END in names and storage.read_json(storage.join(folder, _END))["complete"]


def reopen(folder: str) -> None:
    """Forget that listing failed, since it is taken up."""
    storage.delete(storage.join(folder, _END))


def read_segment(uri: str) -> pa.Table:
    """One segment, with the columns of SEGMENT. Raises StorageError."""
    return pa.parquet.read_table(pa.BufferReader(storage.read_bytes(uri)))


def parts(folder: str) -> Iterator[pa.Table]:
    """Each part of a worklist as one row (part, and lists of uri, etag, size, place), as segments are sealed.

    Ends when the worklist does.
    """
    number = 0
    while True:
        try:
            segment = read_segment(_segment_uri(folder, number))
        except StorageError as error:
            if error.code != "not_found":
                raise
            if _ends_at(folder, number):
                return
            time.sleep(_POLL)
            continue
        yield from _parts_of(number, segment)
        number += 1


_LISTS = ("uri", "etag", "size", "place")


def _parts_of(number: int, segment: pa.Table) -> Iterator[pa.Table]:
    for part in range(pc.max(segment["part"]).as_py() + 1):
        rows = segment.filter(pc.equal(segment["part"], part))
        yield pa.table(
            {"part": [_part_id(number, part)]}
            | {name: pa.array([rows[name].to_pylist()], pa.list_(SEGMENT.field(name).type)) for name in _LISTS}
        )


def _ends_at(folder: str, number: int) -> bool:
    try:
        return bool(storage.read_json(storage.join(folder, _END))["segments"] <= number)
    except StorageError as error:
        if error.code == "not_found":
            return False
        raise


def _segment_uri(folder: str, number: int) -> str:
    return storage.join(folder, f"{number:05d}.parquet")
