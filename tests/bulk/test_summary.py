"""The summary shows each picture once, and its figures hide none of what they show."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from inspect import unwrap
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from btray import phantoms, storage
from btray.bulk import summary
from btray.bulk.runs import Run
from btray.model.classifier import Classifier
from btray.model.drift import CONFIDENCE_EDGES, Drift, Profile
from tests.helpers.classify_helpers import part_classifier, run_report
from tests.helpers.tiny_bundle import saved_bundle


def profile_of(label: str, confidence: float) -> Profile:
    answer = {"label": label, "confidence": confidence, "ood_score": 1.0}
    return Profile.of([{**answer, "abstained": False, "out_of_distribution": False}] * 9)


def draw_confidence(profiles: Mapping[str, Profile]) -> Figure:
    counts = {name: profile.confidence for name, profile in profiles.items()}
    return unwrap(summary.draw_histogram)("Confidence", "calibrated", counts, CONFIDENCE_EDGES, "confidence")


@pytest.mark.parametrize("draw", [unwrap(summary.draw_labels), draw_confidence], ids=["labels", "confidence"])
@pytest.mark.parametrize("confidence", [0.05, 0.5, 0.99])
def test_no_legend_lies_over_a_bar(draw: Callable[[Mapping[str, Profile]], Figure], confidence: float) -> None:
    names = ("this run", "validation images", "runs before")
    figure = draw({name: profile_of("glioma", confidence) for name in names})
    figure.draw_without_rendering()
    (body,) = [part for part in figure.subfigs if part.axes]
    (legend,) = body.legends
    assert [text.get_text() for text in legend.get_texts()] == list(names)
    assert not legend.get_window_extent().overlaps(body.axes[0].get_window_extent())


def test_each_picture_stands_once_on_the_page_with_how_many_are_like_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, scans = str(tmp_path / "model"), tmp_path / "scans"
    saved_bundle(model)
    for name, seed in (("a", 1), ("b", 2), ("copy of a", 1), ("other copy of a", 1)):
        storage.write_bytes(str(scans / f"{name}.jpg"), phantoms.encoded_phantom("glioma", seed))
    processor = part_classifier(monkeypatch, model)
    objects = list(storage.list_files(str(scans)))
    seconds: defaultdict[str, float] = defaultdict(float)
    rows = [row for lot in processor.lots(objects, seconds) for row in processor.rows(objects, lot, seconds)]
    tally = processor.tally(rows, objects, seconds)
    assert sorted(frame.alike for frame in tally.least_certain) == [1, 3]
    report = run_report(
        objects=1234,
        rejected_by_code={"truncated": 2},
        profile=tally.profile,
        least_certain=tally.least_certain,
        drift={
            "runs before": Drift(
                frames=900, observed=900, labels=0.3, by_label={"glioma": 0.3}, confidence=0.1, ood_score=None
            )
        },
        config={"input": str(scans)},
    )
    run = Run(run_id="run", group="model", parts="parts", output=str(tmp_path / "out"), request={})
    uri = summary.write_summary(run, report, {"this run": report.profile}, Classifier.load(model))
    page = storage.read_text(uri)
    assert page.count('alt="slice"') == 2
    assert page.count("(3 identical)") == page.count("identical)") == 1
    cells = {text for row in re.findall(r"<tr>.*?</tr>", page, re.DOTALL) for text in re.findall(r">([^<>\n]+)<", row)}
    assert {"classified", "1,234", "rejected: truncated", "2", "runs before (900 frames)", "label mix"} <= cells
    assert {"of the label mix: glioma", "0.300", "out-of-distribution score", "-"} <= cells
