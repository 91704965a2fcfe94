"""HINT: a page id outside the cache"""

from typing import Any

import torch

from openmla.backends.base import Verdict, require
from openmla.backends.torch import DECODE


class Mine:
    """Decode of one token per request over a plain paged cache."""

    op, backend, name = "decode", "torch", "mine"
    workspace_bytes, plan = DECODE.workspace_bytes, DECODE.plan  # no scratch; one piece per request

    def supports(self, problem: Any, target: Any) -> Verdict:
        """What it takes; every (holds, why not) that does not hold is a reason."""
        return require(
            (problem.s_q == 1 and not problem.is_varlen, "takes one token per request"),
            (not problem.layout.is_quantised, "takes plain caches"),
            (not problem.window, "has no window"),
            (problem.mods is None, "inlines no mods"),
        )

    def configs(self, problem: Any, target: Any) -> tuple[str, ...]:
        """One way."""
        return ("only",)

    def compile(self, problem: Any, config: str, target: Any) -> str:
        """Nothing to do."""
        return config

    def launch(self, compiled: str, problem: Any, operands: Any, plan: Any) -> None:
        """Write operands.out [batch, 1, h_q, d_v] and operands.lse [batch, h_q, 1] in full; see DecodeOperands."""
        page_size = operands.kv_cache.shape[1]
        group, capacity = problem.h_q // problem.h_kv, operands.block_table.shape[1] * page_size
        for b in range(problem.batch):
            places = torch.arange(min(max(int(operands.cache_seqlens[b]), 0), capacity))
            pages = operands.block_table[b].long()[places // page_size]
            keys = operands.kv_cache[pages, places % page_size].float()  # [n, h_kv, d_qk]
            for head in range(problem.h_kv):
                mine = slice(head * group, (head + 1) * group)
                out, lse = self._attend(
                    operands.q[b, 0, mine].float(), keys[:, head], operands.softmax_scale, problem.d_v
                )
                if operands.attn_sink is not None:
                    out = out * torch.sigmoid(lse - operands.attn_sink[mine])[:, None].masked_fill(
                        lse[:, None] == -torch.inf, 0
                    )
                operands.lse[b, mine, 0] = lse
                operands.out[b, 0, mine] = out.to(operands.out.dtype)

    @staticmethod
    def _attend(q: torch.Tensor, keys: torch.Tensor, scale: float, d_v: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse) of q [rows, d_qk] over keys [n, d_qk]; (0, -inf) where there is none."""
        if not keys.shape[0]:
            return q.new_zeros(q.shape[0], d_v), q.new_full(q.shape[:1], -torch.inf)
        scores = scale * (q @ keys.T)
        top = scores.amax(-1)
        shift = top.masked_fill(top == -torch.inf, 0)
        weights = torch.exp(scores - shift[:, None])
        total = weights.sum(-1)
        out = (weights @ keys[:, :d_v]) / total.masked_fill(total == 0, 1)[:, None]
        return out, shift + torch.log(total)


MINE = Mine()
