"""Merge of whole results in Triton: the law of `split.combine`, any strides, parts without keys that hold garbage, a sink."""

from __future__ import annotations

import pytest
import torch

from openmla.backends.triton import parts
from openmla.split import combine


def drawn(more: int, shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int = 0):
    """Parts [1 + more, ...] of which some rows have no key and hold NaN; the first row has none anywhere."""
    generator = torch.Generator().manual_seed(seed)
    batch, s_q, h_q, _ = shape
    outs = torch.randn(1 + more, *shape, generator=generator).to(dtype)
    lses = 30 * torch.randn(1 + more, batch, h_q, s_q, generator=generator)
    empty = torch.rand(lses.shape, generator=generator) < 0.3
    empty[:, 0, 0, 0] = True
    return outs.masked_fill(empty.transpose(2, 3)[..., None], torch.nan), lses.masked_fill(empty, -torch.inf)


def golden(outs: torch.Tensor, lses: torch.Tensor, sink: torch.Tensor | None):
    out, lse = combine.merge(outs.double(), lses.double().transpose(2, 3))
    if sink is not None:
        out = out * torch.sigmoid(lse - sink)[..., None]
    return out, lse.transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("more", "shape"), [(0, (2, 1, 3, 512)), (1, (3, 2, 4, 512)), (3, (1, 3, 5, 40))])
def test_the_law(dtype, more, shape) -> None:
    outs, lses = drawn(more, shape, dtype)
    sink = torch.linspace(-20, 20, shape[2])
    for given in (None, sink):
        out, lse = parts.merge(outs[0], lses[0], outs[1:], lses[1:], given, 1.0)
        want, want_lse = golden(outs, lses, given)
        assert (out.dtype, out.is_contiguous(), lse.is_contiguous()) == (dtype, True, True)
        assert not out[0, 0, 0].any()
        assert lse[0, 0, 0] == -torch.inf
        # fp32 arithmetic, rounded once: half a unit of the dtype (one of bf16, to which the interpreter truncates).
        unit = torch.finfo(dtype).eps / (1 if dtype == torch.bfloat16 else 2) + 1e-6
        assert ((out.double() - want).abs() <= unit * want.abs() + 3e-6).all()
        torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=1e-5)


def test_strides_are_free_and_the_factor_scales_lse() -> None:
    outs, lses = drawn(2, (2, 3, 4, 64), torch.bfloat16, seed=1)
    want = parts.merge(outs[0], lses[0], outs[1:], lses[1:], None, 1.0)
    # heads first, a padded row, lse by token
    wide = torch.full((3, 4, 2, 3, 80), torch.nan, dtype=torch.bfloat16)
    wide[..., :64] = outs.permute(0, 3, 1, 2, 4)
    loose = wide[..., :64].permute(0, 2, 3, 1, 4)
    by_token = lses.transpose(2, 3).contiguous().transpose(2, 3)
    out, lse = parts.merge(loose[0], by_token[0], outs[1:], by_token[1:], None, 2.0)
    assert torch.equal(out, want[0])
    assert torch.equal(lse, 2 * want[1])
    again, _ = parts.merge(outs[0], lses[0], loose[1:], lses[1:], None, 1.0)
    assert torch.equal(again, want[0])
