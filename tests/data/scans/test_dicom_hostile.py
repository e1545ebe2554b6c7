"""Odd and hostile DICOM objects give sound frames or the code that docs/scans.md promises, quickly."""

from __future__ import annotations

import functools
import random
import struct
from typing import Any

import imagecodecs
import numpy as np
import pytest
from pydicom.dataset import Dataset

from btray.data.scans import Scan, ScanLimits, ScanRejected
from tests.helpers import dicom_files as dicom
from tests.helpers.odd_dicom import END, encapsulated, fragment, pixel_element, syntax_of
from tests.helpers.scan_corpus import encode, picture, picture16
from tests.helpers.scan_outcomes import attempt, outcome

DEEP, SHALLOW = picture16(), picture()
PLAIN = dicom.slice_file(DEEP)
EOI = b"\xff\xd9"
UNSIGNED = {"Rows": 0x0010, "Columns": 0x0011, "BitsAllocated": 0x0100, "BitsStored": 0x0101, "HighBit": 0x0102}


def header(**numbers: int) -> bytes:
    """Return `PLAIN` with other numbers in its group 28."""
    data = PLAIN
    for name, value in numbers.items():
        at = data.index(struct.pack("<HH2sH", 0x0028, UNSIGNED[name], b"US", 2)) + 8
        data = data[:at] + struct.pack("<H", value) + data[at + 2 :]
    return data


def without(keyword: str) -> bytes:
    return dicom.slice_file(DEEP, **{keyword: None})


def with_text(number: int, vr: str, text: bytes, group: int = 0x0028) -> bytes:
    return dicom.with_element(PLAIN, dicom.element(group, number, vr, text + b" " * (len(text) % 2)))


def stream(syntax: str, pixels: np.ndarray = DEEP) -> bytes:
    return dicom.ENCODERS[syntax](pixels)


def changed_jpeg(data: bytes, marker: int, at: int, value: bytes) -> bytes:
    place = data.index(bytes((0xFF, marker))) + at
    return data[:place] + value + data[place + len(value) :]


def cut_with_end(syntax: str, share: float, pixels: np.ndarray = DEEP) -> bytes:
    whole = stream(syntax, pixels)
    return whole[: int(len(whole) * share)].rstrip(b"\xff") + EOI


