"""The kernel cache: private, whole, built once; and every way it can be damaged ends in a rebuild."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import logging
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from openmla import backends
from openmla.backends.cute import bundle, diskcache, families
from openmla.core import incidents
from openmla.core.errors import CompileError

KEY = diskcache.key({"kernel": "x", "config": {"heads": 128}})


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    incidents.reset()
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
    assert incidents.counts() == {("cache_entry_bad", "cache/entry"): 1}
    assert "cache_entry_bad" in str(backends.explain("decode"))
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
    assert incidents.counts() == {("cache_unusable", "cache/folder"): 1}
    assert incidents.state()[0] == "degraded"


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


# ------------------------------------------------------------------------------------------------ where no cache can be


def _refuse(number: int) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize(
    ("where", "number"), [("fsync", errno.ENOSPC), ("fsync", errno.EDQUOT), ("open", errno.EROFS), ("fsync", errno.EIO)]
)
def test_a_full_or_read_only_folder_costs_the_cache_and_nothing_else(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str, number: int
) -> None:
    compiler = Compiler()
    with monkeypatch.context() as broken, caplog.at_level(logging.WARNING, "openmla"):
        broken.setattr(os, where, _refuse(number))
        library = diskcache.fetch(KEY, compiler)
    assert library.read_bytes() == b"code"
    assert root not in library.parents
    assert not list(root.rglob(".new-*"))
    assert incidents.counts() == {("cache_unusable", "cache/folder"): 1}
    assert caplog.text.count("cache_unusable") == 1
    diskcache.fetch(KEY, compiler)  # there is room again
    assert diskcache.fetch(KEY, compiler).parent.parent.parent == root / "jit"


def test_a_user_without_a_home_has_no_cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENMLA_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", classmethod(lambda cls: (_ for _ in ()).throw(RuntimeError("no home"))))
    assert diskcache.fetch(KEY, Compiler()).read_bytes() == b"code"
    assert incidents.counts() == {("cache_unusable", "cache/folder"): 1}


def test_nowhere_to_compile_is_one_clear_error(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.mkdtemp", _refuse(errno.ENOSPC))
    with pytest.raises(CompileError, match="set OPENMLA_CACHE_DIR to one with free space"):
        diskcache.fetch(KEY, Compiler())


def test_a_stuck_lock_is_not_waited_for_forever(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diskcache, "LOCK_SECONDS", 0.2)
    (root / "jit").mkdir(mode=0o700)
    with open(root / "jit" / f"{KEY}.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert diskcache.fetch(KEY, Compiler()).read_bytes() == b"code"
    assert incidents.counts() == {("lock_stuck", "cache/lock"): 1}


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_build_leaves_nothing_behind(root: Path, interruption: type[BaseException]) -> None:
    def interrupted(folder: Path) -> Path:
        (folder / "kernel.so").write_bytes(b"half")
        raise interruption

    with pytest.raises(interruption):
        diskcache.fetch(KEY, interrupted)
    assert not [path for path in root.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert diskcache.fetch(KEY, Compiler()).read_bytes() == b"code"  # and the lock is free


def test_rests_and_the_least_recently_used_are_removed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diskcache, "MAX_BYTES", 250)
    keys = [diskcache.key({"number": number}) for number in range(4)]
    old = time.time() - 10
    for number, each in enumerate(keys[:3]):
        entry = diskcache.fetch(each, Compiler(b"x" * 100)).parent
        os.utime(entry, (old + number, old + number))
    left = [path.name for path in (root / "jit").glob("??/*")]
    assert sorted(left) == sorted(keys[1:3])
    diskcache.fetch(keys[1], Compiler())  # a hit makes it recent
    draft = root / "jit" / "00" / ".new-dead"
    draft.mkdir(parents=True)
    os.utime(draft, (0, 0))
    diskcache.fetch(keys[3], Compiler(b"x" * 100))
    assert sorted(path.name for path in (root / "jit").glob("??/*")) == sorted([keys[1], keys[3]])


def test_entries_of_other_versions_are_not_seen(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another source, schema, architecture, compiler or Python is another key: an older entry cannot be loaded."""
    variant = families.CombineVariant()
    keys = {bundle._cache_key("combine", variant)}
    for name, value in (("_CACHE_SCHEMA", 99), ("ARCH", "sm_100a"), ("source_hash", lambda: "other")):
        with monkeypatch.context() as other:
            other.setattr(bundle, name, value)
            keys.add(bundle._cache_key("combine", variant))
    for package in ("nvidia-cutlass-dsl", "apache-tvm-ffi", "triton"):
        with monkeypatch.context() as other:
            real = bundle._version
            other.setattr(
                bundle, "_version", lambda name, package=package, real=real: name if name == package else real(name)
            )
            keys.add(bundle._cache_key("combine", variant))
    with monkeypatch.context() as other:
        other.setattr(sys, "version_info", (3, 99, 0))
        keys.add(bundle._cache_key("combine", variant))
    assert len(keys) == 8


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_argument_of_a_kernel_is_in_its_key(family: str) -> None:
    """A field that is not in the key would serve one variant's code for another's."""
    variants = families.FAMILIES[family][0]
    assert len({bundle._cache_key(family, each) for each in variants}) == len(variants)
    for each in dataclasses.fields(variants[0]):
        written = variants[0].as_dict()
        assert each.name in written, f"{family}: {each.name} is in no key"
