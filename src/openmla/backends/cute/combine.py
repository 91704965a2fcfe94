"""Merge of the partial results of split requests, on the device; the law is that of `openmla.split.combine`.

    m = max_i lse_i      w_i = 2^(lse_i - m)      out = sum_i w_i out_i / sum_i w_i      lse = m + log2(sum_i w_i)

Partials are fp32 and lie at slot = num_splits[request] + split; sums run in a fixed order, so the bits repeat. Requests
of one piece were finished by the decode kernel: their CTAs leave after reading two integers.

One CTA of 128 threads takes one query row and `columns` of its 512 columns; `columns` / 4 threads of four columns
each form a group, and group g adds the splits g, g + groups, ... Few columns per CTA suit small batches with many
splits (the chip is filled, and all loads of a thread are in flight together), 512 suit large batches with two or three.

The launch is a programmatic dependent of the decode kernel: its CTAs may be resident before the partials are.
"""

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

D_V = 512
THREADS = 128
LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453


class Combine:
    """One compiled variant.

    Args:
        dtype: of `out`.
        columns: 512, 256, 128 or 64 columns per CTA.
        unroll: partial rows in flight per thread.
    """

    def __init__(self, dtype: Any, columns: int = 512, unroll: int = 8) -> None:
        self.dtype, self.columns, self.unroll = dtype, columns, unroll
        self.groups = THREADS * 4 // columns
        self.smem_bytes = self.groups * columns * 4 if self.groups > 1 else 0

    @cute.jit
    def __call__(
        self,
        out_accum: cute.Tensor,  # fp32 [slots, h_kv * rows, 512]
        lse_accum: cute.Tensor,  # fp32 [slots, h_kv * rows], base 2
        num_splits: cute.Tensor,  # int32 [batch + 1]
        out: cute.Tensor,  # [batch, s_q, h_q, 512]
        lse: cute.Tensor,  # fp32 [batch, h_q, s_q]
        sink: cute.Tensor,  # fp32 [h_q]
        h_kv: Int32,
        has_sink: Int32,
        stream: cuda.CUstream,
    ):
        """Write `out` and `lse` of every request that has more than one piece."""
        self.kernel(out_accum, lse_accum, num_splits, out, lse, sink, h_kv, has_sink).launch(
            grid=[D_V // self.columns, out_accum.shape[1], out.shape[0]],
            block=[THREADS, 1, 1],
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(
        self,
        out_accum: cute.Tensor,
        lse_accum: cute.Tensor,
        num_splits: cute.Tensor,
        out: cute.Tensor,
        lse: cute.Tensor,
        sink: cute.Tensor,
        h_kv: Int32,
        has_sink: Int32,
    ):
        """One query row, `columns` of its columns."""
        tid, _, _ = cute.arch.thread_idx()
        chunk, row, request = cute.arch.block_idx()
        lane = cute.arch.lane_idx()
        width = self.columns // 4
        group, place = tid // width, tid % width
        if const_expr(self.groups > 1):
            box = cutlass.memory.SmemAllocator().allocate_tensor(
                Float32, cute.make_layout((4, width, self.groups), stride=(1, 4, self.columns)), 16
            )
        # the plan is older than the kernel that this one waits for, whose end it must see before the partials
        first = num_splits[request]
        pieces = num_splits[request + 1] - first
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()
        if pieces > 1:
            data = cute.local_tile(out_accum, (1, 1, 4), (None, row, chunk * width + place))  # [1, 1, 4, slots]
            loads = cute.make_rmem_tensor(cute.make_layout((4, self.unroll)), Float32)
            weights = cute.make_rmem_tensor(cute.make_layout(self.unroll), Float32)
            for u in cutlass.range_constexpr(self.unroll):  # in flight while the weights are computed
                split = group + u * self.groups
                if split < pieces:
                    cute.autovec_copy(data[0, 0, None, first + split], loads[None, u])

            peak = -Float32.inf
            for split in cutlass.range(lane, pieces, 32, unroll=4):
                peak = cute.arch.fmax(peak, lse_accum[first + split, row])
            for step in (1, 2, 4, 8, 16):
                peak = cute.arch.fmax(peak, cute.arch.shuffle_sync_bfly(peak, step))
            shift = peak if peak > -Float32.inf else Float32(0.0)
            total = Float32(0.0)
            for split in cutlass.range(lane, pieces, 32, unroll=4):
                total += cute.math.exp2(lse_accum[first + split, row] - shift, fastmath=True)
            for step in (1, 2, 4, 8, 16):
                total += cute.arch.shuffle_sync_bfly(total, step)

            sums = cute.make_rmem_tensor(cute.make_layout(4), Float32)
            sums.fill(0.0)
            for base in cutlass.range(0, pieces, self.groups * self.unroll, unroll=1):
                for u in cutlass.range_constexpr(self.unroll):
                    split = base + group + u * self.groups
                    weights[u] = Float32(0.0)
                    if split < pieces:
                        weights[u] = cute.math.exp2(lse_accum[first + split, row] - shift, fastmath=True)
                        if base > 0:
                            cute.autovec_copy(data[0, 0, None, first + split], loads[None, u])
                for u in cutlass.range_constexpr(self.unroll):
                    if base + group + u * self.groups < pieces:
                        for i in cutlass.range_constexpr(4):
                            sums[i] = sums[i] + loads[i, u] * weights[u]

            h_q, s_q = out.shape[2], out.shape[1]
            heads = h_q // h_kv  # per KV head
            per_head = s_q * heads
            token, head = (row % per_head) // heads, (row // per_head) * heads + row % heads
            scale = Float32(1.0) / total
            lse2 = peak + cute.math.log2(total, fastmath=True)
            if total == 0.0:  # sees nothing; a NaN stays one
                scale, lse2 = Float32(0.0), -Float32.inf
            if (has_sink != 0) & (total > 0.0):
                scale = scale / (Float32(1.0) + cute.math.exp2(sink[head] * LOG2_E - lse2, fastmath=True))
            if const_expr(self.groups > 1):
                cute.autovec_copy(sums, box[None, place, group])
                cute.arch.sync_threads()
                if group == 0:
                    for g in cutlass.range_constexpr(1, self.groups):
                        for i in cutlass.range_constexpr(4):
                            sums[i] = sums[i] + box[i, place, g]
            if group == 0:
                rounded = cute.make_rmem_tensor(cute.make_layout(4), self.dtype)
                for i in cutlass.range_constexpr(4):
                    sums[i] = sums[i] * scale
                rounded.store(sums.load().to(self.dtype))
                line = cute.local_tile(out[request, token, head, None], (4,), (chunk * width + place,))
                cute.autovec_copy(rounded, line)
                if (tid == 0) & (chunk == 0):
                    lse[request, head, token] = lse2 * LN_2


def fake_arguments(dtype: Any) -> list[Any]:
    """Arguments for `toolchain.compile_kernel(Combine(...), ...)`."""
    from cutlass.cute.runtime import make_fake_tensor

    from openmla.backends.cute.toolchain import fake_stream, fake_tensor

    step = [cute.sym_int64(divisibility=4) for _ in range(3)]
    return [
        fake_tensor(Float32, (None, None, D_V), align=16),
        fake_tensor(Float32, (None, None), align=4),
        fake_tensor(Int32, (None,), align=4),
        make_fake_tensor(
            dtype, (cute.sym_int(), cute.sym_int(), cute.sym_int(), D_V), stride=(*step, 1), assumed_align=8
        ),
        fake_tensor(Float32, (None, None, None), stride=(None, None, None), align=4),
        fake_tensor(Float32, (None,), align=4),
        Int32(1), Int32(0),
        fake_stream(),
    ]  # fmt: skip
