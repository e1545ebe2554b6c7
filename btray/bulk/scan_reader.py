"""Reading and decoding the objects of a part into frames: what precedes the network, and needs neither it nor torch."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from btray.bulk.clinical.headers import HeaderReader
from btray.bulk.clinical.pseudonyms import Pseudonyms
from btray.bulk.config import ClassifyConfig
from btray.bulk.worker import Batch, Prefetcher, Seconds
from btray.data.frames import Frames, FrameSource, Rejection
from btray.data.scans import Scan, ScanRejected
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
    """Of the object among those that were given to be read."""
    first: int
    """Number of the first of these frames among those of the object."""
    frames: Frames | Rejection

    @property
    def nbytes(self) -> int:
        """Memory of the frames."""
        return 0 if isinstance(self.frames, Rejection) else sum(frame.nbytes for frame in self.frames)


class ScanReader:
    """Makes lots of frames out of objects: of so many as are read together, and of at most `most_frames`."""

    def __init__(
        self, config: ClassifyConfig, source: FrameSource, pseudonyms: Pseudonyms | None, *, batch_size: int, cpus: int
    ) -> None:
        """Decode `cpus` scans at a time, for a network that takes `batch_size` frames at a time.

        `pseudonyms` are those that objects are listed with.
        """
        self.source = source
        self.most_frames = batch_size * math.ceil(_FRAMES / batch_size)
        choice = config.series_filter
        reading: dict[str, Any] = {
            "threads": config.threads,
            "patience": config.patience,
            "pseudonyms": pseudonyms,
            "pacs": config.pacs_source(),
        }
        self._headers = HeaderReader(choice, **reading) if choice else None
        self._prefetcher = Prefetcher(**reading, max_bytes=source.limits.max_bytes, least=batch_size)
        # One decoder is the thread that asks: nothing else is done meanwhile.
        self._decoders = ThreadPoolExecutor(cpus) if cpus > 1 else None
        self._decoded_ahead = 2 * cpus

    def lots(self, objects: Sequence[FileInfo], seconds: Seconds) -> Iterator[list[Piece]]:
        """Begin to read `objects`, and return what yields their frames and rejections; each object is there.

        Those whose series are not chosen come first: only their headers are read.
        """
        left_out = self._left_out(objects, seconds)
        chosen = sorted(set(range(len(objects))) - {piece.index for piece in left_out})
        batches = self._prefetcher.batches([objects[index] for index in chosen], seconds)
        return self._lots(left_out, chosen, batches, seconds)

    def _left_out(self, objects: Sequence[FileInfo], seconds: Seconds) -> list[Piece]:
        """Return the objects whose series are not chosen."""
        if self._headers is None:
            return []
        started = time.perf_counter()
        headers = self._headers.read(objects)
        seconds["headers"] += time.perf_counter() - started
        choice = self._headers.choice
        return [
            Piece(index, 0, Rejection("not_selected", choice.reason, False, header))
            for index, header in enumerate(headers)
            # of an error only the bytes tell what is wrong
            if not (isinstance(header, ScanRejected | StorageError) or choice.matches(header))
        ]

    def _lots(
        self,
        left_out: list[Piece],
        indexes: Sequence[int],
        batches: Iterator[Batch],
        seconds: Seconds,
    ) -> Iterator[list[Piece]]:
        if left_out:
            yield left_out
        for numbers, results in batches:
            started = time.perf_counter()
            decoded = zip((indexes[number] for number in numbers), self.decode(results), strict=True)
            for pieces in pieces_of(decoded, self.source, most=self.most_frames):
                seconds["decode"] += time.perf_counter() - started
                yield pieces
                started = time.perf_counter()
            seconds["decode"] += time.perf_counter() - started

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
        scan = self.source.decode(result)
        if isinstance(scan, Rejection):
            return scan
        as_frames = len(scan.frames) * self.source.preprocess.size**2
        if as_frames <= max(_SMALL, sum(gray.nbytes for gray in scan.frames)):
            return self.source.frames_of(scan)
        return scan


def pieces_of(decoded: Iterable[tuple[int, Decoded]], source: FrameSource, *, most: int) -> Iterator[list[Piece]]:
    """Yield the frames of all objects, and the rejections between them, in their order and `most` frames at a time."""
    pieces: list[Piece] = []
    held = 0
    for index, of_object in decoded:
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
