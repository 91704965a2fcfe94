"""Attention over selected keys: sparse decode (paged, every layout, two caches) and sparse prefill (plain rows).

    out[t, h] = softmax_j(softmax_scale * <q[t, h], k[indices[t, j]]>) @ v[indices[t, j]],  v = k[..., :d_v]

A program is (query token, KV head, row tile; split). The rows of a tile are query heads of one token, which share its
selection: every gathered key is read once and used by BLOCK_M rows. Splits take even stretches of both index lists,
so that few tokens still fill the machine; their fp32 partials are merged by `combine`.

An index is a slot, page * page_size + offset. Negative ones and those beyond the cache are masked, and noted unless
they are -1; entries behind topk_length are not looked at.

Deep dive: docs/kernels/triton.md
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from openmla.backends.triton.rows import load_latent, load_rope, wanted_columns
from openmla.backends.triton.softmax import (
    LN_2,
    LOWEST,
    finish,
    fold_tile,
    load_queries,
    no_mass,
    sink_share,
    whole_top,
)

# Bits of openmla.core.faults.Fault.
INDEX_OUT_OF_RANGE = tl.constexpr(8)
TOPK_LENGTH_OUT_OF_RANGE = tl.constexpr(16)


@triton.jit
def selection_length(length_ptr, topk, fault_ptr, is_reporter, HAS_LENGTH: tl.constexpr):
    """How many leading indices count, clamped to [0, topk]; the reporter notes a bad one."""
    length = topk
    if HAS_LENGTH:
        raw = tl.load(length_ptr)
        is_bad = ((raw < 0) | (raw > topk)) & is_reporter
        tl.atomic_or(fault_ptr, TOPK_LENGTH_OUT_OF_RANGE, mask=is_bad, sem="relaxed")
        length = tl.minimum(tl.maximum(raw, 0), topk)
    return length


@triton.jit
def attend_selection(
    q_latent, q_rope, kv_ptr, indices, topk, length, split, num_slots, kv_page_stride, sign, scale2,
    peak, mass, acc, tops, strays, KV_ROW_STRIDE: tl.constexpr, APART: tl.constexpr, SPLITS: tl.constexpr, LAYOUT: tl.constexpr, DIMS: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A split's stretch of one index list (pointer `indices`); returns state and strays."""
    blocks = (topk + BLOCK_N - 1) // BLOCK_N
    low = split * blocks // SPLITS
    high = tl.minimum((split + 1) * blocks // SPLITS, (length + BLOCK_N - 1) // BLOCK_N)
    place = low * BLOCK_N + tl.arange(0, BLOCK_N)
    ahead = tl.load(indices + place, mask=place < length, other=-1)
    for block in tl.range(low, high, disable_licm=True, num_stages=STAGES):
        place = block * BLOCK_N + tl.arange(0, BLOCK_N)
        slot = ahead
        if STAGES > 1:  # read a tile ahead, as `decode.attend_range` does with page ids
            ahead = tl.load(indices + place + BLOCK_N, mask=place < length - BLOCK_N, other=-1)
        else:
            slot = tl.load(indices + place, mask=place < length, other=-1)
        present = slot.to(tl.uint32, bitcast=True) < num_slots.to(tl.uint32)  # one comparison; a negative one is large
        strays |= tl.where(present | (slot == -1), 0, 1)
        slot = tl.where(present, slot, 0)
        if PAGE_SIZE == 0:
            pages, offset = kv_ptr, slot.to(tl.int64)
        else:
            pages = kv_ptr + (slot // PAGE_SIZE).to(tl.int64) * kv_page_stride
            offset = (slot % PAGE_SIZE).to(tl.int64)
        if LAYOUT[0] == "plain":
            offset *= KV_ROW_STRIDE
        latent = load_latent(pages, offset, present, q_latent.dtype, LAYOUT, DIMS)
        rope = latent
        if DIMS[3] > 0:
            rope = load_rope(pages, offset, present, q_latent.dtype, LAYOUT, DIMS)
        peak, mass, acc, tops = fold_tile(
            q_latent, q_rope, latent, rope, present[None, :], sign, scale2, peak, mass, acc, tops, (), place, False,
            APART, None, DIMS,
        )  # fmt: skip
    return peak, mass, acc, tops, strays


@triton.jit
def store_rows(
    out, lse2, row, valid, out_ptr, lse_ptr, sink_ptr, out_head_stride, lse_head_stride, HAS_SINK: tl.constexpr,
    DIMS: tl.constexpr,
):  # fmt: skip
    """Finished rows of one token: `row` is the query head, out_ptr and lse_ptr point to the token."""
    column = tl.arange(0, DIMS[2])
    if HAS_SINK:
        out *= sink_share(lse2, tl.load(sink_ptr + row, mask=valid, other=0.0))[:, None]
    tl.store(
        out_ptr + row.to(tl.int64)[:, None] * out_head_stride + column[None, :], out.to(out_ptr.dtype.element_ty),
        mask=wanted_columns(valid, DIMS[1], DIMS[2]),
    )  # fmt: skip
    tl.store(lse_ptr + row.to(tl.int64) * lse_head_stride, lse2 * LN_2, mask=valid)


# Numbers that differ from call to call; compiled anew for each that is 1 or a multiple of 16, a server would wait.
_FREE = ["s_q", "tiles", "num_slots", "extra_num_slots", "lse_batch_stride", "lse_token_stride", "lse_head_stride"]


@triton.jit(do_not_specialize=_FREE)
def selected_kernel(
    q_ptr,  # [batch, s_q, h_q, d_qk]
    kv_ptr,  # [num_pages, page_size, h_kv, row]
    indices_ptr,  # [batch, s_q, h_kv, topk] int32
    length_ptr,  # [batch, s_q] int32 with HAS_LENGTH
    extra_kv_ptr, extra_indices_ptr, extra_length_ptr,  # the second cache, with EXTRA_LAYOUT
    sink_ptr,  # [h_q] fp32 with HAS_SINK
    out_ptr,  # [batch, s_q, h_q, d_v]
    lse_ptr,  # [batch, h_q, s_q] by its strides
    max_ptr,  # [s_q, h_q] fp32, contiguous, with HAS_MAX
    out_accum_ptr,  # [batch * SPLITS, s_q * h_q, d_v] fp32
    lse_accum_ptr,  # [batch * SPLITS, s_q * h_q] fp32, base 2
    fault_ptr,  # [1] int32
    sign, scale2, scale, s_q, tiles, topk, num_slots, extra_topk, extra_num_slots,
    q_batch_stride, q_token_stride, q_head_stride, kv_page_stride, kv_head_stride, indices_batch_stride,
    indices_token_stride, indices_head_stride, length_batch_stride, length_token_stride, extra_page_stride,
    extra_indices_batch_stride, extra_indices_token_stride, extra_length_batch_stride,
    extra_length_token_stride, out_batch_stride, out_token_stride, out_head_stride, lse_batch_stride, lse_token_stride,
    lse_head_stride,
    KV_ROW_STRIDE: tl.constexpr, EXTRA_ROW_STRIDE: tl.constexpr, H_KV: tl.constexpr, GROUP: tl.constexpr, HAS_LENGTH: tl.constexpr, HAS_SINK: tl.constexpr, HAS_MAX: tl.constexpr,
    COMPUTE: tl.constexpr, APART: tl.constexpr, LAYOUT: tl.constexpr, DIMS: tl.constexpr, PAGE_SIZE: tl.constexpr,
    EXTRA_LAYOUT: tl.constexpr, EXTRA_PAGE_SIZE: tl.constexpr, EXTRA_HAS_LENGTH: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """See the module. GROUP = h_q / h_kv; COMPUTE: dtype of the products; APART: see `fold_tile`; EXTRA_LAYOUT None:
    one cache; DIMS = (d_qk, d_v, D_LATENT, D_ROPE).
    """
    split = tl.program_id(1)
    tile = tl.program_id(0) % tiles
    kv_head = tl.program_id(0) // tiles % H_KV
    token = tl.program_id(0) // (tiles * H_KV)
    batch = (token // s_q).to(tl.int64)
    place = (token % s_q).to(tl.int64)
    is_reporter = (tile == 0) & (kv_head == 0) & (split == 0)
    member = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = member < GROUP
    row = kv_head * GROUP + member
    head = row.to(tl.int64)
    lead = kv_head.to(tl.int64)

    query = q_ptr + batch * q_batch_stride + place * q_token_stride + head * q_head_stride
    q_latent, q_rope = load_queries(query, valid, DIMS)
    q_latent, q_rope = q_latent.to(COMPUTE), q_rope.to(COMPUTE)
    peak = tl.full((BLOCK_M,), LOWEST, tl.float32)
    mass = no_mass(BLOCK_M, APART)
    tops = ()
    if HAS_MAX:  # the peak may stay below it
        tops = (no_mass(BLOCK_M, APART) + float("-inf"),)  # type: ignore[assignment]
    D_LATENT: tl.constexpr = DIMS[2]
    acc = tl.zeros((BLOCK_M, D_LATENT), tl.float32)
    strays = tl.zeros((BLOCK_N,), tl.int32)
    length = selection_length(
        length_ptr + batch * length_batch_stride + place * length_token_stride, topk, fault_ptr, is_reporter, HAS_LENGTH
    )  # fmt: skip
    indices = indices_ptr + batch * indices_batch_stride + place * indices_token_stride + lead * indices_head_stride
    peak, mass, acc, tops, strays = attend_selection(
        q_latent, q_rope, kv_ptr + lead * kv_head_stride, indices, topk, length, split, num_slots, kv_page_stride,
        sign, scale2, peak, mass, acc, tops, strays, KV_ROW_STRIDE, APART, SPLITS, LAYOUT, DIMS, PAGE_SIZE, BLOCK_N,
        STAGES,
    )  # fmt: skip
    if EXTRA_LAYOUT is not None:
        length = selection_length(
            extra_length_ptr + batch * extra_length_batch_stride + place * extra_length_token_stride, extra_topk,
            fault_ptr, is_reporter, EXTRA_HAS_LENGTH,
        )  # fmt: skip
        indices = extra_indices_ptr + batch * extra_indices_batch_stride + place * extra_indices_token_stride
        peak, mass, acc, tops, strays = attend_selection(
            q_latent, q_rope, extra_kv_ptr, indices, extra_topk, length, split, extra_num_slots, extra_page_stride,
            sign, scale2, peak, mass, acc, tops, strays, EXTRA_ROW_STRIDE, APART, SPLITS, EXTRA_LAYOUT, DIMS, EXTRA_PAGE_SIZE,
            BLOCK_N, STAGES,
        )  # fmt: skip
    stray = tl.max(strays, 0)
    tl.atomic_or(fault_ptr, stray * INDEX_OUT_OF_RANGE, mask=stray != 0, sem="relaxed")

    out, lse2 = finish(peak, mass, acc, scale2)
    if HAS_MAX:
        top = whole_top(tops)
        largest = tl.where(top == float("-inf"), top, top * scale)
        # A NaN score made lse NaN, and a maximum may pass over NaN; a score of +inf stays what it is.
        largest = tl.where((lse2 != lse2) & (top < float("inf")), lse2, largest)
        tl.store(max_ptr + place * (H_KV * GROUP) + head, largest, mask=valid)
    if SPLITS == 1:
        store_rows(
            out, lse2, row, valid, out_ptr + batch * out_batch_stride + place * out_token_stride,
            lse_ptr + batch * lse_batch_stride + place * lse_token_stride, sink_ptr, out_head_stride, lse_head_stride,
            HAS_SINK, DIMS,
        )  # fmt: skip
    else:
        column = tl.arange(0, DIMS[2])
        target = (batch * SPLITS + split) * s_q * (H_KV * GROUP) + place * (H_KV * GROUP) + head
        tl.store(
            out_accum_ptr + target[:, None] * DIMS[1] + column[None, :], out,
            mask=wanted_columns(valid, DIMS[1], DIMS[2]),
        )  # fmt: skip
        tl.store(lse_accum_ptr + target, lse2, mask=valid)
