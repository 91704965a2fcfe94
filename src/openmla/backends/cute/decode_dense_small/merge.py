"""Requests in several pieces: the exchange of partials of decode_dense_small, and the merge by its holders. Device code."""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr

from openmla.backends.cute import halves

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453

BAR_X, BAR_P = 1, 2  # named barriers of the kernel that a merge uses

UNWRITTEN = -1  # first word of a record between launches; no number, power of two or pair of fp16 numbers is -1
MINUS_INFINITY = -0x800000  # the bits of fp32 -inf
MAX_POLLS = 1 << 24  # some ten seconds, should a partial never come: wrong numbers, not a hang


class Merge:
    """Mixin of `kernel.DecodeDenseSmall`; `kernel` says how the exchange works."""

    dtype: Any
    kept: int
    warpgroups: int
    piece_bytes: int
    has_codes: bool
    gathers: bool
    is_halved: bool

    @cute.jit
    def pieces_here(
        self,
        request: Int32,
        end_request: Int32,
        begin: Int32,
        last_end: Int32,
        split: Int32,
        pieces: Int32,
        chunk: Int32,
    ) -> Int32:
        """Pieces of a request that this part holds: from the plan alone, since others wait for as many to arrive."""
        count = pieces - split
        if request == end_request:
            count = Int32(1)
            if (chunk > 0) & (last_end > begin):
                count = (last_end - begin + chunk - 1) // chunk
        return count

    @cute.jit
    def share(self, rows: Int32, pieces: Int32, split: Int32, count: Int32):
        """(first unit, end of units, log2 of warps per unit) of the holder of pieces [split, split + count).

        A unit is what one warp stores with one instruction of `store_partial`: 256 bytes, 16 columns of 8 rows. The
        holder of [a, b) of n pieces merges the units [a units / n, b units / n). A team of 8, 4, 2 or 1 warps adds up a
        unit: so many that all units are done at once if every holder has one piece. It depends on the number of
        pieces alone, and so do the bits of the sum.
        """
        units = (rows + 7 >> 3) << 5
        # exact: products below 2^17, and the half keeps them 2^-11 away from the next integer
        inverse = cute.arch.rcp_approx(Float32(pieces))
        per_piece, margin = Float32(units) * inverse, Float32(0.5) * inverse
        begin_unit = Int32(Float32(split) * per_piece + margin)
        end_unit = Int32(Float32(split + count) * per_piece + margin)
        log_team = Int32(3) if units <= pieces else Int32(2) if units <= 2 * pieces else Int32(0)
        if (units > 2 * pieces) & (units <= 4 * pieces):
            log_team = Int32(1)
        return begin_unit, end_unit, log_team

    @cute.jit
    def merge(
        self,
        st: cutlass.Constexpr,
        out: cute.Tensor,
        lse: cute.Tensor,
        place: Int64,
        sink: cute.Tensor,
        has_sink: Int32,
        where: Int32,
        first_query: Int32,
        head_kv: Int32,
        pieces: Int32,
        begin_unit: Int32,
        end_unit: Int32,
        log_team: Int32,
        rows: Int32,
        group: Int32,
        per_group: Int32,
    ):
        """Of this CTA, the share of one request whose pieces lie `piece_bytes` apart from `place` on.

        Each member of a team takes every `team`-th group of eight pieces: first their statistics, which were stored
        before the last weighted sum was done, so that the weights are ready when the data come; then the data. One
        warp adds up the team's sums, in order, through shared memory.
        """
        n = self.kept
        tid, _, _ = cute.arch.thread_idx()
        lane, warp = tid & 31, tid >> 5
        team = 1 << log_team
        member = warp & team - 1
        sm_stats = cute.make_tensor(
            cute.recast_ptr(st.q.data_ptr(), dtype=Float32), cute.make_layout((4, 4, 8), stride=(1, 4, 16))
        )
        sm_sums = cute.make_tensor(
            cute.recast_ptr(st.q.data_ptr() + 1024, dtype=Float32), cute.make_layout((4, 32, 8), stride=(1, 4, 128))
        )
        held = cute.make_rmem_tensor(cute.make_layout(4), Int32)  # statistics of piece `lane // 4` of a group
        stat = cute.recast_tensor(held, Float32)
        loaded = cute.make_rmem_tensor(cute.make_layout((2 if self.is_halved else 4, 8)), Int32)
        if const_expr(self.is_halved):
            power = cute.make_rmem_tensor(cute.make_layout(1), Int32)  # of piece `lane // 4`
        else:
            values, power = cute.recast_tensor(loaded, Float32), None
        weights = cute.make_rmem_tensor(cute.make_layout(2), Float32)
        sums = cute.make_rmem_tensor(cute.make_layout(4), Float32)
        four = cute.make_rmem_tensor(cute.make_layout(4), Float32)
        packed = cute.make_rmem_tensor(cute.make_layout(4), self.dtype)
        top = cute.make_rmem_tensor(cute.make_layout(2), Float32)
        total = cute.make_rmem_tensor(cute.make_layout(2), Float32)
        scale = cute.make_rmem_tensor(cute.make_layout(2), Float32)
        for base in cutlass.range(begin_unit, end_unit, 8 >> log_team, unroll=1):
            unit = base + (warp >> log_team)
            block, eighth = unit >> 5, unit & 31  # eight rows; 16 columns of 512
            there = ((eighth >> 2) * (n // 8) + block) * 4 + (eighth & 3)  # see store_partial
            if const_expr(self.is_halved):
                data = place + (there * 256 + lane * 8)
                stats = place + (n * 1024 + there * 64 + (lane & 3) * 16 + (lane >> 2) * self.piece_bytes)
                powers = place + (self.place_of_power(unit) + (lane >> 2) * self.piece_bytes)
            else:
                data = place + there * 512
                stats = place + (n * 2048 + there * 64 + (lane & 3) * 16 + (lane >> 2) * self.piece_bytes)
            many = pieces if unit < end_unit else Int32(0)
            # ---- statistics: maximum and sum of every row over all pieces
            top.fill(-Float32.inf)
            total.fill(0.0)
            for begin in cutlass.range(member * 8, many, team * 8, unroll=1):
                self.await_stats(held, stats + begin * self.piece_bytes, many - begin, lane)
                for r in cutlass.range_constexpr(2):
                    top[r], total[r] = self.join(top[r], total[r], stat[2 * r], stat[2 * r + 1])
            for r in cutlass.range_constexpr(2):
                top[r], total[r] = self.join_lanes(top[r], total[r])
            if team > 1:
                if lane < 4:
                    for r in cutlass.range_constexpr(2):
                        four[2 * r], four[2 * r + 1] = top[r], total[r]
                    cute.autovec_copy(four, sm_stats[None, lane, warp])
                cute.arch.barrier(barrier_id=BAR_P, number_of_threads=256)
                cute.autovec_copy(sm_stats[None, lane & 3, (warp - member) + ((lane >> 2) & team - 1)], four)
                for r in cutlass.range_constexpr(2):
                    other = four[2 * r + 1] if lane >> 2 < team else Float32(0.0)
                    top[r], total[r] = self.join_lanes(four[2 * r], other)
            row = block * 8 + (lane & 3) * 2
            for r in cutlass.range_constexpr(2):
                token, head = self.split_row(row + r if row + r < rows else Int32(0), head_kv, group, per_group)
                scale[r], lse2 = self.closing(top[r], total[r], sink, head, has_sink)
                if (lane < 4) & (eighth == 0) & (member == 0) & (many > 0) & (row + r < rows):
                    lse[where, head, first_query + token] = lse2 * LN_2
            # ---- data
            sums.fill(0.0)
            for begin in cutlass.range(member * 8, many, team * 8, unroll=1):
                if pieces > team * 8:  # else still held
                    self.await_stats(held, stats + begin * self.piece_bytes, many - begin, lane)
                for r in cutlass.range_constexpr(2):
                    shift = top[r] if top[r] > -Float32.inf else Float32(0.0)
                    weights[r] = cute.math.exp2(stat[2 * r] - shift, fastmath=True) * scale[r]
                if const_expr(self.is_halved):
                    behind = begin * self.piece_bytes
                    self.await_data(loaded, power, data + behind, powers + behind, many - begin, lane)
                    self.add_pieces(sums, loaded, weights, power, 0, 8)
                else:
                    self.await_wide(loaded, data + begin * self.piece_bytes, many - begin, lane)
                    self.add_wide(sums, values, weights, 0, 8)
                    self.forget_wide(
                        data + begin * self.piece_bytes, stats + begin * self.piece_bytes, many - begin, lane
                    )
            if team > 1:
                cute.autovec_copy(sums, sm_sums[None, lane, warp])
                cute.arch.barrier(barrier_id=BAR_X, number_of_threads=256)
                if member == 0:
                    for w in cutlass.range_constexpr(1, 8):
                        if w < team:
                            cute.autovec_copy(sm_sums[None, lane, warp + w], four)
                            for i in cutlass.range_constexpr(4):
                                sums[i] = sums[i] + four[i]
            # lane 4 c + p has columns c and c + 8 of rows 2 p and 2 p + 1; of two neighbours in c, the even one takes
            # the even row, and each stores two columns at once
            is_odd = (lane & 4) != 0
            for i in cutlass.range_constexpr(2):
                other = cute.arch.shuffle_sync_bfly(sums[2 * i] if is_odd else sums[2 * i + 1], 4)
                four[2 * i] = other if is_odd else sums[2 * i]
                four[2 * i + 1] = sums[2 * i + 1] if is_odd else other
            row = row + (lane >> 2 & 1)
            if (member == 0) & (many > 0) & (row < rows):
                token, head = self.split_row(row, head_kv, group, per_group)
                line = cute.recast_tensor(out[where, first_query + token, head, None], Int32)
                words = cute.recast_tensor(packed, Int32)
                if const_expr(self.has_codes):  # its columns are 2 c and 2 c + 1
                    x = four[1]
                    four[1] = four[2]
                    four[2] = x
                    packed.store(four.load().to(self.dtype))
                    line[eighth * 8 + (lane >> 3) * 2] = words[0]
                    line[eighth * 8 + (lane >> 3) * 2 + 1] = words[1]
                else:
                    packed.store(four.load().to(self.dtype))
                    line[eighth * 8 + (lane >> 3)] = words[0]
                    line[eighth * 8 + 4 + (lane >> 3)] = words[1]
            if const_expr(self.is_halved):
                for begin in cutlass.range(member * 8, many, team * 8, unroll=1):  # last, for nobody waits for it
                    behind = begin * self.piece_bytes
                    self.forget(data + behind, stats + behind, powers + behind, many - begin, lane)

    @cute.jit
    def merge_few(
        self,
        out: cute.Tensor,
        lse: cute.Tensor,
        place: Int64,
        sink: cute.Tensor,
        has_sink: Int32,
        where: Int32,
        first_query: Int32,
        head_kv: Int32,
        pieces: Int32,
        begin_unit: Int32,
        end_unit: Int32,
        rows: Int32,
        group: Int32,
        per_group: Int32,
        per: cutlass.Constexpr,
    ):
        """As `merge`, where a request has `per` pieces at most: a warp takes 8 / per units at once.

        `merge` waits twice for memory in every round of eight units, and a holder of two pieces has 16 rounds of 64 rows.
        The four lanes of a slot have the statistics of one piece of one unit.
        """
        n, units = self.kept, 8 // per
        tid, _, _ = cute.arch.thread_idx()
        lane, warp = tid & 31, tid >> 5
        slot = lane >> 2
        held = cute.make_rmem_tensor(cute.make_layout(4), Int32)
        stat = cute.recast_tensor(held, Float32)
        loaded = cute.make_rmem_tensor(cute.make_layout((2 if self.is_halved else 4, 8)), Int32)
        if const_expr(self.is_halved):
            power = cute.make_rmem_tensor(cute.make_layout(1), Int32)  # of piece `lane // 4`
        else:
            values, power = cute.recast_tensor(loaded, Float32), None
        weights = cute.make_rmem_tensor(cute.make_layout(2), Float32)
        sums = cute.make_rmem_tensor(cute.make_layout(4), Float32)
        for base in cutlass.range(begin_unit, end_unit, 8 * units, unroll=1):
            first = base + warp * units
            # ---- statistics
            unit, piece = first + slot // per, slot % per
            is_there = (unit < end_unit) & (piece < pieces)
            if const_expr(self.is_halved):
                here = place + piece * self.piece_bytes
                stats = here + (n * 1024 + self.place_of(unit) * 64 + (lane & 3) * 16)
                powers = here + self.place_of_power(unit)
            else:
                stats = place + (n * 2048 + self.place_of(unit) * 64 + (lane & 3) * 16) + piece * self.piece_bytes
            self.await_stats(held, stats, Int32(8) if is_there else Int32(0), lane)
            row = (unit >> 5) * 8 + (lane & 3) * 2
            for r in cutlass.range_constexpr(2):
                peak = stat[2 * r]
                for d in (4, 8)[: per // 2]:
                    peak = cute.arch.fmax(peak, cute.arch.shuffle_sync_bfly(peak, d))
                shift = peak if peak > -Float32.inf else Float32(0.0)
                weights[r] = cute.math.exp2(stat[2 * r] - shift, fastmath=True)
                total = stat[2 * r + 1] * weights[r]
                for d in (4, 8)[: per // 2]:
                    total = total + cute.arch.shuffle_sync_bfly(total, d)
                token, head = self.split_row(row + r if row + r < rows else Int32(0), head_kv, group, per_group)
                scale, lse2 = self.closing(peak, total, sink, head, has_sink)
                weights[r] = weights[r] * scale
                if (piece == 0) & ((unit & 31) == 0) & is_there & (row + r < rows):
                    lse[where, head, first_query + token] = lse2 * LN_2
            # ---- data
            if const_expr(self.is_halved):
                self.await_units(loaded, power, place + lane * 8, powers, is_there, first, end_unit, pieces, per)
            else:
                self.await_wide_units(loaded, place + lane * 16, first, end_unit, pieces, per)
            for j in cutlass.range_constexpr(units):
                sums.fill(0.0)
                if const_expr(self.is_halved):
                    self.add_pieces(sums, loaded, weights, power, j * per, per)
                else:
                    self.add_wide(sums, values, weights, j * per, per)
                self.store_unit(
                    sums, out, where, first_query, head_kv, rows, group, per_group, first + j, end_unit, lane
                )
            for u in cutlass.range_constexpr(8):
                if (first + u // per < end_unit) & (u % per < pieces):
                    if const_expr(self.is_halved):
                        data = place + (self.place_of(first + u // per) * 256 + lane * 8)
                    else:
                        data = place + (self.place_of(first + u // per) * 512 + lane * 16)
                    self.unwrite(data, u % per * self.piece_bytes)
            if is_there:
                self.unwrite(stats, 0)
                if const_expr(self.is_halved):
                    self.unwrite(powers, 0)

    @cute.jit
    def place_of(self, unit: Int32) -> Int32:
        """Where `store_partial` puts a unit, in units."""
        block, eighth = unit >> 5, unit & 31
        return ((eighth >> 2) * (self.kept // 8) + block) * 4 + (eighth & 3)

    @cute.jit
    def place_of_power(self, unit: Int32) -> Int32:
        """Where `store_partial` puts what undoes a unit's factor, in bytes."""
        block, slab, warp = unit >> 5, unit >> 2 & 7, unit & 3
        slabs = 8 // self.warpgroups
        sector = (slab // slabs * 4 + warp) * (self.kept // 8) + block
        return self.kept * 1280 + sector * 32 + slab % slabs * 4

    @cute.jit
    def await_units(
        self, loaded: cute.Tensor, power: cute.Tensor, place: Int64, powers: Int64, has_power: cutlass.Boolean,
        first: Int32, end_unit: Int32, pieces: Int32, per: cutlass.Constexpr,
    ):  # fmt: skip
        """8 bytes per lane of 8 / per units of each piece, and what undoes their factors, as soon as all are there."""
        power[0] = Int32(UNWRITTEN) if has_power else Int32(0)
        for u in cutlass.range_constexpr(8):
            is_there = (first + u // per < end_unit) & (u % per < pieces)
            loaded[0, u] = Int32(UNWRITTEN) if is_there else Int32(0)
            loaded[1, u] = Int32(0)
        polls = Int32(MAX_POLLS)
        while polls > 0:
            for u in cutlass.range_constexpr(8):
                data = place + self.place_of(first + u // per) * 256
                self.look_at_four(loaded[None, u], u % per * self.piece_bytes, data)
            power[0] = self.look_at_word(power[0], powers)
            is_missing = power[0] == UNWRITTEN
            for u in cutlass.range_constexpr(8):
                is_missing = is_missing | (loaded[0, u] == UNWRITTEN)
            polls -= 1
            if not cute.arch.vote_any_sync(is_missing):
                polls = Int32(0)

    @cute.jit
    def store_unit(
        self, sums: cute.Tensor, out: cute.Tensor, where: Int32, first_query: Int32, head_kv: Int32, rows: Int32,
        group: Int32, per_group: Int32, unit: Int32, end_unit: Int32, lane: Int32,
    ):  # fmt: skip
        """A unit of out. Lane 4 c + p has columns c and c + 8 of rows 2 p and 2 p + 1; see `merge`."""
        four = cute.make_rmem_tensor(cute.make_layout(4), Float32)
        packed = cute.make_rmem_tensor(cute.make_layout(4), self.dtype)
        words = cute.recast_tensor(packed, Int32)
        is_odd = (lane & 4) != 0
        for i in cutlass.range_constexpr(2):
            other = cute.arch.shuffle_sync_bfly(sums[2 * i] if is_odd else sums[2 * i + 1], 4)
            four[2 * i] = other if is_odd else sums[2 * i]
            four[2 * i + 1] = sums[2 * i + 1] if is_odd else other
        row = (unit >> 5) * 8 + (lane & 3) * 2 + (lane >> 2 & 1)
        if (unit < end_unit) & (row < rows):
            token, head = self.split_row(row, head_kv, group, per_group)
            line = cute.recast_tensor(out[where, first_query + token, head, None], Int32)
            packed.store(four.load().to(self.dtype))
            line[(unit & 31) * 8 + (lane >> 3)] = words[0]
            line[(unit & 31) * 8 + 4 + (lane >> 3)] = words[1]

    @cute.jit
    def await_stats(self, held: cute.Tensor, address: Int64, count: Int32, lane: Int32):
        """Maximum and sum, of two rows, of piece `lane // 4` of a group of eight, as soon as all eight are there."""
        held[0] = Int32(UNWRITTEN) if lane >> 2 < count else Int32(MINUS_INFINITY)
        held[1], held[2], held[3] = Int32(0), Int32(MINUS_INFINITY), Int32(0)
        polls = Int32(MAX_POLLS)
        while polls > 0:
            self.look(held, 0, address)
            polls -= 1
            if not cute.arch.vote_any_sync(held[0] == UNWRITTEN):
                polls = Int32(0)

    @cute.jit
    def await_data(
        self, loaded: cute.Tensor, power: cute.Tensor, address: Int64, powers: Int64, count: Int32, lane: Int32
    ):
        """A unit's 8 bytes per lane of eight pieces, and what undoes their factors, as soon as all are there."""
        if const_expr(self.has_codes and not self.gathers):
            self.probe(address - lane * 8, count, lane)
        for u in cutlass.range_constexpr(8):
            loaded[0, u] = Int32(UNWRITTEN) if u < count else Int32(0)
            loaded[1, u] = Int32(0)
        power[0] = Int32(UNWRITTEN) if lane >> 2 < count else Int32(0)
        self.look_at_all(loaded, power, address, powers)
        polls = Int32(MAX_POLLS)
        while polls > 0:
            is_missing = power[0] == UNWRITTEN
            for u in cutlass.range_constexpr(8):
                is_missing = is_missing | (loaded[0, u] == UNWRITTEN)
            polls -= 1
            if cute.arch.vote_any_sync(is_missing):
                self.look_at_all(loaded, power, address, powers)
            else:
                polls = Int32(0)

    @cute.jit
    def look_at_all(self, loaded: cute.Tensor, power: cute.Tensor, address: Int64, powers: Int64):
        """Load what is still unwritten of eight pieces."""
        for u in cutlass.range_constexpr(8):
            self.look_at_four(loaded[None, u], u * self.piece_bytes, address)
        power[0] = self.look_at_word(power[0], powers)

    @cute.jit
    def add_pieces(
        self, sums: cute.Tensor, loaded: cute.Tensor, weights: cute.Tensor, power: cute.Tensor, first: cutlass.Constexpr,
        count: cutlass.Constexpr,
    ):  # fmt: skip
        """Slots [first, first + count) of what was loaded, weighed; the weights of slot u are lane 4 u + lane % 4's."""
        undo = cute.recast_tensor(power, Float32)
        own = [weights[r] * undo[0] for r in range(2)]
        for u in cutlass.range_constexpr(first, first + count):
            weight = [cute.arch.shuffle_sync(own[r], u * 4, mask_and_clamp=0x31F) for r in range(2)]
            values = halves.unpack(loaded[None, u])
            for i in cutlass.range_constexpr(4):
                sums[i] = sums[i] + values[i] * weight[i % 2]

    @cute.jit
    def probe(self, address: Int64, count: Int32, lane: Int32):
        """Wait for four words of each piece, and only then ask for all 20 KB.

        bf16, fp16 and index lists go without it (bf16 is 0.2 to 0.6 us faster at batch 1); over pages of codes that has not been
        tried.
        """
        polls = Int32(MAX_POLLS)
        word = Int32(UNWRITTEN) if lane >> 2 < count else Int32(0)
        place = address + ((lane >> 2) * self.piece_bytes + (lane & 3) * 64)
        while polls > 0:
            word = self.look_at_word(word, place)
            polls -= 1
            if not cute.arch.vote_any_sync(word == UNWRITTEN):
                polls = Int32(0)

    @cute.jit
    def look(self, words: cute.Tensor, offset: cutlass.Constexpr, address: Int64):
        """Load 16 bytes that are still unwritten, in one indivisible load."""
        words[0], words[1], words[2], words[3] = cute.arch.inline_ptx(
            "{ .reg .pred p; .reg .b64 low, high; .reg .b128 all; setp.eq.s32 p, {$r1}, -1; "
            "mov.b64 low, {{$r1}, {$r2}}; mov.b64 high, {{$r3}, {$r4}}; mov.b128 all, {low, high}; "
            "@p ld.relaxed.gpu.global.b128 all, [{$r0} + " + str(offset) + "]; "
            "mov.b128 {low, high}, all; mov.b64 {{$w0}, {$w1}}, low; mov.b64 {{$w2}, {$w3}}, high; }",
            write_only_types=[Int32] * 4,
            read_only_args=[address, words[0], words[1], words[2], words[3]],
        )

    @cute.jit
    def look_at_four(self, words: cute.Tensor, offset: cutlass.Constexpr, address: Int64):
        """The same of 8 bytes, four numbers."""
        words[0], words[1] = cute.arch.inline_ptx(
            "{ .reg .pred p; .reg .b64 all; setp.eq.s32 p, {$r1}, -1; mov.b64 all, {{$r1}, {$r2}}; "
            "@p ld.relaxed.gpu.global.b64 all, [{$r0} + " + str(offset) + "]; mov.b64 {{$w0}, {$w1}}, all; }",
            write_only_types=[Int32] * 2,
            read_only_args=[address, words[0], words[1]],
        )

    @cute.jit
    def look_at_word(self, word: Int32, address: Int64) -> Int32:
        """The same of one word."""
        return cute.arch.inline_ptx(
            "{ .reg .pred p; .reg .b32 all; setp.eq.s32 p, {$r1}, -1; mov.b32 all, {$r1}; "
            "@p ld.relaxed.gpu.global.b32 all, [{$r0}]; mov.b32 {$w0}, all; }",
            write_only_types=[Int32],
            read_only_args=[address, word],
        )

    @cute.jit
    def forget(self, data: Int64, stats: Int64, powers: Int64, count: Int32, lane: Int32):
        """Mark what was read as unwritten, for the next launch: two pieces at once, for every lane has read its own."""
        mine = data + ((lane >> 4) * self.piece_bytes + ((lane & 15) * 16 - lane * 8))
        nothing = halves.number(Int32(UNWRITTEN))
        for u in cutlass.range_constexpr(0, 8, 2):
            if u + (lane >> 4) < count:
                self.put(mine, u * self.piece_bytes, nothing, nothing, nothing, nothing)
        if lane >> 2 < count:
            self.unwrite(stats, 0)
            self.unwrite(powers, 0)

    @cute.jit
    def unwrite(self, address: Int64, offset: cutlass.Constexpr):
        """The first word of a record."""
        cute.arch.inline_ptx("st.relaxed.gpu.global.b32 [{$r0} + " + str(offset) + "], -1;", read_only_args=[address])

    @cute.jit
    def join(self, top: Float32, total: Float32, other: Float32, other_total: Float32):
        """Two (maximum, sum of 2^(score - maximum)) pairs into one."""
        peak = cute.arch.fmax(top, other)
        shift = peak if peak > -Float32.inf else Float32(0.0)
        total = total * cute.math.exp2(top - shift, fastmath=True) + other_total * cute.math.exp2(
            other - shift, fastmath=True
        )
        return peak, total

    @cute.jit
    def join_lanes(self, top: Float32, total: Float32):
        """The pairs of the eight lanes with the same `lane % 4` into one, for all of them."""
        peak = top
        for d in (4, 8, 16):
            peak = cute.arch.fmax(peak, cute.arch.shuffle_sync_bfly(peak, d))
        shift = peak if peak > -Float32.inf else Float32(0.0)
        total = total * cute.math.exp2(top - shift, fastmath=True)
        for d in (4, 8, 16):
            total = total + cute.arch.shuffle_sync_bfly(total, d)
        return peak, total

    @cute.jit
    def closing(self, top: Float32, total: Float32, sink: cute.Tensor, head: Int32, has_sink: Int32):
        """Factor of a row's sums, and its base-2 lse."""
        scale = Float32(0.0)
        lse2 = -Float32.inf
        if total != 0.0:  # a NaN goes its way
            scale = cute.arch.rcp_approx(total)
            lse2 = top + cute.math.log2(total, fastmath=True)
            if has_sink != 0:
                kept = Float32(1.0) + cute.math.exp2(sink[head] * LOG2_E - lse2, fastmath=True)
                scale = scale * cute.arch.rcp_approx(kept)
        return scale, lse2

    @cute.jit
    def store_partial(self, o: cutlass.Constexpr, target: Int64, rows: Int32, wg: Int32, wwarp: Int32, lane: Int32):
        """The accumulators as they lie, before division, as fp16: 8 bytes per thread, 256 in a row per warp and store.

        All rows of a warp's 16 columns have one factor (`halves`). What undoes it lies in the exchange once per block of rows,
        for its one reader each; a warp stores its own at once, twice, as whole sectors: a part of one that is no longer in the L2
        would be read from memory before anybody sees it (0.9 us with 128 pieces).
        Rows of 512 columns would scatter each store of a warp over four rows; that took four times the store cycles.
        """
        blocks, slabs = self.kept // 8, 8 // self.warpgroups
        place = target + (wg * (slabs * blocks * 1024) + wwarp * 256 + lane * 8)
        powers = []
        for m in cutlass.range_constexpr(slabs):
            values = [o[m][i] for i in range(4 * blocks)]
            factor, power = halves.halve(halves.of_warp(halves.largest_finite(values)), Float32(1.0))
            powers.append(power << 16)
            for g in cutlass.range_constexpr(blocks):
                low, high = (halves.pack(values[4 * g + i] * factor, values[4 * g + i + 1] * factor) for i in (0, 2))
                self.put_four(place, (m * blocks + g) * 1024, low, high, Int32(g * 8), rows)
        if lane >> 1 << 3 < rows:
            sector = target + (self.kept * 1280 + (wg * 4 + wwarp) * (blocks * 32) + lane * 16)
            four = [halves.number(powers[i % slabs]) for i in range(4)]
            self.put(sector, 0, *four)

    @cute.jit
    def put_four(
        self, address: Int64, offset: cutlass.Constexpr, low: Int32, high: Int32, first_row: Int32, rows: Int32
    ):
        """Four numbers of a partial, if their rows are there, in one indivisible store."""
        cute.arch.inline_ptx(
            "{ .reg .pred p; .reg .b64 all; setp.lt.s32 p, {$r3}, {$r4}; mov.b64 all, {{$r1}, {$r2}}; "
            "@p st.relaxed.gpu.global.b64 [{$r0} + " + str(offset) + "], all; }",
            read_only_args=[address, low, high, first_row, rows],
        )

    @cute.jit
    def put(self, address: Int64, offset: cutlass.Constexpr, a: Float32, b: Float32, c: Float32, d: Float32):
        """16 bytes in one indivisible store: whoever sees the first word sees all four."""
        cute.arch.inline_ptx(
            "{ .reg .b64 low, high; .reg .b128 all; mov.b64 low, {{$r1}, {$r2}}; mov.b64 high, {{$r3}, {$r4}}; "
            "mov.b128 all, {low, high}; st.relaxed.gpu.global.b128 [{$r0} + " + str(offset) + "], all; }",
            read_only_args=[address, a, b, c, d],
        )
