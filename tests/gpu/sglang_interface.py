"""SGLang's own file over FlashMLA, over sgl-flash-mla and over OpenMLA: the same calls, results side by side.

    python tests/gpu/sglang_interface.py --interface FILE [--out rows.jsonl]

FILE is sglang/kernels/ops/attention/flash_mla_interface.py of SGLang 0.5.23; it imports nothing of SGLang's. It is loaded
twice, over each library, and called as flashmla_backend.py and dsa_backend.py call it: pages of 64, tables that are slices of
wider buffers with -1 behind the last page, schedule tensors copied into static buffers; eagerly and in a CUDA graph that is
replayed with other lengths. With --times instead: a captured step of 20 layers over each library, each with its own cache.

One JSON row per case; exit 1 where results are apart. Without sgl-flash-mla (or with --device cpu) OpenMLA's are compared
with the oracle in fp64 alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from openmla.integrations import sglang
from openmla.reference import attention
from openmla.reference.quant import write_rows

PAGE, WIDEST, BATCH = 64, 40, 6
LENGTHS = [64, 1500, 9, 2560, 777, 65]
APART = 0.02  # of a result, by the norm: two right bf16 kernels differ by less than 0.01
SCALE = 192**-0.5


def load(path: Path, name: str) -> ModuleType:
    """A copy of SGLang's file over whatever is named flash_mla now."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def interfaces(path: Path, has_peer: bool) -> dict[str, ModuleType]:
    """By library."""
    found = {}
    if has_peer:
        found["sgl-flash-mla"] = load(path, "over_theirs")
        for name in [name for name in sys.modules if name.split(".")[0] == "flash_mla"]:
            del sys.modules[name]
    os.environ["OPENMLA_SGLANG"] = "1"
    sglang.register()
    return found | {"openmla": load(path, "over_ours")}


