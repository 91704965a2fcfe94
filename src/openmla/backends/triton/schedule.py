"""`openmla.split.schedule.plan_decode` on the device: no host sync, safe inside a CUDA graph, the same plan.

A part's cuts have a closed form once the length of the whole line is known, so no program waits for another: each walks
over the lengths, 1024 requests at a time: once for the line, once for the busiest part if requests stayed whole (where
the longest request allows that), once to see which requests its own cuts hit.
Program p < num_parts writes row p of the metadata, program num_parts writes num_splits. Lengths are clamped here and
reported by the decode kernel.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

REQUESTS = tl.constexpr(1024)  # per step


@triton.jit
def load_blocks(seqlens_ptr, base, batch, capacity, BLOCK_TOKENS: tl.constexpr):
    """(request, exists, KV blocks) of REQUESTS requests, int32."""
    request = base + tl.arange(0, REQUESTS)
    exists = (request >= 0) & (request < batch)
    length = tl.load(seqlens_ptr + request, mask=exists, other=0)
    length = tl.minimum(tl.maximum(length, 0), capacity)
    return request, exists, (length + BLOCK_TOKENS - 1) // BLOCK_TOKENS


@triton.jit
def line_width(blocks, exists, chunk_blocks, overhead):
    """Units of the line that each request takes, int64: blocks with their head, or chunks; at least 1."""
    units = blocks + overhead
    if chunk_blocks > 0:
        units = (blocks + chunk_blocks - 1) // chunk_blocks
    return tl.where(exists, tl.maximum(units, 1), 0).to(tl.int64)


@triton.jit
def place_on_line(blocks, end, width, chunk_blocks, overhead):
    """(first, last) line position of a request's blocks (chunks), or of the piece that an empty request is."""
    if chunk_blocks > 0:
        first = end - width
        last = end - 1
    else:
        first = end - tl.where(blocks > 0, blocks, tl.maximum(overhead, 1))
        last = first + tl.maximum(blocks, 1) - 1
    return first, last


@triton.jit
def cuts_before(position, overhead, cuts, line):
    """How many of the cuts 0, 1, ... lie before a position that is past the first head."""
    return ((position - overhead) * cuts + line - 1) // line


