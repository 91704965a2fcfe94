"""Tensors of a case, as many sets as it takes to keep runs from finding their KV in a cache."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import torch

from openmla.core.layout import kv_layout, plain_layout
from openmla.core.problem import DecodeProblem
from openmla.core.target import Target
from openmla.lab.suite import Case
from openmla.reference import quant

DISTRIBUTION = "0.1 * randn, pages in random order"

# Where the operating system does not tell: more than any client CPU's last level of cache has.
_ASSUMED_CPU_CACHE = 64 << 20
# Sets of one case together; a batch of 16 x 4096 fp32 keys needs two of 151 MB.
_MEMORY_LIMIT = 2 << 30


@dataclass(frozen=True, eq=False)
class DecodeInputs:
    """One set. kv_cache [num_pages, page_size, h_kv, d_qk elements or the bytes of a layout]; table entries behind a request's last page are 0."""

    q: torch.Tensor
    kv_cache: torch.Tensor
    block_table: torch.Tensor
    cache_seqlens: torch.Tensor
    lengths: tuple[int, ...]
    softmax_scale: float

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.q.device


def problem(case: Case) -> DecodeProblem:
    """The Problem that a case asks, without making a tensor."""
    pages = [-(-length // case.page_size) for length in case.draw_lengths()]
    is_plain = case.kv_layout is None
    layout = plain_layout(case.torch_dtype, case.d_qk, case.d_v) if is_plain else kv_layout(case.layout)
    rows = (layout.bytes_per_token, case.d_qk * case.torch_dtype.itemsize)
    return DecodeProblem(
        batch=case.batch, s_q=case.s_q, total_q=case.batch * case.s_q, h_q=case.h_q, h_kv=case.h_kv, d_qk=case.d_qk,
        d_v=case.d_v, dtype=case.torch_dtype, layout=layout,
        page_size=case.page_size, num_pages=sum(pages), max_pages=max(pages), is_causal=case.is_causal,
        is_aligned=all(each % 16 == 0 for each in rows),
    )  # fmt: skip


def decode_inputs(case: Case, device: torch.device, index: int = 0) -> DecodeInputs:
    """Set number `index` of a case: same shapes and lengths in every set, other values and page order."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(f"{case.name}/{index}".encode()))
    lengths = tuple(case.draw_lengths())
    pages = [-(-length // case.page_size) for length in lengths]
    num_pages, max_pages = sum(pages), max(pages)
    is_coded = case.dtype == "e4m3"
    dtype = torch.bfloat16 if is_coded else case.torch_dtype

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype).mul_(0.1)

    order = torch.randperm(num_pages, generator=generator, device=device).to(torch.int32)
    table = torch.zeros(case.batch, max_pages, dtype=torch.int32, device=device)
    begin = 0
    for request, count in enumerate(pages):
        table[request, :count] = order[begin : begin + count]
        begin += count
    q = randn(case.batch, case.s_q, case.h_q, case.d_qk)
    kv_cache = randn(num_pages, case.page_size, case.h_kv, case.d_qk)
    return DecodeInputs(
        q=quant.encode_e4m3(q) if is_coded else q,
        kv_cache=kv_cache if case.kv_layout is None else quant.quantise(kv_cache, case.kv_layout),
        block_table=table,
        cache_seqlens=torch.tensor(lengths, dtype=torch.int32, device=device),
        lengths=lengths,
        softmax_scale=case.d_qk**-0.5,
    )


def num_sets(case: Case, target: Target, set_bytes: int, is_rotated: bool) -> int:
    """How many sets a case needs: one when warm or when the cache is flushed instead, else three caches' worth."""
    if case.cache == "warm" or not is_rotated:
        return 1
    cache = target.l2_bytes or 50 << 20 if target.is_cuda else cpu_cache_bytes()
    wanted = -(-3 * cache // max(set_bytes, 1)) + 1
    return max(2, min(wanted, 256, _MEMORY_LIMIT // max(set_bytes, 1)))


def cpu_cache_bytes() -> int:
    """Size of the last level of cache as Linux reports it, else an assumption on the large side."""
    path = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    try:
        text = path.read_text(encoding="ascii").strip()
        return int(text.rstrip("KM")) << (20 if text.endswith("M") else 10)
    except (OSError, ValueError):
        return _ASSUMED_CPU_CACHE
