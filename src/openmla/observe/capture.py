"""Asking a GPU something from one thread while another thread captures a CUDA graph.

A capture forbids calls such as "has this event passed?" on every thread, unless that thread has said that it knows what
it does: else the question fails *and* spoils the other thread's capture.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch

from openmla.core import incidents

_RELAXED = 2  # cudaStreamCaptureModeRelaxed


@cache
def _exchange() -> Any:
    """CudaThreadExchangeStreamCaptureMode of the runtime that PyTorch has loaded; None where there is none."""
    if torch.version.cuda is None:
        return None
    try:
        runtime = ctypes.CDLL(f"libcudart.so.{torch.version.cuda.split('.')[0]}")
        return runtime.cudaThreadExchangeStreamCaptureMode
    except (OSError, AttributeError) as error:
        incidents.note("monitor_failed", "capture", f"captures on other threads may fail beside the monitor: {error}")
        return None


@contextlib.contextmanager
def relaxed() -> Iterator[None]:
    """Inside, the calling thread may ask the device, whatever other threads capture."""
    exchange = _exchange()
    if exchange is None:
        yield
        return
    mode = ctypes.c_int(_RELAXED)
    exchange(ctypes.byref(mode))  # hands back the mode that was
    try:
        yield
    finally:
        exchange(ctypes.byref(mode))
