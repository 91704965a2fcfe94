"""The runner: for each case gate, warm up, time everybody in turn, and say it in rows.

Order of one case
    1. gate     every contender that computes attention is compared with the fp64 oracle under the tolerance rule;
                a wrong one gets no number
    2. warm-up  one full round, untimed
    3. rounds   each contender runs once per round, the order rotating, so that a slow minute hits all of them
    4. rows     median, p20, p80 of the rounds

Cold cache: on a CPU every run takes the next of several input sets that together exceed the last cache three times;
on a GPU 256 MB of something else are read before each run, often enough that the host has launched the run before the
device gets to it: what is timed is the device, the host's own time is a column of its own. (A flush that writes leaves
up to 50 MB for the timed run to write back, 16 us that belong to nobody.) Calls too short for events (below
GRAPH_BELOW_US by the roofline) are captured into a CUDA graph that walks over a rotation of input sets as on a CPU, and
the graph's time is divided by its calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from openmla.core.cost import Cost, cost
from openmla.core.target import Target
from openmla.lab import ceilings, clock, gate, peers, sparse, store, workload, writers
from openmla.lab.peers import Contender, Refusal
from openmla.lab.progress import LiveDisplay
from openmla.lab.store import Row
from openmla.lab.suite import Case, Suite

GRAPH_BELOW_US = 100.0
# What fills the L2 of every GPU of today (H100 50 MB, B200 126 MB). At 8 TB/s, more than any GPU reads, 32 us.
_FLUSH_BYTES = 256 << 20
_FLUSH_US = 32.0
_MIN_ROUNDS, _MAX_ROUNDS = 10, 200

Progress = Callable[[str], None]
Timer = Callable[[int], float]  # round -> seconds of one call


@dataclass(frozen=True)
class Options:
    """How to measure. `seconds` is the time each contender gets per case; at least ten rounds are run."""

    backends: tuple[str, ...] = ("auto",)
    peers: tuple[str, ...] | None = None  # None: those of the case, else of the suite
    seconds: float = 1.5


@dataclass
class CaseResult:
    """Everything about one case: a row per contender that passed, a reason for each that did not."""

    case: Case
    rows: list[Row] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    wrong: list[Refusal] = field(default_factory=list)  # ran, and failed the gate

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "case": self.case.name,
            "rows": [asdict(row) for row in self.rows],
            "not_run": {each.who: each.reason for each in self.refusals},
            "wrong": {each.who: each.reason for each in self.wrong},
        }


def run(
    suite: Suite, cases: Sequence[Case], options: Options, target: Target, progress: Progress | None = None
) -> Iterator[CaseResult]:
    """Measure cases one after another. Yields each result as soon as it stands."""
    say = progress or (lambda text: None)
    live = progress if isinstance(progress, LiveDisplay) else None
    say(f"ceilings of {target.name} ...")
    roof = ceilings.measure(target, tuple(case.roof_dtype for case in cases), options.seconds)
    facts = store.environment(target)
    begin = time.monotonic()
    for number, case in enumerate(cases, 1):
        left = ""
        if number > 1:
            left = f", about {(time.monotonic() - begin) / (number - 1) * (len(cases) - number + 1):.0f} s left"
        if live:
            live.begin(f"{case.name}{left}", number, len(cases))
        else:
            say(f"case {number} of {len(cases)}: {case.name}{left}")
        result = run_case(suite, case, options, target, roof, facts, say)
        if live:
            live.share(1.0)
        yield result


def run_case(
    suite: Suite,
    case: Case,
    options: Options,
    target: Target,
    roof: ceilings.Ceilings,
    facts: dict[str, object],
    say: Progress,
) -> CaseResult:
    """Measure one case."""
    result = CaseResult(case)
    device = torch.device("cuda" if target.is_cuda else "cpu")
    make: Callable[..., Any] = {"append": writers.append_inputs, "decode": workload.decode_inputs}.get(
        case.op, sparse.inputs
    )
    first = make(case, device)
    work = _work(case, first)
    in_graph = target.is_cuda and _floor_us(work, roof, case) < GRAPH_BELOW_US
    count = workload.num_sets(case, target, work.bytes, is_rotated=in_graph or not target.is_cuda)
    sets = [first, *(make(case, device, index) for index in range(1, count))]
    contenders = _contenders(suite, case, sets, options, target, result)
    passed: list[tuple[Contender, str]] = []
    for each in contenders:
        verdict = _gate(case, sets, each, say)
        if verdict.is_green:
            passed.append((each, verdict.text))
        else:
            result.wrong.append(Refusal(each.who, verdict.text))
    if not passed:
        return result
    ready = [each for each, _ in passed]
    hosts = [_host_us(each, device) if target.is_cuda else None for each in ready]
    timing, timers = _timers(ready, hosts, len(sets), device, case.cache == "cold", in_graph)
    samples = _rounds(timers, options.seconds, say)
    medians = {each.who: clock.quantile(sorted(s), 0.5) for (each, _), s in zip(passed, samples, strict=True)}
    for (each, note), seconds, host_us in zip(passed, samples, hosts, strict=True):
        others = [other.who for other, _ in passed if other is not each] if each.kind == "backend" else []
        result.rows.append(
            replace(
                _row(suite, case, each, seconds, work, roof, facts),
                gate=note,
                timing=timing,
                host_us=host_us,
                ratio={who: medians[who] / medians[each.who] for who in others},
            )
        )
    return result


def inputs(case: Case, target: Target, roof: ceilings.Ceilings) -> tuple[list[workload.DecodeInputs], float]:
    """(input sets of a case, the microseconds that the roof allows), by the rules of `run`."""
    device = torch.device("cuda" if target.is_cuda else "cpu")
    work = cost(workload.problem(case), case.draw_lengths())
    floor = _floor_us(work, roof, case)
    is_rotated = not target.is_cuda or floor < GRAPH_BELOW_US
    count = workload.num_sets(case, target, work.bytes, is_rotated=is_rotated)
    return [workload.decode_inputs(case, device, index) for index in range(count)], floor


def time_in_turn(
    contenders: Sequence[Contender], num_sets: int, target: Target, case: Case, floor_us: float, seconds: float,
    say: Progress,
) -> tuple[str, list[list[float]]]:  # fmt: skip
    """(how it was timed, seconds of every round per contender), by the rules of `run`; the gate is the caller's.

    floor_us: what the roofline allows; a call that may be shorter than GRAPH_BELOW_US is timed in a graph on a GPU.
    """
    device = torch.device("cuda" if target.is_cuda else "cpu")
    in_graph = target.is_cuda and floor_us < GRAPH_BELOW_US
    hosts = [_host_us(each, device) if target.is_cuda else None for each in contenders]
    timing, timers = _timers(contenders, hosts, num_sets, device, case.cache == "cold", in_graph)
    return timing, _rounds(timers, seconds, say)


def _contenders(
    suite: Suite, case: Case, sets: peers.Sets, options: Options, target: Target, result: CaseResult
) -> list[Contender]:
    """Ours and the peers; those that cannot take part leave their reason in `result`."""
    names = case.peers or suite.peers if options.peers is None else options.peers
    source: Any = {"append": writers, "decode": peers}.get(case.op, sparse)
    asked = [source.backend(case, sets, target, name) for name in options.backends]
    asked += [source.peer(case, sets, target, name) for name in names]
    ready: dict[str, Contender] = {}
    for each in asked:
        if isinstance(each, Refusal):
            result.refusals.append(each)
        else:
            ready.setdefault(each.who, each)  # "auto" and a name may mean the same backend
    return list(ready.values())


def _work(case: Case, inputs: Any) -> Cost:
    if case.op in sparse.OPS:
        return cost(sparse.problem(case))
    return cost(writers.problem(case) if case.op == "append" else peers.problem_of(case, inputs), inputs.lengths)


def _floor_us(work: Cost, roof: ceilings.Ceilings, case: Case) -> float:
    """No run can be shorter than this on a machine with these ceilings."""
    return max(work.flops / roof.gemm_tflops[case.roof_dtype] / 1e6, work.bytes / roof.read_gbps / 1e3)


def _gate(case: Case, sets: peers.Sets, contender: Contender, say: Progress) -> gate.Verdict:
    if contender.kind == "ceiling":
        contender.call(0)
        return gate.Verdict(True, "no attention, not gated")
    try:
        out, lse = contender.call(0)
    except (RuntimeError, AssertionError, MemoryError) as error:
        return gate.Verdict(False, f"failed: {type(error).__name__}: {error}")
    first: Any = sets[0]
    if case.op == "append":
        verdict = writers.check(case, first)
    else:
        verdict = (sparse if case.op in sparse.OPS else gate).check(case, first, out, lse)
    say(f"  gate {contender.who}: {'green' if verdict.is_green else 'RED'}, {verdict.text}")
    return verdict


def _timers(
    contenders: Sequence[Contender],
    hosts: Sequence[float | None],
    num_sets: int,
    device: torch.device,
    is_cold: bool,
    in_graph: bool,
) -> tuple[str, list[Timer]]:
    """("call" | "event" | "graph", one timer per contender). Graphs for all or for none: the two do not compare."""
    if device.type != "cuda":
        step = len(contenders)

        def on_cpu(place: int, contender: Contender) -> Timer:
            def timer(turn: int) -> float:
                # An untimed run first, on another set. The OpenMP threads of whoever ran before spin for 6 ms more, and
                # a core that has idled is slow for some ms: the same decode took 10 ms back to back, 19 behind a
                # matmul, 21 behind 0.3 s of nothing. Behind itself, everybody is measured in the same state.
                at = turn * step + place
                contender.call((at + 1) % num_sets)
                return clock.seconds(lambda: contender.call(at % num_sets), device)

            return timer

        return "call", [on_cpu(place, each) for place, each in enumerate(contenders)]
    if in_graph:
        graphs = [_capture(each, num_sets) for each in contenders]
        if all(graph is not None for graph in graphs):
            return "graph", [_replayer(graph, num_sets, device) for graph in graphs if graph is not None]
    flush = torch.zeros(_FLUSH_BYTES // 4, dtype=torch.int32, device=device) if is_cold else None

    def on_gpu(contender: Contender, host_us: float) -> Timer:
        reads = 2 + int(host_us / _FLUSH_US)

        def timer(turn: int) -> float:
            # Either keeps the card busy while the host prepares the timed call; warm means the call itself does.
            if flush is not None:
                for _ in range(reads):
                    flush.amax()
            else:
                contender.call(turn % num_sets)
            return clock.seconds(lambda: contender.call(turn % num_sets), device)

        return timer

    return "event", [on_gpu(each, host or 0.0) for each, host in zip(contenders, hosts, strict=True)]


def _capture(contender: Contender, num_sets: int) -> torch.cuda.CUDAGraph | None:
    """A graph of one call per input set; None for a contender that cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for index in range(num_sets):
            contender.call(index)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for index in range(num_sets):
                contender.call(index)
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph


