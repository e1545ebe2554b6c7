"""Copies that show the same image by construction: the ground truth for the duplicates that the audit must find."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

Gray = npt.NDArray[np.uint8]


def encode(image: Image.Image | np.ndarray, kind: str = "PNG", **options: int) -> bytes:
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, kind, **options)
    return stream.getvalue()


def _rescaled(gray: Gray, factor: float) -> Image.Image:
    size = (round(gray.shape[1] * factor), round(gray.shape[0] * factor))
    return Image.fromarray(gray).resize(size, Image.Resampling.BICUBIC)


def _levels(gray: Gray, gain: float, offset: float) -> Gray:
    return np.clip(gray * gain + offset, 0, 255).round().astype(np.uint8)


def _cropped(gray: Gray, share: float) -> Gray:
    down, right = round(gray.shape[0] * share), round(gray.shape[1] * share)
    return gray[down:-down, right:-right]


def _padded(gray: Gray, white: int) -> Image.Image:
    height, width = gray.shape
    return ImageOps.expand(Image.fromarray(gray), (width // 20, height // 12, width // 14, height // 20), white)


COPIES: dict[str, Callable[[Gray], bytes]] = {
    "original": encode,
    "recompressed": lambda gray: encode(gray, "JPEG", quality=50),
    "smaller": lambda gray: encode(_rescaled(gray, 0.6)),
    "larger, recompressed": lambda gray: encode(_rescaled(gray, 1.7), "JPEG", quality=80),
    "mirrored": lambda gray: encode(gray[:, ::-1]),
    "upside down": lambda gray: encode(gray[::-1], "JPEG", quality=85),
    "turned left": lambda gray: encode(np.rot90(gray)),
    "turned right, smaller": lambda gray: encode(np.rot90(_rescaled(gray, 0.8), 3), "JPEG", quality=85),
    "transposed": lambda gray: encode(gray.T, "BMP"),
    "duller": lambda gray: encode(_levels(gray, 0.85, 8)),
    "brighter": lambda gray: encode(_levels(gray, 1.1, 4), "JPEG", quality=85),
    "cropped": lambda gray: encode(_cropped(gray, 0.01)),
    "padded black": lambda gray: encode(_padded(gray, 0)),
    "padded white": lambda gray: encode(_padded(gray, 255), "JPEG", quality=90),
    "in colour": lambda gray: encode(Image.fromarray(gray).convert("RGB")),
    "deep": lambda gray: encode(gray.astype(np.uint16) * 257),
    "as TIFF": lambda gray: encode(gray, "TIFF"),
}
"""Ways to copy an image, by name: gray picture -> encoded copy."""
# If the head reaches the edge, or noise hides the picture's border, these shift the area that is compared.
REFRAMED = ("cropped", "padded white", "padded black")
SAME_PIXELS = ("original", "in colour", "as TIFF")


def recall_and_precision(
    sources: Sequence[int], groups: Sequence[int], correlate: Callable[[int, int], float]
) -> tuple[float, float, list[tuple[int, int]]]:
    """Return recall and precision over all pairs of files, and the wrong pairs.

    `sources` gives the image that each file is a copy of, `groups` the group that the audit assigned (negative: none).
    Wrong pairs with a correlation from 0.97 to 0.995 are borderline and not scored.
    """
    hits, missed, false = 0, [], []
    for a, b in combinations(range(len(sources)), 2):
        true, grouped = sources[a] == sources[b], groups[a] == groups[b] >= 0
        if true and grouped:
            hits += 1
        elif true != grouped and not 0.97 <= correlate(a, b) < 0.995:
            (missed if true else false).append((a, b))
    return hits / (hits + len(missed)), hits / (hits + len(false)), missed + false
