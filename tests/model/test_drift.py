"""Profiles add up over parts and nights, and the index sees a change and nothing else."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from btray.model.drift import CONFIDENCE_EDGES, LARGE, OOD_EDGES, Profile, drift, psi_terms

counts = st.lists(st.integers(0, 50), min_size=4, max_size=4)


def rows(seed: int, n: int, *, shift: float = 0.0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [
        {
            "label": str(rng.choice(["glioma", "no_tumor"], p=[0.3, 0.7])),
            "confidence": float(np.clip(rng.beta(8, 2) - shift, 0, 1)),
            "ood_score": float(rng.gamma(9, 1 / 9)),
            "abstained": bool(rng.random() < 0.1),
            "out_of_distribution": False,
        }
        for _ in range(n)
    ]


@settings(deadline=None)
@given(counts, counts)
def test_the_index_is_symmetric_never_negative_and_zero_for_equal_shares(first: list[int], second: list[int]) -> None:
    there, back = psi_terms(first, second), psi_terms(second, first)
    assert there == pytest.approx(back)
    assert min(there) >= 0
    assert psi_terms(first, [7 * count for count in first]) == pytest.approx([0.0] * 4)


def test_the_index_is_what_the_formula_gives() -> None:
    assert sum(psi_terms([50, 50], [80, 20])) == pytest.approx(0.3 * np.log(1.6) - 0.3 * np.log(0.4))


def test_profiles_of_parts_add_up_to_the_profile_of_the_whole_and_survive_json() -> None:
    whole = rows(1, 500)
    summed = Profile()
    for start in range(0, 500, 64):
        part = Profile.of(whole[start : start + 64])
        summed += Profile.model_validate_json(part.model_dump_json())
    assert summed == Profile.of(whole)
    assert summed.frames == sum(summed.confidence) == sum(summed.ood_score) == 500


def test_another_sample_of_the_same_is_no_drift_and_falling_confidence_is() -> None:
    before = Profile.of(rows(1, 4000))
    same = drift(before, Profile.of(rows(2, 4000)))
    assert same.ood_score is not None
    assert max(same.labels, same.confidence, same.ood_score) < 0.02
    found = drift(before, Profile.of(rows(3, 4000, shift=0.3)))
    assert found.confidence > LARGE > found.labels


def test_values_at_and_beyond_the_edges_are_counted() -> None:
    extreme = [
        {"label": "x", "confidence": value, "ood_score": score, "abstained": False, "out_of_distribution": True}
        for value, score in ((0.0, 0.0), (1.0, 1e9), (0.95, None), (0.05, OOD_EDGES[-2]))
    ]
    profile = Profile.of(extreme)
    assert (profile.confidence[0], profile.confidence[1], profile.confidence[-1]) == (1, 1, 2)
    assert (profile.ood_score[0], profile.ood_score[-1], sum(profile.ood_score)) == (1, 2, 3)
    assert Profile.of([]) == Profile()


@pytest.mark.parametrize("labels", [2, 5, 44])
def test_with_the_frames_that_an_alarm_needs_chance_alone_gives_none(labels: int) -> None:
    generator = np.random.default_rng(labels)

    def sample(frames: int) -> Profile:
        """Frames whose confidences, scores and labels are spread as widely as they can be: chance plays most there."""
        return Profile(
            labels=Counter(map(str, generator.integers(0, labels, frames).tolist())),
            confidence=np.histogram(generator.random(frames), CONFIDENCE_EDGES)[0].tolist(),
            ood_score=np.histogram(generator.gamma(3, 1 / 3, frames).clip(0, 4), OOD_EDGES)[0].tolist(),
        )

    def alarms(frames: int) -> int:
        found = [drift(sample(frames), sample(frames)) for _ in range(100)]
        assert len({each.is_telling for each in found}) == 1
        return sum(max(each.labels, each.confidence, each.ood_score or 0.0) > LARGE for each in found)

    needed = drift(sample(1000), sample(1000)).frames_needed
    assert needed == max(400, 20 * labels)
    assert alarms(needed) <= 4
    assert alarms(needed // 4) > 50, "a quarter of them is not enough"
    few, many = sample(needed - 1), sample(10 * needed)
    assert not drift(many, few).is_telling
    assert not drift(few, many).is_telling
    assert drift(many, sample(needed)).is_telling
