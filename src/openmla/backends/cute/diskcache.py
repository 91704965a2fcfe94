"""A private disk cache of compiled kernels: what is loaded into the process is what this user wrote, whole.

Loading a shared library runs its code, so the cache trusts nobody else: every folder on the way must be ours or
root's and not writable by others (a sticky /tmp excepted), the entry must be a regular file of ours, and its bytes
must have the SHA-256 that its manifest states. An entry that fails is set aside as `.bad` and built again. Entries
appear by rename, so nobody sees half of one; one process builds a key while others wait for it.

The hash finds damage. Against a malicious writer it is the permissions that protect: whoever may write here as this
user may run code as this user anyway. What nobody will use again (broken entries, drafts of killed builders, the least
recently used entries beyond 2 GiB) is removed by the next build.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from openmla.core import counters, env, incidents
from openmla.core.errors import CompileError

# A compile takes seconds; whoever holds a lock longer is stuck or dead, and building twice harms nobody.
LOCK_SECONDS = 300.0
MAX_BYTES = 2 << 30  # of entries; one is about 60 KiB
STALE_SECONDS = 86_400.0  # no build lasts so long: drafts and broken entries older than this belong to nobody
_LIBRARY = "kernel.so"
_RECORD = "record.json"


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
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        return _produce_outside(produce, error)
    entry = root / entry_key[:2] / entry_key
    found = _verified(entry)
    if found is not None:
        counters.add("kernel_cache", "hit")
        with contextlib.suppress(OSError):
            os.utime(entry)  # for the least recently used
        return found
    counters.add("kernel_cache", "miss")
    try:
        with _locked(root / f"{entry_key}.lock"):
            return _verified(entry) or _build(entry, produce)
    except OSError as error:
        return _produce_outside(produce, error)


def _private_root() -> Path:
    """The cache folder, made if need be. Raises OSError where it is not ours alone."""
    root = env.cache_dir().absolute() / "jit"
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
        try:
            record = json.loads((entry / _RECORD).read_bytes())
        except ValueError as error:
            raise ValueError(f"{_RECORD} is no JSON") from error
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
        incidents.note("cache_entry_bad", "cache/entry", f"{entry.name[:12]} is set aside: {error}")
        with contextlib.suppress(OSError):
            entry.rename(entry.with_name(f"{entry.name}.{os.getpid()}.{time.monotonic_ns()}.bad"))
        return None
    return library


def _build(entry: Path, produce: Callable[[Path], Path]) -> Path:
    """Produce into a folder beside the entry, then rename it into place."""
    entry.parent.mkdir(mode=0o700, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=entry.parent, prefix=".new-"))
    try:
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
    finally:
        shutil.rmtree(work, ignore_errors=True)  # gone already where the rename succeeded
    _tidy(entry.parent.parent, entry)
    return entry / _LIBRARY


def _tidy(root: Path, newest: Path) -> None:
    """Remove what nobody uses again. A process that has loaded an entry keeps it: the file lives until it is unmapped."""
    now, entries = time.time(), []
    for path in root.glob("??/*"):
        try:
            facts = path.lstat()
            is_rest = path.name.endswith(".bad") or path.name.startswith(".new-")
            if is_rest and now - facts.st_mtime > STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
            elif not is_rest:
                entries.append((facts.st_mtime, (path / _LIBRARY).stat().st_size, path))
        except OSError:  # another process tidies too
            continue
    excess = sum(size for _, size, _ in entries) - MAX_BYTES
    for _, size, path in sorted(entries):
        if excess <= 0:
            break
        if path != newest:
            shutil.rmtree(path, ignore_errors=True)
            excess -= size


def _produce_outside(produce: Callable[[Path], Path], why: Exception) -> Path:
    """Make the library where nobody else will look; it is removed when the process ends."""
    incidents.note("cache_unusable", "cache/folder", str(why))
    try:
        folder = Path(tempfile.mkdtemp(prefix="openmla-kernel-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return produce(folder)
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
                    reason = (
                        f"another process held {path.name[:12]} for {LOCK_SECONDS:.0f} s; compiling without waiting"
                    )
                    incidents.note("lock_stuck", "cache/lock", reason)
                    break
                time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)
