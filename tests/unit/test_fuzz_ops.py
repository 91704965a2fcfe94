"""Hostile cases through the public operations: 4,000 seeded ones, each judged by the tolerance rule.

Run one again with the line that a failure prints. Other seeds: --case-base=N. Further down: what garbage and bad
values inside tensors may do to rows that do not use them (nothing, bit for bit), and that they are reported.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

import openmla
from openmla.core.faults import Fault
from openmla.testing import budget
from openmla.testing.cases import INVALID_SLOTS, OPS, PAGE_SIZES, Case, draw
from openmla.testing.families import FAMILIES

CHUNKS, PER_CHUNK = 8, 125
chunks = pytest.mark.parametrize("chunk", range(CHUNKS))


@pytest.fixture(autouse=True)
def _clean_faults():
    openmla.check_errors()


def same_bits(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Equal bit patterns; NaN equals NaN, whatever its payload."""
    if a is None or b is None:
        return a is b
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0), b.nan_to_num(0))


def run_on(threads: int, case: Case, operands: dict[str, Any]) -> tuple[torch.Tensor | None, ...]:
    """The operation on that many threads; all else in this file runs on one."""
    torch.set_num_threads(threads)
    try:
        return case.run(operands=operands)
    finally:
        torch.set_num_threads(1)


def judge(case: Case, threads: int = 1) -> None:
    """Run one case; the operation first, so that it cannot profit from what the oracle touched."""
    operands = case.tensors()
    before = {name: value.clone() for name, value in operands.items() if isinstance(value, torch.Tensor)}
    try:
        out, lse, max_logits = run_on(threads, case, operands)
    except Exception as error:
        raise AssertionError(f"{case.repro}\nraised {type(error).__name__}: {error}") from error
    for name, value in before.items():
        now = operands[name]
        assert same_bits(value, now) if value.is_floating_point() else torch.equal(value, now), (
            f"{case.repro}\nwrote into its input {name}"
        )
    report = budget.check(out, lse, case.golden(operands), dtype=case.dtype, max_logits=max_logits)
    report.require(case.repro)


@chunks
def test_decode_cases(chunk, seeds_of):
    for seed in seeds_of(chunk, PER_CHUNK):
        judge(draw(seed, "decode"))


@chunks
def test_sparse_decode_cases(chunk, seeds_of):
    for seed in seeds_of(chunk, PER_CHUNK):
        judge(draw(seed, "sparse_decode"))


@chunks
def test_sparse_prefill_cases(chunk, seeds_of):
    for seed in seeds_of(chunk, PER_CHUNK):
        judge(draw(seed, "sparse_prefill"))


@chunks
def test_prefill_cases(chunk, seeds_of):
    for seed in seeds_of(chunk, PER_CHUNK):
        judge(draw(seed, "prefill"))


# Rows of several tiles, which two threads share.
LARGE_PER_OP = 30


def test_large_decode_cases(seeds_of):
    for seed in seeds_of(0, LARGE_PER_OP):
        judge(draw(seed, "decode", is_large=True), threads=2)


def test_large_sparse_decode_cases(seeds_of):
    for seed in seeds_of(0, LARGE_PER_OP):
        judge(draw(seed, "sparse_decode", is_large=True), threads=2)


def test_large_sparse_prefill_cases(seeds_of):
    for seed in seeds_of(0, LARGE_PER_OP):
        judge(draw(seed, "sparse_prefill", is_large=True), threads=2)


def test_large_prefill_cases(seeds_of):
    for seed in seeds_of(0, LARGE_PER_OP):
        judge(draw(seed, "prefill", is_large=True), threads=2)


@pytest.mark.parametrize("op", OPS)
def test_threads_do_not_change_a_bit(op, seeds_of):
    for seed in seeds_of(0, 12):
        case = draw(seed, op, is_large=True)
        operands = case.tensors()
        alone, *others = [run_on(threads, case, operands) for threads in (1, 2, 5)]
        for other in others:
            assert all(same_bits(a, b) for a, b in zip(alone, other, strict=True)), case.repro


