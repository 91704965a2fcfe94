"""How the few-row dense decode kernel can be built, and which problems it takes. No DSL import.

The shared-memory plan (bytes, bf16, 576 columns): a tile of 64 keys 73,728; Q 1,152 per row; P 128 per row; the exchange
of partial scores 256 per row; barriers, maxima and factors below 2,048. Two tiles and 32 rows are 198,656 of 232,448.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from openmla.backends.base import Verdict, require
from openmla.core.problem import DecodeProblem
from openmla.core.target import Target
from openmla.split.schedule import Policy

FAMILY = "decode_dense_small"
MAX_ROWS = 32  # query rows per KV head; more rows have no spill-free variant and belong to decode_dense
BOX = 8  # rows of one bulk load; pages hold a multiple of it
MAX_BATCH = 4096  # what the device plan keeps in shared memory
D_V = 512
SMEM_LIMIT = 232_448


@dataclass(frozen=True)
class Config:
    """One compiled variant.

    Attributes:
        dtype: of q, KV and out.
        rows: query rows per KV head, padded to 16 or 32: N of the matrix instructions.
        d_qk: 576, or 512 without RoPE columns.
        keys: keys per tile, the block of the plan.
        stages: tiles in the ring.
    """

    dtype: Literal["bf16", "fp16"] = "bf16"
    rows: int = 16
    d_qk: int = 576
    keys: int = 64
    stages: int = 2

    @property
    def name(self) -> str:
        """Exported function name; says every field."""
        return f"{FAMILY}_{self.dtype}_n{self.rows}_d{self.d_qk}_k{self.keys}_s{self.stages}"

    def as_dict(self) -> dict[str, Any]:
        """For the bundle's manifest."""
        return asdict(self)


VARIANTS: tuple[Config, ...] = tuple(
    Config(dtype, rows, d_qk, keys, stages)
    for dtype in ("bf16", "fp16")
    for rows in (16, 32)
    for d_qk in (576, 512)
    for keys, stages in ((64, 2), (32, 4))
)


def rows_per_kv_head(problem: DecodeProblem) -> int:
    """Query rows that attend to one KV head of one request."""
    return problem.s_q * (problem.h_q // problem.h_kv)


def supports(problem: DecodeProblem, target: Target) -> Verdict:
    """May this kernel run the problem here? Every reason against it."""
    rows = rows_per_kv_head(problem)
    return require(
        (target.arch == "sm_90a", f"needs sm_90a, the target is {target.arch}"),
        (
            not problem.layout.is_quantised and problem.dtype in (torch.bfloat16, torch.float16),
            f"reads bf16 and fp16 caches, this one is {problem.layout}",
        ),
        (problem.d_qk in (576, 512), f"needs d_qk 576 or 512, got {problem.d_qk}"),
        (problem.d_v == D_V, f"needs d_v {D_V}, got {problem.d_v}"),
        (1 <= rows <= MAX_ROWS, f"takes up to {MAX_ROWS} query rows per KV head (s_q * h_q / h_kv), got {rows}"),
        (problem.page_size % BOX == 0, f"needs a page size that is a multiple of {BOX}, got {problem.page_size}"),
        (1 <= problem.batch <= MAX_BATCH, f"takes a batch of 1 to {MAX_BATCH}, got {problem.batch}"),
        (problem.h_kv <= target.num_sms, f"needs an SM per KV head, got h_kv={problem.h_kv} on {target.num_sms} SMs"),
        (not problem.is_varlen, "has no cu_seqlens_q path yet"),
        (problem.window == 0, "has no sliding-window mask yet"),
    )


def configs(problem: DecodeProblem, target: Target) -> tuple[Config, ...]:
    """Variants that can run the problem, best first. Call only where `supports` is true."""
    dtype: Literal["bf16", "fp16"] = "bf16" if problem.dtype == torch.bfloat16 else "fp16"
    rows = 16 if rows_per_kv_head(problem) <= 16 else 32
    whole = Config(dtype, rows, problem.d_qk)
    half = Config(dtype, rows, problem.d_qk, keys=32, stages=4)
    return (whole, half)


def num_parts(problem: DecodeProblem, target: Target) -> int:
    """Parts of the plan: CTAs per KV head. One CTA occupies an SM, and all must be resident at once."""
    return max(target.num_sms // problem.h_kv, 1)


@dataclass(frozen=True)
class Workspace:
    """Shapes of the fp32 partials and of the int32 counters; fixed for a problem, so that a CUDA graph can hold them."""

    out_accum: tuple[int, int]
    lse_accum: tuple[int, int]
    counters: tuple[int, int, int]


def workspace(problem: DecodeProblem, config: Config, parts: int, policy: Policy, chunk_tokens: int) -> Workspace:
    """What `launch` needs beside inputs and outputs. Counters start at zero and return to zero."""
    capacity = problem.max_pages * problem.page_size
    slots = problem.batch + parts
    if policy == "batch_invariant":
        slots = problem.batch * max(-(-capacity // chunk_tokens), 1)
    rows = problem.h_kv * config.rows
    return Workspace((slots, rows * D_V), (slots, rows * 2), (2, problem.batch * problem.h_kv, 1))
