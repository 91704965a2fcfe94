"""From a compiled function and tensors to a launch on the current stream. No decisions: those are in config.py."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import torch

from openmla.backends.base import DecodeOperands
from openmla.backends.cute.decode_dense.launch import NO_WINDOW, query_rows
from openmla.backends.cute.decode_dense_small.launch import no_sink
from openmla.backends.cute.decode_fp8.config import Config
from openmla.backends.cute.toolchain import CompiledObject, compile_kernel, fake_stream, fake_tensor

LOG2_E = math.log2(math.e)


def fake_arguments(config: Config) -> tuple[Any, ...]:
    """What `compile_kernel` needs to know about the arguments: ranks, fixed extents, alignments. Needs the DSL."""
    import cutlass
    import cutlass.cute as cute
    from cutlass import Float32, Int32, Uint8

    def stride(step: int) -> Any:
        # The copy engine addresses in steps of 16 bytes.
        return cute.sym_int64(divisibility=step)

    def ints(*shape: Any) -> Any:
        return fake_tensor(Int32, shape, align=4)

    return (
        fake_tensor(Uint8, (None, None, None, 576), stride=(stride(16), stride(16), stride(16), 1)),  # q
        fake_tensor(Uint8, (None, config.page_size or None, None, 576), stride=(stride(16), stride(16), stride(16), 1)),
        fake_tensor(Int32, (None, None), stride=(None, 1), align=4),  # block_table
        ints(None),  # cache_seqlens
        ints(None),  # cu_seqlens_q
        ints(None, None, 8),  # metadata
        ints(None),  # num_splits
        fake_tensor(cutlass.BFloat16, (None, None, None, 512), stride=(stride(8), stride(8), stride(8), 1)),  # out
        fake_tensor(Float32, (None, None, None), stride=(None, None, None), align=4),  # lse
        fake_tensor(Float32, (None, None, 64 * 512), stride=(stride(8), stride(8), 1)),  # out_accum
        fake_tensor(Float32, (None, None), stride=(None, 1), align=4),  # lse2_accum
        fake_tensor(Int32, (None, None), stride=(None, 1), align=4),  # arrivals
        fake_tensor(Float32, (None,), align=4),  # attn_sink
        fake_tensor(Float32, (None,), align=4),  # descale_q
        fake_tensor(Float32, (None,), align=4),  # descale_k
        ints(1),  # fault_word
        # s_q, chunk_blocks, is_merged, is_causal, is_varlen, has_sink, window, scale_log2
        Int32(1), Int32(0), Int32(0), Int32(0), Int32(0), Int32(0), Int32(1), Float32(1.0),
        fake_stream(),
    )  # fmt: skip


def build(config: Config, folder: Path) -> CompiledObject:
    """Compile and export one variant. Needs the DSL, no GPU."""
    from openmla.backends.cute.decode_fp8.kernel import DecodeFp8

    return compile_kernel(DecodeFp8(config), fake_arguments(config), config.name, out_dir=folder)


@cache
def one(device: torch.device) -> torch.Tensor:
    """The scale of codes that count as they are."""
    return torch.ones(1, device=device)


def launch(
    function: Any,
    operands: DecodeOperands,
    metadata: torch.Tensor,
    num_splits: torch.Tensor,
    out_accum: torch.Tensor,
    lse2_accum: torch.Tensor,
    *,
    s_q: int,
    chunk_blocks: int,
    is_causal: bool,
    window: int = 0,
    arrivals: torch.Tensor | None = None,
) -> None:
    """Write out and lse of requests with one piece, out_accum and lse2_accum of the pieces of the others.

    Arguments as of `decode_dense.launch.launch`. q is e4m3, and the scales of the call are among the operands.
    """
    out, lse, cu_seqlens_q, sink = operands.out, operands.lse, operands.cu_seqlens_q, operands.attn_sink
    q = query_rows(operands.q.view(torch.uint8), operands.kv_cache.shape[2])
    is_varlen, unscaled = cu_seqlens_q is not None, one(q.device)
    if is_varlen:
        q, out, lse = q.unsqueeze(0), out.unsqueeze(0), lse.unsqueeze(0)
    of_q, of_k = (unscaled if each is None else each.view(1) for each in (operands.descale_q, operands.descale_k))
    function(
        q, operands.kv_cache.view(torch.uint8), operands.block_table, operands.cache_seqlens,
        cu_seqlens_q if is_varlen else num_splits, metadata, num_splits, out, lse, out_accum, lse2_accum,
        num_splits[None] if arrivals is None else arrivals, no_sink(q.device) if sink is None else sink, of_q, of_k,
        operands.fault_word, s_q, chunk_blocks, int(arrivals is not None), int(is_causal or window > 0), int(is_varlen),
        int(sink is not None), window or NO_WINDOW, operands.softmax_scale * LOG2_E,
    )  # fmt: skip
