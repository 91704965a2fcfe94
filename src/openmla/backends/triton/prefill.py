"""Varlen prefill over expanded K and V, forward and backward, without atomics: the same input gives the same bits.

    S = softmax_scale q k^T     P = exp(S - lse)     out = P v
    D = rowsum(dO * O)     dS = P * (dO v^T - D)     dv = P^T dO     dq = softmax_scale dS k     dk = softmax_scale dS^T q

Forward and dq: a program is (tile of queries, query head, request) and walks over keys. dk and dv: a program is (tile of
keys, KV head, request) and walks over the query heads of its group and their tiles, so that nothing is added by two
programs. Scores are recomputed from lse in both.

Columns of q and k are cut into a power of two and a rest, 192 = 128 + 64: DIMS = (d_qk, d_v, D_VALUE, D_LOW, D_HIGH),
where D_LOW columns are never padded, the other two are. Lengths are what the offsets say; max_seqlen_q and max_seqlen_k
only size the grid, and a program takes every num_programs-th tile, so longer requests are slower, not wrong.

Source: FlashAttention-2 (arXiv 2307.08691), algorithms 1 and 2. Deep dive: docs/kernels/triton.md
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from openmla.backends.triton.combine import write_orphans
from openmla.backends.triton.decode import CU_SEQLENS_NOT_MONOTONE, query_span
from openmla.backends.triton.rows import load_plain
from openmla.backends.triton.softmax import LN_2, LOG2_E, finish, weigh

NO_LIMIT = tl.constexpr(2147483647)


@triton.jit
def load_halves(row, valid, DIMS: tl.constexpr):
    """(low [rows, D_LOW], high [rows, D_HIGH]) of q or k at those row pointers; high is low where there is no rest."""
    low = load_plain(row, valid, 0, DIMS[3], DIMS[3])
    high = low
    if DIMS[4] > 0:
        high = load_plain(row, valid, DIMS[3], DIMS[0] - DIMS[3], DIMS[4])
    return low, high


@triton.jit
def multiply(low, high, other_low, other_high, DIMS: tl.constexpr):
    """[rows, other rows] fp32 products of two tiles of queries or keys."""
    found = tl.dot(low, tl.trans(other_low), input_precision="ieee")
    if DIMS[4] > 0:
        found = tl.dot(high, tl.trans(other_high), acc=found, input_precision="ieee")
    return found


@triton.jit
def row_starts(base, token, head, token_stride, head_stride):
    """Pointers to the rows (token, head) of q, k, v, out and their gradients."""
    return base + token.to(tl.int64) * token_stride + tl.cast(head, tl.int64) * head_stride


@triton.jit
def add_odd_values(acc, weights, seen, value, BLOCK_N: tl.constexpr):
    """Adds to acc what values that are not finite give to the rows that see them: w * inf is inf, 0 * inf NaN."""
    column = tl.arange(0, BLOCK_N)
    for key in range(0, BLOCK_N):
        is_key = column == key
        row = tl.sum(tl.where(is_key[:, None], value, 0.0).to(tl.float32), 0)
        weight = tl.sum(tl.where(is_key[None, :], weights, 0.0).to(tl.float32), 1)
        sees = tl.max((seen & is_key[None, :]).to(tl.int32), 1) > 0
        is_odd = (row != row) | (tl.abs(row) == float("inf"))
        acc += tl.where(sees[:, None] & is_odd[None, :], weight[:, None] * row[None, :], 0.0)
    return acc


@triton.jit
def attend_keys(
    q_low, q_high, k_ptr, v_ptr, first_key, end, low, high, limit, k_token_stride, v_token_stride, sign, scale2, peak,
    mass, acc, MIXED: tl.constexpr, STAY: tl.constexpr, DIMS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Tiles low to high - 1 of a request's keys, of which rows see those below `limit` and, MIXED, below `end` [BLOCK_M]."""
    for tile in tl.range(low, high, disable_licm=STAY):
        place = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        exists = place < limit
        token = first_key + place
        k_low, k_high = load_halves(row_starts(k_ptr, token, 0, k_token_stride, 0), exists, DIMS)
        value = load_plain(row_starts(v_ptr, token, 0, v_token_stride, 0), exists, 0, DIMS[1], DIMS[2])
        scores = multiply(q_low, q_high, k_low, k_high, DIMS)
        seen = exists[None, :]
        if MIXED:
            seen = seen & (place[None, :] < end[:, None])
        peak, mass, rescale, weights = weigh(scores, seen, sign, scale2, peak, mass, (), place, "", None, value.dtype)
        acc = acc * rescale[:, None]
        if MIXED:
            # A value that some rows do not see must not reach them as 0 * NaN.
            finite = tl.abs(value) < float("inf")
            if tl.min(tl.min(finite.to(tl.int32), 1), 0) == 0:
                acc = add_odd_values(acc, weights, seen, value, BLOCK_N)
            value = tl.where(finite, value, 0.0)
        acc = tl.dot(weights, value, acc=acc, input_precision="ieee")
    return peak, mass, acc


