"""The compiled device plan, run instruction by instruction on a CPU, is the plan of the Python function."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from ptx_grid import launch
from ptx_program import Memory, Program, describe, parse

from openmla.split.schedule import plan_decode, ranges_needed

pytest.importorskip("cutlass")
PICK = random.Random(5)
VARYING = [max(1, int(PICK.gauss(4096, 2048))) for _ in range(40)]
CAPACITY = 8192


@cache
def compiled() -> tuple[Program, int]:
    from openmla.backends.cute.schedule import DecodePlan, fake_arguments
    from openmla.backends.cute.toolchain import compile_kernel

    with TemporaryDirectory() as folder:
        made = compile_kernel(DecodePlan(), fake_arguments(), "decode_plan", out_dir=Path(folder))
        return parse((Path(folder) / "decode_plan.ptx").read_text()), made.resources.dynamic_smem_bytes


@pytest.mark.parametrize(
    ("kind", "lengths", "parts", "merge", "chunk", "margin", "merge_from"),
    [
        pytest.param("even", [1000, 0, 64, 3000], 5, 20, 0, 75, None, id="even-cuts"),
        pytest.param("one each", [1000, 0, 64, 3000], 19, 20, 0, 75, None, id="a-piece-per-part"),
        pytest.param("one each", [4160, 4160], 17, 20, 0, 75, None, id="even-cuts-would-merge-twice"),
        pytest.param("whole", VARYING, 20, 20, 0, 75, None, id="whole-requests-dealt"),
        pytest.param("cut", VARYING, 50, 3, 0, 75, None, id="long-requests-cut"),
        pytest.param("cut", VARYING, 41, 9, 0, 20, 1, id="fewer-requests-than-parts-pay"),
        pytest.param("cut", [5000, 70, 0, 9000, -5], 2, 20, 8, 75, None, id="fixed-chunks"),
        pytest.param(
            "whole", [64 * (index % 3) for index in range(520)], 30, 20, 0, 75, None, id="two-rounds-of-threads"
        ),
    ],
)
def test_the_machine_code_plans_as_python_does(kind, lengths, parts, merge, chunk, margin, merge_from):
    clamped = [min(max(length, 0), CAPACITY) for length in lengths]
    ranges = ranges_needed(len(lengths), parts)
    if chunk:
        ranges = -(-sum(max(-(-length // (64 * chunk)), 1) for length in clamped) // parts)
    plan = plan_decode(
        clamped, parts, policy="batch_invariant" if chunk else "balanced", merge_blocks=merge,
        chunk_tokens=64 * max(chunk, 1), ranges=ranges, margin=margin, merge_from=merge_from,
    )  # fmt: skip
    if kind == "one each":
        assert plan.num_pieces > plan.batch
        assert all(begin >= end for begin, end, *_ in plan.parts)
        assert not any(begin <= end for begin, end, *_ in plan.parts[parts:])
        kind = "even"
    is_list = any(begin <= end for begin, end, *_ in plan.parts[parts:]) or kind == "cut"
    assert kind == ("even" if not is_list else "cut" if plan.num_pieces > plan.batch else "whole"), "the case drifted"

    program, smem = compiled()
    memory = Memory()

    def free(tensor, fixed=(), unit=()):
        return describe(
            memory, tensor, [d in fixed for d in range(tensor.dim())], [d in unit for d in range(tensor.dim())]
        )

    metadata = torch.full((ranges, parts, 8), -7, dtype=torch.int32)
    num_splits, fault = torch.full((len(lengths) + 1,), -7, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    params = [
        free(torch.tensor(lengths, dtype=torch.int32), (), (0,)), free(metadata, (2,), (1, 2)),
        free(num_splits, (), (0,)), free(fault, (0,), (0,)),
        *(np.int32(x).tobytes() for x in (CAPACITY, 64, 5, merge, 1, chunk, margin, parts + 1 if merge_from is None else merge_from)),
    ]  # fmt: skip
    launch(program, memory, params, [(0, 0, 0)], 512, smem, 1)
    memory.read_back()
    assert torch.equal(metadata.flatten(0, 1), plan.tile_scheduler_metadata())
    assert torch.equal(num_splits, plan.num_splits_tensor())
    assert fault.item() == 2 * (min(lengths) < 0) + 4 * (max(lengths) > CAPACITY)
