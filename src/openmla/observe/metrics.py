"""What this process has done, as numbers with names: read when asked, never written on the hot path.

    from openmla.observe import metrics
    for each in metrics.snapshot(): ...        # families with samples; needs PyTorch alone
    metrics.sample(every=1000)                 # device time, bytes and splits of every 1000th call; off by default
    metrics.count_replays()                    # calls inside CUDA graphs count when they run, not when they are captured

Names and labels are a public contract (docs/operations.md lists them). Labels hold names of this library only, never a
user's text, and the reasons of `explain()`, cut to 80 characters.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

import openmla
from openmla import backends
from openmla.core import counters, incidents
from openmla.core.cost import cost
from openmla.core.errors import ConfigError
from openmla.observe import capture
from openmla.ops import dispatch, observers, recovery

Kind = Literal["counter", "gauge"]
_HEALTH = {"ok": 0, "degraded": 1, "failed": 2}
_LABEL_LENGTH = 80
_MAX_FALLBACKS = 64  # label sets of one family that a scrape may return


@dataclass
class Family:
    """One metric with its samples: (labels, value)."""

    name: str
    kind: Kind
    help: str
    samples: list[tuple[dict[str, str], float]] = field(default_factory=list)

    def add(self, value: float, **labels: str) -> None:
        """One sample."""
        self.samples.append((labels, value))


def snapshot() -> list[Family]:
    """Every metric of this process. Takes locks for microseconds; with `count_replays` it reads the device, for 0.2 s at most."""
    return [*_calls(), *_problems(), *_sampled()]


def health() -> dict[str, Any]:
    """`{"state": "ok" | "degraded" | "failed", "reasons": [...], "version": ...}`: what the health endpoint answers.

    ok: everything runs as chosen. degraded: results are right, something is slower than it should be (a kernel stands
    aside, the kernel cache cannot be used). failed: a device is lost or a kernel hangs; replace the process.
    """
    state, reasons = incidents.state()
    return {"state": state, "reasons": list(reasons), "version": openmla.__version__}


def _calls() -> Iterator[Family]:
    calls = Family("openmla_calls", "counter", "Launches of a kernel that were run from Python or replayed")
    captured = Family("openmla_captured_calls", "counter", "Launches that were captured into a CUDA graph, not run")
    tokens = Family("openmla_query_tokens", "counter", "Query tokens of those launches")
    sums: dict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    replayed = _replays.read() if _replays is not None else {}
    for each in counters.tallies():
        entry = sums[each.op, each.backend, each.kernel]
        again = replayed.get((each.op, each.backend, each.kernel, each.tokens), 0)
        ran = each.calls - each.captured + again
        entry[0] += ran
        entry[1] += each.captured
        entry[2] += ran * each.tokens
    for (op, backend, kernel), (ran, kept, read) in sorted(sums.items()):
        labels = {"op": op, "backend": backend, "kernel": kernel}
        calls.add(ran, **labels)
        captured.add(kept, **labels)
        tokens.add(read, **labels)
    yield from (calls, captured, tokens)


def _problems() -> Iterator[Family]:
    fallbacks = Family("openmla_fallbacks", "counter", "Selections that passed over a kernel built for this machine")
    for (op, passed, chosen, reason), count in backends.fallbacks.most_common(_MAX_FALLBACKS):
        fallbacks.add(count, op=op, passed_over=passed, chosen=chosen, reason=reason[:_LABEL_LENGTH])
    noted = Family("openmla_incidents", "counter", "Faults that the process survived or did not, by kind")
    for (kind, subject), count in sorted(incidents.counts().items()):
        noted.add(count, kind=kind, subject=subject[:_LABEL_LENGTH])
    state = Family("openmla_health", "gauge", "0 ok, 1 degraded, 2 failed")
    state.add(_HEALTH[incidents.state()[0]])
    seconds = Family("openmla_compile_seconds", "counter", "Time to make kernels ready, canary included")
    ready = Family("openmla_prepared", "counter", "Problems that a kernel was made ready for")
    cache = Family("openmla_kernel_cache", "counter", "Look-ups in the disk cache of compiled kernels")
    for (name, label), amount in sorted(counters.amounts().items()):
        if name == "compile_seconds":
            seconds.add(amount, backend=label)
        elif name == "prepared":
            ready.add(amount, backend=label)
        elif name == "kernel_cache":
            cache.add(amount, result=label)
    remembered = Family("openmla_remembered_signatures", "gauge", "Call signatures that need no check any more")
    remembered.add(dispatch.remembered())
    about = Family("openmla_build", "gauge", "Always 1; the labels say what runs")
    about.add(1, version=openmla.__version__, torch=torch.__version__, cuda=str(torch.version.cuda))
    yield from (fallbacks, noted, state, seconds, ready, cache, remembered, about)


# ------------------------------------------------------------------------------------------------ sampled calls


@dataclass
class _Sums:
    calls: int = 0
    seconds: float = 0.0
    bytes: float = 0.0
    flops: float = 0.0
    requests: int = 0
    pieces: int = 0


@dataclass
class _Open:
    """A sampled call whose events and copies are still under way."""

    label: tuple[str, str, str]
    problem: Any
    begin: Any
    end: Any
    lengths: torch.Tensor | None
    splits: torch.Tensor | None
    tokens: tuple[int] | None = None  # of an append


class Sampler:
    """Looks closer at every n-th call: its time on the device, the bytes it had to move, how it was split."""

    def __init__(self, every: int) -> None:
        if every < 1:
            raise ConfigError(f"metrics.sample: every must be >= 1, got {every}")
        self.every, self.sums = every, defaultdict[tuple[str, str, str], _Sums](_Sums)
        self.wants = itertools.cycle(
            [False] * (every - 1) + [True]
        ).__next__  # atomic, and 0.03 us for the calls between
        self._lock = threading.Lock()
        self._open: tuple[Any, _Open] | None = None  # an event behind the copies of the last sample, and the sample

    def before(self, prepared: Any, operands: Any, plan: Any) -> Any:
        """Begin a sample."""
        device = operands.out.device
        if device.type != "cuda":
            return time.perf_counter()
        if torch.cuda.is_current_stream_capturing():
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def after(self, prepared: Any, operands: Any, plan: Any, begun: Any) -> None:
        """End it; nothing waits."""
        if begun is None:
            return
        kernel, problem = prepared.kernel, prepared.problem
        label = (problem.op, kernel.backend, kernel.name)
        lengths, splits = getattr(operands, "cache_seqlens", None), getattr(plan, "num_splits", None)
        tokens = (operands.slots.shape[0],) if problem.op == "append" else None
        if isinstance(begun, float):
            self._count(_Open(label, problem, begun, time.perf_counter(), lengths, splits, tokens))
            return
        end = torch.cuda.Event(enable_timing=True)
        end.record()
        lengths = None if lengths is None else _copied(lengths)
        splits = None if splits is None else _copied(splits[-1:])
        copied = torch.cuda.Event()
        copied.record()
        with self._lock:
            done, self._open = self._open, (copied, _Open(label, problem, begun, end, lengths, splits, tokens))
        if done is not None and done[0].query():  # else it is dropped: the device is a whole period behind
            self._count(done[1])

    def _count(self, found: _Open) -> None:
        seconds = (
            found.end - found.begin if isinstance(found.begin, float) else found.begin.elapsed_time(found.end) * 1e-3
        )
        lengths = found.tokens if found.lengths is None else found.lengths.tolist()
        work = cost(found.problem, lengths) if lengths is not None else cost(found.problem)
        with self._lock:
            sums = self.sums[found.label]
            sums.calls += 1
            sums.seconds += seconds
            sums.bytes += work.bytes
            sums.flops += work.flops
            if found.splits is not None:
                sums.requests += len(lengths or ())
                sums.pieces += int(found.splits.reshape(-1)[-1])

    def read(self) -> list[tuple[tuple[str, str, str], _Sums]]:
        """The sums so far."""
        with self._lock:
            return [(label, _Sums(**vars(each))) for label, each in sorted(self.sums.items())]


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


_sampler: Sampler | None = None


def sample(every: int = 1000) -> Sampler | None:
    """Look closer at every n-th call from now on; 0 stops.

    Raises:
        ConfigError: every is negative.
    """
    global _sampler
    if _sampler is not None:
        observers.remove(_sampler)
    _sampler = Sampler(every) if every else None
    if _sampler is not None:
        observers.add(_sampler)
    return _sampler


def _sampled() -> Iterator[Family]:
    if _sampler is None:
        return
    names = ("calls", "seconds", "bytes", "flops", "requests", "pieces")
    helps = (
        "Calls that were looked at closely", "Their time on the device", "Bytes that they had to move at least",
        "Floating-point operations of theirs", "Requests of theirs (dense decode)", "Pieces that those were cut into",
    )  # fmt: skip
    read = _sampler.read()
    for name, text in zip(names, helps, strict=True):
        family = Family(f"openmla_sampled_{name}", "counter", text)
        for (op, backend, kernel), sums in read:
            family.add(float(getattr(sums, name)), op=op, backend=backend, kernel=kernel)
        yield family


# ------------------------------------------------------------------------------------------------ CUDA graphs


_IN_GRAPHS: list[torch.Tensor] = []  # graphs go on incrementing these, also when nobody counts any longer: never freed


class Replays:
    """Counts captured launches on the device: the graph that holds a launch holds an increment of one number, too.

    The increment is one small kernel inside the graph per captured call. The numbers are read on a stream of their own,
    by a thread that may do so beside captures of other threads.
    """

    _SLOTS = 256
    _READ_SECONDS = 0.2  # a device that is busy with one long kernel answers later; the last known numbers serve

    def __init__(self) -> None:
        self.wants = itertools.repeat(True).__next__
        self._slots: dict[tuple[str, str, str, int], tuple[torch.device, int]] = {}
        self._device: dict[torch.device, tuple[torch.Tensor, torch.Tensor, Any]] = {}
        self._lock = threading.Lock()

    def prepare(self, device: torch.device) -> None:
        """Make the numbers of a device; must happen outside of a capture."""
        with self._lock:
            if device not in self._device:
                numbers = torch.zeros(self._SLOTS, dtype=torch.int64, device=device)
                mirror = torch.zeros(self._SLOTS, dtype=torch.int64, pin_memory=device.type == "cuda")
                stream = torch.cuda.Stream(device) if device.type == "cuda" else None
                self._device[device] = (numbers, mirror, stream)

    def before(self, prepared: Any, operands: Any, plan: Any) -> None:
        """While a graph is captured: put the increment into it."""
        device = operands.out.device
        if device.type != "cuda":
            return
        if not torch.cuda.is_current_stream_capturing():
            if device not in self._device:
                self.prepare(device)
            return
        self.captured(prepared.tally, device)

    def captured(self, tally: counters.Tally, device: torch.device) -> None:
        """A launch of this tally is being captured on `device`."""
        tally.count_captured()
        if device not in self._device:
            incidents.note("monitor_failed", "replays", "a first call was captured; its replays are not counted")
            return
        numbers = self._device[device][0]
        key = (tally.op, tally.backend, tally.kernel, tally.tokens)
        with self._lock:
            slot = self._slots.setdefault(key, (device, min(len(self._slots), self._SLOTS - 1)))[1]
        if not any(numbers is each for each in _IN_GRAPHS):
            _IN_GRAPHS.append(numbers)
        numbers[slot : slot + 1].add_(1)

    def after(self, prepared: Any, operands: Any, plan: Any, begun: Any) -> None:
        """Nothing."""

    def read(self) -> dict[tuple[str, str, str, int], int]:
        """Replayed launches so far, as far as the device has told."""
        with self._lock:
            for device, (numbers, mirror, stream) in self._device.items():
                if stream is None:
                    mirror.copy_(numbers)
                elif str(device) not in recovery.LOST:
                    with capture.relaxed(), torch.cuda.stream(stream):
                        mirror.copy_(numbers, non_blocking=True)
                        done = torch.cuda.Event()
                        done.record(stream)
                        until = time.monotonic() + self._READ_SECONDS
                        while not done.query() and time.monotonic() < until:
                            time.sleep(0.001)
            return {key: int(self._device[device][1][slot]) for key, (device, slot) in self._slots.items()}


_replays: Replays | None = None


def count_replays(device: torch.device | str | None = None) -> Replays:
    """Count launches inside CUDA graphs when they run; call it before the first capture. Off by default.

    Args:
        device: where graphs will be captured; default: the current CUDA device if there is one.
    """
    global _replays
    if _replays is None:
        _replays = Replays()
        observers.add(_replays)
    if device is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    if device is not None:
        _replays.prepare(torch.device(device))
    return _replays


def stop() -> None:
    """Neither sample nor count replays any longer; always-on counters go on."""
    forget(_sampler, _replays)


def forget(sampler: Sampler | None, replays: Replays | None) -> None:
    """End these two, unless somebody has begun others since."""
    global _replays
    if sampler is not None and sampler is _sampler:
        sample(0)
    if replays is not None and replays is _replays:
        observers.remove(replays)
        _replays = None
