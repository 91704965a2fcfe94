"""Bit-exact packing of every KV layout, against arithmetic written a second time from the format definitions."""

from __future__ import annotations

import math
import struct
from itertools import pairwise

import pytest
import torch

from openmla.core.errors import ProblemError
from openmla.core.layout import BYTE_LAYOUT_NAMES, kv_layout
from openmla.reference.quant import (
    decode_e2m1,
    dequantise,
    encode_e2m1,
    power_of_two_scale,
    quantise,
    read_rows,
    write_rows,
)

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
EXPONENTS = range(-20, 20)


def e4m3_value(code: int) -> float:
    """OCP FP8 E4M3: sign, 4 exponent bits with bias 7, 3 mantissa bits; only 0x7F and 0xFF are NaN."""
    sign, exponent, mantissa = -1.0 if code & 128 else 1.0, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def nearest_even(x: float, values: list[float]) -> int:
    """Index of the value nearest to |x|; at a tie the even index; beyond the last value the last."""
    size = abs(x)
    best = min(range(len(values)), key=lambda i: (abs(values[i] - size), i % 2))
    return best


def one_token(layout_name: str, row: torch.Tensor) -> tuple[torch.Tensor, bytes]:
    """(cache, bytes of its only page) with one token in one page of one row."""
    cache = quantise(row.reshape(1, 1, 1, -1), layout_name)
    return cache, bytes(cache.reshape(-1).tolist())


def fill(layout_name: str, num_pages: int, page_size: int, seed: int = 0, spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_pages, page_size, 1, kv_layout(layout_name).d_qk)
    size = torch.exp(spread * torch.randn(num_pages, page_size, 1, 1, generator=generator))
    return (torch.randn(*shape, generator=generator) * size).bfloat16()


def test_every_e4m3_code_at_every_exponent():
    # 256 codes x 40 power-of-two scales, as fp32 and as e8m0, read through whole cache rows.
    for name, scale_bytes in (("fp8_528", 4), ("fp8_528_mx", 1)):
        layout = kv_layout(name)
        cache = layout.empty_cache(len(EXPONENTS), 1)
        for page, exponent in enumerate(EXPONENTS):
            codes = [code % 256 for code in range(512)]
            scale = struct.pack("<f", 2.0**exponent) if scale_bytes == 4 else bytes([exponent + 127])
            cache[page, 0, 0] = torch.tensor([*codes, *(scale * layout.num_scales)], dtype=torch.uint8)
        values = dequantise(cache, layout, torch.float64).reshape(len(EXPONENTS), 512)
        want = torch.tensor([[e4m3_value(code % 256) * 2.0**e for code in range(512)] for e in EXPONENTS]).double()
        assert torch.equal(values.isnan(), want.isnan())
        assert torch.equal(values.nan_to_num(0), want.nan_to_num(0))


def test_every_e8m0_byte():
    layout = kv_layout("fp8_528_mx")
    cache = layout.empty_cache(256, 1)
    cache[..., :512] = 0x38  # 1.0
    cache[..., 512:] = torch.arange(256, dtype=torch.uint8)[:, None, None, None]
    values = dequantise(cache, layout, torch.float64)[:, 0, 0, 0]
    assert values[255].isnan()
    assert torch.equal(values[:255], torch.tensor([2.0 ** (byte - 127) for byte in range(255)], dtype=torch.float64))


@pytest.mark.parametrize("name", ["fp8_656", "fp8_528"])
def test_arbitrary_fp32_scales_are_multiplied_in_fp32_and_rounded_once(name):
    layout = kv_layout(name)
    generator = torch.Generator().manual_seed(1)
    cache = layout.empty_cache(50, 10)
    cache.copy_(torch.randint(0, 256, cache.shape, generator=generator))
    scales = torch.randn(50, 10, 4, generator=generator).exp()
    cache[:, :, 0, 512:528] = scales.contiguous().view(torch.uint8)
    got = dequantise(cache, layout)[..., :512].reshape(500, 4, 128)
    codes = cache[:, :, 0, :512].reshape(500, 4, 128)
    table = torch.tensor([e4m3_value(code) for code in range(256)])
    want = (table[codes.long()] * scales.reshape(500, 4, 1)).bfloat16()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(0), want.nan_to_num(0))
    assert got.isnan().any()


