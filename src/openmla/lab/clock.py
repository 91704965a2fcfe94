"""Time of one call, on a CPU or a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Wall time on a CPU; on a GPU the time between two events around the call, waited for."""
    if device.type != "cuda":
        at = time.perf_counter_ns()
        call()
        return (time.perf_counter_ns() - at) / 1e9
    start: torch.cuda.Event = torch.cuda.Event(enable_timing=True)
    stop: torch.cuda.Event = torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3


def best_seconds(call: Callable[[], object], device: torch.device, budget: float = 1.0) -> float:
    """Shortest of at least three runs within about `budget` seconds, after one warm-up."""
    call()
    begin = time.perf_counter()
    best = float("inf")
    count = 0
    while count < 3 or (time.perf_counter() - begin < budget and count < 100):
        best = min(best, seconds(call, device))
        count += 1
    return best


def quantile(sorted_values: Sequence[float], q: float) -> float:
    """Nearest-rank quantile of ascending values: always a time that was measured, never between two."""
    return sorted_values[min(int(q * len(sorted_values)), len(sorted_values) - 1)]
