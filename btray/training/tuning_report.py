"""The report of a search: the record of a trial, tables of all, which are worth their cost, and a plot of that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from btray.data.rejections import as_csv
from btray.reports.plot_style import BLUE, INK, MUTED, PALE, VERMILLION, canvas, png
from btray.training.history import EpochRecord

_COLUMNS = (
    "trial", "state", "epochs", "score", "val_macro_f1", "val_accuracy", "val_loss", "gflop", "parameters",
    "images_per_second", "seconds", "error",
)  # fmt: skip
_SHOWN = ("trial", "state", "epochs", "val_macro_f1", "val_accuracy", "gflop", "parameters", "images_per_second")


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One trial of a search; `columns` makes it a row of `trials.csv`."""

    trial: str
    state: Literal["finished", "stopped", "failed"]
    """Whether it trained for all epochs, was stopped early, or failed."""
    epochs: int
    """Completed ones."""
    best: EpochRecord | None
    """The epoch that the trial is judged by; None if it never completed one."""
    gflop: float
    """Per image of the preprocessed size; a multiply-add counts as two operations."""
    parameters: int
    seconds: float
    """Of all epochs."""
    error: str | None = None
    """Why it failed."""
    settings: dict[str, Any]
    """A value for each setting of the space."""

    def columns(self) -> dict[str, Any]:
        """Return the cells of the trial's row by column; those of EpochRecord are of the best epoch."""
        best = {name: getattr(self.best, name, None) for name in EpochRecord.__dataclass_fields__}
        cells = best | vars(self) | self.settings  # `seconds` of the trial, not of its best epoch
        return {name: cells[name] for name in (*_COLUMNS, *self.settings)}

    @property
    def macro_f1(self) -> float | None:
        """Validation macro-F1 of the best epoch."""
        return self.best.val_macro_f1 if self.best else None


def by_score(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Sort trials: the best first, those that never completed an epoch last."""
    return sorted(trials, key=lambda trial: (-trial.best.score if trial.best else math.inf, trial.trial))


def frontier(trials: Sequence[TrialRecord]) -> list[tuple[float, float, str]]:
    """Return cost, macro-F1 and name of the trials that no other beats without costing more, from cheap to dear.

    This is the Pareto frontier.
    """
    best: list[tuple[float, float, str]] = []
    scored = [(trial.gflop, trial.macro_f1, trial.trial) for trial in trials if trial.macro_f1 is not None]
    for point in sorted(scored, key=lambda point: (point[0], -point[1], point[2])):
        if not best or point[1] > best[-1][1]:
            best.append(point)
    return best


def table_csv(trials: Sequence[TrialRecord]) -> bytes:
    """Format the text of `trials.csv`: all trials, best first."""
    rows = [trial.columns() for trial in by_score(trials)]
    return as_csv(list(rows[0]), [list(row.values()) for row in rows])


def table_text(trials: Sequence[TrialRecord], varied: Sequence[str]) -> str:
    """Format all trials for a terminal, with the settings `varied`; those on the frontier have a star."""
    starred = {name for _, _, name in frontier(trials)}
    lines = [[*_SHOWN, *varied, ""]]
    for trial in by_score(trials):
        cells = trial.columns()
        star = "*" if trial.trial in starred else ""
        lines.append([*(short(cells[name]) for name in (*_SHOWN, *varied)), star])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def short(value: object) -> str:
    """Format a value for a table on a terminal."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@png
def accuracy_against_cost(trials: Sequence[TrialRecord], chosen: TrialRecord, *, images: int) -> Figure:
    """Plot validation macro-F1 of every trial's best epoch against the network's cost, with frontier and choice.

    At least one trial has a score. `images` is how many validation images there were.
    """
    figure, body = canvas(
        (6.6, 4.8), "Accuracy and cost", f"{len(trials)} trials, each judged by the same {images} validation images"
    )
    axes = body.subplots()
    for state, colour, label in (("finished", BLUE, "ran to its end"), ("stopped", PALE, "stopped before its end")):
        points = [(one.gflop, one.macro_f1) for one in trials if one.state == state and one.macro_f1 is not None]
        if points:
            costs, scores = zip(*points, strict=True)
            axes.scatter(costs, scores, color=colour, s=34, label=label, zorder=3)
    costs, scores, _ = zip(*frontier(trials), strict=True)
    axes.step(costs, scores, where="post", color=MUTED, linewidth=1.2, label="best for its cost")
    axes.scatter(chosen.gflop, chosen.macro_f1 or 0.0, s=150, facecolors="none", edgecolors=VERMILLION,
                 linewidths=2, label=f"chosen: {chosen.macro_f1:.3f}", zorder=4)  # fmt: skip
    axes.set_xscale("log")
    axes.margins(x=0.08, y=0.1)
    # Networks of a search differ in cost by less than a decade: label 2 and 5 too, as plain numbers.
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.xaxis.set(major_locator=LogLocator(), major_formatter=plain,
                   minor_locator=LogLocator(subs=(2.0, 5.0)), minor_formatter=plain)  # fmt: skip
    axes.tick_params(axis="x", which="minor", labelcolor=INK)
    axes.set(xlabel="GFLOP per image (a multiply-add counts as two)", ylabel="validation macro-F1")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure
