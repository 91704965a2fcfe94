"""Ceilings: what this machine did, not what its data sheet says. Measured once per process.

Roof of arithmetic: one large square matrix product on random data (zeros draw less power and run up to 13 % faster on
an H200). Roof of memory: reading a buffer far larger than the last cache, and copying one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from openmla.core.target import Target
from openmla.lab import workload
from openmla.lab.clock import best_seconds

_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Ceilings:
    """Best rates seen. `gemm_tflops` by dtype name; bandwidths in 10^9 byte/s; a copy counts bytes read and written."""

    gemm_tflops: dict[str, float]
    gemm_size: int
    read_gbps: float
    copy_gbps: float

    def as_dict(self) -> dict[str, float]:
        """Flat, for a row."""
        rates = {f"gemm_{name}_tflops": rate for name, rate in self.gemm_tflops.items()}
        return {**rates, "gemm_size": float(self.gemm_size), "read_gbps": self.read_gbps, "copy_gbps": self.copy_gbps}


def measure(target: Target, dtypes: tuple[str, ...] = ("bf16", "fp32"), seconds: float = 1.0) -> Ceilings:
    """The ceilings of the device behind `target`: about `seconds` for each rate, free the second time."""
    return _measure(target, tuple(sorted(set(dtypes))), torch.get_num_threads(), min(seconds, 1.0))


@cache
def _measure(target: Target, dtypes: tuple[str, ...], num_threads: int, seconds: float) -> Ceilings:
    device = torch.device("cuda" if target.is_cuda else "cpu")
    # 8192^3 fills an H100 for 1.5 ms; 2048^3 is 17 GFLOP, 0.1 s on two CPU cores.
    size = 8192 if target.is_cuda else 2048
    gemm = {name: gemm_tflops(device, dtype, size, seconds) for dtype, name in _SHORT.items() if name in dtypes}
    read, copy = _bandwidths(device, seconds)
    return Ceilings(gemm, size, read, copy)


def gemm_tflops(device: torch.device, dtype: torch.dtype, size: int, seconds: float = 1.0) -> float:
    """10^12 FLOP/s of a size^3 product."""
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
    out = torch.empty(size, size, dtype=dtype, device=device)
    return 2 * size**3 / best_seconds(lambda: torch.mm(a, b, out=out), device, seconds) / 1e12


def _bandwidths(device: torch.device, seconds: float) -> tuple[float, float]:
    """(read, copy) in 10^9 byte/s over 4 GiB on a GPU and 512 MiB on a CPU: beyond any cache of today."""
    count = (1 << 30) if device.type == "cuda" else (1 << 27)
    source = torch.ones(count, dtype=torch.float32, device=device)
    sink = torch.empty_like(source)
    # A sum and a dot product take different code paths; the faster one is nearer to what the memory can do.
    read = min(
        best_seconds(lambda: source.sum(), device, seconds),
        best_seconds(lambda: torch.dot(source, source), device, seconds),
    )
    copy = best_seconds(lambda: sink.copy_(source), device, seconds)
    return 4 * count / read / 1e9, 8 * count / copy / 1e9


def cache_gbps(target: Target, seconds: float = 1.0) -> tuple[int, float]:
    """(bytes, 10^9 byte/s) of reading half of the last cache again and again: L2 on a GPU, the last level on a CPU."""
    device = torch.device("cuda" if target.is_cuda else "cpu")
    if not target.is_cuda:
        count = min(max(workload.cpu_cache_bytes() // 8, 1 << 18), 1 << 24)
        source = torch.ones(count, dtype=torch.float32)
        return 4 * count, 4 * count / best_seconds(lambda: torch.dot(source, source), device, seconds) / 1e9
    # One launch that reads the same rows 64 times: a launch per pass would cost as much as the pass.
    count, passes = (target.l2_bytes or 40 << 20) // 8, 64
    repeated = torch.ones(count, dtype=torch.float32, device=device).expand(passes, count)
    return 4 * count, 4 * count * passes / best_seconds(lambda: repeated.sum(1), device, seconds) / 1e9
