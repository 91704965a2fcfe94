"""Kernels that stand aside: a variant that failed to compile, to launch or to be right is passed over for a while.

A failure before anything ran is recoverable: the next kernel of the table serves the call, and this one is tried again
after ten minutes. After three failures, or one wrong result, it stays out for the life of the process.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

from openmla.core import incidents

RETRY_SECONDS = 600.0
MAX_FAILURES = 3


@dataclass
class _Aside:
    kind: str
    reason: str
    failures: int
    until: float  # monotonic


_aside: dict[tuple[str, str, str, Any], _Aside] = {}
_lock = threading.Lock()


def subject(kernel: Any) -> str:
    """How incidents name a kernel: decode/cute/decode_dense."""
    return f"{kernel.op}/{kernel.backend}/{kernel.name}"


def put(kernel: Any, config: Any, kind: str, reason: str) -> None:
    """Pass this variant over from now on, and note why.

    Args:
        kernel: the kernel.
        config: its variant; another config of the same kernel is not affected.
        kind: a kind of `core.incidents`; canary_failed is for the life of the process.
        reason: one sentence.
    """
    key = (kernel.op, kernel.backend, kernel.name, config)
    with _lock:
        failures = _aside[key].failures + 1 if key in _aside else 1
        is_final = kind == "canary_failed" or failures >= MAX_FAILURES
        until = float("inf") if is_final else time.monotonic() + RETRY_SECONDS
        _aside[key] = _Aside(kind, " ".join(reason.split())[:400], failures, until)
    incidents.note(kind, subject(kernel), reason)


def why(kernel: Any, config: Any) -> str:
    """The reason why a variant stands aside now; empty when it does not."""
    found = _aside.get((kernel.op, kernel.backend, kernel.name, config))
    if found is None or found.until <= time.monotonic():
        return ""
    left = found.until - time.monotonic()
    when = "for the life of this process" if left == float("inf") else f"tried again in {left / 60:.0f} min"
    return f"stands aside ({found.kind}, {when}): {found.reason}"


def anything() -> bool:
    """Whether anything stands aside or ever did: one test for the usual case."""
    return bool(_aside)


def expired() -> bool:
    """Whether a variant may be tried again since the last call of this function; its incident is over then."""
    now, is_any = time.monotonic(), False
    with _lock:
        for (op, backend, name, _), each in _aside.items():
            if each.until <= now and each.until != float("-inf"):
                each.until, is_any = float("-inf"), True
                incidents.over(f"{op}/{backend}/{name}")
    return is_any


def clear() -> None:
    """Forget it all, as after a repaired installation."""
    with _lock:
        for op, backend, name, _ in _aside:
            incidents.over(f"{op}/{backend}/{name}")
        _aside.clear()
