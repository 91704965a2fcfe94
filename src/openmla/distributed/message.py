"""The block of bytes that a collective of context parallelism carries."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Message:
    """Shares as they travel, one behind another: of each the rows out, then their lse, in one block of bytes.

    content [n, bytes] uint8; out [n, batch, s_q, heads, d_v] in the dtype of q and lse [n, batch, heads, s_q] fp32 are
    views of it. Both begin at multiples of 16 bytes, so that rows keep their alignment.
    """

    content: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor

    @classmethod
    def empty(cls, shape: tuple[int, int, int, int], like: torch.Tensor) -> Message:
        """Room for one share of that shape, in the dtype and on the device of `like`."""
        num_bytes = _whole_blocks(math.prod(shape) * like.element_size()) + _whole_blocks(math.prod(shape[:3]) * 4)
        content = like.new_empty(1, num_bytes, dtype=torch.uint8)
        return cls._over(content, shape, like.dtype)

    @classmethod
    def _over(cls, content: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Message:
        batch, s_q, heads = shape[:3]
        end = math.prod(shape) * dtype.itemsize
        out = content[:, :end].view(dtype).unflatten(1, shape)
        begin, count = _whole_blocks(end), batch * s_q * heads
        lse = content[:, begin : begin + 4 * count].view(torch.float32).unflatten(1, (batch, heads, s_q))
        return cls(content, out, lse)

    def replaced(self, content: torch.Tensor) -> Message:
        """Other content [n, bytes] of the same form."""
        return self._over(content, tuple(self.out.shape[1:]), self.out.dtype)

    def fill(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Write the one share that it holds."""
        self.out[0].copy_(out)
        self.lse[0].copy_(lse)


def _whole_blocks(num_bytes: int) -> int:
    return -(-num_bytes // 16) * 16
