"""What `prove_decode.py` asks of the machine: time on the host, what compute-sanitizer sees, what happens in a fault.

Run as a program, it is what the sanitizer watches: python tests/gpu/decode_machine.py BACKEND [more]
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import decode_fp8
import racecheck
import torch
from decode_items import Made, NotRunError, Setup, dense
from sparse_sections import plain

import openmla
from openmla.core.errors import UnsupportedError
from openmla.core.layout import kv_layout
from openmla.ops import dispatch
from openmla.ops.append import append
from openmla.testing import coverage
from openmla.testing.cases import Case, native_arguments

HOST_US, LAYERS = 15.0, 61
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")


def host(setup: Setup) -> Made:
    """Both kernels, with and without a plan."""

    def check(h_q: int, is_planned: bool) -> Callable[[Setup], dict[str, Any]]:
        return lambda setup: _host(setup, h_q, is_planned)

    kinds = [(h_q, is_planned) for h_q in (16, 128) for is_planned in (True, False)]
    return [
        (f"h_q {h_q} {'plan given' if is_planned else 'alone'}", check(h_q, is_planned)) for h_q, is_planned in kinds
    ]


def _host(setup: Setup, h_q: int, is_planned: bool) -> dict[str, Any]:
    """Calls one behind the other, as of the layers of a model. The bar holds for a call with a plan: one serves all layers."""
    case = dense((900,) * 4, h_q, is_causal=False)
    given = native_arguments("decode", coverage.moved(case.tensors(), setup.device))
    planned = {name: value for name, value in given.items() if name != "softmax_scale"}
    plan = openmla.plan(**planned, backend=setup.backend) if is_planned else None

    def call() -> None:
        openmla.decode(**given, plan=plan, backend=setup.backend)

    layer, quiet = _layer_us(call, setup)
    found = {
        "median us of a layer's call": layer,
        "us of it in the quietest tenth": quiet,
        "median us of a call behind a wait": _waited_us(call, setup),
        "ns of a Python call of nothing": round(1e3 * _layer_us(lambda: None, setup)[0]),  # how fast this host is
    }
    if setup.backend == "cute":
        found |= _host_by_part(call, setup) if plan is None else _repeated_by_part(call, plan, setup)
    if is_planned:  # said, not judged: servers' hosts differ by a factor of three
        found |= {"bar us": HOST_US, "is within the bar": layer <= HOST_US}
    return {"measured": found}


def _repeated_by_part(call: Callable[[], Any], plan: Any, setup: Setup) -> dict[str, Any]:
    """Python without the compiled function that a call of a plan repeats, and that function."""
    if not plan.repeats:
        return {}
    (repeat,) = plan.repeats
    function, last = repeat.run, []
    repeat.run = lambda *tensors: last.append(tensors)
    call()
    repeat.run = lambda *tensors: None
    python, _ = _layer_us(call, setup)
    repeat.run = function
    compiled, _ = _layer_us(lambda: function(*last[0]), setup)
    return {"python alone, us": python, "compiled function alone, us": compiled}


def _layer_us(call: Callable[[], Any], setup: Setup) -> tuple[float, float]:
    """(median, lowest tenth) of rounds of as many calls as DeepSeek-V3 has layers, which the device's queue takes."""
    rounds = []
    for _ in range(4 if setup.is_small else 100):
        if setup.is_cuda:
            torch.cuda.synchronize()
        for _ in range(5):
            call()
        at = time.perf_counter_ns()
        for _ in range(LAYERS):
            call()
        rounds.append((time.perf_counter_ns() - at) / 1e3 / LAYERS)
    return round(statistics.median(rounds), 2), round(statistics.quantiles(rounds, n=10)[0], 2)


def _waited_us(call: Callable[[], Any], setup: Setup) -> float:
    """One call right behind a wait for the device."""
    times = []
    for _ in range(4 if setup.is_small else 200):
        if setup.is_cuda:
            torch.cuda.synchronize()
        at = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - at) / 1e3)
    return round(statistics.median(times), 2)


