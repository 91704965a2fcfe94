"""Cache writers for Hopper: bound by memory.

Computes
    cache[slot] = pack(rotate(row, position)) for every token with a slot, the bytes of `openmla.reference.quant.write_rows`.
    e4m3   scale = 2 ** ceil(log2(max(amax / 448, 1e-4)))    code = e4m3(x / scale)
    e2m1   scale = e4m3(min(max(amax / 6, 2 ** -9), 448))    code = e2m1(x / scale)

Schedule
    A warp stores four tokens, eight lanes each: lane 8 t + c has columns 64 j + 8 c to 64 j + 8 c + 7 of token t, chunk j for
    chunk, 16 bytes each. It asks for their slots and positions, then at once for all of their columns (4.5 KB), so that a token
    costs one latency of memory, two with RoPE, whose tables hang on the position (log 4 of the page). Groups of scales are lanes of one token: their largest magnitudes meet by shuffles, two groups in one register.
    Codes out, 8 bytes per lane and chunk (e2m1: 4); scales at the end, a lane per group.
    No shared memory, no barrier. Address 0 stands for a token that is not stored; its row is read like the others.

Exactness
    A scale of e4m3 codes is a power of two, found in the bits of the largest magnitude, so x times its reciprocal is exact.
    e2m1: x has 8 bits, a scale 4, a midpoint between codes 3: a quotient that is no midpoint is 2^-8 of it away at least. So an
    approximate quotient, times 2^-14 and rounded to fp16, is on the right side of it, or on it: codes are the top bits of
    that fp16 number, rounded to nearest even as integers. amax / 6: a product with the rounded 1 / 6, corrected once.

Budget (checked by tests/compile/test_writers.py)
    64 registers of 128 threads, no spills, no shared memory: 32 warps, 144 KB of loads in flight per SM.

Deep dive: docs/kernels/writers.md
"""

from __future__ import annotations

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32, const_expr

from openmla.backends.cute.writers.config import CHUNK, LANES, TOKENS, Config

FAULT_INDEX = 8
PAIRS, HALVES = 1, 2  # how RoPE pairs columns; 0: it turns none
NAN_PAIR = 0x7FC07FC0  # two bf16 numbers
NAN = 0x7FC00000  # of fp32
NOT_FINITE = 0x7F80  # bits of a bf16 magnitude from here on
LOWEST = (114 + 8) * 0x10001  # exponent of 2^-13, the smallest scale above 1e-4, as `exponents` has it
SIXTH = 0x3E2AAAAB  # bits of fp32(1 / 6)


