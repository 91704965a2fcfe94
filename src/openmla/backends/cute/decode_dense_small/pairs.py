"""Two CTAs, a cluster, share the tiles of a part and have twice the rows each: decode_dense_small, device code.

Each sums up every second tile for its own rows and the other's, sends the other's half of the result into the other's shared
memory (`st.async`, which counts its own bytes on the other's barrier), and adds what it gets. Behind that it has 16 rows over
all tiles of the part, as a CTA without a partner has, and the exchange goes on with these.

Against 16 rows over all tiles by each: half as many bytes from the L2, and a tile of 32 rows costs 2.0 us where two of 16 cost 3.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from openmla.backends.cute import halves

STATS_BYTES = 128  # a maximum and a sum for each


def sent_bytes(is_halved: bool) -> int:
    """Sums of 16 rows: as fp16 (`halves`) and a power of two for 16 columns, or as fp32."""
    return 16_384 + 128 if is_halved else 32_768


class Pairs:
    """Mixin of `kernel.DecodeDenseSmall`."""

    kept: int
    warpgroups: int
    is_halved: bool
    sent_bytes: int

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
            cute.arch.mbarrier_arrive_and_expect_tx(met + 1, self.sent_bytes)
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
    def send_sums(self, o: cutlass.Constexpr, place: Int32, barrier: Int32, warp: Int32, lane: Int32):
        """Its sums of the other's rows as fp16, 16 bytes of a thread at once; a warp's 2 KB are for the same warp there."""
        first, powers = self.kept // 2, []  # accumulators of a thread for the rows of one CTA
        for m in cutlass.range_constexpr(8 // self.warpgroups):
            values = [o[m][first + i] for i in range(first)]
            factor, power = halves.halve(halves.of_warp(halves.largest_finite(values)), Float32(1.0))
            words = [halves.pack(values[i] * factor, values[i + 1] * factor) for i in range(0, first, 2)]
            powers.append(power << 16)
            self.send_four(place + m * 512, words, barrier)
        if lane == 0:
            self.send_four(place + (16_384 - warp * 2_032), powers, barrier)

    @cute.jit
    def send_four(self, place: Int32, words: cutlass.Constexpr, barrier: Int32):
        """16 bytes into the other's shared memory."""
        cute.arch.inline_ptx(
            "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}}, [{$r5}];",
            read_only_args=[place, *words, barrier],
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
            self.put(target + (self.kept * (1024 if self.is_halved else 2048) + tid * 16), 0, top, x, next_top, y)

    @cute.jit
    def add_sums(
        self, o: cutlass.Constexpr, sm_top: cute.Tensor, sm_last: cute.Tensor, sm_other: cute.Tensor, place: Int32,
        pair: Int32, warp: Int32, lane: Int32,
    ):  # fmt: skip
        """Its own rows over the tiles of both; `place` is where the other's sums of this thread lie."""
        powers = self.four_here(place + (16_384 - warp * 2_032 - lane * 16), Float32)
        own, others = [], []  # of the rows of o[m][i], by i // 4 * 2 + i % 2
        for g in cutlass.range_constexpr(self.kept // 8):
            for r in cutlass.range_constexpr(2):
                _, _, mine, other = self.joined(sm_top, sm_last, sm_other, g * 8 + pair + r)
                own.append(mine)
                others.append(other)
        words = cute.make_rmem_tensor(cute.make_layout(4), Int32)
        for m in cutlass.range_constexpr(8 // self.warpgroups):
            words[0], words[1], words[2], words[3] = self.four_here(place + m * 512, Int32)
            values = halves.unpack(words)
            for i in cutlass.range_constexpr(self.kept // 2):
                row = i // 4 * 2 + i % 2
                o[m][i] = o[m][i] * own[row] + values[i] * (others[row] * powers[m])

    @cute.jit
    def four_here(self, place: Int32, kind: cutlass.Constexpr):
        """16 bytes of its own shared memory."""
        return cute.arch.inline_ptx(
            "ld.shared.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
            write_only_types=[kind] * 4,
            read_only_args=[place],
        )

    @cute.jit
    def send_wide(self, o: cutlass.Constexpr, place: Int32, barrier: Int32):
        """`send_sums` as fp32; a warp's 4 KB are for the same warp there."""
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
    def add_wide_sums(
        self, o: cutlass.Constexpr, sm_top: cute.Tensor, sm_last: cute.Tensor, sm_other: cute.Tensor, place: Int32,
        pair: Int32,
    ):  # fmt: skip
        """`add_sums` of fp32."""
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
