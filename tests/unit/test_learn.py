"""The exercises: references pass, what is given and what is wrong does not, and says why; progress stays in one file."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path

import pytest

from openmla.cli import main
from openmla.core.errors import ConfigError
from openmla.learn import course, progress

PROJECTS = course.projects()
EVERY = (*course.exercises(), *PROJECTS)


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)


def judge(exercise: course.Exercise, file: str) -> course.Judgement:
    for name in exercise.needs:
        pytest.importorskip(name, reason=f"{exercise.name} needs {name}")
    return _judged(exercise.name, file)


@functools.cache
def _judged(name: str, file: str) -> course.Judgement:
    """Each file is judged once: the process takes seconds."""
    exercise = course.exercise(name)
    return course.judge(exercise, exercise.folder / file)


def test_each_level_has_at_least_two_and_there_are_three_projects():
    for level in course.LEVELS:
        assert sum(each.level == level for each in course.exercises()) >= 2
    assert len(PROJECTS) == 3


@pytest.mark.parametrize("project", PROJECTS, ids=lambda each: each.name)
def test_a_rubric_gives_a_hundred_points_and_no_single_criterion_passes(project):
    points = [each.points for each in project.rubric]
    assert sum(points) == 100
    assert max(points) < course.PASS_POINTS


@pytest.mark.parametrize("project", PROJECTS, ids=lambda each: each.name)
def test_projects_are_graded_line_by_line(project):
    best, given = judge(project, "reference.py"), judge(project, "submission.py")
    assert best.points == 100
    assert 0 < given.points < course.PASS_POINTS
    for criterion in project.rubric:
        assert f"{criterion.name}: " in best.sentence
        assert f"{criterion.name}: " in given.sentence
    assert "  0 of " in given.sentence


def test_the_first_criterion_comes_before_the_others(tmp_path, capsys):
    """A fast plan that covers nothing gets no points, and only one hint."""
    file = tmp_path / "split_plan.py"
    file.write_text("def plan(blocks, num_parts, invariant):\n    return []\n", encoding="utf-8")
    assert main(["learn", "split_plan", "--check"]) == 1
    assert capsys.readouterr().out.startswith("not yet: covered: request 0 of 512 blocks has no piece")
    assert main(["learn", "split_plan"]) == 0
    told = capsys.readouterr().out
    assert "(project)" in told
    assert " 25  invariant: pieces do not depend on batch mates" in told


@pytest.mark.parametrize("exercise", EVERY, ids=lambda each: each.name)
def test_reference_passes(exercise):
    found = judge(exercise, "reference.py")
    assert found.passed, found.sentence


@pytest.mark.parametrize("exercise", EVERY, ids=lambda each: each.name)
def test_wrong_submission_gets_its_hint(exercise):
    found = judge(exercise, "wrong.py")
    hint = re.match(r'"""HINT: (.*)"""', (exercise.folder / "wrong.py").read_text(encoding="utf-8"))
    assert not found.passed
    assert hint[1] in found.sentence, found.sentence


@pytest.mark.parametrize("exercise", EVERY, ids=lambda each: each.name)
def test_what_is_given_does_not_pass_as_it_stands(exercise):
    found = judge(exercise, "submission.py")
    assert not found.passed
    assert "Error" not in found.sentence


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("1 / 0", r"line 1 of your file: ZeroDivisionError"),
        ("import os\nos._exit(3)", r"ended with code 3"),
        ("def place(row, column):\n    return {}[row]", r"line 2 of your file: KeyError"),
        ("place = 7", r"'int' object is not callable"),
        ("", r"no attribute 'place'"),
        ("def place(row, column):\n    return 0", r"two pieces lie at 0"),
        ("def place(row, column):\n    return row + 64 * column", r"a row now takes 8 clocks"),
    ],
)
def test_whatever_a_submission_does_is_a_judgement(body, said, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(body + "\n", encoding="utf-8")
    found = course.judge(course.exercise("bank_conflicts"), file)
    assert not found.passed
    assert re.search(said, found.sentence), found.sentence


def test_an_endless_loop_ends(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("while True:\n    pass\n", encoding="utf-8")
    quick = dataclasses.replace(course.exercise("bank_conflicts"), seconds=1)
    assert "still running after 1 s" in course.judge(quick, file).sentence


def test_the_way_of_a_learner(capsys, tmp_path):
    assert main(["learn"]) == 0
    assert "0 of 11 solved; next: openmla learn cache_bytes" in capsys.readouterr().out
    assert main(["learn", "bank_conflicts"]) == 0
    assert "wrote bank_conflicts.py" in capsys.readouterr().out
    assert main(["learn", "bank_conflicts", "--check"]) == 1
    assert "not yet: a column of eight rows takes 8 clocks" in capsys.readouterr().out
    file = tmp_path / "bank_conflicts.py"
    file.write_text((course.FOLDER / "bank_conflicts" / "reference.py").read_text(encoding="utf-8"), encoding="utf-8")
    assert main(["learn", "bank_conflicts"]) == 0
    assert "left as it is" in capsys.readouterr().out
    assert main(["learn", "bank_conflicts", "--check", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["passed"], found["attempts"]) == (True, 2)
    assert main(["learn", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["exercises"]}
    assert rows["bank_conflicts"]["solved"]
    assert rows["cache_bytes"]["solved"] is None
    assert progress.path() == tmp_path / "state" / "openmla" / "learn.json"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["learn", "nosuch"], "unknown exercise 'nosuch'; use one of: cache_bytes"),
        (["learn", "cache_bytes", "--check"], "cache_bytes.py does not exist; `openmla learn cache_bytes` writes it"),
        (["learn", "--check"], "name one"),
        (["learn", "cache_bytes", "--file", "no/such/folder.py"], "cannot write no/such/folder.py"),
    ],
)
def test_wrong_use_says_what_to_do(arguments, said, capsys):
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "[]", '{"schema": 9}', '{"schema": 1, "attempts": 3, "solved": {}}'])
def test_a_foreign_progress_file_is_refused_and_kept(content):
    progress.path().parent.mkdir(parents=True)
    progress.path().write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match="not a progress file"):
        progress.read()
    assert progress.path().read_text(encoding="utf-8") == content


def test_traffic_counts_what_moves():
    import torch

    from openmla.learn.traffic import count

    a, b = torch.zeros(4, 8), torch.zeros(8, 2)
    with count() as moved:
        _ = a.view(8, 4).mT
        assert moved.bytes == 0  # views move nothing
        _ = a @ b
        assert moved.bytes == a.nbytes + b.nbytes + 4 * 2 * 4
        torch.zeros(1, 8).expand(100, 8).sum()
    assert moved.bytes < 1000  # an expanded row is read once
