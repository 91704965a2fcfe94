"""The plan that is made on the device is the plan of the pure function, field by field."""

from __future__ import annotations

import random

import pytest
import torch

from openmla.backends.triton.schedule import plan_kernel
from openmla.split.schedule import plan_decode

BLOCK = 16


def device_plan(lengths, num_parts, chunk_blocks, overhead, merge=5, capacity=1 << 20):
    metadata = torch.full((num_parts, 8), -7, dtype=torch.int32)
    num_splits = torch.full((len(lengths) + 1,), -7, dtype=torch.int32)
    given = torch.tensor(lengths, dtype=torch.int32)
    plan_kernel[(num_parts + 1,)](
        given, metadata, num_splits, len(lengths), num_parts, capacity, chunk_blocks, overhead, merge, 1,
        BLOCK_TOKENS=BLOCK,
    )  # fmt: skip
    return metadata, num_splits


def drawn(pick: random.Random) -> list[int]:
    shape = pick.choice(("equal", "alike", "skewed", "short", "empty"))
    batch = pick.choice((1, 2, 3, 8, 40, 67))
    if shape == "equal":
        return [pick.randint(0, 600)] * batch
    if shape == "skewed":
        return [pick.choice((0, 1, 16, 17, 4000)) for _ in range(batch)]
    if shape == "alike":
        return [pick.randint(300, 360) for _ in range(batch)]
    return [pick.randint(0, 40) if shape == "short" else 0 for _ in range(batch)]


@pytest.mark.parametrize("policy", ["balanced", "batch_invariant"])
@pytest.mark.parametrize("chunk", range(4))
def test_equals_the_pure_function(policy, chunk):
    for seed in range(chunk * 12, chunk * 12 + 12):
        pick = random.Random(seed)
        lengths, parts, overhead = drawn(pick), pick.choice((1, 2, 5, 33)), pick.choice((0, 1, 5))
        merge = pick.choice((0, 5, 20, 100))
        expected = plan_decode(
            lengths, parts, policy=policy, block_tokens=BLOCK, overhead_blocks=overhead, merge_blocks=merge,
            chunk_tokens=64,
        )  # fmt: skip
        metadata, splits = device_plan(lengths, parts, 4 if policy == "batch_invariant" else 0, overhead, merge)
        context = f"seed={seed} {lengths} parts={parts} overhead={overhead} merge={merge}"
        assert torch.equal(splits, expected.num_splits_tensor()), context
        wanted = expected.tile_scheduler_metadata()
        # An empty part is any with begin > end; the rest of its row says nothing.
        is_empty = wanted[:, 0] > wanted[:, 1]
        assert torch.equal(metadata[:, 0] > metadata[:, 1], is_empty), context
        assert torch.equal(metadata[~is_empty], wanted[~is_empty]), context


def test_more_requests_than_one_step_holds():
    lengths = [random.Random(i).choice((0, 5, 16, 90)) for i in range(1500)]
    expected = plan_decode(lengths, 24, block_tokens=BLOCK)
    metadata, splits = device_plan(lengths, 24, 0, 5)
    assert torch.equal(splits, expected.num_splits_tensor())
    assert torch.equal(metadata, expected.tile_scheduler_metadata())


@pytest.mark.parametrize(("lengths", "merge"), [([90] * 2100, 5), ([80, 96, 112] * 500, 40)], ids=["equal", "alike"])
def test_whole_requests_of_more_than_one_step(lengths, merge):
    expected = plan_decode(lengths, 30, block_tokens=BLOCK, merge_blocks=merge)
    assert expected.num_pieces == len(lengths)
    metadata, splits = device_plan(lengths, 30, 0, 5, merge)
    assert torch.equal(splits, expected.num_splits_tensor())
    assert torch.equal(metadata, expected.tile_scheduler_metadata())


def test_turns_to_whole_requests_at_the_same_price():
    lengths = [random.Random(i).randint(300, 360) for i in range(67)]
    plans = [plan_decode(lengths, 12, block_tokens=BLOCK, merge_blocks=merge) for merge in range(40)]
    whole = [plan.num_pieces == len(lengths) for plan in plans]
    turn = whole.index(True)
    assert turn > 0 and all(whole[turn:])
    for merge in (0, turn - 1, turn, turn + 1, 39):
        metadata, splits = device_plan(lengths, 12, 0, 5, merge)
        assert torch.equal(splits, plans[merge].num_splits_tensor()), merge
        assert torch.equal(metadata, plans[merge].tile_scheduler_metadata()), merge


def test_lengths_are_clamped():
    expected = plan_decode([0, 64, 64], 4, block_tokens=BLOCK)
    metadata, splits = device_plan([-9, 64, 2**31 - 1], 4, 0, 5, capacity=64)
    assert torch.equal(splits, expected.num_splits_tensor())
    assert torch.equal(metadata, expected.tile_scheduler_metadata())


def test_no_requests():
    metadata, splits = device_plan([], 3, 0, 5)
    assert splits.tolist() == [0]
    assert bool((metadata[:, 0] > metadata[:, 1]).all())
