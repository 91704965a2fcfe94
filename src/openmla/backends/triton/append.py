"""Cache append: RoPE of k_pe, quantisation and the scatter into a paged cache in one launch.

A program stores one token. The bytes are those of `openmla.reference.quant.write_rows`, bit for bit, for every layout:
scales are powers of two found in the bits of the largest magnitude, codes are rounded to nearest even with integer
arithmetic, divisions are exact and products are not fused with sums. Where a group holds NaN or inf, its scale is not
finite either, with any payload.

    e4m3   scale = 2 ** ceil(log2(max(amax / 448, 1e-4)))          code = e4m3(x / scale)
    e2m1   scale = e4m3(min(max(amax / 6, 2 ** -9), 448))          code = e2m1(x / scale)

Not connected to `openmla.kv` yet: it has not run on a GPU.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from openmla.backends.triton.config import stored_rows
from openmla.backends.triton.launch import MAX_INT32, on_device
from openmla.backends.triton.rows import decode_e4m3
from openmla.core import faults
from openmla.core.errors import ProblemError
from openmla.core.layout import KVLayout, kv_layout
from openmla.core.problem import QUERY_DTYPES
from openmla.mods import Rope

NUM_WARPS = 4  # 512 columns of a token: four per thread

# Bit of openmla.core.faults.Fault.
INDEX_OUT_OF_RANGE = tl.constexpr(8)


@triton.jit
def bf16_bits(x):
    """uint16 bits of fp32 values rounded to bf16, to nearest even."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x != x, 0x7FC0, rounded).to(tl.uint16)


@triton.jit
def encode_e4m3(x):
    """int32 codes of fp32 values of magnitude up to 448, to nearest even; NaN is the pattern of all ones."""
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
def encode_e2m1(x):
    """int32 codes 0 to 15 of fp32 values, to nearest even, saturating at 6; NaN becomes 0."""
    size = tl.abs(x)
    # Midpoints between neighbours; a tie goes to the even code.
    code = (size > 0.25).to(tl.int32) + (size >= 0.75).to(tl.int32) + (size > 1.25).to(tl.int32)
    code += (size >= 1.75).to(tl.int32) + (size > 2.5).to(tl.int32) + (size >= 3.5).to(tl.int32)
    code += (size > 5.0).to(tl.int32)
    sign = (x.to(tl.uint32, bitcast=True) >> 31).to(tl.int32) << 3
    return tl.where(x != x, 0, code | sign)


@triton.jit
def load_values(row, column, wanted, cos_row, sin_row, is_beyond, ROPE: tl.constexpr, D_QK: tl.constexpr, D_ROPE: tl.constexpr):  # fmt: skip
    """fp32 columns of a token, the last D_ROPE of them rotated and rounded to the token's dtype; 0 where not wanted."""
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
):  # fmt: skip
    """Writes the token at `row` to place `offset` of the page that begins at `page`."""
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
            # Two codes per byte: even columns and odd ones as two tiles.
            byte = group[:, None] * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :]
            wanted = byte * 2 < LAYOUT[2]
            even = load_values(row, byte * 2, wanted, cos_row, sin_row, is_beyond, ROPE, D_QK, D_ROPE)
            odd = load_values(row, byte * 2 + 1, wanted, cos_row, sin_row, is_beyond, ROPE, D_QK, D_ROPE)
            amax = tl.max(tl.maximum(tl.abs(even), tl.abs(odd)), 1)
            is_odd = tl.max(((tl.abs(even) < float("inf")) & (tl.abs(odd) < float("inf"))).to(tl.int32) ^ 1, 1) > 0
            size = tl.minimum(tl.maximum(tl.div_rn(amax, 6.0), 0.001953125), 448.0)
            code = tl.where(is_odd, 0x7F, encode_e4m3(size))
            scale = decode_e4m3(code.to(tl.uint8))[:, None]
            pair = encode_e2m1(tl.div_rn(even, scale)) | (encode_e2m1(tl.div_rn(odd, scale)) << 4)
            tl.store(target + byte, pair.to(tl.uint8), mask=wanted)
            store_scales(page, offset, group, code, LAYOUT, SCALE_BYTES)
        else:
            column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
            wanted = column < LAYOUT[2]
            x = load_values(row, column, wanted, cos_row, sin_row, is_beyond, ROPE, D_QK, D_ROPE)
            amax = tl.max(tl.abs(x), 1)
            has_nan = tl.max((x != x).to(tl.int32), 1) > 0
            ratio = tl.maximum(tl.div_rn(amax, 448.0), 1e-4).to(tl.uint32, bitcast=True)
            exponent = ((ratio >> 23) + ((ratio & 0x7FFFFF) != 0).to(tl.uint32)).to(tl.int32)
            scale = (exponent << 23).to(tl.float32, bitcast=True)
            is_odd = has_nan | (amax == float("inf"))
            scale = tl.where(has_nan, float("nan"), tl.where(is_odd, float("inf"), scale))
            code = encode_e4m3(tl.div_rn(x, scale[:, None]))
            tl.store(target + column, code.to(tl.uint8), mask=wanted)
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
    D_QK: tl.constexpr, D_ROPE: tl.constexpr, D_PADDED: tl.constexpr, ROPE: tl.constexpr,
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
            ROPE,
        )  # fmt: skip


