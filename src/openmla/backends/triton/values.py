"""Device code of OPENMLA_CHECKS=device: looks at every id and length that a launch will trust, and keeps one bad one.

One program per row of ids. The first program that finds something wins the record with a compare-and-swap and writes
where it was and what; the others leave it alone, so which of several bad values is kept is not fixed. Nothing is
returned to the host here: `openmla.check_errors()` reads the record. Codes are those of `openmla.core.faults.CODES`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from openmla.core.faults import CODES

MAX_INT32 = 2**31 - 1
BLOCK = 256  # ids per step of a program; a table of 128 requests of 32k tokens is 512 wide


@triton.jit
def _keep(record, code, row, column, value, limit):
    """Write the record unless it is taken."""
    if tl.atomic_cas(record, 0, code) == 0:
        tl.store(record + 1, row)
        tl.store(record + 2, column)
        tl.store(record + 3, tl.minimum(tl.maximum(value, -2147483648), 2147483647).to(tl.int32))  # of 64 bits
        tl.store(record + 4, limit)


@triton.jit
def ids_kernel(
    ids, lengths, record, columns, low, high, capacity, unit, outer_stride, inner_stride, id_stride, outer_length,
    inner_length, INNER: tl.constexpr, HAS_LENGTH: tl.constexpr, ID_CODE: tl.constexpr, NEGATIVE_CODE: tl.constexpr,
    OVER_CODE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row `program` of ids: those in front of its length are in [low, high), and the length is in [0, capacity]."""
    row = tl.program_id(0)
    outer, inner = row // INNER, row % INNER
    count = columns
    if HAS_LENGTH:
        length = tl.load(lengths + outer.to(tl.int64) * outer_length + inner * inner_length)
        if length < 0:
            _keep(record, NEGATIVE_CODE, outer, inner, length, capacity)
        if length > capacity:
            _keep(record, OVER_CODE, outer, inner, length, capacity)
        inside = tl.minimum(tl.maximum(length, 0), capacity)
        count = inside // unit + (inside % unit != 0).to(tl.int32)
    first = ids + outer.to(tl.int64) * outer_stride + inner.to(tl.int64) * inner_stride
    for begin in range(0, count, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        value = tl.load(first + column.to(tl.int64) * id_stride, mask=column < count, other=0)
        is_bad = (column < count) & ((value < low) | (value >= high))
        place = tl.min(tl.where(is_bad, column, 2147483647), 0)
        if place != 2147483647:
            _keep(record, ID_CODE, row, place, tl.sum(tl.where(column == place, value, 0), 0), high)


@triton.jit
def offsets_kernel(offsets, record, count, stride, total, CODE: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets rise from 0 to total."""
    for begin in range(0, count, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        value = tl.load(offsets + place.to(tl.int64) * stride, mask=place < count, other=0)
        before = tl.load(offsets + (place - 1).to(tl.int64) * stride, mask=(place > 0) & (place < count), other=0)
        is_bad = (value < before) | (value > total) | ((place == 0) & (value != 0))
        is_bad = (place < count) & (is_bad | ((place == count - 1) & (value != total)))
        first = tl.min(tl.where(is_bad, place, 2147483647), 0)
        if first != 2147483647:
            _keep(record, CODE, first, 0, tl.sum(tl.where(place == first, value, 0), 0), total)


def _ids(
    record: torch.Tensor, name: str, ids: torch.Tensor, lengths: torch.Tensor | None, length_names: tuple[str, str],
    low: int, high: int, capacity: int, unit: int,
) -> None:  # fmt: skip
    """Launch for ids of two or three dimensions; lengths have one or as many as ids have rows."""
    inner = ids.shape[1] if ids.dim() == 3 else 1
    rows = ids.shape[0] * inner
    if not rows:
        return
    given = ids if lengths is None else lengths
    ids_kernel[(rows,)](
        ids, given, record, ids.shape[-1], low, min(high, MAX_INT32), min(capacity, MAX_INT32), unit, ids.stride(0),
        ids.stride(1) if ids.dim() == 3 else 0, ids.stride(-1), given.stride(0),
        given.stride(1) if lengths is not None and lengths.dim() == 2 else 0, INNER=inner, HAS_LENGTH=lengths is not None,
        ID_CODE=CODES.index(name) + 1, NEGATIVE_CODE=CODES.index(length_names[0]) + 1,
        OVER_CODE=CODES.index(length_names[1]) + 1, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


def _offsets(record: torch.Tensor, name: str, offsets: torch.Tensor, total: int) -> None:
    offsets_kernel[(1,)](
        offsets,
        record,
        offsets.shape[0],
        offsets.stride(0),
        total,
        CODE=CODES.index(name) + 1,
        BLOCK=BLOCK,
        num_warps=4,
    )


def check(problem: Any, operands: Any, record: torch.Tensor) -> None:
    """Launch the checks of one call on the current stream; capture-safe, does not wait.

    Args:
        problem: the Problem of the call.
        operands: its operands.
        record: int32 [8] on the device of the operands, 0 where nothing was found yet.
    """
    o = operands
    if problem.op == "decode":
        capacity = problem.max_pages * problem.page_size
        _ids(
            record, "block_table", o.block_table, o.cache_seqlens, ("cache_seqlens<", "cache_seqlens>"), 0,
            problem.num_pages, capacity, problem.page_size,
        )  # fmt: skip
        if o.cu_seqlens_q is not None:
            _offsets(record, "cu_seqlens_q", o.cu_seqlens_q, problem.total_q)
    elif problem.op == "prefill":
        _offsets(record, "cu_seqlens_q", o.cu_seqlens_q, problem.total_q)
        _offsets(record, "cu_seqlens_k", o.cu_seqlens_k, problem.total_k)
    elif problem.op == "append":
        _ids(record, "slots", o.slots[None], None, ("slots", "slots"), -1, problem.num_pages * problem.page_size, 0, 1)
    else:
        slots = problem.s_kv if problem.op == "sparse_prefill" else problem.num_pages * problem.page_size
        _selected(record, "", o.indices, o.topk_length, slots)
        extra = getattr(problem, "extra", None)
        if extra is not None:
            _selected(record, "extra_", o.extra_indices, o.extra_topk_length, extra.num_pages * extra.page_size)


def _selected(
    record: torch.Tensor, prefix: str, indices: torch.Tensor, length: torch.Tensor | None, slots: int
) -> None:
    topk, name = indices.shape[-1], f"{prefix}topk_length"
    _ids(record, f"{prefix}indices", indices, length, (name, name), -1, slots, topk, 1)
