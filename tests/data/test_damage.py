"""Damaged pictures are rejected, whole ones are not: the share is counted over pictures, formats and accidents."""

from __future__ import annotations

import io
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from btray.data.config import PreprocessConfig
from btray.data.preprocess import decode_side
from btray.data.scans import ScanRejected, decode
from btray.data.scans.gray import to_gray
from btray.data.scans.jpeg import check_jpeg
from btray.phantoms import encoded_phantom, phantom
from tests.helpers import scan_corpus as corpus
from tests.helpers.damage import KINDS, PROMISED, damage, tally, whole_phantoms, whole_slices
from tests.helpers.debian import install
from tests.helpers.jpeg_stream import fault_of, sampled

# Pillow, which shows what a lenient reader sees, warns of metadata that it skips.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")

LEAST = 0.99
JPEGS = {name: data for name, data in corpus.good_scans().items() if name.startswith("jpeg")}
# Each format whole, and JPEG also at the scale at which slices are decoded for frames.
DECODED: list[tuple[str, int | None]] = [
    *((name, None) for name in PROMISED),
    ("JPEG", decode_side(PreprocessConfig(size=160))),
]
CASES = Path(__file__).resolve().parents[2].parent / "shared" / "cases" / "images"


@pytest.mark.parametrize(("file_format", "min_side"), DECODED)
def test_damage_that_is_seen_is_rejected_and_whole_phantoms_are_not(file_format: str, min_side: int | None) -> None:
    counted = tally(list(whole_phantoms(file_format, 8)), file_format, 16, random.Random(1), min_side)
    assert counted.share_rejected(PROMISED[file_format], valid_count=False) >= LEAST, f"\n{counted}"


@pytest.mark.realdata
@pytest.mark.parametrize(("file_format", "min_side"), DECODED)
def test_damage_that_is_seen_is_rejected_and_whole_slices_are_not(
    file_format: str, min_side: int | None, real_data: Path
) -> None:
    counted = tally(list(whole_slices(file_format, real_data.parent, 8)), file_format, 16, random.Random(1), min_side)
    assert counted.share_rejected(PROMISED[file_format], valid_count=False) >= LEAST, f"\n{counted}"


@pytest.mark.soak
@pytest.mark.realdata
@pytest.mark.parametrize(("file_format", "min_side"), DECODED)
@pytest.mark.parametrize("source", ["phantoms", "slices"])
def test_of_2000_damaged_pictures_99_percent_are_rejected(
    source: str, file_format: str, min_side: int | None, real_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    count, each = 125, 16
    wholes = whole_phantoms(file_format, count)
    if source == "slices":
        wholes = whole_slices(file_format, real_data.parent, count)
    counted = tally(list(wholes), file_format, each, random.Random(2), min_side)
    promised = PROMISED[file_format]
    shares = [counted.share_rejected(promised, valid_count=valid_count) for valid_count in (False, True)]
    with capsys.disabled():
        print(f"\n{file_format}, {source}: of {', '.join(promised)} that are seen {shares[0]:.2%} rejected", end="")
        print(f"; {shares[1]:.2%} if files that are valid count as missed\n{counted}")
    assert shares[0] >= LEAST


@pytest.mark.parametrize("name", JPEGS)
def test_a_whole_jpeg_is_what_pillow_makes_of_it_at_every_scale(name: str) -> None:
    for min_side in (None, 9, 18, 36, 37, 72, 500):
        bare = Image.open(io.BytesIO(JPEGS[name]))
        bare.draft("L", (min_side, min_side) if min_side else None)
        ImageOps.exif_transpose(bare, in_place=True)
        np.testing.assert_array_equal(decode(JPEGS[name], min_side=min_side).frames[0], to_gray(bare), str(min_side))


@pytest.mark.parametrize("options", [{"subsampling": 1}, {"subsampling": 2}, {"optimize": True}, {"quality": 100}])
def test_a_jpeg_of_any_options_is_what_pillow_makes_of_it(options: dict[str, int]) -> None:
    for size in ((16, 16), (17, 33), (203, 97)):
        data = corpus.encode(Image.fromarray(phantom("glioma", 1, size=size)).convert("RGB"), "JPEG", **options)
        check_jpeg(data)
        bare = Image.open(io.BytesIO(data))
        bare.draft("L", None)
        np.testing.assert_array_equal(decode(data).frames[0], np.asarray(bare))


def _at_scan(data: bytes, change: Callable[[bytes], bytes]) -> bytes:
    at = data.index(b"\xff\xda")
    end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return data[:at] + change(data[at:end]) + data[end:]


def _before_tables(data: bytes, segment: bytes) -> bytes:
    return data[:20] + segment + data[20:]


@pytest.mark.parametrize(
    "changed",
    [
        lambda data: data[:11] + b"\2" + data[12:],  # JFIF 2
        lambda data: _before_tables(data, b"\xff\xff\xff"),
        lambda data: _before_tables(data, b"\xff\xdd\0\4\0\0"),
        lambda data: _before_tables(data, b"\xff\xe2\0\x20ICC_PROFILE\0\2\5" + bytes(16)),
        lambda data: _before_tables(data, b"\xff\xe0\0\x10JFXX\0\x10" + bytes(8)),
        lambda data: _at_scan(data, lambda scan: scan[:-3] + b"\1\2\3"),
        lambda data: data[:-2] + b"\xff\xff" + data[-2:],
        lambda data: data + data,
        lambda data: data + b"\xff\xd9" + bytes(1000),
    ],
)
@pytest.mark.parametrize("name", ["jpeg_gray", "jpeg_rgb"])
def test_oddities_of_encoders_that_change_no_pixel_are_no_damage(name: str, changed: Callable[[bytes], bytes]) -> None:
    odd = changed(JPEGS[name])
    assert odd != JPEGS[name]
    check_jpeg(odd)
    np.testing.assert_array_equal(decode(odd).frames[0], decode(JPEGS[name]).frames[0])


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"quality": 99}])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_every_kind_of_jpeg_is_read_strictly(kind: str, options: dict[str, int], mode: str) -> None:
    image = Image.fromarray(phantom("meningioma", 5, size=256)).convert("RGB").convert(mode)
    whole = corpus.encode(image, "JPEG", **options)
    picture, rng = decode(whole).frames[0].astype(int), random.Random(3)
    for _ in range(12):
        damaged = damage(whole, "JPEG", kind, rng)
        bare = Image.open(io.BytesIO(damaged))
        bare.draft("L", None)
        try:
            shown = np.abs(to_gray(bare).astype(int) - picture)
        except OSError:
            continue
        if (shown > 24).mean() <= 0.05:
            continue
        if mode != "CMYK" and "progressive" not in options and fault_of(damaged) is None:
            continue
        with pytest.raises(ScanRejected) as caught:
            decode(damaged)
        assert caught.value.code in ("truncated", "decode_failed")


