"""From a compiled function and tensors to a launch on the current stream. No decisions: those are in config.py."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from openmla.backends.base import DecodeOperands
from openmla.backends.cute.decode_dense.config import Config
from openmla.backends.cute.toolchain import CompiledObject, compile_kernel, fake_stream, fake_tensor

LOG2_E = math.log2(math.e)


def fake_arguments(config: Config) -> tuple[Any, ...]:
    """What `compile_kernel` needs to know about the arguments: ranks, fixed extents, alignments. Needs the DSL."""
    import cutlass
    import cutlass.cute as cute
    from cutlass import Float32, Int32

    element = cutlass.BFloat16 if config.dtype == "bf16" else cutlass.Float16

    def stride() -> Any:
        # The copy engine addresses in steps of 16 bytes.
        return cute.sym_int64(divisibility=8)

    def ints(*shape: Any) -> Any:
        return fake_tensor(Int32, shape, align=4)

    return (
        fake_tensor(element, (None, None, None, config.d_qk), stride=(stride(), stride(), stride(), 1)),  # q
        fake_tensor(element, (None, config.page_size, None, config.d_qk), stride=(stride(), stride(), stride(), 1)),
        fake_tensor(Int32, (None, None), stride=(None, 1), align=4),  # block_table
        ints(None),  # cache_seqlens
        ints(None),  # cu_seqlens_q
        ints(None, 8),  # metadata
        ints(None),  # num_splits
        fake_tensor(element, (None, None, None, 512), stride=(stride(), stride(), stride(), 1)),  # out
        fake_tensor(Float32, (None, None, None), stride=(None, None, None), align=4),  # lse
        fake_tensor(Float32, (None, None, 512), stride=(stride(), stride(), 1)),  # out_accum
        fake_tensor(Float32, (None, None), stride=(None, 1), align=4),  # lse2_accum
        ints(1),  # fault_word
        Int32(1), Int32(0), Int32(0), Int32(0), Float32(1.0),  # s_q, chunk_blocks, is_causal, is_varlen, scale_log2
        fake_stream(),
    )  # fmt: skip


def build(config: Config, folder: Path) -> CompiledObject:
    """Compile and export one variant. Needs the DSL, no GPU."""
    from openmla.backends.cute.decode_dense.kernel import DecodeDense

    return compile_kernel(DecodeDense(config), fake_arguments(config), config.name, out_dir=folder)


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
) -> None:
    """Write out and lse of requests with one piece, out_accum and lse2_accum of the pieces of the others.

    Args:
        function: the exported function of a variant.
        operands: checked tensors.
        metadata, num_splits: the plan (`openmla.split.schedule`).
        out_accum: fp32 [pieces, h_kv * s_q * heads, 512]; row = KV head, token, head within the KV head.
        lse2_accum: fp32 [pieces, h_kv * s_q * heads], base 2.
        s_q: query tokens per request, the longest with cu_seqlens_q.
        chunk_blocks: piece length of batch_invariant, else 0.
        is_causal: bottom-right aligned causal mask.
    """
    q, out, lse, cu_seqlens_q = operands.q, operands.out, operands.lse, operands.cu_seqlens_q
    is_varlen = cu_seqlens_q is not None
    if is_varlen:
        q, out, lse = q.unsqueeze(0), out.unsqueeze(0), lse.unsqueeze(0)
    function(
        q, operands.kv_cache, operands.block_table, operands.cache_seqlens,
        cu_seqlens_q if is_varlen else num_splits, metadata, num_splits, out, lse, out_accum, lse2_accum,
        operands.fault_word, s_q, chunk_blocks, int(is_causal), int(is_varlen), operands.softmax_scale * LOG2_E,
    )  # fmt: skip
