"""What guards and metrics cost on the host: `python tests/reliability/costs.py [--out bench/results/reliability.jsonl]`.

The compiled functions of Hopper's decode kernels are replaced by some that do nothing, so that only the path to them is timed,
on any machine: a dense decode with a plan and `out=`, as a server calls it. Variants take turns: 25 of 2,000 calls.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import openmla
from openmla.backends.base import Verdict
from openmla.backends.cute import bundle
from openmla.core import counters, env
from openmla.core.target import Target
from openmla.lab import store
from openmla.observe import metrics, watchdog
from openmla.observe.monitor import Collector
from openmla.ops import canary, dispatch

TURNS, CALLS = 25, 2000


def nothing(*arguments: Any) -> None:
    """In place of a compiled function."""


def stand_in() -> None:
    """Let this process take the way of a Hopper GPU up to the compiled functions, which do nothing."""
    target = Target.preset("h100_sxm")
    dispatch.Target.detect = staticmethod(lambda device: target)  # type: ignore[method-assign]
    canary.try_out = lambda *arguments: ""
    bundle.availability = lambda family, config: Verdict()
    bundle.serve = lambda family, config: bundle.Served(nothing, "stand-in", Path())


def timed(call: Callable[[], Any], calls: int = CALLS) -> float:
    """Microseconds per call."""
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls * 1e6


def in_turns(variants: dict[str, tuple[Callable[[], Any], Callable[[], Any], int]]) -> dict[str, list[float]]:
    """name -> (prepare, call, calls); the fastest turn, which other jobs disturb least, and the quartiles of turns."""
    found: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(TURNS):
        for name, (prepare, call, calls) in variants.items():
            prepare()
            timed(call, 50)
            found[name].append(timed(call, calls))
    return {
        name: [round(each, 3) for each in (min(times), *statistics.quantiles(times, n=4))]
        for name, times in found.items()
    }


def main() -> None:
    """Measure; print; append a row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = torch.arange(128 * 64, dtype=torch.int32).reshape(128, 64) % 64
    q = torch.zeros(128, 1, 16, 576, dtype=torch.bfloat16)
    kv = torch.zeros(64, 64, 1, 576, dtype=torch.bfloat16)
    lengths = torch.full((128,), 4096, dtype=torch.int32)
    given: dict[str, Any] = {"q": q, "kv_cache": kv, "block_table": table, "cache_seqlens": lengths}
    out = torch.zeros(128, 1, 16, 512, dtype=torch.bfloat16)

    cold = []
    for _ in range(200):
        dispatch.forget()
        begin = time.perf_counter()
        openmla.workspace_bytes(**given)
        cold.append((time.perf_counter() - begin) * 1e6)
    machine = store.environment(Target.detect("cpu"))
    stand_in()
    dispatch.forget()
    made = openmla.plan(**given, backend="cute")
    key(given, made, out)

    def call() -> None:
        openmla.decode(**given, plan=made, out=out, backend="cute")

    def call_made() -> None:
        openmla.decode(**given, plan=made, backend="cute")

    def call_usual() -> None:
        made.repeats.clear()
        openmla.decode(**given, plan=made, out=out, backend="cute")

    def call_alone() -> None:
        openmla.decode(**given, out=out, backend="cute")

    def mode(name: str) -> Callable[[], None]:
        def prepare() -> None:
            metrics.stop()
            watchdog.stop()
            os.environ[env.CHECKS.name] = name

        return prepare

    def sampled() -> None:
        mode("fast")()
        metrics.sample(1000)

    def watched() -> None:
        mode("fast")()
        watchdog.start(10)

    quick = {name: (mode(name), call, CALLS) for name in ("off", "fast")}
    ways = {
        "fast, out made": (mode("fast"), call_made, CALLS),
        "fast, first call of a plan": (mode("fast"), call_usual, 400),
        "fast, without a plan": (mode("fast"), call_alone, 400),
    }
    slow = {name: (mode(name), call, 200) for name in ("device", "strict")}
    with_metrics = {"fast, sampled": (sampled, call, CALLS), "fast, watchdog": (watched, call, CALLS)}
    tally = counters.tally("decode", "torch", "cost", 1)
    parts = {
        "one counter": (mode("fast"), tally.count, 100_000),
        "the fast check of one call": (mode("fast"), lambda: key(given, made, out), CALLS),
        "a scrape": (mode("fast"), lambda: list(Collector().collect()), 100),
    }
    us = in_turns({**quick, **ways, **slow, **with_metrics, **parts})
    os.environ[env.CHECKS.name] = "fast"
    row = {
        "kind": "host_cost", "utc": store.now(), "environment": machine,
        "path": "of a Hopper kernel whose compiled functions do nothing",
        "unit": "us per call: the fastest turn, then the quartiles of turns", "us": us, "first_call_us": [round(each, 1) for each in statistics.quantiles(cold, n=4)],
    }  # fmt: skip
    print(json.dumps({key: value for key, value in row.items() if key != "environment"}, indent=1))
    if options.out:
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def key(given: dict[str, Any], made: Any, out: torch.Tensor) -> None:
    """What `fast` looks at in every call: the signature of every tensor, the plan's, and the overlap of `out`."""
    from openmla.ops import native

    prepared = native._prepare_decode(
        given["q"], given["kv_cache"], given["block_table"], given["cache_seqlens"], 512, None, False, None, None, None,
        None, None, None, "cute", "balanced", out,
    )  # fmt: skip
    made.check(prepared)
    dispatch.check_overlap(
        prepared, out, (given["q"], given["kv_cache"], given["block_table"], given["cache_seqlens"], None, None)
    )


if __name__ == "__main__":
    main()
