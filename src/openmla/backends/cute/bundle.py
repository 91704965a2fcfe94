"""Where a compiled kernel comes from: an ahead-of-time bundle first, else the compiler with a private disk cache.

    served = bundle.serve("decode_dense", config)
    served.function(...)            # launch
    served.source                   # "bundle" or "jit", and in `served.origin` the file it was loaded from

A bundle is a folder written by `openmla compile`: shared libraries and a manifest that names, for each function, the
configuration it was compiled for. A function is used only if the whole configuration agrees and the bundle was built
from this version's sources (the arguments of a compiled function are those of the Python that calls it), and a library
only if its SHA-256 is the manifest's.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch

from openmla.backends.base import Verdict
from openmla.backends.cute import compiler, diskcache
from openmla.backends.cute.families import FAMILIES, Family
from openmla.backends.cute.toolchain import (
    ARCH,
    MANIFEST,
    MANIFEST_FORMAT,
    link_bundle,
    source_hash,
    write_manifest,
)
from openmla.core import env, incidents
from openmla.core.errors import CompileError, ConfigError

_CACHE_SCHEMA = 1


class Variant(Protocol):
    """What this module asks of a kernel's frozen Config."""

    @property
    def name(self) -> str:
        """Exported function name; says every field."""
        ...

    def as_dict(self) -> dict[str, Any]:
        """Every field, JSON-able."""
        ...


@dataclass(frozen=True)
class Served:
    """A launchable function and where it came from."""

    function: Any
    source: str  # "bundle" | "jit"
    origin: Path


_served: dict[tuple[str, str], Served] = {}
_lock = threading.Lock()


def availability(family: str, config: Variant) -> Verdict:
    """Whether `serve` can work here, without compiling: every reason why not."""
    if not env.is_importable("tvm_ffi"):
        return Verdict(("apache-tvm-ffi is not installed: pip install 'openmla[cuda]'",))
    if _in_bundle(family, config) is not None:
        return Verdict()
    missing = [
        f"{package} is not installed: pip install 'openmla[cuda]'"
        for module, package in (("cutlass", "nvidia-cutlass-dsl"), ("triton", "triton"))
        if not env.is_importable(module)
    ]
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        missing.append("no C compiler (cc, gcc or clang) on PATH to link with")
    if not missing:
        return Verdict()
    where = env.AOT_DIR.read()
    bundle = f"the bundle at {where} has no {config.name}" if where else "OPENMLA_AOT_DIR names no bundle"
    if where and is_outdated(_manifest(where).get("families", {}).get(family, {})):
        bundle = f"the bundle at {where} was built from other sources: write it anew with `openmla compile`"
    return Verdict((f"{config.name} must be compiled and cannot be: {'; '.join(missing)}; {bundle}",))


def serve(family: str, config: Variant) -> Served:
    """The function of one variant, loaded once per process.

    Args:
        family: key of `families.FAMILIES`; what compiles the variant when nothing is cached.
        config: the variant.

    Raises:
        CompileError: nothing can serve it; the message says what was tried.
    """
    key = (family, config.name)
    found = _served.get(key)
    if found is not None:
        return found
    with _lock:
        if key not in _served:
            _served[key] = _from_bundle(family, config) or _from_compiler(family, config)
        return _served[key]


def arguments(function: Any, values: Iterable[Any]) -> list[Any]:
    """`values` as a loaded function takes them without converting: 0.2 us less per tensor and call, for what stays the same."""
    if type(function).__module__.partition(".")[0] != "tvm_ffi":
        return [*values]
    import tvm_ffi

    return [tvm_ffi.from_dlpack(each) if isinstance(each, torch.Tensor) else each for each in values]


def loaded() -> dict[str, str]:
    """Function name -> source, of everything loaded in this process."""
    return {name: found.source for (_, name), found in sorted(_served.items())}


