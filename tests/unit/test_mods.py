"""Mods on the PyTorch path: what decoration refuses, what a fingerprint covers, and every mod of the library against
the same function in fp64.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import pytest
import torch

import openmla
from openmla import backends, cli, mods
from openmla.backends.torch import anywhere, kernels
from openmla.core.errors import ConfigError, ModError, ProblemError
from openmla.core.faults import Fault
from openmla.core.layout import kv_layout
from openmla.mods import Rope, activation, attach, m, mask_mod, score_mod
from openmla.reference import attention
from openmla.testing import budget
from openmla.testing.cases import Case, native_arguments
from openmla.testing.mod_cases import library_cases

CASE = Case(
    op="decode", seed=3, family="unit", dtype=torch.float32, h_q=4, h_kv=2, d_qk=40, d_v=32, softmax_scale=0.3,
    seqlens_q=(2, 2, 2), seqlens_k=(90, 0, 33), is_causal=True, page_size=16,
)  # fmt: skip
CAP = 5.0
TABLE = torch.ones(4)


LIBRARY = library_cases()


def judge(case: Case, given: Any, operands: dict[str, Any] | None = None, backend: str = "torch") -> torch.Tensor:
    operands = operands or case.tensors()
    arguments = native_arguments("decode", operands)
    out, lse = openmla.decode(**arguments, mods=given, backend=backend)
    golden = attention.decode(**operands, mods=given, precision="fp64", with_bounds=True)
    budget.check(out, lse, golden, dtype=case.dtype).require(str(attach(given).form))
    return out


@pytest.mark.parametrize("name", LIBRARY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_library(name, dtype):
    judge(dataclasses.replace(CASE, dtype=dtype), LIBRARY[name])


@pytest.mark.parametrize("name", LIBRARY)
def test_library_where_nothing_is_known_on_the_host(name, monkeypatch):
    """The path of devices other than a CPU, on a CPU."""
    monkeypatch.setattr(kernels, "tiled", anywhere)
    judge(CASE, LIBRARY[name])


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("name", ["several", "sigmoid with others"])
def test_more_rows_and_keys_than_a_tile_and_a_task_hold(name, width):
    """Tasks of 256 rows, tiles of 512 keys and more, merged in turn by two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(width)
    try:
        given = library_cases(h_q=128, capacity=2600)[name]
        case = dataclasses.replace(CASE, h_q=128, h_kv=1, seqlens_q=(3, 3), seqlens_k=(2500, 700), dtype=torch.bfloat16)
        judge(case, given)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["several", "sigmoid with others"])
@pytest.mark.parametrize(
    "changes",
    [{"is_varlen": True, "seqlens_q": (1, 0, 2)}, {"window": 9}, {"layout": "fp8_656", "d_qk": 576, "d_v": 512}],
)
def test_options_beside_mods(name, changes):
    given = LIBRARY[name]
    if "layout" in changes:
        given = [Rope.of_base(64, 112) if isinstance(each, Rope) else each for each in given]
        changes = {**changes, "h_kv": 1, "dtype": torch.bfloat16}
    judge(dataclasses.replace(CASE, **changes), given)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", ["several", "sigmoid"])
def test_the_oracle_emulates_mods_too(name, precision):
    """Its emulation of a kernel is within the tolerance that its fp64 form gives; so the tolerance is no accident."""
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    operands = dataclasses.replace(CASE, dtype=dtype).tensors()
    golden = attention.decode(**operands, mods=LIBRARY[name], precision="fp64", with_bounds=True)
    found = attention.decode(
        **operands, mods=LIBRARY[name], precision=precision, num_splits=1 if precision == "fp32" else 3
    )
    budget.check(found.out.to(dtype), found.lse.float(), golden, dtype=dtype).require()


