"""Context-parallel decode over the GPUs of one host, through NCCL and peer memory: right, timed, and a rank that dies is named.

    torchrun --nproc-per-node 2 tests/multi_gpu/context_parallel.py [--out rows.jsonl]
    torchrun --nproc-per-node 2 tests/multi_gpu/context_parallel.py --cpu --small      the script itself, over gloo

Needs PyTorch alone. Every rank runs the same checks against the fp64 oracle (rank 0 computes it once for the small
cases); then batch 4, 128k tokens, h_q 128 on one GPU and on all of them, interleaved: what the speed-up is of. Rank 0
writes one JSON row per fact. `--stall` stops the last rank before a collective: the others must name it. `--mixed` lets it
repeat another call than the others: all must say so.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from openmla.distributed import ContextParallel, DeadRankError
from openmla.ops import native
from openmla.reference import attention as reference
from openmla.testing import budget

PAGE, SCALE = 64, 192**-0.5
EXCHANGES = ("direct", "all_gather", "all_to_all")


def paged(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[batch, s, 576] as pages, table and lengths."""
    batch, s, _ = rows.shape
    pages = -(-s // PAGE)
    pool = torch.nn.functional.pad(rows, (0, 0, 0, pages * PAGE - s)).reshape(batch * pages, PAGE, 1, 576)
    table = torch.arange(batch * pages, dtype=torch.int32, device=rows.device).view(batch, pages)
    return pool, table, torch.full((batch,), s, dtype=torch.int32, device=rows.device)


SPREADS = {
    "round robin": lambda places, world: places % world,
    "uneven": lambda places, world: (places * 10 >= len(places) * 9).long() * (world - 1),  # nine tenths; none between
    "all on rank 0": lambda places, world: places * 0,
}


def check(ranks: ContextParallel, device: torch.device, dtype: torch.dtype) -> int:
    """Both exchanges, all heads and own heads, one and two causal tokens, even, uneven and empty shares; returns cases."""
    generator = torch.Generator(device).manual_seed(7)
    cases = 0
    for batch, s_k, h_q, s_q in ((3, 700, 16, 1), (2, 1500, 128, 2), (1, 1, 16, 1)):
        rows = torch.randn(batch, s_k, 576, generator=generator, device=device).to(dtype)
        q = torch.randn(batch, s_q, h_q, 576, generator=generator, device=device).to(dtype)
        golden = reference.decode(
            q, *paged(rows), d_v=512, softmax_scale=SCALE, is_causal=True, with_bounds=True
        )  # fmt: skip
        own = slice(ranks.rank * h_q // ranks.world, (ranks.rank + 1) * h_q // ranks.world)
        for spread, rank_of in SPREADS.items():
            kept = rank_of(torch.arange(s_k, device=device), ranks.world) == ranks.rank
            mine = rows[:, kept]
            pool, table, _ = paged(mine if mine.shape[1] else rows[:, :1])
            # Query i sees the tokens up to its own, of which this rank has so many.
            ends = torch.arange(s_k - s_q + 1, s_k + 1, device=device)
            seen = torch.stack([kept[:end].sum() for end in ends]).to(torch.int32).expand(batch, s_q).contiguous()
            for exchange in EXCHANGES if device.type == "cuda" else EXCHANGES[1:]:
                name = f"{spread}, {exchange}, {batch=} {s_k=} {h_q=} {s_q=}"
                out, lse = ranks.decode(q, pool, table, seen, exchange=exchange, softmax_scale=SCALE)
                ranks.wait()
                budget.check(out, lse, golden, dtype=dtype).require(name)
                part, part_lse = ranks.decode(
                    q[:, :, own], pool, table, seen, heads="own", exchange=exchange, softmax_scale=SCALE
                )
                ranks.wait()
                whole, whole_lse = golden.out.to(dtype), golden.lse.float()
                whole[:, :, own], whole_lse[:, own] = part, part_lse
                budget.check(whole, whole_lse, golden, dtype=dtype).require(f"own heads, {name}")
                cases += 2
    return cases


def graphed(call: Callable[[], object], device: torch.device, times: int) -> Callable[[], object]:
    """So many calls as one CUDA graph, collectives included, as a server replays its layers; itself on a CPU."""
    if device.type != "cuda":
        return call
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # NCCL's own threads ask about events meanwhile, which the default mode forbids.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(times):
            call()

    def replay(kept: object = call) -> None:  # the memory that the call holds must outlive the graph
        graph.replay()

    return replay


def seconds(call, device: torch.device) -> float:
    """One call, behind a barrier, on this rank's clock."""
    dist.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def measure(
    ranks: ContextParallel, device: torch.device, small: bool, layers: int, s_k: int = 131072, is_planned: bool = True
) -> dict[str, object]:
    """Batch 4, 128k tokens, h_q 128: every rank alone over everything, and all of them over a share each.

    `layers` calls per CUDA graph, times are per call; 0: without a graph. `is_planned`: one plan for all calls, as layers
    of a model share it; else each call plans.
    """
    batch, s_k, h_q = (2, 1024, 16) if small else (4, s_k, 128)
    generator = torch.Generator(device).manual_seed(1)  # the same numbers on every rank
    rows = torch.randn(batch, s_k, 576, generator=generator, device=device).to(torch.bfloat16)
    q = torch.randn(batch, 1, h_q, 576, generator=generator, device=device).to(torch.bfloat16)
    whole = paged(rows)
    share = paged(rows[:, ranks.rank :: ranks.world].contiguous())
    link = ranks.measure(device)
    plans = (native.plan(q, *whole), ranks.plan(q, *share)) if is_planned else (None, None)
    exchanges = ["all_gather", "all_to_all"]
    if ranks.why_not_direct(q) is None:
        exchanges.insert(0, "direct")
    calls: dict[str, Callable[[], object]] = {
        "one": lambda: native.decode(q, *whole, softmax_scale=SCALE, plan=plans[0]),
        "share": lambda: native.decode(q, *share, softmax_scale=SCALE, plan=plans[1]),  # what of it is attention
    }
    want, _ = native.decode(q, *whole, softmax_scale=SCALE)
    for exchange in exchanges:
        calls[exchange] = partial(ranks.decode, q, *share, exchange=exchange, softmax_scale=SCALE, plan=plans[1])
        torch.testing.assert_close(calls[exchange]()[0].float(), want.float(), rtol=2e-2, atol=2e-3)  # type: ignore[index]
    if layers:
        calls = {name: graphed(call, device, layers) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(4 if small else 34):
        for name, call in calls.items():
            slowest = torch.tensor([seconds(call, device)], dtype=torch.float64, device=device)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            if turn >= 4 or small:
                times[name].append(float(slowest) / max(layers, 1))
    median = {name: statistics.median(each) for name, each in times.items()}
    fastest = min(exchanges, key=median.__getitem__)
    return {
        "what": "context_parallel_decode", "world": ranks.world, "backend": dist.get_backend(), "batch": batch,
        "s_k": s_k, "h_q": h_q, "dtype": "torch.bfloat16", "calls_per_graph": layers, "is_planned": is_planned,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__, "median_us": {name: round(1e6 * each, 2) for name, each in median.items()},
        "spread_us": {name: round(1e6 * (max(each) - min(each)), 2) for name, each in times.items()},
        "speedup": round(median["one"] / median[fastest], 3), "fastest": fastest,
        "link": {"latency_us": round(1e6 * link.latency_s, 2), "gbps": round(link.bytes_per_s / 1e9, 2)},
    }  # fmt: skip


def hurry(ranks: ContextParallel, device: torch.device, rounds: int) -> dict[str, object]:
    """Calls one behind the other, other queries each, ranks out of step at random: none may see another call's share."""
    batch, s_k, h_q, kinds = 2, 512, 16, 5
    generator = torch.Generator(device).manual_seed(3)
    rows = torch.randn(batch, s_k, 576, generator=generator, device=device).to(torch.bfloat16)
    share = paged(rows[:, ranks.rank :: ranks.world].contiguous())
    queries = torch.randn(kinds, batch, 1, h_q, 576, generator=generator, device=device).to(torch.bfloat16)
    want = [ranks.decode(q, *share, exchange="all_gather", softmax_scale=SCALE) for q in queries]
    call = partial(ranks.decode, exchange="auto", softmax_scale=SCALE)
    graphs, outs = [], []
    for kind in range(kinds):  # one and several calls per graph
        call(queries[kind], *share)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outs.append([call(queries[(kind + i) % kinds], *share) for i in range(1 + kind % 3)])
        graphs.append(graph)
    chance = torch.Generator().manual_seed(100 + ranks.rank)  # another on every rank
    counts = torch.zeros(2, dtype=torch.int64, device=device)  # on the device: nothing here waits for it
    for turn in range(rounds):
        if int(torch.randint(3, (1,), generator=chance)) == 0:
            torch.cuda._sleep(int(torch.randint(200_000, (1,), generator=chance)))
        kind = turn * 7 % kinds
        if turn % 4 == 3:
            found = [call(queries[kind], *share)]
        else:
            graphs[kind].replay()
            found = outs[kind]
        for i, (out, lse) in enumerate(found):
            right, right_lse = want[(kind + i) % kinds]
            is_close = torch.isclose(out.float(), right.float(), rtol=1e-2, atol=1e-3).all()
            is_close &= torch.isclose(lse, right_lse, rtol=1e-5, atol=1e-5).all()
            counts += torch.stack([~is_close, (out != right).any()])
    ranks.wait()
    dist.all_reduce(counts)
    return {"what": "direct_out_of_step", "rounds": rounds, "wrong": int(counts[0]), "other_bits": int(counts[1])}


def opened(ranks: ContextParallel, device: torch.device) -> str | None:
    """Why shares do not travel through peer memory, once the ranks have met."""
    pool, table, lengths = paged(torch.randn(1, 64, 576, device=device).to(torch.bfloat16))
    q = torch.randn(1, 1, 16, 576, device=device).to(torch.bfloat16)
    ranks.decode(q, pool, table, lengths)
    ranks.wait()
    return ranks.why_not_direct(q)


def stall(ranks: ContextParallel, device: torch.device) -> str:
    """The last rank stands still; everybody else must say so. (torchrun itself ends all ranks when one is killed.)"""
    pids: list[int] = [0] * ranks.world
    dist.all_gather_object(pids, os.getpid())
    if ranks.rank == ranks.world - 1:
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(0)  # when rank 0 wakes it up
    pool, table, lengths = paged(torch.randn(1, 64, 576, device=device).to(torch.bfloat16))
    q = torch.randn(1, 1, 16, 576, device=device).to(torch.bfloat16)
    try:
        ranks.decode(q, pool, table, lengths)
        ranks.wait()
    except DeadRankError as error:
        if ranks.rank == 0:
            os.kill(pids[-1], signal.SIGCONT)
        if error.ranks != (ranks.world - 1,):
            raise AssertionError(f"the wrong rank is named: {error}") from error
        return str(error)
    raise AssertionError("nobody noticed")


def mixed_up(device: torch.device) -> dict[str, str]:
    """Two known calls of one size; then the last rank makes the other one. Each exchange must notice; what was said."""
    said = {}
    for exchange in EXCHANGES if device.type == "cuda" else EXCHANGES[1:]:
        ranks = ContextParallel(timeout_s=5)
        pool, table, lengths = paged(torch.randn(1, 64, 576, device=device).to(torch.bfloat16))
        q = torch.randn(1, 1, 16, 576, device=device).to(torch.bfloat16)
        call = partial(ranks.decode, q, pool, table, lengths, exchange=exchange)
        for scale in (0.07, 0.08, 0.07, 0.08):
            call(softmax_scale=scale)
            ranks.wait()
        try:
            out, _ = call(softmax_scale=0.08 if ranks.rank == ranks.world - 1 else 0.07)
            ranks.wait()
        except DeadRankError as error:
            if error.ranks[:1] != ((0,) if ranks.rank == ranks.world - 1 else (ranks.world - 1,)):
                raise AssertionError(f"{exchange}: the wrong rank is named: {error}") from error
            if device.type == "cuda" and not bool(out.isnan().all()):
                raise AssertionError(f"{exchange}: rows that are not NaN") from error
            said[exchange] = error.cause
            continue
        raise AssertionError(f"{exchange}: nobody noticed")
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--stall", action="store_true")
    parser.add_argument("--mixed", action="store_true", help="ranks mix up two calls that all of them know")
    parser.add_argument("--untimed", action="store_true", help="only whether it is right")
    options = parser.parse_args()
    local = int(os.environ["LOCAL_RANK"])
    device = torch.device("cpu") if options.cpu else torch.device("cuda", local)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    ranks = ContextParallel(timeout_s=5 if options.cpu else 60)  # a rank may still be compiling
    dtype = torch.bfloat16
    if options.cpu:
        write(measure(ranks, device, options.small, 0), ranks, options.out)
    else:
        # Before anything is timed: the first call of each exchange, and whether one disturbs another.
        print(f"why not direct: {opened(ranks, device)}", file=sys.stderr, flush=True)
        write(hurry(ranks, device, 400), ranks, options.out)
        runs = ((27, 131072, True), (8, 131072, False), (27, 524288, True), (0, 131072, True))
        for layers, s_k, is_planned in () if options.untimed else runs:
            write(measure(ranks, device, options.small, layers, s_k, is_planned), ranks, options.out)
    if options.mixed:
        write({"what": "mixed_up", "said": mixed_up(device)}, ranks, options.out)
    write({"what": "context_parallel_checks", "cases": check(ranks, device, dtype)}, ranks, options.out)
    if options.stall:
        ranks.timeout_s = 5
        write({"what": "dead_rank", "message": stall(ranks, device)}, ranks, options.out)
    sys.stdout.flush()
    os._exit(0)  # NCCL would wait for the dead rank in its own farewell


def write(row: dict[str, object], ranks: ContextParallel, out: Path | None) -> None:
    """One fact, as soon as it is known."""
    if ranks.rank == 0:
        print(json.dumps(row), flush=True)
        if out:
            with out.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