def append(
    cache: torch.Tensor,
    layout: KVLayout | str,
    slots: torch.Tensor,
    rows: torch.Tensor,
    *,
    rope: Rope | None = None,
    positions: torch.Tensor | None = None,
) -> None:
    """Store tokens in a paged cache, in place, on the current stream and without waiting.

    Args:
        cache: [num_pages, page_size, 1, row_elements] in `layout`; pages may be padded.
        layout: a KVLayout or its name.
        slots: [n] int64|int32, page * page_size + offset. -1 skips a token; any other value outside the cache is
            treated as -1 and reported by `openmla.check_errors`. Distinct, else one of the tokens wins.
        rows: [n, d_qk] bf16|fp16|fp32, contiguous in its last dimension: latent, then RoPE.
        rope: rotates the last 2 * cos.shape[1] columns in fp32, rounded once to the dtype of rows, before they are stored.
        positions: [n] int32|int64 with rope; one behind the tables makes the rotated columns NaN.

    Raises:
        ProblemError: shapes, dtypes or devices contradict each other; lists all violations.
    """
    layout = kv_layout(layout)
    broken = _violations(cache, layout, slots, rows, rope, positions)
    if broken:
        raise ProblemError("append", broken)
    if slots.numel() == 0 or cache.numel() == 0:
        return
    page_size = cache.shape[1]
    data = cache.view(torch.uint8) if layout.is_quantised else cache
    kind = None if rope is None else ("pairs" if rope.is_interleaved else "halves")
    cos, sin = (rows, rows) if rope is None else (rope.cos, rope.sin)
    with on_device(cache.device):
        append_kernel[(slots.shape[0],)](
            rows, slots, data, cos, sin, slots if positions is None else positions, faults.fault_word(cache.device),
            min(cache.shape[0] * page_size, MAX_INT32), rows.stride(0), data.stride(0), cos.stride(0), sin.stride(0),
            cos.shape[0], **_constants(layout, data, page_size, kind, 0 if rope is None else 2 * cos.shape[1]),
            num_warps=NUM_WARPS, enable_fp_fusion=False,
        )  # fmt: skip


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


def _violations(
    cache: torch.Tensor, layout: KVLayout, slots: torch.Tensor, rows: torch.Tensor, rope: Rope | None,
    positions: torch.Tensor | None,
) -> list[str]:  # fmt: skip
    found = []
    if cache.dim() != 4 or tuple(cache.shape[2:]) != (1, layout.row_elements) or cache.stride(-1) != 1:
        found.append(
            f"cache must be [num_pages, page_size, 1, {layout.row_elements}], contiguous in its last dimension, in layout "
            f"{layout}, got {tuple(cache.shape)} with strides {cache.stride()}"
        )
    if (layout.is_quantised and cache.dtype.itemsize != 1) or (not layout.is_quantised and cache.dtype != layout.dtype):
        found.append(f"cache in layout {layout} must be {layout.dtype}, got {cache.dtype}")
    if slots.dim() != 1 or slots.dtype not in (torch.int32, torch.int64) or not slots.is_contiguous():
        found.append(f"slots must be contiguous [n] int64 or int32, got {tuple(slots.shape)} {slots.dtype}")
    if tuple(rows.shape) != (*slots.shape, layout.d_qk) or rows.dtype not in QUERY_DTYPES or rows.stride(-1) != 1:
        found.append(
            f"rows must be [n, {layout.d_qk}] bf16, fp16 or fp32, contiguous in its last dimension, got "
            f"{tuple(rows.shape)} {rows.dtype} with strides {rows.stride()}"
        )
    if (rope is None) != (positions is None):
        found.append("rope and positions belong together; give both or neither")
    if rope is not None and positions is not None:
        found += rope.violations(2 * rope.cos.shape[1], 0, 0, cache.device)
        if 2 * rope.cos.shape[1] > layout.d_qk:
            found.append(f"rope rotates {2 * rope.cos.shape[1]} columns, but a token of {layout} has {layout.d_qk}")
        if positions.shape != slots.shape or positions.dtype not in (torch.int32, torch.int64):
            found.append(f"positions must be [n] int32 or int64, got {tuple(positions.shape)} {positions.dtype}")
    others = {"slots": slots, "rows": rows, "positions": positions}
    found += [
        f"{name} must be on {cache.device} like cache, got {each.device}"
        for name, each in others.items()
        if each is not None and each.device != cache.device
    ]
    return found
