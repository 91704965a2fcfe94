"""The tolerance rule: one function, against the fp64 oracle, with no tuned `atol`.

For a row over n keys with logits s_j = softmax_scale * <q, k_j>, weights p = softmax(s), golden output g:

    A = sum p|v|   B = sum p^2 v^2   V1 = sum |v|   V2 = sum v^2       per column d of v
    S = max_j |softmax_scale| * sum_i |q_i||k_ji|     L = sum_j exp(s_j - max s)
    U = 2^-8 bf16, 2^-11 fp16, 2^-18 fp32             eta = half of the dtype's smallest subnormal
    delta = 64 * 2^-24 * S + 2^-20                    a logit: fp32 dot product of 576 terms, approximate exp2

    HARD       |o - g| <= 1.01 U|g| + (1.02 U + 2 delta + sqrt(n) 2^-22) A + 2 eta (1 + V1 / L)
    RMS        rms_d(o - g) <= 1.5 (sqrt(mean_d(U^2 (g^2 + B) + eta^2 (1 + V2 / L^2))) + 2 delta rms_d(A))
    LSE        |lse_o - lse| <= delta + 2^-22 |lse| + 2^-20
    MAXL       |max_logits_o - max s| <= delta
    NONFINITE  NaN, +inf and -inf stand at exactly the same places
    CONTRACT   shape and dtype are those of the operation

HARD is derived: rounding of the output, of the weights, error of a logit. RMS sees what is too even for HARD: a long
flat row has B about n times smaller than A^2. LSE never sees a rounded weight, so it is the sharpest of all.

Queries in e4m3 (`dtype=torch.float8_e4m3fn`; out is bf16) are multiplied by FP8 tensor cores, which cut each product off some
13 bits below the largest number of a sum of 32, and keep the sum so. Then
    delta = 2^-7 S + 2^-20     18 sums of 32 columns; 0.8 of it seen on an H200, with products of one sign
    U     = 2^-8               weights are two e4m3 numbers: 2^-4 of what the first leaves over, which is 2^-4
    HARD and RMS               + (2^-18 V1 / L): the smallest step of a weight, and + 2^-11 A: sums of 64 keys, cut off

An fp32 kernel rounds no weights, so the error of its sums is all there is: its U is 64 units of 2^-24. A key that is
listed a hundred times adds the same number a hundred times, and every addition rounds the same way: 98 units seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from openmla.core.errors import ProblemError
from openmla.reference.attention import Attention, Bounds

RULES = ("CONTRACT", "NONFINITE", "HARD", "RMS", "LSE", "MAXL")

# A random walk of 576 roundings is 24 units. Tensor cores cut off instead of rounding, so that products of one sign err
# on one side: 41 units seen on an H100 (512 products, fp16 operands, a query that points along its key).
_LOGIT_UNITS = 64


@dataclass(frozen=True)
class _Rounding:
    """What the arithmetic for queries of a dtype may do."""

    unit: float  # roundoff of out and weights
    eta: float  # half of the smallest subnormal of out
    logit: float = _LOGIT_UNITS * 2.0**-24  # of S
    step: float = 0.0  # half of the smallest step of a weight, of the row's largest
    sums: float = 0.0  # of A: what tensor cores cut off


_ROUNDING: dict[torch.dtype, _Rounding] = {
    torch.bfloat16: _Rounding(2.0**-8, 2.0**-134),
    torch.float16: _Rounding(2.0**-11, 2.0**-25),
    torch.float32: _Rounding(2.0**-18, 2.0**-150),
    torch.float8_e4m3fn: _Rounding(2.0**-8, 2.0**-134, logit=2.0**-7, step=2.0**-18, sums=2.0**-11),
}


@dataclass(frozen=True)
class Finding:
    """The worst place of one rule. ratio = error / limit; above 1 breaks the rule, inf where no number says how far."""

    rule: str
    ratio: float
    sentence: str

    @property
    def holds(self) -> bool:
        """True when the rule is kept."""
        return self.ratio <= 1.0


@dataclass(frozen=True)
class Report:
    """One finding per rule that was checked, in the order of RULES."""

    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """True when every rule is kept."""
        return all(finding.holds for finding in self.findings)

    @property
    def broken(self) -> tuple[str, ...]:
        """Names of the broken rules."""
        return tuple(finding.rule for finding in self.findings if not finding.holds)

    def ratio(self, rule: str) -> float:
        """Worst error / limit under one rule; 0 where the rule had nothing to check."""
        return max((finding.ratio for finding in self.findings if finding.rule == rule), default=0.0)

    def require(self, context: str = "") -> None:
        """Raises AssertionError with every broken rule; `context` says what was run and how to run it again."""
        if not self.passed:
            raise AssertionError(f"{context}\n{self}" if context else str(self))

    def __str__(self) -> str:
        lines = [
            f"  {'ok  ' if finding.holds else 'FAIL'} {finding.rule}: {finding.sentence}" for finding in self.findings
        ]
        return "\n".join(["within tolerance" if self.passed else "outside tolerance", *lines])


def check(
    out: torch.Tensor,
    lse: torch.Tensor | None,
    golden: Attention,
    *,
    dtype: torch.dtype,
    max_logits: torch.Tensor | None = None,
) -> Report:
    """Judge a result against the fp64 oracle.

    Args:
        out: shape of golden.out, bf16|fp16|fp32.
        lse: shape of golden.lse, fp32, natural log, -inf for empty rows. None when the operation returned none.
        golden: from `openmla.reference.attention` with precision="fp64", with_bounds=True, on the rounded inputs.
        dtype: the dtype that the operation promises for out.
        max_logits: shape of golden.lse, fp32, for the operations that return it.

    Raises:
        ProblemError: golden has no bounds, or no rounding is known for dtype.
    """
    if golden.bounds is None:
        raise ProblemError("check", ["golden must carry bounds; compute it with precision='fp64', with_bounds=True"])
    if dtype not in _ROUNDING:
        raise ProblemError("check", [f"dtype must be bf16, fp16, fp32 or e4m3, got {dtype}"])
    wanted = torch.bfloat16 if dtype == torch.float8_e4m3fn else dtype
    broken = list(_contract(out, lse, golden, wanted, max_logits))
    if broken:
        return Report((Finding("CONTRACT", torch.inf, "; ".join(broken)),))
    findings = [Finding("CONTRACT", 0.0, "shapes and dtypes as promised")]
    findings.append(_nonfinite(out, lse, golden, max_logits))
    bounds, rounding = golden.bounds, _ROUNDING[dtype]
    delta = rounding.logit * bounds.S + 2.0**-20
    findings.append(_hard(out.double(), golden, bounds, delta, rounding))
    findings.append(_rms(out.double(), golden, bounds, delta, rounding))
    if lse is not None:
        limit = delta + 2.0**-22 * golden.lse.abs() + 2.0**-20
        findings.append(_compare("LSE", "lse", lse.double(), golden.lse, limit))
    if max_logits is not None:
        findings.append(_compare("MAXL", "max_logits", max_logits.double(), golden.max_logits, delta))
    return Report(tuple(findings))


def _contract(
    out: torch.Tensor,
    lse: torch.Tensor | None,
    golden: Attention,
    dtype: torch.dtype,
    max_logits: torch.Tensor | None,
) -> Iterator[str]:
    """One sentence per broken promise about shape or dtype."""
    if out.shape != golden.out.shape or out.dtype != dtype:
        yield f"out must be {tuple(golden.out.shape)} {dtype}, got {tuple(out.shape)} {out.dtype}"
    for name, value in (("lse", lse), ("max_logits", max_logits)):
        if value is not None and (value.shape != golden.lse.shape or value.dtype != torch.float32):
            yield f"{name} must be {tuple(golden.lse.shape)} fp32, got {tuple(value.shape)} {value.dtype}"


def _nonfinite(
    out: torch.Tensor, lse: torch.Tensor | None, golden: Attention, max_logits: torch.Tensor | None
) -> Finding:
    pairs = [("out", out, golden.out), ("lse", lse, golden.lse), ("max_logits", max_logits, golden.max_logits)]
    kinds = (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf))
    compared = [
        (name, kind, got, want, test(got) != test(want))
        for name, got, want in pairs
        if got is not None
        for kind, test in kinds
    ]
    counts = torch.stack([differs.sum() for *_, differs in compared]).tolist()  # a GPU is waited for once
    wrong = []
    for (name, kind, got, want, differs), count in zip(compared, counts, strict=True):
        if count:
            place = tuple(differs.nonzero()[0].tolist())
            wrong.append(
                f"{name}{list(place)} = {float(got[place])!r}, want {float(want[place])!r}; "
                f"{count} of {differs.numel()} places differ in {kind}"
            )
    return Finding("NONFINITE", torch.inf if wrong else 0.0, "; ".join(wrong) or "at the same places")


def _hard(out: torch.Tensor, golden: Attention, bounds: Bounds, delta: torch.Tensor, rounding: _Rounding) -> Finding:
    unit, eta = rounding.unit, rounding.eta
    total = golden.rows(bounds.L)[..., None]
    spread = bounds.V1 / total.masked_fill(total == 0, 1)
    per_weight = (
        1.02 * unit
        + rounding.sums
        + 2 * golden.rows(delta)[..., None]
        + golden.rows(bounds.n)[..., None].sqrt() * 2.0**-22
    )
    limit = 1.01 * unit * golden.out.abs() + per_weight * bounds.A + 2 * eta * (1 + spread) + rounding.step * spread
    return _compare("HARD", "out", out, golden.out, limit)


def _rms(out: torch.Tensor, golden: Attention, bounds: Bounds, delta: torch.Tensor, rounding: _Rounding) -> Finding:
    unit, eta, step = rounding.unit, rounding.eta, rounding.step
    total = golden.rows(bounds.L)
    spread = bounds.V2 / total.masked_fill(total == 0, 1).square()[..., None]
    variance = unit**2 * (golden.out.square() + bounds.B) + eta**2 * (1 + spread) + step**2 * spread
    shift = 2 * golden.rows(delta) + rounding.sums
    limit = 1.5 * (variance.mean(-1).sqrt() + shift * bounds.A.square().mean(-1).sqrt())
    # A row with a non-finite element is judged by NONFINITE and HARD.
    error = (out - golden.out).square().mean(-1).sqrt()
    return _compare("RMS", "row of out", error, torch.zeros_like(error), limit)


def _compare(rule: str, name: str, got: torch.Tensor, want: torch.Tensor, limit: torch.Tensor) -> Finding:
    """The worst ratio of |got - want| to limit, over places where both are finite."""
    comparable = got.isfinite() & want.isfinite()
    if not comparable.numel():
        return Finding(rule, 0.0, "nothing to compare")
    # A limit that is not finite belongs to an infinite key of weight 0: nothing can be said there.
    limit = limit.nan_to_num(nan=torch.inf, posinf=torch.inf)
    ratios = ((got - want).abs() / limit).masked_fill(~comparable, -1.0)
    at = ratios.argmax()
    worst = [tensor.flatten()[at].double() for tensor in (ratios, got, want, limit)]
    numbers = torch.stack([*worst, (ratios > 1).sum().double(), comparable.sum().double(), at.double()])
    ratio, mine, right, allowed, count, total, index = numbers.tolist()  # a GPU is waited for once
    if not total:
        return Finding(rule, 0.0, "nothing to compare")
    place = [int(x) for x in torch.unravel_index(torch.tensor(int(index)), ratios.shape)]
    return Finding(
        rule,
        ratio,
        f"{name}{place} = {mine:.9g}, want {right:.9g}, error {abs(mine - right):.3g}, limit {allowed:.3g}, "
        f"ratio {ratio:.3g}; {int(count)} of {int(total)} break the rule",
    )
