"""DICOM objects as odd writers make them, and attackers: more of them, and those that others ship as test data."""

from __future__ import annotations

import functools
import struct
import zlib
from pathlib import Path
from typing import Any

import imagecodecs
import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.sequence import Sequence as Items

from btray.data.scans import Scan, ScanLimits, ScanRejected, SliceInfo, decode
from tests.helpers import dicom_files as dicom
from tests.helpers.dicom_files import element, item, mr_slice, sequence, slice_file, with_element, write
from tests.helpers.odd_dicom import END, encapsulated, fragment, pixel_element, syntax_of
from tests.helpers.scan_corpus import picture, picture16
from tests.helpers.scan_outcomes import attempt, outcome

DEEP, SHALLOW = picture16(), picture()
PLAIN = slice_file(DEEP)
RGB = np.dstack([SHALLOW] * 3)
ROWS, COLUMNS = DEEP.shape
AXIAL, SAGITTAL = [1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, -1]
Case = tuple[bytes, str]


def instead(keyword: str, number: int, vr: str, value: bytes) -> bytes:
    """Return the plain slice with another element of group 28 for one of its own."""
    return with_element(slice_file(DEEP, **{keyword: None}), element(0x0028, number, vr, value))


def headers() -> dict[str, Case]:
    rows = struct.pack("<H", ROWS)
    korean = b"PLANTED^A=\x1b$)C\xfb\xf3^\x1b$)C\xd1\xce=\x1b$)C"
    names = element(0x0008, 0x0005, "CS", b"\\ISO 2022 IR 149\\ISO 2022 IR 87 ") + element(0x0010, 0x0010, "PN", korean)
    return {
        "rows of an unknown VR": (instead("Rows", 0x10, "UN", rows), "ok"),
        "rows as a long number": (instead("Rows", 0x10, "UL", rows + b"\0\0"), "ok"),
        "rows as a floating-point number": (instead("Rows", 0x10, "FD", struct.pack("<d", ROWS)), "ok"),
        "rows of three bytes": (instead("Rows", 0x10, "US", rows + b"\0"), "ok"),
        "rows of one byte": (instead("Rows", 0x10, "US", b"\1"), "decode_failed"),
        "two numbers of rows": (instead("Rows", 0x10, "US", rows + b"\1\0"), "ok"),
        "rows below zero": (instead("Rows", 0x10, "SS", struct.pack("<h", -ROWS)), "decode_failed"),
        "rows that are no number": (instead("Rows", 0x10, "FD", struct.pack("<d", float("nan"))), "decode_failed"),
        "no columns, as a text": (instead("Columns", 0x11, "LO", b"PLANTED "), "bomb"),
        "frames that are not a number": (instead("NumberOfFrames", 0x08, "IS", b"NaN "), "decode_failed"),
        "frames without end": (instead("NumberOfFrames", 0x08, "IS", b"inf "), "decode_failed"),
        "frames in exponents": (instead("NumberOfFrames", 0x08, "IS", b"1e15"), "bomb"),
        "an empty number of frames": (instead("NumberOfFrames", 0x08, "IS", b""), "ok"),
        "frames as a binary number": (instead("NumberOfFrames", 0x08, "US", b"\1\0"), "ok"),
        "a name in three character sets": (with_element(PLAIN, names), "ok"),
        "an element of odd length": (with_element(PLAIN, element(0x0009, 0x1005, "LO", b"odd")), "ok"),
        "a group length that is not true": (with_element(PLAIN, element(8, 0, "UL", b"\xff\xff\xff\x7f")), "ok"),
        "a profile of colours": (with_element(PLAIN, element(0x0028, 0x2000, "OB", bytes(300_000))), "ok"),
        "an unknown sequence of known length": (with_element(PLAIN, element(9, 0x1002, "UN", fragment(b""))), "ok"),
        "a sequence in a text's VR": (with_element(PLAIN, element(9, 0x1002, "LO", fragment(b""))), "ok"),
        "GE's syntax of two byte orders": (syntax_of(PLAIN, b"1.2.840.113619.5.2"), "unsupported"),
        "a syntax that names a patient": (syntax_of(PLAIN, b"PLANTEDNAME"), "unsupported"),
        "JPEG XL": (syntax_of(PLAIN, b"1.2.840.10008.1.2.4.110"), "unsupported"),
        "MPEG-4": (syntax_of(PLAIN, b"1.2.840.10008.1.2.4.102"), "unsupported"),
        "a reference to pixels elsewhere": (syntax_of(PLAIN, b"1.2.840.10008.1.2.4.94"), "unsupported"),
        "deflated and more": (slice_file(DEEP, syntax=dicom.DEFLATED) + b"PLANTED", "ok"),
        "deflated far beyond the limit": (slice_file(np.zeros((900, 900), np.uint16), syntax=dicom.DEFLATED), "bomb"),
        "nothing": (b"", "empty"),
        "two preambles": (bytes(128) + b"DICM" + PLAIN, "decode_failed"),
    }


