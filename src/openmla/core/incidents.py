"""Incidents: what went wrong in this process, what was done about it, and whether the process should still serve.

Every fault that the library survives, and every fault that it cannot survive, ends in one `note`: one counter, one log
line (at most one a minute for the same fault), and a line in `openmla.explain()`. The table of faults with their end
states is docs/reliability.md.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "degraded", "failed"]
LOG_SECONDS = 60.0  # the same incident is logged once in so long; it is counted always
_MAX_SUBJECTS = 256  # distinct (kind, subject, reason); a flood of reasons must not fill the memory

_log = logging.getLogger("openmla")


@dataclass(frozen=True)
class Kind:
    """What a kind of incident means, and what it makes of the process: ok, degraded (slower than it should be) or failed."""

    health: State
    meaning: str


KINDS: dict[str, Kind] = {
    "backend_unavailable": Kind("degraded", "a backend could not be imported; its kernels are out of the table"),
    "compile_failed": Kind("degraded", "a kernel could not be compiled or loaded; it stands aside"),
    "launch_refused": Kind("degraded", "the driver refused a launch; the kernel stands aside"),
    "canary_failed": Kind("degraded", "a freshly compiled kernel computed a wrong result; it stands aside"),
    "canary_skipped": Kind("ok", "a kernel could not be tried before its first use"),
    "version_untested": Kind("ok", "a package is outside the range that OpenMLA was tested with"),
    "cache_entry_bad": Kind("ok", "a cached kernel was damaged; it was set aside and built again"),
    "cache_unusable": Kind("degraded", "the kernel cache cannot be used; compiled kernels live as long as the process"),
    "lock_stuck": Kind("ok", "another process held a cache lock too long; the kernel was compiled without waiting"),
    "out_of_memory": Kind(
        "ok", "the device had no memory for scratch or outputs; the call raised, nothing was changed"
    ),
    "bad_value": Kind("ok", "a value inside a tensor was out of range; it was masked"),
    "nonfinite_rows": Kind("ok", "OPENMLA_CHECKS=strict found NaN in results, as a NaN in an attended token makes it"),
    "forked": Kind("failed", "the process was forked after CUDA was initialised"),
    "device_lost": Kind("failed", "an error that only a new process can clear; every later call on the device raises"),
    "hung": Kind("failed", "a kernel did not finish within the watchdog's time; the process should be replaced"),
    "rank_lost": Kind("failed", "a rank of a process group is dead or disagrees"),
    "rolled_back": Kind("degraded", "a rollout went back to the other backend"),
    "monitor_failed": Kind("ok", "a metrics callback, scrape or log raised; the request was not affected"),
}


@dataclass
class Incident:
    """One fault, as often as it happened for the same reason."""

    kind: str
    subject: str  # a kernel such as decode/cute/decode_dense, a device, a package, a path
    reason: str
    count: int = 0
    logged_at: float = float("-inf")
    is_over: bool = False  # no longer weighs on the health of the process

    def __str__(self) -> str:
        times = f", {self.count} times" if self.count > 1 else ""
        return f"{self.kind}: {self.subject}: {self.reason}{times}"


_incidents: dict[tuple[str, str, str], Incident] = {}
_counts: Counter[tuple[str, str]] = Counter()
_lock = threading.RLock()  # logging handlers of the user's may call back


def note(kind: str, subject: str, reason: str) -> None:
    """Count an incident of one of `KINDS`, and log it unless the same was logged within the last minute. Never raises.

    Args:
        kind: a key of KINDS.
        subject: what it happened to; keep the number of distinct ones small, it labels a metric.
        reason: one sentence; the first line is kept.
    """
    meaning = KINDS[kind]
    reason = " ".join(reason.split())[:400]
    with _lock:
        _counts[kind, subject] += 1
        key = (kind, subject, reason)
        if key not in _incidents and len(_incidents) >= _MAX_SUBJECTS:
            key = (kind, "others", "more than can be kept apart")
        found = _incidents.setdefault(key, Incident(*key))
        found.count += 1
        found.is_over = False
        now = time.monotonic()
        is_silent = now - found.logged_at < LOG_SECONDS
        if not is_silent:
            found.logged_at = now
    if not is_silent:
        level = logging.ERROR if meaning.health == "failed" else logging.WARNING
        try:
            _log.log(level, "%s: %s: %s (%s)", kind, subject, reason, meaning.meaning)
        except (OSError, ValueError):  # a full disk or a closed stream behind a handler that raises
            with _lock:
                _counts["monitor_failed", "log"] += 1


def over(subject: str) -> None:
    """What happened to `subject` no longer weighs on the process's health; counters stay."""
    with _lock:
        for each in _incidents.values():
            if each.subject == subject and KINDS[each.kind].health != "failed":
                each.is_over = True


def counts() -> dict[tuple[str, str], int]:
    """(kind, subject) -> how often, since the process began."""
    with _lock:
        return dict(_counts)


def about(prefix: str = "") -> tuple[Incident, ...]:
    """The incidents whose subject begins with `prefix`, oldest first."""
    with _lock:
        return tuple(each for each in _incidents.values() if each.subject.startswith(prefix))


def state() -> tuple[State, tuple[str, ...]]:
    """The health of this process, and a sentence for everything that weighs on it."""
    with _lock:
        open_ones = [each for each in _incidents.values() if not each.is_over and KINDS[each.kind].health != "ok"]
    kinds = {KINDS[each.kind].health for each in open_ones}
    worst: State = "failed" if "failed" in kinds else "degraded" if kinds else "ok"
    return worst, tuple(map(str, open_ones))


def reset() -> None:
    """Forget everything: a forked child starts its own history, and tests theirs."""
    global _lock
    _lock = threading.RLock()  # the parent may have been forked while it held the old one
    _incidents.clear()
    _counts.clear()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=reset)
