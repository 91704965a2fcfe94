"""The two forms of MLA, on plain tensors: expanded (naive) and absorbed.

Per head h, with the latent c [d_latent] and the RoPE key r [d_rope] of a token:

    expanded   k = (W_UK c, r)         v = W_UV c            attention of h_q heads over their own k and v
    absorbed   q' = (W_UK^T q_nope, q_rope)                  attention of h_q heads over the one row (c, r)
               output = W_UV (sum_j p_j c_j)

Both give the same: q_nope . (W_UK c) = (W_UK^T q_nope) . c. W_UK and W_UV are the halves of each head of `kv_b_proj`.

Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch.nn import functional

Form = Literal["expanded", "absorbed"]


def up_projections(weight: torch.Tensor, d_nope: int, d_v: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(W_UK [h_q, d_nope, d_latent], W_UV [h_q, d_v, d_latent]) of `kv_b_proj.weight`: views, no copies."""
    both = weight.unflatten(0, (-1, d_nope + d_v))
    return both[:, :d_nope], both[:, d_nope:]


def prefill_backend(backend: str | None) -> str | None:
    """Who runs the expanded form where `backend` was asked for: `cute` has no dense prefill, maintained libraries serve it."""
    return None if backend == "cute" else backend


def expand(
    latent: torch.Tensor, rope: torch.Tensor, weight: torch.Tensor, d_nope: int, d_v: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """From latent [n, d_latent] and rope [n, d_rope] to key [n, h_q, d_nope + d_rope] and value [n, h_q, d_v]."""
    both = functional.linear(latent, weight).unflatten(-1, (-1, d_nope + d_v))
    key = torch.cat([both[..., :d_nope], rope[:, None].expand(-1, both.shape[1], -1)], -1)
    return key, both[..., d_nope:]


def absorb(q: torch.Tensor, w_uk: torch.Tensor) -> torch.Tensor:
    """From q [..., h_q, d_nope + d_rope] to [..., h_q, d_latent + d_rope]."""
    d_nope = w_uk.shape[1]
    return torch.cat([torch.einsum("...hd,hdr->...hr", q[..., :d_nope], w_uk), q[..., d_nope:]], -1)


def project(out: torch.Tensor, w_uv: torch.Tensor) -> torch.Tensor:
    """From out [..., h_q, d_latent] of the absorbed attention to [..., h_q, d_v]."""
    return torch.einsum("...hr,hvr->...hv", out, w_uv)


def cheaper_form(
    queries: Sequence[int], keys: Sequence[int], *, d_latent: int, d_rope: int, d_nope: int, d_v: int
) -> Form:
    """The form with fewer FLOPs for causal attention of `queries[i]` new tokens at the end of `keys[i]`.

    Per head, with P attended pairs: expanded 2 P (d_nope + d_rope + d_v) + 2 sum(keys) d_latent (d_nope + d_v),
    absorbed 2 P (2 d_latent + d_rope) + 2 sum(queries) d_latent (d_nope + d_v). At DeepSeek-V3's sizes a prompt
    without context is cheaper expanded, decoding is cheaper absorbed, and a chunk behind a long context changes over
    at about 171 tokens.
    """
    pairs = sum(q * k - q * (q - 1) // 2 for q, k in zip(queries, keys, strict=True))
    per_token = d_latent * (d_nope + d_v)
    expanded = pairs * (d_nope + d_rope + d_v) + sum(keys) * per_token
    absorbed = pairs * (2 * d_latent + d_rope) + sum(queries) * per_token
    return "expanded" if expanded <= absorbed else "absorbed"
