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
from btray.data.fingerprint import LENGTH, VIEWS, Fingerprints
from btray.data.splits import BLOCKS, group_rows, hold_out, k_folds, leave_out_sources, subjects

CLASSES = ("glioma", "meningioma", "no_tumor", "abscess")


def make_table(rows: Sequence[tuple[str, str, str | None]], sources: Sequence[str | None] | None = None) -> pa.Table:
    uris, labels, patients = zip(*rows, strict=True) if rows else ((), (), ())
    return pa.table(
        {
            "uri": pa.array(uris, pa.string()),
            "label": pa.array(labels, pa.string()),
            "patient_id": pa.array(patients, pa.string()),
            "source": pa.array(sources or [None] * len(uris), pa.string()),
        }
    )


def make_runs(sizes: dict[str, int]) -> pa.Table:
    return make_table([(f"/d/{name}/p ({i}).jpg", name, None) for name, n in sizes.items() for i in range(n)])


def prints_of(twins: np.ndarray) -> Fingerprints:
    """Fingerprints as far apart as those of different heads, but equal where `twins` are, if these are not -1."""
    drawn = np.random.default_rng(0).normal(scale=0.02, size=(len(twins) + 2000, VIEWS, LENGTH)).astype(np.float16)
    return np.where((twins >= 0)[:, None, None], drawn[twins], drawn[2000:][: len(twins)])


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
@settings(max_examples=15, deadline=None)
def test_a_patient_and_a_picture_lie_in_one_group(case: tuple[pa.Table, np.ndarray]) -> None:
    table, twins = case
    group = group_rows(table, prints_of(twins))
    assert_no_group_is_cut(twins[twins >= 0], group[twins >= 0])
    patients = np.array([patient or "" for patient in table["patient_id"].to_pylist()])
    assert_no_group_is_cut(patients[patients != ""], group[patients != ""])


