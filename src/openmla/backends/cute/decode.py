"""The dense decode kernels of this backend behind the four verbs: plan on the device, run, merge.

A call is at most three launches on the current stream: the plan (once per step, shared by all layers), the kernel of
the family, and for families that leave partials the merge. Nothing waits for the device and nothing depends on lengths
on the host, so a CUDA graph holds all of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple, cast

import torch

from openmla.backends.base import DecodeOperands, DecodePlan, Repeatable, Verdict, require
from openmla.backends.cute import bundle
from openmla.backends.cute.decode_dense import config as large
from openmla.backends.cute.decode_dense.launch import launch as launch_large
from openmla.backends.cute.decode_dense.launch import launch_merge
from openmla.backends.cute.decode_dense_small import config as small
from openmla.backends.cute.decode_dense_small.launch import launch as launch_small
from openmla.backends.cute.decode_fp8 import config as coded
from openmla.backends.cute.decode_fp8.launch import launch as launch_coded
from openmla.backends.cute.families import ScheduleVariant
from openmla.backends.cute.inline import inlined, refusals
from openmla.core.faults import fault_word
from openmla.core.problem import DecodeProblem
from openmla.core.target import Target
from openmla.split.schedule import MARGIN, Policy

PLAN_SCRATCH = 64 << 20  # bytes of partials that may stay with a plan, so that no layer allocates and carves its own


def _serve(family: str, config: Any) -> Any:
    """The launchable function of one variant."""
    return bundle.serve(family, config).function


class PlanOptions(NamedTuple):
    """What the device plan is told: see `openmla.split.schedule.plan_decode`."""

    num_parts: int
    block_tokens: int
    overhead_blocks: int
    merge_blocks: int
    min_share_blocks: int
    chunk_tokens: int  # piece length of batch_invariant
    margin: int = MARGIN
    merge_from: int | None = None


@dataclass(frozen=True)
class Compiled:
    """A decode ready to launch."""

    config: Any
    options: PlanOptions
    decode: Any
    schedule: Any
    combine: Any = None  # for families that leave partials
    scratch: dict[str, Any] = field(default_factory=dict)  # policy -> shapes of partials, of this problem


def supports_bulk_copies(problem: DecodeProblem) -> Verdict:
    """What every kernel of this backend asks of tensors."""
    return require(
        (problem.is_aligned, "needs q and kv_cache to start at and step by multiples of 16 bytes"),
        (problem.is_scale_positive, "needs softmax_scale > 0"),
        (problem.num_pages >= 1 and problem.max_pages >= 1, "needs at least one page and one column of block_table"),
        *((False, why) for why in refusals(problem.mods)),
    )


@dataclass(frozen=True)
class FewRows:
    """`decode_dense_small`: up to 32 query rows per KV head, 64 of many long requests; merges its partials itself."""

    op: str = field(default="decode", init=False)
    backend: str = field(default="cute", init=False)
    name: str = field(default=small.FAMILY, init=False)

    def supports(self, problem: DecodeProblem, target: Target) -> Verdict:
        """The family's own rules, then those of bulk copies, then whether its code can be had here."""
        own = small.supports(problem, target)
        where = "" if refusals(problem.mods) else ", decode_dense does"
        mods = tuple(f"inlines no mods{where}: {each}" for each in inlined(problem.mods))
        verdict = Verdict((*own.reasons, *supports_bulk_copies(problem).reasons, *mods))
        if not verdict:
            return verdict
        return _available((small.FAMILY, small.configs(problem, target)[0]), ("schedule", ScheduleVariant()))

    def configs(self, problem: DecodeProblem, target: Target) -> Sequence[small.Config]:
        """Variants, best first."""
        return small.configs(problem, target)

    def compile(self, problem: DecodeProblem, config: small.Config, target: Target) -> Compiled:
        """Load both functions, compiling what neither bundle nor cache has."""
        overhead = small.overhead_blocks(config)
        parts = small.num_parts(problem, target)
        split = small.splitting(problem, config, parts)
        options = PlanOptions(
            parts, small.BLOCK_TOKENS, overhead, split.merge_blocks, 1, small.CHUNK_TOKENS, split.margin, split.merge_from
        )  # fmt: skip
        return Compiled(config, options, _serve(small.FAMILY, config), _serve("schedule", ScheduleVariant()))

    def plan(self, compiled: Compiled, problem: DecodeProblem, cache_seqlens: torch.Tensor, policy: str) -> DecodePlan:
        """Plan on the device. The exchange of partials stays with the plan: every launch leaves it as it found it."""
        shape = self._workspace(compiled, problem, policy).exchange
        exchange = torch.full(shape, small.UNWRITTEN, dtype=torch.int32, device=cache_seqlens.device)
        pieces = plan_on_device(compiled, problem, small.planned_lengths(problem, cache_seqlens), policy, shape[1])
        return pieces._replace(partials=(exchange,))

    def workspace_bytes(self, compiled: Compiled, problem: DecodeProblem, policy: str) -> int:
        """None: partials lie in the plan, because they must be marked as unwritten before the first launch."""
        self._workspace(compiled, problem, policy)  # raises where the policy cannot be had
        return 0

    def _workspace(self, compiled: Compiled, problem: DecodeProblem, policy: str) -> small.Workspace:
        found = compiled.scratch.get(policy)
        if found is None:
            parts = compiled.options.num_parts
            found = small.workspace(problem, compiled.config, parts, cast(Policy, policy), small.CHUNK_TOKENS)
            compiled.scratch[policy] = found
        return cast(small.Workspace, found)

    def launch(self, compiled: Compiled, problem: DecodeProblem, operands: DecodeOperands, plan: DecodePlan) -> None:
        """One kernel."""
        groups = self._workspace(compiled, problem, "batch_invariant" if plan.chunk_blocks else "balanced").groups
        direct = with_aligned_out(operands)
        assert plan.partials is not None
        launch_small(
            compiled.decode, direct, plan.tile_scheduler_metadata, plan.num_splits, *plan.partials,
            chunk_blocks=plan.chunk_blocks, is_causal=problem.is_causal, window=problem.window, max_s_q=problem.s_q,
            groups=groups,
        )  # fmt: skip
        if direct is not operands:
            operands.out.copy_(direct.out)

    def repeatable(
        self, compiled: Compiled, problem: DecodeProblem, operands: DecodeOperands, plan: DecodePlan
    ) -> Repeatable | None:
        """One launch; of groups, behind an expanded view of the cache."""
        groups = self._workspace(compiled, problem, "batch_invariant" if plan.chunk_blocks else "balanced").groups
        if groups == operands.kv_cache.shape[2]:
            return repeated(self, compiled, problem, operands, plan)
        expanded = operands._replace(kv_cache=operands.kv_cache.expand(-1, -1, groups, -1))
        run = repeated(self, compiled, problem, expanded, plan)
        if run is None:
            return None
        return lambda q, kv_cache, *others: run(q, kv_cache.expand(-1, -1, groups, -1), *others)


