"""What is left to show for the Triton backend on a GPU: mods in decode, varlen prefill with gradients, cache append.

    python tests/gpu/portable.py [mods prefill append times] [--out portable.jsonl]
    TRITON_INTERPRET=1 python tests/gpu/portable.py --device cpu          the script itself, without a GPU

Each section is a process of its own and at most `--seconds` long. Correctness is the tolerance rule against the fp64
oracle (append: equal bytes; gradients: autograd in fp64); `times` runs behind it and compares decode with and without
mods, and times the first call of a mod that no cache has seen. One JSON line per item; exit status 0 when all passed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import openmla
from openmla import mods
from openmla.core.layout import BYTE_LAYOUT_NAMES, kv_layout
from openmla.mods import Rope, m, score_mod
from openmla.reference import attention, quant
from openmla.testing import budget
from openmla.testing.cases import Case, native_arguments
from openmla.testing.mod_cases import library_cases

SECTIONS = ("mods", "prefill", "append", "times")
Item = tuple[str, Callable[[], dict[str, Any]]]


def to(device: str, given: Any) -> Any:
    """Tensors, dicts, mods and lists of them on that device."""
    if isinstance(given, torch.Tensor):
        return given.to(device)
    if isinstance(given, dict):
        return {name: to(device, value) for name, value in given.items()}
    if isinstance(given, list):
        return [to(device, value) for value in given]
    if isinstance(given, mods.Mod) and given.given:
        return given.aux(**to(device, dict(given.given)))
    if isinstance(given, Rope):
        return Rope(given.cos.to(device), given.sin.to(device), given.is_interleaved)
    return given


def section_mods(device: str) -> Iterator[Item]:
    """Every mod of the library, both tiles of Hopper, whole and split, one and two tokens."""
    is_gpu = device != "cpu"
    sizes = {"d_qk": 576, "d_v": 512} if is_gpu else {"d_qk": 40, "d_v": 32}
    for h_q in (128, 16) if is_gpu else (4,):
        base = Case(
            op="decode", seed=3, family="unit", dtype=torch.bfloat16 if is_gpu else torch.float16, h_q=h_q, h_kv=1,
            softmax_scale=0.1, seqlens_q=(2, 2, 2), seqlens_k=(900 if is_gpu else 90, 0, 33), is_causal=True,
            page_size=64 if is_gpu else 16, **sizes,
        )  # fmt: skip
        capacity = 64 * 20
        library = library_cases(h_q=h_q, capacity=capacity, d_rope=sizes["d_qk"] - sizes["d_v"])
        for name, given in library.items():
            for layout in ("", "fp8_656") if is_gpu else ("",):
                case = dataclasses.replace(base, layout=layout)
                yield f"{name} h_q={h_q} {layout}", lambda case=case, given=given: judge_decode(case, given, device)


def judge_decode(case: Case, given: Any, device: str) -> dict[str, Any]:
    operands = case.tensors()
    arguments = to(device, native_arguments("decode", operands))
    out, lse = openmla.decode(**arguments, mods=to(device, given), backend="triton")
    again, _ = openmla.decode(**arguments, mods=to(device, given), backend="triton")
    golden = attention.decode(**operands, mods=given, precision="fp64", with_bounds=True)
    report = budget.check(out.cpu(), lse.cpu(), golden, dtype=case.dtype)
    report.require()
    assert torch.equal(out.nan_to_num(), again.nan_to_num()), "another result from the same input"
    return {"worst": max(finding.ratio for finding in report.findings)}


def section_prefill(device: str) -> Iterator[Item]:
    """Both shapes of DeepSeek, causal and not, forward, gradients and the same bits twice."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if device != "cpu" else (torch.float16,)
    lengths = ((150, 1, 70), (300, 5, 70)) if device != "cpu" else ((20, 1), (20, 7))
    for d_qk in (192, 128):
        for is_causal in (True, False):
            for dtype in dtypes:
                case = Case(
                    op="prefill", seed=5, family="unit", dtype=dtype, h_q=4, h_kv=2, d_qk=d_qk, d_v=128,
                    softmax_scale=d_qk**-0.5, seqlens_q=lengths[0], seqlens_k=lengths[1], is_causal=is_causal,
                    is_varlen=True,
                )  # fmt: skip
                name = f"{d_qk}/128 {'causal' if is_causal else 'full'} {str(dtype).removeprefix('torch.')}"
                yield name, lambda case=case: judge_prefill(case, device)


