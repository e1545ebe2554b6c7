"""JPEG, strictly: libjpeg only warns of damaged data and then makes pixels up; here damage is an error.

References are to ITU-T T.81, the standard of JPEG.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import simplejpeg

Array = np.ndarray[Any, np.dtype[Any]]

_FIRST_MARKER, _RST0, _SOI, _EOI, _SOS, _DQT, _DRI = 0xC0, 0xD0, 0xD8, 0xD9, 0xDA, 0xDB, 0xDD
_APP0, _APP14, _COM = 0xE0, 0xEE, 0xFE
_FRAMES: Final = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15; the three are tables and an extension
_SEQUENTIAL: Final = (0xC0, 0xC1)
_METADATA: Final = {*range(_APP0, _APP0 + 16), _COM} - {_APP0, _APP14}  # these two say which colours are meant
_ALL_COEFFICIENTS: Final = b"\0\x3f\0"  # Ss, Se, Ah and Al of a sequential scan (B.2.3)
_LONGEST_INTERVAL: Final = 0xFFFF  # in MCUs
_MOST_DC: Final = 1024  # what the DCT makes of a block of 8x8 samples that are all -128 (A.3.3)
_VISIBLE_DC: Final = 1000  # above 1015 it would be white
# In gray levels. A DC that is shifted for all blocks that follow leaves such a seam; a tenth of whole slices have one.
_SEAM: Final = 6
_SEAM_COLUMNS: Final = slice(7, None, 16)  # enough of them for a mean


def decode_gray(data: bytes, size: tuple[int, int], min_side: int | None) -> Array | None:
    """Decode a JPEG of 8 bit to uint8 [height, width]; `size` is its (width, height).

    The pixels are those of Pillow's `draft("L", (min_side, min_side))`. Returns None for colours that are left to
    Pillow: four of them, after a check of the data, and those whose sampling TurboJPEG does not know.
    Raises ValueError if the data is damaged.
    """
    stream = _Stream(data)
    if stream.components == 4:
        stream.check_range()
        return None
    largest = min(size) // min_side if min_side else 1
    scale = next((scale for scale in (8, 4, 2) if scale <= largest), 1)
    width, height = (-(-side // scale) for side in size) if scale > 1 else (0, 0)
    pixels = _pixels(stream.strict(), "GRAY", min_height=height, min_width=width)
    # The check reads all codes once more, which would take longer than Pillow's decoding if every file had it.
    if pixels is not None and _has_seam(pixels, 8 // scale):
        stream.check_range()
    return pixels


def check_jpeg(data: bytes, tables: bytes = b"") -> None:
    """Raise ValueError if the pixels of a JPEG of 8 bit, in any colours, are damaged; the pixels are not returned.

    `tables` are those that a TIFF keeps apart from its strips: a JPEG without pixels (its tag 347).
    """
    _Stream(tables.removesuffix(bytes((0xFF, _EOI))) + data[2:] if tables else data).check_range()


class _Stream:
    """A JPEG that is written again so that libjpeg-turbo warns of every damage that it can notice."""

    def __init__(self, data: bytes) -> None:
        """Read the headers up to the first scan. Raises ValueError if they are not those of a JPEG."""
        self._header = bytearray()
        frame, scan, interval = b"", b"", 0
        steps: dict[int, slice] = {}
        for marker, segment, end in _segments(data):
            if marker == _DRI:
                interval = int.from_bytes(segment[4:], "big")
                continue
            if marker == _DQT:
                steps |= _dc_steps(segment, len(self._header))
            elif marker in _FRAMES:
                frame = segment
            elif marker == _SOS:
                scan, self._codes = segment, data[end:]
            self._header += segment
        if len(frame) < 13:
            raise ValueError("Corrupt JPEG data: a scan without a frame")
        self.components = frame[9]
        self._dc_step = steps.get(frame[12]) if scan[5] == frame[10] else None  # later scans may define it again
        if frame[1] in _SEQUENTIAL:
            # Some encoders write other numbers there, which mean nothing, but of which libjpeg warns.
            self._header[-3:] = _ALL_COEFFICIENTS
            # Only its slow path, which restart intervals make it take, warns of codes that do not exist.
            if not interval and _mcus(frame, interleaved=scan[4] > 1) <= _LONGEST_INTERVAL:
                interval = _LONGEST_INTERVAL
        self._codes = data[end:]
        self._start = bytes((0xFF, _SOI, 0xFF, _DRI, 0, 4)) + interval.to_bytes(2, "big")

    def strict(self) -> bytes:
        """Return a JPEG of the same pixels."""
        return self._start + self._header + self._codes

    def check_range(self) -> None:
        """Raise ValueError if the data is damaged, or if the mean of 8x8 pixels is out of the range that pixels have.

        The pixels cannot show such a mean, since they are clipped to that range. A decoder that is told of smaller
        steps between the means shows all of them, and at 1/8 of the size it shows nothing else. A whole picture has
        none of them. Pictures in four colours, and those whose steps cannot be smaller, are checked for damage alone.
        """
        header, step, most = self._header.copy(), 0, 0
        if self._dc_step and self.components < 4:
            step = int.from_bytes(header[self._dc_step], "big")
            most = (_MOST_DC + step) // max(step, 1)  # whichever way an encoder rounds
            step = min(step, _VISIBLE_DC // max(most, 1))
            if step:
                header[self._dc_step] = step.to_bytes(self._dc_step.stop - self._dc_step.start, "big")
        colours = "CMYK" if self.components == 4 else "GRAY"
        means = _pixels(self._start + header + self._codes, colours, min_height=1, min_width=1)
        lowest, highest = ((level * step + 4 >> 3) + 128 for level in (-most, most))  # as libjpeg rounds
        if means is not None and step and (means.min() < lowest or means.max() > highest):
            raise ValueError("Corrupt JPEG data: a DC coefficient is out of range")


def _pixels(data: bytes, colours: str, *, min_height: int, min_width: int) -> Array | None:
    """Decode to uint8 [height, width(, 4)]; return None if TurboJPEG does not know how the colours are sampled."""
    try:
        pixels: Array = simplejpeg.decode_jpeg(data, colours, min_height=min_height, min_width=min_width)
    except ValueError as error:
        if "subsampling" in str(error):
            return None
        raise
    return pixels[..., 0] if colours == "GRAY" else pixels


def _segments(data: bytes) -> Iterator[tuple[int, bytes, int]]:
    """Yield the segments up to the first scan's that matter for pixels: marker, bytes, and where the segment ends."""
    at, marker = 2, 0
    while marker != _SOS:
        while data[at + 1 : at + 2] == b"\xff":  # fill bytes (B.1.1.2)
            at += 1
        if len(data) < at + 4:
            raise ValueError("Premature end of JPEG file")
        marker, start = data[at + 1], at
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if data[start] != 0xFF or marker < _FIRST_MARKER or _RST0 <= marker <= _EOI or at < start + 4:
            raise ValueError("Corrupt JPEG data: bytes that belong to no segment")
        if marker == _APP0:
            yield marker, data[start : start + 9] + b"\1" + data[start + 10 : at], at  # libjpeg warns of JFIF 2
        elif marker not in _METADATA:
            yield marker, data[start:at], at


