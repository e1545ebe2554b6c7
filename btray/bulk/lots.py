"""Reading the objects of a part in lots, the next one while the last is worked on."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from btray.storage import FileInfo, StorageError
from btray.storage.read_many import ReadResult, read_many, read_patiently

# What an actor holds at a time, twice: one lot is read while the one before it is worked on.
_LOT_OBJECTS = 64
_LOT_BYTES = 64 << 20


def objects_of(part: dict[str, Any]) -> list[FileInfo]:
    """The objects of one part, as `segments.parts` gives it."""
    columns = (part[name] for name in ("uri", "size", "etag", "place"))
    return [FileInfo(uri, size, etag, 0.0, place) for uri, size, etag, place in zip(*columns, strict=True)]


class Prefetcher:
    """Reads lots of at most `least` or 64 objects, whichever is more, and 64 MiB; `threads` objects at a time."""

    def __init__(self, *, threads: int, patience: float, max_bytes: int, least: int = 1) -> None:
        self._threads = threads
        self._patience = patience
        self._max_bytes = max_bytes
        self._most = max(_LOT_OBJECTS, least)
        self._reader = ThreadPoolExecutor(1)

    def lots(
        self, objects: Sequence[FileInfo], seconds: dict[str, float]
    ) -> Iterator[tuple[list[FileInfo], list[ReadResult]]]:
        """Lots of objects with their bytes; `seconds["read"]` grows by the time spent waiting for them."""
        lots = _lots(objects, self._most)
        reading = [self._reader.submit(self._read, lot) for lot in lots[:1]]
        for number, lot in enumerate(lots):
            started = time.perf_counter()
            answers = reading.pop().result()
            seconds["read"] += time.perf_counter() - started
            reading += [self._reader.submit(self._read, following) for following in lots[number + 1 : number + 2]]
            yield lot, answers

    def _read(self, lot: Sequence[FileInfo]) -> list[ReadResult]:
        answers = read_patiently(lot, self._read_now, self._patience)
        return [_as_listed(info, answer) for info, answer in zip(lot, answers, strict=True)]

    def _read_now(self, lot: Sequence[FileInfo]) -> list[ReadResult]:
        return read_many(
            [info.place or info.uri for info in lot],
            etags=[info.etag for info in lot],
            threads=self._threads,
            max_bytes=self._max_bytes,
        )


def _as_listed(info: FileInfo, answer: ReadResult) -> ReadResult:
    """The answer, but no bytes of an object that was listed without an etag: what they are no later run could tell."""
    if info.etag or isinstance(answer, StorageError):
        return answer
    return StorageError("changed", info.uri, "it could not be examined when it was listed, and now it can be read")


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
