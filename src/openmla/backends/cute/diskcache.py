"""A private disk cache of compiled kernels: what is loaded into the process is what this user wrote, whole.

Loading a shared library runs its code, so the cache trusts nobody else: every folder on the way must be ours or
root's and not writable by others (a sticky /tmp excepted), the entry must be a regular file of ours, and its bytes
must have the SHA-256 that its manifest states. An entry that fails is set aside as `.bad` and built again. Entries
appear by rename, so nobody sees half of one; one process builds a key while others wait for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from openmla.core import env
from openmla.core.errors import CompileError

# A compile takes seconds; whoever holds a lock longer is stuck or dead, and building twice harms nobody.
LOCK_SECONDS = 300.0
_LIBRARY = "kernel.so"
_RECORD = "record.json"

_log = logging.getLogger("openmla")


def key(facts: dict[str, Any]) -> str:
    """SHA-256 of the canonical JSON of everything that the result depends on."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def fetch(entry_key: str, produce: Callable[[Path], Path]) -> Path:
    """The library of `entry_key`, from the cache or made by `produce(folder)`, which returns the file it wrote.

    Without a usable cache folder (read-only, full, not private) the library is made in a private temporary folder,
    and one warning says why.

    Raises:
        CompileError: from `produce`.
    """
    try:
        root = _private_root()
    except OSError as error:
        _log.warning("kernel cache is not used: %s", error)
        return _produce_outside(produce)
    entry = root / entry_key[:2] / entry_key
    found = _verified(entry)
    if found is not None:
        return found
    try:
        with _locked(root / f"{entry_key}.lock"):
            return _verified(entry) or _build(entry, produce)
    except OSError as error:
        _log.warning("kernel cache is not used: %s", error)
        return _produce_outside(produce)


def _private_root() -> Path:
    """The cache folder, made if need be. Raises OSError where it is not ours alone."""
    root = env.cache_dir() / "jit"
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    for folder in (root, *root.parents):
        facts = folder.lstat()
        if stat.S_ISLNK(facts.st_mode):
            raise PermissionError(f"{folder} is a symbolic link; set {env.CACHE_DIR.name} to a real folder of yours")
        if facts.st_uid not in (os.getuid(), 0):
            raise PermissionError(f"{folder} belongs to user {facts.st_uid}; set {env.CACHE_DIR.name} elsewhere")
        others_write = facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if others_write and not facts.st_mode & stat.S_ISVTX:
            raise PermissionError(
                f"{folder} is writable by others; chmod go-w it or set {env.CACHE_DIR.name} elsewhere"
            )
    return root


def _verified(entry: Path) -> Path | None:
    """The library of an entry if it is whole and ours; sets a broken entry aside."""
    library = entry / _LIBRARY
    try:
        record = json.loads((entry / _RECORD).read_text(encoding="utf-8"))
        descriptor = os.open(library, os.O_RDONLY | os.O_NOFOLLOW)
        with os.fdopen(descriptor, "rb") as file:
            facts = os.fstat(file.fileno())
            digest = hashlib.sha256(file.read()).hexdigest()
        if facts.st_uid != os.getuid() or facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ValueError("not owned by this user alone")
        if digest != record["sha256"] or facts.st_size != record["bytes"]:
            raise ValueError("its bytes are not the ones that were written")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.warning("kernel cache entry %s is set aside: %s", entry.name[:12], error)
        with contextlib.suppress(OSError):
            entry.rename(entry.with_name(f"{entry.name}.{os.getpid()}.{time.monotonic_ns()}.bad"))
        return None
    return library


def _build(entry: Path, produce: Callable[[Path], Path]) -> Path:
    """Produce into a folder beside the entry, then rename it into place."""
    entry.parent.mkdir(mode=0o700, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=entry.parent, prefix=".new-"))
    library = produce(work).rename(work / _LIBRARY)
    library.chmod(0o600)
    content = library.read_bytes()
    record = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (work / _RECORD).write_text(json.dumps(record), encoding="utf-8")
    for path in (library, work / _RECORD):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    try:
        work.rename(entry)
    except OSError:
        # Another process that waited for no lock was faster; its entry serves as well as ours.
        found = _verified(entry)
        if found is None:
            raise
        return found
    return entry / _LIBRARY


def _produce_outside(produce: Callable[[Path], Path]) -> Path:
    """Make the library where nobody else will look; it lives as long as the machine's temporary files."""
    try:
        return produce(Path(tempfile.mkdtemp(prefix="openmla-kernel-")))
    except OSError as error:
        raise CompileError(
            f"no folder to compile in: {error}; set {env.CACHE_DIR.name} to one with free space"
        ) from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a key, or go on without it after LOCK_SECONDS. The kernel frees a dead holder's lock."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    deadline = time.monotonic() + LOCK_SECONDS
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    _log.warning(
                        "another process holds %s for %.0f s; compiling without waiting", path.name, LOCK_SECONDS
                    )
                    break
                time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)
