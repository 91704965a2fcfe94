"""Indices of every query token by where their rows lie, so that tokens that are computed together ask for the same ones.

Rows that do not all fit in L2 are read from memory once per token that selects them, if every token has its own order. Here the
CTAs of a turn go through the rows in one direction together, and back in the next turn, where the last rows still lie in L2.

    ordered[t] is a permutation of the first `length` entries of indices[t], by bucket = min(index * 32 / rows, 31), descending
    where t / parts is odd; within a bucket always in the same order. What is no row (-1, too large) comes as it falls.

One CTA per token: each thread counts its own entries per bucket, a scan over buckets and threads gives their places, each
thread puts them there, in shared memory, which is then stored. No atomics: same input, same order.
"""

from __future__ import annotations

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from openmla.backends.cute.prefill_sparse.config import LONGEST

THREADS = 128
WARPS = THREADS // 32
BUCKETS = 32  # one per lane of the warp that adds them up
WORDS = BUCKETS // 2  # a word counts for two: no list has 2^16 entries
BATCH = 8  # entries of a thread that are loaded together


class RowOrder:
    """The launch. Lists of up to `LONGEST` entries."""

    smem_bytes = (THREADS * WORDS + WORDS + BUCKETS + LONGEST) * 4

    @cute.jit
    def __call__(
        self,
        indices: cute.Tensor,  # int32 [tokens, topk]
        topk_length: cute.Tensor,  # int32 [tokens]; read only with has_length
        ordered: cute.Tensor,  # int32 [tokens, topk], written up to each length
        rows: Int32,  # that an index can name
        parts: Int32,  # tokens of a turn
        has_length: Int32,
        stream: cuda.CUstream,
    ):
        """Write `ordered`."""
        self.kernel(
            indices, topk_length, ordered, Float32(BUCKETS) / rows.to(Float32), parts, has_length
        ).launch(grid=[indices.shape[0], 1, 1], block=[THREADS, 1, 1], stream=stream)  # fmt: skip

    @cute.jit
    def bucket(self, index: Int32, share: Float32) -> Int32:
        """Which bucket an entry belongs to."""
        return cute.arch.fmin(cute.arch.fmax(index.to(Float32) * share, Float32(0.0)), Float32(BUCKETS - 1)).to(Int32)

    @cute.jit
    def load(self, line: cute.Tensor, first: Int32, length: Int32, values: cute.Tensor):
        """A thread's next entries; those behind the end are not used."""
        for i in cutlass.range_constexpr(BATCH):
            if first + i * THREADS < length:
                values[i] = line[first + i * THREADS]

    @cute.kernel
    def kernel(
        self,
        indices: cute.Tensor,
        topk_length: cute.Tensor,
        ordered: cute.Tensor,
        share: Float32,
        parts: Int32,
        has_length: Int32,
    ):
        """Count, add up, write."""
        tid, _, _ = cute.arch.thread_idx()
        token, _, _ = cute.arch.block_idx()
        lane, warp = cute.arch.lane_idx(), cute.arch.make_warp_uniform(cute.arch.warp_idx())
        smem = cutlass.memory.SmemAllocator()
        counts = smem.allocate_tensor(Int32, cute.make_layout((THREADS, WORDS)), 16)
        totals = smem.allocate_tensor(Int32, cute.make_layout(WORDS), 16)
        bases = smem.allocate_tensor(Int32, cute.make_layout(BUCKETS), 16)
        places = smem.allocate_tensor(Int32, cute.make_layout(LONGEST), 16)
        values = cute.make_rmem_tensor(BATCH, Int32)
        values.fill(0)
        source, line = indices[token, None], ordered[token, None]
        length = Int32(indices.shape[1])
        if has_length != 0:
            length = cutlass.min(cutlass.max(topk_length[token], 0), length)

        for word in cutlass.range_constexpr(WORDS):
            counts[tid, word] = Int32(0)
        for first in cutlass.range(tid, length, THREADS * BATCH, unroll=1):
            self.load(source, first, length, values)
            for i in cutlass.range_constexpr(BATCH):
                if first + i * THREADS < length:
                    b = self.bucket(values[i], share)
                    counts[tid, b >> 1] = counts[tid, b >> 1] + (1 << ((b & 1) * 16))
        cute.arch.sync_threads()

        # Each warp some words: how many entries of their buckets lie before a thread's, lanes first.
        for k in cutlass.range_constexpr(WORDS // WARPS):
            word = warp * (WORDS // WARPS) + k
            for i in cutlass.range_constexpr(WARPS):
                values[i] = counts[lane + 32 * i, word]
            below = values[0]
            for i in cutlass.range_constexpr(1, WARPS):
                below = below + values[i]
            below = self.inclusive(below, lane)
            if lane == 31:
                totals[word] = below
            for i in cutlass.range_constexpr(WARPS):
                below = below - values[i]
                counts[lane + 32 * i, word] = below
        cute.arch.sync_threads()
        if warp == 0:
            mine = (totals[lane >> 1] >> ((lane & 1) * 16)) & 0xFFFF
            end = self.inclusive(mine, lane)
            is_turned = (token // parts & 1) != 0
            bases[lane] = length - end if is_turned else end - mine
        cute.arch.sync_threads()

        for first in cutlass.range(tid, length, THREADS * BATCH, unroll=1):
            self.load(source, first, length, values)
            for i in cutlass.range_constexpr(BATCH):
                if first + i * THREADS < length:
                    b = self.bucket(values[i], share)
                    before = counts[tid, b >> 1]
                    counts[tid, b >> 1] = before + (1 << ((b & 1) * 16))
                    places[bases[b] + ((before >> ((b & 1) * 16)) & 0xFFFF)] = values[i]
        cute.arch.sync_threads()
        for at in cutlass.range(tid, length, THREADS, unroll=4):
            line[at] = places[at]

    @cute.jit
    def inclusive(self, value: Int32, lane: Int32) -> Int32:
        """Prefix sum over a warp."""
        for step in (1, 2, 4, 8, 16):
            below = cute.arch.shuffle_sync_up(value, step)
            value = value + below if lane >= step else value
        return value


def fake_arguments() -> list[Any]:
    """Arguments for `toolchain.compile_kernel(RowOrder(), ...)`."""
    from openmla.backends.cute.toolchain import fake_stream, fake_tensor

    return [
        fake_tensor(Int32, (None, None), stride=(None, 1), align=4),  # indices
        fake_tensor(Int32, (None,), stride=(None,), align=4),  # topk_length
        fake_tensor(Int32, (None, None), stride=(None, 1), align=4),  # ordered
        Int32(1), Int32(1), Int32(0),
        fake_stream(),
    ]  # fmt: skip
