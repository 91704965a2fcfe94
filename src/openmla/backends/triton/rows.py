"""Device code: rows of a KV cache as tiles [BLOCK_N, columns], dequantised on the way in.

A layout reaches the device as the tuple of constants that `openmla.backends.triton.config.stored_rows` makes:

    (data, scale, d_quant, scale_group, row_bytes, scale_first, scale_step, rope_first)

`data` is "plain", "e4m3" or "e2m1"; `scale` "none" where it belongs to the call. For byte layouts the token `offset` of a page has its codes at byte
offset * row_bytes of the page, its scales at scale_first + offset * scale_step, its bf16 columns at rope_first of its
row. Codes are read with integer arithmetic alone, so every architecture can: no fp8 conversion is asked of it.

Reading is bf16(fp32(code) * fp32(scale)), as in `openmla.reference.quant`. Rows that are not `seen` read as zeros,
whatever bytes they hold, and are not touched in memory.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl


@triton.jit
def decode_e4m3(code):
    """fp32 values of e4m3 bytes (uint8).

    Shifted by 7, an e4m3 code is the fp16 number of the same digits with another bias: 2^-8 times the value, subnormal
    numbers included. The pattern of all ones is NaN; there is no infinity.
    """
    bits = code.to(tl.uint16)
    magnitude = bits & 0x7F
    half = (((bits & 0x80) << 8) | (magnitude << 7)).to(tl.float16, bitcast=True)
    return tl.where(magnitude == 0x7F, float("nan"), half.to(tl.float32) * 256.0)


@triton.jit
def decode_e2m1(nibble):
    """fp32 values of e2m1 codes (0 to 15): as fp16 digits they are 2^-14 times the value."""
    bits = nibble.to(tl.uint16)
    half = (((bits & 8) << 12) | ((bits & 7) << 9)).to(tl.float16, bitcast=True)
    return half.to(tl.float32) * 16384.0


@triton.jit
def decode_e8m0(code):
    """fp32 values 2^(code - 127) of e8m0 bytes; 255 is NaN, and 0 is fp32's subnormal 2^-127."""
    exponent = code.to(tl.int32)
    bits = tl.where(exponent == 0, 0x00400000, exponent << 23)
    return tl.where(exponent == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def load_scales(page, offset, group, wanted, LAYOUT: tl.constexpr):
    """fp32 scales; page (pointers to bytes), offset and group broadcast to the shape of `wanted`."""
    place = page + LAYOUT[5] + offset.to(tl.int64) * LAYOUT[6]
    if LAYOUT[1] == "none":  # it belongs to the call
        scales = tl.where(wanted, 1.0, 0.0)
    elif LAYOUT[1] == "fp32":
        scales = tl.load((place + 4 * group).to(tl.pointer_type(tl.float32)), mask=wanted, other=0.0)
    elif LAYOUT[1] == "e8m0":
        scales = decode_e8m0(tl.load(place + group, mask=wanted, other=0))
    else:
        scales = decode_e4m3(tl.load(place + group, mask=wanted, other=0))
    return scales


@triton.jit
def load_codes(row, column, wanted, LAYOUT: tl.constexpr):
    """fp32 values of quantised columns; row (pointers to the first byte) and column broadcast to `wanted`."""
    if LAYOUT[0] == "e2m1":
        pair = tl.load(row + column // 2, mask=wanted, other=0)
        values = decode_e2m1((pair >> (column % 2 * 4).to(tl.uint8)) & 15)
    else:
        values = decode_e4m3(tl.load(row + column, mask=wanted, other=0))
    return values


@triton.jit
def load_quantised(page, offset, seen, LAYOUT: tl.constexpr, D_LATENT: tl.constexpr):
    """bf16 [BLOCK_N, D_LATENT]: the latent columns of byte rows, with bf16 columns behind the quantised ones.

    page: pointers to the first byte of each row's page, [BLOCK_N]; offset: its token within that page.
    """
    D_QUANT: tl.constexpr = LAYOUT[2]
    GROUP: tl.constexpr = LAYOUT[3]
    BLOCK_N: tl.constexpr = seen.shape[0]
    row = page + offset.to(tl.int64) * LAYOUT[4]
    # A third dimension of scale groups: a scale is then loaded once per group and broadcast in registers.
    group = tl.arange(0, D_LATENT // GROUP)[None, :, None]
    column = group * GROUP + tl.arange(0, GROUP)[None, None, :]
    wanted = seen[:, None, None] & (column < D_QUANT)
    values = load_codes(row[:, None, None], column, wanted, LAYOUT)
    has_scale = seen[:, None, None] & (group * GROUP < D_QUANT)
    scales = load_scales(page[:, None, None], offset[:, None, None], group, has_scale, LAYOUT)
    tile = tl.reshape((values * scales).to(tl.bfloat16), (BLOCK_N, D_LATENT))
    if D_QUANT < D_LATENT:
        columns = tl.arange(0, D_LATENT)
        tail = load_stored(row, columns - D_QUANT, seen, columns >= D_QUANT, LAYOUT)
        tile = tl.where((columns < D_QUANT)[None, :], tile, tail)
    return tile


@triton.jit
def load_stored(row, column, seen, wanted, LAYOUT: tl.constexpr):
    """bf16 [BLOCK_N, columns]: columns that a byte layout stores as they are."""
    place = (row + LAYOUT[7]).to(tl.pointer_type(tl.bfloat16))
    return tl.load(place[:, None] + column[None, :], mask=seen[:, None] & wanted[None, :], other=0.0)


@triton.jit
def wanted_columns(rows, COUNT: tl.constexpr, PADDED: tl.constexpr):
    """Mask of [rows, PADDED] elements: those rows, and of PADDED columns the first COUNT.

    Where nothing is padded it has one column: a mask per element costs a register each, and would live as long.
    """
    mask = rows[:, None]
    if COUNT < PADDED:
        mask = mask & (tl.arange(0, PADDED) < COUNT)[None, :]
    return mask


@triton.jit
def row_offsets(COUNT: tl.constexpr, STRIDE: tl.constexpr):
    """int64 [COUNT]: elements from row 0 to each row, as a number per thread plus constants.

    Neighbouring rows are loaded by different threads, distant ones by the same thread: with the constants apart the
    compiler keeps one address per thread, and puts them into the instructions.
    """
    ALIGNED: tl.constexpr = 8 if STRIDE % 8 == 0 else 1  # elements; lost on the way through reshape
    far = (tl.arange(0, COUNT // 4).to(tl.int64) * (4 * STRIDE))[:, None]
    near = (tl.arange(0, 4).to(tl.int64) * STRIDE)[None, :]
    return tl.multiple_of(tl.reshape(far + near, (COUNT,)), ALIGNED)


@triton.jit
def load_plain(row, seen, FIRST: tl.constexpr, COUNT: tl.constexpr, PADDED: tl.constexpr):
    """[BLOCK_N, PADDED]: columns FIRST to FIRST + COUNT of plain rows, zeros behind them."""
    column = FIRST + tl.arange(0, PADDED)
    return tl.load(row[:, None] + column[None, :], mask=wanted_columns(seen, COUNT, PADDED), other=0.0)


@triton.jit
def load_rows(page, offset, seen, FIRST: tl.constexpr, COUNT: tl.constexpr, PADDED: tl.constexpr):
    """`load_plain` of the rows at page + offset. From one page, columns are added first: a thread has one address."""
    if len(page.shape) == 0:
        place = (page + FIRST + tl.arange(0, PADDED))[None, :] + offset[:, None]
        tile = tl.load(place, mask=wanted_columns(seen, COUNT, PADDED), other=0.0)
    else:
        tile = load_plain(page + offset, seen, FIRST, COUNT, PADDED)
    return tile


@triton.jit
def load_latent(page, offset, seen, dtype: tl.constexpr, LAYOUT: tl.constexpr, DIMS: tl.constexpr):
    """[BLOCK_N, D_LATENT] in `dtype`: the columns of v, which are also the first columns of k.

    page: pointers to elements of a plain layout, one or [BLOCK_N], or to the bytes of each row's page; offset [BLOCK_N]:
    elements from there to the row, or its token within the page; DIMS: (d_qk, d_v, D_LATENT, D_ROPE).
    """
    if LAYOUT[0] == "plain":
        tile = load_rows(page, offset, seen, 0, DIMS[1], DIMS[2])
    else:
        tile = load_quantised(page, offset, seen, LAYOUT, DIMS[2])
    return tile.to(dtype)


@triton.jit
def load_rope(page, offset, seen, dtype: tl.constexpr, LAYOUT: tl.constexpr, DIMS: tl.constexpr):
    """[BLOCK_N, D_ROPE] in `dtype`: the columns of k behind those of v. Arguments as in `load_latent`."""
    if LAYOUT[0] == "plain":
        tile = load_rows(page, offset, seen, DIMS[1], DIMS[0] - DIMS[1], DIMS[3])
    else:
        column = tl.arange(0, DIMS[3])
        row = page + offset.to(tl.int64) * LAYOUT[4]
        wanted = column < DIMS[0] - DIMS[1]
        if LAYOUT[1] == "none":
            place = row[:, None] + LAYOUT[7] + column[None, :]
            tile = load_codes(place, 0, seen[:, None] & wanted[None, :], LAYOUT)
        else:
            tile = load_stored(row, column, seen, wanted, LAYOUT)
    return tile.to(dtype)
