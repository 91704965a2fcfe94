"""Partials of decode_dense_small as fp32, for fp16 results: device code, what `merge.Merge` has for fp16 partials.

Their rounding would be as large as that of the result: a row that one column decides (family `outlier`) then errs by up to
1.7 times what the rule allows, 1.0 with these (simulated, two to sixteen pieces). Records are 16 bytes, units 512, without powers.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64

UNWRITTEN = -1
MAX_POLLS = 1 << 24


class Wide:
    """Mixin of `kernel.DecodeDenseSmall`."""

    kept: int
    warpgroups: int
    piece_bytes: int
    look: Any  # of Merge, as the next three
    place_of: Any
    put: Any
    unwrite: Any

    @cute.jit
    def add_wide(
        self, sums: cute.Tensor, values: cute.Tensor, weights: cute.Tensor, first: cutlass.Constexpr, count: cutlass.Constexpr
    ):  # fmt: skip
        """As `add_pieces`."""
        for u in cutlass.range_constexpr(first, first + count):  # the weights of slot u are lane 4 u + lane % 4's
            weight = [cute.arch.shuffle_sync(weights[r], u * 4, mask_and_clamp=0x31F) for r in range(2)]
            for i in cutlass.range_constexpr(4):
                sums[i] = sums[i] + values[i, u] * weight[i % 2]

    @cute.jit
    def await_wide_units(
        self, loaded: cute.Tensor, place: Int64, first: Int32, end_unit: Int32, pieces: Int32, per: cutlass.Constexpr
    ):
        """16 bytes per lane of 8 / per units of each piece, as soon as all are there."""
        for u in cutlass.range_constexpr(8):
            is_there = (first + u // per < end_unit) & (u % per < pieces)
            loaded[0, u] = Int32(UNWRITTEN) if is_there else Int32(0)
            loaded[1, u], loaded[2, u], loaded[3, u] = Int32(0), Int32(0), Int32(0)
        polls = Int32(MAX_POLLS)
        while polls > 0:
            for u in cutlass.range_constexpr(8):
                data = place + self.place_of(first + u // per) * 512
                self.look(loaded[None, u], u % per * self.piece_bytes, data)
            is_missing = cutlass.Boolean(False)
            for u in cutlass.range_constexpr(8):
                is_missing = is_missing | (loaded[0, u] == UNWRITTEN)
            polls -= 1
            if not cute.arch.vote_any_sync(is_missing):
                polls = Int32(0)

    @cute.jit
    def await_wide(self, loaded: cute.Tensor, address: Int64, count: Int32, lane: Int32):
        """A unit's 16 bytes per lane of eight pieces, as soon as all are there."""
        for u in cutlass.range_constexpr(8):
            loaded[0, u] = Int32(UNWRITTEN) if u < count else Int32(0)
            loaded[1, u], loaded[2, u], loaded[3, u] = Int32(0), Int32(0), Int32(0)
        for u in cutlass.range_constexpr(8):
            self.look(loaded[None, u], u * self.piece_bytes, address + lane * 16)
        polls = Int32(MAX_POLLS)
        while polls > 0:
            is_missing = cutlass.Boolean(False)
            for u in cutlass.range_constexpr(8):
                is_missing = is_missing | (loaded[0, u] == UNWRITTEN)
            polls -= 1
            if cute.arch.vote_any_sync(is_missing):
                for u in cutlass.range_constexpr(8):
                    self.look(loaded[None, u], u * self.piece_bytes, address + lane * 16)
            else:
                polls = Int32(0)

    @cute.jit
    def forget_wide(self, data: Int64, stats: Int64, count: Int32, lane: Int32):
        """Mark what was read as unwritten, for the next launch."""
        mine = data + lane * 16
        for u in cutlass.range_constexpr(8):
            if u < count:
                self.unwrite(mine, u * self.piece_bytes)
        if lane >> 2 < count:
            self.unwrite(stats, 0)

    @cute.jit
    def store_wide(self, o: cutlass.Constexpr, place: Int64, rows: Int32):
        """The same as fp32: 16 bytes per thread, 512 in a row per warp."""
        for g in cutlass.range_constexpr(self.kept // 8):
            if g * 8 < rows:
                for m in cutlass.range_constexpr(8 // self.warpgroups):
                    four = [o[m][g * 4 + i] for i in range(4)]
                    self.put(place, (m * (self.kept // 8) + g) * 2048, *four)
