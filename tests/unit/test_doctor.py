"""The doctor: one broken thing is one line, on machines that lack nearly everything."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from openmla import backends
from openmla.backends.cute.toolchain import source_hash
from openmla.core import env
from openmla.observe import doctor
from openmla.observe.doctor import Check

SRC = Path(__file__).resolve().parents[2] / "src"
OPTIONAL = ("triton", "cutlass", "transformers", "matplotlib", "rich", "jinja2")

# Put in front of a program: every optional package is there no more.
BLOCK = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OPTIONAL!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
"""


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("OPENMLA_")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, "PYTHONPATH": str(SRC), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_broken_probe_becomes_a_line():
    def broken():
        yield Check("machine", "first", "ok", "fine")
        raise OSError("libcuda.so.1: wrong\nELF class")

    found = doctor.examine([("machine", broken), ("settings", lambda: [Check("settings", "later", "ok", "fine")])])
    assert [check.name for check in found.checks][-2:] == ["probe", "later"]
    assert found.checks[-2].found == "failed with OSError: libcuda.so.1: wrong ELF class"
    assert not found.is_healthy
    assert "1 problem(s)" in str(found)


def test_every_kernel_of_the_table_is_named_with_its_reason():
    lines = {(check.section, check.name): check for check in doctor.examine([("kernels", doctor._backends)]).checks}
    for op in backends.OPS:
        for kernel in backends.kernels(op):
            line = lines[f"kernels for {op}", f"{kernel.backend}/{kernel.name}"]
            assert line.state in ("ok", "absent")
            assert line.found
    assert any("not built" in check.found for check in lines.values())


def test_every_variable_is_listed_with_value_and_legality(monkeypatch):
    monkeypatch.setenv("OPENMLA_BACKEND", "cude")
    monkeypatch.setenv("OPENMLA_CHECKS", "strict")
    lines = {check.name: check for check in doctor.examine([("settings", doctor._settings)]).checks}
    assert {variable.name for variable in env.ALL} <= set(lines)
    assert lines["OPENMLA_BACKEND"].state == "problem"
    assert "auto, cute, triton, torch" in lines["OPENMLA_BACKEND"].fix
    assert lines["OPENMLA_CHECKS"].found == "strict (set); legal: off, fast, device, strict"


def test_cache_folder_of_others_is_a_problem(tmp_path):
    folder = tmp_path / "cache"
    assert doctor._cache_folder(folder).state == "ok"
    folder.mkdir(mode=0o700)
    assert doctor._cache_folder(folder).state == "ok"
    folder.chmod(0o777)
    assert doctor._cache_folder(folder).state == "problem"
    assert "chmod 700" in doctor._cache_folder(folder).fix
    link = tmp_path / "link"
    folder.chmod(0o700)
    link.symlink_to(folder)
    assert doctor._cache_folder(link).state == "problem"
    assert folder.stat().st_mode & stat.S_IWOTH == 0


def test_cache_folder_that_cannot_be_written_is_a_note(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    line = doctor._cache_folder(tmp_path / "deep" / "cache")
    assert line.state == "note"
    assert "OPENMLA_CACHE_DIR" in line.fix


MANIFEST = '{"format": 1, "families": {"d": {"arch": "sm_90a", "sources": "HASH", "functions": {"f": {}}}}}'


@pytest.mark.parametrize(
    ("manifest", "state", "words"),
    [
        (None, "problem", "no readable manifest.json"),
        ("[]", "problem", "no readable manifest.json"),
        ('{"format": 99, "families": {}}', "problem", "format 99"),
        (
            MANIFEST.replace("HASH", source_hash()),
            "ok",
            "1 of d for sm_90a",
        ),
        (
            MANIFEST.replace("HASH", "other"),
            "problem",
            "built from other sources",
        ),
    ],
)
def test_bundle_is_read_and_judged(tmp_path, manifest, state, words):
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    line = doctor._bundle(tmp_path)
    assert line.state == state
    assert words in line.found


def test_text_fits_100_columns_and_json_is_versioned():
    found = doctor.examine()
    assert max(map(len, str(found).splitlines())) <= 100
    record = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert record["schema"] == doctor.SCHEMA
    assert record["healthy"] is True, str(found)
    assert {"section", "name", "state", "found", "fix"} == set(record["checks"][0])


@pytest.mark.parametrize(
    ("driver", "cuda", "state", "words"),
    [
        (None, None, "absent", "no NVIDIA driver"),
        ("580.1", None, "note", "CPU build"),
        ("580.1", "13.0", "problem", "yet no GPU"),
    ],
)
def test_a_missing_gpu_has_its_own_reason(monkeypatch, driver, cuda, state, words):
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.torch.version, "cuda", cuda)
    monkeypatch.setattr(doctor, "_driver", lambda: driver)
    (line,) = doctor._gpus()
    assert line.state == state
    assert words in line.found


def test_a_package_whose_module_is_gone_is_noted(monkeypatch):
    monkeypatch.setattr(doctor.env, "is_importable", lambda module: False)
    lines = {check.name: check for check in doctor._packages()}
    assert lines["matplotlib"].state == "note"
    assert "cannot be found" in lines["matplotlib"].found
    assert lines["flashinfer"].state == "absent"
    assert "pip install" in lines["flashinfer"].fix


@pytest.mark.parametrize("verb", ["doctor", "explain"])
def test_verbs_run_without_optional_packages(verb):
    done = run_python(f"{BLOCK}\nfrom openmla.cli import main\nraise SystemExit(main([{verb!r}]))")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "torch/" in done.stdout


def test_decode_runs_without_optional_packages():
    code = f"""{BLOCK}
import torch, openmla
q = torch.randn(1, 1, 4, 576)
out, lse = openmla.decode(q, torch.randn(2, 64, 1, 576), torch.tensor([[1, 0]], dtype=torch.int32),
                          torch.tensor([70], dtype=torch.int32))
print(out.shape, bool(lse.isfinite().all()), [m for m in {OPTIONAL!r} if m in sys.modules])
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "torch.Size([1, 1, 4, 512]) True []"


def test_doctor_with_a_home_that_does_not_exist(tmp_path):
    code = "from openmla.cli import main\nraise SystemExit(main(['doctor', '--json']))"
    done = run_python(code, HOME=str(tmp_path / "none"), XDG_CACHE_HOME="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["healthy"]
    assert not (tmp_path / "none").exists()


def test_doctor_with_a_read_only_home(tmp_path):
    tmp_path.chmod(0o500)
    try:
        code = "from openmla.cli import main\nraise SystemExit(main(['doctor', '--json']))"
        done = run_python(code, HOME=str(tmp_path), XDG_CACHE_HOME="")
    finally:
        tmp_path.chmod(0o700)
    assert done.returncode == 0, done.stdout + done.stderr
    line = next(check for check in json.loads(done.stdout)["checks"] if check["name"] == "kernel cache")
    assert line["state"] in ("ok", "note")  # root may write anywhere
    assert list(tmp_path.iterdir()) == []