def _host_by_part(call: Callable[[], Any], setup: Setup) -> dict[str, Any]:
    """Python without the compiled functions, and what handing 13 tensors to a compiled function costs."""
    import tvm_ffi

    known = list(dispatch._prepared.values())
    compiled = [prepared.compiled for prepared in known]

    def nothing(*arguments: Any) -> None:
        return None

    for prepared in known:
        prepared.compiled = replace(prepared.compiled, decode=nothing, combine=nothing, schedule=nothing)
    python, _ = _layer_us(call, setup)
    for prepared, each in zip(known, compiled, strict=True):
        prepared.compiled = each
    empty = tvm_ffi.get_global_func("testing.nop")
    tensors = [torch.zeros(4, 4, device=setup.device) for _ in range(13)]
    return {
        "python alone, us": python,
        "13 tensors to a compiled function, us": _layer_us(lambda: empty(*tensors), setup)[0],
        "fast exchange of tensors": hasattr(torch.Tensor, "__dlpack_c_exchange_api__"),
    }


# ------------------------------------------------------------------------------------------- sanitizer


def smallest(setup: Setup) -> Made:
    """What the sanitizer watches: a run, no oracle; inputs come from the host, so that every byte was written."""
    few = {"topk": 130, "seqlens_k": (200,), "invalid_share": 0.1}
    problems = [
        dense((130,), 16), dense((0, 65, 1), 16, s_q=2), dense((130,), 128), dense((0, 65, 1), 128, s_q=2),
        dense((700,), 16), dense((-1, 70, 2**31 - 1), 16, invalid_share=0.3),
        replace(plain("sparse_decode", "fp8_656", 0, 64), **few), replace(plain("sparse_decode", "fp8_584", 65, 64), **few),
        replace(plain("sparse_decode", "", 0, 64), **few), replace(plain("sparse_prefill", "", 0, 64), **few),
        replace(plain("sparse_decode", "fp8_656", 0, 16), **few),
    ]  # fmt: skip
    codes = kv_layout("fp8_656")
    problems.append(replace(dense((0, 65, 1), 16), layout=codes.name, softmax_scale=codes.d_qk**-0.5))

    def check(case: Case) -> Callable[[Setup], dict[str, Any]]:
        return lambda setup: _once(setup, case)

    made = [(f"{case.op} {case.layout} h_q {case.h_q} {case.seqlens_k}", check(case)) for case in problems]
    return [*made, *((f"append {name}", partial(_write, layout=name)) for name in ("bf16_576", "fp8_656"))]


def more(setup: Setup) -> Made:
    """Beside them, not among what a record needs: rings that wrap, merges, 64 rows, lists in pieces, e4m3 queries."""
    listed = replace(plain("sparse_decode", "fp8_656", 0, 16), seqlens_q=(1,) * 64, topk=700, has_topk_length=False)
    problems = [
        replace(listed, seqlens_k=(750,)),
        dense((700,) * 40, 16),
        dense((700,) * 40, 128),
        dense((1024,) * 16, 128),  # four pieces each: a CTA keeps its own share of the merge
        dense((700, 64), 64),
        replace(plain("sparse_decode", "", 0, 64), seqlens_q=(1,) * 4),
    ]
    codes = [decode_fp8.Case("128 heads", (700, 64)), decode_fp8.Case("16 heads", (300,), h_q=16)]
    made = [(f"{case.op} {case.layout} h_q {case.h_q}", partial(_once, case=case)) for case in problems]
    return [*made, *((f"decode e4m3 {case.name}", partial(_coded, case=case)) for case in codes)]


def _coded(setup: Setup, case: decode_fp8.Case) -> dict[str, Any]:
    given = coverage.moved(decode_fp8.operands(case), setup.device)
    openmla.decode(**given, kv_layout="fp8_576", backend=setup.backend)
    return {}


def _once(setup: Setup, case: Case) -> dict[str, Any]:
    given = native_arguments(case.op, coverage.moved(case.tensors(), setup.device))
    getattr(openmla, case.op)(**given, backend=setup.backend)
    if setup.is_cuda:
        torch.cuda.synchronize()
    return {}


