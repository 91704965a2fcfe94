"""The functions that a mod may call, as PyTorch has them: `m` when the mod is called plainly.

Every backend has its own module of these names, of the same meaning (`NAMES` is what a mod may use). Scores are
floating point; b, h, q_idx and kv_idx are int32, and so is what is computed from them alone. Arguments broadcast,
and may be plain numbers.
"""

from __future__ import annotations

import torch

inf = float("inf")

Value = torch.Tensor | int | float


def _tensors(*values: Value) -> tuple[torch.Tensor, ...]:
    """Numbers as tensors beside the others, without widening them."""
    like = next((value for value in values if isinstance(value, torch.Tensor)), torch.zeros(()))
    return tuple(v if isinstance(v, torch.Tensor) else torch.tensor(v, device=like.device) for v in values)


def _real(x: Value) -> torch.Tensor:
    found = _tensors(x)[0]
    return found if found.is_floating_point() else found.to(torch.float32)


def where(condition: torch.Tensor, x: Value, y: Value) -> torch.Tensor:
    """X where the condition holds, else y."""
    return torch.where(condition, x, y)


def maximum(x: Value, y: Value) -> torch.Tensor:
    """The larger one."""
    return torch.maximum(*_tensors(x, y))


def minimum(x: Value, y: Value) -> torch.Tensor:
    """The smaller one."""
    return torch.minimum(*_tensors(x, y))


def abs(x: Value) -> torch.Tensor:
    """|x|."""
    return torch.abs(_tensors(x)[0])


def exp(x: Value) -> torch.Tensor:
    """Exponential function."""
    return torch.exp(_real(x))


def exp2(x: Value) -> torch.Tensor:
    """2 ** x."""
    return torch.exp2(_real(x))


def log(x: Value) -> torch.Tensor:
    """Natural logarithm."""
    return torch.log(_real(x))


def log2(x: Value) -> torch.Tensor:
    """Logarithm to base 2."""
    return torch.log2(_real(x))


def sqrt(x: Value) -> torch.Tensor:
    """Square root."""
    return torch.sqrt(_real(x))


def tanh(x: Value) -> torch.Tensor:
    """Hyperbolic tangent."""
    return torch.tanh(_real(x))


def sigmoid(x: Value) -> torch.Tensor:
    """1 / (1 + e ** -x)."""
    return torch.sigmoid(_real(x))


def floordiv(x: Value, y: Value) -> torch.Tensor:
    """Quotient of integers, rounded down; `//` differs between languages for negative numbers."""
    return torch.div(*_tensors(x, y), rounding_mode="floor")


def mod(x: Value, y: Value) -> torch.Tensor:
    """Rest x - y * floordiv(x, y): has the sign of y; `%` differs between languages for negative numbers."""
    return torch.remainder(*_tensors(x, y))


def load(table: torch.Tensor, i: Value, j: Value | None = None, k: Value | None = None) -> torch.Tensor:
    """table[i], table[i, j] or table[i, j, k]; an index beyond an end reads the element at that end.

    Values that are floating point come as fp32 at least, integers as int32, booleans as booleans.
    """
    given = [each for each in (i, j, k) if each is not None]
    places = tuple(
        place.long().to(table.device).clamp(0, size - 1)
        for place, size in zip(_tensors(*given), table.shape, strict=True)
    )
    found = table[places]
    if found.dtype == torch.bool:
        return found
    wide = torch.promote_types(found.dtype, torch.float32) if found.is_floating_point() else torch.int32
    return found.to(wide)


NAMES: tuple[str, ...] = (
    "abs", "exp", "exp2", "floordiv", "inf", "load", "log", "log2", "maximum", "minimum", "mod", "sigmoid", "sqrt",
    "tanh", "where",
)  # fmt: skip
