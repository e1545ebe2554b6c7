"""DICOM objects become the frames that people see, with what their headers say, and say nothing of the patient."""

from __future__ import annotations

import dataclasses
import gzip
import logging
import struct
import warnings
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.sequence import Sequence as Items

from btray.data.scans import Scan, ScanLimits, ScanRejected, SliceInfo, count_pages, decode, examine
from tests.helpers import dicom_files as dicom
from tests.helpers.scan_corpus import picture, picture16

DEEP, SHALLOW = picture16(), picture()
TWELVE = (DEEP >> 4).astype(np.uint16)
IN_12_BITS = {"BitsStored": 12, "HighBit": 11}


def frame(data: bytes) -> np.ndarray:
    (only,) = decode(data).frames
    return only


def info(**changed: Any) -> SliceInfo:
    slices = decode(dicom.slice_file(SHALLOW, **changed)).slices
    assert slices is not None
    return slices[0]


def rejection(data: bytes, **limits: int) -> ScanRejected:
    with pytest.raises(ScanRejected) as caught:
        decode(data, limits=ScanLimits(**limits))
    return caught.value


@pytest.mark.parametrize("syntax", dicom.LOSSLESS)
@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("signed", [False, True])
def test_every_lossless_syntax_gives_the_pixels_themselves(syntax: str, bits: int, signed: bool) -> None:
    pixels, stored = {8: (SHALLOW, {}), 12: (TWELVE, IN_12_BITS), 16: (DEEP, {})}[bits]
    if not signed:
        np.testing.assert_array_equal(frame(dicom.slice_file(pixels, syntax=syntax, **stored)), pixels)
        return
    # two's complement in the stored bits; codecs take them as they are
    words = (pixels.astype(np.int32) - 2 ** (bits - 1) & 2**bits - 1).astype(pixels.dtype)
    found = frame(dicom.slice_file(words, syntax=syntax, PixelRepresentation=1, **stored))
    np.testing.assert_array_equal(found, pixels - pixels.min())


@pytest.mark.parametrize(
    ("syntax", "tolerance"),
    [(dicom.JPEG_EXTENDED, 6), (dicom.JPEG_LS_NEAR, 2)],
)
def test_lossy_syntaxes_keep_12_bits(syntax: str, tolerance: int) -> None:
    found = frame(dicom.slice_file(TWELVE, syntax=syntax, **IN_12_BITS))
    assert np.abs(found.astype(int) - TWELVE).max() <= tolerance


@pytest.mark.parametrize("syntax", [dicom.EXPLICIT, dicom.RLE, dicom.JPEG, dicom.JPEG_LOSSLESS_1, dicom.JPEG_LS])
def test_colours_become_the_luma_that_pictures_have(syntax: str) -> None:
    smooth = np.linspace(0, 255, SHALLOW.size).reshape(SHALLOW.shape).astype(np.uint8)
    rgb = np.dstack([SHALLOW, smooth, 255 - smooth])
    wanted = rgb @ np.array([0.299, 0.587, 0.114])
    found = frame(dicom.slice_file(rgb, syntax=syntax))
    assert np.abs(found - wanted).max() <= (12 if syntax == dicom.JPEG else 0.51)


