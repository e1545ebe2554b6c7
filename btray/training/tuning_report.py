"""What a search found: a table of its trials, which of them are worth their cost, and a plot of accuracy and cost."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from btray.reports.plot_style import BLUE, INK, MUTED, PALE, VERMILLION, canvas, png

Row = dict[str, Any]
"""One trial; the columns of `table_csv`."""

_SHOWN = ("trial", "state", "epochs", "val_macro_f1", "val_accuracy", "gflop", "parameters", "images_per_second")


def by_score(rows: Sequence[Row]) -> list[Row]:
    """Best trial first, those that never ended an epoch last."""
    return sorted(rows, key=lambda row: (row["score"] is None, -(row["score"] or 0.0), row["trial"]))


def frontier(rows: Sequence[Row]) -> list[Row]:
    """The trials that no other one beats in macro-F1 without costing more, from cheap to dear (Pareto's frontier)."""
    best: list[Row] = []
    scored = [row for row in rows if row["val_macro_f1"] is not None]
    for row in sorted(scored, key=lambda row: (row["gflop"], -row["val_macro_f1"], row["trial"])):
        if not best or row["val_macro_f1"] > best[-1]["val_macro_f1"]:
            best.append(row)
    return best


def table_csv(rows: Sequence[Row]) -> bytes:
    """All trials, best first: how far each came, its best epoch, what it costs an image, and its settings."""
    target = io.StringIO()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(target, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(by_score(rows))
    return target.getvalue().encode()


def table_text(rows: Sequence[Row], varied: Sequence[str]) -> str:
    """The same for a terminal, with the settings `varied`; what lies on the frontier has a star."""
    on_frontier = {row["trial"] for row in frontier(rows)}
    columns = [*_SHOWN, *varied]
    cells = [[_cell(row[name]) for name in columns] + ["*" if row["trial"] in on_frontier else ""] for row in
             by_score(rows)]  # fmt: skip
    lines = [[*columns, ""], *cells]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns) + 1)]
    return "\n".join("  ".join(cell.rjust(wide) for cell, wide in zip(line, widths, strict=True)).rstrip()
                     for line in lines)  # fmt: skip


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@png
def accuracy_against_cost(rows: Sequence[Row], chosen: Mapping[str, Any], *, images: int) -> Figure:
    """Validation macro-F1 of every trial's best epoch against the network's cost, with the frontier and the choice.

    `rows` as for `table_csv`; at least one has a score. `images` is how many validation images there were.
    """
    figure, body = canvas(
        (6.6, 4.8), "Accuracy and cost", f"{len(rows)} trials, each judged by the same {images} validation images"
    )
    axes = body.subplots()
    for state, colour, label in (("finished", BLUE, "ran to its end"), ("stopped", PALE, "stopped before its end")):
        points = [row for row in rows if row["state"] == state and row["val_macro_f1"] is not None]
        if points:
            axes.scatter([row["gflop"] for row in points], [row["val_macro_f1"] for row in points],
                         color=colour, s=34, label=label, zorder=3)  # fmt: skip
    best = frontier(rows)
    axes.step([row["gflop"] for row in best], [row["val_macro_f1"] for row in best],
              where="post", color=MUTED, linewidth=1.2, label="best for its cost")  # fmt: skip
    axes.scatter([chosen["gflop"]], [chosen["val_macro_f1"]], s=150, facecolors="none", edgecolors=VERMILLION,
                 linewidths=2, label=f"chosen: {chosen['val_macro_f1']:.3f}", zorder=4)  # fmt: skip
    axes.set_xscale("log")
    axes.margins(x=0.08, y=0.1)
    for locate, subs in ((axes.xaxis.set_major_locator, (1.0,)), (axes.xaxis.set_minor_locator, (2.0, 5.0))):
        locate(LogLocator(subs=subs))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(axis="x", which="minor", labelcolor=INK)
    axes.set(xlabel="GFLOP an image (a multiply-add counts as two)", ylabel="validation macro-F1")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure
