"""Attention for any device: blocks of query tokens, each with its own gathered keys, up to capacity. No host sync.

The last resort where no kernel fits: every token gathers its own rows, so nothing is shared, and lengths are
masks instead of loop bounds, so that no value has to be known on the host. On a CPU `tiles` is used instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from openmla.core.faults import Fault

CHUNK_KEYS = 64  # keys gathered per query token and step
BLOCK_ROWS = 16_384  # gathered rows per step over all tokens of a block: 38 MB of fp32 at d_qk = 576

# (tokens [t] int64, first key, number of keys) -> (k [t, n, d_qk], v [t, n, d_v], seen [t, n] bool)
ReadKeys = Callable[[torch.Tensor, int, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def note(word: torch.Tensor, found: torch.Tensor, fault: Fault) -> None:
    """OR `fault` into the fault word where any element of `found` is true."""
    word |= found.any().to(torch.int32) * int(fault)


def token_blocks(total: int, capacity: int) -> Iterator[slice]:
    """Blocks of query tokens whose gathered rows stay within BLOCK_ROWS."""
    step = max(BLOCK_ROWS // max(min(capacity, CHUNK_KEYS), 1), 1)
    for begin in range(0, total, step):
        yield slice(begin, min(begin + step, total))


def attend(
    q: torch.Tensor, read_keys: ReadKeys, capacity: int, d_v: int, softmax_scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Online softmax of query tokens that each read their own keys, all arithmetic in fp32.

    Args:
        q: [total, rows, d_qk]; the rows of a token see the same keys.
        read_keys: reads the same stretch of keys for several tokens; keys that are not seen may hold anything.
        capacity: number of keys to walk over.
        d_v: columns of v.
        softmax_scale: multiplies scores.

    Returns:
        out [total, rows, d_v], lse [total, rows], top [total, rows] (largest scaled score), all fp32.
    """
    total, rows, _ = q.shape
    out = torch.zeros((total, rows, d_v), dtype=torch.float32, device=q.device)
    lse = torch.full((total, rows), -torch.inf, dtype=torch.float32, device=q.device)
    top = lse.clone()
    for block in token_blocks(total, capacity):
        tokens = torch.arange(block.start, block.stop, device=q.device)
        wide = q[block].float()
        acc, peak, mass = out[block], top[block], torch.zeros_like(lse[block])
        for begin in range(0, capacity, CHUNK_KEYS):
            k, v, seen = read_keys(tokens, begin, min(CHUNK_KEYS, capacity - begin))
            k, v = (x.float().masked_fill(~seen[..., None], 0) for x in (k, v))
            scores = torch.bmm(wide, k.transpose(1, 2)).mul_(softmax_scale).masked_fill_(~seen[:, None], -torch.inf)
            higher = torch.maximum(peak, scores.amax(-1))
            shift = higher.masked_fill(higher == -torch.inf, 0)
            weights = torch.exp(scores - shift[..., None])
            rescale = torch.exp(peak - shift)
            mass = mass * rescale + weights.sum(-1)
            acc.mul_(rescale[..., None]).add_(torch.bmm(weights, v))
            peak = higher
        top[block] = peak
        acc.div_(mass.masked_fill(mass == 0, 1)[..., None])
        lse[block] = peak.masked_fill(peak == -torch.inf, 0) + torch.log(mass)
    return out, lse, top


def apply_sink(out: torch.Tensor, lse: torch.Tensor, attn_sink: torch.Tensor | None) -> torch.Tensor:
    """Out [..., h, d_v] * 1 / (1 + exp(sink - lse)), lse [..., h]; an empty row stays 0 for every sink."""
    if attn_sink is None:
        return out
    share = torch.sigmoid(lse - attn_sink).masked_fill(lse == -torch.inf, 0)
    return out * share[..., None]