def test_samples_may_lie_in_planes_and_luma_apart_from_its_colours() -> None:
    rgb = np.dstack([SHALLOW, SHALLOW // 2, SHALLOW // 3])
    planes = dicom.mr_slice(rgb, PlanarConfiguration=1)
    by_pixel = frame(dicom.slice_file(rgb))
    np.testing.assert_array_equal(frame(dicom.write(planes, np.moveaxis(rgb, 2, 0))), by_pixel)
    np.testing.assert_array_equal(frame(dicom.slice_file(rgb, PhotometricInterpretation="YBR_FULL")), SHALLOW)
    halves = np.full((*SHALLOW.shape[:1], SHALLOW.shape[1] // 2, 4), 128, np.uint8)
    halves[..., :2] = SHALLOW.reshape(SHALLOW.shape[0], -1, 2)
    dataset = dicom.mr_slice(rgb, PhotometricInterpretation="YBR_FULL_422")
    np.testing.assert_array_equal(frame(dicom.write(dataset, halves)), SHALLOW)


def test_a_palette_gives_the_luma_of_its_colours() -> None:
    levels = np.arange(256)[::-1].astype(np.uint16) * 257
    palette: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for colour in ("Red", "Green", "Blue"):
        palette[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        palette[f"{colour}PaletteColorLookupTableData"] = levels.tobytes()
    np.testing.assert_array_equal(frame(dicom.slice_file(SHALLOW, **palette)), (255 - SHALLOW.astype(np.uint16)) * 257)


@pytest.mark.parametrize("high_bit", [11, 13, 15])
def test_bits_beside_the_stored_ones_are_no_part_of_the_pixel(high_bit: int) -> None:
    shift = high_bit - 11
    others = np.uint16(0xFFFF & ~(0xFFF << shift))
    overlaid = (TWELVE << shift) | (np.where(SHALLOW > 100, others, 0)).astype(np.uint16)
    found = frame(dicom.slice_file(overlaid, BitsStored=12, HighBit=high_bit))
    np.testing.assert_array_equal(found, TWELVE)


@pytest.mark.parametrize(
    ("slope", "intercept", "wanted"),
    [
        ("1", "-1024", lambda v: v - v.min()),
        ("2", "10", lambda v: 2 * v + 10),
        ("0", "5", lambda v: v + 5),
        ("NaN", "NaN", lambda v: v),
        ("inf", "1e400", lambda v: v),
        ("0.37", "-3.5", lambda v: v),
        ("-1", "0", lambda v: v.max() - v),
        ("-2.5", "7", lambda v: v.max() - v),
        ("1e30", "1e30", lambda v: v),
        ("", "", lambda v: v),
        (None, None, lambda v: v),
    ],
)
def test_rescaling_keeps_whole_numbers_and_the_order(slope: str | None, intercept: str | None, wanted: Any) -> None:
    dataset = dicom.mr_slice(TWELVE, **IN_12_BITS)
    data = dicom.write(dataset, TWELVE)
    for number, value in ((0x1053, slope), (0x1052, intercept)):
        if value is not None:
            text = value.encode() + b" " * (len(value) % 2)
            data = dicom.with_element(data, dicom.element(0x0028, number, "DS", text))
    np.testing.assert_array_equal(frame(data), wanted(TWELVE.astype(np.int64)))


def test_numbers_of_32_bits_are_shifted_if_they_fit_and_scaled_if_not() -> None:
    fits = DEEP.astype(np.int32) + 1_000_000
    np.testing.assert_array_equal(frame(dicom.slice_file(fits)), DEEP - DEEP.min())
    wide = frame(dicom.slice_file(DEEP.astype(np.uint32) * 60_000))
    assert np.abs(wide / 65535 - (DEEP - DEEP.min()) / np.ptp(DEEP)).max() < 1e-4
    inverted = frame(dicom.slice_file(DEEP.astype(np.uint32) * 60_000, PhotometricInterpretation="MONOCHROME1"))
    np.testing.assert_array_equal(inverted, 65535 - wide)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("inverted", [False, True])
def test_padding_is_the_darkest_of_what_is_seen(signed: bool, inverted: bool) -> None:
    kind = np.int16 if signed else np.uint16
    pixels = (TWELVE // 2 + 100).astype(kind)
    inside = SHALLOW > 0
    padding = -2000 if signed else 4000
    stored = np.where(inside, pixels, kind(padding))
    changed: dict[str, Any] = {"PhotometricInterpretation": "MONOCHROME1"} if inverted else {}
    for limit in ({}, {"PixelPaddingRangeLimit": padding + 50}):
        dataset = dicom.mr_slice(stored, **changed, **limit)
        dataset.add_new("PixelPaddingValue", "SS" if signed else "US", padding)
        if limit:
            dataset["PixelPaddingRangeLimit"].VR = "SS" if signed else "US"
        found = frame(dicom.write(dataset, stored)).astype(int)
        assert found[~inside].max() == found[inside].min()
        assert np.ptp(found) == np.ptp(pixels[inside])


def test_frames_have_their_own_rescaling_place_and_orientation() -> None:
    pixels = np.stack([TWELVE[:64, :64]] * 3)

    def groups(slope: float, z: float, orientation: list[float]) -> pydicom.Dataset:
        return dicom.item(
            PlanePositionSequence=dicom.sequence(ImagePositionPatient=[0, 0, z]),
            PlaneOrientationSequence=dicom.sequence(ImageOrientationPatient=orientation),
            PixelValueTransformationSequence=dicom.sequence(RescaleSlope=slope, RescaleIntercept=0),
        )

    axial = [1, 0, 0, 0, 1, 0]
    dataset = dicom.mr_slice(pixels, SOPClassUID=dicom.ENHANCED_MR, PixelSpacing=None, **IN_12_BITS)
    dataset.SharedFunctionalGroupsSequence = dicom.sequence(
        PixelMeasuresSequence=dicom.sequence(PixelSpacing=[0.25, 0.25])
    )
    dataset.PerFrameFunctionalGroupsSequence = Items(
        [groups(1, -5, axial), groups(3, 5, axial), groups(-1, 10, [0, 1, 0, 1, 0, 0])]
    )
    for syntax in (dicom.EXPLICIT, dicom.IMPLICIT, dicom.RLE):
        scan = decode(dicom.write(dataset, pixels, syntax=syntax))
        wanted = [pixels[0], pixels[0] * 3, (pixels[0].max() - pixels[0]).T]
        for found, want in zip(scan.frames, wanted, strict=True):
            np.testing.assert_array_equal(found, want)
        assert [each.position_mm for each in scan.slices or ()] == [-5, 5, 10]
        assert {each.spacing_mm for each in scan.slices or ()} == {0.25}


def test_frames_without_a_place_of_their_own_have_none_but_the_first() -> None:
    scan = decode(dicom.slice_file(np.stack([SHALLOW] * 3)))
    assert [each.position_mm for each in scan.slices or ()] == [12.5, None, None]


@pytest.mark.parametrize(
    ("syntax", "fragments", "offsets"),
    [
        (syntax, fragments, offsets)
        for syntax in (dicom.RLE, dicom.JPEG, dicom.JPEG_LS, dicom.JPEG_2000)
        for fragments, offsets in ((1, "basic"), (1, "extended"), (1, "none"), (3, "basic"), (3, "none"))
        if (syntax, fragments, offsets) != (dicom.RLE, 3, "none")  # they have no beginning by which they are known
    ],
)
def test_frames_are_found_by_their_offsets_or_their_beginnings(syntax: str, fragments: int, offsets: str) -> None:
    pixels = np.stack([SHALLOW, SHALLOW[::-1], SHALLOW[:, ::-1]])
    dataset = dicom.mr_slice(pixels)
    data = dicom.write(dataset, pixels, syntax=syntax, fragments=fragments, offsets=offsets)
    for found, want in zip(decode(data).frames, pixels, strict=True):
        assert np.abs(found.astype(int) - want).max() <= (10 if syntax == dicom.JPEG else 0)


@pytest.mark.parametrize(
    "beginning", [b"II*\0\x08\0\0\0", b"\xff\xd8\xff\xe0", b"MM\0*", b"\x89PNG\r\n\x1a\n", b"GIF89a"]
)
def test_an_object_is_known_whatever_its_preamble_looks_like(beginning: bytes) -> None:
    data = dicom.slice_file(DEEP)
    np.testing.assert_array_equal(frame(beginning + data[len(beginning) :]), DEEP)


@pytest.mark.parametrize("syntax", [dicom.IMPLICIT, dicom.EXPLICIT, dicom.BIG_ENDIAN])
def test_without_a_header_of_the_file_byte_order_and_vrs_are_seen_in_the_elements(syntax: str) -> None:
    bare = dicom.write(dicom.mr_slice(DEEP), DEEP, syntax=syntax, meta=False)
    assert b"DICM" not in bare
    np.testing.assert_array_equal(frame(bare), DEEP)
    np.testing.assert_array_equal(frame(bytes(128) + b"DICM" + bare), DEEP)
    other = dicom.EXPLICIT if syntax != dicom.EXPLICIT else dicom.IMPLICIT
    wrong = dicom.write(dicom.mr_slice(DEEP), DEEP, syntax=other)
    meta = wrong[: wrong.index(b"\x08\0\x05\0")]
    np.testing.assert_array_equal(frame(meta + bare), DEEP)


def test_an_object_packed_with_gzip_is_unpacked_within_the_limit() -> None:
    data = dicom.slice_file(np.zeros((600, 600), np.uint16))
    packed = gzip.compress(data)
    assert frame(packed).shape == (600, 600)
    assert rejection(packed, max_bytes=len(data) - 1).code == "bomb"
    assert rejection(packed[:-100]).code == "truncated"


def test_pixels_that_are_not_square_become_as_fine_as_the_finer_spacing() -> None:
    tall = decode(dicom.slice_file(DEEP, PixelSpacing=[1.0, 0.5]))
    assert tall.frames[0].shape == (2 * DEEP.shape[0], DEEP.shape[1])
    assert tall.slices is not None
    assert tall.slices[0].spacing_mm == 0.5
    assert frame(dicom.slice_file(DEEP, PixelSpacing=[0.5, 0.504])).shape == DEEP.shape
    assert frame(dicom.slice_file(DEEP, PixelSpacing=None, PixelAspectRatio=[2, 1])).shape == tall.frames[0].shape
    assert rejection(dicom.slice_file(DEEP, PixelSpacing=[50.0, 0.0001])).code == "bomb"
    for none in ([0, 0], [-1, 1], [1], [1e9, 1]):
        assert frame(dicom.slice_file(DEEP, PixelSpacing=none)).shape == DEEP.shape


def test_the_header_is_checked_against_the_limits_before_the_pixels_are_read() -> None:
    data = dicom.slice_file(np.stack([SHALLOW] * 4))
    size = SHALLOW.size
    assert len(decode(data, limits=ScanLimits(max_pixels=size, max_volume_pixels=4 * size)).frames) == 4
    assert rejection(data, max_pixels=size - 1).code == "bomb"
    assert rejection(data, max_volume_pixels=4 * size - 1).code == "bomb"
    assert rejection(data, min_side=SHALLOW.shape[0] + 1).code == "too_small"
    short = data[: data.index(struct.pack("<HH", 0x7FE0, 0x0010)) + 100]
    assert rejection(short).code == "truncated"
    assert rejection(short, max_pixels=size - 1).code == "bomb"
    deflated = dicom.slice_file(np.zeros((600, 600), np.uint16), syntax=dicom.DEFLATED)
    assert rejection(deflated, max_bytes=600 * 600).code == "bomb"


def test_examining_and_counting_need_no_pixels() -> None:
    data = dicom.slice_file(np.stack([DEEP] * 3))
    deflated = dicom.slice_file(np.stack([DEEP] * 3), syntax=dicom.DEFLATED)
    assert count_pages(data) == count_pages(gzip.compress(data)) == count_pages(deflated) == 3
    facts = examine(data)
    assert (facts.format, facts.mode, facts.width, facts.height) == ("DICOM", "I;16", DEEP.shape[1], DEEP.shape[0])
    assert examine(dicom.slice_file(np.dstack([SHALLOW] * 3))).mode == "RGB"
    assert count_pages(data[:500]) == 1


def test_uids_that_are_none_and_texts_in_codes_are_not_passed_on() -> None:
    found = info()
    assert (found.study_uid, found.series_uid, found.instance_uid) == (dicom.STUDY, dicom.SERIES, dicom.INSTANCE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's, of the values
        for wrong in ("PLANTEDNAME", "1.02.3", "1..2", "1.2.", "../../etc", "1." + "2" * 70, "1.2\r\n3"):
            assert info(StudyInstanceUID=wrong).study_uid is None, wrong
        for wrong in ("PLANTED NAME", "M\nR", "Mr. Planted", ""):
            assert info(Modality=wrong).modality is None, wrong
    assert info(Modality="CT").modality == "CT"


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        ({}, "original"),
        ({"ImageType": ["DERIVED", "SECONDARY", "MPR"]}, "derived"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "localizer"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]}, "mosaic"),
        ({"SOPClassUID": dicom.SECONDARY, "ImageType": ["DERIVED", "SECONDARY"]}, "secondary"),
        ({"SOPClassUID": dicom.SECONDARY + ".2"}, "secondary"),
        ({"ImageType": None}, None),
        ({"SeriesDescription": "3 Plane Loc"}, "localizer"),
        ({"SeriesDescription": "Survey", "ImageType": ["ORIGINAL", "PRIMARY", "M_FFE"]}, "localizer"),
    ],
)
def test_the_kind_of_an_image_follows_from_its_type_and_class(changed: dict[str, Any], wanted: str | None) -> None:
    assert info(**changed).image_kind == wanted


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        ({"SeriesDescription": "AX T1 POST"}, "t1"),
        ({"SeriesDescription": "t1_mprage_sag_p2_iso"}, "t1"),
        ({"SeriesDescription": "Sag 3D BRAVO"}, "t1"),
        ({"SeriesDescription": "t2_tse_tra"}, "t2"),
        ({"SeriesDescription": "AX T2 FLAIR FS"}, "flair"),
        ({"SeriesDescription": "AX T1 FLAIR"}, "t1"),
        ({"SeriesDescription": "t2_tirm_tra_dark-fluid"}, "flair"),
        ({"SeriesDescription": "ep2d_diff_3scan_trace_p2"}, "dwi"),
        ({"SeriesDescription": "ADC (10^-6 mm2/s)"}, "dwi"),
        ({"SeriesDescription": "Ax DWI b1000"}, "dwi"),
        ({"SeriesDescription": "SWI_Images"}, "other"),
        ({"SeriesDescription": "AX T2* GRE"}, "other"),
        ({"SeriesDescription": "t2_fl2d_tra_hemo"}, "other"),
        ({"SeriesDescription": "3D TOF"}, "other"),
        ({"SeriesDescription": "t1_flair_sag"}, "t1"),
        ({"SeriesDescription": "AX T1 GRE"}, "t1"),
        ({"SeriesDescription": "s", "SequenceName": "*tfl3d1"}, "t1"),
        ({"SeriesDescription": "s", "ScanningSequence": "SE", "RepetitionTime": 500, "EchoTime": 12}, "t1"),
        ({"SeriesDescription": "s", "ScanningSequence": "SE", "RepetitionTime": 4000, "EchoTime": 99}, "t2"),
        (
            {"SeriesDescription": "s", "ScanningSequence": ["SE", "IR"], "RepetitionTime": 9000, "EchoTime": 110,
             "InversionTime": 2500},
            "flair",
        ),
        (
            {"SeriesDescription": "s", "ScanningSequence": ["GR", "IR"], "RepetitionTime": 2300, "EchoTime": 2.9,
             "InversionTime": 900},
            "t1",
        ),
        ({"SeriesDescription": "s", "ScanningSequence": "SE", "RepetitionTime": 3000, "EchoTime": 15}, "other"),
        ({"SeriesDescription": "s", "ScanningSequence": "GR", "RepetitionTime": 600, "EchoTime": 20}, "other"),
        ({"SeriesDescription": "s", "DiffusionBValue": 1000.0}, None),
        ({"SeriesDescription": "s", "AcquisitionContrast": "FLUID_ATTENUATED"}, "flair"),
        ({"SeriesDescription": "s"}, None),
        ({"SeriesDescription": "AX T1 POST", "Modality": "CT"}, None),
    ],
)  # fmt: skip
def test_the_weighting_follows_from_codes_names_or_times(changed: dict[str, Any], wanted: str | None) -> None:
    if "DiffusionBValue" in changed:
        wanted = "dwi"
    assert info(ProtocolName="head", **changed).sequence == wanted


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        ({"ContrastBolusAgent": "Gadovist"}, "post"),
        ({"ContrastBolusAgent": "NONE"}, "pre"),
        ({"ContrastBolusAgent": ""}, None),
        ({"SeriesDescription": "AX T1 +C"}, "post"),
        ({"SeriesDescription": "t1_tse_tra_KM"}, "post"),
        ({"SeriesDescription": "T1 GD"}, "post"),
        ({"SeriesDescription": "AX T1 PRE"}, "pre"),
        ({"SeriesDescription": "T1 nativ"}, "pre"),
        ({"SeriesDescription": "T1 without contrast"}, "pre"),
        ({"SeriesDescription": "T1 W/O"}, "pre"),
        ({"SeriesDescription": "T1 pre", "ContrastBolusAgent": "Gadovist"}, None),
        ({"SeriesDescription": "AX T1 SPACE"}, None),
        ({"SeriesDescription": "T1 C-"}, "pre"),
        ({"SeriesDescription": "AX T1 -C"}, "pre"),
        ({"SeriesDescription": "AX T1-C+"}, "post"),
        ({"SeriesDescription": "t1ce"}, "post"),
        ({"SeriesDescription": "T1 with contrast"}, "post"),
        ({"SeriesDescription": "BRAIN W/WO CONTRAST"}, None),
        ({"SeriesDescription": "T1 with and without contrast"}, None),
        ({"SeriesDescription": "T1 24cm C-spine"}, None),
        ({"SeriesDescription": "posterior fossa"}, None),
    ],
)
def test_contrast_follows_from_the_agent_and_the_names(changed: dict[str, Any], wanted: str | None) -> None:
    assert info(**{"SeriesDescription": "AX T1", "ProtocolName": "head", **changed}).contrast == wanted


