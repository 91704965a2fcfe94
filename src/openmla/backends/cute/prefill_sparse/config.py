"""How the gathering kernel over bf16 rows can be built, and which problems it takes. No DSL import.

The shared-memory plan (bytes, d_qk 576): ring 10 x 16,384 (a slot is 64 keys x 128 columns), RoPE 8,192, the five slices
of Q that are not held in registers 5 x 8,192, P 2 x 8,192, barriers and exchange below 2,048: 231,424 of 232,448. With
d_qk 512 there is no RoPE slice and one slice of Q less: 11 slots.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from openmla.backends.base import Verdict, require
from openmla.core.problem import SparseDecodeProblem, SparsePrefillProblem
from openmla.core.target import Target

FAMILY = "prefill_sparse"
ORDER_FAMILY = "prefill_sparse_order"
BLOCK_ROWS = 64  # query heads per CTA: one wgmma M
BLOCK_TOKENS = 64  # keys per tile
SLICE = 64  # columns of one 128-byte swizzled box
SLICE_BYTES = 64 * 128
D_V = 512
LONGEST = 2048  # entries of a list that can be ordered
MAX_ORDERED = 2**28  # bytes of a call's ordered lists, which are memory of their own: 32,768 tokens of 2,048
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
        q_regs: 64-column slices of Q in the registers of the scores warpgroup, even.
        gate_left, gate_right: the wgmma of a tile's scores after which the left and right half of the tile before may
            be multiplied; -1 when all are issued, -2 when all are complete.
        last_gate: when both halves of a token's last tile may be multiplied: when the scores of the next token are issued, or
            as soon as its probabilities are there. "left": the left half as soon as these are there, the right one then.
        q_late: whether Q for shared memory may be copied behind quarters of a token's first tile instead of before its keys. It
            has to wait until the last scores of the token before are complete; keys need not. Also makes the addresses of a
            tile's rows once.
        q_after: with `q_late`: behind how many quarters, 0 to 2.
        start: the reference of a token's first tile. "zero": scores times log2 e are taken as they are where their
            exponentials neither grow nor vanish; "careful": the largest is found first.
        fence: whether the readers of the ring order the copies of keys, which are generic writes, before the tensor cores'
            reads. "none" relies on what cp.async reports to the barrier having landed, and on wgmma.fence, as CUTLASS's
            mainloop for cp.async and FlashMLA do. "joint" keeps to the letter of PTX: a proxy fence behind the waits for
            units 0 and 1 (there P of the tile before is fenced anyway), for 2 and RoPE, and for 3; it costs 1 to 5 %.
        split: every list in pieces, one CTA turn each, whose partial results are fp32 and merged afterwards.
    """

    form: Literal["rows", "pages"] = "rows"
    d_qk: int = 576
    q_regs: int = 4
    gate_left: int = -1
    gate_right: int = -2
    fence: Literal["none", "joint"] = "none"
    last_gate: Literal["next", "left", "now"] = "next"
    q_late: bool = False
    q_after: int = 2
    start: Literal["careful", "zero"] = "careful"
    split: bool = False

    @property
    def slots(self) -> int:
        """Ring slots of 64 keys x 128 columns."""
        return 10 if self.d_qk == 576 else 11

    @property
    def gates(self) -> int:
        """Barriers of the gates: two halves, two tiles, and one that nobody waits for unless the next token opens all."""
        return 4 if self.last_gate == "next" else 5

    @property
    def spare(self) -> int:
        """The wgmma of a tile's scores after which a warp arrives at a barrier that nobody waits for; -1: none.

        Without it ptxas takes the ring's places out of the uniform registers and moves them back before every wgmma (265
        instructions from the first to the last of 36 instead of 214); with this arrival it leaves them there (log 22).
        """
        if self.form == "rows":
            return 19
        return -1 if not self.split else 23 if self.has_rope else 19

    @property
    def has_rope(self) -> bool:
        """Whether there is a ninth slice that is key but not value."""
        return self.d_qk == 576

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The units of a tile (-1: RoPE) in the order in which S reads them, by the waits and fences before them."""
        units = (0, 1, 2, -1, 3) if self.has_rope else (0, 1, 2, 3)
        return (units[:2], units[2:-1], units[-1:]) if self.fence == "joint" else tuple((unit,) for unit in units)

    @property
    def q_slices(self) -> int:
        """64-column slices of one query row."""
        return self.d_qk // SLICE

    @property
    def name(self) -> str:
        """Exported function name; the digest stands for the fields of the schedule."""
        schedule = {key: value for key, value in self.as_dict().items() if key not in ("form", "d_qk", "split")}
        digest = hashlib.sha256(json.dumps(schedule, sort_keys=True).encode()).hexdigest()[:8]
        return f"{FAMILY}_{self.form}{'_split' if self.split else ''}_d{self.d_qk}_{digest}"

    def as_dict(self) -> dict[str, Any]:
        """For the bundle's manifest."""
        return asdict(self)


def variant(form: Literal["rows", "pages"], d_qk: int) -> Config:
    """What ships for a form and a number of columns.

    Rows: the order of things between two tokens matters where lists are short (log 12 to 20 of the page: 2 to 9 % with 512
    columns, 0 to 3 % with 576); the left gate, log 26. Pages, one list of thousands per token: none of it.
    """
    if form == "pages":
        return Config(form, d_qk)
    if d_qk == 576:
        return Config(form, d_qk, gate_left=31, gate_right=-1, last_gate="now", q_late=True, q_after=0, start="zero")
    return Config(form, d_qk, gate_left=-1, gate_right=-1, last_gate="left", q_late=True, q_after=1, start="zero")


