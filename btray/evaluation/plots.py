"""The figures of a report as PNG bytes. Each names the number of images behind it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, MultipleLocator
from sklearn.metrics import roc_curve

from btray.core.notice import percent
from btray.evaluation.metrics import ConfusionMatrix, auroc, reliability, wilson_interval
from btray.model.abstention import risk_coverage
from btray.reports.page import images
from btray.reports.plot_style import BLUE, INK, LINES, MUTED, PALE, PALETTE, VERMILLION, canvas, in_percent, png


@png
def confusion_matrix(confusion: ConfusionMatrix) -> Figure:
    """Draw counts and row percentages."""
    names, matrix = confusion.labels, np.asarray(confusion.matrix)
    size, support = len(names), matrix.sum(axis=1)
    share = matrix / np.maximum(support, 1)[:, None]
    # The square root lifts small shares: errors are what one looks for, and few of them are frequent.
    depth = np.where(np.eye(size, dtype=bool), share, np.sqrt(share))
    cell = float(np.interp(size, (2, 5, 12), (1.15, 0.95, 0.66)))  # inches; room for the numbers at any size
    subtitle = f"{images(matrix.sum())}; percentages are of each row, the true class"
    figure, body = canvas((max(5.2, 2.2 + cell * size), 1.6 + cell * size), "Confusion matrix", subtitle)
    axes = body.subplots()
    colours = np.where(np.eye(size, dtype=bool)[..., None], to_rgb(BLUE), to_rgb(VERMILLION))
    axes.imshow(1 - depth[..., None] * (1 - colours), aspect="equal")
    font = float(np.interp(size, (5, 12), (11, 8)))
    for (row, column), count in np.ndenumerate(matrix):
        # White is readable on the darker cells alone.
        colour = "white" if depth[row, column] > 0.62 else INK if count else PALE
        text: dict[str, Any] = {"ha": "center", "va": "center", "color": colour}
        axes.text(column, row - 0.09 / cell, f"{count}", fontsize=font, fontweight="bold", **text)
        axes.text(column, row + 0.14 / cell, _percent(count, support[row]), fontsize=0.8 * font, **text)
    if size > 5:
        labels = [_elide(name, 18) for name in names]
        axes.set_xticks(range(size), labels, rotation=40, ha="right", rotation_mode="anchor")
    else:
        axes.set_xticks(range(size), [_wrap(name, 13) for name in names])
    rows = [f"{_wrap(name, 18)}\nn = {count}" for name, count in zip(names, support, strict=True)]
    axes.set_yticks(range(size), rows)
    axes.set_xlabel("predicted class", labelpad=8)
    axes.set_ylabel("true class", labelpad=8)
    axes.set_xticks(np.arange(-0.5, size), minor=True)
    axes.set_yticks(np.arange(-0.5, size), minor=True)
    axes.grid(visible=False, which="major")
    axes.grid(which="minor", color="white", linewidth=2)  # between the cells; the major grid would cross the numbers
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    return figure


@png
def roc_curves(labels: np.ndarray, probabilities: np.ndarray, classes: Sequence[str]) -> Figure:
    """Draw the ROC curve of each class against the rest. `labels` int [n], `probabilities` [n, classes]."""
    columns = 2 if len(classes) > 4 else 1
    rows = -(-len(classes) // columns)
    figure, body = canvas((6.2, 6.2 + 0.21 * rows), "ROC curves", f"{images(len(labels))}; each class against the rest")
    axes = body.subplots()
    axes.plot([0, 1], [0, 1], color="#aab4c0", linewidth=1, linestyle=":")
    areas = [auroc(labels, probabilities, index) for index in range(len(classes))]
    handles = []
    for index, (name, area) in enumerate(zip(classes, areas, strict=True)):
        positive = labels == index
        curve = ([], []) if area is None else roc_curve(positive, probabilities[:, index])[:2]
        value = "undefined" if area is None else f"{area:.3f}"
        label = f"{_elide(name, 14 if columns > 1 else 30)}  {value}  (n = {positive.sum()})"
        line = LINES[index // len(PALETTE) % len(LINES)]
        handles += axes.plot(*curve, color=PALETTE[index % len(PALETTE)], linestyle=line, label=label)
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    axes.set(xlabel="false positive rate (1 - specificity)", ylabel="true positive rate (sensitivity)")
    in_percent(axes.xaxis, axes.yaxis)
    if all(area is None or area > 0.9 for area in areas):  # else a curve would pass below the inset
        _magnify_corner(axes)
    title = "class, AUROC, images of the class"
    legend = body.legend(handles=handles, loc="outside lower center", ncols=columns, title=title)
    legend.get_title().set(size=9.5, weight="bold")
    return figure


@png
def reliability_diagram(labels: np.ndarray, probabilities: np.ndarray) -> Figure:
    """Draw accuracy against top confidence in bins, with Wilson intervals; below it how the confidences spread.

    `labels` int [n], `probabilities` [n, classes]. After DeGroot and Fienberg 1983 and Guo et al. 2017.
    """
    table = reliability(labels, probabilities)
    used = table.count > 0
    confidence, accuracy = table.confidence[used], table.accuracy[used]
    total = images(int(table.count.sum()))
    subtitle = f"{total} in {len(table.count)} bins; expected calibration error {table.ece:.3f}"
    figure, body = canvas((6.2, 6.9), "Reliability of the confidence", subtitle)
    top, bottom = body.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    diagonal = np.array([0.0, 1.0])
    top.fill_between(diagonal, diagonal, color=VERMILLION, alpha=0.07, linewidth=0)
    top.fill_between(diagonal, diagonal, 1, color=BLUE, alpha=0.06, linewidth=0)
    top.text(0.97, 0.04, "overconfident", ha="right", color=VERMILLION, fontweight="bold")
    top.text(0.03, 0.96, "underconfident", va="top", color=BLUE, fontweight="bold")
    bounds = [wilson_interval(int(k), int(n)) for k, n in zip(table.correct[used], table.count[used], strict=True)]
    top.plot(confidence, accuracy, "o-", color=INK, linewidth=1.2, label="accuracy per bin", zorder=3)
    top.vlines(confidence, *np.array(bounds).T, color=PALE, linewidth=1.4, label="95 % interval (Wilson)")
    top.plot(diagonal, diagonal, color=MUTED, linewidth=1, linestyle=":", label="perfect calibration")
    top.set(xlim=(0, 1), ylim=(-0.015, 1.015), ylabel="accuracy")
    in_percent(top.yaxis)
    body.legend(loc="outside lower center", ncols=3)
    centres = (table.edges[:-1] + table.edges[1:]) / 2
    bars = bottom.bar(centres, table.count, 0.9 / len(centres), color="#8fa3b8")
    bottom.bar_label(bars, [f"{count}" if count else "" for count in table.count], fontsize=8, color=MUTED, padding=1)
    bottom.set(xlabel="confidence of the predicted class", ylabel="images")
    bottom.margins(y=0.2)
    in_percent(bottom.xaxis)
    bottom.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    return figure


@png
def risk_coverage_curve(labels: np.ndarray, probabilities: np.ndarray, threshold: float | None) -> Figure:
    """Draw the accuracy of what is answered against the share answered (El-Yaniv and Wiener 2010).

    Args:
        labels: class indices, int [n].
        probabilities: [n, classes].
        threshold: confidence below which the model abstains, to be marked; None if it never does.
    """
    curve = risk_coverage(labels, probabilities)
    subtitle = f"{images(len(labels))}, answered in order of falling confidence"
    figure, body = canvas((6.2, 4.8), "Risk and coverage", subtitle)
    axes = body.subplots()
    correct = np.rint(curve.accuracy * curve.answered)
    low, high = np.array([wilson_interval(int(k), int(n)) for k, n in zip(correct, curve.answered, strict=True)]).T
    axes.fill_between(curve.coverage, low, high, color=BLUE, alpha=0.15, linewidth=0, step="post")
    axes.plot(curve.coverage, curve.accuracy, color=BLUE, drawstyle="steps-post")
    axes.plot(curve.coverage[-1], curve.accuracy[-1], "o", color=BLUE, markersize=6)
    steps = 0 if threshold is None else int((curve.threshold >= threshold).sum())  # thresholds fall from step to step
    if steps:
        coverage, accuracy = curve.coverage[steps - 1], curve.accuracy[steps - 1]
        axes.axvline(coverage, color=INK, linewidth=1, linestyle=":")
        answers = f"{percent(accuracy)} of the answers correct, {percent(coverage, 0)} answered"
        label = f"abstains below {threshold:.2f}: {answers}"
        axes.plot(coverage, accuracy, "o", color=VERMILLION, markersize=7, markeredgecolor="white", label=label)
        body.legend(loc="outside lower center")
    # The first twentieth rests on few images: its intervals would flatten all the rest.
    axes.set(xlim=(0, 1.01), ylim=(max(0.0, min(low[len(low) // 20 :]) - 0.03), 1.005))
    axes.set(xlabel="coverage: share of images that is answered", ylabel="accuracy on these")
    in_percent(axes.xaxis, axes.yaxis)
    return figure


@png
def learning_curves(history: Sequence[Mapping[str, Any]], *, train_images: int, val_images: int) -> Figure:
    """Draw loss, validation macro-F1 and learning rate by epoch; the best one, whose weights were kept, is marked.

    Args:
        history: one mapping per epoch, at least one, with the keys epoch, train_loss, val_loss, val_macro_f1, score and
            learning_rate.
        train_images: images that were trained on.
        val_images: images that were validated with.
    """
    epochs = [entry["epoch"] for entry in history]
    kept = max(history, key=lambda entry: entry["score"])
    best_epoch, best = kept["epoch"], kept["val_macro_f1"]
    subtitle = f"trained on {images(train_images)}, validated on {images(val_images)}"
    figure, body = canvas((6.6, 6.6), "Learning curves", subtitle)
    loss, f1, rate = body.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1.1))

    def draw(axes: Axes, key: str, colour: str, label: str | None = None) -> None:
        values = np.array([entry[key] for entry in history], float)  # a null is drawn as a gap
        axes.plot(epochs, values, color=colour, label=label, marker="o" if len(epochs) < 3 else None)

    draw(loss, "train_loss", BLUE, "training")
    draw(loss, "val_loss", VERMILLION, "validation")
    draw(f1, "val_macro_f1", VERMILLION)
    draw(rate, "learning_rate", MUTED)
    for axes in (f1, loss, rate):
        axes.axvline(best_epoch, color=INK, linewidth=1, linestyle=":")
    f1.plot(best_epoch, best, "o", color=VERMILLION, markersize=7, markeredgecolor="white")
    late = epochs.index(best_epoch) > len(epochs) / 2
    f1.annotate(
        f"kept: {best:.3f}, epoch {best_epoch}",
        (best_epoch, best),
        (-10 if late else 10, -16),
        textcoords="offset points",
        ha="right" if late else "left",
        va="top",
        fontweight="bold",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5},
    )
    loss.set_ylabel("loss")
    loss.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)  # above: a line may pass any corner of the axes
    f1.set_ylabel("validation\nmacro-F1")
    rate.set(ylabel="learning\nrate", xlabel="epoch", xlim=(epochs[0] - 0.5, epochs[-1] + 0.5), ylim=(0, None))
    rate.yaxis.set_major_locator(MaxNLocator(2))
    rate.yaxis.set_major_formatter("{x:.3g}")
    rate.xaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
    body.align_ylabels()
    return figure


class WrongAnswer(NamedTuple):
    """A wrongly classified slice, as `error_grid` shows it."""

    frame: np.ndarray
    """uint8 [height, width]"""
    true: str
    predicted: str
    confidence: float
    """Of the predicted class."""
    name: str
    """Of the file."""


@png
def error_grid(worst: Sequence[WrongAnswer], *, errors: int, total: int) -> Figure:
    """Draw the `worst` of all `errors` among `total` classified images, in their order."""
    shown, columns, tile, text = len(worst), 4, 1.72, 0.8
    rows = -(-shown // columns)
    width, height = 0.2 + columns * (tile + 0.12), 0.75 + rows * (tile + text)
    subtitle = f"of {errors} wrong among {images(total)}, most confident first" if errors else images(total)
    figure, _ = canvas((width, height), "Worst errors" if shown else "No error", subtitle)
    for index, (frame, truth, guess, sure, name) in enumerate(worst):
        row, column = divmod(index, columns)
        left, top = 0.16 + column * (tile + 0.12), height - 0.7 - row * (tile + text)
        axes = figure.add_axes((left / width, (top - tile) / height, tile / width, tile / height))
        axes.imshow(frame, cmap="gray", vmin=0, vmax=255, interpolation="antialiased")
        axes.set_axis_off()
        caption: tuple[tuple[str, dict[str, Any]], ...] = (
            (f"true: {_elide(truth, 16)}", {"color": BLUE, "fontsize": 8.5}),
            (f"predicted: {_elide(guess, 12)}", {"color": VERMILLION, "fontsize": 8.5, "fontweight": "bold"}),
            (f"confidence {percent(sure)}", {"fontsize": 8.5}),
            (_elide(name, 27), {"color": MUTED, "fontsize": 7, "family": "DejaVu Sans Mono"}),
        )
        for line, (content, look) in enumerate(caption):
            figure.text(left / width, (top - tile - 0.06 - 0.155 * line) / height, content, va="top", **look)
    return figure


def _percent(count: int, total: int) -> str:
    """Return a share as text; what is not zero never reads 0 %."""
    if not total:
        return "–"
    return "<1 %" if 0 < count < 0.005 * total else percent(count / total, 0)


def _magnify_corner(axes: Axes) -> None:
    """Show the upper left corner, in which good curves crowd, again in the empty half below the diagonal."""
    inset = axes.inset_axes((0.42, 0.08, 0.54, 0.54), xlim=(-0.002, 0.2), ylim=(0.8, 1.002))
    for line in axes.get_lines():
        inset.plot(*line.get_data(), color=line.get_color(), linestyle=line.get_linestyle(), linewidth=1.6)
    in_percent(inset.xaxis, inset.yaxis, decimals=0)
    for axis in (inset.xaxis, inset.yaxis):
        axis.set_major_locator(MultipleLocator(0.05))
    inset.tick_params(labelsize=8)
    inset.spines[:].set_visible(True)
    axes.indicate_inset_zoom(inset, edgecolor=MUTED)


def _elide(text: str, most: int) -> str:
    """Shorten `text` to `most` characters in the middle: both ends of a file name tell it from its neighbours."""
    # Names come from folders and files: line feeds and broken encodings may stand in them.
    text = "".join(character if character.isprintable() else "\ufffd" for character in text)
    head, tail = (most - 1) - (most - 1) // 2, (most - 1) // 2
    return text if len(text) <= most else f"{text[:head]}…{text[-tail:]}"


def _wrap(name: str, width: int) -> str:
    """Break a class name into at most two lines of `width`, at its underscores or hyphens if it has any."""
    name = _elide(name, 2 * width - 4)
    if len(name) <= width:
        return name
    lines = textwrap.wrap(name.replace("_", "_ ").replace("-", "- "), width)  # it breaks at spaces alone
    return "\n".join(lines[:2]).replace("_ ", "_").replace("- ", "-")
