"""All copies are found without comparing all pairs: the cost grows with the number of images, crowds or not."""

from __future__ import annotations

import numpy as np
import pytest

from btray.data.duplicates import components, group_by_fingerprint, have_twin, near_pairs, verified_pairs
from btray.data.fingerprint import LENGTH, VIEWS, Fingerprints

WITHIN = 0.1415
# 24 neighbours in each of 24 bands of each of 3 views: what the search considers of an image in a crowd of any size.
MOST_PAIRS_AN_IMAGE = 24 * 24 * 3


def prints_of(centres: np.ndarray, apart: float, random: np.random.Generator) -> Fingerprints:
    """Fingerprints float16 [n, VIEWS, LENGTH] about `apart` from their centres [n, LENGTH]."""
    noise = random.normal(size=(len(centres), VIEWS, LENGTH))
    noise *= apart / np.linalg.norm(noise, axis=-1, keepdims=True)
    return (centres[:, None] + noise).astype(np.float16)


def centres(count: int, random: np.random.Generator) -> np.ndarray:
    values = np.abs(random.normal(size=(count, LENGTH)))
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def test_every_near_pair_is_found_once_and_no_far_one() -> None:
    random = np.random.default_rng(0)
    single = centres(400, random)
    prints = prints_of(np.concatenate([single, single]), 0.03, random)
    pairs, apart = near_pairs(prints, within=WITHIN)
    assert sorted(map(tuple, pairs.tolist())) == [(n, n + 400) for n in range(400)]
    assert (np.diff(apart) >= 0).all(), "nearest first"
    assert apart.max() <= WITHIN


@pytest.mark.parametrize("count", [0, 1])
def test_of_no_image_or_one_there_are_no_pairs(count: int) -> None:
    prints = prints_of(centres(count, np.random.default_rng(0)), 0.0, np.random.default_rng(0))
    assert len(near_pairs(prints, within=WITHIN)[0]) == 0
    assert len(group_by_fingerprint(prints)) == count


def test_blank_images_have_no_twin() -> None:
    assert len(near_pairs(np.zeros((500, VIEWS, LENGTH), np.float16), within=WITHIN)[0]) == 0


def test_a_crowd_of_copies_is_one_group_and_costs_no_more_than_its_size() -> None:
    random = np.random.default_rng(1)
    considered, compared = [], []
    for size in (250, 500, 1000):
        prints = prints_of(np.repeat(centres(1, random), size, 0), 0.02, random)
        pairs, _ = near_pairs(prints, within=WITHIN)
        same, values, count = verified_pairs(size, pairs, lambda chosen: np.ones(len(chosen), np.float32))
        assert len(np.unique(components(size, same))) == 1
        assert len(values) == len(same) == count
        considered.append(len(pairs) / size)
        compared.append(count / size)
    assert max(compared) < 1, "a tree joins n images by n - 1 comparisons"
    assert max(considered) <= MOST_PAIRS_AN_IMAGE


def test_pairs_of_different_images_grow_no_faster_than_their_number() -> None:
    random = np.random.default_rng(2)
    heads = centres(12, random)
    considered, compared = [], []
    for size in (500, 1000, 2000):
        # not the same image, but of the same few heads: nearly within reach
        prints = prints_of(heads[random.integers(0, len(heads), size)], 0.09, random)
        pairs, _ = near_pairs(prints, within=WITHIN)
        _, _, count = verified_pairs(size, pairs, lambda chosen: np.zeros(len(chosen), np.float32))
        considered.append(len(pairs) / size)
        compared.append(count / size)
    assert compared[-1] <= 4, "four rounds of fewer pairs than images"
    assert max(considered) <= MOST_PAIRS_AN_IMAGE


def test_what_the_pictures_refute_joins_nothing_and_what_hides_behind_it_is_still_found() -> None:
    # 0-1 is nearest and false; 0-2 and 1-2 are true: 0, 2 and 1 are one group all the same
    pairs = np.array([[0, 1], [0, 2], [1, 2], [3, 4]])
    true = {(0, 2), (1, 2)}
    asked: list[tuple[int, int]] = []

    def correlate(chosen: np.ndarray) -> np.ndarray:
        asked.extend(map(tuple, chosen.tolist()))
        return np.array([1.0 if tuple(pair) in true else 0.5 for pair in chosen.tolist()], np.float32)

    same, _, compared = verified_pairs(5, pairs, correlate)
    assert components(5, same).tolist() == [0, 0, 0, 1, 2]
    assert compared == len(asked) == len(set(asked)), "no pair is compared twice"


def test_a_twin_is_one_through_others_too() -> None:
    random = np.random.default_rng(3)
    single = centres(3, random)
    prints = prints_of(single, 0.0, random)
    assert have_twin(prints[:2], prints[1:]).tolist() == [False, True]
    assert group_by_fingerprint(np.concatenate([prints, prints])).tolist() == [0, 1, 2, 0, 1, 2]