def _replayer(graph: torch.cuda.CUDAGraph, calls: int, device: torch.device) -> Timer:
    return lambda turn: clock.seconds(graph.replay, device) / calls


def _rounds(timers: Sequence[Timer], seconds: float, say: Progress) -> list[list[float]]:
    """Seconds of every round per timer, after one untimed round that also says how many rounds fit."""
    at = time.perf_counter()
    for timer in timers:
        timer(0)
    spent = time.perf_counter() - at
    rounds = min(max(int(seconds * len(timers) / max(spent, 1e-6)), _MIN_ROUNDS), _MAX_ROUNDS)
    say(f"  {rounds} rounds of {len(timers)} contender(s), about {rounds * spent:.0f} s")
    samples: list[list[float]] = [[] for _ in timers]
    for turn in range(rounds):
        for place in range(len(timers)):
            index = (turn + place) % len(timers)
            samples[index].append(timers[index](turn + 1))
    return samples


def _host_us(contender: Contender, device: torch.device, repeats: int = 30) -> float:
    """Median time of the Python call until it returns, calls one behind the other as in a server's loop over layers."""
    times = []
    torch.cuda.synchronize(device)
    for _ in range(repeats):
        at = time.perf_counter_ns()
        contender.call(0)
        times.append((time.perf_counter_ns() - at) / 1e3)
    torch.cuda.synchronize(device)
    return clock.quantile(sorted(times), 0.5)


