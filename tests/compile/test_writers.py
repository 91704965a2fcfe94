"""The cache writers without a GPU: compiled within budget, their PTX run on a CPU against the reference, and what they take."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from ptx_lanes import Warp
from ptx_machine import Cta
from ptx_program import Memory, describe, parse

from openmla.backends.base import AppendOperands
from openmla.backends.cute.writers import config as writers
from openmla.backends.cute.writers.launch import build, launch
from openmla.core.layout import BYTE_LAYOUT_NAMES, kv_layout
from openmla.core.problem import AppendProblem
from openmla.core.target import Target
from openmla.mods import Rope
from openmla.reference import quant

H100 = Target.preset("h100_sxm")
REGISTERS = 64  # of 128 threads: 8 CTAs per SM
PAGE_SIZE, NUM_PAGES = 5, 4
PROBLEM = AppendProblem(576, torch.bfloat16, kv_layout("fp8_656"), 64, 100, 64)


class WriterCta(Cta):
    """Adds packed 16-bit arithmetic, byte permutes, choices bit by bit, bytes to memory and conversions to e4m3."""

    def do_min(self, p: list[str], o: list[str]) -> Any:
        if p[-1] == "f32":
            return self._map(o, "f32", "f32", np.minimum if "NaN" in p else np.fmin)
        if p[-1] != "f16x2":
            return super().do_min(p, o)
        assert p[1:3] == ["xorsign", "abs"]

        def smaller(a: np.ndarray, b: np.ndarray) -> np.ndarray:  # of magnitudes, which compare like their bits
            a, b = a.view(np.uint16), b.view(np.uint16)
            return (np.minimum(a & 0x7FFF, b & 0x7FFF) | (a ^ b) & 0x8000).view(np.uint32)

        return self._map(o, "u32", "u32", smaller)

    def do_max(self, p: list[str], o: list[str]) -> Any:
        if p[-1] == "f32":
            return self._map(o, "f32", "f32", np.maximum if "NaN" in p else np.fmax)
        if p[-1] != "bf16x2":
            return super().do_max(p, o)
        assert p[1:4] == ["NaN", "xorsign", "abs"]

        def larger(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            a, b = a.view(np.uint16), b.view(np.uint16)
            size = np.maximum(a & 0x7FFF, b & 0x7FFF)
            return np.where(size > 0x7F80, 0x7FFF, size | (a ^ b) & 0x8000).astype(np.uint16).view(np.uint32)

        return self._map(o, "u32", "u32", larger)

    def do_mul(self, p: list[str], o: list[str]) -> Any:
        if p[-1] != "bf16x2":
            return super().do_mul(p, o)

        def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            pair = [torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16).float() for x in (a, b)]
            return (pair[0] * pair[1]).bfloat16().view(torch.int16).numpy().view(np.uint32)

        return self._map(o, "u32", "u32", product)

    def do_lop3(self, p: list[str], o: list[str]) -> Any:
        assert int(o[-1], 0) == 0xE4
        return self._map(o[:-1], "u32", "u32", lambda a, b, where: a & where | b & ~where)

    def do_prmt(self, p: list[str], o: list[str]) -> Any:
        def permute(a: np.ndarray, b: np.ndarray, how: np.ndarray) -> np.ndarray:
            both = np.concatenate([np.ascontiguousarray(x).view(np.uint8).reshape(32, 4) for x in (a, b)], 1)
            picks = how[:, None] >> np.arange(0, 16, 4).astype(np.uint32) & 15
            assert (picks < 8).all()
            return np.ascontiguousarray(np.take_along_axis(both, picks.astype(np.int64), 1)).view(np.uint32).reshape(32)

        return self._map(o, "u32", "u32", permute)

    def do_st(self, p: list[str], o: list[str]) -> Any:
        if p[-1] != "b8":
            return super().do_st(p, o)
        where, read = self.address(o[0]), self.reader(o[1], "u32")

        def write(warp: Warp, mask: np.ndarray) -> None:
            self.store("global", where(warp)[mask], (read(warp)[mask, None] & 255).astype(np.uint8))

        return write

    def do_cvt(self, p: list[str], o: list[str]) -> Any:
        if p[-2] != "e4m3x2":
            return super().do_cvt(p, o)
        write, high, low = self.writer(o[0]), self.reader(o[1], "f32"), self.reader(o[2], "f32")

        def code(x: np.ndarray) -> np.ndarray:
            bits = torch.from_numpy(np.clip(x, -448, 448)).to(torch.float8_e4m3fn).view(torch.uint8)
            return bits.numpy().astype(np.uint16)

        return lambda warp, mask: write(warp, mask, code(low(warp)) | code(high(warp)) << 8)


@cache
def compiled(config: writers.Config) -> tuple[Any, str]:
    """(resources, PTX)."""
    pytest.importorskip("cutlass")
    with TemporaryDirectory() as folder:
        return build(config, Path(folder)).resources, (Path(folder) / f"{config.name}.ptx").read_text()


class Emulated:
    """What `launch` calls: the kernel's arguments, packed as its host code packs them."""

    def __init__(self, config: writers.Config, *tensors: torch.Tensor) -> None:
        self.config, self.tensors = config, {each.data_ptr(): each for each in tensors}

    def __call__(self, rows, cache, fault, *numbers):
        memory, program = Memory(), parse(compiled(self.config)[1])
        values = [
            describe(memory, rows, [False, True], [False, True]),
            describe(memory, cache, [False, False, True, True], [False, False, False, True]),
            describe(memory, fault, [True], [True]),
        ]
        addresses = [memory.place(self.tensors[x]) if x else 0 for x in numbers[:4]]
        values += [np.array([x], np.uint64).tobytes() for x in addresses]
        values += [np.array([x], np.int32).tobytes() for x in numbers[4:]]
        cta = WriterCta(program, memory, dict(zip(program.params, values, strict=True)), 32 * self.config.warps, 0)
        for x in range(-(-rows.shape[0] // (writers.TOKENS * self.config.warps))):
            cta.run((x, 0, 0), seed=x)
        memory.read_back()


def append(cache, layout, slots, rows, rope=None, positions=None) -> int:
    """The fault word that the emulated kernel leaves."""
    word = torch.zeros(1, dtype=torch.int32)
    given = [each for each in (slots, positions, rope and rope.cos, rope and rope.sin) if each is not None]
    operands = AppendOperands(cache, slots, rows, word, rope, positions)
    launch(Emulated(writers.Config(layout), *given), kv_layout(layout).is_quantised, operands)
    return int(word)


@cache
def gate() -> Any:
    """The GPU script: its caches and numbers."""
    path = Path(__file__).parents[1] / "gpu" / "writers.py"
    spec = importlib.util.spec_from_file_location("gpu_writers", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def poisoned(layout: str) -> torch.Tensor:
    return gate().poisoned(layout, NUM_PAGES, PAGE_SIZE)


def bytes_of(cache: torch.Tensor) -> torch.Tensor:
    return gate().bytes_of(cache)


def tokens(d_qk: int) -> torch.Tensor:
    """Rows of very different size: zeros, tiny, ordinary, large, exact powers of two at the edges of scales, ties."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(9, d_qk, generator=generator)
    rows[1] = 0
    rows[2] *= 1e-4
    rows[3] *= 1000
    rows[4] = torch.exp2(torch.randint(-8, 9, (d_qk,), generator=generator).float()) * rows[4].sign()
    rows[5] = rows[5].clamp(-1, 1)
    rows[5, 0] = 448.0
    rows[6, ::2] = -0.0
    rows[7] = (rows[7] * 8).round() / 8
    return rows.to(torch.bfloat16)


@pytest.mark.parametrize("config", writers.VARIANTS, ids=lambda config: config.layout)
def test_variant_compiles_within_budget(config):
    resources, text = compiled(config)
    assert resources.spills == 0, resources
    assert resources.registers <= REGISTERS, resources
    assert resources.static_smem_bytes + resources.dynamic_smem_bytes <= 1024, resources  # what every kernel reserves
    assert text.count("v4.b32") >= config.stored.d_qk // writers.CHUNK  # a token's columns at once


@pytest.mark.parametrize("layout", writers.LAYOUTS)
@pytest.mark.parametrize("kind", ["", "pairs", "halves"])
def test_bytes_are_those_of_the_reference(layout, kind):
    rows = tokens(kv_layout(layout).d_qk)
    slots = torch.tensor([3, 17, -1, 0, 19, 5, 11, 12, 4])
    mine, expected = poisoned(layout), poisoned(layout)
    if kind:
        rope = Rope.of_base(64, 100, base=50.0, is_interleaved=kind == "pairs")
        positions = torch.tensor([0, 1, 2, 99, 50, 7, 8, 33, -3], dtype=torch.int64 if kind == "pairs" else torch.int32)
        word = append(mine, layout, slots if kind == "halves" else slots.to(torch.int32), rows, rope, positions)
        rows = rope.rotated(rows[:, None], rows.shape[1] - 64, positions)[:, 0]
    else:
        word = append(mine, layout, slots, rows)
    quant.write_rows(expected, layout, slots, rows)
    assert torch.equal(bytes_of(mine), bytes_of(expected))
    assert word == 0


@pytest.mark.parametrize("layout", BYTE_LAYOUT_NAMES)
@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_a_group_that_is_not_finite_reads_as_nan(layout, odd):
    rows = tokens(kv_layout(layout).d_qk)[-2:]
    rows[0, 3] = odd
    rows[0, 300] = odd
    mine, expected = poisoned(layout), poisoned(layout)
    slots = torch.tensor([6, 7])
    append(mine, layout, slots, rows)
    quant.write_rows(expected, layout, slots, rows)
    found, golden = (quant.read_rows(each, layout, slots) for each in (mine, expected))
    torch.testing.assert_close(found, golden, rtol=0, atol=0, equal_nan=True)
    assert bool(found[0].isnan().any())
    assert bool(found[1].isfinite().all())


@pytest.mark.parametrize("bad", [-2, 20, 2**31 - 1, -(2**31), -(2**40), 2**40, 2**40 + 3, 2**32 - 1, -(2**32) + 3])
def test_a_bad_slot_stores_nothing_and_is_noted(bad):
    rows = tokens(576)[:6]
    mine, expected = poisoned("fp8_656"), poisoned("fp8_656")
    word = append(mine, "fp8_656", torch.tensor([2, bad, 9, 10, bad, 11]), rows)
    quant.write_rows(expected, "fp8_656", torch.tensor([2, -1, 9, 10, -1, 11]), rows)
    assert torch.equal(bytes_of(mine), bytes_of(expected))
    assert word == 8
    if -(2**31) <= bad < 2**31:
        mine = poisoned("fp8_656")
        assert append(mine, "fp8_656", torch.tensor([2, bad, 9, 10, bad, 11], dtype=torch.int32), rows) == 8
        assert torch.equal(bytes_of(mine), bytes_of(expected))


@pytest.mark.parametrize("layout", ["bf16_576", "fp8_528"])
@pytest.mark.parametrize("interleaved", [True, False])
def test_a_position_behind_the_tables_is_nan(layout, interleaved):
    stored = kv_layout(layout)
    rows, mine = tokens(stored.d_qk)[:5], poisoned(layout)
    positions = torch.tensor([9, 10, 2**32, -(2**33), 2**31])
    append(mine, layout, torch.arange(5), rows, Rope.of_base(64, 10, is_interleaved=interleaved), positions)
    found = quant.read_rows(mine, layout, torch.arange(5))[:, -64:]
    assert found.isnan().all(1).tolist() == [False, True, True, False, True]
    assert not found[[0, 3]].isnan().any()


def test_strided_slots_positions_and_tables():
    layout, rows = "fp8_584", tokens(512).repeat(1, 2)[:, 512:]
    slots = torch.tensor([3, 17, 0, 19, 5, 11, 12, 4, 9])
    rope = Rope.of_base(64, 100)
    wide = Rope(*(torch.cat([each, each], 1)[:, :32] for each in (rope.cos, rope.sin)))
    positions = torch.arange(18).view(9, 2)[:, 1]
    mine, expected = poisoned(layout), poisoned(layout)
    assert append(mine, layout, torch.stack([slots, slots - 99], 1)[:, 0], rows, wide, positions) == 0
    quant.write_rows(expected, layout, slots, rope.rotated(rows[:, None], 448, positions)[:, 0])
    assert torch.equal(bytes_of(mine), bytes_of(expected))


@pytest.mark.parametrize("layout", ["fp8_656", "fp8_584", "fp8_528_mx"])
def test_every_e4m3_code_of_every_bf16_number(layout):
    check_groups(layout, gate().e4m3_groups(kv_layout(layout).scale_group, (1.0, 2.0**90)))


def test_every_e2m1_code_of_every_quotient():
    check_groups("fp4_288", gate().e2m1_groups(range(1, 127)))


def test_every_scale_of_e2m1():
    """Largest magnitudes from below the smallest scale to beyond the largest one."""
    check_groups("fp4_288", gate().peak_groups(16, 0x3F80 - 12 * 128, 0x3F80 + 13 * 128))


def check_groups(layout: str, groups: torch.Tensor) -> None:
    """Groups of columns, as many tokens as they fill."""
    rows = gate().rows_of(layout, groups)
    pages = -(-len(rows) // PAGE_SIZE)
    mine, expected = (gate().poisoned(layout, pages, PAGE_SIZE) for _ in range(2))
    slots = torch.arange(len(rows))
    assert append(mine, layout, slots, rows) == 0
    quant.write_rows(expected, layout, slots, rows)
    assert torch.equal(bytes_of(mine), bytes_of(expected))


# ---------------------------------------------------------------------- what it takes


@pytest.mark.parametrize("layout", writers.LAYOUTS)
@pytest.mark.parametrize("d_rope", [0, 64])
def test_supported_problems_get_a_variant_that_is_built(layout, d_rope):
    stored = kv_layout(layout)
    problem = replace(PROBLEM, layout=stored, d_qk=stored.d_qk, d_rope=d_rope, page_size=7)
    assert writers.supports(problem, H100)
    assert writers.configs(problem, H100)[0] in writers.VARIANTS


@pytest.mark.parametrize(
    ("problem", "word"),
    [
        (replace(PROBLEM, dtype=torch.float16), "bf16"),
        (replace(PROBLEM, d_rope=32), "rotates 64"),
        (replace(PROBLEM, layout=kv_layout("bf16_192"), d_qk=192), "bf16_192"),
        (replace(PROBLEM, is_aligned=False), "16 bytes"),
        (replace(PROBLEM, num_pages=2**30), "slots"),
    ],
)
def test_what_it_does_not_take_is_said(problem, word):
    assert any(word in reason for reason in writers.supports(problem, H100).reasons)


def test_alignment_is_part_of_the_problem():
    """Of cache, rows and tables, whatever makes a copy of 16 bytes impossible."""

    def problem(cache, rows, rope=None):
        slots = torch.zeros(len(rows), dtype=torch.int64)
        return AppendProblem.from_tensors(
            cache, slots, rows, layout="fp8_656", rope=rope, positions=None if rope is None else slots
        ).is_aligned

    cache, rows = kv_layout("fp8_656").empty_cache(3, 4), torch.zeros(2, 576, dtype=torch.bfloat16)
    assert problem(cache, rows)
    assert problem(cache, rows, Rope.of_base(64, 5))
    assert not problem(cache, torch.zeros(2, 577, dtype=torch.bfloat16)[:, :576])
    assert not problem(cache, torch.zeros(2 * 576 + 1, dtype=torch.bfloat16)[1:].view(2, 576))
    apart = torch.zeros(3, 4 * 656 + 8, dtype=torch.uint8).as_strided((3, 4, 1, 656), (4 * 656 + 8, 656, 656, 1))
    assert not problem(apart, rows)
    tables = Rope.of_base(64, 5)
    assert not problem(cache, rows, Rope(*(torch.cat([x, x[:, :1]], 1)[:, :32] for x in (tables.cos, tables.sin))))
