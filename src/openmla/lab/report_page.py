"""The page of `openmla report`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from openmla.core.layout import kv_layout
from openmla.lab import bars, plot, suite
from openmla.lab.page import Cell, Figure, Page, Section, Table, Tile, amount, duration
from openmla.lab.report import Report, figure_name, figure_of, geomean, label, line_of
from openmla.lab.store import Row
from openmla.lab.suite import Case

_LENGTHS = [2**n for n in range(10, 18)]
_TONES = {"met": "good", "missed": "bad", "faster": "good", "slower": "bad"}


def page(report: Report) -> Page:
    """Speed against length, speed-ups, bars, memory, changes, every number, and where they come from."""
    known = {name: case for name in report.runs if (case := suite.parse(name))}
    sections = [
        *_bars(report),
        *_changes(report),
        *_speed(report, known),
        *_speedups(report, known),
        _memory(known.values()),
        _numbers(report),
    ]
    return Page(_title(report, known.values()), _lead(report), sections, _tiles(report), _footer(report))


def _title(report: Report, known: Iterable[Case]) -> str:
    if report.before:
        changed = sum(each.verdict != "same" for each in report.changes)
        return f"{report.source} against {report.before}: {changed} of {len(report.changes)} changed"
    ops = {case.op for case in known}
    what = f"MLA {ops.pop().replace('_', ' ')}" if len(ops) == 1 else "MLA attention"
    return f"{what} on {report.devices[0]}" if len(report.devices) == 1 else f"{what}, {report.source}"


def _lead(report: Report) -> str:
    rows = [row for run in report.runs.values() for row in run]
    days = sorted({row.utc[:10] for row in rows})
    span = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    older = (
        f" {report.hidden} rows of older runs of these cases are in the file and not shown." if report.hidden else ""
    )
    return (
        f"{len(report.runs)} cases, {len(rows)} rows of `{report.source}`, measured {span}. Every contender passed the same "
        f"gate against the fp64 oracle, unless its row says otherwise.{older}"
    )


def _tiles(report: Report) -> list[Tile]:
    found = []
    if report.judgements:
        met = sum(each.verdict == "met" for each in report.judgements)
        tone = "good" if met == len(report.judgements) else "bad"
        found.append(Tile(f"{met} of {len(report.judgements)}", "bars met", tone))  # type: ignore[arg-type]
    for who, pairs in list(report.speedups.items())[:3]:
        mean = geomean(value for _, value in pairs)
        cases = f"{len(pairs)} case{'s' if len(pairs) > 1 else ''}"
        found.append(Tile(f"{mean:.2f}x", f"as fast as {who}, geometric mean of {cases}"))
    best = max((own for run in report.runs.values() if (own := bars.ours(run))), key=lambda row: row.fraction_roofline)
    if best.fraction_roofline:
        case = suite.parse(best.case)
        where = label(case) if case else best.case
        found.append(
            Tile(f"{100 * best.fraction_roofline:.0f} %", f"of what a bare product or read reached, at best: {where}")
        )
    return found


def _bars(report: Report) -> Iterator[Section]:
    if not report.judgements:
        return
    rows: list[list[str | Cell]] = []
    for each in report.judgements:
        bar = each.bar
        rows.append([
            Cell(each.verdict, _TONES.get(each.verdict, "")),  # type: ignore[arg-type]
            bar.name, bars.text(each.value, bar.value, bar.limit) or "-",
            f"{'at least' if bar.is_floor else 'at most'} {bars.text(bar.limit, bar.value)}",
            f"{len(each.measured)} of {len(each.cells)}",
        ])  # fmt: skip
        for cell in each.short if len(each.cells) > 1 else ():
            rows.append(["", f"`{cell.case}`", bars.text(cell.value, bar.value, bar.limit), "", ""])
    table = Table("bars", ("", "bar", "worst cell or mean", "wanted", "cells"), rows, left=(0, 1))
    text = "What the suite promises, from the newest run of each cell. Cells that miss stand below their bar."
    yield Section("Bars", [text], tables=[table])


def _changes(report: Report) -> Iterator[Section]:
    if not report.before:
        return
    order = sorted(report.changes, key=lambda each: each.speedup)
    names = [f"{_short(each.case)} · {each.who}" for each in order]
    picture = plot.dots(
        names, {"speed-up": [each.speedup for each in order]}, salt="changes", title="Speed against the older file",
        heading=f"speed against {report.before}, right is faster",
    )  # fmt: skip
    rows: list[list[str | Cell]] = [
        [Cell(each.verdict, _TONES.get(each.verdict, "")), f"`{each.case}`", each.who, f"{each.speedup:.3f}x",  # type: ignore[arg-type]
         duration(each.before.median_us / 1e6), duration(each.after.median_us / 1e6)]
        for each in order
    ]  # fmt: skip
    table = Table("changes", ("", "case", "who", "speed", "before", "after"), rows, left=(0, 1, 2))
    machines = {str(row.environment.get("device")) for each in order for row in (each.before, each.after)}
    text = ["A change is one when it is beyond 3 % and the bands from the 20th to the 80th percentile do not touch."]
    if len(machines) > 1:
        text.append(
            f"The machines differ ({', '.join(sorted(machines))}): these ratios compare machines, not versions."
        )
    yield Section("What changed", text, [Figure(picture, "One dot per contender and case.")], [table])


def _short(name: str) -> str:
    case = suite.parse(name)
    return label(case) if case else name


# speed against length


def _speed(report: Report, known: dict[str, Case]) -> Iterator[Section]:
    groups: dict[Case, list[str]] = {}
    for name, case in known.items():
        groups.setdefault(figure_of(case), []).append(name)
    figures: list[Figure] = []
    for number, (group, names) in enumerate(groups.items()):
        if len({known[name].s_k for name in names}) < 2:
            continue
        for value, unit, limit in ((_gbps, "GB/s", "read_gbps"), (_tflops, "TFLOP/s", f"gemm_{group.dtype}_tflops")):
            figures.append(_lines(report, known, names, value, unit, limit, f"speed{number}{unit[0]}"))
    if figures:
        text = (
            "Solid: ours. Dashed, in the colour of the same batch: the fastest peer of the same run. Dotted: what this machine "
            "reached in a bare read or a bare matrix product, where that is in reach."
        )
        yield Section("Speed against context length", [text], figures)


def _gbps(row: Row) -> float:
    return row.gbps


def _tflops(row: Row) -> float:
    return row.tflops


def _lines(
    report: Report, known: dict[str, Case], names: Sequence[str], value: Callable[[Row], float], unit: str, limit: str,
    salt: str,
) -> Figure:  # fmt: skip
    order = list(dict.fromkeys(line_of(known[name]) for name in names))
    mine: dict[str, list[tuple[float, float]]] = {name: [] for name in order}
    peers: dict[str, list[tuple[float, float]]] = {name: [] for name in order}
    limits = []
    for name in sorted(names, key=lambda name: known[name].s_k):
        run, line = report.runs[name], line_of(known[name])
        for found, row in ((mine, bars.ours(run)), (peers, bars.faster_peer(run))):
            if row:
                found[line].append((known[name].s_k, value(row)))
                limits.append(row.ceilings.get(limit, 0.0))
    every = [plot.Line(name, mine[name], i) for i, name in enumerate(order) if mine[name]]
    every += [plot.Line(name, peers[name], i, is_dashed=True) for i, name in enumerate(order) if len(peers[name]) > 1]
    heading = figure_name(figure_of(known[names[0]]))
    roof = [(f"measured {'read' if unit == 'GB/s' else 'product'}", max(limits))] if max(limits, default=0.0) else []
    svg = plot.lines(every, salt=salt, title=f"{unit} against context length, {heading}", heading=unit, limits=roof)
    return Figure(svg, "Higher is better.", heading)


# speed-ups, memory, numbers


def _speedups(report: Report, known: dict[str, Case]) -> Iterator[Section]:
    if not report.speedups:
        return
    names = [name for name in report.runs if any(name in dict(pairs) for pairs in report.speedups.values())]
    series = {who: [dict(pairs).get(name) for name in names] for who, pairs in report.speedups.items()}
    picture = plot.dots(
        [_short(name) for name in names], series, salt="speedups", title="Speed-up against each peer, by case",
        heading="peer's time over ours, right is faster",
    )  # fmt: skip
    rows = [
        [who, f"{geomean(value for _, value in pairs):.2f}x", f"{min(value for _, value in pairs):.2f}x",
         f"{max(value for _, value in pairs):.2f}x", str(len(pairs))]
        for who, pairs in report.speedups.items()
    ]  # fmt: skip
    table = Table("speed-ups", ("peer", "geometric mean", "least", "most", "cases"), rows)
    text = "Each dot is one case: batch x keys per request, heads, and what is unusual about it. All contenders of a case took turns."
    yield Section("Speed-ups", [text], [Figure(picture, "Left of the line the peer is faster.")], [table])


def _memory(cases: Iterable[Case]) -> Section:
    every = list(cases)
    heads = max((case.h_q for case in every), default=128)
    layouts = list(dict.fromkeys([*(_layout(case) for case in every), "bf16_576", "fp8_656", "fp4_288"]))[:5]
    kinds = {name: float(kv_layout(name).bytes_per_token) for name in layouts}
    # Keys of 192 and values of 128 columns per head, bf16: what DeepSeek-V3's heads would keep without the latent.
    kinds[f"MHA, {heads} heads"] = heads * (192 + 128) * 2.0
    every_line = [
        plot.Line(name, [(n, n * each / 2**20) for n in _LENGTHS], i) for i, (name, each) in enumerate(kinds.items())
    ]
    svg = plot.lines(every_line, salt="memory", title="KV memory against context length", is_log=True,
                     heading="MiB of KV, one request and layer")  # fmt: skip
    mine = kinds[layouts[0]]
    rows = [
        [name, f"{each:,.0f}", f"{each / mine:.2g}x", amount(each * 131072), amount(each * 131072 * 61)]
        for name, each in kinds.items()
    ]
    head = ("KV format", "bytes per token", f"against {layouts[0]}", "128k tokens, one layer", "61 layers")
    return Section(
        "Memory against context length",
        [
            "Arithmetic, not a measurement: what one request keeps. The last line is ordinary attention with as many heads."
        ],
        [Figure(svg, "Lower is better.")],
        [Table("memory", head, rows)],
    )


def _layout(case: Case) -> str:
    return f"{case.dtype}_{case.d_qk}" if case.layout == "plain" else case.layout


def _numbers(report: Report) -> Section:
    rows: list[list[str | Cell]] = []
    for case, run in report.runs.items():
        own = bars.ours(run)
        for row in sorted(run, key=lambda row: row.median_us):
            spread = "" if row.p20_us is None else f"{_us(row.p20_us)} to {_us(row.p80_us)}"
            ratio = f"{row.median_us / own.median_us:.2f}" if own else ""
            host = "" if row.host_us is None else _us(row.host_us)
            rows.append([
                f"`{case}`", f"{row.who}" + (f" ({row.kernel})" if row.kind == "backend" else ""), _us(row.median_us),
                spread, str(row.n), host, f"{row.tflops:.3g}", f"{row.gbps:.4g}", f"{row.fraction_gemm:.0%}",
                f"{row.fraction_read:.0%}", ratio,
            ])  # fmt: skip
    head = ("case", "who", "median us", "20 % to 80 %", "n", "host us", "TFLOP/s", "GB/s", "of product", "of read",
            "time / ours")  # fmt: skip
    gates = {row.gate for run in report.runs.values() for row in run if row.gate}
    gate_rows = [[row.case, row.who, row.gate or "not said"] for run in report.runs.values() for row in run]
    return Section(
        "Every number",
        [f"{len(rows)} rows. `of product` and `of read` are shares of the rates measured in the same process."],
        tables=[
            Table("the rows", head, rows, left=(0, 1), is_folded=True),
            Table(f"what the gate said ({len(gates)} sentences)", ("case", "who", "gate"), gate_rows, (0, 1, 2), True),
        ],
    )


def _us(value: float) -> str:
    return f"{value:,.1f}" if value < 1e4 else f"{value:,.0f}"


def _footer(report: Report) -> list[str]:
    """Machines, versions and commits behind the rows."""
    found: dict[str, int] = {}
    for run in report.runs.values():
        for row in run:
            env = row.environment
            packages = ", ".join(f"{name} {version}" for name, version in (env.get("packages") or {}).items())
            sha = str(env.get("git_sha") or "unknown")[:10] + (" with changes" if env.get("git_dirty") else "")
            threads = f", {env['threads']} threads" if env.get("threads") and env.get("arch") == "cpu" else ""
            text = (
                f"{env.get('device')} ({env.get('arch')}{threads}), torch {env.get('torch')}, {packages}, commit {sha}"
            )
            found[text] = found.get(text, 0) + 1
    lines = [f"{count} rows: {text}." for text, count in list(found.items())[:8]]
    if len(found) > 8:
        lines.append(f"{sum(list(found.values())[8:])} rows from {len(found) - 8} more states of the tree.")
    return [*lines, f"Made by `openmla report {report.source}`."]
