"""One run over an archive: list what is new, hand it part by part to actors, count what they say, end with run.json.

One row of the dataset is one part of the worklist: an actor reads its objects, writes the part's file with one put
that fails where the file is there, and gives back its counts. So a run that is taken up, a task that Ray repeats and
a worker that outlives its driver all end with the same files. What the actors do with a part is the caller's.
"""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.data
import ray.exceptions

from btray import storage
from btray.bulk import progress, runs
from btray.bulk.archive import Selection, list_archive
from btray.bulk.config import ArchiveConfig
from btray.bulk.listing import Listing, NewObjects
from btray.bulk.part_files import Product
from btray.bulk.pipeline import WorklistSource
from btray.bulk.progress import Progress, Totals, duration
from btray.bulk.runs import Run
from btray.core import logs, metrics
from btray.core.cluster import connected, cpus, require_gpus, started_ray_here
from btray.core.errors import Failed, ThresholdExceeded, UserError
from btray.data.key_set import KeySet
from btray.storage import FileInfo, StorageError, lease

_log = logging.getLogger(__name__)

Report = dict[str, Any]

# Less than a CPU each, so that the task that reads the worklist always finds room, on one CPU too.
_ACTOR_CPUS = 0.9
_READER_CPUS = 0.05

# Ray Data looks at its tasks ten times a second and takes what waits in their buffers, two blocks of each where nothing
# is said: 20 parts a second for all actors of a cluster, however many. A block here is a list of objects, some 50 kB.
_FEED = {
    "_max_num_blocks_in_streaming_gen_buffer": 32,
    "target_max_block_size": 1,  # bytes: each row its own block, or the first parts would wait for 128 MiB of them
    "raise_original_map_exception": True,
}
_IN_FLIGHT = 4  # parts of an actor, so that one that needs 30 ms for each does not wait for the next look


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a job does with an archive."""

    name: str
    """Of the job, in the names of its metrics."""
    output: str
    group: str
    """Of its runs: see `runs.Run`."""
    choices: Report
    """What its worklist follows from besides the selection; an unfinished run with others is given up."""
    product: Product
    done: Callable[[Path], KeySet]
    """Keys of the objects that earlier runs have settled; larger sets are kept in the folder given."""
    dataset: Callable[[Run], ray.data.Dataset]
    """Columns part and tally, one row for each part of the run's worklist as it is written: see `parts_through`."""
    least_certain: int = 0
    """How many of the least certain scans the report names."""
    conclude: Callable[[Run, Report], None] = lambda run, report: None
    """What is left to write once all parts are there, before the run ends."""


def run_archive(config: ArchiveConfig, work: Work) -> Report:
    """Do the work on what is new in the archive, or say how much that is; return what run.json says.

    Raises UserError for unusable input and where another run is writing to this output, Failed where a store does not
    answer, ThresholdExceeded above `max_rejected`, after writing.
    """
    with _in_own_words():
        found = _peeked(list_archive(config.input, _selection(config, work.output), patience=config.patience))
        if config.dry_run:
            return _estimate(config, work, found)
        with lease.hold(work.output) as check:
            report = _run(config, work, found, check)
    _enforce(report, config.max_rejected)
    return report


@contextmanager
def _in_own_words() -> Iterator[None]:
    """Raise what is meant for the user without Ray's traceback, and what a store did as one line with a remedy."""
    try:
        yield
    except (UserError, Failed, StorageError) as error:
        said = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
        if isinstance(said, StorageError):
            told = storage.user_error(said)
            said = Failed(str(told)) if said.retryable else told
        if said is error:
            raise
        raise said from error


def _selection(config: ArchiveConfig, output: str) -> Selection:
    return Selection(include=config.include, exclude=config.exclude, since=config.since, outside=output)


def _peeked(found: Iterator[FileInfo]) -> Iterator[FileInfo]:
    """The same, after the first look: an archive that is not there is refused before anything is written."""
    first = next(found, None)
    return iter(()) if first is None else chain([first], found)


def _request(config: ArchiveConfig, work: Work) -> Report:
    chosen = config.model_dump(mode="json", include={"include", "exclude", "since", "limit"})
    return {"input": storage.resolve(config.input)} | chosen | work.choices


def _estimate(config: ArchiveConfig, work: Work, found: Iterator[FileInfo]) -> Report:
    """How much there is to do, printed; nothing is written."""
    with tempfile.TemporaryDirectory() as scratch:
        new = NewObjects(work.done(Path(scratch)))
        objects = size = 0
        for info in new.of(found):
            if objects == config.limit:
                break
            objects, size = objects + 1, size + info.size
    rate = next(runs.reports(work.output, work.group), {}).get("images_per_second")
    took = (
        f"about {duration(objects / rate)} at the last run's {rate:.0f} images/s" if rate else "unknown time: first run"
    )
    print(
        f"{objects} new objects, {size / 1e6:.1f} MB, {took}; {new.unchanged} unchanged. Nothing was written.",
        flush=True,
    )
    return {"objects": objects, "bytes": size, "unchanged": new.unchanged}


