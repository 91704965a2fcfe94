"""Dense prefill by cuDNN and FlashAttention 3: which problems they take, and what is made of their results (here by hand)."""

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


FLASH3 = torch_backend.PREFILL_FLASH3


@pytest.fixture
def flash3_by_hand(monkeypatch):
    """FlashAttention 3 as it is: it believes its offsets, and leaves rows that no request owns as they were."""

    def attend(q, k, v, starts_q, starts_k, max_q, max_k, is_causal, scale):
        assert scale > 0
        assert starts_q.dtype == starts_k.dtype == torch.int32
        for starts, total, longest in ((starts_q, len(q), max_q), (starts_k, len(k), max_k)):
            assert (starts.diff() >= 0).all()
            assert 0 <= starts[0] <= starts[-1] <= total
            assert starts.diff().max() <= longest
        found = attention.prefill(q, k, v, starts_q, starts_k, softmax_scale=scale, is_causal=is_causal)
        out, lse = found.out.to(q.dtype), found.lse.float()
        for left in (slice(None, int(starts_q[0])), slice(int(starts_q[-1]), None)):
            out[left], lse[:, left] = torch.nan, torch.nan
        return out, lse

    monkeypatch.setattr(fused, "attend_flash3", attend)


@pytest.mark.parametrize(
    ("starts_q", "starts_k", "fault"),
    [
        ([0, 4, 10], [0, 4, 10], 0),
        ([0, 7, 10], [0, 1, 9], 0),  # more queries than keys: some see none
        ([0, 0, 10], [0, 5, 5], 0),
        ([2, 4, 9], [1, 4, 9], 0),  # rows of nobody
        ([0, 7, 3], [-5, 99, 4], Fault.CU_SEQLENS_NOT_MONOTONE),
    ],
)
@pytest.mark.parametrize("scale", [0.07, -0.1])
def test_flash3_writes_every_row_whatever_offsets_say(flash3_by_hand, starts_q, starts_k, fault, scale) -> None:
    o = operands(1, 10, 10, scale)
    offsets = [torch.tensor(x, dtype=torch.int32) for x in (starts_q, starts_k)]
    o = o._replace(cu_seqlens_q=offsets[0], cu_seqlens_k=offsets[0] if starts_q == starts_k else offsets[1])
    for is_causal in (True, False):
        asked = PrefillProblem.from_tensors(*o[:5], 3, 3, is_causal=is_causal)  # announced too short
        golden = attention.prefill(
            o.q, o.k, o.v, *offsets, softmax_scale=scale, is_causal=is_causal, with_bounds=True
        )  # fmt: skip
        FLASH3.launch(None, asked, o, None)
        budget.check(o.out, o.lse, golden, dtype=torch.bfloat16).require(f"{starts_q} {starts_k} {is_causal}")
        assert int(o.fault_word) == int(fault)


@pytest.mark.parametrize("is_shared", [True, False])
def test_flash3_gets_the_offsets_of_an_even_batch_whatever_was_given(flash3_by_hand, is_shared) -> None:
    o = operands(3, 4, 4)
    o = o._replace(cu_seqlens_k=o.cu_seqlens_q) if is_shared else o
    golden = attention.prefill(*o[:5], softmax_scale=0.07, is_causal=True, with_bounds=True)
    for wrong in (None, -9, 1 << 30):
        if wrong is not None:
            o.cu_seqlens_k[2] = wrong
        FLASH3.launch(None, problem(o, True, 4, 4), o, None)
        budget.check(o.out, o.lse, golden, dtype=torch.bfloat16).require(f"{wrong}")
        assert int(o.fault_word) == (0 if wrong is None else int(Fault.CU_SEQLENS_NOT_MONOTONE))


def test_flash3_serves_where_it_is_installed_and_says_what_it_does_not_take(monkeypatch) -> None:
    right = replace(problem(operands(2, 4, 4), True, 4, 4), h_q=16, h_kv=16, d_qk=192, d_v=128)
    monkeypatch.setattr(fused, "FLASH3", "not_installed_here")
    assert "pip install --no-deps fa3-fwd" in str(FLASH3.supports(right, HOPPER))
    monkeypatch.setattr(fused, "FLASH3", "json")
    assert FLASH3.supports(right, HOPPER)
    assert FLASH3.supports(replace(right, h_kv=4, total_k=7), HOPPER)
    for changes, reason in (
        ({"needs_grad": True}, "no backward"), ({"dtype": torch.float16}, "bf16 alone"), ({"d_v": 64}, "192/128"),
        ({"total_k": 0}, "at least one"),
    ):  # fmt: skip
        assert reason in str(FLASH3.supports(replace(right, **changes), HOPPER)), changes
    assert "sm_90a alone" in str(FLASH3.supports(right, Target.preset("cpu")))
