"""The deterministic transform that training, bulk classification and serving share: gray image -> frame -> tensor.

`make_frame` gives uint8, which is what travels between processes; `to_tensor` makes floats where they are used. Both
are exact, so that the same scan gives the same bits in every workload and batch: gray levels are integers, and only
Pillow's resizing of 16 bit computes with doubles, in one order.
"""

from __future__ import annotations

import base64
import hashlib
import math
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from btray.data.config import PreprocessConfig
from btray.data.scans import decode

if TYPE_CHECKING:
    import torch

Gray = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
Frame = npt.NDArray[np.uint8]
Levels = npt.NDArray[np.int32]

# A head fills 70 to 95 % of most pictures' shorter side: with this many pixels for one of the frame it stays sharp.
_ROOM_FOR_CROP = 4 / 3
# For every frame size up to 192, so that fingerprints do not depend on it; the many slices of 512 pixels are halved.
_LEAST_DECODED = 256
# The head is looked for in a thumbnail with this longer side: fine enough for a box, and text dissolves in it.
_THUMBNAIL = 96
# A line of the thumbnail whose gray levels span less than this is border or empty background, not anatomy.
_UNIFORM_SPAN = 20
# Gray levels this far from the background belong to an object.
_OBJECT_CONTRAST = 22
# An object smaller than this share of the picture is not a head: the crop would be a guess, so there is none.
_SMALLEST_HEAD = 0.08
# That belong to one object: beside, above and below. SciPy would make this anew for each picture.
_NEIGHBOURS = ndimage.generate_binary_structure(2, 1)
# Backgrounds above this level are white paper or an inverted picture, and are made black.
_BRIGHT = 128

# A gray JPEG of 40x40 pixels, made with libjpeg-turbo from a head-like pattern.
_TEST_JPEG = base64.b64decode(
    "/9j/2wBDABALDA4MChAODQ4SERATGCgaGBYWGDEjJR0oOjM9PDkzODdASFxOQERXRTc4UG1RV19iZ2hnPk1xeXBkeFxlZ2P/wAALCAAoACgBAREA"
    "/8QAGQAAAgMBAAAAAAAAAAAAAAAABQYBAwQC/8QALxAAAQMCBQEHAgcAAAAAAAAAAQIDEQAhBAUSMUFRBhMUInGBkRZhQmKhsbLR8P/aAAgBAQAA"
    "PwBArdluU4nMlEtAJbSYU4raeg6mOKJnsvCQrxZI5Ia46i9xWDM8mfwGtYUHmUkArSIiYiRxvQ2rsJh1YrEtspsVmCeg5PxT0y203h0NNICEpTp0"
    "kGBf7e9/U7gz3YKTrFydiN7gGfm/3FQB3zSUKRI0gQRKVW2I9VCknNcH4LHuNJu2TqbP5f8AW9qt7PgKzrDg9VfxNOSFDSO8E6BqMjYcCI3PToK6"
    "khspIUVgJc0nfck/qahJ1EJHmEeUxII229LEb2pU7UmcybuSAyNzfc0Py7FeDxzL94SfNG8Gxj7wTTq48h1rSwBoVcQZmeZq4ujEKQpSVtujdQEg"
    "H96nQrSoDzSOEEe5BBE0k51ixjMepSI0NpDaSDMgc1gopk+cKy5Wh1svMn8MwU+n9UX+qcNAOnETPCQkD4N/c0NzPPDiWlMYVvumlE6lEDUR0tt8"
    "mg1f/9k="
)


class Box(NamedTuple):
    """Rows `top:bottom` and columns `left:right`, in pixels."""

    top: int
    left: int
    bottom: int
    right: int


def decode_side(config: PreprocessConfig) -> int:
    """Return the shorter side, in pixels, below which decoding must not scale a scan down.

    A crop needs room to spare, and fingerprints must not depend on the size of a small network's frames.
    """
    return max(_LEAST_DECODED, math.ceil(config.size * (_ROOM_FOR_CROP if config.crop else 1)))


