"""Dense decode in Triton: hostile cases, every way to cut them, and the promises about values that are wrong."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import openmla
from openmla.core.faults import Fault
from openmla.core.layout import BYTE_LAYOUT_NAMES, kv_layout
from openmla.reference import attention
from openmla.reference.quant import quantise
from openmla.testing import budget
from openmla.testing.cases import Case, draw, native_arguments

PLAIN = Case(
    op="decode", seed=1, family="unit", dtype=torch.float16, h_q=4, h_kv=1, d_qk=40, d_v=32, softmax_scale=40**-0.5,
    seqlens_q=(2, 2, 2), seqlens_k=(90, 0, 33), is_causal=True, page_size=16,
)  # fmt: skip


def case_of(**changes: Any) -> Case:
    return dataclasses.replace(PLAIN, **changes)


def narrow(seeds: range, op: str) -> list[Case]:
    """Drawn cases as fp16 where they are bf16, which the interpreter cannot multiply; none that takes seconds."""
    drawn = [draw(seed, op) for seed in seeds]
    drawn = [dataclasses.replace(c, dtype=torch.float16) if c.dtype == torch.bfloat16 else c for c in drawn]
    return [c for c in drawn if max(c.seqlens_k, default=0) <= 150 or c.op != "decode"]


@pytest.mark.parametrize("sms", [1, 7, 33])
def test_hostile_cases(sms, machine, judged):
    machine(sms)
    for case in narrow(range(sms * 100, sms * 100 + 8), "decode"):
        judged(case)


@pytest.mark.parametrize("layout", [*BYTE_LAYOUT_NAMES, "fp16_576", "fp32_576", "fp16_512"])
def test_every_layout(layout, machine, judged):
    machine(5)
    found = kv_layout(layout)
    dtype = found.dtype if found.dtype != torch.uint8 else torch.float16
    name = layout if found.is_quantised else ""
    judged(
        case_of(
            d_qk=found.d_qk, d_v=found.d_v, layout=name, dtype=dtype, seqlens_k=(50, 7), seqlens_q=(1, 1), page_size=16
        )
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("descale", [0.02, -0.02, None])
@pytest.mark.parametrize("page_size", [16, 5])
def test_codes_whose_scale_belongs_to_the_call(dtype, descale, page_size, machine):
    machine(5)
    generator = torch.Generator().manual_seed(3)
    pages = -(-64 // page_size)
    cache = quantise(50 * torch.randn(3 * pages, page_size, 1, 576, generator=generator), "fp8_576")
    q = torch.randn(3, 2, 4, 576, generator=generator).to(dtype)
    table = torch.randperm(3 * pages, generator=generator).int().view(3, pages)
    lengths = torch.tensor([50, 64, 7], dtype=torch.int32)
    scales = {} if descale is None else {"descale_k": torch.tensor([descale])}
    options = {"softmax_scale": 0.001 if descale is None else 0.05, "is_causal": True, **scales}
    out, lse = openmla.decode(q, cache, table, lengths, kv_layout="fp8_576", backend="triton", **options)
    golden = attention.decode(q, cache, table, lengths, d_v=512, layout="fp8_576", with_bounds=True, **options)
    report = budget.check(out, lse, golden, dtype=dtype)
    assert report.passed, str(report)


@pytest.mark.parametrize("changes", [{}, {"d_qk": 32}, {"softmax_scale": 0.0, "h_kv": 2}, {"layout": "fp8_656"}])
def test_scores_kept_apart(changes, machine, judged, monkeypatch):
    """The form of the tile that Hopper gets; here it is the same arithmetic in another order of blocks."""
    from openmla.backends.triton import launch

    monkeypatch.setattr(launch, "kept_apart", lambda config, problem, target: "all")
    machine(4)
    sizes = {"d_qk": 576, "d_v": 512, "seqlens_q": (1,), "seqlens_k": (40,)} if "layout" in changes else {}
    judged(case_of(has_sink=True, **{**changes, **sizes}))


@pytest.mark.parametrize("page_size", [1, 3, 16, 32, 61])
@pytest.mark.parametrize("h_kv", [1, 2])
def test_page_sizes(page_size, h_kv, machine, judged):
    machine(4)
    judged(case_of(page_size=page_size, h_kv=h_kv, has_sink=True))


@pytest.mark.parametrize("window", [1, 5, 16, 40, 1000])
@pytest.mark.parametrize("sms", [1, 9])
def test_windows_and_their_splits(window, sms, machine, judged):
    machine(sms)
    judged(case_of(window=window, seqlens_q=(3, 3, 3), seqlens_k=(97, 2, 64)))


def test_a_nan_key_stays_with_the_rows_that_see_it(machine, judged):
    """The key that only the last queries see holds NaN: causal rows in the same tile must not meet it as 0 * NaN."""
    machine(1)
    case = case_of(seqlens_q=(4,), seqlens_k=(35,), h_q=2)
    operands = case.tensors()
    table, cache = operands["block_table"], operands["kv_cache"]
    for position in (33, 34):
        cache[table[0, position // 16].long(), position % 16] = torch.nan
    out, lse, _ = judged(case, operands)
    assert bool(out[0, :2].isfinite().all())
    assert bool(out[0, 2:].isnan().all())
    assert bool(lse[0, :, 2:].isnan().all())


@pytest.mark.parametrize("seqlens_q", [(2, 0, 1), (0, 0, 0), (1, 3, 2)])
def test_varlen_queries(seqlens_q, machine, judged):
    machine(6)
    judged(case_of(is_varlen=True, seqlens_q=seqlens_q, has_sink=True))


@pytest.mark.parametrize("offsets", [[0, 2, 9, 4], [1, 2, 3, 4], [0, 3, 1, 6], [0, 0, 0, 0], [-5, 2, 4, 6]])
def test_offsets_that_do_not_rise_leave_empty_rows(offsets, machine):
    """Rows of nobody are written as empty ones; all others as if the offsets had been clamped."""
    machine(6)
    case = case_of(is_varlen=True, seqlens_q=(2, 2, 2))
    operands = case.tensors()
    operands["cu_seqlens_q"] = torch.tensor(offsets, dtype=torch.int32)
    given = {**native_arguments("decode", operands), "max_seqlen_q": 9}
    out, lse = openmla.decode(**given, out=torch.full((6, 4, 32), torch.nan, dtype=torch.float16), backend="triton")
    assert Fault.CU_SEQLENS_NOT_MONOTONE in openmla.check_errors()
    budget.check(out, lse, case.golden(operands), dtype=case.dtype).require()


def test_tokens_without_any_request_are_empty(machine):
    machine(6)
    operands = case_of(is_varlen=True, seqlens_q=(2, 2, 2)).tensors()
    for name in ("block_table", "cache_seqlens"):
        operands[name] = operands[name][:0]
    operands["cu_seqlens_q"] = torch.zeros(1, dtype=torch.int32)
    out, lse = openmla.decode(
        **{**native_arguments("decode", operands), "max_seqlen_q": 0},
        out=torch.full((6, 4, 32), torch.nan, dtype=torch.float16),
        backend="triton",
    )
    assert not out.any()
    assert bool((lse == -torch.inf).all())


def test_a_query_longer_than_announced_is_empty_beyond(machine):
    machine(6)
    case = case_of(is_varlen=True, is_causal=False, seqlens_q=(1, 4, 1), seqlens_k=(20, 30, 40))
    operands = case.tensors()
    given = {**native_arguments("decode", operands), "max_seqlen_q": 2}
    out, lse = openmla.decode(**given, out=torch.full((6, 4, 32), torch.nan, dtype=torch.float16), backend="triton")
    assert openmla.check_errors() == (Fault.CU_SEQLENS_NOT_MONOTONE,)
    assert not out[3:5].any()
    assert bool((lse[:, 3:5] == -torch.inf).all())
    golden = case.golden(operands)
    torch.testing.assert_close(out[[0, 1, 2, 5]].double(), golden.out[[0, 1, 2, 5]], rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("policy", ["balanced", "batch_invariant"])
@pytest.mark.parametrize("lengths", [(90, 0, 33), (1, 1, 96), (96, 96, 96), (0, 0, 0), (17, 200, -4)])
def test_any_plan_is_correct_for_any_lengths(policy, lengths, machine, monkeypatch):
    """A plan may be older than the lengths, also inside a CUDA graph: then it is unbalanced, not wrong."""
    from openmla.backends.triton import launch

    monkeypatch.setattr(launch, "CHUNK_TOKENS", 32)
    machine(5)
    case = case_of(seqlens_k=(90, 40, 33))
    operands = case.tensors()
    plan = openmla.plan(**_planned(operands), policy=policy, backend="triton")
    capacity = operands["block_table"].shape[1] * 16
    operands["block_table"].clamp_(0, operands["kv_cache"].shape[0] - 1)
    operands["kv_cache"].nan_to_num_(nan=0.5)
    operands["cache_seqlens"] = torch.tensor([min(each, capacity + 5) for each in lengths], dtype=torch.int32)
    object.__setattr__(plan, "cache_seqlens", operands["cache_seqlens"])  # the check of the CPU path looks away
    given = native_arguments("decode", operands)
    out, lse = openmla.decode(**given, plan=plan, backend="triton")
    budget.check(out, lse, case.golden(operands), dtype=case.dtype).require(f"{policy} {lengths}")


def _planned(operands: dict[str, Any]) -> dict[str, Any]:
    given = native_arguments("decode", operands)
    return {name: value for name, value in given.items() if name != "softmax_scale"}


def test_batch_invariant_rows_do_not_depend_on_their_mates(machine, monkeypatch):
    from openmla.backends.triton import launch

    monkeypatch.setattr(launch, "CHUNK_TOKENS", 32)
    machine(5)
    case = case_of(seqlens_k=(90, 64, 33))
    given = native_arguments("decode", case.tensors())
    out, lse = openmla.decode(**given, policy="batch_invariant", backend="triton")
    rows = ("q", "block_table", "cache_seqlens")
    for request in range(3):
        alone = {k: v[request : request + 1] if k in rows else v for k, v in given.items()}
        mine, own = openmla.decode(**alone, policy="batch_invariant", backend="triton")
        assert torch.equal(mine[0], out[request])
        assert torch.equal(own[0], lse[request])


def test_the_same_input_gives_the_same_bits(machine):
    machine(7)
    given = native_arguments("decode", case_of().tensors())
    first = openmla.decode(**given, backend="triton")
    again = openmla.decode(**given, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-6, 50.0])
def test_any_scale(scale, machine, judged):
    machine(3)
    judged(case_of(softmax_scale=scale, family="unit"))


def test_enormous_logits_keep_weights_that_sum_to_one(machine):
    """Logits of 1e12: the largest weight is exactly 1, so out is a mean of values and lse the largest logit."""
    machine(3)
    case = case_of(dtype=torch.float32, softmax_scale=1e11)
    operands = case.tensors()
    out, lse = openmla.decode(**native_arguments("decode", operands), backend="triton")
    golden = attention.decode(**operands, precision="fp64")
    assert bool(out.isfinite().all())
    torch.testing.assert_close(lse.double(), golden.lse, rtol=1e-5, atol=0)
    torch.testing.assert_close(out.double(), golden.out, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sign", [1, -1])
def test_splits_of_very_different_weight(sign, machine, judged):
    """One split outweighs the other by 2^460: neither an overflow nor a share of the light one may remain."""
    machine(4)
    case = case_of(
        dtype=torch.float32, softmax_scale=1.0, seqlens_q=(1,), seqlens_k=(96,), is_causal=False, family="small"
    )
    operands = case.tensors()
    operands["q"].fill_(1.0)
    plan = openmla.plan(**_planned(operands), backend="triton")
    assert int(plan.num_splits[-1]) == 4, "nothing is tested unless the request is split"
    slots = operands["block_table"][0].long()
    for index, page in enumerate(slots[:6].tolist()):
        operands["kv_cache"][page].add_(4.0 * sign if index < 3 else -4.0 * sign)
    out, _, _ = judged(case, operands)
    assert bool((out[0].mean(-1) > 3).all())


def test_every_row_is_written_and_nothing_else(machine):
    machine(6)
    case = case_of(seqlens_k=(0, 0, 5))
    given = native_arguments("decode", case.tensors())
    pool = torch.full((3, 2, 4, 48), 7.0, dtype=torch.float16)
    openmla.decode(**given, out=pool[..., 8:40], backend="triton")
    assert bool((pool[..., :8] == 7).all() & (pool[..., 40:] == 7).all())
    assert not pool[:2, :, :, 8:40].any()


def test_scratch_of_the_caller_is_enough(machine):
    machine(9)
    given = native_arguments("decode", case_of().tensors())
    size = openmla.workspace_bytes(**{k: v for k, v in given.items() if k != "softmax_scale"}, backend="triton")
    base = torch.full((size + 1024,), 255, dtype=torch.uint8)
    begin = -base.data_ptr() % 256
    mine = base[begin : begin + size]
    out, lse = openmla.decode(**given, workspace=mine, backend="triton")
    expected = openmla.decode(**given, backend="triton")
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
    assert bool((base[begin + size :] == 255).all())
