"""Cache append: RoPE of k_pe, quantisation and the scatter into a paged cache in one launch.

A program stores one token. The bytes are those of `openmla.reference.quant.write_rows`, bit for bit, for every layout:
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
def load_values(row, column, wanted, cos_row, sin_row, is_beyond, ROPE: tl.constexpr, D_QK: tl.constexpr, D_ROPE: tl.constexpr):  # fmt: skip
    """fp32 columns of a token, the last D_ROPE of them rotated and rounded to the token's dtype; 0 where not wanted.

    ROPE None: none of these columns is rotated.
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
        cos = tl.load(cos_row + pair, mask=turns, other=0.0)
        sin = tl.load(sin_row + pair, mask=turns, other=0.0)
        turned = tl.where(is_beyond, float("nan"), x * cos + tl.where(is_first, -other, other) * sin)
        if row.dtype.element_ty == tl.bfloat16:
            turned = (bf16_bits(turned).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
        else:
            turned = turned.to(row.dtype.element_ty).to(tl.float32)
        x = tl.where(turns, turned, x)
    return x


@triton.jit
def store_scales(page, offset, group, scales, LAYOUT: tl.constexpr, SCALE_BYTES: tl.constexpr):
    """Scales of a token: fp32 values, or codes (int32) of one byte, with zeros up to SCALE_BYTES."""
    first = page + LAYOUT[5] + offset * LAYOUT[6]
    if LAYOUT[1] == "fp32":
        tl.store((first + 4 * group).to(tl.pointer_type(tl.float32)), scales, mask=4 * group < SCALE_BYTES)
    else:
        codes = tl.where(group * LAYOUT[3] < LAYOUT[2], scales, 0)
        tl.store(first + group, codes.to(tl.uint8), mask=group < SCALE_BYTES)


@triton.jit
def store_token(
    row, page, offset, cos_row, sin_row, is_beyond, ROW_STRIDE: tl.constexpr, LAYOUT: tl.constexpr,
    SCALE_BYTES: tl.constexpr, D_QK: tl.constexpr, D_ROPE: tl.constexpr, D_PADDED: tl.constexpr, ROPE: tl.constexpr,
    HAS_E4M3: tl.constexpr,
):  # fmt: skip
    """Writes the token at `row` to place `offset` of the page that begins at `page`."""
    # Rotated columns that are quantised too, or not: where all of them come behind the codes, codes skip the rotation.
    CODED_ROPE: tl.constexpr = None if LAYOUT[2] <= D_QK - D_ROPE else ROPE
    if LAYOUT[0] == "plain":
        column = tl.arange(0, D_PADDED)
        wanted = column < D_QK
        x = load_values(row, column, wanted, cos_row, sin_row, is_beyond, ROPE, D_QK, D_ROPE)
        target = page + offset * ROW_STRIDE + column
        if page.dtype.element_ty == tl.bfloat16:
            target = target.to(tl.pointer_type(tl.uint16))
            tl.store(target, bf16_bits(x), mask=wanted)
        else:
            tl.store(target, x.to(page.dtype.element_ty), mask=wanted)
    else:
        target = page + offset * LAYOUT[4]
        GROUP: tl.constexpr = LAYOUT[3]
        group = tl.arange(0, D_PADDED // GROUP)
        if LAYOUT[0] == "e2m1":
            # Two codes per byte: loaded side by side, then even columns and odd ones as two tiles.
            byte = group[:, None] * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :]
            column = byte[:, :, None] * 2 + tl.arange(0, 2)[None, None, :]
            x = load_values(row, column, column < LAYOUT[2], cos_row, sin_row, is_beyond, CODED_ROPE, D_QK, D_ROPE)
            peak = tl.max(tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 2), 1)
            amax = peak.to(tl.float32, bitcast=True)
            size = tl.minimum(tl.maximum(tl.div_rn(amax, 6.0), 0.001953125), 448.0)
            code = tl.where(peak >= 0x7F800000, 0x7F, encode_e4m3(size, HAS_E4M3).to(tl.int32))
            scale = decode_e4m3(code.to(tl.uint8))[:, None]
            even, odd = tl.split(x)
            if row.dtype.element_ty == tl.float32:
                even, odd = tl.div_rn(even, scale), tl.div_rn(odd, scale)
                scale = tl.where(scale != scale, scale, 1.0)
            pair = encode_e2m1(even, scale) | (encode_e2m1(odd, scale) << 4)
            tl.store(target + byte, pair.to(tl.uint8), mask=byte * 2 < LAYOUT[2])
            store_scales(page, offset, group, code, LAYOUT, SCALE_BYTES)
        else:
            column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
            wanted = column < LAYOUT[2]
            x = load_values(row, column, wanted, cos_row, sin_row, is_beyond, CODED_ROPE, D_QK, D_ROPE)
            # As integers, magnitudes come in their order, then inf, then NaN.
            peak = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
            ratio = tl.maximum(tl.div_rn(peak.to(tl.float32, bitcast=True), 448.0), 1e-4).to(tl.int32, bitcast=True)
            exponent = (ratio >> 23) + ((ratio & 0x7FFFFF) != 0).to(tl.int32)
            is_odd = peak >= 0x7F800000
            # 2^exponent, and 2^-exponent: x times it is x / scale. Over an infinite scale: 0 or NaN.
            scale = tl.where(is_odd, peak, exponent << 23).to(tl.float32, bitcast=True)
            inverse = tl.where(is_odd, tl.where(peak > 0x7F800000, peak, 0), (254 - exponent) << 23)
            code = encode_e4m3(x * inverse.to(tl.float32, bitcast=True)[:, None], HAS_E4M3)
            tl.store(target + column, code, mask=wanted)
            if LAYOUT[1] == "fp32":
                store_scales(page, offset, group, scale, LAYOUT, SCALE_BYTES)
            else:
                store_scales(page, offset, group, tl.where(is_odd, 255, exponent), LAYOUT, SCALE_BYTES)
        if LAYOUT[2] < D_QK:
            column = LAYOUT[2] + tl.arange(0, 64)
            for first in tl.static_range(0, D_QK - LAYOUT[2], 64):
                wanted = first + column < D_QK
                x = load_values(row, first + column, wanted, cos_row, sin_row, is_beyond, ROPE, D_QK, D_ROPE)
                place = (target + LAYOUT[7]).to(tl.pointer_type(tl.uint16)) + first + tl.arange(0, 64)
                tl.store(place, bf16_bits(x), mask=wanted)


