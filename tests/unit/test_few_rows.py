"""The few-row kernel over index lists behind the four verbs, with a stand-in for the compiled function."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from openmla.backends import kernels
from openmla.backends.base import SparseDecodeOperands, Verdict
from openmla.backends.cute import bundle, few_rows
from openmla.backends.cute.decode_dense_small import config as small
from openmla.core.layout import kv_layout
from openmla.core.problem import SparseDecodeProblem
from openmla.core.target import Target
from openmla.reference import attention, quant

H100 = Target.preset("h100_sxm")
NAN = float("nan")


class _Served:
    source, origin = "bundle", Path("stand-in")

    def __init__(self, function: Any) -> None:
        self.function = function


def _function(
    q, kv, lists, lengths, metadata, num_splits, out, lse, exchange, sink, offsets, faults, scale_log2, is_causal, window,
    max_s_q, unit, chunk, has_sink,
) -> None:  # fmt: skip
    """What the compiled function computes, by the oracle, after looking at how it was called."""
    assert (is_causal, window, max_s_q, unit, chunk) == (0, small.NO_WINDOW, 0, 64, 0)
    assert metadata.dim() == 3 and metadata.shape[2] == 8 and int(metadata[0, 0, 1]) >= 0
    tokens = q.shape[0] * q.shape[1]
    assert num_splits.shape == (tokens + 1,)
    assert lists.shape[:2] == lengths.shape == q.shape[:2] and lists.stride(2) == 1
    assert (exchange == small.UNWRITTEN).all() and exchange.shape[2] == 16 * small.words_per_row(True, 2)
    pieces = int(num_splits[-1])
    assert exchange.shape[1] >= (pieces if pieces > tokens else 1)
    assert all(
        step % 8 == 0 for x in (q, out) for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1
    )
    layout = "fp8_656" if kv.shape[3] == 656 else "fp8_528"
    found = attention.sparse_decode(
        q, kv, lists, softmax_scale=scale_log2 / 1.4426950408889634, d_v=512, layout=layout,
        topk_length=lengths.contiguous(), attn_sink=sink if has_sink else None,
    )  # fmt: skip
    out.copy_(found.out)
    lse.copy_(found.lse)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> few_rows.SparseDecodeFew:
    monkeypatch.setattr(bundle, "serve", lambda family, config: _Served(_function))
    monkeypatch.setattr(bundle, "availability", lambda family, config: Verdict())
    return few_rows.SPARSE_DECODE_FEW


def _call(
    layout: str = "fp8_656", *, batch: int = 2, s_q: int = 2, h_q: int = 8, topk: int = 130, varlen: bool = False
):
    generator = torch.Generator().manual_seed(1)
    d_qk = kv_layout(layout).d_qk
    rows = torch.randn(5, 64, 1, d_qk, generator=generator).bfloat16()
    kv = quant.quantise(rows, kv_layout(layout))
    lead = (batch * s_q,) if varlen else (batch, s_q)
    q = torch.randn(*lead, h_q, d_qk, generator=generator).bfloat16()
    indices = torch.randint(-1, 320, (*lead, topk), generator=generator, dtype=torch.int32)
    problem = SparseDecodeProblem.from_tensors(q, kv, indices, layout=layout)
    operands = SparseDecodeOperands(
        q, kv, indices, d_qk**-0.5, torch.full((*lead, h_q, 512), NAN).bfloat16(),
        torch.full((h_q, batch * s_q) if varlen else (batch, h_q, s_q), NAN), torch.zeros(1, dtype=torch.int32),
    )  # fmt: skip
    return problem, operands


@pytest.mark.parametrize("layout", small.CODES)
@pytest.mark.parametrize(
    "change", ["plain", "lengths per request", "lengths per token", "sink", "varlen", "steps of out", "steps of lists"]
)
def test_launch_hands_over_what_the_kernel_reads(kernel: few_rows.SparseDecodeFew, layout: str, change: str) -> None:
    problem, operands = _call(layout, varlen=change == "varlen")
    extra: dict[str, Any] = {}
    if change == "lengths per request":
        extra["topk_length"] = torch.tensor([0, 70], dtype=torch.int32)
    if change == "lengths per token":
        extra["topk_length"] = torch.tensor([[0, 70], [130, 1]], dtype=torch.int32)
    if change == "sink":
        extra["attn_sink"] = torch.randn(8)
    if change == "steps of out":
        extra["out"] = torch.full((2, 2, 8, 515), NAN).bfloat16()[..., 1:513]
    if change == "steps of lists":
        extra["indices"] = operands.indices.repeat_interleave(2, -1)[..., ::2]
    operands = operands._replace(**extra)
    (config,) = kernel.configs(problem, H100)
    compiled = kernel.compile(problem, config, H100)
    kernel.launch(compiled, problem, operands, None)
    want = attention.sparse_decode(
        operands.q, operands.kv_cache, operands.indices, softmax_scale=operands.softmax_scale, d_v=512, layout=layout,
        topk_length=operands.topk_length, attn_sink=operands.attn_sink,
    )  # fmt: skip
    torch.testing.assert_close(operands.out, want.out.to(torch.bfloat16))
    torch.testing.assert_close(operands.lse, want.lse.float())


def test_it_comes_before_the_kernel_for_many_heads() -> None:
    names = [each.name for each in kernels("sparse_decode") if each.backend == "cute"]
    assert names.index(small.FAMILY) < names.index("decode_sparse")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"h_q": 17}, "up to 16 heads"),
        ({"layout": kv_layout("fp8_584")}, "this cache is fp8_584"),
        ({"dtype": torch.float16}, "bf16 queries"),
        ({"topk": 0}, "at least one index"),
        ({"topk": 64 * 1024 + 1}, "up to 65536 indices"),
        ({"total_q": 5000}, "1 to 4096 query tokens"),
        ({"num_pages": 2**21}, "caches of up to"),
        ({"is_aligned": False}, "multiples of 16 bytes"),
    ],
)
def test_a_refusal_names_its_reason(kernel: few_rows.SparseDecodeFew, changes: dict[str, Any], reason: str) -> None:
    problem, _ = _call()
    assert kernel.supports(problem, H100)
    verdict = kernel.supports(replace(problem, **changes), H100)
    assert not verdict and any(reason in why for why in verdict.reasons), verdict.reasons
    assert not kernel.supports(problem, Target.preset("a100_sxm"))


def test_an_exchange_grows_and_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    monkeypatch.setattr(few_rows, "_exchanges", {})
    small_one = few_rows.exchange_on(device, 3)
    assert few_rows.exchange_on(device, 2) is small_one
    large = few_rows.exchange_on(device, 7)
    assert large.shape[1] == 7 and few_rows.exchange_on(device, 3) is large


@pytest.mark.parametrize(
    ("tokens", "topk", "parts"), [(1, 2048, 128), (128, 2048, 128), (16, 2048, 128), (300, 70, 256), (5, 1, 128)]
)
def test_a_plan_covers_every_list(tokens: int, topk: int, parts: int) -> None:
    plan = small.gathered_plan(tokens, topk, parts)
    tiles = -(-topk // 64)
    seen = [set() for _ in range(tokens)]
    for piece in plan.pieces():
        found = range(piece.begin_block, piece.end_block)
        assert not seen[piece.request] & set(found)
        seen[piece.request] |= set(found)
    assert all(each == set(range(tiles)) for each in seen)
    assert plan.num_splits[-1] <= tokens + parts


def test_no_part_without_a_tile() -> None:
    problem, _ = _call()
    found = {
        (tokens, topk): small.gathered_parts(replace(problem, total_q=tokens, topk=topk), H100)
        for tokens, topk in ((1, 1), (1, 2048), (2, 2000), (16, 2048), (128, 2048))
    }
    assert found == {(1, 1): 1, (1, 2048): 32, (2, 2000): 64, (16, 2048): 128, (128, 2048): 132}