def test_a_mod_that_is_wrong_is_seen():
    """A cap of 2 against an oracle with 2.01: the tolerance of mods is not so wide that anything passes."""
    operands = CASE.tensors()
    out, lse = openmla.decode(**native_arguments("decode", operands), mods=mods.soft_cap(2.01))
    golden = attention.decode(**operands, mods=mods.soft_cap(2.0), precision="fp64", with_bounds=True)
    assert {"HARD", "LSE"} <= set(budget.check(out, lse, golden, dtype=CASE.dtype).broken)


def test_soft_cap_by_hand():
    """One query, one head: the formula written out beside the library's."""
    generator = torch.Generator().manual_seed(1)
    q, cache = torch.randn(1, 1, 1, 40, generator=generator), torch.randn(2, 16, 1, 40, generator=generator)
    table, lengths = torch.tensor([[1, 0]], dtype=torch.int32), torch.tensor([20], dtype=torch.int32)
    keys = torch.cat((cache[1], cache[0]))[:20, 0]
    scores = 2 * torch.tanh(0.5 * (keys @ q[0, 0, 0]) / 2)
    out, lse = openmla.decode(q, cache, table, lengths, d_v=32, softmax_scale=0.5, mods=mods.soft_cap(2.0))
    torch.testing.assert_close(out[0, 0, 0], torch.softmax(scores, 0) @ keys[:, :32])
    torch.testing.assert_close(lse[0, 0, 0], torch.logsumexp(scores, 0))


def test_window_as_a_mod_is_the_window():
    arguments = native_arguments("decode", CASE.tensors())
    mine, lse = openmla.decode(**arguments, mods=mods.sliding_window(7))
    own, own_lse = openmla.decode(**{**arguments, "window": 7})
    torch.testing.assert_close(mine, own)
    torch.testing.assert_close(lse, own_lse)


def test_a_promised_window_skips_keys():
    """Pages in front of the window do not exist: whoever reads them leaves a fault."""
    operands = dataclasses.replace(CASE, seqlens_q=(1, 1, 1)).tensors()
    operands["block_table"][0, :4] = 10**6
    arguments = native_arguments("decode", operands)
    openmla.check_errors()
    found, lse = openmla.decode(**arguments, mods=mods.sliding_window(7))
    assert openmla.check_errors() == ()

    @mask_mod
    def no_promise(b, h, q_idx, kv_idx):
        return (kv_idx <= q_idx) & (kv_idx > q_idx - 7)

    again, again_lse = openmla.decode(**arguments, mods=no_promise)
    assert openmla.check_errors() == (Fault.PAGE_OUT_OF_RANGE,)
    torch.testing.assert_close(found, again)
    torch.testing.assert_close(lse, again_lse)


@pytest.mark.parametrize(
    ("window", "promised", "narrowest"), [(None, 0, 0), (5, 0, 5), (None, 7, 7), (5, 7, 5), (9, 7, 7)]
)
def test_the_narrowest_window_counts(window, promised, narrowest):
    given = mods.sliding_window(promised) if promised else mods.soft_cap(2.0)
    arguments = native_arguments("decode", CASE.tensors())
    planned = {key: value for key, value in arguments.items() if key not in ("softmax_scale", "window")}
    assert openmla.plan(**planned, window=window, mods=given).problem.window == narrowest


@pytest.mark.parametrize("window", [-1, 2.5, True, "3"])
def test_a_promise_is_a_number_of_keys(window):
    with pytest.raises(ModError, match="window must be a number of keys"):
        mask_mod(window=window)


def test_relative_positions_of_alibi_cancel():
    """ALiBi by q_idx differs from ALiBi by kv_idx alone by a constant per row, which softmax does not see."""

    @score_mod
    def by_key(score, b, h, q_idx, kv_idx, slopes):
        return score + m.load(slopes, h) * kv_idx

    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0])
    arguments = native_arguments("decode", CASE.tensors())
    out, _ = openmla.decode(**arguments, mods=by_key.aux(slopes=slopes))
    torch.testing.assert_close(out, openmla.decode(**arguments, mods=mods.alibi(slopes))[0])


