"""From frames to series and studies: one rule for the nightly table, `btray predict` and the service. Free of torch.

A series gets the mean probabilities of its `top` frames with the most tumor, since a tumor is seen in few slices; a
study gets the mean of its series.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import numpy.typing as npt

from btray.model.manifest import Manifest, StudyRule
from btray.model.prediction import Prediction

NO_TUMOR = "no_tumor"
KEY_FRAMES = 10
"""Most frames that are named for a series or study: those with the most tumor."""
DEFAULT_RULE = StudyRule(top=3)
_TOPS = (1, 2, 3, 5, 8, 13, 21)
_LEAST_SUBJECTS = 20  # with several slices, below which a choice would be chance


@dataclass(frozen=True, kw_only=True)
class Reader:
    """How one model's frames become series and studies."""

    classes: tuple[str, ...]
    rule: StudyRule
    is_default: bool
    """The bundle has no rule."""
    abstain_below: float | None

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        """Return that of a bundle."""
        rule = manifest.study_rule
        threshold = manifest.thresholds.abstain_below
        return cls(
            classes=manifest.classes, rule=rule or DEFAULT_RULE, is_default=rule is None, abstain_below=threshold
        )

    def __str__(self) -> str:
        default = " (default: the bundle has no rule)" if self.is_default else ""
        return f"mean of the top {self.rule.top}{default}"

    def tumor(self, probabilities: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
        """Return the probability of any tumor, [n], from those of the classes, [n, classes].

        If all classes are tumors, return that of the most probable one.
        """
        if NO_TUMOR not in self.classes:
            return np.asarray(probabilities.max(axis=1, initial=0.0))
        return np.asarray(1.0 - probabilities[:, self.classes.index(NO_TUMOR)])


@dataclass(frozen=True, kw_only=True)
class FrameAnswers:
    """What a model says of the n classified frames of a series, and how many were rejected."""

    probabilities: npt.NDArray[np.float32]
    """[n, classes]"""
    abstained: npt.NDArray[np.bool_]
    """[n]"""
    out_of_distribution: npt.NDArray[np.bool_]
    """[n]"""
    rejected: int = 0

    @classmethod
    def of(cls, predictions: Sequence[Prediction], classes: Sequence[str]) -> Self:
        """Return those of predictions; of the frames, rejected ones aside, in their order."""
        answered = [prediction for prediction in predictions if prediction.status == "ok"]
        rows = [[prediction.probabilities[label] for label in classes] for prediction in answered]
        return cls(
            probabilities=np.array(rows, np.float32).reshape(len(answered), len(classes)),
            abstained=np.array([prediction.abstained for prediction in answered], bool),
            out_of_distribution=np.array([prediction.out_of_distribution for prediction in answered], bool),
            rejected=len(predictions) - len(answered),
        )

    @classmethod
    def together(cls, series: Sequence[FrameAnswers]) -> Self:
        """Return those of several series, one after the other."""
        return cls(
            probabilities=np.concatenate([answers.probabilities for answers in series]),
            abstained=np.concatenate([answers.abstained for answers in series]),
            out_of_distribution=np.concatenate([answers.out_of_distribution for answers in series]),
            rejected=sum(answers.rejected for answers in series),
        )


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the frames of a series or study say together; None if none was classified."""

    frames: int
    """Classified ones."""
    rejected: int
    abstained_frames: int
    ood_frames: int
    label: str | None = None
    confidence: float | None = None
    probabilities: dict[str, float] | None = None
    agreement: float | None = None
    """Share of the classified frames whose own label it is."""
    abstained: bool = True
    """The confidence is below the model's threshold for frames, or there is none."""
    key_frames: tuple[int, ...] = ()
    """Positions among the classified frames of those with the most tumor, most first."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What a series says (`level` "series"), or a study."""

    level: str
    study_uid: str | None
    series_uid: str | None
    """None for a study."""
    verdict: Verdict
    key_frames: Sequence[tuple[str | None, int]]
    """The inputs and frames that `verdict.key_frames` are."""


class StudyCollector:
    """Collects predictions of a few studies, in any order, to decide them together."""

    def __init__(self, reader: Reader) -> None:
        """Collect nothing yet."""
        self._reader = reader
        self._studies: dict[str | None, dict[str | None, list[tuple[FrameAnswers, list[tuple[str | None, int]]]]]] = {}

    def add(self, predictions: Sequence[Prediction]) -> None:
        """Add predictions; those that belong to no series or study are passed over."""
        of_series: dict[tuple[str | None, str | None], list[Prediction]] = {}
        for prediction in predictions:
            if prediction.study_uid or prediction.series_uid:
                of_series.setdefault((prediction.study_uid, prediction.series_uid), []).append(prediction)
        for (study, series), some in of_series.items():
            names = [(prediction.uri, prediction.frame) for prediction in some if prediction.status == "ok"]
            pieces = self._studies.setdefault(study, {}).setdefault(series, [])
            pieces.append((FrameAnswers.of(some, self._reader.classes), names))

    def decisions(self) -> Iterator[Decision]:
        """Yield each series of a study, then the study."""
        for study, of_study in self._studies.items():
            everything: list[tuple[str | None, int]] = []
            answers = []
            for series, pieces in of_study.items():
                names = [name for _, some in pieces for name in some]
                answers.append(FrameAnswers.together([some for some, _ in pieces]))
                everything += names
                if series is not None:
                    verdict = judge_series(answers[-1], self._reader)
                    yield _decision("series", study, series, verdict, names)
            if study is not None:
                yield _decision("study", study, None, judge_study(answers, self._reader), everything)


def _decision(
    level: str, study: str | None, series: str | None, verdict: Verdict, names: Sequence[tuple[str | None, int]]
) -> Decision:
    shown = [names[number] for number in verdict.key_frames]
    return Decision(level=level, study_uid=study, series_uid=series, verdict=verdict, key_frames=shown)


def judge_series(answers: FrameAnswers, reader: Reader) -> Verdict:
    """Return what one series says."""
    top = _most_tumor(answers, reader)[: reader.rule.top]
    return _verdict(answers, answers.probabilities[top].mean(axis=0) if len(top) else None, reader)


def judge_study(series: Sequence[FrameAnswers], reader: Reader) -> Verdict:
    """Return what a study says, of at least one series; key frames count through all of them, one after the other."""
    verdicts = [judge_series(answers, reader).probabilities for answers in series]
    means = [list(probabilities.values()) for probabilities in verdicts if probabilities]
    return _verdict(FrameAnswers.together(series), np.mean(means, axis=0) if means else None, reader)


def choose_rule(
    subjects: npt.NDArray[np.int64],
    labels: npt.NDArray[np.int64],
    probabilities: npt.NDArray[np.float32],
    classes: tuple[str, ...],
) -> StudyRule | None:
    """Choose how many frames to average, on patients with several frames that the model has not learnt from.

    The truth of a patient is the tumor that any frame is labelled with, or no tumor; those with two tumors are left
    out. The best rule gives it the highest likelihood, in the mean of the classes' mean logarithms.

    Args:
        subjects: whose each frame is, [n].
        labels: of the frames, [n].
        probabilities: the model's, calibrated, [n, classes].
        classes: the model's labels.

    Returns:
        The rule; None for fewer than 20 such patients, or if all of them show the same.
    """
    cases: list[tuple[int, FrameAnswers]] = []
    for subject in np.unique(subjects):
        frames = np.flatnonzero(subjects == subject)
        shown = {int(label) for label in labels[frames]}
        tumors = {label for label in shown if classes[label] != NO_TUMOR}
        if len(frames) > 1 and len(tumors) < 2:
            no = np.zeros(len(frames), bool)
            answers = FrameAnswers(probabilities=probabilities[frames], abstained=no, out_of_distribution=no)
            cases.append((min(tumors or shown), answers))
    truth = np.array([label for label, _ in cases])
    if len(cases) < _LEAST_SUBJECTS or len(np.unique(truth)) < 2:
        return None

    def likelihood(top: int) -> float:
        reader = Reader(classes=classes, rule=StudyRule(top=top), is_default=False, abstain_below=None)
        given = [(judge_series(answers, reader).probabilities or {})[classes[label]] for label, answers in cases]
        logarithms = np.log(np.maximum(given, 1e-6))
        return float(np.mean([logarithms[truth == label].mean() for label in np.unique(truth)]))

    return StudyRule(top=max(_TOPS, key=likelihood))


def _most_tumor(answers: FrameAnswers, reader: Reader) -> npt.NDArray[np.intp]:
    return np.argsort(-reader.tumor(answers.probabilities), kind="stable")


def _verdict(answers: FrameAnswers, mean: npt.NDArray[np.floating] | None, reader: Reader) -> Verdict:
    unread = Verdict(
        frames=len(answers.probabilities),
        rejected=answers.rejected,
        abstained_frames=int(answers.abstained.sum()),
        ood_frames=int(answers.out_of_distribution.sum()),
    )
    if mean is None:
        return unread
    best = int(mean.argmax())
    confidence = float(mean[best])
    return replace(
        unread,
        label=reader.classes[best],
        confidence=confidence,
        probabilities=dict(zip(reader.classes, map(float, mean), strict=True)),
        agreement=float((answers.probabilities.argmax(axis=1) == best).mean()),
        abstained=reader.abstain_below is not None and confidence < reader.abstain_below,
        key_frames=tuple(_most_tumor(answers, reader)[:KEY_FRAMES].tolist()),
    )
