"""The out-of-distribution score is 1 for what is like the training images, grows with distance, outlives storage."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from btray.model.ood import Distribution


def features(n: int, size: int, seed: int) -> np.ndarray:
    """Correlated features of very different units, some of them constant, as channel means are."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(size).normal(size=(size // 4 + 1, size))
    drawn = rng.normal(size=(n, len(mix))) @ mix + 0.3 * rng.normal(size=(n, size))
    scale = 10.0 ** np.linspace(-3, 3, size)
    scale[::7] = 0
    return (drawn * scale + 5).astype(np.float32)


@pytest.mark.parametrize(("n", "size"), [(2000, 40), (300, 360), (2000, 700)])
def test_images_like_those_of_the_training_score_about_one(n: int, size: int) -> None:
    scores = Distribution.fit(features(n, size, 0)).scores(features(500, size, 1))
    assert 0.7 < np.median(scores) < 1.5
    assert scores.dtype == np.float32


@pytest.mark.parametrize("size", [40, 360, 700])
def test_what_breaks_the_correlation_of_features_is_told_though_each_lies_in_its_range(size: int) -> None:
    distribution = Distribution.fit(features(1000, size, 0))
    usual = features(300, size, 1)
    rng = np.random.default_rng(2)
    shuffled = np.stack([rng.permutation(column) for column in usual.T], 1)
    scores = np.concatenate([distribution.scores(usual), distribution.scores(shuffled)])
    assert roc_auc_score(np.arange(600) >= 300, scores) > 0.99


def test_the_score_grows_with_the_distance() -> None:
    distribution = Distribution.fit(features(500, 60, 0))
    away = distribution.mean + np.arange(6)[:, None] * distribution.deviation * 3
    scores = distribution.scores(away.astype(np.float32))
    assert (np.diff(scores) > 0).all()
    assert scores[0] == 0


def test_a_batch_does_not_change_the_score_of_one() -> None:
    distribution = Distribution.fit(features(500, 60, 0))
    many = features(64, 60, 1)
    single = np.concatenate([distribution.scores(many[index : index + 1]) for index in range(64)])
    np.testing.assert_allclose(single, distribution.scores(many), rtol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_handful_of_images_still_gives_finite_scores(n: int) -> None:
    distribution = Distribution.fit(features(n, 50, 0))
    assert np.isfinite(distribution.scores(features(20, 50, 1))).all()


def test_stored_and_read_again_it_gives_the_same_scores() -> None:
    distribution = Distribution.fit(features(500, 300, 0))
    again = Distribution.from_tensors(distribution.tensors())
    many = features(50, 300, 1)
    np.testing.assert_array_equal(again.scores(many), distribution.scores(many))
