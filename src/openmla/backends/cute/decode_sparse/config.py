"""How the token-sparse decode kernel can be built, and which problems it takes. No DSL import.

The shared-memory plan (bytes, d_qk 576): ring 2 tiles x 4 units x 16,384 (64 keys x 128 columns), RoPE 8,192, Q 7 x 8,192
(two more slices are in registers), codes under way 16,384, P 2 x 8,192, barriers and exchange below 2,048: 231,424 of 232,448.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch

from openmla.backends.base import Verdict, require
from openmla.core.layout import kv_layout
from openmla.core.problem import SparseDecodeProblem
from openmla.core.target import Target
from openmla.split.schedule import SplitPlan, plan_decode

FAMILY = "decode_sparse"
BLOCK_ROWS = 64  # query heads per CTA: one wgmma M
BLOCK_TOKENS = 64  # keys per tile, the unit of the plan
OVERHEAD_BLOCKS = 2  # of a piece: filling the pipeline and the epilogue
MERGE_BLOCKS = 12  # of a plan that splits requests: storing partials, reading them again, one more launch
MAX_REQUESTS = 65_535  # CTAs of the merge in one direction of its grid
D_V = 512
PARTIAL_ROWS = 33  # of 2,048 bytes, that 64 rows of a piece take where CTAs merge: 64 KB of fp16, and scales
SLICE_BYTES = 64 * 128  # 64 keys x 64 bf16 columns
SMEM_LIMIT = 232_448
FIT_LOW, FIT_HIGH = 113, 134  # exponents of scales, + 127, with which every code is exact in fp16
MAX_CACHE_BYTES = 2**36 - 16  # offsets are 32-bit counts of 16 bytes, and the last one means "no key"


# Which keys and columns a producer lane handles; traced into the kernel, and run by the tests.


def lane_key(lane: Any) -> Any:
    """A lane's key within each group of four."""
    return 2 * (lane // 16) + lane // 4 % 2


def lane_chunk(lane: Any) -> Any:
    """A lane's 16 bytes within the 128 bytes of codes of a key and unit."""
    return 4 * (lane // 8 % 2) + lane % 4


def load_key(lane: Any) -> Any:
    """The key within each group of four that a lane loads from.

    Eight lanes side by side load 128 bytes side by side, to 128 bytes side by side: with two keys among them cp.async took
    14 passes through the first cache per instruction, of four that the bytes need.
    """
    return lane // 8


def load_chunk(lane: Any) -> Any:
    """The 16 bytes that a lane loads within 128 bytes of a key: of the codes of a unit, or of RoPE."""
    return lane % 8


def raw_place(key: Any, chunk: Any) -> Any:
    """Byte of 16 codes under way within those of four keys; the lanes of a load phase (`lane_key`) hit all banks."""
    return key * 128 + (chunk ^ (4 * (key % 2))) * 16


def unit_place(warp: Any, lane: Any) -> Any:
    """Byte of a unit (two slices of 64 keys x 128 bytes, 128-byte swizzle) of a lane's first key and eight columns.

    The next eight columns are at `place ^ 16`.
    """
    key = lane_key(lane)
    return (lane // 8 % 2) * SLICE_BYTES + (16 * warp + key) * 128 + ((2 * (lane % 4)) ^ key) * 16


def rope_place(warp: Any, lane: Any) -> Any:
    """Byte of the RoPE slice of the first key that a lane loads."""
    key = load_key(lane)
    return (16 * warp + key) * 128 + (load_chunk(lane) ^ key) * 16


def of_key(place: Any, i: int) -> Any:
    """The place of a lane's key i (0 to 3; four keys apart) from that of its first."""
    return (place + 512 * i) ^ (64 * (i % 2))


@dataclass(frozen=True)
class Bytes:
    """Where the parts of a key lie, for the producers.

    Attributes:
        d_qk: columns.
        row_bytes: from one key's codes to the next key's within a page.
        scale_group: columns that share a scale.
        is_e8m0: scales are one byte, the exponent + 127, instead of fp32.
        scales_behind_page: the scales of all keys lie behind the last key's row, `scale_bytes` each.
        scale_place: of the first scale: byte of the row, 0 where scales lie behind.
        scale_bytes: of one key; half of them are held by each of two lanes.
        num_scales: of one key; what is behind them is padding.
        rope_place: byte of the row where 64 bf16 columns begin that are stored as they are; 0 where there are none.
        rope_is_value: these columns are the last 64 of the value and belong into the ring, not behind it.
    """

    d_qk: int
    row_bytes: int
    scale_group: int
    is_e8m0: bool
    scales_behind_page: bool
    scale_place: int
    scale_bytes: int
    num_scales: int
    rope_place: int
    rope_is_value: bool

    @property
    def has_rope_slice(self) -> bool:
        """Whether there is a ninth slice of 64 columns, which are key but not value."""
        return self.rope_place > 0 and not self.rope_is_value

    @property
    def scale_words(self) -> int:
        """32-bit words of scales that a lane holds."""
        return self.scale_bytes // 8


def bytes_of(name: str) -> Bytes:
    """A layout of `openmla.core.layout` as the producers read it."""
    layout = kv_layout(name)
    behind = layout.scales_behind_page
    return Bytes(
        d_qk=layout.d_qk,
        row_bytes=layout.data_bytes if behind else layout.bytes_per_token,
        scale_group=layout.scale_group,
        is_e8m0=layout.scale_format == "e8m0",
        scales_behind_page=behind,
        scale_place=0 if behind else layout.d_quant,
        scale_bytes=layout.scale_bytes,
        num_scales=layout.num_scales,
        rope_place=(layout.d_quant + (0 if behind else layout.scale_bytes)) if layout.d_rope_stored else 0,
        rope_is_value=layout.d_rope_stored > 0 and layout.d_qk == D_V,
    )


def scale_holder(unit: int, key: Any) -> Any:
    """The lane that holds the scales of a key (0 to 15 of a warp) for a unit: lanes 16 and on those of units 2 and 3."""
    return key + 16 * (unit // 2)


def scale_word(where: Bytes, unit: int) -> int:
    """Which of that lane's words."""
    return unit % 2 if where.scale_words == 2 else 0


def scale_shift(where: Bytes, unit: int, chunk: Any) -> Any:
    """Bits below a lane's e8m0 byte in that word, for the 16 columns of `lane_chunk`."""
    byte = chunk * 16 // where.scale_group
    if where.scale_words == 1:
        byte = byte + unit % 2 * (128 // where.scale_group)
    return byte * 8


@dataclass(frozen=True)
class Config:
    """One compiled variant. Any head count, page size, topk and number of query tokens.

    Attributes:
        layout: of the cache, `openmla.core.layout`.
        has_extra: reads a second cache in the same layout.
        gate_left, gate_right: the wgmma of a tile's scores after which the left and right half of the tile before may be
            multiplied; -1 when all are issued, -2 when all are complete.
        prefetch: how rows are asked for two tiles ahead: by cache lines, or by one bulk request each, whose address is the
            same for a whole warp, so that 16 of them are a loop of 16.
        fence: who orders the stores of keys before the tensor cores' reads: the producers at every hand-over, where it
            waits for their loads too, or the scores warpgroup when it has seen one.
        operands: of the products. Codes times a power of two between 2^-14 and 2^7 are exact in fp16, for a third of the
            instructions that bf16 takes. A CTA that meets any other scale says so in `redo`; what it wrote is void, and a
            launch of the variant with bf16 operands behind it, on the same plan, repeats these CTAs.
        keys: where converted keys lie: in shared memory, or in registers, which is the schedule of `swapped`.
        early_merge: the merge may be resident while this kernel runs.
        start: plainly, behind the kernel before; or early, beside its end: the plan is read before the wait for it, and Q is
            asked for behind the first rows.
        merges: pieces of a request are merged by the CTAs that computed them, who wait for one another: a cooperative launch,
            and none behind it.
    """

    layout: str = "fp8_656"
    has_extra: bool = False
    gate_left: int = 0
    gate_right: int = 16
    prefetch: Literal["lines", "bulk", "none"] = "lines"
    fence: Literal["writer", "reader"] = "reader"
    operands: Literal["bf16", "fp16"] = "bf16"
    keys: Literal["shared", "registers"] = "shared"
    early_merge: bool = True
    start: Literal["plain", "early"] = "plain"
    merges: bool = False

    @property
    def bytes(self) -> Bytes:
        """The layout as the producers read it."""
        return bytes_of(self.layout)

    @property
    def repeat(self) -> Config | None:
        """The variant to launch behind this one, for the CTAs that this one voids."""
        return Config(self.layout, self.has_extra) if self.operands == "fp16" else None

    @property
    def roles(self) -> dict[str, int]:
        """Registers per thread of the warp roles; those of a CTA's four warpgroups, or three with keys in registers, fill 512.

        What the assembler needs to keep everything in registers, found by trying; it differs from layout to layout.
        """
        if self.keys == "registers":
            return {"math": 224, "producers": 56}
        is_large = self.layout == "fp8_584" or (self.layout == "fp8_656" and self.has_extra)
        producers = 80 if is_large and self.operands == "bf16" else 72
        return {"scores": 192 - producers, "values": 160, "producers": producers}

    @property
    def name(self) -> str:
        """Exported function name; the digest stands for the fields of the schedule."""
        told = ("layout", "has_extra", "keys", "start", "merges")
        schedule = {key: value for key, value in self.as_dict().items() if key not in told}
        digest = hashlib.sha256(json.dumps(schedule, sort_keys=True).encode()).hexdigest()[:8]
        words = [self.layout, "extra" * self.has_extra, "registers" * (self.keys == "registers")]
        words += ["early" * (self.start == "early"), "merges" * self.merges]
        return "_".join([FAMILY, *filter(None, words), digest])

    def as_dict(self) -> dict[str, Any]:
        """For the bundle's manifest."""
        return asdict(self)


LAYOUTS: tuple[str, ...] = ("fp8_656", "fp8_584", "fp8_528", "fp8_528_mx")
SERVED = (("fp8_656", False), ("fp8_584", False), ("fp8_528", False),
          ("fp8_656", True), ("fp8_584", True), ("fp8_528_mx", True))  # fmt: skip
SWAPPED = Config("fp8_656", prefetch="none", operands="fp16", keys="registers")
STARTS_EARLY = Config("fp8_584", True, start="early")
MERGED = tuple(Config(layout, start="early", merges=True) for layout in ("fp8_656", "fp8_584", "fp8_528"))
VARIANTS: tuple[Config, ...] = (
    *(Config(layout, has_extra) for layout, has_extra in SERVED), SWAPPED, STARTS_EARLY, *MERGED
)  # fmt: skip
"""Passed `tests/gpu/decode_sparse.py gate` on a GPU. What `supports` can lead to, and what an ahead-of-time bundle holds.

Those with fp16 operands and keys in shared memory passed too, but the launch behind them costs more than they gain
everywhere but with the longest lists, where it is 2 % (docs/kernels/decode_sparse.md): they are candidates, and nothing
leads to them.
"""

SWAPPED_TILES = (32, (31, 62))
"""Of a list, and of a part with one block of heads or with more, from which SWAPPED runs: 1 to 10 % faster there (H100, rows
ds-16-*). A cache whose scales are not powers of two between 2^-14 and 2^7 loses 14 us, so not where it gains 2."""

MERGED_REQUESTS = 32
"""Up to which a request's pieces are merged by those who computed them: 39 shapes with 1 to 32 requests are 1.01 to 1.37 times
as fast as with a launch behind the kernel (H100, rows ds-20-*). More were not measured."""

SPILLING = (("fp8_528_mx", False), ("fp8_528", True))
"""Right too, but the assembler finds no registers for all of their values in bf16; not served until it does."""


def row_blocks(problem: SparseDecodeProblem) -> int:
    """64-head blocks of one query token."""
    return -(-problem.h_q // BLOCK_ROWS)


def requests(problem: SparseDecodeProblem) -> tuple[int, int]:
    """(requests, query tokens of each) as the plan sees them; tokens of a varlen batch are requests of one token."""
    return (problem.total_q, 1) if problem.is_varlen else (problem.batch, problem.s_q)


def supports(problem: SparseDecodeProblem, target: Target) -> Verdict:
    """May this kernel run the problem here? Every reason against it."""
    batch, s_q = requests(problem)
    extra, name = problem.extra, problem.layout.name
    cache_bytes = problem.num_pages * problem.layout.page_bytes(problem.page_size)
    if extra is not None:
        cache_bytes = max(cache_bytes, extra.num_pages * extra.layout.page_bytes(extra.page_size))
    is_built, does_spill = ((name, extra is not None) in pairs for pairs in (SERVED, SPILLING))
    return require(
        (target.arch == "sm_90a", f"needs sm_90a, the target is {target.arch}"),
        (name in LAYOUTS, f"reads {', '.join(LAYOUTS)} caches, this one is {name}"),
        (
            name not in LAYOUTS or is_built,
            f"reads {name} {'with' if extra else 'without'} a second cache, but that variant "
            + ("needs more registers than there are" if does_spill else "has not been checked on a GPU"),
        ),
        (problem.dtype == torch.bfloat16, f"takes bf16 queries, got {problem.dtype}"),
        (1 <= batch <= MAX_REQUESTS, f"takes 1 to {MAX_REQUESTS} requests (varlen: tokens), got {batch}"),
        (1 <= s_q <= 65_535, f"takes 1 to 65535 query tokens per request, got {s_q}"),
        (problem.topk >= 1, "needs at least one index per query token"),
        (cache_bytes <= MAX_CACHE_BYTES, f"takes caches of up to {MAX_CACHE_BYTES} bytes, got {cache_bytes}"),
        (
            extra is None or extra.layout.name == name,
            f"reads a second cache only in the layout of the first, got {extra and extra.layout}",
        ),
        (problem.is_aligned, "needs caches that start at and step from page to page by multiples of 16 bytes"),
    )


def configs(problem: SparseDecodeProblem, target: Target) -> tuple[Config, ...]:
    """Variants that run the problem, best first. Call only where `supports` is true."""
    plain = Config(problem.layout.name, problem.extra is not None)
    each, (of_list, of_parts) = tiles(problem.topk), SWAPPED_TILES
    of_part = of_parts[min(row_blocks(problem), 2) - 1]
    is_long = each >= of_list and requests(problem)[0] * each >= of_part * num_parts(problem, target, plain)
    if plain == SWAPPED.repeat and is_long:
        return SWAPPED, plain
    early = replace(plain, start="early")
    merged = replace(early, merges=True)
    if merged in MERGED and requests(problem)[0] <= MERGED_REQUESTS and is_split(problem, target, merged):
        return merged, plain
    return (early, plain) if early == STARTS_EARLY else (plain,)


def is_split(problem: SparseDecodeProblem, target: Target, config: Config) -> bool:
    """Whether the plan cuts any request, so that pieces are to be merged."""
    batch = requests(problem)[0]
    return plan(batch, all_tiles(problem), num_parts(problem, target, config)).num_pieces > batch


def num_parts(problem: SparseDecodeProblem, target: Target, config: Config) -> int:
    """Parts of the plan: each takes row_blocks * s_q CTAs, one per SM."""
    batch, s_q = requests(problem)
    most = max(target.num_sms // (row_blocks(problem) * s_q), 1)
    return parts(most, batch, all_tiles(problem), problem.total_q * problem.h_q, config.merges)


def parts(most: int, batch: int, each: int, rows: int, merges: bool = False) -> int:
    """How many of at most `most` parts take `each` tiles of `batch` requests, with `rows` rows of the output in all.

    All of them; but where that is two tiles for each, a third as many as there are tiles: a tile more costs 0.5 us, and the
    merge of 11 pieces of a request instead of 16 saves 3.7 (H200, batch 2, s_q 2, 128 heads, topk 2048: rows ds-8-16 to 21).
    Where there are fewer tiles than parts, as many as there are tiles, for CTAs without work cost 2 to 5 us. Two tiles for each
    where many pieces of many rows are to be merged: one request of 256 rows 21.4 us with 16 pieces and 24.7 with 32, of 16
    rows 16.4 and 15.1 (H100, rows ds-12-*).

    With `merges`, where those who computed the pieces merge them, a merge costs less: two tiles for each instead of three (batch
    2 again: 19.1 us instead of 19.5), and later two instead of one (one request of 128 rows 13.6 us with 16 pieces and 12.4 with
    32, of 256 rows 14.3 and 15.1: rows ds-19-*). A CTA with pieces of two requests merges twice, one after the other: as many
    parts for each request, where that uses four fifths of them (of 33: batch 5 27.7 us with 30 and 32.5 with 33, batch 7 34.2
    with 28 and 38.2, batch 12 54.7 with 24 and 53.8; H100, rows ds-20-*).
    """
    work = batch * each
    if work <= most:
        return -(-work // 2) if each >= 16 and rows * each >= (8192 if merges else 4096) else work
    if work <= 2 * most:
        return -(-work // (2 if merges else 3))
    even = most // batch * batch
    return even if merges and 5 * even >= 4 * most else most


def all_tiles(problem: SparseDecodeProblem) -> int:
    """Tiles of a request, those of a second cache among them."""
    return tiles(problem.topk, problem.extra.topk if problem.extra else 0)


def tiles(topk: int, topk_extra: int = 0) -> int:
    """Tiles of a request: those of its index list, then those of the second one."""
    return -(-topk // BLOCK_TOKENS) + -(-topk_extra // BLOCK_TOKENS)


@lru_cache(maxsize=1024)
def plan(batch: int, blocks: int, parts: int) -> SplitPlan:
    """Who computes which of the `blocks` tiles of which request: a function of shapes, made on the host.

    Lists may be shorter than topk (`topk_length`, -1); their tokens then skip tiles of their own pieces, and nothing has to
    be known about them here.
    """
    return plan_decode(
        (blocks * BLOCK_TOKENS,) * batch, parts, block_tokens=BLOCK_TOKENS, overhead_blocks=OVERHEAD_BLOCKS,
        merge_blocks=MERGE_BLOCKS,
    )  # fmt: skip
