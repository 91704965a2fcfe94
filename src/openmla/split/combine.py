"""The merge law: how attention over parts of the keys becomes attention over all of them.

A part is (out, lse): out = softmax-weighted mean of v over the part's keys, lse = log of the sum of exp(logit).
With w_i = base ** (lse_i - max lse):

    out = sum_i w_i out_i / sum_i w_i        lse = max lse + log_base(sum_i w_i)

Parts under this law are a commutative monoid: any grouping gives the same result (up to fp rounding), and the part
of no keys, (0, -inf), changes nothing. So one law serves split-KV, context parallelism, chunked prefill and a
shared prefix. Sums run over parts in order: the same parts give the same bits.

lse is the natural log unless `base` says otherwise; -inf means no keys. The convention +inf for "no keys" (FlashMLA,
FlashAttention 2) is not accepted: a part with lse +inf has a logit of +inf, and the result is NaN. Convert at the
border: `lse.masked_fill(lse == inf, -inf)`.
"""

from __future__ import annotations

import math

import torch

from openmla.core.errors import ProblemError

PARTIAL_DTYPES = (torch.float32, torch.float64)


def merge(outs: torch.Tensor, lses: torch.Tensor, *, base: float = math.e) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge parts stacked along the first dimension, in order.

    Args:
        outs: [parts, ..., d_v] fp32|fp64. Where lse is -inf it may hold anything.
        lses: [parts, ...] same dtype, logarithm to `base`.
        base: e or 2, or any number above 1.

    Returns:
        out [..., d_v] and lse [...]: (0, -inf) where every part is empty, or where there is no part.
        Never NaN for lse in {-inf, finite}, however large, and finite outs.

    Raises:
        ProblemError: shapes or dtypes disagree, or base is not above 1.
    """
    wrong = []
    if outs.dim() < 2 or lses.shape != outs.shape[:-1]:
        wrong.append(
            f"outs must be [parts, ..., d_v] and lses [parts, ...], got {tuple(outs.shape)} and {tuple(lses.shape)}"
        )
    if outs.dtype not in PARTIAL_DTYPES or lses.dtype != outs.dtype:
        wrong.append(
            f"parts must be fp32 or fp64 in one dtype, got {outs.dtype} and {lses.dtype}; keep partial results in fp32"
        )
    if not base > 1:
        wrong.append(f"base must be above 1 (e or 2), got {base!r}")
    if wrong:
        raise ProblemError("merge", wrong)
    if outs.shape[0] == 0:
        return outs.new_zeros(outs.shape[1:]), lses.new_full(lses.shape[1:], -torch.inf)
    ln_base = math.log(base)
    top = lses.amax(0)
    shift = top.masked_fill(top == -torch.inf, 0)
    weights = torch.exp((lses - shift) * ln_base)
    total = torch.zeros_like(top)
    for weight in weights:
        total = total + weight
    # Shares are at most 1, so the sum cannot overflow where the parts do not.
    shares = weights / total.masked_fill(total == 0, 1)
    out = torch.zeros_like(outs[0])
    for share, part, lse in zip(shares, outs, lses, strict=True):
        out = out + (share[..., None] * part).masked_fill((lse == -torch.inf)[..., None], 0)
    return out, shift + torch.log(total) / ln_base


def merge_two(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor, *, base: float = math.e
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge two parts; the arguments and results are those of `merge` without the first dimension."""
    return merge(torch.stack([out_a, out_b]), torch.stack([lse_a, lse_b]), base=base)
