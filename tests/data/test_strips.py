"""Strips of a TIFF that were decoded to check them are not decoded again, and give the pixels that libtiff gives."""

from __future__ import annotations

import io
import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import pytest
import simplejpeg
from PIL import Image, TiffImagePlugin

from btray.data.scans import ScanRejected, decode, tiff
from btray.phantoms import phantom
from tests.helpers import scan_corpus as corpus

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")

PICTURE = phantom("glioma", 3, size=(90, 117))
SHAPE = PICTURE.shape


@contextmanager
def by_libtiff() -> Iterator[None]:
    """Decode every page by libtiff after a check of its own, as is done with strips that are not simple."""
    with patch.object(tiff, "_decode_strips", lambda *_: None):
        yield


@contextmanager
def without_libtiff() -> Iterator[None]:
    with patch.object(TiffImagePlugin.TiffImageFile, "_load_libtiff", side_effect=AssertionError("decoded again")):
        yield


def deflated(
    pixels: np.ndarray, *, order: str = "<", rows: int = 20, predicted: bool = False, **tags: list[int]
) -> bytes:
    """Return a TIFF of Deflate strips of `rows` rows; `pixels` are [height, width, samples]."""
    height, width, samples = pixels.shape
    strips = []
    for start in range(0, height, rows):
        part = pixels[start : start + rows].copy()
        if predicted:
            part[:, 1:] -= pixels[start : start + rows, :-1]
        strips.append(zlib.compress(part.astype(part.dtype.newbyteorder(order)).tobytes()))
    fixed = {258: [8 * pixels.itemsize] * samples, 259: [8], 277: [samples], 278: [rows], 317: [1 + predicted]}
    data = {int(tag.removeprefix("tag")): value for tag, value in tags.items()}
    return corpus.tiff_of((height, width), fixed | data, strips, order=order)


def saved(image: Image.Image, compression: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "TIFF", compression=compression, **options)
    return buffer.getvalue()


def jpeg_strips(pixels: np.ndarray, sampling: str, factors: list[int]) -> bytes:
    """Return a TIFF of JPEG strips of 32 rows, in colours sampled so."""
    strips = [
        simplejpeg.encode_jpeg(np.ascontiguousarray(pixels[start : start + 32]), 85, "RGB", sampling)
        for start in range(0, len(pixels), 32)
    ]
    tags = {258: [8] * 3, 259: [7], 262: [6], 277: [3], 278: [32], 530: factors}
    return corpus.tiff_of(pixels.shape, tags, strips, order="<")


