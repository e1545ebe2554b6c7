"""NIfTI files written field by field after the standard, without the library that reads them."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

_CODES = {
    "u1": 2,
    "i2": 4,
    "i4": 8,
    "f4": 16,
    "c8": 32,
    "f8": 64,
    "i1": 256,
    "u2": 512,
    "u4": 768,
    "i8": 1024,
    "u8": 1280,
}
TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""The affine of a volume whose axes run to the left, posterior and to the head: columns, rows and slices as shown."""

# field -> byte, format
_FIRST = {
    "sizeof_hdr": (0, "i"), "dim": (40, "8h"), "datatype": (70, "h"), "bitpix": (72, "h"), "pixdim": (76, "8f"),
    "vox_offset": (108, "f"), "scl_slope": (112, "f"), "scl_inter": (116, "f"), "xyzt_units": (123, "B"),
    "descrip": (148, "80s"),
    "qform_code": (252, "h"), "sform_code": (254, "h"), "quatern": (256, "3f"), "qoffset": (268, "3f"),
    "srow": (280, "12f"), "magic": (344, "4s"),
}  # fmt: skip
_SECOND = {
    "sizeof_hdr": (0, "i"), "magic": (4, "8s"), "datatype": (12, "h"), "bitpix": (14, "h"), "dim": (16, "8q"),
    "pixdim": (104, "8d"), "vox_offset": (168, "q"), "scl_slope": (176, "d"), "scl_inter": (184, "d"),
    "descrip": (240, "80s"), "qform_code": (344, "i"), "sform_code": (348, "i"), "quatern": (352, "3d"),
    "qoffset": (376, "3d"), "srow": (400, "12d"), "xyzt_units": (500, "i"),
}  # fmt: skip


def write_nifti(
    volume: np.ndarray,
    affine: np.ndarray = TO_RAS,
    *,
    version: int = 1,
    order: str = "<",
    extensions: bytes = b"",
    **fields: Any,
) -> bytes:
    """Return a .nii file of `volume` [x, y, z(, ...)]; `affine` leads to mm right, anterior, up; `fields` replace."""
    layout, size = (_FIRST, 348) if version == 1 else (_SECOND, 540)
    shape = [volume.ndim, *volume.shape]
    zooms = np.linalg.norm(affine[:3, :3], axis=0)
    header = {
        "sizeof_hdr": size,
        "magic": b"n+1\0" if version == 1 else b"n+2\0\r\n\x1a\n",
        "dim": shape + [1] * (8 - len(shape)),
        "datatype": _CODES[volume.dtype.str[1:]],
        "bitpix": 8 * volume.dtype.itemsize,
        "pixdim": [1.0, *zooms, 1.0, 1.0, 1.0, 1.0],
        "vox_offset": size + 4 + len(extensions),
        "scl_slope": 1.0,
        "scl_inter": 0.0,
        "sform_code": 1,
        "srow": affine[:3].ravel().tolist(),
        **fields,
    }
    data = bytearray(size)
    for name, value in header.items():
        at, kind = layout[name]
        struct.pack_into(order + kind, data, at, *(value if isinstance(value, list | tuple) else [value]))
    pixels = volume.astype(volume.dtype.newbyteorder(order)).tobytes(order="F")
    return bytes(data) + bytes([bool(extensions), 0, 0, 0]) + extensions + pixels
