"""A stranger follows the guide: every command that its pages print, in code blocks or in a sentence, is run as printed.

A command that a page prints and that nobody has decided about fails here; so does a decision about a command that is gone.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from openmla.cli import main
from openmla.learn import course

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "guide" / "index.md", *sorted((ROOT / "guide").glob("[0-9][0-9]_*.py"))]
_FENCE = re.compile(r"^(?:# )?```(?:text|console|sh|bash)?\n(.*?)^(?:# )?```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`((?:openmla|python|make|pip|source) [^`]*)`")
_STARTS = ("openmla", "python", "make", "pip", "source")

NOT_HERE = {
    "make venv-test": "builds the environment that this test runs in; the Makefile does it before every test",
    "source .venv/bin/activate": "changes a terminal",
    "make guide": "test_guide builds the site",
    "openmla compile": "a verb named in a sentence; see the next",
    "openmla bench": "a verb named in a sentence; the smoke suite is run",
    "openmla compile --out DIR": "DIR is the reader's; tests/compile/test_bundle.py makes a bundle",
    "openmla verify": "a minute of random cases; test_cli runs a few",
    "openmla tune": "minutes; test_cli runs a small search",
}
ENDS_WITH_1 = {"openmla learn cache_bytes --check": "not yet: mla_bytes is still None"}  # the file as it was given


def printed(page: Path) -> list[str]:
    """The commands of a page in the order of its text, without the comments behind them."""
    text = page.read_text(encoding="utf-8")
    found = [(match.start(), match[1]) for match in _INLINE.finditer(text)]
    for block in _FENCE.finditer(text):
        lines = [re.sub(r"^# ?", "", line) if page.suffix == ".py" else line for line in block[1].splitlines()]
        found += [(block.start(), line) for line in lines if line.split(" ")[0] in _STARTS]
    return list(dict.fromkeys(re.sub(r"\s+# .*", "", command).strip() for _, command in sorted(found)))


COMMANDS = list(dict.fromkeys(command for page in PAGES for command in printed(page)))


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the stranger sits: a folder with the guide in it, and nothing known of earlier days."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "guide").symlink_to(ROOT / "guide")
    return folder


def test_the_pages_print_commands_and_every_decision_is_about_one():
    assert len(COMMANDS) > 12
    assert set(NOT_HERE) | set(ENDS_WITH_1) <= set(COMMANDS)


@pytest.mark.parametrize("command", [each for each in COMMANDS if each not in NOT_HERE])
def test_a_printed_command_does_what_the_guide_says(command, desk, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    monkeypatch.setenv("XDG_STATE_HOME", str(desk / "state"))
    words = shlex.split(command)
    if words[0] == "python":
        paths = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
        done = subprocess.run(
            [sys.executable, *words[1:]], capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": paths}
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout
        return
    assert words[0] == "openmla", f"nobody has decided about {command!r}; run it here or say in NOT_HERE who does"
    if words[1] == "learn" and "--check" in words:  # the command before it, if another process ran that
        main(words[1:3])
        capsys.readouterr()
    code = main(words[1:])
    said = capsys.readouterr().out
    if command in ENDS_WITH_1:
        assert code == 1
        assert ENDS_WITH_1[command] in said
        return
    # The doctor of a machine without a GPU says so with 1, as its page promises.
    assert code in ((0, 1) if words[1] == "doctor" else (0,)), said
    assert said


def test_the_guide_names_every_exercise_and_project():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    missing = [
        each.name for each in (*course.exercises(), *course.projects()) if f"openmla learn {each.name}" not in text
    ]
    assert not missing
