"""Sweeps, names of cases, and bars: promises about rows, judged from rows alone."""

import dataclasses

import pytest
from lab_rows import row

from openmla.core.errors import ConfigError
from openmla.core.target import Target
from openmla.lab import bars, suite
from openmla.lab.suite import Bar, Case

A, B = "decode-b1-sq1-hq16-sk4096-bf16", "decode-b4-sq1-hq16-sk4096-bf16"


# sweeps and names


@pytest.mark.parametrize(
    "case",
    [
        Case(batch=1, s_k=7),
        Case(batch=2, s_k=64, s_q=3, h_q=8, h_kv=2, d_qk=64, d_v=32, dtype="fp32", page_size=1, lengths="varlen",
             is_causal=True, policy="batch_invariant", cache="warm", seed=9),
        Case(batch=2, s_k=64, d_qk=512, layout="fp8_528_mx"),
        Case(batch=2, s_k=64, layout="fp8_656", lengths="varlen"),
    ],
)  # fmt: skip
def test_a_name_says_everything_about_a_case(case):
    assert suite.parse(case.name) == case


@pytest.mark.parametrize("name", suite.available())
def test_names_of_shipped_cases_parse(name):
    for case in suite.load(name).cases:
        assert suite.parse(case.name) == dataclasses.replace(case, peers=())


def test_what_is_no_name_is_none():
    assert suite.parse("decode-b1") is None
    assert suite.parse(A + "-fast") is None


def test_sweep_is_every_combination_and_knows_the_columns_of_a_layout():
    found = suite.sweep({"batch": [1, 2], "layout": ["plain", "fp8_584"], "dtype": "bf16"})
    assert [(case.batch, case.layout, case.d_qk, case.s_k) for case in found.cases] == [
        (1, "plain", 576, 4096), (2, "plain", 576, 4096), (1, "fp8_584", 512, 4096), (2, "fp8_584", 512, 4096),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"batch": 0}, "batch must be an integer from 1"),
        ({"layout": "fp8_1"}, "layout must be one of plain, fp8_656"),
        ({"layout": "fp8_656", "d_qk": 512}, r"layout fp8_656 has \(d_qk, d_v, h_kv\) = \(576, 512, 1\)"),
        ({"h_q": 3, "h_kv": 2}, "h_q=3 is not a multiple"),
    ],
)
def test_sweep_refuses(choices, message):
    with pytest.raises(ConfigError, match=message):
        suite.sweep(choices)


# bars


def bar(value="ratio", limit=1.0, is_floor=True, over="each", cases=("*",)) -> Bar:
    return Bar("b", cases, value, limit, is_floor, over)


def judged(one: Bar, rows, cases=(A, B)) -> bars.Judgement:
    return bars.judge([one], cases, rows)[0]


def pair(case: str, own: float, peer: float, **facts):
    return [row(case=case, median_us=own, **facts), row(case=case, who="flash_mla", kind="peer", median_us=peer)]


def test_each_cell_must_keep_the_promise():
    rows = [*pair(A, 10, 12), *pair(B, 10, 9)]
    found = judged(bar(), rows)
    assert found.verdict == "missed"
    assert [(cell.case, cell.value) for cell in found.short] == [(B, 0.9)]
    assert judged(bar(limit=0.9), rows).verdict == "met"


def test_geometric_mean_of_all_cells():
    found = judged(bar(over="geomean", limit=1.5), [*pair(A, 10, 10), *pair(B, 10, 40)])
    assert found.value == pytest.approx(2.0)
    assert found.verdict == "met"
    assert found.short == []


def test_the_faster_peer_counts_and_a_bare_product_is_none():
    rows = [
        *pair(A, 10, 12),
        row(case=A, who="fa3", kind="peer", median_us=11),
        row(case=A, who="gemm", kind="ceiling"),
    ]
    assert judged(bar(), rows, (A,)).value == pytest.approx(1.1)
    assert judged(bar(), [row(case=A), row(case=A, who="gemm", kind="ceiling")], (A,)).value is None


def test_a_missing_cell_is_not_met():
    assert judged(bar(), pair(A, 10, 20)).verdict == "not measured"
    assert judged(bar(), pair(A, 10, 5)).verdict == "missed"
    assert judged(bar(over="geomean"), pair(A, 10, 5)).verdict == "not measured"
    assert judged(bar(), []).verdict == "not measured"


def test_the_newest_run_counts_and_runs_do_not_mix():
    rows = [*pair(A, 10, 12), *pair(A, 10, 30), row(case=A, who="sdpa", kind="peer", median_us=20)]
    assert [len(run) for run in bars.runs(rows)] == [2, 3]
    assert judged(bar(), rows, (A,)).value == pytest.approx(2.0)
    only_peer = [*pair(A, 10, 12), row(case=B), row(case=A, who="flash_mla", kind="peer", median_us=1)]
    assert judged(bar(), only_peer, (A,)).value == pytest.approx(1.2)


