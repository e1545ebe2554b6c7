"""TIFF, strictly: pages that are cut, of a kind that is not read or that hide slices are refused.

Pillow decodes the others. Tags are those of TIFF 6.0, unless a comment names their source.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import math
import re
import struct
import threading
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Final

import imagecodecs
import numpy as np
from PIL import _imaging
from PIL.TiffImagePlugin import COMPRESSION_INFO, ImageFileDirectory_v2, TiffImageFile

from btray.data.scans.errors import ScanRejected
from btray.data.scans.gray import to_uint16
from btray.data.scans.jpeg import check_jpeg, stream_of_strip

Array = np.ndarray[Any, np.dtype[Any]]

_MAX_PAGES = 10_000  # Pillow walks the directories in quadratic time
_SHARED_VALUES = 2**26  # bytes; pages may share a colour profile
# bytes of a value, by TIFF's number of its type; 14 and 15 mean nothing
_TYPE_SIZES = dict(enumerate((1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8), start=1))
_LAST_PIXEL_TAG = _JPEG_TABLES = 347  # tags above it do not say how pixels are stored
_SUBFILE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _DESCRIPTION = 254, 256, 257, 258, 259, 262, 270
_FILL_ORDER, _SAMPLES, _PLANES, _SUB_DIRECTORIES, _EXTRA_SAMPLES, _SAMPLE_FORMAT = 266, 277, 284, 330, 338, 339
_STRIP_OFFSETS, _TILE_OFFSETS, _SUBSAMPLING = 273, 324, 530
_ROWS_PER_STRIP, _PREDICTOR, _YCBCR = 278, 317, 6
_COLOUR_SPACES = {2: "RGB", _YCBCR: "YCbCr"}
_LEAST_ROWS = 32  # of a strip in which damage shows where rows of blocks meet, if it is seen at all
_IMAGE_DEPTH, _STK_PLANES, _NIH_IMAGE = 32997, 33629, 43314  # by Silicon Graphics, MetaMorph and NIH Image
_NIH_SLICES = slice(130, 131)  # the one of 256 numbers that counts slices
_REDUCED_OR_MASK = 0b101  # bits of a page that is a thumbnail or a mask of another one
_JPEG, _DEFLATE = 7, (8, 32946)
# libtiff can decode two of them, which are rare, but not strictly: old JPEG, and JPEG of 12 bit
_NOT_READ: Final = {
    6: "old-style JPEG", 22610: "JPEG XR", 33003: "JPEG 2000", 33004: "JPEG 2000", 33005: "JPEG 2000", 34661: "JBIG",
    34712: "JPEG 2000", 34887: "LERC", 34892: "lossy JPEG of DNG", 34933: "PNG", 34934: "JPEG XR", 50001: "WebP",
    50002: "JPEG XL", 52546: "JPEG XL",
}  # fmt: skip
_SAMPLE_FORMATS: Final = {1: "unsigned", 2: "signed", 3: "floating-point"}
# the number of slices that ImageJ stores behind one directory; tifffile says only that there are more
_IMAGEJ_SLICES = re.compile(r"ImageJ=.*?^images=(\d+)", re.DOTALL | re.MULTILINE)
_TIFFFILE_SHAPE = re.compile(r'{"shape": \[([\d, ]+)\].*"truncated": true')


class _Complaints(threading.local):
    """How many errors libtiff has reported in this thread."""

    count = 0


_complaints = _Complaints()


@ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)
def _count_complaint(module: bytes, text: bytes, values: int) -> None:
    _complaints.count += 1


# Otherwise libtiff prints its errors, and goes on after some: a fax code that does not exist. Pillow's module finds the
# libtiff that it was linked with, and has none if it was built without.
with contextlib.suppress(AttributeError):
    ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(_count_complaint)


@contextlib.contextmanager
def strict_libtiff() -> Iterator[None]:
    """Raise ValueError at the end of the block if libtiff found an error in what it decoded there."""
    before = _complaints.count
    yield
    if _complaints.count > before:
        raise ValueError("damaged strips")


def find_directories(data: bytes) -> list[int]:
    """Return where each page's directory lies. Raises `ScanRejected` if their list is truncated or endless.

    Pillow ignores both.
    """
    order, word, before, inline = _layout(data)
    entry = struct.calcsize(order + "HH" + word * 2)
    found: dict[int, None] = {}
    entries = values = 0
    try:
        (offset,) = struct.unpack_from(order + word, data, inline)
        while offset and offset not in found:
            found[offset] = None
            (count,) = struct.unpack_from(order + ("Q" if before == 8 else "H"), data, offset)
            first = offset + before
            (offset,) = struct.unpack_from(order + word, data, first + count * entry)
            entries += count
            # directories that overlap have more entries, and their values more bytes, than the file has room for
            if len(found) > _MAX_PAGES or entries * entry > len(data) or values > 4 * len(data) + _SHARED_VALUES:
                raise ScanRejected("bomb", f"a TIFF of more than {_MAX_PAGES} pages or of overlapping directories")
            for at in range(first, first + count * entry, entry):
                tag, kind, length, value = struct.unpack_from(order + "HH" + word * 2, data, at)
                size = length * _TYPE_SIZES.get(kind, 0)
                values += size
                if tag <= _LAST_PIXEL_TAG and size > inline and value + size > len(data):
                    raise _truncated(data, f"tag {tag} lies")
    except (struct.error, OverflowError) as error:
        raise _truncated(data, "a directory lies") from error
    if not found:
        raise ScanRejected("truncated", "a TIFF without a page")
    return list(found)


def open_pages(data: bytes) -> Iterator[TiffImageFile]:
    """Yield the file at each page that is neither thumbnail nor mask, not loaded. Raises `ScanRejected`.

    Its strips are still to be checked, when its size is known to be within limits.
    """
    directories = find_directories(data)
    image = None
    for page, offset in enumerate(directories):
        try:
            image = image or TiffImageFile(io.BytesIO(data))
            image.seek(page)
        except SyntaxError as error:
            tags = _tags_at(data, offset)
            if page and int(tags.get(_SUBFILE, 0)) & _REDUCED_OR_MASK:
                continue
            raise _explain(error, data, tags, len(directories)) from error
        if page and int(image.tag_v2.get(_SUBFILE, 0)) & _REDUCED_OR_MASK:
            continue
        _check_kind(data, image.tag_v2, len(directories))
        # libtiff turns numbers to the byte order of this machine; Pillow knows that of unsigned ones alone
        image.tile = [
            tile._replace(args=(re.sub(r"B([SF])$", r"N\1", tile.args[0]), *tile.args[1:]))
            if tile.codec_name == "libtiff" and isinstance(tile.args, tuple)
            else tile
            for tile in image.tile
        ]
        yield image


def check_strips(data: bytes, image: TiffImageFile) -> None:
    """Raise an exception if strips or tiles of a page are not there, or not whole.

    If they had to be decoded for that, the page is loaded from what came out, not decoded once more.
    """
    tags = image.tag_v2
    bits, samples = tags.get(_BITS, (1,)), tags.get(_SAMPLES, 1)
    planes = samples if tags.get(_PLANES) == 2 else 1
    width, height = tags[_WIDTH], tags[_HEIGHT]
    size = planes * height * -(-width * bits[0] * samples // planes // 8)
    compression = tags.get(_COMPRESSION, 1)
    for offsets, lengths, across, down in (
        (_STRIP_OFFSETS, 279, width, tags.get(_ROWS_PER_STRIP, height)),
        (_TILE_OFFSETS, 325, tags.get(322), tags.get(323)),
    ):
        if offsets not in tags:
            continue
        if len(tags[offsets]) < (count := planes * -(-width // across) * -(-height // down)):
            raise ScanRejected("truncated", f"a TIFF that has not all {count} strips or tiles of its pixels")
        strips = list(zip(tags[offsets], tags.get(lengths, ()), strict=False))
        if any(offset + length > len(data) for offset, length in strips):
            raise _truncated(data, "pixels lie")
        if compression == 1 and strips and sum(length for _, length in strips) < size:
            raise ScanRejected("truncated", f"a TIFF whose strips have less than the {size} bytes of its pixels")
        pieces = [data[offset : offset + length] for offset, length in strips]
        in_strips = _TILE_OFFSETS not in tags and compression in (_JPEG, *_DEFLATE)
        if in_strips and (rows := _decode_strips(data, tags, pieces[:count])) is not None:
            # Behind the file, whose tags Pillow reads once more.
            image.fp, image.use_load_libtiff = io.BytesIO(data + rows.tobytes()), False
            layout = image.tile[0].args[0]  # type: ignore[index]  # libtiff's are a tuple
            image.tile = [image.tile[0]._replace(codec_name="raw", offset=len(data), args=(layout, 0, 1))]
            continue
        for piece in pieces:
            _check_piece(piece, tags, size, is_tile=offsets == _TILE_OFFSETS)


def _check_piece(piece: bytes, tags: ImageFileDirectory_v2, size: int, *, is_tile: bool) -> None:
    """Raise an exception if a strip or tile is damaged in a way that libtiff overlooks; a page has `size` bytes."""
    if tags.get(_COMPRESSION) == _JPEG:
        check_jpeg(piece, tags.get(_JPEG_TABLES, b""))
    elif tags.get(_COMPRESSION) in _DEFLATE and tags.get(_FILL_ORDER, 1) == 1:
        # libtiff stops at the last pixel, before the checksum
        stream = zlib.decompressobj()
        stream.decompress(piece, size + 1)
        if not stream.eof and not is_tile:  # a tile may be larger than the page
            raise zlib.error("a strip has another length than its rows")


def _decode_strips(data: bytes, tags: ImageFileDirectory_v2, strips: Sequence[bytes]) -> Array | None:
    """Return the rows of a page as libtiff would, bit by bit, from strips that have exactly these; else None."""
    width, height, samples, bits = tags[_WIDTH], tags[_HEIGHT], tags.get(_SAMPLES, 1), set(tags.get(_BITS, (1,)))
    down, depth = min(tags.get(_ROWS_PER_STRIP, height), height), min(bits)
    rows = np.empty((height, -(-width * depth * samples // 8)), np.uint8)
    parts = [rows[start : start + down] for start in range(0, height, down)]
    in_planes = samples > 1 and tags.get(_PLANES) == 2
    if len(bits) > 1 or in_planes or len(parts) != len(strips):
        return None
    if tags.get(_COMPRESSION) == _JPEG:
        space = _COLOUR_SPACES.get(tags.get(_PHOTOMETRIC, 0)) if samples == 3 else None
        is_known = samples == 1 or space
        return rows if is_known and _decode_jpegs(strips, tags.get(_JPEG_TABLES, b""), parts, space) else None
    predictor = tags.get(_PREDICTOR, 1)
    is_known = predictor == 1 or (predictor == 2 and depth in (8, 16, 32))
    if tags.get(_PHOTOMETRIC) == _YCBCR or tags.get(_FILL_ORDER, 1) != 1 or not is_known or not _inflate(strips, parts):
        return None
    if depth in (16, 32):  # numbers, which libtiff turns to the order of this machine
        rows = rows.view(f"{_layout(data)[0]}u{depth // 8}").astype(f"=u{depth // 8}")
    if predictor == 2:
        pixels = rows.reshape(height, width, samples)
        np.add.accumulate(pixels, axis=1, dtype=pixels.dtype, out=pixels)
    return rows


def _decode_jpegs(strips: Sequence[bytes], tables: bytes, parts: Sequence[Array], space: str | None) -> bool:
    """Decode strips, in `space` or gray, into rows of RGB or gray; return False if one is of another size or kind.

    Raises ValueError if one is damaged.
    """
    for part, strip in zip(parts, strips, strict=True):
        stream = stream_of_strip(strip, tables)
        if stream.size != (part.shape[1] // (3 if space else 1), len(part)) or (space and stream.colour_space != space):
            return False
        pixels = stream.decode_colours() if space else stream.decode_gray(None)
        if pixels is None:
            return False
        if len(part) < _LEAST_ROWS:
            stream.check_blocks()
        part[:] = pixels.reshape(part.shape)
    return True


def _inflate(strips: Sequence[bytes], parts: Sequence[Array]) -> bool:
    """Unpack strips into rows, with their checksums; return False if one is damaged or of another length."""
    try:
        unpacked = [
            len(imagecodecs.deflate_decode(strip, out=part.reshape(-1).data))
            for strip, part in zip(strips, parts, strict=True)
        ]
    except RuntimeError:
        return False
    return unpacked == [part.size for part in parts]


def read_numbers(image: TiffImageFile) -> Array | None:
    """Return uint16 of the pixels of a page whose numbers Pillow takes for others; None for any other page."""
    kind = (image.tag_v2.get(_SAMPLE_FORMAT, (1,))[0], image.tag_v2.get(_BITS, (1,))[0])
    number = {(2, 8): np.int8, (1, 32): np.uint32}.get(kind)
    return None if number is None else to_uint16(np.asarray(image).view(number))


def _tags_at(data: bytes, offset: int) -> ImageFileDirectory_v2:
    """Return the tags of a page that Pillow cannot open, and so keeps to itself."""
    tags = ImageFileDirectory_v2(data[: 16 if b"+" in data[:4] else 8])
    stream = io.BytesIO(data)
    stream.seek(offset)
    tags.load(stream)
    return tags


def _explain(error: Exception, data: bytes, tags: ImageFileDirectory_v2, pages: int) -> Exception:
    """Return why a page is refused that Pillow cannot open."""
    _check_kind(data, tags, pages)
    if "unknown pixel mode" not in str(error):
        return error
    kind = _SAMPLE_FORMATS.get(tags.get(_SAMPLE_FORMAT, (1,))[0], "unknown")
    pixels = f"{tags.get(_SAMPLES, 1)} x {tags.get(_BITS, (1,))[0]}-bit {kind} samples per pixel"
    text = f"a TIFF of {pixels}, photometric interpretation {tags.get(_PHOTOMETRIC)}: that is not read"
    return ScanRejected("unsupported", text)


def _check_kind(data: bytes, tags: ImageFileDirectory_v2, pages: int) -> None:
    """Raise `ScanRejected` if a page is of a compression that is not read, or more than one picture."""
    compression = tags.get(_COMPRESSION, 1)
    deep_jpeg = compression == _JPEG and max(tags.get(_BITS, (8,))) > 8
    if deep_jpeg or compression in _NOT_READ or compression not in COMPRESSION_INFO:
        name = "JPEG of 12 bit" if deep_jpeg else _NOT_READ.get(compression, "another method")
        raise ScanRejected("unsupported", f"a TIFF compressed with {name} ({compression}): that is not read")
    if compression == 1 and max(tags.get(_SUBSAMPLING, (1,))) > 1:
        raise ScanRejected("unsupported", "a TIFF of subsampled YCbCr without compression: that is not read")
    slices = max(
        tags.get(_IMAGE_DEPTH, 1), len(_values(tags, _STK_PLANES)), *map(int, _values(tags, _NIH_IMAGE)[_NIH_SLICES])
    )
    samples, extra = tags.get(_SAMPLES, 1), tags.get(_EXTRA_SAMPLES, ())
    description = str(tags.get(_DESCRIPTION, ""))
    if told := _IMAGEJ_SLICES.match(description):
        slices = max(slices, int(told[1]) if int(told[1]) > pages else 1)
    elif told := _TIFFFILE_SHAPE.match(description):
        slices = math.prod(map(int, told[1].split(","))) // (tags[_WIDTH] * tags[_HEIGHT] * samples)
    if tags.get(_PHOTOMETRIC, 0) <= 1:  # samples beyond gray and alpha
        slices = max(slices, samples - sum(kind in (1, 2) for kind in extra))
    # by the first tag of their own directories, which tells whether they are smaller copies
    order, word, before, _ = _layout(data)
    for offset in _values(tags, _SUB_DIRECTORIES):
        tag, _, _, value = struct.unpack_from(order + "HH" + word * 2, data, offset + before)
        slices += not (tag == _SUBFILE and value & _REDUCED_OR_MASK)
    if slices > 1:
        text = f"a TIFF of {slices} slices behind one directory: save each as a page of its own"
        raise ScanRejected("unsupported", text)


def _layout(data: bytes) -> tuple[str, str, int, int]:
    """Return byte order and word as struct's letters; bytes before a directory's first entry and of a value."""
    return "<" if data.startswith(b"II") else ">", *(("Q", 8, 8) if b"+" in data[:4] else ("I", 2, 4))


def _values(tags: ImageFileDirectory_v2, tag: int) -> tuple[Any, ...]:
    """Return the values of a tag that Pillow does not know, of which it gives a single one bare."""
    value = tags.get(tag, ())
    return value if isinstance(value, tuple) else (value,)


def _truncated(data: bytes, what: str) -> ScanRejected:
    return ScanRejected("truncated", f"a TIFF truncated after {len(data)} bytes: {what} after that")
