"""What the portable kernels and mods must show on a GPU: mods in decode, varlen prefill with gradients, cache append.

    python tests/gpu/portable.py [mods cute prefill append times] [--out portable.jsonl]
    TRITON_INTERPRET=1 python tests/gpu/portable.py --device cpu          the script itself, without a GPU

Each section is at most `--seconds` long and runs in processes of its own: most of the time goes into compiling a kernel
per item, so `--jobs` of them share the items (`times` has one). Correctness is the tolerance rule against the fp64
oracle (append: equal bytes; gradients: autograd in fp64). `cute` runs the mods below in the Hopper kernels, which
needs CuTe DSL or a bundle that holds them (`openmla compile --mods`). `times` compares decode with and without mods on
both backends and sparse prefill with FlashMLA's, and times the first call of a mod that no cache has seen. One JSON line per item; exit status 0 when all passed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import openmla
from openmla import mods
from openmla.core.layout import BYTE_LAYOUT_NAMES, kv_layout
from openmla.mods import Rope, m, mask_mod, score_mod
from openmla.reference import attention, quant
from openmla.testing import budget
from openmla.testing.cases import Case, native_arguments
from openmla.testing.mod_cases import library_cases

SECTIONS = ("mods", "cute", "prefill", "append", "times")
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
    for layout, h_q in itertools.product(("", "fp8_656") if is_gpu else ("",), (128, 16) if is_gpu else (4,)):
        case = Case(
            op="decode", seed=3, family="unit", dtype=torch.bfloat16 if is_gpu else torch.float16, h_q=h_q, h_kv=1,
            softmax_scale=0.1, seqlens_q=(2, 2, 2), seqlens_k=(900 if is_gpu else 90, 0, 33), is_causal=True,
            page_size=64 if is_gpu else 16, layout=layout, **sizes,
        )  # fmt: skip
        library = library_cases(h_q=h_q, capacity=64 * 20, d_rope=sizes["d_qk"] - sizes["d_v"])
        for name, given in library.items():
            yield f"{name} h_q={h_q} {layout}", lambda a=case, b=given: judge_decode(a, b, device)


@score_mod
def fading(score, b, h, q_idx, kv_idx):
    """A key loses weight with its distance, faster in the first heads."""
    age = q_idx - kv_idx
    return score - 0.002 * age * m.exp2(0.0 - 0.05 * h)


@mask_mod
def every_third(b, h, q_idx, kv_idx):
    """Keys whose place is no multiple of 3, and the last ones."""
    return (m.mod(kv_idx + b, 3) != 0) | (q_idx - kv_idx < 8)


# What the Hopper kernels inline: of the library, and of a user.
CUTE_MODS = {
    "soft_cap": [mods.soft_cap(30.0)],
    "sink_tokens": [mods.sink_tokens(4, 512)],
    "window": [mods.sliding_window(512)],
    "fading": [fading],
    "every_third": [every_third],
    "several": [mods.soft_cap(30.0), fading, mods.sink_tokens(4, 512), every_third],
}


def section_cute(device: str) -> Iterator[Item]:
    """Mods in the Hopper kernels: many and few heads, causal, and NaN in keys that a mask hides."""
    for h_q, s_q in ((128, 1), (128, 2), (16, 2), (64, 1)):
        case = Case(
            op="decode", seed=3, family="unit", dtype=torch.bfloat16, h_q=h_q, h_kv=1, d_qk=576, d_v=512,
            softmax_scale=0.1, seqlens_q=(s_q,) * 3, seqlens_k=(900, 0, 133), is_causal=s_q > 1, page_size=64,
        )  # fmt: skip
        for name, given in CUTE_MODS.items():
            is_one_block = h_q * s_q <= 64
            if is_one_block and name in ("fading", "every_third", "several"):
                continue  # one variant of a user's mod is enough for a bundle to hold
            yield f"{name} h_q={h_q} s_q={s_q}", lambda a=case, b=given: judge_decode(a, b, device, "cute")
    for name in ("sink_tokens", "every_third", "several"):
        yield f"{name}, hidden NaN", lambda a=CUTE_MODS[name]: judge_hidden(a, device)


def judge_hidden(given: Any, device: str) -> dict[str, Any]:
    """Keys that every row's mask hides hold NaN and infinity: the same bits as without."""
    arguments = decode_arguments(128, 640, 2, device) | {"backend": "cute", "mods": given}
    cache = arguments["kv_cache"].clone()
    cache.view(-1, 576)[60] = torch.nan  # hidden by each of the masks
    cache.view(-1, 576)[63, 100] = torch.inf
    cache.view(-1, 576)[66, 570] = -torch.inf
    clean, _ = openmla.decode(**arguments)
    dirty, _ = openmla.decode(**{**arguments, "kv_cache": cache})
    assert clean.isfinite().all() and torch.equal(clean, dirty)
    return {"rows": clean.shape[0] * clean.shape[2]}


