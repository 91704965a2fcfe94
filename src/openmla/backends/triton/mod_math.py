"""Device code: `m` of a mod, as Triton has it; the names and meanings of `openmla.mods.math`.

A table reaches the device as (pointer, size, stride, size, stride, ...), one pair for each dimension, each number n as
16 n + 2; see `openmla.backends.triton.inline`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

inf = tl.constexpr(float("inf"))


@triton.jit
def where(condition, x, y):
    """X where the condition holds, else y."""
    return tl.where(condition, x, y)


@triton.jit
def maximum(x, y):
    """The larger one; NaN if either is."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def minimum(x, y):
    """The smaller one; NaN if either is."""
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def abs(x):
    """|x|."""
    return tl.abs(x)


@triton.jit
def exp(x):
    """Exponential function."""
    return tl.exp(tl.cast(x, tl.float32))


@triton.jit
def exp2(x):
    """2 ** x."""
    return tl.exp2(tl.cast(x, tl.float32))


@triton.jit
def log(x):
    """Natural logarithm."""
    return tl.log(tl.cast(x, tl.float32))


@triton.jit
def log2(x):
    """Logarithm to base 2."""
    return tl.log2(tl.cast(x, tl.float32))


@triton.jit
def sqrt(x):
    """Square root."""
    return tl.sqrt(tl.cast(x, tl.float32))


@triton.jit
def tanh(x):
    """Hyperbolic tangent: by exponentials, near 0 by its series, where they would cancel."""
    x = tl.cast(x, tl.float32)
    square = x * x
    # The next term, 1382 / 155925 x^11, is 5e-8 of the result at 0.3.
    near = x + x * square * (
        -0.3333333333 + square * (0.1333333333 + square * (-0.0539682540 + square * 0.0218694885))
    )  # fmt: skip
    far = 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)
    return tl.where(tl.abs(x) < 0.3, near, far)


@triton.jit
def sigmoid(x):
    """1 / (1 + e ** -x)."""
    return 1.0 / (1.0 + tl.exp(-tl.cast(x, tl.float32)))


@triton.jit
def floordiv(x, y):
    """Quotient of integers, rounded down; Triton's own rounds towards 0."""
    x, y = tl.cast(x, tl.int32), tl.cast(y, tl.int32)
    quotient = x // y
    rest = x - quotient * y
    return quotient - ((rest != 0) & ((rest < 0) != (y < 0))).to(tl.int32)


@triton.jit
def mod(x, y):
    """Rest of `floordiv`, of integers."""
    return tl.cast(x, tl.int32) - floordiv(x, y) * tl.cast(y, tl.int32)


@triton.jit
def _place(index, size, stride):
    return tl.minimum(tl.maximum(index, 0), (size >> 4) - 1).to(tl.int64) * (stride >> 4)


@triton.jit
def load(table, i, j=None, k=None):
    """table[i], table[i, j] or table[i, j, k], each index held within its ends; fp32, int32 or boolean."""
    place = _place(i, table[1], table[2])
    if j is not None:
        place += _place(j, table[3], table[4])
    if k is not None:
        place += _place(k, table[5], table[6])
    value = tl.load(table[0] + place)
    if value.dtype.is_floating():
        value = value.to(tl.float32)
    elif value.dtype != tl.int1:
        value = value.to(tl.int32)
    return value
