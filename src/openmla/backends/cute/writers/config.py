"""What a cache writer is compiled for, and which problems it takes. No DSL import.

A warp stores four tokens. Of each it loads columns in two halves of 256, eight columns (16 bytes) per lane and half, so that a
token's codes are 8-byte stores of 256 adjacent bytes; the last 64 columns of all four tokens are one load more, eight lanes
per token, where RoPE turns them.
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
TOKENS = 4  # per warp
D_ROPE = 64  # the columns that RoPE turns, if it turns any
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
    def d_main(self) -> int:
        """Columns that a token's 32 lanes load: all of them where the turned ones are quantised, else those before."""
        stored = self.stored
        return stored.d_qk if stored.d_quant == stored.d_qk else stored.d_qk - D_ROPE

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
