"""Pack and unpack every KV layout of `openmla.core.layout`, bit for bit.

Writing e4m3 data, per group of columns of one token:

    scale = 2 ** ceil(log2(max(amax / 448, 1e-4)))      stored as fp32, or as e8m0: the byte exponent + 127
    code  = e4m3(x / scale)                             round to nearest even; |x / scale| <= 448 always

Writing e2m1 data:

    scale = e4m3(min(max(amax / 6, 2 ** -9), 448))
    code  = e2m1(x / scale)                             round to nearest even, saturating at 6; NaN becomes code 0

Writing e4m3 data without scales (fp8_576): code = e4m3(x / descale), which saturates at 448; NaN and inf become NaN. The
scale belongs to the call, so reading gives bf16(code), which is exact: whoever attends multiplies by `descale_k`.

A group that holds NaN or inf gets a scale that is not finite (e4m3 and e8m0 have NaN alone), so that reading it
gives NaN instead of a plausible number.

Reading, for any scale that the format can hold: bf16(fp32(code) * fp32(scale)). RoPE columns are bf16 as stored.
Plain layouts are copies. Sources of the formats: see `openmla.core.layout`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from openmla.core.errors import ProblemError
from openmla.core.layout import KVLayout, kv_layout

E4M3_MAX = 448.0
E2M1_MAX = 6.0
_SMALLEST_FP8_SCALE = 1e-4
_SMALLEST_E4M3 = 2.0**-9
_E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def power_of_two_scale(amax: torch.Tensor) -> torch.Tensor:
    """2 ** ceil(log2(max(amax / 448, 1e-4))), fp32; a non-finite amax is returned as it is."""
    ratio = (amax.to(torch.float32) / E4M3_MAX).clamp_min(_SMALLEST_FP8_SCALE)
    # frexp is exact where log2 would round: ratio = mantissa * 2 ** exponent, mantissa in [0.5, 1).
    mantissa, exponent = torch.frexp(ratio)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    scale = torch.ldexp(torch.ones_like(ratio), exponent)
    return torch.where(ratio.isfinite(), scale, ratio)


def encode_e2m1(x: torch.Tensor) -> torch.Tensor:
    """The 4-bit code of each element, uint8: sign bit 8, then the index of its magnitude; nearest, ties to even."""
    size = x.abs()
    # Midpoints between neighbours; a tie goes to the even index, so every second comparison includes its midpoint.
    index = (
        (size > 0.25).to(torch.uint8)
        + (size >= 0.75).to(torch.uint8)
        + (size > 1.25).to(torch.uint8)
        + (size >= 1.75).to(torch.uint8)
        + (size > 2.5).to(torch.uint8)
        + (size >= 3.5).to(torch.uint8)
        + (size > 5.0).to(torch.uint8)
    )
    sign = torch.where(torch.signbit(x), 8, 0).to(torch.uint8)
    return torch.where(x.isnan(), torch.zeros_like(index), index | sign)


def decode_e2m1(codes: torch.Tensor) -> torch.Tensor:
    """The fp32 value of each 4-bit code (uint8, 0 to 15)."""
    table = torch.tensor(_E2M1_VALUES + tuple(-value for value in _E2M1_VALUES), device=codes.device)
    return table[codes.to(torch.int64)]


@dataclass(frozen=True)
class _Places:
    """Where the three parts of a token lie: byte offset inside its page of token `offset`, and size."""

    data: tuple[int, int, int]  # first byte, bytes between tokens, size
    rope: tuple[int, int, int]
    scale: tuple[int, int, int]


def _places(layout: KVLayout, page_size: int) -> _Places:
    quant = layout.d_quant // 2 if layout.data_format == "e2m1" else layout.d_quant
    rope = 2 * layout.d_rope_stored
    if layout.scales_behind_page:
        row = layout.data_bytes
        return _Places((0, row, quant), (quant, row, rope), (page_size * row, layout.scale_bytes, layout.scale_bytes))
    row = layout.bytes_per_token
    return _Places((0, row, quant), (quant + layout.scale_bytes, row, rope), (quant, row, layout.scale_bytes))


def _pages(cache: torch.Tensor, layout: KVLayout) -> torch.Tensor:
    """The bytes of every page, uint8 [num_pages, page_size * bytes_per_token], a view."""
    stride = cache.stride(0) if cache.shape[0] > 1 else cache.shape[1] * layout.bytes_per_token
    return cache.view(torch.uint8).as_strided((cache.shape[0], cache.shape[1] * layout.bytes_per_token), (stride, 1))


def _addresses(place: tuple[int, int, int], slots: torch.Tensor, page_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(page [n, 1], byte [n, size]) of one part of each slot."""
    first, step, size = place
    begin = first + slots % page_size * step
    return (slots // page_size)[:, None], begin[:, None] + torch.arange(size, device=slots.device)


def encode_e4m3(x: torch.Tensor) -> torch.Tensor:
    """The e4m3 code of each element as float8_e4m3fn: nearest even, saturating at 448; NaN and inf become NaN."""
    wide = x.to(torch.float32)
    return wide.clamp(-E4M3_MAX, E4M3_MAX).masked_fill(~wide.isfinite(), torch.nan).to(torch.float8_e4m3fn)


def _encode(rows: torch.Tensor, layout: KVLayout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(data, rope, scale) bytes of rows [n, d_qk], uint8 [n, size] each."""
    n = rows.shape[0]
    if layout.has_call_scale:
        nothing = torch.empty((n, 0), dtype=torch.uint8, device=rows.device)
        return encode_e4m3(rows).view(torch.uint8), nothing, nothing
    groups = rows[:, : layout.d_quant].to(torch.float32).reshape(n, layout.num_scales, layout.scale_group)
    amax = groups.abs().amax(-1) if n else groups.new_zeros(n, layout.num_scales)
    if layout.data_format == "e2m1":
        stored = (amax / E2M1_MAX).clamp(_SMALLEST_E4M3, E4M3_MAX)
        stored = torch.where(amax.isfinite(), stored, torch.nan).to(torch.float8_e4m3fn)
        codes = encode_e2m1(groups / stored.to(torch.float32)[..., None]).flatten(1)
        data = codes[:, 0::2] | (codes[:, 1::2] << 4)
        scale = stored.view(torch.uint8)
    else:
        factor = power_of_two_scale(amax)
        data = (groups / factor[..., None]).to(torch.float8_e4m3fn).view(torch.uint8).flatten(1)
        if layout.scale_format == "e8m0":
            exponent = torch.frexp(factor).exponent - 1 + 127
            byte = torch.where(factor.isfinite(), exponent, 255).to(torch.uint8)
            scale = torch.cat([byte, byte.new_zeros(n, layout.scale_pad_bytes)], 1)
        else:
            scale = factor.contiguous().view(torch.uint8)
    rope = (
        rows[:, layout.d_quant :].to(torch.bfloat16).reshape(-1).view(torch.uint8).reshape(n, 2 * layout.d_rope_stored)
    )
    return data, rope, scale


def _decode(data: torch.Tensor, rope: torch.Tensor, scale: torch.Tensor, layout: KVLayout) -> torch.Tensor:
    """The bf16 rows [n, d_qk] behind those bytes."""
    n = data.shape[0]
    if layout.has_call_scale:
        return data.view(torch.float8_e4m3fn).to(torch.bfloat16)
    if layout.data_format == "e2m1":
        values = decode_e2m1(torch.stack([data & 15, data >> 4], -1))
        factor = scale.view(torch.float8_e4m3fn).to(torch.float32)
    else:
        values = data.view(torch.float8_e4m3fn).to(torch.float32)
        if layout.scale_format == "e8m0":
            factor = scale[:, : layout.num_scales].contiguous().view(torch.float8_e8m0fnu).to(torch.float32)
        else:
            factor = scale.view(torch.float32)
    product = values.reshape(n, layout.num_scales, layout.scale_group) * factor[..., None]
    return torch.cat(
        [product.flatten(1).to(torch.bfloat16), rope.reshape(-1).view(torch.bfloat16).reshape(n, layout.d_rope_stored)],
        1,
    )


def _check_slots(op: str, cache: torch.Tensor, slots: torch.Tensor) -> None:
    num_slots = cache.shape[0] * cache.shape[1]
    wrong = (slots < -1) | (slots >= num_slots)
    if bool(wrong.any()):
        first = int(slots[wrong][0])
        raise ProblemError(
            op,
            [f"slots must be -1 or 0 to {num_slots - 1} (num_pages * page_size - 1), got {first}; drop it or use -1"],
        )


def write_rows(
    cache: torch.Tensor,
    layout: KVLayout | str,
    slots: torch.Tensor,
    rows: torch.Tensor,
    descale: torch.Tensor | None = None,
) -> None:
    """Store tokens in a paged cache, in place.

    Args:
        cache: [num_pages, page_size, 1, row_elements] in `layout`; pages may be padded.
        layout: byte format, or a plain layout.
        slots: [n] int64, page * page_size + offset; -1 skips the row. Distinct, else one of the rows wins.
        rows: [n, d_qk] bf16|fp16|fp32.
        descale: one fp32 number that rows are divided by, in fp32, where the scale belongs to the call (fp8_576); None: 1.

    Raises:
        ProblemError: a slot is below -1 or beyond the cache, or a descale for a layout with scales of its own.
    """
    layout = kv_layout(layout)
    _check_slots("write_rows", cache, slots)
    keep = slots >= 0
    slots, rows = slots[keep].to(torch.int64), rows[keep]
    if descale is not None:
        if not layout.has_call_scale:
            raise ProblemError(
                "write_rows", [f"descale must be None for {layout}, whose scales lie in the cache; drop it"]
            )
        rows = rows.to(torch.float32) / descale.reshape(()).to(rows.device)
    page_size = cache.shape[1]
    if not layout.is_quantised:
        cache[slots // page_size, slots % page_size, 0] = rows.to(cache.dtype)
        return
    pages, places = _pages(cache, layout), _places(layout, page_size)
    data, rope, scale = _encode(rows, layout)
    for place, content in ((places.data, data), (places.rope, rope), (places.scale, scale)):
        pages[_addresses(place, slots, page_size)] = content


def read_rows(cache: torch.Tensor, layout: KVLayout | str, slots: torch.Tensor) -> torch.Tensor:
    """Tokens of a paged cache.

    Args:
        cache: [num_pages, page_size, 1, row_elements] in `layout`; pages may be padded.
        layout: byte format, or a plain layout.
        slots: [n] int64, page * page_size + offset; -1 reads zeros.

    Returns:
        [n, d_qk] bf16 for a byte format, else the cache's dtype.

    Raises:
        ProblemError: a slot is below -1 or beyond the cache.
    """
    layout = kv_layout(layout)
    _check_slots("read_rows", cache, slots)
    page_size = cache.shape[1]
    keep = slots >= 0
    wanted = slots[keep].to(torch.int64)
    if not layout.is_quantised:
        found = cache[wanted // page_size, wanted % page_size, 0]
    else:
        pages, places = _pages(cache, layout), _places(layout, page_size)
        data, rope, scale = (
            pages[_addresses(place, wanted, page_size)] for place in (places.data, places.rope, places.scale)
        )
        found = _decode(data, rope, scale, layout)
    rows = found.new_zeros((slots.shape[0], found.shape[1]))
    rows[keep] = found
    return rows


def quantise(latent: torch.Tensor, layout: KVLayout | str) -> torch.Tensor:
    """A cache in `layout` that holds latent [num_pages, page_size, 1, d_qk] bf16|fp16|fp32.

    Returns:
        [num_pages, page_size, 1, row_elements] with the layout's page padding; uint8 for a byte format.

    Raises:
        ProblemError: latent has another shape.
    """
    layout = kv_layout(layout)
    if latent.dim() != 4 or latent.shape[-1] != layout.d_qk:
        rule = (
            f"latent must be [num_pages, page_size, h_kv, d_qk={layout.d_qk}] for {layout}, got {tuple(latent.shape)}"
        )
        raise ProblemError("quantise", [rule])
    cache = layout.empty_cache(latent.shape[0], latent.shape[1], latent.shape[2], device=latent.device)
    if not layout.is_quantised:
        return cache.copy_(latent)
    slots = torch.arange(latent.shape[0] * latent.shape[1], device=latent.device)
    write_rows(cache, layout, slots, latent.reshape(-1, latent.shape[-1]))
    return cache


def dequantise(cache: torch.Tensor, layout: KVLayout | str, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """The tokens of a cache as [num_pages, page_size, h_kv, d_qk] in `dtype`; a wider dtype holds the bf16 values.

    Raises:
        ProblemError: the cache is not one in `layout`.
    """
    layout = kv_layout(layout)
    if cache.dim() != 4 or cache.shape[-1] != layout.row_elements:
        got = tuple(cache.shape)
        rule = f"cache must be [num_pages, page_size, h_kv, row_elements={layout.row_elements}] for {layout}, got {got}"
        raise ProblemError("dequantise", [rule])
    if not layout.is_quantised:
        return cache.to(dtype)
    slots = torch.arange(cache.shape[0] * cache.shape[1], device=cache.device)
    return read_rows(cache, layout, slots).to(dtype).reshape(cache.shape[0], cache.shape[1], 1, -1)
