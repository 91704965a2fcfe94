"""Dense decode where several clusters of two read the same keys: the schedule of `two_loaders` with two things more.

Ring     Six of the nine slices of Q live in registers of the scores warpgroup (168), so shared memory has room for an 11th
         slot. With ten the scores waited 320 of 3,156 clk for the third quarter of their tile, whose slot the left half of
         P V gives back (log 58).
P        of a tile leaves the registers behind the first 8 wgmmas of the next tile's scores: stores, fence and arrival
         pass while those are computed. It may not be used earlier: the left half begins P V when all of them are issued.
         Where no tile follows, it leaves at once.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass.cute.nvgpu import warp, warpgroup

from openmla.backends.cute.decode_dense.kernel import (
    FULL,
    NO_MAXIMUM,
    PIECES,
    PIECES_LOG2,
    S_Q,
    TILES,
    Scope,
)
from openmla.backends.cute.decode_dense.two_loaders.kernel import TwoLoaders

LEAVES_AT = 7  # the wgmma of a tile's scores behind which P of the tile before leaves


class TwoClusters(TwoLoaders):
    """The role of the scores warpgroup, and what registers each role has."""

    registers = 168, 160, 24

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
        cute.recast_tensor(s.packed, Int32).fill(0)  # P of tile 0, which nobody multiplies

        # Every phase follows from a running count: ring slots filled, tiles, pieces.
        slot, phase, count, piece = Int32(0), Int32(0), Int32(0), Int32(0)
        f0, f1, need = Float32(1.0), Float32(1.0), Int32(0)
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
                slot, phase, m0, m1, l0, l1, f0, f1, need = self.late_step(
                    c, s, acc, slot, phase, count, piece, tiles, j, m0, m1, l0, l1, f0, f1, need
                )
                count += 1
            following = piece + 1
            cute.arch.mbarrier_wait(c.piece_full + (following & PIECES - 1), (following >> PIECES_LOG2) & 1)
            tiles = cute.arch.make_warp_uniform(c.piece[TILES, following & PIECES - 1])
            if tiles < 0:  # no scores follow behind which P would leave, and that would open the gates of the last tile
                self.hand_over(c, s, count, Int32(0), f0, f1, need)
                self.arrive(c.go + (count & 1))
                self.arrive(c.go + 2 + (count & 1))
            self.sums(c, s, piece, m0, m1, l0, l1)
            piece += 1

    @cute.jit
    def late_step(
        self, c: cutlass.Constexpr, s: cutlass.Constexpr, acc: cute.Tensor, slot: Int32, phase: Int32, count: Int32,
        piece: Int32, tiles: Int32, j: Int32, m0: Float32, m1: Float32, l0: Float32, l1: Float32,
        f0: Float32, f1: Float32, need: Int32,
    ):  # fmt: skip
        """Scores of tile j, behind the first of them P of the tile before, then its gates and the probabilities of tile j."""
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
            if const_expr(e == (-1 if cfg.has_rope else 3)):  # the first that reads Q from shared memory
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
                if const_expr(issued == LEAVES_AT):
                    self.hand_over(c, s, count, buf, f0, f1, need)
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
        if j + 1 == tiles:
            self.arrive(c.q_empty)
        if valid != FULL:
            self.mask(c, s, acc, piece, j, valid, slot)
        m0, m1, l0, l1, f0, f1, need = self.probabilities(c, s, acc, m0, m1, l0, l1)
        return slot, phase, m0, m1, l0, l1, f0, f1, need
