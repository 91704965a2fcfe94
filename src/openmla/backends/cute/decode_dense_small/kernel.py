"""Dense MLA decode for few rows (s_q * heads per KV head <= 32): device code.

Operands are swapped, so that the few rows lie on the N side of wgmma and nothing is padded to 64:
    S^T [64 keys, N]      = K [64, 576] Q^T          A = K, K-major; B = Q, K-major
    O^T [512, N]         += V^T [512, 64] P^T        A = V^T, the same bytes seen MN-major; B = P, K-major

One producer warp keeps two tiles of 64 keys in flight and runs ahead into the next request. A tile arrives as eight
boxes of eight whole rows, 9,216 contiguous bytes each (boxes of 64 columns gave 5 % less of the memory's rate). Two
consumer warpgroups share each tile: warpgroup w sums its half of the columns of every dot product, exchanges partial
scores with the other, does the softmax of the query rows [w N/2, w N/2 + N/2) and accumulates the rows
[256 w, 256 w + 256) of O^T.

Requests in several pieces leave fp32 partials. The CTAs that hold the pieces of one request then merge it together,
each a share of the rows and columns, in split order; the launch is cooperative, so waiting for the others is safe.

Barriers per tile: X (both warpgroups: partial S^T exchanged), M (one warpgroup: maxima of its four warps), P (both:
P and rescale factors stored). A second write to any of these buffers lies behind at least one of them.

Budget at N = 16: two tiles 147,456 + Q 18,432 + P 2,048 + X 4,096 bytes; 288 threads; no spills.
docs/kernels/decode_dense_small.md has the timeline and the log of experiments.
"""

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup

