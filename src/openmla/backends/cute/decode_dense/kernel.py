"""Dense MLA decode for many query rows: bound by the tensor cores.

Computes
    For every query row r = (token, head) of a request and the keys j that it sees:
    s_j = scale_log2 * <q_r, k_j>    p_j = 2^(s_j - m)    out_r = sum_j p_j k_j[:512] / sum_j p_j    lse = m + log2 sum_j p_j
    with k the paged latent cache; the first 512 columns of a key are its value.

Shapes
    q [batch, s_q, h_q, d_qk], kv [num_pages, page_size, h_kv, d_qk], out [batch, s_q, h_q, 512]. The s_q * heads rows that
    share a KV head are packed (token, head) and cut into blocks of 64. A CTA takes one block and one part of the plan: a
    stretch of the line of 64-key tiles, in pieces of one request each.

Schedule (512 threads; time runs down; one tile of 64 keys per turn, about 2,600 clk, of which 2,176 are tensor work)
    loads (4 warps)         scores (warpgroup 0)                     values left | right (warpgroups 1 | 2)
    ring of 10 slots, 64    4 wgmmas of S(j) = Q K(j)^T              O += P(j-2) V(j-2), 256 columns each,
      keys x 128 columns:     maximum of S(j-1), moves the             until about a third of S(j) is done
      Q elements, tiles       reference if it is 2^8 above it
    RoPE slice              8 wgmmas with the exponentials of        each quarter of V read: its slot is free
    Q for shared memory       tile j-1 between them; P(j-1) out
    piece descriptors       24 wgmmas                                wait for P(j-1), rescale O if told to
                            all issued   -> gate left                left begins P(j-1) V(j-1)
                            all complete -> gate right               right begins P(j-1) V(j-1)
    The gates hold P V back until S is through: P V then covers maximum and exponentials, where the scores warpgroup
    feeds the tensor cores badly. Without them P V is done early and the tensor cores idle (10 % slower). The right half
    starts later so that slots come free in the order in which S(j+1) wants them.
    The turns run on across pieces: a piece's last probabilities are made during the next piece's first scores.

Budget (checked by tests/compile/test_decode_dense.py against tests/compile/budgets.toml)
    shared memory 231,424 of 232,448 bytes (1,024 are reserved); registers 168 scores, 160 values, 24 loads (x 128 = 65,536), no spills.

Synchronisation (mbarriers; the protocol is run as a model by tests/compile/test_decode_dense_protocol.py)
    full[slot]      loads -> scores (and, through P, values)       1 arrival + 16,384 bytes
    empty[slot]     values (Q elements: scores) -> loads           4 warps of every CTA of the cluster
    rope_full/empty, q_full/empty                                  as above; q_empty 4 warps
    p_full/empty[2] scores -> values / back                        4 warps / 8 warps
    go[half, 2]     scores -> values: the gates                    4 warps
    sum_full/empty  scores -> values: 1 / row sums                 4 / 8 warps
    piece_full/empty[4]  planner -> everybody                      1 / 15 warps

Cluster
    The CTAs of two row blocks read the same keys: each loads half of every tile and multicasts it. A slot is filled again
    only when both have left it, so they run in step.

Sources
    The gate, the split of O over two warpgroups and Q in registers were found by measuring prototypes of this project.
    Lazy rescale: FlashAttention-4's conditional rescaling. The plan format and the row packing are FlashMLA's.

Deep dive: docs/kernels/decode_dense.md
"""

from __future__ import annotations

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Boolean, Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warp, warpgroup
from cutlass.memory import SmemAllocator

from openmla.backends.cute.decode_dense.config import Config

THREADS = 512
REGS_SCORES, REGS_VALUES, REGS_LOADS = 168, 160, 24  # x 128 threads = 65,536
SLOT_BYTES = 64 * 128 * 2
SLICE_BYTES = 64 * 64 * 2
PIECES = 4  # descriptors between the planner and the other warps
EVICT_FIRST = 0x12F0000000000000
LN2 = 0.6931471805599453
FAULT_PAGE = 1
# A finite start for the running maximum: -inf would make -inf - -inf where a row has seen no key.
NO_MAXIMUM = -1.0e30
# Rescale O only when a score exceeds the reference by 2^8: P stays below 256, exact enough in bf16 and fp16.
LAZY_LOG2 = 8.0

# Fields of a piece descriptor: tiles (-1 ends the list), request, first tile, tokens of the request, the token where the
# piece ends, slot of its partial result (-1: none), first query token and how many, request coordinate of Q and out.
TILES, REQUEST, FIRST_BLOCK, LENGTH, STOP, SPLIT_SLOT, TOKEN0, S_Q, BATCH_COORD = range(9)
FIELDS = 10


class Scope:
    """Names that the warp roles share. Opaque to the tracer, which would thread a SimpleNamespace through every branch."""

    def __init__(self, **names: Any) -> None:
        self.__dict__.update(names)


