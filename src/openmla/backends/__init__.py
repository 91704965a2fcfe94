"""The table of kernels, the one rule that picks from it, and the explanation.

`TABLE[op]` is ordered: the first kernel whose `supports` is true runs. A named backend never falls back: it runs or
raises UnsupportedError with every reason. `auto` walks the table; passing over a kernel that was built for this kind
of machine is logged once and counted.
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, cast

# Not `import torch`: loading the subpackage openmla.backends.torch rebinds that name in this module.
from torch import Tensor, bfloat16

from openmla.backends import aside
from openmla.backends.base import Kernel, Unbuilt, Verdict
from openmla.core import env, incidents
from openmla.core.errors import ConfigError, UnsupportedError
from openmla.core.layout import kv_layout
from openmla.core.problem import (
    AppendProblem,
    DecodeProblem,
    PrefillProblem,
    Problem,
    SparseDecodeProblem,
    SparsePrefillProblem,
)
from openmla.core.target import Target

BACKENDS: tuple[str, ...] = ("cute", "triton", "torch")
OPS: tuple[str, ...] = ("decode", "sparse_decode", "sparse_prefill", "prefill", "append")

_log = logging.getLogger("openmla")


@dataclass(frozen=True)
class Slot:
    """A kernel by address, imported on first use: `module` holds it under the name `attribute`."""

    module: str
    attribute: str


# Order is preference. Third parties add theirs with `extend`.
TABLE: dict[str, tuple[Slot | Kernel, ...]] = {
    "decode": (
        Slot("openmla.backends.cute.decode", "FEW_ROWS"),
        Slot("openmla.backends.cute.decode", "MANY_ROWS"),
        Slot("openmla.backends.cute.decode", "CODED_ROWS"),
        Slot("openmla.backends.triton", "DECODE"),
        Slot("openmla.backends.torch", "DECODE"),
    ),
    "sparse_decode": (
        Slot("openmla.backends.cute.few_rows", "SPARSE_DECODE_FEW"),
        Slot("openmla.backends.cute.sparse", "SPARSE_DECODE"),
        Slot("openmla.backends.cute.gathered", "SPARSE_DECODE_ROWS"),
        Slot("openmla.backends.triton", "SPARSE_DECODE"),
        Slot("openmla.backends.torch", "SPARSE_DECODE"),
    ),
    "sparse_prefill": (
        Slot("openmla.backends.cute.gathered", "SPARSE_PREFILL"),
        Slot("openmla.backends.triton", "SPARSE_PREFILL"),
        Slot("openmla.backends.torch", "SPARSE_PREFILL"),
    ),
    "prefill": (
        Unbuilt(
            "prefill",
            "cute",
            "prefill_varlen",
            "not built: maintained libraries are faster: FlashAttention 3 where it is installed, cuDNN for even batches",
        ),
        Slot("openmla.backends.torch", "PREFILL_FLASH3"),
        Slot("openmla.backends.torch", "PREFILL_CUDNN"),
        Slot("openmla.backends.triton", "PREFILL"),
        Slot("openmla.backends.torch", "PREFILL"),
    ),
    "append": (
        Slot("openmla.backends.cute.append", "APPEND"),
        Slot("openmla.backends.triton", "APPEND"),
        Slot("openmla.backends.torch", "APPEND"),
    ),
}

fallbacks: Counter[tuple[str, str, str, str]] = Counter()  # (op, passed over, chosen, first reason) -> selections
_logged: set[tuple[str, str, str, str]] = set()
_lock = threading.Lock()


@cache
def _load(op: str, slot: Slot) -> Kernel:
    """The kernel at an address; one that says why not where its module cannot be imported."""
    try:
        return cast(Kernel, getattr(importlib.import_module(slot.module), slot.attribute))
    except (ImportError, OSError) as error:  # a missing package, or a library of it that the loader refuses
        backend = next(name for name in BACKENDS if name in slot.module.split("."))
        reason = f"{slot.module} cannot be imported: {type(error).__name__}: {error}"
        incidents.note("backend_unavailable", f"{op}/{backend}/{slot.attribute.lower()}", reason)
        return Unbuilt(op, backend, slot.attribute.lower(), reason)


def kernels(op: str) -> tuple[Kernel, ...]:
    """The kernels of one operation in order of preference. Raises ConfigError for an unknown operation."""
    if op not in TABLE:
        raise ConfigError(f"unknown operation {op!r}; use one of: {', '.join(TABLE)}")
    return tuple(_load(op, entry) if isinstance(entry, Slot) else entry for entry in TABLE[op])


@cache
def value_kernel() -> Callable[[Any, Any, Tensor], None] | None:
    """What looks at ids and lengths on a GPU: `check(problem, operands, record)`; None without Triton."""
    if not env.is_importable("triton"):
        return None
    try:
        check = importlib.import_module("openmla.backends.triton.values").check
    except (ImportError, OSError) as error:
        incidents.note("backend_unavailable", "checks/triton", f"{type(error).__name__}: {error}")
        return None
    return cast("Callable[[Any, Any, Tensor], None]", check)


def extend(op: str, kernel: Kernel, *, before: str | None = None) -> None:
    """Add a kernel of your own, in front of the first kernel of backend `before` (default: in front of all).

    Raises ConfigError for an unknown operation, or what is no kernel of it (`openmla.backends.base.Kernel`).
    """
    present = kernels(op)
    verbs = ("backend", "name", "supports", "configs", "compile", "launch")
    missing = [verb for verb in verbs if not hasattr(kernel, verb)]
    if missing:
        raise ConfigError(f"a kernel needs {', '.join(verbs)}; {type(kernel).__name__} lacks {', '.join(missing)}")
    if kernel.op != op:
        raise ConfigError(f"this is a kernel of {kernel.op}, not of {op}; extend({kernel.op!r}, ...)")
    position = next((i for i, other in enumerate(present) if other.backend == before), 0) if before else 0
    TABLE[op] = (*TABLE[op][:position], kernel, *TABLE[op][position:])
    select.cache_clear()


@dataclass(frozen=True)
class Candidate:
    """One row of an explanation: a kernel, its verdict, whether it is the one that runs, and then as which variant."""

    backend: str
    kernel: str
    verdict: Verdict
    is_chosen: bool
    variant: str = ""


@dataclass(frozen=True)
class Selection:
    """The kernel that runs a problem, how, and every candidate with its reasons."""

    kernel: Kernel
    config: Any
    candidates: tuple[Candidate, ...]


def _verdicts(problem: Problem, target: Target, backend: str) -> list[tuple[Kernel, Verdict]]:
    found = []
    for kernel in kernels(problem.op):
        if backend not in ("auto", kernel.backend):
            found.append((kernel, Verdict((f"backend={backend!r} was asked for",))))
            continue
        verdict = kernel.supports(problem, target)
        if verdict and aside.anything():
            reason = aside.why(kernel, kernel.configs(problem, target)[0])
            verdict = Verdict((reason,)) if reason else verdict
        found.append((kernel, verdict))
    return found


@lru_cache(maxsize=4096)
def select(problem: Problem, target: Target, backend: str = "auto") -> Selection:
    """The first kernel of the table that may run `problem` on `target`.

    Raises:
        ConfigError: backend is not auto, cute, triton or torch.
        UnsupportedError: no permitted kernel; carries every reason.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise ConfigError(f"unknown backend {backend!r}; use one of: auto, {', '.join(BACKENDS)}")
    verdicts = _verdicts(problem, target, backend)
    chosen = next((kernel for kernel, verdict in verdicts if verdict), None)
    if chosen is None:
        raise UnsupportedError(
            f"{problem.op} cannot run on {target} with backend={backend!r}{_way_out(problem, target, backend)}",
            {f"{kernel.backend}/{kernel.name}": verdict.reasons for kernel, verdict in verdicts},
            str(problem),
        )
    if backend == "auto":  # a named backend never falls back
        _note_fallbacks(problem, target, chosen, verdicts)
    rows = tuple(Candidate(k.backend, k.name, verdict, k is chosen) for k, verdict in verdicts)
    return Selection(chosen, chosen.configs(problem, target)[0], rows)


