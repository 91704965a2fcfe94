"""Mods inside the kernels: constants that a kernel is compiled with, and the device code that calls them.

The constant MODS is (score functions, mask functions, activations, rope, key): functions as Triton compiles them, rope
"pairs", "halves" or None, and the key, a hash of all code and numbers. Triton names a function by its module when it
keeps machine code on disk; without the key a cap of 30 would find the code of a cap of 50.

`site` is (request, head [BLOCK_M], q_idx [BLOCK_M], softmax_scale, tables), tables in the order of the functions.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from openmla.backends.triton import config, mod_math
from openmla.mods import Attached, Mod, Mods


@lru_cache(maxsize=1024)
def compiled_form(mod: Mod) -> Any:
    """The mod as a function of Triton."""
    number = (lambda value: value) if config.is_interpreted() else tl.constexpr
    function = mod.rebound(mod_math, number)
    function.__globals__["_triton_language"] = tl  # the interpreter looks for it in every function
    return triton.jit(function)


def constants(form: Mods | None) -> tuple[Any, ...] | None:
    """MODS of a problem."""
    if form is None:
        return None
    groups = tuple(
        tuple(compiled_form(each) for each in group)
        for group in (form.scores, form.masks, (form.activation,) if form.activation else ())
    )
    rope = None if form.rope is None else ("pairs" if form.rope.is_interleaved else "halves")
    key = "/".join(getattr(each, "cache_key", "interpreted") for group in groups for each in group)
    return (*groups, rope, key)


def table_arguments(mods: Attached | None) -> Any:
    """What `site` carries of tensors: for each function its tables, for each table pointer, sizes and strides.

    A plain decode passes the number 0, so that its launch does not depend on how Triton passes tuples.
    """
    if mods is None:
        return 0
    return tuple(tuple(_table(each) for each in tables) for tables in mods.tables)


def _table(table: torch.Tensor) -> tuple[Any, ...]:
    """Pointer, then size and stride of each dimension as 16 n + 2.

    Triton compiles anew for a number that is 1 or a multiple of 16, in a tuple always; these are neither. A table with
    a row per request would else stop a server whenever its batch becomes 1 or 16.
    """
    return (table, *(16 * each + 2 for pair in zip(table.shape, table.stride(), strict=True) for each in pair))


def rope_arguments(mods: Attached | None) -> Any:
    """(cos, sin, row strides, positions), or 0."""
    if mods is None or mods.rope is None:
        return 0
    cos, sin = mods.rope.cos, mods.rope.sin
    return (cos, sin, cos.stride(0), sin.stride(0), cos.shape[0])


@triton.jit
def rotate_queries(q_rope, row, valid, position, rope, MODS: tl.constexpr, DIMS: tl.constexpr):
    """q_rope [BLOCK_M, D_ROPE] turned by its position, in fp32, rounded once; see `openmla.mods.rope`.

    row: pointers to the queries. Each column needs its partner, which is read again, from cache.
    """
    COUNT: tl.constexpr = DIMS[0] - DIMS[1]
    HALF: tl.constexpr = COUNT // 2
    column = tl.arange(0, DIMS[3])
    if MODS[3] == "pairs":
        is_first = column % 2 == 0
        partner = column ^ 1
        pair = column // 2
    else:
        is_first = column < HALF
        partner = tl.where(is_first, column + HALF, column - HALF)
        pair = tl.where(is_first, column, column - HALF)
    wanted = valid[:, None] & (column < COUNT)[None, :]
    other = tl.load(row[:, None] + (DIMS[1] + partner)[None, :], mask=wanted, other=0.0).to(tl.float32)
    place = tl.minimum(tl.maximum(position, 0), rope[4] - 1).to(tl.int64)[:, None]
    cos = tl.load(rope[0] + place * rope[2] + pair[None, :], mask=wanted, other=0.0)
    sin = tl.load(rope[1] + place * rope[3] + pair[None, :], mask=wanted, other=0.0)
    turned = q_rope.to(tl.float32) * cos + tl.where(is_first, -1.0, 1.0)[None, :] * other * sin
    return tl.where((position < rope[4])[:, None], turned, float("nan")).to(q_rope.dtype)


@triton.jit
def change(scores, seen, site, place, MODS: tl.constexpr):
    """(scores in natural units behind every score_mod, seen behind every mask_mod) of raw products [BLOCK_M, BLOCK_N].

    place [BLOCK_N] is kv_idx. Scores that are not finite pass by.
    """
    scores = scores * site[3]
    head, q_idx, kv_idx = site[1][:, None], site[2][:, None], place[None, :]
    for index in tl.static_range(len(MODS[0])):
        changed = MODS[0][index](scores, site[0], head, q_idx, kv_idx, *site[4][index])
        changed = tl.broadcast_to(tl.cast(changed, tl.float32), scores.shape)
        scores = tl.where(tl.abs(scores) < float("inf"), changed, scores)
    for index in tl.static_range(len(MODS[1])):
        seen = seen & MODS[1][index](site[0], head, q_idx, kv_idx, *site[4][len(MODS[0]) + index])
    return scores, seen


@triton.jit
def activate(scores, site, place, MODS: tl.constexpr):
    """Weights of scores by the activation: 0 for -inf, NaN for NaN and +inf."""
    head, q_idx, kv_idx = site[1][:, None], site[2][:, None], place[None, :]
    weights = MODS[2][0](scores, site[0], head, q_idx, kv_idx, *site[4][len(MODS[0]) + len(MODS[1])])
    weights = tl.broadcast_to(tl.cast(weights, tl.float32), scores.shape)
    weights = tl.where(tl.abs(scores) < float("inf"), weights, float("nan"))
    return tl.where(scores == float("-inf"), 0.0, weights)
