"""Numerics and timings of the few-row dense decode kernel, its device plan and its combine, on one Hopper GPU.

    python tests/gpu/decode_dense_small.py LIBRARY check     every case in a process of its own, with a time limit
    python tests/gpu/decode_dense_small.py LIBRARY time      against sgl-flash-mla where installed; rows to $OUT

LIBRARY is built by build_decode_dense_small.py on a machine with the DSL.
Needs PyTorch with CUDA, apache-tvm-ffi, and src/ on PYTHONPATH; not the DSL.
"""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from openmla.backends.cute.decode_dense_small.config import VARIANTS
from openmla.core.target import Target
from openmla.lab.store import Row, append, environment, now
from openmla.split.schedule import plan_decode

LOG2_E = 1.4426950408889634
SMS = 132
PARTIAL = ("decode_dense_small_bf16_n16_d576_s2_part",)  # variants whose partials are merged by the separate kernel


@dataclass(frozen=True)
class Case:
    """One problem. `lengths` fixes the batch; `poison` fills everything that must not matter with NaN."""

    name: str
    lengths: tuple[int, ...]
    h_q: int = 16
    h_kv: int = 1
    s_q: int = 1
    page: int = 64
    causal: bool = False
    sink: bool = False
    dtype: torch.dtype = torch.bfloat16
    d_qk: int = 576
    policy: str = "balanced"
    chunk: int = 256
    parts: int = SMS
    unit: int = 64  # tokens per block of the plan
    overhead: int = 1
    share: int = 1
    scale: float = 1.0
    bad_page: bool = False
    strided: bool = False


CHECKS = (
    Case("one_tile", (64,)),
    Case("one_key", (1,)),
    Case("partial", (37,)),
    Case("few_tiles_one_part", (200,), parts=1),
    Case("ring_wraps", (64 * 23 + 5,), parts=1),
    Case("split", (4096,)),
    Case("split_partial", (4001,)),
    Case("batch", (0, 1, 63, 64, 65, 1000, 0, 2048, 777)),
    Case("batch_few_parts", (0, 1, 63, 64, 65, 1000, 0, 2048, 777), parts=3),
    Case("invariant", (0, 300, 5000, 256, 257), policy="batch_invariant", parts=7),
    Case("heads1", (500, 70), h_q=1),
    Case("heads5_s3_causal", (500, 70, 2, 0, 1), h_q=5, s_q=3, causal=True),
    Case("heads8_s2_causal_sink", (500, 64, 1, 3000), h_q=8, s_q=2, causal=True, sink=True),
    Case("rows32", (4096, 100, 333), h_q=32),
    Case("rows32_causal", (700, 100, 12), h_q=16, s_q=2, causal=True, sink=True),
    Case("unit8", (4096, 100, 333, 0, 7), unit=8),
    Case("unit16", (4096, 100, 333, 0, 7), unit=16, overhead=4),
    Case("uneven_cuts", (5000, 2500, 90), parts=13, unit=24),
    Case("many_pieces", (131072,), chunk=128, policy="batch_invariant"),
    Case("units_shared", (7000, 7000, 7000, 7000), h_q=32, parts=40),
    Case("h_kv2", (900, 130), h_q=32, h_kv=2, parts=66),
    Case("fp16", (900, 130, 5), dtype=torch.float16),
    Case("page128", (900, 130, 5), page=128),
    Case("page192", (1900, 130, 5), page=192),
    Case("page16", (900, 130, 5, 0, 16), page=16),
    Case("page40", (900, 130, 5, 0, 16), page=40),
    Case("large_logits", (3000, 999), scale=8.0),
    Case("bad_page", (900, 130, 500), bad_page=True),
    Case("strided", (900, 130, 5), strided=True),
    Case("d512", (900, 130, 5), d_qk=512),
)


class Functions:
    """The exported launches of the library, by name."""

    def __init__(self, path: str) -> None:
        import tvm_ffi

        self.module = tvm_ffi.load_module(path)

    def __getitem__(self, name: str):
        return self.module[name]


