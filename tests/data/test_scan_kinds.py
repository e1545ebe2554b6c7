"""Kinds of files: what a mode, a directory or a decoder would change in silence is read right, or refused by name."""

from __future__ import annotations

import gzip
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from btray.data.scans import ScanRejected, decode, examine
from tests.helpers import scan_corpus as corpus

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")

CASES = Path(__file__).resolve().parents[3] / "shared" / "cases" / "images"
PICTURE = corpus.picture()
SHAPE = PICTURE.shape
RAMP = np.linspace(0, 1, PICTURE.size).reshape(SHAPE)
PACKERS: dict[int, Callable[[bytes], bytes]] = {1: bytes, 8: zlib.compress}
ORDERS = {"little": "<", "big": ">"}


def outcome(data: bytes) -> str:
    """Return "CODE: message", or "" if there are frames."""
    try:
        decode(data)
    except ScanRejected as error:
        return f"{error.code}: {error}"
    return ""


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("jpeg_whole.jpg", ""),
        ("jpeg_zero_hole.jpg", "(truncated|decode_failed): .*"),
        ("jpeg_cut_with_eoi.jpg", "(truncated|decode_failed): .*"),
        ("jpegls.jpg", "unsupported: .*JPEG-LS.*"),
        ("tiff_jpeg2000.tif", "unsupported: .*JPEG 2000.*"),
        ("matlab73.mat", "unsupported: .*MATLAB 7.3.*"),
        ("slice.npy", "unsupported: .*NumPy.*"),
        ("tiff_int8.tif", ""),
        ("tiff_imagej_one_directory.tif", "unsupported: .* 5 slices.*"),
        ("bmp32_v5_zero_alpha.bmp", ""),
        ("png_2bit_trns_white.png", ""),
    ],
)
@pytest.mark.realdata
def test_the_shared_cases_give_what_their_readme_says(name: str, says: str) -> None:
    if not CASES.is_dir():
        pytest.skip(f"the shared cases are not at {CASES}")
    data = (CASES / name).read_bytes()
    assert re.fullmatch(says, outcome(data))
    if not says:
        (frame,) = decode(data).frames
        corner, spot, most = {
            "tiff_int8.tif": (0, 240, 240), "bmp32_v5_zero_alpha.bmp": (0, 240, 240),
            "png_2bit_trns_white.png": (0, 170, 170), "jpeg_whole.jpg": (0, 238, 254),
        }[name]  # fmt: skip
        assert (frame[0, 0], frame[70, 150], frame.max()) == (corner, spot, most)


# ---- numbers that a mode of Pillow cannot hold


def numbers(kind: str) -> np.ndarray:
    """Return rising numbers [height, width] over the whole range of a type; floats from -1e3 to 1e3."""
    if kind[0] == "f":
        return (RAMP * 2e3 - 1e3).astype(kind)
    limits = np.iinfo(kind)
    steps = np.arange(PICTURE.size, dtype=object) * (int(limits.max) - int(limits.min)) // (PICTURE.size - 1)
    return (steps + int(limits.min)).astype(kind).reshape(SHAPE)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("compression", PACKERS)