@pytest.mark.parametrize("op", OPS)
def test_draw_reaches_every_corner(op):
    """A fuzz that draws only easy cases would pass whatever the operation does."""
    cases = [draw(seed, op) for seed in range(CHUNKS * PER_CHUNK)]
    families = Counter(case.family for case in cases)
    assert set(families) == set(FAMILIES) and families["small"] <= len(cases) / 10 * 1.3
    assert {case.dtype for case in cases} == {torch.bfloat16, torch.float16, torch.float32}
    assert {case.h_q for case in cases} == {1, 3, 9, 16, 64, 128}
    if "decode" in op:
        assert {case.page_size for case in cases} == set(PAGE_SIZES)
        assert len({case.layout for case in cases}) == 6
    results = [case.golden() for case in cases[:100]]
    assert sum(bool(((got.out != 0) & got.out.isfinite()).any()) for got in results) >= 65


@pytest.mark.parametrize("op", OPS)
def test_a_seed_is_a_case(op):
    for seed in range(20):
        first, second = draw(seed, op), draw(seed, op)
        assert first == second
        for a, b in zip(first.tensors().items(), second.tensors().items(), strict=True):
            assert a[0] == b[0]
            assert same_bits(a[1], b[1]) if isinstance(a[1], torch.Tensor) else a[1] == b[1]


@pytest.mark.parametrize("op", ["decode", "sparse_decode", "sparse_prefill"])
def test_unreachable_bytes_never_matter(op, seeds_of):
    for seed in seeds_of(0, 100):
        case = draw(seed, op)
        with_nan, with_zero = case.run(), replace(case, poison=0).run()
        for a, b in zip(with_nan, with_zero, strict=True):
            assert same_bits(a, b), case.repro


@pytest.mark.parametrize("op", OPS)
def test_same_call_same_bits(op, seeds_of):
    for seed in seeds_of(0, 60):
        case = draw(seed, op)
        operands = case.tensors()
        for a, b in zip(case.run(operands=operands), case.run(operands=operands), strict=True):
            assert same_bits(a, b), case.repro


# Bad values inside tensors.


def _decode(batch: int = 3) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    return {
        "q": torch.randn(batch, 2, 4, 576, generator=generator).bfloat16(),
        "kv_cache": torch.randn(batch * 4, 16, 1, 576, generator=generator).bfloat16(),
        "block_table": torch.randperm(batch * 4, generator=generator).to(torch.int32).reshape(batch, 4),
        "cache_seqlens": torch.tensor([40, 64, 13][:batch], dtype=torch.int32),
    }


@pytest.mark.parametrize("page", [-1, -(2**31), 12, 114514, 2**31 - 1])
def test_a_bad_page_is_absent_and_reported(page):
    x = _decode()
    clean, clean_lse = openmla.decode(**x)
    assert openmla.check_errors() == ()
    x["block_table"][1, 1] = page
    out, lse = openmla.decode(**x)
    assert openmla.check_errors() == (Fault.PAGE_OUT_OF_RANGE,)
    for request in (0, 2):
        assert same_bits(out[request], clean[request]) and same_bits(lse[request], clean_lse[request])
    # What is left is attention without tokens 16 to 31.
    x["block_table"][1] = x["block_table"][1, [0, 2, 3, 3]]
    x["cache_seqlens"][1] = 48
    without, without_lse = openmla.decode(**x)
    assert (out[1].float() - without[1].float()).abs().max() <= 2.0**-7
    assert (lse[1] - without_lse[1]).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("length", "counts_as", "fault"),
    [
        (-1, 0, Fault.LENGTH_NEGATIVE),
        (-(2**31), 0, Fault.LENGTH_NEGATIVE),
        (65, 64, Fault.LENGTH_OVER_CAPACITY),
        (2**31 - 1, 64, Fault.LENGTH_OVER_CAPACITY),
    ],
)
def test_a_bad_length_is_cut_and_reported(length, counts_as, fault):
    x = _decode()
    x["cache_seqlens"][1] = length
    out, lse = openmla.decode(**x, policy="batch_invariant")
    assert openmla.check_errors() == (fault,)
    x["cache_seqlens"][1] = counts_as
    want, want_lse = openmla.decode(**x, policy="batch_invariant")
    assert openmla.check_errors() == ()
    assert same_bits(out, want) and same_bits(lse, want_lse)


