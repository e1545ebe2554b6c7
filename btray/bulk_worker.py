"""The actor of the classify job: decodes and classifies what it reads."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime

from btray import logs
from btray.classifier import Classifier
from btray.engines import EngineName
from btray.frames import Rejection
from btray.logs import LogFormat
from btray.lots import Answer, LotReader
from btray.part_worker import PartWorker, Row, Seconds
from btray.preprocess import Frame
from btray.results import SCHEMA, row_of
from btray.runs import Run
from btray.storage import FileInfo, StorageError


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """How an actor works."""

    model_id: str
    engine: EngineName
    """How the network is run."""
    batch_size: int
    """Images a forward pass."""
    threads: int
    """Objects read at a time."""
    decoders: int
    """Objects decoded at a time."""
    patience: float
    """Seconds that a store which is away is waited for."""
    log_format: LogFormat = "text"
    """How the actor logs."""


class PartClassifier(PartWorker):
    """Rows of the results table."""

    schema = SCHEMA

    def __init__(self, model: str, run: Run, options: WorkerOptions) -> None:
        logs.begin_in_worker(options.log_format, job="classify", run_id=run.run_id)
        # Loaded here and not sent: an actor that Ray starts again must not depend on an object of a node that died.
        self.classifier = Classifier.load(
            model, model_id=options.model_id, batch_size=options.batch_size, engine=options.engine
        )
        self.decoders = ThreadPoolExecutor(options.decoders)
        max_bytes = self.classifier.source.limits.max_bytes
        reader = LotReader(
            threads=options.threads, patience=options.patience, max_bytes=max_bytes, least=options.batch_size
        )
        super().__init__(run, reader, options.patience)

    def rows(self, lot: Sequence[FileInfo], answers: Sequence[Answer], seconds: Seconds) -> list[Row]:
        """One a frame, or one for an object that gives none."""
        started = time.perf_counter()
        found = list(self.decoders.map(self._decode, answers))
        decoded = time.perf_counter()
        predictions = self.classifier.predict_decoded(found, [info.uri for info in lot])
        now = datetime.now(UTC)
        rows = [
            row_of(prediction, lot[prediction.index], run_id=self.run.run_id, classified_at=now)
            for prediction in predictions
        ]
        seconds["decode"] += decoded - started
        seconds["predict"] += time.perf_counter() - decoded
        return rows

    def _decode(self, answer: Answer) -> list[Frame] | Rejection:
        if isinstance(answer, StorageError):
            return Rejection(answer.code, str(answer), answer.retryable)
        return self.classifier.source.from_bytes(answer)