def _row(
    suite: Suite,
    case: Case,
    contender: Contender,
    seconds: Sequence[float],
    work: Cost,
    roof: ceilings.Ceilings,
    facts: dict[str, object],
) -> Row:
    ordered = sorted(value * 1e6 for value in seconds)
    median = clock.quantile(ordered, 0.5)
    flops = work.flops if contender.flops is None else contender.flops
    tflops = flops / median / 1e6
    # A bare square product moves other bytes than the case does; its bandwidth says nothing here.
    moved = work.bytes if contender.flops is None else 0
    gbps = moved / median / 1e3
    return Row(
        suite=suite.name,
        case=case.name,
        who=contender.who,
        kind=contender.kind,
        kernel=contender.kernel,
        config=contender.config,
        policy=case.policy if contender.kind == "backend" else "",
        median_us=median,
        p20_us=clock.quantile(ordered, 0.2),
        p80_us=clock.quantile(ordered, 0.8),
        n=len(ordered),
        host_us=None,
        flops=flops,
        bytes=moved,
        tflops=tflops,
        gbps=gbps,
        fraction_gemm=tflops / roof.gemm_tflops[case.roof_dtype],
        fraction_read=gbps / roof.read_gbps,
        ratio={},
        gate="",
        timing="",
        cache=case.cache,
        dtype=case.dtype,
        inputs=workload.DISTRIBUTION,
        seed=case.seed,
        environment=dict(facts),
        ceilings=roof.as_dict(),
        utc=store.now(),
    )
