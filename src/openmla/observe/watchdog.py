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

import ctypes
import faulthandler
import logging
import os
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from openmla.backends import aside
from openmla.core import incidents
from openmla.core.errors import ConfigError
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
    what: str
    since: float


class Watchdog:
    """One thread that watches every device of the process; see the module."""

    def __init__(self, seconds: float, exit_code: int | None, poll_seconds: float = 0.25) -> None:
        if not seconds > 0:
            raise ConfigError(f"watchdog: seconds must be > 0, got {seconds!r}")
        self.seconds, self.exit_code, self.poll_seconds = seconds, exit_code, poll_seconds
        self._pending: dict[str, _Pending] = {}  # device -> the mark under way
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="openmla-watchdog", daemon=True)

    # --- on the thread of a call

    def before(self, prepared: Any, operands: Any, plan: Any) -> None:
        """Nothing: what counts is what was launched."""

    def after(self, prepared: Any, operands: Any, plan: Any, begun: Any) -> None:
        """Mark the stream behind this launch, unless a mark is under way on the device."""
        device = operands.out.device
        if device.type != "cuda" or str(device) in self._pending or torch.cuda.is_current_stream_capturing():
            return
        self.mark(device, f"{aside.subject(prepared.kernel)} {prepared.config}, {prepared.problem}")

    def mark(self, device: torch.device, what: str) -> None:
        """Watch the current stream of `device`."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        self.expect(str(device), event, what)

    def expect(self, device: str, mark: Mark, what: str) -> None:
        """Watch a mark of any kind."""
        self._pending.setdefault(device, _Pending(mark, what, time.monotonic()))

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
        _allow_queries_during_capture()
        while not self._stop.wait(self.poll_seconds):
            self.look()

    def look(self) -> None:
        """Ask once about every mark."""
        for device, each in list(self._pending.items()):
            try:
                is_done = each.mark.query()
            except RuntimeError as error:
                self._pending.pop(device, None)
                if recovery.meaning(error) == "lost":
                    recovery.lose(device, f"{recovery.first_line(error)}; seen by the watchdog behind {each.what}")
                continue
            if is_done:
                self._pending.pop(device, None)
            elif time.monotonic() - each.since > self.seconds:
                self._pending.pop(device, None)
                self._bark(device, each)

    def _bark(self, device: str, each: _Pending) -> None:
        reason = f"no end after {self.seconds:.0f} s: {each.what}"
        recovery.lose(device, reason, kind="hung")
        try:
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)  # no values of tensors in it
        except (OSError, ValueError, AttributeError):  # a closed or replaced stderr
            _log.error("the stacks of the threads could not be written")
        if self.exit_code is not None:
            logging.shutdown()
            os._exit(self.exit_code)  # a thread that waits for the device never runs its `finally`


def _allow_queries_during_capture() -> None:
    """Let this thread ask about events while another thread captures a CUDA graph, which else would spoil the capture."""
    if torch.version.cuda is None:
        return
    try:
        runtime = ctypes.CDLL(f"libcudart.so.{torch.version.cuda.split('.')[0]}")
        relaxed = ctypes.c_int(2)  # cudaStreamCaptureModeRelaxed
        runtime.cudaThreadExchangeStreamCaptureMode(ctypes.byref(relaxed))
    except (OSError, AttributeError) as error:
        incidents.note("monitor_failed", "watchdog", f"captures on other threads may fail beside it: {error}")


_running: Watchdog | None = None
_lock = threading.Lock()


def start(seconds: float = 10.0, *, exit_code: int | None = None) -> Watchdog:
    """Watch every launch of this process from now on; a second call replaces the first.

    Args:
        seconds: a mark that has not passed after so long counts as a hang. Longer than the longest work of any library
            on the same stream: the mark waits for that, too.
        exit_code: end the process with it after a hang; default: go on, with `openmla.health()` failed and every later
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
    if _running is not None and str(torch.device(device)) not in _running._pending:
        where = torch.device(device)
        if where.index is None:
            where = torch.device("cuda", torch.cuda.current_device())
        _running.mark(where, what)
