"""What kind of file some bytes are, told by their beginning alone: no decoder is run on unknown bytes."""

from __future__ import annotations

import re
from typing import Final, Literal

from btray.data.scans import gzipped

Format = Literal["JPEG", "PNG", "TIFF", "BMP", "WebP", "DICOM", "NIfTI"]

# In this order: the preamble of a DICOM file may be the header of another format.
_FORMATS: Final[dict[Format, re.Pattern[bytes]]] = {
    # Without a preamble it begins with group 2 or 8, and a VR or a short length, in either byte order.
    "DICOM": re.compile(
        rb".{128}DICM"
        rb"|[\x02\x08]\0[\0-\x7f]\0(?:[A-Z]{2}[\0-\xff]\0|.\0\0\0)"
        rb"|\0[\x02\x08]\0[\0-\x7f](?:[A-Z]{2}\0|\0\0\0)",
        re.DOTALL,
    ),
    "JPEG": re.compile(rb"\xff\xd8\xff"),
    "PNG": re.compile(rb"\x89PNG\r\n\x1a\n(?!.{4}CgBI)", re.DOTALL),
    "TIFF": re.compile(rb"II[*+]\0|MM\0[*+]"),
    "BMP": re.compile(rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0", re.DOTALL),  # sizes that its header has
    "WebP": re.compile(rb"RIFF.{4}WEBP", re.DOTALL),
    "NIfTI": re.compile(rb".{344}n\+1\0|.{4}n\+2\0\r\n\x1a\n", re.DOTALL),
}
_HEAD = 4096  # bytes by which a kind is told
# Kinds that hold pictures and are not read here, by their beginning or, after `.{N}`, by what stands at byte N.
_FOREIGN: Final = tuple(
    (re.compile(beginning, re.DOTALL), name)
    for beginning, name in (
        (rb".{344}ni1\0|.{4}ni2\0", "a NIfTI header without its pixels, one file of two (.hdr and .img)"),
        # the size of its header, and a number of dimensions
        (rb"\x5c\x01\0\0.{36}[\x01-\x07]\0|\0\0\x01\x5c.{36}\0[\x01-\x07]", "an Analyze 7.5 header"),
        (rb"\0\0\0\x01(?:\0\0[^\0].|\0\0\0[^\0]){3}\0\0..\0\0\0[\0-\x05]", "a FreeSurfer MGH volume"),
        (rb"NRRD000", "an NRRD file"),
        (rb"(?:Comment *=[^\n]*\n)?(?:ObjectType|NDims) *= ", "a MetaImage header"),
        (rb"\s*type *= *(?:string|integer|float)-attribute", "an AFNI header"),
        (rb"# === DATA DESCRIPTION FILE", "a Philips PAR header"),
        (rb"MATRIX7\d", "an ECAT file"),
        (rb"!INTERFILE", "an Interfile header"),
        (rb"ZISRAWFILE", "a Zeiss CZI file"),
        (rb"\xda\xce\xbe\x0a", "a Nikon ND2 file"),
        (rb"CDF[\x01\x02\x05]", "a NetCDF file, such as MINC 1"),
        (rb"MATLAB 5\.0 MAT", "a MATLAB 5 file"),
        # kind, rows, columns, whether complex, and a name
        (rb"[\0-\x34]\0\0\0.{2}\0\0.{2}\0\0[\0\x01]\0\0\0[\x02-\x40]\0\0\0[A-Za-z]\w*\0", "a MATLAB 4 file"),
        (rb"MATLAB 7\.3 MAT", "a MATLAB 7.3 file"),
        (rb"(?:.{512}|.{1024}|.{2048})?\x89HDF\r\n", "an HDF5 file, such as MINC 2"),
        (rb"\x93NUMPY", "a NumPy array (NPY)"),
        (rb"PK\x03\x04.{26}[^/]{1,80}\.npy", "NumPy arrays (NPZ)"),
        (rb"SIMPLE  =", "a FITS file"),
        (rb".{208}MAP ", "an MRC volume"),
        (rb"# vtk DataFile", "a VTK file"),
        (rb"P[1-6]\s(?:\s|#[^\n]*\n)*\d+\s|P7\n|P[Ff]4?\s+\d", "a netpbm picture (PBM, PGM, PPM, PAM or PFM)"),
        (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "a JPEG 2000 file"),
        (rb"\0\0\0\x0cJXL |\xff\x0a", "a JPEG XL file"),
        (rb"\xff\x10\xff\x50|\0\0\0\x0cJXS ", "a JPEG XS file"),
        (rb"II\xbc", "a JPEG XR file"),
        (rb"FUJIFILMCCD-RAW|II(?:RO|RS|U\0)|MMOR|FOVb|\0MRM|II\x1a\0\0\0HEAPCCDR", "a raw picture of a camera"),
        (rb"SDPX|XPDS|\x80\x2a\x5f\xd7", "a DPX or Cineon picture"),
        (rb".{4}ftyp", "a HEIC, AVIF or MP4 file"),
        (rb"\x89PNG", "a PNG of Apple's own kind (CgBI)"),
        (rb"8BPS", "a Photoshop file"),
        (rb"gimp xcf", "a GIMP file"),
        (rb"\0\0[\x01\x02]\0[^\0]\0|icns|RIFF.{4}ACON", "an icon"),
        (rb"\x76\x2f\x31\x01", "an OpenEXR file"),
        (rb"#\?R(?:ADIANC|GB)E", "a Radiance picture"),
        (rb"DDS ", "a DDS texture"),
        (rb"qoif", "a QOI picture"),
        (rb"Lerc2 |CntZImage ", "a LERC picture"),
        (rb"\x28\0\0\0.{8}\x01\0[\x01\x04\x08\x10\x18\x20]\0", "a DIB, a BMP without its first header"),
        (rb"BLP[12]|DanM|LinS|Image type: ", "a BLP, MSP or IM picture"),
        (rb"FLIF", "a FLIF picture"),
        (rb"BPG\xfb", "a BPG picture"),
        (rb"[\x8a\x8b][MJ]NG\r\n", "an MNG or JNG file"),
        (rb"\x97JB2\r\n", "a JBIG2 file"),
        (rb"AT&TFORM", "a DjVu document"),
        (rb"\x0a[\x02-\x05]\x01[\x01\x02\x04\x08]", "a PCX picture"),
        (rb"\x01\xda[\0\x01][\x01\x02]\0[\x01-\x03]", "an SGI picture"),
        (rb"\x59\xa6\x6a\x95", "a Sun raster picture"),
        (rb"/\* XPM \*/|#define \w+_width \d", "an X11 picture (XPM or XBM)"),
        (rb"\xd7\xcd\xc6\x9a|\x01\0\0\0.{36} EMF", "a Windows metafile"),
        (rb"\s*%PDF-", "a PDF document"),
        (rb"%!PS", "a PostScript file"),
        (rb"\xc5\xd0\xd3\xc6", "an EPS file"),
        (rb"RIFF.{4}AVI |\x1a\x45\xdf\xa3|\0\0\x01[\xb3\xba]|\x30\x26\xb2\x75\x8e\x66\xcf\x11", "a video"),
        (
            rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*>|<!--(?:(?!-->).)*-->|<!DOCTYPE svg[^>]*>|\s)*<(?:svg:)?svg\b",
            "an SVG drawing",
        ),
    )
)
_TARGA_END = b"TRUEVISION-XFILE.\0"
_NO_IMAGE: Final[tuple[tuple[bytes, str], ...]] = (
    (b"<!doctype html", "an HTML page (perhaps an error of a web server)"),
    (b"<html", "an HTML page (perhaps an error of a web server)"),
    (b"<?xml", "an XML document (perhaps an error of an object store)"),
    (b"{", "a JSON document"),
    (b"pk\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"bzh", "a bzip2 archive"),
    (b"\xfd7zxz", "an xz archive"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive"),
    (b"rar!", "a RAR archive"),
    (b"7z\xbc\xaf", "a 7-Zip archive"),
    (b"par1", "a Parquet file"),
)


PACKED: Final[frozenset[Format]] = frozenset({"DICOM", "NIfTI"})
"""Formats that are read if they are packed with gzip, as is customary."""


def recognise_format(data: bytes) -> Format | None:
    """Return the format, if it is one that `btray.data.scans` reads, or None."""
    return next((name for name, beginning in _FORMATS.items() if beginning.match(data)), None)


def describe_foreign(data: bytes) -> tuple[str, str]:
    """Return rejection code and message for bytes that `recognise_format` does not know."""
    if data.startswith(b"GIF8"):
        frames = _count_gif_frames(data)
        code = "animated" if frames > 1 else "unsupported"
        return code, f"a GIF of {frames} frames" if frames > 1 else "a GIF: convert it to PNG"
    head = data[:_HEAD]
    if data.startswith(gzipped.MAGIC):
        head = gzipped.peek(data, _HEAD)
        if packed := recognise_format(head):
            return "unsupported", f"a {packed} packed with gzip: unpack it"
    name = next((name for beginning, name in _FOREIGN if beginning.match(head)), "")
    if name or data.endswith(_TARGA_END):
        return "unsupported", f"{name or 'a Targa picture'}: there is no reader for it here; convert it to PNG or TIFF"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for magic, name in _NO_IMAGE:
        if text.startswith(magic) or data.startswith(magic):
            return "not_an_image", f"{name}, not an image"
    if not any(head):
        return "not_an_image", "it begins with nothing but zero bytes: it was never written"
    # of a text no letter, which may be of a patient's name
    beginning = "text" if min(data[:8]) >= ord(" ") else data[:4].hex(" ")
    return "not_an_image", f"no known image: it begins with {beginning}"


def _count_gif_frames(data: bytes) -> int:
    """Count the pictures of a GIF by its blocks."""
    at, frames = 13 + _gif_colours(data[10:11]), 0
    while (block := data[at : at + 1]) in (b"!", b","):  # extensions and pictures
        is_frame = block == b","
        frames += is_frame
        at += 11 + _gif_colours(data[at + 9 : at + 10]) if is_frame else 2
        while at < len(data) and data[at]:
            at += 1 + data[at]
        at += 1
    return frames


def _gif_colours(flags: bytes) -> int:
    """Return the bytes of a table of colours that `flags` announce."""
    return 3 << ((flags[0] & 7) + 1) if flags and flags[0] & 0x80 else 0
