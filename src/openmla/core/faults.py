"""Faults: bad values inside tensors, found while a kernel runs. They are masked, and reported here.

Every device has one *fault word*, an int32 tensor that kernels OR bits into. Reading it costs a copy from the
device, so nobody reads it on the hot path; `check_errors()` does, and clears it.
"""

from __future__ import annotations

import enum
import threading
from dataclasses import dataclass

import torch

from openmla.core import incidents


class Fault(enum.IntFlag):
    """What was found. The value is the bit in the fault word."""

    PAGE_OUT_OF_RANGE = 1
    LENGTH_NEGATIVE = 2
    LENGTH_OVER_CAPACITY = 4
    INDEX_OUT_OF_RANGE = 8
    TOPK_LENGTH_OUT_OF_RANGE = 16
    CU_SEQLENS_NOT_MONOTONE = 32
    PLAN_STALE = 64


MEANING: dict[Fault, str] = {
    Fault.PAGE_OUT_OF_RANGE: "block_table holds a page id outside [0, num_pages) for an attended token; "
    "that page's tokens were treated as absent",
    Fault.LENGTH_NEGATIVE: "cache_seqlens holds a negative length; it was treated as 0",
    Fault.LENGTH_OVER_CAPACITY: "cache_seqlens exceeds max_pages * page_size; it was cut to that capacity",
    Fault.INDEX_OUT_OF_RANGE: "indices hold a value that is neither -1 nor a slot of the cache; it was treated as -1",
    Fault.TOPK_LENGTH_OUT_OF_RANGE: "topk_length holds a value outside [0, topk]; it was clamped",
    Fault.CU_SEQLENS_NOT_MONOTONE: "cu_seqlens does not rise from 0 to the number of tokens; it was clamped",
    Fault.PLAN_STALE: "the plan was made for other lengths; a new one was made for this call",
}


@dataclass(frozen=True)
class Finding:
    """One bad value, found by OPENMLA_CHECKS=device or strict."""

    op: str
    fault: Fault
    tensor: str
    place: tuple[int, ...]
    value: int
    rule: str
    count: int = 1  # bad values in that tensor, where they were counted

    def __str__(self) -> str:
        more = f" (and {self.count - 1} more)" if self.count > 1 else ""
        where = ", ".join(map(str, self.place))
        return f"{self.tensor}[{where}] = {self.value}{more}: {self.rule}; {MEANING[self.fault]}"


# What a kernel can write into a record, in order of its code - 1; `<` and `>` say which end of the range was left.
CODES = (
    "block_table", "cache_seqlens<", "cache_seqlens>", "cu_seqlens_q", "cu_seqlens_k", "indices", "topk_length",
    "extra_indices", "extra_topk_length", "slots",
)  # fmt: skip
_CODED: dict[str, tuple[Fault, str]] = {
    "block_table": (Fault.PAGE_OUT_OF_RANGE, "a page id is in [0, {limit})"),
    "cache_seqlens<": (Fault.LENGTH_NEGATIVE, "a length is in [0, {limit}]"),
    "cache_seqlens>": (Fault.LENGTH_OVER_CAPACITY, "a length is in [0, {limit}]"),
    "cu_seqlens_q": (Fault.CU_SEQLENS_NOT_MONOTONE, "offsets rise from 0 to {limit}"),
    "cu_seqlens_k": (Fault.CU_SEQLENS_NOT_MONOTONE, "offsets rise from 0 to {limit}"),
    "indices": (Fault.INDEX_OUT_OF_RANGE, "an index is -1 or in [0, {limit})"),
    "topk_length": (Fault.TOPK_LENGTH_OUT_OF_RANGE, "a topk_length is in [0, {limit}]"),
    "extra_indices": (Fault.INDEX_OUT_OF_RANGE, "an index is -1 or in [0, {limit})"),
    "extra_topk_length": (Fault.TOPK_LENGTH_OUT_OF_RANGE, "a topk_length is in [0, {limit}]"),
    "slots": (Fault.INDEX_OUT_OF_RANGE, "a slot is -1 or in [0, {limit})"),
}
_ONE_DIMENSION = ("cache_seqlens<", "cache_seqlens>", "cu_seqlens_q", "cu_seqlens_k")
_MAX_FINDINGS = 64  # kept per process; the counters go on

