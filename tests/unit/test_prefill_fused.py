"""Dense prefill by cuDNN: which problems it takes, and what it makes of cuDNN's result (here the oracle's, by hand)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from openmla.backends import torch as torch_backend
from openmla.backends.base import PrefillOperands
from openmla.backends.torch import fused
from openmla.core.faults import Fault
from openmla.core.problem import PrefillProblem
from openmla.core.target import Target
from openmla.reference import attention
from openmla.testing import budget

KERNEL = torch_backend.PREFILL_CUDNN
HOPPER = Target.preset("h100_sxm")


def operands(batch: int, s_q: int, s_k: int, scale: float = 0.07, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(batch * s, 3, d, generator=generator).to(torch.bfloat16)
        for s, d in ((s_q, 48), (s_k, 48), (s_k, 32))
    )
    offsets = [torch.arange(0, batch * s + 1, s, dtype=torch.int32) for s in (s_q, s_k)]
    out, lse = torch.full((batch * s_q, 3, 32), torch.nan, dtype=q.dtype), torch.full((3, batch * s_q), torch.nan)
    return PrefillOperands(q, k, v, *offsets, scale, out, lse, torch.zeros(1, dtype=torch.int32))


def problem(o: PrefillOperands, is_causal: bool, s_q: int, s_k: int) -> PrefillProblem:
    return PrefillProblem.from_tensors(*o[:5], s_q, s_k, is_causal=is_causal)


@pytest.fixture
def by_hand(monkeypatch):
    """cuDNN's result and its order of memory, in fp32 on a CPU."""

    def attend(q, k, v, is_causal, scale):
        assert scale > 0
        scores = scale * (q.float() @ k.float().transpose(2, 3))
        if is_causal:
            scores.masked_fill_(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
        out = torch.empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3], dtype=q.dtype).transpose(1, 2)
        out.copy_(scores.softmax(-1) @ v.float())
        return out, scores.logsumexp(-1, keepdim=True)

    monkeypatch.setattr(fused, "attend", attend)


@pytest.mark.parametrize("scale", [0.07, -0.1, 0.0])
@pytest.mark.parametrize(("batch", "s_q", "s_k", "is_causal"), [(1, 9, 9, True), (3, 5, 5, True), (2, 4, 7, False)])
def test_out_and_lse_are_right(by_hand, batch, s_q, s_k, is_causal, scale) -> None:
    o = operands(batch, s_q, s_k, scale)
    golden = attention.prefill(
        o.q, o.k, o.v, o.cu_seqlens_q, o.cu_seqlens_k, softmax_scale=scale, is_causal=is_causal, with_bounds=True
    )
    address = o.out
    KERNEL.launch(None, problem(o, is_causal, s_q, s_k), o, None)
    assert address is o.out
    assert o.out.is_contiguous()
    budget.check(o.out, o.lse, golden, dtype=torch.bfloat16).require(f"{batch=} {s_q=} {s_k=} {scale=}")
    assert int(o.fault_word) == 0


def test_offsets_that_are_not_even_set_a_bit(by_hand) -> None:
    o = operands(2, 4, 4)
    o.cu_seqlens_k[1] = 3
    KERNEL.launch(None, problem(o, True, 4, 4), o, None)
    assert int(o.fault_word) == int(Fault.CU_SEQLENS_NOT_MONOTONE)


def test_rows_that_do_not_lie_in_one_piece_are_copied(by_hand) -> None:
    o = operands(2, 4, 4)
    wide = torch.full((8, 3, 50), torch.nan, dtype=o.q.dtype)
    wide[..., 1:49] = o.q
    KERNEL.launch(None, problem(o, True, 4, 4), o, None)
    loose = o._replace(q=wide[..., 1:49], out=torch.empty_like(o.out), lse=torch.empty_like(o.lse))
    KERNEL.launch(None, problem(o, True, 4, 4), loose, None)
    assert torch.equal(loose.out, o.out)
    assert torch.equal(loose.lse, o.lse)


def test_refusals(monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(fused, "IS_PROVED", True)
    right = replace(problem(operands(2, 4, 4), True, 4, 4), h_q=16, h_kv=16, d_qk=192, d_v=128)
    assert KERNEL.supports(right, HOPPER)
    for changes, reason in (
        ({"max_seqlen_q": 5}, "one length"), ({"total_k": 7}, "one length"), ({"needs_grad": True}, "no backward"),
        ({"dtype": torch.float32}, "bf16 and fp16"), ({"h_kv": 4}, "KV head per query head"), ({"d_v": 100}, "multiples of 8"),
        ({"max_seqlen_q": 2, "total_q": 4}, "top-left"),
    ):  # fmt: skip
        verdict = KERNEL.supports(replace(right, **changes), HOPPER)
        assert any(reason in each for each in verdict.reasons), (changes, verdict)
    assert "sm_90a alone" in str(KERNEL.supports(right, Target.preset("cpu")))