def judge_decode(case: Case, given: Any, device: str, backend: str = "triton") -> dict[str, Any]:
    operands = case.tensors()
    arguments = to(device, native_arguments("decode", operands))
    out, lse = openmla.decode(**arguments, mods=to(device, given), backend=backend)
    again, _ = openmla.decode(**arguments, mods=to(device, given), backend=backend)
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


def section_append(device: str) -> Iterator[Item]:
    """Bytes of every layout, with RoPE and without."""
    for layout in (*BYTE_LAYOUT_NAMES, "bf16_576"):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for has_rope in (False, True):
                name = f"{layout} {str(dtype).removeprefix('torch.')}{' rope' if has_rope else ''}"
                yield name, lambda a=layout, b=dtype, c=has_rope: judge_append(a, b, c, device)


def judge_append(layout: str, dtype: torch.dtype, has_rope: bool, device: str) -> dict[str, Any]:
    from openmla.ops.append import append

    generator, stored = torch.Generator().manual_seed(0), kv_layout(layout)
    count = 2000 if device != "cpu" else 20
    rows = torch.randn(count, stored.d_qk, generator=generator) * torch.exp2(torch.arange(count) % 30 - 15.0)[:, None]
    rows = rows.clamp(-65504, 65504)  # the bytes of a group with an inf are free
    rows, slots = rows.to(dtype), torch.randperm(64 * 40, generator=generator)[:count]
    rope = Rope.of_base(64, 4000) if has_rope else None
    positions = torch.randint(0, 4000, (count,), generator=generator) if has_rope else None
    mine, expected = (stored.empty_cache(40, 64).fill_(1) for _ in range(2))
    mine = mine.to(device) if not stored.page_align_bytes > 1 else stored.empty_cache(40, 64, device=device).fill_(1)
    append(
        mine, slots.to(device), rows.to(device), kv_layout=layout, rope=to(device, rope), positions=to(device, positions),
        backend="triton",
    )  # fmt: skip
    if rope is not None and positions is not None:
        rows = rope.rotated(rows[:, None], stored.d_qk - 64, positions)[:, 0]
    quant.write_rows(expected, layout, slots, rows)
    differ = int((mine.cpu().contiguous().view(torch.uint8) != expected.contiguous().view(torch.uint8)).sum())
    assert differ == 0, f"{differ} bytes differ"
    return {"tokens": count}


def section_times(device: str) -> Iterator[Item]:
    """Decode with and without mods, interleaved; sparse prefill; the first call of a mod nobody has seen."""
    if device == "cpu":
        yield "triton decode with mods", lambda: time_mods(4, 40, 2, device, "triton")
        yield "first call", lambda: time_first_call(device)
        return
    for h_q, s_k, batch in ((128, 4096, 128), (128, 16384, 64), (16, 4096, 128), (16, 16384, 128)):
        yield "triton decode", lambda a=h_q, b=s_k, c=batch: time_decode(h_q=a, s_k=b, batch=c)
    yield "cute decode with mods", lambda: time_mods(128, 4096, 128, device, "cute")
    yield "sparse prefill", lambda: time_sparse_prefill(s_q=4096, h_q=128, topk=2048, s_kv=8192)
    yield "first call", lambda: time_first_call(device)
    yield "cute decode with mods", lambda: time_mods(16, 16384, 128, device, "cute")
    for h_q, s_k in ((128, 4096), (16, 16384)):
        yield "triton decode with mods", lambda a=h_q, b=s_k: time_mods(a, b, 128, device, "triton")


