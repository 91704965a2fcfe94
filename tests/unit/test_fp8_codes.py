"""fp8_576: codes without scales in the cache, e4m3 queries, and the scales that belong to the call."""

import math

import pytest
import torch

import openmla
from openmla import flash_mla
from openmla.backends.base import DecodeOperands
from openmla.backends.torch import anywhere
from openmla.core.errors import ProblemError
from openmla.core.layout import BYTE_LAYOUT_NAMES, kv_layout
from openmla.core.problem import DecodeProblem
from openmla.ops.append import append
from openmla.reference import attention
from openmla.reference.quant import dequantise, encode_e4m3, quantise, read_rows, write_rows
from openmla.testing import budget

LENGTHS = (130, 192, 1, 0)
SCALE = 0.05


def codes_and_scales(page_size=64, s_q=2, h_q=8):
    draw = torch.Generator().manual_seed(1)
    descale_q, descale_k = torch.tensor([0.03]), torch.tensor([0.02])
    pages = -(-192 // page_size)
    cache = kv_layout("fp8_576").empty_cache(4 * pages, page_size)
    rows = torch.randn(4 * pages * page_size, 576, generator=draw)
    append(cache, torch.arange(len(rows)), rows, kv_layout="fp8_576", descale=descale_k)
    q = encode_e4m3(2 * torch.randn(4, s_q, h_q, 576, generator=draw) / descale_q)
    table = torch.randperm(4 * pages, generator=draw).int().view(4, pages)
    return q, cache, table, torch.tensor(LENGTHS, dtype=torch.int32), descale_q, descale_k


def by_hand(q, cache, table, lengths, softmax_scale, page_size):
    """fp64, request by request, from the definition alone; q and cache are numbers, not codes."""
    outs, lses = [], []
    for request, length in enumerate(lengths.tolist()):
        keys = cache[table[request].long()].reshape(-1, 576)[:length]
        logits = softmax_scale * torch.einsum("ihd,jd->ihj", q[request].double(), keys)
        lse = torch.logsumexp(logits, -1) if length else torch.full(logits.shape[:-1], -math.inf).double()
        weights = torch.exp(logits - lse[..., None].nan_to_num(neginf=0.0))
        outs.append(torch.einsum("ihj,jd->ihd", weights, keys[:, :512]))
        lses.append(lse.transpose(0, 1))
    return torch.stack(outs), torch.stack(lses)


def test_a_token_is_576_codes_and_its_scale_is_the_calls():
    layout = kv_layout("fp8_576")
    assert (layout.bytes_per_token, layout.scale_bytes, layout.d_qk, layout.d_v) == (576, 0, 576, 512)
    assert layout.has_call_scale and "fp8_576" not in BYTE_LAYOUT_NAMES
    every = torch.arange(256, dtype=torch.uint8).repeat(9)[: 4 * 576].view(4, 1, 1, 576)
    got = dequantise(every, "fp8_576", torch.float32)
    assert torch.equal(got.nan_to_num(7.5), every.view(torch.float8_e4m3fn).float().nan_to_num(7.5))
    again = quantise(got, "fp8_576")
    assert torch.equal(dequantise(again, "fp8_576").nan_to_num(7.5), got.bfloat16().nan_to_num(7.5))


def test_writing_saturates_and_keeps_what_is_not_finite_visible():
    cache = kv_layout("fp8_576").empty_cache(1, 4)
    rows = torch.zeros(2, 576)
    rows[0, :5] = torch.tensor([1e9, -1e9, math.inf, math.nan, 3.0])
    write_rows(cache, "fp8_576", torch.tensor([2, 0]), rows, torch.tensor([0.5]))
    got = read_rows(cache, "fp8_576", torch.tensor([2]))[0, :5]
    assert got[:2].tolist() == [448, -448] and got[2:4].isnan().all() and got[4] == 6


@pytest.mark.parametrize("page_size", [64, 5])
@pytest.mark.parametrize("is_coded", [True, False])
def test_decode_is_the_definition(page_size, is_coded):
    q, cache, table, lengths, descale_q, descale_k = codes_and_scales(page_size)
    numbers = dequantise(cache, "fp8_576", torch.float64)[:, :, 0] * float(descale_k)
    scales = {"descale_q": descale_q} if is_coded else {}
    asked = q if is_coded else q.bfloat16()
    want, want_lse = by_hand(
        asked.double() * (float(descale_q) if is_coded else 1.0), numbers, table, lengths, SCALE, page_size
    )
    golden = attention.decode(
        asked, cache, table, lengths, softmax_scale=SCALE, d_v=512, layout="fp8_576", descale_k=descale_k,
        with_bounds=True, **scales,
    )  # fmt: skip
    assert torch.allclose(golden.out, want, rtol=1e-12, atol=1e-12)
    assert torch.allclose(golden.lse, want_lse, rtol=1e-12)
    out, lse = openmla.decode(
        asked, cache, table, lengths, kv_layout="fp8_576", softmax_scale=SCALE, descale_k=descale_k, **scales
    )
    assert out.dtype == torch.bfloat16
    report = budget.check(out, lse, golden, dtype=torch.bfloat16)
    assert report.passed, str(report)


def test_the_path_of_other_devices_agrees():
    q, cache, table, lengths, descale_q, descale_k = codes_and_scales()
    sink = torch.linspace(-1, 1, 8)
    problem = DecodeProblem.from_tensors(
        q, cache, table, lengths, layout="fp8_576", is_causal=True, attn_sink=sink, descale_q=descale_q,
        descale_k=descale_k,
    )  # fmt: skip
    out = torch.empty(4, 2, 8, 512, dtype=torch.bfloat16)
    lse = torch.empty(4, 8, 2)
    word = torch.zeros(1, dtype=torch.int32)
    scales = {"descale_q": descale_q, "descale_k": descale_k}
    anywhere.decode(problem, DecodeOperands(q, cache, table, lengths, SCALE, out, lse, word, attn_sink=sink, **scales))
    golden = attention.decode(
        q, cache, table, lengths, softmax_scale=SCALE, d_v=512, layout="fp8_576", is_causal=True, attn_sink=sink,
        with_bounds=True, **scales,
    )  # fmt: skip
    report = budget.check(out, lse, golden, dtype=torch.bfloat16)
    assert report.passed, str(report)


def test_without_scales_codes_count_as_they_are():
    q, cache, table, lengths, *_ = codes_and_scales()
    one = torch.ones(1)
    bare = openmla.decode(q, cache, table, lengths, kv_layout="fp8_576", softmax_scale=1e-5)
    given = openmla.decode(
        q, cache, table, lengths, kv_layout="fp8_576", softmax_scale=1e-5, descale_q=one, descale_k=one[0]
    )
    assert torch.equal(bare[0], given[0]) and torch.equal(bare[1], given[1])


def test_a_plan_serves_other_scales():
    q, cache, table, lengths, descale_q, descale_k = codes_and_scales()
    plan = openmla.plan(q, cache, table, lengths, kv_layout="fp8_576")
    for factor in (1, 2):
        options = {"kv_layout": "fp8_576", "softmax_scale": SCALE, "descale_q": factor * descale_q}
        planned = openmla.decode(q, cache, table, lengths, plan=plan, descale_k=descale_k, **options)
        fresh = openmla.decode(q, cache, table, lengths, descale_k=descale_k, **options)
        assert torch.equal(planned[0], fresh[0]) and torch.equal(planned[1], fresh[1])


def test_the_border_takes_it_as_sgl_flash_mla_does():
    q, cache, table, lengths, descale_q, descale_k = codes_and_scales()
    want, want_lse = openmla.decode(
        q, cache, table, lengths, kv_layout="fp8_576", is_causal=True, descale_q=descale_q, descale_k=descale_k
    )
    for is_fp8 in (True, None, False):  # the queries say it, too
        out, lse = flash_mla.flash_mla_with_kvcache(
            q, cache.view(torch.float8_e4m3fn), table, lengths, 512, flash_mla.get_mla_metadata()[0], causal=True,
            is_fp8_kvcache=is_fp8, use_legacy=True, descale_q=descale_q, descale_k=descale_k,
        )  # fmt: skip
        assert torch.equal(out, want)
        assert torch.equal(lse, want_lse.masked_fill(want_lse == -math.inf, math.inf))


def test_a_graph_holds_it():
    q, cache, table, lengths, descale_q, descale_k = codes_and_scales()
    options = {"kv_layout": "fp8_576", "descale_q": descale_q, "descale_k": descale_k}
    traced = torch.compile(
        lambda q: openmla.decode(q, cache, table, lengths, **options)[0], backend="eager", fullgraph=True
    )
    assert torch.equal(traced(q), openmla.decode(q, cache, table, lengths, **options)[0])


def test_what_contradicts_itself_is_refused():
    q, cache, table, lengths, descale_q, descale_k = codes_and_scales()
    other = quantise(torch.zeros(4, 64, 1, 576), "fp8_656")
    cases = (
        ({"kv_layout": "fp8_656"}, (q, other), "q in e4m3 needs kv_cache in layout fp8_576"),
        ({"kv_layout": "fp8_656", "descale_k": descale_k}, (q.bfloat16(), other), "descale_k is for layout fp8_576"),
        ({"kv_layout": "fp8_576", "descale_q": descale_q}, (q.bfloat16(), cache), "descale_q is for q in e4m3"),
        ({"kv_layout": "fp8_576", "descale_k": torch.ones(4)}, (q, cache), "descale_k must be one number"),
        ({"kv_layout": "fp8_576", "descale_k": torch.ones(1).half()}, (q, cache), "descale_k must be float32"),
        ({"kv_layout": "fp8_576", "descale_k": 0.5}, (q, cache), "descale_k must be a tensor"),
    )
    for options, (queries, keys), why in cases:
        with pytest.raises(ProblemError, match=why):
            openmla.decode(queries, keys, table.clamp_max(3), lengths, **options)
    with pytest.raises(ProblemError, match="read by dense decode alone"):
        openmla.sparse_decode(q.bfloat16(), cache, torch.zeros(4, 2, 3, dtype=torch.int32), kv_layout="fp8_576")
    with pytest.raises(ProblemError, match="descale is for layout fp8_576 alone"):
        append(other, torch.zeros(1, dtype=torch.int64), torch.zeros(1, 576), kv_layout="fp8_656", descale=descale_k)
    with pytest.raises(ProblemError, match="for the dense form"):
        flash_mla.flash_mla_with_kvcache(
            q.bfloat16(), other, None, None, 512, flash_mla.get_mla_metadata()[0], is_fp8_kvcache=True,
            indices=torch.zeros(4, 2, 3, dtype=torch.int32), descale_k=descale_k,
        )  # fmt: skip


def two_terms(weights):
    """Weights as FP8 tensor cores are given them: 2^8 p in e4m3, and what that leaves over in e4m3."""
    scaled = 256 * weights / weights.amax(-1, keepdim=True)
    first = encode_e4m3(scaled).double()
    return first + encode_e4m3(scaled - first).double(), scaled.sum(-1, keepdim=True)


def test_the_rule_for_fp8_tensor_cores():
    """Two terms keep it, with sums that lose 2^-12; 16 lost keys of 250, or a twentieth of the output, breaks it."""
    draw = torch.Generator().manual_seed(2)
    cache = quantise(torch.randn(4, 64, 1, 576, generator=draw) + 1, "fp8_576")
    q = encode_e4m3(torch.randn(1, 1, 16, 576, generator=draw))
    table, lengths = torch.arange(4, dtype=torch.int32)[None], torch.tensor([250], dtype=torch.int32)
    golden = attention.decode(
        q, cache, table, lengths, softmax_scale=0.001, d_v=512, layout="fp8_576", with_bounds=True
    )
    keys = dequantise(cache, "fp8_576", torch.float64).view(-1, 576)[:250]
    weights, total = two_terms(torch.exp(0.001 * q[0, 0].double() @ keys.T))

    def report(weights, kept=1.0):
        out = weights @ keys[:, :512] / total * kept
        return budget.check(out[None, None].bfloat16(), golden.lse.float(), golden, dtype=torch.float8_e4m3fn)

    good = report(weights, 1 - 2.0**-12)
    assert good.passed, str(good)
    assert "HARD" in report(weights, 0.95).broken
    assert "HARD" in report(weights.index_fill(1, torch.arange(16), 0)).broken


WORST = torch.full((512,), 1.0625 / 16).double().index_fill(0, torch.tensor(0), 1.0)  # between two e4m3 numbers
SPREAD = torch.linspace(-3, 3, 512).double().exp()


@pytest.mark.parametrize(
    ("weights", "least", "most", "of_own_sum"),
    [(WORST, 0.05, 0.06, 0.002), (SPREAD, 0.001, 0.002, 0.002), (SPREAD**4, 0.003, 0.005, 0.005)],
)
def test_what_one_e4m3_number_per_weight_would_cost(weights, least, most, of_own_sum):
    """2^-4 of each weight, and the same of the output where they err alike; two numbers keep 2^-8 of each."""
    values = torch.randn(512, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 1
    scaled = 256 * weights[None] / weights.max()
    golden, sizes = scaled @ values / scaled.sum(), scaled @ values.abs() / scaled.sum()
    one, (two, total) = encode_e4m3(scaled).double(), two_terms(weights[None])
    step = 2.0**-10 * values.abs().sum(0) / total  # half of e4m3's smallest
    assert bool(((one @ values / total - golden).abs() <= 2.0**-4 * sizes + step).all())
    assert bool(((two @ values / total - golden).abs() <= 2.0**-8 * sizes + step).all())

    def relative(out):
        return float((out - golden).norm() / golden.norm())

    assert least <= relative(one @ values / total) <= most
    assert relative(two @ values / total) <= 2.0**-12
    # Divided by the sum of what was multiplied instead: what all weights have in common cancels.
    assert relative(one @ values / one.sum()) <= of_own_sum


def test_a_suite_measures_it():
    from openmla.core.target import Target
    from openmla.lab import gate, peers, roofline, workload
    from openmla.lab.suite import Case

    case = Case(batch=2, s_k=100, h_q=4, dtype="e4m3", layout="fp8_576")
    inputs = workload.decode_inputs(case, torch.device("cpu"))
    assert inputs.q.dtype == torch.float8_e4m3fn and inputs.kv_cache.shape[-1] == 576
    assert workload.problem(case).out_dtype == torch.bfloat16
    ours = peers.backend(case, [inputs], Target.preset("cpu"), "torch")
    verdict = gate.check(case, inputs, *ours.call(0))
    assert verdict.is_green, verdict.text
    other = peers.peer(case, [inputs], Target.preset("h100_sxm"), "flash_mla")
    assert "cannot be imported" in other.reason
    roof = roofline.Roof("here", "made up", {"bf16": 100.0}, 1000.0)
    assert roofline.place(case, roof).ridge == 100.0  # of bf16
    wrong = Case(batch=2, s_k=100, h_q=4, dtype="e4m3", layout="fp8_656")
    assert "has the layout fp8_656" in peers.peer(wrong, [inputs], Target.preset("h100_sxm"), "flash_mla").reason