@triton.jit
def part_of_whole(middle, cuts, line):
    """The part that takes a request when none is split: the one in which its middle lies. middle: begin + end."""
    return tl.minimum(middle * cuts // (2 * line), cuts - 1)


@triton.jit
def larger(a, b):
    """Maximum, for scans."""
    return tl.maximum(a, b)


@triton.jit
def busiest_of_whole(seqlens_ptr, batch, capacity, overhead, cuts, line, BLOCK_TOKENS: tl.constexpr):
    """Units of the busiest part when no request is split: the furthest end of a request behind its part's begin."""
    carry = tl.zeros((), tl.int64)
    part_begin = tl.zeros((), tl.int64)
    busiest = tl.zeros((), tl.int64)
    for base in range(0, batch, REQUESTS):
        _, exists, blocks = load_blocks(seqlens_ptr, base, batch, capacity, BLOCK_TOKENS)
        _, had, blocks_before = load_blocks(seqlens_ptr, base - 1, batch, capacity, BLOCK_TOKENS)
        width = line_width(blocks, exists, 0, overhead)
        width_before = line_width(blocks_before, had, 0, overhead)
        end = carry + tl.cumsum(width, 0)
        begin = end - width
        is_first = part_of_whole(begin + end, cuts, line) != part_of_whole(2 * begin - width_before, cuts, line)
        begins = tl.associative_scan(tl.where(is_first & exists, begin, part_begin), 0, larger)
        busiest = tl.maximum(busiest, tl.max(tl.where(exists, end - begins, 0), 0))
        part_begin = tl.max(begins, 0)
        carry += tl.sum(width, 0)
    return busiest


@triton.jit
def requests_of_whole(seqlens_ptr, batch, capacity, overhead, part, cuts, line, BLOCK_TOKENS: tl.constexpr):
    """(first request, last request) of a part when no request is split."""
    carry = tl.zeros((), tl.int64)
    begin_request = tl.zeros((), tl.int32)
    end_request = tl.zeros((), tl.int32) - 1
    for base in range(0, batch, REQUESTS):
        _, exists, blocks = load_blocks(seqlens_ptr, base, batch, capacity, BLOCK_TOKENS)
        width = line_width(blocks, exists, 0, overhead)
        end = carry + tl.cumsum(width, 0)
        owner = part_of_whole(2 * end - width, cuts, line)
        begin_request += tl.sum((exists & (owner < part)).to(tl.int32), 0)
        end_request += tl.sum((exists & (owner <= part)).to(tl.int32), 0)
        carry += tl.sum(width, 0)
    return begin_request, end_request


@triton.jit
def write_num_splits(
    seqlens_ptr, num_splits_ptr, batch, capacity, chunk_blocks, overhead, cuts, line, is_whole,
    BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """The prefix sum of pieces per request."""
    tl.store(num_splits_ptr, 0)
    carry = tl.zeros((), tl.int64)
    total = tl.zeros((), tl.int64)
    for base in range(0, batch, REQUESTS):
        request, exists, blocks = load_blocks(seqlens_ptr, base, batch, capacity, BLOCK_TOKENS)
        width = line_width(blocks, exists, chunk_blocks, overhead)
        end = carry + tl.cumsum(width, 0)
        first, _ = place_on_line(blocks, end, width, chunk_blocks, overhead)
        if chunk_blocks > 0:
            pieces = width
        else:
            crossed = cuts_before(first + blocks, overhead, cuts, line) - cuts_before(first + 1, overhead, cuts, line)
            pieces = tl.where(is_whole | (blocks == 0), 1, crossed + 1)
        pieces = tl.where(exists, pieces, 0)
        tl.store(num_splits_ptr + request + 1, (total + tl.cumsum(pieces, 0)).to(tl.int32), mask=exists)
        carry += tl.sum(width, 0)
        total += tl.sum(pieces, 0)


@triton.jit
def find_part(
    seqlens_ptr, batch, capacity, chunk_blocks, overhead, low, high, BLOCK_TOKENS: tl.constexpr
):  # fmt: skip
    """(begin request, its first position, end request, its first position) of the stretch [low, high) of the line."""
    carry = tl.zeros((), tl.int64)
    begin_request = tl.zeros((), tl.int32)
    end_request = tl.zeros((), tl.int32) - 1
    begin_first = tl.full((), 0x7FFFFFFFFFFFFFFF, tl.int64)
    end_first = tl.full((), -1, tl.int64)
    for base in range(0, batch, REQUESTS):
        _, exists, blocks = load_blocks(seqlens_ptr, base, batch, capacity, BLOCK_TOKENS)
        width = line_width(blocks, exists, chunk_blocks, overhead)
        first, last = place_on_line(blocks, carry + tl.cumsum(width, 0), width, chunk_blocks, overhead)
        is_before = exists & (last < low)
        is_begun = exists & (first < high)
        begin_request += tl.sum(is_before.to(tl.int32), 0)
        end_request += tl.sum(is_begun.to(tl.int32), 0)
        begin_first = tl.minimum(begin_first, tl.min(tl.where(exists & ~is_before, first, 0x7FFFFFFFFFFFFFFF), 0))
        end_first = tl.maximum(end_first, tl.max(tl.where(is_begun, first, -1), 0))
        carry += tl.sum(width, 0)
    return begin_request, begin_first, end_request, end_first


@triton.jit(do_not_specialize=["batch", "num_parts", "capacity", "chunk_blocks", "overhead", "merge", "min_share"])
def plan_kernel(
    seqlens_ptr,  # [batch] int32
    metadata_ptr,  # [num_parts, 8] int32, written
    num_splits_ptr,  # [batch + 1] int32, written
    batch, num_parts, capacity, chunk_blocks, overhead, merge, min_share,
    BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """See the module; arguments as in `plan_decode`, chunk_blocks 0 selects `balanced`."""
    part = tl.program_id(0).to(tl.int64)
    total = tl.zeros((), tl.int64)
    longest = tl.zeros((), tl.int32)
    for base in range(0, batch, REQUESTS):
        _, exists, blocks = load_blocks(seqlens_ptr, base, batch, capacity, BLOCK_TOKENS)
        total += tl.sum(line_width(blocks, exists, chunk_blocks, overhead), 0)
        longest = tl.maximum(longest, tl.max(blocks, 0))
    line = total - overhead  # without the first head
    cuts = tl.minimum(num_parts, tl.maximum(line // min_share, 1))
    share = (line + cuts - 1) // cuts
    is_one_each = batch <= num_parts
    is_whole = (chunk_blocks == 0) & (longest <= share + tl.where(is_one_each, overhead, merge))
    if is_whole & (batch > num_parts):
        busiest = busiest_of_whole(seqlens_ptr, batch, capacity, overhead, cuts, total, BLOCK_TOKENS)
        is_whole = busiest <= share + overhead + merge
    line = tl.maximum(line, 1)
    if part == num_parts:
        write_num_splits(
            seqlens_ptr, num_splits_ptr, batch, capacity, chunk_blocks, overhead, cuts, line, is_whole, BLOCK_TOKENS
        )  # fmt: skip
    else:
        if chunk_blocks > 0:
            low, high = part * total // num_parts, (part + 1) * total // num_parts
        else:
            low = tl.where(part == 0, 0, overhead + part * line // cuts)
            high = tl.where(part < cuts, overhead + (part + 1) * line // cuts, low)
        begin_request, begin_first, end_request, end_first = find_part(
            seqlens_ptr, batch, capacity, chunk_blocks, overhead, low, high, BLOCK_TOKENS
        )  # fmt: skip
        if is_whole:
            if is_one_each:
                begin_request, end_request = part.to(tl.int32), part.to(tl.int32)
            else:
                begin_request, end_request = requests_of_whole(
                    seqlens_ptr, batch, capacity, overhead, part, cuts, total, BLOCK_TOKENS
                )  # fmt: skip
        is_empty = (begin_request > end_request) | (begin_request >= batch) | ((low >= high) & ~is_whole)
        length = tl.load(seqlens_ptr + end_request, mask=~is_empty, other=0)
        blocks = (tl.minimum(tl.maximum(length, 0), capacity) + BLOCK_TOKENS - 1) // BLOCK_TOKENS
        skipped = tl.maximum(low - begin_first, 0)
        if chunk_blocks > 0:
            begin_block, split = skipped * chunk_blocks, skipped
            end_block = (high - end_first) * chunk_blocks
        else:
            begin_block = skipped
            split = tl.where(skipped > 0, part - cuts_before(begin_first + 1, overhead, cuts, line) + 1, 0)
            end_block = high - end_first
        begin_block = tl.where(is_whole | is_empty, 0, begin_block)
        split = tl.where(is_whole | is_empty, 0, split)
        end_block = tl.where(is_whole, blocks, tl.minimum(end_block, blocks))
        row = metadata_ptr + part * 8
        tl.store(row, tl.where(is_empty, 0, begin_request))
        tl.store(row + 1, tl.where(is_empty, -1, end_request))
        tl.store(row + 2, begin_block.to(tl.int32))
        tl.store(row + 3, tl.where(is_empty, 0, end_block).to(tl.int32))
        tl.store(row + 4, split.to(tl.int32))
        tl.store(row + 5 + tl.arange(0, 4), 0, mask=tl.arange(0, 4) < 3)
