"""One command that proves decode, sparse decode and sparse prefill on a GPU, in at most eight minutes.

    python tests/gpu/prove_decode.py [--backend cute|triton|torch] [--seconds 480] [--out prove_decode.json]
    python tests/gpu/prove_decode.py --backend cute --sections fuzz --case-seed 17     one item, here, with traceback
    python tests/gpu/prove_decode.py --backend torch --device cpu --small              the script itself, without a GPU
    python tests/gpu/prove_decode.py --check prove_decode.json                         whether a record is as it was left

Needs PyTorch and what the backend needs (cute: a bundle in OPENMLA_AOT_DIR, or the DSL). What is proved is in
`decode_sections.py`. A section runs in processes of its own that leave a record behind after every item: one that
crashes or hangs costs the item that it was at, and goes on behind it. Items that a backend does not support are
counted with the reason. Exit status: 0 when everything that ran passed and something ran.

The record is signed off where nothing failed, nothing was cut or left out, and every section reached the count that
`decode_sections.REQUIRED` asks for; else it lists what is missing. It carries the hashes of the sources and of the bundle
that it speaks of, and one of itself.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MAX_FAILURES = 20  # per process; a broken kernel fails everything, and twenty say as much as all
MAX_STARTS = 6  # of one section's process: crashes and hangs that it may have
WATCH_SECONDS = 0.2
GRACE_SECONDS = 30  # for items that are at work when the time is over
ALONE_SECONDS = 25  # for what measures time, behind everything else
LONG_SECONDS = 200  # an item that starts a program of its own


@dataclass
class Job:
    """A lane: every n-th item of some sections, one after another, in a process of its own."""

    lane: str
    sections: tuple[str, ...]
    shard: int = 0
    shards: int = 1
    begin: int = 0  # the first item, counted within the shard
    starts: int = 1

    @property
    def name(self) -> str:
        """For messages."""
        return self.lane if self.shards == 1 else f"{self.lane} {self.shard + 1}/{self.shards}"


@dataclass
class Record:
    """What happened in a section."""

    planned: int = 0  # items
    done: int = 0
    passed: int = 0
    unsupported: Counter[str] = field(default_factory=Counter)  # reason -> items
    not_run: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, str]] = field(default_factory=list)
    ran: Counter[str] = field(default_factory=Counter)  # kernel -> items
    counted: int = 0  # what items say that they did; one each where they say nothing
    measured: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    is_cut: bool = False  # by the time or by failures

    def add(self, other: Record) -> None:
        """Count another process of the same section in."""
        for name in ("unsupported", "not_run", "ran"):
            getattr(self, name).update(getattr(other, name))
        for name in ("planned", "done", "passed", "seconds", "counted"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.failures += other.failures
        self.measured.update(other.measured)
        self.is_cut |= other.is_cut

    @staticmethod
    def of(found: dict[str, Any]) -> Record:
        """From JSON."""
        return Record(**{**found, **{name: Counter(found[name]) for name in ("unsupported", "not_run", "ran")}})


@dataclass
class Progress:
    """What a process leaves behind after every item."""

    sections: dict[str, Record] = field(default_factory=dict)
    planned: int = 0  # items of this process
    done: int = 0
    running: str = ""  # the item at work
    running_section: str = ""

    @staticmethod
    def read(path: Path) -> Progress:
        """What a process left; nothing where it left nothing."""
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError):
            return Progress()
        return Progress(**{**found, "sections": {name: Record.of(each) for name, each in found["sections"].items()}})

    def write(self, path: Path) -> None:
        """In one step, so that a reader never sees half of it."""
        draft = path.with_suffix(".tmp")
        draft.write_text(
            json.dumps({**vars(self), "sections": {name: vars(each) for name, each in self.sections.items()}})
        )
        draft.replace(path)


# ---------------------------------------------------------------------------------------------- inside one process


def run_items(items: Sequence[Any], progress: Progress, save: Callable[[], None], begin: int, seconds: float) -> bool:
    """Run items in order from `begin`. False when the device is lost: a new process has to go on."""
    progress.planned = len(items) - begin
    for item in items[begin:]:
        progress.sections.setdefault(item.section, Record()).planned += 1
    is_alive, start = True, time.monotonic()
    for item in items[begin:]:
        record, at = progress.sections[item.section], time.monotonic()
        record.is_cut |= at - start > seconds or len(record.failures) >= MAX_FAILURES
        if record.is_cut:
            continue
        progress.running, progress.running_section = item.name, item.section
        save()
        is_alive = run_item(item, record)
        record.done += 1
        record.seconds += time.monotonic() - at
        progress.done += 1
        progress.running = ""
        if not is_alive:
            break
    save()
    return is_alive


def run_item(item: Any, record: Record) -> bool:
    """Run one and note how it ended. False when the device is lost."""
    from decode_sections import NotRunError

    from openmla.core.errors import UnsupportedError
    from openmla.testing.coverage import reasons

    try:
        found = item.run()
        record.passed += 1
        record.counted += found.get("counts", 1)
        record.ran.update(found.get("ran", ()))
        record.measured.update({f"{item.name}: {key}": value for key, value in found.get("measured", {}).items()})
    except NotRunError as error:
        record.not_run[str(error)] += 1
    except UnsupportedError as error:
        record.unsupported[reasons(error, item.backend)] += 1
    except Exception as error:  # whatever it is, it is this item's result
        text = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
        record.failures.append({"item": item.name, "repro": item.repro, "report": text[:4000]})
        if "CUDA" in text and not isinstance(error, AssertionError):
            return False
        import openmla

        openmla.check_errors()  # what it left is not the next one's
    return True


def listed(options: argparse.Namespace) -> list[Any]:
    """The items of the sections asked for, every n-th one of each."""
    import decode_sections

    setup = decode_sections.Setup(options.backend, options.device, options.small, options.soak)
    return [
        item
        for name in options.sections.split(",")
        for item in decode_sections.SECTIONS[name](setup, only=options.case_seed)[options.shard :: options.shards]
    ]


def work(options: argparse.Namespace) -> int:
    """The child: one shard of a lane."""
    import torch

    torch.set_num_threads(1)  # several of these run at a time
    progress, path = Progress(), Path(options.child)
    is_alive = run_items(listed(options), progress, lambda: progress.write(path), options.begin, options.seconds)
    return 0 if is_alive else 3


def single(options: argparse.Namespace) -> int:
    """One item in this process, with its traceback."""
    for item in listed(options):
        print(item.name)
        print(item.run())
    return 0


# ---------------------------------------------------------------------------------------------- around processes


def supervise(
    jobs: Sequence[Job],
    command: Callable[[Job, Path, float], list[str]],
    *,
    parallel: int,
    seconds: float,
    item_seconds: Callable[[str], float],
    say: Callable[[str], None],
) -> dict[str, Record]:
    """Run jobs, some at a time; start one again behind the item at which it crashed or hung.

    Args:
        jobs: in order.
        command: (job, path of its record, seconds that it has) -> argv.
        parallel: processes at a time.
        seconds: for all of them; what is not begun by then is cut.
        item_seconds: section -> a process at such an item whose record stands still for so long hangs.
        say: called with lines of progress.
    """
    records = {name: Record() for job in jobs for name in job.sections}
    waiting, at_work, begin = deque(jobs), [], time.monotonic()
    last = begin
    with tempfile.TemporaryDirectory() as folder:
        try:
            while waiting or at_work:
                left = seconds - (time.monotonic() - begin)
                while waiting and len(at_work) < parallel:
                    job = waiting.popleft()
                    path = Path(folder, f"{job.lane}-{job.shard}-{job.starts}.json")
                    log = path.with_suffix(".log").open("w")
                    process = subprocess.Popen(
                        command(job, path, max(left, 1.0)), stdout=log, stderr=log, start_new_session=True
                    )
                    at_work.append((job, path, process, log, time.monotonic()))
                for entry in list(at_work):
                    job, path, process, log, started = entry
                    stood = time.time() - path.stat().st_mtime if path.exists() else time.monotonic() - started
                    limit = item_seconds(Progress.read(path).running_section or job.sections[0])
                    is_hung = process.poll() is None and (stood > limit or left < -min(limit, GRACE_SECONDS))
                    if process.poll() is None and not is_hung:
                        continue
                    if is_hung:
                        os.killpg(process.pid, signal.SIGKILL)  # with what it started: the sanitizer has a child
                    process.wait()
                    log.close()
                    at_work.remove(entry)
                    found, again = _finish(job, path, process.returncode, is_hung, stood)
                    for name, each in found.sections.items():
                        each.is_cut |= again is not None and left <= 0 and each.done < each.planned
                        if again is not None and left > 0:
                            each.planned = each.done
                        records[name].add(each)
                        say(
                            f"{job.name}, {name}: {each.passed} passed, {len(each.failures)} failed, {each.seconds:.0f} s"
                        )
                    if again is not None and left > 0:
                        waiting.append(again)
                if time.monotonic() - last > 10:
                    last = time.monotonic()
                    doing = [
                        f"{job.name} {(now := Progress.read(path)).done}/{now.planned}" for job, path, *_ in at_work
                    ]
                    say(f"{left:.0f} s left: {', '.join(doing)}")
                time.sleep(WATCH_SECONDS)
        finally:
            for _, _, process, log, _ in at_work:
                os.killpg(process.pid, signal.SIGKILL)
                log.close()
    return records


def _finish(job: Job, path: Path, status: int, is_hung: bool, stood: float) -> tuple[Progress, Job | None]:
    """(what the process did, the job that goes on behind it or None)."""
    found = Progress.read(path)
    if status == 0 and not found.running:
        return found, None
    if found.running or status != 3:  # 3: the item's failure is in the record already, and the device is lost
        log = path.with_suffix(".log").read_text(errors="replace")[-2000:]
        how = f"no end after {stood:.0f} s" if is_hung else f"the process ended with status {status}"
        where = found.running or ("at its end" if found.planned else "before the first item")
        record = found.sections.setdefault(found.running_section or job.sections[0], Record())
        record.failures.append({"item": f"{job.name}: {where}", "repro": "", "report": f"{how}\n{log}"})
        record.done += bool(found.running)
        found.done += bool(found.running)
    rest = found.planned - found.done
    if not found.planned or rest <= 0 or job.starts >= MAX_STARTS:
        for name in job.sections:
            record = found.sections.setdefault(name, Record())
            record.is_cut |= record.done < record.planned or not found.planned
        return found, None
    return found, replace(job, begin=job.begin + found.done, starts=job.starts + 1)


def table(records: dict[str, Record]) -> str:
    """One line per section, then reasons and failures."""
    lines = [f"{'section':<13} {'passed':>6} {'failed':>6} {'unsupported':>11} {'not run':>7} {'of':>6} {'s':>5}"]
    for name, each in records.items():
        skipped, not_run = sum(each.unsupported.values()), sum(each.not_run.values())
        cut = "  cut" if each.is_cut else ""
        lines.append(
            f"{name:<13} {each.passed:>6} {len(each.failures):>6} {skipped:>11} {not_run:>7} {each.planned:>6} "
            f"{each.seconds:>5.0f}{cut}"
        )
    for name, each in records.items():
        lines += [f"{name}: {kernel} {count} items" for kernel, count in each.ran.most_common()]
        lines += [f"{name}: {key} = {value}" for key, value in each.measured.items()]
        lines += [f"{name}: unsupported {count}: {why}" for why, count in each.unsupported.most_common(12)]
        lines += [f"{name}: not run {count}: {why}" for why, count in each.not_run.most_common()]
    for name, each in records.items():
        for failure in each.failures:
            lines += ["", f"FAILED {name}: {failure['item']}", failure["report"], failure["repro"]]
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="cute", choices=("cute", "triton", "torch"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--sections", default="", help="comma-separated; default: all")
    parser.add_argument("--case-seed", type=int, default=None, help="one item of one section, in this process")
    parser.add_argument("--seconds", type=float, default=480.0, help="for everything")
    parser.add_argument("--item-seconds", type=float, default=90.0, help="an item that takes longer hangs")
    parser.add_argument("--parallel", type=int, default=10, help="processes on the device at a time")
    parser.add_argument("--soak", type=float, default=60.0, help="seconds of the soak, which runs beside the others")
    parser.add_argument("--check", type=Path, default=None, help="a record: is it signed off, and as it was left?")
    parser.add_argument("--small", action="store_true", help="a few items of each section")
    parser.add_argument("--out", type=Path, default=Path("prove_decode.json"), help="the JSON record")
    for name in ("--shard", "--begin"):
        parser.add_argument(name, type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--shards", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Everything in stages: what may share the device, then host times alone, then the sanitizer."""
    options = parse(argv)
    if options.child:
        return work(options)
    if options.check is not None:
        return check(options.check)
    if options.case_seed is not None:
        return single(options)
    import decode_sections

    from openmla.core.target import Target
    from openmla.lab import store

    wanted = options.sections.split(",") if options.sections else list(decode_sections.DEFAULT)
    unknown = sorted(set(wanted) - set(decode_sections.SECTIONS))
    if unknown:
        raise SystemExit(f"unknown section {', '.join(unknown)}; use {', '.join(decode_sections.SECTIONS)}")

    def command(job: Job, path: Path, seconds: float) -> list[str]:
        given = {"backend": options.backend, "device": options.device, "sections": ",".join(job.sections), "child": path,
                 "shard": job.shard, "shards": job.shards, "begin": job.begin, "seconds": seconds, "soak": options.soak}  # fmt: skip
        argv = [f"--{key}={value}" for key, value in given.items()] + ["--small"] * options.small
        return [sys.executable, str(HERE / "prove_decode.py"), *argv]

    def patience(section: str) -> float:
        own = {
            "soak": options.soak + LONG_SECONDS,
            "sanitize": LONG_SECONDS,
            "sanitize_more": LONG_SECONDS,
            "faults": LONG_SECONDS,
            "modes": LONG_SECONDS,
        }
        return own.get(section, options.item_seconds)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a time limit from outside ends the children too
    begin = time.monotonic()
    facts = {"backend": options.backend, "environment": store.environment(Target.detect(options.device)), **sources()}
    records: dict[str, Record] = {}
    alone = decode_sections.ALONE
    together = [lane for lane in decode_sections.LANES if lane != alone]
    for stage in (together, [alone]):
        jobs = [
            Job(lane, sections, shard, shards)
            for lane in stage
            for sections in [tuple(name for name in decode_sections.LANES[lane][0] if name in wanted)]
            for shards in [1 if options.small else decode_sections.LANES[lane][1]]
            for shard in range(shards if sections else 0)
        ]
        left = options.seconds - (time.monotonic() - begin)
        if jobs:
            records |= supervise(
                jobs, command, parallel=options.parallel,
                seconds=left - ALONE_SECONDS * (stage is together), item_seconds=patience,
                say=lambda text: print(f"[{time.monotonic() - begin:4.0f} s] {text}", file=sys.stderr, flush=True),
            )  # fmt: skip
        found = summary(records, {} if options.small else decode_sections.REQUIRED) | facts
        found |= {"seconds": time.monotonic() - begin, "utc": store.now()}
        options.out.write_text(json.dumps(found | {"sha256": digest(found)}, indent=1) + "\n")
    print(table(records))
    verdict = (
        "passed" if found["passed"] else "FAILED" if any(each.failures for each in records.values()) else "nothing ran"
    )
    missing = "".join(f"\n  {each}" for each in found["missing"])
    signed = "signed off" if found["signed_off"] else f"not signed off:{missing}"
    print(f"\n{verdict}; {found['seconds']:.0f} s; {signed}")
    return 0 if found["passed"] else 1


