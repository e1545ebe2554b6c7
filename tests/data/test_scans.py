"""`btray.data.scans` promises: the same gray for every encoding of a picture, and one code for whatever is none."""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from btray.data.scans import REJECTION_CODES, Scan, ScanLimits, ScanRejected, decode
from tests.helpers import scan_corpus as corpus

# Pillow warns of metadata that it skips; that cannot be silenced for one thread alone, so `decode` lets it be.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")

GOOD, BAD = corpus.good_scans(), corpus.bad_scans()
SMALL = ScanLimits(max_bytes=2**20, max_pixels=200_000, max_volume_pixels=200_000, min_side=16)
FUZZ = settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def rejection(data: bytes, **options: object) -> ScanRejected:
    with pytest.raises(ScanRejected) as caught:
        decode(data, **options)  # type: ignore[arg-type]
    return caught.value


def attempt(data: bytes, **options: object) -> Scan | ScanRejected:
    try:
        return decode(data, **options)  # type: ignore[arg-type]
    except ScanRejected as error:
        return error


def assert_sound(scan: Scan, limits: ScanLimits) -> None:
    assert scan.frames
    assert sum(frame.size for frame in scan.frames) <= limits.max_pixels
    for frame in scan.frames:
        assert frame.ndim == 2
        assert frame.dtype in (np.uint8, np.uint16)
        assert frame.dtype.isnative
        assert frame.flags.c_contiguous
        assert frame.flags.writeable
        assert min(frame.shape) >= limits.min_side


@pytest.mark.parametrize("name", GOOD)
def test_every_encoding_of_the_picture_gives_the_picture(name: str) -> None:
    scan = decode(GOOD[name])
    assert_sound(scan, ScanLimits())
    wanted = corpus.expected(name)
    assert len(scan.frames) == len(wanted)
    deep = any(word in name for word in ("16bit", "stretched", "32bit"))
    lossy = any(word in name for word in ("jpeg", "lossy"))
    tolerance = corpus.LOSSY_TOLERANCE if lossy else 1 / 65535 if deep else 1 / 255
    for frame, want in zip(scan.frames, wanted, strict=True):
        assert frame.dtype == (np.uint16 if deep else np.uint8)
        assert frame.shape == want.shape
        assert np.abs(frame / np.iinfo(frame.dtype).max - want).max() <= tolerance + 1e-9


@pytest.mark.parametrize("name", BAD)
def test_every_bad_input_has_its_code_and_one_line_about_it(name: str) -> None:
    data, code = BAD[name]
    error = rejection(data)
    assert error.code == code
    assert str(error)
    assert "\n" not in str(error)
    assert not error.retryable


def test_the_corpus_of_bad_scans_covers_every_code_of_decoding() -> None:
    assert {code for _, code in BAD.values()} | {"too_large", "not_selected"} == set(REJECTION_CODES)
    assert all(text and "\n" not in text for text in REJECTION_CODES.values())


def test_the_low_byte_of_16_bit_pixels_survives_in_every_layout() -> None:
    for name in (name for name in GOOD if "16bit" in name):
        np.testing.assert_array_equal(decode(GOOD[name]).frames[0], corpus.picture16(), err_msg=name)


