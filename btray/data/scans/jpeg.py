"""JPEG, strictly: libjpeg only warns of damaged data and then makes pixels up; here damage is an error.

References are to ITU-T T.81, the standard of JPEG.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, Final

import numpy as np
import simplejpeg

from btray.data.scans.jpeg_codes import check_codes

Array = np.ndarray[Any, np.dtype[Any]]

_FIRST_MARKER, _RST0, _SOI, _EOI, _SOS, _DQT, _DRI = 0xC0, 0xD0, 0xD8, 0xD9, 0xDA, 0xDB, 0xDD
_APP0, _APP1, _APP14, _COM = 0xE0, 0xE1, 0xEE, 0xFE
_FRAMES: Final = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15; the three are tables and an extension
_SEQUENTIAL: Final = (0xC0, 0xC1)
_PROGRESSIVE: Final = 0xC2
# Metadata but for the two that say which colours are meant; and the restart interval, which is written again.
_NOT_KEPT: Final = {*range(_APP1, _APP14), _APP14 + 1, _COM, _DRI}
_ALL_COEFFICIENTS: Final = b"\0\x3f\0"  # Ss, Se, Ah and Al of a sequential scan (B.2.3)
_LONGEST_INTERVAL: Final = 0xFFFF  # in MCUs
_MOST_DC: Final = 1024  # what the DCT makes of a block of 8x8 samples that are all -128 (A.3.3)
_VISIBLE_DC: Final = 1000  # above 1015 it would be white
# Where rows of blocks meet, times the difference of the rows beside. 99 % of slices have it in which libjpeg left out a
# block or shifted the DC of all that follow, and 7 % of whole slices.
_SEAM: Final = 1.25
_NOISE: Final = 2  # gray levels between rows that differ by nothing else
_SEAM_COLUMNS: Final = slice(3, None, 8)  # enough of them for a mean


def check_jpeg(data: bytes, tables: bytes = b"") -> None:
    """Raise ValueError if the pixels of a JPEG of 8 bit, in any colours, are damaged; the pixels are not returned.

    `tables` are those that a TIFF keeps apart from its strips: a JPEG without pixels (its tag 347).
    """
    stream_of_strip(data, tables).check()


def stream_of_strip(data: bytes, tables: bytes) -> JpegStream:
    """Return the JPEG that a strip of a TIFF and its `tables` are; see `check_jpeg`."""
    return JpegStream(tables.removesuffix(bytes((0xFF, _EOI))) + data[2:] if tables else data)


class JpegStream:
    """A JPEG that is written again so that libjpeg-turbo warns of every damage that it can notice."""

    def __init__(self, data: bytes) -> None:
        """Read the headers up to the first scan. Raises ValueError if they are not those of a JPEG."""
        self._header = bytearray()
        frame, scan, interval, markers = b"", b"", 0, set()
        steps: dict[int, slice] = {}
        for marker, segment, end in _segments(data):
            markers.add(marker)
            if marker == _DRI:
                interval = int.from_bytes(segment[4:], "big")
            if marker in _NOT_KEPT:
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
        self.colours = "CMYK" if frame[9] == 4 else "GRAY"
        self.size = int.from_bytes(frame[7:9], "big"), int.from_bytes(frame[5:7], "big")
        """Width and height."""
        self.is_progressive = frame[1] & 3 == 2
        self.is_plain = _APP1 not in markers and frame[4] == 8 and frame[9] in (1, 3)
        """Whether it is of 8 bit, gray or in three colours, and says nothing about how it is to be turned."""
        self.colour_space = _colour_space(frame, markers)
        """RGB or YCbCr, if it is surely in one of these; else None."""
        self._factors = max(factor & 15 for factor in frame[11::3]), max(factor >> 4 for factor in frame[11::3])
        self._is_huffman, self._is_sequential = frame[1] in (*_SEQUENTIAL, _PROGRESSIVE), frame[1] in _SEQUENTIAL
        self._restarts = interval
        first_is_luma = self.colours == "GRAY" and scan[5] == frame[10]  # if not, later headers may define its table
        self._dc_step = steps.get(frame[12]) if first_is_luma else None
        if self._is_sequential:
            # Some encoders write other numbers there, which mean nothing, but of which libjpeg warns.
            self._header[-3:] = _ALL_COEFFICIENTS
            # Only its slow path, which restart intervals make it take, warns of codes that do not exist.
            if not interval and self._count_mcus(interleaved=scan[4] > 1) <= _LONGEST_INTERVAL:
                interval = _LONGEST_INTERVAL
        self._start = bytes((0xFF, _SOI, 0xFF, _DRI, 0, 4)) + interval.to_bytes(2, "big")

    def _count_mcus(self, *, interleaved: bool) -> int:
        """Count the MCUs of the first scan (A.2); those of the finest component if it has only one."""
        down, across = (8 * factor for factor in self._factors) if interleaved else (8, 8)
        return -(-self.size[0] // across) * -(-self.size[1] // down)

    def strict(self) -> bytes:
        """Return a JPEG of the same pixels."""
        return self._start + self._header + self._codes

    def decode_gray(self, min_side: int | None) -> Array | None:
        """Decode a JPEG of 8 bit to uint8 [height, width].

        The pixels are those of Pillow's `draft("L", (min_side, min_side))`. Returns None for colours that are left to
        Pillow, after a check of the data: four of them, and those whose sampling TurboJPEG does not know.
        Raises ValueError if the data is damaged.
        """
        if self.colours == "CMYK":
            self.check()
            return None
        largest = min(self.size) // min_side if min_side else 1
        scale = next((scale for scale in (8, 4, 2) if scale <= largest), 1)
        width, height = (-(-side // scale) for side in self.size) if scale > 1 else (0, 0)
        pixels = _decode(self.strict(), self.colours, min_height=height, min_width=width)
        if pixels is None:
            self._check_codes()
            return None
        gray: Array = pixels[..., 0]
        # The check reads all codes once more, which would take longer than Pillow's decoding if every file had it.
        if _has_seam(gray, 8 // scale):
            self.check_blocks()
        return gray

    def decode_colours(self) -> Array | None:
        """Decode a JPEG in three colours to RGB, uint8 [height, width, 3]; None if TurboJPEG does not know how.

        Raises ValueError if the data is damaged.
        """
        pixels = _decode(self.strict(), "RGB", min_height=0, min_width=0)
        if pixels is not None and _has_seam(pixels[..., 1], 8):
            self.check_blocks()
        return pixels

    def check(self) -> None:
        """Raise ValueError if the data is damaged. If `strict` was decoded already, `check_blocks` is enough."""
        if _decode(self.strict(), self.colours, min_height=1, min_width=1) is None:
            self._check_codes()
        else:
            self.check_blocks()

    def _check_codes(self) -> None:
        """Raise ValueError if the codes are damaged of a JPEG that TurboJPEG does not decode."""
        if self._is_huffman:
            check_codes(bytes(self._header) + self._codes, self._restarts, progressive=self.is_progressive)

    def check_blocks(self) -> None:
        """Raise ValueError if no encoder can have written what libjpeg-turbo decoded without a warning.

        The mean of 8x8 pixels must lie in the range that pixels have, to which a decoder clips them. At 1/8 of the size
        the pixels are these means, and with other quantisation steps than the file's they are clipped elsewhere.
        """
        if not self._is_huffman:
            return
        if self._dc_step is None:
            self._means(0)
            return
        step = int.from_bytes(self._header[self._dc_step], "big")
        if step > 1:
            most = (_MOST_DC + step) // step  # whichever way an encoder rounds
            smaller = _VISIBLE_DC // most
            legal = _lie_within(self._means(smaller), -most * smaller, most * smaller)
        else:
            # No step is smaller. With this larger one the means run through all levels several times, because libjpeg
            # takes them modulo 1024 before it clips them: what is black, or white, must be near one level.
            clipped, means = self._means(1), self._means(8)
            legal = _lie_within(means[clipped == 0], -8, 24) and _lie_within(means[clipped == 255], -96, 8)
        if not legal:
            raise ValueError("Corrupt JPEG data: a DC coefficient is out of range")

    def _means(self, dc_step: int) -> Array:
        """Return the picture at 1/8 of its size, uint8, as if the first component's DC had this quantisation step.

        The last row of MCUs is left out. Raises ValueError if the blocks do not need the last byte of the codes: then
        other blocks are missing.
        """
        header = self._header.copy()
        if self._dc_step:
            header[self._dc_step] = dc_step.to_bytes(self._dc_step.stop - self._dc_step.start, "big")
        codes = self._codes[: self._codes.find(bytes((0xFF, _EOI)))].rstrip(b"\xff")
        codes = codes[: -2 if codes.endswith(b"\xff\0") else -1]
        data = self._start + header + codes + bytes((0xFF, _EOI))
        means: Array = np.empty(
            (*(-(-side // 8) for side in self.size[::-1]), 4 if self.colours == "CMYK" else 1), np.uint8
        )
        try:
            simplejpeg.decode_jpeg(data, self.colours, min_height=1, min_width=1, buffer=means)
        except ValueError as error:
            if "premature end" in str(error).lower():  # as it must be; the pixels are there all the same
                return means[: -self._factors[0]]
            raise
        raise ValueError("Corrupt JPEG data: bytes after the last block")


def _lie_within(means: Array, low: int, high: int) -> bool:
    """Return whether all of `means` are what libjpeg makes of DC coefficients, times their step, from low to high."""
    return not means.size or bool((low + 4 >> 3) + 128 <= means.min() and means.max() <= (high + 4 >> 3) + 128)


def _decode(data: bytes, colours: str, *, min_height: int, min_width: int) -> Array | None:
    """Decode to uint8 [height, width, bands]; return None if TurboJPEG does not know how the colours are sampled."""
    try:
        pixels: Array = simplejpeg.decode_jpeg(data, colours, min_height=min_height, min_width=min_width)
    except ValueError as error:
        if "subsampling" in str(error):
            return None
        raise
    return pixels


def _colour_space(frame: bytes, markers: Collection[int]) -> str | None:
    """Return what libjpeg takes three components for, by their names; None if a marker may say otherwise."""
    if frame[9] != 3 or _APP14 in markers:
        return None
    is_rgb = frame[10:19:3] == b"RGB"
    return None if is_rgb and _APP0 in markers else "RGB" if is_rgb else "YCbCr"


def _segments(data: bytes) -> Iterator[tuple[int, bytes, int]]:
    """Yield the marker of each segment up to the first scan's, its bytes, and where it ends."""
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
        else:
            yield marker, data[start:at], at


def _dc_steps(segment: bytes, at: int) -> dict[int, slice]:
    """Return where the DC's quantisation step of each table lies, if the segment that defines them begins at `at`."""
    steps, place = {}, 4
    while place < len(segment):
        width = 1 + (segment[place] >> 4)
        steps[segment[place] & 15] = slice(at + place + 1, at + place + 1 + width)
        place += 1 + 64 * width
    return steps


def _has_seam(gray: Array, side: int) -> bool:
    """Return whether neighbouring rows differ more where rows of blocks, `side` pixels high, meet than beside there."""
    columns = gray[:, _SEAM_COLUMNS].astype(np.int16)
    steps = np.abs(columns[1:] - columns[:-1]).sum(axis=1, dtype=np.int32)
    beside = np.maximum.reduce([steps[:-4], steps[1:-3], steps[3:-1], steps[4:]]) + _NOISE * columns.shape[1]
    return bool((steps[2:-2] > _SEAM * beside)[max(side - 3, 0) :: side].any())