M = 64  # of one wgmma: keys of a score, columns of a value
BOX = 8  # rows of one bulk load; a page holds a multiple of it
SLICE = 64  # columns of one swizzled line
D_V = 512
THREADS = 288  # two consumer warpgroups and the producer warp; up to 168 registers each
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
        rows: N, 16 or 32; query rows per KV head, padded.
        d_qk: 576 or 512.
        stages: tiles in the ring.
        fused: merge split requests in this kernel; else leave partials to `openmla.backends.cute.combine`.
    """

    def __init__(self, dtype: Any, rows: int, d_qk: int = 576, stages: int = 2, fused: bool = True) -> None:
        self.dtype, self.n, self.d_qk, self.stages, self.fused = dtype, rows, d_qk, stages, fused
        self.boxes = M // BOX
        self.slices = d_qk // SLICE
        self.box_bytes = BOX * d_qk * 2

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
        out_accum: cute.Tensor,  # fp32 [slots, h_kv * N * 512], or [slots, h_kv * rows * 512] when not fused
        lse_accum: cute.Tensor,  # fp32 [slots, h_kv * N * 2]: maximum and sum; [slots, h_kv * rows]: base-2 lse
        sink: cute.Tensor,  # fp32 [h_q]
        counters: cute.Tensor,  # int32 [2, batch * h_kv, 1], zero before the first launch, zero again after each
        faults: cute.Tensor,  # int32 [1]
        scale_log2: Float32,
        is_causal: Int32,
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
        q_layout, p_layout = tile(self.n, self.d_qk), tile(self.n, M)
        ring_size = self.stages * M * self.d_qk
        x_size = M * self.n
        k_major, mn_major = OperandMajorMode.K, OperandMajorMode.MN
        qk = sm90.make_trivial_tiled_mma(self.dtype, self.dtype, k_major, k_major, Float32, (1, 1, 1), (64, self.n))
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
            full: cute.struct.MemRange[Int64, self.stages]
            empty: cute.struct.MemRange[Int64, self.stages]
            info: cute.struct.MemRange[Int32, self.stages]
            top: cute.struct.Align[cute.struct.MemRange[Float32, self.n * 4], 16]
            factor: cute.struct.Align[cute.struct.MemRange[Float32, self.n], 16]
            last: cute.struct.Align[cute.struct.MemRange[Float32, self.n], 16]
            ring: cute.struct.Align[cute.struct.MemRange[self.dtype, ring_size], 1024]
            q: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(q_layout)], 1024]
            p: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(p_layout)], 1024]
            x: cute.struct.Align[cute.struct.MemRange[Float32, x_size], 16]

        self.Storage = Storage
        self.smem_bytes = Storage.size_in_bytes()
        self.kernel(
            tma, tma_kv, q, kv, table, lengths, metadata, num_splits, out, lse, out_accum, lse_accum, sink, counters,
            faults, scale_log2, is_causal, unit, chunk_blocks, has_sink, qk, pv, ring_layout, q_layout, p_layout,
        ).launch(
            grid=[metadata.shape[0], kv.shape[2], 1],
            block=[THREADS, 1, 1],
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
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        st = cutlass.memory.SmemAllocator().allocate(self.Storage)
        full, empty = st.full.data_ptr(), st.empty.data_ptr()
        sm_info = st.info.get_tensor(cute.make_layout(self.stages))
        stage_step = cute.make_layout(self.stages, stride=M * self.d_qk)
        sm_ring = st.ring.get_tensor(cute.append(ring_layout.outer, stage_step), swizzle=ring_layout.inner)

        if warp == 0:
            with cute.arch.elect_one():
                for i in cutlass.range_constexpr(self.stages):
                    cute.arch.mbarrier_init(full + i, 1)
                    cute.arch.mbarrier_init(empty + i, 8)
            cpasync.prefetch_descriptor(tma)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        if const_expr(not self.fused):
            cute.arch.griddepcontrol_launch_dependents()
            cute.arch.griddepcontrol_wait()

        if warp >= 8:
            if warp == 8:
                self.produce(
                    tma, tma_kv, kv, table, lengths, metadata, faults, unit, part, head_kv, full, empty, sm_info, sm_ring,
                )  # fmt: skip
        else:
            self.consume(
                st, sm_info, sm_ring, full, empty, q, kv, table, lengths, metadata, num_splits, out, lse, out_accum,
                lse_accum, sink, counters, scale_log2, is_causal, unit, chunk_blocks, has_sink, qk, pv, q_layout, p_layout,
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
        unit: Int32,
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
        group = 32 // self.boxes  # tiles whose page ids one load of the warp brings
        source = cute.local_tile(tma_kv, (BOX, SLICE, self.slices), (None, 0, 0, head_kv, None))
        target = cute.flat_divide(sm_ring, (BOX, self.d_qk))  # [row, column, box, 1, stage]
        t_ring, t_kv = cpasync.tma_partition(
            tma, 0, cute.make_layout(1), cute.group_modes(target, 0, 2), cute.group_modes(source, 0, 3)
        )
        boxes_per_page = kv.shape[1] // BOX
        policy = Int64(EVICT_FIRST)
        begin_request, end_request = metadata[part, 0], metadata[part, 1]
        begin, last_end = metadata[part, 2] * unit, metadata[part, 3] * unit  # tokens
        stage = Int32(0)
        phase = Int32(1)  # the first lap finds every stage free
        bad = Int32(0)
        for request in cutlass.range(begin_request, end_request + 1, unroll=1):
            raw = lengths[request]
            box = begin // BOX + lane
            column, _ = self.locate(box, boxes_per_page)
            entry = Int32(-1)
            if column < table.shape[1]:
                entry = table[request, column]  # read before the length is known: it may be garbage
            length = self.clamped(raw, table, kv)
            if raw < 0:
                bad = bad | LENGTH_NEGATIVE
            if raw > length:
                bad = bad | LENGTH_OVER_CAPACITY
            end = length
            if request == end_request:
                end = last_end if last_end < length else length
            pages = Int32(-1)
            for token in cutlass.range(begin, end, M, unroll=1):
                place = (token - begin) // M % group
                if place == 0:
                    pages = entry
                    if box * BOX >= end:
                        pages = Int32(-1)
                    elif (pages < 0) | (pages >= kv.shape[0]):
                        pages = Int32(-1)
                        bad = bad | PAGE_OUT_OF_RANGE
                    box += 32
                    column, _ = self.locate(box, boxes_per_page)
                    entry = Int32(-1)
                    if column < table.shape[1]:
                        entry = table[request, column]
                seen = Int32(cute.arch.vote_ballot_sync(pages >= 0)) >> (place * self.boxes)
                _, row = self.locate(token // BOX, boxes_per_page)
                boxes = (end - token + BOX - 1) // BOX
                boxes = boxes if boxes < self.boxes else Int32(self.boxes)
                cute.arch.mbarrier_wait(empty + stage, phase)
                with cute.arch.elect_one():
                    sm_info[stage] = seen & (1 << self.boxes) - 1
                    cute.arch.mbarrier_arrive_and_expect_tx(full + stage, boxes * self.box_bytes)
                for i in cutlass.range_constexpr(self.boxes):
                    page = cute.arch.shuffle_sync(pages, place * self.boxes + i)
                    if i < boxes:
                        cute.copy(
                            tma,
                            t_kv[None, row, page],
                            t_ring[None, i, 0, stage],
                            tma_bar_ptr=full + stage,
                            cache_policy=policy,
                        )
                    row += 1
                    row = row if row < boxes_per_page else Int32(0)
                stage += 1
                if stage == self.stages:
                    stage = Int32(0)
                    phase = phase ^ 1
            begin = Int32(0)
        if bad != 0:
            cute.arch.atomic_or(faults.iterator, bad, sem="relaxed", scope="gpu")

    @cute.jit
    def locate(self, box: Int32, boxes_per_page: Int32):
        """Page column and place within the page of a box of rows. Pages of 64 spare the division."""
        column, place = box // 8, box % 8
        if boxes_per_page != 8:
            column = box // boxes_per_page
            place = box - column * boxes_per_page
        return column, place

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
    ):
        """The two warpgroups: dot products, softmax, weighted sum, and the rows of each piece's result."""
        steps = self.d_qk // 32  # half of the k-steps of a score
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
        a_v = pv.make_fragment_A(thr_pv.partition_A(cute.flat_divide(sm_v, (M, M))))
        b_p = pv.make_fragment_B(thr_pv.partition_B(sm_p))
        s = qk.make_fragment_C(qk.partition_shape_C((64, n)))
        o = [pv.make_fragment_C(pv.partition_shape_C((64, n))) for _ in range(4)]
        mine = cute.make_rmem_tensor(cute.make_layout(per), Float32)
        give = cute.make_rmem_tensor(cute.make_layout(per), Float32)
        top = cute.make_rmem_tensor(cute.make_layout(own), Float32)
        total = cute.make_rmem_tensor(cute.make_layout(own), Float32)

        s_q, group = q.shape[1], q.shape[2] // kv.shape[2]
        rows = s_q * group
        begin_request, end_request = metadata[part, 0], metadata[part, 1]
        begin, last_end, split = metadata[part, 2] * unit, metadata[part, 3] * unit, metadata[part, 4]
        begin_at, begin_split = begin, split
        # of the first and the last request: what the merge needs, without another look into memory
        first_of_begin, pieces_of_begin = Int32(0), Int32(0)
        first_slot, pieces, end = Int32(0), Int32(0), Int32(0)
        stage = Int32(0)
        phase = Int32(0)
        for request in cutlass.range(begin_request, end_request + 1, unroll=1):
            # every load before the first use of one: each may come from memory
            # everybody is done with the previous request's Q: its last read lies before a barrier of its epilogue
            self.load_q(q, request, head_kv, group, rows, q_base, tid)
            raw = lengths[request]
            first_slot = num_splits[request]
            pieces = num_splits[request + 1] - first_slot
            length = self.clamped(raw, table, kv)
            end = length
            if request == end_request:
                end = last_end if last_end < length else length
            shortest = length
            if is_causal != 0:
                shortest = length - s_q + 1
            cute.arch.cp_async_wait_group(0)
            cute.arch.fence_view_async_shared()
            cute.arch.barrier(barrier_id=BAR_Q, number_of_threads=256)

            if request == begin_request:
                first_of_begin, pieces_of_begin = first_slot, pieces
            count = self.pieces_here(request, end_request, begin, last_end, split, pieces, chunk_blocks * unit)
            for piece in cutlass.range(count, unroll=1):
                start = begin + piece * chunk_blocks * unit
                stop = end  # the last piece takes what there is: as many tiles as the producer loads, whatever the plan
                if piece + 1 < count:
                    stop = start + chunk_blocks * unit
                    stop = stop if stop < end else end
                for i in cutlass.range_constexpr(own):
                    top[i] = -Float32.inf
                    total[i] = Float32(0.0)
                for m in cutlass.range_constexpr(4):
                    o[m].fill(0.0)
                for token in cutlass.range(start, stop, M, unroll=1):
                    # ---- S^T, this warpgroup's share
                    cute.arch.mbarrier_wait(full + stage, phase)
                    warpgroup.fence()
                    for h in cutlass.range_constexpr(2):
                        if half == h:
                            for k in cutlass.range_constexpr(h * steps, (h + 1) * steps):
                                qk.set(warpgroup.Field.ACCUMULATE, k != h * steps)
                                cute.gemm(qk, s, a_k[None, None, k, stage], b_q[None, None, k], s)
                    warpgroup.commit_group()
                    info = sm_info[stage]
                    warpgroup.wait_group(0)

                    # ---- X: give the other warpgroup its rows, add what it gives
                    for i in cutlass.range_constexpr(per):
                        mine[i] = s[i] if half == 0 else s[i + per]
                        give[i] = s[i + per] if half == 0 else s[i]
                    for j in cutlass.range_constexpr(per // 4):
                        for i in cutlass.range_constexpr(4):
                            sm_x[1 - half, j, wtid, i] = give[j * 4 + i]
                    cute.arch.barrier(barrier_id=BAR_X, number_of_threads=256)
                    for j in cutlass.range_constexpr(per // 4):
                        for i in cutlass.range_constexpr(4):
                            mine[j * 4 + i] = (mine[j * 4 + i] + sm_x[half, j, wtid, i]) * scale_log2
                    if token + M > stop:
                        # keys beyond the end may hold NaN, and 0 * NaN is NaN in the weighted sum: zero them;
                        # behind X, because every warp must be done with these rows as keys
                        self.clear_tail(ring_base + stage * self.boxes * self.box_bytes, half, wtid, stop - token)
                    last_seen = stop if stop < shortest else shortest
                    if (token + M > last_seen) | (info != (1 << self.boxes) - 1):
                        for i in cutlass.range_constexpr(own):
                            limit = stop
                            if is_causal != 0:
                                row = half * (n // 2) + (i // 2) * 8 + pair + i % 2
                                limit = length - (s_q - 1 - row // group)
                                limit = limit if limit < stop else stop
                            for j in cutlass.range_constexpr(2):
                                key = key0 + 8 * j
                                seen = (info >> (key // BOX)) & 1
                                if (token + key >= limit) | (seen == 0):
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
                    for k in cutlass.range_constexpr(M // 16):
                        for m in cutlass.range_constexpr(4):
                            cute.gemm(pv, o[m], a_v[None, None, k, half * 4 + m, 0, stage], b_p[None, None, k], o[m])
                    warpgroup.commit_group()
                    warpgroup.wait_group(0)
                    with cute.arch.elect_one():
                        cute.arch.mbarrier_arrive(empty + stage)
                    stage += 1
                    if stage == self.stages:
                        stage = Int32(0)
                        phase = phase ^ 1

                self.finish(
                    o, top, total, sm_top, sm_factor, sm_last, out, lse, out_accum, lse_accum, sink, has_sink, request, head_kv,
                    first_slot + split + piece, pieces, rows, group, q_base, half, wwarp, lane, tid,
                )  # fmt: skip
                if const_expr(self.fused):
                    if pieces > 1:
                        if tid == 0:  # the barrier at the end of `finish` and this release make all stores visible
                            counter = counters[0, request * kv.shape[2] + head_kv, None].iterator
                            cute.arch.atomic_add(counter, Int32(1), sem="release", scope="gpu")
            begin = Int32(0)
            split = Int32(0)

        if const_expr(self.fused):
            for request in cutlass.range(begin_request, end_request + 1, unroll=1):
                begin, split = Int32(0), Int32(0)
                slot_, pieces_ = first_slot, pieces
                look_again = (request != begin_request) & (request != end_request)
                if request == begin_request:
                    begin, split = begin_at, begin_split
                    slot_, pieces_ = first_of_begin, pieces_of_begin
                if look_again:
                    slot_ = num_splits[request]
                    pieces_ = num_splits[request + 1] - slot_
                if pieces_ > 1:
                    count = self.pieces_here(request, end_request, begin, last_end, split, pieces_, chunk_blocks * unit)
                    which = request * kv.shape[2] + head_kv
                    left = Int32(0)
                    if tid == 0:
                        left = self.await_pieces(counters, which, pieces_, count)
                    cute.arch.barrier(barrier_id=BAR_Q, number_of_threads=256)
                    self.merge(
                        st, out, lse, out_accum, lse_accum, sink, has_sink, request, head_kv, slot_, pieces_, split,
                        count, rows, group, tid,
                    )  # fmt: skip
                    if (tid == 0) & (left + count == pieces_):  # the last to leave: ready for the next launch
                        counters[0, which, 0] = Int32(0)
                        counters[1, which, 0] = Int32(0)

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
    def await_pieces(self, counters: cute.Tensor, which: Int32, pieces: Int32, mine: Int32) -> Int32:
        """Wait until all pieces of a request are stored. Returns how many pieces' holders have left before."""
        arrived = counters[0, which, None].iterator
        seen = cute.arch.load(arrived, Int32, sem="acquire", scope="gpu")
        while seen < pieces:
            seen = cute.arch.load(arrived, Int32, sem="acquire", scope="gpu")
        return cute.arch.atomic_add(counters[1, which, None].iterator, mine, sem="relaxed", scope="gpu")

    @cute.jit
    def merge(
        self,
        st: cutlass.Constexpr,
        out: cute.Tensor,
        lse: cute.Tensor,
        out_accum: cute.Tensor,
        lse_accum: cute.Tensor,
        sink: cute.Tensor,
        has_sink: Int32,
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
        """This CTA's share of one request.

        A unit is what one warp stored with one instruction of `store_partial`: 512 bytes, 16 columns of 8 rows. Unit u
        belongs to the holder of piece u mod pieces. A team of 8, 4, 2 or 1 warps adds up a unit, so many that all of
        the CTA's units are done at once if they can be; each member takes every `team`-th piece.
        """
        n = self.n
        warp, lane = tid // 32, tid % 32
        # ring and Q are free after the last tile; MAX_PIECES of config.py keeps the weights inside the ring
        sm_weight = cute.make_tensor(
            cute.recast_ptr(st.ring.data_ptr(), dtype=Float32), cute.make_layout((n, 1024), stride=(1, n))
        )
        sm_sums = cute.make_tensor(
            cute.recast_ptr(st.q.data_ptr(), dtype=Float32), cute.make_layout((4, 32, 8), stride=(1, 4, 128))
        )
        units = 32 * ((rows + 7) // 8)
        team = Int32(1)  # warps
        turns = count
        if units <= 4 * pieces:
            team = Int32(8) if units <= pieces else Int32(4) if units <= 2 * pieces else Int32(2)
        else:
            turns = ((units + pieces - 1) // pieces * count + 7) // 8
        teams = 8 // team
        member = warp % team
        loads = cute.make_rmem_tensor(cute.make_layout((4, 8)), Float32)
        pair = cute.make_rmem_tensor(cute.make_layout(2), Float32)
        sums = cute.make_rmem_tensor(cute.make_layout(4), Float32)
        # the first partials are on their way while the weights are made
        unit = self.unit_of(warp // team, count, my_split, pieces)
        self.fetch(loads, out_accum, unit, units, head_kv, lane, first_slot, member, team, pieces)
        self.weigh(
            st, sm_weight, lse, lse_accum, sink, has_sink, request, head_kv, first_slot, pieces, my_split, rows, group,
            tid,
        )  # fmt: skip
        for turn in cutlass.range(turns, unroll=1):
            row = unit // 32 * 8 + (lane % 4) * 2
            sums.fill(0.0)
            for base in cutlass.range(0, pieces, 8 * team, unroll=1):
                if base > 0:
                    self.fetch(loads, out_accum, unit, units, head_kv, lane, first_slot, base + member, team, pieces)
                for u in cutlass.range_constexpr(8):
                    piece = base + member + u * team
                    if (piece < pieces) & (unit < units):
                        weights = cute.local_tile(sm_weight, (2, 1), (row // 2, piece))
                        cute.autovec_copy(weights[None, 0], pair)
                        sums[0] = sums[0] + loads[0, u] * pair[0]
                        sums[1] = sums[1] + loads[1, u] * pair[1]
                        sums[2] = sums[2] + loads[2, u] * pair[0]
                        sums[3] = sums[3] + loads[3, u] * pair[1]
            done = unit
            unit = self.unit_of((turn + 1) * teams + warp // team, count, my_split, pieces)
            if turn + 1 < turns:
                self.fetch(loads, out_accum, unit, units, head_kv, lane, first_slot, member, team, pieces)
            if team > 1:
                cute.autovec_copy(sums, sm_sums[None, lane, warp])
                cute.arch.barrier(barrier_id=BAR_P, number_of_threads=256)
                if member == 0:
                    for w in cutlass.range(warp + 1, warp + team, unroll=1):
                        for i in cutlass.range_constexpr(4):
                            sums[i] = sums[i] + sm_sums[i, lane, w]
                cute.arch.barrier(barrier_id=BAR_X, number_of_threads=256)
            if (done < units) & (member == 0):
                column = done % 32 * 16 + lane // 4
                for b in cutlass.range_constexpr(2):
                    if row + b < rows:
                        line = out[request, (row + b) // group, head_kv * group + (row + b) % group, None]
                        line[column] = sums[b].to(self.dtype)
                        line[column + 8] = sums[2 + b].to(self.dtype)

    @cute.jit
    def unit_of(self, index: Int32, count: Int32, my_split: Int32, pieces: Int32) -> Int32:
        """The index-th unit of a CTA that holds `count` pieces: those whose remainder by `pieces` is one of its own."""
        unit = my_split + index * pieces
        if count > 1:
            unit = my_split + index % count + (index // count) * pieces
        return unit

    @cute.jit
    def fetch(
        self,
        loads: cute.Tensor,
        out_accum: cute.Tensor,
        unit: Int32,
        units: Int32,
        head_kv: Int32,
        lane: Int32,
        first_slot: Int32,
        begin: Int32,
        step: Int32,
        pieces: Int32,
    ):
        """One unit's 16 bytes per lane of up to eight pieces."""
        block, eighth = unit // 32, unit % 32  # eight rows; 16 columns of 512
        place = (eighth // 4 * (self.n // 8) + block) * 4 + eighth % 4  # in units of 512 bytes, see store_partial
        data = cute.local_tile(out_accum, (1, 4), (None, (head_kv * self.n * 4 + place) * 32 + lane))
        for u in cutlass.range_constexpr(8):
            piece = begin + u * step
            if (piece < pieces) & (unit < units):
                cute.autovec_copy(data[0, None, first_slot + piece], loads[None, u])

    @cute.jit
    def weigh(
        self,
        st: cutlass.Constexpr,
        sm_weight: cute.Tensor,
        lse: cute.Tensor,
        lse_accum: cute.Tensor,
        sink: cute.Tensor,
        has_sink: Int32,
        request: Int32,
        head_kv: Int32,
        first_slot: Int32,
        pieces: Int32,
        my_split: Int32,
        rows: Int32,
        group: Int32,
        tid: Int32,
    ):
        """Weights of all pieces and rows into shared memory; by the way, each row's lse.

        A thread looks after one row and every `lanes`-th piece.
        """
        n, lanes = self.n, 256 // self.n
        row, member = tid % n, tid // n
        sm_part = cute.make_tensor(
            cute.recast_ptr(st.q.data_ptr() + 4096, dtype=Float32),
            cute.make_layout((2, n, lanes), stride=(1, 2, 2 * n)),
        )
        stats = cute.local_tile(lse_accum, (1, 2), (None, head_kv * n + row))
        pairs = cute.make_rmem_tensor(cute.make_layout((2, 4)), Float32)
        top, total = -Float32.inf, Float32(0.0)
        for base in cutlass.range(member, pieces, 4 * lanes, unroll=1):
            for u in cutlass.range_constexpr(4):
                if base + u * lanes < pieces:
                    cute.autovec_copy(stats[0, None, first_slot + base + u * lanes], pairs[None, u])
            for u in cutlass.range_constexpr(4):
                if base + u * lanes < pieces:
                    top, total = self.join(top, total, pairs[0, u], pairs[1, u])
        sm_part[0, row, member] = top
        sm_part[1, row, member] = total
        cute.arch.barrier(barrier_id=BAR_P, number_of_threads=256)
        top, total = -Float32.inf, Float32(0.0)
        for w in cutlass.range_constexpr(lanes):
            top = cute.arch.fmax(top, sm_part[0, row, w])
        shift = top if top > -Float32.inf else Float32(0.0)
        for w in cutlass.range_constexpr(lanes):
            total += sm_part[1, row, w] * cute.math.exp2(sm_part[0, row, w] - shift, fastmath=True)
        head = head_kv * group + row % group if row < rows else Int32(0)
        scale, lse2 = self.closing(top, total, sink, head, has_sink)
        if (member == 0) & (row < rows) & (my_split == 0):
            lse[request, head, row // group] = lse2 * LN_2
        for base in cutlass.range(member, pieces, 4 * lanes, unroll=1):
            for u in cutlass.range_constexpr(4):
                piece = base + u * lanes
                if piece < pieces:
                    if pieces > 4 * lanes:  # else still in registers
                        pairs[0, u] = stats[0, 0, first_slot + piece]
                    sm_weight[row, piece] = cute.math.exp2(pairs[0, u] - shift, fastmath=True) * scale
        cute.arch.barrier(barrier_id=BAR_X, number_of_threads=256)

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
    def closing(self, top: Float32, total: Float32, sink: cute.Tensor, head: Int32, has_sink: Int32):
        """Factor of a row's sums, and its base-2 lse."""
        scale = Float32(0.0)
        lse2 = -Float32.inf
        if total > 0.0:
            scale = cute.arch.rcp_approx(total)
            lse2 = top + cute.math.log2(total, fastmath=True)
            if has_sink != 0:
                kept = Float32(1.0) + cute.math.exp2(sink[head] * LOG2_E - lse2, fastmath=True)
                scale = scale * cute.arch.rcp_approx(kept)
        return scale, lse2

    @cute.jit
    def clear_tail(self, base: Int32, half: Int32, wtid: Int32, valid: Int32):
        """Zero the rows behind the last key in this warpgroup's four latent slices; whole lines, so swizzle is moot."""
        keep = valid if valid > 0 else Int32(0)
        zero = Int32(0)
        for item in cutlass.range(keep * 32 + wtid, M * 32, 128, unroll=1):
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
        stage_base: Int32,
        half: Int32,
        wwarp: Int32,
        lane: Int32,
        tid: Int32,
    ):
        """Store one piece: final rows where the request has one piece, else a partial in fp32."""
        n, own = self.n, self.n // 8
        pair = (lane % 4) * 2
        if const_expr(self.fused):
            if pieces > 1:
                self.store_partial(o, out_accum, slot, head_kv, half, tid)
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
            token, head = tid // group, head_kv * group + tid % group
            scale = Float32(0.0)
            if pieces > 1:
                if const_expr(self.fused):
                    lse_accum[slot, (head_kv * n + tid) * 2] = sm_last[tid]
                    lse_accum[slot, (head_kv * n + tid) * 2 + 1] = x
                elif tid < rows:
                    scale, lse2 = self.closing(sm_last[tid], x, sink, Int32(0), Int32(0))
                    lse_accum[slot, head_kv * rows + tid] = lse2
            elif tid < rows:
                scale, lse2 = self.closing(sm_last[tid], x, sink, head, has_sink)
                lse[request, head, token] = lse2 * LN_2
            sm_factor[tid] = scale
        cute.arch.barrier(barrier_id=BAR_X, number_of_threads=256)
        if pieces == 1:
            self.store_rows(o, sm_factor, out, request, head_kv, rows, group, stage_base, half, wwarp, lane, tid)
        elif const_expr(not self.fused):
            column = half * 256 + wwarp * 16 + lane // 4
            for g in cutlass.range_constexpr(n // 8):
                for b in cutlass.range_constexpr(2):
                    row = g * 8 + pair + b
                    scale = sm_factor[row]
                    if row < rows:
                        part = cute.local_tile(out_accum, (1, D_V), (slot, head_kv * rows + row))
                        for m in cutlass.range_constexpr(4):
                            part[0, column + m * 64] = o[m][g * 4 + b] * scale
                            part[0, column + m * 64 + 8] = o[m][g * 4 + 2 + b] * scale

    @cute.jit
    def store_rows(
        self,
        o: cutlass.Constexpr,
        sm_factor: cute.Tensor,
        out: cute.Tensor,
        request: Int32,
        head_kv: Int32,
        rows: Int32,
        group: Int32,
        stage_base: Int32,
        half: Int32,
        wwarp: Int32,
        lane: Int32,
        tid: Int32,
    ):
        """Final rows: rounded, transposed by stmatrix into Q's place, then 512 bytes per warp and store."""
        n, pair = self.n, (lane % 4) * 2
        packed = cute.make_rmem_tensor(cute.make_layout(4), self.dtype)
        values = cute.make_rmem_tensor(cute.make_layout(4), Float32)
        words = cute.recast_tensor(packed, Int32)
        for g in cutlass.range_constexpr(n // 8):
            f0, f1 = sm_factor[g * 8 + pair], sm_factor[g * 8 + pair + 1]
            row = g * 8 + lane % 8
            for m in cutlass.range_constexpr(4):
                values[0], values[1] = o[m][g * 4] * f0, o[m][g * 4 + 1] * f1
                values[2], values[3] = o[m][g * 4 + 2] * f0, o[m][g * 4 + 3] * f1
                packed.store(values.load().to(self.dtype))
                chunk = (half * 4 + m) * 8 + wwarp * 2 + (lane // 8) % 2  # eight columns
                cute.arch.inline_ptx(
                    "stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [{$r0}], {{$r1}, {$r2}};",
                    read_only_args=[stage_base + row * (D_V * 2) + (chunk ^ (lane % 8)) * 16, words[0], words[1]],
                )
        cute.arch.barrier(barrier_id=BAR_P, number_of_threads=256)
        for i in cutlass.range_constexpr(n // 8):
            row = tid // 32 + i * 8
            if row < rows:
                line = out[request, row // group, head_kv * group + row % group, None].iterator
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
        cute.arch.barrier(barrier_id=BAR_X, number_of_threads=256)  # Q may come back to its place

    @cute.jit
    def store_partial(
        self,
        o: cutlass.Constexpr,
        out_accum: cute.Tensor,
        slot: Int32,
        head_kv: Int32,
        half: Int32,
        tid: Int32,
    ):
        """The accumulators as they lie, before division: 16 bytes per thread, 512 in a row per warp.

        Rows of 512 columns would scatter each store of a warp over four rows; that took four times the store cycles.
        """
        for m in cutlass.range_constexpr(4):
            for g in cutlass.range_constexpr(self.n // 8):
                place = ((half * 4 + m) * (self.n // 8) + g) * 128 + tid % 128
                four = cute.local_tile(out_accum, (1, 4), (slot, head_kv * self.n * 128 + place))
                values = cute.make_rmem_tensor(cute.make_layout((1, 4)), Float32)
                for i in cutlass.range_constexpr(4):
                    values[i] = o[m][g * 4 + i]
                cute.autovec_copy(values, four)


def fake_arguments(dtype: Any, d_qk: int = 576, fused: bool = True) -> list[Any]:
    """Arguments for `toolchain.compile_kernel(DecodeDenseSmall(...), ...)`: every extent and stride left open."""
    from cutlass.cute.runtime import make_fake_tensor

    from openmla.backends.cute.toolchain import fake_stream, fake_tensor

    sym, div = cute.sym_int, [cute.sym_int64(divisibility=8) for _ in range(6)]  # rows start at 16-byte multiples
    accum_step = [cute.sym_int64(divisibility=4), cute.sym_int64(divisibility=4 if fused else 1)]
    out_step = [cute.sym_int64(divisibility=8) for _ in range(3)]
    q = make_fake_tensor(dtype, (sym(), sym(), sym(), d_qk), stride=(*div[:3], 1), assumed_align=16)
    kv = make_fake_tensor(dtype, (sym(), sym(), sym(), d_qk), stride=(*div[3:], 1), assumed_align=16)
    return [
        q,
        kv,
        fake_tensor(Int32, (None, None), stride=(None, 1), align=4),
        fake_tensor(Int32, (None,), align=4),
        fake_tensor(Int32, (None, 8), align=16),
        fake_tensor(Int32, (None,), align=4),
        make_fake_tensor(dtype, (sym(), sym(), sym(), D_V), stride=(*out_step, 1), assumed_align=16),
        fake_tensor(Float32, (None, None, None), stride=(None, None, None), align=4),
        make_fake_tensor(Float32, (sym(), sym()), stride=(accum_step[0], 1), assumed_align=16),
        make_fake_tensor(Float32, (sym(), sym()), stride=(accum_step[1], 1), assumed_align=16),
        fake_tensor(Float32, (None,), align=4),
        make_fake_tensor(Int32, (2, sym(), 1), stride=(cute.sym_int64(), 1, 1), assumed_align=4),
        fake_tensor(Int32, (1,), align=4),
        Float32(1.0), Int32(0), Int32(64), Int32(0), Int32(0),
        fake_stream(),
    ]  # fmt: skip
