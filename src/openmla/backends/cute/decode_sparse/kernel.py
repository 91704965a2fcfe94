"""Token-sparse MLA decode over a quantised cache: bound by the tensor cores, with the dequantisation hidden behind them.

Computes
    For every query row (token, head) and the keys j that the token's `indices` name, and those that `extra_indices` name in
    a second cache of the same layout (see `Bytes` in config.py for how a
    key is stored; its value is its first 512 columns):
    k_j = bf16(code * scale)    s_j = scale_log2 * <q, k_j>    p_j = 2^(s_j - m)
    out = sum_j p_j k_j[:512] / sum_j p_j    lse = m + log2 sum_j p_j    out *= 1 / (1 + e^(sink - lse)) with a sink

Shapes
    q [batch, s_q, h_q, d_qk], kv bytes of pages, indices [batch, s_q, topk], out [batch, s_q, h_q, 512]. A CTA takes 64
    heads of query token s of every request in its part of the plan: a stretch of the line of 64-key tiles, in pieces of
    one request each.

Schedule (512 threads; time runs down; one tile of 64 keys per turn)
    producers (4 warps)                scores (warpgroup 0)              values left | right (warpgroups 1 | 2)
    ring of two tiles, 4 units each    S(j) = Q K(j)^T, 36 wgmmas as     wait for P(j-1), rescale O if told to
    unit = 64 keys x 128 columns:        the units come: 0, 2, 1, 3,
      16 B of codes per lane and key     RoPE; Q's first 128 columns
      by cp.async, two units ahead,      are held in registers
      to a place that only this warp   some issued     -> gate left      left begins P(j-1) V(j-1)
      reads                            more, or all    -> gate right     right begins P(j-1) V(j-1)
      code * scale -> bf16 -> ring     all complete:
    RoPE: cp.async, as it is, and        maximum, exponentials, P(j) out   each quarter of V read: its unit is free
      handed over with the last unit
    indices three tiles ahead, rows
      into L2 one tile before their
      codes are asked for
    With operands fp16 (a candidate: nothing leads to it) codes become fp16, Q too, row by row (`fit_q`), and RoPE stays bf16.
    While P(j-1) V(j-1) runs, the scores warpgroup makes P(j) and the producers fill the units that come free; then S(j+1)
    has the tensor cores for itself. A warp only handles its own 16 keys of every tile: producers never wait for each other.
    Codes do not travel in registers: all loads of a warp share a scoreboard, and the first use of one unit's codes would wait
    for those of the next one too.

Budget (checked by tests/compile/test_decode_sparse.py against tests/compile/budgets_sparse.toml)
    shared memory 231,424 of 232,448 bytes (1,024 are reserved); registers 120 scores, 160 values, 72 producers, or
    112, 160, 80 (x 128 = 65,536; `Config.roles`), no spills.

Synchronisation (mbarriers; the protocol is run as a model by tests/compile/test_decode_sparse_protocol.py)
    full[unit]           producers -> scores (and, through P, values)   4 warps; the reader fences the proxies
    empty[unit]          values -> producers                            4 warps of the half that reads it
    rope_full/empty      producers -> scores / back                     4 / 4 warps
    q_full/empty         copy engine -> scores / back                   1 + bytes / 4 warps
    p_full/empty[2]      scores -> values / back                        4 / 8 warps
    go[half, 2]          scores -> values: the gates                    4 warps
    sum_full/empty       scores -> values: 1 / row sums                 32 lanes / 8 warps
    piece_full/empty[8]  first producer warp -> everybody / back        1 / 15 warps

    Long lists of `fp8_656` take another schedule with the same arguments and plan: `swapped`.

Sources
    Gates, split of O and lazy rescale: decode_dense. Producer warps that dequantise for the others: FlashMLA's FP8 kernel,
    which exchanges dequantised halves between two CTAs; here every CTA dequantises its own tiles.

Deep dive: docs/kernels/decode_sparse.md
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

from openmla.backends.cute.decode_sparse.config import (
    FIT_HIGH,
    FIT_LOW,
    SLICE_BYTES,
    Config,
    lane_chunk,
    lane_key,
    load_chunk,
    load_key,
    of_key,
    raw_place,
    rope_place,
    scale_holder,
    scale_shift,
    scale_word,
    unit_place,
)
from openmla.backends.cute.decode_sparse.merge import SHARE_FIELDS, SHARES, Merge

THREADS = 512
UNIT_BYTES = 2 * SLICE_BYTES
UNITS = 8  # two tiles of four
Q_HELD = 128  # columns of Q that the scores warpgroup holds in registers, which makes room for RAW_BYTES
RAW_BYTES = 2 * 2048  # codes under way of a producer warp: two units of 16 keys x 128 bytes
ORDER = (0, 2, 1, 3)  # in which the values warpgroups free the units of a tile, so in which they are filled and read
AHEAD = 3  # tiles that the indices are ahead, which may be as many pieces
PIECES = 8  # descriptors; four would do, but then a piece is begun only when the one before it is done
EVICT_FIRST = 0x12F0000000000000
LN2 = 0.6931471805599453
LOG2_E = 1.4426950408889634
FAULT_INDEX, FAULT_LENGTH = 8, 16
NO_ROW = -1  # offset of a key that is not there
# A finite start for the running maximum: -inf would make -inf - -inf where a row has seen no key.
NO_MAXIMUM = -1.0e30
# Rescale O only when a score exceeds the reference by 2^8: P stays below 256, exact enough in bf16.
LAZY_LOG2 = 8.0

# Fields of a piece descriptor: tiles (-1 ends the list), request, first tile, end of the token's index list, slot of its
# partial result (-1: none); with a second cache the tiles of the first list, behind which those of the second begin, and
# the end of the second list. Where CTAs merge, so without a second cache, instead of these: slot of the request's first
# piece, and its pieces.
TILES, REQUEST, FIRST_BLOCK, STOP, SPLIT_SLOT, MAIN_TILES, EXTRA_STOP = range(7)
FIRST_SLOT, PIECES_OF = MAIN_TILES, EXTRA_STOP
FIELDS = 8


class Scope:
    """Names that the warp roles share. Opaque to the tracer, which would thread a SimpleNamespace through every branch."""

    def __init__(self, **names: Any) -> None:
        self.__dict__.update(names)


class DecodeSparse(Merge):
    """The launch (`__call__`) and the device code (`kernel` and one method per warp role)."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.bytes = config.bytes
        self.is_fp16 = config.operands == "fp16"
        self.operand = cutlass.Float16 if self.is_fp16 else cutlass.BFloat16
        # The last 64 columns of the value are bf16 as stored, and take weights in bf16 beside those in fp16.
        self.is_mixed = self.is_fp16 and config.bytes.rope_is_value
        self.smem_bytes = 0

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,  # bf16 [batch, s_q, h_q, d_qk]
        kv: cute.Tensor,  # int32 [num_pages, words of a page]
        indices: cute.Tensor,  # int32 [batch, s_q, topk]
        topk_length: cute.Tensor,  # int32 [batch, s_q]; read only with has_length
        extra_kv: cute.Tensor,  # these three as above, of a second cache; read only by a variant with extra
        extra_indices: cute.Tensor,
        extra_length: cute.Tensor,
        metadata: cute.Tensor,  # int32 [num_parts, 8]
        num_splits: cute.Tensor,  # int32 [batch + 1]
        sink: cute.Tensor,  # fp32 [h_q]; read only with has_sink
        out: cute.Tensor,  # bf16 [batch, s_q, h_q, 512]
        lse: cute.Tensor,  # fp32 [batch, h_q, s_q], natural log
        out_accum: cute.Tensor,  # fp32 [slots, s_q * h_q, 512]
        lse2_accum: cute.Tensor,  # fp32 [slots, s_q * h_q], base 2
        fault_word: cute.Tensor,  # int32 [1]
        # int32 [num_parts, s_q, 64-head blocks]: fp16 writes which CTAs have voided their results. Where CTAs merge, [pieces,
        # s_q, 64-head blocks]: counts of stored pieces, 0 between launches
        redo: cute.Tensor,
        blocks: Int32,  # tiles of a request, both lists at their full length
        page_size: Int32,
        extra_page_size: Int32,
        chunk_blocks: Int32,  # 0, or the piece length of batch_invariant
        has_length: Int32,
        has_extra_length: Int32,
        has_sink: Int32,
        has_redo: Int32,  # bf16: run those CTAs alone
        scale_log2: Float32,  # softmax_scale * log2(e)
        stream: cuda.CUstream,
    ):
        d_qk, dtype = self.bytes.d_qk, cutlass.BFloat16
        operand = self.operand
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, dtype)

        def tiled(*shape: int) -> Any:
            return cute.tile_to_shape(atom, shape, order=tuple(range(len(shape))))

        ring_layout, rope_layout, p_layout = tiled(64, 128, UNITS), tiled(64, 64, 1), tiled(64, 64, 2)
        # Place for what a layout does not have serves it for what it alone has.
        rope_bytes = (2 if self.is_mixed else 1) * SLICE_BYTES
        q_layout = tiled(64, d_qk - Q_HELD)

        def mma(n: int, b_major: Any, source: Any = warpgroup.OperandSource.SMEM, of: Any = operand) -> Any:
            return sm90.make_trivial_tiled_mma(of, of, OperandMajorMode.K, b_major, Float32, (1, 1, 1), (64, n), source)

        qk_first = mma(64, OperandMajorMode.K, warpgroup.OperandSource.RMEM)  # overwrites S, the others add to it
        qk_held = mma(64, OperandMajorMode.K, warpgroup.OperandSource.RMEM)
        qk = mma(64, OperandMajorMode.K)
        qk_rope = mma(64, OperandMajorMode.K, of=dtype)  # these columns stay as they are stored
        pv = mma(128, OperandMajorMode.MN)
        pv_code, pv_rope = mma(64, OperandMajorMode.MN), mma(64, OperandMajorMode.MN, of=dtype)
        # head | column | token | request
        q_rows = cute.make_tensor(q.iterator, cute.select(q.layout, [2, 3, 1, 0]))
        tma_q, t_q = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), q_rows, tiled(64, 64), (64, 64))

        merges = 1 if self.config.merges else 0

        @cute.struct
        class Storage:
            full: cute.struct.MemRange[Int64, UNITS]
            empty: cute.struct.MemRange[Int64, UNITS]
            rope_full: cute.struct.MemRange[Int64, 1]
            rope_empty: cute.struct.MemRange[Int64, 1]
            q_full: cute.struct.MemRange[Int64, 1]
            q_empty: cute.struct.MemRange[Int64, 1]
            p_full: cute.struct.MemRange[Int64, 2]
            p_empty: cute.struct.MemRange[Int64, 2]
            go: cute.struct.MemRange[Int64, 5]  # the last one is nobody's: see `gate`
            sum_full: cute.struct.MemRange[Int64, 1]
            sum_empty: cute.struct.MemRange[Int64, 1]
            piece_full: cute.struct.MemRange[Int64, PIECES]
            piece_empty: cute.struct.MemRange[Int64, PIECES]
            piece: cute.struct.MemRange[Int32, FIELDS * PIECES]
            plan: cute.struct.MemRange[Int32, 4]
            valid: cute.struct.MemRange[Int32, 4 * 4]
            need: cute.struct.MemRange[Int32, 2 * 4]
            factor: cute.struct.MemRange[Float32, 2 * 64]
            inverse: cute.struct.MemRange[Float32, 64]
            known: cute.struct.MemRange[Int64, 1]
            parts_full: cute.struct.MemRange[Int64, merges]
            share: cute.struct.MemRange[Int32, merges * SHARE_FIELDS * (SHARES + 1)]
            verdict: cute.struct.MemRange[Int32, 4]
            ring: cute.struct.Align[cute.struct.MemRange[operand, cute.cosize(ring_layout)], 1024]
            rope: cute.struct.Align[cute.struct.MemRange[dtype, rope_bytes // 2], 1024]
            q: cute.struct.Align[cute.struct.MemRange[dtype, cute.cosize(q_layout)], 1024]
            raw: cute.struct.Align[cute.struct.MemRange[Int32, 4 * RAW_BYTES // 4], 1024]
            p: cute.struct.Align[cute.struct.MemRange[operand, cute.cosize(p_layout)], 1024]

        self.storage = Storage
        self.smem_bytes = Storage.size_in_bytes()
        self.kernel(
            tma_q, t_q, q, kv, indices, topk_length, extra_kv, extra_indices, extra_length, metadata, num_splits, sink, out,
            lse, out_accum, lse2_accum, fault_word, redo, blocks, page_size, extra_page_size, chunk_blocks, has_length,
            has_extra_length, has_sink, has_redo, scale_log2, qk_first, qk_held, qk, qk_rope, pv,
            pv_code, pv_rope, ring_layout, rope_layout, q_layout, p_layout,
        ).launch(
            grid=[cute.ceil_div(q.shape[2], 64), q.shape[1], metadata.shape[0]],
            block=[THREADS, 1, 1],
            min_blocks_per_mp=1,
            stream=stream,
            use_pdl=self.config.start == "early",
            cooperative=self.config.merges,
        )  # fmt: skip

    @cute.kernel
    def kernel(
        self,
        tma_q: cute.CopyAtom,
        t_q: cute.Tensor,
        q: cute.Tensor,
        kv: cute.Tensor,
        indices: cute.Tensor,
        topk_length: cute.Tensor,
        extra_kv: cute.Tensor,
        extra_indices: cute.Tensor,
        extra_length: cute.Tensor,
        metadata: cute.Tensor,
        num_splits: cute.Tensor,
        sink: cute.Tensor,
        out: cute.Tensor,
        lse: cute.Tensor,
        out_accum: cute.Tensor,
        lse2_accum: cute.Tensor,
        fault_word: cute.Tensor,
        redo: cute.Tensor,
        blocks: Int32,
        page_size: Int32,
        extra_page_size: Int32,
        chunk_blocks: Int32,
        has_length: Int32,
        has_extra_length: Int32,
        has_sink: Int32,
        has_redo: Int32,
        scale_log2: Float32,
        qk_first: cute.TiledMma,
        qk_held: cute.TiledMma,
        qk: cute.TiledMma,
        qk_rope: cute.TiledMma,
        pv: cute.TiledMma,
        pv_code: cute.TiledMma,
        pv_rope: cute.TiledMma,
        ring_layout: cute.ComposedLayout,
        rope_layout: cute.ComposedLayout,
        q_layout: cute.ComposedLayout,
        p_layout: cute.ComposedLayout,
    ):
        m_block, token, part = cute.arch.block_idx()
        warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        store = SmemAllocator().allocate(self.storage)
        pointer = lambda name: getattr(store, name).data_ptr()  # noqa: E731
        c = Scope(
            **{name: pointer(name) for name in (
                "full", "empty", "rope_full", "rope_empty", "q_full", "q_empty", "p_full", "p_empty", "go", "sum_full",
                "sum_empty", "piece_full", "piece_empty", "known",
            )},
            **self.merge_storage(store),
            piece=store.piece.get_tensor(cute.make_layout((FIELDS, PIECES))),
            plan=store.plan.get_tensor(cute.make_layout(4)),
            valid=store.valid.get_tensor(cute.make_layout((4, 4))),
            verdict=store.verdict.get_tensor(cute.make_layout(4)),
            need=store.need.get_tensor(cute.make_layout((4, 2))),
            factor=store.factor.get_tensor(cute.make_layout((64, 2))),
            inverse=store.inverse.get_tensor(cute.make_layout(64)),
            s_ring=store.ring.get_tensor(ring_layout.outer, swizzle=ring_layout.inner),
            s_rope=store.rope.get_tensor(rope_layout.outer, swizzle=rope_layout.inner),
            s_q_stored=store.q.get_tensor(q_layout.outer, swizzle=q_layout.inner),
            s_q=store.q.get_tensor(q_layout.outer, swizzle=q_layout.inner, dtype=self.operand),
            s_p=store.p.get_tensor(p_layout.outer, swizzle=p_layout.inner),
            s_ring_stored=store.ring.get_tensor(ring_layout.outer, swizzle=ring_layout.inner, dtype=cutlass.BFloat16),
            s_p_rope=store.rope.get_tensor(p_layout.outer, swizzle=p_layout.inner) if self.is_mixed else None,
            ring_base=store.ring.data_ptr().toint(), rope_base=store.rope.data_ptr().toint(),
            raw_base=store.raw.data_ptr().toint(), q_base=store.q.data_ptr().toint(),
            tma_q=tma_q, t_q=t_q, q=q, kv=kv, indices=indices, topk_length=topk_length, extra_kv=extra_kv,
            extra_indices=extra_indices, extra_length=extra_length, metadata=metadata, num_splits=num_splits, sink=sink,
            out=out, lse=lse, out_accum=out_accum, lse2_accum=lse2_accum, fault_word=fault_word, redo=redo, blocks=blocks,
            page_size=page_size,
            extra_page_size=extra_page_size, chunk_blocks=chunk_blocks, has_length=has_length,
            has_extra_length=has_extra_length, has_sink=has_sink, scale_log2=scale_log2, h_q=out.shape[2],
            qk_first=qk_first, qk_held=qk_held, qk=qk, qk_rope=qk_rope, pv=pv, pv_code=pv_code,
            pv_rope=pv_rope,
            m_block=m_block, token=token, part=part,
        )  # fmt: skip

        if warp_idx == 0:
            with cute.arch.elect_one():
                for pointer_, count, copies in (
                    (c.full, 4, UNITS),
                    (c.empty, 4, UNITS),
                    (c.rope_full, 4, 1),
                    (c.rope_empty, 4, 1),
                    (c.q_full, 1, 1),
                    (c.q_empty, 4, 1),
                    (c.p_full, 4, 2),
                    (c.p_empty, 8, 2),
                    (c.go, 4, 4),
                    (c.go + 4, (1 << 20) - 1, 1),  # nobody's: never complete, so that nobody misses a wait
                    (c.sum_full, 4 * 8, 1),
                    (c.sum_empty, 8, 1),
                    *(((c.known, 4, 1),) if self.is_fp16 else ()),
                    *(((c.parts_full, 1, 1),) if self.config.merges else ()),
                    (c.piece_full, 1, PIECES),
                    (c.piece_empty, 12 + 3, PIECES),  # math warps and the other producers
                ):
                    for i in range(copies):
                        cute.arch.mbarrier_init(pointer_ + i, count)
                if const_expr(self.config.merges):
                    self.begin_shares(c)
            cpasync.prefetch_descriptor(tma_q)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        if const_expr(self.config.early_merge):
            cute.arch.griddepcontrol_launch_dependents()  # the merge, which waits for the end of this kernel itself
        if const_expr(self.config.start == "early"):
            # What is read from here on, the kernel before may have written. Producers wait behind the plan, which was made
            # on the host and never changes.
            if warp_idx < 12:
                cute.arch.griddepcontrol_wait()
        is_wanted = Boolean(True)
        if const_expr(not self.is_fp16 and self.config.start == "plain"):  # what repeats CTAs starts plainly
            if has_redo != 0:
                is_wanted = redo[part, token, m_block] != 0

        for each in (pv, pv_code, pv_rope):
            each.set(warpgroup.Field.ACCUMULATE, True)
        if not is_wanted:
            pass
        elif warp_idx < 4:
            cute.arch.setmaxregister_decrease(self.config.roles["scores"])
            self.scores(self.with_thread(c))
        elif warp_idx < 12:
            cute.arch.setmaxregister_increase(self.config.roles["values"])
            if const_expr(self.is_mixed):  # the halves differ
                if warp_idx < 8:
                    self.values(self.with_thread(c), 0)
                else:
                    self.values(self.with_thread(c), 1)
            else:
                self.values(self.with_thread(c), None)
        else:
            cute.arch.setmaxregister_decrease(self.config.roles["producers"])
            self.produce(self.with_thread(c))

    # ------------------------------------------------------------------ small steps that several roles share

    def with_thread(self, c: Scope) -> Scope:
        """The names of a role and its thread's place, through a shuffle: the warp within its warpgroup, the lane.

        A shuffle stays where it is written. What all roles have in common would be kept in memory between them.
        """
        tid, _, _ = cute.arch.thread_idx()
        tid = cute.arch.shuffle_sync_bfly(tid, 0)
        index = cute.arch.make_warp_uniform(tid // 32)
        return Scope(**vars(c), group=index // 4, warp=index % 4, thread=tid % 128, lane=tid % 32)

    @cute.jit
    def arrive(self, barrier: cutlass.Constexpr):
        """One arrival of this warp."""
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(barrier)

    @cute.jit
    def next_piece(self, c: cutlass.Constexpr, piece: Int32):
        """Tiles of a piece, once its descriptor is there."""
        cute.arch.mbarrier_wait(c.piece_full + piece % PIECES, (piece // PIECES) & 1)
        return cute.arch.make_warp_uniform(c.piece[TILES, piece % PIECES])

    @cute.jit
    def first_piece(self, c: cutlass.Constexpr):
        """Tiles of the first piece; none where fp16 operands would not be exact for the keys of the first tile."""
        tiles = self.next_piece(c, Int32(0))
        if const_expr(self.is_fp16):
            cute.arch.mbarrier_wait(c.known, 0)
            bad = c.verdict[0] | c.verdict[1] | c.verdict[2] | c.verdict[3]
            tiles = cute.arch.make_warp_uniform(Int32(-1) if bad != 0 else tiles)
        return tiles

    # ------------------------------------------------------------------ plan and Q: the first producer warp

    @cute.jit
    def begin_plan(self, c: cutlass.Constexpr):
        """Where this part's stretch begins: request, tile, split."""
        if c.lane == 0:
            meta, plan = c.metadata, c.plan
            plan[0], plan[1], plan[2] = meta[c.part, 0], meta[c.part, 2], meta[c.part, 4]
        cute.arch.sync_warp()

    @cute.jit
    def describe(self, c: cutlass.Constexpr, piece: Int32):
        """Write the descriptor of the next piece of this part's stretch of the line, or of its end."""
        fields, plan, meta = c.piece, c.plan, c.metadata
        index = piece % PIECES
        cute.arch.mbarrier_wait(c.piece_empty + index, ((piece // PIECES) & 1) ^ 1)
        if c.lane == 0:
            request, block, split = plan[0], plan[1], plan[2]
            last = cutlass.min(meta[c.part, 1], c.out.shape[0] - 1)
            tiles = Int32(-1)
            if request <= last:
                end = c.blocks
                own = self.list_length(c, c.topk_length, c.has_length, request, c.indices.shape[2])
                own_tiles = (own + 63) // 64
                if const_expr(self.config.has_extra):
                    extra = self.list_length(
                        c, c.extra_length, c.has_extra_length, request, c.extra_indices.shape[2]
                    )  # fmt: skip
                    fields[MAIN_TILES, index] = own_tiles
                    fields[EXTRA_STOP, index] = extra
                    own_tiles += (extra + 63) // 64
                if request == meta[c.part, 1]:
                    end = cutlass.min(end, meta[c.part, 3])
                step = c.chunk_blocks if c.chunk_blocks > 0 else cutlass.max(end - block, 1)
                count = cutlass.min(end - block, step)
                first_slot = c.num_splits[request]
                is_split = c.num_splits[request + 1] - first_slot > 1
                fields[REQUEST, index] = request
                fields[FIRST_BLOCK, index] = block
                fields[STOP, index] = own
                fields[SPLIT_SLOT, index] = first_slot + split if is_split else Int32(-1)
                if const_expr(self.config.merges):
                    fields[FIRST_SLOT, index] = first_slot
                    fields[PIECES_OF, index] = c.num_splits[request + 1] - first_slot
                # A token with a shorter list than its request's longest skips tiles; an empty piece is one masked tile.
                tiles = cutlass.max(cutlass.min(count, own_tiles - block), 1)
                block += step
                split += 1
                if block >= end:
                    request += 1
                    block, split = Int32(0), Int32(0)
                plan[0], plan[1], plan[2] = request, block, split
            fields[TILES, index] = tiles
        self.arrive(c.piece_full + index)

    @cute.jit
    def list_length(self, c: cutlass.Constexpr, lengths: cute.Tensor, is_given: Int32, request: Int32, topk: Int32):
        """How many leading indices of this CTA's token count."""
        own = topk
        if is_given != 0:
            if const_expr(self.config.start == "early"):
                cute.arch.griddepcontrol_wait()
            asked = lengths[request, c.token]
            own = cutlass.min(cutlass.max(asked, 0), topk)
            if (own != asked) & (c.m_block == 0):
                cute.arch.atomic_or(c.fault_word.iterator, Int32(FAULT_LENGTH))
        return own

    @cute.jit
    def load_q(self, c: cutlass.Constexpr, piece: Int32):
        """This CTA's 64 heads of the piece's query token, when the scores of the piece before are complete."""
        tile = cute.local_tile(c.t_q, (64, 64), (c.m_block, None, c.token, c.piece[REQUEST, piece % PIECES]))
        boxes = cute.group_modes(cute.flat_divide(c.s_q_stored, (64, 64))[None, None, 0, None], 0, 2)
        s_q, g_q = cpasync.tma_partition(c.tma_q, 0, cute.make_layout(1), boxes, cute.group_modes(tile, 0, 2))
        slices = (self.bytes.d_qk - Q_HELD) // 64
        cute.arch.mbarrier_wait(c.q_empty, (piece & 1) ^ 1)
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(c.q_full, slices * SLICE_BYTES)
        for x in cutlass.range_constexpr(slices):
            cute.copy(
                c.tma_q, g_q[None, Q_HELD // 64 + x], s_q[None, x], tma_bar_ptr=c.q_full, cache_policy=Int64(EVICT_FIRST)
            )  # fmt: skip

    # ------------------------------------------------------------------ producers

    @cute.jit
    def produce(self, c: cutlass.Constexpr):
        """This warp's 16 keys of every tile, from the cache into the ring.

        A lane handles one of every four keys, and sixteen columns of each unit; it loads from another key, so that eight
        lanes load 128 contiguous bytes, while the eight of a store phase hit all 32 banks (config.py says which lane does what).
        """
        lane = c.lane
        s = Scope(
            key=lane_key(lane), chunk=lane_chunk(lane), place=unit_place(c.warp, lane), is_lead=c.warp == 0,
            page_log2=self.log2_of(c.page_size),
            load_key=load_key(lane), load_chunk=load_chunk(lane), rope_place=rope_place(c.warp, lane),
            raw_to=c.raw_base + c.warp * RAW_BYTES + raw_place(load_key(lane), load_chunk(lane)),
            raw_from=c.raw_base + c.warp * RAW_BYTES + raw_place(lane_key(lane), lane_chunk(lane)),
        )  # fmt: skip
        raw = cute.make_rmem_tensor(8, Int32)  # of two keys
        offsets = cute.make_rmem_tensor(4, Int32)  # of this lane's four keys, in 16 bytes
        scales = cute.make_rmem_tensor(self.bytes.scale_words, Int32)
        later_scales = cute.make_rmem_tensor(self.bytes.scale_words, Int32)

        if s.is_lead:
            self.begin_plan(c)
            for first in cutlass.range(AHEAD, unroll=1):
                self.describe(c, first)
        if const_expr(self.config.start == "early"):
            cute.arch.griddepcontrol_wait()
        tiles = self.next_piece(c, Int32(0))
        if const_expr(self.config.start == "plain"):
            if s.is_lead & (tiles > 0):
                self.load_q(c, Int32(0))
        # Of the tiles to come: the cursor in the indices; where tile j + 1 has the lane's key; tile j + 2's index. And
        # whether tiles j, j + 1, j + 2 are of the second cache.
        at_piece, left, room, address = Int32(0), Int32(0), Int32(0), Int64(0)
        index0, extra0, at_piece, left, room, address = self.next_index(c, at_piece, left, room, address)
        index1, extra1, at_piece, left, room, address = self.next_index(c, at_piece, left, room, address)
        index2, extra2, at_piece, left, room, address = self.next_index(c, at_piece, left, room, address)
        offset, scale_offset = self.locate(c, s, index0, extra0)
        self.load_scales(c, offset, scale_offset, extra0, scales)
        self.note_valid(c, Int32(0), offset)
        self.spread(s, offset, offsets)
        for p in cutlass.range_constexpr(2):
            for i in cutlass.range_constexpr(4):
                self.load_codes(c, s, offsets[i], extra0, ORDER[p], i, p)
            self.commit()
        if const_expr(self.config.start == "early"):  # Q behind the first rows, of which there are more
            if s.is_lead & (tiles > 0):
                self.load_q(c, Int32(0))
        offset, scale_offset = self.locate(c, s, index1, extra1)
        self.prefetch(c, offset, extra1)
        caches = extra0 | (extra1 << 1) | (extra2 << 2)  # one bit per tile to come

        if const_expr(self.is_fp16):
            tiles = self.judge_first(c, s, scales, tiles)
        turn, piece = Int32(0), Int32(0)
        while tiles > 0:
            if s.is_lead:
                self.describe(c, piece + AHEAD)
            for _ in cutlass.range(tiles, unroll=1):
                base, phase = 4 * (turn & 1), ((turn >> 1) & 1) ^ 1
                for p in cutlass.range_constexpr(4):
                    # Groups under way, oldest first: unit p, unit p + 1; with p == 3 RoPE between them.
                    unit = base + ORDER[p]
                    late_rope = self.bytes.rope_place > 0 and p >= 2
                    parts = [self.scale_of(s, scales, ORDER[p], i) for i in range(4)]
                    self.landed(2 if const_expr(late_rope and p == 3) else 1)
                    cute.arch.sync_warp()  # lanes take what others have loaded
                    for i in cutlass.range_constexpr(2):
                        self.take_codes(s, p % 2, i, raw)
                    cute.arch.mbarrier_wait(c.empty + unit, phase)
                    if const_expr(p == 2):
                        # There is one place for RoPE, free when the scores of the tile before are complete: to wait for it
                        # any earlier than this is to make every tile wait for them.
                        if const_expr(self.bytes.has_rope_slice):
                            cute.arch.mbarrier_wait(c.rope_empty, (turn & 1) ^ 1)
                            self.load_rope(c, s, offsets, caches & 1, c.rope_base)
                            self.commit()
                        if const_expr(self.bytes.rope_is_value):  # the second half of unit 3, which is filled next
                            cute.arch.mbarrier_wait(c.empty + base + 3, phase)
                            self.load_rope(
                                c, s, offsets, caches & 1, c.ring_base + (base + 3) * UNIT_BYTES + SLICE_BYTES
                            )  # fmt: skip
                            self.commit()
                        self.spread(s, offset, offsets)
                        self.note_valid(c, turn + 1, offset)
                        self.load_scales(c, offset, scale_offset, (caches >> 1) & 1, later_scales)
                        offset, scale_offset = self.locate(c, s, index2, (caches >> 2) & 1)
                        self.prefetch(c, offset, (caches >> 2) & 1)
                        index2, extra2, at_piece, left, room, address = self.next_index(
                            c, at_piece, left, room, address
                        )
                    for i in cutlass.range_constexpr(4):
                        self.store_unit(c, s, raw, parts[i], unit, ORDER[p], i)
                        if const_expr(i < 2):
                            self.take_codes(s, p % 2, i + 2, raw)
                        cute.arch.sync_warp()  # one key after the other: all at once, conversions would spill
                        if const_expr(i == 1):  # all lanes took their codes of the unit, so those two units on may come
                            for y in cutlass.range_constexpr(4):
                                self.load_codes(
                                    c, s, offsets[y], caches & 1 if p < 2 else (caches >> 1) & 1, ORDER[(p + 2) % 4], y, p % 2
                                )  # fmt: skip
                            self.commit()
                    if const_expr(late_rope and p == 3):
                        self.landed(2)
                    # The tensor cores read the ring through the async proxy.
                    if const_expr(self.config.fence == "writer"):
                        cute.arch.fence_view_async_shared()
                    if const_expr(p == 3 and self.bytes.has_rope_slice):
                        self.arrive(c.rope_full)
                    self.arrive(c.full + unit)
                for x in cutlass.range_constexpr(self.bytes.scale_words):
                    scales[x] = later_scales[x]
                if const_expr(self.is_fp16):
                    if self.is_unfit(c, scales):
                        self.void(c)
                caches = (caches >> 1) | (extra2 << 2)
                turn += 1
            if c.warp != 0:
                self.arrive(c.piece_empty + piece % PIECES)
            piece += 1
            tiles = self.next_piece(c, piece)
            if s.is_lead & (tiles > 0):
                self.load_q(c, piece)
        self.landed(0)

    @cute.jit
    def is_unfit(self, c: cutlass.Constexpr, scales: cute.Tensor):
        """Whether any lane holds a scale with which codes are not exact in fp16: 2^-14 to 2^7 are, and 0."""
        bad = Int32(0)
        for x in cutlass.range_constexpr(self.bytes.scale_words):
            if const_expr(self.bytes.is_e8m0):
                for b in cutlass.range_constexpr(4):
                    byte = (scales[x] >> (8 * b)) & 0xFF
                    is_odd = (byte < FIT_LOW) | (byte > FIT_HIGH)
                    if const_expr(self.bytes.scale_bytes // 2 + 4 * x + b >= self.bytes.num_scales):
                        is_odd &= c.lane < 16  # padding in the words of the others
                    bad |= Int32(1) if is_odd else Int32(0)
            else:
                exponent = scales[x] >> 23
                is_odd = ((scales[x] & 0x7FFFFF) != 0) | (exponent < FIT_LOW) | (exponent > FIT_HIGH)
                bad |= Int32(1) if is_odd & (scales[x] != 0) else Int32(0)
        return cute.arch.vote_any_sync(bad != 0)

    @cute.jit
    def void(self, c: cutlass.Constexpr):
        """Have the launch behind this one repeat this CTA."""
        redo = c.redo
        if c.lane == 0:
            redo[c.part, c.token, c.m_block] = Int32(1)

    @cute.jit
    def judge_first(self, c: cutlass.Constexpr, s: cutlass.Constexpr, scales: cute.Tensor, tiles: Int32):
        """Tell all roles whether the keys of the first tile fit; if not, there is nothing to do here."""
        verdict, redo = c.verdict, c.redo
        is_bad = self.is_unfit(c, scales)
        if c.lane == 0:
            verdict[c.warp] = Int32(1) if is_bad else Int32(0)
            if s.is_lead:
                redo[c.part, c.token, c.m_block] = Int32(0)
        self.arrive(c.known)
        left = self.first_piece(c)
        if (left <= 0) & (tiles > 0):
            self.void(c)
            if s.is_lead:
                cute.arch.mbarrier_wait(c.q_full, 0)  # shared memory must outlive what is on its way there
        return left

    @cute.jit
    def commit(self):
        """Close a group of copies."""
        cute.arch.inline_ptx("cp.async.commit_group;")

    @cute.jit
    def landed(self, pending: cutlass.Constexpr):
        """Wait until no more than `pending` groups of this lane's copies are under way."""
        cute.arch.inline_ptx("cp.async.wait_group " + str(pending) + ";")

    @cute.jit
    def next_index(self, c: cutlass.Constexpr, piece: Int32, left: Int32, room: Int32, address: Int64):
        """The index of key `lane % 16` of this warp in the next tile, its cache, and the cursor behind it.

        The cursor: the piece, how many of its tiles are left (0: the piece is not begun), how far the lane's key is from the
        end of the list (0 and less: behind it), the address of its index.
        """
        index, is_extra = Int32(-1), Int32(0)
        if left == 0:
            where = piece % PIECES
            cute.arch.mbarrier_wait(c.piece_full + where, (piece // PIECES) & 1)
            left = cutlass.max(cute.arch.make_warp_uniform(c.piece[TILES, where]), 0)
            if left > 0:
                position = c.piece[FIRST_BLOCK, where] * 64 + 16 * c.warp + c.lane % 16
                room = c.piece[STOP, where] - position
                line = c.indices[c.piece[REQUEST, where], c.token, None]
                address = line.iterator.toint() + Int64(position) * 4
                piece += 1
            else:
                room = Int32(0)
        if const_expr(self.config.has_extra):
            if left > 0:
                where = (piece + PIECES - 1) % PIECES
                position = c.piece[STOP, where] - room
                behind = position - c.piece[MAIN_TILES, where] * 64  # in the second list
                is_extra = cute.arch.make_warp_uniform(Int32(1) if behind >= 0 else Int32(0))
                if is_extra != 0:
                    if behind < c.piece[EXTRA_STOP, where]:
                        index = c.extra_indices[c.piece[REQUEST, where], c.token, behind]
                elif room > 0:
                    index = c.indices[c.piece[REQUEST, where], c.token, position]
        else:
            index = cute.arch.inline_ptx(
                "{ .reg .pred p; setp.gt.s32 p, {$r1}, 0; mov.b32 {$w0}, -1; @p ld.global.b32 {$w0}, [{$r0}]; }",
                write_only_types=[Int32],
                read_only_args=[address, room],
            )
        return index, is_extra, piece, cutlass.max(left - 1, 0), room - 64, address + 256

    @cute.jit
    def locate(self, c: cutlass.Constexpr, s: cutlass.Constexpr, index: Int32, is_extra: Int32):
        """Where a key's row begins, in 16 bytes from the start of the cache, NO_ROW for none; where its scales do, in 8.

        Notes bad indices.
        """
        page_size, pages, step = c.page_size, c.kv.shape[0], Int32(c.kv.stride[0] // 4)
        if const_expr(self.config.has_extra):
            if is_extra != 0:
                page_size, pages = c.extra_page_size, c.extra_kv.shape[0]
                step = Int32(c.extra_kv.stride[0] // 4)
        if const_expr(self.config.has_extra or self.bytes.is_e8m0 and self.bytes.rope_place == 0):  # no register for it
            page = index // page_size
        else:  # pages usually are a power of two, and a division costs thirty instructions
            page = index >> cutlass.max(s.page_log2, 0)
            if s.page_log2 < 0:
                page = index // page_size
        is_there = (index >= 0) & (page < pages)
        place = index - page * page_size
        offset = page * step + place * (self.bytes.row_bytes // 16) if is_there else Int32(NO_ROW)
        scales = Int32(0)
        if const_expr(self.bytes.scales_behind_page):
            scales = 2 * page * step + page_size * (self.bytes.row_bytes // 8) + place
        is_bad = (index != -1) & (offset == NO_ROW)
        if cute.arch.vote_any_sync(is_bad):
            if is_bad:
                cute.arch.atomic_or(c.fault_word.iterator, Int32(FAULT_INDEX))
        return offset, scales

    @cute.jit
    def log2_of(self, size: Int32):
        """The logarithm of a power of two, else -1."""
        log2 = cute.arch.inline_ptx("bfind.u32 {$w0}, {$r0};", write_only_types=[Int32], read_only_args=[size])
        return log2 if (Int32(1) << log2) == size else Int32(-1)

    @cute.jit
    def start_of(self, c: cutlass.Constexpr, is_extra: Int32) -> Int64:
        """The address of a cache."""
        start = c.kv.iterator.toint()
        if const_expr(self.config.has_extra):
            other = c.extra_kv.iterator.toint()
            start = other if is_extra != 0 else start
        return start

    @cute.jit
    def spread(self, s: cutlass.Constexpr, offset: Int32, offsets: cute.Tensor):
        """From one key per lane to the four keys that a lane loads from."""
        for i in cutlass.range_constexpr(4):
            offsets[i] = self.from_lane(offset, s.load_key, 4 * i)

    @cute.jit
    def from_lane(self, value: Int32, lane: Int32, more: cutlass.Constexpr):
        """What lane `lane + more` holds. In one piece, so that no sum of the two is kept in a register."""
        return cute.arch.inline_ptx(
            "{ .reg .b32 t; add.s32 t, {$r1}, " + str(more) + "; shfl.sync.idx.b32 {$w0}, {$r0}, t, 31, -1; }",
            write_only_types=[Int32],
            read_only_args=[value, lane],
        )

    @cute.jit
    def note_valid(self, c: cutlass.Constexpr, tile: Int32, offset: Int32):
        """Which of this warp's 16 keys of a tile are there; the place of a tile is free when the tile 4 before is done."""
        present = cute.arch.vote_ballot_sync(offset != NO_ROW) & 0xFFFF
        valid = c.valid
        if c.lane == 0:
            valid[c.warp, tile & 3] = present

    @cute.jit
    def prefetch(self, c: cutlass.Constexpr, offset: Int32, is_extra: Int32):
        """Ask for a key's bytes two tiles before they are read, so that they come from L2 then."""
        base, row_bytes = self.start_of(c, is_extra), self.bytes.row_bytes
        if const_expr(self.config.prefetch == "lines"):
            # Key `lane % 16`; one half of the lanes asks for lines from the front, the other for those up to the end.
            place = c.lane // 16 * (row_bytes - 16 - 256)
            cute.arch.inline_ptx(
                "{ .reg .b64 a; .reg .pred p; setp.ne.s32 p, {$r1}, -1; mad.wide.u32 a, {$r1}, 16, {$r0};"
                " @p prefetch.global.L2 [a]; @p prefetch.global.L2 [a + 128]; @p prefetch.global.L2 [a + 256]; }",
                read_only_args=[base + Int64(place), offset],
            )
        elif const_expr(self.config.prefetch == "bulk"):
            if (offset != NO_ROW) & (c.lane < 16):
                cute.arch.inline_ptx(
                    "{ .reg .b64 a; mad.wide.u32 a, {$r1}, 16, {$r0}; cp.async.bulk.prefetch.L2.global [a], "
                    + f"{row_bytes};"
                    + " }",
                    read_only_args=[base, offset],
                )

    @cute.jit
    def load_scales(
        self, c: cutlass.Constexpr, offset: Int32, scale_offset: Int32, is_extra: Int32, scales: cute.Tensor
    ):  # fmt: skip
        """Scales of key `lane % 16`: lanes 0 to 15 hold those of units 0 and 1, the others those of 2 and 3."""
        half = self.bytes.scale_bytes // 2
        place = self.bytes.scale_place + c.lane // 16 * half
        unit, start = (8, scale_offset) if const_expr(self.bytes.scales_behind_page) else (16, offset)
        absent = "0x7F7F7F7F" if const_expr(self.is_fp16 and self.bytes.is_e8m0) else "0"  # a scale that always fits
        code = (
            "{ .reg .b64 a, b; .reg .pred p; setp.ne.s32 p, {$r1}, -1; mad.wide.u32 a, {$r3}, "
            + str(unit)
            + ", {$r0}; cvt.u64.u32 b, {$r2}; add.u64 a, a, b; mov.b32 {$w0}, "
            + absent
            + "; "
        )
        args = [self.start_of(c, is_extra), offset, place, start]
        if const_expr(self.bytes.scale_words == 2):
            scales[0], scales[1] = cute.arch.inline_ptx(
                code + "mov.b32 {$w1}, " + absent + "; @p ld.global.nc.v2.b32 {{$w0}, {$w1}}, [a]; }",
                write_only_types=[Int32, Int32],
                read_only_args=args,
            )
        else:
            scales[0] = cute.arch.inline_ptx(
                code + "@p ld.global.nc.b32 {$w0}, [a]; }", write_only_types=[Int32], read_only_args=args
            )

    @cute.jit
    def load_codes(
        self, c: cutlass.Constexpr, s: cutlass.Constexpr, offset: Int32, is_extra: Int32, unit: cutlass.Constexpr,
        i: cutlass.Constexpr, slot: cutlass.Constexpr,
    ):  # fmt: skip
        """Sixteen codes of one key on their way to where a lane of this warp takes them; zeros where there is no key."""
        base = self.start_of(c, is_extra) + Int64(s.load_chunk * 16)
        cute.arch.inline_ptx(
            "{ .reg .b64 a; .reg .b32 n, o; .reg .pred p; setp.ne.s32 p, {$r1}, -1; selp.b32 n, 16, 0, p;"
            " selp.b32 o, {$r1}, 0, p; mad.wide.u32 a, o, 16, {$r0}; cp.async.cg.shared.global [{$r2} + "
            + str(2048 * slot + 512 * i)
            + "], [a + "
            + str(128 * unit)
            + "], 16, n; }",
            read_only_args=[base, offset, s.raw_to],
        )

    @cute.jit
    def take_codes(self, s: cutlass.Constexpr, slot: cutlass.Constexpr, i: cutlass.Constexpr, raw: cute.Tensor):
        """Sixteen codes that `load_codes` of some lane asked for."""
        at = 4 * (i % 2)
        raw[at], raw[at + 1], raw[at + 2], raw[at + 3] = cute.arch.inline_ptx(
            "ld.shared.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0} + " + str(2048 * slot + 512 * i) + "];",
            write_only_types=[Int32] * 4,
            read_only_args=[s.raw_from],
        )

    @cute.jit
    def load_rope(
        self, c: cutlass.Constexpr, s: cutlass.Constexpr, offsets: cute.Tensor, is_extra: Int32, slice_base: Int32
    ):  # fmt: skip
        """The RoPE columns of this warp's keys, as they are stored; zeros for keys that are not there."""
        base = self.start_of(c, is_extra) + Int64(s.load_chunk * 16)
        for i in cutlass.range_constexpr(4):
            there = slice_base + of_key(s.rope_place, i)
            size = Int32(16) if offsets[i] != NO_ROW else Int32(0)
            offset = offsets[i] if offsets[i] != NO_ROW else Int32(0)
            cute.arch.inline_ptx(
                "{ .reg .b64 a; mad.wide.u32 a, {$r1}, 16, {$r0}; "
                + "cp.async.cg.shared.global [{$r2}], [a + "
                + str(self.bytes.rope_place)
                + "], 16, {$r3}; }",
                read_only_args=[base, offset, there, size],
            )

    @cute.jit
    def scale_of(self, s: cutlass.Constexpr, scales: cute.Tensor, which: cutlass.Constexpr, i: cutlass.Constexpr):
        """The word that holds the scale of this lane's columns of its key i in a unit: fp32, or one of four e8m0."""
        return self.from_lane(scales[scale_word(self.bytes, which)], s.key, scale_holder(which, 4 * i))

    @cute.jit
    def store_unit(
        self, c: cutlass.Constexpr, s: cutlass.Constexpr, raw: cute.Tensor, scale: Int32, unit: Int32,
        which: cutlass.Constexpr, i: cutlass.Constexpr,
    ):  # fmt: skip
        """bf16(code * scale) of sixteen columns of key i into the ring: two 16-byte chunks of the 128-byte swizzle."""
        if const_expr(self.bytes.is_e8m0):
            byte = (scale >> scale_shift(self.bytes, which, s.chunk)) & 0xFF
            # 2^(byte - 127); 0 is 2^-127, which is subnormal, and 255 is NaN: both have the top bit of the mantissa
            scale = (byte << 23) | (Int32(0x400000) if ((byte + 1) & 0xFF) <= 1 else Int32(0))
        words = cute.make_rmem_tensor(8, Int32)
        if const_expr(self.is_fp16):
            scale = cute.arch.inline_ptx(
                "cvt.rn.f16x2.f32 {$w0}, {$r0}, {$r0};", write_only_types=[Int32], read_only_args=[self.as_float(scale)]
            )  # fmt: skip
        for x in cutlass.range_constexpr(4):
            words[2 * x], words[2 * x + 1] = self.dequantise(raw[4 * (i % 2) + x], scale)
        there = c.ring_base + unit * UNIT_BYTES + of_key(s.place, i)
        is_code = Int32(1)
        if const_expr(self.bytes.rope_is_value and which == 3):
            is_code = Int32(1) if s.chunk < 4 else Int32(0)  # columns from 448 on are RoPE and came by cp.async
        for h in cutlass.range_constexpr(2):
            cute.arch.inline_ptx(
                "{ .reg .pred p; setp.ne.s32 p, {$r5}, 0; @p st.shared.v4.b32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}}; }"
                if const_expr(self.bytes.rope_is_value and which == 3)
                else "st.shared.v4.b32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};",
                read_only_args=[
                    there ^ (16 * h), *(words[4 * h + x] for x in range(4)),
                    *([is_code] if const_expr(self.bytes.rope_is_value and which == 3) else []),
                ],
            )  # fmt: skip

    @cute.jit
    def dequantise(self, codes: Int32, scale: Int32):
        """Four e4m3 codes times an fp32 scale, rounded once, to bf16: every code, subnormals and NaN included.

        To fp16 the scale is a pair of fp16, and nothing is rounded.
        """
        if const_expr(self.is_fp16):
            return cute.arch.inline_ptx(
                "{ .reg .b16 lo, hi; .reg .b32 a, b; mov.b32 {lo, hi}, {$r0};"
                " cvt.rn.f16x2.e4m3x2 a, lo; cvt.rn.f16x2.e4m3x2 b, hi;"
                " mul.rn.f16x2 {$w0}, a, {$r1}; mul.rn.f16x2 {$w1}, b, {$r1}; }",
                write_only_types=[Int32, Int32],
                read_only_args=[codes, scale],
            )
        return cute.arch.inline_ptx(
            "{ .reg .b16 lo, hi, h0, h1, h2, h3; .reg .b32 a, b; .reg .f32 s, f0, f1, f2, f3;"
            " mov.b32 s, {$r1}; mov.b32 {lo, hi}, {$r0};"
            " cvt.rn.f16x2.e4m3x2 a, lo; cvt.rn.f16x2.e4m3x2 b, hi;"
            " mov.b32 {h0, h1}, a; mov.b32 {h2, h3}, b;"
            " cvt.f32.f16 f0, h0; cvt.f32.f16 f1, h1; cvt.f32.f16 f2, h2; cvt.f32.f16 f3, h3;"
            " mul.rn.f32 f0, f0, s; mul.rn.f32 f1, f1, s; mul.rn.f32 f2, f2, s; mul.rn.f32 f3, f3, s;"
            " cvt.rn.bf16x2.f32 {$w0}, f1, f0; cvt.rn.bf16x2.f32 {$w1}, f3, f2; }",
            write_only_types=[Int32, Int32],
            read_only_args=[codes, scale],
        )

    # ------------------------------------------------------------------ S = Q K^T and the softmax

    @cute.jit
    def scores(self, c: cutlass.Constexpr):
        """S of one tile on the tensor cores, then its probabilities while they multiply the tile before."""
        c.qk_first.set(warpgroup.Field.ACCUMULATE, False)
        c.qk_held.set(warpgroup.Field.ACCUMULATE, True)
        c.qk.set(warpgroup.Field.ACCUMULATE, True)
        rope = c.qk_rope if self.is_fp16 else c.qk
        rope.set(warpgroup.Field.ACCUMULATE, True)
        thr = c.qk.get_slice(c.thread)
        s = Scope(
            a=c.qk.make_fragment_A(thr.partition_A(c.s_q)),
            a_held=c.qk_held.make_fragment_A(c.qk_held.partition_shape_A((64, Q_HELD))),
            b_ring=c.qk.make_fragment_B(thr.partition_B(c.s_ring)),
            b_rope=rope.make_fragment_B(rope.get_slice(c.thread).partition_B(c.s_rope)),
            row0=c.warp * 16 + c.lane // 4,
        )
        s.a_rope = s.a
        if const_expr(self.is_fp16):
            s.a_rope = rope.make_fragment_A(rope.get_slice(c.thread).partition_A(c.s_q_stored))
        if const_expr(self.is_mixed):
            s.b_stored = rope.make_fragment_B(rope.get_slice(c.thread).partition_B(c.s_ring_stored))
        acc = c.qk.make_fragment_C(c.qk.partition_shape_C((64, 64)))
        packed = cute.make_rmem_tensor(acc.layout, self.operand)
        store = cute.make_tiled_copy_C(cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), self.operand), c.qk)
        thr_p = store.get_slice(c.thread)
        s.store, s.p_from, s.p_to = store, thr_p.retile(packed), thr_p.partition_D(c.s_p)
        if const_expr(self.is_mixed):
            stored = cute.make_rmem_tensor(acc.layout, cutlass.BFloat16)
            also = cute.make_tiled_copy_C(cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), cutlass.BFloat16), c.qk)
            thr_also = also.get_slice(c.thread)
            s.also, s.also_from, s.also_to = also, thr_also.retile(stored), thr_also.partition_D(c.s_p_rope)

        count, piece = Int32(0), Int32(0)
        tiles = self.first_piece(c)
        while tiles > 0:
            m0, m1, l0, l1 = Float32(NO_MAXIMUM), Float32(NO_MAXIMUM), Float32(0.0), Float32(0.0)
            self.hold_q(c, s, c.piece[REQUEST, piece % PIECES])
            cute.arch.mbarrier_wait(c.q_full, piece & 1)
            if const_expr(self.is_fp16):
                scale0, scale1 = self.fit_q(c, s)
            for j in cutlass.range(tiles, unroll=1):
                valid0, valid1 = self.multiply(c, s, acc, count, j)
                if j + 1 == tiles:
                    self.arrive(c.q_empty)
                for x in cutlass.range_constexpr(32):
                    if const_expr(self.is_fp16):
                        acc[x] = acc[x] * (scale0 if const_expr((x // 2) % 2 == 0) else scale1)
                    else:
                        acc[x] = acc[x] * c.scale_log2
                if (valid0 & valid1) != -1:
                    self.mask(c, acc, valid0, valid1)
                m0, m1, l0, l1, f0, f1, need = self.reference(acc, m0, m1, l0, l1)
                for x in cutlass.range_constexpr(32):
                    acc[x] = cute.math.exp2(acc[x], fastmath=True)
                    if const_expr((x // 2) % 2 == 0):
                        l0 += acc[x]
                    else:
                        l1 += acc[x]
                packed.store(acc.load().to(self.operand))
                buf = count & 1
                cute.arch.mbarrier_wait(c.p_empty + buf, ((count >> 1) & 1) ^ 1)
                cute.copy(s.store, s.p_from, s.p_to[None, None, None, buf])
                if const_expr(self.is_mixed):
                    stored.store(acc.load().to(cutlass.BFloat16))
                    cute.copy(s.also, s.also_from, s.also_to[None, None, None, buf])
                self.publish(c, s, buf, f0, f1, need)
                if j + 1 == tiles:  # nothing to wait for: the next scores may be far away
                    self.arrive(c.go + buf)
                    self.arrive(c.go + 2 + buf)
                count += 1
            self.sums(c, s, piece, m0, m1, l0, l1)
            piece += 1
            tiles = self.next_piece(c, piece)

    @cute.jit
    def hold_q(self, c: cutlass.Constexpr, s: cutlass.Constexpr, request: Int32):
        """The first columns of this warp's 16 rows of Q as wgmma wants them; zeros for rows behind the last head."""
        words = cute.recast_tensor(cute.make_tensor(s.a_held.iterator, cute.make_layout(Q_HELD // 2)), Int32)
        for half in cutlass.range_constexpr(2):
            head = c.m_block * 64 + s.row0 + 8 * half
            is_row = Int32(1) if head < c.h_q else Int32(0)
            line = c.q[request, c.token, cutlass.min(head, c.h_q - 1), None]
            base = line.iterator.toint() + Int64(c.lane % 4 * 4)
            for x in cutlass.range_constexpr(Q_HELD // 8):
                words[x // 2 * 4 + x % 2 * 2 + half] = cute.arch.inline_ptx(
                    "{ .reg .pred p; setp.ne.s32 p, {$r1}, 0; mov.b32 {$w0}, 0; @p ld.global.nc.b32 {$w0}, [{$r0} + "
                    + str(16 * x)
                    + "]; }",
                    write_only_types=[Int32],
                    read_only_args=[base, is_row],
                )

    @cute.jit
    def fit_q(self, c: cutlass.Constexpr, s: cutlass.Constexpr):
        """Q as fp16, each row times the power of two that brings its largest element to 2^14; RoPE columns stay bf16.

        Smaller elements lose what lies below 2^-39 of the largest. Returns the factors of the thread's two rows that make
        logits, base 2, of the products. A warp handles its own 16 rows, a quad of lanes two of them, eight apart.
        """
        words = cute.recast_tensor(cute.make_tensor(s.a_held.iterator, cute.make_layout(Q_HELD // 2)), Int32)
        row = s.row0 % 8
        first = c.q_base + s.row0 * 128 + ((c.lane % 4 + 4 * (row % 2)) ^ row) * 16  # with `^ 64`: all eight chunks
        chunk = cute.make_rmem_tensor(4, Int32)
        slices = (self.bytes.d_qk - Q_HELD) // 64
        scales = [c.scale_log2, c.scale_log2]
        for half in cutlass.range_constexpr(2):
            peak = Int32(0)
            for x in cutlass.range_constexpr(Q_HELD // 8):
                peak = self.larger(peak, words[x // 2 * 4 + x % 2 * 2 + half])
            for x in cutlass.range_constexpr(2 * slices):
                self.take_chunk((first ^ (64 * (x % 2))) + (x // 2 * SLICE_BYTES + 1024 * half), chunk)
                for y in cutlass.range_constexpr(4):
                    peak = self.larger(peak, chunk[y])
            for d in (1, 2):
                peak = self.larger(peak, cute.arch.shuffle_sync_bfly(peak, d))
            peak = cutlass.max(peak & 0xFFFF, (peak >> 16) & 0xFFFF)
            exponent = cutlass.max(peak >> 7, 15)  # at least 2^-112, so that the factor is a normal number
            factor = self.as_float((268 - exponent) << 23)
            scales[half] = c.scale_log2 * self.as_float((exponent - 14) << 23)
            for x in cutlass.range_constexpr(Q_HELD // 8):
                at = x // 2 * 4 + x % 2 * 2 + half
                words[at] = self.fitted(words[at], factor, True)
            for x in cutlass.range_constexpr(2 * slices):
                there = (first ^ (64 * (x % 2))) + (x // 2 * SLICE_BYTES + 1024 * half)
                self.take_chunk(there, chunk)
                for y in cutlass.range_constexpr(4):
                    chunk[y] = self.fitted(chunk[y], factor, x // 2 < slices - 1 or not self.bytes.rope_place)
                cute.arch.inline_ptx(
                    "st.shared.v4.b32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};",
                    read_only_args=[there, *(chunk[y] for y in range(4))],
                )
        # The tensor cores read Q through the async proxy, and the copy engine overwrites it.
        cute.arch.fence_view_async_shared()
        cute.arch.barrier(barrier_id=1, number_of_threads=128)
        return scales[0], scales[1]

    @cute.jit
    def take_chunk(self, there: Int32, chunk: cute.Tensor):
        """Sixteen bytes of shared memory."""
        chunk[0], chunk[1], chunk[2], chunk[3] = cute.arch.inline_ptx(
            "ld.shared.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];", write_only_types=[Int32] * 4, read_only_args=[there]
        )  # fmt: skip

    @cute.jit
    def larger(self, peak: Int32, pair: Int32):
        """The larger magnitudes of two pairs of bf16, as bits."""
        return cute.arch.inline_ptx(
            "{ .reg .b32 a, b; and.b32 a, {$r1}, 2147450879; mov.b32 b, {$r0}; max.u16x2 {$w0}, a, b; }",
            write_only_types=[Int32],
            read_only_args=[peak, pair],
        )

    @cute.jit
    def fitted(self, pair: Int32, factor: Float32, is_fp16: cutlass.Constexpr):
        """Two bf16 times a power of two, to fp16 or bf16."""
        return cute.arch.inline_ptx(
            "{ .reg .b32 a, b; .reg .f32 f, g; shl.b32 a, {$r0}, 16; and.b32 b, {$r0}, 4294901760; mov.b32 f, a; mov.b32 g, b;"
            " mul.rn.f32 f, f, {$r1}; mul.rn.f32 g, g, {$r1}; cvt.rn."
            + ("f16x2" if is_fp16 else "bf16x2")
            + ".f32 {$w0}, g, f; }",
            write_only_types=[Int32],
            read_only_args=[pair, factor],
        )

    @cute.jit
    def as_float(self, bits: Int32):
        """Bits as an fp32 number."""
        return cute.arch.inline_ptx(
            "mov.b32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[bits]
        )  # fmt: skip

    @cute.jit
    def multiply(self, c: cutlass.Constexpr, s: cutlass.Constexpr, acc: cute.Tensor, count: Int32, j: Int32):
        """S of one tile. Opens the gates of the tile before; returns which keys are there, one bit each."""
        cfg = self.config
        base, phase = 4 * (count & 1), (count >> 1) & 1
        # The gates of a piece's last tile are open already: the first of a piece arrives where nobody waits. A branch
        # between wgmmas would make ptxas wait for each of them.
        before = (count & 1) ^ 1
        left = before if j > 0 else Int32(4)
        right = before + 2 if j > 0 else Int32(4)
        issued = 0
        valid0, valid1 = Int32(0), Int32(0)
        for p in cutlass.range_constexpr(4):
            e = ORDER[p]
            cute.arch.mbarrier_wait(c.full + base + e, phase)
            if const_expr(
                p == 3 and self.bytes.has_rope_slice
            ):  # handed over with this unit, and one fence is for both
                cute.arch.mbarrier_wait(c.rope_full, count & 1)
            if const_expr(cfg.fence == "reader"):
                cute.arch.fence_view_async_shared()
            if const_expr(p == 0):
                valid0 = c.valid[0, count & 3] | (c.valid[1, count & 3] << 16)
                valid1 = c.valid[2, count & 3] | (c.valid[3, count & 3] << 16)
                warpgroup.fence()
            for k in cutlass.range_constexpr(8):
                b = s.b_ring[None, None, k, base + e]
                if const_expr(self.is_mixed and 8 * e + k >= 28):
                    b = s.b_stored[None, None, k, base + e]
                    cute.gemm(c.qk_rope, acc, s.a_rope[None, None, 8 * e + k - Q_HELD // 16], b, acc)
                elif const_expr(8 * e + k < Q_HELD // 16):
                    cute.gemm(c.qk_held if issued else c.qk_first, acc, s.a_held[None, None, 8 * e + k], b, acc)
                else:
                    cute.gemm(c.qk, acc, s.a[None, None, 8 * e + k - Q_HELD // 16], b, acc)
                if const_expr(issued == cfg.gate_left):
                    self.arrive(c.go + left)
                if const_expr(issued == cfg.gate_right):
                    self.arrive(c.go + right)
                issued += 1
        if const_expr(self.bytes.has_rope_slice):
            for k in cutlass.range_constexpr(4):
                cute.gemm(
                    c.qk_rope if self.is_fp16 else c.qk,
                    acc,
                    s.a_rope[None, None, 32 + k - Q_HELD // 16],
                    s.b_rope[None, None, k, 0],
                    acc,
                )
        warpgroup.commit_group()
        if const_expr(cfg.gate_left == -1):
            self.arrive(c.go + left)
        if const_expr(cfg.gate_right == -1):
            self.arrive(c.go + right)
        warpgroup.wait_group(0)
        if const_expr(cfg.gate_left == -2):
            self.arrive(c.go + left)
        if const_expr(cfg.gate_right == -2):
            self.arrive(c.go + right)
        if const_expr(self.bytes.has_rope_slice):
            self.arrive(c.rope_empty)
        return valid0, valid1

    @cute.jit
    def mask(self, c: cutlass.Constexpr, acc: cute.Tensor, valid0: Int32, valid1: Int32):
        """Scores of keys that are not there become -inf."""
        for x in cutlass.range_constexpr(32):
            word = valid0 if const_expr(x < 16) else valid1
            bit = (x // 4 % 4) * 8 + x % 2
            if ((word >> (c.lane % 4 * 2 + bit)) & 1) == 0:
                acc[x] = -Float32.inf

    @cute.jit
    def reference(self, acc: cute.Tensor, m0: Float32, m1: Float32, l0: Float32, l1: Float32):
        """Move the reference of a row when a score exceeds it by 2^8; leave score - reference in `acc`.

        The reference is one of the scores, scaled and rounded like all: the difference of the largest is exactly 0,
        whatever its size. (One fused multiply-add would round differently and make 2^(1e5) of a logit of 1e12.)
        """
        f0, f1 = Float32(1.0), Float32(1.0)
        x0, x1 = acc[0], acc[2]
        for i in cutlass.range_constexpr(8):
            x0 = cute.arch.fmax(x0, cute.arch.fmax(acc[i * 4 + 0], acc[i * 4 + 1]))
            x1 = cute.arch.fmax(x1, cute.arch.fmax(acc[i * 4 + 2], acc[i * 4 + 3]))
        # fp16 has 14 bits below 1 and 16 above; the largest weight begins at 2^6, so that small ones keep their bits.
        bias = 6.0 if self.is_fp16 else 0.0
        over = cute.arch.fmax(x0 - m0, x1 - m1) > Float32(LAZY_LOG2 + bias)
        need = Int32(1) if cute.arch.vote_any_sync(over) else Int32(0)
        if need != 0:
            for d in (1, 2):
                x0 = cute.arch.fmax(x0, cute.arch.shuffle_sync_bfly(x0, d))
                x1 = cute.arch.fmax(x1, cute.arch.shuffle_sync_bfly(x1, d))
            n0, n1 = cute.arch.fmax(m0, x0 - Float32(bias)), cute.arch.fmax(m1, x1 - Float32(bias))
            f0 = cute.math.exp2(m0 - n0, fastmath=True)
            f1 = cute.math.exp2(m1 - n1, fastmath=True)
            l0, l1, m0, m1 = l0 * f0, l1 * f1, n0, n1
        for x in cutlass.range_constexpr(32):
            acc[x] = acc[x] - (m0 if (x // 2) % 2 == 0 else m1)
        return m0, m1, l0, l1, f0, f1, need

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
            split_slot, request = c.piece[SPLIT_SLOT, index], c.piece[REQUEST, index]
            for half in cutlass.range_constexpr(2):
                m, l = (m0, l0) if half == 0 else (m1, l1)  # noqa: E741
                head = c.m_block * 64 + s.row0 + 8 * half
                inverse, lse2 = Float32(0.0), -Float32.inf
                if l != 0.0:  # also NaN, which shall be seen
                    inverse = Float32(1.0) / l
                    lse2 = m + cute.math.log2(l)
                if head < c.h_q:
                    if split_slot >= 0:
                        lse2_accum[split_slot, c.token * c.h_q + head] = lse2
                    else:
                        lse[request, head, c.token] = lse2 * Float32(LN2)
                        if c.has_sink != 0:
                            weight = cute.math.exp2(c.sink[head] * Float32(LOG2_E) - lse2, fastmath=True)
                            if l != 0.0:  # an empty row stays 0, also for a sink of -inf
                                inverse = inverse / (Float32(1.0) + weight)
                shared_inverse[s.row0 + 8 * half] = inverse
            # Each lane for its own stores: compute-sanitizer sees no order that only a warp makes.
            cute.arch.mbarrier_arrive(c.sum_full)
        self.arrive(c.piece_empty + index)

    # ------------------------------------------------------------------ O += P V

    @cute.jit
    def values(self, c: cutlass.Constexpr, known_half: cutlass.Constexpr):
        """Half of O's columns: P from the exchange, V from the ring, O in registers."""
        half = c.group - 1 if const_expr(known_half is None) else Int32(known_half)
        pv = c.pv
        s_v = cute.make_tensor(c.s_ring.iterator, cute.select(c.s_ring.layout, [1, 0, 2]))
        b = pv.make_fragment_B(pv.get_slice(c.thread).partition_B(s_v))
        a = pv.make_fragment_A(pv.get_slice(c.thread).partition_A(c.s_p))
        accs = [pv.make_fragment_C(pv.partition_shape_C((64, 128))) for _ in range(2)]
        if const_expr(known_half == 1):
            s_v_stored = cute.make_tensor(c.s_ring_stored.iterator, cute.select(c.s_ring_stored.layout, [1, 0, 2]))
            code, rope = c.pv_code.get_slice(c.thread), c.pv_rope.get_slice(c.thread)
            b_code = c.pv_code.make_fragment_B(code.partition_B(cute.local_tile(s_v, (64, 64), (0, 0, None))))
            b_rope = c.pv_rope.make_fragment_B(rope.partition_B(cute.local_tile(s_v_stored, (64, 64), (1, 0, None))))
            a_rope = c.pv_rope.make_fragment_A(rope.partition_A(c.s_p_rope))
            of_64 = c.pv_code.make_fragment_C(c.pv_code.partition_shape_C((64, 64))).layout
            acc_code, acc_rope = (cute.make_tensor(accs[1].iterator + 32 * x, of_64) for x in range(2))
        row0 = c.warp * 16 + c.lane // 4
        count, piece = Int32(0), Int32(0)
        tiles = self.first_piece(c)
        while tiles > 0:
            for acc in accs:
                acc.fill(0.0)
            for _ in cutlass.range(tiles, unroll=1):
                buf, phase = count & 1, (count >> 1) & 1
                unit = 4 * buf + 2 * half
                cute.arch.mbarrier_wait(c.p_full + buf, phase)
                if c.need[c.warp, buf] != 0:
                    f0, f1 = c.factor[row0, buf], c.factor[row0 + 8, buf]
                    for acc in accs:
                        self.rescale(acc, f0, f1)
                cute.arch.mbarrier_wait(c.go + half * 2 + buf, phase)
                warpgroup.fence()
                for k in cutlass.range_constexpr(4):
                    cute.gemm(pv, accs[0], a[None, None, k, buf], b[None, None, k, unit], accs[0])
                warpgroup.commit_group()
                for k in cutlass.range_constexpr(4):
                    if const_expr(known_half == 1):
                        cute.gemm(c.pv_code, acc_code, a[None, None, k, buf], b_code[None, None, k, unit + 1], acc_code)
                        cute.gemm(
                            c.pv_rope, acc_rope, a_rope[None, None, k, buf], b_rope[None, None, k, unit + 1], acc_rope
                        )  # fmt: skip
                    else:
                        cute.gemm(pv, accs[1], a[None, None, k, buf], b[None, None, k, unit + 1], accs[1])
                warpgroup.commit_group()
                warpgroup.wait_group(1)
                self.arrive(c.empty + unit)
                warpgroup.wait_group(0)
                self.arrive(c.p_empty + buf)
                self.arrive(c.empty + unit + 1)
                count += 1
            cute.arch.mbarrier_wait(c.sum_full, piece & 1)
            f0, f1 = c.inverse[row0], c.inverse[row0 + 8]
            if const_expr(self.config.merges):
                factors = cute.make_rmem_tensor(4, Float32)
                factors[0], factors[1], factors[2], factors[3] = f0, f1, f0, f1
                if c.piece[SPLIT_SLOT, piece % PIECES] >= 0:
                    self.scale_units(c, accs, c.piece[SPLIT_SLOT, piece % PIECES], half, factors)
                for x in cutlass.range_constexpr(2):
                    self.rescale(accs[x], factors[2 * x], factors[2 * x + 1])
            else:
                for acc in accs:
                    self.rescale(acc, f0, f1)
            cute.arch.fence_view_async_shared()  # the loads are done before the arrival
            self.arrive(c.sum_empty)
            self.store_out(c, accs, piece % PIECES, half, row0)
            if const_expr(self.config.merges):
                slot, fields = c.piece[SPLIT_SLOT, piece % PIECES], (REQUEST, FIRST_SLOT, PIECES_OF)
                if slot >= 0:
                    self.announce(c, slot, *(c.piece[field, piece % PIECES] for field in fields))
            self.arrive(c.piece_empty + piece % PIECES)
            piece += 1
            tiles = self.next_piece(c, piece)
        if const_expr(self.config.merges):
            self.merge(c)

    @cute.jit
    def rescale(self, acc: cute.Tensor, f0: Float32, f1: Float32):
        """Multiply the two rows of a thread."""
        for i in cutlass.range_constexpr(16):
            acc[i * 4 + 0] = acc[i * 4 + 0] * f0
            acc[i * 4 + 1] = acc[i * 4 + 1] * f0
            acc[i * 4 + 2] = acc[i * 4 + 2] * f1
            acc[i * 4 + 3] = acc[i * 4 + 3] * f1

    @cute.jit
    def store_out(
        self, c: cutlass.Constexpr, accs: cutlass.Constexpr, index: Int32, half: Int32, row0: Int32,
    ):  # fmt: skip
        """O, divided by its sums: fp32 partials of a split request, else the output rows."""
        split_slot, request = c.piece[SPLIT_SLOT, index], c.piece[REQUEST, index]
        if const_expr(self.config.merges):
            if split_slot >= 0:
                self.store_units(c, accs, split_slot, half)
        for side in cutlass.range_constexpr(2):
            head = c.m_block * 64 + row0 + 8 * side
            # Lanes exchange values, so all take part; those of rows behind the end do not store.
            if split_slot >= 0:
                if const_expr(not self.config.merges):
                    line = c.out_accum[split_slot, c.token * c.h_q + head, None]
                    self.store_row(line, accs, c, half, side, head < c.h_q, Float32)
            else:
                line = c.out[request, c.token, head, None]
                self.store_row(line, accs, c, half, side, head < c.h_q, cutlass.BFloat16)

    @cute.jit
    def store_row(
        self, line: cute.Tensor, accs: cutlass.Constexpr, c: cutlass.Constexpr, half: Int32,
        side: cutlass.Constexpr, is_row: Boolean, dtype: cutlass.Constexpr,
    ):  # fmt: skip
        """Half a row from the four lanes that share it, as 16-byte stores.

        A lane holds column pairs 8 i + 2 lane; in groups of 16 bytes per pair count (4 for 16-bit elements, 2 for fp32)
        the lanes transpose, so that each ends with adjacent columns.
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
