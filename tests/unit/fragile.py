"""A kernel that fails on demand, in front of the real ones, and the one way in which every fault must end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import openmla
from openmla import backends
from openmla.backends import aside
from openmla.backends.base import Verdict
from openmla.core import counters, incidents
from openmla.ops import canary, dispatch, observers, recovery


@dataclass(eq=False)
class Fragile:
    """Computes what the torch kernel computes, unless `compiling`, `planning` or `launching` does something else."""

    compiling: Callable[[], None] = lambda: None
    planning: Callable[[], None] = lambda: None
    launching: Callable[[Any], None] = lambda operands: None
    op: str = "decode"
    backend: str = "cute"
    name: str = "fragile"
    compiled: int = 0
    launched: int = 0
    inner: Any = field(default_factory=lambda: backends.kernels("decode")[-1])

    def supports(self, problem: Any, target: Any) -> Verdict:
        return Verdict()

    def configs(self, problem: Any, target: Any) -> tuple[str, ...]:
        return ("only",)

    def compile(self, problem: Any, config: Any, target: Any) -> Any:
        self.compiled += 1
        self.compiling()
        return self.inner.compile(problem, self.inner.configs(problem, target)[0], target)

    def plan(self, compiled: Any, problem: Any, cache_seqlens: torch.Tensor, policy: str) -> Any:
        self.planning()
        return self.inner.plan(compiled, problem, cache_seqlens, policy)

    def workspace_bytes(self, compiled: Any, problem: Any, policy: str) -> int:
        return self.inner.workspace_bytes(compiled, problem, policy)

    def launch(self, compiled: Any, problem: Any, operands: Any, plan: Any) -> None:
        self.launched += 1
        self.inner.launch(compiled, problem, operands, plan)
        self.launching(operands)


def forget() -> None:
    """A process without a past."""
    incidents.reset()
    aside.clear()
    recovery.LOST.clear()
    dispatch.forget()
    canary._tried.clear()
    observers.observers.clear()
    counters.reset()
    openmla.check_errors()


def install(monkeypatch: pytest.MonkeyPatch, kernel: Any) -> Any:
    """Put a kernel first in its table."""
    monkeypatch.setitem(backends.TABLE, kernel.op, (kernel, *backends.TABLE[kernel.op]))
    dispatch.forget()
    return kernel


def arguments(batch: int = 2, h_q: int = 4, seed: int = 0) -> dict[str, Any]:
    """A small dense decode."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "q": torch.randn(batch, 1, h_q, 64, generator=generator).bfloat16(),
        "kv_cache": torch.randn(batch * 2, 16, 1, 64, generator=generator).bfloat16(),
        "block_table": torch.arange(batch * 2, dtype=torch.int32).reshape(batch, 2),
        "cache_seqlens": torch.full((batch,), 20, dtype=torch.int32),
        "d_v": 32,
    }


class Ends:
    """`ends(kind, subject)`: counted as often as said, logged once, named by explain()."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self.caplog = caplog
        caplog.set_level(logging.WARNING, "openmla")

    def __call__(self, kind: str, subject: str, says: str = "", times: int = 1) -> None:
        assert incidents.counts()[kind, subject] == times, incidents.counts()
        lines = [each for each in self.caplog.messages if each.startswith(f"{kind}: {subject}")]
        assert len(lines) == 1, self.caplog.messages
        explained = [each for each in openmla.explain("decode").incidents if each.startswith(f"{kind}: {subject}")]
        assert explained, openmla.explain("decode").incidents
        assert says in lines[0] and says in explained[0], (lines, explained)
