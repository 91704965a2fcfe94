"""Dense decode over a paged cache: split-KV, varlen queries, causal, window, sink, every KV layout.

    out[b, i, h] = softmax_j(softmax_scale * <q[b, i, h], k[b, j]>) @ v[b, j],  v = k[..., :d_v]

A program is (row tile and KV head, part). The rows of a request and KV head are its s_q * h_q / h_kv queries, token
after token; BLOCK_M of them share every KV tile that is loaded. A part walks over the pieces that the plan gives it
(`openmla.split.schedule`), each a stretch of KV tiles of one request:

    request with one piece      -> out and lse, finished here
    request with several        -> fp32 partials in the workspace, merged by `combine`

The grid is (tiles * h_kv, parts): tiles of one part run side by side and find its KV in the L2 cache. It is fixed by
the problem; lengths are read on the device.

Plans cannot be stale: the last piece of a request ends where the request ends now, other pieces shrink to what is
there, so every key is read once by somebody, whatever lengths the plan was made for. It is only balanced for those.

Loops keep what does not change inside them (disable_licm): hoisted, the addresses of queries in shared memory alone
would take 72 registers beside the accumulator's 128, and go to the stack.

Deep dive: docs/kernels/triton.md
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from openmla.backends.triton.inline import rotate_queries
from openmla.backends.triton.rows import load_latent, load_rope, row_offsets, wanted_columns
from openmla.backends.triton.softmax import (
    LN_2,
    LOWEST,
    finish,
    fold_tile,
    load_queries,
    no_mass,
    sink_share,
    whole_mass,
)

# Bits of openmla.core.faults.Fault.
PAGE_OUT_OF_RANGE = tl.constexpr(1)
LENGTH_NEGATIVE = tl.constexpr(2)
LENGTH_OVER_CAPACITY = tl.constexpr(4)
CU_SEQLENS_NOT_MONOTONE = tl.constexpr(32)


@triton.jit
def query_span(cu_ptr, request, total_q, s_q, IS_VARLEN: tl.constexpr):
    """(first query token in q, number of query tokens) of a request; offsets clamped to [0, total_q], never falling."""
    first = request * s_q
    count = s_q
    if IS_VARLEN:
        first = 0
        for base in range(0, request + 1, 256):
            place = base + tl.arange(0, 256)
            first = tl.maximum(first, tl.max(tl.load(cu_ptr + place, mask=place <= request, other=0), 0))
        first = tl.minimum(first, total_q)
        count = tl.maximum(tl.minimum(tl.load(cu_ptr + request + 1), total_q), first) - first
    return first, count


@triton.jit
def request_length(seqlens_ptr, request, capacity, fault_ptr, is_reporter):
    """Keys of a request, clamped to what the block table can address; the reporter notes a bad one."""
    raw = tl.load(seqlens_ptr + request)
    bits = tl.where(raw < 0, LENGTH_NEGATIVE, 0) | tl.where(raw > capacity, LENGTH_OVER_CAPACITY, 0)
    tl.atomic_or(fault_ptr, bits, mask=(bits != 0) & is_reporter, sem="relaxed")
    return tl.minimum(tl.maximum(raw, 0), capacity)


@triton.jit
def visible(token, count, length, IS_CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """[begin, end) of the keys that query `token` of `count` sees; causal is aligned to the bottom right."""
    end = length + token * 0
    if IS_CAUSAL or WINDOW > 0:
        end = tl.minimum(tl.maximum(length - count + token + 1, 0), length)
    begin = end * 0
    if WINDOW > 0:
        begin = tl.maximum(end - WINDOW, 0)
    return begin, end


@triton.jit
def pieces_here(metadata, request, splits, chunk_blocks):
    """How many pieces of a request its part computes; metadata points to the part's row."""
    here = 1
    if chunk_blocks > 0:
        is_first = request == tl.load(metadata)
        begin = tl.where(is_first, tl.load(metadata + 2), 0)
        left = splits - tl.where(is_first, tl.load(metadata + 4), 0)
        planned = (tl.load(metadata + 3) - begin + chunk_blocks - 1) // chunk_blocks
        here = tl.where(request == tl.load(metadata + 1), tl.minimum(planned, left), left)
        here = tl.maximum(here, 1)
    return here


