"""What an exception from a launch means, and the devices that this process has lost.

Three answers. *Lost*: an error that CUDA clears only by ending the process; nothing runs on the device any more, and no
other backend is tried, because it would fail too and hide the cause. *Memory*: PyTorch has freed its cache and tried
again before it raised; the call raises, nothing was changed. *Refused*: the driver or compiler declined before anything
ran; another kernel may serve the call. Anything else is a bug, and is raised as it is.
"""

from __future__ import annotations

import os
import re
from typing import Literal

import torch

from openmla.core import incidents
from openmla.core.errors import CompileError, DeviceLostError

Meaning = Literal["lost", "memory", "refused", "bug"]

# cudaError_t values and their texts. 700 illegal address, 702 timeout, 710 assert, 714 hardware stack, 715 illegal
# instruction, 716 misaligned address, 717 invalid address space, 718 invalid pc, 719 launch failure; 214 ECC, 46 gone.
_LOST_CODES = frozenset({46, 214, 700, 702, 710, 714, 715, 716, 717, 718, 719})
_LOST_TEXTS = re.compile(
    r"illegal memory access|misaligned address|illegal instruction|invalid program counter|hardware stack error"
    r"|address space|unspecified launch failure|device-side assert|launch timed out|uncorrectable ECC|fallen off the bus",
    re.IGNORECASE,
)
# 1 invalid value, 9 configuration, 98 device function, 200 image, 209 no image, 218 PTX, 222 toolchain, 701 resources.
_REFUSED_CODES = frozenset({1, 9, 98, 200, 209, 218, 222, 701, 720})
_REFUSED_TEXTS = re.compile(
    r"invalid argument|invalid configuration|invalid device function|invalid resource handle|no kernel image"
    r"|image is invalid|too many resources|out of resource|PTX was compiled|unsupported toolchain|ptxas|compilation failed",
    re.IGNORECASE,
)
_REFUSED_TYPES = frozenset({"OutOfResources", "CompilationError", "CompileTimeAssertionFailure", "PTXASError"})

LOST: dict[str, str] = {}  # device -> reason; "cuda" stands for every CUDA device. Empty in a healthy process.


def meaning(error: BaseException) -> Meaning:
    """What an exception of a plan, compile or launch means for the call and for the device."""
    if isinstance(error, DeviceLostError):
        return "lost"
    text = str(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
        return "memory"
    if type(error).__name__ in _REFUSED_TYPES or isinstance(error, (CompileError, ImportError, OSError)):
        return "refused"
    if not isinstance(error, RuntimeError) or ("cuda" not in text.lower() and "device" not in text.lower()):
        return "bug"
    found = re.search(r"CUDA error[: ]+(\d+)", text)
    code = int(found.group(1)) if found else getattr(error, "error_code", None)
    if code in _LOST_CODES or _LOST_TEXTS.search(text):
        return "lost"
    return "refused" if code in _REFUSED_CODES or _REFUSED_TEXTS.search(text) else "bug"


def lose(device: str, reason: str, *, kind: str = "device_lost") -> DeviceLostError:
    """Mark a device as lost for this process, note it, and return the error to raise."""
    LOST.setdefault(device, reason)
    incidents.note(kind, device, reason)
    return DeviceLostError(device, reason)


def refuse(device: torch.device) -> None:
    """Raises DeviceLostError if `device` is lost; does not touch the device."""
    reason = LOST.get(str(device)) or LOST.get(device.type)
    if reason:
        raise DeviceLostError(str(device), reason)


def first_line(error: BaseException) -> str:
    """Type and first line of an exception."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _after_fork() -> None:
    """CUDA cannot be used in a forked child. PyTorch says so from somewhere deep; here it is said before the launch."""
    LOST.clear()
    if torch.cuda.is_initialized():
        lose("cuda", "forked after CUDA was initialised; start workers with the spawn method", kind="forked")


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_after_fork)