def odd_headers() -> dict[str, tuple[bytes, str]]:
    head_end = PLAIN.index(struct.pack("<HH2s", 0x7FE0, 0x0010, b"OW"))
    elements = b"".join(dicom.element(0x0009, 0x1000 + number % 0x1000, "LO") for number in range(50_001))
    empty_items = dicom.element(0x0009, 0x1002, "SQ", fragment(b"") * 50_001)
    long_items = dicom.element(0x0009, 0x1002, "SQ", fragment(b"", 5000))
    return {
        "nothing but a preamble": (bytes(128) + b"DICM", "truncated"),
        "a preamble and two bytes": (bytes(128) + b"DICM\2\0", "truncated"),
        "the header of the file alone": (PLAIN[: PLAIN.index(b"\x08\0\x05\0CS")], "truncated"),
        "cut in the header of the file": (PLAIN[:200], "truncated"),
        "cut in the elements": (PLAIN[: head_end - 5], "truncated"),
        "cut before the pixels": (PLAIN[:head_end], "decode_failed"),
        "cut in the header of the pixels": (PLAIN[: head_end + 10], "truncated"),
        "cut in the pixels": (PLAIN[: head_end + 500], "truncated"),
        "without its last byte": (PLAIN[:-1], "truncated"),
        "an element longer than the file": (
            dicom.with_element(PLAIN, dicom.element(9, 0x1001, "UN", length=2**31)), "truncated",
        ),
        "an element of no end": (
            dicom.with_element(PLAIN, dicom.element(9, 0x1001, "UN", length=2**32 - 1)), "decode_failed",
        ),
        "a sequence of no end": (
            dicom.with_element(PLAIN, dicom.element(9, 0x1002, "SQ", length=2**32 - 1)), "decode_failed",
        ),
        "64 sequences": (dicom.with_element(PLAIN, dicom.nested(64)), "ok"),
        "65 sequences": (dicom.with_element(PLAIN, dicom.nested(65)), "bomb"),
        "65 sequences of known length": (dicom.with_element(PLAIN, dicom.nested(65, defined=True)), "bomb"),
        "5000 sequences": (dicom.with_element(PLAIN, dicom.nested(5000)), "bomb"),
        "50,001 elements": (dicom.with_element(PLAIN, elements), "bomb"),
        "50,001 elements in an item": (
            dicom.with_element(PLAIN, dicom.element(9, 0x1002, "SQ", fragment(elements))), "bomb",
        ),
        "50,001 items": (dicom.with_element(PLAIN, empty_items), "bomb"),
        "an item longer than its sequence": (dicom.with_element(PLAIN, long_items), "ok"),
        "what begins like a sequence": (
            dicom.with_element(PLAIN, dicom.element(9, 0x1002, "UN", b"\xfe\xff\0\xe0" + bytes(60))), "ok",
        ),
        "an end of a sequence without one": (
            dicom.with_element(PLAIN, struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)), "decode_failed",
        ),
        "an unknown VR": (dicom.with_element(PLAIN, dicom.element(9, 0x1001, "QQ", b"abcd")), "ok"),
        "an element without VR": (dicom.with_element(PLAIN, struct.pack("<HHI", 9, 0x1001, 4) + b"abcd"), "ok"),
        "a second number of rows": (dicom.with_element(PLAIN, dicom.element(0x28, 0x10, "US", b"\1\0")), "ok"),
        "rows as a text": (
            dicom.with_element(without("Rows"), dicom.element(0x28, 0x10, "IS", str(DEEP.shape[0]).encode())), "ok",
        ),
        "a text of a megabyte": (with_text(0x103E, "UT", b"T1 " * 200_000, group=0x0008), "ok"),
        "control characters": (with_text(0x1030, "LO", b"\x1b[31m\r\n\0\x07", group=0x0018), "ok"),
        "an unknown character set": (with_text(0x0005, "CS", b"ISO 2022 IR 999\\\\", group=0x0008), "ok"),
        "another transfer syntax": (syntax_of(PLAIN, b"1.2.3.4"), "unsupported"),
        "video": (syntax_of(PLAIN, b"1.2.840.10008.1.2.4.102"), "unsupported"),
        "no transfer syntax": (syntax_of(PLAIN, b""), "ok"),
        "big endian, which it is not": (syntax_of(PLAIN, dicom.BIG_ENDIAN.encode()), "ok"),
        "deflated, which it is not": (syntax_of(PLAIN, dicom.DEFLATED.encode()), "decode_failed"),
        "deflated and cut": (dicom.slice_file(DEEP, syntax=dicom.DEFLATED)[:-200], "truncated"),
    }  # fmt: skip


