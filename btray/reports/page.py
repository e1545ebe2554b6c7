"""HTML pages and Markdown files made of jinja2 templates; `templates/base.html` is the page that all reports extend."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from btray.core.notice import NOTICE, percent

NO_DIAGNOSIS = (
    f"{NOTICE} The model sees single slices, knows only the classes listed here, and was not assessed as a medical "
    "device. A qualified person decides, with the whole study and the patient at hand."
)
"""The notice of every page about a model."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A titled part of a page for the macro `section`: plain text, a table, or both."""

    title: str
    text: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    """As many cells in each row as there are `columns`."""
    numbers: bool = False
    """The first column names what the others count: those are aligned to the right."""


def environment(package: str, **options: Any) -> Environment:
    """Return a jinja2 environment of the templates of `package` and those shared by all pages; everything is escaped.

    Args:
        package: a package with a folder `templates`, such as "btray.evaluation".
        options: further arguments of `jinja2.Environment`.
    """
    made = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("btray.reports")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **options,
    )
    made.filters.update(images=images, number=number, percent=percent)
    return made


def render_page(
    package: str,
    template: str,
    *,
    title: str,
    notice: str = "",
    cards: Sequence[tuple[str, str, str]] = (),
    notes: Sequence[str] = (),
    facts: Mapping[str, str] | None = None,
    facts_title: str = "Facts",
    **values: Any,
) -> str:
    """Return one HTML page that needs nothing beside it: no script, no file, no network.

    Args:
        package: the package whose folder `templates` holds the template.
        template: name of a template that extends "base.html" and fills its block `body`.
        title: heading of the page.
        notice: warning below the heading.
        cards: name, value and how it was computed of the headline figures.
        notes: lines that the reader must see before the body.
        facts: names and values of the table that ends the page.
        facts_title: its heading.
        values: what the template's body uses.
    """
    page = environment(package).get_template(template).render(
        title=title, notice=notice, cards=cards, notes=notes, facts=facts or {}, facts_title=facts_title, **values
    )  # fmt: skip
    return encodable(page)


def encodable(text: str) -> str:
    """Return `text` with "?" for lone surrogates: Python's form of the bytes of a file name that is not UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")


def data_uri(picture: bytes, kind: str = "png") -> str:
    """Return an encoded picture as the source of an <img>, so that the page needs no file beside it."""
    return f"data:image/{kind};base64," + b64encode(picture).decode("ascii")


def number(value: float | None, missing: str = "–") -> str:
    """Return a figure as text with three decimals; `missing` if it is undefined."""
    return missing if value is None else f"{value:.3f}"


def images(count: int) -> str:
    """Return a number of images as text, thousands apart by thin spaces."""
    return "1 image" if count == 1 else f"{count:,} images".replace(",", "\u2009")
