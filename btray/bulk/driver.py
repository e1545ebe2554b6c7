"""One run over an archive: list what is new, hand it part by part to actors, count what they did, end with run.json.

One row of the dataset is one part of the worklist: an actor reads its objects, writes the part's file with one put
that fails if the file is there, and returns its tally. So a run that is resumed, a task that Ray repeats and a worker
that outlives its driver all end with the same files. What the actors make of a part is up to the job.
"""

from __future__ import annotations

import logging
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import copy_context
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from btray import storage
from btray.bulk import progress, runs
from btray.bulk.clinical.pseudonyms import Pseudonyms
from btray.bulk.config import ArchiveConfig
from btray.bulk.erasure.erased import ErasedObjects
from btray.bulk.listing.archive import Archive, open_archive
from btray.bulk.listing.comparison import Comparison
from btray.bulk.listing.completed import CompletedIndex, RunKeys
from btray.bulk.listing.key_files import RECORD, REJECTED, WITHHELD, KeySource
from btray.bulk.listing.new_objects import NewObjects
from btray.bulk.listing.sealing import Listing, new_batches
from btray.bulk.listing.selection import Selection
from btray.bulk.listing.tasks import LocalTasks, RayTasks, Tasks
from btray.bulk.progress import duration
from btray.bulk.report import PartTally, RunReport, Totals
from btray.bulk.runs import Run
from btray.bulk.worklist import PartLimits
from btray.core import logs, metrics
from btray.core.console import ProgressLine
from btray.core.errors import Failed, UserError
from btray.data.config import PreprocessConfig
from btray.data.rejections import enforce_max_rejected, require_found
from btray.pacs.source import PacsSource
from btray.storage import FileInfo, lease

if TYPE_CHECKING:
    from btray.bulk.worker import PartProcessor, PartReader

_log = logging.getLogger(__name__)

_PREVIEWED = 512  # objects at a time


class ArchiveJob(ABC):
    """What a job does with an archive; `run_archive` does the rest."""

    name: str
    """Of the job, in the names of its metrics."""
    schema: pa.Schema
    """Of its files."""
    preprocess: PreprocessConfig | None = None
    """If frames that are made so will do for files, in a pack; None: the job needs the files."""
    choices: frozenset[str] = frozenset()
    """Settings that the worklist follows from besides the selection; an unfinished run with others is abandoned."""

    def __init__(self, config: ArchiveConfig, *, group: str) -> None:
        """Check what the config names. `group` is that of the output's runs: see `runs.Run`."""
        config.check()
        self.config = config
        self.output = config.output
        self.outputs: Sequence[str] = (config.output,)
        self.pacs: PacsSource | None = None
        """What lists the input if it is that of a PACS."""
        self.group = group
        self.reason = ""
        """Why objects were left out that are completed for that reason alone."""
        self.worst = REJECTED
        """The worst outcome with which an object is completed."""
        self.rereads = ""
        """Settings by which completed objects are read again."""
        self.part_limits = PartLimits()
        self.completed: CompletedIndex | None = None
        """Where the records of its actors are kept, in key files beside run.json."""
        self.pseudonyms: Pseudonyms | None = None
        """Those that objects are listed with."""

    def begin(self) -> None:  # noqa: B027 - most jobs have nothing to do
        """Do what must be done before anything else is written to the output; called with its lease."""

    def preview(self, objects: Sequence[FileInfo]) -> None:  # noqa: B027 - most jobs have nothing to say
        """Look at some of the new objects, of which none is read (`dry_run`)."""

    def previewed(self) -> Sequence[str]:
        """Return lines for a terminal on all objects of `preview`."""
        return ()

    def settings(self) -> dict[str, Any]:
        """Return the settings as they are written."""
        return self.config.model_dump(mode="json")

    @abstractmethod
    def folder(self, run_date: str) -> str:
        """Return the folder, below the output, of the files of a run that began on a day (YYYY-MM-DD, UTC)."""

    @abstractmethod
    def outcomes(self, tasks: Tasks) -> Sequence[KeySource]:
        """Return what became of the objects in earlier runs; `tasks` keep what is not in files."""

    def prepare(self) -> None:  # noqa: B027 - as above
        """Load what the end of the run will need; called in a thread, once the first part is there."""

    @abstractmethod
    def processor(self) -> Callable[[Run, int], PartProcessor]:
        """Return what makes an actor's processor from the run and the CPUs that it may keep busy. It is pickled."""

    def reader(self) -> Callable[[Run], PartReader] | None:
        """Return what makes the reader of the actors that only read and decode; None: those that write do so."""
        return None

    def gpu_share(self) -> float:
        """Return the GPU of each actor that writes. Needs Ray."""
        return 0.0

    def totals(self) -> Totals[Any]:
        """Return the counts of a run that begins."""
        return Totals(PartTally)

    @abstractmethod
    def conclude(self, run: Run, report: RunReport) -> RunReport:
        """Write what is left to write once all parts are there, before the run ends; return the report to leave."""


