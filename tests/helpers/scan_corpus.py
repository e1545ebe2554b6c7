"""Good and hostile encoded images, generated and identical on every run, for the tests of all readers of scans.

The good ones show `picture()` as far as their mode allows; `expected(name)` gives the frames that a reader must return.
"""

from __future__ import annotations

import functools
import gzip
import io
import random
import struct
import zipfile
import zlib
from typing import Any

import numpy as np
from PIL import Image

from tests.helpers import dicom_files as dicom
from tests.helpers.nifti_files import write_nifti

HEIGHT, WIDTH = 72, 96
_BORDER = 8  # black rim, transparent in the scans that have alpha
LOSSY_TOLERANCE = 10 / 255
"""Largest difference of a pixel from `expected` (white is 1) for names with "jpeg" or "lossy"; 1/255 for others."""

# transforms of the stored pixels, so that a reader that applies the orientation gets the picture back
_UNDO_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
_ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))


@functools.cache
def picture() -> np.ndarray:
    """Return a gray uint8 picture [72, 96]: smooth, so that JPEG preserves it, asymmetric, with a black rim."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    blob = 150 * np.exp(-(((y - 26) / 13) ** 2) - ((x - 34) / 17) ** 2)
    small = 95 * np.exp(-(((y - 48) / 8) ** 2) - ((x - 70) / 9) ** 2)
    ramp = 0.4 * x + 0.3 * y
    distance = np.minimum.reduce([y, x, HEIGHT - 1 - y, WIDTH - 1 - x]) - _BORDER
    gray = (blob + small + ramp) * np.clip(distance / 6, 0, 1)
    return np.clip(np.rint(gray), 0, 255).astype(np.uint8)


def picture16() -> np.ndarray:
    """Return `picture` as uint16, with low bytes that differ from the high ones, to expose a reader that clips."""
    fine = np.arange(HEIGHT * WIDTH, dtype=np.uint32).reshape(HEIGHT, WIDTH) * 37 % 256
    return (picture().astype(np.uint32) * 256 + np.where(picture() > 0, fine, 0)).astype(np.uint16)


def expected(name: str) -> list[np.ndarray]:
    """Return the frames that a reader must give for `good_scans()[name]`, as floats from 0 (black) to 1 (white)."""
    first = picture16() / 65535 if "16bit" in name else picture() / 255
    if "1bit" in name.split("_"):
        first = (picture() >= 128).astype(float)
    if "stretched" in name:
        first = (picture() - picture().min()) / np.ptp(picture())
    return [first, first[::-1], first[:, ::-1]] if "pages" in name else [first]


@functools.cache
def good_scans() -> dict[str, bytes]:
    """Return every kind of image that must be readable, by name."""
    return {**_jpegs(), **_pngs(), **_tiffs(), **_others(), **_volumes(), **_dicom()}


@functools.cache
def bad_scans() -> dict[str, tuple[bytes, str]]:
    """Return every kind of input that must be rejected: name -> (bytes, rejection code)."""
    return {**_no_images(), **_unsupported(), **_cut(), **_bombs(), **_damaged(), **_misfits()}


def encode(image: Image.Image | np.ndarray, kind: str, **options: Any) -> bytes:
    """Return `image` encoded in Pillow's format `kind`."""
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def write_png(pixels: np.ndarray, *, colour_type: int, bits: int = 8, interlaced: bool = False) -> bytes:
    """Return a PNG of uint8 or uint16 `pixels` [height, width(, bands)], in variants that Pillow cannot write."""
    pixels = pixels.astype(">u2" if bits == 16 else "u1").reshape(*pixels.shape[:2], -1)
    passes = [pixels[y::dy, x::dx] for y, x, dy, dx in _ADAM7] if interlaced else [pixels]
    rows = b"".join(b"\0" + row.tobytes() for part in passes for row in part)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], bits, colour_type, 0, 0, int(interlaced))
    return png_of([(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")])


def png_of(chunks: list[tuple[bytes, bytes]]) -> bytes:
    """Return a PNG of these chunks, with correct lengths and checksums."""
    parts = [
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def write_tiff(pixels: np.ndarray, *, order: str = "<", photometric: int = 2) -> bytes:
    """Return a one-strip TIFF of uint16 `pixels` [height, width(, bands)], in variants that Pillow cannot write."""
    bands = pixels.shape[2] if pixels.ndim == 3 else 1
    tags = {258: [16] * bands, 262: [photometric], 277: [bands]}
    return tiff_of(pixels.shape, tags, [pixels.astype(order + "u2").tobytes()], order=order)


def tiff_of(shape: tuple[int, ...], tags: dict[int, list[int] | bytes], strips: list[bytes], *, order: str) -> bytes:
    """Return a TIFF of one directory: `shape` is [height, width, ...], `tags` what TIFF 6.0 calls SHORT, LONG, ASCII.

    Header, strips, directory, long values: the first strip begins at byte 8.
    """
    lengths = [len(strip) for strip in strips]
    offsets = [8 + sum(lengths[:number]) for number in range(len(strips))]
    rows = {256: [shape[1]], 257: [shape[0]], 259: [1], 273: offsets, 278: [-(-shape[0] // len(strips))], 279: lengths}
    if 324 in tags:  # tiles, not strips
        rows = {tag: rows[tag] for tag in (256, 257, 259)}
    tags = rows | tags
    body = b"".join(strips)
    body += bytes(len(body) % 2)
    directory, values = b"", b""
    values_at = 8 + len(body) + 2 + 12 * len(tags) + 4
    for tag, given in sorted(tags.items()):
        kind = 2 if isinstance(given, bytes) else 4 if max(given) > 0xFFFF or tag == 254 else 3
        packed = given if isinstance(given, bytes) else struct.pack(f"{order}{len(given)}{'HI'[kind - 3]}", *given)
        directory += struct.pack(order + "HHI", tag, kind, len(given))
        directory += packed.ljust(4, b"\0") if len(packed) <= 4 else struct.pack(order + "I", values_at + len(values))
        values += packed if len(packed) > 4 else b""
    magic = b"II*\0" if order == "<" else b"MM\0*"
    begin = magic + struct.pack(order + "I", 8 + len(body)) + body
    return begin + struct.pack(order + "H", len(tags)) + directory + bytes(4) + values


def _gray() -> Image.Image:
    return Image.fromarray(picture())


def _exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def _stored(orientation: int) -> Image.Image:
    undo = _UNDO_ORIENTATION.get(orientation)
    return _gray() if undo is None else _gray().transpose(undo)


def _inside() -> np.ndarray:
    """Return a uint8 alpha channel [72, 96]: opaque inside the black rim, transparent on it."""
    alpha = np.zeros((HEIGHT, WIDTH), np.uint8)
    alpha[_BORDER:-_BORDER, _BORDER:-_BORDER] = 255
    return alpha


def _jpegs() -> dict[str, bytes]:
    gray, rgb = _gray(), _gray().convert("RGB")
    zeros = np.zeros_like(picture())
    cmyk = Image.merge("CMYK", [Image.fromarray(band) for band in (zeros, zeros, zeros, 255 - picture())])
    scans = {
        "jpeg_gray": encode(gray, "JPEG", quality=95),
        "jpeg_rgb": encode(rgb, "JPEG", quality=95),
        "jpeg_progressive": encode(rgb, "JPEG", quality=95, progressive=True),
        "jpeg_restarts": encode(gray, "JPEG", quality=95, restart_marker_rows=1),
        "jpeg_rgb_space": encode(rgb, "JPEG", quality=95, keep_rgb=True),
        "jpeg_cmyk": encode(cmyk, "JPEG", quality=95),
        "jpeg_ycck": _ycck(),
        "jpeg_pictures": encode(rgb, "MPO", quality=95, save_all=True, append_images=[rgb.rotate(180)]),
        "jpeg_bytes_behind": encode(gray, "JPEG", quality=95) + b"\0" * 4096,
        "jpeg_broken_exif": encode(gray, "JPEG", quality=95, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"),
    }
    for orientation in range(1, 9):
        stored = _stored(orientation)
        scans[f"jpeg_exif_{orientation}"] = encode(stored, "JPEG", quality=95, exif=_exif(orientation))
    return scans


def _ycck() -> bytes:
    """Return a CMYK JPEG whose Adobe marker says that its first three bands are YCbCr."""
    neutral = np.full_like(picture(), 127)
    # as Pillow inverts when it writes: luma as it is, chroma 128, no black
    bands = [picture(), neutral, neutral, np.zeros_like(picture())]
    data = encode(Image.merge("CMYK", [Image.fromarray(band) for band in bands]), "JPEG", quality=95)
    transform = data.index(b"Adobe") + 11
    return data[:transform] + b"\2" + data[transform + 1 :]


def _pngs() -> dict[str, bytes]:
    gray, rgb, inside = _gray(), _gray().convert("RGB"), _inside()
    white = np.full_like(picture(), 255)
    covered = np.where(inside > 0, picture(), white)  # white in the transparent area
    palette = gray.convert("P")
    palette.putpalette([level for index in range(256) for level in (255 - index,) * 3])
    reversed_palette = palette.point(lambda index: 255 - index)
    opaque_palette = bytes([0] + [255] * 255)
    shown = Image.fromarray(np.where(inside > 0, np.maximum(picture(), 1), 0).astype(np.uint8)).convert("P")
    shown.putpalette([255, 255, 255] + [level for index in range(1, 256) for level in (index,) * 3])
    deep = picture16()
    deep_white = np.full_like(deep, 65535)
    return {
        "png_1bit": encode(Image.fromarray(picture() >= 128), "PNG"),
        "png_gray": encode(gray, "PNG"),
        "png_rgb": encode(rgb, "PNG"),
        "png_gray_alpha": encode(np.dstack([covered, inside]), "PNG"),
        "png_rgb_alpha": encode(np.dstack([covered] * 3 + [inside]), "PNG"),
        "png_soft_alpha": encode(np.dstack([white, white, white, picture()]), "PNG"),
        "png_gray_key": encode(Image.fromarray(covered), "PNG", transparency=255),
        "png_palette": encode(reversed_palette, "PNG"),
        "png_palette_key": encode(shown, "PNG", transparency=0),
        "png_palette_alpha": encode(shown, "PNG", transparency=opaque_palette[:1] + b"\xff" * 200 + b"\xfe" * 55),
        "png_interlaced": write_png(picture(), colour_type=0, interlaced=True),
        "png_exif_6": encode(_stored(6), "PNG", exif=_exif(6)),
        "png_16bit": encode(deep, "PNG"),
        "png_16bit_interlaced": write_png(deep, colour_type=0, bits=16, interlaced=True),
        "png_16bit_alpha": write_png(np.dstack([deep_white, deep]), colour_type=4, bits=16),
        "png_16bit_alpha_interlaced": write_png(np.dstack([deep, deep_white]), colour_type=4, bits=16, interlaced=True),
        "png_16bit_rgb": write_png(np.dstack([deep] * 3), colour_type=2, bits=16),
        "png_16bit_rgb_alpha": write_png(np.dstack([deep_white] * 3 + [deep]), colour_type=6, bits=16),
    }


def _tiffs() -> dict[str, bytes]:
    gray, deep = _gray(), Image.fromarray(picture16())
    pages = [Image.fromarray(page) for page in (picture(), picture()[::-1].copy(), picture()[:, ::-1].copy())]
    deep_pages = [
        Image.fromarray(page) for page in (picture16(), picture16()[::-1].copy(), picture16()[:, ::-1].copy())
    ]
    scans = {
        "tiff_gray": encode(gray, "TIFF"),
        "tiff_1bit": encode(Image.fromarray(picture() >= 128), "TIFF"),
        "tiff_rgb_lzw": encode(gray.convert("RGB"), "TIFF", compression="tiff_lzw"),
        "tiff_rgba": encode(np.dstack([np.full_like(picture(), 255)] * 3 + [picture()]), "TIFF"),
        "tiff_palette": encode(gray.convert("P"), "TIFF"),
        "tiff_jpeg": encode(gray, "TIFF", compression="jpeg", quality=95),
        "tiff_big": encode(gray, "TIFF", big_tiff=True),
        "tiff_16bit": encode(deep, "TIFF"),
        "tiff_16bit_deflate": encode(deep, "TIFF", compression="tiff_adobe_deflate"),
        "tiff_16bit_big_endian": write_tiff(picture16(), order=">", photometric=1),
        "tiff_16bit_white_is_zero": write_tiff(65535 - picture16(), photometric=0),
        "tiff_16bit_rgb": write_tiff(np.dstack([picture16()] * 3)),
        "tiff_16bit_rgb_big_endian": write_tiff(np.dstack([picture16()] * 3), order=">"),
        "tiff_32bit_of_16bit": encode(picture16().astype(np.int32), "TIFF"),
        "tiff_float_stretched": encode((picture() / 40 - 3).astype(np.float32), "TIFF"),
        "tiff_integer_stretched": encode(picture().astype(np.int32) * 100_000 - 7_000_000, "TIFF"),
        "tiff_pages": encode(pages[0], "TIFF", save_all=True, append_images=pages[1:]),
        "tiff_pages_lzw": encode(pages[0], "TIFF", save_all=True, append_images=pages[1:], compression="tiff_lzw"),
        "tiff_pages_16bit": encode(deep_pages[0], "TIFF", save_all=True, append_images=deep_pages[1:]),
    }
    for orientation in (3, 6):
        scans[f"tiff_exif_{orientation}"] = encode(_stored(orientation), "TIFF", tiffinfo={0x0112: orientation})
    return scans


def _others() -> dict[str, bytes]:
    gray, rgb = _gray(), _gray().convert("RGB")
    soft = Image.fromarray(np.dstack([np.full_like(picture(), 255)] * 3 + [picture()]))
    return {
        "bmp_gray": encode(gray, "BMP"),
        "bmp_1bit": encode(Image.fromarray(picture() >= 128), "BMP"),
        "bmp_rgb": encode(rgb, "BMP"),
        "webp_lossy": encode(rgb, "WEBP", quality=95),
        "webp_lossless": encode(rgb, "WEBP", lossless=True),
        "webp_alpha": encode(soft, "WEBP", lossless=True),
        "webp_lossless_exif_8": encode(_stored(8).convert("RGB"), "WEBP", lossless=True, exif=_exif(8)),
    }


def _volumes() -> dict[str, bytes]:
    deep = write_nifti(picture16().T[:, :, None], version=2, order=">")
    pages = np.dstack([page.T for page in (picture(), picture()[::-1], picture()[:, ::-1])])
    return {
        "nifti_pages": write_nifti(pages),
        "nifti_pages_gzip": gzip.compress(write_nifti(pages), mtime=0),
        "nifti_16bit": deep,
        "nifti_float_stretched": write_nifti((picture().T[:, :, None] / 40 - 3).astype(np.float32)),
    }


def _dicom() -> dict[str, bytes]:
    deep, rgb = picture16(), np.dstack([picture()] * 3)
    pages = np.stack([picture(), picture()[::-1], picture()[:, ::-1]])
    syntaxes = {
        "": dicom.EXPLICIT, "_implicit": dicom.IMPLICIT, "_big_endian": dicom.BIG_ENDIAN, "_deflated": dicom.DEFLATED,
        "_rle": dicom.RLE, "_jpeg_lossless": dicom.JPEG_LOSSLESS_1, "_jpeg_ls": dicom.JPEG_LS,
        "_jpeg_2000": dicom.JPEG_2000, "_htj2k": dicom.HTJ2K,
    }  # fmt: skip
    mirrored = dicom.slice_file(deep[:, ::-1].T.copy(), ImageOrientationPatient=[0, 1, 0, -1, 0, 0])
    inverted = {"PhotometricInterpretation": "MONOCHROME1"}
    return {
        **{f"dicom_16bit{name}": dicom.slice_file(deep, syntax=syntax) for name, syntax in syntaxes.items()},
        "dicom_16bit_signed": dicom.slice_file((deep.astype(np.int32) - 32768).astype(np.int16)),
        "dicom_16bit_white_is_zero": dicom.slice_file(65535 - deep, **inverted),
        "dicom_16bit_turned": mirrored,
        "dicom_16bit_gzip": gzip.compress(dicom.slice_file(deep), mtime=0),
        "dicom_16bit_like_a_tiff": b"II*\0\x08\0\0\0" + dicom.slice_file(deep)[8:],
        "dicom_16bit_no_preamble": dicom.write(dicom.mr_slice(deep), deep, meta=False),
        "dicom_jpeg": dicom.slice_file(picture(), syntax=dicom.JPEG),
        "dicom_rgb": dicom.slice_file(rgb),
        "dicom_rgb_jpeg": dicom.slice_file(rgb, syntax=dicom.JPEG),
        "dicom_pages": dicom.slice_file(pages),
        "dicom_pages_rle": dicom.slice_file(pages, syntax=dicom.RLE),
    }


def _no_images() -> dict[str, tuple[bytes, str]]:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as members:
        members.writestr("scan.jpg", good_scans()["jpeg_gray"])
    html = b"<!DOCTYPE html>\n<html><head><title>502 Bad Gateway</title></head><body>nginx</body></html>\n"
    error = b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>SlowDown</Code></Error>'
    return {
        "no_bytes": (b"", "empty"),
        "one_byte": (b"\xff", "not_an_image"),
        "nothing_but_zeros": (bytes(4096), "not_an_image"),
        "html_error_page": (html, "not_an_image"),
        "s3_error_document": (error, "not_an_image"),
        "json": (b'{"message": "Forbidden"}', "not_an_image"),
        "text": (b"BMI and other findings of the patients\n" * 20, "not_an_image"),
        "zip": (archive.getvalue(), "not_an_image"),
        "gzip": (gzip.compress(b"some text" * 100, mtime=0), "not_an_image"),
        "random": (random.Random(7).randbytes(5000), "not_an_image"),
    }


def _unsupported() -> dict[str, tuple[bytes, str]]:
    times = write_nifti(np.dstack([picture().T] * 3)[:, :, None])
    twelve_bit = bytearray(good_scans()["jpeg_gray"])
    twelve_bit[twelve_bit.index(b"\xff\xc0") + 4] = 12
    planes = {
        "gif": encode(_gray(), "GIF"),
        "dicom_report": dicom.slice_file(picture(), SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11"),
        "dicom_segmentation": dicom.slice_file(picture(), SOPClassUID="1.2.840.10008.5.1.4.1.1.66.4"),
        "dicom_video": dicom.write(dicom.mr_slice(picture()), syntax="1.2.840.10008.1.2.4.102", streams=[bytes(64)]),
        "nifti_of_times": times,
        "nifti_of_times_gzip": gzip.compress(times, mtime=0),
        "nifti_pair": struct.pack("<i", 348) + bytes(340) + b"ni1\0",
        "pdf": encode(_gray(), "PDF"),
        "eps": encode(_gray(), "EPS"),
        "icon": encode(_gray(), "ICO"),
        "photoshop": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 1, HEIGHT, WIDTH, 8, 1) + bytes(64),
        "jpeg_2000": encode(_gray(), "JPEG2000"),
        "jpeg_12bit": bytes(twelve_bit),
        "tiff_16bit_cmyk": write_tiff(np.dstack([picture16()] * 4), photometric=5),
    }
    return {name: (data, "unsupported") for name, data in planes.items()}


def _cut() -> dict[str, tuple[bytes, str]]:
    """Return files of every format that end too early: in the header, in the pixels, in the last bytes."""
    names = ("jpeg_rgb", "jpeg_progressive", "png_gray", "png_16bit", "tiff_gray", "tiff_pages_lzw", "bmp_rgb")
    cut = {}
    for name in (*names, "tiff_pages", "webp_lossy", "webp_lossless"):
        data = good_scans()[name]
        for share in (0.1, 0.5, 0.9):
            cut[f"{name}_cut_at_{share:.0%}"] = (data[: max(40, int(len(data) * share))], "truncated")
        if "pages" not in name:  # these end with meaningless bytes
            cut[f"{name}_last_byte_lost"] = (data[:-1], "truncated")
    for name in (
        "nifti_16bit",
        "nifti_pages_gzip",
        "dicom_16bit",
        "dicom_16bit_jpeg_ls",
        "dicom_jpeg",
        "dicom_pages_rle",
    ):
        data = good_scans()[name]
        cut |= {f"{name}_cut_at_{share:.0%}": (data[: int(len(data) * share)], "truncated") for share in (0.3, 0.9)}
    directory = good_scans()["tiff_rgb_lzw"]
    cut["tiff_cut_in_its_directory"] = (directory[:-30], "truncated")
    return cut


def _bombs() -> dict[str, tuple[bytes, str]]:
    side = 20_000
    rows = zlib.compressobj(9)
    row = bytes(1 + side // 8)
    pixels = b"".join(rows.compress(row) for _ in range(side)) + rows.flush()
    ihdr = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    whole_png = png_of([(b"IHDR", ihdr), (b"IDAT", pixels), (b"IEND", b"")])

    def png(width: int, height: int) -> bytes:
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        return png_of([(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")])

    text = b"Comment\0\0" + zlib.compress(bytes(64 * 2**20), 9)
    tiny = write_png(picture(), colour_type=0)
    text_bomb = tiny[:33] + png_of([(b"zTXt", text)])[8:] + tiny[33:]

    jpeg = bytearray(good_scans()["jpeg_rgb"])
    start = jpeg.index(b"\xff\xc0")
    jpeg[start + 5 : start + 9] = struct.pack(">HH", 65_000, 65_000)

    bmp = bytearray(good_scans()["bmp_rgb"])
    bmp[18:26] = struct.pack("<ii", 65_000, 65_000)

    webp = bytearray(good_scans()["webp_lossless"])
    webp[21:25] = (0x0FFF_FFFF).to_bytes(4, "little")  # 16384 x 16384
    webp_below_pillows_bound = bytearray(webp)
    webp_below_pillows_bound[21:25] = (9999 | 9999 << 14).to_bytes(4, "little")

    tiff = tiff_of((65_000, 65_000), {258: [16] * 3, 262: [2], 277: [3]}, [bytes(1000)], order="<")

    chain = b"".join(struct.pack("<HI", 0, 8 + 6 * (page + 1)) for page in range(20_000))
    overlapping = bytearray(b"II*\0" + struct.pack("<IH", 8, 100) + bytes(1208))
    struct.pack_into("<I", overlapping, 10 + 1200, 12)
    struct.pack_into("<H", overlapping, 12, 100)

    text_of = struct.Struct("<HHHIII")  # one entry: a description of a MiB at the end, and the next directory
    texts = b"".join(text_of.pack(1, 270, 2, 2**20, 8 + 100 * 18, 8 + 18 * (page + 1)) for page in range(100))
    overlapping_values = b"II*\0\x08\0\0\0" + texts + bytes(2**20)

    progressive = good_scans()["jpeg_progressive"]
    last_scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    bombs = {
        "png_bomb_of_pixels": whole_png,
        "png_header_bomb": png(65_000, 65_000),
        "png_widest_header": png(2**31 - 1, 2**31 - 1),
        "png_text_bomb": text_bomb,
        "jpeg_header_bomb": bytes(jpeg),
        "jpeg_of_many_scans": progressive[:-2] + last_scan * 500 + b"\xff\xd9",
        "bmp_header_bomb": bytes(bmp),
        "webp_header_bomb": bytes(webp),
        "webp_smaller_header_bomb": bytes(webp_below_pillows_bound),
        "tiff_header_bomb": tiff,
        "tiff_of_many_pages": b"II*\0\x08\0\0\0" + chain,
        "tiff_of_overlapping_pages": bytes(overlapping),
        "tiff_of_overlapping_values": overlapping_values,
        "dicom_header_bomb": dicom.slice_file(picture(), Rows=60_000, Columns=60_000),
        "dicom_of_many_frames": dicom.slice_file(picture(), NumberOfFrames=10_000_000),
        "dicom_of_deep_sequences": dicom.with_element(dicom.slice_file(picture()), dicom.nested(65)),
    }
    return {name: (data, "bomb") for name, data in bombs.items()}


def _damaged() -> dict[str, tuple[bytes, str]]:
    png = bytearray(good_scans()["png_gray"])
    png[len(png) // 2] ^= 0x10
    tiff = bytearray(good_scans()["tiff_rgb_lzw"])
    tiff[60:90] = b"\xff" * 30
    jpeg = good_scans()["jpeg_gray"]
    middle = (jpeg.index(b"\xff\xda") + len(jpeg)) // 2
    no_table = good_scans()["jpeg_gray"].replace(b"\xff\xdb", b"\xff\xfe")  # quantisation table -> comment
    no_pixels = png_of([(b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 0, 0, 0, 0)), (b"IEND", b"")])
    nowhere = encode(np.full((HEIGHT, WIDTH), np.nan, np.float32), "TIFF")
    return {
        "png_flipped_bit": (bytes(png), "decode_failed"),
        "png_without_pixels": (no_pixels, "decode_failed"),
        "jpeg_without_table": (no_table, "decode_failed"),
        "jpeg_with_a_hole": (jpeg[:middle] + bytes(100) + jpeg[middle + 100 :], "truncated"),
        "jpeg_cut_before_its_end_mark": (jpeg[:middle] + b"\xff\xd9", "truncated"),
        "tiff_of_nan": (nowhere, "decode_failed"),
        "dicom_without_pixels": (dicom.write(dicom.mr_slice(picture())), "decode_failed"),
        "dicom_of_another_size": (dicom.slice_file(picture(), syntax=dicom.JPEG, Rows=HEIGHT + 8), "decode_failed"),
    }


def _misfits() -> dict[str, tuple[bytes, str]]:
    frames = [_gray().convert("RGB"), _gray().convert("RGB").rotate(180)]
    animation: dict[str, Any] = {"save_all": True, "append_images": frames[1:], "duration": 100}
    small = {kind: encode(picture()[:1, :1].copy(), kind) for kind in ("PNG", "JPEG", "BMP", "TIFF", "WEBP")}
    thin = encode(picture()[:15].copy(), "PNG")
    return {
        **{f"one_pixel_{kind.lower()}": (data, "too_small") for kind, data in small.items()},
        "fifteen_rows": (thin, "too_small"),
        "dicom_of_fifteen_rows": (dicom.slice_file(picture()[:15]), "too_small"),
        "animated_gif": (encode(frames[0], "GIF", **animation), "animated"),
        "animated_png": (encode(frames[0], "PNG", **animation), "animated"),
        "animated_webp": (encode(frames[0], "WEBP", **animation), "animated"),
    }
