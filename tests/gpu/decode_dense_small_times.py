"""Timings of the few-row dense decode kernel on one Hopper GPU, beside sgl-flash-mla where it is installed.

    python tests/gpu/decode_dense_small_times.py LIBRARY[,LIBRARY ...] [CELL ...]     rows to $OUT

Several libraries (two versions of the kernel) are timed in turn, by the names of their files. They are built by
build_decode_dense_small.py; decode_dense_small.py beside this file checks them.
"""

from __future__ import annotations

import os
import statistics
import sys
from pathlib import Path

import torch
from decode_dense_small import Case, Functions, Inputs, Operator, graph_of, kernel_name

from openmla.core.target import Target
from openmla.lab.store import Row, append, environment, now


def read_bandwidth() -> float:
    """GB/s of a read-only reduction over 4 GB, best of several."""
    import triton
    import triton.language as tl

    @triton.jit
    def reduce(x, y, per: tl.constexpr, block: tl.constexpr):
        program = tl.program_id(0).to(tl.int64)
        total = tl.zeros((block,), dtype=tl.int32)
        for i in range(per):
            total += tl.load(x + program * per * block + i * block + tl.arange(0, block))
        tl.store(y + program, tl.sum(total))

    size = 1 << 30
    x = torch.zeros(size, dtype=torch.int32, device="cuda").random_(0, 1 << 30)
    best = 0.0
    for block, per, warps in ((4096, 16, 8), (8192, 8, 8), (8192, 32, 16)):
        grid = size // (block * per)
        y = torch.empty(grid, dtype=torch.int32, device="cuda")
        for _ in range(6):
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            a.record()
            reduce[(grid,)](x, y, per, block, num_warps=warps)
            b.record()
            torch.cuda.synchronize()
            best = max(best, size * 4 / a.elapsed_time(b) / 1e6)
    return best


