"""Dense MLA decode for few rows (s_q * heads per KV head <= 32): device code.

Operands are swapped, so that the few rows lie on the N side of wgmma and nothing is padded to 64:
    S^T [64 keys, N]      = K [64, 576] Q^T          A = K, K-major; B = Q, K-major
    O^T [512, N]         += V^T [512, 64] P^T        A = V^T, the same bytes seen MN-major; B = P, K-major

One producer warp keeps two tiles of 64 keys in flight and runs ahead into the next request. A tile arrives as eight
boxes of eight whole rows, 9,216 contiguous bytes each (boxes of 64 columns gave 5 % less of the memory's rate); from pages
that hold no multiple of eight tokens, row by row. Two consumer warpgroups share each tile: warpgroup w sums its half of
every slice's columns, exchanges partial scores with the other, does the softmax of the query rows [w N/2, w N/2 + N/2) and
accumulates the rows [256 w, 256 w + 256) of O^T.

A request in several pieces is merged by the CTAs that hold them, each a share of the rows and columns, in split order.
Partials pass through an exchange in global memory without flags, fences or counters: every 16 bytes say by their first
word whether they are there (UNWRITTEN is a NaN that arithmetic never yields), whoever needs them polls them, and the one
reader of each marks it unwritten again. The launch is cooperative, so waiting for the others is safe.

Barriers per tile: X (both warpgroups: partial S^T exchanged), M (one warpgroup: maxima of its four warps), P (both:
P and rescale factors stored). A second write to any of these buffers lies behind at least one of them.

Byte caches (`codes.py`) have loads, products and weights of their own, and more warps: with 16 rows two CTAs share an SM,
with 32 four warpgroups share a tile.

Budget at N = 16: two tiles 147,456 + Q 18,432 + P 2,048 + X 4,096 bytes; 288 threads; no spills.
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

M = 64  # of one wgmma: keys of a score, columns of a value
BOX = 8  # rows of one bulk load; a page holds a multiple of it
SLICE = 64  # columns of one swizzled line
D_V = 512

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
EVICT_FIRST = 0x12F0000000000000

BAR_X, BAR_P, BAR_Q, BAR_M = 1, 2, 3, 4  # named barriers; BAR_M + w belongs to warpgroup w

UNWRITTEN = -1  # first word of a partial's 16 bytes between launches; as a float a NaN that no arithmetic yields
MINUS_INFINITY = -0x800000  # the bits of fp32 -inf
NO_WINDOW = 1 << 30  # every query sees every key before its own end
MAX_POLLS = 1 << 24  # some ten seconds, should a partial never come: wrong numbers, not a hang

PAGE_OUT_OF_RANGE = 1
LENGTH_NEGATIVE = 2
LENGTH_OVER_CAPACITY = 4


class DecodeDenseSmall(Codes):
    """One compiled variant.

    Args:
        dtype: cutlass.BFloat16 or cutlass.Float16.
        rows: N, 16 or 32; query rows per KV head, padded.
        d_qk: 576 or 512.
        stages: tiles in the ring.
        row_bytes: of a token of a byte cache (see `codes`); 0 where KV has q's dtype.
        warpgroups: that share a tile; each takes rows / warpgroups query rows, at least 8.
        ctas_per_sm: that registers and shared memory must leave room for.
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
    ) -> None:
        self.dtype, self.n, self.d_qk, self.stages, self.row_bytes = dtype, rows, d_qk, stages, row_bytes
        self.has_codes = row_bytes > 0
        self.warpgroups, self.consumers, self.ctas_per_sm = warpgroups, 128 * warpgroups, ctas_per_sm
        self.p_dtype = Float16 if self.has_codes else dtype
        self.boxes = M // BOX
        self.piece_bytes = rows * 2304
        self.slices = d_qk // SLICE
        self.box_bytes = BOX * d_qk * 2

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,  # [batch, s_q, h_q, d_qk]; with cu_seqlens_q [1, total_q, h_q, d_qk]
        kv: cute.Tensor,  # [num_pages, page_size, h_kv, d_qk]; a byte cache: uint8 [..., row_bytes]
        table: cute.Tensor,  # int32 [batch, max_pages]
        lengths: cute.Tensor,  # int32 [batch]
        metadata: cute.Tensor,  # int32 [num_parts, 8]
        num_splits: cute.Tensor,  # int32 [batch + 1]
        out: cute.Tensor,  # [batch, s_q, h_q, 512], or [1, total_q, h_q, 512]
        lse: cute.Tensor,  # fp32 [batch, h_q, s_q], or [1, h_q, total_q]
        exchange: cute.Tensor,  # int32 [h_kv, slots, N * 576]: partials; UNWRITTEN before the first launch and after each
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
        x_size = M * self.n * (self.warpgroups - 1)
        k_major, mn_major = OperandMajorMode.K, OperandMajorMode.MN
        if const_expr(self.has_codes):  # products of single warps, bulk copies without descriptors
            qk, pv, tma, tma_kv = None, None, None, None
        else:
            qk = sm90.make_trivial_tiled_mma(self.dtype, self.dtype, k_major, k_major, Float32, (1, 1, 1), (64, self.n))
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
            empty: cute.struct.MemRange[Int64, self.stages]
            info: cute.struct.MemRange[Int32, self.stages * 2]
            top: cute.struct.Align[cute.struct.MemRange[Float32, self.n * 4], 16]
            factor: cute.struct.Align[cute.struct.MemRange[Float32, self.n], 16]
            last: cute.struct.Align[cute.struct.MemRange[Float32, self.n], 16]
            unit: cute.struct.Align[cute.struct.MemRange[Float32, self.n if self.has_codes else 0], 16]
            ring: cute.struct.Align[cute.struct.MemRange[ring_type, ring_size], 1024]
            q: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(q_layout)], 1024]
            p: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(p_layout)], 1024]
            x: cute.struct.Align[cute.struct.MemRange[Float32, x_size], 16]

        self.Storage = Storage
        self.smem_bytes = Storage.size_in_bytes()
        self.kernel(
            tma, tma_kv, q, kv, table, lengths, metadata, num_splits, out, lse, exchange, sink, cu_seqlens_q, faults,
            scale_log2, is_causal, window, max_s_q, unit, chunk_blocks, has_sink, qk, pv, ring_layout, q_layout, p_layout,
        ).launch(
            grid=[metadata.shape[1], kv.shape[2], 1],
            block=[self.consumers + 32, 1, 1],
            min_blocks_per_mp=self.ctas_per_sm,
            preferred_smem_carveout=100 if const_expr(self.ctas_per_sm > 1) else None,
            stream=stream,
            cooperative=True,
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
                    cute.arch.mbarrier_init(full + i, 1 if is_boxed else 32)
                    cute.arch.mbarrier_init(empty + i, 4 * self.warpgroups)
            if const_expr(not self.has_codes):
                cpasync.prefetch_descriptor(tma)
        if warp == 1:
            self.prefetch(table, lengths, metadata.shape[1], part)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()

        if warp == 4 * self.warpgroups:
            if const_expr(self.has_codes):
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
                part, head_kv, warp,
            )  # fmt: skip

    @cute.jit
    def prefetch(self, table: cute.Tensor, lengths: cute.Tensor, parts: Int32, part: Int32):
        """Page ids and lengths towards L2 while the plan is on its way: every CTA asks for other lines."""
        line = (part + parts * cute.arch.lane_idx()) * 128
        size = (Int64(table.shape[0] - 1) * table.stride[0] + table.shape[1]) * 4
        if line < size:
            address = table.iterator.toint() + line
            cute.arch.inline_ptx("prefetch.global.L2 [{$r0}];", read_only_args=[address])
        if line < lengths.shape[0] * 4:
            address = lengths.iterator.toint() + line
            cute.arch.inline_ptx("prefetch.global.L2 [{$r0}];", read_only_args=[address])

    @cute.jit
    def clamped(self, length: Int32, table: cute.Tensor, kv: cute.Tensor) -> Int32:
        """Attendable tokens of a request: not negative, and not more than the block table can address."""
        capacity = table.shape[1] * kv.shape[1]
        length = length if length > 0 else Int32(0)
        return length if length < capacity else Int32(capacity)

    @cute.jit
    def unseen(self, length: Int32, window: Int32, s_q: Int32, max_s_q: Int32) -> Int32:
        """Tokens before the window of every query of a request, in whole tiles; the plan counts from there."""
        unseen = Int32(0)
        if window < NO_WINDOW:  # a branch, so that nothing else waits for the length
            queries = s_q if max_s_q == 0 else max_s_q
            tokens = length - (window + queries - 1)
            unseen = tokens // M * M if tokens > 0 else Int32(0)
        return unseen

    @cute.jit
    def bad_length(self, raw: Int32, length: Int32) -> Int32:
        """Fault bits of a length."""
        bad = Int32(LENGTH_NEGATIVE) if raw < 0 else Int32(0)
        return bad | LENGTH_OVER_CAPACITY if raw > length else bad

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
        s_q: Int32,
        window: Int32,
        max_s_q: Int32,
        unit: Int32,
        part: Int32,
        head_kv: Int32,
        full: cutlass.Constexpr,
        empty: cutlass.Constexpr,
        sm_info: cute.Tensor,
        sm_ring: cute.Tensor,
    ):
        """The loading warp: every box of every tile of every piece of this part, in ring order.

        A page id out of range becomes a coordinate outside the tensor: the copy engine fills in zeros, and the tile's
        description tells the consumers which keys to mask.
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
        stage = Int32(0)
        phase = Int32(1)  # the first lap finds every stage free
        bad = Int32(0)
        number = Int32(0)
        while number < metadata.shape[0]:
            begin_request, end_request, begin, last_end, _ = self.range_of(metadata, number, part)
            begin, last_end = begin * unit, last_end * unit  # tokens
            number = number + 1 if begin_request <= end_request else Int32(metadata.shape[0])
            for request in cutlass.range(begin_request, end_request + 1, unroll=1):
                raw = lengths[request]
                box = begin // BOX + lane
                entry = self.page_of(box, boxes_per_page, table, request)  # on its way beside the length
                length = self.clamped(raw, table, kv)
                unseen = self.unseen(length, window, s_q, max_s_q)
                bad = bad | self.bad_length(raw, length)
                end = length
                if request == end_request:
                    end = unseen + last_end if unseen + last_end < length else length
                if unseen > 0:
                    begin += unseen
                    box += unseen // BOX
                    entry = self.page_of(box, boxes_per_page, table, request)
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
                        entry = self.page_of(box, boxes_per_page, table, request)  # of the next four tiles
                    seen = Int32(cute.arch.vote_ballot_sync(pages >= 0)) >> (place * self.boxes)
                    _, row = self.locate(token // BOX, boxes_per_page)
                    boxes = (end - token + BOX - 1) // BOX
                    boxes = boxes if boxes < self.boxes else Int32(self.boxes)
                    cute.arch.mbarrier_wait(empty + stage, phase)
                    with cute.arch.elect_one():
                        sm_info[0, stage] = self.bytes_of(seen)
                        sm_info[1, stage] = self.bytes_of(seen >> 4)
                        cute.arch.mbarrier_arrive_and_expect_tx(full + stage, boxes * self.box_bytes)
                    for i in cutlass.range(boxes, unroll=1):
                        page = cute.arch.shuffle_sync(pages, place * self.boxes + i)
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
    def range_of(self, metadata: cute.Tensor, number: Int32, part: Int32):
        """(first request, last request, first block, end block in the last request, first split) of a range of a part."""
        row = metadata[number, part, None]
        return row[0], row[1], row[2], row[3], row[4]

    @cute.jit
    def bytes_of(self, bits: Int32) -> Int32:
        """Four bits, each repeated eight times: boxes to keys."""
        return ((bits & 15) * 0x00204081 & 0x01010101) * 255

    @cute.jit
    def page_of(self, box: Int32, boxes_per_page: Int32, table: cute.Tensor, request: Int32) -> Int32:
        """Page of a box of rows; -1 beyond the block table."""
        column, _ = self.locate(box, boxes_per_page)
        entry = Int32(-1)
        if column < table.shape[1]:
            entry = table[request, column]
        return entry

    @cute.jit
    def locate(self, box: Int32, boxes_per_page: Int32):
        """Page column and place within the page of a box of rows. Pages of 64 spare the division."""
        column, place = box // 8, box % 8
        if boxes_per_page != 8:
            column = box // boxes_per_page
            place = box - column * boxes_per_page
        return column, place

    @cute.jit
    def produce_rows(
        self,
        kv: cute.Tensor,
        table: cute.Tensor,
        lengths: cute.Tensor,
        metadata: cute.Tensor,
        faults: cute.Tensor,
        s_q: Int32,
        window: Int32,
        max_s_q: Int32,
        unit: Int32,
        part: Int32,
        head_kv: Int32,
        full: cutlass.Constexpr,
        empty: cutlass.Constexpr,
        sm_info: cute.Tensor,
        ring_base: Int32,
    ):
        """The loading warp for pages that hold no multiple of eight tokens: row by row, 16 bytes per lane.

        A box of the copy engine is eight rows, and its smaller boxes would leave no gaps for the other rows of a
        swizzled group. Rows of a page id out of range become zeros.
        """
        lane = cute.arch.lane_idx()
        page_size = kv.shape[1]
        stage = Int32(0)
        phase = Int32(1)
        bad = Int32(0)
        pages = cute.make_rmem_tensor(cute.make_layout(2), Int32)  # with codes, of the next tile
        pages.fill(0)
        rows = cute.make_rmem_tensor(cute.make_layout(2), Int64)  # addresses of rows lane and lane + 32 of a tile
        number = Int32(0)
        while number < metadata.shape[0]:
            begin_request, end_request, begin, last_end, _ = self.range_of(metadata, number, part)
            begin, last_end = begin * unit, last_end * unit  # tokens
            number = number + 1 if begin_request <= end_request else Int32(metadata.shape[0])
            for request in cutlass.range(begin_request, end_request + 1, unroll=1):
                raw = lengths[request]
                length = self.clamped(raw, table, kv)
                unseen = self.unseen(length, window, s_q, max_s_q)
                bad = bad | self.bad_length(raw, length)
                begin += unseen
                end = length
                if request == end_request:
                    end = unseen + last_end if unseen + last_end < length else length
                if const_expr(self.has_codes):
                    self.look_up(pages, table, page_size, request, begin, end)
                for token in cutlass.range(begin, end, M, unroll=1):
                    if const_expr(self.has_codes):
                        bad = bad | self.fetch_rows(
                            kv,
                            table,
                            request,
                            token,
                            end,
                            head_kv,
                            full,
                            empty,
                            stage,
                            phase,
                            sm_info,
                            ring_base,
                            pages,
                        )
                    else:
                        cute.arch.mbarrier_wait(empty + stage, phase)
                        for half in cutlass.range_constexpr(2):
                            position = token + lane + half * 32
                            column = position // page_size
                            page = Int32(-1)
                            if position < end:
                                page = table[request, column]
                                if (page < 0) | (page >= kv.shape[0]):
                                    page = Int32(-1)
                                    bad = bad | PAGE_OUT_OF_RANGE
                            seen = Int32(cute.arch.vote_ballot_sync(page >= 0))
                            if lane == 0:
                                sm_info[half, stage] = seen
                            line = kv[page if page >= 0 else Int32(0), position - column * page_size, head_kv, None]
                            rows[half] = line.iterator.toint() + (0 if page >= 0 else 1)
                        for half in cutlass.range_constexpr(2):
                            for i in cutlass.range(0, 32, 4, unroll=1):
                                group = (
                                    ring_base
                                    + stage * (M * self.d_qk * 2)
                                    + (half * 4 + i // 8) * self.box_bytes
                                    + i % 8 * 128
                                )
                                for j in cutlass.range_constexpr(4):
                                    source = cute.arch.shuffle_sync(rows[half], i + j)
                                    swizzled = group + j * 128 + ((lane ^ (i + j)) % 8) * 16 + lane // 8 * 1024
                                    self.copy_16(swizzled, source, lane * 16)
                                    self.copy_16(swizzled + 4096, source, lane * 16 + 512)
                                if const_expr(self.d_qk > D_V):
                                    source = cute.arch.shuffle_sync(rows[half], i + lane // 8)
                                    swizzled = group + 8192 + lane // 8 * 128 + ((lane ^ (i + lane // 8)) % 8) * 16
                                    self.copy_16(swizzled, source, lane % 8 * 16 + 1024)
                        cute.arch.cp_async_commit_group()
                        cute.arch.cp_async_wait_group(0)
                        cute.arch.fence_view_async_shared()
                        cute.arch.mbarrier_arrive(full + stage)
                    stage += 1
                    if stage == self.stages:
                        stage = Int32(0)
                        phase = phase ^ 1
                begin = Int32(0)
        if bad != 0:
            cute.arch.atomic_or(faults.iterator, bad, sem="relaxed", scope="gpu")

    @cute.jit
    def copy_16(self, target: Int32, source: Int64, offset: Int32):
        """16 bytes of a row into shared memory; zeros if the lowest bit of its address is set."""
        cute.arch.inline_ptx(
            "cp.async.cg.shared.global [{$r0}], [{$r1}], 16, {$r2};",
            read_only_args=[target, (source & -2) + offset, 16 - Int32(source & 1) * 16],
        )

    @cute.jit
    def split_row(self, row: Int32, head_kv: Int32, group: Int32, per_group: Int32):
        """Query token of a request and head of a row."""
        token = row * per_group >> 16
        return token, head_kv * group + row - token * group

    @cute.jit
    def load_q(
        self,
        q: cute.Tensor,
        where: Int32,
        first_query: Int32,
        head_kv: Int32,
        group: Int32,
        per_group: Int32,
        rows: Int32,
        q_base: Int32,
        tid: Int32,
    ):
        """Query rows of one request into shared memory, in the 128-byte swizzle; absent rows become zeros."""
        warp, lane = tid // 32, tid % 32
        chunks = self.d_qk // 8
        for i in cutlass.range_constexpr(self.n // 8):
            row = warp + i * 8
            size = Int32(16) if row < rows else Int32(0)
            token, head = self.split_row(row if row < rows else Int32(0), head_kv, group, per_group)
            line = q[where, first_query + token, head, None].iterator
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
        sm_x = st.x.get_tensor(
            cute.make_layout((givers + 1, givers, per // 4, 128, 4), stride=(givers * per * 128, per * 128, 512, 4, 1))
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
            s = qk.make_fragment_C(qk.partition_shape_C((64, n)))
            o = [pv.make_fragment_C(pv.partition_shape_C((64, n))) for _ in range(8 // self.warpgroups)]
        held = Int32(0)  # see codes.follow_scales
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
        after, after_end, after_begin, after_last, after_split = self.range_of(metadata, Int32(0), part)
        while number < ranges:
            found, found_end = after, after_end
            found_begin, found_last, found_split = after_begin, after_last, after_split
            number += 1
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
                        for token in cutlass.range(start, stop, M, unroll=1):
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
                                for k in cutlass.range_constexpr(steps * self.slices):
                                    at = (wg * steps + k % steps, k // steps)
                                    qk.set(warpgroup.Field.ACCUMULATE, k != 0)
                                    cute.gemm(qk, s, a_k[None, None, at, stage], b_q[None, None, at], s)
                                warpgroup.commit_group()
                                seen_keys = sm_info[0, stage], sm_info[1, stage]
                                warpgroup.wait_group(0)

                            # ---- X: give the other warpgroup its rows, add what it gives
                            for w in cutlass.range_constexpr(self.warpgroups):
                                if w == wg:
                                    for i in cutlass.range_constexpr(per):
                                        mine[i] = s[w * per + i]
                                else:
                                    giver = wg if wg < w else wg - 1
                                    for i in cutlass.range_constexpr(per):
                                        sm_x[w, giver, i // 4, wtid, i % 4] = s[w * per + i]
                            cute.arch.barrier(barrier_id=BAR_X, number_of_threads=self.consumers)
                            for i in cutlass.range_constexpr(per):
                                x = mine[i]
                                for giver in cutlass.range_constexpr(self.warpgroups - 1):
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
                            if is_partial | (seen_keys[0] != -1) | (seen_keys[1] != -1):
                                mask = (seen_keys[0] if wwarp < 2 else seen_keys[1]) >> (
                                    key0 % 32
                                )  # keys key0 and key0 + 8
                                for i in cutlass.range_constexpr(own):
                                    limit = length
                                    if is_causal != 0:
                                        row = wg * (n // self.warpgroups) + (i // 2) * 8 + pair + i % 2
                                        limit = length - (s_q - 1 - (row * per_group >> 16))
                                    first_seen = limit - window
                                    limit = limit if limit < stop else stop
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
                                warpgroup.commit_group()
                            if token + M >= stop:
                                self.publish(top, total, sm_top, sm_last, target, pieces, rows, wg, wwarp, lane, tid)
                            if const_expr(not self.has_codes):
                                warpgroup.wait_group(0)
                            with cute.arch.elect_one():
                                cute.arch.mbarrier_arrive(empty + stage)
                            stage += 1
                            if stage == self.stages:
                                stage = Int32(0)
                                phase = phase ^ 1

                        if start >= stop:
                            cute.arch.barrier(
                                barrier_id=BAR_Q, number_of_threads=self.consumers
                            )  # sums of the piece before are read
                            self.publish(top, total, sm_top, sm_last, target, pieces, rows, wg, wwarp, lane, tid)
                        if const_expr(self.has_codes):
                            self.rescale(o, held, Int32(0), -141, wg)
                        if pieces > 1:
                            self.store_partial(
                                o, target + (wg * (n // self.warpgroups) * 2048 + wwarp * 512 + lane * 16), rows
                            )
                        else:
                            self.finish(
                                o, sm_top, sm_factor, sm_last, out, lse, sink, has_sink, where, first_query, head_kv, rows, group,
                                per_group, q_base, wg, wwarp, lane, tid,
                            )  # fmt: skip
                    begin = Int32(0)
                    split = Int32(0)

        number = used if warp < 8 else Int32(0)  # eight warps merge
        while number > 0:
            number -= 1
            if number + 1 < used:
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
                if pieces > 1:
                    self.merge(
                        st, out, lse, exchange[head_kv, first_slot, None].iterator.toint(), sink, has_sink, where, first_query,
                        head_kv, pieces, begin_unit, end_unit, log_team, rows, group, per_group,
                    )  # fmt: skip
        if max_s_q > 0:
            if (part == 0) & (warp < 8):
                self.clear_outside(out, lse, cu_seqlens_q, head_kv, group, tid)

    @cute.jit
    def queries(self, cu_seqlens_q: cute.Tensor, q: cute.Tensor, request: Int32, max_s_q: Int32):
        """(first index, second index of the first, number) of a request's query tokens in q, out and lse."""
        where, first, count = request, Int32(0), Int32(q.shape[1])
        if max_s_q > 0:
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

        A unit is what one warp stores with one instruction of `store_partial`: 512 bytes, 16 columns of 8 rows. The
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
        """This CTA's share of one request, whose pieces lie `piece_bytes` apart from `place` on.

        Each member of a team takes every `team`-th group of eight pieces: first their statistics, which were stored
        before the last weighted sum was done, so that the weights are ready when the data come; then the data. One
        warp adds up the team's sums, in order, through shared memory.
        """
        n = self.n
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
        loaded = cute.make_rmem_tensor(cute.make_layout((4, 8)), Int32)
        values = cute.recast_tensor(loaded, Float32)
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
                self.await_data(loaded, data + begin * self.piece_bytes, many - begin, lane)
                for u in cutlass.range_constexpr(8):  # the weights of piece u are lane 4 u + lane % 4's
                    weight = [cute.arch.shuffle_sync(weights[r], u * 4, mask_and_clamp=0x31F) for r in range(2)]
                    for i in cutlass.range_constexpr(4):
                        sums[i] = sums[i] + values[i, u] * weight[i % 2]
                self.forget(data + begin * self.piece_bytes, stats + begin * self.piece_bytes, many - begin, lane)
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
    def await_data(self, loaded: cute.Tensor, address: Int64, count: Int32, lane: Int32):
        """A unit's 16 bytes per lane of eight pieces, as soon as all are there."""
        if const_expr(self.has_codes):
            self.probe(address, count, lane)
        for u in cutlass.range_constexpr(8):
            loaded[0, u] = Int32(UNWRITTEN) if u < count else Int32(0)
            loaded[1, u], loaded[2, u], loaded[3, u] = Int32(0), Int32(0), Int32(0)
        for u in cutlass.range_constexpr(8):
            self.look(loaded[None, u], u * self.piece_bytes, address + lane * 16)
        polls = Int32(MAX_POLLS)
        while polls > 0:
            is_missing = cutlass.Boolean(False)
            for u in cutlass.range_constexpr(8):
                is_missing = is_missing | (loaded[0, u] == UNWRITTEN)
            polls -= 1
            if cute.arch.vote_any_sync(is_missing):
                for u in cutlass.range_constexpr(8):
                    self.look(loaded[None, u], u * self.piece_bytes, address + lane * 16)
            else:
                polls = Int32(0)

    @cute.jit
    def probe(self, address: Int64, count: Int32, lane: Int32):
        """Wait for four words of each piece, and only then ask for all 36 KB.

        bf16 and fp16 go without it and are 0.2 to 0.6 us faster at batch 1; that has not been tried here.
        """
        polls = Int32(MAX_POLLS)
        word = Int32(UNWRITTEN) if lane >> 2 < count else Int32(0)
        place = address + ((lane >> 2) * self.piece_bytes + (lane & 3) * 128)
        while polls > 0:
            if word == UNWRITTEN:
                word = cute.arch.inline_ptx(
                    "ld.relaxed.gpu.global.b32 {$w0}, [{$r0}];", write_only_types=[Int32], read_only_args=[place]
                )
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
    def forget(self, data: Int64, stats: Int64, count: Int32, lane: Int32):
        """Mark what was read as unwritten, for the next launch."""
        mine = data + lane * 16
        for u in cutlass.range_constexpr(8):
            if u < count:
                self.unwrite(mine, u * self.piece_bytes)
        if lane >> 2 < count:
            self.unwrite(stats, 0)

    @cute.jit
    def unwrite(self, address: Int64, offset: cutlass.Constexpr):
        """The first word of 16 bytes of global memory."""
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
        if pieces > 1:
            stats = target + (n * 2048 + tid * 16)
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
    ):
        """Final rows of a request in one piece."""
        cute.arch.barrier(barrier_id=BAR_P, number_of_threads=self.consumers)  # sm_factor of the last tile is read
        if tid < self.n:
            x = (sm_top[tid, 0] + sm_top[tid, 1]) + (sm_top[tid, 2] + sm_top[tid, 3])
            scale = Float32(0.0)
            if tid < rows:
                token, head = self.split_row(tid, head_kv, group, per_group)
                scale, lse2 = self.closing(sm_last[tid], x, sink, head, has_sink)
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
        n, pair = self.n, (lane % 4) * 2
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

    @cute.jit
    def store_partial(self, o: cutlass.Constexpr, place: Int64, rows: Int32):
        """The accumulators as they lie, before division: 16 bytes per thread, 512 in a row per warp.

        Rows of 512 columns would scatter each store of a warp over four rows; that took four times the store cycles.
        """
        for g in cutlass.range_constexpr(self.n // 8):
            if g * 8 < rows:
                for m in cutlass.range_constexpr(8 // self.warpgroups):
                    four = [o[m][g * 4 + i] for i in range(4)]
                    self.put(place, (m * (self.n // 8) + g) * 2048, *four)

    @cute.jit
    def put(self, address: Int64, offset: cutlass.Constexpr, a: Float32, b: Float32, c: Float32, d: Float32):
        """16 bytes of a partial, in one indivisible store: whoever sees the first word sees all four."""
        cute.arch.inline_ptx(
            "{ .reg .b64 low, high; .reg .b128 all; mov.b64 low, {{$r1}, {$r2}}; mov.b64 high, {{$r3}, {$r4}}; "
            "mov.b128 all, {low, high}; st.relaxed.gpu.global.b128 [{$r0} + " + str(offset) + "], all; }",
            read_only_args=[address, a, b, c, d],
        )


def fake_arguments(dtype: Any, rows: int, d_qk: int = 576, row_bytes: int = 0) -> list[Any]:
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
        fake_tensor(Int32, (None, None), stride=(None, 1), align=4),
        fake_tensor(Int32, (None,), align=4),
        fake_tensor(Int32, (None, None, 8), align=16),
        fake_tensor(Int32, (None,), align=4),
        make_fake_tensor(dtype, (sym(), sym(), sym(), D_V), stride=(*out_step, 1), assumed_align=16),
        fake_tensor(Float32, (None, None, None), stride=(None, None, None), align=4),
        fake_tensor(Int32, (None, None, rows * 576), align=16),
        fake_tensor(Float32, (None,), align=4),
        fake_tensor(Int32, (None,), align=4),
        fake_tensor(Int32, (1,), align=4),
        Float32(1.0), Int32(0), Int32(1 << 30), Int32(0), Int32(64), Int32(0), Int32(0),
        fake_stream(),
    ]  # fmt: skip
