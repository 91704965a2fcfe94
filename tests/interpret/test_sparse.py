"""Sparse decode and sparse prefill in Triton: hostile cases, every layout, splits, and indices that are wrong."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import openmla
from openmla.core.faults import Fault
from openmla.core.layout import BYTE_LAYOUT_NAMES, kv_layout
from openmla.testing.cases import Case, draw, native_arguments

DECODE = Case(
    op="sparse_decode", seed=2, family="unit", dtype=torch.float16, h_q=4, h_kv=1, d_qk=40, d_v=32,
    softmax_scale=40**-0.5, seqlens_q=(2, 2), seqlens_k=(64,), page_size=16, topk=65, invalid_share=0.2,
)  # fmt: skip
PREFILL = Case(
    op="sparse_prefill", seed=2, family="unit", dtype=torch.float16, h_q=4, h_kv=2, d_qk=40, d_v=32,
    softmax_scale=40**-0.5, seqlens_q=(5,), seqlens_k=(64,), topk=40, has_topk_length=True, has_sink=True,
    invalid_share=0.2,
)  # fmt: skip


def with_changes(case: Case, **changes: Any) -> Case:
    return dataclasses.replace(case, **changes)


def narrow(seeds: range, op: str) -> list[Case]:
    """Drawn cases, as fp16 where they are bf16: the interpreter cannot multiply those."""
    drawn = [draw(seed, op) for seed in seeds]
    return [dataclasses.replace(c, dtype=torch.float16) if c.dtype == torch.bfloat16 else c for c in drawn]


@pytest.fixture
def short_splits(monkeypatch):
    """Selections as short as these are split."""
    from openmla.backends.triton import config

    monkeypatch.setattr(config, "MIN_SPLIT_KEYS", 16)


@pytest.mark.parametrize("sms", [1, 64])
def test_hostile_decode_cases(sms, machine, judged, short_splits):
    machine(sms)
    for case in narrow(range(sms * 100, sms * 100 + 10), "sparse_decode"):
        judged(case)


def test_hostile_prefill_cases(machine, judged):
    machine(8)
    for case in narrow(range(10), "sparse_prefill"):
        judged(case)


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        (PREFILL, {}),
        (PREFILL, {"invalid_share": 0.0, "has_topk_length": False, "topk": 64}),
        (PREFILL, {"invalid_share": 0.0, "softmax_scale": 4.0, "topk": 64}),  # the peak moves in most tiles
        (PREFILL, {"invalid_share": 0.0, "softmax_scale": -1e6}),
        (DECODE, {}),
        (DECODE, {"invalid_share": 0.0, "topk": 70}),
    ],
    ids=["invalid", "whole", "moving", "large", "decode", "decode-whole"],
)
def test_tiles_kept_apart(case, changes, machine, judged, short_splits, monkeypatch):
    """The form of the tile that Hopper gets: full tiles in a loop of their own, and a peak that seldom moves."""
    from openmla.backends.triton import launch

    monkeypatch.setattr(launch, "kept_apart", lambda config, problem, target: "all")
    machine(6)
    judged(with_changes(case, **changes))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("layout", [*BYTE_LAYOUT_NAMES, "fp16_576", "fp32_512"])
def test_every_layout(layout, splits, machine, judged, short_splits):
    machine(splits * 2)
    found = kv_layout(layout)
    dtype = found.dtype if found.dtype != torch.uint8 else torch.float32
    name = layout if found.is_quantised else ""
    judged(with_changes(DECODE, d_qk=found.d_qk, d_v=found.d_v, layout=name, dtype=dtype, seqlens_q=(1, 1), topk=50))


@pytest.mark.parametrize(("layout", "extra"), [("fp8_656", ""), ("fp8_584", "fp8_528_mx"), ("", "fp4_288")])
@pytest.mark.parametrize("sms", [1, 30])
def test_two_caches_of_two_layouts(layout, extra, sms, machine, judged, short_splits):
    machine(sms)
    d_qk = 576 if layout == "fp8_656" else 512
    judged(
        with_changes(
            DECODE, d_qk=d_qk, d_v=512, layout=layout, extra_layout=extra, extra_page_size=3, extra_topk=33, topk=20,
            has_topk_length=True, has_sink=True, seqlens_q=(1, 1),
        )
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(2,), (2, 2)])
def test_lengths_per_request_and_per_token(shape, machine, judged):
    machine(1)
    operands = with_changes(DECODE, invalid_share=0.0).tensors()
    operands["topk_length"] = torch.tensor([3, 0, 65, 17][: torch.Size(shape).numel()], dtype=torch.int32).view(shape)
    judged(with_changes(DECODE, invalid_share=0.0), operands)


@pytest.mark.parametrize("bad", [-2, -(2**31), 2**31 - 1, 114514])
def test_a_bad_index_is_masked_and_noted(bad, machine, judged):
    machine(1)
    case = with_changes(DECODE, invalid_share=0.0)
    clean = case.tensors()
    expected, expected_lse, _ = judged(case, clean)
    operands = {**clean, "indices": clean["indices"].clone()}
    operands["indices"][1, 0, 7] = bad
    out, lse = openmla.sparse_decode(**native_arguments("sparse_decode", operands), backend="triton")
    assert openmla.check_errors() == (Fault.INDEX_OUT_OF_RANGE,)
    assert torch.equal(out[0], expected[0])
    assert torch.equal(lse[0], expected_lse[0])
    minus = {**operands, "indices": operands["indices"].clone()}
    minus["indices"][1, 0, 7] = -1
    masked, _ = openmla.sparse_decode(**native_arguments("sparse_decode", minus), backend="triton")
    assert openmla.check_errors() == ()
    assert torch.equal(out, masked)


def test_a_bad_length_is_clamped_and_noted(machine, judged):
    machine(1)
    operands = with_changes(DECODE, invalid_share=0.0).tensors()
    operands["topk_length"] = torch.tensor([[-1, 66], [3, 4]], dtype=torch.int32)
    judged(with_changes(DECODE, invalid_share=0.0), operands)
    openmla.sparse_decode(**native_arguments("sparse_decode", operands), backend="triton")
    assert openmla.check_errors() == (Fault.TOPK_LENGTH_OUT_OF_RANGE,)


def test_an_index_behind_the_length_is_not_looked_at(machine):
    machine(1)
    operands = with_changes(DECODE, invalid_share=0.0).tensors()
    operands["topk_length"] = torch.full((2, 2), 20, dtype=torch.int32)
    operands["indices"] = operands["indices"].clone()
    operands["indices"][..., 20:] = 2**31 - 1
    openmla.sparse_decode(**native_arguments("sparse_decode", operands), backend="triton")
    assert openmla.check_errors() == ()


def test_max_logits_of_rows_with_nan_and_without_keys(machine, judged):
    machine(1)
    operands = PREFILL.tensors()
    operands["kv"] = operands["kv"].clone()
    operands["kv"].nan_to_num_(nan=0.5)
    operands["indices"] = torch.full((5, 2, 40), -1, dtype=torch.int32)
    operands["indices"][1:, :, :3] = torch.tensor([5, 6, 7], dtype=torch.int32)
    operands["topk_length"] = torch.full((5,), 40, dtype=torch.int32)
    operands["kv"][6, 1] = torch.nan
    top = judged(PREFILL, operands)[2]
    assert bool((top[0] == -torch.inf).all())
    assert bool(top[1:, 2:].isnan().all())
    assert bool(top[1:, :2].isfinite().all())


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_any_scale(scale, machine, judged):
    machine(4)
    judged(with_changes(PREFILL, softmax_scale=scale))
    judged(with_changes(DECODE, softmax_scale=scale))


def test_all_slots_in_order_equal_dense_decode(machine):
    """Sparse over every slot is dense: two kernels, one answer."""
    machine(3)
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(4, 16, 1, 40, generator=generator).half()
    q = torch.randn(1, 1, 4, 40, generator=generator).half()
    table = torch.tensor([[2, 0, 3, 1]], dtype=torch.int32)
    slots = (table[0, :, None] * 16 + torch.arange(16)).reshape(1, 1, 64).int()
    dense, dense_lse = openmla.decode(q, cache, table, torch.tensor([64], dtype=torch.int32), d_v=32, backend="triton")
    sparse, sparse_lse = openmla.sparse_decode(q, cache, slots, d_v=32, backend="triton")
    torch.testing.assert_close(sparse, dense, rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(sparse_lse, dense_lse, rtol=1e-6, atol=1e-5)
