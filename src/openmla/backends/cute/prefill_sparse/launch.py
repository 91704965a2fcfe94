"""From a compiled function and tensors to a launch on the current stream. No decisions: those are in config.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from openmla.backends.base import SparseDecodeOperands, SparsePrefillOperands
from openmla.backends.cute.prefill_sparse.config import Config
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
        fake_tensor(element, (None, None, 512), stride=(stride(), stride(), 1)),  # out
        fake_tensor(Float32, (None, None, None), stride=(None, None, None), align=4),  # lse
        fake_tensor(Float32, (None, None), stride=(None, None), align=4),  # max_logits
        fake_tensor(Int32, (1,), align=4),  # fault_word
        # parts, has_length, has_sink, scale
        Int32(1), Int32(0), Int32(0), Float32(1.0),
        fake_stream(),
    )  # fmt: skip


def build(config: Config, folder: Path) -> CompiledObject:
    """Compile and export one variant. Needs the DSL, no GPU."""
    from openmla.backends.cute.prefill_sparse.kernel import PrefillSparse

    return compile_kernel(PrefillSparse(config), fake_arguments(config), config.name, out_dir=folder)


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
        operands.fault_word, parts, int(length is not None), int(sink is not None), operands.softmax_scale,
    )  # fmt: skip


def launch_decode(function: Any, operands: SparseDecodeOperands, parts: int) -> None:
    """Write out and lse of a sparse decode over a paged bf16 cache.

    Args:
        function: the exported function of a variant of the form "pages".
        operands: checked tensors with one KV head and no second cache; leading dimensions (batch, s_q) or (total_q,). q, cache
            and out step by multiples of 16 bytes, softmax_scale > 0, batch and s_q of q and out can be made one dimension.
        parts: CTAs per 64 heads, at most as many as query tokens.
    """
    q, out, lse, indices = operands.q, operands.out, operands.lse, operands.indices
    length, sink = operands.topk_length, operands.attn_sink
    if q.dim() == 4:
        q, out, indices = (tensor.flatten(0, 1) for tensor in (q, out, indices))
    else:
        lse = lse.T.unsqueeze(2)
    if length is not None:
        length = length.reshape(-1)
        if length.shape[0] != q.shape[0]:  # one per request
            length = length.repeat_interleave(q.shape[0] // length.shape[0])
    function(
        q, operands.kv_cache[:, :, 0], indices, operands.fault_word if length is None else length,
        lse[0, :, 0] if sink is None else sink, out, lse, lse[..., 0], operands.fault_word, parts,
        int(length is not None), int(sink is not None), operands.softmax_scale,
    )  # fmt: skip
