"""What a cache writer is compiled for, and which problems it takes. No DSL import.

A warp stores four tokens, eight lanes each. A lane has eight columns (16 bytes) of every 64, so that groups of scales and the
last 64 columns, which RoPE turns, are lanes and chunks of one token: nothing crosses from token to token.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from openmla.backends.base import Verdict, require
from openmla.core.layout import BYTE_LAYOUT_NAMES, KVLayout, kv_layout
from openmla.core.problem import AppendProblem
from openmla.core.target import Target

FAMILY = "writers"
LANES = 8  # per token
TOKENS = 32 // LANES  # per warp
CHUNK = 64  # columns that the lanes of a token load together
D_ROPE = CHUNK  # the columns that RoPE turns, if it turns any
MAX_SLOTS = 2**31 - 1
LAYOUTS = ("bf16_576", "bf16_512", *BYTE_LAYOUT_NAMES)


@dataclass(frozen=True)
class Config:
    """One compiled variant. Any number of tokens, page size, strides; bf16 rows.

    Attributes:
        layout: of the cache, by name.
        warps: per CTA.
    """

    layout: str
    warps: int = 4

    @property
    def stored(self) -> KVLayout:
        """The layout."""
        return kv_layout(self.layout)

    @property
    def name(self) -> str:
        """Exported function name."""
        return f"{FAMILY}_{self.layout}_w{self.warps}"

    def as_dict(self) -> dict[str, Any]:
        """For the bundle's manifest."""
        return asdict(self)


VARIANTS: tuple[Config, ...] = tuple(Config(layout) for layout in LAYOUTS)
"""What an ahead-of-time bundle holds: every variant that `supports` can lead to."""


def supports(problem: AppendProblem, target: Target) -> Verdict:
    """May this kernel run the problem here? Every reason against it."""
    layout = problem.layout
    return require(
        (target.arch == "sm_90a", f"needs sm_90a, the target is {target.arch}"),
        (problem.dtype == torch.bfloat16, f"takes bf16 rows, got {problem.dtype}"),
        (layout.name in LAYOUTS, f"writes {', '.join(LAYOUTS)}, got {layout.name}"),
        (problem.d_rope in (0, D_ROPE), f"rotates {D_ROPE} columns or none, got {problem.d_rope}"),
        (problem.is_aligned, "needs cache, rows and tables to start at and step by multiples of 16 bytes"),
        (
            problem.num_pages * problem.page_size <= MAX_SLOTS,
            f"takes caches of up to {MAX_SLOTS} slots, got {problem.num_pages * problem.page_size}",
        ),
    )


def configs(problem: AppendProblem, target: Target) -> tuple[Config, ...]:
    """The variant that runs the problem. Call only where `supports` is true."""
    return (Config(problem.layout.name),)
