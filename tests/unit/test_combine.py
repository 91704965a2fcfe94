"""The merge law of (out, lse): a commutative monoid that never makes a NaN."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openmla.core.errors import ProblemError
from openmla.split.combine import merge, merge_two

ULP = 2.0**-20

LSES = st.one_of(
    st.just(-math.inf),
    st.floats(-50, 50, width=32),
    st.sampled_from([-3.4e38, 3.4e38, -1e30, 1e30, -1e4, 1e4, 0.0]),
)

# Where fp32 lse has bits to hold what a regrouping needs: at 1e30, lse + ln 2 == lse.
MODERATE = st.one_of(st.just(-math.inf), st.floats(-50, 50, width=32))


def _part(lse: float, seed: int, d_v: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """A part with that lse; out is 0 where it is empty."""
    out = torch.randn(d_v, generator=torch.Generator().manual_seed(seed))
    return (torch.zeros(d_v) if lse == -math.inf else out), torch.tensor(lse, dtype=torch.float32)


def _stack(lses: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    parts = [_part(lse, seed) for seed, lse in enumerate(lses)]
    return torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts])


def _close(a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor]) -> None:
    finite = a[1].isfinite()
    assert torch.equal(finite, b[1].isfinite())
    assert torch.equal(a[1][~finite], b[1][~finite])
    size = a[1][finite].abs().clamp_min(1)
    assert ((a[1] - b[1])[finite].abs() <= ULP * size).all(), (a[1], b[1])
    assert ((a[0] - b[0]).abs() <= 8 * ULP).all(), (a[0], b[0])


@given(st.lists(LSES, min_size=1, max_size=8))
@settings(max_examples=400, deadline=None)
def test_never_nan(lses):
    outs, logs = _stack(lses)
    out, lse = merge(outs, logs)
    assert not out.isnan().any() and not lse.isnan().any()
    assert bool(lse == -math.inf) == all(value == -math.inf for value in lses)
    assert out.abs().max() <= outs.abs().max() * (1 + ULP)  # a mean lies inside


@given(st.lists(LSES, min_size=1, max_size=8))
@settings(max_examples=200, deadline=None)
def test_against_fp64(lses):
    outs, logs = _stack(lses)
    weights = (
        torch.exp(logs.double() - logs.double().max()) if logs.max() > -math.inf else torch.zeros(len(lses)).double()
    )
    total = weights.sum()
    want_out = (weights[:, None] * outs).sum(0) / total if total > 0 else torch.zeros(4).double()
    want_lse = logs.double().max() + total.log() if total > 0 else torch.tensor(-math.inf).double()
    _close(merge(outs, logs), (want_out, want_lse))


@given(st.lists(LSES, min_size=2, max_size=8), st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_commutative(lses, random):
    outs, logs = _stack(lses)
    order = list(range(len(lses)))
    random.shuffle(order)
    _close(merge(outs, logs), merge(outs[order], logs[order]))
    # Two parts commute bit for bit: fp addition does.
    a, b = (outs[0], logs[0]), (outs[1], logs[1])
    for x, y in zip(merge_two(*a, *b), merge_two(*b, *a), strict=True):
        assert torch.equal(x, y)


@given(st.lists(MODERATE, min_size=3, max_size=8), st.data())
@settings(max_examples=200, deadline=None)
def test_associative_any_tree(lses, data):
    outs, logs = _stack(lses)
    parts = [(out, log) for out, log in zip(outs, logs, strict=True)]
    while len(parts) > 1:
        i = data.draw(st.integers(0, len(parts) - 2))
        parts[i : i + 2] = [merge_two(*parts[i], *parts[i + 1])]
    _close(merge(outs, logs), parts[0])


@given(LSES, st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_identity_is_exact(lse, before):
    out, log = _part(lse, 5)
    garbage = torch.full((4,), math.nan)  # an empty part may hold anything
    empty = (garbage, torch.tensor(-math.inf))
    parts = [empty] * before + [(out, log)] + [empty]
    merged = merge(torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts]))
    assert torch.equal(merged[0], out) and torch.equal(merged[1], log)


@given(st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=6), st.sampled_from([-64.0, 16.0, 1024.0]))
@settings(max_examples=100, deadline=None)
def test_shift(lses, shift):
    outs, logs = _stack(lses)
    out, lse = merge(outs, logs)
    moved_out, moved_lse = merge(outs, logs + shift)
    assert (moved_out - out).abs().max() <= 2.0**-12  # lses near 1024 have 13 bits behind the point
    assert (moved_lse - shift - lse).abs() <= 2.0**-12


@given(st.lists(LSES, min_size=1, max_size=6))
@settings(max_examples=100, deadline=None)
def test_base_two_is_the_same_law(lses):
    outs, logs = _stack([value if abs(value) < 1e30 or value == -math.inf else 7.0 for value in lses])
    logs = logs.double()
    out, lse = merge(outs.double(), logs)
    out2, lse2 = merge(outs.double(), logs / math.log(2), base=2)
    assert (out - out2).abs().max() <= 1e-9
    assert torch.equal(lse.isinf(), lse2.isinf())
    assert bool(lse == -math.inf) or (lse2 * math.log(2) - lse).abs() <= 1e-9 * max(1.0, float(lse.abs()))


def test_repeating_a_part_adds_log_of_the_count():
    out, log = _part(1.5, 0)
    for count in (2, 4, 7):
        merged, lse = merge(out.expand(count, -1), log.expand(count))
        assert (merged - out).abs().max() <= ULP
        assert abs(float(lse) - 1.5 - math.log(count)) <= ULP * 4


def test_same_parts_same_bits_and_no_parts():
    outs, logs = torch.randn(5, 3, 7, 16), torch.randn(5, 3, 7)
    first, second = merge(outs, logs), merge(outs.clone(), logs.clone())
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    out, lse = merge(outs[:0], logs[:0])
    assert out.shape == (3, 7, 16) and not out.any() and (lse == -math.inf).all()


def test_huge_outs_do_not_overflow():
    outs = torch.full((4, 2), 3e38)
    out, _ = merge(outs, torch.zeros(4))
    assert torch.equal(out, outs[0])


def test_a_nan_part_is_seen():
    outs, logs = torch.zeros(2, 3), torch.tensor([0.0, math.nan])
    assert merge(outs, logs)[1].isnan() and merge(outs, logs)[0].isnan().all()
    outs[1, 1] = math.nan
    out, lse = merge(outs, torch.zeros(2))
    assert out.isnan().tolist() == [False, True, False] and lse.isfinite()


def test_plus_infinity_is_not_an_empty_part():
    out, lse = merge(torch.zeros(2, 3), torch.tensor([0.0, math.inf]))
    assert out.isnan().all() and lse.isnan()


def test_split_attention_merges_to_the_whole():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 97, generator=generator).double()
    v = torch.randn(97, 5, generator=generator).double()
    for ranks in range(1, 9):
        for interleaved in (False, True):
            outs, logs = [], []
            for rank in range(ranks):
                mine = slice(rank, None, ranks) if interleaved else slice(rank * 97 // ranks, (rank + 1) * 97 // ranks)
                outs.append(torch.softmax(logits[:, mine], -1) @ v[mine])
                logs.append(torch.logsumexp(logits[:, mine], -1))
            out, lse = merge(torch.stack(outs), torch.stack(logs))
            assert (out - torch.softmax(logits, -1) @ v).abs().max() < 1e-13
            assert (lse - torch.logsumexp(logits, -1)).abs().max() < 1e-13


@pytest.mark.parametrize(
    ("outs", "lses", "base", "rule"),
    [
        (torch.zeros(2, 3), torch.zeros(3), math.e, r"lses \[parts"),
        (torch.zeros(2, 3).bfloat16(), torch.zeros(2), math.e, "fp32 or fp64"),
        (torch.zeros(2, 3).double(), torch.zeros(2), math.e, "one dtype"),
        (torch.zeros(2, 3), torch.zeros(2), 1.0, "base"),
        (torch.zeros(3), torch.zeros(()), math.e, "outs must be"),
    ],
    ids=["shape", "narrow", "mixed", "base", "rank"],
)
def test_misuse_is_refused(outs, lses, base, rule):
    with pytest.raises(ProblemError, match=rule):
        merge(outs, lses, base=base)