def test_colour_of_16_bit_becomes_the_luma_that_8_bit_has() -> None:
    bands = np.random.default_rng(3).integers(0, 256, (40, 50, 3)).astype(np.uint16) * 257
    deep = decode(corpus.write_png(bands, colour_type=2, bits=16)).frames[0]
    shallow = decode(corpus.write_png(bands // 257, colour_type=2)).frames[0]
    assert np.abs(deep / 257 - shallow).max() <= 0.51


def test_pages_of_a_tiff_that_are_thumbnails_of_another_are_no_frames() -> None:
    page = Image.fromarray(corpus.picture())
    data = corpus.encode(page, "TIFF", save_all=True, append_images=[page, page], tiffinfo={254: 1})
    assert len(decode(data).frames) == 1


@pytest.mark.parametrize("min_side", [1, 16, 24, 36, 37, 72, 73, 500])
def test_a_hint_never_takes_the_shorter_side_below_it_nor_changes_the_picture(min_side: int) -> None:
    for name in ("jpeg_rgb", "jpeg_gray", "jpeg_cmyk", "jpeg_exif_6"):
        frame = decode(GOOD[name], min_side=min_side).frames[0]
        assert min(frame.shape) >= min(min_side, corpus.HEIGHT)
        factor = round(corpus.HEIGHT / frame.shape[0])
        want = corpus.picture().reshape(corpus.HEIGHT // factor, factor, corpus.WIDTH // factor, factor).mean((1, 3))
        assert np.abs(frame - want).mean() < 4


def test_a_hint_reduces_as_far_as_it_may() -> None:
    assert decode(GOOD["jpeg_rgb"], min_side=36).frames[0].shape == (36, 48)
    assert decode(GOOD["jpeg_exif_8"], min_side=18).frames[0].shape == (18, 24)
    assert decode(GOOD["png_gray"], min_side=18).frames[0].shape == (72, 96)


def test_limits_hold_for_bytes_pixels_and_sides() -> None:
    data = GOOD["png_gray"]
    pixels = corpus.picture().size
    assert rejection(data, limits=ScanLimits(max_bytes=len(data) - 1)).code == "too_large"
    assert rejection(data, limits=ScanLimits(max_pixels=pixels - 1)).code == "bomb"
    assert rejection(data, limits=ScanLimits(min_side=73)).code == "too_small"
    assert decode(data, limits=ScanLimits(max_bytes=len(data), max_pixels=pixels, min_side=72))
    assert rejection(GOOD["jpeg_rgb"], min_side=16, limits=ScanLimits(max_pixels=pixels - 1)).code == "bomb"


def test_the_pages_of_a_tiff_share_one_limit_of_pixels() -> None:
    pixels = corpus.picture().size
    assert len(decode(GOOD["tiff_pages"], limits=ScanLimits(max_pixels=3 * pixels)).frames) == 3
    assert rejection(GOOD["tiff_pages"], limits=ScanLimits(max_pixels=3 * pixels - 1)).code == "bomb"


def test_bombs_are_refused_before_their_memory_is_taken() -> None:
    bombs = [data for data, code in BAD.values() if code == "bomb"]
    # a process of its own: Pillow's memory is not Python's, and only a fresh peak tells what the bombs took
    child = """
import pickle, re, sys
from btray.data.scans import ScanRejected, decode
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
bombs = pickle.load(sys.stdin.buffer)
before = peak()
for data in bombs:
    try: decode(data)
    except ScanRejected as error: assert error.code == "bomb"
    else: sys.exit("decoded")
print(peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", child], input=pickle.dumps(bombs), capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    assert int(done.stdout) < 64 * 1024  # KiB


def test_pixels_behind_the_last_row_are_neither_unpacked_nor_seen() -> None:
    rows = b"".join(b"\0" + row.tobytes() for row in corpus.picture())
    header = GOOD["png_interlaced"][16:28] + b"\0"
    idat = zlib.compress(rows + bytes(64 * 2**20), 9)
    data = corpus.png_of([(b"IHDR", header), (b"IDAT", idat), (b"IEND", b"")])
    np.testing.assert_array_equal(decode(data).frames[0], corpus.picture())


@pytest.mark.parametrize(
    "name",
    ["jpeg_gray", "jpeg_progressive", "png_16bit", "png_interlaced", "tiff_rgb_lzw", "tiff_pages_lzw", "bmp_1bit"],
)
def test_a_file_cut_anywhere_gives_the_whole_picture_or_the_code(name: str) -> None:
    data, whole = GOOD[name], decode(GOOD[name]).frames
    for end in {*range(40, len(data), max(1, len(data) // 250)), *range(len(data) - 40, len(data))}:
        found = attempt(data[:end])
        if isinstance(found, ScanRejected):
            assert found.code == "truncated", end
        else:
            assert len(found.frames) == len(whole), end
            assert all(np.array_equal(one, other) for one, other in zip(found.frames, whole, strict=True)), end


@FUZZ
@given(data=st.binary(max_size=2000))
def test_random_bytes_are_refused_with_a_code(data: bytes) -> None:
    assert rejection(data, limits=SMALL).code in REJECTION_CODES


@FUZZ
@given(
    name=st.sampled_from(sorted(GOOD)),
    changes=st.lists(st.tuples(st.integers(0, 2**31), st.integers(0, 255)), min_size=1, max_size=12),
    near_start=st.booleans(),
    kept=st.one_of(st.just(1.0), st.floats(0, 1)),
    min_side=st.sampled_from([None, 1, 20, 64]),
)
def test_damaged_files_give_sound_frames_or_a_code(
    name: str, changes: list[tuple[int, int]], near_start: bool, kept: float, min_side: int | None
) -> None:
    data = bytearray(GOOD[name])
    reach = min(400, len(data)) if near_start else len(data)
    for place, value in changes:
        data[place % reach] = value
    found = attempt(bytes(data[: round(len(data) * kept)]), min_side=min_side, limits=SMALL)
    if isinstance(found, ScanRejected):
        assert found.code in set(REJECTION_CODES)
        assert "\n" not in str(found)
    else:
        assert_sound(found, ScanLimits(max_pixels=SMALL.max_pixels, min_side=min(16, min_side or 16)))


def test_threads_get_what_one_caller_gets() -> None:
    names = sorted(GOOD) * 3
    with ThreadPoolExecutor(8) as pool:
        for name, scan in zip(names, pool.map(lambda name: decode(GOOD[name]), names), strict=True):
            for frame, alone in zip(scan.frames, decode(GOOD[name]).frames, strict=True):
                np.testing.assert_array_equal(frame, alone)


def test_decoding_changes_nothing_for_the_rest_of_the_process() -> None:
    def state() -> tuple[object, ...]:
        return Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters), set(Image.OPEN)

    before = state()
    for data in [*GOOD.values(), *(data for data, _ in BAD.values())]:
        attempt(data)
    assert state() == before


def test_large_headers_raise_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for data in (data for data, code in BAD.values() if code == "bomb"):
            assert rejection(data).code == "bomb"


def test_a_rejection_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(rejection(b"")))
    assert (error.code, str(error), error.retryable) == ("empty", "the object has no bytes", False)


def test_a_hint_below_one_is_the_callers_mistake() -> None:
    with pytest.raises(ValueError, match="min_side must be at least 1, not 0"):
        decode(GOOD["jpeg_gray"], min_side=0)


def test_the_corpus_is_the_same_on_every_run() -> None:
    again = {**corpus._jpegs(), **corpus._pngs(), **corpus._tiffs(), **corpus._others(), **corpus._volumes()}
    again |= corpus._dicom()
    assert again == GOOD
    assert sys.getsizeof(GOOD) < 2**20


@pytest.mark.realdata
@pytest.mark.parametrize("min_side", [None, 160])
def test_real_slices_are_what_bare_pillow_makes_of_them(real_data: Path, min_side: int | None) -> None:
    for path in sorted(real_data.rglob("*.jpg"))[::40]:
        bare = Image.open(path)
        bare.draft("L", (min_side, min_side) if min_side else None)
        np.testing.assert_array_equal(decode(path.read_bytes(), min_side=min_side).frames[0], np.asarray(bare))
