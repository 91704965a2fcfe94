"""What every test shares: one thread per process, and the options that replay or widen the fuzz."""

from __future__ import annotations

import gc
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("openmla")
    group.addoption(
        "--case-seed", type=int, default=None, help="run only this seed of every fuzz test that is selected"
    )
    group.addoption(
        "--case-scale",
        type=int,
        default=1,
        help="so many times the cases of every fuzz test; `make reliability` sets it",
    )
    group.addoption("--record", type=Path, default=None, help="JSON file for what ran: tests, cases, failures, seconds")
    group.addoption(
        "--case-base", type=int, default=0, help="first seed of the fuzz; each nightly run takes another one"
    )


def pytest_configure(config: pytest.Config) -> None:
    # Workers share the cores; a thread pool in each of them would only make them wait for one another.
    torch.set_num_threads(1)


def pytest_collection_finish(session: pytest.Session) -> None:
    # What is imported by now stays: the collector need not walk it again and again. A fifth of an emulated kernel's time.
    gc.collect()
    gc.freeze()


def pytest_report_header(config: pytest.Config) -> str:
    return f"fuzz: --case-seed={config.getoption('--case-seed')} --case-base={config.getoption('--case-base')}"


_cases: Counter[str] = Counter()  # test -> cases that it ran through
_outcomes: Counter[str] = Counter()
_failures: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        _outcomes[report.outcome] += 1
        if report.failed:
            _failures.append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--record")
    if path is not None:
        found = {
            "outcomes": dict(_outcomes),
            "cases": sum(_cases.values()),
            "failures": _failures,
            "by_test": dict(_cases),
        }
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


@pytest.fixture
def seeds_of(request: pytest.FixtureRequest):
    """The seeds of one chunk of a fuzz test: (chunk, size) -> range, or the single seed that was asked for."""

    def seeds(chunk: int, size: int) -> range:
        only, base = request.config.getoption("--case-seed"), request.config.getoption("--case-base")
        size *= request.config.getoption("--case-scale")
        _cases[request.node.nodeid.partition("[")[0]] += size if only is None else 1
        if only is not None:
            return range(only, only + 1) if chunk == 0 else range(0)
        return range(base + chunk * size, base + (chunk + 1) * size)

    return seeds


@pytest.fixture(autouse=True)
def nobody_watches_afterwards() -> Iterator[None]:
    """A test that leaves an observer or a lost device behind fails, not a later one that it slows or stops.

    Kernels that stand aside, because a test had their launch refused, stand there for its own time only; faults that a test
    caused are its own.
    """
    yield
    from openmla.backends import aside
    from openmla.core import faults
    from openmla.ops import recovery
    from openmla.ops.observers import observers

    left = [*observers, *recovery.LOST]
    observers.clear()
    recovery.LOST.clear()
    aside.clear()
    for word in (*faults._words.values(), *faults._records.values()):
        word.zero_()
    assert not left, f"left behind: {left}"
