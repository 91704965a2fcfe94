"""Mods for tests of a backend: each of the library, and several at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from openmla import mods
from openmla.mods import Mod, Rope


def library_cases(
    h_q: int = 4, s_q: int = 2, batch: int = 3, capacity: int = 112, d_rope: int = 8
) -> dict[str, Mod | Rope | Sequence[Mod | Rope]]:
    """`mods=` by name, for a decode of these sizes; windows and documents are short, so that all matter in 33 keys."""
    generator = torch.Generator().manual_seed(0)
    ancestors = torch.tril(torch.rand(batch, s_q, s_q, generator=generator) < 0.7) | torch.eye(s_q, dtype=torch.bool)
    found: dict[str, Any] = {
        "soft_cap": mods.soft_cap(2.0),
        "alibi": mods.alibi(torch.tensor([0.5**i for i in range(h_q)])),
        "relative_bias": mods.relative_bias(torch.randn(h_q, 20, generator=generator)),
        "sliding_window": mods.sliding_window(7),
        "document": mods.document(torch.arange(capacity).expand(batch, capacity) // 20),
        "tree": mods.tree(ancestors, torch.tensor([88, -2, 31], dtype=torch.int32)[:batch]),
        "sink_tokens": mods.sink_tokens(3, 9),
        "sigmoid": mods.sigmoid(-1.0),
        "rope": Rope.of_base(d_rope, capacity),
        "rope of halves": Rope.of_base(d_rope, capacity, is_interleaved=False),
    }
    found["several"] = [found["rope"], found["soft_cap"], found["alibi"], found["document"], found["sink_tokens"]]
    found["sigmoid with others"] = [found["sigmoid"], found["soft_cap"], found["sliding_window"], found["rope"]]
    return found
