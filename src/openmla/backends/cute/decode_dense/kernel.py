"""Dense MLA decode for many query rows: bound by the tensor cores.

Computes
    For every query row r = (token, head) of a request and the keys j that it sees:
    s_j = scale_log2 * <q_r, k_j>    p_j = 2^(s_j - m)    out_r = sum_j p_j k_j[:512] / sum_j p_j    lse = m + log2 sum_j p_j
    with k the paged latent cache; the first 512 columns of a key are its value.

Shapes
    q [batch, s_q, h_q, d_qk], kv [num_pages, page_size, h_kv, d_qk], out [batch, s_q, h_q, 512]. The s_q * heads rows that
    share a KV head are packed (token, head) and cut into blocks of 64; any number of heads, the last block may be part
    empty. A CTA takes one block and one part of the plan: a list of ranges of 64-key tiles, in pieces of one request each.

Schedule (512 threads; time runs down; one tile of 64 keys per turn)
    loads (4 warps)         scores (warpgroup 0)                     values left | right (warpgroups 1 | 2)
    ring of 10 slots, 64    36 wgmmas of S(j) = Q K(j)^T             O += P(j-2) V(j-2), 256 columns each
      keys x 128 columns:   all issued   -> gate left                left begins P(j-1) V(j-1)
      Q elements, tiles     all complete -> gate right               right begins P(j-1) V(j-1)
    RoPE slice              32 exponentials per thread, P(j) out
    Q for shared memory     (the maximum of the tile and a new       each quarter of V read: its slot is free
    piece descriptors         reference only when P grows too        wait for P(j), rescale O if told to
                              large)
    The gates hold P V back until S is through: P V then covers the exponentials, where the scores warpgroup feeds nothing
    to the tensor cores. Without them P V is done early and the tensor cores idle (5 to 9 % slower). The right half starts
    later so that slots come free in the order in which S(j+1) wants them.
    The turns run on across pieces. Clusters of two do some of it in another way: `two_loaders`, `two_clusters`.

Masks
    Causal, sliding window, lengths and missing pages cost full tiles nothing: the loads put a word beside each tile, and
    only where it is not FULL are scores selected away and rows of V cleared. Tiles before the window are not read.

Mods
    The scores warpgroup calls functions of the user's (`Config.mods`) between S and the exponentials: `modify`.

Budget (checked by tests/compile/test_decode_dense.py against tests/compile/budgets.toml)
    shared memory 231,424 of 232,448 bytes (1,024 are reserved); registers 152 scores, 160 values, 40 loads (x 128 = 65,536), no spills.

Synchronisation (mbarriers; the protocol is run as a model by tests/compile/test_decode_dense_protocol.py)
    full[slot]      loads -> scores (and, through P, values)       1 arrival + 16,384 bytes
    empty[slot]     values (Q elements: scores) -> loads           4 warps of every CTA of the cluster
    rope_full/empty, q_full/empty                                  as above; q_empty 4 warps
    p_full/empty[2] scores -> values / back                        4 warps / 8 warps
    go[half, 2]     scores -> values: the gates                    4 warps
    sum_full/empty  scores -> values: 1 / row sums                 32 lanes / 8 warps
    piece_full/empty[4]  planner -> everybody                      1 / 15 warps
    share_full/empty[2]  planner -> values: shares to merge        1 / 8 warps
    parts_full           partials of a share -> values             1 arrival + their bytes

Merge
    Pieces of a split request go to memory as fp16 with a scale for each half of a row (`shares`). A CTA counts each of its own,
    and when it has no more, it waits until the count of a request says that all of them are there, and merges its share of the
    rows: n-th parts of the partials come into the ring by bulk copies, weights and sums are computed from there. The count wraps to 0 with the last piece, so it
    is ready for the next launch. Every CTA waits for others, so all must be resident: the launch is cooperative. Where it is
    told not to merge (batch_invariant), a second launch does (`merge.py`), of
    partials in fp32.

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

from openmla.backends.cute import mod_math
from openmla.backends.cute.decode_dense.config import Config
from openmla.backends.cute.decode_dense.exchange import Exchange
from openmla.backends.cute.decode_dense.shares import (
    COUNT,
    HALVED_UNITS,
    LN2,
    LOG2_E,
    SHARE_COORD,
    SHARE_FIELDS,
    SHARE_S_Q,
    SHARE_TOKEN0,
    SHARES,
    SLOT0,
    SLOT_BYTES,
    SPLIT,
    UNITS,
    Shares,
)
from openmla.backends.cute.decode_dense.soft_cap import SoftCap, reference

THREADS = 512
SLICE_BYTES = 64 * 64 * 2
PIECES, PIECES_LOG2 = 4, 2  # descriptors between the planner and the other warps
EVICT_FIRST = 0x12F0000000000000
FAULT_PAGE, FAULT_LENGTH_NEGATIVE, FAULT_LENGTH_OVER_CAPACITY = 1, 2, 4
# A finite start for the running maximum: -inf would make -inf - -inf where a row has seen no key. Rows behind the last one
# start at its negative, above HIDDEN, so that nothing makes them move.
NO_MAXIMUM, HIDDEN = -1.0e30, 0.9e30
LAZY_LOG2 = 8  # rescale O only where P would pass 2^8: it stays exact enough in bf16 and fp16
FUSED = 2.0**20  # references below it

# Fields of a piece descriptor: tiles (-1 ends the list), request, first tile, tokens of the request, the token where the
# piece ends, slot of its partial result (-1: none), first query token and how many, request coordinate of Q and out,
# the tiles [CLEAR_FROM, CLEAR_TO) of the piece that every row sees in full, keys of the first tile that no row sees.
TILES, REQUEST, FIRST_BLOCK, LENGTH, STOP, SPLIT_SLOT, TOKEN0, S_Q, BATCH_COORD, CLEAR_FROM, CLEAR_TO, HEAD = range(12)
PIECES_OF, SLOT_OF = range(12, 14)  # of the request: how many pieces, slot of the first
FIELDS = 14

LONG = 48  # tiles of a piece from which on prefetching pays: 1.5 us lost at 4 tiles, 0.5 at 32 (merge2.1), 15 % won at 1,000

# The word that goes with a tile: keys that count (0 to 64), a bit where rows differ or pages are missing, and above bit 8
# how many of its first keys no row sees. FULL needs no mask at all.
FULL, MASKED, HEAD_SHIFT = 64, 128, 8


class Scope:
    """Names that the warp roles share. Opaque to the tracer, which would thread a SimpleNamespace through every branch."""

    def __init__(self, **names: Any) -> None:
        self.__dict__.update(names)


class DecodeDense(SoftCap, Exchange, Shares):
    """The launch (`__call__`) and the device code (`kernel` and one method per warp role)."""

    registers = 152, 160, 40  # scores, values (two), loads: 512 x 128 threads
    idle_at = -1  # the wgmma of a tile's scores behind which warps arrive at `idle`

    def __init__(self, config: Config) -> None:
        self.config = config
        self.dtype = cutlass.BFloat16 if config.dtype == "bf16" else cutlass.Float16
        self.smem_bytes = 0
        self.is_halved = config.is_halved
        self.units = HALVED_UNITS if self.is_halved else UNITS

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,  # [batch | 1, s_q | total_q, h_q, d_qk], rows evenly spaced: see `launch.query_rows`
        kv: cute.Tensor,  # [num_pages, page_size, h_kv, d_qk]
        block_table: cute.Tensor,  # int32 [batch, max_pages]
        cache_seqlens: cute.Tensor,  # int32 [batch]
        cu_seqlens_q: cute.Tensor,  # int32 [batch + 1]; read only with is_varlen
        metadata: cute.Tensor,  # int32 [ranges, num_parts, 8]
        num_splits: cute.Tensor,  # int32 [batch + 1]
        out: cute.Tensor,  # [batch | 1, s_q | total_q, h_q, 512]
        lse: cute.Tensor,  # fp32 [batch | 1, h_q, s_q | total_q], natural log
        out_accum: cute.Tensor,  # fp32 [slots, h_kv * row blocks, 64 * 512]; of a block as `shares` says
        lse2_accum: cute.Tensor,  # fp32 [slots, h_kv * row blocks * 64], base 2
        arrivals: cute.Tensor,  # int32 [slots, h_kv * row blocks], 0 before and after; read only with is_merged
        attn_sink: cute.Tensor,  # fp32 [h_q], natural log; read only with has_sink
        fault_word: cute.Tensor,  # int32 [1]
        mail: cute.Tensor,  # int64, of ranks that exchange shares: see `exchange`, also for `merged`
        merged: cute.Tensor,
        s_q: Int32,  # tokens per request, the longest with is_varlen; rows = s_q * heads
        chunk_blocks: Int32,  # 0, or the piece length of batch_invariant
        is_merged: Int32,  # whether this kernel merges; else it leaves partials
        is_causal: Int32,
        is_varlen: Int32,
        has_sink: Int32,
        window: Int32,  # keys up to a row's own position; NO_WINDOW for all; else is_causal must be 1
        scale_log2: Float32,  # softmax_scale * log2(e), positive; softmax_scale itself with mods
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

        heads = out.shape[2] // kv.shape[2]
        rows = q.shape[1] * heads  # row = token * heads + head
        q_rows = cute.make_tensor(
            q.iterator,
            cute.make_layout(
                (rows, q.shape[3], kv.shape[2], q.shape[0]),
                stride=(q.stride[2], q.stride[3], rows * q.stride[2], q.stride[0]),
            ),
        )
        kv_rows = cute.make_tensor(kv.iterator, cute.select(kv.layout, [1, 3, 2, 0]))
        load = cpasync.CopyBulkTensorTileG2SOp()
        load_kv = cpasync.CopyBulkTensorTileG2SMulticastOp() if cfg.cluster > 1 else load
        box = cute.make_composed_layout(atom.inner, 0, cute.make_layout((cfg.box_rows, 64), stride=(64, 1)))
        tma_kv, t_kv = cpasync.make_tiled_tma_atom(load_kv, kv_rows, box, (cfg.box_rows, 64))
        tma_q, t_q = cpasync.make_tiled_tma_atom(load, q_rows, tiled(64, 64), (64, 64))

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
            parts_full: cute.struct.MemRange[Int64, 1]
            share_full: cute.struct.MemRange[Int64, SHARES]
            share_empty: cute.struct.MemRange[Int64, SHARES]
            piece: cute.struct.MemRange[Int32, FIELDS * PIECES]
            share: cute.struct.MemRange[Int32, SHARE_FIELDS * SHARES]
            valid: cute.struct.MemRange[Int32, cfg.slots]
            missing: cute.struct.MemRange[Int32, 2 * cfg.slots]
            need: cute.struct.MemRange[Int32, 2 * 4]
            broken: cute.struct.MemRange[Int32, 4 * 4]
            factor: cute.struct.MemRange[Float32, 2 * 64]
            inverse: cute.struct.MemRange[Float32, 64]
            idle: cute.struct.MemRange[Int64, 1]
            own: cute.struct.MemRange[Int32, PIECES]
            places: cute.struct.MemRange[Int32, PIECES]
            ring: cute.struct.Align[cute.struct.MemRange[dtype, cute.cosize(ring_layout)], 1024]
            rope: cute.struct.Align[cute.struct.MemRange[dtype, cute.cosize(rope_layout)], 1024]
            q: cute.struct.Align[cute.struct.MemRange[dtype, cute.cosize(q_layout)], 1024]
            p: cute.struct.Align[cute.struct.MemRange[dtype, cute.cosize(p_layout)], 1024]

        self.storage = Storage
        self.smem_bytes = Storage.size_in_bytes()
        m_blocks = cute.ceil_div(s_q * heads, 64)
        m_blocks = cute.ceil_div(m_blocks, cfg.cluster) * cfg.cluster
        posts = (mail, merged) if cfg.loaders == 1 else (None, None)  # not passed where nobody exchanges
        self.kernel(
            tma_kv, t_kv, tma_q, t_q, block_table, cache_seqlens, cu_seqlens_q, metadata, num_splits, out, lse,
            out_accum, lse2_accum, arrivals, attn_sink, fault_word, *posts, s_q, chunk_blocks, is_merged, is_causal, is_varlen, has_sink, window,
            scale_log2, Int32(heads), Int32(kv.shape[0]), Int32(kv.shape[1] // cfg.box_rows),
            Int32(block_table.shape[1] * kv.shape[1]), qk_first, qk_rs, qk_ss, pv,
            ring_layout, rope_layout, q_layout, p_layout,
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
        self, tma_kv: cute.CopyAtom, t_kv: cute.Tensor, tma_q: cute.CopyAtom, t_q: cute.Tensor,
        block_table: cute.Tensor, cache_seqlens: cute.Tensor, cu_seqlens_q: cute.Tensor, metadata: cute.Tensor,
        num_splits: cute.Tensor, out: cute.Tensor, lse: cute.Tensor, out_accum: cute.Tensor, lse2_accum: cute.Tensor,
        arrivals: cute.Tensor, attn_sink: cute.Tensor, fault_word: cute.Tensor, mail: cute.Tensor,
        merged: cute.Tensor, s_q: Int32, chunk_blocks: Int32, is_merged: Int32, is_causal: Int32, is_varlen: Int32,
        has_sink: Int32, window: Int32, scale_log2: Float32, heads: Int32, num_pages: Int32, boxes_per_page: Int32,
        capacity: Int32, qk_first: cute.TiledMma, qk_rs: cute.TiledMma, qk_ss: cute.TiledMma, pv: cute.TiledMma,
        ring_layout: cute.ComposedLayout, rope_layout: cute.ComposedLayout, q_layout: cute.ComposedLayout,
        p_layout: cute.ComposedLayout,
    ):  # fmt: skip
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
                "sum_empty", "piece_full", "piece_empty", "share_full", "share_empty",
                "parts_full", "idle",
            )},
            piece=store.piece.get_tensor(cute.make_layout((FIELDS, PIECES))),
            share=store.share.get_tensor(cute.make_layout((SHARE_FIELDS, SHARES))),
            weights=cute.make_tensor(cute.recast_ptr(store.q.data_ptr(), dtype=Float32), cute.make_layout(8192 - 128)),
            lines=cute.make_tensor(cute.recast_ptr(store.q.data_ptr() + 16128, dtype=Int64), cute.make_layout(64)),
            valid=store.valid.get_tensor(cute.make_layout(cfg.slots)),
            missing=store.missing.get_tensor(cute.make_layout((2, cfg.slots))),
            need=store.need.get_tensor(cute.make_layout((4, 2))),
            broken=store.broken.get_tensor(cute.make_layout((4, 4))),
            factor=store.factor.get_tensor(cute.make_layout((64, 2))),
            inverse=store.inverse.get_tensor(cute.make_layout(64)),
            own=store.own.get_tensor(cute.make_layout(PIECES)),
            places=store.places.get_tensor(cute.make_layout(PIECES)),
            s_ring=store.ring.get_tensor(ring_layout.outer, swizzle=ring_layout.inner),
            s_rope=store.rope.get_tensor(rope_layout.outer, swizzle=rope_layout.inner),
            s_q=store.q.get_tensor(q_layout.outer, swizzle=q_layout.inner),
            s_p=store.p.get_tensor(p_layout.outer, swizzle=p_layout.inner),
            tma_kv=tma_kv, t_kv=t_kv, tma_q=tma_q, t_q=t_q, block_table=block_table, cache_seqlens=cache_seqlens,
            cu_seqlens_q=cu_seqlens_q, metadata=metadata, num_splits=num_splits, out=out, lse=lse,
            out_accum=out_accum, lse2_accum=lse2_accum, arrivals=arrivals, attn_sink=attn_sink, fault_word=fault_word, mail=mail, merged=merged, s_q_max=s_q,
            chunk_blocks=chunk_blocks, is_merged=is_merged, is_causal=is_causal, is_varlen=is_varlen, has_sink=has_sink, window=window,
            scale_log2=scale_log2, row_blocks=cute.arch.grid_dim()[0], heads=heads, num_pages=num_pages, boxes_per_page=boxes_per_page, capacity=capacity, qk_first=qk_first, qk_rs=qk_rs, qk_ss=qk_ss, pv=pv,
            is_sole_reader=is_sole_reader, m_block=m_block, kv_head=kv_head, part=part, rank=m_block & cfg.cluster - 1,
            thread=tidx & 127, warp=warp_idx & 3, lane=cute.arch.lane_idx(), warp_idx=warp_idx,
        )  # fmt: skip

        # The plan's row and, a lane each, lengths and slots of the first 32 requests: one memory latency, behind the setup.
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
                    (c.empty, 4 * cfg.cluster, cfg.slots),
                    (c.rope_full, 1, 1),
                    (c.rope_empty, 4 * cfg.cluster, 1),
                    (c.q_full, 1, 1),
                    (c.q_empty, 4, 1),
                    (c.p_full, 4, 2),
                    (c.p_empty, 8, 2),
                    (c.go, 4, 4),
                    (c.sum_full, 4 * 8, 1),
                    (c.sum_empty, 8, 1),
                    (c.piece_full, 1, PIECES),
                    (c.piece_empty, 12 + self.warps_that_load(), PIECES),  # and math warps
                    (c.parts_full, 1, 1),
                    (c.share_full, 1, SHARES),
                    (c.share_empty, 8, SHARES),
                    *self.further_barriers(c),
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

        # The merge may be launched as soon as every CTA is here; it waits for the end of this kernel by itself.
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()

        if warp_idx < 4:
            cute.arch.setmaxregister_increase(self.registers[0])
            self.scores(c)
        elif warp_idx < 12:
            cute.arch.setmaxregister_increase(self.registers[1])
            self.run_values(c)
        else:
            cute.arch.setmaxregister_decrease(self.registers[2])
            self.run_loads(c, warp_idx, plan_row, near)
        if const_expr(cfg.cluster > 1):
            # Arrivals in the other CTA are performed before it may leave: not relaxed.
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()

    # ------------------------------------------------------------------ what `two_loaders` does in another way

    def warps_that_load(self) -> int:
        """Warps that read the descriptor of every piece, besides those that compute."""
        return 2 + self.config.has_rope

    def further_barriers(self, c: Scope) -> tuple[Any, ...]:
        """(barrier, arrivals, copies) that only some schedules have."""
        return ()

    @cute.jit
    def run_values(self, c: cutlass.Constexpr):
        """Everything that the value warps do."""
        self.values(c)
        if const_expr(self.config.is_exchanged):
            prepared = self.prepare_exchange(c)
        self.merge(c)
        if const_expr(self.config.is_exchanged):
            self.exchange(c, prepared)

    @cute.jit
    def run_loads(self, c: cutlass.Constexpr, warp_idx: Int32, row: cute.Tensor, near: cute.Tensor):
        """Everything that the last four warps do."""
        if warp_idx == 12:
            self.load_kv(c)
        elif warp_idx == 13:
            self.load_q(c)
        elif warp_idx == 14:
            if const_expr(self.config.has_rope):
                self.load_rope(c)
        else:
            self.plan(c, row, near)

    @cute.jit
    def note(self, c: cutlass.Constexpr, index: Int32, count: Int32, is_end: cutlass.Constexpr):
        """What a schedule adds to the descriptor of a piece behind `count` pieces, or of their end; one lane does."""

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
        rows = cute.domain_offset((token0 * c.heads, 0, 0, 0), c.t_q)
        tile = cute.local_tile(rows, (64, 64), (c.m_block, None, c.kv_head, batch))
        return cpasync.tma_partition(c.tma_q, 0, cute.make_layout(1), boxes, cute.group_modes(tile, 0, 2))

    # ------------------------------------------------------------------ planner

    @cute.jit
    def plan(self, c: cutlass.Constexpr, row: cute.Tensor, near: cute.Tensor):
        """Turn this part's ranges, up to the first empty one, into piece descriptors, then into those of shares to merge."""
        fields, ranges = c.piece, c.metadata.shape[0]
        count, number, following = Int32(0), Int32(0), cute.make_rmem_tensor(5, Int32)
        for lap in cutlass.range(2, unroll=1):
            while number < ranges:
                for i in cutlass.range_constexpr(5):  # on its way while this range is worked on
                    following[i] = c.metadata[cutlass.min(number + 1, ranges - 1), c.part, i]
                number = number + 1 if row[0] <= row[1] else ranges
                count = self.plan_range(c, row, near, count, lap)
                for i in cutlass.range_constexpr(5):
                    row[i] = following[i]
            if lap == 0:
                index = count & PIECES - 1
                cute.arch.mbarrier_wait(c.piece_empty + index, ((count >> PIECES_LOG2) & 1) ^ 1)
                if c.lane == 0:
                    fields[TILES, index] = Int32(-1)
                    self.note(c, index, count, True)
                self.arrive(c.piece_full + index)
                count, number = Int32(0), Int32(0) if c.is_merged != 0 else ranges
                for i in cutlass.range_constexpr(5):
                    row[i] = c.metadata[0, c.part, i]
        self.put_share(c, count, Int32(0), Int32(0), Int32(0), Int32(0))

    @cute.jit
    def plan_range(self, c: cutlass.Constexpr, row: cute.Tensor, near: cute.Tensor, count: Int32, lap: Int32) -> Int32:
        """The pieces of one range, and in a second lap the shares of its split requests; `count` came before.

        Returns how many have come now.
        """
        req, last = cutlass.max(row[0], 0), cutlass.min(row[1], c.cache_seqlens.shape[0] - 1)
        fields, block, split = c.piece, row[2], row[4]
        while req <= last:
            length, slot, after = (cute.arch.shuffle_sync(near[i], req & 31) for i in range(3))
            if req >= 32:
                length, slot, after = c.cache_seqlens[req], c.num_splits[req], c.num_splits[req + 1]
            if (c.lane == 0) & ((length < 0) | (length > c.capacity)):
                fault = FAULT_LENGTH_NEGATIVE if length < 0 else FAULT_LENGTH_OVER_CAPACITY
                cute.arch.atomic_or(c.fault_word.iterator, Int32(fault))
            length = cutlass.min(cutlass.max(length, 0), c.capacity)
            end = (length + 63) >> 6
            if req == row[1]:
                end = cutlass.min(end, row[3])
            step = c.chunk_blocks if c.chunk_blocks > 0 else cutlass.max(end - block, 1)
            stop = cutlass.max(end, block + 1)
            while block < stop:
                if lap == 0:
                    index = count & PIECES - 1
                    cute.arch.mbarrier_wait(c.piece_empty + index, ((count >> PIECES_LOG2) & 1) ^ 1)
                    if c.lane == 0:
                        self.describe(c, index, req, length, block, cutlass.min(end, block + step))
                        fields[SPLIT_SLOT, index] = slot + split if after - slot > 1 else Int32(-1)
                        fields[SLOT_OF, index], fields[PIECES_OF, index] = slot, after - slot
                        self.note(c, index, count, False)
                    self.arrive(c.piece_full + index)
                    count += 1
                elif after - slot > 1:
                    self.put_share(c, count, after - slot, slot, split, req)
                    count += 1
                block += step
                split += 1
            req += 1
            block, split = Int32(0), Int32(0)
        return count

    @cute.jit
    def queries(self, c: cutlass.Constexpr, req: Int32):
        """First query token of a request, how many it has, and its coordinate in Q and out."""
        token0, s_q, coord = Int32(0), c.s_q_max, req
        if c.is_varlen != 0:
            total = c.out.shape[1]
            token0, coord = cutlass.min(cutlass.max(c.cu_seqlens_q[req], 0), total), Int32(0)
            s_q = cutlass.min(cutlass.min(c.cu_seqlens_q[req + 1], total) - token0, c.s_q_max)
        return token0, s_q, coord

    @cute.jit
    def put_share(self, c: cutlass.Constexpr, shares: Int32, count: Int32, slot: Int32, split: Int32, req: Int32):
        """One share descriptor; without pieces, the end of them."""
        index, fields = shares & SHARES - 1, c.share
        cute.arch.mbarrier_wait(c.share_empty + index, ((shares >> 1) & 1) ^ 1)
        if c.lane == 0:
            token0, s_q, coord = self.queries(c, req)
            fields[COUNT, index] = count
            fields[SLOT0, index] = slot
            fields[SPLIT, index] = split
            fields[SHARE_TOKEN0, index] = token0
            fields[SHARE_S_Q, index] = s_q
            fields[SHARE_COORD, index] = coord
        self.arrive(c.share_full + index)

    @cute.jit
    def describe(self, c: cutlass.Constexpr, index: Int32, req: Int32, length: Int32, block: Int32, until: Int32):
        """The descriptor of the blocks [block, until) of a request, but for the slot of its partial result."""
        fields = c.piece
        token0, s_q, coord = self.queries(c, req)
        # No row sees a key before `seen`, every row sees the keys [below, above).
        seen = cutlass.max(length - s_q + 1 - c.window, 0)
        below = cutlass.max(length - c.window, 0)
        above = length - s_q + 1 if c.is_causal != 0 else length
        first = cutlass.max(block, seen >> 6)
        fields[TILES, index] = cutlass.max(until - first, 1)  # an empty one is all masked
        fields[REQUEST, index] = req
        fields[FIRST_BLOCK, index] = first
        fields[LENGTH, index] = length
        fields[STOP, index] = cutlass.min(until * 64, length) if until > first else Int32(0)
        fields[TOKEN0, index] = token0
        fields[S_Q, index] = s_q
        fields[BATCH_COORD, index] = coord
        fields[CLEAR_FROM, index] = (below + 63 >> 6) - first
        fields[CLEAR_TO, index] = (above >> 6) - first
        fields[HEAD, index] = cutlass.max(seen - first * 64, 0) << HEAD_SHIFT

    # ------------------------------------------------------------------ loads

    def page_boxes(self, c: Scope, target: cute.Tensor) -> Any:
        """Copies of `box_rows` x 64 pieces of the cache: (shared, global) partitions."""
        cfg = self.config
        g_kv = cute.local_tile(c.t_kv, (cfg.box_rows, 64), (None, None, c.kv_head, None))
        return cpasync.tma_partition(
            c.tma_kv, 0, cute.make_layout(1), cute.group_modes(target, 0, 2), cute.group_modes(g_kv, 0, 2)
        )

    @cute.jit
    def read_page(self, c: cutlass.Constexpr, index: Int32, box: Int32, reports: cutlass.Constexpr):
        """Page id of box `box` of a request, its place among the boxes of that page, and whether the id is bad.

        Beyond the tensor map, at page num_pages, the copy engine fills with zeros.
        """
        column, place, page, bad = box, Int32(0), c.num_pages, Int32(0)
        if const_expr(self.config.page_size == 0):
            column = box // c.boxes_per_page
            place = box - column * c.boxes_per_page
        if box * self.config.box_rows < c.piece[STOP, index]:
            page = c.block_table[c.piece[REQUEST, index], column]
            if (page < 0) | (page >= c.num_pages):
                page, bad = c.num_pages, Int32(1)
                if const_expr(reports):
                    cute.arch.atomic_or(c.fault_word.iterator, Int32(FAULT_PAGE))
        return page, place, bad

    @cute.jit
    def copy_boxes(
        self, c: cutlass.Constexpr, source: cute.Tensor, target: cute.Tensor, column: Int32, pages: cute.Tensor,
        places: cute.Tensor, base: Int32, barrier: cutlass.Constexpr,
    ):  # fmt: skip
        """64 keys x 64 columns of a tile: one box, or several of fewer rows with a page id each."""
        cfg = self.config
        policy, everyone = Int64(EVICT_FIRST), cutlass.Int16((1 << cfg.cluster) - 1)
        multicast = {"mcast_mask": everyone} if cfg.cluster > 1 else {}
        for h in cutlass.range_constexpr(max(cfg.boxes // 32, 1)):
            for i in cutlass.range(min(cfg.boxes, 32), unroll=1):
                page = cute.arch.shuffle_sync(pages[h], base + i)
                place = Int32(0)
                if const_expr(cfg.page_size == 0):
                    place = cute.arch.shuffle_sync(places[h], base + i)
                cute.copy(
                    c.tma_kv, source[None, place, column, page], target[None, i + 32 * h],
                    tma_bar_ptr=barrier, cache_policy=policy, **multicast,
                )  # fmt: skip

    @cute.jit
    def load_kv(self, c: cutlass.Constexpr):
        """Q's register slices and then the tiles of each piece, through the ring, as far ahead as slots are free."""
        cfg = self.config
        halves = max(cfg.boxes // 32, 1)
        # [element, box of the slice, slice of the slot, slot]
        s_kv, g_kv = self.page_boxes(c, cute.flat_divide(c.s_ring, (cfg.box_rows, 64)))
        q_boxes = cute.group_modes(cute.flat_divide(c.s_ring, (64, 64))[None, None, 0, None, None], 0, 2)
        policy, valid, missing = Int64(EVICT_FIRST), c.valid, c.missing
        slot, phase, piece = Int32(0), Int32(1), Int32(0)
        cute.arch.mbarrier_wait(c.piece_full, 0)
        tiles = cute.arch.make_warp_uniform(c.piece[TILES, 0])
        while tiles > 0:
            index = piece & PIECES - 1
            first = c.piece[FIRST_BLOCK, index]
            s_q, g_q = self.q_tiles(c, q_boxes, c.piece[TOKEN0, index], c.piece[BATCH_COORD, index])
            for e in cutlass.range_constexpr(cfg.q_regs // 2):
                cute.arch.mbarrier_wait(c.empty + slot, phase)
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(c.full + slot, SLOT_BYTES)
                for s in cutlass.range_constexpr(2):
                    cute.copy(
                        c.tma_q, g_q[None, 2 * e + s], s_q[None, s, slot],
                        tma_bar_ptr=c.full + slot, cache_policy=policy,
                    )  # fmt: skip
                slot, phase = self.next_slot(slot, phase)
            pages, places, bad = (cute.make_rmem_tensor(halves, Int32) for _ in range(3))
            for j in cutlass.range(tiles, unroll=1):
                base = (j & cfg.lookup - 1) * cfg.boxes
                if base == 0:  # a lane each
                    for h in cutlass.range_constexpr(halves):
                        box = (first + j) * cfg.boxes + 32 * h + c.lane
                        pages[h], places[h], bad[h] = self.read_page(c, index, box, True)
                if const_expr(cfg.look_ahead > 0):
                    if (j + cfg.look_ahead < tiles) & c.is_sole_reader & (tiles >= LONG):
                        later = cute.arch.shuffle_sync(pages[0], base + cfg.look_ahead)
                        place = cute.arch.shuffle_sync(places[0], base + cfg.look_ahead)
                        for e in cutlass.range_constexpr(2 * cfg.prefetch_from // cfg.cluster, 8 // cfg.cluster):
                            cute.prefetch(c.tma_kv, g_kv[None, place, cfg.cluster * e + c.rank, later])
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
                for e in cutlass.range_constexpr(4):
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
                            c, g_kv, s_kv[None, None, s, slot], 2 * e + s, pages, places, base, c.full + slot
                        )
                    slot, phase = self.next_slot(slot, phase)
            self.arrive(c.piece_empty + index)
            piece += 1
            cute.arch.mbarrier_wait(c.piece_full + (piece & PIECES - 1), (piece >> PIECES_LOG2) & 1)
            tiles = cute.arch.make_warp_uniform(c.piece[TILES, piece & PIECES - 1])

    @cute.jit
    def load_rope(self, c: cutlass.Constexpr):
        """The ninth slice of every tile; the CTAs of a cluster take turns and multicast."""
        cfg = self.config
        halves = max(cfg.boxes // 32, 1)
        s_kv, g_kv = self.page_boxes(c, cute.flat_divide(c.s_rope, (cfg.box_rows, 64)))
        turn, piece = Int32(0), Int32(0)
        cute.arch.mbarrier_wait(c.piece_full, 0)
        tiles = cute.arch.make_warp_uniform(c.piece[TILES, 0])
        while tiles > 0:
            index = piece & PIECES - 1
            first = c.piece[FIRST_BLOCK, index]
            pages, places = (cute.make_rmem_tensor(halves, Int32) for _ in range(2))
            for j in cutlass.range(tiles, unroll=1):
                base = (j & cfg.lookup - 1) * cfg.boxes
                if base == 0:
                    for h in cutlass.range_constexpr(halves):
                        box = (first + j) * cfg.boxes + 32 * h + c.lane
                        pages[h], places[h], _ = self.read_page(c, index, box, False)
                if const_expr(cfg.look_ahead > 0):
                    mine = (turn + cfg.look_ahead & cfg.cluster - 1) == c.rank
                    if (j + cfg.look_ahead < tiles) & c.is_sole_reader & mine & (tiles >= LONG):
                        later = cute.arch.shuffle_sync(pages[0], base + cfg.look_ahead)
                        place = cute.arch.shuffle_sync(places[0], base + cfg.look_ahead)
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
            index = piece & PIECES - 1
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
                    tma_bar_ptr=c.q_full, cache_policy=policy,
                )  # fmt: skip
            self.arrive(c.piece_empty + index)
            piece += 1
            cute.arch.mbarrier_wait(c.piece_full + (piece & PIECES - 1), (piece >> PIECES_LOG2) & 1)
            tiles = cute.arch.make_warp_uniform(c.piece[TILES, piece & PIECES - 1])

    # ------------------------------------------------------------------ S = Q K^T and the softmax

    @cute.jit
    def scores(self, c: cutlass.Constexpr):
        """S of a tile on the tensor cores, then its probabilities, while the value warpgroups multiply the tile before."""
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
            row0=c.warp * 16 + (c.lane >> 2),
        )  # fmt: skip
        acc = c.qk_ss.make_fragment_C(c.qk_ss.partition_shape_C((64, 64)))
        load_a = cute.make_tiled_copy_A(cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, 4), self.dtype), c.qk_rs)
        thr_a = load_a.get_slice(c.thread)
        s.packed = cute.make_rmem_tensor(acc.layout, self.dtype)
        s.store = cute.make_tiled_copy_C(cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), self.dtype), c.qk_ss)
        thr_p = s.store.get_slice(c.thread)
        s.p_from, s.p_to = thr_p.retile(s.packed), thr_p.partition_D(c.s_p)

        # Every phase follows from a running count: ring slots filled, tiles, pieces.
        slot, phase, count, piece = Int32(0), Int32(0), Int32(0), Int32(0)
        self.arrive(c.p_full)  # tiles count from 1: for all three warpgroups tile 0 has been
        cute.arch.mbarrier_wait(c.piece_full, 0)
        tiles = cute.arch.make_warp_uniform(c.piece[TILES, 0])
        while tiles > 0:
            index = piece & PIECES - 1
            for e in cutlass.range_constexpr(cfg.q_regs // 2):
                cute.arch.mbarrier_wait(c.full + slot, phase)
                cute.copy(load_a, thr_a.partition_S(c.s_ring[None, None, slot]), thr_a.retile(s.a_regs[e]))
                # An arrival may overtake loads that wait behind the stores of an epilogue: let them finish first.
                cute.arch.fence_view_async_shared()
                self.release(c.empty + slot, c.rank)
                slot, phase = self.next_slot(slot, phase)
            # A row behind the last one may hold another request's data: it must not move the reference of its warp.
            rows = c.piece[S_Q, index] * c.heads - c.m_block * 64 - s.row0
            m0 = Float32(NO_MAXIMUM) if rows > 0 else Float32(-NO_MAXIMUM)
            m1 = Float32(NO_MAXIMUM) if rows > 8 else Float32(-NO_MAXIMUM)
            l0, l1 = Float32(0.0), Float32(0.0)
            for j in cutlass.range(tiles, unroll=1):
                slot, phase, m0, m1, l0, l1 = self.step(c, s, acc, slot, phase, count, piece, tiles, j, m0, m1, l0, l1)
                count += 1
            if const_expr(cfg.cap is not None):
                m0, m1 = (Float32(reference(cfg.cap[0])) for _ in range(2))
            self.sums(c, s, piece, m0, m1, l0, l1)
            piece += 1
            cute.arch.mbarrier_wait(c.piece_full + (piece & PIECES - 1), (piece >> PIECES_LOG2) & 1)
            tiles = cute.arch.make_warp_uniform(c.piece[TILES, piece & PIECES - 1])
        if count > 0:  # no scores follow that would open the gates of the last tile
            self.arrive(c.go + (count & 1))
            self.arrive(c.go + 2 + (count & 1))

    @cute.jit
    def next_slot(self, slot: Int32, phase: Int32):
        """The ring position after this one."""
        slot += 1
        if slot == self.config.slots:
            slot = Int32(0)
            phase ^= 1
        return slot, phase

    @cute.jit
    def step(
        self, c: cutlass.Constexpr, s: cutlass.Constexpr, acc: cute.Tensor, slot: Int32, phase: Int32, count: Int32,
        piece: Int32, tiles: Int32, j: Int32, m0: Float32, m1: Float32, l0: Float32, l1: Float32,
    ):  # fmt: skip
        """Scores of tile j, the gates of the tile before, then the probabilities of tile j."""
        cfg = self.config
        steps = [0, 1, 2, -1, 3] if cfg.has_rope else [0, 1, 2, 3]
        buf = count & 1  # of the tile before; tiles count from 1
        valid = Int32(0)
        issued = 0
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
                if const_expr(issued == cfg.gate_left):
                    self.arrive(c.go + buf)
                if const_expr(issued == cfg.gate_right):
                    self.arrive(c.go + 2 + buf)
                if const_expr(issued == self.idle_at):
                    self.arrive(c.idle)
                issued += 1
            if const_expr(e >= 0):
                slot, phase = self.next_slot(slot, phase)
        warpgroup.commit_group()
        if const_expr(cfg.gate_left == -1):
            self.arrive(c.go + buf)
        if const_expr(cfg.gate_right == -1):
            self.arrive(c.go + 2 + buf)
        if const_expr(cfg.cap is not None):  # `capped` stores as it goes
            cute.arch.mbarrier_wait(c.p_empty + (buf ^ 1), (((count + 1) >> 1) & 1) ^ 1)
        warpgroup.wait_group(0)
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            if const_expr(cfg.gate_left == -2):
                cute.arch.mbarrier_arrive(c.go + buf)
            if const_expr(cfg.gate_right == -2 and not cfg.opens_late):
                cute.arch.mbarrier_arrive(c.go + 2 + buf)
            if const_expr(cfg.has_rope):
                cute.arch.mbarrier_arrive(c.rope_empty)
                for other in cutlass.range_constexpr(1, cfg.cluster):
                    cute.arch.mbarrier_arrive(c.rope_empty, c.rank ^ other)
        if j + 1 == tiles:
            self.arrive(c.q_empty)
        if const_expr(len(cfg.mods) > 0 and cfg.cap is None):
            self.modify(c, acc, piece, j, count + 1)
        if valid != FULL:
            self.mask(c, s, acc, piece, j, valid, slot)
        buf = buf ^ 1
        if const_expr(cfg.cap is not None):
            hidden0, hidden1 = Int32(m0 > Float32(HIDDEN)), Int32(m1 > Float32(HIDDEN))
            l0, l1 = self.capped(c, s, acc, piece, j, count + 1, buf, hidden0, hidden1, l0, l1)
            cute.arch.fence_view_async_shared()
            self.arrive(c.p_full + buf)
        else:
            m0, m1, l0, l1, f0, f1, need = self.probabilities(c, s, acc, m0, m1, l0, l1)
            self.hand_over(c, s, count + 1, buf, f0, f1, need)
        return slot, phase, m0, m1, l0, l1

    @cute.jit
    def modify(self, c: cutlass.Constexpr, acc: cute.Tensor, piece: Int32, j: Int32, tile: Int32):
        """Every score_mod, on scores in natural units, then every mask_mod; what is not finite passes by the former.

        With masks, a score that is not finite sets `broken`: a key that a mask hides may hold NaN, and 0 * NaN is NaN, so
        the values of the tile must be looked through. A key with such a value has no finite score, whatever the query. The
        flag is written before the tile's P has a place, so it has four: the values are at most two tiles behind.
        """
        cfg = self.config
        index = piece & PIECES - 1
        # Through a shuffle, which stays where it is written: kept through the loop, positions would spill.
        lane = cute.arch.shuffle_sync_bfly(c.lane, 0)
        m_block, _, _ = cute.arch.block_idx()
        row = cute.arch.shuffle_sync_bfly(m_block * 64, 0) + c.warp * 16 + (lane >> 2)
        sites = []
        for half in cutlass.range_constexpr(2):
            token = (row + 8 * half) // c.heads
            head = c.kv_head * c.heads + row + 8 * half - token * c.heads
            sites.append((c.piece[REQUEST, index], head, c.piece[LENGTH, index] - c.piece[S_Q, index] + token))
        first = (c.piece[FIRST_BLOCK, index] + j) * 64 + (lane & 3) * 2
        scores, masks = ([each.rebound(mod_math) for each in group] for group in (cfg.score_mods, cfg.mask_mods))
        # A multiply-add per score tells whether any of them is not finite: rarely, and only then is each looked at. Four
        # sums, because one would wait 32 times for itself.
        sums = [Float32(0.0) for _ in range(4)]
        for x in cutlass.range_constexpr(32):
            sums[x % 4] = cute.math.fma(acc[x], Float32(0.0), sums[x % 4])
        lost = (sums[0] + sums[1]) + (sums[2] + sums[3])
        is_lost = cute.arch.vote_any_sync(lost != lost)  # noqa: PLR0124 - NaN alone differs from itself
        if is_lost:
            self.change(c, acc, sites, first, scores, masks, True)
        else:
            self.change(c, acc, sites, first, scores, masks, False)
        if const_expr(len(masks) > 0):
            broken = c.broken
            if lane == 0:
                broken[c.warp, tile & 3] = Int32(1) if is_lost else Int32(0)

    @cute.jit
    def change(
        self, c: cutlass.Constexpr, acc: cute.Tensor, sites: cutlass.Constexpr, first: Int32, scores: cutlass.Constexpr,
        masks: cutlass.Constexpr, is_lost: cutlass.Constexpr,
    ):  # fmt: skip
        """The functions of `modify`. The first score_mod sees finite scores unless is_lost, others what it made of them."""
        for x in cutlass.range_constexpr(32):
            place, score = (*sites[x // 2 % 2], first + x // 4 * 8 + x % 2), acc[x] * c.scale_log2
            for form in scores:
                changed = Float32(form(score, *place))
                is_safe = form is scores[0] and not is_lost
                score = changed if is_safe else mod_math.choose(self.is_finite(score), changed, score)
            for form in masks:
                score = mod_math.choose(form(*place), score, -Float32.inf)
            acc[x] = score

    def is_finite(self, x: Float32) -> Boolean:
        """Neither infinite nor NaN."""
        return mod_math.abs(x) < Float32.inf

    def scale(self, c: Scope) -> Float32:
        """What makes base 2 of a score behind `modify`."""
        return Float32(LOG2_E) if self.config.mods else c.scale_log2

    def rounded(self, x: Float32, y: Float32) -> Float32:
        """x * y that no compiler fuses with an addition."""
        return cute.arch.inline_ptx(
            "mul.rn.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[x, y]
        )

    @cute.jit
    def probabilities(
        self, c: cutlass.Constexpr, s: cutlass.Constexpr, acc: cute.Tensor, m0: Float32, m1: Float32, l0: Float32,
        l1: Float32,
    ):  # fmt: skip
        """Probabilities 2^(score - reference) into `s.packed`; the reference of a row moves when they grow too large.

        The maximum of a tile is looked for only when the reference does not do: it takes a third of the instructions.
        It does while a thread's 16 probabilities of a row add up to 2^8 at most. Such a row's exponents are fused
        multiply-adds; their rounding error, |reference| 2^-25, is that of the scores as long as the reference is small.

        A large reference (2^20 and more) sends every tile to the careful path, where it is one of the scores, scaled and
        rounded like all: the difference of the largest is exactly 0, whatever its size. (The fused form would make
        2^(1e5) of a logit of 1e12.)
        """
        packed = s.packed
        n0 = -m0 if cute.arch.fmax(m0, -m0) < Float32(FUSED) else -Float32(NO_MAXIMUM)
        n1 = -m1 if cute.arch.fmax(m1, -m1) < Float32(FUSED) else -Float32(NO_MAXIMUM)
        n0 = Float32(NO_MAXIMUM) if m0 > Float32(HIDDEN) else n0
        n1 = Float32(NO_MAXIMUM) if m1 > Float32(HIDDEN) else n1
        t0, t1 = Float32(0.0), Float32(0.0)
        for x in cutlass.range_constexpr(32):
            n = n0 if (x // 2) % 2 == 0 else n1
            value = cute.math.exp2(cute.math.fma(acc[x], self.scale(c), n), fastmath=True)
            packed[x] = value.to(self.dtype)
            t0, t1 = (t0 + value, t1) if (x // 2) % 2 == 0 else (t0, t1 + value)
        f0, f1 = Float32(1.0), Float32(1.0)
        # Not "greater": a NaN or an overflow of this row goes the careful way, too.
        fits0, fits1 = t0 <= Float32(2.0**LAZY_LOG2), t1 <= Float32(2.0**LAZY_LOG2)
        fits0, fits1 = fits0 | (m0 > Float32(HIDDEN)), fits1 | (m1 > Float32(HIDDEN))
        need = Int32(0) if cute.arch.vote_all_sync(fits0 & fits1) else Int32(1)
        if need != 0:
            x0, x1 = acc[0], acc[2]
            for i in cutlass.range_constexpr(8):
                x0 = cute.arch.fmax(x0, cute.arch.fmax(acc[i * 4 + 0], acc[i * 4 + 1]))
                x1 = cute.arch.fmax(x1, cute.arch.fmax(acc[i * 4 + 2], acc[i * 4 + 3]))
            for d in (1, 2):
                x0 = cute.arch.fmax(x0, cute.arch.shuffle_sync_bfly(x0, d))
                x1 = cute.arch.fmax(x1, cute.arch.shuffle_sync_bfly(x1, d))
            x0, x1 = (
                cute.arch.fmax(m0, self.rounded(x0, self.scale(c))),
                cute.arch.fmax(m1, self.rounded(x1, self.scale(c))),
            )
            f0 = cute.math.exp2(m0 - x0, fastmath=True)
            f1 = cute.math.exp2(m1 - x1, fastmath=True)
            l0, l1, m0, m1 = l0 * f0, l1 * f1, x0, x1
            t0, t1 = Float32(0.0), Float32(0.0)
            for x in cutlass.range_constexpr(32):
                m = m0 if (x // 2) % 2 == 0 else m1
                value = cute.math.exp2(self.rounded(acc[x], self.scale(c)) - m, fastmath=True)
                packed[x] = value.to(self.dtype)
                t0, t1 = (t0 + value, t1) if (x // 2) % 2 == 0 else (t0, t1 + value)
        return m0, m1, l0 + t0, l1 + t1, f0, f1, need

    @cute.jit
    def mask(
        self, c: cutlass.Constexpr, s: cutlass.Constexpr, acc: cute.Tensor, piece: Int32, j: Int32, valid: Int32,
        slot: Int32,
    ):  # fmt: skip
        """Scores of keys that a row does not see become -inf: selected, so that a NaN there does not matter."""
        cfg = self.config
        index = piece & PIECES - 1
        lim0 = valid & MASKED - 1
        lim1, low0, low1 = lim0, Int32(0), Int32(0)
        if c.is_causal != 0:
            # where the row's own position ends, in keys of this tile
            left = c.piece[LENGTH, index] - (c.piece[FIRST_BLOCK, index] + j) * 64 - c.piece[S_Q, index] + 1
            row = c.m_block * 64 + s.row0
            end0, end1 = left + row // c.heads, left + (row + 8) // c.heads
            lim0, lim1 = cutlass.min(lim0, end0), cutlass.min(lim1, end1)
            low0, low1 = end0 - c.window, end1 - c.window
        if const_expr(cfg.boxes > 1):
            slot = slot - 4 if slot >= 4 else slot - 4 + cfg.slots  # of the tile's first quarter
            words = [c.missing[h, slot] for h in range(max(cfg.boxes // 32, 1))]
        for x in cutlass.range_constexpr(32):
            column = (x // 4) * 8 + (c.lane & 3) * 2 + x % 2
            lim, low = (lim0, low0) if (x // 2) % 2 == 0 else (lim1, low1)
            hidden = (column >= lim) | (column < low)
            if const_expr(cfg.boxes > 1):
                word = words[x // 16 if cfg.boxes > 32 else 0]
                box = (x // 4 * 8 if cfg.box_rows >= 8 else column) // cfg.box_rows % 32
                hidden = hidden | ((word >> box) & 1 != 0)
            if hidden:
                acc[x] = -Float32.inf

    @cute.jit
    def hand_over(
        self, c: cutlass.Constexpr, s: cutlass.Constexpr, tile: Int32, buf: Int32, f0: Float32, f1: Float32,
        need: Int32,
    ):  # fmt: skip
        """P of a tile leaves the registers."""
        cute.arch.mbarrier_wait(c.p_empty + buf, ((tile >> 1) & 1) ^ 1)
        for k in cutlass.range_constexpr(4):
            cute.copy(s.store, s.p_from[(None, k), None, None], s.p_to[(None, k), None, None, buf])
        self.publish(c, s, buf, f0, f1, need)

    @cute.jit
    def publish(self, c: cutlass.Constexpr, s: cutlass.Constexpr, buf: Int32, f0: Float32, f1: Float32, need: Int32):
        """P and, when the reference moved, the factors of O, for the value warpgroups."""
        factor, flag = c.factor, c.need
        if need != 0:
            # By the lane that arrives: sync_warp leaves no instruction here by which compute-sanitizer would see that the
            # stores of other lanes come before (log 21).
            for i in cutlass.range_constexpr(8):
                g0, g1 = cute.arch.shuffle_sync(f0, 4 * i), cute.arch.shuffle_sync(f1, 4 * i)
                if c.lane == 0:
                    factor[c.warp * 16 + i, buf] = g0
                    factor[c.warp * 16 + i + 8, buf] = g1
        if c.lane == 0:
            flag[c.warp, buf] = need
        # The tensor cores read P through the async proxy.
        cute.arch.fence_view_async_shared()
        self.arrive(c.p_full + buf)

    @cute.jit
    def sums(
        self, c: cutlass.Constexpr, s: cutlass.Constexpr, piece: Int32, m0: Float32, m1: Float32, l0: Float32,
        l1: Float32,
    ):  # fmt: skip
        """Row sums to the value warpgroups, log-sum-exp to memory."""
        for d in (1, 2):
            l0 += cute.arch.shuffle_sync_bfly(l0, d)
            l1 += cute.arch.shuffle_sync_bfly(l1, d)
        index = piece & PIECES - 1
        cute.arch.mbarrier_wait(c.sum_empty, (piece & 1) ^ 1)
        shared_inverse, lse, lse2_accum = c.inverse, c.lse, c.lse2_accum
        if (c.lane & 3) == 0:
            split_slot, s_q = c.piece[SPLIT_SLOT, index], c.piece[S_Q, index]
            token0, batch = c.piece[TOKEN0, index], c.piece[BATCH_COORD, index]
            for half in cutlass.range_constexpr(2):
                m, l = (m0, l0) if half == 0 else (m1, l1)  # noqa: E741
                row = c.m_block * 64 + s.row0 + 8 * half
                inverse, lse2 = Float32(1.0) / l, m + cute.math.log2(l)
                if l == 0.0:  # sees nothing; a NaN stays one
                    inverse, lse2 = Float32(0.0), -Float32.inf
                if split_slot >= 0:
                    block = c.kv_head * c.row_blocks + c.m_block
                    lse2_accum[split_slot, block * 64 + s.row0 + 8 * half] = lse2
                else:
                    if row < s_q * c.heads:
                        token = row // c.heads
                        head = c.kv_head * c.heads + row - token * c.heads
                        lse[batch, head, token0 + token] = lse2 * Float32(LN2)
                        if c.has_sink != 0:  # a key without a value, merged requests get theirs in the merge
                            extra = cute.math.exp2(c.attn_sink[head] * Float32(LOG2_E) - lse2, fastmath=True)
                            inverse = inverse / (Float32(1.0) + extra) if l != 0.0 else inverse
                shared_inverse[s.row0 + 8 * half] = inverse
            # Each lane for its own stores: compute-sanitizer sees no order that only a warp makes (log 21).
            cute.arch.mbarrier_arrive(c.sum_full)
        self.arrive(c.piece_empty + index)

    # ------------------------------------------------------------------ O += P V

    @cute.jit
    def values(self, c: cutlass.Constexpr):
        """Half of O's columns: P from the exchange into registers, V from the ring, O in registers."""
        cfg = self.config
        half = (c.warp_idx >> 2) - 1
        pv = c.pv
        s_v = cute.make_tensor(c.s_ring.iterator, cute.select(c.s_ring.layout, [1, 0, 2]))
        b = pv.make_fragment_B(pv.get_slice(c.thread).partition_B(s_v))
        a = pv.make_fragment_A(pv.get_slice(c.thread).partition_A(c.s_p))
        accs = [pv.make_fragment_C(pv.partition_shape_C((64, 128))) for _ in range(2)]
        pv.set(warpgroup.Field.ACCUMULATE, True)
        # slot of this half's first quarter; tiles (from 1) and pieces, of which only the last bits count, in one register
        slot, turn = 2 * half, Int32(1 << 3)
        cute.arch.mbarrier_wait(c.piece_full, 0)
        tiles = cute.arch.make_warp_uniform(c.piece[TILES, 0])
        if tiles > 0:
            cute.arch.mbarrier_wait(c.p_full, 0)  # of tile 0
            cute.arch.mbarrier_wait(c.go + half * 2, 0)
            self.arrive(c.p_empty)
        while tiles > 0:
            for acc in accs:
                acc.fill(0.0)
            slot += cfg.q_regs // 2
            for _ in cutlass.range(tiles, unroll=1):
                if slot >= cfg.slots:
                    slot -= cfg.slots
                slot1 = slot + 1 if slot + 1 < cfg.slots else Int32(0)
                buf, phase = (turn >> 3) & 1, (turn >> 4) & 1
                cute.arch.mbarrier_wait(c.p_full + buf, phase)
                if const_expr(cfg.cap is None):
                    self.rescale(c, accs, buf)
                if c.valid[slot] != FULL:
                    self.clear_unseen(c, slot, slot1, half)
                if const_expr(len(cfg.mask_mods) > 0):
                    now = (turn >> 3) & 3
                    if c.broken[0, now] | c.broken[1, now] | c.broken[2, now] | c.broken[3, now] != 0:
                        self.clear_broken(c, slot, slot1, half)
                cute.arch.mbarrier_wait(c.go + half * 2 + buf, phase)
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
            if slot >= cfg.slots:
                slot -= cfg.slots
            cute.arch.mbarrier_wait(c.sum_full, turn & 1)
            row0 = self.first_row(c)
            f0, f1 = c.inverse[row0], c.inverse[row0 + 8]
            if const_expr(self.is_halved):
                f0, f1 = self.halve_rows(c, accs, c.piece[SPLIT_SLOT, turn & PIECES - 1], half, row0, f0, f1)
            for acc in accs:
                for i in cutlass.range_constexpr(16):
                    acc[i * 4 + 0] = acc[i * 4 + 0] * f0
                    acc[i * 4 + 1] = acc[i * 4 + 1] * f0
                    acc[i * 4 + 2] = acc[i * 4 + 2] * f1
                    acc[i * 4 + 3] = acc[i * 4 + 3] * f1
            cute.arch.fence_view_async_shared()  # the loads are done before the arrival
            self.arrive(c.sum_empty)
            self.store_out(c, accs, turn & PIECES - 1, half, row0)
            if (c.piece[SPLIT_SLOT, turn & PIECES - 1] >= 0) & (c.is_merged != 0):
                self.announce(c, turn & PIECES - 1)
            self.arrive(c.piece_empty + (turn & PIECES - 1))
            turn = turn & -8 | turn + 1 & 7
            cute.arch.mbarrier_wait(c.piece_full + (turn & PIECES - 1), (turn >> PIECES_LOG2) & 1)
            tiles = cute.arch.make_warp_uniform(c.piece[TILES, turn & PIECES - 1])

    @cute.jit
    def rescale(self, c: cutlass.Constexpr, accs: cutlass.Constexpr, buf: Int32):
        """O by the factors of rows whose reference has moved."""
        if c.need[c.warp, buf] != 0:
            row0 = self.first_row(c)
            f0, f1 = c.factor[row0, buf], c.factor[row0 + 8, buf]
            for acc in accs:
                for i in cutlass.range_constexpr(16):
                    acc[i * 4 + 0] = acc[i * 4 + 0] * f0
                    acc[i * 4 + 1] = acc[i * 4 + 1] * f0
                    acc[i * 4 + 2] = acc[i * 4 + 2] * f1
                    acc[i * 4 + 3] = acc[i * 4 + 3] * f1

    @cute.jit
    def first_row(self, c: cutlass.Constexpr):
        """The first of a thread's two rows, 8 apart. Through a shuffle, which stays where it is written: kept in a register
        through the loop, it would spill another.
        """
        return c.warp * 16 + (cute.arch.shuffle_sync_bfly(c.lane, 0) >> 2)

    @cute.jit
    def clear_unseen(self, c: cutlass.Constexpr, slot: Int32, slot1: Int32, half: Int32):
        """Zero the rows of V that no query row sees: 0 * NaN would be NaN. A row is 128 bytes of each 8 KB box."""
        head, count = c.valid[slot] >> HEAD_SHIFT, c.valid[slot] & MASKED - 1
        zero = cute.make_rmem_tensor(4, Int32)
        zero.fill(0)
        words = cute.make_tensor(
            cute.recast_ptr(c.s_ring.iterator, None, Int32), cute.make_layout((4, 1024, self.config.slots))
        )
        for box in cutlass.range_constexpr(4):
            where = slot if box < 2 else slot1
            for begin, end in ((0, head), (count, 64)):
                chunk = begin * 8 + c.thread
                while chunk < end * 8:
                    cute.autovec_copy(zero, words[None, chunk + 512 * (box % 2), where])
                    chunk += 128
        cute.arch.fence_view_async_shared()
        # One barrier per half; their numbers are literals, a computed one would reserve all 16.
        if half == 0:
            cute.arch.barrier(barrier_id=1, number_of_threads=128)
        else:
            cute.arch.barrier(barrier_id=2, number_of_threads=128)

    @cute.jit
    def clear_broken(self, c: cutlass.Constexpr, slot: Int32, slot1: Int32, half: Int32):
        """Zero every value of a tile that is not finite. Rows that see such a key have a weight that is not finite."""
        ones = Int32(0x7F80 if self.config.dtype == "bf16" else 0x7C00)
        words = cute.make_tensor(
            cute.recast_ptr(c.s_ring.iterator, None, Int32), cute.make_layout((4096, self.config.slots))
        )
        for side in cutlass.range_constexpr(2):
            where = slot if side == 0 else slot1
            for i in cutlass.range(c.thread, 4096, 128, unroll=1):
                word = words[i, where]
                kept = Int32(0) if word & ones == ones else Int32(0xFFFF)
                high = ones << 16
                kept = kept if word & high == high else kept | Int32(-65536)
                words[i, where] = word & kept
        cute.arch.fence_view_async_shared()
        if half == 0:
            cute.arch.barrier(barrier_id=1, number_of_threads=128)
        else:
            cute.arch.barrier(barrier_id=2, number_of_threads=128)

    @cute.jit
    def store_out(
        self, c: cutlass.Constexpr, accs: cutlass.Constexpr, index: Int32, half: Int32, row0: Int32,
    ):  # fmt: skip
        """O, divided by its sums: fp32 partials of a split request, else the output rows."""
        split_slot, rows = c.piece[SPLIT_SLOT, index], c.piece[S_Q, index] * c.heads
        token0, batch = c.piece[TOKEN0, index], c.piece[BATCH_COORD, index]
        if split_slot >= 0:
            # As the accumulators lie: 16 bytes per thread, 512 contiguous bytes per warp, no shuffles.
            if const_expr(self.is_halved):
                if c.is_merged != 0:
                    self.store_halves(c, accs, split_slot, index, half)
                else:
                    self.store_units(c, accs, split_slot, index, half)
            else:
                self.store_units(c, accs, split_slot, index, half)
        else:
            for side in cutlass.range_constexpr(2):
                row = c.m_block * 64 + row0 + 8 * side
                # Lanes exchange values, so all take part; those of rows behind the end do not store.
                token = row // c.heads
                line = c.out[batch, token0 + token, (c.kv_head - token) * c.heads + row, None]
                self.store_row(line, accs, c, half, side, row < rows)

    @cute.jit
    def store_row(
        self, line: cute.Tensor, accs: cutlass.Constexpr, c: cutlass.Constexpr, half: Int32,
        side: cutlass.Constexpr, is_row: Boolean,
    ):  # fmt: skip
        """Half a row of out from the four lanes that share it, as 16-byte stores.

        A lane holds column pairs 8 i + 2 lane; in groups of four pairs the lanes transpose, so that each ends with eight
        adjacent columns. Pairs stored as they are cost four times as many store instructions.
        """
        # Through a shuffle, which stays where it is written: addresses hoisted out of the piece loop would spill.
        quad = cute.arch.shuffle_sync_bfly(c.lane, 0) & 3
        base = cute.make_ptr(
            self.dtype, (line.iterator + (half * 256 + quad * 8)).toint(), cute.AddressSpace.gmem, assumed_align=16
        )
        pairs = cute.make_rmem_tensor(cute.make_layout((2, 4), stride=(1, 2)), self.dtype)
        words = cute.recast_tensor(cute.make_tensor(pairs.iterator, cute.make_layout(8)), Int32)
        for h in cutlass.range_constexpr(2):
            for i in cutlass.range_constexpr(0, 16, 4):
                for g in cutlass.range_constexpr(4):
                    pairs[0, g] = accs[h][(i + g) * 4 + 2 * side].to(self.dtype)
                    pairs[1, g] = accs[h][(i + g) * 4 + 2 * side + 1].to(self.dtype)
                for step in (1, 2):
                    odd = (quad & step) != 0
                    for g in cutlass.range_constexpr(4):
                        if const_expr(g & step == 0):
                            low, high = words[g], words[g + step]
                            sent = cute.arch.shuffle_sync_bfly(low if odd else high, step)
                            words[g] = sent if odd else low
                            words[g + step] = high if odd else sent
                if is_row:
                    cute.autovec_copy(
                        cute.make_tensor(pairs.iterator, cute.make_layout(8)),
                        cute.make_tensor(base + (h * 128 + i * 8), cute.make_layout(8)),
                    )

    # ------------------------------------------------------------------ merge

    @cute.jit
    def announce(self, c: cutlass.Constexpr, index: Int32):
        """Count the piece that all value warps have stored; with the request's last one the count is 0 again."""
        cute.arch.barrier(barrier_id=3, number_of_threads=256)
        if c.warp_idx == 4:
            with cute.arch.elect_one():
                block = c.kv_head * c.row_blocks + c.m_block
                cute.arch.inline_ptx(
                    "{ .reg .b32 old; atom.release.gpu.global.inc.u32 old, [{$r0}], {$r1}; }",
                    read_only_args=[
                        (c.arrivals.iterator + (c.piece[SLOT_OF, index] * c.arrivals.stride[0] + block)).toint(),
                        c.piece[PIECES_OF, index] - 1,
                    ],
                )
