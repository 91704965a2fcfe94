"""Rows of a KV cache: from slot numbers to dequantised rows, on any device, without a host sync.

A slot is page * page_size + offset. Byte layouts read as bf16(fp32(code) * fp32(scale)), without a scale where it belongs to the call; see
`openmla.core.layout` for where the bytes lie.
"""

from __future__ import annotations

import torch

from openmla.backends.torch.dequant import E2M1_BIAS, E2M1_BITS
from openmla.core.layout import KVLayout


def read_slots(cache: torch.Tensor, layout: KVLayout, slots: torch.Tensor, head: int = 0) -> torch.Tensor:
    """Rows at those slots, dequantised.

    Args:
        cache: [num_pages, page_size, h_kv, row_elements]; pages may be strided or padded.
        layout: how a row is stored.
        slots: [n] int64, every one in [0, num_pages * page_size).
        head: KV head to read; byte layouts have one.

    Returns:
        [n, d_qk], the cache's dtype for a plain layout, else bf16.
    """
    page_size = cache.shape[1]
    page, offset = slots // page_size, slots % page_size
    if not layout.is_quantised:
        return cache[page, offset, head]
    data, scales = _parts(cache, layout)
    return _dequantise(data[page, offset], scales[page, offset], layout)


def _parts(cache: torch.Tensor, layout: KVLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the data and the scale bytes, uint8 [num_pages, page_size, size] each."""
    num_pages, page_size = cache.shape[0], cache.shape[1]
    raw = cache.view(torch.uint8)
    # The stride of a dimension of size 1 may be anything; it is never used, but must not be negative.
    page_stride = raw.stride(0) if num_pages > 1 else page_size * layout.bytes_per_token
    if layout.scales_behind_page:
        data_step, scale_step, first_scale = layout.data_bytes, layout.scale_bytes, page_size * layout.data_bytes
        data = raw.as_strided((num_pages, page_size, layout.data_bytes), (page_stride, data_step, 1))
    else:
        # Scales stand between the quantised columns and RoPE, so a row is read whole.
        scale_step, first_scale = layout.bytes_per_token, layout.data_bytes - 2 * layout.d_rope_stored
        data = raw.as_strided((num_pages, page_size, layout.bytes_per_token), (page_stride, scale_step, 1))
    scales = raw.as_strided(
        (num_pages, page_size, layout.scale_bytes), (page_stride, scale_step, 1), raw.storage_offset() + first_scale
    )
    return data, scales


def _dequantise(data: torch.Tensor, scales: torch.Tensor, layout: KVLayout) -> torch.Tensor:
    """Bytes of n rows, as `_parts` cuts them, to bf16 [n, d_qk]."""
    n = data.shape[0]
    if layout.has_call_scale:
        return data.contiguous().view(torch.float8_e4m3fn).to(torch.bfloat16)
    if layout.data_format == "e2m1":
        # Two codes per byte, even column in the low nibble. The nibble's bits become those of an fp16 that is
        # 2^14 times too small; see `dequant`.
        codes = data[:, : layout.d_quant // 2].to(torch.int16)
        bits = torch.stack((codes << 12, codes << 8), -1) >> 3 & E2M1_BITS
        values = bits.view(torch.float16).to(torch.float32) * E2M1_BIAS
    else:
        values = data[:, : layout.d_quant].contiguous().view(torch.float8_e4m3fn).to(torch.float32)
    used = scales[:, : layout.scale_bytes - layout.scale_pad_bytes].contiguous()
    stored = {"fp32": torch.float32, "e8m0": torch.float8_e8m0fnu, "e4m3": torch.float8_e4m3fn}[layout.scale_format]
    factor = used.view(stored).to(torch.float32)
    wide = values.reshape(n, layout.num_scales, layout.scale_group) * factor[..., None]
    rows = wide.reshape(n, layout.d_quant).to(torch.bfloat16)
    if not layout.d_rope_stored:
        return rows
    rope = data[:, data.shape[1] - 2 * layout.d_rope_stored :].contiguous().view(torch.bfloat16)
    return torch.cat((rows, rope), 1)
