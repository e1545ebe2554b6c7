"""Figures of a night's answers beside what they are compared with: shares, so that nights of any size can be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from btray.model.drift import CONFIDENCE_EDGES, OOD_EDGES
from btray.reports.plot_style import BLUE, INK, VERMILLION, canvas, png

_COLOURS = (BLUE, INK, VERMILLION)


@png
def label_mix(labels: Mapping[str, Mapping[str, int]]) -> Figure:
    """Share of each label; `labels` maps what is compared -> label -> frames."""
    names = sorted({name for counts in labels.values() for name in counts})
    figure, body = canvas((6.6, 1.5 + 0.55 * max(2, len(names))), "Labels", "share of the frames")
    axes = body.subplots()
    height = 0.8 / len(labels)
    for number, (title, counts) in enumerate(labels.items()):
        total = max(1, sum(counts.values()))
        places = np.arange(len(names)) + (number - (len(labels) - 1) / 2) * height
        shares = [counts.get(name, 0) / total for name in names]
        axes.barh(places, shares, height * 0.9, color=_COLOURS[number], label=title)
    axes.set_yticks(np.arange(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend()
    return figure


@png
def confidences(counts: Mapping[str, Sequence[int]]) -> Figure:
    """Share of the frames by calibrated confidence; `counts` lie between CONFIDENCE_EDGES."""
    figure, body = canvas((6.6, 4.0), "Confidence", "of the most probable label, calibrated")
    axes = body.subplots()
    _steps(axes, counts, CONFIDENCE_EDGES)
    axes.set(xlim=(0, 1), xlabel="confidence", ylabel="share of the frames")
    return figure


@png
def ood_scores(counts: Mapping[str, Sequence[int]]) -> Figure:
    """Share of the frames by out-of-distribution score; `counts` lie between OOD_EDGES, the last bin is open."""
    figure, body = canvas((6.6, 4.0), "Out-of-distribution score", "about 1 for training images; the last bin is open")
    axes = body.subplots()
    width = OOD_EDGES[1] - OOD_EDGES[0]
    _steps(axes, counts, (*OOD_EDGES[:-1], OOD_EDGES[-2] + width))
    axes.set(xlim=(0, OOD_EDGES[-2] + width), xlabel="score", ylabel="share of the frames")
    return figure


def _steps(axes: Axes, counts: Mapping[str, Sequence[int]], edges: Sequence[float]) -> None:
    for number, (title, values) in enumerate(counts.items()):
        shares = np.asarray(values, float) / max(1, sum(values))
        filled = number == 0
        axes.stairs(
            shares, edges, color=_COLOURS[number], fill=filled, alpha=0.35 if filled else 1, linewidth=2, label=title
        )
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(loc="upper center")
