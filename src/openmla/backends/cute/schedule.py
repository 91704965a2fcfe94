"""`openmla.split.schedule.plan_decode` on the device: one CTA, no host sync, safe inside a CUDA graph.

The work is prefix sums over requests, a sort and a closed form per part. Results are identical, field by field:

    1. lengths -> blocks (clamped to the capacity of the block table, faults reported), widths, their prefix sum and
       maximum: a scan over warps, 512 requests at a time, kept in shared memory (at most `MAX_BATCH` requests);
    2. what dealing whole requests, and requests cut where they are long, would cost: last pieces sorted by length, then
       one thread per part adds up what it would get;
    3. the cheapest: pieces per request and their prefix sum -> num_splits; one thread per piece or, for even cuts, one
       thread per part with its two cuts, the requests that hold them, its first split.

Outputs are read by the kernels of every layer until the lengths change: `metadata` int32 [ranges, num_parts, 8] and
`num_splits` int32 [batch + 1], as in `openmla.split.schedule` with `ranges`.
"""

from __future__ import annotations

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr

THREADS = 512
WARPS = THREADS // 32
MAX_BATCH, BATCH_LOG2 = 4096, 12  # three int32 arrays of it in shared memory; a key of the sort holds a request
LONGEST_SORTED = 2**19 - 1  # as in the Python function
TWICE_BLOCKS = 2  # likewise

LENGTH_NEGATIVE = 2
LENGTH_OVER_CAPACITY = 4


