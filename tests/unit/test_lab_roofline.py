"""The roofline: placed by the formulas of core.cost, bound by what the rates say."""

import dataclasses
import json

import pytest
import torch
from lab_rows import row

from openmla.core.cost import cost
from openmla.core.errors import ConfigError
from openmla.core.target import Target
from openmla.lab import ceilings, page, peers, roofline, suite, workload
from openmla.lab.roofline import Roof
from openmla.lab.suite import Case, Suite

ROOF = Roof("d", "test", {"bf16": 100.0}, 1000.0)  # ridge at 100 FLOP per byte
FEW, MANY = Case(batch=8, s_k=65536, h_q=16), Case(batch=8, s_k=65536, h_q=128)


@pytest.mark.parametrize(
    "case",
    [
        FEW,
        Case(batch=3, s_k=200, s_q=2, h_q=8, dtype="fp32", page_size=16, lengths="varlen", is_causal=True),
        Case(batch=2, s_k=65, layout="fp8_584", d_qk=512),
    ],
)
def test_the_problem_of_a_case_is_that_of_its_tensors(case):
    small = dataclasses.replace(case, batch=min(case.batch, 3), s_k=min(case.s_k, 200))
    inputs = workload.decode_inputs(small, torch.device("cpu"))
    assert workload.problem(small) == peers.problem_of(small, inputs)


def test_few_heads_are_bound_by_memory_and_many_by_arithmetic():
    few, many = (roofline.place(case, ROOF) for case in (FEW, MANY))
    assert (few.bound, many.bound) == ("memory", "arithmetic")
    work = cost(workload.problem(FEW), FEW.draw_lengths())
    assert few.floor_us == pytest.approx(work.bytes / 1e6)  # 1000 GB/s is 10^6 bytes per us
    assert many.floor_us == pytest.approx(8 * few.flops / 1e8)
    assert "left of the ridge at 100: memory bounds it at" in few.sentence


def test_a_measured_case_has_its_share():
    floor = roofline.place(FEW, ROOF).floor_us
    found = roofline.place(FEW, ROOF, row(case=FEW.name, median_us=2 * floor))
    assert found.share == pytest.approx(0.5)
    assert "torch reaches 50 %" in found.sentence


def test_a_short_call_far_from_the_roof_is_bound_by_latency():
    tiny = Case(batch=1, s_k=64, h_q=16)
    assert roofline.place(tiny, ROOF, row(median_us=50.0)).bound == "latency"
    assert roofline.place(tiny, ROOF).bound == "memory"
    assert roofline.place(FEW, ROOF, row(median_us=1e6)).bound == "memory"


def test_rates_of_rows_and_of_a_data_sheet():
    rows = [row(ceilings={"gemm_bf16_tflops": 1.0, "gemm_size": 2048.0, "read_gbps": 10.0, "copy_gbps": 7.0}),
            row(ceilings={"gemm_bf16_tflops": 2.0, "read_gbps": 9.0})]  # fmt: skip
    found = roofline.of_rows(rows)
    assert (found.gemm_tflops, found.read_gbps, found.copy_gbps) == ({"bf16": 2.0}, 10.0, 7.0)
    assert roofline.data_sheet("h100_sxm").ridge("bf16") == pytest.approx(989e3 / 3352)
    with pytest.raises(ConfigError, match="carry no ceilings"):
        roofline.of_rows([row(ceilings={})])
    with pytest.raises(ConfigError, match="cpu has no data-sheet rates"):
        roofline.data_sheet("cpu")
    with pytest.raises(ConfigError, match="no rate for fp32 in data sheet; choose cases in bf16 or fp16"):
        roofline.data_sheet("h100_sxm").ridge("fp32")


def test_from_rows_takes_the_newest_of_each_case_and_draws():
    name = "decode-b1-sq1-hq16-sk4096-bf16"
    found = roofline.from_rows([row(case=name, median_us=9.0), row(case=name, median_us=7.0), row(case="by hand")])
    assert [(each.case, each.measured_us) for each in found.places] == [(name, 7.0)]
    html = page.render(roofline.page(found))
    assert "FLOP per byte" in html
    assert "http" not in html.replace("http://www.w3.org", "")
    json.dumps(found.as_dict(), allow_nan=False)


def test_run_measures_and_says_why_not():
    case = Case(batch=2, s_k=70, h_q=4, dtype="fp32")
    here = Suite("mine", "", (case,))
    said: list[str] = []
    found = roofline.run(here, [case], Target.detect("cpu"), ("torch",), 0.01, said.append)
    assert found.places[0].measured_us
    assert found.roof.cache_gbps
    assert "copy " in str(found)
    assert len(said) >= 2
    refused = roofline.run(here, [case], Target.detect("cpu"), ("cute",), 0.01, None)
    assert refused.places[0].measured_us is None
    assert "no number: cute/" in refused.places[0].sentence


def test_planning_needs_no_machine():
    found = roofline.planned(suite.load("decode_dense").cases, roofline.data_sheet("h100_sxm"))
    assert {each.bound for each in found.places} == {"memory", "arithmetic"}
    assert "data sheet" in str(found)


def test_the_last_cache_is_read_on_a_cpu():
    size, rate = ceilings.cache_gbps(Target.detect("cpu"), 0.01)
    assert size <= workload.cpu_cache_bytes()
    assert rate > 0
