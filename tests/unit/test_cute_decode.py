"""The Hopper decode kernels behind the four verbs, with Python stand-ins for the compiled functions.

The stand-ins take the arguments that the compiled functions take and compute with the oracle, so what is tested is
everything around them: verdicts, plan options, scratch, the order of arguments, outputs that are not aligned.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import openmla
from openmla.backends.base import DecodeOperands
from openmla.backends.cute import bundle, decode
from openmla.backends.cute.decode_dense import config as large
from openmla.backends.cute.decode_dense.launch import query_rows
from openmla.backends.cute.decode_dense_small import config as small
from openmla.core.errors import PlanMismatchError, ProblemError, UnsupportedError
from openmla.core.faults import fault_word
from openmla.core.layout import kv_layout
from openmla.core.problem import DecodeProblem
from openmla.core.target import Target
from openmla.distributed.mailbox import Mailbox
from openmla.ops import canary, dispatch, native, observers
from openmla.ops.shares import decode_exchanged
from openmla.reference import attention
from openmla.split.schedule import plan_decode
from openmla.testing import budget

H100 = Target.preset("h100_sxm")
LOG2_E = 1.4426950408889634


def _plan_function(
    cache_seqlens: torch.Tensor, metadata: torch.Tensor, num_splits: torch.Tensor, fault: torch.Tensor, capacity: int,
    block_tokens: int, overhead: int, merge: int, min_share: int, chunk_blocks: int,
) -> None:  # fmt: skip
    lengths = [min(max(n, 0), capacity) for n in cache_seqlens.tolist()]
    plan = plan_decode(
        lengths, metadata.shape[1], policy="batch_invariant" if chunk_blocks else "balanced", block_tokens=block_tokens,
        overhead_blocks=overhead, merge_blocks=merge, min_share_blocks=min_share,
        chunk_tokens=(chunk_blocks or 64) * block_tokens, ranges=metadata.shape[0],
    )  # fmt: skip
    metadata.copy_(plan.tile_scheduler_metadata().view(metadata.shape))
    num_splits.copy_(plan.num_splits_tensor())


def _few_rows_function(
    q: torch.Tensor, kv: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor, metadata: torch.Tensor,
    num_splits: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, exchange: torch.Tensor, sink: torch.Tensor,
    cu_seqlens_q: torch.Tensor, faults: torch.Tensor, scale_log2: float, is_causal: int, window: int, max_s_q: int,
    block_tokens: int, chunk_blocks: int, has_sink: int,
) -> None:  # fmt: skip
    assert int(num_splits[-1]) <= exchange.shape[1], "a slot for every piece"
    assert exchange.shape[0] == kv.shape[2]
    assert bool((exchange[..., ::4] == small.UNWRITTEN).all())
    assert exchange.data_ptr() % 16 == 0
    assert all(step % 8 == 0 for step in out.stride()[:-1])
    exchange.view(*exchange.shape[:2], -1, 4)[..., 1:] = 7  # what a launch may leave behind
    golden = attention.decode(
        q[0] if max_s_q else q, kv, table, lengths, softmax_scale=scale_log2 / LOG2_E, d_v=512,
        is_causal=bool(is_causal), window=0 if window == small.NO_WINDOW else window,
        cu_seqlens_q=cu_seqlens_q if max_s_q else None, attn_sink=sink if has_sink else None,
    )  # fmt: skip
    out.copy_(golden.out)
    lse.copy_(golden.lse)


def _many_rows_function(
    q: torch.Tensor, kv: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor, cu_seqlens_q: torch.Tensor,
    metadata: torch.Tensor, num_splits: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, out_accum: torch.Tensor,
    lse2_accum: torch.Tensor, arrivals: torch.Tensor, sink: torch.Tensor, faults: torch.Tensor, mail: torch.Tensor,
    merged: torch.Tensor, s_q: int, chunk_blocks: int, is_merged: int, is_causal: int, is_varlen: int, has_sink: int, window: int, scale_log2: float,
) -> None:  # fmt: skip
    rows = s_q * q.shape[2]
    assert int(num_splits[-1]) <= out_accum.shape[0] == lse2_accum.shape[0], "a slot for every piece"
    assert out_accum.shape[1:] == (-(-rows // 64), 64 * 512)
    assert lse2_accum.shape[1] == -(-rows // 64) * 64
    assert window == 1 << 30
    assert out_accum.data_ptr() % 16 == 0
    golden = attention.decode(
        q, kv, table, lengths, softmax_scale=scale_log2 / LOG2_E, d_v=512, is_causal=bool(is_causal)
    )
    out_accum.fill_(torch.nan)
    lse2_accum.fill_(torch.nan)
    if is_merged:
        assert arrivals.shape == out_accum.shape[:2] and not arrivals.any()
        out.copy_(golden.out)
        lse.copy_(golden.lse)
        return
    for request in range(q.shape[0]):
        first, last = int(num_splits[request]), int(num_splits[request + 1])
        if last - first == 1:
            out[request], lse[request] = golden.out[request], golden.lse[request]
            continue
        # The first piece saw everything, the others nothing: a merge must bring that out again.
        out_accum[first:last], lse2_accum[first:last] = 0, -torch.inf
        # (in the order of rows, not of the accumulators: kernel and merge are stand-ins both)
        out_accum.view(-1, -(-rows // 64) * 64, 512)[first, :rows] = golden.out[request].flatten(0, 1).float()
        lse2_accum[first, :rows] = golden.lse[request].T.flatten() * LOG2_E


def _exchanged_function(*arguments: Any) -> None:
    """Of a rank whose fellows have no keys: its own rows are the result, and all words are unwritten again."""
    out, lse, mail, merged = arguments[7], arguments[8], arguments[14], arguments[15]
    staged = (out.view(torch.int32), lse.view(torch.int32))
    assert all(bool((words == -1).all()) for words in staged)
    assert mail.tolist()[:4] == [1, 2, 512, 3_000_000_000]
    _many_rows_function(*arguments)
    merged.copy_(torch.cat([words.flatten() for words in staged]))
    for words in staged:
        words.fill_(-1)


def _merge_function(
    out_accum: torch.Tensor, lse2_accum: torch.Tensor, num_splits: torch.Tensor, cu_seqlens_q: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, sink: torch.Tensor, s_q: int, h_kv: int, is_varlen: int, has_sink: int,
) -> None:  # fmt: skip
    rows = s_q * out.shape[2]
    out_accum = out_accum.view(-1, lse2_accum.shape[1], 512)[:, :rows]
    lse2_accum = lse2_accum[:, :rows]
    for request in range(out.shape[0]):
        first, last = int(num_splits[request]), int(num_splits[request + 1])
        if last - first > 1:
            weights = torch.softmax(lse2_accum[first:last] / LOG2_E, 0).nan_to_num()
            out[request] = (weights[..., None] * out_accum[first:last]).sum(0).view(out.shape[1:])
            merged = torch.logsumexp(lse2_accum[first:last] / LOG2_E, 0)
            lse[request] = merged.view(out.shape[1:3]).T


class _Served:
    source, origin = "bundle", Path("stand-in")

    def __init__(self, function: Any) -> None:
        self.function = function


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> decode.FewRows:
    functions = {
        "decode_dense_small": _few_rows_function,
        "decode_dense": _many_rows_function,
        "schedule": _plan_function,
        "decode_dense_merge": _merge_function,
    }

    def serve(family: str, config: Any) -> _Served:
        is_exchanged = getattr(config, "is_exchanged", False)
        return _Served(_exchanged_function if is_exchanged else functions[family])

    monkeypatch.setattr(bundle, "serve", serve)
    monkeypatch.setattr(bundle, "availability", lambda family, config: decode.Verdict())
    return decode.FEW_ROWS


def _operands(**options: Any) -> tuple[DecodeProblem, DecodeOperands]:
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(3, 2, 8, 576, generator=generator).bfloat16()
    kv = torch.randn(30, 64, 1, 576, generator=generator).bfloat16()
    table = torch.randperm(30, generator=generator).to(torch.int32).view(3, 10)
    lengths = torch.tensor([640, 0, 77], dtype=torch.int32)
    sink = torch.randn(8, generator=generator) if options.pop("sink", False) else None
    problem = DecodeProblem.from_tensors(q, kv, table, lengths, attn_sink=sink, **options)
    out = torch.full((3, 2, 8, 512), torch.nan, dtype=torch.bfloat16)
    lse = torch.full((3, 8, 2), torch.nan)
    return problem, DecodeOperands(q, kv, table, lengths, 0.05, out, lse, fault_word(q.device), None, sink)


@pytest.mark.parametrize("policy", ["balanced", "batch_invariant"])
@pytest.mark.parametrize("sink", [False, True], ids=["plain", "sink"])
def test_a_call_reaches_the_kernel_whole(kernel: decode.FewRows, policy: str, sink: bool) -> None:
    problem, operands = _operands(sink=sink, is_causal=True)
    assert kernel.supports(problem, H100)
    compiled = kernel.compile(problem, kernel.configs(problem, H100)[0], H100)
    plan = kernel.plan(compiled, problem, operands.cache_seqlens, policy)
    assert plan.tile_scheduler_metadata.shape == (2 if policy == "balanced" else 1, 128, 8)
    assert (plan.chunk_blocks > 0) == (policy == "batch_invariant")
    workspace = torch.empty(kernel.workspace_bytes(compiled, problem, policy), dtype=torch.uint8)
    kernel.launch(compiled, problem, operands._replace(workspace=workspace), plan)
    golden = attention.decode(
        operands.q, operands.kv_cache, operands.block_table, operands.cache_seqlens, softmax_scale=0.05, d_v=512,
        is_causal=True, attn_sink=operands.attn_sink, with_bounds=True,
    )  # fmt: skip
    budget.check(operands.out, operands.lse, golden, dtype=torch.bfloat16).require()


@pytest.mark.parametrize("policy", ["balanced", "batch_invariant"])
def test_many_rows_are_split_and_merged(kernel: decode.FewRows, policy: str) -> None:
    problem, operands = _operands(is_causal=True)
    many = decode.MANY_ROWS
    q = torch.randn(3, 1, 128, 576, generator=torch.Generator().manual_seed(2)).bfloat16()
    problem = replace(problem, s_q=1, total_q=3, h_q=128)
    out = torch.full((3, 1, 128, 512), torch.nan, dtype=torch.bfloat16)
    operands = operands._replace(q=q, out=out, lse=torch.full((3, 128, 1), torch.nan))
    assert many.supports(problem, H100), many.supports(problem, H100).reasons
    compiled = many.compile(problem, many.configs(problem, H100)[0], H100)
    plan = many.plan(compiled, problem, operands.cache_seqlens, policy)
    assert plan.tile_scheduler_metadata.shape == (2 if policy == "balanced" else 1, 66, 8)
    assert policy == "batch_invariant" or int(plan.num_splits[-1]) > 3, "the case must split a request"
    workspace = torch.empty(many.workspace_bytes(compiled, problem, policy), dtype=torch.uint8)
    many.launch(compiled, problem, operands._replace(workspace=workspace), plan)
    golden = attention.decode(
        q, operands.kv_cache, operands.block_table, operands.cache_seqlens, softmax_scale=0.05, d_v=512,
        is_causal=True, with_bounds=True,
    )  # fmt: skip
    budget.check(out, operands.lse, golden, dtype=torch.bfloat16).require()


@pytest.mark.parametrize("policy", ["balanced", "batch_invariant"])
def test_scratch_stays_with_the_plan_unless_it_is_large(
    kernel: decode.FewRows, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    problem, operands = _operands(is_causal=True)
    h_q, chosen = 128, decode.MANY_ROWS
    problem = replace(problem, h_q=h_q)
    q = torch.randn(3, 2, h_q, 576, generator=torch.Generator().manual_seed(2)).bfloat16()
    outs = [torch.full((3, 2, h_q, 512), torch.nan, dtype=torch.bfloat16) for _ in range(2)]
    operands = operands._replace(q=q, lse=torch.full((3, h_q, 2), torch.nan), workspace=None)
    compiled = chosen.compile(problem, chosen.configs(problem, H100)[0], H100)
    plan = chosen.plan(compiled, problem, operands.cache_seqlens, policy)
    size = chosen.workspace_bytes(compiled, problem, policy)
    assert plan.partials is not None
    assert 4 * sum(each.numel() for each in plan.partials) == size
    for each in plan.partials:
        each.fill_(7)
    workspace = torch.full((size,), 0xFF, dtype=torch.uint8)
    chosen.launch(compiled, problem, operands._replace(out=outs[0], workspace=workspace), plan)
    assert all(bool((each == 7).all()) for each in plan.partials), "the caller's workspace comes first"
    chosen.launch(compiled, problem, operands._replace(out=outs[1]), plan)
    assert not any(bool((each == 7).all()) for each in plan.partials)
    assert torch.equal(*outs)
    monkeypatch.setattr(decode, "PLAN_SCRATCH", size - 1)
    assert chosen.plan(compiled, problem, operands.cache_seqlens, policy).partials is None


@pytest.mark.parametrize("policy", ["balanced", "batch_invariant"])
def test_few_rows_exchange_partials_through_the_plan(kernel: decode.FewRows, policy: str) -> None:
    problem, operands = _operands()
    compiled = kernel.compile(problem, kernel.configs(problem, H100)[0], H100)
    assert kernel.workspace_bytes(compiled, problem, policy) == 0
    plan = kernel.plan(compiled, problem, operands.cache_seqlens, policy)
    assert plan.partials is not None
    (exchange,) = plan.partials
    assert bool((exchange == small.UNWRITTEN).all()), "new plans hold nothing that looks like a partial"
    for _ in range(2):
        kernel.launch(compiled, problem, operands, plan)


@pytest.mark.parametrize("window", [0, 100, 1 << 40])
def test_packed_queries_windows_and_odd_pages_reach_the_kernel(kernel: decode.FewRows, window: int) -> None:
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(7, 8, 576, generator=generator).bfloat16()
    kv = torch.randn(300, 7, 1, 576, generator=generator).bfloat16()
    table = torch.randperm(300, generator=generator).to(torch.int32).view(3, 100)
    lengths, starts = (torch.tensor(x, dtype=torch.int32) for x in ([640, 0, 77], [1, 3, 5, 6]))
    problem = DecodeProblem.from_tensors(
        q, kv, table, lengths, cu_seqlens_q=starts, max_seqlen_q=2, window=window or None, is_causal=True
    )
    assert kernel.supports(problem, H100), kernel.supports(problem, H100).reasons
    compiled = kernel.compile(problem, kernel.configs(problem, H100)[0], H100)
    plan = kernel.plan(compiled, problem, lengths, "balanced")
    if window == 100:  # 100 + 2 - 1 tokens, and up to 63 before them in their tile: three blocks
        blocks = plan.tile_scheduler_metadata
        assert int(blocks[..., 3].max()) <= 3, "the plan must not share out tiles that nobody reads"
    out, lse = torch.full((7, 8, 512), torch.nan, dtype=q.dtype), torch.full((8, 7), torch.nan)
    operands = DecodeOperands(q, kv, table, lengths, 0.05, out, lse, fault_word(q.device), starts)
    kernel.launch(compiled, problem, operands, plan)
    golden = attention.decode(
        q, kv, table, lengths, softmax_scale=0.05, d_v=512, is_causal=True, window=window, cu_seqlens_q=starts,
        with_bounds=True,
    )  # fmt: skip
    budget.check(out, lse, golden, dtype=q.dtype).require()
    assert bool((out[0] == 0).all() & (out[6] == 0).all()), "rows of no request are empty"


def test_many_rows_over_few_keys_become_groups(kernel: decode.FewRows) -> None:
    q = torch.randn(2, 1, 128, 576, generator=torch.Generator().manual_seed(2)).bfloat16()
    kv = torch.randn(40, 64, 1, 576, generator=torch.Generator().manual_seed(3)).bfloat16()
    table, lengths = torch.arange(40, dtype=torch.int32).view(2, 20), torch.tensor([1280, 300], dtype=torch.int32)
    problem = DecodeProblem.from_tensors(q, kv, table, lengths)
    assert kernel.supports(problem, H100)
    compiled = kernel.compile(problem, kernel.configs(problem, H100)[0], H100)
    assert compiled.config.rows == 16
    plan = kernel.plan(compiled, problem, lengths, "balanced")
    assert plan.tile_scheduler_metadata.shape == (2, 132 // 8, 8)
    workspace = torch.empty(kernel.workspace_bytes(compiled, problem, "balanced"), dtype=torch.uint8)
    out, lse = torch.full((2, 1, 128, 512), torch.nan, dtype=q.dtype), torch.full((2, 128, 1), torch.nan)
    operands = DecodeOperands(q, kv, table, lengths, 0.05, out, lse, fault_word(q.device), workspace=workspace)
    kernel.launch(compiled, problem, operands, plan)
    golden = attention.decode(q, kv, table, lengths, softmax_scale=0.05, d_v=512, with_bounds=True)
    budget.check(out, lse, golden, dtype=q.dtype).require()
    assert not kernel.supports(replace(problem, max_pages=65), H100), "more keys are read eight times too often"
    assert not kernel.supports(replace(problem, h_q=136), H100)


def test_batch_invariant_choices_do_not_see_the_batch(kernel: decode.FewRows) -> None:
    usual, _ = _operands()
    few = replace(usual, h_q=128, s_q=1, total_q=3, is_batch_invariant=True)
    many = replace(few, batch=300, total_q=300)
    assert not kernel.supports(few, H100), "grouped only while the batch is small"
    assert not kernel.supports(many, H100)
    assert large.merge_config(few) == large.merge_config(many)
    assert large.merge_config(few) != large.merge_config(replace(few, is_batch_invariant=False))


def test_an_output_that_cannot_take_wide_stores_goes_through_a_copy(kernel: decode.FewRows) -> None:
    problem, operands = _operands()
    odd = torch.full((3, 2, 8, 513), torch.nan, dtype=torch.bfloat16)[..., :512]
    compiled = kernel.compile(problem, kernel.configs(problem, H100)[0], H100)
    workspace = torch.empty(kernel.workspace_bytes(compiled, problem, "balanced"), dtype=torch.uint8)
    plan = kernel.plan(compiled, problem, operands.cache_seqlens, "balanced")
    kernel.launch(compiled, problem, operands._replace(workspace=workspace), plan)
    kernel.launch(compiled, problem, operands._replace(workspace=workspace, out=odd), plan)
    assert torch.equal(odd, operands.out)
    lone = odd[:1].as_strided((1, 1, 8, 512), (513, 3, 513, 1))
    assert decode.with_aligned_out(operands._replace(out=lone)).out is not lone
    lone = torch.empty(8, 512).as_strided((1, 1, 8, 512), (4096, 3, 512, 1))
    assert lone.is_contiguous()
    assert decode.with_aligned_out(operands._replace(out=lone)).out is not lone, "compiled functions check every step"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param({"is_aligned": False}, "multiples of 16 bytes", id="unaligned"),
        pytest.param({"is_scale_positive": False}, "softmax_scale > 0", id="negative-scale"),
        pytest.param({"num_pages": 0}, "at least one page", id="no-pages"),
        pytest.param({"s_q": 5}, "up to 32 query rows", id="many-rows"),
        pytest.param({"total_q": 0}, "at least one query", id="no-queries"),
        pytest.param({"layout": kv_layout("fp8_584")}, "reads bf16 and fp16", id="fp8_584"),
        pytest.param({"layout": kv_layout("fp8_656"), "dtype": torch.float16}, "q in bf16", id="fp8_656-fp16"),
        pytest.param({"dtype": torch.float32}, "reads bf16 and fp16", id="fp32"),
    ],
)
def test_a_refusal_says_why(kernel: decode.FewRows, change: dict[str, Any], reason: str) -> None:
    problem = replace(_operands()[0], **change)
    verdict = kernel.supports(problem, H100)
    assert not verdict
    assert any(reason in each for each in verdict.reasons), verdict.reasons


def test_without_a_compiler_the_reason_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = bundle.env.is_importable
    monkeypatch.setattr(bundle.env, "is_importable", lambda name: name != "cutlass" and real(name))
    problem, _ = _operands()
    (reason, *_) = decode.FEW_ROWS.supports(problem, H100).reasons
    assert "nvidia-cutlass-dsl is not installed" in reason
    assert "OPENMLA_AOT_DIR names no bundle" in reason


def test_alignment_is_read_off_the_tensors() -> None:
    problem, operands = _operands()
    assert problem.is_aligned
    shifted = torch.zeros(operands.q.numel() + 1, dtype=torch.bfloat16)[1:].view(operands.q.shape)
    strided = torch.zeros(30, 64, 1, 580, dtype=torch.bfloat16)[..., :576]
    rest = (operands.block_table, operands.cache_seqlens)
    assert not DecodeProblem.from_tensors(shifted, operands.kv_cache, *rest).is_aligned
    assert not DecodeProblem.from_tensors(operands.q, strided, *rest).is_aligned


@pytest.mark.parametrize(
    ("s_q", "h_kv", "is_varlen"),
    [(1, 1, False), (3, 1, False), (1, 2, False), (3, 2, False), (3, 1, True), (3, 2, True)],
)
def test_rows_of_a_kv_head_are_evenly_spaced(s_q: int, h_kv: int, is_varlen: bool) -> None:
    """What the many-row kernel addresses: row (token, head) at stride(-2), KV heads a whole set of rows apart."""
    wide = torch.arange(2 * s_q * 8 * 40, dtype=torch.float32).view(2, s_q, 8, 40)
    for q in (wide, wide[..., :32], wide.transpose(1, 2).contiguous().transpose(1, 2)):
        asked = q.flatten(0, 1) if is_varlen else q
        got = query_rows(asked, h_kv)
        assert got.shape == asked.shape
        batch, tokens = (1, asked.shape[0]) if is_varlen else (2, s_q)
        got = got.view(batch, tokens, 8, -1) if is_varlen else got
        heads, step = 8 // h_kv, got.stride(2)
        rows = got.as_strided(
            (batch, h_kv, tokens, heads, q.shape[3]), (got.stride(0), tokens * heads * step, heads * step, step, 1)
        )
        assert torch.equal(rows, asked.reshape(batch, tokens, h_kv, heads, -1).transpose(1, 2))


@pytest.fixture
def calls(kernel: decode.FewRows, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The usual way that calls of `openmla.decode` take, on a machine that says it is an H100."""
    monkeypatch.setattr(dispatch.Target, "detect", lambda device: H100)
    monkeypatch.setattr(canary, "try_out", lambda *arguments: "")
    dispatch.forget()
    taken: list[str] = []
    usual = native._prepare_decode
    monkeypatch.setattr(native, "_prepare_decode", lambda *given: (taken.append("usual"), usual(*given))[1])
    yield taken
    dispatch.forget()


