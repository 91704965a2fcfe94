"""The gathering kernel over bf16 rows behind the four verbs, twice: sparse prefill, and sparse decode over bf16 caches.

A call is one launch, or two where the lists of a small batch are cut into pieces, or where those of a prefill are put in the
order of their rows first. Both depend on shapes alone, and nothing waits for the device, so a CUDA graph holds all of it
after one warm call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

from openmla.backends.base import SparseDecodeOperands, SparsePrefillOperands, Verdict
from openmla.backends.cute import bundle
from openmla.backends.cute.families import CombineVariant
from openmla.backends.cute.prefill_sparse import config as gather
from openmla.backends.cute.prefill_sparse.launch import launch_decode, launch_order, launch_prefill, launch_split
from openmla.core.errors import ProblemError
from openmla.core.problem import SparseDecodeProblem, SparsePrefillProblem
from openmla.core.target import Target


@dataclass(frozen=True)
class Compiled:
    """A gathering kernel ready to launch."""

    config: gather.Config
    parts: int
    function: Any
    pieces: tuple[int, int] = (1, 0)  # of every list: how many, keys of each
    combine: Any = None  # for several
    order: Any = None  # what orders lists first


@lru_cache(maxsize=256)
def _num_splits(device: torch.device, batch: int, splits: int) -> torch.Tensor:
    """int32 [batch + 1]: pieces before each request; kept, so that a CUDA graph may hold it."""
    return torch.tensor([splits * request for request in range(batch + 1)], dtype=torch.int32, device=device)


def _merge(problem: SparseDecodeProblem) -> CombineVariant:
    """Narrow columns where whole rows would leave SMs idle: fewer rows than four per SM of an H100."""
    return CombineVariant("bf16", 128 if problem.total_q * problem.h_q < 4 * 132 else 512)


def _supports(problem: gather.Problem, target: Target) -> Verdict:
    """The family's own rules, then whether its code can be had here."""
    verdict = gather.supports(problem, target)
    if not verdict:
        return verdict
    config = gather.configs(problem, target)[0]
    needed: list[tuple[str, Any]] = [(gather.FAMILY, config)]
    if config.split and isinstance(problem, SparseDecodeProblem):
        needed.append(("combine", _merge(problem)))
    if gather.is_ordered(problem, target):
        needed.append((gather.ORDER_FAMILY, gather.Order()))
    return Verdict(tuple(why for family, each in needed for why in bundle.availability(family, each).reasons))


def _compile(problem: gather.Problem, config: gather.Config, target: Target) -> Compiled:
    """Load the functions, compiling what neither bundle nor cache has."""
    served = bundle.serve(gather.FAMILY, config)
    merge = None
    if config.split and isinstance(problem, SparseDecodeProblem):
        merge = bundle.serve("combine", _merge(problem)).function
    order = bundle.serve(gather.ORDER_FAMILY, gather.Order()).function if gather.is_ordered(problem, target) else None
    cut = gather.pieces(problem, target)
    return Compiled(config, gather.num_parts(problem, target), served.function, cut, merge, order)


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
        """One kernel, or two with an order; copies of q, kv and out where they do not step by 16 bytes."""
        q, scale = _positive(_aligned(operands.q), operands.softmax_scale)
        out = (
            operands.out
            if _is_aligned(operands.out)
            else torch.empty(operands.out.shape, dtype=q.dtype, device=q.device)
        )
        direct = operands._replace(q=q, kv=_aligned(operands.kv), softmax_scale=scale, out=out)
        if compiled.order is not None:
            direct = launch_order(compiled.order, direct, compiled.parts)
        launch_prefill(compiled.function, direct, compiled.parts)
        if out is not operands.out:
            operands.out.copy_(out)


@dataclass(frozen=True)
class SparseDecodeRows:
    """`prefill_sparse` over the slots of a paged bf16 cache; lists are cut where tokens do not fill the SMs."""

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
        """One kernel, or two with pieces; the cache is never copied.

        Copies of q and out where their tokens are not evenly spaced by 16 bytes.
        """
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
        if compiled.combine is None:
            launch_decode(compiled.function, direct, compiled.parts)
        else:
            _launch_pieces(compiled, direct)
        if whole is not out:
            out.copy_(whole)


def _launch_pieces(compiled: Compiled, operands: SparseDecodeOperands) -> None:
    """Every piece of every list, then their merge."""
    q, out, lse, sink = operands.q, operands.out, operands.lse, operands.attn_sink
    if out.dim() == 3:
        out, lse = out.unsqueeze(1), lse.T.unsqueeze(2)
    (splits, chunk), (batch, s_q, heads) = compiled.pieces, out.shape[:3]
    slots, rows = batch * splits, s_q * heads
    out_accum = torch.empty((slots, rows, gather.D_V), dtype=torch.float32, device=q.device)
    lse2_accum = torch.empty((slots, rows), dtype=torch.float32, device=q.device)
    launch_split(compiled.function, operands, out_accum, lse2_accum, splits, chunk, compiled.parts)
    compiled.combine(
        out_accum, lse2_accum, _num_splits(q.device, batch, splits), out, lse,
        lse2_accum[0] if sink is None else sink.contiguous(), 1, int(sink is not None),
    )  # fmt: skip


SPARSE_PREFILL = SparsePrefill()
SPARSE_DECODE_ROWS = SparseDecodeRows()
