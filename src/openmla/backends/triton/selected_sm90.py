"""Sparse prefill on Hopper in Gluon: what `selected` computes, in an order of copies and products that Triton does not choose.

    out[t, h] = softmax_j(softmax_scale * <q[t, h], kv[indices[t, j]]>) @ kv[indices[t, j], :d_v]

A program is (query token, KV head, 64 query heads). Two warpgroups share its 64 rows: each computes the scores of half of
a tile's 64 keys and half of the columns of the result. Queries and two tiles of keys stay in shared memory (3 x 72 KB).

    scores of tile i run | tile i + 1 is asked for | weights | products with the values of tile i, and behind them,
    as soon as it is there, the scores of tile i + 1

Triton itself puts the 18 copies per thread in front of the scores, where nothing covers them, and waits for every product
where it is issued.

Deep dive: docs/kernels/triton.md
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Its name changed between Triton 3.6 and 3.9.
copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
commit, wait_copies = async_copy.commit_group, async_copy.wait_group

ROWS, KEYS = gl.constexpr(64), gl.constexpr(64)
LATENT, ROPE = gl.constexpr(512), gl.constexpr(64)
LOWEST = gl.constexpr(-3.4028234663852886e38)  # where the peak begins: no difference is then -inf - -inf
MOST = gl.constexpr(256.0)  # of what a thread adds to a row before the peak moves
LOG2_E, LN_2 = gl.constexpr(1.4426950408889634), gl.constexpr(0.6931471805599453)
INDEX_OUT_OF_RANGE, TOPK_LENGTH_OUT_OF_RANGE = gl.constexpr(8), gl.constexpr(16)  # of openmla.core.faults.Fault

# Eight threads copy 128 bytes of a row, so a thread has the addresses of two rows, with constant distances of columns.
COPY = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0]))
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16]))
RESULT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 256, 16]))


@gluon.jit
def copy_rows(latent, rope, base, offset, wanted):
    """Asks for 64 rows at base + offset; zeros where not wanted."""
    latent_columns = gl.arange(0, LATENT, gl.SliceLayout(0, COPY))
    rope_columns = LATENT + gl.arange(0, ROPE, gl.SliceLayout(0, COPY))
    copy_async(latent, (base + latent_columns)[None, :] + offset[:, None], wanted[:, None])
    copy_async(rope, (base + rope_columns)[None, :] + offset[:, None], wanted[:, None])
    commit()


@gluon.jit
def copy_quarter(latents, here, base, offset, wanted, FIRST: gl.constexpr):
    """Asks for 128 columns of 64 rows."""
    part = latents.index(here).slice(FIRST, 128, dim=1)
    columns = FIRST + gl.arange(0, 128, gl.SliceLayout(0, COPY))
    copy_async(part, (base + columns)[None, :] + offset[:, None], wanted[:, None])


@gluon.jit
def scores_quarter(q_latent, latent, scores, FIRST: gl.constexpr):
    """The products of 128 columns, on their way."""
    left, right = q_latent.slice(FIRST, 128, dim=1), latent.slice(FIRST, 128, dim=1)
    return warpgroup_mma(left, right.permute((1, 0)), scores, use_acc=FIRST > 0, is_async=True)


@gluon.jit
def is_present(slot, num_slots):
    """One comparison: a negative slot is large."""
    return slot.to(gl.uint32, bitcast=True) < num_slots.to(gl.uint32)


@gluon.jit
def load_slots(indices, block, length, LAYOUT: gl.constexpr):
    """The slots of a tile; -1 behind the end."""
    place = block * KEYS + gl.arange(0, KEYS, LAYOUT)
    return gl.load(indices + place, mask=place < length, other=-1)


@gluon.jit
def selection_length(length_ptr, topk, fault_ptr, is_reporter, HAS_LENGTH: gl.constexpr):
    """As of `selected`."""
    length = topk
    if HAS_LENGTH:
        raw = gl.load(length_ptr)
        is_bad = ((raw < 0) | (raw > topk)) & is_reporter
        gl.atomic_or(fault_ptr, TOPK_LENGTH_OUT_OF_RANGE, mask=is_bad, sem="relaxed")
        length = gl.minimum(gl.maximum(raw, 0), topk)
    return length


@gluon.jit
def issue_scores(q_latent, q_rope, latent, rope):
    """The products of 64 rows and 64 keys, on their way; two groups of them."""
    nothing = gl.zeros([ROWS, KEYS], gl.float32, SCORES)
    scores = warpgroup_mma(q_latent, latent.permute((1, 0)), nothing, use_acc=False, is_async=True)
    return warpgroup_mma(q_rope, rope.permute((1, 0)), scores, is_async=True)


@gluon.jit
def share(tile):
    """Sums over the columns that a thread holds, [64, 2, 4]."""
    return gl.sum(gl.sum(gl.reshape(tile, [ROWS, 2, KEYS // 16, 4, 2]), 4), 2)


@gluon.jit
def largest_share(tile):
    """The largest, as `share` has sums."""
    return gl.max(gl.max(gl.reshape(tile, [ROWS, 2, KEYS // 16, 4, 2]), 4), 2)


@gluon.jit
def weigh(scores, sign, scale2, peak, mass, top, acc, seen):
    """(weights, peak, mass, top, acc): the peak moves only where weights are above MOST, as in `softmax.weigh_lazily`."""
    scores = gl.where(seen[None, :], scores * sign, float("-inf"))
    top = gl.maximum(top, largest_share(scores))
    weights = gl.exp2((scores - peak[:, None]) * scale2)
    added = share(weights)
    if gl.max(gl.where(added <= MOST, 0, 1)) != 0:  # a NaN moves it, too
        higher = gl.maximum(peak, gl.max(scores, 1))
        rescale = gl.exp2((peak - higher) * scale2)
        weights = gl.exp2((scores - higher[:, None]) * scale2)
        added = share(weights)
        of_share: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, mass.type.layout))
        mass *= gl.convert_layout(rescale, of_share)[:, None, None]
        acc *= gl.convert_layout(rescale, gl.SliceLayout(1, RESULT))[:, None]
        peak = higher
    return weights, peak, mass + added, top, acc


@gluon.jit
def finish(peak, mass, scale2):
    """(lse2, divisor of acc), [64]; -inf and 1 where no key was seen."""
    total = gl.convert_layout(gl.sum(gl.sum(mass, 2), 1), gl.SliceLayout(1, SCORES))
    is_empty = total == 0.0
    divisor = gl.where(is_empty, 1.0, total)
    return gl.where(is_empty, float("-inf"), peak * scale2 + gl.log2(divisor)), divisor


@gluon.jit
def store_rows(out, out_ptr, tile, kv_head, GROUP: gl.constexpr, out_head_stride):
    """A tile of the result, 16 bytes per thread and piece."""
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0])
    member = tile * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, WIDE))
    place = (kv_head * GROUP + member).to(gl.int64) * out_head_stride
    columns = gl.arange(0, LATENT, gl.SliceLayout(0, WIDE))
    gl.store(out_ptr + place[:, None] + columns[None, :], gl.convert_layout(out, WIDE), mask=(member < GROUP)[:, None])


@gluon.jit(do_not_specialize=["tiles", "num_slots", "lse_token_stride", "lse_head_stride"])
def selected_sm90_kernel(
    q_ptr,  # [tokens, h_q, 576]
    kv_ptr,  # [num_slots, h_kv, 576]
    indices_ptr,  # [tokens, h_kv, topk] int32
    length_ptr,  # [tokens] int32 with HAS_LENGTH
    sink_ptr,  # [h_q] fp32 with HAS_SINK
    out_ptr,  # [tokens, h_q, 512]
    lse_ptr,  # [tokens, h_q] by its strides
    max_ptr,  # [tokens, h_q] fp32, contiguous
    fault_ptr,  # [1] int32
    sign, scale2, scale, tiles, topk, num_slots, q_token_step, q_head_step, kv_head_step, indices_token_stride,
    indices_head_stride, out_token_stride, out_head_stride, lse_token_stride, lse_head_stride,
    KV_ROW_STRIDE: gl.constexpr, H_KV: gl.constexpr, GROUP: gl.constexpr, HAS_LENGTH: gl.constexpr,
    HAS_SINK: gl.constexpr,
):  # fmt: skip
    """See the module. GROUP = h_q / h_kv; 8 warps. Steps are strides in 16 bytes: copies of that size need to know it."""
    tile = gl.program_id(0) % tiles
    kv_head = gl.program_id(0) // tiles % H_KV
    token = (gl.program_id(0) // (tiles * H_KV)).to(gl.int64)
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_latent = gl.allocate_shared_memory(dtype, [ROWS, LATENT], shared)
    q_rope = gl.allocate_shared_memory(dtype, [ROWS, ROPE], shared)
    latents = gl.allocate_shared_memory(dtype, [2, KEYS, LATENT], shared)
    ropes = gl.allocate_shared_memory(dtype, [2, KEYS, ROPE], shared)
    weights_of = gl.allocate_shared_memory(dtype, [ROWS, KEYS], shared)

    length = selection_length(length_ptr + token, topk, fault_ptr, (tile == 0) & (kv_head == 0), HAS_LENGTH)
    blocks = (length + KEYS - 1) // KEYS
    rows: gl.constexpr = gl.SliceLayout(1, COPY)
    keys: gl.constexpr = gl.SliceLayout(0, SCORES)
    indices = indices_ptr + token * indices_token_stride + kv_head.to(gl.int64) * indices_head_stride
    kv = kv_ptr + kv_head.to(gl.int64) * kv_head_step * 8
    slot = load_slots(indices, 0, length, rows)
    member = tile * ROWS + gl.arange(0, ROWS, rows)
    q = q_ptr + token * q_token_step * 8
    copy_rows(q_latent, q_rope, q, (kv_head * GROUP + member).to(gl.int64) * q_head_step * 8, member < GROUP)
    present = is_present(slot, num_slots)
    strays = gl.where(present | (slot == -1), 0, 1)
    copy_rows(latents.index(0), ropes.index(0), kv, gl.where(present, slot, 0).to(gl.int64) * KV_ROW_STRIDE, present)
    slot = load_slots(indices, 1, length, rows)

    peak = gl.full([ROWS], LOWEST, gl.float32, gl.SliceLayout(1, SCORES))
    mass = share(gl.zeros([ROWS, KEYS], gl.float32, SCORES))
    top = largest_share(gl.full([ROWS, KEYS], float("-inf"), gl.float32, SCORES))
    acc = gl.zeros([ROWS, LATENT], gl.float32, RESULT)
    for block in tl.range(0, blocks, disable_licm=True, num_stages=1):
        here, other = block & 1, (block & 1) ^ 1
        present = is_present(slot, num_slots)
        strays |= gl.where(present | (slot == -1), 0, 1)
        offset = gl.where(present, slot, 0).to(gl.int64) * KV_ROW_STRIDE
        latent = latents.index(here)
        wait_copies(0)
        fence_async_shared()
        scores = scores_quarter(q_latent, latent, gl.zeros([ROWS, KEYS], gl.float32, SCORES), 0)
        copy_quarter(latents, other, kv, offset, present, 0)
        scores = scores_quarter(q_latent, latent, scores, 128)
        copy_quarter(latents, other, kv, offset, present, 128)
        scores = scores_quarter(q_latent, latent, scores, 256)
        copy_quarter(latents, other, kv, offset, present, 256)
        scores = scores_quarter(q_latent, latent, scores, 384)
        copy_quarter(latents, other, kv, offset, present, 384)
        scores = warpgroup_mma(q_rope, ropes.index(here).permute((1, 0)), scores, is_async=True)
        rope_columns = LATENT + gl.arange(0, ROPE, gl.SliceLayout(0, COPY))
        copy_async(ropes.index(other), (kv + rope_columns)[None, :] + offset[:, None], present[:, None])
        commit()
        slot = load_slots(indices, block + 2, length, rows)
        seen = load_slots(indices, block, length, keys)
        scores = warpgroup_mma_wait(0, deps=[scores])
        weights, peak, mass, top, acc = weigh(scores, sign, scale2, peak, mass, top, acc, is_present(seen, num_slots))
        weights_of.store(weights.to(dtype))
        fence_async_shared()
        acc = warpgroup_mma(weights_of, latent, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
    wait_copies(0)
    stray = gl.max(strays, 0)
    gl.atomic_or(fault_ptr, stray * INDEX_OUT_OF_RANGE, mask=stray != 0, sem="relaxed")

    lse2, divisor = finish(peak, mass, scale2)
    member = tile * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    valid = member < GROUP
    head = (kv_head * GROUP + member).to(gl.int64)
    largest = gl.convert_layout(gl.max(gl.max(top, 2), 1), gl.SliceLayout(1, SCORES))
    # A NaN score made lse NaN, and a maximum may pass over NaN; a score of +inf stays what it is.
    found = gl.where(largest == float("-inf"), largest, largest * scale)
    found = gl.where((lse2 != lse2) & (largest < float("inf")), lse2, found)
    gl.store(max_ptr + token * (H_KV * GROUP) + head, found, mask=valid)
    gl.store(lse_ptr + token * lse_token_stride + head * lse_head_stride, lse2 * LN_2, mask=valid)
    factor = 1.0 / divisor
    if HAS_SINK:
        sink = gl.load(sink_ptr + head, mask=valid, other=0.0)
        kept = 1.0 / (1.0 + gl.exp2(sink * LOG2_E - lse2))
        factor *= gl.where(lse2 == float("-inf"), 1.0, kept)
    out = (acc * gl.convert_layout(factor, gl.SliceLayout(1, RESULT))[:, None]).to(dtype)
    store_rows(out, out_ptr + token * out_token_stride, tile, kv_head, GROUP, out_head_stride)
