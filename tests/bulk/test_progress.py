"""The progress line says what is done, how fast and how long it takes; the summary says it all."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from btray.bulk import report as report_module
from btray.bulk.progress import duration, progress_line, summarize
from btray.bulk.report import ClassifyTally, ClassifyTotals, RunReport


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time that the report sees."""
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(report_module.time, "monotonic", lambda: now.seconds)
    return now


def tally(objects: int, *, rejected: dict[str, int] | None = None, reused: bool = False) -> str:
    wrong = rejected or {}
    frames = objects - sum(wrong.values())
    return ClassifyTally(
        objects=objects,
        frames=frames,
        bytes=9,
        labels={"glioma": frames},
        rejected=wrong,
        seconds={"read": 1.0, "predict": 3.0},
        reused=reused,
    ).model_dump_json()


def report_of(totals: ClassifyTotals, unchanged: int) -> RunReport:
    return totals.report(unchanged=unchanged, run_id="run", started_at="", ended_at="", resumed=False, config={})


def listed(objects: int, *, complete: bool) -> Any:
    return SimpleNamespace(objects=objects, complete=complete)


def at_work(clock: SimpleNamespace) -> ClassifyTotals:
    """300 objects in 20 s after the first part, at 10 a second."""
    totals = ClassifyTotals()
    for part, seconds in (("0", 5), ("1", 10), ("2", 10)):
        clock.seconds += seconds
        totals.add(part, tally(100, rejected={"truncated": 2}))
    return totals


def test_the_time_left_is_what_the_rate_gives_for_the_rest(clock: SimpleNamespace) -> None:
    totals = at_work(clock)
    assert progress_line(totals, listed(1550, complete=True)) == "300 of 1550, 10 images/s, 6 rejected, 2:05 left"
    # nobody knows how much more is listed
    assert progress_line(totals, listed(1550, complete=False)) == "300 of 1550 or more, 10 images/s, 6 rejected"


def test_the_rate_leaves_out_the_first_part_and_what_an_earlier_attempt_did(clock: SimpleNamespace) -> None:
    totals = at_work(clock)
    totals.add("3", tally(100, reused=True))
    assert totals.add("2", tally(100)) is None, "a part that is reported again counts once"
    assert (totals.objects, totals.rate) == (400, 10.0)
    report = report_of(totals, 7)
    assert (report.unchanged, report.taken_from_earlier_attempt) == (7, 100)
    assert (report.seconds, report.seconds_to_first_part) == (25.0, 5.0)
    assert report.images_per_second_with_start == 12.0


def test_the_summary_says_how_many_of_what_and_where_time_went(clock: SimpleNamespace) -> None:
    assert summarize(report_of(at_work(clock), 7)).splitlines() == [
        "300 objects in 0:25: 294 frames classified, 6 rejected; 7 unchanged",
        "labels: glioma 294",
        "rejected: truncated 6",
        "10 images/s; of the actors' time: read 25 %, predict 75 %",
    ]
    clock.seconds += 3
    nothing = ClassifyTotals()
    clock.seconds += 2
    assert summarize(report_of(nothing, 9)) == "0 objects in 0:02: 0 frames classified, 0 rejected; 9 unchanged"


@pytest.mark.parametrize(("seconds", "said"), [(0.4, "0:00"), (59.6, "1:00"), (125, "2:05"), (3723, "1:02:03")])
def test_durations_read_like_a_clock(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_a_rate_over_less_than_five_seconds_is_not_told(clock: SimpleNamespace) -> None:
    totals = ClassifyTotals()
    for part, seconds in (("0", 13.0), ("1", 0.01), ("2", 4.9)):
        clock.seconds += seconds
        totals.add(part, tally(100))
    assert "images/s" not in progress_line(totals, listed(400, complete=True))
    assert "left" not in progress_line(totals, listed(400, complete=True))
    report = report_of(totals, 0)
    assert "images/s" not in summarize(report)
    assert report.images_per_second > 0, "for programs it is there"
    clock.seconds += 0.2
    totals.add("3", tally(100))
    assert "images/s" in progress_line(totals, listed(400, complete=True))
    assert "images/s" in summarize(report_of(totals, 0))
