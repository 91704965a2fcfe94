"""The compiled many-row decode, run instruction by instruction on a CPU, all CTAs side by side, against the fp64 oracle.

One row block per CTA (no cluster): the emulator has one CTA's shared memory at a time.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from ptx_grid import launch
from ptx_machine import Deadlock
from ptx_program import Memory, Program, TensorMap, describe, parse

from openmla.backends.cute.decode_dense import config as dense
from openmla.backends.cute.decode_dense import exchange
from openmla.backends.cute.decode_dense.launch import LOG2_E, NO_WINDOW, build
from openmla.mods import soft_cap
from openmla.reference import attention
from openmla.split import combine
from openmla.split.schedule import plan_decode
from openmla.testing import budget

pytest.importorskip("cutlass")
NAN = float("nan")


@cache
def compiled(
    cap: float = 0.0, is_exchanged: bool = False, polls: int = exchange.POLLS, loaders: int = 1, slots: int = 10
) -> tuple[Program, int]:
    mods = (soft_cap(cap),) if cap else ()
    plain = dense.variant("bf16", 576, 64, 64, 1)
    schedule = {"q_regs": 6, "slots": 11} if slots == 11 else {}
    config = replace(plain, is_halved=slots == 10, is_exchanged=is_exchanged, loaders=loaders, mods=mods, **schedule)
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "POLLS", polls)
        smem = build(config, Path(folder)).resources.dynamic_smem_bytes
        return parse((Path(folder) / f"{config.name}.ptx").read_text()), smem


class Call:
    """One problem with everything in it that must not matter poisoned, and a launch of it that merges."""

    def __init__(
        self, lengths, *, h_q=64, s_q=1, parts=3, sink=False, cap=0.0, times=1.0, loaders=1, slots=10, sizes=()
    ) -> None:
        gen = torch.Generator().manual_seed(0)
        used, batch = [-(-length // 64) for length in lengths], len(lengths)
        pages = sum(used) + 2
        self.kv = 0.5 * torch.randn(pages, 64, 1, 576, generator=gen).bfloat16()
        order = torch.randperm(pages, generator=gen).int()
        self.table = torch.full((batch, max(used) + 1), 2**31 - 1, dtype=torch.int32)
        for b, count in enumerate(used):
            self.table[b, :count] = order[sum(used[:b]) : sum(used[:b]) + count]
            if lengths[b] % 64:
                self.kv[self.table[b, count - 1].long(), lengths[b] % 64 :] = NAN
        for b, size in enumerate(sizes):
            self.kv[self.table[b, : used[b]].long()] *= 2.0**size
        self.kv[order[sum(used) :].long()] = NAN
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        self.q = (times * torch.randn(batch, s_q, h_q, 576, generator=gen)).bfloat16()
        self.cap, self.loaders, self.slots = cap, loaders, slots
        self.sink = torch.randn(h_q, generator=gen) if sink else None
        plan = plan_decode(lengths, parts, overhead_blocks=1)
        self.metadata = plan.tile_scheduler_metadata().view(plan.ranges, parts, 8)
        self.num_splits, self.parts = plan.num_splits_tensor(), parts
        self.blocks = -(-s_q * h_q // 64)
        self.out_accum = torch.empty(plan.num_pieces, self.blocks, 64 * 512)
        self.lse2_accum = torch.empty(plan.num_pieces, self.blocks * 64)
        self.arrivals = torch.zeros(plan.num_pieces, self.blocks, dtype=torch.int32)
        self.out, self.lse = torch.empty(batch, s_q, h_q, 512).bfloat16(), torch.empty(batch, h_q, s_q)
        self.fault = torch.zeros(1, dtype=torch.int32)

    def run(self, seed: int, grid=None) -> None:
        """One launch. `grid`: the CTAs (row block, part) that take part."""
        program, smem = compiled(self.cap, loaders=self.loaders, slots=self.slots)
        for poisoned in (self.out, self.lse, self.out_accum, self.lse2_accum):
            poisoned.fill_(NAN)
        self.launch(program, smem, seed, grid)

    def launch(self, program: Program, smem: int, seed: int, grid=None, mail=(), merged=None) -> None:
        """`mail`: fields, of which tensors stand for their addresses."""
        memory, unread, kv, q = Memory(), torch.zeros(1), self.kv, self.q
        rows, heads = q.shape[1] * q.shape[2], q.shape[2]

        def free(tensor, fixed=(), unit=()):
            return describe(
                memory, tensor, [d in fixed for d in range(tensor.dim())], [d in unit for d in range(tensor.dim())]
            )

        fields = [memory.place(each) if isinstance(each, torch.Tensor) else each for each in mail or (0,)]
        addresses = torch.tensor(fields, dtype=torch.int64)

        def ints(*values):
            return np.array(values, np.int32).tobytes()

        row = 2 * q.stride(2)
        params = [
            TensorMap(memory.place(kv), [576, 64, 1, len(kv)], [2, *(2 * kv.stride(d) for d in (1, 2, 0))], [64, 64]),
            ints(1, len(kv)),
            TensorMap(memory.place(q), [576, rows, 1, len(q)], [2, row, rows * row, 2 * q.stride(0)], [64, 64]),
            ints(rows, 1, len(q)), free(self.table, (), (1,)), free(self.lengths, (), (0,)),
            free(self.num_splits, (), (0,)), free(self.metadata, (2,), (1, 2)), free(self.num_splits, (), (0,)),
            free(self.out, (3,), (3,)), free(self.lse), free(self.out_accum, (2,), (2,)), free(self.lse2_accum, (), (1,)),
            free(self.arrivals, (), (1,)), free(unread if self.sink is None else self.sink, (), (0,)),
            free(self.fault, (0,), (0,)),
            *((free(addresses, (), (0,)), free(self.num_splits if merged is None else merged, (), (0,))) * (self.loaders == 1)),
            # s_q, chunk_blocks, is_merged, is_causal, is_varlen, has_sink, window
            *map(ints, (q.shape[1], 0, 1, 0, 0, self.sink is not None, NO_WINDOW)),
            np.float32(576**-0.5 * (1.0 if self.cap else LOG2_E)).tobytes(),
            *map(ints, (heads, len(kv), 1, self.table.shape[1] * 64)),
        ]  # fmt: skip
        everyone = [(block, part) for part in range(self.parts) for block in range(self.blocks)]
        try:
            launch(program, memory, params, [(x, 0, y) for x, y in grid or everyone], 512, smem, seed)
        finally:
            memory.read_back()

    def check(self) -> None:
        """out, lse, faults, and the counts as the next launch needs them."""
        golden = attention.decode(
            self.q, self.kv, self.table, self.lengths, softmax_scale=576**-0.5, d_v=512, attn_sink=self.sink,
            mods=[soft_cap(self.cap)] if self.cap else None, with_bounds=True,
        )  # fmt: skip
        budget.check(self.out, self.lse, golden, dtype=torch.bfloat16).require()
        assert not self.arrivals.any()
        assert self.fault.item() == 0


@pytest.mark.parametrize(("loaders", "slots", "seeds"), [(1, 10, (1, 2)), (2, 10, (1,)), (2, 11, (1,))])
def test_pieces_are_merged_by_whoever_computed_them_in_any_order(loaders, slots, seeds):
    call = Call((300, 130, 0), parts=4, sink=True, loaders=loaders, slots=slots)
    pieces = call.num_splits.diff().tolist()
    assert sorted(pieces)[1] > 1, "two requests must be split"
    assert bool((call.metadata[:, 0] < call.metadata[:, 1]).any()), "a part must have pieces of two"
    bits = []
    for seed in seeds:
        call.run(seed)
        call.check()
        bits.append(call.out.clone())
    assert all(torch.equal(bits[0], each) for each in bits)


@pytest.mark.parametrize("loaders", [1, 2])
@pytest.mark.parametrize("times", [1.0, 20.0])  # within the polynomial of the soft cap's own form, and beyond
def test_a_soft_cap(times, loaders):
    call = Call((130,), cap=30.0, times=times, parts=2, sink=True, loaders=loaders)
    call.run(3)
    call.check()


def test_row_blocks_with_fewer_rows_than_64_merge_on_their_own():
    call = Call((100, 200), h_q=40, s_q=2, parts=3)
    assert call.blocks == 2
    call.run(3)
    call.check()


@pytest.mark.parametrize("loaders", [1, 2])
def test_partials_of_half_the_bytes_hold_values_of_any_size(loaders):
    call = Call((130, 200, 190, 150), parts=8, loaders=loaders, times=0.0, sizes=(-110, 118, 0, -60))
    assert min(call.num_splits.diff().tolist()) > 1
    nan = call.table[2, 1].long()
    call.kv[nan, 3, 0, 5] = NAN  # in a piece of its own, which every row sees
    call.run(4)
    assert call.out[2].isnan().all()
    assert not call.out[[0, 1, 3]].isnan().any()
    call.kv[nan, 3, 0, 5] = 0.0
    call.run(5)
    call.check()


@pytest.mark.parametrize(("slots", "is_halved"), [(10, True), (11, False)])
def test_the_share_of_an_only_piece_stays_in_shared_memory(slots, is_halved):
    call = Call((200,), h_q=40, s_q=2, parts=4, loaders=2, slots=slots)
    assert call.num_splits.tolist() == [0, 4], "a part has one piece"
    call.run(3)
    call.check()
    pieces = call.out_accum[:4, :, : 32 * 512 if is_halved else None]
    assert pieces.isnan().any(dim=-1).all(), "what stays does not go to memory"
    assert call.out_accum[:4, :, 32 * 512 + 64 :].isnan().all() == is_halved, "half of the bytes, and the scales"


def test_a_part_that_does_not_come_is_waited_for():
    call = Call((200,), parts=2)
    with pytest.raises(Deadlock):
        call.run(1, grid=[(0, 1)])


class Mailboxes:
    """Of two ranks, as this one sees them; its own holds what the other has written."""

    def __init__(self, call: Call, capacity: int) -> None:
        self.call, self.capacity, rows = call, capacity, call.out.shape[0] * call.out.shape[1] * call.out.shape[2]
        empty = partial(torch.full, fill_value=-1, dtype=torch.int32)
        self.boxes = [empty((4 * capacity * 257,)) for _ in range(2)]
        self.turns, self.lost = torch.zeros(capacity, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        staged = empty((capacity * 257,))
        call.out = staged[: rows * 256].view(torch.bfloat16).view(call.out.shape)
        call.lse = staged[capacity * 256 :][:rows].view(torch.float32).view(call.lse.shape)
        self.staged, self.rows = staged, rows

    def row_of(self, box: torch.Tensor, turn: int, source: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and lse of a source."""
        words, lses = box.split([4 * self.capacity * 256, 4 * self.capacity])
        return words.view(2, 2, -1, 256)[turn % 2, source, : self.rows], lses.view(2, 2, -1)[
            turn % 2, source, : self.rows
        ]

    def put(self, box: torch.Tensor, turn: int, source: int, out: torch.Tensor, lse: torch.Tensor) -> None:
        """What a source would have written."""
        words, lses = self.row_of(box, turn, source)
        words.copy_(out.contiguous().view(torch.int32).view(-1, 256))
        lses.copy_(lse.transpose(1, 2).reshape(-1).view(torch.int32))

    def run(
        self, rank: int, seed: int, limit_ns: int = 1 << 62, polls: int = exchange.POLLS
    ) -> tuple[torch.Tensor, torch.Tensor]:
        program, smem = compiled(is_exchanged=True, polls=polls)
        merged = torch.zeros(self.rows * 257, dtype=torch.int32)
        for poisoned in (self.call.out_accum, self.call.lse2_accum):
            poisoned.fill_(NAN)
        mail = (rank, 2, self.capacity, limit_ns, self.turns, self.lost, *self.boxes)
        self.call.launch(program, smem, seed, mail=mail, merged=merged)
        out, lse = merged.split([self.rows * 256, self.rows])
        return out.view(torch.bfloat16).view(self.call.out.shape), lse.view(torch.float32).view(self.call.lse.shape)