_words: dict[torch.device, torch.Tensor] = {}
_records: dict[torch.device, torch.Tensor] = {}
_findings: list[Finding] = []
_lock = threading.Lock()


def fault_word(device: torch.device) -> torch.Tensor:
    """The int32 [1] tensor of that device; made on first use, never replaced, so a CUDA graph may hold it."""
    word = _words.get(device)
    if word is None:
        with _lock:
            word = _words.setdefault(device, _new_word(device))
    return word


def _new_word(device: torch.device) -> torch.Tensor:
    # A tensor made under inference_mode may not be written outside of it, and this one outlives the mode.
    with torch.inference_mode(False):
        return torch.zeros(1, dtype=torch.int32, device=device)


def report(device: torch.device, fault: Fault) -> None:
    """OR `fault` into the word of a CPU device (kernels on a GPU write their word themselves)."""
    with _lock:
        word = _words.setdefault(device, _new_word(device))
        word |= int(fault)


def check_errors(device: torch.device | str | None = None) -> tuple[Fault, ...]:
    """The faults since the last call, on one device or on all; clears them. Waits for the device.

    Returns:
        One `Fault` per kind that occurred, in order of value; empty when all was well. `MEANING` says in words
        what each is and what was done about it.
    """
    wanted = list(_words) if device is None else [_exact(torch.device(device))]
    bits = 0
    with _lock:
        for each in wanted:
            word = _words.get(each)
            if word is not None:
                bits |= int(word.item())
                word.zero_()
            kept = _records.get(each)
            code, *rest = kept.tolist() if kept is not None else (0,)
            if kept is not None and code:
                _keep(_decoded(code, rest))
                kept.zero_()
    found = tuple(fault for fault in Fault if bits & fault)
    for fault in found:
        incidents.note("bad_value", (fault.name or "").lower(), MEANING[fault])
    return found


def _exact(device: torch.device) -> torch.device:
    """With the number of the card: "cuda" is the current one, and tensors say which."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def record(device: torch.device) -> torch.Tensor:
    """The int32 [8] tensor that the value check of that device writes one finding into; as lasting as the fault word."""
    found = _records.get(device)
    if found is None:
        with _lock, torch.inference_mode(False):
            found = _records.setdefault(device, torch.zeros(8, dtype=torch.int32, device=device))
            _words.setdefault(device, torch.zeros(1, dtype=torch.int32, device=device))
    return found


def _decoded(code: int, rest: list[int]) -> Finding:
    """The finding behind a record: code, row, column, value, limit."""
    name = CODES[code - 1]
    fault, rule = _CODED[name]
    row, column, value, limit = rest[:4]
    op = "decode or prefill" if "seqlens" in name or name == "block_table" else "sparse_decode or sparse_prefill"
    place = (row,) if name in _ONE_DIMENSION else (row, column)
    if name == "slots":
        op, place = "append", (column,)
    return Finding(op, fault, name.rstrip("<>"), place, value, rule.format(limit=limit))


def _keep(finding: Finding) -> None:
    if len(_findings) < _MAX_FINDINGS:
        _findings.append(finding)


def remember(finding: Finding) -> None:
    """Keep a finding for `findings()`."""
    with _lock:
        _keep(finding)


def findings() -> tuple[Finding, ...]:
    """The bad values that were found and named since the last call, oldest first; forgets them.

    Found with OPENMLA_CHECKS=device, at most 64; on a GPU one for each call of `check_errors`, which reads the record.
    `row` counts the rows of all leading dimensions: token 1 of request 2 with s_q = 4 is row 9.
    """
    with _lock:
        found = tuple(_findings)
        _findings.clear()
    return found