def test_burned_in_text_is_noticed_and_the_patient_is_a_digest() -> None:
    assert info(BurnedInAnnotation="YES").burned_in is True
    assert info(BurnedInAnnotation="NO").burned_in is False
    assert info().burned_in is None
    assert info().patient_key == info(PatientID="PLANTEDID ").patient_key != info(PatientID="OTHER").patient_key
    assert info(PatientID="").patient_key is None


def test_nothing_that_names_the_patient_is_in_facts_messages_logs_or_warnings(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    wrong = {"StudyInstanceUID": "PLANTEDNAME", "RescaleSlope": None, "Modality": "PLANTED NAME"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        files = [dicom.slice_file(SHALLOW, syntax=syntax, **wrong) for syntax in (*dicom.LOSSLESS, dicom.JPEG)]
    caplog.clear()  # pydicom's, which wrote them
    capfd.readouterr()
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for data in files:
            for damaged in (
                data,
                data[: len(data) // 2],
                data[:-40],
                data.replace(b"PLANTED", b"\xff\xfe\0\x01\r\n\x1b"),
            ):
                try:
                    scan = decode(damaged)
                except ScanRejected as error:
                    said += [repr(error), str(error), repr(error.__cause__), repr(error.info)]
                else:
                    said.append(repr(scan.slices))
                    kept = ("body_part", "description", "protocol")
                    said += [repr(dataclasses.replace(each, **dict.fromkeys(kept))) for each in scan.slices or ()]
    out, err = capfd.readouterr()
    text = "\n".join([*said, out, err, caplog.text, *(str(warning.message) for warning in caught)])
    assert not [word for word in dicom.IDENTIFIERS if word in text]
    assert "\x1b" not in text


def test_elements_after_the_pixels_and_before_the_rows_do_no_harm() -> None:
    data = dicom.slice_file(DEEP)
    for after in (bytes(1000), dicom.element(0xFFFC, 0xFFFC, "OB", bytes(64)), b"\1" * 7):
        np.testing.assert_array_equal(frame(data + after), DEEP)
    at = data.index(struct.pack("<HH2s", 0x7FE0, 0x0010, b"OW"))
    meta = data.index(b"\x08\0\x05\0CS")
    np.testing.assert_array_equal(frame(data[:meta] + data[meta : meta + 18] + data[at:] + data[meta + 18 : at]), DEEP)


def test_a_small_picture_within_the_object_is_not_taken_for_its_pixels() -> None:
    for syntax in (dicom.EXPLICIT, dicom.RLE):
        dataset = dicom.mr_slice(DEEP)
        icon = dicom.mr_slice(SHALLOW[:16, :16])
        dicom.write(icon, SHALLOW[:16, :16], syntax=syntax)
        del icon.file_meta
        dataset.IconImageSequence = Items([icon])
        np.testing.assert_array_equal(frame(dicom.write(dataset, DEEP, syntax=syntax)), DEEP)


def test_scans_say_what_is_known_even_if_their_pixels_cannot_be_read() -> None:
    data = dicom.slice_file(DEEP)
    said = rejection(data[:-10]).info
    assert said is not None
    assert said.series_uid == dicom.SERIES


def test_a_scan_can_be_sent_between_processes() -> None:
    import pickle

    scan = pickle.loads(pickle.dumps(decode(dicom.slice_file(DEEP))))
    assert isinstance(scan, Scan)
    assert scan.slices is not None
