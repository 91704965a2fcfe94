"""Loads of decode_dense_small from pages of elements: tiles by the copy engine or row by row, and Q. Device code."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync

M = 64  # of one wgmma: keys of a score, columns of a value
BOX = 8  # rows of one bulk load; a page holds a multiple of it
SLICE = 64  # columns of one swizzled line
D_V = 512

EVICT_FIRST = 0x12F0000000000000
NO_WINDOW = 1 << 30  # every query sees every key before its own end

PAGE_OUT_OF_RANGE = 1
LENGTH_NEGATIVE = 2
LENGTH_OVER_CAPACITY = 4


class Loads:
    """Mixin of `kernel.DecodeDenseSmall`: what its loading warp does, and how queries come into shared memory."""

    n: int
    pairs: bool
    d_qk: int
    stages: int
    slices: int
    boxes: int
    box_bytes: int
    has_codes: bool
    gathers: bool
    quarters: int

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
        """Attendable tokens of a request: not negative, and not more than the block table (of gathered rows: the list) holds."""
        capacity = Int32(table.shape[2]) if const_expr(self.gathers) else table.shape[1] * kv.shape[1]
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
                first, step = begin, M
                if const_expr(self.pairs):  # every second tile, from its own place on
                    first, step = begin + (head_kv & 1) * M, 2 * M
                for token in cutlass.range(first, end, step, unroll=1):
                    place = (token - begin) // M % group
                    is_first = place == 0
                    if const_expr(self.pairs):
                        is_first = place < 2
                    if is_first:
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
                    cute.arch.mbarrier_wait(empty + stage * self.quarters, phase)
                    with cute.arch.elect_one():
                        sm_info[0, stage] = self.bytes_of(seen)
                        sm_info[1, stage] = self.bytes_of(seen >> 4)
                        cute.arch.mbarrier_arrive_and_expect_tx(full + stage, boxes * self.box_bytes)
                    for i in cutlass.range(boxes, unroll=1):
                        if const_expr(self.quarters > 1):
                            cute.arch.mbarrier_wait(empty + stage * self.quarters + i // 2, phase)
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
                    for quarter in cutlass.range_constexpr(1, self.quarters):  # no phase may pass unseen
                        cute.arch.mbarrier_wait(empty + stage * self.quarters + quarter, phase)
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
                first, step = begin, M
                if const_expr(self.pairs):
                    first, step = begin + (head_kv & 1) * M, 2 * M
                for token in cutlass.range(first, end, step, unroll=1):
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
                        for quarter in cutlass.range_constexpr(self.quarters):
                            cute.arch.mbarrier_wait(empty + stage * self.quarters + quarter, phase)
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
            head_of, within = head_kv, row
            if const_expr(self.pairs):  # the other CTA's rows behind its own
                head_of, within = head_kv ^ (i // 2), row - i // 2 * 16
            size = Int32(16) if within < rows else Int32(0)
            token, head = self.split_row(within if within < rows else Int32(0), head_of, group, per_group)
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