@triton.jit
def piece_at(metadata, request, splits, index, blocks, chunk_blocks):
    """(split, begin block, end block) of piece `index` of a request within a part.

    The last split of a request ends where its blocks end as they are now, no other reaches beyond that.
    """
    is_first = request == tl.load(metadata)
    begin = tl.where(is_first, tl.load(metadata + 2), 0)
    split = tl.where(is_first, tl.load(metadata + 4), 0) + index
    end = tl.load(metadata + 3)
    if chunk_blocks > 0:
        begin += index * chunk_blocks
        end = begin + chunk_blocks
    return split, begin, tl.where(split == splits - 1, blocks, tl.minimum(end, blocks))


@triton.jit
def read_pages(table, start, length, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Page ids of the keys start to start + BLOCK_N - 1 below length, as the table has them; 0 for the others.

    Where a page holds whole tiles that is one number, and one load; else [BLOCK_N].
    """
    if PAGE_SIZE % BLOCK_N == 0:
        pages = tl.load(table + start // PAGE_SIZE, mask=start < length, other=0)
    else:
        place = start + tl.arange(0, BLOCK_N)
        pages = tl.load(table + place // PAGE_SIZE, mask=place < length, other=0)
    return pages


@triton.jit
def find_rows(
    pages, kv_ptr, start, length, num_pages, kv_page_stride, IS_FULL: tl.constexpr, KV_ROW_STRIDE: tl.constexpr,
    LAYOUT: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(pointers, offset, present [BLOCK_N], strays [BLOCK_N]) of keys whose page ids are `pages`, of `read_pages`.

    A row lies at its pointer plus its offset (int64 [BLOCK_N]), counted in elements of a plain row and in tokens of a
    byte layout. A page id outside [0, num_pages) makes its keys absent; strays is 1 where that happened. Where a page
    holds whole tiles there is one pointer and one test for all keys of a tile that IS_FULL.
    """
    place = start + tl.arange(0, BLOCK_N)
    exists = (pages >= 0) & (pages < num_pages)
    pointers = kv_ptr + tl.where(exists, pages, 0).to(tl.int64) * kv_page_stride
    within = tl.full((BLOCK_N,), 1, tl.int1)
    exists = within & exists
    if not IS_FULL:
        within = place < length
    if LAYOUT[0] == "plain" and PAGE_SIZE % BLOCK_N == 0:
        pointers += (start % PAGE_SIZE).to(tl.int64) * KV_ROW_STRIDE
        offset = row_offsets(BLOCK_N, KV_ROW_STRIDE)
    else:
        pointers += tl.zeros((BLOCK_N,), tl.int32)
        offset = (place % PAGE_SIZE).to(tl.int64)
        if LAYOUT[0] == "plain":
            offset *= KV_ROW_STRIDE
    return pointers, offset, within & exists, (within & ~exists).to(tl.int32)


@triton.jit
def attend_range(
    q_latent, q_rope, kv_ptr, table, low, high, turn, step, begin, end, hull_begin, hull_end, num_pages, kv_page_stride,
    sign, scale2, peak, mass, acc, strays, site, KV_ROW_STRIDE: tl.constexpr, IS_FULL: tl.constexpr, MIXED: tl.constexpr,
    APART: tl.constexpr, MODS: tl.constexpr, LAYOUT: tl.constexpr, DIMS: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """KV tiles low to high - 1, of which those from `turn` on stand `step` tiles further; returns state and strays.

    [begin, end) is what each row sees, [hull_begin, hull_end) what any of the rows sees. IS_FULL: every row sees every
    key of these tiles, so nothing is compared per key. Page ids are read a tile ahead:
    fetched where they are needed, they would cost each tile the latency of a load, or the pipeline a stage.
    """
    start = (low + tl.where(low < turn, 0, step)) * BLOCK_N
    ahead = read_pages(table, start, hull_end, PAGE_SIZE, BLOCK_N)
    for index in tl.range(low, high, disable_licm=True, num_stages=STAGES):
        pages = ahead
        start = (index + 1 + tl.where(index + 1 < turn, 0, step)) * BLOCK_N
        ahead = read_pages(table, start, hull_end, PAGE_SIZE, BLOCK_N)
        start = (index + tl.where(index < turn, 0, step)) * BLOCK_N
        place = start + tl.arange(0, BLOCK_N)
        pointers, offset, present, stray = find_rows(
            pages, kv_ptr, start, hull_end, num_pages, kv_page_stride, IS_FULL, KV_ROW_STRIDE, LAYOUT, PAGE_SIZE,
            BLOCK_N,
        )  # fmt: skip
        if not IS_FULL:
            stray = tl.where(place >= hull_begin, stray, 0)
            present = present & (place >= hull_begin)
        strays |= stray
        latent = load_latent(pointers, offset, present, q_latent.dtype, LAYOUT, DIMS)
        rope = latent
        if DIMS[3] > 0:
            rope = load_rope(pointers, offset, present, q_latent.dtype, LAYOUT, DIMS)
        seen = present[None, :]
        if MIXED:
            seen = seen & (place[None, :] >= begin[:, None]) & (place[None, :] < end[:, None])
        peak, mass, acc, _ = fold_tile(
            q_latent, q_rope, latent, rope, seen, sign, scale2, peak, mass, acc, (), site, place, MIXED, APART, MODS, DIMS
        )  # fmt: skip
    return peak, mass, acc, strays


@triton.jit
def attend_piece(
    q_latent, q_rope, kv_ptr, table, first_block, end_block, token, token_low, token_high, count, length, num_pages,
    kv_page_stride, sign, scale2, strays, site, KV_ROW_STRIDE: tl.constexpr, IS_CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, MIXED: tl.constexpr, APART: tl.constexpr, MODS: tl.constexpr, LAYOUT: tl.constexpr,
    DIMS: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(out [BLOCK_M, D_LATENT], lse2 [BLOCK_M], strays) of the rows over KV tiles first_block to end_block - 1.

    MIXED: where rows may differ in what they see, "nowhere", at the "edges" of causal and window, or "everywhere".
    With an activation lse2 is the sum of weights itself, which pieces can add.
    token [BLOCK_M] is the query of each row, from token_low to token_high; token_high < 0 where there is no row.
    """
    peak = tl.full((BLOCK_M,), LOWEST, tl.float32)
    mass = no_mass(BLOCK_M, APART)
    D_LATENT: tl.constexpr = DIMS[2]
    acc = tl.zeros((BLOCK_M, D_LATENT), tl.float32)
    begin, end = visible(token, count, length, IS_CAUSAL, WINDOW)
    hull_begin, low_end = visible(token_low, count, length, IS_CAUSAL, WINDOW)
    high_begin, hull_end = visible(token_high, count, length, IS_CAUSAL, WINDOW)
    hull_end = tl.where(token_high < 0, 0, hull_end)
    low = tl.maximum(first_block, hull_begin // BLOCK_N)
    high = tl.maximum(tl.minimum(end_block, (hull_end + BLOCK_N - 1) // BLOCK_N), low)
    # Tiles that every row sees in full come first; those at the ends of what rows see need care and come last.
    inner_low = tl.minimum(tl.maximum((high_begin + BLOCK_N - 1) // BLOCK_N, low), high)
    inner_high = tl.maximum(tl.minimum(low_end // BLOCK_N, high), inner_low)
    if MIXED == "everywhere":
        inner_high = inner_low
    else:
        peak, mass, acc, strays = attend_range(
            q_latent, q_rope, kv_ptr, table, inner_low, inner_high, inner_high, 0, begin, end, hull_begin, hull_end,
            num_pages, kv_page_stride, sign, scale2, peak, mass, acc, strays, site, KV_ROW_STRIDE, True, False, APART,
            MODS, LAYOUT, DIMS, PAGE_SIZE, BLOCK_N, STAGES,
        )  # fmt: skip
    inner = inner_high - inner_low
    peak, mass, acc, strays = attend_range(
        q_latent, q_rope, kv_ptr, table, low, high - inner, inner_low, inner, begin, end, hull_begin, hull_end,
        num_pages, kv_page_stride, sign, scale2, peak, mass, acc, strays, site, KV_ROW_STRIDE, False,
        MIXED != "nowhere", APART, MODS, LAYOUT, DIMS, PAGE_SIZE, BLOCK_N, STAGES,
    )  # fmt: skip
    HAS_ACTIVATION: tl.constexpr = MODS is not None and len(MODS[2]) > 0
    if HAS_ACTIVATION:
        out, lse2 = acc, whole_mass(mass)
    else:
        out, lse2 = finish(peak, mass, acc, scale2)
    return out, lse2, strays


@triton.jit
def row_pointers(
    base, first, tile, place, head, token_stride, HEAD_STRIDE: tl.constexpr, IS_FLAT: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Pointers to (token `place`, `head`) of each row; where queries lie without gaps, rows are HEAD_STRIDE apart.

    A constant distance lets the compiler keep one address per thread, and the rest as offsets in the instructions.
    """
    if IS_FLAT:
        base += tl.cast(first, tl.int64) * token_stride + tl.cast(tile, tl.int64) * (BLOCK_M * HEAD_STRIDE)
        pointers = base + tl.arange(0, BLOCK_M) * HEAD_STRIDE
    else:
        pointers = base + place * token_stride + head.to(tl.int64) * HEAD_STRIDE
    return pointers


# Numbers that differ from call to call; compiled anew for each that is 1 or a multiple of 16, a server would wait.
_FREE = ["total_q", "s_q", "capacity", "num_pages", "chunk_blocks", "tiles", "table_stride", "lse_batch_stride"]


@triton.jit(do_not_specialize=_FREE)
def decode_kernel(
    q_ptr,  # [batch, s_q, h_q, d_qk], or [total_q, h_q, d_qk] with IS_VARLEN and q_batch_stride 0
    kv_ptr,  # [num_pages, page_size, h_kv, row]
    table_ptr,  # [batch, max_pages] int32
    seqlens_ptr,  # [batch] int32
    cu_ptr,  # [batch + 1] int32 with IS_VARLEN
    sink_ptr,  # [h_q] fp32 with HAS_SINK
    descale_q_ptr,  # [1] fp32 where the cache holds codes alone
    descale_k_ptr,  # [1] fp32 likewise
    metadata_ptr,  # [parts, 8] int32
    num_splits_ptr,  # [batch + 1] int32
    out_ptr,  # like q, d_v columns
    lse_ptr,  # [batch, h_q, s_q] or [h_q, total_q] fp32
    out_accum_ptr,  # [slots, h_q * s_q, d_v] fp32
    lse_accum_ptr,  # [slots, h_q * s_q] fp32, base 2; sums of weights with an activation
    fault_ptr,  # [1] int32
    tables, rope,  # of mods: see `openmla.backends.triton.inline`
    sign, scale2, scale, total_q, s_q, capacity, num_pages, chunk_blocks, tiles,
    q_batch_stride, q_token_stride, kv_page_stride, kv_head_stride, table_stride, out_batch_stride, out_token_stride,
    lse_batch_stride, lse_token_stride, lse_head_stride,
    Q_HEAD_STRIDE: tl.constexpr, KV_ROW_STRIDE: tl.constexpr, OUT_HEAD_STRIDE: tl.constexpr, IS_FLAT: tl.constexpr,
    H_KV: tl.constexpr, GROUP: tl.constexpr, IS_CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MIXED: tl.constexpr,
    IS_VARLEN: tl.constexpr, HAS_SINK: tl.constexpr, COMPUTE: tl.constexpr, APART: tl.constexpr, MODS: tl.constexpr,
    LAYOUT: tl.constexpr, DIMS: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """See the module. GROUP = h_q / h_kv; MIXED: see `attend_piece`; COMPUTE: dtype of the products; APART: see
    `fold_tile`; MODS: see `inline`; DIMS = (d_qk, d_v, D_LATENT, D_ROPE).
    """
    HAS_ACTIVATION: tl.constexpr = MODS is not None and len(MODS[2]) > 0
    HAS_DESCALE: tl.constexpr = LAYOUT[0] != "plain" and LAYOUT[1] == "none"
    descale = 1.0
    if HAS_DESCALE:
        descale = tl.load(descale_k_ptr)
        both = tl.load(descale_q_ptr) * descale
        scale *= both
        if MODS is None:  # else scores are in natural units already
            sign *= tl.where(both < 0, -1.0, 1.0)
            scale2 *= tl.abs(both)
    tile = tl.program_id(0) % tiles
    kv_head = tl.program_id(0) // tiles
    metadata = metadata_ptr + tl.program_id(1) * 8
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    head = kv_head * GROUP + row % GROUP
    column = tl.arange(0, DIMS[2])
    strays = tl.zeros((BLOCK_N,), tl.int32)
    for request in tl.range(tl.load(metadata), tl.load(metadata + 1) + 1, disable_licm=True):
        first, count = query_span(cu_ptr, request, total_q, s_q, IS_VARLEN)
        length = request_length(seqlens_ptr, request, capacity, fault_ptr, tl.program_id(0) == 0)
        rows = tl.minimum(count, s_q) * GROUP  # a longer request than was announced: `combine` writes the rest
        valid = row < rows
        token = tl.minimum(row, tl.maximum(rows - 1, 0)) // GROUP
        token_low = tile * BLOCK_M // GROUP
        token_high = tl.where(tile * BLOCK_M < rows, (tl.minimum(tile * BLOCK_M + BLOCK_M, rows) - 1) // GROUP, -1)
        lead = tl.cast(request, tl.int64)
        if IS_VARLEN:
            lead = lead * 0
        else:
            first = 0
        place = first + token.to(tl.int64)
        query = row_pointers(
            q_ptr + lead * q_batch_stride, first, tile, place, head, q_token_stride, Q_HEAD_STRIDE, IS_FLAT, BLOCK_M
        )  # fmt: skip
        q_latent, q_rope = load_queries(query, valid, DIMS)
        q_idx = length - count + token
        site = (request, head, q_idx, scale, tables)
        if MODS is not None and MODS[3] is not None:
            q_rope = rotate_queries(q_rope, query, valid, q_idx, rope, MODS, DIMS)
        splits = tl.load(num_splits_ptr + request + 1) - tl.load(num_splits_ptr + request)
        here = pieces_here(metadata, request, splits, chunk_blocks)
        for index in tl.range(0, here, disable_licm=True):
            split, first_block, end_block = piece_at(
                metadata, request, splits, index, (length + BLOCK_N - 1) // BLOCK_N, chunk_blocks
            )  # fmt: skip
            out, lse2, strays = attend_piece(
                q_latent.to(COMPUTE), q_rope.to(COMPUTE), kv_ptr + tl.cast(kv_head, tl.int64) * kv_head_stride,
                table_ptr + tl.cast(request, tl.int64) * table_stride, first_block, end_block, token, token_low,
                token_high, count, length, num_pages, kv_page_stride, sign, scale2, strays, site, KV_ROW_STRIDE,
                IS_CAUSAL, WINDOW, MIXED, APART, MODS, LAYOUT, DIMS, PAGE_SIZE, BLOCK_M, BLOCK_N, STAGES,
            )  # fmt: skip
            if HAS_DESCALE:
                out *= descale
            if splits == 1:
                if HAS_ACTIVATION:
                    lse2 = tl.log2(lse2)
                if HAS_SINK:
                    out *= sink_share(lse2, tl.load(sink_ptr + head))[:, None]
                target = row_pointers(
                    out_ptr + lead * out_batch_stride, first, tile, place, head, out_token_stride, OUT_HEAD_STRIDE,
                    IS_FLAT, BLOCK_M,
                )  # fmt: skip
                tl.store(
                    target[:, None] + column[None, :], out.to(out_ptr.dtype.element_ty),
                    mask=wanted_columns(valid, DIMS[1], DIMS[2]),
                )  # fmt: skip
                lse_target = lead * lse_batch_stride + place * lse_token_stride + head.to(tl.int64) * lse_head_stride
                tl.store(lse_ptr + lse_target, lse2 * LN_2, mask=valid)
            else:
                slot = (tl.load(num_splits_ptr + request) + split).to(tl.int64) * (H_KV * GROUP * s_q)
                slot += kv_head * GROUP * s_q + tile * BLOCK_M
                partial = out_accum_ptr + slot * DIMS[1] + tl.arange(0, BLOCK_M) * DIMS[1]
                tl.store(partial[:, None] + column[None, :], out, mask=wanted_columns(valid, DIMS[1], DIMS[2]))
                tl.store(lse_accum_ptr + slot + tl.arange(0, BLOCK_M), lse2, mask=valid)
    stray = tl.max(strays, 0)
    tl.atomic_or(fault_ptr, stray * PAGE_OUT_OF_RANGE, mask=stray != 0, sem="relaxed")