class Inputs:
    """Random tensors of one case: shuffled pages, NaN in everything that is not attended."""

    def __init__(self, case: Case, seed: int = 0, poison: bool = True) -> None:
        self.case = case
        gen = torch.Generator(device="cuda").manual_seed(seed)
        batch, longest = len(case.lengths), max(case.lengths)
        self.max_pages = max(-(-longest // case.page) + 2, 1)
        used = [-(-length // case.page) for length in case.lengths]
        num_pages = sum(used) + 3
        shape = (num_pages, case.page, case.h_kv, case.d_qk)
        nan = float("nan")
        if case.strided:
            store = torch.full(
                (num_pages, case.page + 3, case.h_kv, case.d_qk + 8), nan, device="cuda", dtype=case.dtype
            )
            self.kv = store[:, : case.page, :, : case.d_qk]
        else:
            self.kv = torch.empty(shape, device="cuda", dtype=case.dtype)
        for start in range(0, num_pages, 4096):  # in pieces: the fp32 intermediate of a whole pool would not fit
            stop = min(start + 4096, num_pages)
            self.kv[start:stop] = (
                0.1 * case.scale * torch.randn((stop - start, *shape[1:]), generator=gen, device="cuda")
            )
        q = torch.randn((batch, case.s_q, case.h_q, case.d_qk + 8 * case.strided), generator=gen, device="cuda")
        self.q = (q * (1.0 if poison else 0.1)).to(case.dtype)[..., : case.d_qk]
        order = torch.randperm(num_pages, generator=gen, device="cuda").to(torch.int32)
        self.table = torch.full((batch, self.max_pages), 2**31 - 1, device="cuda", dtype=torch.int32)
        at = 0
        for b, count in enumerate(used):
            self.table[b, :count] = order[at : at + count]
            at += count
            tail = case.lengths[b] % case.page
            if poison and tail:
                self.kv[order[at - 1].long(), tail:] = nan
        if poison:
            self.kv[order[at:].long()] = nan
        self.masked = torch.ones((batch, longest), dtype=torch.bool, device="cuda")
        if case.bad_page:
            for b, column in ((0, 1), (2, 0)):
                self.table[b, column] = (-5, num_pages)[b // 2]
                self.masked[b, column * case.page : (column + 1) * case.page] = False
        self.lengths = torch.tensor(case.lengths, dtype=torch.int32, device="cuda")
        self.sink = (
            torch.randn(case.h_q, device="cuda", generator=gen) if case.sink else torch.zeros(case.h_q, device="cuda")
        )
        self.softmax_scale = case.d_qk**-0.5


class Operator:
    """Plan, decode and combine on buffers made beforehand."""

    def __init__(self, fns: Functions, x: Inputs, kernel: str, combine: str, *, case: Case | None = None) -> None:
        case = case or x.case
        self.case, self.x = case, x
        self.decode, self.merge, self.planner = fns[kernel], fns[combine], fns["decode_plan"]
        self.fused = not kernel.endswith("_part")
        padded = int(kernel.split("_n")[1][:2]) * case.h_kv  # query rows as the kernel counts them
        self.counters = torch.zeros((2, len(case.lengths) * case.h_kv, 1), dtype=torch.int32, device="cuda")
        batch, rows = len(case.lengths), case.s_q * case.h_q
        chunks = sum(max(-(-length // case.chunk), 1) for length in case.lengths)
        slots = chunks if case.policy == "batch_invariant" else batch + case.parts
        width, stats = (padded * 512, padded * 2) if self.fused else (rows * 512, rows)
        dev = {"device": "cuda"}
        nan = float("nan")
        self.metadata = torch.full((case.parts, 8), -7, dtype=torch.int32, **dev)
        self.num_splits = torch.full((batch + 1,), -7, dtype=torch.int32, **dev)
        self.out = torch.full((batch, case.s_q, case.h_q, 512), nan, dtype=case.dtype, **dev)
        self.lse = torch.full((batch, case.h_q, case.s_q), nan, **dev)
        self.out_accum = torch.full((slots, width), nan, **dev)
        self.lse_accum = torch.full((slots, stats), nan, **dev)
        self.faults = torch.zeros(1, dtype=torch.int32, **dev)
        self.chunk_blocks = case.chunk // case.unit if case.policy == "batch_invariant" else 0
        self.scale_log2 = x.softmax_scale * LOG2_E

    def plan(self) -> None:
        case = self.case
        capacity = self.x.max_pages * case.page
        self.planner(self.x.lengths, self.metadata, self.num_splits, self.faults, capacity, case.unit, case.overhead,
                     case.overhead, case.share, self.chunk_blocks)  # fmt: skip

    def run(self) -> None:
        x, case = self.x, self.case
        self.decode(x.q, x.kv, x.table, x.lengths, self.metadata, self.num_splits, self.out, self.lse, self.out_accum,
                    self.lse_accum, x.sink, self.counters, self.faults, self.scale_log2, int(case.causal), case.unit, self.chunk_blocks,
                    int(case.sink))  # fmt: skip
        if not self.fused:
            partials = self.out_accum.view(self.out_accum.shape[0], -1, 512)
            self.merge(partials, self.lse_accum, self.num_splits, self.out, self.lse, x.sink, case.h_kv,
                       int(case.sink))  # fmt: skip


def oracle(x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """fp64 attention, request by request."""
    case = x.case
    batch = len(case.lengths)
    out = torch.zeros((batch, case.s_q, case.h_q, 512), dtype=torch.float64, device="cuda")
    lse = torch.full((batch, case.h_q, case.s_q), -math.inf, dtype=torch.float64, device="cuda")
    group = case.h_q // case.h_kv
    for b, length in enumerate(case.lengths):
        if length == 0:
            continue
        count = -(-length // case.page)
        ids = x.table[b, :count].long()
        ids = torch.where((ids < 0) | (ids >= x.kv.shape[0]), torch.zeros_like(ids), ids)
        keys = x.kv[ids].flatten(0, 1)[:length].double()
        seen = x.masked[b, :length]
        keys = torch.where(seen[:, None, None], keys, torch.zeros_like(keys))
        for s in range(case.s_q):
            stop = length - (case.s_q - 1 - s if case.causal else 0)
            if stop <= 0:
                continue
            for g in range(case.h_kv):
                heads = slice(g * group, (g + 1) * group)
                scores = x.q[b, s, heads].double() @ keys[:stop, g].T * x.softmax_scale
                scores = scores.masked_fill(~seen[:stop], -math.inf)
                total = torch.logsumexp(scores, -1)
                weights = torch.nan_to_num(torch.exp(scores - total[:, None]))
                value = weights @ keys[:stop, g, :512]
                if case.sink:
                    value = value / (1 + torch.exp(x.sink[heads].double() - total))[:, None]
                out[b, s, heads] = value
                lse[b, heads, s] = total
    return out, lse


def kernel_name(case: Case) -> str:
    rows = 16 if case.s_q * case.h_q // case.h_kv <= 16 else 32
    dtype = "bf16" if case.dtype == torch.bfloat16 else "fp16"
    return next(c.name for c in VARIANTS if (c.dtype, c.rows, c.d_qk) == (dtype, rows, case.d_qk))


def combine_name(case: Case, columns: int = 128) -> str:
    return f"combine_{'bf16' if case.dtype == torch.bfloat16 else 'fp16'}_{columns}"


def check(fns: Functions, case: Case) -> str:
    """Raises AssertionError with the first broken promise; returns a line of figures."""
    x = Inputs(case)
    want, want_lse = oracle(x)
    worst = worst_lse = 0.0
    bits: list[torch.Tensor] = []
    fused_bits: list[torch.Tensor] = []
    for way in ("_part", "", "", "_part") if f"{kernel_name(case)}_part" in PARTIAL else ("", "", ""):
        op = Operator(fns, x, kernel_name(case) + way, combine_name(case, 512 if bits else 128))
        op.plan()
        op.run()
        torch.cuda.synchronize()
        assert not op.counters.any(), "counters: not back at zero"
        plan = plan_decode(case.lengths, case.parts, policy=case.policy, overhead_blocks=case.overhead,
                           block_tokens=case.unit, min_share_blocks=case.share, chunk_tokens=case.chunk)  # fmt: skip
        assert torch.equal(op.metadata.cpu(), plan.tile_scheduler_metadata()), "plan: metadata differs"
        assert torch.equal(op.num_splits.cpu(), plan.num_splits_tensor()), "plan: num_splits differs"
        assert torch.isfinite(op.out).all(), f"out: {(~torch.isfinite(op.out)).sum().item()} elements not finite"
        empty = torch.isinf(want_lse)
        assert torch.equal(torch.isinf(op.lse) & (op.lse < 0), empty), "lse: -inf in the wrong rows"
        rows = empty.transpose(1, 2)
        assert (op.out[rows] == 0).all(), "out: empty rows are not zero"
        if (~empty).any():
            error = (op.out.double() - want).abs().max() / want.abs().max()
            error_lse = (op.lse.double() - want_lse)[~empty].abs().max()
            worst, worst_lse = max(worst, error.item()), max(worst_lse, error_lse.item())
        expected = 1 if case.bad_page else 0
        assert op.faults.item() == expected, f"faults: {op.faults.item()}, expected {expected}"
        (fused_bits if op.fused else bits).append(op.out.clone())
    assert torch.equal(*fused_bits[:2]), "two runs differ in bits"
    assert worst < 8e-3, f"out: error {worst:.2e} of the largest element"
    assert worst_lse < 2e-4 * max(case.scale, 1), f"lse: error {worst_lse:.2e}"
    return f"dO {worst:.1e} dlse {worst_lse:.1e} pieces {op.num_splits[-1].item()}"


def check_plans(fns: Functions, rounds: int = 400) -> str:
    """The device plan against the Python function on random batches."""
    rng = random.Random(7)
    for index in range(rounds):
        batch = rng.choice((1, 2, 3, 17, 128, 511, 512, 513, 1500)) if index % 8 == 0 else rng.randint(1, 40)
        top = rng.choice((1, 64, 500, 5000, 131072))
        lengths = [rng.choice((0, -3, rng.randint(0, top), rng.randint(0, top), top)) for _ in range(batch)]
        capacity = rng.choice((top, max(top // 2, 64)))
        parts, overhead, share = rng.choice((1, 2, 66, 132, 264)), rng.randint(0, 6), rng.randint(1, 3)
        merge = rng.choice((0, 1, 20, 100))
        policy, chunk = rng.choice(("balanced", "batch_invariant")), rng.choice((64, 256, 4096))
        metadata = torch.full((parts, 8), -7, dtype=torch.int32, device="cuda")
        num_splits = torch.full((batch + 1,), -7, dtype=torch.int32, device="cuda")
        faults = torch.zeros(1, dtype=torch.int32, device="cuda")
        fns["decode_plan"](torch.tensor(lengths, dtype=torch.int32, device="cuda"), metadata, num_splits, faults, capacity, 64,
                           overhead, merge, share, chunk // 64 if policy == "batch_invariant" else 0)  # fmt: skip
        plan = plan_decode([min(x, capacity) for x in lengths], parts, policy=policy, overhead_blocks=overhead,
                           merge_blocks=merge, min_share_blocks=share, chunk_tokens=chunk)  # fmt: skip
        where = f"round {index}: {policy} batch={batch} parts={parts} overhead={overhead} merge={merge} share={share} chunk={chunk}"
        assert torch.equal(metadata.cpu(), plan.tile_scheduler_metadata()), f"metadata differs, {where}"
        assert torch.equal(num_splits.cpu(), plan.num_splits_tensor()), f"num_splits differs, {where}"
        expected = 2 * any(x < 0 for x in lengths) + 4 * any(x > capacity for x in lengths)
        assert faults.item() == expected, f"faults {faults.item()}, expected {expected}, {where}"
    return f"{rounds} plans equal"


def check_invariance(fns: Functions) -> str:
    """batch_invariant: a request's bits are the same alone, among others, and on another number of parts."""
    base = Case("invariance", (5000, 70, 0, 1000, 4096), policy="batch_invariant", chunk=512)
    x = Inputs(base)
    outs = []
    for parts in (132, 5, 1):
        op = Operator(fns, x, kernel_name(base), combine_name(base), case=replace(base, parts=parts))
        op.plan()
        op.run()
        outs.append(op.out.clone())
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2]), "bits depend on the number of parts"
    for index, length in enumerate(base.lengths):
        alone = replace(base, lengths=(length,))
        one = Inputs(alone)
        one.q, one.kv, one.table, one.lengths = x.q[index : index + 1], x.kv, x.table[index : index + 1], x.lengths[index : index + 1]  # fmt: skip
        one.max_pages = x.max_pages
        op = Operator(fns, one, kernel_name(alone), combine_name(alone))
        op.plan()
        op.run()
        assert torch.equal(op.out, outs[0][index : index + 1]), f"request {index}: bits depend on its batch mates"
    return "bits equal alone, among others, on 1, 5 and 132 parts"


def check_graph(fns: Functions) -> str:
    """Plan and decode in one graph, lengths changed between replays; then many replays, bit by bit."""
    case = Case("graph", (4096, 3000, 64, 0, 2500, 9000))
    x = Inputs(case, poison=False)
    x.table.clamp_(0, x.kv.shape[0] - 1)
    op = Operator(fns, x, kernel_name(case), combine_name(case))
    graph = graph_of(lambda: (op.plan(), op.run()))
    rng = random.Random(3)
    for _ in range(40):
        lengths = [rng.choice((0, 1, rng.randint(0, 9000), 9000)) for _ in case.lengths]
        x.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
        op.out.fill_(math.nan)
        op.out_accum.fill_(math.nan)
        graph.replay()
        now = replace(case, lengths=tuple(lengths))
        x.case, x.masked = now, torch.ones((len(lengths), 9000), dtype=torch.bool, device="cuda")
        want, _ = oracle(x)
        error = (op.out.double() - want).abs().max() / max(want.abs().max().item(), 1e-30)
        assert error < 8e-3, f"lengths {lengths}: error {error:.1e}"
    first = op.out.clone()
    for _ in range(2000):
        graph.replay()
        assert torch.equal(op.out, first), "a replay differs in bits"
    return "40 sets of lengths, 2000 equal replays"


def run_checks(library: str, names: list[str], limit: float = 25.0) -> int:
    """Each case in its own process: a hang or a dead context costs one line. Stops when nothing works."""
    names = names or ["plans", "graph", "invariance", *(case.name for case in CHECKS)]
    verdicts: list[str] = []
    running: list[tuple[str, subprocess.Popen[str], float]] = []
    waiting = list(names)
    while waiting or running:
        while waiting and len(running) < (13 if "ok" in verdicts else 3):
            command = [sys.executable, __file__, library, "one", waiting[0]]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            # the first processes read PyTorch from a cold disk
            running.append((waiting.pop(0), process, time.monotonic() + limit * (1 if "ok" in verdicts else 2)))
        time.sleep(0.05)
        for entry in list(running):
            name, process, deadline = entry
            if process.poll() is None and time.monotonic() < deadline:
                continue
            verdict = "HANG" if process.poll() is None else "ok" if process.returncode == 0 else "FAIL"
            process.kill()
            text = (process.communicate()[0] or "").strip().splitlines()
            verdicts.append(verdict)
            print(f"{verdict:5}{name:24}{text[-1][:200] if text else ''}", flush=True)
            running.remove(entry)
            if "ok" not in verdicts and verdicts.count("HANG") >= 2:
                waiting.clear()
    print(f"{len(names) - verdicts.count('ok')} of {len(names)} did not pass")
    return len(names) - verdicts.count("ok")


def read_bandwidth() -> float:
    """GB/s of a read-only reduction over 4 GB, best of several."""
    import triton
    import triton.language as tl

    @triton.jit
    def reduce(x, y, per: tl.constexpr, block: tl.constexpr):
        program = tl.program_id(0).to(tl.int64)
        total = tl.zeros((block,), dtype=tl.int32)
        for i in range(per):
            total += tl.load(x + program * per * block + i * block + tl.arange(0, block))
        tl.store(y + program, tl.sum(total))

    size = 1 << 30
    x = torch.zeros(size, dtype=torch.int32, device="cuda").random_(0, 1 << 30)
    best = 0.0
    for block, per, warps in ((4096, 16, 8), (8192, 8, 8), (8192, 32, 16)):
        grid = size // (block * per)
        y = torch.empty(grid, dtype=torch.int32, device="cuda")
        for _ in range(6):
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            a.record()
            reduce[(grid,)](x, y, per, block, num_warps=warps)
            b.record()
            torch.cuda.synchronize()
            best = max(best, size * 4 / a.elapsed_time(b) / 1e6)
    return best


def graph_of(call) -> torch.cuda.CUDAGraph:
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def time_graphs(
    graphs: dict[str, torch.cuda.CUDAGraph], rounds: int, repeats: int, *, is_clean: bool = False
) -> dict[str, list[float]]:
    """Microseconds of each replay, in turn, L2 flushed before every one.

    Flushing by writing (the usual way) leaves 50 MB of L2 to be written back during the measurement, which costs
    everybody up to 16 us; `is_clean` reads another buffer afterwards, so that L2 is cold and has nothing to write.
    """
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    clean = torch.ones(64 << 20, dtype=torch.int32, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            events = []
            for _ in range(repeats):
                flush.zero_()
                if is_clean:
                    clean.max()
                a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                a.record()
                graph.replay()
                b.record()
                events.append((a, b))
            torch.cuda.synchronize()
            times[name] += [a.elapsed_time(b) * 1e3 for a, b in events]
    return times


def gemm_tflops() -> float:
    """bf16 8192^3 on random data, best of a few."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(5):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        a @ b
        end.record()
        torch.cuda.synchronize()
        best = max(best, 2 * 8192**3 / begin.elapsed_time(end) / 1e9)
    return best


def peer(x: Inputs):
    """sgl-flash-mla's dense Hopper path on the same tensors, its metadata made beforehand; None if not installed."""
    try:
        from flash_mla import flash_mla_with_kvcache, get_mla_metadata
    except ImportError as error:
        print("peer: not here:", error)
        return None
    meta, _ = get_mla_metadata()
    table = x.table.clamp(0, x.kv.shape[0] - 1)

    def call():
        return flash_mla_with_kvcache(x.q, x.kv, table, x.lengths, 512, meta, softmax_scale=x.softmax_scale,
                                      causal=x.case.causal, use_legacy=True)  # fmt: skip

    return call


# (batch, s_k, h_q): the few-row cells of the anchor table
CELLS = ((1, 4096, 16), (1, 32768, 16), (1, 131072, 16), (4, 4096, 16), (4, 32768, 16), (4, 131072, 16), (16, 4096, 16),
         (16, 32768, 16), (16, 131072, 16), (32, 1024, 16), (128, 4096, 16), (128, 16384, 16), (128, 4096, 32),
         (128, 16384, 32))  # fmt: skip


def run_times(library: str, only: list[str]) -> None:
    fns = Functions(library)
    out_dir = Path(os.environ.get("OUT", "."))
    read = read_bandwidth()
    gemm, facts = gemm_tflops(), environment(Target.detect("cuda"))
    print(
        f"{facts['device']}: read-only {read:.0f} GB/s, gemm {gemm:.0f} TFLOPS, commit {facts['git_sha']}", flush=True
    )
    # [suffix, tokens per plan block, overhead tokens, least tokens per part, with the plan inside]
    variants = json.loads(os.environ.get("VARIANTS", "[]"))
    for batch, s_k, h_q in CELLS:
        tag = f"b{batch}_h{h_q}_k{s_k}"
        if only and tag not in only:
            continue
        case = Case(tag, (s_k,) * batch, h_q=h_q)
        x = Inputs(case, poison=False)
        graphs = {}
        call = peer(x)
        if call is not None:
            graphs["flash_mla"] = graph_of(call)
        chosen = variants or [["", 64, 64, 64, False]]
        ops = []
        for suffix, unit, overhead, share, with_plan in chosen:
            tuned = replace(case, unit=unit, overhead=overhead // unit, share=max(share // unit, 1))
            op = Operator(
                fns, x, kernel_name(case) + suffix, combine_name(case, 512 if batch >= 64 else 128), case=tuned
            )
            op.plan()
            ops.append(op)
            steps = (lambda o=op: (o.plan(), o.run())) if with_plan else op.run
            graphs[f"ours{suffix}_u{unit}_o{overhead}_m{share}" + ("_plan" if with_plan else "")] = graph_of(steps)
        if call is not None:
            ref = call()[0]
            for op in ops:
                bad = (op.out.double() - ref.double()).abs().max() / ref.double().abs().max()
                assert bad < 1e-2, f"{tag}: differs from the peer by {bad:.1e}"
        big = batch * s_k > 1 << 20
        moved = batch * s_k * 1152 + 2 * batch * h_q * 1088
        flops = 2 * batch * h_q * s_k * 1088
        for is_clean in (False, True):
            times = time_graphs(graphs, rounds=3, repeats=5 if big else 15, is_clean=is_clean)
            medians = {who: statistics.median(each) for who, each in times.items()}
            line = f"{tag:16}{'clean' if is_clean else 'dirty'}"
            rows = []
            for who, each in times.items():
                us, ordered = medians[who], sorted(each)
                ratio = {} if call is None or who == "flash_mla" else {"flash_mla": medians["flash_mla"] / us}
                is_peer = who == "flash_mla"
                line += f" | {who} {us:.1f}us {moved / us / 1e3:.0f}GB/s" + "".join(
                    f" x{x:.2f}" for x in ratio.values()
                )
                rows.append(
                    Row(
                        suite="decode_dense_small",
                        case=f"decode-b{batch}-sq1-hq{h_q}-sk{s_k}-bf16",
                        who="flash_mla" if is_peer else "cute",
                        kind="peer" if is_peer else "backend",
                        kernel="flash_mla dense, use_legacy" if is_peer else kernel_name(case),
                        config="" if is_peer else who,
                        policy="balanced",
                        median_us=us,
                        p20_us=ordered[len(each) // 5],
                        p80_us=ordered[4 * len(each) // 5],
                        n=len(each),
                        host_us=None,
                        flops=flops,
                        bytes=moved,
                        tflops=flops / us / 1e6,
                        gbps=moved / us / 1e3,
                        fraction_gemm=flops / us / 1e6 / gemm,
                        fraction_read=moved / us / 1e3 / read,
                        ratio=ratio,
                        gate="" if is_peer else "within 1e-2 of the peer's largest element",
                        timing="graph",
                        cache="cold, nothing to write back" if is_clean else "cold, flushed by writing",
                        dtype="bf16",
                        inputs="0.1 * randn, shuffled pages of 64",
                        seed=0,
                        environment=facts,
                        ceilings={"gemm_tflops": gemm, "read_gbps": read},
                        utc=now(),
                    )
                )
            append(out_dir / "decode_dense_small.jsonl", rows)
            print(line, flush=True)
        del graphs, ops, x, call
        torch.cuda.empty_cache()


def main() -> int:
    library, mode, *names = sys.argv[1:]
    if mode == "check":
        return 1 if run_checks(library, names) else 0
    if mode == "one":
        fns = Functions(library)
        whole = {"plans": check_plans, "graph": check_graph, "invariance": check_invariance}
        if names[0] in whole:
            print(whole[names[0]](fns))
        else:
            print(check(fns, next(case for case in CHECKS if case.name == names[0])))
        return 0
    if mode == "time":
        run_times(library, names)
        return 0
    raise SystemExit(f"unknown mode {mode!r}; use check or time")


if __name__ == "__main__":
    raise SystemExit(main())