@dataclass(frozen=True)
class ManyRows:
    """`decode_dense`: blocks of 64 query rows per KV head; leaves partials, which a second launch merges."""

    op: str = field(default="decode", init=False)
    backend: str = field(default="cute", init=False)
    name: str = field(default=large.FAMILY, init=False)

    def supports(self, problem: DecodeProblem, target: Target) -> Verdict:
        """The family's own rules, then those of bulk copies, then whether its code can be had here."""
        own = large.supports(problem, target)
        verdict = Verdict((*own.reasons, *supports_bulk_copies(problem).reasons))
        if not verdict:
            return verdict
        return _available(
            (large.FAMILY, large.configs(problem, target)[0]),
            ("schedule", ScheduleVariant()),
            (large.MERGE_FAMILY, large.merge_config(problem)),
        )

    def configs(self, problem: DecodeProblem, target: Target) -> Sequence[large.Config]:
        """Variants, best first."""
        return large.configs(problem, target)

    def compile(self, problem: DecodeProblem, config: large.Config, target: Target) -> Compiled:
        """Load the three functions, compiling what neither bundle nor cache has."""
        parts, splitting = large.num_parts(problem, target), large.MERGE_BLOCKS * large.row_blocks(problem)
        chunk = large.chunk_tokens(problem)
        least = large.MIN_SHARE_BLOCKS
        options = PlanOptions(parts, large.BLOCK_TOKENS, large.OVERHEAD_BLOCKS, splitting, least, chunk)
        merge = _serve(large.MERGE_FAMILY, large.merge_config(problem))
        schedule = _serve("schedule", ScheduleVariant())
        return Compiled(config, options, _serve(large.FAMILY, config), schedule, merge)

    def plan(self, compiled: Compiled, problem: DecodeProblem, cache_seqlens: torch.Tensor, policy: str) -> DecodePlan:
        """Plan on the device. With its counts of arrivals the kernel merges; every launch leaves them at 0.

        Not for batch_invariant: how many chunks a part stores there follows the lengths of the launch, not of the plan.
        """
        device, has_chunks = cache_seqlens.device, policy == "batch_invariant"
        shapes = self._partials(compiled, problem, has_chunks)
        pieces = plan_on_device(compiled, problem, cache_seqlens, policy, shapes[0][0])
        arrivals = None if has_chunks else torch.zeros(shapes[0][:2], dtype=torch.int32, device=device)
        return pieces._replace(partials=partials(device, *shapes), arrivals=arrivals)

    def workspace_bytes(self, compiled: Compiled, problem: DecodeProblem, policy: str) -> int:
        """fp32 partials of every slot that a plan can use."""
        return 4 * sum(math.prod(shape) for shape in self._partials(compiled, problem, policy == "batch_invariant"))

    def _partials(
        self, compiled: Compiled, problem: DecodeProblem, has_chunks: bool
    ) -> tuple[tuple[int, int, int], tuple[int, int]]:
        slots = problem.batch + compiled.options.num_parts
        if has_chunks:
            slots = problem.batch * max(-(-problem.max_pages * problem.page_size // compiled.options.chunk_tokens), 1)
        blocks = problem.h_kv * large.row_blocks(problem)
        return (slots, blocks, large.BLOCK_ROWS * large.D_V), (slots, blocks * large.BLOCK_ROWS)

    def launch(self, compiled: Compiled, problem: DecodeProblem, operands: DecodeOperands, plan: DecodePlan) -> None:
        """The kernel, and where it does not merge itself, the merge of the requests that it had to split."""
        shapes = self._partials(compiled, problem, plan.chunk_blocks > 0)
        out_accum, lse2_accum = scratch(operands, plan, *shapes)
        direct = with_aligned_out(operands)
        launch_large(
            compiled.decode, direct, plan.tile_scheduler_metadata, plan.num_splits, out_accum, lse2_accum,
            s_q=problem.s_q, chunk_blocks=plan.chunk_blocks, is_causal=problem.is_causal, window=problem.window,
            arrivals=plan.arrivals, is_natural=bool(compiled.config.mods),
        )  # fmt: skip
        if plan.arrivals is None:
            launch_merge(compiled.combine, direct, plan.num_splits, out_accum, lse2_accum, s_q=problem.s_q)
        if direct is not operands:
            operands.out.copy_(direct.out)

    def repeatable(
        self, compiled: Compiled, problem: DecodeProblem, operands: DecodeOperands, plan: DecodePlan
    ) -> Repeatable | None:
        """One launch, where the kernel merges."""
        return None if plan.arrivals is None else repeated(self, compiled, problem, operands, plan)

    def exchanging(
        self, compiled: Compiled, plan: DecodePlan, mail: torch.Tensor, merged: torch.Tensor
    ) -> ExchangedRows | None:
        """The same kernel, with the exchange of rows between ranks at its end; None where no variant has it."""
        config = replace(compiled.config, is_exchanged=True)
        is_one_each = merged.numel() <= large.EXCHANGED_ROWS * (large.D_V // 2 + 1)
        if config not in large.EXCHANGED or plan.arrivals is None or not is_one_each:
            return None
        if not bundle.availability(large.FAMILY, config):
            return None
        return ExchangedRows(config, mail, merged)


@dataclass(frozen=True)
class ExchangedRows:
    """One launch of `decode_dense` that ends by exchanging its rows with other ranks (`decode_dense.exchange`).

    `out` and `lse` of the operands are this rank's staged rows; results go to `merged`.
    """

    config: large.Config
    mail: torch.Tensor
    merged: torch.Tensor
    op: str = field(default="decode", init=False)
    backend: str = field(default="cute", init=False)
    name: str = field(default=large.FAMILY, init=False)

    def launch(self, compiled: Compiled, problem: DecodeProblem, operands: DecodeOperands, plan: DecodePlan) -> None:
        """As `ManyRows.launch` of a plan whose pieces the kernel merges."""
        assert plan.partials is not None
        launch_large(
            _serve(large.FAMILY, self.config), operands, plan.tile_scheduler_metadata, plan.num_splits, *plan.partials,
            s_q=problem.s_q, chunk_blocks=0, is_causal=problem.is_causal, window=problem.window, arrivals=plan.arrivals,
            mail=self.mail, merged=self.merged,
        )  # fmt: skip


@dataclass(frozen=True)
class CodedRows(ManyRows):
    """`decode_fp8`: e4m3 queries over e4m3 keys, in blocks of 64 rows; plan, partials and merge of `decode_dense`."""

    name: str = field(default=coded.FAMILY, init=False)

    def supports(self, problem: DecodeProblem, target: Target) -> Verdict:
        """The family's own rules, then those of bulk copies, then whether its code can be had here."""
        own, copies = coded.supports(problem, target), supports_bulk_copies(problem)
        mods = tuple(f"inlines no mods: {each}" for each in inlined(problem.mods))
        if reasons := (*own.reasons, *copies.reasons, *mods):
            return Verdict(reasons)
        return _available(
            (coded.FAMILY, coded.configs(problem, target)[0]),
            ("schedule", ScheduleVariant()),
            (large.MERGE_FAMILY, self._merge(problem)),
        )

    def configs(self, problem: DecodeProblem, target: Target) -> Sequence[Any]:
        """Variants, best first."""
        return coded.configs(problem, target)

    def compile(self, problem: DecodeProblem, config: Any, target: Target) -> Compiled:
        """Load the three functions, compiling what neither bundle nor cache has."""
        seen = coded.grouped(problem, config)
        parts, splitting = large.num_parts(seen, target), large.MERGE_BLOCKS * large.row_blocks(seen)
        chunk = large.chunk_tokens(problem)
        options = PlanOptions(parts, large.BLOCK_TOKENS, large.OVERHEAD_BLOCKS, splitting, 1, chunk)
        merge = _serve(large.MERGE_FAMILY, self._merge(problem))
        return Compiled(
            config, options, _serve(coded.FAMILY, config), _serve("schedule", ScheduleVariant()), merge
        )  # fmt: skip

    def _partials(
        self, compiled: Compiled, problem: DecodeProblem, has_chunks: bool
    ) -> tuple[tuple[int, int, int], tuple[int, int]]:
        return super()._partials(compiled, coded.grouped(problem, compiled.config), has_chunks)

    def launch(self, compiled: Compiled, problem: DecodeProblem, operands: DecodeOperands, plan: DecodePlan) -> None:
        """The kernel, and where it does not merge itself, the merge of the requests that it had to split."""
        groups = coded.grouped(problem, compiled.config).h_kv
        out_accum, lse2_accum = scratch(operands, plan, *self._partials(compiled, problem, plan.chunk_blocks > 0))
        direct = with_aligned_out(operands)
        if groups != problem.h_kv:
            direct = direct._replace(kv_cache=direct.kv_cache.expand(-1, -1, groups, -1))
        launch_coded(
            compiled.decode, direct, plan.tile_scheduler_metadata, plan.num_splits, out_accum, lse2_accum,
            s_q=problem.s_q, chunk_blocks=plan.chunk_blocks, is_causal=problem.is_causal, window=problem.window,
            arrivals=plan.arrivals,
        )  # fmt: skip
        if plan.arrivals is None:
            launch_merge(compiled.combine, direct, plan.num_splits, out_accum, lse2_accum, s_q=problem.s_q)
        if direct.out is not operands.out:
            operands.out.copy_(direct.out)

    def repeatable(
        self, compiled: Compiled, problem: DecodeProblem, operands: DecodeOperands, plan: DecodePlan
    ) -> Repeatable | None:
        """None: the scales of a call may change from layer to layer."""
        return None

    @staticmethod
    def _merge(problem: DecodeProblem) -> large.MergeConfig:
        return large.merge_config(replace(problem, dtype=problem.out_dtype))


def repeated(
    kernel: FewRows | ManyRows, compiled: Compiled, problem: DecodeProblem, operands: DecodeOperands, plan: DecodePlan
) -> Repeatable | None:
    """`kernel.launch`, recorded: the compiled function's arguments with the places of tensors that change from call to call.

    None where the launch works on other tensors than the operands (copies, views): those would have to be made each time.
    """
    if plan.partials is None or operands.cu_seqlens_q is not None:
        return None
    calls: list[tuple[Any, ...]] = []
    function, record = compiled.decode, lambda *arguments: calls.append(arguments)
    kernel.launch(
        Compiled(compiled.config, compiled.options, record, None, None, compiled.scratch), problem, operands, plan
    )
    (arguments,) = calls
    varying = (operands.q, operands.kv_cache, operands.block_table, operands.cache_seqlens, operands.out, operands.lse)
    numbers = {id(tensor): i for i, tensor in enumerate(varying)}
    places = [place for place, each in enumerate(arguments) if id(each) in numbers]
    if [numbers[id(arguments[place])] for place in places] != [*range(len(varying))]:
        return None
    results = places[4]
    if places != [0, 1, 2, 3, results, results + 1]:
        return None
    between = bundle.arguments(function, arguments[4:results])
    behind = bundle.arguments(function, arguments[results + 2 :])

    def run(
        q: torch.Tensor, kv_cache: torch.Tensor, block_table: torch.Tensor, cache_seqlens: torch.Tensor, out: torch.Tensor,
        lse: torch.Tensor,
    ) -> object:  # fmt: skip
        return function(q, kv_cache, block_table, cache_seqlens, *between, out, lse, *behind)

    return run


def _available(*needed: tuple[str, Any]) -> Verdict:
    """Whether every function of a call can be had here."""
    return Verdict(tuple(why for family, each in needed for why in bundle.availability(family, each).reasons))


def plan_on_device(
    compiled: Compiled, problem: DecodeProblem, cache_seqlens: torch.Tensor, policy: str, slots: int
) -> DecodePlan:
    """Launch the plan kernel; its result is that of `plan_decode` with a range for each of `slots` pieces, without
    waiting for the device.
    """
    options, device = compiled.options, cache_seqlens.device
    ranges = -(-slots // options.num_parts)
    metadata = torch.empty((ranges, options.num_parts, 8), dtype=torch.int32, device=device)
    num_splits = torch.empty(problem.batch + 1, dtype=torch.int32, device=device)
    chunk_blocks = options.chunk_tokens // options.block_tokens if policy == "batch_invariant" else 0
    compiled.schedule(
        cache_seqlens, metadata, num_splits, fault_word(device), problem.max_pages * problem.page_size,
        options.block_tokens, options.overhead_blocks, options.merge_blocks,
        options.min_share_blocks, chunk_blocks, options.margin,
        options.num_parts + 1 if options.merge_from is None else options.merge_from,
    )  # fmt: skip
    return DecodePlan(metadata, num_splits, chunk_blocks)


def with_aligned_out(operands: DecodeOperands) -> DecodeOperands:
    """The operands, with a fresh `out` where the caller's does not step by the 16 bytes that wide stores need."""
    out = operands.out
    if out.data_ptr() % 16 == 0 and not any(step % 8 for step in out.stride()[:-1]):
        return operands
    return operands._replace(out=torch.empty(out.shape, dtype=out.dtype, device=out.device))


def partials(device: torch.device, *shapes: tuple[int, ...]) -> tuple[torch.Tensor, ...] | None:
    """fp32 scratch for all layers that share a plan, or None where that would hold too much memory for long."""
    if 4 * sum(map(math.prod, shapes)) > PLAN_SCRATCH:
        return None
    return tuple(torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes)


def scratch(operands: DecodeOperands, plan: DecodePlan, *shapes: tuple[int, ...]) -> Sequence[torch.Tensor]:
    """The partials: in the caller's bytes if there are any, else the plan's."""
    if operands.workspace is None and plan.partials is not None:
        return plan.partials
    return carve(operands.workspace, *shapes)


def carve(workspace: torch.Tensor | None, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """fp32 tensors side by side in the caller's bytes."""
    assert workspace is not None
    rest = workspace.numel() % 4
    floats = (workspace[:-rest] if rest else workspace).view(torch.float32)
    tensors, begin = [], floats.storage_offset()
    for shape in shapes:
        strides, size = _strides(shape)
        tensors.append(floats.as_strided(shape, strides, begin))
        begin += size
    return tensors


@cache
def _strides(shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """Strides of a contiguous tensor, and its elements."""
    steps = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return steps, math.prod(shape)


FEW_ROWS = FewRows()
MANY_ROWS = ManyRows()
CODED_ROWS = CodedRows()
