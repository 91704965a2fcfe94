"""Two CTAs, a cluster, share the tiles of a part and have twice the rows each: decode_dense_small, device code.

Each sums up every second tile for its own rows and the other's, sends the other's half of the result into the other's shared
memory (`st.async`, which counts its own bytes on the other's barrier), and adds what it gets. Behind that it has 16 rows over
all tiles of the part, as a CTA without a partner has, and the exchange goes on with these.

Against 16 rows over all tiles by each: half as many bytes from the L2, and a tile of 32 rows costs 2.0 us where two of 16 cost 3.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

SENT_BYTES = 32_768  # fp32 sums of 16 rows
STATS_BYTES = 128  # a maximum and a sum for each


class Pairs:
    """Mixin of `kernel.DecodeDenseSmall`."""

    kept: int
    warpgroups: int

    @cute.jit
    def init_turns(self, st: cutlass.Constexpr, warp: Int32):
        """The barriers of a piece: the other's statistics are here, its sums are here, and it has taken what it got."""
        if warp == 2:
            with cute.arch.elect_one():
                cute.arch.mbarrier_init(st.met.data_ptr(), 1)
                cute.arch.mbarrier_init(st.met.data_ptr() + 1, 1)
                cute.arch.mbarrier_init(st.met.data_ptr() + 2, 4 * self.warpgroups)

    @cute.jit
    def in_peer(self, address: Int32, rank: Int32) -> Int32:
        """The same place in the shared memory of a CTA of this cluster."""
        return cute.arch.inline_ptx(
            "mapa.shared::cluster.u32 {$w0}, {$r0}, {$r1};", write_only_types=[Int32], read_only_args=[address, rank]
        )

    @cute.jit
    def open_turn(
        self, st: cutlass.Constexpr, sm_top: cute.Tensor, sm_last: cute.Tensor, place: Int32, barrier: Int32, turn: Int32,
        tid: Int32,
    ):  # fmt: skip
        """A piece's statistics to the other, once it has taken those before; what this CTA awaits in turn."""
        met = st.met.data_ptr()
        if tid == 0:
            cute.arch.mbarrier_arrive_and_expect_tx(met, STATS_BYTES)
            cute.arch.mbarrier_arrive_and_expect_tx(met + 1, SENT_BYTES)
        cute.arch.mbarrier_wait(met + 2, turn ^ 1)
        self.send_stats(sm_top, sm_last, place, barrier, tid)

    @cute.jit
    def send_stats(self, sm_top: cute.Tensor, sm_last: cute.Tensor, place: Int32, barrier: Int32, tid: Int32):
        """Maximum and sum of each of the other's rows; `place` and `barrier` are the other's."""
        if tid < self.kept:
            row = self.kept + tid
            x = (sm_top[row, 0] + sm_top[row, 1]) + (sm_top[row, 2] + sm_top[row, 3])
            cute.arch.inline_ptx(
                "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [{$r0}], {{$r1}, {$r2}}, [{$r3}];",
                read_only_args=[place + tid * 8, sm_last[row], x, barrier],
            )

    @cute.jit
    def send_sums(self, o: cutlass.Constexpr, place: Int32, barrier: Int32):
        """Its sums of the other's rows, 16 bytes each; a warp's 4 KB are for the same warp there."""
        half = self.kept // 8
        for m in cutlass.range_constexpr(8 // self.warpgroups):
            for g in cutlass.range_constexpr(half):
                four = [o[m][(half + g) * 4 + i] for i in range(4)]
                cute.arch.inline_ptx(
                    "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [{$r0} + "
                    + str((m * half + g) * 512)
                    + "], {{$r1}, {$r2}, {$r3}, {$r4}}, [{$r5}];",
                    read_only_args=[place, *four, barrier],
                )

    @cute.jit
    def joined(self, sm_top: cute.Tensor, sm_last: cute.Tensor, sm_other: cute.Tensor, row: Int32):
        """(maximum, sum, factor of this CTA's sums, factor of the other's) of a row over the tiles of both."""
        mine, other = sm_last[row], sm_other[row, 0]
        peak = cute.arch.fmax(mine, other)
        shift = peak if peak > -Float32.inf else Float32(0.0)
        scale, other_scale = cute.math.exp2(mine - shift, fastmath=True), cute.math.exp2(other - shift, fastmath=True)
        x = (sm_top[row, 0] + sm_top[row, 1]) + (sm_top[row, 2] + sm_top[row, 3])
        return peak, x * scale + sm_other[row, 1] * other_scale, scale, other_scale

    @cute.jit
    def put_joined(
        self, sm_top: cute.Tensor, sm_last: cute.Tensor, sm_other: cute.Tensor, target: Int64, rows: Int32, pair: Int32,
        tid: Int32,
    ):  # fmt: skip
        """Statistics of the part's tiles to the exchange, as `publish` stores those of a CTA without a partner."""
        block = (tid // 16) % (self.kept // 8)
        top, x, _, _ = self.joined(sm_top, sm_last, sm_other, block * 8 + pair)
        next_top, y, _, _ = self.joined(sm_top, sm_last, sm_other, block * 8 + pair + 1)
        if block * 8 < rows:
            self.put(target + (self.kept * 2048 + tid * 16), 0, top, x, next_top, y)

    @cute.jit
    def add_sums(
        self, o: cutlass.Constexpr, sm_top: cute.Tensor, sm_last: cute.Tensor, sm_other: cute.Tensor, place: Int32,
        pair: Int32,
    ):  # fmt: skip
        """Its own rows over the tiles of both; `place` is where the other's sums of this thread lie."""
        half = self.kept // 8
        for g in cutlass.range_constexpr(half):
            _, _, even, other_even = self.joined(sm_top, sm_last, sm_other, g * 8 + pair)
            _, _, odd, other_odd = self.joined(sm_top, sm_last, sm_other, g * 8 + pair + 1)
            own, others = (even, odd), (other_even, other_odd)
            for m in cutlass.range_constexpr(8 // self.warpgroups):
                four = cute.arch.inline_ptx(
                    "ld.shared.v4.f32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0} + " + str((m * half + g) * 512) + "];",
                    write_only_types=[Float32] * 4,
                    read_only_args=[place],
                )
                for i in cutlass.range_constexpr(4):
                    o[m][g * 4 + i] = o[m][g * 4 + i] * own[i % 2] + four[i] * others[i % 2]
