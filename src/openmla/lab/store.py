"""Rows: one measured fact each, appended to a JSONL file and never changed.

A row carries everything needed to judge it later: the case, who ran, the spread, the ceilings of the same machine in
the same process, versions, commit, and the rules of measurement it was made under (`PROTOCOL`).
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import openmla
from openmla.core.errors import ConfigError
from openmla.core.target import Target

# 1: gate first; interleaved at single-call granularity; cold: rotated inputs (CPU) or flushed L2 (GPU); median, p20, p80.
PROTOCOL = 1
PACKAGES = (
    "triton",
    "nvidia-cutlass-dsl",
    "apache-tvm-ffi",
    "sgl-flash-mla",
    "flash-mla",
    "fa3-fwd",
    "flashinfer-python",
    "transformers",
)


@dataclass(frozen=True)
class Row:
    """One fact. Times in microseconds, rates in 10^12 FLOP/s and 10^9 byte/s; fractions are of measured ceilings.

    ratio: peer name -> that peer's median over this median in the same run; above 1 this one is faster.
    """

    suite: str
    case: str
    who: str  # backend or peer name
    kind: str  # "backend", "peer", or "ceiling" (a bare product: no attention, so not gated)
    kernel: str
    config: str
    policy: str
    median_us: float
    p20_us: float
    p80_us: float
    n: int
    host_us: float | None  # Python call until it returns; None where the call is synchronous
    flops: int
    bytes: int
    tflops: float
    gbps: float
    fraction_gemm: float
    fraction_read: float
    ratio: dict[str, float]
    gate: str
    timing: str  # "call", "event" or "graph"
    cache: str
    dtype: str
    inputs: str
    seed: int
    environment: dict[str, Any] = field(default_factory=dict)
    ceilings: dict[str, float] = field(default_factory=dict)
    protocol: int = PROTOCOL
    utc: str = ""

    @property
    def fraction_roofline(self) -> float:
        """Share of the roof above this case: the larger of the compute and the bandwidth fraction.

        Of e4m3 queries the bandwidth fraction alone: the product that is measured beside them is one of bf16, half as fast.
        """
        return self.fraction_read if self.dtype == "e4m3" else max(self.fraction_gemm, self.fraction_read)


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add rows at the end of a JSONL file; folders are made. Raises ConfigError when the file cannot be written."""
    text = "".join(json.dumps(asdict(row), allow_nan=False, sort_keys=True) + "\n" for row in rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(f"cannot append to {path}: {error.strerror}; choose another file with --out") from error


def read(path: Path) -> list[Row]:
    """Every row of a file. Raises ConfigError naming file, line and key of the first malformed one."""
    rows = []
    names = {each.name for each in fields(Row)}
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(
            f"cannot read rows from {path}: {reason}; give a file that openmla bench --out wrote"
        ) from error
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            raw = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{where}: not JSON: {error}") from error
        if not isinstance(raw, Mapping):
            raise ConfigError(f"{where}: a row is an object, got {type(raw).__name__}")
        wrong = sorted(set(raw) ^ names)
        if wrong:
            raise ConfigError(
                f"{where}: unknown or missing key(s): {', '.join(wrong)}; protocol {PROTOCOL} is read here"
            )
        row = Row(**raw)
        if not (isinstance(row.median_us, float) and math.isfinite(row.median_us) and row.median_us > 0):
            raise ConfigError(f"{where}: median_us must be a positive number, got {row.median_us!r}")
        rows.append(row)
    return rows


def now() -> str:
    """UTC, to the second, ISO 8601."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def version_of(package: str) -> str | None:
    """Installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(target: Target) -> dict[str, Any]:
    """What the numbers depend on besides the case: device, threads, versions, commit, and the card's clocks."""
    found: dict[str, Any] = {
        "device": target.name,
        "arch": target.arch,
        "threads": torch.get_num_threads(),
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "openmla": openmla.__version__,
        "packages": {name: version for name in PACKAGES if (version := version_of(name))},
        **git_state(),
    }
    if target.is_cuda:
        found.update(card_state())
    return found


def git_state() -> dict[str, Any]:
    """Commit and whether tracked files differ from it; None for both outside a checkout."""
    root = Path(openmla.__file__).resolve().parent
    sha = _output(["git", "-C", str(root), "rev-parse", "HEAD"])
    if not sha:
        return {"git_sha": None, "git_dirty": None}
    changed = _output(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no", ":/src"])
    return {"git_sha": sha, "git_dirty": None if changed is None else bool(changed)}


def card_state() -> dict[str, Any]:
    """Driver, clocks and power cap of the first visible GPU; empty where nvidia-smi does not answer."""
    keys = ("driver_version", "clocks.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")
    answer = _output(["nvidia-smi", f"--query-gpu={','.join(keys)}", "--format=csv,noheader,nounits"])
    values = [part.strip() for part in answer.splitlines()[0].split(",")] if answer else []
    return dict(zip(keys, values, strict=True)) if len(values) == len(keys) else {}


def _output(command: list[str]) -> str | None:
    """Standard output of a tool that may be missing, fail or hang; None then."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
