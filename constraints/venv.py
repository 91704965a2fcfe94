"""Build .venv for one of the Makefile's commands: `python3 constraints/venv.py demo|test`. Standard library only.

Two kinds of host. Without a CUDA build of PyTorch in the interpreter that runs this, .venv stands alone and every
version comes from constraints/cpu.txt. With one, .venv sees the host's packages, and whatever the host has keeps its
version: replacing a working CUDA PyTorch by a CPU one would cost the user their GPU.

PyTorch is installed first and alone, so that no other requirement can pull a different build of it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
CONSTRAINTS = ROOT / "constraints" / "cpu.txt"
SETS = {"demo": ("demo", "test"), "test": ("test",)}  # a set is satisfied by any environment named here


def say(text: str) -> None:
    """One line of progress."""
    sys.stderr.write(f"[setup] {text}\n")


def stop(text: str) -> None:
    """Say what is wrong and what to do, then leave with exit code 2."""
    say(text)
    raise SystemExit(2)


def canonical(name: str) -> str:
    """The spelling of a package name that indexes compare (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def cuda_of_torch() -> str | None:
    """CUDA version of the PyTorch that this interpreter has; None without PyTorch or with a CPU build."""
    if importlib.util.find_spec("torch") is None:
        return None
    code = "import torch; print(torch.version.cuda or '')"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def fingerprint(cuda: str | None) -> str:
    """What an environment was built from; a different one is built again."""
    text = (ROOT / "pyproject.toml").read_bytes() + CONSTRAINTS.read_bytes() + f"{sys.version}{cuda}{VENV}".encode()
    return hashlib.sha256(text).hexdigest()


def create(cuda: str | None) -> None:
    """An empty .venv, seeing the host's packages when PyTorch has to come from there."""
    if importlib.util.find_spec("ensurepip") is None:
        stop(f"{sys.executable} cannot make environments (no ensurepip); on Debian or Ubuntu: apt install python3-venv")
    say(
        f"making {VENV.name} with Python {sys.version.split()[0]}"
        + (f", PyTorch of the host (CUDA {cuda})" if cuda else "")
    )
    command = [sys.executable, "-m", "venv", *(["--system-site-packages"] if cuda else []), str(VENV)]
    if subprocess.run(command, check=False).returncode:
        stop("making the environment failed; the lines above say why")
    if cuda and sys.prefix != sys.base_prefix:
        # The host's interpreter is itself a virtual environment: the new one would see the base Python's packages
        # and not its. A .pth file adds them, behind our own.
        site = next((VENV / "lib").glob("python*/site-packages"))
        (site / "host.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")


def pip(title: str, *arguments: str) -> None:
    """One pip call; of its output only what is being fetched and what went wrong."""
    say(f"{title} ...")
    start = time.monotonic()
    command = [
        str(VENV / "bin" / "python"),
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "--progress-bar",
        "off",
    ]
    process = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    tail: list[str] = []
    for line in process.stdout or ():
        tail = [*tail[-30:], line.rstrip()]
        if line.lstrip().startswith("Downloading "):
            verb, what, *size = line.split()
            say(" ".join(["  " + verb, what.rpartition("/")[2], *size]))
    if process.wait():
        sys.stderr.write("\n".join(tail) + "\n")
        stop(f"pip failed with exit code {process.returncode}; its last lines are above")
    say(f"{title}: done in {time.monotonic() - start:.0f} s")


def pins(cuda: str | None) -> str:
    """The constraints in force: all of them, or those for packages that a CUDA host lacks."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    if not cuda:
        return "\n".join(lines)
    host = {canonical(each.metadata["Name"]) for each in importlib.metadata.distributions() if each.metadata["Name"]}
    return "\n".join(line for line in lines if "==" not in line or canonical(line.partition("==")[0]) not in host)


def main() -> None:
    """Build the environment unless it stands already."""
    if len(sys.argv) != 2 or sys.argv[1] not in SETS:
        stop(f"usage: python3 constraints/venv.py {'|'.join(SETS)}")
    wanted = sys.argv[1]
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        stop(
            f"Python 3.11 to 3.13 is needed, {sys.executable} is {sys.version.split()[0]}; say make PYTHON=/path/to/python3.11"
        )
    cuda = cuda_of_torch()
    mark = fingerprint(cuda)
    for name in SETS[wanted]:
        stamp = VENV / f".openmla-{name}"
        if stamp.exists() and stamp.read_text(encoding="utf-8") == mark:
            return
    if not (VENV / "bin" / "python").exists():
        create(cuda)
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text(pins(cuda) + "\n", encoding="utf-8")
        if not cuda:
            torch = next(
                line for line in constraints.read_text(encoding="utf-8").splitlines() if line.startswith("torch==")
            )
            pip(f"1/2 {torch}", torch, "-c", str(constraints))
        pip(f"2/2 openmla[{wanted}] and what it needs", "-e", f"{ROOT}[{wanted}]", "-c", str(constraints))
    (VENV / f".openmla-{wanted}").write_text(mark, encoding="utf-8")


if __name__ == "__main__":
    main()
