"""A submission that passes; it asks the library, as the task's command does."""

import dataclasses
from typing import Any

import torch

import openmla
from openmla.backends import typical_problem
from openmla.core.layout import kv_layout


def _asked(target: str = "h100_sxm", **changes: Any) -> openmla.backends.Explanation:
    return openmla.explain(dataclasses.replace(typical_problem("decode"), **changes), target=target)


def _kernel(found: openmla.backends.Explanation) -> str:
    chosen = found.chosen
    assert chosen is not None
    return f"{chosen.backend}/{chosen.kernel}"


_FP32: dict[str, Any] = {"h_q": 16, "dtype": torch.float32, "layout": kv_layout("fp32_576")}
kernels = {
    "16 heads": _kernel(_asked(h_q=16)),
    "128 heads": _kernel(_asked(h_q=128)),
    "fp32": _kernel(_asked(**_FP32)),
    "an A100": _kernel(_asked("a100_sxm", h_q=16)),
}
why_not_fp32 = next(
    row.verdict.reasons[0]
    for row in _asked(**_FP32).candidates
    if row.kernel == "decode_dense" and row.backend == "cute"
)