class DecodePlan:
    """The launch. Arguments are those of `plan_decode`; `chunk_blocks` 0 selects `balanced`, else `batch_invariant`.

    Parts are at most as many as threads.
    """

    smem_bytes = 3 * MAX_BATCH * 4 + 2 * WARPS * 4

    @cute.jit
    def __call__(
        self,
        cache_seqlens: cute.Tensor,  # int32 [batch]
        metadata: cute.Tensor,  # int32 [ranges, num_parts, 8], written
        num_splits: cute.Tensor,  # int32 [batch + 1], written
        fault_word: cute.Tensor,  # int32 [1], bits are OR-ed in
        capacity: Int32,  # tokens that the block table can address
        block_tokens: Int32,
        overhead: Int32,
        merge: Int32,
        min_share: Int32,
        chunk_blocks: Int32,
        margin: Int32,
        merge_from: Int32,
        stream: cuda.CUstream,
    ):
        """Write `metadata` and `num_splits`."""
        self.kernel(
            cache_seqlens, metadata, num_splits, fault_word, capacity, block_tokens, overhead, merge, min_share,
            chunk_blocks, margin, merge_from,
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
    def last_of(self, count: Int32, chunk: Int32) -> Int32:
        """Blocks of a request's last piece."""
        whole = (count - 1) // chunk if count > 0 else Int32(0)
        return count - whole * chunk

    @cute.jit
    def pieces_of(self, blocks: cute.Tensor, batch: Int32, chunk: Int32, totals: cute.Tensor):
        """(pieces before the last ones, pieces of requests with several) of a batch cut at multiples of `chunk`."""
        whole, split = Int32(0), Int32(0)
        for index in cutlass.range(cute.arch.thread_idx()[0], batch, THREADS, unroll=1):
            count = blocks[index]
            mine = (count - 1) // chunk if count > 0 else Int32(0)
            whole += mine
            split += mine + 1 if mine > 0 else Int32(0)
        return self.sum_of(whole, totals), self.sum_of(split, totals)

    @cute.jit
    def one_each(
        self, blocks: cute.Tensor, batch: Int32, longest: Int32, num_parts: Int32, min_share: Int32, totals: cute.Tensor
    ) -> Int32:
        """The shortest length to cut requests at, from `min_share` on, that gives no part two pieces."""
        low = min_share
        high = longest if longest > 1 else Int32(1)
        while low < high:
            middle = (low + high) // 2
            whole, _ = self.pieces_of(blocks, batch, middle, totals)
            if batch + whole <= num_parts:
                high = middle
            else:
                low = middle + 1
        return low

    @cute.jit
    def sum_of(self, value: Int32, totals: cute.Tensor) -> Int32:
        """Sum over the CTA."""
        lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
        for step in (1, 2, 4, 8, 16):
            value = value + cute.arch.shuffle_sync_bfly(value, step)
        cute.arch.sync_threads()
        if lane == 0:
            totals[warp] = value
        cute.arch.sync_threads()
        value = Int32(0)
        for w in cutlass.range_constexpr(WARPS):
            value = value + totals[w]
        return value

    @cute.jit
    def sort(self, blocks: cute.Tensor, keys: cute.Tensor, batch: Int32, chunk: Int32):
        """Requests by their last pieces, longest first, then as they come: a bitonic sort of (length, request).

        Exchanges of less than 32 places are shuffles; the others, six for 1,024 requests, need a barrier each.
        """
        tid, _, _ = cute.arch.thread_idx()
        size = Int32(32)
        while size < batch:
            size *= 2
        cute.arch.sync_threads()  # everybody is done with the sort before
        for index in cutlass.range(tid, size, THREADS, unroll=1):
            key = Int32(-1)
            if index < batch:
                last = self.last_of(blocks[index], chunk)
                last = last if last < LONGEST_SORTED else Int32(LONGEST_SORTED)
                key = (last << BATCH_LOG2) | (MAX_BATCH - 1 - index)
            for width in (2, 4, 8, 16, 32):
                key = self.exchange(key, index, width, width // 2)
            keys[index] = key
        cute.arch.sync_threads()
        width = Int32(64)
        while width <= size:
            step = width // 2
            while step >= 32:
                for index in cutlass.range(tid, size // 2, THREADS, unroll=1):
                    low = (index & ~(step - 1)) * 2 + (index & step - 1)
                    one, other = keys[low], keys[low + step]
                    if (one < other) == ((low & width) == 0):
                        keys[low] = other
                        keys[low + step] = one
                cute.arch.sync_threads()
                step = step // 2
            for index in cutlass.range(tid, size, THREADS, unroll=1):
                keys[index] = self.exchange(keys[index], index, width, 16)
            cute.arch.sync_threads()
            width = width * 2

    @cute.jit
    def exchange(self, key: Int32, index: Int32, width: Int32, step: cutlass.Constexpr) -> Int32:
        """The steps from `step` on of the merge of `width` keys, within a warp."""
        for distance in (16, 8, 4, 2, 1):
            if const_expr(distance <= step):
                other = cute.arch.shuffle_sync_bfly(key, distance)
                is_larger_wanted = ((index & distance) == 0) == ((index & width) == 0)
                key = other if (other > key) == is_larger_wanted else key
        return key

    @cute.jit
    def seat(self, rank: Int32, num_parts: Int32):
        """(row, part) of the piece that comes as number `rank`: there and back again over the parts."""
        row = rank // num_parts
        place = rank - row * num_parts
        return row, num_parts - 1 - place if row & 1 != 0 else place

    @cute.jit
    def busiest(
        self, blocks: cute.Tensor, keys: cute.Tensor, batch: Int32, whole: Int32, chunk: Int32, num_parts: Int32,
        overhead: Int32, totals: cute.Tensor,
    ) -> Int32:  # fmt: skip
        """Cost of the busiest part when `whole` chunks and then the last pieces of requests are dealt."""
        tid, _, _ = cute.arch.thread_idx()
        load = Int32(0)
        if tid < num_parts:
            row = whole // num_parts
            load = row * (chunk + overhead)
            rank = Int32(0)
            while rank < whole + batch:
                _, place = self.seat(row * num_parts + tid, num_parts)  # its own inverse within a row
                rank = row * num_parts + place
                if rank < whole:
                    load += chunk + overhead
                elif rank < whole + batch:
                    request = MAX_BATCH - 1 - (keys[rank - whole] & MAX_BATCH - 1)
                    load += self.last_of(blocks[request], chunk) + overhead
                row += 1
                rank = row * num_parts
        return self.largest(load, totals)

    @cute.jit
    def write(
        self, metadata: cute.Tensor, row: Int32, part: Int32, begin_request: Int32, end_request: Int32, begin: Int32,
        end: Int32, split: Int32,
    ):  # fmt: skip
        """One range."""
        line = metadata[row, part, None]
        line[0], line[1], line[2], line[3], line[4] = begin_request, end_request, begin, end, split
        for spare in (5, 6, 7):
            line[spare] = Int32(0)

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
        margin: Int32,
        merge_from: Int32,
    ):
        """The steps of the module docstring, one after the other."""
        tid, _, _ = cute.arch.thread_idx()
        batch = cute.size(cache_seqlens)
        ranges, num_parts = metadata.shape[0], metadata.shape[1]
        smem = cutlass.memory.SmemAllocator()
        ends = smem.allocate_tensor(Int32, cute.make_layout(MAX_BATCH), 16)
        blocks = smem.allocate_tensor(Int32, cute.make_layout(MAX_BATCH), 16)
        keys = smem.allocate_tensor(Int32, cute.make_layout(MAX_BATCH), 16)
        totals = smem.allocate_tensor(Int32, cute.make_layout(WARPS), 16)
        carry_box = smem.allocate_tensor(Int32, cute.make_layout(1), 16)

        # 1. blocks and line ends
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

        # 2. the cheapest chunk to deal, or none; costs in units of 1 / pieces of a block, as even cuts make `most`
        line = carry - overhead  # without the first head
        wanted = line // min_share
        wanted = wanted if wanted > 1 else Int32(1)
        cuts = wanted if wanted < num_parts else num_parts
        chunk, sorted_for = chunk_blocks, Int32(0)
        if chunk_blocks == 0:
            most = batch + num_parts
            merging = merge if batch >= merge_from else overhead
            each = most // (2 * num_parts)
            each = each if each > 1 else Int32(1)
            share = (carry + num_parts - 1) // num_parts
            twice = Int32(TWICE_BLOCKS) if (2 * batch < num_parts) & (merge > overhead) else Int32(0)
            least = Int64((line + cuts - 1) // cuts + overhead + merging + twice) * Int64(most)
            room = most if most < ranges * num_parts else ranges * num_parts
            for attempt in cutlass.range(2, unroll=1):
                tried = longest
                if attempt > 0:
                    tried = Int32(Int64(share) * Int64(1000 + margin) // Int64(1000 * each)) - overhead
                    if 2 * batch < num_parts:
                        tried = self.one_each(blocks, batch, longest, num_parts, min_share, totals)
                tried = tried if tried > 1 else Int32(1)
                whole, split = self.pieces_of(blocks, batch, tried, totals)
                some = tried if (attempt == 0) | (whole > 0) else Int32(0)  # the longest piece, if it is known
                if (batch + whole <= room) & (Int64(some + overhead) * Int64(most) <= least):
                    sorted_for = tried
                    self.sort(blocks, keys, batch, tried)
                    load = self.busiest(blocks, keys, batch, whole, tried, num_parts, overhead, totals)
                    cost = Int64(load) * Int64(most) + Int64(merging) * Int64(split)
                    if (cost < least) | ((cost == least) & (chunk == 0)):
                        least = cost
                        chunk = tried

        # 3. the plan
        if tid == 0:
            num_splits[0] = Int32(0)
        if chunk > 0:
            if sorted_for != chunk:
                self.sort(blocks, keys, batch, chunk)
            self.deal(blocks, keys, totals, carry_box, metadata, num_splits, batch, chunk)
        else:
            self.cut_evenly(blocks, ends, totals, carry_box, metadata, num_splits, batch, overhead, cuts, line)

    @cute.jit
    def deal(
        self, blocks: cute.Tensor, keys: cute.Tensor, totals: cute.Tensor, carry_box: cute.Tensor, metadata: cute.Tensor,
        num_splits: cute.Tensor, batch: Int32, chunk: Int32,
    ):  # fmt: skip
        """Whole chunks as they come, then the last pieces as `keys` has them, longest first."""
        tid, _, _ = cute.arch.thread_idx()
        ranges, num_parts = metadata.shape[0], metadata.shape[1]
        seats = ranges * num_parts
        total = Int32(0)
        for base in cutlass.range(0, batch, THREADS, unroll=1):
            index = base + tid
            count, whole, pieces = Int32(0), Int32(0), Int32(0)
            if index < batch:
                count = blocks[index]
                whole = (count - 1) // chunk if count > 0 else Int32(0)
                pieces = whole + 1
            running = self.scan(pieces, totals) + total
            if index < batch:
                num_splits[index + 1] = running
                for i in cutlass.range(whole, unroll=1):
                    rank = running - pieces - index + i  # every request before has one piece that comes later
                    if rank < seats:
                        row, part = self.seat(rank, num_parts)
                        self.write(metadata, row, part, index, index, i * chunk, (i + 1) * chunk, i)
            if tid == THREADS - 1:
                carry_box[0] = running
            cute.arch.sync_threads()
            total = carry_box[0]
        for index in cutlass.range(tid, batch, THREADS, unroll=1):
            request = MAX_BATCH - 1 - (keys[index] & MAX_BATCH - 1)
            count = blocks[request]
            split = (count - 1) // chunk if count > 0 else Int32(0)
            rank = total - batch + index
            if rank < seats:
                row, part = self.seat(rank, num_parts)
                self.write(metadata, row, part, request, request, split * chunk, count, split)
        for rank in cutlass.range(total + tid, seats, THREADS, unroll=1):
            row, part = self.seat(rank, num_parts)
            self.write(metadata, row, part, Int32(0), Int32(-1), Int32(0), Int32(0), Int32(0))

    @cute.jit
    def cut_evenly(
        self, blocks: cute.Tensor, ends: cute.Tensor, totals: cute.Tensor, carry_box: cute.Tensor, metadata: cute.Tensor,
        num_splits: cute.Tensor, batch: Int32, overhead: Int32, cuts: Int32, line: Int32,
    ):  # fmt: skip
        """One stretch of the line per part."""
        tid, _, _ = cute.arch.thread_idx()
        num_parts = metadata.shape[1]
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
        for seat in cutlass.range(num_parts + tid, metadata.shape[0] * num_parts, THREADS, unroll=1):
            row = seat // num_parts
            self.write(
                metadata, row, seat - row * num_parts, Int32(0), Int32(-1), Int32(0), Int32(0), Int32(0)
            )  # fmt: skip
        for part in cutlass.range(tid, num_parts, THREADS, unroll=1):
            begin_request, end_request = Int32(0), Int32(-1)
            begin_block, end_block, begin_split = Int32(0), Int32(0), Int32(0)
            if part < cuts:
                low = overhead + Int32(Int64(part) * Int64(line) // Int64(cuts))
                low = low if part > 0 else Int32(0)
                high = overhead + Int32(Int64(part + 1) * Int64(line) // Int64(cuts))
                if low < high:
                    # begin: the first request whose last unit is at or behind `low`
                    left = Int32(0)
                    right = batch
                    while left < right:
                        middle = (left + right) // 2
                        count = blocks[middle]
                        width = count if count > 1 else Int32(1)
                        if self.first_of(ends[middle], count, overhead) + width - 1 < low:
                            left = middle + 1
                        else:
                            right = middle
                    begin_request = left
                    # end: the last request whose first unit is before `high`
                    left = Int32(0)
                    right = batch
                    while left < right:
                        middle = (left + right) // 2
                        if self.first_of(ends[middle], blocks[middle], overhead) < high:
                            left = middle + 1
                        else:
                            right = middle
                    end_request = left - 1
                    if begin_request <= end_request:
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
            self.write(metadata, Int32(0), part, begin_request, end_request, begin_block, end_block, begin_split)


def fake_arguments() -> list[Any]:
    """Arguments for `toolchain.compile_kernel(DecodePlan(), ...)`."""
    from openmla.backends.cute.toolchain import fake_stream, fake_tensor

    return [
        fake_tensor(Int32, (None,), align=4),
        fake_tensor(Int32, (None, None, 8), align=16),
        fake_tensor(Int32, (None,), align=4),
        fake_tensor(Int32, (1,), align=4),
        Int32(64), Int32(64), Int32(5), Int32(5), Int32(1), Int32(0), Int32(75), Int32(2),
        fake_stream(),
    ]  # fmt: skip
