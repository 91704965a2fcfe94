"""Attention changed by a few lines of Python that every backend inlines. Deep dive: docs/mods.md."""

from openmla.mods import math as m
from openmla.mods.attached import Attachable, Attached, Mods, Site, attach
from openmla.mods.function import Mod, activation, mask_mod, score_mod
from openmla.mods.library import (
    alibi,
    document,
    relative_bias,
    sigmoid,
    sink_tokens,
    sliding_window,
    soft_cap,
    tree,
)
from openmla.mods.named import named
from openmla.mods.rope import Rope

__all__ = [
    "Attachable", "Attached", "Mod", "Mods", "Rope", "Site", "activation", "alibi", "attach", "document", "m", "mask_mod", "named",
    "relative_bias", "score_mod", "sigmoid", "sink_tokens", "sliding_window", "soft_cap", "tree",
]  # fmt: skip
