"""What a night's classification looked like: label mix, confidence, scores and drift, and the least certain scans."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from btray import storage
from btray.bulk import runs
from btray.bulk.explanations import explain_scans, read_frames
from btray.bulk.runs import Run
from btray.model.bundle import Bundle, read_file
from btray.model.classifier import Classifier
from btray.model.drift import LARGE, REFERENCE, RUNS_BEFORE, Profile, drift
from btray.reports.page import NO_DIAGNOSIS, Section, data_uri, render_page

SUMMARY = "summary.html"
_NIGHTS = 30
SHOWN = 24
"""How many of the least certain scans the summary shows."""

Report = dict[str, Any]


def compare(run: Run, report: Report, bundle: Bundle) -> dict[str, Profile]:
    """Put `drift` into the report; return what was compared: this run, the training data, the runs before."""
    observed = Profile.from_json(report["profile"])
    profiles = {"this run": observed}
    if (reference := read_file(bundle, REFERENCE)) is not None:
        profiles["validation images"] = Profile.from_json(json.loads(reference))
    before = Profile()
    for number, earlier in enumerate(runs.reports(run.output, run.group)):
        if number == _NIGHTS:
            break
        if earlier.get("profile"):
            before.add(Profile.from_json(earlier["profile"]))
    if before.frames:
        profiles[RUNS_BEFORE] = before
    report["drift"] = {
        name: drift(profile, observed) for name, profile in profiles.items() if name != "this run" and observed.frames
    }
    return profiles


def write_summary(run: Run, report: Report, profiles: Mapping[str, Profile], classifier: Classifier) -> str:
    """Write summary.html beside run.json; return its URI."""
    page = render_page(
        "btray.bulk",
        "summary.html",
        title="A night's classification",
        notice=NO_DIAGNOSIS,
        cards=_cards(report, profiles["this run"]),
        notes=_notes(report),
        figures=_figures(profiles) if profiles["this run"].frames else [],
        sheet=_sheet(report["least_certain"][:SHOWN], classifier),
        sections=_tables(report),
        facts={
            "Model": report["model_id"],
            "Run": run.run_id,
            "Input": report["config"]["input"],
            "Began": report["started_at"],
            "Ended": report["ended_at"],
        },
        facts_title="Run",
    )
    uri = storage.join(run.folder, SUMMARY)
    storage.write_text(uri, page)
    return uri


def _cards(report: Report, profile: Profile) -> list[tuple[str, str, str]]:
    frames = max(1, profile.frames)
    return [
        ("Frames", f"{profile.frames:,}", f"of {report['objects']:,} objects, new or changed"),
        ("Rejected", f"{report['rejected']:,}", "objects, each a row with a code"),
        ("Abstained", f"{profile.abstained / frames:.1%}", "confidence below the model's threshold"),
        ("Out of distribution", f"{profile.out_of_distribution / frames:.1%}", "unlike the training images"),
        ("Images a second", f"{report['images_per_second']:.0f}", "between the first and the last part"),
    ]


def _notes(report: Report) -> list[str]:
    said = []
    for name, found in report["drift"].items():
        changed = [what for what in ("labels", "confidence", "ood_score") if (found[what] or 0) > LARGE]
        if changed:
            said.append(
                f"Against the {name} ({found['frames']:,} frames) there is a large change (PSI above {LARGE}) of: "
                f"{', '.join(changed).replace('ood_score', 'out-of-distribution score')}."
            )
    return said


def _tables(report: Report) -> list[Section]:
    names = list(report["drift"])
    labels = sorted({label for found in report["drift"].values() for label in found["by_label"]})
    rows = [
        (title, *(_number(report["drift"][name][key]) for name in names))
        for title, key in (("label mix", "labels"), ("confidence", "confidence"), ("out-of-distribution", "ood_score"))
    ]
    rows += [
        (f"of the label mix: {label}", *(f"{report['drift'][name]['by_label'].get(label, 0):.3f}" for name in names))
        for label in labels
    ]
    sections = [
        Section(title="Objects by outcome", columns=("outcome", "objects"), rows=_outcomes(report), numbers=True)
    ]
    if names:
        sections.append(
            Section(
                title="Drift",
                text="Population stability index of this run against what it is compared with: up to 0.1 no change, "
                f"above {LARGE} a large one. Few frames give large values by chance.",
                columns=("", *(f"{name} ({report['drift'][name]['frames']:,} frames)" for name in names)),
                rows=rows,
                numbers=True,
            )
        )
    return sections


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _outcomes(report: Report) -> list[tuple[str, str]]:
    rejected = report["rejected_by_code"]
    read = report["objects"] - report["rejected"]
    return [("classified", f"{read:,}"), *((f"rejected: {code}", f"{count:,}") for code, count in rejected.items())]


def _figures(profiles: Mapping[str, Profile]) -> list[tuple[str, str]]:
    """PNG as data URI, and caption."""
    from btray.bulk import night_plots  # matplotlib: nothing needs it before the night has ended

    counts = {name: profile.frames for name, profile in profiles.items()}
    compared = ", ".join(f"{name} ({count:,})" for name, count in counts.items())
    drawn = [
        (night_plots.label_mix({name: profile.labels for name, profile in profiles.items()}), "Share of each label"),
        (
            night_plots.confidences({name: profile.confidence for name, profile in profiles.items()}),
            "Calibrated confidence",
        ),
    ]
    if sum(profiles["this run"].ood_score):
        scores = {name: profile.ood_score for name, profile in profiles.items() if sum(profile.ood_score)}
        drawn.append((night_plots.ood_scores(scores), "Out-of-distribution score, about 1 for training images"))
    return [(data_uri(png), f"{title}. Frames: {compared}.") for png, title in drawn]


def _sheet(scans: Sequence[Mapping[str, Any]], classifier: Classifier) -> list[dict[str, str]]:
    """The least certain scans: the slice, what it is, and what was said of it."""
    shown = []
    kept, frames = read_frames(classifier, scans)
    for scan, picture in zip(kept, explain_scans(classifier, frames, [scan["label"] for scan in kept]), strict=True):
        shown.append(
            {
                "picture": data_uri(picture),
                "uri": scan["uri"],
                "said": f"{scan['label']} {scan['confidence']:.2f}"
                + (f", frame {scan['frame']}" * (scan["frame"] > 0)),
            }
        )
    return shown
