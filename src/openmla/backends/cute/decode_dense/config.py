"""How the many-row dense decode kernel can be built, and which problems it takes. No DSL import.

The shared-memory plan (bytes, d_qk 576): ring 10 x 16,384 (a slot is 64 keys x 128 columns), RoPE 8,192, the five slices
of Q that are not held in registers 5 x 8,192, P 2 x 8,192, barriers and exchange below 2,048: 231,424 of 232,448. With
11 slots and three such slices the same.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import torch

from openmla.backends.base import Verdict, require
from openmla.backends.cute.inline import inlined, soft_cap_of
from openmla.core.problem import DecodeProblem
from openmla.core.target import Target
from openmla.mods import Mod

FAMILY, MERGE_FAMILY = "decode_dense", "decode_dense_merge"
BLOCK_ROWS = 64  # query rows per CTA: one wgmma M
BLOCK_TOKENS = 64  # keys per tile, the unit of the plan
OVERHEAD_BLOCKS = 9  # of a piece: refill, epilogue, share of the merge; against 5, 8 and 12: log 36
MERGE_BLOCKS = 10  # per 64 rows, of splitting at all: measured 22 at 128 rows, 39 at 256 (dd-5-15, -19, -21, -25)
MIN_SHARE_BLOCKS = 2  # of a part: 64 pieces of one tile take 19.7 us where 32 of two take 18.4 (log 49)
MAX_BATCH = 4096  # what the device plan keeps in shared memory
SLICE = 64  # columns of one 128-byte swizzled box
D_V = 512
SMEM_LIMIT = 232_448
# Caps whose probabilities need no reference of a row, see `soft_cap`: above, bf16 does not hold those of the lowest scores;
# below, these are not small enough to be left to a polynomial.
LEAST_CAP, MOST_CAP = 20.0, 50.0


@dataclass(frozen=True)
class Config:
    """One compiled variant.

    Attributes:
        dtype: of q, KV and out.
        d_qk: 576, or 512 without RoPE columns.
        page_size: 64 for pages of exactly 64 tokens, which spares all arithmetic of places in pages; 0 for any multiple
            of box_rows.
        box_rows: keys of one bulk load: 64, 16, or 1 for pages of any size (576 loads per tile).
        cluster: 2 shares KV loads between the CTAs of two row blocks by multicast: fewer L2 bytes, so less power. 4 is
            half as fast: not all clusters of 4 find room on 132 SMs at once.
        q_regs: 64-column slices of Q in the registers of the scores warpgroup, even. 2 leaves room for 9 slots only and
            costs 20 %; 6, with room for 11, is the schedule of `two_clusters`.
        slots: ring slots of 64 keys x 128 columns; at least q_regs / 2 + 8, or two pieces wait for each other.
        gate_left, gate_right: the wgmma of a tile's scores after which the left and right half of the tile before may
            be multiplied; -1 when all are issued, -2 when all are complete.
        prefetch: tiles ahead of the ring that are fetched into L2 where a tile has one reader; at most 16, 0 for none.
            15 % at one reader and 16,384 keys; with two readers they lose each other and HBM is read 1.5 times. Two loaders
            fetch one ahead at most.
        prefetch_from: the first of a tile's quarters that is fetched ahead; RoPE always is.
        loaders: warps that load keys: 2 for the schedule of `two_loaders`, 5 % faster, which knows of mods the soft cap in its
            own form alone, and no exchange: with those it is 1.
        is_halved: partials that the kernel merges are fp16 (`shares`), of bf16 results with one cluster. 2 to 10 % faster
            where much is merged; up to 1.7 % slower where requests stay whole, though they do not run its code (log 63).
        is_exchanged: the kernel ends by exchanging its rows with other ranks (`exchange.py`).
        mods: functions called for each score, every score_mod before every mask_mod.
    """

    dtype: Literal["bf16", "fp16"] = "bf16"
    d_qk: int = 576
    page_size: int = 64
    box_rows: int = 64
    cluster: int = 2
    q_regs: int = 4
    slots: int = 10
    gate_left: int = -1
    gate_right: int = -2
    prefetch: int = 2
    prefetch_from: int = 0
    loaders: int = 1
    is_halved: bool = False
    is_exchanged: bool = False
    mods: tuple[Mod, ...] = ()

    def __post_init__(self) -> None:
        if (self.mods and self.cap is None) or self.is_exchanged:
            object.__setattr__(self, "loaders", 1)
        if self.mods or self.is_exchanged:  # their registers have no room for a third of Q more
            object.__setattr__(self, "q_regs", 4)
            object.__setattr__(self, "slots", 10)
            object.__setattr__(self, "is_halved", False)

    @property
    def score_mods(self) -> tuple[Mod, ...]:
        """Those that change scores, which are in natural units for them."""
        return tuple(each for each in self.mods if each.kind == "score_mod")

    @property
    def mask_mods(self) -> tuple[Mod, ...]:
        """Those that hide keys."""
        return tuple(each for each in self.mods if each.kind == "mask_mod")

    @property
    def cap(self) -> tuple[float, float] | None:
        """(a, b) where the one mod is a * tanh(b * score), which has a form of its own; see `soft_cap`."""
        found = soft_cap_of(self.mods[0]) if len(self.mods) == 1 and self.dtype == "bf16" else None
        return found if found and LEAST_CAP <= found[0] <= MOST_CAP and found[1] > 0 else None

    @property
    def opens_late(self) -> bool:
        """Whether the right gate opens between the probabilities of a soft cap; see `soft_cap`."""
        return self.cap is not None and self.loaders == 2

    @property
    def boxes(self) -> int:
        """Bulk loads per 64 keys x 64 columns."""
        return BLOCK_TOKENS // self.box_rows

    @property
    def lookup(self) -> int:
        """Tiles whose page ids the lanes of a warp read at once."""
        return 16 if self.boxes == 1 else max(32 // self.boxes, 1)

    @property
    def look_ahead(self) -> int:
        """Tiles of prefetching: 0 where a tile's page ids are not known that early."""
        return self.prefetch if self.boxes == 1 else 0

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
        schedule = {key: value for key, value in self.as_dict().items() if key not in _PROBLEM_FIELDS}
        digest = hashlib.sha256(json.dumps(schedule, sort_keys=True).encode()).hexdigest()[:8]
        pages = str(self.page_size) if self.page_size else f"{self.box_rows}n"
        plain = f"{FAMILY}_{self.dtype}_d{self.d_qk}_p{pages}_c{self.cluster}_{digest}"
        prints = "/".join(each.fingerprint for each in self.mods)
        return f"{plain}_mods_{hashlib.sha256(prints.encode()).hexdigest()[:12]}" if self.mods else plain

    def as_dict(self) -> dict[str, Any]:
        """For the bundle's manifest; mods by name and fingerprint."""
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        return found | {"mods": [f"{each}#{each.fingerprint}" for each in self.mods]}


