"""Device code: `m` of a mod, as CuTe DSL has it; the names and meanings of `openmla.mods.math`.

Values are scalars of the DSL, one score of one thread, or plain numbers. What goes through exp, log, tanh and sigmoid is
that of the special function unit: 2^-22 of the result, and for tanh, 1 - 2 / (e^(2x) + 1), 2^-22 of 1.
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32

inf = float("inf")

_LOG2_E = 1.4426950408889634
_LN_2 = 0.6931471805599453


def is_real(x: Any) -> bool:
    """Is it a floating-point number, of the DSL or plain?"""
    return isinstance(x, float) or (hasattr(type(x), "is_float") and type(x).is_float)


def choose(condition: Any, x: Any, y: Any) -> Any:
    """X where the condition holds, else y, without a branch; fp32 if either is floating point, else int32 or boolean."""
    kind = Float32 if is_real(x) or is_real(y) else Int32
    if isinstance(x, bool | Boolean) and isinstance(y, bool | Boolean):
        kind = Boolean
    if isinstance(condition, bool):
        return kind(x if condition else y)
    return kind(cutlass.select_(condition, kind(x), kind(y)))


where = choose


def _extreme(x: Any, y: Any, is_first: Any) -> Any:
    found = choose(is_first, x, y)
    for each in (x, y):
        if is_real(each) and not isinstance(each, float):
            found = choose(each != each, each, found)
    return found


def maximum(x: Any, y: Any) -> Any:
    """The larger one; NaN if either is."""
    return _extreme(x, y, x > y)


def minimum(x: Any, y: Any) -> Any:
    """The smaller one; NaN if either is."""
    return _extreme(x, y, x < y)


def abs(x: Any) -> Any:
    """|x|."""
    if is_real(x):
        return cute.arch.fmax(Float32(x), -Float32(x), nan=True)
    return choose(x < 0, -x, x)


def exp2(x: Any) -> Float32:
    """2 ** x."""
    return Float32(cute.math.exp2(Float32(x), fastmath=True))


def exp(x: Any) -> Float32:
    """Exponential function."""
    return exp2(Float32(x) * Float32(_LOG2_E))


def log2(x: Any) -> Float32:
    """Logarithm to base 2."""
    return Float32(cute.math.log2(Float32(x), fastmath=True))


def log(x: Any) -> Float32:
    """Natural logarithm."""
    return log2(x) * Float32(_LN_2)


def sqrt(x: Any) -> Float32:
    """Square root."""
    return Float32(cute.math.sqrt(Float32(x), fastmath=True))


def tanh(x: Any) -> Float32:
    """Hyperbolic tangent; the instruction of that name keeps 11 bits, too few for a score."""
    grown = exp2(Float32(x) * Float32(2.0 * _LOG2_E))
    return Float32(1.0) - Float32(2.0) * cute.arch.rcp_approx(grown + Float32(1.0))


def sigmoid(x: Any) -> Float32:
    """1 / (1 + e ** -x)."""
    return cute.arch.rcp_approx(Float32(1.0) + exp(-Float32(x)))


def floordiv(x: Any, y: Any) -> Int32:
    """Quotient of integers, rounded down, whichever way the DSL rounds."""
    x, y = Int32(x), Int32(y)
    quotient = x // y
    rest = x - quotient * y
    return quotient - choose((rest != 0) & ((rest < 0) ^ (y < 0)), 1, 0)


def mod(x: Any, y: Any) -> Int32:
    """Rest of `floordiv`, of integers."""
    return Int32(x) - floordiv(x, y) * Int32(y)


def _place(index: Any, size: Any) -> Int32:
    index = Int32(index)
    return choose(index < 0, 0, choose(index >= size, size - 1, index))


def load(table: cute.Tensor, *indices: Any) -> Any:
    """table[i], table[i, j] or table[i, j, k], each index held within its ends; fp32, int32 or boolean."""
    place = tuple(_place(index, size) for index, size in zip(indices, table.shape, strict=True))
    value = table[place if len(place) > 1 else place[0]]
    if table.element_type is Boolean:
        return value
    return Float32(value) if is_real(value) else Int32(value)
