"""Mods that `portable.py` runs on a GPU, and the operands it gives them."""

from __future__ import annotations

import linecache
from pathlib import Path
from typing import Any

import torch

from openmla import mods
from openmla.mods import Rope, m, mask_mod, score_mod

PAGE = Path(__file__).resolve().parents[2] / "docs" / "mods.md"


def to(device: str, given: Any) -> Any:
    """Tensors, dicts, mods and lists of them on that device."""
    if isinstance(given, torch.Tensor):
        return given.to(device)
    if isinstance(given, dict):
        return {name: to(device, value) for name, value in given.items()}
    if isinstance(given, list):
        return [to(device, value) for value in given]
    if isinstance(given, mods.Mod) and given.given:
        return given.aux(**to(device, dict(given.given)))
    if isinstance(given, Rope):
        return Rope(given.cos.to(device), given.sin.to(device), given.is_interleaved)
    return given


def mod_of_the_page() -> mods.Mod:
    """The mod of the first code block of docs/mods.md."""
    text = PAGE.read_text()
    block = text[text.index("```python\n") + len("```python\n") :].partition("```\n")[0]
    linecache.cache[str(PAGE)] = (len(block), None, block.splitlines(True), str(PAGE))  # mods read their own source
    namespace: dict[str, Any] = {"__name__": "docs_mods"}
    exec(compile(block, str(PAGE), "exec"), namespace)
    return next(each for each in namespace.values() if isinstance(each, mods.Mod))


@score_mod
def fading(score, b, h, q_idx, kv_idx):
    """A key loses weight with its distance, faster in the first heads."""
    age = q_idx - kv_idx
    return score - 0.002 * age * m.exp2(0.0 - 0.05 * h)


@mask_mod
def every_third(b, h, q_idx, kv_idx):
    """Keys whose place is no multiple of 3, and the last ones."""
    return (m.mod(kv_idx + b, 3) != 0) | (q_idx - kv_idx < 8)


# What the Hopper kernels inline: of the library, and of a user.
CUTE_MODS = {
    "soft_cap": [mods.soft_cap(30.0)],
    "sink_tokens": [mods.sink_tokens(4, 512)],
    "window": [mods.sliding_window(512)],
    "fading": [fading],
    "every_third": [every_third],
    "several": [mods.soft_cap(30.0), fading, mods.sink_tokens(4, 512), every_third],
}


def decode_arguments(h_q: int, s_k: int, batch: int, device: str, s_q: int = 1) -> dict[str, Any]:
    dtype = torch.bfloat16 if device != "cpu" else torch.float16
    pages = -(-s_k // 64)
    cache = torch.randn(batch * pages, 64, 1, 576, device=device, dtype=torch.float32).to(dtype)
    return {
        "q": torch.randn(batch, s_q, h_q, 576, device=device).to(dtype), "kv_cache": cache,
        "block_table": torch.arange(batch * pages, dtype=torch.int32, device=device).view(batch, pages),
        "cache_seqlens": torch.full((batch,), s_k, dtype=torch.int32, device=device), "backend": "triton",
    }  # fmt: skip
