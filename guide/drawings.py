"""The pictures of the guide. A chapter computes the numbers; here they are painted with `openmla.lab.plot`.

A drawing shows itself in a notebook and on the site, in the colours of the page; a plain run of the script ignores it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from openmla.lab import plot


@dataclass(frozen=True)
class Drawing:
    """An <svg> and what to see in it."""

    svg: str
    caption: str
    is_wide: bool = False

    def _repr_html_(self) -> str:
        wide = " wide" if self.is_wide else ""
        return (
            f'<figure class="drawing{wide}"><div class="scroll">{self.svg}</div>'
            f"<figcaption>{escape(self.caption)}</figcaption></figure>"
        )


def bars(values: Mapping[str, float], *, unit: str, caption: str, salt: str, is_log: bool = False) -> Drawing:
    """One bar per name, its value written at its end."""

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        names, sizes = list(values), list(values.values())
        rows = range(len(names))
        if is_log:
            axes.set_xscale("log")
        axes.barh(rows, sizes, color=[plot.SERIES[i % 8] for i in rows], height=0.62)
        axes.set_yticks(rows, names)
        axes.invert_yaxis()
        for row, size in zip(rows, sizes, strict=True):
            text = f"{size:,.0f}" if size >= 1000 else f"{size:.4g}"
            axes.annotate(text, (size, row), xytext=(4, 0), textcoords="offset points", va="center")
        axes.set_xlim(right=max(sizes) * (3 if is_log else 1.16))
        axes.set_title(unit, loc="left", fontsize=plot.POINT, color=plot.MUTED)
        axes.tick_params(length=0, which="both", labelbottom=False)
        axes.spines["bottom"].set_visible(False)

    return Drawing(plot.draw((5.6, 0.5 + 0.32 * len(values)), salt, caption, paint), caption)


def roofline(
    spots: Sequence[tuple[str, float]],
    *,
    tflops: float,
    gbps: float,
    caption: str,
    salt: str,
    reached: Sequence[tuple[str, float, float]] = (),
    rates: str = "data sheet",
) -> Drawing:
    """(name, FLOP per byte) on the roof of one machine; `reached` are (name, FLOP per byte, TFLOP/s) that were measured."""

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.set_xscale("log")
        axes.set_yscale("log")
        every = [*((name, x, min(tflops, x * gbps / 1e3)) for name, x in spots), *reached]
        ridge = 1e3 * tflops / gbps
        low, high = min([ridge / 30, *(x / 2 for _, x, _ in every)]), 12 * ridge
        axes.plot([low, ridge, high], [low * gbps / 1e3, tflops, tflops], color=plot.MUTED, linewidth=1.4)
        axes.annotate(
            f"{tflops:,.0f} TFLOP/s, {rates}", (high, tflops), xytext=(0, 4), textcoords="offset points", ha="right",
            color=plot.MUTED, fontsize=plot.POINT - 1.5,
        )  # fmt: skip
        axes.annotate(
            f"{gbps:,.0f} GB/s", ((low * ridge) ** 0.5, (low * ridge) ** 0.5 * gbps / 1e3), xytext=(-6, 6), ha="right",
            textcoords="offset points", color=plot.MUTED, fontsize=plot.POINT - 1.5,
        )  # fmt: skip
        depth, last = 0, 0.0
        for name, x, y in sorted(every, key=lambda spot: spot[1]):
            depth, last = (depth + 1 if x < 2.2 * last else 0), x
            axes.plot(x, y, "o", color=plot.SERIES[0], markersize=5)
            axes.annotate(
                name, (x, y), xytext=(12, -12 - 15 * depth), textcoords="offset points", color=plot.SERIES[0], va="center",
                fontsize=plot.POINT - 1, arrowprops={"arrowstyle": "-", "color": plot.GRID, "shrinkB": 3, "relpos": (0, 0.5)},
            )  # fmt: skip
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:,.4g}")
        axes.minorticks_off()
        axes.set_xlim(low, high)
        axes.set_ylim(min(low * gbps / 1e3, *(y / 3 for _, _, y in every)), 2.2 * tflops)
        axes.grid(True, linewidth=0.5)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        axes.set_xlabel("FLOP per byte")
        axes.set_title("TFLOP/s", loc="left", fontsize=plot.POINT, color=plot.MUTED)

    return Drawing(plot.draw((5.6, 3.5), salt, caption, paint), caption)


def curves(
    series: Mapping[str, Sequence[tuple[float, float]]], *, x: str, y: str, caption: str, salt: str,
    is_log: bool = True, marks: Sequence[tuple[float, str]] = (),
) -> Drawing:  # fmt: skip
    """Lines named at their ends; logarithmic in both directions unless told otherwise. `marks`: verticals."""

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        if is_log:
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            ticks = sorted({at for points in series.values() for at, _ in points})
            axes.set_xticks(ticks[:: max(len(ticks) // 5, 1)])
            axes.xaxis.set_major_formatter(lambda value, _: plot.tokens(int(value)))
            plot.plain_log(axes)
        ends = []
        for i, (name, points) in enumerate(series.items()):
            axes.plot(*zip(*points, strict=True), color=plot.SERIES[i], linewidth=1.8)
            ends.append((*points[-1], name, plot.SERIES[i]))
        for at, name in marks:
            axes.axvline(at, color=plot.MUTED, linewidth=1, linestyle=":")
            axes.annotate(
                name, (at, 1), xycoords=("data", "axes fraction"), xytext=(4, -2), textcoords="offset points",
                color=plot.MUTED, fontsize=plot.POINT - 1.5, va="top",
            )  # fmt: skip
        axes.grid(True, axis="y", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, which="both")
        axes.set_xlabel(x)
        axes.set_title(y, loc="left", fontsize=plot.POINT, color=plot.MUTED)
        plot.end_labels(axes, ends)

    return Drawing(plot.draw((5.6, 3.1), salt, caption, paint), caption)


def lanes(
    rows: Mapping[str, Sequence[tuple[float, float, str, int]]],
    *,
    x: str,
    caption: str,
    salt: str,
    is_wide: bool = False,
) -> Drawing:
    """Who does what when: per row (begin, end, words, colour) boxes on a common axis."""

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        for at, boxes in enumerate(rows.values()):
            for begin, end, words, colour in boxes:
                axes.barh(
                    at, end - begin, left=begin, height=0.74, color=plot.SERIES[colour % 8], alpha=0.32,
                    edgecolor=plot.SERIES[colour % 8], linewidth=1,
                )  # fmt: skip
                axes.text((begin + end) / 2, at, words, ha="center", va="center", fontsize=plot.POINT - 1.5)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.invert_yaxis()
        axes.set_xlabel(x)
        axes.tick_params(length=0)
        axes.spines["left"].set_visible(False)

    width = 7.6 if is_wide else 5.6
    return Drawing(plot.draw((width, 0.75 + 0.33 * len(rows)), salt, caption, paint), caption, is_wide)


def squares(
    left: Sequence[Sequence[int]], right: Sequence[Sequence[int]], *, titles: tuple[str, str], caption: str, salt: str
) -> Drawing:
    """Two grids of numbers, coloured by number: where the pieces of a tile lie in the banks of shared memory."""

    def paint(figure: Any) -> None:
        for place, (grid, title) in enumerate(zip((left, right), titles, strict=True)):
            axes = figure.add_subplot(1, 2, place + 1)
            for r, row in enumerate(grid):
                for c, value in enumerate(row):
                    colour = plot.SERIES[value % 8]
                    axes.add_patch(_box(c, r, colour))
                    axes.text(c, r, str(value), ha="center", va="center", fontsize=plot.POINT - 1)
            axes.set_xlim(-0.6, len(grid[0]) - 0.4)
            axes.set_ylim(len(grid) - 0.4, -0.6)
            axes.set_aspect("equal")
            axes.set_xticks([])
            axes.set_yticks(range(len(grid)), [f"row {r}" for r in range(len(grid))], fontsize=plot.POINT - 2)
            axes.tick_params(length=0)
            for side in axes.spines.values():
                side.set_visible(False)
            axes.set_title(title, loc="left", fontsize=plot.POINT, color=plot.MUTED)

    return Drawing(plot.draw((6.6, 3.3), salt, caption, paint), caption)


def _box(column: float, row: float, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, facecolor=colour, alpha=0.35, edgecolor=colour)
