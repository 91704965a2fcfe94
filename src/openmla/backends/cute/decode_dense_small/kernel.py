"""Dense MLA decode for few rows (s_q * heads per KV head <= 64): device code.

Operands are swapped, so that the few rows lie on the N side of wgmma and nothing is padded to 64:
    S^T [64 keys, N]      = K [64, 576] Q^T          A = K, K-major; B = Q, K-major
    O^T [512, N]         += V^T [512, 64] P^T        A = V^T, the same bytes seen MN-major; B = P, K-major

Two consumer warpgroups share each tile of 64 keys. Warpgroup w owns the latent columns [256 w, 256 w + 256) twice: as
the part of the dot product it sums, and as the rows of O^T it accumulates; so every 8 KB slice of KV is read by one
warpgroup only, and one warpgroup frees it. The two partial S^T are added through shared memory; warpgroup w then does
the softmax of the query rows [w N/2, w N/2 + N/2). One producer warp keeps the ring of slices full and runs ahead into
the next request.

Order of a tile in the ring: RoPE, 0, 4, 1, 5, 2, 6, 3, 7, so that both warpgroups can start early.

Barriers per tile: X (both warpgroups: partial S^T exchanged), M (one warpgroup: maxima of its four warps), P (both:
P and rescale factors stored). A second write to any of these buffers lies behind at least one of them.

Budget at N = 16: 24 slices 196,608 + Q 18,432 + P 2,048 + X 4,096 bytes; 288 threads; no spills.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup

KEYS = 64  # per tile
SLICE = 64  # columns per ring slot
SLOT_BYTES = KEYS * SLICE * 2
D_V = 512
LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
EVICT_FIRST = 0x12F0000000000000
EVICT_NORMAL = 0x1000000000000000

BAR_X, BAR_M, BAR_P, BAR_Q = 1, 2, 4, 5  # named barriers; BAR_M + w belongs to warpgroup w

PAGE_OUT_OF_RANGE = 1
LENGTH_NEGATIVE = 2
LENGTH_OVER_CAPACITY = 4
INFOS = 4  # tile descriptions kept; more than tiles in the ring


class DecodeDenseSmall:
    """One compiled variant.

    Args:
        dtype: cutlass.BFloat16 or cutlass.Float16.
        rows: N, a multiple of 16 up to 64; query rows per KV head, padded.
        d_qk: 576 or 512.
        box_rows: rows of one bulk load, 64 or a divisor of it that divides the page size.
        slots: ring length in slices.
    """

    def __init__(self, dtype, rows, d_qk=576, box_rows=64, slots=24):
        self.dtype, self.n, self.box, self.slots = dtype, rows, box_rows, slots
        self.has_rope = d_qk > D_V
        self.slices = d_qk // SLICE
        self.d_qk = d_qk
        # ring order: (slice of the tile, warpgroup that reads it)
        latent = [(half * 4 + i, half) for i in range(4) for half in range(2)]
        self.order = [(8, 0)] * self.has_rope + latent
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

        ring_layout, q_layout, p_layout = tile(KEYS, SLICE, self.slots), tile(self.n, self.d_qk), tile(self.n, KEYS)
        k_major, mn_major = OperandMajorMode.K, OperandMajorMode.MN
        mma_args = (Float32, (1, 1, 1), (64, self.n))
        qk = sm90.make_trivial_tiled_mma(self.dtype, self.dtype, k_major, k_major, *mma_args)
        pv = sm90.make_trivial_tiled_mma(self.dtype, self.dtype, mn_major, k_major, *mma_args)
        paged = cute.make_tensor(kv.iterator, cute.select(kv.layout, [1, 3, 2, 0]))
        tma, tma_kv = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileG2SOp(), paged, tile(self.box, SLICE), (self.box, SLICE)
        )

        @cute.struct
        class Storage:
            full: cute.struct.MemRange[Int64, self.slots]
            empty: cute.struct.MemRange[Int64, self.slots]
            info: cute.struct.MemRange[Int32, INFOS]
            top: cute.struct.Align[cute.struct.MemRange[Float32, self.n * 4], 16]
            factor: cute.struct.Align[cute.struct.MemRange[Float32, self.n], 16]
            last: cute.struct.Align[cute.struct.MemRange[Float32, self.n], 16]
            ring: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(ring_layout)], 1024]
            q: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(q_layout)], 1024]
            p: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(p_layout)], 1024]
            x: cute.struct.Align[cute.struct.MemRange[Float32, 2 * self.n // 4 * 128], 16]

        self.Storage = Storage
        self.smem_bytes = Storage.size_in_bytes()
        self.kernel(
            tma, tma_kv, q, kv, table, lengths, metadata, num_splits, out, lse, out_accum, lse_accum, sink, faults,
            scale_log2, is_causal, chunk_blocks, has_sink, qk, pv, ring_layout, q_layout, p_layout,
        ).launch(
            grid=[metadata.shape[0], kv.shape[2], 1],
            block=[self.threads, 1, 1],
            min_blocks_per_mp=1,
            stream=stream,
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
        out_accum: cute.Tensor,
        lse_accum: cute.Tensor,
        sink: cute.Tensor,
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
        sm_info = st.info.get_tensor(cute.make_layout(INFOS))
        sm_ring = st.ring.get_tensor(ring_layout.outer, swizzle=ring_layout.inner)

        if warp == 0:
            with cute.arch.elect_one():
                for i in cutlass.range_constexpr(self.slots):
                    cute.arch.mbarrier_init(full + i, 1)
                    cute.arch.mbarrier_init(empty + i, 4)
            cpasync.prefetch_descriptor(tma)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()

        if warp >= 8:
            if const_expr(self.wide):
                cute.arch.setmaxregister_decrease(24)
            if warp == 8:
                self.produce(
                    tma, tma_kv, kv, table, lengths, metadata, faults, part, head_kv, chunk_blocks, full, empty,
                    sm_info, sm_ring,
                )  # fmt: skip
        else:
            if const_expr(self.wide):
                cute.arch.setmaxregister_increase(240)
            self.consume(
                st, sm_info, sm_ring, full, empty, q, kv, table, lengths, metadata, num_splits, out, lse, out_accum,
                lse_accum, sink, scale_log2, is_causal, chunk_blocks, has_sink, qk, pv, q_layout, p_layout, part,
                head_kv, warp,
            )  # fmt: skip

    @cute.jit
    def clamped_length(self, lengths: cute.Tensor, table: cute.Tensor, kv: cute.Tensor, request: Int32) -> Int32:
        """Attendable tokens of a request: not negative, and not more than the block table can address."""
        length = lengths[request]
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
        chunk_blocks: Int32,
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
        boxes = KEYS // self.box
        group = 32 // boxes  # tiles whose page ids one load of the warp brings
        source = cute.local_tile(tma_kv, (self.box, SLICE), (None, None, head_kv, None))
        target = cute.flat_divide(sm_ring, (self.box, SLICE))  # [box, slice, boxes, 1, slots]
        t_ring, t_kv = cpasync.tma_partition(
            tma, 0, cute.make_layout(1), cute.group_modes(target, 0, 2), cute.group_modes(source, 0, 2)
        )
        boxes_per_page = kv.shape[1] // self.box
        policy = Int64(EVICT_FIRST)
        begin_request, end_request = metadata[part, 0], metadata[part, 1]
        begin_block, last_end = metadata[part, 2], metadata[part, 3]
        slot = Int32(0)
        phase = Int32(1)  # the first lap finds every slot free
        tile = Int32(0)
        bad = Int32(0)
        for request in cutlass.range(begin_request, end_request + 1, unroll=1):
            length = self.clamped_length(lengths, table, kv, request)
            raw = lengths[request]
            if raw < 0:
                bad = bad | LENGTH_NEGATIVE
            if raw > length:
                bad = bad | LENGTH_OVER_CAPACITY
            end_block = last_end
            if request != end_request:
                end_block = (length + KEYS - 1) // KEYS
            ahead, fault = self.page_of(table, kv, request, begin_block * boxes + lane, boxes_per_page, length)
            bad = bad | fault
            pages = ahead
            for block in cutlass.range(begin_block, end_block, unroll=1):
                place = (block - begin_block) % group
                if place == 0:
                    pages = ahead
                    ahead, fault = self.page_of(
                        table, kv, request, (block + group) * boxes + lane, boxes_per_page, length
                    )
                    bad = bad | fault
                info = Int32(0)
                page = []
                row = []
                for i in cutlass.range_constexpr(boxes):
                    page.append(cute.arch.shuffle_sync(pages, place * boxes + i))
                    row.append((block * boxes + i) % boxes_per_page)
                    info = info | (Int32(1 << i) if page[i] >= 0 else Int32(0))
                for e in cutlass.range_constexpr(len(self.order)):
                    cute.arch.mbarrier_wait(empty + slot, phase)
                    with cute.arch.elect_one():
                        if const_expr(e == 0):
                            sm_info[tile] = info
                        cute.arch.mbarrier_arrive_and_expect_tx(full + slot, SLOT_BYTES)
                    for i in cutlass.range_constexpr(boxes):
                        cute.copy(
                            tma,
                            t_kv[None, row[i], self.order[e][0], page[i]],
                            t_ring[None, i, 0, slot],
                            tma_bar_ptr=full + slot,
                            cache_policy=policy,
                        )
                    slot += 1
                    if slot == self.slots:
                        slot = Int32(0)
                        phase = phase ^ 1
                tile = (tile + 1) % INFOS
            begin_block = Int32(0)
        if bad != 0:
            cute.arch.atomic_or(faults.iterator, bad, sem="relaxed", scope="gpu")

    @cute.jit
    def page_of(
        self, table: cute.Tensor, kv: cute.Tensor, request: Int32, box: Int32, boxes_per_page: Int32, length: Int32
    ):
        """Page of a box of rows, -1 where it must not be read; and the fault that this is, if any."""
        page = Int32(-1)
        fault = Int32(0)
        if box * self.box < length:
            page = table[request, box // boxes_per_page]
            if (page < 0) | (page >= kv.shape[0]):
                page = Int32(-1)
                fault = Int32(PAGE_OUT_OF_RANGE)
        return page, fault

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
        q_base = st.q.data_ptr().toint().to(Int32)
        p_base = st.p.data_ptr().toint().to(Int32)
        ring_base = st.ring.data_ptr().toint().to(Int32)

        thr_qk, thr_pv = qk.get_slice(wtid), pv.get_slice(wtid)
        a_k = qk.make_fragment_A(thr_qk.partition_A(sm_ring))
        b_q = qk.make_fragment_B(thr_qk.partition_B(sm_q))
        sm_v = cute.make_tensor(sm_ring.iterator, cute.select(sm_ring.layout, [1, 0, 2]))
        a_v = pv.make_fragment_A(thr_pv.partition_A(sm_v))
        b_p = pv.make_fragment_B(thr_pv.partition_B(sm_p))
        s = qk.make_fragment_C(qk.partition_shape_C((64, n)))
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
        slot = Int32(0)
        phase = Int32(0)
        tile = Int32(0)
        for request in cutlass.range(begin_request, end_request + 1, unroll=1):
            length = self.clamped_length(lengths, table, kv, request)
            end_block = last_end
            if request != end_request:
                end_block = (length + KEYS - 1) // KEYS
            first_slot = num_splits[request]
            pieces = num_splits[request + 1] - first_slot
            # everybody is done with the previous request's Q: its last read lies before a barrier of its epilogue
            self.load_q(q, request, head_kv, group, rows, q_base, tid)
            shortest = length
            if is_causal != 0:
                shortest = length - s_q + 1
            for i in cutlass.range_constexpr(own):
                row = half * (n // 2) + (i // 2) * 8 + pair + i % 2
                limit[i] = length - (s_q - 1 - row // group) * is_causal
            cute.arch.cp_async_wait_group(0)
            cute.arch.fence_view_async_shared()
            cute.arch.barrier(barrier_id=BAR_Q, number_of_threads=256)

            step = end_block - begin_block
            if chunk_blocks > 0:
                step = chunk_blocks
            step = step if step > 0 else Int32(1)
            count = end_block - begin_block
            count = (count + step - 1) // step
            count = count if count > 0 else Int32(1)
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
                    # ---- S^T, this warpgroup's columns
                    for h in cutlass.range_constexpr(2):
                        if half == h:
                            is_first = True
                            warpgroup.fence()
                            for e in cutlass.range_constexpr(len(self.order)):
                                if const_expr(self.order[e][1] == h):
                                    at = slot + e
                                    turn = phase
                                    if at >= self.slots:
                                        at = at - self.slots
                                        turn = turn ^ 1
                                    cute.arch.mbarrier_wait(full + at, turn)
                                    if const_expr(is_first):
                                        warpgroup.fence()
                                    for k in cutlass.range_constexpr(4):
                                        qk.set(warpgroup.Field.ACCUMULATE, not (is_first and k == 0))
                                        cute.gemm(
                                            qk, s, a_k[None, None, k, at], b_q[None, None, self.order[e][0] * 4 + k], s
                                        )
                                    is_first = False
                            warpgroup.commit_group()
                    warpgroup.wait_group(0)
                    info = sm_info[tile]
                    token = block * KEYS
                    if const_expr(self.has_rope):
                        if half == 0:
                            with cute.arch.elect_one():
                                cute.arch.mbarrier_arrive(empty + slot)

                    # ---- X: give the other warpgroup its rows, add what it gives
                    for i in cutlass.range_constexpr(per):
                        mine[i] = s[i] if half == 0 else s[i + per]
                        give[i] = s[i + per] if half == 0 else s[i]
                    for j in cutlass.range_constexpr(per // 4):
                        for i in cutlass.range_constexpr(4):
                            sm_x[1 - half, j, wtid, i] = give[j * 4 + i]
                    cute.arch.barrier(barrier_id=BAR_X, number_of_threads=256)
                    if token + KEYS > length:
                        # keys beyond the length may hold NaN, and 0 * NaN is NaN in the weighted sum: zero them;
                        # behind X, because all four warps must be done with these rows as keys
                        self.clear_tail(ring_base, slot, half, wtid, length - token)
                    for j in cutlass.range_constexpr(per // 4):
                        for i in cutlass.range_constexpr(4):
                            mine[j * 4 + i] = (mine[j * 4 + i] + sm_x[half, j, wtid, i]) * scale_log2
                    if (token + KEYS > shortest) | (info != (1 << (KEYS // self.box)) - 1):
                        for i in cutlass.range_constexpr(per):
                            key = key0 + 8 * ((i % 4) // 2)
                            seen = (info >> (key // self.box)) & 1
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
                            at = self.place(slot, m, half)
                            cute.gemm(pv, o[m], a_v[None, None, k, at], b_p[None, None, k], o[m])
                    warpgroup.commit_group()
                    warpgroup.wait_group(0)
                    with cute.arch.elect_one():
                        for m in cutlass.range_constexpr(4):
                            cute.arch.mbarrier_arrive(empty + self.place(slot, m, half))
                    slot += len(self.order)
                    if slot >= self.slots:
                        slot -= self.slots
                        phase = phase ^ 1
                    tile = (tile + 1) % INFOS

                self.finish(
                    o, top, total, sm_top, sm_factor, sm_last, out, lse, out_accum, lse_accum, sink, has_sink, request, head_kv,
                    first_slot + split + piece, pieces, rows, group, half, wwarp, lane, tid,
                )  # fmt: skip
            begin_block = Int32(0)
            split = Int32(0)

    @cute.jit
    def place(self, slot: Int32, m: cutlass.Constexpr, half: Int32) -> Int32:
        """Ring slot of a warpgroup's m-th latent slice, given the slot of the tile's first slice."""
        at = slot + (int(self.has_rope) + 2 * m) + half
        return at if at < self.slots else at - self.slots

    @cute.jit
    def clear_tail(self, ring_base: Int32, slot: Int32, half: Int32, wtid: Int32, valid: Int32):
        """Zero the rows behind the last key in this warpgroup's four latent slices; whole rows, so swizzle is moot."""
        keep = valid if valid > 0 else Int32(0)
        zero = Int32(0)
        for m in cutlass.range_constexpr(4):
            base = ring_base + self.place(slot, m, half) * SLOT_BYTES
            for chunk in cutlass.range(keep * 8 + wtid, KEYS * 8, 128, unroll=1):
                cute.arch.inline_ptx(
                    "st.shared.v4.b32 [{$r0}], {{$r1}, {$r1}, {$r1}, {$r1}};", read_only_args=[base + chunk * 16, zero]
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
    from openmla.backends.cute.toolchain import fake_stream, fake_tensor

    steps = 8  # elements: rows start at multiples of 16 bytes
    div = [cute.sym_int64(divisibility=steps) for _ in range(6)]
    from cutlass.cute.runtime import make_fake_tensor

    sym = cute.sym_int
    q = make_fake_tensor(dtype, (sym(), sym(), sym(), d_qk), stride=(*div[:3], 1), assumed_align=16)
    kv = make_fake_tensor(dtype, (sym(), sym(), sym(), d_qk), stride=(*div[3:], 1), assumed_align=16)
    return [
        q,
        kv,
        fake_tensor(Int32, (None, None), stride=(None, 1), align=4),
        fake_tensor(Int32, (None,), align=4),
        fake_tensor(Int32, (None, 8), align=16),
        fake_tensor(Int32, (None,), align=4),
        fake_tensor(dtype, (None, None, None, D_V), stride=(None, None, None, 1), align=2),
        fake_tensor(Float32, (None, None, None), stride=(None, None, None), align=4),
        fake_tensor(Float32, (None, None, D_V), align=16),
        fake_tensor(Float32, (None, None), align=4),
        fake_tensor(Float32, (None,), align=4),
        fake_tensor(Int32, (1,), align=4),
        Float32(1.0), Int32(0), Int32(0), Int32(0),
        fake_stream(),
    ]  # fmt: skip
