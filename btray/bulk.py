"""Classify an archive into the results table with Ray Data: every frame of every object once, whatever is killed.

One row of the dataset is one part of the worklist: an actor reads, decodes and classifies its objects, writes the
part's file with one put that fails where the file is there, and gives back its counts. So a run that is taken up, a
task that Ray repeats and a worker that outlives its driver all end with the same files.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.data

from btray import lease, runs, storage
from btray.archive import Selection, list_archive
from btray.bulk_report import Progress, Totals, duration, summary
from btray.bulk_worker import PartClassifier, WorkerOptions
from btray.bundle import load_bundle
from btray.cluster import connected, cpus, gpus
from btray.errors import ThresholdExceeded, UserError
from btray.listing import Listing, NewObjects, done_before
from btray.runs import Run
from btray.settings_bulk import ClassifyConfig
from btray.storage import FileInfo, StorageError
from btray.worklist_source import WorklistSource

_log = logging.getLogger(__name__)

# Less than a CPU each, so that the task that reads the worklist always finds room, on one CPU too.
_ACTOR_CPUS = 0.9
_READER_CPUS = 0.05


def classify(config: ClassifyConfig) -> str:
    """Classify what is new in the archive and return the URI of the table.

    Raises UserError for unusable input and where another run is writing to this output, ThresholdExceeded above
    `max_rejected`, after writing.
    """
    output = storage.resolve(config.output)
    model_id = load_bundle(config.model, model_id=config.model_id).manifest.model_id
    found = _peeked(list_archive(config.input, _selection(config, output)))
    try:
        if config.dry_run:
            print(_estimate(config, output, model_id, found), flush=True)
            return output
        with lease.held(output) as check:
            totals = _run(config, output, model_id, found, check)
    except StorageError as error:
        raise storage.user_error(error) from error
    _enforce(totals, config.max_rejected)
    return output


def _selection(config: ClassifyConfig, output: str) -> Selection:
    return Selection(include=config.include, exclude=config.exclude, since=config.since, outside=output)


def _peeked(found: Iterator[FileInfo]) -> Iterator[FileInfo]:
    """The same, after the first look: an archive that is not there is refused before anything is written."""
    first = next(found, None)
    return iter(()) if first is None else chain([first], found)


def _request(config: ClassifyConfig) -> dict[str, Any]:
    """What the worklist follows from."""
    chosen = {"include", "exclude", "since", "limit", "reclassify", "retry_rejected"}
    return {"input": storage.resolve(config.input)} | config.model_dump(mode="json", include=chosen)


def _estimate(config: ClassifyConfig, output: str, model_id: str, found: Iterator[FileInfo]) -> str:
    run = Run(run_id="", model_id=model_id, run_date="", output=output, request={})
    with tempfile.TemporaryDirectory() as scratch:
        new = NewObjects(done_before(Path(scratch), run, config))
        objects = size = 0
        for info in new.of(found):
            if objects == config.limit:
                break
            objects, size = objects + 1, size + info.size
    rate = (runs.last_report(output, model_id) or {}).get("images_per_second")
    took = (
        f"about {duration(objects / rate)} at the last run's {rate:.0f} images/s" if rate else "unknown time: first run"
    )
    return f"{objects} new objects, {size / 1e6:.1f} MB, {took}; {new.unchanged} unchanged. Nothing was written."


def _run(
    config: ClassifyConfig, output: str, model_id: str, found: Iterator[FileInfo], check: Callable[[], None]
) -> Totals:
    started = datetime.now(UTC)
    totals = Totals()
    with storage.patient(config.patience), tempfile.TemporaryDirectory() as scratch:
        run, resumed = runs.begin(output, model_id, _request(config))
        if resumed:
            _log.info("taking up run %s, which was cut off", run.run_id)
        listing = Listing(run, found, Path(scratch), config)
        listing.start()
        try:
            listing.begun.wait()
            if not (listing.complete and listing.objects == 0) and listing.error is None:
                _classify_parts(lambda: _dataset(config, run), totals, Progress(totals, listing), check)
        finally:
            listing.cancelled.set()
            listing.join()
        if listing.error is not None:
            raise listing.error
        check()
        if totals.objects != listing.objects:
            raise RuntimeError(f"run {run.run_id} counted {totals.objects} objects of {listing.objects}; run it again")
        report = totals.report(listing.unchanged) | {
            "state": "finished",
            "run_id": run.run_id,
            "model_id": run.model_id,
            "started_at": started.isoformat(timespec="seconds"),
            "ended_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "resumed": resumed,
            "config": config.model_dump(mode="json"),
        }
        where = runs.finish(run, report)
    print(summary(report), flush=True)
    _log.info("details: %s", where)
    return totals


def _classify_parts(
    dataset: Callable[[], ray.data.Dataset], totals: Totals, progress: Progress, check: Callable[[], None]
) -> None:
    with connected():
        for batch in dataset().iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            check()
            for row in pa.Table.to_pylist(batch):
                totals.add(row["part"], row["tally"])
            progress.show()
        progress.end()


def _dataset(config: ClassifyConfig, run: Run) -> ray.data.Dataset:
    """Columns part and tally, one row for each part of the run's worklist as it is written."""
    share = config.gpu_share if config.use_gpu else 0.0
    if config.use_gpu and not gpus():
        raise UserError("--use-gpu: the cluster has no GPU; leave it out, or connect to one that has (RAY_ADDRESS)")
    fitting = math.floor(gpus() / share) if share else int(cpus())
    actors = max(1, min(config.actors or fitting, fitting))
    options = WorkerOptions(
        engine=config.engine,
        batch_size=config.batch_size,
        threads=config.threads,
        decoders=max(1, int(cpus() / actors)),
        patience=config.patience,
    )
    context = ray.data.DataContext.get_current()
    before = context.target_max_block_size
    context.target_max_block_size = (
        1  # bytes: each row its own block, or the first parts would wait for 128 MiB of them
    )
    try:
        worklist = ray.data.read_datasource(
            WorklistSource(run.worklist, config.patience), num_cpus=_READER_CPUS, override_num_blocks=1
        )
        return worklist.map_batches(
            PartClassifier,
            fn_constructor_args=(storage.resolve(config.model), run, options),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=min(_ACTOR_CPUS, _ACTOR_CPUS * cpus() / actors),
            num_gpus=share or None,
            compute=ray.data.ActorPoolStrategy(
                min_size=1, initial_size=actors, max_size=actors, max_tasks_in_flight_per_actor=2
            ),
        )
    finally:
        context.target_max_block_size = before


def _enforce(totals: Totals, limit: float | None) -> None:
    rejected = sum(totals.rejected.values())
    if limit is None or rejected <= limit * totals.objects:
        return
    code, count = totals.rejected.most_common(1)[0]
    raise ThresholdExceeded(
        f"{rejected} of {totals.objects} objects were rejected ({rejected / totals.objects:.1%}), above --max-rejected "
        f"{limit:.1%}; most often {code} ({count}); mend the data or raise --max-rejected"
    )
