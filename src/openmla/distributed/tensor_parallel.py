"""Tensor-parallel heads: a rank computes its own heads from a shared input; the outputs add up."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def shared_input(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The same x; its gradient is the sum over the ranks, each of which used x for its own heads."""
    if group is None or group.size() == 1:
        return x
    result: torch.Tensor = _SharedInput.apply(x, group)  # type: ignore[no-untyped-call]
    return result


def sum_output(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The sum of x over the ranks; every rank gets its gradient as it is."""
    if group is None or group.size() == 1:
        return x
    result: torch.Tensor = _SumOutput.apply(x, group)  # type: ignore[no-untyped-call]
    return result


class _SharedInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        """The same tensor."""
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor, None]:
        """Summed over the ranks."""
        grad = grads[0].contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _SumOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        """Summed over the ranks."""
        total = x.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor, None]:
        """As it is."""
        return grads[0], None
