"""Compressed pixels of a DICOM object, frame by frame (PS3.5, 8.2 and A.4): found, checked, decoded.

imagecodecs decodes RLE, JPEG of more than 8 bits, JPEG-LS and JPEG 2000. Decoders fill up what is missing and say
nothing, so each stream is checked before: for its end, and for the size that its own header tells.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Final

import imagecodecs
import numpy as np

from btray.data.scans.dicom_header import PIXEL_DATA, Dataset, Malformed, fragments
from btray.data.scans.dicom_pixels import PixelFormat
from btray.data.scans.errors import ScanRejected
from btray.data.scans.jpeg import JpegStream

Array = np.ndarray[Any, np.dtype[Any]]

_OFFSETS: Final = 0x7FE00001
_MOST_SEGMENTS: Final = 100_000  # of a stream, up to its codes; the tiles of JPEG 2000 are less than 2^16
_MOST_SCANS: Final = 100  # each costs a pass over the whole frame
_RLE_HEADER, _RLE_PADDING = 64, 128  # bytes; what encoders write behind a plane is less than a run
_EOI: Final = b"\xff\xd9"
_SOF_LOSSLESS, _SOF_JPEG_LS, _PROGRESSIVE = 0xC3, 0xF7, 0xC2
_FRAME_HEADERS: Final = {*range(0xC0, 0xD0), _SOF_JPEG_LS} - {0xC4, 0xC8, 0xCC}
_SOS, _ADOBE, _JFIF = 0xDA, 0xEE, 0xE0
_ADOBE_RGB: Final = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\0"
_RGB_IDS: Final = b"RGB"
_OTHER_END: Final = b"\x5a\xc3" * 32 + _EOI
_SOC, _SIZ, _SOT, _SOD, _COD, _COC = b"\xff\x4f", b"\xff\x51", b"\xff\x90", b"\xff\x93", b"\xff\x52", b"\xff\x53"
_MOST_BLOCKS: Final = 2**18  # encoders make some thousands; each costs about a kilobyte
_STREAM_STARTS: Final = (b"\xff\xd8\xff", _SOC + _SIZ, b"\0\0\0\x0cjP")
_ENDS_EARLY: Final = re.compile("structural problem|too small|premature|INPUT_CORRUPT", re.IGNORECASE)


def find_frames(elements: Dataset, count: int) -> list[list[tuple[int, int]]]:
    """Return start and length of the fragments of each frame, by the offset tables or, without them, by the streams.

    Raises ScanRejected: `truncated` if frames are missing, or `decode_failed`.
    """
    element = elements.get(PIXEL_DATA)
    if element is None:
        raise Malformed
    (_, table_length), *found = fragments(elements.data, element, elements.order, count) or [(0, 0)]
    data = elements.data
    if len(found) < count:
        raise ScanRejected("truncated", f"a DICOM object of {count} frames that has pixels of {len(found)}")
    if len(found) == count:
        return [[fragment] for fragment in found]
    first = found[0][0]
    table, size = elements.raw(_OFFSETS), 8
    if not table:
        table, size = data[first - 8 - table_length : first - 8], 4
    if count > 1 and table:
        offsets = np.frombuffer(table[: min(len(table) // size, count + 1) * size], f"{elements.order}u{size}").tolist()
        by_offset = {start - first: number for number, (start, _) in enumerate(found)}
        starts = [by_offset.get(offset, -1) for offset in offsets]
    else:
        starts = [number for number, (start, _) in enumerate(found) if data.startswith(_STREAM_STARTS, start)] or [0]
    if len(starts) < count:
        raise ScanRejected("truncated", f"a DICOM object of {count} frames that has pixels of {len(starts)}")
    if len(starts) > count or starts[0] != 0 or any(a >= b for a, b in pairwise(starts)):
        raise ScanRejected("decode_failed", "a DICOM object whose frames do not begin where it says")
    return [found[start:end] for start, end in zip(starts, [*starts[1:], len(found)], strict=True)]


def join(data: bytes, pieces: Sequence[tuple[int, int]]) -> bytes:
    """Return the compressed stream of a frame. Raises ScanRejected, `truncated`, if a fragment is not all there."""
    if any(start + length > len(data) for start, length in pieces):
        raise ScanRejected("truncated", f"a DICOM object truncated after {len(data)} bytes, in its pixels")
    return b"".join(data[start : start + length] for start, length in pieces)


def _decode_rle(stream: bytes, pixels: PixelFormat) -> Array:
    """Decode planes of bytes, those of the highest bits first, that are packed one by one (PS3.5, G)."""
    width, size = pixels.allocated // 8, pixels.rows * pixels.columns
    count = pixels.samples * width
    if len(stream) < _RLE_HEADER:
        raise ScanRejected("truncated", "a DICOM object whose RLE frame ends in its header")
    planes, *starts = struct.unpack_from(f"<{count + 1}I", stream)
    ends = [*starts[1:], len(stream)]
    if planes != count or starts[0] < _RLE_HEADER or any(a > b for a, b in pairwise(starts)):
        raise ScanRejected("decode_failed", "a DICOM object whose RLE frame has not the planes that its header says")
    if starts[-1] > len(stream):
        raise ScanRejected("truncated", "a DICOM object whose RLE frame ends early")
    values = np.empty((pixels.samples, size, width), np.uint8)
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        plane = imagecodecs.packbits_decode(stream[start:end], out=size + _RLE_PADDING)
        if len(plane) < size:
            raise ScanRejected("truncated", "a DICOM object whose RLE frame ends early")
        values[number // width, :, width - 1 - number % width] = np.frombuffer(plane, np.uint8, size)
    numbers = values.view(f"<u{width}").reshape(pixels.samples, *pixels.shape)
    return numbers[0] if pixels.samples == 1 else np.moveaxis(numbers, 0, 2)


def _decode_deflated(stream: bytes, pixels: PixelFormat) -> Array:
    """Unpack a frame that is deflated as it is (RFC 1951; PS3.5, 8.2.16)."""
    unpacking = zlib.decompressobj(-zlib.MAX_WBITS)
    data = unpacking.decompress(stream, pixels.frame_bytes + 1)
    if len(data) < pixels.frame_bytes:
        raise ScanRejected("truncated", "a DICOM object whose deflated frame ends early")
    return pixels.native(data, 0, "<")


def _decode_jpeg(stream: bytes, pixels: PixelFormat) -> Array:
    kind, precision, size, ids, predictor, marked, codes = _jpeg_header(stream)
    _check_size(size, len(ids), pixels)
    stream = _whole(stream, codes)
    if kind == _SOF_JPEG_LS:
        return imagecodecs.jpegls_decode(stream)
    if kind not in (0xC0, 0xC1, _SOF_LOSSLESS):
        raise ScanRejected("unsupported", "a DICOM object of progressive, hierarchical or arithmetic-coded JPEG")
    if stream.count(b"\xff\xda") > _MOST_SCANS:
        raise ScanRejected("bomb", f"a DICOM object whose JPEG frame has more than {_MOST_SCANS} scans")
    is_rgb = pixels.photometric == "RGB" and (kind == _SOF_LOSSLESS or not marked)
    if kind != _SOF_LOSSLESS and precision == 8:
        jpeg = JpegStream(stream[:2] + _ADOBE_RGB + stream[2:] if is_rgb and ids != _RGB_IDS else stream)
        gray = jpeg.decode_gray(None)
        if gray is not None:
            return gray
        jpeg.check()  # of a sampling that TurboJPEG does not know
    space = None if len(ids) == 1 else "RGB" if is_rgb else "YCBCR"
    values: Array = imagecodecs.jpeg8_decode(stream, colorspace=space, outcolorspace=space)
    # Where the codes end early, libjpeg repeats what it last knew. Then it matters what follows them.
    if not np.ptp(values[-1], axis=0).any() or predictor > 1:
        other = imagecodecs.jpeg8_decode(stream[:-2] + _OTHER_END, colorspace=space, outcolorspace=space)
        if not np.array_equal(values, other):
            raise ScanRejected("truncated", "a DICOM object whose JPEG frame ends early")
    return values if values.ndim == 2 or is_rgb else values[..., 0]


def _jpeg_header(stream: bytes) -> tuple[int, int, tuple[int, int], bytes, int, bool, int]:
    """Return frame marker, bits, [height, width], names of the components, predictor, ...

    and whether a segment says which colours they are, and where the codes begin.
    """
    at, marked = 2, False
    frame: tuple[int, int, tuple[int, int], bytes] | None = None
    for _ in range(_MOST_SEGMENTS):
        if at + 4 > len(stream) or stream[at] != 0xFF:
            break
        marker = stream[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        length = int.from_bytes(stream[at + 2 : at + 4], "big")
        segment = stream[at + 4 : at + 2 + length]
        if marker in _FRAME_HEADERS and len(segment) >= 9:
            precision, height, width, count = struct.unpack_from(">BHHB", segment)
            frame = marker, precision, (height, width), segment[6 : 6 + 3 * count : 3]
        elif segment.startswith(b"JFIF" if marker == _JFIF else b"Adobe") and marker in (_JFIF, _ADOBE):
            marked |= len(segment) >= 12  # libjpeg passes over shorter ones
        elif marker == _SOS and frame is not None and len(segment) >= 3:
            return *frame, segment[-3], marked, at
        at += 2 + length
    raise ScanRejected("decode_failed", "a DICOM object whose JPEG frame has no header")


def _whole(stream: bytes, codes: int) -> bytes:
    """Return a JPEG or JPEG 2000 stream up to its end. Raises ScanRejected, `truncated`, if none follows the codes."""
    end = stream.rfind(_EOI)
    if end < codes:
        raise ScanRejected("truncated", "a DICOM object whose compressed frame has no end")
    return stream[: end + 2]


def _decode_jpeg_2000(stream: bytes, pixels: PixelFormat) -> Array:
    start = stream.find(_SOC + _SIZ)
    if start < 0:
        raise ScanRejected("decode_failed", "a DICOM object whose JPEG 2000 frame has no header")
    stream = stream[start:]  # out of its boxes, which DICOM does not allow
    if len(stream) < 42:
        raise ScanRejected("truncated", "a DICOM object whose JPEG 2000 frame ends in its header")
    right, bottom, left, top = struct.unpack_from(">IIII", stream, 8)
    components = int.from_bytes(stream[40:42], "big")
    _check_size((bottom - top, right - left), components, pixels)
    if stream[42 : 42 + 3 * components] != stream[42:45] * components or stream[43:45] != b"\1\1":
        raise ScanRejected("unsupported", "a DICOM object of JPEG 2000 whose components differ")
    stream = _whole(stream, 0)
    _check_tiles(stream)
    values: Array = imagecodecs.jpeg2k_decode(stream)
    return values


def _check_tiles(stream: bytes) -> None:
    """Raise ScanRejected, `truncated`, unless parts of all tiles follow one another to the end (T.800, A.4.2, B.3)."""
    right, bottom, _, _, width, height, left, top = struct.unpack_from(">8I", stream, 8)
    tiles = -(-(right - left) // max(width, 1)) * -(-(bottom - top) // max(height, 1))
    at, start = 2, 0
    found: set[int] = set()
    for _ in range(_MOST_SEGMENTS):
        if at + 12 > len(stream):
            break
        marker = stream[at : at + 2]
        if marker == _SOT:
            tile, length = struct.unpack_from(">HI", stream, at + 4)
            found.add(tile)
            # the last one may not say how long it is
            start, end = at, at + max(length, 14) if length else len(stream) - 2
        elif marker == _SOD and start:
            at = end
            continue
        elif marker in (_COD, _COC):
            _check_blocks(stream[at : at + 64], (bottom - top) * (right - left))
        at += 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
    if at != len(stream) - 2 or len(found) < tiles:
        raise ScanRejected("truncated", "a DICOM object whose JPEG 2000 frame ends early")


def _check_blocks(segment: bytes, area: int) -> None:
    """Raise ScanRejected, `bomb`, if a coding style has so many blocks that they need gigabytes (T.800, A.6.1)."""
    at, flags = (9, 4) if segment.startswith(_COD) else (6, 5)
    levels = segment[at]
    # logarithms of the areas of blocks, and of the precincts of each resolution as they are at the full one
    sizes = [(segment[at + 1] & 15) + (segment[at + 2] & 15) + 4]
    if segment[flags] & 1:
        precincts = segment[at + 5 : at + 6 + levels]
        sizes += [(side & 15) + (side >> 4) + 2 * (levels - number) for number, side in enumerate(precincts)]
    if area >> min(sizes) > _MOST_BLOCKS:
        raise ScanRejected("bomb", "a DICOM object whose JPEG 2000 frame is cut into too many blocks")


def _check_size(size: tuple[int, int], components: int, pixels: PixelFormat) -> None:
    if size != pixels.shape or components != pixels.samples:
        text = "a DICOM object whose compressed frame has {}x{} pixels of {} samples, unlike its header's {}x{} of {}"
        numbers = (size[1], size[0], components, pixels.columns, pixels.rows, pixels.samples)
        raise ScanRejected("decode_failed", text.format(*numbers))


_JPEG, _JPEG_2000 = ("50", "51", "57", "70", "80", "81"), ("90", "91", "201", "202", "203")
DECODERS: Final[dict[str, Callable[[bytes, PixelFormat], Array]]] = {
    "1.2.840.10008.1.2.5": _decode_rle,
    "1.2.840.10008.1.2.8.1": _decode_deflated,
    **{f"1.2.840.10008.1.2.4.{number}": _decode_jpeg for number in _JPEG},
    **{f"1.2.840.10008.1.2.4.{number}": _decode_jpeg_2000 for number in _JPEG_2000},
}
"""By transfer syntax. They return stored numbers, or luma of colours, [height, width], or RGB [height, width, 3].

The numbers are right-justified but for RLE frames, which are as the header says."""


def decode_frame(decoder: Callable[[bytes, PixelFormat], Array], stream: bytes, pixels: PixelFormat) -> Array:
    """Decode one frame. Raises ScanRejected: `truncated`, `decode_failed` or `unsupported`."""
    try:
        values = decoder(stream, pixels)
    except ScanRejected:
        raise
    except Exception as error:  # each library has its own
        early = _ENDS_EARLY.search(str(error))
        code, what = ("truncated", "ends early") if early else ("decode_failed", "is damaged")
        raise ScanRejected(code, f"a DICOM object whose compressed frame {what}") from None
    if values.shape[:2] != pixels.shape or values.dtype.kind not in "iu":
        raise ScanRejected("decode_failed", "a DICOM object whose compressed frame is not of the size it says")
    if 8 * values.dtype.itemsize > pixels.allocated:
        raise ScanRejected("decode_failed", "a DICOM object whose compressed frame has more bits than its header says")
    return values