_PROBLEM_FIELDS = ("dtype", "d_qk", "page_size", "box_rows", "cluster", "mods")


def variant(
    dtype: Literal["bf16", "fp16"], d_qk: int, page_size: int, box_rows: int, cluster: int, readers: int = 1
) -> Config:
    """The schedule for a kind of problem. Prefetching one block of 64 rows costs 4 % (dd-10-27, -29).

    `readers`: clusters of two that read the same keys. Several are bound by the tensor cores, and 11 slots are 1 to 6 %
    faster; one is 1 % slower with them (log 62).
    """
    q_regs, slots = (6, 11) if cluster == 2 and readers > 1 else (4, 10)
    prefetch = 2 if cluster == 2 else 0
    return Config(dtype, d_qk, page_size, box_rows, cluster, q_regs, slots, prefetch=prefetch, loaders=cluster)


PAGES: tuple[tuple[int, int, int], ...] = ((64, 64, 2), (64, 64, 1), (0, 64, 2), (0, 64, 1), (0, 16, 1), (0, 1, 1))
"""page_size, box_rows, cluster: any page size has its variant, small boxes without a cluster only."""

DTYPES: tuple[Literal["bf16", "fp16"], ...] = ("bf16", "fp16")

SHARED: tuple[tuple[int, int, int], ...] = ((64, 64, 2), (0, 64, 2))
"""Those that have a variant for keys that several clusters read."""

VARIANTS: tuple[Config, ...] = tuple(
    variant(dtype, d_qk, *page, readers)
    for dtype in DTYPES
    for d_qk in (576, 512)
    for readers, pages in ((1, PAGES), (2, SHARED))
    for page in pages
) + tuple(replace(variant("bf16", d_qk, *page), is_halved=True) for d_qk in (576, 512) for page in PAGES)
"""What an ahead-of-time bundle holds: every variant that `supports` can lead to."""

EXCHANGED: tuple[Config, ...] = tuple(replace(variant("bf16", 576, 64, 64, n), is_exchanged=True) for n in (2, 1))
"""And those that end by exchanging rows with other ranks."""

EXCHANGED_ROWS = 1024  # a row for each of the 8 value warps of 128 and more CTAs; further ones would wait for them


@dataclass(frozen=True)
class MergeConfig:
    """One compiled variant of the merge.

    Attributes:
        dtype: of out.
        columns: of 64 rows that a CTA takes.
        groups: teams of 128 threads that share the pieces of a CTA.
    """

    dtype: Literal["bf16", "fp16"] = "bf16"
    columns: int = 128
    groups: int = 1

    @property
    def name(self) -> str:
        """Exported function name."""
        return f"{FAMILY}_merge_{self.dtype}_{self.columns}_{self.groups}"

    def as_dict(self) -> dict[str, Any]:
        """For the bundle's manifest."""
        return asdict(self)


