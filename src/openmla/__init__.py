"""OpenMLA: Multi-head Latent Attention for inference.

Importing this package needs PyTorch and nothing else; names below are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from openmla.backends import explain as explain
    from openmla.core.faults import Fault as Fault
    from openmla.core.faults import check_errors as check_errors
    from openmla.core.layout import KVLayout as KVLayout
    from openmla.core.layout import kv_layout as kv_layout
    from openmla.core.target import Target as Target
    from openmla.kv.cache import PagedKVCache as PagedKVCache
    from openmla.ops.append import append as append
    from openmla.ops.native import decode as decode
    from openmla.ops.native import plan as plan
    from openmla.ops.native import sparse_decode as sparse_decode
    from openmla.ops.native import sparse_prefill as sparse_prefill
    from openmla.ops.native import workspace_bytes as workspace_bytes
    from openmla.ops.prefill import prefill as prefill
    from openmla.ops.prefix import decode_shared_prefix as decode_shared_prefix

__version__ = "0.1.0.dev0"

_HOME = {
    "Fault": "openmla.core.faults",
    "KVLayout": "openmla.core.layout",
    "PagedKVCache": "openmla.kv.cache",
    "Target": "openmla.core.target",
    "append": "openmla.ops.append",
    "check_errors": "openmla.core.faults",
    "decode": "openmla.ops.native",
    "decode_shared_prefix": "openmla.ops.prefix",
    "explain": "openmla.backends",
    "kv_layout": "openmla.core.layout",
    "plan": "openmla.ops.native",
    "prefill": "openmla.ops.prefill",
    "sparse_decode": "openmla.ops.native",
    "sparse_prefill": "openmla.ops.native",
    "workspace_bytes": "openmla.ops.native",
}
_MODULES = {"flash_mla": "openmla.ops.flash_mla", "mods": "openmla.mods"}

__all__ = [*sorted(_HOME), "flash_mla"]


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name not in _HOME:
        raise AttributeError(f"module 'openmla' has no attribute {name!r}; it has: {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