def test_rope_is_the_separate_pass():
    """q turned before the call, as complex numbers, and q turned inside give the same."""
    operands = CASE.tensors()
    arguments, rope = native_arguments("decode", operands), Rope.of_base(8, 112, base=100.0)
    position = (operands["cache_seqlens"].clamp(0, 96)[:, None] - 2 + torch.arange(2)).clamp_min(0)
    turn = torch.polar(torch.ones(3, 2, 4), position[..., None] * 100.0 ** -(torch.arange(0, 8, 2) / 8))
    turned = torch.view_as_complex(arguments["q"][..., 32:].unflatten(-1, (4, 2)).contiguous()) * turn[:, :, None]
    before = torch.cat((arguments["q"][..., :32], torch.view_as_real(turned).flatten(-2)), -1)
    expected, _ = openmla.decode(**{**arguments, "q": before})
    torch.testing.assert_close(openmla.decode(**arguments, mods=rope)[0], expected, rtol=1e-4, atol=1e-5)


def test_a_position_behind_the_tables_is_nan():
    operands = CASE.tensors()
    operands["cache_seqlens"] = torch.tensor([111, 0, 33], dtype=torch.int32)
    out, _ = openmla.decode(**native_arguments("decode", operands), mods=Rope.of_base(8, 97))
    openmla.check_errors()
    assert bool(out[0].isnan().all())
    assert bool(out[2].isfinite().all())


def test_an_activation_has_the_merge_law_of_a_sum():
    """out adds up over two halves of the keys, exp(lse) too; nothing is divided."""
    arguments = native_arguments("decode", dataclasses.replace(CASE, is_causal=False, seqlens_q=(1, 1, 1)).tensors())

    @mask_mod
    def left(b, h, q_idx, kv_idx):
        return kv_idx < 17

    @mask_mod
    def right(b, h, q_idx, kv_idx):
        return kv_idx >= 17

    whole, lse = openmla.decode(**arguments, mods=mods.sigmoid(-1.0))
    halves = [openmla.decode(**arguments, mods=[mods.sigmoid(-1.0), each]) for each in (left, right)]
    torch.testing.assert_close(halves[0][0] + halves[1][0], whole)
    torch.testing.assert_close(torch.logaddexp(halves[0][1], halves[1][1]), lse)
    assert bool((lse[1] == -torch.inf).all()) and not whole[1].any()


def test_keys_that_are_hidden_do_not_matter():
    """NaN in a key that the mask hides from some rows reaches the others only."""

    @mask_mod
    def odd_heads_see_all(b, h, q_idx, kv_idx):
        return (m.mod(h, 2) == 1) | (kv_idx < 10)

    operands = dataclasses.replace(CASE, h_kv=1).tensors()
    page = int(operands["block_table"][0, 1])
    operands["kv_cache"][page, 3] = torch.nan
    out = judge(dataclasses.replace(CASE, h_kv=1), odd_heads_see_all, operands)
    assert bool(out[0, :, ::2].isfinite().all())
    assert bool(out[0, :, 1::2].isnan().all())


def test_scores_that_are_not_finite_pass_by():
    @score_mod
    def to_zero(score, b, h, q_idx, kv_idx):
        return score * 0 + 1.0

    operands = CASE.tensors()
    operands["kv_cache"][int(operands["block_table"][0, 1]), 3] = torch.nan
    assert bool(judge(CASE, to_zero, operands)[0].isnan().all())


def test_tables_are_read_within_their_ends():
    table = torch.arange(6.0).view(2, 3)
    i, j = torch.tensor([-5, 0, 1, 9]), torch.tensor([7, 1, -1, 2])
    assert m.load(table, i, j).tolist() == [2.0, 1.0, 3.0, 5.0]
    assert m.load(torch.tensor([3, 4]), i).tolist() == [3, 3, 4, 4]
    assert m.load(torch.tensor([True, False]), i).dtype == torch.bool
    assert m.load(table.half(), i, j).dtype == torch.float32
    assert m.load(table.double(), i, j).dtype == torch.float64


