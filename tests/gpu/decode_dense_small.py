"""Numerics of the few-row dense decode kernel and its device plan, on one Hopper GPU.

    python tests/gpu/decode_dense_small.py LIBRARY check     every case, dealt to a few processes, with a time limit
    python tests/gpu/decode_dense_small.py LIBRARY sanitize  the smallest cases under compute-sanitizer's four tools

decode_dense_small_times.py beside this file times it. LIBRARY is built by build_decode_dense_small.py on a machine with the DSL.
Needs PyTorch with CUDA, apache-tvm-ffi, and src/ on PYTHONPATH; not the DSL.
"""

from __future__ import annotations

import math
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from openmla.backends.cute.decode_dense_small.config import NO_WINDOW, UNWRITTEN, VARIANTS, marks
from openmla.split.schedule import plan_decode

LOG2_E = 1.4426950408889634
PARTS = 128  # of an H100, see config.num_parts


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
    parts: int = PARTS
    unit: int = 64  # tokens per block of the plan
    overhead: int = 1
    share: int = 1
    margin: int = 75
    merge: int | None = None  # overhead
    merge_from: int | None = None
    scale: float = 1.0
    bad_page: bool = False
    strided: bool = False
    window: int = 0
    queries: tuple[int, ...] = ()  # of each request, packed (cu_seqlens_q); the first entry is rows of nobody
    groups: int = 1  # of 16 rows each, over the same keys; two share a cluster


