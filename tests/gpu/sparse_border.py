"""Sparse attention at its border on a GPU: indices that name nothing, and every shape that upstream's own tests send.

    python tests/gpu/sparse_border.py [hostile shapes] [--out sparse_border.jsonl] [--jobs 12]
    python tests/gpu/sparse_border.py --device cpu --quick                  the script itself, without a GPU

`hostile`: 64 patterns (eight sorts of wrong index in eight sets of places), each in a process of its own, each in every
operation and layout below: the process lives, the token with the wrong indices gets what the fp64 oracle gets without
them, the fault word names it, and all other tokens keep their bits. `shapes`: the calls of FlashMLA's sparse decode and
prefill tests (heads, lists, page sizes, second caches, lengths) through `openmla.flash_mla`, on the named backend, which
never falls back, against the oracle. One JSON line per item; exit status 0 when all passed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

# An import below asks whether there is a device; asked of the driver, nothing could be forked any more.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

import torch

import openmla
from openmla import flash_mla
from openmla.core.errors import UnsupportedError
from openmla.core.layout import kv_layout
from openmla.reference import attention, quant
from openmla.testing import budget

SECTIONS = ("hostile", "shapes")
SECONDS = 120.0  # of one process
SHARE = 24  # shapes of one process
TOKENS, VICTIM, TOPK, HEADS, FEW = 6, 2, 200, 72, 16  # neither whole tiles nor whole blocks of heads
PAGES, PAGE_SIZE = 7, 61
SLOTS = PAGES * PAGE_SIZE
DECODED = (
    *((name, HEADS) for name in ("fp8_656", "fp8_584", "fp8_528", "fp8_528_mx", "bf16_576")),
    *((name, FEW) for name in ("fp8_656", "fp8_528")),  # on Hopper another kernel, that of few heads
)


# ---------------------------------------------------------------------- wrong indices


def wrong_values(sort: int, count: int) -> torch.Tensor:
    """`count` indices that name nothing: one of eight sorts."""
    picks = torch.Generator().manual_seed(sort)
    low, high = -(2**31), 2**31 - 1
    constant = {0: -2, 1: low, 2: high, 3: SLOTS, 4: SLOTS + 63, 5: 1 << 30}
    if sort in constant:
        return torch.full((count,), constant[sort], dtype=torch.int32)
    if sort == 6:  # any bits that are not in the cache and not -1
        values = torch.randint(low, high, (count,), generator=picks)
        return torch.where((values >= -1) & (values < SLOTS), low + 1, values).to(torch.int32)
    ends = torch.tensor([low, low + 1, -SLOTS, -2, SLOTS, SLOTS + 1, high - 1, high])
    return ends[torch.randint(0, len(ends), (count,), generator=picks)].to(torch.int32)


def wrong_places(where: int) -> torch.Tensor:
    """Positions within a list: one of eight sets."""
    every = torch.arange(TOPK)
    return (
        every[:1], every[-1:], every[::64], every[64:128], every[:64], every[::2], every[TOPK // 64 * 64 :], every,
    )[where]  # fmt: skip


def good_indices() -> torch.Tensor:
    """Lists that name slots, the same in every process."""
    return torch.randint(0, SLOTS, (TOKENS, TOPK), generator=torch.Generator().manual_seed(1), dtype=torch.int32)


def calls() -> Iterator[tuple[str, tuple[torch.Tensor, ...], Any, Any]]:
    """(name, tensors, call of tensors and indices on a backend, oracle of indices): every operation and layout."""
    picks = torch.Generator().manual_seed(2)
    for name, heads in DECODED:
        layout = kv_layout(name)
        content = torch.randn(PAGES, PAGE_SIZE, 1, layout.d_qk, generator=picks).bfloat16()
        cache = layout.empty_cache(PAGES, PAGE_SIZE)
        quant.write_rows(cache, layout, torch.arange(SLOTS), content.flatten(0, 2))
        q = torch.randn(TOKENS, 1, heads, layout.d_qk, generator=picks).bfloat16()

        def decode(q, cache, indices, backend, layout=layout):
            there = layout.empty_cache(PAGES, PAGE_SIZE, device=q.device)
            there.copy_(cache)
            given = {"kv_layout": layout.name, "softmax_scale": 0.05, "backend": backend}
            return openmla.sparse_decode(q, there, indices[:, None], **given)

        def golden(indices, q=q, cache=cache, name=name):
            return attention.sparse_decode(
                q, cache, indices[:, None], softmax_scale=0.05, d_v=512, layout=name, with_bounds=True
            )

        yield f"sparse_decode {name} of {heads} heads", (q, cache), decode, golden
    for d_qk in (576, 512):
        kv = torch.randn(SLOTS, 1, d_qk, generator=picks).bfloat16()
        q = torch.randn(TOKENS, HEADS, d_qk, generator=picks).bfloat16()

        def prefill(q, kv, indices, backend):
            out, _, lse = openmla.sparse_prefill(q, kv, indices[:, None], softmax_scale=0.05, backend=backend)
            return out, lse

        def expected(indices, q=q, kv=kv):
            return attention.sparse_prefill(q, kv, indices[:, None], softmax_scale=0.05, d_v=512, with_bounds=True)

        yield f"sparse_prefill {d_qk}", (q, kv), prefill, expected


def made() -> list[tuple[str, tuple[torch.Tensor, ...], Any, list[attention.Attention]]]:
    """`calls` with what the oracle says for each set of places: computed once, inherited by the processes.

    So is what judging imports, which is three quarters of a process's work (sympy, for one index of a tensor).
    """
    absent = []
    for where in range(8):
        absent.append(good_indices())
        absent[where][VICTIM, wrong_places(where)] = -1
    ready = [(name, tensors, call, [golden(each) for each in absent]) for name, tensors, call, golden in calls()]
    for module in ("tvm_ffi", "openmla.backends.cute.gathered", "openmla.backends.cute.sparse"):
        if importlib.util.find_spec(module.partition(".")[0]):
            importlib.import_module(module)
    known = ready[0][3][0]
    budget.check(known.out.bfloat16(), known.lse.float(), known, dtype=torch.bfloat16).require()
    return ready


def attack(pattern: int, device: str, backend: str, prepared: list[Any]) -> dict[str, Any]:
    """One pattern in every operation and layout; raises where a promise is broken."""
    ran, begin = [], time.time()
    torch.zeros(1, device=device)
    ready = time.time()
    for name, tensors, call, goldens in prepared:
        places = wrong_places(pattern // 8)
        good = good_indices()
        bad = good.clone()
        bad[VICTIM, places] = wrong_values(pattern % 8, len(places))
        there = [each.to(device) for each in tensors]
        try:
            before, _ = call(*there, good.to(device), backend)
        except UnsupportedError as error:
            ran.append(f"{name} refused: {next(iter(error.reasons.values()), '')}")
            continue
        assert openmla.check_errors() == (), name
        before = before.cpu()
        out, lse = call(*there, bad.to(device), backend)
        faults = openmla.check_errors()
        assert [fault.name for fault in faults] == ["INDEX_OUT_OF_RANGE"], f"{name}: {faults}"
        out = out.cpu()
        others = torch.arange(TOKENS) != VICTIM
        assert torch.equal(before[others].view(torch.int16), out[others].view(torch.int16)), f"{name}: other rows"
        budget.check(out, lse.cpu(), goldens[pattern // 8], dtype=torch.bfloat16).require()
        ran.append(name)
    assert sum("refused" not in each for each in ran), ran
    return {"ran": ran, "device_seconds": round(ready - begin, 1), "call_seconds": round(time.time() - ready, 1)}


def in_a_process(work: Callable[[], list[dict[str, Any]]], seconds: float) -> tuple[int | None, list[dict[str, Any]]]:
    """(exit status, None where it was killed; its rows) of work in a process of its own, a fork of this one.

    This process has imported everything and never touches the device, so that a fork may: an import would take longer than
    all of the work.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def run() -> None:
        try:
            theirs.send(work())
        except Exception as error:
            theirs.send([{"passed": False, "error": f"{type(error).__name__}: {error}"[-800:]}])
            os._exit(1)
        os._exit(0)  # what this process inherited from threads of its parent is not its to end

    process = context.Process(target=run)
    process.start()
    theirs.close()
    rows: list[dict[str, Any]] = []
    is_late = not ours.poll(seconds)
    if is_late:
        process.kill()
    else:
        with contextlib.suppress(EOFError):  # it died without a word
            rows = ours.recv()
    process.join()  # without a limit: one would watch a pipe that a sibling forked at the same moment holds open
    return None if is_late else process.exitcode, rows


