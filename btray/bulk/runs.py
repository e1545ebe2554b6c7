"""What a run leaves below OUTPUT/_runs/GROUP/RUN (plan, worklist, run.json), and the files of its parts.

The worklist (`btray.bulk.worklist`) is written while the archive is listed and cut into parts; each part becomes one
Parquet file of the output, whose name follows from the part, written by one put that fails if it is there. So a run
that was killed is resumed where it was: shards of the worklist that are there are not listed again, and a part whose
file is there is done; its tally stands in the footer.
"""

from __future__ import annotations

import io
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from btray import storage
from btray.bulk import worklist
from btray.bulk.report import AbandonedRun, PartTally, RunReport, Tally
from btray.core.errors import Failed, UserError
from btray.storage import local
from btray.storage.parquet import read_undamaged, set_aside

# Attempts at a part by actors that had died before. Ray itself would retry a part that kills each of them for ever.
_ATTEMPTS = 5
_CLOSERS = 16  # threads

# Seconds after which a shared disk shows on one node what another has written: NFS remembers folders for a while.
_SEEN_WITHIN = 60.0
_LOOK = 0.5

_RUNS = "_runs"
_PLAN = "plan.json"
RUN = "run.json"
SUMMARY = "summary.html"
TALLY = b"btray_tally"
"""Key of the tally in the metadata of a part's file."""


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
    """What its worklist follows from: the same request resumes the run."""

    @property
    def folder(self) -> str:
        """URI of the folder of its plan, worklist and run.json."""
        return run_folder(self.output, self.group, self.run_id)

    @property
    def worklist(self) -> str:
        """URI of the folder of its worklist."""
        return storage.join(self.folder, "worklist")

    def part_uri(self, part_id: str) -> str:
        """Return the URI of the output's file for one part."""
        return storage.join(self.output, self.parts, f"part-{self.run_id}-{part_id}.parquet")


_PART_FILE = re.compile(r"part-(\d{8}T\d+-[0-9a-f]+)-\d+-\d+\.parquet")


def run_of(part_uri: str) -> str | None:
    """Return the run_id in `Run.part_uri`; None for a file that no run wrote."""
    match = _PART_FILE.fullmatch(storage.name(part_uri))
    return match[1] if match else None


def run_folder(output: str, group: str, run_id: str) -> str:
    """Return `Run.folder`."""
    return storage.join(output, _RUNS, group, run_id)


# ---- the life of a run


def begin(
    output: str, group: str, request: dict[str, Any], *, folder: Callable[[str], str], schema: pa.Schema
) -> tuple[Run, bool]:
    """Return the unfinished run of this group with this request, and True; else a new run, and False.

    `folder` gives the folder of a run's files, below the output, from the day it begins (YYYY-MM-DD, UTC); `schema` is
    that of the files. An unfinished run with another request is abandoned: what it has written stays. What the last run
    that ended has left is removed; each run does so for the one before it. Needs the lease.
    """
    for earlier in _folders(output, group):
        plan = storage.read_json(storage.join(earlier, _PLAN), missing_ok=True)
        if plan is None:
            _remove_temporaries(earlier)  # killed before it had written its plan
            continue
        run = Run(**plan | {"output": output})
        ended = has_ended(earlier)
        if ended or (run.request == request and not worklist.is_closed(run.worklist)):
            # killed in its last moment, or its workers in theirs
            _remove_temporaries(storage.join(output, run.parts), run.worklist, earlier)
            if not ended:
                return run, True
            worklist.remove(run.worklist)
            break
        _abandon(run, schema)
    now = datetime.now(UTC)
    run_id = f"{now:%Y%m%dT%H%M%S%f}-{secrets.token_hex(4)}"
    run = Run(run_id=run_id, group=group, parts=folder(f"{now:%Y-%m-%d}"), output=output, request=request)
    # without the output, which may be moved or be mounted elsewhere by the time the run is resumed
    storage.write_json(storage.join(run.folder, _PLAN), asdict(run) | {"output": None})
    return run, False


def abandon_unfinished(output: str, schema: pa.Schema) -> int:
    """End all runs of an output that were interrupted, as `begin` does; return how many. Needs the lease."""
    count = 0
    for folder in folders(output):
        plan = storage.read_json(storage.join(folder, _PLAN), missing_ok=True)
        if plan is not None and not has_ended(folder):
            _abandon(Run(**plan | {"output": output}), schema)
            count += 1
    return count


def _abandon(run: Run, schema: pa.Schema) -> None:
    _close_unwritten_parts(run, schema)
    finish(run, AbandonedRun(request=run.request))


def folders(output: str) -> Iterator[str]:
    """Yield the folders of all runs of an output."""
    for group in storage.list_names(storage.join(output, _RUNS), missing_ok=True):
        yield from _folders(output, group)


def _folders(output: str, group: str) -> Iterator[str]:
    """Yield the folders of the runs of a group, the latest first."""
    for run_id in reversed(storage.list_names(storage.join(output, _RUNS, group), missing_ok=True)):
        yield run_folder(output, group, run_id)