def make_frame(gray: Gray, config: PreprocessConfig) -> Frame:
    """Crop `gray` ([height, width], uint8 or uint16) to the head, fit it into a square, stretch its gray levels.

    Returns uint8 [size, size]; the aspect ratio is kept and the rest is black.
    """
    if gray.dtype not in (np.uint8, np.uint16) or gray.ndim != 2:
        raise ValueError(f"expected a uint8 or uint16 image [height, width], got {gray.dtype} {gray.shape}")
    picture = _as_picture(gray)
    box = Box(0, 0, *gray.shape)
    if config.crop:
        picture, box = _crop_to_head(picture, config.margin)
    fitted = _resize(picture, box, config.size)
    frame = np.zeros((config.size, config.size), np.uint8)
    top, left = ((config.size - side) // 2 for side in fitted.shape)
    counts = _without_background(np.bincount(fitted.ravel()))
    stretched = _stretch(fitted, counts, (config.low_percentile, config.high_percentile))
    frame[top : top + len(fitted), left : left + fitted.shape[1]] = stretched
    return frame


def to_tensor(frames: torch.Tensor) -> torch.Tensor:
    """Standardise each of `frames` (uint8 [n, size, size], any device) to mean 0 and deviation 1.

    Returns float32 [n, 1, size, size]. The sums are integers, so the result does not depend on the batch or device.
    """
    pixels = frames[0].numel() if len(frames) else 1
    images = frames.unsqueeze(1).float()
    sums = images.sum((1, 3)).double().sum(1)
    # Around 128, the squares of a row are integers that float32 holds, up to 1024 pixels: sums of 64 bit take longer.
    near = images - 128
    squares = near.mul_(near).sum((1, 3)).double().sum(1) + 256 * sums - 128**2 * pixels
    mean = sums / pixels
    variance = squares / pixels - mean * mean
    scale = 1.0 / variance.clamp(min=1.0).sqrt()
    shape = (-1, 1, 1, 1)
    return images.sub_(mean.float().view(shape)).mul_(scale.float().view(shape))


def preprocess_digest(config: PreprocessConfig) -> str:
    """Return the SHA-256 of what decoding makes of a fixed JPEG, at each scale, and preprocessing of fixed patterns.

    A bundle keeps it, and loading compares it: another library version that decodes or resizes differently is noticed.
    """
    import torch

    digest = hashlib.sha256()
    for min_side in (40, 20, 10, 5):  # whole, 1/2, 1/4 and 1/8
        digest.update(decode(_TEST_JPEG, min_side=min_side).frames[0].tobytes())
    for pattern in (head_pattern(np.dtype(np.uint8)), head_pattern(np.dtype(np.uint16))):
        frame = make_frame(pattern, config)
        digest.update(frame.tobytes())
        digest.update(to_tensor(torch.from_numpy(frame)[None]).numpy().tobytes())
    return digest.hexdigest()


@lru_cache
def preprocessing_key(config: PreprocessConfig) -> str:
    """Return what names frames that are made by these settings and these versions of libraries: 16 hexadecimal digits.

    The digest alone would not do: settings may differ that make no difference to its patterns.
    """
    return hashlib.sha256(f"{config.model_dump_json()} {preprocess_digest(config)}".encode()).hexdigest()[:16]


def head_pattern(dtype: np.dtype[np.unsignedinteger]) -> Gray:
    """Draw a head-like ellipse with texture on a dark ground, from integer arithmetic alone."""
    # large enough that a frame of the default size averages whole pixels before it interpolates
    rows, columns = np.mgrid[0:422, 0:346].astype(np.int64)
    inside = (rows - 220) ** 2 * 120**2 + (columns - 176) ** 2 * 170**2 < (120 * 170) ** 2
    texture = (rows * rows + 3 * rows * columns + 7 * columns) % 97
    levels = np.where(inside, 90 + texture, (rows + columns) % 5)
    return (levels * (257 if dtype == np.uint16 else 1)).astype(dtype)


def _as_picture(gray: Gray) -> Image.Image:
    """Return `gray` as Pillow's "L" or, since it cannot shrink 16 bit, "I": signed integers of 32 bit."""
    return Image.fromarray(np.ascontiguousarray(gray) if gray.dtype == np.uint8 else gray.astype(np.int32))


def _crop_to_head(picture: Image.Image, margin: float) -> tuple[Image.Image, Box]:
    """Return the picture, with a black ground instead of a white one, and the box of it that holds the head."""
    thumbnail = _thumbnail(picture)
    inner = _strip_uniform_lines(thumbnail)
    view = thumbnail[inner.top : inner.bottom, inner.left : inner.right]
    background = _background_level(view)
    head = _largest_object(np.abs(view - background) > _OBJECT_CONTRAST)
    if head is None:
        return picture, _in_picture(inner, thumbnail.shape, picture, 0.0)
    if background > _BRIGHT:
        picture = _blacken_outside(picture, head, inner, thumbnail.shape)
    rows, columns = np.flatnonzero(head.any(1)), np.flatnonzero(head.any(0))
    return picture, _in_picture(_bounds(rows, columns, inner), thumbnail.shape, picture, margin)


def _thumbnail(picture: Image.Image) -> Levels:
    """Shrink the picture to about `_THUMBNAIL` pixels, its 1st to 99th percentile stretched to 0 to 255."""
    small = np.asarray(picture.reduce(max(1, round(max(picture.size) / _THUMBNAIL))))
    return _stretch(small, np.bincount(small.ravel()), (1, 99))


def _strip_uniform_lines(view: Levels) -> Box:
    """Return the box that is left when uniform rows and columns, whatever their gray level, are taken off all sides.

    Repeats, since a white frame hides the black one inside it. Gives the whole picture if nothing would be left.
    """
    box = Box(0, 0, *view.shape)
    while True:
        inside = view[box.top : box.bottom, box.left : box.right]
        rows = np.flatnonzero(_span(inside) > _UNIFORM_SPAN)
        columns = np.flatnonzero(_span(inside.T) > _UNIFORM_SPAN)
        if min(len(rows), len(columns)) < 8:
            return Box(0, 0, *view.shape)
        box, before = _bounds(rows, columns, box), box
        if box == before:
            return box


def _bounds(rows: npt.NDArray[np.intp], columns: npt.NDArray[np.intp], inside: Box) -> Box:
    """Return the box around `rows` and `columns`, in ascending order and counted from the corner of `inside`."""
    top, left = inside.top + int(rows[0]), inside.left + int(columns[0])
    return Box(top, left, inside.top + int(rows[-1]) + 1, inside.left + int(columns[-1]) + 1)


def _span(lines: Levels) -> Levels:
    """Return the gray levels between the 4th and 96th percentile of each row: a few specks do not count."""
    last = lines.shape[1] - 1
    ranked = np.sort(lines, axis=1)  # 12 times as fast as for 8-bit numbers
    return ranked[:, last * 96 // 100] - ranked[:, last * 4 // 100]


def _background_level(view: Levels) -> int:
    """Return the median gray level of the picture's corners, where no head is."""
    height, width = (max(2, side // 10) for side in view.shape)
    corners = [view[:height, :width], view[:height, -width:], view[-height:, :width], view[-height:, -width:]]
    levels = np.sort(np.concatenate([corner.ravel() for corner in corners]))
    return int(levels[len(levels) // 2])


def _largest_object(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_] | None:
    """Return the largest connected object, or None if it is too small to be a head.

    Opening first takes off what is thin: burned-in text, rulers, frames, and their bridges to the head.
    """
    opened = _over_neighbours(_over_neighbours(mask, np.logical_and), np.logical_or)
    labelled, count = ndimage.label(opened, _NEIGHBOURS)
    if count == 0:
        return None
    sizes = np.bincount(labelled.ravel())[1:]
    largest = int(sizes.argmax())
    return labelled == largest + 1 if sizes[largest] >= _SMALLEST_HEAD * mask.size else None


def _over_neighbours(mask: npt.NDArray[np.bool_], combine: np.ufunc) -> npt.NDArray[np.bool_]:
    """Combine each pixel with its eight neighbours: erosion or dilation, 20 times as fast as SciPy's general one."""
    padded = np.zeros((mask.shape[0] + 2, mask.shape[1] + 2), np.bool_)
    padded[1:-1, 1:-1] = mask
    rows = combine(combine(padded[:-2], padded[1:-1]), padded[2:])
    return np.asarray(combine(combine(rows[:, :-2], rows[:, 1:-1]), rows[:, 2:]))


def _blacken_outside(
    picture: Image.Image, head: npt.NDArray[np.bool_], inner: Box, shape: tuple[int, ...]
) -> Image.Image:
    mask = np.zeros(shape, np.uint8)
    # The outermost pixels of the thumbnail's head are half background: kept, they would leave a bright fringe.
    inside = _over_neighbours(ndimage.binary_fill_holes(head), np.logical_and)
    mask[inner.top : inner.bottom, inner.left : inner.right] = inside * np.uint8(255)
    full = np.asarray(Image.fromarray(mask).resize(picture.size, Image.Resampling.BILINEAR))
    return Image.fromarray(np.asarray(picture) * (full > 127))


def _in_picture(box: Box, shape: tuple[int, ...], picture: Image.Image, margin: float) -> Box:
    """Return `box`, given in pixels of a thumbnail of `shape`, in those of the picture, with `margin` around it."""
    width, height = picture.size
    down, across = height / shape[0], width / shape[1]
    room = margin * max((box.bottom - box.top) * down, (box.right - box.left) * across)
    return Box(
        max(0, int(box.top * down - room)),
        max(0, int(box.left * across - room)),
        min(height, round(box.bottom * down + room)),
        min(width, round(box.right * across + room)),
    )


def _resize(picture: Image.Image, box: Box, size: int) -> Gray | Levels:
    """Resize what is in `box` with antialiasing so that its longer side is `size`."""
    height, width = box.bottom - box.top, box.right - box.left
    factor = size / max(height, width)
    target = max(1, round(width * factor)), max(1, round(height * factor))
    edges = (box.left, box.top, box.right, box.bottom)
    # whole multiples are averaged first, in a fraction of the time
    return np.asarray(picture.resize(target, Image.Resampling.BILINEAR, edges, reducing_gap=1.0))


def _without_background(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Take the darkest 3 % of the range out of a histogram, in place, if it has more than one level.

    Those are background; were they counted, the percentiles would depend on how much of it the crop left.
    """
    low, high = int((counts > 0).argmax()), len(counts) - 1  # the last one that `np.bincount` gives occurs
    if low < high:
        counts[: low + (high - low) * 3 // 100 + 1] = 0
    return counts


def _stretch(gray: Gray | Levels, counts: npt.NDArray[np.int64], percentiles: tuple[float, float]) -> Levels:
    """Map two `percentiles` of the histogram `counts` to 0 and 255, and what lies beyond them too."""
    cumulative = np.cumsum(counts)
    total = int(cumulative[-1])
    low, high = np.searchsorted(cumulative, [total * percentile / 100 for percentile in percentiles]).tolist()
    levels: Levels = np.clip(gray, low, high).astype(np.int32)
    levels -= low
    levels *= 255
    levels //= max(high - low, 1)
    return levels
