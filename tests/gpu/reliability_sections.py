"""What happens on a GPU when something goes wrong, and what looking costs: functions that assert and print JSON lines.

python tests/gpu/reliability_sections.py NAME [ARGUMENT]     one, in this process; prove_decode.py runs all of them
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import openmla
from openmla import backends
from openmla.backends import aside
from openmla.core import faults, incidents
from openmla.core.errors import DeviceLostError, ProblemError
from openmla.core.faults import Fault
from openmla.observe import metrics, watchdog
from openmla.ops import canary, dispatch
from openmla.ops.append import append
from openmla.reference.quant import quantise

DEVICE = "cuda"


def say(**facts: Any) -> None:
    """One line of the record."""
    print(json.dumps(facts), flush=True)


def decode_arguments(batch: int = 4, h_q: int = 16, tokens: int = 300, s_q: int = 1, **changes: Any) -> dict[str, Any]:
    """A dense decode of bf16_576."""
    torch.manual_seed(0)
    columns = -(-tokens // 64)
    found = {
        "q": torch.randn(batch, s_q, h_q, 576, device=DEVICE, dtype=torch.bfloat16),
        "kv_cache": torch.randn(batch * columns, 64, 1, 576, device=DEVICE, dtype=torch.bfloat16),
        "block_table": torch.arange(batch * columns, device=DEVICE, dtype=torch.int32).reshape(batch, columns),
        "cache_seqlens": torch.full((batch,), tokens, device=DEVICE, dtype=torch.int32),
    }
    return found | changes


def sparse_arguments(layout: str | None = None, h_q: int = 64, topk: int = 512) -> dict[str, Any]:
    """A sparse decode over 2048 slots."""
    torch.manual_seed(0)
    latent = torch.randn(32, 64, 1, 576)
    kv = latent.to(DEVICE, torch.bfloat16)
    if layout:
        kv = quantise(latent, layout).to(DEVICE)
    q = torch.randn(4, 1, h_q, 576, device=DEVICE, dtype=torch.bfloat16)
    indices = torch.randint(2048, (4, 1, topk), device=DEVICE, dtype=torch.int32)
    return {"q": q, "kv_cache": kv, "indices": indices, "kv_layout": layout}


def raised(kind: type[Exception], call: Callable[[], Any]) -> str:
    """The text of the exception that a call must end with."""
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"{kind.__name__} was not raised")


# ------------------------------------------------------------------------------------------------ sections


def _sung(backend: str, calls: list[tuple[str, Callable[[str], Any]]]) -> None:
    """Make the calls; no canary may fail. Says how long each kernel's took: fastest, slowest, how many."""
    sung: dict[str, list[float]] = {}
    real = canary.try_out

    def timed(*arguments: Any) -> str:
        begin = time.perf_counter()
        found = real(*arguments)
        sung.setdefault(aside.subject(arguments[0]), []).append(1e3 * (time.perf_counter() - begin))
        return found

    canary.try_out = timed
    unsupported = 0
    for name, call in calls:
        try:
            call(backend)
        except openmla.core.errors.UnsupportedError:
            unsupported += 1
        except Exception as error:
            raise AssertionError(f"{backend} {name}: {type(error).__name__}: {error}") from error
    torch.cuda.synchronize()
    canary.try_out = real
    assert not any(kind == "canary_failed" for kind, _ in incidents.counts()), incidents.counts()
    say(unsupported=unsupported, canary_ms={k: [round(min(v), 1), round(max(v), 1), len(v)] for k, v in sung.items()})


def _decodes(*shapes: tuple[int, int]) -> list[tuple[str, Callable[[str], Any]]]:
    calls: list[tuple[str, Callable[[str], Any]]] = []
    for h_q, s_q in shapes:
        for options in ({}, {"is_causal": True}, {"policy": "batch_invariant"}) if s_q == 2 else ({},):
            given = decode_arguments(h_q=h_q, s_q=s_q) | options
            calls.append((f"decode h_q {h_q} s_q {s_q} {options}", lambda b, g=given: openmla.decode(**g, backend=b)))
    return calls


