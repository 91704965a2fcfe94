"""The watchdog: notices that a kernel does not finish, says what it was, and marks the process as failed.

    from openmla.observe import watchdog
    watchdog.start(seconds=10, exit_code=70)    # once per process; off by default
    watchdog.watch("decode graph")              # after a CUDA-graph replay, which no Python call announces

A launch on a GPU returns before the kernel runs, so a kernel that hangs shows nowhere until somebody waits for the
device, and then the waiting thread hangs too. The watchdog records one CUDA event behind a launch (not behind every one:
one is under way per device at a time) and a thread asks whether it has passed. Clock: monotonic, so that a clock that is
set does not matter; a starved thread compares times that it took itself, so it is late rather than wrong.
"""

from __future__ import annotations

import faulthandler
import itertools
import logging
import os
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from openmla.backends import aside
from openmla.core.errors import ConfigError
from openmla.observe import capture
from openmla.ops import observers, recovery

_log = logging.getLogger("openmla")


class Mark(Protocol):
    """What the watchdog asks of an event on a stream."""

    def query(self) -> bool:
        """Whether everything before it has finished. Raises RuntimeError when the device is lost."""
        ...


@dataclass
class _Pending:
    mark: Mark
    what: Any  # a Prepared, or words
    since: float


def _described(what: Any) -> str:
    return what if isinstance(what, str) else f"{aside.subject(what.kernel)} {what.config}, {what.problem}"


@dataclass
class _Stream:
    """The mark that is waited for, and the one behind the newest launch. A busy stream always has work under way: what
    counts as a hang is that one and the same mark does not pass.
    """

    waited: _Pending
    newest: tuple[Mark, str] | None = None


class Watchdog:
    """One thread that watches every stream of the process that launches come on; see the module."""

    def __init__(self, seconds: float, exit_code: int | None, poll_seconds: float = 0.25) -> None:
        if not seconds > 0:
            raise ConfigError(f"watchdog: seconds must be > 0, got {seconds!r}")
        self.wants = itertools.repeat(True).__next__
        self.seconds, self.exit_code, self.poll_seconds = seconds, exit_code, poll_seconds
        self._streams: dict[tuple[str, int], _Stream] = {}  # (device, stream)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="openmla-watchdog", daemon=True)

    # --- on the thread of a call

    def before(self, prepared: Any, operands: Any, plan: Any) -> None:
        """Nothing: what counts is what was launched."""

    def after(self, prepared: Any, operands: Any, plan: Any, begun: Any) -> None:
        """Mark the stream behind this launch."""
        device = operands.out.device
        if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            self.mark(device, prepared)

    def mark(self, device: torch.device, what: Any) -> None:
        """Watch the current stream of `device`; `what` is described only if it hangs."""
        stream = torch.cuda.current_stream(device)
        key = (str(device), stream.cuda_stream)
        known = self._streams.get(key)
        if known is None:
            first = torch.cuda.Event()
            first.record(stream)
            self._streams[key] = _Stream(_Pending(first, what, time.monotonic()))
            return
        newest = known.newest
        event: Any = (
            newest[0] if newest is not None else torch.cuda.Event()
        )  # recorded anew: it moves behind this launch
        event.record(stream)
        known.newest = (event, what)

    def expect(self, device: str, mark: Mark, what: Any) -> None:
        """Watch a mark of any kind."""
        self._streams[device, 0] = _Stream(_Pending(mark, what, time.monotonic()))

    # --- on the watchdog's thread

    def start(self) -> None:
        """Begin."""
        observers.add(self)
        self._thread.start()

    def stop(self) -> None:
        """End; waits for the thread."""
        observers.remove(self)
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        with capture.relaxed():
            while not self._stop.wait(self.poll_seconds):
                self.look()

    def look(self) -> None:
        """Ask once about every mark."""
        for key, each in list(self._streams.items()):
            waited = each.waited
            try:
                is_done = waited.mark.query()
            except RuntimeError as error:
                self._streams.pop(key, None)
                if recovery.meaning(error) == "lost":
                    reason = f"{recovery.first_line(error)}; seen by the watchdog behind {_described(waited.what)}"
                    recovery.lose(key[0], reason)
                continue
            if is_done and each.newest is not None:
                newest, each.newest = each.newest, None
                each.waited = _Pending(*newest, time.monotonic())
            elif is_done:
                self._streams.pop(key, None)
            elif time.monotonic() - waited.since > self.seconds:
                self._streams.pop(key, None)
                self._hung(key[0], waited)

    def _hung(self, device: str, each: _Pending) -> None:
        reason = f"no end after {self.seconds:.0f} s: {_described(each.what)}"
        recovery.lose(device, reason, kind="hung")
        try:
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)  # no values of tensors in it
        except (OSError, ValueError, AttributeError):  # a closed or replaced stderr
            _log.error("the stacks of the threads could not be written")
        if self.exit_code is not None:
            logging.shutdown()
            os._exit(self.exit_code)  # a thread that waits for the device never runs its `finally`


_running: Watchdog | None = None
_lock = threading.Lock()


def start(seconds: float = 10.0, *, exit_code: int | None = None) -> Watchdog:
    """Watch every launch of this process from now on; a second call replaces the first.

    Args:
        seconds: a mark that has not passed after so long counts as a hang. Longer than the longest work of any library
            on the same stream: the mark waits for that, too.
        exit_code: end the process with it after a hang; default: go on, with `openmla.observe.metrics.health()` failed and every later
            call on the device raising DeviceLostError.

    Raises:
        ConfigError: seconds is not above 0.
    """
    global _running
    with _lock:
        if _running is not None:
            _running.stop()
        _running = Watchdog(seconds, exit_code)
        _running.start()
        return _running


def stop() -> None:
    """Watch no longer."""
    global _running
    with _lock:
        if _running is not None:
            _running.stop()
        _running = None


def watch(what: str, device: torch.device | str = "cuda") -> None:
    """Watch what is on the current stream now, such as a replayed CUDA graph; nothing without a running watchdog."""
    if _running is not None:
        where = torch.device(device)
        _running.mark(torch.device("cuda", torch.cuda.current_device()) if where.index is None else where, what)