@pytest.mark.parametrize(("a", "b", "quotient", "rest"), [(7, 3, 2, 1), (-7, 3, -3, 2), (7, -3, -3, -2)])
def test_integer_division_rounds_down(a, b, quotient, rest):
    x = torch.tensor([a])
    assert (int(m.floordiv(x, b)), int(m.mod(x, b))) == (quotient, rest)


# ------------------------------------------------------------------------------------------------ decoration


def test_a_fingerprint_is_code_and_numbers():
    def make(cap, scale=1.0):
        @score_mod
        def capped(score, b, h, q_idx, kv_idx):
            """Words do not count."""
            bound = cap * scale
            return bound * m.tanh(score / bound)

        return capped

    assert make(30.0) == make(30.0)
    assert len({make(30.0), make(50.0), make(30.0, 2.0), make(30), mods.soft_cap(30.0)}) == 5
    assert str(make(30.0)) == "capped(cap=30.0, scale=1.0)"


def test_numbers_are_those_of_the_moment_of_decoration():
    global CAP

    @score_mod
    def capped(score, b, h, q_idx, kv_idx):
        return m.minimum(score, CAP)

    before, CAP = CAP, 1.0
    try:
        assert capped(torch.tensor([9.0]), 0, 0, 0, 0).item() == before
        assert dict(capped.captured) == {"CAP": before}
    finally:
        CAP = before


def _refused(function: Any, decorator: Any = score_mod) -> str:
    with pytest.raises(ModError) as caught:
        decorator(function)
    return str(caught.value)


def test_what_cannot_be_inlined_is_refused_with_the_fix():
    scale = {"a": 1.0}

    def branches(score, b, h, q_idx, kv_idx):
        if kv_idx > 3:
            return score
        return -score

    def many(score, b, h, q_idx, kv_idx):
        x = score if score > 0 else -score
        y = 0 <= kv_idx < 5 and q_idx > 1
        z = TABLE[h] + scale["a"] + TABLE
        return math.tanh(score) + x**2 + kv_idx // 2 + kv_idx % 2 + y + z + scale + m.cosh(score) + unknown  # noqa: F821

    assert "only `name = expression` may stand before the return" in _refused(branches)
    text = _refused(many)
    for part in (
        "m.where(c, a, b)", "use & and |", "m.load(table, i)", "math.tanh is not known everywhere", "multiply, or use",
        "m.floordiv(a, b)", "m.mod(a, b)", "m.cosh does not exist; m has: abs", "unknown is not known",
        "scale is a dict; only numbers are captured",
    ):  # fmt: skip
        assert part in text, part


def test_tensors_are_not_captured():
    def biased(score, b, h, q_idx, kv_idx):
        return score + TABLE

    assert "TABLE is a tensor; tensors come in as parameters behind kv_idx, given by .aux(TABLE=...)" in _refused(
        biased
    )


def test_parameters_are_those_of_the_kind():
    def short(score, b, h, kv_idx):
        return score

    def defaulted(b, h, q_idx, kv_idx, window=3):
        return kv_idx > q_idx - window

    def unread(b, h, q_idx, kv_idx, table):
        return kv_idx > q_idx

    def bare(b, h, q_idx, kv_idx, table):
        return kv_idx > table

    def two_ways(b, h, q_idx, kv_idx, table):
        return m.load(table, b) > m.load(table, b, h)

    assert "a score_mod takes (score, b, h, q_idx, kv_idx), then its tables" in _refused(short)
    assert "all without defaults" in _refused(defaulted, mask_mod)
    assert "table table is never read" in _refused(unread, mask_mod)
    assert "table table is read with m.load(table, index, ...)" in _refused(bare, mask_mod)
    assert "is read with 1 and with 2 indices" in _refused(two_ways, mask_mod)


