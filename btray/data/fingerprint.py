"""What tells two files that show the same image: thumbnails, their correlation, and a fingerprint to find and store.

Same image means: the 48 x 48 gray thumbnails correlate by at least `SAME_IMAGE` in the best of 8 orientations
(mirrored, turned by 90 degrees), taken of the whole picture, of the box around all that is not dark, or of that box
within a uniform bright border, a white one say.

A fingerprint holds the low frequencies of these thumbnails' discrete cosine transform without their signs and without
telling rows from columns. So it is the same for all 8 orientations, shows no picture of a patient, and never lies
further from another one than the thumbnails lie apart: correlation r means a distance of at most sqrt(2 - 2r).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt
from PIL import Image

from btray.data.preprocess import Gray

SAME_IMAGE = 0.99
"""Least correlation of thumbnails that show the same image."""
SAME_FINGERPRINT = 0.05
"""Largest distance of fingerprints taken for the same image if the pictures are not at hand.

On the 5.3 million pairs of the public data set it parts those that correlate by 0.995 and more (at most 0.039) from
those below 0.97 (at least 0.061).
"""
ALIKE = 0.1
"""Largest distance of fingerprints that are of one patient all but surely: of the same image, or neighbouring slices.

Of the pairs below it in 1846 slices of named patients 98 % are of one patient; below 0.18 it is less than half, for
heads look alike. Most slices of a patient lie further apart: what is not alike may be one patient all the same.
"""
VIEWS = 3
"""Thumbnails taken of an image."""
LENGTH = 143
"""Numbers in the fingerprint of one thumbnail."""

SHORT = 32
"""Numbers in the short fingerprint of a view; only the first view and the last one have one.

