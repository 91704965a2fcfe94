"""The merge law on ordinary and hostile parts, then the numbers that the kernel loads in the interpreter."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from openmla.learn.course import Hint
from openmla.split import combine

_BAR = 1.1
_D = 128


def _parts(parts: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(parts)
    return torch.randn(parts, rows, _D, generator=generator), 3 * torch.randn(parts, rows, generator=generator)


def _cases() -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    yield "three ordinary parts", *_parts(3, 4)
    yield "one part", *_parts(1, 2)
    outs, lses = _parts(4, 3)
    lses[1], lses[0, 1] = -torch.inf, -torch.inf
    yield "empty parts with finite outs (their weight is 0: is the first part's maximum -inf?)", outs, lses
    outs, lses = outs.clone(), lses.clone()
    outs[1] = torch.nan
    yield "empty parts whose out is NaN (0 * NaN is NaN: choose, do not multiply)", outs, lses
    lses = lses.clone()
    lses[:, 2] = -torch.inf
    yield "a row whose parts are all empty (out 0, lse -inf)", outs, lses
    outs, lses = _parts(3, 4)
    lses[0], lses[1] = 10_000.0, 9_999.0
    yield "lse of 10,000 (subtract the largest before exp)", outs, lses
    yield "lse of -10,000 (subtract the largest before exp)", outs, lses - 20_000.0


@contextmanager
def _loads() -> Iterator[list[int]]:
    """Elements that a kernel loads in Triton's interpreter."""
    from triton.runtime import interpreter

    builder, counted = interpreter.InterpreterBuilder, [0]
    kept = builder.create_masked_load

    def counting(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        counted[0] += int(mask.data.sum())
        return kept(self, pointers, mask, *rest)

    builder.create_masked_load = counting
    try:
        yield counted
    finally:
        builder.create_masked_load = kept


def check(work: Any) -> str:
    """Every case against `openmla.split.combine.merge`; then the bar."""
    for name, outs, lses in _cases():
        out, lse = work.merge(outs.clone(), lses.clone())
        wanted, wanted_lse = combine.merge(outs.double(), lses.double())
        if tuple(out.shape) != tuple(wanted.shape) or tuple(lse.shape) != tuple(wanted_lse.shape):
            raise Hint(f"merge must return [rows, {_D}] and [rows], got {tuple(out.shape)} and {tuple(lse.shape)}")
        if not torch.allclose(lse.double(), wanted_lse, atol=1e-4, rtol=1e-6):
            raise Hint(f"lse is wrong with {name}: {lse[0].item():.6g} in row 0, want {wanted_lse[0].item():.6g}")
        if not torch.allclose(out.double(), wanted, atol=1e-5):
            raise Hint(f"out is wrong with {name}")
    outs, lses = _parts(8, 5)
    with _loads() as counted:
        work.merge(outs, lses)
    ratio = counted[0] / (outs.numel() + lses.numel())
    if not ratio:
        raise Hint("merge loaded nothing in a Triton kernel")
    if ratio > _BAR:
        raise Hint(
            f"right, but it loads {ratio:.2f} times as many numbers as there are; keep a running maximum instead of looking twice"
        )
    return f"right on every hostile case, and every number is loaded {ratio:.2f} times (the bar is {_BAR})"
