"""KV layouts: how one token of the latent cache is laid out in bytes.

A layout is named by format and size, never by a model and never guessed from a byte count: two of them
have 528 bytes. Only the layout knows how RoPE and latent overlap: in `fp8_584`, `fp8_528` and `fp8_528_mx`
V is all 512 columns, so no code may assume d_qk = d_latent + d_rope.

| name | d_qk | d_v | bytes per token | data | scales |
| --- | --- | --- | --- | --- | --- |
| bf16_576, fp16_576, fp32_576 (and _512) | 576 | 512 | 2 or 4 x d_qk | plain elements | none |
| fp8_656 | 576 | 512 | 656 | 512 e4m3, then scales, then 64 bf16 RoPE | 4 fp32, one per 128 columns |
| fp8_584 | 512 | 512 | 584 | 448 e4m3, 64 bf16 RoPE (576 B) | 7 e8m0 per 64 columns + 1 pad, behind all rows of the page |
| fp8_528 | 512 | 512 | 528 | 512 e4m3 | 4 fp32, one per 128 columns, behind the data |
| fp8_528_mx | 512 | 512 | 528 | 512 e4m3 | 16 e8m0, one per 32 columns, behind the data |
| fp4_288 | 512 | 512 | 288 | 512 e2m1, even column in the low nibble | 32 e4m3, one per 16 columns, behind the data |
| fp8_576 | 576 | 512 | 576 | 576 e4m3, RoPE among them | none: one per tensor, given with each call (`descale_k`) |

A cache tensor is [num_pages, page_size, h_kv, row_elements]. Where scales lie behind all rows of the page, the
bytes of one page are still page_size * bytes_per_token contiguous bytes, but a row of that tensor is then not one
token: read pages as a whole. Pages may be padded: only the page stride says where the next one begins.

Sources: deepseek-ai/FlashMLA README and tests/quant.py (fp8_656, fp8_584; release of 2026-09-30 for fp8_528_mx and
fp4_288, whose scales follow each token; the pre-release of 2026-09-10 kept them behind the page); sgl-project/FlashMLA
(fp8_528, and the cache of its dense FP8 decode: fp8_576).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch

from openmla.core.errors import ConfigError

ScaleFormat = Literal["none", "fp32", "e8m0", "e4m3"]
DataFormat = Literal["bf16", "fp16", "fp32", "e4m3", "e2m1"]

_PLAIN: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_PLAIN_NAME = {dtype: name for name, dtype in _PLAIN.items()}


@dataclass(frozen=True)
class KVLayout:
    """One way to store a token of the latent cache.

    d_qk columns are the key, the first d_v of them are also the value. `d_quant` columns are stored in
    `data_format` with one scale of `scale_format` per `scale_group` columns; the other d_qk - d_quant
    columns (RoPE) are bf16. Plain layouts have d_quant = 0 and all columns in `data_format`.
    """

    name: str
    d_qk: int
    d_v: int
    data_format: DataFormat
    d_quant: int = 0
    scale_format: ScaleFormat = "none"
    scale_group: int = 0
    scales_behind_page: bool = False  # scales of all rows lie behind the data of all rows of the page
    scale_pad_bytes: int = 0  # unused bytes behind the scales of a row
    page_align_bytes: int = 1  # a page is padded up to a multiple of this

    @property
    def is_quantised(self) -> bool:
        """True when tokens are stored as bytes with scales, False for plain elements."""
        return self.d_quant > 0

    @property
    def dtype(self) -> torch.dtype:
        """Element dtype of the cache tensor: the plain dtype, or uint8 for byte layouts."""
        return torch.uint8 if self.is_quantised else _PLAIN[self.data_format]

    @property
    def d_rope_stored(self) -> int:
        """Columns stored as bf16 behind the quantised ones (0 for plain layouts)."""
        return self.d_qk - self.d_quant if self.is_quantised else 0

    @property
    def num_scales(self) -> int:
        """Scales per token."""
        return self.d_quant // self.scale_group if self.scale_group else 0

    @property
    def data_bytes(self) -> int:
        """Bytes per token without scales."""
        if not self.is_quantised:
            return self.d_qk * self.dtype.itemsize
        quant = self.d_quant // 2 if self.data_format == "e2m1" else self.d_quant
        return quant + 2 * self.d_rope_stored

    @property
    def has_call_scale(self) -> bool:
        """True where the cache holds codes alone: their one scale belongs to the call, 1 if it names none."""
        return self.is_quantised and self.scale_format == "none"

    @property
    def scale_bytes(self) -> int:
        """Bytes per token of scales and their padding."""
        each = {"none": 0, "fp32": 4, "e8m0": 1, "e4m3": 1}[self.scale_format]
        return each * self.num_scales + self.scale_pad_bytes

    @property
    def bytes_per_token(self) -> int:
        """Bytes per token, page padding excluded."""
        return self.data_bytes + self.scale_bytes

    @property
    def row_elements(self) -> int:
        """Size of the last dimension of the cache tensor: d_qk elements, or bytes_per_token bytes."""
        return self.bytes_per_token if self.is_quantised else self.d_qk

    def page_bytes(self, page_size: int) -> int:
        """Bytes from one page to the next in a freshly allocated cache of one KV head."""
        raw = page_size * self.bytes_per_token
        return -(-raw // self.page_align_bytes) * self.page_align_bytes

    def cache_shape(self, num_pages: int, page_size: int, h_kv: int = 1) -> tuple[int, int, int, int]:
        """Shape of the cache tensor: [num_pages, page_size, h_kv, row_elements]."""
        return (num_pages, page_size, h_kv, self.row_elements)

    def empty_cache(
        self, num_pages: int, page_size: int, h_kv: int = 1, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """An uninitialised cache tensor with this layout's page stride (padding between pages included)."""
        shape = self.cache_shape(num_pages, page_size, h_kv)
        if not self.is_quantised or self.page_align_bytes == 1:
            return torch.empty(shape, dtype=self.dtype, device=device)
        if h_kv != 1:
            raise ConfigError(f"{self.name} stores one KV head per cache, got h_kv={h_kv}; keep one cache per head")
        stride = self.page_bytes(page_size)
        pool = torch.empty(num_pages * stride, dtype=torch.uint8, device=device)
        row = self.row_elements
        return pool.as_strided(shape, (stride, row, row, 1))

    def __str__(self) -> str:
        return self.name


