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

    @classmethod
    def of(cls, error: StorageError | ScanRejected) -> Rejection:
        """Make one from the error of reading or decoding."""
        return cls(error.code, str(error), error.retryable)


@dataclass(frozen=True)
class FrameSource:
    """Makes frames by one preprocessing config and one set of limits."""

    preprocess: PreprocessConfig
    limits: ScanLimits = field(default_factory=ScanLimits)

    def from_bytes(self, data: bytes) -> list[Frame] | Rejection:
        """Return the frames (uint8 [size, size]) of one encoded scan, in their order, or why there are none."""
        return self._framed(self.decode(data))

    def from_uris(self, uris: Sequence[str]) -> list[list[Frame] | Rejection]:
        """Do the same for stored scans, which are read concurrently; one entry for each of `uris`."""
        return [self._framed(scan) for scan in self.scans(uris)]

    def scans(self, uris: Sequence[str]) -> Iterator[Scan | Rejection]:
        """Yield stored scans before preprocessing, read concurrently and decoded one by one, one for each URI."""
        for data in read_many(uris, max_bytes=self.limits.max_bytes):
            yield Rejection.of(data) if isinstance(data, StorageError) else self.decode(data)

    def decode(self, data: bytes) -> Scan | Rejection:
        """Return one encoded scan before preprocessing, or why there is none."""
        try:
            return decode(data, min_side=decode_side(self.preprocess), limits=self.limits)
        except ScanRejected as error:
            return Rejection.of(error)

    def frames_of(self, scan: Scan) -> list[Frame]:
        """Return the frames of a decoded scan, in their order."""
        return [make_frame(gray, self.preprocess) for gray in scan.frames]

    def _framed(self, scan: Scan | Rejection) -> list[Frame] | Rejection:
        return scan if isinstance(scan, Rejection) else self.frames_of(scan)
