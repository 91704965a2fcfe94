"""Memory of one GPU that the ranks beside it write into: PyTorch's symmetric memory, and what lies in it.

The exchange itself, and why two turns are enough, is `openmla.backends.triton.exchange`. NVLink multicast is not used.
"""

from __future__ import annotations

import hashlib
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from openmla.core import env

TURNS = 2
LEAST_ROWS = 512


@dataclass(frozen=True)
class Mailbox:
    """Of one rank, for rows of so many 32-bit words."""

    capacity: int  # rows of a call
    words: torch.Tensor  # int32 [TURNS * world * capacity * (words of a row + 1 of lse)], mapped by all ranks
    boxes: torch.Tensor  # int64 [world]: where every rank's words lie for this one
    turns: torch.Tensor  # int32 [capacity]: exchanges of each row so far
    lost: torch.Tensor  # int32 [1]: a share was not written within the limit
    rank: int
    staged: torch.Tensor  # int32 [capacity * (words of a row + 1)]: this rank's share, where the decode kernel sends it
    handle: Any  # keeps the mappings
    _mail: dict[float, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def open(cls, group: dist.ProcessGroup, device: torch.device, rows: int, words: int) -> Mailbox | str:
        """A mailbox for up to `rows` rows (rounded up to a power of two), or why there is none. Collective.

        Nobody may write before every rank is back from here.
        """
        world, capacity = group.size(), max(LEAST_ROWS, 1 << (rows - 1).bit_length())
        try:
            import torch.distributed._symmetric_memory as symmetric

            content = symmetric.empty(TURNS * world * capacity * (words + 1), dtype=torch.int32, device=device)
            # PyTorch would also set up NVLink multicast, which nothing here needs and some machines refuse.
            with env.lent("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1"):
                handle = symmetric.rendezvous(content, group)
            addresses = [int(address) for address in handle.buffer_ptrs]
        except (ImportError, AttributeError, RuntimeError, TypeError) as error:
            text = str(error).strip()
            return f"{type(error).__name__}: {text.splitlines()[0][:200] if text else 'without a message'}"
        content.fill_(-1)  # the kernel's UNWRITTEN
        counts = torch.zeros(capacity + 1, dtype=torch.int32, device=device)
        boxes = torch.tensor(addresses, dtype=torch.int64, device=device)
        staged = torch.full((capacity * (words + 1),), -1, dtype=torch.int32, device=device)
        return cls(capacity, content, boxes, counts[:capacity], counts[capacity:], group.rank(), staged, handle)

    def mail(self, limit_s: float) -> torch.Tensor:
        """What a decode kernel that exchanges its rows itself needs to know: see `backends.cute.decode_dense.exchange`."""
        if limit_s not in self._mail:
            fields = (
                self.rank, self.boxes.numel(), self.capacity, int(limit_s * 1e9), self.turns.data_ptr(),
                self.lost.data_ptr(), *self.boxes.tolist(),
            )  # fmt: skip
            self._mail[limit_s] = torch.tensor(fields, dtype=torch.int64, device=self.boxes.device)
        return self._mail[limit_s]

    def stage(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Unwritten rows [batch, s_q, h_q, d_v] and lse [batch, h_q, s_q] of this rank."""
        batch, s_q, h_q, d_v = shape
        words, rows = d_v * dtype.itemsize // 4, batch * s_q * h_q
        out, lse = self.staged[: rows * words], self.staged[self.capacity * words :][:rows]
        return out.view(dtype).view(shape), lse.view(torch.float32).view(batch, h_q, s_q)

    def exchange(
        self, out: torch.Tensor, lse: torch.Tensor, attn_sink: torch.Tensor | None, limit_s: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A rank's share [batch, s_q, h_q, d_v], [batch, h_q, s_q] merged with everybody's. Collective; one launch."""
        from openmla.backends.triton import exchange

        return exchange.exchange(out, lse, attn_sink, self.boxes, self.turns, self.lost, self.rank, limit_s)

    def is_lost(self) -> bool:
        """Whether a share was missed; waits for the device."""
        return bool(self.lost.item())


def host_number() -> int:
    """The same on all ranks of one host, another elsewhere; never 0."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    name = socket.gethostname() + (boot.read_text() if boot.exists() else "")
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big") + 1