def _write(setup: Setup, layout: str) -> dict[str, Any]:
    """70 tokens, of which one goes nowhere and one, where that is masked and does not raise, to a slot that is not there."""
    cache = torch.zeros_like(kv_layout(layout).empty_cache(2, 64)).to(setup.device)
    slots = torch.randperm(128)[:70]
    slots[3], slots[5] = -1, 2**40 if setup.is_cuda else -1
    rows = torch.randn(70, 576).bfloat16()
    append(cache, slots.to(setup.device), rows.to(setup.device), kv_layout=layout, backend=setup.backend)
    openmla.check_errors()
    return {}


def sanitize(setup: Setup, *which: str) -> Made:
    """One item per tool."""
    return [(tool, partial(_sanitize, tool=tool, which=which)) for tool in TOOLS]


def _sanitize(setup: Setup, tool: str, which: tuple[str, ...]) -> dict[str, Any]:
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not setup.is_cuda:
        raise NotRunError("compute-sanitizer watches GPUs")
    if not Path(program).exists():
        raise NotRunError("compute-sanitizer is not installed; it comes with the CUDA toolkit")
    script = Path(__file__)
    found = subprocess.run(
        [program, "--tool", tool, "--error-exitcode", "9", "--print-limit", "1000", sys.executable, str(script),
         setup.backend, *which],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    text = found.stdout + found.stderr
    counted = re.search(r"ran (\d+) of (\d+)", text)
    summary = [line.strip("= ") for line in text.splitlines() if "SUMMARY" in line]
    waived, unknown = {}, [f"{tool} ended with status {found.returncode}"] if found.returncode else []
    if tool == "racecheck" and found.returncode and counted:
        waived, unknown = racecheck.waived(text, time.strftime("%Y-%m-%d"), racecheck.of_the_bundle)
    if counted is None or unknown:
        text = re.sub(r"kernel_cutlass_kernel_openmlabackendscute(\w+?)kernel\w*", r"\1", text)  # names of 200 letters
        shown = [line for line in text.splitlines() if line.strip("= ") and "Host Frame" not in line]
        raise AssertionError("\n".join(unknown[:20] + shown[:40] + shown[-10:]))
    assert int(counted[1]), f"{tool}: no case is supported"
    return {"measured": {"cases": counted[0], "says": "; ".join(summary)} | waived}


# ------------------------------------------------------------------------------------------- faults

# Section of reliability_sections.py -> seconds; some end with the device lost, on purpose.
FAULTS = {"canary": 150, "portable_canary": 200, "values": 120, "replays": 120, "watchdog": 90, "hang": 90, "sticky": 90,
          "foreign": 90, "memory": 90, "outgrown": 90}  # fmt: skip
EXPECTED_STATUS = {"hang": 70}


def faults(setup: Setup) -> Made:
    """Each in a process of its own."""
    return [(name, _section(name, seconds)) for name, seconds in FAULTS.items()]


def modes(setup: Setup) -> Made:
    """Costs; alone on the device."""
    return [("modes", _section("modes", 120))]


def soak(setup: Setup) -> Made:
    """As long as the suite is told."""
    return [("soak", _section("soak", setup.soak_seconds + 120, str(setup.soak_seconds)))]


def _section(name: str, seconds: float, *arguments: str) -> Callable[[Setup], dict[str, Any]]:
    def run(setup: Setup) -> dict[str, Any]:
        if not setup.is_cuda:
            raise NotRunError("happens on GPUs")
        script = Path(__file__).parent / "reliability_sections.py"
        done = subprocess.run(
            [sys.executable, str(script), name, *arguments],
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        text = (done.stdout + done.stderr)[-3000:]
        assert done.returncode == EXPECTED_STATUS.get(name, 0), f"{name} ended with status {done.returncode}\n{text}"
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        return {"measured": {str(number): line for number, line in enumerate(lines)}}

    return run


def watched(backend: str, *which: str) -> int:
    """The program that the sanitizer runs: every smallest case, or one of `more`, once."""
    setup, ran = Setup(backend, "cuda"), 0
    items = more(setup) if which else smallest(setup)
    for name, call in items:
        try:
            call(setup)
            ran += 1
        except UnsupportedError as error:
            print(f"{name}: {coverage.reasons(error, backend)}")
    print(f"ran {ran} of {len(items)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(watched(*sys.argv[1:]))
