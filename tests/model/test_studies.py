"""Frames, series and studies: the rule takes the frames with the most tumor, whatever their order and number."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from btray.data.frames import Rejection
from btray.model.manifest import StudyRule
from btray.model.prediction import Prediction
from btray.model.studies import FrameAnswers, Reader, choose_rule, judge_series, judge_study
from tests.helpers.tiny_bundle import random_bundle

CLASSES = ("glioma", "meningioma", "no_tumor")
READER = Reader(classes=CLASSES, rule=StudyRule(top=2), is_default=False, abstain_below=0.6)


def answers(*rows: tuple[float, ...], rejected: int = 0) -> FrameAnswers:
    count = len(rows)
    return FrameAnswers(
        probabilities=np.array(rows, np.float32).reshape(count, 3),
        abstained=np.arange(count) == 0,
        out_of_distribution=np.arange(count) == 1,
        rejected=rejected,
    )


def test_a_series_is_the_mean_of_its_frames_with_the_most_tumor() -> None:
    said = judge_series(
        answers((0.1, 0.1, 0.8), (0.9, 0.05, 0.05), (0.0, 0.0, 1.0), (0.5, 0.3, 0.2), rejected=4), READER
    )
    assert said.probabilities == pytest.approx({"glioma": 0.7, "meningioma": 0.175, "no_tumor": 0.125})
    assert (said.label, said.agreement, said.abstained) == ("glioma", 0.5, False)
    assert said.confidence == pytest.approx(0.7)
    assert said.key_frames == (1, 3, 0, 2)
    assert (said.frames, said.rejected, said.abstained_frames, said.ood_frames) == (4, 4, 1, 1)


def test_a_study_is_the_mean_of_its_series_however_many_frames_they_have() -> None:
    one, many = answers((0.9, 0.05, 0.05)), answers(*[(0.2, 0.0, 0.8)] * 50)
    said = judge_study([one, many, answers(rejected=3)], READER)
    assert said.probabilities == pytest.approx({"glioma": 0.55, "meningioma": 0.025, "no_tumor": 0.425})
    assert (said.label, said.frames, said.rejected, said.abstained) == ("glioma", 51, 3, True)
    assert said.agreement == pytest.approx(1 / 51)
    assert said.key_frames == tuple(range(10))


def test_what_has_no_classified_frame_has_no_answer() -> None:
    for said in (judge_series(answers(rejected=2), READER), judge_study([answers(), answers(rejected=2)], READER)):
        assert (said.label, said.confidence, said.probabilities, said.agreement, said.key_frames) == (None,) * 4 + ((),)
        assert (said.frames, said.rejected, said.abstained) == (0, 2, True)


@given(st.lists(st.tuples(*[st.floats(0.01, 1)] * 3), min_size=1, max_size=30), st.randoms())
def test_neither_order_nor_frames_without_tumor_change_the_answer(rows: list[tuple[float, ...]], random) -> None:  # type: ignore[no-untyped-def]
    shares = [tuple(value / sum(row) for value in row) for row in rows]
    said = judge_series(answers(*shares), READER)
    more = [*shares, *[(0.0, 0.0, 1.0)] * (9 if len(rows) > 1 else 0)]
    random.shuffle(more)
    again = judge_series(answers(*more), READER)
    tumor = READER.tumor(np.array(shares, np.float32))
    if len(set(tumor.tolist())) == len(tumor):  # of equals the first ones count
        assert again.probabilities == pytest.approx(said.probabilities, abs=1e-6)
    assert sum((said.probabilities or {}).values()) == pytest.approx(1, abs=1e-5)
    assert said.label in CLASSES


def test_a_model_that_knows_tumors_alone_ranks_frames_by_confidence() -> None:
    reader = replace(READER, classes=("a", "b", "c"), rule=StudyRule(top=1))
    assert judge_series(answers((0.4, 0.3, 0.3), (0.1, 0.8, 0.1)), reader).label == "b"


def test_predictions_become_answers_and_rejections_are_counted() -> None:
    shares = dict(zip(CLASSES, (0.5, 0.25, 0.25), strict=True))
    ok = Prediction(index=0, label="glioma", confidence=0.5, probabilities=shares, abstained=True)
    bad = Prediction.of_rejection(Rejection("truncated", "", False), index=1, uri=None, model_id="m")
    made = FrameAnswers.of([ok, bad], CLASSES)
    assert (made.probabilities.tolist(), made.abstained.tolist(), made.rejected) == ([[0.5, 0.25, 0.25]], [True], 1)
    assert FrameAnswers.of([bad], CLASSES).probabilities.shape == (0, 3)


def test_the_rule_of_a_bundle_is_used_and_its_absence_is_said() -> None:
    manifest = random_bundle().manifest
    assert str(Reader.of(manifest)) == "mean of the top 3 (default: the bundle has no rule)"
    ruled = manifest.model_copy(update={"study_rule": StudyRule(top=7)})
    assert str(Reader.of(ruled)) == "mean of the top 7"
    assert ruled.identity_digest() == manifest.model_id


def test_the_rule_averages_as_many_frames_as_show_the_tumor() -> None:
    """Of each patient's 12 frames `shown` ones show the tumor; the surest one errs in half of the patients."""
    for shown in (3, 8):
        frames, labels, whose = [], [], []
        for patient in range(40):
            truth = patient % 2
            wrong = (0.05, 0.9, 0.05) if truth == 0 else (0.9, 0.05, 0.05)
            right = wrong[1], wrong[0], wrong[2]
            of_patient = [wrong if patient % 4 < 2 else right, *[tuple(0.9 * share for share in right)] * (shown - 1)]
            of_patient += [(0.3, 0.3, 0.4)] * (12 - shown)
            frames += [(*row[:2], 1 - row[0] - row[1]) for row in of_patient]
            labels += [truth] * shown + [2] * (12 - shown)  # the rest of a tumor patient's frames show none
            whose += [patient] * 12
        order = np.random.default_rng(0).permutation(len(frames))
        given = np.array(frames, np.float32)[order]
        assert choose_rule(np.array(whose)[order], np.array(labels)[order], given, CLASSES) == StudyRule(top=shown)


def test_no_rule_is_chosen_by_chance() -> None:
    even = np.full((60, 3), 1 / 3, np.float32)
    alone, pairs = np.arange(60), np.arange(60) // 2
    two, one, both = pairs % 2, np.zeros(60, np.int64), alone % 2
    assert choose_rule(pairs, two, even, CLASSES) is not None
    assert choose_rule(alone, two, even, CLASSES) is None  # one frame each
    assert choose_rule(pairs, one, even, CLASSES) is None  # all show the same
    assert choose_rule(pairs, both, even, CLASSES) is None  # each patient has two tumors
    assert choose_rule(pairs[:38], two[:38], even[:38], CLASSES) is None  # 19 patients
    assert choose_rule(alone[:0], two[:0], even[:0], CLASSES) is None
