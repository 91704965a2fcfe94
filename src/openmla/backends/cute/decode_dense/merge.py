"""Merge of the partial results that `decode_dense` leaves of split requests; the law is that of `openmla.split.combine`.

    m = max_i lse_i      w_i = 2^(lse_i - m)      out = sum_i w_i out_i / sum_i w_i      lse = m + log2(sum_i w_i)

By a second launch, where the decode kernel does not merge itself (`shares`): with batch_invariant, and in `decode_fp8`.

Partials are fp32 and lie at slot = num_splits[request] + split; sums run in a fixed order, so the bits repeat. Requests
of one piece were finished by the decode kernel: their CTAs leave after reading two integers.

A partial of 64 rows x 512 columns lies as the accumulators of the decode kernel do, so that both sides move 16 bytes per
thread and whole lines per warp: 4 x 64 units of 32 x 4 floats, unit (w, n) = rows [16 w, 16 w + 16) of columns
[8 n, 8 n + 8), and in it the four floats of lane t are rows 16 w + t / 4 and 8 further, of the two columns 8 n + t % 4 * 2.

A CTA takes 64 rows and `columns` of their columns with `groups` teams of 128 threads; team g adds the splits g,
g + groups, ... Few columns and many teams suit small batches with many splits (the chip is filled, and all loads of a
thread are in flight together), many columns and one team large batches with two or three.

The launch is a programmatic dependent of the decode kernel: its CTAs may be resident before the partials are.
"""

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

D_V = 512
ROWS = 64  # of a block
UNIT = 8  # columns
TABLE = 128  # splits whose weights are kept in shared memory; those of further ones are computed where they are used
LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453


