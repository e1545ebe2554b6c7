"""CT slices are told from MR by their skull; phantoms of MR, thin or broken rings and odd pictures are none."""

from __future__ import annotations

import numpy as np
import pytest

from btray import phantoms
from btray.data.config import PreprocessConfig
from btray.data.frames import FrameSource, Rejection
from btray.data.modality import looks_like_ct
from btray.data.preprocess import Frame, make_frame
from tests.conftest import ROOT

PUBLIC = ROOT.parent / "shared" / "data" / "brain-tumor-mri"


def head(*, ring: float, gap: float = 0.0, size: int = 160) -> Frame:
    """A head with a bright ring of a thickness (a share of its radius) that is open over a share of the circle."""
    y, x = (np.mgrid[0:512, 0:512] - 255.5) / 230
    radius, angle = np.hypot(x / 0.8, y), (np.arctan2(y, x) + np.pi) / (2 * np.pi)
    gray = np.where(radius < 1, 90 + np.random.default_rng(0).normal(0, 8, radius.shape), 0)
    gray = np.where((radius < 1) & (radius > 1 - ring) & (angle >= gap), 255, gray)
    return make_frame(gray.clip(0, 255).astype(np.uint8), PreprocessConfig(size=size))


@pytest.mark.parametrize("size", [96, 160, 224])
@pytest.mark.parametrize("turned", [0, 1])
def test_a_closed_thick_bright_ring_around_an_even_brain_is_ct(size: int, turned: int) -> None:
    for ring in (0.08, 0.1, 0.12):
        assert looks_like_ct(np.rot90(head(ring=ring, size=size), turned))


@pytest.mark.parametrize(
    "other",
    [
        {"ring": 0.02},
        {"ring": 0.1, "gap": 0.4},
        {"ring": 0.0},
    ],
    ids=str,
)
def test_a_ring_that_is_thin_or_open_is_not(other: dict[str, float]) -> None:
    assert not looks_like_ct(head(**other))


@pytest.mark.parametrize("level", [0, 255])
def test_what_is_no_head_is_not(level: int) -> None:
    assert not looks_like_ct(np.full((160, 160), level, np.uint8))
    speck = np.zeros((160, 160), np.uint8)
    speck[80, 80] = level
    assert not looks_like_ct(speck)


def test_phantoms_of_mr_are_not() -> None:
    for label in phantoms.CLASSES:
        for seed in range(8):
            assert not looks_like_ct(make_frame(phantoms.phantom(label, seed), PreprocessConfig()))


@pytest.mark.realdata
@pytest.mark.skipif(not PUBLIC.exists(), reason=f"{PUBLIC} is not there")
def test_slices_of_one_hospitals_mr_are_not_and_ct_among_those_without_tumor_is_found() -> None:
    source = FrameSource(PreprocessConfig())

    def found(folder: str, step: int) -> int:
        uris = sorted(map(str, (PUBLIC / folder).iterdir()))[::step]
        frames = [made for made in source.from_uris(uris) if not isinstance(made, Rejection)]
        return sum(looks_like_ct(made[0]) for made in frames)

    assert found("Training/pituitary_tumor", 4) == 0
    assert found("Testing/no_tumor", 1) >= 25
