"""Coverage of dense decode: the pairs are all there, operands keep their shape in memory, and the judge can say no."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch

import openmla
from openmla.testing import coverage
from openmla.testing.cases import Case

CASE = Case(
    op="decode", seed=3, family="unit", dtype=torch.bfloat16, h_q=3, h_kv=1, d_qk=576, d_v=512, softmax_scale=0.04,
    seqlens_q=(2, 2), seqlens_k=(70, 0), page_size=16, is_causal=True,
)  # fmt: skip
CALL = coverage.Call(out="strided")


def test_every_pair_of_options_is_in_some_case():
    made = list(coverage.pairs())
    seen = set()
    for case, call in made:
        lengths = {value: name for name, value in coverage.LENGTHS.items()}[case.seqlens_k]
        chosen = {"lengths": lengths, "s_q": max(case.seqlens_q)}
        chosen |= {name: getattr(case, name) for name in coverage.AXES if hasattr(case, name)}
        chosen |= {name: getattr(call, name) for name in coverage.AXES if hasattr(call, name)}
        seen |= {frozenset(pair) for pair in combinations(chosen.items(), 2)}
    for a, b in combinations(coverage.AXES, 2):
        for x in coverage.AXES[a]:
            for y in coverage.AXES[b]:
                if (a, b) != ("h_q", "h_kv") or x % y == 0:
                    assert frozenset(((a, x), (b, y))) in seen, (a, x, b, y)
    assert len(made) < 160
    assert made == list(coverage.pairs())


def test_pairs_and_axes_keep_to_what_a_kernel_takes():
    def takes(case: Case) -> bool:
        return not case.is_varlen and case.page_size == 64 and (case.h_q == 16 or case.window == 0)

    axes = coverage.axes_around({"h_q": 16}, takes, is_fixed=False)
    assert axes["page_size"] == (64,) and axes["is_varlen"] == (False,) and axes["window"] == (0, 1, 70)
    assert axes["h_q"] == coverage.AXES["h_q"]
    made = [case for case, _ in coverage.pairs(axes, takes)]
    assert all(takes(case) for case in made)
    assert {(case.h_q, case.window) for case in made} >= {(16, 0), (16, 1), (16, 70), (128, 0)}
    assert coverage.axes_around({"h_q": 16}, takes, is_fixed=True)["h_q"] == (16,)
    assert coverage.axes_around({"h_q": 16}, lambda case: False, is_fixed=True) == {}


def test_the_fuzz_reaches_every_value_that_kernels_branch_on():
    drawn = [coverage.draw(seed) for seed in range(2000)]
    assert drawn[:50] == [coverage.draw(seed) for seed in range(50)]
    assert {case.h_q for case, _ in drawn} >= {1, 16, 64, 128}
    assert len({case.h_q for case, _ in drawn}) > 90
    assert {case.page_size for case, _ in drawn} >= {1, 16, 53, 64, 128}
    assert sum(max(case.seqlens_k, default=0) > 1500 for case, _ in drawn) > 100
    for name in ("is_varlen", "is_causal", "has_sink", "nan_tokens"):
        assert {getattr(case, name) for case, _ in drawn} == {False, True}


def test_moved_operands_lie_in_memory_as_before():
    pool = torch.arange(60, dtype=torch.int32).view(5, 12)
    operands = {"a": pool[1:4, 2:9:3], "b": pool[0], "scale": 2.0, "none": torch.zeros(0, 3)}
    found = coverage.moved(operands, "cpu")
    assert found["scale"] == 2.0 and found["none"].shape == (0, 3)
    for name in ("a", "b"):
        assert torch.equal(found[name], operands[name])
        assert found[name].stride() == operands[name].stride()
        assert found[name].storage_offset() == operands[name].storage_offset()


@pytest.mark.parametrize("out", ["new", "strided", "odd"])
@pytest.mark.parametrize("lse", ["e", "2", "none"])
def test_the_judge_accepts_what_is_right(out, lse):
    for has_plan in (False, True):
        call = coverage.Call(lse=lse, out=out, has_plan=has_plan, has_workspace=has_plan)
        assert coverage.judge(CASE, call, backend="torch", device="cpu").startswith("torch/")


def _with(monkeypatch, spoil):
    right = openmla.decode

    def wrong(q, kv_cache, block_table, cache_seqlens, **options):
        out, lse = right(q, kv_cache, block_table, cache_seqlens, **options)
        spoil(out, lse, kv_cache)
        return out, lse

    monkeypatch.setattr(openmla, "decode", wrong)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda out, lse, kv: out.mul_(1.05), "HARD"),
        (lambda out, lse, kv: lse.add_(0.01), "LSE"),
        (lambda out, lse, kv: out[1].fill_(torch.nan), "NONFINITE"),
        (lambda out, lse, kv: out.as_strided((4,), (1,), 0).fill_(0), "beside out"),
        (lambda out, lse, kv: kv[-1].zero_(), "kv_cache was written"),
    ],
    ids=["out", "lse", "an empty row", "beside out", "an input"],
)
def test_the_judge_refuses_what_is_wrong(monkeypatch, spoil, sentence):
    _with(monkeypatch, spoil)
    with pytest.raises(AssertionError, match=sentence):
        coverage.judge(CASE, CALL, backend="torch", device="cpu")


def test_the_judge_refuses_faults_that_are_missing_or_made_up(monkeypatch):
    bad = replace(CASE, seqlens_k=(-1, 70), is_causal=False)
    assert coverage.judge(bad, CALL, backend="torch", device="cpu")
    monkeypatch.setattr(coverage, "check_errors", lambda device: ())
    with pytest.raises(AssertionError, match="faults"):
        coverage.judge(bad, CALL, backend="torch", device="cpu")
    monkeypatch.setattr(coverage, "check_errors", lambda device: (openmla.Fault.LENGTH_NEGATIVE,))
    with pytest.raises(AssertionError, match="faults"):
        coverage.judge(CASE, CALL, backend="torch", device="cpu")
