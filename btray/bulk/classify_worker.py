"""What the classify job makes of the objects of a part, in an actor: decodes and classifies them."""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from btray import storage
from btray.bulk.clinical.headers import HeaderReader
from btray.bulk.clinical.pseudonyms import Pseudonyms
from btray.bulk.config import ClassifyConfig
from btray.bulk.explanations import FOLDER, write_explanations
from btray.bulk.report import ClassifiedFrame, ClassifyTally, least_certain, most_tumor
from btray.bulk.runs import Run
from btray.bulk.table import SCHEMA, row_of
from btray.bulk.worker import Prefetcher, Row, Seconds
from btray.core import logs
from btray.data.frames import Frames, FrameSource, Rejection
from btray.data.key_set import keys_of
from btray.data.preprocess import Frame
from btray.data.scans import Scan, ScanRejected
from btray.model.classifier import Classifier
from btray.model.drift import Profile
from btray.model.prediction import Prediction
from btray.model.studies import Reader
from btray.storage import FileInfo, StorageError
from btray.storage.read_many import ReadResult

# A scan may have 10,000 pages: so many frames at a time are made and classified, rounded up to whole batches.
_FRAMES = 256
_SMALL = 4 << 20  # bytes of frames of one object

Decoded = Frames | Scan | Rejection
"""What the bytes of an object become."""


@dataclass(frozen=True)
class Piece:
    """Frames of one object that are classified together with others, or why it has none."""

    index: int
    """Of the object in its batch."""
    first: int
    """Number of the first of these frames among those of the object."""
    frames: Frames | Rejection


