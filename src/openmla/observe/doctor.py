"""The doctor: what this machine can run, what it cannot, why, and what to do about it.

Every probe is guarded, so one broken driver or package becomes one line instead of a traceback. Nothing here uses the
network, and no optional package is imported: whether it is there is asked of the import system and its metadata.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import openmla
from openmla import backends
from openmla.backends.cute import bundle
from openmla.backends.cute.toolchain import MANIFEST, MANIFEST_FORMAT
from openmla.core import env
from openmla.core.errors import ConfigError
from openmla.core.target import Target
from openmla.reference import attention

SCHEMA = 1  # of the JSON form; raised when a key changes its meaning or goes away

State = Literal["ok", "absent", "note", "problem"]
_MARK: dict[State, str] = {"ok": "ok", "absent": "-", "note": "note", "problem": "WRONG"}
_WIDTH = 100


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, what was found, and the fix where there is something to fix.

    state: ok; absent (optional and not here); note (works, but worth knowing); problem (something is wrong).
    """

    section: str
    name: str
    state: State
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All lines, in the order of the probes."""

    checks: tuple[Check, ...]

    @property
    def is_healthy(self) -> bool:
        """True when no line is a problem. A missing optional package is none."""
        return all(check.state != "problem" for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "schema": SCHEMA,
            "openmla": openmla.__version__,
            "healthy": self.is_healthy,
            "checks": [asdict(check) for check in self.checks],
        }

    def __str__(self) -> str:
        lines: list[str] = []
        section = ""
        for check in self.checks:
            if check.section != section:
                section = check.section
                lines += ["", section] if lines else [section]
            head = f"  {_MARK[check.state]:<5} {check.name:<28} "
            lines += textwrap.wrap(check.found, _WIDTH, initial_indent=head, subsequent_indent=" " * len(head)) or [
                head
            ]
            if check.fix:
                lines += textwrap.wrap(check.fix, _WIDTH, initial_indent=" " * 8 + "fix: ", subsequent_indent=" " * 13)
        problems = sum(check.state == "problem" for check in self.checks)
        lines += ["", "nothing is wrong here" if not problems else f"{problems} problem(s), marked WRONG above"]
        return "\n".join(lines)


Probe = Callable[[], Iterable[Check]]


def examine(probes: Sequence[tuple[str, Probe]] | None = None) -> Diagnosis:
    """Run every probe; a probe that raises becomes a line that says so. Takes about a second."""
    checks: list[Check] = []
    for section, probe in PROBES if probes is None else probes:
        try:
            checks += probe()
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            fix = "the rest of this report stands; please report this line as a bug of the doctor"
            checks.append(Check(section, "probe", "problem", f"failed with {type(error).__name__}: {text}", fix))
    return Diagnosis(tuple(checks))


def _python() -> Iterable[Check]:
    version = platform.python_version()
    fine = (3, 11) <= sys.version_info[:2] <= (3, 13)
    yield Check(
        "software", "Python", "ok" if fine else "note", f"{version} ({platform.system()} {platform.machine()})",
        "" if fine else "OpenMLA is tested on Python 3.11 to 3.13",
    )  # fmt: skip
    yield Check("software", "openmla", "ok", openmla.__version__)


def _torch() -> Iterable[Check]:
    kind = f"CUDA {torch.version.cuda}" if torch.version.cuda else "ROCm" if torch.version.hip else "CPU build"
    numbers = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    fine = numbers >= (2, 9)
    yield Check(
        "software", "PyTorch", "ok" if fine else "problem", f"{torch.__version__} ({kind})",
        "" if fine else "OpenMLA needs torch >= 2.9: pip install -U torch",
    )  # fmt: skip


@dataclass(frozen=True)
class _Package:
    module: str
    distributions: tuple[str, ...]
    purpose: str
    fix: str


_PACKAGES = (
    _Package("tvm_ffi", ("apache-tvm-ffi",), "loads compiled Hopper kernels", "pip install 'openmla[cuda]'"),
    _Package("cutlass", ("nvidia-cutlass-dsl",), "compiles Hopper kernels", "pip install 'openmla[cuda]'"),
    _Package("triton", ("triton",), "portable GPU kernels", "pip install 'openmla[triton]'"),
    _Package("transformers", ("transformers",), "openmla demo", "pip install 'openmla[demo]'"),
    _Package("matplotlib", ("matplotlib",), "plots of reports", "pip install 'openmla[lab]'"),
    _Package("jinja2", ("jinja2", "Jinja2"), "reports", "pip install 'openmla[lab]'"),
    _Package("rich", ("rich",), "prettier tables", "pip install 'openmla[lab]'"),
    _Package("flash_mla", ("sgl-flash-mla", "flash-mla"), "peer in the bench", "pip install --no-deps sgl-flash-mla"),
    _Package("flashinfer", ("flashinfer-python", "flashinfer"), "peer in the bench", "pip install flashinfer-python"),
    _Package("fa3_fwd_interface", ("fa3-fwd",), "dense prefill, peer in the bench", "pip install --no-deps fa3-fwd"),
)


def _packages() -> Iterable[Check]:
    for package in _PACKAGES:
        versions = [version for name in package.distributions if (version := _version(name))]
        if env.is_importable(package.module):
            yield Check(
                "packages", package.module, "ok", f"{versions[0] if versions else 'present'}; {package.purpose}"
            )
        elif versions:
            yield Check(
                "packages", package.module, "note",
                f"{package.distributions[0]} {versions[0]} is installed, but the module cannot be found",
                f"reinstall it: {package.fix}",
            )  # fmt: skip
        else:
            yield Check("packages", package.module, "absent", f"not installed; {package.purpose}", package.fix)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> Iterable[Check]:
    target = Target.detect("cpu")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    capability = torch.backends.cpu.get_cpu_capability()
    yield Check("machine", "CPU", "ok", f"{target.name}, {cores} core(s) for this process, kernels for {capability}")
    threads = torch.get_num_threads()
    crowded = threads > cores
    yield Check(
        "machine", "threads", "note" if crowded else "ok", f"PyTorch uses {threads} thread(s)",
        f"more threads than cores slow the CPU backend down: torch.set_num_threads({cores})" if crowded else "",
    )  # fmt: skip
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        pairs = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines() if ":" in line)
        total, free = (int(pairs[key].split()[0]) / 2**20 for key in ("MemTotal", "MemAvailable"))
        yield Check("machine", "memory", "ok", f"{total:.1f} GiB, {free:.1f} GiB available")


def _gpus() -> Iterable[Check]:
    driver = _driver()
    if not torch.cuda.is_available():
        if driver is None:
            yield Check("machine", "GPU", "absent", "none: no NVIDIA driver here; the CPU backend runs everything")
        elif torch.version.cuda is None:
            yield Check(
                "machine", "GPU", "note", f"driver {driver} is here, but PyTorch is a CPU build",
                "install a CUDA build of torch (pytorch.org, 'Get started')",
            )  # fmt: skip
        else:
            yield Check(
                "machine", "GPU", "problem", f"driver {driver} and PyTorch for CUDA {torch.version.cuda}, yet no GPU",
                "the driver may be older than that CUDA, or CUDA_VISIBLE_DEVICES hides the card",
            )  # fmt: skip
        return
    for index in range(torch.cuda.device_count()):
        target = Target.detect(f"cuda:{index}")
        free, total = torch.cuda.mem_get_info(index)
        memory = f"{total / 2**30:.0f} GiB, {free / 2**30:.0f} free"
        yield Check("machine", f"GPU {index}", "ok", f"{target}, {target.num_sms} SMs, {memory}; driver {driver}")


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    lines = answer.stdout.strip().splitlines()
    return lines[0].strip() if answer.returncode == 0 and lines else None


def _settings() -> Iterable[Check]:
    for variable in env.ALL:
        try:
            value = variable.read()
        except ConfigError as error:
            fix = f"unset {variable.name}, or set it to one of: {', '.join(variable.choices)}"
            yield Check("settings", variable.name, "problem", str(error), fix)
            continue
        origin = "default" if value == variable.default else "set"
        legal = f"; legal: {', '.join(variable.choices)}" if variable.choices else ""
        yield Check("settings", variable.name, "ok", f"{value or 'empty'} ({origin}){legal}")
    yield _cache_folder(env.cache_dir())
    if env.AOT_DIR.read():
        yield _bundle(Path(env.AOT_DIR.read()))


def _cache_folder(folder: Path) -> Check:
    """Compiled kernels are machine code that this process will run: nobody else may be able to write them."""
    name = "kernel cache"
    if folder.exists():
        facts = folder.lstat()
        if stat.S_ISLNK(facts.st_mode) or not stat.S_ISDIR(facts.st_mode):
            return Check("settings", name, "problem", f"{folder} is not a plain folder", "set OPENMLA_CACHE_DIR to one")
        if hasattr(os, "getuid") and facts.st_uid not in (os.getuid(), 0):
            return Check("settings", name, "problem", f"{folder} belongs to another user", "set OPENMLA_CACHE_DIR")
        if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return Check("settings", name, "problem", f"{folder} is writable by others", f"chmod 700 {folder}")
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if os.access(parent, os.W_OK):
        return Check("settings", name, "ok", f"{folder} ({'present' if folder.exists() else 'made on first use'})")
    return Check(
        "settings", name, "note", f"{folder} cannot be written; compiled kernels live as long as their process",
        "set OPENMLA_CACHE_DIR to a folder of your own",
    )  # fmt: skip


def _bundle(folder: Path) -> Check:
    """The ahead-of-time kernels that OPENMLA_AOT_DIR names."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        form = manifest["format"]
        families = {
            f"{len(each['functions'])} of {name} for {each['arch']}" for name, each in manifest["families"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        fix = f"write one with `openmla compile --out {folder}`, or unset OPENMLA_AOT_DIR"
        return Check("settings", "kernel bundle", "problem", f"{folder} has no readable {MANIFEST}: {error}", fix)
    if form != MANIFEST_FORMAT:
        fix = "write it anew with `openmla compile`"
        return Check(
            "settings", "kernel bundle", "problem", f"format {form}, this version reads {MANIFEST_FORMAT}", fix
        )
    if any(map(bundle.is_outdated, manifest["families"].values())):
        fix = f"write it anew with `openmla compile --out {folder}`"
        return Check("settings", "kernel bundle", "problem", f"{folder} was built from other sources; not used", fix)
    return Check("settings", "kernel bundle", "ok", f"{', '.join(sorted(families)) or 'empty'}; in {folder}")


def _backends() -> Iterable[Check]:
    """Every kernel of the table, on the typical problem of its operation, for the device that PyTorch would use."""
    target = Target.detect()
    for op in backends.OPS:
        try:
            rows = backends.explain(op, target=target, backend="auto").candidates
        except (ImportError, OSError, AttributeError) as error:
            yield Check(
                f"kernels for {op}", "table", "problem", f"{type(error).__name__}: {error}", "reinstall openmla"
            )
            continue
        for row in rows:
            name = f"{row.backend}/{row.kernel}"
            if row.is_chosen:
                yield Check(f"kernels for {op}", name, "ok", f"runs here on {target}")
            elif row.verdict:
                yield Check(f"kernels for {op}", name, "ok", "could run, stands behind the chosen one")
            else:
                yield Check(f"kernels for {op}", name, "absent", "; ".join(row.verdict.reasons))


def _trial() -> Iterable[Check]:
    """A real call of a few thousand multiplications on the device that PyTorch would use, beside the oracle."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 1, 16, 576, generator=generator).to(device, dtype)
    cache = torch.randn(4, 64, 1, 576, generator=generator).to(device, dtype)
    table = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32, device=device)
    lengths = torch.tensor([65, 128], dtype=torch.int32, device=device)
    at = time.perf_counter()
    out, _ = openmla.decode(q, cache, table, lengths, backend="auto")
    golden = attention.decode(q, cache, table, lengths, softmax_scale=576**-0.5, d_v=512).out
    error = float((out.double() - golden).norm() / golden.norm())
    seconds = time.perf_counter() - at
    # bf16 operands land between 1e-3 and 1e-2, fp32 far below: anything above is no rounding.
    fine = error < 1e-2
    yield Check(
        "trial", "decode", "ok" if fine else "problem",
        f"2 requests, 16 heads on {device}: relative error {error:.1e} against fp64, {seconds:.2f} s",
        "" if fine else "run `openmla verify` and report its first failure",
    )  # fmt: skip


PROBES: tuple[tuple[str, Probe], ...] = (
    ("software", _python),
    ("software", _torch),
    ("machine", _processor),
    ("machine", _gpus),
    ("packages", _packages),
    ("settings", _settings),
    ("kernels", _backends),
    ("trial", _trial),
)
