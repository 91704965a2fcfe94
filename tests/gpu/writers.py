"""The cache writers on a GPU: every byte against the reference, then timing beside a copy of as many bytes.

    python tests/gpu/writers.py gate [--out writers.jsonl]       every layout, RoPE, number, hostile slots
    python tests/gpu/writers.py times [--out writers.jsonl]      beside a copy and the portable writer, in turn, cold L2
    python tests/gpu/writers.py gate --device cpu                the script itself, without a GPU

With a bundle (OPENMLA_AOT_DIR) or the DSL. `gate` asks for the backend by name, which never falls back. One JSON line per item;
exit status 0 when all passed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import openmla
from openmla.core.faults import Fault
from openmla.core.layout import BYTE_LAYOUT_NAMES, kv_layout
from openmla.mods import Rope
from openmla.ops.append import append
from openmla.reference import quant

LAYOUTS = (*BYTE_LAYOUT_NAMES, "bf16_576", "bf16_512")
HOSTILE = (-2, -(2**31), 2**31 - 1, -(2**40), 2**40, 2**40 + 3, 2**32 - 1, -(2**32) + 3)
PAGE_SIZE = 61
ROUNDS = 24


# ---------------------------------------------------------------------- numbers


def bf16_numbers(first: int, last: int) -> torch.Tensor:
    """The positive bf16 numbers of these bit patterns, fp32."""
    return torch.arange(first, last, dtype=torch.int16).view(torch.bfloat16).float()


def groups_of(values: torch.Tensor, peak: float, size: int) -> torch.Tensor:
    """Groups of `size` that begin with `peak` and go on with all of `values`."""
    rest = size - 1
    padded = torch.cat([values, values.new_zeros(-len(values) % rest)]).view(-1, rest)
    return torch.cat([padded.new_full((len(padded), 1), peak), padded], 1)


def e4m3_groups(size: int, scales: tuple[float, ...]) -> torch.Tensor:
    """All bf16 numbers of 29 binades up to 448 and both signs, beside the largest of a group, at some scales."""
    sizes = bf16_numbers(0x3F80 - 20 * 128, 0x3F80 + 9 * 128)
    sizes = sizes[sizes <= 448]
    return torch.cat([groups_of(torch.cat([sizes, -sizes]) * scale, 448 * scale, size) for scale in scales])


def e2m1_groups(codes: range) -> torch.Tensor:
    """For scales of these codes: all bf16 numbers from a 32nd of it to 6 times it, both signs, ties among them."""
    sizes, made = bf16_numbers(0, 0x7F80), []
    for code in codes:
        scale = float(torch.tensor(code, dtype=torch.uint8).view(torch.float8_e4m3fn).float())
        near = sizes[(sizes >= scale / 32) & (sizes <= 6 * scale)]
        made.append(groups_of(torch.cat([near, -near]), 6 * scale, 16))
    return torch.cat(made)


def peak_groups(size: int, first: int = 0, last: int = 0x7F80) -> torch.Tensor:
    """Every finite bf16 number of these bit patterns as the largest of a group."""
    return bf16_numbers(first, last)[:, None] * torch.tensor([1.0, -0.3] + [0.0] * (size - 2))


def rows_of(layout: str, groups: torch.Tensor) -> torch.Tensor:
    """Tokens that these groups of columns fill, [n, d_qk] bf16."""
    stored, flat = kv_layout(layout), groups.flatten()
    rows = torch.cat([flat, flat.new_zeros(-len(flat) % stored.d_quant)]).view(-1, stored.d_quant)
    return torch.cat([rows, rows.new_zeros(len(rows), stored.d_qk - stored.d_quant)], 1).to(torch.bfloat16)


def numbers(layout: str) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, rows) that show every code and every scale of a layout."""
    stored = kv_layout(layout)
    if stored.data_format == "e2m1":
        yield "every quotient by every scale", rows_of(layout, e2m1_groups(range(1, 127)))
    elif stored.data_format == "e4m3":
        scales = (1.0, 2.0**-13, 2.0**7, 2.0**-5, 2.0**90)
        yield "every number at five scales", rows_of(layout, e4m3_groups(stored.scale_group, scales))
    if stored.is_quantised:
        yield "every largest magnitude", rows_of(layout, peak_groups(stored.scale_group))


