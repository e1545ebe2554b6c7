"""Images that are not MRI slices of a head: photographs, pages, noise, blank frames, CT of other body parts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image, ImageDraw
from scipy import ndimage
from sklearn.datasets import load_sample_images

Gray = np.ndarray


def strange_images(seed: int = 0) -> dict[str, list[Gray]]:
    """Return gray uint8 images [height, width] by kind."""
    rng = np.random.default_rng(seed)
    return {
        "photograph": list(_photographs(rng)),
        "scanned page": [np.asarray(Image.fromarray(skimage.data.page())), *(_page(rng) for _ in range(12))],
        "CT of the trunk": [_trunk(rng) for _ in range(12)],
        "noise": [_noise(rng) for _ in range(12)],
        "blank": [
            np.full((size, size), level, np.uint8) for size, level in ((256, 0), (512, 0), (200, 128), (300, 255))
        ],
    }


def _photographs(rng: np.random.Generator) -> Iterator[Gray]:
    shipped = Path(skimage.data.__file__).parent
    pictures = [Image.open(shipped / f"{name}.png") for name in ("astronaut", "camera", "coffee", "coins", "chelsea")]
    pictures += [Image.open(shipped / "rocket.jpg"), *(Image.fromarray(image) for image in load_sample_images().images)]
    for picture in pictures:
        gray = np.asarray(picture.convert("L"))
        yield gray
        edge = min(gray.shape) * 2 // 3
        for _ in range(2):
            top, left = (int(rng.integers(0, side - edge + 1)) for side in gray.shape)
            yield gray[top : top + edge, left : left + edge]


def _page(rng: np.random.Generator) -> Gray:
    page = Image.new("L", (420, 560), 255)
    draw = ImageDraw.Draw(page)
    for y in range(30, 530, 14):
        words = ("".join(map(chr, rng.integers(97, 123, rng.integers(2, 10)))) for _ in range(rng.integers(3, 9)))
        draw.text((30, y), " ".join(words), fill=int(rng.integers(0, 70)))
    return np.asarray(page)


def _trunk(rng: np.random.Generator) -> Gray:
    """Return an axial slice of a chest (even draws) or abdomen: wall, lungs or organs, spine, table."""
    y, x = np.mgrid[0:512, 0:512] - 256.0
    wide, high = rng.uniform(190, 235), rng.uniform(120, 165)

    def ellipse(cx: float, cy: float, a: float, b: float) -> Gray:
        return np.asarray(((x - cx) / a) ** 2 + ((y - cy) / b) ** 2 < 1)

    image = np.where(ellipse(0, 0, wide, high), 90.0, 0.0)
    image[ellipse(0, 0, wide * 0.92, high * 0.9)] = 120
    organ = 12 if rng.uniform() < 0.5 else 150
    for side in (-1, 1):
        image[ellipse(side * wide * 0.45, -high * 0.1, wide * 0.3, high * rng.uniform(0.5, 0.65))] = organ
    image[ellipse(0, high * 0.62, 26, 24)] = 225
    image[(np.abs(y - high - 25) < 4) & (np.abs(x) < 230)] = 70
    return np.clip(ndimage.gaussian_filter(image, 1.5) + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)


def _noise(rng: np.random.Generator) -> Gray:
    size = int(rng.integers(120, 512))
    level, spread = rng.uniform(60, 190), rng.uniform(10, 80)
    return np.clip(rng.normal(level, spread, (size, size)), 0, 255).astype(np.uint8)
