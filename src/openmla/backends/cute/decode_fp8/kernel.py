"""Dense MLA decode of e4m3 queries over an e4m3 cache with one scale per tensor, on FP8 tensor cores.

Computes
    s_j = scale_log2 * descale_q * descale_k * <q_r, k_j>    p_j = 2^(s_j - m)
    out_r = descale_k * sum_j p_j k_j[:512] / sum_j p_j      lse = m + log2 sum_j p_j
    with q and k the stored codes, for every query row r and the keys j that it sees.

Shapes
    q [batch, s_q, h_q, 576], kv [num_pages, page_size, h_kv, 576], out [batch, s_q, h_q, 512] bf16. Rows, plan, pieces,
    masks and the merge are those of `decode_dense`, whose roles this kernel inherits.

Why V is the A operand
    FP8 wgmma reads both operands along the summed dimension, which for P V are keys, and V lies along columns. Here
    O^T = V^T P^T: V^T comes through ldmatrix.trans as pairs of columns, two byte permutations turn a pair of registers
    into A fragments of 16 columns x 32 keys, and nothing is written back to shared memory. The keys of a fragment
    stand in the order 0 1 8 9 2 3 10 11 ... of 16; that is also how a thread of the scores holds its probabilities, so
    P is stored as it comes. Rows g and g + 8 of 16 rows of O^T are the columns 2g and 2g + 1.

Schedule (512 threads; one tile of 64 keys per turn)
    loads (4 warps)         scores (warpgroup 0)                     values left | right (warpgroups 1 | 2)
    ring of 4 tiles         S(j) complete: a scaled copy of it,      V(j-1)^T through registers, 64 columns at a time:
    Q, piece descriptors      then S(j+1) = Q K(j+1)^T                 fresh = V(j-1)^T P(j-1)^T, O^T += fresh in fp32
                            maximum, exponentials, P(j) out          the tile's slot is free
    The tensor cores have the next scores and the values of the tile before while the exponentials run.

Precision
    P is e4m3 of 2^8 p, so that its smallest step is 2^-18 of a row's reference; with two terms, plus the e4m3 of what
    that leaves over, which makes 8 bits of mantissa as bf16 has. The sums of a row are of unrounded probabilities. FP8
    tensor cores keep fewer bits of a sum than fp32 has, so they add up one tile, not all.

Budget (tests/compile/test_decode_fp8.py)
    shared memory 223,232 of 232,448 bytes (1,024 are reserved); registers 96 scores, 192 values (twice), 32 loads
    (x 128 = 65,536), no spills.

Synchronisation (mbarriers; those of pieces, sums and shares as in decode_dense)
    full/empty[slot]       loads -> scores, values / 8 warps of every CTA of the cluster
    p_full/empty[2]        scores, 8 lanes of each of 4 warps -> values / 8 warps

Deep dive: docs/kernels/decode_fp8.md
"""

from __future__ import annotations

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import BFloat16, Float8E4M3FN, Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.memory import SmemAllocator

from openmla.backends.cute.decode_dense.kernel import (
    BATCH_COORD,
    CLEAR_FROM,
    CLEAR_TO,
    EVICT_FIRST,
    FIELDS,
    FIRST_BLOCK,
    FULL,
    FUSED,
    HEAD,
    HEAD_SHIFT,
    MASKED,
    NO_MAXIMUM,
    PIECES,
    PIECES_LOG2,
    S_Q,
    SPLIT_SLOT,
    STOP,
    THREADS,
    TILES,
    TOKEN0,
    DecodeDense,
    Scope,
)
from openmla.backends.cute.decode_dense.shares import SHARE_FIELDS, SHARES, UNITS
from openmla.backends.cute.decode_fp8.config import BOX_BYTES, BOXES, COLUMNS, SLOT_BYTES, Config

REGISTERS = (96, 192, 32)  # scores, values, loads; x 128 threads = 65,536
STEPS = 18  # of 32 columns: 576
# P is 2^BIAS times a probability. The reference moves where P would pass 2^(BIAS + 0.75), below e4m3's 448.
BIAS, LIMIT = 8.0, 8.75
WEIGHTS_BYTES = 32_256  # of a merge's weights, where Q was