# ---------------------------------------------------------------------- the gate


def poisoned(layout: str, pages: int, page_size: int = PAGE_SIZE) -> torch.Tensor:
    """A cache whose every byte, page padding included, is 0xA5; pages lie apart where the layout lets them."""
    stored = kv_layout(layout)
    cache = stored.empty_cache(pages, page_size)
    if stored.is_quantised and stored.page_align_bytes == 1:
        wide = torch.empty(pages, page_size * stored.bytes_per_token + 48, dtype=torch.uint8)
        cache = wide.as_strided(cache.shape, (wide.shape[1], *cache.stride()[1:]))
    bytes_of(cache).fill_(0xA5)
    return cache


def bytes_of(cache: torch.Tensor) -> torch.Tensor:
    """All bytes of a cache's storage."""
    return torch.empty(0, dtype=torch.uint8, device=cache.device).set_(cache.untyped_storage())


def moved(cache: torch.Tensor, device: str) -> torch.Tensor:
    """A cache, padding included, on a device."""
    there = bytes_of(cache).to(device).view(cache.dtype)
    return there.as_strided(cache.shape, cache.stride())


def judge(
    layout: str, rows: torch.Tensor, slots: torch.Tensor, device: str, backend: str, rope: Rope | None = None,
    positions: torch.Tensor | None = None, faults: tuple[Fault, ...] = (),
) -> int:  # fmt: skip
    """Tokens of one call, four times; raises where a byte differs, or the faults do."""
    num_slots = int(slots.max().clamp(0, 4 * len(slots))) + 1
    pages = -(-max(num_slots, len(slots)) // PAGE_SIZE)
    expected = poisoned(layout, pages)
    cache = moved(expected, device)
    turned = rows
    if rope is not None and positions is not None:
        turned = rope.rotated(rows[:, None], rows.shape[1] - 64, positions)[:, 0]
    stays = (slots >= 0) & (slots < pages * PAGE_SIZE)
    quant.write_rows(expected, layout, slots.masked_fill(~stays, -1).long(), turned)
    there = None if rope is None else Rope(rope.cos.to(device), rope.sin.to(device), rope.is_interleaved)
    given, wanted = (cache, slots.to(device), rows.to(device)), bytes_of(expected).to(device)
    places = None if positions is None else positions.to(device)
    for _ in range(4):
        append(*given, kv_layout=layout, rope=there, positions=places, backend=backend)
        differ = int((bytes_of(cache) != wanted).sum())
        assert differ == 0, f"{differ} bytes differ"
        found = openmla.check_errors()
        assert found == faults, found
    return len(rows)


def gate(device: str, backend: str) -> Iterator[tuple[str, Callable[[], int]]]:
    """(name, what to run) of every item."""
    picks = torch.Generator().manual_seed(0)
    # A device may round a NaN to another pattern, and a group that is not finite has free bytes: neither is compared here.
    for layout in LAYOUTS:
        d_qk = kv_layout(layout).d_qk
        for kind in ("", "pairs", "halves"):
            for count in (1, 3, 130, 3001):
                rows = torch.randn(count, d_qk, generator=picks) * torch.exp2(torch.arange(count) % 30 - 15.0)[:, None]
                slots = torch.randperm(2 * count, generator=picks)[:count]
                slots[1::7] = -1
                slots = slots.to(torch.int32 if count == 130 else torch.int64)
                rope = Rope.of_base(64, 4000, is_interleaved=kind == "pairs") if kind else None
                places = torch.randint(-3, 4000, (count,), generator=picks).to(
                    torch.int32 if count == 3 else torch.int64
                )
                given = (layout, rows.to(torch.bfloat16), slots, device, backend, rope, places if kind else None)
                yield f"{layout} {kind} {count}", lambda given=given: judge(*given)
        for name, rows in numbers(layout):
            given = (layout, rows, torch.arange(len(rows)), device, backend)
            yield f"{layout} {name}", lambda given=given: judge(*given)
        for bad in HOSTILE if device != "cpu" else ():  # the torch backend raises
            rows, slots = torch.randn(9, d_qk, generator=picks).bfloat16(), torch.arange(9)
            slots[[1, 6]] = bad
            given = (layout, rows, slots, device, backend, None, None, (Fault.INDEX_OUT_OF_RANGE,))
            yield f"{layout} slot {bad}", lambda given=given: judge(*given)


# ---------------------------------------------------------------------- timing


def contenders(layout: str, count: int, pages: int, backends: list[str]) -> dict[str, Callable[[], object]]:
    """A copy of as many bytes, and each writer: `count` tokens, whole pages in random order or any slots."""
    stored = kv_layout(layout)
    rows = torch.randn(count, stored.d_qk, device="cuda").bfloat16()
    slots = torch.randperm(pages * 64, device="cuda")[:count]
    if count >= 64:
        slots = (
            torch.randperm(pages, device="cuda")[: count // 64, None] * 64 + torch.arange(64, device="cuda")
        ).flatten()
    cache = stored.empty_cache(pages, 64, device="cuda")
    rope, places = Rope.of_base(64, 4096, device="cuda"), torch.arange(count, device="cuda") % 4096
    half = count * (2 * stored.d_qk + stored.bytes_per_token) // 2
    source, target = (torch.empty(half, dtype=torch.uint8, device="cuda") for _ in range(2))
    runs: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source)}
    for backend in backends:
        for name, how in (("", {}), (" rope", {"rope": rope, "positions": places})):
            runs[backend + name] = lambda b=backend, h=how: append(cache, slots, rows, kv_layout=layout, backend=b, **h)
    return runs


