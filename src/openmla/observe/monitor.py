"""The monitor: this process's metrics for Prometheus and its health for a load balancer, over HTTP. Off by default.

    from openmla.observe import monitor
    monitor.start(port=9464)                     # http://127.0.0.1:9464/metrics and /health
    registry.register(monitor.Collector())       # or: into the registry that a server exports already

One exporter per process, each on a port of its own: `sum(rate(openmla_calls_total[1m]))` adds them up. The server
listens on the loopback interface unless told otherwise, answers GET for two paths, and gives up on a client that is
slow, talks too much, or is the 17th at a time. Needs `pip install 'openmla[monitor]'` (prometheus-client).
"""

from __future__ import annotations

import ipaddress
import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from openmla.core import incidents
from openmla.core.errors import ConfigError
from openmla.observe import metrics

CLIENT_SECONDS = 2.0  # to send a request, and to take the answer
MAX_CLIENTS = 16
_log = logging.getLogger("openmla")


class Collector:
    """The metrics as prometheus_client families; register it wherever a registry is."""

    def __init__(self, *, device_facts: bool = True) -> None:
        self.device_facts = device_facts

    def collect(self) -> Iterator[Any]:
        """Called by the registry at every scrape."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        found = metrics.snapshot()
        if self.device_facts:
            found += device_facts()
        for each in found:
            form = CounterMetricFamily if each.kind == "counter" else GaugeMetricFamily
            labels = sorted(each.samples[0][0]) if each.samples else []
            family = form(each.name, each.help, labels=labels)
            for given, value in each.samples:
                family.add_metric([given[name] for name in labels], value)
            yield family


def device_facts() -> list[metrics.Family]:
    """Memory of every GPU that this process uses, and clocks and power where nvidia-ml-py is installed."""
    families = [
        metrics.Family("openmla_gpu_memory_bytes", "gauge", "Held by PyTorch's allocator in this process"),
        metrics.Family("openmla_gpu_clock_hertz", "gauge", "SM clock"),
        metrics.Family("openmla_gpu_power_watts", "gauge", "Power draw of the board"),
        metrics.Family("openmla_gpu_temperature_celsius", "gauge", "Temperature of the GPU"),
    ]
    if not torch.cuda.is_initialized():
        return []
    for index in range(torch.cuda.device_count()):
        label = str(index)
        families[0].add(float(torch.cuda.memory_reserved(index)), gpu=label)
        try:
            clock, power = torch.cuda.clock_rate(index) * 1e6, torch.cuda.power_draw(index) * 1e-3
            families[1].add(clock, gpu=label)
            families[2].add(power, gpu=label)
            families[3].add(float(torch.cuda.temperature(index)), gpu=label)
        except (ImportError, RuntimeError):  # no nvidia-ml-py, or a card that does not tell
            continue
    return [each for each in families if each.samples]


class _Handler(BaseHTTPRequestHandler):
    """GET /metrics and GET /health; everything else is refused, and nothing of a request is repeated or logged."""

    server_version, sys_version, protocol_version = "openmla", "", "HTTP/1.0"
    timeout = CLIENT_SECONDS  # of every read and write; http.server limits lines to 64 KiB and headers to 100
    server: _Server

    def do_GET(self) -> None:
        """Answer one request."""
        path = self.path.partition("?")[0]
        if path == "/metrics":
            from prometheus_client import generate_latest

            self._answer(200, generate_latest(self.server.registry), "text/plain; version=0.0.4; charset=utf-8")
        elif path == "/health":
            found = metrics.health()
            body = json.dumps(found).encode() + b"\n"
            self._answer(503 if found["state"] == "failed" else 200, body, "application/json")
        else:
            self._answer(404, b"/metrics and /health\n", "text/plain")

    def _answer(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: a client's words do not belong in a server's log."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = MAX_CLIENTS
    registry: Any

    def __init__(self, address: tuple[str, int]) -> None:
        super().__init__(address, _Handler)
        self._places = threading.BoundedSemaphore(MAX_CLIENTS)

    def process_request(self, request: Any, client_address: Any) -> None:
        """One thread per client, sixteen at most; the next one is hung up on."""
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Frees the place, whatever the client did."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up or is too slow is its own problem; anything else is noted."""
        import sys

        error = sys.exc_info()[1]
        if not isinstance(error, (TimeoutError, ConnectionError)):
            incidents.note("monitor_failed", "exporter", f"{type(error).__name__}: {error}")


class Monitor:
    """A running exporter."""

    def __init__(self, server: _Server, sampler: metrics.Sampler | None, replays: metrics.Replays | None) -> None:
        self._server, self._sampler, self._replays = server, sampler, replays
        self._thread = threading.Thread(target=server.serve_forever, name="openmla-monitor", daemon=True)
        self._thread.start()

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that it listens on."""
        host, port = self._server.server_address[:2]
        return str(host), int(port)

    def stop(self) -> None:
        """Close the port, and end the sampling and counting that `start` began for it."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        metrics.forget(self._sampler, self._replays)


def start(
    port: int = 9464, *, listen: str = "127.0.0.1", sample_every: int = 0, count_replays: bool = False
) -> Monitor:
    """Export this process's metrics and health.

    Args:
        port: TCP port; 0 takes a free one. With several worker processes, give each its own, such as 9464 + rank.
        listen: IP address. Anything but the loopback interface shows the metrics to whoever reaches the port: there is
            no password, so let a firewall or a proxy decide who that is.
        sample_every: as `metrics.sample`; 0: no samples.
        count_replays: as `metrics.count_replays`.

    Raises:
        ConfigError: prometheus-client is missing, the address is no IP address, or the port is taken.
    """
    try:
        from prometheus_client import CollectorRegistry
    except ImportError as error:
        raise ConfigError("the monitor needs prometheus-client: pip install 'openmla[monitor]'") from error
    try:
        is_loopback = ipaddress.ip_address(listen).is_loopback
    except ValueError as error:
        raise ConfigError(
            f"listen={listen!r} is no IP address; use 127.0.0.1, or 0.0.0.0 for every interface"
        ) from error
    try:
        server = _Server((listen, port))
    except (OSError, OverflowError) as error:
        raise ConfigError(f"port {port} of {listen} cannot be had: {error}; give every process its own port") from error
    if not is_loopback:
        _log.warning("metrics are open to every host that reaches %s:%d; there is no password", listen, port)
    server.registry = CollectorRegistry(auto_describe=False)
    server.registry.register(Collector())
    sampler = metrics.sample(sample_every) if sample_every else None
    replays = metrics.count_replays() if count_replays else None
    return Monitor(server, sampler, replays)
