"""A fingerprint is the same whichever way an image is turned, and never further from another than the pictures are."""

from __future__ import annotations

import numpy as np
import pytest

from btray.data.config import PreprocessConfig
from btray.data.fingerprint import (
    LENGTH,
    SAME_FINGERPRINT,
    SAME_IMAGE,
    VIEWS,
    correlations,
    distances,
    fingerprints,
    frequencies,
    reduced,
    representative,
    thumbnails,
)
from btray.data.preprocess import decode_side
from btray.data.scans import decode
from btray.phantoms import CLASSES, phantom
from tests.helpers.image_truth import COPIES, REFRAMED
from tests.helpers.scan_corpus import encode


def pictures(count: int) -> np.ndarray:
    return np.stack([thumbnails(phantom(CLASSES[seed % 5], seed)) for seed in range(count)])


def test_an_image_correlates_fully_with_its_eight_orientations_and_shares_their_fingerprint() -> None:
    gray = phantom("glioma", 3, size=240)
    turned = np.stack([np.rot90(side, quarter) for side in (gray, gray.T) for quarter in range(4)])
    seen = np.stack([thumbnails(picture) for picture in turned])
    assert correlations(np.repeat(seen[:1], 8, 0), seen).min() >= 0.9999
    prints = fingerprints(seen)
    assert distances(np.repeat(prints[:1], 8, 0), prints).max() <= 0.01


def test_fingerprints_never_lie_further_apart_than_the_correlation_says() -> None:
    seen = pictures(30)
    prints = fingerprints(seen)
    first, second = np.triu_indices(30, 1)
    correlation = correlations(seen[first], seen[second])
    bound = np.sqrt(2 - 2 * correlation) + 0.002  # half precision
    assert (distances(prints[first], prints[second]) <= bound).all()
    assert prints.shape == (30, VIEWS, LENGTH)
    assert len(frequencies()) == LENGTH


@pytest.mark.parametrize("copy", [name for name in COPIES if name not in REFRAMED])
def test_a_copy_is_the_same_image(copy: str) -> None:
    grays = [phantom(CLASSES[seed % 5], seed) for seed in range(12)]
    seen = np.stack([thumbnails(gray) for gray in grays])
    copies = np.stack([thumbnails(decode(COPIES[copy](gray)).frames[0]) for gray in grays])
    value = correlations(seen, copies)
    assert np.median(value) >= 0.995
    assert value.min() >= 0.97, "judged by eye below 0.995, never another image"


@pytest.mark.parametrize("size", [192, 224])
def test_the_scale_at_which_a_jpeg_is_decoded_hardly_changes_its_fingerprint(size: int) -> None:
    data = [encode(phantom(CLASSES[seed % 5], seed, size=720), "JPEG") for seed in range(12)]
    side = decode_side(PreprocessConfig(size=size))
    whole, scaled = (
        np.stack([thumbnails(decode(scan, min_side=least).frames[0]) for scan in data]) for least in (None, side)
    )
    assert distances(fingerprints(whole), fingerprints(scaled)).max() < SAME_FINGERPRINT / 2
    assert correlations(whole, scaled).min() > 0.998


@pytest.mark.parametrize("copy", REFRAMED)
def test_a_copy_in_another_frame_mostly_is_the_same_image(copy: str) -> None:
    grays = [phantom(CLASSES[seed % 5], seed) for seed in range(12)]
    seen = np.stack([thumbnails(gray) for gray in grays])
    copies = np.stack([thumbnails(decode(COPIES[copy](gray)).frames[0]) for gray in grays])
    assert np.median(correlations(seen, copies)) >= 0.995


def test_the_same_head_with_another_lesion_and_other_heads_are_other_images() -> None:
    seen = pictures(20)
    first, second = np.triu_indices(20, 1)
    assert correlations(seen[first], seen[second]).max() < 0.97
    lesion = np.stack([[thumbnails(phantom(label, seed)) for label in ("no_tumor", "glioma")] for seed in range(12)])
    # a faint lesion may hide: 48 x 48 pixels do not show it
    assert np.median(correlations(lesion[:, 0], lesion[:, 1])) < 0.97


@pytest.mark.parametrize("level", [0, 7, 255])
def test_blank_images_have_nothing_to_compare(level: int) -> None:
    faint = np.random.default_rng(level).integers(-1, 2, (200, 200)) + level
    seen = np.stack([thumbnails(np.clip(picture, 0, 255).astype(np.uint8)) for picture in (faint, faint)])
    prints = fingerprints(seen)
    assert not prints.any()
    assert np.isinf(distances(prints[:1], prints[1:])).all()
    assert correlations(seen[:1], seen[1:]).max() == 0


@pytest.mark.parametrize("shape", [(16, 16), (16, 5000), (5000, 16), (97, 64), (2000, 1100)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_every_shape_and_depth_has_thumbnails(shape: tuple[int, int], dtype: type) -> None:
    gray = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape).astype(dtype)
    small = reduced(gray)
    assert small.dtype == np.uint8
    assert max(small.shape) < 768
    assert np.array_equal(reduced(small), small), "what is reduced stays as it is"
    seen = thumbnails(gray)
    assert seen.shape == (VIEWS, 48, 48)
    assert np.array_equal(thumbnails(small), seen)


def test_a_scan_of_several_frames_is_compared_by_its_middle_one() -> None:
    frames = [np.full((4, 4), level) for level in range(5)]
    assert representative(frames)[0, 0] == 2
    assert representative(frames[:1])[0, 0] == 0
    assert 0 < SAME_FINGERPRINT < np.sqrt(2 - 2 * SAME_IMAGE)
