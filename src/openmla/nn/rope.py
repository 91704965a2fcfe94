"""Rotary position embedding of MLA's RoPE columns, with YaRN's stretched frequencies.

Columns 2f and 2f + 1 of a vector at position t are a point of the plane, turned by t * w_f, w_f = theta ** (-2f / d):
DeepSeek's own (interleaved) order, which vLLM keeps too. transformers' DeepSeek-V3 turns the same pairs and then
moves the first of each pair to the front; scores are the same, cached rows are not.

YaRN (arXiv 2309.00071) stretches a model trained for `original_length` positions by `factor`: pairs that turn less
than `beta_slow` times over the original length are slowed down by `factor`, those that turn more than `beta_fast`
times are left alone, with a ramp in between. Two corrections of the logits come with it:

    cos and sin      times  m(mscale) / m(mscale_all_dim)          m(a) = 0.1 a ln(factor) + 1
    softmax scale    times  m(mscale_all_dim) ** 2                 (1 where mscale_all_dim is 0)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from openmla.core.errors import ProblemError


@dataclass(frozen=True)
class YaRN:
    """How far a rotary embedding is stretched, by the names of DeepSeek's `config.json`."""

    factor: float
    original_length: int
    beta_fast: float = 32
    beta_slow: float = 1
    mscale: float = 1
    mscale_all_dim: float = 0

    def __post_init__(self) -> None:
        wrong = []
        if self.factor < 1:
            wrong.append(f"factor must be at least 1, got {self.factor}")
        if self.original_length < 1:
            wrong.append(f"original_length must be at least 1 position, got {self.original_length}")
        if not self.beta_fast >= self.beta_slow > 0:
            wrong.append(f"need beta_fast >= beta_slow > 0, got {self.beta_fast} and {self.beta_slow}")
        if wrong:
            raise ProblemError("YaRN", wrong)

    def _m(self, weight: float) -> float:
        return 0.1 * weight * math.log(self.factor) + 1

    @property
    def amplitude(self) -> float:
        """Factor of cos and sin."""
        return self._m(self.mscale) / self._m(self.mscale_all_dim)

    @property
    def softmax_factor(self) -> float:
        """Factor of the softmax scale."""
        return self._m(self.mscale_all_dim) ** 2


@dataclass(frozen=True)
class Rotation:
    """cos and sin of the positions of one pass; the same for all layers. [..., d_rope / 2] fp32."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Columns x [..., d_rope] turned, in its dtype; its leading dimensions broadcast with those of cos."""
        wide = x if x.dtype == torch.float64 else x.float()
        even, odd = wide.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([even * self.cos - odd * self.sin, odd * self.cos + even * self.sin], -1)
        return turned.flatten(-2).to(x.dtype)

    def unsqueeze(self, dim: int) -> Rotation:
        """The same with one dimension more, for x with a dimension of heads."""
        return Rotation(self.cos.unsqueeze(dim), self.sin.unsqueeze(dim))


@dataclass(frozen=True)
class Rope:
    """A rotary embedding: `rope(positions)` gives the Rotation of a pass.

    Args:
        d_rope: columns, even.
        theta: base of the frequencies.
        yarn: None leaves the frequencies as they are.
    """

    d_rope: int = 64
    theta: float = 10000.0
    yarn: YaRN | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Rope:
        """From `config.json`: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling`.

        Raises:
            ProblemError: a kind of scaling other than YaRN.
        """
        given = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
        kind = given.get("rope_type", given.get("type", "default"))
        if kind not in ("default", "yarn"):
            raise ProblemError("Rope", [f"rope_type must be default or yarn, got {kind!r}"])
        theta = float(given.get("rope_theta") or config.get("rope_theta") or 10000.0)
        if kind == "default":
            return cls(config["qk_rope_head_dim"], theta)
        names = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")
        options = {name: float(given[name]) for name in names if given.get(name) is not None}
        original = int(given["original_max_position_embeddings"])
        factor = given.get("factor") or config["max_position_embeddings"] / original
        return cls(config["qk_rope_head_dim"], theta, YaRN(float(factor), original, **options))

    @property
    def softmax_factor(self) -> float:
        """What YaRN multiplies the softmax scale by."""
        return self.yarn.softmax_factor if self.yarn else 1.0

    def frequencies(self) -> torch.Tensor:
        """[d_rope / 2] fp32, radians per position."""
        # In fp32 throughout, as the models were trained: fp64 differs in the last bit, which position 1e5 multiplies.
        exponents = torch.arange(0, self.d_rope, 2, dtype=torch.float32) / self.d_rope
        plain = 1.0 / self.theta**exponents
        if self.yarn is None:
            return plain
        low, high = (self._pair_that_turns(times) for times in (self.yarn.beta_fast, self.yarn.beta_slow))
        low, high = max(math.floor(low), 0), min(math.ceil(high), self.d_rope - 1)
        ramp = (torch.arange(self.d_rope // 2, dtype=torch.float32) - low) / (high - low or 0.001)
        slowed = 1.0 / (self.yarn.factor * self.theta**exponents)
        kept = 1 - ramp.clamp(0, 1)
        return slowed * (1 - kept) + plain * kept

    def _pair_that_turns(self, times: float) -> float:
        """Which pair turns that many times over the original length; not rounded."""
        assert self.yarn is not None
        wavelength = self.yarn.original_length / (times * 2 * math.pi)
        return self.d_rope * math.log(wavelength) / (2 * math.log(self.theta))

    def __call__(self, positions: torch.Tensor) -> Rotation:
        """From positions [...], integers, the Rotation: cos and sin [..., d_rope / 2] on their device."""
        angles = positions[..., None].float() * _frequencies(self, positions.device)
        amplitude = self.yarn.amplitude if self.yarn else 1.0
        return Rotation(angles.cos() * amplitude, angles.sin() * amplitude)


@lru_cache(maxsize=64)
def _frequencies(rope: Rope, device: torch.device) -> torch.Tensor:
    # No buffer of the module: `model.to(bf16)` would round it.
    with torch.inference_mode(False):
        return rope.frequencies().to(device)