def _close_unwritten_parts(run: Run, schema: pa.Schema) -> None:
    """Write an empty file for each part that an abandoned run has not written.

    A worker that outlived its driver then finds its part written, whenever it comes, and no row of it gets in between
    the rows of the run that classifies those objects now. A mark that workers look for would not do: one that has
    looked may be held up for minutes by its store before it writes.
    """
    shards = worklist.close(run.worklist)
    written = set(storage.list_names(storage.join(run.output, run.parts), missing_ok=True))
    with ThreadPoolExecutor(_CLOSERS) as pool:
        for shard in shards:
            uris = [run.part_uri(part) for part in worklist.part_ids(shard, worklist.read_shard(shard))]
            missing = [uri for uri in uris if storage.name(uri) not in written]
            list(pool.map(lambda uri: write_part(uri, [], schema, PartTally()), missing))


def finish(run: Run, report: RunReport | AbandonedRun) -> str:
    """Write run.json, which ends the run, then remove its worklist; return the URI of run.json."""
    uri = storage.join(run.folder, RUN)
    storage.write_json(uri, report.model_dump(mode="json"))
    worklist.remove(run.worklist)
    return uri


def has_ended(folder: str) -> bool:
    """Return whether the run whose folder this is was finished or abandoned."""
    return storage.exists(storage.join(folder, RUN))


def last_report(output: str, group: str, *, before: str | None = None) -> RunReport | None:
    """Return run.json of the latest run of a group, or the latest `before` another; None if it is not finished."""
    earlier = (folder for folder in _folders(output, group) if before is None or storage.name(folder) < before)
    folder = next(earlier, None)
    content = folder and storage.read_json(storage.join(folder, RUN), missing_ok=True)
    return RunReport.model_validate(content) if content and content["state"] == "finished" else None


def reports(output: str, group: str) -> Iterator[RunReport]:
    """Yield run.json of the runs of a group that have read objects, the latest first."""
    for folder in _folders(output, group):
        content = storage.read_json(storage.join(folder, RUN), missing_ok=True)
        if content and content.get("objects"):  # an abandoned run ("given up" in older files) has none
            yield RunReport.model_validate(content)


def note_attempt(run: Run, part_id: str, first_uri: str, *, actor: str) -> None:
    """Count an attempt at a part by an actor (the name of its class) that has died before.

    Raises Failed if there were too many.
    """
    for number in range(_ATTEMPTS):
        if storage.write_new(storage.join(run.worklist, f"attempt-{part_id}-{actor}-{number}"), b""):
            return
    raise Failed(
        f"part {part_id} of run {run.run_id}, which begins with {first_uri}, seems to kill its worker (out of "
        "memory?): leave the object out with --exclude, or use fewer --actors"
    )


def require_visible(run: Run) -> None:
    """Raise UserError if this machine does not see what the driver has written into a local output."""
    if storage.is_remote(run.output):
        return
    deadline = time.monotonic() + _SEEN_WITHIN
    while not storage.exists(storage.join(run.folder, _PLAN)):
        if time.monotonic() > deadline:
            raise UserError(
                f"--output {run.output} is another folder on the node {socket.gethostname()} than where the job was "
                "started: give s3://, or a folder that all nodes mount"
            )
        time.sleep(_LOOK)


def _remove_temporaries(*folders: str) -> None:
    """Remove what a killed writer left beside the files of a local table; object storage has no such thing."""
    for folder in folders:
        if not storage.is_remote(folder):
            local.remove_temporaries(folder)


# ---- the files of parts


def write_part(
    uri: str, rows: Sequence[Mapping[str, Any]], schema: pa.Schema, tally: PartTally, **options: Any
) -> bool:
    """Write one file, with `tally` in its footer, by one put; return False if it is there already.

    `options` are those of pyarrow.parquet.write_table. Keys of `rows` that `schema` lacks are left out. Raises
    StorageError.
    """
    table = pa.Table.from_pylist(list(rows), schema=schema.with_metadata({TALLY: tally.model_dump_json()}))
    body = io.BytesIO()
    pa.parquet.write_table(table, body, **{"compression": "zstd", **options})
    return storage.write_new(uri, body.getvalue())


def read_tally(uri: str, tally_type: type[Tally]) -> Tally | None:
    """Return the tally in the footer of a part's file; None if there is no such file. Raises StorageError.

    A file that is damaged is moved out of the way, so that the part can be written again.
    """
    with storage.suppress_missing():
        storage.describe(uri)
        footer = read_undamaged(uri, lambda file: pa.parquet.read_metadata(file).metadata[TALLY])
        if footer is not None:
            return tally_type.model_validate_json(footer)
        set_aside(uri)
    return None


def read_rows(uri: str, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Return some columns of the rows of a part's file; without `columns` no rows. Raises StorageError."""
    if not columns:
        return []
    table = pa.parquet.read_table(pa.BufferReader(storage.read_bytes(uri)), columns=columns)
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows
