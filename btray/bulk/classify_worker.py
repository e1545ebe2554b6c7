"""What the classify job makes of the frames of a part, in an actor: classifies them, and makes their rows."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from btray import storage
from btray.bulk.clinical.pseudonyms import Pseudonyms
from btray.bulk.config import ClassifyConfig
from btray.bulk.explanations import FOLDER, write_explanations
from btray.bulk.listing.completed import COLUMNS, records_of
from btray.bulk.listing.key_files import Records
from btray.bulk.report import ClassifiedFrame, ClassifyTally, least_certain, most_tumor
from btray.bulk.runs import Run
from btray.bulk.scan_reader import Piece, ScanReader
from btray.bulk.table import SCHEMA, row_of
from btray.bulk.worker import Row, Seconds
from btray.core import logs
from btray.data.frames import Rejection
from btray.data.key_set import keys_of
from btray.data.preprocess import Frame
from btray.model.classifier import Classifier
from btray.model.drift import Profile
from btray.model.prediction import Prediction
from btray.model.studies import Reader
from btray.storage import FileInfo


class PartClassifier:
    """Makes rows of the results table."""

    schema = SCHEMA
    write_options: dict[str, Any] = {}  # noqa: RUF012 - never changed
    tally_type = ClassifyTally
    key_columns = COLUMNS

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
        self._reader = Reader.of(self.classifier.manifest)
        batch = self.classifier.batch_size
        self.scans = ScanReader(config, self.classifier.source, pseudonyms, batch_size=batch, cpus=cpus)

    def lots(self, objects: Sequence[FileInfo], seconds: Seconds) -> Iterator[list[Piece]]:
        """Begin to read `objects`, and return what yields their frames; see `ScanReader.lots`."""
        return self.scans.lots(objects, seconds)

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

    def records(self, rows: Sequence[Row]) -> Records:
        """Return what became of the objects of a part."""
        schema = pa.schema([SCHEMA.field(name) for name in COLUMNS])
        return records_of(pa.RecordBatch.from_pylist(list(rows), schema))

    def rows(self, objects: Sequence[FileInfo], lot: Sequence[Piece], seconds: Seconds) -> list[Row]:
        """Return one row per frame, or one for an object that gives none; each frame with the digest of its pixels."""
        started = time.perf_counter()
        frames = [piece.frames for piece in lot]
        predictions = self.classifier.predict_decoded(frames, [objects[piece.index].uri for piece in lot])
        now = datetime.now(UTC)
        rows: list[Row] = []
        explained: list[Row] = []
        pixels: list[Frame] = []
        for prediction in predictions:
            piece = lot[prediction.index]
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


def _frame_of(row: Row, place: str) -> ClassifiedFrame:
    names = ("uri", "frame", "label", "confidence", "picture")
    return ClassifiedFrame(place=place, **{name: row[name] for name in names})
