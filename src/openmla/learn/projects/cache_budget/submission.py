"""Make `choose` look at the layers. What stands here gives all of them the same layout."""

from collections.abc import Sequence
from typing import Any

from openmla.core.layout import KVLayout, kv_layout

LAYOUTS = (kv_layout("bf16_576"), kv_layout("fp8_656"), KVLayout("fp4_416", 576, 512, "e2m1", 512, "e4m3", 16))


def choose(samples: Sequence[Any], budget: int) -> list[KVLayout]:
    """One layout per layer, together at most `budget` bytes per token. A sample has q, rows and softmax_scale."""
    fitting = [layout for layout in LAYOUTS if layout.bytes_per_token * len(samples) <= budget]
    return [max(fitting, key=lambda layout: layout.bytes_per_token)] * len(samples)
