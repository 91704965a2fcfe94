"""Dense MLA decode for few rows over a cache of e4m3 codes: what `kernel.DecodeDenseSmall` does otherwise there. Device code.

A token is 512 codes, four fp32 scales, then 64 bf16 columns of RoPE (fp8_656) or none (fp8_528). Codes never become a
bf16 tile: each warp takes them out of the ring as matrix fragments and converts in registers, which hold the A operands of
both products. Those are mma.sync of single warps: wgmma from registers has to be waited for before its registers are
written again, and every such wait cost more than the product. Rows are an odd number of 16-byte chunks apart, so ldmatrix
reads eight of them without a bank conflict.

    S^T [64 keys, N]  = sum over groups of  scale[key, group] * (codes Q^T)    summed group by group
    O^T [512, N]     += codes^T (P scale)^T                                   four copies of P, one per group

e4m3 is exact in fp16, so both products are fp16 x fp16 -> fp32 with exact codes. The power of two in a scale is applied
to the accumulators of S and to P, exactly. What is left of a scale, 1 unless somebody else wrote the cache, multiplies the
codes, rounded to the contract's bf16; tiles without such a scale skip that. What may leave the range of fp16 is moved by powers of two:
Q by one per row (largest magnitude in [2^14, 2^15)), P by one per group, 2^14 over the largest scale seen (a running
maximum; O is rescaled as for the maximum of the scores). NaN codes and scales give NaN.

Rows of matrix fragments: ldmatrix gives a lane four consecutive codes of a key. As keys these are columns 4t to 4t + 3 of
16, so Q is stored with its pairs of columns in the order 0 2 4 6 1 3 5 7; as values (transposed) they are two columns of
two keys, so rows g and g + 8 of 16 rows of O^T are columns 2g and 2g + 1.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr

M = 64
GROUPS = 4  # of 128 columns, each with one scale
SCALE_PLACE = 512  # bytes of codes before the scales of a token
ROPE_PLACE = 528
BOX = 8  # rows of one copy where pages hold a multiple of it, else one
PAGE_OUT_OF_RANGE = 1
LOWEST, HIGHEST = 27, 227  # exponents of 2^-100 and 2^100 in fp32: beyond, scales count as these for the range of P
LOWEST_OF_ALL = 0x1B1B1B1B  # a byte per group
MISSING, BAD = 0, 1  # instead of the address of a row: behind the end, page id out of range


class Codes:
    """Mixin of `kernel.DecodeDenseSmall` for byte caches."""

    dtype: Any
    n: int
    d_qk: int
    row_bytes: int
    warpgroups: int

    # ------------------------------------------------------------------ the loading warp

    @cute.jit
    def fetch_rows(
        self,
        kv: cute.Tensor,
        table: cute.Tensor,
        request: Int32,
        token: Int32,
        end: Int32,
        head_kv: Int32,
        full: cutlass.Constexpr,
        empty: cutlass.Constexpr,
        stage: Int32,
        phase: Int32,
        sm_info: cute.Tensor,
        ring_base: Int32,
        pages: cute.Tensor,
    ) -> Int32:
        """One tile by bulk copies of eight rows, or of one; rows of a bad page become zeros. Returns fault bits.

        pages: of this tile's copies, from `look_up`; replaced by the next tile's.
        """
        lane = cute.arch.lane_idx()
        page_size = kv.shape[1]
        step = self.copied_rows(page_size)
        bad = Int32(0)
        source = cute.make_rmem_tensor(cute.make_layout(2), Int64)
        for half in cutlass.range_constexpr(2):
            row = (lane + 32 * half) * step
            source[half] = Int64(MISSING)
            if (row < M) & (token + row < end):
                page = pages[half]
                if (page < 0) | (page >= kv.shape[0]):
                    source[half] = Int64(BAD)
                    bad = Int32(PAGE_OUT_OF_RANGE)
                else:
                    source[half] = kv[page, (token + row) % page_size, head_kv, None].iterator.toint()
        self.look_up(pages, table, page_size, request, token + M, end)
        cute.arch.mbarrier_wait(empty + stage, phase)
        tile = ring_base + stage * (M * self.row_bytes)
        size = step * self.row_bytes
        seen = cute.make_rmem_tensor(cute.make_layout(2), Int32)
        count = Int32(0)
        for half in cutlass.range_constexpr(2):
            seen[half] = Int32(cute.arch.vote_ballot_sync(source[half] > BAD))
            count += cute.arch.popc(seen[half])
            if source[half] == BAD:
                self.zero_rows(tile + (lane + 32 * half) * size, size)
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            sm_info[0, stage] = self.bytes_of(seen[0]) if step == BOX else seen[0]
            sm_info[1, stage] = self.bytes_of(seen[0] >> 4) if step == BOX else seen[1]
            cute.arch.mbarrier_arrive_and_expect_tx(full + stage, count * size)
        cute.arch.sync_warp()
        barrier = (full + stage).toint().to(Int32)
        for half in cutlass.range_constexpr(2):
            if source[half] > BAD:
                cute.arch.inline_ptx(
                    "{ .reg .b64 policy; mov.b64 policy, 0x12F0000000000000; cp.async.bulk.shared::cluster.global.mbarrier"
                    "::complete_tx::bytes.L2::cache_hint [{$r0}], [{$r1}], {$r2}, [{$r3}], policy; }",
                    read_only_args=[tile + (lane + 32 * half) * size, source[half], size, barrier],
                )
        return bad

    @cute.jit
    def copied_rows(self, page_size: Int32) -> Int32:
        """Rows of one bulk copy."""
        return Int32(BOX) if page_size % BOX == 0 else Int32(1)

    @cute.jit
    def look_up(
        self, pages: cute.Tensor, table: cute.Tensor, page_size: Int32, request: Int32, token: Int32, end: Int32
    ):
        """Pages of this lane's copies of the tile at `token`; asked for a tile ahead, as they may come from memory."""
        step = self.copied_rows(page_size)
        for half in cutlass.range_constexpr(2):
            row = (cute.arch.lane_idx() + 32 * half) * step
            if (row < M) & (token + row < end):
                pages[half] = table[request, (token + row) // page_size]

    @cute.jit
    def zero_rows(self, target: Int32, size: Int32):
        """Zeros where a copy would have written; later copies to the same place come behind them."""
        for place in cutlass.range(0, size, 16, unroll=1):
            cute.arch.inline_ptx(
                "st.shared.v4.b32 [{$r0}], {{$r1}, {$r1}, {$r1}, {$r1}};", read_only_args=[target + place, Int32(0)]
            )
        cute.arch.fence_view_async_shared()

    # ------------------------------------------------------------------ Q

    @cute.jit
    def load_q_moved(
        self,
        q: cute.Tensor,
        where: Int32,
        first_query: Int32,
        head_kv: Int32,
        group: Int32,
        per_group: Int32,
        rows: Int32,
        q_base: Int32,
        sm_unit: cute.Tensor,
        scale_log2: Float32,
        tid: Int32,
    ):
        """Query rows of one request: times a power of two, latent columns as fp16 in the order of codes, RoPE as bf16.

        sm_unit: what a row's scores are to be multiplied with for base-2 logits. Absent rows become zeros.
        """
        lane = tid % 32
        words = cute.make_rmem_tensor(cute.make_layout(9), Int32)
        for i in cutlass.range_constexpr(self.n // 4 // self.warpgroups):
            row = tid // 32 + i * 4 * self.warpgroups
            words.fill(0)
            if row < rows:
                token, head = self.split_row(row, head_kv, group, per_group)
                line = q[where, first_query + token, head, None].iterator
                for c in cutlass.range_constexpr(2):
                    four = cute.arch.inline_ptx(
                        "ld.global.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
                        write_only_types=[Int32] * 4,
                        read_only_args=[(line + lane * 16 + c * 8).toint()],
                    )
                    for x in cutlass.range_constexpr(4):
                        words[c * 4 + x] = four[x]
                if const_expr(self.d_qk > SCALE_PLACE):
                    words[8] = cute.arch.inline_ptx(
                        "ld.global.b32 {$w0}, [{$r0}];",
                        write_only_types=[Int32],
                        read_only_args=[(line + SCALE_PLACE + lane * 2).toint()],
                    )
            peak = Int32(0)  # bits of a magnitude in bf16 grow with it
            for x in cutlass.range_constexpr(9):
                low, high = words[x] & 0x7FFF, words[x] >> 16 & 0x7FFF
                peak = low if low > peak else peak
                peak = high if high > peak else peak
            exponent = cute.arch.warp_redux_sync(peak, "max") >> 7
            exponent = exponent if exponent > 15 else Int32(15)
            factor = self.as_float((268 - exponent) << 23)
            if lane == 0:
                sm_unit[row] = self.as_float((exponent - 14) << 23) * scale_log2
            for x in cutlass.range_constexpr(8):
                words[x] = self.half_words(words[x], factor, "f16x2")
            for c in cutlass.range_constexpr(2):
                chunk = lane * 2 + c
                cute.arch.inline_ptx(
                    "st.shared.v4.b32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};",
                    read_only_args=[
                        q_base + chunk // 8 * (self.n * 128) + row * 128 + ((chunk ^ row) % 8) * 16,
                        words[c], words[2 + c], words[4 + c], words[6 + c],
                    ],
                )  # fmt: skip
            if const_expr(self.d_qk > SCALE_PLACE):
                cute.arch.inline_ptx(
                    "st.shared.b32 [{$r0}], {$r1};",
                    read_only_args=[
                        q_base + self.n * 1024 + row * 128 + ((lane // 4 ^ row) % 8) * 16 + lane % 4 * 4,
                        self.half_words(words[8], factor, "bf16x2"),
                    ],
                )

    @cute.jit
    def half_words(self, word: Int32, factor: Float32, kind: cutlass.Constexpr) -> Int32:
        """Two bf16 numbers times a factor, as two numbers of another format."""
        return cute.arch.inline_ptx(
            "{ .reg .b32 l, h; .reg .f32 a, b; shl.b32 l, {$r0}, 16; and.b32 h, {$r0}, 0xFFFF0000; mov.b32 a, l;"
            " mov.b32 b, h; mul.rn.f32 a, a, {$r1}; mul.rn.f32 b, b, {$r1}; cvt.rn." + kind + ".f32 {$w0}, b, a; }",
            write_only_types=[Int32],
            read_only_args=[word, factor],
        )

    @cute.jit
    def as_float(self, bits: Int32) -> Float32:
        """The number of these bits."""
        return cute.arch.inline_ptx("mov.b32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[bits])

    # ------------------------------------------------------------------ scores

    @cute.jit
    def operand_place(self, base: Int32, lane: Int32) -> Int32:
        """Where a lane's row of B begins for `operand`, of Q or P: [row, 64] of 16 bits in the 128-byte swizzle."""
        row = lane // 16 * 8 + lane % 8
        return base + row * 128 + (lane // 8 % 2 ^ lane % 8) * 16

    @cute.jit
    def operand(self, b: cute.Tensor, place: Int32, step: cutlass.Constexpr, offset: cutlass.Constexpr):
        """B of 16 columns (`step` of a 64-column line), for all N rows: two words per eight rows."""
        for i in cutlass.range_constexpr(self.n // 16):
            b[i * 4], b[i * 4 + 1], b[i * 4 + 2], b[i * 4 + 3] = cute.arch.inline_ptx(
                "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0} + "
                + str(offset + i * 2048)
                + "];",
                write_only_types=[Int32] * 4,
                read_only_args=[place ^ (step * 32)],
            )

    @cute.jit
    def multiply(
        self,
        sums: cute.Tensor,
        a: cute.Tensor,
        first: cutlass.Constexpr,
        b: cute.Tensor,
        is_new: cutlass.Constexpr,
        kind: cutlass.Constexpr,
    ):
        """Add A [16, 16] B [16, N] of one warp to sums [16, N], which lie as those of wgmma do."""
        for g in cutlass.range_constexpr(self.n // 8):
            old = [Float32(0.0) if const_expr(is_new) else sums[g * 4 + i] for i in range(4)]
            new = cute.arch.inline_ptx(
                "mma.sync.aligned.m16n8k16.row.col.f32." + kind + "." + kind + ".f32 {{$w0}, {$w1}, {$w2}, {$w3}},"
                " {{$r0}, {$r1}, {$r2}, {$r3}}, {{$r4}, {$r5}}, {{$r6}, {$r7}, {$r8}, {$r9}};",
                write_only_types=[Float32] * 4,
                read_only_args=[a[first], a[first + 1], a[first + 2], a[first + 3], b[g * 2], b[g * 2 + 1], *old],
            )
            for i in cutlass.range_constexpr(4):
                sums[g * 4 + i] = new[i]

    @cute.jit
    def score_codes(
        self,
        s: cute.Tensor,
        q_base: Int32,
        tile: Int32,
        is_odd: cutlass.Constexpr,
        wg: Int32,
        wwarp: Int32,
        lane: Int32,
    ):
        """A warpgroup's share of S^T: its groups of codes with their scales, and its part of RoPE. is_odd: see `rounded`."""
        line = tile + (wwarp * 16 + lane % 16) * self.row_bytes + lane // 16 * 16
        groups = GROUPS // self.warpgroups
        query = self.operand_place(q_base, lane)
        key = wwarp * 16 + lane // 4
        a = cute.make_rmem_tensor(cute.make_layout(8), Int32)
        b = cute.make_rmem_tensor(cute.make_layout(self.n // 4), Int32)
        part = s  # of one group, before its scale
        if const_expr(groups > 1):
            part = cute.make_rmem_tensor(cute.make_layout(self.n // 2), Float32)
            self.score_rope(s, a, b, query, line, True, wg)
        codes, query_codes = line + wg * (128 * groups), query + wg * (groups * 2 * self.n * 128)
        for group in cutlass.range_constexpr(groups):
            rests = []
            if const_expr(is_odd):
                rests = [self.rest_of(tile, key + 8 * r, wg * groups + group) for r in range(2)]
            for j in cutlass.range_constexpr(4):
                self.read_keys(a, 0, codes, group * 128 + j * 32)
                if const_expr(is_odd):
                    for x in cutlass.range_constexpr(8):
                        a[x] = self.rounded(a[x], rests[x % 2], rests[x % 2])
                for k in cutlass.range_constexpr(2):
                    step = j * 2 + k  # of 16 columns
                    self.operand(b, query_codes, step % 4, (group * 2 + step // 4) * (self.n * 128))
                    self.multiply(part, a, k * 4, b, step == 0, "f16")
            powers = [self.power_of(self.bits_of(tile, key + 8 * r, wg * groups + group)) for r in range(2)]
            for i in cutlass.range_constexpr(self.n // 2):
                x = part[i] * powers[i // 2 % 2]
                s[i] = x + s[i] if const_expr(group > 0 or (groups > 1 and self.d_qk > SCALE_PLACE)) else x
        if const_expr(groups == 1):  # without registers for two sums
            self.score_rope(s, a, b, query, line, False, wg)

    @cute.jit
    def score_rope(
        self,
        s: cute.Tensor,
        a: cute.Tensor,
        b: cute.Tensor,
        query: Int32,
        line: Int32,
        is_new: cutlass.Constexpr,
        wg: Int32,
    ):
        """A warpgroup's part of the RoPE columns, bf16 as they are stored."""
        steps = 4 // self.warpgroups
        if const_expr(self.d_qk > SCALE_PLACE):
            for k in cutlass.range_constexpr(steps):
                a[0], a[1], a[2], a[3] = cute.arch.inline_ptx(
                    "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
                    write_only_types=[Int32] * 4,
                    read_only_args=[line + wg * (32 * steps) + (ROPE_PLACE + k * 32)],
                )
                self.operand(b, query ^ (wg * (32 * steps)), k, self.n * 1024)
                self.multiply(s, a, 0, b, is_new and k == 0, "bf16")

    @cute.jit
    def read_keys(self, words: cute.Tensor, first: cutlass.Constexpr, address: Int32, offset: cutlass.Constexpr):
        """Codes of 16 keys and 32 columns as the fragments of two steps: eight words."""
        found = cute.arch.inline_ptx(
            "{ .reg .b32 a, b, c, d; .reg .b16 l, h; ldmatrix.sync.aligned.m8n8.x4.shared.b16 {a, b, c, d}, [{$r0} + "
            + str(offset)
            + "];"
            + " ".join(
                f"mov.b32 {{l, h}}, {name}; cvt.rn.f16x2.e4m3x2 {{$w{low}}}, l; cvt.rn.f16x2.e4m3x2 {{$w{low + 2}}}, h;"
                for name, low in zip("abcd", (0, 1, 4, 5), strict=True)
            )
            + " }",
            write_only_types=[Int32] * 8,
            read_only_args=[address],
        )
        for x in cutlass.range_constexpr(8):
            words[first + x] = found[x]

    # ------------------------------------------------------------------ weights and values

    @cute.jit
    def has_odd_scales(self, tile: Int32, lane: Int32) -> Int32:
        """Whether a scale of this tile is no power of two; what is no key of the tile may say so too, for nothing."""
        bits = Int32(0)
        for half in cutlass.range_constexpr(2):
            found = self.four_scales(tile, lane + 32 * half)
            bits = bits | found[0] | found[1] | found[2] | found[3]
        return Int32(cute.arch.vote_any_sync(bits & 0x7FFFFF != 0))

    @cute.jit
    def follow_scales(self, held: Int32, tile: Int32, first: Int32, stop: Int32, lane: Int32) -> Int32:
        """Running maxima of the four groups' scales, as exponents, one byte per group.

        Rows outside [first, stop) are seen by no query and may hold anything.
        """
        raised = Int32(0)
        near, far = self.scales_of(tile, lane, first, stop), self.scales_of(tile, lane + 32, first, stop)
        for g in cutlass.range_constexpr(GROUPS):
            x, y = near[g] & 0x7FFFFFFF, far[g] & 0x7FFFFFFF
            x = cute.arch.warp_redux_sync(x if x > y else y, "max") >> 23
            x = x if x < HIGHEST else Int32(HIGHEST)
            old = held >> (8 * g) & 255
            raised = raised | (x if x > old else old) << (8 * g)
        return raised

    @cute.jit
    def four_scales(self, tile: Int32, row: Int32):
        """Bits of the four scales of a key."""
        return cute.arch.inline_ptx(
            "ld.shared.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
            write_only_types=[Int32] * 4,
            read_only_args=[tile + row * self.row_bytes + SCALE_PLACE],
        )

    @cute.jit
    def scales_of(self, tile: Int32, row: Int32, first: Int32, stop: Int32):
        """Bits of the four scales of a key, zeros where no query sees it."""
        found = cute.make_rmem_tensor(cute.make_layout(GROUPS), Int32)
        found[0], found[1], found[2], found[3] = self.four_scales(tile, row)
        for g in cutlass.range_constexpr(GROUPS):
            found[g] = found[g] if (row >= first) & (row < stop) else Int32(0)
        return found

    @cute.jit
    def power_of(self, scale: Int32) -> Float32:
        """The power of two in a scale, with its sign; inf and NaN as they are."""
        return self.as_float(scale & -0x800000 if scale & 0x7F800000 != 0x7F800000 else scale)

    @cute.jit
    def rest_of(self, tile: Int32, row: Int32, group: Int32) -> Float32:
        """What a scale is beside its power of two: 1 to 2."""
        return self.as_float(self.bits_of(tile, row, group) & 0x7FFFFF | 0x3F800000)

    @cute.jit
    def bits_of(self, tile: Int32, row: Int32, group: Int32) -> Int32:
        """One scale as it lies there."""
        return cute.arch.inline_ptx(
            "ld.shared.b32 {$w0}, [{$r0}];",
            write_only_types=[Int32],
            read_only_args=[tile + row * self.row_bytes + group * 4 + SCALE_PLACE],
        )

    @cute.jit
    def rounded(self, word: Int32, low: Float32, high: Float32) -> Int32:
        """Two codes (fp16) times the rests of their scales, rounded to bf16, as the contract says; exact in fp16 again."""
        return cute.arch.inline_ptx(
            "{ .reg .b16 l, h; .reg .b32 x, y; .reg .f32 a, b; mov.b32 {l, h}, {$r0}; cvt.f32.f16 a, l; cvt.f32.f16 b, h;"
            " mul.rn.f32 a, a, {$r1}; mul.rn.f32 b, b, {$r2}; cvt.rn.bf16x2.f32 x, b, a; shl.b32 y, x, 16;"
            " and.b32 x, x, 0xFFFF0000; mov.b32 a, y; mov.b32 b, x; cvt.rn.f16x2.f32 {$w0}, b, a; }",
            write_only_types=[Int32],
            read_only_args=[word, low, high],
        )

    @cute.jit
    def weight_scales(self, held: Int32, tile: Int32, first: Int32, stop: Int32, wwarp: Int32, lane: Int32):
        """Per group, what the weights of this thread's two keys are to be multiplied with.

        The power of two in the key's scale, times 2^14 over the group's running maximum.
        """
        moves = cute.make_rmem_tensor(cute.make_layout((2, GROUPS)), Float32)
        for r in cutlass.range_constexpr(2):
            found = self.scales_of(tile, wwarp * 16 + lane // 4 + 8 * r, first, stop)
            for g in cutlass.range_constexpr(GROUPS):
                moves[r, g] = self.power_of(found[g]) * self.as_float(268 - (held >> (8 * g) & 255) << 23)
        return moves

    @cute.jit
    def store_weights(self, mine: cute.Tensor, moves: cute.Tensor, p_base: Int32, wg: Int32, wwarp: Int32, lane: Int32):
        """P for each group of columns in turn, see `weight_scales`."""
        weighted = cute.make_rmem_tensor(mine.layout, Float32)
        for g in cutlass.range_constexpr(GROUPS):
            for i in cutlass.range_constexpr(self.n // 2 // self.warpgroups):
                weighted[i] = mine[i] * moves[i // 2 % 2, g]
            self.store_p(weighted, p_base + g * (self.n * 128), wg, wwarp, lane)

    @cute.jit
    def weigh_codes(
        self,
        o: cutlass.Constexpr,
        p_base: Int32,
        tile: Int32,
        is_odd: cutlass.Constexpr,
        wg: Int32,
        wwarp: Int32,
        lane: Int32,
    ):
        """Add codes^T (P scale)^T of one tile to this warpgroup's rows of O^T."""
        groups = GROUPS // self.warpgroups
        line = tile + lane * self.row_bytes + wg * (128 * groups) + wwarp * 16
        weights = self.operand_place(p_base, lane) + wg * (groups * self.n * 128)
        a = cute.make_rmem_tensor(cute.make_layout(8), Int32)
        is_kept = self.n == 16  # B of both products, for both m; 32 rows have no registers for that
        b = [cute.make_rmem_tensor(cute.make_layout(self.n // 4), Int32) for _ in range(2 if is_kept else 1)]
        for group in cutlass.range_constexpr(groups):
            for h in cutlass.range_constexpr(2):  # 32 keys each
                if const_expr(is_kept):
                    for k in cutlass.range_constexpr(2):
                        self.operand(b[k], weights, h * 2 + k, group * (self.n * 128))
                for m in cutlass.range_constexpr(2):  # 64 columns each
                    self.read_values(a, 0, line, h * 32 * self.row_bytes + (group * 2 + m) * 64)
                    if const_expr(is_odd):
                        for x in cutlass.range_constexpr(0, 8, 2):  # keys 2t and 2t + 1 of eight
                            key = h * 32 + x * 4 + lane % 4 * 2
                            low = self.rest_of(tile, key, wg * groups + group)
                            high = self.rest_of(tile, key + 1, wg * groups + group)
                            a[x] = self.rounded(a[x], low, high)
                            a[x + 1] = self.rounded(a[x + 1], low, high)
                    for k in cutlass.range_constexpr(2):
                        if const_expr(not is_kept):
                            self.operand(b[0], weights, h * 2 + k, group * (self.n * 128))
                        self.multiply(o[group * 2 + m], a, k * 4, b[k if is_kept else 0], False, "f16")

    @cute.jit
    def read_values(self, words: cute.Tensor, first: cutlass.Constexpr, address: Int32, offset: cutlass.Constexpr):
        """Codes of 32 keys and 16 columns, transposed, as the fragments of two steps: eight words."""
        found = cute.arch.inline_ptx(
            "{ .reg .b32 a, b, c, d; .reg .b16 l, h; ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {a, b, c, d}, [{$r0} + "
            + str(offset)
            + "];"
            + " ".join(
                f"prmt.b32 {name}, {name}, {name}, 0x3120; mov.b32 {{l, h}}, {name};"
                f" cvt.rn.f16x2.e4m3x2 {{$w{low}}}, l; cvt.rn.f16x2.e4m3x2 {{$w{low + 1}}}, h;"
                for name, low in zip("abcd", (0, 2, 4, 6), strict=True)
            )
            + " }",
            write_only_types=[Int32] * 8,
            read_only_args=[address],
        )
        for x in cutlass.range_constexpr(8):
            words[first + x] = found[x]

    @cute.jit
    def rescale(self, o: cutlass.Constexpr, held: Int32, other: Int32, bias: cutlass.Constexpr, wg: Int32):
        """A warpgroup's rows of O^T times 2^(bias + held - other), exponents of the rows' groups; below 2^-126 zero."""
        groups = GROUPS // self.warpgroups
        for m in cutlass.range_constexpr(groups):
            shift = wg * (8 * groups) + 8 * m
            exponent = 127 + bias + (held >> shift & 255) - (other >> shift & 255)
            factor = self.as_float(exponent << 23 if exponent > 0 else Int32(0))
            for i in cutlass.range_constexpr(self.n // 2):
                o[2 * m][i] = o[2 * m][i] * factor
                o[2 * m + 1][i] = o[2 * m + 1][i] * factor

    @cute.jit
    def stage_pairs(self, values: cute.Tensor, packed: cute.Tensor, base: Int32, row: Int32, chunk: Int32, lane: Int32):
        """Final columns 2g and 2g + 1 of two rows into shared memory, as one word each; g = lane // 4."""
        for r in cutlass.range_constexpr(2):
            packed[r * 2], packed[r * 2 + 1] = values[r].to(self.dtype), values[2 + r].to(self.dtype)
        words = cute.recast_tensor(packed, Int32)
        for r in cutlass.range_constexpr(2):
            place = (chunk + lane // 16) ^ ((row + r) % 8)
            cute.arch.inline_ptx(
                "st.shared.b32 [{$r0}], {$r1};",
                read_only_args=[base + (row + r) * 1024 + place * 16 + lane // 4 % 4 * 4, words[r]],
            )

    @cute.jit
    def clear_unseen_codes(self, tile: Int32, wg: Int32, wtid: Int32, first: Int32, stop: Int32):
        """Zero this warpgroup's columns of the rows outside [first, stop): a NaN code times zero is NaN."""
        begin = stop if (stop > 0) & (first <= 0) else Int32(0)
        chunks = 32 // self.warpgroups  # of 16 bytes
        for item in cutlass.range(begin * chunks + wtid, M * chunks, 128, unroll=1):
            row = item // chunks
            if (row < first) | (row >= stop):
                cute.arch.inline_ptx(
                    "st.shared.v4.b32 [{$r0}], {{$r1}, {$r1}, {$r1}, {$r1}};",
                    read_only_args=[tile + row * self.row_bytes + wg * (chunks * 16) + item % chunks * 16, Int32(0)],
                )
