"""Reports what was pushed: reads each study that is still from its archive, classifies it whole and sends its report.

A study is one answer, so it is not put together from what several replicas were sent: the archive is asked for all of
it, and what btray wrote there is left out. Free of Ray; `btray.serving.dicomweb.job` is the process that runs it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import islice
from typing import Any, Final

from btray.core.errors import Failed, UserError
from btray.model.classifier import Classifier
from btray.model.studies import Decision, Reader, StudyCollector
from btray.pacs.address import Address, InstanceUrl
from btray.pacs.client import DicomWeb
from btray.pacs.config import PacsConfig
from btray.pacs.report.answers import StudyAnswer
from btray.pacs.report.reporter import Reporter
from btray.pacs.source import PacsSource
from btray.serving.config import ServiceConfig
from btray.serving.dicomweb.pending import PendingStudies, StillStudies
from btray.storage import StorageError
from btray.storage.read_many import ReadResult
from btray.storage.retry import DEFAULT_TIMEOUT, backoff_delays

_log = logging.getLogger(__name__)

_AT_A_TIME: Final = 32
"""Instances held in memory at a time: a study of any size goes through."""
_LONGEST_PAUSE: Final = 3600.0
"""Seconds between two attempts at a study that cannot be reported."""


class PushedStudies:
    """Reports the studies that were pushed to one service, by its main model."""

    def __init__(self, config: ServiceConfig, access: PacsConfig, before: PushedStudies | None = None) -> None:
        """Load the model; `config` has a `report_to`, reached with `access`. Raises UserError for a bad bundle.

        What it knows of the studies that wait is taken over from `before`, which reported by an earlier config.
        """
        assert config.report_to is not None  # noqa: S101 - whoever calls this has seen it
        assert config.pending is not None  # noqa: S101 - the config demands it
        self._classifier = Classifier.load(
            config.model,
            model_id=config.model_id,
            device="cpu",
            abstain_below=config.abstain_below,
            engine=config.engine,
            precision=config.precision,
        )
        self._reader = Reader.of(self._classifier.manifest)
        self._root = Address.parse(config.report_to).root
        self._access = access
        self._reporter = Reporter(DicomWeb(self._root, access), self._classifier.manifest)
        self._pending = PendingStudies(config.pending)
        self._still: StillStudies = before._still if before else StillStudies(config.report_after_seconds)
        self._still.quiet = config.report_after_seconds
        self._pauses: dict[str, Iterator[float]] = before._pauses if before else {}

    def report_what_is_still(self) -> None:
        """Report each study that is still now, and keep those that cannot be for another time. Raises StorageError."""
        marks = self._pending.marks()
        for study_uid in self._still.of(marks, time.monotonic()):
            try:
                self.report(study_uid)
            except (UserError, Failed) as error:  # a StorageError is one
                if study_uid not in self._pauses:
                    self._pauses[study_uid] = backoff_delays(math.inf, first=self._still.quiet, longest=_LONGEST_PAUSE)
                pause = next(self._pauses[study_uid])
                _log.warning("study %s is not reported: %s; tried again in %.0f s", study_uid, error, pause)
                self._still.again(study_uid, time.monotonic(), pause)
                continue
            self._pauses.pop(study_uid, None)
            self._pending.remove(marks[study_uid])

    def report(self, study_uid: str) -> None:
        """Report one study. Raises UserError or Failed if the archive lacks it, does not answer, or takes no report."""
        answer = self.answer(study_uid)
        if answer is None:
            _log.warning("study %s has no slice that can be classified: there is nothing to report", study_uid)
            return
        said = {"sent": "its report is sent", "there": "the archive has the report of these slices already"}
        _log.info("study %s: %s", study_uid, said[self._reporter.report(answer)])

    def answer(self, study_uid: str) -> StudyAnswer | None:
        """Return what the model says of all that the archive has of a study; None if it can classify none of it."""
        address = Address(self._root, (("StudyInstanceUID", study_uid),))
        source = PacsSource(address, self._access, patience=DEFAULT_TIMEOUT)
        uris = [image.uri for image in source.list_images()]
        collector, found = StudyCollector(self._reader), source.read(uris)
        while part := list(islice(found, _AT_A_TIME)):
            files = [_whole(data) for _, data in part]
            names = [uris[number] for number, _ in part]
            collector.add(self._classifier.predict_decoded(self._classifier.frames(files), names))
        rows = [self._row(decision) for decision in collector.decisions()]
        return StudyAnswer.of_rows(rows, model_id=self._classifier.model_id, top=self._reader.rule.top)

    def _row(self, decision: Decision) -> dict[str, Any]:
        """Return what is said of a series or study, as a row of the table of studies."""
        named = [(InstanceUrl.parse(str(uri)), frame) for uri, frame in decision.key_frames]
        return asdict(decision.verdict) | {
            "level": decision.level,
            "study_uid": decision.study_uid,
            "series_uid": decision.series_uid,
            "rule": str(self._reader),
            "classified_at": datetime.now(UTC),
            "key_frames": [
                {"series_uid": url.series, "instance_uid": url.instance, "frame": frame} for url, frame in named if url
            ],
        }


def _whole(data: ReadResult) -> bytes:
    """Return an instance. Raises the StorageError of one that could not be read: half a study is none."""
    if isinstance(data, StorageError):
        raise data
    return data
