"""From a compiled function and tensors to a launch on the current stream. No decisions: those are in config.py."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from openmla.backends.base import SparseDecodeOperands
from openmla.backends.cute.decode_sparse.config import Config, tiles
from openmla.backends.cute.toolchain import CompiledObject, compile_kernel, fake_stream, fake_tensor

LOG2_E = math.log2(math.e)


def fake_arguments(config: Config) -> tuple[Any, ...]:
    """What `compile_kernel` needs to know about the arguments: ranks, fixed extents, alignments. Needs the DSL."""
    import cutlass
    import cutlass.cute as cute
    from cutlass import Float32, Int32

    element = cutlass.BFloat16

    def stride(by: int = 8) -> Any:
        # The copy engine and 16-byte loads address in steps of 16 bytes.
        return cute.sym_int64(divisibility=by)

    def ints(*shape: Any) -> Any:
        return fake_tensor(Int32, shape, align=4)

    return (
        fake_tensor(element, (None, None, None, config.bytes.d_qk), stride=(stride(), stride(), stride(), 1)),  # q
        fake_tensor(Int32, (None, None), stride=(stride(4), 1)),  # kv
        fake_tensor(Int32, (None, None, None), stride=(None, None, 1), align=4),  # indices
        fake_tensor(Int32, (None, None), stride=(None, None), align=4),  # topk_length
        fake_tensor(Int32, (None, None), stride=(stride(4), 1)),  # the same three of the second cache
        fake_tensor(Int32, (None, None, None), stride=(None, None, 1), align=4),
        fake_tensor(Int32, (None, None), stride=(None, None), align=4),
        ints(None, 8),  # metadata
        ints(None),  # num_splits
        fake_tensor(Float32, (None,), align=4),  # sink
        fake_tensor(element, (None, None, None, 512), stride=(stride(), stride(), stride(), 1)),  # out
        fake_tensor(Float32, (None, None, None), stride=(None, None, None), align=4),  # lse
        fake_tensor(Float32, (None, None, 512), stride=(stride(), stride(), 1)),  # out_accum
        fake_tensor(Float32, (None, None), stride=(None, 1), align=4),  # lse2_accum
        ints(1),  # fault_word
        ints(None, None, None),  # redo
        Int32(1), Int32(64), Int32(64), Int32(0), Int32(0), Int32(0), Int32(0), Int32(0), Float32(1.0),  # blocks to scale_log2
        fake_stream(),
    )  # fmt: skip


def build(config: Config, folder: Path) -> CompiledObject:
    """Compile and export one variant. Needs the DSL, no GPU."""
    from openmla.backends.cute.decode_sparse.kernel import DecodeSparse
    from openmla.backends.cute.decode_sparse.swapped.kernel import Swapped

    code = Swapped if config.keys == "registers" else DecodeSparse
    return compile_kernel(code(config), fake_arguments(config), config.name, out_dir=folder)


def words_of_pages(cache: torch.Tensor) -> torch.Tensor:
    """The bytes of an aligned cache [num_pages, page_size, 1, row] as int32 [num_pages, words of a page], a view."""
    words = cache.view(torch.int32)
    size = words.shape[1] * words.shape[3]
    # A single page may have any stride; the kernel was compiled for multiples of 16 bytes.
    return words.as_strided((words.shape[0], size), (words.stride(0) if words.shape[0] > 1 else -(-size // 4) * 4, 1))


def per_token(topk_length: torch.Tensor, batch: int, s_q: int) -> torch.Tensor:
    """Lengths as [batch, s_q], a view; a length per request serves all of its tokens."""
    flat = topk_length.reshape(-1)
    return flat.view(batch, s_q) if flat.shape[0] == batch * s_q else flat.view(batch, 1).expand(batch, s_q)


def launch(
    function: Any,
    operands: SparseDecodeOperands,
    metadata: torch.Tensor,
    num_splits: torch.Tensor,
    out_accum: torch.Tensor,
    lse2_accum: torch.Tensor,
    *,
    redo: torch.Tensor | None = None,
    chunk_blocks: int = 0,
) -> None:
    """Write out and lse of requests with one piece, out_accum and lse2_accum of the pieces of the others.

    Args:
        function: the exported function of a variant.
        operands: checked tensors; the caches start at and step from page to page by multiples of 16 bytes.
        metadata, num_splits: the plan (`config.plan`).
        out_accum: fp32 [pieces, s_q * h_q, 512]; row = token, head.
        lse2_accum: fp32 [pieces, s_q * h_q], base 2.
        redo: int32 [parts, s_q, 64-head blocks], for variants with fp16 operands and those behind them. For those that merge at
            least [pieces, s_q, 64-head blocks] counts of stored pieces, all 0, one after the other in any shape; and their
            out_accum has PARTIAL_ROWS rows for each of these blocks (`merge`).
        chunk_blocks: piece length of batch_invariant, else 0.
    """
    q, out, lse = operands.q, operands.out, operands.lse
    if q.dim() == 3:  # tokens of a varlen batch are requests of one token
        q, out, lse = q.unsqueeze(1), out.unsqueeze(1), lse.T.unsqueeze(2)
    batch, s_q = q.shape[:2]

    def selection(
        cache: torch.Tensor, indices: torch.Tensor, length: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        lengths = num_splits.view(-1, 1) if length is None else per_token(length, batch, s_q)
        listed = indices if indices.stride(-1) == 1 else indices.contiguous()
        return words_of_pages(cache), listed if listed.dim() == 3 else listed.unsqueeze(1), lengths

    main = selection(operands.kv_cache, operands.indices, operands.topk_length)
    extra, extra_page_size, topk_extra = main, 1, 0
    if operands.extra_kv_cache is not None and operands.extra_indices is not None:
        extra = selection(operands.extra_kv_cache, operands.extra_indices, operands.extra_topk_length)
        extra_page_size, topk_extra = operands.extra_kv_cache.shape[1], operands.extra_indices.shape[-1]
    sink, blocks = operands.attn_sink, tiles(operands.indices.shape[-1], topk_extra)
    function(
        q, *main, *extra, metadata, num_splits, lse2_accum[0] if sink is None else sink, out, lse, out_accum, lse2_accum,
        operands.fault_word, metadata.view(-1, 1, 8) if redo is None else redo, blocks, operands.kv_cache.shape[1], extra_page_size, chunk_blocks,
        int(operands.topk_length is not None), int(operands.extra_topk_length is not None), int(sink is not None), int(redo is not None),
        operands.softmax_scale * LOG2_E,
    )  # fmt: skip
