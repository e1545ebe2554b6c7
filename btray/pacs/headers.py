"""What a PACS says of an instance in JSON, as the same facts that its file gives: no pixels are retrieved."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, Final

from btray.data.scans import ScanRejected, SliceInfo
from btray.data.scans.dicom import read_slice_info
from btray.pacs.address import Metadata

_TEXTS: Final = frozenset(["AE", "AS", "CS", "DA", "DS", "DT", "IS", "LO", "LT", "SH", "ST", "TM", "UI"])
_LONG_TEXTS: Final = frozenset(["UC", "UR", "UT"])
_NUMBERS: Final = {"US": "H", "SS": "h", "UL": "I", "SL": "i", "FL": "f", "FD": "d"}
_PATIENT, _PIXELS = "0010", 0x7FE00010
_MOST_BYTES: Final = 16 << 20


def slice_info(metadata: Metadata) -> SliceInfo | ScanRejected:
    """Return what the header of an instance says of its first frame, or what is wrong with it."""
    try:
        return read_slice_info(encode(metadata) + _element(_PIXELS, b"OW", b"", long=True), _MOST_BYTES)
    except ScanRejected as error:
        return error


def encode(metadata: Metadata) -> bytes:
    """Return elements in explicit VR, little endian; without the patient's, and those whose values are not given."""
    elements = []
    for tag in sorted(metadata):
        element = metadata[tag]
        if isinstance(element, Mapping) and not tag.startswith(_PATIENT) and tag < f"{_PIXELS:08X}":
            value = _value(str(element.get("vr")), element.get("Value") or [])
            if value is not None:
                vr = str(element["vr"])
                elements.append(_element(int(tag, 16), vr.encode(), value, long=vr == "SQ" or vr in _LONG_TEXTS))
    return b"".join(elements)


def _value(vr: str, values: list[Any]) -> bytes | None:
    if vr == "SQ":
        items = [encode(item) for item in values]
        return b"".join(struct.pack("<HHI", 0xFFFE, 0xE000, len(item)) + item for item in items)
    if vr in _NUMBERS:
        return struct.pack(f"<{len(values)}{_NUMBERS[vr]}", *values)
    if vr not in _TEXTS | _LONG_TEXTS:
        return None
    text = "\\".join("" if value is None else str(value) for value in values).encode()
    text += b" " * (len(text) % 2)
    return text if vr in _LONG_TEXTS or len(text) < 1 << 16 else None


def _element(tag: int, vr: bytes, value: bytes, *, long: bool) -> bytes:
    head = struct.pack("<HH2s", tag >> 16, tag & 0xFFFF, vr)
    return head + (struct.pack("<HI", 0, len(value)) if long else struct.pack("<H", len(value))) + value
