"""The rule in fp64 on plain numbers; then whole calls, in PyTorch and inlined into the Triton kernel."""

from typing import Any

import torch

import openmla
from openmla.learn.course import Hint
from openmla.mods import Mod
from openmla.reference import attention
from openmla.testing import budget


def _rule(score: torch.Tensor, h: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
    capped = 20 * torch.tanh(score / 20)
    return torch.where(h % 2 == 0, capped - (0.02 * distance).clamp(max=1.5), capped)


def _plain_numbers(mod: Mod) -> None:
    score = torch.linspace(-60, 60, 25, dtype=torch.float64)[:, None, None].expand(25, 4, 11)
    h, key = torch.arange(4)[None, :, None].expand(25, 4, 11), torch.arange(0, 201, 20).expand(25, 4, 11)
    found = mod(score, torch.tensor(0), h, torch.tensor(200), key)
    wrong = (found - _rule(score, h, 200 - key)).abs() > 1e-9
    if not wrong.any():
        return
    if not wrong[:, 0::2].any():
        raise Hint("odd heads: their score is the capped one, without anything taken off")
    if not wrong[:, 1::2].any():
        near = wrong[:, 0::2][..., key[0, 0] > 130]
        raise Hint("even heads: " + ("how much may they lose?" if not near.any() else "what do they lose per token?"))
    place = wrong.nonzero()[0]
    at = tuple(place.tolist())
    raise Hint(
        f"a score of {score[at]:g}, head {h[at]}, distance {200 - key[at]}: got {found[at]:g}; capped first, then taken off; odd heads keep theirs"
    )


def check(work: Any) -> str:
    """Numbers, PyTorch, Triton."""
    mod = getattr(work, "steered", None)
    if not isinstance(mod, Mod):
        raise Hint("the file must define `steered`, decorated with @score_mod")
    _plain_numbers(mod)
    torch.manual_seed(0)
    q, cache = (3 * torch.randn(2, 1, 4, 40)).half(), torch.randn(16, 16, 1, 40).half()
    table, lengths = torch.randperm(16).int().view(2, 8), torch.tensor([100, 33], dtype=torch.int32)
    given = {"softmax_scale": 40**-0.5, "d_v": 32, "mods": mod}
    golden = attention.decode(q, cache, table, lengths, precision="fp64", with_bounds=True, **given)
    for backend in ("torch", "triton"):
        out, lse = openmla.decode(q, cache, table, lengths, backend=backend, **given)
        report = budget.check(out, lse, golden, dtype=torch.float16)
        if not report.passed:
            raise Hint(f"inlined by {backend} it is outside the tolerance:\n{report}")
    return f"one function of fingerprint {mod.fingerprint}, the same in fp64, in PyTorch and inside a Triton kernel"
