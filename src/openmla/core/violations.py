"""What breaks the rules of a problem: collected, then raised together. Sentences say rule, value and fix."""

from __future__ import annotations

import torch

from openmla.core.errors import ProblemError


def short(dtype: torch.dtype) -> str:
    """bfloat16 for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def got(value: object, ndim: int) -> str:
    """What came where a tensor of `ndim` dimensions belongs, and how it becomes one: the end of a sentence."""
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    shape = f"shape {tuple(value.shape)}"
    if value.dim() == ndim:
        return shape
    return shape + ("; .unsqueeze() adds a dimension" if value.dim() < ndim else "; .squeeze() or .flatten() drops one")


class Violations:
    """Collects broken rules; the tests of `core.problem` read as a table."""

    def __init__(self, op: str) -> None:
        self.op = op
        self.found: list[str] = []

    def rule(self, holds: bool, sentence: str) -> bool:
        """Collects the sentence unless the rule holds."""
        if not holds:
            self.found.append(sentence)
        return holds

    def tensor(
        self, name: str, value: object, ndim: int, dtypes: tuple[torch.dtype, ...], device: torch.device, shape: str
    ) -> bool:
        """Rank, dtype, device and a contiguous last dimension of one argument."""
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        if not isinstance(value, torch.Tensor):
            fix = "it cannot be left out" if value is None else f"make it one with torch.tensor(..., dtype={dtypes[0]})"
            self.found.append(f"{name} must be a tensor {shape}, got {type(value).__name__}; {fix}")
            return False
        fine = self.rule(value.dim() == ndim, f"{name} must be {shape}, got {got(value, ndim)}")
        fine &= self.rule(value.dtype in dtypes, f"{name} must be {names}, got {short(value.dtype)}; convert it first")
        fine &= self.rule(value.device == device, f"{name} must be on {device} like the others, got {value.device}")
        fine &= self.rule(value.layout == torch.strided, f"{name} must be a strided tensor, got {value.layout}")
        if value.layout == torch.strided and value.dim() == ndim and ndim > 0:
            fine &= self.rule(
                value.shape[-1] <= 1 or value.stride(-1) == 1,
                f"{name} must be contiguous in its last dimension, got strides {value.stride()}; call .contiguous()",
            )
        return fine

    def raise_if_any(self) -> None:
        """One ProblemError with everything collected so far."""
        if self.found:
            raise ProblemError(self.op, self.found)
