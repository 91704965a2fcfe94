"""What the guards inside the dense decode kernels cost: the same kernel with and without them, in turn, in one process.

    python tests/gpu/guard_cost.py build DIR      # needs the DSL, no GPU: DIR/with/*.so and DIR/without/*.so
    python tests/gpu/guard_cost.py time DIR       # on an H100; prints a JSON line per case

A guard compares a page id with the number of pages, and a length with the capacity of the block table, and sets a bit of
the fault word where it does not hold. `build` removes exactly those lines from a copy of the sources.

The same code costs up to some tenths of a percent more or less by where it lies, so each form is loaded several times, and
how far its own copies are apart is said beside the cost.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CASES = ((128, 4, 4096), (128, 64, 4096), (128, 1, 4096), (16, 1, 4096), (16, 64, 4096))  # h_q, batch, keys
COPIES, ROUNDS = 4, 200
# Patterns, and what stands there instead; every pattern must be found.
NEVER = r"\1if const_expr(False):"
GUARDS = {
    "decode_dense": (
        (r"( +)if \(page < 0\) \| \(page >= c\.num_pages\):", NEVER),
        (r"( +)if \(c\.lane == 0\) & \(\(length < 0\) \| \(length > c\.capacity\)\):", NEVER),
    ),
    "decode_dense_small": (
        (
            r"\n +elif \(pages < 0\) \| \(pages >= kv\.shape\[0\]\):\n +pages = Int32\(-1\)\n +bad = bad \| PAGE_OUT_OF_RANGE",
            "",
        ),
        (r"\n +bad = bad \| self\.bad_length\(raw, length\)", ""),
    ),
}
COMPILE = """
import sys, torch
from pathlib import Path
from openmla.backends.cute import decode, families
from openmla.backends.cute.toolchain import link_bundle
from openmla.core.layout import kv_layout
from openmla.core.problem import DecodeProblem
from openmla.core.target import Target
out = Path(sys.argv[1])
many, few = (decode.MANY_ROWS, families.build_many_rows), (decode.FEW_ROWS, families.build_few_rows)
for h_q, batch, (kernel, build) in ((128, 64, many), (128, 4, many), (16, 64, few), (128, 1, few)):
    problem = DecodeProblem(batch, 1, batch, h_q, 1, 576, 512, torch.bfloat16, kv_layout("bf16_576"), 64, 64 * batch, 64)
    config = kernel.configs(problem, Target.preset("h100_sxm"))[0]
    link_bundle([build(config, out).object_path], out / f"{config.name}.so")
"""


def build(out: Path) -> None:
    """Compile both forms of both kernels."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "src"
        shutil.copytree(ROOT / "src", copy)
        for name, changes in GUARDS.items():
            sources = sorted((copy / "openmla" / "backends" / "cute" / name).glob("*.py"))
            for guard, instead in changes:
                found = 0
                for path in sources:
                    text, count = re.subn(guard, instead, path.read_text())
                    path.write_text(text)
                    found += count
                assert found, f"{name}: the guard has changed; write it anew here:\n{guard}"
        for form, source in (("with", ROOT / "src"), ("without", copy)):
            target = out / form
            target.mkdir(parents=True, exist_ok=True)
            environment = {**os.environ, "PYTHONPATH": str(source), "CUTE_DSL_ARCH": "sm_90a"}
            subprocess.run([sys.executable, "-c", COMPILE, str(target)], env=environment, check=True)


def graph_of(call: Any) -> Any:
    """20 calls."""
    import torch

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20):
            call()
    return graph


def microseconds(graph: Any) -> float:
    """Per call of one replay."""
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 20 * 1e3


def loaded(library: Path, name: str, copies: int) -> list[Any]:
    """The function of a library, loaded so many times: each lies somewhere else in the card's memory."""
    import tvm_ffi

    found = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(copies):
            copy = Path(folder) / f"{number}.so"
            shutil.copy(library, copy)
            found.append(tvm_ffi.load_module(str(copy))[name])
    return found


def measure(folder: Path) -> None:
    """COPIES of each form in turn, ROUNDS times; a round's cost is the ratio of the means of both forms."""
    import torch
    from reliability_sections import decode_arguments

    import openmla
    from openmla.ops import dispatch

    for h_q, batch, tokens in CASES:
        given = decode_arguments(batch=batch, h_q=h_q, tokens=tokens)
        made = openmla.plan(**given)
        out = torch.empty(batch, 1, h_q, 512, device="cuda", dtype=torch.bfloat16)
        call = lambda given=given, made=made, out=out: openmla.decode(**given, plan=made, out=out)  # noqa: E731
        call()
        prepared = next(each for each in dispatch._prepared.values() if each.problem == made.problem)
        name = prepared.config.name
        if not (folder / "with" / f"{name}.so").exists():
            raise SystemExit(f"{name} is not in {folder}: build it from these sources")
        graphs, results = [], []
        for form in ("with", "without"):
            for function in loaded(folder / form / f"{name}.so", name, COPIES):
                object.__setattr__(prepared.compiled, "decode", function)
                graphs.append(graph_of(call))
                results.append(out.clone())
        assert all(torch.equal(each, results[0]) for each in results)
        rounds = []
        for number in range(ROUNDS + 5):
            order = sorted(range(2 * COPIES), key=lambda i: (i % COPIES, i), reverse=bool(number % 2))
            us = [0.0] * len(order)
            for which in order:  # neighbours are of both forms, and a drift of the clock favours nobody
                us[which] = microseconds(graphs[which])
            rounds += [us] if number >= 5 else []
        ratios = sorted(sum(us[:COPIES]) / sum(us[COPIES:]) for us in rounds)
        medians = [round(statistics.median(each), 3) for each in zip(*rounds, strict=True)]
        quarters = statistics.quantiles(ratios, n=4)
        print(json.dumps({
            "h_q": h_q, "batch": batch, "tokens": tokens, "kernel": name, "rounds": len(rounds),
            "us": {"with": medians[:COPIES], "without": medians[COPIES:]},
            "cost_percent": round(100 * (quarters[1] - 1), 3),
            "quartiles_percent": [round(100 * (each - 1), 3) for each in quarters],
            # what a median of so many rounds is uncertain by, and what nothing but another place in memory makes
            "error_percent": round(100 * 1.25 * (quarters[2] - quarters[0]) / 1.35 / len(rounds) ** 0.5, 3),
            "same_code_percent": round(max(100 * (max(each) / min(each) - 1) for each in (medians[:COPIES], medians[COPIES:])), 3),
            "device": torch.cuda.get_device_name(),
        }), flush=True)  # fmt: skip


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    (build if sys.argv[1] == "build" else measure)(Path(sys.argv[2]))
