"""Splits never cut a group, represent every class that can be, and depend on nothing but names, labels and the seed."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from btray.core.errors import UserError
from btray.data.splits import BLOCK, group_rows, hold_out, k_folds

CLASSES = ("glioma", "meningioma", "no_tumor", "abscess")


def make_table(rows: Sequence[tuple[str, str, str | None]]) -> pa.Table:
    uris, labels, patients = zip(*rows, strict=True) if rows else ((), (), ())
    return pa.table(
        {
            "uri": pa.array(uris, pa.string()),
            "label": pa.array(labels, pa.string()),
            "patient_id": pa.array(patients, pa.string()),
        }
    )


def make_runs(sizes: dict[str, int]) -> pa.Table:
    return make_table([(f"/d/{name}/p ({i}).jpg", name, None) for name, n in sizes.items() for i in range(n)])


@st.composite
def labelled(draw: st.DrawFn) -> tuple[pa.Table, np.ndarray]:
    """Runs of files, patients, and twins, also between classes and patients."""
    rows: list[tuple[str, str, str | None]] = []
    for name in draw(st.lists(st.sampled_from(CLASSES), min_size=1, max_size=4, unique=True)):
        for stem in range(draw(st.integers(1, 3))):
            patients = draw(st.sampled_from([(None,), ("a", "b", "c"), (f"{name}1", f"{name}2", None)]))
            rows += [
                (f"/d/{name}/s{stem}_{i}.png", name, patients[i * len(patients) // 60 % len(patients)])
                for i in range(draw(st.integers(1, 60)))
            ]
    twins = draw(st.lists(st.integers(-1, 40), min_size=len(rows), max_size=len(rows)))
    known = draw(st.sampled_from([0.0, 0.1, 0.5]))
    hidden = np.arange(len(rows)) % 10 >= known * 10
    return make_table(rows), np.where(hidden, -1, np.array(twins, dtype=np.int64))


def class_groups(table: pa.Table, group: np.ndarray) -> dict[str, set[int]]:
    labels = np.array(table["label"].to_pylist())
    return {str(name): set(group[labels == name].tolist()) for name in np.unique(labels)}


def assert_no_group_is_cut(group: np.ndarray, side: np.ndarray) -> None:
    for number in np.unique(group):
        assert len(set(side[group == number].tolist())) == 1


@given(labelled())
@settings(max_examples=60, deadline=None)
def test_a_patient_and_a_picture_lie_in_one_group(case: tuple[pa.Table, np.ndarray]) -> None:
    table, twins = case
    group = group_rows(table, twins)
    assert_no_group_is_cut(twins[twins >= 0], group[twins >= 0])
    patients = np.array([patient or "" for patient in table["patient_id"].to_pylist()])
    assert_no_group_is_cut(patients[patients != ""], group[patients != ""])


@given(labelled(), st.sampled_from([0.1, 0.15, 0.3, 0.5, 0.9]), st.integers(0, 5))
@settings(max_examples=80, deadline=None)
def test_no_group_is_cut_and_training_keeps_every_class(
    case: tuple[pa.Table, np.ndarray], fraction: float, seed: int
) -> None:
    table, twins = case
    held = hold_out(table, fraction=fraction, seed=seed, duplicate_of=twins)
    group = group_rows(table, twins)
    assert_no_group_is_cut(group, held)
    for members in class_groups(table, group).values():
        assert members - set(group[held].tolist())


@given(
    st.dictionaries(st.sampled_from(CLASSES), st.integers(1, 300), min_size=1),
    st.sampled_from([0.1, 0.15, 0.25, 0.5, 0.8]),
    st.integers(0, 20),
)
@settings(max_examples=60, deadline=None)
def test_the_share_of_every_class_is_as_near_as_half_a_block_allows(
    sizes: dict[str, int], fraction: float, seed: int
) -> None:
    table = make_runs(sizes)
    held = hold_out(table, fraction=fraction, seed=seed, duplicate_of=None)
    labels = np.array(table["label"].to_pylist())
    group = group_rows(table, None)
    for name, size in sizes.items():
        mine = group[labels == name]
        if size == 1:
            assert not held[labels == name].any()
            continue
        assert 0 < held[labels == name].sum() < size
        largest = np.unique(mine, return_counts=True)[1].max()
        # one group at least goes and one stays, whatever the share
        slack = max(largest / 2, largest - fraction * size, largest - (1 - fraction) * size)
        assert abs(held[labels == name].sum() - fraction * size) <= slack + 1e-9


@given(labelled(), st.randoms(use_true_random=False), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_the_order_of_the_rows_and_the_numbers_of_the_twins_do_not_matter(
    case: tuple[pa.Table, np.ndarray], random: object, seed: int
) -> None:
    table, twins = case
    order = list(range(len(table)))
    random.shuffle(order)  # type: ignore[attr-defined]
    renamed = np.where(twins >= 0, 1000 - twins, -1)
    held = hold_out(table, fraction=0.2, seed=seed, duplicate_of=twins)
    again = hold_out(table.take(order), fraction=0.2, seed=seed, duplicate_of=renamed[order])
    np.testing.assert_array_equal(held[order], again)


def test_the_seed_decides() -> None:
    table = make_runs({"glioma": 500, "no_tumor": 500})
    splits = {hold_out(table, fraction=0.15, seed=seed, duplicate_of=None).tobytes() for seed in range(8)}
    assert len(splits) > 4


def test_held_out_files_are_whole_runs_of_neighbouring_numbers() -> None:
    rows = [(f"/d/glioma/p ({i}).jpg", "glioma", None) for i in range(500)]
    rows += [(f"/d/no/image({i}).jpg", "no_tumor", None) for i in range(500)]
    table = make_table(rows)
    held = hold_out(table, fraction=0.15, seed=3, duplicate_of=None)
    for name in range(2):
        edges = np.abs(np.diff(held[name * 500 : name * 500 + 500].astype(int))).sum()
        assert edges <= 2 * np.ceil(0.15 * 500 / BLOCK)


def test_numbers_are_sorted_as_numbers_and_stems_are_kept_apart() -> None:
    rows = [(f"/d/x/m{stem} ({i}).jpg", "x", None) for stem in (1, 2) for i in range(100)]
    group = group_rows(make_table(rows), None)
    np.testing.assert_array_equal(np.diff(group[:100]) >= 0, np.ones(99, bool))
    assert not set(group[:100].tolist()) & set(group[100:].tolist())


def test_chains_of_twins_do_not_weld_a_class_together() -> None:
    table = make_runs({"glioma": 1000, "no_tumor": 1000})
    random = np.random.default_rng(0)
    twins = np.where(random.random(2000) < 0.2, random.integers(0, 200, 2000), -1)
    twins = np.where(twins >= 0, twins + np.repeat([0, 1000], 1000), -1)
    group = group_rows(table, twins)
    assert np.bincount(group).max() < 4 * BLOCK
    held = hold_out(table, fraction=0.15, seed=0, duplicate_of=twins)
    assert not set(twins[held & (twins >= 0)].tolist()) & set(twins[~held & (twins >= 0)].tolist())
    assert abs(held.mean() - 0.15) < 0.02


def test_a_class_with_one_group_stays_in_training_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    rows = [(f"/d/glioma/{i}.jpg", "glioma", f"p{i}") for i in range(20)]
    rows += [(f"/d/abscess/{i}.jpg", "abscess", "only") for i in range(20)]
    with caplog.at_level(logging.WARNING):
        held = hold_out(make_table(rows), fraction=0.2, seed=0, duplicate_of=None)
    assert held[:20].sum() == 4
    assert not held[20:].any()
    assert "'abscess'" in caplog.text
    assert "'glioma'" not in caplog.text


def test_an_empty_table_gives_an_empty_split() -> None:
    assert hold_out(make_table([]), fraction=0.5, seed=0, duplicate_of=None).shape == (0,)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_a_share_outside_its_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="fraction"):
        hold_out(make_runs({"glioma": 9}), fraction=fraction, seed=0, duplicate_of=None)


@given(labelled(), st.integers(2, 4), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_folds_cut_no_group_and_repeat(case: tuple[pa.Table, np.ndarray], k: int, seed: int) -> None:
    table, twins = case
    group = group_rows(table, twins)
    most = np.unique(table["label"].to_pylist(), return_counts=True)[1].max()
    if k > min(group.max() + 1, most):
        with pytest.raises(UserError, match=f"{k} folds"):
            k_folds(table, k=k, seed=seed, duplicate_of=twins)
        return
    folds = k_folds(table, k=k, seed=seed, duplicate_of=twins)
    assert_no_group_is_cut(group, folds)
    assert set(folds.tolist()) <= set(range(k))
    np.testing.assert_array_equal(folds, k_folds(table, k=k, seed=seed, duplicate_of=twins))


def test_every_fold_has_its_share_of_every_class() -> None:
    table = make_runs({"glioma": 800, "meningioma": 400, "no_tumor": 30})
    folds = k_folds(table, k=5, seed=0, duplicate_of=None)
    labels = np.array(table["label"].to_pylist())
    for name in np.unique(labels):
        shares = np.bincount(folds[labels == name], minlength=5) / (labels == name).sum()
        assert np.abs(shares - 0.2).max() < 0.05
