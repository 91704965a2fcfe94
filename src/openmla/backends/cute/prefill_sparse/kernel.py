"""Sparse MLA attention over gathered bf16 rows: bound by the tensor cores, by power and by the way from L2.

Computes
    For every query token t, head h and the rows j that the token's `indices` name:
    s_j = scale_log2 * <q[t, h], kv_j>    p_j = 2^(s_j - m)    out = sum_j p_j kv_j[:512] / sum_j p_j
    lse = m + log2 sum_j p_j    max_logits = max_j s_j    out *= 1 / (1 + e^(sink - lse)) with a sink

Shapes
    q [tokens, h_q, d_qk], kv [pages, page_size, d_qk] (one page that is the whole tensor in the form "rows"), indices
    [tokens, topk], out [tokens, h_q, 512]. A CTA takes 64 heads of one token after the other: tokens part, part + parts, ...,
    so that neighbouring tokens, which select much the same rows, are computed at the same time. With `Config.split` its
    tokens are pieces of lists, [request, piece, query token], and out and lse partial results for the merge.

Schedule (512 threads; time runs down; one tile of 64 keys per turn)
    producers (4 warps)      scores (warpgroup 0)                     values left | right (warpgroups 1 | 2)
    ring of 10 slots, 64     36 wgmmas of S(j) = Q K(j)^T             O += P(j-2) V(j-2), 256 columns each
      keys x 128 columns:    all issued   -> gate left                left begins P(j-1) V(j-1)
      Q elements, tiles      all issued or complete -> gate right     right begins P(j-1) V(j-1)
    RoPE slice               32 exponentials per thread, P(j) out
    Q for shared memory      (the maximum of the tile and a new       each quarter of V read: its slot is free
    piece descriptors          reference only when P grows too        wait for P(j), rescale O if told to
    indices two tiles ahead    large)
    P(j) is stored a quarter at a time and handed over behind the first eight wgmmas of S(j+1), since P V waits for those
    anyway. The turns run on across query tokens: while the values of a token are finished and stored, the producers and the scores
    are at the next one. `Config` has what may differ: when the gates open, also for a token's last tile, and where Q is copied.

Gather
    cp.async, 16 bytes per lane, into the place that the swizzle gives it: eight lanes copy the 128 bytes of a row and slice,
    a warp its own 16 rows of every tile. A copy arrives at the slot's barrier when it has landed, nobody waits for it.
    Rows that are not there are zeros. The rows of Q come the same way. Between the copies, which are generic writes, and the
    tensor cores' reads stands no proxy fence, as in CUTLASS's mainloop for cp.async; `Config.fence` has one.

Budget (checked by tests/compile/test_prefill_sparse.py against tests/compile/budgets_prefill.toml)
    shared memory 231,424 of 232,448 bytes (1,024 are reserved); registers 152 scores, 160 values, 40 producers (x 128 = 65,536), no spills.

Synchronisation (mbarriers)
    full[slot]      producers -> scores (and, through P, values)   128 copies and 4 warps
    empty[slot]     values (Q elements: scores) -> producers       4 warps of the half that reads it; with `split` its 128 lanes
    rope_full/empty, q_full/empty                                  as above
    p_full/empty[2] scores -> values / back                        4 warps / 8 warps
    go[half, 2]     scores -> values: the gates                    4 warps
    sum_full/empty  scores -> values: 1 / row sums                 32 lanes / 8 warps
    piece_full/empty[4]  first producer warp -> everybody          1 / 12 warps

Sources
    Gates, split of O, Q in registers, probabilities without a maximum: decode_dense. Producer warps with cp.async:
    FlashMLA's sparse prefill.

Deep dive: docs/kernels/prefill_sparse.md
"""

from __future__ import annotations

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Boolean, Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, warp, warpgroup
from cutlass.memory import SmemAllocator

from openmla.backends.cute.prefill_sparse.config import (
    ROLES,
    SLICE_BYTES,
    Config,
    lane_chunk,
    lane_place,
    lane_row,
    of_row,
)

THREADS = 512
SLOT_BYTES = 2 * SLICE_BYTES
PIECES, PIECES_LOG2 = 4, 2  # descriptors between the first producer warp and the other warps
LN2, LOG2_E = 0.6931471805599453, 1.4426950408889634
FAULT_INDEX, FAULT_LENGTH = 8, 16
NEVER = (1 << 20) - 1  # the largest count of an mbarrier
NO_ROW = -1  # offset of a row that is not there
# A finite start for the running maximum: -inf would make -inf - -inf where a row has seen no key.
NO_MAXIMUM = -1.0e30
LAZY_LOG2 = 8  # rescale O only where P would pass 2^8: it stays exact enough in bf16
FUSED = 2.0**20  # references below it

# Fields of a piece descriptor: tiles (-1 ends the list), query token.
TILES, TOKEN = range(2)
FIELDS = 2


class Scope:
    """Names that the warp roles share. Opaque to the tracer, which would thread a SimpleNamespace through every branch."""

    def __init__(self, **names: Any) -> None:
        self.__dict__.update(names)


