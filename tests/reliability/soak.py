"""Soak: random calls for a while, one injected fault per second; nothing may drift, leak or go unexplained.

    python tests/reliability/soak.py [--seconds 30] [--device cpu|cuda] [--record FILE]

Judged: a fixed call keeps its bits; RSS, threads, file descriptors, signatures and compiled kernels are flat after the
warm-up; the p99 of the last third is at most 1.25 times the first third's (on a busy machine: reported, not judged);
counters add up to the calls; log lines per distinct event at most one a minute; no incident that was not injected.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

import openmla
from openmla.core import counters, faults, incidents
from openmla.observe import metrics
from openmla.ops import dispatch, observers

MAX_RSS_SLOPE = 1.0  # MiB per minute, after the warm-up


class Lines(logging.Handler):
    """Counts log lines."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1


def arguments(pick: random.Random, device: str) -> dict[str, Any]:
    """One of the calls that take part."""
    batch, pages = pick.choice((1, 2, 3, 5)), pick.choice((1, 2, 4))
    dtype = pick.choice((torch.bfloat16, torch.float16))
    generator = torch.Generator().manual_seed(pick.randrange(2**31))
    found = {
        "q": torch.randn(batch, pick.choice((1, 2)), pick.choice((4, 16)), 64, generator=generator).to(dtype),
        "kv_cache": torch.randn(batch * pages, 16, 1, 64, generator=generator).to(dtype),
        "block_table": torch.randperm(batch * pages, generator=generator).to(torch.int32).reshape(batch, pages),
        "cache_seqlens": torch.randint(0, 16 * pages + 1, (batch,), generator=generator, dtype=torch.int32),
    }
    options = {"d_v": 32, "is_causal": pick.random() < 0.5, "policy": pick.choice(("balanced", "batch_invariant"))}
    return {name: tensor.to(device) for name, tensor in found.items()} | options


def rss_mib() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


def slope(samples: list[tuple[float, float]]) -> float:
    """MiB per minute of a straight line through (seconds, MiB)."""
    n = len(samples)
    if n < 3:
        return 0.0
    mean_t, mean_m = sum(t for t, _ in samples) / n, sum(m for _, m in samples) / n
    over = sum((t - mean_t) ** 2 for t, _ in samples)
    return 60 * sum((t - mean_t) * (m - mean_m) for t, m in samples) / over


class Times:
    """How long calls took, in 1 % steps: a list of them would be the growth of memory that is looked for (32 bytes a call)."""

    STEP, SHORTEST = math.log(1.01), 1e-6

    def __init__(self) -> None:
        self.counts = [0] * 2000  # 1 us to 400 s

    def add(self, seconds: float) -> None:
        """One call."""
        self.counts[min(int(max(math.log(seconds / self.SHORTEST), 0.0) / self.STEP), 1999)] += 1

    def p99_ms(self) -> float:
        """What 99 of 100 stay below."""
        left = sum(self.counts) * 0.99
        for number, count in enumerate(self.counts):
            left -= count
            if left <= 0:
                return self.SHORTEST * math.exp((number + 1) * self.STEP) * 1e3
        return 0.0


class Fault:
    """What is injected, one per second: values that are masked, an observer that raises, a call that is refused."""

    def __init__(self) -> None:
        self.injected = 0
        self.wants = lambda: True

    def inject(self, pick: random.Random, given: dict[str, Any]) -> None:
        kind = self.injected % 4
        self.injected += 1
        spoiled = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        if kind == 0:
            spoiled["block_table"][0, 0] = pick.choice((-1, 2**31 - 1, 10**6))
            openmla.decode(**spoiled)
        elif kind == 1:
            spoiled["cache_seqlens"][0] = pick.choice((-1, 10**6))
            openmla.decode(**spoiled)
        elif kind == 2:
            observers.add(self)
            openmla.decode(**given)
            observers.remove(self)
        else:
            try:
                openmla.decode(**{**given, "block_table": given["block_table"][:0]})
            except openmla.core.errors.ProblemError:
                return
            raise AssertionError("a call with a missing row was accepted")

    def before(self, *_: Any) -> None:
        raise RuntimeError("injected")

    def after(self, *_: Any) -> None:
        raise RuntimeError("injected")


def facts() -> dict[str, int]:
    """What must not grow."""
    return {
        "threads": threading.active_count(),
        "fds": len(os.listdir("/proc/self/fd")),
        "signatures": dispatch.remembered(),
        "tallies": len(counters.tallies()),
    }


def soak(seconds: float, device: str, seed: int = 0) -> dict[str, Any]:
    """Run; returns what was measured and a list of what was wrong."""
    pick, lines, fault = random.Random(seed), Lines(), Fault()
    logging.getLogger("openmla").addHandler(lines)
    calls_made = [arguments(pick, device) for _ in range(200)]
    fixed = arguments(random.Random(1), device)
    first = openmla.decode(**fixed)
    for each in calls_made:
        openmla.decode(**each)
    incidents.reset()
    counters.reset()
    for _ in range(4):
        fault.inject(pick, calls_made[0])
    flat, begin, warm = facts(), time.monotonic(), min(10.0, seconds / 4)
    samples: list[tuple[float, float]] = []
    times = [Times(), Times(), Times()]
    calls, ran, next_second = 0, 0, 1.0
    while (spent := time.monotonic() - begin) < seconds:
        at = time.perf_counter()
        openmla.decode(**pick.choice(calls_made))
        times[min(int(3 * spent / seconds), 2)].add(time.perf_counter() - at)
        calls += 1
        if calls % 500 == 0:
            again = openmla.decode(**fixed)
            ran += 1
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), (
                f"bits changed after {calls} calls"
            )
        if spent > next_second:
            next_second += 1
            fault.inject(pick, pick.choice(calls_made))
            if spent > warm:
                samples.append((spent, rss_mib()))
    openmla.check_errors()
    faults.findings()
    wrong = [f"{name} went from {flat[name]} to {now}" for name, now in facts().items() if now > flat[name] + 1]
    counted = sum(value for f in metrics.snapshot() if f.name == "openmla_calls" for _, value in f.samples)
    expected = calls + ran + fault.injected - fault.injected // 4
    if counted != expected:
        wrong.append(f"counters say {counted:.0f} calls, {expected} were made")
    unexpected = {f"{k} {s}": n for (k, s), n in incidents.counts().items() if k not in ("bad_value", "monitor_failed")}
    if unexpected:
        wrong.append(f"incidents that were not injected: {unexpected}")
    if lines.count > 12 * (1 + seconds / 60):
        wrong.append(f"{lines.count} log lines")
    found = slope(samples)
    if found > MAX_RSS_SLOPE and seconds >= 60:
        wrong.append(f"RSS grew by {found:.2f} MiB a minute")
    return {
        "seconds": round(time.monotonic() - begin, 1), "calls": calls, "injected": fault.injected,
        "rss_slope_mib_per_minute": round(found, 3), "rss_mib": round(rss_mib(), 1),
        "p99_ms_by_third": [round(each.p99_ms(), 3) for each in times], "log_lines": lines.count, "facts": facts(), "wrong": wrong,
        "device": device, "threads_of_torch": torch.get_num_threads(),
    }  # fmt: skip


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--record", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("openmla").propagate = False
    found = soak(options.seconds, options.device)
    if options.record:
        outcome = {"failed" if found["wrong"] else "passed": 1}
        options.record.write_text(
            json.dumps({"outcomes": outcome, "cases": found["calls"], "measured": found}, indent=1)
        )
    print(json.dumps(found, indent=1))
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
