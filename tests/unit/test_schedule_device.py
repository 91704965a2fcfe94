"""The device plan's algorithm, emulated step by step, gives what `plan_decode` gives.

The emulation keeps the kernel's structure: warps of 32 scan by shuffles, 512 requests at a time with a carry, closed
forms in 64-bit integers, two binary searches per part. It differs from the kernel in language, and in how it sorts.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openmla.split.schedule import TWICE_BLOCKS, plan_decode, ranges_needed

THREADS, LANES = 512, 32


def warp_scan(values: list[int]) -> list[int]:
    """Inclusive prefix sum of one warp by five shuffles upwards."""
    for step in (1, 2, 4, 8, 16):
        values = [x + values[lane - step] if lane >= step else x for lane, x in enumerate(values)]
    return values


def cta_scan(values: list[int]) -> list[int]:
    """Inclusive prefix sum over the CTA: warps first, then the totals of the warps below."""
    warps = [warp_scan(values[at : at + LANES]) for at in range(0, len(values), LANES)]
    totals = [warp[-1] for warp in warps]
    return [x + sum(totals[:index]) for index, warp in enumerate(warps) for x in warp]


def scan_in_rounds(values: list[int]) -> list[int]:
    """Any number of values, 512 at a time; the last thread hands on the carry."""
    out: list[int] = []
    carry = 0
    for at in range(0, len(values), THREADS):
        chunk = values[at : at + THREADS]
        scanned = cta_scan(chunk + [0] * (-len(chunk) % LANES))  # idle warps would add zeros
        out += [x + carry for x in scanned[: len(chunk)]]
        carry += scanned[-1]
    return out


def search(batch: int, is_before) -> int:
    """How many leading requests satisfy a monotone predicate."""
    left, right = 0, batch
    while left < right:
        middle = (left + right) // 2
        if is_before(middle):
            left = middle + 1
        else:
            right = middle
    return left


def last_of(count: int, chunk: int) -> int:
    return count - max(count - 1, 0) // chunk * chunk


def sorted_keys(blocks: list[int], chunk: int) -> list[int]:
    """A length and a request in 31 bits."""
    keys = [min(last_of(count, chunk), 2**19 - 1) << 12 | 4095 - index for index, count in enumerate(blocks)]
    assert all(0 <= key < 2**31 for key in keys)
    return sorted(keys, reverse=True)


def seat(rank: int, num_parts: int) -> tuple[int, int]:
    row = rank // num_parts
    place = rank - row * num_parts
    return row, num_parts - 1 - place if row & 1 else place


def busiest(blocks, whole, chunk, num_parts, overhead):
    """One thread per part, from the row that holds the last whole chunks on."""
    keys, loads = sorted_keys(blocks, chunk), []
    for part in range(num_parts):
        row, rank = whole // num_parts, 0
        load = row * (chunk + overhead)
        while rank < whole + len(blocks):
            rank = row * num_parts + seat(row * num_parts + part, num_parts)[1]
            if rank < whole:
                load += chunk + overhead
            elif rank < whole + len(blocks):
                load += last_of(blocks[4095 - (keys[rank - whole] & 4095)], chunk) + overhead
            row += 1
            rank = row * num_parts
        loads.append(load)
    return max(loads)


def choose(blocks, ends, num_parts, ranges, overhead, merge, cuts, min_share, margin, merge_from):
    """The chunk to deal, 0 for even cuts."""
    batch, carry, chosen = len(blocks), ends[-1], 0
    most = batch + num_parts
    merging = merge if batch >= merge_from else overhead
    each = max(most // (2 * num_parts), 1)
    share = (carry + num_parts - 1) // num_parts
    twice = TWICE_BLOCKS if 2 * batch < num_parts and merge > overhead else 0
    least = ((carry - overhead + cuts - 1) // cuts + overhead + merging + twice) * most
    for attempt in range(2):
        tried = max(blocks) if attempt == 0 else share * (1000 + margin) // (1000 * each) - overhead
        if attempt == 1 and 2 * batch < num_parts:
            tried, high = min_share, max(blocks)
            while tried < high:
                middle = (tried + high) // 2
                if batch + sum((count - 1) // middle for count in blocks if count > 0) <= num_parts:
                    high = middle
                else:
                    tried = middle + 1
        tried = max(tried, 1)
        mine = [(count - 1) // tried if count > 0 else 0 for count in blocks]
        whole, split = sum(mine), sum(count + 1 for count in mine if count > 0)
        some = tried if attempt == 0 or whole > 0 else 0
        if batch + whole <= min(most, ranges * num_parts) and (some + overhead) * most <= least:
            cost = busiest(blocks, whole, tried, num_parts, overhead) * most + merging * split
            if cost < least or (cost == least and chosen == 0):
                least, chosen = cost, tried
    return chosen


def deal(blocks, chunk, num_parts, ranges):
    rows = [[0, -1, 0, 0, 0]] * (ranges * num_parts)
    mine = [(count - 1) // chunk if count > 0 else 0 for count in blocks]
    running = scan_in_rounds([count + 1 for count in mine])

    def write(rank, *row):
        at, part = seat(rank, num_parts)
        rows[at * num_parts + part] = list(row)

    for index, count in enumerate(mine):
        for i in range(count):
            write(running[index] - (count + 1) - index + i, index, index, i * chunk, (i + 1) * chunk, i)
    for at, key in enumerate(sorted_keys(blocks, chunk)[: len(blocks)]):
        index = 4095 - (key & 4095)
        write(running[-1] - len(blocks) + at, index, index, mine[index] * chunk, blocks[index], mine[index])
    return rows, [0, *running]


def emulate(
    lengths, num_parts, *, capacity, block_tokens, overhead, merge, min_share, chunk_blocks, ranges, margin, merge_from
):
    """(metadata rows, num_splits, faults) as the kernel computes them."""
    batch, faults = len(lengths), 0
    blocks, widths = [], []
    for length in lengths:
        if length < 0:
            length, faults = 0, faults | 2
        if length > capacity:
            length, faults = capacity, faults | 4
        count = (length + block_tokens - 1) // block_tokens
        blocks.append(count)
        widths.append(max(count + overhead, 1))
    ends = scan_in_rounds(widths)
    line = ends[-1] - overhead
    cuts = min(max(line // min_share, 1), num_parts)
    chunk = chunk_blocks or choose(
        blocks, ends, num_parts, ranges, overhead, merge, cuts, min_share, margin, merge_from or num_parts + 1
    )
    if chunk > 0:
        return *deal(blocks, chunk, num_parts, ranges), faults

    def cuts_before(position):
        return ((position - overhead) * cuts + line - 1) // line

    def first_of(request):
        return ends[request] - (blocks[request] or max(overhead, 1))

    pieces = []
    for request, count in enumerate(blocks):
        begin = ends[request] - count
        pieces.append(cuts_before(begin + count) - cuts_before(begin + 1) + 1 if count else 1)
    num_splits = [0, *scan_in_rounds(pieces)]
    rows = [[0, -1, 0, 0, 0] for _ in range(ranges * num_parts)]
    for part in range(cuts):
        low = overhead + part * line // cuts if part > 0 else 0
        high = overhead + (part + 1) * line // cuts
        if low < high:
            begin_request = search(batch, lambda r, low=low: first_of(r) + max(blocks[r], 1) - 1 < low)
            end_request = search(batch, lambda r, high=high: first_of(r) < high) - 1
            if begin_request <= end_request:
                first, begin_block, begin_split = first_of(begin_request), 0, 0
                if low > first:
                    begin_block, begin_split = low - first, part - cuts_before(first + 1) + 1
                end_block = min(high - first_of(end_request), blocks[end_request])
                rows[part] = [begin_request, end_request, begin_block, end_block, begin_split]
    return rows, num_splits, faults


LENGTHS = st.one_of(
    st.lists(st.one_of(st.just(0), st.integers(-3, 700), st.integers(0, 40_000)), min_size=1, max_size=40),
    st.lists(
        st.integers(3000, 3600), min_size=1, max_size=80
    ),  # more requests than parts, about equal: they stay whole
)
MERGE = st.sampled_from((0, 1, 5, 20, 100))
PARTS = st.one_of(st.integers(1, 20), st.integers(1, 140))


def same(lengths, num_parts, **options):
    policy = "batch_invariant" if options["chunk_blocks"] else "balanced"
    options = {"ranges": ranges_needed(len(lengths), num_parts), "margin": 75, "merge_from": None, **options}
    if options["chunk_blocks"]:
        tokens = options["chunk_blocks"] * options["block_tokens"]
        pieces = sum(max(-(-min(x, options["capacity"]) // tokens), 1) for x in lengths)
        options["ranges"] = -(-pieces // num_parts)
    plan = plan_decode(
        [min(x, options["capacity"]) for x in lengths],
        num_parts,
        policy=policy,
        block_tokens=options["block_tokens"],
        overhead_blocks=options["overhead"],
        merge_blocks=options["merge"],
        min_share_blocks=options["min_share"],
        margin=options["margin"],
        merge_from=options["merge_from"],
        chunk_tokens=(options["chunk_blocks"] or 1) * options["block_tokens"],
        ranges=options["ranges"],
    )
    rows, num_splits, faults = emulate(lengths, num_parts, **options)
    assert rows == [list(part) for part in plan.parts]
    assert tuple(num_splits) == plan.num_splits
    assert faults == 2 * any(x < 0 for x in lengths) + 4 * any(x > options["capacity"] for x in lengths)
    return plan


@settings(max_examples=150, deadline=None)
@given(
    lengths=LENGTHS,
    num_parts=PARTS,
    capacity=st.sampled_from((64, 5_000, 1 << 30)),
    block_tokens=st.sampled_from((8, 16, 64)),
    overhead=st.integers(0, 6),
    merge=MERGE,
    min_share=st.integers(1, 4),
    margin=st.integers(0, 100),
    merge_from=st.sampled_from((None, 1, 20)),
    chunk_blocks=st.sampled_from((0, 0, 1, 5, 64)),
)
def test_emulated_device_plan_equals_python(lengths, num_parts, **options):
    same(lengths, num_parts, **options)


@settings(max_examples=60, deadline=None)
@given(
    lengths=LENGTHS,
    num_parts=PARTS,
    overhead=st.integers(0, 6),
    merge=MERGE,
    min_share=st.integers(1, 4),
    margin=st.integers(0, 100),
    merge_from=st.sampled_from((None, 1, 20)),
    chunk_blocks=st.sampled_from((0, 0, 3)),
)
def test_every_block_is_in_exactly_one_piece(lengths, num_parts, **options):
    plan = same(lengths, num_parts, capacity=1 << 30, block_tokens=64, **options)
    reached = [0] * plan.batch
    splits = [0] * plan.batch
    for piece in sorted(plan.pieces(), key=lambda piece: (piece.request, piece.split)):
        assert piece.begin_block == reached[piece.request]
        assert piece.split == splits[piece.request]
        assert piece.end_block > piece.begin_block or plan.blocks[piece.request] == 0
        reached[piece.request] = piece.end_block
        splits[piece.request] += 1
    assert tuple(reached) == plan.blocks
    assert all(count >= 1 for count in splits)
    assert [sum(splits[:r]) for r in range(plan.batch + 1)] == list(plan.num_splits)


def test_turns_to_whole_requests_at_the_same_price():
    lengths = [1200 + 97 * index % 250 for index in range(67)]
    options = {"capacity": 1 << 20, "block_tokens": 16, "overhead": 5, "min_share": 1, "chunk_blocks": 0}
    whole = [same(lengths, 12, merge=merge, **options).num_pieces == len(lengths) for merge in range(160)]
    assert not whole[0] and whole[-1]


@pytest.mark.parametrize("batch", [511, 512, 513, 1500])
def test_scan_carries_over_rounds(batch):
    values = [(7 * index) % 13 for index in range(batch)]
    want, total = [], 0
    for value in values:
        total += value
        want.append(total)
    assert scan_in_rounds(values) == want


def test_even_cuts_are_even():
    plan = plan_decode([32_768] * 4, 132, overhead_blocks=1)
    loads: dict[int, int] = {}
    for piece in plan.pieces():
        loads[piece.part] = loads.get(piece.part, 0) + piece.end_block - piece.begin_block
    assert len(loads) == 132
    assert max(loads.values()) - min(loads.values()) <= 2


@pytest.mark.parametrize("num_parts", [132, 66, 33, 32])
def test_equal_requests_that_nearly_fit_stay_whole(num_parts):
    plan = same([4096] * 128, num_parts, capacity=4096, block_tokens=64, overhead=5, merge=20, min_share=1,
                chunk_blocks=0)  # fmt: skip
    assert plan.num_pieces == 128
