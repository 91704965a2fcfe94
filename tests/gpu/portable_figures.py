"""The figures that have a bar, in one run on one GPU: `portable.py figures`, about a minute on an H100.

First every kernel of Triton's is called once, each in a process of its own, side by side: Triton compiles for seconds, and
leaves what it compiled on disk. Then one process times, and nothing else runs. What is closest to its bar comes first, and
rows are written as they come, so that a run that is cut off keeps what it has.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from portable_mods import CUTE_MODS, decode_arguments
from portable_times import judged, planned, time_first_call, time_mods

from openmla.core.target import Target
from openmla.lab import peers, runner, sparse, store, suite, workload
from openmla.lab.peers import Refusal

Row = dict[str, Any]
REHEARSED_S = 30.0  # what is not compiled by then is compiled where it is timed
MODS_S = 15.0
SECONDS = 0.5  # per contender and case of the suite

_SPARSE, _MANY = "sparse_prefill-*", "decode-b128-sq1-hq128-sk4096-*"
_LONG, _SHORT = "decode-b128-sq1-hq16-sk16384-*", "decode-b128-sq1-hq16-sk4096-*"


def parts() -> list[Callable[[], None]]:
    """What runs in a process of its own, by number: the rehearsals, and last what a hanging kernel must not take along."""
    cases = [each for pattern in (_SPARSE, _MANY, _LONG, _SHORT) for each in suite.load("portable").matching(pattern)]
    pairs = [
        (each, who) for each in cases for who in ("triton", "triton_usual") if each.op == "decode" or who == "triton"
    ]
    calls = [partial(call_once, case, who) for case, who in pairs]
    return [*calls, partial(time_first_call, "cuda"), print_mods]


def call_once(case: suite.Case, who: str) -> None:
    """One call of one contender, which compiles."""
    device, target = torch.device("cuda"), Target.detect("cuda")
    source: Any = sparse if case.op in sparse.OPS else peers
    sets = [sparse.inputs(case, device) if source is sparse else workload.decode_inputs(case, device)]
    find = source.backend if who == "triton" else source.peer
    ready = find(case, sets, target, who)
    if isinstance(ready, Refusal):
        print(f"{who} does not take part: {ready.reason}", file=sys.stderr)
        return
    ready.call(0)
    torch.cuda.synchronize()


def print_mods() -> None:
    """Soft cap and window beside the plain kernel, and the soft cap against the oracle: within its polynomial, and beyond."""
    given = CUTE_MODS["soft_cap"]
    for s_q in (1, 2):
        worst = {}
        arguments = decode_arguments(128, 1500, 3, "cuda", s_q) | {"backend": "cute"}
        arguments["cache_seqlens"][1:] = torch.tensor([0, 133])
        for scale in (576**-0.5, 1.0):
            out, lse = planned(arguments, mods=given, softmax_scale=scale)()
            worst[f"{scale:.3f}"] = judged(arguments, out, lse, given, softmax_scale=scale)
        found = time_mods(128, s_q, 4096, 128, "cuda", "cute", ("soft_cap", "window"), rounds=60)
        print(json.dumps({"item": "cute decode with mods", **found, "worst_by_scale": worst}), flush=True)


def run_apart(own: list[str], numbers: Iterable[int], seconds: float) -> list[str]:
    """What those parts print, side by side; who is not done by then is ended, and its lines count all the same."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in numbers]
        running = [
            subprocess.Popen([*own, str(number)], env=environment, stdout=log)
            for number, log in zip(numbers, logs, strict=True)
        ]
        deadline = time.monotonic() + seconds
        for number, each in zip(numbers, running, strict=True):
            try:
                each.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                print(f"  part {number} is not done after {seconds} s", flush=True)
                each.kill()
                each.wait()
        for log in logs:
            log.seek(0)
        return [line for log in logs for line in log]


def of_suite(pattern: str) -> Iterator[Row]:
    """Rows of the suite's cases: ours, and the peers'."""
    given = suite.load("portable")
    options = runner.Options(("triton",), None, SECONDS)
    for result in runner.run(given, given.matching(pattern), options, Target.detect("cuda")):
        for row in result.rows:
            yield asdict(row)
        for each in (*result.wrong, *result.refusals):
            print(f"  {result.case.name}: {each.who} has no figure: {each.reason}", flush=True)
        assert not result.wrong, "a wrong result"


