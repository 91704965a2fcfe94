"""The hot path: problem -> kernel -> compiled kernel -> launch, remembered at every step.

Checking a call's metadata costs more than launching a kernel, so it is done once per *signature*: everything of a
tensor that a rule looks at. A call whose signature was seen goes straight to the launch.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch

from openmla.backends import Selection, aside, select
from openmla.backends.base import DecodeKernel, DecodePlan, Kernel
from openmla.core import counters, env, incidents
from openmla.core.errors import CompileError, ProblemError, UnsupportedError
from openmla.core.layout import KVLayout
from openmla.core.problem import Problem
from openmla.core.target import Target
from openmla.ops import canary, checks, recovery
from openmla.ops.observers import around, observers, watching

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
    tally: counters.Tally
    config: Any = None
    asked: str = "auto"  # the backend that the caller asked for; only auto may go on with another kernel
    spans: tuple[int, ...] = ()  # bytes from the first to the last element of out and of each input; see check_overlap
    workspace: dict[str, int] = field(default_factory=dict)  # policy -> bytes
    tensors: Any = None  # of `ops.repeats`: what calls of this signature compare and make


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
    if tensor.layout != torch.strided:  # has neither strides nor an address; the problem's own check refuses it
        return (tensor.layout, tensor.shape)
    return (tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.data_ptr() % 16 == 0)


def prepare(
    key: tuple[Any, ...], build: Callable[[], Problem], device: torch.device, backend: str | None, tokens: int = 0
) -> Prepared:
    """The prepared call of this signature; `build` makes and checks the problem when it is new.

    `tokens` of a call are counted where the problem does not say them.

    Raises:
        ProblemError: from `build`.
        UnsupportedError: no permitted kernel.
        DeviceLostError: the device is in a state that only a new process can clear.
    """
    if recovery.LOST:
        recovery.refuse(device)
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
    if aside.anything() and aside.expired():
        forget()
    while True:
        selection = select(problem, target, wanted)
        try:
            with _lock:
                found = _make(selection, problem, target, wanted, device, tokens)
                _prepared[full_key] = found
            return found
        except Exception as error:
            if _stands_aside(selection, error, device) and wanted == "auto":
                continue
            raise


def _make(
    selection: Selection, problem: Problem, target: Target, wanted: str, device: torch.device, tokens: int
) -> Prepared:
    """Compile, or take what is compiled; a variant that is new to this process is tried by the canary first."""
    compile_key = (selection.kernel.backend, selection.kernel.name, selection.config, problem, target)
    if len(_prepared) >= _MAX_REMEMBERED:  # what is compiled stays with its backend; this is one entry per problem
        forget()
    if compile_key not in _compiled:
        begin = time.perf_counter()
        compiled = selection.kernel.compile(problem, selection.config, target)
        wrong = canary.try_out(selection.kernel, selection.config, problem, target, device)
        if wrong:
            raise _CanaryError(wrong)
        counters.add("compile_seconds", selection.kernel.backend, time.perf_counter() - begin)
        counters.add("prepared", selection.kernel.backend)
        _compiled[compile_key] = compiled
    problem = _problems.setdefault(problem, problem)
    kernel = selection.kernel
    tally = counters.tally(problem.op, kernel.backend, kernel.name, _tokens(problem) or tokens)
    return Prepared(problem, target, kernel, _compiled[compile_key], tally, selection.config, wanted)


def _tokens(problem: Any) -> int:
    if problem.op == "append":
        return 0  # of one call: they are no part of the problem, the caller says them
    return int(problem.s_q if problem.op == "sparse_prefill" else problem.total_q)


class _CanaryError(CompileError):
    """A freshly compiled kernel was wrong."""


def forget() -> None:
    """Drop what is remembered per problem; compiled code stays loaded. A live plan is still good where kernels agree."""
    for memory in (_prepared, _compiled, _problems):
        memory.clear()
    select.cache_clear()


def plan_pieces(prepared: Prepared, cache_seqlens: torch.Tensor, policy: str) -> DecodePlan:
    """The kernel's plan of a dense decode.

    Raises:
        DeviceLostError: the device is in a state that only a new process can clear.
    """
    if recovery.LOST:
        recovery.refuse(cache_seqlens.device)
    try:
        return cast(DecodeKernel, prepared.kernel).plan(prepared.compiled, prepared.problem, cache_seqlens, policy)
    except Exception as error:
        if _stands_aside(Selection(prepared.kernel, prepared.config, ()), error, cache_seqlens.device):
            forget()  # this call is lost; the next one is planned and run by another kernel
        raise


def note_memory(error: Exception, device: torch.device) -> None:
    """Note that an output or scratch did not fit."""
    incidents.note("out_of_memory", str(device), recovery.first_line(error))


def remembered() -> int:
    """Signatures of calls that go straight to the launch."""
    return len(_prepared)


def _stands_aside(selection: Selection, error: Exception, device: torch.device) -> bool:
    """Whether another kernel may serve what `error` kept this one from; notes what happened.

    Raises:
        DeviceLostError: the device is lost, and nobody can.
    """
    meaning = recovery.meaning(error)
    if meaning == "lost":
        raise recovery.lose(
            str(device), f"{recovery.first_line(error)}; seen by {aside.subject(selection.kernel)}"
        ) from error
    if meaning == "memory":
        note_memory(error, device)
    if meaning != "refused":
        return False
    compiling = isinstance(error, (CompileError, ImportError, OSError))
    kind = "canary_failed" if isinstance(error, _CanaryError) else "compile_failed" if compiling else "launch_refused"
    aside.put(selection.kernel, selection.config, kind, recovery.first_line(error))
    select.cache_clear()
    return True


def launch(prepared: Prepared, operands: Any, plan: Any = None) -> None:
    """Run it; what OPENMLA_CHECKS asks for is looked at before.

    Raises:
        ProblemError: with OPENMLA_CHECKS=strict, a value inside a tensor is bad.
        DeviceLostError: the device is in a state that only a new process can clear.
        torch.OutOfMemoryError: no memory for scratch, after PyTorch has freed its cache.
    """
    mode = env.CHECKS.read()
    if recovery.LOST:
        recovery.refuse(operands.out.device)
    if mode == "device" or mode == "strict":
        checks.before_launch(prepared.problem, operands, mode)
    prepared.tally.count()
    try:
        seen_by = watching() if observers else ()
        if seen_by:
            run = prepared.kernel.launch
            around(seen_by, prepared, operands, plan, lambda: run(prepared.compiled, prepared.problem, operands, plan))
        else:
            prepared.kernel.launch(prepared.compiled, prepared.problem, operands, plan)
        if mode == "strict":
            checks.after_launch(prepared.problem, operands)
    except Exception as error:
        if ran_elsewhere(prepared, operands, error):
            return
        raise


def ran_elsewhere(prepared: Prepared, operands: Any, error: Exception) -> bool:
    """After a refused launch, put the kernel aside and run the call on the next one; not while a graph is captured."""
    device, problem = operands.out.device, prepared.problem
    if not _stands_aside(Selection(prepared.kernel, prepared.config, ()), error, device):
        return False
    forget()
    if prepared.asked != "auto" or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return False
    selection = select(problem, prepared.target, "auto")
    with _lock:
        found = _make(selection, problem, prepared.target, "auto", device, prepared.tally.tokens)
    plan = None
    if problem.op == "decode":
        kernel: Any = found.kernel
        policy = "batch_invariant" if problem.is_batch_invariant else "balanced"
        plan = kernel.plan(found.compiled, problem, operands.cache_seqlens, policy)
        needed = kernel.workspace_bytes(found.compiled, problem, policy)
        scratch = torch.empty(needed, dtype=torch.uint8, device=device) if needed else None
        operands = operands._replace(workspace=scratch)
    launch(found, operands, plan)
    return True


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
    if given.layout != torch.strided:
        raise ProblemError(op, [f"out must be a strided tensor, got {given.layout}"])
    if _overlaps_itself(given):
        wrong.append(
            f"out must have one place per element, got strides {given.stride()}; pass a tensor that owns its memory"
        )
    if given.dim() and given.shape[-1] > 1 and given.stride(-1) != 1:
        wrong.append(f"out must be contiguous in its last dimension, got strides {given.stride()}")
    if wrong:
        raise ProblemError(op, wrong)


def _overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether two elements may share an address, as in an expanded tensor."""
    reach = 0
    for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if step <= reach:
                return True
            reach += step * (size - 1)
    return False


def check_overlap(prepared: Prepared, out: torch.Tensor, inputs: tuple[torch.Tensor | None, ...]) -> None:
    """A caller's `out` shares no byte with an input. Extents follow from the signature; addresses are new each call.

    Not looked at with OPENMLA_CHECKS=off.

    Raises:
        ProblemError: it does.
    """
    if env.CHECKS.read() == "off":
        return
    if not prepared.spans:
        prepared.spans = tuple(map(extent, (out, *inputs)))
    begin = out.data_ptr()
    end = begin + prepared.spans[0]
    for tensor, span in zip(inputs, prepared.spans[1:], strict=True):
        if tensor is not None and span:
            low = tensor.data_ptr()
            if begin < low + span and low < end:
                raise ProblemError(
                    prepared.problem.op, ["out must not overlap an input in memory; pass a tensor of its own"]
                )


def extent(tensor: torch.Tensor | None) -> int:
    """Bytes from a tensor's first element to behind its last one."""
    if tensor is None or not tensor.numel():
        return 0
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