def section_portable_canary() -> None:
    """Every Triton kernel passes its canary."""
    calls = _decodes((16, 1), (128, 1))
    for layout in (None, "fp8_656"):
        sparse = sparse_arguments(layout)
        calls.append((f"sparse_decode {layout}", lambda b, g=sparse: openmla.sparse_decode(**g, backend=b)))
    rows = {"q": torch.randn(8, 64, 576, device=DEVICE, dtype=torch.bfloat16),
            "kv": torch.randn(700, 1, 576, device=DEVICE, dtype=torch.bfloat16),
            "indices": torch.randint(700, (8, 1, 256), device=DEVICE, dtype=torch.int32)}  # fmt: skip
    calls.append(("sparse_prefill", lambda b: openmla.sparse_prefill(**rows, backend=b)))
    _sung("triton", calls)


def section_canary() -> None:
    """Every Hopper kernel of dense decode passes its canary; one that is wrong is caught and passed over."""
    sink = decode_arguments(h_q=128, attn_sink=torch.zeros(128, device=DEVICE), window=100)
    calls = _decodes((16, 1), (16, 2), (64, 2), (128, 1), (128, 2), (3, 2))
    _sung("cute", [*calls, ("sink, window", lambda b: openmla.decode(**sink, backend=b))])
    given = decode_arguments(h_q=128)
    made = openmla.plan(**given)
    victim = next(k for k in backends.kernels("decode") if (k.backend, k.name) == (made.backend, made.kernel))
    dispatch.forget()
    canary._tried.clear()
    launch = type(victim).launch

    def wrong(self: Any, compiled: Any, problem: Any, operands: Any, plan: Any) -> None:
        launch(self, compiled, problem, operands, plan)
        operands.out.mul_(1.1)

    type(victim).launch = wrong
    out, _ = openmla.decode(**given)
    type(victim).launch = launch
    assert incidents.counts()[("canary_failed", aside.subject(victim))] == 1
    text = str(openmla.explain("decode"))
    assert f"canary_failed: {aside.subject(victim)}" in text, text
    golden, _ = openmla.decode(**{k: v.cpu() for k, v in given.items()})
    assert (out.cpu().float() - golden.float()).abs().max() < 2e-2
    assert metrics.health()["state"] == "degraded"
    say(wrong_kernel_is_caught=True)


