"""The page that all reports are: one self-contained HTML file with a style, a title, headline figures and sections.

A report extends the template "page" and fills its block `body`. All input is escaped.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined

NO_DIAGNOSIS = (
    "This model supports a reader; it is no diagnosis. It sees single slices, knows only the classes listed here, and "
    "was not assessed as a medical device. A qualified person decides, with the whole study and the patient at hand."
)


@dataclass(frozen=True, kw_only=True)
class Section:
    """A further section of a report: plain text, a table, or both; `rows` have as many cells as `columns`."""

    title: str
    text: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    numbers: bool = False
    """The first column names what the others count: they are set to the right."""


def render_page(
    template: str,
    *,
    title: str,
    notice: str,
    cards: Sequence[tuple[str, str, str]],
    notes: Sequence[str] = (),
    first_sections: Sequence[Section] = (),
    sections: Sequence[Section] = (),
    facts: Mapping[str, str] | None = None,
    facts_title: str = "Facts",
    **values: Any,
) -> str:
    """Return one HTML page that needs nothing beside it: no script, no file, no network.

    `template` extends "page"; `cards` are name, value and how it was computed of the headline figures; `notes` are
    lines that the reader must see first; what the template's body makes of `values` stands after `first_sections` and
    before `sections` and `facts`.
    """
    page = HTML.from_string(template).render(
        title=title,
        notice=notice,
        cards=cards,
        notes=notes,
        first_sections=first_sections,
        sections=sections,
        facts=facts or {},
        facts_title=facts_title,
        **values,
    )
    return writable(page)


def writable(text: str) -> str:
    """`text` with question marks for lone surrogates, as which a file name that is not UTF-8 reaches Python."""
    return text.encode("utf-8", "replace").decode("utf-8")


def data_uri(picture: bytes, kind: str = "png") -> str:
    """An encoded picture as the source of an <img> in the page itself."""
    return f"data:image/{kind};base64," + b64encode(picture).decode("ascii")


def percent(value: float) -> str:
    """A share as text, with one decimal."""
    return f"{100 * value:.1f} %"


def images(count: int) -> str:
    """A number of images as text."""
    return "1 image" if count == 1 else f"{count} images"


_TABLE = """{% macro table(columns, rows, numbers) %}
<div class="table"><table{% if numbers %} class="numbers"{% endif %}>
<thead><tr>{% for column in columns %}<th scope="col">{{ column }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr>{% if numbers %}<th scope="row">{{ row[0] }}</th>{% else %}<td>{{ row[0] }}</td>{% endif %}
{% for cell in row[1:] %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
{% endmacro %}
"""

_PAGE = """{% from "table" import table %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --ink: #1f2933; --muted: #5f6b7a; --line: #dde2e8; --page: #f6f7f9; --card: #fff;
  --accent: #0072b2; --warn: #fdf3ea; --warn-line: #d55e00; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --muted: #a3aebb; --line: #333c47; --page: #14181d; --card: #1d232a; --accent: #56b4e9;
    --warn: #2b221a; --warn-line: #e69f00; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 70rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.25rem 0 .75rem; }
h3 { font-size: 1rem; margin: 0 0 .6rem; }
p { margin: .5rem 0; max-width: 46rem; }
p, li { overflow-wrap: anywhere; }
.how, .card small, figcaption { color: var(--muted); font-size: .875rem; line-height: 1.4; }
.notice { background: var(--warn); border-left: 4px solid var(--warn-line); padding: .6rem 1rem; border-radius: 4px;
  max-width: none; }
.cards { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); margin: 1.25rem 0; }
.card, figure, .table { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.card { padding: .8rem 1rem; font-weight: 600; }
.card b { display: block; font-size: 1.9rem; line-height: 1.25; color: var(--accent); white-space: nowrap; }
.card small { display: block; font-weight: 400; }
.table { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .9rem; text-align: left; vertical-align: top; border-top: 1px solid var(--line); }
thead th, .facts tr:first-child > * { border: 0; }
thead th { color: var(--muted); font-size: .875rem; }
.numbers td, .numbers thead th + th { text-align: right; white-space: nowrap; }
.numbers tbody th { position: sticky; left: 0; background: var(--card); max-width: 16rem; overflow-wrap: break-word; }
.facts th { width: 30%; }
.facts td { overflow-wrap: anywhere; min-width: 10rem; }
.figures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(27rem, 100%), 1fr)); }
figure { margin: 0; padding: 1rem; break-inside: avoid; }
figure:last-child:nth-child(odd) { grid-column: 1 / -1; }
img { display: block; width: 100%; max-width: 44rem; margin: 0 auto .75rem; border-radius: 4px; background: #fff; }
@media print { body { padding: 0; max-width: none; font-size: .8rem; background: #fff; } h2 { break-after: avoid; }
  .figures { grid-template-columns: 1fr 1fr; } .card, tr { break-inside: avoid; } .card b { font-size: 1.3rem; } }
@media (max-width: 30rem) { .cards { grid-template-columns: 1fr 1fr; } .card, figure { padding: .7rem; }
  th, td { padding: .4rem .6rem; } }
{% block style %}{% endblock %}
</style>
</head>
<body><main>
<h1>{{ title }}</h1>
{% if notice %}<p class="notice" role="note">{{ notice }}</p>{% endif %}
<section class="cards" aria-label="Headline figures">
{% for name, value, how in cards %}
<div class="card">{{ name }}<b>{{ value }}</b><small>{{ how }}</small></div>
{% endfor %}
</section>
{% if notes %}
<h2>To be noted</h2>
<ul>{% for note in notes %}<li>{{ note }}</li>{% endfor %}</ul>
{% endif %}
{% macro titled(section) %}
<h2>{{ section.title }}</h2>
{% if section.text %}<p{% if section.numbers %} class="how"{% endif %}>{{ section.text }}</p>{% endif %}
{% if section.rows %}{{ table(section.columns, section.rows, section.numbers) }}{% endif %}
{% endmacro %}
{% for section in first_sections %}{{ titled(section) }}{% endfor %}
{% block body %}{% endblock %}
{% for section in sections %}{{ titled(section) }}{% endfor %}
{% if facts %}
<h2>{{ facts_title }}</h2>
<div class="table"><table class="facts">
{% for key, value in facts.items() %}<tr><th scope="row">{{ key }}</th><td>{{ value }}</td></tr>{% endfor %}
</table></div>
{% endif %}
</main></body></html>
"""

OPTIONS: dict[str, Any] = {
    "autoescape": True, "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True,
    "keep_trailing_newline": True,
}  # fmt: skip
"""Of every template's environment."""
HTML = Environment(**OPTIONS, loader=DictLoader({"page": _PAGE, "table": _TABLE}))  # noqa: S701 - autoescape is on