def test_names_that_would_change_their_meaning_are_refused():
    cap = 3.0

    def rescaled(score, b, h, q_idx, kv_idx):
        cap = cap * 2  # noqa: F823
        return score * cap

    def table_called_m(score, b, h, q_idx, kv_idx, m):
        return score + m.load(m, h)

    @functools.wraps(biased.function)
    def wrapped(*arguments):
        return -biased(*arguments)

    assert cap == 3.0
    assert "line 2: cap is used before it is assigned" in _refused(rescaled)
    assert "m.load is not known everywhere" in _refused(table_called_m)
    assert "is wrapped by another decorator" in _refused(wrapped)
    assert "must be a plain Python function, got Mod" in _refused(biased)


def test_lambdas_and_other_things_are_refused():
    assert "must be written with `def`" in _refused(lambda score, b, h, q_idx, kv_idx: score)
    assert "must be a plain Python function, got type" in _refused(dict)
    scope: dict[str, Any] = {}
    exec("def f(score, b, h, q_idx, kv_idx):\n    return score", scope)
    assert "its source cannot be read" in _refused(scope["f"])


# ------------------------------------------------------------------------------------------------ the call


@score_mod
def biased(score, b, h, q_idx, kv_idx, bias):
    return score + m.load(bias, h, kv_idx)


@pytest.mark.parametrize(
    ("given", "part"),
    [
        (biased, "use biased.aux(bias=...)"),
        (lambda s: s, "- <lambda> is no mod; decorate it"),
        ([mods.sigmoid(), mods.sigmoid(1.0)], "one activation at most, got 2"),
        (biased.aux(bias=torch.ones(4)), "is read with 2 indices, got shape (4,)"),
        (biased.aux(bias=torch.ones(0, 4)), "must have an element"),
        (biased.aux(bias=torch.ones(4, 4, dtype=torch.float64)), "got torch.float64; convert it first"),
        (biased.aux(bias=[1.0]), "must be a tensor, got list"),
        (Rope.of_base(6, 112), "must be [positions, 4]"),
        (Rope.of_base(8, 96), "has 96 positions, but block_table can hold 112 keys"),
    ],
)  # fmt: skip
def test_bad_arguments(given, part):
    arguments = native_arguments("decode", CASE.tensors())
    with pytest.raises(ProblemError) as caught:
        openmla.decode(**arguments, mods=given)
    assert part in str(caught.value)


def test_results_of_the_wrong_kind_are_refused():
    @mask_mod
    def number(b, h, q_idx, kv_idx):
        return kv_idx - q_idx

    @score_mod
    def truth(score, b, h, q_idx, kv_idx):
        return score > 0

    arguments = native_arguments("decode", CASE.tensors())
    with pytest.raises(ProblemError, match="mask_mod number must return a boolean per score"):
        openmla.decode(**arguments, mods=number)
    with pytest.raises(ProblemError, match="score_mod truth must return a number per score"):
        openmla.decode(**arguments, mods=truth)


def test_a_sink_has_no_meaning_beside_an_activation():
    arguments = native_arguments("decode", dataclasses.replace(CASE, has_sink=True).tensors())
    with pytest.raises(ProblemError, match="attn_sink belongs to softmax"):
        openmla.decode(**arguments, mods=mods.sigmoid())


def test_unknown_tables_are_refused():
    with pytest.raises(ModError, match="no table is called slopes; it has: bias"):
        biased.aux(slopes=torch.ones(3))


def test_another_table_is_another_result():
    """The second call finds the first one's kernel; it must not find its tensors."""
    arguments = native_arguments("decode", CASE.tensors())
    first = openmla.decode(**arguments, mods=mods.alibi(torch.ones(4)))[0]
    second = openmla.decode(**arguments, mods=mods.alibi(torch.zeros(4)))[0]
    torch.testing.assert_close(second, openmla.decode(**arguments)[0])
    assert not torch.equal(first, second)


def test_problems_keep_no_tensor():
    form = attach([mods.alibi(torch.ones(4)), Rope.of_base(8, 4)]).form
    assert all(not each.given for each in form.functions)
    assert form == attach([mods.alibi(torch.zeros(9)), Rope.of_base(16, 4)]).form


