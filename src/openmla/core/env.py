"""What OpenMLA asks of its environment: every variable that it reads (nothing else reads one), and which packages are there.

Each variable is only a default for an explicit argument. A malformed value raises `ConfigError`; it is never ignored.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from openmla.core.errors import ConfigError

# What os.environ keeps its values in, by `Variable.key`; os.environ itself where an interpreter has no such thing.
STORE: Mapping[Any, Any] = getattr(os.environ, "_data", os.environ)
_LEGAL: dict[tuple[str, Any], str] = {}  # (name, raw value) -> the value that it stands for


@dataclass(frozen=True)
class Variable:
    """One environment variable. `choices` empty means free text (a path)."""

    name: str
    default: str
    choices: tuple[str, ...]
    doc: str

    @cached_property
    def key(self) -> Any:
        """Its name as `STORE` has it: a call that only asks whether a value is still the same looks there, 0.04 us."""
        return self.name if STORE is os.environ else os.environ.encodekey(self.name)

    def read(self) -> str:
        """The value in force. Raises ConfigError when it is not one of `choices`."""
        # Two variables are read in every call. `os.environ.get` encodes the name and catches a KeyError, 0.9 us; the
        # mapping behind it answers in 0.1 us. What was legal once needs no second look.
        raw = STORE.get(self.key)
        known = _LEGAL.get((self.name, raw))
        return known if known is not None else self._checked(raw)

    def _checked(self, raw: Any) -> str:
        value = os.environ.get(self.name, "").strip() or self.default
        if self.choices and value not in self.choices:
            raise ConfigError(f"{self.name}={value!r} is not legal; use one of: {', '.join(self.choices)}")
        if self.choices:  # few values; paths may be many
            _LEGAL[self.name, raw] = value
        return value


BACKEND = Variable(
    "OPENMLA_BACKEND",
    "auto",
    ("auto", "cute", "triton", "torch"),
    "Default of every `backend=` argument. Anything but auto never falls back.",
)
CHECKS = Variable(
    "OPENMLA_CHECKS",
    "fast",
    ("off", "fast", "device", "strict"),
    "off: only what choosing a kernel needs; for a caller that checks everything itself. fast: shapes, dtypes, devices, "
    "strides, overlap; bad values inside tensors are masked and reported by check_errors(). device: also names the "
    "tensor, row, column and value of a bad one, without waiting. strict: also waits, and raises before the launch.",
)
CACHE_DIR = Variable(
    "OPENMLA_CACHE_DIR",
    "",
    (),
    "Where compiled kernels are kept. Default: $XDG_CACHE_HOME/openmla or ~/.cache/openmla.",
)
AOT_DIR = Variable(
    "OPENMLA_AOT_DIR",
    "",
    (),
    "Folder of an ahead-of-time kernel bundle written by `openmla compile`. Default: none.",
)

VLLM_CPU = Variable(
    "OPENMLA_VLLM_CPU",
    "0",
    ("0", "1"),
    "1: on vLLM's CPU platform, which knows no custom backend, OpenMLA takes the place of its CPU_MLA.",
)
SGLANG = Variable(
    "OPENMLA_SGLANG",
    "0",
    ("0", "1"),
    "1: in SGLang's processes OpenMLA takes the place of FlashMLA (`--attention-backend flashmla`).",
)

ALL: tuple[Variable, ...] = (BACKEND, CHECKS, CACHE_DIR, AOT_DIR, VLLM_CPU, SGLANG)


def cache_dir() -> Path:
    """The folder of the kernel cache; not created here."""
    explicit = CACHE_DIR.read()
    if explicit:
        return Path(explicit)
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "openmla"


def state_dir() -> Path:
    """The folder of what outlives a run and is not a cache, such as the progress of `openmla learn`; not created here.

    $XDG_STATE_HOME/openmla or ~/.local/state/openmla.
    """
    xdg = os.environ.get("XDG_STATE_HOME", "")
    return (Path(xdg) if xdg else Path.home() / ".local" / "state") / "openmla"


def for_child(**variables: str) -> dict[str, str]:
    """The environment of a process that this one starts: its own, with `variables` in place."""
    return {**os.environ, **variables}


@contextmanager
def lent(name: str, value: str) -> Iterator[None]:
    """Another library's variable, set for as long as the block runs."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def any_is_set(*foreign: str) -> bool:
    """True when one of another library's variables is set, whatever its value: something limits that library."""
    return any(name in os.environ for name in foreign)


def is_importable(module: str) -> bool:
    """Whether an optional package is there, without importing it."""
    if module in sys.modules:
        return sys.modules[module] is not None
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
