"""Compile one variant in a process of its own: `python -m openmla.backends.cute.compiler FAMILY NAME FOLDER`.

A compiler that crashes, hangs or takes all memory must not take a server with it. The parent waits so long, then kills
the child's process group; what the child left behind is no entry of the cache.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from openmla.backends.cute.families import FAMILIES
from openmla.backends.cute.toolchain import CompiledObject, Resources
from openmla.core import env
from openmla.core.errors import CompileError

COMPILE_SECONDS = 120.0  # the slowest variant takes about 6 s on one core of a busy machine


def can(family: str, name: str) -> bool:
    """Whether a child can find this variant: those of the bundle it can, one with a user's own function it cannot."""
    return any(each.name == name for each in FAMILIES.get(family, ((), None))[0])


def compile_apart(family: str, name: str, folder: Path, *, command: list[str] | None = None) -> CompiledObject:
    """Compile a variant of the bundle in a child process.

    Args:
        family: key of `FAMILIES`.
        name: exported function name of the variant.
        folder: receives the object file.
        command: what to run instead of this module, for tests.

    Raises:
        CompileError: the child failed, was killed, or did not end within COMPILE_SECONDS.
    """
    with tempfile.TemporaryDirectory(prefix="openmla-dsl-") as private:
        # The DSL keeps a cache of its own in /tmp/$USER, which others can create first.
        own = env.for_child(CUTE_DSL_CACHE_DIR=private, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
        child = subprocess.Popen(
            command or [sys.executable, "-m", "openmla.backends.cute.compiler", family, name, str(folder)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=own, start_new_session=True,
        )  # fmt: skip
        try:
            out, err = child.communicate(timeout=COMPILE_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise CompileError(
                f"{name}: the compiler did not end within {COMPILE_SECONDS:.0f} s and was killed"
            ) from error
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.communicate()
    if child.returncode < 0:
        cause = signal.Signals(-child.returncode).name
        raise CompileError(f"{name}: the compiler died of {cause}{' (out of memory?)' if cause == 'SIGKILL' else ''}")
    if child.returncode:
        raise CompileError(f"{name}: the compiler failed: {' '.join(err.strip().splitlines()[-1:])}")
    return _read(json.loads(out.strip().splitlines()[-1]))


def _read(found: dict[str, Any]) -> CompiledObject:
    paths = {key: Path(found[key]) for key in ("object_path", "cubin_path")}
    return CompiledObject(found["name"], **paths, resources=Resources(**found["resources"]))


def main() -> int:
    """The child."""
    family, name, folder = sys.argv[1:]
    variants, build = FAMILIES[family]
    made = build(next(each for each in variants if each.name == name), Path(folder))
    sys.stdout.write(json.dumps(asdict(made), default=str) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
