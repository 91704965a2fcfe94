"""Commands that pages print: every `openmla` line parses, every script, make target and file that one names is there.

What they do is tested where they live (tests/integration/test_cli.py; the guide's in test_walkthrough.py); this test is about
pages that keep a flag, a verb or a path which is gone.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from openmla import cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "ARCHITECTURE.md", *(ROOT / "docs").rglob("*.md")])
_FENCE = re.compile(r"^```(?:text|console|sh|bash)?\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`((?:openmla|python|make) [^`\n]+)`")
_VERBS = set(re.findall(r"^    (\w+) ", cli._parser().format_help(), re.MULTILINE))


def commands(page: Path) -> list[str]:
    """Commands of the code blocks of a page, continued lines joined, and those between backticks."""
    text = page.read_text(encoding="utf-8")
    lines = [line for block in _FENCE.findall(text) for line in re.sub(r"\\\n\s*", " ", block).splitlines()]
    found = [*lines, *_INLINE.findall(text)]
    found = [re.sub(r"\s+# .*", "", line).strip() for line in found]
    found = [re.sub(r"^(?:[A-Z_]+=\S+ )+", "", line) for line in found]  # VARIABLE=value in front
    return [line for line in dict.fromkeys(found) if re.match(r"(openmla|python3?|make) ", line)]


WITH_COMMANDS = [page for page in PAGES if commands(page)]


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_prints_can_be_typed(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = []
    for command in commands(page):
        words = shlex.split(command.split(" | ")[0].split(" && ")[0].split(" > ")[0])
        if words[0] == "openmla":
            wrong += [f"{command}: {why}" for why in refusal(words[1:], capsys)]
        elif words[0] == "make":
            targets = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            wrong += [f"{command}: no target {each}" for each in targets if f"\n{each}:" not in makefile]
        else:
            scripts = [word for word in words[1:] if word.endswith(".py") and "/" in word]
            wrong += [f"{command}: no {each}" for each in scripts if not (ROOT / each).is_file()]
    assert not wrong


def refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Why argparse does not take a command; a verb in a sentence, such as `openmla bench`, may lack its arguments."""
    if len(words) == 1 and words[0] in _VERBS:
        return []
    if any("..." in word for word in words):
        words = [word for word in words if "..." not in word]
    try:
        cli._parser().parse_args(words)
    except SystemExit as stop:
        said = capsys.readouterr().err.strip().splitlines()
        return [] if stop.code in (0, None) else [said[-1] if said else "refused"]
    return []


def test_the_pages_print_commands_and_a_wrong_one_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert sum(len(commands(page)) for page in WITH_COMMANDS) > 60
    assert len(_VERBS) >= 11
    assert refusal(["bench", "--suit", "x", "--no-such"], capsys)
    assert refusal(["lern", "x"], capsys)


def test_the_laboratory_names_every_suite() -> None:
    from openmla.lab import suite

    text = (ROOT / "docs" / "laboratory.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \| ", text, re.MULTILINE)) >= set(suite.available())
