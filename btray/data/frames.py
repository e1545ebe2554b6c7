"""From bytes or URIs to the frames a network sees: one path for training, bulk classification and serving."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from btray.data.config import PreprocessConfig
from btray.data.fingerprint import fingerprint_of
from btray.data.preprocess import Frame, decode_side, make_frame, preprocessing_key
from btray.data.scans import Scan, ScanLimits, ScanRejected, SliceInfo, decode
from btray.storage import StorageError
from btray.storage.packed import PackedFrames
from btray.storage.read_many import ReadResult, read_many

# A scan's number times this, plus the frame within it, is the sample number: the key of all that is random about it.
FRAMES_PER_SCAN = 1024


@dataclass(frozen=True)
class Rejection:
    """Why an input gave no frame. `retryable`: another try may succeed (throttled, store down)."""

    code: str
    message: str
    retryable: bool
    info: SliceInfo | None = None
    """What the header of the scan says, if it could be read."""

    @classmethod
    def of(cls, error: StorageError | ScanRejected) -> Rejection:
        """Make one from the error of reading or decoding."""
        info = error.info if isinstance(error, ScanRejected) else None
        return cls(error.code, str(error), error.retryable, info)


class Frames(list[Frame]):
    """The frames of one scan, uint8 [size, size], and what its file says of each."""

    def __init__(self, frames: Iterable[Frame] = (), infos: Sequence[SliceInfo] | None = None) -> None:
        """Keep `infos`, one for each frame; None for a picture, which says nothing."""
        super().__init__(frames)
        self.infos = infos

    def info(self, number: int) -> SliceInfo | None:
        """Return what the file says of one of the frames."""
        return None if self.infos is None else self.infos[number]

    def names_patient(self, number: int) -> bool:
        """Return whether text in one of the frames may name the patient: then no picture may show it."""
        info = self.info(number)
        return info is not None and bool(info.burned_in)

    def part(self, first: int, end: int) -> Frames:
        """Return the frames from number `first` to before `end`."""
        return Frames(self[first:end], self.infos and self.infos[first:end])


@dataclass(frozen=True)
class PackedScan(Scan):
    """A scan of a frame pack: its frames are preprocessed, and read-only."""

    fingerprint: bytes = b""
    """Of the scan before preprocessing."""


def scan_patient(scan: Scan) -> str:
    """Return a digest of the patient whom the file of a scan names; empty if it names none."""
    return next((info.patient_key for info in scan.slices or () if info.patient_key), "")


def scan_fingerprint(scan: Scan) -> bytes:
    """Return the fingerprint of a scan, packed."""
    return scan.fingerprint if isinstance(scan, PackedScan) else fingerprint_of(scan.frames)


@dataclass(frozen=True)
class FrameSource:
    """Makes frames by one preprocessing config and one set of limits."""

    preprocess: PreprocessConfig
    limits: ScanLimits = field(default_factory=ScanLimits)
    read: Callable[..., Iterable[ReadResult]] = read_many
    """What reads stored scans, called as `read_many` is."""

    def from_bytes(self, data: bytes) -> Frames | Rejection:
        """Return the frames of one encoded scan, in their order, or why there are none."""
        return self._framed(self.decode(data))

    def from_uris(self, uris: Sequence[str]) -> list[Frames | Rejection]:
        """Do the same for stored scans, which are read concurrently; one entry for each of `uris`."""
        return [self._framed(scan) for scan in self.scans(uris)]

    def scans(self, uris: Sequence[str]) -> Iterator[Scan | Rejection]:
        """Yield stored scans before preprocessing, read concurrently and decoded one by one, one for each URI."""
        for data in self.read(uris, max_bytes=self.limits.max_bytes):
            yield Rejection.of(data) if isinstance(data, StorageError) else self.decode(data)

    def decode(self, data: bytes) -> Scan | Rejection:
        """Return one encoded scan before preprocessing, or why there is none; one of a frame pack is behind it."""
        if isinstance(data, PackedFrames):
            return self._unpacked(data)
        try:
            return decode(data, min_side=decode_side(self.preprocess), limits=self.limits)
        except ScanRejected as error:
            return Rejection.of(error)

    def frames_of(self, scan: Scan) -> Frames:
        """Return the frames of a decoded scan, in their order."""
        if isinstance(scan, PackedScan):
            return Frames(scan.frames, scan.slices)
        return Frames((make_frame(gray, self.preprocess) for gray in scan.frames), scan.slices)

    def _framed(self, scan: Scan | Rejection) -> Frames | Rejection:
        return scan if isinstance(scan, Rejection) else self.frames_of(scan)

    def _unpacked(self, packed: PackedFrames) -> PackedScan | Rejection:
        row, size = packed.row, self.preprocess.size
        if row["preprocessing"] != preprocessing_key(self.preprocess):
            made, wanted = row["preprocessing"], preprocessing_key(self.preprocess)
            return Rejection(
                "unsupported", f"its frames are of preprocessing {made}, not {wanted}: pack it anew", False
            )
        slices = [SliceInfo(**facts) for facts in json.loads(row["slices"])] if row["slices"] else None
        if row["error_code"] is not None:
            return Rejection(row["error_code"], row["error"], False, slices[0] if slices else None)
        frames = np.frombuffer(packed, np.uint8).reshape(row["frames"], size, size)
        return PackedScan(list(frames), slices, row["fingerprint"])