def section_values() -> None:
    """OPENMLA_CHECKS=device names tensor, row, column and value, also inside a CUDA graph; strict raises before."""

    os.environ["OPENMLA_CHECKS"] = "device"
    given = decode_arguments(batch=5, tokens=700)
    openmla.decode(**given)
    assert openmla.check_errors() == () and faults.findings() == ()
    for name, place, value, fault in (
        ("block_table", (3, 7), 999_999, Fault.PAGE_OUT_OF_RANGE),
        ("block_table", (0, 0), -1, Fault.PAGE_OUT_OF_RANGE),
        ("cache_seqlens", (2,), -5, Fault.LENGTH_NEGATIVE),
        ("cache_seqlens", (4,), 2**31 - 1, Fault.LENGTH_OVER_CAPACITY),
    ):
        spoiled = {k: v.clone() for k, v in given.items()}
        spoiled[name][place] = value
        openmla.decode(**spoiled)
        reported = openmla.check_errors()
        (found,) = faults.findings()
        assert (found.tensor, found.value, found.fault) == (name, value, fault), found
        assert found.place == place and fault in reported, (found, reported)
        os.environ["OPENMLA_CHECKS"] = "strict"
        text = raised(ProblemError, lambda given=spoiled: openmla.decode(**given))
        assert f"{name}[{', '.join(map(str, place))}] = {value}" in text, text
        os.environ["OPENMLA_CHECKS"] = "device"
    sparse = sparse_arguments(topk=600)
    sparse["indices"][2, 0, 555] = 2048
    openmla.sparse_decode(**sparse)
    openmla.check_errors()
    (found,) = faults.findings()
    assert (found.tensor, found.place, found.value) == ("indices", (2, 555), 2048), found
    cache, slots = (
        torch.zeros(4, 64, 1, 576, device=DEVICE, dtype=torch.bfloat16),
        torch.tensor([3, 2**40], device=DEVICE),
    )
    append(cache, slots, torch.ones(2, 576, device=DEVICE, dtype=torch.bfloat16))
    openmla.check_errors()
    (found,) = faults.findings()
    assert (found.op, found.tensor, found.place, found.value) == ("append", "slots", (1,), 2**31 - 1), found
    assert bool(cache.view(-1, 576)[3].all()) and int(cache.count_nonzero()) == 576
    openmla.decode(**given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        openmla.decode(**given)
    given["block_table"][1, 2] = -77
    graph.replay()
    openmla.check_errors()
    (found,) = faults.findings()
    assert (found.place, found.value) == ((1, 2), -77), found
    say(findings_named=7, in_a_graph=True)


@contextlib.contextmanager
def _looked_at(way: str) -> Iterator[None]:
    """One of the ways to look at calls whose cost is measured: a validation mode, or `fast` with an observer."""
    os.environ["OPENMLA_CHECKS"] = "fast" if ", " in way else way
    if way in SAMPLED:
        metrics.sample(SAMPLED[way])
    elif way == "fast, replays counted":
        metrics.count_replays()
    elif way == "fast, watchdog":
        watchdog.start(5)
    yield
    if way == "fast, watchdog":
        watchdog.stop()
    elif way != "fast" and ", " in way:
        metrics.sample(0)
        metrics.stop()
    os.environ["OPENMLA_CHECKS"] = "fast"


SAMPLED = {"fast, sampled": 1000, "fast, every call sampled": 1}
WAYS = (
    "off", "fast", "fast, sampled", "fast, every call sampled", "fast, replays counted", "fast, watchdog", "device", "strict"
)  # fmt: skip
CLOSE, CLOSE_ROUNDS = ("off", "fast", "fast, sampled"), 10  # fractions of a microsecond apart: ten times the rounds


def section_modes(rounds: float = 60) -> None:
    """What the four modes and observers cost: all ways in turn, host time per call and device time per call in a graph.

    One call of 1000 sampled costs what the calls between samples cost more, and a thousandth of a sample.
    """
    for name, given in (
        ("b128 h_q 16 32k table", decode_arguments(batch=128, h_q=16, tokens=2000)),
        ("b4 h_q 128 4k", decode_arguments(batch=4, h_q=128, tokens=4096)),
    ):
        if name.startswith("b128"):  # a table of 512 columns, of which 32 are used
            wide = torch.zeros(128, 512, device=DEVICE, dtype=torch.int32)
            wide[:, :32] = given["block_table"]
            given["block_table"] = wide
        made = openmla.plan(**given)
        out = torch.empty(*given["q"].shape[:-1], 512, device=DEVICE, dtype=torch.bfloat16)
        call = partial(openmla.decode, **given, plan=made, out=out)
        host: dict[str, list[float]] = {way: [] for way in WAYS}
        graphs: dict[str, Callable[[], float]] = {}
        for number in range(int(rounds)):
            for way in WAYS if number % 2 else WAYS[::-1]:
                with _looked_at(way):
                    if number == 0 and way != "strict":  # which waits, so it cannot be captured
                        graphs[way] = _graph_us(call)
                    if way != "strict" or number % 10 == 0:
                        host[way].append(_host_us(call))
        close: dict[str, list[float]] = {way: [] for way in CLOSE}
        for number in range(int(rounds) * CLOSE_ROUNDS):
            for way in CLOSE if number % 2 else CLOSE[::-1]:
                with _looked_at(way):
                    close[way].append(_host_us(call))
        device = {way: [] for way in graphs}
        for _ in range(int(rounds)):
            for way, time_us in graphs.items():
                device[way].append(time_us())
        say(case=name, rounds=int(rounds), rounds_of_close_ways=int(rounds) * CLOSE_ROUNDS,
            host_us=_medians(host | close), device_us=_medians(device),
            host_over_off_us=_differences(host, "off") | _differences(close, "off"),
            host_over_fast_us=_differences(host, "fast") | _differences(close, "fast"),
            uncertain_us={f"{way} over {base}": _uncertain(close[way], close[base])
                          for way, base in (("fast", "off"), ("fast, sampled", "fast"))},
            device_over_off_us=_differences(device, "off"))  # fmt: skip


def _medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {way: round(statistics.median(each), 2) for way, each in times.items()}


def _differences(times: dict[str, list[float]], base: str) -> dict[str, list[float]]:
    """Quartiles of the differences to one way within a round."""
    paired = {way: each for way, each in times.items() if way != base and len(each) == len(times[base])}
    return {
        way: [round(q, 2) for q in statistics.quantiles((a - b for a, b in zip(each, times[base], strict=True)), n=4)]
        for way, each in paired.items()
    }


def _uncertain(times: list[float], base: list[float]) -> float:
    """Half of the 95 % interval of the median of the differences within a round."""
    low, _, high = statistics.quantiles((a - b for a, b in zip(times, base, strict=True)), n=4)
    return round(1.57 * (high - low) / len(times) ** 0.5, 2)


def _host_us(call: Callable[[], Any]) -> float:
    """Of one call among 20, the device being waited for before them."""
    for _ in range(5):
        call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(20):
        call()
    return (time.perf_counter() - begin) / 20 * 1e6


def _graph_us(call: Callable[[], Any]) -> Callable[[], float]:
    """Measures the device time of one call in a graph of 20."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20):
            call()

    def measure() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 20 * 1e3

    return measure


def section_replays() -> None:
    """Replayed launches count when they run; a scrape beside a capture harms neither."""
    import threading

    given = decode_arguments()
    metrics.count_replays()
    openmla.decode(**given)
    torch.cuda.synchronize()
    done = threading.Event()
    scrapes = []

    def scrape() -> None:
        while not done.is_set():
            scrapes.append(len(metrics.snapshot()))

    watchdog.start(5)
    thread = threading.Thread(target=scrape)
    thread.start()
    graphs = []
    for _ in range(20):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            openmla.decode(**given)
            openmla.decode(**given)
        graphs.append(graph)
    for graph in graphs:
        for _ in range(25):
            graph.replay()
        watchdog.watch("replayed decode")
    torch.cuda.synchronize()
    done.set()
    thread.join()
    watchdog.stop()
    found = {f.name: sum(value for _, value in f.samples) for f in metrics.snapshot()}
    assert found["openmla_calls"] == 1 + 20 * 25 * 2, found
    assert found["openmla_captured_calls"] == 40, found
    assert found["openmla_query_tokens"] == 4 * found["openmla_calls"], found
    assert metrics.health()["state"] == "ok", metrics.health()
    say(calls=found["openmla_calls"], captured=40, scrapes=len(scrapes))


def _spin(seconds: float) -> None:
    torch.cuda._sleep(int(seconds * 1.7e9))


def section_watchdog() -> None:
    """A kernel that does not end in time turns health red and later calls raise; a busy but moving device does not."""
    given = decode_arguments()
    openmla.decode(**given)
    torch.cuda.synchronize()
    watchdog.start(1.5)
    begin = time.monotonic()
    while time.monotonic() - begin < 3:
        for _ in range(50):
            openmla.decode(**given)
        torch.cuda.synchronize()
    assert metrics.health()["state"] == "ok", metrics.health()
    _spin(6)
    openmla.decode(**given)
    begin = time.monotonic()
    while metrics.health()["state"] == "ok" and time.monotonic() - begin < 5:
        time.sleep(0.05)
    noticed = time.monotonic() - begin
    assert metrics.health()["state"] == "failed", "no bark"
    assert "no end after" in raised(DeviceLostError, lambda: openmla.decode(**given))
    say(noticed_after_s=round(noticed, 2), limit_s=1.5)


def section_hang() -> None:
    """With an exit code, a hang ends the process, although its main thread waits for the device."""
    given = decode_arguments()
    openmla.decode(**given)
    torch.cuda.synchronize()
    watchdog.start(1.0, exit_code=70)
    _spin(15)
    openmla.decode(**given)
    torch.cuda.synchronize()


def _break_the_device() -> None:
    """A foreign kernel's assertion, which is a sticky error."""
    torch.zeros(4, device=DEVICE)[torch.tensor([10**6], device=DEVICE)]


def section_sticky() -> None:
    """After a sticky error every call raises DeviceLostError at once, no other backend is tried, health is failed."""
    given = decode_arguments(h_q=128)
    openmla.decode(**given)
    torch.cuda.synchronize()
    _break_the_device()
    time.sleep(0.3)
    kinds = []
    for _ in range(3):
        try:
            openmla.decode(**given)
            torch.cuda.synchronize()
        except DeviceLostError as error:
            kinds.append(f"lost: {error}")
        except Exception as error:  # what an allocation or PyTorch itself raises, before our launch
            kinds.append(f"{type(error).__name__}: {str(error).splitlines()[0]}")
    say(raised=[each[:160] for each in kinds])
    assert all(each.startswith("lost") for each in kinds), kinds
    assert metrics.health()["state"] == "failed"
    assert not backends.fallbacks, backends.fallbacks
    assert "device_lost" in str(openmla.explain("decode", target="h100_sxm"))


def section_foreign() -> None:
    """Strict checks say that the error was there before the call."""

    given = decode_arguments()
    openmla.decode(**given)
    torch.cuda.synchronize()
    os.environ["OPENMLA_CHECKS"] = "strict"
    _break_the_device()
    text = raised(DeviceLostError, lambda: openmla.decode(**given))
    assert "before this call" in text, text
    say(attributed=text[:200])


def section_memory() -> None:
    """Out of memory: a typed error, nothing changed, and the same call works when there is memory again."""
    given = decode_arguments(batch=256, h_q=128, tokens=64)  # out of 32 MiB, a block of its own
    want, _ = openmla.decode(**given)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + (1 << 20)) / total))
    text = raised(torch.OutOfMemoryError, lambda: openmla.decode(**given)).splitlines()[0]
    torch.cuda.set_per_process_memory_fraction(1.0)
    again, _ = openmla.decode(**given)
    assert torch.equal(want, again)
    assert metrics.health()["state"] == "ok", metrics.health()
    assert incidents.counts()["out_of_memory", "cuda:0"] == 1, incidents.counts()
    say(raised=text[:120], noted={f"{k} {s}": n for (k, s), n in incidents.counts().items()})


