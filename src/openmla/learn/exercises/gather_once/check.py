"""Right first, by the tolerance rule; then the bytes that PyTorch's operators touch against those that must move."""

from typing import Any

import torch

from openmla.learn.course import Hint
from openmla.learn.traffic import count
from openmla.reference import attention
from openmla.testing import budget

_BAR = 6.0


def check(work: Any) -> str:
    """Correctness with NaN behind the lengths is too much to ask of dense operators; garbage there is finite."""
    torch.manual_seed(0)
    lengths = [500, 37, 192, 64]
    q, cache = torch.randn(4, 32, 576), torch.randn(96, 64, 576)
    table = torch.randperm(96)[: 4 * 24].view(4, 24)
    scale = 192**-0.5
    with count() as moved:
        out = work.decode(q, cache, table, list(lengths), scale)
    seqlens = torch.tensor(lengths, dtype=torch.int32)
    golden = attention.decode(
        q[:, None], cache[:, :, None], table.int(), seqlens, softmax_scale=scale, d_v=512, precision="fp64",
        with_bounds=True,
    )  # fmt: skip
    if not isinstance(out, torch.Tensor) or tuple(out.shape) != (4, 32, 512):
        raise Hint(f"out must be a tensor [4, 32, 512], got {tuple(getattr(out, 'shape', ())) or type(out).__name__}")
    report = budget.check(out[:, None].float(), None, golden, dtype=torch.float32)
    if not report.passed:
        raise Hint(f"the result is no longer right:\n{report}")
    least = sum(lengths) * 576 * 4 + q.nbytes + out.nbytes
    ratio = moved.bytes / least
    if ratio > _BAR:
        worst = f"the largest operator is {moved.largest}, {moved.largest_bytes / least:.1f} times the least alone"
        if moved.largest_bytes > 20 * least:
            hint = "Every head reads the same rows: a matrix product needs no copy per head."
        else:
            hint = "What is gathered behind the end of a request is never used: how many pages does each length need?"
        raise Hint(f"{ratio:.1f} times the least, the bar is {_BAR:g}; {worst}. {hint}")
    return f"{ratio:.1f} times the least bytes (the bar is {_BAR:g})"
