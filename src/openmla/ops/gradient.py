"""Autograd of `prefill` in eager mode; compiled graphs use the registration in `openmla.ops.library`."""

from __future__ import annotations

from typing import Any

import torch

from openmla.ops import native


class PrefillFunction(torch.autograd.Function):
    """Saves q, k, v, out and lse; the backward pass recomputes the scores tile by tile."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Arguments of `native.prefill_forward`."""
        out, lse = native.prefill_forward(*args)
        q, k, v, cu_seqlens_q, cu_seqlens_k, *rest = args
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k)
        ctx.rest = rest
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor | None, ...]:
        """Gradients of q, k and v."""
        dq, dk, dv = native.prefill_backward(grads[0], *ctx.saved_tensors, *ctx.rest)
        return (dq, dk, dv, *([None] * (2 + len(ctx.rest))))
