"""The style that all figures share: palette, type, heading. Nothing here needs more than matplotlib."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec

import matplotlib as mpl
from matplotlib.axis import Axis
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import PercentFormatter

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

INK, MUTED, PALE = "#1f2933", "#5f6b7a", "#9aa5b1"
BLUE, VERMILLION = "#0072b2", "#d55e00"
# Okabe & Ito's palette, which readers with any kind of colour vision tell apart, without its yellow: too pale on white.
PALETTE = (BLUE, VERMILLION, "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4d4d4d")
LINES = ("-", (0, (5, 1.6)))

STYLE: dict[RcKeyType, Any] = {
    "font.family": "DejaVu Sans",  # it comes with matplotlib: the same figure on every machine
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,  # a class or file name may hold a dollar sign
    "axes.labelcolor": INK,
    "axes.edgecolor": "#aab4c0",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e9ee",
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "lines.linewidth": 2,
    "legend.facecolor": "white",
    "legend.edgecolor": "none",
    "legend.framealpha": 0.9,
    "legend.fontsize": 9.5,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "savefig.dpi": 200,  # twice the 100 dpi at which figure sizes and fonts are chosen: sharp on dense screens
}

P = ParamSpec("P")


def in_percent(*axes: Axis, decimals: int | None = None) -> None:
    """Label axes of shares as `btray.core.notice.percent` writes them; by default with the decimals that they need."""
    for axis in axes:
        axis.set_major_formatter(PercentFormatter(1, decimals=decimals, symbol=" %"))


def png(draw: Callable[P, Figure]) -> Callable[P, bytes]:
    """Make a function that draws a figure return it as PNG bytes, drawn in `STYLE`."""

    @wraps(draw)
    def render(*args: P.args, **kwargs: P.kwargs) -> bytes:
        with mpl.rc_context(STYLE):
            target = io.BytesIO()
            draw(*args, **kwargs).savefig(target, format="png")
            return target.getvalue()

    return render


def canvas(size: tuple[float, float], title: str, subtitle: str) -> tuple[Figure, SubFigure]:
    """Return a figure of `size` (width, height; inches) with its heading, and the part below it to draw in."""
    heading = 0.62
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=(heading, size[1] - heading))
    head, body = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    head.text(0.16 / size[0], 0.8, title, va="top", fontsize=14, fontweight="bold")
    head.text(0.16 / size[0], 0.12, subtitle, va="bottom", fontsize=10, color=MUTED)
    return figure, body
