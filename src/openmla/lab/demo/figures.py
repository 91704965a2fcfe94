"""Figures of the demo's report; `openmla.lab.plot` draws them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from openmla.lab.demo.measure import DEEPSEEK_V3_LAYERS, KVForm, Rate
from openmla.lab.demo.serve import RequestLog, StepLog
from openmla.lab.plot import GRID, MUTED, POINT, SERIES, draw, end_labels, lengths_axis, plain_log


def _line_plot(axes: Any, sweep: Sequence[Rate], names: dict[str, str], value: Callable[[Rate], float]) -> None:
    ends = []
    for i, (key, name) in enumerate(names.items()):
        points = [rate for rate in sweep if rate.name == key]
        if not points:
            continue
        x, y = [rate.s_k for rate in points], [value(rate) for rate in points]
        style = "--" if key == "expanded" else "-"
        axes.plot(x, y, style, color=SERIES[i], linewidth=1.8, marker="o", markersize=3.5)
        ends.append((x[-1], y[-1], name, SERIES[i]))
    lengths_axis(axes, sorted({rate.s_k for rate in sweep}))
    end_labels(axes, ends)


def series_names(sweep: Sequence[Rate]) -> dict[str, str]:
    """Name in the sweep -> name in the figures, in drawing order."""
    known = {"fp32_576": "fp32", "bf16_576": "bf16", "fp8_656": "fp8", "expanded": "expanded"}
    present = {rate.name for rate in sweep}
    return {key: name for key, name in known.items() if key in present}


def decode_time(sweep: Sequence[Rate]) -> str:
    """Milliseconds of one decode step against context length."""

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.set_yscale("log")
        _line_plot(axes, sweep, series_names(sweep), lambda rate: rate.seconds * 1e3)
        axes.set_title("milliseconds per step", loc="left", fontsize=POINT, color=MUTED)
        plain_log(axes)

    return draw((4.6, 3.1), "time", "Decode time against context length", paint)


def decode_bandwidth(sweep: Sequence[Rate], read_gbps: float) -> str:
    """GB/s of KV read; dotted, for each series, the most that the measured rates of the machine allow."""

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        names = {key: name for key, name in series_names(sweep).items() if key != "expanded"}
        absorbed = [rate for rate in sweep if rate.name != "expanded"]
        limits = {rate.name: allowed_gbps(rate) for rate in absorbed}
        top = max(*limits.values(), *(rate.gbps for rate in absorbed))
        lengths = [rate.s_k for rate in absorbed]
        for i, key in enumerate(names):
            axes.plot([min(lengths), max(lengths)], [limits[key]] * 2, ":", color=SERIES[i], linewidth=1.3)
        if read_gbps <= top:
            axes.axhline(read_gbps, color=MUTED, linewidth=1, linestyle=":")
        axes.set_ylim(0, 1.12 * top)
        _line_plot(axes, absorbed, names, lambda rate: rate.gbps)
        axes.set_title("GB/s of KV", loc="left", fontsize=POINT, color=MUTED)

    return draw((4.6, 3.1), "bandwidth", "KV bandwidth of decode against context length", paint)


def allowed_gbps(rate: Rate) -> float:
    """The bandwidth at 100 % of the roofline: the read rate, or what arithmetic leaves of it."""
    return rate.gbps * 100 / rate.roofline_percent


def kv_memory(forms: Sequence[KVForm], *, is_deepseek: bool, layers: int) -> str:
    """Memory of one request's context against its length, one line per form."""
    layers = DEEPSEEK_V3_LAYERS if is_deepseek else layers
    lengths = [2**n for n in range(10, 18)]

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.set_yscale("log")
        ends = []
        for i, form in enumerate(forms):
            each = form.deepseek_v3_bytes if is_deepseek else form.demo_bytes
            unit = 2**30 if is_deepseek else 2**20
            y = [n * layers * each / unit for n in lengths]
            axes.plot(lengths, y, color=SERIES[i], linewidth=1.8)
            ends.append((lengths[-1], y[-1], form.name, SERIES[i]))
        lengths_axis(axes, lengths)
        plain_log(axes)
        end_labels(axes, ends)
        unit_name = "GiB" if is_deepseek else "MiB"
        axes.set_title(f"{unit_name} per request", loc="left", fontsize=POINT, color=MUTED)

    which = "DeepSeek-V3" if is_deepseek else "the demo's model"
    return draw((4.6, 3.1), f"kv-{is_deepseek}", f"KV memory against context length, {which}", paint)


