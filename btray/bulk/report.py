"""What a run counts: the tally of each part, their totals, and the report that becomes run.json.

docs/classify.md documents run.json; RunReport and AbandonedRun are its only definition.
"""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Generic, Literal, Self, TypeVar

from pydantic import BaseModel, Field

from btray.model.drift import Drift, Profile
from btray.storage import FileInfo

FORMAT_VERSION = 1
SHOWN_STUDIES, SHOWN_FRAMES = 12, 3
"""What summary.html shows: studies of a run with the most tumor, and frames of each."""
_optional: Any = Field(None, exclude_if=lambda value: value is None)
"""What only some runs have: run.json leaves it out of the others."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifiedFrame:
    """A frame that is shown to people, and what the model says of it."""

    uri: str
    frame: int
    label: str
    confidence: float
    place: str
    """Where its bytes are: `uri`, or its member URI in a packed archive."""
    picture: str = ""
    """Digest of the frame's pixels; empty in tallies that have none."""
    alike: int = 1
    """How many frames have these pixels, this one included."""
    study_uid: str | None = None
    tumor: float | None = None
    """Probability of any tumor."""

    @property
    def picture_name(self) -> str:
        """Its name in `_explained` and on the page: a digest, since a URI may hold what no file name may."""
        key = f"{self.uri}\0{self.frame}".encode("utf-8", "backslashreplace")
        return hashlib.sha256(key).hexdigest()[:20]


def least_certain(frames: Iterable[ClassifiedFrame], count: int) -> list[ClassifiedFrame]:
    """Return the `count` frames of the lowest confidence, each picture once with the number of frames that show it."""
    pictures: dict[str, ClassifiedFrame] = {}
    for frame in frames:
        picture = frame.picture or f"{frame.uri}#{frame.frame}"
        first = pictures.setdefault(picture, frame)
        if first is not frame:
            pictures[picture] = dataclasses.replace(first, alike=first.alike + frame.alike)
    return heapq.nsmallest(count, pictures.values(), key=lambda frame: frame.confidence)


def most_tumor(frames: Iterable[ClassifiedFrame]) -> list[ClassifiedFrame]:
    """Return the frames with the most tumor of the studies with the most, most first; those of no study are left out.

    At most SHOWN_FRAMES of each of SHOWN_STUDIES.
    """
    ranked = sorted((frame for frame in frames if frame.study_uid), key=lambda frame: -(frame.tumor or 0.0))
    studies: dict[str | None, list[ClassifiedFrame]] = {}
    for frame in ranked:
        studies.setdefault(frame.study_uid, []).append(frame)
    return [frame for study in [*studies.values()][:SHOWN_STUDIES] for frame in study[:SHOWN_FRAMES]]


class PartTally(BaseModel, frozen=True):
    """Counts of one part, as they stand in the footer of its file and as the driver gets them."""

    objects: int = 0
    frames: int = 0
    """Rows that were not rejected."""
    bytes: int = 0
    """Of the objects, as listed."""
    rejected: dict[str, int] = Field(default_factory=dict)
    """Error code -> rows."""
    seconds: dict[str, float] = Field(default_factory=dict)
    """Stage -> seconds that the actor spent in it."""
    reused: bool = False
    """The file was written by an earlier attempt at this part."""

    @classmethod
    def of(
        cls, rows: Sequence[Mapping[str, Any]], objects: Sequence[FileInfo], seconds: Mapping[str, float], **more: Any
    ) -> Self:
        """Count `rows`, which came of `objects`; `more` are the fields of a subclass."""
        rejected = Counter(row["error_code"] for row in rows if row["error_code"] is not None)
        return cls(
            objects=len(objects),
            frames=len(rows) - rejected.total(),
            bytes=sum(info.size for info in objects),
            rejected=rejected,
            seconds=dict(seconds),
            **more,
        )


class ClassifyTally(PartTally, frozen=True):
    """Counts of one part of a classification."""

    labels: dict[str, int] = Field(default_factory=dict)
    profile: Profile = Field(default_factory=Profile)
    least_certain: list[ClassifiedFrame] = Field(default_factory=list)
    in_series: int = 0
    """Rows that belong to a series or study."""
    most_tumor: list[ClassifiedFrame] = Field(default_factory=list)


RATE_SECONDS = 5.0
"""Seconds from which on a rate is told to people: over less, one part more or less is most of it."""


class StudyCounts(BaseModel, frozen=True):
    """How many series and studies the table of studies has, and how they were decided."""

    series: int
    studies: int
    rule: str


class InventoryRead(BaseModel, frozen=True):
    """What a run keeps of the inventory that it has read: see `btray.bulk.listing.comparison`."""

    open: str
    """Why objects of it are left to be read; empty if none is."""
    files: dict[str, tuple[int, int, int, int]]
    """Digest of each file -> how many of its objects were chosen, seen, counted and inside the output."""
    settings: str
    """Digest of what says which objects are chosen."""
    table_files: dict[str, int]
    """How many files each run had in the table when this one ended."""


