"""The compiled sparse prefill, run instruction by instruction on a CPU, against the fp64 oracle.

The cases are those of the GPU gate (tests/gpu/prefill_sparse.py), in sizes that a few CTAs work through.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from ptx_lanes import Warp
from ptx_machine import Cta, Deadlock
from ptx_program import LANES, Memory, describe, from_bf16, parse, swizzle

from openmla.backends.cute.prefill_sparse import config as gather
from openmla.backends.cute.prefill_sparse.launch import build

pytest.importorskip("cutlass")


class GatherCta(Cta):
    """Adds copies that land by themselves some time later, ldmatrix, and wgmma with its left operand in registers."""

    def begin(self, block: tuple[int, int, int], seed: int) -> None:
        """As in Cta; nothing is under way."""
        super().begin(block, seed)
        self.flying: dict[int, list[tuple[list[tuple[int, np.ndarray]], int, int]]] = {}

    def turn(self, warp: Warp) -> None:
        """As in Cta; before that some of the warp's copies may land."""
        queue = self.flying.get(warp.index, [])
        while queue and self.random.random() < 0.4:
            self.come_down(queue.pop(0))
        super().turn(warp)

    def come_down(self, flight: tuple[list[tuple[int, np.ndarray]], int, int]) -> None:
        """Copies come down, then their lanes arrive."""
        copies, barrier, lanes = flight
        for place, content in copies:
            self.store("shared", np.array([place]), content[None])
        self.barriers[barrier].arrive(lanes)
        self.issued += 1000  # not idle

    def do_cp(self, p: list[str], o: list[str]) -> Any:
        if "mbarrier" not in p:
            inner = super().do_cp(p, o)
            if "wait_all" not in p:
                return inner

            def wait(warp: Warp, mask: np.ndarray) -> None:
                for flight in self.flying.pop(warp.index, []):
                    self.come_down(flight)
                inner(warp, mask)

            return wait
        assert "noinc" in p, p
        where = self.address(o[0])

        def arrive(warp: Warp, mask: np.ndarray) -> None:
            assert mask.all(), "some lanes' copies do not arrive"
            self.flying.setdefault(warp.index, []).append((list(warp.copies), int(where(warp)[0]), 32))
            warp.copies.clear()

        return arrive

    def do_createpolicy(self, p: list[str], o: list[str]) -> Any:
        return self._ignore(p, o)  # what leaves a cache first

    def do_abs(self, p: list[str], o: list[str]) -> Any:
        write, value = self.writer(o[0]), self.reader(o[1], p[-1])
        return lambda warp, mask: write(warp, mask, np.abs(value(warp)))

    def do_ldmatrix(self, p: list[str], o: list[str]) -> Any:
        writes, where = [self.writer(name) for name in self.vector(o[0])], self.address(o[1])
        assert "trans" not in p and len(writes) == 4

        def run(warp: Warp, mask: np.ndarray) -> None:
            assert mask.all()
            places = where(warp)
            for matrix, write in enumerate(writes):
                found = self.fetch("shared", places[8 * matrix + LANES // 4] + LANES % 4 * 4, 4)
                write(warp, mask, np.ascontiguousarray(found).view(np.uint32)[:, 0])

        return run

    def do_wgmma(self, p: list[str], o: list[str]) -> Any:
        if p[1] in ("fence", "commit_group", "wait_group") or not o[1].startswith("{"):
            return super().do_wgmma(p, o)
        n = int(re.search(r"m64n(\d+)k16", ".".join(p))[1])  # type: ignore[index]
        names, left = self.vector(o[0]), [self.reader(x, "u32") for x in self.vector(o[1])]
        b, scale = self.reader(o[2], "u64"), self.predicate(o[3])
        assert o[4:] == ["1", "1", "0"] and len(names) == n // 2 and len(left) == 4, o[3:]

        def run(warp: Warp, mask: np.ndarray) -> None:
            assert mask.all(), "wgmma of lanes that are elsewhere"
            rows = np.zeros((16, 16), np.float32)
            for x, read in enumerate(left):
                pair = np.ascontiguousarray(read(warp)).view(np.uint16).reshape(32, 2)
                for y in range(2):
                    rows[LANES // 4 + 8 * (x % 2), LANES % 4 * 2 + 8 * (x // 2) + y] = from_bf16(pair[:, y]).reshape(32)
            descriptor = int(b(warp)[0])
            start, stride = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
            assert descriptor >> 62 == 1, "not the 128-byte swizzle"
            i, k = np.arange(n)[:, None], np.arange(16)[None]
            places = swizzle(start + i // 8 * stride + i % 8 * 128 + k * 2)
            both = np.stack([places, places + 1], -1)
            content = self.shared[both]
            warp.groups[-1].append((both, content))
            columns = from_bf16(content.reshape(-1, 2).copy().view(np.uint16).reshape(places.shape))
            product = rows @ columns.T
            for x, name in enumerate(names):
                row, column = LANES // 4 + 8 * (x // 2 % 2), x // 4 * 8 + LANES % 4 * 2 + x % 2
                old = warp.registers[name].view(np.float32) if scale(warp)[0] else np.float32(0)
                warp.registers[name] = (old + product[row, column]).astype(np.float32).view(np.uint32)

        return run


@cache
def gate():
    """The GPU script, on the CPU."""
    path = Path(__file__).parents[1] / "gpu" / "prefill_sparse.py"
    spec = importlib.util.spec_from_file_location("gpu_prefill_sparse", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.CUDA = "cpu"
    return module


@cache
def ptx(form: str = "rows", d_qk: int = 576, split: bool = False) -> str:
    config = replace(gather.variant(form, d_qk), split=split)
    with TemporaryDirectory() as folder:
        build(config, Path(folder))
        return (Path(folder) / f"{config.name}.ptx").read_text()


class Emulated:
    """What `launch` calls: the kernel's arguments, packed as its host code packs them."""

    def __init__(self, text: str, is_split: bool = False) -> None:
        self.program, self.is_split = parse(text), is_split

    def __call__(
        self, q, kv, indices, topk_length, sink, out, lse, max_logits, fault, parts, has_length, has_sink, scale,
        *cut,
    ):  # fmt: skip
        memory = Memory()

        def free(tensor, fixed=(), unit=()):
            modes = range(tensor.dim())
            return describe(memory, tensor, [d in fixed for d in modes], [d in unit for d in modes])

        steps = [q.stride(0) // 8, q.stride(1) // 8, kv.stride(0) // 8, kv.stride(1) // 8]
        values = [
            free(q, (2,), (2,)), free(kv, (2,), (2,)), free(indices, (), (1,)), free(topk_length), free(sink),
            free(out, (2,), (2,)), free(lse), free(max_logits), free(fault, (0,), (0,)),
            *(np.array([x], np.int32).tobytes() for x in (parts, has_length, has_sink)),
            np.array([scale], np.float32).tobytes(), *(np.array([x], np.int32).tobytes() for x in (*(cut if self.is_split else ()), *steps)),
        ]  # fmt: skip
        assert len(self.program.params) >= len(values)  # behind these: what is part of the type
        cta = GatherCta(
            self.program, memory, dict(zip(self.program.params, values, strict=False)), 512, gather.SMEM_LIMIT
        )
        for y in range(parts):
            for x in range(-(-q.shape[1] // 64)):
                cta.run((x, y, 0), seed=x + 7 * y)
        memory.read_back()


def verdict(text: str, form: str, *args, name: str = "kernel", **options):
    """(passed, words, fault word) of one case."""
    case = gate().case("emulated", form, *args, parts=options.pop("parts", 1), **options)
    gate().run({name: Emulated(text, "_split_" in name)}, name, case)
    return *gate().judged(case), case.operands.fault_word.item()


def test_tokens_of_one_cta_with_everything_hostile():
    passed, words, fault = verdict(
        ptx(), "rows", 4, 17, 200, absent=0.2, hostile=0.1, sink=float("inf"), queries=6.0, keys=2.0, strided=True
    )
    assert passed, words
    assert fault == 8


def test_two_blocks_of_heads_and_lengths():
    passed, words, fault = verdict(ptx(), "rows", 5, 72, 130, lengths=[0, 1, 64, 65, 129], parts=2)
    assert passed, words
    assert fault == 0


def test_more_tokens_than_descriptors_one_tile_each():
    passed, words, _ = verdict(ptx(), "rows", 11, 1, 3)
    assert passed, words


def test_512_columns_and_a_ring_of_11():
    passed, words, fault = verdict(ptx(d_qk=512), "rows", 2, 64, 330, d_qk=512, absent=0.1, sink=1.0)
    assert passed, words
    assert fault == 0


@pytest.mark.parametrize("d_qk", [576, 512])
def test_slots_of_pages(d_qk):
    passed, words, fault = verdict(
        ptx("pages", d_qk), "pages", 3, 8, 100, d_qk=d_qk, page_size=7, hostile=0.2, sink=-float("inf")
    )
    assert passed, words
    assert fault == 8


@pytest.mark.parametrize("d_qk", [576, 512])
def test_lists_in_pieces(d_qk):
    """Four tokens of two requests; pieces that are whole, cut short by a length, and empty."""
    passed, words, fault = verdict(
        ptx("pages", d_qk, True), "pages", 4, 8, 300, name="_split_", d_qk=d_qk, page_size=7, hostile=0.2, sink=1.0,
        lengths=[300, 0, 129, 250], parts=5,
    )  # fmt: skip
    assert passed, words
    assert fault == 8


def test_a_length_outside_of_the_list_is_clamped_and_noted():
    passed, words, fault = verdict(ptx(), "rows", 2, 1, 70, lengths=[-5, 2**31 - 1])
    assert passed, words
    assert fault == 16


def test_the_largest_logit_of_every_row_where_the_reference_stays_behind():
    """Scores that rise slowly never move the reference of P; the largest of them is in the last tile."""
    case = gate().case("rising", "rows", 1, 3, 256, parts=1, stray_nan=False, rows=256)
    rise = 1 + np.arange(256) / 128
    case.operands.kv.copy_(case.operands.kv[:1] * torch.from_numpy(rise).view(-1, 1, 1))
    case.operands.indices.copy_(torch.arange(256))
    case.operands.q.mul_(0.1)
    gate().run({"kernel": Emulated(ptx())}, "kernel", case)
    passed, words = gate().judged(case)
    assert passed, words


def test_a_nan_key_shows_in_everything_its_token_writes():
    """Also in the largest logit: the maximum instruction passes over NaN."""
    case = gate().case("one NaN key", "rows", 3, 8, 70, parts=1, stray_nan=False, rows=70)
    case.operands.indices.copy_(torch.arange(70))
    case.operands.indices[1] = torch.arange(70).clamp_(max=40)  # this token does not name the NaN
    case.operands.kv[69] = float("nan")
    gate().run({"kernel": Emulated(ptx())}, "kernel", case)
    given = case.operands
    for written in (given.out, given.lse, given.max_logits):
        assert written.reshape(3, -1).isnan().all(1).tolist() == [True, False, True]
        assert not written[1].isnan().any()


def test_scores_far_below_zero_do_not_vanish():
    """The first reference of a token is 0; 2^-277 of a score is none, so the largest must be found."""
    case = gate().case("far below", "rows", 2, 3, 100, parts=1, stray_nan=False, rows=100)
    case.operands.kv.abs_().clamp_(0.9, 1.1)
    case.operands.q.copy_(torch.full_like(case.operands.q, -8.0))
    case.operands.q[1] *= 0.001  # the other token's are near 0
    gate().run({"kernel": Emulated(ptx())}, "kernel", case)
    passed, words = gate().judged(case)
    assert passed, words
    assert case.operands.lse[0].max() < -100


@pytest.mark.parametrize(
    ("pattern", "other"),
    [
        (r"\+ 128\], 16", "+ 144], 16"),  # a slice from eight columns further on
        (r"(xor\.b32\s+%r\d+, %r\d+, )64;", r"\g<1>32;"),  # every second row of a lane into other chunks
        (r"setp\.ne\.s32 p, (%r\d+), -1; selp\.b32 n, 16, 0", r"setp.ne.s32 p, \1, -2; selp.b32 n, 16, 0"),  # no zeros
    ],
)
def test_a_wrong_copy_is_found(pattern, other):
    spoilt = re.sub(pattern, other, ptx())
    assert spoilt != ptx(), "nothing was spoilt"
    try:
        passed, _, _ = verdict(spoilt, "rows", 1, 8, 70)
    except AssertionError:  # an address outside of the tensors
        return
    assert not passed


def test_an_arrival_too_few_is_a_deadlock():
    spoilt = re.sub(r"(mov\.b32\s+%r\d+, )132(;\s+mbarrier\.init)", r"\g<1>133\2", ptx())
    assert spoilt != ptx(), "nothing was spoilt"
    with pytest.raises(Deadlock):
        verdict(spoilt, "rows", 1, 8, 200)
