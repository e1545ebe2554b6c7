"""Classify an archive into the results table with Ray Data: every frame of every object once, whatever is killed."""

from __future__ import annotations

import logging
from pathlib import Path

import ray.data

from btray import storage
from btray.bulk import table
from btray.bulk.classify_worker import PartClassifier, WorkerOptions
from btray.bulk.config import ClassifyConfig
from btray.bulk.driver import Report, Work, actors_for, parts_through, run_archive
from btray.bulk.explanations import FOLDER, read_frames, write_explanations
from btray.bulk.progress import summary
from btray.bulk.runs import Run
from btray.bulk.summary import SHOWN, compare, write_summary
from btray.core.cluster import cpus
from btray.core.errors import UserError
from btray.data.key_set import KeySet
from btray.model.bundle import Bundle, load_bundle
from btray.model.classifier import Classifier

_log = logging.getLogger(__name__)


def classify(config: ClassifyConfig) -> str:
    """Classify what is new in the archive and return the URI of the table.

    Raises UserError for unusable input and where another run is writing to this output, Failed where a store does not
    answer, ThresholdExceeded above `max_rejected`, after writing.
    """
    output = storage.resolve(config.output)
    bundle = load_bundle(config.model, model_id=config.model_id)
    model_id = bundle.manifest.model_id
    for label in config.explain_labels:
        if label not in bundle.manifest.classes:
            known = ", ".join(bundle.manifest.classes)
            raise UserError(f"--explain-labels {label}: the model does not know it; it knows {known}")

    def conclude(run: Run, report: Report) -> None:
        report |= {"model_id": model_id, "drift": {}}
        if report["objects"]:
            table.note_done(run)
        try:
            _describe(config, run, report, bundle)
        except Exception as error:  # the rows are there, and so is what the run counted
            _log.warning("there is no summary of this night: %s", error, exc_info=True)
            report["summary_failed"] = f"{type(error).__name__}: {error}"
        print(summary(report), flush=True)

    work = Work(
        name="classify",
        output=output,
        group=model_id,
        choices=config.model_dump(mode="json", include={"reclassify", "retry_rejected", "explain_labels"}),
        product=table.product(model_id),
        done=lambda scratch: _done_before(scratch, output, model_id, config),
        dataset=lambda run: _dataset(config, run),
        least_certain=_least_certain(config),
        conclude=conclude,
    )
    run_archive(config, work)
    return output


def _describe(config: ClassifyConfig, run: Run, report: Report, bundle: Bundle) -> None:
    """Compare the run with those before, and write its page and the pictures of its least certain scans."""
    profiles = compare(run, report, bundle)
    if report["objects"]:
        classifier = Classifier(bundle, device="cpu")
        uri = write_summary(run, report, profiles, classifier)
        _explain_least_certain(config, run, report, classifier)
        _log.info("summary: %s", uri)


def _least_certain(config: ClassifyConfig) -> int:
    return max(SHOWN, config.explain)


def _explain_least_certain(config: ClassifyConfig, run: Run, report: Report, classifier: Classifier) -> None:
    scans = report["least_certain"][: config.explain]
    folder = storage.join(run.output, FOLDER, run.run_id)
    for start in range(0, len(scans), classifier.batch_size):
        said, frames = read_frames(classifier, scans[start : start + classifier.batch_size])
        write_explanations(folder, f"least_certain-{start:05d}", said, frames, classifier)


def _done_before(scratch: Path, output: str, model_id: str, config: ClassifyConfig) -> KeySet:
    done = KeySet(scratch)
    if not config.reclassify:
        for keys in table.done_keys(output, model_id, retry_rejected=config.retry_rejected, note=not config.dry_run):
            done.add(keys)
    return done


def _dataset(config: ClassifyConfig, run: Run) -> ray.data.Dataset:
    share = config.gpu_share if config.use_gpu else 0.0
    actors = actors_for(config.actors, share)
    options = WorkerOptions(
        model_id=run.group,
        engine=config.engine,
        device="cuda" if config.use_gpu else "cpu",
        batch_size=config.batch_size,
        threads=config.threads,
        decoders=max(1, int(cpus() / actors[0])),
        patience=config.patience,
        explain_labels=config.explain_labels,
        least_certain=_least_certain(config),
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
