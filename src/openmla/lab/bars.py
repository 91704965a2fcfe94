"""Bars: whether rows keep the promises of their suite, cell by cell.

A cell is one case. Its value comes from the newest run that measured it, from that run's rows alone: the peer and the
square product were timed in turn with us, so a slow minute hit all of them. A cell without a number (red gate, or no
peer that ran) keeps no promise and breaks none: it is counted as not measured, and a bar with such a cell is not met.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from openmla.core.errors import ConfigError
from openmla.core.target import Target
from openmla.lab import store
from openmla.lab.store import Row
from openmla.lab.suite import Bar

_BASE_POLICY = "-batch_invariant"


@dataclass(frozen=True)
class Cell:
    """The value of one case; None when it was not measured."""

    case: str
    value: float | None


@dataclass(frozen=True)
class Judgement:
    """One bar and its cells."""

    bar: Bar
    cells: tuple[Cell, ...]

    @property
    def measured(self) -> list[Cell]:
        """Cells that have a value."""
        return [cell for cell in self.cells if cell.value is not None]

    @property
    def short(self) -> list[Cell]:
        """Cells outside the limit, worst first; empty for a geometric mean."""
        if self.bar.over == "geomean":
            return []
        found = [cell for cell in self.cells if cell.value is not None and not self.bar.holds(cell.value)]
        return sorted(found, key=lambda cell: cell.value or 0.0, reverse=not self.bar.is_floor)

    @property
    def value(self) -> float | None:
        """The geometric mean, or the worst cell."""
        values = [cell.value for cell in self.cells if cell.value is not None]
        if not values:
            return None
        if self.bar.over == "geomean":
            return math.exp(sum(math.log(value) for value in values) / len(values))
        return min(values) if self.bar.is_floor else max(values)

    @property
    def verdict(self) -> str:
        """One of met, missed, not measured; the last while nothing is missed and a cell has no number."""
        value = self.value
        if value is not None and (not self.bar.holds(value) and (self.bar.over == "each" or not self._is_partial)):
            return "missed"
        return "not measured" if self._is_partial or value is None else "met"

    @property
    def _is_partial(self) -> bool:
        return len(self.measured) < len(self.cells)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            **asdict(self.bar),
            "verdict": self.verdict,
            "result": self.value,
            "cells": {cell.case: cell.value for cell in self.cells},
        }


def runs(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows of one case that were measured together: neighbours in the file, until the case or a contender repeats."""
    found: list[list[Row]] = []
    for row in rows:
        last = found[-1] if found else []
        is_same = bool(last) and (last[0].case, last[0].suite) == (row.case, row.suite)
        if is_same and (row.who, row.kernel) not in {(each.who, each.kernel) for each in last}:
            last.append(row)
        else:
            found.append([row])
    return found


def newest(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Case -> rows of the last run that has a row of ours, in the order in which the cases first appear."""
    found: dict[str, list[Row]] = {}
    for run in runs(rows):
        if any(row.kind == "backend" for row in run):
            found[run[0].case] = run
    return found


def resumed(path: Path | None, target: Target, say: Callable[[str], None]) -> list[Row]:
    """Rows of a file that need not be measured again: the newest run of each case, if it was on this machine and on
    this very commit, without changes. Raises ConfigError without a file.
    """
    if path is None:
        raise ConfigError("--resume continues a file; name it with --out")
    facts = store.environment(target)
    keys = ("device", "git_sha", "torch", "packages")
    found = []
    for run in newest(store.read(path)).values() if path.exists() else ():
        env = run[0].environment
        is_clean = env.get("git_dirty") is False and facts.get("git_dirty") is False
        if is_clean and all(env.get(key) == facts.get(key) for key in keys):
            found.append(run)
    say(f"{path} holds {len(found)} case(s) of this commit and machine")
    return [row for run in found for row in run]


def ours(run: Sequence[Row]) -> Row | None:
    """The fastest row of ours."""
    return min((row for row in run if row.kind == "backend"), key=lambda row: row.median_us, default=None)


def faster_peer(run: Sequence[Row]) -> Row | None:
    """The fastest attention of others; a bare product is none."""
    return min((row for row in run if row.kind == "peer"), key=lambda row: row.median_us, default=None)


def judge(bars: Sequence[Bar], cases: Sequence[str], rows: Iterable[Row]) -> list[Judgement]:
    """Every bar over its cells. `cases`: the names of all cases of the suite."""
    table = newest(rows)
    return [
        Judgement(bar, tuple(Cell(case, _value(bar.value, case, table)) for case in cases if bar.covers(case)))
        for bar in bars
    ]


def _value(kind: str, case: str, table: dict[str, list[Row]]) -> float | None:
    run = table.get(case, [])
    own = ours(run)
    if own is None:
        return None
    if kind == "median_us":
        return own.median_us
    if kind == "read":
        return own.fraction_read
    if kind == "ratio":
        peer = faster_peer(run)
        return peer.median_us / own.median_us if peer else None
    if kind == "gemm":
        product = next((row for row in run if row.who == "gemm"), None)
        return own.tflops / product.tflops if product else None
    if kind == "copy":
        return own.ratio.get("copy")
    base = ours(table.get(case.replace(_BASE_POLICY, ""), []))
    return own.median_us / base.median_us - 1 if base else None


def text(value: float | None, kind: str, limit: float | None = None) -> str:
    """A value in its unit; with one more digit where it would read as the limit that it is not."""
    if value is None:
        return ""
    shown = _text(value, kind, 0)
    is_alike = limit is not None and value != limit and shown == _text(limit, kind, 0)
    return _text(value, kind, 1) if is_alike else shown


def _text(value: float, kind: str, more: int) -> str:
    if kind == "median_us":
        return f"{value:.{1 + more}f} us"
    if kind == "ratio":
        return f"{value:.3f}x" if more else f"{ratio(value)}x"
    return f"{100 * value:.{1 + more}f} %"


def ratio(value: float) -> str:
    """A speed-up; a third digit where two would make a loss look like a draw."""
    return f"{value:.3f}" if 0.995 <= value < 1 else f"{value:.2f}"


def table_text(judgements: Sequence[Judgement]) -> str:
    """The bars as text of at most 100 columns: verdict, value, limit, cells; cells that miss stand below."""
    lines = ["bars"]
    for each in judgements:
        bar = each.bar
        limit = f"{'>=' if bar.is_floor else '<='} {text(bar.limit, bar.value)}"
        verdict = {"met": "met", "missed": "MISSED", "not measured": "not measured"}[each.verdict]
        count = f"{len(each.measured)} of {len(each.cells)}"
        lines.append(
            f"  {verdict:<12} {bar.name[:56]:<56} {text(each.value, bar.value, bar.limit):>8} {limit:>10} {count:>8}"
        )
        lines += [f"      {cell.case:<60} {text(cell.value, bar.value, bar.limit):>8}" for cell in each.short]
    return "\n".join(lines)