def run_archive(job: ArchiveJob) -> str:
    """Do the job on what is new in the archive, or print how much that is (`dry_run`); return the output's URI.

    Raises UserError for unusable input and if another run is writing to this output, StorageError if a store does not
    answer, ThresholdExceeded above `max_rejected`, after writing.
    """
    config = job.config
    with _readable_errors():
        selection = Selection(include=config.include, exclude=config.exclude, since=config.since, outside=job.outputs)
        # An archive that is not there is refused now, before anything is written.
        with job.pseudonyms.listing_errors() if job.pseudonyms else nullcontext():
            archive = open_archive(
                config.input, selection, patience=config.patience, preprocess=job.preprocess, pacs=job.pacs
            )
            archive = replace(archive, chunks=chain(list(islice(archive.chunks, 1)), archive.chunks))
        if config.dry_run:
            with storage.retry_timeout(config.patience):
                _estimate(job, archive, ErasedObjects(job.output))
            return job.output
        with lease.hold(job.output) as check:
            job.begin()
            with storage.retry_timeout(config.patience):
                report = _run(job, archive, ErasedObjects(job.output), check)
    if not (report.objects or report.unchanged or report.erased):
        _log.warning("no object of %s is chosen, so there was nothing to do", report.config["input"])
    if not (report.unchanged or report.erased):
        require_found(report.rejected_by_code, report.objects, report.config["input"])
    if config.max_rejected is not None:
        rejected = {code: count for code, count in report.rejected_by_code.items() if code != "not_selected"}
        enforce_max_rejected(rejected, report.objects, config.max_rejected)
    return job.output


@contextmanager
def _readable_errors() -> Iterator[None]:
    """Raise what is meant for the user without Ray's traceback."""
    try:
        yield
    except (UserError, Failed) as error:
        cause = getattr(error, "cause", None)  # Ray's error of a task is of the class of its cause as well
        if cause is None:
            raise
        raise cause from error


def _estimate(job: ArchiveJob, archive: Archive, erased: ErasedObjects) -> None:
    """Print how much there is to do; write nothing."""
    if comparison := _comparison(job, archive, erased):
        archive = _less_known(job, archive, comparison)
    with _listing_tasks(job, archive) as (tasks, scratch):
        new, archive = _new_objects(job, tasks, scratch, archive)
        objects = size = 0
        for some in new_batches(new, archive, erased.without, job.config.limit):
            objects, size = objects + len(some), size + sum(info.size for info in some)
            for start in range(0, len(some), _PREVIEWED):
                job.preview(some[start : start + _PREVIEWED])
    last = next(runs.reports(job.output, job.group), None)
    time_needed = "unknown time: no earlier run was long enough to tell"
    if last and last.has_rate and (rate := last.images_per_second):
        time_needed = f"about {duration(objects / rate)} at the last run's {rate:.0f} images/s"
    for line in job.previewed():
        print(line)
    left_out = f", {erased.left_out} left out that were erased" if erased.left_out else ""
    print(
        f"{objects} new objects, {size / 1e6:.1f} MB, {time_needed}; {new.unchanged} unchanged{left_out}. "
        "Nothing was written.",
        flush=True,
    )


@contextmanager
def _listing_tasks(job: ArchiveJob, archive: Archive) -> Iterator[tuple[Tasks, str]]:
    """Give what lists the archive, and a folder for what it keeps: Ray's tasks only if there is much to do.

    Ray takes seconds to start, which a night with nothing new does without.
    """
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        if not archive.large:
            yield LocalTasks(Path(scratch)), scratch
            return
        from btray.core.cluster import connected

        stack.enter_context(connected())
        yield RayTasks(job.config.patience), scratch


def _comparison(job: ArchiveJob, archive: Archive, erased: ErasedObjects) -> Comparison | None:
    """Return what compares the inventory that lists the archive with that of the last run, if one does."""
    if archive.inventory is None or job.completed is None:
        return None
    written = job.settings()  # as pseudonyms, if the table has these
    choice = {name: written[name] for name in ("include", "exclude", "since")}
    choice |= {"outputs": list(job.outputs), "reason": job.reason, "erasures": erased.names}
    return Comparison(archive.inventory, choice, job.completed.table_files())


def _less_known(job: ArchiveJob, archive: Archive, comparison: Comparison, *, before: str | None = None) -> Archive:
    """Return the archive without what need not be read, as the last run, that `before` this one, has left it."""
    last = runs.last_report(job.output, job.group, before=before)
    return archive.less(comparison.known(last.inventory if last else None, rereads=job.rereads))


def _new_objects(job: ArchiveJob, tasks: Tasks, scratch: str, archive: Archive) -> tuple[NewObjects, Archive]:
    """Return what tells new objects, and where: in all of the archive if it turns out that the table is damaged."""
    new = NewObjects(job.outcomes(tasks), tasks, scratch, worst=job.worst, reason=job.reason, pseudonyms=job.pseudonyms)
    if job.completed and job.completed.damaged:
        archive = archive.less({})
    return new, archive


