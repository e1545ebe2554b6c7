"""What people read about a model: `report.html`, one self-contained page, and `MODEL_CARD.md`. All input is escaped."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from btray.evaluation.metrics import ECE_BINS, wilson_interval
from btray.reports.page import NO_DIAGNOSIS, Section, data_uri, encodable, environment, images, percent, render_page

# What a figure shows and how it was computed; `{n}` is the number of images behind the metrics.
FIGURES = {
    "confusion_matrix": (
        "Which classes are taken for which",
        "Rows are true classes, columns predicted ones (the most probable class), over {n}. Each cell gives the count "
        "and its share of the row; blue is right, orange is wrong.",
    ),
    "roc_curves": (
        "How well each class is told from the rest",
        "One class against all others over {n}: the threshold on its probability runs from 1 to 0. AUROC is the area "
        "below the curve, 0.5 for a coin and 1 for a perfect ranking.",
    ),
    "reliability": (
        "Whether the confidence can be believed",
        "{n} in {bins} bins of equal width by the confidence of the predicted class; where points lie on the diagonal, "
        "a confidence of 80 % is right in 80 % of cases. Grey: 95 % Wilson interval. ECE is the mean gap, weighted by "
        "images (Guo et al. 2017).",
    ),
    "risk_coverage": (
        "What abstaining buys",
        "Accuracy on the part of {n} that is answered, when the model abstains below a confidence that falls from left "
        "to right; at 100 % it answers all. Shaded: 95 % Wilson interval.",
    ),
    "learning_curves": (
        "How training went",
        "Values at the end of each epoch. The training loss is taken with augmentation and regularisation, the "
        "validation loss without, so that the two are not to be compared in height. The dotted line marks the epoch "
        "that was kept: the best validation macro-F1, and among equals the lowest validation loss.",
    ),
    "worst_errors": (
        "The errors it was surest of",
        "Wrongly classified images among {n}, by falling confidence, as the network saw them. Some may be errors of "
        "the labels.",
    ),
}


def render_report(
    *,
    title: str,
    metrics: Mapping[str, Any],
    figures: Mapping[str, bytes],
    facts: Mapping[str, str],
    classes: Sequence[str],
    notes: Sequence[str],
    sections: Sequence[Section] = (),
) -> str:
    """Return one HTML page that needs nothing beside it: no script, no file, no network.

    `metrics` is the result of `btray.evaluation.metrics.compute_metrics`; `figures` maps a name to a PNG (the names in
    `FIGURES` have a heading and a caption here, others show their name); `facts` are rows about the model and the data;
    `classes` orders the table; `notes` are lines that the reader must see first, such as rejected images.
    """
    return render_page(
        "btray.evaluation",
        "report.html",
        title=title,
        notice=NO_DIAGNOSIS,
        n=images(metrics["n"]),
        cards=_headline(metrics),
        columns=_COLUMNS,
        rows=_class_rows(metrics, classes),
        figures=[_figure(name, png, metrics["n"]) for name, png in figures.items()],
        facts=facts,
        facts_title="Model and data",
        notes=notes,
        sections=sections,
    )


def model_card(
    *,
    model_id: str,
    classes: Sequence[str],
    metrics: Mapping[str, Any],
    evaluated_on: str,
    counts: Mapping[str, Mapping[str, int]],
    details: Mapping[str, str],
    training: Mapping[str, str],
    audited: bool = False,
    patient_ids: bool = False,
    limits: Sequence[str] = (),
) -> str:
    """Return MODEL_CARD.md after Mitchell et al. 2019 (arXiv:1810.03993).

    `evaluated_on` names the data behind `metrics`, as "the test split of s3://bucket/data"; `counts` maps split ->
    class -> images; `details` (architecture, versions, licence of the data) and `training` are rows of text. `audited`:
    duplicates across the splits were looked for, and `limits` says what was found; `patient_ids`: the splits keep
    patients apart. `limits` are added to those that follow from these.
    """
    counted = dict.fromkeys([*classes, *(name for split in counts.values() for name in split)])
    standing = []
    if not audited:
        standing.append(
            "Duplicates between the splits have not been audited: where images of the test split, or near copies, are "
            "in the training split, the figures above are too high."
        )
    if not patient_ids:
        standing.append(
            "The data name no patients: slices of one patient may lie in several splits, and the figures above may be "
            "higher than they would be on new patients."
        )
    card = (
        environment("btray.evaluation", finalize=_markdown)
        .get_template("MODEL_CARD.md")
        .render(
            model_id=model_id,
            notice=NO_DIAGNOSIS,
            classes=classes,
            evaluated_on=evaluated_on,
            n=images(metrics["n"]),
            cards=_headline(metrics),
            columns=_COLUMNS,
            rows=_class_rows(metrics, classes),
            splits=list(counts),
            count_rows=[[name, *(split.get(name, 0) for split in counts.values())] for name in counted],
            totals=[sum(split.values()) for split in counts.values()],
            details=details,
            training=training,
            limits=[*standing, *limits],
        )
    )
    return encodable(card)


def _headline(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(name, value, how it was computed) of each headline figure."""
    right = sum(row[index] for index, row in enumerate(metrics["confusion_matrix"]["matrix"]))
    present = sum(1 for row in metrics["per_class"].values() if row["support"])
    classes = "1 class that occurs" if present == 1 else f"{present} classes that occur"
    return [
        (
            "Accuracy",
            percent(metrics["accuracy"]),
            f"{right} of {metrics['n']} right; 95\u00a0% interval {_interval(*metrics['accuracy_ci95'])} (Wilson)",
        ),
        ("Macro-F1", _decimal(metrics["macro_f1"]), f"mean of F1 over the {classes}"),
        ("AUROC", _decimal(metrics["auroc_macro"]), f"one class against the rest, mean over the {classes}"),
        ("ECE", _decimal(metrics["ece"]), f"expected calibration error, {ECE_BINS} bins of confidence; 0 is best"),
        ("Images", f"{metrics['n']}", "labelled images that were read and classified"),
    ]