class Merge:
    """One compiled variant.

    Args:
        dtype: of `out`.
        columns: per CTA, a multiple of 8 and a divisor of 512.
        groups: teams of 128 threads; several only where columns is 8.
    """

    def __init__(self, dtype: Any, columns: int = 128, groups: int = 1) -> None:
        self.dtype, self.columns, self.groups = dtype, columns, groups
        self.units = columns // UNIT
        self.together = min(self.units, 4)  # units, and below splits, whose loads are in flight together
        self.unroll = 8 // self.together
        self.smem_bytes = 4 * ROWS * (TABLE + 4 * groups + 2) + (2048 * groups if groups > 1 else 0)

    @cute.jit
    def __call__(
        self,
        out_accum: cute.Tensor,  # fp32 [slots, h_kv * row blocks, 64 * 512]
        lse_accum: cute.Tensor,  # fp32 [slots, h_kv * row blocks * 64], base 2
        num_splits: cute.Tensor,  # int32 [batch + 1]
        cu_seqlens_q: cute.Tensor,  # int32 [batch + 1]; read only with is_varlen
        out: cute.Tensor,  # [batch | 1, s_q | total_q, h_q, 512]
        lse: cute.Tensor,  # fp32 [batch | 1, h_q, s_q | total_q]
        sink: cute.Tensor,  # fp32 [h_q]
        s_q: Int32,  # tokens per request, the longest with is_varlen
        h_kv: Int32,
        is_varlen: Int32,
        has_sink: Int32,
        stream: cuda.CUstream,
    ):
        """Write `out` and `lse` of every request that has more than one piece."""
        self.kernel(
            out_accum, lse_accum, num_splits, cu_seqlens_q, out, lse, sink, s_q, h_kv, is_varlen, has_sink
        ).launch(
            grid=[D_V // self.columns, out_accum.shape[1], num_splits.shape[0] - 1],
            block=[128 * self.groups, 1, 1],
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(
        self,
        out_accum: cute.Tensor,
        lse_accum: cute.Tensor,
        num_splits: cute.Tensor,
        cu_seqlens_q: cute.Tensor,
        out: cute.Tensor,
        lse: cute.Tensor,
        sink: cute.Tensor,
        s_q: Int32,
        h_kv: Int32,
        is_varlen: Int32,
        has_sink: Int32,
    ):
        """One block of 64 rows, `columns` of its columns."""
        tid, _, _ = cute.arch.thread_idx()
        chunk, block, request = cute.arch.block_idx()
        # the plan is older than the kernel that this one waits for, whose end it must see before the partials
        first = num_splits[request]
        pieces = num_splits[request + 1] - first
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()
        if pieces > 1:
            self.merge(
                out_accum, lse_accum, cu_seqlens_q, out, lse, sink, s_q, h_kv, is_varlen, has_sink, tid, chunk, block,
                request, first, pieces,
            )  # fmt: skip

    @cute.jit
    def merge(
        self, out_accum: cute.Tensor, lse_accum: cute.Tensor, cu_seqlens_q: cute.Tensor, out: cute.Tensor,
        lse: cute.Tensor, sink: cute.Tensor, s_q: Int32, h_kv: Int32, is_varlen: Int32, has_sink: Int32, tid: Int32,
        chunk: Int32, block: Int32, request: Int32, first: Int32, pieces: Int32,
    ):  # fmt: skip
        """The whole work of a CTA of a split request."""
        groups, together, unroll = self.groups, self.together, self.unroll
        thread, group = tid & 127, tid >> 7
        row0 = (thread >> 5) * 16 + ((thread & 31) >> 2)  # in the block; the other row is 8 further
        smem = cutlass.memory.SmemAllocator()
        table = smem.allocate_tensor(Float32, cute.make_layout((ROWS, TABLE)), 16)
        top = smem.allocate_tensor(Float32, cute.make_layout((ROWS, 2 * groups)), 16)
        total = smem.allocate_tensor(Float32, cute.make_layout((ROWS, 2 * groups)), 16)
        shifts = smem.allocate_tensor(Float32, cute.make_layout(ROWS), 16)
        scale = smem.allocate_tensor(Float32, cute.make_layout(ROWS), 16)
        if const_expr(groups > 1):
            box = smem.allocate_tensor(Float32, cute.make_layout((4, 128, groups)), 16)
        units = cute.make_tensor(
            (
                out_accum[first, block, None].iterator
                + ((thread >> 5) * (64 * 128) + chunk * self.units * 128 + (thread & 31) * 4)
            ).align(16),
            cute.make_layout((4, self.units, pieces), stride=(1, 128, out_accum.stride[0])),
        )
        loads = cute.make_rmem_tensor(cute.make_layout((4, together, unroll)), Float32)
        self.fetch(units, loads, Int32(0), group, pieces)  # in flight while the weights are computed

        # 1. weights: thread = (row, share of the splits)
        row, share = tid & 63, tid >> 6
        column = block * ROWS + row
        peak = -Float32.inf
        for split in cutlass.range(share, pieces, 2 * groups, unroll=8):
            peak = cute.arch.fmax(peak, lse_accum[first + split, column])
        top[row, share] = peak
        cute.arch.sync_threads()
        for other in cutlass.range_constexpr(2 * groups):
            peak = cute.arch.fmax(peak, top[row, other])
        shift = peak if peak > -Float32.inf else Float32(0.0)
        part = Float32(0.0)
        for split in cutlass.range(share, pieces, 2 * groups, unroll=8):
            weight = cute.math.exp2(lse_accum[first + split, column] - shift, fastmath=True)
            part += weight
            if split < TABLE:
                table[row, split] = weight
        total[row, share] = part
        if share == 0:
            shifts[row] = shift
        cute.arch.sync_threads()

        # 2. where the rows go, and their factors
        heads = out.shape[2] // h_kv
        row_blocks = out_accum.shape[1] // h_kv
        kv_head = block // row_blocks
        base_row = (block - kv_head * row_blocks) * ROWS
        token0, batch, rows = Int32(0), request, s_q * heads
        if is_varlen != 0:
            token0, batch = cutlass.min(cutlass.max(cu_seqlens_q[request], 0), out.shape[1]), Int32(0)
            rows = cutlass.min((cutlass.min(cu_seqlens_q[request + 1], out.shape[1]) - token0) * heads, rows)
        if tid < ROWS:
            token, head = self.place(base_row + row, heads, kv_head)
            sum_ = Float32(0.0)
            for other in cutlass.range_constexpr(2 * groups):
                sum_ += total[row, other]
            factor, lse2 = Float32(1.0) / sum_, peak + cute.math.log2(sum_, fastmath=True)
            if sum_ == 0.0:  # sees nothing; a NaN stays one
                factor, lse2 = Float32(0.0), -Float32.inf
            if base_row + row < rows:
                if has_sink != 0:
                    extra = cute.math.exp2(sink[head] * LOG2_E - lse2, fastmath=True)
                    factor = factor / (Float32(1.0) + extra) if sum_ != 0.0 else factor
                if chunk == 0:
                    lse[batch, head, token0 + token] = lse2 * LN_2
            scale[row] = factor
        cute.arch.sync_threads()

        # 3. sums, in the order of the splits within a team and then of the teams
        shift0, shift1 = shifts[row0], shifts[row0 + 8]
        sums = cute.make_rmem_tensor(cute.make_layout((4, together)), Float32)
        for start in cutlass.range(0, self.units, together, unroll=1):
            sums.fill(0.0)
            for base in cutlass.range(group, pieces, groups * unroll, unroll=1):
                if (start > 0) | (base >= groups):
                    self.fetch(units, loads, start, base, pieces)
                for w in cutlass.range_constexpr(unroll):
                    split = base + w * groups
                    if split < pieces:
                        w0, w1 = Float32(0.0), Float32(0.0)
                        if split < TABLE:
                            w0, w1 = table[row0, split], table[row0 + 8, split]
                        else:
                            other = lse_accum[first + split, None]
                            w0 = cute.math.exp2(other[block * ROWS + row0] - shift0, fastmath=True)
                            w1 = cute.math.exp2(other[block * ROWS + row0 + 8] - shift1, fastmath=True)
                        for u in cutlass.range_constexpr(together):
                            for i in cutlass.range_constexpr(4):
                                sums[i, u] = sums[i, u] + loads[i, u, w] * (w0 if i < 2 else w1)
            if const_expr(groups > 1):
                cute.autovec_copy(sums[None, 0], box[None, thread, group])
                cute.arch.sync_threads()
                for other in cutlass.range_constexpr(1, groups):
                    for i in cutlass.range_constexpr(4):
                        sums[i, 0] = sums[i, 0] + box[i, thread, other]
            if group == 0:
                for side in cutlass.range_constexpr(2):
                    token, head = self.place(base_row + row0 + 8 * side, heads, kv_head)
                    factor = scale[row0 + 8 * side]
                    if base_row + row0 + 8 * side < rows:
                        line = out[batch, token0 + token, head, None]
                        for u in cutlass.range_constexpr(together):
                            pair = cute.make_rmem_tensor(2, self.dtype)
                            pair[0] = (sums[2 * side, u] * factor).to(self.dtype)
                            pair[1] = (sums[2 * side + 1, u] * factor).to(self.dtype)
                            column = (chunk * self.units + start + u) * UNIT + (thread & 3) * 2
                            cute.autovec_copy(pair, cute.local_tile(line, (2,), (column // 2,)))

    @cute.jit
    def place(self, row: Int32, heads: Int32, kv_head: Int32):
        """Token and query head of a row."""
        token = row // heads
        return token, kv_head * heads + row - token * heads

    @cute.jit
    def fetch(self, units: cute.Tensor, loads: cute.Tensor, start: Int32, base: Int32, pieces: Int32):
        """Start the loads of some units of some splits."""
        for w in cutlass.range_constexpr(self.unroll):
            split = base + w * self.groups
            if split < pieces:
                for u in cutlass.range_constexpr(self.together):
                    cute.autovec_copy(units[None, start + u, split], loads[None, u, w])


def fake_arguments(dtype: Any) -> list[Any]:
    """Arguments for `toolchain.compile_kernel(Merge(...), ...)`."""
    from cutlass.cute.runtime import make_fake_tensor

    from openmla.backends.cute.toolchain import fake_stream, fake_tensor

    step = [cute.sym_int64(divisibility=4) for _ in range(3)]
    return [
        fake_tensor(Float32, (None, None, ROWS * D_V), align=16),
        fake_tensor(Float32, (None, None), align=4),
        fake_tensor(Int32, (None,), align=4),
        fake_tensor(Int32, (None,), align=4),
        make_fake_tensor(
            dtype, (cute.sym_int(), cute.sym_int(), cute.sym_int(), D_V), stride=(*step, 1), assumed_align=8
        ),
        fake_tensor(Float32, (None, None, None), stride=(None, None, None), align=4),
        fake_tensor(Float32, (None,), align=4),
        Int32(1), Int32(1), Int32(0), Int32(0),
        fake_stream(),
    ]  # fmt: skip
