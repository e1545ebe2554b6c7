"""Frames without any patient, over which two forms of one model are compared."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def noise_frames(count: int, size: int) -> npt.NDArray[np.uint8]:
    """Draw the same frames every time, uint8 [count, size, size]: noise in squares of 1, 2, 4, 8 and 16 pixels."""
    random = np.random.default_rng(0)
    frames = []
    for number in range(count):
        edge = 1 << number % 5
        squares = random.integers(0, 256, (-(-size // edge),) * 2, np.uint8)
        frames.append(squares.repeat(edge, 0).repeat(edge, 1)[:size, :size])
    return np.stack(frames)
