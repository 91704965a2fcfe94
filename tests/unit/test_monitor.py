"""Metrics: exact under threads, forks and processes; the exporter: closed, patient with nobody, silent."""

from __future__ import annotations

import gc
import http.client
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fragile import arguments, forget

import openmla
from openmla.core import counters, incidents
from openmla.core.errors import ConfigError, DeviceLostError
from openmla.observe import metrics, monitor, watchdog
from openmla.ops import observers, recovery
from openmla.ops.append import append

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    forget()
    yield
    metrics.stop()
    watchdog.stop()
    forget()


@pytest.fixture
def exporter() -> Iterator[monitor.Monitor]:
    running = monitor.start(port=0)
    yield running
    running.stop()


def value(name: str, **labels: str) -> float:
    """The sum of the samples of a family whose labels agree."""
    (family,) = [each for each in metrics.snapshot() if each.name == name]
    return sum(v for given, v in family.samples if labels.items() <= given.items())


def get(at: monitor.Monitor, path: str, method: str = "GET") -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection(*at.address, timeout=5)
    connection.request(method, path)
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), dict(answer.headers)


def test_calls_and_tokens_are_counted_exactly_by_many_threads():
    given = arguments(batch=3)
    openmla.decode(**given)

    def work() -> None:
        for _ in range(200):
            openmla.decode(**given)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert value("openmla_calls", op="decode", backend="torch") == 1601
    assert value("openmla_query_tokens") == 3 * 1601


def test_append_is_counted_sampled_and_refused_on_a_lost_device():
    cache, slots = torch.zeros(2, 4, 1, 64), torch.tensor([3, -1, 7])
    metrics.sample(1)
    append(cache, slots, torch.ones(3, 64))
    append(cache, slots[:2], torch.ones(2, 64))
    assert value("openmla_calls", op="append", backend="torch") == 2
    assert value("openmla_query_tokens", op="append") == 5
    assert value("openmla_sampled_calls", op="append") == 2
    assert value("openmla_sampled_bytes", op="append") == 5 * 64 * 2 * 4
    recovery.lose("cpu", "injected")
    with pytest.raises(DeviceLostError):
        append(cache, slots, torch.ones(3, 64))


def test_a_forked_child_starts_at_zero_and_the_parent_goes_on():
    openmla.decode(**arguments())
    incidents.note("lock_stuck", "cache/lock", "before the fork")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:  # only metadata: a forked child of a process with threads should do little
        before = value("openmla_calls")
        counters.tallies()[0].count()
        os.write(writing, json.dumps([before, value("openmla_calls"), len(incidents.counts())]).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert json.loads(os.read(reading, 1000)) == [0, 1, 0]
    openmla.decode(**arguments())
    assert value("openmla_calls") == 2 and incidents.counts()


def test_f23_a_fork_after_cuda_began_is_a_typed_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            recovery.refuse(torch.device("cuda:0"))
            os.write(writing, b"nothing was raised")
        except openmla.core.errors.DeviceLostError as error:
            os.write(writing, f"{error} {metrics.health()['state']} {incidents.counts()}".encode())
        os._exit(0)
    os.waitpid(child, 0)
    text = os.read(reading, 10_000).decode()
    assert "forked after CUDA was initialised; start workers with the spawn method" in text
    assert "failed" in text and "('forked', 'cuda'): 1" in text
    assert not recovery.LOST


def test_worker_processes_add_up():
    """Four workers, each with its exporter; the sum of what they say is the number of calls."""
    code = (
        "import sys, openmla; from fragile import arguments; from openmla.observe import monitor\n"
        "m = monitor.start(port=0)\n"
        "for _ in range(int(sys.argv[1])): openmla.decode(**arguments())\n"
        "print(m.address[1], flush=True); sys.stdin.read()\n"
    )
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests" / "unit")])
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(count)], env={**os.environ, "PYTHONPATH": path}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        for count in (1, 2, 3, 4)
    ]  # fmt: skip
    total = 0.0
    for each in workers:
        assert each.stdout is not None
        connection = http.client.HTTPConnection("127.0.0.1", int(each.stdout.readline()), timeout=20)
        connection.request("GET", "/metrics")
        (line,) = re.findall(r"^openmla_calls_total{.*} (.*)$", connection.getresponse().read().decode(), re.MULTILINE)
        total += float(line)
        each.communicate()
    assert total == 10


