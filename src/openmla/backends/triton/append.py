"""Cache append: RoPE of k_pe, quantisation and the scatter into a paged cache in one launch.

A program stores a few tokens. The bytes are those of `openmla.reference.quant.write_rows`, bit for bit, for every layout:
scales of e4m3 codes are powers of two found in the bits of the largest magnitude, so a product with the reciprocal is the
exact quotient; codes are rounded to nearest even by the machine's conversion where it has one, else with integer
arithmetic; other divisions are exact and products are not fused with sums. Where a group holds NaN or inf, its scale is
not finite either, with any payload.

    e4m3   scale = 2 ** ceil(log2(max(amax / 448, 1e-4)))          code = e4m3(x / scale)
    e2m1   scale = e4m3(min(max(amax / 6, 2 ** -9), 448))          code = e2m1(x / scale)
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from functools import cache as remember
from typing import Any

import torch
import triton
import triton.language as tl

from openmla.backends.base import AppendOperands
from openmla.backends.triton.config import stored_rows
from openmla.backends.triton.launch import MAX_INT32, on_device
from openmla.backends.triton.rows import decode_e4m3
from openmla.core.layout import KVLayout

# Bit of openmla.core.faults.Fault.
INDEX_OUT_OF_RANGE = tl.constexpr(8)


@triton.jit
def bf16_bits(x):
    """uint16 bits of fp32 values rounded to bf16, to nearest even."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x != x, 0x7FC0, rounded).to(tl.uint16)


@triton.jit
def encode_e4m3(x, HAS_E4M3: tl.constexpr = False):
    """uint8 codes of fp32 values of magnitude up to 448, to nearest even; NaN is the pattern of all ones."""
    return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True) if HAS_E4M3 else encode_e4m3_by_hand(x).to(tl.uint8)


