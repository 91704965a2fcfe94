"""transformers (>= 5.16, < 6) on OpenMLA. Importing this needs PyTorch alone; its names need transformers.

`attach(model)` keeps the model's own interface: `generate()`, every cache of transformers, continuous batching.
`PagedModel` is the other way round: your own serving loop over a `PagedKVCache`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from openmla.integrations.transformers.paged import AttentionCall as AttentionCall
from openmla.integrations.transformers.paged import Observer as Observer
from openmla.integrations.transformers.paged import PagedModel as PagedModel

if TYPE_CHECKING:
    from openmla.integrations.transformers.attention import Attached as Attached
    from openmla.integrations.transformers.attention import attach as attach
    from openmla.integrations.transformers.cache import LatentCache as LatentCache

_HOME = {"Attached": "attention", "attach": "attention", "LatentCache": "cache"}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError('transformers (>= 5.16, < 6) is not installed; run: pip install "openmla[hf]"') from error
