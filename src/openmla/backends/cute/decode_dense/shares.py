"""Shares of split requests, merged at the end of the kernel that computed their pieces: by its value warps.

    m = max_i lse_i      w_i = 2^(lse_i - m)      out = sum_i w_i out_i / sum_i w_i      lse = m + log2(sum_i w_i)

A partial of 64 rows x 512 columns lies as the accumulators do, in units of 512 bytes that a warp stores at once. In fp32 a unit is
8 columns of 16 rows, as `merge` describes, and a partial has 256. Where this kernel merges, partials are of half the bytes
(`openmla.backends.cute.halves`): a unit is 16 columns of 16 rows, 16 bytes of a lane t are the words (8 n + t % 4 * 2, row t / 4), the
same columns of the row 8 further, and both rows of the next 8 columns. Behind their 128 units are the scales of a row, a word
each: of its left and of its right 256 columns, because each is known to one warpgroup alone. 4 requests of 4,096 keys: 17 MB
out and in as fp32, 6 of 24 us (log 55).
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, const_expr

from openmla.backends.cute import halves

LN2, LOG2_E = 0.6931471805599453, 1.4426950408889634
SLOT_BYTES = 64 * 128 * 2  # of the ring
UNITS, UNIT_BYTES = 4 * 64, 512  # of a partial in fp32
HALVED_UNITS = UNITS // 2
SCALES_AT = HALVED_UNITS * UNIT_BYTES  # bytes
FEW_UNITS = 4  # of a share, of which warps take words and not units

# Fields of a share descriptor: pieces of the request (0 ends the list), slot of the first, which of them this CTA computed;
# tokens of the request.
COUNT, SLOT0, SPLIT, SHARE_TOKEN0, SHARE_S_Q, SHARE_COORD = range(6)
SHARE_FIELDS, SHARES = 6, 2  # descriptors between the planner and the value warps
MAX_POLLS = 1 << 24  # some ten seconds; what is missing then is added up as it is, and the process lives on


class Shares:
    """Steps of the value warps of `kernel.DecodeDense` behind their pieces."""

    units = UNITS  # of a block's partial that pieces store and the merge reads
    is_halved = False  # partials that this kernel merges are of half the bytes
    keeps_share = False  # a CTA with one piece keeps its own share

    @property
    def group_log2(self) -> int:
        """Units of 16 rows."""
        return 5 if self.is_halved else 6

    # ------------------------------------------------------------------ partials of half the bytes

    @cute.jit
    def halve_rows(
        self, c: cutlass.Constexpr, accs: cutlass.Constexpr, split_slot: Int32, half: Int32, row0: Int32, f0: Float32,
        f1: Float32,
    ):  # fmt: skip
        """What a thread's two rows are multiplied by, so that fp16 holds them; scales to memory."""
        if split_slot >= 0:  # noqa: SIM102 - two branches, each the same for all
            if c.is_merged != 0:
                rows = [[acc[i] for acc in accs for i in range(64) if i // 2 % 2 == side] for side in range(2)]
                p0, p1 = halves.largest(rows[0]), halves.largest(rows[1])
                if cute.arch.vote_any_sync((p0 == Float32.inf) | (p1 == Float32.inf)):  # others of the row are not
                    p0, p1 = halves.largest_finite(rows[0]), halves.largest_finite(rows[1])
                for d in (1, 2):
                    p0 = cute.arch.fmax(p0, cute.arch.shuffle_sync_bfly(p0, d))
                    p1 = cute.arch.fmax(p1, cute.arch.shuffle_sync_bfly(p1, d))
                f0, s0 = halves.halve(p0, f0)
                f1, s1 = halves.halve(p1, f1)
                block = c.out_accum[split_slot, c.kv_head * c.row_blocks + c.m_block, None].iterator.toint()
                at = block + Int64(SCALES_AT + row0 * 4 + half * 2)
                if (cute.arch.shuffle_sync_bfly(c.lane, 0) & 3) == 0:
                    for place, scale in ((at, s0), (at + 32, s1)):
                        cute.arch.inline_ptx(
                            "{ .reg .b16 low, high; mov.b32 {low, high}, {$r1}; st.global.b16 [{$r0}], low; }",
                            read_only_args=[place, scale],
                        )
        return f0, f1

    @cute.jit
    def store_halves(
        self, c: cutlass.Constexpr, accs: cutlass.Constexpr, split_slot: Int32, index: Int32, half: Int32
    ):  # fmt: skip
        """A warp's part of a partial, of numbers that `halve_rows` has scaled."""
        block = c.out_accum[split_slot, c.kv_head * c.row_blocks + c.m_block, None].iterator.toint()
        lane = cute.arch.shuffle_sync_bfly(c.lane, 0)
        place = block + Int64((c.warp * 32 + half * 16) * UNIT_BYTES + lane * 16)
        target = cute.make_ptr(Int32, place, cute.AddressSpace.gmem, assumed_align=16)
        for h in cutlass.range_constexpr(2):
            stays = self.is_own(c, index, half, h) if const_expr(self.keeps_share) else Boolean(False)
            if not stays:
                self.put_halves(accs[h], cute.make_tensor(target + h * 1024, cute.make_layout((4, 8), stride=(1, 128))))

    @cute.jit
    def put_halves(self, acc: cute.Tensor, units: cute.Tensor):
        """The eight units of 128 columns."""
        words = cute.make_rmem_tensor(4, Int32)
        for i in cutlass.range_constexpr(8):
            for j in cutlass.range_constexpr(4):
                words[j] = halves.pack(acc[8 * i + 2 * j], acc[8 * i + 2 * j + 1])
            cute.autovec_copy(words, units[None, i])

    # ------------------------------------------------------------------ partials in fp32

    @cute.jit
    def store_units(
        self, c: cutlass.Constexpr, accs: cutlass.Constexpr, split_slot: Int32, index: Int32, half: Int32
    ):  # fmt: skip
        """A warp's part of a partial."""
        block = c.out_accum[split_slot, c.kv_head * c.row_blocks + c.m_block, None].iterator
        thread = cute.arch.shuffle_sync_bfly(c.thread, 0)
        units = cute.make_tensor(
            (block + ((thread >> 5) * (64 * 128) + half * (32 * 128) + (thread & 31) * 4)).align(16),
            cute.make_layout((4, 16, 2), stride=(1, 128, 16 * 128)),
        )
        for h in cutlass.range_constexpr(2):
            quads = cute.make_tensor(accs[h].iterator, cute.make_layout((4, 16)))
            if const_expr(self.keeps_share and not self.is_halved):
                stays = self.is_own(c, index, half, h)
                if not stays:
                    for i in cutlass.range_constexpr(16):
                        cute.autovec_copy(quads[None, i], units[None, i, h])
            else:
                for i in cutlass.range_constexpr(16):
                    cute.autovec_copy(quads[None, i], units[None, i, h])

    # ------------------------------------------------------------------ the merge

    @cute.jit
    def merge(self, c: cutlass.Constexpr, own: Int32 | None = None):
        """Shares of the requests of which this CTA computed a piece, behind all of its pieces: by the value warps.

        Whoever computed piece i of n merges the units [units i / n, units (i + 1) / n) of a block: as many stretches of memory as
        there are pieces, which go into the ring at once. The order of a sum depends on n alone. Where `own` is not 0, the
        share of this CTA's piece is in the ring already.
        """
        turn, load = Int32(0), Int32(0)
        cute.arch.mbarrier_wait(c.share_full, 0)
        pieces = cute.arch.make_warp_uniform(c.share[COUNT, 0])
        while pieces > 0:
            index = turn & SHARES - 1
            split, slot, block = c.share[SPLIT, index], c.share[SLOT0, index], c.kv_head * c.row_blocks + c.m_block
            begin, end = split * self.units // pieces, (split + 1) * self.units // pieces
            together = cutlass.max(self.config.slots * SLOT_BYTES // UNIT_BYTES // pieces, 1)
            self.await_pieces(c, slot, block)
            kept = own if const_expr(own is None) else (split if own != 0 else Int32(-1))
            at = begin
            while at < end:
                stop = cutlass.min(at + together, end)
                if c.warp_idx == 4:
                    self.fetch(c, pieces, at, stop, c.out_accum[slot, block, None].iterator.toint(), kept)
                if at == begin:
                    self.weigh(c, index, pieces, begin, end, slot, block)
                cute.arch.mbarrier_wait(c.parts_full, load & 1)
                if const_expr(self.is_halved):
                    if stop - at <= FEW_UNITS:
                        self.add_up_words(c, pieces, at, stop, begin >> 5)
                    else:
                        self.add_up_halves(c, pieces, at, stop, begin >> 5)
                else:
                    self.add_up(c, pieces, at, stop, begin >> 6)
                cute.arch.fence_view_async_shared()
                load += 1
                at = stop
                if at < end:
                    cute.arch.barrier(barrier_id=3, number_of_threads=256)
            self.arrive(c.share_empty + index)
            turn += 1
            cute.arch.mbarrier_wait(c.share_full + (turn & SHARES - 1), (turn >> 1) & 1)
            pieces = cute.arch.make_warp_uniform(c.share[COUNT, turn & SHARES - 1])

    @cute.jit
    def await_pieces(self, c: cutlass.Constexpr, slot: Int32, block: Int32):
        """Until every piece of a request is stored. This CTA's are counted, so a count of 0 says that all are."""
        if c.warp_idx == 4:
            address = (c.arrivals.iterator + (slot * c.arrivals.stride[0] + block)).toint()
            polls = Int32(MAX_POLLS)
            while polls > 0:
                count = cute.arch.inline_ptx(
                    "ld.acquire.gpu.global.b32 {$w0}, [{$r0}];", write_only_types=[Int32], read_only_args=[address]
                )
                polls = polls - 1 if count != 0 else Int32(0)
        cute.arch.barrier(barrier_id=3, number_of_threads=256)

    @cute.jit
    def fetch(
        self, c: cutlass.Constexpr, pieces: Int32, at: Int32, stop: Int32, data: Int64, kept: Int32 | None = None
    ):  # fmt: skip
        """Start the copies of the units [at, stop) of all pieces into the ring, where nobody needs anything any more.

        `kept`: the piece that is there already, or -1.
        """
        size = (stop - at) * UNIT_BYTES
        cute.arch.inline_ptx("fence.proxy.async;")  # others stored what the copy engine now reads
        with cute.arch.elect_one():
            if const_expr(kept is None):
                cute.arch.mbarrier_arrive_and_expect_tx(c.parts_full, pieces * size)
            else:
                cute.arch.mbarrier_arrive_and_expect_tx(c.parts_full, (pieces if kept < 0 else pieces - 1) * size)
        cute.arch.sync_warp()
        ring, step = c.s_ring.iterator.toint().to(Int32), Int64(c.out_accum.stride[0]) * 4
        barrier = c.parts_full.toint().to(Int32)
        for piece in cutlass.range(c.lane, pieces, 32, unroll=1):
            if const_expr(kept is None):
                self.bring(ring + piece * size, data + (Int64(piece) * step + at * UNIT_BYTES), size, barrier)
            else:
                if piece != kept:
                    self.bring(ring + piece * size, data + (Int64(piece) * step + at * UNIT_BYTES), size, barrier)

    @cute.jit
    def bring(self, to: Int32, source: Int64, size: Int32, barrier: Int32):
        """Bytes of memory into shared memory, counted at a barrier."""
        cute.arch.inline_ptx(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [{$r0}], [{$r1}], {$r2}, [{$r3}];",
            read_only_args=[to, source, size, barrier],
        )

    @cute.jit
    def weigh(
        self, c: cutlass.Constexpr, index: Int32, pieces: Int32, begin: Int32, end: Int32, slot: Int32, block: Int32
    ):
        """Weights of all pieces for the rows of the units [begin, end), into shared memory; their lse to memory.

        Eight threads per row. `weights` holds [16 rows' number from that of `begin` on][piece][16], of halved partials
        [16 rows' number][half of the columns][piece][16], already multiplied by the scale of that half. It lies where Q was:
        every value warp is through with Q, and with the table before, when the pieces are awaited. There is room for 126
        pieces of shares of two groups of 16 rows; from 128 on a share is a unit at most.
        """
        tid, log2, halved = (c.warp_idx - 4) * 32 + c.lane, self.group_log2, 2 if self.is_halved else 1
        first, eighth, full = begin >> log2, tid & 7, 1 << log2
        lse2, both = cute.make_rmem_tensor(4, Float32), cute.make_rmem_tensor(4, Float32)
        stats = (c.lse2_accum.iterator + (slot * c.lse2_accum.stride[0] + block * 64)).toint()
        scales = c.out_accum[slot, block, None].iterator.toint() + SCALES_AT
        step, apart, weights = Int64(c.lse2_accum.stride[0]) * 4, Int64(c.out_accum.stride[0]) * 4, c.weights.iterator
        for group in cutlass.range(first, (end + full - 1) >> log2, 2, unroll=1):
            row = group * 16 + (tid >> 3)
            many = pieces if (row >> 4) * full < end else Int32(0)
            mine = stats + row * 4
            table = cute.make_tensor(
                weights + (((row >> 4) - first) * halved * pieces * 16 + (row & 15)), cute.make_layout(512, stride=16)
            )
            right = cute.make_tensor(table.iterator + pieces * 16, table.layout)
            peak = -Float32.inf
            for base in cutlass.range(0, many, 32, unroll=1):
                lse2.fill(-Float32.inf)
                for u in cutlass.range_constexpr(4):
                    piece = base + u * 8 + eighth
                    if piece < many:
                        lse2[u] = self.peer_word(mine + Int64(piece) * step)
                        if const_expr(self.is_halved):
                            both[u] = self.peer_word(scales + row * 4 + Int64(piece) * apart)
                for u in cutlass.range_constexpr(4):
                    piece = base + u * 8 + eighth
                    if piece < many:
                        table[piece] = lse2[u]
                        if const_expr(self.is_halved):
                            right[piece] = both[u]  # until the weight is known
                    peak = cute.arch.fmax(peak, lse2[u])
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
                # of the units of 16 rows, whoever has the first writes their lse
                factor = self.close_row(c, index, row, peak, total, eighth == 0, begin <= (row >> 4) * full)
                for piece in cutlass.range(eighth, many, 8, unroll=1):
                    if const_expr(self.is_halved):
                        weight, pair = table[piece] * factor, halves.scales(halves.bits(right[piece]))
                        table[piece], right[piece] = weight * pair[0], weight * pair[1]
                    else:
                        table[piece] = table[piece] * factor
        cute.arch.barrier(barrier_id=3, number_of_threads=256)

    def peer_word(self, address: Any) -> Any:
        """What another CTA may have written: not from L1, which may hold what was there before."""
        return cute.arch.inline_ptx(
            "ld.relaxed.gpu.global.b32 {$w0}, [{$r0}];", write_only_types=[Float32], read_only_args=[address]
        )

    @cute.jit
    def close_row(
        self, c: cutlass.Constexpr, index: Int32, row: Int32, peak: Float32, total: Float32, is_writer: Boolean,
        has_lse: Boolean,
    ):  # fmt: skip
        """What the weights of a row are multiplied by; its lse to memory, its place in out to `lines`."""
        lse, lines, line = c.lse, c.lines, Int64(0)
        factor, lse2 = Float32(1.0) / total, peak + cute.math.log2(total, fastmath=True)
        if total == 0.0:  # sees nothing; a NaN stays one
            factor, lse2 = Float32(0.0), -Float32.inf
        flat = c.m_block * 64 + row
        if flat < c.share[SHARE_S_Q, index] * c.heads:
            token = flat // c.heads
            head = c.kv_head * c.heads + flat - token * c.heads
            coord, token = c.share[SHARE_COORD, index], c.share[SHARE_TOKEN0, index] + token
            if c.has_sink != 0:
                extra = cute.math.exp2(c.attn_sink[head] * Float32(LOG2_E) - lse2, fastmath=True)
                factor = factor / (Float32(1.0) + extra) if total != 0.0 else factor
            line = c.out[coord, token, head, None].iterator.toint()
            if is_writer & has_lse:
                lse[coord, head, token] = lse2 * Float32(LN2)
        if is_writer:
            lines[row] = line
        return factor

    @cute.jit
    def add_up(self, c: cutlass.Constexpr, pieces: Int32, at: Int32, stop: Int32, first: Int32):
        """Weighted sums of the units [at, stop), which lie in the ring piece by piece; a warp each."""
        ring, table, lines = cute.recast_ptr(c.s_ring.iterator, None, Float32), c.weights.iterator, c.lines
        value = cute.make_rmem_tensor(4, Float32)
        sums = cute.make_rmem_tensor(4, Float32)
        for unit in cutlass.range(at + c.warp_idx - 4, stop, 8, unroll=1):
            sums.fill(0.0)
            data = cute.make_tensor(
                (ring + ((unit - at) * 128 + c.lane * 4)).align(16),
                cute.make_layout((4, 512), stride=(1, (stop - at) * 128)),
            )
            weights = table + ((unit >> 6) - first) * pieces * 16 + (c.lane >> 2)
            for piece in cutlass.range(pieces, unroll=4):
                cute.autovec_copy(data[None, piece], value)
                weight0, weight1 = (weights + piece * 16).load(), (weights + piece * 16 + 8).load()
                for i in cutlass.range_constexpr(4):
                    sums[i] = sums[i] + value[i] * (weight0 if i < 2 else weight1)
            for side in cutlass.range_constexpr(2):
                line = lines[(unit >> 6) * 16 + (c.lane >> 2) + 8 * side]
                if line != 0:
                    two = cute.make_rmem_tensor(2, self.dtype)
                    two[0], two[1] = sums[2 * side].to(self.dtype), sums[2 * side + 1].to(self.dtype)
                    target = cute.make_ptr(
                        Int32,
                        line + Int64((unit & 63) * 16 + (c.lane & 3) * 4),
                        cute.AddressSpace.gmem,
                        assumed_align=4,
                    )
                    cute.make_tensor(target, cute.make_layout(1))[0] = cute.recast_tensor(two, Int32)[0]

    @cute.jit
    def add_up_halves(self, c: cutlass.Constexpr, pieces: Int32, at: Int32, stop: Int32, first: Int32):
        """`add_up` of halved partials."""
        ring, table, lines = cute.recast_ptr(c.s_ring.iterator, None, Int32), c.weights.iterator, c.lines
        words = cute.make_rmem_tensor(4, Int32)
        sums = cute.make_rmem_tensor(8, Float32)
        for unit in cutlass.range(at + c.warp_idx - 4, stop, 8, unroll=1):
            sums.fill(0.0)
            data = cute.make_tensor(
                (ring + ((unit - at) * 128 + c.lane * 4)).align(16),
                cute.make_layout((4, 512), stride=(1, (stop - at) * 128)),
            )
            weights = table + ((unit >> 4) - first * 2) * pieces * 16 + (c.lane >> 2)
            for piece in cutlass.range(pieces, unroll=4):
                cute.autovec_copy(data[None, piece], words)
                weight0, weight1 = (weights + piece * 16).load(), (weights + piece * 16 + 8).load()
                values = halves.unpack(words)
                for i in cutlass.range_constexpr(8):
                    sums[i] = sums[i] + values[i] * (weight0 if i % 4 < 2 else weight1)
            for j in cutlass.range_constexpr(4):
                line = lines[(unit >> 5) * 16 + (c.lane >> 2) + 8 * (j & 1)]
                if line != 0:
                    self.put_word(
                        line + Int64((unit & 31) * 32 + (j >> 1) * 16 + (c.lane & 3) * 4), sums[2 * j], sums[2 * j + 1]
                    )

    @cute.jit
    def add_up_words(self, c: cutlass.Constexpr, pieces: Int32, at: Int32, stop: Int32, first: Int32):
        """`add_up_halves` of so few units that warps would be left over: a warp takes a word of every lane's four."""
        ring, table, lines = cute.recast_ptr(c.s_ring.iterator, None, Int32), c.weights.iterator, c.lines
        words = cute.make_rmem_tensor(1, Int32)
        for task in cutlass.range(c.warp_idx - 4, (stop - at) * 4, 8, unroll=1):
            unit, j = at + (task >> 2), task & 3
            low, high = Float32(0.0), Float32(0.0)
            data = ring + ((unit - at) * 128 + c.lane * 4 + j)
            row = (c.lane >> 2) + 8 * (j & 1)
            weights = table + ((unit >> 4) - first * 2) * pieces * 16 + row
            for piece in cutlass.range(pieces, unroll=8):
                words[0] = (data + piece * (stop - at) * 128).load()
                weight = (weights + piece * 16).load()
                values = halves.unpack(words)
                low, high = low + values[0] * weight, high + values[1] * weight
            line = lines[(unit >> 5) * 16 + row]
            if line != 0:
                self.put_word(line + Int64((unit & 31) * 32 + (j >> 1) * 16 + (c.lane & 3) * 4), low, high)

    @cute.jit
    def put_word(self, address: Int64, low: Float32, high: Float32):
        """Two columns of out."""
        two = cute.make_rmem_tensor(2, self.dtype)
        two[0], two[1] = low.to(self.dtype), high.to(self.dtype)
        target = cute.make_ptr(Int32, address, cute.AddressSpace.gmem, assumed_align=4)
        cute.make_tensor(target, cute.make_layout(1))[0] = cute.recast_tensor(two, Int32)[0]
