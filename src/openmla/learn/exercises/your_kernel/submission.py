"""Finish `launch`. What stands here is right for tidy inputs only."""

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
        num_pages = operands.kv_cache.shape[0]
        group = problem.h_q // problem.h_kv
        for b in range(problem.batch):
            length = int(operands.cache_seqlens[b])
            pages = operands.block_table[b].long().clamp(0, num_pages - 1)
            keys = operands.kv_cache[pages].flatten(0, 1).float()  # [max_pages * page_size, h_kv, d_qk]
            seen = torch.arange(keys.shape[0]) < length
            for head in range(problem.h_kv):
                mine = slice(head * group, (head + 1) * group)
                scores = operands.softmax_scale * (operands.q[b, 0, mine].float() @ keys[:, head].T)
                scores = scores.masked_fill(~seen, -torch.inf)
                operands.lse[b, mine, 0] = scores.logsumexp(-1)
                out = scores.softmax(-1) @ keys[:, head, : problem.d_v]
                operands.out[b, 0, mine] = out.to(operands.out.dtype)


MINE = Mine()
