"""Inline SVG whose colours are CSS variables, so that one picture serves light and dark pages.

matplotlib draws with marker colours; `_svg` replaces each with the variable it stands for, drops what a browser has no
use for, and leaves text as text, in the font of the page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
    text = re.sub(r"font-family: (?!inherit)[^;\"]*", "font-family: inherit", text)
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
    """Names of lines in a column right of the axes, each as near to its line's end as the others and the axes allow.

    ends: (x, y, name, colour).
    """
    figure = axes.figure
    figure.draw_without_rendering()  # limits and layout stand only after this
    spots = sorted(ends, key=lambda end: end[1])
    gap = 1.25 * POINT * figure.dpi / 72
    wanted = [axes.transData.transform((x, y))[1] for x, y, _, _ in spots]
    low, high = axes.transAxes.transform((0, 0))[1], axes.transAxes.transform((0, 1))[1]
    for place, (_, y, name, colour) in zip(_apart(wanted, gap, low, high), spots, strict=True):
        at = axes.transData.transform((1, y))[1]
        axes.annotate(
            name, (1, y), xycoords=("axes fraction", "data"), xytext=(5, (place - at) * 72 / figure.dpi),
            textcoords="offset points", color=colour, va="center", weight="bold",
        )  # fmt: skip


def _apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending places near the ascending wanted ones, `gap` apart, in [low, high] where they fit."""
    groups: list[tuple[float, int]] = []  # (sum of wanted places less their offsets, members) of labels that touch
    for each in wanted:
        groups.append((each, 1))
        while len(groups) > 1:
            (total, count), (last, more) = groups[-2], groups[-1]
            top = total / count + (count - 1) / 2 * gap
            bottom = last / more - (more - 1) / 2 * gap
            if bottom - top >= gap:
                break
            groups[-2:] = [(total + last, count + more)]
    placed = []
    for total, count in groups:
        begin = total / count - (count - 1) / 2 * gap
        placed += [begin + i * gap for i in range(count)]
    shift = min(0.0, high - placed[-1]) if placed else 0.0
    placed = [each + shift for each in placed]
    for i, each in enumerate(placed):  # pushed back up where the shift took them below the axes
        placed[i] = max(each, low + i * gap)
    return placed


def plain_log(axes: Any) -> None:
    """Powers of ten on the y axis, written out."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.yaxis.set_major_locator(LogLocator(10))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.minorticks_off()


@dataclass(frozen=True)
class Line:
    """Points of one name, ascending in x. `colour` counts through SERIES; dashed lines carry no name of their own."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    is_dashed: bool = False


def lines(
    every: Sequence[Line],
    *,
    salt: str,
    title: str,
    heading: str,
    limits: Sequence[tuple[str, float]] = (),
    is_log: bool = False,
) -> str:
    """Values against context length. `limits`: (name, value) of dotted horizontals, drawn where they are in reach."""

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        if is_log:
            axes.set_yscale("log")
        top = max(y for line in every for _, y in line.points)
        shown = [(name, value) for name, value in limits if value <= (4 if is_log else 1.6) * top]
        for _, value in shown:
            axes.axhline(value, color=MUTED, linewidth=1, linestyle=":")
        ends = []
        for line in every:
            x, y = zip(*line.points, strict=True)
            colour = SERIES[line.colour % len(SERIES)]
            style = ("--", 1.1, 0) if line.is_dashed else ("-", 1.8, 3.5)
            axes.plot(x, y, style[0], color=colour, linewidth=style[1], marker="o", markersize=style[2])
            if not line.is_dashed:
                ends.append((x[-1], y[-1], line.name, colour))
        lengths_axis(axes, [int(n) for n in sorted({x for line in every for x, _ in line.points})])
        if is_log:
            plain_log(axes)
        else:
            axes.set_ylim(0, 1.12 * max([top, *(value for _, value in shown)]))
        for name, value in shown:
            axes.annotate(
                name, (0, value), xycoords=("axes fraction", "data"), xytext=(3, 3), textcoords="offset points",
                color=MUTED, fontsize=POINT - 1.5,
            )  # fmt: skip
        end_labels(axes, ends)
        axes.set_title(heading, loc="left", fontsize=POINT, color=MUTED)

    return draw((4.6, 3.1), salt, title, paint)


def dots(
    labels: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    *,
    salt: str,
    title: str,
    heading: str,
    mark: float | None = 1.0,
) -> str:
    """One row per label, one dot per series that has a value there; a logarithmic axis with a line at `mark`."""

    def paint(figure: Any) -> None:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        axes = figure.add_subplot()
        axes.set_xscale("log", base=10)
        if mark is not None:
            axes.axvline(mark, color=MUTED, linewidth=1)
        rows = range(len(labels))
        for i, (name, values) in enumerate(series.items()):
            found = [(value, row) for row, value in zip(rows, values, strict=True) if value is not None]
            if found:
                x, y = zip(*found, strict=True)
                axes.plot(x, y, "o", color=SERIES[i % len(SERIES)], markersize=4.5, label=name)
        axes.set_yticks(list(rows), list(labels), fontsize=POINT - 1)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.grid(True, axis="x", linewidth=0.6)
        axes.grid(True, axis="y", linewidth=0.4)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, which="both")
        low, high = axes.get_xlim()
        steps = (1, 1.2, 1.5, 2, 3, 5) if high / low < 4 else (1, 2, 5) if high / low < 40 else (1,)
        axes.xaxis.set_major_locator(LogLocator(10, subs=steps))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.spines["left"].set_visible(False)
        figure.suptitle(heading, x=0.01, ha="left", fontsize=POINT, color=MUTED)
        if len(series) > 1:
            axes.legend(
                loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, fontsize=POINT - 1,
                handletextpad=0.1, columnspacing=0.8, borderaxespad=0.1,
            )  # fmt: skip

    return draw((4.6, 0.9 + 0.215 * len(labels)), salt, title, paint)


