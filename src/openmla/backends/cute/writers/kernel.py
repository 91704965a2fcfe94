"""Cache writers for Hopper: bound by memory.

Computes
    cache[slot] = pack(rotate(row, position)) for every token with a slot, the bytes of `openmla.reference.quant.write_rows`.
    e4m3   scale = 2 ** ceil(log2(max(amax / 448, 1e-4)))    code = e4m3(x / scale)
    e2m1   scale = e4m3(min(max(amax / 6, 2 ** -9), 448))    code = e2m1(x / scale)

Schedule
    A warp stores four tokens. It asks for their slots and positions, then at once for all of their columns (4.5 KB), so that
    a token costs one latency of memory, two with RoPE, whose tables hang on the position. Then token by token:
        lane l: columns 8 l to 8 l + 7 and the same 256 further on, 16 bytes each; a group's largest magnitude by shuffles,
        both halves in one register; codes out, 8 bytes per lane and half (e2m1: 4); scales, a lane per group and half
        lane 8 t + c: the last 64 columns of token t, 16 bytes each, where they are rotated. Stored from there (layouts with
        bf16 columns), or handed to lanes 24 to 31 of the second half, which quantise them
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
from cutlass import Float32, Int32, Int64, const_expr

from openmla.backends.cute.writers.config import D_ROPE, TOKENS, Config

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
        self.lanes = max(layout.scale_group // 8, 1)  # per group
        # Bytes between tokens of a page, and where a token's bf16 columns and scales begin.
        self.row_bytes = layout.data_bytes if layout.scales_behind_page else layout.bytes_per_token
        coded = layout.d_quant // 2 if self.is_e2m1 else layout.d_quant
        self.tail = coded + (0 if layout.scales_behind_page else layout.scale_bytes) if coded else 2 * config.d_main
        self.scales = coded
        self.merges = layout.d_quant == layout.d_qk  # turned columns are quantised

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
        chunk = lane & 7
        count = rows.shape[0]
        first = (block * self.config.warps + tid // 32) * TOKENS
        token = first + (lane >> 3)
        is_token = token < count
        low, high = self.number(slots, token if is_token else count - 1, slot_words, wide & 1)
        where_low, where_high = Int32(0), Int32(0)
        if rope != 0:
            where_low, where_high = self.number(positions, token if is_token else count - 1, position_words, wide & 2)
        # Columns of all tokens, behind the last one those of the last.
        begin = rows.iterator.toint()
        step = Int64(rows.stride[0]) * 2
        words = [
            self.load(begin + Int64(cutlass.min(first + k, count - 1)) * step + Int64(lane * 16), 512 * half)
            for k in range(TOKENS)
            for half in range(2)
        ]
        own = begin + Int64(cutlass.min(token, count - 1)) * step + Int64(2 * (self.layout.d_qk - D_ROPE) + chunk * 16)
        turned = Int32(0), Int32(0), Int32(0), Int32(0)
        if const_expr(not self.merges):
            turned = self.load(own, 0)
        if rope != 0:
            turned = self.rotate(
                self.load(own, 0) if self.merges else turned, cos, sin, where_low, where_high, num_positions, cos_step,
                sin_step, rope, chunk,
            )  # fmt: skip
        place, behind = self.find(cache, fault_word, low, high, is_token, num_slots)
        if const_expr(not self.merges):
            self.store(place + Int64(chunk * 16), place, self.tail, turned)
        for k in cutlass.range_constexpr(TOKENS):
            left, right = words[2 * k], words[2 * k + 1]
            if const_expr(self.merges):
                if rope != 0:
                    right = self.merged(right, turned, k, lane)
            halves = left, right
            there = self.from_lane(place, 8 * k)
            if const_expr(self.layout.d_quant == 0):
                self.store_plain(there, halves, lane)
            else:
                self.store_coded(there, cute.arch.shuffle_sync(behind, 8 * k), halves, lane)

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
    def from_lane(self, value: Int64, source: cutlass.Constexpr) -> Int64:
        """A lane's 64 bits to all lanes."""
        low, high = Int32(value), Int32(value >> 32)
        low, high = cute.arch.shuffle_sync(low, source), cute.arch.shuffle_sync(high, source)
        return cute.arch.inline_ptx(
            "mov.b64 {$w0}, {{$r0}, {$r1}};", write_only_types=[Int64], read_only_args=[low, high]
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
            page = low // page_size
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
    def rotate(
        self, words: cutlass.Constexpr, cos: Int64, sin: Int64, low: Int32, high: Int32, num_positions: Int32,
        cos_step: Int32, sin_step: Int32, rope: Int32, chunk: Int32,
    ):  # fmt: skip
        """Eight of the last 64 columns (four words) rotated by their token's position and rounded to bf16."""
        is_beyond = (high > 0) | ((high == 0) & ((low < 0) | (low >= num_positions)))
        at = Int32(0) if high < 0 else low
        at = num_positions - 1 if is_beyond else at
        a, b, c, d = words
        if rope == PAIRS:
            c4 = self.table(cos, at, cos_step, chunk * 4, 0)
            s4 = self.table(sin, at, sin_step, chunk * 4, 0)
            a, b, c, d = [self.turn_pair(w, x, y) for w, x, y in zip((a, b, c, d), c4, s4)]
        else:
            # Columns 8 chunk to 8 chunk + 7; the other column of a pair is 32 away, four lanes.
            column = (chunk & 3) * 8
            sign = Int32(-0x7FFF8000) if chunk < 4 else Int32(0)  # x cos - y sin, but y cos + x sin
            others = [cute.arch.shuffle_sync_bfly(w, 4) ^ sign for w in (a, b, c, d)]
            c8 = self.table(cos, at, cos_step, column, 0) + self.table(cos, at, cos_step, column, 16)
            s8 = self.table(sin, at, sin_step, column, 0) + self.table(sin, at, sin_step, column, 16)
            a, b, c, d = [
                self.turn_halves(w, o, *c8[2 * x : 2 * x + 2], *s8[2 * x : 2 * x + 2])
                for x, (w, o) in enumerate(zip((a, b, c, d), others))
            ]
        if is_beyond:
            a, b, c, d = Int32(NAN_PAIR), Int32(NAN_PAIR), Int32(NAN_PAIR), Int32(NAN_PAIR)
        return a, b, c, d

    def table(self, begin: Int64, at: Int32, step: Int32, column: Int32, offset: int) -> Any:
        """Four cosines or sines."""
        return tuple(
            cute.arch.inline_ptx(
                f"ld.global.v4.f32 {{{{$w0}}, {{$w1}}, {{$w2}}, {{$w3}}}}, [{{$r0}} + {offset}];",
                write_only_types=[Float32] * 4,
                read_only_args=[begin + (Int64(at) * Int64(step) + Int64(column)) * 4],
            )
        )

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

    @cute.jit
    def merged(self, words: cutlass.Constexpr, turned: cutlass.Constexpr, k: cutlass.Constexpr, lane: Int32):
        """A token's second half with its last 64 columns from the lanes that rotated them."""
        found = []
        for x in cutlass.range_constexpr(4):
            there = cute.arch.shuffle_sync(turned[x], 8 * k + (lane & 7))
            found.append(there if lane >= 24 else words[x])
        return tuple(found)

    # ------------------------------------------------------------------ the two sorts of caches

    @cute.jit
    def store_plain(self, there: Int64, halves: cutlass.Constexpr, lane: Int32):
        """Columns as they are."""
        self.store(there + Int64(lane * 16), there, 0, halves[0])
        second = there
        if const_expr(self.config.d_main == 448):
            second = Int64(0) if lane >= 24 else there
        self.store(there + Int64(lane * 16), second, 512, halves[1])

    @cute.jit
    def store_coded(self, there: Int64, behind: Int32, halves: cutlass.Constexpr, lane: Int32):
        """Codes and scales of a token."""
        peaks = self.peaks(halves)
        # Lane 0 of a group stores the first half's scale, lane 1 the second's.
        half = lane & (self.lanes - 1)
        group = half * (32 // self.lanes) + lane // self.lanes
        if const_expr(self.is_e2m1):
            codes, factors = self.small_scales(peaks)
            for h in cutlass.range_constexpr(2):
                word = self.e2m1(*halves[h], factors[h])
                self.store(there + Int64(lane * 4), there, 128 * h, [word])
            self.store_byte(there + Int64(behind + group), there if half < 2 else Int64(0), codes >> (8 * half))
        else:
            exponents = self.exponents(peaks)
            for h in cutlass.range_constexpr(2):
                # 2^-exponent, from exponent + 127 + 8
                factor = Int32(262 << 23) - (((exponents >> (16 * h)) & 0xFFFF) << 23)
                pair = self.e4m3(*halves[h], factor)
                second = there
                if const_expr(h == 1 and self.config.d_main == 448):
                    second = Int64(0) if lane >= 24 else there
                self.store(there + Int64(lane * 8), second, 256 * h, pair)
            peak = (peaks >> (16 * half)) & 0xFFFF
            biased = ((exponents >> (16 * half)) & 0xFFFF) - 8
            wanted = there if half < 2 else Int64(0)
            if const_expr(self.layout.scale_format == "fp32"):
                scale = Int32(NAN) if peak >= NOT_FINITE else biased << 23
                self.store(there + Int64(behind + group * 4), wanted, 0, [scale])
            else:
                scale = Int32(255) if peak >= NOT_FINITE else biased
                if const_expr(self.layout.scale_pad_bytes > 0):
                    scale = scale if group < self.layout.num_scales else Int32(0)
                self.store_byte(there + Int64(behind + group), wanted, scale)

    def store_byte(self, address: Int64, place: Int64, value: Int32) -> None:
        """The last byte of a word, unless the place is 0."""
        cute.arch.inline_ptx(
            "{ .reg .pred p; setp.ne.s64 p, {$r1}, 0; @p st.global.b8 [{$r0}], {$r2}; }",
            read_only_args=[address, place, value],
        )

    # ------------------------------------------------------------------ numbers

    @cute.jit
    def peaks(self, halves: cutlass.Constexpr) -> Int32:
        """Bits of the largest magnitude of this lane's group in either half, 16 bits each. Beyond all is inf, then NaN."""
        found = cute.arch.inline_ptx(
            "{ .reg .b32 a, b, c, d; "
            + " ".join(
                f"and.b32 a, {{$r{4 * h}}}, 0x7FFF7FFF; and.b32 b, {{$r{4 * h + 1}}}, 0x7FFF7FFF; max.u16x2 {to}, a, b;"
                f" and.b32 a, {{$r{4 * h + 2}}}, 0x7FFF7FFF; and.b32 b, {{$r{4 * h + 3}}}, 0x7FFF7FFF; max.u16x2 a, a, b;"
                f" max.u16x2 {to}, {to}, a;"
                for h, to in enumerate(("c", "d"))
            )
            + " prmt.b32 a, c, d, 0x5410; prmt.b32 b, c, d, 0x7632; max.u16x2 {$w0}, a, b; }",
            write_only_types=[Int32],
            read_only_args=[*halves[0], *halves[1]],
        )
        for distance in (1, 2, 4, 8):
            if const_expr(distance < self.lanes):
                found = self.larger(found, cute.arch.shuffle_sync_bfly(found, distance))
        return found

    def larger(self, one: Int32, other: Int32) -> Int32:
        """The larger one of either 16 bits."""
        return cute.arch.inline_ptx(
            "max.u16x2 {$w0}, {$r0}, {$r1};", write_only_types=[Int32], read_only_args=[one, other]
        )

    @cute.jit
    def exponents(self, peaks: Int32) -> Int32:
        """log2 of the scale of e4m3 codes + 135, for either 16 bits: 448 is 1.75 * 2^8, so mantissas above .75 carry."""
        carried = ((peaks + 0x1F001F) >> 7) & 0x01FF01FF
        return cute.arch.inline_ptx(  # max takes no constant
            f"{{ .reg .b32 m; mov.b32 m, {LOWEST}; max.u16x2 {{$w0}}, {{$r0}}, m; }}",
            write_only_types=[Int32],
            read_only_args=[carried],
        )

    def e4m3(self, a: Int32, b: Int32, c: Int32, d: Int32, factor: Int32) -> Any:
        """Codes of eight bf16 numbers times a power of two (its bits), magnitudes up to 448."""
        steps = "".join(
            f"shl.b32 l, {{$r{x}}}, 16; and.b32 h, {{$r{x}}}, 0xFFFF0000; mov.b32 x, l; mov.b32 y, h; mul.rn.f32 x, x, f;"
            f" mul.rn.f32 y, y, f; cvt.rn.satfinite.e4m3x2.f32 {to}, y, x; "
            for x, to in enumerate(("s", "t", "u", "v"))
        )
        return list(
            cute.arch.inline_ptx(
                "{ .reg .b32 l, h; .reg .f32 x, y, f; .reg .b16 s, t, u, v; mov.b32 f, {$r4}; "
                + steps
                + "mov.b32 {$w0}, {s, t}; mov.b32 {$w1}, {u, v}; }",
                write_only_types=[Int32, Int32],
                read_only_args=[a, b, c, d, factor],
            )
        )

    @cute.jit
    def small_scales(self, peaks: Int32):
        """Of e2m1 codes: the e4m3 codes of both halves' scales, and for either 2^-14 over the scale."""
        codes, first, second = cute.arch.inline_ptx(
            "{ .reg .b32 l, h; .reg .f32 x, y, p, q, r; .reg .b16 s; .reg .pred o; .reg .b16 e, g;"
            " shl.b32 l, {$r0}, 16; and.b32 h, {$r0}, 0xFFFF0000; mov.b32 x, l; mov.b32 y, h;"
            + "".join(
                f" mul.rn.f32 q, {n}, 0f{SIXTH:08X}; fma.rn.f32 r, q, 0fC0C00000, {n}; fma.rn.f32 q, r, 0f{SIXTH:08X}, q;"
                f" max.f32 q, q, 0f3B000000; min.f32 {n}, q, 0f43E00000;"
                for n in ("x", "y")
            )
            + " cvt.rn.satfinite.e4m3x2.f32 s, y, x; cvt.u32.u16 {$w0}, s;"
            " cvt.rn.f16x2.e4m3x2 l, s; mov.b32 {e, g}, l; cvt.f32.f16 x, e; cvt.f32.f16 y, g;"
            " mul.rn.f32 x, x, 0f46800000; mul.rn.f32 y, y, 0f46800000;"
            " rcp.approx.f32 {$w1}, x; rcp.approx.f32 {$w2}, y; }",
            write_only_types=[Int32, Float32, Float32],
            read_only_args=[peaks],
        )
        # max and min pass over NaN.
        codes = codes | 0x7F if (peaks & 0xFFFF) >= NOT_FINITE else codes
        codes = codes & 0xFF | 0x7F00 if ((peaks >> 16) & 0xFFFF) >= NOT_FINITE else codes
        return codes, [first, second]

    def e2m1(self, a: Int32, b: Int32, c: Int32, d: Int32, factor: Float32) -> Int32:
        """Codes of eight bf16 numbers times `factor`, in which a code's value is 2^-14 of itself; nibble i is column i."""
        # Columns i and i + 4 go together: the halves of a word that collects nibbles.
        steps = "".join(
            (f"shl.b32 l, {{$r{x}}}, 16; shl.b32 h, {{$r{x + 2}}}, 16;" if odd == 0 else
             f"and.b32 l, {{$r{x}}}, 0xFFFF0000; and.b32 h, {{$r{x + 2}}}, 0xFFFF0000;")
            + " mov.b32 x, l; mov.b32 y, h; mul.rn.f32 x, x, {$r4}; mul.rn.f32 y, y, {$r4}; cvt.rn.f16x2.f32 h, y, x;"
            " and.b32 l, h, 0x7FFF7FFF; min.u16x2 l, l, m; shr.u32 t, l, 9; and.b32 t, t, 0x00010001; add.u32 l, l, t;"
            " add.u32 l, l, 0x00FF00FF; shr.u32 l, l, 9; and.b32 l, l, 0x00070007; shr.u32 h, h, 12;"
            " and.b32 h, h, 0x00080008; or.b32 l, l, h; "
            + (f"shl.b32 l, l, {4 * (2 * x + odd)}; or.b32 w, w, l; " if x + odd else "mov.b32 w, l; ")
            for x in range(2)
            for odd in range(2)
        )  # fmt: skip
        return cute.arch.inline_ptx(
            "{ .reg .b32 l, h, t, w, m; .reg .f32 x, y; mov.b32 m, 0x0E000E00; " + steps + "mov.b32 {$w0}, w; }",
            write_only_types=[Int32],
            read_only_args=[a, b, c, d, factor],
        )
