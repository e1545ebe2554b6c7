"""What kind of file some bytes are, told by their beginning alone: no decoder is run on unknown bytes."""

from __future__ import annotations

import contextlib
import re
import zlib
from typing import Final, Literal

Format = Literal["JPEG", "PNG", "TIFF", "BMP", "WebP"]

_FORMATS: Final[dict[Format, re.Pattern[bytes]]] = {
    "JPEG": re.compile(rb"\xff\xd8\xff"),
    "PNG": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "TIFF": re.compile(rb"II[*+]\0|MM\0[*+]"),
    "BMP": re.compile(rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0", re.DOTALL),  # sizes that its header has
    "WebP": re.compile(rb"RIFF.{4}WEBP", re.DOTALL),
}
_GIF_FRAME = re.compile(rb"\x21\xf9\x04.{4}\x00\x2c", re.DOTALL)
_FOREIGN: Final[tuple[tuple[int, bytes, str], ...]] = (
    (128, b"DICM", "a DICOM file"),
    (344, b"n+1\0", "a NIfTI file"),
    (344, b"ni1\0", "a NIfTI header"),
    (4, b"n+2\0", "a NIfTI-2 file"),
    (0, b"NRRD000", "an NRRD file"),
    (0, b"ObjectType = Image", "a MetaImage file"),
    (0, b"\x89HDF\r\n", "an HDF5 (perhaps MINC or MATLAB) file"),
    (0, b"%PDF-", "a PDF document"),
    (0, b"%!PS", "a PostScript file"),
    (0, b"\xc5\xd0\xd3\xc6", "an EPS file"),
    (0, b"8BPS", "a Photoshop file"),
    (0, b"\0\0\1\0", "an icon"),
    (0, b"\0\0\0\x0cjP  ", "a JPEG 2000 file"),
    (0, b"\0\0\0\x0cJXL ", "a JPEG XL file"),
    (4, b"ftyp", "a HEIC, AVIF or MP4 file"),
    (0, b"<svg", "an SVG drawing"),
)
_NO_IMAGE: Final[tuple[tuple[bytes, str], ...]] = (
    (b"<!doctype html", "an HTML page (perhaps an error of a web server)"),
    (b"<html", "an HTML page (perhaps an error of a web server)"),
    (b"<?xml", "an XML document (perhaps an error of an object store)"),
    (b"{", "a JSON document"),
    (b"pk\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"par1", "a Parquet file"),
)


def recognise_format(data: bytes) -> Format | None:
    """Return the format, if it is one that `btray.data.scans` reads, or None."""
    return next((name for name, beginning in _FORMATS.items() if beginning.match(data)), None)


def describe_foreign(data: bytes) -> tuple[str, str]:
    """Return rejection code and message for bytes that `recognise_format` does not know."""
    if data.startswith(b"GIF8"):
        frames = len(_GIF_FRAME.findall(data))
        code = "animated" if frames > 1 else "unsupported"
        return code, f"a GIF of {frames} frames" if frames > 1 else "a GIF: convert it to PNG"
    head = data[:1024]
    if data.startswith(b"\x1f\x8b"):
        with contextlib.suppress(zlib.error):
            head = zlib.decompressobj(wbits=31).decompress(data[:65536], 1024)
    for offset, magic, name in _FOREIGN:
        if head.startswith(magic, offset):
            return "unsupported", f"{name}: there is no reader for it here; convert it to PNG or TIFF"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for magic, name in _NO_IMAGE:
        if text.startswith(magic) or data.startswith(magic):
            return "not_an_image", f"{name}, not an image"
    if not any(head):
        return "not_an_image", "it begins with nothing but zero bytes: it was never written"
    return "not_an_image", f"no known image: it begins with {data[:8].hex(' ')}"
