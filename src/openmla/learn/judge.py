"""Judge one submission, in a process of its own: `python -m openmla.learn.judge NAME FILE` prints one line of JSON."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

from openmla.learn.course import PASS_POINTS, Exercise, Hint, Judgement, exercise


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
    chosen = exercise(name)
    check = load(chosen.folder / "check.py", "check")
    try:
        work = load(submission, "submission")
        return grade(chosen, check, work) if chosen.is_project else Judgement(True, str(check.check(work)))
    except Hint as hint:
        return Judgement(False, str(hint))


def grade(project: Exercise, check: ModuleType, work: ModuleType) -> Judgement:
    """Every criterion of the rubric, one line each; raises Hint of the first, without which the others mean nothing."""
    lines, points = [], 0
    for number, criterion in enumerate(project.rubric):
        try:
            said, got = str(check.CRITERIA[criterion.name](work)), criterion.points
        except Hint as hint:
            if number == 0:
                raise Hint(f"{criterion.name}: {hint}") from None
            said, got = str(hint), 0
        points += got
        lines.append(f"{got:3} of {criterion.points:2}  {criterion.name}: {said}")
    passed = points >= PASS_POINTS
    lines.append(f"{points} of 100 points, {PASS_POINTS} pass")
    return Judgement(passed, "\n".join(lines), points)


def main() -> int:
    """The command; what the submission prints goes to standard error, and so does what it raises."""
    with contextlib.redirect_stdout(sys.stderr):
        found = run(sys.argv[1], Path(sys.argv[2]))
    sys.stdout.write(json.dumps(asdict(found)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
