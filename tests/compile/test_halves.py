"""Numbers as halves with a scale, run: what is stored and read back, instruction by instruction on a CPU, against fp64."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from ptx_grid import launch
from ptx_program import Memory, Program, describe, parse

pytest.importorskip("cutlass")

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from openmla.backends.cute import halves
from openmla.backends.cute.toolchain import compile_kernel, fake_stream, fake_tensor

GROUP = 16
INF, NAN = float("inf"), float("nan")
LARGEST, FINITE, OF_WARP, LEFT, RIGHT = range(5)


@cute.jit
def through(x: cute.Tensor, factors: cute.Tensor, words: cute.Tensor, back: cute.Tensor, seen: cute.Tensor, stream):
    _through(x, factors, words, back, seen).launch(grid=(1, 1, 1), block=(32, 1, 1), stream=stream)


@cute.kernel
def _through(x: cute.Tensor, factors: cute.Tensor, words: cute.Tensor, back: cute.Tensor, seen: cute.Tensor):
    """A lane's group of numbers, times its factor, there and back."""
    lane = cute.arch.thread_idx()[0]
    values = [x[lane, i] for i in range(GROUP)]
    peak, finite = halves.largest(values), halves.largest_finite(values)
    seen[lane, LARGEST], seen[lane, FINITE], seen[lane, OF_WARP] = peak, finite, halves.of_warp(finite)
    factor, scale = halves.halve(finite if peak == Float32.inf else peak, factors[lane])
    left, right = halves.scales(scale | 0x3F800000)
    seen[lane, LEFT], seen[lane, RIGHT] = left, right
    kept = cute.make_rmem_tensor(GROUP // 2, Int32)
    for i in cutlass.range_constexpr(GROUP // 2):
        kept[i] = halves.pack(values[2 * i] * factor, values[2 * i + 1] * factor)
        words[lane, i] = kept[i]
    numbers = halves.unpack(kept)
    for i in cutlass.range_constexpr(GROUP):
        back[lane, i] = numbers[i] * left


@cache
def compiled() -> Program:
    shapes = [
        (Float32, (32, GROUP)),
        (Float32, (32,)),
        (Int32, (32, GROUP // 2)),
        (Float32, (32, GROUP)),
        (Float32, (32, 5)),
    ]
    with TemporaryDirectory() as folder:
        compile_kernel(
            through, [*(fake_tensor(*each) for each in shapes), fake_stream()], "through", out_dir=Path(folder)
        )
        return parse((Path(folder) / "through.ptx").read_text())


def run(groups, factors=1.0):
    """(numbers as stored, numbers as read back, what the lanes saw) of up to 32 groups; the other lanes have zeros."""
    x, f = torch.zeros(32, GROUP), torch.ones(32)
    groups = torch.as_tensor(np.asarray(groups, np.float32))
    x[: len(groups)], f[: len(groups)] = groups, torch.as_tensor(factors)
    words, back, seen = torch.zeros(32, GROUP // 2, dtype=torch.int32), torch.full((32, GROUP), NAN), torch.zeros(32, 5)
    memory = Memory()
    params = [describe(memory, t, [True] * t.dim(), [True] * t.dim()) for t in (x, f, words, back, seen)]
    launch(compiled(), memory, params, [(0, 0, 0)], 32, 0, 0)
    memory.read_back()
    return words.numpy().view(np.float16)[: len(groups)], back.double().numpy()[: len(groups)], seen.numpy()


def groups_of(rng, binades, top=0):
    """Numbers of either sign over so many binades below 2^top."""
    sizes = np.exp2(top - binades * rng.random((32, GROUP)))
    sizes[:, 0] = 2.0**top * (1 - 2.0**-12 * rng.random(32))
    return (sizes * rng.choice([-1, 1], (32, GROUP))).astype(np.float32)


def test_a_number_loses_2_to_the_minus_11_of_itself_over_28_binades():
    rng = np.random.default_rng(0)
    x = groups_of(rng, 28)
    stored, back, _ = run(x)
    lost = np.abs(back - x.astype(np.float64)) / np.abs(x)
    assert lost.max() <= 2.0**-11
    assert lost.max() > 2.0**-12, "every bit of fp16 is used, and no more"
    peaks = np.abs(stored.astype(np.float64)).max(1)
    assert ((peaks >= 2.0**14) & (peaks <= 2.0**15)).all(), "the largest lies where fp16 ends"


def test_what_lies_further_below_loses_2_to_the_minus_39_of_the_largest():
    x = groups_of(np.random.default_rng(1), 60)
    _, back, _ = run(x)
    lost = np.abs(back - x.astype(np.float64))
    assert (lost <= np.maximum(2.0**-11 * np.abs(x), 2.0**-39 * np.abs(x).max(1, keepdims=True))).all()
    assert (lost > 2.0**-11 * np.abs(x)).any(), "the case must have numbers that far below"


@pytest.mark.parametrize("size", [1e38, 1e30, 1.0, 1e-20, 1e-30, 1e-38, 1e-40])
@pytest.mark.parametrize("factor", [1.0, 2.0**-20, 1.0 / 3])
def test_groups_of_any_size(size, factor):
    x = (groups_of(np.random.default_rng(2), 8) * size).astype(np.float32)
    _, back, seen = run(x, factor)
    given = x.astype(np.float64) * np.float32(factor)
    # 2^-25 of what 100 binades bring up is all that a tiny group loses; the factor and the product are rounded to fp32
    assert (np.abs(back - given) <= np.maximum(1.01 * 2.0**-11 * np.abs(given), 2.0**-125)).all()
    scale = seen[:, LEFT]
    assert (np.frexp(scale)[0] == 0.5).all(), "a power of two"
    assert (seen[:, RIGHT] == 1.0).all()


def test_a_large_factor_stays_finite():
    x = (groups_of(np.random.default_rng(3), 4) * 1e-37).astype(np.float32)
    _, back, _ = run(x, 2.0**120)
    given = x.astype(np.float64) * 2.0**120
    assert (np.abs(back - given) <= 2.0**-11 * np.abs(given)).all()


def test_zeros_infinities_and_nan_stay_what_they_are():
    x = groups_of(np.random.default_rng(4), 8, top=100)
    x[0] = 0.0
    x[1, 3], x[1, 4], x[1, 5] = INF, -INF, 0.0
    x[2, 3] = NAN
    x[3, 3], x[3, 9] = NAN, -INF
    x[4] = INF
    x[5] = NAN
    x[6, 1:] = 0.0
    _, back, seen = run(x)
    np.testing.assert_array_equal(np.isnan(back), np.isnan(x))
    np.testing.assert_array_equal(np.where(np.isinf(back), back, 0), np.where(np.isinf(x), x, 0))
    assert (back[x == 0.0] == 0.0).all()
    fine = np.isfinite(x)
    lost = np.abs(np.where(fine, back, 0) - np.where(fine, x, 0).astype(np.float64))
    assert (lost <= 2.0**-11 * np.abs(np.where(fine, x, 0))).all(), "beside what is not finite, too"
    finite = np.where(fine, np.abs(x), 0).max(1)
    np.testing.assert_array_equal(seen[:, FINITE], finite)
    np.testing.assert_array_equal(seen[:, LARGEST], np.where(np.isinf(x).any(1), np.float32(INF), finite))
    assert (seen[:, OF_WARP] == finite.max()).all()


def test_largest_finite_of_numbers_too_small_to_be_normal():
    x = np.zeros((32, GROUP), np.float32)
    x[:, 2] = -np.exp2(-149.0 + np.arange(32))
    x[5, 3] = np.finfo(np.float32).max
    *_, seen = run(x)
    np.testing.assert_array_equal(seen[:, FINITE], np.abs(x).max(1))
