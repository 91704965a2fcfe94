"""A bundle built without a GPU: what it holds, when it serves, and when it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from openmla.backends.cute import bundle, families
from openmla.core.errors import CompileError, ConfigError

FAMILY = {"combine": ((families.CombineVariant("bf16", 128),), families.build_combine)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle")
    lines: list[str] = []
    assert bundle.build(out, FAMILY, lines.append) == out / "manifest.json"
    assert lines[0].startswith("[1/1] combine_bf16_128: ")
    return out


def _never(*args: object) -> bundle.CompiledObject:
    raise AssertionError("a bundled kernel is not compiled")


@pytest.fixture
def only_the_bundle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with the bundle and without a compiler."""
    real = bundle.env.is_importable
    monkeypatch.setattr(bundle.env, "is_importable", lambda name: name not in ("cutlass", "triton") and real(name))
    monkeypatch.setattr(bundle, "_load", lambda library, name: (library, name))
    monkeypatch.setattr(bundle.compiler, "compile_apart", _never)
    monkeypatch.setattr(bundle, "FAMILIES", {})
    monkeypatch.setattr(bundle, "_served", {})
    monkeypatch.setenv("OPENMLA_AOT_DIR", str(folder))
    bundle._manifest.cache_clear()
    return folder


def test_the_manifest_says_what_is_inside(folder: Path) -> None:
    entry = json.loads((folder / "manifest.json").read_text())["families"]["combine"]
    assert entry["arch"] == "sm_90a"
    (function,) = entry["functions"].values()
    assert function["config"] == {"dtype": "bf16", "columns": 128}
    assert function["resources"]["local_bytes"] == 0
    assert (folder / entry["library"]).stat().st_size < 200_000


def test_served_without_a_compiler(only_the_bundle: Path) -> None:
    variant = families.CombineVariant("bf16", 128)
    assert bundle.availability("combine", variant)
    served = bundle.serve("combine", variant)
    assert served.source == "bundle"
    assert served.function == (only_the_bundle / "combine.so", "combine_bf16_128")
    assert bundle.loaded() == {"combine_bf16_128": "bundle"}


def test_another_variant_is_not_served(only_the_bundle: Path) -> None:
    variant = families.CombineVariant("fp16", 128)
    (reason,) = bundle.availability("combine", variant).reasons
    assert "combine_fp16_128 must be compiled and cannot be" in reason
    assert f"the bundle at {only_the_bundle} has no combine_fp16_128" in reason
    with pytest.raises(CompileError, match="nvidia-cutlass-dsl is not installed"):
        bundle.serve("combine", variant)


def test_the_same_name_with_another_configuration_is_not_served(only_the_bundle: Path) -> None:
    class Renamed(families.CombineVariant):
        name = "combine_bf16_128"

    assert not bundle.availability("combine", replace(Renamed("bf16", 128), columns=64))


def test_a_bundle_of_other_sources_is_not_served(only_the_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "source_hash", lambda: "of a later version")
    variant = families.CombineVariant("bf16", 128)
    (reason,) = bundle.availability("combine", variant).reasons
    assert f"the bundle at {only_the_bundle} was built from other sources" in reason
    with pytest.raises(CompileError, match="built from other sources"):
        bundle.serve("combine", variant)


def test_a_changed_library_is_refused(only_the_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in only_the_bundle.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes() + (b"\0" if path.suffix == ".so" else b""))
    monkeypatch.setenv("OPENMLA_AOT_DIR", str(tmp_path))
    with pytest.raises(CompileError, match="was changed after it was built"):
        bundle.serve("combine", families.CombineVariant("bf16", 128))


@pytest.mark.parametrize("text", ["", "{", '{"format": 99}'], ids=["empty", "garbage", "newer"])
def test_a_manifest_that_cannot_be_read_is_an_error(
    only_the_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    (tmp_path / "manifest.json").write_text(text)
    monkeypatch.setenv("OPENMLA_AOT_DIR", str(tmp_path))
    with pytest.raises(ConfigError, match=r"manifest\.json"):
        bundle.availability("combine", families.CombineVariant("bf16", 128))


def test_a_kernel_that_spills_is_not_bundled(tmp_path: Path) -> None:
    def spilling(config: families.CombineVariant, folder: Path) -> bundle.CompiledObject:
        compiled = families.build_combine(config, folder)
        return replace(compiled, resources=replace(compiled.resources, local_bytes=8))

    with pytest.raises(CompileError, match="spills registers"):
        bundle.build(tmp_path, {"combine": (FAMILY["combine"][0], spilling)}, lambda line: None)