def time_graphs(
    graphs: dict[str, torch.cuda.CUDAGraph], rounds: int, repeats: int, *, is_clean: bool = False
) -> dict[str, list[float]]:
    """Microseconds of each replay, in turn, L2 flushed before every one.

    Flushing by writing (the usual way) leaves 50 MB of L2 to be written back during the measurement, which costs
    everybody up to 16 us; `is_clean` reads another buffer afterwards, so that L2 is cold and has nothing to write.
    """
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    clean = torch.ones(64 << 20, dtype=torch.int32, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            events = []
            for _ in range(repeats):
                flush.zero_()
                if is_clean:
                    clean.max()
                a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                a.record()
                graph.replay()
                b.record()
                events.append((a, b))
            torch.cuda.synchronize()
            times[name] += [a.elapsed_time(b) * 1e3 for a, b in events]
    return times


def gemm_tflops() -> float:
    """bf16 8192^3 on random data, best of a few."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(5):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        a @ b
        end.record()
        torch.cuda.synchronize()
        best = max(best, 2 * 8192**3 / begin.elapsed_time(end) / 1e9)
    return best


def peer(x: Inputs):
    """sgl-flash-mla's dense Hopper path on the same tensors, its metadata made beforehand; None if not installed."""
    try:
        from flash_mla import flash_mla_with_kvcache, get_mla_metadata
    except ImportError as error:
        print("peer: not here:", error)
        return None
    meta, _ = get_mla_metadata()
    table = x.table.clamp(0, x.kv.shape[0] - 1)

    def call():
        return flash_mla_with_kvcache(x.q, x.kv, table, x.lengths, 512, meta, softmax_scale=x.softmax_scale,
                                      causal=x.case.causal, use_legacy=True)  # fmt: skip

    return call


# (batch, s_k, h_q): the few-row cells of the anchor table
CELLS = ((1, 4096, 16), (1, 32768, 16), (1, 131072, 16), (4, 4096, 16), (4, 32768, 16), (4, 131072, 16), (16, 4096, 16),
         (16, 32768, 16), (16, 131072, 16), (32, 1024, 16), (128, 4096, 16), (128, 16384, 16), (128, 4096, 32),
         (128, 16384, 32))  # fmt: skip


def row(
    case: Case, who: str, each: list[float], ratio: dict[str, float], is_clean: bool, facts: dict, ceilings: dict
) -> Row:
    """One contender's times as a row."""
    us, ordered, is_peer = statistics.median(each), sorted(each), who == "flash_mla"
    batch, s_k = len(case.lengths), case.lengths[0]
    moved = batch * s_k * 1152 + 2 * batch * case.h_q * 1088
    flops = 2 * batch * case.h_q * s_k * 1088
    return Row(
        suite="decode_dense_small",
        case=f"decode-b{batch}-sq1-hq{case.h_q}-sk{s_k}-bf16",
        who="flash_mla" if is_peer else "cute",
        kind="peer" if is_peer else "backend",
        kernel="flash_mla dense, use_legacy" if is_peer else kernel_name(case),
        config="" if is_peer else who,
        policy="balanced",
        median_us=us,
        p20_us=ordered[len(each) // 5],
        p80_us=ordered[4 * len(each) // 5],
        n=len(each),
        host_us=None,
        flops=flops,
        bytes=moved,
        tflops=flops / us / 1e6,
        gbps=moved / us / 1e3,
        fraction_gemm=flops / us / 1e6 / ceilings["gemm_tflops"],
        fraction_read=moved / us / 1e3 / ceilings["read_gbps"],
        ratio=ratio,
        gate="" if is_peer else "within 1e-2 of the peer's largest element",
        timing="graph",
        cache="cold, nothing to write back" if is_clean else "cold, flushed by writing",
        dtype="bf16",
        inputs="0.1 * randn, shuffled pages of 64",
        seed=0,
        environment=facts,
        ceilings=ceilings,
        utc=now(),
    )


def run_times(libraries: list[str], only: list[str]) -> None:
    """Every cell, all libraries and the peer in turn."""
    versions = {Path(library).stem: Functions(library) for library in libraries}
    out_dir = Path(os.environ.get("OUT", "."))
    facts = environment(Target.detect("cuda"))
    ceilings = {"gemm_tflops": gemm_tflops(), "read_gbps": read_bandwidth()}
    print(f"{facts['device']}, commit {facts['git_sha']}", *(f"{k} {v:.0f}" for k, v in ceilings.items()), flush=True)
    for batch, s_k, h_q in CELLS:
        tag = f"b{batch}_h{h_q}_k{s_k}"
        if only and tag not in only:
            continue
        case = Case(tag, (s_k,) * batch, h_q=h_q)
        x = Inputs(case, poison=False)
        graphs, kept = {}, []  # kept: a graph replays over the plan and the exchange of its operator
        call = peer(x)
        if call is not None:
            graphs["flash_mla"] = graph_of(call)
        for name, fns in versions.items():
            op = Operator(fns, x, kernel_name(case))
            op.plan()
            kept.append(op)
            graphs[name] = graph_of(op.run)
            if call is not None:
                ref = call()[0]
                bad = (op.out.double() - ref.double()).abs().max() / ref.double().abs().max()
                assert bad < 1e-2, f"{tag}: {name} differs from the peer by {bad:.1e}"
        for is_clean in (False, True):
            times = time_graphs(graphs, rounds=3, repeats=5 if batch * s_k > 1 << 20 else 15, is_clean=is_clean)
            rows = []
            for who, each in times.items():
                ratio = {}
                if call is not None and who != "flash_mla":
                    ratio["flash_mla"] = statistics.median(times["flash_mla"]) / statistics.median(each)
                rows.append(row(case, who, each, ratio, is_clean, facts, ceilings))
            said = (
                f"{r.config or r.who} {r.median_us:.1f}us {r.gbps:.0f}GB/s"
                + "".join(f" x{v:.2f}" for v in r.ratio.values())
                for r in rows
            )
            print(f"{tag:16}{'clean' if is_clean else 'dirty'}", *said, sep=" | ", flush=True)
            append(out_dir / "decode_dense_small.jsonl", rows)
        del graphs, kept, x, call
        torch.cuda.empty_cache()


if __name__ == "__main__":
    run_times(sys.argv[1].split(","), sys.argv[2:])
