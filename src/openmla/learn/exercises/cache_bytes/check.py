"""Compares with `openmla.core.cost` and `core.layout`, and knows the usual ways to be wrong."""

from typing import Any

import torch

from openmla.core.cost import cost
from openmla.core.layout import kv_layout
from openmla.core.problem import DecodeProblem
from openmla.core.target import Target
from openmla.learn.course import Hint

_LAYOUT = kv_layout("bf16_576")


def _problem(h_q: int, s_q: int) -> DecodeProblem:
    return DecodeProblem(1, s_q, s_q, h_q, 1, 576, 512, torch.bfloat16, _LAYOUT, 64, 128, 128)


def _expect(name: str, given: Any, wanted: object, hints: dict[Any, str]) -> None:
    if given is None:
        raise Hint(f"{name} is still None")
    if given != wanted:
        raise Hint(f"{name} = {given!r} is not right. {hints.get(given, 'Write the factors down one by one.')}")


def check(work: Any) -> str:
    """All six, in the order of the file."""
    mla = _LAYOUT.bytes_per_token
    values_twice = "Values are the first 512 columns of the key: the same bytes, not cached a second time."
    elements = "That counts numbers; bf16 takes two bytes each."
    _expect("mla_bytes", work.mla_bytes, mla, {mla // 2: elements, 2176: values_twice, 1088: values_twice})
    one_head = "That is one head; MHA caches all 128 of them."
    _expect("mha_bytes", work.mha_bytes, 81_920, {40_960: elements, 640: one_head})
    flops = 2 * 128 * (576 + 512)
    half = "A multiply-add is two FLOPs."
    no_values = "That is the score alone; the weighted sum over 512 value columns comes on top."
    expanded = "That is expanded attention (192 and 128 columns); absorbed it is 576 and 512."
    _expect(
        "flops_per_key", work.flops_per_key, flops,
        {flops // 2: half, 2 * 128 * 576: no_values, 2 * 128 * 320: expanded, flops // 128: "That is one head."},
    )  # fmt: skip
    h100 = Target.preset("h100_sxm")
    ridge = 1e3 * h100.bf16_tflops / h100.hbm_gbps
    for name, h_q, s_q in (("limit_16_heads", 16, 1), ("limit_128_heads", 128, 1), ("limit_two_tokens", 128, 2)):
        intensity = cost(_problem(h_q, s_q)).intensity
        wanted = "arithmetic" if intensity > ridge else "memory"
        other = {"arithmetic": "memory", "memory": "arithmetic"}[wanted]
        hint = f"The call has {intensity:.0f} FLOP per byte; where does an H100 turn from one limit to the other?"
        _expect(name, getattr(work, name), wanted, {other: hint})
    return f"MHA caches {81_920 / mla:.0f} times as much, and the ridge of an H100 is at {ridge:.0f} FLOP per byte"