@triton.jit
def encode_e4m3_by_hand(x):
    """`encode_e4m3` in integer arithmetic, int32."""
    size = tl.abs(x)
    bits = size.to(tl.uint32, bitcast=True)
    # From 2^-6 on, three bits of mantissa are left, and the exponent changes its bias from 127 to 7.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20).to(tl.int32) - (120 << 3)
    # Below, codes count 2^-9: beside 2^14 that is one unit of an fp32's last place, so the addition rounds.
    subnormal = ((size + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000).to(tl.int32)
    code = tl.where(size < 0.015625, subnormal, normal)
    sign = (x.to(tl.uint32, bitcast=True) >> 31).to(tl.int32) << 7
    return tl.where(x != x, 0x7F, code | sign)


@triton.jit
def encode_e2m1(x, scale):
    """int32 codes 0 to 15 of x / scale, to nearest even, saturating at 6; NaN becomes 0.

    A quotient of 24 bits may round to a midpoint, so fp32 rows are divided before (scale 1). One of 11 bits by one of 4
    cannot, and beside 3 bits of a midpoint the product is exact.
    """
    size = tl.abs(x)
    # Midpoints between neighbours; a tie goes to the even code.
    code = (size > 0.25 * scale).to(tl.int32) + (size >= 0.75 * scale).to(tl.int32) + (size > 1.25 * scale).to(tl.int32)
    code += (size >= 1.75 * scale).to(tl.int32) + (size > 2.5 * scale).to(tl.int32)
    code += (size >= 3.5 * scale).to(tl.int32) + (size > 5.0 * scale).to(tl.int32)
    sign = (x.to(tl.uint32, bitcast=True) >> 31).to(tl.int32) << 3
    return tl.where((x != x) | (scale != scale), 0, code | sign)


@triton.jit
def rounded(x, DTYPE: tl.constexpr, BY_HAND: tl.constexpr):
    """fp32 values rounded once to DTYPE."""
    if BY_HAND and tl.bfloat16 == DTYPE:
        return (bf16_bits(x).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(DTYPE).to(tl.float32)


@triton.jit
def load_turned(first, second, cos, sin, turns, wanted, is_beyond, BY_HAND: tl.constexpr):
    """Rotated and rounded columns (fp32) of pairs; where `turns` is false, the columns as they are. All are pointers."""
    x, y = tl.load(first, mask=wanted, other=0.0).to(tl.float32), tl.load(second, mask=wanted, other=0.0).to(tl.float32)
    return turned(x, y, cos, sin, turns, is_beyond, first.dtype.element_ty, BY_HAND)


@triton.jit
def turned(x, y, cos, sin, turns, is_beyond, DTYPE: tl.constexpr, BY_HAND: tl.constexpr):
    """Pairs (x, y) rotated by the angles at cos and sin and rounded to DTYPE; where `turns` is false, as they are."""
    c, s = tl.load(cos, mask=turns, other=0.0), tl.load(sin, mask=turns, other=0.0)
    nan = float("nan")
    a = rounded(tl.where(is_beyond, nan, x * c + -y * s), DTYPE, BY_HAND)
    b = rounded(tl.where(is_beyond, nan, y * c + x * s), DTYPE, BY_HAND)
    return tl.where(turns, a, x), tl.where(turns, b, y)


@triton.jit
def load_values(
    row, column, wanted, cos_row, sin_row, is_beyond, ROPE: tl.constexpr, D_QK: tl.constexpr, D_ROPE: tl.constexpr,
    BY_HAND: tl.constexpr,
):  # fmt: skip
    """fp32 columns of some tokens, the last D_ROPE of them rotated; 0 where not wanted. For columns in any order.

    ROPE None: none of these columns is rotated. Row, tables and is_beyond have the rank of column, tokens first.
    """
    x = tl.load(row + column, mask=wanted, other=0.0).to(tl.float32)
    if ROPE is not None:
        FIRST: tl.constexpr = D_QK - D_ROPE
        place = column - FIRST
        turns = wanted & (place >= 0)
        if ROPE == "pairs":
            is_first = place % 2 == 0
            partner = FIRST + (place ^ 1)
            pair = place // 2
        else:
            is_first = place < D_ROPE // 2
            pair = tl.where(is_first, place, place - D_ROPE // 2)
            partner = FIRST + tl.where(is_first, place + D_ROPE // 2, pair)
        other = tl.load(row + partner, mask=turns, other=0.0).to(tl.float32)
        x, _ = turned(
            x, tl.where(is_first, other, -other), cos_row + pair, sin_row + pair, turns, is_beyond,
            row.dtype.element_ty, BY_HAND,
        )  # fmt: skip
    return x


@triton.jit
def store_elements(x, target, wanted, BY_HAND: tl.constexpr):
    """fp32 values as the cache's elements; bf16 by hand, so that NaN has one pattern."""
    if BY_HAND and target.dtype.element_ty == tl.bfloat16:
        tl.store(target.to(tl.pointer_type(tl.uint16)), bf16_bits(x), mask=wanted)
    else:
        tl.store(target, x.to(target.dtype.element_ty), mask=wanted)


@triton.jit
def store_scales(first, group, scales, wanted, LAYOUT: tl.constexpr):
    """Scales of tokens, a row each: fp32 values, or codes (int32) of one byte, 0 behind the last group."""
    if LAYOUT[1] == "fp32":
        tl.store((first + 4 * group).to(tl.pointer_type(tl.float32)), scales, mask=wanted)
    else:
        tl.store(first + group, tl.where(group * LAYOUT[3] < LAYOUT[2], scales, 0).to(tl.uint8), mask=wanted)


@triton.jit
def pack_e4m3(x, LAYOUT: tl.constexpr, HAS_E4M3: tl.constexpr):
    """Codes of [tokens, groups, columns] fp32, and scales [tokens, groups]: fp32, or their exponents."""
    # As integers, magnitudes come in their order, then inf, then NaN.
    peak = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 2)
    # ceil(log2(peak / 448)): 448 is 1.75 * 2^8, so that mantissas above .75 carry. No quotient of a peak just above
    # 448 * 2^e rounds to 2^e. And 1e-4 lies between 2^-14 and 2^-13.
    exponent = tl.maximum(((peak + 0x1FFFFF) >> 23) - 8, 114)
    is_odd = peak >= 0x7F800000
    # 2^-exponent: x times it is x / scale. Over an infinite scale: 0 or NaN.
    inverse = tl.where(is_odd, tl.where(peak > 0x7F800000, peak, 0), (254 - exponent) << 23)
    code = encode_e4m3(x * inverse.to(tl.float32, bitcast=True)[:, :, None], HAS_E4M3)
    if LAYOUT[1] == "fp32":
        scale = tl.where(is_odd, peak, exponent << 23).to(tl.float32, bitcast=True)
    else:
        scale = tl.where(is_odd, 255, exponent)
    return code, scale


@triton.jit
def pack_e2m1(x, DTYPE: tl.constexpr, HAS_E4M3: tl.constexpr):
    """Bytes of two codes and codes of scales, of [tokens, groups, bytes, 2] fp32 that were DTYPE."""
    peak = tl.max(tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 3), 2)
    amax = peak.to(tl.float32, bitcast=True)
    size = tl.minimum(tl.maximum(tl.div_rn(amax, 6.0), 0.001953125), 448.0)
    code = tl.where(peak >= 0x7F800000, 0x7F, encode_e4m3(size, HAS_E4M3).to(tl.int32))
    scale = decode_e4m3(code.to(tl.uint8))[:, :, None]
    even, odd = tl.split(x)
    if tl.float32 == DTYPE:
        even, odd = tl.div_rn(even, scale), tl.div_rn(odd, scale)
        scale = tl.where(scale != scale, scale, 1.0)
    return (encode_e2m1(even, scale) | (encode_e2m1(odd, scale) << 4)).to(tl.uint8), code


@triton.jit
def load_coded(
    row, group, is_stored, cos_row, sin_row, is_beyond, END: tl.constexpr, GROUP: tl.constexpr, D_QK: tl.constexpr,
    D_ROPE: tl.constexpr, ROPE: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    """The quantised columns of tokens, [tokens, groups, columns / 2, 2] fp32. What it is given of a token has shape [tokens]."""
    FIRST: tl.constexpr = D_QK - D_ROPE
    pair = (group[:, None] * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :])[None]
    column = pair[:, :, :, None] * 2 + tl.arange(0, 2)[None, None, None, :]
    wanted = is_stored[:, None, None, None] & (column < END)
    if ROPE == "pairs" and FIRST % 2 == 0:
        even, odd = tl.split(tl.load(row[:, None, None, None] + column, mask=wanted, other=0.0).to(tl.float32))
        turns = is_stored[:, None, None] & (pair >= FIRST // 2) & (pair < END // 2)
        cos, sin = cos_row[:, None, None] + (pair - FIRST // 2), sin_row[:, None, None] + (pair - FIRST // 2)
        even, odd = turned(even, odd, cos, sin, turns, is_beyond[:, None, None], row.dtype.element_ty, BY_HAND)
        return tl.join(even, odd)
    else:
        return load_values(
            row[:, None, None, None], column, wanted, cos_row[:, None, None, None], sin_row[:, None, None, None],
            is_beyond[:, None, None, None], ROPE, D_QK, D_ROPE, BY_HAND,
        )  # fmt: skip


@triton.jit
def store_codes(
    row, page, offset, is_stored, cos_row, sin_row, is_beyond, LAYOUT: tl.constexpr, FIRST: tl.constexpr,
    COUNT: tl.constexpr, END: tl.constexpr, SCALES: tl.constexpr, D_QK: tl.constexpr, D_ROPE: tl.constexpr,
    ROPE: tl.constexpr, HAS_E4M3: tl.constexpr,
):  # fmt: skip
    """Quantised columns FIRST to FIRST + COUNT of tokens, as far as END, and the scales of these groups that come before
    the one numbered SCALES. What it is given of a token has shape [tokens].
    """
    GROUP: tl.constexpr = LAYOUT[3]
    group = FIRST // GROUP + tl.arange(0, COUNT // GROUP)
    target, first = (page + offset * LAYOUT[4])[:, None, None], (page + LAYOUT[5] + offset * LAYOUT[6])[:, None]
    stored = is_stored[:, None, None]
    if LAYOUT[0] == "e2m1" or ROPE is not None:
        x = load_coded(row, group, is_stored, cos_row, sin_row, is_beyond, END, GROUP, D_QK, D_ROPE, ROPE, not HAS_E4M3)
    if LAYOUT[0] == "e2m1":
        # Two codes per byte: loaded side by side, then even columns and odd ones as two tiles.
        byte = (group[:, None] * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :])[None]
        code, scale = pack_e2m1(x, row.dtype.element_ty, HAS_E4M3)
        tl.store(target + byte, code, mask=stored & (byte * 2 < END))
    else:
        column = (group[:, None] * GROUP + tl.arange(0, GROUP)[None, :])[None]
        wanted = stored & (column < END)
        if ROPE is None:
            x = tl.load(row[:, None, None] + column, mask=wanted, other=0.0).to(tl.float32)
        else:
            x = tl.reshape(x, [x.shape[0], x.shape[1], GROUP])
        code, scale = pack_e4m3(x, LAYOUT, HAS_E4M3)
        tl.store(target + column, code, mask=wanted)
    store_scales(first, group[None, :], scale, is_stored[:, None] & (group[None, :] < SCALES), LAYOUT)


@triton.jit
def store_plain(
    row, target, is_stored, cos_row, sin_row, is_beyond, FIRST: tl.constexpr, COUNT: tl.constexpr, END: tl.constexpr,
    D_QK: tl.constexpr, D_ROPE: tl.constexpr, ROPE: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    """Columns FIRST to FIRST + COUNT (a power of two) of tokens, as far as END, to where FIRST is `target`."""
    column = FIRST + tl.arange(0, COUNT)[None, :]
    wanted = is_stored[:, None] & (column < END)
    target = target[:, None] + (column - FIRST)
    if ROPE is None and row.dtype.element_ty == target.dtype.element_ty:
        tl.store(target, tl.load(row[:, None] + column, mask=wanted), mask=wanted)
    else:
        x = load_values(
            row[:, None], column, wanted, cos_row[:, None], sin_row[:, None], is_beyond[:, None], ROPE, D_QK, D_ROPE,
            BY_HAND,
        )  # fmt: skip
        store_elements(x, target, wanted, BY_HAND)


@triton.jit
def store_turned(
    row, target, is_stored, cos_row, sin_row, is_beyond, D_QK: tl.constexpr, D_ROPE: tl.constexpr, D_PAIRS: tl.constexpr,
    ROPE: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    """The last D_ROPE columns of tokens, rotated, to where the first of them is `target`; D_PAIRS: half of them, as a
    power of two.
    """
    row, target = row[:, None] + (D_QK - D_ROPE), target[:, None]
    pair = tl.arange(0, D_PAIRS)[None, :]
    wanted = is_stored[:, None] & (pair < D_ROPE // 2)
    cos, sin, is_beyond = cos_row[:, None] + pair, sin_row[:, None] + pair, is_beyond[:, None]
    if ROPE == "pairs":
        column = pair[:, :, None] * 2 + tl.arange(0, 2)[None, None, :]
        x = tl.load(row[:, :, None] + column, mask=wanted[:, :, None], other=0.0).to(tl.float32)
        even, odd = tl.split(x)
        even, odd = turned(even, odd, cos, sin, wanted, is_beyond, row.dtype.element_ty, BY_HAND)
        store_elements(tl.join(even, odd), target[:, :, None] + column, wanted[:, :, None], BY_HAND)
    else:
        HALF: tl.constexpr = D_ROPE // 2
        x, y = load_turned(row + pair, row + (HALF + pair), cos, sin, wanted, wanted, is_beyond, BY_HAND)
        store_elements(x, target + pair, wanted, BY_HAND)
        store_elements(y, target + (HALF + pair), wanted, BY_HAND)


@triton.jit(do_not_specialize=["count"])
def append_kernel(
    rows_ptr,  # [n, d_qk]
    slots_ptr,  # [n] int64 or int32
    cache_ptr,  # [num_pages, page_size, 1, row]
    cos_ptr, sin_ptr, position_ptr,  # with ROPE
    fault_ptr,  # [1] int32
    count, num_slots, rows_stride, page_stride, cos_stride, sin_stride, positions,
    ROW_STRIDE: tl.constexpr, PAGE_SIZE: tl.constexpr, LAYOUT: tl.constexpr, SCALES: tl.constexpr,
    D_QK: tl.constexpr, D_ROPE: tl.constexpr, D_STILL: tl.constexpr, D_STILL_2: tl.constexpr,
    D_CODED_2: tl.constexpr, D_PLAIN: tl.constexpr, D_MAIN: tl.constexpr, D_REST: tl.constexpr, D_PAIRS: tl.constexpr, ROPE: tl.constexpr, HAS_E4M3: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """See the module. LAYOUT as in `openmla.backends.triton.rows`; ROPE "pairs", "halves" or None; SCALES: how many
    each token has, padding included; D_STILL: quantised columns in groups without rotated ones; D_STILL_2, D_CODED_2:
    powers of two that cover those and the other quantised ones; D_PLAIN: columns behind the codes that are not rotated; D_MAIN, D_REST: powers of two that cover those; D_PAIRS: one that covers the pairs of
    the rotated ones. D_PAIRS 0: the rotated ones are among the others.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    slot = tl.load(slots_ptr + token, mask=token < count, other=-1).to(tl.int64)
    is_stored = (slot >= 0) & (slot < num_slots)
    tl.atomic_or(
        fault_ptr + tl.zeros([TOKENS], tl.int32), INDEX_OUT_OF_RANGE, mask=(slot != -1) & ~is_stored, sem="relaxed"
    )
    slot = tl.where(is_stored, slot, 0).to(tl.int32)
    page = cache_ptr + (slot // PAGE_SIZE).to(tl.int64) * page_stride
    offset = slot % PAGE_SIZE
    row = rows_ptr + token.to(tl.int64) * rows_stride
    nothing = tl.zeros([TOKENS], tl.int64)
    cos_row, sin_row, is_beyond = cos_ptr + nothing, sin_ptr + nothing, nothing != 0
    if ROPE is not None:
        position = tl.load(position_ptr + token, mask=is_stored, other=0)
        is_beyond = position >= positions
        at = tl.minimum(tl.maximum(position, 0), positions - 1).to(tl.int64)
        cos_row += at * cos_stride
        sin_row += at * sin_stride
    FIRST: tl.constexpr = LAYOUT[2]
    if FIRST > 0:
        if D_STILL > 0:  # groups without rotated columns
            store_codes(
                row, page, offset, is_stored, cos_row, sin_row, is_beyond, LAYOUT, 0, D_STILL_2, D_STILL,
                SCALES if D_STILL == FIRST else D_STILL // LAYOUT[3], D_QK, D_ROPE, None, HAS_E4M3,
            )  # fmt: skip
        if D_STILL < FIRST:
            store_codes(
                row, page, offset, is_stored, cos_row, sin_row, is_beyond, LAYOUT, D_STILL, D_CODED_2, FIRST,
                SCALES, D_QK, D_ROPE, ROPE, HAS_E4M3,
            )  # fmt: skip
        target = (page + offset * LAYOUT[4] + LAYOUT[7]).to(tl.pointer_type(tl.bfloat16))
    else:
        target = page + offset * ROW_STRIDE
    AMONG: tl.constexpr = ROPE if D_PAIRS == 0 else None
    END: tl.constexpr = FIRST + D_PLAIN
    if D_MAIN > 0:
        store_plain(
            row, target, is_stored, cos_row, sin_row, is_beyond, FIRST, D_MAIN, END, D_QK, D_ROPE, AMONG, not HAS_E4M3
        )
    if D_REST > 0:
        store_plain(
            row, target + D_MAIN, is_stored, cos_row, sin_row, is_beyond, FIRST + D_MAIN, D_REST, END, D_QK, D_ROPE,
            AMONG, not HAS_E4M3,
        )  # fmt: skip
    if D_PAIRS > 0:
        store_turned(
            row, target + D_PLAIN, is_stored, cos_row, sin_row, is_beyond, D_QK, D_ROPE, D_PAIRS, ROPE, not HAS_E4M3
        )


def append(layout: KVLayout, operands: AppendOperands, tokens: int, num_warps: int) -> None:
    """Store tokens, in place, on the current stream and without waiting. The operands are checked.

    Args:
        layout: of the cache.
        operands: what to store where.
        tokens: per program, a power of two.
        num_warps: per program.
    """
    cache, slots, rows, fault_word, rope, positions, _ = operands
    if slots.numel() == 0 or cache.numel() == 0:
        return
    page_size = cache.shape[1]
    data = cache.view(torch.uint8) if layout.is_quantised else cache
    kind = None if rope is None else ("pairs" if rope.is_interleaved else "halves")
    cos, sin = (rows, rows) if rope is None else (rope.cos, rope.sin)
    with on_device(cache.device):
        append_kernel[(triton.cdiv(slots.shape[0], tokens),)](
            rows, slots, data, cos, sin, slots if positions is None else positions, fault_word, slots.shape[0],
            min(cache.shape[0] * page_size, MAX_INT32), rows.stride(0), data.stride(0), cos.stride(0), sin.stride(0),
            cos.shape[0], **_constants(layout, data, page_size, kind, 0 if rope is None else 2 * cos.shape[1]),
            HAS_E4M3=converts_to_e4m3(cache.device), TOKENS=tokens, num_warps=num_warps, enable_fp_fusion=False,
        )  # fmt: skip


@remember
def converts_to_e4m3(device: torch.device) -> bool:
    """Whether the machine has an instruction for it: NVIDIA from sm_89 on."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


def power(count: int) -> int:
    """The power of two from `count` on; 0 for nothing."""
    return 1 << (count - 1).bit_length() if count else 0


def _constants(layout: KVLayout, data: torch.Tensor, page_size: int, kind: str | None, d_rope: int) -> dict[str, Any]:
    coded = layout.d_quant if layout.is_quantised else 0
    others, pairs = layout.d_qk - coded, 0
    if 0 < d_rope <= others:  # all of the rotated columns come behind the codes
        others, pairs = others - d_rope, power(d_rope // 2)
    group = layout.scale_group if coded else 1
    still = min(layout.d_qk - d_rope, coded) // group * group
    main = 1 << (others.bit_length() - 1) if others else 0
    return {
        "ROW_STRIDE": data.stride(1),
        "PAGE_SIZE": page_size,
        "LAYOUT": stored_rows(layout, page_size),
        "SCALES": layout.scale_bytes // (4 if layout.scale_format == "fp32" else 1),
        "D_QK": layout.d_qk,
        "D_ROPE": d_rope,
        "D_STILL": still,
        "D_STILL_2": power(still),
        "D_CODED_2": power(coded - still),
        "D_PLAIN": others,
        "D_MAIN": main,
        "D_REST": power(others - main),
        "D_PAIRS": pairs,
        "ROPE": kind,
    }
