"""Pixels of any kind -> gray uint8 or uint16."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageChops

from btray.data.scans.errors import ScanRejected

Array = np.ndarray[Any, np.dtype[Any]]


def to_gray(image: Image.Image) -> Array:
    """Return the gray levels [height, width] of an image: luma of colour, transparency laid on black."""
    mode = image.mode
    if mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint16)
        key = image.info.get("transparency")
        return values if key is None else np.where(values == key, np.uint16(0), values)
    if mode in ("I", "F"):
        return to_uint16(np.asarray(image))
    if mode == "CMYK":
        image = image.convert("RGB")
    elif mode in ("P", "PA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    if image.has_transparency_data:
        luma, alpha = image.convert("LA").split()
        return np.array(ImageChops.multiply(luma, alpha))
    return np.array(image if image.mode == "L" else image.convert("L"))


def to_luma(colours: Array) -> Array:
    """Return ITU-R 601 luma, with Pillow's weights, of RGB [..., 3], uint8 or uint16: equal bands stay the same."""
    red, green, blue = (colours[..., band].astype(np.uint32) for band in range(3))
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).astype(colours.dtype)


def to_uint16(values: Array, span: tuple[float, float] | None = None) -> Array:
    """Keep or shift integers that span no more than 16 bit; scale others, and floats, from their range.

    The range is that of `span`, if these are part of more values, else their own. What is not finite becomes the
    nearest end of it, NaN the lower. Raises ScanRejected if nothing is finite.
    """
    low, high = span or span_of(values)
    if values.dtype.kind in "iu" and high - low <= 0xFFFF:
        base = 0 if low >= 0 and high <= 0xFFFF else low
        shifted: Array = values.astype(np.uint16) - np.uint16(int(base) & 0xFFFF)  # modulo 2^16, which is exact
        return shifted
    half = (
        np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low) / 2
    )  # no range of doubles overflows
    return np.rint((half - low / 2) / (high / 2 - low / 2 or 1) * 0xFFFF).astype(np.uint16)


def span_of(values: Array) -> tuple[float, float]:
    """Return the least and the greatest finite value. Raises ScanRejected if there is none."""
    if values.dtype.kind == "f":
        values = values[np.isfinite(values)]
        if not values.size:
            raise ScanRejected("decode_failed", "no pixel is a finite number")
    return values.min().item(), values.max().item()