def _way_out(problem: Problem, target: Target, backend: str) -> str:
    """What the default would run where a named backend cannot; empty where nothing can."""
    others = () if backend == "auto" else _verdicts(problem, target, "auto")
    found = next((f"{kernel.backend}/{kernel.name}" for kernel, verdict in others if verdict), None)
    return f"; backend='auto' would run {found}" if found else ""


def _note_fallbacks(problem: Problem, target: Target, chosen: Kernel, verdicts: list[tuple[Kernel, Verdict]]) -> None:
    """On a GPU, count and log each kernel that was passed over for another backend's.

    A CPU has one backend, and two kernels of one backend share the work by shape: neither is a fallback.
    """
    if not target.is_cuda:
        return
    for kernel, verdict in verdicts:
        if kernel is chosen:
            return
        if kernel.backend == chosen.backend:
            continue
        key = (problem.op, f"{kernel.backend}/{kernel.name}", f"{chosen.backend}/{chosen.name}", verdict.reasons[0])
        with _lock:
            fallbacks[key] += 1
            is_new = key not in _logged
            _logged.add(key)
        if is_new:
            _log.warning("%s: %s passed over for %s: %s", key[0], key[1], key[2], "; ".join(verdict.reasons))


@dataclass(frozen=True)
class Explanation:
    """Which kernel a problem gets on a target, and why not the others. `str()` is a table, `as_dict()` is JSON-able.

    `incidents` says what went wrong in this process so far with kernels of the operation, with devices and with caches.
    """

    problem: Problem
    target: Target
    backend: str
    candidates: tuple[Candidate, ...]
    incidents: tuple[str, ...] = ()

    @property
    def chosen(self) -> Candidate | None:
        """The candidate that runs; None when nothing may."""
        return next((row for row in self.candidates if row.is_chosen), None)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "op": self.problem.op,
            "problem": str(self.problem),
            "target": {"name": self.target.name, "arch": self.target.arch, "num_sms": self.target.num_sms},
            "backend": self.backend,
            "candidates": [
                {
                    "backend": row.backend,
                    "kernel": row.kernel,
                    "chosen": row.is_chosen,
                    "reasons": list(row.verdict.reasons),
                    "variant": row.variant,
                }
                for row in self.candidates
            ],
            "incidents": list(self.incidents),
        }

    def __str__(self) -> str:
        lines = [f"{self.problem.op} on {self.target}: {self.problem}"]
        width = max(len(f"{row.backend}/{row.kernel}") for row in self.candidates)
        for row in self.candidates:
            name = f"{row.backend}/{row.kernel}".ljust(width)
            if row.is_chosen:
                lines.append(f"  -> {name}  runs" + f" as {row.variant}" * bool(row.variant))
            elif row.verdict:
                lines.append(f"     {name}  could run, stands behind the chosen one")
            else:
                lines.append(f"     {name}  no: {'; '.join(row.verdict.reasons)}")
        return "\n".join([*lines, *(f"  so far: {each}" for each in self.incidents)])


