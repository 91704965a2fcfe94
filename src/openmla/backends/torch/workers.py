"""Threads of our own, each running PyTorch operators on one core, and scratch memory that belongs to a thread.

PyTorch's own threading joins all threads after every operator; on shared cores one late thread stops the rest, and
an attention tile has a dozen operators. Here a thread keeps its tile from the first operator to the last.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import torch


class Scratch:
    """Buffers by name, reused from tile to tile: a fresh 600 KB tensor costs 30 us of page faults."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self._views: dict[tuple[str, torch.dtype, tuple[int, ...]], torch.Tensor] = {}

    def take(self, name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """A contiguous tensor of that shape, contents undefined; valid until the same name is taken again."""
        view = self._views.get((name, dtype, shape))
        if view is None:
            size = 1
            for extent in shape:
                size *= extent
            buffer = self._buffers.get((name, dtype))
            if buffer is None or buffer.numel() < size:
                buffer = torch.empty(size, dtype=dtype, device="cpu")
                self._buffers[name, dtype] = buffer
                self._views = {key: kept for key, kept in self._views.items() if key[:2] != (name, dtype)}
            view = self._views[name, dtype, shape] = buffer[:size].view(shape)
        return view


class _ThreadState(threading.local):
    def __init__(self) -> None:
        self.scratch = Scratch()


_state = _ThreadState()


def scratch() -> Scratch:
    """The calling thread's buffers."""
    return _state.scratch


def _in_fresh_thread(work: Callable[[], Any]) -> Any:
    """What `work` returns in a thread that PyTorch has not seen yet."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


class _Crew:
    """Worker threads that never end; a job is a function that each of some of them calls once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._size = 0

    def run(self, job: Callable[[], None], width: int) -> None:
        """Calls `job` in `width` threads and waits for all; raises the first exception that one of them raised."""
        self._grow(width)
        errors: list[BaseException] = []
        left = threading.Semaphore(0)

        def once() -> None:
            try:
                job()
            except BaseException as error:
                errors.append(error)
            finally:
                left.release()

        for _ in range(width):
            self._jobs.put(once)
        for _ in range(width):
            left.acquire()
        if errors:
            raise errors[0]

    def _grow(self, width: int) -> None:
        if self._size >= width:
            return
        with self._lock:
            if self._size >= width:
                return
            # A thread's first look at set_num_threads(n) also makes n the default of threads born later, so the
            # default is read before and put back after, in threads that end at once. The caller's own setting
            # lives in the caller's thread and is never touched.
            default = _in_fresh_thread(torch.get_num_threads)
            ready = threading.Semaphore(0)
            for _ in range(width - self._size):
                threading.Thread(target=self._serve, args=(ready,), name="openmla-worker", daemon=True).start()
                ready.acquire()
            _in_fresh_thread(lambda: torch.set_num_threads(default))
            self._size = width

    def _serve(self, ready: threading.Semaphore) -> None:
        # The first look makes PyTorch give this thread the default number; asked later, it would undo the 1.
        torch.get_num_threads()
        torch.set_num_threads(1)
        ready.release()
        with torch.inference_mode():
            while True:
                self._jobs.get()()


_crew = _Crew()


def _forget_threads() -> None:
    global _crew
    _crew = _Crew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


def run(job: Callable[[], None], width: int) -> None:
    """Calls `job` in `width` worker threads at once, each limited to one core, and waits for all of them."""
    _crew.run(job, width)
