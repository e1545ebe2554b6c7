"""The actor of the classify job: one part of the worklist in, its file of the table written, its counts out."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import ray

from btray import runs, s3, storage
from btray.classifier import Classifier
from btray.engines import EngineName
from btray.frames import Rejection
from btray.preprocess import Frame
from btray.results import read_tally, row_of, write_part
from btray.runs import Run
from btray.storage import FileInfo, StorageError

Answer = bytes | StorageError

STAGES = ("read", "decode", "predict", "write")
# What an actor holds at a time, twice: one lot is read while the one before it is classified. A lot fills a batch.
_LOT_OBJECTS = 64
_LOT_BYTES = 64 << 20
_PAUSE = 1.0  # seconds between two looks whether a store is back


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """How an actor works."""

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


class PartClassifier:
    """Reads, decodes and classifies the objects of one part after another and writes one file for each."""

    def __init__(self, model: str, run: Run, options: WorkerOptions) -> None:
        self.run = run
        self.options = options
        # Loaded here and not sent: an actor that Ray starts again must not depend on an object of a node that died.
        self.classifier = Classifier.load(
            model, model_id=run.model_id, batch_size=options.batch_size, engine=options.engine
        )
        self.reader = ThreadPoolExecutor(1)
        self.decoders = ThreadPoolExecutor(options.decoders)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Ray's own code behind this property warns of its age
            self.died_before = ray.get_runtime_context().was_current_actor_reconstructed

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Parts as `runs.parts` gives them -> columns part, tally (JSON)."""
        tallies = []
        with storage.patient(self.options.patience):
            for part in batch.to_pylist():
                objects = [
                    FileInfo(uri, size, etag, 0.0)
                    for uri, etag, size in zip(part["uri"], part["etag"], part["size"], strict=True)
                ]
                if self.died_before:
                    runs.note_attempt(self.run, part["part"], objects[0].uri)
                tallies.append(json.dumps(self._part(self.run.part_uri(part["part"]), objects)))
        return pa.table({"part": batch["part"], "tally": pa.array(tallies, pa.string())})

    def _part(self, uri: str, objects: Sequence[FileInfo]) -> dict[str, Any]:
        """Counts of one part. Where its file is there, by an attempt that was cut off, they come from that file."""
        written = read_tally(uri)
        if written is not None:
            return written | {"reused": True}
        seconds = dict.fromkeys(STAGES, 0.0)
        rows: list[dict[str, Any]] = []
        for lot, answers in self._answers(objects, seconds):
            rows += self._rows(lot, answers, seconds)
        tally = _tally(rows, objects, seconds)
        started = time.perf_counter()
        if not write_part(uri, rows, tally):
            # another attempt at this part, whose answer is lost, was quicker
            return (read_tally(uri) or tally) | {"reused": True}
        seconds["write"] = time.perf_counter() - started
        return tally | {"seconds": seconds, "reused": False}

    def _answers(
        self, objects: Sequence[FileInfo], seconds: dict[str, float]
    ) -> Iterator[tuple[list[FileInfo], list[Answer]]]:
        """Lots of objects with their bytes; the next one is read meanwhile. `read` is the time spent waiting for it."""
        lots = _lots(objects, max(_LOT_OBJECTS, self.options.batch_size))
        reading = [self.reader.submit(self._read, lot) for lot in lots[:1]]
        for number, lot in enumerate(lots):
            started = time.perf_counter()
            answers = reading.pop().result()
            seconds["read"] += time.perf_counter() - started
            reading += [self.reader.submit(self._read, following) for following in lots[number + 1 : number + 2]]
            yield lot, answers

    def _read(self, lot: Sequence[FileInfo]) -> list[Answer]:
        """Bytes, or why there are none; a store that is away is waited for."""
        return read_patiently(
            [info.uri for info in lot],
            lambda uris: storage.read_many(
                uris, threads=self.options.threads, max_bytes=self.classifier.source.limits.max_bytes
            ),
            self.options.patience,
        )

    def _rows(
        self, lot: Sequence[FileInfo], answers: Sequence[Answer], seconds: dict[str, float]
    ) -> list[dict[str, Any]]:
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


def read_patiently(uris: Sequence[str], read: Callable[[Sequence[str]], list[Answer]], patience: float) -> list[Answer]:
    """What `read` gives for `uris`; those that a store left unanswered are read again once it is back.

    A store that is away for `patience` seconds is given up. One that answers, but not for these objects, is asked for
    them once more: a single broken object costs no waiting.
    """
    answers = read(uris)
    deadline = time.monotonic() + patience
    while away := [number for number, answer in enumerate(answers) if _is_unavailable(answer)]:
        late = time.monotonic() > deadline
        if not late and not _answers_at_all(uris[away[0]]):
            time.sleep(_PAUSE)
            continue
        for number, answer in zip(away, read([uris[number] for number in away]), strict=True):
            answers[number] = answer
        if late or _answers_at_all(uris[away[0]]):
            break
    return answers


def _is_unavailable(answer: Answer) -> bool:
    return isinstance(answer, StorageError) and answer.code == "unavailable"


def _answers_at_all(uri: str) -> bool:
    """Whether the store of `uri` answers something."""
    around = f"s3://{s3.split(uri)[0]}" if storage.is_remote(uri) else os.path.dirname(uri)
    try:
        storage.is_folder(around)
    except StorageError as error:
        return not error.retryable
    return True


def _lots(objects: Sequence[FileInfo], most: int) -> list[list[FileInfo]]:
    lots: list[list[FileInfo]] = []
    size = 0
    for info in objects:
        if not lots or len(lots[-1]) == most or size + info.size > _LOT_BYTES:
            lots.append([])
            size = 0
        lots[-1].append(info)
        size += info.size
    return lots


def _tally(rows: Sequence[dict[str, Any]], objects: Sequence[FileInfo], seconds: dict[str, float]) -> dict[str, Any]:
    return {
        "objects": len(objects),
        "frames": sum(row["status"] == "ok" for row in rows),
        "bytes": sum(info.size for info in objects),
        "labels": Counter(row["label"] for row in rows if row["status"] == "ok"),
        "rejected": Counter(row["error_code"] for row in rows if row["status"] != "ok"),
        "seconds": dict(seconds),
    }
