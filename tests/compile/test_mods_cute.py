"""The front end of mods is ready for CuTe DSL: the same functions, rebound to its functions, compile for sm_90a.

No kernel inlines them yet (`supports` says so). What is shown here is that nothing in the front end stands in the way:
one thread per score, the functions of the library called on the DSL's own scalars while the kernel is traced.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from openmla import mods
from openmla.backends.cute import toolchain
from openmla.mods import Mod

pytest.importorskip("cutlass", reason="the CuTe DSL is not installed")
import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32

WIDTH = 64


def _load(table: cute.Tensor, i: Any) -> Any:
    last = Int32(table.shape[0] - 1)
    place = cutlass.select_(i < Int32(0), Int32(0), cutlass.select_(i > last, last, i))
    return table[place]


CUTE_MATH = SimpleNamespace(
    tanh=lambda x: cute.math.tanh(x, fastmath=True),
    sigmoid=lambda x: Float32(1.0) / (Float32(1.0) + cute.math.exp(-x, fastmath=True)),
    where=lambda c, x, y: cutlass.select_(c, Float32(x), Float32(y)),
    load=_load,
)


class Apply:
    """out[q, k] = every function of scores[q, k]: a score_mod's value, a mask's as -inf where it hides."""

    def __init__(self, functions: tuple[Mod, ...]) -> None:
        self.functions, self.smem_bytes = functions, 0
        self.forms = [each.rebound(CUTE_MATH) for each in functions]

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
    assert ("tanh.approx" in ptx) == (name in ("soft_cap", "several")), "inlined, not called"
    assert "call" not in ptx