class DecodeDense:
    """The launch (`__call__`) and the device code (`kernel` and one method per warp role)."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.dtype = cutlass.BFloat16 if config.dtype == "bf16" else cutlass.Float16
        self.smem_bytes = 0

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,  # [batch | 1, s_q | total_q, h_q, d_qk]
        kv: cute.Tensor,  # [num_pages, page_size, h_kv, d_qk]
        block_table: cute.Tensor,  # int32 [batch, max_pages]
        cache_seqlens: cute.Tensor,  # int32 [batch]
        cu_seqlens_q: cute.Tensor,  # int32 [batch + 1]; read only with is_varlen
        metadata: cute.Tensor,  # int32 [num_parts, 8]
        num_splits: cute.Tensor,  # int32 [batch + 1]
        out: cute.Tensor,  # [batch | 1, s_q | total_q, h_q, 512]
        lse: cute.Tensor,  # fp32 [batch | 1, h_q, s_q | total_q], natural log
        out_accum: cute.Tensor,  # fp32 [slots, h_kv * rows, 512]
        lse2_accum: cute.Tensor,  # fp32 [slots, h_kv * rows], base 2
        fault_word: cute.Tensor,  # int32 [1]
        s_q: Int32,  # tokens per request, the longest with is_varlen; rows = s_q * heads
        chunk_blocks: Int32,  # 0, or the piece length of batch_invariant
        is_causal: Int32,
        is_varlen: Int32,
        scale_log2: Float32,  # softmax_scale * log2(e), positive
        stream: cuda.CUstream,
    ):
        cfg, dtype = self.config, self.dtype
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, dtype)

        def tiled(*shape: int) -> Any:
            return cute.tile_to_shape(atom, shape, order=tuple(range(len(shape))))

        ring_layout, rope_layout, p_layout = tiled(64, 128, cfg.slots), tiled(64, 64, 1), tiled(64, 64, 2)
        q_layout = tiled(64, 64 * (cfg.q_slices - cfg.q_regs))

        def mma(n: int, b_major: Any, source: Any) -> Any:
            return sm90.make_trivial_tiled_mma(
                dtype, dtype, OperandMajorMode.K, b_major, Float32, (1, 1, 1), (64, n), source
            )

        qk_first = mma(64, OperandMajorMode.K, warpgroup.OperandSource.RMEM)  # overwrites S, the others add to it
        qk_rs = mma(64, OperandMajorMode.K, warpgroup.OperandSource.RMEM)
        qk_ss = mma(64, OperandMajorMode.K, warpgroup.OperandSource.SMEM)
        pv = mma(128, OperandMajorMode.MN, warpgroup.OperandSource.SMEM)

        heads = cfg.heads
        # rows (head, token) | column | KV head | request
        q_rows = cute.make_tensor(
            q.iterator,
            cute.make_layout(
                ((heads, q.shape[1]), q.shape[3], q.shape[2] // heads, q.shape[0]),
                stride=((q.stride[2], q.stride[1]), q.stride[3], q.stride[2] * heads, q.stride[0]),
            ),
        )
        kv_rows = cute.make_tensor(kv.iterator, cute.select(kv.layout, [1, 3, 2, 0]))
        load, box = cpasync.CopyBulkTensorTileG2SOp(), tiled(64, 64)
        load_kv = cpasync.CopyBulkTensorTileG2SMulticastOp() if cfg.cluster > 1 else load
        tma_kv, t_kv = cpasync.make_tiled_tma_atom(load_kv, kv_rows, box, (64, 64))
        tma_q, t_q = cpasync.make_tiled_tma_atom(load, q_rows, box, (64, 64))

        @cute.struct
        class Storage:
            full: cute.struct.MemRange[Int64, cfg.slots]
            empty: cute.struct.MemRange[Int64, cfg.slots]
            rope_full: cute.struct.MemRange[Int64, 1]
            rope_empty: cute.struct.MemRange[Int64, 1]
            q_full: cute.struct.MemRange[Int64, 1]
            q_empty: cute.struct.MemRange[Int64, 1]
            p_full: cute.struct.MemRange[Int64, 2]
            p_empty: cute.struct.MemRange[Int64, 2]
            go: cute.struct.MemRange[Int64, 4]
            sum_full: cute.struct.MemRange[Int64, 1]
            sum_empty: cute.struct.MemRange[Int64, 1]
            piece_full: cute.struct.MemRange[Int64, PIECES]
            piece_empty: cute.struct.MemRange[Int64, PIECES]
            piece: cute.struct.MemRange[Int32, FIELDS * PIECES]
            valid: cute.struct.MemRange[Int32, cfg.slots]
            need: cute.struct.MemRange[Int32, 2 * 4]
            factor: cute.struct.MemRange[Float32, 2 * 64]
            inverse: cute.struct.MemRange[Float32, 64]
            ring: cute.struct.Align[cute.struct.MemRange[dtype, cute.cosize(ring_layout)], 1024]
            rope: cute.struct.Align[cute.struct.MemRange[dtype, cute.cosize(rope_layout)], 1024]
            q: cute.struct.Align[cute.struct.MemRange[dtype, cute.cosize(q_layout)], 1024]
            p: cute.struct.Align[cute.struct.MemRange[dtype, cute.cosize(p_layout)], 1024]

        self.storage = Storage
        self.smem_bytes = Storage.size_in_bytes()
        m_blocks = cute.ceil_div(s_q * heads, 64)
        m_blocks = cute.ceil_div(m_blocks, cfg.cluster) * cfg.cluster
        self.kernel(
            tma_kv, t_kv, tma_q, t_q, block_table, cache_seqlens, cu_seqlens_q, metadata, num_splits, out, lse,
            out_accum, lse2_accum, fault_word, s_q, chunk_blocks, is_causal, is_varlen, scale_log2,
            Int32(kv.shape[0]), Int32(block_table.shape[1] * cfg.page_size), qk_first, qk_rs, qk_ss, pv,
            ring_layout, rope_layout, q_layout, p_layout,
        ).launch(
            grid=[m_blocks, q.shape[2] // heads, metadata.shape[0]],
            block=[THREADS, 1, 1],
            cluster=[cfg.cluster, 1, 1],
            min_blocks_per_mp=1,
            stream=stream,
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
        fault_word: cute.Tensor,
        s_q: Int32,
        chunk_blocks: Int32,
        is_causal: Int32,
        is_varlen: Int32,
        scale_log2: Float32,
        num_pages: Int32,
        capacity: Int32,
        qk_first: cute.TiledMma,
        qk_rs: cute.TiledMma,
        qk_ss: cute.TiledMma,
        pv: cute.TiledMma,
        ring_layout: cute.ComposedLayout,
        rope_layout: cute.ComposedLayout,
        q_layout: cute.ComposedLayout,
        p_layout: cute.ComposedLayout,
    ):
        cfg = self.config
        tidx, _, _ = cute.arch.thread_idx()
        m_block, kv_head, part = cute.arch.block_idx()
        # With more row blocks than one cluster holds, the clusters of a request follow each other through L2: whoever
        # leads waits for HBM and is caught up with. Prefetching would let it run away (3.7 instead of 2.5 GB read).
        is_sole_reader = cute.arch.grid_dim()[0] <= cfg.cluster
        warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        store = SmemAllocator().allocate(self.storage)
        pointer = lambda name: getattr(store, name).data_ptr()  # noqa: E731
        c = Scope(
            **{name: pointer(name) for name in (
                "full", "empty", "rope_full", "rope_empty", "q_full", "q_empty", "p_full", "p_empty", "go", "sum_full",
                "sum_empty", "piece_full", "piece_empty",
            )},
            piece=store.piece.get_tensor(cute.make_layout((FIELDS, PIECES))),
            valid=store.valid.get_tensor(cute.make_layout(cfg.slots)),
            need=store.need.get_tensor(cute.make_layout((4, 2))),
            factor=store.factor.get_tensor(cute.make_layout((64, 2))),
            inverse=store.inverse.get_tensor(cute.make_layout(64)),
            s_ring=store.ring.get_tensor(ring_layout.outer, swizzle=ring_layout.inner),
            s_rope=store.rope.get_tensor(rope_layout.outer, swizzle=rope_layout.inner),
            s_q=store.q.get_tensor(q_layout.outer, swizzle=q_layout.inner),
            s_p=store.p.get_tensor(p_layout.outer, swizzle=p_layout.inner),
            tma_kv=tma_kv, t_kv=t_kv, tma_q=tma_q, t_q=t_q, block_table=block_table, cache_seqlens=cache_seqlens,
            cu_seqlens_q=cu_seqlens_q, metadata=metadata, num_splits=num_splits, out=out, lse=lse,
            out_accum=out_accum, lse2_accum=lse2_accum, fault_word=fault_word, s_q_max=s_q,
            chunk_blocks=chunk_blocks, is_causal=is_causal, is_varlen=is_varlen, scale_log2=scale_log2,
            num_pages=num_pages, capacity=capacity, qk_first=qk_first, qk_rs=qk_rs, qk_ss=qk_ss, pv=pv,
            is_sole_reader=is_sole_reader, m_block=m_block, kv_head=kv_head, part=part, rank=m_block % cfg.cluster,
            thread=tidx % 128, warp=warp_idx % 4, lane=cute.arch.lane_idx(), warp_idx=warp_idx,
        )  # fmt: skip

        if warp_idx == 0:
            with cute.arch.elect_one():
                for pointer_, count, copies in (
                    (c.full, 1, cfg.slots),
                    (c.empty, 4 * cfg.cluster, cfg.slots),
                    (c.rope_full, 1, 1),
                    (c.rope_empty, 4 * cfg.cluster, 1),
                    (c.q_full, 1, 1),
                    (c.q_empty, 4, 1),
                    (c.p_full, 4, 2),
                    (c.p_empty, 8, 2),
                    (c.go, 4, 4),
                    (c.sum_full, 4, 1),
                    (c.sum_empty, 8, 1),
                    (c.piece_full, 1, PIECES),
                    (c.piece_empty, 12 + 2 + cfg.has_rope, PIECES),  # math warps and loaders
                ):
                    for i in range(copies):
                        cute.arch.mbarrier_init(pointer_ + i, count)
            cpasync.prefetch_descriptor(tma_kv)
            cpasync.prefetch_descriptor(tma_q)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        if const_expr(cfg.cluster > 1):
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()

        if warp_idx < 4:
            cute.arch.setmaxregister_increase(REGS_SCORES)
            self.scores(c)
        elif warp_idx < 12:
            cute.arch.setmaxregister_increase(REGS_VALUES)
            self.values(c)
        else:
            cute.arch.setmaxregister_decrease(REGS_LOADS)
            if warp_idx == 12:
                self.load_kv(c)
            elif warp_idx == 13:
                self.load_q(c)
            elif warp_idx == 14:
                if const_expr(cfg.has_rope):
                    self.load_rope(c)
            else:
                self.plan(c)
        if const_expr(cfg.cluster > 1):
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()

    # ------------------------------------------------------------------ small steps that several roles share

    @cute.jit
    def release(self, barrier: cutlass.Constexpr, rank: Int32):
        """One arrival of this warp, in every CTA of the cluster: a slot is free when nobody in any of them reads it."""
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(barrier)
            for other in cutlass.range_constexpr(1, self.config.cluster):
                cute.arch.mbarrier_arrive(barrier, rank ^ other)

    @cute.jit
    def arrive(self, barrier: cutlass.Constexpr):
        """One arrival of this warp."""
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(barrier)

    def q_tiles(self, c: Scope, boxes: cute.Tensor, token0: Int32, batch: Int32) -> Any:
        """This CTA's 64 rows of Q for copies into `boxes`: (shared, global) partitions, one entry per slice."""
        rows = cute.domain_offset(((0, token0), 0, 0, 0), c.t_q)
        tile = cute.local_tile(rows, (64, 64), (c.m_block, None, c.kv_head, batch))
        return cpasync.tma_partition(c.tma_q, 0, cute.make_layout(1), boxes, cute.group_modes(tile, 0, 2))

    # ------------------------------------------------------------------ planner

    @cute.jit
    def plan(self, c: cutlass.Constexpr):
        """Turn this part's stretch of the line into piece descriptors."""
        meta, fields = c.metadata, c.piece
        req, last = meta[c.part, 0], cutlass.min(meta[c.part, 1], c.cache_seqlens.shape[0] - 1)
        block, split = meta[c.part, 2], meta[c.part, 4]
        count = Int32(0)
        while req <= last:
            length = cutlass.min(cutlass.max(c.cache_seqlens[req], 0), c.capacity)
            end = (length + 63) // 64
            if req == meta[c.part, 1]:
                end = cutlass.min(end, meta[c.part, 3])
            step = c.chunk_blocks if c.chunk_blocks > 0 else cutlass.max(end - block, 1)
            stop = cutlass.max(end, block + 1)
            while block < stop:
                index = count % PIECES
                cute.arch.mbarrier_wait(c.piece_empty + index, ((count // PIECES) & 1) ^ 1)
                if c.lane == 0:
                    first_slot = c.num_splits[req]
                    is_split = c.num_splits[req + 1] - first_slot > 1
                    fields[TILES, index] = cutlass.max(cutlass.min(end - block, step), 1)  # an empty one is all masked
                    fields[REQUEST, index] = req
                    fields[FIRST_BLOCK, index] = block
                    fields[LENGTH, index] = length
                    fields[STOP, index] = cutlass.min((block + cutlass.min(end - block, step)) * 64, length)
                    fields[SPLIT_SLOT, index] = first_slot + split if is_split else Int32(-1)
                    token0, s_q, batch = Int32(0), c.s_q_max, req
                    if c.is_varlen != 0:
                        token0, batch = c.cu_seqlens_q[req], Int32(0)
                        s_q = cutlass.min(c.cu_seqlens_q[req + 1] - token0, c.s_q_max)
                    fields[TOKEN0, index] = token0
                    fields[S_Q, index] = s_q
                    fields[BATCH_COORD, index] = batch
                self.arrive(c.piece_full + index)
                count += 1
                block += step
                split += 1
            req += 1
            block, split = Int32(0), Int32(0)
        index = count % PIECES
        cute.arch.mbarrier_wait(c.piece_empty + index, ((count // PIECES) & 1) ^ 1)
        if c.lane == 0:
            fields[TILES, index] = Int32(-1)
        self.arrive(c.piece_full + index)

    # ------------------------------------------------------------------ loads

    @cute.jit
    def load_kv(self, c: cutlass.Constexpr):
        """Q's register slices and then the tiles of each piece, through the ring, as far ahead as slots are free."""
        cfg = self.config
        pages_tiles = cfg.page_size // 64
        g_kv = cute.local_tile(c.t_kv, (64, 64), (None, None, c.kv_head, None))  # [64, 64, row tile, column tile, page]
        boxes = cute.group_modes(cute.flat_divide(c.s_ring, (64, 64))[None, None, 0, None, None], 0, 2)
        s_kv, g_kv = cpasync.tma_partition(c.tma_kv, 0, cute.make_layout(1), boxes, cute.group_modes(g_kv, 0, 2))
        policy, everyone = Int64(EVICT_FIRST), cutlass.Int16((1 << cfg.cluster) - 1)
        valid = c.valid
        slot, phase, piece = Int32(0), Int32(1), Int32(0)
        cute.arch.mbarrier_wait(c.piece_full, 0)
        tiles = cute.arch.make_warp_uniform(c.piece[TILES, 0])
        while tiles > 0:
            index = piece % PIECES
            first = c.piece[FIRST_BLOCK, index]
            s_q, g_q = self.q_tiles(c, boxes, c.piece[TOKEN0, index], c.piece[BATCH_COORD, index])
            for e in cutlass.range_constexpr(cfg.q_regs // 2):
                cute.arch.mbarrier_wait(c.empty + slot, phase)
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(c.full + slot, SLOT_BYTES)
                for s in cutlass.range_constexpr(2):
                    cute.copy(
                        c.tma_q, g_q[None, 2 * e + s], s_q[None, s, slot],
                        tma_bar_ptr=c.full + slot, cache_policy=policy,
                    )  # fmt: skip
                slot += 1
                if slot == cfg.slots:
                    slot = Int32(0)
                    phase ^= 1
            page = Int32(0)
            for j in cutlass.range(tiles, unroll=1):
                if j % 16 == 0:  # page ids of 32 tiles, one per lane, so that 16 tiles can be looked ahead
                    ahead = j + c.lane
                    # Beyond the tensor map the copy engine fills with zeros, and no token counts.
                    page = c.num_pages
                    if (ahead < tiles) & ((first + ahead) * 64 < c.piece[STOP, index]):
                        page = c.block_table[c.piece[REQUEST, index], (first + ahead) // pages_tiles]
                        if (page < 0) | (page >= c.num_pages):
                            page = c.num_pages
                            cute.arch.atomic_or(c.fault_word.iterator, Int32(FAULT_PAGE))
                here = cute.arch.shuffle_sync(page, j % 16)
                if const_expr(cfg.prefetch > 0):
                    if (j + cfg.prefetch < tiles) & c.is_sole_reader:
                        later = cute.arch.shuffle_sync(page, j % 16 + cfg.prefetch)
                        later_tile = (first + j + cfg.prefetch) % pages_tiles
                        for e in cutlass.range_constexpr(8 // cfg.cluster):
                            column = cfg.cluster * e + c.rank
                            cute.prefetch(c.tma_kv, g_kv[None, later_tile, column, later])
                count = cutlass.min(c.piece[STOP, index] - (first + j) * 64, 64) if here < c.num_pages else Int32(0)
                row_tile = (first + j) % pages_tiles
                for e in cutlass.range_constexpr(4):
                    cute.arch.mbarrier_wait(c.empty + slot, phase)
                    with cute.arch.elect_one():
                        valid[slot] = count
                        cute.arch.mbarrier_arrive_and_expect_tx(c.full + slot, SLOT_BYTES)
                    if const_expr(cfg.cluster > 1):
                        # Box b of a tile is loaded by CTA b % cluster for all of them.
                        if const_expr(cfg.cluster == 2) or c.rank // 2 == e % 2:
                            cute.copy(
                                c.tma_kv, g_kv[None, row_tile, 2 * e + c.rank % 2, here], s_kv[None, c.rank % 2, slot],
                                tma_bar_ptr=c.full + slot, cache_policy=policy, mcast_mask=everyone,
                            )  # fmt: skip
                    else:
                        for s in cutlass.range_constexpr(2):
                            cute.copy(
                                c.tma_kv, g_kv[None, row_tile, 2 * e + s, here], s_kv[None, s, slot],
                                tma_bar_ptr=c.full + slot, cache_policy=policy,
                            )  # fmt: skip
                    slot += 1
                    if slot == cfg.slots:
                        slot = Int32(0)
                        phase ^= 1
            self.arrive(c.piece_empty + index)
            piece += 1
            cute.arch.mbarrier_wait(c.piece_full + piece % PIECES, (piece // PIECES) & 1)
            tiles = cute.arch.make_warp_uniform(c.piece[TILES, piece % PIECES])

    @cute.jit
    def load_rope(self, c: cutlass.Constexpr):
        """The ninth slice of every tile; the CTAs of a cluster take turns and multicast."""
        cfg = self.config
        pages_tiles = cfg.page_size // 64
        g_kv = cute.local_tile(c.t_kv, (64, 64), (None, None, c.kv_head, None))
        s_kv, g_kv = cpasync.tma_partition(
            c.tma_kv, 0, cute.make_layout(1), cute.group_modes(c.s_rope, 0, 2), cute.group_modes(g_kv, 0, 2)
        )
        policy, everyone = Int64(EVICT_FIRST), cutlass.Int16((1 << cfg.cluster) - 1)
        turn, piece = Int32(0), Int32(0)
        cute.arch.mbarrier_wait(c.piece_full, 0)
        tiles = cute.arch.make_warp_uniform(c.piece[TILES, 0])
        while tiles > 0:
            index = piece % PIECES
            first = c.piece[FIRST_BLOCK, index]
            page = Int32(0)
            for j in cutlass.range(tiles, unroll=1):
                if j % 16 == 0:
                    ahead = j + c.lane
                    page = c.num_pages
                    if (ahead < tiles) & ((first + ahead) * 64 < c.piece[STOP, index]):
                        page = c.block_table[c.piece[REQUEST, index], (first + ahead) // pages_tiles]
                        if (page < 0) | (page >= c.num_pages):
                            page = c.num_pages
                here = cute.arch.shuffle_sync(page, j % 16)
                if const_expr(cfg.prefetch > 0):
                    if (j + cfg.prefetch < tiles) & c.is_sole_reader & ((turn + cfg.prefetch) % cfg.cluster == c.rank):
                        later = cute.arch.shuffle_sync(page, j % 16 + cfg.prefetch)
                        later_tile = (first + j + cfg.prefetch) % pages_tiles
                        cute.prefetch(c.tma_kv, g_kv[None, later_tile, 8, later])
                row_tile = (first + j) % pages_tiles
                cute.arch.mbarrier_wait(c.rope_empty, (turn & 1) ^ 1)
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(c.rope_full, SLICE_BYTES)
                if const_expr(cfg.cluster > 1):
                    if turn % cfg.cluster == c.rank:
                        cute.copy(
                            c.tma_kv, g_kv[None, row_tile, 8, here], s_kv[None, 0],
                            tma_bar_ptr=c.rope_full, cache_policy=policy, mcast_mask=everyone,
                        )  # fmt: skip
                else:
                    cute.copy(
                        c.tma_kv, g_kv[None, row_tile, 8, here], s_kv[None, 0],
                        tma_bar_ptr=c.rope_full, cache_policy=policy,
                    )  # fmt: skip
                turn += 1
            self.arrive(c.piece_empty + index)
            piece += 1
            cute.arch.mbarrier_wait(c.piece_full + piece % PIECES, (piece // PIECES) & 1)
            tiles = cute.arch.make_warp_uniform(c.piece[TILES, piece % PIECES])

    @cute.jit
    def load_q(self, c: cutlass.Constexpr):
        """The slices of Q that stay in shared memory, as soon as the piece before has made its last scores."""
        cfg = self.config
        kept = cfg.q_slices - cfg.q_regs
        boxes = cute.group_modes(cute.flat_divide(c.s_q, (64, 64))[None, None, 0, None], 0, 2)
        policy = Int64(EVICT_FIRST)
        piece = Int32(0)
        cute.arch.mbarrier_wait(c.piece_full, 0)
        tiles = cute.arch.make_warp_uniform(c.piece[TILES, 0])
        while tiles > 0:
            index = piece % PIECES
            s_q, g_q = self.q_tiles(c, boxes, c.piece[TOKEN0, index], c.piece[BATCH_COORD, index])
            if const_expr(cfg.prefetch > 0):
                for x in cutlass.range_constexpr(kept):
                    cute.prefetch(c.tma_q, g_q[None, cfg.q_regs + x])
            cute.arch.mbarrier_wait(c.q_empty, (piece & 1) ^ 1)
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(c.q_full, kept * SLICE_BYTES)
            for s in cutlass.range_constexpr(kept):
                cute.copy(
                    c.tma_q, g_q[None, cfg.q_regs + s], s_q[None, s],
                    tma_bar_ptr=c.q_full, cache_policy=policy,
                )  # fmt: skip
            self.arrive(c.piece_empty + index)
            piece += 1
            cute.arch.mbarrier_wait(c.piece_full + piece % PIECES, (piece // PIECES) & 1)
            tiles = cute.arch.make_warp_uniform(c.piece[TILES, piece % PIECES])

    # ------------------------------------------------------------------ S = Q K^T and the softmax

    @cute.jit
    def scores(self, c: cutlass.Constexpr):
        """S of one tile on the tensor cores; between the wgmmas, probabilities of the tile before."""
        cfg = self.config
        c.qk_first.set(warpgroup.Field.ACCUMULATE, False)
        c.qk_rs.set(warpgroup.Field.ACCUMULATE, True)
        c.qk_ss.set(warpgroup.Field.ACCUMULATE, True)
        thr = c.qk_ss.get_slice(c.thread)
        s = Scope(
            a_smem=c.qk_ss.make_fragment_A(thr.partition_A(c.s_q)),
            b_ring=c.qk_ss.make_fragment_B(thr.partition_B(c.s_ring)),
            b_rope=c.qk_ss.make_fragment_B(thr.partition_B(c.s_rope)),
            a_regs=[c.qk_rs.make_fragment_A(c.qk_rs.partition_shape_A((64, 128))) for _ in range(cfg.q_regs // 2)],
            row0=c.warp * 16 + c.lane // 4,
        )  # fmt: skip
        acc = c.qk_ss.make_fragment_C(c.qk_ss.partition_shape_C((64, 64)))
        dist = cute.make_rmem_tensor(32, Float32)  # score - reference of the tile before, in the layout of acc
        load_a = cute.make_tiled_copy_A(cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, 4), self.dtype), c.qk_rs)
        thr_a = load_a.get_slice(c.thread)
        s.packed = cute.make_rmem_tensor(acc.layout, self.dtype)
        s.probabilities = cute.make_rmem_tensor(32, Float32)
        s.store = cute.make_tiled_copy_C(cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), self.dtype), c.qk_ss)
        thr_p = s.store.get_slice(c.thread)
        s.p_from, s.p_to = thr_p.retile(s.packed), thr_p.partition_D(c.s_p)

        # Before the first tile stands one of zeros, which the value warpgroups take and drop: no branch divides the wgmmas.
        dist.fill(-Float32.inf)
        m0, m1, l0, l1 = Float32(NO_MAXIMUM), Float32(NO_MAXIMUM), Float32(0.0), Float32(0.0)
        # Every phase follows from a running count: ring slots filled, tiles, pieces.
        slot, phase, count, piece = Int32(0), Int32(0), Int32(0), Int32(0)
        cute.arch.mbarrier_wait(c.piece_full, 0)
        tiles = cute.arch.make_warp_uniform(c.piece[TILES, 0])
        while tiles > 0:
            index = piece % PIECES
            # tiles before this one are seen by every row, where their pages are good
            plain = c.piece[LENGTH, index] // 64
            if c.is_causal != 0:
                plain = (c.piece[LENGTH, index] - c.piece[S_Q, index] + 1) // 64
            plain = cute.arch.make_warp_uniform(plain - c.piece[FIRST_BLOCK, index])
            for e in cutlass.range_constexpr(cfg.q_regs // 2):
                cute.arch.mbarrier_wait(c.full + slot, phase)
                cute.copy(load_a, thr_a.partition_S(c.s_ring[None, None, slot]), thr_a.retile(s.a_regs[e]))
                # An arrival may overtake loads that wait behind the stores of an epilogue: let them finish first.
                cute.arch.fence_view_async_shared()
                self.release(c.empty + slot, c.rank)
                slot, phase = self.next_slot(slot, phase)
            for j in cutlass.range(tiles, unroll=1):
                slot, phase, m0, m1, l0, l1 = self.step(
                    c, s, acc, dist, slot, phase, count, piece, tiles, j, plain, m0, m1, l0, l1
                )
                count += 1
            piece += 1
            cute.arch.mbarrier_wait(c.piece_full + piece % PIECES, (piece // PIECES) & 1)
            tiles = cute.arch.make_warp_uniform(c.piece[TILES, piece % PIECES])
        if count > 0:
            m0, m1, l0, l1, f0, f1, need = self.reference(c, dist, m0, m1, l0, l1)
            l0, l1 = self.finish(c, s, dist, count, f0, f1, need, l0, l1)
            self.sums(c, s, piece - 1, m0, m1, l0, l1)

    @cute.jit
    def next_slot(self, slot: Int32, phase: Int32):
        """The ring position after this one."""
        slot += 1
        if slot == self.config.slots:
            slot = Int32(0)
            phase ^= 1
        return slot, phase

    @cute.jit
    def exponential(
        self,
        c: cutlass.Constexpr,
        s: cutlass.Constexpr,
        acc: cute.Tensor,
        x: cutlass.Constexpr,
        l0: Float32,
        l1: Float32,
    ):
        """One probability, 2^(score - reference), added to its row's sum."""
        probabilities = s.probabilities
        value = cute.math.exp2(acc[x], fastmath=True)
        probabilities[x] = value
        if const_expr((x // 2) % 2 == 0):
            l0 += value
        else:
            l1 += value
        return l0, l1

    @cute.jit
    def store_p(self, c: cutlass.Constexpr, s: cutlass.Constexpr, k: cutlass.Constexpr, buf: Int32):
        """The 16 columns of k-step `k`, one stmatrix per warp."""
        packed = s.packed
        for i in cutlass.range_constexpr(8):
            packed[8 * k + i] = s.probabilities[8 * k + i].to(self.dtype)
        cute.copy(s.store, s.p_from[(None, k), None, None], s.p_to[(None, k), None, None, buf])

    @cute.jit
    def publish(self, c: cutlass.Constexpr, s: cutlass.Constexpr, buf: Int32, f0: Float32, f1: Float32, need: Int32):
        """P and, when the reference moved, the factors of O, for the value warpgroups."""
        factor, flag = c.factor, c.need
        if need != 0:
            if c.lane % 4 == 0:
                factor[s.row0, buf] = f0
                factor[s.row0 + 8, buf] = f1
        if c.lane == 0:
            flag[c.warp, buf] = need
        # The tensor cores read P through the async proxy.
        cute.arch.fence_view_async_shared()
        self.arrive(c.p_full + buf)

    @cute.jit
    def step(
        self, c: cutlass.Constexpr, s: cutlass.Constexpr, acc: cute.Tensor, dist: cute.Tensor, slot: Int32,
        phase: Int32, count: Int32, piece: Int32, tiles: Int32, j: Int32, plain: Int32, m0: Float32, m1: Float32,
        l0: Float32, l1: Float32,
    ):  # fmt: skip
        """The scores of tile j on the tensor cores; meanwhile tile j - 1, in `dist`, becomes probabilities.

        Its maximum is found behind the first 8 wgmmas (the queue of the tensor cores holds about that many), its
        exponentials stand between the others.
        """
        cfg = self.config
        steps = [0, 1, 2, -1, 3] if cfg.has_rope else [0, 1, 2, 3]
        buf = count & 1  # of the tile before; the value warpgroups count from 1
        f0, f1, need = Float32(1.0), Float32(1.0), Int32(0)
        valid = Int32(0)
        issued = 0
        done = 0
        for e in steps:
            if const_expr(e < 0):
                cute.arch.mbarrier_wait(c.rope_full, count & 1)
            else:
                cute.arch.mbarrier_wait(c.full + slot, phase)
            if const_expr(e == cfg.q_regs // 2):  # the first that reads Q from shared memory
                cute.arch.mbarrier_wait(c.q_full, piece & 1)
            if const_expr(issued == 0):
                valid = c.valid[slot]
                warpgroup.fence()
            for k in cutlass.range_constexpr(4 if e < 0 else 8):
                column = 4 * 8 + k if e < 0 else 8 * e + k
                if const_expr(column < 4 * cfg.q_regs):
                    cute.gemm(
                        c.qk_rs if issued else c.qk_first, acc, s.a_regs[column // 8][None, None, column % 8],
                        s.b_ring[None, None, k, slot], acc,
                    )  # fmt: skip
                else:
                    b = s.b_rope[None, None, k, 0] if e < 0 else s.b_ring[None, None, k, slot]
                    cute.gemm(c.qk_ss, acc, s.a_smem[None, None, column - 4 * cfg.q_regs], b, acc)
                if const_expr(issued == cfg.exp_start):
                    m0, m1, l0, l1, f0, f1, need = self.reference(c, dist, m0, m1, l0, l1)
                    cute.arch.mbarrier_wait(c.p_empty + buf, ((count >> 1) & 1) ^ 1)
                for _ in cutlass.range_constexpr(cfg.exp_each):
                    if const_expr(issued > cfg.exp_start and done < 32):
                        l0, l1 = self.exponential(c, s, dist, done, l0, l1)
                        done += 1
                        if const_expr(done % 8 == 0):
                            self.store_p(c, s, done // 8 - 1, buf)
                        if const_expr(done == 32):
                            self.publish(c, s, buf, f0, f1, need)
                if const_expr(issued == cfg.gate_left):
                    self.arrive(c.go + buf)
                if const_expr(issued == cfg.gate_right):
                    self.arrive(c.go + 2 + buf)
                issued += 1
            if const_expr(e >= 0):
                slot, phase = self.next_slot(slot, phase)
        warpgroup.commit_group()
        if const_expr(cfg.gate_left == -1):
            self.arrive(c.go + buf)
        if const_expr(cfg.gate_right == -1):
            self.arrive(c.go + 2 + buf)
        warpgroup.wait_group(0)
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            if const_expr(cfg.gate_left == -2):
                cute.arch.mbarrier_arrive(c.go + buf)
            if const_expr(cfg.gate_right == -2):
                cute.arch.mbarrier_arrive(c.go + 2 + buf)
            if const_expr(cfg.has_rope):
                cute.arch.mbarrier_arrive(c.rope_empty)
                for other in cutlass.range_constexpr(1, cfg.cluster):
                    cute.arch.mbarrier_arrive(c.rope_empty, c.rank ^ other)
        for x in cutlass.range_constexpr(32):
            dist[x] = acc[x] * c.scale_log2
        if (valid < 64) | (j >= plain) | (j == 0) | (j + 1 == tiles):
            if j + 1 == tiles:
                self.arrive(c.q_empty)
            if j == 0:
                if count > 0:
                    self.sums(c, s, piece - 1, m0, m1, l0, l1)
                m0, m1, l0, l1 = Float32(NO_MAXIMUM), Float32(NO_MAXIMUM), Float32(0.0), Float32(0.0)
            if (valid < 64) | (j >= plain):
                self.mask(c, s, dist, piece, j, valid)
        return slot, phase, m0, m1, l0, l1

    @cute.jit
    def reference(self, c: cutlass.Constexpr, dist: cute.Tensor, m0: Float32, m1: Float32, l0: Float32, l1: Float32):
        """Move the reference of a row when a score exceeds it by 2^8; leave score - reference in `dist`.

        The reference is one of the scores, scaled and rounded like all: the difference of the largest is exactly 0,
        whatever its size. (One fused multiply-add would round differently and make 2^(1e5) of a logit of 1e12.)
        """
        f0, f1 = Float32(1.0), Float32(1.0)
        x0, x1 = dist[0], dist[2]
        for i in cutlass.range_constexpr(8):
            x0 = cute.arch.fmax(x0, cute.arch.fmax(dist[i * 4 + 0], dist[i * 4 + 1]))
            x1 = cute.arch.fmax(x1, cute.arch.fmax(dist[i * 4 + 2], dist[i * 4 + 3]))
        over = cute.arch.fmax(x0 - m0, x1 - m1) > Float32(LAZY_LOG2)
        need = Int32(1) if cute.arch.vote_any_sync(over) else Int32(0)
        if need != 0:
            for d in (1, 2):
                x0 = cute.arch.fmax(x0, cute.arch.shuffle_sync_bfly(x0, d))
                x1 = cute.arch.fmax(x1, cute.arch.shuffle_sync_bfly(x1, d))
            n0, n1 = cute.arch.fmax(m0, x0), cute.arch.fmax(m1, x1)
            f0 = cute.math.exp2(m0 - n0, fastmath=True)
            f1 = cute.math.exp2(m1 - n1, fastmath=True)
            l0, l1, m0, m1 = l0 * f0, l1 * f1, n0, n1
        for x in cutlass.range_constexpr(32):
            dist[x] = dist[x] - (m0 if (x // 2) % 2 == 0 else m1)
        return m0, m1, l0, l1, f0, f1, need

    @cute.jit
    def mask(self, c: cutlass.Constexpr, s: cutlass.Constexpr, acc: cute.Tensor, piece: Int32, j: Int32, count: Int32):
        """Scores of keys that a row does not see become -inf: selected, so that a NaN there does not matter."""
        index = piece % PIECES
        lim0, lim1 = count, count
        if c.is_causal != 0:
            left = c.piece[LENGTH, index] - (c.piece[FIRST_BLOCK, index] + j) * 64 - c.piece[S_Q, index] + 1
            row = c.m_block * 64 + s.row0
            lim0 = cutlass.min(count, left + row // self.config.heads)
            lim1 = cutlass.min(count, left + (row + 8) // self.config.heads)
        for x in cutlass.range_constexpr(32):
            column = (x // 4) * 8 + (c.lane % 4) * 2 + x % 2
            if column >= (lim0 if (x // 2) % 2 == 0 else lim1):
                acc[x] = -Float32.inf

    @cute.jit
    def finish(
        self, c: cutlass.Constexpr, s: cutlass.Constexpr, acc: cute.Tensor, count: Int32, f0: Float32, f1: Float32,
        need: Int32, l0: Float32, l1: Float32,
    ):  # fmt: skip
        """The probabilities of a piece's last tile: nothing to overlap with, so both gates open at once."""
        buf = count & 1
        cute.arch.mbarrier_wait(c.p_empty + buf, ((count >> 1) & 1) ^ 1)
        for k in cutlass.range_constexpr(4):
            for i in cutlass.range_constexpr(8):
                l0, l1 = self.exponential(c, s, acc, 8 * k + i, l0, l1)
            self.store_p(c, s, k, buf)
        self.publish(c, s, buf, f0, f1, need)
        self.arrive(c.go + buf)
        self.arrive(c.go + 2 + buf)
        return l0, l1

    @cute.jit
    def sums(
        self, c: cutlass.Constexpr, s: cutlass.Constexpr, piece: Int32, m0: Float32, m1: Float32, l0: Float32,
        l1: Float32,
    ):  # fmt: skip
        """Row sums to the value warpgroups, log-sum-exp to memory."""
        for d in (1, 2):
            l0 += cute.arch.shuffle_sync_bfly(l0, d)
            l1 += cute.arch.shuffle_sync_bfly(l1, d)
        index = piece % PIECES
        cute.arch.mbarrier_wait(c.sum_empty, (piece & 1) ^ 1)
        shared_inverse, lse, lse2_accum = c.inverse, c.lse, c.lse2_accum
        if c.lane % 4 == 0:
            heads = self.config.heads
            split_slot, s_q = c.piece[SPLIT_SLOT, index], c.piece[S_Q, index]
            token0, batch = c.piece[TOKEN0, index], c.piece[BATCH_COORD, index]
            for half in cutlass.range_constexpr(2):
                m, l = (m0, l0) if half == 0 else (m1, l1)  # noqa: E741
                row = c.m_block * 64 + s.row0 + 8 * half
                inverse, lse2 = Float32(0.0), -Float32.inf
                if l > 0.0:
                    inverse = Float32(1.0) / l
                    lse2 = m + cute.math.log2(l)
                shared_inverse[s.row0 + 8 * half] = inverse
                if row < s_q * heads:
                    if split_slot >= 0:
                        lse2_accum[split_slot, c.kv_head * c.s_q_max * heads + row] = lse2
                    else:
                        lse[batch, c.kv_head * heads + row % heads, token0 + row // heads] = lse2 * Float32(LN2)
        self.arrive(c.sum_full)
        self.arrive(c.piece_empty + index)

    # ------------------------------------------------------------------ O += P V

    @cute.jit
    def values(self, c: cutlass.Constexpr):
        """Half of O's columns: P from the exchange into registers, V from the ring, O in registers."""
        cfg = self.config
        half = c.warp_idx // 4 - 1
        pv = c.pv
        s_v = cute.make_tensor(c.s_ring.iterator, cute.select(c.s_ring.layout, [1, 0, 2]))
        b = pv.make_fragment_B(pv.get_slice(c.thread).partition_B(s_v))
        a = pv.make_fragment_A(pv.get_slice(c.thread).partition_A(c.s_p))
        accs = [pv.make_fragment_C(pv.partition_shape_C((64, 128))) for _ in range(2)]
        row0 = c.warp * 16 + c.lane // 4
        pv.set(warpgroup.Field.ACCUMULATE, True)
        slot, tile, piece = 2 * half, Int32(1), Int32(0)  # slot of this half's first quarter; P's; pieces
        cute.arch.mbarrier_wait(c.piece_full, 0)
        tiles = cute.arch.make_warp_uniform(c.piece[TILES, 0])
        if tiles > 0:
            cute.arch.mbarrier_wait(c.go + half * 2, 0)  # the zeros before the first tile
            self.arrive(c.p_empty)
        while tiles > 0:
            for acc in accs:
                acc.fill(0.0)
            slot += cfg.q_regs // 2
            for _ in cutlass.range(tiles, unroll=1):
                if slot >= cfg.slots:
                    slot -= cfg.slots
                slot1 = slot + 1 if slot + 1 < cfg.slots else Int32(0)
                buf = tile & 1
                cute.arch.mbarrier_wait(c.p_full + buf, (tile >> 1) & 1)
                if c.need[c.warp, buf] != 0:
                    f0, f1 = c.factor[row0, buf], c.factor[row0 + 8, buf]
                    for acc in accs:
                        for i in cutlass.range_constexpr(16):
                            acc[i * 4 + 0] = acc[i * 4 + 0] * f0
                            acc[i * 4 + 1] = acc[i * 4 + 1] * f0
                            acc[i * 4 + 2] = acc[i * 4 + 2] * f1
                            acc[i * 4 + 3] = acc[i * 4 + 3] * f1
                if c.valid[slot] < 64:
                    self.clear_tail(c, slot, slot1, half)
                cute.arch.mbarrier_wait(c.go + half * 2 + buf, (tile >> 1) & 1)
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
                tile += 1
            if slot >= cfg.slots:
                slot -= cfg.slots
            cute.arch.mbarrier_wait(c.sum_full, piece & 1)
            f0, f1 = c.inverse[row0], c.inverse[row0 + 8]
            for acc in accs:
                for i in cutlass.range_constexpr(16):
                    acc[i * 4 + 0] = acc[i * 4 + 0] * f0
                    acc[i * 4 + 1] = acc[i * 4 + 1] * f0
                    acc[i * 4 + 2] = acc[i * 4 + 2] * f1
                    acc[i * 4 + 3] = acc[i * 4 + 3] * f1
            cute.arch.fence_view_async_shared()  # the loads are done before the arrival
            self.arrive(c.sum_empty)
            self.store_out(c, accs, piece % PIECES, half, row0)
            self.arrive(c.piece_empty + piece % PIECES)
            piece += 1
            cute.arch.mbarrier_wait(c.piece_full + piece % PIECES, (piece // PIECES) & 1)
            tiles = cute.arch.make_warp_uniform(c.piece[TILES, piece % PIECES])

    @cute.jit
    def clear_tail(self, c: cutlass.Constexpr, slot: Int32, slot1: Int32, half: Int32):
        """Zero the rows of V behind the last token: 0 * NaN would be NaN. A row is 128 bytes of each 8 KB box."""
        count = c.valid[slot]
        zero = cute.make_rmem_tensor(4, Int32)
        zero.fill(0)
        words = cute.make_tensor(
            cute.recast_ptr(c.s_ring.iterator, None, Int32), cute.make_layout((4, 1024, self.config.slots))
        )
        for box in cutlass.range_constexpr(4):
            where = slot if box < 2 else slot1
            chunk = count * 8 + c.thread
            while chunk < 512:
                cute.autovec_copy(zero, words[None, chunk + 512 * (box % 2), where])
                chunk += 128
        cute.arch.fence_view_async_shared()
        # One barrier per half; their numbers are literals, a computed one would reserve all 16.
        if half == 0:
            cute.arch.barrier(barrier_id=1, number_of_threads=128)
        else:
            cute.arch.barrier(barrier_id=2, number_of_threads=128)

    @cute.jit
    def store_out(
        self, c: cutlass.Constexpr, accs: cutlass.Constexpr, index: Int32, half: Int32, row0: Int32,
    ):  # fmt: skip
        """O, divided by its sums: fp32 partials of a split request, else the output rows."""
        heads = self.config.heads
        split_slot, rows = c.piece[SPLIT_SLOT, index], c.piece[S_Q, index] * heads
        token0, batch = c.piece[TOKEN0, index], c.piece[BATCH_COORD, index]
        for side in cutlass.range_constexpr(2):
            row = c.m_block * 64 + row0 + 8 * side
            # Lanes exchange values, so all take part; those of rows behind the end do not store.
            if split_slot >= 0:
                line = c.out_accum[split_slot, c.kv_head * c.s_q_max * heads + row, None]
                self.store_row(line, accs, c, half, side, row < rows, Float32)
            else:
                line = c.out[batch, token0 + row // heads, c.kv_head * heads + row % heads, None]
                self.store_row(line, accs, c, half, side, row < rows, self.dtype)

    @cute.jit
    def store_row(
        self, line: cute.Tensor, accs: cutlass.Constexpr, c: cutlass.Constexpr, half: Int32,
        side: cutlass.Constexpr, is_row: Boolean, dtype: cutlass.Constexpr,
    ):  # fmt: skip
        """Half a row from the four lanes that share it, as 16-byte stores.

        A lane holds column pairs 8 i + 2 lane; in groups of 16 bytes per pair count (4 for 16-bit elements, 2 for fp32)
        the lanes transpose, so that each ends with adjacent columns. Pairs stored as they are cost four times (16-bit)
        or twice (fp32) as many store instructions, 4,000 cycles of a piece's epilogue.
        """
        # Through a shuffle, which stays where it is written: addresses hoisted out of the piece loop would spill.
        quad = cute.arch.shuffle_sync_bfly(c.lane, 0) % 4
        groups = 4 if const_expr(dtype.width == 16) else 2
        column = half * 256 + (quad * 8 if const_expr(groups == 4) else quad % 2 * 8 + quad // 2 * 4)
        base = cute.make_ptr(dtype, (line.iterator + column).toint(), cute.AddressSpace.gmem, assumed_align=16)
        pairs = cute.make_rmem_tensor(cute.make_layout((2, groups), stride=(1, 2)), dtype)
        words = cute.recast_tensor(cute.make_tensor(pairs.iterator, cute.make_layout(2 * groups)), Int32)
        per = 4 // groups  # 32-bit words of a pair
        for h in cutlass.range_constexpr(2):
            for i in cutlass.range_constexpr(0, 16, groups):
                for g in cutlass.range_constexpr(groups):
                    pairs[0, g] = accs[h][(i + g) * 4 + 2 * side].to(dtype)
                    pairs[1, g] = accs[h][(i + g) * 4 + 2 * side + 1].to(dtype)
                for step in (1, 2):
                    if const_expr(step < groups):
                        odd = (quad & step) != 0
                        for g in cutlass.range_constexpr(groups):
                            if const_expr(g & step == 0):
                                for w in cutlass.range_constexpr(per):
                                    low, high = words[g * per + w], words[(g + step) * per + w]
                                    sent = cute.arch.shuffle_sync_bfly(low if odd else high, step)
                                    words[g * per + w] = sent if odd else low
                                    words[(g + step) * per + w] = high if odd else sent
                if is_row:
                    cute.autovec_copy(
                        cute.make_tensor(pairs.iterator, cute.make_layout(2 * groups)),
                        cute.make_tensor(base + (h * 128 + i * 8), cute.make_layout(2 * groups)),
                    )
