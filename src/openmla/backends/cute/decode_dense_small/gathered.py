"""Loads of decode_dense_small over rows that index lists name one by one. Device code.

A request of the plan is one query token, its keys are the first `topk_length` of its `topk` indices. An index is
page * page_size + place of a slot of the cache; -1 is no key, and what is neither is none either and leaves a fault. Rows of
no key become zeros, and the tile's description has the consumers mask them.

Each of four loading warps takes 16 of a tile's 64 rows, one bulk copy each. The address of a copy must be the same for the
whole warp, so 16 rows are 16 copies in a row, their addresses in uniform registers; where a row is missing, a loop over lanes.
With one warp and that loop it took twice as long as a tile may.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint16, Uint32

from openmla.backends.cute.decode_dense_small.loads import M

INDEX_OUT_OF_RANGE = 8
TOPK_LENGTH_OUT_OF_RANGE = 16
NO_ROW = -1  # instead of a row's distance from the cache's start in 16 bytes
LOADERS = 4  # loading warps
ROWS = M // LOADERS  # of each


class Gathered:
    """Mixin of `kernel.DecodeDenseSmall` for index lists over byte caches."""

    row_bytes: int
    stages: int

    @cute.jit
    def prefetch_lists(self, indices: cute.Tensor, parts: Int32, part: Int32):
        """Index lists towards L2 while the plan is on its way: every CTA asks for other lines."""
        line = (part + parts * cute.arch.lane_idx()) * 128
        size = Int64(indices.shape[0] - 1) * indices.stride[0] + (indices.shape[1] - 1) * indices.stride[1]
        if line < (size + indices.shape[2]) * 4:
            address = indices.iterator.toint() + line
            cute.arch.inline_ptx("prefetch.global.L2 [{$r0}];", read_only_args=[address])

    @cute.jit
    def token_of(self, request: Int32, s_q: Int32):
        """(first, second) index of a request of the plan in q, out, lse and the lists."""
        where, place = request, Int32(0)
        if s_q > 1:
            where = cute.arch.make_warp_uniform(request // s_q)  # a division leaves it in a register of each lane
            place = request - where * s_q
        return where, place

    @cute.jit
    def index_at(
        self, indices: cute.Tensor, where: Int32, place: Int32, token: Int32, loader: Int32, lane: Int32
    ) -> Int32:
        """The lane's index of the tile at `token`: asked for two tiles ahead, and without waiting for the list's length."""
        position = token + loader * ROWS + lane
        index = Int32(NO_ROW)
        if (lane < ROWS) & (position < indices.shape[2]):
            index = indices[where, place, position]
        return index

    @cute.jit
    def produce_gathered(
        self,
        kv: cute.Tensor,
        indices: cute.Tensor,
        lengths: cute.Tensor,
        metadata: cute.Tensor,
        faults: cute.Tensor,
        s_q: Int32,
        unit: Int32,
        part: Int32,
        loader: Int32,
        full: cutlass.Constexpr,
        empty: cutlass.Constexpr,
        sm_info: cute.Tensor,
        ring_base: Int32,
        first_range: tuple[Int32, ...],
    ):
        """A loading warp: its rows of every tile of every piece of this part, in ring order; `first_range`: see `range_of`."""
        stage = Int32(0)
        phase = Int32(1)  # the first lap finds every stage free
        bad = Int32(0)
        lane = cute.arch.lane_idx()
        number, found = Int32(0), first_range
        while number < metadata.shape[0]:
            begin_request, end_request, begin, last_end, _ = found
            begin, last_end = begin * unit, last_end * unit
            number = number + 1 if begin_request <= end_request else Int32(metadata.shape[0])
            found = self.range_of(metadata, number if number < metadata.shape[0] else Int32(0), part)
            for request in cutlass.range(begin_request, end_request + 1, unroll=1):
                where, place = self.token_of(request, s_q)
                index = self.index_at(indices, where, place, begin, loader, lane)
                later = self.index_at(indices, where, place, begin + M, loader, lane)
                raw = lengths[where, place]
                length = self.clamped(raw, indices, kv)
                if raw != length:
                    bad = bad | TOPK_LENGTH_OUT_OF_RANGE
                end = length
                if request == end_request:
                    end = last_end if last_end < length else length
                for token in cutlass.range(begin, end, M, unroll=1):
                    row = Int32(NO_ROW)
                    if token + loader * ROWS + lane < end:
                        if (index >= 0) & (index < kv.shape[0] * kv.shape[1]):
                            row = self.distance_of(kv, index)
                        elif (index != NO_ROW) & (lane < ROWS):
                            bad = bad | INDEX_OUT_OF_RANGE
                    index = later
                    later = self.index_at(indices, where, place, token + 2 * M, loader, lane)
                    cute.arch.mbarrier_wait(empty + stage, phase)
                    self.copy_rows(
                        kv.iterator.toint(), row, full + stage, sm_info.iterator.toint().to(Int32) + stage * 8, loader, lane,
                        ring_base + stage * (M * self.row_bytes) + loader * (ROWS * self.row_bytes),
                    )  # fmt: skip
                    stage += 1
                    if stage == self.stages:
                        stage = Int32(0)
                        phase = phase ^ 1
                begin = Int32(0)
        if bad != 0:
            cute.arch.atomic_or(faults.iterator, bad, sem="relaxed", scope="gpu")

    @cute.jit
    def distance_of(self, kv: cute.Tensor, index: Int32) -> Int32:
        """How many 16 bytes a slot lies behind the cache's start; a page of a power of two spares the division."""
        size = kv.shape[1]
        page, place = index, Int32(0)
        if size & (size - 1) == 0:
            page = index >> (31 - Int32(cute.arch.clz(size)))
            place = index & (size - 1)
        else:
            page = index // size
            place = index - page * size
        return Int32((Int64(page) * kv.stride[0] + Int64(place) * kv.stride[1]) >> 4)

    @cute.jit
    def copy_rows(
        self, cache: Int64, row: Int32, full: cutlass.Constexpr, info: Int32, loader: Int32, lane: Int32, target: Int32
    ):
        """A warp's rows of one tile by one copy each, of those that there are; the others become zeros.

        info: of the tile, 16 bits per loading warp: which of its rows are keys.
        """
        seen = Int32(cute.arch.vote_ballot_sync(row != NO_ROW))
        if lane == 0:
            cute.arch.inline_ptx("st.shared.u16 [{$r0}], {$r1};", read_only_args=[info + loader * 2, Uint16(seen)])
        if lane < ROWS:  # each lane arrives for what it stored itself
            if row == NO_ROW:
                self.zero_rows(target + lane * self.row_bytes, Int32(self.row_bytes))
                cute.arch.mbarrier_arrive(full)
            else:
                cute.arch.mbarrier_arrive_and_expect_tx(full, self.row_bytes)
        cute.arch.sync_warp()
        barrier = full.toint().to(Int32)
        if seen == 0xFFFF:
            ones = [cute.arch.make_warp_uniform(cute.arch.shuffle_sync(row, i)) for i in range(ROWS)]
            with cute.arch.elect_one():
                for i in cutlass.range_constexpr(ROWS):
                    self.copy_row(target + i * self.row_bytes, cache + Int64(Uint32(ones[i])) * 16, barrier)
        elif row != NO_ROW:
            self.copy_row(target + lane * self.row_bytes, cache + Int64(Uint32(row)) * 16, barrier)

    @cute.jit
    def copy_row(self, target: Int32, source: Int64, barrier: Int32):
        """One row by a bulk copy, to be evicted first from the L2."""
        cute.arch.inline_ptx(
            "{ .reg .b64 policy; mov.b64 policy, 0x12F0000000000000; cp.async.bulk.shared::cluster.global.mbarrier"
            "::complete_tx::bytes.L2::cache_hint [{$r0}], [{$r1}], {$r2}, [{$r3}], policy; }",
            read_only_args=[target, source, Int32(self.row_bytes), barrier],
        )
