"""The figures of a report as PNG bytes. Each names the number of images behind it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator, PercentFormatter
from sklearn.metrics import roc_curve

from btray.evaluation.metrics import ConfusionMatrix, auroc, reliability, wilson_interval
from btray.model.abstention import risk_coverage
from btray.reports.page import images
from btray.reports.plot_style import BLUE, INK, LINES, MUTED, PALE, PALETTE, VERMILLION, canvas, png


@png
def confusion_matrix(confusion: ConfusionMatrix) -> Figure:
    """Draw counts and row percentages."""
    names, matrix = confusion.labels, np.asarray(confusion.matrix)
    size, support = len(names), matrix.sum(axis=1)
    share = matrix / np.maximum(support, 1)[:, None]
    # The square root lifts small shares: errors are what one looks for, and few of them are frequent.
    depth = np.where(np.eye(size, dtype=bool), share, np.sqrt(share))
    cell = float(np.interp(size, (2, 5, 12), (1.15, 0.95, 0.66)))  # inches; room for the numbers at any size
    figure, body = canvas(
        (max(5.2, 2.2 + cell * size), 1.6 + cell * size),
        "Confusion matrix",
        f"{images(matrix.sum())}; percentages are of each row, the true class",
    )
    axes = body.subplots()
    colours = np.where(np.eye(size, dtype=bool)[..., None], to_rgb(BLUE), to_rgb(VERMILLION))
    axes.imshow(1 - depth[..., None] * (1 - colours), aspect="equal")
    font = float(np.interp(size, (5, 12), (11, 8)))
    for (row, column), count in np.ndenumerate(matrix):
        text: dict[str, Any] = {
            "ha": "center",
            "va": "center",
            # White is readable on the darker cells alone.
            "color": "white" if depth[row, column] > 0.62 else INK if count else PALE,
        }
        axes.text(column, row - 0.09 / cell, f"{count}", fontsize=font, fontweight="bold", **text)
        axes.text(column, row + 0.14 / cell, _percent(count, support[row]), fontsize=0.8 * font, **text)
    if size > 5:
        axes.set_xticks(range(size), [_elide(name, 18) for name in names])
        axes.tick_params(axis="x", rotation=40)
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    else:
        axes.set_xticks(range(size), [_wrap(name, 13) for name in names])
    axes.set_yticks(
        range(size), [f"{_wrap(name, 18)}\nn = {count}" for name, count in zip(names, support, strict=True)]
    )
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
    labels = np.asarray(labels)
    columns = 2 if len(classes) > 4 else 1
    rows = -(-len(classes) // columns)
    figure, body = canvas((6.2, 6.2 + 0.21 * rows), "ROC curves", f"{images(len(labels))}; each class against the rest")
    axes = body.subplots()
    axes.plot([0, 1], [0, 1], color="#aab4c0", linewidth=1, linestyle=":")
    handles, texts, areas = [], [], []
    for index, name in enumerate(classes):
        area = auroc(labels, probabilities, index)
        areas.append(area)
        positive = labels == index
        curve = ([], []) if area is None else roc_curve(positive, np.asarray(probabilities)[:, index])[:2]
        style: dict[str, Any] = {
            "color": PALETTE[index % len(PALETTE)],
            "linestyle": LINES[index // len(PALETTE) % len(LINES)],
        }
        handles += axes.plot(*curve, **style)
        value = "undefined" if area is None else f"{area:.3f}"
        texts.append(f"{_elide(name, 14 if columns > 1 else 30)}  {value}  (n = {positive.sum()})")
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    axes.set(xlabel="false positive rate (1 - specificity)", ylabel="true positive rate (sensitivity)")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    if all(area is None or area > 0.9 for area in areas):  # else a curve would pass below the inset
        _magnify_corner(axes)
    body.legend(
        handles,
        texts,
        loc="outside lower center",
        ncols=columns,
        title="class, AUROC, images of the class",
        title_fontproperties={"size": 9.5, "weight": "bold"},
    )
    return figure


@png
def reliability_diagram(labels: np.ndarray, probabilities: np.ndarray) -> Figure:
    """Draw accuracy against top confidence in bins, with Wilson intervals; below it how the confidences spread.

    `labels` int [n], `probabilities` [n, classes]. After DeGroot and Fienberg 1983 and Guo et al. 2017.
    """
    table = reliability(labels, probabilities)
    used = table.count > 0
    confidence, accuracy = table.confidence[used], table.accuracy[used]
    figure, body = canvas(
        (6.2, 6.9),
        "Reliability of the confidence",
        f"{images(int(table.count.sum()))} in {len(table.count)} bins; expected calibration error {table.ece:.3f}",
    )
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
    top.yaxis.set_major_formatter(PercentFormatter(1))
    body.legend(loc="outside lower center", ncols=3)
    centres = (table.edges[:-1] + table.edges[1:]) / 2
    bars = bottom.bar(centres, table.count, 0.9 / len(centres), color="#8fa3b8")
    bottom.bar_label(bars, [f"{count}" if count else "" for count in table.count], fontsize=8, color=MUTED, padding=1)
    bottom.set(xlabel="confidence of the predicted class", ylabel="images")
    bottom.margins(y=0.2)
    bottom.xaxis.set_major_formatter(PercentFormatter(1))
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
    correct = np.rint(curve.accuracy * curve.answered).astype(int)
    figure, body = canvas(
        (6.2, 4.8), "Risk and coverage", f"{images(len(labels))}, answered in order of falling confidence"
    )
    axes = body.subplots()
    bounds = [wilson_interval(k, n) for k, n in zip(correct.tolist(), curve.answered.tolist(), strict=True)]
    low, high = np.array(bounds).T
    axes.fill_between(curve.coverage, low, high, color=BLUE, alpha=0.15, linewidth=0, step="post")
    axes.plot(curve.coverage, curve.accuracy, color=BLUE, drawstyle="steps-post")
    axes.plot(curve.coverage[-1], curve.accuracy[-1], "o", color=BLUE, markersize=6)
    answered = np.flatnonzero(curve.threshold >= threshold) if threshold is not None else np.array([], int)
    if len(answered):
        coverage, accuracy = curve.coverage[answered[-1]], curve.accuracy[answered[-1]]
        axes.axvline(coverage, color=INK, linewidth=1, linestyle=":")
        label = f"abstains below {threshold:.2f}: {accuracy:.1%} of the answers correct, {coverage:.0%} answered"
        axes.plot(coverage, accuracy, "o", color=VERMILLION, markersize=7, markeredgecolor="white", label=label)
        body.legend(loc="outside lower center")
    # The first twentieth rests on few images: its intervals would flatten all the rest.
    lowest = min(low[len(low) // 20 :])
    axes.set(xlim=(0, 1.01), ylim=(max(0.0, lowest - 0.03), 1.005))
    axes.set(xlabel="coverage: share of images that is answered", ylabel="accuracy on these")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    return figure


@png
def learning_curves(
    history: Sequence[Mapping[str, Any]], *, best_epoch: int, train_images: int, val_images: int
) -> Figure:
    """Draw loss, validation macro-F1 and learning rate by epoch; `best_epoch`, whose weights were kept, is marked.

    Args:
        history: one mapping per epoch with the keys epoch, train_loss, val_loss, val_macro_f1 and learning_rate; if an
            epoch occurs twice, as after a resumed run, the later entry counts.
        best_epoch: number of the epoch whose weights were kept.
        train_images: images that were trained on.
        val_images: images that were validated with.

    Raises:
        ValueError: there is no epoch.
    """
    by_epoch = {int(entry["epoch"]): entry for entry in history}
    if not by_epoch:
        raise ValueError("the history holds no epoch")
    epochs = sorted(by_epoch)
    series = {
        key: np.array([by_epoch[epoch][key] for epoch in epochs], dtype=float)
        for key in ("train_loss", "val_loss", "val_macro_f1", "learning_rate")
    }
    style: dict[str, Any] = {"marker": "o"} if len(epochs) < 3 else {}
    figure, body = canvas(
        (6.6, 6.6), "Learning curves", f"trained on {images(train_images)}, validated on {images(val_images)}"
    )
    loss, f1, rate = body.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1.1))
    loss.plot(epochs, series["train_loss"], color=BLUE, label="training", **style)
    loss.plot(epochs, series["val_loss"], color=VERMILLION, label="validation", **style)
    f1.plot(epochs, series["val_macro_f1"], color=VERMILLION, **style)
    rate.plot(epochs, series["learning_rate"], color=MUTED, **style)
    _mark_best(f1, (loss, rate), epochs, series["val_macro_f1"], epochs.index(best_epoch))
    loss.set_ylabel("loss")
    loss.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)  # above: a line may pass any corner of the axes
    f1.set_ylabel("validation\nmacro-F1")
    rate.set(ylabel="learning\nrate", xlabel="epoch", xlim=(epochs[0] - 0.5, epochs[-1] + 0.5), ylim=(0, None))
    rate.yaxis.set_major_locator(MaxNLocator(2))
    rate.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    rate.xaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
    body.align_ylabels()
    return figure


@png
def error_grid(
    frames: np.ndarray,
    true: Sequence[str],
    predicted: Sequence[str],
    confidence: Sequence[float] | np.ndarray,
    names: Sequence[str],
    *,
    errors: int,
    total: int,
) -> Figure:
    """Draw the k worst errors in order: slice, true label, predicted label, its confidence and the file's name.

    Args:
        frames: slices, uint8 [k, height, width].
        true: true labels, [k].
        predicted: predicted labels, [k].
        confidence: of the predictions, [k].
        names: of the files, [k].
        errors: how many errors there were in all.
        total: how many images were classified.
    """
    shown, columns, tile, text = len(frames), 4, 1.72, 0.8
    rows = -(-shown // columns)
    width, height = 0.2 + columns * (tile + 0.12), 0.75 + rows * (tile + text)
    title = "Worst errors" if shown else "No error"
    figure, _ = canvas(
        (width, height),
        title,
        f"of {errors} wrong among {images(total)}, most confident first" if errors else images(total),
    )
    entries = zip(list(frames), true, predicted, confidence, names, strict=True)
    for index, (frame, truth, guess, sure, name) in enumerate(entries):
        row, column = divmod(index, columns)
        left, top = 0.16 + column * (tile + 0.12), height - 0.7 - row * (tile + text)
        axes = figure.add_axes((left / width, (top - tile) / height, tile / width, tile / height))
        axes.imshow(frame, cmap="gray", vmin=0, vmax=255, interpolation="antialiased")
        axes.set_axis_off()
        axes.set_facecolor("black")
        caption: tuple[tuple[str, dict[str, Any]], ...] = (
            (f"true: {_elide(truth, 16)}", {"color": BLUE, "fontsize": 8.5}),
            (f"predicted: {_elide(guess, 12)}", {"color": VERMILLION, "fontsize": 8.5, "fontweight": "bold"}),
            (f"confidence {sure:.1%}", {"fontsize": 8.5}),
            (_elide(name, 27), {"color": MUTED, "fontsize": 7, "family": "DejaVu Sans Mono"}),
        )
        for line, (content, look) in enumerate(caption):
            figure.text(left / width, (top - tile - 0.06 - 0.155 * line) / height, content, va="top", **look)
    return figure


def _percent(count: int, total: int) -> str:
    """Return a share as text; what is not zero never reads 0 %."""
    if not total:
        return "–"
    return "<1%" if 0 < count < 0.005 * total else f"{count / total:.0%}"


def _magnify_corner(axes: Axes) -> None:
    """Show the upper left corner, in which good curves crowd, again in the empty half below the diagonal."""
    inset = axes.inset_axes((0.42, 0.08, 0.54, 0.54), xlim=(-0.002, 0.2), ylim=(0.8, 1.002))
    for line in axes.get_lines():
        inset.plot(*line.get_data(), color=line.get_color(), linestyle=line.get_linestyle(), linewidth=1.6)
    for axis in (inset.xaxis, inset.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
        axis.set_major_locator(MultipleLocator(0.05))
    inset.tick_params(labelsize=8)
    inset.spines[:].set_visible(True)
    axes.indicate_inset_zoom(inset, edgecolor=MUTED)


def _mark_best(f1: Axes, others: Sequence[Axes], epochs: Sequence[int], values: np.ndarray, best: int) -> None:
    """Mark the epoch at position `best` in all axes, and its value in `f1`."""
    for axes in (f1, *others):
        axes.axvline(epochs[best], color=INK, linewidth=1, linestyle=":")
    f1.plot(epochs[best], values[best], "o", color=VERMILLION, markersize=7, markeredgecolor="white")
    late = best > len(epochs) / 2
    f1.annotate(
        f"kept: {values[best]:.3f}, epoch {epochs[best]}",
        (epochs[best], values[best]),
        (-10 if late else 10, -16),
        textcoords="offset points",
        ha="right" if late else "left",
        va="top",
        fontweight="bold",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5},
    )


def _elide(text: str, most: int) -> str:
    """Shorten `text` to `most` characters in the middle: both ends of a file name tell it from its neighbours."""
    # Names come from folders and files: line feeds and broken encodings may stand in them.
    text = "".join(character if character.isprintable() else "\ufffd" for character in text)
    head, tail = (most - 1) - (most - 1) // 2, (most - 1) // 2
    return text if len(text) <= most else f"{text[:head]}…{text[-tail:]}"


def _wrap(name: str, width: int) -> str:
    """Break a class name into at most two lines of `width`, at its underscores or hyphens if it has any."""
    # Zero-width spaces mark where a name may break; textwrap knows only ordinary ones.
    marked = _elide(name, 2 * width - 4).replace("_", "_\u200b").replace("-", "-\u200b")
    pieces = marked.split("\u200b")
    if len(marked.replace("\u200b", "")) <= width:
        return "".join(pieces)
    return "\n".join(textwrap.wrap(" ".join(pieces), width)[:2]).replace("_ ", "_").replace("- ", "-")