@dataclass(frozen=True)
class Order:
    """What puts lists in the order of their rows before they are gathered: one variant, see `order.py`."""

    name: str = ORDER_FAMILY

    def as_dict(self) -> dict[str, Any]:
        """Nothing to choose."""
        return asdict(self)


_ALL = (
    *(variant(form, d_qk) for form in ("rows", "pages") for d_qk in (576, 512)),
    *(replace(variant("pages", d_qk), split=True) for d_qk in (576, 512)),
)
CHECKED: tuple[Config, ...] = _ALL
"""Variants that passed `tests/gpu/prefill_sparse.py gate` on a GPU as they are compiled here; `supports` leads to no other."""

VARIANTS: tuple[Config, ...] = tuple(config for config in _ALL if config in CHECKED)
"""What an ahead-of-time bundle holds: every variant that `supports` can lead to."""

CANDIDATES: tuple[Config, ...] = tuple(config for config in _ALL if config not in CHECKED)
"""Compile without spills and compute the right thing when their PTX is run on a CPU, but were not run on a GPU."""

Problem = SparsePrefillProblem | SparseDecodeProblem


def tokens(problem: Problem) -> int:
    """Query tokens."""
    return problem.s_q if isinstance(problem, SparsePrefillProblem) else problem.total_q


def row_blocks(problem: Problem) -> int:
    """64-head blocks of one query token."""
    return -(-problem.h_q // BLOCK_ROWS)


def pieces(problem: Problem, target: Target) -> tuple[int, int]:
    """(pieces, keys of each) of every list of a sparse decode: several where its tokens would leave half of the SMs idle.

    As many as fill the SMs once, of two tiles at least: a tile less is about 2 us, a piece more is a row to merge.
    """
    ctas, tiles = tokens(problem) * row_blocks(problem), -(-problem.topk // BLOCK_TOKENS)
    if isinstance(problem, SparsePrefillProblem) or ctas >= target.num_sms // 2:
        return 1, tiles * BLOCK_TOKENS
    each = max(-(-tiles // max(target.num_sms // max(ctas, 1), 1)), min(2, tiles))
    return -(-tiles // each), each * BLOCK_TOKENS


def num_parts(problem: Problem, target: Target) -> int:
    """CTAs that share the tokens of a block of heads: one per SM, and none without a token."""
    return min(max(target.num_sms // row_blocks(problem), 1), tokens(problem) * pieces(problem, target)[0])


def is_ordered(problem: Problem, target: Target) -> bool:
    """Whether lists are put in the order of their rows first: where rows do not fit in the L2, a turn's tokens are followed
    by another's, and lists are long enough to be spread. Each block of heads is work beside the same bytes from memory, so
    with two of them rows have to take twice the L2 (log 30: 5 to 8 % there, else 0 to -1 %).
    """
    if not isinstance(problem, SparsePrefillProblem):
        return False
    is_wide = 0 < target.l2_bytes * row_blocks(problem) < problem.s_kv * problem.d_qk * 2
    has_turns = tokens(problem) > num_parts(problem, target)
    has_room = tokens(problem) * problem.topk * 4 <= MAX_ORDERED
    return is_wide and has_turns and has_room and 8 * BLOCK_TOKENS <= problem.topk <= LONGEST


def _variant(problem: Problem, target: Target) -> Config:
    if isinstance(problem, SparsePrefillProblem):
        return variant("rows", problem.d_qk)
    return replace(variant("pages", problem.d_qk), split=pieces(problem, target)[0] > 1)


def supports(problem: Problem, target: Target) -> Verdict:
    """May this kernel run the problem here? Every reason against it."""
    rows = problem.s_kv if isinstance(problem, SparsePrefillProblem) else problem.num_pages * problem.page_size
    size = max(rows, tokens(problem) * problem.h_q) * problem.d_qk * 2
    fits = problem.d_qk in (576, 512) and problem.d_v == D_V
    rules = [
        (target.arch == "sm_90a", f"needs sm_90a, the target is {target.arch}"),
        (problem.dtype == torch.bfloat16, f"takes bf16, got {problem.dtype}"),
        (fits, f"needs d_qk 576 or 512 and d_v {D_V}, got {problem.d_qk} and {problem.d_v}"),
        (not fits or _variant(problem, target) in CHECKED, "computes this, but has not been checked on a GPU"),
        (problem.h_kv == 1, f"reads one KV head, got {problem.h_kv}"),
        (tokens(problem) >= 1 and rows >= 1 and problem.topk >= 1, "needs at least one query token, row and index"),
        (size <= MAX_BYTES, f"takes tensors of up to {MAX_BYTES} bytes, got {size}"),
    ]
    if isinstance(problem, SparseDecodeProblem):
        rules += [
            (not problem.layout.is_quantised, f"reads bf16 caches, this one is {problem.layout}"),
            (problem.extra is None, "reads no second cache"),
        ]
    return require(*rules)


def configs(problem: Problem, target: Target) -> tuple[Config, ...]:
    """The variant that runs the problem. Call only where `supports` is true."""
    return (_variant(problem, target),)
