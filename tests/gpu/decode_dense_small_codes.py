"""The few-row dense decode over byte caches (fp8_656, fp8_528) on one Hopper GPU, through `openmla.decode`.

    python tests/gpu/decode_dense_small_codes.py gate                 every case against the fp64 oracle
    python tests/gpu/decode_dense_small_codes.py gate --pairs         the same, short problems too by two CTAs per SM
    python tests/gpu/decode_dense_small_codes.py times [CELL ...]     beside the same kernel on a bf16 cache; rows to $OUT
    python tests/gpu/decode_dense_small_codes.py sanitize [TOOL ...]  the smallest cases under compute-sanitizer's four tools
    python tests/gpu/decode_dense_small_codes.py gate --device cpu    the script itself: backend torch, no GPU

Needs a bundle (OPENMLA_AOT_DIR, `python -m openmla compile`) or the DSL. Exit status 0 when all passed.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import openmla
from openmla.backends.cute.decode_dense_small import config as small
from openmla.core.layout import kv_layout
from openmla.reference import attention, quant
from openmla.testing import budget

GPU_NAN = 255  # every code, scale and bf16 number of such bytes is a NaN


@dataclass(frozen=True)
class Case:
    """One problem; everything that must not matter is NaN. scales: of powers of two, or as any writer may leave them."""

    name: str
    lengths: tuple[int, ...]
    h_q: int = 16
    s_q: int = 1
    page: int = 64
    causal: bool = False
    sink: bool = False
    window: int | None = None
    queries: tuple[int, ...] = ()
    layout: str = "fp8_656"
    scales: str = "power"
    policy: str = "balanced"
    bad_page: bool = False
    size: float = 0.5


RAGGED = (4000, 300, 70, 0, 1, 129)
CHECKS = (
    Case("one_tile", (64,)),
    Case("one_key", (1,)),
    Case("partial", (37,)),
    Case("split", (4001,)),
    Case("ragged", RAGGED),
    Case("ragged_any", RAGGED, scales="any"),
    Case("bytes", (900, 130, 5), scales="bytes"),
    Case("wide", (900, 130, 5), scales="wide"),
    Case("heads1", (500, 70), h_q=1),
    Case("heads8_s2_causal_sink", (500, 64, 1, 3000), h_q=8, s_q=2, causal=True, sink=True),
    Case("heads5_s3_causal", (500, 70, 2, 0, 1), h_q=5, s_q=3, causal=True),
    Case("rows32", (4096, 100, 333), h_q=32),
    Case("rows32_causal_any", (700, 100, 12), s_q=2, causal=True, sink=True, scales="any"),
    Case("groups128", (1500, 100), h_q=128),
    Case("page128", (900, 130, 5), page=128),
    Case("page40", (900, 130, 5, 0, 16), page=40),
    Case("page1", (900, 130, 5, 0, 1), page=1),
    Case("page3", (900, 130, 5, 0, 16), page=3, h_q=8, s_q=2, causal=True),
    Case("page100_sink", (3000, 130, 5), page=100, sink=True),
    Case("bad_page", (900, 130, 500), bad_page=True),
    Case("bad_page7", (900, 130, 500), page=7, bad_page=True),
    Case("window", RAGGED, window=128),
    Case("window1_s3", RAGGED, window=1, h_q=5, s_q=3),
    Case("window_invariant", (4000, 9000, 70), window=1000, policy="batch_invariant"),
    Case("invariant", (0, 300, 9000, 256, 257), policy="batch_invariant"),
    Case("varlen", RAGGED, queries=(1, 4, 0, 2, 3, 4), h_q=8, causal=True, sink=True),
    Case("large_logits", (3000, 999), size=4.0),
    Case("small_values", (3000, 999), size=1e-4),
    Case("d512", RAGGED, layout="fp8_528"),
    Case("d512_any", RAGGED, layout="fp8_528", scales="any", h_q=7),
    Case("d512_rows32", RAGGED, layout="fp8_528", h_q=16, s_q=2, causal=True),
    Case("d512_page5", RAGGED, layout="fp8_528", page=5, sink=True),
)


def cache_of(case: Case, pages: int, generator: torch.Generator) -> torch.Tensor:
    """A packed cache: what the library writes, or with scales and codes of other writers."""
    layout = kv_layout(case.layout)
    kv = case.size * torch.randn(pages, case.page, 1, layout.d_qk, generator=generator)
    groups = kv[..., :512].unflatten(-1, (4, 128))
    if case.scales == "wide":  # neighbours differ by up to 2^12
        groups *= torch.exp2(torch.randint(-8, 5, groups.shape[:-1], generator=generator))[..., None]
    packed = quant.quantise(kv.bfloat16(), layout)
    scales = packed[..., 512:528].contiguous().view(torch.float32)
    if case.scales == "any":
        scales *= 1 + torch.rand(scales.shape, generator=generator)
    if case.scales == "bytes":  # every code but NaN, every mantissa
        codes = torch.randint(0, 256, packed[..., :512].shape, generator=generator)
        packed[..., :512] = torch.where(codes & 127 == 127, 1, codes).to(torch.uint8)
        scales.copy_(0.01 * torch.rand(scales.shape, generator=generator))
    packed[..., 512:528] = scales.view(torch.uint8)
    return packed


def operands(case: Case) -> dict[str, Any]:
    """Arguments of `openmla.decode` on the CPU, in shuffled pages."""
    generator = torch.Generator().manual_seed(0)
    used = [-(-length // case.page) for length in case.lengths]
    pages, batch = sum(used) + 3, len(case.lengths)
    kv = cache_of(case, pages, generator)
    order = torch.randperm(pages, generator=generator).int()
    table = torch.full((batch, max(used) + 2), 2**31 - 1, dtype=torch.int32)
    at = 0
    for b, count in enumerate(used):
        table[b, :count] = order[at : at + count]
        at += count
        if case.lengths[b] % case.page:
            kv[order[at - 1].long(), case.lengths[b] % case.page :] = GPU_NAN
    kv[order[at:].long()] = GPU_NAN
    if case.bad_page:
        table[0, 1], table[2, 0] = -5, pages
    d_qk = kv_layout(case.layout).d_qk
    lead = (sum(case.queries),) if case.queries else (batch, case.s_q)
    starts = torch.tensor((0, *case.queries)).cumsum(0).int() if case.queries else None
    return {
        "q": torch.randn(*lead, case.h_q, d_qk, generator=generator).bfloat16(), "kv_cache": kv, "block_table": table,
        "cache_seqlens": torch.tensor(case.lengths, dtype=torch.int32), "cu_seqlens_q": starts,
        "attn_sink": torch.randn(case.h_q, generator=generator) if case.sink else None,
    }  # fmt: skip


def judge(case: Case, device: str, backend: str) -> dict[str, Any]:
    """Three calls of one problem: within the rule, the same bits, the right fault."""
    given = operands(case)
    there = {name: None if x is None else x.to(device) for name, x in given.items()}
    options = {"is_causal": case.causal, "window": case.window, "kv_layout": case.layout, "policy": case.policy}
    if case.queries:
        options["max_seqlen_q"] = max(case.queries)
    found = [openmla.decode(**there, **options, backend=backend) for _ in range(3)]
    assert all(torch.equal(found[0][0], out) for out, _ in found), "runs differ in bits"
    faults = [fault.name for fault in openmla.check_errors()]
    assert faults == (["PAGE_OUT_OF_RANGE"] if case.bad_page else []), f"faults {faults}"
    d_qk = given["q"].shape[-1]
    golden = attention.decode(
        **there, softmax_scale=d_qk**-0.5, d_v=512, layout=case.layout, is_causal=case.causal, window=case.window or 0,
        with_bounds=True,
    )  # fmt: skip
    out, lse = found[0]
    report = budget.check(out, lse, golden, dtype=torch.bfloat16)
    report.require()
    return {"worst": round(max(finding.ratio for finding in report.findings), 3)}


def judge_nan(device: str, backend: str) -> dict[str, Any]:
    """A NaN code, a NaN scale, an infinite scale of a seen key: its request is NaN, the others keep their bits."""
    case = Case("nan", (3000, 500, 64))
    given = operands(case)

    def run() -> torch.Tensor:
        there = {name: None if x is None else x.to(device) for name, x in given.items()}
        return openmla.decode(**there, kv_layout=case.layout, backend=backend)[0].cpu()

    want = run()
    for place, bits in ((77, (0x7F,)), (512, (0, 0, 0xC0, 0x7F)), (520, (0, 0, 0x80, 0x7F))):
        page = int(given["block_table"][0, 3])
        kept = given["kv_cache"][page, 5, 0].clone()
        given["kv_cache"][page, 5, 0, place : place + len(bits)] = torch.tensor(bits, dtype=torch.uint8)
        out = run()
        given["kv_cache"][page, 5, 0] = kept
        assert bool(out[0].isnan().any()), f"byte {place}: a NaN is lost"
        assert torch.equal(out[1:], want[1:]), f"byte {place}: it reaches other requests"
    assert torch.equal(run(), want), "a NaN stays behind"
    return {}


def gate(device: str, only: list[str]) -> int:
    """One line per case as soon as it is known; the number that failed."""
    backend = "torch" if device == "cpu" else "cute"
    checks = {case.name: lambda case=case: judge(case, device, backend) for case in CHECKS}
    checks["nan"] = lambda: judge_nan(device, backend)
    failed = 0
    for name, check in checks.items():
        if only and name not in only:
            continue
        try:
            row = {"case": name, "passed": True, **check()}
        except Exception as error:  # what one case raises must not hide the others
            row = {"case": name, "passed": False, "error": f"{type(error).__name__}: {error}"[:700]}
            failed += 1
        print(json.dumps(row), flush=True)
    print(f"{len(only or checks) - failed} of {len(only or checks)} passed")
    return failed


# (batch, s_k, h_q)
CELLS = ((128, 16384, 16), (128, 4096, 16), (16, 32768, 16), (4, 32768, 16), (1, 4096, 16), (1, 32768, 16), (1, 131072, 16),
         (32, 1024, 16), (128, 16384, 8), (128, 4096, 32))  # fmt: skip


def graph_of(
    batch: int, s_k: int, h_q: int, layout: str, backend: str
) -> tuple[torch.cuda.CUDAGraph, torch.Tensor, tuple[Any, ...]]:
    """A replayable decode with its plan made beforehand, its out, and what must live as long as the graph."""
    pages = batch * -(-s_k // 64)
    kv = torch.empty((pages, 64, 1, kv_layout(layout).row_elements), dtype=kv_layout(layout).dtype, device="cuda")
    generator = torch.Generator(device="cuda").manual_seed(0)
    for begin in range(0, pages, 2048):
        part = kv[begin : begin + 2048]
        rows = (0.1 * torch.randn((*part.shape[:3], 576), generator=generator, device="cuda")).bfloat16()
        part.copy_(quant.quantise(rows, layout))
    table = torch.randperm(pages, generator=generator, device="cuda").int().view(batch, -1)
    lengths = torch.full((batch,), s_k, dtype=torch.int32, device="cuda")
    q = torch.randn((batch, 1, h_q, 576), generator=generator, device="cuda").bfloat16()
    options: dict[str, Any] = {"kv_layout": None if layout == "bf16_576" else layout, "backend": backend}
    plan = openmla.plan(q, kv, table, lengths, **options)
    out = torch.empty((batch, 1, h_q, 512), dtype=torch.bfloat16, device="cuda")

    def call() -> None:
        openmla.decode(q, kv, table, lengths, plan=plan, out=out, **options)

    for _ in range(2):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph, out, (q, kv, table, lengths, plan)


def times(only: list[str], variant: str) -> int:
    """Both caches in turn, L2 cold and clean, beside the read bandwidth of the same run."""
    from decode_dense_small_times import read_bandwidth, time_graphs

    path = Path(os.environ.get("OUT", ".")) / "codes_times.jsonl"
    read, device = read_bandwidth(), torch.cuda.get_device_name()
    for batch, s_k, h_q in CELLS:
        name = f"b{batch}_k{s_k}_h{h_q}"
        if only and name not in only:
            continue
        graphs, outs, kept = {}, {}, {}
        for who, layout, backend in (
            ("fp8_656", "fp8_656", "cute"),
            ("bf16_576", "bf16_576", "cute"),
            ("triton", "fp8_656", "triton"),
        ):
            graphs[who], outs[who], kept[who] = graph_of(batch, s_k, h_q, layout, backend)
            graphs[who].replay()
        torch.cuda.synchronize()
        bf16 = outs["bf16_576"].float()
        error = float((outs["fp8_656"].float() - bf16).abs().max() / bf16.abs().max())
        rounds = 3 if batch * s_k > 1 << 20 else 8
        measured = time_graphs(graphs, rounds, 5, is_clean=True)
        us = {key: statistics.median(each) for key, each in measured.items()}
        spread = {key: [round(sorted(each)[len(each) * x // 10], 2) for x in (2, 8)] for key, each in measured.items()}
        gbps = batch * s_k * 656 / us["fp8_656"] / 1e3
        row = {
            "cell": name, "device": device, "variant": variant, "fp8_us": round(us["fp8_656"], 2), "bf16_us": round(us["bf16_576"], 2),
            "triton_fp8_us": round(us["triton"], 2), "spread": spread, "ratio": round(us["bf16_576"] / us["fp8_656"], 3), "gbps": round(gbps), "read_gbps": round(read),
            "fraction_read": round(gbps / read, 3), "difference": round(error, 4),
        }  # fmt: skip
        print(json.dumps(row), flush=True)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        del graphs, outs, kept
        torch.cuda.empty_cache()
    return 0


SANITIZED = ("one_key", "partial", "page3", "heads5_s3_causal", "d512_page5", "rows32_causal_any")


def sanitize(tools: list[str]) -> int:
    """The smallest cases under compute-sanitizer; how many tools found something."""
    program, dirty = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer", 0
    for tool in tools or ["memcheck", "racecheck", "synccheck", "initcheck"]:
        only = ["--kernel-name", "kernel_substring=DecodeDenseSmall"] if tool in ("racecheck", "synccheck") else []
        command = [
            program,
            "--tool",
            tool,
            "--error-exitcode",
            "9",
            *only,
            sys.executable,
            __file__,
            "gate",
            *SANITIZED,
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
            text, code = done.stdout + done.stderr, done.returncode
        except subprocess.TimeoutExpired as late:
            text, code = (late.stdout or b"").decode(), -1
        dirty += code != 0
        said = [line for line in text.splitlines() if "SUMMARY" in line or line.startswith("{")]
        print(f"{tool}: exit code {code}", *said, sep="\n", flush=True)
        if code:
            print(text[:3000], flush=True)
    return dirty


def main(arguments: list[str]) -> int:
    device = "cuda"
    if "--device" in arguments:
        at = arguments.index("--device")
        device = arguments[at + 1]
        arguments = arguments[:at] + arguments[at + 2 :]
    if "--pairs" in arguments:
        arguments.remove("--pairs")
        small.MAX_LONE_TOKENS = -1
    verb, *only = arguments
    if verb == "sanitize":
        return int(sanitize(only) > 0)
    if verb == "gate":
        return int(gate(device, only) > 0)
    return times(only, os.environ.get("VARIANT", ""))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
