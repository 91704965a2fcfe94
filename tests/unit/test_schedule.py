"""Plans of dense decode: whatever the cut, every KV block is computed exactly once and merged in order."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openmla.core.errors import ProblemError
from openmla.split.schedule import POLICIES, SplitPlan, plan_decode, ranges_needed

CHUNKS, PER_CHUNK = 4, 5500
CTA_PARTS = (1, 2, 3, 4, 8, 13, 33, 66, 78, 132)


def check_plan(
    plan: SplitPlan, lengths: list[int], num_parts: int, block_tokens: int, *, is_list: bool = False
) -> None:
    """The invariants that every formulation of a plan must keep."""
    blocks = [-(-max(length, 0) // block_tokens) for length in lengths]
    assert list(plan.blocks) == blocks and len(plan.parts) == num_parts * plan.ranges
    assert len(plan.num_splits) == len(lengths) + 1 and plan.num_splits[0] == 0

    next_block, next_split, last_part = [0] * len(lengths), [0] * len(lengths), -1
    line = (0, 0)  # (request, block): pieces follow one another along the line of work
    pieces = list(plan.pieces())
    if is_list:
        pieces.sort(key=lambda piece: (piece.request, piece.split))
        for part in range(num_parts):  # a kernel stops at the first empty range
            has_work = [begin <= end for begin, end, *_ in plan.parts[part::num_parts]]
            assert has_work == sorted(has_work, reverse=True)
    for piece in pieces:
        # The pieces of a request come in order, without gap or overlap, numbered from 0.
        assert piece.begin_block == next_block[piece.request], piece
        assert piece.split == next_split[piece.request], piece
        # Empty pieces exist for empty requests only.
        assert piece.end_block > piece.begin_block or blocks[piece.request] == 0, piece
        assert (0 if is_list else last_part) <= piece.part < num_parts
        assert (piece.request, piece.begin_block) >= line
        next_block[piece.request], line = piece.end_block, (piece.request, piece.end_block)
        next_split[piece.request] += 1
        last_part = piece.part
    assert next_block == blocks  # every block
    assert all(count >= 1 for count in next_split)  # somebody writes the rows of an empty request
    counted = [end - begin for begin, end in zip(plan.num_splits, plan.num_splits[1:], strict=False)]
    assert counted == next_split
    assert plan.num_pieces == sum(next_split)


def draw(pick: random.Random) -> tuple[list[int], int, dict[str, int]]:
    batch = pick.choice((0, 1, 1, 2, 3, 5, 9, 20, 40))
    longest = pick.choice((1, 64, 65, 1000, 10_000, 200_000))
    lengths = [pick.choice((0, 1, 63, 64, 65, longest, pick.randint(0, longest))) for _ in range(batch)]
    if pick.random() < 0.25:  # about equal: whole requests are nearly even
        lengths = [longest - pick.randint(0, longest // 10) for _ in range(batch)]
    if batch and pick.random() < 0.1:
        lengths[0] = pick.choice((-1, -(2**31), 2**31 - 1))
    options = {
        "block_tokens": pick.choice((1, 16, 64, 64, 128)) if longest <= 1000 else 64,
        "overhead_blocks": pick.choice((0, 1, 5, 5, 20)),
        "merge_blocks": pick.choice((None, 0, 1, 20, 100)),
    }
    if max(lengths, default=0) > 2**30:
        options["block_tokens"] = 64
    return lengths, pick.choice(CTA_PARTS), options


def list_length(lengths: list[int], num_parts: int, chunk_tokens: int | None = None) -> int:
    """Ranges per part that hold every piece."""
    if chunk_tokens is None:
        return ranges_needed(len(lengths), num_parts)
    return max(-(-sum(max(-(-length // chunk_tokens), 1) for length in lengths) // num_parts), 1)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_block_exactly_once(chunk, seeds_of):
    for seed in seeds_of(chunk, PER_CHUNK):
        pick = random.Random(seed)
        lengths, num_parts, options = draw(pick)
        policy = POLICIES[seed % len(POLICIES)]
        if policy == "batch_invariant":
            blocks = sum(max(length, 0) // options["block_tokens"] for length in lengths)
            # Plans of 100,000 pieces show nothing that those of 4,000 do not, and took two thirds of the time.
            short = (1, 2, 64) if blocks < 4000 else (64,)
            options["chunk_tokens"] = options["block_tokens"] * (pick.choice(short) if blocks < 10**6 else 4096)
        else:
            options["min_share_blocks"] = pick.choice((1, 1, 2, 8))
        if is_list := pick.random() < 0.25:
            options["ranges"] = list_length(lengths, num_parts, options.get("chunk_tokens"))
        plan = plan_decode(lengths, num_parts, policy=policy, **options)
        try:
            check_plan(plan, lengths, num_parts, options["block_tokens"], is_list=is_list)
            assert plan == plan_decode(tuple(lengths), num_parts, policy=policy, **options)
        except AssertionError as error:
            raise AssertionError(
                f"REPRO: python -m pytest tests/unit/test_schedule.py -k exactly_once --case-seed={seed}\n"
                f"{policy} {lengths} num_parts={num_parts} {options}\n{plan}"
            ) from error


@pytest.mark.parametrize("chunk", range(2))
def test_parts_cost_about_the_same(chunk, seeds_of):
    for seed in seeds_of(chunk, 1000):
        lengths, num_parts, options = draw(random.Random(seed))
        plan = plan_decode(lengths, num_parts, **options)
        overhead = options["overhead_blocks"]
        cost = [0] * num_parts
        for piece in plan.pieces():
            cost[piece.part] += overhead + piece.end_block - piece.begin_block
        merge = overhead if options["merge_blocks"] is None else options["merge_blocks"]
        is_split = plan.num_pieces > plan.batch
        # Even share of all work, plus the head of one piece that cutting adds, plus what the merge that whole requests
        # save would cost, or one head that could not be cut.
        fair = -(-sum(max(count + overhead, 1) for count in plan.blocks) // num_parts)
        slack = overhead if is_split else max(merge, overhead)
        assert max(cost) <= fair + overhead + slack + 1, f"--case-seed={seed} {lengths} {num_parts} {options} {cost}"


@given(st.lists(st.integers(0, 40_000), min_size=1, max_size=12), st.integers(1, 140), st.integers(1, 140), st.data())
@settings(max_examples=300, deadline=None)
def test_batch_invariant_pieces_depend_on_own_length_only(lengths, parts_a, parts_b, data):
    request = data.draw(st.integers(0, len(lengths) - 1))

    def cuts(all_lengths: list[int], num_parts: int, which: int, ranges: int | None = None) -> list[tuple[int, int]]:
        plan = plan_decode(all_lengths, num_parts, policy="batch_invariant", ranges=ranges)
        return sorted((piece.begin_block, piece.end_block) for piece in plan.pieces() if piece.request == which)

    alone = cuts([lengths[request]], parts_a, 0)
    assert cuts(lengths, parts_b, request) == alone
    assert cuts(lengths, parts_b, request, list_length(lengths, parts_b, 4096)) == alone
    assert all(begin % 64 == 0 for begin, _ in alone)  # chunk_tokens 4096 = 64 blocks


@given(st.lists(st.integers(-5, 20_000), max_size=8), st.integers(1, 40), st.sampled_from(POLICIES))
@settings(max_examples=200, deadline=None)
def test_device_form_says_the_same(lengths, num_parts, policy):
    plan = plan_decode(lengths, num_parts, policy=policy)
    table = plan.tile_scheduler_metadata()
    assert table.dtype == torch.int32 and table.shape == (num_parts, 8)
    assert [tuple(row) for row in table[:, :5].tolist()] == list(plan.parts) and not table[:, 5:].any()
    splits = plan.num_splits_tensor()
    assert splits.dtype == torch.int32 and tuple(splits.tolist()) == plan.num_splits


def test_an_empty_request_has_one_piece_of_no_blocks():
    for policy in POLICIES:
        plan = plan_decode([0, 0, 100, 0], 3, policy=policy)
        empty = [piece for piece in plan.pieces() if piece.request != 2]
        assert [(piece.request, piece.begin_block, piece.end_block) for piece in empty] == [
            (0, 0, 0),
            (1, 0, 0),
            (3, 0, 0),
        ]


def test_one_long_request_uses_every_part():
    plan = plan_decode([132 * 64 * 64], 132)
    assert {piece.part for piece in plan.pieces()} == set(range(132))


@pytest.mark.parametrize(
    ("parts", "merge", "tokens", "is_varlen", "even", "whole", "times_whole"),
    [
        (66, 20, 4096, False, 139, 138, 1),
        (66, 20, 16384, False, 512, 522, 1),
        (66, 20, 32768, False, 1008, 1034, 0),
        (66, 20, 4096, True, 141, 222, 0),
        (33, 40, 4096, False, 273, 276, 1),
        (33, 40, 16384, False, 1018, 1044, 1),
        (33, 40, 4096, True, 277, 346, 1),
    ],
)
def test_the_cheaper_of_whole_requests_and_even_cuts_is_chosen(
    parts, merge, tokens, is_varlen, even, whole, times_whole
):
    """The table of the module's docstring."""
    pick = random.Random(1)
    evens, wholes, chosen = [], [], 0
    for _ in range(20 if is_varlen else 1):
        lengths = [max(1, int(pick.gauss(tokens, tokens / 2))) if is_varlen else tokens for _ in range(128)]
        plan = plan_decode(lengths, parts, merge_blocks=10**6)
        cost = [0] * parts
        for piece in plan.pieces():
            cost[piece.part] += 5 + piece.end_block - piece.begin_block
        evens.append(-(-(sum(plan.blocks) + 127 * 5) // parts) + 5)
        wholes.append(max(cost))
        is_whole = plan_decode(lengths, parts, merge_blocks=merge).num_pieces == 128
        assert is_whole == (wholes[-1] <= evens[-1] + merge)
        chosen += is_whole
    assert (round(sum(evens) / len(evens)), round(sum(wholes) / len(wholes)), chosen) == (even, whole, times_whole)


def modelled(plan: SplitPlan, num_parts: int, overhead: int, merge: int) -> float:
    """Blocks of the busiest part, and its share of a merge that costs `merge` with a piece per request and part."""
    load = [0] * num_parts
    for piece in plan.pieces():
        load[piece.part] += overhead + piece.end_block - piece.begin_block
    counts = [end - begin for begin, end in pairwise(plan.num_splits)]
    return max(load) + merge * sum(count for count in counts if count > 1) / (plan.batch + num_parts)


@pytest.mark.parametrize(
    ("parts", "merge", "tokens", "stretch", "ranges"),
    [
        (66, 20, 4096, 152, 141),
        (66, 20, 8192, 277, 272),
        (33, 40, 4096, 289, 278),
        (33, 40, 8192, 539, 534),
        (132, 10, 4096, 77, 75),
    ],
)
def test_lists_of_ranges_even_out_varying_lengths(parts, merge, tokens, stretch, ranges):
    """The table of the module's docstring."""
    pick, found = random.Random(1), []
    for _ in range(10):
        lengths = [min(max(1, int(pick.gauss(tokens, tokens / 2))), 2 * tokens) for _ in range(128)]
        plans = [
            plan_decode(lengths, parts, merge_blocks=merge, ranges=each) for each in (None, ranges_needed(128, parts))
        ]
        found.append([modelled(plan, parts, 5, merge if parts < 128 else 5) for plan in plans])
    assert [round(sum(each) / len(each)) for each in zip(*found, strict=True)] == [stretch, ranges]


@pytest.mark.parametrize("chunk", range(2))
def test_lists_of_ranges_fit_their_rows_and_slots(chunk, seeds_of):
    kinds = set()
    for seed in seeds_of(chunk, 1000):
        lengths, num_parts, options = draw(random.Random(seed))
        if not lengths:
            continue
        plan = plan_decode(lengths, num_parts, ranges=ranges_needed(len(lengths), num_parts), **options)
        check_plan(plan, lengths, num_parts, options["block_tokens"], is_list=True)
        # As many partials as even cuts have at most, so that one workspace serves every length.
        assert plan.num_pieces <= len(lengths) + num_parts, f"--case-seed={seed}"
        spread = any(begin <= end for begin, end, *_ in plan.parts[num_parts:])
        kinds.add((spread, plan.num_pieces > plan.batch))
    assert kinds == {(False, False), (False, True), (True, False), (True, True)}, "every kind of plan was drawn"


def test_few_requests_are_split_whatever_a_merge_costs():
    plan = plan_decode([4096] * 4, 66, merge_blocks=10**6)
    assert len({piece.part for piece in plan.pieces()}) > 60


def test_whole_requests_give_every_part_a_request_where_they_are_equal():
    plan = plan_decode([4096] * 128, 66, merge_blocks=20)
    sizes = [end - begin + 1 for begin, end, *_ in plan.parts]
    assert sorted(set(sizes)) == [1, 2] and sizes.count(1) == 4
    assert sum(sizes) == 128


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"num_parts": 0}, "num_parts"),
        ({"num_parts": 1, "policy": "fair"}, "policy"),
        ({"num_parts": 1, "block_tokens": 0}, "block_tokens"),
        ({"num_parts": 1, "overhead_blocks": -1}, "overhead_blocks"),
        ({"num_parts": 1, "merge_blocks": -1}, "merge_blocks"),
        ({"num_parts": 1, "chunk_tokens": 100}, "chunk_tokens"),
        ({"num_parts": 1, "chunk_tokens": 32}, "chunk_tokens"),
        ({"num_parts": 1, "ranges": 0}, "ranges"),
        ({"num_parts": 1, "ranges": 1, "policy": "batch_invariant", "chunk_tokens": 64}, "2 pieces"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else value,
)
def test_misuse_is_refused(arguments, rule):
    with pytest.raises(ProblemError, match=rule):
        plan_decode([65], **arguments)


def test_all_violations_at_once():
    with pytest.raises(ProblemError) as caught:
        plan_decode([64], 0, block_tokens=0, overhead_blocks=-1)
    assert len(caught.value.violations) == 3


@pytest.mark.parametrize(("merge", "pieces"), [(20, 64), (5, 68)])
def test_few_requests_leave_parts_idle_rather_than_merge_twice_in_one(merge, pieces):
    """Context parallelism's share; only where partials are large, which is what `merge_blocks` above the overhead says."""
    plan = plan_decode([65536] * 4, 66, overhead_blocks=5, merge_blocks=merge, ranges=2)
    assert plan.num_pieces == pieces
