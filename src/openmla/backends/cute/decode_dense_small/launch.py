"""From a compiled function and tensors to a launch on the current stream. No decisions: those are in config.py."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import torch

from openmla.backends.base import DecodeOperands, SparseDecodeOperands
from openmla.backends.cute.decode_dense_small.config import BLOCK_TOKENS, NO_WINDOW, Config
from openmla.backends.cute.toolchain import CompiledObject, compile_kernel

LOG2_E = math.log2(math.e)


def build(config: Config, out_dir: Path) -> CompiledObject:
    """Compile one variant into a folder. Needs the DSL, no GPU."""
    import cutlass

    from openmla.backends.cute.decode_dense_small import kernel

    element = cutlass.BFloat16 if config.dtype == "bf16" else cutlass.Float16
    shape: dict[str, Any] = {"d_qk": config.d_qk, "row_bytes": config.row_bytes}
    crew: dict[str, Any] = {
        "warpgroups": config.warpgroups,
        "ctas_per_sm": config.ctas_per_sm,
        "gathers": config.gathers,
        "pairs": config.pairs,
    }
    code = kernel.DecodeDenseSmall(element, config.rows, stages=config.stages, **shape, **crew)
    return compile_kernel(
        code, kernel.fake_arguments(element, config.rows, **shape, gathers=config.gathers), config.name, out_dir=out_dir
    )


@cache
def no_sink(device: torch.device) -> torch.Tensor:
    """Stands where an attention sink would, and is not read. A view of something else would cost 0.5 us a call."""
    with torch.inference_mode(False):  # it outlives the mode
        return torch.zeros(1, dtype=torch.float32, device=device)


def launch(
    function: Any,
    operands: DecodeOperands,
    metadata: torch.Tensor,
    num_splits: torch.Tensor,
    exchange: torch.Tensor,
    *,
    chunk_blocks: int,
    is_causal: bool,
    window: int,
    max_s_q: int,
    groups: int,
    block_tokens: int = BLOCK_TOKENS,
) -> None:
    """Write out and lse of every request: one kernel, partials merged inside.

    Args:
        function: the exported function of a variant.
        operands: checked tensors; strides of q, kv_cache and out in multiples of 8 elements.
        metadata, num_splits: the plan (`openmla.split.schedule`) in blocks of `block_tokens`, of
            `config.planned_lengths`.
        exchange: of the shape that `config.workspace` gives; UNWRITTEN before the first call.
        chunk_blocks: piece length of batch_invariant in blocks, a multiple of 64 tokens; else 0.
        is_causal: bottom-right aligned causal mask.
        window: keys that a query sees up to its own position; 0: all.
        max_s_q: query tokens of a request at most, with cu_seqlens_q.
        groups: KV heads as the kernel sees them (`config.grouped`).
        block_tokens: of the plan, a multiple of 8.
    """
    q, out, lse, offsets, sink = operands.q, operands.out, operands.lse, operands.cu_seqlens_q, operands.attn_sink
    if offsets is None:
        offsets, max_s_q = num_splits, 0  # not read
    else:
        q, out, lse = q[None], out[None], lse[None]
    kv_cache = operands.kv_cache
    if kv_cache.element_size() == 1 and kv_cache.dtype != torch.uint8:
        kv_cache = kv_cache.view(torch.uint8)
    if groups != kv_cache.shape[2]:
        kv_cache = kv_cache.expand(-1, -1, groups, -1)
    function(
        q, kv_cache, operands.block_table, operands.cache_seqlens, metadata, num_splits, out, lse, exchange,
        no_sink(q.device) if sink is None else sink, offsets, operands.fault_word, operands.softmax_scale * LOG2_E,
        int(is_causal or window > 0), min(window or NO_WINDOW, NO_WINDOW), max_s_q, block_tokens, chunk_blocks, int(sink is not None),
    )  # fmt: skip


@cache
def whole_lists(device: torch.device, topk: int) -> torch.Tensor:
    """Stands where lengths of index lists would: every list counts to its end."""
    with torch.inference_mode(False):  # it outlives the mode
        return torch.full((1, 1), topk, dtype=torch.int32, device=device)


def rows_of(cache: torch.Tensor) -> torch.Tensor:
    """A byte cache as uint8, with steps of 16 bytes also where a dimension has one entry and its step means nothing."""
    cache = cache if cache.dtype == torch.uint8 else cache.view(torch.uint8)
    pages, size, _, row = cache.shape
    if all(step % 16 == 0 for step in cache.stride()[:3]):
        return cache
    return cache.as_strided(cache.shape, (cache.stride(0) if pages > 1 else size * row, row, row, 1))


def launch_gathered(
    function: Any,
    operands: SparseDecodeOperands,
    metadata: torch.Tensor,
    num_splits: torch.Tensor,
    exchange: torch.Tensor,
) -> None:
    """Write out and lse of every query token over the rows that its list names: one kernel, partials merged inside.

    Args:
        function: the exported function of a variant that gathers.
        operands: checked tensors; strides of q and out in multiples of 8 elements, of the cache of 16 bytes.
        metadata, num_splits: the plan (`config.gathered_plan`); a request of it is a query token.
        exchange: int32 [1, pieces or more, N * 328], UNWRITTEN before the first call; each call leaves it so.
    """
    q, out, lse, lists, lengths, sink = (
        operands.q, operands.out, operands.lse, operands.indices, operands.topk_length, operands.attn_sink
    )  # fmt: skip
    if q.dim() == 3:  # tokens of a varlen batch are requests of one token
        q, out, lse, lists = q.unsqueeze(1), out.unsqueeze(1), lse.T.unsqueeze(2), lists.unsqueeze(1)
    batch, s_q = q.shape[:2]
    if lengths is None:
        lengths = whole_lists(q.device, lists.shape[2])
    elif lengths.dim() == 1:
        lengths = lengths.unsqueeze(1)
    function(
        q, rows_of(operands.kv_cache),
        lists if lists.stride(2) == 1 else lists.contiguous(), lengths.expand(batch, s_q), metadata, num_splits, out, lse,
        exchange, no_sink(q.device) if sink is None else sink, num_splits, operands.fault_word,
        operands.softmax_scale * LOG2_E, 0, NO_WINDOW, 0, BLOCK_TOKENS, 0, int(sink is not None),
    )  # fmt: skip