# Across and down, of each component; TurboJPEG knows none of them.
RARE_FACTORS = {
    "410": [(4, 2), (1, 1), (1, 1)],
    "mixed": [(2, 2), (2, 1), (1, 1)],
    "three": [(3, 1), (1, 1), (1, 1)],
    "luma_halved": [(1, 1), (2, 1), (2, 2)],
    "four": [(2, 1), (1, 1), (1, 2), (2, 1)],
}


@pytest.mark.parametrize("interval", [0, 5])
@pytest.mark.parametrize("factors", RARE_FACTORS.values(), ids=RARE_FACTORS)
def test_a_jpeg_of_rare_sampling_is_what_pillow_makes_of_it_and_none_that_is_damaged_is_read(
    factors: list[tuple[int, int]], interval: int
) -> None:
    image = Image.fromarray(phantom("glioma", 4, size=(90, 67))).convert("RGB").convert("YCbCr")
    planes = [np.asarray(band) for band in image.split()]
    whole = sampled([*planes, planes[0]][: len(factors)], factors, interval)
    assert fault_of(whole) is None
    for min_side in (None, 40):
        bare = Image.open(io.BytesIO(whole))
        bare.draft("L", (min_side, min_side) if min_side else None)
        np.testing.assert_array_equal(decode(whole, min_side=min_side).frames[0], to_gray(bare))
    rng, tried = random.Random(7), 0
    for kind in KINDS:
        for _ in range(8):
            damaged = damage(whole, "JPEG", kind, rng)
            if fault_of(damaged) is not None:
                tried += 1
                with pytest.raises(ScanRejected) as caught:
                    decode(damaged)
                assert caught.value.code in ("truncated", "decode_failed")
    assert tried > 16


