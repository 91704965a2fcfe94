"""Device code: the probabilities of a tile behind a soft cap, a * tanh(b * score), without the special function unit.

    2^(e - r),  e = a log2(e) tanh(x),  x = b * score,  tanh(x) = x (C0 + x^2 (C1 + x^2 C2))   for |x| <= NEAR, to 2^-22

Three multiplications more per score than plain scores have. A capped score is bounded, so the reference r that others keep
per row is a constant here: nobody looks for a maximum, and O is never scaled.

The polynomial rises everywhere, above NEAR too far and below -NEAR too low. So two comparisons per row and thread tell
whether it may stand for tanh, both of sums that are needed anyway:

    a tile's 16 probabilities add up to that of NEAR at most       then no x is above NEAR
    all so far add up to so much per tile, at least                then what those below -NEAR lack is no loss
Where they do not hold, for a NaN too, the tile is computed once more by the function itself.

Where two warps load, the right half of the tile before may be multiplied when three quarters of the probabilities are there,
not when the scores are complete: the left half is then alone, ends 90 clk earlier, and its slots are what the scores of the
next tile wait for. At two tokens of 128 heads 8 % over plain decode without that, 2.1 with it (docs/mods.md).
"""

from __future__ import annotations

import math
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

LOG2_E = 1.4426950408889634
NEAR = 0.3
# The odd polynomial of degree 5 whose largest distance from tanh on [0, NEAR] is least: 1.85e-7, at a cap of 60 1.1e-5 in a score.
C0, C1, C2 = 0.99999586, -0.33297245, 0.12521143
LOSS = 2.0**-17  # of a row's sum: what probabilities below -NEAR may lack together
OPENS = 3  # the quarter of the probabilities in front of which the right gate opens, where `Config.opens_late`
TINY = 2.0**-100  # of the last coefficient: below, too little of it would be left
HIGHEST = 40.0  # log2 of the largest probability: 2^20 keys of values up to 2^67 are then within fp32


def reference(amplitude: float) -> float:
    """What is subtracted from exponents in base 2."""
    return max(amplitude * LOG2_E - HIGHEST, 0.0)


def limits(amplitude: float) -> tuple[float, float]:
    """(the most that 16 probabilities may add up to, the least that those of a row must, per tile), with a reference of 0."""

    def lack(x: float) -> float:
        z = x * x
        return abs(math.exp(-amplitude * math.tanh(x)) - math.exp(-amplitude * x * (C0 + z * (C1 + z * C2))))

    worst = max(lack(NEAR + step / 256) for step in range(1024))
    return math.exp(amplitude * math.tanh(NEAR)), 16 * worst / LOSS


class SoftCap:
    """What `DecodeDense` does where its one mod is a soft cap."""

    config: Any

    @cute.jit
    def capped(
        self, c: cutlass.Constexpr, s: cutlass.Constexpr, acc: cute.Tensor, piece: Int32, j: Int32, tile: Int32,
        buf: Int32, hidden0: Int32, hidden1: Int32, l0: Float32, l1: Float32,
    ):  # fmt: skip
        """Probabilities of a tile into shared memory; row sums behind it. Rows that are hidden count for nothing."""
        amplitude, slope = self.config.cap
        packed, store, p_from, p_to = s.packed, s.store, s.p_from, s.p_to
        r = reference(amplitude)
        most, least = (limit * 2.0**-r for limit in limits(amplitude))
        k = c.scale_log2 * Float32(slope)
        b0 = k * Float32(amplitude * LOG2_E)
        b1, b2 = b0 * (k * k) * Float32(C1), b0 * (k * k) * (k * k) * Float32(C2)
        b0 = b0 * Float32(C0)
        most = Float32(most) if b2 >= Float32(TINY) else Float32(0.0)
        t0, t1 = Float32(0.0), Float32(0.0)
        for group in cutlass.range_constexpr(4):
            if const_expr(group == OPENS and self.config.opens_late):
                self.arrive(c.go + 2 + (buf ^ 1))
            for x in cutlass.range_constexpr(8 * group, 8 * group + 8):
                z = acc[x] * acc[x]
                rise = cute.math.fma(cute.math.fma(z, b2, b1), z, b0)
                value = Float32(cute.math.exp2(cute.math.fma(acc[x], rise, Float32(-r)), fastmath=True))
                packed[x] = value.to(self.dtype)
                t0, t1 = (t0 + value, t1) if (x // 2) % 2 == 0 else (t0, t1 + value)
            cute.copy(store, p_from[(None, group), None, None], p_to[(None, group), None, None, buf])
        floor = Float32(j + 1) * Float32(least)
        fits0 = ((t0 <= most) & (l0 + t0 >= floor)) | (hidden0 != 0)
        fits1 = ((t1 <= most) & (l1 + t1 >= floor)) | (hidden1 != 0)
        if not cute.arch.vote_all_sync(fits0 & fits1):
            self.modify(c, acc, piece, j, tile)
            t0, t1 = Float32(0.0), Float32(0.0)
            for group in cutlass.range_constexpr(4):
                for x in cutlass.range_constexpr(8 * group, 8 * group + 8):
                    # +inf makes the row NaN, as elsewhere, where inf - inf does
                    score = cutlass.select_(acc[x] == Float32.inf, Float32(math.nan), acc[x])
                    value = Float32(cute.math.exp2(cute.math.fma(score, Float32(LOG2_E), Float32(-r)), fastmath=True))
                    packed[x] = value.to(self.dtype)
                    t0, t1 = (t0 + value, t1) if (x // 2) % 2 == 0 else (t0, t1 + value)
                cute.copy(store, p_from[(None, group), None, None], p_to[(None, group), None, None, buf])
        return l0 + t0, l1 + t1
