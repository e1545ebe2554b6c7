"""Classify an archive into the results table with Ray Data: every frame of every object once, whatever is killed."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import ray.data

from btray import results, runs, storage, telemetry
from btray.archive_run import Report, Work, actors_for, parts_through, run_archive
from btray.bulk_report import summary
from btray.bulk_worker import PartClassifier, WorkerOptions
from btray.bundle import load_bundle
from btray.cluster import cpus
from btray.keys import KeySet
from btray.runs import Run
from btray.settings_bulk import ClassifyConfig

# Earlier runs that a run's labels and confidences are compared with.
_COMPARED_RUNS = 30


def classify(config: ClassifyConfig) -> str:
    """Classify what is new in the archive and return the URI of the table.

    Raises UserError for unusable input and where another run is writing to this output, ThresholdExceeded above
    `max_rejected`, after writing.
    """
    output = storage.resolve(config.output)
    model_id = load_bundle(config.model, model_id=config.model_id).manifest.model_id

    def conclude(run: Run, report: Report) -> None:
        report["model_id"] = model_id
        earlier = islice(runs.reports(output, model_id), _COMPARED_RUNS)
        report["drift_psi"] = telemetry.drift(report, list(earlier))
        print(summary(report), flush=True)

    work = Work(
        name="classify",
        output=output,
        group=model_id,
        choices=config.model_dump(mode="json", include={"reclassify", "retry_rejected"}),
        product=results.product(model_id),
        done=lambda scratch: _done_before(scratch, output, model_id, config),
        dataset=lambda run: _dataset(config, run),
        conclude=conclude,
    )
    run_archive(config, work)
    return output


def _done_before(scratch: Path, output: str, model_id: str, config: ClassifyConfig) -> KeySet:
    done = KeySet(scratch)
    if not config.reclassify:
        for keys in results.done_keys(output, model_id, retry_rejected=config.retry_rejected):
            done.add(keys)
    return done


def _dataset(config: ClassifyConfig, run: Run) -> ray.data.Dataset:
    share = config.gpu_share if config.use_gpu else 0.0
    actors = actors_for(config.actors, share)
    options = WorkerOptions(
        model_id=run.group,
        engine=config.engine,
        batch_size=config.batch_size,
        threads=config.threads,
        decoders=max(1, int(cpus() / actors[0])),
        patience=config.patience,
        log_format=config.log_format,
    )
    return parts_through(
        PartClassifier,
        (storage.resolve(config.model), run, options),
        run,
        actors=actors,
        patience=config.patience,
        gpu_share=share,
    )