def decode_arguments(h_q: int, s_k: int, batch: int, device: str) -> dict[str, Any]:
    dtype = torch.bfloat16 if device != "cpu" else torch.float16
    pages = -(-s_k // 64)
    cache = torch.randn(batch * pages, 64, 1, 576, device=device, dtype=torch.float32).to(dtype)
    return {
        "q": torch.randn(batch, 1, h_q, 576, device=device).to(dtype), "kv_cache": cache,
        "block_table": torch.arange(batch * pages, dtype=torch.int32, device=device).view(batch, pages),
        "cache_seqlens": torch.full((batch,), s_k, dtype=torch.int32, device=device), "backend": "triton",
    }  # fmt: skip


def time_mods(h_q: int, s_k: int, batch: int, device: str, backend: str) -> dict[str, Any]:
    arguments = decode_arguments(h_q, s_k, batch, device) | {"backend": backend}
    contenders: dict[str, Any] = {"plain": None, "window": mods.sliding_window(s_k // 2)}
    if backend == "cute":
        contenders |= CUTE_MODS
        contenders["window"] = mods.sliding_window(s_k // 2)
    else:
        slopes = torch.linspace(0, 1, h_q, device=device)
        contenders |= {
            "soft_cap": mods.soft_cap(30.0), "alibi": mods.alibi(slopes), "sigmoid": mods.sigmoid(-8.0),
            "rope": to(device, Rope.of_base(64, s_k + 64)),
        }  # fmt: skip
    calls = {"window option": lambda: openmla.decode(**arguments, window=s_k // 2)}
    for name, given in contenders.items():
        calls[name] = lambda given=given: openmla.decode(**arguments, mods=given)
    found = medians(calls, device, 20)
    over = {f"{name}_over": round(us / found["plain"] - 1, 4) for name, us in found.items() if name != "plain"}
    tflops = 2 * batch * h_q * s_k * (576 + 512) / found["plain"] / 1e6
    shape = {"h_q": h_q, "s_k": s_k, "batch": batch, "plain_tflops": round(tflops, 1)}
    return shape | {f"{name}_us": round(us, 1) for name, us in found.items()} | over


def time_decode(*, h_q: int, s_k: int, batch: int) -> dict[str, Any]:
    """The plain Triton kernel, plan made beforehand, beside FlashMLA where it is installed."""
    arguments = decode_arguments(h_q, s_k, batch, "cuda")
    tensors = [arguments[name] for name in ("q", "kv_cache", "block_table", "cache_seqlens")]
    plan = openmla.plan(*tensors, backend="triton")
    calls: dict[str, Callable[[], Any]] = {"triton": lambda: openmla.decode(**arguments, plan=plan)}
    peer = flash_mla_module()
    if peer is not None:
        metadata = peer.get_mla_metadata(tensors[3], h_q, 1)
        options = legacy(peer.flash_mla_with_kvcache)
        calls["flash_mla"] = lambda: peer.flash_mla_with_kvcache(*tensors, 512, *metadata, **options)
        difference = float((calls["triton"]()[0].float() - calls["flash_mla"]()[0].float()).abs().max())
        assert difference < 1e-2, f"they differ by {difference}"
    found = medians(calls, "cuda", 12)
    row: dict[str, Any] = {"h_q": h_q, "s_k": s_k, "batch": batch}
    row["tflops"] = round(2 * batch * h_q * s_k * (576 + 512) / found["triton"] / 1e6, 1)
    row["gbps"] = round(batch * s_k * 576 * 2 / found["triton"] / 1e3, 1)
    return row | beside(found)


def time_sparse_prefill(*, s_q: int, h_q: int, topk: int, s_kv: int) -> dict[str, Any]:
    """Beside FlashMLA where it is installed."""
    q = (0.3 * torch.randn(s_q, h_q, 576, device="cuda")).bfloat16()
    kv = (0.3 * torch.randn(s_kv, 1, 576, device="cuda")).bfloat16()
    indices = torch.randint(0, s_kv, (s_q, 1, topk), device="cuda", dtype=torch.int32)
    calls: dict[str, Callable[[], Any]] = {
        "triton": lambda: openmla.sparse_prefill(q, kv, indices, softmax_scale=576**-0.5, backend="triton")
    }
    peer = flash_mla_module()
    if peer is not None:
        options = legacy(peer.flash_mla_sparse_fwd)
        calls["flash_mla"] = lambda: peer.flash_mla_sparse_fwd(q, kv, indices, 576**-0.5, **options)
        difference = float((calls["triton"]()[0].float() - calls["flash_mla"]()[0].float()).abs().max())
        assert difference < 2e-3, f"they differ by {difference}"
    found = medians(calls, "cuda", 8)
    row: dict[str, Any] = {"s_q": s_q, "h_q": h_q, "topk": topk, "s_kv": s_kv}
    row["tflops"] = round(2 * s_q * h_q * topk * (576 + 512) / found["triton"] / 1e6, 1)
    return row | beside(found)


def flash_mla_module() -> Any:
    """FlashMLA, or None where it is not installed."""
    try:
        return importlib.import_module("flash_mla")
    except ImportError as error:
        print(f"FlashMLA is not measured: {error}", file=sys.stderr)
        return None


def legacy(function: Callable[..., Any]) -> dict[str, Any]:
    """SGLang's fork keeps the Hopper kernels behind this name."""
    return {"use_legacy": True} if "use_legacy" in inspect.signature(function).parameters else {}


def beside(found: dict[str, float]) -> dict[str, float]:
    """Times, and FlashMLA's over ours."""
    row = {f"{name}_us": round(us, 1) for name, us in found.items()}
    return row | ({"ratio": round(found["flash_mla"] / found["triton"], 4)} if "flash_mla" in found else {})


def medians(calls: dict[str, Callable[[], Any]], device: str, rounds: int) -> dict[str, float]:
    """Microseconds of each call, taken in turn; on a GPU behind a pause, so that launches do not wait for the host."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 3 if device != "cpu" else 2):
        for name, call in calls.items():
            microseconds = elapsed(call, device)
            if turn >= 3 or device == "cpu":
                found[name].append(microseconds)
    return {name: statistics.median(each) for name, each in found.items()}


def elapsed(run: Callable[[], Any], device: str) -> float:
    if device == "cpu":
        begin = time.perf_counter()
        run()
        return 1e6 * (time.perf_counter() - begin)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(1_000_000)
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return 1e3 * begin.elapsed_time(end)


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


def run_section(name: str, device: str, share: int, jobs: int) -> int:
    """Every item of one section that is `share` modulo `jobs`, a line each; the number that failed."""
    failed = 0
    for item, check in itertools.islice(globals()[f"section_{name}"](device), share, None, jobs):
        row: dict[str, Any] = {"section": name, "item": item.strip()}
        if name == "times":
            row["device"] = torch.cuda.get_device_name() if device != "cpu" else "cpu"
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
    parser.add_argument("--jobs", type=int, default=max((os.cpu_count() or 2) - 2, 1), help="processes per section")
    parser.add_argument("--here", type=int, metavar="SHARE", help="in this process, and only this share of the items")
    args = parser.parse_args()
    if args.here is not None:
        return int(sum(run_section(name, args.device, args.here, args.jobs) for name in args.sections) > 0)
    lines, status = [], 0
    for name in args.sections or SECTIONS:
        found, texts, is_fine = run_processes(name, args)
        lines += found
        passed = sum(row["passed"] for row in found)
        print(f"{name}: {passed} of {len(found)} passed{'' if is_fine else ', and not all ran'}", flush=True)
        for row in found:
            if not row["passed"] or name == "times":
                print("  ", json.dumps(row), flush=True)
        for text in texts:
            print("  ", text[-1500:], flush=True)
        status |= passed < len(found) or not is_fine
        if args.out:
            args.out.write_text("".join(json.dumps(row) + "\n" for row in lines))
    return int(status)


def run_processes(name: str, args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str], bool]:
    """(rows, what processes that broke off said, whether none did) of one section."""
    jobs = 1 if name == "times" else args.jobs
    own = [sys.executable, __file__, name, "--device", args.device, "--jobs", str(jobs), "--here"]
    deadline = time.monotonic() + args.seconds
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2 * jobs)]
        running = [
            subprocess.Popen([*own, str(share)], stdout=logs[2 * share], stderr=logs[2 * share + 1])
            for share in range(jobs)
        ]
        rows, texts, is_fine = [], [], True
        for share, each in enumerate(running):
            try:
                code = each.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                each.kill()
                code = 124
            out, err = logs[2 * share], logs[2 * share + 1]
            out.seek(0), err.seek(0)
            mine = [json.loads(line) for line in out if line.startswith("{") and line.endswith("}\n")]
            rows += mine
            if code and all(row["passed"] for row in mine):
                is_fine = False
                texts.append(f"process {share} ended with {code}: {err.read()}")
        return rows, texts, is_fine


if __name__ == "__main__":
    sys.exit(main())