def test_scale_of_every_bf16_magnitude():
    bits = torch.arange(0x7F80, dtype=torch.int32).to(torch.int16)
    amax = bits.view(torch.bfloat16).float()
    got = power_of_two_scale(amax)
    # The formula as published, in fp64 where log2 of these values is exact enough to never sit on the wrong side.
    want = torch.exp2((amax.double() / 448).clamp_min(1e-4).log2().ceil())
    assert torch.equal(got.double(), want)
    published = torch.pow(2, (amax / 448).clamp_min(1e-4).log2().ceil())
    assert torch.equal(got, published)
    assert ((amax / got) <= 448).all()


@pytest.mark.parametrize("name", ["fp8_656", "fp8_584", "fp8_528", "fp8_528_mx"])
def test_codes_are_nearest_even(name):
    layout = kv_layout(name)
    group, magnitudes = layout.scale_group, [e4m3_value(code) for code in range(127)]
    generator = torch.Generator().manual_seed(2)
    for exponent in (-6, 0, 3):
        # Every code, every midpoint and both neighbours of it, and random values, in groups whose amax is 448 * 2^e.
        middles = [(a + b) / 2 for a, b in pairwise(magnitudes)]
        probes = magnitudes + middles + [m * (1 + 2.0**-10) for m in middles] + [m * (1 - 2.0**-10) for m in middles]
        probes += (torch.rand(400, generator=generator) * 448).tolist()
        probes = [x if i % 2 else -x for i, x in enumerate(probes)]
        for start in range(0, len(probes), group - 1):
            chunk = probes[start : start + group - 1]
            row = torch.zeros(layout.d_qk)
            row[: len(chunk)] = torch.tensor(chunk) * 2.0**exponent
            row[group - 1] = 448 * 2.0**exponent
            _, raw = one_token(name, row)
            for i, x in enumerate(chunk):
                want = nearest_even(x, magnitudes) | (128 if math.copysign(1, x) < 0 else 0)
                assert raw[i] == want, (name, exponent, x)


def test_e2m1_exhaustively():
    values = torch.arange(-8192, 8193).double() / 1024  # every multiple of 1/1024 in [-8, 8]: all ties included
    codes = encode_e2m1(values.float())
    for x, code in zip(values.tolist(), codes.tolist(), strict=True):
        assert code & 7 == nearest_even(x, E2M1), x
        assert (code >> 3) == (x < 0)
    assert decode_e2m1(torch.arange(16, dtype=torch.uint8)).tolist() == E2M1 + [-value for value in E2M1]
    nan = torch.tensor(math.nan)
    special = torch.cat([torch.stack([nan, -nan]), torch.tensor([math.inf, -math.inf, -0.0])])
    assert encode_e2m1(special).tolist() == [0, 0, 7, 15, 8]


def test_e2m1_pairs_and_scales():
    row = torch.zeros(512)
    row[:16] = torch.tensor([6, -6, 4, 3, 2, 1.5, 1, 0.5, 0, -0.5, -1, -1.5, -2, -3, -4, 5.0])
    row[16:32] = 6 * 448 * 3.0  # beyond the largest scale: saturates
    row[32:48] = 2.0**-9  # amax / 6 below the smallest scale
    _, raw = one_token("fp4_288", row)
    codes = [nibble for byte in raw[:16] for nibble in (byte & 15, byte >> 4)]
    assert codes[:16] == [7, 15, 6, 5, 4, 3, 2, 1, 0, 9, 10, 11, 12, 13, 14, 6]
    assert codes[16:32] == [7] * 16
    assert raw[256:259] == bytes([0x38, 0x7E, 0x01])  # 1.0, 448, 2^-9
    assert codes[32:] == []
    assert [raw[16] & 15, raw[16] >> 4] == [2, 2]  # 2^-9 / 2^-9


