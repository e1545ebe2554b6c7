"""Sections of the report: figures as published and clean, side by side, and what the model's marks are worth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from btray.reports.page import Section

Metrics = Mapping[str, Any]


def trust_sections(metrics: Metrics) -> list[Section]:
    """The sections that `metrics` (see `btray.evaluation.measures.measure`) give rise to."""
    marks = list(_marks(metrics))
    sections = [_two_accuracies(metrics)]
    if marks:
        sections.append(
            Section(
                title="What the marks are worth",
                text="The thresholds were chosen on validation images, or by the user; nothing here chose them.",
                columns=("mark", "rule", "found here"),
                rows=marks,
            )
        )
    return sections


def two_accuracies(metrics: Metrics) -> list[tuple[str, str, str]]:
    """Rows of (what, as published, clean) as text."""
    clean = metrics["clean"]

    def row(name: str, show: Any) -> tuple[str, str, str]:
        return name, show(metrics), show(clean) if clean and clean["n"] else "-"

    return [
        ("images", f"{metrics['n']}", "not known" if clean is None else f"{clean['n']}"),
        row("accuracy", lambda found: _with_interval(found, "accuracy")),
        row("macro-F1", lambda found: _with_interval(found, "macro_f1")),
        row("AUROC", lambda found: _number(found["auroc_macro"])),
        row("ECE", lambda found: _number(found["ece"])),
    ]


def _two_accuracies(metrics: Metrics) -> Section:
    clean = metrics["clean"]
    if clean is None:
        told = "Which images are clean is not known: the bundle keeps no fingerprints of what it was trained with."
    else:
        twins = metrics["n"] - clean["n"]
        told = (
            f"{twins} of these {metrics['n']} images show an image that the model was trained or validated with, maybe "
            "rescaled, mirrored or re-compressed: figures with them partly measure memory. Clean are those without "
            "such a twin."
        )
    return Section(
        title="As published, and clean",
        text=f"{told} In brackets 95 % bootstrap intervals.",
        columns=("", "as published: all images", "clean: no twin in training"),
        rows=two_accuracies(metrics),
    )


def _marks(metrics: Metrics) -> Iterator[tuple[str, str, str]]:
    abstention, sets, ood = (metrics[name] for name in ("abstention", "conformal", "out_of_distribution"))
    if abstention:
        answered = f"{abstention['answered']} of {metrics['n']} answered ({abstention['coverage']:.1%})"
        interval = abstention["accuracy_answered_ci95"]
        right = (
            f", accuracy on these {abstention['accuracy_answered']:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"
            if interval
            else ""
        )
        yield "abstained", f"confidence below {abstention['threshold']:.3f}", answered + right
    if sets:
        yield (
            "label set",
            f"probability of at least {sets['threshold']:.3f}, for at most {sets['error_rate']:.1%} misses",
            f"true label in {sets['coverage']:.1%} of the sets, {sets['mean_set_size']:.2f} labels in the mean",
        )
    if ood:
        yield (
            "out of distribution",
            f"score above {ood['threshold']:.2f}",
            f"{ood['flagged']} of {metrics['n']} images ({ood['share']:.1%})",
        )
    yield (
        "confidence",
        "softmax with temperature",
        f"ECE {metrics['ece']:.3f}, without {metrics['ece_uncalibrated']:.3f}",
    )


def _with_interval(found: Metrics, name: str) -> str:
    low, high = found["bootstrap_ci95"][name]
    return f"{found[name]:.3f} ({low:.3f} to {high:.3f})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