def _sparse() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(8)
    return {
        "q": torch.randn(2, 2, 4, 576, generator=generator).bfloat16(),
        "kv_cache": torch.randn(5, 13, 1, 576, generator=generator).bfloat16(),
        "indices": torch.randint(65, (2, 2, 70), generator=generator, dtype=torch.int32),
    }


@pytest.mark.parametrize("value", [*INVALID_SLOTS[1:], 65, -2])
@pytest.mark.parametrize("place", [0, 63, 64, 69])
def test_a_bad_index_is_absent_and_reported(value, place):
    x = _sparse()
    clean, clean_lse = openmla.sparse_decode(**x)
    assert openmla.check_errors() == ()
    x["indices"][1, 0, place] = value
    out, lse = openmla.sparse_decode(**x)
    assert openmla.check_errors() == (Fault.INDEX_OUT_OF_RANGE,)
    assert same_bits(out[0], clean[0]) and same_bits(lse[0], clean_lse[0])
    assert same_bits(out[1, 1], clean[1, 1]) and same_bits(lse[1, :, 1], clean_lse[1, :, 1])
    x["indices"][1, 0, place] = -1
    want, want_lse = openmla.sparse_decode(**x)
    assert openmla.check_errors() == ()  # -1 is legal
    assert same_bits(out, want) and same_bits(lse, want_lse)


@pytest.mark.parametrize("value", [*INVALID_SLOTS[1:], 65, -2])
def test_a_bad_index_of_sparse_prefill(value):
    x = _sparse()
    kv, indices = x["kv_cache"].reshape(65, 1, 576), x["indices"].reshape(4, 1, 70).clone()
    indices[2, 0, 5] = value
    got = openmla.sparse_prefill(x["q"].reshape(4, 4, 576), kv, indices)
    assert openmla.check_errors() == (Fault.INDEX_OUT_OF_RANGE,)
    indices[2, 0, 5] = -1
    want = openmla.sparse_prefill(x["q"].reshape(4, 4, 576), kv, indices)
    assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(("length", "counts_as"), [(-1, 0), (-(2**31), 0), (71, 70), (2**31 - 1, 70)])
def test_a_bad_topk_length_is_clamped_and_reported(length, counts_as):
    x = _sparse()
    out, lse = openmla.sparse_decode(**x, topk_length=torch.tensor([50, length], dtype=torch.int32))
    assert openmla.check_errors() == (Fault.TOPK_LENGTH_OUT_OF_RANGE,)
    want, want_lse = openmla.sparse_decode(**x, topk_length=torch.tensor([50, counts_as], dtype=torch.int32))
    assert openmla.check_errors() == ()
    assert same_bits(out, want) and same_bits(lse, want_lse)


def test_offsets_that_do_not_rise_are_clamped_and_reported():
    generator = torch.Generator().manual_seed(9)
    q, k = (torch.randn(n, 2, 16, generator=generator).bfloat16() for n in (6, 9))
    bad, good = torch.tensor([0, 4, 2, 99], dtype=torch.int32), torch.tensor([0, 4, 4, 6], dtype=torch.int32)
    of_k = torch.tensor([0, 3, 7, 9], dtype=torch.int32)
    got = openmla.prefill(q, k, k, bad, of_k, 6, 9)
    assert openmla.check_errors() == (Fault.CU_SEQLENS_NOT_MONOTONE,)
    want = openmla.prefill(q, k, k, good, of_k, 6, 9)
    assert openmla.check_errors() == ()
    assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))