def _tensors(h_q: int, pages: int = 30) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(h_q)
    return {
        "q": torch.randn(3, 1, h_q, 576, generator=generator).bfloat16(),
        "kv_cache": torch.randn(pages, 64, 1, 576, generator=generator).bfloat16(),
        "block_table": torch.randperm(pages, generator=generator)[:30].to(torch.int32).view(3, 10),
        "cache_seqlens": torch.tensor([640, 0, 77], dtype=torch.int32),
    }


@pytest.mark.parametrize("h_q", [16, 64, 128])
def test_the_next_layer_of_a_step_goes_straight_to_the_launch(calls: list[str], h_q: int) -> None:
    first = _tensors(h_q)
    second = {**first, "q": first["q"].flip(0), "kv_cache": first["kv_cache"].flip(0)}
    plan = openmla.plan(**first, backend="cute")
    calls.clear()
    for tensors in (first, second, first):
        out, lse = openmla.decode(**tensors, plan=plan, backend="cute")
        golden = attention.decode(*tensors.values(), softmax_scale=576**-0.5, d_v=512)
        assert torch.equal(out, golden.out.bfloat16())
        assert lse is not None and torch.equal(lse, golden.lse.float())
        assert out.is_contiguous() and lse.is_contiguous()
    assert calls == ["usual"], "one call is checked, the others repeat it"
    given = torch.empty_like(out)
    for _ in range(2):
        assert openmla.decode(**second, plan=plan, backend="cute", out=given)[0] is given
    assert calls == ["usual"] * 2


