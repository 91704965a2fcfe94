"""The dense decode kernels of this backend behind the four verbs: plan on the device, run, merge.

A call is at most three launches on the current stream: the plan (once per step, shared by all layers), the kernel of
the family, and for families that leave partials the merge. Nothing waits for the device and nothing depends on lengths
on the host, so a CUDA graph holds all of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from openmla.backends.base import DecodeOperands, DecodePlan, Verdict, require
from openmla.backends.cute import bundle
from openmla.backends.cute.decode_dense_small import config as small
from openmla.backends.cute.toolchain import CompiledObject, compile_kernel
from openmla.core.faults import fault_word
from openmla.core.problem import DecodeProblem
from openmla.core.target import Target
from openmla.split.schedule import Policy

CHUNK_TOKENS = 4096  # piece length of batch_invariant: partials are then 2.8 % of the KV bytes at 128 heads


@dataclass(frozen=True)
class ScheduleVariant:
    """The device plan has one variant; every number it needs is an argument."""

    name: str = "decode_plan"

    def as_dict(self) -> dict[str, Any]:
        """Nothing to choose."""
        return asdict(self)


def build_schedule(folder: Path) -> CompiledObject:
    """Compile the device plan. Needs the DSL, no GPU."""
    from openmla.backends.cute import schedule

    return compile_kernel(schedule.DecodePlan(), schedule.fake_arguments(), ScheduleVariant().name, out_dir=folder)


class PlanOptions(NamedTuple):
    """What the device plan is told: see `openmla.split.schedule.plan_decode`."""

    num_parts: int
    block_tokens: int
    overhead_blocks: int
    min_share_blocks: int


@dataclass(frozen=True)
class Compiled:
    """A decode ready to launch."""

    config: Any
    options: PlanOptions
    decode: Any
    schedule: Any


def supports_bulk_copies(problem: DecodeProblem) -> Verdict:
    """What every kernel of this backend asks of tensors."""
    return require(
        (problem.is_aligned, "needs q and kv_cache to start at and step by multiples of 16 bytes"),
        (problem.is_scale_positive, "needs softmax_scale > 0"),
        (problem.num_pages >= 1 and problem.max_pages >= 1, "needs at least one page and one column of block_table"),
    )


@dataclass(frozen=True)
class FewRows:
    """`decode_dense_small`: up to 32 query rows per KV head; merges its partials itself."""

    op: str = field(default="decode", init=False)
    backend: str = field(default="cute", init=False)
    name: str = field(default=small.FAMILY, init=False)

    def supports(self, problem: DecodeProblem, target: Target) -> Verdict:
        """The family's own rules, then those of bulk copies, then whether its code can be had here."""
        own = small.supports(problem, target)
        verdict = Verdict((*own.reasons, *supports_bulk_copies(problem).reasons))
        if not verdict:
            return verdict
        needed = ((small.FAMILY, small.configs(problem, target)[0]), ("schedule", ScheduleVariant()))
        return Verdict(tuple(why for family, each in needed for why in bundle.availability(family, each).reasons))

    def configs(self, problem: DecodeProblem, target: Target) -> Sequence[small.Config]:
        """Variants, best first."""
        return small.configs(problem, target)

    def compile(self, problem: DecodeProblem, config: small.Config, target: Target) -> Compiled:
        """Load both functions, compiling what neither bundle nor cache has."""
        from openmla.backends.cute.decode_dense_small import launch

        options = PlanOptions(small.num_parts(problem, target), small.BLOCK_TOKENS, small.OVERHEAD_BLOCKS, 1)
        decode = bundle.serve(small.FAMILY, config, lambda folder: launch.build(config, folder))
        schedule = bundle.serve("schedule", ScheduleVariant(), build_schedule)
        return Compiled(config, options, decode.function, schedule.function)

    def plan(self, compiled: Compiled, problem: DecodeProblem, cache_seqlens: torch.Tensor, policy: str) -> DecodePlan:
        """Plan on the device; the counters of the merge start at zero here and every launch leaves them so."""
        shape = self._workspace(compiled, problem, policy).counters
        counters = torch.zeros(shape, dtype=torch.int32, device=cache_seqlens.device)
        return plan_on_device(compiled, problem, cache_seqlens, policy)._replace(counters=counters)

    def workspace_bytes(self, compiled: Compiled, problem: DecodeProblem, policy: str) -> int:
        """fp32 partials of every slot that a plan can use."""
        shapes = self._workspace(compiled, problem, policy)
        return 4 * (math.prod(shapes.out_accum) + math.prod(shapes.lse_accum))

    def _workspace(self, compiled: Compiled, problem: DecodeProblem, policy: str) -> small.Workspace:
        parts = compiled.options.num_parts
        return small.workspace(problem, compiled.config, parts, cast(Policy, policy), CHUNK_TOKENS)

    def launch(self, compiled: Compiled, problem: DecodeProblem, operands: DecodeOperands, plan: DecodePlan) -> None:
        """One kernel."""
        from openmla.backends.cute.decode_dense_small.launch import launch

        shapes = self._workspace(compiled, problem, "batch_invariant" if plan.chunk_blocks else "balanced")
        out_accum, lse_accum = carve(operands.workspace, shapes.out_accum, shapes.lse_accum)
        direct = with_aligned_out(operands)
        assert plan.counters is not None
        launch(
            compiled.decode, direct, plan.tile_scheduler_metadata, plan.num_splits, out_accum, lse_accum,
            plan.counters, chunk_blocks=plan.chunk_blocks, is_causal=problem.is_causal,
        )  # fmt: skip
        if direct is not operands:
            operands.out.copy_(direct.out)


def plan_on_device(compiled: Compiled, problem: DecodeProblem, cache_seqlens: torch.Tensor, policy: str) -> DecodePlan:
    """Launch the plan kernel; its result is that of `plan_decode`, without waiting for the device."""
    options, device = compiled.options, cache_seqlens.device
    metadata = torch.empty((options.num_parts, 8), dtype=torch.int32, device=device)
    num_splits = torch.empty(problem.batch + 1, dtype=torch.int32, device=device)
    chunk_blocks = CHUNK_TOKENS // options.block_tokens if policy == "batch_invariant" else 0
    compiled.schedule(
        cache_seqlens, metadata, num_splits, fault_word(device), problem.max_pages * problem.page_size,
        options.block_tokens, options.overhead_blocks, options.min_share_blocks, chunk_blocks,
    )  # fmt: skip
    return DecodePlan(metadata, num_splits, chunk_blocks)


def with_aligned_out(operands: DecodeOperands) -> DecodeOperands:
    """The operands, with a fresh `out` where the caller's does not step by the 16 bytes that wide stores need."""
    out = operands.out
    steps = [step for size, step in zip(out.shape[:-1], out.stride()[:-1], strict=True) if size > 1]
    if out.data_ptr() % 16 == 0 and all(step % 8 == 0 for step in steps):
        return operands
    return operands._replace(out=torch.empty(out.shape, dtype=out.dtype, device=out.device))


def carve(workspace: torch.Tensor | None, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """fp32 tensors side by side in the caller's bytes."""
    assert workspace is not None
    tensors, begin = [], 0
    for shape in shapes:
        size = 4 * math.prod(shape)
        tensors.append(workspace[begin : begin + size].view(torch.float32).view(shape))
        begin += size
    return tensors


FEW_ROWS = FewRows()
