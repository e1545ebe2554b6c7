"""The actor of the classify job: decodes and classifies what it reads."""

from __future__ import annotations

import heapq
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np

from btray import logs, storage
from btray.allocator import keep_freed_memory
from btray.classifier import Classifier, Prediction
from btray.drift import Profile
from btray.engines import EngineName
from btray.explanations import FOLDER, write_explanations
from btray.frames import Rejection
from btray.keys import keys_of
from btray.logs import LogFormat
from btray.lots import LotReader
from btray.part_worker import PartWorker, Row, Seconds
from btray.preprocess import Frame
from btray.reading import Answer
from btray.results import SCHEMA, row_of
from btray.runs import Run
from btray.storage import FileInfo, StorageError


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """How an actor works."""

    model_id: str
    engine: EngineName
    """How the network is run."""
    device: Literal["cpu", "cuda"]
    """Where it is run. Ray hides no GPU from an actor that asked for none, so what torch finds does not tell."""
    batch_size: int | None
    """Images a forward pass; None: as many as suit the device."""
    threads: int
    """Objects read at a time."""
    decoders: int
    """Objects decoded at a time."""
    patience: float
    """Seconds that a store which is away is waited for."""
    explain_labels: tuple[str, ...]
    """Labels whose scans get a picture of what spoke for them."""
    least_certain: int
    """How many of the least certain scans of each part are named to the driver."""
    log_format: LogFormat = "text"
    """How the actor logs."""


class PartClassifier(PartWorker):
    """Rows of the results table."""

    schema = SCHEMA

    def __init__(self, model: str, run: Run, options: WorkerOptions) -> None:
        logs.begin_in_worker(options.log_format, job="classify", run_id=run.run_id)
        keep_freed_memory()
        # Loaded here and not sent: an actor that Ray starts again must not depend on an object of a node that died.
        self.classifier = Classifier.load(
            model,
            model_id=options.model_id,
            device=options.device,
            batch_size=options.batch_size,
            engine=options.engine,
        )
        self.options = options
        # One decoder is this thread itself: nothing else is done meanwhile.
        self.decoded = ThreadPoolExecutor(options.decoders).map if options.decoders > 1 else map
        max_bytes = self.classifier.source.limits.max_bytes
        reader = LotReader(
            threads=options.threads, patience=options.patience, max_bytes=max_bytes, least=self.classifier.batch_size
        )
        super().__init__(run, reader, options.patience)

    def rows(self, lot: Sequence[FileInfo], answers: Sequence[Answer], seconds: Seconds) -> list[Row]:
        """One a frame, or one for an object that gives none."""
        started = time.perf_counter()
        found = list(self.decoded(self._decode, answers))
        decoded = time.perf_counter()
        predictions = self.classifier.predict_decoded(found, [info.uri for info in lot])
        now = datetime.now(UTC)
        rows = [
            row_of(prediction, lot[prediction.index], run_id=self.run.run_id, classified_at=now)
            for prediction in predictions
        ]
        seconds["decode"] += decoded - started
        predicted = time.perf_counter()
        seconds["predict"] += predicted - decoded
        if self.options.explain_labels:
            self._explain(rows, predictions, found)
            seconds["explain"] += time.perf_counter() - predicted
        return rows

    def _explain(
        self, rows: Sequence[Row], predictions: Sequence[Prediction], found: Sequence[list[Frame] | Rejection]
    ) -> None:
        """Pictures of the frames that got one of the chosen labels."""
        said: list[Row] = []
        frames: list[Frame] = []
        for row, prediction in zip(rows, predictions, strict=True):
            of_object = found[prediction.index]
            if prediction.label in self.options.explain_labels and not isinstance(of_object, Rejection):
                said.append(row)
                frames.append(of_object[prediction.frame])
        if said:
            folder = storage.join(self.run.output, FOLDER, self.run.run_id)
            first = keys_of([(said[0]["uri"], str(said[0]["frame"]))])[0].hex()
            write_explanations(folder, f"lot-{first}", said, np.stack(frames), self.classifier)

    def summed_up(self, rows: Sequence[Row], objects: Sequence[FileInfo]) -> dict[str, Any]:
        """Profile and least certain scans of a part."""
        classified = [row for row in rows if row["status"] == "ok"]
        least = heapq.nsmallest(self.options.least_certain, classified, key=lambda row: float(row["confidence"]))
        places = {info.uri: info.place or info.uri for info in objects}
        return {
            "profile": Profile.of(classified).to_json(),
            "least_certain": [
                {name: row[name] for name in ("uri", "frame", "label", "confidence")} | {"place": places[row["uri"]]}
                for row in least
            ],
        }

    def _decode(self, answer: Answer) -> list[Frame] | Rejection:
        if isinstance(answer, StorageError):
            return Rejection(answer.code, str(answer), answer.retryable)
        return self.classifier.source.from_bytes(answer)