def _class_rows(metrics: Mapping[str, Any], classes: Sequence[str]) -> list[list[str]]:
    """Class, precision and recall with their Wilson intervals, F1, AUROC, support: of each class, as text."""
    names, matrix = metrics["confusion_matrix"]["labels"], metrics["confusion_matrix"]["matrix"]
    rows = []
    for name in classes:
        index, scores = names.index(name), metrics["per_class"][name]
        right = matrix[index][index]
        rows.append(
            [
                name,
                _with_interval(right, sum(row[index] for row in matrix)),
                _with_interval(right, scores["support"]),
                _decimal(scores["f1"]),
                _decimal(scores["auroc"]),
                str(scores["support"]),
            ]
        )
    return rows


def _figure(name: str, png: bytes, n: int) -> dict[str, str]:
    heading, caption = FIGURES.get(name, (name.replace("_", " "), ""))
    return {
        "heading": heading,
        "caption": caption.format(n=images(n), bins=ECE_BINS),
        "source": data_uri(png),
    }


def _with_interval(successes: int, trials: int) -> str:
    return f"{percent(successes / trials)} ({_interval(*wilson_interval(successes, trials))})" if trials else "–"


def _interval(low: float, high: float) -> str:
    return f"{100 * low:.1f}–{100 * high:.1f} %"


def _decimal(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _markdown(value: object) -> Markup:
    """Make text harmless in Markdown, in a table cell too: one line, no mark-up; what is Markup already stays."""
    if isinstance(value, Markup):
        return value
    line = " ".join(str(value).split())
    return Markup(re.sub(r"([\\`*\[\]|])", r"\\\1", str(escape(line))))  # noqa: S704 - escaped in this very line


_COLUMNS = ("class", "precision", "recall", "F1", "AUROC", "images")
