"""From a compiled function and tensors to a launch on the current stream. No decisions: those are in config.py."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import torch

from openmla.backends.base import DecodeOperands
from openmla.backends.cute.decode_dense.config import Config, MergeConfig
from openmla.backends.cute.decode_dense_small.launch import no_sink
from openmla.backends.cute.toolchain import CompiledObject, compile_kernel, fake_stream, fake_tensor

LOG2_E = math.log2(math.e)
NO_WINDOW = 1 << 30  # keys; more than any block table addresses


def fake_arguments(config: Config) -> tuple[Any, ...]:
    """What `compile_kernel` needs to know about the arguments: ranks, fixed extents, alignments. Needs the DSL."""
    import cutlass
    import cutlass.cute as cute
    from cutlass import Float32, Int32, Int64

    element = cutlass.BFloat16 if config.dtype == "bf16" else cutlass.Float16

    def stride() -> Any:
        # The copy engine addresses in steps of 16 bytes.
        return cute.sym_int64(divisibility=8)

    def ints(*shape: Any) -> Any:
        return fake_tensor(Int32, shape, align=4)

    return (
        fake_tensor(element, (None, None, None, config.d_qk), stride=(stride(), stride(), stride(), 1)),  # q
        fake_tensor(
            element, (None, config.page_size or None, None, config.d_qk), stride=(stride(), stride(), stride(), 1)
        ),
        fake_tensor(Int32, (None, None), stride=(None, 1), align=4),  # block_table
        ints(None),  # cache_seqlens
        ints(None),  # cu_seqlens_q
        ints(None, None, 8),  # metadata
        ints(None),  # num_splits
        fake_tensor(element, (None, None, None, 512), stride=(stride(), stride(), stride(), 1)),  # out
        fake_tensor(Float32, (None, None, None), stride=(None, None, None), align=4),  # lse
        fake_tensor(Float32, (None, None, 64 * 512), stride=(stride(), stride(), 1)),  # out_accum
        fake_tensor(Float32, (None, None), stride=(None, 1), align=4),  # lse2_accum
        fake_tensor(Int32, (None, None), stride=(None, 1), align=4),  # arrivals
        fake_tensor(Float32, (None,), align=4),  # attn_sink
        ints(1),  # fault_word
        fake_tensor(Int64, (None,), align=8),  # mail
        ints(None),  # merged
        # s_q, chunk_blocks, is_merged, is_causal, is_varlen, has_sink, window, scale_log2
        Int32(1), Int32(0), Int32(0), Int32(0), Int32(0), Int32(0), Int32(1), Float32(1.0),
        fake_stream(),
    )  # fmt: skip


def build(config: Config, folder: Path) -> CompiledObject:
    """Compile and export one variant. Needs the DSL, no GPU."""
    from openmla.backends.cute.decode_dense.kernel import DecodeDense
    from openmla.backends.cute.decode_dense.two_clusters.kernel import TwoClusters
    from openmla.backends.cute.decode_dense.two_loaders.kernel import TwoLoaders

    code = DecodeDense if config.loaders == 1 else TwoClusters if config.q_regs == 6 else TwoLoaders
    return compile_kernel(code(config), fake_arguments(config), config.name, out_dir=folder)


def build_merge(config: MergeConfig, folder: Path) -> CompiledObject:
    """Compile and export one variant of the merge. Needs the DSL, no GPU."""
    import cutlass

    from openmla.backends.cute.decode_dense import merge

    element = cutlass.BFloat16 if config.dtype == "bf16" else cutlass.Float16
    code = merge.Merge(element, config.columns, config.groups)
    return compile_kernel(code, merge.fake_arguments(element), config.name, out_dir=folder)


def launch_merge(
    function: Any,
    operands: DecodeOperands,
    num_splits: torch.Tensor,
    out_accum: torch.Tensor,
    lse2_accum: torch.Tensor,
    *,
    s_q: int,
) -> None:
    """Write out and lse of requests with several pieces. Arguments as of `launch`, which must have run before."""
    out, lse, cu_seqlens_q, sink = operands.out, operands.lse, operands.cu_seqlens_q, operands.attn_sink
    is_varlen = cu_seqlens_q is not None
    if is_varlen:
        out, lse = out.unsqueeze(0), lse.unsqueeze(0)
    function(
        out_accum, lse2_accum, num_splits, cu_seqlens_q if is_varlen else num_splits, out, lse,
        no_sink(out.device) if sink is None else sink, s_q, operands.kv_cache.shape[2], int(is_varlen),
        int(sink is not None),
    )  # fmt: skip


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
    is_natural: bool = False,
    mail: torch.Tensor | None = None,
    merged: torch.Tensor | None = None,
) -> None:
    """Write out and lse of requests with one piece, out_accum and lse2_accum of the pieces of the others.

    Args:
        function: the exported function of a variant.
        operands: checked tensors.
        metadata, num_splits: the plan (`openmla.split.schedule`); metadata int32 [ranges, num_parts, 8].
        out_accum: fp32 [pieces, h_kv * row blocks, 64 * 512], a block in the order that `merge` describes; with arrivals as
            `shares` does, in half of these bytes.
        lse2_accum: fp32 [pieces, h_kv * row blocks * 64], base 2.
        s_q: query tokens per request, the longest with cu_seqlens_q.
        chunk_blocks: piece length of batch_invariant, else 0.
        is_causal: bottom-right aligned causal mask.
        window: keys that a row sees up to its own position, which makes it causal; 0 for all.
        arrivals: int32 [pieces, h_kv * row blocks] of zeros, left as zeros: the kernel merges, `launch_merge` must not follow.
            None: it must. Not with chunk_blocks.
        is_natural: the variant has mods, before which scores are scaled to natural units.
    """
    out, lse, cu_seqlens_q, sink = operands.out, operands.lse, operands.cu_seqlens_q, operands.attn_sink
    q, is_varlen = query_rows(operands.q, operands.kv_cache.shape[2]), cu_seqlens_q is not None
    if is_varlen:
        q, out, lse = q.unsqueeze(0), out.unsqueeze(0), lse.unsqueeze(0)
    function(
        q, operands.kv_cache, operands.block_table, operands.cache_seqlens,
        cu_seqlens_q if is_varlen else num_splits, metadata, num_splits, out, lse, out_accum, lse2_accum,
        num_splits[None] if arrivals is None else arrivals, no_sink(q.device) if sink is None else sink,
        operands.fault_word, no_mail(q.device) if mail is None else mail, num_splits if merged is None else merged, s_q, chunk_blocks, int(arrivals is not None), int(is_causal or window > 0), int(is_varlen),
        int(sink is not None), window or NO_WINDOW,
        operands.softmax_scale * (1.0 if is_natural else LOG2_E),
    )  # fmt: skip


@cache
def no_mail(device: torch.device) -> torch.Tensor:
    """Stands where the addresses of mailboxes would, and is not read."""
    with torch.inference_mode(False):  # it outlives the mode
        return torch.zeros(1, dtype=torch.int64, device=device)


def query_rows(q: torch.Tensor, h_kv: int) -> torch.Tensor:
    """Q [..., tokens, h_q, d_qk] whose rows (token, head) of a KV head are evenly spaced in memory.

    That is Q itself with one KV head (which a latent cache has) or one token per request. Else a copy in the order KV
    head, token, head, under the same shape: the kernel steps from row to row by `stride(-2)`, and between KV heads by all
    rows of one.
    """
    tokens, h_q = q.shape[-3], q.shape[-2]
    if (tokens == 1 and q.dim() == 4) or (h_kv == 1 and q.stride(-3) == h_q * q.stride(-2)):
        return q
    grouped: torch.Tensor = q.unflatten(-2, (h_kv, h_q // h_kv)).transpose(-4, -3)
    return grouped.contiguous().view(q.shape)