def test_a_repeated_call_is_watched_without_the_usual_way(calls: list[str]) -> None:
    class Watcher:
        def __init__(self) -> None:
            self.seen: list[tuple[Any, ...]] = []
            self.wants = itertools.cycle([False, True]).__next__

        def before(self, prepared: Any, operands: Any, plan: Any) -> str:
            return "begun"

        def after(self, prepared: Any, operands: Any, plan: Any, begun: Any) -> None:
            self.seen.append((prepared.tally.kernel, operands, plan, begun))

    tensors = _tensors(16)
    plan = openmla.plan(**tensors, backend="cute")
    want, _ = openmla.decode(**tensors, plan=plan, backend="cute")
    calls.clear()
    watcher = Watcher()
    observers.add(watcher)
    outs = [openmla.decode(**tensors, plan=plan, backend="cute")[0] for _ in range(4)]
    observers.remove(watcher)
    assert not calls and all(torch.equal(out, want) for out in outs)
    assert [(kernel, begun) for kernel, _, _, begun in watcher.seen] == [("decode_dense_small", "begun")] * 2
    for (_, operands, pieces, _), out in zip(watcher.seen, outs[1::2], strict=True):
        assert operands.out is out and operands.cache_seqlens is tensors["cache_seqlens"] and pieces is plan.pieces


