"""The actor of the classify job: decodes and classifies what it reads."""

from __future__ import annotations

import heapq
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np

from btray import storage
from btray.bulk.explanations import FOLDER, write_explanations
from btray.bulk.lots import Prefetcher
from btray.bulk.runs import Run
from btray.bulk.table import SCHEMA, row_of
from btray.bulk.worker import PartWorker, Row, Seconds
from btray.core import logs
from btray.core.logs import LogFormat
from btray.data.frames import FrameSource, Rejection
from btray.data.key_set import keys_of
from btray.data.preprocess import Frame
from btray.data.scans import Scan
from btray.model.classifier import Classifier
from btray.model.drift import Profile
from btray.model.engines import EngineName
from btray.model.prediction import Prediction
from btray.storage import FileInfo, StorageError
from btray.storage.read_many import ReadResult

# A scan may have 10,000 pages: frames are made and classified so many at a time, or as many as a batch has.
_FRAMES = 256
_SMALL = 4 << 20  # bytes of frames of one object

Decoded = list[Frame] | Scan | Rejection
"""What became of the bytes of an object."""


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


@dataclass(frozen=True)
class Piece:
    """Frames of one object that are classified together with others, or why it has none."""

    index: int
    """Of the object in its lot."""
    first: int
    """Number of the first of these frames among those of the object."""
    frames: list[Frame] | Rejection


class PartClassifier(PartWorker):
    """Rows of the results table."""

    schema = SCHEMA

    def __init__(self, model: str, run: Run, options: WorkerOptions) -> None:
        logs.begin_in_worker(options.log_format, job="classify", run_id=run.run_id)
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
        self.decoders = ThreadPoolExecutor(options.decoders) if options.decoders > 1 else None
        batch = self.classifier.batch_size
        self.most_frames = batch * math.ceil(_FRAMES / batch)
        max_bytes = self.classifier.source.limits.max_bytes
        reader = Prefetcher(threads=options.threads, patience=options.patience, max_bytes=max_bytes, least=batch)
        super().__init__(run, reader, options.patience)

    def rows(self, lot: Sequence[FileInfo], answers: Sequence[ReadResult], seconds: Seconds) -> list[Row]:
        """One a frame, or one for an object that gives none."""
        rows: list[Row] = []
        started = time.perf_counter()
        for pieces in pieces_of(self._decoded(answers), self.classifier.source, most=self.most_frames):
            seconds["decode"] += time.perf_counter() - started
            rows += self._classified(lot, pieces, seconds)
            started = time.perf_counter()
        seconds["decode"] += time.perf_counter() - started
        return rows

    def _classified(self, lot: Sequence[FileInfo], pieces: Sequence[Piece], seconds: Seconds) -> list[Row]:
        started = time.perf_counter()
        found = [piece.frames for piece in pieces]
        predictions = self.classifier.predict_decoded(found, [lot[piece.index].uri for piece in pieces])
        now = datetime.now(UTC)
        rows = []
        for prediction in predictions:
            piece = pieces[prediction.index]
            row = row_of(prediction, lot[piece.index], run_id=self.run.run_id, classified_at=now)
            rows.append(row | {"frame": piece.first + prediction.frame})
        predicted = time.perf_counter()
        seconds["predict"] += predicted - started
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

    def _decoded(self, answers: Sequence[ReadResult]) -> Iterator[Decoded]:
        """In their order, a few ahead of those that are asked for."""
        if self.decoders is None:
            yield from map(self._decode, answers)
            return
        ahead: deque[Future[Decoded]] = deque()
        for answer in answers:
            ahead.append(self.decoders.submit(self._decode, answer))
            if len(ahead) > 2 * self.options.decoders:
                yield ahead.popleft().result()
        yield from (decoding.result() for decoding in ahead)

    def _decode(self, answer: ReadResult) -> Decoded:
        """As frames, which other threads may make meanwhile; as a scan where its many pages are smaller than they."""
        if isinstance(answer, StorageError):
            return Rejection.of(answer)
        source = self.classifier.source
        scan = source.decode(answer)
        if isinstance(scan, Rejection):
            return scan
        as_frames = len(scan.frames) * source.preprocess.size**2
        return source.frames_of(scan) if as_frames <= max(_SMALL, sum(gray.nbytes for gray in scan.frames)) else scan


def pieces_of(found: Iterable[Decoded], source: FrameSource, *, most: int) -> Iterator[list[Piece]]:
    """The frames of all objects, and the rejections between them, in their order and `most` frames at a time."""
    pieces: list[Piece] = []
    held = 0
    for index, of_object in enumerate(found):
        if isinstance(of_object, Rejection):
            pieces.append(Piece(index, 0, of_object))
            continue
        pages: list[Any] = of_object.frames if isinstance(of_object, Scan) else of_object
        first = 0
        while first < len(pages):
            some = pages[first : first + most - held]
            frames: list[Frame] = source.frames_of(Scan(some)) if isinstance(of_object, Scan) else some
            pieces.append(Piece(index, first, frames))
            first, held = first + len(some), held + len(some)
            if held == most:
                yield pieces
                pieces, held = [], 0
    if pieces:
        yield pieces
