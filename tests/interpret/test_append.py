"""Cache append in Triton: the bytes of the reference, for every layout, dtype and position."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

import openmla
from openmla.backends.triton.append import bf16_bits, encode_e2m1, encode_e4m3
from openmla.core.errors import ProblemError
from openmla.core.faults import Fault
from openmla.core.layout import BYTE_LAYOUT_NAMES, kv_layout
from openmla.mods import Rope
from openmla.ops.append import append as append_anywhere
from openmla.reference import quant

LAYOUTS = [*BYTE_LAYOUT_NAMES, "bf16_576", "fp16_40", "fp32_576"]
PAGE_SIZE, NUM_PAGES = 5, 4
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def append(cache, layout, slots, rows, **rope):
    append_anywhere(cache, slots, rows, kv_layout=layout, backend="triton", **rope)


def poisoned(layout: str) -> torch.Tensor:
    """A cache whose every byte, page padding included, is 0xA5."""
    cache = kv_layout(layout).empty_cache(NUM_PAGES, PAGE_SIZE)
    whole = cache.untyped_storage()
    torch.empty(0, dtype=torch.uint8).set_(whole).fill_(0xA5)
    return cache


def bytes_of(cache: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(cache.untyped_storage()).clone()


def tokens(layout: str, dtype: torch.dtype, count: int = 9) -> torch.Tensor:
    """Rows of very different size: zeros, tiny, ordinary, large, and exact powers of two at the edges of scales."""
    generator = torch.Generator().manual_seed(0)
    d_qk = kv_layout(layout).d_qk
    rows = torch.randn(9, d_qk, generator=generator)
    rows[1] = 0
    rows[2] *= 1e-4
    rows[3] *= 1000
    rows[4] = torch.exp2(torch.randint(-8, 9, (d_qk,), generator=generator).float()) * rows[4].sign()
    rows[5] = rows[5].clamp(-1, 1) * 448 / 448
    rows[5, 0] = 448.0
    rows[6, ::2] = -0.0
    rows[7] = (rows[7] * 8).round() / 8  # ties of the short formats
    return rows[-count:].to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["", "pairs", "halves"])
def test_bytes_are_those_of_the_reference(layout, dtype, kind):
    rows = tokens(layout, dtype)
    slots = torch.tensor([3, 17, -1, 0, 19, 5, 11, 12, 4])
    mine, expected = poisoned(layout), poisoned(layout)
    if kind:
        d_rope = 64 if rows.shape[1] >= 512 else 8
        rope = Rope.of_base(d_rope, 100, base=50.0, is_interleaved=kind == "pairs")
        positions = torch.tensor([0, 1, 2, 99, 50, 7, 8, 33, -3])
        append(mine, layout, slots, rows, rope=rope, positions=positions)
        rows = rope.rotated(rows[:, None], rows.shape[1] - d_rope, positions)[:, 0]
    else:
        append(mine, layout, slots, rows)
    quant.write_rows(expected, layout, slots, rows)
    assert torch.equal(bytes_of(mine), bytes_of(expected))
    assert openmla.check_errors() == ()


@pytest.mark.parametrize("layout", ["fp8_656", "fp8_584", "fp8_528_mx"])
def test_scales_change_where_those_of_the_reference_do(layout):
    """A group whose largest magnitude is 448 times a power of two, and its neighbours on both sides; so the smallest scale."""
    edges = torch.cat([448 * torch.exp2(torch.arange(-30.0, 30.0)), torch.tensor([0.0448, 1e-4, 2.0**-149, 448.0])])
    up, down = (torch.nextafter(edges, edges * factor) for factor in (2.0, 0.0))
    peaks = torch.cat([edges, up, down, edges * 1.25, edges * 1.75])
    stored = kv_layout(layout)
    rows, slots = torch.zeros(len(peaks), stored.d_qk), torch.arange(len(peaks))
    rows[:, :: stored.scale_group] = peaks[:, None]
    rows[:, 5 :: stored.scale_group] = -peaks[:, None] * 0.3
    mine, expected = (stored.empty_cache(2, 160).fill_(0) for _ in range(2))
    append(mine, layout, slots, rows)
    quant.write_rows(expected, layout, slots, rows)
    assert torch.equal(mine.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("layout", BYTE_LAYOUT_NAMES)
@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_a_group_that_is_not_finite_reads_as_nan(layout, odd):
    rows = tokens(layout, torch.float32, 2)
    rows[0, 3] = odd
    mine, expected = poisoned(layout), poisoned(layout)
    slots = torch.tensor([6, 7])
    append(mine, layout, slots, rows)
    quant.write_rows(expected, layout, slots, rows)
    found, golden = (quant.read_rows(each, layout, slots) for each in (mine, expected))
    torch.testing.assert_close(found, golden, rtol=0, atol=0, equal_nan=True)
    assert bool(found[0].isnan().any())
    assert bool(found[1].isfinite().all())


@pytest.mark.parametrize("bad", [-2, 20, 2**31 - 1, -(2**40), 2**40])
def test_a_bad_slot_stores_nothing_and_is_noted(bad):
    rows = tokens("fp8_656", torch.bfloat16, 3)
    mine, expected = poisoned("fp8_656"), poisoned("fp8_656")
    append(mine, "fp8_656", torch.tensor([2, bad, 9]), rows)
    quant.write_rows(expected, "fp8_656", torch.tensor([2, -1, 9]), rows)
    assert torch.equal(bytes_of(mine), bytes_of(expected))
    assert openmla.check_errors() == (Fault.INDEX_OUT_OF_RANGE,)


def test_a_position_behind_the_tables_is_nan():
    rows = tokens("bf16_576", torch.bfloat16, 2)
    mine = poisoned("bf16_576")
    append(mine, "bf16_576", torch.tensor([0, 1]), rows, rope=Rope.of_base(64, 10), positions=torch.tensor([9, 10]))
    stored = mine[0, :2, 0]
    assert torch.equal(stored[:, :512], rows[:, :512])
    assert bool(stored[0].isfinite().all())
    assert bool(stored[1, 512:].isnan().all())


def test_no_tokens_and_strided_rows():
    layout = "fp8_584"
    mine, expected = poisoned(layout), poisoned(layout)
    append(mine, layout, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 512))
    assert torch.equal(bytes_of(mine), bytes_of(expected))
    wide = tokens(layout, torch.bfloat16).repeat(1, 2)[:, 512:]
    slots = torch.arange(9, dtype=torch.int32)
    append(mine, layout, slots, wide)
    quant.write_rows(expected, layout, slots.long(), wide)
    assert torch.equal(bytes_of(mine), bytes_of(expected))


def test_bad_arguments_are_listed_at_once():
    cache = poisoned("fp8_656")
    with pytest.raises(ProblemError) as caught:
        append(cache[..., 1:], "fp8_656", torch.zeros(3), torch.zeros(2, 576), positions=torch.zeros(3))
    assert len(caught.value.violations) == 4
    with pytest.raises(ProblemError, match="rope rotates 1024 columns, but rows have 576"):
        append(
            cache, "fp8_656", torch.zeros(1, dtype=torch.int64), torch.zeros(1, 576), rope=Rope.of_base(1024, 3),
            positions=torch.zeros(1, dtype=torch.int32),
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------- number formats


@triton.jit
def encode(x_ptr, out_ptr, FORMAT: tl.constexpr, COUNT: tl.constexpr):
    place = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    x = tl.load(x_ptr + place)
    if FORMAT == "e4m3":
        code = encode_e4m3(x).to(tl.int32)
    elif FORMAT == "e2m1":
        code = encode_e2m1(x, x * 0 + 1.0)
    else:
        code = bf16_bits(x).to(tl.int32)
    tl.store(out_ptr + place, code)


@pytest.mark.parametrize("name", ["e4m3", "e2m1", "bf16"])
def test_every_bf16_number_and_its_neighbours(name):
    """All bf16 bit patterns, and fp32 numbers just beside every one: all ties and all sides of them."""
    bits = torch.arange(2**16, dtype=torch.int64).repeat_interleave(3) << 16
    bits += torch.tensor([0, 1, -1]).repeat(2**16)
    x = bits.to(torch.int32).view(torch.float32)
    x = x[x.isfinite()]
    if name == "e4m3":
        x = x[x.abs() <= 448]
    x = x[: x.numel() // 1024 * 1024].contiguous()
    found = torch.empty(x.numel(), dtype=torch.int32)
    encode[(x.numel() // 1024,)](x, found, name, 1024)
    if name == "e4m3":
        expected = x.to(torch.float8_e4m3fn).view(torch.uint8).int()
    elif name == "e2m1":
        expected = quant.encode_e2m1(x).int()
    else:
        expected = x.to(torch.bfloat16).view(torch.uint16).int()
    assert torch.equal(found, expected)
