"""Dense prefill by cuDNN's fused attention, through PyTorch: what is fastest on Hopper at 192/128 and needs no package more.

It takes batches whose requests are all of one length, which the numbers of a problem say without a look at the device:
batch * max_seqlen = total, and no request is longer than max_seqlen. Uneven batches are Triton's: cuDNN's form for them
builds a graph at every call (76 ms), and FlashAttention 2, which PyTorch also has, reaches 0.43 of cuDNN's rate
(bench/results/model_speed.jsonl, prefill).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from openmla.backends.base import PrefillOperands, Verdict, require
from openmla.backends.torch.batched import note
from openmla.core.faults import Fault
from openmla.core.problem import PrefillProblem
from openmla.core.target import Target

MAX_COLUMNS = 256
# Whether this file has run on a GPU as it is, against the oracle (tests/gpu/model_speed.py --section prefill). cuDNN's call
# alone has: 613 TFLOPS on an H200, errors of bf16.
IS_PROVED = False


@dataclass(frozen=True)
class PrefillCuDNN:
    """Forward only: out and lse are what every backward pass here needs, and Triton's takes them."""

    op: str = "prefill"
    name: str = "prefill_cudnn"
    backend: str = "torch"

    def supports(self, problem: PrefillProblem, target: Target) -> Verdict:
        """Even batches of bf16 and fp16 on Hopper."""
        even = (problem.batch * problem.max_seqlen_q, problem.batch * problem.max_seqlen_k)
        return require(
            (IS_PROVED, "has not run on a GPU as it is"),
            (target.arch == "sm_90a", f"was measured on sm_90a alone, the target is {target.arch}"),
            (problem.dtype in (torch.bfloat16, torch.float16), f"takes bf16 and fp16, got {problem.dtype}"),
            (not problem.needs_grad, "has no backward pass with the same bits at every run"),
            (
                (problem.total_q, problem.total_k) == even and problem.total_q > 0 and problem.total_k > 0,
                "takes requests of one length: total = batch * max_seqlen, of queries and of keys",
            ),
            (
                not problem.is_causal or problem.max_seqlen_q == problem.max_seqlen_k,
                f"aligns causal masks top-left, so it needs as many queries as keys, got {problem.max_seqlen_q} and {problem.max_seqlen_k}",
            ),
            (problem.h_q == problem.h_kv, f"needs a KV head per query head, got {problem.h_q} and {problem.h_kv}"),
            (
                all(d % 8 == 0 and d <= MAX_COLUMNS for d in (problem.d_qk, problem.d_v)),
                f"takes multiples of 8 columns up to {MAX_COLUMNS}, got {problem.d_qk} and {problem.d_v}",
            ),
            (torch.backends.cudnn.is_available(), "this PyTorch has no cuDNN"),
        )

    def configs(self, problem: PrefillProblem, target: Target) -> Sequence[None]:
        """Which kernel runs is for cuDNN to say."""
        return (None,)

    def compile(self, problem: PrefillProblem, config: None, target: Target) -> None:
        """Nothing before the first launch."""

    def launch(self, compiled: None, problem: PrefillProblem, operands: PrefillOperands, plan: Any) -> None:
        """Out takes over the memory of cuDNN's result: a copy would be one more pass over it.

        Offsets that are not those of even requests set a bit and count as if they were.
        """
        o, batch = operands, problem.batch
        for offsets, each in {id(t): (t, n) for t, n in _sides(problem, o)}.values():
            even = torch.arange(0, batch * each + 1, each, dtype=torch.int32, device=offsets.device)
            note(o.fault_word, offsets != even, Fault.CU_SEQLENS_NOT_MONOTONE)
        q, scale = _positive(o.q, o.softmax_scale)
        q, k, v = (_whole_rows(x).unflatten(0, (batch, -1)).transpose(1, 2) for x in (q, o.k, o.v))
        out, lse = attend(q, k, v, problem.is_causal, scale)
        o.lse.view(problem.h_q, batch, -1).copy_(lse.view(batch, problem.h_q, -1).transpose(0, 1))
        found = out.transpose(1, 2).flatten(0, 1)
        if found.is_contiguous() and o.out.is_contiguous():
            o.out.set_(found)  # type: ignore[call-overload]
        else:
            o.out.copy_(found)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """[batch, heads, s, columns] each -> out [batch, heads, s, d_v] in q's order of memory, lse [batch, heads, s, 1]."""
    with torch.no_grad():
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, is_causal, False, scale=scale
        )
    return out, lse


def _sides(problem: PrefillProblem, operands: PrefillOperands) -> tuple[tuple[torch.Tensor, int], ...]:
    return (
        (operands.cu_seqlens_q, problem.max_seqlen_q),
        (operands.cu_seqlens_k, problem.max_seqlen_k),
    )


def _positive(q: torch.Tensor, scale: float) -> tuple[torch.Tensor, float]:
    """The same scores with a scale above 0, which is what fused softmaxes are made for."""
    if scale > 0:
        return q, scale
    return (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)


def _whole_rows(x: torch.Tensor) -> torch.Tensor:
    """Rows that lie in one piece at multiples of 16 bytes."""
    is_fine = x.stride(2) == 1 and x.data_ptr() % 16 == 0 and all(step % 8 == 0 for step in x.stride()[:2])
    return x if is_fine else x.contiguous()
