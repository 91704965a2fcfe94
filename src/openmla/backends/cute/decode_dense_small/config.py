"""How the few-row dense decode kernel can be built, and which problems it takes. No DSL import.

The shared-memory plan (bytes, 576 columns): a tile of 64 keys 73,728; Q 1,152 per row; P 128 per row; the exchange of
partial scores 256 per row; barriers, maxima and factors below 2,048. Two tiles and 32 rows are 197,632 of 232,448; with 64
rows, which exchange nothing, 231,424. With 512 columns a third tile fits beside 16 rows. Of fp8_656 a tile is 41,984, P lies there four times, and four warpgroups
exchange three times as much: 115,712 with 16 rows and two tiles, twice on an SM; 199,680 with four; 204,800 with 32
rows and three.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch

from openmla.backends.base import Verdict, require
from openmla.core.errors import ProblemError
from openmla.core.layout import kv_layout
from openmla.core.problem import DecodeProblem, SparseDecodeProblem
from openmla.core.target import Target
from openmla.split.schedule import MARGIN, Policy, SplitPlan, plan_decode, ranges_needed

FAMILY = "decode_dense_small"
MAX_ROWS = 32  # query rows per KV head; more belong to decode_dense, but for
MAX_WIDE_ROWS = 64  # of so many and so long requests: see `is_wide`
WIDE_BATCH, WIDE_TOKENS, WIDE_OVERHEAD_BLOCKS = 128, 24576, 3
WIDE_CACHE = (12288, 24576)  # tokens of the whole cache per request, at least and at most
WIDE_GBPS = 4000  # memory rate from which 64 rows belong to decode_dense: 772 us here on an H200, whose peer takes 589
WIDE_MARGIN = 20  # thousandths of an even share: 857.6 us at batch 128, 75 cost 893.1 (log 59 of decode_dense)
WIDE_PARTIALS = 20  # partials of 64 rows that cost as much as a tile of every part
GROUP_ROWS = 16
MAX_GROUPED_ROWS = 128
MAX_GROUPED_TOKENS = 8192  # of all requests
MAX_PAIRED_TOKENS = 12288  # with 128 rows: 2 x 6144 take 20.0 instead of 21.7 us, 4 x 4096 24.0 instead of 23.4
WHOLE_BATCH, MAX_WHOLE_TOKENS = 16, 16384  # nor where a part has whole requests: 16 x 1024 take 21.6 instead of 23.5 us
PAIRED_TILES = 4  # of a part: with 4 a pair saves 5 %, with 2 it costs 7 %
BOX = 8  # rows of one bulk load; pages that hold no multiple of it are loaded row by row
PART_STEP = 16  # parts come in multiples of it: see num_parts
BLOCK_TOKENS = 64  # of a plan: one tile. Finer blocks (8 to 32 tokens) run and are 1 % slower: partial tiles
CHUNK_TOKENS = 8192  # piece length of batch_invariant: 4096 costs 8 instead of 3 % with 32 rows (log 19)
OVERHEAD_BLOCKS = 1  # what a piece costs beside its tiles: filling the ring is hidden, epilogue and merge are not
MAX_PIECES = 1024  # of one request: shares of a merge are exact in fp32 up to there
MAX_BATCH = 4096  # what the device plan keeps in shared memory
D_V = 512
SMEM_LIMIT = 232_448
UNWRITTEN = -1  # what every word of a new exchange holds
NO_WINDOW = 1 << 30  # the window of a problem without one
CODES = ("fp8_656", "fp8_528")  # byte layouts that it reads: 512 e4m3 codes, four fp32 scales, RoPE or none
LOADERS = 4  # loading warps where index lists name rows
MAX_GATHERED_BYTES = (
    2**36 - 16
)  # rows lie a 32-bit count of 16 bytes behind the cache's start; the last one means "no row"
CODE_STAGES = {16: 2, 32: 3}  # rows -> tiles of 41,984 bytes. With 16 rows two CTAs share an SM
MANY_TILES = 12  # per CTA over index lists
LONE_STAGES = 4  # of 16 rows, where a CTA has its SM for itself
MAX_LONE_TOKENS = (
    131072  # of all requests: 43.1 instead of 49.0 us there at batch 1, 524,288 are faster or equal with two
)


@dataclass(frozen=True)
class Config:
    """One compiled variant.

    Attributes:
        dtype: of q, KV and out.
        rows: query rows per KV head, padded to 16, 32 or 64: N of the matrix instructions.
        d_qk: 576, or 512 without RoPE columns.
        stages: tiles of 64 keys in the ring.
        layout: of the cache: elements of dtype, or a byte layout of CODES.
        gathers: index lists name each row, for every query token; else a request's keys lie in pages.
        pairs: clusters of two CTAs for two groups of `rows` rows (see `is_paired`).
    """

    dtype: Literal["bf16", "fp16"] = "bf16"
    rows: int = 16
    d_qk: int = 576
    stages: int = 2
    layout: str = "plain"
    gathers: bool = False
    pairs: bool = False

    @property
    def name(self) -> str:
        """Exported function name; says every field."""
        name = f"{FAMILY}_{self.dtype}_n{self.rows}_d{self.d_qk}_s{self.stages}"
        name = name if self.layout == "plain" else f"{name}_{self.layout}"
        name = f"{name}_pairs" if self.pairs else name
        return f"{name}_gathered" if self.gathers else name

    @property
    def row_bytes(self) -> int:
        """Of a token of a byte layout; 0 for plain elements."""
        return kv_layout(self.layout).bytes_per_token if self.layout in CODES else 0

    @property
    def is_halved(self) -> bool:
        """Partials are fp16 with powers of two: where their rounding is small beside that of the result."""
        return self.dtype == "bf16"

    @property
    def words_per_row(self) -> int:
        """Of a piece of the exchange."""
        return words_per_row(self.is_halved, self.warpgroups)

    @property
    def warpgroups(self) -> int:
        """That share a tile. Codes need more warps, for conversion waits: with 32 rows four."""
        return 4 if self.layout in CODES and self.rows == 32 else 2

    @property
    def ctas_per_sm(self) -> int:
        """CTAs that an SM holds at once: two of codes with two tiles each, where there is work for both."""
        return 2 if self.layout in CODES and self.stages == 2 else 1

    @property
    def threads(self) -> int:
        """Of a CTA: the warpgroups and the loading warp, or four."""
        return 128 * self.warpgroups + (32 * LOADERS if self.gathers or self.rows == 64 else 32)

    def as_dict(self) -> dict[str, Any]:
        """For the bundle's manifest."""
        return asdict(self)