def test_replays_are_counted_where_they_run_and_captures_are_not_calls():
    """The device's part runs in tests/gpu/reliability_sections.py; here the CPU plays the device."""
    replays = metrics.count_replays("cpu")
    openmla.decode(**arguments())
    (tally,) = [each for each in counters.tallies() if each.calls]
    for _ in range(3):  # a capture calls Python and runs nothing
        tally.count()
        replays.captured(tally, torch.device("cpu"))
    assert value("openmla_captured_calls") == 3
    assert value("openmla_calls") == 1 + 3  # on the CPU the increments of the capture have run already
    replays._device[torch.device("cpu")][0][0] += 97
    assert value("openmla_calls") == 1 + 100 and value("openmla_query_tokens") == 2 * 101


def test_what_graphs_increment_outlives_the_counting():
    """A graph that was captured while replays were counted writes to that memory as long as it is replayed."""
    replays = metrics.count_replays("cpu")
    openmla.decode(**arguments())
    numbers = weakref.ref(replays._device[torch.device("cpu")][0])
    replays.captured(counters.tallies()[0], torch.device("cpu"))
    metrics.stop()
    del replays
    gc.collect()
    assert numbers() is not None


def test_sampled_calls_have_times_bytes_and_splits():
    sampler = metrics.sample(10)
    assert sampler is not None
    given = arguments(batch=2)
    for _ in range(100):
        openmla.decode(**given)
    assert value("openmla_sampled_calls") == 10
    assert 0 < value("openmla_sampled_seconds") < 10
    rows = 2 * 20 * 64 * 2 + 2 * 4 * ((64 + 32) * 2 + 4)  # KV of 20 tokens each; q, out and lse of 4 heads
    assert value("openmla_sampled_bytes") == 10 * rows
    assert value("openmla_sampled_requests") == 20
    with pytest.raises(ConfigError, match="every must be >= 1"):
        metrics.sample(-1)
    assert metrics.sample(0) is None and not observers.observers


# ------------------------------------------------------------------------------------------------ the exporter


def test_it_says_what_happened_in_the_form_of_prometheus(exporter):
    from prometheus_client.parser import text_string_to_metric_families

    openmla.decode(**arguments())
    incidents.note("bad_value", "length_negative", "x")
    status, text, headers = get(exporter, "/metrics")
    assert status == 200 and headers["Content-Type"].startswith("text/plain")
    found = {each.name: each for each in text_string_to_metric_families(text)}
    assert sum(each.value for each in found["openmla_calls"].samples) == 1
    assert found["openmla_incidents"].samples[0].labels == {"kind": "bad_value", "subject": "length_negative"}
    assert found["openmla_health"].samples[0].value == 0


def test_every_documented_metric_exists_and_every_metric_is_documented(exporter):
    openmla.decode(**arguments())
    metrics.sample(1)
    openmla.decode(**arguments())
    exported = {each.name for each in metrics.snapshot()} | {each.name for each in monitor.device_facts()}
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"`(openmla_[a-z_]+)`", text))
    stems = {re.sub(r"_total$", "", each) for each in documented}
    on_a_gpu = {name for name in stems if name.startswith("openmla_gpu_")}
    assert stems - on_a_gpu == exported - on_a_gpu


def test_the_dashboard_asks_for_metrics_that_exist():
    openmla.decode(**arguments())
    metrics.sample(1)
    openmla.decode(**arguments())
    board = json.loads((ROOT / "src" / "openmla" / "observe" / "grafana.json").read_text(encoding="utf-8"))
    asked = {
        name for panel in board["panels"] for t in panel["targets"] for name in re.findall(r"openmla_\w+", t["expr"])
    }
    known = {f"{each.name}_total" if each.kind == "counter" else each.name for each in metrics.snapshot()}
    known |= {"openmla_gpu_memory_bytes", "openmla_gpu_clock_hertz", "openmla_gpu_power_watts"}
    known |= {"openmla_gpu_temperature_celsius"}
    assert asked <= known, asked - known
    assert len(asked) >= 12


def test_health_is_503_when_the_process_must_be_replaced(exporter):
    assert json.loads(get(exporter, "/health")[1])["state"] == "ok"
    incidents.note("cache_unusable", "cache/folder", "full")
    status, text, _ = get(exporter, "/health")
    assert (status, json.loads(text)["state"]) == (200, "degraded")
    recovery.lose("cuda:0", "illegal memory access")
    status, text, _ = get(exporter, "/health")
    assert (status, json.loads(text)["state"]) == (503, "failed")
    assert any("illegal memory access" in each for each in json.loads(text)["reasons"])


def test_it_listens_on_the_loopback_interface_alone_unless_told(exporter, caplog):
    assert exporter.address[0] == "127.0.0.1"
    with caplog.at_level(logging.WARNING, "openmla"):
        opened = monitor.start(port=0, listen="0.0.0.0")
    opened.stop()
    assert "there is no password" in caplog.text
    with pytest.raises(ConfigError, match="is no IP address"):
        monitor.start(port=0, listen="localhost")
    with pytest.raises(ConfigError, match="give every process its own port"):
        monitor.start(port=exporter.address[1])


