"""The compiled many-row decode, run instruction by instruction on a CPU, all CTAs side by side, against the fp64 oracle.

One row block per CTA (no cluster): the emulator has one CTA's shared memory at a time.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from ptx_grid import launch
from ptx_machine import Deadlock
from ptx_program import Memory, Program, TensorMap, describe, parse

from openmla.backends.cute.decode_dense import config as dense
from openmla.backends.cute.decode_dense.launch import LOG2_E, NO_WINDOW, build
from openmla.mods import soft_cap
from openmla.reference import attention
from openmla.split.schedule import plan_decode
from openmla.testing import budget

pytest.importorskip("cutlass")
NAN = float("nan")


@cache
def compiled(cap: float) -> tuple[Program, int]:
    config = replace(dense.variant("bf16", 576, 64, 64, 1), mods=(soft_cap(cap),) if cap else ())
    with TemporaryDirectory() as folder:
        smem = build(config, Path(folder)).resources.dynamic_smem_bytes
        return parse((Path(folder) / f"{config.name}.ptx").read_text()), smem


class Call:
    """One problem with everything in it that must not matter poisoned, and a launch of it that merges."""

    def __init__(self, lengths, *, h_q=64, s_q=1, parts=3, sink=False, cap=0.0, times=1.0) -> None:
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
        self.kv[order[sum(used) :].long()] = NAN
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        self.q = (times * torch.randn(batch, s_q, h_q, 576, generator=gen)).bfloat16()
        self.cap = cap
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
        program, smem = compiled(self.cap)
        for poisoned in (self.out, self.lse, self.out_accum, self.lse2_accum):
            poisoned.fill_(NAN)
        memory, unread, kv, q = Memory(), torch.zeros(1), self.kv, self.q
        rows, heads = q.shape[1] * q.shape[2], q.shape[2]

        def free(tensor, fixed=(), unit=()):
            return describe(
                memory, tensor, [d in fixed for d in range(tensor.dim())], [d in unit for d in range(tensor.dim())]
            )

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


def test_pieces_are_merged_by_whoever_computed_them_in_any_order():
    call = Call((300, 130, 0), parts=4, sink=True)
    pieces = call.num_splits.diff().tolist()
    assert sorted(pieces)[1] > 1, "two requests must be split"
    assert bool((call.metadata[:, 0] < call.metadata[:, 1]).any()), "a part must have pieces of two"
    bits = []
    for seed in (1, 2):
        call.run(seed)
        call.check()
        bits.append(call.out.clone())
    assert torch.equal(*bits)


def test_row_blocks_with_fewer_rows_than_64_merge_on_their_own():
    call = Call((100, 200), h_q=40, s_q=2, parts=3)
    assert call.blocks == 2
    call.run(3)
    call.check()


def test_a_part_that_does_not_come_is_waited_for():
    call = Call((200,), parts=2)
    with pytest.raises(Deadlock):
        call.run(1, grid=[(0, 1)])


@pytest.mark.parametrize("times", [1.0, 40.0], ids=["by the polynomial", "by the function"])
def test_a_soft_cap_in_its_own_form(times):
    call = Call((100, 70), h_q=16, parts=2, sink=True, cap=30.0, times=times)
    call.run(1)
    call.check()