def _stages(rows: int, d_qk: int) -> int:
    """As many tiles as fit, two or three."""
    return 3 if d_qk == 512 and rows == 16 else 2


VARIANTS: tuple[Config, ...] = tuple(
    Config(dtype, rows, d_qk, _stages(rows, d_qk))
    for dtype in ("bf16", "fp16")
    for rows in (16, 32, 64)
    for d_qk in (576, 512)
)
VARIANTS += tuple(Config(dtype, GROUP_ROWS, d_qk, pairs=True) for dtype in ("bf16", "fp16") for d_qk in (576, 512))
VARIANTS += tuple(
    Config("bf16", rows, kv_layout(layout).d_qk, stages, layout)
    for layout in CODES
    for rows, stages in (*CODE_STAGES.items(), (16, LONE_STAGES))
)
VARIANTS += tuple(Config("bf16", 16, kv_layout(layout).d_qk, LONE_STAGES, layout, gathers=True) for layout in CODES)


def rows_per_kv_head(problem: DecodeProblem) -> int:
    """Query rows that attend to one KV head of one request."""
    return problem.s_q * (problem.h_q // problem.h_kv)


def grouped(problem: DecodeProblem) -> DecodeProblem:
    """The problem as the kernel sees it: many rows over few keys become groups of 16 rows that read the same keys.

    Each group is a KV head of its own to the kernel (the cache is expanded with a stride of 0). 128 rows then read the
    keys eight times, from the L2 all but once, pairs four times; one request of 4096 tokens takes 13.6 and 12.9 us so
    (log 27), 22.1 in the kernel for many rows where groups took 14.7 (log 9).
    """
    rows, heads = rows_per_kv_head(problem), problem.h_q // problem.h_kv
    is_short = problem.batch * problem.max_pages * problem.page_size <= _max_grouped_tokens(problem)
    groups = rows // GROUP_ROWS
    if not MAX_ROWS < rows <= MAX_GROUPED_ROWS or problem.h_kv != 1 or not is_short or problem.is_batch_invariant:
        return problem  # which kernel runs may not depend on the batch where the bits may not
    if rows % GROUP_ROWS or heads % groups:
        return problem
    return replace(problem, h_kv=groups)


def _max_grouped_tokens(problem: DecodeProblem) -> int:
    """Up to where groups win: pairs of them read the keys half as often (log 27)."""
    if rows_per_kv_head(problem) < MAX_GROUPED_ROWS or problem.layout.is_quantised:
        return MAX_GROUPED_TOKENS
    return MAX_WHOLE_TOKENS if problem.batch >= WHOLE_BATCH else MAX_PAIRED_TOKENS


def is_paired(problem: DecodeProblem, target: Target) -> bool:
    """Whether two groups share the tiles of a part, each CTA every second one for both: where a part has some."""
    groups = grouped(problem).h_kv
    parts = _even(max(target.num_sms // groups, 1))
    return (
        groups != problem.h_kv
        and groups % 2 == 0
        and not problem.layout.is_quantised
        and problem.batch * problem.max_pages * problem.page_size >= PAIRED_TILES * parts * BLOCK_TOKENS
    )


def is_wide(problem: DecodeProblem, target: Target) -> bool:
    """Whether 33 to 64 rows are better off here than with decode_dense, which has them in one block.

    They are for lengths that vary around 16384, batch 128: 851 instead of 874 us. Equal lengths are level (820), 4096, 8192
    and 32768 are 5, 3 and 1 to 2 % slower (log 61 of decode_dense). Lengths are not known here; the table's width says how
    long one can be, and what the cache holds per request how long they can be on average (where none share pages). With the
    4,800 GB/s of an H200 this kernel's own work binds, not the keys.
    Which kernel runs may not depend on the batch where the bits may not.
    """
    least, most = (problem.batch * each for each in WIDE_CACHE)
    return (
        MAX_ROWS < rows_per_kv_head(problem) <= MAX_WIDE_ROWS
        and 0 < target.hbm_gbps < WIDE_GBPS
        and problem.batch * problem.h_kv >= WIDE_BATCH
        and problem.max_pages * problem.page_size >= WIDE_TOKENS
        and least <= problem.num_pages * problem.page_size <= most
        and problem.page_size % BOX == 0
        and not (problem.layout.is_quantised or problem.window or problem.is_batch_invariant)
    )


def supports(problem: DecodeProblem, target: Target) -> Verdict:
    """May this kernel run the problem here? Every reason against it."""
    problem = grouped(problem)
    rows = rows_per_kv_head(problem)
    return require(
        (target.arch == "sm_90a", f"needs sm_90a, the target is {target.arch}"),
        (
            problem.dtype in (torch.bfloat16, torch.float16)
            if not problem.layout.is_quantised
            else problem.dtype == torch.bfloat16 and problem.layout.name in CODES,
            f"reads bf16 and fp16 caches, and {' and '.join(CODES)} with q in bf16; this is {problem.layout} with q in "
            f"{str(problem.dtype).removeprefix('torch.')}",
        ),
        (problem.d_qk in (576, 512), f"needs d_qk 576 or 512, got {problem.d_qk}"),
        (problem.d_v == D_V, f"needs d_v {D_V}, got {problem.d_v}"),
        (
            1 <= rows <= MAX_ROWS or is_wide(problem, target),
            f"takes up to {MAX_ROWS} query rows per KV head (s_q * h_q / h_kv), got {rows} (multiples of {GROUP_ROWS} "
            f"also where batch * max_pages * page_size <= {_max_grouped_tokens(problem)} and h_kv = 1; up to {MAX_WIDE_ROWS} of "
            f"{WIDE_BATCH} and more requests in tables of {WIDE_TOKENS} tokens and more and a cache of {WIDE_CACHE[0]} to "
            f"{WIDE_CACHE[1]} tokens per request on a card of less than {WIDE_GBPS} GB/s)",
        ),
        (1 <= problem.batch <= MAX_BATCH, f"takes a batch of 1 to {MAX_BATCH}, got {problem.batch}"),
        (problem.h_kv <= target.num_sms, f"needs an SM per KV head, got h_kv={problem.h_kv} on {target.num_sms} SMs"),
        (problem.total_q >= 1, "needs at least one query token"),
    )


def configs(problem: DecodeProblem, target: Target) -> tuple[Config, ...]:
    """The variant that runs the problem. Call only where `supports` is true."""
    pairs = is_paired(problem, target)
    problem = grouped(problem)
    dtype: Literal["bf16", "fp16"] = "bf16" if problem.dtype == torch.bfloat16 else "fp16"
    rows = next(n for n in (16, 32, 64) if rows_per_kv_head(problem) <= n)
    if problem.layout.is_quantised:
        is_short = problem.batch * problem.max_pages * problem.page_size <= MAX_LONE_TOKENS
        is_lone = rows == 16 and is_short and not problem.is_batch_invariant
        stages = LONE_STAGES if is_lone else CODE_STAGES[rows]
        return (Config(dtype, rows, problem.d_qk, stages, problem.layout.name),)
    if pairs:
        return (Config(dtype, rows, problem.d_qk, pairs=True),)
    return (Config(dtype, rows, problem.d_qk, _stages(rows, problem.d_qk)),)


def num_parts(problem: DecodeProblem, target: Target) -> int:
    """Parts of the plan: CTAs per KV head. One CTA occupies an SM, and all must be resident at once.

    A multiple of PART_STEP where that leaves less than an eighth of the SMs idle, because batches are: 128 requests of
    16384 tokens then stay whole (814 us instead of 827), four of 32768 take 16 tiles per part instead of 15 or 16
    (60.8 instead of 62.3), and the memory is as busy from 128 SMs as from 132. With 64 rows every SM: such plans price
    partials, so equal requests stay whole as well (816 us), and others gain 1 % (log 59 of decode_dense).
    """
    config = configs(problem, target)[0]
    parts = max(config.ctas_per_sm * target.num_sms // grouped(problem).h_kv, 1)
    return parts if config.rows == MAX_WIDE_ROWS else _even(parts)


def overhead_blocks(config: Config) -> int:
    """What a piece costs beside its tiles, in the plan.

    A partial of 64 rows is 84 KB. It was 147 when this was measured: 0.4 % at batch 128 (log 57 of decode_dense).
    """
    return WIDE_OVERHEAD_BLOCKS if config.rows == MAX_WIDE_ROWS else OVERHEAD_BLOCKS


@dataclass(frozen=True)
class Splitting:
    """What a plan is told about split requests; see `openmla.split.schedule.plan_decode`."""

    merge_blocks: int = OVERHEAD_BLOCKS
    margin: int = MARGIN
    merge_from: int | None = None


def splitting(problem: DecodeProblem, config: Config, parts: int) -> Splitting:
    """With 64 rows a partial takes 0.17 to 0.3 us of the memory, and the busiest part 3.3 us per tile: so every batch pays.

    Else 128 equal requests would be cut for the sake of four more parts: 848 instead of 816 us.
    """
    if config.rows < MAX_WIDE_ROWS:
        return Splitting()
    pieces = (problem.batch + parts) * grouped(problem).h_kv
    return Splitting(pieces // WIDE_PARTIALS, WIDE_MARGIN, 1)


def _even(parts: int) -> int:
    """A multiple of PART_STEP, where it leaves less than an eighth idle."""
    even = parts // PART_STEP * PART_STEP
    return even if 8 * (parts - even) < parts else parts


def _window_tokens(problem: DecodeProblem) -> int:
    """Tokens that the windows of a request's queries can reach, from the start of the first tile that one reaches."""
    return min(problem.window, NO_WINDOW) + problem.s_q - 1 + BLOCK_TOKENS - 1


def planned_lengths(problem: DecodeProblem, cache_seqlens: torch.Tensor) -> torch.Tensor:
    """The lengths that a plan should see: with a window, only what the kernel reads of each request.

    The kernel leaves out whole tiles before the window of a request's first query.
    """
    if not problem.window:
        return cache_seqlens
    return cache_seqlens.clamp(max=_window_tokens(problem))


@dataclass(frozen=True)
class Workspace:
    """What a plan holds for `launch`; fixed for a problem, so that a CUDA graph can hold it."""

    exchange: tuple[int, int, int]  # [h_kv, slots, words of a partial], int32
    groups: int  # KV heads as the kernel sees them


def workspace(problem: DecodeProblem, config: Config, parts: int, policy: Policy, chunk_tokens: int) -> Workspace:
    """Shape of the exchange: a slot per piece, `Config.words_per_row` for each row.

    Every word is UNWRITTEN before the first launch; each launch leaves those of `marks` so.

    Raises:
        ProblemError: the chunks of batch_invariant are no multiple of a tile, or a full request would have more than
            MAX_PIECES of them.
    """
    problem = grouped(problem)
    capacity = problem.max_pages * problem.page_size
    if problem.window:
        capacity = min(capacity, _window_tokens(problem))
    slots = problem.batch + parts
    if policy == "batch_invariant":
        chunks = max(-(-capacity // chunk_tokens), 1)
        wrong = []
        if chunk_tokens % BLOCK_TOKENS:
            wrong.append(f"chunk_tokens must be a multiple of {BLOCK_TOKENS}, got {chunk_tokens}")
        if chunks > MAX_PIECES:
            wrong.append(
                f"a request of max_pages * page_size = {capacity} tokens would have {chunks} chunks of {chunk_tokens}, "
                f"more than {MAX_PIECES}; use longer chunks"
            )
        if wrong:
            raise ProblemError(FAMILY, wrong)
        slots = problem.batch * chunks
    return Workspace((problem.h_kv, slots, config.rows * config.words_per_row), problem.h_kv)


def words_per_row(is_halved: bool, warpgroups: int) -> int:
    """Of a piece of the exchange: sums, maxima and sums of rows, powers of two (a sector for a warp's 8 rows)."""
    return 256 + 64 + 4 * warpgroups if is_halved else 512 + 64


def marks(config: Config) -> torch.Tensor:
    """Which words of a piece of the exchange say whether their record is there: bool, one for each word."""
    rows, warpgroups = config.rows, config.warpgroups
    if not config.is_halved:
        return torch.arange(rows * config.words_per_row) % 4 == 0
    sums, statistics, powers = torch.arange(rows * 256), torch.arange(rows * 64), torch.arange(rows * 4 * warpgroups)
    return torch.cat([sums % 2 == 0, statistics % 4 == 0, powers % 8 < 8 // warpgroups])


# Index lists: a request of the plan is a query token, its keys are those that its list names.


def gathered_supports(problem: SparseDecodeProblem, target: Target) -> Verdict:
    """May this kernel run a problem with index lists here? Every reason against it."""
    name = problem.layout.name
    cache_bytes = problem.num_pages * problem.layout.page_bytes(problem.page_size)
    return require(
        (target.arch == "sm_90a", f"needs sm_90a, the target is {target.arch}"),
        (name in CODES, f"reads rows of {' and '.join(CODES)} by index, this cache is {name}"),
        (problem.extra is None, "reads one cache, this problem has a second one"),
        (problem.dtype == torch.bfloat16, f"takes bf16 queries, got {problem.dtype}"),
        (problem.h_q <= GROUP_ROWS, f"takes up to {GROUP_ROWS} heads over index lists, got {problem.h_q}"),
        (1 <= problem.total_q <= MAX_BATCH, f"takes 1 to {MAX_BATCH} query tokens, got {problem.total_q}"),
        (problem.topk >= 1, "needs at least one index per query token"),
        (
            -(-problem.topk // BLOCK_TOKENS) <= MAX_PIECES,
            f"takes up to {MAX_PIECES * BLOCK_TOKENS} indices, got {problem.topk}",
        ),
        (cache_bytes <= MAX_GATHERED_BYTES, f"takes caches of up to {MAX_GATHERED_BYTES} bytes, got {cache_bytes}"),
        (problem.is_aligned, "needs a cache that starts at and steps from page to page by multiples of 16 bytes"),
    )


def gathered_configs(problem: SparseDecodeProblem, target: Target) -> tuple[Config, ...]:
    """The variant that runs a problem with index lists. Call only where `gathered_supports` is true."""
    return (Config("bf16", 16, problem.d_qk, LONE_STAGES, problem.layout.name, gathers=True),)


def gathered_parts(problem: SparseDecodeProblem, target: Target) -> int:
    """Parts of its plan: a CTA per SM, an even number of them for few tiles (see `num_parts`), and none without a tile.

    128 requests of 32 tiles take 82.6 us on 132 parts, 84.6 on 128; 16 requests 20.7 on 128, 20.9 on 132; two of them 8.4 on
    64, 8.8 on 128.
    """
    tiles = problem.total_q * -(-problem.topk // BLOCK_TOKENS)
    parts = gathered_configs(problem, target)[0].ctas_per_sm * target.num_sms
    return min(parts if tiles >= MANY_TILES * parts else _even(parts), tiles)


@lru_cache(maxsize=1024)
def gathered_plan(tokens: int, topk: int, parts: int) -> SplitPlan:
    """Who reads which 64 indices of whose list: a function of shapes, made on the host.

    Lists may be shorter than topk (`topk_length`); pieces behind the end of one then are empty, which the merge takes.
    """
    return plan_decode(
        (topk,) * tokens, parts, block_tokens=BLOCK_TOKENS, overhead_blocks=OVERHEAD_BLOCKS,
        ranges=ranges_needed(tokens, parts),
    )  # fmt: skip