@triton.jit
def key_limits(first_row, last_row, s_q, s_k, IS_CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr):
    """(keys that any row sees, tiles that every row sees in full) of rows first_row to last_row of a request."""
    limit = s_k
    full = s_k // BLOCK_N
    if IS_CAUSAL:
        limit = tl.minimum(tl.maximum(s_k - s_q + last_row + 1, 0), s_k)
        full = tl.minimum(tl.maximum(s_k - s_q + first_row + 1, 0), s_k) // BLOCK_N
    return limit, full


# Numbers that differ from call to call; compiled anew for each that is 1 or a multiple of 16, a trainer would wait.
_FREE = ["batch", "total_q", "total_k", "lse_head_stride"]


@triton.jit(do_not_specialize=_FREE)
def prefill_kernel(
    q_ptr,  # [total_q, h_q, d_qk]
    k_ptr,  # [total_k, h_kv, d_qk]
    v_ptr,  # [total_k, h_kv, d_v]
    cu_q_ptr, cu_k_ptr,  # [batch + 1] int32
    out_ptr,  # [total_q, h_q, d_v]
    lse_ptr,  # [h_q, total_q] fp32
    fault_ptr,  # [1] int32
    sign, scale2, batch, total_q, total_k,
    q_token_stride, q_head_stride, k_token_stride, k_head_stride, v_token_stride, v_head_stride, out_token_stride,
    out_head_stride, lse_head_stride, lse_token_stride,
    GROUP: tl.constexpr, H_Q: tl.constexpr, IS_CAUSAL: tl.constexpr, COMPUTE: tl.constexpr, DIMS: tl.constexpr,
    STAY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """See the module. Grid (tiles, h_q, batch + 1): the last request stands for rows that no request owns."""
    head = tl.program_id(1)
    request = tl.program_id(2)
    if tl.program_id(0) == 0 and head == 0:
        write_orphans(
            cu_q_ptr, out_ptr, lse_ptr, fault_ptr, request, batch, total_q, NO_LIMIT, out_token_stride,
            out_head_stride, lse_token_stride, lse_head_stride, H_Q, DIMS,
        )  # fmt: skip
        check_offsets(cu_k_ptr, fault_ptr, request, batch, total_k)
    if request < batch:
        first, s_q = query_span(cu_q_ptr, request, total_q, 0, True)
        first_key, s_k = query_span(cu_k_ptr, request, total_k, 0, True)
        k_head = k_ptr + tl.cast(head // GROUP, tl.int64) * k_head_stride
        v_head = v_ptr + tl.cast(head // GROUP, tl.int64) * v_head_stride
        D_VALUE: tl.constexpr = DIMS[2]
        tiles = (s_q + BLOCK_M - 1) // BLOCK_M
        # Under a causal mask later tiles are longer: they begin first.
        for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), disable_licm=True):
            tile = tiles - 1 - index
            row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
            valid = row < s_q
            token = first + row
            query = row_starts(q_ptr, token, head, q_token_stride, q_head_stride)
            q_low, q_high = load_halves(query, valid, DIMS)
            q_low, q_high = q_low.to(COMPUTE), q_high.to(COMPUTE)
            limit, full = key_limits(tile * BLOCK_M, tile * BLOCK_M + BLOCK_M - 1, s_q, s_k, IS_CAUSAL, BLOCK_N)
            end = tl.minimum(tl.maximum(s_k - s_q + row + 1, 0), s_k)
            peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
            mass = tl.zeros((BLOCK_M,), tl.float32)
            acc = tl.zeros((BLOCK_M, D_VALUE), tl.float32)
            last = (limit + BLOCK_N - 1) // BLOCK_N
            inner = last
            if IS_CAUSAL:
                inner = tl.minimum(full, last)
            peak, mass, acc = attend_keys(
                q_low, q_high, k_head, v_head, first_key, end, 0, inner, limit, k_token_stride, v_token_stride, sign,
                scale2, peak, mass, acc, False, STAY, DIMS, BLOCK_N,
            )  # fmt: skip
            if IS_CAUSAL:
                peak, mass, acc = attend_keys(
                    q_low, q_high, k_head, v_head, first_key, end, inner, last, limit, k_token_stride, v_token_stride,
                    sign, scale2, peak, mass, acc, True, STAY, DIMS, BLOCK_N,
                )  # fmt: skip
            out, lse2 = finish(peak, mass, acc, scale2)
            column = tl.arange(0, DIMS[2])
            target = row_starts(out_ptr, token, head, out_token_stride, out_head_stride)
            wanted = valid[:, None] & (column < DIMS[1])[None, :]
            tl.store(target[:, None] + column[None, :], out.to(out_ptr.dtype.element_ty), mask=wanted)
            place = tl.cast(head, tl.int64) * lse_head_stride + token.to(tl.int64) * lse_token_stride
            tl.store(lse_ptr + place, lse2 * LN_2, mask=valid)


@triton.jit
def check_offsets(cu_ptr, fault_ptr, request, batch, total):
    """Notes offsets that do not rise from 0 to total; those of keys leave no row unwritten."""
    if request < batch:
        first, count = query_span(cu_ptr, request, total, 0, True)
        is_bad = (tl.load(cu_ptr + request) != first) | (tl.load(cu_ptr + request + 1) != first + count)
        is_bad = is_bad | ((request == 0) & (first != 0))
    else:
        is_bad = tl.load(cu_ptr + batch) != total
        if batch == 0:
            is_bad = is_bad | (total != 0)
    tl.atomic_or(fault_ptr, CU_SEQLENS_NOT_MONOTONE, mask=is_bad, sem="relaxed")


# --------------------------------------------------------------------------------------------------------- backward


@triton.jit
def delta_kernel(
    out_ptr, grad_ptr,  # [total_q, h_q, d_v]
    delta_ptr,  # [h_q, total_q] fp32, contiguous
    total_q, out_token_stride, out_head_stride, grad_token_stride, grad_head_stride, DIMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta[h, t] = sum_c out[t, h, c] * grad[t, h, c]."""
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1)
    valid = token < total_q
    out = load_plain(row_starts(out_ptr, token, head, out_token_stride, out_head_stride), valid, 0, DIMS[1], DIMS[2])
    grad = load_plain(
        row_starts(grad_ptr, token, head, grad_token_stride, grad_head_stride), valid, 0, DIMS[1], DIMS[2]
    )
    place = tl.cast(head, tl.int64) * total_q + token
    tl.store(delta_ptr + place, tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1), mask=valid)


@triton.jit
def load_statistics(lse_ptr, delta_ptr, head, token, valid, total_q, lse_head_stride, lse_token_stride):
    """(lse in base 2, delta) of rows; a row that saw nothing has lse +inf here, so that every weight of it is 0."""
    place = tl.cast(head, tl.int64) * lse_head_stride + token.to(tl.int64) * lse_token_stride
    lse2 = tl.load(lse_ptr + place, mask=valid, other=float("inf")) * LOG2_E
    delta = tl.load(delta_ptr + tl.cast(head, tl.int64) * total_q + token, mask=valid, other=0.0)
    return tl.where(lse2 == float("-inf"), float("inf"), lse2), delta


@triton.jit
def slopes(scores, lse2, scores_of_grad, delta, seen, scale2):
    """(P, dS / softmax_scale), both fp32; scale2 = softmax_scale log2 e, with its sign."""
    weights = tl.where(seen, tl.exp2(scores * scale2 - lse2), 0.0)
    return weights, weights * (scores_of_grad - delta)


@triton.jit(do_not_specialize=_FREE)
def query_gradient_kernel(
    q_ptr, k_ptr, v_ptr, cu_q_ptr, cu_k_ptr, grad_ptr, lse_ptr, delta_ptr,
    dq_ptr,  # [total_q, h_q, d_qk], zero where no request owns a row
    scale, scale2, total_q, total_k,
    q_token_stride, q_head_stride, k_token_stride, k_head_stride, v_token_stride, v_head_stride, grad_token_stride,
    grad_head_stride, lse_head_stride, lse_token_stride, dq_token_stride, dq_head_stride,
    GROUP: tl.constexpr, IS_CAUSAL: tl.constexpr, DIMS: tl.constexpr, STAY: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradient dq. Grid (tiles, h_q, batch)."""
    head = tl.program_id(1)
    request = tl.program_id(2)
    first, s_q = query_span(cu_q_ptr, request, total_q, 0, True)
    first_key, s_k = query_span(cu_k_ptr, request, total_k, 0, True)
    k_head = k_ptr + tl.cast(head // GROUP, tl.int64) * k_head_stride
    v_head = v_ptr + tl.cast(head // GROUP, tl.int64) * v_head_stride
    D_LOW: tl.constexpr = DIMS[3]
    D_HIGH: tl.constexpr = DIMS[4] if DIMS[4] > 0 else DIMS[3]
    tiles = (s_q + BLOCK_M - 1) // BLOCK_M
    for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), disable_licm=True):
        tile = tiles - 1 - index
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        valid = row < s_q
        token = first + row
        q_low, q_high = load_halves(row_starts(q_ptr, token, head, q_token_stride, q_head_stride), valid, DIMS)
        grad_row = row_starts(grad_ptr, token, head, grad_token_stride, grad_head_stride)
        grad = load_plain(grad_row, valid, 0, DIMS[1], DIMS[2])
        lse2, delta = load_statistics(
            lse_ptr, delta_ptr, head, token, valid, total_q, lse_head_stride, lse_token_stride
        )  # fmt: skip
        limit, _full = key_limits(tile * BLOCK_M, tile * BLOCK_M + BLOCK_M - 1, s_q, s_k, IS_CAUSAL, BLOCK_N)
        end = tl.minimum(tl.maximum(s_k - s_q + row + 1, 0), s_k)
        dq_low = tl.zeros((BLOCK_M, D_LOW), tl.float32)
        dq_high = tl.zeros((BLOCK_M, D_HIGH), tl.float32)
        for block in tl.range(0, (limit + BLOCK_N - 1) // BLOCK_N, disable_licm=STAY):
            place = block * BLOCK_N + tl.arange(0, BLOCK_N)
            exists = place < limit
            key = first_key + place
            k_low, k_high = load_halves(row_starts(k_head, key, 0, k_token_stride, 0), exists, DIMS)
            value = load_plain(row_starts(v_head, key, 0, v_token_stride, 0), exists, 0, DIMS[1], DIMS[2])
            seen = exists[None, :]
            if IS_CAUSAL:
                seen = seen & (place[None, :] < end[:, None])
            scores = multiply(q_low, q_high, k_low, k_high, DIMS)
            of_grad = tl.dot(grad, tl.trans(value), input_precision="ieee")
            _weights, slope = slopes(scores, lse2[:, None], of_grad, delta[:, None], seen, scale2)
            slope = slope.to(k_low.dtype)
            dq_low = tl.dot(slope, k_low, acc=dq_low, input_precision="ieee")
            if DIMS[4] > 0:
                dq_high = tl.dot(slope, k_high, acc=dq_high, input_precision="ieee")
        target = row_starts(dq_ptr, token, head, dq_token_stride, dq_head_stride)
        store_halves(target, dq_low * scale, dq_high * scale, valid, DIMS)


@triton.jit
def store_halves(row, low, high, valid, DIMS: tl.constexpr):
    """Writes both parts of a gradient of q or k."""
    column = tl.arange(0, DIMS[3])
    tl.store(row[:, None] + column[None, :], low.to(row.dtype.element_ty), mask=valid[:, None])
    if DIMS[4] > 0:
        column = tl.arange(0, DIMS[4])
        wanted = valid[:, None] & (column < DIMS[0] - DIMS[3])[None, :]
        tl.store(row[:, None] + DIMS[3] + column[None, :], high.to(row.dtype.element_ty), mask=wanted)


@triton.jit(do_not_specialize=_FREE)
def key_gradient_kernel(
    q_ptr, k_ptr, v_ptr, cu_q_ptr, cu_k_ptr, grad_ptr, lse_ptr, delta_ptr,
    dk_ptr, dv_ptr,  # [total_k, h_kv, d_qk or d_v], zero where no request owns a row
    scale, scale2, total_q, total_k,
    q_token_stride, q_head_stride, k_token_stride, k_head_stride, v_token_stride, v_head_stride, grad_token_stride,
    grad_head_stride, lse_head_stride, lse_token_stride, dk_token_stride, dk_head_stride, dv_token_stride,
    dv_head_stride,
    GROUP: tl.constexpr, IS_CAUSAL: tl.constexpr, DIMS: tl.constexpr, STAY: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients dk and dv. Grid (tiles, h_kv, batch)."""
    kv_head = tl.program_id(1)
    request = tl.program_id(2)
    first, s_q = query_span(cu_q_ptr, request, total_q, 0, True)
    first_key, s_k = query_span(cu_k_ptr, request, total_k, 0, True)
    D_LOW: tl.constexpr = DIMS[3]
    D_HIGH: tl.constexpr = DIMS[4] if DIMS[4] > 0 else DIMS[3]
    D_VALUE: tl.constexpr = DIMS[2]
    for tile in tl.range(tl.program_id(0), (s_k + BLOCK_N - 1) // BLOCK_N, tl.num_programs(0), disable_licm=True):
        place = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        exists = place < s_k
        key = first_key + place
        k_low, k_high = load_halves(row_starts(k_ptr, key, kv_head, k_token_stride, k_head_stride), exists, DIMS)
        value = load_plain(row_starts(v_ptr, key, kv_head, v_token_stride, v_head_stride), exists, 0, DIMS[1], DIMS[2])
        # Query i sees key j where j <= s_k - s_q + i: the first tile of queries that sees any key of this one.
        begin = 0
        if IS_CAUSAL:
            begin = tl.maximum(tile * BLOCK_N - (s_k - s_q), 0) // BLOCK_M
        blocks = tl.maximum((s_q + BLOCK_M - 1) // BLOCK_M - begin, 0)
        dk_low = tl.zeros((BLOCK_N, D_LOW), tl.float32)
        dk_high = tl.zeros((BLOCK_N, D_HIGH), tl.float32)
        dv = tl.zeros((BLOCK_N, D_VALUE), tl.float32)
        for step in tl.range(0, blocks * GROUP, disable_licm=STAY):
            head = kv_head * GROUP + step // blocks
            row = (begin + step % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
            valid = row < s_q
            token = first + row
            q_low, q_high = load_halves(row_starts(q_ptr, token, head, q_token_stride, q_head_stride), valid, DIMS)
            grad_row = row_starts(grad_ptr, token, head, grad_token_stride, grad_head_stride)
            grad = load_plain(grad_row, valid, 0, DIMS[1], DIMS[2])
            lse2, delta = load_statistics(
                lse_ptr, delta_ptr, head, token, valid, total_q, lse_head_stride, lse_token_stride
            )  # fmt: skip
            seen = exists[:, None] & valid[None, :]
            if IS_CAUSAL:
                seen = seen & (place[:, None] < (s_k - s_q + row + 1)[None, :])
            # Turned over, [BLOCK_N, BLOCK_M]: P^T and dS^T are then left operands as they are.
            scores = multiply(k_low, k_high, q_low, q_high, DIMS)
            of_grad = tl.dot(value, tl.trans(grad), input_precision="ieee")
            weights, slope = slopes(scores, lse2[None, :], of_grad, delta[None, :], seen, scale2)
            slope = slope.to(q_low.dtype)
            dv = tl.dot(weights.to(grad.dtype), grad, acc=dv, input_precision="ieee")
            dk_low = tl.dot(slope, q_low, acc=dk_low, input_precision="ieee")
            if DIMS[4] > 0:
                dk_high = tl.dot(slope, q_high, acc=dk_high, input_precision="ieee")
        target = row_starts(dk_ptr, key, kv_head, dk_token_stride, dk_head_stride)
        store_halves(target, dk_low * scale, dk_high * scale, exists, DIMS)
        column = tl.arange(0, DIMS[2])
        target = row_starts(dv_ptr, key, kv_head, dv_token_stride, dv_head_stride)
        wanted = exists[:, None] & (column < DIMS[1])[None, :]
        tl.store(target[:, None] + column[None, :], dv.to(dv_ptr.dtype.element_ty), mask=wanted)
