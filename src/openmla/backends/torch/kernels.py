"""The four kernels of the PyTorch backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from openmla.backends.base import Kernel, Verdict
from openmla.backends.torch import anywhere
from openmla.backends.torch.backward import prefill_backward
from openmla.core.target import Target


@dataclass(frozen=True)
class TorchConfig:
    """How to run: nothing to choose so far."""


@dataclass(frozen=True)
class _TorchKernel:
    """Runs every valid problem on every device; the shared half of the four kernels."""

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
            getattr(anywhere, self.op)(problem, operands)


@dataclass(frozen=True)
class _PrefillKernel(_TorchKernel):
    def launch_backward(
        self, problem: Any, operands: Any, grad_out: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients (dq, dk, dv) in the dtypes of q, k and v; `operands.out` and `operands.lse` are the forward's."""
        with torch.no_grad():
            return prefill_backward(problem, operands, grad_out)


DECODE = _TorchKernel("decode", "decode_tiled")
SPARSE_DECODE = _TorchKernel("sparse_decode", "sparse_decode_tiled")
SPARSE_PREFILL = _TorchKernel("sparse_prefill", "sparse_prefill_tiled")
PREFILL = _PrefillKernel("prefill", "prefill_tiled")
KERNELS: tuple[Kernel, ...] = (DECODE, SPARSE_DECODE, SPARSE_PREFILL, PREFILL)
