"""Kernels in Triton's interpreter. TRITON_INTERPRET has to be set before Triton defines a function, so in a process that
has it not, each file of this folder is one item that runs the file in a process that has.

    TRITON_INTERPRET=1 pytest -n 0 tests/interpret -k name      # one test, in this process
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class InterpretedFile(pytest.Item):
    """A test file, run in a process of its own."""

    def runtest(self) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", str(self.path)]
        done = subprocess.run(
            command,
            env={**os.environ, "TRITON_INTERPRET": "1"},
            cwd=self.config.rootpath,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise AssertionError(f"{' '.join(command)}\n{done.stdout[-8000:]}{done.stderr[-4000:]}")

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, 0, f"interpreted: {self.path.name}"

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: object = None) -> str:
        return str(excinfo.value)


class Interpreted(pytest.File):
    def collect(self) -> Iterator[pytest.Item]:
        yield InterpretedFile.from_parent(self, name="interpreted")


if not IS_INTERPRETED:

    def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Collector:
        return Interpreted.from_parent(parent, path=module_path)


if IS_INTERPRETED:
    import torch

    import openmla
    from openmla import backends
    from openmla.core.target import Target
    from openmla.ops import dispatch

    @pytest.fixture(autouse=True)
    def _triton_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
        """The table with the Triton kernels in it, whatever it says today, and no fault of an earlier test."""
        from openmla.backends.triton import KERNELS

        for kernel in KERNELS:
            others = tuple(each for each in backends.kernels(kernel.op) if each.backend != "triton")
            monkeypatch.setitem(backends.TABLE, kernel.op, (kernel, *others))
        backends.select.cache_clear()
        dispatch._prepared.clear()
        openmla.check_errors()
        yield
        backends.select.cache_clear()
        dispatch._prepared.clear()

    @pytest.fixture
    def machine(monkeypatch: pytest.MonkeyPatch):
        """Pretend that the interpreter has so many multiprocessors, and that a piece costs little to start.

        These two decide how work is cut: with the real cost, requests as short as these would stay whole.
        """
        from openmla.backends.triton import launch

        def set_sms(count: int) -> None:
            monkeypatch.setattr(launch, "OVERHEAD_TOKENS", 16)
            target = Target("interpreter", "cpu", count)
            monkeypatch.setattr(Target, "detect", staticmethod(lambda device=None: target))
            dispatch._prepared.clear()

        return set_sms

    @pytest.fixture
    def judged():
        """Run a case on Triton; judge it by the tolerance rule, and its faults by those of the torch backend."""

        def run(case, operands=None, **options):
            from openmla.testing import budget

            operands = operands or case.tensors()
            torch_run = case.run("torch", operands=operands, **options)
            expected = openmla.check_errors()
            out, lse, top = case.run("triton", operands=operands, **options)
            found = openmla.check_errors()
            budget.check(out, lse, case.golden(operands), dtype=case.dtype, max_logits=top).require(case.repro)
            assert found == expected, case.repro
            assert torch_run[0].shape == out.shape
            return out, lse, top

        return run

    torch.set_num_threads(1)
