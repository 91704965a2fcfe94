"""Verify: the hostile cases of `openmla.testing`, on this machine, for every kernel that it can run.

For users' own hardware: a driver, a compiler or a card that nobody tried before is judged by the same cases and the
same tolerance rule as in development. Operations and backends take turns, so that a short run has seen all of them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from openmla import backends as table
from openmla.core.errors import ConfigError, UnsupportedError
from openmla.core.target import Target
from openmla.lab import store
from openmla.testing import budget, coverage
from openmla.testing import cases as hostile

SCHEMA = 1  # of the JSON record
_MAX_FAILURES = 20  # per kernel family; a broken driver fails every case, and twenty say as much as all


@dataclass
class Failure:
    """One case outside the tolerance, with the command that runs it alone."""

    seed: int
    repro: str
    report: str


@dataclass
class Tally:
    """What happened to one (operation, backend)."""

    op: str
    backend: str
    passed: int = 0
    skipped: Counter[str] = field(default_factory=Counter)  # reason -> cases that the backend does not support
    worst: dict[str, float] = field(default_factory=dict)  # rule -> largest error / limit among the passed
    failures: list[Failure] = field(default_factory=list)


@dataclass(frozen=True)
class Record:
    """The result of a run."""

    tallies: tuple[Tally, ...]
    seconds: float
    is_cut: bool  # the time ran out before the cases did
    seed: int
    environment: dict[str, Any]

    @property
    def passed(self) -> bool:
        """True when something ran and nothing failed."""
        return any(each.passed for each in self.tallies) and not any(each.failures for each in self.tallies)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "schema": SCHEMA,
            "passed": self.passed,
            "seconds": self.seconds,
            "cut_by_time": self.is_cut,
            "first_seed": self.seed,
            "utc": store.now(),
            "environment": self.environment,
            # `asdict` would make a Counter of the pairs of a Counter
            "tallies": [{**asdict(each), "skipped": dict(each.skipped)} for each in self.tallies],
        }

    def __str__(self) -> str:
        lines = [f"{'operation':<15} {'backend':<8} {'passed':>6} {'failed':>6} {'skipped':>7}  worst error / limit"]
        for each in self.tallies:
            worst = max(each.worst.items(), key=lambda item: item[1], default=("", 0.0))
            shown = f"{worst[1]:.2f} ({worst[0]})" if each.worst else ""
            lines.append(
                f"{each.op:<15} {each.backend:<8} {each.passed:>6} {len(each.failures):>6} "
                f"{sum(each.skipped.values()):>7}  {shown}"
            )
        for each in self.tallies:
            lines += [f"{each.op}/{each.backend} skipped {n}: {why}" for why, n in each.skipped.most_common(3)]
            for failure in each.failures:
                lines += ["", f"FAILED {each.op} on {each.backend}, seed {failure.seed}", failure.report, failure.repro]
        verdict = "all cases within tolerance" if self.passed else "NOT within tolerance"
        if not any(each.passed or each.failures for each in self.tallies):
            verdict = "nothing ran"
        cut = ", stopped by the time limit" if self.is_cut else ""
        return "\n".join([*lines, "", f"{verdict}; seeds from {self.seed}, {self.seconds:.0f} s{cut}"])


def verify(
    *,
    ops: Sequence[str] | None = None,
    backends: Sequence[str] | None = None,
    cases: int = 200,
    seconds: float = 60.0,
    seed: int = 0,
    device: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Record:
    """Run up to `cases` hostile cases per operation and backend, for at most about `seconds`.

    Args:
        ops: operations; default: all.
        backends: names; default: each that runs the typical problem of the operation on this device.
        cases: seeds per operation and backend.
        seconds: no new case is begun after so long.
        seed: the first seed; the same seed is the same case everywhere.
        device: "cpu" or "cuda"; default: the GPU if there is one.
        progress: called with a line now and then.

    Raises:
        ConfigError: an unknown operation or backend.
    """
    target = Target.detect(device)
    where = torch.device("cuda" if target.is_cuda else "cpu")
    tallies = [Tally(op, name) for op in _known_ops(ops) for name in _known_backends(op, backends, target)]
    say = progress or (lambda text: None)
    begin = last = time.monotonic()
    is_cut = False
    for number in range(cases):
        for tally in tallies:
            is_cut = time.monotonic() - begin > seconds
            if is_cut:
                break
            if len(tally.failures) < _MAX_FAILURES:
                _try(tally, seed + number, where)
            if time.monotonic() - last > 2:
                last = time.monotonic()
                done = (number * len(tallies) + tallies.index(tally) + 1) / (cases * len(tallies))
                left = min((last - begin) * (1 - done) / done, seconds - (last - begin))
                failed = sum(len(each.failures) for each in tallies)
                say(
                    f"seed {seed + number}: {sum(each.passed for each in tallies)} passed, {failed} failed, {left:.0f} s left"
                )
        if is_cut:
            break
    return Record(tuple(tallies), time.monotonic() - begin, is_cut, seed, store.environment(target))


def _known_ops(ops: Sequence[str] | None) -> Sequence[str]:
    for op in ops or ():
        if op not in hostile.OPS:
            raise ConfigError(f"unknown operation {op!r}; use one of: {', '.join(hostile.OPS)}")
    return ops or hostile.OPS


def _known_backends(op: str, names: Sequence[str] | None, target: Target) -> Sequence[str]:
    for name in names or ():
        if name not in table.BACKENDS:
            raise ConfigError(f"unknown backend {name!r}; use one of: {', '.join(table.BACKENDS)}")
    if names:
        return tuple(dict.fromkeys(names))
    usable = [row.backend for row in table.explain(op, target=target, backend="auto").candidates if row.verdict]
    return tuple(dict.fromkeys(usable))


def _try(tally: Tally, seed: int, device: torch.device) -> None:
    """One case: the kernel first, so that memory which the oracle has just used cannot help it."""
    case = hostile.draw(seed, tally.op)
    operands = case.tensors()
    moved = coverage.moved(operands, device)  # with their strides and gaps, which `to` would pack
    repro = f"openmla verify --op {tally.op} --backend {tally.backend} --device {device.type} --seed {seed} --cases 1"
    try:
        results = case.run(backend=tally.backend, operands=moved)
    except UnsupportedError as error:
        mine = [why for kernel, why in error.reasons.items() if kernel.startswith(f"{tally.backend}/")]
        tally.skipped[mine[0][0] if mine and mine[0] else error.headline] += 1
        return
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError, MemoryError) as error:
        tally.failures.append(Failure(seed, repro, f"{type(error).__name__}: {error}\n  {case}"))
        return
    out, lse, max_logits = (None if x is None else x.cpu() for x in results)
    if out is None:
        tally.failures.append(Failure(seed, repro, f"returned nothing\n  {case}"))
        return
    report = budget.check(out, lse, case.golden(operands), dtype=case.dtype, max_logits=max_logits)
    if not report.passed:
        tally.failures.append(Failure(seed, repro, f"{report}\n  {case}"))
        return
    tally.passed += 1
    for finding in report.findings:
        tally.worst[finding.rule] = max(tally.worst.get(finding.rule, 0.0), finding.ratio)
