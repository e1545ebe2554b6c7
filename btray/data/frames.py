"""From bytes or URIs to the frames a network sees: one path for training, bulk classification and serving."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from btray.data.config import PreprocessConfig
from btray.data.preprocess import Frame, decode_side, make_frame
from btray.data.scans import Scan, ScanLimits, ScanRejected, decode
from btray.storage import StorageError
from btray.storage.read_many import read_many

# A scan's number times this, plus the frame within it, is the sample number: the key of all that is random about it.
FRAMES_PER_SCAN = 1024


@dataclass(frozen=True)
class Rejection:
    """Why an input gave no frame. `retryable`: another try may succeed (throttled, store down)."""

    code: str
    message: str
    retryable: bool


@dataclass(frozen=True)
class FrameSource:
    """Makes frames by one preprocessing config and one set of limits."""

    preprocess: PreprocessConfig
    limits: ScanLimits = field(default_factory=ScanLimits)

    def from_bytes(self, data: bytes) -> list[Frame] | Rejection:
        """Frames (uint8 [size, size]) of one encoded scan, in their order, or why there are none."""
        scan = self.decoded(data)
        return scan if isinstance(scan, Rejection) else self.frames_of(scan)

    def from_uris(self, uris: Sequence[str]) -> list[list[Frame] | Rejection]:
        """The same for stored scans, which are read concurrently; one entry for each of `uris`."""
        return [scan if isinstance(scan, Rejection) else self.frames_of(scan) for scan in self.scans(uris)]

    def scans(self, uris: Sequence[str]) -> Iterator[Scan | Rejection]:
        """Stored scans before preprocessing, read concurrently and decoded one by one; one entry for each of `uris`."""
        for data in read_many(uris, max_bytes=self.limits.max_bytes):
            if isinstance(data, StorageError):
                yield Rejection(data.code, str(data), data.retryable)
            else:
                yield self.decoded(data)

    def frames_of(self, scan: Scan) -> list[Frame]:
        """The frames of a decoded scan, in their order."""
        return [make_frame(gray, self.preprocess) for gray in scan.frames]

    def decoded(self, data: bytes) -> Scan | Rejection:
        """One encoded scan before preprocessing, or why there is none."""
        try:
            return decode(data, min_side=decode_side(self.preprocess), limits=self.limits)
        except ScanRejected as error:
            return Rejection(error.code, str(error), error.retryable)