def test_a_plan_is_for_the_mods_it_was_made_with():
    arguments = native_arguments("decode", CASE.tensors())
    planned = {key: value for key, value in arguments.items() if key != "softmax_scale"}
    plan = openmla.plan(**planned, mods=mods.soft_cap(2.0))
    openmla.decode(**arguments, mods=mods.soft_cap(2.0), plan=plan)
    with pytest.raises(ProblemError, match=r"mods: the plan has soft_cap\(cap=2.0\)"):
        openmla.decode(**arguments, plan=plan)
    assert openmla.workspace_bytes(**planned, mods=mods.soft_cap(2.0)) == 0


def test_explain_says_who_inlines_a_mod():
    problem = dataclasses.replace(backends.typical_problem("decode"), mods=attach(mods.soft_cap(30.0)).form)
    text = str(openmla.explain(problem, target="h100_sxm"))
    assert "mods=soft_cap(cap=30.0)#" in text
    assert text.count("inlines no mods, decode_dense does: soft_cap(cap=30.0)") == 1
    rows = {row.kernel: row.verdict for row in openmla.explain(problem, target="h100_sxm").candidates}
    assert rows["decode_tiled"]
    assert not rows["decode_dense_small"]
    assert not any("mod" in why for why in rows["decode_dense"].reasons), "it may lack a compiler, not the ability"
    activation = dataclasses.replace(problem, mods=attach(mods.sigmoid(-8.0)).form)
    for row in openmla.explain(activation, target="h100_sxm").candidates:
        says = "inlines no activation in place of softmax, got sigmoid(bias=-8.0)" in row.verdict.reasons
        assert says == (row.backend == "cute"), row.kernel


def test_the_kernel_of_e4m3_queries_inlines_no_mod():
    plain = dataclasses.replace(
        backends.typical_problem("decode"), dtype=torch.float8_e4m3fn, layout=kv_layout("fp8_576")
    )
    problem = dataclasses.replace(plain, mods=attach(mods.soft_cap(30.0)).form)
    rows = {row.kernel: row.verdict for row in openmla.explain(problem, target="h100_sxm").candidates}
    assert "inlines no mods: soft_cap(cap=30.0)" in rows["decode_fp8"].reasons


def test_explain_takes_mods_by_name(capsys, monkeypatch, tmp_path):
    (tmp_path / "my_mods_of_a_test.py").write_text(
        "from openmla.mods import mask_mod\n\n\n"
        "@mask_mod\ndef every_second(b, h, q_idx, kv_idx):\n    return (kv_idx & 1) == 0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    asked = ["--mod", "soft_cap(30.0)", "--mod", "alibi", "--mod", "rope", "--mod", "my_mods_of_a_test:every_second"]
    assert cli.main(["explain", "decode", "--target", "h100_sxm", *asked]) == 0
    text = capsys.readouterr().out
    for part in (
        "soft_cap(cap=30.0)#",
        "alibi#",
        "every_second#",
        "+rope",
        "reads no tables in a mod, alibi reads slopes",
    ):
        assert part in " ".join(text.split()), part


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("nope", "unknown mod 'nope'; the library has: alibi"),
        ("soft_cap", "write its numbers as in soft_cap(30.0)"),
        ("math:pi", "is a float, no mod"),
        ("no.such.module:x", "cannot be imported"),
        ("a b", "names no mod"),
    ],
)
def test_bad_names_of_mods(name, part):
    with pytest.raises(ConfigError) as caught:
        mods.named([name])
    assert part in str(caught.value)


def test_under_torch_compile_a_mod_runs_eagerly():
    arguments = native_arguments("decode", CASE.tensors())

    def twice(**given):
        return openmla.decode(**given, mods=mods.soft_cap(2.0))[0] * 2

    expected = twice(**arguments)
    torch.testing.assert_close(torch.compile(twice, backend="eager")(**arguments), expected)


@activation
def squared_relu(score, b, h, q_idx, kv_idx):
    positive = m.maximum(score, 0.0)
    return positive * positive


def test_an_activation_of_your_own():
    judge(CASE, squared_relu)