def _run(job: ArchiveJob, archive: Archive, erased: ErasedObjects, check: Callable[[], None]) -> RunReport:
    """Begin or resume a run and see it to its end; `check` raises if this process has lost the lease."""
    config = job.config
    started = datetime.now(UTC)
    totals = job.totals()
    settings = job.settings()
    request = {name: settings[name] for name in ("input", "include", "exclude", "since", "limit", *sorted(job.choices))}
    run, resumed = runs.begin(job.output, job.group, request, folder=job.folder, schema=job.schema)
    logs.bind(run_id=run.run_id)
    if resumed:
        _log.info("resuming run %s, which was interrupted", run.run_id)
    comparison = _comparison(job, archive, erased)
    if comparison and not resumed:
        archive = _less_known(job, archive, comparison, before=run.run_id)
    with _listing_tasks(job, archive) as (tasks, scratch):
        found = partial(_new_objects, job, tasks, scratch, archive)
        listing = Listing(run.worklist, config, found, erased.without, job.part_limits, check)
        done = Done(totals, RunKeys(run.folder))
        listing.start()
        try:
            listing.begun.wait()
            if not (listing.complete and listing.objects == 0) and listing.error is None:
                _process(job, run, done, listing, check)
        finally:
            listing.cancelled.set()
            listing.join()
        if listing.error is not None:
            raise listing.error
        check()
        if totals.objects != listing.objects:
            raise Failed(f"run {run.run_id} counted {totals.objects} objects of {listing.objects}; run it again")
        if job.completed and totals.objects:
            done.keys.conclude(totals.parts)
        report = totals.report(
            unchanged=listing.unchanged,
            erased=erased.left_out,
            not_scans=dict(job.pacs.left_out) if job.pacs else None,
            run_id=run.run_id,
            started_at=started.isoformat(timespec="seconds"),
            ended_at=datetime.now(UTC).isoformat(timespec="seconds"),
            resumed=resumed,
            config=settings,
            inventory=comparison
            and comparison.read(
                listing.of_files, {run.run_id: totals.parts}, _left_open(config, done, resumed=resumed)
            ),
        )
        try:
            report = job.conclude(run, report)
        except Exception as error:
            # The run ends all the same: else later runs would resume it, and list nothing.
            runs.finish(run, report.model_copy(update={"not_concluded": f"{type(error).__name__}: {error}"}))
            raise
        _log.info("details: %s", runs.finish(run, report))
    if config.metrics_to:
        metrics.leave(config.metrics_to, job.name, progress.prometheus_text(job.name, report, time.time()))
    return report


def _left_open(config: ArchiveConfig, done: Done, *, resumed: bool) -> str:
    """Return why objects of an archive that was listed may be left to be read; empty if none is."""
    if config.limit:
        return "the last run had --limit"
    if resumed:
        return "the last run was interrupted, and resumed"
    return "the last run has objects that are read again, since their store withheld them" if done.any_withheld else ""


@contextmanager
def _started(task: Callable[[], Any]) -> Iterator[Future[Any]]:
    """Run `task` in a thread beside the block."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(copy_context().run, task)


@dataclass
class Done:
    """What actors have done: the counts of their parts, and the records of these for the key files of the run."""

    totals: Totals[Any]
    keys: RunKeys
    any_withheld: bool = False
    """Objects are left that a later run reads again."""

    def add(self, row: dict[str, Any]) -> PartTally | None:
        """Count a part by what its actor returns; return its tally, or None if it was counted before."""
        tally: PartTally | None = self.totals.add(row["part"], row["tally"])
        if tally is not None:
            records = np.frombuffer(row["records"], RECORD)
            self.keys.add(records)
            self.any_withheld |= bool((records["outcome"] == WITHHELD).any())
        return tally


def _process(job: ArchiveJob, run: Run, done: Done, listing: Listing, check: Callable[[], None]) -> None:
    """Have actors process the parts, and count them as they come."""
    # Ray takes a second to import, which a night with nothing new does without, and Ray Data another one.
    from btray.core.cluster import connected

    config, totals = job.config, done.totals
    with (
        _started(partial(import_module, "btray.bulk.pipeline")) as imported,
        connected(),
        metrics.lasting(),
        ProgressLine("starting the actors", keep=False) as line,
        ExitStack() as stack,
    ):
        process_parts = imported.result().process_parts
        # Before the first part already, for whoever waits for actors that never start.
        progress.report_progress(job.name, run.run_id, totals, queue=listing.objects)
        parts = process_parts(
            job.processor(),
            run,
            actors=config.actors,
            patience=config.patience,
            gpu_share=job.gpu_share(),
            make_reader=job.reader(),
        )
        prepared: Future[Any] | None = None  # if it fails, so does what needs it
        for batch in parts.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            check()
            for row in pa.Table.to_pylist(batch):
                tally = done.add(row)
                if tally is not None:
                    progress.report_part(job.name, run.run_id, tally)
            progress.report_progress(job.name, run.run_id, totals, queue=listing.objects - totals.objects)
            line.update(progress.progress_line(totals, listing))
            prepared = prepared or stack.enter_context(_started(job.prepare))
