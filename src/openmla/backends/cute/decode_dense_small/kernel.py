"""Dense MLA decode for few rows (s_q * heads per KV head <= 32; 64 of many long requests): device code.

Operands are swapped, so that the few rows lie on the N side of wgmma and nothing is padded to 64:
    S^T [64 keys, N]      = K [64, 576] Q^T          A = K, K-major; B = Q, K-major
    O^T [512, N]         += V^T [512, 64] P^T        A = V^T, the same bytes seen MN-major; B = P, K-major

One producer warp keeps two tiles of 64 keys in flight and runs ahead into the next request. A tile arrives as eight
boxes of eight whole rows, 9,216 contiguous bytes each (boxes of 64 columns gave 5 % less of the memory's rate); from pages
that hold no multiple of eight tokens, row by row. Two consumer warpgroups share each tile: warpgroup w sums its half of
every slice's columns, exchanges partial scores with the other, does the softmax of the query rows [w N/2, w N/2 + N/2) and
accumulates the rows [256 w, 256 w + 256) of O^T.

A request in several pieces is merged by the CTAs that hold them, each a share of the rows and columns, in split order.
Partials pass through an exchange in global memory without flags, fences or counters: every record says by its first
word whether it is there (UNWRITTEN, which no number is), whoever needs them polls them, and the one
reader of each marks it unwritten again. The launch is cooperative, so waiting for the others is safe.

With 64 rows, two tiles and Q leave no room for that exchange: each warpgroup makes the scores of its 32 rows over all columns,
and gives a tile back in quarters of 16 keys while it weighs the others. A whole warpgroup loads, of which one warp does, so
that it can leave its registers to the others.

Barriers per tile: X (both warpgroups: partial S^T exchanged), M (one warpgroup: maxima of its four warps), P (both:
P and rescale factors stored). A second write to any of these buffers lies behind at least one of them.

Byte caches (`codes.py`) have loads, products and weights of their own, and more warps: with 16 rows two CTAs share an SM,
with 32 four warpgroups share a tile. Their rows may also be named one by one (`gathered.py`): a request is then a query token.

Budget at N = 16: two tiles 147,456 + Q 18,432 + P 2,048 + X 4,096 bytes; 288 threads; no spills. At N = 64: two tiles +
Q 73,728 + P 8,192; 384 threads.
docs/kernels/decode_dense_small.md has the timeline and the log of experiments.
"""

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float16, Float32, Int32, Int64, Uint8, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup

from openmla.backends.cute.decode_dense_small.codes import GROUPS, LOWEST_OF_ALL, Codes
from openmla.backends.cute.decode_dense_small.config import words_per_row
from openmla.backends.cute.decode_dense_small.gathered import LOADERS, Gathered
from openmla.backends.cute.decode_dense_small.loads import BOX, D_V, NO_WINDOW, SLICE, Loads, M
from openmla.backends.cute.decode_dense_small.merge import BAR_P, BAR_X, LN_2, Merge
from openmla.backends.cute.decode_dense_small.pairs import STATS_BYTES, Pairs, sent_bytes
from openmla.backends.cute.decode_dense_small.wide import Wide

REGS_MATH, REGS_LOADS = 232, 40  # with 64 rows; x 256 and x 128 threads = 64,512
BAR_Q, BAR_M = 3, 4  # named barriers; BAR_M + w belongs to warpgroup w