def _changed(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
    """Calls that differ from one that can be repeated in something that a rule looks at."""
    q, kv = tensors["q"], tensors["kv_cache"]
    return {
        "batch": {"q": q[:2]},
        "dtype": {"q": q.half()},
        "heads": {"q": q.repeat(1, 1, 2, 1)},
        "columns": {"kv_cache": kv[..., :512]},
        "q is no tensor": {"q": None},
        "lengths": {"cache_seqlens": tensors["cache_seqlens"].long()},
        "table": {"block_table": tensors["block_table"][:2]},
        "overlap": {"out": q[..., :512]},
        "lse base": {"lse_base": "10"},
    }


@pytest.mark.parametrize("what", list(_changed(_tensors(16))))
def test_what_a_rule_forbids_is_refused_behind_a_repeatable_call(calls: list[str], what: str) -> None:
    tensors = _tensors(16)
    plan = openmla.plan(**tensors, backend="cute")
    for _ in range(2):
        openmla.decode(**tensors, plan=plan, backend="cute", out=torch.empty(3, 1, 16, 512).bfloat16())
    with pytest.raises((ProblemError, PlanMismatchError, UnsupportedError)):
        openmla.decode(**{**tensors, **_changed(tensors)[what]}, plan=plan, backend="cute")  # type: ignore[arg-type]


@pytest.mark.parametrize("behind", [False, True], ids=["out in front", "out behind"])
@pytest.mark.parametrize("name", ["q", "kv_cache", "block_table", "cache_seqlens", "attn_sink"])
def test_a_repeated_call_keeps_its_out_apart_from_every_input(calls: list[str], name: str, behind: bool) -> None:
    """One step of 128 bytes decides: `out` beside an input is taken, `out` over its edge is refused."""
    tensors = {**_tensors(16), "attn_sink": torch.zeros(16)}
    plan = openmla.plan(**tensors, backend="cute")
    want, _ = openmla.decode(**tensors, plan=plan, backend="cute", out=torch.empty(3, 1, 16, 512).bfloat16())
    given, out_steps, steps = tensors[name], want.nbytes // 128, -(-tensors[name].nbytes // 128)
    memory = torch.zeros(128 * (steps + out_steps), dtype=torch.uint8)
    for shift in (0, 1):
        at, out_at = (0, steps - shift) if behind else (out_steps - shift, 0)
        moved = memory[128 * at :][: given.nbytes].view(given.dtype).view(given.shape)
        moved.copy_(given)
        out = memory[128 * out_at :][: want.nbytes].view(want.dtype).view(want.shape)
        again = {**tensors, name: moved}
        if name == "attn_sink":  # a sink of its own is another call, so this one is repeated with itself
            openmla.decode(**again, plan=plan, backend="cute", out=torch.empty_like(want))
        calls.clear()
        if shift:
            with pytest.raises(ProblemError, match="must not overlap"):
                openmla.decode(**again, plan=plan, backend="cute", out=out)
        else:
            assert torch.equal(openmla.decode(**again, plan=plan, backend="cute", out=out)[0], want)
        assert not calls, "it was the repeated call that looked"


def test_options_and_alignment_of_a_repeated_call_are_its_own(calls: list[str]) -> None:
    tensors = _tensors(128)
    plan = openmla.plan(**tensors, backend="cute")
    unaligned = torch.empty(tensors["q"].numel() + 1).bfloat16()[1:].view_as(tensors["q"])
    unaligned.copy_(tensors["q"])
    openmla.decode(**tensors, plan=plan, backend="cute")
    for changed in ({"softmax_scale": 0.5}, {"softmax_scale": None}, {"return_lse": False}, {"lse_base": "2"}):
        out, lse = openmla.decode(**tensors, plan=plan, backend="cute", **changed)  # type: ignore[arg-type]
        golden = attention.decode(*tensors.values(), softmax_scale=changed.get("softmax_scale") or 576**-0.5, d_v=512)
        assert torch.equal(out, golden.out.bfloat16())
        assert (lse is None) == ("return_lse" in changed)
        if "lse_base" in changed:
            assert lse is not None and torch.equal(lse, golden.lse.float() * LOG2_E)
    with pytest.raises(UnsupportedError, match="multiples of 16 bytes"):
        openmla.decode(**{**tensors, "q": unaligned}, plan=plan, backend="cute")


def test_checks_that_watch_every_call_are_not_passed_by(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = _tensors(16)
    plan = openmla.plan(**tensors, backend="cute")
    for mode, ways in (("fast", 1), ("strict", 2), ("strict", 3)):
        monkeypatch.setenv("OPENMLA_CHECKS", mode)
        openmla.decode(**tensors, plan=plan, backend="cute")
        assert calls.count("usual") == ways + 1


def _mailbox(rows: int = 512) -> Mailbox:
    counts = torch.zeros(rows + 1, dtype=torch.int32)
    boxes, content = torch.tensor([64, 128]), torch.full((4 * rows * 257,), -1, dtype=torch.int32)
    staged = torch.full((rows * 257,), -1, dtype=torch.int32)
    return Mailbox(rows, content, boxes, counts[:rows], counts[rows:], 1, staged, None)


def _long(h_q: int) -> dict[str, torch.Tensor]:
    """Tables so wide that the kernel for few rows does not take many heads."""
    tensors = _tensors(h_q)
    return {**tensors, "block_table": tensors["block_table"].repeat(1, 6)}


def _exchanged(tensors: dict[str, torch.Tensor], box: Mailbox, **options: Any) -> Any:
    q = tensors["q"]
    staged_out, staged_lse = box.stage((*q.shape[:3], 512), q.dtype)
    given = {"plan": None, "policy": "balanced", "backend": None, "kv_layout": None} | options
    return decode_exchanged(
        **tensors,
        mail=box.mail(3.0),
        staged_out=staged_out,
        staged_lse=staged_lse,
        d_v=512,
        softmax_scale=0.05,
        **given,
    )


def test_a_rank_s_rows_are_staged_in_its_mailbox_and_the_kernel_exchanges_them(calls: list[str]) -> None:
    tensors, box = _long(128), _mailbox()
    golden = attention.decode(*tensors.values(), softmax_scale=0.05, d_v=512)
    plan = openmla.plan(**tensors)
    for given in (plan, None, plan):
        out, lse = _exchanged(tensors, box, plan=given)
        assert torch.equal(out, golden.out.bfloat16())
        assert torch.equal(lse, golden.lse.float())
        assert bool((box.staged == -1).all())
    assert box.mail(3.0) is box.mail(3.0)
    with pytest.raises(PlanMismatchError):
        _exchanged(_long(64), box, plan=plan)


def test_where_no_kernel_exchanges_nothing_is_launched(calls: list[str]) -> None:
    tensors, box, monkeypatch = _long(128), _mailbox(), pytest.MonkeyPatch()
    assert _exchanged(_tensors(16), box) is None, "the kernel for few rows"
    assert _exchanged(tensors, box, policy="batch_invariant") is None, "a second launch merges"
    assert _exchanged(tensors, box, backend="torch") is None
    monkeypatch.setattr(large, "EXCHANGED_ROWS", 3 * 128 - 1)
    assert _exchanged(tensors, box) is None, "more rows than warps"
    monkeypatch.undo()
    half = {name: x.half() if x.is_floating_point() else x for name, x in tensors.items()}
    assert _exchanged(half, box) is None, "exchanged rows are bf16"
    monkeypatch.setattr(
        bundle, "availability", lambda family, config: decode.Verdict(("none",) * getattr(config, "is_exchanged", 0))
    )
    assert _exchanged(tensors, box) is None, "not in this bundle"
    monkeypatch.undo()
    assert bool((box.staged == -1).all())


def test_a_refused_launch_is_no_other_kernel_s(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another kernel would leave rows that nobody sends."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("kernel launch failed with CUDA error 98: invalid device function")

    monkeypatch.setattr(decode, "launch_large", refuse)
    with pytest.raises(RuntimeError, match="error 98"):
        _exchanged(_long(128), _mailbox())
