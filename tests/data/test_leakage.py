"""Leaks are counted where an image stands on both sides, in the direction in which it spoils a figure, only there."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from btray.core.errors import ThresholdExceeded
from btray.data.splits import Leak, find_leak, report_leak


def leak_of(*images: tuple[str | None, int]) -> Leak:
    splits, groups = zip(*images, strict=True)
    return find_leak(np.array(splits, object), np.array(groups, np.int64))


def test_a_twin_in_the_test_split_marks_the_image_that_is_learnt_from() -> None:
    leak = leak_of(("train", 0), ("train", 1), (None, 2), ("test", 1), ("test", 2), ("test", 3))
    assert leak.learnt.tolist() == [False, True, True, False, False, False]
    assert leak.tested == {"test": (2, 3)}


def test_twins_within_one_split_are_no_leak() -> None:
    leak = leak_of(("train", 0), ("train", 0), ("test", 1), ("test", 1))
    assert not leak.learnt.any()
    assert leak.tested == {"test": (0, 2)}


def test_validation_images_are_learnt_from_and_test_too() -> None:
    leak = leak_of(("train", 0), ("val", 0), ("val", 1), ("test", 1), ("train", 2), ("val", 3))
    assert leak.learnt.tolist() == [True, False, True, False, False, False]
    assert leak.tested == {"val": (1, 3), "test": (1, 1)}


def test_without_a_split_that_tests_nothing_leaks() -> None:
    assert leak_of((None, 0), ("train", 0)).tested == {}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([None, "train", "val", "test"]), st.integers(0, 6)), min_size=1, max_size=30))
def test_leaving_out_what_leaks_leaves_no_leak(images: list[tuple[str | None, int]]) -> None:
    leak = leak_of(*images)
    left = [image for image, gone in zip(images, leak.learnt, strict=True) if not gone]
    assert [split for split, _ in left].count("test") == [split for split, _ in images].count("test")
    assert all(leaked == 0 for leaked, _ in leak_of(*left).tested.values())


def test_a_leak_is_said_or_stops_the_job_as_asked(caplog: pytest.LogCaptureFixture) -> None:
    leak = leak_of(("train", 0), ("test", 0), ("test", 1))
    caplog.set_level(logging.INFO)
    report_leak(leak, "warn", "the data")
    assert "1 of 2 test images (50 %) of the data" in caplog.text
    with pytest.raises(ThresholdExceeded, match=r"1 of 2 test images .*--on-leak drop"):
        report_leak(leak, "fail", "the data")
    report_leak(leak, "drop", "the data")
    assert "left out of training" in caplog.text
    caplog.clear()
    report_leak(leak_of(("train", 0), ("test", 1)), "fail", "the data")
    assert caplog.text == ""
