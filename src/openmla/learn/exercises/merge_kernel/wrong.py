"""HINT: 0 * NaN is NaN"""

import torch
import triton
import triton.language as tl


@triton.jit
def merge_kernel(outs, lses, out, lse, rows, PARTS: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program merges one row: outs [PARTS, rows, D], lses [PARTS, rows] -> out [rows, D], lse [rows]."""
    row = tl.program_id(0)
    columns = tl.arange(0, D)
    total = tl.zeros([D], dtype=tl.float32)
    weight_sum = tl.zeros([1], dtype=tl.float32)
    top = tl.full([1], -float("inf"), dtype=tl.float32)
    for part in range(PARTS):
        this = tl.load(lses + part * rows + row)
        higher = tl.maximum(top, this)
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        keep, weight = tl.exp(top - shift), tl.exp(this - shift)
        values = tl.load(outs + (part * rows + row) * D + columns)
        total = total * keep + weight * values
        weight_sum = weight_sum * keep + weight
        top = higher
    safe = tl.where(weight_sum == 0.0, 1.0, weight_sum)
    tl.store(out + row * D + columns, total / safe)
    tl.store(lse + row + tl.arange(0, 1), tl.where(weight_sum == 0.0, -float("inf"), top + tl.log(safe)))


def merge(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [rows, 128], lse [rows]) of outs [parts, rows, 128] and lses [parts, rows]."""
    parts, rows, d = outs.shape
    out, lse = torch.empty(rows, d), torch.empty(rows)
    merge_kernel[(rows,)](outs, lses, out, lse, rows, PARTS=parts, D=d)
    return out, lse