@given(labelled(), st.sampled_from([0.1, 0.15, 0.3, 0.5, 0.9]), st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_no_group_is_cut_and_training_keeps_every_class(
    case: tuple[pa.Table, np.ndarray], fraction: float, seed: int
) -> None:
    table, twins = case
    held = hold_out(table, fraction=fraction, seed=seed, prints=prints_of(twins))
    group = group_rows(table, prints_of(twins))
    assert_no_group_is_cut(group, held)
    for members in class_groups(table, group).values():
        assert members - set(group[held].tolist())


@given(
    st.dictionaries(st.sampled_from(CLASSES), st.integers(1, 300), min_size=1),
    st.sampled_from([0.1, 0.15, 0.25, 0.5, 0.8]),
    st.integers(0, 20),
)
@settings(max_examples=15, deadline=None)
def test_the_share_of_every_class_is_as_near_as_a_block_allows_and_both_sides_have_it(
    sizes: dict[str, int], fraction: float, seed: int
) -> None:
    table = make_runs(sizes)
    held = hold_out(table, fraction=fraction, seed=seed, prints=None)
    labels = np.array(table["label"].to_pylist())
    group = group_rows(table, None)
    for name, size in sizes.items():
        mine = group[labels == name]
        if size == 1:
            assert not held[labels == name].any()
            continue
        assert 0 < held[labels == name].sum() < size
        largest = np.unique(mine, return_counts=True)[1].max()
        assert abs(held[labels == name].sum() - fraction * size) <= largest


@given(st.lists(st.integers(2, 9), min_size=1, max_size=4), st.sampled_from([0.1, 0.15, 0.5]), st.integers(0, 9))
@settings(max_examples=15, deadline=None)
def test_every_class_with_two_patients_is_on_both_sides_however_rare(
    patients: list[int], fraction: float, seed: int
) -> None:
    rows = [(f"/d/{name}/{i}-{s}.png", name, f"{name}{i}") for name, n in zip(CLASSES, patients, strict=False)
            for i in range(n) for s in range(1 + i * 5 % 7)]  # fmt: skip
    rows += [(f"/d/common/{i}.png", "common", f"c{i}") for i in range(20)]
    labels = np.array([label for _, label, _ in rows])
    held = hold_out(make_table(rows), fraction=fraction, seed=seed, prints=None)
    assert set(labels[held]) == set(labels[~held]) == set(labels)


@given(labelled(), st.randoms(use_true_random=False), st.integers(0, 3))
@settings(max_examples=12, deadline=None)
def test_the_order_of_the_rows_does_not_matter(case: tuple[pa.Table, np.ndarray], random: object, seed: int) -> None:
    table, twins = case
    order = list(range(len(table)))
    random.shuffle(order)  # type: ignore[attr-defined]
    prints = prints_of(twins)
    held = hold_out(table, fraction=0.2, seed=seed, prints=prints)
    again = hold_out(table.take(order), fraction=0.2, seed=seed, prints=prints[order])
    np.testing.assert_array_equal(held[order], again)


def test_the_seed_decides() -> None:
    table = make_runs({"glioma": 500, "no_tumor": 500})
    splits = {hold_out(table, fraction=0.15, seed=seed, prints=None).tobytes() for seed in range(12)}
    assert len(splits) > 4


def test_held_out_files_are_a_few_long_runs_of_neighbouring_numbers() -> None:
    rows = [(f"/d/glioma/p ({i}).jpg", "glioma", None) for i in range(500)]
    rows += [(f"/d/no/image({i}).jpg", "no_tumor", None) for i in range(500)]
    held = hold_out(make_table(rows), fraction=0.15, seed=3, prints=None)
    for name in range(2):
        edges = np.abs(np.diff(held[name * 500 : name * 500 + 500].astype(int))).sum()
        assert 1 <= edges <= 2, "one block: a cut parts the slices of a patient"


@given(st.integers(100, 400), st.integers(6, 14), st.sampled_from([3, 5]), st.integers(0, 5))
@settings(max_examples=10, deadline=None)
def test_slices_of_hidden_patients_stay_together(n: int, slices: int, k: int, seed: int) -> None:
    """Patients are planted as consecutive files and not named; their slices look more alike than two patients do."""
    table = make_runs({"glioma": n, "no_tumor": n})
    patient = np.concatenate([np.arange(n) // slices, n + np.arange(n) // slices])
    random = np.random.default_rng(seed)
    heads = random.normal(scale=0.02, size=(2 * n, VIEWS, LENGTH))
    prints = heads[patient] + random.normal(scale=0.008, size=(2 * n, VIEWS, LENGTH))

    def cut(prints: Fingerprints | None) -> int:
        folds = k_folds(table, k=k, seed=seed, prints=prints)
        return sum(len(set(folds[patient == number].tolist())) > 1 for number in np.unique(patient))

    assert cut(None) <= 2 * (BLOCKS - 1), "no more of them are cut than there are blocks"
    if n // (4 * BLOCKS) * 2 >= slices:  # then a patient ends near each cut
        assert cut(prints.astype(np.float16)) == 0


def test_numbers_are_sorted_as_numbers_and_classes_and_sources_are_kept_apart() -> None:
    rows = [(f"/d/{name}/m{stem} ({i}).jpg", name, None) for name in "xy" for stem in (1, 2) for i in range(50)]
    group = group_rows(make_table(rows), None)
    np.testing.assert_array_equal(np.unique(np.diff(group)), [0, 1])
    assert group.max() + 1 == 2 * BLOCKS
    assert not set(group[:100].tolist()) & set(group[100:].tolist())
    of_two = group_rows(make_table(rows, ["a", "b"] * 100), None)
    assert not set(of_two[::2].tolist()) & set(of_two[1::2].tolist())


def test_one_name_in_two_sources_is_two_patients() -> None:
    rows = [(f"/d/{i}.jpg", "x", "1") for i in range(4)]
    assert subjects(make_table(rows, ["a", "a", "b", "b"]), None).tolist() == [0, 0, 1, 1]
    assert len(set(subjects(make_table(rows), None).tolist())) == 1
    joined = subjects(make_table(rows, ["a", "a", "b", "b"]), prints_of(np.array([-1, 7, 7, -1])))
    assert len(set(joined.tolist())) == 1, "the same picture in both"


def test_each_source_is_left_out_once() -> None:
    rows = [(f"/d/{i}.jpg", "x", None) for i in range(6)]
    parts = leave_out_sources(make_table(rows, ["b", "a", "a", "c", "b", "b"]))
    assert {name: np.flatnonzero(part).tolist() for name, part in parts.items()} == {
        "a": [1, 2],
        "b": [0, 4, 5],
        "c": [3],
    }
    for sources in (None, ["a"] * 6, ["a", "b", "a", None, "a", "b"]):
        with pytest.raises(UserError, match="column source") as caught:
            leave_out_sources(make_table(rows, sources))
        assert "\n" not in str(caught.value)


def test_chains_of_twins_do_not_weld_a_class_together() -> None:
    table = make_runs({"glioma": 1000, "no_tumor": 1000})
    random = np.random.default_rng(0)
    twins = np.where(random.random(2000) < 0.2, random.integers(0, 200, 2000), -1)
    twins = np.where(twins >= 0, twins + np.repeat([0, 1000], 1000), -1)
    group = group_rows(table, prints_of(twins))
    assert np.bincount(group).max() < 2 * 1000 / BLOCKS
    held = hold_out(table, fraction=0.15, seed=0, prints=prints_of(twins))
    assert not set(twins[held & (twins >= 0)].tolist()) & set(twins[~held & (twins >= 0)].tolist())
    assert abs(held.mean() - 0.15) < 0.05


def test_a_class_with_one_group_stays_in_training_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    rows = [(f"/d/glioma/{i}.jpg", "glioma", f"p{i}") for i in range(20)]
    rows += [(f"/d/abscess/{i}.jpg", "abscess", "only") for i in range(20)]
    with caplog.at_level(logging.WARNING):
        held = hold_out(make_table(rows), fraction=0.2, seed=0, prints=None)
    assert 3 <= held[:20].sum() <= 5
    assert not held[20:].any()
    assert "'abscess'" in caplog.text
    assert "'glioma'" not in caplog.text


def test_an_empty_table_gives_an_empty_split() -> None:
    assert hold_out(make_table([]), fraction=0.5, seed=0, prints=None).shape == (0,)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_a_share_outside_its_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="fraction"):
        hold_out(make_runs({"glioma": 9}), fraction=fraction, seed=0, prints=None)


@given(labelled(), st.integers(2, 4), st.integers(0, 3))
@settings(max_examples=12, deadline=None)
def test_folds_cut_no_group_and_repeat(case: tuple[pa.Table, np.ndarray], k: int, seed: int) -> None:
    table, twins = case
    group = group_rows(table, prints_of(twins))
    most = np.unique(table["label"].to_pylist(), return_counts=True)[1].max()
    if k > min(group.max() + 1, most):
        with pytest.raises(UserError, match=f"{k} folds"):
            k_folds(table, k=k, seed=seed, prints=prints_of(twins))
        return
    folds = k_folds(table, k=k, seed=seed, prints=prints_of(twins))
    assert_no_group_is_cut(group, folds)
    assert set(folds.tolist()) <= set(range(k))
    np.testing.assert_array_equal(folds, k_folds(table, k=k, seed=seed, prints=prints_of(twins)))


def test_every_fold_has_its_share_of_every_class() -> None:
    table = make_runs({"glioma": 800, "meningioma": 400, "no_tumor": 30})
    folds = k_folds(table, k=5, seed=0, prints=None)
    labels = np.array(table["label"].to_pylist())
    for name in np.unique(labels):
        shares = np.bincount(folds[labels == name], minlength=5) / (labels == name).sum()
        assert np.abs(shares - 0.2).max() < 0.1
