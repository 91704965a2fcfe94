"""A report as Markdown tables, and pages that hold them: a table in a page is written by rows, never by hand.

A page marks the place, and `openmla report FILE --into PAGE.md` fills it:

    <!-- rows: decode_dense_suite.jsonl, times -->
    ...
    <!-- end of rows -->

What can stand behind the file's name is in `TABLES`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from openmla.core.errors import ConfigError
from openmla.lab import bars, clock, plot, suite
from openmla.lab.report import Report, figure_name, figure_of, geomean, line_of
from openmla.lab.store import Row
from openmla.lab.suite import Case

_PLACE = re.compile(r"<!-- rows: (?P<file>[\w.-]+), (?P<table>\w+) -->\n(?P<held>.*?)<!-- end of rows -->", re.DOTALL)


def summary(report: Report) -> str:
    """One line per kind of case (heads, tokens, ...): cases, geometric mean and range of the ratio to the faster peer."""
    lines = _head(("against the faster peer", "cases", "geometric mean", "lowest", "highest"), left=1)
    for group, cases in _groups(report).items():
        found = [_ratio(report.runs[case.name]) for case in cases]
        values = [each for each in found if each is not None]
        if values:
            cells = (group, str(len(values)), *map(bars.ratio, (geomean(values), min(values), max(values))))
            lines.append(_line(cells))
    return "\n".join([*lines, "", _source(report)])


def times(report: Report) -> str:
    """Microseconds of every case and the faster peer's time over ours; a row per batch, a column per length."""
    groups = _groups(report)
    lengths = sorted({case.s_k for cases in groups.values() for case in cases})
    lines = _head(("us, and the faster peer's time over it", *(plot.tokens(each) for each in lengths)), left=1)
    for group, cases in groups.items():
        rows: dict[str, dict[int, Case]] = {}
        for case in sorted(cases, key=lambda case: (-case.batch, case.lengths)):
            rows.setdefault(line_of(case), {})[case.s_k] = case
        for name, found in rows.items():
            lines.append(_line((f"{group}: {name}", *(_cell(report, found.get(each)) for each in lengths))))
    return "\n".join([*lines, "", _source(report)])


def verdicts(report: Report) -> str:
    """Every bar of the suite: verdict, worst cell or mean, what is wanted, how many cells hold it."""
    lines = _head(("bar", "", "worst cell or mean", "wanted", "cells that hold it"), left=2)
    for each in report.judgements:
        bar = each.bar
        wanted = f"{'at least' if bar.is_floor else 'at most'} {bars.text(bar.limit, bar.value)}"
        # A geometric mean is one promise; of the others each cell is one.
        held = f"{len(each.measured) - len(each.short)} of {len(each.cells)}" if bar.over == "each" else ""
        verdict = f"**{each.verdict}**" if each.verdict == "missed" else each.verdict
        lines.append(_line((bar.name, verdict, bars.text(each.value, bar.value, bar.limit), wanted, held)))
    return "\n".join([*lines, "", _source(report)])


def host(report: Report) -> str:
    """Host time of a call (Python until it returns) per contender and kernel: cases, median and highest of them."""
    found: dict[str, list[float]] = {}
    for run in report.runs.values():
        for row in run:
            if row.host_us is not None and row.kind != "ceiling":
                found.setdefault(f"{row.who}, `{row.kernel}`", []).append(row.host_us)
    lines = _head(("host time of a call, us", "cases", "median", "highest"), left=1)
    for who, values in found.items():
        values.sort()
        lines.append(_line((who, str(len(values)), f"{clock.quantile(values, 0.5):.1f}", f"{values[-1]:.1f}")))
    return "\n".join([*lines, "", _source(report)])


TABLES: dict[str, Callable[[Report], str]] = {"summary": summary, "times": times, "verdicts": verdicts, "host": host}


def fill(text: str, report: Report, page: str) -> str:
    """`text` with every place of this report's file filled. Raises ConfigError where there is none, or an unknown table."""
    places = [place for place in _PLACE.finditer(text) if place["file"] == report.source]
    unknown = sorted({place["table"] for place in places} - set(TABLES))
    if unknown:
        raise ConfigError(
            f"{page} asks for the table {unknown[0]!r} of {report.source}; use one of: {', '.join(TABLES)}"
        )
    if not places:
        raise ConfigError(f"{page} has no place for {report.source}: <!-- rows: {report.source}, times --> and its end")
    for place in reversed(places):
        body = f"{TABLES[place['table']](report)}\n"
        text = text[: place.start("held")] + body + text[place.end("held") :]
    return text


def write(report: Report, page: Path) -> None:
    """Fill the places of a page. Raises ConfigError when it cannot be read or written, or has no such place."""
    try:
        page.write_text(fill(page.read_text(encoding="utf-8"), report, page.name), encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot fill {page}: {error}; give a Markdown page with --into") from error


def places(text: str) -> list[tuple[str, str]]:
    """(file of rows, table) of every place in a page."""
    return [(place["file"], place["table"]) for place in _PLACE.finditer(text)]


def _groups(report: Report) -> dict[str, list[Case]]:
    """Cases that differ in batch and length only, under what they have in common; the most cases first."""
    found: dict[str, list[Case]] = {}
    for name in report.runs:
        case = suite.parse(name)
        if case is not None:
            found.setdefault(figure_name(figure_of(case)), []).append(case)
    return dict(sorted(found.items(), key=lambda each: -len(each[1])))


def _ratio(run: Sequence[Row]) -> float | None:
    own, peer = bars.ours(run), bars.faster_peer(run)
    return peer.median_us / own.median_us if own and peer else None


def _cell(report: Report, case: Case | None) -> str:
    if case is None:
        return ""
    run = report.runs[case.name]
    own, found = bars.ours(run), _ratio(run)
    assert own is not None  # bars.newest keeps only runs with a row of ours
    return f"{own.median_us:.1f}" + ("" if found is None else f", {bars.ratio(found)}")


def _source(report: Report) -> str:
    rows = [row for run in report.runs.values() for row in run]
    peers = {f"{row.who} {_version(row)}".strip() for row in rows if row.kind == "peer"}
    days = sorted({row.utc[:10] for row in rows})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return f"`{report.source}`: {', '.join(report.devices)}, {when}, beside {', '.join(sorted(peers)) or 'nobody'}."


_DISTRIBUTIONS = {
    "flash_mla": ("sgl-flash-mla", "flash-mla"),
    "fa3": ("fa3-fwd",),
    "flashinfer": ("flashinfer-python",),
}


def _version(row: Row) -> str:
    packages = row.environment.get("packages") or {}
    found = [f"({name} {packages[name]})" for name in _DISTRIBUTIONS.get(row.who, ()) if name in packages]
    return found[0] if found else ""


def _head(names: Sequence[str], left: int) -> list[str]:
    return [_line(names), _line(["---"] * left + ["--:"] * (len(names) - left))]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