def hostile(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The patterns, a process each."""
    prepared = made()

    def one(pattern: int) -> dict[str, Any]:
        begin = time.time()
        status, found = in_a_process(
            lambda: [attack(pattern, given.device, backend_of(given.device), prepared) | device_name(given.device)],
            SECONDS,
        )
        row = {
            "section": "hostile",
            "item": f"pattern {pattern}",
            "passed": status == 0 and bool(found),
            "status": status,
        }
        row |= found[0] if found else {"error": "killed after its time" if status is None else "died without a word"}
        return row | {"seconds": round(time.time() - begin, 1)}

    patterns = range(64) if not given.quick else (0, 63)
    with ThreadPoolExecutor(given.jobs) as pool:
        for done in as_completed([pool.submit(one, pattern) for pattern in patterns]):
            yield done.result()


def device_name(device: str) -> dict[str, str]:
    """For a row; asked in the process that uses the device."""
    return {"gpu": torch.cuda.get_device_name() if device != "cpu" else "cpu"}


# ---------------------------------------------------------------------- the shapes of upstream's tests


def decode_shapes(quick: bool) -> Iterator[dict[str, Any]]:
    """What upstream's sparse decode test sends: (slots, list, page size), twice with a second cache."""
    lists = [
        (512, 64, 2), (512, 64, 64), (512, 64, 69), (1024, 576, 2), (1024, 576, 61), (2046, 2048, 2), (2046, 2048, 64),
        (2046, 2048, 576), (512, 64, 61), (650, 576, 53),
    ]  # fmt: skip
    batches = (4,) if quick else (4, 74)
    heads, many = ((64,), (1,)) if quick else ((64, 128), (1, 3))
    for (place, main), h_q, s_q, has_length in itertools.product(
        enumerate(lists[: 1 if quick else None]), heads, many, (False, True)
    ):
        for batch in batches if h_q == 64 and s_q == 1 else (4,):
            shape = {"batch": batch, "h_q": h_q, "s_q": s_q, "main": main, "has_length": has_length, "extra": None}
            yield shape | {"layout": "fp8_656"}
            yield shape | {"layout": "fp8_584"}
            for step, has_extra_length in ((0, False), (3, True)):
                extra = lists[(place + step) % len(lists)]
                yield shape | {"layout": "fp8_584", "extra": extra, "has_extra_length": has_extra_length}


def prefill_shapes(quick: bool) -> Iterator[dict[str, Any]]:
    """What upstream's sparse prefill test sends: (rows, list) and tokens; lists may be longer than the tensor."""
    sizes = [
        (128, 128), (256, 256), (512, 512), (592, 128), (1840, 256), (1592, 384), (1521, 512), (95, 128), (153, 256),
        (114, 384), (32, 2048), (64, 8192),
    ]  # fmt: skip
    heads, many = ((64,), (1,)) if quick else ((64, 128), (1, 62))
    for (rows, topk), d_qk, h_q, s_q in itertools.product(sizes[: 1 if quick else None], (576, 512), heads, many):
        for has_sink, has_length in ((False, False), (True, True)):
            yield {
                "rows": rows, "topk": topk, "d_qk": d_qk, "h_q": h_q, "s_q": s_q if topk < 2048 else 3,
                "has_sink": has_sink, "has_length": has_length,
            }  # fmt: skip


def cache_of(layout: str, slots: int, page_size: int, picks: torch.Generator, device: str) -> torch.Tensor:
    """A cache of at least `slots` slots, filled."""
    stored, pages = kv_layout(layout), -(-slots // page_size)
    cache = stored.empty_cache(pages, page_size, device=device)
    content = torch.randn(pages * page_size, stored.d_qk, generator=picks, device=device).bfloat16()
    quant.write_rows(cache, layout, torch.arange(pages * page_size, device=device), content)
    return cache


def listed(lead: tuple[int, ...], topk: int, slots: int, picks: torch.Generator, device: str) -> torch.Tensor:
    """Lists with every twentieth index absent."""
    indices = torch.randint(0, slots, (*lead, topk), generator=picks, dtype=torch.int32, device=device)
    return indices.masked_fill(torch.rand(indices.shape, generator=picks, device=device) < 0.05, -1)


def judge_decode(shape: dict[str, Any], device: str, backend: str) -> None:
    """One sparse decode call of the compatible interface against the oracle."""
    picks = torch.Generator(device).manual_seed(0)
    layout, batch, s_q, h_q = kv_layout(shape["layout"]), shape["batch"], shape["s_q"], shape["h_q"]
    q = torch.randn(batch, s_q, h_q, layout.d_qk, generator=picks, device=device).bfloat16()
    sink = torch.randn(h_q, generator=picks, device=device)

    def side(slots: int, topk: int, page_size: int, has_length: bool) -> tuple[Any, Any, Any]:
        cache = cache_of(layout.name, slots, page_size, picks, device)
        length = torch.randint(0, topk + 1, (batch,), generator=picks, device=device, dtype=torch.int32)
        return cache, listed((batch, s_q), topk, slots, picks, device), length if has_length else None

    cache, indices, length = side(*shape["main"], shape["has_length"])
    extra = side(*shape["extra"], shape["has_extra_length"]) if shape["extra"] else (None, None, None)
    meta, _ = flash_mla.get_mla_metadata()
    out, lse = flash_mla.flash_mla_with_kvcache(
        q, cache, None, None, 512, meta, None, layout.d_qk**-0.5, False, True, indices, sink, extra[0], extra[1],
        length, extra[2], backend=backend,
    )  # fmt: skip
    golden = attention.sparse_decode(
        q, cache, indices, softmax_scale=layout.d_qk**-0.5, d_v=512, layout=layout, topk_length=length, attn_sink=sink,
        extra_kv_cache=extra[0], extra_indices=extra[1], extra_topk_length=extra[2],
        extra_layout=layout if shape["extra"] else None, with_bounds=True,
    )  # fmt: skip
    budget.check(out, lse.masked_fill(lse == torch.inf, -torch.inf), golden, dtype=torch.bfloat16).require()


def judge_prefill(shape: dict[str, Any], device: str, backend: str) -> None:
    """One sparse prefill call of the compatible interface against the oracle."""
    picks = torch.Generator(device).manual_seed(0)
    q = torch.randn(shape["s_q"], shape["h_q"], shape["d_qk"], generator=picks, device=device).bfloat16()
    kv = torch.randn(shape["rows"], 1, shape["d_qk"], generator=picks, device=device).bfloat16()
    indices = listed((shape["s_q"], 1), shape["topk"], shape["rows"], picks, device)
    sink = torch.randn(shape["h_q"], generator=picks, device=device) if shape["has_sink"] else None
    length = None
    if shape["has_length"]:
        length = torch.randint(0, shape["topk"] + 1, (shape["s_q"],), generator=picks, device=device, dtype=torch.int32)
    scale = shape["d_qk"] ** -0.5
    out, largest, lse = flash_mla.flash_mla_sparse_fwd(
        q, kv, indices, scale, 512, attn_sink=sink, topk_length=length, backend=backend
    )
    golden = attention.sparse_prefill(
        q, kv, indices, softmax_scale=scale, d_v=512, topk_length=length, attn_sink=sink, with_bounds=True
    )
    lse = lse.masked_fill(lse == torch.inf, -torch.inf)
    budget.check(out, lse, golden, dtype=torch.bfloat16, max_logits=largest).require()


def shapes(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every shape; each process takes every eighth batch of them and says what became of each."""
    backend = backend_of(given.device)
    every = [("sparse_decode", shape) for shape in decode_shapes(given.quick)]
    every += [("sparse_prefill", shape) for shape in prefill_shapes(given.quick)]

    def judged(share: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
        rows = []
        for op, shape in share:
            row: dict[str, Any] = {"section": "shapes", "item": op, "shape": shape, "passed": True}
            try:
                (judge_decode if op == "sparse_decode" else judge_prefill)(shape, given.device, backend)
                assert openmla.check_errors() == ()
            except Exception as error:  # each shape says for itself whether it passed
                row |= {"passed": False, "error": f"{type(error).__name__}: {error}"[:400]}
            rows.append(row | device_name(given.device))
        return rows

    def one(share: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
        status, rows = in_a_process(lambda: judged(share), SECONDS)
        lost = [
            {"section": "shapes", "item": op, "shape": s, "passed": False, "error": f"status {status}"}
            for op, s in share
        ]
        return rows if len(rows) == len(share) else lost

    shares = [every[first : first + SHARE] for first in range(0, len(every), SHARE)]
    with ThreadPoolExecutor(given.jobs) as pool:
        for rows in pool.map(one, shares):
            yield from rows


def backend_of(device: str) -> str:
    """The named backend, which never falls back."""
    return "cute" if device != "cpu" else "torch"


def main() -> int:
    """Run the sections; print what failed and how many passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--jobs", type=int, default=12)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="a few items of each section")
    given = parser.parse_args()
    torch.set_num_threads(1)  # many processes; and a pool of threads does not survive a fork
    all_passed = True
    for section in given.sections or SECTIONS:
        passed = total = 0
        for row in {"hostile": hostile, "shapes": shapes}[section](given):
            passed, total = passed + row["passed"], total + 1
            if not row["passed"]:
                print("FAIL", json.dumps(row)[:1500], flush=True)
            if given.out:
                with given.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
        print(f"{section}: {passed} of {total} passed", flush=True)
        all_passed &= passed == total
    return 0 if all_passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
