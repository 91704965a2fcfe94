"""The sparse decode with keys in registers, run instruction by instruction on a CPU, against the fp64 oracle."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from ptx_machine import Cta
from ptx_program import Memory, TensorMap, describe, parse
from test_decode_sparse_ptx import functions as stored
from test_decode_sparse_ptx import gate, merge

from openmla.backends.cute.decode_sparse import config as sparse
from openmla.backends.cute.decode_sparse.launch import build
from openmla.backends.cute.sparse import SPARSE_DECODE, Compiled
from openmla.core.problem import SparseDecodeProblem

pytest.importorskip("cutlass")
SMEM = 231_424


@cache
def ptx() -> str:
    with TemporaryDirectory() as folder:
        made = build(sparse.SWAPPED, Path(folder))
        return (Path(folder) / f"{made.name}.ptx").read_text()


class Emulated:
    """What `launch` calls: the kernel's arguments, packed as its host code packs them."""

    def __init__(self, text: str) -> None:
        self.program = parse(text)

    def __call__(
        self, q, kv, indices, topk_length, extra_kv, extra_indices, extra_length, metadata, num_splits, sink, out, lse,
        out_accum, lse2_accum, fault, redo, *scalars
    ):  # fmt: skip
        blocks, page_size, _, chunk, has_length, _, has_sink, has_redo, scale = scalars
        memory = Memory()
        free = lambda tensor, fixed=(), unit=(): describe(  # noqa: E731
            memory, tensor, [d in fixed for d in range(tensor.dim())], [d in unit for d in range(tensor.dim())]
        )
        strides = [2, *(2 * q.stride(d) for d in (2, 1, 0))]
        boxes = TensorMap(memory.place(q), [q.shape[d] for d in (3, 2, 1, 0)], strides, [64, 64, 1, 1])
        values = [
            boxes, b"\0" * 12, free(q, (3,), (3,)), free(kv, (), (1,)), free(indices, (), (2,)), free(topk_length), free(metadata, (1,), (0, 1)),
            free(num_splits, (), (0,)), free(sink, (), (0,)), free(out, (3,), (3,)), free(lse), free(out_accum, (2,), (2,)),
            free(lse2_accum, (), (1,)), free(fault, (0,), (0,)), free(redo, (), (2,)),
            *(np.array([x], np.int32).tobytes() for x in (blocks, page_size, chunk, has_length, has_sink, has_redo)),
            np.array([scale], np.float32).tobytes(),
        ]  # fmt: skip
        cta = Cta(self.program, memory, dict(zip(self.program.params, values, strict=False)), 384, SMEM)
        for z in range(metadata.shape[0]):
            for y in range(q.shape[1]):
                for x in range(-(-q.shape[2] // 64)):
                    cta.run((x, y, z), seed=x + 7 * y + 31 * z)
        memory.read_back()


@cache
def functions():
    return {"swapped": Emulated(ptx()), "bf16": stored("fp8_656")["bf16"], "combine_bf16": merge}


def verdict(*args, module=None, run="swapped+bf16", **options):
    """(passed, words, fault word, whether a CTA was voided) of one case."""
    case = gate().case("emulated", "fp8_656", *args, parts=options.pop("parts", 1), **options)
    gate().run(module or functions(), run, case)
    return *gate().judged(case), case.operands.fault_word.item(), bool((case.redo == 1).any())


CASES = {
    "five tiles": ((1, 1, 64, 320), {}),
    "hostile": ((3, 1, 17, 130), {"page_size": 7, "absent": 0.2, "hostile": 0.1, "scales": True, "sink": float("inf")}),
    "hostile, scales that fit": (
        (3, 1, 17, 130),
        {"page_size": 7, "absent": 0.2, "hostile": 0.1, "sink": float("inf")},
    ),
    "two blocks of heads, lengths": ((2, 2, 80, 70), {"lengths": [[0, 1], [70, 64]]}),
    "pieces of five tiles to none": ((7, 1, 8, 320), {"lengths": [[320], [64], [128], [0], [65], [129], [256]]}),
    "three CTAs": ((1, 1, 64, 310), {"parts": 3, "queries": 6.0, "keys": 2.0}),
    "varlen": ((11, 1, 1, 3), {"varlen": True, "lengths": [3, 0, 1, 2, 3, 3, 0, 0, 3, 3, 1]}),
}


@pytest.mark.parametrize("name", CASES)
def test_case(name):
    args, options = CASES[name]
    passed, words, fault, is_void = verdict(*args, **options)
    assert passed, words
    assert fault == (8 if options.get("hostile") else 0)
    assert is_void == options.get("scales", False)


@pytest.mark.parametrize("tile", [0, 2])
def test_one_scale_in_any_tile_voids_the_cta_and_no_other(tile):
    case = gate().case("one scale", "fp8_656", 2, 1, 8, 192, parts=2, stray_nan=False)
    o = case.operands
    o.indices[1] = o.indices[1].clamp(max=2000)
    o.indices[0].clamp_(max=2000)
    o.indices[1, 0, 64 * tile + 37] = 2100
    gate().flat(o.kv_cache)[2100 * 656 + 512 : 2100 * 656 + 528].view(torch.float32)[2] = 0.3
    gate().run(functions(), "swapped+bf16", case)
    passed, words = gate().judged(case)
    assert passed, words
    assert case.redo.flatten().tolist() == [0, 1]


def test_rows_of_q_from_tiny_to_huge():
    case = gate().case("rows", "fp8_656", 1, 1, 16, 100, stray_nan=False)
    case.operands.q.mul_(torch.logspace(-36, 34, 16).view(1, 1, 16, 1))
    case.operands.q[0, 0, 3, :512] *= 1e-8  # RoPE leads
    case.operands.q[0, 0, 4, 512:] *= 1e-8
    case.operands.q[0, 0, 5] = 0.0
    gate().run(functions(), "swapped+bf16", case)
    passed, words = gate().judged(case)
    assert passed, words
    assert not case.redo.any()


@pytest.mark.parametrize("scale", [0.0, -0.05])
def test_no_scale_and_a_negative_one(scale):
    case = gate().case("scale", "fp8_656", 1, 1, 8, 70, absent=0.3, queries=20.0)
    case.operands = case.operands._replace(softmax_scale=scale)
    gate().run(functions(), "swapped+bf16", case)
    passed, words = gate().judged(case)
    assert passed, words
    assert not case.redo.any()


def test_a_nan_code_is_nan_where_it_counts():
    case = gate().case("nan", "fp8_656", 1, 1, 8, 70, stray_nan=False)
    case.operands.indices[0, 0, 5] = 7
    gate().flat(case.operands.kv_cache)[7 * 656 + 13] = 0x7F
    gate().run(functions(), "swapped+bf16", case)
    assert case.operands.lse.isnan().all() and case.operands.out[..., 13].isnan().all()


def test_the_verbs_launch_what_repeats_behind_it():
    c = gate().case("verbs", "fp8_656", 2, 1, 8, 70, parts=1, scales=True)
    problem = SparseDecodeProblem.from_tensors(
        c.operands.q, c.operands.kv_cache, c.operands.indices, layout="fp8_656"
    )  # fmt: skip
    compiled = Compiled(sparse.SWAPPED, 3, functions()["swapped"], merge, functions()["bf16"])
    SPARSE_DECODE.launch(compiled, problem, c.operands, None)
    passed, words = gate().judged(c)
    assert passed, words


@pytest.mark.parametrize(
    ("pattern", "other"),
    [
        (r"\+ 528\]", "+ 544]"),  # RoPE from eight columns further on
        (r"(ldmatrix[^\n]*\+ )32\]", r"\g<1>48]"),  # the second sixteen columns of a warp
        (r"prmt\.b32 c, (%r\d+), 0, 0x3120", r"prmt.b32 c, \1, 0, 0x3210"),  # columns and keys mixed up
    ],
)
def test_a_wrong_place_is_found(pattern, other):
    spoilt = re.sub(pattern, other, ptx())
    assert spoilt != ptx(), "nothing was spoilt"
    passed, *_ = verdict(1, 1, 8, 70, run="swapped+", module={"swapped": Emulated(spoilt)})
    assert not passed
