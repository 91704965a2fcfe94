"""What every test shares: one thread per process, and the options that replay or widen the fuzz."""

from __future__ import annotations

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("openmla")
    group.addoption(
        "--case-seed", type=int, default=None, help="run only this seed of every fuzz test that is selected"
    )
    group.addoption(
        "--case-base", type=int, default=0, help="first seed of the fuzz; each nightly run takes another one"
    )


def pytest_configure(config: pytest.Config) -> None:
    # Workers share the cores; a thread pool in each of them would only make them wait for one another.
    torch.set_num_threads(1)


def pytest_report_header(config: pytest.Config) -> str:
    return f"fuzz: --case-seed={config.getoption('--case-seed')} --case-base={config.getoption('--case-base')}"


@pytest.fixture
def seeds_of(request: pytest.FixtureRequest):
    """The seeds of one chunk of a fuzz test: (chunk, size) -> range, or the single seed that was asked for."""

    def seeds(chunk: int, size: int) -> range:
        only, base = request.config.getoption("--case-seed"), request.config.getoption("--case-base")
        if only is not None:
            return range(only, only + 1) if chunk == 0 else range(0)
        return range(base + chunk * size, base + (chunk + 1) * size)

    return seeds