@pytest.mark.parametrize(
    ("value", "rows", "want"),
    [
        ("median_us", [row(case=A, median_us=9.0)], 9.0),
        ("read", [row(case=A, fraction_read=0.5)], 0.5),
        ("gemm", [row(case=A, tflops=90.0), row(case=A, who="gemm", kind="ceiling", tflops=100.0)], 0.9),
        ("policy_cost", [row(case=A, median_us=10), row(case=A + "-batch_invariant", median_us=10.4)], 0.04),
    ],
)
def test_values(value, rows, want):
    case = rows[-1].case
    assert judged(bar(value=value), rows, (case,)).value == pytest.approx(want)


def test_text_names_the_cells_that_miss():
    text = bars.table_text(bars.judge([bar("median_us", 9.0, False)], (A, B), [row(case=A, median_us=10), row(case=B)]))
    assert "MISSED" in text
    assert A in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('value = "speed"', "bar 1: value must be one of ratio, gemm"),
        ("at_most = 2", "bar 1: needs one number, at_least or at_most"),
        ('cases = ["decode-b7-*"]', "bar 1: no case matches 'decode-b7-"),
        ('over = "all"', "bar 1: over must be each or geomean, got 'all'"),
        ("floor = 1", "bar 1: unknown key 'floor'; legal: name"),
    ],
)
def test_a_malformed_bar_is_named(tmp_path, text, message):
    keys = {"cases": '["*"]', "value": '"ratio"', "at_least": "1.0"}
    keys.pop(text.split(" ")[0], None)
    path = tmp_path / "mine.toml"
    lines = [f"{key} = {value}" for key, value in keys.items()]
    path.write_text("[[case]]\nbatch = 1\ns_k = 5\n[[bar]]\n" + "\n".join([*lines, text]) + "\n")
    with pytest.raises(ConfigError, match=message):
        suite.load(str(path))


def test_the_bars_of_decode_dense():
    found = suite.load("decode_dense")
    names = [case.name for case in found.cases]
    by_value = {(bar.value, bar.over, bar.limit): sum(map(bar.covers, names)) for bar in found.bars}
    assert by_value[("ratio", "each", 1.0)] == by_value[("ratio", "geomean", 1.3)] == 43
    assert by_value[("gemm", "each", 0.97)] == by_value[("ratio", "each", 1.06)] == 1
    assert by_value[("median_us", "each", 10.0)] == by_value[("median_us", "each", 13.0)] == 1
    assert by_value[("policy_cost", "each", 0.05)] == 4


def test_resume_keeps_rows_of_this_commit_and_machine_alone(tmp_path, monkeypatch):
    here = {"device": "d", "git_sha": "a1", "git_dirty": False, "torch": "2", "packages": {}}
    monkeypatch.setattr(bars.store, "environment", lambda target: here)
    path = tmp_path / "rows.jsonl"
    rows = [
        row(case=A, environment=here), row(case=A, who="sdpa", kind="peer", environment=here),
        row(case=B, environment={**here, "git_sha": "b2"}),
        row(case="c", environment={**here, "git_dirty": True}),
        row(case="d", environment={**here, "device": "e"}),
    ]  # fmt: skip
    bars.store.append(path, rows)
    said: list[str] = []
    kept = bars.resumed(path, Target.preset("cpu"), said.append)
    assert [(each.case, each.who) for each in kept] == [(A, "torch"), (A, "sdpa")]
    assert "holds 1 case(s)" in said[0]
    assert bars.resumed(tmp_path / "none.jsonl", Target.preset("cpu"), said.append) == []
    here["git_dirty"] = True
    assert bars.resumed(path, Target.preset("cpu"), said.append) == []
    with pytest.raises(ConfigError, match="name it with --out"):
        bars.resumed(None, Target.preset("cpu"), said.append)


def test_a_loss_never_looks_like_a_draw():
    assert [bars.ratio(each) for each in (0.9949, 0.9951, 0.9999, 1.0, 1.004)] == [
        "0.99",
        "0.995",
        "1.000",
        "1.00",
        "1.00",
    ]


def test_a_missed_bar_never_looks_met():
    """1.078 misses 1.08; both would read 1.08x."""
    assert [bars.text(value, "ratio", 1.08) for value in (1.078, 1.08, 1.09)] == ["1.078x", "1.08x", "1.09x"]
    assert bars.text(10.04, "median_us", 10.0) == "10.04 us"
    assert bars.text(0.9497, "read", 0.95) == "94.97 %"
    assert bars.text(0.94, "read", 0.95) == "94.0 %"
