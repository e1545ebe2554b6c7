"""The deterministic transform that training, bulk classification and serving share: gray image -> frame -> tensor.

`make_frame` gives uint8, which is what travels between processes; `to_tensor` makes floats where they are used. Both
are exact: integer look-up tables and sums, so that the same scan gives the same bits in every workload and batch.
"""

from __future__ import annotations

import base64
import hashlib
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

# What 160 pixels with a crop need; a fingerprint takes at least that.
_LEAST_DECODED = 320
# The head is looked for in a thumbnail with this longer side: fine enough for a box, and text dissolves in it.
_THUMBNAIL = 96
# A line of the thumbnail whose gray levels span less than this is border or empty background, not anatomy.
_UNIFORM_SPAN = 20
# Gray levels this far from the background belong to an object.
_OBJECT_CONTRAST = 22
# An object smaller than this share of the picture is not a head: the crop would be a guess, so there is none.
_SMALLEST_HEAD = 0.08
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
    return max(_LEAST_DECODED, 2 * config.size if config.crop else config.size)


def make_frame(gray: Gray, config: PreprocessConfig) -> Frame:
    """Crop `gray` ([height, width], uint8 or uint16) to the head, stretch its gray levels, fit it into a square.

    Returns uint8 [size, size]; the aspect ratio is kept and the rest is black.
    """
    if gray.dtype not in (np.uint8, np.uint16) or gray.ndim != 2:
        raise ValueError(f"expected a uint8 or uint16 image [height, width], got {gray.dtype} {gray.shape}")
    if config.crop:
        gray = _crop_to_head(gray, config.margin)
    percentiles = (config.low_percentile, config.high_percentile)
    return _fit(_stretch(gray, _object_histogram(gray), percentiles), config.size)


def to_tensor(frames: torch.Tensor) -> torch.Tensor:
    """Standardise each of `frames` (uint8 [n, size, size], any device) to mean 0 and deviation 1.

    Returns float32 [n, 1, size, size]. The sums are integers, so the result does not depend on the batch or device.
    """
    import torch  # the audit makes no tensor, and need not wait for it

    pixels = frames[0].numel() if len(frames) else 1
    wide = frames.flatten(1).to(torch.int64)
    mean = wide.sum(1).double() / pixels
    variance = (wide * wide).sum(1).double() / pixels - mean * mean
    scale = 1.0 / variance.clamp(min=1.0).sqrt()
    shape = (-1, 1, 1, 1)
    return (frames.unsqueeze(1).float() - mean.float().view(shape)) * scale.float().view(shape)


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


def head_pattern(dtype: np.dtype[np.unsignedinteger]) -> Gray:
    """Draw a head-like ellipse with texture on a dark ground, from integer arithmetic alone."""
    rows, columns = np.mgrid[0:211, 0:173].astype(np.int64)
    inside = (rows - 110) ** 2 * 60**2 + (columns - 88) ** 2 * 85**2 < (60 * 85) ** 2
    texture = (rows * rows + 3 * rows * columns + 7 * columns) % 97
    levels = np.where(inside, 90 + texture, (rows + columns) % 5)
    return (levels * (257 if dtype == np.uint16 else 1)).astype(dtype)


def _crop_to_head(gray: Gray, margin: float) -> Gray:
    thumbnail = _thumbnail(gray)
    inner = _strip_uniform_lines(thumbnail)
    view = thumbnail[inner.top : inner.bottom, inner.left : inner.right]
    background = _background_level(view)
    head = _largest_object(np.abs(view.astype(np.int16) - background) > _OBJECT_CONTRAST)
    if head is None:
        return _cut(gray, inner, thumbnail.shape, 0.0)
    if background > _BRIGHT:
        gray = _blacken_outside(gray, head, inner, thumbnail.shape)
    rows, columns = np.flatnonzero(head.any(1)), np.flatnonzero(head.any(0))
    return _cut(gray, _bounds(rows, columns, inner), thumbnail.shape, margin)


def _thumbnail(gray: Gray) -> Frame:
    """Shrink `gray` to at most `_THUMBNAIL` pixels, its 1st to 99th percentile stretched to 0 to 255."""
    step = max(1, round(max(gray.shape) / _THUMBNAIL))
    wide = gray if gray.dtype == np.uint8 else gray.astype(np.float32)
    small = np.asarray(Image.fromarray(wide).reduce(step)).astype(np.uint16)
    return _stretch(small, np.bincount(small.ravel()), (1, 99))


def _strip_uniform_lines(view: Frame) -> Box:
    """Return the box that is left when uniform rows and columns, whatever their gray level, are taken off all sides.

    Repeats, since a white frame hides the black one inside it. Gives the whole picture if nothing would be left.
    """
    box = Box(0, 0, *view.shape)
    while True:
        inside = view[box.top : box.bottom, box.left : box.right]
        rows = np.flatnonzero(_span(inside, axis=1) > _UNIFORM_SPAN)
        columns = np.flatnonzero(_span(inside, axis=0) > _UNIFORM_SPAN)
        if min(len(rows), len(columns)) < 8:
            return Box(0, 0, *view.shape)
        box, before = _bounds(rows, columns, box), box
        if box == before:
            return box


