"""`append`: one rule for tensors, and the same bytes whoever runs it. The Triton kernel: tests/interpret/test_append.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from openmla import PagedKVCache, backends
from openmla.core.cost import cost
from openmla.core.errors import ProblemError, UnsupportedError
from openmla.core.layout import BYTE_LAYOUT_NAMES, kv_layout
from openmla.core.problem import AppendProblem
from openmla.core.target import Target
from openmla.mods import Rope
from openmla.ops.append import append
from openmla.reference import quant

LAYOUTS = [*BYTE_LAYOUT_NAMES, "bf16_576"]


def rows_of(layout: str, count: int = 5) -> torch.Tensor:
    return torch.randn(count, kv_layout(layout).d_qk, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rope_and_packing_are_those_of_the_reference(layout):
    rows, slots = rows_of(layout), torch.tensor([3, -1, 0, 7, 11], dtype=torch.int32)
    mine, expected = (kv_layout(layout).empty_cache(3, 4).zero_() for _ in range(2))
    rope, positions = Rope.of_base(64, 100), torch.tensor([0, 1, 99, 50, 7])
    append(mine, slots, rows, kv_layout=layout, rope=rope, positions=positions)
    turned = rope.rotated(rows[:, None], rows.shape[1] - 64, positions)[:, 0]
    assert not torch.equal(turned, rows)
    quant.write_rows(expected, layout, slots, turned)
    assert torch.equal(mine, expected)


def test_a_paged_cache_rotates_on_the_way():
    rope, positions = Rope.of_base(64, 100), torch.tensor([5, 6])
    rows = rows_of("fp8_656", 2)
    caches = [PagedKVCache("fp8_656", 4, 4) for _ in range(2)]
    for cache in caches:
        cache.alloc("a")
    caches[0].write(0, caches[0].extend(["a"], [2]), rows, rope=rope, positions=positions)
    caches[1].write(0, caches[1].extend(["a"], [2]), rope.rotated(rows[:, None], 512, positions)[:, 0])
    assert torch.equal(caches[0].gather(0, "a"), caches[1].gather(0, "a"))


def test_every_violation_is_named_at_once():
    cache = torch.zeros(2, 4, 2, 64)
    with pytest.raises(ProblemError) as caught:
        append(cache, torch.zeros(3), torch.zeros(2, 64), rope=Rope.of_base(128, 4))
    text = str(caught.value)
    for rule in (
        "slots must be int64 or int32",
        "belong together",
        "one KV head",
        "rotates 128 columns, but rows have 64",
    ):
        assert rule in text, text
    with pytest.raises(ProblemError, match="3 entries like rows"):
        append(torch.zeros(2, 4, 1, 64), torch.zeros(2, dtype=torch.int64), torch.zeros(3, 64))
    with pytest.raises(ProblemError, match="rows has d_qk=32 columns but cache in layout fp32_64 has 64"):
        append(torch.zeros(2, 4, 1, 64), torch.tensor([0]), torch.zeros(1, 32))
    with pytest.raises(ProblemError, match="got 8"):
        append(torch.zeros(2, 4, 1, 64), torch.tensor([8]), torch.zeros(1, 64), backend="torch")


def test_the_table_knows_who_writes():
    asked = backends.typical_problem("append")
    found = backends.explain(asked, target="h100_sxm")
    assert [row.backend for row in found.candidates] == ["cute", "triton", "torch"]
    assert isinstance(asked, AppendProblem)
    assert cost(asked, seqlens_k=[2, 3]).bytes == 5 * (576 * 2 + 656)
    other = replace(
        asked, layout=kv_layout("fp4_288"), d_qk=512, dtype=torch.float16
    )  # which the Hopper one does not take
    assert backends.select(other, Target.preset("h100_sxm")).kernel.backend == "triton"
    assert backends.select(other, Target.preset("cpu")).kernel.backend == "torch"
    with pytest.raises(UnsupportedError, match="sm_90a"):
        backends.select(asked, Target.preset("a100_sxm"), "cute")
