"""Encoded bytes -> gray frames: JPEG, PNG, TIFF, BMP, WebP, DICOM and NIfTI. Rejections have codes: `REJECTION_CODES`.

All callers decode with `decode`, so that training, bulk classification and serving see the same pixels. It keeps no
state and is thread-safe. Other image formats are refused as `unsupported`, by name; nothing is read from disk here.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from PIL import BmpImagePlugin, Image, ImageOps, JpegImagePlugin, PngImagePlugin, TiffImagePlugin
from PIL import WebPImagePlugin as WebpImagePlugin
from PIL.ImageFile import ImageFile

from btray.data.scans import gzipped
from btray.data.scans.bmp import check_bmp
from btray.data.scans.dicom import DicomImage, open_image, read_slice_info
from btray.data.scans.errors import ScanRejected
from btray.data.scans.formats import PACKED, Format, describe_foreign, recognise_format
from btray.data.scans.gray import to_gray, to_luma
from btray.data.scans.jpeg import JpegStream
from btray.data.scans.nifti import Volume, read_header
from btray.data.scans.png import PNG_END, check_png, check_rows
from btray.data.scans.slice_info import SliceInfo
from btray.data.scans.tiff import check_strips, find_directories, open_pages, read_numbers, strict_libtiff

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, kw_only=True)
class ScanLimits:
    """What a scan may cost. Pillow's own bound of about 179 million pixels a frame stands above `max_pixels`."""

    max_bytes: int = 256 * 2**20
    """Largest encoded size, in bytes."""
    max_pixels: int = 64_000_000
    """Most pixels of a picture with all its pages, or of one slice of a volume, by the headers, before decoding."""
    max_volume_pixels: int = 512_000_000
    """Most pixels of all slices of a volume (DICOM, NIfTI) together."""
    min_side: int = 16
    """Smallest width and height, in pixels."""


@dataclass(frozen=True)
class Scan:
    """A decoded scan."""

    frames: list[Array]
    """Gray frames [height, width], uint8 or uint16 in native byte order, C-contiguous, writable."""
    slices: list[SliceInfo] | None = None
    """What the file says of each frame; None for pictures, which say nothing."""


@dataclass(frozen=True)
class FileFacts:
    """What an image file is before it becomes gray frames."""

    format: Format
    mode: str
    """Pillow's name for how a pixel is stored, "L" or "RGB" say; that of a volume, "I;16"."""
    width: int
    height: int
    """In pixels, as stored: of the first page, before an EXIF orientation is applied."""
    colours: Array | None
    """A small copy in colour, uint8 [height, width, 3]; None if pixels have no colour."""


_DEFAULT_LIMITS = ScanLimits()
_UNPACKED_TO_COUNT = 1 << 24  # bytes, which take some 30 ms
_COLOUR_SIDE = 64  # of the small copy in colour, in pixels, if the file has as many
_COLOURLESS = ("1", "L", "LA", "I", "F")

# Built by class, not by Image.open: no other decoder can ever see the bytes, and Image.open's warning about large
# images, which cannot be silenced for one thread alone, is never issued. `_check_size` stands in its place.
_READERS: Final[dict[Format, type[ImageFile]]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "WebP": WebpImagePlugin.WebPImageFile,
}

# Encoders write about ten; each costs libjpeg a pass over the whole image, however few bytes it has.
_MAX_PROGRESSIVE_SCANS = 100
_BITS_PER_SAMPLE, _PHOTOMETRIC, _PLANES, _EXTRA_SAMPLES = 258, 262, 284, 338  # tags of TIFF
_DEEP_RAW_MODE = re.compile(r"(?P<bands>RGBA?|LA);16(?P<order>[BLN])$")
_OPPOSITE_ORDER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
# Whether the end that the format prescribes is missing.
_HAS_NO_END: Final[dict[Format, Callable[[bytes], bool]]] = {
    "JPEG": lambda data: data.rfind(b"\xff\xd9") <= data.rfind(b"\xff\xda"),
    "PNG": lambda data: PNG_END not in data,
    "BMP": lambda data: int.from_bytes(data[2:6], "little") > len(data),
    "WebP": lambda data: int.from_bytes(data[4:8], "little") + 8 > len(data),
    "TIFF": lambda data: False,  # it has no mark of its end; `open_pages` and `check_strips` look at what it needs
    "DICOM": lambda data: False,  # as their readers have seen already
    "NIfTI": lambda data: False,
}
# frame headers, of one to four components, of processes that libjpeg does not know
_RARE_JPEG = re.compile(rb"\xff([\xc5-\xc7\xcb\xcd-\xcf\xf7])\0[\x0b\x0e\x11\x14]")
_BOMB_TEXT = re.compile("decompression bomb|MAX_TEXT|Too much memory")
_TRUNCATED_TEXT = re.compile("truncated|premature end", re.IGNORECASE)
_UNSUPPORTED_TEXT = re.compile("unsupported|not (yet )?supported|cannot handle", re.IGNORECASE)


