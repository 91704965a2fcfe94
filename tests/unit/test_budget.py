"""The tolerance rule: it never refuses a correct kernel, and it catches every mutant."""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import replace

import pytest
import torch

from openmla.core.errors import ProblemError
from openmla.reference import attention
from openmla.testing import budget
from openmla.testing.cases import OPS, draw
from openmla.testing.families import FAMILIES, draw_keys, draw_queries, draw_values
from openmla.testing.mutants import GATE_FAMILIES, MUTANTS, calibrate, draw_input, golden, kernel

PRECISION = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@pytest.fixture(scope="module")
def gate():
    return list(calibrate(lengths=(321, 1000), seeds=(0, 1)))


def test_correct_kernel_is_never_refused(gate):
    refused = [row for row in gate if not row.mutant and row.broken]
    assert not refused
    assert max(row.rms_ratio for row in gate if not row.mutant) < 0.95  # 1.5 sigma are meant as room, not as need


def test_every_mutant_is_caught(gate):
    caught_in = defaultdict(set)
    for row in gate:
        if row.mutant and row.broken:
            caught_in[row.mutant].add(row.family)
    assert {mutant.name for mutant in MUTANTS} == set(caught_in)
    for mutant in MUTANTS:
        if mutant.kind == "index":
            assert len(caught_in[mutant.name]) >= 3, f"{mutant.name} is seen by {sorted(caught_in[mutant.name])} only"


def test_mean_kill_rate(gate):
    runs = [bool(row.broken) for row in gate if row.mutant]
    assert len(runs) == len(MUTANTS) * len(GATE_FAMILIES) * 4
    assert sum(runs) / len(runs) >= 0.88


def test_onehot_v_names_the_lost_token():
    # Keys 0 to 511 are the unit vectors, so a zero in n * out is a key that nobody attended.
    x = draw_input("onehot_v", 500, seed=3, num_splits=2)
    lost = 321
    out, _ = kernel(replace(x, keys=torch.cat([x.keys[:lost], x.keys[lost + 1 :]])))
    assert out[0, :500].argmin() == lost and out[0, lost] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("num_splits", [1, 2, 5])
def test_no_false_alarm_over_lengths(dtype, num_splits):
    worst = 0.0
    for family, n, seed in itertools.product(FAMILIES, (1, 63, 64, 65, 129), (0, 1)):
        x = draw_input(family, n, seed, dtype=dtype, num_splits=num_splits)
        out, lse = kernel(x)
        report = budget.check(out[None], lse[:, None], golden(x), dtype=dtype)
        report.require(f"family={family} n={n} seed={seed}")
        worst = max(worst, report.ratio("HARD"), report.ratio("RMS"), report.ratio("LSE"))
    assert worst > 0.1  # a rule that is never used up to a tenth would see nothing


def test_no_false_alarm_on_long_rows():
    for family in FAMILIES:
        x = draw_input(family, 4000, seed=5, num_splits=5, h_q=4) if "sweep" not in family else None
        x = x or draw_input(family, 700, seed=5, num_splits=5)
        out, lse = kernel(x)
        budget.check(out[None], lse[:, None], golden(x), dtype=torch.bfloat16).require(family)


@pytest.mark.parametrize("op", OPS)
def test_emulated_kernel_passes_hostile_cases(op, seeds_of):
    for seed in seeds_of(0, 250):
        case = draw(seed, op)
        operands = case.tensors()
        result = case.reference(PRECISION[case.dtype], operands, num_splits=1 + seed % 3)
        report = budget.check(
            result.out, result.lse, case.golden(operands), dtype=case.dtype, max_logits=result.max_logits
        )
        report.require(case.repro)


def _correct(h_q=4, n=100):
    x = draw_input("unit", n, seed=0, h_q=h_q)
    out, lse = kernel(x)
    want = golden(x)
    return out[None].clone(), lse[:, None].clone(), want


