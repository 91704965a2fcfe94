"""Dense decode where two warps load keys: the schedule of `kernel.py`, with four things done in another way.

    Keys     Two warps load, every other ring slot each; the warp of the RoPE slice loads Q as well. One thread issues a box
             every 280 clk at best, and had eight copies and prefetches per tile of 2,570 clk (log 39, 43). Where a tile has one
             reader, it is fetched into L2 one tile ahead, from pieces of 16 tiles on (log 43, 44).
    Scores   One arrival at a barrier that nobody waits for, behind the 16th of the wgmmas of a tile. With it ptxas keeps the
             ring's slot in uniform registers: 189 instead of 251 instructions for 36 wgmmas (log 44).
    Values   The slot of a piece's first tile comes with its descriptor, so that it needs no register (log 42).
    Merge    A CTA with one piece keeps its own share of it in shared memory, where shares are whole sixteenths of a partial:
             5 % at 16 requests of 1,024 keys (log 42).

Synchronisation is that of `kernel.py`, run as a model by tests/compile/test_decode_dense_protocol.py. Additional state:

    `places`  ring slot of the left half's first quarter, of each descriptor
    `own`     of the descriptor behind the last piece: sixteenths of the only piece that this CTA merges, as bits
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import warpgroup

from openmla.backends.cute.decode_dense.kernel import (
    BATCH_COORD,
    CLEAR_FROM,
    CLEAR_TO,
    EVICT_FIRST,
    FIRST_BLOCK,
    FULL,
    HEAD,
    MASKED,
    PIECES,
    PIECES_LOG2,
    PIECES_OF,
    SLICE_BYTES,
    SLOT_OF,
    SPLIT_SLOT,
    STOP,
    TILES,
    TOKEN0,
    DecodeDense,
    Scope,
)
from openmla.backends.cute.decode_dense.shares import SLOT_BYTES

NEVER = (1 << 20) - 1  # the largest count of an mbarrier: it never completes, so that nobody misses a wait
AHEAD = 1  # tiles; two are 0.6 to 4 % slower (log 44)
LONG = 16  # tiles of a piece from which on prefetching pays: 7 % at 32, 4 % at 16, the same from 6 tiles on (log 44)


class TwoLoaders(DecodeDense):
    """Roles that differ from those of `DecodeDense`."""

    idle_at = 15

    @property
    def keeps_share(self) -> bool:
        """A soft cap has no registers left for it: 13 would spill."""
        return self.config.cap is None

    @property
    def is_odd(self) -> bool:
        """Whether a piece takes an odd number of slots, three for Q and four for each tile."""
        return self.config.q_regs // 2 % 2 == 1

    def warps_that_load(self) -> int:
        """Two of keys, one of RoPE and Q."""
        return 3

    def further_barriers(self, c: Scope) -> tuple[Any, ...]:
        """The one that nobody waits for."""
        return ((c.idle, NEVER, 1),)

    @cute.jit
    def run_values(self, c: cutlass.Constexpr):
        own = self.values(c)
        self.merge(c, own if const_expr(self.keeps_share) else None)

    @cute.jit
    def run_loads(self, c: cutlass.Constexpr, warp_idx: Int32, row: cute.Tensor, near: cute.Tensor):
        if warp_idx < 14:
            self.load_kv(c, warp_idx - 12)
        elif warp_idx == 14:
            self.load_rope(c)
        else:
            self.plan(c, row, near)

    # ------------------------------------------------------------------ plan

    @cute.jit
    def note(self, c: cutlass.Constexpr, index: Int32, count: Int32, is_end: cutlass.Constexpr):
        """Of a piece, where its first tile lies in the ring; of the end, what a CTA with one piece keeps of it."""
        own, places = c.own, c.places
        own[index] = Int32(0)
        if const_expr(is_end):
            own[index] = self.own_sixteenths(c) if (count == 1) & (c.is_merged != 0) else Int32(0)
        else:
            before, place = count - 1 & PIECES - 1, Int32(0)
            if count > 0:
                place = places[before] + 4 * c.piece[TILES, before]
            places[index] = (place + self.config.q_regs // 2) % self.config.slots

    @cute.jit
    def own_sixteenths(self, c: cutlass.Constexpr) -> Int32:
        """Of the first piece: its share of the merge, where shares are whole sixteenths of a partial, as bits."""
        pieces, split = c.piece[PIECES_OF, 0], c.piece[SPLIT_SLOT, 0] - c.piece[SLOT_OF, 0]
        bits = Int32(0)
        if (pieces > 1) & (pieces <= 16) & ((pieces & pieces - 1) == 0):
            size = 16 // pieces
            bits = (Int32(1) << size) - 1 << split * size
        return bits

    # ------------------------------------------------------------------ loads

    @cute.jit
    def load_kv(self, c: cutlass.Constexpr, side: Int32):
        """Q's register slices and then the tiles of each piece, through the ring, as far ahead as slots are free.

        Two warps, every other slot each: one thread issues a box every 280 clk at best (log 39).
        """
        cfg = self.config
        ahead = min(cfg.look_ahead, AHEAD)
        halves = max(cfg.boxes // 32, 1)
        # [element, box of the slice, slice of the slot, slot]
        s_kv, g_kv = self.page_boxes(c, cute.flat_divide(c.s_ring, (cfg.box_rows, 64)))
        q_boxes = cute.group_modes(cute.flat_divide(c.s_ring, (64, 64))[None, None, 0, None, None], 0, 2)
        valid, missing = c.valid, c.missing
        slot, phase, piece = side, Int32(1), Int32(0)
        cute.arch.mbarrier_wait(c.piece_full, 0)
        tiles = cute.arch.make_warp_uniform(c.piece[TILES, 0])
        while tiles > 0:
            index = piece & PIECES - 1
            first = c.piece[FIRST_BLOCK, index]
            s_q, g_q = self.q_tiles(c, q_boxes, c.piece[TOKEN0, index], c.piece[BATCH_COORD, index])
            if const_expr(self.is_odd):  # each piece begins with the other warp
                mine = side ^ piece & 1
                slot, phase = self.load_q_element(c, g_q, s_q, mine, slot, phase)
                if mine == 0:
                    slot, phase = self.load_q_element(c, g_q, s_q, Int32(2), slot, phase)
                lead = mine ^ 1
            else:
                for e in cutlass.range_constexpr(0, cfg.q_regs // 2, 2):
                    slot, phase = self.load_q_element(c, g_q, s_q, e + side, slot, phase)
                lead = side
            pages, places, bad = (cute.make_rmem_tensor(halves, Int32) for _ in range(3))
            for j in cutlass.range(tiles, unroll=1):
                base = (j & cfg.lookup - 1) * cfg.boxes
                if base == 0:  # a lane each
                    for h in cutlass.range_constexpr(halves):
                        box = (first + j) * cfg.boxes + 32 * h + c.lane
                        pages[h], places[h], bad[h] = self.read_page(c, index, box, True)
                if const_expr(ahead > 0):
                    if (j + ahead < tiles) & c.is_sole_reader & (tiles >= LONG):
                        later = cute.arch.shuffle_sync(pages[0], base + ahead)
                        place = cute.arch.shuffle_sync(places[0], base + ahead)
                        for e in cutlass.range_constexpr(2 * cfg.prefetch_from // cfg.cluster, 8 // cfg.cluster, 2):
                            cute.prefetch(c.tma_kv, g_kv[None, place, cfg.cluster * (e + lead) + c.rank, later])
                count = cutlass.max(cutlass.min(c.piece[STOP, index] - (first + j) * 64, 64), 0)
                lost = [Int32(cute.arch.vote_ballot_sync(bad[h] != 0)) for h in range(halves)]
                if const_expr(cfg.boxes == 1):
                    count = count if (lost[0] >> base) & 1 == 0 else Int32(0)
                elif const_expr(cfg.boxes < 32):
                    lost[0] = (lost[0] >> base) & (1 << cfg.boxes) - 1
                if (j < c.piece[CLEAR_FROM, index]) | (j >= c.piece[CLEAR_TO, index]):
                    count = count | MASKED
                if const_expr(cfg.boxes > 1):
                    for words in lost:
                        count = count | MASKED if words != 0 else count
                if j == 0:
                    count = count | c.piece[HEAD, index]
                for e in cutlass.range_constexpr(0, 4, 2):
                    cute.arch.mbarrier_wait(c.empty + slot, phase)
                    with cute.arch.elect_one():
                        valid[slot] = count
                        if const_expr(cfg.boxes > 1):
                            for h in cutlass.range_constexpr(halves):
                                missing[h, slot] = lost[h]
                        cute.arch.mbarrier_arrive_and_expect_tx(c.full + slot, SLOT_BYTES)
                    # Slice b of a tile is loaded by CTA b % cluster for all of them.
                    for s in cutlass.range_constexpr(2 // cfg.cluster):
                        s = s if const_expr(cfg.cluster == 1) else (c.rank & 1)
                        self.copy_boxes(
                            c, g_kv, s_kv[None, None, s, slot], 2 * (e + lead) + s, pages, places, base, c.full + slot
                        )
                    slot, phase = self.slot_after_next(slot, phase)
            self.arrive(c.piece_empty + index)
            piece += 1
            cute.arch.mbarrier_wait(c.piece_full + (piece & PIECES - 1), (piece >> PIECES_LOG2) & 1)
            tiles = cute.arch.make_warp_uniform(c.piece[TILES, piece & PIECES - 1])

    @cute.jit
    def load_q_element(
        self, c: cutlass.Constexpr, g_q: cute.Tensor, s_q: cute.Tensor, e: Int32, slot: Int32, phase: Int32
    ):  # fmt: skip
        """128 columns of Q into a slot of the ring; returns the place of this warp's next one."""
        cute.arch.mbarrier_wait(c.empty + slot, phase)
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(c.full + slot, SLOT_BYTES)
        for s in cutlass.range_constexpr(2):
            cute.copy(
                c.tma_q, g_q[None, 2 * e + s], s_q[None, s, slot],
                tma_bar_ptr=c.full + slot, cache_policy=Int64(EVICT_FIRST),
            )  # fmt: skip
        return self.slot_after_next(slot, phase)

    @cute.jit
    def load_rope(self, c: cutlass.Constexpr):
        """The slices of Q that stay in shared memory, as soon as the piece before has made its last scores, and the ninth slice
        of every tile; the CTAs of a cluster take turns and multicast it.
        """
        cfg = self.config
        ahead = min(cfg.look_ahead, AHEAD)
        kept = cfg.q_slices - cfg.q_regs
        boxes = cute.group_modes(cute.flat_divide(c.s_q, (64, 64))[None, None, 0, None], 0, 2)
        halves = max(cfg.boxes // 32, 1)
        s_kv, g_kv = self.page_boxes(c, cute.flat_divide(c.s_rope, (cfg.box_rows, 64)))
        turn, piece = Int32(0), Int32(0)
        cute.arch.mbarrier_wait(c.piece_full, 0)
        tiles = cute.arch.make_warp_uniform(c.piece[TILES, 0])
        while tiles > 0:
            index = piece & PIECES - 1
            first = c.piece[FIRST_BLOCK, index]
            s_q, g_q = self.q_tiles(c, boxes, c.piece[TOKEN0, index], c.piece[BATCH_COORD, index])
            if const_expr(cfg.prefetch > 0):
                if piece > 0:  # the first one's copies start at once
                    for x in cutlass.range_constexpr(kept):
                        cute.prefetch(c.tma_q, g_q[None, cfg.q_regs + x])
            cute.arch.mbarrier_wait(c.q_empty, (piece & 1) ^ 1)
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(c.q_full, kept * SLICE_BYTES)
            for s in cutlass.range_constexpr(kept):
                cute.copy(
                    c.tma_q, g_q[None, cfg.q_regs + s], s_q[None, s],
                    tma_bar_ptr=c.q_full, cache_policy=Int64(EVICT_FIRST),
                )  # fmt: skip
            pages, places = (cute.make_rmem_tensor(halves, Int32) for _ in range(2))
            for j in cutlass.range(tiles if const_expr(cfg.has_rope) else 0, unroll=1):
                base = (j & cfg.lookup - 1) * cfg.boxes
                if base == 0:
                    for h in cutlass.range_constexpr(halves):
                        box = (first + j) * cfg.boxes + 32 * h + c.lane
                        pages[h], places[h], _ = self.read_page(c, index, box, False)
                if const_expr(ahead > 0):
                    mine = (turn + ahead & cfg.cluster - 1) == c.rank
                    if (j + ahead < tiles) & c.is_sole_reader & mine & (tiles >= LONG):
                        later = cute.arch.shuffle_sync(pages[0], base + ahead)
                        place = cute.arch.shuffle_sync(places[0], base + ahead)
                        cute.prefetch(c.tma_kv, g_kv[None, place, 8, later])
                cute.arch.mbarrier_wait(c.rope_empty, (turn & 1) ^ 1)
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(c.rope_full, SLICE_BYTES)
                if (turn & cfg.cluster - 1) == c.rank:
                    self.copy_boxes(c, g_kv, s_kv[None, None, 0, 0], Int32(8), pages, places, base, c.rope_full)
                turn += 1
            self.arrive(c.piece_empty + index)
            piece += 1
            cute.arch.mbarrier_wait(c.piece_full + (piece & PIECES - 1), (piece >> PIECES_LOG2) & 1)
            tiles = cute.arch.make_warp_uniform(c.piece[TILES, piece & PIECES - 1])

    @cute.jit
    def slot_after_next(self, slot: Int32, phase: Int32):
        """The ring position after the next one."""
        slot += 2
        if slot >= self.config.slots:
            slot -= self.config.slots
            phase ^= 1
        return slot, phase

    # ------------------------------------------------------------------ O += P V

    @cute.jit
    def hand_over(
        self, c: cutlass.Constexpr, s: cutlass.Constexpr, tile: Int32, _: Int32, f0: Float32, f1: Float32, need: Int32
    ):  # fmt: skip
        buf = tile & 1
        cute.arch.mbarrier_wait(c.p_empty + buf, ((tile >> 1) & 1) ^ 1)
        for k in cutlass.range_constexpr(4):
            cute.copy(s.store, s.p_from[(None, k), None, None], s.p_to[(None, k), None, None, buf])
        self.publish(c, s, buf, f0, f1, need)

    @cute.jit
    def values(self, c: cutlass.Constexpr):
        """Half of O's columns, as in `DecodeDense`. Returns what stays here of the only piece, as `own`."""
        cfg = self.config
        pv = c.pv
        s_v = cute.make_tensor(c.s_ring.iterator, cute.select(c.s_ring.layout, [1, 0, 2]))
        b = pv.make_fragment_B(pv.get_slice(c.thread).partition_B(s_v))
        a = pv.make_fragment_A(pv.get_slice(c.thread).partition_A(c.s_p))
        accs = [pv.make_fragment_C(pv.partition_shape_C((64, 128))) for _ in range(2)]
        pv.set(warpgroup.Field.ACCUMULATE, True)
        # In one register: the half, tiles (from 1) and pieces, of which only the last bits count. With the half elsewhere the
        # assembler would ask for the thread's index again in every tile: 2 % (log 35).
        turn = (c.warp_idx >> 2) - 1 << 30 | 1 << 3
        cute.arch.mbarrier_wait(c.piece_full, 0)
        tiles = cute.arch.make_warp_uniform(c.piece[TILES, 0])
        if tiles > 0:
            cute.arch.mbarrier_wait(c.p_full, 0)  # of tile 0
            cute.arch.mbarrier_wait(c.go + (turn >> 30) * 2, 0)
            self.arrive(c.p_empty)
        while tiles > 0:
            for acc in accs:
                acc.fill(0.0)
            slot = c.places[turn & PIECES - 1] + (turn >> 30) * 2
            for _ in cutlass.range(tiles, unroll=1):
                if slot >= cfg.slots:
                    slot -= cfg.slots
                slot1 = slot + 1 if slot + 1 < cfg.slots else Int32(0)
                buf, phase = (turn >> 3) & 1, (turn >> 4) & 1
                cute.arch.mbarrier_wait(c.p_full + buf, phase)
                if const_expr(cfg.cap is None):
                    self.rescale(c, accs, buf)
                if c.valid[slot] != FULL:
                    self.clear_unseen(c, slot, slot1, turn >> 30)
                cute.arch.mbarrier_wait(c.go + (turn >> 30) * 2 + buf, phase)
                warpgroup.fence()
                for k in cutlass.range_constexpr(4):
                    cute.gemm(pv, accs[0], a[None, None, k, buf], b[None, None, k, slot], accs[0])
                warpgroup.commit_group()
                for k in cutlass.range_constexpr(4):
                    cute.gemm(pv, accs[1], a[None, None, k, buf], b[None, None, k, slot1], accs[1])
                warpgroup.commit_group()
                warpgroup.wait_group(1)
                self.release(c.empty + slot, c.rank)
                warpgroup.wait_group(0)
                self.arrive(c.p_empty + buf)
                self.release(c.empty + slot1, c.rank)
                slot += 4
                turn += 1 << 3
            cute.arch.mbarrier_wait(c.sum_full, turn & 1)
            row0 = self.first_row(c)
            f0, f1 = c.inverse[row0], c.inverse[row0 + 8]
            if const_expr(self.is_halved):
                f0, f1 = self.halve_rows(c, accs, c.piece[SPLIT_SLOT, turn & PIECES - 1], turn >> 30, row0, f0, f1)
            for acc in accs:
                for i in cutlass.range_constexpr(16):
                    acc[i * 4 + 0] = acc[i * 4 + 0] * f0
                    acc[i * 4 + 1] = acc[i * 4 + 1] * f0
                    acc[i * 4 + 2] = acc[i * 4 + 2] * f1
                    acc[i * 4 + 3] = acc[i * 4 + 3] * f1
            cute.arch.fence_view_async_shared()  # the loads are done before the arrival
            self.arrive(c.sum_empty)
            following = (
                cute.arch.shuffle_sync_bfly(turn, 0) + 1
            )  # its descriptor tells whether this piece is the only one
            cute.arch.mbarrier_wait(c.piece_full + (following & PIECES - 1), (following >> PIECES_LOG2) & 1)
            self.store_out(c, accs, turn & PIECES - 1, turn >> 30, row0)
            if (c.piece[SPLIT_SLOT, turn & PIECES - 1] >= 0) & (c.is_merged != 0):
                self.announce(c, turn & PIECES - 1)
                if const_expr(self.keeps_share):
                    self.keep_share(c, accs, turn & PIECES - 1, turn >> 30)
            self.arrive(c.piece_empty + (turn & PIECES - 1))
            turn = turn & -8 | turn + 1 & 7
            tiles = cute.arch.make_warp_uniform(c.piece[TILES, turn & PIECES - 1])
        return c.own[turn & PIECES - 1] if const_expr(self.keeps_share) else Int32(0)

    @cute.jit
    def keep_share(self, c: cutlass.Constexpr, accs: cutlass.Constexpr, index: Int32, half: Int32):
        """The share of the own partial goes where `fetch` puts those of the others, which is where it lies in the partial.

        Both halves have counted their piece, so nobody reads the ring any more.
        """
        lane = cute.arch.shuffle_sync_bfly(c.lane, 0)
        if const_expr(self.is_halved):
            ring = cute.recast_ptr(c.s_ring.iterator, None, Int32)
            words = (ring + (c.warp * (32 * 128) + half * (16 * 128) + lane * 4)).align(16)
            for h in cutlass.range_constexpr(2):
                if self.is_own(c, index, half, h):
                    eight = cute.make_tensor(words + h * 1024, cute.make_layout((4, 8), stride=(1, 128)))
                    self.put_halves(accs[h], eight)
        else:
            ring = cute.recast_ptr(c.s_ring.iterator, None, Float32)
            units = cute.make_tensor(
                (ring + (c.warp * (64 * 128) + half * (32 * 128) + lane * 4)).align(16),
                cute.make_layout((4, 16, 2), stride=(1, 128, 16 * 128)),
            )
            for h in cutlass.range_constexpr(2):
                if self.is_own(c, index, half, h):
                    quads = cute.make_tensor(accs[h].iterator, cute.make_layout((4, 16)))
                    for i in cutlass.range_constexpr(16):
                        cute.autovec_copy(quads[None, i], units[None, i, h])

    @cute.jit
    def is_own(self, c: cutlass.Constexpr, index: Int32, half: Int32, h: cutlass.Constexpr) -> Boolean:
        """Whether this warp's sixteenth of a partial are of the share that this CTA merges, so that they need not leave it."""
        following = cute.arch.shuffle_sync_bfly(index, 0) + 1 & PIECES - 1  # not kept in a register, which would spill
        return (c.own[following] >> c.warp * 4 + half * 2 + h) & 1 != 0
