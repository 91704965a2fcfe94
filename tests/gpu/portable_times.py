"""Times of the portable kernels and of mods on a GPU: `portable.py times`; those with a bar are in portable_figures.py, too."""

from __future__ import annotations

import importlib
import inspect
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from portable_mods import CUTE_MODS, decode_arguments, mod_of_the_page, to

import openmla
from openmla import mods
from openmla.mods import Rope, m, score_mod
from openmla.reference import attention
from openmla.testing import budget

Item = tuple[str, Callable[[], dict[str, Any]]]


def section_times(device: str) -> Iterator[Item]:
    """What the suite `portable` cannot say: mods beside plain decode, sparse prefill, a mod nobody has seen."""
    if device == "cpu":
        yield "triton decode with mods", lambda: time_mods(4, 1, 40, 2, device, "triton")
        yield "first call", lambda: time_first_call(device)
        return
    yield "sparse prefill", lambda: time_sparse_prefill(s_q=4096, h_q=128, topk=2048, s_kv=8192)
    for s_q in (1, 2):
        yield "cute decode with mods", lambda a=s_q: time_mods(128, a, 4096, 128, device, "cute")
    yield "first call", lambda: time_first_call(device)
    for h_q, s_k, batch in ((128, 4096, 128), (128, 16384, 64), (16, 4096, 128), (16, 16384, 128)):
        yield "triton decode", lambda a=h_q, b=s_k, c=batch: time_decode(h_q=a, s_k=b, batch=c)
    for h_q, s_k in ((128, 4096), (16, 16384)):
        yield "triton decode with mods", lambda a=h_q, b=s_k: time_mods(a, 1, b, 128, device, "triton")
    for s_k, batch in ((4096, 1), (1024, 4)):
        yield "triton prefill", lambda a=s_k, b=batch: time_prefill(a, b)


def time_mods(
    h_q: int, s_q: int, s_k: int, batch: int, device: str, backend: str, names: tuple[str, ...] = (), rounds: int = 20
) -> dict[str, Any]:
    """Decode with mods, plans made beforehand, beside plain decode. `names`: which mods; default: all."""
    arguments = decode_arguments(h_q, s_k, batch, device, s_q) | {"backend": backend}
    contenders: dict[str, Any] = {"plain": None, "window": mods.sliding_window(s_k // 2)}
    if backend == "cute":
        contenders |= {name: CUTE_MODS[name] for name in ("soft_cap", "sink_tokens")}
        contenders |= {} if names else {"page": mod_of_the_page()}
    else:
        slopes = torch.linspace(0, 1, h_q, device=device)
        contenders |= {
            "soft_cap": mods.soft_cap(30.0), "alibi": mods.alibi(slopes), "sigmoid": mods.sigmoid(-8.0),
            "rope": to(device, Rope.of_base(64, s_k + 64)),
        }  # fmt: skip
    calls = {"window option": planned(arguments, window=s_k // 2)}
    for name, given in contenders.items():
        if not names or name in ("plain", *names):
            calls[name] = planned(arguments, mods=given)
    found = medians(calls, device, rounds)
    over = {f"{name}_over": round(us / found["plain"] - 1, 4) for name, us in found.items() if name != "plain"}
    tflops = 2 * batch * s_q * h_q * s_k * (576 + 512) / found["plain"] / 1e6
    shape = {"h_q": h_q, "s_q": s_q, "s_k": s_k, "batch": batch, "plain_tflops": round(tflops, 1)}
    return shape | {f"{name}_us": round(us, 1) for name, us in found.items()} | over


def planned(arguments: dict[str, Any], **options: Any) -> Callable[[], Any]:
    """A decode with its plan, as a server calls it in every layer of a step."""
    plan = openmla.plan(**arguments, **{name: value for name, value in options.items() if name != "softmax_scale"})
    return lambda: openmla.decode(**arguments, **options, plan=plan)


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


def time_prefill(tokens: int, batch: int) -> dict[str, Any]:
    """Causal, 16 heads of 192 and 128 columns, forward and with gradients, beside PyTorch's SDPA."""
    total, heads = batch * tokens, 16
    q, k = (torch.randn(total, heads, 192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    v = torch.randn(total, heads, 128, device="cuda", dtype=torch.bfloat16)
    offsets = torch.arange(0, total + 1, tokens, device="cuda", dtype=torch.int32)

    def triton(*given: torch.Tensor) -> torch.Tensor:
        sizes = {"max_seqlen_q": tokens, "max_seqlen_k": tokens}
        return openmla.prefill(*given, offsets, offsets, **sizes, is_causal=True, backend="triton")[0]

    def sdpa(*given: torch.Tensor) -> torch.Tensor:
        dense = (each.view(batch, tokens, heads, -1).transpose(1, 2) for each in given)
        return torch.nn.functional.scaled_dot_product_attention(*dense, is_causal=True)

    def trained(form: Callable[..., torch.Tensor]) -> None:
        out = form(*(each.detach().requires_grad_() for each in (q, k, v)))
        out.backward(torch.ones_like(out))

    calls: dict[str, Callable[[], Any]] = {
        "triton": lambda: triton(q, k, v), "sdpa": lambda: sdpa(q, k, v),
        "triton_with_gradients": lambda: trained(triton), "sdpa_with_gradients": lambda: trained(sdpa),
    }  # fmt: skip
    found = medians(calls, "cuda", 7)
    tflops = batch * heads * tokens * tokens * (192 + 128) / found["triton"] / 1e6
    shape = {"s_q": tokens, "batch": batch, "h_q": heads, "tflops": round(tflops, 1)}
    return shape | {f"{name}_us": round(us, 1) for name, us in found.items()}


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

    def decode() -> tuple[float, Any]:
        begin = time.perf_counter()
        result = openmla.decode(**arguments, mods=unseen)
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - begin, result

    (first, (out, lse)), (second, _) = decode(), decode()
    worst = judged(arguments, out, lse, unseen)
    return {"first_s": round(first, 2), "second_ms": round(1e3 * second, 3), "worst": worst}


def judged(arguments: dict[str, Any], out: torch.Tensor, lse: torch.Tensor, given: Any, **options: Any) -> float:
    """The largest share of the tolerance that a result needs, against the fp64 oracle."""
    operands = {name: value for name, value in arguments.items() if name not in ("backend", "plan")}
    options = {"softmax_scale": 576**-0.5, "d_v": 512} | options
    golden = attention.decode(**operands, **options, mods=given, with_bounds=True)
    report = budget.check(out, lse, golden, dtype=out.dtype)
    report.require()
    return round(max(finding.ratio for finding in report.findings), 3)