GRAY = Image.fromarray(PICTURE)
COLOURS = Image.fromarray(np.dstack([PICTURE, PICTURE[::-1], 255 - PICTURE]))
PAGES = [GRAY, Image.fromarray(255 - PICTURE), GRAY]
SIMPLE = {
    **{
        f"{kind}_{order}_{'predicted' if predicted else 'plain'}_{rows}": deflated(
            (PICTURE.astype(np.int64) * factor).astype(kind)[..., None],
            order=order, predicted=predicted, rows=rows, tag262=[1], tag339=[{"u": 1, "i": 2}[kind[0]]],
        )
        for kind, factor in (("u1", 1), ("u2", 257), ("i2", 100), ("i4", 70_001))
        for order in "<>" for predicted in (False, True) for rows in (20, SHAPE[0])
    },
    "white_is_zero": deflated(PICTURE[..., None], tag262=[0]),
    "white_is_zero_16": deflated((PICTURE.astype(np.uint16) * 257)[..., None], tag262=[0], predicted=True),
    "rgb": deflated(np.dstack([PICTURE, PICTURE[::-1], PICTURE // 2]), predicted=True, tag262=[2]),
    "rgba": deflated(np.dstack([PICTURE] * 3 + [PICTURE[::-1]]), tag262=[2], tag338=[2]),
    "turned": saved(GRAY, "tiff_adobe_deflate", tiffinfo={274: 6}),
    "bilevel": saved(GRAY.convert("1"), "tiff_adobe_deflate"),
    "palette": saved(GRAY.convert("RGB").quantize(16), "tiff_adobe_deflate"),
    "cmyk": saved(GRAY.convert("CMYK"), "tiff_adobe_deflate"),
    "float": saved(Image.fromarray(PICTURE.astype(np.float32) / 7), "tiff_adobe_deflate"),
    "old_number": saved(GRAY, "tiff_deflate"),
    "pages": saved(PAGES[0], "tiff_adobe_deflate", save_all=True, append_images=PAGES[1:]),
    "big": saved(GRAY, "tiff_adobe_deflate", big_tiff=True),
    "jpeg": saved(GRAY, "jpeg", quality=90),
    "jpeg_strips": saved(GRAY, "jpeg", quality=90, tiffinfo={278: 16}),
    "jpeg_white_is_zero": saved(GRAY, "jpeg", quality=90, tiffinfo={262: 0}),
    "jpeg_turned": saved(GRAY, "jpeg", quality=75, tiffinfo={274: 8}),
    "jpeg_colours": saved(COLOURS, "jpeg", quality=85),
    "jpeg_colours_strips": saved(COLOURS, "jpeg", quality=85, tiffinfo={278: 16}),
    **{
        f"jpeg_colours_{sampling}": jpeg_strips(np.asarray(COLOURS), sampling, factors)
        for sampling, factors in (("444", [1, 1]), ("422", [2, 1]), ("420", [2, 2]), ("440", [1, 2]), ("411", [4, 1]))
    },
}  # fmt: skip
OTHERS = {
    "jpeg_cmyk": saved(GRAY.convert("CMYK"), "jpeg"),
    "rgb_16": deflated(np.dstack([PICTURE.astype(np.uint16) * 257] * 3), tag262=[2]),
    "planes": deflated(np.concatenate([PICTURE] * 3)[..., None], tag262=[2], tag277=[3], tag258=[8] * 3, tag284=[2],
                       tag257=[SHAPE[0]], rows=SHAPE[0]),
}  # fmt: skip


@pytest.mark.parametrize("name", [*SIMPLE, *OTHERS])
def test_strips_give_the_pixels_that_libtiff_gives(name: str) -> None:
    data = {**SIMPLE, **OTHERS}[name]
    with by_libtiff():
        expected = decode(data).frames
    found = decode(data).frames
    assert [frame.dtype for frame in found] == [frame.dtype for frame in expected]
    assert all(map(np.array_equal, found, expected)), name
    assert len(found) == len(expected)


@pytest.mark.parametrize("name", SIMPLE)
def test_no_strip_is_decoded_twice(name: str) -> None:
    with without_libtiff():
        decode(SIMPLE[name])


def frames_of(data: bytes) -> list[np.ndarray]:
    try:
        return decode(data).frames
    except ScanRejected:
        return []


@pytest.mark.parametrize(
    "name", ["u1_<_plain_20", "u2_>_predicted_90", "rgb", "palette", "pages", "jpeg", "jpeg_strips"]
)
def test_no_damage_that_is_seen_is_read_if_it_is_found_when_strips_are_checked_apart(name: str) -> None:
    whole, rng = SIMPLE[name], random.Random(5)
    pictures = decode(whole).frames
    refused = 0
    for number in range(60):
        at, size = rng.randrange(8, len(whole) - 8), rng.choice((1, 2, 16, 200))
        damaged = (
            whole[:at] + bytes(min(size, len(whole) - at)) + whole[at + size :],
            whole[:at] + whole[at + size :],
            whole[:at],
            whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :],
        )[number % 4]
        with by_libtiff():
            expected = frames_of(damaged)
        found = frames_of(damaged)
        refused += not found
        if expected or not found:
            assert all(map(np.array_equal, found, expected))
        else:  # a gray JPEG is looked at twice only if damage shows in it, as in a file of its own
            assert name.startswith("jpeg")
            assert all((np.abs(frame.astype(int) - picture) > 24).mean() <= 0.05
                       for frame, picture in zip(found, pictures, strict=True))  # fmt: skip
    assert refused > 20


def test_a_strip_that_is_longer_than_its_rows_gives_what_libtiff_gives() -> None:
    strips = [zlib.compress(PICTURE[:50].tobytes() + bytes(30)), zlib.compress(PICTURE[50:].tobytes())]
    tags = {258: [8], 259: [8], 262: [1], 278: [50]}
    np.testing.assert_array_equal(decode(corpus.tiff_of(SHAPE, tags, strips, order="<")).frames[0], PICTURE)
