"""Dense MLA decode for few rows (s_q * heads per KV head <= 64): device code.

Operands are swapped, so that the few rows lie on the N side of wgmma and nothing is padded to 64:
    S^T [64 keys, N]      = K [64, 576] Q^T          A = K, K-major; B = Q, K-major
    O^T [512, N]         += V^T [512, 64] P^T        A = V^T, the same bytes seen MN-major; B = P, K-major

One producer warp keeps two tiles of 64 keys in flight and runs ahead into the next request. A tile arrives as eight
boxes of eight whole rows, 9,216 contiguous bytes each: memory delivers those 10 % faster than boxes of 64 columns.
Two consumer warpgroups share each tile. Warpgroup w accumulates the rows [256 w, 256 w + 256) of O^T and does the
softmax of the query rows [w N/2, w N/2 + N/2). The dot products are split between them
    by columns (N <= 32): each sums over half of the 576 columns and gives the other its rows through shared memory;
    by query rows (N = 64): no exchange, but both read all of K.

Requests in several pieces leave fp32 partials. The CTAs that hold the pieces of one request then merge it together,
each a share of the rows and columns, in split order; the launch is cooperative, so waiting for the others is safe.

Barriers per tile: X (both warpgroups: partial S^T exchanged), M (one warpgroup: maxima of its four warps), P (both:
P and rescale factors stored). A second write to any of these buffers lies behind at least one of them.

Budget at N = 16: two tiles 147,456 + Q 18,432 + P 2,048 + X 4,096 bytes; 288 threads; no spills.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup

KEYS = 64  # per tile
BOX = 8  # rows of one bulk load; a page holds a multiple of it
BOXES = KEYS // BOX
SLICE = 64  # columns of one swizzled line
STAGES = 2  # tiles in flight
D_V = 512
COLUMNS = 128  # of one unit of the merge
LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
EVICT_FIRST = 0x12F0000000000000

BAR_X, BAR_M, BAR_P, BAR_Q = 1, 2, 4, 5  # named barriers; BAR_M + w belongs to warpgroup w

PAGE_OUT_OF_RANGE = 1
LENGTH_NEGATIVE = 2
LENGTH_OVER_CAPACITY = 4


class DecodeDenseSmall:
    """One compiled variant.

    Args:
        dtype: cutlass.BFloat16 or cutlass.Float16.
        rows: N, 16, 32 or 64; query rows per KV head, padded.
        d_qk: 576 or 512.
        fused: merge split requests in this kernel; else leave partials to `openmla.backends.cute.combine`.
    """

    def __init__(self, dtype, rows, d_qk=576, fused=True):
        self.dtype, self.n, self.d_qk, self.fused = dtype, rows, d_qk, fused
        self.slices = d_qk // SLICE
        self.tile_bytes = KEYS * d_qk * 2
        self.by_columns = rows <= 32
        # k-steps of 16 columns that each warpgroup sums
        steps = d_qk // 16
        halves = (range(steps // 2), range(steps // 2, steps))
        self.steps = [list(half) for half in halves] if self.by_columns else [list(range(steps))] * 2
        self.wide = rows > 32  # 128 accumulators per thread: registers move from a producer warpgroup to the consumers
        self.threads = 384 if self.wide else 288

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,  # [batch, s_q, h_q, d_qk]
        kv: cute.Tensor,  # [num_pages, page_size, h_kv, d_qk]
        table: cute.Tensor,  # int32 [batch, max_pages]
        lengths: cute.Tensor,  # int32 [batch]
        metadata: cute.Tensor,  # int32 [num_parts, 8]
        num_splits: cute.Tensor,  # int32 [batch + 1]
        out: cute.Tensor,  # [batch, s_q, h_q, 512]
        lse: cute.Tensor,  # fp32 [batch, h_q, s_q]
        out_accum: cute.Tensor,  # fp32 [slots, h_kv * rows, 512]
        lse_accum: cute.Tensor,  # fp32 [slots, h_kv * rows], base 2
        sink: cute.Tensor,  # fp32 [h_q]
        counters: cute.Tensor,  # int32 [2, batch * h_kv, 1], zero before the first launch, zero again after each
        faults: cute.Tensor,  # int32 [1]
        scale_log2: Float32,
        is_causal: Int32,
        chunk_blocks: Int32,
        has_sink: Int32,
        stream: cuda.CUstream,
    ):
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, self.dtype)

        def tile(*shape):
            return cute.tile_to_shape(atom, shape, order=tuple(range(len(shape))))

        # eight rows of all columns lie together, so that a bulk load reads contiguous memory
        ring_layout = cute.tile_to_shape(atom, (KEYS, self.d_qk, STAGES), order=(1, 0, 2))
        q_layout, p_layout = tile(self.n, self.d_qk), tile(self.n, KEYS)
        k_major, mn_major = OperandMajorMode.K, OperandMajorMode.MN
        width = self.n if self.by_columns else self.n // 2
        qk = sm90.make_trivial_tiled_mma(self.dtype, self.dtype, k_major, k_major, Float32, (1, 1, 1), (64, width))
        pv = sm90.make_trivial_tiled_mma(self.dtype, self.dtype, mn_major, k_major, Float32, (1, 1, 1), (64, self.n))
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
            full: cute.struct.MemRange[Int64, STAGES]
            empty: cute.struct.MemRange[Int64, STAGES]
            info: cute.struct.MemRange[Int32, STAGES]
            top: cute.struct.Align[cute.struct.MemRange[Float32, self.n * 4], 16]
            factor: cute.struct.Align[cute.struct.MemRange[Float32, self.n], 16]
            last: cute.struct.Align[cute.struct.MemRange[Float32, self.n], 16]
            ring: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(ring_layout)], 1024]
            q: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(q_layout)], 1024]
            p: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(p_layout)], 1024]
            x: cute.struct.Align[cute.struct.MemRange[Float32, 64 * self.n if self.by_columns else 4], 16]

        self.Storage = Storage
        self.smem_bytes = Storage.size_in_bytes()
        self.kernel(
            tma, tma_kv, q, kv, table, lengths, metadata, num_splits, out, lse, out_accum, lse_accum, sink, counters,
            faults, scale_log2, is_causal, chunk_blocks, has_sink, qk, pv, ring_layout, q_layout, p_layout,
        ).launch(
            grid=[metadata.shape[0], kv.shape[2], 1],
            block=[self.threads, 1, 1],
            min_blocks_per_mp=1,
            stream=stream,
            cooperative=self.fused,
            use_pdl=not self.fused,
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
        out_accum: cute.Tensor,
        lse_accum: cute.Tensor,
        sink: cute.Tensor,
        counters: cute.Tensor,
        faults: cute.Tensor,
        scale_log2: Float32,
        is_causal: Int32,
        chunk_blocks: Int32,
        has_sink: Int32,
        qk: cute.TiledMma,
        pv: cute.TiledMma,
        ring_layout: cute.ComposedLayout,
        q_layout: cute.ComposedLayout,
        p_layout: cute.ComposedLayout,
    ):
        part, head_kv, _ = cute.arch.block_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        st = cutlass.memory.SmemAllocator().allocate(self.Storage)
        full, empty = st.full.data_ptr(), st.empty.data_ptr()
        sm_info = st.info.get_tensor(cute.make_layout(STAGES))
        sm_ring = st.ring.get_tensor(ring_layout.outer, swizzle=ring_layout.inner)

        if warp == 0:
            with cute.arch.elect_one():
                for i in cutlass.range_constexpr(STAGES):
                    cute.arch.mbarrier_init(full + i, 1)
                    cute.arch.mbarrier_init(empty + i, 8)
            cpasync.prefetch_descriptor(tma)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        if const_expr(not self.fused):
            cute.arch.griddepcontrol_launch_dependents()
            cute.arch.griddepcontrol_wait()

        if warp >= 8:
            if const_expr(self.wide):
                cute.arch.setmaxregister_decrease(24)
            if warp == 8:
                self.produce(
                    tma, tma_kv, kv, table, lengths, metadata, faults, part, head_kv, full, empty, sm_info, sm_ring,
                )  # fmt: skip
        else:
            if const_expr(self.wide):
                cute.arch.setmaxregister_increase(240)
            self.consume(
                st, sm_info, sm_ring, full, empty, q, kv, table, lengths, metadata, num_splits, out, lse, out_accum,
                lse_accum, sink, counters, scale_log2, is_causal, chunk_blocks, has_sink, qk, pv, q_layout, p_layout,
                part, head_kv, warp,
            )  # fmt: skip

    @cute.jit
    def clamped(self, length: Int32, table: cute.Tensor, kv: cute.Tensor) -> Int32:
        """Attendable tokens of a request: not negative, and not more than the block table can address."""
        capacity = table.shape[1] * kv.shape[1]
        length = length if length > 0 else Int32(0)
        return length if length < capacity else Int32(capacity)

    @cute.jit
    def produce(
        self,
        tma: cute.CopyAtom,
        tma_kv: cute.Tensor,
        kv: cute.Tensor,
        table: cute.Tensor,
        lengths: cute.Tensor,
        metadata: cute.Tensor,
        faults: cute.Tensor,
        part: Int32,
        head_kv: Int32,
        full: cutlass.Constexpr,
        empty: cutlass.Constexpr,
        sm_info: cute.Tensor,
        sm_ring: cute.Tensor,
    ):
        """The loading warp: every slice of every tile of every piece of this part, in ring order.

        A page id out of range becomes a coordinate outside the tensor: the copy engine fills in zeros, and the tile's
        description tells the consumers which pages to mask.
        """
        lane = cute.arch.lane_idx()
        group = 32 // BOXES  # tiles whose page ids one load of the warp brings
        source = cute.local_tile(tma_kv, (BOX, SLICE, self.slices), (None, 0, 0, head_kv, None))
        target = cute.flat_divide(sm_ring, (BOX, self.d_qk))  # [row, column, box, 1, stage]
        t_ring, t_kv = cpasync.tma_partition(
            tma, 0, cute.make_layout(1), cute.group_modes(target, 0, 2), cute.group_modes(source, 0, 3)
        )
        boxes_per_page = kv.shape[1] // BOX
        policy = Int64(EVICT_FIRST)
        begin_request, end_request = metadata[part, 0], metadata[part, 1]
        begin_block, last_end = metadata[part, 2], metadata[part, 3]
        stage = Int32(0)
        phase = Int32(1)  # the first lap finds every stage free
        bad = Int32(0)
        for request in cutlass.range(begin_request, end_request + 1, unroll=1):
            raw = lengths[request]
            entry = self.page_of(table, request, begin_block * BOXES + lane, boxes_per_page)
            length = self.clamped(raw, table, kv)
            if raw < 0:
                bad = bad | LENGTH_NEGATIVE
            if raw > length:
                bad = bad | LENGTH_OVER_CAPACITY
            end_block = last_end
            if request != end_request:
                end_block = (length + KEYS - 1) // KEYS
            pages = entry
            for block in cutlass.range(begin_block, end_block, unroll=1):
                place = (block - begin_block) % group
                box = (block - place) * BOXES + lane
                if place == 0:
                    pages = entry
                    entry = self.page_of(table, request, box + 32, boxes_per_page)
                    if box * BOX >= length:
                        pages = Int32(-1)
                    elif (pages < 0) | (pages >= kv.shape[0]):
                        pages = Int32(-1)
                        bad = bad | PAGE_OUT_OF_RANGE
                seen = cute.arch.vote_ballot_sync(pages >= 0) >> (place * BOXES)
                row = block * BOXES % boxes_per_page
                cute.arch.mbarrier_wait(empty + stage, phase)
                with cute.arch.elect_one():
                    sm_info[stage] = Int32(seen) & (1 << BOXES) - 1
                    cute.arch.mbarrier_arrive_and_expect_tx(full + stage, self.tile_bytes)
                for i in cutlass.range_constexpr(BOXES):
                    page = cute.arch.shuffle_sync(pages, place * BOXES + i)
                    cute.copy(
                        tma,
                        t_kv[None, row, page],
                        t_ring[None, i, 0, stage],
                        tma_bar_ptr=full + stage,
                        cache_policy=policy,
                    )
                    row += 1
                    row = row if row < boxes_per_page else Int32(0)
                stage = stage ^ 1
                phase = phase ^ (1 if stage == 0 else 0)
            begin_block = Int32(0)
        if bad != 0:
            cute.arch.atomic_or(faults.iterator, bad, sem="relaxed", scope="gpu")

    @cute.jit
    def page_of(self, table: cute.Tensor, request: Int32, box: Int32, boxes_per_page: Int32) -> Int32:
        """The block table's entry for a box of rows. Read before the length is known: it may be garbage."""
        page = Int32(-1)
        column = box // boxes_per_page
        if column < table.shape[1]:
            page = table[request, column]
        return page

    @cute.jit
    def load_q(
        self, q: cute.Tensor, request: Int32, head_kv: Int32, group: Int32, rows: Int32, q_base: Int32, tid: Int32
    ):
        """Query rows of one request into shared memory, in the 128-byte swizzle; absent rows become zeros."""
        warp, lane = tid // 32, tid % 32
        chunks = self.d_qk // 8
        for i in cutlass.range_constexpr(self.n // 8):
            row = warp + i * 8
            token = row // group
            head = head_kv * group + row % group
            size = Int32(16) if row < rows else Int32(0)
            token = token if row < rows else Int32(0)
            head = head if row < rows else Int32(0)
            line = q[request, token, head, None].iterator
            for c in cutlass.range_constexpr((chunks + 31) // 32):
                chunk = lane + c * 32
                if chunk < chunks:
                    place = q_base + (chunk // 8) * (self.n * 128) + row * 128 + ((chunk % 8) ^ (row % 8)) * 16
                    cute.arch.inline_ptx(
                        "cp.async.cg.shared.global [{$r0}], [{$r1}], 16, {$r2};",
                        read_only_args=[place, (line + chunk * 8).toint(), size],
                    )
        cute.arch.cp_async_commit_group()

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
        out_accum: cute.Tensor,
        lse_accum: cute.Tensor,
        sink: cute.Tensor,
        counters: cute.Tensor,
        scale_log2: Float32,
        is_causal: Int32,
        chunk_blocks: Int32,
        has_sink: Int32,
        qk: cute.TiledMma,
        pv: cute.TiledMma,
        q_layout: cute.ComposedLayout,
        p_layout: cute.ComposedLayout,
        part: Int32,
        head_kv: Int32,
        warp: Int32,
    ):
        """The two warpgroups: dot products, softmax, weighted sum, and the rows of each piece's result."""
        n, per = self.n, self.n // 4  # per: accumulators of one thread that one warpgroup's rows take
        own = n // 8  # query rows a thread sees of its own warpgroup's half
        tid, _, _ = cute.arch.thread_idx()
        lane = cute.arch.lane_idx()
        half = cute.arch.make_warp_uniform(warp // 4)
        wtid = tid % 128
        wwarp = cute.arch.make_warp_uniform(warp % 4)
        key0 = wwarp * 16 + lane // 4  # this thread's keys: key0 and key0 + 8
        pair = (lane % 4) * 2  # its rows: 8 g + pair and the next, for each g

        sm_q = st.q.get_tensor(q_layout.outer, swizzle=q_layout.inner)
        sm_p = st.p.get_tensor(p_layout.outer, swizzle=p_layout.inner)
        sm_top = st.top.get_tensor(cute.make_layout((n, 4), stride=(4, 1)))  # [row, warp]
        sm_factor = st.factor.get_tensor(cute.make_layout(n))
        sm_last = st.last.get_tensor(cute.make_layout(n))
        # [warpgroup that adds it, group of four, thread, four]: 16 bytes per thread without bank conflicts
        sm_x = st.x.get_tensor(cute.make_layout((2, per // 4, 128, 4), stride=(per * 128, 512, 4, 1)))
        # the merge comes after the last tile, when Q's place is free
        sm_sums = cute.make_tensor(
            cute.recast_ptr(st.q.data_ptr(), dtype=Float32), cute.make_layout((8, COLUMNS), stride=(COLUMNS, 1))
        )
        q_base = st.q.data_ptr().toint().to(Int32)
        p_base = st.p.data_ptr().toint().to(Int32)
        ring_base = st.ring.data_ptr().toint().to(Int32)

        thr_qk, thr_pv = qk.get_slice(wtid), pv.get_slice(wtid)
        a_k = qk.make_fragment_A(thr_qk.partition_A(sm_ring))
        width = n if self.by_columns else n // 2
        b_q = qk.make_fragment_B(thr_qk.partition_B(cute.flat_divide(sm_q, (width, self.d_qk))))
        sm_v = cute.make_tensor(sm_ring.iterator, cute.select(sm_ring.layout, [1, 0, 2]))
        a_v = pv.make_fragment_A(thr_pv.partition_A(cute.flat_divide(sm_v, (64, KEYS))))
        b_p = pv.make_fragment_B(thr_pv.partition_B(sm_p))
        s = qk.make_fragment_C(qk.partition_shape_C((64, width)))
        o = [pv.make_fragment_C(pv.partition_shape_C((64, n))) for _ in range(4)]
        mine = cute.make_rmem_tensor(cute.make_layout(per), Float32)
        give = cute.make_rmem_tensor(cute.make_layout(per), Float32)
        top = cute.make_rmem_tensor(cute.make_layout(own), Float32)
        total = cute.make_rmem_tensor(cute.make_layout(own), Float32)
        limit = cute.make_rmem_tensor(cute.make_layout(own), Int32)

        s_q, group = q.shape[1], q.shape[2] // kv.shape[2]
        rows = s_q * group
        begin_request, end_request = metadata[part, 0], metadata[part, 1]
        begin_block, last_end, split = metadata[part, 2], metadata[part, 3], metadata[part, 4]
        my_split = split
        stage = Int32(0)
        phase = Int32(0)
        for request in cutlass.range(begin_request, end_request + 1, unroll=1):
            # every load before the first use of one: each may come from memory
            # everybody is done with the previous request's Q: its last read lies before a barrier of its epilogue
            self.load_q(q, request, head_kv, group, rows, q_base, tid)
            raw, first_slot, next_slot = lengths[request], num_splits[request], num_splits[request + 1]
            length = self.clamped(raw, table, kv)
            pieces = next_slot - first_slot
            end_block = last_end
            if request != end_request:
                end_block = (length + KEYS - 1) // KEYS
            shortest = length
            if is_causal != 0:
                shortest = length - s_q + 1
            for i in cutlass.range_constexpr(own):
                row = half * (n // 2) + (i // 2) * 8 + pair + i % 2
                limit[i] = length - (s_q - 1 - row // group) * is_causal
            cute.arch.cp_async_wait_group(0)
            cute.arch.fence_view_async_shared()
            cute.arch.barrier(barrier_id=BAR_Q, number_of_threads=256)

            step, count = self.cutting(begin_block, end_block, chunk_blocks)
            for piece in cutlass.range(count, unroll=1):
                start = begin_block + piece * step
                stop = start + step
                stop = stop if stop < end_block else end_block
                for i in cutlass.range_constexpr(own):
                    top[i] = -Float32.inf
                    total[i] = Float32(0.0)
                for m in cutlass.range_constexpr(4):
                    o[m].fill(0.0)
                for block in cutlass.range(start, stop, unroll=1):
                    # ---- S^T, this warpgroup's share
                    cute.arch.mbarrier_wait(full + stage, phase)
                    warpgroup.fence()
                    for h in cutlass.range_constexpr(2):
                        if half == h:
                            for k in cutlass.range_constexpr(len(self.steps[h])):
                                at = self.steps[h][k]
                                qk.set(warpgroup.Field.ACCUMULATE, k != 0)
                                rows_at = 0 if self.by_columns else h
                                cute.gemm(qk, s, a_k[None, None, at, stage], b_q[None, None, at, rows_at, 0], s)
                    warpgroup.commit_group()
                    info = sm_info[stage]
                    token = block * KEYS
                    warpgroup.wait_group(0)

                    # ---- X: give the other warpgroup its rows, add what it gives
                    if const_expr(self.by_columns):
                        for i in cutlass.range_constexpr(per):
                            mine[i] = s[i] if half == 0 else s[i + per]
                            give[i] = s[i + per] if half == 0 else s[i]
                        for j in cutlass.range_constexpr(per // 4):
                            for i in cutlass.range_constexpr(4):
                                sm_x[1 - half, j, wtid, i] = give[j * 4 + i]
                    cute.arch.barrier(barrier_id=BAR_X, number_of_threads=256)
                    for j in cutlass.range_constexpr(per // 4):
                        for i in cutlass.range_constexpr(4):
                            if const_expr(self.by_columns):
                                mine[j * 4 + i] = (mine[j * 4 + i] + sm_x[half, j, wtid, i]) * scale_log2
                            else:
                                mine[j * 4 + i] = s[j * 4 + i] * scale_log2
                    if token + KEYS > length:
                        # keys beyond the length may hold NaN, and 0 * NaN is NaN in the weighted sum: zero them;
                        # behind X, because every warp must be done with these rows as keys
                        self.clear_tail(ring_base + stage * self.tile_bytes, half, wtid, length - token)
                    if (token + KEYS > shortest) | (info != (1 << BOXES) - 1):
                        for i in cutlass.range_constexpr(per):
                            key = key0 + 8 * ((i % 4) // 2)
                            seen = (info >> (key // BOX)) & 1
                            if (token + key >= limit[(i // 4) * 2 + i % 2]) | (seen == 0):
                                mine[i] = -Float32.inf

                    # ---- M: maxima over keys: two in the thread, eight lanes, four warps
                    peak = []
                    for i in cutlass.range_constexpr(own):
                        x = cute.arch.fmax(mine[(i // 2) * 4 + i % 2], mine[(i // 2) * 4 + 2 + i % 2])
                        for d in (4, 8, 16):
                            x = cute.arch.fmax(x, cute.arch.shuffle_sync_bfly(x, d))
                        peak.append(x)
                    if lane < 4:
                        for i in cutlass.range_constexpr(own):
                            sm_top[half * (n // 2) + (i // 2) * 8 + pair + i % 2, wwarp] = peak[i]
                    if half == 0:  # a barrier id that is not a constant makes the assembler reserve all 16
                        cute.arch.barrier(barrier_id=BAR_M, number_of_threads=128)
                    else:
                        cute.arch.barrier(barrier_id=BAR_M + 1, number_of_threads=128)
                    for i in cutlass.range_constexpr(own):
                        row = half * (n // 2) + (i // 2) * 8 + pair + i % 2
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
                    self.store_p(mine, p_base, half, wwarp, lane)
                    cute.arch.fence_view_async_shared()
                    cute.arch.barrier(barrier_id=BAR_P, number_of_threads=256)

                    # ---- O^T, this warpgroup's rows of V^T
                    for g in cutlass.range_constexpr(n // 8):
                        f0, f1 = sm_factor[g * 8 + pair], sm_factor[g * 8 + pair + 1]
                        for m in cutlass.range_constexpr(4):
                            o[m][g * 4] = o[m][g * 4] * f0
                            o[m][g * 4 + 1] = o[m][g * 4 + 1] * f1
                            o[m][g * 4 + 2] = o[m][g * 4 + 2] * f0
                            o[m][g * 4 + 3] = o[m][g * 4 + 3] * f1
                    warpgroup.fence()
                    pv.set(warpgroup.Field.ACCUMULATE, True)
                    for k in cutlass.range_constexpr(4):
                        for m in cutlass.range_constexpr(4):
                            cute.gemm(pv, o[m], a_v[None, None, k, half * 4 + m, 0, stage], b_p[None, None, k], o[m])
                    warpgroup.commit_group()
                    warpgroup.wait_group(0)
                    with cute.arch.elect_one():
                        cute.arch.mbarrier_arrive(empty + stage)
                    stage = stage ^ 1
                    phase = phase ^ (1 if stage == 0 else 0)

                self.finish(
                    o, top, total, sm_top, sm_factor, sm_last, out, lse, out_accum, lse_accum, sink, has_sink, request, head_kv,
                    first_slot + split + piece, pieces, rows, group, half, wwarp, lane, tid,
                )  # fmt: skip
                if const_expr(self.fused):
                    if pieces > 1:
                        cute.arch.barrier(barrier_id=BAR_Q, number_of_threads=256)
                        if tid == 0:  # the barrier and this release make all threads' stores visible
                            counter = counters[0, request * kv.shape[2] + head_kv, None].iterator
                            cute.arch.atomic_add(counter, Int32(1), sem="release", scope="gpu")
            begin_block = Int32(0)
            split = Int32(0)

        if const_expr(self.fused):
            begin_block = metadata[part, 2]
            for request in cutlass.range(begin_request, end_request + 1, unroll=1):
                first_slot = num_splits[request]
                pieces = num_splits[request + 1] - first_slot
                if pieces > 1:
                    end_block = last_end
                    if request != end_request:
                        end_block = (self.clamped(lengths[request], table, kv) + KEYS - 1) // KEYS
                    _, count = self.cutting(begin_block, end_block, chunk_blocks)
                    if tid == 0:
                        self.await_pieces(counters, request * kv.shape[2] + head_kv, pieces, count)
                    cute.arch.barrier(barrier_id=BAR_Q, number_of_threads=256)
                    self.merge(
                        out, lse, out_accum, lse_accum, sink, has_sink, sm_sums, request, head_kv, first_slot, pieces,
                        my_split, count, rows, group, tid,
                    )  # fmt: skip
                begin_block = Int32(0)
                my_split = Int32(0)

    @cute.jit
    def cutting(self, begin_block: Int32, end_block: Int32, chunk_blocks: Int32):
        """Blocks per piece, and pieces, of this part's stretch of one request."""
        span = end_block - begin_block
        step = chunk_blocks if chunk_blocks > 0 else span
        step = step if step > 0 else Int32(1)
        count = (span + step - 1) // step
        return step, count if count > 0 else Int32(1)

    @cute.jit
    def await_pieces(self, counters: cute.Tensor, which: Int32, pieces: Int32, mine: Int32):
        """Wait until all pieces of a request are stored. The last CTA to leave sets both counters back to zero."""
        arrived = counters[0, which, None].iterator
        left = counters[1, which, None].iterator
        seen = cute.arch.load(arrived, Int32, sem="acquire", scope="gpu")
        while seen < pieces:
            seen = cute.arch.load(arrived, Int32, sem="acquire", scope="gpu")
        before = cute.arch.atomic_add(left, mine, sem="relaxed", scope="gpu")
        if before + mine == pieces:
            counters[0, which, 0] = Int32(0)
            counters[1, which, 0] = Int32(0)

    @cute.jit
    def merge(
        self,
        out: cute.Tensor,
        lse: cute.Tensor,
        out_accum: cute.Tensor,
        lse_accum: cute.Tensor,
        sink: cute.Tensor,
        has_sink: Int32,
        sm_sums: cute.Tensor,
        request: Int32,
        head_kv: Int32,
        first_slot: Int32,
        pieces: Int32,
        my_split: Int32,
        count: Int32,
        rows: Int32,
        group: Int32,
        tid: Int32,
    ):
        """This CTA's share of one request: unit u (128 columns of a row) belongs to the holder of piece u mod pieces.

        With many pieces all eight warps add up one unit, each every eighth piece; with few, each warp takes its own.
        """
        warp, lane = tid // 32, tid % 32
        per_row = D_V // COLUMNS
        units = rows * per_row
        together = pieces >= 16
        # index i of this CTA's units -> u; a CTA that holds `count` pieces has `count` residues
        index = Int32(0) if together else warp
        step = Int32(1) if together else Int32(8)
        sums = cute.make_rmem_tensor(cute.make_layout(4), Float32)
        loads = cute.make_rmem_tensor(cute.make_layout((4, 8)), Float32)
        scales = cute.make_rmem_tensor(cute.make_layout(8), Float32)
        unit = my_split + index % count + (index // count) * pieces
        while unit < units:
            row, chunk = unit // per_row, unit % per_row
            line = head_kv * rows + row
            first = warp if together else Int32(0)
            stride = Int32(8) if together else Int32(1)
            data = cute.local_tile(out_accum, (1, 1, 4), (None, line, chunk * 32 + lane))
            sums.fill(0.0)
            # the first eight partials of this warp are on their way before the weights are known
            for u in cutlass.range_constexpr(8):
                piece = first + u * stride
                scales[u] = -Float32.inf
                if piece < pieces:
                    cute.autovec_copy(data[0, 0, None, first_slot + piece], loads[None, u])
                    scales[u] = lse_accum[first_slot + piece, line]
            peak = -Float32.inf
            for piece in cutlass.range(lane, pieces, 32, unroll=1):
                peak = cute.arch.fmax(peak, lse_accum[first_slot + piece, line])
            for d in (1, 2, 4, 8, 16):
                peak = cute.arch.fmax(peak, cute.arch.shuffle_sync_bfly(peak, d))
            shift = peak if peak > -Float32.inf else Float32(0.0)
            total = Float32(0.0)
            for piece in cutlass.range(lane, pieces, 32, unroll=1):
                total += cute.math.exp2(lse_accum[first_slot + piece, line] - shift, fastmath=True)
            for d in (1, 2, 4, 8, 16):
                total += cute.arch.shuffle_sync_bfly(total, d)
            for base in cutlass.range(0, pieces, 8 * stride, unroll=1):
                if base > 0:
                    for u in cutlass.range_constexpr(8):
                        piece = base + first + u * stride
                        scales[u] = -Float32.inf
                        if piece < pieces:
                            cute.autovec_copy(data[0, 0, None, first_slot + piece], loads[None, u])
                            scales[u] = lse_accum[first_slot + piece, line]
                for u in cutlass.range_constexpr(8):
                    if base + first + u * stride < pieces:
                        weight = cute.math.exp2(scales[u] - shift, fastmath=True)
                        for i in cutlass.range_constexpr(4):
                            sums[i] = sums[i] + loads[i, u] * weight
            if together:
                for i in cutlass.range_constexpr(4):
                    sm_sums[warp, lane * 4 + i] = sums[i]
                cute.arch.barrier(barrier_id=BAR_P, number_of_threads=256)
                if warp == 0:
                    for w in cutlass.range_constexpr(1, 8):
                        for i in cutlass.range_constexpr(4):
                            sums[i] = sums[i] + sm_sums[w, lane * 4 + i]
                cute.arch.barrier(barrier_id=BAR_X, number_of_threads=256)
            if (not together) | (warp == 0):
                token, head = row // group, head_kv * group + row % group
                scale = Float32(0.0)
                lse2 = -Float32.inf
                if total > 0.0:
                    scale = Float32(1.0) / total
                    lse2 = peak + cute.math.log2(total, fastmath=True)
                    if has_sink != 0:
                        scale = scale / (Float32(1.0) + cute.math.exp2(sink[head] * LOG2_E - lse2, fastmath=True))
                rounded = cute.make_rmem_tensor(cute.make_layout(4), self.dtype)
                for i in cutlass.range_constexpr(4):
                    sums[i] = sums[i] * scale
                rounded.store(sums.load().to(self.dtype))
                target = cute.local_tile(out[request, token, head, None], (4,), (chunk * 32 + lane,))
                cute.autovec_copy(rounded, target)
                if (chunk == 0) & (lane == 0):
                    lse[request, head, token] = lse2 * LN_2
            index += step
            unit = my_split + index % count + (index // count) * pieces

    @cute.jit
    def clear_tail(self, base: Int32, half: Int32, wtid: Int32, valid: Int32):
        """Zero the rows behind the last key in this warpgroup's four latent slices; whole lines, so swizzle is moot."""
        keep = valid if valid > 0 else Int32(0)
        zero = Int32(0)
        for item in cutlass.range(keep * 32 + wtid, KEYS * 32, 128, unroll=1):
            row, slice_, chunk = item // 32, half * 4 + (item // 8) % 4, item % 8
            place = base + (row // 8) * (self.d_qk * 16) + slice_ * 1024 + (row % 8) * 128 + chunk * 16
            cute.arch.inline_ptx(
                "st.shared.v4.b32 [{$r0}], {{$r1}, {$r1}, {$r1}, {$r1}};", read_only_args=[place, zero]
            )

    @cute.jit
    def store_p(self, mine: cute.Tensor, p_base: Int32, half: Int32, wwarp: Int32, lane: Int32):
        """P as [row, key], rounded, transposed on the way: eight rows and sixteen keys per stmatrix."""
        packed = cute.make_rmem_tensor(mine.layout, self.dtype)
        packed.store(mine.load().to(self.dtype))
        words = cute.recast_tensor(packed, Int32)
        for g in cutlass.range_constexpr(self.n // 16):
            row = half * (self.n // 2) + g * 8 + lane % 8
            chunk = (wwarp * 2 + (lane // 8) % 2) ^ (lane % 8)
            cute.arch.inline_ptx(
                "stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [{$r0}], {{$r1}, {$r2}};",
                read_only_args=[p_base + row * 128 + chunk * 16, words[g * 2], words[g * 2 + 1]],
            )

    @cute.jit
    def finish(
        self,
        o: cutlass.Constexpr,
        top: cute.Tensor,
        total: cute.Tensor,
        sm_top: cute.Tensor,
        sm_factor: cute.Tensor,
        sm_last: cute.Tensor,
        out: cute.Tensor,
        lse: cute.Tensor,
        out_accum: cute.Tensor,
        lse_accum: cute.Tensor,
        sink: cute.Tensor,
        has_sink: Int32,
        request: Int32,
        head_kv: Int32,
        slot: Int32,
        pieces: Int32,
        rows: Int32,
        group: Int32,
        half: Int32,
        wwarp: Int32,
        lane: Int32,
        tid: Int32,
    ):
        """Normalise one piece and store it: final rows where the request has one piece, else a partial in fp32."""
        n, own = self.n, self.n // 8
        pair = (lane % 4) * 2
        for i in cutlass.range_constexpr(own):
            x = total[i]
            for d in (4, 8, 16):
                x = x + cute.arch.shuffle_sync_bfly(x, d)
            row = half * (n // 2) + (i // 2) * 8 + pair + i % 2
            if lane < 4:
                sm_top[row, wwarp] = x
                if wwarp == 0:
                    sm_last[row] = top[i]  # not into sm_factor: the other warpgroup may still read that
        cute.arch.barrier(barrier_id=BAR_P, number_of_threads=256)
        if tid < n:
            x = (sm_top[tid, 0] + sm_top[tid, 1]) + (sm_top[tid, 2] + sm_top[tid, 3])
            lse2 = -Float32.inf
            scale = Float32(0.0)
            token, head = tid // group, head_kv * group + tid % group
            if x > 0.0:
                lse2 = sm_last[tid] + cute.math.log2(x, fastmath=True)
                scale = Float32(1.0) / x
            if tid < rows:
                if pieces == 1:
                    if (has_sink != 0) & (x > 0.0):
                        scale = scale / (Float32(1.0) + cute.math.exp2(sink[head] * LOG2_E - lse2, fastmath=True))
                    lse[request, head, token] = lse2 * LN_2
                else:
                    lse_accum[slot, head_kv * rows + tid] = lse2
            sm_factor[tid] = scale
        cute.arch.barrier(barrier_id=BAR_X, number_of_threads=256)
        column = half * 256 + wwarp * 16 + lane // 4
        for g in cutlass.range_constexpr(n // 8):
            for b in cutlass.range_constexpr(2):
                row = g * 8 + pair + b
                scale = sm_factor[row]
                if row < rows:
                    if pieces == 1:
                        line = out[request, row // group, head_kv * group + row % group, None]
                        for m in cutlass.range_constexpr(4):
                            line[column + m * 64] = (o[m][g * 4 + b] * scale).to(self.dtype)
                            line[column + m * 64 + 8] = (o[m][g * 4 + 2 + b] * scale).to(self.dtype)
                    else:
                        part = out_accum[slot, head_kv * rows + row, None]
                        for m in cutlass.range_constexpr(4):
                            part[column + m * 64] = o[m][g * 4 + b] * scale
                            part[column + m * 64 + 8] = o[m][g * 4 + 2 + b] * scale


def fake_arguments(dtype, d_qk=576):
    """Arguments for `toolchain.compile_kernel(DecodeDenseSmall(...), ...)`: every extent and stride left open."""
    from cutlass.cute.runtime import make_fake_tensor

    from openmla.backends.cute.toolchain import fake_stream, fake_tensor

    sym, div = cute.sym_int, [cute.sym_int64(divisibility=8) for _ in range(6)]  # rows start at 16-byte multiples
    out_step = [cute.sym_int64(divisibility=4) for _ in range(3)]
    q = make_fake_tensor(dtype, (sym(), sym(), sym(), d_qk), stride=(*div[:3], 1), assumed_align=16)
    kv = make_fake_tensor(dtype, (sym(), sym(), sym(), d_qk), stride=(*div[3:], 1), assumed_align=16)
    return [
        q,
        kv,
        fake_tensor(Int32, (None, None), stride=(None, 1), align=4),
        fake_tensor(Int32, (None,), align=4),
        fake_tensor(Int32, (None, 8), align=16),
        fake_tensor(Int32, (None,), align=4),
        make_fake_tensor(dtype, (sym(), sym(), sym(), D_V), stride=(*out_step, 1), assumed_align=8),
        fake_tensor(Float32, (None, None, None), stride=(None, None, None), align=4),
        fake_tensor(Float32, (None, None, D_V), align=16),
        fake_tensor(Float32, (None, None), align=4),
        fake_tensor(Float32, (None,), align=4),
        make_fake_tensor(Int32, (2, sym(), 1), stride=(cute.sym_int64(), 1, 1), assumed_align=4),
        fake_tensor(Int32, (1,), align=4),
        Float32(1.0), Int32(0), Int32(0), Int32(0),
        fake_stream(),
    ]  # fmt: skip