def test_nothing_runs_and_nothing_listens_by_default():
    code = "import openmla, threading; from openmla.observe import metrics, monitor; print(threading.active_count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


def test_without_prometheus_client_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ConfigError, match=r"pip install 'openmla\[monitor\]'"):
        monitor.start(port=0)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 404), ("GET", "/../../etc/passwd", 404), ("POST", "/metrics", 501), ("DELETE", "/health", 501),
     ("GET", "/metrics?x=<script>", 200)],
)  # fmt: skip
def test_other_requests_are_refused_and_nothing_is_repeated(exporter, capfd, method, path, status):
    found, text, _ = get(exporter, path, method)
    assert found == status and "script" not in text and "passwd" not in text
    assert capfd.readouterr().err == ""


def test_clients_that_lie_wait_or_come_in_crowds_hurt_nobody(exporter, monkeypatch):
    """Half a request, a megabyte of header, binary noise, a reset: each ends, and scrapes go on meanwhile."""
    monkeypatch.setattr(monitor._Handler, "timeout", 0.5)
    held = []
    for noise in (b"GET /metr", b"GET /metrics HTTP/1.1\r\n" + b"X: y\r\n" * 5, b"\xff\x00\x01" * 100, b""):
        held.append(socket.create_connection(exporter.address, timeout=5))
        held[-1].sendall(noise)
    huge = socket.create_connection(exporter.address, timeout=5)
    try:
        huge.sendall(b"GET /metrics HTTP/1.0\r\nX: " + b"a" * (1 << 20) + b"\r\n\r\n")
        assert not huge.recv(100).startswith(b"HTTP/1.0 200")
    except OSError:
        pass  # hung up on while still talking
    assert get(exporter, "/metrics")[0] == 200
    crowd = [socket.create_connection(exporter.address, timeout=5) for _ in range(40)]
    deadline = time.monotonic() + 10
    while True:  # the silent are dropped after 0.5 s
        try:
            assert get(exporter, "/health")[0] == 200
            break
        except (OSError, http.client.HTTPException):
            assert time.monotonic() < deadline
    for each in (*held, *crowd, huge):
        each.close()
    assert not any(kind == "monitor_failed" for kind, _ in incidents.counts())
    alive = sum(each.name.startswith("Thread-") for each in threading.enumerate())
    assert alive <= monitor.MAX_CLIENTS


def test_a_registry_of_the_users_own_takes_the_collector():
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry()
    registry.register(monitor.Collector())
    openmla.decode(**arguments())
    assert b'openmla_calls_total{backend="torch"' in generate_latest(registry)


def test_the_watchdog_is_told_of_launches_and_replaced_by_a_second_start(monkeypatch):
    marks: list[Any] = []
    first = watchdog.start(5)
    assert watchdog.start(7) is not first and not first._thread.is_alive()
    monkeypatch.setattr(watchdog.Watchdog, "mark", lambda self, device, what: marks.append(what))
    openmla.decode(**arguments())
    assert marks == []  # a CPU has no stream
    with pytest.raises(ConfigError, match="seconds must be > 0"):
        watchdog.start(0)


class Mark:
    def __init__(self, is_done: bool = False) -> None:
        self.is_done = is_done

    def query(self) -> bool:
        return self.is_done


def test_a_hang_behind_a_mark_that_has_passed_is_noticed():
    """The last launch before silence hangs, while the mark of an earlier one was still being waited for."""
    dog = watchdog.Watchdog(0.05, None)
    dog.expect("cpu", Mark(is_done=True), "an earlier launch")
    (stream,) = dog._streams.values()
    stream.newest = (Mark(), "the launch that hangs")
    dog.look()
    assert metrics.health()["state"] == "ok"
    time.sleep(0.1)
    dog.look()
    assert "the launch that hangs" in metrics.health()["reasons"][0]


def test_a_busy_stream_that_moves_is_no_hang():
    dog = watchdog.Watchdog(0.05, None)
    dog.expect("cpu", Mark(is_done=True), "first")
    for _ in range(5):
        (stream,) = dog._streams.values()
        stream.waited.mark.is_done = True
        stream.newest = (Mark(), "next")
        time.sleep(0.04)
        dog.look()
    assert metrics.health()["state"] == "ok"


def test_stopping_a_monitor_ends_what_it_began_and_nothing_else():
    running = monitor.start(0, sample_every=10, count_replays=True)
    assert len(observers.observers) == 2
    running.stop()
    assert not observers.observers
    running = monitor.start(0, sample_every=10)
    own = metrics.sample(7)
    running.stop()
    assert observers.observers == [own]
    metrics.stop()
