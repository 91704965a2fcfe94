"""The hot path: problem -> kernel -> compiled kernel -> launch, remembered at every step.

Checking a call's metadata costs more than launching a kernel, so it is done once per *signature*: everything of a
tensor that a rule looks at. A call whose signature was seen goes straight to the launch.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
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


@dataclass
class Prepared:
    """A problem that was checked, with the kernel that runs it, ready to launch; shared by calls of one signature."""

    problem: Any
    target: Target
    kernel: Kernel
    compiled: Any
    spans: tuple[int, ...] = ()  # bytes from the first to the last element of out and of each input; see check_overlap
    workspace: dict[str, int] = field(default_factory=dict)  # policy -> bytes


_prepared: dict[tuple[Any, ...], Prepared] = {}
_problems: dict[Problem, Problem] = {}  # equal problems become one object: plans are checked by identity first
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
        if len(_prepared) >= _MAX_REMEMBERED:  # what is compiled stays with its backend; this is one entry per problem
            for memory in (_prepared, _compiled, _problems):
                memory.clear()
        if compile_key not in _compiled:
            _compiled[compile_key] = selection.kernel.compile(problem, selection.config, target)
        problem = _problems.setdefault(problem, problem)
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
    op: str, given: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """A caller's `out`: shape, dtype, device, contiguous last dimension. Part of a signature's check.

    Raises:
        ProblemError: with every violation.
    """
    if given is None:
        return
    if not isinstance(given, torch.Tensor):
        raise ProblemError(op, [f"out must be a tensor or None, got {type(given).__name__}"])
    wrong = []
    if tuple(given.shape) != shape:
        wrong.append(f"out must have shape {shape}, got {tuple(given.shape)}")
    if given.dtype != dtype:
        wrong.append(f"out must have the dtype of q ({dtype}), got {given.dtype}")
    if given.device != device:
        wrong.append(f"out must be on {device} like q, got {given.device}")
    if given.dim() and given.shape[-1] > 1 and given.stride(-1) != 1:
        wrong.append(f"out must be contiguous in its last dimension, got strides {given.stride()}")
    if wrong:
        raise ProblemError(op, wrong)


def check_overlap(prepared: Prepared, out: torch.Tensor, inputs: tuple[torch.Tensor | None, ...]) -> None:
    """A caller's `out` shares no byte with an input. Extents follow from the signature; addresses are new each call.

    Raises:
        ProblemError: it does.
    """
    if not prepared.spans:
        prepared.spans = tuple(map(_span, (out, *inputs)))
    begin = out.data_ptr()
    end = begin + prepared.spans[0]
    for tensor, span in zip(inputs, prepared.spans[1:], strict=True):
        if tensor is not None and span:
            low = tensor.data_ptr()
            if begin < low + span and low < end:
                raise ProblemError(
                    prepared.problem.op, ["out must not overlap an input in memory; pass a tensor of its own"]
                )


def _span(tensor: torch.Tensor | None) -> int:
    """Bytes from a tensor's first element to behind its last one."""
    if tensor is None or not tensor.numel():
        return 0
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