def judge_prefill(case: Case, device: str) -> dict[str, Any]:
    connect_prefill()
    operands = case.tensors()
    arguments = to(device, native_arguments("prefill", operands))
    total = operands["q"].shape[0]
    grad_out = torch.randn(total, case.h_q, case.d_v, generator=torch.Generator().manual_seed(1)).to(case.dtype)

    def run() -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        leaves = {name: arguments[name].detach().clone().requires_grad_() for name in ("q", "k", "v")}
        out, lse = openmla.prefill(**{**arguments, **leaves}, backend="triton")
        return out, lse, list(torch.autograd.grad(out, list(leaves.values()), grad_out.to(device)))

    (out, lse, found), again = run(), run()
    assert torch.equal(out, again[0]) and all(torch.equal(a, b) for a, b in zip(found, again[2], strict=True))
    report = budget.check(out.detach().cpu(), lse.cpu(), case.golden(operands), dtype=case.dtype)
    report.require()
    wide = {name: operands[name].double().requires_grad_() for name in ("q", "k", "v")}
    golden = attention.prefill(**{**operands, **wide}, precision="fp64")
    exact = torch.autograd.grad(golden.out, list(wide.values()), grad_out.double())
    # Roundings of out, weights, slopes and the result against gradients of order 1; fp32 adds up to 300 terms.
    limit = {torch.bfloat16: 3 * 2.0**-9, torch.float16: 2.0**-9, torch.float32: 1e-5}[case.dtype]
    errors = [
        float((mine.double().cpu() - g).abs().max() / (1 + g.abs().max())) for mine, g in zip(found, exact, strict=True)
    ]
    assert max(errors) <= limit, f"gradients off by {errors}, limit {limit}"
    return {"worst": max(f.ratio for f in report.findings), "gradients": max(errors) / limit}


def connect_prefill() -> None:
    """Put the Triton prefill into the table, whatever it says today."""
    from openmla import backends
    from openmla.backends.triton import PREFILL

    others = tuple(each for each in backends.kernels("prefill") if each.backend != "triton")
    backends.TABLE["prefill"] = (PREFILL, *others)
    backends.select.cache_clear()


def section_append(device: str) -> Iterator[Item]:
    """Bytes of every layout, with RoPE and without."""
    for layout in (*BYTE_LAYOUT_NAMES, "bf16_576"):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for has_rope in (False, True):
                name = f"{layout} {str(dtype).removeprefix('torch.')}{' rope' if has_rope else ''}"
                yield name, lambda a=layout, b=dtype, c=has_rope: judge_append(a, b, c, device)


def judge_append(layout: str, dtype: torch.dtype, has_rope: bool, device: str) -> dict[str, Any]:
    from openmla.backends.triton.append import append

    generator, stored = torch.Generator().manual_seed(0), kv_layout(layout)
    count = 2000 if device != "cpu" else 20
    rows = torch.randn(count, stored.d_qk, generator=generator) * torch.exp2(torch.arange(count) % 30 - 15.0)[:, None]
    rows, slots = rows.to(dtype), torch.randperm(64 * 40, generator=generator)[:count]
    rope = Rope.of_base(64, 4000) if has_rope else None
    positions = torch.randint(0, 4000, (count,), generator=generator) if has_rope else None
    mine, expected = (stored.empty_cache(40, 64).fill_(1) for _ in range(2))
    mine = mine.to(device) if not stored.page_align_bytes > 1 else stored.empty_cache(40, 64, device=device).fill_(1)
    append(mine, layout, slots.to(device), rows.to(device), rope=to(device, rope), positions=to(device, positions))
    if rope is not None and positions is not None:
        rows = rope.rotated(rows[:, None], stored.d_qk - 64, positions)[:, 0]
    quant.write_rows(expected, layout, slots, rows)
    differ = int((mine.cpu().contiguous().view(torch.uint8) != expected.contiguous().view(torch.uint8)).sum())
    assert differ == 0, f"{differ} bytes differ"
    return {"tokens": count}


def section_times(device: str) -> Iterator[Item]:
    """Decode with and without mods, interleaved; the first call of a mod nobody has seen."""
    is_gpu = device != "cpu"
    shapes = ((128, 4096, 128), (16, 16384, 128)) if is_gpu else ((4, 40, 2),)
    for h_q, s_k, batch in shapes:
        yield f"decode h_q={h_q} s_k={s_k} batch={batch}", lambda a=h_q, b=s_k, c=batch: time_mods(a, b, c, device)
    yield "first call", lambda: time_first_call(device)


