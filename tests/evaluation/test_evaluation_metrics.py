"""Metrics against hand counts and against scikit-learn, and at the edges where a metric is undefined."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax
from sklearn.metrics import f1_score, roc_auc_score

from btray.core.errors import UserError
from btray.evaluation.metrics import (
    ClassMetrics,
    ConfusionMatrix,
    auroc,
    bootstrap_intervals,
    compute_metrics,
    fit_temperature,
    reliability,
    wilson_interval,
    worst_errors,
)

CLASSES = ("glioma", "meningioma", "pituitary", "metastasis", "no_tumor")


def random_case(seed: int, n: int, classes: int, skill: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    logits = rng.normal(size=(n, classes)) + skill * np.eye(classes)[labels]
    return labels, softmax(logits, axis=1)


def one_hot(predicted: list[int], classes: int) -> np.ndarray:
    return np.eye(classes)[predicted]


def test_metrics_agree_with_a_count_by_hand() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2])
    metrics = compute_metrics(labels, one_hot([0, 0, 1, 1, 1, 0], 3), ["a", "b", "c"])
    assert metrics.n == 6
    assert metrics.accuracy == pytest.approx(4 / 6)
    assert metrics.confusion_matrix == ConfusionMatrix(labels=["a", "b", "c"], matrix=[[2, 1, 0], [0, 2, 0], [1, 0, 0]])
    assert metrics.per_class["a"].precision == pytest.approx(2 / 3)
    assert metrics.per_class["b"] == ClassMetrics(precision=2 / 3, recall=1.0, f1=0.8, auroc=0.875, support=2)
    assert metrics.per_class["c"] == ClassMetrics(precision=None, recall=0.0, f1=0.0, auroc=0.5, support=1)
    assert metrics.macro_f1 == pytest.approx((2 / 3 + 0.8 + 0) / 3)
    assert metrics.ece == pytest.approx(2 / 6)  # always sure, right four times of six


def test_keys_are_the_contract() -> None:
    metrics = asdict(compute_metrics(*random_case(0, 40, 5), CLASSES))
    assert list(metrics) == [
        "n", "accuracy", "accuracy_ci95", "macro_f1", "bootstrap_ci95", "auroc_macro", "ece", "per_class",
        "confusion_matrix",
    ]  # fmt: skip
    assert tuple(metrics["per_class"]) == CLASSES
    assert all(list(row) == ["precision", "recall", "f1", "auroc", "support"] for row in metrics["per_class"].values())


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 40), classes=st.integers(2, 7), coarse=st.booleans())
def test_any_case_is_strict_json_and_consistent(seed: int, n: int, classes: int, coarse: bool) -> None:
    """Few images and many classes: absent classes, single ones and, with coarse probabilities, ties come up often."""
    labels, probabilities = random_case(seed, n, classes)
    if coarse:
        probabilities = one_hot(list(probabilities.argmax(axis=1)), classes) / 2 + 0.5 / classes
    names = [f"class {index}" for index in range(classes)]
    metrics = json.loads(json.dumps(asdict(compute_metrics(labels, probabilities, names)), allow_nan=False))
    matrix = np.array(metrics["confusion_matrix"]["matrix"])
    assert matrix.sum() == n
    assert metrics["accuracy"] == pytest.approx(np.trace(matrix) / n)
    assert matrix.sum(axis=1).tolist() == [row["support"] for row in metrics["per_class"].values()]
    low, high = metrics["accuracy_ci95"]
    assert 0 <= low <= metrics["accuracy"] + 1e-12
    assert metrics["accuracy"] - 1e-12 <= high <= 1
    assert 0 <= metrics["ece"] <= 1
    predicted = probabilities.argmax(axis=1)
    expected = f1_score(labels, predicted, labels=np.unique(labels), average="macro", zero_division=0)
    assert metrics["macro_f1"] == pytest.approx(expected)


def test_macro_auroc_agrees_with_scikit_learn_where_all_classes_occur() -> None:
    labels, probabilities = random_case(1, 300, 5)
    expected = roc_auc_score(labels, probabilities, multi_class="ovr", average="macro")
    assert compute_metrics(labels, probabilities, CLASSES).auroc_macro == pytest.approx(expected)


def test_a_class_that_never_occurs_is_null_and_left_out_of_macro_means() -> None:
    labels, probabilities = random_case(2, 200, 4)
    without = compute_metrics(labels, probabilities, CLASSES[:4])
    padded = np.hstack([probabilities, np.zeros((200, 1))])
    metrics = compute_metrics(labels, padded, CLASSES)
    assert metrics.per_class["no_tumor"] == ClassMetrics(precision=None, recall=None, f1=None, auroc=None, support=0)
    assert metrics.macro_f1 == without.macro_f1
    assert metrics.auroc_macro == without.auroc_macro


def test_one_class_present_only_has_no_auroc_but_the_rest() -> None:
    metrics = compute_metrics(np.zeros(3, int), one_hot([0, 0, 1], 2), ["a", "b"])
    assert metrics.auroc_macro is None
    assert metrics.per_class["b"].precision == 0.0  # predicted once, wrongly
    assert metrics.per_class["b"].recall is None
    assert metrics.macro_f1 == pytest.approx(0.8)


def test_equal_probabilities_predict_the_first_class_and_auroc_counts_half() -> None:
    labels, probabilities = np.array([0, 1, 1, 0]), np.full((4, 2), 0.5)
    metrics = compute_metrics(labels, probabilities, ["a", "b"])
    assert metrics.confusion_matrix.matrix == [[2, 0], [2, 0]]
    assert metrics.auroc_macro == 0.5


def test_metrics_do_not_depend_on_the_order_of_images_or_classes() -> None:
    labels, probabilities = random_case(3, 120, 5)
    metrics = compute_metrics(labels, probabilities, CLASSES)
    order, columns = np.random.default_rng(0).permutation(120), np.array([4, 2, 0, 1, 3])
    moved = compute_metrics(
        np.argsort(columns)[labels[order]], probabilities[order][:, columns], [CLASSES[c] for c in columns]
    )
    for key in ("accuracy", "macro_f1", "auroc_macro", "ece"):
        assert getattr(moved, key) == pytest.approx(getattr(metrics, key))
    for name in CLASSES:
        assert asdict(moved.per_class[name]) == pytest.approx(asdict(metrics.per_class[name]))


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605)],
)
def test_wilson_interval_gives_published_values(successes: int, trials: int, low: float, high: float) -> None:
    """The last two are examples of Newcombe 1998, Statistics in Medicine 17, 857-872, table I."""
    assert list(wilson_interval(successes, trials)) == pytest.approx([low, high], abs=5e-5)


def test_no_image_is_one_clear_line() -> None:
    with pytest.raises(UserError, match=r"^0 images .*--data[^\n]*$"):
        compute_metrics(np.zeros(0, int), np.zeros((0, 3)), ["a", "b", "c"])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_diverged_model_is_named_as_such(bad: float) -> None:
    labels, probabilities = random_case(4, 6, 3)
    probabilities[4, 1] = bad
    with pytest.raises(UserError, match=r"1 of 6 images .*number 4.*learning-rate"):
        compute_metrics(labels, probabilities, ["a", "b", "c"])


@pytest.mark.parametrize(
    ("labels", "probabilities", "classes"),
    [
        (np.array([0, 2]), one_hot([0, 1], 2), ["a", "b"]),
        (np.array([0, -1]), one_hot([0, 1], 2), ["a", "b"]),
        (np.array([0.0, 1.0]), one_hot([0, 1], 2), ["a", "b"]),
        (np.array([0, 1, 1]), one_hot([0, 1], 2), ["a", "b"]),
        (np.array([0, 1]), one_hot([0, 1], 2), ["a", "a"]),
        (np.array([0, 1]), one_hot([0, 1], 2), ["a", "b", "c"]),
        (np.array([0, 1]), np.array([[3.0, -2.0], [0.5, 1.0]]), ["a", "b"]),
    ],
    ids=["label too high", "label negative", "float labels", "lengths", "class twice", "class too many", "logits"],
)
def test_arrays_that_do_not_fit_are_refused(labels: np.ndarray, probabilities: np.ndarray, classes: list[str]) -> None:
    with pytest.raises(ValueError, match=r".+"):
        compute_metrics(labels, probabilities, classes)


def test_float32_rounding_above_one_is_no_error_and_lands_in_the_last_bin() -> None:
    probabilities = np.array([[1.0000001, 0.0], [0.0, 1.0]], dtype=np.float32)
    table = reliability(np.array([0, 1]), probabilities)
    assert table.count.tolist() == [0] * 14 + [2]
    assert table.ece == 0


def test_reliability_bins_hold_their_upper_edge_and_every_image_once() -> None:
    probabilities = np.array([[0.6, 0.4], [0.8, 0.2], [0.81, 0.19], [0.5, 0.5]])
    table = reliability(np.array([0, 1, 0, 1]), probabilities, bins=5)
    assert table.count.tolist() == [0, 0, 2, 1, 1]
    assert table.correct.tolist() == [0, 0, 1, 0, 1]
    assert table.accuracy[2:].tolist() == [0.5, 0.0, 1.0]
    assert np.isnan(table.accuracy[0])
    assert table.confidence[2:] == pytest.approx([0.55, 0.8, 0.81])
    assert table.ece == pytest.approx((2 * 0.05 + 0.8 + 0.19) / 4)


def test_ece_is_near_zero_for_a_model_whose_confidence_is_true() -> None:
    rng = np.random.default_rng(5)
    probabilities = softmax(2 * rng.normal(size=(20_000, 4)), axis=1)
    labels = (probabilities.cumsum(axis=1) > rng.random((20_000, 1))).argmax(axis=1)
    assert compute_metrics(labels, probabilities, CLASSES[:4]).ece < 0.015
    sharper = softmax(3 * np.log(probabilities), axis=1)
    assert compute_metrics(labels, sharper, CLASSES[:4]).ece > 0.1


@pytest.mark.parametrize("truth", [0.4, 1.0, 3.0])
def test_temperature_undoes_a_known_sharpening(truth: float) -> None:
    rng = np.random.default_rng(6)
    honest = 2 * rng.normal(size=(20_000, 4))
    labels = (softmax(honest, axis=1).cumsum(axis=1) > rng.random((20_000, 1))).argmax(axis=1)
    assert fit_temperature(honest * truth, labels) == pytest.approx(truth, rel=0.05)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 30), scale=st.floats(1e-3, 1e3))
def test_temperature_stays_in_range_and_never_raises_the_loss(seed: int, n: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    labels, logits = rng.integers(0, 3, n), scale * rng.normal(size=(n, 3))
    temperature = fit_temperature(logits, labels)

    def nll(value: float) -> float:
        return -float(log_softmax(logits / value, axis=1)[np.arange(n), labels].mean())

    assert 0.05 <= temperature <= 20
    assert nll(temperature) <= nll(1.0) + 1e-9


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        (np.zeros((0, 3)), np.zeros(0, int)),
        (np.zeros((4, 3)), np.array([0, 1, 2, 0])),
        (np.array([[np.nan, 0.0], [0.0, 1.0]]), np.array([0, 0])),
        (np.array([[5.0, 0.0], [0.0, 1.0]]), np.array([0, 1])),
    ],
    ids=["empty", "constant", "not finite", "no error: the likelihood has no maximum"],
)
def test_temperature_is_one_where_none_can_be_fitted(logits: np.ndarray, labels: np.ndarray) -> None:
    assert fit_temperature(logits, labels) == 1.0


def test_worst_errors_are_wrong_ones_by_falling_confidence() -> None:
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.6, 0.4], [0.01, 0.99]])
    labels = np.array([0, 0, 0, 1, 1])
    assert worst_errors(labels, probabilities, 10).tolist() == [2, 1, 3]
    assert worst_errors(labels, probabilities, 2).tolist() == [2, 1]
    assert worst_errors(labels, probabilities, 0).tolist() == []
    assert worst_errors(np.array([0, 1, 1, 0, 1]), probabilities, 5).tolist() == []


def test_auroc_of_an_absent_class_is_none() -> None:
    assert auroc(np.array([0, 0]), one_hot([0, 1], 2), 1) is None
    assert auroc(np.array([0, 0]), one_hot([0, 1], 2), 0) is None


def test_bootstrap_intervals_are_those_of_drawing_images_with_replacement() -> None:
    labels, probabilities = random_case(3, 150, 4)
    predicted = probabilities.argmax(axis=1)
    rng = np.random.default_rng(1)
    drawn = rng.integers(0, 150, (1500, 150))
    accuracies = [(labels[chosen] == predicted[chosen]).mean() for chosen in drawn]
    f1s = [f1_score(labels[chosen], predicted[chosen], average="macro") for chosen in drawn[:400]]
    metrics = compute_metrics(labels, probabilities, CLASSES[:4])
    intervals = bootstrap_intervals(np.array(metrics.confusion_matrix.matrix))
    assert intervals == metrics.bootstrap_ci95, "the same counts give the same intervals"
    np.testing.assert_allclose(intervals.accuracy, np.quantile(accuracies, (0.025, 0.975)), atol=0.015)
    np.testing.assert_allclose(intervals.macro_f1, np.quantile(f1s, (0.025, 0.975)), atol=0.03)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 30), classes=st.integers(2, 6))
def test_bootstrap_intervals_hold_the_figure_and_stay_within_0_and_1(seed: int, n: int, classes: int) -> None:
    metrics = compute_metrics(*random_case(seed, n, classes), [str(index) for index in range(classes)])
    low, high = metrics.bootstrap_ci95.accuracy
    assert 0 <= low <= metrics.accuracy <= high <= 1
    low, high = metrics.bootstrap_ci95.macro_f1
    assert 0 <= low <= high <= 1
