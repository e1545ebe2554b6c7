"""run.json is what RunReport says, and the docs say the same; each picture is named once among the least certain."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from btray.bulk.report import (
    FORMAT_VERSION,
    AbandonedRun,
    ClassifiedFrame,
    ClassifyTally,
    ClassifyTotals,
    PartTally,
    RunReport,
    Totals,
    least_certain,
)
from btray.model.drift import Drift
from tests.conftest import ROOT
from tests.helpers.classify_helpers import run_report

OF_EVERY_RUN = {
    "objects", "unchanged", "erased", "taken_from_earlier_attempt", "frames", "rejected", "bytes", "labels",
    "rejected_by_code",
    "profile", "least_certain", "seconds", "seconds_to_first_part", "seconds_of_parts", "seconds_by_stage",
    "images_per_second", "in_series", "most_tumor",
    "images_per_second_with_start", "state", "run_id", "started_at", "ended_at", "resumed", "config", "format_version",
}  # fmt: skip
"""Keys that readers of run.json rely on: they stay."""
OF_SOME_RUNS = {"not_scans", "model_id", "drift", "summary_failed", "not_concluded", "studies", "inventory"}


def frame(name: str, confidence: float, picture: str = "", alike: int = 1) -> ClassifiedFrame:
    return ClassifiedFrame(
        uri=name, frame=0, label="glioma", confidence=confidence, place=name, picture=picture, alike=alike
    )


def test_the_keys_of_run_json_are_those_of_the_docs_and_none_is_lost() -> None:
    table = (ROOT / "docs" / "classify.md").read_text().partition("## run.json")[2].partition("\n## ")[0]
    documented = {
        name for line in re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", line)
    }
    assert documented == set(RunReport.model_fields) == OF_EVERY_RUN | OF_SOME_RUNS
    assert set(run_report().model_dump(mode="json")) == OF_EVERY_RUN
    assert set(run_report(model_id="m", drift={}).model_dump(mode="json")) == OF_EVERY_RUN | {"model_id", "drift"}


def test_a_report_is_read_as_it_was_written_and_cannot_be_changed() -> None:
    drift = Drift(frames=9, labels=0.1, by_label={"glioma": 0.1}, confidence=0.2, ood_score=None)
    report = run_report(objects=3, least_certain=[frame("a", 0.4, "p", 2)], drift={"runs before": drift})
    assert RunReport.model_validate(json.loads(json.dumps(report.model_dump(mode="json"), allow_nan=False))) == report
    assert AbandonedRun(request={"input": "a"}).model_dump(mode="json") == {
        "state": "abandoned",
        "request": {"input": "a"},
        "format_version": FORMAT_VERSION,
    }
    with pytest.raises(ValueError, match="frozen"):
        report.objects = 4


def test_a_tally_without_what_was_added_later_is_read() -> None:
    scan = {"uri": "a", "frame": 0, "label": "glioma", "confidence": 0.5, "place": "a"}
    old: dict[str, Any] = {
        "objects": 1, "frames": 1, "bytes": 7, "labels": {"glioma": 1}, "rejected": {}, "seconds": {"read": 0.1},
        "least_certain": [scan],
    }  # fmt: skip
    assert ClassifyTally.model_validate_json(json.dumps(old)).least_certain == [frame("a", 0.5)]
    assert PartTally.model_validate_json(json.dumps(old)).objects == 1


def test_what_belongs_to_a_classification_is_not_counted_by_other_jobs() -> None:
    tally = ClassifyTally(objects=2, frames=2, labels={"glioma": 2}, least_certain=[frame("a", 0.5)]).model_dump_json()
    totals, classified = Totals(PartTally), ClassifyTotals(count=1)
    assert totals.add("0", tally) == PartTally(objects=2, frames=2)
    classified.add("0", tally)
    assert not hasattr(totals, "labels")
    assert (classified.objects, classified.labels) == (2, {"glioma": 2})


def test_each_picture_stands_once_among_the_least_certain_with_how_many_are_like_it() -> None:
    frames = [frame("a", 0.3, "p"), frame("b", 0.5, "q"), frame("c", 0.3, "p"), frame("d", 0.9, "r"), frame("e", 0.7)]
    assert least_certain(frames, 3) == [frame("a", 0.3, "p", 2), frame("b", 0.5, "q"), frame("e", 0.7)]
    totals = ClassifyTotals(count=2)
    for part in ("0", "1"):
        totals.add(part, ClassifyTally(objects=5, frames=5, least_certain=least_certain(frames, 2)).model_dump_json())
    assert totals.least_certain == [frame("a", 0.3, "p", 4), frame("b", 0.5, "q", 2)]


def test_frames_of_unknown_pixels_are_all_different() -> None:
    assert least_certain([frame("a", 0.3), frame("b", 0.3)], 9) == [frame("a", 0.3), frame("b", 0.3)]
