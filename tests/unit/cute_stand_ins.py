"""Python stand-ins for the compiled functions of the Hopper decode kernels: their arguments, the oracle's results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from openmla.backends.cute.decode_dense_small import config as small
from openmla.reference import attention
from openmla.split.schedule import plan_decode

LOG2_E = 1.4426950408889634


def _plan_function(
    cache_seqlens: torch.Tensor, metadata: torch.Tensor, num_splits: torch.Tensor, fault: torch.Tensor, capacity: int,
    block_tokens: int, overhead: int, merge: int, min_share: int, chunk_blocks: int, margin: int, merge_from: int,
) -> None:  # fmt: skip
    lengths = [min(max(n, 0), capacity) for n in cache_seqlens.tolist()]
    plan = plan_decode(
        lengths, metadata.shape[1], policy="batch_invariant" if chunk_blocks else "balanced", block_tokens=block_tokens,
        overhead_blocks=overhead, merge_blocks=merge, min_share_blocks=min_share, margin=margin, merge_from=merge_from,
        chunk_tokens=(chunk_blocks or 64) * block_tokens, ranges=metadata.shape[0],
    )  # fmt: skip
    metadata.copy_(plan.tile_scheduler_metadata().view(metadata.shape))
    num_splits.copy_(plan.num_splits_tensor())


def _few_rows_function(
    q: torch.Tensor, kv: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor, metadata: torch.Tensor,
    num_splits: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, exchange: torch.Tensor, sink: torch.Tensor,
    cu_seqlens_q: torch.Tensor, faults: torch.Tensor, scale_log2: float, is_causal: int, window: int, max_s_q: int,
    block_tokens: int, chunk_blocks: int, has_sink: int,
) -> None:  # fmt: skip
    assert int(num_splits[-1]) <= exchange.shape[1], "a slot for every piece"
    assert exchange.shape[0] == kv.shape[2]
    marks = next(
        small.marks(config) for config in small.VARIANTS if config.rows * config.words_per_row == exchange.shape[2]
    )
    assert bool((exchange[..., marks] == small.UNWRITTEN).all())
    assert exchange.data_ptr() % 16 == 0
    assert all(step % 8 == 0 for step in out.stride()[:-1])
    exchange[..., ~marks] = 7  # what a launch may leave behind
    golden = attention.decode(
        q[0] if max_s_q else q, kv, table, lengths, softmax_scale=scale_log2 / LOG2_E, d_v=512,
        is_causal=bool(is_causal), window=0 if window == small.NO_WINDOW else window,
        cu_seqlens_q=cu_seqlens_q if max_s_q else None, attn_sink=sink if has_sink else None,
    )  # fmt: skip
    out.copy_(golden.out)
    lse.copy_(golden.lse)


def _many_rows_function(
    q: torch.Tensor, kv: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor, cu_seqlens_q: torch.Tensor,
    metadata: torch.Tensor, num_splits: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, out_accum: torch.Tensor,
    lse2_accum: torch.Tensor, arrivals: torch.Tensor, sink: torch.Tensor, faults: torch.Tensor, mail: torch.Tensor,
    merged: torch.Tensor, s_q: int, chunk_blocks: int, is_merged: int, is_causal: int, is_varlen: int, has_sink: int, window: int, scale_log2: float,
) -> None:  # fmt: skip
    rows = s_q * q.shape[2]
    assert int(num_splits[-1]) <= out_accum.shape[0] == lse2_accum.shape[0], "a slot for every piece"
    assert out_accum.shape[1:] == (-(-rows // 64), 64 * 512)
    assert lse2_accum.shape[1] == -(-rows // 64) * 64
    assert window == 1 << 30
    assert out_accum.data_ptr() % 16 == 0
    golden = attention.decode(
        q, kv, table, lengths, softmax_scale=scale_log2 / LOG2_E, d_v=512, is_causal=bool(is_causal)
    )
    out_accum.fill_(torch.nan)
    lse2_accum.fill_(torch.nan)
    if is_merged:
        assert arrivals.shape == out_accum.shape[:2] and not arrivals.any()
        out.copy_(golden.out)
        lse.copy_(golden.lse)
        return
    for request in range(q.shape[0]):
        first, last = int(num_splits[request]), int(num_splits[request + 1])
        if last - first == 1:
            out[request], lse[request] = golden.out[request], golden.lse[request]
            continue
        # The first piece saw everything, the others nothing: a merge must bring that out again.
        out_accum[first:last], lse2_accum[first:last] = 0, -torch.inf
        # (in the order of rows, not of the accumulators: kernel and merge are stand-ins both)
        out_accum.view(-1, -(-rows // 64) * 64, 512)[first, :rows] = golden.out[request].flatten(0, 1).float()
        lse2_accum[first, :rows] = golden.lse[request].T.flatten() * LOG2_E


def _exchanged_function(*arguments: Any) -> None:
    """Of a rank whose fellows have no keys: its own rows are the result, and all words are unwritten again."""
    out, lse, mail, merged = arguments[7], arguments[8], arguments[14], arguments[15]
    staged = (out.view(torch.int32), lse.view(torch.int32))
    assert all(bool((words == -1).all()) for words in staged)
    assert mail.tolist()[:4] == [1, 2, 512, 3_000_000_000]
    _many_rows_function(*arguments)
    merged.copy_(torch.cat([words.flatten() for words in staged]))
    for words in staged:
        words.fill_(-1)


def _merge_function(
    out_accum: torch.Tensor, lse2_accum: torch.Tensor, num_splits: torch.Tensor, cu_seqlens_q: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, sink: torch.Tensor, s_q: int, h_kv: int, is_varlen: int, has_sink: int,
) -> None:  # fmt: skip
    rows = s_q * out.shape[2]
    out_accum = out_accum.view(-1, lse2_accum.shape[1], 512)[:, :rows]
    lse2_accum = lse2_accum[:, :rows]
    for request in range(out.shape[0]):
        first, last = int(num_splits[request]), int(num_splits[request + 1])
        if last - first > 1:
            weights = torch.softmax(lse2_accum[first:last] / LOG2_E, 0).nan_to_num()
            out[request] = (weights[..., None] * out_accum[first:last]).sum(0).view(out.shape[1:])
            merged = torch.logsumexp(lse2_accum[first:last] / LOG2_E, 0)
            lse[request] = merged.view(out.shape[1:3]).T


FUNCTIONS = {
    "decode_dense_small": _few_rows_function,
    "decode_dense": _many_rows_function,
    "schedule": _plan_function,
    "decode_dense_merge": _merge_function,
}


class _Served:
    source, origin = "bundle", Path("stand-in")

    def __init__(self, function: Any) -> None:
        self.function = function


def serve(family: str, config: Any) -> _Served:
    """In place of `bundle.serve`."""
    is_exchanged = getattr(config, "is_exchanged", False)
    return _Served(_exchanged_function if is_exchanged else FUNCTIONS[family])


def decode_tensors(h_q: int, pages: int = 30) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(h_q)
    return {
        "q": torch.randn(3, 1, h_q, 576, generator=generator).bfloat16(),
        "kv_cache": torch.randn(pages, 64, 1, 576, generator=generator).bfloat16(),
        "block_table": torch.randperm(pages, generator=generator)[:30].to(torch.int32).view(3, 10),
        "cache_seqlens": torch.tensor([640, 0, 77], dtype=torch.int32),
    }
