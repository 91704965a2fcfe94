"""Number formats decoded with integer arithmetic: every code, against PyTorch's own conversion."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
import triton
import triton.language as tl

import openmla
from openmla.backends.triton.rows import decode_e2m1, decode_e4m3, decode_e8m0
from openmla.core.errors import UnsupportedError
from openmla.reference.quant import decode_e2m1 as reference_e2m1
from openmla.testing.cases import draw


@triton.jit
def read_codes(code_ptr, out_ptr, FORMAT: tl.constexpr, COUNT: tl.constexpr):
    place = tl.arange(0, COUNT)
    code = tl.load(code_ptr + place)
    if FORMAT == "e4m3":
        values = decode_e4m3(code)
    elif FORMAT == "e8m0":
        values = decode_e8m0(code)
    else:
        values = decode_e2m1(code)
    tl.store(out_ptr + place, values)


@pytest.mark.parametrize("name", ["e4m3", "e8m0", "e2m1"])
def test_every_code(name):
    count = 16 if name == "e2m1" else 256
    codes = torch.arange(count, dtype=torch.int32).to(torch.uint8)
    found = torch.empty(count)
    read_codes[(1,)](codes, found, name, count)
    if name == "e2m1":
        expected = reference_e2m1(codes)
    else:
        expected = codes.view({"e4m3": torch.float8_e4m3fn, "e8m0": torch.float8_e8m0fnu}[name]).float()
    # By bits, so that -0 is not 0; NaN apart, whose payload is free.
    assert torch.equal(found.isnan(), expected.isnan())
    kept = ~expected.isnan()
    assert torch.equal(found[kept].view(torch.int32), expected[kept].view(torch.int32))


@triton.jit
def multiply(a_ptr, b_ptr, out_ptr):
    place = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out_ptr + place, tl.dot(tl.load(a_ptr + place), tl.load(b_ptr + place)))


def test_the_interpreter_still_multiplies_bf16_wrongly():
    """The reason for the refusal below. The day this fails, the interpreter can do it: test bf16 here as well."""
    a = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    out = torch.empty(16, 16)
    multiply[(1,)](a.half(), a.half(), out)
    torch.testing.assert_close(out, a.half().float() @ a.half().float())
    multiply[(1,)](a.bfloat16(), a.bfloat16(), out)
    assert not torch.allclose(out, a.bfloat16().float() @ a.bfloat16().float(), rtol=0.1)


@pytest.mark.parametrize("op", ["decode", "sparse_decode", "sparse_prefill"])
def test_bf16_is_refused_with_the_reason(op):
    case = dataclasses.replace(draw(1, op), dtype=torch.bfloat16, layout="", extra_layout="")
    with pytest.raises(UnsupportedError, match=re.escape("Triton's interpreter multiplies bf16 wrongly")):
        case.run("triton")
    assert "triton/" in str(openmla.explain(op))