@pytest.mark.parametrize("factors", RARE_FACTORS.values(), ids=RARE_FACTORS)
def test_a_progressive_jpeg_of_rare_sampling_is_read_if_it_is_whole_and_refused_if_damage_shows(
    factors: list[tuple[int, int]],
) -> None:
    if not install("libjpeg-turbo-progs", "jpegtran"):
        pytest.skip("jpegtran cannot be installed: progressive JPEG of rare samplings is NOT tried")
    image = Image.fromarray(phantom("glioma", 4, size=(90, 67))).convert("RGB").convert("YCbCr")
    planes = [np.asarray(band) for band in image.split()]
    sequential = sampled([*planes, planes[0]][: len(factors)], factors, 5)
    whole = subprocess.run(["jpegtran", "-progressive"], input=sequential, capture_output=True, check=True).stdout
    picture = decode(sequential).frames[0].astype(int)
    np.testing.assert_array_equal(decode(whole).frames[0], picture)
    rng, tried = random.Random(11), 0
    for kind in KINDS:
        for _ in range(12):
            damaged = damage(whole, "JPEG", kind, rng)
            try:
                shown = np.abs(to_gray(Image.open(io.BytesIO(damaged))).astype(int) - picture)
            except OSError:
                continue
            if (shown > 24).mean() > 0.05:
                tried += 1
                with pytest.raises(ScanRejected) as caught:
                    decode(damaged)
                assert caught.value.code in ("truncated", "decode_failed")
    assert tried > 4


def test_strips_of_a_tiff_are_checked_with_the_tables_that_it_keeps_apart() -> None:
    data = corpus.good_scans()["tiff_jpeg"]
    tags = Image.open(io.BytesIO(data)).tag_v2
    start, length, tables = tags[273][0], tags[279][0], tags[347]
    strip = data[start : start + length]
    check_jpeg(strip, tables)
    with pytest.raises(ValueError, match="Corrupt JPEG data"):
        check_jpeg(strip[: length // 2] + b"\xff\xd9", tables)


@pytest.mark.parametrize("compression", ["tiff_lzw", "group4"])
def test_what_libtiff_finds_wrong_is_a_rejection_and_nothing_is_printed(
    compression: str, capfd: pytest.CaptureFixture[str]
) -> None:
    image = Image.fromarray(phantom("glioma", 1, size=256))
    whole = corpus.encode(image.convert("1") if compression == "group4" else image, "TIFF", compression=compression)
    at = len(whole) // 3
    with pytest.raises(ScanRejected) as caught:
        decode(whole[:at] + b"\xff" * 500 + whole[at + 500 :])
    assert caught.value.code == "decode_failed"
    assert decode(whole).frames[0].shape == (256, 256), "one that is whole, after it"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["jpeg_zero_hole.jpg", "jpeg_cut_with_eoi.jpg"])
def test_the_cases_that_were_called_whole_are_rejected(name: str) -> None:
    if not CASES.is_dir():
        pytest.skip(f"CASES ABSENT: {CASES} does not exist, so {name} is NOT tried")
    with pytest.raises(ScanRejected) as caught:
        decode((CASES / name).read_bytes())
    assert caught.value.code in ("truncated", "decode_failed")


@pytest.mark.parametrize("seed", range(4))
def test_the_oracle_finds_nothing_wrong_with_whole_files(seed: int) -> None:
    assert fault_of(encoded_phantom("glioma", seed)) is None
    rgb = Image.fromarray(phantom("pituitary", seed, size=(90, 111))).convert("RGB")
    for options in ({"subsampling": 2}, {"restart_marker_rows": 1}, {"optimize": True}):
        assert fault_of(corpus.encode(rgb, "JPEG", **options)) is None


def _codes(blocks: str) -> bytes:
    """Return a gray JPEG of 16x8 pixels whose two blocks are these bits; DC steps of 8, codes of T.81's tables."""
    head, at = corpus.encode(np.zeros((8, 16), np.uint8), "JPEG", quality=75), 0
    at = head.index(b"\xff\xda") + 10
    bits = blocks.replace(" ", "")
    bits += "1" * (-len(bits) % 8)
    body = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    return head[:at] + body + b"\xff\xd9"


@pytest.mark.parametrize(
    ("blocks", "fault"),
    [
        # DC of size 0 is 00, of size 7 is 11110, of size 8 is 111110; the end of a block is 1010
        ("00 1010 00 1010", None),
        ("111110 01111110 1010 00 1010", None),  # -129 * 8 is -1032
        ("111110 01111101 1010 00 1010", "range of DC"),
        ("11110 1111111 1010 11110 1000000 1010", "range of DC"),  # 127 + 64
        ("00 1010 11110 11", "end of data"),
        ("00 1010 00 1010 00000000", "bytes after the last block"),
        ("111111111 00000000 1010", "code"),
        ("00 11111111001 11111111001 11111111001 11111111001 1010 00 1010", "more than 64 coefficients"),
    ],
)
def test_the_oracle_names_the_rule_that_a_stream_breaks(blocks: str, fault: str | None) -> None:
    assert fault_of(_codes(blocks)) == fault
