"""The Hopper decode kernels behind the four verbs, with Python stand-ins for the compiled functions.

The stand-ins take the arguments that the compiled functions take and compute with the oracle, so what is tested is
everything around them: verdicts, plan options, scratch, the order of arguments, outputs that are not aligned.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cute_stand_ins import decode_tensors

import openmla
from openmla.backends.base import DecodeOperands
from openmla.backends.cute import bundle, decode
from openmla.backends.cute.decode_dense import config as large
from openmla.backends.cute.decode_dense.launch import query_rows
from openmla.backends.cute.decode_dense_small import config as small
from openmla.core.errors import PlanMismatchError
from openmla.core.faults import fault_word
from openmla.core.layout import kv_layout
from openmla.core.problem import DecodeProblem
from openmla.core.target import Target
from openmla.distributed.mailbox import Mailbox
from openmla.ops.shares import decode_exchanged
from openmla.reference import attention
from openmla.testing import budget

H100 = Target.preset("h100_sxm")


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


@pytest.mark.parametrize(("tokens", "pieces"), [(64 * 64, 32), (4 * 64, 2), (64, 1), (500 * 64, 63)])
def test_a_part_has_two_tiles_at_least(kernel: decode.FewRows, tokens: int, pieces: int) -> None:
    problem, _ = _operands(is_causal=True)
    problem = replace(problem, batch=1, s_q=1, total_q=1, h_q=128, max_pages=2000)
    compiled = decode.MANY_ROWS.compile(problem, decode.MANY_ROWS.configs(problem, H100)[0], H100)
    plan = decode.MANY_ROWS.plan(compiled, problem, torch.tensor([tokens], dtype=torch.int32), "balanced")
    assert int(plan.num_splits[-1]) == pieces


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
    assert kernel.supports(replace(problem, max_pages=96), H100)
    assert not kernel.supports(replace(problem, max_pages=97), H100), "more keys are read eight times too often"
    whole = replace(problem, batch=16, total_q=16, max_pages=16)
    assert kernel.supports(whole, H100), "a part has whole requests"
    assert not kernel.supports(replace(whole, batch=15, total_q=15, max_pages=17), H100)
    assert kernel.supports(replace(problem, h_q=64, max_pages=64), H100)
    assert not kernel.supports(replace(problem, h_q=64, max_pages=65), H100)
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


def _mailbox(rows: int = 512) -> Mailbox:
    counts = torch.zeros(rows + 1, dtype=torch.int32)
    boxes, content = torch.tensor([64, 128]), torch.full((4 * rows * 257,), -1, dtype=torch.int32)
    staged = torch.full((rows * 257,), -1, dtype=torch.int32)
    return Mailbox(rows, content, boxes, counts[:rows], counts[rows:], 1, staged, None)


def _long(h_q: int) -> dict[str, torch.Tensor]:
    """Tables so wide that the kernel for few rows does not take many heads."""
    tensors = decode_tensors(h_q)
    return {**tensors, "block_table": tensors["block_table"].repeat(1, 8)}


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
    assert _exchanged(decode_tensors(16), box) is None, "the kernel for few rows"
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