class RunReport(BaseModel, frozen=True):
    """What run.json says of a run that has finished. Times are in seconds; those of stages are summed over the actors.

    Fields are added and never removed or renamed; one that changes its meaning increases FORMAT_VERSION.
    """

    objects: int
    unchanged: int
    erased: int = 0
    not_scans: dict[str, int] | None = _optional
    taken_from_earlier_attempt: int
    frames: int
    rejected: int
    bytes: int
    labels: dict[str, int] = Field(default_factory=dict)
    rejected_by_code: dict[str, int]
    profile: Profile = Field(default_factory=Profile)
    least_certain: list[ClassifiedFrame] = Field(default_factory=list)
    in_series: int = 0
    most_tumor: list[ClassifiedFrame] = Field(default_factory=list)
    studies: StudyCounts | None = _optional
    inventory: InventoryRead | None = _optional
    seconds: float
    seconds_to_first_part: float | None
    seconds_of_parts: float = 0.0
    seconds_by_stage: dict[str, float]
    images_per_second: float
    images_per_second_with_start: float
    state: Literal["finished"] = "finished"
    run_id: str
    started_at: str
    ended_at: str
    resumed: bool
    config: dict[str, Any]
    model_id: str | None = _optional
    drift: dict[str, Drift] | None = _optional
    summary_failed: str | None = _optional
    not_concluded: str | None = _optional
    format_version: int = FORMAT_VERSION

    @property
    def has_rate(self) -> bool:
        """Whether the parts took long enough for the rate to mean something."""
        return self.seconds_of_parts >= RATE_SECONDS


class AbandonedRun(BaseModel, frozen=True):
    """What run.json says of a run that was interrupted and that another request has replaced.

    Versions without a `format_version` wrote the state as "given up".
    """

    state: Literal["abandoned"] = "abandoned"
    request: dict[str, Any]
    format_version: int = FORMAT_VERSION


Tally = TypeVar("Tally", bound=PartTally)


class Totals(Generic[Tally]):
    """Counts of the parts that are done; each part counts once, however often it is reported."""

    def __init__(self, tally_type: type[Tally]) -> None:
        """Start the clock; the tallies to come are of the class `tally_type`."""
        self.objects = 0
        self.frames = 0
        self.bytes = 0
        self.rejected: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        self.reused = 0
        self.fresh = 0
        self.started = time.monotonic()
        self.first: float | None = None
        self.last = self.started
        self._tally_type = tally_type
        self._of_first = 0
        self._parts: set[str] = set()

    def add(self, part: str, tally: str) -> Tally | None:
        """Count one part by its `tally`, JSON from the actor, and return it; None if the part was counted before."""
        if part in self._parts:
            return None
        self._parts.add(part)
        counts = self._tally_type.model_validate_json(tally)
        self.objects += counts.objects
        self.frames += counts.frames
        self.bytes += counts.bytes
        self.rejected.update(counts.rejected)
        if counts.reused:
            self.reused += counts.objects
            return counts
        self.seconds.update(counts.seconds)
        self.fresh += counts.objects
        self.last = time.monotonic()
        if self.first is None:
            self.first, self._of_first = self.last, counts.objects
        return counts

    @property
    def parts(self) -> int:
        """Number of the parts."""
        return len(self._parts)

    @property
    def rate_seconds(self) -> float:
        """Seconds between the first part and the last."""
        return self.last - (self.first or self.last)

    @property
    def rate(self) -> float:
        """Objects per second in these; 0 if there was one part at most."""
        return (self.fresh - self._of_first) / self.rate_seconds if self.rate_seconds > 0 else 0.0

    def report(self, **facts: Any) -> RunReport:
        """Return the report of a run that ends now; `facts` are the fields of RunReport that are no totals."""
        elapsed = time.monotonic() - self.started
        return RunReport(
            objects=self.objects,
            taken_from_earlier_attempt=self.reused,
            frames=self.frames,
            rejected=self.rejected.total(),
            bytes=self.bytes,
            rejected_by_code=dict(self.rejected.most_common()),
            seconds=round(elapsed, 3),
            seconds_to_first_part=None if self.first is None else round(self.first - self.started, 3),
            seconds_of_parts=round(self.rate_seconds, 3),
            seconds_by_stage={stage: round(spent, 3) for stage, spent in self.seconds.items()},
            images_per_second=round(self.rate or self.fresh / elapsed, 2),
            images_per_second_with_start=round(self.fresh / elapsed, 2),
            **facts,
        )


class ClassifyTotals(Totals[ClassifyTally]):
    """Counts of a classification: those of every job, and labels, profile and the least certain frames."""

    def __init__(self, *, count: int = 0) -> None:
        """Start the clock; keep `count` of the least certain frames."""
        super().__init__(ClassifyTally)
        self._count = count
        self.labels: Counter[str] = Counter()
        self.profile = Profile()
        self.least_certain: list[ClassifiedFrame] = []
        self.in_series = 0
        self.most_tumor: list[ClassifiedFrame] = []

    def add(self, part: str, tally: str) -> ClassifyTally | None:
        """Count one part; see `Totals.add`."""
        counts = super().add(part, tally)
        if counts is not None:
            self.labels.update(counts.labels)
            self.profile += counts.profile
            self.least_certain = least_certain([*self.least_certain, *counts.least_certain], self._count)
            self.in_series += counts.in_series
            self.most_tumor = most_tumor([*self.most_tumor, *counts.most_tumor])
        return counts

    def report(self, **facts: Any) -> RunReport:
        """Return the report; see `Totals.report`."""
        return super().report(
            labels=dict(self.labels.most_common()),
            profile=self.profile,
            least_certain=self.least_certain,
            in_series=self.in_series,
            most_tumor=self.most_tumor,
            **facts,
        )
