"""Texts about a model for people: `report.html`, `MODEL_CARD.md` and a summary for the terminal; input is escaped."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from markupsafe import Markup, escape

from btray.core.notice import percent
from btray.evaluation.metrics import ECE_BINS, Evaluation, Metrics, wilson_interval
from btray.evaluation.parts import FEW, Interval, Outliers, Part
from btray.model.manifest import Manifest
from btray.model.studies import Reader
from btray.reports.page import NO_DIAGNOSIS, data_uri, encodable, environment, images, number, render_page

_PACKAGE = "btray.evaluation"
_COLUMNS = ("class", "precision", "recall", "F1", "AUROC", "images")
_PART_COLUMNS = (
    "",
    "images",
    "patients",
    "macro-F1, or recall of one class",
    "accuracy on the surest 90 %",
    "ECE",
    "recall by class",
    "outliers rejected",
)
_NOT_ON_CARD = frozenset({"data", "out", "storage", "mlflow"})  # places of one machine; the card names the data itself


def render_report(
    metrics: Evaluation, manifest: Manifest, *, figures: Mapping[str, bytes], notes: Sequence[str]
) -> str:
    """Return one HTML page that needs nothing beside it: no script, no file, no network.

    Args:
        metrics: what was measured.
        manifest: of the model.
        figures: PNG by name; the template gives those it knows a heading and a caption.
        notes: lines that the reader must see first, such as rejected images.
    """
    return render_page(
        _PACKAGE,
        "report.html",
        title="Evaluation of a brain-tumor classifier",
        notice=NO_DIAGNOSIS,
        cards=_headline(metrics),
        notes=notes,
        facts=model_facts(manifest) | {"Measured on": metrics.measured_on},
        facts_title="Model and data",
        metrics=metrics,
        columns=_COLUMNS,
        rows=_class_rows(metrics),
        part_columns=_PART_COLUMNS,
        parts=_part_tables(metrics),
        few=_few(metrics),
        least=FEW,
        figures={name: data_uri(png) for name, png in figures.items()},
        ece_bins=ECE_BINS,
    )


def model_card(manifest: Manifest, metrics: Evaluation, *, terms: str = "", notes: Sequence[str] = ()) -> str:
    """Return MODEL_CARD.md, after Mitchell et al. 2019 (arXiv:1810.03993).

    Args:
        manifest: of the model.
        metrics: what was measured.
        terms: Markdown on the terms of the model and its data, if it is published.
        notes: lines about the figures.
    """
    counts = manifest.data.counts
    classes = dict.fromkeys([*manifest.classes, *(name for split in counts.values() for name in split)])
    settings = {key: value for key, value in manifest.training.items() if key not in _NOT_ON_CARD}
    card = environment(_PACKAGE, finalize=_markdown).get_template("MODEL_CARD.md").render(
        manifest=manifest,
        metrics=metrics,
        notice=NO_DIAGNOSIS,
        facts=model_facts(manifest),
        splits=[*counts],
        count_rows=[
            *([name, *(split.get(name, 0) for split in counts.values())] for name in classes),
            ["all", *(sum(split.values()) for split in counts.values())],
        ],
        settings=_yaml_block(settings),
        cards=_headline(metrics),
        columns=_COLUMNS,
        rows=_class_rows(metrics),
        terms=Markup(terms.strip()),  # noqa: S704 - the publisher's own text
        notes=notes,
        part_columns=_PART_COLUMNS,
        parts=_part_tables(metrics),
        few=_few(metrics),
        least=FEW,
    )  # fmt: skip
    return encodable(card)


def summary(metrics: Evaluation) -> str:
    """Return a few lines for a terminal."""
    lines = [
        f"measured on {metrics.measured_on}: {metrics.n} images, {metrics.rejected} rejected",
        f"{_with_intervals(metrics)}  AUROC {number(metrics.auroc_macro, '-')}  ECE {metrics.ece:.3f}",
    ]
    if metrics.twins is not None:
        line = (
            f"clean, with no twin among the images it was trained or validated with: {metrics.n - metrics.twins} images"
        )
        lines.append(line + (f": {_with_intervals(metrics.clean)}" if metrics.clean else ""))
    if metrics.outliers:
        lines.append(f"outliers rejected: {_rejected(metrics.outliers)}")
    lines.append("in brackets 95 % intervals: Wilson's of the accuracy, bootstrap of macro-F1")
    lines.append(f"{'class':<16}{'precision':>10}{'recall':>8}{'F1':>8}{'AUROC':>8}{'images':>8}")
    for label, row in metrics.per_class.items():
        precision, recall, f1, auroc = (number(value, "-") for value in (row.precision, row.recall, row.f1, row.auroc))
        lines.append(f"{label:<16}{precision:>10}{recall:>8}{f1:>8}{auroc:>8}{row.support:>8}")
    for kind, rows in _part_tables(metrics).items():
        lines += [f"{kind} {name}: {n} images, {_named(headline)}" for name, n, _, headline, *_ in rows]
    return "\n".join(lines)


def _named(headline: str) -> str:
    """Return a figure of a part with what it is, which in tables the head of the column says."""
    return f"macro-F1 {headline}" if headline[:1].isdigit() else headline


def _with_intervals(metrics: Metrics) -> str:
    (low, high), (f1_low, f1_high) = metrics.accuracy_ci95, metrics.bootstrap_ci95.macro_f1
    return (
        f"accuracy {metrics.accuracy:.3f} ({low:.3f} to {high:.3f})  "
        f"macro-F1 {metrics.macro_f1:.3f} ({f1_low:.3f} to {f1_high:.3f})"
    )


def model_facts(manifest: Manifest) -> dict[str, str]:
    """Return what identifies a model, for a reader."""
    data = manifest.data
    epochs = f"{data.epochs}, of which number {data.best_epoch} was the best"
    return {
        "Model": manifest.model_id,
        "Classes": ", ".join(manifest.classes),
        "Architecture": manifest.network.architecture,
        "Trained": manifest.created_at,
        "Epochs": epochs + (f"; then {data.refit_epochs} on all images" if data.refit_epochs else ""),
        "Data fingerprint": data.fingerprint,
        "Temperature": number(manifest.calibration.temperature),
        "Series and studies": str(Reader.of(manifest)),
        "Versions": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
    }


def _headline(metrics: Evaluation) -> list[tuple[str, str, str]]:
    """Return (name, value, how it was computed) of each headline figure."""
    correct = sum(row[index] for index, row in enumerate(metrics.confusion_matrix.matrix))
    present = sum(1 for row in metrics.per_class.values() if row.support)
    classes = "1 class that occurs" if present == 1 else f"{present} classes that occur"
    return [
        (
            "Accuracy",
            percent(metrics.accuracy),
            f"{correct} of {metrics.n} correct; 95\u00a0% interval {_interval(metrics.accuracy_ci95)} (Wilson)",
        ),
        ("Macro-F1", number(metrics.macro_f1), f"mean of F1 over the {classes}"),
        ("AUROC", number(metrics.auroc_macro), f"one class against the rest, mean over the {classes}"),
        ("ECE", number(metrics.ece), f"expected calibration error, {ECE_BINS} bins of confidence; 0 is best"),
        ("Images", f"{metrics.n}", "labelled images that were read and classified"),
    ]


def _class_rows(metrics: Evaluation) -> list[list[str]]:
    """Return the cells of `_COLUMNS` of each class; precision and recall have their Wilson intervals."""
    matrix = metrics.confusion_matrix.matrix

    def with_interval(correct: int, total: int) -> str:
        return f"{percent(correct / total)} ({_interval(wilson_interval(correct, total))})" if total else "–"

    return [
        [
            name,
            with_interval(matrix[index][index], sum(row[index] for row in matrix)),
            with_interval(matrix[index][index], scores.support),
            number(scores.f1),
            number(scores.auroc),
            str(scores.support),
        ]
        for index, (name, scores) in enumerate(metrics.per_class.items())
    ]


def _part_tables(metrics: Evaluation) -> dict[str, list[list[str]]]:
    """Return the cells of `_PART_COLUMNS` of each part, by the kind of the parts."""
    kinds = {"source": metrics.sources, "validation": metrics.validation}
    return {kind: [_part_row(name, part) for name, part in parts.items()] for kind, parts in kinds.items() if parts}


def _part_row(name: str, part: Part) -> list[str]:
    headline = "–"
    if part.macro_f1 is not None and part.macro_f1_ci95:
        headline = f"{number(part.macro_f1)} ({_between(part.macro_f1_ci95)})"
    elif part.recall is not None and part.recall_ci95:
        headline = f"recall {number(part.recall)} ({_between(part.recall_ci95)})"
    by_class = [f"{label} {number(own.recall)} of {own.support}" for label, own in part.per_class.items()]
    few = f" (fewer than {FEW}: too few to say)" * (part.groups < FEW)
    return [
        name,
        str(part.n),
        f"{part.groups}{few}",
        headline,
        number(part.accuracy_at_90),
        number(part.ece),
        ", ".join(by_class) or "–",
        _rejected(part.outliers) if part.outliers else "–",
    ]


def _rejected(outliers: Outliers) -> str:
    return f"{outliers.rejected} of {outliers.n}, {percent(outliers.share)} ({_interval(outliers.share_ci95)})"


def _few(metrics: Evaluation) -> list[str]:
    """Name the classes with too few patients to say something."""
    return [
        f"{name} ({images(own.support)} of {own.groups} {'patient' if own.groups == 1 else 'patients'})"
        for name, own in (metrics.by_patients.per_class if metrics.by_patients else {}).items()
        if own.groups < FEW
    ]


def _between(interval: Interval) -> str:
    return f"{interval[0]:.3f} to {interval[1]:.3f}"


def _interval(interval: Interval) -> str:
    low, high = interval
    return f"{100 * low:.1f}–{100 * high:.1f} %"


def _markdown(value: object) -> Markup:
    """Make text harmless in Markdown, in a table cell too: one line, no mark-up; what is Markup already stays."""
    if isinstance(value, Markup):
        return value
    line = " ".join(str(value).split())
    return Markup(re.sub(r"([\\`*\[\]|])", r"\\\1", str(escape(line))))  # noqa: S704 - escaped in this very line


def _yaml_block(settings: Mapping[str, Any]) -> Markup:
    """Return settings as a fenced block of YAML; the fence is longer than any in the text, so that nothing ends it."""
    text = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True, width=100)
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return Markup(f"{fence}yaml\n{text}{fence}\n")  # noqa: S704 - inside the fence Markdown is plain text
