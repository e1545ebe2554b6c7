"""The page on what a run classified, summary.html: label mix, confidence, scores, drift and the least certain frames.

It imports matplotlib, which nothing needs before the run has ended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
from matplotlib.axis import Axis
from matplotlib.figure import Figure, SubFigure

from btray import storage
from btray.bulk import runs
from btray.bulk.clinical.pseudonyms import Pseudonyms
from btray.bulk.config import SHOWN
from btray.bulk.explanations import explain_frames, read_frames
from btray.bulk.report import ClassifiedFrame, RunReport
from btray.bulk.runs import SUMMARY, Run
from btray.core.notice import percent
from btray.model.bundle import Bundle, read_file
from btray.model.classifier import Classifier
from btray.model.drift import CONFIDENCE_EDGES, LARGE, OOD_EDGES, REFERENCE, RUNS_BEFORE, Drift, Profile, drift
from btray.reports.page import NO_DIAGNOSIS, data_uri, render_page
from btray.reports.plot_style import BLUE, INK, VERMILLION, canvas, in_percent, png

_RUNS_COMPARED = 30
_THIS_RUN = "this run"
_MEASURES = {"labels": "label mix", "confidence": "confidence", "ood_score": "out-of-distribution score"}
_COLOURS = (BLUE, INK, VERMILLION)


def compare(run: Run, report: RunReport, bundle: Bundle) -> tuple[dict[str, Profile], dict[str, Drift]]:
    """Compare the answers of a run with those on the validation images and with those of the runs before.

    Returns the profiles, this run's first, and the drift against each of the others, by their names.
    """
    profiles = {_THIS_RUN: report.profile}
    if (reference := read_file(bundle, REFERENCE)) is not None:
        profiles["validation images"] = Profile.model_validate_json(reference)
    before = Profile()
    for earlier in islice(runs.reports(run.output, run.group), _RUNS_COMPARED):
        before += earlier.profile
    if before.frames:
        profiles[RUNS_BEFORE] = before
    others = {name: profile for name, profile in profiles.items() if name != _THIS_RUN and report.profile.frames}
    return profiles, {name: drift(profile, report.profile) for name, profile in others.items()}


def write_summary(
    run: Run,
    report: RunReport,
    profiles: Mapping[str, Profile],
    classifier: Classifier,
    *,
    studies: Mapping[str, Mapping[str, Any]] | None = None,
    pseudonyms: Pseudonyms | None = None,
) -> str:
    """Write summary.html beside run.json; return its URI. `studies` are rows of the table of studies by their UIDs."""
    profile, drifts = report.profile, report.drift or {}
    count = max(1, profile.frames)
    frames, pixels = read_frames(classifier, report.least_certain[:SHOWN], pseudonyms)
    pictures = explain_frames(classifier, pixels, [frame.label for frame in frames])
    shown_studies = _pictured(report.most_tumor, studies or {}, classifier, pseudonyms)
    page = render_page(
        "btray.bulk",
        "summary.html",
        title="Classification of an archive",
        notice=NO_DIAGNOSIS,
        cards=[
            ("Frames", f"{profile.frames:,}", f"of {report.objects:,} objects, new or changed"),
            ("Rejected", f"{report.rejected:,}", "objects, each a row with a code"),
            ("Abstained", percent(profile.abstained / count), "confidence below the model's threshold"),
            ("Out of distribution", percent(profile.out_of_distribution / count), "unlike the training images"),
            *(
                [("Images per second", f"{report.images_per_second:.0f}", "between the first and the last part")]
                if report.has_rate
                else []
            ),
        ],
        notes=[
            f"Against the {name} ({against.frames:,} frames) there is a large change (PSI above {LARGE}) of: "
            f"{', '.join(changed)}."
            for name, against in drifts.items()
            if against.is_telling
            and (changed := [title for measure, title in _MEASURES.items() if (getattr(against, measure) or 0) > LARGE])
        ],
        figures=_figures(profiles) if profile.frames else [],
        sheet=[(frame, data_uri(picture)) for frame, picture in zip(frames, pictures, strict=True)],
        studies=shown_studies,
        report=report,
        headings=["", *(f"{name} ({against.frames:,} frames)" for name, against in drifts.items())],
        measures=_MEASURES,
        labels=sorted({label for against in drifts.values() for label in against.by_label}),
        large=LARGE,
        needed=max((against.frames_needed for against in drifts.values()), default=0),
        facts={
            "Model": report.model_id or "",
            "Run": run.run_id,
            "Input": report.config["input"],
            "Began": report.started_at,
            "Ended": report.ended_at,
        },
        facts_title="Run",
    )
    uri = storage.join(run.folder, SUMMARY)
    storage.write_text(uri, page)
    return uri


def _pictured(
    frames: Sequence[ClassifiedFrame],
    studies: Mapping[str, Mapping[str, Any]],
    classifier: Classifier,
    pseudonyms: Pseudonyms | None,
) -> list[tuple[Mapping[str, Any], list[tuple[ClassifiedFrame, str]]]]:
    """Return studies, those with the most tumor first, each with those of `frames` that are its key frames."""
    keys = {uid: {(key["uri"], key["frame"]) for key in row["key_frames"]} for uid, row in studies.items()}
    chosen = [frame for frame in frames if (frame.uri, frame.frame) in keys.get(str(frame.study_uid), ())]
    readable, pixels = read_frames(classifier, chosen, pseudonyms)
    drawn = explain_frames(classifier, pixels, [frame.label for frame in readable])
    pictures: dict[str, list[tuple[ClassifiedFrame, str]]] = {str(frame.study_uid): [] for frame in chosen}
    for frame, picture in zip(readable, drawn, strict=True):
        pictures[str(frame.study_uid)].append((frame, data_uri(picture)))
    return [(studies[uid], of_study) for uid, of_study in pictures.items()]


# ---- figures: shares of the frames, so that runs of any size can be compared


def _figures(profiles: Mapping[str, Profile]) -> list[tuple[str, str]]:
    """Return each figure, a PNG as data URI, with its caption."""
    confidence = {name: profile.confidence for name, profile in profiles.items()}
    subtitle = "of the most probable label, calibrated"
    figures = {
        "Share of each label": draw_labels(profiles),
        "Calibrated confidence": draw_histogram("Confidence", subtitle, confidence, CONFIDENCE_EDGES, "confidence"),
    }
    scores = {name: profile.ood_score for name, profile in profiles.items() if sum(profile.ood_score)}
    if _THIS_RUN in scores:
        edges = (*OOD_EDGES[:-1], OOD_EDGES[-2] + OOD_EDGES[1] - OOD_EDGES[0])  # the open bin as wide as the others
        subtitle = "about 1 for training images; the last bin is open"
        picture = draw_histogram("Out-of-distribution score", subtitle, scores, edges, "score")
        figures["Out-of-distribution score, about 1 for training images"] = picture
    compared = ", ".join(f"{name} ({profile.frames:,})" for name, profile in profiles.items())
    return [(data_uri(picture), f"{title}. Frames: {compared}.") for title, picture in figures.items()]


@png
def draw_labels(profiles: Mapping[str, Profile]) -> Figure:
    """Draw the share of each label, as bars."""
    names = sorted({name for profile in profiles.values() for name in profile.labels})
    figure, body = canvas((6.6, 1.8 + 0.55 * max(2, len(names))), "Labels", "share of the frames")
    axes = body.subplots()
    height = 0.8 / len(profiles)
    for number, (title, profile) in enumerate(profiles.items()):
        places = np.arange(len(names)) + (number - (len(profiles) - 1) / 2) * height
        shares = [profile.labels[name] / max(1, profile.frames) for name in names]
        axes.barh(places, shares, height * 0.9, color=_COLOURS[number], label=title)
    axes.set_yticks(np.arange(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    _finish(body, axes.xaxis)
    return figure


@png
def draw_histogram(
    title: str, subtitle: str, counts: Mapping[str, Sequence[int]], edges: Sequence[float], label: str
) -> Figure:
    """Draw histograms as shares, the first one filled; `counts` are those between `edges`, by what is compared."""
    figure, body = canvas((6.6, 4.3), title, subtitle)
    axes = body.subplots()
    for number, (name, values) in enumerate(counts.items()):
        shares = np.asarray(values, float) / max(1, sum(values))
        style: dict[str, Any] = {"fill": True, "alpha": 0.35} if number == 0 else {"linewidth": 2}
        axes.stairs(shares, edges, color=_COLOURS[number], label=name, **style)
    axes.set(xlim=(0, edges[-1]), xlabel=label, ylabel="share of the frames")
    axes.set_ylim(bottom=0)
    _finish(body, axes.yaxis)
    return figure


def _finish(body: SubFigure, shares: Axis) -> None:
    """Mark `shares` in percent and put the legend above the axes, where it covers no bar whatever the answers are."""
    in_percent(shares, decimals=0)
    body.legend(loc="outside upper left", ncols=len(_COLOURS))
