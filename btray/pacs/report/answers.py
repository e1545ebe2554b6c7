"""What a report says: the answers of one model for one study and its series."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Self

from btray.model.studies import Decision, Reader


@dataclass(frozen=True, kw_only=True)
class SourceFrame:
    """A frame that an answer is made of."""

    series_uid: str
    instance_uid: str
    frame: int
    """Its number within the instance, from 0."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model says of a series, or of a study."""

    series_uid: str | None
    """None: of the study."""
    label: str
    confidence: float
    probabilities: Mapping[str, float]
    abstained: bool
    frames: int
    """Classified ones."""
    rejected: int
    sources: tuple[SourceFrame, ...]
    """The frames that `probabilities` are the mean of."""

    @property
    def name(self) -> str:
        """What the answer is called in a report."""
        return f"series {self.series_uid}: answer" if self.series_uid else "study: answer"

    @property
    def statements(self) -> Iterator[tuple[str, str, float]]:
        """Name, label and probability of the answer, and then of each class: the groups of a report."""
        yield self.name, self.label, self.confidence
        of = self.name.removesuffix("answer")
        yield from ((f"{of}{label}", label, probability) for label, probability in self.probabilities.items())


@dataclass(frozen=True, kw_only=True)
class StudyAnswer:
    """What a model says of a study, and of each of its series of which it says anything."""

    study_uid: str
    model_id: str
    rule: str
    """How frames become answers: `mean of the top 3`."""
    classified_at: datetime
    """With a time zone: when the latest frame was classified. It dates all that is reported."""
    study: Answer
    series: tuple[Answer, ...]
    key_frames: tuple[SourceFrame, ...]
    """Those with the most tumor in the study, most first."""

    @property
    def parts(self) -> tuple[Answer, ...]:
        """The answer for the study, and then those for its series."""
        return (self.study, *self.series)

    @classmethod
    def of_rows(cls, rows: Sequence[Mapping[str, Any]], *, model_id: str, top: int) -> Self | None:
        """Make it of the rows of one study in the table of studies, whose rule averages `top` frames of each series.

        Returns None if no frame of the study was classified, or none that has UIDs.
        """
        answered = [row for row in rows if row["label"] is not None]
        study = next((row for row in answered if row["level"] == "study"), None)
        if study is None:
            return None
        series = sorted((row for row in answered if row["level"] == "series"), key=lambda row: str(row["series_uid"]))
        parts = [_answer(row, _frames(row)[:top]) for row in series]
        key_frames = _frames(study)
        # the study is the mean of its series; frames of no series can only be those that the study names
        sources = [frame for part in parts for frame in part.sources] or key_frames[:top]
        if not sources:
            return None
        return cls(
            study_uid=study["study_uid"],
            model_id=model_id,
            rule=study["rule"],
            classified_at=study["classified_at"],
            study=_answer(study, sources),
            series=tuple(part for part in parts if part.sources),
            key_frames=tuple(key_frames),
        )

    @classmethod
    def of_decisions(
        cls,
        decisions: Sequence[Decision],
        reader: Reader,
        *,
        sources: Mapping[str | None, tuple[str, str]],
        model_id: str,
        classified_at: datetime,
    ) -> Self | None:
        """Make it of the decisions on one study; None as for `of_rows`.

        `sources` has the UIDs of series and instance of each input, by the name that it has in the decisions.
        """

        def key_frame(uri: str | None, frame: int) -> dict[str, Any]:
            series, instance = sources[uri]
            return {"series_uid": series, "instance_uid": instance, "frame": frame}

        rows = [
            {"level": decision.level, "study_uid": decision.study_uid, "series_uid": decision.series_uid}
            | {"rule": str(reader), "classified_at": classified_at}
            | asdict(decision.verdict)
            | {"key_frames": [key_frame(*name) for name in decision.key_frames]}
            for decision in decisions
        ]
        return cls.of_rows(rows, model_id=model_id, top=reader.rule.top)


def _frames(row: Mapping[str, Any]) -> list[SourceFrame]:
    named = (frame for frame in row["key_frames"] if frame["series_uid"] and frame["instance_uid"])
    return [SourceFrame(**{name: frame[name] for name in ("series_uid", "instance_uid", "frame")}) for frame in named]


def _answer(row: Mapping[str, Any], sources: Sequence[SourceFrame]) -> Answer:
    said = {name: row[name] for name in ("series_uid", "label", "confidence", "abstained", "frames", "rejected")}
    return Answer(**said, probabilities=dict(row["probabilities"]), sources=tuple(sources))
