"""Asks `openmla.explain` itself, so that the answers are those of the installed version."""

import dataclasses
from typing import Any

import torch

import openmla
from openmla.backends import typical_problem
from openmla.core.layout import kv_layout
from openmla.learn.course import Hint

_FP32: dict[str, Any] = {"h_q": 16, "dtype": torch.float32, "layout": kv_layout("fp32_576")}
_CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "16 heads": ("h100_sxm", {"h_q": 16}),
    "128 heads": ("h100_sxm", {"h_q": 128}),
    "fp32": ("h100_sxm", _FP32),
    "an A100": ("a100_sxm", {"h_q": 16}),
}


def check(work: Any) -> str:
    """Each call, then the reason."""
    for name, (target, changes) in _CALLS.items():
        found = openmla.explain(dataclasses.replace(typical_problem("decode"), **changes), target=target)
        given, rows = work.kernels.get(name), {f"{row.backend}/{row.kernel}": row for row in found.candidates}
        if given is None:
            raise Hint(f"{name}: still None; explain marks the one that runs with ->")
        if given not in rows:
            raise Hint(f"{name}: there is no {given!r}; the candidates are {', '.join(rows)}")
        if not rows[given].is_chosen:
            why = (
                "; ".join(rows[given].verdict.reasons)
                or "could run, but the table is ordered and another stands before it"
            )
            raise Hint(f"{name}: {given} {'does not run: ' if rows[given].verdict.reasons else ''}{why}")
    if not work.why_not_fp32:
        raise Hint("why_not_fp32 is still None")
    asked = openmla.explain(dataclasses.replace(typical_problem("decode"), **_FP32), target="h100_sxm")
    reasons = [
        each
        for row in asked.candidates
        if (row.backend, row.kernel) == ("cute", "decode_dense")
        for each in row.verdict.reasons
    ]
    if not any(work.why_not_fp32.strip().lower() in each.lower() and len(work.why_not_fp32) > 3 for each in reasons):
        raise Hint(
            f"why_not_fp32: {work.why_not_fp32!r} stands in none of the {len(reasons)} reasons; copy words from one"
        )
    return "a refusal is a value: the same reasons come back from openmla.explain, in the log, and in UnsupportedError"
