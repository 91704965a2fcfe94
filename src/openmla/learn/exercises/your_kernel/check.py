"""The hostile cases of the test suite through `openmla.decode` with the learner's kernel in front; then the bytes."""

from typing import Any

import torch

import openmla
from openmla import backends
from openmla.core.problem import DecodeProblem
from openmla.core.target import Target
from openmla.learn.course import Hint
from openmla.learn.traffic import count
from openmla.testing import budget
from openmla.testing.cases import Case, draw, native_arguments

_SEEDS, _LEAST, _BAR = 200, 25, 6.0
_HINTS = {
    "NONFINITE": "0 * NaN is NaN: what lies behind the end must not be multiplied, and an empty row is 0 with lse -inf",
    "CONTRACT": "shapes and dtypes are those of `operands`",
    "LSE": "the logarithm of the sum of exponentials, in fp32, natural; the sink does not change it",
    "HARD": "is a head, a page or the sink mixed up? Weights and sums belong in fp32",
    "RMS": "the error is too even for rounding: is something averaged or left out?",
}


def _problem(operands: dict[str, Any]) -> DecodeProblem:
    given = native_arguments("decode", operands)
    names = ("d_v", "is_causal", "window", "cu_seqlens_q", "max_seqlen_q", "attn_sink", "softmax_scale")
    options = {name: given[name] for name in names if name in given}
    tensors = (given[name] for name in ("q", "kv_cache", "block_table", "cache_seqlens"))
    return DecodeProblem.from_tensors(*tensors, layout=given.get("kv_layout"), **options)


def _passed(case: Case, kernel: Any) -> bool:
    """Whether the kernel takes the case; raises Hint where it is wrong."""
    operands = case.tensors()
    if not kernel.supports(_problem(operands), Target.detect("cpu")):
        return False
    try:
        out, lse, _ = case.run(operands=operands)
    except IndexError as error:
        raise Hint(
            f"seed {case.seed}: a page id outside the cache reached an index ({error}); its tokens are absent"
        ) from error
    openmla.check_errors()
    report = budget.check(out, lse, case.golden(operands), dtype=case.dtype)
    if not report.passed:
        raise Hint(f"seed {case.seed}: {_HINTS.get(report.broken[0], '')}.\n{report}\n  {case}")
    return True


def check(work: Any) -> str:
    """Coverage and correctness first, then the bar."""
    backends.extend("decode", work.MINE)
    taken = sum(_passed(draw(seed, "decode"), work.MINE) for seed in range(_SEEDS))
    if taken < _LEAST:
        raise Hint(
            f"right on all {taken} cases that it supports, but {_LEAST} of {_SEEDS} are asked for: which does `supports` refuse?"
        )
    torch.manual_seed(0)
    q, cache = torch.randn(2, 1, 16, 576), torch.randn(64, 64, 1, 576)
    table, lengths = torch.randperm(64).int().view(2, 32), torch.tensor([900, 70], dtype=torch.int32)
    with count() as moved:
        out, _ = openmla.decode(q, cache, table, lengths)
    ratio = moved.bytes / (970 * 576 * 4 + q.nbytes + out.nbytes)
    if ratio > _BAR:
        raise Hint(
            f"right on {taken} cases, but {ratio:.1f} times the least bytes (the bar is {_BAR:g}); the largest is {moved.largest}"
        )
    return f"right on {taken} hostile cases, {ratio:.1f} times the least bytes (the bar is {_BAR:g})"