class PartClassifier:
    """Makes rows of the results table."""

    schema = SCHEMA
    write_options: dict[str, Any] = {}  # noqa: RUF012 - never changed
    tally_type = ClassifyTally

    def __init__(
        self, config: ClassifyConfig, model_id: str, pseudonyms: Pseudonyms | None, run: Run, cpus: int
    ) -> None:
        """Load the bundle `config.model`, which must be `model_id`; decode `cpus` scans at a time.

        `pseudonyms` are those that objects are listed with.
        """
        logs.begin_in_worker(config.log_format, job="classify", run_id=run.run_id)
        # Loaded here and not sent: an actor that Ray starts again must not depend on an object of a node that died.
        self.classifier = Classifier.load(
            config.model,
            model_id=model_id,
            # Ray hides no GPU from an actor that has none, so what torch finds does not tell.
            device="cuda" if config.use_gpu else "cpu",
            batch_size=config.batch_size,
            engine=config.engine,
            precision=config.precision,
        )
        self.run = run
        self._config = config
        self._pseudonyms = pseudonyms
        choice = config.series_filter
        reading: dict[str, Any] = {"threads": config.threads, "patience": config.patience}
        self._headers = HeaderReader(choice, **reading, pseudonyms=pseudonyms) if choice else None
        self._reader = Reader.of(self.classifier.manifest)
        # One decoder is this thread itself: nothing else is done meanwhile.
        self._decoders = ThreadPoolExecutor(cpus) if cpus > 1 else None
        self._decoded_ahead = 2 * cpus
        batch = self.classifier.batch_size
        self.most_frames = batch * math.ceil(_FRAMES / batch)
        self.reader = Prefetcher(
            threads=config.threads,
            patience=config.patience,
            max_bytes=self.classifier.source.limits.max_bytes,
            least=batch,
            pseudonyms=pseudonyms,
        )

    def choose(self, objects: Sequence[FileInfo], seconds: Seconds) -> tuple[Sequence[FileInfo], list[Row]]:
        """Return the objects whose series are chosen, and the rows of the others, of which only headers are read."""
        if self._headers is None:
            return objects, []
        started = time.perf_counter()
        headers = self._headers.read(objects)
        seconds["headers"] += time.perf_counter() - started
        chosen: list[FileInfo] = []
        rows: list[Row] = []
        for info, header in zip(objects, headers, strict=True):
            if isinstance(header, ScanRejected | StorageError) or self._headers.choice.matches(header):
                chosen.append(info)  # or only its bytes tell what is wrong
                continue
            reason = Rejection("not_selected", self._headers.choice.reason, False, header)
            left_out = Prediction.of_rejection(reason, index=0, uri=info.uri, model_id=self.classifier.model_id)
            rows.append(self._row(left_out, info, datetime.now(UTC)))
        return chosen, rows

    def rows(self, objects: Sequence[FileInfo], results: Sequence[ReadResult], seconds: Seconds) -> list[Row]:
        """Return one row per frame, or one for an object that gives none; each frame with the digest of its pixels."""
        rows: list[Row] = []
        started = time.perf_counter()
        for pieces in pieces_of(self.decode(results), self.classifier.source, most=self.most_frames):
            seconds["decode"] += time.perf_counter() - started
            rows += self._classify(objects, pieces, seconds)
            started = time.perf_counter()
        seconds["decode"] += time.perf_counter() - started
        return rows

    def tally(self, rows: Sequence[Row], objects: Sequence[FileInfo], seconds: Seconds) -> ClassifyTally:
        """Return the counts of a part, its profile and its least certain frames."""
        classified = [row for row in rows if row["status"] == "ok"]
        places = {info.uri: info.place or info.uri for info in objects}
        shown = [row for row in classified if not row["burned_in"]]
        return ClassifyTally.of(
            rows,
            objects,
            seconds,
            labels=Counter(row["label"] for row in classified),
            profile=Profile.of(classified),
            least_certain=least_certain(
                (_frame_of(row, places[row["uri"]]) for row in shown), self._config.least_certain
            ),
            in_series=sum(1 for row in rows if row["study_uid"] or row["series_uid"]),
            most_tumor=most_tumor(self._of_study(row, places[row["uri"]]) for row in shown if row["study_uid"]),
        )

    def _of_study(self, row: Row, place: str) -> ClassifiedFrame:
        shares = np.array([[dict(row["probabilities"])[label] for label in self.classifier.classes]])
        tumor = float(self._reader.tumor(shares)[0])
        return replace(_frame_of(row, place), study_uid=row["study_uid"], tumor=tumor)

    def _classify(self, objects: Sequence[FileInfo], pieces: Sequence[Piece], seconds: Seconds) -> list[Row]:
        started = time.perf_counter()
        frames = [piece.frames for piece in pieces]
        predictions = self.classifier.predict_decoded(frames, [objects[piece.index].uri for piece in pieces])
        now = datetime.now(UTC)
        rows: list[Row] = []
        explained: list[Row] = []
        pixels: list[Frame] = []
        for prediction in predictions:
            piece = pieces[prediction.index]
            row = self._row(prediction, objects[piece.index], now)
            row["frame"] = piece.first + prediction.frame
            rows.append(row)
            if not isinstance(piece.frames, Rejection):
                frame = piece.frames[prediction.frame]
                row["picture"] = hashlib.sha256(frame.tobytes()).hexdigest()
                if prediction.label in self._config.explain_labels and not prediction.burned_in:
                    explained.append(row)
                    pixels.append(frame)
        predicted = time.perf_counter()
        seconds["predict"] += predicted - started
        if explained:
            folder = storage.join(self.run.output, FOLDER, self.run.run_id)
            first = keys_of([(explained[0]["uri"], str(explained[0]["frame"]))])[0].hex()
            shown = [_frame_of(row, row["uri"]) for row in explained]
            write_explanations(folder, f"lot-{first}", shown, np.stack(pixels), self.classifier)
        if self._config.explain_labels:
            seconds["explain"] += time.perf_counter() - predicted
        return rows

    def _row(self, prediction: Prediction, info: FileInfo, now: datetime) -> Row:
        row = row_of(prediction, info, run_id=self.run.run_id, classified_at=now)
        return self._pseudonyms.conceal_row(row) if self._pseudonyms else row

    def decode(self, results: Sequence[ReadResult]) -> Iterator[Decoded]:
        """Yield what the bytes become, in their order, a few ahead of those that are asked for."""
        if self._decoders is None:
            yield from map(self._decode, results)
            return
        ahead: deque[Future[Decoded]] = deque()
        for result in results:
            ahead.append(self._decoders.submit(self._decode, result))
            if len(ahead) > self._decoded_ahead:
                yield ahead.popleft().result()
        yield from (decoding.result() for decoding in ahead)

    def _decode(self, result: ReadResult) -> Decoded:
        """Return frames, so that other threads make them; but the scan if its many pages are smaller than they."""
        if isinstance(result, StorageError):
            return Rejection.of(result)
        source = self.classifier.source
        scan = source.decode(result)
        if isinstance(scan, Rejection):
            return scan
        as_frames = len(scan.frames) * source.preprocess.size**2
        return source.frames_of(scan) if as_frames <= max(_SMALL, sum(gray.nbytes for gray in scan.frames)) else scan


def _frame_of(row: Row, place: str) -> ClassifiedFrame:
    names = ("uri", "frame", "label", "confidence", "picture")
    return ClassifiedFrame(place=place, **{name: row[name] for name in names})


def pieces_of(decoded: Iterable[Decoded], source: FrameSource, *, most: int) -> Iterator[list[Piece]]:
    """Yield the frames of all objects, and the rejections between them, in their order and `most` frames at a time."""
    pieces: list[Piece] = []
    held = 0
    for index, of_object in enumerate(decoded):
        if isinstance(of_object, Rejection):
            pieces.append(Piece(index, 0, of_object))
            continue
        first, count = 0, len(of_object.frames if isinstance(of_object, Scan) else of_object)
        while first < count:
            end = min(count, first + most - held)
            if isinstance(of_object, Scan):
                infos = of_object.slices and of_object.slices[first:end]
                frames = source.frames_of(Scan(of_object.frames[first:end], infos))
            else:
                frames = of_object.part(first, end)
            pieces.append(Piece(index, first, frames))
            first, held = end, held + end - first
            if held == most:
                yield pieces
                pieces, held = [], 0
    if pieces:
        yield pieces
