"""Mods in the CuTe kernels: the same functions, rebound to the DSL's, compile for sm_90a; who takes which, and why not."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from openmla import backends, mods
from openmla.backends.cute import toolchain
from openmla.backends.cute.decode_dense import config as dense
from openmla.backends.cute.inline import inlined, refusals, soft_cap_of
from openmla.core.target import Target
from openmla.mods import Mod, Rope, m, mask_mod, score_mod
from openmla.mods.attached import form_of

pytest.importorskip("cutlass", reason="the CuTe DSL is not installed")
import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32

from openmla.backends.cute import mod_math
from openmla.backends.cute.decode_dense import soft_cap as capped

WIDTH = 64


class Apply:
    """out[q, k] = every function of scores[q, k]: a score_mod's value, a mask's as -inf where it hides."""

    def __init__(self, functions: tuple[Mod, ...]) -> None:
        self.functions, self.smem_bytes = functions, 0
        self.forms = [each.rebound(mod_math) for each in functions]

    @cute.jit
    def __call__(self, scores: cute.Tensor, out: cute.Tensor, table: cute.Tensor, stream: cuda.CUstream):
        self.kernel(scores, out, table).launch(grid=[scores.shape[0], 1, 1], block=[WIDTH, 1, 1], stream=stream)

    @cute.kernel
    def kernel(self, scores: cute.Tensor, out: cute.Tensor, table: cute.Tensor):
        kv_idx, _, _ = cute.arch.thread_idx()
        q_idx, _, _ = cute.arch.block_idx()
        score = Float32(scores[q_idx, kv_idx])
        for mod, form in zip(self.functions, self.forms, strict=True):
            tables = [table for _ in mod.tables]
            if cutlass.const_expr(mod.kind == "mask_mod"):
                shown = form(Int32(0), Int32(1), q_idx, kv_idx, *tables)
                score = cutlass.select_(Boolean(shown), score, -Float32.inf)
            else:
                score = Float32(form(score, Int32(0), Int32(1), q_idx, kv_idx, *tables))
        out[q_idx, kv_idx] = score


CASES = {
    "soft_cap": (mods.soft_cap(30.0),),
    "window": (mods.sliding_window(100),),
    "alibi": (mods.alibi(torch.ones(4)),),
    "several": (mods.soft_cap(30.0), mods.alibi(torch.ones(4)), mods.sink_tokens(4, 100), mods.sigmoid(-2.0)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_source_compiles(name, tmp_path):
    arguments = (
        toolchain.fake_tensor(cutlass.Float32, (None, WIDTH), align=4),
        toolchain.fake_tensor(cutlass.Float32, (None, WIDTH), align=4),
        toolchain.fake_tensor(cutlass.Float32, (None,), stride=(None,), align=4),
        toolchain.fake_stream(),
    )
    found = toolchain.compile_kernel(Apply(CASES[name]), arguments, f"mods_{name}", out_dir=tmp_path)
    ptx = (tmp_path / f"mods_{name}.ptx").read_text()
    assert found.resources.spills == 0
    assert "call" not in ptx, "inlined, not called"
    assert "tanh.approx" not in ptx, "11 bits are too few for a score"


def test_every_function_of_m_is_there():
    from openmla.mods.math import NAMES

    assert all(hasattr(mod_math, name) for name in NAMES)


@score_mod
def fading(score, b, h, q_idx, kv_idx):
    return score - 0.002 * (q_idx - kv_idx) * m.exp2(0.0 - 0.05 * h)


@mask_mod
def every_third(b, h, q_idx, kv_idx):
    return (m.mod(kv_idx + b, 3) != 0) | (q_idx - kv_idx < 8)


KERNELS = {
    "soft_cap": [mods.soft_cap(30.0)],
    "sink_tokens": [mods.sink_tokens(4, 512)],
    "a user's": [fading, mods.soft_cap(30.0), mods.sink_tokens(4, 512)],
}


@pytest.mark.parametrize("name", KERNELS)
def test_dense_decode_inlines_them(name, tmp_path):
    """Neither spills nor calls, and as many products as without mods."""
    from openmla.backends.cute.decode_dense.launch import build

    config = replace(dense.VARIANTS[0], mods=inlined(form_of(KERNELS[name])))
    found = build(config, tmp_path)
    assert found.resources.sass["HGMMA"] == config.d_qk // 16 + 8
    assert "call" not in (tmp_path / f"{config.name}.ptx").read_text()
    if name != "a user's":
        assert found.resources.spills == 0, found.resources


def asked(*given: Any, **changes: Any) -> Any:
    return replace(backends.typical_problem("decode"), mods=form_of(given) if given else None, **changes)


def test_a_number_or_a_function_more_is_another_kernel():
    where = Target.preset("h100_sxm")
    lists = [
        (),
        (mods.soft_cap(30.0),),
        (mods.soft_cap(50.0),),
        (mods.soft_cap(30.0), fading),
        (fading, mods.soft_cap(30.0)),
    ]
    configs = [dense.configs(asked(*each), where)[0] for each in lists]
    assert len({config.name for config in configs}) == len(lists)
    assert len({str(config.as_dict()) for config in configs}) == len(lists)
    assert configs[0] in dense.VARIANTS, "without mods nothing has changed"


def test_a_sliding_window_is_the_window_that_the_kernels_have():
    problem = asked(mods.sliding_window(512), window=512)
    assert inlined(problem.mods) == ()
    assert dense.configs(problem, Target.preset("h100_sxm"))[0] in dense.VARIANTS

    @mask_mod(window=512)
    def another(b, h, q_idx, kv_idx):
        return (kv_idx <= q_idx) & (kv_idx > q_idx - 512) & (kv_idx != 7)

    assert inlined(asked(another, window=512).mods) == (another,)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (mods.alibi(torch.ones(128)), "reads no tables in a mod, alibi reads slopes"),
        (mods.sigmoid(-8.0), "inlines no activation in place of softmax, got sigmoid(bias=-8.0)"),
        (Rope.of_base(64, 4096), "apply RoPE to q before the call"),
    ],
)  # fmt: skip
def test_refusals_say_why(given, reason):
    assert any(reason in each for each in refusals(asked(given).mods))
    for kernel in backends.kernels("decode")[:2]:
        assert any(reason in each for each in kernel.supports(asked(given), Target.preset("h100_sxm")).reasons)
    assert refusals(asked(mods.soft_cap(30.0)).mods) == ()


def test_few_rows_leave_mods_to_the_other_kernel():
    few, many = backends.kernels("decode")[:2]
    problem, where = asked(mods.soft_cap(30.0), h_q=16), Target.preset("h100_sxm")
    assert "inlines no mods, decode_dense does: soft_cap" in str(few.supports(problem, where).reasons)
    assert not any("mod" in each for each in many.supports(problem, where).reasons)


@score_mod
def written_otherwise(score, b, h, q_idx, kv_idx):
    small = score / 50.0
    return m.tanh(small) * 50.0


@score_mod
def by_head(score, b, h, q_idx, kv_idx):
    return 30.0 * m.tanh(score / (30.0 + h))


@score_mod
def lifted(score, b, h, q_idx, kv_idx):
    return 1.0 + 30.0 * m.tanh(score / 30.0)


@score_mod
def twice(score, b, h, q_idx, kv_idx):
    return 30.0 * m.tanh(m.tanh(score / 30.0))


def test_a_soft_cap_is_known_by_what_it_says():
    assert soft_cap_of(mods.soft_cap(30.0)) == pytest.approx((30.0, 1 / 30.0))
    assert soft_cap_of(written_otherwise) == pytest.approx((50.0, 1 / 50.0))
    others = (by_head, lifted, twice, fading, every_third, mods.alibi(torch.ones(4)), mods.sink_tokens(4, 512))
    assert not any(soft_cap_of(each) for each in others)


def test_a_soft_cap_has_its_own_form_where_its_probabilities_need_no_reference():
    plain = dense.VARIANTS[0]
    assert replace(plain, mods=(mods.soft_cap(30.0),)).cap == pytest.approx((30.0, 1 / 30.0))
    for given in (
        replace(plain, mods=(mods.soft_cap(30.0),), dtype="fp16"),  # which ends at 65504
        replace(plain, mods=(mods.soft_cap(60.0),)),
        replace(plain, mods=(mods.soft_cap(5.0),)),
        replace(plain, mods=(mods.soft_cap(30.0), every_third)),
        replace(plain, mods=(mods.soft_cap(30.0), fading)),
        plain,
    ):
        assert given.cap is None


def polynomial(x: np.ndarray) -> np.ndarray:
    """The device's in fp32, but for the rounding of products that it fuses with a sum."""
    with np.errstate(over="ignore"):
        z = x * x
        return x * (z * (z * np.float32(capped.C2) + np.float32(capped.C1)) + np.float32(capped.C0))