def decode(data: bytes, *, min_side: int | None = None, limits: ScanLimits = _DEFAULT_LIMITS) -> Scan:
    """Decode one encoded scan to gray frames; more than one frame only from a multi-page TIFF or a volume.

    Colour becomes luma (ITU-R 601), transparency is laid on black, EXIF orientation is applied. 16-bit gray and colour
    stay uint16; signed integers are shifted, 32-bit integers and floats scaled from their own range to 0..65535.
    `min_side` is a hint, in pixels: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as its shorter side
    keeps at least that many. Raises `ScanRejected` and nothing else whatever the bytes are.
    """
    if min_side is not None and min_side < 1:
        raise ValueError(f"min_side must be at least 1, not {min_side}")
    if not data:
        raise ScanRejected("empty", "the object has no bytes")
    if len(data) > limits.max_bytes:
        raise ScanRejected("too_large", f"{len(data)} bytes, above max_bytes {limits.max_bytes}")
    data = _unpack(data, limits)
    with _decoding(data) as kind:
        if kind == "NIfTI":
            volume = _open_volume(data, limits)
            return Scan(volume.frames(data), volume.infos())
        if kind == "DICOM":
            most = {"max_pixels": limits.max_pixels, "max_volume_pixels": limits.max_volume_pixels}
            return Scan(*_open_dicom(data, limits).slices(**most))
        return Scan(_read_frames(data, kind, min_side, limits))


def _unpack(data: bytes, limits: ScanLimits) -> bytes:
    """Return the bytes of a medical file packed with gzip; all others as they are."""
    packed = data.startswith(gzipped.MAGIC) and recognise_format(gzipped.peek(data)) in PACKED
    return gzipped.unpack(data, limits.max_bytes) if packed else data


def _open_volume(data: bytes, limits: ScanLimits) -> Volume:
    volume = read_header(data)
    volume.check(max_pixels=limits.max_pixels, max_volume_pixels=limits.max_volume_pixels, min_side=limits.min_side)
    return volume


def _open_dicom(data: bytes, limits: ScanLimits) -> DicomImage:
    return open_image(
        data,
        max_bytes=limits.max_bytes,
        max_pixels=limits.max_pixels,
        max_volume_pixels=limits.max_volume_pixels,
        min_side=limits.min_side,
    )


@contextlib.contextmanager
def _decoding(data: bytes) -> Iterator[Format]:
    """Give the format of a scan to the block that decodes it; raise ScanRejected for whatever fails there."""
    kind = recognise_format(data)
    if kind is None:
        raise ScanRejected(*describe_foreign(data))
    try:
        yield kind
    except ScanRejected:
        raise
    except Exception as error:  # damaged bytes make Pillow raise nearly anything: SyntaxError, KeyError, struct.error
        raise _rejection(error, data, kind) from error


def read_info(data: bytes, *, limits: ScanLimits = _DEFAULT_LIMITS) -> SliceInfo | None:
    """Return what a medical file says of its first frame, of which `data` may be the beginning; None for a picture.

    Raises ScanRejected: `truncated` if the header goes on, or what else is wrong; no pixel is looked at.
    """
    data = gzipped.peek(data, limits.max_bytes)
    with _decoding(data) as kind:
        if kind == "NIfTI":
            return _open_volume(data, limits).infos()[0]
        return read_slice_info(data, limits.max_bytes) if kind == "DICOM" else None


def count_pages(data: bytes) -> int:
    """Count the pages of one encoded scan by its headers, thumbnails and masks too; 1 if `decode` will refuse it.

    Also 1 if the header lies in the compressed part of a DICOM object that is large once it is unpacked.
    """
    try:
        if recognise_format(head := gzipped.peek(data)) == "NIfTI":
            return _open_volume(head, _DEFAULT_LIMITS).shape[2]
        if recognise_format(head) == "DICOM":
            limits = replace(_DEFAULT_LIMITS, max_bytes=_UNPACKED_TO_COUNT)
            return _open_dicom(gzipped.peek(data, _UNPACKED_TO_COUNT), limits).pixels.frames
        return len(find_directories(data)) if recognise_format(data) == "TIFF" else 1
    except ScanRejected:
        return 1


