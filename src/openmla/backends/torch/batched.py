"""Attention for any device: blocks of query tokens, each with its own gathered keys, up to capacity. No host sync.

The last resort where no kernel fits: every token gathers its own rows, so nothing is shared, and lengths are
masks instead of loop bounds, so that no value has to be known on the host. On a CPU `tiled` is used instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from openmla.core.faults import Fault
from openmla.mods import Attached, Site

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


class Modded(NamedTuple):
    """Mods of a decode, and where its query rows stand; int32."""

    attached: Attached
    b: torch.Tensor  # [total]
    h: torch.Tensor  # [rows]
    q_idx: torch.Tensor  # [total]

    def site(self, tokens: torch.Tensor, first: int, count: int) -> Site:
        """Of scores [t, rows, n]."""
        kv_idx = torch.arange(first, first + count, dtype=torch.int32, device=tokens.device)
        return Site(self.b[tokens, None, None], self.h[:, None], self.q_idx[tokens, None, None], kv_idx)


def attend(
    q: torch.Tensor, read_keys: ReadKeys, capacity: int, d_v: int, softmax_scale: float, modded: Modded | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Online softmax of query tokens that each read their own keys, all arithmetic in fp32.

    Args:
        q: [total, rows, d_qk]; the rows of a token see the same keys.
        read_keys: reads the same stretch of keys for several tokens; keys that are not seen may hold anything.
        capacity: number of keys to walk over.
        d_v: columns of v.
        softmax_scale: multiplies scores.
        modded: functions that change scores, hide keys, or replace softmax.

    Returns:
        out [total, rows, d_v], lse [total, rows], top [total, rows] (largest scaled score), all fp32.
    """
    total, rows, _ = q.shape
    has_activation = modded is not None and modded.attached.form.activation is not None
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
            scores, seen = torch.bmm(wide, k.transpose(1, 2)).mul_(softmax_scale), seen[:, None]
            if modded is not None:
                site = modded.site(tokens, begin, k.shape[1])
                scores = modded.attached.scores(scores, site)
                shown = modded.attached.visible(site)
                if shown is not None:
                    # Rows of a token differ in what they see; a value for one row's sake must not reach the others
                    # as 0 * NaN. Who sees it has a score that is not finite.
                    seen, v = seen & shown, v.masked_fill(~v.isfinite(), 0)
            scores = scores.masked_fill(~seen, -torch.inf)
            higher = torch.maximum(peak, scores.amax(-1))
            if modded is not None and has_activation:
                weights, rescale = modded.attached.weights(scores, site), torch.ones_like(peak)
            else:
                shift = higher.masked_fill(higher == -torch.inf, 0)
                weights, rescale = torch.exp(scores - shift[..., None]), torch.exp(peak - shift)
            mass = mass * rescale + weights.sum(-1)
            acc.mul_(rescale[..., None]).add_(torch.bmm(weights, v))
            peak = higher
        top[block] = peak
        if has_activation:
            lse[block] = torch.log(mass)
            continue
        acc.div_(mass.masked_fill(mass == 0, 1)[..., None])
        lse[block] = peak.masked_fill(peak == -torch.inf, 0) + torch.log(mass)
    return out, lse, top


def apply_sink(out: torch.Tensor, lse: torch.Tensor, attn_sink: torch.Tensor | None) -> torch.Tensor:
    """Out [..., h, d_v] * 1 / (1 + exp(sink - lse)), lse [..., h]; an empty row stays 0 for every sink."""
    if attn_sink is None:
        return out
    share = torch.sigmoid(lse - attn_sink).masked_fill(lse == -torch.inf, 0)
    return out * share[..., None]
