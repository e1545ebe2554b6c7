"""`btray.data.scans.orientation`: the same slice looks the same, whichever way its pixels were stored."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from btray.data.scans.orientation import View, resize, square_size

LEFT, POSTERIOR, HEAD = np.eye(3)
SHOWN = {"axial": (LEFT, POSTERIOR), "coronal": (LEFT, -HEAD), "sagittal": (POSTERIOR, -HEAD)}
NORMALS = {"axial": HEAD, "coronal": POSTERIOR, "sagittal": -LEFT}
PIXELS = np.arange(12, dtype=np.uint16).reshape(3, 4)
STORED = list(itertools.product((False, True), repeat=3))


def stored_as(
    pixels: np.ndarray, across: np.ndarray, down: np.ndarray, how: tuple[bool, bool, bool]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return pixels that are shown along `across` and `down`, stored otherwise, and the directions they then have."""
    flip_rows, flip_columns, transpose = how
    if flip_rows:
        pixels, down = pixels[::-1], -down
    if flip_columns:
        pixels, across = pixels[:, ::-1], -across
    return (pixels.T, down, across) if transpose else (pixels, across, down)


@pytest.mark.parametrize("plane", SHOWN)
@pytest.mark.parametrize("how", STORED)
def test_each_of_the_eight_ways_to_store_a_slice_is_undone(plane: str, how: tuple[bool, bool, bool]) -> None:
    pixels, across, down = stored_as(PIXELS, *SHOWN[plane], how)
    view = View.of(across.tolist(), down.tolist())
    assert view is not None
    assert view.plane == plane
    np.testing.assert_array_equal(view.show(pixels), PIXELS)
    assert view.show(pixels).flags.c_contiguous
    np.testing.assert_allclose(view.normal, NORMALS[plane])
    assert view.locate([1.0, 20.0, 300.0]) == pytest.approx(NORMALS[plane] @ [1, 20, 300])


@pytest.mark.parametrize("plane", SHOWN)
@pytest.mark.parametrize("how", STORED)
def test_slices_tilted_by_less_than_45_degrees_belong_to_the_nearest_plane(
    plane: str, how: tuple[bool, bool, bool]
) -> None:
    random = np.random.default_rng(5)
    for _ in range(50):
        axis = random.normal(size=3)
        x, y, z = axis / np.linalg.norm(axis)
        cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
        angle = np.radians(random.uniform(-40, 40))
        turn = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
        pixels, across, down = stored_as(PIXELS, *SHOWN[plane], how)
        view = View.of((turn @ across).tolist(), (turn @ down).tolist())
        assert view is not None
        assert view.plane == plane
        np.testing.assert_array_equal(view.show(pixels), PIXELS)


@pytest.mark.parametrize(
    ("across", "down"),
    [
        ([1, 0, 0], [1, 0, 0]),
        ([0, 0, 0], [0, 0, 0]),
        ([2, 0, 0], [0, 1, 0]),
        ([1, 0, 0], [0, float("nan"), 0]),
        ([1, 0, 0], [0, float("inf"), 0]),
        ([1, 0], [0, 1]),
        ([], []),
    ],
)
def test_what_is_no_pair_of_directions_gives_no_view(across: list[float], down: list[float]) -> None:
    assert View.of(across, down) is None


def test_pixels_become_square_at_the_finer_spacing_and_nearly_square_ones_stay() -> None:
    assert square_size((100, 200), (1.0, 1.009)) == (100, 200)
    assert square_size((100, 200), (1.0, 0.5)) == (200, 200)
    assert square_size((100, 200), (0.5, 1.0)) == (100, 400)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_resizing_keeps_the_type_and_the_range(dtype: type) -> None:
    most = int(np.iinfo(dtype).max)
    pixels = (np.indices((20, 30)).sum(axis=0) % 2 * most).astype(dtype)
    taller = resize(pixels, (40, 30))
    assert (taller.dtype, taller.shape, taller.min(), taller.max()) == (dtype, (40, 30), 0, most)
    assert resize(pixels, (20, 30)) is pixels
