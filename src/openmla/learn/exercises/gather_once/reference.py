"""A submission that passes: valid pages only, one copy for all heads, matrix products."""

import torch


def decode(
    q: torch.Tensor, kv_cache: torch.Tensor, block_table: torch.Tensor, cache_seqlens: list[int], softmax_scale: float
) -> torch.Tensor:
    """Out [batch, h_q, 512]."""
    out = q.new_empty(*q.shape[:2], 512)
    page_size = kv_cache.shape[1]
    for b, length in enumerate(cache_seqlens):
        pages = block_table[b, : -(-length // page_size)]
        rows = kv_cache[pages].flatten(0, 1)[:length]
        out[b] = (softmax_scale * (q[b] @ rows.T)).softmax(-1) @ rows[:, :512]
    return out