@pytest.mark.parametrize("white_is_zero", [False, True])
@pytest.mark.parametrize("kind", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8"])
def test_numbers_of_a_tiff_keep_their_order_or_are_refused(
    kind: str, white_is_zero: bool, compression: int, order: str
) -> None:
    values = numbers(kind)
    tags = {
        258: [values.itemsize * 8], 259: [compression], 262: [0 if white_is_zero else 1],
        339: [{"u": 1, "i": 2, "f": 3}[kind[0]]],
    }  # fmt: skip
    body = PACKERS[compression](values.astype(ORDERS[order] + kind).tobytes())
    data = corpus.tiff_of(SHAPE, tags, [body], order=ORDERS[order])
    if found := outcome(data):
        assert found.startswith(f"unsupported: a TIFF of 1 x {values.itemsize * 8}-bit")
        assert kind not in ("u1", "i1", "u2", "i2", "i4", "f4") or white_is_zero
        return
    (frame,) = decode(data).frames
    levels = frame.ravel()[::-1] if white_is_zero else frame.ravel()
    assert (np.diff(levels.astype(int)) >= 0).all()
    assert len(np.unique(levels)) == min(256 if values.itemsize == 1 else 2**16, PICTURE.size)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("compression", PACKERS)
def test_levels_of_12_bit_keep_their_order_or_are_refused(compression: int, order: str) -> None:
    levels = (RAMP * 4095).astype(np.uint32).reshape(-1, 2)
    pairs = (levels[:, 0] << 12 | levels[:, 1]).astype(">u4").view(np.uint8).reshape(-1, 4)[:, 1:]
    data = corpus.tiff_of(
        SHAPE, {258: [12], 259: [compression], 262: [1]}, [PACKERS[compression](pairs.tobytes())], order=ORDERS[order]
    )
    if found := outcome(data):
        assert found.startswith("unsupported: a TIFF of 1 x 12-bit")
    else:
        np.testing.assert_array_equal(decode(data).frames[0].ravel(), levels.ravel())


# ---- slices behind one directory


def stacked(tags: dict[int, list[int] | bytes], before: bytes = b"") -> bytes:
    """Return a TIFF of one directory with five slices behind it and these tags; `before` lies at byte 8."""
    pixels = np.stack([PICTURE] * 5).tobytes()
    strips = [before, pixels] if before else [pixels]
    return corpus.tiff_of(SHAPE, {258: [8], 262: [1], 278: [SHAPE[0]]} | tags, strips, order="<")


def sub_directory(subfile: int) -> bytes:
    return struct.pack("<HHHIII", 1, 254, 4, 1, subfile, 0)


def chained(first: bytes, second: bytes) -> bytes:
    """Return a TIFF of two pages: the directory of `second`, whose pixels are those of `first`, lies behind it."""
    at = int.from_bytes(second[4:8], "little")
    directory = second[at:]
    count = int.from_bytes(first[int.from_bytes(first[4:8], "little") :][:2], "little")
    link = int.from_bytes(first[4:8], "little") + 2 + 12 * count
    return first[:link] + struct.pack("<I", len(first)) + first[link + 4 :] + directory


STACKS = {
    "imagej": stacked({270: b"ImageJ=1.53t\nimages=5\nslices=5\n\0"}),
    "imagej_hyperstack": stacked({270: b"ImageJ=1.53t\nimages=5\nchannels=1\nframes=5\nhyperstack=true\n\0"}),
    "image_depth": stacked({32997: [5]}),
    "metamorph": stacked({33629: [1] * 10}),
    "nih_image": stacked({43314: [0] * 130 + [5] + [0] * 125}),
    "tifffile": stacked({270: b'{"shape": [5, 72, 96], "truncated": true}\0'}),
    "samples": stacked({258: [8] * 5, 277: [5], 338: [0] * 4}),
    "planes": stacked({258: [8] * 5, 277: [5], 284: [2], 338: [0] * 4}),
    "sub_directories": stacked({330: [8, 8, 8, 8]}, sub_directory(0)),
}


@pytest.mark.parametrize("name", STACKS)
def test_slices_behind_one_directory_are_refused_with_their_number(name: str) -> None:
    count = 10 if name == "metamorph" else 5
    assert outcome(STACKS[name]).startswith(f"unsupported: a TIFF of {count} slices behind one directory")


def test_directories_that_hide_nothing_are_read() -> None:
    page = Image.fromarray(PICTURE)
    stack = corpus.encode(page, "TIFF", save_all=True, append_images=[page] * 4, tiffinfo={270: "ImageJ=1\nimages=5\n"})
    assert len(decode(stack).frames) == 5
    for tags in ({270: b"ImageJ=1.53t\n\0"}, {32997: [1]}, {33629: [1]}, {270: b'{"shape": [72, 96]}\0'}):
        assert len(decode(stacked(tags)).frames) == 1
    assert len(decode(stacked({330: [8, 8]}, sub_directory(1))).frames) == 1  # smaller copies
    pages = [{254: [0], 258: [8], 262: [1]}, {254: [4], 258: [1], 262: [4]}]  # the second one is a mask, of 1 bit
    first, second = (corpus.tiff_of(SHAPE, tags, [PICTURE.tobytes()], order="<") for tags in pages)
    (frame,) = decode(chained(first, second)).frames
    np.testing.assert_array_equal(frame, PICTURE)
    alpha = np.dstack([PICTURE, np.full_like(PICTURE, 255)]).tobytes()
    tags = {258: [8, 8], 262: [1], 277: [2], 338: [2]}
    np.testing.assert_array_equal(decode(corpus.tiff_of(SHAPE, tags, [alpha], order="<")).frames[0], PICTURE)


# ---- kinds that are not read

COMPRESSIONS = {
    6: "old-style JPEG", 33003: "JPEG 2000", 34661: "JBIG", 34712: "JPEG 2000", 34887: "LERC", 34933: "PNG",
    34934: "JPEG XR", 50001: "WebP", 50002: "JPEG XL", 65000: "65000",
}  # fmt: skip
UNREAD = {
    "NIfTI header": b"\x5c\1\0\0" + bytes(340) + b"ni1\0",
    "one file of two": b"\x1c\2\0\0ni2\0\r\n\x1a\n",
    "Analyze": struct.pack("<i36xh", 348, 3) + bytes(306),
    "Analyze 7.5": struct.pack(">i36xh", 348, 4) + bytes(306),
    "MGH": struct.pack(">6i", 1, 256, 256, 128, 1, 3) + bytes(300),
    "NRRD": b"NRRD0004\ntype: short\n",
    "MetaImage": b"ObjectType = Image\nNDims = 3\n",
    "MetaImage header": b"NDims = 2\nDimSize = 4 4\n",
    "AFNI": b"\ntype  = string-attribute\nname = HISTORY_NOTE\n",
    "PAR": b"# === DATA DESCRIPTION FILE ====\n",
    "ECAT": b"MATRIX72v\0",
    "Interfile": b"!INTERFILE :=\n",
    "CZI": b"ZISRAWFILE" + bytes(6),
    "ND2": b"\xda\xce\xbe\x0a" + bytes(12),
    "MINC 1": b"CDF\1\0\0\0\0",
    "MINC 2": b"\x89HDF\r\n\x1a\n",
    "HDF5": bytes(512) + b"\x89HDF\r\n\x1a\n",
    "MATLAB 5": b"MATLAB 5.0 MAT-file, Platform: GLNXA64",
    "MATLAB 4": struct.pack("<5i", 50, 72, 96, 0, 2) + b"x\0" + bytes(99),
    "HDF5 behind a block": bytes(2048) + b"\x89HDF\r\n\x1a\n",
    "MetaImage with a comment": b"Comment = made by hand\nObjectType = Image\n",
    "LERC": b"Lerc2 \6\0\0\0",
    "DIB of Windows": struct.pack("<IiiHH", 40, 96, 72, 1, 8) + bytes(99),
    "MATLAB 7.3": b"MATLAB 7.3 MAT-file, Platform: GLNXA64",
    "NumPy": b"\x93NUMPY\1\0v\0{'descr': '<u2'",
    "NPZ": b"PK\3\4" + bytes(26) + b"arr_0.npy",
    "FITS": b"SIMPLE  =                    T",
    "MRC": bytes(208) + b"MAP DD",
    "VTK": b"# vtk DataFile Version 3.0\n",
    "PGM": b"P5\n# made by hand\n96 72\n255\n",
    "PPM": b"P3 96 72 255 0 0 0",
    "PBM": b"P4\n96 72\n",
    "PAM": b"P7\nWIDTH 96\nHEIGHT 72\n",
    "PFM": b"Pf\n96 72\n-1.0\n",
    "JPEG 2000": b"\xff\x4f\xff\x51\0\x29\0\0",
    "JPEG 2000 file": b"\0\0\0\x0cjP  \r\n\x87\n",
    "JPEG XL": b"\xff\x0a\xd1\x40",
    "JPEG XL file": b"\0\0\0\x0cJXL \r\n\x87\n",
    "JPEG XS": b"\xff\x10\xff\x50\0\4",
    "raw of Fujifilm": b"FUJIFILMCCD-RAW 0201",
    "raw of Olympus": b"IIRO\x08\0\0\0",
    "raw of Panasonic": b"IIU\0\x18\0\0\0",
    "DPX": b"SDPX\0\0\x20\0",
    "JPEG XR": b"II\xbc\1\x20\0\0\0",
    "JPEG-LS": b"\xff\xd8\xff\xf7\0\x0b\x08\0\x48\0\x60\1\1\x11\0\xff\xda\0\x08\1\1\0\0\0\0\1\2\3\xff\xd9",
    "CgBI": b"\x89PNG\r\n\x1a\n\0\0\0\4CgBI",
    "gzip": gzip.compress(corpus.good_scans()["tiff_gray"]),
    "hierarchical": corpus.good_scans()["jpeg_gray"].replace(b"\xff\xc0", b"\xff\xc5", 1),
    "HEIC": b"\0\0\0\x18ftypheic",
    "AVIF": b"\0\0\0\x1cftypavif",
    "Photoshop": b"8BPS\0\1",
    "icon": b"\0\0\1\0\1\0\x10\x10",
    "OpenEXR": b"v/1\1\2\0\0\0",
    "DDS": b"DDS \x7c\0\0\0",
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "SVG drawing": b"<?xml version='1.0'?>\n<!-- made by hand -->\n<svg/>",
    "GIF": corpus.encode(Image.fromarray(PICTURE), "GIF"),
    "Targa": corpus.encode(Image.fromarray(PICTURE), "TGA"),
    "PCX": corpus.encode(Image.fromarray(PICTURE), "PCX"),
    "SGI": corpus.encode(Image.fromarray(PICTURE), "SGI"),
    "video": b"RIFF\0\1\0\0AVI LIST",
    "PDF": b"%PDF-1.7\n",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n",
}
NO_IMAGE = {
    "text": b"P1 is the first patient. See report.",
    "notes": b"type: MRI\nname: x\n",
    "HTML": b"<!DOCTYPE html><html><body>404 <svg></svg></body></html>",
    "XML": b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
    "JSON": b'{"shape": [5, 72, 96]}',
    "ZIP": b"PK\3\4" + bytes(26) + b"scans/0.jpg",
    "program": b"\x7fELF\2\1\1",
    "zeros": bytes(4096),
    "Parquet": b"PAR1\x15\4\x15",
}


@pytest.mark.parametrize("number", COMPRESSIONS)
def test_a_tiff_of_a_compression_that_is_not_read_is_refused_by_its_name(number: int) -> None:
    data = corpus.tiff_of(SHAPE, {258: [8], 259: [number], 262: [1]}, [bytes(100)], order="<")
    assert outcome(data).startswith("unsupported: ")
    assert COMPRESSIONS[number] in outcome(data)
    with pytest.raises(ScanRejected, match=COMPRESSIONS[number]):
        examine(data)


@pytest.mark.parametrize("name", UNREAD)
def test_a_kind_that_is_not_read_is_refused_by_its_name(name: str) -> None:
    found = outcome(UNREAD[name])
    assert found.startswith("unsupported: ")
    assert name.split(maxsplit=1)[0] in found


@pytest.mark.parametrize("moving", [False, True])
def test_of_a_gif_the_pictures_are_counted_however_it_was_written(moving: bool) -> None:
    for shared in (PICTURE, np.where(PICTURE > 90, PICTURE, 0)):  # with colours of its own, or as a difference
        others = [Image.fromarray(255 - PICTURE), Image.fromarray(shared)] if moving else []
        said = outcome(corpus.encode(Image.fromarray(PICTURE), "GIF", save_all=moving, append_images=others))
        assert said == ("animated: a GIF of 3 frames" if moving else "unsupported: a GIF: convert it to PNG")


@pytest.mark.parametrize("name", NO_IMAGE)
def test_what_is_no_picture_is_not_called_one(name: str) -> None:
    assert outcome(NO_IMAGE[name]).startswith("not_an_image: ")


# ---- transparency


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_transparent_gray_level_is_black_at_every_depth(bits: int) -> None:
    most = 2**bits - 1
    levels = np.rint(PICTURE / 255 * most).astype(np.uint16)
    rows = np.packbits((levels[..., None] >> np.arange(bits)[::-1] & 1).astype(np.uint8).reshape(SHAPE[0], -1), axis=1)
    header = struct.pack(">IIBBBBB", SHAPE[1], SHAPE[0], bits, 0, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    for transparent in {most, most // 2, int(levels[26, 34])}:
        chunks = [(b"IHDR", header), (b"tRNS", struct.pack(">H", transparent)), (b"IDAT", body), (b"IEND", b"")]
        frame = decode(corpus.png_of(chunks)).frames[0]
        white = np.iinfo(frame.dtype).max
        np.testing.assert_array_equal(frame, np.where(levels == transparent, 0, levels * (white // most)))


def bmp_of(colours: np.ndarray) -> bytes:
    """Return a BMP with the header of version 5, which may have alpha, of uint8 [height, width, 4]: B, G, R, alpha."""
    height, width = colours.shape[:2]
    masks = (0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    header = struct.pack("<IiiHHIIiiII4I68x", 124, width, height, 1, 32, 3, colours.size, 0, 0, 0, 0, *masks)
    return struct.pack("<2sIII", b"BM", 138 + colours.size, 0, 138) + header + colours[::-1].tobytes()


def test_a_fourth_band_of_zeros_is_alpha_only_where_the_file_says_so() -> None:
    clear = np.dstack([PICTURE] * 3 + [np.zeros_like(PICTURE)])
    half = np.dstack([PICTURE] * 3 + [np.where(PICTURE > 99, 255, 0).astype(np.uint8)])
    tags = {258: [8] * 4, 262: [2], 277: [4]}
    np.testing.assert_array_equal(decode(bmp_of(clear)).frames[0], PICTURE)
    np.testing.assert_array_equal(decode(bmp_of(half)).frames[0], np.where(PICTURE > 99, PICTURE, 0))
    undeclared = corpus.tiff_of(SHAPE, tags, [clear.tobytes()], order="<")
    np.testing.assert_array_equal(decode(undeclared).frames[0], PICTURE)
    declared = corpus.tiff_of(SHAPE, tags | {338: [2]}, [clear.tobytes()], order="<")
    assert not decode(declared).frames[0].any()
    assert not decode(corpus.encode(clear, "PNG")).frames[0].any()


# ---- decoders that are lenient


def strips_of(compression: int, change: Callable[[list[bytes]], list[bytes]]) -> bytes:
    """Return a TIFF of the picture in 4 strips, after a change to them."""
    strips = [PACKERS[compression](part.tobytes()) for part in np.split(PICTURE, 4)]
    rows = SHAPE[0] // 4
    return corpus.tiff_of(SHAPE, {258: [8], 259: [compression], 262: [1], 278: [rows]}, change(strips), order="<")


@pytest.mark.parametrize("compression", PACKERS)
def test_strips_that_are_missing_or_short_are_refused(compression: int) -> None:
    np.testing.assert_array_equal(decode(strips_of(compression, lambda strips: strips)).frames[0], PICTURE)
    for change in (
        lambda strips: strips[:3],
        lambda strips: [*strips[:3], strips[3][: len(strips[3]) // 2]],
        lambda strips: [strips[0][: len(strips[0]) // 2], *strips[1:]],
        lambda strips: [*strips[:2], b"", strips[3]],
    ):
        assert outcome(strips_of(compression, change)).startswith(("truncated: ", "decode_failed: "))


@pytest.mark.parametrize("compression", PACKERS)
def test_tiles_that_are_missing_are_refused(compression: int) -> None:
    padded = np.pad(PICTURE, ((0, 56), (0, 32)))
    tiles = [padded[y : y + 64, x : x + 64] for y in (0, 64) for x in (0, 64)]
    packed = [PACKERS[compression](tile.tobytes()) for tile in tiles]
    for kept in (4, 3, 2):
        offsets = [8 + sum(map(len, packed[:number])) for number in range(kept)]
        tags = {322: [64], 323: [64], 324: offsets, 325: [len(tile) for tile in packed[:kept]]}
        data = corpus.tiff_of(SHAPE, {258: [8], 259: [compression], 262: [1]} | tags, packed[:kept], order="<")
        if kept == 4:
            np.testing.assert_array_equal(decode(data).frames[0], PICTURE)
        else:
            assert outcome(data).startswith("truncated: a TIFF that has not all 4"), kept


def short_png(whole: bytes, share: float) -> bytes:
    """Return a PNG with right checksums and that share of the stream of pixels of a whole one."""
    chunks, at = [], 8
    while at < len(whole):
        end = at + 8 + int.from_bytes(whole[at : at + 4], "big")
        chunks.append((whole[at + 4 : at + 8], whole[at + 8 : end]))
        at = end + 4
    stream = zlib.decompress(b"".join(body for name, body in chunks if name == b"IDAT"))
    pixels = (b"IDAT", zlib.compress(stream[: int(len(stream) * share)]))
    return corpus.png_of([chunk for chunk in chunks[:-1] if chunk[0] != b"IDAT"] + [pixels, chunks[-1]])


@pytest.mark.parametrize("name", [name for name in corpus.good_scans() if name.startswith("png_")])
def test_a_png_without_its_last_rows_is_refused(name: str) -> None:
    whole = corpus.good_scans()[name]
    np.testing.assert_array_equal(decode(short_png(whole, 1)).frames[0], decode(whole).frames[0])
    for share in (0.999, 0.9, 0.6, 0.2):
        assert outcome(short_png(whole, share)).startswith(("truncated: ", "decode_failed: ")), share


@pytest.mark.parametrize("level", [0, 0x55, 255])
def test_a_png_of_one_level_is_whole(level: int) -> None:
    levels = np.full_like(PICTURE, level)
    np.testing.assert_array_equal(decode(corpus.encode(levels, "PNG")).frames[0], levels)
    np.testing.assert_array_equal(decode(corpus.encode(levels > 0, "PNG")).frames[0], (levels > 0) * 255)


def test_deflated_strips_are_checked_to_their_last_byte() -> None:
    def flip(strips: list[bytes]) -> list[bytes]:
        return [strips[0][:-1] + bytes([strips[0][-1] ^ 1]), *strips[1:]]

    assert outcome(strips_of(8, flip)).startswith("decode_failed: ")


def test_no_setting_of_pillow_makes_decoding_lenient(monkeypatch: pytest.MonkeyPatch) -> None:
    good = corpus.good_scans()
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for name in ("png_gray", "png_interlaced", "tiff_gray", "tiff_rgb_lzw", "bmp_gray", "bmp_rgb", "webp_lossy"):
        for share in (0.5, 0.9):
            assert outcome(good[name][: int(len(good[name]) * share)]).startswith("truncated: "), (name, share)
    assert outcome(strips_of(1, lambda strips: strips[:3])).startswith("truncated: ")
