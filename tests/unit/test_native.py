"""The native operations: what they refuse, what they promise, and that a call says why."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

import openmla
from openmla import backends
from openmla.core.errors import ConfigError, PlanMismatchError, ProblemError, UnsupportedError
from openmla.core.faults import Fault
from openmla.core.target import Target
from openmla.ops import dispatch
from openmla.reference import attention
from openmla.testing import budget

PAGE = 16


def _decode_case(batch: int = 3, s_q: int = 2, h_q: int = 4, length: int = 40, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    pages_each = -(-length // PAGE)
    cache = torch.randn(batch * pages_each + 2, PAGE, 1, 576, generator=generator).to(torch.bfloat16)
    table = torch.randperm(batch * pages_each, generator=generator).to(torch.int32).view(batch, pages_each)
    return {
        "q": torch.randn(batch, s_q, h_q, 576, generator=generator).to(torch.bfloat16),
        "kv_cache": cache,
        "block_table": table,
        "cache_seqlens": torch.full((batch,), length, dtype=torch.int32),
    }


def _golden(case: dict[str, Any], **options: Any) -> attention.Attention:
    return attention.decode(
        **case, softmax_scale=options.pop("softmax_scale", 576**-0.5), d_v=512, with_bounds=True, **options
    )


@pytest.fixture(autouse=True)
def _clean_faults() -> None:
    openmla.check_errors()


def test_decode_obeys_the_tolerance_rule() -> None:
    case = _decode_case()
    out, lse = openmla.decode(**case, is_causal=True)
    budget.check(out, lse, _golden(case, is_causal=True), dtype=torch.bfloat16).require()
    assert openmla.check_errors() == ()


def test_all_violations_are_named_at_once() -> None:
    case = _decode_case()
    case["block_table"] = case["block_table"].long()
    case["cache_seqlens"] = case["cache_seqlens"][:2]
    case["q"] = case["q"].double()
    with pytest.raises(ProblemError) as caught:
        openmla.decode(**case)
    text = str(caught.value)
    assert "q must be bfloat16 or float16 or float32, got float64; convert it first" in text
    case["q"] = case["q"].to(torch.bfloat16)
    with pytest.raises(ProblemError) as caught:
        openmla.decode(**case)
    text = str(caught.value)
    assert "decode: 2 problem(s) with the inputs" in text
    assert "block_table must be int32, got int64; convert it first" in text
    assert "cache_seqlens must have batch=3 entries, got 2" in text


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        pytest.param({"q": None}, "q must be a tensor [batch, s_q, h_q, d_qk], got NoneType", id="no-query"),
        pytest.param({"q": torch.zeros(3, 4, 576)}, "got shape (3, 4, 576); .unsqueeze() adds a dimension", id="3d-query"),
        pytest.param({"cache_seqlens": [1, 2, 3]}, "got list; make it one with torch.tensor(..., dtype=torch.int32)", id="list"),
        pytest.param({"mods": "soft_cap"}, "1 problem(s) with the inputs\n  - 'soft_cap' is no mod", id="mod-by-name"),
        pytest.param({"d_v": 600}, "d_v must be 1 to 576", id="d_v-beyond-d_qk"),
        pytest.param({"window": 0}, "window must be at least 1 key or None, got 0", id="window-0"),
        pytest.param({"softmax_scale": float("nan")}, "softmax_scale must be a finite number, got nan", id="nan-scale"),
        pytest.param({"attn_sink": torch.zeros(3)}, "attn_sink must have h_q=4 entries, got 3", id="short-sink"),
        pytest.param({"kv_cache": torch.zeros(4, 16, 576)}, "kv_cache must be a tensor [num_pages, page_size", id="3d-cache"),
        pytest.param({"kv_cache": torch.zeros(4, 16, 1, 576)}, "kv_cache must have the dtype of q (bfloat16)", id="fp32-cache"),
        pytest.param({"kv_cache": torch.zeros(4, 16, 3, 576).bfloat16()}, "h_q must be a positive multiple of h_kv=3", id="heads"),
        pytest.param({"kv_layout": "fp8_999"}, "unknown KV layout 'fp8_999'; use one of: fp8_656", id="unknown-layout"),
        pytest.param({"kv_layout": "fp8_656"}, "must have a 1-byte dtype, got bfloat16; drop kv_layout=", id="layout-dtype"),
        pytest.param({"policy": "fair"}, "policy must be one of balanced, batch_invariant, got 'fair'", id="policy"),
        pytest.param({"lse_base": "10"}, "lse_base must be 'e' (natural) or '2', got '10'", id="lse-base"),
        pytest.param({"cu_seqlens_q": torch.zeros(4, dtype=torch.int32)}, "q must be [total_q, h_q, d_qk] when", id="varlen-rank"),
    ],
)  # fmt: skip
def test_bad_metadata_gets_one_clear_error(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ProblemError) as caught:
        openmla.decode(**{**_decode_case(), **change})
    assert sentence in str(caught.value)


def test_workspace_bytes_refuses_what_decode_refuses() -> None:
    with pytest.raises(ProblemError, match="policy must be one of balanced, batch_invariant, got 'fair'"):
        openmla.workspace_bytes(**_decode_case(), policy="fair")  # type: ignore[arg-type]


def test_last_dimension_must_be_contiguous() -> None:
    case = _decode_case()
    case["q"] = case["q"].transpose(-1, -2).contiguous().transpose(-1, -2)
    with pytest.raises(
        ProblemError, match=r"q must be contiguous in its last dimension, got strides .*; call .contiguous"
    ):
        openmla.decode(**case)


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        pytest.param(lambda c: c["block_table"].__setitem__((1, 0), 10**6), Fault.PAGE_OUT_OF_RANGE, id="page-high"),
        pytest.param(lambda c: c["block_table"].__setitem__((1, 0), -7), Fault.PAGE_OUT_OF_RANGE, id="page-negative"),
        pytest.param(lambda c: c["cache_seqlens"].__setitem__(1, -5), Fault.LENGTH_NEGATIVE, id="length-negative"),
        pytest.param(lambda c: c["cache_seqlens"].__setitem__(1, 10**6), Fault.LENGTH_OVER_CAPACITY, id="length-long"),
    ],
)
def test_bad_values_are_masked_and_reported_and_others_keep_their_bits(spoil: Any, fault: Fault) -> None:
    clean = _decode_case()
    expected, expected_lse = openmla.decode(**clean)
    case = {name: tensor.clone() for name, tensor in clean.items()}
    spoil(case)
    out, lse = openmla.decode(**case)
    assert fault in openmla.check_errors()
    assert openmla.check_errors() == (), "reading the faults clears them"
    for mate in (0, 2):
        assert torch.equal(out[mate], expected[mate])
        assert torch.equal(lse[mate], expected_lse[mate])
    budget.check(out, lse, _golden(case), dtype=torch.bfloat16).require()


def test_strict_checks_raise_for_a_bad_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENMLA_CHECKS", "strict")
    case = _decode_case()
    case["cache_seqlens"][0] = -1
    with pytest.raises(ProblemError, match="cache_seqlens holds a negative length"):
        openmla.decode(**case)


def test_malformed_environment_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENMLA_BACKEND", "cuda")
    with pytest.raises(ConfigError, match="OPENMLA_BACKEND='cuda' is not legal; use one of: auto, cute, triton, torch"):
        openmla.decode(**_decode_case(seed=99))


def test_a_named_backend_never_falls_back() -> None:
    with pytest.raises(UnsupportedError) as caught:
        openmla.decode(**_decode_case(), backend="triton")
    text = str(caught.value)
    assert "decode cannot run on" in text
    assert "; backend='auto' would run torch/decode_tiled\n" in text
    assert "problem: batch=3 s_q=2" in text
    assert "torch/" in text


def test_out_is_written_and_checked() -> None:
    case = _decode_case()
    expected, _ = openmla.decode(**case)
    mine = torch.full((3, 2, 4, 512), torch.nan, dtype=torch.bfloat16)
    out, lse = openmla.decode(**case, out=mine, return_lse=False)
    assert out is mine
    assert lse is None
    assert torch.equal(mine, expected)
    strided = torch.full((3, 2, 4, 1024), torch.nan, dtype=torch.bfloat16)[..., :512]
    openmla.decode(**case, out=strided)
    assert torch.equal(strided, expected)
    with pytest.raises(ProblemError, match="out must not overlap an input"):
        openmla.decode(**case, out=case["q"][..., :512])
    with pytest.raises(ProblemError, match=r"out must have shape \(3, 2, 4, 512\), got \(3, 2, 4, 511\)"):
        openmla.decode(**case, out=torch.empty(3, 2, 4, 511, dtype=torch.bfloat16))


def test_lse_base_2() -> None:
    case = _decode_case()
    _, natural = openmla.decode(**case)
    _, binary = openmla.decode(**case, lse_base="2")
    assert natural is not None
    assert binary is not None
    torch.testing.assert_close(binary, natural / math.log(2), rtol=1e-6, atol=0)


def test_a_plan_serves_many_layers_and_refuses_another_problem() -> None:
    case = _decode_case()
    made = openmla.plan(**case)
    expected, _ = openmla.decode(**case)
    for seed in (1, 2):
        layer = {**case, "q": torch.randn_like(case["q"]) if seed == 2 else case["q"]}
        planned, _ = openmla.decode(**layer, plan=made)
        unplanned, _ = openmla.decode(**layer)
        assert torch.equal(planned, unplanned)
    assert torch.equal(openmla.decode(**case, plan=made)[0], expected)
    with pytest.raises(PlanMismatchError) as caught:
        openmla.decode(**_decode_case(batch=2), plan=made)
    assert "batch: the plan has 3, the call has 2" in str(caught.value)


def test_a_plan_takes_a_scale_below_zero() -> None:
    """Its sign decides which kernel may run; the default is a plan for every positive one."""
    case = _decode_case()
    below = openmla.plan(**case, softmax_scale=-0.1)
    assert torch.equal(*(openmla.decode(**case, softmax_scale=-0.1, plan=each)[0] for each in (below, None)))
    with pytest.raises(PlanMismatchError, match="is_scale_positive: the plan has True, the call has False"):
        openmla.decode(**case, softmax_scale=-0.1, plan=openmla.plan(**case))
    assert openmla.workspace_bytes(**case, softmax_scale=-0.1) == 0


@pytest.mark.parametrize("options", [{}, {"return_lse": False}, {"workspace": torch.zeros(256, dtype=torch.uint8)}])
def test_what_is_no_plan_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ProblemError, match=r"plan must come from openmla\.plan"):
        openmla.decode(**_decode_case(), plan="plan", **options)  # type: ignore[arg-type]


def test_ever_changing_shapes_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_MAX_REMEMBERED", 3)
    case = _decode_case()
    plan = openmla.plan(**case, is_causal=True)
    before = openmla.decode(**case, is_causal=True, plan=plan)[0]
    for batch in range(1, 9):
        openmla.decode(**_decode_case(batch=batch, h_q=3))
        assert max(map(len, (dispatch._prepared, dispatch._compiled, dispatch._problems))) <= 3
    assert torch.equal(openmla.decode(**case, is_causal=True, plan=plan)[0], before), "a plan outlives the memory"


def test_a_stale_plan_is_reported_and_harmless() -> None:
    case = _decode_case()
    made = openmla.plan(**case)
    case["cache_seqlens"] -= 7
    out, lse = openmla.decode(**case, plan=made)
    assert openmla.check_errors() == (Fault.PLAN_STALE,)
    budget.check(out, lse, _golden(case), dtype=torch.bfloat16).require()


def test_batch_invariant_rows_do_not_depend_on_their_mates() -> None:
    case = _decode_case(batch=4, length=200)
    together, lse = openmla.decode(**case, policy="batch_invariant")
    for request in range(4):
        alone = {name: (t if name == "kv_cache" else t[request : request + 1]) for name, t in case.items()}
        out, own = openmla.decode(**alone, policy="batch_invariant")
        assert torch.equal(out[0], together[request])
        assert torch.equal(own[0], lse[request])


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("s_q", [0, 1])
def test_nothing_to_do_is_fine(batch: int, s_q: int) -> None:
    case = _decode_case(batch=1)
    case["q"] = case["q"][:batch, :s_q]
    case["block_table"], case["cache_seqlens"] = case["block_table"][:batch], case["cache_seqlens"][:batch] * 0
    out, lse = openmla.decode(**case)
    assert out.shape == (batch, s_q, 4, 512)
    assert lse.shape == (batch, 4, s_q)
    assert not out.any()
    assert bool((lse == -torch.inf).all())


def test_varlen_queries_equal_uniform_ones() -> None:
    case = _decode_case(batch=3, s_q=2)
    uniform, lse = openmla.decode(**case, is_causal=True)
    flat = {**case, "q": case["q"].flatten(0, 1)}
    starts = torch.tensor([0, 2, 4, 6], dtype=torch.int32)
    out, flat_lse = openmla.decode(**flat, is_causal=True, cu_seqlens_q=starts, max_seqlen_q=2)
    assert torch.equal(out.view(3, 2, 4, 512), uniform)
    assert torch.equal(flat_lse.view(4, 3, 2).transpose(0, 1), lse)


def test_explain_names_every_backend_and_why() -> None:
    text = str(openmla.explain("decode", target="cpu"))
    assert "-> torch/" in text
    for backend in ("cute", "triton", "torch"):
        assert f"{backend}/" in text
    facts = openmla.explain("sparse_decode", target="h100_sxm").as_dict()
    assert {row["backend"] for row in facts["candidates"]} == {"cute", "triton", "torch"}
    chosen = [row["chosen"] for row in facts["candidates"]].index(True)
    for row in facts["candidates"][:chosen]:  # those behind it may be able to run as well
        assert row["reasons"]


def test_a_problem_describes_what_is_unusual() -> None:
    usual = openmla.explain("decode", target="cpu").problem
    assert str(usual).startswith("batch=128 s_q=1")
    assert "is_" not in str(usual)
    assert str(dataclasses.replace(usual, is_aligned=False, is_causal=True)).endswith("is_causal=True is_aligned=False")


def test_what_names_no_problem_or_layout_is_refused() -> None:
    with pytest.raises(ConfigError, match="problem must be a Problem or the name of an operation, got 3"):
        openmla.explain(3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="unknown KV layout 656; use one of: fp8_656"):
        openmla.kv_layout(656)  # type: ignore[arg-type]


def test_what_is_no_kernel_never_enters_the_table() -> None:
    before = dict(backends.TABLE)
    with pytest.raises(ConfigError, match="int lacks backend, name, supports"):
        backends.extend("decode", 3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="a kernel of append, not of decode"):
        backends.extend("decode", backends.kernels("append")[-1])
    assert before == backends.TABLE


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there_has_a_name() -> None:
    for call in (lambda: Target.detect("cuda"), lambda: openmla.PagedKVCache("bf16_576", 2, device="cuda:1")):
        with pytest.raises(
            ConfigError, match=r"no device cuda:[01]: PyTorch sees no CUDA device here; pass device='cpu'"
        ):
            call()


def test_explain_does_not_raise_when_nobody_can() -> None:
    explanation = openmla.explain("decode", target="h100_sxm", backend="triton")
    assert explanation.chosen is None or explanation.chosen.backend == "triton"


def test_error_objects_survive_a_process_boundary() -> None:
    import copy

    for error in (
        ProblemError("decode", ["a", "b"]),
        PlanMismatchError("decode", ["a"]),
        UnsupportedError("no", {"cute/x": ("because",)}, "batch=1"),
        openmla.core.errors.OutOfPagesError(3, 1, 1),
    ):
        twin = copy.copy(error)
        assert type(twin) is type(error)
        assert str(twin) == str(error)


def test_sparse_decode_masks_hostile_indices() -> None:
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(2, 1, 3, 576, generator=generator).to(torch.bfloat16)
    cache = torch.randn(4, PAGE, 1, 576, generator=generator).to(torch.bfloat16)
    indices = torch.randint(0, 4 * PAGE, (2, 1, 24), generator=generator, dtype=torch.int32)
    expected, expected_lse = openmla.sparse_decode(q, cache, indices)
    assert openmla.check_errors() == ()
    hostile = torch.tensor([-1, -2, 4 * PAGE, 114514, 2**31 - 1, -(2**31)], dtype=torch.int32)
    mixed = torch.cat([indices, hostile.expand(2, 1, 6)], -1)
    out, lse = openmla.sparse_decode(q, cache, mixed)
    assert openmla.check_errors() == (Fault.INDEX_OUT_OF_RANGE,)
    golden = attention.sparse_decode(q, cache, mixed, softmax_scale=576**-0.5, d_v=512, layout=None, with_bounds=True)
    budget.check(out, lse, golden, dtype=torch.bfloat16).require()
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)
    del expected


def test_minus_one_is_not_a_fault() -> None:
    q = torch.randn(1, 1, 2, 576).bfloat16()
    cache = torch.full((1, PAGE, 1, 576), torch.nan, dtype=torch.bfloat16)
    out, lse = openmla.sparse_decode(q, cache, torch.full((1, 1, 8), -1, dtype=torch.int32))
    assert openmla.check_errors() == ()
    assert not out.any()
    assert bool((lse == -torch.inf).all())


def test_strict_blames_nothing_of_an_earlier_call(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = {"q": torch.randn(1, 1, 4, 576), "kv_cache": torch.randn(2, 64, 1, 576)}
    table, lengths = torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([70], dtype=torch.int32)
    openmla.decode(**problem, block_table=table, cache_seqlens=-lengths)
    monkeypatch.setenv("OPENMLA_CHECKS", "strict")
    openmla.decode(**problem, block_table=table, cache_seqlens=lengths)
    with pytest.raises(ProblemError, match="cache_seqlens"):
        openmla.decode(**problem, block_table=table, cache_seqlens=-lengths)
    openmla.check_errors()
