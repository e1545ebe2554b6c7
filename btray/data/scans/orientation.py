"""How slices are shown: from below and in front, as radiologists do, whichever way a scanner stored their pixels.

Directions are unit vectors in the patient's coordinates, as DICOM has them (PS3.3 C.7.6.2.1.1): to the left, posterior,
to the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from PIL import Image

from btray.data.scans.slice_info import Plane

Array = np.ndarray[Any, np.dtype[Any]]

_TOLERANCE: Final = 0.01  # of pixels that pass for square, and of directions for unit vectors at right angles
_LEFT, _POSTERIOR, _FEET = np.eye(3) * (1, 1, -1)
# Where columns and rows run to, as people see the slice; in the order in which one is chosen if two are equally near.
_VIEWS: Final[dict[Plane, tuple[Array, Array]]] = {
    "axial": (_LEFT, _POSTERIOR),
    "coronal": (_LEFT, _FEET),
    "sagittal": (_POSTERIOR, _FEET),
}


@dataclass(frozen=True)
class View:
    """How the stored pixels of a slice are turned and flipped. Nothing is interpolated."""

    plane: Plane
    normal: tuple[float, float, float]
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
        stored = np.array([across, down], np.float64)
        if stored.shape != (2, 3) or not (np.abs(stored) <= 1 + _TOLERANCE).all():
            return None
        if np.abs(stored @ stored.T - np.eye(2)).max() > _TOLERANCE:
            return None
        normal = np.cross(*stored)
        plane = max(_VIEWS, key=lambda name: round(abs(float(normal @ np.cross(*_VIEWS[name]))), 6))
        right, bottom = _VIEWS[plane]
        along = stored @ np.stack([right, bottom], axis=1)  # [stored axis, shown axis]
        transposed = bool(abs(along[0, 1]) + abs(along[1, 0]) > abs(np.trace(np.abs(along))) + _TOLERANCE)
        if transposed:
            along, stored = along[::-1], stored[::-1]
        mirrored, upside_down = bool(along[0, 0] < 0), bool(along[1, 1] < 0)
        shown = np.cross(-stored[0] if mirrored else stored[0], -stored[1] if upside_down else stored[1])
        return cls(plane, tuple(shown.tolist()), transposed, upside_down, mirrored)

    def show(self, pixels: Array) -> Array:
        """Return `pixels` [height, width] as they are shown, C-contiguous."""
        shown = pixels.T if self.transposed else pixels
        shown = shown[:: -1 if self.upside_down else 1, :: -1 if self.mirrored else 1]
        return np.ascontiguousarray(shown)

    def locate(self, point: Sequence[float]) -> float:
        """Return where a point of the slice, in mm, lies along its normal."""
        return float(np.dot(self.normal, point))


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
