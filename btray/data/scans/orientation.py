"""How slices are shown: from below and in front, as radiologists do, whichever way a scanner stored their pixels.

Directions are unit vectors in the patient's coordinates, as DICOM has them (PS3.3 C.7.6.2.1.1): to the left, posterior,
to the head.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from PIL import Image

from btray.data.scans.slice_info import Plane

Array = np.ndarray[Any, np.dtype[Any]]
Vector = tuple[float, float, float]

_TOLERANCE: Final = 0.01  # of pixels that pass for square
_SKEW: Final = 0.05  # of directions that pass for unit vectors at right angles: some writers round to two digits
_LEFT, _POSTERIOR, _FEET = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, -1.0)
# Where columns and rows run to, as people see the slice; in the order in which one is chosen if two are equally near.
_VIEWS: Final[dict[Plane, tuple[Vector, Vector]]] = {
    "axial": (_LEFT, _POSTERIOR),
    "coronal": (_LEFT, _FEET),
    "sagittal": (_POSTERIOR, _FEET),
}


@dataclass(frozen=True)
class View:
    """How the stored pixels of a slice are turned and flipped. Nothing is interpolated."""

    plane: Plane
    normal: Vector
    """Of the slice as it is shown, a unit vector."""
    transposed: bool
    """Rows become columns; before they are flipped."""
    upside_down: bool
    mirrored: bool

    @classmethod
    def of(cls, across: Sequence[float], down: Sequence[float]) -> View | None:
        """Return the view of a slice whose column index grows along `across` and row index along `down`.

        Returns None unless these are unit vectors at right angles.
        """
        return _view(tuple(across), tuple(down))

    def show(self, pixels: Array) -> Array:
        """Return `pixels` [height, width] as they are shown, C-contiguous."""
        shown = pixels.T if self.transposed else pixels
        if self.upside_down or self.mirrored:
            shown = shown[:: -1 if self.upside_down else 1, :: -1 if self.mirrored else 1]
        return np.ascontiguousarray(shown)

    def locate(self, point: Sequence[float]) -> float:
        """Return where a point of the slice, in mm, lies along its normal."""
        return _dot(self.normal, point)


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _cross(a: Sequence[float], b: Sequence[float]) -> Vector:
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


@functools.lru_cache(maxsize=1024)  # the slices of a series have one
def _view(across: Sequence[float], down: Sequence[float]) -> View | None:
    if len(across) != 3 or len(down) != 3 or not all(abs(part) <= 1 + _SKEW for part in (*across, *down)):
        return None
    errors = (_dot(across, across) - 1, _dot(down, down) - 1, _dot(across, down))
    if max(map(abs, errors)) > _SKEW:
        return None
    normal = _cross(across, down)
    plane = max(_VIEWS, key=lambda name: round(abs(_dot(normal, _cross(*_VIEWS[name]))), 6))
    right, bottom = _VIEWS[plane]
    straight = abs(_dot(across, right)) + abs(_dot(down, bottom))
    transposed = abs(_dot(across, bottom)) + abs(_dot(down, right)) > straight + _TOLERANCE
    if transposed:
        across, down = down, across
    mirrored, upside_down = _dot(across, right) < 0, _dot(down, bottom) < 0
    x, y, z = _cross(across, down)
    scale = (-1 if mirrored != upside_down else 1) / math.hypot(x, y, z)
    return View(plane, (scale * x, scale * y, scale * z), transposed, upside_down, mirrored)


def square_size(shape: tuple[int, int], spacing: tuple[float, float]) -> tuple[int, int]:
    """Return [height, width] that a frame gets if its pixels, `spacing` (down, across) in mm apart, become square.

    Pixels that are square within 1 % stay as they are; others become as fine as the finer spacing.
    """
    finest = min(spacing)
    if max(spacing) <= finest * (1 + _TOLERANCE):
        return shape
    height, width = (round(side * distance / finest) for side, distance in zip(shape, spacing, strict=True))
    return height, width


def resize(pixels: Array, shape: tuple[int, int]) -> Array:
    """Return `pixels`, uint8 or uint16 [height, width], resized to `shape` in the same type."""
    if pixels.shape == shape:
        return pixels
    deep = pixels.dtype == np.uint16
    image = Image.fromarray(pixels.astype(np.float32) if deep else pixels)
    resized = np.array(image.resize(shape[::-1], Image.Resampling.BILINEAR))
    return np.rint(resized).astype(np.uint16) if deep else resized
