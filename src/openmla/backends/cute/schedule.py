"""`openmla.split.schedule.plan_decode` on the device: one CTA, no host sync, safe inside a CUDA graph.

The plan of the Python function has a closed form for every part once each request knows where it ends on the line, so
the work here is one prefix sum over requests and two binary searches per part. Results are identical, field by field:

    1. lengths -> blocks (clamped to the capacity of the block table, faults reported), widths, their prefix sum and
       maximum: a scan over warps, 512 requests at a time, kept in shared memory (at most `MAX_BATCH` requests);
    2. whether requests stay whole: the busiest part if they do, by one binary search per cut and a maximum;
    3. pieces per request in closed form, their prefix sum -> num_splits;
    4. one thread per part: its two cuts, the requests that hold them, its first split.

Outputs are read by the kernels of every layer until the lengths change: `metadata` int32 [num_parts, 8] and `num_splits`
int32 [batch + 1], as in `openmla.split.schedule`.
"""

from __future__ import annotations

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64

THREADS = 512
WARPS = THREADS // 32
MAX_BATCH = 4096  # two int32 arrays of it in shared memory, below the 48 KB that need no opt-in

LENGTH_NEGATIVE = 2
LENGTH_OVER_CAPACITY = 4


class DecodePlan:
    """The launch. Arguments are those of `plan_decode`; `chunk_blocks` 0 selects `balanced`, else `batch_invariant`."""

    smem_bytes = 2 * MAX_BATCH * 4 + 2 * WARPS * 4

    @cute.jit
    def __call__(
        self,
        cache_seqlens: cute.Tensor,  # int32 [batch]
        metadata: cute.Tensor,  # int32 [num_parts, 8], written
        num_splits: cute.Tensor,  # int32 [batch + 1], written
        fault_word: cute.Tensor,  # int32 [1], bits are OR-ed in
        capacity: Int32,  # tokens that the block table can address
        block_tokens: Int32,
        overhead: Int32,
        merge: Int32,
        min_share: Int32,
        chunk_blocks: Int32,
        stream: cuda.CUstream,
    ):
        """Write `metadata` and `num_splits`."""
        self.kernel(
            cache_seqlens, metadata, num_splits, fault_word, capacity, block_tokens, overhead, merge, min_share,
            chunk_blocks,
        ).launch(grid=[1, 1, 1], block=[THREADS, 1, 1], stream=stream)  # fmt: skip

    @cute.jit
    def scan(self, value: Int32, totals: cute.Tensor) -> Int32:
        """Inclusive prefix sum over the CTA; afterwards totals[w] is the sum of warp w."""
        lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
        for step in (1, 2, 4, 8, 16):
            below = cute.arch.shuffle_sync_up(value, step)
            value = value + below if lane >= step else value
        cute.arch.sync_threads()  # the previous round has read totals
        if lane == 31:
            totals[warp] = value
        cute.arch.sync_threads()
        for w in cutlass.range_constexpr(WARPS):
            value = value + totals[w] if warp > w else value
        return value

    @cute.jit
    def largest(self, value: Int32, totals: cute.Tensor) -> Int32:
        """Maximum over the CTA."""
        lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()  # warp_idx shuffles: never inside a lane's branch
        for step in (1, 2, 4, 8, 16):
            other = cute.arch.shuffle_sync_bfly(value, step)
            value = other if other > value else value
        cute.arch.sync_threads()
        if lane == 0:
            totals[warp] = value
        cute.arch.sync_threads()
        for w in cutlass.range_constexpr(WARPS):
            value = totals[w] if totals[w] > value else value
        return value

    @cute.jit
    def cuts_before(self, position: Int32, overhead: Int32, cuts: Int32, line: Int32) -> Int32:
        """How many of the cuts 0, 1, ... lie before a position that is past the first head."""
        return Int32((Int64(position - overhead) * Int64(cuts) + Int64(line - 1)) // Int64(line))

    @cute.jit
    def first_of(self, end: Int32, count: Int32, overhead: Int32) -> Int32:
        """Line position of a request's first block, or of the piece that an empty request is."""
        head = overhead if overhead > 0 else Int32(1)
        return end - (count if count > 0 else head)

    @cute.jit
    def whole_before(self, ends: cute.Tensor, batch: Int32, part: Int32, cuts: Int32, line: Int32) -> Int32:
        """How many requests the parts before `part` take when none is split: those whose middle lies before its cut."""
        bound = Int64(2 * part) * Int64(line)
        left = Int32(0)
        right = batch
        while left < right:
            middle = (left + right) // 2
            end = ends[middle]
            begin = ends[middle - 1] if middle > 0 else Int32(0)
            if (Int64(begin) + Int64(end)) * Int64(cuts) < bound:
                left = middle + 1
            else:
                right = middle
        return left if part < cuts else batch

    @cute.kernel
    def kernel(
        self,
        cache_seqlens: cute.Tensor,
        metadata: cute.Tensor,
        num_splits: cute.Tensor,
        fault_word: cute.Tensor,
        capacity: Int32,
        block_tokens: Int32,
        overhead: Int32,
        merge: Int32,
        min_share: Int32,
        chunk_blocks: Int32,
    ):
        """The four steps of the module docstring, one after the other."""
        tid, _, _ = cute.arch.thread_idx()
        batch = cute.size(cache_seqlens)
        num_parts = metadata.shape[0]
        smem = cutlass.memory.SmemAllocator()
        ends = smem.allocate_tensor(Int32, cute.make_layout(MAX_BATCH), 16)
        blocks = smem.allocate_tensor(Int32, cute.make_layout(MAX_BATCH), 16)
        totals = smem.allocate_tensor(Int32, cute.make_layout(WARPS), 16)
        carry_box = smem.allocate_tensor(Int32, cute.make_layout(1), 16)

        # 1. blocks and line ends. In batch_invariant plans the line counts chunks instead of blocks.
        carry = Int32(0)
        longest = Int32(0)
        faults = Int32(0)
        for base in cutlass.range(0, batch, THREADS, unroll=1):
            index = base + tid
            length = Int32(0)
            if index < batch:
                length = cache_seqlens[index]
            if length < 0:
                length = Int32(0)
                faults = faults | LENGTH_NEGATIVE
            if length > capacity:
                length = capacity
                faults = faults | LENGTH_OVER_CAPACITY
            count = (length + block_tokens - 1) // block_tokens
            longest = count if count > longest else longest
            width = count + overhead
            if chunk_blocks > 0:
                width = (count + chunk_blocks - 1) // chunk_blocks
            width = width if width > 1 else Int32(1)
            width = width if index < batch else Int32(0)
            end = self.scan(width, totals) + carry
            if index < batch:
                ends[index] = end
                blocks[index] = count
            if tid == THREADS - 1:
                carry_box[0] = end
            cute.arch.sync_threads()
            carry = carry_box[0]
        if faults != 0:
            cute.arch.atomic_or(fault_word.iterator, faults, sem="relaxed", scope="gpu")
        longest = self.largest(longest, totals)
        cute.arch.sync_threads()

        line = carry - overhead  # without the first head
        wanted = line // min_share
        wanted = wanted if wanted > 1 else Int32(1)
        cuts = wanted if wanted < num_parts else num_parts
        share = (line + cuts - 1) // cuts

        # 2. one request per part where they suffice; else deal them only if the longest alone does not forbid it
        is_one_each = batch <= num_parts
        slack = overhead if is_one_each else merge
        is_whole = (chunk_blocks == 0) & (longest <= share + slack)
        if is_whole and not is_one_each:
            busiest = Int32(0)
            for part in cutlass.range(tid, cuts, THREADS, unroll=1):
                begin = self.whole_before(ends, batch, part, cuts, carry)
                end = self.whole_before(ends, batch, part + 1, cuts, carry)
                if begin < end:
                    low = ends[begin - 1] if begin > 0 else Int32(0)
                    load = ends[end - 1] - low
                    busiest = load if load > busiest else busiest
            busiest = self.largest(busiest, totals)
            is_whole = busiest <= share + overhead + merge

        # 3. pieces of each request
        if tid == 0:
            num_splits[0] = Int32(0)
        if chunk_blocks > 0 or is_whole:
            for index in cutlass.range(tid, batch, THREADS, unroll=1):
                num_splits[index + 1] = index + 1 if is_whole else ends[index]
        else:
            total = Int32(0)
            for base in cutlass.range(0, batch, THREADS, unroll=1):
                index = base + tid
                pieces = Int32(0)
                if index < batch:
                    pieces = Int32(1)
                    count = blocks[index]
                    if count > 0:
                        begin = ends[index] - count
                        pieces = (
                            self.cuts_before(begin + count, overhead, cuts, line)
                            - self.cuts_before(begin + 1, overhead, cuts, line)
                            + 1
                        )
                running = self.scan(pieces, totals) + total
                if index < batch:
                    num_splits[index + 1] = running
                if tid == THREADS - 1:
                    carry_box[0] = running
                cute.arch.sync_threads()
                total = carry_box[0]

        # 4. the parts
        for part in cutlass.range(tid, num_parts, THREADS, unroll=1):
            begin_request = Int32(0)
            end_request = Int32(-1)
            begin_block = Int32(0)
            end_block = Int32(0)
            begin_split = Int32(0)
            if is_whole:
                begin = part
                end = part + 1 if part < batch else batch
                if not is_one_each:
                    begin = self.whole_before(ends, batch, part, cuts, carry)
                    end = self.whole_before(ends, batch, part + 1, cuts, carry)
                if begin < end:
                    begin_request = begin
                    end_request = end - 1
                    end_block = blocks[end_request]
            else:
                low = Int32(0)
                high = Int32(0)
                if chunk_blocks > 0:
                    low = Int32(Int64(part) * Int64(carry) // Int64(num_parts))
                    high = Int32(Int64(part + 1) * Int64(carry) // Int64(num_parts))
                elif part < cuts:
                    low = overhead + Int32(Int64(part) * Int64(line) // Int64(cuts))
                    low = low if part > 0 else Int32(0)
                    high = overhead + Int32(Int64(part + 1) * Int64(line) // Int64(cuts))
                if low < high:
                    # begin: the first request whose last unit is at or behind `low`
                    left = Int32(0)
                    right = batch
                    while left < right:
                        middle = (left + right) // 2
                        last = ends[middle] - 1
                        if chunk_blocks == 0:
                            count = blocks[middle]
                            width = count if count > 1 else Int32(1)
                            last = self.first_of(ends[middle], count, overhead) + width - 1
                        if last < low:
                            left = middle + 1
                        else:
                            right = middle
                    begin_request = left
                    # end: the last request whose first unit is before `high`
                    left = Int32(0)
                    right = batch
                    while left < right:
                        middle = (left + right) // 2
                        begin = Int32(0)
                        if chunk_blocks == 0:
                            begin = self.first_of(ends[middle], blocks[middle], overhead)
                        elif middle > 0:
                            begin = ends[middle - 1]
                        if begin < high:
                            left = middle + 1
                        else:
                            right = middle
                    end_request = left - 1
                    if begin_request <= end_request:
                        if chunk_blocks > 0:
                            base = ends[begin_request - 1] if begin_request > 0 else Int32(0)
                            begin_split = low - base
                            begin_block = begin_split * chunk_blocks
                            base = ends[end_request - 1] if end_request > 0 else Int32(0)
                            end_block = (high - base) * chunk_blocks
                        else:
                            first = self.first_of(ends[begin_request], blocks[begin_request], overhead)
                            if low > first:
                                begin_block = low - first
                                begin_split = part - self.cuts_before(first + 1, overhead, cuts, line) + 1
                            end_block = high - self.first_of(ends[end_request], blocks[end_request], overhead)
                        count = blocks[end_request]
                        end_block = end_block if end_block < count else count
                    else:
                        begin_request = Int32(0)
                        end_request = Int32(-1)
            metadata[part, 0] = begin_request
            metadata[part, 1] = end_request
            metadata[part, 2] = begin_block
            metadata[part, 3] = end_block
            metadata[part, 4] = begin_split
            for spare in (5, 6, 7):
                metadata[part, spare] = Int32(0)


def fake_arguments() -> list[Any]:
    """Arguments for `toolchain.compile_kernel(DecodePlan(), ...)`."""
    from openmla.backends.cute.toolchain import fake_stream, fake_tensor

    return [
        fake_tensor(Int32, (None,), align=4),
        fake_tensor(Int32, (None, 8), align=16),
        fake_tensor(Int32, (None,), align=4),
        fake_tensor(Int32, (1,), align=4),
        Int32(64), Int32(64), Int32(5), Int32(5), Int32(1), Int32(0),
        fake_stream(),
    ]  # fmt: skip
