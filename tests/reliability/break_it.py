"""A stranger's attempt to break it: each attempt is made for real, in processes of its own, and must end as documented.

    python tests/reliability/break_it.py [--only NAME] [--record FILE]

Hostile tensors, killed processes, corrupted caches, a full disk, a lying metrics client. Needs no GPU. An attempt is a
function that returns what happened in a few words, or raises. `documented` is the sentence that docs/reliability.md says.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import openmla
from openmla.backends.cute import diskcache
from openmla.core import incidents
from openmla.core.errors import OpenMLAError
from openmla.observe import metrics, monitor
from openmla.testing.cases import draw, native_arguments

ROOT = Path(__file__).resolve().parents[2]
Attempt = Callable[[Path], str]


@dataclass(frozen=True)
class Named:
    """One attempt and how it must end."""

    name: str
    documented: str
    run: Attempt


ATTEMPTS: list[Named] = []


def attempt(documented: str) -> Callable[[Attempt], Attempt]:
    """Register a function as an attempt."""

    def register(run: Attempt) -> Attempt:
        ATTEMPTS.append(Named(run.__name__, documented, run))
        return run

    return register


PATIENCE = 300.0  # a machine that is busy with other tests takes a minute to import PyTorch
CHILDREN: list[subprocess.Popen[str]] = []


def child(code: str, **variables: str) -> subprocess.Popen[str]:
    """A Python process that can import this tree; none outlives its attempt."""
    path = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    started = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], env={**os.environ, "PYTHONPATH": path, **variables}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    CHILDREN.append(started)
    return started


def settings(folder: Path, **more: str) -> dict[str, str]:
    """A private cache folder."""
    cache = folder / "cache"
    cache.mkdir(mode=0o700, exist_ok=True)
    return {"OPENMLA_CACHE_DIR": str(cache), **more}


# ------------------------------------------------------------------------------------------------ hostile tensors

HOSTILE = (-(2**31), -2, -1, 2**24, 2**30, 2**31 - 2, 2**31 - 1)


@attempt("bad ids, lengths and indices are masked and reported; other rows keep their bits; nobody dies")
def hostile_values(folder: Path) -> str:
    faults_seen: Counter[str] = Counter()
    ran = 0
    for op in ("decode", "sparse_decode", "sparse_prefill", "prefill"):
        for seed in range(120):
            case, pick = draw(seed, op), random.Random(seed)
            given = native_arguments(op, case.tensors())
            for tensor in given.values():
                if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.int32 and tensor.numel():
                    for _ in range(3):
                        place = tuple(pick.randrange(size) for size in tensor.shape)
                        tensor[place] = pick.choice(HOSTILE)
            out, *_ = getattr(openmla, op)(**given)
            assert out.shape[0] == given["q"].shape[0]
            ran += 1
            faults_seen.update(fault.name or "" for fault in openmla.check_errors())
    assert len(faults_seen) >= 5, faults_seen
    return f"{ran} calls with garbage in every index tensor; reported: {', '.join(sorted(faults_seen))}"


@attempt("a declared size beyond all memory is refused or ends in a typed error; nothing is allocated first")
def tensor_bombs(folder: Path) -> str:
    kv = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16)
    ends = Counter[str]()
    for batch in (10**7, 10**9, 10**12):
        q = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16).expand(batch, 1, 128, 64)  # 128 bytes of memory
        lengths = torch.zeros(1, dtype=torch.int32).expand(batch)
        table = torch.zeros(1, 1, dtype=torch.int32).expand(batch, 1)
        try:
            openmla.decode(q, kv, table, lengths, d_v=32)
        except (OpenMLAError, RuntimeError, MemoryError, OverflowError) as error:
            ends[type(error).__name__] += 1
        else:
            raise AssertionError(f"batch {batch} was served")
    openmla.decode(kv, kv, *_tables(), d_v=32)
    return f"three bombs ended as {dict(ends)}, and the next call ran"


def _tables() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)


@attempt("whatever is passed as an option, one typed error names it")
def hostile_options(folder: Path) -> str:
    q = kv = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16)
    wrong: list[dict[str, Any]] = [
        {"backend": "../../etc/passwd"}, {"backend": 7}, {"policy": object()}, {"lse_base": "10"}, {"kv_layout": "x" * 10**6},
        {"d_v": 10**30}, {"window": -1}, {"softmax_scale": float("inf")}, {"plan": "plan"}, {"mods": "os.system"},
        {"workspace": [1]}, {"out": q}, {"cu_seqlens_q": 3}, {"attn_sink": "sink"},
    ]  # fmt: skip
    refused = 0
    for options in wrong:
        try:
            openmla.decode(q, kv, *_tables(), **{"d_v": 32, **options})
        except OpenMLAError:
            refused += 1
        else:
            raise AssertionError(f"{options} was accepted")
    return f"{refused} of {len(wrong)} refused with a typed error"


# ------------------------------------------------------------------------------------------------ the kernel cache

WORKER = """
    import hashlib, sys
    from pathlib import Path
    from openmla.backends.cute import diskcache
    body = lambda n: hashlib.sha256(str(n).encode()).digest() * 2000
    def produce(n):
        def build(folder):
            with open(folder / "kernel.so", "wb") as file:
                for part in range(0, 64000, 4000):
                    file.write(body(n)[part : part + 4000]); file.flush()
            return folder / "kernel.so"
        return build
    rounds, wrong = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS, 0
    for r in range(rounds):
        for n in range(KEYS):
            found = diskcache.fetch(diskcache.key({"n": n, "r": r % 4}), produce(n))
            wrong += found.read_bytes() != body(n)
    print(wrong)
