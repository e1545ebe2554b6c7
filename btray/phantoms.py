"""Deterministic phantom MRI slices of five classes: the data of the demo and of many tests, which need no download.

A phantom is a cartoon of a slice, not a simulation of one: what a network learns on it says that the machinery works
and nothing about patients. The class shows only in place, size, number, texture and rim of the lesions; pose,
sequence, contrast, bias field, noise, distractors, frame size and file encoding are drawn independently of it.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from btray import storage
from btray.core.errors import UserError
from btray.data.labels import CANONICAL

CLASSES = CANONICAL
SPLITS = ("Training", "Testing")
# Heights and widths of common exports, with a rest that is drawn freely.
FRAMES = ((512, 512), (256, 256), (225, 225), (236, 236), (218, 180), (350, 350), (442, 442), (300, 240), (201, 251))
SIDES = (180, 512)
# Anatomy is drawn at this many pixels a side at most and enlarged; noise and text are drawn at full size.
DRAWN_SIDE = 160
WRITERS = 4

Field = npt.NDArray[np.float32]
Rng = np.random.Generator


def phantom(label: str, seed: int, *, size: int | tuple[int, int] | None = None) -> npt.NDArray[np.uint8]:
    """Return one slice, uint8 [height, width]; the same arguments give the same bytes.

    `size` is the edge, or (height, width), in pixels, at least 16; default: the seed chooses between 180 and 512.
    The same seed draws the same head for every label, with another lesion. Raises `ValueError` for an unknown label.
    """
    if label not in CLASSES:
        raise ValueError(f"phantom label {label!r} is none of {', '.join(CLASSES)}")
    # One stream each, so that what the lesion draws does not shift what the head draws.
    of_frame, of_head, of_lesion, of_scanner = (np.random.default_rng([seed, stream]) for stream in range(4))
    drawn_size = _frame_size(of_frame)
    height, width = drawn_size if size is None else (size, size) if isinstance(size, int) else size
    head = Head(of_head, height, width)
    if label in _LESIONS:  # no_tumor has none
        _LESIONS[label](head, of_lesion)
    return _decorate(_scan(head, of_scanner, height, width), of_frame)


def write_data_set(uri: str, *, per_class: Mapping[str, int] | int, seed: int) -> None:
    """Write phantoms as JPEG below `uri` (local or s3://) in the folders `Training/<label>/` and `Testing/<label>/`.

    `per_class` is the number of images of each class: by split folder (`{"Training": 300, "Testing": 80}`), or one
    number for Training, and a quarter of it for Testing. The same seed gives the same files. Raises `UserError` for
    another split, `storage.StorageError` if the files cannot be written.
    """
    counts = {"Training": per_class, "Testing": max(1, per_class // 4)} if isinstance(per_class, int) else per_class
    unknown = set(counts) - set(SPLITS)
    if unknown:
        raise UserError(f"per_class has the key {sorted(unknown)[0]!r}; it takes {' and '.join(SPLITS)}")

    def write(item: tuple[int, int, int]) -> None:
        split, label, index = item
        image_seed = np.random.SeedSequence([seed, *item]).generate_state(1, np.uint64)[0]
        file = storage.join(uri, SPLITS[split], CLASSES[label], f"{index:05d}.jpg")
        storage.write_bytes(file, encoded_phantom(CLASSES[label], int(image_seed)))

    with ThreadPoolExecutor(WRITERS) as pool:
        for split, name in enumerate(SPLITS):
            items = product([split], range(len(CLASSES)), range(counts.get(name, 0)))
            list(pool.map(write, items))  # raises what a writer raised


def encoded_phantom(label: str, seed: int) -> bytes:
    """Return a slice as JPEG of varying quality, one in four as RGB with gray content, as in public data sets."""
    rng = np.random.default_rng([seed, 4])
    mode = "RGB" if rng.random() < 0.25 else "L"
    stream = io.BytesIO()
    Image.fromarray(phantom(label, seed)).convert(mode).save(stream, "JPEG", quality=int(rng.integers(55, 96)))
    return stream.getvalue()


def _frame_size(rng: Rng) -> tuple[int, int]:
    if rng.random() < 0.7:
        return FRAMES[rng.integers(len(FRAMES))]
    height, width = rng.integers(SIDES[0], SIDES[1] + 1, 2)
    # No head is twice as wide as high.
    return int(height), int(np.clip(width, max(SIDES[0], 0.7 * height), min(SIDES[1], 1.4 * height)))


class Tissue(NamedTuple):
    """Brightness of each tissue in one MRI sequence; 1 is white."""

    csf: float
    gray: float
    white: float
    fat: float
    bone: float
    solid: float  # homogeneous tumour
    rim: float  # edge of a ring-enhancing lesion
    necrosis: float  # its inside
    edema: float  # its surroundings
    vessel: float


SEQUENCES = (
    # T1 with contrast medium, T2, FLAIR, with their shares below
    Tissue(0.14, 0.42, 0.55, 0.85, 0.05, 0.88, 0.95, 0.18, 0.33, 0.95),
    Tissue(0.95, 0.58, 0.42, 0.70, 0.08, 0.74, 0.22, 0.92, 0.78, 0.08),
    Tissue(0.10, 0.55, 0.43, 0.65, 0.06, 0.80, 0.88, 0.24, 0.74, 0.70),
)
SEQUENCE_SHARES = (0.7, 0.15, 0.15)


class Head:
    """A slice while it is drawn: brightness on a grid, and the coordinates of the head on the same grid.

    In head coordinates the skull is near the unit circle, x runs to the right, y down; `radius` is 1 on the skull.
    `brain` is 1 inside the brain, 0 outside; `brain_edge` is the radius at its surface. `contrast` is that of lesions,
    as a share of what `tissue` says.
    """

    def __init__(self, rng: Rng, height: int, width: int) -> None:
        """Draw a head without a lesion, for a frame of `height` and `width` pixels."""
        shrink = min(1.0, DRAWN_SIDE / max(height, width))
        self.shape = max(16, round(height * shrink)), max(16, round(width * shrink))
        sequence = SEQUENCES[rng.choice(len(SEQUENCES), p=SEQUENCE_SHARES)]
        # No two scanners weigh tissues alike.
        varied = np.clip(np.array(sequence) + rng.normal(0, 0.04, len(sequence)), 0.02, 1.0)
        tissue = self.tissue = Tissue(*varied.tolist())
        self.x, self.y = _head_coordinates(rng, *self.shape)
        self.radius = _length(self.x, self.y)
        angle = np.arctan2(self.y, self.x)
        for order, amount in ((2, 0.05), (3, 0.035), (5, 0.02)):
            self.radius *= 1 + rng.uniform(0, amount) * np.cos(order * angle + rng.uniform(0, 6.3))
        self.brain_edge = rng.uniform(0.78, 0.86)
        self.brain = _edge(self.radius, self.brain_edge, 0.04)
        self.canvas = np.full(self.shape, rng.uniform(0, 0.03), np.float32)
        self.contrast = rng.uniform(0.7, 1.0)
        self.paint(_edge(self.radius, 1.0, 0.03), tissue.fat)
        self.paint(_edge(self.radius, rng.uniform(0.92, 0.97), 0.03), tissue.bone)
        self.paint(_edge(self.radius, self.brain_edge + rng.uniform(0.015, 0.05), 0.03), tissue.csf)
        _draw_brain(self, angle, rng)
        _draw_ventricles(self, rng)
        _draw_distractors(self, rng)

    def paint(self, mask: Field, brightness: float, strength: float = 1.0) -> None:
        """Blend `brightness` in, by `mask` (0 to 1) times `strength`."""
        self.canvas += strength * mask * (np.float32(brightness) - self.canvas)

    def distance(self, x: float, y: float) -> Field:
        """Return the distance of each pixel from a point, in head coordinates."""
        return _length(self.x - np.float32(x), self.y - np.float32(y))

    def noise(self, rng: Rng, cells: int) -> Field:
        """Return Gaussian noise of about unit variance with features of 1/`cells` of the grid."""
        return _resized(rng.standard_normal((cells, cells), dtype=np.float32), *self.shape) * np.float32(1.3)


def _length(x: Field, y: Field) -> Field:
    """Return sqrt(x^2 + y^2); `np.hypot` guards against overflow and takes five times as long."""
    return np.sqrt(x * x + y * y)


def _edge(value: Field, limit: float, softness: float) -> Field:
    """Return 1 where `value` is below `limit`, 0 above, with a linear ramp as wide as `softness`."""
    return np.clip((np.float32(limit) - value) / np.float32(softness) + np.float32(0.5), 0, 1)


def _resized(field: Field, height: int, width: int) -> Field:
    return np.asarray(Image.fromarray(field).resize((width, height), Image.Resampling.BICUBIC))


def _head_coordinates(rng: Rng, rows: int, columns: int) -> tuple[Field, Field]:
    """Return the grid's coordinates in a head that is turned, shifted, scaled and stretched."""
    down, right = np.mgrid[0:rows, 0:columns].astype(np.float32)
    half = min(rows, columns) / 2
    right = (right - columns / 2) / half - rng.uniform(-0.12, 0.12)
    down = (down - rows / 2) / half - rng.uniform(-0.12, 0.12)
    turn = rng.normal(0, np.deg2rad(9))
    scale, aspect = rng.uniform(0.72, 0.98), rng.uniform(0.80, 1.0)
    x = (np.cos(turn) * right + np.sin(turn) * down) / (scale * aspect)
    y = (-np.sin(turn) * right + np.cos(turn) * down) / scale
    return x.astype(np.float32), y.astype(np.float32)


def _draw_brain(head: Head, angle: Field, rng: Rng) -> None:
    folds = head.noise(rng, int(rng.integers(14, 22)))
    head.paint(head.brain, head.tissue.gray)
    ripple = np.float32(0.04) * np.sin(angle * int(rng.integers(9, 17)) + np.float32(rng.uniform(0, 6.3)))
    depth = head.radius + np.float32(0.07) * folds + ripple
    head.paint(_edge(depth, head.brain_edge - rng.uniform(0.12, 0.22), 0.08), head.tissue.white)
    # Sulci: the zero lines of the folds, near the surface.
    sulci = _edge(np.abs(folds), 0.12, 0.25) * _edge(-head.radius, -0.55, 0.2) * head.brain
    head.paint(sulci, head.tissue.csf, rng.uniform(0.2, 0.8))
    fissure = _edge(np.abs(head.x + np.float32(0.02) * folds), 0.012, 0.03) * _edge(-np.abs(head.y), -0.3, 0.1)
    head.paint(fissure * head.brain, head.tissue.csf, 0.7)
    for side in (-1, 1):  # basal ganglia
        nucleus = _length((head.x - np.float32(side * 0.27)) / np.float32(0.10), (head.y + 0.02) / np.float32(0.19))
        head.paint(_edge(nucleus, 1, 0.5), head.tissue.gray, 0.8)
    head.canvas += np.float32(rng.uniform(0.01, 0.03)) * head.noise(rng, 48) * head.brain


def _draw_ventricles(head: Head, rng: Rng) -> None:
    widening, length = rng.uniform(0.5, 1.7), rng.uniform(0.7, 1.3)
    for side in (-1, 1):
        lean = rng.uniform(0.15, 0.45) * side
        x, y = head.x - np.float32(side * 0.11), head.y + np.float32(0.06)
        across, along = x - np.float32(lean) * np.abs(y), y
        own = widening * rng.uniform(0.85, 1.15)
        horn = _length(across / np.float32(0.055 * own), along / np.float32(0.26 * length))
        head.paint(_edge(horn, 1, 0.3), head.tissue.csf)


def _draw_distractors(head: Head, rng: Rng) -> None:
    """Draw what every class has and no lesion is: gland, vessels, sinus, eyes, white-matter spots, cysts."""
    tissue = head.tissue
    head.paint(_edge(head.distance(rng.normal(0, 0.02), rng.normal(0.42, 0.03)), 0.045, 0.03), tissue.solid, 0.5)
    for _ in range(rng.integers(2, 8)):
        head.paint(_edge(head.distance(*_place(rng, 0.75)), rng.uniform(0.012, 0.028), 0.02), tissue.vessel, 0.9)
    head.paint(_edge(head.distance(0, rng.choice((-1, 1)) * head.brain_edge), 0.045, 0.03), tissue.vessel, 0.9)
    if rng.random() < 0.3:
        for side in (-1, 1):
            eye = head.distance(side * rng.uniform(0.34, 0.40), -0.80)
            head.paint(_edge(eye, 0.15, 0.03), tissue.csf)
            head.paint(_edge(np.abs(eye - np.float32(0.15)), 0.015, 0.02), tissue.fat)
    if rng.random() < 0.35:
        for _ in range(rng.integers(1, 5)):
            head.paint(_edge(head.distance(*_place(rng, 0.55)), 0.05, rng.uniform(0.06, 0.10)), tissue.edema, 0.6)
    if rng.random() < 0.12:
        turn = rng.uniform(0, 2 * np.pi)
        cyst = head.distance(0.72 * np.cos(turn), 0.72 * np.sin(turn))
        head.paint(_edge(cyst, rng.uniform(0.08, 0.18), 0.03) * head.brain, tissue.csf)


def _place(rng: Rng, reach: float) -> tuple[float, float]:
    """Draw a point evenly from a disc around the centre of the head."""
    turn, away = rng.uniform(0, 2 * np.pi), reach * np.sqrt(rng.uniform())
    return float(away * np.cos(turn)), float(away * np.sin(turn))


def _draw_glioma(head: Head, rng: Rng) -> None:
    """Draw one large, irregular, infiltrating mass: ragged ring, necrotic centre, wide edema."""
    middle = head.distance(*_place(rng, 0.5)) / np.float32(rng.uniform(0.20, 0.40))
    ragged = middle + np.float32(0.22) * head.noise(rng, 9)
    patchy = np.clip(0.75 + 0.35 * head.noise(rng, 14), 0.2, 1).astype(np.float32)
    spread = ragged + np.float32(0.25) * head.noise(rng, 6)
    head.paint(_edge(spread, rng.uniform(1.4, 1.9), 0.5) * head.brain, head.tissue.edema, 0.8 * head.contrast)
    head.paint(_edge(ragged, 1, 0.15) * patchy * head.brain, head.tissue.rim, head.contrast)
    head.paint(_edge(ragged, rng.uniform(0.55, 0.75), 0.2) * head.brain, head.tissue.necrosis, 0.9)


def _draw_meningioma(head: Head, rng: Rng) -> None:
    """Draw one round, homogeneous mass that sits with a broad base on the dura."""
    size, turn = rng.uniform(0.14, 0.30), rng.uniform(0, 2 * np.pi)
    away = head.brain_edge - rng.uniform(0.55, 0.85) * size
    mass = head.distance(away * np.cos(turn), away * np.sin(turn)) / np.float32(size)
    mass += np.float32(0.05) * head.noise(rng, 7)
    inside = _edge(head.radius, head.brain_edge + 0.02, 0.03)
    head.paint(_edge(mass, 1.25, 0.3) * inside, head.tissue.edema, rng.uniform(0, 0.6))
    head.paint(_edge(mass, 1, 0.12) * inside, head.tissue.solid, head.contrast)


def _draw_adenoma(head: Head, rng: Rng) -> None:
    """Draw one small mass in the midline at the sella, some with a waist where they grow upwards."""
    x, y = rng.normal(0, 0.025), rng.normal(0.42, 0.035)
    size = rng.uniform(0.10, 0.17)
    mass = _length((head.x - np.float32(x)) / np.float32(rng.uniform(0.85, 1.2)), head.y - np.float32(y))
    mass = mass / np.float32(size) + np.float32(0.06) * head.noise(rng, 9)
    above = head.distance(x, y - 1.15 * size) / np.float32(size * rng.uniform(0.4, 0.8))
    head.paint(np.maximum(_edge(mass, 1, 0.15), _edge(above, 1, 0.2)), head.tissue.solid, head.contrast)


def _draw_metastases(head: Head, rng: Rng) -> None:
    """Draw several small round lesions with a thin even ring, scattered, none in another."""
    placed: list[tuple[float, float, float]] = []
    count = rng.integers(3, 8)
    for _ in range(40):  # attempts: the last ones may find no room
        x, y = _place(rng, 0.68)
        size = rng.uniform(0.07, 0.12)
        if all(np.hypot(x - a, y - b) > 1.3 * (size + c) for a, b, c in placed):
            placed.append((x, y, size))
        if len(placed) == count:
            break
    for x, y, size in placed:
        spot = head.distance(x, y)
        head.paint(_edge(spot, size * 1.6, size) * head.brain, head.tissue.edema, 0.6 * head.contrast)
        head.paint(_edge(spot, size, 0.02), head.tissue.rim, head.contrast)
        head.paint(_edge(spot, size * rng.uniform(0.45, 0.6), 0.02), head.tissue.necrosis, 0.9)


_LESIONS = {
    "glioma": _draw_glioma,
    "meningioma": _draw_meningioma,
    "pituitary": _draw_adenoma,
    "metastasis": _draw_metastases,
}


def _scan(head: Head, rng: Rng, height: int, width: int) -> npt.NDArray[np.uint8]:
    """Return the slice as coil, resolution, noise, gray curve and window of a scanner show it."""
    rows, columns = head.shape
    bias = 1 + np.float32(rng.uniform(0, 0.3)) * np.clip(head.noise(rng, 3), -2, 2)
    signal = np.clip(head.canvas, 0, 1.2) * np.clip(bias, 0.3, 1.8)
    # Resolution lost: a coarser grid in between.
    coarse = rng.uniform(0.6, 1.0)
    signal = _resized(_resized(signal, max(8, round(rows * coarse)), max(8, round(columns * coarse))), height, width)
    # The magnitude of a complex signal with Gaussian noise in both parts is Rician. Both parts come from one row of
    # numbers, `shift` apart: drawing them is what takes longest here.
    shift = 997
    noise = rng.standard_normal(height * width + shift, dtype=np.float32) * np.float32(rng.uniform(0.01, 0.045))
    signal = _length(signal + noise[shift:].reshape(height, width), noise[:-shift].reshape(height, width))
    gamma, white = rng.uniform(0.75, 1.3), rng.uniform(0.85, 1.3)
    curve = 255 * np.clip(np.linspace(0, 2, 1024) / white, 0, 1) ** gamma
    level = np.clip(signal * np.float32(511.5), 0, 1023).astype(np.uint16)
    return curve.round().astype(np.uint8).take(level)


def _decorate(frame: npt.NDArray[np.uint8], rng: Rng) -> npt.NDArray[np.uint8]:
    """Put a white border on some frames, burned-in text on some."""
    height, width = frame.shape
    if rng.random() < 0.06:
        thick = max(1, round(min(height, width) * rng.uniform(0.005, 0.03)))
        frame[:thick], frame[-thick:], frame[:, :thick], frame[:, -thick:] = 255, 255, 255, 255
    if rng.random() < 0.1:
        image = Image.fromarray(frame)
        text = f"{'LRAP'[rng.integers(4)]} {rng.integers(1, 200)}"
        corner = (int(rng.choice((4, max(4, width - 40)))), int(rng.choice((4, max(4, height - 16)))))
        # The built-in bitmap font: the same pixels whatever fonts and libraries the machine has.
        font = ImageFont.load_default_imagefont()
        ImageDraw.Draw(image).text(corner, text, fill=int(rng.integers(180, 256)), font=font)
        frame = np.array(image)
    return frame
