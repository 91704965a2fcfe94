"""Dense prefill by maintained libraries: FlashAttention 3 where it is installed, else cuDNN through PyTorch.

Both compute out and lse, forward only: that is all that a backward pass here needs, and Triton's takes them. Which one is
faster was measured (bench/results/model_speed.jsonl, dense_prefill).

Even batches, whose requests are all of one length, are told by the numbers of a problem without a look at the device:
batch * max_seqlen = total, and no request is longer than max_seqlen. Their offsets are known; given ones that differ set a
bit on the device, which is six small launches.

FlashAttention 3 (package fa3-fwd, built for bf16 alone) takes uneven batches too. Their offsets are made safe on the device,
and get a request without keys before the first and behind the last one, so that every row of out is written whatever they
say: thirteen small launches.

cuDNN takes even batches. Uneven ones are Triton's without FlashAttention 3: cuDNN's form for them builds a graph at every
call (76 ms), and FlashAttention 2, which PyTorch also has, reaches 0.43 of cuDNN's rate.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

from openmla.backends.base import PrefillOperands, Verdict, require
from openmla.backends.torch.batched import note
from openmla.core import env
from openmla.core.faults import Fault
from openmla.core.problem import PrefillProblem
from openmla.core.target import Target

MAX_COLUMNS = 256


FLASH3 = "fa3_fwd_interface"


@dataclass(frozen=True)
class PrefillFlash3:
    """FlashAttention 3, any batch.

    A row that sees a NaN has NaN in out, as everywhere, but lse -inf: FlashAttention does not tell it from an empty row.
    """

    op: str = "prefill"
    name: str = "prefill_flash3"
    backend: str = "torch"

    def supports(self, problem: PrefillProblem, target: Target) -> Verdict:
        """Where it is installed: bf16, 192 columns of q and k, 128 of v, on Hopper."""
        return require(
            (env.is_importable(FLASH3), "FlashAttention 3 is not installed: pip install --no-deps fa3-fwd"),
            (target.arch == "sm_90a", f"was measured on sm_90a alone, the target is {target.arch}"),
            (problem.dtype == torch.bfloat16, f"fa3-fwd is built for bf16 alone, got {problem.dtype}"),
            (not problem.needs_grad, "fa3-fwd has no backward pass"),
            (problem.total_q > 0 and problem.total_k > 0, "needs at least one query and one key"),
            ((problem.d_qk, problem.d_v) == (192, 128), f"takes 192/128 columns, got {problem.d_qk}/{problem.d_v}"),
        )

    def configs(self, problem: PrefillProblem, target: Target) -> Sequence[None]:
        """Which kernel runs is for the library to say."""
        return (None,)

    def compile(self, problem: PrefillProblem, config: None, target: Target) -> None:
        """Nothing before the first launch."""

    def launch(self, compiled: None, problem: PrefillProblem, operands: PrefillOperands, plan: Any) -> None:
        """Out and lse take over the memory of the library's results."""
        o = operands
        if _is_even(problem):
            starts_q, starts_k = _even_starts(problem, o)
            longest = (problem.max_seqlen_q, problem.max_seqlen_k)
        else:
            starts_q, starts_k = _safe_starts(problem, o)
            # Its grids may be sized by these: a max_seqlen that is too small must not leave rows out.
            longest = (problem.total_q, problem.total_k)
        q, scale = _positive(o.q, o.softmax_scale)
        q, k, v = map(_whole_rows, (q, o.k, o.v))
        out, lse = attend_flash3(q, k, v, starts_q, starts_k, *longest, problem.is_causal, scale)
        _take_over(o.out, out)
        _take_over(o.lse, lse)


