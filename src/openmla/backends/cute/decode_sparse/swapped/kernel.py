"""Token-sparse decode over `fp8_656` with swapped operands: keys are converted in registers, as A of every product.

Computes
    What `decode_sparse/kernel.py` computes, for `fp8_656` alone, on the same plan, with the same arguments, with fp16 operands.
    S^T[64 keys, 64 rows] = K Q^T, O^T[512, 64 rows] += V^T P^T: keys and values are A, from registers; Q and P^T are B.
    A CTA that meets a scale with which codes are not exact in fp16 says so in `redo`; what it wrote is void.

Schedule (384 threads; j counts the tiles of a piece)
    producers (4 warps)              math 0                               math 1
    rows of a tile as they are       S(2i)                                values of 2i - 1 (its own)
    stored, one bulk copy each,      values of 2i - 1, and between their  S(2i + 1)
    a ring of three tiles, handed      four groups the weights of 2i -> P
    back by sixteen keys             values of 2i                         values of 2i, weights of 2i + 1 -> P
    Each math warpgroup has every second tile, and 256 columns of the value of every tile. Half a turn apart: one's softmax and
    conversions stand beside products of the other. Products run on across the ends of a phase: the keys of the next one are
    taken before they are waited for.
    When the scores of a piece are complete the copy engine brings the next Q, and the producers fit it and order its columns
    where it lies, while the last values are multiplied. Q of the first piece the math warps load themselves.

Which column, which key (permutations are free in the dimension that is summed, and in M until the rows are stored)
    Scores: lane 4 g + t reads bytes 32 t to 32 t + 31 of 128 codes of keys g and g + 8 of its warp's 16: sixteen lanes of two
    keys, 656 bytes apart, hit all banks. Code 16 j' + 4 s + 2 h + e of them is element 8 h + 2 t + e of product 4 j' + s; Q is
    stored with its columns in that order (`first_q`, `fit_q`), each row times a power of two that fits it into fp16 (`fit_row`).
    Values: ldmatrix.trans of pairs of bytes gives a lane keys 2 t and 2 t + 1 of columns 2 g and 2 g + 1; column 2 g is row g
    of the product, column 2 g + 1 row g + 8. So a lane ends with pairs of neighbouring columns and stores them.

Budget (checked by tests/compile/test_decode_sparse.py against tests/compile/budgets_sparse.toml)
    shared memory 223,232 of 232,448 bytes; registers 224 math, 56 producers, no spills. With more for math ptxas waits for
    every wgmma (its remark C7512), and so it does where scores and values are under way at the same time.

Synchronisation
    full[3, 4]   producer warp q -> warp q of the scores   16 copies
    empty[3, 4]  math warps -> producer warp q              8 warps, when they have read sixteen keys for the values
    p_full[2]    weights -> both                            4 warps. It also says: the maximum is final, and the values of
                 the tile before are done here, so that the other warpgroup may write its P, maximum and factors.
    q_empty      math -> first producer warp                8 warps, when their last scores of a piece are complete
    q_raw        copy engine -> producers                   1 + bytes, from the second piece on
    q_full       producers -> math                          4 warps: fitted and in order
    known        math -> producers                          8 warps: whether the first tile's scales fit
    piece_*      as in decode_sparse/kernel.py
    barriers 1, 2 within a math warpgroup; 3 both, twice per piece and once for the first tile's scales

Deep dive: docs/kernels/decode_sparse.md, fifth round
"""

from __future__ import annotations

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.memory import SmemAllocator

from openmla.backends.cute.decode_sparse.config import SLICE_BYTES, Config
from openmla.backends.cute.decode_sparse.kernel import (
    AHEAD,
    EVICT_FIRST,
    FIELDS,
    LAZY_LOG2,
    LN2,
    LOG2_E,
    NO_MAXIMUM,
    NO_ROW,
    PIECES,
    REQUEST,
    SPLIT_SLOT,
    DecodeSparse,
    Scope,
)

THREADS = 384
TILES = 3  # of the ring
ROW = 656
TILE_BYTES = 64 * ROW
BIAS = 6.0  # weights begin at 2^6, so that small ones keep their bits in fp16


