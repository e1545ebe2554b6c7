"""Thresholds keep what they promise on the images that chose them, and label sets hold the true label often enough."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax

from btray.data.fingerprint import unpack
from btray.evaluation.scoring import Scores
from btray.model.abstention import NEVER, conformal_threshold, label_sets, risk_coverage, threshold_for_accuracy
from btray.model.classifier import NetworkOutput
from btray.model.manifest import Thresholds
from btray.training.calibration import calibrate
from btray.training.config import TrainConfig


def random_case(seed: int, n: int, classes: int = 4, *, steps: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Labels and probabilities of a mediocre model; with `steps`, probabilities so coarse that many are equal."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    probabilities = softmax(rng.normal(size=(n, classes)) * 1.5 + 1.2 * np.eye(classes)[labels], axis=1)
    if steps:
        probabilities = np.maximum(np.round(probabilities * steps), 1e-3)
        probabilities /= probabilities.sum(1, keepdims=True)
    return labels, probabilities


cases = given(seed=st.integers(0, 10_000), n=st.integers(1, 60), steps=st.sampled_from([None, 3]))


@settings(max_examples=80, deadline=None)
@cases
def test_each_step_of_the_curve_is_what_counting_gives(seed: int, n: int, steps: int | None) -> None:
    labels, probabilities = random_case(seed, n, steps=steps)
    curve = risk_coverage(labels, probabilities)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    assert curve.coverage[-1] == 1
    assert (np.diff(curve.threshold) < 0).all(), "equal confidences are answered together or not at all"
    for threshold, coverage, accuracy in zip(curve.threshold, curve.coverage, curve.accuracy, strict=True):
        answered = confidence >= threshold
        assert coverage == pytest.approx(answered.mean())
        assert accuracy == pytest.approx(right[answered].mean())


@settings(max_examples=80, deadline=None)
@cases
def test_the_threshold_reaches_the_target_and_no_other_answers_more(seed: int, n: int, steps: int | None) -> None:
    labels, probabilities = random_case(seed, n, steps=steps)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    for target in (0.0, 0.5, 0.9, 1.0):
        threshold = threshold_for_accuracy(labels, probabilities, target)
        answered = confidence >= threshold
        assert (threshold == NEVER) == (not answered.any())
        if answered.any():
            assert right[answered].mean() >= target
        for lower in np.unique(confidence[~answered]):
            assert right[confidence >= lower].mean() < target


def test_a_model_that_is_always_wrong_never_answers() -> None:
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4]])
    assert threshold_for_accuracy(np.array([1, 1]), probabilities, 0.5) == NEVER
    assert threshold_for_accuracy(np.array([1, 1]), probabilities, 0.0) == pytest.approx(0.6)


@pytest.mark.parametrize("error_rate", [0.05, 0.1, 0.3])
def test_label_sets_of_new_images_miss_the_true_label_no_more_often_than_asked(error_rate: float) -> None:
    misses = []
    for seed in range(100):
        labels, probabilities = random_case(seed, 1000)
        threshold = conformal_threshold(labels[:200], probabilities[:200], error_rate)
        sets = label_sets(probabilities[200:], threshold)
        misses.append(1 - sets[np.arange(800), labels[200:]].mean())
    assert error_rate - 0.02 < np.mean(misses) <= error_rate + 0.01, "neither too often nor by sets that hold all"


@settings(max_examples=60, deadline=None)
@cases
def test_a_set_always_holds_the_label_that_is_said(seed: int, n: int, steps: int | None) -> None:
    labels, probabilities = random_case(seed, n, steps=steps)
    sets = label_sets(probabilities, conformal_threshold(labels, probabilities, 0.5))
    assert sets[np.arange(n), probabilities.argmax(1)].all()


def test_too_few_images_for_the_error_rate_rule_nothing_out() -> None:
    labels, probabilities = random_case(0, 8)
    assert conformal_threshold(labels, probabilities, 0.1) == 0
    assert label_sets(probabilities, 0).all()


def test_a_threshold_of_the_users_stands_also_where_no_validation_image_is_readable() -> None:
    config = TrainConfig(data="d", out="o", abstain_below=0.7)
    nothing = np.zeros((0, 0), np.float32)
    nobody = np.zeros(0, np.int64)
    rejected = pa.table({"row": [0], "code": ["empty"], "message": [""]})
    scores = Scores(nobody, NetworkOutput(nothing, nothing), unpack([]), rejected, np.array([], object))
    limits = calibrate(config, scores, nobody, classes=(), subjects=nobody)
    assert limits.thresholds == Thresholds(abstain_below=0.7)
