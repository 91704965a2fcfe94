"""The token-sparse decode kernel of this backend behind the four verbs: run, merge.

A call is one launch, one more behind it where the first may void CTAs (`Config.repeat`), and one more where the plan splits
requests between CTAs that do not merge them themselves (`Config.merges`). The plan depends on shapes alone and is made on
the host, once per shape; nothing waits for the device, so a CUDA graph holds all of it after one warm call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

from openmla.backends.base import SparseDecodeOperands, Verdict
from openmla.backends.cute import bundle
from openmla.backends.cute.decode_sparse import config as sparse
from openmla.backends.cute.families import CombineVariant
from openmla.backends.cute.few_rows import Held, held_on
from openmla.core.problem import SparseDecodeProblem
from openmla.core.target import Target

_counts: Held = {}  # of stored pieces, 0 between launches: see `decode_sparse.merge`
_captured: Held = {}


@dataclass(frozen=True)
class Compiled:
    """A sparse decode ready to launch."""

    config: sparse.Config
    num_parts: int
    decode: Any
    combine: Any  # None where the kernel merges
    repeat: Any = None  # behind `decode`, where that may void what it wrote


def _combine_variant(problem: SparseDecodeProblem) -> CombineVariant:
    """Narrow columns where whole rows would leave SMs idle: fewer than 256 rows.

    With 128 rows narrow ones gain 0.6 us of 20 where requests have 16 pieces, with 256 they cost 0.5 of 21, with 512 1.2 of
    25 (H100, rows ds-12-*).
    """
    return CombineVariant("bf16", 128 if problem.total_q * problem.h_q < 256 else 512)


@lru_cache(maxsize=256)
def _plan_on(device: torch.device, batch: int, blocks: int, parts: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(metadata, num_splits, pieces) of a shape on a device; kept, so that a CUDA graph may hold the tensors."""
    plan = sparse.plan(batch, blocks, parts)
    return plan.tile_scheduler_metadata(device), plan.num_splits_tensor(device), plan.num_pieces


@dataclass(frozen=True)
class SparseDecode:
    """`decode_sparse`: quantised caches, any number of heads, indices, pages."""

    op: str = field(default="sparse_decode", init=False)
    backend: str = field(default="cute", init=False)
    name: str = field(default=sparse.FAMILY, init=False)

    def supports(self, problem: SparseDecodeProblem, target: Target) -> Verdict:
        """The family's own rules, then whether its code can be had here."""
        verdict = sparse.supports(problem, target)
        if not verdict:
            return verdict
        config = sparse.configs(problem, target)[0]
        reasons = () if config.merges else bundle.availability("combine", _combine_variant(problem)).reasons
        for each in filter(None, (config, config.repeat)):
            reasons += bundle.availability(sparse.FAMILY, each).reasons
        return Verdict(reasons)

    def configs(self, problem: SparseDecodeProblem, target: Target) -> Sequence[sparse.Config]:
        """Variants, best first."""
        return sparse.configs(problem, target)

    def compile(self, problem: SparseDecodeProblem, config: sparse.Config, target: Target) -> Compiled:
        """Load the functions, compiling what neither bundle nor cache has."""
        return Compiled(
            config,
            sparse.num_parts(problem, target, config),
            bundle.serve(sparse.FAMILY, config).function,
            None if config.merges else bundle.serve("combine", _combine_variant(problem)).function,
            None if config.repeat is None else bundle.serve(sparse.FAMILY, config.repeat).function,
        )

    def launch(
        self, compiled: Compiled, problem: SparseDecodeProblem, operands: SparseDecodeOperands, plan: None
    ) -> None:
        """The kernel, what repeats the CTAs that it voided, and the merge of the requests that it had to split."""
        from openmla.backends.cute.decode_sparse.launch import launch

        batch, s_q = sparse.requests(problem)
        device = operands.q.device
        blocks = sparse.tiles(problem.topk, problem.extra.topk if problem.extra else 0)
        metadata, num_splits, pieces = _plan_on(device, batch, blocks, compiled.num_parts)
        is_split = pieces > batch
        rows, slots, blocks_of = s_q * problem.h_q, pieces if is_split else 1, s_q * sparse.row_blocks(problem)
        stored = sparse.PARTIAL_ROWS * blocks_of if compiled.config.merges else rows
        out_accum = torch.empty((slots, stored if is_split else 1, sparse.D_V), dtype=torch.float32, device=device)
        lse2_accum = torch.empty((slots, rows if is_split else 1), dtype=torch.float32, device=device)
        direct = _aligned(operands)
        redo = None
        if compiled.config.merges:
            redo = held_on(_counts, _captured, device, (1, slots * blocks_of, 1), 0)
        if compiled.repeat is not None:
            redo = torch.empty((compiled.num_parts, s_q, sparse.row_blocks(problem)), dtype=torch.int32, device=device)
        launch(compiled.decode, direct, metadata, num_splits, out_accum, lse2_accum, redo=redo)
        if compiled.repeat is not None:
            launch(compiled.repeat, direct, metadata, num_splits, out_accum, lse2_accum, redo=redo)
        if is_split and not compiled.config.merges:
            out, lse, sink = direct.out, direct.lse, direct.attn_sink
            if out.dim() == 3:
                out, lse = out.unsqueeze(1), lse.T.unsqueeze(2)
            compiled.combine(
                out_accum, lse2_accum, num_splits, out, lse, lse2_accum[0] if sink is None else sink, 1,
                int(sink is not None),
            )  # fmt: skip
        if direct.out is not operands.out:
            operands.out.copy_(direct.out)


def _aligned(operands: SparseDecodeOperands) -> SparseDecodeOperands:
    """The operands, with fresh q and out where the caller's do not step by the 16 bytes that wide accesses need."""

    def is_aligned(tensor: torch.Tensor) -> bool:
        steps = [step for size, step in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True) if size > 1]
        return tensor.data_ptr() % 16 == 0 and all(step % 8 == 0 for step in steps)

    q, out = operands.q, operands.out
    if is_aligned(q) and is_aligned(out):
        return operands
    return operands._replace(
        q=q if is_aligned(q) else q.clone(memory_format=torch.contiguous_format),
        out=out if is_aligned(out) else torch.empty(out.shape, dtype=out.dtype, device=out.device),
    )


SPARSE_DECODE = SparseDecode()
