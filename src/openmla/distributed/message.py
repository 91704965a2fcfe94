"""The block of bytes that a collective of context parallelism carries."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Message:
    """Shares as they travel, one behind another: of each the rows out, their lse and the call, in one block of bytes.

    content [n, bytes] uint8; out [n, batch, s_q, heads, d_v] in the dtype of q, lse [n, batch, heads, s_q] fp32 and
    call [n] int32, the number of the kind of call that a share belongs to, are views of it. All begin at multiples of 16
    bytes, so that rows keep their alignment.
    """

    content: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    call: torch.Tensor

    @classmethod
    def empty(cls, shape: tuple[int, int, int, int], like: torch.Tensor, call: int) -> Message:
        """Room for one share of that shape, in the dtype and on the device of `like`, that says which call it is of."""
        num_bytes = _whole_blocks(math.prod(shape) * like.element_size()) + _whole_blocks(math.prod(shape[:3]) * 4)
        content = like.new_empty(1, num_bytes + _whole_blocks(4), dtype=torch.uint8)
        message = cls._over(content, shape, like.dtype)
        message.call.fill_(call)
        return message

    @classmethod
    def _over(cls, content: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Message:
        batch, s_q, heads = shape[:3]
        end = math.prod(shape) * dtype.itemsize
        out = content[:, :end].view(dtype).unflatten(1, shape)
        begin, count = _whole_blocks(end), batch * s_q * heads
        lse = content[:, begin : begin + 4 * count].view(torch.float32).unflatten(1, (batch, heads, s_q))
        begin += _whole_blocks(4 * count)
        return cls(content, out, lse, content[:, begin : begin + 4].view(torch.int32)[:, 0])

    def replaced(self, content: torch.Tensor) -> Message:
        """Other content [n, bytes] of the same form."""
        return self._over(content, tuple(self.out.shape[1:]), self.out.dtype)

    def fill(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Write the one share that it holds."""
        self.out[0].copy_(out)
        self.lse[0].copy_(lse)


def _whole_blocks(num_bytes: int) -> int:
    return -(-num_bytes // 16) * 16
