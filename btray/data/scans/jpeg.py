"""JPEG, strictly: libjpeg only warns of damaged data and then invents pixels; here every such warning is an error."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import simplejpeg

Array = np.ndarray[Any, np.dtype[Any]]

_MOST_MCUS = 0xFFFF  # a restart interval has 16 bits
# libjpeg-turbo's fast path does not tell of codes that do not exist; it is not taken if there are restart intervals.
_LONGEST_INTERVAL: Final = b"\xff\xdd\0\4\xff\xff"
_SOI: Final = b"\xff\xd8"
_EOI: Final = b"\xff\xd9"


def decode_gray(data: bytes, size: tuple[int, int], min_side: int | None) -> Array:
    """Decode a JPEG of 8 bit, gray or in three colours, to uint8 [height, width]; `size` is its (width, height).

    The pixels are those of Pillow's `draft("L", (min_side, min_side))`. Raises ValueError if the data is damaged.
    """
    largest = min(size) // min_side if min_side else 1
    scale = next((scale for scale in (8, 4, 2) if scale <= largest), 1)
    width, height = (-(-side // scale) for side in size) if scale > 1 else (0, 0)
    gray: Array = simplejpeg.decode_jpeg(_strict(data, size), "GRAY", min_height=height, min_width=width)
    return gray[..., 0]


def check_jpeg(data: bytes, tables: bytes = b"") -> None:
    """Raise ValueError if the pixels of a JPEG of 8 bit are damaged.

    `tables` are the tables that a TIFF keeps apart from its strips: a JPEG stream (tag 347) without pixels.
    """
    data = tables.removesuffix(_EOI) + data[len(_SOI) :] if tables else data
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    simplejpeg.decode_jpeg(
        _strict(data, (int(width), int(height))),
        "CMYK" if colours in ("CMYK", "YCCK") else "GRAY",
        min_height=1,
        min_width=1,
    )


def _strict(data: bytes, size: tuple[int, int]) -> bytes:
    """Return a JPEG that decodes to the same pixels, and in which libjpeg-turbo notices every damage that it can."""
    mcus = -(-size[0] // 8) * -(-size[1] // 8)
    if mcus > _MOST_MCUS or _LONGEST_INTERVAL[:4] in data:
        return data
    return data[: len(_SOI)] + _LONGEST_INTERVAL + data[len(_SOI) :]
