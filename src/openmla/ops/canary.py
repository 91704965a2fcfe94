"""The canary: a freshly compiled kernel computes a small problem of the same kind, beside the oracle, before it serves.

A compiler, driver or card that nobody tried before can produce code that runs and is wrong. The canary costs a fraction
of a second, most of it the oracle's on the CPU, once per variant and process; a variant that fails stands aside for the life of the process.
It is no proof of the kernel (`openmla verify` is): it looks for results that are plainly wrong.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch

from openmla.backends import aside
from openmla.backends.base import (
    DecodeKernel,
    DecodeOperands,
    Kernel,
    PrefillOperands,
    SparseDecodeOperands,
    SparsePrefillOperands,
)
from openmla.core import env, incidents
from openmla.core.faults import fault_word
from openmla.core.layout import KVLayout
from openmla.core.problem import DecodeProblem, PrefillProblem, SparseDecodeProblem, SparsePrefillProblem
from openmla.core.target import Target
from openmla.ops import recovery
from openmla.reference import attention
from openmla.reference.quant import write_rows

LENGTHS = (130, 7)  # two full tiles of 64 and a rest; less than one tile
KEYS = 140  # rows of what sparse kernels select from
TOPK = 192
# Row by row: |out - golden| over |golden|. bf16 and FP8 kernels land below 1 %, a wrong page, head or scale above 10 %.
MAX_ROW_ERROR = 0.05
MAX_LSE_ERROR = 0.05  # natural-log units; a 5 % error of the softmax sum

_tried: set[tuple[str, str, str, Any, tuple[Any, ...]]] = set()
_lock = threading.Lock()


def is_wanted(kernel: Kernel, target: Target) -> bool:
    """Compiled kernels on an accelerator; the torch backend is not compiled. OPENMLA_CHECKS=off turns the canary off."""
    return kernel.backend != "torch" and target.arch != "cpu" and env.CHECKS.read() != "off"


def try_out(kernel: Kernel, config: Any, problem: Any, target: Target, device: torch.device) -> str:
    """Try a variant once per process.

    Returns:
        Why its result is wrong; empty when it is right, was tried before, or cannot be tried (mods, capture, an operation
        that computes no attention).

    Raises:
        Whatever planning, compiling and launching raise.
    """
    if problem.op not in _TRIALS or not is_wanted(kernel, target) or getattr(problem, "mods", None) is not None:
        return ""
    # A Hopper kernel's config says all of its code. Triton compiles more variants than that, one per option of a call:
    # trying each of them would cost seconds apiece, so one call per tile, dtype and layout stands for them.
    form = (problem.dtype, getattr(problem, "layout", None), problem.d_qk, problem.d_v)
    key = (kernel.op, kernel.backend, kernel.name, config, form)
    with _lock:
        if key in _tried:
            return ""
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            incidents.note("canary_skipped", aside.subject(kernel), "first used while a CUDA graph was being captured")
            return ""
        _tried.add(key)
    try:
        with torch.inference_mode():
            return _compare(*_TRIALS[problem.op](kernel, config, smaller(problem), target, device))
    except Exception as error:
        if recovery.meaning(error) == "bug":  # perhaps of the trial: it must not keep a call from running
            incidents.note("canary_skipped", aside.subject(kernel), recovery.first_line(error))
            return ""
        raise


def smaller(problem: Any) -> Any:
    """The problem with everything that makes a compiled variant kept, and everything that makes it large cut."""
    if isinstance(problem, DecodeProblem):
        columns = -(-LENGTHS[0] // problem.page_size)
        s_q = min(problem.s_q, 64)
        return replace(
            problem, batch=2, s_q=s_q, total_q=s_q + 1 if problem.is_varlen else 2 * s_q, num_pages=2 * columns,
            max_pages=columns,
        )  # fmt: skip
    if isinstance(problem, SparseDecodeProblem):
        s_q = min(problem.s_q, 2)
        extra = problem.extra and replace(
            problem.extra, num_pages=-(-KEYS // problem.extra.page_size), topk=min(problem.extra.topk, 64)
        )
        return replace(
            problem, batch=2, s_q=s_q, total_q=2 * s_q, num_pages=-(-KEYS // problem.page_size),
            topk=min(problem.topk, TOPK), extra=extra,
        )  # fmt: skip
    if isinstance(problem, SparsePrefillProblem):
        return replace(problem, s_q=3, s_kv=KEYS, topk=min(problem.topk, TOPK))
    return replace(
        problem, batch=2, total_q=70, total_k=sum(LENGTHS), max_seqlen_q=65, max_seqlen_k=LENGTHS[0], needs_grad=False
    )


Trial = tuple[torch.Tensor, torch.Tensor, attention.Attention]


def _compare(out: torch.Tensor, lse: torch.Tensor, golden: attention.Attention) -> str:
    got, want = out.double().cpu(), golden.out
    norm = want.norm(dim=-1)
    error = (got - want).norm(dim=-1)
    seeing = (error / norm.clamp_min(1e-30))[norm > 0]
    worst = float(seeing.max()) if seeing.numel() else 0.0  # no row sees a key: all of out must be 0, as said below
    if not bool(got.isfinite().all()) or not worst <= MAX_ROW_ERROR or bool(error[norm == 0].any()):
        return f"out differs from the oracle by {worst:.1e} of a row (limit {MAX_ROW_ERROR})"
    seen = golden.lse.isfinite()
    apart = (lse.double().cpu() - golden.lse).abs()[seen]
    if not bool((apart <= MAX_LSE_ERROR).all()):
        return f"lse differs from the oracle by {float(apart.max()):.1e} (limit {MAX_LSE_ERROR})"
    return ""


def _random() -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator)


def _cache(
    layout: KVLayout, num_pages: int, page_size: int, h_kv: int, draw: Callable[..., torch.Tensor]
) -> torch.Tensor:
    cache = layout.empty_cache(num_pages, page_size, h_kv)
    slots = torch.arange(num_pages * page_size)
    for head in range(h_kv):
        write_rows(cache[:, :, head : head + 1], layout, slots, draw(len(slots), layout.d_qk))
    return cache


def _decode(kernel: Kernel, config: Any, problem: DecodeProblem, target: Target, device: torch.device) -> Trial:
    draw, planned = _random(), cast(DecodeKernel, kernel)
    scale = (1 if problem.is_scale_positive else -1) * problem.d_qk**-0.5
    shape = (problem.total_q,) if problem.is_varlen else (problem.batch, problem.s_q)
    q = (2 * draw(*shape, problem.h_q, problem.d_qk)).to(problem.dtype)
    descale = torch.tensor([0.75]) if problem.layout.has_call_scale else None
    cache = _cache(problem.layout, problem.num_pages, problem.page_size, problem.h_kv, draw)
    order = torch.randperm(problem.num_pages, generator=torch.Generator().manual_seed(1))
    table = order.to(torch.int32).reshape(2, problem.max_pages)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    cu = torch.tensor([0, problem.s_q, problem.total_q], dtype=torch.int32) if problem.is_varlen else None
    sink = draw(problem.h_q) if problem.has_sink else None
    golden = attention.decode(
        q, cache, table, lengths, softmax_scale=scale, d_v=problem.d_v, layout=problem.layout, is_causal=problem.is_causal,
        window=problem.window, cu_seqlens_q=cu, attn_sink=sink, descale_k=descale,
    )  # fmt: skip
    compiled = planned.compile(problem, config, target)
    policy = "batch_invariant" if problem.is_batch_invariant else "balanced"
    tables = (q.to(device), cache.to(device), table.to(device), lengths.to(device))
    cu, sink, descale = (None if x is None else x.to(device) for x in (cu, sink, descale))
    pieces = planned.plan(compiled, problem, tables[3], policy)
    needed = planned.workspace_bytes(compiled, problem, policy)
    scratch = torch.empty(needed, dtype=torch.uint8, device=device) if needed else None
    out = torch.full((*shape, problem.h_q, problem.d_v), torch.nan, dtype=problem.out_dtype, device=device)
    lse = torch.full(tuple(golden.lse.shape), torch.nan, dtype=torch.float32, device=device)
    operands = DecodeOperands(*tables, scale, out, lse, fault_word(device), cu, sink, scratch, None, descale_k=descale)
    planned.launch(compiled, problem, operands, pieces)
    return out, lse, golden


def _selection(rows: tuple[int, ...], topk: int, slots: int, generator: torch.Generator) -> torch.Tensor:
    chosen = torch.randint(slots, (*rows, topk), generator=generator, dtype=torch.int32)
    chosen[..., 1::5] = -1
    return chosen


def _sparse_decode(
    kernel: Kernel, config: Any, problem: SparseDecodeProblem, target: Target, device: torch.device
) -> Trial:
    draw, generator = _random(), torch.Generator().manual_seed(1)
    rows = (problem.total_q,) if problem.is_varlen else (problem.batch, problem.s_q)
    extra, scale = problem.extra, problem.d_qk**-0.5
    extra_layout = extra.layout if extra else None
    lengths = torch.full(rows, max(problem.topk // 2, 1), dtype=torch.int32)
    given: dict[str, Any] = {
        "q": (2 * draw(*rows, problem.h_q, problem.d_qk)).to(problem.dtype),
        "kv_cache": _cache(problem.layout, problem.num_pages, problem.page_size, 1, draw),
        "indices": _selection(rows, problem.topk, problem.num_pages * problem.page_size, generator),
        "topk_length": lengths if problem.has_topk_length else None,
        "attn_sink": draw(problem.h_q) if problem.has_sink else None,
        "extra_kv_cache": extra and _cache(extra.layout, extra.num_pages, extra.page_size, 1, draw),
        "extra_indices": extra and _selection(rows, extra.topk, extra.num_pages * extra.page_size, generator),
        "extra_topk_length": (lengths // 3).clamp(1, extra.topk) if extra and extra.has_topk_length else None,
    }
    golden = attention.sparse_decode(
        **given, softmax_scale=scale, d_v=problem.d_v, layout=problem.layout, extra_layout=extra_layout
    )
    out = torch.full((*rows, problem.h_q, problem.d_v), torch.nan, dtype=problem.dtype, device=device)
    lse = torch.full(tuple(golden.lse.shape), torch.nan, dtype=torch.float32, device=device)
    moved: dict[str, Any] = {name: None if x is None else x.to(device) for name, x in given.items()}
    for name, stored in (("kv_cache", problem.layout), ("extra_kv_cache", extra_layout)):
        if stored is not None:  # `to` takes the padding between pages away, which kernels may count on
            cache = given[name]
            moved[name] = stored.empty_cache(cache.shape[0], cache.shape[1], cache.shape[2], device).copy_(cache)
    operands = SparseDecodeOperands(**moved, softmax_scale=scale, out=out, lse=lse, fault_word=fault_word(device))
    kernel.launch(kernel.compile(problem, config, target), problem, operands, None)
    return out, lse, golden


def _sparse_prefill(
    kernel: Kernel, config: Any, problem: SparsePrefillProblem, target: Target, device: torch.device
) -> Trial:
    draw, generator, scale = _random(), torch.Generator().manual_seed(1), problem.d_qk**-0.5
    given: dict[str, Any] = {
        "q": (2 * draw(problem.s_q, problem.h_q, problem.d_qk)).to(problem.dtype),
        "kv": draw(problem.s_kv, problem.h_kv, problem.d_qk).to(problem.dtype),
        "indices": _selection((problem.s_q, problem.h_kv), problem.topk, problem.s_kv, generator),
        "topk_length": torch.full((problem.s_q,), max(problem.topk // 2, 1), dtype=torch.int32)
        if problem.has_topk_length
        else None,
        "attn_sink": draw(problem.h_q) if problem.has_sink else None,
    }
    golden = attention.sparse_prefill(**given, softmax_scale=scale, d_v=problem.d_v)
    out = torch.full((problem.s_q, problem.h_q, problem.d_v), torch.nan, dtype=problem.dtype, device=device)
    logits, lse = (torch.full(out.shape[:2], torch.nan, dtype=torch.float32, device=device) for _ in range(2))
    moved: dict[str, Any] = {name: None if x is None else x.to(device) for name, x in given.items()}
    operands = SparsePrefillOperands(
        **moved, softmax_scale=scale, out=out, max_logits=logits, lse=lse, fault_word=fault_word(device)
    )
    kernel.launch(kernel.compile(problem, config, target), problem, operands, None)
    return out, lse, golden


def _prefill(kernel: Kernel, config: Any, problem: PrefillProblem, target: Target, device: torch.device) -> Trial:
    draw, scale = _random(), problem.d_qk**-0.5
    q = (2 * draw(problem.total_q, problem.h_q, problem.d_qk)).to(problem.dtype)
    k = draw(problem.total_k, problem.h_kv, problem.d_qk).to(problem.dtype)
    v = draw(problem.total_k, problem.h_kv, problem.d_v).to(problem.dtype)
    cu_q = torch.tensor([0, 65, problem.total_q], dtype=torch.int32)
    cu_k = torch.tensor([0, LENGTHS[0], problem.total_k], dtype=torch.int32)
    golden = attention.prefill(q, k, v, cu_q, cu_k, softmax_scale=scale, is_causal=problem.is_causal)
    out = torch.full((problem.total_q, problem.h_q, problem.d_v), torch.nan, dtype=problem.dtype, device=device)
    lse = torch.full(tuple(golden.lse.shape), torch.nan, dtype=torch.float32, device=device)
    there = (q.to(device), k.to(device), v.to(device), cu_q.to(device), cu_k.to(device))
    operands = PrefillOperands(*there, scale, out, lse, fault_word(device))
    kernel.launch(kernel.compile(problem, config, target), problem, operands, None)
    return out, lse, golden


_TRIALS: dict[str, Callable[..., Trial]] = {
    "decode": _decode,
    "sparse_decode": _sparse_decode,
    "sparse_prefill": _sparse_prefill,
    "prefill": _prefill,
}
