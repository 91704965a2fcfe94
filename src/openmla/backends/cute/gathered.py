"""The gathering kernel over bf16 rows behind the four verbs, twice: sparse prefill, and sparse decode that needs no split.

A call is one launch. Nothing is planned and nothing waits for the device, so a CUDA graph holds all of it after one warm
call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from openmla.backends.base import SparseDecodeOperands, SparsePrefillOperands, Verdict
from openmla.backends.cute import bundle
from openmla.backends.cute.prefill_sparse import config as gather
from openmla.backends.cute.prefill_sparse.launch import launch_decode, launch_prefill
from openmla.backends.cute.toolchain import CompiledObject
from openmla.core.errors import ProblemError
from openmla.core.problem import SparseDecodeProblem, SparsePrefillProblem
from openmla.core.target import Target


@dataclass(frozen=True)
class Compiled:
    """A gathering kernel ready to launch."""

    config: gather.Config
    parts: int
    function: Any


def build_gather(config: gather.Config, folder: Path) -> CompiledObject:
    """Compile one variant of prefill_sparse. Needs the DSL, no GPU."""
    from openmla.backends.cute.prefill_sparse.launch import build

    return build(config, folder)


def _supports(problem: gather.Problem, target: Target) -> Verdict:
    """The family's own rules, then whether its code can be had here."""
    verdict = gather.supports(problem, target)
    return bundle.availability(gather.FAMILY, gather.configs(problem, target)[0]) if verdict else verdict


def _compile(problem: gather.Problem, config: gather.Config, target: Target) -> Compiled:
    """Load the function, compiling it if neither bundle nor cache has it."""
    served = bundle.serve(gather.FAMILY, config, lambda folder: build_gather(config, folder))
    return Compiled(config, gather.num_parts(problem, target), served.function)


def _is_aligned(tensor: torch.Tensor) -> bool:
    """Starts at and steps by multiples of 16 bytes; compiled code checks the steps of dimensions of size 1, too."""
    steps = tensor.stride()[:-1]
    return tensor.data_ptr() % 16 == 0 and all(step * tensor.element_size() % 16 == 0 for step in steps)


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a contiguous copy where 16-byte copies cannot read it."""
    return tensor if _is_aligned(tensor) else tensor.clone(memory_format=torch.contiguous_format)


def _positive(q: torch.Tensor, scale: float) -> tuple[torch.Tensor, float]:
    """Q and a scale above 0 with the same scores: the largest score shall belong to the largest product."""
    if scale > 0:
        return q, scale
    return (q.neg(), -scale) if scale < 0 else (torch.zeros_like(q), 1.0)


@dataclass(frozen=True)
class SparsePrefill:
    """`prefill_sparse` over the rows of one tensor."""

    op: str = field(default="sparse_prefill", init=False)
    backend: str = field(default="cute", init=False)
    name: str = field(default=gather.FAMILY, init=False)

    def supports(self, problem: SparsePrefillProblem, target: Target) -> Verdict:
        """The family's own rules, then whether its code can be had here."""
        return _supports(problem, target)

    def configs(self, problem: SparsePrefillProblem, target: Target) -> Sequence[gather.Config]:
        """Variants, best first."""
        return gather.configs(problem, target)

    def compile(self, problem: SparsePrefillProblem, config: gather.Config, target: Target) -> Compiled:
        """Load the function, compiling it if neither bundle nor cache has it."""
        return _compile(problem, config, target)

    def launch(
        self, compiled: Compiled, problem: SparsePrefillProblem, operands: SparsePrefillOperands, plan: None
    ) -> None:
        """One kernel; copies of q, kv and out where they do not step by 16 bytes."""
        q, scale = _positive(_aligned(operands.q), operands.softmax_scale)
        out = (
            operands.out
            if _is_aligned(operands.out)
            else torch.empty(operands.out.shape, dtype=q.dtype, device=q.device)
        )
        direct = operands._replace(q=q, kv=_aligned(operands.kv), softmax_scale=scale, out=out)
        launch_prefill(compiled.function, direct, compiled.parts)
        if out is not operands.out:
            operands.out.copy_(out)


@dataclass(frozen=True)
class SparseDecodeRows:
    """`prefill_sparse` over the slots of a paged bf16 cache: batches whose tokens fill the SMs without a split."""

    op: str = field(default="sparse_decode", init=False)
    backend: str = field(default="cute", init=False)
    name: str = field(default=gather.FAMILY, init=False)

    def supports(self, problem: SparseDecodeProblem, target: Target) -> Verdict:
        """The family's own rules, then whether its code can be had here."""
        return _supports(problem, target)

    def configs(self, problem: SparseDecodeProblem, target: Target) -> Sequence[gather.Config]:
        """Variants, best first."""
        return gather.configs(problem, target)

    def compile(self, problem: SparseDecodeProblem, config: gather.Config, target: Target) -> Compiled:
        """Load the function, compiling it if neither bundle nor cache has it."""
        return _compile(problem, config, target)

    def launch(
        self, compiled: Compiled, problem: SparseDecodeProblem, operands: SparseDecodeOperands, plan: None
    ) -> None:
        """One kernel; copies of q and out where their tokens are not evenly spaced by 16 bytes. The cache is never copied."""
        cache = operands.kv_cache
        if not _is_aligned(cache):
            # Not seen by `supports`: a sparse problem does not say how a cache is aligned.
            raise ProblemError(
                "sparse_decode",
                [
                    "kv_cache must start at and step by multiples of 16 bytes on this backend, got address "
                    f"{cache.data_ptr():#x} and steps of {cache.stride()} elements; pad it or take backend='triton'"
                ],
            )
        q, scale = _positive(_aligned(operands.q), operands.softmax_scale)
        out, whole = operands.out, operands.out
        if not _is_aligned(out) or (out.dim() == 4 and out.stride(0) != out.shape[1] * out.stride(1)):
            whole = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        direct = operands._replace(q=q, softmax_scale=scale, out=whole)
        launch_decode(compiled.function, direct, compiled.parts)
        if whole is not out:
            out.copy_(whole)


SPARSE_PREFILL = SparsePrefill()
SPARSE_DECODE_ROWS = SparseDecodeRows()
