"""Mods that models use. Each is a few lines; copy one and change it."""

from __future__ import annotations

from functools import lru_cache

import torch

from openmla.mods import math as m
from openmla.mods.function import Mod, activation, mask_mod, score_mod


@lru_cache(maxsize=64)
def soft_cap(cap: float) -> Mod:
    """Score becomes cap * tanh(score / cap): it stays within (-cap, cap). Source: Gemma 2 (arXiv 2408.00118), section 2."""

    @score_mod
    def soft_cap(score, b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
        return cap * m.tanh(score * (1.0 / cap))  # one division, by the compiler, not one per score

    return soft_cap


def alibi(slopes: torch.Tensor) -> Mod:
    """Score + slopes[h] * (kv_idx - q_idx); slopes [h_q]. Source: ALiBi (arXiv 2108.12409)."""
    return _alibi.aux(slopes=slopes)


@score_mod
def _alibi(score, b, h, q_idx, kv_idx, slopes):  # type: ignore[no-untyped-def]
    return score + m.load(slopes, h) * (kv_idx - q_idx)


def relative_bias(bias: torch.Tensor) -> Mod:
    """Score + bias[h, min(q_idx - kv_idx, n - 1)]; bias [h_q, n], by distance; beyond n the last column counts."""
    return _relative_bias.aux(bias=bias)


@score_mod
def _relative_bias(score, b, h, q_idx, kv_idx, bias):  # type: ignore[no-untyped-def]
    return score + m.load(bias, h, q_idx - kv_idx)


@lru_cache(maxsize=64)
def sliding_window(window: int) -> Mod:
    """Only the last `window` keys up to the query; kernels skip the tiles in front of them, as for `decode(window=)`."""

    @mask_mod(window=window)
    def sliding_window(b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
        return (kv_idx <= q_idx) & (kv_idx > q_idx - window)

    return sliding_window


def document(documents: torch.Tensor) -> Mod:
    """Only keys of the query's own document; documents [batch, positions] integer: which one each position is in."""
    return _document.aux(documents=documents)


@mask_mod
def _document(b, h, q_idx, kv_idx, documents):  # type: ignore[no-untyped-def]
    return m.load(documents, b, q_idx) == m.load(documents, b, kv_idx)


def tree(ancestors: torch.Tensor, prefix: torch.Tensor) -> Mod:
    """Speculative decoding: all keys of the prefix, and of the draft tokens those on a query's own branch.

    ancestors [batch, s_q, s_q] bool: is draft token j an ancestor of i, or i itself; prefix [batch] int32: keys in
    front of the draft, cache_seqlens - s_q. Source: SpecInfer (arXiv 2305.09781), section 4.
    """
    return _tree.aux(ancestors=ancestors, prefix=prefix)


@mask_mod
def _tree(b, h, q_idx, kv_idx, ancestors, prefix):  # type: ignore[no-untyped-def]
    first = m.load(prefix, b)
    return (kv_idx < first) | ((kv_idx <= q_idx) & m.load(ancestors, b, q_idx - first, kv_idx - first))


def sink_tokens(count: int, window: int) -> Mod:
    """The first `count` keys and the last `window` up to the query. Source: StreamingLLM (arXiv 2309.17453).

    A learned sink without a key, as in gpt-oss, is `attn_sink=` of the operations.
    """
    return _sink_tokens(count, window)


@lru_cache(maxsize=64)
def _sink_tokens(count: int, window: int) -> Mod:
    @mask_mod
    def sink_tokens(b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
        return (kv_idx <= q_idx) & ((kv_idx < count) | (kv_idx > q_idx - window))

    return sink_tokens


@lru_cache(maxsize=64)
def sigmoid(bias: float = 0.0) -> Mod:
    """Sigmoid attention, weight = 1 / (1 + exp(-score - bias)); a bias near -ln(keys) keeps the sum near 1. Source: arXiv 2409.04431."""

    @activation
    def sigmoid(score, b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
        return m.sigmoid(score + bias)

    return sigmoid


LIBRARY = (
    "alibi", "document", "relative_bias", "sigmoid", "sink_tokens", "sliding_window", "soft_cap", "tree",
)  # fmt: skip
