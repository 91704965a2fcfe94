"""Varlen prefill over expanded K and V, forward and backward; the differentiable one of the native operations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from openmla.backends.base import PrefillOperands
from openmla.core import faults
from openmla.core.errors import ProblemError
from openmla.core.problem import PrefillProblem
from openmla.ops import dispatch, parts
from openmla.ops.dispatch import LOG2_E, LseBase


def prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    lse_base: LseBase = "e",
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Varlen multi-head attention over expanded K and V (192/128 in DeepSeek-V3): prefill and training. Differentiable.

    out[i, h] = softmax_j(softmax_scale * <q[i, h], k[j, g]>) @ v[j, g],  j over i's own sequence, g = h // (h_q / h_kv)

    Args:
        q: [total_q, h_q, d_qk] bf16|fp16|fp32.
        k: [total_k, h_kv, d_qk], dtype of q.
        v: [total_k, h_kv, d_v], dtype of q.
        cu_seqlens_q: [batch + 1] int32, start of each sequence in q, from 0 to total_q.
        cu_seqlens_k: [batch + 1] int32, the same for k and v.
        max_seqlen_q, max_seqlen_k: longest sequence of each side.
        softmax_scale: default d_qk ** -0.5.
        is_causal: bottom-right aligned within each sequence.
        lse_base: "e" or "2".
        backend: auto, cute, triton or torch; default OPENMLA_BACKEND.

    Returns:
        out: [total_q, h_q, d_v], dtype of q; 0 where a query sees no key.
        lse: [h_q, total_q] fp32; -inf where a query sees no key. Not differentiable.

    Raises:
        ProblemError: the inputs contradict each other; lists all violations.
        UnsupportedError: no permitted backend; lists every reason.

    Notes:
        Determinism: same inputs, same bits, forward and backward. CUDA graphs: forward safe after one warm call.
        Source: FlashAttention-2 (arXiv 2307.08691), algorithms 1 and 2.
    """
    if torch.compiler.is_compiling():
        traced, traced_lse = torch.ops.openmla.prefill(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, is_causal, backend
        )  # fmt: skip
        return traced, traced_lse * LOG2_E if lse_base == "2" else traced_lse
    dispatch.check_lse_base("prefill", lse_base)
    if torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in (q, k, v)):
        out, lse = _Differentiable.apply(  # type: ignore[no-untyped-call]
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, is_causal, backend
        )  # fmt: skip
    else:
        out, lse = prefill_forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, is_causal, backend
        )  # fmt: skip
    return out, lse * LOG2_E if lse_base == "2" else lse


@dataclass(frozen=True)
class KeyChunk:
    """Keys that every query of their request sees, some of each: k [total_k, h_kv, d_qk], v [total_k, h_kv, d_v]."""

    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens_k: torch.Tensor  # [batch + 1] int32
    max_seqlen_k: int


def prefill_behind(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    context: Iterable[KeyChunk],
    *,
    softmax_scale: float | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chunked prefill: new tokens attend causally among themselves, and over a context that comes chunk by chunk.

    The same as `prefill` over all keys at once, but only one chunk's K and V need to be there: at 128 heads of 192 + 128
    columns a token's are 82 KB. Partial results are merged by the law of `openmla.split.combine`, in fp32.

    Args:
        q, k, v: the new tokens, as for `prefill`; k and v have as many tokens as q.
        cu_seqlens, max_seqlen: where each request's new tokens begin, and the longest.
        context: chunks of what came before, in any order; made when it is their turn (a generator).
        softmax_scale, backend: as for `prefill`.

    Returns:
        out: [total_q, h_q, d_v], dtype of q. lse: [h_q, total_q] fp32.

    Raises:
        ProblemError, UnsupportedError: as `prefill`.

    Notes:
        Forward only: gradients raise ProblemError. Determinism: same inputs in the same chunks, same bits.
    """
    if torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in (q, k, v)):
        raise ProblemError("prefill_behind", ["it has no gradient; run it under torch.no_grad(), or call prefill"])
    options: dict[str, Any] = {"softmax_scale": softmax_scale, "backend": backend}
    out, lse = prefill(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, is_causal=True, **options)
    merged, merged_lse = out[None], lse[None]  # one request of total_q tokens
    for chunk in context:
        part, part_lse = prefill(
            q, chunk.k, chunk.v, cu_seqlens, chunk.cu_seqlens_k, max_seqlen, chunk.max_seqlen_k, **options
        )
        merged, merged_lse = parts.merge(merged.float(), merged_lse, part.float()[None, None], part_lse[None, None])
    return merged[0].to(q.dtype), merged_lse[0]


def prefill_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int, max_seqlen_k: int, softmax_scale: float | None, is_causal: bool, backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`prefill` without autograd, lse in base e."""
    prepared = prepare_prefill(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, is_causal, backend
    )  # fmt: skip
    out = q.new_empty((q.shape[0], q.shape[1], v.shape[2]))
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device)
    scale = dispatch.scale_of(softmax_scale, q.shape[2])
    operands = PrefillOperands(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, out, lse, faults.fault_word(q.device))
    dispatch.launch(prepared, operands)
    return out, lse


def prefill_backward(
    grad_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, max_seqlen_q: int, max_seqlen_k: int,
    softmax_scale: float | None, is_causal: bool, backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients (dq, dk, dv) of `prefill_forward`, in the dtypes of q, k and v. Scores are recomputed from lse."""
    prepared = prepare_prefill(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, is_causal, backend, True
    )  # fmt: skip
    scale = dispatch.scale_of(softmax_scale, q.shape[2])
    operands = PrefillOperands(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, out, lse, faults.fault_word(q.device))
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = prepared.kernel.launch_backward(  # type: ignore[attr-defined]
        prepared.compiled, prepared.problem, operands, grad_out.contiguous()
    )
    return gradients


def prepare_prefill(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int, max_seqlen_k: int, softmax_scale: float | None, is_causal: bool, backend: str | None,
    needs_grad: bool = False,
) -> dispatch.Prepared:  # fmt: skip
    """The checked and compiled prefill of these tensors; with needs_grad by a kernel that has a backward pass.

    Both passes need not be the same kernel's: all that goes from one to the other is out and lse.
    """
    tensors = (q, k, v, cu_seqlens_q, cu_seqlens_k)
    return dispatch.prepare(
        ("prefill", *map(dispatch.signature, tensors), max_seqlen_q, max_seqlen_k, is_causal, softmax_scale,
         needs_grad),
        lambda: replace(
            PrefillProblem.from_tensors(
                q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, is_causal=is_causal,
                softmax_scale=softmax_scale,
            ),
            needs_grad=needs_grad,
        ),
        dispatch.device_of(q),
        backend,
    )  # fmt: skip


class _Differentiable(torch.autograd.Function):
    """Saves q, k, v, out and lse; the backward pass recomputes the scores tile by tile."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Arguments of `prefill_forward`."""
        out, lse = prefill_forward(*args)
        q, k, v, cu_seqlens_q, cu_seqlens_k, *rest = args
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k)
        ctx.rest = rest
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor | None, ...]:
        """Gradients of q, k and v."""
        dq, dk, dv = prefill_backward(grads[0], *ctx.saved_tensors, *ctx.rest)
        return (dq, dk, dv, *([None] * (2 + len(ctx.rest))))
