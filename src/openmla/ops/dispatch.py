"""The hot path: problem -> kernel -> compiled kernel -> launch, remembered at every step.

Checking a call's metadata costs more than launching a kernel, so it is done once per *signature*: everything of a
tensor that a rule looks at. A call whose signature was seen goes straight to the launch.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from openmla.backends import select
from openmla.backends.base import Kernel
from openmla.core import env, faults
from openmla.core.errors import ProblemError, UnsupportedError
from openmla.core.layout import KVLayout
from openmla.core.problem import Problem
from openmla.core.target import Target

LseBase = Literal["e", "2"]
LOG2_E = 1.4426950408889634

# A signature holds shapes; a server with ever-changing shapes must not grow without bound.
_MAX_REMEMBERED = 8192


@dataclass(frozen=True)
class Prepared:
    """A problem that was checked, with the kernel that runs it, ready to launch."""

    problem: Any
    target: Target
    kernel: Kernel
    compiled: Any


_prepared: dict[tuple[Any, ...], Prepared] = {}
_compiled: dict[tuple[Any, ...], Any] = {}
_lock = threading.Lock()


def signature(tensor: torch.Tensor | None) -> tuple[Any, ...] | None:
    """What the rules of `core.problem` can see of a tensor, and the alignment that kernels choose by."""
    if tensor is None:
        return None
    if not isinstance(tensor, torch.Tensor):
        return (type(tensor).__name__,)
    return (tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.data_ptr() % 16 == 0)


def prepare(key: tuple[Any, ...], build: Callable[[], Problem], device: torch.device, backend: str | None) -> Prepared:
    """The prepared call of this signature; `build` makes and checks the problem when it is new.

    Raises:
        ProblemError: from `build`.
        UnsupportedError: no permitted kernel.
    """
    wanted = backend or env.BACKEND.read()
    full_key = (*key, device, wanted)
    try:
        found = _prepared.get(full_key)
    except TypeError:  # an unhashable option: let the problem's own check name it
        build()
        raise
    if found is not None:
        return found
    problem = build()
    target = Target.detect(device)
    selection = select(problem, target, wanted)
    compile_key = (selection.kernel.backend, selection.kernel.name, selection.config, problem, target)
    with _lock:
        if compile_key not in _compiled:
            _compiled[compile_key] = selection.kernel.compile(problem, selection.config, target)
        if len(_prepared) >= _MAX_REMEMBERED:
            _prepared.clear()
        found = Prepared(problem, target, selection.kernel, _compiled[compile_key])
        _prepared[full_key] = found
    return found


def launch(prepared: Prepared, operands: Any, plan: Any = None) -> None:
    """Run it. With OPENMLA_CHECKS=strict, wait and raise ProblemError if a value inside a tensor was bad."""
    prepared.kernel.launch(prepared.compiled, prepared.problem, operands, plan)
    if env.CHECKS.read() == "strict":
        found = faults.check_errors(operands.out.device)
        if found:
            raise ProblemError(prepared.problem.op, [faults.MEANING[fault] for fault in found])


def device_of(q: Any) -> torch.device:
    """Device of a query; the CPU where it is no tensor, so that the problem's own check can say what is wrong."""
    return q.device if isinstance(q, torch.Tensor) else torch.device("cpu")


def scale_of(softmax_scale: float | None, d_qk: int) -> float:
    """The scale in force."""
    return 1.0 / math.sqrt(d_qk) if softmax_scale is None else float(softmax_scale)


def check_lse_base(op: str, base: str) -> None:
    """Raises ProblemError unless base is "e" or "2"."""
    if base not in ("e", "2"):
        raise ProblemError(op, [f"lse_base must be 'e' (natural) or '2', got {base!r}"])


def layout_name(layout: KVLayout | str | None) -> str | None:
    """A layout as a graph stores it. Raises UnsupportedError for one that its name does not determine."""
    if not isinstance(layout, KVLayout):
        return layout
    if layout.is_quantised or layout.d_v == min(layout.d_qk, 512):
        return layout.name
    raise UnsupportedError(
        "a compiled graph stores a KV layout by its name",
        {"torch.compile": ("this KVLayout differs from the one its name stands for; call eagerly",)},
        str(layout),
    )


def check_out(
    op: str,
    given: torch.Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    inputs: tuple[Any, ...],
) -> None:
    """A caller's `out`: shape, dtype, device, contiguous last dimension, and no byte shared with an input.

    Raises:
        ProblemError: with every violation.
    """
    wrong = []
    if tuple(given.shape) != shape:
        wrong.append(f"out must have shape {shape}, got {tuple(given.shape)}")
    if given.dtype != dtype:
        wrong.append(f"out must have the dtype of q ({dtype}), got {given.dtype}")
    if given.device != device:
        wrong.append(f"out must be on {device} like q, got {given.device}")
    if given.dim() and given.shape[-1] > 1 and given.stride(-1) != 1:
        wrong.append(f"out must be contiguous in its last dimension, got strides {given.stride()}")
    if not wrong and given.numel():
        begin, end = _extent(given)
        for tensor in inputs:
            if isinstance(tensor, torch.Tensor) and tensor.numel() and tensor.device == device:
                low, high = _extent(tensor)
                if begin < high and low < end:
                    wrong.append("out must not overlap an input in memory; pass a tensor of its own")
                    break
    if wrong:
        raise ProblemError(op, wrong)


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte and one past the last byte that a tensor touches."""
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return begin, begin + (last + 1) * tensor.element_size()
