"""The compiled few-row decode, run instruction by instruction on a CPU, all CTAs side by side, against the fp64 oracle."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from ptx_grid import launch
from ptx_machine import Deadlock
from ptx_program import Memory, Program, TensorMap, describe, parse

from openmla.backends.base import SparseDecodeOperands
from openmla.backends.cute.decode_dense_small import config as small
from openmla.backends.cute.decode_dense_small.launch import LOG2_E, build, launch_gathered
from openmla.core.layout import kv_layout
from openmla.reference import attention, quant
from openmla.split.schedule import plan_decode
from openmla.testing import budget

pytest.importorskip("cutlass")
NAN = float("nan")


@cache
def compiled(config: small.Config) -> tuple[Program, int]:
    with TemporaryDirectory() as folder:
        smem = build(config, Path(folder)).resources.dynamic_smem_bytes
        return parse((Path(folder) / f"{config.name}.ptx").read_text()), smem


class Call:
    """One problem with everything in it that must not matter poisoned, and a launch of it."""

    def __init__(
        self, lengths, *, h_q=16, s_q=1, page=64, parts=3, chunk=0, causal=False, sink=False, window=0, offsets=(),
        ranges=None, layout="plain", pairs=False,
    ) -> None:  # fmt: skip
        gen = torch.Generator().manual_seed(0)
        self.layout = layout
        d_qk = 576 if layout == "plain" else kv_layout(layout).d_qk
        self.options = {"is_causal": causal, "window": window}
        self.page, self.parts, self.chunk = page, parts, chunk
        used, batch = [-(-length // page) for length in lengths], len(lengths)
        pages = sum(used) + 2
        self.kv = 0.5 * torch.randn(pages, page, 1, d_qk, generator=gen).bfloat16()
        if layout != "plain":  # scales of all sizes, and some that are no powers of two
            self.kv *= torch.exp2(torch.randint(-6, 3, (pages, page, 1, d_qk // 64), generator=gen)).repeat_interleave(
                64, -1
            )
            self.kv = quant.quantise(self.kv, layout)
            scales = self.kv[..., 512:528].contiguous().view(torch.float32)
            scales[:, ::3] *= 1.37
            self.kv[..., 512:528] = scales.view(torch.uint8)
        poison = NAN if layout == "plain" else 255  # every code, scale and bf16 number a NaN
        order = torch.randperm(pages, generator=gen).int()
        self.table = torch.full((batch, max(used) + 1), 2**31 - 1, dtype=torch.int32)
        for b, count in enumerate(used):
            self.table[b, :count] = order[sum(used[:b]) : sum(used[:b]) + count]
            if lengths[b] % page:
                self.kv[self.table[b, count - 1].long(), lengths[b] % page :] = poison
        self.kv[order[sum(used) :].long()] = poison
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        self.max_s_q = int(np.diff(offsets).max()) if offsets else 0
        self.offsets = torch.tensor(offsets or (0,) * (batch + 1), dtype=torch.int32)
        lead = (1, offsets[-1] + 1) if offsets else (batch, s_q)
        self.q = torch.randn(*lead, h_q, d_qk, generator=gen).bfloat16()
        self.sink = torch.randn(h_q, generator=gen) if sink else None
        reach = [min(n, window + (self.max_s_q or s_q) + 62) if window else n for n in lengths]
        plan = plan_decode(
            reach, parts, policy="batch_invariant" if chunk else "balanced", overhead_blocks=1, chunk_tokens=chunk or 64,
            ranges=ranges,
        )  # fmt: skip
        self.metadata = plan.tile_scheduler_metadata().view(plan.ranges, parts, 8)
        self.num_splits = plan.num_splits_tensor()
        rows = h_q * (self.max_s_q or s_q)
        self.groups = rows // 16 if pairs else 1
        self.config = next(
            x for x in small.VARIANTS
            if x.layout == layout and x.dtype == "bf16" and x.rows >= rows // self.groups and x.pairs == pairs
        )  # fmt: skip
        self.exchange = torch.full(
            (self.groups, plan.num_pieces, self.config.rows * self.config.words_per_row),
            0x7FC00001,
            dtype=torch.int32,
        )
        self.exchange[..., small.marks(self.config)] = small.UNWRITTEN
        self.out, self.lse = torch.empty(*lead, h_q, 512).bfloat16(), torch.empty(lead[0], h_q, lead[1])
        self.fault = torch.zeros(1, dtype=torch.int32)

    def run(self, seed: int, blocks=None) -> None:
        """One launch. `blocks`: the parts that take part."""
        program, smem = compiled(self.config)
        self.out.fill_(NAN)
        self.lse.fill_(NAN)
        memory = Memory()

        def free(tensor, fixed=(), unit=()):
            return describe(
                memory, tensor, [d in fixed for d in range(tensor.dim())], [d in unit for d in range(tensor.dim())]
            )

        kv, sink = self.kv.expand(-1, -1, self.groups, -1), torch.zeros(1) if self.sink is None else self.sink
        steps = [2, 2 * kv.stride(1), 128, 2 * kv.stride(2), 2 * kv.stride(0)]
        boxes = TensorMap(memory.place(kv), [64, self.page, 9, self.groups, kv.shape[0]], steps, [64, 8, 9])
        window = self.options["window"]
        params = [
            *([boxes, np.array([self.page, self.groups, kv.shape[0]], np.int32).tobytes()] if self.layout == "plain" else []),
            free(self.q, (3,), (3,)),
            free(kv, (3,), (3,)), free(self.table, (), (1,)), free(self.lengths, (), (0,)),
            free(self.metadata, (2,), (1, 2)), free(self.num_splits, (), (0,)), free(self.out, (3,), (3,)),
            free(self.lse), free(self.exchange, (2,), (1, 2)), free(sink, (), (0,)), free(self.offsets, (), (0,)),
            free(self.fault, (0,), (0,)), np.float32(576**-0.5 * LOG2_E).tobytes(),
            *(np.int32(x).tobytes() for x in (
                self.options["is_causal"] or window > 0, window or small.NO_WINDOW, self.max_s_q, 64, self.chunk // 64,
                self.sink is not None,
            )),
        ]  # fmt: skip
        try:
            launch(
                program,
                memory,
                params,
                [(x, 0, 0) for x in blocks or range(self.parts)]
                if self.groups == 1
                else [(x, y, 0) for y in range(self.groups // 2) for x in range(2 * self.parts)],
                self.config.threads,
                smem,
                seed,
                2 if self.config.pairs else 1,
            )
        finally:
            memory.read_back()

    def check(self) -> None:
        """out, lse, faults, and the exchange as the next launch needs it."""
        is_packed = self.max_s_q > 0
        golden = attention.decode(
            self.q[0] if is_packed else self.q, self.kv, self.table, self.lengths, softmax_scale=576**-0.5, d_v=512,
            cu_seqlens_q=self.offsets if is_packed else None, attn_sink=self.sink, with_bounds=True, **self.options,
            layout=None if self.layout == "plain" else self.layout,
        )  # fmt: skip
        out, lse = (self.out[0], self.lse[0]) if is_packed else (self.out, self.lse)
        budget.check(out, lse, golden, dtype=torch.bfloat16).require()
        assert (self.exchange[..., small.marks(self.config)] == small.UNWRITTEN).all()
        assert self.fault.item() == 0


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"lengths": (300, 70), "h_q": 3, "s_q": 2, "window": 100}, id="window"),
        pytest.param({"lengths": (200, 30), "page": 3, "parts": 2}, id="page3"),
        pytest.param(
            {"lengths": (300, 70, 9), "h_q": 8, "offsets": (1, 2, 4, 4), "parts": 5, "causal": True}, id="varlen"
        ),
        pytest.param({"lengths": (640,), "h_q": 4, "chunk": 64, "parts": 5}, id="teams-of-2"),
        pytest.param({"lengths": (300, 70, 0), "h_q": 4, "chunk": 64, "parts": 3, "ranges": 3}, id="lists-of-ranges"),
        pytest.param(
            {"lengths": (400, 70, 0), "h_q": 16, "s_q": 2, "parts": 2, "causal": True}, id="rows32-two-pieces"
        ),
        pytest.param({"lengths": (300, 70), "h_q": 11, "s_q": 4, "window": 100, "sink": True, "parts": 2}, id="rows64"),
        pytest.param({"lengths": (640,), "h_q": 40, "parts": 3}, id="rows64-three-pieces"),
        pytest.param({"lengths": (130, 70), "layout": "fp8_656", "parts": 2}, id="fp8_656"),
        pytest.param(
            {"lengths": (300, 70), "layout": "fp8_656", "h_q": 3, "s_q": 2, "window": 100, "sink": True},
            id="fp8_656-window",
        ),
        pytest.param({"lengths": (200, 30, 0), "layout": "fp8_656", "page": 3, "parts": 2}, id="fp8_656-page3"),
        pytest.param(
            {
                "lengths": (200, 70, 0),
                "layout": "fp8_656",
                "h_q": 13,
                "s_q": 2,
                "parts": 2,
                "causal": True,
                "sink": True,
            },
            id="fp8_656-rows32",
        ),
        pytest.param(
            {
                "lengths": (300, 70, 9),
                "layout": "fp8_528",
                "h_q": 8,
                "offsets": (1, 2, 4, 4),
                "parts": 5,
                "causal": True,
            },
            id="fp8_528-varlen",
        ),
        pytest.param(
            {"lengths": (300, 70, 0), "layout": "fp8_656", "h_q": 4, "chunk": 64, "parts": 3, "ranges": 3},
            id="fp8_656-lists-of-ranges",
        ),
    ],
)
def test_the_machine_code_computes_attention(options):
    call = Call(**options)
    call.run(seed=1)
    call.check()


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"lengths": (300, 70), "h_q": 32, "parts": 2, "sink": True}, id="one-and-two-tiles"),
        pytest.param({"lengths": (200, 64, 0, 1), "h_q": 32, "parts": 1}, id="one-piece-each"),
        pytest.param({"lengths": (500, 70), "h_q": 16, "s_q": 4, "parts": 1, "causal": True}, id="four-groups"),
        pytest.param({"lengths": (700, 9), "h_q": 16, "s_q": 2, "parts": 2, "window": 100}, id="window"),
        pytest.param({"lengths": (150, 70), "h_q": 32, "parts": 2, "page": 3}, id="page3"),
        pytest.param(
            {"lengths": (300, 70, 9), "h_q": 16, "offsets": (1, 2, 4, 4), "parts": 2, "causal": True}, id="varlen"
        ),
    ],
)
def test_the_machine_code_of_pairs_computes_attention(options):
    call = Call(**options, pairs=True)
    for seed in (1, 2):
        call.run(seed)
        call.check()


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("power", [-90, 0, 90])
def test_partials_keep_columns_of_any_size_beside_each_other(power, pairs):
    call = Call((300, 70), h_q=32 if pairs else 16, parts=2 if pairs else 3, pairs=pairs)
    steps = torch.exp2(power + torch.randint(-13, 14, (512,), generator=torch.Generator().manual_seed(3)).float())
    call.kv[..., :512] = (call.kv[..., :512].float() * steps).bfloat16()
    call.q[..., :512] = (call.q[..., :512].float() / steps).bfloat16()
    call.run(seed=1)
    call.check()


def test_pieces_of_several_requests_meet_in_any_order():
    call = Call((500, 130, 5, 0), parts=4, sink=True)
    assert int(call.num_splits[-1]) > 6, "the case must split requests, and give a part pieces of two"
    bits = []
    for seed in (1, 2):  # another order of warps; and the second launch finds what the first leaves behind
        call.run(seed)
        call.check()
        bits.append(call.out.clone())
    assert torch.equal(*bits)


def test_a_part_that_does_not_come_is_waited_for():
    call = Call((300,), parts=3)
    with pytest.raises(Deadlock):
        call.run(seed=1, blocks=(0, 2))


class Lists:
    """Query tokens with index lists, in the way of tests/gpu/decode_sparse.py, launched by `launch_gathered`."""

    def __init__(
        self, tokens, topk, *, s_q=1, h_q=16, page=64, parts=3, layout="fp8_656", lengths=None,
        sink=False, absent=0.0, hostile=0.0, is_odd=False, mixed=False,
    ) -> None:  # fmt: skip
        gen = torch.Generator().manual_seed(0)
        self.config = next(x for x in small.VARIANTS if x.gathers and x.layout == layout)
        d_qk, pages, batch = kv_layout(layout).d_qk, -(-400 // page), tokens // s_q
        kv = 0.5 * torch.randn(pages, page, 1, d_qk, generator=gen).bfloat16()
        kv *= torch.exp2(torch.randint(-6, 3, (pages, page, 1, 1), generator=gen))
        self.kv = quant.quantise(kv, kv_layout(layout))
        if is_odd:
            scales = self.kv[..., 512:528].contiguous().view(torch.float32)
            scales.view(-1, 4)[150:] *= 1.37
            self.kv[..., 512:528] = scales.view(torch.uint8)
        slots = pages * page
        self.kv.view(slots, -1)[300:] = 255  # NaN, which no list names
        lists = torch.randint(0, 300, (batch, s_q, topk), generator=gen, dtype=torch.int32)
        if mixed:  # two tiles without odd scales, the others with, the last without
            lists[..., :130] %= 150
            lists[..., -64:] %= 150
        dice = torch.rand(lists.shape, generator=gen)
        lists[dice < absent] = -1
        wild = torch.tensor([-2, -(2**31), 2**31 - 1, slots])[torch.randint(0, 4, lists.shape, generator=gen)].int()
        lists = torch.where(dice > 1 - hostile, wild, lists)
        length = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
        self.is_hostile = hostile > 0
        self.operands = SparseDecodeOperands(
            q=torch.randn(batch, s_q, h_q, d_qk, generator=gen).bfloat16(), kv_cache=self.kv, indices=lists,
            softmax_scale=576**-0.5, out=torch.full((batch, s_q, h_q, 512), NAN).bfloat16(),
            lse=torch.full((batch, h_q, s_q), NAN), fault_word=torch.zeros(1, dtype=torch.int32), topk_length=length,
            attn_sink=torch.randn(h_q, generator=gen) if sink else None,
        )  # fmt: skip
        plan = small.gathered_plan(tokens, topk, parts)
        self.parts, self.pieces = parts, plan.num_pieces
        self.metadata, self.num_splits = (
            plan.tile_scheduler_metadata().view(plan.ranges, parts, 8),
            plan.num_splits_tensor(),
        )
        self.exchange = torch.full(
            (1, plan.num_pieces, 16 * small.words_per_row(True, 2)), 0x7FC00001, dtype=torch.int32
        )
        self.exchange[..., small.marks(self.config)] = small.UNWRITTEN

    def run(self, seed: int) -> None:
        def function(*arguments):
            program, smem = compiled(self.config)
            memory = Memory()
            fixed = {0: (3,), 1: (3,), 4: (2,), 6: (3,), 8: (2,), 11: (0,)}
            unit = {0: (3,), 1: (3,), 2: (2,), 4: (1, 2), 5: (0,), 6: (3,), 8: (1, 2), 9: (0,), 10: (0,), 11: (0,)}
            tensors = [
                describe(
                    memory, x, [d in fixed.get(i, ()) for d in range(x.dim())], [d in unit.get(i, ()) for d in range(x.dim())]
                )
                for i, x in enumerate(arguments[:12])
            ]  # fmt: skip
            numbers = [np.float32(arguments[12]).tobytes(), *(np.int32(x).tobytes() for x in arguments[13:])]
            try:
                blocks = [(x, 0, 0) for x in range(self.parts)]
                launch(program, memory, [*tensors, *numbers], blocks, self.config.threads, smem, seed)
            finally:
                memory.read_back()

        self.operands.out.fill_(NAN)
        launch_gathered(function, self.operands, self.metadata, self.num_splits, self.exchange)

    def check(self) -> None:
        o = self.operands
        golden = attention.sparse_decode(
            o.q, o.kv_cache, o.indices, softmax_scale=o.softmax_scale, d_v=512, layout=self.config.layout,
            topk_length=o.topk_length, attn_sink=o.attn_sink, with_bounds=True,
        )  # fmt: skip
        budget.check(o.out, o.lse, golden, dtype=torch.bfloat16).require()
        assert (self.exchange[..., small.marks(self.config)] == small.UNWRITTEN).all()
        assert o.fault_word.item() == (8 if self.is_hostile else 0)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"tokens": 2, "topk": 70, "h_q": 5, "parts": 2, "absent": 0.2, "hostile": 0.2}, id="hostile"),
        pytest.param({"tokens": 1, "topk": 200, "page": 7, "absent": 0.1, "is_odd": True}, id="odd-scales"),
        pytest.param(
            {"tokens": 4, "s_q": 2, "topk": 130, "h_q": 8, "lengths": [[130, 0], [65, 1]], "sink": True, "page": 7},
            id="two-tokens",
        ),
        pytest.param(
            {
                "tokens": 1,
                "topk": 300,
                "layout": "fp8_528",
                "parts": 1,
            },
            id="fp8_528-ring",
        ),
        pytest.param(
            {
                "tokens": 2,
                "topk": 390,
                "parts": 3,
                "is_odd": True,
                "mixed": True,
                "hostile": 0.1,
            },
            id="odd-and-not",
        ),
    ],
)
def test_rows_of_index_lists(options):
    call = Lists(**options)
    for seed in (1, 2):
        call.run(seed)
        call.check()
