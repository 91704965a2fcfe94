"""Exercises and projects: data in `exercises/NAME/` and `projects/NAME/`, and what `openmla learn` does with them.

    task.toml      title, level, what is needed, seconds, and the task in words; of a project also its rubric
    submission.py  what the learner gets and changes
    check.py       exercise: check(work) -> str, a sentence about what was reached, or raises Hint
                   project: CRITERIA, such a function for each criterion of the rubric, by name
    reference.py   a submission that passes;  wrong.py  one that fails, with the hint that it must get in its docstring

Level 1: run, measure, explain. Level 2: find the bottleneck of something slow and get past a bar. Level 3: write it.
A project is longer, has no one answer, and is graded: each criterion of its rubric gives its points or none, the first one
must hold before the others are looked at, and PASS_POINTS of 100 pass.

A submission runs in a process of its own, so that an endless loop or a crash ends there. Bars count (bytes, clocks of a model,
elements loaded), so that they mean the same on every machine; nothing is timed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openmla.core import env
from openmla.core.errors import ConfigError

FOLDER = Path(__file__).with_name("exercises")
PROJECTS = Path(__file__).with_name("projects")
PASS_POINTS = 70
LEVELS = {1: "run, measure, explain", 2: "find the bottleneck, pass the bar", 3: "write it yourself"}


class Hint(Exception):
    """A submission is not there yet; the message says what is wrong and where to look."""


@dataclass(frozen=True)
class Criterion:
    """One line of a project's rubric."""

    name: str
    points: int
    says: str


@dataclass(frozen=True)
class Exercise:
    """One exercise, or a project, which has a rubric.

    `seconds` is how long a submission may run; `needs` are modules that must be importable.
    """

    name: str
    title: str
    level: int
    minutes: int
    task: str
    seconds: int = 60
    needs: tuple[str, ...] = ()
    rubric: tuple[Criterion, ...] = ()

    @property
    def is_project(self) -> bool:
        """Whether it is graded by a rubric."""
        return bool(self.rubric)

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return (PROJECTS if self.is_project else FOLDER) / self.name


@dataclass(frozen=True)
class Judgement:
    """What checking a submission found: passed with what was reached, or not, with a hint. `points` are a project's."""

    passed: bool
    sentence: str
    points: int | None = None


def _read(folder: Path) -> tuple[Exercise, ...]:
    found = []
    for path in folder.glob("*/task.toml"):
        fields: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        order = fields.pop("order")
        fields["needs"] = tuple(fields.get("needs", ()))
        fields["rubric"] = tuple(Criterion(**each) for each in fields.get("rubric", ()))
        found.append((fields["level"], order, Exercise(name=path.parent.name, **fields)))
    return tuple(exercise for _, _, exercise in sorted(found, key=lambda each: each[:2]))


def exercises() -> tuple[Exercise, ...]:
    """All exercises, by level and then in the order of their files' `order`."""
    return _read(FOLDER)


def projects() -> tuple[Exercise, ...]:
    """All projects, in the order of their files' `order`."""
    return _read(PROJECTS)


def exercise(name: str) -> Exercise:
    """The exercise or project of that name. Raises ConfigError for an unknown one."""
    every = {each.name: each for each in (*exercises(), *projects())}
    if name not in every:
        raise ConfigError(f"unknown exercise {name!r}; use one of: {', '.join(every)}")
    return every[name]


def begin(chosen: Exercise, path: Path) -> bool:
    """Write the file to change, unless one is there; returns whether it is new.

    Raises:
        ConfigError: it cannot be written.
    """
    if path.exists():
        return False
    try:
        path.write_text((chosen.folder / "submission.py").read_text(encoding="utf-8"), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; give another place with --file") from error
    return True


def judge(chosen: Exercise, submission: Path) -> Judgement:
    """Check a submission in a process of its own.

    Raises:
        ConfigError: the file is not there, or a package that the exercise needs is not.
    """
    if not submission.is_file():
        raise ConfigError(f"{submission} does not exist; `openmla learn {chosen.name}` writes it")
    missing = [name for name in chosen.needs if not env.is_importable(name)]
    if missing:
        raise ConfigError(f"{chosen.name} needs {', '.join(missing)}; run: pip install 'openmla[triton]'")
    command = [sys.executable, "-m", "openmla.learn.judge", chosen.name, str(submission.resolve())]
    # Triton looks for this when it defines a function; its exercises are judged in its interpreter, on any machine. The
    # others do without: openmla.decode itself would run there, a hundred times slower.
    interpreted = {"TRITON_INTERPRET": "1"} if "triton" in chosen.needs else {}
    # One thread: the tensors are small, and threads that wait for one another cost more than they do.
    variables = env.for_child(**interpreted, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    try:
        done = subprocess.run(
            command, env=variables, capture_output=True, text=True, timeout=chosen.seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return Judgement(False, f"still running after {chosen.seconds} s; is there a loop over every token or head?")
    if done.returncode:
        return Judgement(False, _raised(done.stderr, submission.resolve(), done.returncode))
    found = json.loads(done.stdout.splitlines()[-1])
    return Judgement(bool(found["passed"]), str(found["sentence"]), found["points"])


def _raised(stderr: str, submission: Path, code: int) -> str:
    """The last line of a traceback, and the last line of the submission in it."""
    lines = stderr.strip().splitlines() or [f"the process ended with code {code} and said nothing"]
    places = re.findall(rf'File "{re.escape(str(submission))}", line (\d+)', stderr)
    return f"line {places[-1]} of your file: {lines[-1]}" if places else lines[-1]