@pytest.mark.parametrize(("rank", "turns"), [(0, 2), (1, 1)])
def test_rows_are_exchanged_with_another_rank_in_both_turns(rank, turns):
    call, alone = (Call((130, 60), h_q=40, parts=3) for _ in range(2))
    assert sorted(call.num_splits.diff().tolist())[0] == 1, "one request is not split"
    alone.run(1)
    mailboxes, other = Mailboxes(call, capacity=160), 1 - rank
    gen = torch.Generator().manual_seed(5)
    for turn in range(turns):
        out = torch.randn(call.out.shape, generator=gen).bfloat16()
        lse = torch.randn(call.lse.shape, generator=gen) + alone.lse
        out[0, 0, 3], lse[0, 3, 0] = NAN, -torch.inf  # a share without keys, which holds what must not count
        lse[0, 4, 0] = 100 + lse[0, 4, 0]
        mailboxes.put(mailboxes.boxes[rank], turn, other, out, lse)
        found, found_lse = mailboxes.run(rank, seed=turn)
        pair = [(alone.out, alone.lse), (out, lse)] if rank == 0 else [(out, lse), (alone.out, alone.lse)]
        want, want_lse = combine.merge(*(torch.stack([x.float() for x in each]) for each in (
            [o for o, _ in pair], [s.transpose(1, 2) for _, s in pair])))  # fmt: skip
        torch.testing.assert_close(found.float(), want.bfloat16().float(), rtol=8e-3, atol=1e-3)
        torch.testing.assert_close(found_lse, want_lse.transpose(1, 2), rtol=1e-5, atol=1e-5)
        assert torch.equal(found[0, 0, 3], alone.out[0, 0, 3])
        sent, sent_lse = mailboxes.row_of(mailboxes.boxes[other], turn, rank)
        assert torch.equal(sent.reshape(-1).view(torch.bfloat16).view(alone.out.shape), alone.out)
        assert torch.equal(sent_lse.view(torch.float32), alone.lse.transpose(1, 2).reshape(-1))
        for empty in (sent, sent_lse):
            empty.fill_(-1)  # the other rank has read it
        for empty in (mailboxes.staged, *mailboxes.boxes):
            assert torch.all(empty == -1), "every word is unwritten again"
    assert mailboxes.turns.tolist() == [turns] * mailboxes.rows + [0] * (160 - mailboxes.rows)
    assert not mailboxes.lost.any()
    assert not call.arrivals.any()


def test_a_rank_that_does_not_write_ends_in_nan_and_a_flag():
    mailboxes = Mailboxes(Call((40,), h_q=8, parts=1), capacity=8)
    found, found_lse = mailboxes.run(0, seed=1, limit_ns=-1, polls=4)
    assert found.isnan().all()
    assert found_lse.isnan().all()
    assert mailboxes.lost.item() == 1
