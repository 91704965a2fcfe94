"""Results of a bench as text of at most 100 columns."""

from __future__ import annotations

import textwrap

from openmla.lab.runner import CaseResult
from openmla.lab.store import Row

_WIDTH = 100


def case_table(result: CaseResult) -> str:
    """One line per contender, fastest first; those without a number last, with their reason."""
    lines = [result.case.name]
    ours = [row for row in result.rows if row.kind == "backend"]
    names = [row.who for row in result.rows] + [each.who for each in (*result.wrong, *result.refusals)]
    width = max([10, *map(len, names)])
    if result.rows:
        lines.append(
            f"  {'':<{width}} {'median us':>10} {'p20':>10} {'p80':>10} {'TFLOP/s':>8} {'GB/s':>7} {'gemm':>5} {'read':>5}"
            + "".join(f" {'x ' + row.who:>8}" for row in ours)
        )
    for row in sorted(result.rows, key=lambda row: row.median_us):
        speed = "".join(_speed(row, own) for own in ours)
        lines.append(
            f"  {row.who:<{width}} {_us(row.median_us)} {_us(row.p20_us)} {_us(row.p80_us)} {row.tflops:>8.3g} "
            f"{row.gbps:>7.4g} {row.fraction_gemm:>5.0%} {row.fraction_read:>5.0%}{speed}"
        )
    for each in result.wrong:
        lines += _wrapped(each.who.ljust(width), f"NO NUMBER, {each.reason}")
    for each in result.refusals:
        lines += _wrapped(each.who.ljust(width), f"not run: {each.reason}")
    return "\n".join(lines)


def _us(value: float) -> str:
    return f"{value:>10.1f}" if value < 1e5 else f"{value:>10.0f}"


def _speed(row: Row, own: Row) -> str:
    """How many times as fast as `row` our own one is."""
    if row.who == own.who:
        return f" {'1':>8}"
    ratio = own.ratio.get(row.who)
    if ratio is None:
        return f" {'':>8}"
    return f" {ratio:>8.2f}" if ratio >= 0.1 else f" {ratio:>8.2g}"


def _wrapped(who: str, text: str) -> list[str]:
    head = f"  {who} "
    return textwrap.wrap(text, _WIDTH, initial_indent=head, subsequent_indent=" " * len(head))
