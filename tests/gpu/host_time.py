"""Host time of a decode call on a GPU, by part: how long Python holds the caller, and where.

    python tests/gpu/host_time.py [--profile]

Prints the median time of calls one behind the other (a server's loop over layers): with a plan, without one, and the
share of the compiled functions. Bar: 15 us from the call to the launch.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
from collections.abc import Callable

import torch

import openmla
from openmla.core.problem import DecodeProblem
from openmla.core.target import Target


def median_us(call: Callable[[], object], repeats: int = 400) -> float:
    """Median of calls one behind the other, waiting for the device now and then, outside the clock."""
    times = []
    for number in range(repeats):
        if number % 50 == 0:
            torch.cuda.synchronize()
        at = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - at) / 1e3)
    torch.cuda.synchronize()
    return statistics.median(times)


def main() -> None:
    """Two head counts, three ways."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", action="store_true", help="print where the time of a planned call goes")
    options = parser.parse_args()
    device = torch.device("cuda")
    for h_q in (16, 128):
        q = torch.randn(4, 1, h_q, 576, device=device, dtype=torch.bfloat16)
        kv = torch.randn(64, 64, 1, 576, device=device, dtype=torch.bfloat16)
        table = torch.arange(64, dtype=torch.int32, device=device).view(4, 16)
        lengths = torch.full((4,), 1000, dtype=torch.int32, device=device)
        out = q.new_empty(4, 1, h_q, 512)
        plan = openmla.plan(q, kv, table, lengths)
        chosen = openmla.explain(DecodeProblem.from_tensors(q, kv, table, lengths), target=Target.detect(device)).chosen
        given = lambda: openmla.decode(q, kv, table, lengths, plan=plan, out=out)  # noqa: B023, E731
        alone = lambda: openmla.decode(q, kv, table, lengths)  # noqa: B023, E731
        workspace = torch.empty(openmla.workspace_bytes(q, kv, table, lengths), dtype=torch.uint8, device=device)
        ready = lambda: openmla.decode(q, kv, table, lengths, plan=plan, out=out, workspace=workspace)  # noqa: B023, E731
        for call in (given, alone, ready):
            median_us(call, 100)
        kernel = chosen.kernel if chosen else "none"
        print(
            f"h_q {h_q} {kernel}: plan and out given {median_us(given):.1f} us, workspace too {median_us(ready):.1f} us, "
            f"nothing given {median_us(alone):.1f} us"
        )
        if options.profile:
            profile = cProfile.Profile()
            profile.enable()
            for _ in range(500):
                given()
            profile.disable()
            pstats.Stats(profile).sort_stats("tottime").print_stats(14)


if __name__ == "__main__":
    main()