def sources() -> dict[str, str]:
    """What was proved: hashes of the package's and the suite's sources, and of the bundle's manifest."""
    whole = hashlib.sha256()
    for folder in (HERE.parents[1] / "src" / "openmla", HERE):
        for path in sorted(folder.rglob("*.py")):
            whole.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    bundle = Path(os.environ.get("OPENMLA_AOT_DIR", ""), "manifest.json")
    manifest = hashlib.sha256(bundle.read_bytes()).hexdigest() if bundle.is_file() else "none"
    return {"sources": whole.hexdigest(), "bundle": manifest}


def digest(record: dict[str, Any]) -> str:
    """SHA-256 of a record without this field."""
    rest = {name: value for name, value in record.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def check(path: Path) -> int:
    """Say whether a record is as it was left and signed off."""
    found = json.loads(path.read_text())
    is_whole = digest(found) == found.get("sha256")
    print(
        f"{path}: {'as it was left' if is_whole else 'CHANGED since it was left'}, {found['utc']}, {found['seconds']:.0f} s"
    )
    print("signed off" if found["signed_off"] else "not signed off: " + "; ".join(found["missing"]))
    return 0 if is_whole and found["signed_off"] else 1


def summary(records: dict[str, Record], required: dict[str, int]) -> dict[str, Any]:
    """The JSON record, without what is around it. `required`: section -> what it must have counted."""
    missing = [f"{name}: {len(each.failures)} failed" for name, each in records.items() if each.failures]
    missing += [f"{name}: cut" for name, each in records.items() if each.is_cut]
    missing += [f"{name}: {sum(each.not_run.values())} not run" for name, each in records.items() if each.not_run]
    for name, least in required.items():
        got = records[name].counted if name in records else 0
        if got < least:
            missing.append(f"{name}: {got} of {least}")
    has_failed = any(each.failures for each in records.values())
    return {
        "schema": 2,
        "passed": any(each.passed for each in records.values()) and not has_failed,
        "is_whole": not any(each.is_cut or each.not_run for each in records.values()),
        "signed_off": bool(required) and not missing,
        "missing": missing,
        "required": required,
        "sections": {name: vars(each) for name, each in records.items()},
    }


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    raise SystemExit(main())