def build(
    out: Path,
    families: Mapping[str, Family],
    progress: Callable[[str], None],
) -> Path:
    """Compile every variant of `families` into a bundle folder, on a machine with the DSL and no GPU.

    Args:
        out: folder for one library per family and the manifest; made if need be.
        families: name -> (variants, function that compiles one variant into a folder).
        progress: called with one line per variant.

    Returns:
        The manifest's path.

    Raises:
        CompileError: a tool is missing, the compiler refused, or a kernel spills registers.
    """
    out.mkdir(parents=True, exist_ok=True)
    manifest = out / MANIFEST
    total, done = sum(len(variants) for variants, _ in families.values()), 0
    for family, (variants, compile_one) in families.items():
        with tempfile.TemporaryDirectory(prefix="openmla-bundle-") as scratch:
            compiled = []
            for config in variants:
                compiled.append(compile_one(config, Path(scratch)))
                done += 1
                used = compiled[-1].resources
                progress(f"[{done}/{total}] {config.name}: {used.registers} registers, {used.spills} spills")
                if used.spills and not getattr(config, "mods", ()):  # a user's function may need more registers
                    raise CompileError(f"{config.name} spills registers ({used.spills}); a bundle holds no such kernel")
            library = link_bundle([each.object_path for each in compiled], out / f"{family}.so")
            manifest = write_manifest(out, family, library, {c.name: c.as_dict() for c in variants}, compiled)
    return manifest


def is_outdated(entry: Mapping[str, Any]) -> bool:
    """Whether a family of a manifest was built from other sources than those that run now."""
    return bool(entry) and entry.get("sources") != source_hash()


@cache
def _manifest(folder: str) -> dict[str, Any]:
    path = Path(folder) / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{env.AOT_DIR.name}={folder!r} holds no readable {MANIFEST}: {error}") from error
    if manifest.get("format") != MANIFEST_FORMAT:
        raise ConfigError(
            f"{path} has format {manifest.get('format')!r}, this version reads {MANIFEST_FORMAT}; "
            "write it anew with `openmla compile`"
        )
    return manifest


def _in_bundle(family: str, config: Variant) -> tuple[Path, str] | None:
    """(library, sha256) of a bundled function with exactly this configuration."""
    folder = env.AOT_DIR.read()
    if not folder:
        return None
    entry = _manifest(folder).get("families", {}).get(family, {})
    function = entry.get("functions", {}).get(config.name)
    if entry.get("arch") != ARCH or function is None or function["config"] != config.as_dict() or is_outdated(entry):
        return None
    return Path(folder) / entry["library"], entry["sha256"]


def _from_bundle(family: str, config: Variant) -> Served | None:
    found = _in_bundle(family, config)
    if found is None:
        return None
    library, expected = found
    actual = hashlib.sha256(library.read_bytes()).hexdigest()
    if actual != expected:
        raise CompileError(
            f"{library} was changed after it was built (SHA-256 {actual[:12]}, manifest {expected[:12]})"
        )
    return Served(_load(library, config.name), "bundle", library)


def _from_compiler(family: str, config: Variant) -> Served:
    verdict = availability(family, config)
    if not verdict:
        raise CompileError(verdict.reasons[0])

    def produce(folder: Path) -> Path:
        apart = compiler.can(family, config.name)
        made = compiler.compile_apart(family, config.name, folder) if apart else FAMILIES[family][1](config, folder)
        return link_bundle([made.object_path], folder / "kernel.so")

    _note_untested_versions()

    library = diskcache.fetch(_cache_key(family, config), produce)
    return Served(_load(library, config.name), "jit", library)


# What this version was compiled and run with; outside of it the canary decides.
TESTED = {"nvidia-cutlass-dsl": ((4, 8), (4, 9)), "apache-tvm-ffi": ((0, 1, 11), (0, 2))}


@cache
def _note_untested_versions() -> None:
    for name, (low, high) in TESTED.items():
        found = _version(name)
        numbers = tuple(int(part) for part in re.findall(r"\d+", found)[:3])
        if numbers and not low <= numbers < high:
            bounds = f">={'.'.join(map(str, low))},<{'.'.join(map(str, high))}"
            incidents.note("version_untested", f"package/{name}", f"{found}; tested with {bounds}")


def _load(library: Path, name: str) -> Any:
    import tvm_ffi

    return tvm_ffi.load_module(str(library))[name]


def _cache_key(family: str, config: Variant) -> str:
    """Everything that the bytes of a compiled kernel depend on."""
    return diskcache.key(
        {
            "schema": _CACHE_SCHEMA,
            "family": family,
            "config": config.as_dict(),
            "sources": source_hash(),
            "arch": ARCH,
            "python": list(sys.version_info[:2]),
            "versions": {name: _version(name) for name in ("nvidia-cutlass-dsl", "apache-tvm-ffi", "triton")},
        }
    )


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
