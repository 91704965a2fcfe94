"""Who watches launches: the watchdog, the sampler of device times. Nobody by default, which costs one test per call.

An observer that raises is noted and its call goes on: measuring must not break what it measures.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

from openmla.core import incidents


class Observer(Protocol):
    """Sees the launches that it wants to see, on the thread and stream of the call."""

    wants: Callable[[], bool]  # asked at every launch; a bound C function such as `itertools.cycle(...).__next__`

    def before(self, prepared: Any, operands: Any, plan: Any) -> Any:
        """Called before the launch; what it returns is handed to `after`."""
        ...

    def after(self, prepared: Any, operands: Any, plan: Any, begun: Any) -> None:
        """Called after the launch returned, which on a GPU is before the kernel has run."""
        ...


observers: list[Observer] = []  # one list for good, for those who imported it; its content is exchanged under the lock
_lock = threading.Lock()


def add(observer: Observer) -> None:
    """Let `observer` see every launch from now on."""
    with _lock:
        observers[:] = [*observers, observer]


def remove(observer: Observer) -> None:
    """No longer; fine when it was not there."""
    with _lock:
        observers[:] = [each for each in observers if each is not observer]


def watching() -> list[Observer]:
    """Who wants to see this launch; asked once for each."""
    return [each for each in observers if each.wants()]


def around(watching: list[Observer], prepared: Any, operands: Any, plan: Any, launch: Callable[[], Any]) -> None:
    """The launch, between the two calls of every observer."""
    begun = [_guarded(each.before, prepared, operands, plan) for each in watching]
    launch()
    for each, state in zip(watching, begun, strict=True):
        _guarded(each.after, prepared, operands, plan, state)


def _guarded(call: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except Exception as error:
        incidents.note(
            "monitor_failed", type(getattr(call, "__self__", call)).__name__, f"{type(error).__name__}: {error}"
        )
        return None
