"""Dense decode of e4m3 queries over e4m3 codes (fp8_576) on one Hopper GPU, through `openmla.decode`.

    python tests/gpu/decode_fp8.py gate [CASE ...]         every case against the fp64 oracle
    python tests/gpu/decode_fp8.py gate --backend triton   the portable kernel, or torch; queries in bf16, too
    python tests/gpu/decode_fp8.py gate --device cpu       the script itself: backend torch, no GPU

Backend cute needs a bundle (OPENMLA_AOT_DIR, `python -m openmla compile`) or the DSL. Exit status 0 when all passed.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any

import torch

import openmla
from openmla.core.layout import kv_layout
from openmla.reference import attention, quant
from openmla.testing import budget

NAN = 0x7F  # e4m3's


@dataclass(frozen=True)
class Case:
    """One problem; everything that must not matter is NaN. size: of logits; mean: of values, which then add up."""

    name: str
    lengths: tuple[int, ...]
    h_q: int = 128
    s_q: int = 1
    h_kv: int = 1
    page: int = 64
    causal: bool = False
    sink: bool = False
    window: int | None = None
    queries: tuple[int, ...] = ()
    policy: str = "balanced"
    bad_page: bool = False
    size: float = 1.0
    mean: float = 0.0
    is_positive: bool = False  # every product of a score has one sign: what is cut off adds up
    scales: tuple[float, float] | None = (0.03, 0.02)  # of q and of the cache
    most: float = 2.0**-8  # relative error of the whole output; one e4m3 number per weight would be at 0.02
    is_coded: bool = True  # q in e4m3; else bf16, which the Hopper kernel does not take


RAGGED = (4000, 300, 70, 0, 1, 129)
CHECKS = (
    Case("one_tile", (64,)),
    Case("one_key", (1,)),
    Case("partial", (37,)),
    Case("split", (4001,)),
    Case("ragged", RAGGED),
    Case("ragged_h64", RAGGED, h_q=64),
    Case("heads1", (500, 70), h_q=1),
    Case("heads16", RAGGED, h_q=16),
    Case("heads16_s2_causal_sink", (500, 64, 1, 3000), h_q=16, s_q=2, causal=True, sink=True),
    Case("heads100_s3_causal", (500, 70, 2, 0, 1), h_q=100, s_q=3, causal=True),
    Case("s2_causal", RAGGED, s_q=2, causal=True),
    Case("s4_causal_sink", (1000, 4, 333), s_q=4, causal=True, sink=True),
    Case("few_keys_sink", (1000, 70, 0, 1, 64), sink=True),
    Case("few_keys_h64", (1000, 3000), h_q=64),
    Case("few_keys_bad_page", (900, 130, 500), bad_page=True, sink=True),
    Case("few_keys_window", (1000, 70, 0, 1), window=100),
    Case("whole_requests", tuple(64 * (i % 9 + 1) + i for i in range(70))),
    Case("page128", (900, 130, 5), page=128),
    Case("page48", (900, 130, 5, 0, 16), page=48),
    Case("page5", (900, 130, 5, 0, 16), page=5),
    Case("page3_causal", (900, 130, 5), page=3, h_q=64, s_q=2, causal=True),
    Case("bad_page", (900, 130, 500), bad_page=True),
    Case("bad_page48", (900, 130, 500), page=48, bad_page=True),
    Case("window", RAGGED, window=128),
    Case("window1_s3", RAGGED, window=1, h_q=100, s_q=3),
    Case("invariant", (0, 300, 13000, 256, 257), policy="batch_invariant"),
    Case("window_invariant", (4000, 30000, 70), window=13000, policy="batch_invariant"),
    Case("varlen", RAGGED, queries=(1, 4, 0, 2, 3, 4), h_q=64, causal=True, sink=True),
    Case("flat_long", (60000, 16384), size=0.02),
    Case("flat_mean", (60000, 16384), size=0.02, mean=1.0),
    Case("peaked", (16384, 999), size=4.0, most=0.01),
    Case("sharp", (3000, 999), size=30.0, most=0.02),
    Case("positive", (3000, 999), size=0.3, is_positive=True),
    Case("positive_long", (60000,), size=0.05, is_positive=True),
    Case("no_scales", (3000, 999), scales=None),
    Case("huge_scales", (3000, 999), scales=(1e6, 3.0), most=0.04),
    Case("bf16_ragged", RAGGED, is_coded=False),
    Case("bf16_heads16_s2", RAGGED, h_q=16, s_q=2, causal=True, sink=True, is_coded=False),
)


def operands(case: Case) -> dict[str, Any]:
    """Arguments of `openmla.decode` on the CPU, in shuffled pages."""
    generator = torch.Generator().manual_seed(0)
    of_q, of_k = case.scales or (1.0, 1.0)
    used = [-(-length // case.page) for length in case.lengths]
    pages, batch = sum(used) + 3, len(case.lengths)
    kv = torch.randn(pages, case.page, 1, 576, generator=generator) + case.mean
    kv = kv.abs() if case.is_positive else kv
    kv = quant.quantise(kv if case.scales is None else 50 * kv, "fp8_576")
    order = torch.randperm(pages, generator=generator).int()
    table = torch.full((batch, max(used) + 2), 2**31 - 1, dtype=torch.int32)
    at = 0
    for b, count in enumerate(used):
        table[b, :count] = order[at : at + count]
        at += count
        if case.lengths[b] % case.page:
            kv[order[at - 1].long(), case.lengths[b] % case.page :] = NAN
    kv[order[at:].long()] = NAN
    if case.bad_page:
        table[0, 1], table[2, 0] = -5, pages
    lead = (sum(case.queries),) if case.queries else (batch, case.s_q)
    starts = torch.tensor((0, *case.queries)).cumsum(0).int() if case.queries else None
    q = torch.randn(*lead, case.h_q, 576, generator=generator) * (1.0 if case.scales is None else 30.0)
    q = q.abs() if case.is_positive else q
    return {
        "q": quant.encode_e4m3(q) if case.is_coded else (0.03 * q).bfloat16(), "kv_cache": kv, "block_table": table,
        "cache_seqlens": torch.tensor(case.lengths, dtype=torch.int32), "cu_seqlens_q": starts,
        "attn_sink": torch.randn(case.h_q, generator=generator) if case.sink else None,
        "descale_q": torch.tensor([of_q]) if case.scales and case.is_coded else None,
        "descale_k": torch.tensor([of_k]) if case.scales else None,
    }  # fmt: skip


def judge(case: Case, device: str, backend: str) -> dict[str, Any]:
    """Three calls of one problem: within the rule, the same bits, the right fault."""
    given = operands(case)
    there = {name: None if x is None else x.to(device) for name, x in given.items()}
    scale = case.size * 576**-0.5 / (case.scales[0] / 0.03 if case.scales else 1.0)
    options = {"is_causal": case.causal, "window": case.window, "kv_layout": "fp8_576", "policy": case.policy}
    if case.queries:
        options["max_seqlen_q"] = max(case.queries)
    found = [openmla.decode(**there, **options, softmax_scale=scale, backend=backend) for _ in range(3)]
    assert all(torch.equal(found[0][0], out) for out, _ in found), "runs differ in bits"
    faults = [fault.name for fault in openmla.check_errors()]
    assert faults == (["PAGE_OUT_OF_RANGE"] if case.bad_page else []), f"faults {faults}"
    golden = attention.decode(
        **there, softmax_scale=scale, d_v=512, layout="fp8_576", is_causal=case.causal, window=case.window or 0,
        with_bounds=True,
    )  # fmt: skip
    out, lse = found[0]
    error = (out.double() - golden.out).norm() / golden.out.norm().clamp_min(1e-300)
    assert float(error) <= case.most, f"relative error {float(error):.3g}, at most {case.most:.3g}"
    report = budget.check(out, lse, golden, dtype=torch.float8_e4m3fn if backend == "cute" else torch.bfloat16)
    report.require()
    return {"error": float(f"{float(error):.3g}"), "worst": {f.rule: round(f.ratio, 3) for f in report.findings}}


def judge_nan(device: str, backend: str) -> dict[str, Any]:
    """A NaN code of a seen key or of a query: its rows are NaN, the others keep their bits."""
    case = Case("nan", (3000, 500, 64))
    given = operands(case)

    def run() -> torch.Tensor:
        there = {name: None if x is None else x.to(device) for name, x in given.items()}
        return openmla.decode(**there, kv_layout="fp8_576", backend=backend)[0].cpu()

    want = run()
    for place in (77, 570):
        page = int(given["block_table"][0, 3])
        kept = given["kv_cache"][page, 5, 0].clone()
        given["kv_cache"][page, 5, 0, place] = NAN
        out = run()
        given["kv_cache"][page, 5, 0] = kept
        assert bool(out[0].isnan().all()), f"byte {place}: a NaN is lost"
        assert torch.equal(out[1:], want[1:]), f"byte {place}: it reaches other requests"
    bytes_of_q = given["q"].view(torch.uint8)
    kept = bytes_of_q[1, 0, 7].clone()
    bytes_of_q[1, 0, 7, 500] = NAN
    out = run()
    bytes_of_q[1, 0, 7] = kept
    assert bool(out[1, 0, 7].isnan().all()), "a NaN query is lost"
    out[1, 0, 7] = want[1, 0, 7]
    assert torch.equal(out, want), "a NaN query reaches other rows"
    assert torch.equal(run(), want), "a NaN stays behind"
    return {}


def judge_plan(device: str, backend: str) -> dict[str, Any]:
    """One plan for several layers with other scales gives what each gives alone."""
    given = operands(Case("plan", RAGGED))
    there = {name: None if x is None else x.to(device) for name, x in given.items() if name != "descale_q"}
    plan = openmla.plan(
        there["q"],
        there["kv_cache"],
        there["block_table"],
        there["cache_seqlens"],
        kv_layout="fp8_576",
        backend=backend,
    )
    for layer in range(3):
        of_q = torch.tensor([0.01 * (layer + 1)], device=device)
        planned = openmla.decode(**there, descale_q=of_q, kv_layout="fp8_576", backend=backend, plan=plan)
        fresh = openmla.decode(**there, descale_q=of_q, kv_layout="fp8_576", backend=backend)
        assert torch.equal(planned[0], fresh[0]) and torch.equal(planned[1], fresh[1]), f"layer {layer} differs"
    return {}


def judge_graph(device: str, backend: str) -> dict[str, Any]:
    """A CUDA graph replays it, and reads its scales anew."""
    if device == "cpu":
        return {}
    given = {name: None if x is None else x.to(device) for name, x in operands(Case("graph", RAGGED)).items()}

    def call() -> torch.Tensor:
        return openmla.decode(**given, kv_layout="fp8_576", backend=backend)[0]

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for factor in (1.0, 0.5):
        given["descale_k"].mul_(factor)
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, call()), f"a replay with scales times {factor} differs"
    return {}


def gate(device: str, backend: str, only: list[str]) -> int:
    """One line per case as soon as it is known; the number that failed."""
    cases = [case for case in CHECKS if case.is_coded or backend != "cute"]
    checks = {case.name: lambda case=case: judge(case, device, backend) for case in cases}
    checks |= {
        name: lambda run=run: run(device, backend)
        for name, run in (("nan", judge_nan), ("plan", judge_plan), ("graph", judge_graph))
    }
    failed = 0
    for name, check in checks.items():
        if only and name not in only:
            continue
        try:
            row = {"case": name, "passed": True, **check()}
        except Exception as error:  # what one case raises must not hide the others
            row = {"case": name, "passed": False, "error": f"{type(error).__name__}: {error}"[:900]}
            failed += 1
        print(json.dumps(row), flush=True)
    print(f"{len(only or checks) - failed} of {len(only or checks)} passed")
    return failed


def main(arguments: list[str]) -> int:
    device, backend = "cuda", "cute"
    if "--device" in arguments:
        at = arguments.index("--device")
        device, backend = arguments[at + 1], "torch"
        arguments = arguments[:at] + arguments[at + 2 :]
    if "--backend" in arguments:
        at = arguments.index("--backend")
        backend = arguments[at + 1]
        arguments = arguments[:at] + arguments[at + 2 :]
    assert kv_layout("fp8_576").has_call_scale
    verb, *only = arguments
    if verb != "gate":
        print(__doc__)
        return 2
    return int(gate(device, backend, only) > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
