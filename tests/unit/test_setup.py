"""Set-up: the README's two commands, what they install, and what a CUDA host keeps."""

import importlib.util
import os
import re
import subprocess
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture
def venv():
    spec = importlib.util.spec_from_file_location("openmla_venv", ROOT / "constraints" / "venv.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints" / "cpu.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pairs}


def test_every_requirement_is_pinned_within_its_range():
    wanted = [
        *PROJECT["dependencies"],
        *(each for extra in PROJECT["optional-dependencies"].values() for each in extra),
    ]
    exact = pins()
    assert exact["torch"] == "2.13.0"
    for text in wanted:
        requirement = Requirement(text)
        if requirement.name == "openmla":
            continue
        version = exact.get(re.sub(r"[-_.]+", "-", requirement.name).lower())
        assert version is not None, f"{requirement.name} has no pin in constraints/cpu.txt"
        assert requirement.specifier.contains(version), f"{requirement} excludes the pin {version}"


def test_a_cuda_host_keeps_its_own_versions(venv, monkeypatch):
    host = SimpleNamespace(metadata={"Name": "Torch"})
    monkeypatch.setattr(venv.importlib.metadata, "distributions", lambda: [host])
    assert "torch==2.13.0" in venv.pins(None)
    kept = venv.pins("13.0")
    assert "torch==" not in kept
    assert "transformers==" in kept


def test_an_old_python_is_told_what_to_do(venv, monkeypatch, capsys):
    monkeypatch.setattr(venv.sys, "version_info", (3, 10, 0))
    monkeypatch.setattr(venv.sys, "argv", ["venv.py", "demo"])
    with pytest.raises(SystemExit, match="2"):
        venv.main()
    assert "make PYTHON=/path/to/python3.11" in capsys.readouterr().err


def test_unknown_set_is_a_usage_error(venv, monkeypatch, capsys):
    monkeypatch.setattr(venv.sys, "argv", ["venv.py", "everything"])
    with pytest.raises(SystemExit, match="2"):
        venv.main()
    assert "usage:" in capsys.readouterr().err


def test_make_help_names_every_command():
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in ("demo", "test", "lint", "bench-cpu", "clean"):
        assert f"make {name} " in done.stdout


def test_readme_and_ci_say_the_same():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make demo" in readme
    assert "make test" in readme
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    commands = [line for line in script.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert commands[-1] == "exec make test"


def test_the_oldest_versions_are_the_lower_ends_of_the_ranges():
    extras = PROJECT["optional-dependencies"]
    ranges = [*PROJECT["dependencies"], *extras["cuda"], *extras["monitor"], *extras["triton"], *extras["test"]]
    lower = {}
    for each in map(Requirement, ranges):
        ends = [spec.version for spec in each.specifier if spec.operator == ">="]
        lower.setdefault(re.sub(r"[-_.]+", "-", each.name).lower(), ends[0] if ends else None)
    lines = (ROOT / "constraints" / "oldest.txt").read_text(encoding="utf-8").splitlines()
    pins_of_ours = [line.split("==") for line in lines if not line.startswith(("#", "numpy"))]
    assert len(pins_of_ours) == 6
    for name, version in pins_of_ours:
        assert version == lower[name] or version.startswith(f"{lower[name]}."), (
            f"{name}: {version}, range {lower[name]}"
        )