MERGE_VARIANTS: tuple[MergeConfig, ...] = tuple(
    MergeConfig(dtype, columns, groups) for dtype in DTYPES for columns, groups in ((8, 4), (32, 1), (128, 1))
)


def heads_per_kv_head(problem: DecodeProblem) -> int:
    """Query heads that share a KV head."""
    return problem.h_q // problem.h_kv


def row_blocks(problem: DecodeProblem) -> int:
    """64-row blocks of one request and KV head."""
    return max(-(-problem.s_q * heads_per_kv_head(problem) // BLOCK_ROWS), 1)


def chunk_tokens(problem: DecodeProblem) -> int:
    """Piece length of batch_invariant: 128 tokens per head, at least 4096.

    Longer pieces leave less to merge, shorter ones even out better: 16384 at 128 heads costs 2 to 4 % (log 41), and a lone
    request runs on fewer parts the longer they are.
    It depends on the heads alone: batch mates can change the number of query tokens that a call counts with.
    """
    return max(-(-128 * heads_per_kv_head(problem) // 512) * 512, 4096)


def supports(problem: DecodeProblem, target: Target) -> Verdict:
    """May this kernel run the problem here? Every reason against it."""
    return require(
        (target.arch == "sm_90a", f"needs sm_90a, the target is {target.arch}"),
        (
            not problem.layout.is_quantised and problem.dtype in (torch.bfloat16, torch.float16),
            f"reads bf16 and fp16 caches, this one is {problem.layout}",
        ),
        (problem.d_qk in (576, 512), f"needs d_qk 576 or 512, got {problem.d_qk}"),
        (problem.d_v == D_V, f"needs d_v {D_V}, got {problem.d_v}"),
        (1 <= problem.batch <= MAX_BATCH, f"takes a batch of 1 to {MAX_BATCH}, got {problem.batch}"),
        (problem.total_q >= 1, "needs at least one query token"),
        (
            row_blocks(problem) * problem.h_kv <= target.num_sms,
            f"needs an SM per 64 rows and KV head, got {row_blocks(problem)} x {problem.h_kv} on {target.num_sms} SMs",
        ),
    )


def configs(problem: DecodeProblem, target: Target) -> tuple[Config, ...]:
    """The variant that runs the problem. Call only where `supports` is true."""
    dtype: Literal["bf16", "fp16"] = "bf16" if problem.dtype == torch.bfloat16 else "fp16"
    page_size = 64 if problem.page_size == 64 else 0
    box_rows = next(rows for rows in (64, 16, 1) if problem.page_size % rows == 0)
    cluster = 2 if row_blocks(problem) % 2 == 0 and box_rows == 64 else 1
    plain = variant(dtype, problem.d_qk, page_size, box_rows, cluster, row_blocks(problem) // cluster)
    # fp16 rounds its results no more coarsely than halves would; several clusters of two merge little
    is_halved = dtype == "bf16" and plain.slots == 10 and merges_much(problem, target)
    return (replace(plain, is_halved=is_halved, mods=inlined(problem.mods)),)


def merges_much(problem: DecodeProblem, target: Target) -> bool:
    """Whether pieces are many enough for partials in half the bytes: fewer requests than half of the parts.

    32 requests of 4096 keys with 66 parts gain 1 %, 64 lose 1 % (log 63). The launch that merges for batch_invariant reads
    fp32.
    """
    return not problem.is_batch_invariant and 2 * problem.batch < num_parts(problem, target)


def merge_config(problem: DecodeProblem) -> MergeConfig:
    """The merge of the problem: few columns per CTA where many would leave SMs idle (dd-10-17 to -19: 58, 69, 74 us).

    Several teams add the pieces up in another order than one, so the choice may not depend on the batch where the bits may
    not.
    """
    dtype: Literal["bf16", "fp16"] = "bf16" if problem.dtype == torch.bfloat16 else "fp16"
    blocks = problem.batch * problem.h_kv * row_blocks(problem)
    if problem.is_batch_invariant:
        return MergeConfig(dtype, 32)
    if blocks <= 8:
        return MergeConfig(dtype, 8, 4)
    return MergeConfig(dtype, 32 if blocks <= 64 else 128)


def num_parts(problem: DecodeProblem, target: Target) -> int:
    """Parts of the plan: each takes row_blocks * h_kv CTAs, one per SM, and all are resident at once."""
    return max(target.num_sms // (row_blocks(problem) * problem.h_kv), 1)
