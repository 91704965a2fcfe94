"""Judge one submission, in a process of its own: `python -m openmla.learn.judge NAME FILE` prints one line of JSON."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

from openmla.learn.course import Hint, Judgement, exercise


def load(path: Path, name: str) -> ModuleType:
    """A file as a module, registered under `name`: mods and Triton kernels are read again from their source file."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise Hint(f"{path.name} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def run(name: str, submission: Path) -> Judgement:
    """Load the submission and its check, and let the one look at the other. Raises what the submission raises."""
    check = load(exercise(name).folder / "check.py", "check")
    try:
        return Judgement(True, str(check.check(load(submission, "submission"))))
    except Hint as hint:
        return Judgement(False, str(hint))


def main() -> int:
    """The command; what the submission prints goes to standard error, and so does what it raises."""
    with contextlib.redirect_stdout(sys.stderr):
        found = run(sys.argv[1], Path(sys.argv[2]))
    sys.stdout.write(json.dumps({"passed": found.passed, "sentence": found.sentence}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