@triton.jit
def append_kernel(
    rows_ptr,  # [n, d_qk]
    slots_ptr,  # [n] int64 or int32
    cache_ptr,  # [num_pages, page_size, 1, row]
    cos_ptr, sin_ptr, position_ptr,  # with ROPE
    fault_ptr,  # [1] int32
    num_slots, rows_stride, page_stride, cos_stride, sin_stride, positions,
    ROW_STRIDE: tl.constexpr, PAGE_SIZE: tl.constexpr, LAYOUT: tl.constexpr, SCALE_BYTES: tl.constexpr,
    D_QK: tl.constexpr, D_ROPE: tl.constexpr, D_PADDED: tl.constexpr, ROPE: tl.constexpr, HAS_E4M3: tl.constexpr,
):  # fmt: skip
    """See the module. LAYOUT as in `openmla.backends.triton.rows`; ROPE "pairs", "halves" or None; D_PADDED: d_qk as a
    power of two.
    """
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    is_stored = tl.where(slot < num_slots, slot, -1) >= 0
    tl.atomic_or(fault_ptr, INDEX_OUT_OF_RANGE, mask=tl.where(is_stored, -1, slot) != -1, sem="relaxed")
    slot = tl.where(is_stored, slot, 0)
    page = cache_ptr + slot // PAGE_SIZE * page_stride
    offset = slot % PAGE_SIZE
    row = rows_ptr + token * rows_stride
    cos_row, sin_row = cos_ptr, sin_ptr
    is_beyond = False
    if ROPE is not None:
        position = tl.load(position_ptr + token)
        is_beyond = position >= positions
        at = tl.minimum(tl.maximum(position, 0), positions - 1).to(tl.int64)
        cos_row += at * cos_stride
        sin_row += at * sin_stride
    if is_stored:
        store_token(
            row, page, offset, cos_row, sin_row, is_beyond, ROW_STRIDE, LAYOUT, SCALE_BYTES, D_QK, D_ROPE, D_PADDED,
            ROPE, HAS_E4M3,
        )  # fmt: skip


def append(layout: KVLayout, operands: AppendOperands, num_warps: int) -> None:
    """Store tokens, in place, on the current stream and without waiting. The operands are checked."""
    cache, slots, rows, fault_word, rope, positions = operands
    if slots.numel() == 0 or cache.numel() == 0:
        return
    page_size = cache.shape[1]
    data = cache.view(torch.uint8) if layout.is_quantised else cache
    kind = None if rope is None else ("pairs" if rope.is_interleaved else "halves")
    cos, sin = (rows, rows) if rope is None else (rope.cos, rope.sin)
    with on_device(cache.device):
        append_kernel[(slots.shape[0],)](
            rows, slots, data, cos, sin, slots if positions is None else positions, fault_word,
            min(cache.shape[0] * page_size, MAX_INT32), rows.stride(0), data.stride(0), cos.stride(0), sin.stride(0),
            cos.shape[0], **_constants(layout, data, page_size, kind, 0 if rope is None else 2 * cos.shape[1]),
            HAS_E4M3=converts_to_e4m3(cache.device), num_warps=num_warps, enable_fp_fusion=False,
        )  # fmt: skip


@remember
def converts_to_e4m3(device: torch.device) -> bool:
    """Whether the machine has an instruction for it: NVIDIA from sm_89 on."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


def _constants(layout: KVLayout, data: torch.Tensor, page_size: int, kind: str | None, d_rope: int) -> dict[str, Any]:
    columns = layout.d_quant if layout.is_quantised else layout.d_qk
    return {
        "ROW_STRIDE": data.stride(1),
        "PAGE_SIZE": page_size,
        "LAYOUT": stored_rows(layout, page_size),
        "SCALE_BYTES": layout.scale_bytes,
        "D_QK": layout.d_qk,
        "D_ROPE": d_rope,
        "D_PADDED": 1 << max(columns - 1, 1).bit_length(),
        "ROPE": kind,
    }
