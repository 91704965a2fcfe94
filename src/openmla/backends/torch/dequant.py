"""From the bytes of a KV cache to rows, on a CPU, about ten times as fast as converting through PyTorch's fp8 types.

A minifloat becomes an fp16 by moving its bits: sign to bit 15, exponent and mantissa so that they meet between bits
10 and 9. What differs is the exponent's bias, a power of two: fp16 15, e4m3 7, e2m1 1. Subnormals come out right,
for they are subnormals of fp16 too.

    e4m3  s eeee mmm   -> fp16 of value / 2^8        its NaN (all ones) would read 480 / 2^8, and is put back
    e2m1  s ee m       -> fp16 of value / 2^14

Rows are bf16(fp32(code) * fp32(scale)); the power of two moves into neither factor unless it is exact there.
"""

from __future__ import annotations

import torch

from openmla.backends.torch.workers import Scratch
from openmla.core.layout import KVLayout

_E4M3_BIAS, E2M1_BIAS = 2.0**8, 2.0**14
_HUGE = 2.0**100  # scales from here on could overflow when multiplied by a bias
_ALL_BUT_BIT_14 = -0x4001
E2M1_BITS = -0x7200  # 0x8E00: sign, two exponent bits, one mantissa bit


def split_pages(raw: torch.Tensor, layout: KVLayout, page_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of the codes, scales and RoPE bytes, uint8 [pages, page_size, size] each, of raw [pages, page bytes]."""
    rows = page_size * layout.data_bytes
    if layout.scales_behind_page:
        data = raw[:, :rows].unflatten(1, (page_size, layout.data_bytes))
        codes, rope = data.split((layout.data_bytes - 2 * layout.d_rope_stored, 2 * layout.d_rope_stored), 2)
        return codes, raw[:, rows : rows + page_size * layout.scale_bytes].unflatten(1, (page_size, -1)), rope
    return split_rows(raw[:, : page_size * layout.bytes_per_token].unflatten(1, (page_size, -1)), layout)


def split_rows(raw: torch.Tensor, layout: KVLayout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of the codes, scales and RoPE bytes of rows [..., bytes_per_token] whose scales stand in the row."""
    codes = layout.data_bytes - 2 * layout.d_rope_stored
    parts = raw.split((codes, layout.scale_bytes, 2 * layout.d_rope_stored), -1)
    return parts[0], parts[1], parts[2]


def dequantise(
    codes: torch.Tensor, scales: torch.Tensor, rope: torch.Tensor, layout: KVLayout, out: torch.Tensor,
    scratch: Scratch,
) -> None:  # fmt: skip
    """Writes rows to out [n, d_qk] bf16|fp32; codes, scales and rope are uint8 [..., size] with n rows in all."""
    n, d_quant = out.shape[0], layout.d_quant
    if layout.has_call_scale:
        out.copy_(_e4m3_as_half(codes, "codes", scratch).view(n, d_quant)).mul_(_E4M3_BIAS)
        _restore_nan(out, codes, scratch)
        return
    factor, bias = _factors(scales, layout, scratch)
    if layout.data_format == "e2m1":
        half = _e2m1_as_half(codes, scratch)
        bias *= E2M1_BIAS
    else:
        half = _e4m3_as_half(codes, "codes", scratch)
        bias *= _E4M3_BIAS
    wide = scratch.take("wide", torch.float32, n, d_quant).copy_(half.view(n, d_quant))
    if layout.data_format != "e2m1":
        _restore_nan(wide, codes, scratch)
    if bool(factor.abs().amax() < _HUGE):
        factor = factor * bias
    else:  # NaN comes here too
        wide.mul_(bias)
    wide.view(n, layout.num_scales, layout.scale_group).mul_(factor[..., None])
    if out.dtype == torch.bfloat16:
        out[:, :d_quant] = wide
    else:
        out[:, :d_quant] = scratch.take("narrow", torch.bfloat16, n, d_quant).copy_(wide)
    if layout.d_rope_stored:
        out[:, d_quant:] = rope.reshape(n, -1).view(torch.bfloat16)


def _factors(scales: torch.Tensor, layout: KVLayout, scratch: Scratch) -> tuple[torch.Tensor, float]:
    """Scales fp32 [n, num_scales], and the bias that they lack."""
    used = scales[..., : layout.scale_bytes - layout.scale_pad_bytes]
    used = used.reshape(-1, used.shape[-1])
    if layout.scale_format == "e4m3":
        wide = _e4m3_as_half(used, "scale_codes", scratch).to(torch.float32)
        _restore_nan(wide, used, scratch)
        return wide, _E4M3_BIAS
    stored = torch.float32 if layout.scale_format == "fp32" else torch.float8_e8m0fnu
    return used.contiguous().view(stored).to(torch.float32), 1.0


def _e4m3_as_half(codes: torch.Tensor, name: str, scratch: Scratch) -> torch.Tensor:
    """The fp16 of value / 2^8, in scratch."""
    bits = scratch.take(name, torch.int16, *codes.shape)
    # Widening a signed byte and moving it by 7 leaves the sign in bits 15 and 14; bit 14 belongs to the exponent.
    bits.copy_(codes.view(torch.int8)).bitwise_left_shift_(7).bitwise_and_(_ALL_BUT_BIT_14)
    return bits.view(torch.float16)


def _restore_nan(wide: torch.Tensor, codes: torch.Tensor, scratch: Scratch) -> None:
    """NaN where the code of that element is e4m3's NaN."""
    size = torch.bitwise_and(codes, 0x7F, out=scratch.take("magnitudes", torch.uint8, *codes.shape))
    if int(size.amax()) == 0x7F:
        wide.masked_fill_((size == 0x7F).view(wide.shape), torch.nan)


def _e2m1_as_half(codes: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """The fp16 of value / 2^14 of two codes per byte, low nibble first, in scratch."""
    pairs = scratch.take("codes", torch.int16, *codes.shape, 2)
    # The nibble at the top of 16 bits, then three places down: the sign fills bits 15 to 12, all but 15 are cleared.
    for nibble, places in ((0, 12), (1, 8)):
        bits = scratch.take("nibbles", torch.int16, *codes.shape).copy_(codes)
        bits.bitwise_left_shift_(places).bitwise_right_shift_(3).bitwise_and_(E2M1_BITS)
        pairs[..., nibble] = bits
    return pairs.view(torch.float16)
