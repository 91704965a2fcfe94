"""Report: what the rows of a file say, as text and as a page; two files side by side.

Of a case only the newest run is shown (`openmla.lab.bars.newest`): its contenders were timed in turn, so their ratios
mean something. Nothing here measures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from openmla.core.errors import ConfigError
from openmla.lab import bars, store, suite
from openmla.lab.store import Row
from openmla.lab.suite import Case

# A change is one when it is above the noise of any machine that was looked at and the bands do not touch.
CHANGE = 0.03


@dataclass(frozen=True)
class Change:
    """One contender of one case in two files."""

    case: str
    who: str
    before: Row
    after: Row

    @property
    def speedup(self) -> float:
        """Above 1: faster than before."""
        return self.before.median_us / self.after.median_us

    @property
    def verdict(self) -> str:
        """One of faster, slower, same: beyond 3 % and outside both bands of 20 to 80 % counts as a change."""
        first, second = (self.after, self.before) if self.speedup >= 1 else (self.before, self.after)
        is_apart = (first.p80_us or first.median_us) < (second.p20_us or second.median_us)
        if abs(self.speedup - 1) <= CHANGE or not is_apart:
            return "same"
        return "faster" if self.speedup > 1 else "slower"


@dataclass(frozen=True)
class Report:
    """What stands in a file of rows. `runs`: case name -> rows of its newest run."""

    source: str
    runs: dict[str, list[Row]]
    hidden: int  # rows of older runs
    judgements: tuple[bars.Judgement, ...]
    changes: tuple[Change, ...] = ()
    before: str = ""

    @property
    def speedups(self) -> dict[str, list[tuple[str, float]]]:
        """Peer -> (case, its time over ours)."""
        found: dict[str, list[tuple[str, float]]] = {}
        for case, run in self.runs.items():
            own = bars.ours(run)
            for row in run if own else ():
                if own and row.kind == "peer":
                    found.setdefault(row.who, []).append((case, row.median_us / own.median_us))
        return found

    @property
    def devices(self) -> list[str]:
        """Machines in the rows."""
        return list(dict.fromkeys(str(row.environment.get("device", "?")) for run in self.runs.values() for row in run))

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "schema": 1,
            "source": self.source,
            "devices": self.devices,
            "cases": {
                case: {row.who: {"median_us": row.median_us, "tflops": row.tflops, "gbps": row.gbps} for row in run}
                for case, run in self.runs.items()
            },
            "speedups": {
                who: {"geomean": geomean(value for _, value in pairs), "cases": dict(pairs)}
                for who, pairs in self.speedups.items()
            },
            "bars": [each.as_dict() for each in self.judgements],
            "against": self.before or None,
            "changes": [
                {"case": each.case, "who": each.who, "speedup": each.speedup, "verdict": each.verdict}
                for each in self.changes
            ],
        }

    def __str__(self) -> str:
        lines = [f"{self.source}: {len(self.runs)} cases on {', '.join(self.devices)}"]
        for who, pairs in self.speedups.items():
            values = [value for _, value in pairs]
            lines.append(
                f"  against {who:<10} {geomean(values):.2f}x geometric mean of {len(values)} cases, "
                f"{min(values):.2f}x to {max(values):.2f}x"
            )
        if self.judgements:
            lines.append(bars.table_text(self.judgements))
        if self.before:
            lines.append(f"against {self.before}: {len(self.changes)} contenders of the same cases in both")
            kinds = ("faster", "slower", "same")
            counts = {kind: sum(each.verdict == kind for each in self.changes) for kind in kinds}
            lines.append("  " + ", ".join(f"{count} {kind}" for kind, count in counts.items()))
            lines += [
                f"  {each.verdict:<7} {each.speedup:5.2f}x  {each.who:<10} {each.case}"
                for each in sorted(self.changes, key=lambda each: each.speedup)
                if each.verdict != "same"
            ]
        return "\n".join(lines)


def geomean(values: Iterable[float]) -> float:
    """Geometric mean of positive numbers."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def build(rows: Sequence[Row], source: str, against: Sequence[Row] | None = None, before: str = "") -> Report:
    """What `rows` say, and how they differ from `against`. Raises ConfigError when there is nothing of ours in them."""
    runs = bars.newest(rows)
    if not runs:
        raise ConfigError(f"{source} holds no row of ours ({len(rows)} rows); run openmla bench --out {source}")
    older = bars.newest(against) if against is not None else {}
    changes = [
        Change(case, row.who, earlier, row)
        for case, run in runs.items()
        for row in run
        for earlier in older.get(case, [])
        if (earlier.who, earlier.kind) == (row.who, row.kind)
    ]
    if against is not None and not changes:
        raise ConfigError(f"{source} and {before} have no case in common that the same contender ran")
    hidden = len(rows) - sum(map(len, runs.values()))
    return Report(source, runs, hidden, _judgements(rows), tuple(changes), before)


def _judgements(rows: Sequence[Row]) -> tuple[bars.Judgement, ...]:
    """Bars of every suite that the rows belong to and that is known here, where a cell was measured."""
    found: list[bars.Judgement] = []
    for name in dict.fromkeys(row.suite for row in rows):
        if name not in suite.available():
            continue
        known = suite.load(name)
        judged = bars.judge(known.bars, [case.name for case in known.cases], [row for row in rows if row.suite == name])
        found += judged if any(each.measured for each in judged) else []
    return tuple(found)


def read(paths: Sequence[Path], against: Path | None = None) -> Report:
    """The report of some files of rows, compared with another when given."""
    older = None if against is None else store.read(against)
    rows = [row for path in paths for row in store.read(path)]
    return build(rows, ", ".join(path.name for path in paths), older, against.name if against else "")


# labels


def label(case: Case) -> str:
    """A case in a few words: `128 x 16k, 16 heads, varlen`."""
    from openmla.lab.plot import tokens

    words = [f"{case.batch} x {tokens(case.s_k)}", f"{case.h_q} heads"]
    words += [f"s_q {case.s_q}"] if case.s_q > 1 else []
    words += [f"{case.h_kv} KV heads"] if case.h_kv > 1 else []
    words += [f"{case.d_qk}/{case.d_v}"] if (case.d_qk, case.d_v) not in ((576, 512), (512, 512)) else []
    words += [case.dtype] if case.dtype != "bf16" else []
    words += [case.layout] if case.layout != "plain" else []
    words += [f"pages of {case.page_size}"] if case.page_size != 64 else []
    words += [word for word, shown in (("varlen", case.lengths == "varlen"), ("causal", case.is_causal)) if shown]
    words += ["invariant"] if case.policy == "batch_invariant" else []
    words += ["warm"] if case.cache == "warm" else []
    return ", ".join(words)


def line_of(case: Case) -> str:
    """The name of the line that a case is a point of: what differs inside one figure."""
    return f"batch {case.batch}" + (", varlen" if case.lengths == "varlen" else "")


def figure_of(case: Case) -> Case:
    """The figure that a case belongs to: the case without length, batch and kind of lengths."""
    return replace(case, s_k=1, batch=1, lengths="fixed", seed=0, peers=())


def figure_name(case: Case) -> str:
    """The heading of that figure."""
    return label(case).split(", ", 1)[1]
