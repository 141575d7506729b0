"""Plots of Matplotlib as SVG inside a page: they take the page's font and its colours, light or dark.

What is drawn in `INK` or in one of `SERIES` becomes ``currentColor`` or a variable of the style sheet. The same figure
gives the same bytes."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

#: points; a phone shows a figure of this width about as large as it is
WIDTH = 360
#: stand-ins: what is drawn in them takes the page's colour of text, and of its first, second and third series
INK = "#010203"
SERIES = ("#010204", "#010205", "#010206")

_RC: dict[str, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "llmcompress", "svg.image_inline": True, "font.size": 11.5,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6, "axes.titlesize": 11.5,
    "axes.titlelocation": "left", "axes.labelsize": 11.5, "xtick.labelsize": 10.5, "ytick.labelsize": 10.5,
    "legend.fontsize": 10.5, "legend.frameon": False, "grid.color": INK, "grid.alpha": 0.18, "grid.linewidth": 0.5,
    "axes.spines.top": False, "axes.spines.right": False, "figure.facecolor": "none", "axes.facecolor": "none",
    "savefig.facecolor": "none", "axes.unicode_minus": True, "text.usetex": False, "text.parse_math": False,
    "axes.axisbelow": True,
}  # fmt: skip


@contextmanager
def canvas(height: float, width: float = WIDTH) -> Iterator[Figure]:
    """A figure of ``width`` × ``height`` points, and Matplotlib's settings while it is drawn on."""
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_RC}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # text is set in the fonts of the browser
        layout = ConstrainedLayoutEngine(w_pad=2 / 72, h_pad=2 / 72)
        yield Figure(figsize=(width / 72, height / 72), layout=layout)


def placed(figure: Figure, left: float, bottom: float, right: float, height: float) -> Axes:
    """Axes between margins ``left`` and ``right``, so high and so far above the figure's bottom, in points."""
    wide, high = (72 * float(inches) for inches in figure.get_size_inches())
    axes: Axes = figure.add_axes((left / wide, bottom / high, (wide - left - right) / wide, height / high))
    return axes


def inline(figure: Figure, key: str, title: str, description: str) -> Markup:
    """The figure as an ``svg`` element. Call it inside `canvas`.

    Args:
        key: tells its parts from those of other figures of the page; letters alone.
        title: what it is, for those who do not see it.
        description: what it shows.
    """
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"\s*<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r"<!--.*?-->\n?|\s*<style[^>]*>.*?</style>", "", drawn, flags=re.DOTALL)
    drawn = drawn.replace(INK, "currentColor")
    for number, stand_in in enumerate(SERIES, 1):
        drawn = drawn.replace(stand_in, f"var(--series-{number})")
    drawn = re.sub(r"font: (?:\w+ )*?([\d.]+px) [^;\"]*", r"font-size: \1", drawn)
    drawn = _own_names(drawn, key)
    size = re.search(r'viewBox="[^"]*"', drawn)
    head = Markup('<svg {} role="img" aria-labelledby="{}-t {}-d"><title id="{}-t">{}</title>').format(
        Markup(size[0] if size else ""), key, key, key, title
    )
    body = drawn[drawn.index(">", drawn.index("<svg")) + 1 :].strip()
    return head + Markup('<desc id="{}-d">{}</desc>').format(key, description) + Markup(body)


def _own_names(drawn: str, key: str) -> str:
    """Drops the names of parts that nothing refers to, and gives the others one that no other figure has."""
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', drawn))
    drawn = re.sub(r' id="([^"]+)"', lambda m: f' id="{key}-{m[1]}"' if m[1] in used else "", drawn)
    return re.sub(r'(url\(|href=")#', rf"\1#{key}-", drawn)


def heat_colors() -> Colormap:
    """Dark blue to yellow, the same to those who cannot tell red from green."""
    return matplotlib.colormaps["cividis"]


def cell_colors(share: float) -> tuple[str, str]:
    """(background, text) of a cell, for a place between 0 and 1 on the scale; the text is what is read better on it."""
    red, green, blue, _ = heat_colors()(min(max(share, 0.0), 1.0))
    light = sum(w * _linear(c) for w, c in zip((0.2126, 0.7152, 0.0722), (red, green, blue), strict=True))
    text = "#000" if (light + 0.05) / 0.05 > 1.05 / (light + 0.05) else "#fff"
    return "#" + "".join(f"{round(255 * c):02x}" for c in (red, green, blue)), text


def _linear(channel: float) -> float:
    """sRGB to light, as the contrast of WCAG counts it."""
    return channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4
