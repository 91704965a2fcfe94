"""The exchange of shares through mailboxes, one rank at a time: what it sends, what it merges, what it leaves."""

from __future__ import annotations

import math

import pytest
import torch

from openmla.backends.triton import exchange
from openmla.split import combine

UNWRITTEN, CAPACITY = -1, 16


class Rank:
    """A mailbox in this process's memory, and what the kernel keeps beside it."""

    def __init__(self, rank: int, world: int, words: int) -> None:
        self.rank, self.world, self.words = rank, world, words
        self.box = torch.full((2 * world * CAPACITY * (words + 1),), UNWRITTEN, dtype=torch.int32)
        self.turns, self.lost = torch.zeros(CAPACITY, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)

    def put(self, turn: int, source: int, out: torch.Tensor, lse: torch.Tensor) -> None:
        """What `source` would have written."""
        rows = out.view(torch.int32).reshape(-1, self.words)
        content, lses = self.parts()
        content[turn % 2, source, : len(rows)] = rows
        lses[turn % 2, source, : len(rows)] = lse.transpose(1, 2).reshape(-1).view(torch.int32)

    def parts(self) -> tuple[torch.Tensor, torch.Tensor]:
        slots = (2, self.world, CAPACITY)
        content, lses = self.box.split([math.prod(slots) * self.words, math.prod(slots)])
        return content.view(*slots, self.words), lses.view(slots)

    def exchange(self, others: list[Rank], out, lse, sink=None):
        boxes = torch.tensor([each.box.data_ptr() for each in others], dtype=torch.int64)
        return exchange.exchange(out, lse, sink, boxes, self.turns, self.lost, self.rank, 1.0)


def shares(world: int, shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int = 0):
    """One share per rank; one row of one rank has no key and holds what must not count, one row nobody has a key for."""
    generator = torch.Generator().manual_seed(seed)
    batch, s_q, h_q, _ = shape
    outs = torch.randn(world, *shape, generator=generator).to(dtype)
    lses = torch.randn(world, batch, h_q, s_q, generator=generator) * 3
    outs[0, 0, 0, 0], lses[0, 0, 0, 0] = torch.nan, -torch.inf
    outs[:, 0, 0, 1], lses[:, 0, 1, 0] = torch.nan, -torch.inf
    return outs, lses


@pytest.mark.parametrize(
    ("world", "d_v", "dtype", "has_sink"),
    [(2, 32, torch.bfloat16, True), (3, 24, torch.float16, False), (2, 12, torch.float32, True)],
)
def test_three_turns_merge_and_leave_the_mailbox_empty(world, d_v, dtype, has_sink) -> None:
    shape = (2, 2, 3, d_v)
    ranks = [Rank(rank, world, d_v * dtype.itemsize // 4) for rank in range(world)]
    sink = torch.tensor([-1.0, 0.5, 2.0]) if has_sink else None
    for turn in range(3):
        outs, lses = shares(world, shape, dtype, turn)
        want, want_lse = combine.merge(outs.float(), lses.transpose(2, 3))
        if sink is not None:
            want = want * torch.sigmoid(want_lse - sink)[..., None]
        # In one process nobody answers while a rank waits: the others' shares lie in its mailbox before it begins.
        found = []
        for rank in ranks:
            for source in set(range(world)) - {rank.rank}:
                rank.put(turn, source, outs[source], lses[source])
            sent = [Rank(other.rank, world, other.words) for other in ranks]
            sent[rank.rank] = rank
            found.append(rank.exchange(sent, outs[rank.rank], lses[rank.rank], sink))
            assert torch.all(rank.box == UNWRITTEN)
            for other in set(range(world)) - {rank.rank}:  # and what it sent is what `put` laid down
                told = Rank(other, world, rank.words)
                told.put(turn, rank.rank, outs[rank.rank], lses[rank.rank])
                assert torch.equal(sent[other].box, told.box)
        for out, lse in found:
            torch.testing.assert_close(out.float(), want.to(dtype).float(), rtol=8e-3, atol=1e-3)
            torch.testing.assert_close(lse, want_lse.transpose(1, 2), rtol=1e-5, atol=1e-5)
            assert torch.equal(out, found[0][0])
            assert torch.equal(lse, found[0][1])
        assert torch.all(found[0][0][0, 0, 1] == 0)
    assert ranks[0].turns.tolist() == [3] * 12 + [0] * (CAPACITY - 12)
    assert int(ranks[0].lost) == 0


def test_a_nan_with_the_mark_s_bits_travels_as_another_nan() -> None:
    out = torch.full((1, 1, 1, 8), UNWRITTEN, dtype=torch.int16).view(torch.bfloat16)
    lse = torch.zeros(1, 1, 1)
    sender, reader = Rank(0, 2, 4), Rank(1, 2, 4)
    sender.put(0, 1, torch.ones_like(out), lse)
    sender.exchange([sender, reader], out, lse)
    content, _ = reader.parts()
    assert torch.all(content[0, 0, 0] != UNWRITTEN)
    assert torch.all(content[0, 0, 0].view(torch.bfloat16).isnan())
