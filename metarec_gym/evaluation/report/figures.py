"""Figures as inline SVG whose colours are style-sheet variables, so that they follow the reader's theme."""

from __future__ import annotations

import io
import re
from typing import Any

from metarec_gym.evaluation.report.parts import escape

# colours that occur nowhere else; they become style-sheet variables after drawing
INK, FAINT = "#010203", "#010204"
SERIES = tuple(f"#0a0b{i:02x}" for i in range(8))
DASHES: tuple[Any, ...] = ("-", "-", "-", "-", "--", "--", ":", ":")
MAX_CURVES = 8


class drawing:
    """A matplotlib figure without global state, drawn with placeholder colours."""

    def __init__(self, *, height: float) -> None:
        self.height = height

    def __enter__(self) -> tuple[Any, Any]:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8.6, self.height))
        axes = figure.add_subplot()
        style_axes(axes)
        figure.patch.set_alpha(0.0)
        return figure, axes

    def __exit__(self, *error: object) -> None:
        return None


def style_axes(axes: Any) -> None:
    """Axes as every figure of a page has them; `drawing` does it for its own, a figure of several asks for the others."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(INK)
    axes.tick_params(colors=INK, labelsize=9)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.set_axisbelow(True)
    axes.patch.set_alpha(0.0)


def figure_html(figure: Any, caption: str, name: str) -> str:
    """A drawn figure as inline SVG with its caption.

    Args:
        figure: What `drawing` gave.
        caption: Text below it.
        name: Its name on the page; ids inside the SVG begin with it.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # fixed size -> as wide as the page; ids are made unique so that two figures never share a clip path
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'id="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-")
    svg = re.sub(r"font: ([^;\"]*?)'[^;\"]*'[^;\"]*sans-serif", r"font: \1sans-serif", svg)
    for colour, variable in ((INK, "--ink"), (FAINT, "--faint"), *((c, f"--c{i}") for i, c in enumerate(SERIES))):
        svg = svg.replace(colour, f"var({variable})")
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"
