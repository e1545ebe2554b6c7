"""Folder names mean the class that a person would read in them; unknown names stay what they are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from btray.data.labels import CANONICAL, canonical_label, class_order


@pytest.mark.parametrize(
    ("folder", "label"),
    [
        ("glioma_tumor", "glioma"),
        ("Glioma Tumour", "glioma"),
        ("meningioma_tumor", "meningioma"),
        ("pituitary-adenoma", "pituitary"),
        ("pituitary_tumor", "pituitary"),
        ("brain metastases", "metastasis"),
        ("notumor", "no_tumor"),
        ("no_tumor", "no_tumor"),
        ("No Tumor", "no_tumor"),
        ("no", "no_tumor"),
        ("healthy", "no_tumor"),
    ],
)
def test_common_folder_names_mean_their_class(folder: str, label: str) -> None:
    assert canonical_label(folder) == label


@pytest.mark.parametrize("folder", ["schwannoma", "Schwannoma T1", "tumor", "glioma_grade_4", "yes", "没有肿瘤", "123"])
def test_other_names_stay_as_they_are(folder: str) -> None:
    assert canonical_label(f" {folder}\n") == folder


@given(st.text())
def test_a_label_is_a_fixed_point(folder: str) -> None:
    once = canonical_label(folder)
    assert canonical_label(once) == once


@given(st.lists(st.sampled_from([*CANONICAL, "abscess", "Zyst", "édema"])))
def test_the_order_of_classes_depends_on_the_set_alone_and_loses_none(labels: list[str]) -> None:
    order = class_order(labels)
    assert order == class_order(reversed(labels))
    assert sorted(order) == sorted(set(labels))
    assert [label for label in order if label in CANONICAL] == [label for label in CANONICAL if label in labels]


def test_canonical_classes_come_first_in_their_fixed_order() -> None:
    assert class_order(["abscess", "no_tumor", "glioma", "Zyst", "glioma"]) == ("glioma", "no_tumor", "Zyst", "abscess")


@pytest.mark.parametrize("mark", ["\u200b", "\u200c", "\u200e", "\u202a", "\u2066", "\ufeff", "\u00ad"])
def test_what_nobody_sees_in_a_label_makes_no_other_class(mark: str) -> None:
    assert canonical_label(f"grade{mark} 2{mark}") == "grade 2"
