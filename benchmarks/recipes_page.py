"""Make the tables and the plots of a page from the table that `recipes.py` writes.

python benchmarks/recipes_page.py --table docs/recipes.csv --page docs/model.md --images docs/images

What stands between the two lines `<!-- recipes -->` and `<!-- /recipes -->` of the page is replaced. Figures of several
seeds are means, those of their intervals too.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from recipes import ABLATION, NETWORKS, QUARTERS

from btray.reports.plot_style import INK, MUTED, PALETTE, canvas, png

MARKS = ("<!-- recipes -->\n", "<!-- /recipes -->\n")
HEADS = ("row", "seeds", "epochs", "pixels", "M parameters", "GFLOP", "images per CPU second", "macro-F1", "ECE")

Row = dict[str, Any]


def main() -> None:
    """Write the page and its plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", required=True, type=Path, help="CSV file of recipes.py")
    parser.add_argument("--page", required=True, type=Path, help="Markdown file with the two lines")
    parser.add_argument("--images", required=True, type=Path, help="folder of the plots, beside the page")
    arguments = parser.parse_args()
    with arguments.table.open(newline="") as file:
        rows = _means(list(csv.DictReader(file)))
    curve = [row for row in rows if row["row"] in QUARTERS or row["row"].endswith((" source", " sources"))]
    curve.sort(key=lambda row: (row["row"] not in QUARTERS, int(row["row"].split()[0])))
    tables = {
        "Networks, alone": [row for row in rows if row["row"] in NETWORKS],
        "The default, less or with another part": [row for row in rows if row["row"] in ABLATION | {"default": ()}],
        "Sources that nothing was learnt from": [row for row in rows if "without " in row["row"]],
        "More patients, more sources": curve,
    }
    plots = {"recipes": _networks(tables["Networks, alone"])} if tables["Networks, alone"] else {}
    if curve:
        plots["learning_curve"] = _learning_curve(curve)
    arguments.images.mkdir(parents=True, exist_ok=True)
    for name, picture in plots.items():
        (arguments.images / f"{name}.png").write_bytes(picture)
    folder = arguments.images.relative_to(arguments.page.parent)
    parts = [f"![{name.replace('_', ' ')}]({folder}/{name}.png)\n" for name in plots]
    parts += [f"**{title}**\n\n{_table(chosen)}" for title, chosen in tables.items() if chosen]
    before, _, rest = arguments.page.read_text().partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    arguments.page.write_text("\n".join([before + MARKS[0], *parts, MARKS[1] + after]))


def _means(lines: list[dict[str, str]]) -> list[Row]:
    """Return a row for each name, number of epochs and size, in the order in which they came."""
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for line in lines:
        groups.setdefault((line["row"], line["epochs"], line["size"]), []).append(line)
    rows = []
    for (name, epochs, size), seeds in groups.items():
        low, high = np.mean([[float(end) for end in seed["macro_f1_ci95"].split(" to ")] for seed in seeds], 0)
        figures = ("parameters", "gflop", "images_per_cpu_second", "macro_f1", "ece")
        means = {figure: float(np.mean([float(seed[figure]) for seed in seeds])) for figure in figures}
        row = {"row": name, "epochs": epochs, "size": size, "seeds": len(seeds), "low": low, "high": high, **means}
        rows.append(row | {"by_source": _by_source([seed["by_source"] for seed in seeds])})
    return rows


def _by_source(cells: Sequence[str]) -> dict[str, float]:
    parsed = [dict(part.split("=") for part in cell.split()) for cell in cells]
    return {source: float(np.mean([float(seed[source]) for seed in parsed if source in seed])) for source in parsed[0]}


def _table(rows: list[Row]) -> str:
    sources = list(dict.fromkeys(source for row in rows for source in row["by_source"]))
    lines = [f"| {' | '.join((*HEADS, *sources))} |", f"|---|{'---:|' * (len(HEADS) - 1 + len(sources))}"]
    for row in rows:
        macro = f"{row['macro_f1']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
        by_source = [f"{row['by_source'][source]:.2f}" if source in row["by_source"] else "–" for source in sources]
        cells = [row["row"], row["seeds"], row["epochs"], row["size"], f"{row['parameters'] / 1e6:.2f}"]
        cells += [f"{row['gflop']:.2f}", f"{row['images_per_cpu_second']:.0f}", macro, f"{row['ece']:.3f}", *by_source]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


@png
def _networks(rows: list[Row]) -> Figure:
    """Draw macro-F1 against cost and speed."""
    subtitle = f"{rows[0]['epochs']} epochs; bars: 95 % intervals over held-out patients"
    figure, body = canvas((8.6, 5.6), "Networks: macro-F1, cost and speed", subtitle)
    axes = body.subplots(1, 2, sharey=True)
    for number, row in enumerate(rows):
        look = {"color": PALETTE[number % len(PALETTE)], "marker": "os^D"[number // len(PALETTE)]}
        for panel, figure_of in zip(axes, ("gflop", "images_per_cpu_second"), strict=True):
            _draw(panel, [row[figure_of]], [row], label=row["row"], **look)
    for panel, label in zip(axes, ("GFLOP per image", "images per second of one core"), strict=True):
        panel.set(xscale="log", xlabel=label)
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter(NullFormatter())
    axes[0].set_ylabel("macro-F1")
    body.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


@png
def _learning_curve(rows: list[Row]) -> Figure:
    """Draw macro-F1 against the share of patients, and the number of sources, that were learnt from."""
    subtitle = "as many steps on fewer images; bars: 95 % intervals over held-out patients"
    figure, body = canvas((8.6, 4.2), "Learning curve", subtitle)
    axes = body.subplots(1, 2, sharey=True)
    patients = [row for row in rows if row["row"] in QUARTERS]
    sources = [row for row in rows if row not in patients]
    patients.sort(key=_amount)
    _draw(axes[0], [_amount(row) for row in patients], patients, color=INK, marker="o")
    axes[0].set(xlabel="% of the patients of all sources", ylabel="macro-F1", xlim=(0, 105))
    # All patients are those of all sources.
    places = {_amount(row): row for row in sources} | {len(row["by_source"]): row for row in patients[-1:]}
    _draw(axes[1], sorted(places), [places[place] for place in sorted(places)], color=INK, marker="o")
    axes[1].set(xlabel="sources, the largest first", xticks=sorted(places))
    return figure


def _amount(row: Row) -> float:
    """Return the number with which the name of a row of the learning curve begins."""
    return float(row["row"].split(maxsplit=1)[0])


def _draw(axes: Axes, places: list[float], rows: list[Row], **look: Any) -> None:
    """Draw points, a line through them, and the interval of each."""
    values = np.array([[row["macro_f1"], row["low"], row["high"]] for row in rows]).reshape(-1, 3).T
    axes.vlines(places, values[1], values[2], color=MUTED, linewidth=1, alpha=0.6)
    axes.plot(places, values[0], markersize=7, linewidth=1, markeredgecolor="white", **look)


if __name__ == "__main__":
    main()
