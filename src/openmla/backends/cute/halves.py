"""Device code: partial results of a split in 16 bits, which a merge reads back.

A group of numbers of one row, those of a thread or of several that share it, is stored as fp16 of x * 2^k, with k such that
the largest of them is in [2^14, 2^15), and beside it the scale 2^-k as bf16, which holds every power of two. So a number loses
2^-11 of itself while it is at most 2^28 below the largest of its group, whatever that is, and 2^-39 of the largest behind. NaN
and infinity stay what they are. bf16 would lose 2^-8, as much as the rounding of a bf16 result does.

Whoever merges multiplies the weight of a piece by its scale and adds up in fp32: nothing is done to every number but the
conversion, on both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float16, Float32, Int32

TOP = 14  # the exponent of a group's largest number
# Of a group whose numbers are all tiny: its scale times a weight of 2^-26 is not yet subnormal.
MOST = 100


def magnitude(x: Any) -> Any:
    """|x|, which costs nothing where a maximum reads it."""
    return cute.arch.inline_ptx("abs.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[x])


def largest(values: Sequence[Any]) -> Any:
    """The largest magnitude; NaN does not count. In two chains, because each maximum waits for the one before."""
    peaks = [Float32(0.0), Float32(0.0)]
    for i, value in enumerate(values):
        peaks[i % 2] = cute.arch.fmax(peaks[i % 2], magnitude(value))
    return cute.arch.fmax(*peaks)


def largest_finite(values: Sequence[Any]) -> Any:
    """The largest magnitude that is neither infinite nor NaN, in two integer operations each.

    Twice the bits, and one more in the exponent: the sign goes, and what is not finite wraps around to less than any number.
    """
    peaks = [Int32(1 << 24), Int32(1 << 24)]
    for i, value in enumerate(values):
        moved = cute.arch.inline_ptx(
            "mad.lo.u32 {$w0}, {$r0}, 2, 0x1000000;", write_only_types=[Int32], read_only_args=[bits(value)]
        )
        peaks[i % 2] = _larger(peaks[i % 2], moved)
    return number(
        cute.arch.inline_ptx(
            "{ .reg .b32 x; shr.u32 x, {$r0}, 1; sub.u32 {$w0}, x, 0x800000; }",
            write_only_types=[Int32],
            read_only_args=[_larger(*peaks)],
        )
    )


def of_warp(peak: Any) -> Any:
    """The largest peak of a warp's lanes, which are all here: positive numbers compare as their bits do."""
    return number(
        cute.arch.inline_ptx(
            "redux.sync.max.u32 {$w0}, {$r0}, 0xffffffff;", write_only_types=[Int32], read_only_args=[bits(peak)]
        )
    )


def halve(peak: Any, factor: Any) -> tuple[Any, Any]:
    """(factor * 2^k, bits of 2^-k as bf16) for numbers of which `factor` times the largest is `factor * peak`."""
    exponent = bits(peak * factor) >> 23 & 255
    k = cutlass.min(cutlass.min(TOP + 127 - exponent, MOST), 253 - (bits(factor) >> 23 & 255))  # factor * 2^k is finite
    return factor * number(127 + k << 23), 127 - k << 7


def pack(low: Any, high: Any) -> Any:
    """Two numbers as fp16 in one word."""
    return cute.arch.inline_ptx(
        "cvt.rn.f16x2.f32 {$w0}, {$r1}, {$r0};", write_only_types=[Int32], read_only_args=[low, high]
    )


def unpack(words: cute.Tensor) -> list[Any]:
    """The numbers of a register tensor of words, two each."""
    count = 2 * cute.size(words)
    numbers = cute.make_tensor(cute.recast_ptr(words.iterator, dtype=Float16), cute.make_layout(count))
    return [numbers[i].to(Float32) for i in range(count)]


def scales(word: Any) -> tuple[Any, Any]:
    """The two scales of a word: in its low and in its high half."""
    return number(word << 16), number(word & Int32(-65536))


def bits(x: Any) -> Any:
    """Of a number, as a word."""
    return cute.arch.inline_ptx("mov.b32 {$w0}, {$r0};", write_only_types=[Int32], read_only_args=[x])


def number(word: Any) -> Any:
    """With these bits."""
    return cute.arch.inline_ptx("mov.b32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[word])


def _larger(left: Any, right: Any) -> Any:
    return cute.arch.inline_ptx("max.u32 {$w0}, {$r0}, {$r1};", write_only_types=[Int32], read_only_args=[left, right])