def attend_flash3(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts_q: torch.Tensor, starts_k: torch.Tensor, max_q: int,
    max_k: int, is_causal: bool, scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """[total_q, h_q, d_v] and lse [h_q, total_q] of offsets that are right."""
    varlen = importlib.import_module(FLASH3).flash_attn_varlen_func
    with torch.no_grad():
        found: tuple[torch.Tensor, torch.Tensor] = varlen(
            q, k, v, starts_q, starts_k, max_q, max_k, softmax_scale=scale, causal=is_causal, return_attn_probs=True
        )[:2]
    return found


def _is_even(problem: PrefillProblem) -> bool:
    """Whether all requests have max_seqlen queries and max_seqlen keys, as the numbers of the problem say."""
    even = (problem.batch * problem.max_seqlen_q, problem.batch * problem.max_seqlen_k)
    return even == (problem.total_q, problem.total_k) and problem.total_q > 0 and problem.total_k > 0


def _even_starts(problem: PrefillProblem, o: PrefillOperands) -> tuple[torch.Tensor, torch.Tensor]:
    """Offsets of an even batch, of queries and of keys; given ones that differ set a bit and count as if they were these."""
    found: dict[tuple[int, int], torch.Tensor] = {}
    sides = ((o.cu_seqlens_q, problem.max_seqlen_q), (o.cu_seqlens_k, problem.max_seqlen_k))
    for offsets, each in sides:
        if (id(offsets), each) not in found:
            even = torch.arange(0, problem.batch * each + 1, each, dtype=torch.int32, device=offsets.device)
            note(o.fault_word, offsets != even, Fault.CU_SEQLENS_NOT_MONOTONE)
            found[id(offsets), each] = even
    starts_q, starts_k = (found[id(offsets), each] for offsets, each in sides)
    return starts_q, starts_k


def _safe_starts(problem: PrefillProblem, o: PrefillOperands) -> tuple[torch.Tensor, torch.Tensor]:
    """Offsets of queries and keys that can be believed. Rows that no request owns belong to one without keys, in front or behind."""
    safe_q = _safe(o.cu_seqlens_q, problem.total_q, o.fault_word)
    is_same = o.cu_seqlens_k is o.cu_seqlens_q and problem.total_k == problem.total_q
    safe_k = safe_q if is_same else _safe(o.cu_seqlens_k, problem.total_k, o.fault_word)
    starts_q = pad(pad(safe_q, (1, 0), value=0), (0, 1), value=problem.total_q)
    return starts_q, torch.cat([safe_k[:1], safe_k, safe_k[-1:]])


def _safe(offsets: torch.Tensor, total: int, fault_word: torch.Tensor) -> torch.Tensor:
    """Offsets that never fall and stay in [0, total]; a bit for those that were not so."""
    safe = offsets.clamp(0, total).cummax(0).values
    note(fault_word, safe != offsets, Fault.CU_SEQLENS_NOT_MONOTONE)
    return safe


def _take_over(target: torch.Tensor, found: torch.Tensor) -> None:
    """`target` becomes `found`: a copy would be one more pass over it."""
    if found.is_contiguous() and target.is_contiguous():
        target.set_(found)  # type: ignore[call-overload]
    else:
        target.copy_(found)


@dataclass(frozen=True)
class PrefillCuDNN:
    """cuDNN's, even batches."""

    op: str = "prefill"
    name: str = "prefill_cudnn"
    backend: str = "torch"

    def supports(self, problem: PrefillProblem, target: Target) -> Verdict:
        """Even batches of bf16 and fp16 on Hopper."""
        return require(
            (target.arch == "sm_90a", f"was measured on sm_90a alone, the target is {target.arch}"),
            (problem.dtype in (torch.bfloat16, torch.float16), f"takes bf16 and fp16, got {problem.dtype}"),
            (not problem.needs_grad, "has no backward pass with the same bits at every run"),
            (
                _is_even(problem),
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
        _even_starts(problem, o)
        q, scale = _positive(o.q, o.softmax_scale)
        q, k, v = (_whole_rows(x).unflatten(0, (batch, -1)).transpose(1, 2) for x in (q, o.k, o.v))
        out, lse = attend(q, k, v, problem.is_causal, scale)
        o.lse.view(problem.h_q, batch, -1).copy_(lse.view(batch, problem.h_q, -1).transpose(0, 1))
        _take_over(o.out, out.transpose(1, 2).flatten(0, 1))


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """[batch, heads, s, columns] each -> out [batch, heads, s, d_v] in q's order of memory, lse [batch, heads, s, 1]."""
    with torch.no_grad():
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, is_causal, False, scale=scale
        )
    return out, lse


def _positive(q: torch.Tensor, scale: float) -> tuple[torch.Tensor, float]:
    """The same scores with a scale above 0, which is what fused softmaxes are made for."""
    if scale > 0:
        return q, scale
    return (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)


def _whole_rows(x: torch.Tensor) -> torch.Tensor:
    """Rows that lie in one piece at multiples of 16 bytes."""
    is_fine = x.stride(2) == 1 and x.data_ptr() % 16 == 0 and all(step % 8 == 0 for step in x.stride()[:2])
    return x if is_fine else x.contiguous()
