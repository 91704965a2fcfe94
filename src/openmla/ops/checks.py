"""Values inside tensors: the checks of OPENMLA_CHECKS=device and strict, in words that name the culprit.

Kernels guard themselves in every mode: a bad page, index or length is masked and sets a bit of the fault word. What a
bit cannot say is *which* value it was. Here every id and length is looked at before the launch, and the first bad one
of each tensor becomes a `Finding` with its tensor, row, column and value.

device   On a GPU one more kernel per call, which may be captured into a CUDA graph; nothing waits. The finding is noted
         when somebody calls `openmla.check_errors()`; `core.faults.findings()` says it. On a CPU the search runs at once.
strict   Waits for the device first, so that an error of an earlier kernel is not blamed on this call; searches; raises
         ProblemError before the launch; and after the launch raises for anything that the kernel itself reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch

from openmla.backends import value_kernel
from openmla.core import faults, incidents
from openmla.core.errors import ProblemError
from openmla.core.faults import Fault, Finding
from openmla.ops import recovery


def before_launch(problem: Any, operands: Any, mode: str) -> None:
    """Look at the values that a launch will trust.

    Raises:
        ProblemError: with mode strict, one sentence per bad tensor.
        DeviceLostError: with mode strict, when the device was lost before this call.
    """
    device = operands.out.device
    if mode == "strict":
        _settle(device)
    elif device.type == "cuda":
        check = value_kernel()
        if check is None:
            incidents.note("backend_unavailable", "checks/device", "OPENMLA_CHECKS=device on a GPU needs Triton")
        else:
            check(problem, operands, faults.record(device))
        return
    found = list(search(problem, operands))
    if found and mode == "strict":
        raise ProblemError(problem.op, [str(each) for each in found])
    for each in found:
        faults.remember(each)


def after_launch(problem: Any, operands: Any) -> None:
    """Wait, note rows that are NaN, and raise for what the kernel itself reported.

    Raises:
        ProblemError: a bit of the fault word is set.
    """
    if problem.op != "append":  # which stores what it is given
        rows = int(operands.lse.isnan().sum())
        if rows:
            incidents.note("nonfinite_rows", problem.op, f"{rows} of {operands.lse.numel()} rows are NaN")
    found = faults.check_errors(operands.out.device)
    if found:
        raise ProblemError(problem.op, [faults.MEANING[fault] for fault in found])


def _settle(device: torch.device) -> None:
    """Wait for what was launched before, and blame nothing of it on this call: a failure is said to be an earlier one,
    bits that earlier calls left in the fault word are noted as incidents and cleared.
    """
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            raise recovery.lose(
                str(device),
                f"{recovery.first_line(error)}; it was there before this call, so an earlier kernel caused it",
            ) from error
    faults.check_errors(device)


def search(problem: Any, operands: Any) -> Iterator[Finding]:
    """The first bad value of every tensor of ids or lengths; waits for a GPU.

    Args:
        problem: the Problem of the call.
        operands: its operands.
    """
    return _SEARCHES[problem.op](problem, operands)


def _first(
    op: str, fault: Fault, name: str, tensor: torch.Tensor, is_bad: torch.Tensor, rule: str
) -> Iterator[Finding]:
    """A finding for the first True of `is_bad`, which has the shape of `tensor`."""
    if not bool(is_bad.any()):
        return
    place = tuple(int(i) for i in is_bad.nonzero()[0])
    yield Finding(op, fault, name, place, int(tensor[place]), rule, int(is_bad.sum()))


def _lengths(op: str, name: str, lengths: torch.Tensor, capacity: int) -> Iterator[Finding]:
    rule = f"a length is in [0, {capacity}]"
    if lengths.numel() and int(lengths.min()) < 0:
        yield from _first(op, Fault.LENGTH_NEGATIVE, name, lengths, lengths < 0, rule)
    if lengths.numel() and int(lengths.max()) > capacity:
        yield from _first(op, Fault.LENGTH_OVER_CAPACITY, name, lengths, lengths > capacity, rule)


def _offsets(op: str, name: str, offsets: torch.Tensor, total: int) -> Iterator[Finding]:
    if not offsets.numel():
        return
    before = torch.cat([offsets.new_zeros(1), offsets[:-1]])
    is_bad = (offsets < before) | (offsets > total)
    is_bad[0] |= offsets[0] != 0
    is_bad[-1] |= offsets[-1] != total
    yield from _first(op, Fault.CU_SEQLENS_NOT_MONOTONE, name, offsets, is_bad, f"offsets rise from 0 to {total}")


def _decode(problem: Any, operands: Any) -> Iterator[Finding]:
    size, table = problem.page_size, operands.block_table
    capacity = problem.max_pages * size
    yield from _lengths("decode", "cache_seqlens", operands.cache_seqlens, capacity)
    if operands.cu_seqlens_q is not None:
        yield from _offsets("decode", "cu_seqlens_q", operands.cu_seqlens_q, problem.total_q)
    if not table.numel() or (int(table.min()) >= 0 and int(table.max()) < problem.num_pages):
        return
    used = (operands.cache_seqlens.clamp(0, capacity) + (size - 1)) // size
    reached = torch.arange(problem.max_pages, device=table.device) < used[:, None]
    is_bad = reached & ((table < 0) | (table >= problem.num_pages))
    rule = f"a page id is in [0, {problem.num_pages})"
    yield from _first("decode", Fault.PAGE_OUT_OF_RANGE, "block_table", table, is_bad, rule)


def _selected(
    op: str, prefix: str, indices: torch.Tensor, length: torch.Tensor | None, slots: int
) -> Iterator[Finding]:
    topk = indices.shape[-1]
    if length is not None:
        name = f"{prefix}topk_length"
        is_bad = (length < 0) | (length > topk)
        yield from _first(op, Fault.TOPK_LENGTH_OUT_OF_RANGE, name, length, is_bad, f"a topk_length is in [0, {topk}]")
    if not indices.numel() or (int(indices.min()) >= -1 and int(indices.max()) < slots):
        return
    is_bad = (indices < -1) | (indices >= slots)
    if length is not None:
        spread = length.clamp(0, topk)
        while (
            spread.dim() < indices.dim()
        ):  # one length per request, or per token; sparse prefill: per row, for all heads
            spread = spread.unsqueeze(-1)
        is_bad &= torch.arange(topk, device=indices.device) < spread
    rule = f"an index is -1 or in [0, {slots})"
    yield from _first(op, Fault.INDEX_OUT_OF_RANGE, f"{prefix}indices", indices, is_bad, rule)


def _sparse_decode(problem: Any, operands: Any) -> Iterator[Finding]:
    slots = problem.num_pages * problem.page_size
    yield from _selected("sparse_decode", "", operands.indices, operands.topk_length, slots)
    if operands.extra_indices is not None:
        slots = problem.extra.num_pages * problem.extra.page_size
        yield from _selected("sparse_decode", "extra_", operands.extra_indices, operands.extra_topk_length, slots)


def _sparse_prefill(problem: Any, operands: Any) -> Iterator[Finding]:
    yield from _selected("sparse_prefill", "", operands.indices, operands.topk_length, problem.s_kv)


def _prefill(problem: Any, operands: Any) -> Iterator[Finding]:
    yield from _offsets("prefill", "cu_seqlens_q", operands.cu_seqlens_q, problem.total_q)
    yield from _offsets("prefill", "cu_seqlens_k", operands.cu_seqlens_k, problem.total_k)


def _append(problem: Any, operands: Any) -> Iterator[Finding]:
    slots, count = operands.slots, problem.num_pages * problem.page_size
    rule = f"a slot is -1 or in [0, {count})"
    yield from _first("append", Fault.INDEX_OUT_OF_RANGE, "slots", slots, (slots < -1) | (slots >= count), rule)


_SEARCHES = cast(
    "dict[str, Callable[[Any, Any], Iterator[Finding]]]",
    {
        "decode": _decode, "sparse_decode": _sparse_decode, "sparse_prefill": _sparse_prefill, "prefill": _prefill,
        "append": _append,
    },
)  # fmt: skip