def schedule(requests: Sequence[RequestLog], steps: Sequence[StepLog], num_pages: int) -> str:
    """Two pictures over the same steps: what each request did, and who held each page."""
    colours = {log.name: SERIES[i % 7] for i, log in enumerate(requests)}

    def paint(figure: Any) -> None:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(len(requests) + 1, 10))
        _paint_requests(upper, requests, colours)
        _paint_pages(lower, steps, colours, num_pages)
        upper.set_xlim(-0.8, len(steps) - 0.2)

    return draw((8.2, 5.6), "schedule", "Which request was in which step and held which pages", paint)


def _paint_requests(axes: Any, requests: Sequence[RequestLog], colours: dict[str, str]) -> None:
    last_step = max(log.left for log in requests) + 1
    for row, log in enumerate(requests):
        colour = colours[log.name]
        if log.joined > log.arrived:
            axes.plot([log.arrived - 0.5, log.joined - 0.5], [row, row], ":", color=colour, linewidth=2)
        axes.barh(row, log.left - log.joined + 1, left=log.joined - 0.5, height=0.66, color=colour, alpha=0.3)
        axes.barh(row, 1, left=log.joined - 0.5, height=0.66, color=colour)
        known = f", {log.shared_tokens} of them shared" if log.shared_tokens else ""
        known = f", {log.cached_tokens} of them found" if log.cached_tokens else known
        label = f"{log.prompt_tokens} in{known}, {len(log.tokens)} out"
        # Inside the pale part where the text fits, else behind it.
        is_roomy = (log.left - log.joined) / last_step > 0.0098 * len(label)
        spot = (log.joined + 0.5 if is_roomy else log.left + 0.5, row)
        axes.annotate(label, spot, xytext=(5, 0), textcoords="offset points", va="center", fontsize=POINT - 1)
    axes.set_yticks(range(len(requests)), [log.name for log in requests])
    for label, log in zip(axes.get_yticklabels(), requests, strict=True):
        label.set_color(colours[log.name])
        label.set_fontweight("bold")
    axes.invert_yaxis()
    axes.spines["left"].set_visible(False)
    axes.tick_params(length=0)
    axes.set_title("requests", loc="left", fontsize=POINT, color=MUTED)


def _paint_pages(axes: Any, steps: Sequence[StepLog], colours: dict[str, str], num_pages: int) -> None:
    """Every page is a row; a page of several requests is split into one strip for each. Cached pages are grey."""
    strips: dict[tuple[int, int, int, str], list[tuple[float, float]]] = {}
    for number, step in enumerate(steps):
        held = {page: [colours[name] for name in names] for page, names in step.pages.items()}
        held |= {page: [GRID] for page in step.cached_pages}
        for page, owners in held.items():
            for i, colour in enumerate(owners):
                runs = strips.setdefault((page, i, len(owners), colour), [])
                if runs and runs[-1][0] + runs[-1][1] == number - 0.5:
                    runs[-1] = (runs[-1][0], runs[-1][1] + 1)
                else:
                    runs.append((number - 0.5, 1))
    for (page, i, of, colour), runs in strips.items():
        axes.broken_barh(runs, (page - 0.45 + 0.9 * i / of, 0.9 / of), facecolors=colour, linewidth=0)
    axes.set_ylim(num_pages - 0.3, -0.7)
    axes.set_ylabel("page")
    axes.set_xlabel("step")
    axes.tick_params(length=0)
    axes.set_title("pages: colour of the holder, two colours where shared, grey where kept", loc="left",
                   fontsize=POINT, color=MUTED)  # fmt: skip