UNEVEN = tuple(int(3000 + 1800 * math.sin(i * i)) for i in range(128))
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
    Case("uneven_cuts", (5000, 2500, 90), parts=13, unit=24, chunk=240),
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
    Case("d512_rows32", (900, 130, 5), d_qk=512, h_q=32),
    Case("fp16_rows32", (900, 130, 5), dtype=torch.float16, h_q=32, causal=True),
    Case("fp16_d512", (900, 130, 5), dtype=torch.float16, d_qk=512, h_q=7),
    Case("fp16_d512_rows32", (900, 130, 5), dtype=torch.float16, d_qk=512, h_q=16, s_q=2),
    Case("page1", (900, 130, 5, 0, 1), page=1),
    Case("page1_rows32_fp16", (700, 64), page=1, h_q=32, dtype=torch.float16),
    Case("page3", (900, 130, 5, 0, 16), page=3, h_q=8, s_q=2, causal=True),
    Case("page100", (3000, 130, 5), page=100, sink=True),
    Case("page7_bad", (900, 130, 500), page=7, bad_page=True),
    Case("page5_strided_d512", (900, 130, 5), page=5, strided=True, d_qk=512),
    Case("page9_h_kv2", (900, 130), page=9, h_q=32, h_kv=2, parts=66),
    Case("window", (4000, 300, 70, 0, 1, 129), window=128),
    Case("window1_s3", (4000, 300, 70, 0, 2), window=1, h_q=5, s_q=3),
    Case("window_large", (4000, 9000, 70), window=5000, s_q=2, h_q=16, sink=True),
    Case("window_invariant", (4000, 9000, 70), window=1000, policy="batch_invariant"),
    Case("window_page3", (4000, 300, 70), window=200, page=3),
    Case("varlen", (4000, 300, 70, 0, 1, 500), queries=(2, 1, 4, 0, 2, 3, 4), h_q=8, causal=True, sink=True),
    Case("varlen_plain", (4000, 300, 2), queries=(0, 1, 2, 2)),
    Case("sanitize", (200, 65, 0), h_q=3, s_q=2, causal=True, sink=True, parts=4),
    Case("sanitize_rows", (150, 40), page=5, h_q=20, window=70, parts=3),
    Case("varlen_window", (4000, 300, 70, 9), queries=(1, 1, 2, 0, 2), h_q=16, window=100),
    Case("rows64", (4096, 100, 333), h_q=64),
    Case("rows64_one_key", (1,), h_q=64),
    Case("rows64_causal", (700, 100, 12, 0), h_q=16, s_q=4, causal=True, sink=True),
    Case("rows64_h20_s3", (900, 130, 5, 64), h_q=20, s_q=3, causal=True),
    Case("rows64_ring_wraps", (64 * 23 + 5,), h_q=64, parts=1),
    Case("rows64_few_parts", (0, 1, 63, 64, 65, 1000, 0, 2048, 777), h_q=64, parts=3, sink=True),
    Case("rows64_invariant", (0, 300, 5000, 256, 257), h_q=64, policy="batch_invariant", parts=7),
    Case("rows64_many_pieces", (131072,), h_q=64, chunk=128, policy="batch_invariant"),
    Case("rows64_units_shared", (7000, 7000, 7000, 7000), h_q=64, parts=40),
    Case("rows64_uneven_cuts", (5000, 2500, 90), h_q=48, parts=13, unit=24, chunk=240),
    Case("rows64_h_kv2", (900, 130), h_q=128, h_kv=2, parts=66),
    Case("rows64_fp16", (900, 130, 5), dtype=torch.float16, h_q=64, causal=True),
    Case("rows64_d512", (900, 130, 5), d_qk=512, h_q=64),
    Case("rows64_fp16_d512", (900, 130, 5), dtype=torch.float16, d_qk=512, h_q=33),
    Case("rows64_page16", (900, 130, 5, 0, 16), page=16, h_q=64),
    Case("rows64_page40", (900, 130, 5, 0, 16), page=40, h_q=64),
    Case("rows64_page128", (900, 130, 5), page=128, h_q=64),
    Case("rows64_bad_page", (900, 130, 500), bad_page=True, h_q=64),
    Case("rows64_strided", (900, 130, 5), strided=True, h_q=64),
    Case("rows64_large_logits", (3000, 999), scale=8.0, h_q=64),
    Case("rows64_window", (4000, 300, 70, 0, 1, 129), window=128, h_q=64),
    Case("rows64_window_s4", (4000, 9000, 70), window=5000, s_q=4, h_q=16, sink=True),
    Case("rows64_varlen", (4000, 300, 70, 0, 1, 500), queries=(2, 1, 4, 0, 2, 3, 4), h_q=16, causal=True, sink=True),
    Case("rows64_varlen_window", (4000, 300, 70, 9), queries=(1, 1, 3, 0, 2), h_q=20, window=100),
    Case("pairs", (4096,), h_q=128, groups=8, parts=16),
    Case("pairs_one_key", (1,), h_q=128, groups=8, parts=16),
    Case("pairs_batch", (0, 70, 129, 65, 64, 1), h_q=128, groups=8, parts=16),
    Case("pairs_few_parts", (0, 1, 63, 64, 65, 1000, 0, 2048, 777), h_q=64, groups=4, parts=3, sink=True),
    Case("pairs_many_requests", tuple(37 * i % 300 for i in range(40)), h_q=128, groups=8, parts=16),
    Case("pairs_h96", (3000, 77), h_q=96, groups=6, parts=22),
    Case("pairs_s2_causal", (4096, 1, 2, 300), h_q=64, s_q=2, groups=8, parts=16, causal=True, sink=True),
    Case("pairs_s8_causal", (700, 3, 100), h_q=8, s_q=8, groups=4, parts=32, causal=True),
    Case("pairs_window", (4000, 300, 70, 0, 1, 129), h_q=64, s_q=2, groups=8, parts=16, window=200, sink=True),
    Case("pairs_bad_page", (900, 130, 500), bad_page=True, h_q=128, groups=8, parts=16),
    Case("pairs_strided", (900, 130, 5), strided=True, h_q=128, groups=8, parts=16),
    Case("pairs_page16", (900, 130, 5, 0, 16), page=16, h_q=128, groups=8, parts=16),
    Case("pairs_page40", (900, 130, 5, 0, 16), page=40, h_q=128, groups=8, parts=16),
    Case("pairs_page7_bad", (900, 130, 500), page=7, bad_page=True, h_q=128, groups=8, parts=16),
    Case("pairs_large_logits", (3000, 999), scale=8.0, h_q=128, groups=8, parts=16),
    Case(
        "pairs_varlen",
        (4000, 300, 70, 0, 1, 500),
        queries=(2, 1, 4, 0, 2, 3, 4),
        h_q=32,
        groups=8,
        parts=16,
        causal=True,
        sink=True,
    ),
    Case("pairs_varlen_window", (4000, 300, 70, 9), queries=(1, 1, 2, 0, 2), h_q=64, window=100, groups=8, parts=16),
    Case("pairs_unit8", (4096, 100, 333, 0, 7), unit=8, h_q=128, groups=8, parts=16),
    Case("pairs_fp16", (4096, 130, 5), dtype=torch.float16, h_q=128, groups=8, parts=16),
    Case("pairs_d512", (4096, 130, 5), d_qk=512, h_q=128, groups=8, parts=16),
    Case("pairs_fp16_d512", (1000, 130, 5), dtype=torch.float16, d_qk=512, h_q=128, groups=8, parts=16),
    Case("pairs_sanitize", (200, 65, 0), h_q=16, s_q=2, groups=2, causal=True, sink=True, parts=4),
    Case("rows64_dealt", UNEVEN, h_q=64, parts=132, overhead=3, margin=20, merge=13, merge_from=1),
    Case("rows64_dealt_few", UNEVEN[:40], h_q=64, parts=37, overhead=3, margin=20, merge=9, merge_from=1, sink=True),
    Case("rows64_equal", (512,) * 128, h_q=64, parts=132, overhead=3, margin=20, merge=13, merge_from=1),
    Case("rows64_sanitize", (200, 65, 0), h_q=12, s_q=3, causal=True, sink=True, parts=4),
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
        lead = (1, sum(case.queries) + 1) if case.queries else (batch, case.s_q)
        q = torch.randn((*lead, case.h_q, case.d_qk + 8 * case.strided), generator=gen, device="cuda")
        starts = torch.tensor(case.queries or (0,) * (batch + 1)).cumsum(0)
        self.cu_seqlens_q = starts.to(torch.int32).cuda()
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
        if poison and case.window:
            for b, length in enumerate(case.lengths):
                queries = case.queries[b + 1] if case.queries else case.s_q
                before = torch.arange(max(length - queries + 1 - case.window, 0), device="cuda")
                self.kv[self.table[b, before // case.page].long(), before % case.page] = nan
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
    """Plan and decode on buffers made beforehand."""

    def __init__(self, fns: Functions, x: Inputs, kernel: str, *, case: Case | None = None) -> None:
        case = case or x.case
        self.case, self.x = case, x
        self.decode, self.planner = fns[kernel], fns["decode_plan"]
        config = next(config for config in VARIANTS if config.name == kernel)
        batch = len(case.lengths)
        chunks = sum(max(-(-length // case.chunk), 1) for length in case.lengths)
        slots = chunks if case.policy == "batch_invariant" else batch + case.parts
        dev = {"device": "cuda"}
        nan = float("nan")
        self.metadata = torch.full((-(-slots // case.parts), case.parts, 8), -7, dtype=torch.int32, **dev)
        self.num_splits = torch.full((batch + 1,), -7, dtype=torch.int32, **dev)
        self.out = torch.full((*x.q.shape[:3], 512), nan, dtype=case.dtype, **dev)
        self.lse = torch.full((x.q.shape[0], case.h_q, x.q.shape[1]), nan, **dev)
        self.kv = x.kv if case.groups == 1 else x.kv.expand(-1, -1, case.groups, -1)
        self.exchange = torch.full(
            (self.kv.shape[2], slots, config.rows * config.words_per_row), 0x7FC00001, dtype=torch.int32, **dev
        )
        self.marks = marks(config).cuda()
        self.exchange[..., self.marks] = UNWRITTEN
        self.faults = torch.zeros(1, dtype=torch.int32, **dev)
        self.chunk_blocks = case.chunk // case.unit if case.policy == "batch_invariant" else 0
        self.scale_log2 = x.softmax_scale * LOG2_E

    def plan(self) -> None:
        case = self.case
        capacity = self.x.max_pages * case.page
        faults = self.faults
        if case.window:
            capacity, faults = min(capacity, case.window + query_limit(case) + 62), torch.zeros_like(faults)
        merge = case.overhead if case.merge is None else case.merge
        self.planner(self.x.lengths, self.metadata, self.num_splits, faults, capacity, case.unit, case.overhead, merge,
                     case.share, self.chunk_blocks, case.margin, case.merge_from or case.parts + 1)  # fmt: skip

    def run(self) -> None:
        x, case = self.x, self.case
        self.decode(x.q, self.kv, x.table, x.lengths, self.metadata, self.num_splits, self.out, self.lse, self.exchange, x.sink,
                    x.cu_seqlens_q, self.faults, self.scale_log2, int(case.causal or case.window > 0), case.window or NO_WINDOW,
                    query_limit(case) if case.queries else 0, case.unit, self.chunk_blocks, int(case.sink))  # fmt: skip

    def is_ready(self) -> bool:
        """Whether the exchange is as the next launch needs it."""
        return bool((self.exchange[..., self.marks] == UNWRITTEN).all())


def query_limit(case: Case) -> int:
    """Query tokens of a request at most."""
    return max(case.queries[1:]) if case.queries else case.s_q


def oracle(x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """fp64 attention, request by request."""
    case = x.case
    out = torch.zeros((*x.q.shape[:3], 512), dtype=torch.float64, device="cuda")
    lse = torch.full((x.q.shape[0], case.h_q, x.q.shape[1]), -math.inf, dtype=torch.float64, device="cuda")
    starts = x.cu_seqlens_q.tolist()
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
        queries = case.queries[b + 1] if case.queries else case.s_q
        for s in range(queries):
            stop = length - (queries - 1 - s if case.causal or case.window else 0)
            if stop <= 0:
                continue
            first = max(stop - case.window, 0) if case.window else 0
            at = (0, starts[b] + s) if case.queries else (b, s)
            for g in range(case.h_kv):
                heads = slice(g * group, (g + 1) * group)
                scores = x.q[*at, heads].double() @ keys[first:stop, g].T * x.softmax_scale
                scores = scores.masked_fill(~seen[first:stop], -math.inf)
                total = torch.logsumexp(scores, -1)
                weights = torch.nan_to_num(torch.exp(scores - total[:, None]))
                value = weights @ keys[first:stop, g, :512]
                if case.sink:
                    value = value / (1 + torch.exp(x.sink[heads].double() - total))[:, None]
                out[*at, heads] = value
                lse[at[0], heads, at[1]] = total
    return out, lse


def kernel_name(case: Case) -> str:
    rows = next(n for n in (16, 32, 64) if query_limit(case) * case.h_q // (case.h_kv * case.groups) <= n)
    dtype, pairs = "bf16" if case.dtype == torch.bfloat16 else "fp16", case.groups > 1
    return next(c.name for c in VARIANTS if (c.dtype, c.rows, c.d_qk, c.pairs) == (dtype, rows, case.d_qk, pairs))


def check(fns: Functions, case: Case) -> str:
    """Raises AssertionError with the first broken promise; returns a line of figures."""
    x = Inputs(case)
    want, want_lse = oracle(x)
    worst = worst_lse = 0.0
    bits: list[torch.Tensor] = []
    op = Operator(fns, x, kernel_name(case))
    lengths = case.lengths
    if case.window:
        lengths = tuple(min(length, case.window + query_limit(case) + 62) for length in lengths)
    for _ in range(3):  # each launch leaves the exchange as the next one needs it
        op.out.fill_(math.nan)
        op.lse.fill_(math.nan)
        op.plan()
        op.run()
        torch.cuda.synchronize()
        assert op.is_ready(), "exchange: partials left behind"
        plan = plan_decode(lengths, case.parts, policy=case.policy, overhead_blocks=case.overhead, merge_blocks=case.merge,
                           block_tokens=case.unit, min_share_blocks=case.share, margin=case.margin, chunk_tokens=case.chunk,
                           merge_from=case.merge_from, ranges=op.metadata.shape[0])  # fmt: skip
        assert torch.equal(op.metadata.cpu().flatten(0, 1), plan.tile_scheduler_metadata()), "plan: metadata differs"
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
        bits.append(op.out.clone())
    assert torch.equal(bits[0], bits[1]) and torch.equal(bits[0], bits[2]), "runs differ in bits"
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
        if index % 3 == 0:  # as serving has them: what decides between dealing and even cuts is close
            lengths = [max(int(rng.gauss(top / 2, top / 4)), 0) for _ in range(batch)]
        capacity = rng.choice((top, max(top // 2, 64)))
        parts, overhead, share = rng.choice((1, 2, 66, 132, 264)), rng.randint(0, 6), rng.randint(1, 3)
        merge, margin = rng.choice((0, 1, 20, 100)), rng.choice((0, 10, 20, 75, 100))
        paying = rng.choice((None, None, 1, 20, 128))
        policy, chunk = rng.choice(("balanced", "batch_invariant")), rng.choice((64, 256, 4096))
        pieces = sum(max(-(-min(x, capacity) // chunk), 1) for x in lengths)
        ranges = -(-(pieces if policy == "batch_invariant" else batch + parts) // parts)
        metadata = torch.full((ranges, parts, 8), -7, dtype=torch.int32, device="cuda")
        num_splits = torch.full((batch + 1,), -7, dtype=torch.int32, device="cuda")
        faults = torch.zeros(1, dtype=torch.int32, device="cuda")
        fns["decode_plan"](torch.tensor(lengths, dtype=torch.int32, device="cuda"), metadata, num_splits, faults, capacity, 64,
                           overhead, merge, share, chunk // 64 if policy == "batch_invariant" else 0, margin, paying or parts + 1)  # fmt: skip
        plan = plan_decode([min(x, capacity) for x in lengths], parts, policy=policy, overhead_blocks=overhead,
                           merge_blocks=merge, min_share_blocks=share, margin=margin, merge_from=paying, chunk_tokens=chunk,
                           ranges=ranges)  # fmt: skip
        where = f"round {index}: {policy} batch={batch} parts={parts} overhead={overhead} merge={merge} margin={margin} from={paying} share={share} chunk={chunk}"
        assert torch.equal(metadata.cpu().flatten(0, 1), plan.tile_scheduler_metadata()), f"metadata differs, {where}"
        assert torch.equal(num_splits.cpu(), plan.num_splits_tensor()), f"num_splits differs, {where}"
        expected = 2 * any(x < 0 for x in lengths) + 4 * any(x > capacity for x in lengths)
        assert faults.item() == expected, f"faults {faults.item()}, expected {expected}, {where}"
    return f"{rounds} plans equal"


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


def check_invariance(fns: Functions, heads: int = 16) -> str:
    """batch_invariant: a request's bits are the same alone, among others, and on another number of parts."""
    base = Case("invariance", (5000, 70, 0, 1000, 4096), h_q=heads, policy="batch_invariant", chunk=512)
    x = Inputs(base)
    outs = []
    for parts in (132, 5, 1):
        op = Operator(fns, x, kernel_name(base), case=replace(base, parts=parts))
        op.plan()
        op.run()
        outs.append(op.out.clone())
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2]), "bits depend on the number of parts"
    for index, length in enumerate(base.lengths):
        alone = replace(base, lengths=(length,))
        one = Inputs(alone)
        one.q, one.kv, one.table, one.lengths = x.q[index : index + 1], x.kv, x.table[index : index + 1], x.lengths[index : index + 1]  # fmt: skip
        one.max_pages = x.max_pages
        op = Operator(fns, one, kernel_name(alone))
        op.plan()
        op.run()
        assert torch.equal(op.out, outs[0][index : index + 1]), f"request {index}: bits depend on its batch mates"
    return "bits equal alone, among others, on 1, 5 and 132 parts"


def check_graph(fns: Functions, heads: int = 16) -> str:
    """Plan and decode in one graph, lengths changed between replays; then many replays, bit by bit."""
    case = Case("graph", (4096, 3000, 64, 0, 2500, 9000), h_q=heads)
    x = Inputs(case, poison=False)
    x.table.clamp_(0, x.kv.shape[0] - 1)
    op = Operator(fns, x, kernel_name(case))
    graph = graph_of(lambda: (op.plan(), op.run()))
    rng = random.Random(3)
    for _ in range(40):
        lengths = [rng.choice((0, 1, rng.randint(0, 9000), 9000)) for _ in case.lengths]
        x.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
        op.out.fill_(math.nan)
        graph.replay()
        changed = replace(case, lengths=tuple(lengths))
        x.case, x.masked = changed, torch.ones((len(lengths), 9000), dtype=torch.bool, device="cuda")
        want, _ = oracle(x)
        error = (op.out.double() - want).abs().max() / max(want.abs().max().item(), 1e-30)
        assert error < 8e-3, f"lengths {lengths}: error {error:.1e}"
    first = op.out.clone()
    differs = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(10_000):
        graph.replay()
        differs += (op.out != first).any()
    assert differs.item() == 0, f"{differs.item()} replays differ in bits"
    assert op.is_ready(), "exchange: partials left behind"
    return "40 sets of lengths, 10000 equal replays"


def check_nan(fns: Functions, heads: int = 16) -> str:
    """A NaN in a seen key makes its request's rows NaN, whole; the merge of others goes on, and no launch waits for it."""
    case = Case("nan", (5000, 3000, 64), h_q=heads)
    x = Inputs(case)
    want, want_lse = oracle(x)
    x.kv[x.table[0, 3].long(), 5, 0, 100] = math.nan
    op = Operator(fns, x, kernel_name(case))
    op.plan()
    for _ in range(2):
        op.run()
    torch.cuda.synchronize()
    assert op.is_ready(), "exchange: partials left behind"
    assert torch.isnan(op.out[0]).all() and torch.isnan(op.lse[0]).all(), "request 0 is not NaN"
    error = ((op.out[1:].double() - want[1:]).abs().max() / want.abs().max()).item()
    assert error < 8e-3 and torch.allclose(op.lse[1:].double(), want_lse[1:], atol=2e-4), f"others: error {error:.1e}"
    return "NaN stays in its request"


def check_named(fns: Functions, names: list[str]) -> None:
    """One line per check, as soon as it is known."""
    whole: dict[str, Callable[[Functions], str]] = {"plans": check_plans}
    for name, each in (("graph", check_graph), ("invariance", check_invariance), ("nan", check_nan)):
        whole |= {name: each, f"{name}64": partial(each, heads=64)}
    for name in names:
        try:
            text = whole[name](fns) if name in whole else check(fns, next(c for c in CHECKS if c.name == name))
            print(f"ok   {name:24}{text}", flush=True)
        except Exception as error:  # whatever breaks, the checks behind it still say what they have to say
            print(f"FAIL {name:24}{type(error).__name__}: {str(error)[:200]}", flush=True)


def sanitize(library: str, names: list[str], limit: float = 60.0) -> int:
    """compute-sanitizer's four tools over the smallest cases; returns how many found something."""
    names = names or [
        "one_tile",
        "few_tiles_one_part",
        "sanitize",
        "sanitize_rows",
        "rows64_sanitize",
        "pairs_sanitize",
    ]
    dirty = 0
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, __file__, library]
        try:
            done = subprocess.run(
                [*command, "some", *names], capture_output=True, text=True, timeout=limit, check=False
            )
            text, code = done.stdout + done.stderr, done.returncode
        except subprocess.TimeoutExpired as error:
            text, code = str(error.stdout)[-1000:], -1
        dirty += code != 0
        said = [line for line in text.splitlines() if "SUMMARY" in line or line.startswith(("ok ", "FAIL "))]
        print(f"{tool}: exit code {code}", *said, sep="\n", flush=True)
        if code:
            print(text[-1500:], flush=True)
    return dirty


def run_checks(library: str, names: list[str], limit: float = 100.0, processes: int = 12) -> int:
    """Checks dealt to a few processes: a hang or a dead context costs what was left of one. Returns how many fail."""
    whole = ("graph", "graph64", "plans", "invariance", "invariance64", "nan", "nan64")
    names = names or [*whole, *(case.name for case in CHECKS)]
    dealt = [names[i::processes] for i in range(min(processes, len(names)))]
    running = [
        subprocess.Popen(
            [sys.executable, __file__, library, "some", *some],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for some in dealt
    ]
    end = time.monotonic() + limit
    passed = 0
    for process, some in zip(running, dealt, strict=True):
        try:
            text, _ = process.communicate(timeout=max(end - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            text, _ = process.communicate()
        said = [line for line in text.splitlines() if line.startswith(("ok ", "FAIL "))]
        passed += sum(line.startswith("ok ") for line in said)
        print("\n".join(said), flush=True)
        if len(said) < len(some):
            print(f"HANG {some[len(said)]} (or died): {text[-300:]}", flush=True)
    print(f"{len(names) - passed} of {len(names)} did not pass")
    return len(names) - passed


def main() -> int:
    library, mode, *names = sys.argv[1:]
    if mode == "check":
        return 1 if run_checks(library, names) else 0
    if mode == "some":
        check_named(Functions(library), names)
        return 0
    if mode == "sanitize":
        return 1 if sanitize(library, names) else 0
    raise SystemExit(f"unknown mode {mode!r}; use check or sanitize")


if __name__ == "__main__":
    raise SystemExit(main())