def explain(
    problem: Problem | str = "decode",
    *,
    target: Target | str | None = None,
    backend: str | None = None,
) -> Explanation:
    """Which kernel runs `problem` here, and every reason why the others do not. Launches nothing, never raises for a
    problem that nobody can run.

    Args:
        problem: a Problem, or the name of an operation for its typical problem (DeepSeek-V3 sizes).
        target: a Target or the name of a preset ("h100_sxm"); default: this machine.
        backend: as the `backend=` of the operations; default: OPENMLA_BACKEND.
    """
    if not isinstance(problem, str | Problem):
        raise ConfigError(f"problem must be a Problem or the name of an operation, got {problem!r}")
    asked = typical_problem(problem) if isinstance(problem, str) else problem
    where = Target.preset(target) if isinstance(target, str) else target or Target.detect()
    wanted = backend or env.BACKEND.read()
    if wanted != "auto" and wanted not in BACKENDS:
        raise ConfigError(f"unknown backend {wanted!r}; use one of: auto, {', '.join(BACKENDS)}")
    rows = []
    is_taken = False
    for kernel, verdict in _verdicts(asked, where, wanted):
        takes = bool(verdict) and not is_taken
        is_taken |= takes
        variant = getattr(kernel.configs(asked, where)[0], "name", "") if takes else ""
        rows.append(Candidate(kernel.backend, kernel.name, verdict, takes, variant))
    others = tuple(f"{op}/" for op in OPS if op != asked.op)
    past = tuple(str(each) for each in incidents.about() if not each.subject.startswith(others))
    return Explanation(asked, where, wanted, tuple(rows), past)


def typical_problem(op: str) -> Problem:
    """A problem of the size that DeepSeek-V3 (V3.2 where it is sparse) serves. Raises ConfigError for an unknown op."""
    dtype = bfloat16
    if op == "decode":
        return DecodeProblem(128, 1, 128, 128, 1, 576, 512, dtype, kv_layout("bf16_576"), 64, 8192, 64)
    if op == "sparse_decode":
        return SparseDecodeProblem(128, 1, 128, 128, 1, 576, 512, dtype, kv_layout("fp8_656"), 64, 65536, 2048)
    if op == "sparse_prefill":
        return SparsePrefillProblem(4096, 32768, 128, 1, 576, 512, dtype, 2048)
    if op == "prefill":
        return PrefillProblem(2, 16384, 16384, 8192, 8192, 128, 128, 192, 128, dtype, is_causal=True)
    if op == "append":
        return AppendProblem(576, dtype, kv_layout("fp8_656"), 64, 65536, 64)
    raise ConfigError(f"unknown operation {op!r}; use one of: {', '.join(OPS)}")
