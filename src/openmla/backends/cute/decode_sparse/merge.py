"""Requests in several pieces, merged by the CTAs that computed them: no launch behind the kernel. Device code.

Whoever computed piece i of n merges the units [128 i / n, 128 (i + 1) / n) of its 64 rows; a unit is what a warp stores at
once, 16 columns of 16 rows. The protocol is that of `decode_dense`: pieces lie as the accumulators do, each CTA counts its own,
and when it has no more it waits until all pieces of a request are counted, brings its units of all of them into the ring by
bulk copies, and adds them up in the order of the pieces. The count wraps to 0 with the last piece, so the next launch finds it
so. All CTAs are resident (the launch is cooperative), and nobody waits before all of its pieces are stored.

Partials are those of `halves`: fp16 with a scale for 128 columns of a row, as the cache has. Of 64 rows of a piece the scales,
fp32 [4][64], lie behind the units, and whoever merges multiplies the weights by them.
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from openmla.backends.cute import halves
from openmla.backends.cute.decode_sparse.config import PARTIAL_ROWS

UNIT_BYTES = 512
OF_WARP, UNITS = 32, 4 * 32  # units of 16 rows, of 64
ALIKE = 8  # units with the same scales
RING_BYTES = 131_072
SHARES = 2  # only the first and the last request of a part can be split
# Fields of a share: pieces of the request, slot of the first, which of them is this CTA's, the request. Behind the last share
# stands how many there are.
COUNT, SLOT0, SPLIT, OWNER = range(4)
SHARE_FIELDS = 4
SCALES = 8192  # floats behind the weights: the scales that they are multiplied by
BAR_VALUES = 3  # named barrier of the value warps
MAX_POLLS = 1 << 24  # some ten seconds; what is missing then is added up as it is, and the process lives on
LN2, LOG2_E = 0.6931471805599453, 1.4426950408889634


class Merge:
    """Mixin of `kernel.DecodeSparse`, for its value warps."""

    config: Any

    def merge_storage(self, store: Any) -> dict[str, Any]:
        """Names of the shared memory that only merging needs. Weights lie where Q was, rows' addresses where P was."""
        if not self.config.merges:
            return {}
        return {
            "parts_full": store.parts_full.data_ptr(),
            "share": store.share.get_tensor(cute.make_layout((SHARE_FIELDS, SHARES + 1))),
            "weights": cute.recast_ptr(store.q.data_ptr(), dtype=Float32),
            "lines": cute.make_tensor(cute.recast_ptr(store.p.data_ptr(), dtype=Int64), cute.make_layout(64)),
        }

    @cute.jit
    def begin_shares(self, c: cutlass.Constexpr):
        """No share yet."""
        share = c.share
        share[COUNT, SHARES] = Int32(0)

    @cute.jit
    def together(self):
        """All value warps are here."""
        cute.arch.barrier(barrier_id=BAR_VALUES, number_of_threads=256)

    @cute.jit
    def scale_units(
        self, c: cutlass.Constexpr, accs: cutlass.Constexpr, slot: Int32, half: Int32, factors: cute.Tensor
    ):
        """Make of a thread's `factors`, one for each group, those that bring the groups into fp16's range; store the scales."""
        peaks, is_huge = cute.make_rmem_tensor(4, Float32), Int32(0)
        for x in cutlass.range_constexpr(4):
            peaks[x] = halves.largest(self.group_of(accs, x))
            is_huge |= Int32(1) if peaks[x] == Float32.inf else Int32(0)
        if cute.arch.vote_any_sync(is_huge != 0):
            for x in cutlass.range_constexpr(4):
                peaks[x] = halves.largest_finite(self.group_of(accs, x))
        thread = cute.arch.shuffle_sync_bfly(c.thread, 0)
        row = thread // 32 * 16 + thread % 32 // 4
        there = self.block_of(c, slot) + Int64(UNITS * UNIT_BYTES + (half * 128 + row) * 4)
        for x in cutlass.range_constexpr(4):
            peak = peaks[x]
            for d in (1, 2):
                peak = cute.arch.fmax(peak, cute.arch.shuffle_sync_bfly(peak, d))
            factors[x], scale = halves.halve(peak, factors[x])
            if thread % 4 == 0:
                place = there + (x // 2 * 256 + x % 2 * 32)
                pointer = cute.make_ptr(Int32, place, cute.AddressSpace.gmem, assumed_align=4)
                cute.make_tensor(pointer, cute.make_layout(1))[0] = scale << 16

    def group_of(self, accs: cutlass.Constexpr, x: int) -> list[Any]:
        """Group x of a thread: 128 columns, those of accs[x // 2], of its row x % 2; four lanes share it."""
        return [accs[x // 2][4 * i + x % 2 * 2 + y] for i in range(16) for y in range(2)]

    @cute.jit
    def store_units(self, c: cutlass.Constexpr, accs: cutlass.Constexpr, slot: Int32, half: Int32):
        """A warp's part of a piece: 16 bytes per lane, 512 in a row per warp."""
        thread = cute.arch.shuffle_sync_bfly(c.thread, 0)
        unit = thread // 32 * OF_WARP + half * (OF_WARP // 2)
        there = self.block_of(c, slot) + Int64(unit * UNIT_BYTES + thread % 32 * 16)
        pointer = cute.make_ptr(Int32, there, cute.AddressSpace.gmem, assumed_align=16)
        units = cute.make_tensor(pointer, cute.make_layout((4, 8, 2), stride=(1, 128, 8 * 128)))
        words = cute.make_rmem_tensor(4, Int32)
        for h in cutlass.range_constexpr(2):
            for i in cutlass.range_constexpr(8):
                for x in cutlass.range_constexpr(4):
                    words[x] = halves.pack(accs[h][8 * i + 2 * x], accs[h][8 * i + 2 * x + 1])
                cute.autovec_copy(words, units[None, i, h])

    @cute.jit
    def block_of(self, c: cutlass.Constexpr, slot: Int32) -> Int64:
        """Address of this CTA's 64 rows of a piece."""
        block = c.token * cute.arch.grid_dim()[0] + c.m_block
        line = c.out_accum[slot, block * PARTIAL_ROWS, None]
        return line.iterator.toint()

    @cute.jit
    def count_of(self, c: cutlass.Constexpr, slot: Int32) -> Int64:
        """Address of the count of stored pieces of these 64 rows of the request whose first slot this is."""
        blocks_x, blocks_y, _ = cute.arch.grid_dim()
        block = c.token * blocks_x + c.m_block
        return c.redo.iterator.toint() + Int64(slot * (blocks_x * blocks_y) + block) * 4

    @cute.jit
    def announce(self, c: cutlass.Constexpr, slot: Int32, owner: Int32, first: Int32, pieces: Int32):
        """Count a piece that all value warps have stored, and note this CTA's share of its request."""
        self.together()
        if (c.group == 1) & (c.warp == 0):
            share = c.share
            if c.lane == 0:
                at = share[COUNT, SHARES]
                share[COUNT, at], share[SLOT0, at] = pieces, first
                share[SPLIT, at], share[OWNER, at] = slot - first, owner
                share[COUNT, SHARES] = at + 1
                cute.arch.inline_ptx(
                    "{ .reg .b32 old; atom.release.gpu.global.inc.u32 old, [{$r0}], {$r1}; }",
                    read_only_args=[self.count_of(c, first), pieces - 1],
                )
            cute.arch.sync_warp()

    @cute.jit
    def merge(self, c: cutlass.Constexpr):
        """The shares of this CTA, behind all of its pieces."""
        self.together()
        shares = cute.arch.make_warp_uniform(c.share[COUNT, SHARES])
        load = Int32(0)
        for index in cutlass.range(shares, unroll=1):
            pieces, slot, split = c.share[COUNT, index], c.share[SLOT0, index], c.share[SPLIT, index]
            begin, end = split * UNITS // pieces, (split + 1) * UNITS // pieces
            most = cutlass.max(RING_BYTES // UNIT_BYTES // pieces, 1)
            self.await_pieces(c, slot)
            at = begin
            while at < end:
                stop = cutlass.min(at + most, end)
                if at == begin:
                    self.weigh(c, index, pieces, begin, end, slot, stop)
                elif (c.group == 1) & (c.warp == 0):
                    self.fetch(c, pieces, at, stop, slot)
                cute.arch.mbarrier_wait(c.parts_full, load & 1)
                self.add_up(c, pieces, at, stop, begin // ALIKE)
                load += 1
                at = stop
                self.together()

    @cute.jit
    def await_pieces(self, c: cutlass.Constexpr, slot: Int32):
        """Until every piece of a request is stored. This CTA's are counted, so a count of 0 says that all are."""
        if (c.group == 1) & (c.warp == 0):
            address, polls = self.count_of(c, slot), Int32(MAX_POLLS)
            while polls > 0:
                count = cute.arch.inline_ptx(
                    "ld.acquire.gpu.global.b32 {$w0}, [{$r0}];", write_only_types=[Int32], read_only_args=[address]
                )
                polls = polls - 1 if count != 0 else Int32(0)
        self.together()

    @cute.jit
    def fetch(self, c: cutlass.Constexpr, pieces: Int32, at: Int32, stop: Int32, slot: Int32):
        """Start the copies of the units [at, stop) of all pieces into the ring, where nobody needs anything any more."""
        size = (stop - at) * UNIT_BYTES
        cute.arch.inline_ptx("fence.proxy.async;")  # others stored what the copy engine now reads
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(c.parts_full, pieces * size)
        cute.arch.sync_warp()
        data, step = self.block_of(c, slot), Int64(c.out_accum.stride[0]) * 4
        ring, barrier = c.ring_base.to(Int32), c.parts_full.toint().to(Int32)
        for piece in cutlass.range(c.lane, pieces, 32, unroll=1):
            cute.arch.inline_ptx(
                "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [{$r0}], [{$r1}], {$r2}, [{$r3}];",
                read_only_args=[
                    ring + piece * size, data + (Int64(piece) * step + Int64(at * UNIT_BYTES)), size, barrier,
                ],
            )  # fmt: skip

    @cute.jit
    def weigh(
        self, c: cutlass.Constexpr, index: Int32, pieces: Int32, begin: Int32, end: Int32, slot: Int32, stop: Int32
    ):  # fmt: skip
        """Weights of all pieces for the rows of the units [begin, end), into shared memory; their lse to memory.

        Eight threads per row. `weights` holds [the units' number / `alike`, from that of `begin` on][piece][16]. It lies where Q
        was: every value warp is through with Q, and with the table before, when the pieces are awaited.
        """
        tid = (c.group - 1) * 128 + c.thread
        per = OF_WARP // ALIKE
        first, eighth = begin // ALIKE, tid % 8
        lse, lines = c.lse, c.lines
        held, scale = (cute.make_rmem_tensor(4, Float32) for _ in range(2))
        for group in cutlass.range(first, (end + (ALIKE - 1)) // ALIKE, 2, unroll=1):
            mine = group + tid // 128
            row = mine // per * 16 + tid // 8 % 16
            many = pieces if mine * ALIKE < end else Int32(0)
            head = c.m_block * 64 + row
            is_row = head < c.h_q
            line = c.lse2_accum[slot, None]
            at = line.iterator.toint() + Int64(c.token * c.h_q + cutlass.min(head, c.h_q - 1)) * 4
            step = Int64(c.lse2_accum.stride[0]) * 4
            at_scale = self.block_of(c, slot) + Int64(UNITS * UNIT_BYTES + (mine % per * 64 + row) * 4)
            table = cute.make_tensor(
                c.weights + ((mine - first) * pieces * 16 + row % 16), cute.make_layout(512, stride=16)
            )  # fmt: skip
            scales = cute.make_tensor(table.iterator + SCALES, cute.make_layout(512, stride=16))
            peak = -Float32.inf
            for base in cutlass.range(0, many, 32, unroll=1):
                held.fill(-Float32.inf)
                for u in cutlass.range_constexpr(4):
                    piece = base + u * 8 + eighth
                    if piece < many:
                        held[u] = self.of_others(at + Int64(piece) * step)
                        scale[u] = self.of_others(at_scale + Int64(piece) * (Int64(c.out_accum.stride[0]) * 4))
                if (group == first) & (base == 0):
                    cute.arch.sync_warp()
                    if (c.group == 1) & (c.warp == 0):  # behind the loads, which would wait for these copies
                        self.fetch(c, pieces, begin, stop, slot)
                for u in cutlass.range_constexpr(4):
                    piece = base + u * 8 + eighth
                    if piece < many:
                        table[piece] = held[u]
                        scales[piece] = scale[u]
                    peak = cute.arch.fmax(peak, held[u])
            for d in (1, 2, 4):
                peak = cute.arch.fmax(peak, cute.arch.shuffle_sync_bfly(peak, d))
            shift = peak if peak > -Float32.inf else Float32(0.0)
            total = Float32(0.0)
            for piece in cutlass.range(eighth, many, 8, unroll=1):
                weight = cute.math.exp2(table[piece] - shift, fastmath=True)
                total += weight
                table[piece] = weight
            cute.arch.sync_warp()
            for d in (1, 2, 4):
                total += cute.arch.shuffle_sync_bfly(total, d)
            if many > 0:
                factor, lse2 = Float32(1.0) / total, peak + cute.math.log2(total, fastmath=True)
                if total == 0.0:  # sees nothing; a NaN stays one
                    factor, lse2 = Float32(0.0), -Float32.inf
                target = Int64(0)
                if is_row:
                    if c.has_sink != 0:
                        extra = cute.math.exp2(c.sink[head] * Float32(LOG2_E) - lse2, fastmath=True)
                        factor = factor / (Float32(1.0) + extra) if total != 0.0 else factor
                    row_of_out = c.out[c.share[OWNER, index], c.token, head, None]
                    target = row_of_out.iterator.toint()
                    # whoever has the first of the units of 16 rows
                    if (eighth == 0) & (mine % per == 0) & (begin <= mine * ALIKE):
                        lse[c.share[OWNER, index], head, c.token] = lse2 * Float32(LN2)
                if eighth == 0:
                    lines[row] = target
                for piece in cutlass.range(eighth, many, 8, unroll=1):
                    table[piece] = table[piece] * factor * scales[piece]
        self.together()

    @cute.jit
    def of_others(self, address: Int64):
        """A number that another CTA stored: not from L1, which may hold what was there before."""
        return cute.arch.inline_ptx(
            "ld.relaxed.gpu.global.b32 {$w0}, [{$r0}];", write_only_types=[Float32], read_only_args=[address]
        )

    @cute.jit
    def add_up(self, c: cutlass.Constexpr, pieces: Int32, at: Int32, stop: Int32, first: Int32):
        """Weighted sums of the units [at, stop), which lie in the ring piece by piece; a warp each."""
        words, sums = cute.make_rmem_tensor(4, Int32), cute.make_rmem_tensor(8, Float32)  # pairs of two rows in turn
        ring = cute.make_ptr(Int32, c.ring_base.to(Int32), cute.AddressSpace.smem, assumed_align=16)
        for unit in cutlass.range(at + (c.group - 1) * 4 + c.warp, stop, 8, unroll=1):
            sums.fill(0.0)
            data = cute.make_tensor(
                (ring + ((unit - at) * 128 + c.lane * 4)).align(16),
                cute.make_layout((4, 512), stride=(1, (stop - at) * 128)),
            )
            weights = c.weights + ((unit // ALIKE - first) * pieces * 16 + c.lane // 4)
            for piece in cutlass.range(pieces, unroll=4):
                cute.autovec_copy(data[None, piece], words)
                weight = (weights + piece * 16).load(), (weights + piece * 16 + 8).load()
                numbers = halves.unpack(words)
                for i in cutlass.range_constexpr(8):
                    sums[i] = sums[i] + numbers[i] * weight[i // 2 % 2]
            for i in cutlass.range_constexpr(0, 8, 2):
                line = c.lines[unit // OF_WARP * 16 + c.lane // 4 + 8 * (i // 2 % 2)]
                if line != 0:
                    two = cute.make_rmem_tensor(2, cutlass.BFloat16)
                    two[0], two[1] = sums[i].to(cutlass.BFloat16), sums[i + 1].to(cutlass.BFloat16)
                    column = unit % OF_WARP * 16 + i // 4 * 8 + c.lane % 4 * 2
                    target = cute.make_ptr(Int32, line + Int64(column * 2), cute.AddressSpace.gmem, assumed_align=4)
                    cute.make_tensor(target, cute.make_layout(1))[0] = cute.recast_tensor(two, Int32)[0]