def decode_arguments(h_q: int, s_k: int, batch: int, device: str) -> dict[str, Any]:
    dtype = torch.bfloat16 if device != "cpu" else torch.float16
    pages = -(-s_k // 64)
    cache = torch.randn(batch * pages, 64, 1, 576, device=device, dtype=torch.float32).to(dtype)
    return {
        "q": torch.randn(batch, 1, h_q, 576, device=device).to(dtype), "kv_cache": cache,
        "block_table": torch.arange(batch * pages, dtype=torch.int32, device=device).view(batch, pages),
        "cache_seqlens": torch.full((batch,), s_k, dtype=torch.int32, device=device), "backend": "triton",
    }  # fmt: skip


def time_mods(h_q: int, s_k: int, batch: int, device: str) -> dict[str, Any]:
    arguments = decode_arguments(h_q, s_k, batch, device)
    slopes = torch.linspace(0, 1, h_q, device=device)
    contenders = {
        "plain": None, "soft_cap": mods.soft_cap(30.0), "alibi": mods.alibi(slopes),
        "window": mods.sliding_window(s_k // 2), "sigmoid": mods.sigmoid(-8.0),
        "rope": to(device, Rope.of_base(64, s_k + 64)),
    }  # fmt: skip
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(23 if device != "cpu" else 2):
        for name, given in contenders.items():
            seconds = elapsed(lambda given=given: openmla.decode(**arguments, mods=given), device)
            if turn >= 3 or device == "cpu":
                found[name].append(seconds)
    return {f"{name}_us": round(1e6 * statistics.median(each), 1) for name, each in found.items()}


def elapsed(run: Callable[[], Any], device: str) -> float:
    if device == "cpu":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def time_first_call(device: str) -> dict[str, Any]:
    number = time.time()  # a constant that no cache has seen

    @score_mod
    def unseen(score, b, h, q_idx, kv_idx):
        return score + 1e-9 * m.log(number + kv_idx)

    arguments = decode_arguments(16, 64, 2, device)
    openmla.decode(**arguments)
    begin = time.perf_counter()
    openmla.decode(**arguments, mods=unseen)
    if device != "cpu":
        torch.cuda.synchronize()
    first = time.perf_counter() - begin
    begin = time.perf_counter()
    openmla.decode(**arguments, mods=unseen)
    if device != "cpu":
        torch.cuda.synchronize()
    return {"first_s": round(first, 2), "second_ms": round(1e3 * (time.perf_counter() - begin), 3)}


def run_section(name: str, device: str) -> int:
    """Every item of one section, a line each; the number that failed."""
    failed = 0
    for item, check in globals()[f"section_{name}"](device):
        row: dict[str, Any] = {"section": name, "item": item.strip()}
        try:
            row |= {"passed": True, **check()}
        except Exception as error:  # what one item raises must not hide the others
            row |= {"passed": False, "error": f"{type(error).__name__}: {error}"[:600]}
            failed += 1
        print(json.dumps(row), flush=True)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", default=[], help=f"default: {' '.join(SECTIONS)}")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=150.0, help="per section")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--here", action="store_true", help="in this process")
    args = parser.parse_args()
    if args.here:
        return int(sum(run_section(name, args.device) for name in args.sections) > 0)
    lines, status = [], 0
    for name in args.sections or SECTIONS:
        command = [sys.executable, __file__, name, "--here", "--device", args.device]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=args.seconds, check=False)
            text, code, tail = done.stdout, done.returncode, done.stderr[-1500:]
        except subprocess.TimeoutExpired as error:
            text, code, tail = (error.stdout or b"").decode(), 124, f"cut after {args.seconds} s"
        found = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        lines += found
        passed = sum(row["passed"] for row in found)
        print(f"{name}: {passed} of {len(found)} passed, exit {code}")
        for row in found:
            if not row["passed"] or name == "times":
                print("  ", json.dumps(row))
        if code and passed == len(found):
            print("  ", tail)
        status |= code != 0
    if args.out:
        args.out.write_text("".join(json.dumps(row) + "\n" for row in lines))
    return status


if __name__ == "__main__":
    sys.exit(main())