def of_mods(own: list[str]) -> Iterator[Row]:
    for line in run_apart(own, [len(parts()) - 1], MODS_S):
        if line.startswith("{"):
            yield json.loads(line)


def steps(own: list[str]) -> tuple[tuple[str, Callable[[], Iterator[Row]]], ...]:
    return (
        ("sparse prefill", lambda: of_suite(_SPARSE)),
        ("mods in the CuTe kernel", lambda: of_mods(own)),
        ("128 heads, 4k", lambda: of_suite(_MANY)),
        ("16 heads, 16k", lambda: of_suite(_LONG)),
        ("a mod nobody has seen", lambda: iter([{"item": "first call", **time_first_call("cuda")}])),
        ("16 heads, 4k", lambda: of_suite(_SHORT)),
    )


def figures(out: Path | None, *, own: list[str], where: dict[str, str]) -> int:
    """Rehearse, measure, and say of each bar whether it holds; 0 when all do.

    out: rows of `times` go there, those of the suite beside it, to NAME.suite.jsonl.
    own: the command that runs one of `parts`, whose number is put behind it.
    where: what goes into each row of `times`.
    """
    begin, rows = time.monotonic(), list[Row]()
    run_apart(own, range(len(parts()) - 1), REHEARSED_S)
    print(f"{time.monotonic() - begin:5.1f} s  every kernel compiled", flush=True)
    for name, step in steps(own):
        try:
            for row in step():
                rows.append(row)
                write(row, out, where)
        except Exception as error:  # what one step raises must not cost the others
            print(f"  {name}: {type(error).__name__}: {error}"[:600], flush=True)
        print(f"{time.monotonic() - begin:5.1f} s  {name}", flush=True)
    return say_bars(rows)


def write(row: Row, out: Path | None, where: dict[str, str]) -> None:
    if "item" in row:
        row = {"section": "times", **where, "passed": True, **row}
    print("  ", json.dumps({name: value for name, value in row.items() if name not in ("environment", "ceilings")}))
    if out is None:
        return
    if "item" not in row:
        store.append(out.with_suffix(".suite.jsonl"), [store.Row(**row)])
        return
    with out.open("a") as file:
        file.write(json.dumps(row) + "\n")


def say_bars(rows: list[Row]) -> int:
    status = 0
    for name, value, bar, is_least in BARS:
        found = next((value(row) for row in rows if value(row) is not None), None)
        holds = found is not None and (found >= bar if is_least else found <= bar)
        sign = ">=" if is_least else "<="
        said = "not measured" if found is None else f"{found:.4g}"
        print(f"{'holds ' if holds else 'MISSED'} {name}: {said}, bar {sign} {bar}", flush=True)
        status |= not holds
    return status


def case(pattern: str, value: Callable[[Row], float | None]) -> Callable[[Row], float | None]:
    """That value of our row of that case; None of other rows."""
    return lambda row: value(row) if row.get("who") == "triton" and row["case"].startswith(pattern[:-1]) else None


def mods_at(s_q: int, value: str) -> Callable[[Row], float | None]:
    return lambda row: row[value] if row.get("item") == "cute decode with mods" and row["s_q"] == s_q else None


# (what, its value of a row that is about it, the bar, whether at least or at most), on one H100.
BARS: tuple[tuple[str, Callable[[Row], float | None], float, bool], ...] = (
    ("Triton dense decode, 128 heads, 4k: TFLOPS", case(_MANY, lambda row: row["tflops"]), 350.0, True),
    ("Triton dense decode, 16 heads, 16k: of the read bandwidth", case(_LONG, lambda row: row["fraction_read"]), 0.85, True),
    ("Triton sparse prefill over FlashMLA's", case(_SPARSE, lambda row: row["ratio"].get("flash_mla")), 0.6, True),
    ("soft cap in the CuTe kernel over plain, one token", mods_at(1, "soft_cap_over"), 0.03, False),
    ("soft cap in the CuTe kernel over plain, two tokens", mods_at(2, "soft_cap_over"), 0.03, False),
    ("window of half the keys as a mod over plain", mods_at(1, "window_over"), 0.03, False),
    ("first call of a mod nobody has seen: s", lambda row: row.get("first_s"), 10.0, False),
)  # fmt: skip
