"""How the compute-bound dense decode kernel can be built, and which problems it takes. No DSL import.

The shared-memory plan (bytes, h_q = 128): ring 10 x 16,384 (a slot is 64 keys x 128 columns), RoPE 8,192, Q columns that
are not held in registers 5 x 8,192, P 2 x 8,192, barriers and exchange below 2,048: 231,424 of 232,448.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from openmla.backends.base import Verdict, require
from openmla.core.problem import DecodeProblem
from openmla.core.target import Target

BLOCK_ROWS = 64  # query rows per CTA: one wgmma M
BLOCK_TOKENS = 64  # keys per tile
SLICE = 64  # columns of one 128-byte swizzled box
MAX_CLUSTER = 2
SMEM_LIMIT = 232_448


@dataclass(frozen=True)
class Config:
    """One compiled variant.

    Attributes:
        dtype: of q, KV and out.
        heads: query heads per KV head; rows are (token, head), head fastest.
        d_qk: 576 (with RoPE slice) or 512.
        page_size: tokens per page, a multiple of 64.
        cluster: 2 shares KV loads between the CTAs of two row blocks by multicast.
        q_regs: 64-column slices of Q held in registers by the score warpgroup.
        slots: ring slots of 64 keys x 128 columns.
        exp_start: the wgmma of a tile's 36 after which the exponentials of the tile before begin; two follow each wgmma.
        gate_left, gate_right: the wgmma of a tile's scores after which the left and right half of the tile before may
            be multiplied; -1 when all are issued, -2 when all are complete.
        prefetch: tiles ahead of the ring that are fetched into L2 (at most 16); 0 for none.
    """

    dtype: Literal["bf16", "fp16"] = "bf16"
    heads: int = 128
    d_qk: int = 576
    page_size: int = 64
    cluster: int = 2
    q_regs: int = 4
    slots: int = 10
    exp_start: int = 1
    exp_each: int = 2
    gate_left: int = -1
    gate_right: int = -2
    prefetch: int = 2

    @property
    def has_rope(self) -> bool:
        """Whether a ninth slice exists that is key but not value."""
        return self.d_qk == 576

    @property
    def q_slices(self) -> int:
        """64-column slices of one query row."""
        return self.d_qk // SLICE

    @property
    def name(self) -> str:
        """Exported function name."""
        return f"decode_dense_{self.dtype}_h{self.heads}_d{self.d_qk}_p{self.page_size}_c{self.cluster}"

    def as_dict(self) -> dict[str, Any]:
        """For the bundle's manifest."""
        return asdict(self)
