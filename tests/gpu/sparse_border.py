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
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import openmla
from openmla import flash_mla
from openmla.core.layout import kv_layout
from openmla.reference import attention, quant
from openmla.testing import budget

SECTIONS = ("hostile", "shapes")
SECONDS = 60.0  # of one process
TOKENS, VICTIM, TOPK, HEADS = 6, 2, 200, 72  # neither whole tiles nor whole blocks of heads
PAGES, PAGE_SIZE = 7, 61
SLOTS = PAGES * PAGE_SIZE
DECODED = ("fp8_656", "fp8_584", "fp8_528", "fp8_528_mx", "bf16_576")


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


def calls(device: str, backend: str) -> Iterator[tuple[str, torch.Tensor, Any, Any]]:
    """(name, indices, call of them, oracle of them): every operation and layout, made from fixed seeds."""
    picks = torch.Generator().manual_seed(1)
    good = torch.randint(0, SLOTS, (TOKENS, TOPK), generator=picks, dtype=torch.int32)
    for name in DECODED:
        layout = kv_layout(name)
        content = torch.randn(PAGES, PAGE_SIZE, 1, layout.d_qk, generator=picks).bfloat16()
        cache = layout.empty_cache(PAGES, PAGE_SIZE)
        quant.write_rows(cache, layout, torch.arange(SLOTS), content.flatten(0, 2))
        there = layout.empty_cache(PAGES, PAGE_SIZE, device=device)
        there.copy_(cache)
        q = torch.randn(TOKENS, 1, HEADS, layout.d_qk, generator=picks).bfloat16()
        q_there = q.to(device)

        def decode(indices, q=q_there, cache=there, name=name):
            return openmla.sparse_decode(
                q, cache, indices[:, None], kv_layout=name, softmax_scale=0.05, backend=backend
            )

        def golden(indices, q=q, cache=cache, name=name):
            return attention.sparse_decode(
                q, cache, indices[:, None], softmax_scale=0.05, d_v=512, layout=name, with_bounds=True
            )

        yield f"sparse_decode {name}", good, decode, golden
    for d_qk in (576, 512):
        kv = torch.randn(SLOTS, 1, d_qk, generator=picks).bfloat16()
        q = torch.randn(TOKENS, HEADS, d_qk, generator=picks).bfloat16()
        q_there, kv_there = q.to(device), kv.to(device)

        def prefill(indices, q=q_there, kv=kv_there):
            out, _, lse = openmla.sparse_prefill(q, kv, indices[:, None], softmax_scale=0.05, backend=backend)
            return out, lse

        def expected(indices, q=q, kv=kv):
            return attention.sparse_prefill(q, kv, indices[:, None], softmax_scale=0.05, d_v=512, with_bounds=True)

        yield f"sparse_prefill {d_qk}", good, prefill, expected


def attack(pattern: int, device: str, backend: str) -> dict[str, Any]:
    """One pattern in every operation and layout; raises where a promise is broken."""
    ran = []
    for name, good, call, golden in calls(device, backend):
        places = wrong_places(pattern // 8)
        bad = good.clone()
        bad[VICTIM, places] = wrong_values(pattern % 8, len(places))
        try:
            before, _ = call(good.to(device))
        except openmla.UnsupportedError as error:
            ran.append(f"{name} refused: {next(iter(error.reasons.values()), '')}")
            continue
        assert openmla.check_errors() == (), name
        before = before.cpu()
        out, lse = call(bad.to(device))
        faults = openmla.check_errors()
        assert [fault.name for fault in faults] == ["INDEX_OUT_OF_RANGE"], f"{name}: {faults}"
        out = out.cpu()
        others = torch.arange(TOKENS) != VICTIM
        assert torch.equal(before[others].view(torch.int16), out[others].view(torch.int16)), f"{name}: other rows"
        absent = bad.masked_fill((bad < 0) | (bad >= SLOTS), -1)
        budget.check(out, lse.cpu(), golden(absent), dtype=torch.bfloat16).require()
        ran.append(name)
    assert sum("refused" not in each for each in ran), ran
    return {"ran": ran}


def hostile(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The patterns, a process each."""

    def one(pattern: int) -> dict[str, Any]:
        command = [sys.executable, __file__, "--pattern", str(pattern), "--device", given.device]
        begin = time.time()
        try:
            found = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
            status, text = found.returncode, found.stderr + found.stdout
        except subprocess.TimeoutExpired as error:
            status, text = -1, f"no end after {SECONDS} s: {error.stdout!r}"[-500:]
        row = {"section": "hostile", "item": f"pattern {pattern}", "passed": status == 0, "status": status}
        last = text.strip().splitlines()[-1:] or [""]
        shown = json.loads(last[0]) if status == 0 else {"error": text[-800:]}
        return row | shown | {"seconds": round(time.time() - begin, 1)}

    patterns = range(64) if not given.quick else (0, 63)
    with ThreadPoolExecutor(given.jobs) as pool:
        yield from pool.map(one, patterns)


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
    """Every shape, one after the other."""
    backend = backend_of(given.device)
    for op, judge, wanted in (
        ("sparse_decode", judge_decode, decode_shapes), ("sparse_prefill", judge_prefill, prefill_shapes),
    ):  # fmt: skip
        for shape in wanted(given.quick):
            row = {"section": "shapes", "item": op, "shape": shape, "passed": True}
            try:
                judge(shape, given.device, backend)
                assert openmla.check_errors() == ()
            except Exception as error:  # each shape says for itself whether it passed
                row |= {"passed": False, "error": f"{type(error).__name__}: {error}"[:400]}
            yield row


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
    parser.add_argument("--pattern", type=int, help="one pattern, here: what `hostile` starts")
    given = parser.parse_args()
    if given.pattern is not None:
        print(json.dumps(attack(given.pattern, given.device, backend_of(given.device))))
        return 0
    all_passed = True
    for section in given.sections or SECTIONS:
        passed = total = 0
        for row in {"hostile": hostile, "shapes": shapes}[section](given):
            row["gpu"] = torch.cuda.get_device_name() if given.device != "cpu" else "cpu"
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
