"""The kernels of the Triton backend, as the table of backends sees them. Triton is imported when one is compiled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from openmla.backends.base import DecodeOperands, DecodePlan, Kernel, Verdict, require
from openmla.backends.triton import config as choice
from openmla.backends.triton import prefill_config
from openmla.core.problem import AppendProblem, DecodeProblem, PrefillProblem
from openmla.core.target import Target


@dataclass(frozen=True)
class _TritonKernel:
    """What the kernels share: who supports what, and that the first launch compiles."""

    op: str
    name: str
    backend: str = "triton"

    def supports(self, problem: Any, target: Target) -> Verdict:
        """Every reason against, without importing Triton."""
        return choice.supports(problem, target)

    def configs(self, problem: Any, target: Target) -> Sequence[choice.Config]:
        """Tiles that fit the target, best first."""
        return choice.candidates(problem, target)

    def compile(self, problem: Any, config: choice.Config, target: Target) -> Any:
        """Constants and grid; machine code follows at the first launch, once for each alignment of the operands."""
        from openmla.backends.triton import launch

        return launch.make_ready(problem, config, target)

    def launch(self, compiled: Any, problem: Any, operands: Any, plan: Any) -> None:
        """Writes the outputs of the operands in full, on the current stream."""
        from openmla.backends.triton import launch

        if plan is None:
            getattr(launch, self.op)(problem, compiled, operands)
        else:
            launch.decode(problem, compiled, operands, plan)


def _in_bf16(problem: DecodeProblem) -> DecodeProblem:
    """Codes of q are converted before the launch; bf16 holds them exactly."""
    return replace(problem, dtype=problem.out_dtype) if problem.dtype != problem.out_dtype else problem


@dataclass(frozen=True)
class _DecodeKernel(_TritonKernel):
    def supports(self, problem: DecodeProblem, target: Target) -> Verdict:
        """Every reason against, without importing Triton."""
        return super().supports(_in_bf16(problem), target)

    def configs(self, problem: DecodeProblem, target: Target) -> Sequence[choice.Config]:
        """Tiles that fit the target, best first."""
        return super().configs(_in_bf16(problem), target)

    def compile(self, problem: DecodeProblem, config: choice.Config, target: Target) -> Any:
        """As of the others."""
        return super().compile(_in_bf16(problem), config, target)

    def launch(self, compiled: Any, problem: DecodeProblem, operands: DecodeOperands, plan: Any) -> None:
        """Writes the outputs of the operands in full, on the current stream."""
        operands = operands._replace(q=operands.q.to(problem.out_dtype))
        super().launch(compiled, _in_bf16(problem), operands, plan)

    def plan(self, compiled: Any, problem: DecodeProblem, cache_seqlens: torch.Tensor, policy: str) -> DecodePlan:
        """Parts by the lengths, computed on their device. Any plan of the problem is correct for any lengths."""
        from openmla.backends.triton import launch

        return launch.plan(problem, compiled, cache_seqlens, policy)

    def workspace_bytes(self, compiled: Any, problem: DecodeProblem, policy: str) -> int:
        """fp32 partials of every piece that a plan of that policy may have."""
        from openmla.backends.triton import launch

        num_slots = launch.slots(problem, compiled, launch.chunk_blocks(compiled, policy))
        return launch.partial_bytes(num_slots, problem.s_q * problem.h_q, problem.d_v)


@dataclass(frozen=True)
class _PrefillKernel:
    op: str = "prefill"
    name: str = "prefill_varlen"
    backend: str = "triton"

    def supports(self, problem: PrefillProblem, target: Target) -> Verdict:
        """Every reason against, without importing Triton."""
        return prefill_config.supports(problem, target)

    def configs(self, problem: PrefillProblem, target: Target) -> Sequence[prefill_config.PrefillConfig]:
        """Tiles that fit the target, best first."""
        return prefill_config.candidates(problem, target)

    def compile(self, problem: PrefillProblem, config: prefill_config.PrefillConfig, target: Target) -> Any:
        """Constants; machine code follows at the first launch."""
        from openmla.backends.triton import prefill_launch

        return prefill_launch.make_ready(problem, config)

    def launch(self, compiled: Any, problem: PrefillProblem, operands: Any, plan: Any) -> None:
        """Writes out and lse in full, on the current stream."""
        from openmla.backends.triton import prefill_launch

        prefill_launch.prefill(problem, compiled, operands)

    def launch_backward(
        self, compiled: Any, problem: PrefillProblem, operands: Any, grad_out: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients (dq, dk, dv) in the dtypes of q, k and v; `operands.out` and `operands.lse` are the forward's."""
        from openmla.backends.triton import prefill_launch

        return prefill_launch.prefill_backward(problem, compiled, operands, grad_out)


@dataclass(frozen=True)
class _AppendKernel:
    op: str = "append"
    name: str = "append"
    backend: str = "triton"

    def supports(self, problem: AppendProblem, target: Target) -> Verdict:
        """Every reason against, without importing Triton. Nothing is multiplied, so the interpreter may have bf16."""
        found = require(
            (choice.is_installed(), "triton is not installed: pip install openmla[triton]"),
            (not problem.layout.has_call_scale, f"writes no {problem.layout}, a cache of codes without scales"),
        )
        return choice.machine_verdict(torch.float32, target) if found else found

    def configs(self, problem: AppendProblem, target: Target) -> Sequence[tuple[int, int]]:
        """Tokens and warps of a program."""
        return tuple((tokens, warps) for tokens, warps in choice.entries("append")[0]["try"])

    def compile(self, problem: AppendProblem, config: tuple[int, int], target: Target) -> tuple[int, int]:
        """Machine code follows at the first launch."""
        return config

    def launch(self, compiled: tuple[int, int], problem: AppendProblem, operands: Any, plan: Any) -> None:
        """Writes the rows into their slots, on the current stream."""
        from openmla.backends.triton.append import append

        append(problem.layout, operands, *compiled)


DECODE = _DecodeKernel("decode", "decode_split")
SPARSE_DECODE = _TritonKernel("sparse_decode", "decode_sparse")
SPARSE_PREFILL = _TritonKernel("sparse_prefill", "prefill_sparse")
PREFILL = _PrefillKernel()
APPEND = _AppendKernel()
KERNELS: tuple[Kernel, ...] = (DECODE, SPARSE_DECODE, SPARSE_PREFILL, PREFILL, APPEND)
