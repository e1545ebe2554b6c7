"""Figures, report and model card: they hold what they claim, at the edges too, and hostile names stay text."""

from __future__ import annotations

import io
import re
from base64 import b64decode
from html.parser import HTMLParser

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image
from scipy.special import softmax

from btray.evaluation import plots
from btray.evaluation.metrics import compute_metrics
from btray.evaluation.report import model_card, render_report
from btray.reports.page import NO_DIAGNOSIS, Section

CLASSES = ("glioma", "meningioma", "pituitary", "metastasis", "no_tumor")
HOSTILE = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "a|b\n\n# heading [link](https://evil.example) `code` ![x](https://evil.example/x.png)",
    "{{ 7*7 }}{% raw %}",
    "$\\frac{broken$ _\udcff\x00\u202e",
    "_underscored_first",
)


def case(n: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    return labels, softmax(rng.normal(size=(n, classes)) + 2 * np.eye(classes)[labels], axis=1)


def history(epochs: int) -> list[dict[str, float]]:
    return [
        {"epoch": e, "train_loss": 2 / e, "val_loss": 2.2 / e, "val_macro_f1": 1 - 1 / e, "learning_rate": 1e-3 / e}
        for e in range(1, epochs + 1)
    ]


def size(png: bytes) -> tuple[int, int]:
    """Decode all of the PNG; (width, height)."""
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        image.load()
        return image.size


def report(classes: tuple[str, ...] = CLASSES, **changes: object) -> str:
    metrics = compute_metrics(*case(60, len(classes)), classes)
    values: dict = {
        "title": "Evaluation",
        "metrics": metrics,
        "figures": {},
        "facts": {},
        "classes": classes,
        "notes": [],
    }
    return render_report(**(values | changes))


def card(classes: tuple[str, ...] = CLASSES, **changes: object) -> str:
    values: dict = {
        "model_id": "0123abcd", "classes": classes, "metrics": compute_metrics(*case(60, len(classes)), classes),
        "evaluated_on": "the test split", "counts": {"train": dict.fromkeys(classes, 100), "test": {classes[0]: 7}},
        "details": {"Architecture": "cnn"}, "training": {"epochs": "40"},
    }  # fmt: skip
    return model_card(**(values | changes))


class Page(HTMLParser):
    """The tags and attributes of a page as a browser would see them, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("classes", [2, 5, 12])
def test_figures_are_pngs_for_any_number_of_classes(classes: int) -> None:
    names = [f"class {index} with a rather long name" for index in range(classes)]
    labels, probabilities = case(80, classes)
    for png in (
        plots.confusion_matrix(compute_metrics(labels, probabilities, names)),
        plots.roc_curves(labels, probabilities, names),
        plots.reliability_diagram(labels, probabilities),
    ):
        width, height = size(png)
        assert 900 < width < 2600
        assert 500 < height < 2600


def test_figures_survive_one_image_absent_classes_and_hostile_names() -> None:
    labels, probabilities = np.array([1]), np.full((1, len(HOSTILE)), 1 / len(HOSTILE))
    size(plots.confusion_matrix(compute_metrics(labels, probabilities, HOSTILE)))
    size(plots.roc_curves(labels, probabilities, HOSTILE))
    size(plots.reliability_diagram(labels, probabilities))
    frames = np.zeros((len(HOSTILE), 32, 32), np.uint8)
    size(plots.error_grid(frames, HOSTILE, HOSTILE, np.ones(len(HOSTILE)), HOSTILE, errors=6, images=6))


@pytest.mark.parametrize("shown", [0, 1, 4, 5])
def test_error_grid_grows_by_rows_of_four(shown: int) -> None:
    frames = np.full((shown, 48, 40), 128, np.uint8)
    png = plots.error_grid(
        frames, ["a"] * shown, ["b"] * shown, [0.9] * shown, ["f.png"] * shown, errors=shown, images=9
    )
    rows = -(-shown // 4)
    assert size(png)[1] == pytest.approx(200 * (0.75 + rows * 2.52), abs=2)


def test_error_grid_refuses_lists_of_different_lengths() -> None:
    with pytest.raises(ValueError, match="zip"):
        plots.error_grid(np.zeros((2, 8, 8), np.uint8), ["a"], ["b"], [0.9], ["f"], errors=2, images=9)


def test_error_grid_shows_the_pixels_it_was_given() -> None:
    frame = np.full((1, 64, 64), 137, np.uint8)
    png = plots.error_grid(frame, ["a"], ["b"], [0.9], ["f.png"], errors=1, images=9)
    with Image.open(io.BytesIO(png)) as image:
        assert (np.asarray(image.convert("L")) == 137).sum() > 300 * 300


def test_learning_curves_take_one_epoch_gaps_and_repeated_epochs() -> None:
    images = {"best_epoch": 1, "train_images": 10, "val_images": 3}
    size(plots.learning_curves(history(1), **images))
    broken = history(5)
    broken[2] |= {"val_loss": float("nan"), "val_macro_f1": float("nan")}
    size(plots.learning_curves(broken, **images))
    once = plots.learning_curves(history(5), **images)
    assert plots.learning_curves([history(4)[3] | {"val_loss": 99.0}, *history(5)], **images) == once
    with pytest.raises(ValueError, match="no epoch"):
        plots.learning_curves([], **images)


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
    page = Page(report(notes=["2 images rejected"], facts={"model_id": "abc"})).text
    metrics = compute_metrics(*case(60, 5), CLASSES)
    low, high = metrics["accuracy_ci95"]
    assert NO_DIAGNOSIS in page
    for expected in (
        f"{100 * metrics['accuracy']:.1f} %",
        f"{100 * low:.1f}–{100 * high:.1f} %",
        f"{metrics['macro_f1']:.3f}",
        f"{metrics['auroc_macro']:.3f}",
        f"{metrics['ece']:.3f}",
        "Over 60 images",
        "2 images rejected",
        *CLASSES,
    ):
        assert expected in page


def test_page_and_card_take_undefined_metrics() -> None:
    metrics = compute_metrics(np.zeros(1, int), np.array([[0.9, 0.1]]), ["a", "b"])
    assert re.search(r"AUROC<b>–</b>", report(("a", "b"), metrics=metrics))
    text = card(("a", "b"), metrics=metrics)
    assert "| b | – | – | – | – | 0 |" in text
    assert "the 1 class that occurs" in text


def test_page_keeps_hostile_input_text_everywhere() -> None:
    clean = report(
        tuple("abcdef"), figures={"x": b"png"}, facts={"k": "v"}, notes=["n"],
        sections=[Section(title="t", text="t", columns=("c",), rows=(("r",),))],
    )  # fmt: skip
    for text in HOSTILE:
        dirty = report(
            HOSTILE, title=text, figures={text: b"png"}, facts={text: text}, notes=[text],
            sections=[Section(title=text, text=text, columns=(text,), rows=((text,),))],
        )  # fmt: skip
        dirty.encode("utf-8")
        # The same tags with the same attributes: nothing that was given became mark-up.
        shape = [[(tag, sorted(attributes)) for tag, attributes in Page(page).tags] for page in (clean, dirty)]
        assert shape[0] == shape[1]
        assert "{{ 7*7 }}{% raw %}" in Page(dirty).text


def test_figure_caption_survives_braces_in_a_figure_name() -> None:
    assert "{n}" in report(figures={"{n}": b"png"})


def test_card_keeps_hostile_input_text_everywhere() -> None:
    text = card(
        HOSTILE, model_id=HOSTILE[2], evaluated_on=HOSTILE[2], details={HOSTILE[2]: HOSTILE[2]},
        training={HOSTILE[2]: HOSTILE[2]}, limits=[HOSTILE[2], HOSTILE[0]],
        counts={HOSTILE[2]: dict.fromkeys(HOSTILE, 1)},
    )  # fmt: skip
    text.encode("utf-8")
    assert not re.search(r"<(?!/?$)", text)
    assert not re.search(r"(?<!\\)\[", text)
    assert not re.search(r"(?<!\\)`", text)
    assert [line for line in text.splitlines() if line.startswith("#")][1:] == [
        "## Model details", "## Intended use", "## Training data", "## Training", "## Evaluation", "## Limits",
    ]  # fmt: skip
    rows = [line for line in text.splitlines() if line.startswith("|")]
    cells = {len(re.findall(r"(?<!\\)\|", row)) for row in rows}
    assert cells == {3, 4, 7}  # two-column tables, headline figures, the class table; no row was broken


def test_card_says_what_was_not_audited_until_it_was() -> None:
    assert "have not been audited" in card()
    assert "name no patients" in card()
    done = card(audited=True, patient_ids=True, limits=["One scanner only."])
    assert "have not been audited" not in done
    assert "name no patients" not in done
    assert "- One scanner only." in done


def test_card_counts_every_image_of_every_class() -> None:
    text = card(counts={"train": {"glioma": 3, "extra": 4}, "test": {"glioma": 5}})
    assert "| class | train | test |\n|---|---:|---:|\n| glioma | 3 | 5 |\n" in text
    assert "| extra | 4 | 0 |\n| all | 7 | 5 |\n" in text
    assert NO_DIAGNOSIS in text
