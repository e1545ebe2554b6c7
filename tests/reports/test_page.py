"""The base page and its macros: all that is given stays text, and what is not given leaves no empty part behind."""

from __future__ import annotations

import pytest

from btray.reports.page import Section, encodable, environment, images, number, percent, render_page
from tests.helpers.pages import HOSTILE, Page


def page(text: str = "text", **changes: object) -> str:
    part = Section(title=text, text=text, columns=(text, text), rows=((text, text),), numbers=True)
    values: dict = {
        "title": text, "notice": text, "cards": [(text, text, text)], "notes": [text], "facts": {text: text},
        "facts_title": text,
    }  # fmt: skip
    body = environment("btray.reports").from_string(
        "{% from 'macros.html' import section, table %}{{ section(part) }}{{ table([part.title], [[part.title]]) }}"
    )
    return render_page("btray.reports", "base.html", **(values | changes)) + encodable(body.render(part=part))


@pytest.mark.parametrize("text", HOSTILE)
def test_base_page_and_macros_keep_hostile_input_text(text: str) -> None:
    dirty = page(text)
    dirty.encode("utf-8")
    assert Page(dirty).shape == Page(page()).shape


def test_page_shows_only_the_parts_that_it_is_given() -> None:
    whole = Page(page()).shape
    bare = Page(page(notice="", notes=[], facts={}))
    assert ("p", ["class", "role"]) in whole
    assert ("p", ["class", "role"]) not in bare.shape
    assert ("ul", []) not in bare.shape
    assert "Please note" not in bare.text


def test_figures_are_written_the_same_way_on_every_page() -> None:
    assert (percent(0.8714), number(0.8714), number(None), number(None, "-")) == ("87.1 %", "0.871", "–", "-")
    assert (images(1), images(2), images(12345)) == ("1 image", "2 images", "12\u2009345 images")
    assert encodable("a\udcff") == "a?"
