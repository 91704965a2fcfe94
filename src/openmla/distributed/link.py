"""Which collective carries the shares of attention: a cost model of latency and bandwidth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Exchange = Literal["auto", "direct", "all_gather", "all_to_all"]
Heads = Literal["all", "own"]


@dataclass(frozen=True)
class Link:
    """What a collective costs: latency_s + bytes received / bytes_per_s. One model for all ranks of a group.

    The defaults of `of` are orders of magnitude, not measurements; `ContextParallel.measure` measures.
    """

    latency_s: float
    bytes_per_s: float

    @classmethod
    def of(cls, backend: str) -> Link:
        """A first guess: 20 us and 150 GB/s where GPUs talk through NCCL, 200 us and 1 GB/s for CPUs."""
        return cls(20e-6, 150e9) if "nccl" in backend else cls(200e-6, 1e9)

    def choose(self, rows: int, row_bytes: int, merged_bytes: int, world: int, heads: Heads) -> Exchange:
        """The cheaper exchange of `rows` rows: row_bytes each as a share (out and lse), merged_bytes once merged."""
        gather = self.latency_s + (world - 1) * rows * row_bytes / self.bytes_per_s
        share = (world - 1) / world * rows / self.bytes_per_s
        scatter = self.latency_s + share * row_bytes
        if heads == "all":
            scatter += self.latency_s + share * merged_bytes
        return "all_gather" if gather <= scatter else "all_to_all"
