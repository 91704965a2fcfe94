"""Inline SVG whose colours are CSS variables, so that one picture serves light and dark pages.

matplotlib draws with marker colours; `_svg` replaces each with the variable it stands for, drops what a browser has no
use for, and leaves text as text, in the font of the page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

# Marker -> CSS variable. The values mean nothing but must differ, and be none that matplotlib uses by itself.
INK, MUTED, GRID, CARD = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04"
SERIES = tuple(f"#0a0c{i:02x}" for i in range(8))
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line", CARD: "--card"} | {
    marker: f"--c{i}" for i, marker in enumerate(SERIES)
}
POINT = 9.5  # font size; 1 pt is about 1 px where the figure is as wide as a phone


def draw(size: tuple[float, float], salt: str, title: str, paint: Callable[[Any], None]) -> str:
    """Paint on a fresh figure of `size` inches and return it as an <svg> element. `salt` keeps ids of figures apart."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "font.size": POINT,
        "axes.edgecolor": GRID,
        "axes.labelcolor": MUTED,
        "text.color": INK,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "grid.color": GRID,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_alpha(0)
        paint(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _svg(buffer.getvalue(), salt, title)


def _svg(text: str, salt: str, title: str) -> str:
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px; font-family: inherit", text)
    text = re.sub(r'\bid="', f'id="{salt}-', text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{salt}-", text)
    for marker, variable in _VARIABLES.items():
        text = text.replace(marker, f"var({variable})")
    return text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)


def lengths_axis(axes: Any, lengths: Sequence[int]) -> None:
    """A base-2 x axis of context lengths with at most a handful of ticks."""
    axes.set_xscale("log", base=2)
    shown = [n for n in lengths if n >= 1024 or len(lengths) < 4] or list(lengths)
    shown = [n for i, n in enumerate(shown) if len(shown) <= 4 or i % 2 == 0]
    axes.set_xticks(shown, [tokens(n) for n in shown])
    axes.minorticks_off()
    axes.set_xlabel("context length, tokens")
    axes.grid(True, axis="y", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)


def tokens(count: int) -> str:
    """4096 -> 4k; what is no multiple of 1024 as it is."""
    return f"{count // 1024}k" if count >= 1024 and count % 1024 == 0 else str(count)


def end_labels(axes: Any, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Names at the right ends of lines, pushed apart where they would overlap. (x, y, name, colour), log y axis."""
    figure = axes.figure
    figure.canvas.draw()
    spots = sorted(ends, key=lambda end: end[1])
    last = -1e9
    for x, y, name, colour in spots:
        at = axes.transData.transform((x, y))[1]
        place = max(at, last + 1.25 * POINT * figure.dpi / 72)
        last = place
        offset = (place - at) * 72 / figure.dpi
        axes.annotate(
            name, (x, y), xytext=(6, offset), textcoords="offset points", color=colour, va="center", weight="bold"
        )


def plain_log(axes: Any) -> None:
    """Powers of ten on the y axis, written out."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.yaxis.set_major_locator(LogLocator(10))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.minorticks_off()
