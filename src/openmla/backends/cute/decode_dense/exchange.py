"""Shares of ranks, exchanged and merged at the end of the decode kernel that computes this rank's: no launch behind it.

The protocol is that of `openmla.backends.triton.exchange`, with the same mailboxes: words that are their own flags, two turns
that are counted on the device. What differs is where this rank's share comes from. The kernel's `out` and `lse` are memory of
the mailbox (`staged`), all UNWRITTEN between launches; whoever finishes a row writes it there as into any output, and the
warp that the row belongs to here

    1. waits for its words, and writes them into the mailbox of every other rank: whole rows over NVLink,
    2. waits for the rows of the others, merges in the order of ranks, writes the result, makes all words UNWRITTEN again.

What counts is the chain of latencies: each load of a word that others write takes 0.7 us. So all that can be known before is
read before, a row and its lse are polled together, and this rank's share stays in registers.

All CTAs are resident (the launch is cooperative) and nobody waits before all of a CTA's pieces and shares are stored, so
every row comes. The clock ends the wait for a rank that does not write: NaN, and `lost` is set.

`mail` is int64 [6 + world]: rank, world, capacity in rows, limit in ns, addresses of `turns` (int32 [capacity]) and `lost`
(int32 [1]), then of every rank's mailbox. `merged` is int32 [rows * 257]: out as words, then lse [batch, h_q, s_q].
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64

ROW_WORDS, ROW_BYTES = 256, 1024  # 512 numbers of 16 bits
RANK, WORLD, CAPACITY, LIMIT, TURNS, LOST, BOXES = range(7)
UNWRITTEN = -1
NAN_WORD = 0x7FFF7FFF
POLLS = 1024  # between two looks at the clock
LOG2_E, LN2 = 1.4426950408889634, 0.6931471805599453


class Exchange:
    """Steps of the value warps of `kernel.DecodeDense`, when they have nothing else to do. bf16."""

    @cute.jit
    def prepare_exchange(self, c: cutlass.Constexpr):
        """What a warp needs to know before its first row is there: a chain of loads that nobody should wait for later."""
        grid_x, grid_y, grid_z = cute.arch.grid_dim()
        block_x, block_y, block_z = cute.arch.block_idx()
        ctas = grid_x * grid_y * grid_z
        first = (c.warp_idx - 4) * ctas + (block_z * grid_y + block_y) * grid_x + block_x
        rank, world, source_rows = self.field(c, RANK), self.field(c, WORLD), self.field(c, CAPACITY)
        limit, turns, lost = self.field(c, LIMIT), self.field(c, TURNS), self.field(c, LOST)
        mine, turn = self.field(c, BOXES + Int32(rank)), Int32(0)
        if first < c.out.shape[0] * c.out.shape[1] * c.out.shape[2]:
            turn = self.load(turns + Int64(first) * 4)
        return first, 8 * ctas, Int32(rank), Int32(world), source_rows, limit, turns, lost, mine, turn

    @cute.jit
    def exchange(self, c: cutlass.Constexpr, prepared: Any):
        """Every row of the call, a warp each. Rows come in the same order on every rank, so waiting for one ends."""
        first, step, rank, world, source_rows, limit, turns, lost, mine, turn = prepared
        rows, begin = c.out.shape[0] * c.out.shape[1] * c.out.shape[2], cute.arch.globaltimer()
        lses = 2 * world * source_rows * ROW_BYTES
        own, words = (cute.make_rmem_tensor(8, Int32) for _ in range(2))
        sums = cute.make_rmem_tensor(16, Float32)
        for row in cutlass.range(first, rows, step, unroll=1):
            if row != first:
                turn = self.load(turns + Int64(row) * 4)
            place = Int64(turn & 1) * world * source_rows + row  # of source 0
            own_lse, own_row = self.lse_of(c, row), self.out_of(c, row)
            lse, late = self.await_row(own_lse, own_row, own, begin, limit, lost)
            for peer in cutlass.range(world, unroll=1):
                if peer != rank:
                    slot, box = place + rank * source_rows, self.field(c, BOXES + peer)
                    self.store_row_of(box + slot * ROW_BYTES + c.lane * 16, own)
                    if c.lane == 0:
                        self.store(box + lses + slot * 4, lse)
            top, mass = -Float32.inf, Float32(0.0)
            sums.fill(0.0)
            for source in cutlass.range(world, unroll=1):  # in this order on every rank: the same bits
                its = lse
                for i in cutlass.range_constexpr(8):
                    words[i] = own[i]
                if source != rank:
                    slot = place + source * source_rows
                    its, is_late = self.await_row(
                        mine + lses + slot * 4, mine + slot * ROW_BYTES + c.lane * 16, words, begin, limit, lost
                    )
                    late = late | is_late
                number = self.as_float(its)
                above = cute.arch.fmax(top, number)
                shift = above if above != -Float32.inf else Float32(0.0)
                weight = cute.math.exp2((number - shift) * Float32(LOG2_E), fastmath=True)
                before = cute.math.exp2((top - shift) * Float32(LOG2_E), fastmath=True)
                mass, top = mass * before + weight, above
                for i in cutlass.range_constexpr(8):
                    # what a share without keys holds, counts for nothing
                    word = words[i] if number != -Float32.inf else Int32(0)
                    sums[2 * i] = sums[2 * i] * before + weight * self.as_float(word << 16)
                    sums[2 * i + 1] = sums[2 * i + 1] * before + weight * self.as_float(word & Int32(-65536))
            is_empty = mass == 0.0
            inverse = Float32(1.0) / (Float32(1.0) if is_empty else mass)
            for i in cutlass.range_constexpr(8):
                words[i] = self.pack(sums[2 * i] * inverse, sums[2 * i + 1] * inverse)
                words[i] = Int32(NAN_WORD) if late != 0 else words[i]
            merged_lse = -Float32.inf if is_empty else top + cute.math.log2(mass) * Float32(LN2)
            bits = Int32(0x7FFFFFFF) if late != 0 else self.as_word(merged_lse)
            self.leave(c, row, words, bits, mine, lses, place, source_rows, rank, world)
            if c.lane == 0:
                self.store(turns + Int64(row) * 4, turn + 1)

    @cute.jit
    def leave(
        self, c: cutlass.Constexpr, row: Int32, words: cute.Tensor, bits: Int32, mine: Int64, lses: Int64, place: Int64,
        source_rows: Int64, rank: Int32, world: Int32,
    ):  # fmt: skip
        """The result of a row; all words that it came in are UNWRITTEN again."""
        rows, merged = c.out.shape[0] * c.out.shape[1] * c.out.shape[2], c.merged.iterator.toint()
        self.store_row_of(merged + Int64(row) * ROW_BYTES + c.lane * 16, words)
        words.fill(UNWRITTEN)
        cute.arch.sync_warp()  # every lane has read before one of them wipes
        for source in cutlass.range(world, unroll=1):
            slot = place + source * source_rows
            row_at, lse_at = mine + slot * ROW_BYTES + c.lane * 16, mine + lses + slot * 4
            if source == rank:
                row_at, lse_at = self.out_of(c, row), self.lse_of(c, row)
            self.store_row_of(row_at, words)
            if c.lane == 0:
                self.store(lse_at, Int32(UNWRITTEN))
        if c.lane == 0:
            self.store(merged + (Int64(rows) * ROW_WORDS + self.place_of_lse(c, row)) * 4, bits)

    # ------------------------------------------------------------------ where things lie

    @cute.jit
    def field(self, c: cutlass.Constexpr, index: Int32) -> Int64:
        """An entry of `mail`, as a register: nothing here may change while the kernel runs."""
        return cute.arch.inline_ptx(
            "ld.global.nc.b64 {$w0}, [{$r0}];", write_only_types=[Int64],
            read_only_args=[c.mail.iterator.toint() + Int64(index) * 8],
        )  # fmt: skip

    @cute.jit
    def out_of(self, c: cutlass.Constexpr, row: Int32) -> Int64:
        """A lane's first 16 bytes of a row of this rank's share; the others are 512 bytes further."""
        return c.out.iterator.toint() + Int64(row) * ROW_BYTES + c.lane * 16

    @cute.jit
    def place_of_lse(self, c: cutlass.Constexpr, row: Int32) -> Int32:
        """Of a row (request, token, head) in [batch, h_q, s_q]."""
        s_q, h_q = c.out.shape[1], c.out.shape[2]
        request = row // (h_q * s_q)
        rest = row - request * h_q * s_q
        token = rest // h_q
        return (request * h_q + rest - token * h_q) * s_q + token

    @cute.jit
    def lse_of(self, c: cutlass.Constexpr, row: Int32) -> Int64:
        """Address of a row's lse in this rank's share, which is contiguous."""
        return c.lse.iterator.toint() + Int64(self.place_of_lse(c, row)) * 4

    # ------------------------------------------------------------------ words of memory that others write

    @cute.jit
    def load(self, address: Int64) -> Int32:
        """One word, from where everybody sees it."""
        return cute.arch.inline_ptx(
            "ld.relaxed.sys.global.b32 {$w0}, [{$r0}];", write_only_types=[Int32], read_only_args=[address]
        )

    @cute.jit
    def store(self, address: Int64, word: Int32):
        """One word, to where everybody sees it."""
        cute.arch.inline_ptx("st.relaxed.sys.global.b32 [{$r0}], {$r1};", read_only_args=[address, word])

    @cute.jit
    def store_row_of(self, address: Int64, words: cute.Tensor):
        """A lane's eight words of a row."""
        for half in cutlass.range_constexpr(2):
            cute.arch.inline_ptx(
                "st.relaxed.sys.global.v4.b32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};",
                read_only_args=[address + 512 * half, *(words[4 * half + i] for i in range(4))],
            )

    @cute.jit
    def await_row(
        self, lse_address: Int64, address: Int64, words: cute.Tensor, begin: Int64, limit: Int64, lost: Int64
    ):  # fmt: skip
        """(its lse as a word, 1 where it did not come in time) once all is written; a lane's eight words of it."""
        missing, polls, late, lse = Boolean(True), Int32(0), Int32(0), Int32(0)
        while missing:
            lse = self.load(lse_address)
            missing = lse == UNWRITTEN
            for half in cutlass.range_constexpr(2):
                found = cute.arch.inline_ptx(
                    "ld.relaxed.sys.global.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
                    write_only_types=[Int32] * 4, read_only_args=[address + 512 * half],
                )  # fmt: skip
                for i in cutlass.range_constexpr(4):
                    words[4 * half + i] = found[i]
                    missing = missing | (found[i] == UNWRITTEN)
            polls += 1
            if polls % POLLS == 0:
                is_over = (cute.arch.globaltimer() - begin > limit) | (self.load(lost) != 0)
                if missing & is_over:
                    self.store(lost, Int32(1))  # tells the host
                    late, missing = Int32(1), Boolean(False)
        return lse, late

    # ------------------------------------------------------------------ bits

    def as_float(self, word: Any) -> Any:
        """The number with these bits."""
        return cute.arch.inline_ptx("mov.b32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[word])

    def as_word(self, number: Any) -> Any:
        """The bits of a number."""
        return cute.arch.inline_ptx("mov.b32 {$w0}, {$r0};", write_only_types=[Int32], read_only_args=[number])

    def pack(self, low: Any, high: Any) -> Any:
        """Two numbers as bf16 in one word."""
        return cute.arch.inline_ptx(
            "cvt.rn.bf16x2.f32 {$w0}, {$r1}, {$r0};", write_only_types=[Int32], read_only_args=[low, high]
        )
