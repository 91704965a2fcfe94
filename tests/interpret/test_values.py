"""The value check of OPENMLA_CHECKS=device, as Triton's interpreter runs it, beside the search in PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from openmla.backends.triton import values
from openmla.core import faults
from openmla.core.problem import (
    AppendProblem,
    DecodeProblem,
    PrefillProblem,
    SparseDecodeProblem,
    SparsePrefillProblem,
)
from openmla.ops import checks


@dataclass
class Operands:
    """What the checks look at."""

    out: torch.Tensor
    block_table: torch.Tensor | None = None
    cache_seqlens: torch.Tensor | None = None
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    indices: torch.Tensor | None = None
    topk_length: torch.Tensor | None = None
    extra_indices: torch.Tensor | None = None
    extra_topk_length: torch.Tensor | None = None
    slots: torch.Tensor | None = None


def found(problem: Any, operands: Operands) -> list[tuple[str, int]]:
    """(tensor, value) of the one finding that the kernel keeps, which must be among those of the search."""
    record = torch.zeros(8, dtype=torch.int32)
    values.check(problem, operands, record)
    code, *rest = record.tolist()
    listed = {(each.tensor, each.fault, each.value) for each in checks.search(problem, operands)}
    assert bool(code) == bool(listed), (record, listed)
    if not code:
        return []
    kept = faults._decoded(code, rest)
    assert str(kept.value) in str(kept) and kept.tensor in {name for name, _, _ in listed}, (kept, listed)
    return [(kept.tensor, kept.value)]


def ints(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def decode() -> tuple[DecodeProblem, Operands]:
    """Two requests of 3 and 700 tokens in pages of 2; garbage where no token lies."""
    table = torch.full((3, 400), -9, dtype=torch.int32)
    table[0, :2], table[1, :350] = ints(0, 5), torch.arange(350, dtype=torch.int32) % 6
    q, kv = torch.zeros(2, 1, 1, 8), torch.zeros(6, 2, 1, 8)
    operands = Operands(q, table[:2, :], ints(3, 700, 0)[:2])
    return DecodeProblem.from_tensors(q, kv, operands.block_table, operands.cache_seqlens, d_v=4), operands


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("block_table", (0, 1), 6),
        ("block_table", (1, 300), -1),
        ("block_table", (1, 349), 2**31 - 1),
        ("cache_seqlens", (0,), -1),
        ("cache_seqlens", (1,), -(2**31)),
    ],
)
def test_a_bad_value_of_dense_decode(name, place, value):
    problem, operands = decode()
    assert found(problem, operands) == []
    getattr(operands, name)[place] = value
    assert found(problem, operands) == [(name, value)]


def test_a_length_beyond_the_table_reaches_garbage_too():
    problem, operands = decode()
    operands.cache_seqlens[0] = 801
    assert found(problem, operands) == [("cache_seqlens", 801)]


def test_offsets():
    q, k = torch.zeros(300, 1, 8), torch.zeros(9, 1, 8)
    good = torch.arange(301, dtype=torch.int32)
    problem = PrefillProblem.from_tensors(q, k, k, good, good % 10, 1, 9)
    for place, value in ((0, 1), (299, 301), (300, 299), (7, 5)):
        cu = good.clone()
        cu[place] = value
        operands = Operands(q, cu_seqlens_q=cu, cu_seqlens_k=(good * 9) // 300)
        ((name, kept),) = found(problem, operands)
        assert name == "cu_seqlens_q" and kept in cu.tolist()
    assert found(problem, Operands(q, cu_seqlens_q=good, cu_seqlens_k=(good * 9) // 300)) == []


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(
    ("place", "value"), [((1, 0, 299), 13), ((0, 1, 0), -2), ((1, 1, 100), 2**31 - 1), ((0, 0, 255), -(2**31))]
)
def test_indices(per_token, place, value):
    q, kv = torch.zeros(2, 2, 1, 8), torch.zeros(1, 13, 1, 8)
    indices = torch.arange(1200, dtype=torch.int32).reshape(2, 2, 300) % 13
    indices[..., ::3] = -1
    length = torch.full((2, 2) if per_token else (2,), 300, dtype=torch.int32)
    problem = SparseDecodeProblem.from_tensors(q, kv, indices, d_v=4, topk_length=length)
    operands = Operands(q, indices=indices, topk_length=length)
    assert found(problem, operands) == []
    indices[place] = value
    assert found(problem, operands) == [("indices", value)]
    length[:] = 0
    assert found(problem, operands) == []
    length.view(-1)[1] = 301
    assert found(problem, operands) in ([("topk_length", 301)], [("indices", value)])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("place", "slot"), [(0, 8), (299, -2), (257, 2**31 - 1)])
def test_slots_of_an_append(dtype, place, slot):
    slots = torch.arange(300, dtype=dtype) % 9 - 1
    problem = AppendProblem.from_tensors(torch.zeros(2, 4, 1, 8), slots, torch.zeros(300, 8), layout=None)
    assert found(problem, Operands(slots, slots=slots)) == []
    slots[place] = slot
    assert found(problem, Operands(slots, slots=slots)) == [("slots", slot)]


def test_a_slot_beyond_32_bits_is_named_by_the_nearest_of_32():
    slots = torch.tensor([3, 2**40])
    problem = AppendProblem.from_tensors(torch.zeros(2, 4, 1, 8), slots, torch.zeros(2, 8), layout=None)
    record = torch.zeros(8, dtype=torch.int32)
    values.check(problem, Operands(slots, slots=slots), record)
    assert (record[2], record[3]) == (1, 2**31 - 1)


def test_rows_of_sparse_prefill_share_a_length():
    q, kv = torch.zeros(3, 2, 8), torch.zeros(5, 2, 8)
    indices = torch.zeros(3, 2, 7, dtype=torch.int32)
    length = ints(7, 3, 0)
    problem = SparsePrefillProblem.from_tensors(q, kv, indices, d_v=4, topk_length=length)
    operands = Operands(q, indices=indices, topk_length=length)
    indices[1, 1, 3] = indices[2, 0, 0] = 5
    assert found(problem, operands) == []  # behind the length
    indices[1, 1, 2] = 5
    assert found(problem, operands) == [("indices", 5)]
