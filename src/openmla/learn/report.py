"""What `openmla learn` shows: the list, a task, a judgement. `str()` is text, `as_dict()` is JSON-able."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from openmla.learn import course, progress
from openmla.learn.course import Exercise, Judgement
from openmla.learn.progress import Progress

_WIDTH = 96


@dataclass(frozen=True)
class Overview:
    """Every exercise and project, and what is solved."""

    exercises: tuple[Exercise, ...]
    projects: tuple[Exercise, ...]
    progress: Progress
    passed: bool = True

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "exercises": [self._row(each) for each in self.exercises],
            "projects": [self._row(each) for each in self.projects],
            "progress_file": str(progress.path()),
        }

    def _row(self, each: Exercise) -> dict[str, Any]:
        attempts, solved = self.progress.attempts.get(each.name, 0), self.progress.solved.get(each.name)
        row = {"name": each.name, "title": each.title, "level": each.level, "minutes": each.minutes}
        return {**row, "attempts": attempts, "solved": solved}

    def __str__(self) -> str:
        lines = []
        for level, meaning in course.LEVELS.items():
            lines.append(f"level {level}: {meaning}")
            lines += [self._line(each) for each in self.exercises if each.level == level]
        lines.append(f"projects: longer, graded by a rubric, {course.PASS_POINTS} of 100 points pass")
        lines += [self._line(each) for each in self.projects]
        every = (*self.exercises, *self.projects)
        solved = sum(each.name in self.progress.solved for each in every)
        following = next((each.name for each in every if each.name not in self.progress.solved), None)
        lines.append(f"{solved} of {len(every)} solved" + (f"; next: openmla learn {following}" if following else ""))
        return "\n".join(lines)

    def _line(self, each: Exercise) -> str:
        width = max(len(other.name) for other in (*self.exercises, *self.projects))
        tries = self.progress.attempts.get(each.name, 0)
        state = "solved" if each.name in self.progress.solved else f"tried {tries}" if tries else ""
        return f"  {state:8} {each.name:{width}}  {each.minutes:3} min  {each.title}"


@dataclass(frozen=True)
class Task:
    """An exercise that was begun: the task, the file to change."""

    exercise: Exercise
    file: Path
    is_new: bool
    passed: bool = True

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self.exercise), "file": str(self.file), "is_new": self.is_new}

    def __str__(self) -> str:
        paragraphs = [textwrap.fill(each, _WIDTH) for each in self.exercise.task.strip().split("\n\n")]
        told = f"{'wrote' if self.is_new else 'there already, left as it is:'} {self.file}"
        file = "" if self.file == Path(f"{self.exercise.name}.py") else f" --file {self.file}"
        check = f"change it, then: openmla learn {self.exercise.name} --check{file}"
        kind = "project" if self.exercise.is_project else f"level {self.exercise.level}"
        rubric = "\n".join(f"{each.points:3}  {each.name}: {each.says}" for each in self.exercise.rubric)
        if rubric:
            paragraphs.append(f"What gives points ({course.PASS_POINTS} pass):\n{rubric}")
        return "\n\n".join([f"{self.exercise.title} ({kind})", *paragraphs, f"{told}\n{check}"])


@dataclass(frozen=True)
class Checked:
    """A judgement, with the way on."""

    exercise: Exercise
    judgement: Judgement
    attempts: int

    @property
    def passed(self) -> bool:
        """Whether the submission is right and past the bar."""
        return self.judgement.passed

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"name": self.exercise.name, **asdict(self.judgement), "attempts": self.attempts}

    def __str__(self) -> str:
        graded = "\n" if self.judgement.points is not None else " "
        if self.passed:
            return (
                f"passed:{graded}{self.judgement.sentence}\n"
                f"one way to do it: {self.exercise.folder / 'reference.py'}\nwhat is next: openmla learn"
            )
        return f"not yet:{graded}{self.judgement.sentence}"


def overview() -> Overview:
    """The list. Raises ConfigError for a progress file that cannot be read."""
    return Overview(course.exercises(), course.projects(), progress.read())


def begun(exercise: Exercise, file: Path) -> Task:
    """Write the file to change where there is none, and show the task. Raises ConfigError where it cannot be written."""
    return Task(exercise, file, course.begin(exercise, file))


def checked(exercise: Exercise, file: Path) -> Checked:
    """Judge a file and note the attempt. Raises ConfigError: no such file, a missing package, or no place for progress."""
    known = progress.read()
    judgement = course.judge(exercise, file)
    known.note(exercise.name, judgement.passed)
    progress.write(known)
    return Checked(exercise, judgement, known.attempts[exercise.name])