def section_outgrown() -> None:
    """A graph captured for short requests and replayed beyond the table is cut to its capacity and reported."""
    given = decode_arguments(batch=3, tokens=500)
    given["cache_seqlens"][:] = 100
    openmla.decode(**given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = openmla.decode(**given)
    given["cache_seqlens"][1] = 100_000
    graph.replay()
    assert openmla.check_errors() == (Fault.LENGTH_OVER_CAPACITY,)
    given["cache_seqlens"][1] = 512
    got = out.clone()
    graph.replay()
    assert torch.equal(got, out) and openmla.check_errors() == ()
    say(clamped=True)


def section_soak(seconds: float = 20.0) -> None:
    """Random shapes, eager and graphs, a canary result every 500 calls; memory and speed must not drift."""
    import random
    import resource

    pick = random.Random(0)
    shapes = [
        decode_arguments(pick.choice((1, 4, 32)), pick.choice((16, 64, 128)), pick.choice((64, 700, 3000)))
        for _ in range(24)
    ]
    fixed = decode_arguments(batch=7, h_q=128, tokens=900)
    first, _ = openmla.decode(**fixed)
    for each in shapes:
        openmla.decode(**each)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        openmla.decode(**fixed)
    base = torch.cuda.memory_allocated()
    rss0 = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    again: torch.Tensor | None = None
    calls, thirds, begin = 0, [[], [], []], time.monotonic()
    while (spent := time.monotonic() - begin) < seconds:
        at = time.perf_counter()
        for _ in range(25):
            openmla.decode(**pick.choice(shapes))
        graph.replay()
        torch.cuda.synchronize()
        thirds[min(int(3 * spent / seconds), 2)].append(time.perf_counter() - at)
        calls += 26
        if calls % 520 == 0:
            again, _ = openmla.decode(**fixed)
            assert torch.equal(first, again), f"bits changed after {calls} calls"
    del again
    rss1 = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    p99 = [sorted(each)[int(0.99 * len(each))] * 1e3 for each in thirds]
    counted = sum(value for f in metrics.snapshot() if f.name == "openmla_calls" for _, value in f.samples)
    say(calls=calls, counted=counted, p99_ms=[round(x, 2) for x in p99], rss_kib=[rss0, rss1],
        allocated=[base, torch.cuda.memory_allocated()], fds=len(os.listdir("/proc/self/fd")))  # fmt: skip
    assert torch.cuda.memory_allocated() <= base
    assert metrics.health()["state"] == "ok"


if __name__ == "__main__":
    logging.getLogger("openmla").setLevel(logging.ERROR)
    globals()[f"section_{sys.argv[1]}"](*map(float, sys.argv[2:]))