def _run(config: ArchiveConfig, work: Work, found: Iterator[FileInfo], check: Callable[[], None]) -> Report:
    started = datetime.now(UTC)
    totals = Totals(least_certain=work.least_certain)
    with storage.retry_timeout(config.patience), tempfile.TemporaryDirectory() as scratch:
        run, resumed = runs.begin(work.output, work.group, _request(config, work), work.product)
        logs.bind(run_id=run.run_id)
        if resumed:
            _log.info("taking up run %s, which was cut off", run.run_id)
        listing = Listing(
            run,
            found,
            lambda: work.done(Path(scratch)),
            limit=config.limit,
            part_objects=work.product.part_objects,
            patience=config.patience,
            check=check,
        )
        listing.start()
        try:
            listing.begun.wait()
            if not (listing.complete and listing.objects == 0) and listing.error is None:
                _through(work, run, totals, listing, check)
        finally:
            listing.cancelled.set()
            listing.join()
        if listing.error is not None:
            raise listing.error
        check()
        if totals.objects != listing.objects:
            raise Failed(f"run {run.run_id} counted {totals.objects} objects of {listing.objects}; run it again")
        report = totals.report(listing.unchanged) | {
            "state": "finished",
            "run_id": run.run_id,
            "started_at": started.isoformat(timespec="seconds"),
            "ended_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "resumed": resumed,
            "config": config.model_dump(mode="json"),
        }
        _conclude(work, run, report)
    if config.metrics_to:
        metrics.leave(config.metrics_to, work.name, progress.lines_of(work.name, report, time.time()))
    return report


def _conclude(work: Work, run: Run, report: Report) -> None:
    """End the run, also where what was left to do fails: else later nights would take it up again, and list nothing."""
    failure: Exception | None = None
    try:
        work.conclude(run, report)
    except Exception as error:
        failure = error
        report["not_concluded"] = f"{type(error).__name__}: {error}"
    _log.info("details: %s", runs.finish(run, report))
    if failure is not None:
        raise failure


def _through(work: Work, run: Run, totals: Totals, listing: Listing, check: Callable[[], None]) -> None:
    line = Progress(totals, listing)
    with connected(dashboard=False), metrics.lasting():
        # before the first part already: who waits for actors that never start is to see that
        progress.report_progress(work.name, run.run_id, totals, queue=listing.objects)
        for batch in work.dataset(run).iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            check()
            for row in pa.Table.to_pylist(batch):
                counts = totals.add(row["part"], row["tally"])
                if counts is not None:
                    progress.part_ended(work.name, run.run_id, counts)
            progress.report_progress(work.name, run.run_id, totals, queue=listing.objects - totals.objects)
            line.show()
        line.end()


def actors_for(wanted: int | None, gpu_share: float = 0.0) -> tuple[int, int | None]:
    """Actors to begin with, and most; None for as many as will fit. Needs Ray.

    `wanted` (--actors) is held to what the cluster holds now, one a CPU or as many as its GPUs hold at `gpu_share`,
    where this job started its Ray itself; a cluster that it joined may grow to hold more, from no CPU at all.
    """
    fitting = max(1, math.floor(require_gpus() / gpu_share) if gpu_share else int(cpus()))
    first = min(wanted or fitting, fitting)
    return first, first if started_ray_here() else wanted


def parts_through(
    worker: type,
    arguments: tuple[Any, ...],
    run: Run,
    *,
    actors: tuple[int, int | None],
    patience: float,
    gpu_share: float = 0.0,
) -> ray.data.Dataset:
    """The worklist's parts, one row each, through actors of the class `worker`: at first, and at most. Needs Ray."""
    first, most = actors
    context = ray.data.DataContext.get_current()
    before = {name: getattr(context, name) for name in _FEED}
    for name, value in _FEED.items():
        setattr(context, name, value)
    try:
        worklist = ray.data.read_datasource(WorklistSource(run, patience), num_cpus=_READER_CPUS, override_num_blocks=1)
        return worklist.map_batches(
            worker,
            fn_constructor_args=arguments,
            batch_size=1,  # a part; None, which would do, Ray refuses to actors with GPUs
            batch_format="pyarrow",
            num_cpus=min(_ACTOR_CPUS, _ACTOR_CPUS * cpus() / first),
            num_gpus=gpu_share or None,
            compute=ray.data.ActorPoolStrategy(
                min_size=1, initial_size=first, max_size=most, max_tasks_in_flight_per_actor=_IN_FLIGHT
            ),
        )
    finally:
        for name, value in before.items():
            setattr(context, name, value)


def _enforce(report: Report, limit: float | None) -> None:
    rejected, objects = report["rejected"], report["objects"]
    if limit is None or rejected <= limit * objects:
        return
    code, count = next(iter(report["rejected_by_code"].items()))
    raise ThresholdExceeded(
        f"{rejected} of {objects} objects were rejected ({rejected / objects:.1%}), above --max-rejected "
        f"{limit:.1%}; most often {code} ({count}); mend the data or raise --max-rejected"
    )
