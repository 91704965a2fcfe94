"""Hopper's decode kernels without Hopper: what tests of the way to them share."""

from __future__ import annotations

import cute_stand_ins
import pytest

from openmla.backends.cute import bundle, decode
from openmla.core.target import Target
from openmla.ops import canary, dispatch, native


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> decode.FewRows:
    """The kernel for few rows; the compiled functions of all decode kernels are stand-ins."""
    monkeypatch.setattr(bundle, "serve", cute_stand_ins.serve)
    monkeypatch.setattr(bundle, "availability", lambda family, config: decode.Verdict())
    return decode.FEW_ROWS


@pytest.fixture
def calls(kernel: decode.FewRows, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The usual way that calls of `openmla.decode` take, on a machine that says it is an H100."""
    monkeypatch.setattr(dispatch.Target, "detect", lambda device: Target.preset("h100_sxm"))
    monkeypatch.setattr(canary, "try_out", lambda *arguments: "")
    dispatch.forget()
    taken: list[str] = []
    usual = native._prepare_decode
    monkeypatch.setattr(native, "_prepare_decode", lambda *given: (taken.append("usual"), usual(*given))[1])
    yield taken
    dispatch.forget()
