"""From a compiled function and tensors to a launch on the current stream. No decisions: those are in config.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from openmla.backends.base import SparseDecodeOperands, SparsePrefillOperands
from openmla.backends.cute.prefill_sparse.config import Config, Order
from openmla.backends.cute.toolchain import CompiledObject, compile_kernel, fake_stream, fake_tensor


def fake_arguments(config: Config) -> tuple[Any, ...]:
    """What `compile_kernel` needs to know about the arguments: ranks, fixed extents, alignments. Needs the DSL."""
    import cutlass
    import cutlass.cute as cute
    from cutlass import Float32, Int32

    element = cutlass.BFloat16

    def stride() -> Any:
        return cute.sym_int64(divisibility=8)  # copies of 16 bytes

    return (
        fake_tensor(element, (None, None, config.d_qk), stride=(stride(), stride(), 1)),  # q
        fake_tensor(element, (None, None, config.d_qk), stride=(stride(), stride(), 1)),  # kv
        fake_tensor(Int32, (None, None), stride=(None, 1), align=4),  # indices
        fake_tensor(Int32, (None,), stride=(None,), align=4),  # topk_length
        fake_tensor(Float32, (None,), stride=(None,), align=4),  # sink
        fake_tensor(Float32 if config.split else element, (None, None, 512), stride=(stride(), stride(), 1)),  # out
        fake_tensor(Float32, (None, None, None), stride=(None, None, None), align=4),  # lse
        fake_tensor(Float32, (None, None), stride=(None, None), align=4),  # max_logits
        fake_tensor(Int32, (1,), align=4),  # fault_word
        # parts, has_length, has_sink, scale, splits, chunk, per_request
        Int32(1), Int32(0), Int32(0), Float32(1.0), Int32(1), Int32(64), Int32(1),
        fake_stream(),
    )  # fmt: skip


def build(config: Config, folder: Path) -> CompiledObject:
    """Compile and export one variant. Needs the DSL, no GPU."""
    from openmla.backends.cute.prefill_sparse.kernel import PrefillSparse

    return compile_kernel(PrefillSparse(config), fake_arguments(config), config.name, out_dir=folder)


def build_order(config: Order, folder: Path) -> CompiledObject:
    """Compile and export what orders lists. Needs the DSL, no GPU."""
    from openmla.backends.cute.prefill_sparse.order import RowOrder, fake_arguments

    return compile_kernel(RowOrder(), fake_arguments(), config.name, out_dir=folder)


def launch_order(function: Any, operands: SparsePrefillOperands, parts: int) -> SparsePrefillOperands:
    """The same operands with every list in the order of its rows, forth and back in turns of `parts` tokens.

    Args:
        function: the exported function of `Order`.
        operands: as for `launch_prefill`.
        parts: tokens that are computed at the same time.
    """
    indices, length = operands.indices[:, 0], operands.topk_length
    ordered = torch.empty(indices.shape, dtype=torch.int32, device=indices.device)
    function(
        indices, operands.fault_word if length is None else length, ordered, operands.kv.shape[0], parts,
        int(length is not None),
    )  # fmt: skip
    return operands._replace(indices=ordered.unsqueeze(1))


def launch_prefill(function: Any, operands: SparsePrefillOperands, parts: int) -> None:
    """Write out, max_logits and lse.

    Args:
        function: the exported function of a variant of the form "rows".
        operands: checked tensors with one KV head; q, kv and out step by multiples of 16 bytes, softmax_scale > 0.
        parts: CTAs per 64 heads, at most as many as query tokens.
    """
    length, sink = operands.topk_length, operands.attn_sink
    function(
        operands.q, operands.kv.transpose(0, 1), operands.indices[:, 0],
        operands.fault_word if length is None else length,
        operands.lse[0] if sink is None else sink, operands.out, operands.lse.unsqueeze(2), operands.max_logits,
        operands.fault_word, parts, int(length is not None), int(sink is not None), operands.softmax_scale, 1, 0, 1,
    )  # fmt: skip


def launch_decode(function: Any, operands: SparseDecodeOperands, parts: int) -> None:
    """Write out and lse of a sparse decode over a paged bf16 cache.

    Args:
        function: the exported function of a variant of the form "pages".
        operands: checked tensors with one KV head and no second cache; leading dimensions (batch, s_q) or (total_q,). q, cache
            and out step by multiples of 16 bytes, softmax_scale > 0, batch and s_q of q and out can be made one dimension.
        parts: CTAs per 64 heads, at most as many as query tokens.
    """
    out, lse, sink = operands.out, operands.lse, operands.attn_sink
    q, indices, length = _rows(operands)
    out, lse = (out.flatten(0, 1), lse) if out.dim() == 4 else (out, lse.T.unsqueeze(2))
    function(
        q, operands.kv_cache[:, :, 0], indices, operands.fault_word if length is None else length,
        lse[0, :, 0] if sink is None else sink, out, lse, lse[..., 0], operands.fault_word, parts,
        int(length is not None), int(sink is not None), operands.softmax_scale, 1, 0, 1,
    )  # fmt: skip


def launch_split(
    function: Any, operands: SparseDecodeOperands, out_accum: torch.Tensor, lse2_accum: torch.Tensor, splits: int,
    chunk: int, parts: int,
) -> None:  # fmt: skip
    """Write the partial results of every piece of a sparse decode over a paged bf16 cache; the sink is the merge's.

    Args:
        function: the exported function of a variant with `split`.
        operands: as in `launch_decode`.
        out_accum: fp32 [batch * splits, s_q * h_q, 512].
        lse2_accum: fp32 [batch * splits, s_q * h_q], base 2.
        splits: pieces of each list.
        chunk: keys of a piece, a multiple of 64.
        parts: CTAs per 64 heads, at most as many as tokens and pieces.
    """
    q, indices, length = _rows(operands)
    s_q, heads = (operands.q.shape[1] if operands.q.dim() == 4 else 1), q.shape[1]
    lse = lse2_accum.view(-1, heads, 1)
    function(
        q, operands.kv_cache[:, :, 0], indices, operands.fault_word if length is None else length, lse[0, :, 0],
        out_accum.view(-1, heads, 512), lse, lse[..., 0], operands.fault_word, parts, int(length is not None), 0,
        operands.softmax_scale, splits, chunk, s_q,
    )  # fmt: skip


def _rows(operands: SparseDecodeOperands) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(q, indices, lengths) with one leading dimension, query tokens."""
    q, indices, length = operands.q, operands.indices, operands.topk_length
    if q.dim() == 4:
        q, indices = q.flatten(0, 1), indices.flatten(0, 1)
    if length is not None:
        length = length.reshape(-1)
        if length.shape[0] != q.shape[0]:  # one per request
            length = length.repeat_interleave(q.shape[0] // length.shape[0])
    return q, indices, length
