"""Faults: bad values inside tensors, found while a kernel runs. They are masked, and reported here.

Every device has one *fault word*, an int32 tensor that kernels OR bits into. Reading it costs a copy from the
device, so nobody reads it on the hot path; `check_errors()` does, and clears it.
"""

from __future__ import annotations

import enum
import threading

import torch


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

_words: dict[torch.device, torch.Tensor] = {}
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
    wanted = list(_words) if device is None else [torch.device(device)]
    bits = 0
    with _lock:
        for each in wanted:
            word = _words.get(each)
            if word is not None:
                bits |= int(word.item())
                word.zero_()
    return tuple(fault for fault in Fault if bits & fault)
