"""From bytes or URIs to the frames a network sees: one path for training, bulk classification and serving."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from btray import storage
from btray.preprocess import Frame, decode_side, make_frame
from btray.scans import ScanLimits, ScanRejected, decode
from btray.settings import PreprocessConfig
from btray.storage import StorageError

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
        try:
            scan = decode(data, min_side=decode_side(self.preprocess), limits=self.limits)
        except ScanRejected as error:
            return Rejection(error.code, str(error), error.retryable)
        return [make_frame(gray, self.preprocess) for gray in scan.frames]

    def from_uris(self, uris: Sequence[str]) -> list[list[Frame] | Rejection]:
        """The same for stored scans, which are read concurrently; one entry for each of `uris`."""
        return [
            Rejection(data.code, str(data), data.retryable) if isinstance(data, StorageError) else self.from_bytes(data)
            for data in storage.read_many(uris, max_bytes=self.limits.max_bytes)
        ]
