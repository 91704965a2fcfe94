"""Input families. Which numbers are in q and k decides what a test can see, more than its tolerance does.

unit        standard normal: weights differ, none dominates
peaky       q times 4: few keys dominate
outlier     one channel of k (and so of v) is 60 times larger, as in trained models: cancellation, uneven scales
small       normal / 10: almost uniform weights; hides most errors, so it is drawn rarely
zero_q      q = 0: lse = ln n and out = mean v, exactly known
sweep       each row of q points at one key of its request, and the rows walk over all keys in turn
sweep_rope  the same, but only the RoPE columns of q differ from 0: the logit is decided by those
onehot_v    v_jd = [j mod d_v = d] and q = 0: out is the histogram of the keys that were attended
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

FAMILIES: tuple[str, ...] = (
    "unit",
    "peaky",
    "outlier",
    "small",
    "zero_q",
    "sweep",
    "sweep_rope",
    "onehot_v",
)
# `small` is one case in ten at most; the needle families get more, because they see index errors.
WEIGHTS: tuple[int, ...] = (3, 3, 2, 2, 2, 4, 3, 2)

_NEEDLE_LOGIT = 20.0  # exp(20) outweighs every length tested here


def rope_columns(d_qk: int, d_v: int) -> int:
    """Columns that count as RoPE: those behind v, or the last eighth where v covers all."""
    return d_qk - d_v if d_qk > d_v else max(d_qk // 8, 1)


def draw_keys(
    family: str, shape: Sequence[int], d_v: int, generator: torch.Generator, position: torch.Tensor | None = None
) -> torch.Tensor:
    """Keys of one request, fp32 [n, h_kv, d_qk]; the first d_v columns are v.

    Args:
        family: one of FAMILIES.
        shape: (n, h_kv, d_qk).
        d_v: columns of v.
        generator: source of the numbers.
        position: [n] logical position of each key, for `onehot_v`; default 0 to n - 1.
    """
    k = torch.randn(*shape, generator=generator)
    if family == "small":
        k = k / 10
    if family == "outlier":
        k[..., shape[-1] // 3] *= 60
    if family == "onehot_v":
        k[..., :d_v] = draw_values(family, (*shape[:-1], d_v), generator, position)
    return k


def draw_values(
    family: str, shape: Sequence[int], generator: torch.Generator, position: torch.Tensor | None = None
) -> torch.Tensor:
    """Values apart from keys (multi-head prefill), fp32 [n, h_kv, d_v]."""
    if family != "onehot_v":
        return torch.randn(*shape, generator=generator) / (10 if family == "small" else 1)
    n, h_kv, d_v = shape
    index = torch.arange(n) if position is None else position
    return torch.nn.functional.one_hot(index % d_v, d_v)[:, None].expand(n, h_kv, d_v).to(torch.float32)


def draw_queries(
    family: str,
    rows: int,
    h_q: int,
    keys: torch.Tensor,
    d_v: int,
    softmax_scale: float,
    generator: torch.Generator,
) -> torch.Tensor:
    """Queries of one request, fp32 [rows, h_q, d_qk], for keys [n, h_kv, d_qk] as they will be read."""
    n, h_kv, d_qk = keys.shape
    if family in ("zero_q", "onehot_v"):
        return torch.zeros(rows, h_q, d_qk)
    q = torch.randn(rows, h_q, d_qk, generator=generator)
    if family == "small":
        return q / 10
    if family == "peaky":
        return q * 4
    if family not in ("sweep", "sweep_rope") or n == 0:
        return q
    # Row i points at key order[i mod n]; over rows and heads every key is a needle, page edges included.
    order = torch.randperm(n, generator=generator)
    needle = order[torch.arange(rows * h_q) % n].reshape(rows, h_q)
    head = torch.arange(h_q) // (h_q // h_kv)
    direction = keys[needle, head].to(torch.float32)
    if family == "sweep_rope":
        direction = direction.clone()
        direction[..., : d_qk - rope_columns(d_qk, d_v)] = 0
    length = direction.square().sum(-1, keepdim=True).clamp_min(1e-6)
    # A q that is k times a power of two makes every product a square, whose last bits are always 001: fp32 sums of
    # those round down every time, 18 units of 2^-24 on average instead of 0. A tenth of noise breaks the pattern.
    direction = direction * (1 + q / 10)
    return direction * (_NEEDLE_LOGIT / softmax_scale) / length
