"""Cases of sparse attention in the laboratory: gated, measured, named, and refused where a peer cannot take part."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from openmla.core.target import Target
from openmla.lab import runner, sparse, suite
from openmla.lab.suite import Case

PREFILL = Case(batch=1, s_k=100, op="sparse_prefill", s_q=5, h_q=4, topk=70)
DECODE = Case(batch=3, s_k=100, op="sparse_decode", s_q=2, h_q=4, d_qk=512, layout="fp8_584", topk=70, extra_topk=8)
CPU = torch.device("cpu")


@pytest.mark.parametrize("case", [PREFILL, DECODE, replace(DECODE, layout="plain", extra_topk=0)])
def test_a_case_is_gated_and_measured(case):
    found = runner.run_case(
        suite.Suite("made", "", (case,)), case, runner.Options(("torch",), (), 0.01), Target.detect("cpu"),
        runner.ceilings.Ceilings({"bf16": 1.0}, 64, 1.0, 1.0), {}, lambda text: None,
    )  # fmt: skip
    assert [row.who for row in found.rows] == ["torch"], found
    assert "within" in found.rows[0].gate


@pytest.mark.parametrize("case", [PREFILL, DECODE])
def test_a_wrong_result_is_red(case):
    x = sparse.inputs(case, CPU)
    out = torch.zeros(*x.q.shape[:-1], case.d_v, dtype=torch.bfloat16)
    assert not sparse.check(case, x, out, None).is_green
    assert not sparse.check(case, x, None, None).is_green


@pytest.mark.parametrize("case", [PREFILL, DECODE])
def test_selections_are_distinct_and_of_the_own_request(case):
    x = sparse.inputs(case, CPU)
    lists = x.indices.reshape(-1, case.topk)
    assert all(len(each.unique()) == case.topk for each in lists)
    if case.op == "sparse_decode":
        pages = [set((x.indices[request] // case.page_size).flatten().tolist()) for request in range(case.batch)]
        assert all(not (pages[a] & pages[b]) for a in range(3) for b in range(a))


@pytest.mark.parametrize("case", [PREFILL, DECODE])
def test_a_name_says_the_case(case):
    assert suite.parse(case.name) == case


def test_who_cannot_take_part_says_why():
    found = sparse.peer(PREFILL, [], Target.detect("cpu"), "flash_mla")
    assert isinstance(found, sparse.Refusal) and "sm_90a" in found.reason
    wide = sparse.backend(replace(PREFILL, dtype="fp32"), [], Target.preset("h100_sxm"), "cute")
    assert isinstance(wide, sparse.Refusal) and "bf16" in wide.reason
