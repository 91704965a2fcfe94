"""The kernels of the PyTorch backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from openmla.backends.base import DecodePlan, Kernel, Verdict
from openmla.backends.torch import anywhere, tiled
from openmla.backends.torch.backward import prefill_backward
from openmla.core.problem import DecodeProblem
from openmla.core.target import Target
from openmla.reference import quant


@dataclass(frozen=True)
class TorchConfig:
    """How to run: nothing to choose so far."""


@dataclass(frozen=True)
class _TorchKernel:
    """Runs every valid problem on every device; the shared half of the kernels."""

    op: str
    name: str
    backend: str = "torch"

    def supports(self, problem: Any, target: Target) -> Verdict:
        """Always: this is the path of last resort."""
        return Verdict()

    def configs(self, problem: Any, target: Target) -> Sequence[TorchConfig]:
        """One."""
        return (TorchConfig(),)

    def compile(self, problem: Any, config: TorchConfig, target: Target) -> TorchConfig:
        """Nothing to compile."""
        return config

    def launch(self, compiled: TorchConfig, problem: Any, operands: Any, plan: Any) -> None:
        """Writes out, lse and max_logits of the operands in full. A plan is not needed and ignored."""
        with torch.no_grad():
            getattr(tiled if operands.q.is_cpu else anywhere, self.op)(problem, operands)


_BLOCK_KEYS = 64  # the unit in which a plan counts keys


@dataclass(frozen=True)
class _DecodeKernel(_TorchKernel):
    def plan(
        self, compiled: TorchConfig, problem: DecodeProblem, cache_seqlens: torch.Tensor, policy: str
    ) -> DecodePlan:
        """One part, one piece per request: threads take tiles as they become free, and merge them in order.

        So the bits do not depend on who computes what, and both policies are the same plan.
        """
        part = torch.zeros((1, 8), dtype=torch.int32, device=cache_seqlens.device)
        part[0, 1] = problem.batch - 1
        if problem.batch:
            length = cache_seqlens[-1].clamp(0, problem.max_pages * problem.page_size)
            part[0, 3] = (length + _BLOCK_KEYS - 1) // _BLOCK_KEYS
        splits = torch.arange(problem.batch + 1, dtype=torch.int32, device=cache_seqlens.device)
        return DecodePlan(part, splits, 0)

    def workspace_bytes(self, compiled: TorchConfig, problem: DecodeProblem, policy: str) -> int:
        """None: scratch belongs to the worker threads and outlives the call."""
        return 0


@dataclass(frozen=True)
class _PrefillKernel(_TorchKernel):
    def launch_backward(
        self, compiled: TorchConfig, problem: Any, operands: Any, grad_out: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients (dq, dk, dv) in the dtypes of q, k and v; `operands.out` and `operands.lse` are the forward's."""
        with torch.no_grad():
            return prefill_backward(problem, operands, grad_out)


@dataclass(frozen=True)
class _AppendKernel(_TorchKernel):
    def launch(self, compiled: TorchConfig, problem: Any, operands: Any, plan: Any) -> None:
        """Writes the rows into their slots. Looks at the slots' values, so on a GPU it waits.

        Raises:
            ProblemError: a slot is below -1 or beyond the cache.
        """
        rows = operands.rows
        with torch.no_grad():
            if operands.rope is not None:
                rows = operands.rope.rotated(rows[:, None], problem.d_qk - problem.d_rope, operands.positions)[:, 0]
            quant.write_rows(operands.out, problem.layout, operands.slots, rows, operands.descale)


DECODE = _DecodeKernel("decode", "decode_tiled")
SPARSE_DECODE = _DecodeKernel("sparse_decode", "sparse_decode_tiled")
SPARSE_PREFILL = _TorchKernel("sparse_prefill", "sparse_prefill_tiled")
PREFILL = _PrefillKernel("prefill", "prefill_tiled")
APPEND = _AppendKernel("append", "append")
KERNELS: tuple[Kernel, ...] = (DECODE, SPARSE_DECODE, SPARSE_PREFILL, PREFILL, APPEND)
