"""Gradients of the varlen prefill, recomputed from lse tile by tile.

With P = exp(s - lse), D = rowsum(dO * O):

    dV = P^T dO      dS = P * (dO V^T - D)      dQ = scale * dS K      dK = scale * dS^T Q

Sums run over tiles in a fixed order in fp32, so the same inputs give the same bits. One thread does one KV head of
one request; its fp32 dQ, dK and dV are the extra memory.
"""

from __future__ import annotations

from collections import deque
from itertools import product

import torch

from openmla.backends.base import PrefillOperands
from openmla.backends.torch import workers
from openmla.backends.torch.tiled import rising_offsets
from openmla.core.problem import PrefillProblem

BLOCK_QUERIES = 128  # query tokens per tile
BLOCK_KEYS = 256  # keys per tile; with 128 queries the five score-sized fp32 tiles take 128 KB each


def prefill_backward(
    problem: PrefillProblem, operands: PrefillOperands, grad_out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the forward whose result is `operands.out` and `operands.lse`.

    Args:
        problem: the forward's problem.
        operands: q [total_q, h_q, d_qk], k [total_k, h_kv, d_qk], v [total_k, h_kv, d_v], out, lse [h_q, total_q].
        grad_out: [total_q, h_q, d_v].

    Returns:
        dq, dk, dv, shaped and typed like q, k, v; zero for rows that no request owns.
    """
    q, k, v = operands.q, operands.k, operands.v
    offsets_q = rising_offsets(operands.cu_seqlens_q.tolist(), problem.total_q)
    offsets_k = rising_offsets(operands.cu_seqlens_k.tolist(), problem.total_k)
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    group = problem.h_q // problem.h_kv
    heads_of_requests = deque(product(range(problem.batch), range(problem.h_kv)))

    def work() -> None:
        while heads_of_requests:
            try:
                request, head = heads_of_requests.popleft()
            except IndexError:
                return
            queries = slice(offsets_q[request], offsets_q[request + 1])
            keys = slice(offsets_k[request], offsets_k[request + 1])
            heads = slice(head * group, (head + 1) * group)
            dq[queries, heads], dk[keys, head], dv[keys, head] = _one_head(
                q[queries, heads], k[keys, head], v[keys, head], operands.out[queries, heads],
                operands.lse[heads, queries], grad_out[queries, heads], operands.softmax_scale, problem.is_causal,
            )  # fmt: skip

    if q.is_cpu:
        workers.run(work, min(torch.get_num_threads(), max(len(heads_of_requests), 1)))
    else:
        work()
    return dq, dk, dv


def _one_head(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, grad: torch.Tensor,
    scale: float, is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """One request and KV head: q [s_q, group, d_qk], k [s_k, d_qk], v [s_k, d_v], lse [group, s_q]; fp32 results."""
    s_q, group, d_qk = q.shape
    s_k = k.shape[0]
    dq = torch.zeros((s_q, group, d_qk), device=q.device)
    dk, dv = (torch.zeros(x.shape, device=q.device) for x in (k, v))
    for first in range(0, s_q, BLOCK_QUERIES):
        rows = slice(first, min(first + BLOCK_QUERIES, s_q))
        wide_q, wide_grad = (x[rows].float().flatten(0, 1) for x in (q, grad))
        # A row that saw nothing has lse -inf; exp(s + inf) would be inf, and its gradients are zero.
        row_lse = lse[:, rows].t().reshape(-1, 1)
        row_lse = row_lse.masked_fill(row_lse == -torch.inf, torch.inf)
        delta = (wide_grad * out[rows].float().flatten(0, 1)).sum(1, keepdim=True)
        last = min(s_k, s_k - s_q + rows.stop) if is_causal else s_k
        for begin in range(0, max(last, 0), BLOCK_KEYS):
            tile = slice(begin, min(begin + BLOCK_KEYS, s_k))
            wide_k, wide_v = k[tile].float(), v[tile].float()
            weights = torch.exp(scale * (wide_q @ wide_k.t()) - row_lse)
            if is_causal and tile.stop > s_k - s_q + first + 1:
                ends = s_k - s_q + 1 + torch.arange(rows.start, rows.stop, device=q.device)
                hidden = torch.arange(tile.start, tile.stop, device=q.device) >= ends[:, None]
                weights.masked_fill_(hidden.repeat_interleave(group, 0), 0)
            dv[tile] += weights.t() @ wide_grad
            slope = weights.mul_(wide_grad @ wide_v.t() - delta).mul_(scale)
            dq[rows] += (slope @ wide_k).view(-1, group, d_qk)
            dk[tile] += slope.t() @ wide_q
    return dq, dk, dv