class Step:
    """What SGLang's backend holds: a paged cache, a table cut from a wider buffer, lengths that change in place."""

    def __init__(self, device: torch.device, h_q: int, s_q: int) -> None:
        draw = torch.Generator(device).manual_seed(h_q + s_q)
        self.q = torch.randn(BATCH, s_q, h_q, 576, generator=draw, device=device).bfloat16()
        pages = BATCH * WIDEST
        self.rows = torch.randn(pages * PAGE, 1, 576, generator=draw, device=device).bfloat16()
        self.lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=device)
        wide = torch.full((BATCH + 2, 4 * WIDEST), -1, dtype=torch.int32, device=device)
        order = torch.randperm(pages, generator=torch.Generator().manual_seed(1)).view(BATCH, WIDEST)
        for row, length in enumerate(self.lengths.tolist()):
            used = -(-length // PAGE)
            wide[row, :used] = order[row, :used].to(device, torch.int32)
        self.table = wide[:BATCH, :WIDEST]


class Call:
    """Dense decode of a layer, as FlashMLABackend.forward_decode has it; layers of a step share schedule tensors."""

    def __init__(
        self, interface: ModuleType, step: Step, is_fp8: bool, schedule: list[torch.Tensor] | None = None
    ) -> None:
        self.interface, self.step, self.q, self.cache = interface, step, step.q, step.rows.view(-1, PAGE, 1, 576)
        self.codes: dict[str, torch.Tensor] = {}
        if is_fp8:
            one = torch.ones(1, device=self.q.device)
            self.q, self.cache = self.q.to(torch.float8_e4m3fn), self.cache.to(torch.float8_e4m3fn)
            self.codes = {"descale_q": one, "descale_k": one}
        rows = self.q.shape[1] * self.q.shape[2]
        made = interface.get_mla_metadata(step.lengths, rows, 1, is_fp8_kvcache=is_fp8)
        self.schedule = schedule or [x.clone() for x in made]

    def __call__(self) -> tuple[torch.Tensor, ...]:
        found: tuple[torch.Tensor, ...] = self.interface.flash_mla_with_kvcache(
            q=self.q, k_cache=self.cache, block_table=self.step.table, cache_seqlens=self.step.lengths, head_dim_v=512,
            tile_scheduler_metadata=self.schedule[0], num_splits=self.schedule[1], softmax_scale=SCALE, causal=True,
            **self.codes,
        )  # fmt: skip
        return found


def sparse(interface: ModuleType, step: Step, cache: torch.Tensor, indices: torch.Tensor) -> Callable[[], Any]:
    """As dsa_backend._forward_flashmla_kv has it."""
    q = step.q[:, :1]
    made = interface.get_mla_metadata(
        cache_seqlens=step.lengths, num_q_tokens_per_head_k=q.shape[2], num_heads_k=1, num_heads_q=q.shape[2],
        is_fp8_kvcache=True, topk=indices.shape[-1],
    )  # fmt: skip
    return lambda: interface.flash_mla_with_kvcache(
        q=q, k_cache=cache, cache_seqlens=step.lengths, head_dim_v=512, tile_scheduler_metadata=made[0],
        num_splits=made[1], softmax_scale=SCALE, indices=indices, is_fp8_kvcache=True, kv_format=None,
        block_table=torch.empty((BATCH, 0), dtype=torch.int32, device=q.device),
    )  # fmt: skip


def golden(step: Step) -> tuple[torch.Tensor, ...]:
    """Dense decode by the oracle, fp64."""
    table = step.table.clamp(min=0).contiguous()
    found = attention.decode(
        step.q, step.rows.view(-1, PAGE, 1, 576), table, step.lengths, d_v=512, softmax_scale=SCALE, is_causal=True
    )
    return found.out, found.lse


def apart(got: tuple[Any, ...], want: tuple[Any, ...]) -> float:
    """The largest of: out by the norm, every other result (natural or base-2 logarithms) by its largest difference.

    Equal infinities (a query that sees no key) are no difference; anything else that is not finite is infinitely apart.
    """
    found = [float((got[0].double() - want[0].double()).norm() / want[0].double().norm())]
    for a, b in zip(got[1:], want[1:], strict=True):
        found.append(float(torch.where(a == b, 0.0, (a.double() - b.double()).abs()).max()))
    return max(found) if all(map(math.isfinite, found)) else math.inf


def cases(found: dict[str, ModuleType], device: torch.device) -> Iterator[tuple[str, Callable[[], float]]]:
    """Name, and how far apart results are."""
    ours, theirs = found["openmla"], found.get("sgl-flash-mla")
    for h_q, s_q in ((16, 1), (128, 1), (128, 2), (16, 4), (128, 4)):
        step = Step(device, h_q, s_q)
        yield (
            f"dense bf16 h_q {h_q} s_q {s_q}, oracle",
            lambda step=step: apart(Call(ours, step, False)(), golden(step)),
        )
        if theirs is None:
            continue
        for is_fp8 in (False, True):
            name = f"dense {'e4m3' if is_fp8 else 'bf16'} h_q {h_q} s_q {s_q}"
            yield name, lambda step=step, f8=is_fp8: apart(Call(ours, step, f8)(), Call(theirs, step, f8)())
        yield f"dense bf16 h_q {h_q} s_q {s_q}, replayed", lambda step=step: replayed(ours, theirs, step)
    for h_q in (64, 128) if theirs is not None else ():
        yield f"sparse fp8_656 h_q {h_q}", lambda h_q=h_q: sparse_apart(found, device, h_q)
        yield f"sparse prefill h_q {h_q}", lambda h_q=h_q: prefill_apart(found, device, h_q)


def replayed(ours: ModuleType, theirs: ModuleType, step: Step) -> float:
    """A step of three layers that share schedule tensors, captured twice, as of two batch sizes; each graph replayed in turn
    after the lengths have changed in place."""
    pools = [step.rows, *(torch.randn_like(step.rows) for _ in range(2))]
    calls = layers(ours, step, pools)
    graphs = []
    for _ in range(2):
        for call in calls:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            graphs.append((graph, [call() for call in calls]))
    worst = 0.0
    for turn in 2 * [[1, 64, 3, 1024, 600, 2], LENGTHS, [33, 1500, 2, 7, 128, 65]]:  # none longer than its pages
        step.lengths.copy_(torch.tensor(turn, dtype=torch.int32))
        wants = [call() for call in layers(theirs, step, pools)]
        for graph, found in graphs:
            for out, _ in found:
                out.fill_(torch.nan)
            graph.replay()
            worst = max(worst, *(apart(got, want) for got, want in zip(found, wants, strict=True)))
    return worst


def layers(interface: ModuleType, step: Step, pools: list[torch.Tensor], is_shared: bool = True) -> list[Call]:
    """Calls over a cache each, and over one schedule, or one each."""
    made: list[Call] = []
    for pool in pools:
        step.rows = pool
        made.append(Call(interface, step, False, made[0].schedule if made and is_shared else None))
    return made


def sparse_apart(found: dict[str, ModuleType], device: torch.device, h_q: int) -> float:
    """V3.2's decode over FP8 rows, -1 among the indices."""
    step = Step(device, h_q, 1)
    cache = torch.zeros(BATCH * WIDEST, PAGE, 1, 656, dtype=torch.uint8)
    write_rows(cache, "fp8_656", torch.arange(len(step.rows)), step.rows[:, 0].cpu().float())
    indices = torch.randint(0, len(step.rows), (BATCH, 1, 2048), generator=torch.Generator().manual_seed(2))
    indices[:, :, 1500:] = -1
    given = cache.to(device).view(torch.float8_e4m3fn), indices.to(device, torch.int32)
    return apart(*(sparse(found[name], step, *given)() for name in ("openmla", "sgl-flash-mla")))


def prefill_apart(found: dict[str, ModuleType], device: torch.device, h_q: int) -> float:
    """V3.2's prefill over bf16 rows; statistics in base 2."""
    step = Step(device, h_q, 1)
    q = step.q[:, 0].repeat(20, 1, 1)
    indices = torch.randint(0, 9000, (len(q), 1, 2048), generator=torch.Generator().manual_seed(3))
    given = q, step.rows[:9000], indices.to(device, torch.int32), SCALE
    return apart(*(found[name].flash_mla_sparse_fwd(*given) for name in ("openmla", "sgl-flash-mla")))


def judged(found: dict[str, ModuleType], device: torch.device) -> Iterator[dict[str, Any]]:
    """A row per case."""
    for name, case in cases(found, device):
        row: dict[str, Any] = {"what": "sglang_interface", "case": name}
        try:
            found_apart = case()
            row["apart"] = round(found_apart, 6) if math.isfinite(found_apart) else None
            row["is_right"] = found_apart < APART
        except Exception as error:  # the next case is worth a look
            row |= {"is_right": False, "found": f"{type(error).__name__}: {error}"[:400]}
        yield row


def times(found: dict[str, ModuleType], device: torch.device) -> Iterator[dict[str, Any]]:
    """Microseconds per layer of a captured step, schedules made outside as SGLang does; libraries in turn."""
    count, pages_each = 20, 65
    ways = {name: (name, True) for name in found} | {"openmla, a plan per layer": ("openmla", False)}
    for batch, h_q in ((64, 16), (64, 128), (8, 16), (8, 128)):
        step = Step(device, h_q, 1)
        step.q = torch.randn(batch, 1, h_q, 576, device=device).bfloat16()
        step.lengths = torch.full((batch,), 4096, dtype=torch.int32, device=device)
        step.table = torch.randperm(batch * pages_each, device=device).to(torch.int32).view(batch, pages_each)
        shape = (batch * pages_each * PAGE, 1, 576)
        pools = [torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(4 if batch == 64 else count)]
        graphs, kept = {}, []
        for way, (name, is_shared) in ways.items():  # caches that the L2 cannot hold, in turn
            calls = layers(found[name], step, [pools[layer % len(pools)] for layer in range(count)], is_shared)
            kept.append(calls)  # a graph of the peer reads their schedules: freed, it reads whatever came to lie there
            calls[0]()
            torch.cuda.synchronize()
            graphs[way] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[way]):
                for call in calls:
                    call()
        took: dict[str, list[float]] = {way: [] for way in graphs}
        for _ in range(12):
            for way, graph in graphs.items():
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                graph.replay()
                end.record()
                end.synchronize()
                took[way].append(begin.elapsed_time(end) * 1e3 / count)
        median = {way: round(statistics.median(each[2:]), 2) for way, each in took.items()}
        row = {"what": "sglang_interface_times", "batch": batch, "h_q": h_q, "s_k": 4096, "layers": count}
        yield row | {"median_us_per_layer": median}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interface", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--times", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device, wrong = torch.device(options.device), 0
    has_peer = device.type == "cuda" and importlib.util.find_spec("flash_mla") is not None
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    beside = {"beside": "sgl-flash-mla" if has_peer else "oracle", "device": machine}
    found = interfaces(options.interface, has_peer)
    for row in times(found, device) if options.times else judged(found, device):
        text = json.dumps(row | beside)
        print(text, flush=True)
        if options.out:
            with options.out.open("a") as file:
                file.write(text + "\n")
        wrong += row.get("is_right") is False
    print(f"{wrong} wrong", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
