"""What a run over an archive leaves below OUTPUT/_runs/GROUP/RUN: its plan, its worklist, and at the end run.json.

The worklist (`btray.bulk.worklist`) is written while the archive is listed and cut into parts; each part becomes one
file of the output, whose name follows from the part. So a run that was killed is taken up where it was: segments that
are there are not listed again, and a part whose file is there is done.
"""

from __future__ import annotations

import re
import secrets
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from btray import storage
from btray.bulk import worklist as segments
from btray.bulk.part_files import Product, write_part
from btray.core.errors import Failed, UserError
from btray.storage import StorageError, local

# Attempts at a part by actors that had died before. Ray itself would never give up a part that kills each of them.
_ATTEMPTS = 5
_CLOSERS = 16  # threads

# Seconds after which a shared disk shows on one node what another has written: NFS remembers folders for a while.
_SEEN_WITHIN = 60.0
_LOOK = 0.5

_RUNS = "_runs"
_PLAN = "plan.json"
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
        return folder_of(self.output, self.group, self.run_id)

    @property
    def worklist(self) -> str:
        return storage.join(self.folder, "worklist")

    def part_uri(self, part_id: str) -> str:
        """The output's file for one part."""
        return storage.join(self.output, self.parts, f"part-{self.run_id}-{part_id}.parquet")


_PART_FILE = re.compile(r"part-(\d{8}T\d+-[0-9a-f]+)-\d+-\d+\.parquet")


def run_of(part_uri: str) -> str | None:
    """The run_id of `Run.part_uri`; None of a file that no run wrote."""
    found = _PART_FILE.fullmatch(storage.name(part_uri))
    return found[1] if found else None


def folder_of(output: str, group: str, run_id: str) -> str:
    """`Run.folder`."""
    return storage.join(_folder(output, group), run_id)


def has_ended(folder: str) -> bool:
    """Whether the run whose folder this is was finished or given up."""
    return storage.exists(storage.join(folder, RUN))


def _folder(output: str, group: str) -> str:
    return storage.join(output, _RUNS, group)


def begin(output: str, group: str, request: dict[str, Any], product: Product) -> tuple[Run, bool]:
    """The unfinished run of this group with this request, and True; else a new run, whose plan is written, and False.

    An unfinished run with another request is given up: what it has written stays. What the last run that ended has
    left behind is removed; each run does so for the one before it. Needs the lease.
    """
    for run, ended in _from_the_latest(output, group):
        if ended:
            _remove_leftovers(run)
            break
        segments.rename_old(run.worklist)
        if run.request == request and not segments.is_closed(run.worklist):
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


def _from_the_latest(output: str, group: str) -> Iterator[tuple[Run, bool]]:
    """The runs of a group back from the latest, and whether each has ended: every run settles those before it."""
    for name in reversed(storage.list_names(_folder(output, group), missing_ok=True)):
        folder = storage.join(_folder(output, group), name)
        try:
            plan = storage.read_json(storage.join(folder, _PLAN))
        except StorageError as error:
            if error.code != "not_found":
                raise
            _remove_temporaries_in(folder)  # it was killed before its first word
            continue
        run = Run(**plan | {"output": output})
        yield run, has_ended(run.folder)


def _close(run: Run, product: Product) -> None:
    """Take the names of the parts that a given-up run has not written: an empty file stands at each.

    A worker that outlived its driver then finds its part written, whenever it comes, and no row of it gets in between
    the rows of the run that classifies those objects now. A mark that workers look for would not do: one that has
    looked may be held up for minutes by its store before it writes.
    """
    sealed = segments.close(run.worklist)
    written = set(storage.list_names(storage.join(run.output, run.parts), missing_ok=True))
    with ThreadPoolExecutor(_CLOSERS) as pool:
        for segment in sealed:
            uris = [run.part_uri(part) for part in segments.part_ids(segment)]
            missing = [uri for uri in uris if storage.name(uri) not in written]
            list(pool.map(lambda uri: write_part(uri, [], product.schema, {}), missing))


def finish(run: Run, report: dict[str, Any]) -> str:
    """Write run.json, which ends the run, then remove its worklist; return the URI of run.json."""
    uri = storage.join(run.folder, RUN)
    storage.write_json(uri, report)
    segments.remove(run.worklist)
    return uri


def note_attempt(run: Run, part_id: str, first_uri: str) -> None:
    """Count an attempt at a part by an actor that has died before. Raises Failed where there were too many."""
    for number in range(_ATTEMPTS):
        if storage.write_new(storage.join(run.worklist, f"attempt-{part_id}-{number}"), b""):
            return
    raise Failed(
        f"part {part_id} of run {run.run_id}, which begins with {first_uri}, seems to kill its worker (out of "
        "memory?): leave the object out with --exclude, or use fewer --actors"
    )


def require_seen(run: Run) -> None:
    """Raise UserError where this machine does not see what the driver has written into a local output."""
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


def reports(output: str, group: str) -> Iterator[dict[str, Any]]:
    """run.json of the runs of a group that did something, the latest first."""
    for name in reversed(storage.list_names(_folder(output, group), missing_ok=True)):
        uri = storage.join(_folder(output, group), name, RUN)
        if storage.exists(uri):
            report: dict[str, Any] = storage.read_json(uri)
            if report.get("objects"):
                yield report


def _remove_leftovers(run: Run) -> None:
    """What a run that has ended left where it was killed in its last moment, or its workers were in theirs."""
    _remove_temporaries(run)
    segments.remove(run.worklist)


def _remove_temporaries(run: Run) -> None:
    for folder in (storage.join(run.output, run.parts), run.worklist, run.folder):
        _remove_temporaries_in(folder)


def _remove_temporaries_in(folder: str) -> None:
    """What a killed writer left beside the files of a local table; object storage has no such thing."""
    if not storage.is_remote(folder):
        local.remove_temporaries(folder)