def _bounds(rows: npt.NDArray[np.intp], columns: npt.NDArray[np.intp], inside: Box) -> Box:
    """Return the box around `rows` and `columns`, in ascending order and counted from the corner of `inside`."""
    top, left = inside.top + int(rows[0]), inside.left + int(columns[0])
    return Box(top, left, inside.top + int(rows[-1]) + 1, inside.left + int(columns[-1]) + 1)


def _span(view: Frame, axis: int) -> npt.NDArray[np.int16]:
    """Return the gray levels between the 4th and 96th percentile of each line: a few specks do not count."""
    last = view.shape[axis] - 1
    ranks = (last * 4 // 100, last * 96 // 100)
    low, high = np.partition(view, ranks, axis=axis).take(ranks, axis=axis).swapaxes(0, axis).astype(np.int16)
    return np.asarray(high - low)


def _background_level(view: Frame) -> int:
    """Return the median gray level of the picture's corners, where no head is."""
    height, width = (max(2, side // 10) for side in view.shape)
    corners = [view[:height, :width], view[:height, -width:], view[-height:, :width], view[-height:, -width:]]
    return int(np.median(np.concatenate([corner.ravel() for corner in corners])))


def _largest_object(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_] | None:
    """Return the largest connected object, or None if it is too small to be a head.

    Opening first takes off what is thin: burned-in text, rulers, frames, and their bridges to the head.
    """
    opened = _over_neighbours(_over_neighbours(mask, np.logical_and), np.logical_or)
    labelled, count = ndimage.label(opened)
    if count == 0:
        return None
    sizes = np.bincount(labelled.ravel())[1:]
    head: npt.NDArray[np.bool_] = labelled == int(sizes.argmax()) + 1
    return head if head.mean() >= _SMALLEST_HEAD else None


def _over_neighbours(mask: npt.NDArray[np.bool_], combine: np.ufunc) -> npt.NDArray[np.bool_]:
    """Combine each pixel with its eight neighbours: erosion or dilation, 20 times as fast as SciPy's general one."""
    padded = np.pad(mask, 1)
    rows = combine(combine(padded[:-2], padded[1:-1]), padded[2:])
    return np.asarray(combine(combine(rows[:, :-2], rows[:, 1:-1]), rows[:, 2:]))


def _blacken_outside(gray: Gray, head: npt.NDArray[np.bool_], inner: Box, shape: tuple[int, ...]) -> Gray:
    mask = np.zeros(shape, np.uint8)
    # The outermost pixels of the thumbnail's head are half background: kept, they would leave a bright fringe.
    inside = _over_neighbours(ndimage.binary_fill_holes(head), np.logical_and)
    mask[inner.top : inner.bottom, inner.left : inner.right] = inside * np.uint8(255)
    height, width = gray.shape
    full = np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.BILINEAR))
    return np.where(full > 127, gray, gray.dtype.type(0))


def _cut(gray: Gray, box: Box, shape: tuple[int, ...], margin: float) -> Gray:
    """Cut `box`, given in pixels of a thumbnail of `shape`, out of `gray`, with `margin` around it."""
    vertical, horizontal = gray.shape[0] / shape[0], gray.shape[1] / shape[1]
    room = margin * max((box.bottom - box.top) * vertical, (box.right - box.left) * horizontal)
    top, bottom = max(0, int(box.top * vertical - room)), min(gray.shape[0], round(box.bottom * vertical + room))
    left, right = max(0, int(box.left * horizontal - room)), min(gray.shape[1], round(box.right * horizontal + room))
    return gray[top:bottom, left:right]


def _object_histogram(gray: Gray) -> npt.NDArray[np.int64]:
    """Count how often each gray level occurs, without the darkest 3 % of the range.

    Those are background; were they counted, the percentiles would depend on how much of it the crop left.
    """
    counts = np.array(Image.fromarray(gray).histogram()) if gray.dtype == np.uint8 else np.bincount(gray.ravel())
    occurring = np.flatnonzero(counts)
    floor = int(occurring[0]) + (int(occurring[-1]) - int(occurring[0])) * 3 // 100
    above = np.where(np.arange(len(counts)) > floor, counts, 0)
    return above if above.any() else counts


def _stretch(gray: Gray, counts: npt.NDArray[np.int64], percentiles: tuple[float, float]) -> Frame:
    """Map two `percentiles` of the histogram `counts` to black and white through a look-up table."""
    cumulative = np.cumsum(counts)
    low, high = (int(np.searchsorted(cumulative, cumulative[-1] * percentile / 100)) for percentile in percentiles)
    levels = np.arange(len(counts), dtype=np.int64)  # no level above them occurs
    table = np.clip((levels - low) * 255 // max(high - low, 1), 0, 255).astype(np.uint8)
    return np.asarray(table.take(gray))


def _fit(gray: Frame, size: int) -> Frame:
    """Resize with antialiasing so that the longer side is `size`, and centre the result on a black square."""
    height, width = gray.shape
    factor = size / max(height, width)
    new_height, new_width = max(1, round(height * factor)), max(1, round(width * factor))
    resized = Image.fromarray(np.ascontiguousarray(gray)).resize((new_width, new_height), Image.Resampling.BILINEAR)
    frame = np.zeros((size, size), np.uint8)
    top, left = (size - new_height) // 2, (size - new_width) // 2
    frame[top : top + new_height, left : left + new_width] = np.asarray(resized)
    return frame