_BYTE_LAYOUTS: dict[str, KVLayout] = {
    layout.name: layout
    for layout in (
        KVLayout("fp8_656", 576, 512, "e4m3", 512, "fp32", 128),
        KVLayout(
            "fp8_584", 512, 512, "e4m3", 448, "e8m0", 64,
            scales_behind_page=True, scale_pad_bytes=1, page_align_bytes=576,
        ),
        KVLayout("fp8_528", 512, 512, "e4m3", 512, "fp32", 128),
        KVLayout("fp8_528_mx", 512, 512, "e4m3", 512, "e8m0", 32),
        KVLayout("fp4_288", 512, 512, "e2m1", 512, "e4m3", 16),
        KVLayout("fp8_576", 576, 512, "e4m3", 576),
    )
}  # fmt: skip

# Formats whose scales lie in the cache: every operation reads them. fp8_576 is dense decode's alone.
BYTE_LAYOUT_NAMES: tuple[str, ...] = tuple(name for name, each in _BYTE_LAYOUTS.items() if not each.has_call_scale)
_PLAIN_RULE = re.compile(r"(bf16|fp16|fp32)_([1-9][0-9]{0,3})")


def kv_layout(name: str | KVLayout) -> KVLayout:
    """The layout of that name. Plain layouts are `bf16_576`, `fp16_512`, `fp32_64`, ...: dtype and d_qk.

    A plain layout has d_v = 512 when d_qk is 512 or more, else d_v = d_qk.
    Raises ConfigError for an unknown name.
    """
    if isinstance(name, KVLayout):
        return name
    if name in _BYTE_LAYOUTS:
        return _BYTE_LAYOUTS[name]
    match = _PLAIN_RULE.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        legal = ", ".join((*_BYTE_LAYOUTS, "bf16_<d_qk>", "fp16_<d_qk>", "fp32_<d_qk>"))
        raise ConfigError(f"unknown KV layout {name!r}; use one of: {legal}")
    d_qk = int(match[2])
    return plain_layout(_PLAIN[match[1]], d_qk, min(d_qk, 512))


def plain_layout(dtype: torch.dtype, d_qk: int, d_v: int) -> KVLayout:
    """The layout of a cache of plain elements. Raises ConfigError for a dtype that is not bf16, fp16 or fp32."""
    if dtype not in _PLAIN_NAME:
        raise ConfigError(f"a plain KV cache is bf16, fp16 or fp32, got {dtype}; name a byte layout with kv_layout=")
    short = _PLAIN_NAME[dtype]
    return KVLayout(f"{short}_{d_qk}", d_qk, d_v, short)  # type: ignore[arg-type]