@pytest.mark.parametrize("name", BYTE_LAYOUT_NAMES)
@pytest.mark.parametrize("page_size", [1, 2, 53, 64])
def test_byte_addresses(name, page_size):
    """Every token is found where the definition of its format says."""
    layout = kv_layout(name)
    latent = fill(name, 3, page_size)
    cache = quantise(latent, name)
    assert cache.dtype == torch.uint8 and cache.shape == (3, page_size, 1, layout.row_elements)
    assert cache.stride(0) % layout.page_align_bytes == 0 or page_size * 3 == 0
    pool = torch.empty(0, dtype=torch.uint8).set_(cache.untyped_storage())
    for page, token in ((0, 0), (1, page_size - 1), (2, page_size // 2)):
        begin = page * cache.stride(0)
        row = latent[page, token, 0].float()
        if name == "fp8_584":
            data = pool[begin + token * 576 :][:576]
            scales = pool[begin + page_size * 576 + token * 8 :][:8]
            codes, rope = data[:448], data[448:].view(torch.bfloat16)
            assert scales[7] == 0
            factor = torch.exp2(scales[:7].double() - 127)
        else:
            data = pool[begin + token * layout.bytes_per_token :][: layout.bytes_per_token]
            quant = 256 if name == "fp4_288" else 512
            width = {"fp8_656": 16, "fp8_528": 16, "fp8_528_mx": 16, "fp4_288": 32}[name]
            codes, scales = data[:quant], data[quant : quant + width]
            rope = data[quant + width :].clone().view(torch.bfloat16)
            if name == "fp8_528_mx":
                factor = torch.exp2(scales.double() - 127)
            elif name == "fp4_288":
                factor = torch.tensor([e4m3_value(int(code)) for code in scales]).double()
            else:
                factor = scales.clone().view(torch.float32).double()
        if name == "fp4_288":
            nibbles = torch.stack([codes & 15, codes >> 4], -1).flatten().long()
            values = torch.tensor(E2M1 + [-value for value in E2M1]).double()[nibbles]
        else:
            values = torch.tensor([e4m3_value(int(code)) for code in codes]).double()
        read = values * factor.repeat_interleave(layout.scale_group)
        assert torch.equal(rope, latent[page, token, 0, layout.d_quant :])
        assert torch.equal(dequantise(cache, name)[page, token, 0, : layout.d_quant], read.bfloat16())
        # Half a step of the coarsest element of each group.
        step = read.abs().reshape(-1, layout.scale_group).amax(-1) * (2.0**-4 if name != "fp4_288" else 0.26)
        error = (read - row[: layout.d_quant]).abs().reshape(-1, layout.scale_group).amax(-1)
        assert (error <= step).all()


@pytest.mark.parametrize("name", [*BYTE_LAYOUT_NAMES, "bf16_576", "fp16_64", "fp32_40"])
def test_rows_scatter_and_gather(name):
    layout = kv_layout(name)
    generator = torch.Generator().manual_seed(3)
    cache = layout.empty_cache(4, 5)
    whole = torch.empty(0, dtype=torch.uint8).set_(cache.untyped_storage()).fill_(0xA5)
    slots = torch.tensor([7, -1, 18, 0, 12])
    rows = torch.randn(5, layout.d_qk, generator=generator).to(torch.bfloat16)
    before = whole.clone()
    write_rows(cache, layout, slots, rows)
    # At most the bytes of four tokens changed; the skipped row went nowhere.
    changed = int((whole != before).sum())
    assert 0 < changed <= 4 * layout.bytes_per_token
    found = read_rows(cache, layout, slots)
    assert not found[1].any()
    alone = quantise(rows.reshape(5, 1, 1, -1), layout)
    want = dequantise(alone, layout, found.dtype).reshape(5, -1)
    keep = torch.tensor([0, 2, 3, 4])
    assert torch.equal(found[keep], want[keep])
    again = whole.clone()
    write_rows(cache, layout, slots, rows)
    assert torch.equal(whole, again)


@pytest.mark.parametrize("name", BYTE_LAYOUT_NAMES)
def test_reading_what_was_read_changes_nothing(name):
    once = dequantise(quantise(fill(name, 20, 20, seed=4), name), name)
    twice = dequantise(quantise(once, name), name)
    assert torch.equal(once, twice)


@pytest.mark.parametrize("name", BYTE_LAYOUT_NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_group_with_a_nonfinite_element_reads_as_nan(name, bad):
    layout = kv_layout(name)
    latent = fill(name, 1, 2, seed=5)
    clean = dequantise(quantise(latent, name), name)
    latent[0, 1, 0, layout.scale_group + 3] = bad
    got = dequantise(quantise(latent, name), name)
    group = slice(layout.scale_group, 2 * layout.scale_group)
    assert got[0, 1, 0, group].isnan().all()
    got[0, 1, 0, group] = clean[0, 1, 0, group]
    assert torch.equal(got, clean)


@pytest.mark.parametrize("name", BYTE_LAYOUT_NAMES)
def test_zero_and_tiny_groups(name):
    layout = kv_layout(name)
    latent = torch.zeros(1, 1, 1, layout.d_qk)
    assert not dequantise(quantise(latent, name), name).any()
    latent += 1e-30
    assert dequantise(quantise(latent, name), name)[..., : layout.d_quant].abs().max() == 0
    latent[...] = 3e38  # the largest scales that the formats can hold
    got = dequantise(quantise(latent, name), name)[..., : layout.d_quant].float()
    assert (got == (6 * 448 if name == "fp4_288" else got[0, 0, 0, 0])).all() and got.isfinite().all()


def test_two_thousand_tiles_keep_the_relative_error_of_the_format():
    for name, worst in (("fp8_656", 2.0**-4), ("fp8_584", 2.0**-4), ("fp8_528", 2.0**-4), ("fp8_528_mx", 2.0**-4)):
        layout = kv_layout(name)
        latent = fill(name, 8, 64, seed=6, spread=3.0)
        got = dequantise(quantise(latent, name), name).double()[..., : layout.d_quant].reshape(-1, layout.scale_group)
        want = latent.double()[..., : layout.d_quant].reshape(-1, layout.scale_group)
        assert got.shape[0] >= 2000
        scale = power_of_two_scale(want.abs().amax(-1)).double()[:, None]
        # Half a step: relative 2^-4 of the element, or half of e4m3's smallest subnormal times the scale.
        assert ((got - want).abs() <= want.abs() * worst + scale * 2.0**-10).all(), name


def test_plain_layouts_are_copies():
    latent = torch.randn(2, 3, 4, 40)
    cache = quantise(latent, "fp32_40")
    assert torch.equal(cache, latent) and torch.equal(dequantise(cache, "fp32_40", torch.float32), latent)


@pytest.mark.parametrize("slot", [-2, 20, 2**40])
def test_slots_beyond_the_cache_are_refused(slot):
    cache = kv_layout("fp8_584").empty_cache(4, 5)
    with pytest.raises(ProblemError, match="slots must be -1 or 0 to 19"):
        write_rows(cache, "fp8_584", torch.tensor([slot]), torch.zeros(1, 512))
    with pytest.raises(ProblemError, match=f"got {slot}"):
        read_rows(cache, "fp8_584", torch.tensor([slot]))


@pytest.mark.parametrize("name", BYTE_LAYOUT_NAMES)
def test_padded_pages_and_no_rows(name):
    layout = kv_layout(name)
    dense = quantise(fill(name, 3, 7, seed=8), name)
    stride = layout.page_bytes(7) + 32
    pool = torch.full((3 * stride + 16,), 0xFF, dtype=torch.uint8)
    padded = pool.as_strided(dense.shape, (stride, layout.row_elements, layout.row_elements, 1), 16)
    padded.copy_(dense)
    assert torch.equal(dequantise(padded, name), dequantise(dense, name))
    signed = padded.view(torch.int8)
    assert torch.equal(dequantise(signed, name), dequantise(dense, name))
    none = torch.zeros(0, dtype=torch.int64)
    assert read_rows(dense, name, none).shape == (0, layout.d_qk)
    write_rows(dense, name, none, torch.zeros(0, layout.d_qk))


@pytest.mark.parametrize("shape", [(3, 4), (2, 8, 1, 512)])
def test_what_has_no_pages_or_other_columns_is_refused(shape):
    with pytest.raises(ProblemError, match=r"latent must be \[num_pages, page_size, h_kv, d_qk=576\] for fp8_656"):
        quantise(torch.zeros(shape), "fp8_656")
    with pytest.raises(ProblemError, match="row_elements=656"):
        dequantise(torch.zeros(shape, dtype=torch.uint8), "fp8_656")