Of 2247 real slices, compared with 2870 others, they find the 265 twins that whole ones find, and 1 more; with 24
numbers 5 more, with 16 numbers 69."""

NO_FINGERPRINT = bytes(2 * VIEWS * LENGTH)
"""The packed fingerprint of what shows nothing; it is like no other."""

_STEPS = 255  # of 1, the largest number, in a short fingerprint

_SIDE = 48
_FREQUENCIES = 12
# Thumbnails are taken of a picture at most about this large: box averaging makes finer detail count for nothing.
_WORKING_SIDE = 8 * _SIDE
# What is darker than this share of the white level (the 99th percentile) is background.
_DARK = 0.2
# A row or column with no more bright pixels than this share holds specks and letters, no anatomy.
_SPECKS = 0.04
_SMALLEST_PART = 8
# A line at the side whose gray levels span less than this belongs to a border.
_UNIFORM = 20
# A thumbnail whose gray levels deviate less than this is blank; what correlates there is noise.
_BLANK = 1.0

Thumbnails = npt.NDArray[np.uint8]
Fingerprints = npt.NDArray[np.float16]
ShortFingerprints = npt.NDArray[np.uint8]


def thumbnails(gray: Gray) -> Thumbnails:
    """Return uint8 [VIEWS, 48, 48] of a gray image: all of it, its bright part, and that within a bright border."""
    small = reduced(gray)
    bright = _bright_part(small)
    inner = _without_bright_border(bright)
    unframed = bright if inner.shape == bright.shape else _bright_part(inner)
    views = (Image.fromarray(np.ascontiguousarray(view)) for view in (small, bright, unframed))
    return np.stack([np.asarray(view.resize((_SIDE, _SIDE), Image.Resampling.BOX)) for view in views])


def reduced(gray: Gray) -> npt.NDArray[np.uint8]:
    """Return `gray` as uint8, over its own range if it is deeper, box-averaged to sides below 768 pixels.

    All that is looked at in a thumbnail is left; what is reduced already stays as it is.
    """
    if gray.dtype != np.uint8:
        low, high = int(gray.min()), int(gray.max())
        gray = ((gray.astype(np.float32) - low) * (255.0 / max(high - low, 1))).astype(np.uint8)
    factors = tuple(max(1, side // _WORKING_SIDE) for side in reversed(gray.shape))
    return np.asarray(Image.fromarray(gray).reduce(factors))


def representative(frames: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Return the frame by which a scan of several is compared: the middle one, where a volume shows most."""
    return frames[len(frames) // 2]


def fingerprint_of(frames: Sequence[npt.NDArray[Any]]) -> bytes:
    """Return the fingerprint of a scan of one or more gray frames, packed; `unpack` makes an array of many."""
    return fingerprints(thumbnails(representative(frames))[None]).tobytes()


def unpack(packed: Sequence[bytes]) -> Fingerprints:
    """Return float16 [n, VIEWS, LENGTH] of n packed ones; a scan that could not be read has `NO_FINGERPRINT`."""
    return np.frombuffer(b"".join(packed), np.float16).reshape(-1, VIEWS, LENGTH)


def fingerprints(pictures: Thumbnails) -> Fingerprints:
    """Return float16 [n, VIEWS, LENGTH] of thumbnails uint8 [n, VIEWS, 48, 48]; all zeros if a thumbnail is blank."""
    from scipy.fft import dctn  # takes a tenth of a second to import, which those who only classify do without

    spectrum = dctn(_normalised(pictures), axes=(-2, -1), norm="ortho")
    rows, columns = np.triu_indices(_FREQUENCIES, 1)
    diagonal = np.arange(1, _FREQUENCIES)
    upper, lower = np.abs(spectrum[..., rows, columns]), np.abs(spectrum[..., columns, rows])
    parts = [np.maximum(upper, lower), np.minimum(upper, lower), np.abs(spectrum[..., diagonal, diagonal])]
    return np.concatenate(parts, axis=-1).astype(np.float16)


def frequencies() -> npt.NDArray[np.float64]:
    """Return the spatial frequency of each number of a fingerprint, [LENGTH], in half waves per thumbnail."""
    rows, columns = np.triu_indices(_FREQUENCIES, 1)
    off_diagonal = np.hypot(rows, columns)
    return np.concatenate([off_diagonal, off_diagonal, np.hypot(*[np.arange(1, _FREQUENCIES)] * 2)])


def shortened(prints: Fingerprints | ShortFingerprints) -> ShortFingerprints:
    """Return uint8 [n, 2, SHORT] of fingerprints [n, VIEWS, LENGTH]: the lowest frequencies of two views, in steps.

    But for rounding they lie no further apart than the whole ones: the same image stays the same, and a few that merely
    look alike become it. What is short already stays as it is.
    """
    if is_short(prints):
        return prints
    return np.rint(prints[:, [0, -1]][..., _lowest()].astype(np.float32) * _STEPS).astype(np.uint8)


def is_short(prints: Fingerprints | ShortFingerprints) -> TypeGuard[ShortFingerprints]:
    """Return whether fingerprints are short ones."""
    return prints.dtype == np.uint8


def lengthened(prints: ShortFingerprints) -> Fingerprints:
    """Return short fingerprints as float16 [n, VIEWS, LENGTH], to be compared with one another; the rest is 0."""
    whole = np.zeros((len(prints), VIEWS, LENGTH), np.float16)
    for view in (0, -1):
        whole[:, view, _lowest()] = prints[:, view].astype(np.float32) / _STEPS
    return whole


def distances(first: Fingerprints, second: Fingerprints) -> npt.NDArray[np.float32]:
    """Return the distance [n] of fingerprints [n, VIEWS, LENGTH] to each other: the smallest one of their views.

    Infinite if all views of one are blank: such pictures have nothing to compare.
    """
    apart = np.linalg.norm(first.astype(np.float32) - second.astype(np.float32), axis=-1)
    usable = first.any(-1) & second.any(-1)
    return np.where(usable, apart, np.inf).min(-1)


def correlations(first: Thumbnails, second: Thumbnails) -> npt.NDArray[np.float32]:
    """Correlate thumbnails uint8 [n, VIEWS, 48, 48]; returns [n], -1 to 1: the best of 8 orientations and all views."""
    here, there = _normalised(first), _normalised(second)
    turned = (np.rot90(side, quarter, (-2, -1)) for side in (there, there[..., ::-1]) for quarter in range(4))
    return np.max([np.einsum("nkij,nkij->nk", here, other) for other in turned], axis=(0, 2))


def _lowest() -> npt.NDArray[np.int64]:
    return np.argsort(frequencies(), kind="stable")[:SHORT]


def _normalised(pictures: Thumbnails) -> npt.NDArray[np.float32]:
    """Return each thumbnail with mean 0 and norm 1; zeros if it is blank."""
    centred = pictures - pictures.mean((-2, -1), keepdims=True, dtype=np.float32)
    norm = np.linalg.norm(centred, axis=(-2, -1), keepdims=True)
    return np.where(norm >= _BLANK * _SIDE, centred / np.maximum(norm, 1), np.float32(0)).astype(np.float32)


def _without_bright_border(gray: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Cut off the uniform lines at the sides of `gray`, up to the picture or the black background inside them."""
    dark = _DARK * int(gray.max())
    for _ in range(8):  # each side twice: lines blurred into the picture are uniform once the other sides are off
        lines = min(len(gray) - _SMALLEST_PART, len(gray) // 4)
        gray = gray[next((n for n in range(lines) if gray[n].mean() <= dark or not _is_uniform(gray[n])), 0) :]
        gray = np.rot90(gray)
    return gray


def _is_uniform(line: npt.NDArray[np.uint8]) -> bool:
    """Return whether the gray levels of a line span little, a few specks aside."""
    cut = len(line) // 20
    ranked = np.sort(line)
    return int(ranked[-1 - cut]) - int(ranked[cut]) <= _UNIFORM


def _bright_part(gray: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Cut out the box of all rows and columns in which enough pixels are brighter than a fifth of the white level."""
    counts = np.cumsum(Image.fromarray(gray).histogram())  # in a quarter of the time that np.bincount takes
    bright = gray > _DARK * np.searchsorted(counts, 0.99 * counts[-1])
    rows, columns = (np.flatnonzero(np.count_nonzero(bright, axis) > _SPECKS * bright.shape[axis]) for axis in (1, 0))
    if min(len(rows), len(columns)) < _SMALLEST_PART:
        return gray
    return gray[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
