"""Counters that always run: how often each kernel was launched, for calls of which size.

The hot path pays one C call per launch, `Tally.count()`, about 0.03 us and atomic under the GIL; everything else
(tokens, bytes, fallbacks, names) is worked out when somebody reads. A forked child starts at zero, so that the sum over
processes is the number of calls.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any


def _value(count: Any) -> int:
    """The number that an itertools.count would give next, without taking it: `count(7)` -> 7."""
    return int(repr(count)[6:-1])


@dataclass
class Tally:
    """The launches of one kernel with one number of query tokens."""

    op: str
    backend: str
    kernel: str
    tokens: int
    _calls: Any = field(default_factory=itertools.count)
    _captured: Any = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.count = self._calls.__next__  # a bound C function: no Python frame per call
        self.count_captured = self._captured.__next__

    @property
    def calls(self) -> int:
        """Python calls, those that were captured into a CUDA graph included."""
        return _value(self._calls)

    @property
    def captured(self) -> int:
        """Those of `calls` that were captured and so not run; counted while a monitor runs."""
        return _value(self._captured)


_tallies: dict[tuple[str, str, str, int], Tally] = {}
_amounts: Counter[tuple[str, str]] = Counter()
_lock = threading.Lock()
_MAX_TALLIES = 4096  # sizes beyond are counted together, as tokens = 0


def tally(op: str, backend: str, kernel: str, tokens: int) -> Tally:
    """The one Tally of these labels, made on first use."""
    key = (op, backend, kernel, tokens)
    with _lock:
        if key not in _tallies and len(_tallies) >= _MAX_TALLIES:
            key = (op, backend, kernel, 0)
        if key not in _tallies:
            _tallies[key] = Tally(*key)
        return _tallies[key]


def tallies() -> tuple[Tally, ...]:
    """Every Tally of this process."""
    with _lock:
        return tuple(_tallies.values())


def add(name: str, label: str, amount: float = 1) -> None:
    """Add to a rare counter, such as ("cache", "hit") or ("compile_seconds", "cute"); takes a lock."""
    with _lock:
        _amounts[name, label] += amount  # type: ignore[assignment]


def amounts() -> dict[tuple[str, str], float]:
    """(name, label) -> sum, since the process began."""
    with _lock:
        return dict(_amounts)


def reset() -> None:
    """Start at zero; holders of a Tally keep counting into it."""
    global _lock
    _lock = threading.Lock()  # the parent may have been forked while it held the old one
    _amounts.clear()
    for each in _tallies.values():
        each._calls, each._captured = itertools.count(), itertools.count()
        each.__post_init__()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=reset)
