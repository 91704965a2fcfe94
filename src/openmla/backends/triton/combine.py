"""Merge of the partial results of split requests, and the query rows that no request owns.

    m = max_i lse2_i     w_i = 2^(lse2_i - m)     out = sum_i w_i out_i / sum_i w_i     lse = ln 2 * (m + log2 sum_i w_i)

The law is that of `openmla.split.combine`. Sums run over the splits in order, so the bits repeat. Partials lie at
(slot, row): slot = num_splits[request] + split, or request * SPLITS + split where every request has SPLITS; the rows
of a slot are [h_kv, s_q, h_q / h_kv].

With an activation in place of softmax (IS_SUM) partials are plain sums, out = sum_i out_i, and what stands in place of
lse2_i is the sum of weights.

Programs (row block, request) leave at once where a request has one piece: the attention kernel has finished it. With
varlen queries, offsets that do not rise from 0 to total_q leave rows to nobody; the program past the last request, and
each request that is longer than announced, writes those as empty rows and sets the fault bit.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from openmla.backends.triton.decode import CU_SEQLENS_NOT_MONOTONE, query_span
from openmla.backends.triton.rows import wanted_columns
from openmla.backends.triton.softmax import LN_2, sink_share


@triton.jit
def write_empty(
    out_ptr, lse_ptr, begin, end, out_token_stride, out_head_stride, lse_token_stride, lse_head_stride,
    H_Q: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """Out 0 and lse -inf for tokens begin to end - 1."""
    column = tl.arange(0, DIMS[2])
    D_LATENT: tl.constexpr = DIMS[2]
    zeros = tl.zeros((D_LATENT,), out_ptr.dtype.element_ty)
    # One loop: the compiler of Triton 3.5 cannot lay out stores in two nested ones.
    for row in range(tl.cast(begin, tl.int64) * H_Q, tl.cast(end, tl.int64) * H_Q):
        place = row // H_Q
        head = row % H_Q
        target = out_ptr + place * out_token_stride + head * out_head_stride
        tl.store(target + column, zeros, mask=column < DIMS[1])
        tl.store(lse_ptr + place * lse_token_stride + head * lse_head_stride, float("-inf"))


@triton.jit
def write_orphans(
    cu_ptr, out_ptr, lse_ptr, fault_ptr, request, batch, total_q, s_q, out_token_stride, out_head_stride,
    lse_token_stride, lse_head_stride, H_Q: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """Rows in front of the first request (by request 0), beyond s_q of this one, and behind the last (by `batch`)."""
    begin, end = 0, 0
    is_bad = False
    if request < batch:
        first, count = query_span(cu_ptr, request, total_q, s_q, True)
        is_bad = (tl.load(cu_ptr + request) != first) | (tl.load(cu_ptr + request + 1) != first + count) | (count > s_q)
        begin, end = first + tl.minimum(count, s_q), first + count
        if request == 0:
            is_bad = is_bad | (first != 0)
            write_empty(
                out_ptr, lse_ptr, 0, first, out_token_stride, out_head_stride, lse_token_stride, lse_head_stride, H_Q,
                DIMS,
            )  # fmt: skip
    else:
        begin, end = 0, total_q
        if batch > 0:
            first, count = query_span(cu_ptr, batch - 1, total_q, s_q, True)
            begin = first + count
        is_bad = begin != total_q
    write_empty(
        out_ptr, lse_ptr, begin, end, out_token_stride, out_head_stride, lse_token_stride, lse_head_stride, H_Q, DIMS
    )  # fmt: skip
    tl.atomic_or(fault_ptr, CU_SEQLENS_NOT_MONOTONE, mask=is_bad, sem="relaxed")


# Numbers that differ from call to call; compiled anew for each that is 1 or a multiple of 16, a server would wait.
_FREE = ["batch", "total_q", "s_q", "lse_batch_stride", "lse_token_stride", "lse_head_stride"]


@triton.jit(do_not_specialize=_FREE)
def combine_kernel(
    out_accum_ptr,  # [slots, rows, d_v] fp32
    lse_accum_ptr,  # [slots, rows] fp32, base 2
    num_splits_ptr,  # [batch + 1] int32 with SPLITS 0
    cu_ptr,  # [batch + 1] int32 with IS_VARLEN
    sink_ptr,  # [h_q] fp32 with HAS_SINK
    out_ptr,  # [batch, s_q, h_q, d_v] or [total_q, h_q, d_v]
    lse_ptr,  # [batch, h_q, s_q] or [h_q, total_q]
    fault_ptr,  # [1] int32
    batch, total_q, s_q, out_batch_stride, out_token_stride, out_head_stride, lse_batch_stride, lse_token_stride,
    lse_head_stride,
    H_KV: tl.constexpr, GROUP: tl.constexpr, SPLITS: tl.constexpr, IS_VARLEN: tl.constexpr, HAS_SINK: tl.constexpr,
    IS_SUM: tl.constexpr, DIMS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """See the module."""
    request = tl.program_id(1)
    if IS_VARLEN and tl.program_id(0) == 0:
        write_orphans(
            cu_ptr, out_ptr, lse_ptr, fault_ptr, request, batch, total_q, s_q, out_token_stride, out_head_stride,
            lse_token_stride, lse_head_stride, H_KV * GROUP, DIMS,
        )  # fmt: skip
    splits = 0
    slot = request * 0
    if SPLITS > 0:
        splits = SPLITS
        slot = request * SPLITS
    elif request < batch:
        slot = tl.load(num_splits_ptr + request)
        splits = tl.load(num_splits_ptr + request + 1) - slot
    if splits > 1:
        first, count = query_span(cu_ptr, request, total_q, s_q, IS_VARLEN)
        rows = H_KV * GROUP * s_q
        row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        token = row // GROUP % tl.maximum(s_q, 1)
        head = row // tl.maximum(GROUP * s_q, 1) * GROUP + row % GROUP
        valid = (row < rows) & (token < count)
        column = tl.arange(0, DIMS[2])
        wanted = wanted_columns(valid, DIMS[1], DIMS[2])
        place = tl.cast(slot, tl.int64) * rows + row
        peak = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
        for split in range(0, splits):
            peak = tl.maximum(peak, tl.load(lse_accum_ptr + place + split * rows, mask=valid, other=float("-inf")))
        shift = tl.where(peak == float("-inf"), 0.0, peak)
        mass = tl.zeros((BLOCK_ROWS,), tl.float32)
        D_LATENT: tl.constexpr = DIMS[2]
        acc = tl.zeros((BLOCK_ROWS, D_LATENT), tl.float32)
        for split in range(0, splits):
            part = place + split * rows
            weight = tl.load(lse_accum_ptr + part, mask=valid, other=float("-inf"))
            if IS_SUM:
                mass += tl.where(valid, weight, 0.0)
                weight = tl.where(valid, 1.0, 0.0)
            else:
                weight = tl.exp2(weight - shift)
                mass += weight
            acc += weight[:, None] * tl.load(
                out_accum_ptr + part[:, None] * DIMS[1] + column[None, :], mask=wanted, other=0.0
            )  # fmt: skip
        if IS_SUM:
            out, lse2 = acc, tl.log2(mass)
        else:
            is_empty = mass == 0.0
            divisor = tl.where(is_empty, 1.0, mass)
            out = acc / divisor[:, None]
            lse2 = tl.where(is_empty, float("-inf"), shift + tl.log2(divisor))
        if HAS_SINK:
            out *= sink_share(lse2, tl.load(sink_ptr + head, mask=valid, other=0.0))[:, None]
        lead = tl.cast(request, tl.int64)
        where = token.to(tl.int64)
        if IS_VARLEN:
            lead = lead * 0
            where += first
        target = lead * out_batch_stride + where * out_token_stride + head.to(tl.int64) * out_head_stride
        tl.store(out_ptr + target[:, None] + column[None, :], out.to(out_ptr.dtype.element_ty), mask=wanted)
        target = lead * lse_batch_stride + where * lse_token_stride + head.to(tl.int64) * lse_head_stride
        tl.store(lse_ptr + target, lse2 * LN_2, mask=valid)