class Writer:
    """The launch (`__call__`) and the device code."""

    def __init__(self, config: Config) -> None:
        self.config, self.layout = config, config.stored
        self.smem_bytes = 0
        layout = self.layout
        self.is_e2m1 = layout.data_format == "e2m1"
        self.chunks = layout.d_qk // CHUNK
        # A unit is a chunk, or as many as a group of scales has: lanes of it that share a scale, such groups in it.
        self.unit = max(layout.scale_group // CHUNK, 1)
        self.lanes = min(max(layout.scale_group // 8, 1), LANES)
        self.groups = LANES // self.lanes
        self.units = layout.d_quant // CHUNK // self.unit
        self.packs = -(-self.units // 2)  # unit i and unit i + packs share registers
        # Bytes between tokens of a page, and where a token's bf16 columns and scales begin.
        self.row_bytes = layout.data_bytes if layout.scales_behind_page else layout.bytes_per_token
        coded = layout.d_quant // 2 if self.is_e2m1 else layout.d_quant
        self.tail = coded + (0 if layout.scales_behind_page else layout.scale_bytes)
        self.scales = coded

    @cute.jit
    def __call__(
        self,
        rows: cute.Tensor,  # bf16 [n, d_qk]
        cache: cute.Tensor,  # bf16 or uint8 [num_pages, page_size, 1, row]
        fault_word: cute.Tensor,  # int32 [1]
        slots: Int64,  # address
        positions: Int64,  # address; read only with rope
        cos: Int64,  # address of fp32 [num_positions, 32]; read only with rope
        sin: Int64,
        slot_words: Int32,  # of 4 bytes from slot to slot
        position_words: Int32,
        wide: Int32,  # bit 0: slots are int64, bit 1: positions are
        num_slots: Int32,
        num_positions: Int32,
        cos_step: Int32,  # elements from position to position
        sin_step: Int32,
        rope: Int32,  # 0, PAIRS or HALVES
        stream: cuda.CUstream,
    ):
        """Store the tokens."""
        per_cta = TOKENS * self.config.warps
        self.kernel(
            rows, cache, fault_word, slots, positions, cos, sin, slot_words, position_words, wide, num_slots,
            num_positions, cos_step, sin_step, rope,
        ).launch(
            grid=[cute.ceil_div(rows.shape[0], per_cta), 1, 1],
            block=[32 * self.config.warps, 1, 1],
            max_number_threads=[1024, 1, 1],
            stream=stream,
        )  # fmt: skip

    @cute.kernel
    def kernel(
        self,
        rows: cute.Tensor,
        cache: cute.Tensor,
        fault_word: cute.Tensor,
        slots: Int64,
        positions: Int64,
        cos: Int64,
        sin: Int64,
        slot_words: Int32,
        position_words: Int32,
        wide: Int32,
        num_slots: Int32,
        num_positions: Int32,
        cos_step: Int32,
        sin_step: Int32,
        rope: Int32,
    ):
        """Four tokens per warp."""
        tid, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        lane = cute.arch.lane_idx()
        c = lane & (LANES - 1)
        count = rows.shape[0]
        token = (block * self.config.warps + tid // 32) * TOKENS + lane // LANES
        is_token = token < count
        token = token if is_token else count - 1  # behind the last one the last
        low, high = self.number(slots, token, slot_words, wide & 1)
        at, is_beyond = Int32(0), cutlass.Boolean(False)
        if rope != 0:
            at, is_beyond = self.position(positions, token, position_words, wide & 2, num_positions)
        row = rows.iterator.toint() + Int64(token) * Int64(rows.stride[0]) * 2 + Int64(c * 16)
        words = [self.load(row, 2 * CHUNK * j) for j in range(self.chunks)]
        cosines = sines = (Float32(0.0),) * 8
        if rope != 0:
            cosines = self.table(cos, at, cos_step, rope, c)
            sines = self.table(sin, at, sin_step, rope, c)
        place, behind = self.find(cache, fault_word, low, high, is_token, num_slots)
        peaks, exponents = [], []
        for pack in cutlass.range_constexpr(self.packs):
            if const_expr(pack == self.packs - 1 and self.units * self.unit == self.chunks):
                words[-1] = self.rotated(words[-1], cosines, sines, is_beyond, rope, c)
            peak, exponent = self.store_codes(words, pack, place, c)
            peaks.append(peak)
            exponents.append(exponent)
        if const_expr(self.units > 0):
            self.store_scales(peaks, exponents, place, behind, c)
        plain = range(self.units * self.unit, self.chunks)
        for j in cutlass.range_constexpr(len(plain)):
            if const_expr(j == len(plain) - 1):
                words[-1] = self.rotated(words[-1], cosines, sines, is_beyond, rope, c)
            self.store(place + Int64(c * 16), place, self.tail + 2 * CHUNK * j, words[plain[j]])

    # ------------------------------------------------------------------ memory

    @cute.jit
    def number(self, begin: Int64, index: Int32, words: Int32, is_wide: Int32):
        """(low, high) words of an integer of 32 or 64 bits."""
        address = begin + Int64(index) * Int64(words * 4)
        low = cute.arch.inline_ptx("ld.global.b32 {$w0}, [{$r0}];", write_only_types=[Int32], read_only_args=[address])
        high = low >> 31
        if is_wide != 0:
            high = cute.arch.inline_ptx(
                "ld.global.b32 {$w0}, [{$r0} + 4];", write_only_types=[Int32], read_only_args=[address]
            )
        return low, high

    def load(self, address: Int64, offset: int) -> Any:
        """Sixteen bytes that nobody reads again."""
        return tuple(
            cute.arch.inline_ptx(
                f"ld.global.L1::no_allocate.v4.b32 {{{{$w0}}, {{$w1}}, {{$w2}}, {{$w3}}}}, [{{$r0}} + {offset}];",
                write_only_types=[Int32] * 4,
                read_only_args=[address],
            )
        )

    def store(self, address: Int64, place: Int64, offset: int, words: Any) -> None:
        """One, two or four words to address + offset unless the token's place is 0."""
        count = len(words)
        names = ", ".join(f"{{$r{x + 2}}}" for x in range(count))
        target = (
            f"v{count}.b32 [{{$r0}} + {offset}], {{{names}}}" if count > 1 else f"b32 [{{$r0}} + {offset}], {names}"
        )
        cute.arch.inline_ptx(
            f"{{ .reg .pred p; setp.ne.s64 p, {{$r1}}, 0; @p st.global.{target}; }}",
            read_only_args=[address, place, *words],
        )

    @cute.jit
    def find(
        self, cache: cute.Tensor, fault_word: cute.Tensor, low: Int32, high: Int32, is_token: cutlass.Boolean,
        num_slots: Int32,
    ):  # fmt: skip
        """The address of this lane's token in the cache, 0 for none, and how far behind it its scales begin."""
        place, behind = Int64(0), Int32(self.scales)
        page_size = cache.shape[1]
        if is_token & (high == 0) & (low >= 0) & (low < num_slots):
            page = Int32(Uint32(low) // Uint32(page_size))
            offset = low - page * page_size
            row = Int64(self.row_bytes)
            page_bytes = Int64(cache.stride[0])
            if const_expr(self.layout.d_quant == 0):
                row, page_bytes = Int64(cache.stride[1]) * 2, page_bytes * 2
            place = cache.iterator.toint() + Int64(page) * page_bytes + Int64(offset) * row
            if const_expr(self.layout.scales_behind_page):
                behind = (page_size - offset) * self.row_bytes + offset * self.layout.scale_bytes
        elif is_token & ((low != -1) | (high != -1)):
            cute.arch.atomic_or(fault_word.iterator, Int32(FAULT_INDEX))
        return place, behind

    # ------------------------------------------------------------------ RoPE

    @cute.jit
    def position(self, positions: Int64, token: Int32, words: Int32, is_wide: Int32, num_positions: Int32):
        """A token's row of the tables, and whether its position is behind them all."""
        low, high = self.number(positions, token, words, is_wide)
        is_beyond = (high > 0) | ((high == 0) & ((low < 0) | (low >= num_positions)))
        at = Int32(0) if high < 0 else low
        return num_positions - 1 if is_beyond else at, is_beyond

    @cute.jit
    def table(self, begin: Int64, at: Int32, step: Int32, rope: Int32, c: Int32):
        """The cosines or sines of a lane's columns: four for as many pairs, twice, or eight for eight columns."""
        column = c * 4 if rope == PAIRS else (c & 3) * 8
        further = Int32(0) if rope == PAIRS else Int32(16)
        here = begin + (Int64(at) * Int64(step) + Int64(column)) * 4
        return (*self.four(here), *self.four(here + Int64(further)))

    def four(self, address: Int64) -> Any:
        """Four fp32 numbers of a table."""
        return tuple(
            cute.arch.inline_ptx(
                "ld.global.v4.f32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
                write_only_types=[Float32] * 4,
                read_only_args=[address],
            )
        )

    @cute.jit
    def rotated(
        self, words: cutlass.Constexpr, cosines: cutlass.Constexpr, sines: cutlass.Constexpr,
        is_beyond: cutlass.Boolean, rope: Int32, c: Int32,
    ):  # fmt: skip
        """A lane's eight of the last 64 columns (four words) rotated by their token's position and rounded to bf16."""
        w, x, y, z = words
        if rope == PAIRS:
            w, x, y, z = [self.turn_pair(*each) for each in zip((w, x, y, z), cosines[:4], sines[:4])]
        if rope == HALVES:
            # The other column of a pair is 32 away, four lanes: x cos - y sin, but y cos + x sin.
            sign = Int32(-0x7FFF8000) if c < 4 else Int32(0)
            others = [cute.arch.shuffle_sync_bfly(each, 4) ^ sign for each in (w, x, y, z)]
            w, x, y, z = [
                self.turn_halves(each, other, *cosines[2 * k : 2 * k + 2], *sines[2 * k : 2 * k + 2])
                for k, (each, other) in enumerate(zip((w, x, y, z), others))
            ]
        if is_beyond:
            w, x, y, z = Int32(NAN_PAIR), Int32(NAN_PAIR), Int32(NAN_PAIR), Int32(NAN_PAIR)
        return w, x, y, z

    def turn_pair(self, word: Int32, cos: Float32, sin: Float32) -> Int32:
        """(x, y) -> (x cos - y sin, y cos + x sin). No product is fused with a sum."""
        return cute.arch.inline_ptx(
            "{ .reg .b32 l, h; .reg .f32 x, y, p, q, u, v; shl.b32 l, {$r0}, 16; and.b32 h, {$r0}, 0xFFFF0000;"
            " mov.b32 x, l; mov.b32 y, h; mul.rn.f32 p, x, {$r1}; mul.rn.f32 q, y, {$r2}; sub.rn.f32 u, p, q;"
            " mul.rn.f32 p, y, {$r1}; mul.rn.f32 q, x, {$r2}; add.rn.f32 v, p, q; cvt.rn.bf16x2.f32 {$w0}, v, u; }",
            write_only_types=[Int32],
            read_only_args=[word, cos, sin],
        )

    def turn_halves(self, word: Int32, other: Int32, c0: Float32, c1: Float32, s0: Float32, s1: Float32) -> Int32:
        """Two columns x and their partners y, of the right sign: x cos + y sin."""
        return cute.arch.inline_ptx(
            "{ .reg .b32 l, h; .reg .f32 x, y, p, q, u, v; shl.b32 l, {$r0}, 16; and.b32 h, {$r0}, 0xFFFF0000;"
            " mov.b32 x, l; mov.b32 y, h; mul.rn.f32 p, x, {$r2}; mul.rn.f32 q, y, {$r3};"
            " shl.b32 l, {$r1}, 16; and.b32 h, {$r1}, 0xFFFF0000; mov.b32 x, l; mov.b32 y, h;"
            " mul.rn.f32 x, x, {$r4}; mul.rn.f32 y, y, {$r5}; add.rn.f32 u, p, x; add.rn.f32 v, q, y;"
            " cvt.rn.bf16x2.f32 {$w0}, v, u; }",
            write_only_types=[Int32],
            read_only_args=[word, other, c0, c1, s0, s1],
        )

    # ------------------------------------------------------------------ codes and scales

    @cute.jit
    def store_codes(self, words: cutlass.Constexpr, pack: cutlass.Constexpr, place: Int64, c: Int32):
        """Codes of units `pack` and `pack + packs`, where there is one; (largest magnitudes, what their scales are)."""
        units = [u for u in (pack, pack + self.packs) if u < self.units]
        chunks = [list(range(u * self.unit, (u + 1) * self.unit)) for u in units]
        peaks = self.peaks([[w for j in each for w in words[j]] for each in chunks])
        if const_expr(self.is_e2m1):
            exponents, factors = self.small_scales(peaks)
        else:
            exponents, factors = self.exponents(peaks)
        for h in cutlass.range_constexpr(len(units)):
            for k in cutlass.range_constexpr(self.unit):
                j = chunks[h][k]
                if const_expr(self.is_e2m1):
                    word = self.e2m1(*words[j], factors[h])
                    self.store(place + Int64(c * 4), place, CHUNK // 2 * j, [word])
                else:
                    self.store(place + Int64(c * 8), place, CHUNK * j, self.e4m3(*words[j], factors[h]))
        return peaks, exponents

    @cute.jit
    def store_scales(
        self, peaks: cutlass.Constexpr, exponents: cutlass.Constexpr, place: Int64, behind: Int32, c: Int32
    ):
        """Lane i of a group's stores the scales of its units i, i + lanes, ...; unit u is half u // packs of pack u % packs."""
        i, group = c & (self.lanes - 1), c // self.lanes
        for first in cutlass.range_constexpr(0, self.units, self.lanes):
            u = first + i
            bits = 8 if self.is_e2m1 else 16
            half = u // self.packs * bits
            if const_expr(self.lanes <= self.packs):  # the same for all lanes
                half = first // self.packs * bits
            near = u & (self.packs - 1)  # of two or four
            value = self.picked(exponents, near) >> half
            address = place + Int64(behind)
            if const_expr(self.is_e2m1):
                self.store_byte(address + Int64(u * self.groups + group), place, value)
            else:
                is_finite = ((self.picked(peaks, near) >> half) & 0xFFFF) < NOT_FINITE
                biased = (value & 0xFFFF) - 8
                if const_expr(self.layout.scale_format == "fp32"):
                    scale = biased << 23 if is_finite else Int32(NAN)
                    self.store(address + Int64(u * 4), place if u < self.units else Int64(0), 0, [scale])
                else:
                    scale = biased if is_finite else Int32(255)
                    if const_expr(self.layout.scale_pad_bytes > 0):
                        scale = scale if u < self.units else Int32(0)
                    self.store_byte(address + Int64(u * self.groups + group), place, scale)

    @cute.jit
    def picked(self, values: cutlass.Constexpr, near: Int32) -> Int32:
        """values[near], by selections."""
        found = values[0]
        for x in cutlass.range_constexpr(1, len(values)):
            found = values[x] if near == x else found
        return found

    def store_byte(self, address: Int64, place: Int64, value: Int32) -> None:
        """The last byte of a word, unless the place is 0."""
        cute.arch.inline_ptx(
            "{ .reg .pred p; setp.ne.s64 p, {$r1}, 0; @p st.global.b8 [{$r0}], {$r2}; }",
            read_only_args=[address, place, value],
        )

    # ------------------------------------------------------------------ numbers

    @cute.jit
    def peaks(self, units: cutlass.Constexpr) -> Int32:
        """Bits of the largest magnitude of this lane's group in one or two units, 16 each. Beyond all is inf, then NaN."""
        tops = [self.top(words) for words in units]
        found = cute.arch.inline_ptx(
            "{ .reg .b32 a, b; prmt.b32 a, {$r0}, {$r1}, 0x5410; prmt.b32 b, {$r0}, {$r1}, 0x7632;"
            " max.u16x2 {$w0}, a, b; }",
            write_only_types=[Int32],
            read_only_args=[tops[0], tops[-1]],
        )
        for distance in (1, 2, 4):
            if const_expr(distance < self.lanes):
                found = self.larger(found, cute.arch.shuffle_sync_bfly(found, distance))
        return found

    def top(self, words: Any) -> Int32:
        """The largest magnitudes of even and of odd columns; NaN above all, so that they compare like their bits."""
        steps = "".join(f" max.NaN.xorsign.abs.bf16x2 a, a, {{$r{x}}};" for x in range(1, len(words)))
        return cute.arch.inline_ptx(
            "{ .reg .b32 a; mov.b32 a, {$r0};" + steps + " and.b32 {$w0}, a, 0x7FFF7FFF; }",
            write_only_types=[Int32],
            read_only_args=list(words),
        )

    def larger(self, one: Int32, other: Int32) -> Int32:
        """The larger one of either 16 bits."""
        return cute.arch.inline_ptx(
            "max.u16x2 {$w0}, {$r0}, {$r1};", write_only_types=[Int32], read_only_args=[one, other]
        )

    @cute.jit
    def exponents(self, peaks: Int32):
        """log2 of the scale of e4m3 codes + 135 for either 16 bits, and for either one over it as a pair of bf16 numbers.

        448 is 1.75 * 2^8, so mantissas above .75 carry.
        """
        carried = ((peaks + 0x1F001F) >> 7) & 0x01FF01FF
        found = cute.arch.inline_ptx(  # max takes no constant
            f"{{ .reg .b32 m; mov.b32 m, {LOWEST}; max.u16x2 {{$w0}}, {{$r0}}, m; }}",
            write_only_types=[Int32],
            read_only_args=[carried],
        )
        inverse = (Int32(262 * 0x10001) - found) << 7  # 2^-exponent, from exponent + 127 + 8
        factors = cute.arch.inline_ptx(
            "prmt.b32 {$w0}, {$r0}, {$r0}, 0x1010; prmt.b32 {$w1}, {$r0}, {$r0}, 0x3232;",
            write_only_types=[Int32, Int32],
            read_only_args=[inverse],
        )
        return found, factors

    def e4m3(self, a: Int32, b: Int32, c: Int32, d: Int32, factor: Int32) -> Any:
        """Codes of eight bf16 numbers times a power of two (a pair of it), magnitudes up to 448."""
        steps = "".join(
            f"mul.bf16x2 h, {{$r{x}}}, {{$r4}}; shl.b32 l, h, 16; and.b32 h, h, 0xFFFF0000; mov.b32 x, l; mov.b32 y, h;"
            f" cvt.rn.satfinite.e4m3x2.f32 {to}, y, x; "
            for x, to in enumerate(("s", "t", "u", "v"))
        )
        return list(
            cute.arch.inline_ptx(
                "{ .reg .b32 l, h; .reg .f32 x, y; .reg .b16 s, t, u, v; "
                + steps
                + "mov.b32 {$w0}, {s, t}; mov.b32 {$w1}, {u, v}; }",
                write_only_types=[Int32, Int32],
                read_only_args=[a, b, c, d, factor],
            )
        )

    def small_scales(self, peaks: Int32) -> Any:
        """Of e2m1 codes: the e4m3 codes of one or two units' scales, 8 bits each, and for either 2^-14 over the scale."""
        # What is not finite is NaN from `r` on, and its code 0x7F.
        codes, first, second = cute.arch.inline_ptx(
            "{ .reg .b32 l, h; .reg .f32 x, y, q, r; .reg .b16 s; .reg .b16 e, g;"
            " shl.b32 l, {$r0}, 16; and.b32 h, {$r0}, 0xFFFF0000; mov.b32 x, l; mov.b32 y, h;"
            + "".join(
                f" mul.rn.f32 q, {n}, 0f{SIXTH:08X}; fma.rn.f32 r, q, 0fC0C00000, {n}; fma.rn.f32 q, r, 0f{SIXTH:08X}, q;"
                f" max.NaN.f32 q, q, 0f3B000000; min.NaN.f32 {n}, q, 0f43E00000;"
                for n in ("x", "y")
            )
            + " cvt.rn.satfinite.e4m3x2.f32 s, y, x; cvt.u32.u16 {$w0}, s;"
            " cvt.rn.f16x2.e4m3x2 l, s; mov.b32 {e, g}, l; cvt.f32.f16 x, e; cvt.f32.f16 y, g;"
            " mul.rn.f32 x, x, 0f46800000; mul.rn.f32 y, y, 0f46800000;"
            " rcp.approx.ftz.f32 {$w1}, x; rcp.approx.ftz.f32 {$w2}, y; }",
            write_only_types=[Int32, Float32, Float32],
            read_only_args=[peaks],
        )
        return codes, (first, second)

    def e2m1(self, a: Int32, b: Int32, c: Int32, d: Int32, factor: Float32) -> Int32:
        """Codes of eight bf16 numbers times `factor`, in which a code's value is 2^-14 of itself; nibble i is column i."""
        # Columns i and i + 4 go together, as in the word of codes. With its sign above, a code is in bits 9 to 11 and 15.
        steps = "".join(
            (f"shl.b32 l, {{$r{x}}}, 16; shl.b32 h, {{$r{x + 2}}}, 16;" if odd == 0 else
             f"and.b32 l, {{$r{x}}}, 0xFFFF0000; and.b32 h, {{$r{x + 2}}}, 0xFFFF0000;")
            + " mov.b32 x, l; mov.b32 y, h; mul.rn.f32 x, x, {$r4}; mul.rn.f32 y, y, {$r4}; cvt.rn.f16x2.f32 h, y, x;"
            " min.xorsign.abs.f16x2 h, h, m; shr.u32 t, h, 9; and.b32 t, t, 0x00010001; add.u32 h, h, t;"
            f" add.u32 q{2 * x + odd}, h, 0x00FF00FF; "
            for x in range(2)
            for odd in range(2)
        )  # fmt: skip
        either = "lop3.b32 {}, {}, {}, {}, 0xE4;"  # first where the mask is set, else second
        return cute.arch.inline_ptx(
            "{ .reg .b32 l, h, t, m, q0, q1, q2, q3; .reg .f32 x, y; mov.b32 m, 0x0E000E00; " + steps
            + "prmt.b32 l, q0, q2, 0x7351; prmt.b32 h, q1, q3, 0x7351; shr.u32 t, l, 1; shr.u32 l, l, 4; "
            + either.format("l", "t", "l", "0x07070707") + " shl.b32 t, h, 3; "
            + either.format("h", "t", "h", "0x70707070") + either.format("{$w0}", "l", "h", "0x0F0F0F0F") + " }",
            write_only_types=[Int32],
            read_only_args=[a, b, c, d, factor],
        )  # fmt: skip