class PrefillSparse:
    """The launch (`__call__`) and the device code (`kernel` and one method per warp role)."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.smem_bytes = 0

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,  # bf16 [tokens, h_q, d_qk]
        kv: cute.Tensor,  # bf16 [pages, page_size, d_qk]; one page in the form "rows"
        indices: cute.Tensor,  # int32 [tokens, topk]
        topk_length: cute.Tensor,  # int32 [tokens]; read only with has_length
        sink: cute.Tensor,  # fp32 [h_q]; read only with has_sink
        out: cute.Tensor,  # bf16 [tokens, h_q, 512]; with `split` fp32, of every piece
        lse: cute.Tensor,  # fp32 [batch, h_q, tokens / batch], natural log; with `split` base 2
        max_logits: cute.Tensor,  # fp32 [tokens, h_q]; written in the form "rows"
        fault_word: cute.Tensor,  # int32 [1]
        parts: Int32,  # CTAs per block of 64 heads
        has_length: Int32,
        has_sink: Int32,
        scale: Float32,  # softmax_scale, above 0
        splits: Int32,  # with `split`: pieces of a token's list, keys of each, tokens of a request
        chunk: Int32,
        per_request: Int32,
        stream: cuda.CUstream,
    ):
        cfg, dtype = self.config, cutlass.BFloat16
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

        rope_size = cute.cosize(rope_layout) if cfg.has_rope else 64

        @cute.struct
        class Storage:
            full: cute.struct.MemRange[Int64, cfg.slots]
            empty: cute.struct.MemRange[Int64, cfg.slots]
            rope_full: cute.struct.MemRange[Int64, 1]
            rope_empty: cute.struct.MemRange[Int64, 1]
            q_full: cute.struct.MemRange[Int64, 1]
            q_empty: cute.struct.MemRange[Int64, 1]
            p_full: cute.struct.MemRange[Int64, 3]  # the last one is nobody's: see `step`
            p_empty: cute.struct.MemRange[Int64, 2]
            go: cute.struct.MemRange[Int64, cfg.gates]  # a fifth likewise
            sum_full: cute.struct.MemRange[Int64, 1]
            sum_empty: cute.struct.MemRange[Int64, 1]
            piece_full: cute.struct.MemRange[Int64, PIECES]
            piece_empty: cute.struct.MemRange[Int64, PIECES]
            piece: cute.struct.MemRange[Int32, FIELDS * PIECES]
            valid: cute.struct.MemRange[Int32, 4 * 4]
            need: cute.struct.MemRange[Int32, 2 * 4]
            factor: cute.struct.MemRange[Float32, 2 * 64]
            inverse: cute.struct.MemRange[Float32, 64]
            rope: cute.struct.Align[cute.struct.MemRange[dtype, rope_size], 1024 if cfg.has_rope else 128]
            ring: cute.struct.Align[cute.struct.MemRange[dtype, cute.cosize(ring_layout)], 1024]
            q: cute.struct.Align[cute.struct.MemRange[dtype, cute.cosize(q_layout)], 1024]
            p: cute.struct.Align[cute.struct.MemRange[dtype, cute.cosize(p_layout)], 1024]

        self.storage = Storage
        self.smem_bytes = Storage.size_in_bytes()
        self.kernel(
            q, kv, indices, topk_length, sink, out, lse, max_logits, fault_word, parts, has_length, has_sink, scale,
            *((splits, chunk, per_request) if cfg.split else (None, None, None)),
            *(Int32(stride // 8) for stride in (q.stride[0], q.stride[1], kv.stride[0], kv.stride[1])), qk_first, qk_rs, qk_ss, pv, ring_layout, rope_layout, q_layout, p_layout,
        ).launch(
            grid=[cute.ceil_div(out.shape[1], 64), parts, 1],
            block=[THREADS, 1, 1],
            min_blocks_per_mp=1,
            stream=stream,
        )  # fmt: skip

    @cute.kernel
    def kernel(
        self,
        q: cute.Tensor,
        kv: cute.Tensor,
        indices: cute.Tensor,
        topk_length: cute.Tensor,
        sink: cute.Tensor,
        out: cute.Tensor,
        lse: cute.Tensor,
        max_logits: cute.Tensor,
        fault_word: cute.Tensor,
        parts: Int32,
        has_length: Int32,
        has_sink: Int32,
        scale: Float32,
        splits: Int32 | None,  # these three: None without `split`
        chunk: Int32 | None,
        per_request: Int32 | None,
        token_step: Int32,  # 16 bytes each: of Q, of a cache
        head_step: Int32,
        page_step: Int32,
        row_step: Int32,
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
        m_block, part, _ = cute.arch.block_idx()
        warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        store = SmemAllocator().allocate(self.storage)
        pointer = lambda name: getattr(store, name).data_ptr()  # noqa: E731
        c = Scope(
            **{name: pointer(name) for name in (
                "full", "empty", "rope_full", "rope_empty", "q_full", "q_empty", "p_full", "p_empty", "go", "sum_full",
                "sum_empty", "piece_full", "piece_empty",
            )},
            piece=store.piece.get_tensor(cute.make_layout((FIELDS, PIECES))),
            valid=store.valid.get_tensor(cute.make_layout((4, 4))),
            need=store.need.get_tensor(cute.make_layout((4, 2))),
            factor=store.factor.get_tensor(cute.make_layout((64, 2))),
            inverse=store.inverse.get_tensor(cute.make_layout(64)),
            s_ring=store.ring.get_tensor(ring_layout.outer, swizzle=ring_layout.inner),
            s_rope=store.rope.get_tensor(rope_layout.outer, swizzle=rope_layout.inner),
            s_q=store.q.get_tensor(q_layout.outer, swizzle=q_layout.inner),
            s_p=store.p.get_tensor(p_layout.outer, swizzle=p_layout.inner),
            ring_base=store.ring.data_ptr().toint(), rope_base=store.rope.data_ptr().toint(),
            q_base=store.q.data_ptr().toint(),
            g_q=q, kv=kv, indices=indices, topk_length=topk_length, sink=sink, out=out, lse=lse, max_logits=max_logits,
            fault_word=fault_word, parts=parts, has_length=has_length,
            has_sink=has_sink, scale=scale, scale_log2=scale * Float32(LOG2_E), tokens=out.shape[0], h_q=out.shape[1],
            token_step=token_step, head_step=head_step, page_step=page_step, row_step=row_step,
            splits=splits, chunk=chunk, per_request=per_request,
            qk_first=qk_first, qk_rs=qk_rs, qk_ss=qk_ss, pv=pv,
            m_block=m_block, part=part,
            thread=tidx & 127, warp=warp_idx & 3, lane=cute.arch.lane_idx(), warp_idx=warp_idx,
        )  # fmt: skip

        if warp_idx == 0:
            with cute.arch.elect_one():
                for pointer_, count, copies in (
                    (c.full, 128 + 4, cfg.slots),
                    (c.empty, 128 if cfg.split else 4, cfg.slots),
                    (c.rope_full, 128 + 4, 1),
                    (c.rope_empty, 4, 1),
                    (c.q_full, 128 + 4, 1),
                    (c.q_empty, 4, 1),
                    (c.p_full, 4, 2),
                    (c.p_full + 2, NEVER, 1),  # nobody's: never complete, so that nobody misses a wait
                    (c.p_empty, 8, 2),
                    (c.go, 4, 4),
                    (c.go + 4, NEVER, cfg.gates - 4),  # likewise
                    (c.sum_full, 4 * 8, 1),
                    (c.sum_empty, 8, 1),
                    (c.piece_full, 1, PIECES),
                    (c.piece_empty, 12, PIECES),
                ):
                    for i in range(copies):
                        cute.arch.mbarrier_init(pointer_ + i, count)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()

        if warp_idx < 4:
            cute.arch.setmaxregister_increase(ROLES["scores"])
            self.scores(c)
        elif warp_idx < 12:
            cute.arch.setmaxregister_increase(ROLES["values"])
            self.values(c)
        else:
            cute.arch.setmaxregister_decrease(ROLES["producers"])
            if const_expr(cfg.q_late):
                self.produce_late(c)
            else:
                self.produce(c)

    # ------------------------------------------------------------------ small steps that several roles share

    @cute.jit
    def arrive(self, barrier: cutlass.Constexpr, count: cutlass.Constexpr = 1):
        """One arrival of this warp, or one for several."""
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(barrier, arrive_count=count)

    @cute.jit
    def next_piece(self, c: cutlass.Constexpr, piece: Int32):
        """Tiles of a piece, once its descriptor is there."""
        cute.arch.mbarrier_wait(c.piece_full + (piece & PIECES - 1), (piece >> PIECES_LOG2) & 1)
        return cute.arch.make_warp_uniform(c.piece[TILES, piece & PIECES - 1])

    @cute.jit
    def next_slot(self, slot: Int32, phase: Int32):
        """The ring position after this one."""
        slot += 1
        if slot == self.config.slots:
            slot = Int32(0)
            phase ^= 1
        return slot, phase

    # ------------------------------------------------------------------ producers

    @cute.jit
    def list_length(self, c: cutlass.Constexpr, token: Int32, reports: cutlass.Constexpr):
        """How many leading indices of a token count; 0 behind the last token."""
        own = c.indices.shape[1]
        if token >= c.tokens:
            own = Int32(0)
        elif c.has_length != 0:
            asked = c.topk_length[self.query_of(c, token)]
            own = cutlass.min(cutlass.max(asked, 0), own)
            if const_expr(reports):
                if (own != asked) & (c.m_block == 0):
                    cute.arch.atomic_or(c.fault_word.iterator, Int32(FAULT_LENGTH))
        if const_expr(self.config.split):
            own = cutlass.min(cutlass.max(own - self.first_key(c, token), 0), c.chunk)
        return own

    @cute.jit
    def query_of(self, c: cutlass.Constexpr, token: Int32):
        """The query token that a token of this kernel stands for: with `split`, tokens are [request, split, token]."""
        if const_expr(self.config.split):
            row = token // c.per_request
            token += (row // c.splits - row) * c.per_request
        return token

    @cute.jit
    def first_key(self, c: cutlass.Constexpr, token: Int32):
        """Where in the list of its query token a token's keys begin."""
        if const_expr(not self.config.split):
            return Int32(0)
        row = token // c.per_request
        return (row - row // c.splits * c.splits) * c.chunk

    @cute.jit
    def describe(self, c: cutlass.Constexpr, piece: Int32, tiles: Int32, token: Int32):
        """Write the descriptor of the next piece, or of the end (-1 tiles)."""
        fields, index = c.piece, piece & PIECES - 1
        cute.arch.mbarrier_wait(c.piece_empty + index, ((piece >> PIECES_LOG2) & 1) ^ 1)
        if c.lane == 0:
            fields[TILES, index] = tiles
            fields[TOKEN, index] = token
        self.arrive(c.piece_full + index)

    @cute.jit
    def next_index(self, c: cutlass.Constexpr, token: Int32, tile: Int32, length: Int32, ahead: Int32):
        """The index of key `lane % 16` of this warp in a tile of a token, and the tile after it.

        `length` is the token's, `ahead` that of the token after it, read in time.
        """
        index = Int32(-1)
        position = tile * 64 + 16 * c.warp + (c.lane & 15)
        if position < length:
            index = c.indices[self.query_of(c, token), self.first_key(c, token) + position]
        tile += 1
        if tile * 64 >= length:
            token += c.parts
            tile, length = Int32(0), ahead
            ahead = self.list_length(c, token + c.parts, False)
        return index, token, tile, length, ahead

    @cute.jit
    def locate(self, c: cutlass.Constexpr, index: Int32):
        """Where a key's row begins, in 16 bytes from the start of the tensor; NO_ROW for none. Notes bad indices."""
        offset = Int32(NO_ROW)
        if index != -1:
            if const_expr(self.config.form == "rows"):
                if (index >= 0) & (index < c.kv.shape[1]):
                    offset = index * c.row_step
            else:
                page = index // c.kv.shape[1]
                if (index >= 0) & (page < c.kv.shape[0]):
                    place = index - page * c.kv.shape[1]
                    offset = page * c.page_step + place * c.row_step
            if offset == NO_ROW:
                cute.arch.atomic_or(c.fault_word.iterator, Int32(FAULT_INDEX))
        return offset

    @cute.jit
    def start_of(self, tensor: cute.Tensor, place: Int32) -> Int64:
        """The address of a byte of a tensor's first row."""
        return tensor.iterator.toint() + Int64(place)

    @cute.jit
    def copy_row(
        self, base: Int64, offset: Int32, there: Int32, first: cutlass.Constexpr, count: cutlass.Constexpr,
        once: cutlass.Constexpr = False,
    ):  # fmt: skip
        """This lane's 16 bytes of one row, for `count` slices from slice `first` on; zeros if the row is not there.

        Args:
            base: the address of the tensor, and the lane's place within a row's slice.
            offset: of the row, in 16 bytes.
            there: where it goes in the first slice.
            first, count: slices of the source; in shared memory they follow one another.
            once: nobody reads this row again, so that it shall leave the L2 first.
        """
        hint, policy, make = "", "", ""
        if const_expr(once):
            hint, policy = ".L2::cache_hint", ", h"
            make = " .reg .b64 h; createpolicy.fractional.L2::evict_first.b64 h, 1.0;"
        copies = "".join(
            f" cp.async.cg.shared.global{hint}.L2::128B [{{$r2}} + {SLICE_BYTES * x}], [a + {128 * (first + x)}], 16, n{policy};"
            for x in range(count)
        )
        cute.arch.inline_ptx(
            f"{{{make} .reg .b64 a; .reg .b32 n, o; .reg .pred p;"
            + " setp.ne.s32 p, {$r1}, -1; selp.b32 n, 16, 0, p;"
            + " selp.b32 o, {$r1}, 0, p; mad.wide.u32 a, o, 16, {$r0};"
            + copies
            + " }",
            read_only_args=[base, offset, there],
        )

    @cute.jit
    def copy_keys(
        self, base: Int64, offsets: cute.Tensor, there: Int32, first: cutlass.Constexpr, count: cutlass.Constexpr
    ):  # fmt: skip
        """This lane's four keys of a tile; `there` is the place of the first."""
        for i in cutlass.range_constexpr(4):
            self.copy_row(base, offsets[i], of_row(there, i), first, count)

    @cute.jit
    def copy_slice_pair(
        self, addresses: cute.Tensor, absent: Int32, even: Int32, odd: Int32, first: cutlass.Constexpr,
        count: cutlass.Constexpr,
    ):  # fmt: skip
        """This lane's four keys of a tile, `count` slices from slice `first` on; zeros for those of the mask `absent`.

        Args:
            addresses: of the lane's 16 bytes in the first slice of each row.
            absent: bit i: the lane's row i is not there.
            even, odd: places of the lane's rows 0 and 1 in the first slice that is written, row 1 less 512.
            first, count: slices of the source; in shared memory they follow one another.
        """
        for i in cutlass.range_constexpr(4):
            copies = "".join(
                f" cp.async.cg.shared.global.L2::128B [{{$r2}} + {512 * i + SLICE_BYTES * x}],"
                f" [{{$r0}} + {128 * (first + x)}], 16, n;"
                for x in range(count)
            )
            cute.arch.inline_ptx(
                f"{{ .reg .b32 n, o; .reg .pred p; and.b32 o, {{$r1}}, {1 << i}; setp.eq.s32 p, o, 0; selp.b32 n, 16, 0, p;"
                + copies
                + " }",
                read_only_args=[addresses[i], absent, even if i % 2 == 0 else odd],
            )

    @cute.jit
    def copy_rest(self, c: cutlass.Constexpr, token: Int32, place: Int32, turn: Int32):
        """This warp's heads of a token, slices for shared memory. They are free when the last S of the token before is
        complete.
        """
        cfg = self.config
        cute.arch.mbarrier_wait(c.q_empty, (turn & 1) ^ 1)
        self.copy_heads(c, token, c.q_base + place, cfg.q_regs, cfg.q_slices - cfg.q_regs)
        self.hand_over(c.q_full)

    @cute.jit
    def copy_heads(
        self, c: cutlass.Constexpr, token: Int32, there: Int32, first: cutlass.Constexpr, count: cutlass.Constexpr
    ):  # fmt: skip
        """This lane's four heads of a token, one after the other: all at once, their addresses would spill."""
        lane = cute.arch.shuffle_sync_bfly(c.lane, 0)  # stays where it is written, and so does what follows from it
        base, token = self.start_of(c.g_q, lane_chunk(lane) * 16), self.query_of(c, token)
        for i in cutlass.range_constexpr(4):
            head = c.m_block * 64 + 16 * c.warp + 4 * i + lane_row(lane)
            offset = Int32(NO_ROW)
            if head < c.h_q:
                offset = token * c.token_step + head * c.head_step
            self.copy_row(base, offset, of_row(there, i), first, count, self.config.form == "rows")
            cute.arch.sync_warp()

    @cute.jit
    def hand_over(self, barrier: cutlass.Constexpr):
        """The barrier completes when the copies of all lanes until now have landed."""
        cute.arch.cp_async_mbarrier_arrive_noinc(barrier)
        self.arrive(barrier)  # orders what was stored beside the copies

    @cute.jit
    def produce(self, c: cutlass.Constexpr):
        """This warp's 16 rows of Q and of every tile, through the ring, as far ahead as slots are free."""
        cfg = self.config
        lane, valid = c.lane, c.valid
        place = lane_place(c.warp, lane)
        chunk = lane_chunk(lane) * 16
        offsets = cute.make_rmem_tensor(4, Int32)
        is_lead = c.warp_idx == 12

        # tiles and pieces, of which only the last bits count, in one register
        slot, phase, turn, token = Int32(0), Int32(1), Int32(0), Int32(c.part)
        length = self.list_length(c, token, True)
        # The index cursor is two tiles ahead: where it is, its token's length, that of the token behind it.
        at, tile, at_length, ahead = token, Int32(0), length, self.list_length(c, token + c.parts, False)
        index, at, tile, at_length, ahead = self.next_index(c, at, tile, at_length, ahead)
        offset = self.locate(c, index)
        index, at, tile, at_length, ahead = self.next_index(c, at, tile, at_length, ahead)
        while token < c.tokens:
            tiles = cutlass.max((length + 63) >> 6, 1)  # an empty one is a masked tile
            if is_lead:
                self.describe(c, turn & 7, tiles, token)
            for e in cutlass.range_constexpr(cfg.q_regs // 2):
                cute.arch.mbarrier_wait(c.empty + slot, phase)
                self.copy_heads(c, token, c.ring_base + slot * SLOT_BYTES + place, 2 * e, 2)
                self.hand_over(c.full + slot)
                slot, phase = self.next_slot(slot, phase)
            # Free when the last S of the token before is complete; about then P V frees the slot of the first quarter.
            cute.arch.mbarrier_wait(c.q_empty, (turn & 1) ^ 1)
            self.copy_heads(c, token, c.q_base + place, cfg.q_regs, cfg.q_slices - cfg.q_regs)
            self.hand_over(c.q_full)
            for _ in cutlass.range(tiles, unroll=1):
                for i in cutlass.range_constexpr(4):
                    offsets[i] = cute.arch.shuffle_sync(offset, 4 * i + lane_row(lane))
                present = cute.arch.vote_ballot_sync(offset != NO_ROW) & 0xFFFF
                offset = self.locate(c, index)
                index, at, tile, at_length, ahead = self.next_index(c, at, tile, at_length, ahead)
                base = self.start_of(c.kv, chunk)
                # The words of a tile four before have been read: S of that tile freed the slot that is waited for here.
                cute.arch.mbarrier_wait(c.empty + slot, phase)
                if lane == 0:
                    valid[c.warp, (turn >> 3) & 3] = present
                for e in cutlass.range_constexpr(4):
                    cute.arch.mbarrier_wait(c.empty + slot, phase)
                    self.copy_keys(base, offsets, c.ring_base + slot * SLOT_BYTES + place, 2 * e, 2)
                    self.hand_over(c.full + slot)
                    slot, phase = self.next_slot(slot, phase)
                    if const_expr(e == 1 and cfg.has_rope):  # free when S before is complete: between the quarters
                        cute.arch.mbarrier_wait(c.rope_empty, ((turn >> 3) & 1) ^ 1)
                        self.copy_keys(base, offsets, c.rope_base + place, 8, 1)
                        self.hand_over(c.rope_full)
                turn += 1 << 3
            turn = turn & -8 | turn + 1 & 7
            token += c.parts
            length = self.list_length(c, token, True)
        if is_lead:
            self.describe(c, turn & 7, Int32(-1), Int32(0))
        # No copy may be under way when the CTA ends.
        cute.arch.inline_ptx("cp.async.wait_all;")

    @cute.jit
    def spread(self, c: cutlass.Constexpr, addresses: cute.Tensor, offset: Int32):
        """The addresses of this lane's four rows from the offset of row `lane % 16`, and which are not there."""
        base, absent = self.start_of(c.kv, lane_chunk(c.lane) * 16), Int32(0)
        for i in cutlass.range_constexpr(4):
            row = cute.arch.shuffle_sync(offset, 4 * i + lane_row(c.lane))
            is_absent = row == NO_ROW
            addresses[i] = base + Int64(Int32(0) if is_absent else row).to(Int64) * 16
            absent |= Int32(1 << i) if is_absent else Int32(0)
        return absent

    @cute.jit
    def copy_unit(
        self, c: cutlass.Constexpr, addresses: cute.Tensor, absent: Int32, place: Int32, slot: Int32, phase: Int32,
        e: cutlass.Constexpr,
    ):  # fmt: skip
        """A quarter of a tile, once its slot is free."""
        cute.arch.mbarrier_wait(c.empty + slot, phase)
        there = c.ring_base + slot * SLOT_BYTES + place
        self.copy_slice_pair(addresses, absent, there, there ^ 64, 2 * e, 2)
        self.hand_over(c.full + slot)
        return self.next_slot(slot, phase)

    @cute.jit
    def begin_tile(
        self, c: cutlass.Constexpr, addresses: cute.Tensor, place: Int32, turn: Int32, slot: Int32, phase: Int32,
        offset: Int32, index: Int32, at: Int32, tile: Int32, at_length: Int32, ahead: Int32,
    ):  # fmt: skip
        """Everything about a tile up to its first quarter."""
        valid, now = c.valid, offset
        absent = self.spread(c, addresses, now)
        present = cute.arch.vote_ballot_sync(now != NO_ROW) & 0xFFFF
        offset = self.locate(c, index)
        index, at, tile, at_length, ahead = self.next_index(c, at, tile, at_length, ahead)
        # The words of a tile four before have been read: S of that tile freed the slot that is waited for here.
        cute.arch.mbarrier_wait(c.empty + slot, phase)
        if c.lane == 0:
            valid[c.warp, (turn >> 3) & 3] = present
        slot, phase = self.copy_unit(c, addresses, absent, place, slot, phase, 0)
        return now, absent, slot, phase, offset, index, at, tile, at_length, ahead

    @cute.jit
    def produce_late(self, c: cutlass.Constexpr):
        """As `produce`, with the rest of Q behind quarters of a token's first tile: before the first that has to wait for the
        values of the tile before last to free a slot, which they do when the scores are complete that Q waits for.
        """
        cfg = self.config
        place = lane_place(c.warp, c.lane)
        addresses = cute.make_rmem_tensor(4, Int64)
        is_lead = c.warp_idx == 12
        slot, phase, turn, token = Int32(0), Int32(1), Int32(0), Int32(c.part)
        length = self.list_length(c, token, True)
        at, tile, at_length, ahead = token, Int32(0), length, self.list_length(c, token + c.parts, False)
        index, at, tile, at_length, ahead = self.next_index(c, at, tile, at_length, ahead)
        offset = self.locate(c, index)
        index, at, tile, at_length, ahead = self.next_index(c, at, tile, at_length, ahead)
        while token < c.tokens:
            tiles = cutlass.max((length + 63) >> 6, 1)
            if is_lead:
                self.describe(c, turn & 7, tiles, token)
            for e in cutlass.range_constexpr(cfg.q_regs // 2):
                cute.arch.mbarrier_wait(c.empty + slot, phase)
                self.copy_heads(c, token, c.ring_base + slot * SLOT_BYTES + place, 2 * e, 2)
                self.hand_over(c.full + slot)
                slot, phase = self.next_slot(slot, phase)
            if const_expr(cfg.q_after == 0):
                self.copy_rest(c, token, place, turn)
            now, absent, slot, phase, offset, index, at, tile, at_length, ahead = self.begin_tile(
                c, addresses, place, turn, slot, phase, offset, index, at, tile, at_length, ahead
            )
            if const_expr(cfg.q_after == 1):
                self.copy_rest(c, token, place, turn)
                absent = self.spread(c, addresses, now)  # again, so that they take no registers meanwhile
            slot, phase = self.copy_unit(c, addresses, absent, place, slot, phase, 1)
            if const_expr(cfg.q_after == 2):
                self.copy_rest(c, token, place, turn)
                absent = self.spread(c, addresses, now)  # likewise
            for j in cutlass.range(tiles, unroll=1):
                if const_expr(cfg.has_rope):  # free when S before is complete
                    cute.arch.mbarrier_wait(c.rope_empty, ((turn >> 3) & 1) ^ 1)
                    there = c.rope_base + place
                    self.copy_slice_pair(addresses, absent, there, there ^ 64, 8, 1)
                    self.hand_over(c.rope_full)
                slot, phase = self.copy_unit(c, addresses, absent, place, slot, phase, 2)
                slot, phase = self.copy_unit(c, addresses, absent, place, slot, phase, 3)
                turn += 1 << 3
                if j + 1 < tiles:
                    now, absent, slot, phase, offset, index, at, tile, at_length, ahead = self.begin_tile(
                        c, addresses, place, turn, slot, phase, offset, index, at, tile, at_length, ahead
                    )
                    slot, phase = self.copy_unit(c, addresses, absent, place, slot, phase, 1)
            turn = turn & -8 | turn + 1 & 7
            token += c.parts
            length = self.list_length(c, token, True)
        if is_lead:
            self.describe(c, turn & 7, Int32(-1), Int32(0))
        # No copy may be under way when the CTA ends.
        cute.arch.inline_ptx("cp.async.wait_all;")

    # ------------------------------------------------------------------ S = Q K^T and the softmax

    @cute.jit
    def scores(self, c: cutlass.Constexpr):
        """S of a tile on the tensor cores, then its probabilities, while the value warpgroups multiply the tile before."""
        cfg, dtype = self.config, cutlass.BFloat16
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
        load_a = cute.make_tiled_copy_A(cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, 4), dtype), c.qk_rs)
        thr_a = load_a.get_slice(c.thread)
        s.packed = cute.make_rmem_tensor(acc.layout, dtype)
        s.store = cute.make_tiled_copy_C(cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), dtype), c.qk_ss)
        thr_p = s.store.get_slice(c.thread)
        s.p_from, s.p_to = thr_p.retile(s.packed), thr_p.partition_D(c.s_p)

        s.sinks = [self.own_sink(c, s.row0), self.own_sink(c, s.row0 + 8)]
        # Every phase follows from a running count: ring slots filled, tiles, pieces.
        slot, phase, count, piece = Int32(0), Int32(0), Int32(0), Int32(0)
        self.arrive(c.p_full)  # tiles count from 1: for all three warpgroups tile 0 has been
        self.open_last(c, Int32(0))
        tiles = self.next_piece(c, piece)
        while tiles > 0:
            for e in cutlass.range_constexpr(cfg.q_regs // 2):
                cute.arch.mbarrier_wait(c.full + slot, phase)
                cute.copy(load_a, thr_a.partition_S(c.s_ring[None, None, slot]), thr_a.retile(s.a_regs[e]))
                # An arrival may overtake loads that wait behind the stores of an epilogue: let them finish first.
                cute.arch.fence_view_async_shared()
                if const_expr(cfg.split):
                    # Each lane for its own loads. Through a shuffle: with a lane's own address ptxas takes all of the ring's
                    # places for such, and moves them back before every wgmma.
                    place = cute.arch.shuffle_sync_bfly((c.empty + slot).toint(), 0)
                    cute.arch.inline_ptx("mbarrier.arrive.shared.b64 _, [{$r0}];", read_only_args=[place])
                else:
                    self.arrive(c.empty + slot)
                slot, phase = self.next_slot(slot, phase)
            m0, m1, l0, l1 = Float32(NO_MAXIMUM), Float32(NO_MAXIMUM), Float32(0.0), Float32(0.0)
            x0, x1 = -Float32.inf, -Float32.inf  # the largest products of this thread's columns
            for j in cutlass.range(tiles, unroll=1):
                slot, phase, m0, m1, l0, l1, x0, x1 = self.step(
                    c, s, acc, slot, phase, count, piece, tiles, j, m0, m1, l0, l1, x0, x1
                )
                count += 1
            cute.arch.fence_view_async_shared()
            self.arrive(c.p_full + (count & 1))
            self.open_last(c, count & 1)
            self.sums(c, s, piece, m0, m1, l0, l1, x0, x1)
            piece += 1
            tiles = self.next_piece(c, piece)
        if const_expr(cfg.last_gate != "now"):
            if count > 0:  # no scores follow that would open the gates of the last tile
                if const_expr(cfg.last_gate == "next"):
                    self.arrive(c.go + (count & 1))
                self.arrive(c.go + 2 + (count & 1))

    @cute.jit
    def own_sink(self, c: cutlass.Constexpr, row: Int32):
        """The sink of a thread's row, base 2, the same for all of its tokens: a load at a token's end is waited for."""
        sink, head = -Float32.inf, c.m_block * 64 + row
        if const_expr(not self.config.split):  # else it is the merge's
            if (c.has_sink != 0) & (head < c.h_q):
                sink = c.sink[head] * Float32(LOG2_E)
        return sink

    @cute.jit
    def open_last(self, c: cutlass.Constexpr, buf: Int32):
        """What of a token's last tile may be multiplied before the scores of the next one are issued."""
        if const_expr(self.config.last_gate != "next"):
            self.arrive(c.go + buf)
        if const_expr(self.config.last_gate == "now"):
            self.arrive(c.go + 2 + buf)

    @cute.jit
    def step(
        self, c: cutlass.Constexpr, s: cutlass.Constexpr, acc: cute.Tensor, slot: Int32, phase: Int32, count: Int32,
        piece: Int32, tiles: Int32, j: Int32, m0: Float32, m1: Float32, l0: Float32, l1: Float32, x0: Float32,
        x1: Float32,
    ):  # fmt: skip
        """Scores of tile j, the gates of the tile before, then the probabilities of tile j."""
        cfg = self.config
        buf = count & 1  # of the tile before; tiles count from 1
        # The last P of a token is handed over: the first of the next one arrives where nobody waits. A branch between wgmmas
        # would make ptxas wait for each of them.
        before = buf if j > 0 else Int32(2)
        left, right = None, None
        if const_expr(cfg.last_gate != "next"):  # likewise
            left = c.go + (buf if j > 0 else Int32(4))
        if const_expr(cfg.last_gate == "now"):
            right = c.go + (buf + 2 if j > 0 else Int32(4))
        valid0, valid1 = Int32(0), Int32(0)
        issued = 0
        for group in cfg.groups:
            places = slot, slot + 1 if slot + 1 < cfg.slots else Int32(0)  # a group has two ring slots at most
            for e in group:
                if const_expr(e < 0):
                    cute.arch.mbarrier_wait(c.rope_full, count & 1)
                else:
                    cute.arch.mbarrier_wait(c.full + slot, phase)
                    slot, phase = self.next_slot(slot, phase)
                if const_expr(e == cfg.q_regs // 2):  # the first that reads Q from shared memory
                    cute.arch.mbarrier_wait(c.q_full, piece & 1)
            if const_expr(cfg.fence != "none"):
                cute.arch.fence_view_async_shared()
            if const_expr(issued == 0):
                if const_expr(cfg.fence == "joint"):
                    self.arrive(c.p_full + before)
                valid0 = c.valid[0, count & 3] | (c.valid[1, count & 3] << 16)
                valid1 = c.valid[2, count & 3] | (c.valid[3, count & 3] << 16)
                warpgroup.fence()
            for e in group:
                place = places[1 if e > group[0] else 0]
                for k in cutlass.range_constexpr(4 if e < 0 else 8):
                    column = 4 * 8 + k if e < 0 else 8 * e + k
                    if const_expr(column < 4 * cfg.q_regs):
                        cute.gemm(
                            c.qk_rs if issued else c.qk_first, acc, s.a_regs[column // 8][None, None, column % 8],
                            s.b_ring[None, None, k, place], acc,
                        )  # fmt: skip
                    else:
                        b = s.b_rope[None, None, k, 0] if e < 0 else s.b_ring[None, None, k, place]
                        cute.gemm(c.qk_ss, acc, s.a_smem[None, None, column - 4 * cfg.q_regs], b, acc)
                    if const_expr(issued == cfg.gate_left):
                        self.arrive(c.go + buf if left is None else left)
                    if const_expr(issued == cfg.spare):
                        self.arrive(c.p_full + 2)  # nobody's; see Config.spare
                    if const_expr(issued == cfg.gate_right):
                        self.arrive(c.go + 2 + buf if right is None else right)
                    issued += 1
                    if const_expr(issued == 8 and cfg.fence != "joint"):
                        cute.arch.fence_view_async_shared()
                        self.arrive(c.p_full + before)
        warpgroup.commit_group()
        if const_expr(cfg.gate_left == -1):
            self.arrive(c.go + buf if left is None else left)
        if const_expr(cfg.gate_right == -1):
            self.arrive(c.go + 2 + buf if right is None else right)
        # What the exponentials need beside the scores, while these are made.
        mine = buf ^ 1
        n0, n1 = self.negative(m0), self.negative(m1)
        cute.arch.mbarrier_wait(c.p_empty + mine, (((count + 1) >> 1) & 1) ^ 1)
        warpgroup.wait_group(0)
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            if const_expr(cfg.gate_left == -2):
                cute.arch.mbarrier_arrive(c.go + buf if left is None else left)
            if const_expr(cfg.gate_right == -2):
                cute.arch.mbarrier_arrive(c.go + 2 + buf if right is None else right)
            if const_expr(cfg.has_rope):
                cute.arch.mbarrier_arrive(c.rope_empty)
        if j + 1 == tiles:
            self.arrive(c.q_empty)
        if (valid0 & valid1) != -1:
            self.mask(c, acc, valid0, valid1)
        m0, m1, l0, l1, x0, x1, need = self.probabilities(c, s, acc, mine, m0, m1, n0, n1, l0, l1, x0, x1)
        flag = c.need
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            flag[c.warp, mine] = need
        return slot, phase, m0, m1, l0, l1, x0, x1

    @cute.jit
    def mask(self, c: cutlass.Constexpr, acc: cute.Tensor, valid0: Int32, valid1: Int32):
        """Scores of keys that are not there become -inf."""
        # Shifted once, through a shuffle, which stays where it is written: masks hoisted out of the loop would spill.
        shift = (cute.arch.shuffle_sync_bfly(c.lane, 0) & 3) * 2
        words = valid0 >> shift, valid1 >> shift
        for x in cutlass.range_constexpr(32):
            if (words[x // 16] >> ((x // 4 % 4) * 8 + x % 2)) & 1 == 0:
                acc[x] = -Float32.inf

    def rounded(self, x: Float32, y: Float32) -> Float32:
        """x * y that no compiler fuses with an addition."""
        return cute.arch.inline_ptx(
            "mul.rn.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[x, y]
        )

    @cute.jit
    def store_quarter(self, s: cutlass.Constexpr, k: cutlass.Constexpr, buf: Int32):
        """Sixteen columns of P."""
        cute.copy(s.store, s.p_from[(None, k), None, None], s.p_to[(None, k), None, None, buf])

    @cute.jit
    def negative(self, m: Float32):
        """What is added to the scores of a row with this reference."""
        n = -m if cute.arch.fmax(m, -m) < Float32(FUSED) else -Float32(NO_MAXIMUM)
        if const_expr(self.config.start == "zero"):
            n = Float32(0.0) if m == Float32(NO_MAXIMUM) else n
        return n

    def largest(self, acc: cute.Tensor, row: int, x: Float32) -> Float32:
        """The largest score of a thread's row and x, pair by pair: 16 one after the other take as long as 8 exponentials."""
        found = [acc[4 * i + 2 * row + k] for i in range(8) for k in range(2)]
        while len(found) > 1:
            found = [cute.arch.fmax(a, b) for a, b in zip(found[::2], found[1::2])]
        return cute.arch.fmax(x, found[0])

    @cute.jit
    def quick(
        self, c: cutlass.Constexpr, s: cutlass.Constexpr, acc: cute.Tensor, buf: Int32, m0: Float32, m1: Float32,
        n0: Float32, n1: Float32,
    ):  # fmt: skip
        """Probabilities with the old reference, their sums, and whether it does not do."""
        packed = s.packed
        from_zero = self.config.start == "zero"
        t0, t1 = Float32(0.0), Float32(0.0)
        for x in cutlass.range_constexpr(32):
            n = n0 if (x // 2) % 2 == 0 else n1
            value = cute.math.exp2(cute.math.fma(acc[x], c.scale_log2, n), fastmath=True)
            packed[x] = value.to(cutlass.BFloat16)
            t0, t1 = (t0 + value, t1) if (x // 2) % 2 == 0 else (t0, t1 + value)
            if const_expr(x % 8 == 7):
                self.store_quarter(s, x // 8, buf)
        # Not "greater": a NaN or an overflow of this row goes the careful way, too.
        fits = (t0 <= Float32(2.0**LAZY_LOG2)) & (t1 <= Float32(2.0**LAZY_LOG2))
        if const_expr(from_zero):  # far below, probabilities would vanish
            fits = fits & ((m0 != Float32(NO_MAXIMUM)) | (t0 >= Float32(2.0**-LAZY_LOG2)))
            fits = fits & ((m1 != Float32(NO_MAXIMUM)) | (t1 >= Float32(2.0**-LAZY_LOG2)))
        need = Int32(0) if cute.arch.vote_all_sync(fits) else Int32(1)
        return t0, t1, need

    @cute.jit
    def probabilities(
        self, c: cutlass.Constexpr, s: cutlass.Constexpr, acc: cute.Tensor, buf: Int32, m0: Float32, m1: Float32,
        n0: Float32, n1: Float32, l0: Float32, l1: Float32, x0: Float32, x1: Float32,
    ):  # fmt: skip
        """Probabilities 2^(score - reference) into `s.packed`; the reference of a row moves when they grow too large.

        It does while a thread's 16 probabilities of a row add up to 2^8 at most. Such a row's exponents are fused
        multiply-adds; their rounding error, |reference| 2^-25, is that of the scores as long as the reference is small.

        A large reference (2^20 and more) sends every tile to the careful path, where it is one of the scores, scaled and
        rounded like all: the difference of the largest is exactly 0, whatever its size. (The fused form would make
        2^(1e5) of a logit of 1e12.)
        """
        packed = s.packed
        wants_maximum = self.config.form == "rows"
        if const_expr(wants_maximum):
            x0, x1 = self.largest(acc, 0, x0), self.largest(acc, 1, x1)
        t0, t1, need = self.quick(c, s, acc, buf, m0, m1, n0, n1)
        if need != 0:
            y0, y1 = x0, x1
            if const_expr(not wants_maximum):
                y0, y1 = self.largest(acc, 0, y0), self.largest(acc, 1, y1)
            for d in (1, 2):
                y0 = cute.arch.fmax(y0, cute.arch.shuffle_sync_bfly(y0, d))
                y1 = cute.arch.fmax(y1, cute.arch.shuffle_sync_bfly(y1, d))
            y0 = cute.arch.fmax(m0, self.rounded(y0, c.scale_log2))
            y1 = cute.arch.fmax(m1, self.rounded(y1, c.scale_log2))
            f0 = cute.math.exp2(m0 - y0, fastmath=True)
            f1 = cute.math.exp2(m1 - y1, fastmath=True)
            l0, l1, m0, m1 = l0 * f0, l1 * f1, y0, y1
            factor = c.factor  # of O, for the value warpgroups
            if (c.lane & 3) == 0:
                factor[s.row0, buf] = f0
                factor[s.row0 + 8, buf] = f1
            t0, t1 = Float32(0.0), Float32(0.0)
            for x in cutlass.range_constexpr(32):
                m = m0 if (x // 2) % 2 == 0 else m1
                value = cute.math.exp2(self.rounded(acc[x], c.scale_log2) - m, fastmath=True)
                packed[x] = value.to(cutlass.BFloat16)
                t0, t1 = (t0 + value, t1) if (x // 2) % 2 == 0 else (t0, t1 + value)
            for k in cutlass.range_constexpr(4):
                self.store_quarter(s, k, buf)
        elif const_expr(self.config.start == "zero"):
            m0 = Float32(0.0) if m0 == Float32(NO_MAXIMUM) else m0
            m1 = Float32(0.0) if m1 == Float32(NO_MAXIMUM) else m1
        return m0, m1, l0 + t0, l1 + t1, x0, x1, need

    @cute.jit
    def sums(
        self, c: cutlass.Constexpr, s: cutlass.Constexpr, piece: Int32, m0: Float32, m1: Float32, l0: Float32,
        l1: Float32, x0: Float32, x1: Float32,
    ):  # fmt: skip
        """Row sums to the value warpgroups, log-sum-exp and largest score to memory."""
        for d in (1, 2):
            l0 += cute.arch.shuffle_sync_bfly(l0, d)
            l1 += cute.arch.shuffle_sync_bfly(l1, d)
            if const_expr(self.config.form == "rows"):
                x0 = cute.arch.fmax(x0, cute.arch.shuffle_sync_bfly(x0, d))
                x1 = cute.arch.fmax(x1, cute.arch.shuffle_sync_bfly(x1, d))
        index = piece & PIECES - 1
        cute.arch.mbarrier_wait(c.sum_empty, (piece & 1) ^ 1)
        shared_inverse, lse, max_logits = c.inverse, c.lse, c.max_logits
        if (c.lane & 3) == 0:
            token = c.piece[TOKEN, index]
            request, query = token, Int32(0)
            if const_expr(self.config.form == "pages"):
                request = token // lse.shape[2]
                query = token - request * lse.shape[2]
            for half in cutlass.range_constexpr(2):
                m, l, x = (m0, l0, x0) if half == 0 else (m1, l1, x1)  # noqa: E741
                head = c.m_block * 64 + s.row0 + 8 * half
                lse2 = m + cute.math.log2(l)
                if const_expr(self.config.split):
                    inverse = Float32(1.0) / l
                else:  # a key without a value
                    inverse = Float32(1.0) / (l + cute.math.exp2(s.sinks[half] - m, fastmath=True))
                if l == 0.0:  # sees nothing; a NaN stays one
                    inverse, lse2 = Float32(0.0), -Float32.inf
                if head < c.h_q:
                    unit = Float32(1.0 if self.config.split else LN2)  # what is merged has base 2
                    lse[request, head, query] = lse2 * unit
                    if const_expr(self.config.form == "rows"):
                        # The maximum passes over NaN, the sum does not; it is NaN beside a score of +inf, too.
                        max_logits[token, head] = l if (l != l) & (x < Float32.inf) else x * c.scale
                shared_inverse[s.row0 + 8 * half] = inverse
            # Each lane for its own stores: compute-sanitizer sees no order that only a warp makes.
            cute.arch.mbarrier_arrive(c.sum_full)
        self.arrive(c.piece_empty + index)

    # ------------------------------------------------------------------ O += P V

    @cute.jit
    def values(self, c: cutlass.Constexpr):
        """Half of O's columns: P from the exchange, V from the ring, O in registers."""
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
        tiles = self.next_piece(c, Int32(0))
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
                if c.need[c.warp, buf] != 0:
                    row0 = self.first_row(c)
                    self.rescale(accs, c.factor[row0, buf], c.factor[row0 + 8, buf])
                cute.arch.mbarrier_wait(c.go + half * 2 + buf, phase)
                warpgroup.fence()
                for k in cutlass.range_constexpr(4):
                    cute.gemm(pv, accs[0], a[None, None, k, buf], b[None, None, k, slot], accs[0])
                warpgroup.commit_group()
                for k in cutlass.range_constexpr(4):
                    cute.gemm(pv, accs[1], a[None, None, k, buf], b[None, None, k, slot1], accs[1])
                warpgroup.commit_group()
                warpgroup.wait_group(1)
                self.arrive(c.empty + slot, 32 if cfg.split else 1)
                warpgroup.wait_group(0)
                self.arrive(c.p_empty + buf)
                self.arrive(c.empty + slot1, 32 if cfg.split else 1)
                slot += 4
                turn += 1 << 3
            if slot >= cfg.slots:
                slot -= cfg.slots
            cute.arch.mbarrier_wait(c.sum_full, turn & 1)
            row0 = self.first_row(c)
            self.rescale(accs, c.inverse[row0], c.inverse[row0 + 8])
            cute.arch.fence_view_async_shared()  # the loads are done before the arrival
            self.arrive(c.sum_empty)
            token = c.piece[TOKEN, turn & PIECES - 1]
            self.arrive(c.piece_empty + (turn & PIECES - 1))
            for side in cutlass.range_constexpr(2):
                head = c.m_block * 64 + row0 + 8 * side
                # Lanes exchange values, so all take part; those of heads behind the last do not store.
                if const_expr(cfg.split):
                    self.store_partial(c.out[token, head, None], accs, c, half, side, head < c.h_q)
                else:
                    self.store_row(c.out[token, head, None], accs, c, half, side, head < c.h_q)
            turn = turn & -8 | turn + 1 & 7
            tiles = self.next_piece(c, turn & 7)

    @cute.jit
    def first_row(self, c: cutlass.Constexpr):
        """The first of a thread's two rows, 8 apart. Through a shuffle, which stays where it is written: kept in a register
        through the loop, it would spill another.
        """
        return c.warp * 16 + (cute.arch.shuffle_sync_bfly(c.lane, 0) >> 2)

    @cute.jit
    def rescale(self, accs: cutlass.Constexpr, f0: Float32, f1: Float32):
        """Multiply the two rows of a thread."""
        for acc in accs:
            for i in cutlass.range_constexpr(16):
                acc[i * 4 + 0] = acc[i * 4 + 0] * f0
                acc[i * 4 + 1] = acc[i * 4 + 1] * f0
                acc[i * 4 + 2] = acc[i * 4 + 2] * f1
                acc[i * 4 + 3] = acc[i * 4 + 3] * f1

    @cute.jit
    def store_partial(
        self, line: cute.Tensor, accs: cutlass.Constexpr, c: cutlass.Constexpr, half: Int32,
        side: cutlass.Constexpr, is_row: Boolean,
    ):  # fmt: skip
        """Half a row in fp32, 8 bytes at a time: the four lanes that share it store 32 adjacent bytes."""
        quad = cute.arch.shuffle_sync_bfly(c.lane, 0) & 3  # as in store_row
        base = (line.iterator + (half * 256 + quad * 2)).toint()
        if is_row:
            for h in cutlass.range_constexpr(2):
                for i in cutlass.range_constexpr(16):
                    cute.arch.inline_ptx(
                        f"st.global.v2.f32 [{{$r0}} + {(h * 128 + i * 8) * 4}], {{{{$r1}}, {{$r2}}}};",
                        read_only_args=[base, accs[h][i * 4 + 2 * side], accs[h][i * 4 + 2 * side + 1]],
                    )

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
        dtype = cutlass.BFloat16
        base = cute.make_ptr(
            dtype, (line.iterator + (half * 256 + quad * 8)).toint(), cute.AddressSpace.gmem, assumed_align=16
        )
        pairs = cute.make_rmem_tensor(cute.make_layout((2, 4), stride=(1, 2)), dtype)
        words = cute.recast_tensor(cute.make_tensor(pairs.iterator, cute.make_layout(8)), Int32)
        for h in cutlass.range_constexpr(2):
            for i in cutlass.range_constexpr(0, 16, 4):
                for g in cutlass.range_constexpr(4):
                    pairs[0, g] = accs[h][(i + g) * 4 + 2 * side].to(dtype)
                    pairs[1, g] = accs[h][(i + g) * 4 + 2 * side + 1].to(dtype)
                for step in (1, 2):
                    odd = (quad & step) != 0
                    for g in cutlass.range_constexpr(4):
                        if const_expr(g & step == 0):
                            low, high = words[g], words[g + step]
                            sent = cute.arch.shuffle_sync_bfly(low if odd else high, step)
                            words[g] = sent if odd else low
                            words[g + step] = high if odd else sent
                if is_row:
                    there = base + (h * 128 + i * 8)
                    if const_expr(self.config.form == "rows"):  # leaves the L2 first, as Q does
                        cute.arch.inline_ptx(
                            "st.global.cs.v4.b32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};",
                            read_only_args=[there.toint(), *(words[g] for g in range(4))],
                        )
                    else:
                        cute.autovec_copy(
                            cute.make_tensor(pairs.iterator, cute.make_layout(8)),
                            cute.make_tensor(there, cute.make_layout(8)),
                        )
