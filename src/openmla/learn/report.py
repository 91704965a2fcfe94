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
    """Every exercise, and what is solved."""

    exercises: tuple[Exercise, ...]
    progress: Progress
    passed: bool = True

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        rows = [
            {
                "name": each.name, "title": each.title, "level": each.level, "minutes": each.minutes,
                "attempts": self.progress.attempts.get(each.name, 0), "solved": self.progress.solved.get(each.name),
            }
            for each in self.exercises
        ]  # fmt: skip
        return {"exercises": rows, "progress_file": str(progress.path())}

    def __str__(self) -> str:
        lines = []
        width = max(len(each.name) for each in self.exercises)
        for level, meaning in course.LEVELS.items():
            lines.append(f"level {level}: {meaning}")
            for each in self.exercises:
                if each.level == level:
                    tries = self.progress.attempts.get(each.name, 0)
                    state = "solved" if each.name in self.progress.solved else f"tried {tries}" if tries else ""
                    lines.append(f"  {state:8} {each.name:{width}}  {each.minutes:3} min  {each.title}")
        solved = sum(each.name in self.progress.solved for each in self.exercises)
        following = next((each.name for each in self.exercises if each.name not in self.progress.solved), None)
        lines.append(
            f"{solved} of {len(self.exercises)} solved" + (f"; next: openmla learn {following}" if following else "")
        )
        return "\n".join(lines)


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
        return "\n\n".join([f"{self.exercise.title} (level {self.exercise.level})", *paragraphs, f"{told}\n{check}"])


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
        if self.passed:
            return (
                f"passed: {self.judgement.sentence}\n"
                f"one way to do it: {self.exercise.folder / 'reference.py'}\nwhat is next: openmla learn"
            )
        return f"not yet: {self.judgement.sentence}"


def overview() -> Overview:
    """The list. Raises ConfigError for a progress file that cannot be read."""
    return Overview(course.exercises(), progress.read())


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
