"""Figures, report and model card: they hold what they claim, at the edges too, and hostile names stay text."""

from __future__ import annotations

import io
import json
import re
from base64 import b64decode
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import yaml
from markdown_it import MarkdownIt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from PIL import Image
from scipy.special import softmax

from btray.evaluation import plots
from btray.evaluation.metrics import (
    Abstention,
    ClassMetrics,
    Evaluation,
    LabelSets,
    Metrics,
    OutOfDistribution,
    compute_metrics,
)
from btray.evaluation.report import model_card, render_report, summary
from btray.model.bundle import Manifest
from btray.reports.page import NO_DIAGNOSIS
from btray.reports.plot_style import STYLE
from btray.training.config import TrainConfig
from tests.helpers.pages import HOSTILE, Page
from tests.helpers.tiny_bundle import random_bundle

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ("glioma", "meningioma", "pituitary", "metastasis", "no_tumor")


def case(n: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    return labels, softmax(rng.normal(size=(n, classes)) + 2 * np.eye(classes)[labels], axis=1)


def history(epochs: int) -> list[dict[str, float]]:
    return [
        {
            "epoch": e,
            "train_loss": 2 / e,
            "val_loss": 2.2 / e,
            "val_macro_f1": 1 - 1 / e,
            "learning_rate": 1e-3 / e,
            "score": 1 - 1 / e,
        }
        for e in range(1, epochs + 1)
    ]


def raw(draw: Callable[..., bytes]) -> Callable[..., Figure]:
    """The function below `plot_style.png`, which gives the figure itself."""
    return draw.__wrapped__  # type: ignore[attr-defined]


def size(png: bytes) -> tuple[int, int]:
    """Decode all of the PNG; (width, height)."""
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        image.load()
        return image.size


def evaluation(classes: Sequence[str] = CLASSES, metrics: Metrics | None = None, **changes: Any) -> Evaluation:
    """What is measured of 60 images, or `metrics`, with `changes`."""
    measured = metrics or compute_metrics(*case(60, len(classes)), classes)
    beside: dict[str, Any] = {
        "clean": measured, "twins": 0, "ece_uncalibrated": 0.2, "abstention": None, "conformal": None,
        "out_of_distribution": None, "measured_on": "the test split", "rejected": 0, "model_id": "0123abcd",
    }  # fmt: skip
    return Evaluation(**(vars(measured) | beside | changes))


def manifest(classes: Sequence[str] = CLASSES, **changes: Any) -> Manifest:
    """The manifest of a small model; `changes` replace its fields, those of `data` one by one."""
    counts = {"train": dict.fromkeys(classes, 100), "test": {classes[0]: 7}}
    made = random_bundle(classes=tuple(classes)).manifest
    data = made.data.model_copy(update={"counts": counts} | changes.pop("data", {}))
    return made.model_copy(update={"data": data, **changes})


def report(classes: Sequence[str] = CLASSES, metrics: Evaluation | None = None, **changes: Any) -> str:
    values: dict[str, Any] = {"figures": {}, "notes": []} | changes
    return render_report(metrics or evaluation(classes), manifest(classes), **values)


def card(classes: Sequence[str] = CLASSES, metrics: Evaluation | None = None, **changes: Any) -> str:
    return model_card(manifest(classes, **changes), metrics or evaluation(classes))


def test_on_the_terminal_a_figure_has_one_kind_of_interval_which_is_named() -> None:
    whole, clean = compute_metrics(*case(300, 5), CLASSES), compute_metrics(*case(40, 5, seed=1), CLASSES)
    text = summary(evaluation(metrics=whole, clean=clean, twins=260))
    for figure, kind, intervals in (
        ("accuracy", "Wilson's", [whole.accuracy_ci95, clean.accuracy_ci95]),
        ("macro-F1", "bootstrap", [whole.bootstrap_ci95.macro_f1, clean.bootstrap_ci95.macro_f1]),
    ):
        shown = [f"{low:.3f} to {high:.3f}" for low, high in intervals]
        assert re.findall(figure + r" [\d.]+ \((.*?)\)", text) == shown
        assert f"{kind} of" in text


@pytest.mark.parametrize("classes", [2, 5, 12])
def test_figures_are_pngs_for_any_number_of_classes(classes: int) -> None:
    names = [f"class {index} with a rather long name" for index in range(classes)]
    labels, probabilities = case(80, classes)
    for png in (
        plots.confusion_matrix(compute_metrics(labels, probabilities, names).confusion_matrix),
        plots.roc_curves(labels, probabilities, names),
        plots.reliability_diagram(labels, probabilities),
    ):
        width, height = size(png)
        assert 900 < width < 2600
        assert 500 < height < 2600


def test_figures_survive_one_image_absent_classes_and_hostile_names() -> None:
    labels, probabilities = np.array([1]), np.full((1, len(HOSTILE)), 1 / len(HOSTILE))
    size(plots.confusion_matrix(compute_metrics(labels, probabilities, HOSTILE).confusion_matrix))
    size(plots.roc_curves(labels, probabilities, HOSTILE))
    size(plots.reliability_diagram(labels, probabilities))
    black = np.zeros((32, 32), np.uint8)
    size(plots.error_grid([plots.WrongAnswer(black, name, name, 1.0, name) for name in HOSTILE], errors=6, total=6))


@pytest.mark.parametrize("classes", [2, 5, 12])
def test_no_legend_lies_over_a_curve_and_nothing_is_clipped(classes: int) -> None:
    names = [f"class {index} with a rather long name" for index in range(classes)]
    labels, probabilities = case(80, classes)
    frame, file = np.zeros((32, 32), np.uint8), "a file with a rather long name.png"
    with mpl.rc_context(STYLE):
        drawn = {
            "confusion": raw(plots.confusion_matrix)(compute_metrics(labels, probabilities, names).confusion_matrix),
            "roc": raw(plots.roc_curves)(labels, probabilities, names),
            "reliability": raw(plots.reliability_diagram)(labels, probabilities),
            "risk, early": raw(plots.risk_coverage_curve)(labels, probabilities, 0.95),
            "risk, late": raw(plots.risk_coverage_curve)(labels, probabilities, 0.4),
            "learning": raw(plots.learning_curves)(history(9), train_images=10, val_images=3),
            "errors": raw(plots.error_grid)(
                [plots.WrongAnswer(frame, names[0], names[1], 0.9, file)] * 6, errors=6, total=80
            ),
        }
        for name, figure in drawn.items():
            FigureCanvasAgg(figure).draw()
            for legend in figure.findobj(Legend):
                for axes in figure.findobj(Axes):
                    assert not legend.get_window_extent().overlaps(axes.get_window_extent()), name
            box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
            assert min(box.x0, box.y0) >= -0.01, name
            assert box.x1 <= width + 0.01, name
            assert box.y1 <= height + 0.01, name


@pytest.mark.parametrize("shown", [0, 1, 4, 5])
def test_error_grid_grows_by_rows_of_four(shown: int) -> None:
    wrong = plots.WrongAnswer(np.full((48, 40), 128, np.uint8), "a", "b", 0.9, "f.png")
    png = plots.error_grid([wrong] * shown, errors=shown, total=9)
    rows = -(-shown // 4)
    assert size(png)[1] == pytest.approx(200 * (0.75 + rows * 2.52), abs=2)


def test_error_grid_shows_the_pixels_it_was_given() -> None:
    wrong = plots.WrongAnswer(np.full((64, 64), 137, np.uint8), "a", "b", 0.9, "f.png")
    png = plots.error_grid([wrong], errors=1, total=9)
    with Image.open(io.BytesIO(png)) as image:
        assert (np.asarray(image.convert("L")) == 137).sum() > 300 * 300


def test_learning_curves_take_one_epoch_and_gaps() -> None:
    images = {"train_images": 10, "val_images": 3}
    size(plots.learning_curves(history(1), **images))
    broken = history(5)
    broken[2] |= {"val_loss": float("nan"), "val_macro_f1": float("nan")}
    size(plots.learning_curves(broken, **images))


def test_the_epoch_that_was_kept_is_the_one_of_the_highest_score() -> None:
    epochs = history(5)
    epochs[2]["score"] = 2.0
    with mpl.rc_context(STYLE):
        figure = raw(plots.learning_curves)(epochs, train_images=10, val_images=3)
    texts = [text.get_text() for axes in figure.findobj(Axes) for text in axes.texts]
    assert texts == ["kept: 0.667, epoch 3"]


def test_figures_leave_no_global_state_and_are_deterministic() -> None:
    before = dict(mpl.rcParams)
    labels, probabilities = case(30, 3)
    assert plots.roc_curves(labels, probabilities, "abc") == plots.roc_curves(labels, probabilities, "abc")
    assert dict(mpl.rcParams) == before


def test_page_needs_nothing_beside_it() -> None:
    png = plots.reliability_diagram(*case(30, 3))
    text = report(figures={"reliability": png, "a_new_one": png})
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "base", "a"}
    sources = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert [b64decode(source.removeprefix("data:image/png;base64,")) for source in sources] == [png, png]
    assert "http" not in text.replace("http-equiv", "")
    assert "url(" not in text
    assert "@import" not in text
    assert "a new one" in page.text


def test_page_says_figures_with_their_base_and_that_it_is_no_diagnosis() -> None:
    page = Page(report(notes=["2 images rejected"])).text
    metrics = compute_metrics(*case(60, 5), CLASSES)
    low, high = metrics.accuracy_ci95
    assert NO_DIAGNOSIS in page
    for expected in (
        f"{100 * metrics.accuracy:.1f} %",
        f"{100 * low:.1f}–{100 * high:.1f} %",
        f"{metrics.macro_f1:.3f}",
        f"{metrics.auroc_macro:.3f}",
        f"{metrics.ece:.3f}",
        "Over 60 images",
        "2 images rejected",
        *CLASSES,
    ):
        assert expected in page


def test_page_and_card_take_undefined_metrics() -> None:
    metrics = evaluation("ab", compute_metrics(np.zeros(1, int), np.array([[0.9, 0.1]]), ["a", "b"]))
    assert re.search(r"AUROC<b>–</b>", report("ab", metrics))
    text = card("ab", metrics)
    assert "| b | – | – | – | – | 0 |" in text
    assert "the 1 class that occurs" in text


def test_page_keeps_hostile_input_text_everywhere() -> None:
    clean = report(tuple("abcdef"), figures={"x": b"png"}, notes=["n"])
    for text in HOSTILE:
        dirty = report(
            HOSTILE, evaluation(HOSTILE, measured_on=text, model_id=text), figures={text: b"png"}, notes=[text]
        )
        dirty.encode("utf-8")
        assert Page(clean).shape == Page(dirty).shape, "nothing that was given became mark-up"
        assert "{{ 7*7 }}{% raw %}" in Page(dirty).text


def test_page_gives_clean_figures_only_if_there_are_some() -> None:
    few = compute_metrics(*case(20, 5, seed=1), CLASSES)
    shown = Page(report(metrics=evaluation(clean=few, twins=40))).text
    assert "40 of these 60 images show an image" in shown
    assert f"{few.accuracy:.3f} (" in shown
    assert "60 of these 60 images show an image" in Page(report(metrics=evaluation(clean=None, twins=60))).text
    assert "not known" in Page(report(metrics=evaluation(clean=None, twins=None))).text


def test_page_says_what_abstention_label_sets_and_scores_give() -> None:
    shown = Page(
        report(
            metrics=evaluation(
                abstention=Abstention(
                    threshold=0.7, answered=30, coverage=0.5, accuracy_answered=0.9, accuracy_answered_ci95=(0.8, 0.95)
                ),
                conformal=LabelSets(error_rate=0.1, threshold=0.2, coverage=0.93, mean_set_size=1.25),
                out_of_distribution=OutOfDistribution(threshold=1.5, flagged=3, share=0.05),
            )
        )
    ).text
    text = " ".join(shown.split())
    assert "30 of 60 answered (50.0 %), accuracy on these 0.900 (0.800 to 0.950)" in text
    assert "probability of at least 0.200, for at most 10.0 % misses" in text
    assert "true label in 93.0 % of the sets, 1.25 labels per set" in text
    assert "3 of 60 images (5.0 %)" in text


def test_figure_caption_survives_braces_in_a_figure_name() -> None:
    assert "{n}" in report(figures={"{n}": b"png"})


def test_card_keeps_hostile_input_text_everywhere() -> None:
    """As a Markdown parser sees it: what was given is text or stands in the block of settings, whole."""
    settings = {HOSTILE[2]: {HOSTILE[0]: [HOSTILE[4], "```", "~~~\n````\n# heading"]}}
    text = card(
        HOSTILE, evaluation(HOSTILE, measured_on=HOSTILE[2], clean=None, twins=60), model_id=HOSTILE[2],
        training=settings, versions={HOSTILE[2]: HOSTILE[0]}, created_at=HOSTILE[2],
        data={"counts": {HOSTILE[2]: dict.fromkeys(HOSTILE, 1)}, "fingerprint": HOSTILE[2]},
    )  # fmt: skip
    text.encode("utf-8")
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    (block,) = [token for token in tokens if token.type == "fence"]
    assert block.info == "yaml"
    assert yaml.safe_load(block.content) == settings
    kinds = {child.type for token in tokens for child in [token, *(token.children or ())]}
    assert not kinds & {"html_block", "html_inline", "link_open", "image", "code_inline", "code_block"}
    text = text.replace(block.content, "")
    assert not re.search(r"<(?!/?$)", text)
    assert not re.search(r"(?<!\\)\[", text)
    assert not re.search(r"(?<!\\)`", re.sub(r"^`+(yaml)?$", "", text, flags=re.MULTILINE))
    assert [line for line in text.splitlines() if line.startswith("#")][1:] == [
        "## Model details", "## Intended use", "## Training data", "## Training", "## Evaluation", "## Limits",
    ]  # fmt: skip
    rows = [line for line in text.splitlines() if line.startswith("|")]
    cells = {len(re.findall(r"(?<!\\)\|", row)) for row in rows}
    assert cells == {3, 4, 7}  # two-column tables, headline figures, the class table; no row was broken


def test_card_shows_nested_settings_as_yaml_without_places_of_this_machine() -> None:
    training = TrainConfig(data="s3://bucket/data", out="/home/somebody/out").model_dump(mode="json")
    text = card(training=training)
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    places = {"data", "out", "storage", "mlflow"}
    assert yaml.safe_load(block) == {key: value for key, value in training.items() if key not in places}
    assert "optimiser:\n  learning_rate:" in block
    assert "/home/somebody" not in text


def test_card_says_what_was_not_audited_until_it_was() -> None:
    unknown = evaluation(clean=None, twins=None)
    assert "have not been audited" in card(metrics=unknown)
    assert "name no patients" in card(metrics=unknown)
    done = card(data={"patient_ids": True})
    assert "have not been audited" not in done
    assert "name no patients" not in done


def test_card_says_how_many_images_were_learnt_from_and_what_holds_on_the_others() -> None:
    few = compute_metrics(*case(20, 5, seed=1), CLASSES)
    low, high = few.bootstrap_ci95.accuracy
    text = " ".join(card(metrics=evaluation(clean=few, twins=40)).split())
    assert (
        "- 40 of the 60 images show an image that the model learnt from; on the other 20 its accuracy is "
        f"{few.accuracy:.3f} ({low:.3f} to {high:.3f}). Figures over all images partly measure memory."
    ) in text
    none = " ".join(card(metrics=evaluation(clean=None, twins=60)).split())
    assert "- 60 of the 60 images show an image that the model learnt from. Figures over" in none
    assert "learnt from" not in card()


def test_card_counts_every_image_of_every_class() -> None:
    text = card(data={"counts": {"train": {"glioma": 3, "extra": 4}, "test": {"glioma": 5}}})
    assert "| class | train | test |\n|---|---:|---:|\n| glioma | 3 | 5 |\n" in text
    assert "| extra | 4 | 0 |\n| all | 7 | 5 |\n" in text
    assert NO_DIAGNOSIS in text


def test_metrics_json_has_the_documented_fields_in_this_order_and_a_version() -> None:
    record = json.loads(evaluation().to_json())
    assert list(record) == [
        "n", "accuracy", "accuracy_ci95", "macro_f1", "bootstrap_ci95", "auroc_macro", "ece", "per_class",
        "confusion_matrix", "clean", "ece_uncalibrated", "abstention", "conformal", "out_of_distribution",
        "by_patients", "outliers", "sources", "validation", "measured_on", "rejected", "model_id", "format_version",
    ]  # fmt: skip
    assert record["format_version"] == 1
    documented = (ROOT / "docs" / "trust.md").read_text(encoding="utf-8")
    table = documented[documented.index("| field |") :]
    nested = [field.name for part in (ClassMetrics, Abstention, LabelSets, OutOfDistribution) for field in fields(part)]
    for name in (*record, *nested):
        assert re.search(rf"^\| [^|]*\b{name}\b", table, re.MULTILINE), name


def test_metrics_json_tells_no_clean_image_from_unknown() -> None:
    none = json.loads(evaluation(clean=None, twins=60).to_json())["clean"]
    assert none == {**dict.fromkeys(field.name for field in fields(Metrics)), "n": 0}
    assert json.loads(evaluation(clean=None, twins=None).to_json())["clean"] is None
    assert json.loads(evaluation().to_json())["clean"]["n"] == 60