def test_the_polynomial_is_tanh_below_its_limit_and_rises_beyond():
    near = np.linspace(0, capped.NEAR, 1 << 20, dtype=np.float32)
    off = np.abs(polynomial(near).astype(np.float64) - np.tanh(near.astype(np.float64)))
    assert off.max() < 2.2e-7, "1.85e-7 and the rounding of fp32"
    every = np.arange(0, 0x7F800000, 4099, dtype=np.uint32).view(np.float32)  # of every exponent 2,000 numbers
    rises = np.maximum.accumulate(polynomial(every))
    assert np.all(polynomial(every) >= rises * np.float32(1 - 2e-7)), "for whatever is larger than its limit, too"
    assert polynomial(np.float32(-np.inf)) == -np.inf, "hidden keys weigh nothing"


@pytest.mark.parametrize("cap", [20.0, 30.0, 50.0])
def test_what_low_scores_lack_is_within_the_limits(cap):
    """Every probability below the polynomial's limit, however low, against the least that a row must add up to."""
    most, least = capped.limits(cap)
    x = np.linspace(-capped.NEAR, -8.0, 1 << 18)
    z = x * x
    found = np.exp(cap * x * (capped.C0 + z * (capped.C1 + z * capped.C2)))
    assert 16 * np.abs(found - np.exp(cap * np.tanh(x))).max() <= 1.01 * capped.LOSS * least
    assert math.log(most) == pytest.approx(cap * math.tanh(capped.NEAR))
    lowest, highest = (sign * cap * math.log2(math.e) - capped.reference(cap) for sign in (-1, 1))
    assert highest <= capped.HIGHEST + 0.01 or capped.reference(cap) == 0.0
    assert lowest >= -110 and highest <= 44, "of what fp32 and bf16 hold, 2^-126 to 2^128"
