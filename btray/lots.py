"""Reading the objects of a part in lots, the next one while the last is worked on; waits for a store that is away."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from btray import s3, storage
from btray.reading import Answer, read_many
from btray.storage import FileInfo, StorageError

# What an actor holds at a time, twice: one lot is read while the one before it is worked on.
_LOT_OBJECTS = 64
_LOT_BYTES = 64 << 20
_PAUSE = 1.0  # seconds between two looks whether a store is back


def objects_of(part: dict[str, Any]) -> list[FileInfo]:
    """The objects of one part, as `segments.parts` gives it."""
    columns = (part[name] for name in ("uri", "size", "etag", "place"))
    return [FileInfo(uri, size, etag, 0.0, place) for uri, size, etag, place in zip(*columns, strict=True)]


class LotReader:
    """Reads lots of at most `least` or 64 objects, whichever is more, and 64 MiB; `threads` objects at a time."""

    def __init__(self, *, threads: int, patience: float, max_bytes: int, least: int = 1) -> None:
        self._threads = threads
        self._patience = patience
        self._max_bytes = max_bytes
        self._most = max(_LOT_OBJECTS, least)
        self._reader = ThreadPoolExecutor(1)

    def lots(
        self, objects: Sequence[FileInfo], seconds: dict[str, float]
    ) -> Iterator[tuple[list[FileInfo], list[Answer]]]:
        """Lots of objects with their bytes; `seconds["read"]` grows by the time spent waiting for them."""
        lots = _lots(objects, self._most)
        reading = [self._reader.submit(self._read, lot) for lot in lots[:1]]
        for number, lot in enumerate(lots):
            started = time.perf_counter()
            answers = reading.pop().result()
            seconds["read"] += time.perf_counter() - started
            reading += [self._reader.submit(self._read, following) for following in lots[number + 1 : number + 2]]
            yield lot, answers

    def _read(self, lot: Sequence[FileInfo]) -> list[Answer]:
        return read_patiently(
            [info.place or info.uri for info in lot],
            lambda uris: read_many(uris, threads=self._threads, max_bytes=self._max_bytes),
            self._patience,
        )


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