def bars(values: Sequence[tuple[str, float]], *, salt: str, title: str, heading: str) -> str:
    """Horizontal bars with their numbers, in the order given."""

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        rows = range(len(values))
        axes.barh(list(rows), [value for _, value in values], height=0.62, color=SERIES[0])
        for row, (_, value) in zip(rows, values, strict=True):
            axes.annotate(
                f"{value:.1f}", (value, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=POINT - 1
            )
        axes.set_yticks(list(rows), [name if len(name) <= 30 else name[:28] + "..." for name, _ in values])
        axes.set_ylim(len(values) - 0.4, -0.6)
        axes.set_xlim(0, 1.15 * max([1e-9, *(value for _, value in values)]))
        axes.tick_params(length=0)
        axes.spines["left"].set_visible(False)
        figure.suptitle(heading, x=0.01, ha="left", fontsize=POINT, color=MUTED)

    return draw((4.6, 0.9 + 0.26 * len(values)), salt, title, paint)


def scatter(
    points: Mapping[str, Sequence[tuple[float, float]]], *, salt: str, title: str, heading: str, x_label: str
) -> str:
    """Points of several names over a logarithmic x axis; names with several points are joined in the order of x."""

    def paint(figure: Any) -> None:
        from matplotlib.ticker import FuncFormatter, NullFormatter

        axes = figure.add_subplot()
        axes.set_xscale("log", base=2)
        ends = []
        for i, (name, each) in enumerate(points.items()):
            x, y = zip(*sorted(each), strict=True)
            colour = SERIES[i % len(SERIES)]
            axes.plot(x, y, "-o", color=colour, linewidth=1.4, markersize=4.5)
            ends.append((x[-1], y[-1], name, colour))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(True, axis="y", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, which="both")
        axes.set_xlabel(x_label)
        end_labels(axes, ends)
        figure.suptitle(heading, x=0.01, ha="left", fontsize=POINT, color=MUTED)

    return draw((4.6, 3.1), salt, title, paint)


@dataclass(frozen=True)
class Spot:
    """One point under a roof: FLOP per byte, TFLOP/s that were reached, or the roof itself where nothing was run."""

    intensity: float
    tflops: float
    name: str
    is_measured: bool


def roofline(
    roofs: Sequence[tuple[str, float]],
    slopes: Sequence[tuple[str, float]],
    spots: Sequence[Spot],
    *,
    salt: str,
    title: str,
) -> str:
    """TFLOP/s against FLOP per byte. `roofs`: (name, TFLOP/s) of flat tops; `slopes`: (name, 10^9 byte/s)."""

    def paint(figure: Any) -> None:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        axes = figure.add_subplot()
        axes.set_xscale("log", base=10)
        axes.set_yscale("log", base=10)
        top = max(value for _, value in roofs)
        ridge = 1e3 * top / min(rate for _, rate in slopes)
        low = min([ridge / 30, *(spot.intensity / 2 for spot in spots)])
        high = max([ridge * 8, *(spot.intensity * 2.5 for spot in spots)])
        for i, (name, rate) in enumerate(slopes):
            knee = 1e3 * top / rate
            x = [low, min(knee, high)]
            axes.plot(x, [rate * each / 1e3 for each in x], "-" if i == 0 else "--", color=MUTED, linewidth=1.3)
            spot = (low * knee) ** 0.5
            axes.annotate(
                f"{name}, {rate:,.4g} GB/s", (spot, rate * spot / 1e3), xytext=(-7, 5) if i else (7, -7), color=MUTED,
                textcoords="offset points", fontsize=POINT - 1.5, ha="right" if i else "left",
            )  # fmt: skip
        for name, value in roofs:
            begin = 1e3 * value / max(rate for _, rate in slopes)
            axes.plot([begin, high], [value, value], "-", color=INK, linewidth=1.5)
            axes.annotate(
                f"{name}, {value:.3g} TFLOP/s", (high, value), xytext=(0, 4), textcoords="offset points", ha="right",
                color=INK, fontsize=POINT - 1.5,
            )  # fmt: skip
        for spot in spots:
            face = SERIES[0] if spot.is_measured else CARD
            axes.plot(spot.intensity, spot.tflops, "o", color=SERIES[0], markerfacecolor=face, markersize=5)
        for spot in spots if len(spots) <= 12 else ():
            is_left = spot.intensity < (low * high) ** 0.5
            axes.annotate(
                spot.name, (spot.intensity, spot.tflops), xytext=(6 if is_left else -6, -10), color=SERIES[0],
                textcoords="offset points", fontsize=POINT - 1.5, ha="left" if is_left else "right",
            )  # fmt: skip
        axes.set_xlim(low, high)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(10))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
            axis.set_minor_formatter(NullFormatter())
        axes.set_ylim(top=2.2 * top)
        axes.grid(True, linewidth=0.5)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, which="both")
        axes.set_xlabel("FLOP per byte")
        axes.set_title("TFLOP/s", loc="left", fontsize=POINT, color=MUTED)

    return draw((4.6, 3.3), salt, title, paint)
