"""What the guards inside the dense decode kernels cost: the same kernel with and without them, in turn, in one process.

    python tests/gpu/guard_cost.py build DIR      # needs the DSL, no GPU: DIR/with/*.so and DIR/without/*.so
    python tests/gpu/guard_cost.py time DIR       # on an H100; prints a JSON line per case

A guard compares a page id with the number of pages, and a length with the capacity of the block table, and sets a bit of
the fault word where it does not hold. `build` removes exactly those lines from a copy of the sources.
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
from openmla.backends.cute import decode
from openmla.backends.cute.toolchain import link_bundle
from openmla.core.layout import kv_layout
from openmla.core.problem import DecodeProblem
from openmla.core.target import Target
out = Path(sys.argv[1])
for h_q, kernel, build in ((128, decode.MANY_ROWS, decode.build_many_rows), (16, decode.FEW_ROWS, decode.build_few_rows)):
    problem = DecodeProblem(64, 1, 64, h_q, 1, 576, 512, torch.bfloat16, kv_layout("bf16_576"), 64, 4096, 64)
    config = kernel.configs(problem, Target.preset("h100_sxm"))[0]
    link_bundle([build(config, out).object_path], out / f"{config.name}.so")
"""


def build(out: Path) -> None:
    """Compile both forms of both kernels."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "src"
        shutil.copytree(ROOT / "src", copy)
        for name, changes in GUARDS.items():
            kernel = copy / "openmla" / "backends" / "cute" / name / "kernel.py"
            text = kernel.read_text()
            for guard, instead in changes:
                text, found = re.subn(guard, instead, text)
                assert found, f"{name}: the guard has changed; write it anew here:\n{guard}"
            kernel.write_text(text)
        for form, source in (("with", ROOT / "src"), ("without", copy)):
            target = out / form
            target.mkdir(parents=True, exist_ok=True)
            environment = {**os.environ, "PYTHONPATH": str(source), "CUTE_DSL_ARCH": "sm_90a"}
            subprocess.run([sys.executable, "-c", COMPILE, str(target)], env=environment, check=True)


def measure(folder: Path) -> None:
    """Replay a graph of 20 launches of each form in turn; medians of 300 turns each."""
    import torch
    import tvm_ffi
    from reliability_sections import decode_arguments

    import openmla
    from openmla.ops import dispatch

    def graph_of(call: Any) -> Any:
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(20):
                call()
        return graph

    def turn(graph: Any) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 20 * 1e3

    for h_q, batch, tokens in ((16, 64, 4096), (16, 1, 4096), (128, 64, 4096), (128, 4, 4096)):
        given = decode_arguments(batch=batch, h_q=h_q, tokens=tokens)
        made = openmla.plan(**given)
        out = torch.empty(batch, 1, h_q, 512, device="cuda", dtype=torch.bfloat16)
        call = lambda given=given, made=made, out=out: openmla.decode(**given, plan=made, out=out)  # noqa: E731
        call()
        prepared = next(each for each in dispatch._prepared.values() if each.problem == made.problem)
        if not (folder / "with" / f"{prepared.config.name}.so").exists():
            print(json.dumps({"h_q": h_q, "batch": batch, "kernel": prepared.config.name, "skipped": "not built"}))
            continue
        graphs, results = {}, {}
        for form in ("with", "without"):
            (path,) = (folder / form).glob(f"{prepared.config.name}.so")
            object.__setattr__(prepared.compiled, "decode", tvm_ffi.load_module(str(path))[prepared.config.name])
            graphs[form] = graph_of(call)
            results[form] = out.clone()
        assert torch.equal(results["with"], results["without"])
        times: dict[str, list[float]] = {"with": [], "without": []}
        for form in ("with", "without", "without", "with") * 150:  # so that a drift of the clock favours nobody
            times[form].append(turn(graphs[form]))
        us = {form: round(statistics.median(each), 3) for form, each in times.items()}
        ratio = [a / b for a, b in zip(times["with"], times["without"], strict=True)]
        quarters = statistics.quantiles(ratio, n=4)
        print(json.dumps({"h_q": h_q, "batch": batch, "tokens": tokens, "kernel": prepared.config.name, "us": us,
                          "cost_percent": round(100 * (statistics.median(ratio) - 1), 3),
                          "quartiles_percent": [round(100 * (q - 1), 3) for q in quarters]}), flush=True)  # fmt: skip


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    (build if sys.argv[1] == "build" else measure)(Path(sys.argv[2]))