class DecodeDenseSmall(Loads, Codes, Gathered, Merge, Wide, Pairs):
    """One compiled variant.

    Args:
        dtype: cutlass.BFloat16 or cutlass.Float16.
        rows: N, 16 or 32; query rows per KV head, padded.
        d_qk: 576 or 512.
        stages: tiles in the ring.
        row_bytes: of a token of a byte cache (see `codes`); 0 where KV has q's dtype.
        warpgroups: that share a tile; each takes rows / warpgroups query rows, at least 8.
        ctas_per_sm: that registers and shared memory must leave room for.
        gathers: index lists name each row (see `gathered`).
        pairs: clusters of two CTAs, for twice `rows` together (see `pairs`).
    """

    def __init__(
        self,
        dtype: Any,
        rows: int,
        d_qk: int = 576,
        stages: int = 2,
        row_bytes: int = 0,
        warpgroups: int = 2,
        ctas_per_sm: int = 1,
        gathers: bool = False,
        pairs: bool = False,
    ) -> None:
        self.kept, self.pairs = rows, pairs  # kept: rows whose results this CTA has
        rows = 2 * rows if pairs else rows
        self.dtype, self.n, self.d_qk, self.stages, self.row_bytes = dtype, rows, d_qk, stages, row_bytes
        self.has_codes = row_bytes > 0
        self.warpgroups, self.consumers, self.ctas_per_sm = warpgroups, 128 * warpgroups, ctas_per_sm
        self.p_dtype = Float16 if self.has_codes else dtype
        self.gathers = gathers
        self.halves_rows = rows == 64  # of the scores: no room for exchanging sums over half of the columns
        # Loading warps. With 64 rows a whole warpgroup, of which one loads, so that it can leave registers to the others.
        self.loaders = LOADERS if self.gathers or self.halves_rows else 1
        self.quarters = 4 if self.halves_rows else 1  # in which a tile is given back, while its other keys are weighed
        self.boxes = M // BOX
        self.is_halved = dtype is not Float16  # partials, see merge.py
        self.piece_bytes = self.kept * (1280 + 16 * warpgroups if self.is_halved else 2304)
        self.sent_bytes = sent_bytes(self.is_halved)
        self.rereads = self.halves_rows and self.is_halved  # ranges: with 64 rows, no registers for one to come
        self.slices = d_qk // SLICE
        self.box_bytes = BOX * d_qk * 2

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,  # [batch, s_q, h_q, d_qk]; with cu_seqlens_q [1, total_q, h_q, d_qk]
        kv: cute.Tensor,  # [num_pages, page_size, h_kv, d_qk]; a byte cache: uint8 [..., row_bytes]
        table: cute.Tensor,  # int32 [batch, max_pages]; of gathered rows: indices, int32 [batch, s_q, topk]
        lengths: cute.Tensor,  # int32 [batch]; of gathered rows: int32 [batch, s_q]
        metadata: cute.Tensor,  # int32 [num_parts, 8]
        num_splits: cute.Tensor,  # int32 [batch + 1]
        out: cute.Tensor,  # [batch, s_q, h_q, 512], or [1, total_q, h_q, 512]
        lse: cute.Tensor,  # fp32 [batch, h_q, s_q], or [1, h_q, total_q]
        exchange: cute.Tensor,  # int32 [h_kv, slots, N * 328 or 336]: partials; UNWRITTEN before the first launch and after each
        sink: cute.Tensor,  # fp32 [h_q]
        cu_seqlens_q: cute.Tensor,  # int32 [batch + 1]
        faults: cute.Tensor,  # int32 [1]
        scale_log2: Float32,
        is_causal: Int32,
        window: Int32,  # keys that a query sees up to its own position; NO_WINDOW for all
        max_s_q: Int32,  # of any request of cu_seqlens_q; 0: every request has q.shape[1] queries
        unit: Int32,  # tokens per block of the plan, a multiple of 8
        chunk_blocks: Int32,  # of batch_invariant, together a multiple of 64 tokens; else 0
        has_sink: Int32,
        stream: cuda.CUstream,
    ):
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, self.dtype)

        def tile(*shape):
            return cute.tile_to_shape(atom, shape, order=tuple(range(len(shape))))

        # eight rows of all columns lie together, so that a bulk load reads contiguous memory
        ring_layout = cute.tile_to_shape(atom, (M, self.d_qk), order=(1, 0))
        q_layout = tile(self.n, self.d_qk)
        p_layout = tile(self.n, M, GROUPS) if const_expr(self.has_codes) else tile(self.n, M)
        ring_size = self.stages * M * (self.row_bytes if const_expr(self.has_codes) else self.d_qk)
        ring_type = Uint8 if const_expr(self.has_codes) else self.dtype
        x_size = 0 if const_expr(self.halves_rows) else M * self.n * (self.warpgroups - 1)
        k_major, mn_major = OperandMajorMode.K, OperandMajorMode.MN
        if const_expr(self.has_codes):  # products of single warps, bulk copies without descriptors
            qk, pv, tma, tma_kv = None, None, None, None
        else:
            qk_rows = self.n // 2 if const_expr(self.halves_rows) else self.n
            qk = sm90.make_trivial_tiled_mma(
                self.dtype, self.dtype, k_major, k_major, Float32, (1, 1, 1), (64, qk_rows)
            )
            pv = sm90.make_trivial_tiled_mma(
                self.dtype, self.dtype, mn_major, k_major, Float32, (1, 1, 1), (64, self.n)
            )
            sliced = cute.make_tensor(
                kv.iterator,
                cute.make_layout(
                    (kv.shape[1], SLICE, self.slices, kv.shape[2], kv.shape[0]),
                    stride=(kv.stride[1], 1, SLICE, kv.stride[2], kv.stride[0]),
                ),
            )
            tma, tma_kv = cpasync.make_tiled_tma_atom(
                cpasync.CopyBulkTensorTileG2SOp(), sliced, tile(BOX, SLICE, self.slices), (BOX, SLICE, self.slices)
            )

        @cute.struct
        class Storage:
            full: cute.struct.MemRange[Int64, self.stages]
            empty: cute.struct.MemRange[Int64, self.stages * self.quarters]
            info: cute.struct.MemRange[Int32, self.stages * 2]
            top: cute.struct.Align[cute.struct.MemRange[Float32, self.n * 4], 16]
            factor: cute.struct.Align[cute.struct.MemRange[Float32, self.n], 16]
            last: cute.struct.Align[cute.struct.MemRange[Float32, self.n], 16]
            unit: cute.struct.Align[cute.struct.MemRange[Float32, self.n if self.has_codes else 0], 16]
            ring: cute.struct.Align[cute.struct.MemRange[ring_type, ring_size], 1024]
            q: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(q_layout)], 1024]
            p: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(p_layout)], 1024]
            x: cute.struct.Align[cute.struct.MemRange[Float32, x_size], 16]
            other: cute.struct.Align[cute.struct.MemRange[Float32, self.sent_bytes // 4 if self.pairs else 0], 16]
            other_stats: cute.struct.Align[cute.struct.MemRange[Float32, STATS_BYTES // 4 if self.pairs else 0], 16]
            met: cute.struct.Align[cute.struct.MemRange[Int64, 3 if self.pairs else 0], 8]

        self.Storage = Storage
        self.smem_bytes = Storage.size_in_bytes()
        self.kernel(
            tma, tma_kv, q, kv, table, lengths, metadata, num_splits, out, lse, exchange, sink, cu_seqlens_q, faults,
            scale_log2, is_causal, window, max_s_q, unit, chunk_blocks, has_sink, qk, pv, ring_layout, q_layout, p_layout,
        ).launch(
            grid=[metadata.shape[1] * 2, kv.shape[2] // 2, 1]
            if const_expr(self.pairs)
            else [metadata.shape[1], kv.shape[2], 1],
            cluster=[2, 1, 1] if const_expr(self.pairs) else None,
            block=[self.consumers + 32 * self.loaders, 1, 1],
            min_blocks_per_mp=self.ctas_per_sm,
            preferred_smem_carveout=100 if const_expr(self.ctas_per_sm > 1) else None,
            stream=stream,
            cooperative=True,
            use_pdl=True,
        )  # fmt: skip

    @cute.kernel
    def kernel(
        self,
        tma: cute.CopyAtom,
        tma_kv: cute.Tensor,
        q: cute.Tensor,
        kv: cute.Tensor,
        table: cute.Tensor,
        lengths: cute.Tensor,
        metadata: cute.Tensor,
        num_splits: cute.Tensor,
        out: cute.Tensor,
        lse: cute.Tensor,
        exchange: cute.Tensor,
        sink: cute.Tensor,
        cu_seqlens_q: cute.Tensor,
        faults: cute.Tensor,
        scale_log2: Float32,
        is_causal: Int32,
        window: Int32,
        max_s_q: Int32,
        unit: Int32,
        chunk_blocks: Int32,
        has_sink: Int32,
        qk: cute.TiledMma,
        pv: cute.TiledMma,
        ring_layout: cute.ComposedLayout,
        q_layout: cute.ComposedLayout,
        p_layout: cute.ComposedLayout,
    ):
        part, head_kv, _ = cute.arch.block_idx()
        if const_expr(self.pairs):
            head_kv = head_kv * 2 + (part & 1)
            part = part // 2
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        st = cutlass.memory.SmemAllocator().allocate(self.Storage)
        full, empty = st.full.data_ptr(), st.empty.data_ptr()
        sm_ring = None
        if const_expr(not self.has_codes):
            stage_step = cute.make_layout(self.stages, stride=M * self.d_qk)
            sm_ring = st.ring.get_tensor(cute.append(ring_layout.outer, stage_step), swizzle=ring_layout.inner)

        is_boxed = (kv.shape[1] % BOX == 0) | self.has_codes
        sm_info = st.info.get_tensor(cute.make_layout((2, self.stages)))
        if warp == 0:
            with cute.arch.elect_one():
                for i in cutlass.range_constexpr(self.stages):
                    if const_expr(self.gathers):
                        cute.arch.mbarrier_init(full + i, M)
                    else:
                        cute.arch.mbarrier_init(full + i, 1 if is_boxed else 32)
                    for quarter in cutlass.range_constexpr(self.quarters):
                        cute.arch.mbarrier_init(empty + i * self.quarters + quarter, 4 * self.warpgroups)
            if const_expr(not self.has_codes):
                cpasync.prefetch_descriptor(tma)
        if warp == 1:
            if const_expr(self.gathers):
                self.prefetch_lists(table, metadata.shape[1], part)
            else:
                self.prefetch(table, lengths, metadata.shape[1], part)
        if const_expr(self.pairs):
            self.init_turns(st, warp)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        if const_expr(self.pairs):
            cute.arch.cluster_arrive_relaxed()  # whoever sends first waits for it; the loads do not
        cute.arch.griddepcontrol_launch_dependents()  # who comes next may wait on the SMs that come free
        first_range = None
        if const_expr(self.gathers):  # the plan of a shape was made on the host, long before the kernel before
            first_range = self.range_of(metadata, Int32(0), part)
        cute.arch.griddepcontrol_wait()  # what is read from here on, the kernel before may have written

        role = warp
        if const_expr(
            self.gathers
        ):  # both loading warps alike, in a way that tells the compiler nothing about the others:
            # it would build the merge, which asks for warps below 8, in another way, and spill 11 words of it
            role = cute.arch.inline_ptx("and.b32 {$w0}, {$r0}, -4;", write_only_types=[Int32], read_only_args=[warp])
        if const_expr(self.halves_rows):
            if warp >= 4 * self.warpgroups:
                cute.arch.setmaxregister_decrease(REGS_LOADS)
                if warp == 4 * self.warpgroups:
                    self.produce(
                        tma, tma_kv, kv, table, lengths, metadata, faults, q.shape[1], window, max_s_q, unit, part, head_kv,
                        full, empty, sm_info, sm_ring,
                    )  # fmt: skip
            else:
                cute.arch.setmaxregister_increase(REGS_MATH)
                self.consume(
                    st, sm_info, sm_ring, full, empty, q, kv, table, lengths, metadata, num_splits, out, lse, exchange, sink,
                    cu_seqlens_q, scale_log2, is_causal, window, max_s_q, unit, chunk_blocks, has_sink, qk, pv, q_layout, p_layout,
                    part, head_kv, warp, first_range,
                )  # fmt: skip
        elif role == 4 * self.warpgroups:
            if const_expr(self.gathers):
                self.produce_gathered(
                    kv, table, lengths, metadata, faults, q.shape[1], unit, part, warp - 4 * self.warpgroups, full, empty,
                    sm_info, st.ring.data_ptr().toint().to(Int32), first_range,
                )  # fmt: skip
            elif const_expr(self.has_codes):
                self.produce_rows(
                    kv, table, lengths, metadata, faults, q.shape[1], window, max_s_q, unit, part, head_kv, full, empty,
                    sm_info, st.ring.data_ptr().toint().to(Int32),
                )  # fmt: skip
            elif is_boxed:
                self.produce(
                    tma, tma_kv, kv, table, lengths, metadata, faults, q.shape[1], window, max_s_q, unit, part, head_kv,
                    full, empty, sm_info, sm_ring,
                )  # fmt: skip
            else:
                self.produce_rows(
                    kv, table, lengths, metadata, faults, q.shape[1], window, max_s_q, unit, part, head_kv, full, empty,
                    sm_info, st.ring.data_ptr().toint().to(Int32),
                )  # fmt: skip
        else:
            self.consume(
                st, sm_info, sm_ring, full, empty, q, kv, table, lengths, metadata, num_splits, out, lse, exchange, sink,
                cu_seqlens_q, scale_log2, is_causal, window, max_s_q, unit, chunk_blocks, has_sink, qk, pv, q_layout, p_layout,
                part, head_kv, warp, first_range,
            )  # fmt: skip
        if const_expr(self.pairs):
            if role == 4 * self.warpgroups:
                cute.arch.cluster_wait()

    @cute.jit
    def consume(
        self,
        st: cutlass.Constexpr,
        sm_info: cute.Tensor,
        sm_ring: cute.Tensor,
        full: cutlass.Constexpr,
        empty: cutlass.Constexpr,
        q: cute.Tensor,
        kv: cute.Tensor,
        table: cute.Tensor,
        lengths: cute.Tensor,
        metadata: cute.Tensor,
        num_splits: cute.Tensor,
        out: cute.Tensor,
        lse: cute.Tensor,
        exchange: cute.Tensor,
        sink: cute.Tensor,
        cu_seqlens_q: cute.Tensor,
        scale_log2: Float32,
        is_causal: Int32,
        window: Int32,
        max_s_q: Int32,
        unit: Int32,
        chunk_blocks: Int32,
        has_sink: Int32,
        qk: cute.TiledMma,
        pv: cute.TiledMma,
        q_layout: cute.ComposedLayout,
        p_layout: cute.ComposedLayout,
        part: Int32,
        head_kv: Int32,
        warp: Int32,
        first_range: tuple[Int32, ...] | None,
    ):
        """The two warpgroups: dot products, softmax, weighted sum, and the rows of each piece's result."""
        n, per = (
            self.n,
            self.n // 2 // self.warpgroups,
        )  # per: accumulators of one thread that one warpgroup's rows take
        own = n // 4 // self.warpgroups  # query rows a thread sees of its own warpgroup's
        tid, _, _ = cute.arch.thread_idx()
        lane = cute.arch.lane_idx()
        wg = cute.arch.make_warp_uniform(warp // 4)
        wtid = tid % 128
        wwarp = cute.arch.make_warp_uniform(warp % 4)
        key0 = wwarp * 16 + lane // 4  # this thread's keys: key0 and key0 + 8
        pair = (lane % 4) * 2  # its rows: 8 g + pair and the next, for each g

        sm_q = st.q.get_tensor(q_layout.outer, swizzle=q_layout.inner)
        sm_p = st.p.get_tensor(p_layout.outer, swizzle=p_layout.inner, dtype=self.p_dtype)
        sm_top = st.top.get_tensor(cute.make_layout((n, 4), stride=(4, 1)))  # [row, warp]
        sm_factor = st.factor.get_tensor(cute.make_layout(n))
        sm_last = st.last.get_tensor(cute.make_layout(n))
        # [warpgroup that adds it, place of the giver, group of four, thread, four]: 16 bytes per thread without bank conflicts
        givers = self.warpgroups - 1
        sm_x = None
        if const_expr(not self.halves_rows):
            sm_x = st.x.get_tensor(
                cute.make_layout(
                    (givers + 1, givers, per // 4, 128, 4), stride=(givers * per * 128, per * 128, 512, 4, 1)
                )
            )
        q_base = st.q.data_ptr().toint().to(Int32)
        p_base = st.p.data_ptr().toint().to(Int32)
        ring_base = st.ring.data_ptr().toint().to(Int32)

        s = cute.make_rmem_tensor(cute.make_layout(n // 2), Float32)
        o = [cute.make_rmem_tensor(cute.make_layout(n // 2), Float32) for _ in range(8 // self.warpgroups)]
        if const_expr(self.has_codes):
            sm_unit = st.unit.get_tensor(cute.make_layout(n))
        else:
            thr_qk, thr_pv = qk.get_slice(wtid), pv.get_slice(wtid)
            b_q = qk.make_fragment_B(thr_qk.partition_B(sm_q))
            a_k = qk.make_fragment_A(thr_qk.partition_A(sm_ring))
            sm_v = cute.make_tensor(sm_ring.iterator, cute.select(sm_ring.layout, [1, 0, 2]))
            a_v = pv.make_fragment_A(thr_pv.partition_A(cute.flat_divide(sm_v, (M, M))))
            b_p = pv.make_fragment_B(thr_pv.partition_B(sm_p))
            s = qk.make_fragment_C(qk.partition_shape_C((64, n // 2 if const_expr(self.halves_rows) else n)))
            o = [pv.make_fragment_C(pv.partition_shape_C((64, n))) for _ in range(8 // self.warpgroups)]
        held = Int32(0)  # see codes.follow_scales
        turn, sm_other, other_base, met_there = Int32(0), None, Int32(0), Int32(0)  # turn: parity of pieces told
        stats_there, sums_there = Int32(0), Int32(0)
        if const_expr(self.pairs):
            peer = (head_kv & 1) ^ 1
            sm_other = st.other_stats.get_tensor(cute.make_layout((self.kept, 2), stride=(2, 1)))
            if const_expr(self.is_halved):
                other_base = st.other.data_ptr().toint().to(Int32) + warp * 2048 + lane * 16
            else:
                other_base = st.other.data_ptr().toint().to(Int32) + (wg * 4 + wwarp) * 4096 + lane * 16
            sums_there = self.in_peer(other_base, peer)
            stats_there = self.in_peer(st.other_stats.data_ptr().toint().to(Int32), peer)
            met_there = self.in_peer(st.met.data_ptr().toint().to(Int32), peer)
            cute.arch.cluster_wait()
        tile_bytes = M * self.row_bytes if const_expr(self.has_codes) else self.boxes * self.box_bytes
        mine = cute.make_rmem_tensor(cute.make_layout(per), Float32)
        top = cute.make_rmem_tensor(cute.make_layout(own), Float32)
        total = cute.make_rmem_tensor(cute.make_layout(own), Float32)

        group = q.shape[2] // kv.shape[2]
        # row // group for rows below 32 is (row * per_group) >> 16, and a division is thirty instructions
        per_group = Int32(65536.0 * cute.arch.rcp_approx(Float32(group))) + 1
        begin_request, end_request, last_end, begin_at, begin_split = Int32(0), Int32(-1), Int32(0), Int32(0), Int32(0)
        begin, split = Int32(0), Int32(0)
        # of the last request: what the merge needs, made while the first tile is on its way
        where, first_query, rows, first_slot, pieces = Int32(0), Int32(0), Int32(0), Int32(0), Int32(0)
        begin_unit, end_unit, log_team = Int32(0), Int32(0), Int32(0)
        stage = Int32(0)
        phase = Int32(0)
        ranges, number, used = metadata.shape[0], Int32(0), Int32(0)  # used: ranges with work
        if const_expr(self.gathers):
            after, after_end, after_begin, after_last, after_split = first_range
        else:
            after, after_end, after_begin, after_last, after_split = self.range_of(metadata, Int32(0), part)
        while number < ranges:
            if const_expr(self.rereads):
                found, found_end, found_begin, found_last, found_split = self.range_of(metadata, number, part)
            else:
                found, found_end = after, after_end
                found_begin, found_last, found_split = after_begin, after_last, after_split
            number += 1
            if const_expr(not self.rereads):
                # of the next range, while this one is worked on: the merge must not wait for it
                after, after_end, after_begin, after_last, after_split = self.range_of(
                    metadata, number if number < ranges else Int32(0), part
                )
            if found > found_end:
                number = ranges
            else:
                begin_request, end_request = found, found_end
                begin, last_end, split = found_begin, found_last, found_split
                begin, last_end = begin * unit, last_end * unit  # tokens
                begin_at, begin_split = begin, split
                used = number
                for request in cutlass.range(begin_request, end_request + 1, unroll=1):
                    # every load before the first use of one: each may come from memory
                    # everybody is done with the previous request's Q: its last read lies before a barrier of its epilogue
                    where, first_query, s_q = self.queries(cu_seqlens_q, q, request, max_s_q)
                    rows = s_q * group
                    if const_expr(self.has_codes):
                        self.load_q_moved(
                            q, where, first_query, head_kv, group, per_group, rows, q_base, sm_unit, scale_log2, tid
                        )
                    else:
                        self.load_q(q, where, first_query, head_kv, group, per_group, rows, q_base, tid)
                    if const_expr(self.gathers):
                        raw = lengths[where, first_query]
                    else:
                        raw = lengths[request]
                    first_slot = num_splits[request]
                    pieces = num_splits[request + 1] - first_slot
                    length = self.clamped(raw, table, kv)
                    unseen = self.unseen(length, window, q.shape[1], max_s_q)
                    end = length
                    if request == end_request:
                        end = unseen + last_end if unseen + last_end < length else length
                    shortest = length
                    if is_causal != 0:
                        shortest = length - s_q + 1
                    earliest = shortest - window  # the first key that the first query sees
                    if const_expr(self.gathers):
                        earliest = Int32(-NO_WINDOW)
                    cute.arch.cp_async_wait_group(0)
                    cute.arch.fence_view_async_shared()
                    cute.arch.barrier(barrier_id=BAR_Q, number_of_threads=self.consumers)
                    count = self.pieces_here(request, end_request, begin, last_end, split, pieces, chunk_blocks * unit)
                    begin_unit, end_unit, log_team = self.share(rows, pieces, split, count)
                    for piece in cutlass.range(count, unroll=1):
                        start = unseen + begin + piece * chunk_blocks * unit
                        stop = end  # the last piece takes what there is: as many tiles as the producer loads, whatever the plan
                        if piece + 1 < count:
                            stop = start + chunk_blocks * unit
                            stop = stop if stop < end else end
                        target = exchange[head_kv, first_slot + split + piece, None].iterator.toint()
                        for i in cutlass.range_constexpr(own):
                            top[i] = -Float32.inf
                            total[i] = Float32(0.0)
                        for m in cutlass.range_constexpr(8 // self.warpgroups):
                            o[m].fill(0.0)
                        held = Int32(LOWEST_OF_ALL)
                        first_tile, step = start, M
                        if const_expr(self.pairs):
                            first_tile, step = start + (head_kv & 1) * M, 2 * M
                        for token in cutlass.range(first_tile, stop, step, unroll=1):
                            # ---- S^T, this warpgroup's share
                            cute.arch.mbarrier_wait(full + stage, phase)
                            tile_base = ring_base + stage * tile_bytes
                            if const_expr(self.has_codes):
                                is_odd = self.has_odd_scales(tile_base, lane)
                                if is_odd != 0:
                                    self.score_codes(s, q_base, tile_base, True, wg, wwarp, lane)
                                else:
                                    self.score_codes(s, q_base, tile_base, False, wg, wwarp, lane)
                                raised = self.follow_scales(held, tile_base, earliest - token, stop - token, lane)
                                if raised != held:
                                    self.rescale(o, held, raised, 0, wg)
                                    held = raised
                                seen_keys = sm_info[0, stage], sm_info[1, stage]
                            else:
                                warpgroup.fence()
                                steps = (
                                    4 // self.warpgroups
                                )  # of a slice's four: one copy of the code for all warpgroups
                                if const_expr(self.halves_rows):
                                    for k in cutlass.range_constexpr(4 * self.slices):
                                        at = (k % 4, k // 4)
                                        qk.set(warpgroup.Field.ACCUMULATE, k != 0)
                                        rows_of_q = cute.append_ones(b_q[None, wg, at], up_to_rank=2)
                                        cute.gemm(qk, s, a_k[None, None, at, stage], rows_of_q, s)
                                else:
                                    for k in cutlass.range_constexpr(steps * self.slices):
                                        at = (wg * steps + k % steps, k // steps)
                                        qk.set(warpgroup.Field.ACCUMULATE, k != 0)
                                        cute.gemm(qk, s, a_k[None, None, at, stage], b_q[None, None, at], s)
                                warpgroup.commit_group()
                                seen_keys = sm_info[0, stage], sm_info[1, stage]
                                warpgroup.wait_group(0)

                            # ---- X: give the other warpgroup its rows, add what it gives
                            for w in cutlass.range_constexpr(0 if self.halves_rows else self.warpgroups):
                                if w == wg:
                                    for i in cutlass.range_constexpr(per):
                                        mine[i] = s[w * per + i]
                                else:
                                    giver = wg if wg < w else wg - 1
                                    for i in cutlass.range_constexpr(per):
                                        sm_x[w, giver, i // 4, wtid, i % 4] = s[w * per + i]
                            cute.arch.barrier(barrier_id=BAR_X, number_of_threads=self.consumers)
                            for i in cutlass.range_constexpr(per):
                                x = s[i] if const_expr(self.halves_rows) else mine[i]
                                for giver in cutlass.range_constexpr(0 if self.halves_rows else self.warpgroups - 1):
                                    x = x + sm_x[wg, giver, i // 4, wtid, i % 4]
                                to_log2 = scale_log2
                                if const_expr(self.has_codes):
                                    to_log2 = sm_unit[wg * (n // self.warpgroups) + i // 4 * 8 + pair + i % 2]
                                mine[i] = x * to_log2
                            if (token + M > stop) | (token < earliest):
                                # keys that nobody sees may hold NaN, and 0 * NaN is NaN in the weighted sum: zero them;
                                # behind X, because every warp must be done with these rows as keys
                                if const_expr(self.has_codes):
                                    self.clear_unseen_codes(tile_base, wg, wtid, earliest - token, stop - token)
                                else:
                                    self.clear_unseen(tile_base, wg, wtid, earliest - token, stop - token)
                            last_seen = stop if stop < shortest else shortest
                            is_partial = (token + M > last_seen) | (token < length - window)
                            if const_expr(self.gathers):
                                is_partial = token + M > stop
                            if is_partial | (seen_keys[0] != -1) | (seen_keys[1] != -1):
                                mask = (seen_keys[0] if wwarp < 2 else seen_keys[1]) >> (
                                    key0 % 32
                                )  # keys key0 and key0 + 8
                                for i in cutlass.range_constexpr(own):
                                    limit = length
                                    if is_causal != 0:
                                        row = wg * (n // self.warpgroups) + (i // 2) * 8 + pair + i % 2
                                        if const_expr(self.pairs):
                                            row = (i // 2) * 8 + pair + i % 2
                                        limit = length - (s_q - 1 - (row * per_group >> 16))
                                    first_seen = limit - window
                                    limit = limit if limit < stop else stop
                                    if const_expr(self.gathers):
                                        first_seen, limit = Int32(-NO_WINDOW), stop
                                    for j in cutlass.range_constexpr(2):
                                        key = token + key0 + 8 * j
                                        if (key >= limit) | (key < first_seen) | ((mask >> (8 * j)) & 1 == 0):
                                            mine[(i // 2) * 4 + i % 2 + 2 * j] = -Float32.inf

                            # ---- M: maxima over keys: two in the thread, eight lanes, four warps
                            peak = []
                            for i in cutlass.range_constexpr(own):
                                x = cute.arch.fmax(mine[(i // 2) * 4 + i % 2], mine[(i // 2) * 4 + 2 + i % 2])
                                for d in (4, 8, 16):
                                    x = cute.arch.fmax(x, cute.arch.shuffle_sync_bfly(x, d))
                                peak.append(x)
                            if lane < 4:
                                for i in cutlass.range_constexpr(own):
                                    sm_top[wg * (n // self.warpgroups) + (i // 2) * 8 + pair + i % 2, wwarp] = peak[i]
                            if const_expr(self.has_codes):  # before the barrier: none of them waits for others
                                moves = self.weight_scales(held, tile_base, earliest - token, stop - token, wwarp, lane)
                            for w in cutlass.range_constexpr(self.warpgroups):
                                if w == wg:  # a barrier id that is not a constant makes the assembler reserve all 16
                                    cute.arch.barrier(barrier_id=BAR_M + w, number_of_threads=128)
                            for i in cutlass.range_constexpr(own):
                                row = wg * (n // self.warpgroups) + (i // 2) * 8 + pair + i % 2
                                x = cute.arch.fmax(
                                    cute.arch.fmax(sm_top[row, 0], sm_top[row, 1]),
                                    cute.arch.fmax(sm_top[row, 2], sm_top[row, 3]),
                                )
                                x = cute.arch.fmax(x, top[i])
                                shift = x if x > -Float32.inf else Float32(0.0)
                                factor = cute.math.exp2(top[i] - shift, fastmath=True)
                                top[i] = x
                                p0 = cute.math.exp2(mine[(i // 2) * 4 + i % 2] - shift, fastmath=True)
                                p1 = cute.math.exp2(mine[(i // 2) * 4 + 2 + i % 2] - shift, fastmath=True)
                                mine[(i // 2) * 4 + i % 2] = p0
                                mine[(i // 2) * 4 + 2 + i % 2] = p1
                                total[i] = total[i] * factor + (p0 + p1)
                                if wwarp == 0:
                                    if lane < 4:
                                        sm_factor[row] = factor
                            if const_expr(self.has_codes):
                                self.store_weights(mine, moves, p_base, wg, wwarp, lane)
                            else:
                                self.store_p(mine, p_base, wg, wwarp, lane)
                            if const_expr(not self.has_codes):
                                cute.arch.fence_view_async_shared()
                            cute.arch.barrier(barrier_id=BAR_P, number_of_threads=self.consumers)

                            # ---- O^T, this warpgroup's rows of V^T
                            factors = [sm_factor[i // 2 * 8 + pair + i % 2] for i in range(n // 4)]
                            is_higher = cutlass.Boolean(False)
                            for factor in factors:
                                is_higher = is_higher | (factor != 1.0)
                            if cute.arch.vote_any_sync(is_higher):
                                for i in cutlass.range_constexpr(n // 2):
                                    for m in cutlass.range_constexpr(8 // self.warpgroups):
                                        o[m][i] = o[m][i] * factors[i // 4 * 2 + i % 2]
                            if const_expr(self.has_codes):
                                if is_odd != 0:
                                    self.weigh_codes(o, p_base, tile_base, True, wg, wwarp, lane)
                                else:
                                    self.weigh_codes(o, p_base, tile_base, False, wg, wwarp, lane)
                            else:
                                warpgroup.fence()
                                pv.set(warpgroup.Field.ACCUMULATE, True)
                                for k in cutlass.range_constexpr(M // 16):
                                    for m in cutlass.range_constexpr(8 // self.warpgroups):
                                        cute.gemm(
                                            pv,
                                            o[m],
                                            a_v[None, None, k, wg * (8 // self.warpgroups) + m, 0, stage],
                                            b_p[None, None, k],
                                            o[m],
                                        )
                                    if const_expr(k % (4 // self.quarters) == 4 // self.quarters - 1):
                                        warpgroup.commit_group()
                            if token + step >= stop:
                                self.publish(top, total, sm_top, sm_last, target, pieces, rows, wg, wwarp, lane, tid)
                                if const_expr(self.pairs):
                                    self.open_turn(st, sm_top, sm_last, stats_there, met_there, turn, tid)
                            for quarter in cutlass.range_constexpr(self.quarters):
                                if const_expr(not self.has_codes):
                                    warpgroup.wait_group(self.quarters - 1 - quarter)
                                with cute.arch.elect_one():
                                    cute.arch.mbarrier_arrive(empty + stage * self.quarters + quarter)
                            stage += 1
                            if stage == self.stages:
                                stage = Int32(0)
                                phase = phase ^ 1

                        if first_tile >= stop:
                            cute.arch.barrier(
                                barrier_id=BAR_Q, number_of_threads=self.consumers
                            )  # sums of the piece before are read
                            self.publish(top, total, sm_top, sm_last, target, pieces, rows, wg, wwarp, lane, tid)
                            if const_expr(self.pairs):
                                self.open_turn(st, sm_top, sm_last, stats_there, met_there, turn, tid)
                        if const_expr(self.pairs):
                            met = st.met.data_ptr()
                            if const_expr(self.is_halved):
                                self.send_sums(o, sums_there, met_there + 8, warp, lane)
                            else:
                                self.send_wide(o, sums_there, met_there + 8)
                            cute.arch.mbarrier_wait(met, turn)
                            if pieces > 1:
                                self.put_joined(sm_top, sm_last, sm_other, target, rows, pair, tid)
                            cute.arch.mbarrier_wait(met + 1, turn)
                            if const_expr(self.is_halved):
                                self.add_sums(o, sm_top, sm_last, sm_other, other_base, pair, warp, lane)
                            else:
                                self.add_wide_sums(o, sm_top, sm_last, sm_other, other_base, pair)
                        if const_expr(self.has_codes):
                            self.rescale(o, held, Int32(0), -141, wg)
                        if pieces > 1:
                            if const_expr(self.is_halved):
                                self.store_partial(o, target, rows, wg, wwarp, lane)
                            else:
                                self.store_wide(
                                    o,
                                    target + (wg * (self.kept // self.warpgroups) * 2048 + wwarp * 512 + lane * 16),
                                    rows,
                                )
                        else:
                            self.finish(
                                o, sm_top, sm_factor, sm_last, out, lse, sink, has_sink, where, first_query, head_kv, rows, group,
                                per_group, q_base, wg, wwarp, lane, tid, sm_other,
                            )  # fmt: skip
                        if const_expr(self.pairs):
                            turn = turn ^ 1
                            cute.arch.sync_warp()
                            with cute.arch.elect_one():
                                cute.arch.mbarrier_arrive(st.met.data_ptr() + 2, (head_kv & 1) ^ 1)
                    begin = Int32(0)
                    split = Int32(0)

        number = used if warp < 8 else Int32(0)  # eight warps merge
        while number > 0:
            number -= 1
            if (number + 1 < used) | self.rereads:
                begin_request, end_request, begin_at, last_end, begin_split = self.range_of(metadata, number, part)
                begin_at, last_end = begin_at * unit, last_end * unit
            for back in cutlass.range(end_request - begin_request + 1, unroll=1):
                request = end_request - back
                if (back > 0) | (number + 1 < used):
                    begin, split = Int32(0), Int32(0)
                    if request == begin_request:
                        begin, split = begin_at, begin_split
                    first_slot = num_splits[request]
                    pieces = num_splits[request + 1] - first_slot
                    where, first_query, s_q = self.queries(cu_seqlens_q, q, request, max_s_q)
                    rows = s_q * group
                    count = self.pieces_here(request, end_request, begin, last_end, split, pieces, chunk_blocks * unit)
                    begin_unit, end_unit, log_team = self.share(rows, pieces, split, count)
                if const_expr(not self.is_halved):
                    if pieces > 1:
                        if pieces == 2:
                            self.merge_few(
                                out, lse, exchange[head_kv, first_slot, None].iterator.toint(), sink, has_sink, where,
                                first_query, head_kv, pieces, begin_unit, end_unit, rows, group, per_group, 2,
                            )  # fmt: skip
                        elif pieces <= 4:
                            self.merge_few(
                                out, lse, exchange[head_kv, first_slot, None].iterator.toint(), sink, has_sink, where,
                                first_query, head_kv, pieces, begin_unit, end_unit, rows, group, per_group, 4,
                            )  # fmt: skip
                        else:
                            self.merge(
                                st, out, lse, exchange[head_kv, first_slot, None].iterator.toint(), sink, has_sink, where,
                                first_query, head_kv, pieces, begin_unit, end_unit, log_team, rows, group, per_group,
                            )  # fmt: skip
                elif pieces > 1:
                    exchanged = exchange[head_kv, first_slot, None].iterator.toint()
                    if const_expr(self.has_codes):
                        self.merge(
                            st, out, lse, exchanged, sink, has_sink, where, first_query, head_kv, pieces, begin_unit,
                            end_unit, log_team, rows, group, per_group,
                        )  # fmt: skip
                    elif pieces > 4:  # first, because its code then is what comes next
                        self.merge(
                            st, out, lse, exchanged, sink, has_sink, where, first_query, head_kv, pieces, begin_unit,
                            end_unit, log_team, rows, group, per_group,
                        )  # fmt: skip
                    elif pieces > 2:
                        self.merge_few(
                            out, lse, exchanged, sink, has_sink, where, first_query, head_kv, pieces, begin_unit, end_unit,
                            rows, group, per_group, 4,
                        )  # fmt: skip
                    else:
                        self.merge_few(
                            out, lse, exchanged, sink, has_sink, where, first_query, head_kv, pieces, begin_unit, end_unit,
                            rows, group, per_group, 2,
                        )  # fmt: skip
        if const_expr(self.pairs):  # the other's last arrival is here before this CTA's memory goes
            cute.arch.mbarrier_wait(st.met.data_ptr() + 2, turn ^ 1)
        if const_expr(not self.gathers):
            if max_s_q > 0:
                if (part == 0) & (warp < 8):
                    self.clear_outside(out, lse, cu_seqlens_q, head_kv, group, tid)

    @cute.jit
    def queries(self, cu_seqlens_q: cute.Tensor, q: cute.Tensor, request: Int32, max_s_q: Int32):
        """(first index, second index of the first, number) of a request's query tokens in q, out and lse."""
        where, first, count = request, Int32(0), Int32(q.shape[1])
        if const_expr(self.gathers):
            where, first = self.token_of(request, count)
            count = Int32(1)
        elif max_s_q > 0:
            where, total = Int32(0), q.shape[1]
            first = self.offset(cu_seqlens_q, request, total)
            count = self.offset(cu_seqlens_q, request + 1, total) - first
            count = count if count > 0 else Int32(0)
            count = count if count < max_s_q else max_s_q
        return where, first, count

    @cute.jit
    def offset(self, cu_seqlens_q: cute.Tensor, index: Int32, total: Int32) -> Int32:
        """One entry of cu_seqlens_q, clamped to the query tokens that there are."""
        x = cu_seqlens_q[index]
        x = x if x > 0 else Int32(0)
        return x if x < total else total

    @cute.jit
    def clear_outside(
        self, out: cute.Tensor, lse: cute.Tensor, cu_seqlens_q: cute.Tensor, head_kv: Int32, group: Int32, tid: Int32
    ):
        """Rows of out and lse that belong to no request: before the first and behind the last."""
        total = out.shape[1]
        head_tokens = self.offset(cu_seqlens_q, Int32(0), total)
        last = self.offset(cu_seqlens_q, cu_seqlens_q.shape[0] - 1, total)
        for i in cutlass.range(head_tokens + total - last, unroll=1):
            token = i if i < head_tokens else last + i - head_tokens
            for item in cutlass.range(tid, group * (D_V // 2), 256, unroll=1):
                head = head_kv * group + item // (D_V // 2)
                line = cute.recast_tensor(out[0, token, head, None], Int32)
                line[item % (D_V // 2)] = Int32(0)
                if item % (D_V // 2) == 0:
                    lse[0, head, token] = -Float32.inf

    @cute.jit
    def clear_unseen(self, base: Int32, wg: Int32, wtid: Int32, first: Int32, stop: Int32):
        """Zero the rows outside [first, stop) in this warpgroup's latent slices; whole lines, so swizzle is moot."""
        begin = stop if (stop > 0) & (first <= 0) else Int32(0)
        zero = Int32(0)
        slices = 8 // self.warpgroups
        for item in cutlass.range(begin * 8 * slices + wtid, M * 8 * slices, 128, unroll=1):
            row, slice_, chunk = item // (8 * slices), wg * slices + item // 8 % slices, item & 7
            place = base + (row >> 3) * (self.d_qk * 16) + slice_ * 1024 + (row & 7) * 128 + chunk * 16
            if (row < first) | (row >= stop):
                cute.arch.inline_ptx(
                    "st.shared.v4.b32 [{$r0}], {{$r1}, {$r1}, {$r1}, {$r1}};", read_only_args=[place, zero]
                )

    @cute.jit
    def store_p(self, mine: cute.Tensor, p_base: Int32, wg: Int32, wwarp: Int32, lane: Int32):
        """P as [row, key], rounded, transposed on the way: eight rows and sixteen keys per stmatrix."""
        packed = cute.make_rmem_tensor(mine.layout, self.p_dtype)
        packed.store(mine.load().to(self.p_dtype))
        words = cute.recast_tensor(packed, Int32)
        for g in cutlass.range_constexpr(self.n // 8 // self.warpgroups):
            row = wg * (self.n // self.warpgroups) + g * 8 + lane % 8
            chunk = (wwarp * 2 + (lane // 8) % 2) ^ (lane % 8)
            cute.arch.inline_ptx(
                "stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [{$r0}], {{$r1}, {$r2}};",
                read_only_args=[p_base + row * 128 + chunk * 16, words[g * 2], words[g * 2 + 1]],
            )

    @cute.jit
    def publish(
        self,
        top: cute.Tensor,
        total: cute.Tensor,
        sm_top: cute.Tensor,
        sm_last: cute.Tensor,
        target: Int64,
        pieces: Int32,
        rows: Int32,
        wg: Int32,
        wwarp: Int32,
        lane: Int32,
        tid: Int32,
    ):
        """Sums and maxima of a piece's rows into shared memory and, where others wait for them, to the exchange.

        The weighted sum of the last tile is still running. Each unit gets a copy, for its one reader.
        """
        n, own = self.n, self.n // 4 // self.warpgroups
        pair = (lane % 4) * 2
        for i in cutlass.range_constexpr(own):
            x = total[i]
            for d in (4, 8, 16):
                x = x + cute.arch.shuffle_sync_bfly(x, d)
            row = wg * (n // self.warpgroups) + (i // 2) * 8 + pair + i % 2
            if lane < 4:
                sm_top[row, wwarp] = x
                if wwarp == 0:
                    sm_last[row] = top[i]  # not into sm_factor: the other warpgroup may still read that
        cute.arch.barrier(barrier_id=BAR_X, number_of_threads=self.consumers)
        if (pieces > 1) & (not self.pairs):
            stats = target + (n * (1024 if self.is_halved else 2048) + tid * 16)
            for i in cutlass.range_constexpr(n // 8 // self.warpgroups):
                block = (tid // 16 + i * (self.consumers // 16)) % (n // 8)
                row = block * 8 + pair
                x = (sm_top[row, 0] + sm_top[row, 1]) + (sm_top[row, 2] + sm_top[row, 3])
                y = (sm_top[row + 1, 0] + sm_top[row + 1, 1]) + (sm_top[row + 1, 2] + sm_top[row + 1, 3])
                if block * 8 < rows:
                    self.put(stats, i * (self.consumers * 16), sm_last[row], x, sm_last[row + 1], y)

    @cute.jit
    def finish(
        self,
        o: cutlass.Constexpr,
        sm_top: cute.Tensor,
        sm_factor: cute.Tensor,
        sm_last: cute.Tensor,
        out: cute.Tensor,
        lse: cute.Tensor,
        sink: cute.Tensor,
        has_sink: Int32,
        where: Int32,
        first_query: Int32,
        head_kv: Int32,
        rows: Int32,
        group: Int32,
        per_group: Int32,
        stage_base: Int32,
        wg: Int32,
        wwarp: Int32,
        lane: Int32,
        tid: Int32,
        sm_other: cute.Tensor | None,
    ):
        """Final rows of a request in one piece."""
        cute.arch.barrier(barrier_id=BAR_P, number_of_threads=self.consumers)  # sm_factor of the last tile is read
        if tid < self.kept:
            x = (sm_top[tid, 0] + sm_top[tid, 1]) + (sm_top[tid, 2] + sm_top[tid, 3])
            peak = sm_last[tid]
            if const_expr(self.pairs):
                peak, x, _, _ = self.joined(sm_top, sm_last, sm_other, tid)
            scale = Float32(0.0)
            if tid < rows:
                token, head = self.split_row(tid, head_kv, group, per_group)
                scale, lse2 = self.closing(peak, x, sink, head, has_sink)
                lse[where, head, first_query + token] = lse2 * LN_2
            sm_factor[tid] = scale
        cute.arch.barrier(barrier_id=BAR_X, number_of_threads=self.consumers)
        self.store_rows(
            o, sm_factor, out, where, first_query, head_kv, rows, group, per_group, stage_base, wg, wwarp, lane, tid
        )

    @cute.jit
    def store_rows(
        self,
        o: cutlass.Constexpr,
        sm_factor: cute.Tensor,
        out: cute.Tensor,
        where: Int32,
        first_query: Int32,
        head_kv: Int32,
        rows: Int32,
        group: Int32,
        per_group: Int32,
        stage_base: Int32,
        wg: Int32,
        wwarp: Int32,
        lane: Int32,
        tid: Int32,
    ):
        """Final rows: rounded, transposed by stmatrix into Q's place, then 512 bytes per warp and store."""
        n, pair = self.kept, (lane % 4) * 2
        packed = cute.make_rmem_tensor(cute.make_layout(4), self.dtype)
        values = cute.make_rmem_tensor(cute.make_layout(4), Float32)
        words = cute.recast_tensor(packed, Int32)
        for g in cutlass.range_constexpr(n // 8):
            f0, f1 = sm_factor[g * 8 + pair], sm_factor[g * 8 + pair + 1]
            row = g * 8 + lane % 8
            for m in cutlass.range_constexpr(8 // self.warpgroups):
                values[0], values[1] = o[m][g * 4] * f0, o[m][g * 4 + 1] * f1
                values[2], values[3] = o[m][g * 4 + 2] * f0, o[m][g * 4 + 3] * f1
                chunk = (wg * (8 // self.warpgroups) + m) * 8 + wwarp * 2 + (lane // 8) % 2  # eight columns
                if const_expr(self.has_codes):
                    self.stage_pairs(values, packed, stage_base, g * 8 + pair, chunk - (lane // 8) % 2, lane)
                else:
                    packed.store(values.load().to(self.dtype))
                    cute.arch.inline_ptx(
                        "stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [{$r0}], {{$r1}, {$r2}};",
                        read_only_args=[stage_base + row * (D_V * 2) + (chunk ^ (lane % 8)) * 16, words[0], words[1]],
                    )
        cute.arch.barrier(barrier_id=BAR_P, number_of_threads=self.consumers)
        for i in cutlass.range_constexpr(n // 4 // self.warpgroups):
            row = tid // 32 + i * 4 * self.warpgroups
            if row < rows:
                token, head = self.split_row(row, head_kv, group, per_group)
                line = out[where, first_query + token, head, None].iterator
                for c in cutlass.range_constexpr(2):
                    chunk = lane + c * 32
                    a, b, d, e = cute.arch.inline_ptx(
                        "ld.shared.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
                        write_only_types=[Int32] * 4,
                        read_only_args=[stage_base + row * (D_V * 2) + (chunk ^ (row % 8)) * 16],
                    )
                    cute.arch.inline_ptx(
                        "st.global.v4.b32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};",
                        read_only_args=[(line + chunk * 8).toint(), a, b, d, e],
                    )
        cute.arch.barrier(barrier_id=BAR_X, number_of_threads=self.consumers)  # Q may come back to its place


def fake_arguments(dtype: Any, rows: int, d_qk: int = 576, row_bytes: int = 0, *, gathers: bool = False) -> list[Any]:
    """Arguments for `toolchain.compile_kernel(DecodeDenseSmall(...), ...)`: every extent and stride left open."""
    from cutlass.cute.runtime import make_fake_tensor

    from openmla.backends.cute.toolchain import fake_stream, fake_tensor

    sym, div = cute.sym_int, [cute.sym_int64(divisibility=8) for _ in range(6)]  # rows start at 16-byte multiples
    out_step = [cute.sym_int64(divisibility=8) for _ in range(3)]
    q = make_fake_tensor(dtype, (sym(), sym(), sym(), d_qk), stride=(*div[:3], 1), assumed_align=16)
    kv_type, kv_step = (
        (dtype, div[3:]) if not row_bytes else (Uint8, [cute.sym_int64(divisibility=16) for _ in range(3)])
    )
    kv = make_fake_tensor(kv_type, (sym(), sym(), sym(), row_bytes or d_qk), stride=(*kv_step, 1), assumed_align=16)
    return [
        q,
        kv,
        *(
            (fake_tensor(Int32, (None, None, None), stride=(None, None, 1), align=4),
             fake_tensor(Int32, (None, None), stride=(None, None), align=4))
            if gathers
            else (fake_tensor(Int32, (None, None), stride=(None, 1), align=4), fake_tensor(Int32, (None,), align=4))
        ),
        fake_tensor(Int32, (None, None, 8), align=16),
        fake_tensor(Int32, (None,), align=4),
        make_fake_tensor(dtype, (sym(), sym(), sym(), D_V), stride=(*out_step, 1), assumed_align=16),
        fake_tensor(Float32, (None, None, None), stride=(None, None, None), align=4),
        fake_tensor(Int32, (None, None, rows * words_per_row(dtype is not Float16, 4 if row_bytes and rows == 32 else 2)), align=16),
        fake_tensor(Float32, (None,), align=4),
        fake_tensor(Int32, (None,), align=4),
        fake_tensor(Int32, (1,), align=4),
        Float32(1.0), Int32(0), Int32(1 << 30), Int32(0), Int32(64), Int32(0), Int32(0),
        fake_stream(),
    ]  # fmt: skip
