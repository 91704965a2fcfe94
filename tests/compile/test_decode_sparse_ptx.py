"""The compiled token-sparse decode, run instruction by instruction on a CPU, against the fp64 oracle.

The cases are those of the GPU gate (tests/gpu/decode_sparse.py), in sizes that a few CTAs work through.
"""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ptx_machine import Cta, Deadlock
from ptx_program import Memory, TensorMap, describe, parse

from openmla.backends.cute.decode_sparse import config as sparse
from openmla.backends.cute.decode_sparse.launch import LOG2_E, build
from openmla.backends.cute.sparse import SPARSE_DECODE, Compiled
from openmla.core.problem import SparseDecodeProblem
from openmla.core.target import Target

pytest.importorskip("cutlass")
LAYOUTS = sparse.LAYOUTS
SMEM = 231_424


@cache
def gate():
    """The GPU script, on the CPU."""
    path = Path(__file__).parents[1] / "gpu" / "decode_sparse.py"
    spec = importlib.util.spec_from_file_location("gpu_decode_sparse", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.CUDA = "cpu"
    return module


BOTH = "fp16+bf16"  # the second repeats what the first has voided


@cache
def ptx(layout: str, operands: str, has_extra: bool = False) -> str:
    return ptx_of(sparse.Config(layout, has_extra, operands=operands))


@cache
def ptx_of(config: sparse.Config) -> str:
    with TemporaryDirectory() as folder:
        build(config, Path(folder))
        return (Path(folder) / f"{config.name}.ptx").read_text()


class Library(dict):
    """What a library of a layout holds, compiled when it is asked for."""

    def __init__(self, layout: str, has_extra: bool) -> None:
        super().__init__(combine_bf16=merge)
        self.of = layout, has_extra

    def __missing__(self, operands: str) -> Emulated:
        layout, has_extra = self.of
        self[operands] = Emulated(ptx(layout, operands, has_extra))
        return self[operands]


@cache
def functions(layout: str, has_extra: bool = False) -> Library:
    return Library(layout, has_extra)


class Emulated:
    """What `launch` calls: the kernel's arguments, packed as its host code packs them."""

    def __init__(self, text: str) -> None:
        self.program = parse(text)

    def __call__(
        self, q, kv, indices, topk_length, extra_kv, extra_indices, extra_length, metadata, num_splits, sink, out, lse,
        out_accum, lse2_accum, fault, redo, *scalars
    ):  # fmt: skip
        memory = Memory()
        strides = [2, *(2 * q.stride(d) for d in (2, 1, 0))]
        boxes = TensorMap(memory.place(q), [q.shape[d] for d in (3, 2, 1, 0)], strides, [64, 64, 1, 1])
        free = lambda tensor, fixed=(), unit=(): describe(  # noqa: E731
            memory, tensor, [d in fixed for d in range(tensor.dim())], [d in unit for d in range(tensor.dim())]
        )
        values = [
            boxes, b"\0" * 12, free(q, (3,), (3,)), free(kv, (), (1,)), free(indices, (), (2,)), free(topk_length), free(extra_kv, (), (1,)),
            free(extra_indices, (), (2,)), free(extra_length),
            free(metadata, (1,), (0, 1)), free(num_splits, (), (0,)), free(sink, (), (0,)), free(out, (3,), (3,)),
            free(lse), free(out_accum, (2,), (2,)), free(lse2_accum, (), (1,)), free(fault, (0,), (0,)), free(redo, (), (2,)),
            *(np.array([x], np.int32).tobytes() for x in scalars[:-1]), np.array(scalars[-1:], np.float32).tobytes(),
        ]  # fmt: skip
        grid = (-(-q.shape[2] // 64), q.shape[1], metadata.shape[0])
        self.run(memory, values, [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])])
        memory.read_back()

    def run(self, memory, values, blocks):
        """The CTAs one after the other."""
        names = self.program.params
        cta = Cta(self.program, memory, dict(zip(names, values, strict=False)), 512, SMEM)
        for x, y, z in blocks:
            cta.run((x, y, z), seed=x + 7 * y + 31 * z)


def merge(out_accum, lse2_accum, num_splits, out, lse, sink, h_kv, has_sink):
    """The combine kernel's law, for the requests that were split."""
    for request in range(out.shape[0]):
        first, last = num_splits[request : request + 2].tolist()
        if last - first > 1:
            partial = lse2_accum[first:last].double()
            peak = partial.max(0).values
            weight = torch.exp2(partial - torch.where(peak.isinf(), 0, peak))
            total = weight.sum(0)
            rows = (weight[..., None] * out_accum[first:last].double()).sum(0) / total.clamp_min(1e-300)[:, None]
            lse2 = torch.where(total > 0, peak + total.log2(), -torch.inf)
            if has_sink:
                rows /= 1 + torch.exp2(sink.repeat(out.shape[1]) * LOG2_E - lse2)[:, None]
            out[request] = rows.view(out.shape[1:]).to(out.dtype)
            lse[request] = (lse2 / LOG2_E).view(out.shape[1:3]).T.float()


def verdict(layout: str, *args, run="bf16", module=None, **options):
    """(passed, words, fault word, whether a CTA was voided) of one case."""
    case = gate().case("emulated", layout, *args, parts=options.pop("parts", 1), **options)
    gate().run(module or functions(layout, "extra" in options), run, case)
    return *gate().judged(case), case.operands.fault_word.item(), bool((case.redo == 1).any())


@pytest.mark.parametrize(
    ("layout", "run"), [*((each, "bf16") for each in LAYOUTS), ("fp8_656", "fp16+"), ("fp8_584", "fp16+")]
)
def test_pieces_of_one_cta_with_everything_hostile(layout, run):
    passed, words, fault, is_void = verdict(
        layout, 3, 1, 17, 130, page_size=7, absent=0.2, hostile=0.1, scales=run == "bf16", sink=float("inf"), run=run
    )  # fmt: skip
    assert passed, words
    assert fault == 8 and not is_void


@pytest.mark.parametrize("layout", ["fp8_656", "fp8_584"])
def test_scales_that_fp16_does_not_hold_are_repeated_in_bf16(layout):
    passed, words, fault, is_void = verdict(layout, 2, 1, 17, 70, run=BOTH, scales=True, absent=0.2, hostile=0.1)
    assert passed, words
    assert fault == 8 and is_void


@pytest.mark.parametrize("tile", [0, 1, 2])
def test_one_scale_in_any_tile_voids_the_cta_and_no_other(tile):
    case = gate().case("one scale", "fp8_656", 2, 1, 8, 192, parts=2, stray_nan=False)
    o = case.operands
    o.indices[1] = o.indices[1].clamp(max=2000)
    o.indices[0].clamp_(max=2000)
    o.indices[1, 0, 64 * tile + 37] = 2100
    gate().flat(o.kv_cache)[2100 * 656 + 512 : 2100 * 656 + 528].view(torch.float32)[2] = 0.3
    gate().run(functions("fp8_656"), BOTH, case)
    passed, words = gate().judged(case)
    assert passed, words
    assert case.redo.flatten().tolist() == [0, 1]


def test_rows_of_q_from_tiny_to_huge():
    case = gate().case("rows", "fp8_656", 1, 1, 16, 100, stray_nan=False)
    case.operands.q.mul_(torch.logspace(-36, 34, 16).view(1, 1, 16, 1))
    case.operands.q[0, 0, 3, :512] *= 1e-8  # RoPE leads
    case.operands.q[0, 0, 4, 512:] *= 1e-8
    case.operands.q[0, 0, 5] = 0.0
    gate().run(functions("fp8_656"), BOTH, case)
    passed, words = gate().judged(case)
    assert passed, words
    assert not case.redo.any()


def test_two_blocks_of_heads_and_lengths_per_token():
    passed, words, fault, _ = verdict("fp8_656", 2, 2, 80, 70, lengths=[[0, 1], [70, 64]])
    assert passed, words
    assert fault == 0


@pytest.mark.parametrize("layout", ["fp8_656", "fp8_584"])
def test_a_second_cache(layout):
    passed, words, fault, _ = verdict(
        layout, 3, 1, 17, 130, extra=70, lengths=[0, 130, 65], extra_lengths=[70, 0, 1], sink=1.0,
        absent=0.1,
    )  # fmt: skip
    assert passed, words
    assert fault == 0


def test_a_request_split_over_three_ctas():
    passed, words, *_ = verdict("fp8_656", 1, 1, 64, 310, parts=3, queries=6.0, keys=2.0)
    assert passed, words


def test_the_four_verbs_plan_launch_merge_and_keep_a_strided_output():
    c = gate().case("verbs", "fp8_656", 2, 1, 8, 150, parts=1)
    wide = torch.full((2, 1, 8, 515), torch.nan, dtype=torch.bfloat16)
    operands = c.operands._replace(out=wide[..., 1:513])
    problem = SparseDecodeProblem.from_tensors(operands.q, operands.kv_cache, operands.indices, layout="fp8_656")
    assert SPARSE_DECODE.configs(problem, Target.preset("h100_sxm")) == (sparse.Config("fp8_656"),)
    compiled = Compiled(sparse.Config("fp8_656"), 3, functions("fp8_656")["bf16"], merge)
    SPARSE_DECODE.launch(compiled, problem, operands, None)
    passed, words = gate().judged(SimpleNamespace(**{**vars(c), "operands": operands}))
    assert passed, words
    assert wide[..., 0].isnan().all() and wide[..., 513:].isnan().all()


def test_one_piece_after_the_other_more_than_there_are_descriptors():
    passed, words, *_ = verdict("fp8_656", 11, 1, 1, 3, varlen=True, lengths=[3, 0, 1, 2, 3, 3, 0, 0, 3, 3, 1])
    assert passed, words


def test_every_code_is_the_oracles_bf16(monkeypatch, capsys):
    plan = sparse.plan.__wrapped__
    monkeypatch.setattr(sparse, "plan", lambda batch, topk, parts: plan(batch, topk, 1))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert gate().every_code(functions("fp8_656"), "bf16", "fp8_656", batch=2), capsys.readouterr().out


@pytest.mark.parametrize(
    ("pattern", "other"),
    [
        (r"\+ 528\]", "+ 544]"),  # RoPE from eight columns further on
        (r"(xor\.b32\s+%r\d+, %r\d+, )16;", r"\g<1>32;"),  # the second eight columns of a lane into another chunk
        (r"cvt\.rn\.bf16x2\.f32 (%r\d+), f1, f0", r"cvt.rn.bf16x2.f32 \1, f0, f1"),  # two columns swapped
    ],
)
def test_a_wrong_place_is_found(pattern, other):
    text = ptx("fp8_656", "bf16")
    spoilt = re.sub(pattern, other, text)
    assert spoilt != text, "nothing was spoilt"
    passed, *_ = verdict("fp8_656", 1, 1, 8, 70, run="spoilt", module={"spoilt": Emulated(spoilt)})
    assert not passed


def test_an_arrival_too_few_is_a_deadlock():
    text = ptx("fp8_656", "bf16")
    spoilt = re.sub(r"(mov\.b32\s+%r\d+, )8(;\s+mbarrier\.init)", r"\g<1>9\2", text)  # eight warps hand P back
    assert spoilt != text, "nothing was spoilt"
    with pytest.raises(Deadlock):
        verdict("fp8_656", 1, 1, 8, 200, run="spoilt", module={"spoilt": Emulated(spoilt)})
