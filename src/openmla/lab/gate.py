"""The gate in front of every number: the result that is about to be timed, against the fp64 oracle."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from openmla.lab.suite import Case
from openmla.lab.workload import DecodeInputs
from openmla.reference import attention
from openmla.testing import budget

# fp64 work that the gate of one case may cost: about a second on two CPU cores, a quarter of one on an H100.
_ORACLE_FLOPS = {"cpu": 4e10, "cuda": 4e12}
# The oracle passes over a request's keys about six times once the bounds of the tolerance rule are counted.
_ORACLE_PASSES = 6


@dataclass(frozen=True)
class Verdict:
    """Green or red, and why."""

    is_green: bool
    text: str


@dataclass(frozen=True, eq=False)
class Golden:
    """The oracle's answer for some whole requests of a case: computed once, held against many results."""

    chosen: list[int]
    answer: attention.Attention


def golden(case: Case, inputs: DecodeInputs) -> Golden:
    """All requests where the oracle can afford it, else longest, shortest and a spread."""
    chosen = requests(case, inputs)
    answer = attention.decode(
        inputs.q[chosen],
        inputs.kv_cache,
        inputs.block_table[chosen],
        inputs.cache_seqlens[chosen],
        softmax_scale=inputs.softmax_scale,
        d_v=case.d_v,
        layout=case.kv_layout,
        is_causal=case.is_causal,
        with_bounds=True,
    )
    return Golden(chosen, answer)


def check(
    case: Case, inputs: DecodeInputs, out: torch.Tensor | None, lse: torch.Tensor | None, known: Golden | None = None
) -> Verdict:
    """Compare whole requests with the oracle, under the tolerance rule. `known`: of the same case and inputs."""
    if out is None:
        return Verdict(False, "returned nothing")
    if tuple(out.shape) != (case.batch, case.s_q, case.h_q, case.d_v):
        return Verdict(False, f"returned out of shape {tuple(out.shape)}")
    want = known or golden(case, inputs)
    chosen = want.chosen
    report = budget.check(out[chosen], None if lse is None else lse[chosen], want.answer, dtype=case.torch_dtype)
    worst = max(report.findings, key=lambda finding: finding.ratio)
    where = f"{len(chosen)} of {case.batch} requests"
    if report.passed:
        seen = "out and lse" if lse is not None else "out"
        return Verdict(True, f"{seen} within {worst.ratio:.2f} of the tolerance ({worst.rule}), {where}")
    sentences = "; ".join(f"{each.rule}: {each.sentence}" for each in report.findings if not each.holds)
    return Verdict(False, f"outside the tolerance on {where}: {sentences}")


def requests(case: Case, inputs: DecodeInputs) -> list[int]:
    """Requests that the oracle computes, ascending."""
    passes = _ORACLE_PASSES * 2 * case.s_q * case.h_q * (case.d_qk + case.d_v)
    afford = _ORACLE_FLOPS["cuda" if inputs.device.type == "cuda" else "cpu"]
    order = sorted(range(case.batch), key=lambda request: inputs.lengths[request])
    # From both ends inwards by halves: shortest, longest, median, quartiles, ...
    ranked = dict.fromkeys([0, case.batch - 1])
    step = case.batch
    while step > 1:
        step = -(-step // 2)
        ranked.update(dict.fromkeys(range(0, case.batch, step)))
    chosen: list[int] = []
    for place in ranked:
        request = order[place]
        afford -= passes * inputs.lengths[request]
        if chosen and afford < 0:
            break
        chosen.append(request)
    return sorted(chosen)
