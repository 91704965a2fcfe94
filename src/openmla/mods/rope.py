"""Rotary position encoding of q_pe inside the kernel: the last d_qk - d_v columns of q, as the cache holds them for k.

    y[2i] = x[2i] cos[p, i] - x[2i+1] sin[p, i]     y[2i+1] = x[2i+1] cos[p, i] + x[2i] sin[p, i]     is_interleaved
    y[i]  = x[i]  cos[p, i] - x[i+r]  sin[p, i]     y[i+r]  = x[i+r]  cos[p, i] + x[i]  sin[p, i]     r = d_rope / 2

p is the position of the query, q_idx. Computed in fp32 and rounded to the dtype of q, as a pass of its own would.
Source: RoFormer (arXiv 2104.09864); DeepSeek's models interleave.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RopeForm:
    """What a kernel is compiled for."""

    is_interleaved: bool

    def __str__(self) -> str:
        return "rope" if self.is_interleaved else "rope(halves)"


@dataclass(frozen=True, eq=False)
class Rope:
    """Cosines and sines of every position; q_pe is rotated by its own position.

    Args:
        cos: [positions, d_rope / 2] fp32, rows at a constant distance. `Rope.of_base` makes both from a base.
        sin: the same form.
        is_interleaved: pairs are neighbours (DeepSeek); False: column i and column i + d_rope / 2.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    is_interleaved: bool = True

    @staticmethod
    def of_base(
        d_rope: int, positions: int, base: float = 10000.0, *, is_interleaved: bool = True,
        device: torch.device | str = "cpu",
    ) -> Rope:  # fmt: skip
        """Tables of the angles p * base ** (-2 i / d_rope), computed in fp64: make them once, use them in every call."""
        steps = torch.arange(0, d_rope, 2, dtype=torch.float64) / d_rope
        angle = torch.arange(positions, dtype=torch.float64)[:, None] * base**-steps
        cos, sin = (each.to(torch.float32).to(device) for each in (angle.cos(), angle.sin()))
        return Rope(cos, sin, is_interleaved)

    @property
    def form(self) -> RopeForm:
        """The part without tensors."""
        return RopeForm(self.is_interleaved)

    def violations(self, d_rope: int, capacity: int, page_size: int, device: torch.device) -> list[str]:
        """Why it cannot rotate queries with d_rope columns and up to `capacity` keys."""
        found = []
        if d_rope < 2 or d_rope % 2:
            found.append(f"rope rotates the d_qk - d_v last columns of q, an even number, got {d_rope}")
        for name, table in (("cos", self.cos), ("sin", self.sin)):
            if not isinstance(table, torch.Tensor) or table.dim() != 2 or table.dtype != torch.float32:
                found.append(f"rope's {name} must be a tensor [positions, {d_rope // 2}] fp32")
                continue
            if table.device != device:
                found.append(f"rope's {name} must be on {device} like q, got {table.device}")
            if table.shape[1] != d_rope // 2 or table.shape != self.cos.shape or table.stride(1) != 1:
                found.append(
                    f"rope's {name} must be [positions, {d_rope // 2}], like the other and contiguous in its last "
                    f"dimension, got {tuple(table.shape)} with strides {table.stride()}"
                )
            # Capacities are whole pages, so up to page_size - 1 of the positions cannot occur.
            if table.shape[0] + page_size <= capacity:
                found.append(f"rope's {name} has {table.shape[0]} positions, but block_table can hold {capacity} keys")
        return found

    def rotated(self, q: torch.Tensor, d_v: int, position: torch.Tensor) -> torch.Tensor:
        """Q [..., h_q, d_qk] with its columns behind d_v rotated; position [...] of each token.

        A position before the first key rotates like the first; one behind the tables makes the token NaN.
        """
        pairs = q[..., d_v:].to(torch.float32)
        pairs = pairs.unflatten(-1, (-1, 2)) if self.is_interleaved else pairs.unflatten(-1, (2, -1)).transpose(-1, -2)
        place = position.long().clamp(0, self.cos.shape[0] - 1)
        cos, sin = (
            table[place][..., None, :].masked_fill((position >= table.shape[0])[..., None, None], torch.nan)
            for table in (self.cos, self.sin)
        )
        x, y = pairs.unbind(-1)
        turned = torch.stack((x * cos - y * sin, y * cos + x * sin), -1)
        turned = turned if self.is_interleaved else turned.transpose(-1, -2)
        return torch.cat((q[..., :d_v], turned.flatten(-2).to(q.dtype)), -1)
