"""Profile: where the time of one case goes, and what it asks of the memory; the same record from every tool.

    ncu        Nsight Compute on a GPU: utilisation, stalls, occupancy, bank conflicts, bytes that moved
    torch      the torch profiler: kernels through CUPTI on a GPU, operators of all threads on a CPU
    counters   our own: phases by stopwatch in the CPU kernel, and the arithmetic of the tiles everywhere

What a tool cannot see is listed with the reason, never left out in silence. The case passes the gate first.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from openmla.backends import kernels, select
from openmla.core.cost import cost
from openmla.core.errors import ConfigError, UnsupportedError
from openmla.core.target import Target
from openmla.lab import ceilings, clock, gate, peers, runner, suite, workload
from openmla.lab.peers import Contender
from openmla.lab.suite import Case

TOOLS = ("auto", "ncu", "torch", "counters")
_NCU_SECONDS = 300


@dataclass(frozen=True)
class Phase:
    """A part of the work. On a CPU `seconds` counts every thread: the parts add up to threads x wall time."""

    name: str
    seconds: float
    calls: int
    share: float


@dataclass(frozen=True)
class Reading:
    """One counter: value, unit, and what it means."""

    value: float
    unit: str
    meaning: str


@dataclass(frozen=True)
class Memory:
    """What a call asks of the memory. `moved` and `hit_rate` are measured or None; the rest follows from the tiles.

    fewest: every attended KV row once, queries and results once. asked: with every load that the row tiles issue.
    reuse: how often a KV byte is asked for; all but the first time it should come from a cache.
    """

    fewest: int
    asked: int
    reuse: float
    run_bytes: int  # contiguous bytes of one page: between two runs the address jumps
    moved: int | None = None
    hit_rate: float | None = None


@dataclass(frozen=True)
class Profile:
    """One case under one tool."""

    case: str
    who: str
    kernel: str
    config: str
    tool: str
    device: str
    seconds: float  # of one call, without the tool
    gate: str
    phases: tuple[Phase, ...]
    readings: dict[str, Reading]
    stalls: tuple[tuple[str, float], ...]
    operators: tuple[Phase, ...]
    memory: Memory
    missing: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Profiles:
    """All cases of a run, and the reasons of those that could not be profiled."""

    profiles: tuple[Profile, ...]
    refused: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"schema": 1, "profiles": [each.as_dict() for each in self.profiles], "refused": self.refused}

    def __str__(self) -> str:
        lines = [_text(each) for each in self.profiles]
        return "\n".join([*lines, *(f"{case}: not profiled, {why}" for case, why in self.refused.items())])


def load(*paths: Path) -> Profiles:
    """The records that `openmla profile --json` wrote, perhaps on machines that cannot draw, as one. Raises ConfigError."""
    profiles: list[Profile] = []
    refused: dict[str, str] = {}
    for path in paths:
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            profiles += [_of_dict(each) for each in raw["profiles"]]
            refused |= raw["refused"]
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path} is no record of openmla profile --json: {type(error).__name__} {error}"
            ) from error
    return Profiles(tuple(profiles), refused)


def _of_dict(raw: dict[str, Any]) -> Profile:
    changed: dict[str, Any] = {
        "phases": tuple(Phase(**each) for each in raw["phases"]),
        "operators": tuple(Phase(**each) for each in raw["operators"]),
        "readings": {name: Reading(**each) for name, each in raw["readings"].items()},
        "stalls": tuple((str(name), float(share)) for name, share in raw["stalls"]),
        "memory": Memory(**raw["memory"]),
    }
    return Profile(**{**raw, **changed})


def _text(one: Profile) -> str:
    memory = one.memory
    lines = [f"{one.case}: {one.who}/{one.kernel} takes {one.seconds * 1e6:.1f} us ({one.tool})"]
    lines += [f"  {100 * each.share:5.1f} %  {each.name}, {each.calls} times" for each in one.phases]
    lines += [f"  {name}: {each.value:.4g} {each.unit}, {each.meaning}" for name, each in one.readings.items()]
    lines += [f"  stalled {100 * share:.0f} % by {name}" for name, share in one.stalls[:5]]
    lines.append(
        f"  memory: {memory.fewest / 1e6:.3g} MB at least, {memory.asked / 1e6:.3g} MB asked for, each KV byte "
        f"{memory.reuse:.3g} times, in runs of {memory.run_bytes} bytes"
    )
    lines += [f"  not seen: {name}, {why}" for name, why in one.missing.items()]
    return "\n".join(lines)


# memory, from the tiles


def rows_per_load(kernel: Any, config: Any, case: Case) -> int:
    """Query rows that share one load of a KV tile: what the kernel's config says."""
    if kernel.backend == "torch":
        from openmla.backends.torch.attend import TASK_ROWS

        group = case.h_q // case.h_kv
        return max(TASK_ROWS // group, 1) * group  # whole query tokens
    if hasattr(config, "block_m"):
        return int(config.block_m)
    if kernel.name == "decode_dense":
        from openmla.backends.cute.decode_dense.config import BLOCK_ROWS

        return BLOCK_ROWS * int(config.cluster)  # a cluster shares its loads by multicast
    rows = int(getattr(config, "rows", 64))
    return 2 * rows if getattr(config, "pairs", False) else rows  # either CTA of a pair has the rows of both


def memory_of(case: Case, rows_each: int) -> Memory:
    """The bytes of a case when `rows_each` query rows share a load."""
    problem = workload.problem(case)
    lengths = case.draw_lengths()
    work = cost(problem, lengths)
    row_bytes = problem.layout.bytes_per_token * case.h_kv
    kv = sum(lengths) * row_bytes
    rows = case.s_q * (case.h_q // case.h_kv)
    tiles = -(-rows // rows_each)
    return Memory(work.bytes, work.bytes + (tiles - 1) * kv, float(tiles), case.page_size * row_bytes)


# the tools


@dataclass
class _Found:
    """What a tool has to say."""

    phases: list[Phase] = field(default_factory=list)
    readings: dict[str, Reading] = field(default_factory=dict)
    stalls: list[tuple[str, float]] = field(default_factory=list)
    operators: list[Phase] = field(default_factory=list)
    moved: int | None = None
    hit_rate: float | None = None
    missing: dict[str, str] = field(default_factory=dict)


_CPU_MISSING = {
    "stalls, occupancy, bank conflicts": "counters of a GPU",
    "bytes that moved": "a CPU's counters need the system's permission; asked and fewest bytes follow from the tiles",
}


def profile(
    cases: Sequence[Case], target: Target, *, tool: str = "auto", backend: str = "auto", seconds: float = 0.3,
    say: Callable[[str], None] | None = None,
) -> Profiles:  # fmt: skip
    """Profile each case.

    Args:
        cases: problems.
        target: this machine.
        tool: one of TOOLS; auto takes the first that works, in their order.
        backend: auto takes the kernel that would run.
        seconds: for the time without the tool.
        say: progress.

    Raises:
        ConfigError: an unknown tool, or ncu asked for where it cannot run.
    """
    if tool not in TOOLS:
        raise ConfigError(f"unknown tool {tool!r}; use one of: {', '.join(TOOLS)}")
    tell = say or (lambda text: None)
    done, refused = [], {}
    for case in cases:
        tell(f"profiling {case.name}")
        try:
            done.append(_one(case, target, tool, backend, seconds))
        except UnsupportedError as error:
            refused[case.name] = error.headline
    return Profiles(tuple(done), refused)


def _one(case: Case, target: Target, tool: str, backend: str, seconds: float) -> Profile:
    roof = ceilings.measure(target, (case.roof_dtype,), min(seconds, 0.3))
    work = cost(workload.problem(case), case.draw_lengths())
    sets, floor = runner.inputs(case, target, roof)
    chosen = select(peers.problem_of(case, sets[0]), target, backend)
    contender = peers.backend(case, sets, target, chosen.kernel.backend)
    if isinstance(contender, peers.Refusal):
        raise UnsupportedError(contender.reason, {}, case.name)
    verdict = gate.check(case, sets[0], *contender.call(0))
    if not verdict.is_green:
        raise UnsupportedError(f"no profile of a wrong result: {verdict.text}", {}, case.name)
    _, samples = runner.time_in_turn([contender], len(sets), target, case, floor, seconds, lambda text: None)
    median = clock.quantile(sorted(samples[0]), 0.5)
    used, found = _look(case, target, tool, contender, len(sets), chosen.kernel.backend, median)
    found.readings = {**_utilisation(work, median, roof, case), **found.readings}
    kernel = next(each for each in kernels("decode") if each is chosen.kernel)
    memory = memory_of(case, rows_per_load(kernel, chosen.config, case))
    if found.moved is not None:
        memory = Memory(memory.fewest, memory.asked, memory.reuse, memory.run_bytes, found.moved, found.hit_rate)
    return Profile(
        case.name, contender.who, contender.kernel, contender.config, used, target.name, median, verdict.text,
        tuple(found.phases), found.readings, tuple(found.stalls), tuple(found.operators), memory, found.missing,
    )  # fmt: skip


def _utilisation(work: Any, seconds: float, roof: ceilings.Ceilings, case: Case) -> dict[str, Reading]:
    arithmetic = work.flops / seconds / 1e12 / roof.gemm_tflops[case.roof_dtype]
    read = work.bytes / seconds / 1e9 / roof.read_gbps
    return {
        "arithmetic": Reading(100 * arithmetic, "%", "of the rate of a large product, from FLOPs and time"),
        "bandwidth": Reading(100 * read, "%", "of the rate of a bare read, from the fewest bytes and time"),
    }


def _look(
    case: Case, target: Target, tool: str, contender: Contender, num_sets: int, backend: str, seconds: float
) -> tuple[str, _Found]:
    """(the tool that worked, what it saw)."""
    why_not: dict[str, str] = {}
    if tool in ("auto", "ncu"):
        try:
            return "ncu", _ncu(case, target, backend)
        except ConfigError as error:
            if tool == "ncu":
                raise
            why_not["Nsight Compute"] = str(error)
    if not target.is_cuda:
        found = _stopwatch(contender, num_sets, seconds)
        if tool != "counters":
            found.operators = _operators(contender)
        found.missing = {**why_not, **_CPU_MISSING}
        return ("counters" if tool == "counters" else "torch"), found
    if tool == "counters":
        missing = {"phases, stalls, occupancy": "our counters stop at the launch; use --tool torch or ncu"}
        return "counters", _Found(missing=missing)
    found = _cupti(contender)
    found.missing.update(why_not)
    found.missing.setdefault("stalls, bank conflicts, bytes that moved", "counters that only Nsight Compute reads")
    return "torch", found


# the stopwatch in the CPU kernel


@contextlib.contextmanager
def _timed_methods(places: Sequence[tuple[type, str, str]], times: list[tuple[str, float]]) -> Iterator[None]:
    """Every call of the methods adds (phase, seconds) to `times`, in whatever thread it happens."""
    before = [(owner, name, owner.__dict__[name]) for owner, name, _ in places]

    def wrap(method: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            at = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                times.append((phase, time.perf_counter() - at))

        return timed

    for (owner, name, phase), (_, _, method) in zip(places, before, strict=True):
        setattr(owner, name, wrap(method, phase))
    try:
        yield
    finally:
        for owner, name, method in before:
            setattr(owner, name, method)


def _stopwatch(contender: Contender, num_sets: int, seconds: float) -> _Found:
    """Phases of the torch backend; of another one, only the whole."""
    if contender.who != "torch":
        return _Found([Phase("the whole call", seconds, 1, 1.0)])
    from openmla.backends.torch import attend, products, reading

    whole, read, scores, weigh, merge = "tile", "read keys", "scores: q k", "weighted sum: p v", "merge of tiles"
    forms = (products.PortableProducts, products._MicrokernelProducts)
    weighing = (products.PortableProducts, products.WideProducts, products.NarrowProducts)
    places: list[tuple[type, str, str]] = [
        (attend.Attention, "_tile", whole),
        (reading.CacheReader, "pages", read),
        *((form, "scores", scores) for form in forms),
        *((form, "weigh", weigh) for form in weighing),
        (attend._Rows, "merge", merge),
    ]
    times: list[tuple[str, float]] = []
    repeats = min(max(int(0.3 / max(seconds, 1e-6)), 3), 200)
    begin = time.perf_counter()
    with _timed_methods(places, times):
        for index in range(repeats):
            contender.call(index % num_sets)
    wall = time.perf_counter() - begin
    sums: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for phase, spent in times:
        sums[phase] += spent
        calls[phase] += 1
    inside = sums.pop(whole, 0.0)
    tiles = calls.pop(whole, 0)
    sums["softmax and masks"] = max(inside - sums[read] - sums[scores] - sums[weigh], 0.0)
    calls["softmax and masks"] = tiles
    threads = torch.get_num_threads()
    total = threads * wall
    rest = "waiting, planning, Python"
    sums[rest] = max(total - inside - sums[merge], 0.0)
    calls[rest] = repeats
    order = (read, scores, "softmax and masks", weigh, merge, rest)
    phases = [Phase(name, sums[name] / repeats, calls[name] // repeats, sums[name] / total) for name in order]
    slower = wall / repeats / seconds
    readings = {
        "threads": Reading(threads, "", "worker threads; each takes tiles as it becomes free"),
        "tiles": Reading(tiles / repeats, "", "stretches of keys per call"),
        "stopwatch": Reading(slower, "x", "time of a call with the stopwatch over that without"),
    }
    return _Found(phases, readings)


def _operators(contender: Contender) -> list[Phase]:
    """PyTorch operators by their own time, all threads."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    options = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    with record(activities=[ProfilerActivity.CPU], experimental_config=options) as seen:
        contender.call(0)
    events = [(str(each.key), each.self_cpu_time_total / 1e6, int(each.count)) for each in seen.key_averages()]
    total = sum(spent for _, spent, _ in events) or 1.0
    found = [Phase(name, spent, count, spent / total) for name, spent, count in events]
    return sorted(found, key=lambda each: -each.seconds)[:10]


# a GPU through CUPTI


def _cupti(contender: Contender) -> _Found:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    contender.call(0)
    torch.cuda.synchronize()
    with record(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        contender.call(0)
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        return of_trace(json.loads(path.read_text(encoding="utf-8")))


def kernel_name(name: str) -> str:
    """Of a kernel of the CuTe DSL the class that holds it, of others the first 60 characters."""
    found = re.search(r"openmlabackendscute[a-z_\d]*?([A-Z]\w*?)_object_at_", name)
    return found[1] if found else name[:60]


def of_trace(trace: dict[str, Any]) -> _Found:
    """Kernels of a chrome trace of the torch profiler: phases, and what the trace says about the longest."""
    kernels_seen = [each for each in trace.get("traceEvents", ()) if each.get("cat") == "kernel"]
    if not kernels_seen:
        return _Found(
            missing={"kernels": "the trace holds none: CUPTI is not permitted here, or another profiler holds it"}
        )
    spent: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for each in kernels_seen:
        spent[each["name"]] += each["dur"] / 1e6
        calls[each["name"]] += 1
    total = sum(spent.values())
    order = sorted(spent, key=lambda name: -spent[name])
    phases = [Phase(kernel_name(name), spent[name], calls[name], spent[name] / total) for name in order]
    longest = max(kernels_seen, key=lambda each: each["dur"]).get("args", {})
    known = {
        "est. achieved occupancy %": ("occupancy", "%", "of the longest kernel, estimated from its launch"),
        "registers per thread": ("registers", "per thread", "of the longest kernel"),
        "shared memory": ("shared memory", "bytes", "of one block of the longest kernel"),
        "blocks per SM": ("blocks per SM", "", "of the longest kernel, over the whole launch"),
    }
    readings = {
        name: Reading(float(longest[key]), unit, meaning)
        for key, (name, unit, meaning) in known.items()
        if key in longest
    }
    missing = {}
    if readings.get("occupancy") and not readings["occupancy"].value:
        del readings["occupancy"]  # what the estimate says of kernels with clusters or large shared memory
        missing["occupancy"] = "the trace estimates 0 for this kernel; use --tool ncu"
    timed = sorted((each["ts"], each["dur"]) for each in kernels_seen if "ts" in each)
    if any(begin + spent_us > following for (begin, spent_us), (following, _) in pairwise(timed)):
        missing["time of each kernel alone"] = (
            "kernels overlap: one that is launched early waits inside for the one before"
        )
    return _Found(phases, readings, missing=missing)


# a GPU through Nsight Compute

_TIME = "gpu__time_duration.sum"
_MOVED, _ASKED = "dram__bytes.sum", "lts__t_bytes.sum"
_METRICS = {
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed": (
        "tensor cores",
        "%",
        "of cycles in which they work",
    ),
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": ("memory", "%", "of the peak rate of the DRAM"),
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": ("L2", "%", "of the peak rate of the L2"),
    "lts__t_sector_hit_rate.pct": ("L2 hits", "%", "of the sectors asked for"),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("occupancy", "%", "of the warps an SM can hold"),
    "l1tex__data_bank_conflicts_pipe_lsu.sum": ("bank conflicts", "", "cycles lost to them in shared memory"),
    "launch__registers_per_thread": ("registers", "per thread", ""),
    "launch__shared_mem_per_block": ("shared memory", "bytes", "of one block"),
}
# Names of units differ between versions of ncu.
_SECONDS = {
    "nsecond": 1e-9,
    "ns": 1e-9,
    "usecond": 1e-6,
    "us": 1e-6,
    "msecond": 1e-3,
    "ms": 1e-3,
    "second": 1.0,
    "s": 1.0,
}
_STALL, _STALL_END = "smsp__average_warps_issue_stalled_", "_per_issue_active.ratio"


def _ncu(case: Case, target: Target, backend: str) -> _Found:
    """Runs this case once more in a process of its own under ncu. Raises ConfigError when that is not possible."""
    if not target.is_cuda:
        raise ConfigError(f"it profiles NVIDIA GPUs, this is {target.arch}")
    if shutil.which("ncu") is None:
        raise ConfigError("ncu is not on the PATH; it comes with the CUDA toolkit")
    failed = []
    for replay in ("kernel", "application"):
        done = _under_ncu(case, backend, replay)
        if "ERR_NVGPUCTRPERM" in done.stdout + done.stderr:
            raise ConfigError("the driver gives its counters to administrators only (ERR_NVGPUCTRPERM)")
        if not done.returncode:
            return of_ncu(done.stdout)
        failed.append(f"ncu ended with {done.returncode}, {replay} replay: {_said(done.stdout + done.stderr)}")
    raise ConfigError("; ".join(failed))


def _said(text: str) -> str:
    """Why ncu failed: its own errors, and the last words of the process that it watched, an exception say."""
    lines = [line.strip()[:300] for line in text.splitlines() if line.strip() and not line.startswith('"')]
    own = [line for line in lines if line.startswith("==ERROR==")]
    watched = [line for line in lines if not line.startswith("==")]
    return " ".join(own[:3] + watched[-1:]) or "no output"


def _under_ncu(case: Case, backend: str, replay: str) -> subprocess.CompletedProcess[str]:
    """One run of ncu. Its counters need several passes: of the kernel, with memory put back each time, or of the whole
    process, which is slower and asks nothing of the kernel.
    """
    metrics = ",".join([_TIME, _MOVED, _ASKED, *_METRICS, f"regex:{_STALL}.*_per_issue_active"])
    child = "import sys; from openmla.lab import profile; profile.run_once(sys.argv[1], sys.argv[2])"
    command = [
        "ncu", "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none", "--profile-from-start", "off",
        "--replay-mode", replay, "--metrics", metrics, sys.executable, "-c", child, case.name, backend,
    ]  # fmt: skip
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_NCU_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"ncu did not finish: {error}") from error


def run_once(name: str, backend: str) -> None:
    """The call that ncu watches: once to warm up, once between the marks of the profiler."""
    case = suite.parse(name)
    if case is None:
        raise ConfigError(f"{name!r} names no case")
    sets = [workload.decode_inputs(case, torch.device("cuda"))]
    contender = peers.backend(case, sets, Target.detect("cuda"), backend)
    if isinstance(contender, peers.Refusal):
        raise ConfigError(contender.reason)
    contender.call(0)
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    contender.call(0)
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


def of_ncu(text: str) -> _Found:
    """The raw page of ncu as CSV: one line per launch, below a line of names and one of units."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    units, *rows = list(csv.DictReader(io.StringIO("\n".join(lines)))) or [{}]
    if not rows:
        raise ConfigError("ncu saw no kernel")
    unit = units.get(_TIME, "")
    if unit not in _SECONDS:
        raise ConfigError(f"ncu gives {_TIME} in {unit!r}; known: {', '.join(_SECONDS)}")

    def number(row: dict[str, str], key: str) -> float | None:
        try:
            return float(row.get(key, "").replace(",", ""))
        except ValueError:
            return None

    spent = [(kernel_name(row["Kernel Name"]), (number(row, _TIME) or 0.0) * _SECONDS[unit]) for row in rows]
    total = sum(each for _, each in spent) or 1.0
    phases = [Phase(name, each, 1, each / total) for name, each in spent]
    longest = max(rows, key=lambda row: number(row, _TIME) or 0.0)
    readings = {
        name: Reading(value, unit, meaning)
        for key, (name, unit, meaning) in _METRICS.items()
        if (value := number(longest, key)) is not None
    }
    asked = [number(row, _ASKED) for row in rows]
    if all(each is not None for each in asked):
        readings["bytes asked of L2"] = Reading(sum(each or 0.0 for each in asked), "bytes", "all kernels of the call")
    # ncu answers with .pct, .max_rate and .ratio of each; a warp that is "selected" issues and waits for nothing.
    stalls = {
        key.removeprefix(_STALL).removesuffix(_STALL_END).replace("_", " "): value
        for key in longest
        if key.startswith(_STALL) and key.endswith(_STALL_END) and (value := number(longest, key))
    }
    stalls.pop("selected", None)
    waits = sum(stalls.values()) or 1.0
    ordered = sorted(((name, value / waits) for name, value in stalls.items()), key=lambda each: -each[1])
    moved = [number(row, _MOVED) for row in rows]
    hit = readings.get("L2 hits")
    missing = {name: "ncu has no such metric on this card" for name, _, _ in _METRICS.values() if name not in readings}
    return _Found(
        phases, readings, ordered, moved=None if None in moved else int(sum(each or 0.0 for each in moved)),
        hit_rate=hit.value / 100 if hit else None, missing=missing,
    )  # fmt: skip