def odd_pixels() -> dict[str, tuple[bytes, str]]:
    rgb = np.dstack([SHALLOW] * 3)
    return {
        "no rows": (without("Rows"), "decode_failed"),
        "rows of 0": (header(Rows=0), "decode_failed"),
        "columns of 0": (header(Columns=0), "decode_failed"),
        "65,535 rows and columns": (header(Rows=65_535, Columns=65_535), "bomb"),
        "one row more": (header(Rows=DEEP.shape[0] + 1), "truncated"),
        "half the rows": (header(Rows=DEEP.shape[0] // 2), "decode_failed"),
        "one column": (header(Columns=1), "too_small"),
        "0 bits": (header(BitsAllocated=0), "decode_failed"),
        "1 bit": (header(BitsAllocated=1), "unsupported"),
        "7 bits": (header(BitsAllocated=7), "decode_failed"),
        "64 bits": (header(BitsAllocated=64), "unsupported"),
        "17 bits stored of 16": (header(BitsStored=17), "decode_failed"),
        "0 bits stored": (header(BitsStored=0), "decode_failed"),
        "a high bit above the highest": (header(HighBit=40_000), "decode_failed"),
        "a high bit below those stored": (header(HighBit=3), "decode_failed"),
        "no bits stored nor high bit": (dicom.slice_file(DEEP, BitsStored=None, HighBit=None), "ok"),
        "no samples": (dicom.slice_file(DEEP, SamplesPerPixel=0), "decode_failed"),
        "two samples": (dicom.slice_file(DEEP, SamplesPerPixel=2), "decode_failed"),
        "three samples of gray": (dicom.slice_file(rgb, PhotometricInterpretation="MONOCHROME2"), "decode_failed"),
        "hue, saturation and value": (dicom.slice_file(rgb, PhotometricInterpretation="HSV"), "unsupported"),
        "no photometric interpretation": (without("PhotometricInterpretation"), "ok"),
        "-1 frames": (dicom.slice_file(DEEP, NumberOfFrames=-1), "decode_failed"),
        "0 frames": (dicom.slice_file(DEEP, NumberOfFrames=0), "ok"),
        "2 frames, one there": (dicom.slice_file(DEEP, NumberOfFrames=2), "truncated"),
        "1 frame, two there": (dicom.slice_file(np.stack([DEEP] * 2), NumberOfFrames=1), "decode_failed"),
        "10^9 frames": (dicom.slice_file(DEEP, NumberOfFrames=10**9), "bomb"),
        "frames that are no number": (with_text(0x0008, "IS", b"many"), "ok"),
        "a spacing that is no number": (with_text(0x0030, "DS", b"wide\\narrow"), "ok"),
        "an orientation that is no number": (with_text(0x0037, "DS", b"1\\0\\0\\0\\1\\x", group=0x0020), "ok"),
        "an orientation beyond numbers": (with_text(0x0037, "DS", b"1e308\\" * 5 + b"1e308", group=0x0020), "ok"),
        "a place beyond all heads": (with_text(0x0032, "DS", b"1e300\\nan\\inf", group=0x0020), "ok"),
        "padding of one byte": (with_text(0x0120, "US", b"a"), "ok"),
        "a palette that is not there": (
            dicom.slice_file(DEEP, PhotometricInterpretation="PALETTE COLOR"), "unsupported",
        ),
        "a palette that is too short": (palette([256, 0, 16], bytes(100)), "decode_failed"),
        "a palette of another kind": (palette([256, 0], bytes(512)), "decode_failed"),
        "a palette of one entry": (palette([1, 7, 16], bytes(2)), "ok"),
        "floating-point pixels": (float_pixels(), "unsupported"),
        "pixels of no length, not compressed": (pixel_element(fragment(b""), syntax=dicom.EXPLICIT), "decode_failed"),
        "an image without pixels": (dicom.write(dicom.mr_slice(DEEP)), "decode_failed"),
        **{
            f"no slice: {kind}": (dicom.slice_file(DEEP, SOPClassUID=f"1.2.840.10008.5.1.4.1.1.{kind}"), "unsupported")
            for kind in ("88.33", "104.1", "66.4", "66", "481.2", "481.3", "4.2", "30", "11.1", "9.1.1", "77.1.1.1")
        },
        "no slice: a directory": (dicom.slice_file(DEEP, SOPClassUID="1.2.840.10008.1.3.10"), "unsupported"),
        "no slice: by its modality": (
            dicom.write(dicom.mr_slice(DEEP, SOPClassUID=None, Modality="SEG"), DEEP, meta=False), "unsupported",
        ),
    }  # fmt: skip


def palette(descriptor: list[int], entries: bytes) -> bytes:
    changed: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for colour in ("Red", "Green", "Blue"):
        changed[f"{colour}PaletteColorLookupTableDescriptor"] = descriptor
        changed[f"{colour}PaletteColorLookupTableData"] = entries
    return dicom.slice_file(SHALLOW, **changed)


def float_pixels() -> bytes:
    dataset: Dataset = dicom.mr_slice(DEEP)
    dataset.FloatPixelData = DEEP.astype(np.float32).tobytes()
    return dicom.write(dataset)


def odd_streams() -> dict[str, tuple[bytes, str]]:
    jpeg, rle, j2k, jls = (stream(name) for name in (dicom.JPEG_LOSSLESS_1, dicom.RLE, dicom.JPEG_2000, dicom.JPEG_LS))
    small = stream(dicom.JPEG, SHALLOW)
    twelve = stream(dicom.JPEG_EXTENDED, DEEP >> 4)
    progressive, colours = encode(SHALLOW, "JPEG", progressive=True), encode(np.dstack([SHALLOW] * 3), "JPEG")
    scan = colours.index(b"\xff\xda")
    many_scans = colours[:scan] + colours[scan:-2] * 200 + EOI
    deep = functools.partial(encapsulated, pixels=DEEP)

    def rle_header(*numbers: int) -> bytes:
        return struct.pack("<16I", *numbers, *[0] * (16 - len(numbers))) + rle[64:]

    return {
        "no fragments": (pixel_element(END), "truncated"),
        "offsets alone": (pixel_element(fragment(b"") + END), "truncated"),
        "an empty fragment": (pixel_element(fragment(b"") + fragment(b"") + END), "decode_failed"),
        "fragments without their end": (pixel_element(fragment(b"") + fragment(small)), "truncated"),
        "a fragment longer than the file": (pixel_element(fragment(b"") + fragment(small, 10**6) + END), "truncated"),
        "bytes that are no fragment": (pixel_element(fragment(b"") + b"\1\2\3\4" + small + END), "decode_failed"),
        "compressed, but pixels as they are": (pixel_element(SHALLOW.tobytes(), length=SHALLOW.size), "decode_failed"),
        "60,000 empty fragments": (pixel_element(fragment(b"") * 60_000 + END), "bomb"),
        "JPEG of 200 scans": (encapsulated(dicom.JPEG, many_scans, pixels=np.dstack([SHALLOW] * 3)), "bomb"),
        "fragments of a known length": (
            pixel_element(fragment(b"") + fragment(small), length=16 + len(small)), "ok",
        ),
        "2 frames, one fragment": (encapsulated(dicom.JPEG, small, NumberOfFrames=2), "truncated"),
        "1 frame, two in fragments": (encapsulated(dicom.JPEG, small, small), "decode_failed"),
        "offsets to nowhere": (offsets_to_nowhere(small), "decode_failed"),
        "an error page for a stream": (encapsulated(dicom.JPEG, b"<html>502 Bad Gateway</html>"), "decode_failed"),
        "zeros for a stream": (encapsulated(dicom.JPEG_2000, bytes(500)), "decode_failed"),
        "JPEG of another height": (
            encapsulated(dicom.JPEG, changed_jpeg(small, 0xC0, 5, b"\xff\xff")), "decode_failed",
        ),
        "JPEG of another width": (encapsulated(dicom.JPEG, changed_jpeg(small, 0xC0, 7, b"\0\1")), "decode_failed"),
        "JPEG in colours": (encapsulated(dicom.JPEG, encode(np.dstack([SHALLOW] * 3), "JPEG")), "decode_failed"),
        "JPEG without its end": (encapsulated(dicom.JPEG, small[:-2]), "truncated"),
        "JPEG cut": (encapsulated(dicom.JPEG, small[: len(small) // 2]), "truncated"),
        "JPEG cut before its end mark": (encapsulated(dicom.JPEG, cut_with_end(dicom.JPEG, 0.6, SHALLOW)), "truncated"),
        "JPEG cut in its header": (encapsulated(dicom.JPEG, small[:100]), "decode_failed"),
        "JPEG, progressive": (encapsulated(dicom.JPEG, progressive), "unsupported"),
        "JPEG, arithmetic": (encapsulated(dicom.JPEG, small.replace(b"\xff\xc0", b"\xff\xc9", 1)), "unsupported"),
        "JPEG of 12 bit without its end": (deep(dicom.JPEG_EXTENDED, twelve[:-2]), "truncated"),
        "JPEG of 12 bit cut before its end mark": (
            deep(dicom.JPEG_EXTENDED, cut_with_end(dicom.JPEG_EXTENDED, 0.5, DEEP >> 4)), "truncated",
        ),
        "lossless JPEG without its end": (deep(dicom.JPEG_LOSSLESS_1, jpeg[:-2]), "truncated"),
        "lossless JPEG cut before its end mark": (
            deep(dicom.JPEG_LOSSLESS_1, cut_with_end(dicom.JPEG_LOSSLESS_1, 0.5)), "truncated",
        ),
        "lossless JPEG of predictor 4 cut before its end mark": (
            deep(dicom.JPEG_LOSSLESS, cut_with_end(dicom.JPEG_LOSSLESS, 0.5)), "truncated",
        ),
        "lossless JPEG of another size": (
            deep(dicom.JPEG_LOSSLESS_1, changed_jpeg(jpeg, 0xC3, 5, b"\0\x40")), "decode_failed",
        ),
        "JPEG-LS without its end": (deep(dicom.JPEG_LS, jls[:-2]), "truncated"),
        "JPEG-LS cut before its end mark": (deep(dicom.JPEG_LS, cut_with_end(dicom.JPEG_LS, 0.5)), "truncated"),
        "JPEG-LS of another size": (deep(dicom.JPEG_LS, changed_jpeg(jls, 0xF7, 5, b"\xff\xff")), "decode_failed"),
        "JPEG 2000 without its end": (deep(dicom.JPEG_2000, j2k[:-2]), "truncated"),
        "JPEG 2000 cut before its end mark": (deep(dicom.JPEG_2000, cut_with_end(dicom.JPEG_2000, 0.5)), "truncated"),
        "JPEG 2000 of another size": (deep(dicom.JPEG_2000, changed_jpeg(j2k, 0x51, 6, b"\0\1\0\0")), "decode_failed"),
        "JPEG 2000 of 1000 components": (
            deep(dicom.JPEG_2000, changed_jpeg(j2k, 0x51, 38, b"\3\xe8")), "decode_failed",
        ),
        "JPEG 2000 of tiles of one pixel": (
            deep(dicom.JPEG_2000, changed_jpeg(j2k, 0x51, 22, b"\0\0\0\1" * 2)), "truncated",
        ),
        "JPEG 2000 of millions of precincts": (many_blocks(j2k, precincts=True), "bomb"),
        "JPEG 2000 of millions of blocks": (many_blocks(j2k, precincts=False), "bomb"),
        "60,000 frames": (dicom.slice_file(np.zeros((60_000, 1, 1), np.uint8)), "bomb"),
        "JPEG 2000 in its boxes": (
            deep(dicom.JPEG_2000, imagecodecs.jpeg2k_encode(DEEP, codecformat="jp2", reversible=True, level=0)), "ok",
        ),
        "HTJ2K cut before its end mark": (deep(dicom.HTJ2K, cut_with_end(dicom.HTJ2K, 0.5)), "truncated"),
        "RLE cut": (deep(dicom.RLE, rle[: len(rle) // 2]), "truncated"),
        "RLE cut in its header": (deep(dicom.RLE, rle[:40]), "truncated"),
        "RLE of no segments": (deep(dicom.RLE, rle_header(0)), "decode_failed"),
        "RLE of 15 segments": (deep(dicom.RLE, rle_header(15, *range(64, 79))), "decode_failed"),
        "RLE of segments beyond its end": (deep(dicom.RLE, rle_header(2, 64, 2**31)), "truncated"),
        "RLE of segments that overlap": (deep(dicom.RLE, rle_header(2, 64, 64)), "truncated"),
    }  # fmt: skip


def many_blocks(j2k: bytes, *, precincts: bool) -> bytes:
    """Return a frame of 4000x4000 pixels in some hundred bytes, with blocks, or precincts, of 4x4 pixels."""
    side = struct.pack(">I", 4000)
    stream = bytearray(j2k)
    for at in (8, 12, 24, 28):
        stream[at : at + 4] = side
    at = stream.index(b"\xff\x52")
    length, levels = int.from_bytes(stream[at + 2 : at + 4], "big"), stream[at + 9]
    if precincts:
        stream[at + 4] |= 1
        stream[at + 2 + length : at + 2 + length] = b"\x22" * (levels + 1)
        stream[at + 2 : at + 4] = (length + levels + 1).to_bytes(2, "big")
    else:
        stream[at + 10 : at + 12] = bytes(2)
    return encapsulated(dicom.JPEG_2000, bytes(stream), pixels=DEEP, Rows=4000, Columns=4000)


def offsets_to_nowhere(small: bytes) -> bytes:
    pixels = np.stack([SHALLOW] * 2)
    data = dicom.write(dicom.mr_slice(pixels), syntax=dicom.JPEG, streams=[small, small], fragments=2)
    at = data.index(struct.pack("<HHI", 0xFFFE, 0xE000, 8)) + 12
    return data[:at] + struct.pack("<I", 12345) + data[at + 4 :]


ODD = {**odd_headers(), **odd_pixels(), **odd_streams()}


@pytest.mark.parametrize("name", ODD)
def test_odd_and_hostile_objects_have_their_outcome(name: str) -> None:
    data, wanted = ODD[name]
    limits = ScanLimits(max_pixels=64_000_000) if wanted == "bomb" else ScanLimits()
    assert outcome(data, limits) == wanted


def test_there_are_enough_of_them() -> None:
    assert len(ODD) >= 100
    assert {code for _, code in ODD.values()} == {
        "ok",
        "truncated",
        "bomb",
        "decode_failed",
        "too_small",
        "unsupported",
    }


def mutants(count: int) -> list[bytes]:
    """Return damaged objects of every transfer syntax: bytes changed, lost, put in, numbers made large, ends cut."""
    chance = random.Random(15)
    whole = [dicom.slice_file(DEEP, syntax=syntax) for syntax in dicom.LOSSLESS]
    whole += [
        dicom.slice_file(np.stack([SHALLOW] * 2), syntax=syntax) for syntax in (dicom.EXPLICIT, dicom.JPEG, dicom.RLE)
    ]
    found = []
    for _ in range(count):
        data = bytearray(chance.choice(whole))
        # near the header, in the elements before the pixels, or anywhere
        reach = chance.choice((200, 1500, len(data)))
        for _ in range(chance.choice((1, 1, 2, 8))):
            at = chance.randrange(128, min(reach, len(data)))
            how = chance.randrange(5)
            if how == 0:
                data[at] ^= 1 << chance.randrange(8)
            elif how == 1:
                data[at : at + 4] = chance.randbytes(4)
            elif how == 2:
                data[at : at + 4] = chance.choice((b"\xff" * 4, bytes(4), b"\xff\xff\xff\x7f", b"\xfe\xff\0\xe0"))
            elif how == 3:
                del data[at : at + chance.randrange(1, 64)]
            else:
                data[at:at] = chance.randbytes(chance.randrange(1, 64))
        found.append(bytes(data[: chance.randrange(130, len(data))] if chance.random() < 0.1 else data))
    return found


def test_damaged_objects_give_sound_frames_or_a_code() -> None:
    outcomes = [attempt(data, ScanLimits()) for data in mutants(2000)]
    assert sum(isinstance(found, Scan) for found in outcomes) > 200
    assert len({found.code for found in outcomes if isinstance(found, ScanRejected)}) >= 4
