"""Cost: FLOPs and bytes of a problem. The only formulas; scheduler, roofline, benchmarks and reports all use these.

An attended (query row, key) pair costs 2 * d_qk FLOPs for the score and 2 * d_v for the weighted sum. Bytes are the
fewest that must move: every attended KV row once per request and KV head, q once, out and lse once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from openmla.core.problem import (
    AppendProblem,
    DecodeProblem,
    PrefillProblem,
    Problem,
    SparseDecodeProblem,
    SparsePrefillProblem,
)


@dataclass(frozen=True)
class Cost:
    """Work of one call."""

    flops: int
    bytes: int

    @property
    def intensity(self) -> float:
        """FLOP per byte; above a machine's ridge point the call is compute-bound."""
        return self.flops / self.bytes if self.bytes else 0.0


def _attended(s_q: int, s_k: int, is_causal: bool, window: int = 0) -> int:
    """(query token, key) pairs of one request; causal is aligned to the bottom right."""
    if not is_causal and not window:
        return s_q * s_k
    pairs = 0
    for i in range(s_q):
        end = max(min(s_k - s_q + i + 1, s_k), 0) if is_causal or window else s_k
        begin = max(end - window, 0) if window else 0
        pairs += end - begin
    return pairs


def cost(problem: Problem, seqlens_k: Sequence[int] | None = None, seqlens_q: Sequence[int] | None = None) -> Cost:
    """FLOPs and bytes of one call.

    Args:
        problem: what is asked.
        seqlens_k: keys per request (decode, prefill), or new ones (append); default: every request at its capacity, 1 in all.
        seqlens_q: query tokens per request (varlen); default: s_q (max_seqlen_q) for each.
    """
    if isinstance(problem, DecodeProblem):
        return _decode(problem, seqlens_k, seqlens_q)
    if isinstance(problem, SparseDecodeProblem):
        topk = problem.topk + (problem.extra.topk if problem.extra else 0)
        kv_bytes = problem.topk * problem.layout.bytes_per_token
        if problem.extra:
            kv_bytes += problem.extra.topk * problem.extra.layout.bytes_per_token
        rows = problem.total_q * problem.h_q
        return Cost(
            2 * rows * topk * (problem.d_qk + problem.d_v),
            problem.total_q * kv_bytes + rows * _row_bytes(problem.d_qk, problem.d_v, problem.dtype.itemsize),
        )
    if isinstance(problem, SparsePrefillProblem):
        rows = problem.s_q * problem.h_q
        itemsize = problem.dtype.itemsize
        unique = min(problem.s_kv, problem.s_q * problem.topk)
        return Cost(
            2 * rows * problem.topk * (problem.d_qk + problem.d_v),
            unique * problem.h_kv * problem.d_qk * itemsize
            + rows * (_row_bytes(problem.d_qk, problem.d_v, itemsize) + 4),
        )
    if isinstance(problem, AppendProblem):
        tokens = 1 if seqlens_k is None else sum(int(s_k) for s_k in seqlens_k)
        return Cost(0, tokens * (problem.d_qk * problem.dtype.itemsize + problem.layout.bytes_per_token))
    return _prefill(problem, seqlens_k, seqlens_q)


def _row_bytes(d_qk: int, d_v: int, itemsize: int) -> int:
    """q, out and the fp32 lse of one (token, head)."""
    return (d_qk + d_v) * itemsize + 4


def _decode(problem: DecodeProblem, seqlens_k: Sequence[int] | None, seqlens_q: Sequence[int] | None) -> Cost:
    capacity = problem.max_pages * problem.page_size
    keys = list(seqlens_k) if seqlens_k is not None else [capacity] * problem.batch
    queries = list(seqlens_q) if seqlens_q is not None else [problem.s_q] * problem.batch
    pairs = kv_rows = 0
    for s_q, s_k in zip(queries, keys, strict=True):
        length = min(max(int(s_k), 0), capacity)
        pairs += _attended(int(s_q), length, problem.is_causal, problem.window)
        kv_rows += min(length, problem.window + int(s_q) - 1) if problem.window else length
    rows = sum(int(s_q) for s_q in queries) * problem.h_q
    return Cost(
        2 * pairs * problem.h_q * (problem.d_qk + problem.d_v),
        kv_rows * problem.h_kv * problem.layout.bytes_per_token
        + rows * (problem.d_qk * problem.dtype.itemsize + problem.d_v * problem.out_dtype.itemsize + 4),
    )


def _prefill(problem: PrefillProblem, seqlens_k: Sequence[int] | None, seqlens_q: Sequence[int] | None) -> Cost:
    keys = list(seqlens_k) if seqlens_k is not None else [problem.max_seqlen_k] * problem.batch
    queries = list(seqlens_q) if seqlens_q is not None else [problem.max_seqlen_q] * problem.batch
    pairs = sum(_attended(int(a), int(b), problem.is_causal) for a, b in zip(queries, keys, strict=True))
    itemsize = problem.dtype.itemsize
    return Cost(
        2 * pairs * problem.h_q * (problem.d_qk + problem.d_v),
        problem.total_k * problem.h_kv * (problem.d_qk + problem.d_v) * itemsize
        + problem.total_q * problem.h_q * _row_bytes(problem.d_qk, problem.d_v, itemsize),
    )
