"""Classify an archive into the results table with Ray Data: every frame of every object once, whatever is killed."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from btray import storage
from btray.bulk import table
from btray.bulk.clinical.headers import HeaderReader
from btray.bulk.clinical.pseudonyms import Pseudonyms, check_table, claim_table
from btray.bulk.clinical.series import DERIVED, UNKNOWN
from btray.bulk.clinical.studies import read_studies, update_studies
from btray.bulk.config import ClassifyConfig
from btray.bulk.driver import ArchiveJob, run_archive
from btray.bulk.listing.completed import CompletedIndex
from btray.bulk.listing.key_files import CLASSIFIED, REJECTED, KeySource
from btray.bulk.listing.tasks import Tasks
from btray.bulk.progress import summarize
from btray.bulk.report import ClassifyTotals, RunReport
from btray.bulk.runs import Run
from btray.bulk.worklist import PartLimits
from btray.core.errors import UserError
from btray.data.packs import describe_pack, is_pack
from btray.data.scans import SliceInfo
from btray.model.bundle_files import read_files
from btray.model.config import default_batch_size
from btray.model.manifest import require_agreement
from btray.model.promotion import pinned
from btray.model.shipped import announce, locate
from btray.model.studies import Reader
from btray.storage import FileInfo
from btray.storage.parquet import set_aside

# torch takes seconds to import, which a night with nothing new does without.
if TYPE_CHECKING:
    from btray.bulk.worker import PartProcessor, PartReader
    from btray.model.bundle import Bundle
    from btray.model.classifier import Classifier
    from btray.model.manifest import Manifest

_log = logging.getLogger(__name__)

_PART_BYTES = 1 << 30
_STAGED_OBJECTS = 4096


def classify(config: ClassifyConfig) -> str:
    """Classify what is new in the archive and return the URI of the table.

    Raises UserError for unusable input and if another run is writing to this output, Failed if a store does not
    answer, ThresholdExceeded above `max_rejected`, after writing.
    """
    return run_archive(ClassifyJob(config))


class ClassifyJob(ArchiveJob):
    """Rows of the results table, and at the end the page on what was classified."""

    name = "classify"
    schema = table.SCHEMA
    choices = frozenset({"reclassify", "retry_rejected", "explain_labels", "series", "series_preset"})

    def __init__(self, config: ClassifyConfig) -> None:
        """Verify the bundle. Raises UserError if it does not know a label of `explain_labels` or may not use bf16."""
        config = pinned(config)
        self.model = locate(config.model)
        self.manifest, _ = read_files(self.model, model_id=config.model_id)
        announce(config.model, self.manifest.model_id)
        require_agreement(self.manifest, self.model, config.precision)
        classes = self.manifest.classes
        for label in config.explain_labels:
            if label not in classes:
                raise UserError(f"--explain-labels {label}: the model does not know it; it knows {', '.join(classes)}")
        super().__init__(config, group=self.manifest.model_id)
        self.config: ClassifyConfig = config
        self.pacs = config.pacs_source()
        self.pseudonyms = Pseudonyms.from_file(config.pseudonymize) if config.pseudonymize else None
        check_table(self.output, self.pseudonyms)
        self.completed: CompletedIndex = CompletedIndex(self.output, self.group)
        self.outputs = (self.output, config.studies_uri)
        self.preprocess = self.manifest.preprocess
        choice = config.series_filter
        if choice and not self.pacs and is_pack(config.input) and describe_pack(config.input).preprocess:
            raise UserError(
                f"--series: {config.input} is a pack of frames, which have no headers; give what was packed"
            )
        self.reason = choice.reason if choice else ""
        # Bytes are not held with the rows. Of two stages, the first decodes a part ahead as far as memory goes.
        self.part_limits = PartLimits(_STAGED_OBJECTS if config.stages == 2 else PartLimits().objects, _PART_BYTES)
        self.worst = CLASSIFIED if config.retry_rejected else REJECTED
        rereading = {"--reclassify": config.reclassify, "--retry-rejected": config.retry_rejected}
        self.rereads = ", ".join(name for name, is_given in rereading.items() if is_given)
        reading: dict[str, Any] = {"threads": config.threads, "patience": config.patience}
        self._headers = HeaderReader(choice, **reading, pseudonyms=self.pseudonyms, pacs=self.pacs) if choice else None
        self._series: Counter[tuple[str | None, str, str]] = Counter()

    def begin(self) -> None:
        """Keep what tells later runs whether they have the same key."""
        claim_table(self.output, self.pseudonyms)

    def settings(self) -> dict[str, Any]:
        """Return the settings; with --pseudonymize those that name objects are pseudonyms."""
        settings = super().settings()
        if self.pseudonyms:
            settings["input"] = self.pseudonyms.name(self.config.input)
            settings |= {key: list(map(self.pseudonyms.name, settings[key])) for key in ("include", "exclude")}
        return settings

    def preview(self, objects: Sequence[FileInfo]) -> None:
        """Count the objects of each series that --series would choose or leave out."""
        for header in self._headers.read(objects) if self._headers else ():
            info = header if isinstance(header, SliceInfo) else None
            outcome = "unreadable" if info is None and header is not None else "left out"
            if outcome == "left out" and self._headers and self._headers.choice.matches(info):
                outcome = "chosen"
            shown = ", ".join(f"{key}={getattr(info, key, None) or UNKNOWN}" for key in DERIVED)
            self._series[info.series_uid if info else None, outcome, shown] += 1

    def previewed(self) -> list[str]:
        """Return a line for each series: what was derived of it, and no name."""
        return sorted(f"{outcome}: {count} objects, {shown}" for (_, outcome, shown), count in self._series.items())

    def folder(self, run_date: str) -> str:
        """Return the folder of this model's rows of a day."""
        return table.folder(self.group, run_date)

    def outcomes(self, tasks: Tasks) -> Sequence[KeySource]:
        """Return what became of the objects that the model has seen before; of none, if all are read again."""
        return [] if self.config.reclassify else self.completed.sources(tasks, write_missing=not self.config.dry_run)

    @cached_property
    def bundle(self) -> Bundle:
        """The bundle, loaded when it is first asked for."""
        from btray.model.bundle import load_bundle

        return load_bundle(self.model, model_id=self.group)

    def prepare(self) -> None:
        """Load the bundle."""
        _ = self.bundle

    def processor(self) -> Callable[[Run, int], PartProcessor]:
        """Return what makes the classifier of an actor. Raises UserError for bf16 if only this machine is there."""
        self._require_bf16()
        # The key itself, since its file may not be on the node of the actor.
        return partial(_part_classifier, self.config, self.group, self.pseudonyms)

    def reader(self) -> Callable[[Run], PartReader] | None:
        """Return what makes the reader of an actor that decodes for those that classify, if there are such."""
        if self.config.stages == 1:
            return None
        return partial(_part_reader, self.config, self.manifest, self.pseudonyms)

    def gpu_share(self) -> float:
        """Return the GPU of each actor that classifies: what the config says, or what fits."""
        if not self.config.use_gpu:
            return 0.0
        from btray.bulk.pipeline import fitting_gpu_share

        return self.config.gpu_share or fitting_gpu_share()

    def _require_bf16(self) -> None:
        if self.config.precision == "bf16" and not self.config.use_gpu:
            import torch

            from btray.core.cluster import started_ray_here
            from btray.model.engines import require_bf16

            if started_ray_here():  # else the actors, which are elsewhere, will say so
                require_bf16(self.config.engine, torch.device("cpu"))

    def totals(self) -> ClassifyTotals:
        """Return counts with labels, profile and least certain frames."""
        return ClassifyTotals(count=self.config.least_certain)

    def conclude(self, run: Run, report: RunReport) -> RunReport:
        """Write the page and the pictures of the least certain frames; print what was classified."""
        report = report.model_copy(update={"model_id": self.group, "drift": {}})
        for uri in self.completed.damaged:
            set_aside(uri)  # now that what it held is classified anew
        reader = Reader.of(self.manifest)
        studies = self.config.studies_uri
        counts = update_studies(self.output, self.group, studies, reader, any_new=report.in_series > 0)
        report = report.model_copy(update={"studies": counts})
        try:
            if report.objects:
                report = self._summarized(run, report, studies)
        except Exception as error:  # the rows are there, and so is what the run counted
            reason = type(error).__name__ + ("" if self.pseudonyms else f": {error}")  # which may name an object
            _log.warning("there is no summary of this run: %s", reason, exc_info=not self.pseudonyms)
            report = report.model_copy(update={"summary_failed": reason})
        print(summarize(report), flush=True)
        return report

    def _summarized(self, run: Run, report: RunReport, studies: str) -> RunReport:
        """Write the page, and pictures of the least certain frames; return the report with its drift."""
        from btray.bulk import summary  # matplotlib: nothing needs it before the run has ended
        from btray.model.classifier import Classifier

        profiles, drift = summary.compare(run, report, self.bundle)
        report = report.model_copy(update={"drift": drift})
        classifier = Classifier(self.bundle, device="cpu", engine="eager")  # it explains; nothing is answered
        if self.pacs:
            classifier.source = replace(classifier.source, read=self.pacs.read_many)
        uids = {str(frame.study_uid) for frame in report.most_tumor}
        rows = read_studies(studies, self.group, uids)
        page = summary.write_summary(run, report, profiles, classifier, studies=rows, pseudonyms=self.pseudonyms)
        _log.info("summary: %s", page)
        self._explain_least_certain(run, report, classifier)
        return report

    def _explain_least_certain(self, run: Run, report: RunReport, classifier: Classifier) -> None:
        from btray.bulk.explanations import FOLDER, read_frames, write_explanations

        folder = storage.join(run.output, FOLDER, run.run_id)
        explained = report.least_certain[: self.config.explain]
        for start in range(0, len(explained), classifier.batch_size):
            some = explained[start : start + classifier.batch_size]
            frames, pixels = read_frames(classifier, some, self.pseudonyms)
            write_explanations(folder, f"least_certain-{start:05d}", frames, pixels, classifier)


def _part_classifier(
    config: ClassifyConfig, model_id: str, pseudonyms: Pseudonyms | None, run: Run, cpus: int
) -> PartProcessor:
    """Make the classifier of an actor, in its process."""
    from btray.bulk.classify_worker import PartClassifier

    return PartClassifier(config, model_id, pseudonyms, run, cpus)


def _part_reader(config: ClassifyConfig, manifest: Manifest, pseudonyms: Pseudonyms | None, run: Run) -> PartReader:
    """Make the reader of an actor that does not classify, in its process.

    Raises UserError if its node makes other frames than the model was trained with.
    """
    from btray.bulk.scan_reader import ScanReader
    from btray.core import logs
    from btray.data.frames import FrameSource
    from btray.model.bundle import require_same_frames

    logs.begin_in_worker(config.log_format, job="classify", run_id=run.run_id)
    require_same_frames(manifest, config.model)
    batch_size = config.batch_size or default_batch_size(gpu=config.use_gpu)
    return ScanReader(config, FrameSource(manifest.preprocess), pseudonyms, batch_size=batch_size, cpus=1)