def pixel_formats() -> dict[str, Case]:
    odd = SHALLOW[:61, :61]
    unpadded = slice_file(odd)[:-1]
    at = unpadded.rindex(struct.pack("<I", odd.size + 1))
    half = np.full((*SHALLOW.shape[:1], SHALLOW.shape[1] // 2, 4), 128, np.uint8)

    def of(pixels: np.ndarray = DEEP, **changed: Any) -> bytes:
        return slice_file(pixels, **changed)

    def padded(vr: str, value: int | str | bytes) -> bytes:
        raw = value.encode() if isinstance(value, str) else value
        raw = struct.pack("<i", raw)[:2] if isinstance(raw, int) else raw
        return with_element(slice_file(DEEP, PixelRepresentation=1), element(0x0028, 0x0120, vr, raw))

    return {
        "an odd number of bytes": (unpadded[:at] + struct.pack("<I", odd.size) + unpadded[at + 4 :], "ok"),
        "16 bits as bytes": (with_vr(PLAIN, b"OB"), "ok"),
        "8 bits as words": (with_vr(of(SHALLOW), b"OW"), "ok"),
        "pixels of an unknown VR": (with_vr(PLAIN, b"UN"), "ok"),
        "12 bits allocated": (instead("BitsAllocated", 0x0100, "US", b"\x0c\0"), "unsupported"),
        "9 bits allocated": (instead("BitsAllocated", 0x0100, "US", b"\x09\0"), "decode_failed"),
        "pixels of a third sign": (of(PixelRepresentation=2), "decode_failed"),
        "four samples": (
            of(RGB, SamplesPerPixel=4, PhotometricInterpretation="CMYK"), "unsupported",
        ),
        "planes of gray": (of(PlanarConfiguration=1), "ok"),
        "planes of a seventh kind": (of(RGB, PlanarConfiguration=7), "ok"),
        "halves of chroma": (write(mr_slice(RGB, PhotometricInterpretation="YBR_PARTIAL_422"), half), "ok"),
        "halves of an odd number": (
            of(RGB[:, :61], PhotometricInterpretation="YBR_FULL_422")[: -RGB[:, :61].size // 3], "truncated",
        ),
        "quarters of chroma": (of(RGB, PhotometricInterpretation="YBR_PARTIAL_420"), "unsupported"),
        "a signed padding as an unsigned one": (padded("US", 63_536), "ok"),
        "a padding as a text": (padded("DS", "-2000 "), "ok"),
        "a padding of eight bytes": (padded("UN", bytes(8)), "ok"),
        "double floating-point pixels": (doubles(), "unsupported"),
        "a palette of 8 bits": (palette([256, 0, 8], bytes(range(256))), "ok"),
        "a palette of 8 bits in words": (palette([256, 0, 8], np.arange(256, dtype="<u2").tobytes()), "ok"),
        "a palette of 12 bits": (palette([256, 0, 12], bytes(512)), "decode_failed"),
        "a palette of 65,536 entries, which it has not": (palette([0, 0, 16], bytes(512)), "decode_failed"),
        "a palette in segments": (palette([256, 0, 16], bytes(6), "Segmented"), "unsupported"),
        "palettes of different lengths": (palette([256, 0, 16], bytes(512), shorter=True), "decode_failed"),
        "a spacing of nothing": (of(PixelSpacing=None, PixelAspectRatio=[0, 1]), "ok"),
        "a slope with a comma": (with_element(PLAIN, element(0x28, 0x1053, "DS", b"1,5 ")), "ok"),
        "a slope beyond numbers": (with_element(PLAIN, element(0x28, 0x1053, "DS", b"1e308 ")), "ok"),
        "rows at no right angle": (of(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), "ok"),
        "a scale of Philips's own": (with_element(PLAIN, element(0x2005, 0x100E, "FL", struct.pack("<f", 0.01))), "ok"),
        "a document in a picture": (
            with_element(write(mr_slice(DEEP, SOPClassUID=dicom.SECONDARY)), element(0x42, 0x11, "OB", b"%PDF-1.7")),
            "decode_failed",
        ),
        "a document": (
            with_element(
                write(item(SOPClassUID="1.2.840.10008.5.1.4.1.1.104.1", PatientName="PLANTED"), meta=False),
                element(0x42, 0x11, "OB", b"%PDF-1.7"),
            ),
            "unsupported",
        ),
        "pixels in an icon alone": (icon_alone(), "decode_failed"),
        "a picture of bits": (
            of(SHALLOW, BitsAllocated=1, BitsStored=1, HighBit=0, SOPClassUID=dicom.SECONDARY + ".1"), "unsupported",
        ),
    }  # fmt: skip


def with_vr(data: bytes, vr: bytes) -> bytes:
    at = data.rindex(b"\xe0\x7f\x10\0") + 4
    return data[:at] + vr + data[at + 2 :]


def doubles() -> bytes:
    dataset = mr_slice(DEEP)
    dataset.DoubleFloatPixelData = DEEP.astype(np.float64).tobytes()
    return write(dataset)


def icon_alone() -> bytes:
    dataset = mr_slice(DEEP)
    icon = mr_slice(SHALLOW[:16, :16])
    icon.PixelData = SHALLOW[:16, :16].tobytes()
    icon["PixelData"].VR = "OB"
    dataset.IconImageSequence = Items([icon])
    return write(dataset)


def palette(descriptor: list[int], entries: bytes, kind: str = "", *, shorter: bool = False) -> bytes:
    changed: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for colour in ("Red", "Green", "Blue"):
        count = descriptor[0] // 2 if shorter and colour == "Blue" else descriptor[0]
        changed[f"{colour}PaletteColorLookupTableDescriptor"] = [count, *descriptor[1:]]
        changed[f"{kind}{colour}PaletteColorLookupTableData"] = entries
    return slice_file(SHALLOW, **changed)


def streams() -> dict[str, Case]:
    rle, j2k, jls, lossless = (
        dicom.ENCODERS[name](DEEP) for name in (dicom.RLE, dicom.JPEG_2000, dicom.JPEG_LS, dicom.JPEG_LOSSLESS_1)
    )
    small = dicom.ENCODERS[dicom.JPEG](SHALLOW)
    small += bytes(len(small) % 2)
    half = len(small) // 4 * 2
    deep = functools.partial(encapsulated, pixels=DEEP)
    deflated = functools.partial(deep, dicom.DEFLATED_FRAMES)
    two = {"NumberOfFrames": 2}
    halves = fragment(small[:half]) + fragment(small[half:])
    backwards = struct.pack("<II", len(small) + 16, 0)
    table = struct.pack("<III", 0, 8 + len(small), 99)

    def elements(*pieces: bytes, **changed: Any) -> bytes:
        return pixel_element(b"".join(pieces) + END, **changed)

    return {
        "offsets that run backwards": (elements(fragment(backwards), halves, halves, **two), "decode_failed"),
        "more offsets than frames": (elements(fragment(table), fragment(small) * 3, **two), "decode_failed"),
        "offsets of three bytes": (elements(fragment(b"\0\0\0"), halves, halves, **two), "truncated"),
        "offsets that lie, with a fragment for each frame": (
            elements(fragment(backwards), fragment(small), fragment(small), **two), "ok",
        ),
        "an empty fragment behind the frame": (elements(fragment(b""), fragment(small), fragment(b"")), "ok"),
        "an empty fragment behind the frames": (
            elements(fragment(b""), fragment(small), fragment(small), fragment(b""), **two), "ok",
        ),
        "a fragment of no end": (elements(fragment(b""), fragment(small, 0xFFFFFFFF)), "truncated"),
        "fragments of odd lengths": (elements(fragment(b""), fragment(small[:77]), fragment(small[77:])), "ok"),
        "three frames in RLE, six fragments": (
            encapsulated(dicom.RLE, *[rle] * 6, pixels=DEEP, NumberOfFrames=3), "decode_failed",
        ),
        "a picture behind the picture": (elements(fragment(b""), fragment(small + bytes(999))), "ok"),
        "extended offsets that lie": (
            with_element(
                elements(fragment(b""), halves, halves, **two), element(0x7FE0, 1, "OB", struct.pack("<QQ", 0, 7)),
            ),
            "decode_failed",
        ),
        "8 bits in the header, 16 in JPEG 2000": (encapsulated(dicom.JPEG_2000, j2k), "decode_failed"),
        "8 bits in the header, 16 in JPEG-LS": (encapsulated(dicom.JPEG_LS, jls), "decode_failed"),
        "8 bits in the header, 16 in lossless JPEG": (encapsulated(dicom.JPEG_LOSSLESS_1, lossless), "decode_failed"),
        "8 bits in the header, 16 in RLE": (encapsulated(dicom.RLE, rle), "decode_failed"),
        "16 bits in the header, 8 in JPEG": (deep(dicom.JPEG, small, BitsStored=8, HighBit=7), "ok"),
        "one sample in the header, three in JPEG 2000": (
            encapsulated(dicom.JPEG_2000, imagecodecs.jpeg2k_encode(RGB, codecformat="j2k")), "decode_failed",
        ),
        "three samples in the header, one in JPEG-LS": (
            encapsulated(dicom.JPEG_LS, imagecodecs.jpegls_encode(SHALLOW), pixels=RGB), "decode_failed",
        ),
        "JPEG in the syntax of JPEG 2000": (encapsulated(dicom.JPEG_2000, small), "decode_failed"),
        "JPEG 2000 in the syntax of JPEG": (deep(dicom.JPEG, j2k), "decode_failed"),
        "JPEG XL in its own syntax": (
            syntax_of(
                encapsulated(dicom.JPEG_LS, imagecodecs.jpegxl_encode(SHALLOW)), b"1.2.840.10008.1.2.4.112",
            ),
            "unsupported",
        ),
        "a deflated frame that ends early": (deflated(raw_deflate(DEEP.tobytes()[:-2])), "truncated"),
        "a deflated frame that is damaged": (deflated(bytes(500)), "decode_failed"),
        "a deflated frame of 100 MB": (deflated(raw_deflate(bytes(100_000_000))), "ok"),
    }  # fmt: skip


def raw_deflate(data: bytes) -> bytes:
    packing = zlib.compressobj(1, wbits=-zlib.MAX_WBITS)
    packed = packing.compress(data) + packing.flush()
    return packed + bytes(len(packed) % 2)


ODD = {**headers(), **pixel_formats(), **streams()}


@pytest.mark.parametrize("name", ODD)
def test_more_odd_and_hostile_objects_have_their_outcome(name: str) -> None:
    data, wanted = ODD[name]
    assert outcome(data) == wanted


def test_a_syntax_that_is_not_read_is_named_if_the_standard_has_it() -> None:
    named = {b"1.2.840.10008.1.2.4.111": "JPEG XL", b"1.2.840.10008.1.2.4.102": "MPEG-4", b"1.2.3.4": "not define"}
    for uid, name in named.items():
        with pytest.raises(ScanRejected, match=name):
            decode(syntax_of(PLAIN, uid))


@pytest.mark.parametrize("syntax", [*dicom.LOSSLESS, dicom.JPEG_EXTENDED])
def test_cut_after_any_kilobyte_an_object_is_never_taken_for_whole(syntax: str) -> None:
    pixels = np.random.default_rng(3).integers(0, 4096, (90, 90)).astype(np.uint16)
    data = slice_file(pixels, syntax=syntax, BitsStored=12, HighBit=11)
    codes = {end: outcome(data[:end]) for end in range(1025, len(data), 1024)}
    assert len(codes) > 4
    assert set(codes.values()) == {"truncated"}


def frames_of(**changed: Any) -> Scan:
    pixels = np.stack([DEEP] * 3)
    found = attempt(write(mr_slice(pixels, SOPClassUID=dicom.ENHANCED_MR, **changed), pixels))
    assert isinstance(found, Scan), found
    return found


def placed(z: float, orientation: list[float], **more: Any) -> pydicom.Dataset:
    return item(
        PlanePositionSequence=sequence(ImagePositionPatient=[0, 0, z]),
        PlaneOrientationSequence=sequence(ImageOrientationPatient=orientation),
        **more,
    )


def test_stacks_of_one_object_keep_their_planes_and_parts_of_a_concatenation_are_read() -> None:
    stacks = Items([placed(0, AXIAL), placed(5, AXIAL), placed(0, SAGITTAL)])
    scan = frames_of(
        PerFrameFunctionalGroupsSequence=stacks, ConcatenationUID="1.2.3.4", InConcatenationNumber=2,
        ConcatenationFrameOffsetNumber=3,
    )  # fmt: skip
    assert [each.plane for each in scan.slices or ()] == ["axial", "axial", "sagittal"]


@pytest.mark.parametrize("groups", [1, 5])
def test_functional_groups_of_fewer_or_more_frames_do_no_harm(groups: int) -> None:
    scan = frames_of(PerFrameFunctionalGroupsSequence=Items([placed(n, AXIAL) for n in range(groups)]))
    positions = [each.position_mm for each in scan.slices or ()]
    assert positions == ([0, None, None] if groups == 1 else [0, 1, 2])


def test_pixels_of_one_frame_that_are_far_from_square_make_no_bomb() -> None:
    wide = placed(0, AXIAL, PixelMeasuresSequence=sequence(PixelSpacing=[90, 0.001]))
    pixels = np.stack([DEEP] * 2)
    groups = Items([placed(0, AXIAL), wide])
    data = write(mr_slice(pixels, PixelSpacing=None, PerFrameFunctionalGroupsSequence=groups), pixels)
    assert outcome(data) == "bomb"


@pytest.mark.parametrize("kind", ["7.2", "7.3", "7.4"])
def test_pictures_of_a_screen_with_several_frames_are_secondary(kind: str) -> None:
    pixels = np.stack([RGB if kind == "7.4" else DEEP if kind == "7.3" else SHALLOW] * 2)
    found = attempt(write(mr_slice(pixels, SOPClassUID=f"1.2.840.10008.5.1.4.1.1.{kind}"), pixels))
    assert isinstance(found, Scan)
    assert [each.image_kind for each in found.slices or ()] == ["secondary"] * 2


def test_bytes_in_words_of_big_endian_objects_are_put_right() -> None:
    swapped = SHALLOW.astype(np.uint8).reshape(-1, 2)[:, ::-1].tobytes()
    dataset = mr_slice(SHALLOW)
    data = write(dataset, SHALLOW, syntax=dicom.BIG_ENDIAN)
    at = len(data) - SHALLOW.nbytes
    assert data[at - 12 : at - 6] == b"\x7f\xe0\0\x10OB"
    for vr, body in ((b"OB", SHALLOW.tobytes()), (b"OW", swapped)):
        found = attempt(data[: at - 8] + vr + data[at - 6 : at] + body)
        assert isinstance(found, Scan)
        np.testing.assert_array_equal(found.frames[0], SHALLOW)


# ---- data of others

NIBABEL = Path(nibabel.__file__).parent
VENDORS = {
    # name -> number of frames, and what the header says of them
    "nicom/tests/data/siemens_dwi_0.dcm.gz": (1, "mosaic"),
    "nicom/tests/data/siemens_dwi_1000.dcm.gz": (1, "mosaic"),
    "nicom/tests/data/philips_mprage.dcm.gz": (176, "original"),
}


@pytest.mark.parametrize("name", VENDORS)
def test_slices_of_scanners_that_come_with_nibabel_are_read(name: str) -> None:
    if not (NIBABEL / name).is_file():
        pytest.skip(f"NOT SHOWN: this nibabel comes without {name}")
    found = attempt((NIBABEL / name).read_bytes(), ScanLimits())
    assert isinstance(found, Scan), found
    (info,) = {each.image_kind for each in found.slices or ()}
    assert (len(found.frames), info) == VENDORS[name]
    assert isinstance(found.slices, list)
    assert all(isinstance(each, SliceInfo) and each.modality == "MR" for each in found.slices)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-8-sig"])
def test_of_a_text_no_letters_are_quoted(encoding: str) -> None:
    with pytest.raises(ScanRejected) as caught:
        decode("PLANTEDNAME^A\t1950".encode(encoding))
    assert caught.value.code == "not_an_image"
    shown = str(caught.value)
    assert "PLA" not in shown
    assert " ".join(f"{letter:02x}" for letter in b"PLAN") not in shown.replace(" 00", "")
