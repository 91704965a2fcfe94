"""Mods inlined by Triton: each function against its own PyTorch form in fp64, whole and split."""

from __future__ import annotations

import dataclasses
import inspect
import linecache
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

import openmla
from openmla.backends.triton import mod_math
from openmla.backends.triton.inline import _table, compiled_form
from openmla.core.faults import Fault
from openmla.mods import Rope, activation, attach, m, mask_mod, math, score_mod
from openmla.reference import attention
from openmla.testing import budget
from openmla.testing.cases import Case, native_arguments
from openmla.testing.mod_cases import library_cases

CASE = Case(
    op="decode", seed=3, family="unit", dtype=torch.float16, h_q=4, h_kv=2, d_qk=40, d_v=32, softmax_scale=0.3,
    seqlens_q=(2, 2, 2), seqlens_k=(90, 0, 33), is_causal=True, page_size=16,
)  # fmt: skip
LIBRARY = library_cases()


def judge(case: Case, given: Any, operands: dict[str, Any] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Triton against the oracle, and its faults against those of the torch backend."""
    operands = operands or case.tensors()
    arguments = native_arguments("decode", operands)
    openmla.decode(**arguments, mods=given, backend="torch")
    expected = openmla.check_errors()
    out, lse = openmla.decode(**arguments, mods=given, backend="triton")
    assert openmla.check_errors() == expected
    golden = attention.decode(**operands, mods=given, precision="fp64", with_bounds=True)
    budget.check(out, lse, golden, dtype=case.dtype).require(str(attach(given).form))
    return out, lse


@pytest.mark.parametrize("name", LIBRARY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sms", [1, 9])
def test_library(name, dtype, sms, machine):
    machine(sms)
    judge(dataclasses.replace(CASE, dtype=dtype), LIBRARY[name])


@pytest.mark.parametrize("name", ["several", "sigmoid with others"])
@pytest.mark.parametrize(
    "changes",
    [
        {"is_varlen": True, "seqlens_q": (1, 0, 2)},
        {"window": 9},
        {"page_size": 3, "softmax_scale": -0.3},
        {"softmax_scale": 0.0},
        {"layout": "fp8_656", "d_qk": 576, "d_v": 512, "h_kv": 1, "dtype": torch.float32, "seqlens_k": (40, 0, 7)},
    ],
)
def test_options_beside_mods(name, changes, machine):
    machine(7)
    given = library_cases(d_rope=64 if "layout" in changes else 8, capacity=128)[name]
    judge(dataclasses.replace(CASE, **changes), given)


def test_a_promised_window_skips_tiles(machine):
    """Pages in front of the window do not exist: whoever reads them leaves a fault."""
    machine(3)
    case = dataclasses.replace(CASE, seqlens_q=(1, 1, 1))
    operands = case.tensors()
    operands["block_table"][0, :4] = 10**6
    judge(case, LIBRARY["sliding_window"], operands)
    openmla.decode(**native_arguments("decode", operands), mods=LIBRARY["sliding_window"], backend="triton")
    assert openmla.check_errors() == ()


def test_scores_kept_apart(machine, monkeypatch):
    """The form of the tile that Hopper gets."""
    from openmla.backends.triton import launch

    monkeypatch.setattr(launch, "kept_apart", lambda config, problem, target: "all")
    machine(4)
    judge(dataclasses.replace(CASE, softmax_scale=3.0), LIBRARY["several"])
    judge(CASE, LIBRARY["sigmoid with others"])


def test_keys_that_are_hidden_do_not_matter(machine):
    """NaN in a key that the mask hides from half of the heads reaches the others only."""
    machine(1)

    @mask_mod
    def odd_heads_see_all(b, h, q_idx, kv_idx):
        return (m.mod(h, 2) == 1) | (kv_idx < 10)

    case = dataclasses.replace(CASE, h_kv=1)
    operands = case.tensors()
    operands["kv_cache"][int(operands["block_table"][0, 1]), 3] = torch.nan
    out, _ = judge(case, odd_heads_see_all, operands)
    assert bool(out[0, :, ::2].isfinite().all())
    assert bool(out[0, :, 1::2].isnan().all())


def test_weights_that_may_be_negative_add_up(machine):
    """Parts of a split request may have sums below 0; only the whole counts."""
    machine(9)

    @activation
    def linear(score, b, h, q_idx, kv_idx):
        return score

    case = dataclasses.replace(CASE, dtype=torch.float32)
    given = native_arguments("decode", case.tensors())
    out, lse = openmla.decode(**given, mods=linear, backend="triton")
    expected, expected_lse = openmla.decode(**given, mods=linear, backend="torch")
    assert bool(lse.isnan().any()) and bool((lse > 0).any())
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_a_position_behind_the_tables_is_nan(machine):
    machine(1)
    operands = CASE.tensors()
    operands["cache_seqlens"] = torch.tensor([111, 0, 33], dtype=torch.int32)
    operands["block_table"].clamp_(0, operands["kv_cache"].shape[0] - 1)
    out, _ = openmla.decode(**native_arguments("decode", operands), mods=Rope.of_base(8, 97), backend="triton")
    assert bool(out[0].isnan().all())
    assert bool(out[2].isfinite().all())


def test_bad_pages_beside_mods_are_masked_and_noted(machine):
    machine(3)
    operands = CASE.tensors()
    operands["block_table"][0, 1] = 10**6
    judge(CASE, LIBRARY["several"], operands)
    openmla.decode(**native_arguments("decode", operands), mods=LIBRARY["several"], backend="triton")
    assert openmla.check_errors() == (Fault.PAGE_OUT_OF_RANGE,)


def test_the_same_input_gives_the_same_bits(machine):
    machine(7)
    given = native_arguments("decode", CASE.tensors())
    first, again = (openmla.decode(**given, mods=LIBRARY["several"], backend="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_page_runs_on_torch_and_on_triton_unchanged(machine, monkeypatch):
    """The blocks of docs/mods.md, with the backend named from outside."""
    machine(4)
    page = Path(__file__).resolve().parents[2] / "docs" / "mods.md"
    found = {}
    for backend in ("torch", "triton"):
        monkeypatch.setenv("OPENMLA_BACKEND", backend)
        scope: dict[str, Any] = {"__name__": "page"}
        for number, block in enumerate(
            re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
        ):
            name = f"mods.md block {number} for {backend}"
            linecache.cache[name] = (len(block), None, block.splitlines(True), name)
            exec(compile(block, name, "exec"), scope)
            if "out" in scope:  # the first block only defines a mod
                found[backend, number] = (scope["out"], scope["lse"])
        source = inspect.getsource(scope["fading"].function)
        assert len(re.sub(r'""".*?"""', "", source).split("\n")) - 2 <= 5
    assert len(found) == 6
    for number in (1, 2, 3):
        (out, lse), (mine, my_lse) = found["torch", number], found["triton", number]
        torch.testing.assert_close(mine, out, rtol=2e-3, atol=1e-3)
        torch.testing.assert_close(my_lse, lse, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------ the functions of m


@triton.jit
def evaluate(x_ptr, i_ptr, out_ptr, table, FUNCTION: tl.constexpr, COUNT: tl.constexpr):
    place = tl.arange(0, COUNT)
    q_idx = tl.load(i_ptr + place)
    found = FUNCTION(tl.load(x_ptr + place), 0, 0, q_idx, q_idx * 0 + 3, table)
    tl.store(out_ptr + place, tl.cast(found, tl.float32))


@score_mod
def elementary(score, b, h, q_idx, kv_idx, table):
    small = m.tanh(score) + m.sigmoid(score) * m.abs(score) + m.exp(-m.abs(score)) + m.exp2(m.minimum(score, 3.0))
    large = m.log(1.0 + m.abs(score)) - m.log2(2.0 + score * score) + m.sqrt(m.maximum(score, 0))
    return small + large + 0 * m.load(table, q_idx)


@score_mod
def integers(score, b, h, q_idx, kv_idx, table):
    quotient = m.floordiv(q_idx, 3) * 100 + m.mod(q_idx, -7) + m.mod(q_idx, kv_idx)
    bits = m.where((q_idx > 2) ^ ~(kv_idx != 3), 1000, q_idx & 5) + m.maximum(q_idx, -kv_idx) + (q_idx | 8)
    return quotient + bits + m.load(table, q_idx + kv_idx) / 2


@score_mod
def infinite(score, b, h, q_idx, kv_idx, table):
    return m.where(m.load(table, q_idx) > 2, -m.inf, m.inf)


@pytest.mark.parametrize("mod", [elementary, integers, infinite], ids=str)
def test_functions_mean_the_same(mod):
    score = torch.linspace(-9, 9, 64)
    place = torch.arange(-32, 32, dtype=torch.int32)
    table = torch.arange(10, dtype=torch.float16)
    found = torch.empty(64)
    evaluate[(1,)](score, place, found, _table(table), compiled_form(mod), 64)
    expected = mod(score.double(), 0, 0, place, torch.tensor(3, dtype=torch.int32), table).float()
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_tables_of_every_dtype(dtype):
    @score_mod
    def read(score, b, h, q_idx, kv_idx, table):
        return m.where(m.load(table, q_idx) != 0, score, -1.0)

    score, place = torch.arange(16.0), torch.arange(16, dtype=torch.int32) - 4
    table = torch.tensor([1, 0, 1, 1, 0, 1, 0, 0]).to(dtype)
    found = torch.empty(16)
    evaluate[(1,)](score, place, found, _table(table), compiled_form(read), 16)
    assert torch.equal(found, read(score, 0, 0, place, 0, table))


def test_triton_has_every_function():
    assert all(hasattr(mod_math, name) for name in math.NAMES)
