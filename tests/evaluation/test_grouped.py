"""Figures of a part count patients, not slices: their intervals hold what new patients give."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from btray.evaluation.grouped import confusions_by_group, group_bootstrap, measure_outliers, measure_part
from btray.evaluation.metrics import bootstrap_intervals, compute_metrics, wilson_interval

CLASSES = ("glioma", "meningioma", "no_tumor")


def one_hot(predicted: np.ndarray, classes: int = 3) -> np.ndarray:
    return np.eye(classes)[predicted]


@given(st.integers(0, 9), st.integers(2, 80))
@settings(max_examples=30, deadline=None)
def test_the_figures_of_a_part_are_those_of_all_images(seed: int, n: int) -> None:
    random = np.random.default_rng(seed)
    labels, predicted, groups = random.integers(0, 2, n), random.integers(0, 3, n), random.integers(0, 9, n)
    part, whole = (
        measure_part(labels, one_hot(predicted), CLASSES, groups),
        compute_metrics(labels, one_hot(predicted), CLASSES),
    )
    assert (part.n, part.accuracy, part.ece) == (n, pytest.approx(whole.accuracy), whole.ece)
    assert part.groups == len(set(groups.tolist()))
    assert set(part.per_class) == {CLASSES[label] for label in labels}
    for name, own in part.per_class.items():
        assert own.recall == pytest.approx(whole.per_class[name].recall)
        assert own.f1 == pytest.approx(whole.per_class[name].f1)
        assert own.support == whole.per_class[name].support
        assert own.groups == len(set(groups[labels == CLASSES.index(name)].tolist()))
        assert own.recall_ci95[0] <= own.recall <= own.recall_ci95[1]
    if len(part.per_class) == 2:
        assert part.macro_f1 == pytest.approx(whole.macro_f1)
        assert part.recall is None
    else:
        assert part.macro_f1 is None
        assert part.recall == pytest.approx(part.accuracy)


def test_the_least_sure_tenth_does_not_count_in_the_accuracy_at_90() -> None:
    confidence = np.linspace(0.99, 0.5, 20)
    probabilities = np.stack([confidence, 1 - confidence, np.zeros(20)], axis=1)
    labels = np.zeros(20, np.int64)
    labels[[3, 18, 19]] = 1
    part = measure_part(labels, probabilities, CLASSES, np.arange(20))
    assert (part.accuracy, part.accuracy_at_90) == (pytest.approx(17 / 20), pytest.approx(17 / 18))
    assert measure_part(labels[:0], probabilities[:0], CLASSES, labels[:0]).accuracy_at_90 is None


def test_slices_of_a_patient_that_agree_do_not_narrow_the_interval() -> None:
    """60 studies of 30 patients with 12 slices each, all right or all wrong; 80 % of patients are right."""
    random = np.random.default_rng(0)
    truth = bootstrap_intervals(np.array([[8000, 2000], [2000, 8000]])).macro_f1
    held = {"groups": 0, "images": 0}
    for _ in range(60):
        patients = np.arange(30)
        labels, right = np.repeat(patients % 2, 12), np.repeat(random.random(30) < 0.8, 12)
        predicted, groups = np.where(right, labels, 1 - labels), np.repeat(patients, 12)
        by_group = confusions_by_group(labels, predicted, groups, 2)
        for way, (low, high) in {
            "groups": group_bootstrap(by_group, samples=300),
            "images": bootstrap_intervals(by_group.sum(0), samples=300).macro_f1,
        }.items():
            held[way] += low <= np.mean(truth) <= high
    assert held["groups"] >= 50
    assert held["images"] <= 40


def test_groups_of_one_image_give_the_interval_over_images() -> None:
    random = np.random.default_rng(1)
    labels, predicted = random.integers(0, 3, 300), random.integers(0, 3, 300)
    predicted = np.where(random.random(300) < 0.7, labels, predicted)
    by_group = confusions_by_group(labels, predicted, np.arange(300), 3)
    assert group_bootstrap(by_group) == pytest.approx(bootstrap_intervals(by_group.sum(0)).macro_f1, abs=0.01)


def test_a_part_without_a_known_image_has_no_figure() -> None:
    part = measure_part(np.zeros(0, np.int64), np.zeros((0, 3)), CLASSES, np.zeros(0, np.int64))
    assert (part.n, part.groups, part.macro_f1, part.recall, part.accuracy, part.per_class) == (
        0,
        0,
        None,
        None,
        None,
        {},
    )


def test_three_patients_that_are_all_right_prove_little() -> None:
    part = measure_part(np.ones(60, np.int64), one_hot(np.ones(60, np.int64)), CLASSES, np.repeat([1, 2, 3], 20))
    assert part.recall == 1.0
    assert part.recall_ci95 == wilson_interval(3, 3)
    assert part.recall_ci95[0] < 0.5


@pytest.mark.parametrize(
    ("abstain_below", "flagged", "rejected"),
    [(None, None, 0), (0.5, None, 2), (None, [True, False, True, False], 2), (0.5, [True, False, True, False], 3)],
)
def test_an_outlier_is_rejected_if_it_is_flagged_or_abstained_from(
    abstain_below: float | None, flagged: list[bool] | None, rejected: int
) -> None:
    measured = measure_outliers(
        np.array([0.4, 0.4, 0.9, 0.9]),
        np.array([0.6, 0.8]),
        np.array([0, 0, 1, 2]),
        abstain_below=abstain_below,
        flagged=None if flagged is None else np.array(flagged),
    )
    assert (measured.n, measured.groups, measured.rejected, measured.share) == (4, 3, rejected, rejected / 4)
    assert (measured.abstained is None, measured.flagged is None) == (abstain_below is None, flagged is None)
    assert measured.share_ci95[0] <= measured.share <= measured.share_ci95[1]
    assert measured.auroc == pytest.approx(0.5)