"""


def _workers(folder: Path, count: int, rounds: int, keys: int = 4) -> list[subprocess.Popen[str]]:
    code = WORKER.replace("ROUNDS", str(rounds)).replace("KEYS", str(keys))
    return [child(code, **settings(folder)) for _ in range(count)]


@attempt("8 processes fetch the same keys 800 times: every one gets whole, right bytes")
def crowded_cache(folder: Path) -> str:
    results = [each.communicate(timeout=PATIENCE) for each in _workers(folder, 8, 100)]
    assert [out.strip() for out, _ in results] == ["0"] * 8, results
    entries = [path for path in (folder / "cache" / "jit").glob("??/*") if not path.name.startswith(".")]
    assert len(entries) == 16, entries
    return "8 x 100 rounds of 4 keys, 0 wrong, 16 entries"


@attempt("builders killed at any moment leave nothing that is served, and no lock")
def killed_builders(folder: Path) -> str:
    pick, killed = random.Random(0), 0
    for _ in range(5):
        workers = _workers(folder, 8, 10_000, keys=3)
        time.sleep(pick.uniform(2.0, 3.5))  # imports take about 2 s here
        for each in workers:
            if each.poll() is None:
                each.send_signal(signal.SIGKILL)
                killed += 1
        for each in workers:
            each.communicate()
        for entry in list((folder / "cache" / "jit").glob("??/[0-9a-f]*"))[::2]:
            with contextlib.suppress(OSError):  # so that the next round builds again
                for path in entry.iterdir():
                    path.unlink()
                entry.rmdir()
    out, err = _workers(folder, 1, 4, keys=3)[0].communicate(timeout=PATIENCE)
    assert out.strip() == "0", err
    return f"{killed} killed with SIGKILL; the next process got right bytes at once"


@attempt("a corrupted entry is set aside as .bad, noted and built again; wrong bytes are never loaded")
def corrupted_entries(folder: Path) -> str:
    os.environ.update(settings(folder))
    pick, body, rebuilt = random.Random(0), os.urandom(64_000), 0
    key = diskcache.key({"kernel": "x"})

    def produce(work: Path) -> Path:
        nonlocal rebuilt
        rebuilt += 1
        (work / "kernel.so").write_bytes(body)
        return work / "kernel.so"

    for number in range(200):
        library = diskcache.fetch(key, produce)
        assert hashlib.sha256(library.read_bytes()).digest() == hashlib.sha256(body).digest()
        damage(library, pick, number)
    assert rebuilt == 200, rebuilt
    bad = len(list((folder / "cache").rglob("*.bad")))
    noted = sum(n for (kind, _), n in incidents.counts().items() if kind == "cache_entry_bad")
    assert bad == noted == 199, (bad, noted)
    return "200 corruptions, 199 set aside before a rebuild, 0 wrong loads"


def damage(library: Path, pick: random.Random, number: int) -> None:
    """One of eight ways."""
    content = bytearray(library.read_bytes())
    kind = number % 8
    if kind == 0:
        content[pick.randrange(len(content))] ^= 1 << pick.randrange(8)
        library.write_bytes(content)
    elif kind == 1:
        library.write_bytes(content[: pick.randrange(len(content))])
    elif kind == 2:
        library.write_bytes(b"")
    elif kind == 3:
        library.write_bytes(bytes(content) + b"more")
    elif kind == 4:
        (library.parent / "record.json").write_text('{"sha256": 7, "bytes": "x"}')
    elif kind == 5:
        (library.parent / "record.json").write_bytes(os.urandom(100))
    elif kind == 6:
        library.chmod(0o666)
    else:
        target = library.with_name("elsewhere")
        library.rename(target)
        library.symlink_to(target)


@attempt("a cache folder that others can write, or that hides behind a symbolic link, is not used")
def planted_folders(folder: Path) -> str:
    ends = []
    for number, kind in enumerate(("world-writable", "symbolic link", "a file")):
        place = folder / f"cache{number}"
        if kind == "world-writable":
            place.mkdir()
            place.chmod(0o777)
        elif kind == "symbolic link":
            (folder / "real").mkdir()
            place.symlink_to(folder / "real")
        else:
            place.write_text("not a folder")
        code = """
            from openmla.backends.cute import diskcache
            def produce(f):
                (f / "kernel.so").write_bytes(b"ours"); return f / "kernel.so"
            print(diskcache.fetch("k" * 64, produce))
        """
        out, err = child(code, OPENMLA_CACHE_DIR=str(place)).communicate(timeout=PATIENCE)
        assert out.strip() and str(place) not in out and "cache_unusable" in err, (kind, out, err)
        ends.append(kind)
    return f"refused: {', '.join(ends)}; each compiled privately, with one line in the log"


@attempt("on a full disk kernels live as long as their process; with no space at all there is one clear error")
def full_disk(folder: Path) -> str:
    """A file-size limit of 8 KiB is a disk that is full after 8 KiB; /dev/full is one that never has room."""
    code = """
        import resource, signal, sys
        from openmla.backends.cute import diskcache
        from openmla.core.errors import CompileError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        def produce(f):
            (f / "kernel.so").write_bytes(b"x" * 60000); return f / "kernel.so"
        try:
            diskcache.fetch("k" * 64, produce)
        except CompileError as error:
            print("CompileError", error)
        import openmla, torch
        q = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16)
        openmla.decode(q, q, torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32), d_v=32)
        print("served")
    """
    out, err = child(code, **settings(folder)).communicate(timeout=PATIENCE)
    assert "CompileError no folder to compile in" in out and "set OPENMLA_CACHE_DIR" in out, (out, err)
    assert out.strip().endswith("served"), (out, err)
    assert not list((folder / "cache").rglob("kernel.so"))
    code = """
        import logging, sys, openmla
        logging.basicConfig(stream=open("/dev/full", "w", buffering=1), level=logging.WARNING)
        logging.raiseExceptions = False
        from openmla.core import incidents
        for n in range(100):
            incidents.note("lock_stuck", "cache/lock", f"reason {n}")
        print(sum(incidents.counts().values()))
    """
    out, err = child(code).communicate(timeout=PATIENCE)
    assert out.strip() == "100", (out, err)
    return "no space to compile: one CompileError, decode goes on; a log on /dev/full loses lines and no request"


@attempt("a server without a home or a writable disk starts and serves")
def no_home(folder: Path) -> str:
    code = """
        import openmla, torch
        from openmla.backends.cute import diskcache
        def produce(f):
            (f / "kernel.so").write_bytes(b"ours"); return f / "kernel.so"
        print(diskcache.fetch("k" * 64, produce).read_bytes())
        q = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16)
        print(openmla.decode(q, q, torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32), d_v=32)[0].shape)
    """
    out, err = child(code, HOME="/proc/nowhere", XDG_CACHE_HOME="", OPENMLA_CACHE_DIR="").communicate(timeout=PATIENCE)
    assert "b'ours'" in out and "torch.Size" in out and err.count("cache_unusable") == 1, (out, err)
    return "kernel made in a private temporary folder, one line in the log, decode served"


# ------------------------------------------------------------------------------------------------ the exporter


@attempt("clients that lie, stall, shout or come in crowds get an error or silence; scrapes and decode go on")
def lying_metrics_client(folder: Path) -> str:
    running = monitor.start(port=0)
    monitor._Handler.timeout = 1.0
    pick, sockets = random.Random(0), []
    q = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16)
    try:
        for number in range(300):
            openmla.decode(q, q, *_tables(), d_v=32)
            with contextlib.suppress(OSError):
                each = socket.create_connection(running.address, timeout=2)
                lie = (
                    b"GET /metrics HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n", b"GET " + b"/" * 70_000, b"\r\n" * 50,
                    b"POST /metrics HTTP/1.0\r\n\r\n", b"GET /health HTTP/9.9\r\n\r\n", pick.randbytes(500), b"G",
                    b"GET /metrics HTTP/1.0\r\n" + b"A: b\r\n" * 5000 + b"\r\n", b"",
                )[number % 9]  # fmt: skip
                each.sendall(lie)
                if number % 2:
                    each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # close with a reset
                    each.close()
                else:
                    sockets.append(each)
        deadline, text = time.monotonic() + 15, b""
        while not text.startswith(b"HTTP/1.0 200"):
            assert time.monotonic() < deadline, "the exporter no longer answers"
            with contextlib.suppress(OSError), socket.create_connection(running.address, timeout=3) as honest:
                honest.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
                text = b"".join(iter(lambda: honest.recv(65536), b""))
        assert b"openmla_calls_total" in text
    finally:
        for each in sockets:
            each.close()
        running.stop()
    failed = [key for key in incidents.counts() if key[0] == "monitor_failed"]
    assert not failed and metrics.health()["state"] != "failed", (failed, metrics.health())
    return "300 lies in nine forms; an honest scrape got its answer, 300 calls of decode ran meanwhile"


# ------------------------------------------------------------------------------------------------ processes


@attempt("a process killed while it serves leaves nothing behind that the next one trips over")
def killed_servers(folder: Path) -> str:
    code = """
        import signal
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a shell ignores it
        import openmla, torch
        from openmla.observe import monitor, watchdog
        monitor.start(port=0); watchdog.start(5)
        q = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16)
        print("serving", flush=True)
        while True:
            openmla.decode(q, q, torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32), d_v=32)
    """
    ends = []
    for number, how in enumerate((signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGKILL)):
        each = child(code, **settings(folder))
        assert each.stdout is not None and each.stdout.readline().strip() == "serving"
        time.sleep(0.1 * number)
        each.send_signal(how)
        each.communicate(timeout=PATIENCE)
        ends.append(each.returncode)
    assert ends == [-9, -15, ends[2], -9] and ends[2] in (-2, 1, 130), ends
    rests = [path for path in (folder / "cache").rglob("*") if path.is_file()]
    assert not rests, rests
    return f"exit codes {ends}, no files left"


def main() -> int:
    """Every attempt, one after another."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="")
    parser.add_argument("--record", type=Path, default=None)
    options = parser.parse_args()
    logging.getLogger("openmla").propagate = False
    torch.set_num_threads(1)
    ends: dict[str, dict[str, Any]] = {}
    for each in ATTEMPTS:
        if options.only and each.name != options.only:
            continue
        incidents.reset()
        begin = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            os.chmod(folder, 0o700)
            try:
                found, passed = each.run(Path(folder)), True
            except Exception as error:  # whatever it is, it is how this attempt ended
                found, passed = f"{type(error).__name__}: {error}"[:2000], False
            finally:
                for started in CHILDREN:
                    if started.poll() is None:
                        started.kill()
                        started.communicate()
                CHILDREN.clear()
        ends[each.name] = {"passed": passed, "documented": each.documented, "found": found}
        print(
            f"{each.name:<22} {'as documented' if passed else 'BROKEN'} ({time.monotonic() - begin:.1f} s): {found}",
            flush=True,
        )
    failures = [name for name, end in ends.items() if not end["passed"]]
    if options.record:
        outcomes = {"passed": len(ends) - len(failures), "failed": len(failures)}
        record = {"outcomes": outcomes, "cases": len(ends), "failures": failures, "measured": ends}
        options.record.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if failures or not ends else 0


if __name__ == "__main__":
    sys.exit(main())
