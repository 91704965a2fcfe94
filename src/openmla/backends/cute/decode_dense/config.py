"""How the many-row dense decode kernel can be built, and which problems it takes. No DSL import.

The shared-memory plan (bytes, d_qk 576): ring 10 x 16,384 (a slot is 64 keys x 128 columns), RoPE 8,192, the five slices
of Q that are not held in registers 5 x 8,192, P 2 x 8,192, barriers and exchange below 2,048: 231,424 of 232,448.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from openmla.backends.base import Verdict, require
from openmla.core.problem import DecodeProblem
from openmla.core.target import Target

FAMILY = "decode_dense"
BLOCK_ROWS = 64  # query rows per CTA: one wgmma M
BLOCK_TOKENS = 64  # keys per tile, the unit of the plan
MIN_ROWS = 33  # fewer query rows per KV head belong to decode_dense_small
OVERHEAD_BLOCKS = 5  # of a piece: refilling the pipeline, epilogue, and its share of the merge
MERGE_BLOCKS = 10  # per 64 rows, of splitting at all: 18 at 128 rows, 32 at 256 (dd-5-15 and -21 against -19 and -25)
MAX_BATCH = 4096  # what the device plan keeps in shared memory
SLICE = 64  # columns of one 128-byte swizzled box
D_V = 512
SMEM_LIMIT = 232_448


@dataclass(frozen=True)
class Config:
    """One compiled variant.

    Attributes:
        dtype: of q, KV and out.
        heads: query heads per KV head; rows are (token, head), head fastest. Divides 64 or is a multiple of it.
        d_qk: 576, or 512 without RoPE columns.
        page_size: tokens per page, a multiple of 64.
        cluster: 2 shares KV loads between the CTAs of two row blocks by multicast: fewer L2 bytes, so less power. 4 is
            half as fast: not all clusters of 4 find room on 132 SMs at once.
        q_regs: 64-column slices of Q in the registers of the scores warpgroup, even. 2 leaves room for 9 slots only and
            costs 20 %.
        slots: ring slots of 64 keys x 128 columns; at least q_regs / 2 + 8, or two pieces wait for each other.
        exp_start: the wgmma of a tile's scores behind which the maximum of the tile before is found. 7 costs 3 to 9 %,
            1 is 1 % faster in cycles.
        exp_each: exponentials (of 32 per thread) behind each wgmma after that. 2 costs 1 to 4 %.
        gate_left, gate_right: the wgmma of a tile's scores after which the left and right half of the tile before may
            be multiplied; -1 when all are issued, -2 when all are complete. Both at -1: 10 % slower, both at -2: 8 %.
        prefetch: tiles ahead of the ring that are fetched into L2 where a tile has one reader; at most 16, 0 for none.
            15 % at one reader and 16,384 keys; with two readers they lose each other and HBM is read 1.5 times.
    """

    dtype: Literal["bf16", "fp16"] = "bf16"
    heads: int = 128
    d_qk: int = 576
    page_size: int = 64
    cluster: int = 2
    q_regs: int = 4
    slots: int = 10
    exp_start: int = 3
    exp_each: int = 4
    gate_left: int = -1
    gate_right: int = -2
    prefetch: int = 2

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
        return f"{FAMILY}_{self.dtype}_h{self.heads}_d{self.d_qk}_p{self.page_size}_c{self.cluster}_{digest}"

    def as_dict(self) -> dict[str, Any]:
        """For the bundle's manifest."""
        return asdict(self)


_PROBLEM_FIELDS = ("dtype", "heads", "d_qk", "page_size", "cluster")

VARIANTS: tuple[Config, ...] = (Config("bf16"), Config("fp16"))
"""What an ahead-of-time bundle holds: every variant that `supports` can lead to."""

CANDIDATES: tuple[Config, ...] = (
    Config("bf16", heads=64, cluster=1),
    Config("bf16", heads=64),
    Config("bf16", heads=32),
    Config("bf16", heads=16),
    Config("bf16", d_qk=512),
    Config("fp16", d_qk=512, cluster=1),
    Config("bf16", page_size=128),
)
"""Compile without spills, but were not run on a GPU; each joins VARIANTS with its first checked run."""


def heads_per_kv_head(problem: DecodeProblem) -> int:
    """Query heads that share a KV head."""
    return problem.h_q // problem.h_kv


def row_blocks(problem: DecodeProblem) -> int:
    """64-row blocks of one request and KV head."""
    return -(-problem.s_q * heads_per_kv_head(problem) // BLOCK_ROWS)


def supports(problem: DecodeProblem, target: Target) -> Verdict:
    """May this kernel run the problem here? Every reason against it."""
    heads = heads_per_kv_head(problem)
    rows = problem.s_q * heads
    return require(
        (target.arch == "sm_90a", f"needs sm_90a, the target is {target.arch}"),
        (
            not problem.layout.is_quantised and problem.dtype in (torch.bfloat16, torch.float16),
            f"reads bf16 and fp16 caches, this one is {problem.layout}",
        ),
        (problem.d_v == D_V, f"needs d_v {D_V}, got {problem.d_v}"),
        (rows >= MIN_ROWS, f"takes at least {MIN_ROWS} query rows per KV head (s_q * h_q / h_kv), got {rows}"),
        (heads == 128, f"takes h_q / h_kv = 128, got {heads}; other counts compile but have not been checked on a GPU"),
        (problem.d_qk == 576, f"takes d_qk 576, got {problem.d_qk}; its d_qk 512 has not been checked on a GPU"),
        (problem.page_size == BLOCK_TOKENS, f"needs a page size of {BLOCK_TOKENS}, got {problem.page_size}"),
        (1 <= problem.batch <= MAX_BATCH, f"takes a batch of 1 to {MAX_BATCH}, got {problem.batch}"),
        (
            row_blocks(problem) * problem.h_kv <= target.num_sms,
            f"needs an SM per 64 rows and KV head, got {row_blocks(problem)} x {problem.h_kv} on {target.num_sms} SMs",
        ),
        (not problem.is_varlen, "the merge of split requests has no cu_seqlens_q path yet"),
        (problem.window == 0, "has no sliding-window mask yet"),
        (not problem.has_sink, "has no attention sink yet"),
    )


def configs(problem: DecodeProblem, target: Target) -> tuple[Config, ...]:
    """The variant that runs the problem. Call only where `supports` is true."""
    dtype: Literal["bf16", "fp16"] = "bf16" if problem.dtype == torch.bfloat16 else "fp16"
    cluster = 2 if row_blocks(problem) % 2 == 0 else 1
    return (Config(dtype, heads_per_kv_head(problem), problem.d_qk, problem.page_size, cluster),)


def num_parts(problem: DecodeProblem, target: Target) -> int:
    """Parts of the plan: each takes row_blocks * h_kv CTAs, one per SM, and all are resident at once."""
    return max(target.num_sms // (row_blocks(problem) * problem.h_kv), 1)
