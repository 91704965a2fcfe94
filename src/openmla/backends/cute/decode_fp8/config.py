"""How the dense FP8 decode kernel can be built, and which problems it takes. No DSL import.

The shared-memory plan (bytes): ring 4 x 40,960 (a slot is 64 keys x 640 columns of 1 byte, 64 of them zeros), Q 40,960, P
2 x 8,192, barriers and exchange below 2,048: 223,232 of 232,448.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal

from openmla.backends.base import Verdict, require
from openmla.backends.cute.decode_dense import config as dense
from openmla.core.problem import CODES, DecodeProblem
from openmla.core.target import Target
from openmla.mods import Mod

FAMILY = "decode_fp8"
LAYOUT = "fp8_576"
COLUMNS = 128  # of one swizzled box: 128 bytes
BOXES = 5  # per row of 576: the last is half zeros
BOX_BYTES = dense.BLOCK_TOKENS * COLUMNS
SLOT_BYTES = BOXES * BOX_BYTES


@dataclass(frozen=True)
class Config:
    """One compiled variant.

    Attributes:
        page_size: 64 for pages of exactly 64 tokens; 0 for any multiple of box_rows.
        box_rows: keys of one bulk load: 64, 16, or 1 for pages of any size.
        cluster: 2 shares KV loads between the CTAs of two row blocks by multicast.
        rows: query rows of a block that P V multiplies: 64, or 16 and 32 where a request has no more.
        slots: tiles in the ring.
        terms: e4m3 numbers that a probability is written as: 1, or 2 (the second is what the first leaves over).
    """

    page_size: int = 64
    box_rows: int = 64
    cluster: int = 2
    rows: int = 64
    slots: int = 4
    terms: Literal[1, 2] = 2

    # what the roles inherited from decode_dense ask for
    d_qk, dtype, has_rope, look_ahead = 576, "bf16", True, 0
    mods: ClassVar[tuple[Mod, ...]] = ()

    @property
    def boxes(self) -> int:
        """Bulk loads per 64 keys x 128 columns."""
        return dense.BLOCK_TOKENS // self.box_rows

    @property
    def lookup(self) -> int:
        """Tiles whose page ids the lanes of a warp read at once."""
        return 16 if self.boxes == 1 else max(32 // self.boxes, 1)

    @property
    def name(self) -> str:
        """Exported function name; says every field."""
        pages = str(self.page_size) if self.page_size else f"{self.box_rows}n"
        return f"{FAMILY}_p{pages}_c{self.cluster}_n{self.rows}_s{self.slots}_t{self.terms}"

    def as_dict(self) -> dict[str, Any]:
        """For the bundle's manifest."""
        return asdict(self)


FEW_ROWS = (16, 32)
GROUPS, GROUPED_HEADS = 4, (64, 128)
MAX_GROUPED_TOKENS = 16384  # of all requests; more were not timed
VARIANTS: tuple[Config, ...] = (
    *(Config(*pages) for pages in dense.PAGES),
    *(Config(cluster=1, rows=rows) for rows in FEW_ROWS),
)
"""What an ahead-of-time bundle holds: every variant that `supports` can lead to."""


def is_grouped(problem: DecodeProblem) -> bool:
    """Whether many rows over few keys are better off as GROUPS groups that read the same keys (log 6).

    Fewer pieces of fewer rows leave less to merge: one request of 4,096 tokens and 128 heads takes 13.9 us instead of
    20.3. One query token per request, whose rows need no other order.
    """
    heads = dense.heads_per_kv_head(problem)
    return (
        heads in GROUPED_HEADS
        and problem.batch * problem.max_pages * problem.page_size <= MAX_GROUPED_TOKENS
        and problem.page_size == 64
        and (problem.s_q, problem.h_kv) == (1, 1)
        and not (problem.is_varlen or problem.is_batch_invariant)  # bits may not depend on the batch there
    )


def grouped(problem: DecodeProblem, config: Config) -> DecodeProblem:
    """The problem as a variant sees it: each group of rows is a KV head (of a cache expanded with a stride of 0).

    The variant says it, not the problem: a variant is tried on smaller problems than it was chosen for.
    """
    heads = dense.heads_per_kv_head(problem)
    if config.rows == 64 or problem.s_q * heads <= config.rows:
        return problem
    return replace(problem, h_kv=heads // config.rows)


def supports(problem: DecodeProblem, target: Target) -> Verdict:
    """May this kernel run the problem here? Every reason against it."""
    blocks = dense.row_blocks(problem)
    return require(
        (target.arch == "sm_90a", f"needs sm_90a, the target is {target.arch}"),
        (
            problem.layout.name == LAYOUT and problem.dtype == CODES,
            f"multiplies codes: {LAYOUT} with q in e4m3, this is {problem.layout} with q in "
            f"{str(problem.dtype).removeprefix('torch.')}",
        ),
        (1 <= problem.batch <= dense.MAX_BATCH, f"takes a batch of 1 to {dense.MAX_BATCH}, got {problem.batch}"),
        (problem.total_q >= 1, "needs at least one query token"),
        (
            blocks * problem.h_kv <= target.num_sms,
            f"needs an SM per 64 rows and KV head, got {blocks} x {problem.h_kv} on {target.num_sms} SMs",
        ),
    )


def configs(problem: DecodeProblem, target: Target) -> tuple[Config, ...]:
    """The variant that runs the problem. Call only where `supports` is true."""
    page_size = 64 if problem.page_size == 64 else 0
    box_rows = next(rows for rows in (64, 16, 1) if problem.page_size % rows == 0)
    cluster = 2 if dense.row_blocks(problem) % 2 == 0 and box_rows == 64 else 1
    count = problem.s_q * dense.heads_per_kv_head(problem)
    if is_grouped(problem):
        return (Config(cluster=1, rows=count // GROUPS),)
    rows = next((few for few in FEW_ROWS if count <= few and page_size == 64), 64)
    return (Config(page_size, box_rows, cluster, rows),)
