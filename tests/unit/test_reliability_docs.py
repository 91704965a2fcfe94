"""docs/reliability.md and docs/operations.md: every fault, kind, attempt and metric they name is there, and the reverse."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

from openmla.core import incidents

ROOT = Path(__file__).resolve().parents[2]
RELIABILITY = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")


def rows() -> dict[int, str]:
    return {int(number): line for line in RELIABILITY.splitlines() for number in re.findall(r"^\| (\d+) ", line)}


def test_all_forty_faults_are_there_and_name_tests_that_exist():
    assert sorted(rows()) == list(range(1, 41))
    tests = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    sections = re.findall(r"^def section_(\w+)", (ROOT / "tests" / "gpu" / "reliability_sections.py").read_text(), re.M)
    last: list[str] = []
    for number, line in sorted(rows().items()):
        named = re.findall(r"`(test_\w+)`", line)
        assert not set(named) - tests, f"fault {number} names tests that are not there: {set(named) - tests}"
        gpu = line.partition("GPU section")[2]
        assert not set(re.findall(r"`(\w+)`", gpu)) - set(sections), f"fault {number}: {gpu}"
        last = named or (last if "the same" in line else [])
        assert last, f"fault {number} has no test"


def test_counters_named_in_the_table_exist():
    for number, line in rows().items():
        counter = line.split("|")[3]
        named = re.findall(r"`(\w+)`", counter)
        assert set(named) <= set(incidents.KINDS), f"fault {number}: {named}"


def test_every_alarm_is_explained_with_its_health():
    table = dict(re.findall(r"^\| `(\w+)` \| (ok|degraded|failed) \|", OPERATIONS, re.M))
    assert table == {kind: each.health for kind, each in incidents.KINDS.items()}


def script(name: str) -> ModuleType:
    """A program of tests/reliability as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / "reliability" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_the_soak_knows_its_slowest_calls_without_a_list_of_all():
    times = script("soak").Times()
    for number in range(1000):
        times.add(1e-4 if number < 985 else 0.05)
    assert 50 <= times.p99_ms() <= 50 * 1.02
    for _ in range(9000):
        times.add(2e-4)
    assert 0.2 <= times.p99_ms() <= 0.2 * 1.02


def test_every_attempt_of_the_script_is_in_the_table_with_its_end():
    for each in script("break_it").ATTEMPTS:
        assert f"| `{each.name}` | {each.documented} |" in RELIABILITY, each.name
