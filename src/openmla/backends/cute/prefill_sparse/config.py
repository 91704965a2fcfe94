"""How the gathering kernel over bf16 rows can be built, and which problems it takes. No DSL import.

The shared-memory plan (bytes, d_qk 576): ring 10 x 16,384 (a slot is 64 keys x 128 columns), RoPE 8,192, the five slices
of Q that are not held in registers 5 x 8,192, P 2 x 8,192, barriers and exchange below 2,048: 231,424 of 232,448. With
d_qk 512 there is no RoPE slice and one slice of Q less: 11 slots.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from openmla.backends.base import Verdict, require
from openmla.core.problem import SparseDecodeProblem, SparsePrefillProblem
from openmla.core.target import Target

FAMILY = "prefill_sparse"
BLOCK_ROWS = 64  # query heads per CTA: one wgmma M
BLOCK_TOKENS = 64  # keys per tile
SLICE = 64  # columns of one 128-byte swizzled box
SLICE_BYTES = 64 * 128
D_V = 512
SMEM_LIMIT = 232_448
MAX_BYTES = 2**36 - 16  # offsets are 32-bit counts of 16 bytes, and the last one means "no row"
ROLES = {"scores": 152, "values": 160, "producers": 40}  # registers per thread; with two warpgroups of values 512


# Which rows and columns a producer lane copies; traced into the kernel, and run by the tests.


def lane_row(lane: Any) -> Any:
    """A lane's row within each group of four."""
    return lane >> 3


def lane_chunk(lane: Any) -> Any:
    """A lane's 16 bytes within the 128 bytes of a row and slice."""
    return lane & 7


def lane_place(warp: Any, lane: Any) -> Any:
    """Byte of a slice (64 rows x 128 bytes, 128-byte swizzle) of a lane's first row."""
    return (16 * warp + lane_row(lane)) * 128 + (lane_chunk(lane) ^ lane_row(lane)) * 16


def of_row(place: Any, i: int) -> Any:
    """The place of a lane's row i (0 to 3; four rows apart) from that of its first."""
    return (place + 512 * i) ^ (64 * (i % 2))


@dataclass(frozen=True)
class Config:
    """One compiled variant. Any head count, number of query tokens, topk, lengths.

    Attributes:
        form: "rows": indices are rows of one tensor, `max_logits` is written. "pages": indices are slots of a paged cache.
        d_qk: 576, or 512 without RoPE columns.
        cluster: 2 lets a ring slot be filled again only when both CTAs of two head blocks have left it. They read the same
            rows and then ask for them at about the same time.
        q_regs: 64-column slices of Q in the registers of the scores warpgroup, even.
        gate_left, gate_right: the wgmma of a tile's scores after which the left and right half of the tile before may
            be multiplied; -1 when all are issued, -2 when all are complete.
        prefetch: ask for the rows of a tile in L2 one tile before they are copied.
        l2: bytes that a copy asks L2 to fetch from memory at least.
        fence: readers of the ring order the copies, which are generic writes, before the tensor cores' reads. False is
            for diagnosis only.
    """

    form: Literal["rows", "pages"] = "rows"
    d_qk: int = 576
    cluster: int = 1
    q_regs: int = 4
    gate_left: int = -1
    gate_right: int = -2
    prefetch: bool = False
    l2: int = 128
    fence: bool = True

    @property
    def slots(self) -> int:
        """Ring slots of 64 keys x 128 columns."""
        return 10 if self.d_qk == 576 else 11

    @property
    def has_rope(self) -> bool:
        """Whether there is a ninth slice that is key but not value."""
        return self.d_qk == 576

    @property
    def q_slices(self) -> int:
        """64-column slices of one query row."""
        return self.d_qk // SLICE

    @property
    def name(self) -> str:
        """Exported function name; the digest stands for the fields of the schedule."""
        schedule = {key: value for key, value in self.as_dict().items() if key not in ("form", "d_qk", "cluster")}
        digest = hashlib.sha256(json.dumps(schedule, sort_keys=True).encode()).hexdigest()[:8]
        return f"{FAMILY}_{self.form}_d{self.d_qk}_c{self.cluster}_{digest}"

    def as_dict(self) -> dict[str, Any]:
        """For the bundle's manifest."""
        return asdict(self)


VARIANTS: tuple[Config, ...] = ()
CANDIDATES: tuple[Config, ...] = (Config(), Config(d_qk=512), Config("pages"), Config("pages", 512))
