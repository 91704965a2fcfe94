"""The kernel cache: private, whole, built once; and every way it can be damaged ends in a rebuild."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from openmla.backends.cute import diskcache

KEY = diskcache.key({"kernel": "x", "config": {"heads": 128}})


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "private"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("OPENMLA_CACHE_DIR", str(folder))
    return folder


class Compiler:
    """Writes a file and counts how often it was asked to."""

    def __init__(self, content: bytes = b"code") -> None:
        self.content, self.calls = content, 0

    def __call__(self, folder: Path) -> Path:
        self.calls += 1
        (folder / "kernel.so").write_bytes(self.content)
        return folder / "kernel.so"


def test_built_once_then_served(root: Path) -> None:
    compiler = Compiler()
    first, second = diskcache.fetch(KEY, compiler), diskcache.fetch(KEY, compiler)
    assert first == second
    assert first.read_bytes() == b"code"
    assert compiler.calls == 1
    assert first.stat().st_mode & 0o077 == 0
    assert not list(root.rglob(".new-*"))


def test_every_fact_changes_the_key() -> None:
    facts = {"schema": 1, "config": {"heads": 128, "dtype": "bf16"}, "versions": {"dsl": "4.8.1"}}
    changed = [
        {**facts, "schema": 2},
        {**facts, "config": {"heads": 64, "dtype": "bf16"}},
        {**facts, "config": {"heads": 128, "dtype": "fp16"}},
        {**facts, "versions": {"dsl": "4.8.2"}},
    ]
    assert len({diskcache.key(each) for each in [facts, *changed]}) == 5


def _flip(library: Path) -> None:
    library.write_bytes(bytes([library.read_bytes()[0] ^ 1]) + library.read_bytes()[1:])


def _replace_by_link(library: Path) -> None:
    other = library.with_name("other")
    other.write_bytes(library.read_bytes())
    library.unlink()
    library.symlink_to(other)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(_flip, id="bit-flip"),
        pytest.param(lambda p: p.write_bytes(p.read_bytes()[:2]), id="truncated"),
        pytest.param(lambda p: p.write_bytes(b""), id="empty"),
        pytest.param(lambda p: (p.parent / "record.json").write_text("{"), id="record-garbage"),
        pytest.param(lambda p: (p.parent / "record.json").write_text("[]"), id="record-other-shape"),
        pytest.param(lambda p: p.chmod(0o666), id="writable-by-others"),
        pytest.param(_replace_by_link, id="symbolic-link"),
    ],
)
def test_a_damaged_entry_is_set_aside_and_rebuilt(
    root: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    compiler = Compiler()
    damage(diskcache.fetch(KEY, compiler))
    with caplog.at_level(logging.WARNING, "openmla"):
        again = diskcache.fetch(KEY, compiler)
    assert compiler.calls == 2
    assert again.read_bytes() == b"code"
    assert not again.is_symlink()
    assert "is set aside" in caplog.text
    assert len(list(root.rglob("*.bad"))) == 1


@pytest.mark.parametrize("problem", ["writable by others", "symbolic link"])
def test_a_folder_that_others_could_write_is_not_used(
    root: Path, problem: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if problem == "symbolic link":
        (root.parent / "link").symlink_to(root)
        monkeypatch.setenv("OPENMLA_CACHE_DIR", str(root.parent / "link"))
    else:
        root.chmod(0o777)
    compiler = Compiler()
    with caplog.at_level(logging.WARNING, "openmla"):
        library = diskcache.fetch(KEY, compiler)
    assert library.read_bytes() == b"code"
    assert root not in library.parents
    assert problem in caplog.text


def test_a_failing_compiler_leaves_nothing_that_could_be_served(root: Path) -> None:
    def fail(folder: Path) -> Path:
        (folder / "kernel.so").write_bytes(b"half")
        raise RuntimeError("the compiler died")

    with pytest.raises(RuntimeError, match="the compiler died"):
        diskcache.fetch(KEY, fail)
    compiler = Compiler()
    assert diskcache.fetch(KEY, compiler).read_bytes() == b"code"
    assert compiler.calls == 1


def test_many_processes_build_a_key_once_and_agree(root: Path, tmp_path: Path) -> None:
    count = tmp_path / "count"
    count.mkdir()
    code = textwrap.dedent(
        f"""
        import os, time
        from pathlib import Path
        from openmla.backends.cute import diskcache

        def produce(folder):
            Path({str(count)!r}, str(os.getpid())).touch()
            for chunk in range(40):                      # slow enough that all of them ask meanwhile
                with open(folder / "kernel.so", "ab") as file:
                    file.write(b"x" * 1000)
            return folder / "kernel.so"

        print(len(diskcache.fetch({KEY!r}, produce).read_bytes()))
        """
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ)
        for _ in range(4)
    ]
    assert [process.communicate()[0].strip() for process in processes] == ["40000"] * 4
    assert len(list(count.iterdir())) == 1


def test_a_killed_builder_leaves_the_key_free(root: Path) -> None:
    code = textwrap.dedent(
        f"""
        import os, signal
        from openmla.backends.cute import diskcache

        def produce(folder):
            (folder / "kernel.so").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)

        diskcache.fetch({KEY!r}, produce)
        """
    )
    killed = subprocess.run([sys.executable, "-c", code], env=os.environ, check=False)
    assert killed.returncode == -9
    compiler = Compiler()
    assert diskcache.fetch(KEY, compiler).read_bytes() == b"code"
