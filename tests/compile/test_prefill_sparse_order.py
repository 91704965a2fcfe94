"""What puts the lists of a sparse prefill in the order of their rows, without a GPU: its machine code, and when it is asked."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch

from openmla.backends.base import SparsePrefillOperands
from openmla.backends.cute import gathered
from openmla.backends.cute.prefill_sparse import config as gather
from openmla.core.problem import SparsePrefillProblem
from openmla.core.target import Target

H100 = Target.preset("h100_sxm")
WIDE = SparsePrefillProblem(4096, 65536, 64, 1, 512, 512, torch.bfloat16, 512)


@cache
def compiled() -> Any:
    pytest.importorskip("cutlass")
    from ptx_program import parse

    from openmla.backends.cute.prefill_sparse.launch import build_order

    with TemporaryDirectory() as folder:
        made = build_order(gather.Order(), Path(folder))
        return parse((Path(folder) / f"{made.name}.ptx").read_text()), made.resources


def ordered(indices: torch.Tensor, lengths: list[int] | None, rows: int, parts: int) -> torch.Tensor:
    """What the machine code writes over -777."""
    from ptx_grid import launch
    from ptx_program import Memory, describe

    program, resources = compiled()
    memory, out = Memory(), torch.full(indices.shape, -777, dtype=torch.int32)

    def free(tensor: torch.Tensor, unit: tuple[int, ...] = ()) -> Any:
        return describe(memory, tensor, [False] * tensor.dim(), [d in unit for d in range(tensor.dim())])

    share = np.float32(32) / np.float32(rows)
    params = [
        free(indices, (1,)), free(torch.tensor(lengths or [0] * len(indices), dtype=torch.int32)), free(out, (1,)),
        share.tobytes(), np.int32(parts).tobytes(), np.int32(lengths is not None).tobytes(),
    ]  # fmt: skip
    ctas = [(token, 0, 0) for token in range(len(indices))]
    launch(program, memory, params, ctas, 128, resources.dynamic_smem_bytes, 1)
    memory.read_back()
    return out


def test_it_compiles_without_spills():
    resources = compiled()[1]
    assert resources.spills == 0
    assert resources.registers <= 40  # 12 CTAs of an SM keep their loads in flight


@pytest.mark.parametrize(
    ("topk", "rows", "parts", "lengths"),
    [
        pytest.param(300, 1000, 2, None, id="every-index"),
        pytest.param(1100, 131072, 1, [0, 1100, 1029], id="two-batches-of-loads"),
        pytest.param(64, 3, 1, [5000, -3, 64, 1], id="fewer-rows-than-buckets"),
    ],
)
def test_a_list_is_the_same_entries_by_where_their_rows_lie(topk, rows, parts, lengths):
    tokens = len(lengths or range(5))
    g = torch.Generator().manual_seed(topk)
    indices = torch.randint(-2, rows + 2, (tokens, topk), dtype=torch.int32, generator=g)
    indices[0, :2] = torch.tensor([-(2**31), 2**31 - 1], dtype=torch.int32)
    out = ordered(indices, lengths, rows, parts)
    seen = set()
    for token in range(tokens):
        length = topk if lengths is None else min(max(lengths[token], 0), topk)
        mine = out[token, :length]
        assert torch.equal(mine.sort().values, indices[token, :length].sort().values)
        assert bool((out[token, length:] == -777).all())  # nobody reads those
        buckets = (mine.float() * (torch.tensor(32.0) / rows)).clamp(0, 31).int()
        is_back = token // parts % 2 == 1
        assert bool((buckets.diff() <= 0).all() if is_back else (buckets.diff() >= 0).all())
        seen.add(is_back)
    assert seen == {False, True}


def test_lists_are_ordered_where_rows_do_not_fit_and_turns_follow_one_another():
    assert gather.is_ordered(WIDE, H100)
    assert not gather.is_ordered(replace(WIDE, s_kv=50_000), H100)  # all in L2
    assert not gather.is_ordered(replace(WIDE, h_q=128), H100)  # twice the work beside as many bytes
    assert gather.is_ordered(replace(WIDE, h_q=128, s_kv=131_072), H100)
    assert not gather.is_ordered(WIDE, replace(H100, l2_bytes=0))  # of unknown size
    assert not gather.is_ordered(replace(WIDE, s_q=132), H100)  # one turn
    assert not gather.is_ordered(replace(WIDE, topk=500), H100)
    assert not gather.is_ordered(replace(WIDE, topk=4096), H100)
    assert not gather.is_ordered(replace(WIDE, s_q=131_073), H100)  # their memory


def test_the_gather_reads_the_ordered_lists_and_the_same_lengths():
    """In turns of as many tokens as are computed at the same time."""
    asked, seen = [], []

    def order(indices, lengths, out, rows, parts, has_length):
        asked.append((lengths, rows, parts, has_length))
        out.copy_(indices.flip(-1))

    q, kv = torch.zeros(5, 3, 576, dtype=torch.bfloat16), torch.zeros(40, 1, 576, dtype=torch.bfloat16)
    indices = torch.arange(45, dtype=torch.int32).view(5, 1, 9)
    logits, length = torch.zeros(5, 3), torch.tensor([9, 1, 2, 3, 4], dtype=torch.int32)
    operands = SparsePrefillOperands(
        q, kv, indices, 0.1, torch.zeros(5, 3, 512, dtype=torch.bfloat16), logits, logits.clone(),
        torch.zeros(1, dtype=torch.int32), length,
    )  # fmt: skip
    config = gather.variant("rows", 576)
    made = gathered.Compiled(config, 4, lambda *given: seen.append(given), order=order)
    gathered.SPARSE_PREFILL.launch(made, WIDE, operands, None)
    assert len(asked) == 1 and asked[0][0] is length and asked[0][1:] == (40, 4, 1)
    assert torch.equal(seen[0][2], indices[:, 0].flip(-1)) and seen[0][3] is length
    assert torch.equal(indices.flatten(), torch.arange(45, dtype=torch.int32))  # the caller's stay as they are