def times(runs: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Microseconds of each, in turn, the order rotating, L2 full of other lines."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    clean = torch.ones(64 << 20, dtype=torch.int32, device="cuda")
    for run in runs.values():
        run()
    found: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(ROUNDS):
        events = []
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            flush.zero_()
            clean.max()  # and none of them dirty
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            runs[name]()
            end.record()
            events.append((name, begin, end))
        torch.cuda.synchronize()
        for name, begin, end in events:
            found[name].append(begin.elapsed_time(end) * 1e3)
    return found


def timed(out: Path | None, backends: list[str]) -> None:
    """Every layout in three sizes."""
    common = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    for count in (65536, 8192, 128):
        for layout in LAYOUTS:
            found = times(contenders(layout, count, 2 * max(count // 64, 64), backends))
            copy = statistics.median(found["copy"])
            for name, each in found.items():
                median = statistics.median(each)
                row = {
                    **common, "case": f"append {layout} tokens {count}", "kernel": name, "median_us": round(median, 2),
                    "min_us": round(min(each), 2), "max_us": round(max(each), 2), "of_copy": round(copy / median, 3),
                }  # fmt: skip
                if out:
                    with out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
            shares = {name: round(copy / statistics.median(each), 3) for name, each in found.items() if name != "copy"}
            print(f"{layout:11s} {count:6d} copy {copy:6.1f} us {shares}", flush=True)


def main() -> int:
    """Run a section; print what failed and how many passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=("gate", "times"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--backends", nargs="+", default=["cute", "triton"], help="of `times`; beside these stands copy"
    )
    given = parser.parse_args()
    if given.section == "times":
        timed(given.out, given.backends)
        return 0
    passed = total = 0
    for name, run in gate(given.device, "torch" if given.device == "cpu" else "cute"):
        row = {"section": "writers", "item": name, "passed": True}
        try:
            row["tokens"] = run()
        except Exception as error:  # each item says for itself whether it passed
            row |= {"passed": False, "error": f"{type(error).__name__}: {error}"[:400]}
            print("FAIL", name, row["error"], flush=True)
        row["gpu"] = torch.cuda.get_device_name() if given.device != "cpu" else "cpu"
        passed, total = passed + bool(row["passed"]), total + 1
        if given.out:
            with given.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    print(f"writers: {passed} of {total} passed", flush=True)
    return 0 if passed == total else 1


if __name__ == "__main__":
    raise SystemExit(main())
