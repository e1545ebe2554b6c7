"""Augmentation is keyed by sample and epoch and nothing else, stays within its ranges, and can be switched off."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from btray.data.config import PreprocessConfig
from btray.data.preprocess import make_frame, to_tensor
from btray.phantoms import CLASSES, phantom
from btray.training.augment import Augmenter, keyed_uniform
from btray.training.config import AugmentConfig

SIZE = 64
OFF: dict[str, float] = {
    name: 0.0 for name in AugmentConfig.model_fields if name != "enabled"
}  # every strength at which nothing changes
STRONG = {
    "flip_horizontal": 0.5, "flip_vertical": 0.5, "rotation": 180, "scale": 0.5, "shear": 30, "translation": 0.3,
    "contrast": 0.9, "gamma": 1.0, "tone": 0.9, "bias_field": 0.9, "noise": 0.5, "blur": 4.0, "erase": 0.5,
}  # fmt: skip

# No defaults: those may change, and these pictures must not.
MILD = {
    "flip_horizontal": 0.5, "flip_vertical": 0.5, "rotation": 15, "scale": 0.15, "shear": 6, "translation": 0.06,
    "contrast": 0.25, "gamma": 0.3, "tone": 0.0, "bias_field": 0.2, "noise": 0.03, "blur": 0.7, "erase": 0.2,
}  # fmt: skip
# Three pixels and the mean size of three pictures: a change here changes what every seed trains on.
GOLDEN = [
    [-0.49696, -0.73356, 0.79586],
    [2.76937, -0.04687, -0.94819],
    [1.02371, 1.00811, 0.85849],
    [0.87648, 0.93865, 0.91281],
]


def only(**changes: Any) -> Augmenter:
    """An augmenter that does nothing but this."""
    return Augmenter(AugmentConfig(**{**OFF, **changes}), seed=5)


@pytest.fixture(scope="module")
def frames() -> torch.Tensor:
    config = PreprocessConfig(size=SIZE)
    return torch.from_numpy(np.stack([make_frame(phantom(CLASSES[n % 5], n), config) for n in range(24)]))


def numbers(count: int, first: int = 0) -> torch.Tensor:
    return torch.arange(first, first + count)


def spot(x: int, y: int, count: int) -> torch.Tensor:
    """Black frames with a bright spot of 5 x 5 pixels around column x and row y."""
    frames = torch.zeros(count, SIZE, SIZE, dtype=torch.uint8)
    frames[:, y - 2 : y + 3, x - 2 : x + 3] = 255
    return frames


def centres(images: torch.Tensor) -> np.ndarray:
    """Column and row of the bright spot in each image, [n, 2]."""
    weight = (images - images.amin((2, 3), keepdim=True))[:, 0].double()
    weight = weight / weight.sum((1, 2), keepdim=True)
    axis = torch.arange(SIZE, dtype=torch.double)
    return torch.stack([(weight.sum(1) * axis).sum(1), (weight.sum(2) * axis).sum(1)], 1).numpy()


@pytest.mark.parametrize("config", [AugmentConfig(), AugmentConfig(**STRONG)])
def test_a_sample_changes_alike_in_whatever_batch_order_and_share(frames: torch.Tensor, config: AugmentConfig) -> None:
    augmenter, samples = Augmenter(config, seed=1), numbers(24) * 1024 + 7
    whole = augmenter(frames, samples, 3)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    assert torch.equal(augmenter(frames[order], samples[order], 3), whole[order])
    for workers in (2, 3, 24):
        shares = [augmenter(frames[w::workers], samples[w::workers], 3) for w in range(workers)]
        for worker, share in enumerate(shares):
            assert torch.equal(share, whole[worker::workers]), f"{workers} workers"
    assert torch.equal(Augmenter(config, seed=1)(frames, samples, 3), whole)


def test_the_global_random_state_is_neither_used_nor_changed(frames: torch.Tensor) -> None:
    augmenter = Augmenter(AugmentConfig(**STRONG), seed=1)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = augmenter(frames, numbers(24), 0)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(augmenter(frames, numbers(24), 0), first)


def test_the_number_of_threads_does_not_count(frames: torch.Tensor) -> None:
    augmenter, threads = Augmenter(AugmentConfig(), seed=1), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = augmenter(frames, numbers(24), 0)
        torch.set_num_threads(2)
        assert torch.equal(augmenter(frames, numbers(24), 0), one)
    finally:
        torch.set_num_threads(threads)


def test_epochs_samples_and_seeds_each_change_the_picture(frames: torch.Tensor) -> None:
    same = frames[:1].repeat(8, 1, 1)
    augmenter = Augmenter(AugmentConfig(), seed=1)
    over_samples = augmenter(same, numbers(8), 0)
    over_epochs = torch.cat([augmenter(same[:1], numbers(1), epoch) for epoch in range(8)])
    over_seeds = torch.cat([Augmenter(AugmentConfig(), seed)(same[:1], numbers(1), 0) for seed in range(8)])
    for images in (over_samples, over_epochs, over_seeds):
        distances = torch.cdist(images.flatten(1), images.flatten(1)) + 1e9 * torch.eye(8)
        assert distances.min() > 1


def test_all_off_is_plain_standardisation(frames: torch.Tensor) -> None:
    torch.testing.assert_close(only()(frames, numbers(24), 2), to_tensor(frames), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", sorted(STRONG))
def test_each_strength_does_something_alone_and_nothing_at_zero(frames: torch.Tensor, name: str) -> None:
    plain = to_tensor(frames)
    changed = (only(**{name: STRONG[name]})(frames, numbers(24), 2) - plain).abs().amax((1, 2, 3))
    assert (changed > 0.05).sum() >= 5
    if name in {"flip_horizontal", "flip_vertical", "tone", "noise", "blur", "erase"}:  # as documented: not every time
        assert (changed < 1e-4).sum() >= 4
    without = Augmenter(AugmentConfig(**{**STRONG, name: 0.0}), seed=5)(frames, numbers(24), 2)
    assert (without - Augmenter(AugmentConfig(**STRONG), seed=5)(frames, numbers(24), 2)).abs().max() > 0.05


def test_what_one_change_draws_does_not_depend_on_the_others(frames: torch.Tensor) -> None:
    mirrored = only(flip_horizontal=0.5)(frames, numbers(24), 0)
    plain = to_tensor(frames)
    flips = [not torch.allclose(image, other, atol=1e-3) for image, other in zip(mirrored, plain, strict=True)]
    both = only(flip_horizontal=0.5, contrast=0.9, gamma=0.1)(frames, numbers(24), 0)
    likeness = [(a.flatten() @ b.flatten()) / SIZE**2 for a, b in zip(both, plain, strict=True)]
    assert [value < 0.98 for value in likeness] == flips


def test_flips_are_mirror_images_half_of_the_time(frames: torch.Tensor) -> None:
    many, samples = frames[:1].repeat(400, 1, 1), numbers(400)
    for name, axis in (("flip_horizontal", 3), ("flip_vertical", 2)):
        plain = to_tensor(frames[:1])
        sure = only(**{name: 1.0})(frames[:1], numbers(1), 0)
        torch.testing.assert_close(sure, plain.flip(axis), atol=1e-3, rtol=0)
        images = only(**{name: 0.5})(many, samples, 0)
        mirrored = (images - plain.flip(axis)).abs().amax((1, 2, 3)) < 1e-3
        kept = (images - plain).abs().amax((1, 2, 3)) < 1e-3
        assert (mirrored ^ kept).all()
        assert 150 < int(mirrored.sum()) < 250


def test_shifts_reach_their_share_of_the_frame_and_no_further() -> None:
    moved = centres(only(translation=0.25)(spot(32, 32, 300), numbers(300), 0)) - 32
    assert np.abs(moved).max() < 0.25 * SIZE + 0.6
    for axis in (0, 1):
        assert moved[:, axis].min() < -0.2 * SIZE
        assert moved[:, axis].max() > 0.2 * SIZE
    assert abs(np.corrcoef(moved.T)[0, 1]) < 0.2


def test_rotation_turns_both_ways_up_to_its_angle_and_keeps_distances() -> None:
    middle = (SIZE - 1) / 2
    moved = centres(only(rotation=40)(spot(48, 32, 300), numbers(300), 0)) - middle
    start = np.array([48, 32]) - middle
    angles = np.degrees(np.arctan2(moved[:, 1], moved[:, 0]) - math.atan2(start[1], start[0]))
    assert np.abs(angles).max() < 41
    assert angles.min() < -32
    assert angles.max() > 32
    np.testing.assert_allclose(np.hypot(*moved.T), math.hypot(*start), atol=0.5)


def test_scale_keeps_the_direction_and_its_range() -> None:
    middle = (SIZE - 1) / 2
    moved = centres(only(scale=0.3)(spot(44, 44, 300), numbers(300), 0)) - middle
    factors = moved[:, 0] / (44 - middle)
    assert 1 / 1.31 < factors.min() < 0.82
    assert 1.2 < factors.max() < 1.31
    np.testing.assert_allclose(moved[:, 0], moved[:, 1], atol=0.1)


def test_shear_moves_along_one_axis() -> None:
    middle = (SIZE - 1) / 2
    moved = centres(only(shear=20)(spot(32, 52, 300), numbers(300), 0)) - np.array([32, 52])
    reach = math.tan(math.radians(20)) * (52 - middle)
    assert np.abs(moved[:, 1]).max() < 0.1
    assert 0.8 * reach < np.abs(moved[:, 0]).max() < 1.05 * reach
    assert moved[:, 0].min() < 0 < moved[:, 0].max()


def test_erasing_takes_at_most_its_share(frames: torch.Tensor) -> None:
    plain = to_tensor(frames)
    checks = ((torch.arange(SIZE) % 2) * 255).to(torch.uint8).repeat(200, SIZE, 1)
    images = only(erase=0.25)(checks, numbers(200), 0)
    erased = ((images - images.mean((2, 3), keepdim=True)).abs() < 0.5).double().mean((1, 2, 3))
    assert erased.max() <= 0.27
    assert erased.max() > 0.2
    assert (erased == 0).double().mean() > 0.35
    assert torch.isfinite(only(erase=0.5)(frames, numbers(24), 0)).all()
    assert plain.shape == (24, 1, SIZE, SIZE)


@pytest.mark.parametrize("changes", [{}, STRONG])
def test_what_comes_out_is_standardised(frames: torch.Tensor, changes: dict[str, Any]) -> None:
    images = Augmenter(AugmentConfig(**changes), seed=3)(frames, numbers(24), 1)
    assert (images.shape, images.dtype) == ((24, 1, SIZE, SIZE), torch.float32)
    assert images.mean((1, 2, 3)).abs().max() < 1e-4
    assert (images.std((1, 2, 3), unbiased=False) - 1).abs().max() < 1e-3


@pytest.mark.parametrize("level", [0, 1, 128, 255])
def test_even_frames_give_no_nan(level: int) -> None:
    even = torch.full((40, 33, 33), level, dtype=torch.uint8)
    for epoch in range(4):
        assert torch.isfinite(Augmenter(AugmentConfig(**STRONG), seed=3)(even, numbers(40), epoch)).all()
        assert torch.isfinite(Augmenter(AugmentConfig(), seed=3)(even, numbers(40), epoch)).all()
    assert only()(even, numbers(40), 0).abs().max() < 1e-3


def test_frames_are_not_changed(frames: torch.Tensor) -> None:
    before = frames.clone()
    Augmenter(AugmentConfig(**STRONG), seed=3)(frames, numbers(24), 1)
    assert torch.equal(frames, before)


def test_keyed_numbers_are_uniform_and_unlike_from_key_to_key_and_place_to_place() -> None:
    drawn = keyed_uniform(torch.arange(20_000), 16).double()
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert (drawn.mean(0) - 0.5).abs().max() < 0.01
    assert (drawn.var(0) - 1 / 12).abs().max() < 0.003
    assert (torch.corrcoef(drawn.T) - torch.eye(16)).abs().max() < 0.03
    after = torch.corrcoef(torch.stack([drawn[:-1, 0], drawn[1:, 0]]))[0, 1]
    assert abs(after) < 0.03
    assert torch.equal(keyed_uniform(torch.tensor([7, 7]), 4)[0], keyed_uniform(torch.tensor([7]), 4)[0])


def test_samples_far_apart_do_not_share_their_changes() -> None:
    """Sample numbers are scan x 1024 + frame: multiples of 1024, and as large as the archive."""
    augmenter = only(translation=0.25)
    for start, step in ((0, 1024), (2**31 - 500, 1), (10**6 * 1024, 1024)):
        moved = centres(augmenter(spot(32, 32, 200), start + step * torch.arange(200), 0)).round(3)
        assert len(np.unique(moved, axis=0)) == 200
        assert np.abs(moved.mean(0) - 32).max() < 2.5


def test_pictures_of_the_past_come_out_again(frames: torch.Tensor) -> None:
    images = Augmenter(AugmentConfig(**MILD), seed=42)(frames[:3], torch.tensor([0, 1024, 5]), 7)
    found = torch.stack(
        [images[:, 0, 10, 20], images[:, 0, 32, 32], images[:, 0, 50, 40], images.abs().mean((1, 2, 3))]
    )
    torch.testing.assert_close(found, torch.tensor(GOLDEN), atol=1e-4, rtol=0)


def test_a_gray_curve_keeps_black_black_and_equal_grays_equal_and_may_turn_the_order_round() -> None:
    ramp = torch.arange(0, 256, 4, dtype=torch.uint8).repeat(SIZE, 1)[None].repeat(64, 1, 1)  # a gray level a column
    curved = only(tone=0.99)(ramp, numbers(64), 0)[:, 0]
    assert (curved.std(1) < 1e-4).all(), "one level stays one level"
    assert (curved[:, 0, 0] - curved.amin((1, 2)) < 1e-5).all(), "nothing is darker than the background"
    steps = curved[:, 0].diff(dim=1)
    turned = (steps.amin(1) < -1e-3).sum()
    assert 8 <= turned <= 40, "in a good part of the half that is changed at all, some darker tissue gets brighter"
