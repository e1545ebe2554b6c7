"""DICOM objects as their writer would not make them: other streams, fragments, offsets and transfer syntaxes."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from tests.helpers import dicom_files as dicom
from tests.helpers.scan_corpus import picture

END = struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
"""Of a sequence, or of fragments."""


def encapsulated(syntax: str, *streams: bytes, pixels: np.ndarray | None = None, **changed: Any) -> bytes:
    """Return an object whose frames are `streams`; its header is that of `pixels`, by default 8-bit ones."""
    header = dicom.mr_slice(picture() if pixels is None else pixels, **changed)
    return dicom.write(header, syntax=syntax, streams=streams)


def pixel_element(value: bytes, *, syntax: str = dicom.JPEG, length: int = 0xFFFFFFFF, **changed: Any) -> bytes:
    """Return an 8-bit object whose element of pixels has these bytes behind its length."""
    data = syntax_of(encapsulated(dicom.JPEG, dicom.ENCODERS[dicom.JPEG](picture()), **changed), syntax.encode())
    at = data.index(struct.pack("<HH2s", 0x7FE0, 0x0010, b"OB"))
    return data[:at] + struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OB", 0, length) + value


def fragment(value: bytes, length: int | None = None) -> bytes:
    """Return an item; `length` is what it says, if that is not true."""
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(value) if length is None else length) + value


def syntax_of(data: bytes, name: bytes) -> bytes:
    """Return a file whose header names another transfer syntax."""
    at = data.index(struct.pack("<HH2s", 0x0002, 0x0010, b"UI"))
    size = int.from_bytes(data[at + 6 : at + 8], "little")
    name += bytes(len(name) % 2)
    return data[:at] + struct.pack("<HH2sH", 2, 0x10, b"UI", len(name)) + name + data[at + 8 + size :]