def _dc_steps(segment: bytes, at: int) -> dict[int, slice]:
    """Return where the DC's quantisation step of each table lies, if the segment that defines them begins at `at`."""
    steps, place = {}, 4
    while place < len(segment):
        width = 1 + (segment[place] >> 4)
        steps[segment[place] & 15] = slice(at + place + 1, at + place + 1 + width)
        place += 1 + 64 * width
    return steps


def _mcus(frame: bytes, *, interleaved: bool) -> int:
    """Count the MCUs of a scan (A.2), of one component's blocks if it is not interleaved: then this is the most."""
    height, width = (int.from_bytes(frame[at : at + 2], "big") for at in (5, 7))
    across = down = 1
    if interleaved:
        across, down = (max(factors) for factors in zip(*(divmod(factor, 16) for factor in frame[11::3]), strict=True))
    return -(-width // (8 * across)) * -(-height // (8 * down))


def _has_seam(gray: Array, side: int) -> bool:
    """Return whether the mean level of rows changes between two rows of blocks, of `side` pixels, as nowhere beside."""
    steps = np.abs(np.diff(gray[:, _SEAM_COLUMNS].sum(axis=1, dtype=np.int32)))
    jumps = steps[1:-1] - np.maximum(steps[:-2], steps[2:])
    seams = jumps[max(side - 2, 0) :: side]
    return bool(seams.size and seams.max() > _SEAM * len(gray[0, _SEAM_COLUMNS]))