def examine(data: bytes, *, limits: ScanLimits = _DEFAULT_LIMITS) -> FileFacts:
    """Return what kind of file a scan is, and a small copy of its colours. Raises `ScanRejected` and nothing else."""
    data = _unpack(data, limits)
    with _decoding(data) as kind:
        if kind == "NIfTI":
            width, height, _ = _open_volume(data, limits).shape
            return FileFacts(kind, "I;16", width, height, None)
        if kind == "DICOM":
            pixels = _open_dicom(data, limits).pixels
            mode = "RGB" if pixels.samples > 1 else "L" if pixels.allocated == 8 else "I;16"
            return FileFacts(kind, mode, pixels.columns, pixels.rows, None)
        image = next(open_pages(data)) if kind == "TIFF" else _READERS[kind](io.BytesIO(data))
        _check_size(image.size, limits)
        mode, (width, height) = image.mode, image.size
        if mode.startswith(_COLOURLESS):
            return FileFacts(kind, mode, width, height, None)
        image.draft("RGB", (_COLOUR_SIDE, _COLOUR_SIDE))  # a JPEG is decoded at an eighth of its size
        factors = (max(1, image.width // _COLOUR_SIDE), max(1, image.height // _COLOUR_SIDE))
        # colours of a palette cannot be averaged by their numbers
        small = (image.convert("RGB") if image.mode in ("P", "PA") else image).reduce(factors)
        return FileFacts(kind, mode, width, height, np.asarray(small.convert("RGB")))


def _read_frames(data: bytes, kind: Format, min_side: int | None, limits: ScanLimits) -> list[Array]:
    if kind == "TIFF":
        return list(_pages(data, limits))
    if kind == "JPEG":
        return [_read_jpeg(data, min_side, limits)]
    image = _READERS[kind](io.BytesIO(data))
    _check_size(image.size, limits)
    if getattr(image, "is_animated", False):
        raise ScanRejected("animated", f"a {kind} animation of {getattr(image, 'n_frames', 'several')} frames")
    if kind == "PNG":
        check_png(data, image)
    elif kind == "BMP":
        check_bmp(data, image)
    return [_frame(data, image)]


def _read_jpeg(data: bytes, min_side: int | None, limits: ScanLimits) -> Array:
    stream = JpegStream(data)
    # Pillow says how a picture is to be turned; it takes a while to open, and is not asked if there is nothing to say.
    image = None if stream.is_plain else JpegImagePlugin.JpegImageFile(io.BytesIO(data))
    _check_size(stream.size, limits)
    if stream.is_progressive and data.count(b"\xff\xda") > _MAX_PROGRESSIVE_SCANS:
        raise ScanRejected("bomb", f"a JPEG of more than {_MAX_PROGRESSIVE_SCANS} progressive scans")
    gray = stream.decode_gray(min_side)
    if gray is None:
        image = image or JpegImagePlugin.JpegImageFile(io.BytesIO(data))
        image.draft("L", (min_side, min_side) if min_side else None)
        return _frame(data, image)
    if image is None:
        return gray
    page = Image.fromarray(gray)
    page.info = image.info
    _set_upright(page)
    return np.array(page)


def _pages(data: bytes, limits: ScanLimits) -> Iterator[Array]:
    pixels = 0
    for image in open_pages(data):
        pixels = _check_size(image.size, limits, pixels)
        check_strips(data, image)
        inverted = image.tag_v2.get(_PHOTOMETRIC) == 0  # white is zero: Pillow inverts up to 8 bit only
        with strict_libtiff():
            frame = _frame(data, image)
        yield np.invert(frame) if inverted and frame.dtype == np.uint16 else frame


def _check_size(size: tuple[int, int], limits: ScanLimits, pixels_before: int = 0) -> int:
    """Return the number of pixels with those of (width, height). Raises `ScanRejected` if they break a limit."""
    width, height = size
    pixels = pixels_before + width * height
    if pixels > limits.max_pixels:
        total = f", {pixels} pixels with the pages before it" if pixels_before else f", {pixels} pixels"
        raise ScanRejected("bomb", f"{width}x{height}{total}, above max_pixels {limits.max_pixels}")
    if min(width, height) < limits.min_side:
        raise ScanRejected("too_small", f"{width}x{height} pixels, below min_side {limits.min_side}")
    return pixels


def _frame(data: bytes, image: ImageFile) -> Array:
    """Return the current page, in gray, of a file that is open and not loaded."""
    deep = read_numbers(image) if isinstance(image, TiffImagePlugin.TiffImageFile) else None
    if deep is None:
        deep = _deep_colour(data, image)
    image.load()
    if isinstance(image, PngImagePlugin.PngImageFile):
        check_rows(data, image)
    page: Image.Image = image if deep is None else Image.fromarray(deep)
    if _has_padding(image):
        page = page.convert("RGB")
    page.info = image.info
    _set_upright(page)
    return to_gray(page) if deep is None else np.array(page)


def _has_padding(image: ImageFile) -> bool:
    """Return whether a fourth band is 0 everywhere and need not be alpha: BMP and most TIFF do not say what it is."""
    undeclared = isinstance(image, BmpImagePlugin.BmpImageFile) or (
        isinstance(image, TiffImagePlugin.TiffImageFile) and _EXTRA_SAMPLES not in image.tag_v2
    )
    return undeclared and image.mode == "RGBA" and not image.getchannel("A").getbbox()


def _set_upright(page: Image.Image) -> None:
    """Turn a page as its EXIF orientation says: the network must see the head upright, as people do."""
    with contextlib.suppress(Exception):
        page.getexif()  # if it cannot be read, Pillow keeps it as empty: the pixels are taken as they are stored
    ImageOps.exif_transpose(page, in_place=True)


def _deep_colour(data: bytes, image: ImageFile) -> Array | None:
    """Return gray uint16 [height, width] of a page with several bands of 16 bit; None for any other.

    Pillow drops the low byte of such bands, which is most of a 12-bit scan. Its decoders do give the low bytes if
    they are told the opposite byte order, so the page is decoded a second time with that.
    """
    raw_modes = {str(tile.args[0] if isinstance(tile.args, tuple) else tile.args) for tile in image.tile}
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    bits = tags.get(_BITS_PER_SAMPLE, ())
    if not (len(bits) > 1 and max(bits) > 8) and not any(_DEEP_RAW_MODE.match(raw_mode) for raw_mode in raw_modes):
        return None
    raw_mode = raw_modes.pop()
    if raw_mode == "LA;16B":
        pairs = _load_as(image, "RGBA").view(">u2").astype(np.uint16)
        return _on_black(pairs[..., 0], pairs[..., 1])
    match = _DEEP_RAW_MODE.match(raw_mode)
    if raw_modes or match is None or tags.get(_PLANES, 1) != 1:
        raise ScanRejected("unsupported", f"a {image.format} of several 16-bit bands laid out as {raw_mode}")
    twin = type(image)(io.BytesIO(data))
    twin.seek(image.tell())
    low = _load_as(twin, f"{match['bands']};16{_OPPOSITE_ORDER[match['order']]}")
    bands = np.asarray(image).astype(np.uint16) << 8 | low
    gray = to_luma(bands[..., :3])
    key = image.info.get("transparency")
    if key is not None:
        gray[(bands == key).all(axis=-1)] = 0
    return _on_black(gray, bands[..., 3]) if bands.shape[-1] == 4 else gray


def _load_as(image: ImageFile, raw_mode: str) -> Array:
    """Return bytes [height, width, bands] of a file not yet loaded, read in another layout than its header says."""
    image.tile = [
        tile._replace(args=(raw_mode, *tile.args[1:]) if isinstance(tile.args, tuple) else raw_mode)
        for tile in image.tile
    ]
    return np.asarray(image)


def _on_black(gray: Array, alpha: Array) -> Array:
    return ((gray.astype(np.uint32) * alpha + 0x7FFF) // 0xFFFF).astype(np.uint16)


def _rejection(error: Exception, data: bytes, kind: Format) -> ScanRejected:
    """Return what a decoder's exception means to an operator."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)) or _BOMB_TEXT.search(text):
        return ScanRejected("bomb", f"{kind}: {text}")
    if kind == "JPEG" and (rare := _RARE_JPEG.search(data)):
        name = "JPEG-LS" if rare[1] == b"\xf7" else "hierarchical or arithmetic-coded lossless JPEG"
        return ScanRejected("unsupported", f"a {name} file: there is no reader for it here; convert it to PNG or TIFF")
    if _TRUNCATED_TEXT.search(text) or _HAS_NO_END[kind](data):
        return ScanRejected("truncated", f"a {kind} truncated after {len(data)} bytes: {text}")
    if _UNSUPPORTED_TEXT.search(text):
        return ScanRejected("unsupported", f"a {kind} of a kind that is not read: {text}")
    return ScanRejected("decode_failed", f"a damaged {kind}: {text}")
