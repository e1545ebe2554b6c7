"""DICOM objects of others, and decoders of others: pydicom's own test files, and dcmtk's pixels."""

from __future__ import annotations

import re
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest

from btray.data.scans import ScanLimits, ScanRejected, decode
from btray.data.scans.orientation import View
from tests.helpers import dicom_files as dicom
from tests.helpers.debian import install
from tests.helpers.scan_corpus import picture, picture16

FILES = Path(pydicom.__file__).parent / "data"
LIMITS = ScanLimits(min_side=1)
# What must not become frames, by what its name matches; other files must.
REFUSED = {
    r"no_meta\.dcm|README": "not_an_image",
    r"DICOMDIR|palettes/|/rt|reportsi|test-SR|waveform|liver_|badVR|Expl.*NoMeta|no_meta_group": "unsupported",
    r"rgb_rle_32bit": "unsupported",
    r"MR_truncated": "truncated",
    r"TINY_ALPHA/|SQ|UN_sequence|chr(Jap|Korean)Multi|empty_charset|meta_missing|embedded": "decode_failed",
}
DCMTK = ("-O", "+Wm", "+opn", "16")  # no overlays, the whole range of gray levels, 16 bits


def dicom_files() -> list[Path]:
    names = [
        *FILES.rglob("*.dcm"),
        *(path for path in (FILES / "test_files" / "dicomdirtests").rglob("*") if path.is_file()),
    ]
    return sorted(set(names))


def outcome_wanted(path: Path) -> str:
    name = str(path.relative_to(FILES))
    return next((code for pattern, code in REFUSED.items() if re.search(pattern, name)), "frames")


def test_every_file_that_comes_with_pydicom_has_the_outcome_it_must_have() -> None:
    wrong = []
    for path in dicom_files():
        try:
            decode(path.read_bytes(), limits=LIMITS)
            found = "frames"
        except ScanRejected as error:
            found = error.code
        if found != outcome_wanted(path):
            wrong.append((path.name, found))
    assert not wrong
    assert len(dicom_files()) > 120


def as_shown(pixels: np.ndarray, dataset: pydicom.Dataset) -> np.ndarray:
    directions = [float(value) for value in dataset.get("ImageOrientationPatient") or ()]
    view = View.of(directions[:3], directions[3:]) if directions else None
    return view.show(pixels) if view else pixels


def assert_linear(found: np.ndarray, truth: np.ndarray, tolerance: float, name: str) -> None:
    """Compare gray levels after a linear fit; `tolerance` is a share of the range of `truth`."""
    assert found.shape == truth.shape, name
    x, y = found.astype(np.float64).ravel(), truth.astype(np.float64).ravel()
    slope, intercept = np.polyfit(x, y, 1) if np.ptp(x) else (0.0, y.mean())
    assert slope >= 0, name
    assert np.abs(slope * x + intercept - y).max() <= tolerance * max(np.ptp(y), 1), name


def test_gray_pixels_are_those_that_pydicom_finds() -> None:
    compared = 0
    for path in dicom_files():
        if outcome_wanted(path) != "frames":
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(path, force=True)
            if dataset.SamplesPerPixel != 1 or dataset.PhotometricInterpretation != "MONOCHROME2":
                continue
            if "PixelPaddingValue" in dataset or float(dataset.get("PixelAspectRatio", [1])[0]) != 1:
                continue
            try:
                truth = dataset.pixel_array
            except (RuntimeError, AttributeError, NotImplementedError):
                continue  # without plugins it decodes few syntaxes
        (found,) = decode(path.read_bytes(), limits=LIMITS).frames
        truth = as_shown(truth, dataset)
        if found.shape == truth.shape:  # others were made square
            assert_linear(found, truth, 1e-9, path.name)
            compared += 1
    assert compared >= 40


def dcmtk_pixels(data: bytes, folder: Path) -> np.ndarray | None:
    """Return what dcmtk shows of the first frame, luma if it has colours; None if it cannot decode it."""
    source, target = folder / "source.dcm", folder / "target.pnm"
    source.write_bytes(data)
    target.unlink(missing_ok=True)
    subprocess.run(["dcmj2pnm", *DCMTK, str(source), str(target)], capture_output=True, check=False, timeout=60)
    if not target.exists():
        return None
    lines = [line for line in target.read_bytes().split(b"\n") if not line.startswith(b"#")]
    width, height, _, *levels = (int(word) for word in b" ".join(lines[1:]).split())
    pixels = np.array(levels, np.float64).reshape(height, width, -1)
    return pixels[..., 0] if pixels.shape[2] == 1 else pixels @ np.array([0.299, 0.587, 0.114])


def test_pixels_are_those_of_dcmtk_after_a_linear_fit(tmp_path: Path) -> None:
    if not install("dcmtk", "dcmj2pnm"):
        pytest.skip("NOT COMPARED: dcmtk (Debian's package) is not there and cannot be installed")
    deep, rgb = (picture16() >> 4).astype(np.uint16), np.dstack([picture()] * 3)
    twelve = {"BitsStored": 12, "HighBit": 11}
    cases: dict[str, tuple[bytes, float]] = {
        f"phantom {syntax}": (dicom.slice_file(deep, syntax=syntax, **twelve), 1e-3)
        for syntax in (
            dicom.IMPLICIT, dicom.EXPLICIT, dicom.BIG_ENDIAN, dicom.DEFLATED, dicom.RLE, dicom.JPEG_EXTENDED,
            dicom.JPEG_LOSSLESS, dicom.JPEG_LOSSLESS_1,
        )
    }  # fmt: skip
    cases |= {
        "colours": (dicom.slice_file(rgb), 5e-3),
        "baseline": (dicom.slice_file(picture(), syntax=dicom.JPEG), 5e-3),
        "signed": (
            dicom.slice_file((deep.astype(np.int16) - 2048), **twelve, RescaleSlope=3, RescaleIntercept=-7),
            1e-3,
        ),
        "inverted": (dicom.slice_file(deep, **twelve, PhotometricInterpretation="MONOCHROME1"), 1e-3),
        "fraction": (dicom.slice_file(deep, **twelve, RescaleSlope=0.37, RescaleIntercept=1.5), 1e-3),
        "falling": (dicom.slice_file(deep, **twelve, RescaleSlope=-2, RescaleIntercept=5), 1e-3),
        "overlaid": (dicom.slice_file(deep | 0xF000, **twelve), 1e-3),
    }
    for name in (
        "CT_small", "MR_small_RLE", "MR_small_bigendian", "JPGExtended", "SC_rgb_jpeg_gdcm", "SC_rgb_rle_16bit",
        "SC_rgb_dcmtk_+eb+cr", "SC_rgb_small_odd_big_endian", "examples_palette", "examples_overlay", "image_dfl",
        "SC_ybr_full_422_uncompressed", "SC_rgb_jpeg_dcmtk",
    ):  # fmt: skip
        cases[name] = ((FILES / "test_files" / f"{name}.dcm").read_bytes(), 0.01)
    compared = 0
    for name, (data, tolerance) in cases.items():
        truth = dcmtk_pixels(data, tmp_path)
        if truth is None:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(tmp_path / "source.dcm", force=True)
        assert_linear(decode(data, limits=LIMITS).frames[0], as_shown(truth, dataset), tolerance, name)
        compared += 1
    assert compared >= len(cases) - 2
