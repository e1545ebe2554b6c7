"""NIfTI: a volume gives the same slices however it is stored, and a code if its header or its pixels are no good."""

from __future__ import annotations

import gzip
import io
import itertools
import math
import random
import struct

import numpy as np
import pytest
from PIL import Image

from btray.data.config import PreprocessConfig
from btray.data.preprocess import make_frame
from btray.data.scans import Scan, ScanLimits, ScanRejected, count_pages, decode, examine
from tests.helpers.nifti_files import TO_RAS, write_nifti

SHAPE = (40, 32, 18)  # columns, rows, slices
VOLUME = np.random.default_rng(3).integers(0, 60_000, SHAPE).astype(np.uint16)
SLICES = [VOLUME[:, :, number].T for number in range(SHAPE[2])]
WAYS = [(axes, flips) for axes in itertools.permutations(range(3)) for flips in itertools.product((1, -1), repeat=3)]
NO_FORM = {"sform_code": 0, "qform_code": 0}


def stored(axes: tuple[int, ...], flips: tuple[int, ...], spacing: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Return the volume with its axes in another order and direction, and the affine that says so."""
    turned = np.transpose(VOLUME, axes)[tuple(slice(None, None, flip) for flip in flips)]
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    for number, (axis, flip) in enumerate(zip(axes, flips, strict=True)):
        affine[axis, number] = flip * spacing
        affine[axis, 3] += spacing * (SHAPE[axis] - 1) if flip < 0 else 0
    return turned, TO_RAS @ affine


def rejection(data: bytes, **limits: int) -> ScanRejected:
    with pytest.raises(ScanRejected) as caught:
        decode(data, limits=ScanLimits(**limits))
    return caught.value


def png16(slice_: np.ndarray) -> bytes:
    body = io.BytesIO()
    Image.fromarray(slice_).save(body, "PNG")
    return body.getvalue()


@pytest.mark.parametrize(("axes", "flips"), WAYS)
def test_the_slices_are_the_same_in_all_48_ways_to_store_them(axes: tuple[int, ...], flips: tuple[int, ...]) -> None:
    scan = decode(write_nifti(*stored(axes, flips, 0.5)))
    np.testing.assert_array_equal(scan.frames, SLICES)
    assert scan.slices is not None
    assert [info.position_mm for info in scan.slices] == pytest.approx([0.5 * number for number in range(18)])
    assert {(info.plane, info.spacing_mm) for info in scan.slices} == {("axial", 0.5)}
    for frame in scan.frames:
        assert frame.dtype == np.uint16
        assert frame.dtype.isnative
        assert frame.flags.c_contiguous
        assert frame.flags.writeable


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("pack", [bytes, lambda data: gzip.compress(data[:999]) + gzip.compress(data[999:]) + bytes(9)])
def test_both_versions_byte_orders_and_gzip_are_read(version: int, order: str, pack) -> None:  # type: ignore[no-untyped-def]
    data = pack(write_nifti(VOLUME, version=version, order=order))
    np.testing.assert_array_equal(decode(data).frames, SLICES)
    assert count_pages(data) == 18
    facts = examine(data)
    assert (facts.format, facts.width, facts.height, facts.colours) == ("NIfTI", 40, 32, None)


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8"])
@pytest.mark.parametrize(("slope", "offset"), [(1, 0), (0, 7), (math.nan, 7), (2, -300), (-1, 100)])
def test_integers_stay_exact_whatever_type_and_scale_they_have(dtype: str, slope: float, offset: float) -> None:
    info = np.iinfo(dtype)
    values = np.clip(VOLUME.astype(np.int64) // 2 - 15_000, max(info.min, -15_000), min(info.max, 15_000)).astype(dtype)
    factor, shift = (slope, offset) if slope in (1, 2, -1) else (1, 0)
    wanted = values.astype(np.int64) * factor + shift
    frames = np.array(decode(write_nifti(values, scl_slope=slope, scl_inter=offset)).frames, np.int64)
    wanted -= min(0, int(wanted.min()))
    np.testing.assert_array_equal(frames, wanted.transpose(2, 1, 0))


def test_integers_that_16_bit_cannot_hold_and_floats_are_scaled_over_the_whole_volume() -> None:
    wide = VOLUME.astype(np.int64) * 100_000 - 10**9
    wanted = np.rint((VOLUME - float(VOLUME.min())) / np.ptp(VOLUME) * 65535).transpose(2, 1, 0)
    volumes = {
        "wide": write_nifti(wide),
        "float": write_nifti(VOLUME.astype(np.float32) / 1000 - 7),
        "double": write_nifti(VOLUME.astype(np.float64) * 1e290),
        "part of a step": write_nifti(VOLUME, scl_slope=0.5, scl_inter=0.25),
    }
    for name, data in volumes.items():
        assert np.abs(np.array(decode(data).frames) - wanted).max() <= 1, name
    inverted = np.array(decode(write_nifti(VOLUME.astype(np.float32), scl_slope=-0.5)).frames)
    assert np.abs(inverted - (65535 - wanted)).max() <= 1


def test_what_is_not_finite_becomes_an_end_of_the_range() -> None:
    values = VOLUME.astype(np.float32)
    values[0, 0, 0], values[1, 0, 0], values[2, 0, 0] = math.nan, math.inf, -math.inf
    assert decode(write_nifti(values)).frames[0][0, :3].tolist() == [0, 65535, 0]
    assert rejection(write_nifti(np.full_like(values, math.nan))).code == "decode_failed"
    beyond = write_nifti(VOLUME.astype(np.float64) * 1e10, scl_slope=1e300, version=2)
    assert rejection(beyond).code == "decode_failed"


def test_a_slice_gives_the_frame_that_it_gives_as_a_16_bit_png() -> None:
    config = PreprocessConfig(size=64)
    for number, gray in enumerate(decode(write_nifti(*stored((1, 2, 0), (-1, 1, -1)))).frames):
        png = decode(png16(np.ascontiguousarray(SLICES[number]))).frames[0]
        np.testing.assert_array_equal(make_frame(gray, config), make_frame(png, config))


def test_a_tilted_volume_keeps_its_nearest_axes_and_positions_along_its_normal() -> None:
    angle = np.radians(30)
    tilt = np.eye(4)
    tilt[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    volume, affine = stored((2, 0, 1), (-1, -1, 1))
    scan = decode(write_nifti(volume, tilt @ affine))
    np.testing.assert_array_equal(scan.frames, SLICES)
    assert scan.slices is not None
    positions = [info.position_mm for info in scan.slices]
    assert np.diff(np.array(positions, float)) == pytest.approx([1.0] * 17)


def test_pixels_that_are_not_square_become_so_at_the_finer_spacing() -> None:
    scan = decode(write_nifti(VOLUME, TO_RAS @ np.diag([1, 2.5, 4, 1])))
    assert {frame.shape for frame in scan.frames} == {(80, 40)}
    assert scan.slices is not None
    assert scan.slices[0].spacing_mm == pytest.approx(1.0)
    assert decode(write_nifti(VOLUME, TO_RAS @ np.diag([1, 1.009, 4, 1]))).frames[0].shape == (32, 40)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("unit", "of_mm"), [(0, 1), (1, 0.001), (2, 1), (3, 1000), (2 | 8, 1)])
def test_distances_are_in_mm_whatever_unit_the_file_has(version: int, unit: int, of_mm: float) -> None:
    affine = TO_RAS @ np.diag([0.5 * of_mm, 0.5 * of_mm, 3 * of_mm, 1])
    scan = decode(write_nifti(VOLUME, affine, version=version, xyzt_units=unit))
    np.testing.assert_array_equal(scan.frames, SLICES)
    assert scan.slices is not None
    assert scan.slices[1].spacing_mm == pytest.approx(0.5)
    assert scan.slices[1].position_mm == pytest.approx(3)


def test_if_both_forms_are_there_the_second_one_counts() -> None:
    turned = {"qform_code": 1, "quatern": [0.7071, 0.0, 0.7071], "qoffset": [0.0, 0.0, -5.0]}
    scan = decode(write_nifti(VOLUME, **turned))
    np.testing.assert_array_equal(scan.frames, SLICES)


def test_a_plane_of_its_own_and_empty_further_axes_are_one_volume() -> None:
    np.testing.assert_array_equal(decode(write_nifti(VOLUME[:, :, 0])).frames, SLICES[:1])
    np.testing.assert_array_equal(decode(write_nifti(VOLUME[..., None, None])).frames, SLICES)


def test_a_form_that_is_absent_is_replaced_by_the_other_one() -> None:
    # half a turn about the vertical axis: to the left and posterior, as the affine of the others
    turned = {"qform_code": 1, "sform_code": 0, "quatern": [0.0, 0.0, 1.0], "qoffset": [0.0, 0.0, -5.0]}
    scan = decode(write_nifti(VOLUME, srow=[math.nan] * 12, **turned))
    np.testing.assert_array_equal(scan.frames, SLICES)
    assert scan.slices is not None
    assert scan.slices[0].position_mm == pytest.approx(-5)
    assert len(decode(write_nifti(VOLUME, **NO_FORM)).frames) == 18


def test_extensions_are_passed_over_whatever_is_in_them() -> None:
    dicom = struct.pack("<ii", 64, 2) + b"DOE^JANE".ljust(56)
    endless = struct.pack("<ii", 0, 2) * 4
    for extensions in (dicom, dicom * 50, endless, struct.pack("<ii", 2**31 - 1, 0) + bytes(24)):
        np.testing.assert_array_equal(decode(write_nifti(VOLUME, extensions=extensions)).frames, SLICES)


GOOD = write_nifti(VOLUME)
NAN_FORM = TO_RAS.copy()
NAN_FORM[0, 0] = math.nan
HOSTILE = {
    "cut in its header": (GOOD[:347], "unsupported"),
    "cut after its header": (GOOD[:348], "truncated"),
    "cut in its pixels": (GOOD[:-1], "truncated"),
    "second version cut in its header": (write_nifti(VOLUME, version=2)[:500], "truncated"),
    "gzip cut": (gzip.compress(GOOD)[:-9], "truncated"),
    "gzip cut early": (gzip.compress(GOOD)[:5000], "truncated"),
    "gzip damaged": (gzip.compress(GOOD)[:-8] + bytes(8), "decode_failed"),
    "pixels far beyond the end": (write_nifti(VOLUME, vox_offset=1e30), "truncated"),
    "pixels beyond the end": (write_nifti(VOLUME, version=2, vox_offset=2**62), "truncated"),
    "pixels in the header": (write_nifti(VOLUME, vox_offset=100), "decode_failed"),
    "pixels before the file": (write_nifti(VOLUME, vox_offset=-352), "decode_failed"),
    "pixels nowhere": (write_nifti(VOLUME, vox_offset=math.nan), "decode_failed"),
    "pixels at infinity": (write_nifti(VOLUME, vox_offset=math.inf), "decode_failed"),
    "negative side": (write_nifti(VOLUME, dim=[3, -40, 32, 18, 1, 1, 1, 1]), "decode_failed"),
    "no side": (write_nifti(VOLUME, dim=[3, 40, 0, 18, 1, 1, 1, 1]), "decode_failed"),
    "no dimensions": (write_nifti(VOLUME, dim=[0] * 8), "decode_failed"),
    "many dimensions": (write_nifti(VOLUME, dim=[8] + [1] * 7), "decode_failed"),
    "wide": (write_nifti(VOLUME, dim=[3, 32767, 32767, 1, 1, 1, 1, 1]), "bomb"),
    "huge": (write_nifti(VOLUME, dim=[3, 1000, 1000, 32767, 1, 1, 1, 1]), "bomb"),
    "beyond all memory": (write_nifti(VOLUME, version=2, dim=[3, 2**40, 2**40, 2**40, 1, 1, 1, 1]), "bomb"),
    "made huge by its spacing": (write_nifti(VOLUME, TO_RAS @ np.diag([1, 1e7, 1, 1])), "bomb"),
    "thin": (write_nifti(VOLUME[:15]), "too_small"),
    "one row": (write_nifti(VOLUME[:1].reshape(-1)), "too_small"),
    "several volumes": (write_nifti(VOLUME[..., None].repeat(2, axis=3)), "unsupported"),
    "endless volumes": (write_nifti(VOLUME, dim=[7] + [32767] * 7), "unsupported"),
    "complex": (write_nifti(VOLUME.astype(np.complex64)), "unsupported"),
    "colour": (write_nifti(VOLUME, datatype=128, bitpix=24), "unsupported"),
    "colour and alpha": (write_nifti(VOLUME, datatype=2304, bitpix=32), "unsupported"),
    "long doubles": (write_nifti(VOLUME, datatype=1536, bitpix=128), "unsupported"),
    "unknown type": (write_nifti(VOLUME, datatype=999), "decode_failed"),
    "bits": (write_nifti(VOLUME, datatype=1, bitpix=1), "unsupported"),
    "packed twice": (gzip.compress(gzip.compress(GOOD)), "not_an_image"),
    "a fourth dimension of nothing": (write_nifti(VOLUME, dim=[4, 40, 32, 18, 0, 1, 1, 1]), "decode_failed"),
    "names for numbers": (b"\x5c\1\0\0" + b"PLANTED" * 100, "not_an_image"),
    "no type": (write_nifti(VOLUME, datatype=0), "unsupported"),
    "pair": (write_nifti(VOLUME, magic=b"ni1\0")[:348], "unsupported"),
    "pair, second version": (write_nifti(VOLUME, version=2, magic=b"ni2\0\r\n\x1a\n")[:540], "unsupported"),
    "pair, packed": (gzip.compress(write_nifti(VOLUME, magic=b"ni1\0")[:348]), "unsupported"),
    "affine of NaN": (write_nifti(VOLUME, NAN_FORM), "decode_failed"),
    "affine at infinity": (write_nifti(VOLUME, srow=[math.inf] * 12), "decode_failed"),
    "affine of zeros": (write_nifti(VOLUME, srow=[0.0] * 12), "decode_failed"),
    "axes in one plane": (write_nifti(VOLUME, srow=[1.0, 0, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0]), "decode_failed"),
    "quaternion of NaN": (write_nifti(VOLUME, sform_code=0, qform_code=1, quatern=[math.nan] * 3), "decode_failed"),
    "impossible quaternion": (write_nifti(VOLUME, sform_code=0, qform_code=1, quatern=[2.0] * 3), "decode_failed"),
    "no pixel size": (write_nifti(VOLUME, pixdim=[0.0] * 8, **NO_FORM), "decode_failed"),
    "offset of NaN": (write_nifti(VOLUME, scl_slope=2.0, scl_inter=math.nan), "decode_failed"),
    "header of another size": (write_nifti(VOLUME, sizeof_hdr=349), "decode_failed"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_volume_is_rejected_with_its_code(name: str) -> None:
    data, code = HOSTILE[name]
    error = rejection(data)
    assert error.code == code, error.message
    assert "\n" not in error.message
    assert count_pages(data) in (1, 18)


def test_sizes_are_checked_by_the_header_before_any_pixel_is_read() -> None:
    header = write_nifti(VOLUME)[:352]  # there are no pixels: who looked for them would say truncated
    assert rejection(header, max_pixels=40 * 32 - 1).code == "bomb"
    assert rejection(header, max_volume_pixels=VOLUME.size - 1).code == "bomb"
    assert rejection(header, max_pixels=40 * 32, max_volume_pixels=VOLUME.size).code == "truncated"


def test_gzip_is_unpacked_up_to_its_limit_and_no_further() -> None:
    bomb = gzip.compress(GOOD + bytes(50_000_000))
    assert len(bomb) < 200_000
    assert rejection(bomb, max_bytes=1_000_000).code == "bomb"
    assert len(decode(gzip.compress(GOOD), limits=ScanLimits(max_bytes=len(GOOD))).frames) == 18


def test_members_of_nothing_do_not_take_time_without_end() -> None:
    many = gzip.compress(GOOD) + gzip.compress(b"") * 1200
    assert rejection(many, max_bytes=1 << 20).code == "bomb"
    some = gzip.compress(GOOD) + gzip.compress(b"") * 900
    assert len(decode(some, limits=ScanLimits(max_bytes=1 << 20)).frames) == 18


def test_no_change_of_a_file_makes_anything_but_a_scan_or_a_rejection() -> None:
    random_ = random.Random(11)
    small = VOLUME[:20, :20, :3]
    files = [write_nifti(small, version=version, order=order) for version in (1, 2) for order in "<>"]
    files.append(gzip.compress(files[0]))
    outcomes = set()
    for number in range(600):
        data = bytearray(files[number % len(files)])
        for _ in range(random_.randint(1, 4)):
            at = random_.randrange(min(len(data), 560))
            data[at] = random_.choice([0, 1, 0x7F, 0x80, 0xFF, random_.randrange(256)])
        try:
            result: Scan | ScanRejected = decode(bytes(data), limits=ScanLimits(max_volume_pixels=5_000_000))
        except ScanRejected as error:
            result = error
        outcomes.add(result.code if isinstance(result, ScanRejected) else "read")
        count_pages(bytes(data))
    assert {"read", "truncated", "decode_failed", "unsupported", "bomb"} <= outcomes
