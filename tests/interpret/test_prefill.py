"""Varlen prefill in Triton, forward and backward: hostile cases, offsets that are wrong, gradients against fp64."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import openmla
from openmla.core.faults import Fault
from openmla.reference import attention
from openmla.testing import budget
from openmla.testing.cases import Case, draw, native_arguments

CASE = Case(
    op="prefill", seed=5, family="unit", dtype=torch.float16, h_q=4, h_kv=2, d_qk=48, d_v=32, softmax_scale=48**-0.5,
    seqlens_q=(33, 1, 20), seqlens_k=(50, 5, 12), is_causal=True, is_varlen=True,
)  # fmt: skip


def case_of(**changes: Any) -> Case:
    return dataclasses.replace(CASE, **changes)


def test_hostile_cases(judged):
    drawn = [draw(seed, "prefill") for seed in range(30)]
    drawn = [dataclasses.replace(c, dtype=torch.float16) if c.dtype == torch.bfloat16 else c for c in drawn]
    small = [
        c for c in drawn if c.d_qk >= 16 and max(c.seqlens_k, default=0) * max(c.seqlens_q, default=0) * c.h_q <= 60_000
    ]
    assert len(small) >= 8
    for case in small[:12]:
        judged(case)


@pytest.mark.parametrize(("d_qk", "d_v"), [(192, 128), (128, 128), (40, 24), (16, 16), (31, 5)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_sizes(d_qk, d_v, dtype, judged):
    judged(case_of(d_qk=d_qk, d_v=d_v, dtype=dtype, seqlens_q=(20, 3), seqlens_k=(20, 33), softmax_scale=d_qk**-0.5))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("h_kv", [1, 2, 4])
def test_heads_and_masks(is_causal, h_kv, judged):
    judged(case_of(is_causal=is_causal, h_kv=h_kv))


@pytest.mark.parametrize("scale", [0.0, -0.3, 50.0])
def test_any_scale(scale, judged):
    judged(case_of(softmax_scale=scale))


def test_a_value_that_is_not_finite_stays_with_the_rows_that_see_it(judged):
    """v is apart from k here: its key has an ordinary score, so nothing but the value itself says that it is odd."""
    operands = case_of(seqlens_q=(20,), seqlens_k=(20,)).tensors()
    operands["v"][13, 0, 3] = torch.nan
    operands["v"][14, 1, 5] = torch.inf
    out, _, _ = judged(case_of(seqlens_q=(20,), seqlens_k=(20,)), operands)
    assert bool(out[:13].isfinite().all())
    assert bool(out[13:, :2, 3].isnan().all())
    assert bool((out[14:, 2:, 5] == torch.inf).all())
    assert bool(out[13:, :, 6:].isfinite().all())


def test_a_nan_key_stays_with_the_rows_that_see_it(judged):
    operands = case_of(seqlens_q=(20,), seqlens_k=(20,)).tensors()
    operands["k"][17] = torch.nan
    out, lse, _ = judged(case_of(seqlens_q=(20,), seqlens_k=(20,)), operands)
    assert bool(out[:17].isfinite().all())
    assert bool(out[17:].isnan().all() & lse[:, 17:].isnan().all())


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k"])
@pytest.mark.parametrize("offsets", [[0, 33, 34, 54], [2, 30, 20, 40], [0, 60, 10, 54], [0, 0, 0, 0], [-5, 9, 99, 54]])
def test_offsets_that_do_not_rise(name, offsets, judged):
    """Rows of nobody are empty ones, all others as if offsets had been clamped; and the fault is that of the torch path."""
    operands = CASE.tensors()
    total = operands["q" if name == "cu_seqlens_q" else "k"].shape[0]
    operands[name] = torch.tensor(offsets, dtype=torch.int32)
    expected = () if offsets == [0, 33, 34, 54] and total == 54 else (Fault.CU_SEQLENS_NOT_MONOTONE,)
    openmla.check_errors()
    arguments = native_arguments("prefill", operands)
    out, lse = openmla.prefill(**arguments, backend="triton")
    assert openmla.check_errors() == expected
    openmla.prefill(**arguments, backend="torch")
    assert openmla.check_errors() == expected
    budget.check(out, lse, CASE.golden(operands), dtype=CASE.dtype).require(str(offsets))


def test_longer_sequences_than_announced_are_computed(judged):
    operands = CASE.tensors()
    arguments = {**native_arguments("prefill", operands), "max_seqlen_q": 5, "max_seqlen_k": 5}
    out, lse = openmla.prefill(**arguments, backend="triton")
    budget.check(out, lse, CASE.golden(operands), dtype=CASE.dtype).require()


def test_no_requests_and_no_rows():
    operands = CASE.tensors()
    arguments = native_arguments("prefill", operands)
    nobody = torch.zeros(1, dtype=torch.int32)
    out, lse = openmla.prefill(**{**arguments, "cu_seqlens_q": nobody, "cu_seqlens_k": nobody}, backend="triton")
    assert not out.any()
    assert bool((lse == -torch.inf).all())
    openmla.check_errors()
    out, lse = openmla.prefill(**{**arguments, "q": arguments["q"][:0]}, backend="triton")
    assert out.shape[0] == lse.shape[1] == 0
    openmla.check_errors()


# ------------------------------------------------------------------------------------------------- gradients


def gradients(operands: dict[str, Any], grad_out: torch.Tensor, backend: str, **changes: Any) -> list[torch.Tensor]:
    arguments = {**native_arguments("prefill", operands), **changes}
    leaves = {name: arguments[name].detach().clone().requires_grad_() for name in ("q", "k", "v")}
    out, _ = openmla.prefill(**{**arguments, **leaves}, backend=backend)
    return list(torch.autograd.grad(out, list(leaves.values()), grad_out))


def exact(case: Case, operands: dict[str, Any], grad_out: torch.Tensor) -> list[torch.Tensor]:
    wide = {name: operands[name].double().requires_grad_() for name in ("q", "k", "v")}
    golden = attention.prefill(
        **{**operands, **wide}, precision="fp64"
    )  # fmt: skip
    return list(torch.autograd.grad(golden.out, list(wide.values()), grad_out.double()))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("h_kv", [1, 4])
@pytest.mark.parametrize(
    ("d_qk", "d_v", "dtype"), [(48, 32, torch.float32), (192, 128, torch.float16), (128, 128, torch.float16)]
)
def test_gradients_match_autograd_in_fp64(is_causal, h_kv, d_qk, d_v, dtype):
    case = case_of(
        is_causal=is_causal, h_kv=h_kv, d_qk=d_qk, d_v=d_v, dtype=dtype, softmax_scale=d_qk**-0.5,
        seqlens_q=(20, 1, 18), seqlens_k=(35, 5, 12),
    )  # fmt: skip
    operands = case.tensors()
    grad_out = torch.randn(operands["q"].shape[0], 4, d_v, generator=torch.Generator().manual_seed(1)).to(dtype)
    # fp16 rounds out, weights, slopes and the result: roundings of 2^-12 and less against gradients of order 1.
    limit = 1e-5 if dtype == torch.float32 else 2.0**-9
    found = gradients(operands, grad_out, "triton")
    for mine, golden in zip(found, exact(case, operands, grad_out), strict=True):
        assert mine.dtype == dtype
        assert float((mine.double() - golden).abs().max()) <= limit * (1 + float(golden.abs().max()))
        assert bool(golden.any()), "nothing is tested where the gradient is zero"


def test_gradients_of_rows_that_see_nothing_are_zero():
    """Causal with more queries than keys: the first rows see no key."""
    case = case_of(seqlens_q=(20,), seqlens_k=(5,), dtype=torch.float32)
    operands = case.tensors()
    grad_out = torch.ones(20, 4, 32)
    dq, dk, dv = gradients(operands, grad_out, "triton")
    assert not dq[:15].any()
    assert bool(dq[16:].any() & dk.any() & dv.any())
    assert bool(dq.isfinite().all())


def test_gradients_of_rows_of_nobody_are_zero():
    operands = dataclasses.replace(CASE, dtype=torch.float32).tensors()
    operands["cu_seqlens_q"] = torch.tensor([3, 20, 20, 30], dtype=torch.int32)
    operands["cu_seqlens_k"] = torch.tensor([4, 20, 30, 40], dtype=torch.int32)
    dq, dk, dv = gradients(operands, torch.ones(54, 4, 32), "triton")
    openmla.check_errors()
    assert not dq[:3].any() and not dq[30:].any() and bool(dq[3:20].any())
    assert not dk[:4].any() and not dv[40:].any() and bool(dv[30:40].any())


def test_the_same_input_gives_the_same_bits_with_a_grid_that_is_too_small_too():
    operands = CASE.tensors()
    grad_out = torch.ones(54, 4, 32, dtype=torch.float16)
    first, again = (gradients(operands, grad_out, "triton") for _ in range(2))
    short = gradients(operands, grad_out, "triton", max_seqlen_q=1, max_seqlen_k=1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, short, strict=True))