@pytest.mark.parametrize(
    ("rule", "spoil"),
    [
        ("NONFINITE", lambda out, lse: out.view(-1)[7:8].fill_(torch.nan)),
        ("NONFINITE", lambda out, lse: lse[2:3].fill_(-torch.inf)),
        ("NONFINITE", lambda out, lse: out.view(-1)[:1].fill_(torch.inf)),
        ("HARD", lambda out, lse: out[0, 3, 17:18].add_(0.02)),
        ("RMS", lambda out, lse: out[0, 1].mul_(1.01)),
        ("LSE", lambda out, lse: lse[1].add_(1e-4)),
    ],
    ids=["nan_out", "empty_lse", "inf_out", "one_element", "one_row", "one_lse"],
)
def test_each_rule_sees_its_own_defect(rule, spoil):
    out, lse, want = _correct()
    budget.check(out, lse, want, dtype=torch.bfloat16).require()
    spoil(out, lse)
    report = budget.check(out, lse, want, dtype=torch.bfloat16)
    assert rule in report.broken and not report.passed
    with pytest.raises(AssertionError, match=rule):
        report.require("context")


def test_a_row_that_should_be_nan_but_is_not():
    x = draw_input("unit", 100, seed=0)
    out, lse = kernel(x)
    x.keys[50] = torch.nan
    report = budget.check(out[None], lse[:, None], golden(x), dtype=torch.bfloat16)
    assert report.broken == ("NONFINITE",)


def test_families_are_what_they_say():
    generator = torch.Generator().manual_seed(0)
    keys = draw_keys("unit", (40, 1, 72), 64, generator)
    scale = 72**-0.5

    def q(family):
        return draw_queries(family, 10, 4, keys, 64, scale, generator)

    assert not q("zero_q").any() and not q("onehot_v").any()
    assert not q("sweep_rope")[..., :64].any() and q("sweep_rope")[..., 64:].all()
    for family in ("sweep", "sweep_rope"):
        logits = scale * q(family).reshape(40, 72) @ keys[:, 0].T
        if family == "sweep":
            assert sorted(logits.argmax(-1).tolist()) == list(range(40))  # every key is a needle once
        assert (logits.amax(-1) > 15).all()
    assert 3 < q("peaky").std() < 5 and q("small").std() < 0.2
    outlier = draw_keys("outlier", (40, 1, 72), 64, generator)
    assert (outlier.abs().mean((0, 1)) > 20).sum() == 1 and outlier[..., :64].abs().max() > 20
    onehot = draw_keys("onehot_v", (130, 2, 72), 64, generator)[..., :64]
    assert torch.equal(onehot[:, 1].argmax(-1), torch.arange(130) % 64) and (onehot.sum(-1) == 1).all()
    assert draw_values("onehot_v", (5, 1, 4), generator, torch.tensor([3, 3, 0, 9, 4]))[:, 0].argmax(-1).tolist() == [
        3,
        3,
        0,
        1,
        0,
    ]


def test_max_logits_are_judged():
    out, lse, want = _correct()
    top = want.max_logits.float()
    budget.check(out, lse, want, dtype=torch.bfloat16, max_logits=top).require()
    top[1] += 1e-3
    assert budget.check(out, lse, want, dtype=torch.bfloat16, max_logits=top).broken == ("MAXL",)


def test_a_report_names_the_worst_element_and_its_ratio():
    out, lse, want = _correct()
    out[0, 3, 17] += 1
    report = budget.check(out, lse, want, dtype=torch.bfloat16)
    assert "out[0, 3, 17]" in str(report) and report.ratio("HARD") > 10
    assert f"ratio {report.ratio('HARD'):.3g}" in str(report)


def test_contract_is_judged_first():
    out, lse, want = _correct()
    assert budget.check(out.float(), lse, want, dtype=torch.bfloat16).broken == ("CONTRACT",)
    assert budget.check(out, lse.double(), want, dtype=torch.bfloat16).broken == ("CONTRACT",)
    assert budget.check(out[:, :2], lse, want, dtype=torch.bfloat16).broken == ("CONTRACT",)


def test_misuse_is_refused():
    out, lse, want = _correct()
    with pytest.raises(ProblemError, match="bounds"):
        budget.check(out, lse, replace(want, bounds=None), dtype=torch.bfloat16)
    with pytest.raises(ProblemError, match="dtype"):
        budget.check(out, lse, want, dtype=torch.int8)


def test_an_empty_result_passes():
    q = torch.zeros(0, 2, 8)
    offsets = torch.zeros(1, dtype=torch.int32)
    want = attention.prefill(q, q, q, offsets, offsets, softmax_scale=1.0, with_bounds=True)
    budget.check(q.bfloat16(), torch.zeros(2, 0), want, dtype=torch.bfloat16).require()