class Swapped(DecodeSparse):
    """The launch (`__call__`) and the device code."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        assert config.layout == "fp8_656" and not config.has_extra and self.is_fp16

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,
        kv: cute.Tensor,
        indices: cute.Tensor,
        topk_length: cute.Tensor,
        extra_kv: cute.Tensor,
        extra_indices: cute.Tensor,
        extra_length: cute.Tensor,
        metadata: cute.Tensor,
        num_splits: cute.Tensor,
        sink: cute.Tensor,
        out: cute.Tensor,
        lse: cute.Tensor,
        out_accum: cute.Tensor,
        lse2_accum: cute.Tensor,
        fault_word: cute.Tensor,
        redo: cute.Tensor,
        blocks: Int32,
        page_size: Int32,
        extra_page_size: Int32,
        chunk_blocks: Int32,
        has_length: Int32,
        has_extra_length: Int32,
        has_sink: Int32,
        has_redo: Int32,
        scale_log2: Float32,
        stream: cuda.CUstream,
    ):
        dtype = cutlass.BFloat16
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, dtype)

        def tiled(*shape: int) -> Any:
            return cute.tile_to_shape(atom, shape, order=tuple(range(len(shape))))

        operand = self.operand

        def mma(b_major: Any, of: Any = operand) -> Any:
            return sm90.make_trivial_tiled_mma(
                of, of, OperandMajorMode.K, b_major, Float32, (1, 1, 1), (64, 64), warpgroup.OperandSource.RMEM
            )

        q_layout, p_layout = tiled(64, self.bytes.d_qk), tiled(64, 64, 2)  # p: keys, rows
        qk, pv = mma(OperandMajorMode.K), mma(OperandMajorMode.MN)
        qk_first, qk_rope = mma(OperandMajorMode.K, dtype), mma(OperandMajorMode.K, dtype)

        # head | column | token | request
        q_rows = cute.make_tensor(q.iterator, cute.select(q.layout, [2, 3, 1, 0]))
        tma_q, t_q = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), q_rows, tiled(64, 64), (64, 64))

        @cute.struct
        class Storage:
            full: cute.struct.MemRange[Int64, 4 * TILES]
            empty: cute.struct.MemRange[Int64, 4 * TILES]
            p_full: cute.struct.MemRange[Int64, 2]
            q_raw: cute.struct.MemRange[Int64, 1]
            q_full: cute.struct.MemRange[Int64, 1]
            q_empty: cute.struct.MemRange[Int64, 1]
            piece_full: cute.struct.MemRange[Int64, PIECES]
            piece_empty: cute.struct.MemRange[Int64, PIECES]
            piece: cute.struct.MemRange[Int32, FIELDS * PIECES]
            plan: cute.struct.MemRange[Int32, 4]
            valid: cute.struct.MemRange[Int32, 4 * TILES]
            need: cute.struct.MemRange[Int32, 2]
            known: cute.struct.MemRange[Int64, 1]
            verdict: cute.struct.MemRange[Int32, 1]
            rows: cute.struct.Align[cute.struct.MemRange[Float32, 2 * 64], 16]
            limit: cute.struct.Align[cute.struct.MemRange[Float32, 64], 16]
            fit: cute.struct.Align[cute.struct.MemRange[Float32, 64], 16]
            factor: cute.struct.Align[cute.struct.MemRange[Float32, 2 * 64], 16]
            warp_peak: cute.struct.Align[cute.struct.MemRange[Float32, 4 * 64], 16]
            warp_sum: cute.struct.Align[cute.struct.MemRange[Float32, 8 * 64], 16]
            q: cute.struct.Align[cute.struct.MemRange[dtype, cute.cosize(q_layout)], 1024]
            p: cute.struct.Align[cute.struct.MemRange[operand, cute.cosize(p_layout)], 1024]
            raw: cute.struct.Align[cute.struct.MemRange[Int32, TILES * TILE_BYTES // 4], 128]

        self.storage = Storage
        self.smem_bytes = Storage.size_in_bytes()
        self.kernel(
            tma_q, t_q, q, kv, indices, topk_length, metadata, num_splits, sink, out, lse, out_accum, lse2_accum, fault_word, redo, blocks,
            page_size, chunk_blocks, has_length, has_sink, has_redo, scale_log2, qk_first, qk, qk_rope, pv, q_layout, p_layout,
        ).launch(
            grid=[cute.ceil_div(q.shape[2], 64), q.shape[1], metadata.shape[0]],
            block=[THREADS, 1, 1],
            min_blocks_per_mp=1,
            stream=stream,
        )  # fmt: skip

    @cute.kernel
    def kernel(
        self,
        tma_q: cute.CopyAtom,
        t_q: cute.Tensor,
        q: cute.Tensor,
        kv: cute.Tensor,
        indices: cute.Tensor,
        topk_length: cute.Tensor,
        metadata: cute.Tensor,
        num_splits: cute.Tensor,
        sink: cute.Tensor,
        out: cute.Tensor,
        lse: cute.Tensor,
        out_accum: cute.Tensor,
        lse2_accum: cute.Tensor,
        fault_word: cute.Tensor,
        redo: cute.Tensor,
        blocks: Int32,
        page_size: Int32,
        chunk_blocks: Int32,
        has_length: Int32,
        has_sink: Int32,
        has_redo: Int32,
        scale_log2: Float32,
        qk_first: cute.TiledMma,
        qk: cute.TiledMma,
        qk_rope: cute.TiledMma,
        pv: cute.TiledMma,
        q_layout: cute.ComposedLayout,
        p_layout: cute.ComposedLayout,
    ):
        m_block, token, part = cute.arch.block_idx()
        warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        store = SmemAllocator().allocate(self.storage)
        pointer = lambda name: getattr(store, name).data_ptr()  # noqa: E731
        base = lambda name: getattr(store, name).data_ptr().toint()  # noqa: E731
        c = Scope(
            **{name: pointer(name) for name in (
                "full", "empty", "p_full", "q_raw", "q_full", "q_empty", "piece_full", "piece_empty", "known",
            )},
            **{f"{name}_base": base(name) for name in ("rows", "limit", "fit", "factor", "warp_peak", "warp_sum", "q", "p", "raw")},
            piece=store.piece.get_tensor(cute.make_layout((FIELDS, PIECES))),
            plan=store.plan.get_tensor(cute.make_layout(4)),
            valid=store.valid.get_tensor(cute.make_layout((4, TILES))),
            need=store.need.get_tensor(cute.make_layout(2)),
            verdict=store.verdict.get_tensor(cute.make_layout(1)),
            s_q=store.q.get_tensor(q_layout.outer, swizzle=q_layout.inner, dtype=self.operand),
            s_q_stored=store.q.get_tensor(q_layout.outer, swizzle=q_layout.inner),
            s_p=store.p.get_tensor(p_layout.outer, swizzle=p_layout.inner),
            tma_q=tma_q, t_q=t_q,
            q=q, kv=kv, indices=indices, topk_length=topk_length, metadata=metadata, num_splits=num_splits, sink=sink,
            out=out, lse=lse, out_accum=out_accum, lse2_accum=lse2_accum, fault_word=fault_word, redo=redo, blocks=blocks,
            page_size=page_size, chunk_blocks=chunk_blocks, has_length=has_length, has_sink=has_sink,
            scale_log2=scale_log2, h_q=out.shape[2], qk_first=qk_first, qk=qk, qk_rope=qk_rope, pv=pv,
            m_block=m_block, token=token, part=part,
        )  # fmt: skip

        if warp_idx == 0:
            with cute.arch.elect_one():
                for pointer_, count, copies in (
                    (c.full, 16, 4 * TILES),
                    (c.empty, 8, 4 * TILES),
                    (c.p_full, 4, 2),
                    (c.known, 8, 1),
                    (c.q_raw, 1, 1),
                    (c.q_full, 4, 1),
                    (c.q_empty, 8, 1),
                    (c.piece_full, 1, PIECES),
                    (c.piece_empty, 8 + 3, PIECES),
                ):
                    for i in range(copies):
                        cute.arch.mbarrier_init(pointer_ + i, count)
            cpasync.prefetch_descriptor(tma_q)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        cute.arch.griddepcontrol_launch_dependents()

        if warp_idx < 8:
            cute.arch.setmaxregister_increase(self.config.roles["math"])
            self.math(self.with_thread(c))
        else:
            cute.arch.setmaxregister_decrease(self.config.roles["producers"])
            self.gather(self.with_thread(c))

    # ------------------------------------------------------------------ rows, as they are stored

    @cute.jit
    def gather(self, c: cutlass.Constexpr):
        """This warp's 16 keys of every tile into the ring; zeros for keys that are not there."""
        s = Scope(page_log2=self.log2_of(c.page_size), is_lead=c.warp == 0)
        if s.is_lead:
            self.begin_plan(c)
            for first in cutlass.range(AHEAD, unroll=1):
                self.describe(c, first)
        tiles = self.next_piece(c, Int32(0))
        at_piece, left, room, address = Int32(0), Int32(0), Int32(0), Int64(0)
        index0, extra, at_piece, left, room, address = self.next_index(c, at_piece, left, room, address)
        index1, extra, at_piece, left, room, address = self.next_index(c, at_piece, left, room, address)
        index2, extra, at_piece, left, room, address = self.next_index(c, at_piece, left, room, address)
        offset0, _ = self.locate(c, s, index0, extra)
        offset1, _ = self.locate(c, s, index1, extra)
        self.prefetch(c, offset1, extra)
        slot, phase, piece, turn, void = Int32(0), Int32(1), Int32(0), Int32(0), Int32(0)
        while tiles > 0:
            if s.is_lead:
                self.describe(c, piece + AHEAD)
            for j in cutlass.range(tiles, unroll=1):
                if (turn == TILES) | ((piece == 1) & (j == 0)):  # before the first wait for a place, or for Q's
                    cute.arch.mbarrier_wait(c.known, 0)
                    void = c.verdict[0]
                if void == 0:
                    if piece > 0:
                        # When the piece before has its scores: the place of its last tile is free only later.
                        if j == cutlass.min(tiles - 1, 1):
                            self.bring_q(c, piece)
                        if j == cutlass.min(tiles - 1, 2):
                            self.fit_q(c, piece)
                    turn += 1
                    place = slot * 4 + c.warp
                    cute.arch.mbarrier_wait(c.empty + place, phase)
                    self.copy_rows(
                        c, slot, offset0, c.raw_base + slot * TILE_BYTES + c.warp * (16 * ROW), c.full + place
                    )
                    offset0 = offset1
                    offset1, _ = self.locate(c, s, index2, extra)
                    self.prefetch(c, offset1, extra)
                    index2, extra, at_piece, left, room, address = self.next_index(c, at_piece, left, room, address)
                    slot += 1
                    if slot == TILES:
                        slot = Int32(0)
                        phase = phase ^ 1
            if c.warp != 0:
                self.arrive(c.piece_empty + piece % PIECES)
            piece += 1
            if void == 0:
                tiles = self.next_piece(c, piece)
            else:
                tiles = Int32(0)
        if turn > 0:
            cute.arch.mbarrier_wait(c.known, 0)
            if c.verdict[0] != 0:  # shared memory must outlive what is on its way there
                for x in cutlass.range_constexpr(TILES):
                    if x < turn:
                        cute.arch.mbarrier_wait(c.full + (4 * x + c.warp), 0)

    @cute.jit
    def copy_rows(self, c: cutlass.Constexpr, slot: Int32, offset: Int32, to: Int32, full: cutlass.Constexpr):
        """Sixteen rows by one request each; each of sixteen lanes arrives for its own."""
        present = cute.arch.vote_ballot_sync(offset != NO_ROW) & 0xFFFF
        valid, lane, there = c.valid, c.lane, to + c.lane * ROW
        source = c.kv.iterator.toint() + Int64(cutlass.max(offset, 0)) * 16
        barrier = full.toint()
        if lane == 0:
            valid[c.warp, slot] = present
        if lane < 16:
            if offset == NO_ROW:
                for x in cutlass.range_constexpr(ROW // 16):
                    cute.arch.inline_ptx(
                        "{ .reg .b32 z; mov.b32 z, 0; st.shared.v4.b32 [{$r0} + " + str(16 * x) + "], {z, z, z, z}; }",
                        read_only_args=[there],
                    )
                cute.arch.fence_view_async_shared()  # the copy engine may write there later
                cute.arch.mbarrier_arrive(full)
            else:
                cute.arch.mbarrier_arrive_and_expect_tx(full, ROW)
                cute.arch.inline_ptx(
                    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [{$r0}], [{$r1}], {$r2}, [{$r3}];",
                    read_only_args=[there, source, Int32(ROW), barrier],
                )
        cute.arch.sync_warp()

    @cute.jit
    def bring_q(self, c: cutlass.Constexpr, piece: Int32):
        """This CTA's 64 heads of the token of a later piece, when the scores of the piece before are complete."""
        if c.warp == 0:
            tile = cute.local_tile(c.t_q, (64, 64), (c.m_block, None, c.token, c.piece[REQUEST, piece % PIECES]))
            boxes = cute.group_modes(cute.flat_divide(c.s_q_stored, (64, 64))[None, None, 0, None], 0, 2)
            s_q, g_q = cpasync.tma_partition(c.tma_q, 0, cute.make_layout(1), boxes, cute.group_modes(tile, 0, 2))
            cute.arch.mbarrier_wait(c.q_empty, (piece & 1) ^ 1)
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(c.q_raw, 9 * SLICE_BYTES)
            for x in cutlass.range_constexpr(9):
                cute.copy(c.tma_q, g_q[None, x], s_q[None, x], tma_bar_ptr=c.q_raw, cache_policy=Int64(EVICT_FIRST))

    @cute.jit
    def fit_q(self, c: cutlass.Constexpr, piece: Int32):
        """Sixteen rows of Q in fp16, columns in the order of the products, where they lie; four and four beside each other."""
        cute.arch.mbarrier_wait(c.q_raw, (piece & 1) ^ 1)
        lane = self.fresh_lane(c)
        t, hi = lane % 4, lane // 4 % 2
        for y in cutlass.range(2, unroll=1):
            words = [cute.make_rmem_tensor(8, Int32) for _ in range(2)]
            rows, lines, swaps, peaks, factors = [], [], [], [], []
            for z in cutlass.range_constexpr(2):
                rows.append(c.warp * 16 + 8 * y + 4 * z + lane // 8)
                lines.append(c.q_base + rows[z] * 128)
                swaps.append((lane // 8 + 4 * z) * 16)
                peaks.append(Int32(0))
            code = [lines[z] + t // 2 * SLICE_BYTES + ((64 * (t % 2) + 16 * hi) ^ swaps[z]) for z in range(2)]
            rope = [lines[z] + 8 * SLICE_BYTES + ((32 * t + 16 * hi) ^ swaps[z]) for z in range(2)]
            to = [lines[z] + ((64 * hi) ^ swaps[z]) + 4 * t for z in range(2)]
            for x in cutlass.range_constexpr(9):
                for z in cutlass.range_constexpr(2):
                    self.take_q(rope[z] if x == 8 else code[z], x, words[z], 4 * (x % 2))
                    for w in cutlass.range_constexpr(2):
                        at = 4 * (x % 2) + 2 * w
                        peaks[z] = self.largest(peaks[z], words[z][at], words[z][at + 1])
            for z in cutlass.range_constexpr(2):
                factors.append(self.fit_row(c, lane, peaks[z], c.fit_base + rows[z] * 4))
            for b in cutlass.range_constexpr(5):
                for z in cutlass.range_constexpr(2):
                    self.take_q(rope[z] if b == 4 else code[z], 2 * b, words[z], 0)
                    if const_expr(b < 4):
                        self.take_q(code[z], 2 * b + 1, words[z], 4)
                cute.arch.sync_warp()
                for z in cutlass.range_constexpr(2):
                    for x in cutlass.range_constexpr(2 if b < 4 else 1):
                        for w in cutlass.range_constexpr(4):  # (lo, h)
                            cute.arch.inline_ptx(
                                "st.shared.b32 [{$r0} + " + str(8192 * (2 * b + x)) + "], {$r1};",
                                read_only_args=[to[z] ^ (16 * w), self.fitted(words[z][4 * x + w], factors[z], b < 4)],
                            )
        cute.arch.fence_view_async_shared()
        self.arrive(c.q_full)

    @cute.jit
    def largest(self, peak: Int32, pair: Int32, other: Int32):
        """The larger magnitudes of three pairs of bf16, as bits; those of the last two beside the way to the first."""
        return cute.arch.inline_ptx(
            "{ .reg .b32 a, b, p; and.b32 a, {$r1}, 2147450879; and.b32 b, {$r2}, 2147450879; max.u16x2 a, a, b;"
            " mov.b32 p, {$r0}; max.u16x2 {$w0}, p, a; }",
            write_only_types=[Int32],
            read_only_args=[peak, pair, other],
        )

    @cute.jit
    def take_q(self, there: Int32, x: cutlass.Constexpr, into: cute.Tensor, at: cutlass.Constexpr):
        """Sixteen bytes of a row of Q: half of what a lane has of 128 columns, or (8) of RoPE."""
        if const_expr(x < 8):
            self.take(there ^ (32 * (x % 2)), x // 2 * 2 * SLICE_BYTES, into, at)
        else:
            self.take(there, 0, into, at)

    # ------------------------------------------------------------------ the two math warpgroups

    @cute.jit
    def math(self, c: cutlass.Constexpr):
        """One loop over all tiles: the scores and weights of every second one, and half of the values of each."""
        c.qk_first.set(warpgroup.Field.ACCUMULATE, False)
        c.qk.set(warpgroup.Field.ACCUMULATE, True)
        c.qk_rope.set(warpgroup.Field.ACCUMULATE, True)
        c.pv.set(warpgroup.Field.ACCUMULATE, True)
        s_pt = cute.make_tensor(c.s_p.iterator, cute.select(c.s_p.layout, [1, 0, 2]))
        s = Scope(
            b_q=c.qk.make_fragment_B(c.qk.get_slice(c.thread).partition_B(c.s_q)),
            b_p=c.pv.make_fragment_B(c.pv.get_slice(c.thread).partition_B(s_pt)),
            b_q_rope=c.qk_rope.make_fragment_B(c.qk_rope.get_slice(c.thread).partition_B(c.s_q_stored)),
            fragments=[c.qk.make_fragment_A(c.qk.partition_shape_A((64, 64))) for _ in range(2)],
        )  # fmt: skip
        s.words = [
            cute.recast_tensor(cute.make_tensor(each.iterator, cute.make_layout(32)), Int32) for each in s.fragments
        ]
        s.rope = cute.recast_tensor(s.fragments[0], cutlass.BFloat16)
        redo = c.redo
        if (c.group == 0) & (c.thread == 0):
            redo[c.part, c.token, c.m_block] = Int32(0)
        scores = c.qk.make_fragment_C(c.qk.partition_shape_C((64, 64)))
        accs = [c.pv.make_fragment_C(c.pv.partition_shape_C((64, 64))) for _ in range(4)]

        # Tiles before this piece; phases of the own P and of the other; pieces.
        before, p_own, p_other, piece, void = Int32(0), Int32(0), Int32(0), Int32(0), Int32(0)
        tiles = self.next_piece(c, Int32(0))
        while tiles > 0:
            if piece == 0:
                self.first_q(c, c.piece[REQUEST, Int32(0)])
                void = self.judge(c)
            else:
                self.begin(c, piece)
            if void != 0:
                tiles = Int32(0)
            l0, l1 = Float32(0.0), Float32(0.0)
            for acc in accs:
                acc.fill(0.0)
            # Every second tile is this warpgroup's: its scores, the values of the one before beside its weights, its values.
            j = c.group
            slot, phase = (before + j) % TILES, (before + j) // TILES & 1
            if j >= tiles:
                self.arrive(c.q_empty)
            while j < tiles:
                self.scores_of(c, s, scores, slot, phase)
                if j > 0:
                    v = self.await_values(c, slot - 1 if slot > 0 else Int32(TILES - 1), c.group ^ 1, p_other)
                    p_other = p_other ^ 1
                    warpgroup.wait_group(0)
                    if j + 2 >= tiles:
                        self.arrive(c.q_empty)
                    l0, l1 = self.follow(c, s, accs, c.group ^ 1, l0, l1)
                    l0, l1 = self.values_and_weights(c, s, v, accs, scores, slot, c.group, l0, l1)
                else:
                    warpgroup.wait_group(0)
                    if j + 2 >= tiles:
                        self.arrive(c.q_empty)
                    l0, l1 = self.weights(c, s, scores, slot, c.group, l0, l1)
                v = self.await_values(c, slot, c.group, p_own)
                p_own = p_own ^ 1
                l0, l1 = self.follow(c, s, accs, c.group, l0, l1)
                self.values_of(c, s, v, accs, c.group)
                j += 2
                slot += 2
                if slot >= TILES:
                    slot -= TILES
                    phase = phase ^ 1
            warpgroup.wait_group(0)
            if (j == tiles) & (void == 0):
                v = self.await_values(c, (before + tiles - 1) % TILES, c.group ^ 1, p_other)
                p_other = p_other ^ 1
                l0, l1 = self.follow(c, s, accs, c.group ^ 1, l0, l1)
                self.values_of(c, s, v, accs, c.group ^ 1)
                warpgroup.wait_group(0)
            before += tiles
            if void == 0:
                self.end(c, s, accs, piece % PIECES, l0, l1)
                self.arrive(c.piece_empty + piece % PIECES)
                piece += 1
                tiles = self.next_piece(c, piece)

    @cute.jit
    def judge(self, c: cutlass.Constexpr):
        """Whether fp16 operands would not be exact for the keys of the first tile; then there is nothing to do here."""
        redo, verdict = c.redo, c.verdict
        cute.arch.mbarrier_wait(c.full + c.warp, 0)
        lane = self.fresh_lane(c)
        there = c.raw_base + (16 * c.warp + lane % 16) * ROW + lane // 16 * 8
        scale0, scale1 = cute.arch.inline_ptx(
            "ld.shared.v2.b32 {{$w0}, {$w1}}, [{$r0} + 512];", write_only_types=[Int32] * 2, read_only_args=[there]
        )
        worst = self.unfit(self.unfit(Int32(0), scale0), scale1)
        void = cute.arch.inline_ptx(
            "{ .reg .pred p, q; setp.gt.u32 p, {$r0}, 21; bar.red.or.pred q, 3, 256, p; selp.b32 {$w0}, 1, 0, q; }",
            write_only_types=[Int32],
            read_only_args=[worst],
        )
        if (c.group == 0) & (c.warp == 0) & (lane == 0):
            verdict[0] = void
            if void != 0:
                redo[c.part, c.token, c.m_block] = Int32(1)
        self.arrive(c.known)
        return cute.arch.make_warp_uniform(void)

    @cute.jit
    def first_q(self, c: cutlass.Constexpr, request: Int32):
        """Q of the first piece into shared memory, by these warps: the way through the copy engine is 3 us longer at the start."""
        lane = self.fresh_lane(c)
        if c.group == 0:
            if c.warp == 0:
                self.store_pair(c.rows_base + lane * 16, Float32(NO_MAXIMUM), Float32(NO_MAXIMUM))
                self.store_pair(c.limit_base + lane * 8, Float32(NO_MAXIMUM), Float32(NO_MAXIMUM))
        t, hi = lane % 4, lane // 4 % 2
        for y in cutlass.range_constexpr(2):
            row = (c.group * 4 + c.warp) * 8 + 4 * y + lane // 8
            head = c.m_block * 64 + row
            is_row = Int32(1) if head < c.h_q else Int32(0)
            line = c.q[request, c.token, cutlass.min(head, c.h_q - 1), None]
            code_from = line.iterator.toint() + Int64((4 * t + hi) * 16)
            rope_from = line.iterator.toint() + Int64((2 * t + hi) * 16)
            words = cute.make_rmem_tensor(4 * 9, Int32)
            for x in cutlass.range_constexpr(9):
                words[4 * x], words[4 * x + 1], words[4 * x + 2], words[4 * x + 3] = cute.arch.inline_ptx(
                    "{ .reg .pred p; setp.ne.s32 p, {$r1}, 0; mov.b32 {$w0}, 0; mov.b32 {$w1}, 0; mov.b32 {$w2}, 0;"
                    " mov.b32 {$w3}, 0; @p ld.global.nc.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0} + "
                    + str(1024 if x == 8 else 256 * (x // 2) + 32 * (x % 2))
                    + "]; }",
                    write_only_types=[Int32] * 4,
                    read_only_args=[rope_from if x == 8 else code_from, is_row],
                )
            peak = Int32(0)
            for x in cutlass.range_constexpr(18):
                peak = self.largest(peak, words[2 * x], words[2 * x + 1])
            factor = self.fit_row(c, lane, peak, c.rows_base + (row // 2 * 16 + row % 2 * 4 + 8))
            to = c.q_base + row * 128 + ((4 * hi) ^ (row % 8)) * 16 + 4 * t
            for x in cutlass.range_constexpr(9):
                for w in cutlass.range_constexpr(4):  # (lo, h)
                    cute.arch.inline_ptx(
                        "st.shared.b32 [{$r0} + " + str(8192 * x) + "], {$r1};",
                        read_only_args=[to ^ (16 * w), self.fitted(words[4 * x + w], factor, x < 8)],
                    )
        cute.arch.fence_view_async_shared()
        cute.arch.barrier(barrier_id=3, number_of_threads=256)

    @cute.jit
    def begin(self, c: cutlass.Constexpr, piece: Int32):
        """Q of a later piece is there; the running maximum of every row, and what makes a logit of its products."""
        cute.arch.mbarrier_wait(c.q_full, (piece & 1) ^ 1)
        if (c.group == 0) & (c.warp == 0):
            lane = self.fresh_lane(c)
            f0, f1 = self.take_pair(c.fit_base + lane * 8, 0)
            self.store_pair(c.rows_base + lane * 16, Float32(NO_MAXIMUM), Float32(NO_MAXIMUM))
            self.store_pair(c.limit_base + lane * 8, Float32(NO_MAXIMUM), Float32(NO_MAXIMUM))
            self.store_pair(c.rows_base + lane * 16 + 8, f0, f1)
        cute.arch.barrier(barrier_id=3, number_of_threads=256)

    @cute.jit
    def fit_row(self, c: cutlass.Constexpr, lane: Int32, peak: Int32, there: Int32):
        """The power of two that brings the largest element of a row of Q, in eight lanes, to 2^14; what it does to logits."""
        for d in (1, 2, 4):
            peak = self.larger(peak, cute.arch.shuffle_sync_bfly(peak, d))
        peak = cutlass.max(peak & 0xFFFF, (peak >> 16) & 0xFFFF)
        exponent = cutlass.max(peak >> 7, 15)  # at least 2^-112, so that the factor is a normal number
        sign = Float32(1.0) if c.scale_log2 > 0.0 else Float32(-1.0)
        size = c.scale_log2 * sign
        if c.scale_log2 == 0.0:
            sign, size = Float32(0.0), Float32(1.0)
        # Positive, for what is masked is -inf; logits are nothing where the product is smaller.
        scale = cute.arch.fmax(size * self.as_float((exponent - 14) << 23), Float32(1.0e-30))
        if lane % 8 == 0:
            cute.arch.inline_ptx("st.shared.f32 [{$r0}], {$r1};", read_only_args=[there, scale])
        return self.as_float((268 - exponent) << 23) * sign

    @cute.jit
    def unfit(self, worst: Int32, scale: Int32):
        """The larger of `worst` and what is 0 to 21 for powers of two from 2^-14 to 2^7 and for 0, else more."""
        return cute.arch.inline_ptx(
            "{ .reg .b32 u; .reg .pred p; setp.eq.s32 p, {$r1}, 0; sub.s32 u, {$r1}, 947912704; shf.l.wrap.b32 u, u, u, 9;"
            " selp.b32 u, 0, u, p; max.u32 {$w0}, {$r0}, u; }",
            write_only_types=[Int32],
            read_only_args=[worst, scale],
        )

    @cute.jit
    def scores_of(self, c: cutlass.Constexpr, s: cutlass.Constexpr, acc: cute.Tensor, slot: Int32, phase: Int32):
        """S^T of one tile: nine groups of four products, the keys of one converted while the one before is multiplied."""
        cute.arch.mbarrier_wait(c.full + (slot * 4 + c.warp), phase)
        lane = self.fresh_lane(c)
        first = c.raw_base + slot * TILE_BYTES + (16 * c.warp + (lane >> 2)) * ROW
        chunk_from = first + (lane & 3) * 32
        scales = cute.make_rmem_tensor(2, Int32)
        raw = cute.make_rmem_tensor(8, Int32)
        worst = Int32(0)
        for k in cutlass.range_constexpr(9):  # RoPE, then 64 codes at a time
            words, b = s.words[k % 2], k - 1
            if const_expr(k == 0):
                warpgroup.wait_group(1)
                for x in cutlass.range_constexpr(2):
                    for side in cutlass.range_constexpr(2):
                        self.take(chunk_from, 8 * ROW * side + 528 + 16 * x, raw, 4 * side)
                        for y in cutlass.range_constexpr(4):  # (step within the chunk, h)
                            words[4 * (2 * x + y // 2) + 2 * (y % 2) + side] = raw[4 * side + y]
                warpgroup.wait_group(0)  # the values of the tile before
            else:
                if const_expr(b % 2 == 0):
                    for side in cutlass.range_constexpr(2):
                        scales[side] = cute.arch.inline_ptx(
                            "ld.shared.b32 {$w0}, [{$r0} + " + str(8 * ROW * side + 512 + 2 * b) + "];",
                            write_only_types=[Int32],
                            read_only_args=[first],
                        )
                        worst = self.unfit(worst, scales[side])
                        scales[side] = self.pair_of(scales[side], scales[side])
                for side in cutlass.range_constexpr(2):
                    self.take(chunk_from, 8 * ROW * side + 128 * (b // 2) + 16 * (b % 2), raw, 4 * side)
                if const_expr(k >= 2):
                    warpgroup.wait_group(1)
                for step in cutlass.range_constexpr(4):
                    for side in cutlass.range_constexpr(2):
                        words[4 * step + side], words[4 * step + 2 + side] = self.key_words(
                            raw[4 * side + step], scales[side]
                        )
            warpgroup.fence()
            for step in cutlass.range_constexpr(4):
                if const_expr(k == 0):
                    cute.gemm(
                        c.qk_first if const_expr(step == 0) else c.qk_rope,
                        acc, s.rope[None, None, step], s.b_q_rope[None, None, 32 + step], acc,
                    )  # fmt: skip
                else:
                    cute.gemm(c.qk, acc, s.fragments[k % 2][None, None, step], s.b_q[None, None, 4 * b + step], acc)
            warpgroup.commit_group()
        bad = cute.arch.vote_any_sync(cutlass.Uint32(worst) > cutlass.Uint32(21))
        redo = c.redo
        if bad:
            if lane == 0:
                redo[c.part, c.token, c.m_block] = Int32(1)

    @cute.jit
    def pair_of(self, low: Int32, high: Int32):
        """Two scales as a pair of fp16."""
        return cute.arch.inline_ptx(
            "cvt.rn.f16x2.f32 {$w0}, {$r1}, {$r0};",
            write_only_types=[Int32],
            read_only_args=[self.as_float(low), self.as_float(high)],
        )

    @cute.jit
    def key_words(self, codes: Int32, scale: Int32):
        """Four neighbouring codes of a key as two pairs of bf16."""
        return self.dequantise(codes, scale)

    @cute.jit
    def take(self, there: Int32, more: cutlass.Constexpr, into: cute.Tensor, at: cutlass.Constexpr):
        """Sixteen bytes of shared memory."""
        into[at], into[at + 1], into[at + 2], into[at + 3] = cute.arch.inline_ptx(
            "ld.shared.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0} + " + str(more) + "];",
            write_only_types=[Int32] * 4,
            read_only_args=[there],
        )

    @cute.jit
    def fresh_lane(self, c: cutlass.Constexpr):
        """The lane, through a shuffle, which stays where it is written: addresses made of it are not kept between phases."""
        return cute.arch.shuffle_sync_bfly(c.lane, 0)

    # ------------------------------------------------------------------ softmax: rows are N, keys are M

    @cute.jit
    def await_values(self, c: cutlass.Constexpr, slot: Int32, buf: Int32, p_phase: Int32) -> Scope:
        """Wait for the weights in a buffer, which says too that the maximum is final; the first sixteen keys of their tile."""
        cute.arch.mbarrier_wait(c.p_full + buf, p_phase)
        v = self.value_places(c, slot)
        self.take_values(v, 0)
        return v

    @cute.jit
    def follow(
        self, c: cutlass.Constexpr, s: cutlass.Constexpr, accs: cutlass.Constexpr, buf: Int32, l0: Float32, l1: Float32
    ):
        """Rescale what there is if the reference moved with the weights in a buffer."""
        if c.need[buf] != 0:
            l0, l1 = self.rescale_all(c, s, accs, buf, l0, l1)
        return l0, l1

    @cute.jit
    def weights(
        self, c: cutlass.Constexpr, s: cutlass.Constexpr, acc: cute.Tensor, slot: Int32, buf: Int32, l0: Float32, l1: Float32,
    ):  # fmt: skip
        """Weights of the first tile of a piece to shared memory."""
        lane, l0, l1 = self.refer(c, s, acc, slot, buf, l0, l1)
        for q in cutlass.range_constexpr(4):
            self.quarter(c, lane, acc, buf, q)
        more0, more1 = self.sums_of(lane, acc)
        self.publish_p(c, lane, buf)
        return l0 + more0, l1 + more1

    @cute.jit
    def refer(
        self, c: cutlass.Constexpr, s: cutlass.Constexpr, acc: cute.Tensor, slot: Int32, buf: Int32, l0: Float32, l1: Float32,
    ):  # fmt: skip
        """Mask a tile, and move the reference of every row if any score exceeds it by 2^8.

        A lane has keys g, g + 8 of rows 8 i + 2 t + e; its sums are of rows 2 lane + e.
        """
        lane = self.fresh_lane(c)
        present = c.valid[c.warp, slot]
        if present != 0xFFFF:
            for side in cutlass.range_constexpr(2):
                if (present >> ((lane >> 2) + 8 * side)) & 1 == 0:
                    for x in cutlass.range_constexpr(16):
                        acc[x // 2 * 4 + 2 * side + x % 2] = -Float32.inf
        over = [cutlass.Boolean(False)] * 4
        for i in cutlass.range_constexpr(8):
            limits = self.take_pair(c.limit_base + (lane & 3) * 8, 32 * i)
            for e in cutlass.range_constexpr(2):
                over[2 * (i % 2) + e] |= cute.arch.fmax(acc[4 * i + e], acc[4 * i + 2 + e]) > limits[e]
        is_over = Int32(1) if (over[0] | over[1]) | (over[2] | over[3]) else Int32(0)
        need = cute.arch.inline_ptx(
            "{ .reg .pred p, q; setp.ne.s32 p, {$r0}, 0; bar.red.or.pred q, {$r1}, 128, p; selp.b32 {$w0}, 1, 0, q; }",
            write_only_types=[Int32],
            read_only_args=[is_over, c.group + 1],
        )
        if need != 0:
            l0, l1 = self.raise_peaks(c, lane, acc, buf, l0, l1)
        flag = c.need
        if (c.warp == 0) & (lane == 0):
            flag[buf] = need
        return lane, l0, l1

    @cute.jit
    def quarter(self, c: cutlass.Constexpr, lane: Int32, acc: cute.Tensor, buf: Int32, q: cutlass.Constexpr):
        """Weights of sixteen rows, P^T: a line of 128 bytes per key, rows side by side, 128-byte swizzle."""
        to = c.p_base + buf * 8192 + (16 * c.warp + (lane & 15)) * 128 + ((lane >> 4) ^ (lane & 7)) * 16
        for i in cutlass.range_constexpr(2 * q, 2 * q + 2):
            p0, p1, f0, f1 = self.take_rows_of(c, lane, i)
            for x in cutlass.range_constexpr(4):
                f, p = (f0, p0) if x % 2 == 0 else (f1, p1)
                acc[4 * i + x] = cute.math.exp2((acc[4 * i + x] - p) * f, fastmath=True)
        words = cute.make_rmem_tensor(4, Int32)
        for x in cutlass.range_constexpr(4):
            words[x] = cute.arch.inline_ptx(
                "cvt.rn.f16x2.f32 {$w0}, {$r1}, {$r0};",
                write_only_types=[Int32],
                read_only_args=[acc[8 * q + 2 * x], acc[8 * q + 2 * x + 1]],
            )
        cute.arch.inline_ptx(
            "stmatrix.sync.aligned.m8n8.x4.shared.b16 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};",
            read_only_args=[to ^ (32 * q), words[0], words[1], words[2], words[3]],
        )

    @cute.jit
    def sums_of(self, lane: Int32, acc: cute.Tensor):
        """What a tile's weights add to the sums of rows 2 lane and 2 lane + 1, of this warp's keys."""
        rows = cute.make_rmem_tensor(16, Float32)
        for x in cutlass.range_constexpr(16):
            rows[x] = acc[x // 2 * 4 + x % 2] + acc[x // 2 * 4 + 2 + x % 2]
        return self.fold(lane, rows, False)

    @cute.jit
    def publish_p(self, c: cutlass.Constexpr, lane: Int32, buf: Int32):
        """The weights are there."""
        cute.arch.fence_view_async_shared()
        self.arrive(c.p_full + buf)

    @cute.jit
    def fold(self, lane: Int32, rows: cute.Tensor, is_max: cutlass.Constexpr):
        """Over the eight lanes that share rows: of 16 rows per lane, the results of rows 2 lane and 2 lane + 1."""
        kept = cute.make_rmem_tensor(16, Float32)
        for x in cutlass.range_constexpr(16):
            kept[x] = rows[x]
        for step in cutlass.range_constexpr(3):
            half = 8 >> step
            is_high = (lane & (2 * half)) != 0
            for x in cutlass.range_constexpr(half):
                low, high = kept[x], kept[half + x]
                sent = cute.arch.shuffle_sync_bfly(low if is_high else high, 2 * half)
                mine = high if is_high else low
                if const_expr(is_max):
                    kept[x] = cute.arch.fmax(mine, sent)
                else:
                    kept[x] = mine + sent
        return kept[0], kept[1]

    @cute.jit
    def raise_peaks(self, c: cutlass.Constexpr, lane: Int32, acc: cute.Tensor, buf: Int32, l0: Float32, l1: Float32):
        """A weight would exceed 2^8 of its bias: the largest score of the tile becomes the reference, of every row.

        References are scores as the products leave them, less what the bias is there: the difference is taken before it becomes
        a logit, so logits of 10^9 lose nothing in it.
        """
        rows = cute.make_rmem_tensor(16, Float32)
        for i in cutlass.range_constexpr(8):
            for e in cutlass.range_constexpr(2):
                rows[2 * i + e] = cute.arch.fmax(acc[4 * i + e], acc[4 * i + 2 + e])
        x0, x1 = self.fold(lane, rows, True)
        self.store_pair(c.warp_peak_base + c.warp * 256 + lane * 8, x0, x1)
        m0, m1 = self.take_pair(c.rows_base + lane * 16, 0)
        f0, f1 = self.take_pair(c.rows_base + lane * 16, 8)
        unit0, unit1 = Float32(1.0) / f0, Float32(1.0) / f1
        cute.arch.barrier(barrier_id=c.group + 1, number_of_threads=128)
        n0, n1 = m0, m1
        for w in cutlass.range_constexpr(4):
            x0, x1 = self.take_pair(c.warp_peak_base + lane * 8, 256 * w)
            n0 = cute.arch.fmax(n0, x0 - Float32(BIAS) * unit0)
            n1 = cute.arch.fmax(n1, x1 - Float32(BIAS) * unit1)
        g0, g1 = f0, f1
        f0, f1 = cute.math.exp2((m0 - n0) * g0, fastmath=True), cute.math.exp2((m1 - n1) * g1, fastmath=True)
        if c.warp == 0:
            room = Float32(LAZY_LOG2 + BIAS)
            limit0, limit1 = n0 + room * unit0, n1 + room * unit1
            # Rounded up, with logits of 10^8, they would let weights of 2^28 pass; fp16 ends at 2^16.
            limit0 = n0 if (limit0 - n0) * g0 > room + 0.5 else limit0
            limit1 = n1 if (limit1 - n1) * g1 > room + 0.5 else limit1
            self.store_pair(c.rows_base + lane * 16, n0, n1)
            self.store_pair(c.limit_base + lane * 8, limit0, limit1)
            self.store_pair(c.factor_base + buf * 256 + lane * 8, f0, f1)
        cute.arch.barrier(barrier_id=c.group + 1, number_of_threads=128)
        return l0 * f0, l1 * f1

    @cute.jit
    def take_rows_of(self, c: cutlass.Constexpr, lane: Int32, i: cutlass.Constexpr):
        """References of rows 8 i + 2 t and the next, then the factors that make logits of differences from them."""
        return cute.arch.inline_ptx(
            "ld.shared.v4.f32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0} + " + str(64 * i) + "];",
            write_only_types=[Float32] * 4,
            read_only_args=[c.rows_base + (lane & 3) * 16],
        )

    @cute.jit
    def take_rows(self, base: Int32, into: cute.Tensor):
        """Of 64 numbers, one per row, those of rows 8 i + 2 t + e."""
        for i in cutlass.range_constexpr(8):
            into[2 * i], into[2 * i + 1] = self.take_pair(base, 32 * i)

    @cute.jit
    def take_pair(self, there: Int32, more: cutlass.Constexpr):
        """Two fp32 numbers of shared memory."""
        return cute.arch.inline_ptx(
            "ld.shared.v2.f32 {{$w0}, {$w1}}, [{$r0} + " + str(more) + "];",
            write_only_types=[Float32] * 2,
            read_only_args=[there],
        )

    @cute.jit
    def store_pair(self, there: Int32, x0: Float32, x1: Float32):
        """Two fp32 numbers to shared memory."""
        cute.arch.inline_ptx("st.shared.v2.f32 [{$r0}], {{$r1}, {$r2}};", read_only_args=[there, x0, x1])

    # ------------------------------------------------------------------ O^T += V^T P^T

    @cute.jit
    def rescale_all(
        self, c: cutlass.Constexpr, s: cutlass.Constexpr, accs: cutlass.Constexpr, buf: Int32, l0: Float32, l1: Float32
    ):
        """The reference moved with the weights in a buffer: O^T, and the sums if the other warpgroup moved it."""
        factors = cute.make_rmem_tensor(16, Float32)
        lane = self.fresh_lane(c)
        self.take_rows(c.factor_base + buf * 256 + (lane & 3) * 8, factors)
        for acc in accs:
            for x in cutlass.range_constexpr(32):
                acc[x] = acc[x] * factors[x // 4 * 2 + x % 2]
        if buf != c.group:
            f0, f1 = self.take_pair(c.factor_base + buf * 256 + lane * 8, 0)
            l0, l1 = l0 * f0, l1 * f1
        return l0, l1

    @cute.jit
    def values_of(
        self, c: cutlass.Constexpr, s: cutlass.Constexpr, v: cutlass.Constexpr, accs: cutlass.Constexpr, buf: Int32
    ):
        """256 columns of one tile: sixteen keys after the other, each handed back as soon as it is in registers."""
        for q in cutlass.range_constexpr(4):
            if const_expr(q >= 2):
                warpgroup.wait_group(1)
            self.multiply_values(c, s, v, accs, buf, q)
            if const_expr(q < 3):
                self.take_values(v, q + 1)

    @cute.jit
    def values_and_weights(
        self, c: cutlass.Constexpr, s: cutlass.Constexpr, v: cutlass.Constexpr, accs: cutlass.Constexpr, acc: cute.Tensor,
        slot: Int32, buf: Int32, l0: Float32, l1: Float32,
    ):  # fmt: skip
        """`values_of` the tile before, and the weights of this one between its products."""
        self.multiply_values(c, s, v, accs, buf ^ 1, 0)
        lane, l0, l1 = self.refer(c, s, acc, slot, buf, l0, l1)
        self.take_values(v, 1)
        for q in cutlass.range_constexpr(1, 4):
            if const_expr(q >= 2):
                warpgroup.wait_group(1)
            self.multiply_values(c, s, v, accs, buf ^ 1, q)
            if const_expr(q < 3):
                self.take_values(v, q + 1)
            self.quarter(c, lane, acc, buf, q - 1)
        self.quarter(c, lane, acc, buf, 3)
        more0, more1 = self.sums_of(lane, acc)
        warpgroup.wait_group(0)
        self.publish_p(c, lane, buf)
        return l0 + more0, l1 + more1

    def value_places(self, c: cutlass.Constexpr, slot: Int32) -> Scope:
        """Where a lane takes the values of a tile, and the registers for sixteen keys of them."""
        lane = self.fresh_lane(c)
        base = c.raw_base + slot * TILE_BYTES
        return Scope(
            slot=slot,
            value_from=base + (lane & 15) * ROW + c.group * 256 + c.warp * 64 + (lane >> 4) * 16,
            scale_from=base + (lane & 3) * (2 * ROW) + 512 + c.group * 8 + (c.warp >> 1) * 4,
            raw=cute.make_rmem_tensor(8, Int32),
            scales=cute.make_rmem_tensor(4, Int32),
        )

    @cute.jit
    def take_values(self, v: cutlass.Constexpr, q: cutlass.Constexpr):
        """Codes and scales of sixteen keys."""
        raw, scales = v.raw, v.scales
        for x in cutlass.range_constexpr(2):
            raw[4 * x], raw[4 * x + 1], raw[4 * x + 2], raw[4 * x + 3] = cute.arch.inline_ptx(
                "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0} + "
                + str(16 * ROW * q + 32 * x)
                + "];",
                write_only_types=[Int32] * 4,
                read_only_args=[v.value_from],
            )
        for x in cutlass.range_constexpr(4):  # keys 2 t, 2 t + 1, 2 t + 8, 2 t + 9
            scales[x] = cute.arch.inline_ptx(
                "ld.shared.b32 {$w0}, [{$r0} + " + str(ROW * (16 * q + x % 2 + x // 2 * 8)) + "];",
                write_only_types=[Int32],
                read_only_args=[v.scale_from],
            )

    @cute.jit
    def multiply_values(
        self, c: cutlass.Constexpr, s: cutlass.Constexpr, v: cutlass.Constexpr, accs: cutlass.Constexpr, buf: Int32,
        q: cutlass.Constexpr,
    ):  # fmt: skip
        """Convert sixteen keys, hand them back, and begin their products."""
        words, raw, scales = s.words[q % 2], v.raw, v.scales
        for x in cutlass.range_constexpr(2):
            scales[2 * x] = self.pair_of(scales[2 * x], scales[2 * x + 1])
        for x in cutlass.range_constexpr(8):  # tile of 64 columns x / 2, keys + 8 (x % 2)
            at = 4 * (x // 2) + 2 * (x % 2)
            words[at], words[at + 1] = self.value_words(raw[x], scales[2 * (x % 2)])
        self.arrive(c.empty + (v.slot * 4 + q))
        warpgroup.fence()
        for m in cutlass.range_constexpr(4):
            cute.gemm(
                c.pv, accs[m], s.fragments[q % 2][None, None, m], s.b_p[None, None, q, buf], accs[m]
            )  # fmt: skip
        warpgroup.commit_group()

    @cute.jit
    def value_words(self, codes: Int32, scales: Int32):
        """Two keys of two columns: pairs of keys in fp16, of the one column and of the other."""
        return cute.arch.inline_ptx(
            "{ .reg .b16 lo, hi; .reg .b32 a, b, c; prmt.b32 c, {$r0}, 0, 0x3120; mov.b32 {lo, hi}, c;"
            " cvt.rn.f16x2.e4m3x2 a, lo; cvt.rn.f16x2.e4m3x2 b, hi;"
            " mul.rn.f16x2 {$w0}, a, {$r1}; mul.rn.f16x2 {$w1}, b, {$r1}; }",
            write_only_types=[Int32, Int32],
            read_only_args=[codes, scales],
        )

    # ------------------------------------------------------------------ results of a piece

    @cute.jit
    def from_lane_float(self, value: Float32, lane: Int32, more: cutlass.Constexpr):
        """What lane `lane + more` holds."""
        return cute.arch.inline_ptx(
            "{ .reg .b32 t; add.s32 t, {$r1}, " + str(more) + "; shfl.sync.idx.b32 {$w0}, {$r0}, t, 31, -1; }",
            write_only_types=[Float32],
            read_only_args=[value, lane],
        )

    @cute.jit
    def end(
        self,
        c: cutlass.Constexpr,
        s: cutlass.Constexpr,
        accs: cutlass.Constexpr,
        index: Int32,
        l0: Float32,
        l1: Float32,
    ):
        """Sums of all warps, log-sum-exp, and this warp's 64 columns of O^T."""
        lane = self.fresh_lane(c)
        m0, m1 = self.take_pair(c.rows_base + lane * 16, 0)
        f0, f1 = self.take_pair(c.rows_base + lane * 16, 8)
        m0, m1 = m0 * f0, m1 * f1
        self.store_pair(c.warp_sum_base + (c.group * 4 + c.warp) * 256 + lane * 8, l0, l1)
        cute.arch.barrier(barrier_id=3, number_of_threads=256)
        l0, l1 = Float32(0.0), Float32(0.0)
        for w in cutlass.range_constexpr(8):
            x0, x1 = self.take_pair(c.warp_sum_base + lane * 8, 256 * w)
            l0, l1 = l0 + x0, l1 + x1
        split_slot, request = c.piece[SPLIT_SLOT, index], c.piece[REQUEST, index]
        inverses = cute.make_rmem_tensor(2, Float32)
        for e in cutlass.range_constexpr(2):
            m, l = (m0, l0) if e == 0 else (m1, l1)  # noqa: E741
            head = c.m_block * 64 + 2 * lane + e
            inverse = Float32(0.0)
            if l != 0.0:  # also NaN, which shall be seen; an empty row stays 0, also for a sink of -inf
                inverse = Float32(1.0) / l
                if (c.has_sink != 0) & (split_slot < 0) & (head < c.h_q):
                    weight = cute.math.exp2(c.sink[head] * Float32(LOG2_E) - self.lse2_of(m, l), fastmath=True)
                    inverse = inverse / (Float32(1.0) + weight)
            inverses[e] = inverse
        self.store_out_of(c, accs, inverses, split_slot, request)
        if (c.group == 0) & (c.warp == 0):
            lse, lse2_accum = c.lse, c.lse2_accum
            for e in cutlass.range_constexpr(2):
                m, l = (m0, l0) if e == 0 else (m1, l1)  # noqa: E741
                head = c.m_block * 64 + 2 * lane + e
                if head < c.h_q:
                    if split_slot >= 0:
                        lse2_accum[split_slot, c.token * c.h_q + head] = self.lse2_of(m, l)
                    else:
                        lse[request, head, c.token] = self.lse2_of(m, l) * Float32(LN2)

    @cute.jit
    def lse2_of(self, m: Float32, l: Float32):  # noqa: E741
        """Log-sum-exp, base 2, of a row from its maximum and sum."""
        lse2 = -Float32.inf
        if l != 0.0:  # also NaN
            lse2 = m + cute.math.log2(l)
        return lse2

    @cute.jit
    def store_out_of(
        self, c: cutlass.Constexpr, accs: cutlass.Constexpr, inverses: cute.Tensor, split_slot: Int32, request: Int32,
    ):  # fmt: skip
        """Pairs of neighbouring columns, eight lanes side by side: 32 bytes of bf16, or 64 of fp32.

        Without branches in either: code that runs once per piece is fetched as it comes.
        """
        lane = self.fresh_lane(c)
        row = c.m_block * 64 + 2 * (lane % 4)
        column = c.group * 256 + c.warp * 64 + lane // 4 * 2
        inverse = cute.make_rmem_tensor(16, Float32)
        for x in cutlass.range_constexpr(16):
            inverse[x] = self.from_lane_float(inverses[x % 2], lane % 4, 4 * (x // 2))
        if split_slot >= 0:
            there, step = self.line_of(c.out_accum, (split_slot, c.token * c.h_q + row), 4 * column)
            for x in cutlass.range_constexpr(16):
                i, e = x // 2, x % 2
                for m in cutlass.range_constexpr(4):
                    cute.arch.inline_ptx(
                        "{ .reg .pred p; .reg .b64 a; mad.lo.s64 a, {$r1}, " + str(8 * i + e) + ", {$r0}; setp.lt.s32 p, {$r2}, {$r3};"
                        " @p st.global.v2.f32 [a + " + str(64 * m) + "], {{$r4}, {$r5}}; }",
                        read_only_args=[there, step, row + (8 * i + e), c.h_q,
                                        accs[m][4 * i + e] * inverse[x], accs[m][4 * i + 2 + e] * inverse[x]],
                    )  # fmt: skip
        else:
            there, step = self.line_of(c.out, (request, c.token, row), 2 * column)
            for x in cutlass.range_constexpr(16):
                i, e = x // 2, x % 2
                for m in cutlass.range_constexpr(4):
                    cute.arch.inline_ptx(
                        "{ .reg .pred p; .reg .b64 a; .reg .b32 w; mad.lo.s64 a, {$r1}, " + str(8 * i + e) + ", {$r0};"
                        " setp.lt.s32 p, {$r2}, {$r3}; cvt.rn.bf16x2.f32 w, {$r5}, {$r4}; @p st.global.b32 [a + "
                        + str(32 * m) + "], w; }",
                        read_only_args=[there, step, row + (8 * i + e), c.h_q,
                                        accs[m][4 * i + e] * inverse[x], accs[m][4 * i + 2 + e] * inverse[x]],
                    )  # fmt: skip

    @cute.jit
    def line_of(self, to: cute.Tensor, at: cutlass.Constexpr, more: Int32):
        """Address of a byte of a row, and how far the same byte of the next row is."""
        first = to[*at, None].iterator.toint()
        return first + Int64(more), to[*at[:-1], at[-1] + 1, None].iterator.toint() - first