class DecodeFp8(DecodeDense):
    """The launch (`__call__`) and the device code (`kernel` and one method per warp role)."""

    def __init__(self, config: Config) -> None:
        self.config = config  # type: ignore[assignment]
        self.dtype = BFloat16  # of out
        self.units = UNITS // 64 * config.rows  # the others of a partial would be read, and were never stored
        self.smem_bytes = 0

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,  # bytes [batch | 1, s_q | total_q, h_q, 576], rows evenly spaced
        kv: cute.Tensor,  # bytes [num_pages, page_size, h_kv, 576]
        block_table: cute.Tensor,
        cache_seqlens: cute.Tensor,
        cu_seqlens_q: cute.Tensor,
        metadata: cute.Tensor,
        num_splits: cute.Tensor,
        out: cute.Tensor,
        lse: cute.Tensor,
        out_accum: cute.Tensor,
        lse2_accum: cute.Tensor,
        arrivals: cute.Tensor,
        attn_sink: cute.Tensor,
        descale_q: cute.Tensor,  # fp32 [1]
        descale_k: cute.Tensor,  # fp32 [1]
        fault_word: cute.Tensor,
        s_q: Int32,
        chunk_blocks: Int32,
        is_merged: Int32,
        is_causal: Int32,
        is_varlen: Int32,
        has_sink: Int32,
        window: Int32,
        scale_log2: Float32,
        stream: cuda.CUstream,
    ):
        cfg, code = self.config, Float8E4M3FN
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, code)

        def tiled(*shape: int) -> Any:
            return cute.tile_to_shape(atom, shape, order=tuple(range(len(shape))))

        ring_layout, q_layout = tiled(64, BOXES * COLUMNS, cfg.slots), tiled(64, BOXES * COLUMNS)
        p_layout = tiled(64, COLUMNS, 2)

        def mma(n: int, source: Any) -> Any:
            return sm90.make_trivial_tiled_mma(
                code, code, OperandMajorMode.K, OperandMajorMode.K, Float32, (1, 1, 1), (64, n), source
            )

        qk_first = mma(64, warpgroup.OperandSource.SMEM)  # overwrites S, the others add to it
        qk = mma(64, warpgroup.OperandSource.SMEM)
        pv_first = mma(cfg.rows, warpgroup.OperandSource.RMEM)
        pv = mma(cfg.rows, warpgroup.OperandSource.RMEM)

        heads = out.shape[2] // kv.shape[2]
        rows = q.shape[1] * heads  # row = token * heads + head
        q_rows = cute.make_tensor(
            cute.recast_ptr(q.iterator, dtype=code),
            cute.make_layout(
                (rows, q.shape[3], kv.shape[2], q.shape[0]),
                stride=(q.stride[2], q.stride[3], rows * q.stride[2], q.stride[0]),
            ),
        )
        kv_rows = cute.make_tensor(cute.recast_ptr(kv.iterator, dtype=code), cute.select(kv.layout, [1, 3, 2, 0]))
        load = cpasync.CopyBulkTensorTileG2SOp()
        load_kv = cpasync.CopyBulkTensorTileG2SMulticastOp() if cfg.cluster > 1 else load
        box = cute.make_composed_layout(atom.inner, 0, cute.make_layout((cfg.box_rows, COLUMNS), stride=(COLUMNS, 1)))
        tma_kv, t_kv = cpasync.make_tiled_tma_atom(load_kv, kv_rows, box, (cfg.box_rows, COLUMNS))
        tma_q, t_q = cpasync.make_tiled_tma_atom(load, q_rows, tiled(64, COLUMNS), (64, COLUMNS))

        @cute.struct
        class Storage:
            full: cute.struct.MemRange[Int64, cfg.slots]
            empty: cute.struct.MemRange[Int64, cfg.slots]
            q_full: cute.struct.MemRange[Int64, 1]
            q_empty: cute.struct.MemRange[Int64, 1]
            p_full: cute.struct.MemRange[Int64, 2]
            p_empty: cute.struct.MemRange[Int64, 2]
            sum_full: cute.struct.MemRange[Int64, 1]
            sum_empty: cute.struct.MemRange[Int64, 1]
            piece_full: cute.struct.MemRange[Int64, PIECES]
            piece_empty: cute.struct.MemRange[Int64, PIECES]
            parts_full: cute.struct.MemRange[Int64, 1]
            share_full: cute.struct.MemRange[Int64, SHARES]
            share_empty: cute.struct.MemRange[Int64, SHARES]
            piece: cute.struct.MemRange[Int32, FIELDS * PIECES]
            share: cute.struct.MemRange[Int32, SHARE_FIELDS * SHARES]
            valid: cute.struct.MemRange[Int32, cfg.slots]
            missing: cute.struct.MemRange[Int32, 2 * cfg.slots]
            need: cute.struct.MemRange[Int32, 2 * 4]
            factor: cute.struct.Align[cute.struct.MemRange[Float32, 2 * 64], 16]
            inverse: cute.struct.Align[cute.struct.MemRange[Float32, 64], 16]
            ring: cute.struct.Align[cute.struct.MemRange[code, cute.cosize(ring_layout)], 1024]
            q: cute.struct.Align[cute.struct.MemRange[code, cute.cosize(q_layout)], 1024]
            p: cute.struct.Align[cute.struct.MemRange[code, cute.cosize(p_layout)], 1024]

        self.storage = Storage
        self.smem_bytes = Storage.size_in_bytes()
        m_blocks = cute.ceil_div(s_q * heads, 64)
        m_blocks = cute.ceil_div(m_blocks, cfg.cluster) * cfg.cluster
        self.kernel(
            tma_kv, t_kv, tma_q, t_q, block_table, cache_seqlens, cu_seqlens_q, metadata, num_splits, out, lse,
            out_accum, lse2_accum, arrivals, attn_sink, descale_q, descale_k, fault_word, s_q, chunk_blocks, is_merged,
            is_causal, is_varlen, has_sink, window, scale_log2, Int32(heads), Int32(kv.shape[0]),
            Int32(kv.shape[1] // cfg.box_rows), Int32(block_table.shape[1] * kv.shape[1]), qk_first, qk, pv_first, pv,
            ring_layout, q_layout, p_layout,
        ).launch(
            grid=[m_blocks, kv.shape[2], metadata.shape[1]],
            block=[THREADS, 1, 1],
            cluster=[cfg.cluster, 1, 1],
            min_blocks_per_mp=1,
            stream=stream,
            use_pdl=True,
            cooperative=True,
        )  # fmt: skip

    @cute.kernel
    def kernel(
        self,
        tma_kv: cute.CopyAtom,
        t_kv: cute.Tensor,
        tma_q: cute.CopyAtom,
        t_q: cute.Tensor,
        block_table: cute.Tensor,
        cache_seqlens: cute.Tensor,
        cu_seqlens_q: cute.Tensor,
        metadata: cute.Tensor,
        num_splits: cute.Tensor,
        out: cute.Tensor,
        lse: cute.Tensor,
        out_accum: cute.Tensor,
        lse2_accum: cute.Tensor,
        arrivals: cute.Tensor,
        attn_sink: cute.Tensor,
        descale_q: cute.Tensor,
        descale_k: cute.Tensor,
        fault_word: cute.Tensor,
        s_q: Int32,
        chunk_blocks: Int32,
        is_merged: Int32,
        is_causal: Int32,
        is_varlen: Int32,
        has_sink: Int32,
        window: Int32,
        scale_log2: Float32,
        heads: Int32,
        num_pages: Int32,
        boxes_per_page: Int32,
        capacity: Int32,
        qk_first: cute.TiledMma,
        qk: cute.TiledMma,
        pv_first: cute.TiledMma,
        pv: cute.TiledMma,
        ring_layout: cute.ComposedLayout,
        q_layout: cute.ComposedLayout,
        p_layout: cute.ComposedLayout,
    ):
        cfg = self.config
        tidx, _, _ = cute.arch.thread_idx()
        m_block, kv_head, part = cute.arch.block_idx()
        warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        store = SmemAllocator().allocate(self.storage)
        pointer = lambda name: getattr(store, name).data_ptr()  # noqa: E731
        c = Scope(
            **{name: pointer(name) for name in (
                "full", "empty", "q_full", "q_empty", "p_full", "p_empty", "sum_full", "sum_empty", "piece_full",
                "piece_empty", "share_full", "share_empty", "parts_full",
            )},
            piece=store.piece.get_tensor(cute.make_layout((FIELDS, PIECES))),
            share=store.share.get_tensor(cute.make_layout((SHARE_FIELDS, SHARES))),
            weights=cute.make_tensor(
                cute.recast_ptr(store.q.data_ptr(), dtype=Float32), cute.make_layout(WEIGHTS_BYTES // 4)
            ),
            lines=cute.make_tensor(
                cute.recast_ptr(store.q.data_ptr() + WEIGHTS_BYTES, dtype=Int64), cute.make_layout(64)
            ),
            valid=store.valid.get_tensor(cute.make_layout(cfg.slots)),
            missing=store.missing.get_tensor(cute.make_layout((2, cfg.slots))),
            need=store.need.get_tensor(cute.make_layout((4, 2))),
            factor=store.factor.get_tensor(cute.make_layout((64, 2))),
            inverse=store.inverse.get_tensor(cute.make_layout(64)),
            s_ring=store.ring.get_tensor(ring_layout.outer, swizzle=ring_layout.inner),
            s_q=store.q.get_tensor(q_layout.outer, swizzle=q_layout.inner),
            s_p=store.p.get_tensor(p_layout.outer, swizzle=p_layout.inner),
            tma_kv=tma_kv, t_kv=t_kv, tma_q=tma_q, t_q=t_q, block_table=block_table, cache_seqlens=cache_seqlens,
            cu_seqlens_q=cu_seqlens_q, metadata=metadata, num_splits=num_splits, out=out, lse=lse, out_accum=out_accum,
            lse2_accum=lse2_accum, arrivals=arrivals, attn_sink=attn_sink, descale_q=descale_q, descale_k=descale_k,
            fault_word=fault_word, s_q_max=s_q, chunk_blocks=chunk_blocks, is_merged=is_merged, is_causal=is_causal,
            is_varlen=is_varlen, has_sink=has_sink, window=window, scale_log2=scale_log2,
            row_blocks=cute.arch.grid_dim()[0], heads=heads, num_pages=num_pages, boxes_per_page=boxes_per_page,
            capacity=capacity, qk_first=qk_first, qk=qk, pv_first=pv_first, pv=pv, m_block=m_block, kv_head=kv_head, part=part,
            rank=m_block & cfg.cluster - 1, thread=tidx & 127, warp=warp_idx & 3, lane=cute.arch.lane_idx(),
            warp_idx=warp_idx,
        )  # fmt: skip

        # The plan's row and, a lane each, lengths and slots of the first 32 requests: one memory latency.
        plan_row, near = cute.make_rmem_tensor(5, Int32), cute.make_rmem_tensor(3, Int32)
        if warp_idx == 15:
            cute.arch.griddepcontrol_wait()
            for i in cutlass.range_constexpr(5):
                plan_row[i] = metadata[0, part, i]
            lane = cute.arch.lane_idx()
            if lane < cache_seqlens.shape[0]:
                near[0], near[1], near[2] = cache_seqlens[lane], num_splits[lane], num_splits[lane + 1]
        if warp_idx == 0:
            with cute.arch.elect_one():
                for pointer_, count, copies in (
                    (c.full, 1, cfg.slots),
                    (c.empty, 8 * cfg.cluster, cfg.slots),
                    (c.q_full, 1, 1),
                    (c.q_empty, 4, 1),
                    (c.p_full, 4 * 8, 2),
                    (c.p_empty, 8, 2),
                    (c.sum_full, 4 * 8, 1),
                    (c.sum_empty, 8, 1),
                    (c.piece_full, 1, PIECES),
                    (c.piece_empty, 12 + 2, PIECES),  # math warps and loaders
                    (c.parts_full, 1, 1),
                    (c.share_full, 1, SHARES),
                    (c.share_empty, 8, SHARES),
                ):
                    for i in range(copies):
                        cute.arch.mbarrier_init(pointer_ + i, count)
            cpasync.prefetch_descriptor(tma_kv)
            cpasync.prefetch_descriptor(tma_q)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        if const_expr(cfg.cluster > 1):
            cute.arch.cluster_arrive_relaxed()
            cute.arch.cluster_wait()

        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()

        for_scores, for_values, for_loads = REGISTERS
        if warp_idx < 4:
            cute.arch.setmaxregister_decrease(for_scores)
            self.scores(c)
        elif warp_idx < 12:
            cute.arch.setmaxregister_increase(for_values)
            self.values(c)
            self.merge(c)
        else:
            cute.arch.setmaxregister_decrease(for_loads)
            if warp_idx == 12:
                self.load_kv(c)
            elif warp_idx == 13:
                self.load_q(c)
            elif warp_idx == 15:
                self.plan(c, plan_row, near)
        if const_expr(cfg.cluster > 1):
            # Arrivals in the other CTA are performed before it may leave: not relaxed.
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()

    # ------------------------------------------------------------------ loads

    def q_tiles(self, c: Scope, boxes: cute.Tensor, token0: Int32, batch: Int32) -> Any:
        """This CTA's 64 rows of Q for copies into `boxes`: (shared, global) partitions, one entry per box."""
        rows = cute.domain_offset((token0 * c.heads, 0, 0, 0), c.t_q)
        tile = cute.local_tile(rows, (64, COLUMNS), (c.m_block, None, c.kv_head, batch))
        return cpasync.tma_partition(c.tma_q, 0, cute.make_layout(1), boxes, cute.group_modes(tile, 0, 2))

    def page_boxes(self, c: Scope, target: cute.Tensor) -> Any:
        """Copies of `box_rows` x 128 pieces of the cache: (shared, global) partitions."""
        g_kv = cute.local_tile(c.t_kv, (self.config.box_rows, COLUMNS), (None, None, c.kv_head, None))
        return cpasync.tma_partition(
            c.tma_kv, 0, cute.make_layout(1), cute.group_modes(target, 0, 2), cute.group_modes(g_kv, 0, 2)
        )

    @cute.jit
    def load_kv(self, c: cutlass.Constexpr):
        """The tiles of each piece, through the ring, as far ahead as slots are free."""
        cfg = self.config
        halves = max(cfg.boxes // 32, 1)
        s_kv, g_kv = self.page_boxes(c, cute.flat_divide(c.s_ring, (cfg.box_rows, COLUMNS)))
        valid, missing = c.valid, c.missing
        slot, phase, piece, turn = Int32(0), Int32(1), Int32(0), Int32(0)
        cute.arch.mbarrier_wait(c.piece_full, 0)
        tiles = cute.arch.make_warp_uniform(c.piece[TILES, 0])
        while tiles > 0:
            index = piece & PIECES - 1
            first = c.piece[FIRST_BLOCK, index]
            pages, places, bad = (cute.make_rmem_tensor(halves, Int32) for _ in range(3))
            for j in cutlass.range(tiles, unroll=1):
                base = (j & cfg.lookup - 1) * cfg.boxes
                if base == 0:  # a lane each
                    for h in cutlass.range_constexpr(halves):
                        box = (first + j) * cfg.boxes + 32 * h + c.lane
                        pages[h], places[h], bad[h] = self.read_page(c, index, box, True)
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
                cute.arch.mbarrier_wait(c.empty + slot, phase)
                with cute.arch.elect_one():
                    valid[slot] = count
                    if const_expr(cfg.boxes > 1):
                        for h in cutlass.range_constexpr(halves):
                            missing[h, slot] = lost[h]
                    cute.arch.mbarrier_arrive_and_expect_tx(c.full + slot, SLOT_BYTES)
                for e in cutlass.range_constexpr(BOXES // cfg.cluster):
                    where = Int32(e) if const_expr(cfg.cluster == 1) else Int32(2 * e) + c.rank
                    self.copy_boxes(c, g_kv, s_kv[None, None, where, slot], where, pages, places, base, c.full + slot)
                if const_expr(cfg.cluster > 1):  # the fifth box in turn
                    if (turn & 1) == c.rank:
                        self.copy_boxes(
                            c, g_kv, s_kv[None, None, BOXES - 1, slot], Int32(BOXES - 1), pages, places, base,
                            c.full + slot,
                        )  # fmt: skip
                turn += 1
                slot, phase = self.next_slot(slot, phase)
            self.arrive(c.piece_empty + index)
            piece += 1
            cute.arch.mbarrier_wait(c.piece_full + (piece & PIECES - 1), (piece >> PIECES_LOG2) & 1)
            tiles = cute.arch.make_warp_uniform(c.piece[TILES, piece & PIECES - 1])

    @cute.jit
    def load_q(self, c: cutlass.Constexpr):
        """Q of each piece, as soon as the piece before has made its last scores."""
        boxes = cute.group_modes(cute.flat_divide(c.s_q, (64, COLUMNS))[None, None, 0, None], 0, 2)
        policy = Int64(EVICT_FIRST)
        piece = Int32(0)
        cute.arch.mbarrier_wait(c.piece_full, 0)
        tiles = cute.arch.make_warp_uniform(c.piece[TILES, 0])
        while tiles > 0:
            index = piece & PIECES - 1
            s_q, g_q = self.q_tiles(c, boxes, c.piece[TOKEN0, index], c.piece[BATCH_COORD, index])
            if piece > 0:  # the first one's copies start at once
                for x in cutlass.range_constexpr(BOXES):
                    cute.prefetch(c.tma_q, g_q[None, x])
            cute.arch.mbarrier_wait(c.q_empty, (piece & 1) ^ 1)
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(c.q_full, SLOT_BYTES)
            for x in cutlass.range_constexpr(BOXES):
                cute.copy(c.tma_q, g_q[None, x], s_q[None, x], tma_bar_ptr=c.q_full, cache_policy=policy)
            self.arrive(c.piece_empty + index)
            piece += 1
            cute.arch.mbarrier_wait(c.piece_full + (piece & PIECES - 1), (piece >> PIECES_LOG2) & 1)
            tiles = cute.arch.make_warp_uniform(c.piece[TILES, piece & PIECES - 1])

    # ------------------------------------------------------------------ S = Q K^T and the softmax

    @cute.jit
    def scores(self, c: cutlass.Constexpr):
        """S of the next tile on the tensor cores, while this one's scores become probabilities."""
        c.qk_first.set(warpgroup.Field.ACCUMULATE, False)
        c.qk.set(warpgroup.Field.ACCUMULATE, True)
        thr = c.qk.get_slice(c.thread)
        s = Scope(
            a=c.qk.make_fragment_A(thr.partition_A(c.s_q)),
            b=c.qk.make_fragment_B(thr.partition_B(c.s_ring)),
            row0=c.warp * 16 + (c.lane >> 2),
        )
        acc = c.qk.make_fragment_C(c.qk.partition_shape_C((64, 64)))
        s.x = cute.make_rmem_tensor(acc.layout, Float32)
        c.scale_log2 = c.scale_log2 * c.descale_q[0] * c.descale_k[0]
        slot, phase, count, piece = Int32(0), Int32(0), Int32(0), Int32(0)
        cute.arch.mbarrier_wait(c.piece_full, 0)
        tiles = cute.arch.make_warp_uniform(c.piece[TILES, 0])
        while tiles > 0:
            index = piece & PIECES - 1
            # A row behind the last one may hold another request's data: its reference never moves, its P is 0.
            rows = c.piece[S_Q, index] * c.heads - c.m_block * 64 - s.row0
            n0 = Float32(-NO_MAXIMUM) if rows > 0 else Float32(NO_MAXIMUM)
            n1 = Float32(-NO_MAXIMUM) if rows > 8 else Float32(NO_MAXIMUM)
            l0, l1 = Float32(0.0), Float32(0.0)
            cute.arch.mbarrier_wait(c.q_full, piece & 1)
            self.issue(c, s, acc, slot, phase)
            for j in cutlass.range(tiles - 1, unroll=1):
                slot, phase, n0, n1, l0, l1 = self.step(c, s, acc, slot, phase, count, piece, j, n0, n1, l0, l1, False)
                count += 1
            slot, phase, n0, n1, l0, l1 = self.step(
                c, s, acc, slot, phase, count, piece, tiles - 1, n0, n1, l0, l1, True
            )
            count += 1
            self.sums(c, s, piece, -n0, -n1, l0, l1)
            piece += 1
            cute.arch.mbarrier_wait(c.piece_full + (piece & PIECES - 1), (piece >> PIECES_LOG2) & 1)
            tiles = cute.arch.make_warp_uniform(c.piece[TILES, piece & PIECES - 1])

    @cute.jit
    def issue(self, c: cutlass.Constexpr, s: cutlass.Constexpr, acc: cute.Tensor, slot: Int32, phase: Int32):
        """Start the scores of the tile in `slot`."""
        cute.arch.mbarrier_wait(c.full + slot, phase)
        warpgroup.fence()
        for k in cutlass.range_constexpr(STEPS):
            cute.gemm(c.qk if k else c.qk_first, acc, s.a[None, None, k], s.b[None, None, k, slot], acc)
        warpgroup.commit_group()

    @cute.jit
    def step(
        self, c: cutlass.Constexpr, s: cutlass.Constexpr, acc: cute.Tensor, slot: Int32, phase: Int32, count: Int32,
        piece: Int32, j: Int32, n0: Float32, n1: Float32, l0: Float32, l1: Float32, is_last: cutlass.Constexpr,
    ):  # fmt: skip
        """The probabilities of tile j, whose scores were started before; the next tile's scores on their way first."""
        x, here = s.x, slot
        warpgroup.wait_group(0)
        valid = c.valid[slot]
        for i in cutlass.range_constexpr(32):
            x[i] = self.rounded(acc[i], c.scale_log2)
        slot, phase = self.next_slot(slot, phase)
        if const_expr(is_last):
            self.arrive(c.q_empty)
        else:
            self.issue(c, s, acc, slot, phase)
        if valid != FULL:
            self.mask(c, s, x, piece, j, valid, here + 4)
        n0, n1, l0, l1, f0, f1, need = self.weigh_scores(x, n0, n1, l0, l1)
        self.store_p(c, s, x, count, f0, f1, need)
        return slot, phase, n0, n1, l0, l1

    @cute.jit
    def weigh_scores(self, x: cute.Tensor, n0: Float32, n1: Float32, l0: Float32, l1: Float32):
        """x = 2^(x + n); n moves if a row's largest would pass 2^LIMIT. Returns n, sums, factors, whether it moved.

        n is BIAS minus the reference. Where the reference is so large that this would round, BIAS is left out.
        """
        x0, x1 = x[0], x[2]
        for i in cutlass.range_constexpr(8):
            x0 = cute.arch.fmax(x0, cute.arch.fmax(x[i * 4 + 0], x[i * 4 + 1]))
            x1 = cute.arch.fmax(x1, cute.arch.fmax(x[i * 4 + 2], x[i * 4 + 3]))
        for d in (1, 2):
            x0 = cute.arch.fmax(x0, cute.arch.shuffle_sync_bfly(x0, d))
            x1 = cute.arch.fmax(x1, cute.arch.shuffle_sync_bfly(x1, d))
        moves0, moves1 = x0 + n0 > Float32(LIMIT), x1 + n1 > Float32(LIMIT)
        t0 = Float32(BIAS) - x0 if cute.arch.fmax(x0, -x0) < Float32(FUSED) else -x0
        t1 = Float32(BIAS) - x1 if cute.arch.fmax(x1, -x1) < Float32(FUSED) else -x1
        t0, t1 = t0 if moves0 else n0, t1 if moves1 else n1
        f0, f1 = cute.math.exp2(t0 - n0, fastmath=True), cute.math.exp2(t1 - n1, fastmath=True)
        need = Int32(1) if cute.arch.vote_any_sync(moves0 | moves1) else Int32(0)
        l0, l1 = l0 * f0, l1 * f1
        for i in cutlass.range_constexpr(32):
            x[i] = cute.math.exp2(x[i] + (t0 if (i // 2) % 2 == 0 else t1), fastmath=True)
            l0, l1 = (l0 + x[i], l1) if (i // 2) % 2 == 0 else (l0, l1 + x[i])
        return t0, t1, l0, l1, f0, f1, need

    @cute.jit
    def store_p(
        self, c: cutlass.Constexpr, s: cutlass.Constexpr, x: cute.Tensor, count: Int32, f0: Float32, f1: Float32,
        need: Int32,
    ):  # fmt: skip
        """P as e4m3 into shared memory, and the factors of O, for the value warpgroups."""
        terms, factor, flag, buf = self.config.terms, c.factor, c.need, count & 1
        words = cute.make_rmem_tensor(16, Int32)  # [row, term, 16 keys]
        for r in cutlass.range_constexpr(2):
            for k in cutlass.range_constexpr(4):
                at = 8 * k + 2 * r
                first, second = self.as_codes(x[at], x[at + 1], x[at + 4], x[at + 5])
                words[r * 8 + k] = first
                words[r * 8 + 4 + k] = second
        cute.arch.mbarrier_wait(c.p_empty + buf, ((count >> 1) & 1) ^ 1)
        line, chunk = c.lane & 7, c.lane >> 3
        base = c.s_p.iterator.toint().to(Int32) + buf * BOX_BYTES + (c.warp * 16 + line) * COLUMNS
        for r in cutlass.range_constexpr(2):
            for t in cutlass.range_constexpr(terms):
                cute.arch.inline_ptx(
                    "stmatrix.sync.aligned.m8n8.x4.shared.b16 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};",
                    read_only_args=[
                        base + r * 8 * COLUMNS + ((chunk + 4 * t) ^ line) * 16,
                        *(words[r * 8 + t * 4 + k] for k in range(4)),
                    ],
                )
        # The tensor cores read P through the async proxy.
        cute.arch.fence_view_async_shared()
        cute.arch.sync_warp()
        if (c.lane & 3) == 0:
            # Each lane for its own stores: compute-sanitizer sees no order that only a warp makes.
            factor[s.row0, buf] = f0
            factor[s.row0 + 8, buf] = f1
            if c.lane == 0:
                flag[c.warp, buf] = need
            cute.arch.mbarrier_arrive(c.p_full + buf)

    @cute.jit
    def as_codes(self, a: Float32, b: Float32, d: Float32, e: Float32):
        """Four numbers as e4m3, and what that leaves over of them as e4m3."""
        if const_expr(self.config.terms == 1):
            return cute.arch.inline_ptx(
                "{ .reg .b16 l, h; cvt.rn.satfinite.e4m3x2.f32 l, {$r1}, {$r0};"
                " cvt.rn.satfinite.e4m3x2.f32 h, {$r3}, {$r2}; mov.b32 {$w0}, {l, h}; }",
                write_only_types=[Int32],
                read_only_args=[a, b, d, e],
            ), Int32(0)
        return cute.arch.inline_ptx(
            "{ .reg .b16 l, h, x, y; .reg .b32 w; .reg .f32 p, q, r, s;"
            " cvt.rn.satfinite.e4m3x2.f32 l, {$r1}, {$r0}; cvt.rn.satfinite.e4m3x2.f32 h, {$r3}, {$r2};"
            " mov.b32 {$w0}, {l, h};"
            " cvt.rn.f16x2.e4m3x2 w, l; mov.b32 {x, y}, w; cvt.f32.f16 p, x; cvt.f32.f16 q, y;"
            " cvt.rn.f16x2.e4m3x2 w, h; mov.b32 {x, y}, w; cvt.f32.f16 r, x; cvt.f32.f16 s, y;"
            " sub.f32 p, {$r0}, p; sub.f32 q, {$r1}, q; sub.f32 r, {$r2}, r; sub.f32 s, {$r3}, s;"
            " cvt.rn.satfinite.e4m3x2.f32 l, q, p; cvt.rn.satfinite.e4m3x2.f32 h, s, r; mov.b32 {$w1}, {l, h}; }",
            write_only_types=[Int32, Int32],
            read_only_args=[a, b, d, e],
        )

    # ------------------------------------------------------------------ O^T += V^T P^T

    @cute.jit
    def values(self, c: cutlass.Constexpr):
        """Half of O's columns: V^T through registers, P from shared memory, O^T in registers."""
        cfg, pv = self.config, c.pv
        half = (c.warp_idx >> 2) - 1
        s_p = cute.local_tile(c.s_p, (cfg.rows, COLUMNS, 2), (0, 0, 0))
        b = pv.make_fragment_B(pv.get_slice(c.thread).partition_B(s_p))
        accs = [pv.make_fragment_C(pv.partition_shape_C((64, cfg.rows))) for _ in range(4)]
        frag = pv.make_fragment_A(pv.partition_shape_A((64, 64)))
        fresh = pv.make_fragment_C(pv.partition_shape_C((64, cfg.rows)))
        c.pv_first.set(warpgroup.Field.ACCUMULATE, False)
        pv.set(warpgroup.Field.ACCUMULATE, True)
        lines = c.s_ring.iterator.toint().to(Int32) + half * (2 * BOX_BYTES) + c.lane * COLUMNS
        lines = lines + (c.warp ^ (c.lane & 7)) * 16
        slot, phase, turn, piece = Int32(0), Int32(0), Int32(0), Int32(0)
        cute.arch.mbarrier_wait(c.piece_full, 0)
        tiles = cute.arch.make_warp_uniform(c.piece[TILES, 0])
        while tiles > 0:
            for acc in accs:
                acc.fill(0.0)
            for _ in cutlass.range(tiles, unroll=1):
                buf = turn & 1
                cute.arch.mbarrier_wait(c.full + slot, phase)
                cute.arch.mbarrier_wait(c.p_full + buf, (turn >> 1) & 1)
                if c.need[0, buf] | c.need[1, buf] | c.need[2, buf] | c.need[3, buf] != 0:
                    self.multiply_rows(c, accs, c.factor, buf)
                if c.valid[slot] != FULL:
                    self.clear_unseen_codes(c, slot, half)
                self.multiply(c, accs, fresh, frag, b, buf, lines + slot * SLOT_BYTES)
                cute.arch.fence_view_async_shared()  # all of V is in registers
                self.release(c.empty + slot, c.rank)
                warpgroup.wait_group(0)
                self.arrive(c.p_empty + buf)
                turn += 1
                slot, phase = self.next_slot(slot, phase)
            index = piece & PIECES - 1
            cute.arch.mbarrier_wait(c.sum_full, piece & 1)
            self.multiply_rows(c, accs, c.inverse, None)
            cute.arch.fence_view_async_shared()  # the loads are done before the arrival
            self.arrive(c.sum_empty)
            self.store_columns(c, accs, index, half)
            if (c.piece[SPLIT_SLOT, index] >= 0) & (c.is_merged != 0):
                self.announce(c, index)
            self.arrive(c.piece_empty + index)
            piece += 1
            cute.arch.mbarrier_wait(c.piece_full + (piece & PIECES - 1), (piece >> PIECES_LOG2) & 1)
            tiles = cute.arch.make_warp_uniform(c.piece[TILES, piece & PIECES - 1])

    @cute.jit
    def multiply(
        self, c: cutlass.Constexpr, accs: cutlass.Constexpr, fresh: cute.Tensor, frag: cute.Tensor, b: cute.Tensor,
        buf: Int32, lines: Int32,
    ):  # fmt: skip
        """O^T += V^T P^T of one tile, 64 columns at a time into `fresh`, which fp32 additions add to O^T.

        The tensor cores add e4m3 products with fewer bits than fp32 has, and cut off: over many keys it adds up.
        """
        terms = self.config.terms
        words = cute.recast_tensor(frag, Int32)
        for k in cutlass.range_constexpr(2):
            self.read_values(words, k, k, lines, 0)
        for m in cutlass.range_constexpr(4):
            warpgroup.fence()
            for i in cutlass.range_constexpr(2 * terms):
                k, t = i % 2, i // 2
                cute.gemm(c.pv if i else c.pv_first, fresh, frag[None, None, k], b[None, None, k + 2 * t, buf], fresh)
            warpgroup.commit_group()
            warpgroup.wait_group(0)
            if const_expr(m < 3):
                for k in cutlass.range_constexpr(2):
                    self.read_values(words, k, k, lines, m + 1)
            for i in cutlass.range_constexpr(self.config.rows // 2):
                accs[m][i] = accs[m][i] + fresh[i]

    @cute.jit
    def multiply_rows(self, c: cutlass.Constexpr, accs: cutlass.Constexpr, factors: cute.Tensor, buf: Any):
        """O^T times a factor per query row; a thread holds rows 8 i + 2 (lane mod 4) and the one behind."""
        for i in cutlass.range_constexpr(self.config.rows // 8):
            row = 8 * i + (c.lane & 3) * 2
            if const_expr(buf is None):
                scale = c.descale_k[0]
                f0, f1 = factors[row] * scale, factors[row + 1] * scale
            else:
                f0, f1 = factors[row, buf], factors[row + 1, buf]
            for acc in accs:
                acc[i * 4 + 0] = acc[i * 4 + 0] * f0
                acc[i * 4 + 1] = acc[i * 4 + 1] * f1
                acc[i * 4 + 2] = acc[i * 4 + 2] * f0
                acc[i * 4 + 3] = acc[i * 4 + 3] * f1

    @cute.jit
    def read_values(
        self, words: cute.Tensor, at: cutlass.Constexpr, k: cutlass.Constexpr, lines: Int32, m: cutlass.Constexpr
    ):  # fmt: skip
        """The A fragment of 64 columns and 32 keys: a lane names the 16 bytes of one key, for its warp's 16 columns."""
        offset = m // 2 * BOX_BYTES + k * 32 * COLUMNS
        place = lines if const_expr(m % 2 == 0) else lines ^ 64
        found = cute.arch.inline_ptx(
            "{ .reg .b32 a, b, c, d; ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {a, b, c, d}, [{$r0} + "
            + str(offset)
            + "]; prmt.b32 {$w0}, a, b, 0x6420; prmt.b32 {$w1}, a, b, 0x7531;"
            " prmt.b32 {$w2}, c, d, 0x6420; prmt.b32 {$w3}, c, d, 0x7531; }",
            write_only_types=[Int32] * 4,
            read_only_args=[place],
        )
        for i in cutlass.range_constexpr(4):
            words[4 * at + i] = found[i]

    @cute.jit
    def clear_unseen_codes(self, c: cutlass.Constexpr, slot: Int32, half: Int32):
        """Zero the rows of V that no query row sees: 0 * NaN would be NaN. A row is 128 bytes of each 8 KB box."""
        head, count = c.valid[slot] >> HEAD_SHIFT, c.valid[slot] & MASKED - 1
        zero = cute.make_rmem_tensor(4, Int32)
        zero.fill(0)
        chunks = cute.make_tensor(
            cute.recast_ptr(c.s_ring.iterator, None, Int32), cute.make_layout((4, SLOT_BYTES // 16, self.config.slots))
        )
        for box in cutlass.range_constexpr(2):
            for begin, end in ((0, head), (count, 64)):
                chunk = begin * 8 + c.thread
                while chunk < end * 8:
                    cute.autovec_copy(zero, chunks[None, (2 * half + box) * (BOX_BYTES // 16) + chunk, slot])
                    chunk += 128
        cute.arch.fence_view_async_shared()
        # One barrier per half; their numbers are literals, a computed one would reserve all 16.
        if half == 0:
            cute.arch.barrier(barrier_id=1, number_of_threads=128)
        else:
            cute.arch.barrier(barrier_id=2, number_of_threads=128)

    @cute.jit
    def store_columns(self, c: cutlass.Constexpr, accs: cutlass.Constexpr, index: Int32, half: Int32):
        """O, divided by its sums: fp32 partials of a split request, else the output rows."""
        split_slot, rows = c.piece[SPLIT_SLOT, index], c.piece[S_Q, index] * c.heads
        token0, batch = c.piece[TOKEN0, index], c.piece[BATCH_COORD, index]
        lane = cute.arch.shuffle_sync_bfly(c.lane, 0)  # stays where it is written: hoisted, addresses would spill
        pair, line = lane >> 2, (lane & 3) * 2
        column = half * 256 + c.warp * 16 + pair * 2  # and m * 64
        if split_slot >= 0:
            # The order of `merge`: units of 16 rows x 8 columns, in it rows g and g + 8 and two columns side by side.
            block = c.out_accum[split_slot, c.kv_head * c.row_blocks + c.m_block, None].iterator
            target = block + ((column >> 3) * 128 + line * 16 + (pair & 3) * 4)
            units = cute.make_tensor(
                target.align(16), cute.make_layout((4, 2, 4, 4), stride=(1, 16, 64 * 128, 8 * 128))
            )
            four = cute.make_rmem_tensor(4, Float32)
            for m in cutlass.range_constexpr(4):
                for i in cutlass.range_constexpr(self.config.rows // 16):
                    for e in cutlass.range_constexpr(2):
                        for side in cutlass.range_constexpr(2):
                            four[2 * side] = accs[m][(2 * i + side) * 4 + e]
                            four[2 * side + 1] = accs[m][(2 * i + side) * 4 + 2 + e]
                        cute.autovec_copy(four, units[None, e, i, m])
        else:
            two = cute.make_rmem_tensor(2, self.dtype)
            word = cute.recast_tensor(two, Int32)
            for i in cutlass.range_constexpr(self.config.rows // 4):
                row = c.m_block * 64 + i // 2 * 8 + line + i % 2
                if row < rows:
                    token = row // c.heads
                    place = c.out[batch, token0 + token, (c.kv_head - token) * c.heads + row, None].iterator + column
                    words = cute.make_tensor(
                        cute.make_ptr(Int32, place.toint(), cute.AddressSpace.gmem, assumed_align=4),
                        cute.make_layout(128),
                    )
                    for m in cutlass.range_constexpr(4):
                        two[0] = accs[m][i // 2 * 4 + i % 2].to(self.dtype)
                        two[1] = accs[m][i // 2 * 4 + 2 + i % 2].to(self.dtype)
                        words[m * 32] = word[0]
