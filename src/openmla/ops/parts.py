"""Attention over parts of the keys, merged: what `decode_shared_prefix` and context parallelism end in."""

from __future__ import annotations

import torch

from openmla.core import env
from openmla.split import combine


def merge(
    first: torch.Tensor,
    first_lse: torch.Tensor,
    rest: torch.Tensor,
    rest_lse: torch.Tensor,
    *,
    attn_sink: torch.Tensor | None = None,
    lse_factor: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge one result and `more` others over other keys by the law of `openmla.split.combine`, in that order.

    Args:
        first: [batch, s_q, h_q, d_v] bf16|fp16|fp32, any strides but the last.
        first_lse: [batch, h_q, s_q] fp32, natural logarithm, -inf where there is no key; any strides.
        rest: [more, batch, s_q, h_q, d_v] in the dtype of first.
        rest_lse: [more, batch, h_q, s_q] fp32.
        attn_sink: [h_q] fp32; multiplies out by 1 / (1 + exp(sink - lse)).
        lse_factor: what the returned lse is multiplied by: log2(e) for base 2.

    Returns:
        out: [batch, s_q, h_q, d_v] contiguous, in the dtype of first, rounded once from fp32; 0 where no part has a key.
        lse: [batch, h_q, s_q] contiguous fp32; without the sink's share.

    Notes:
        One launch on a GPU with Triton; about 15 launches of PyTorch's operators anywhere else.
        Determinism: same inputs, same bits; the two ways round differently.
    """
    if first.is_cuda and env.is_importable("triton"):
        from openmla.backends.triton import parts

        return parts.merge(first, first_lse, rest, rest_lse, attn_sink, lse_factor)
    outs, lses = torch.cat([first[None], rest]).float(), torch.cat([first_lse[None], rest_lse])
    out, lse = combine.merge(outs, lses.transpose(2, 3))
    if attn_sink is not None:
        out = out * torch.sigmoid(lse - attn_sink)[..., None]
    return out.to(first.dtype), (lse * lse_factor).transpose(1, 2).contiguous()
