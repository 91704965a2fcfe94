"""The variant of the token-sparse decode whose CTAs merge what they computed, run instruction by instruction on a CPU."""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch
from ptx_grid import launch
from ptx_machine import Deadlock
from test_decode_sparse_ptx import SMEM, Emulated, gate, ptx_of

from openmla.backends.cute.decode_sparse import config as sparse
from openmla.backends.cute.sparse import SPARSE_DECODE, Compiled
from openmla.core.problem import SparseDecodeProblem
from openmla.core.target import Target

pytest.importorskip("cutlass")
MERGED = sparse.MERGED[0]
NAME = MERGED.name


class Together(Emulated):
    """As Emulated, the CTAs side by side: they wait for each other."""

    seed, absent = 0, 0

    def run(self, memory, values, blocks):
        launch(self.program, memory, values, blocks[self.absent :], 512, SMEM, self.seed)


@cache
def merging(config: sparse.Config = MERGED) -> Together:
    return Together(ptx_of(config))


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 1, 64, 256), {"parts": 4, "sink": 1.0}),
        ((2, 1, 64, 700), {"parts": 9, "lengths": [5, 700]}),
        ((3, 1, 17, 300), {"parts": 4, "absent": 0.2, "hostile": 0.1}),  # the end of one and the begin of another
        ((3, 1, 8, 190), {"parts": 2}),  # a whole one and half of one
        ((1, 2, 80, 130), {"parts": 3}),
    ],
)
def test_pieces_are_merged_by_whoever_computed_them_in_any_order(shape, options):
    case = gate().cut(gate().case("merged", "fp8_656", *shape, **options))
    assert case.plan.num_pieces > case.plan.batch
    bits, function = [], merging()
    for function.seed in range(2):
        gate().run({NAME: function}, NAME, case)
        passed, words = gate().judged(case)
        assert passed, words
        assert not case.counts.any(), "the next launch would not find its counts at 0"
        bits.append(case.operands.out.clone().view(torch.int16))
    assert torch.equal(*bits)


@pytest.mark.parametrize("config", sparse.MERGED[1:], ids=lambda config: config.layout)
def test_pieces_of_other_layouts_are_merged(config):
    case = gate().case("merged", config.layout, 2, 1, 80, 200, parts=3, absent=0.2, hostile=0.1, scales=True, sink=1.0)
    case = gate().cut(case)
    assert case.plan.num_pieces > case.plan.batch
    gate().run({config.name: merging(config)}, config.name, case)
    passed, words = gate().judged(case)
    assert passed, words
    assert not case.counts.any()


def column_groups(exponents):
    """A case whose keys are 2^exponent larger in each 128 columns; only the last columns decide who weighs what."""
    case = gate().case("groups", "fp8_656", 1, 1, 17, 200, parts=3, stray_nan=False, sink=1.0)
    scales = gate().flat(case.operands.kv_cache).view(-1, 656)[:, 512:528].view(torch.float32)
    scales *= 2.0 ** torch.tensor(exponents)
    case.operands.q[..., :512] = 0.0
    return gate().cut(case)


@pytest.mark.parametrize("exponents", [(100, -90, 0, 30), (-90, 110, -40, 0)])
def test_halves_have_a_scale_for_the_columns_that_share_one(exponents):
    case = column_groups(exponents)
    gate().run({NAME: merging()}, NAME, case)
    passed, words = gate().judged(case)
    assert passed, words


def test_a_piece_that_never_comes_is_a_deadlock(monkeypatch):
    case = gate().cut(gate().case("alone", "fp8_656", 1, 1, 8, 70, parts=2))
    monkeypatch.setattr(merging(), "absent", 1)
    with pytest.raises(Deadlock):
        gate().run({NAME: merging()}, NAME, case)


@pytest.mark.parametrize(
    ("pattern", "other"),
    [
        (r"(atom\.release\.gpu\.global\.inc\.u32 old, \[%rd\d+\], )%r\d+", r"\g<1>99"),  # a count that does not wrap
        (r"ld\.relaxed\.gpu\.global\.b32 (%\w+), \[%rd\d+\]", r"mov.b32 \1, 0"),  # no weights, no scales
        (r"(st\.global\.b32\s+\[%rd\d+\+)256\]", r"\g<1>264]"),  # the scale of another row
        (r"cvt\.rn\.f16x2\.f32 (%\w+), (%\w+), (%\w+)", r"cvt.rn.f16x2.f32 \1, \3, \2"),  # two columns swapped
    ],
)  # fmt: skip
def test_a_wrong_merge_is_found(pattern, other):
    text = ptx_of(MERGED)
    spoilt = re.sub(pattern, other, text)
    assert spoilt != text, "nothing was spoilt"
    case = column_groups((100, -90, 0, 30))
    try:
        gate().run({NAME: Together(spoilt)}, NAME, case)
    except Deadlock:
        return
    assert not gate().judged(case)[0] or case.counts.any()


def test_the_four_verbs_merge_without_a_launch_behind():
    case = gate().case("verbs", "fp8_656", 1, 1, 64, 1024, parts=1)
    o, target = case.operands, Target.preset("h100_sxm")
    problem = SparseDecodeProblem.from_tensors(o.q, o.kv_cache, o.indices, layout="fp8_656")
    assert SPARSE_DECODE.configs(problem, target)[0] == MERGED
    SPARSE_DECODE.launch(Compiled(MERGED, 3, merging(), None), problem, o, None)
    passed, words = gate().judged(case)
    assert passed, words


@pytest.mark.parametrize("extra", [70, 200])
def test_a_second_cache_with_an_early_start(extra):
    name = sparse.STARTS_EARLY.name
    case = gate().case(
        "early", "fp8_584", 3, 1, 17, 130, extra=extra, lengths=[0, 130, 65], extra_lengths=[extra, 0, 1], sink=1.0,
        absent=0.1, parts=1,
    )  # fmt: skip
    gate().run({name: Emulated(ptx_of(sparse.STARTS_EARLY))}, name, case)
    passed, words = gate().judged(case)
    assert passed, words
    assert case.operands.fault_word.item() == 0
