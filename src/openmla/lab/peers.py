"""Who is measured beside us. Every peer runs, or says why not; none is run in a way its authors would not choose.

    sdpa       gather the pages, then torch's scaled_dot_product_attention, in the fastest of several honest forms
    eager      gather the pages, then matmul + softmax + matmul
    flex       gather the pages, then torch's FlexAttention, compiled
    flash_mla  DeepSeek's kernels, or SGLang's fork of them, where that package is installed
    fa3        FlashAttention 3 with its `qv` argument (package fa3-fwd, or FlashAttention's hopper build)
    fa4        FlashAttention 4: says why not; its MLA is for Blackwell
    flashinfer FlashInfer's BatchMLAPagedAttentionWrapper
    triton_usual  the two-stage split-KV kernel that serving systems fall back to, see `openmla.lab.usual_triton`
    matmul     ceiling: the two matrix products alone, keys contiguous beforehand, nothing else
    gemm       ceiling: one large square product in the case's dtype, timed in turn with the others

A contender's `call(i)` runs on input set i and returns (out, lse), each None where it has none.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

import openmla
from openmla.backends import select
from openmla.core.errors import ConfigError, UnsupportedError
from openmla.core.problem import DecodeProblem
from openmla.core.target import Target
from openmla.lab.clock import best_seconds
from openmla.lab.store import version_of
from openmla.lab.suite import Case
from openmla.lab.workload import DecodeInputs

Result = tuple[torch.Tensor | None, torch.Tensor | None]
Sets = Sequence[DecodeInputs]


@dataclass(frozen=True)
class Contender:
    """Somebody ready to be timed. `flops` overrides the case's own work (for `gemm`)."""

    who: str
    kind: Literal["backend", "peer", "ceiling"]
    kernel: str
    config: str
    call: Callable[[int], Result]
    flops: int | None = None


@dataclass(frozen=True)
class Refusal:
    """Somebody who cannot take part in a case, and why."""

    who: str
    reason: str


def problem_of(case: Case, inputs: DecodeInputs) -> DecodeProblem:
    """The Problem that a case asks with these inputs."""
    return DecodeProblem.from_tensors(
        inputs.q, inputs.kv_cache, inputs.block_table, inputs.cache_seqlens, d_v=case.d_v, layout=case.kv_layout,
        is_causal=case.is_causal,
    )  # fmt: skip


def backend(case: Case, sets: Sets, target: Target, name: str) -> Contender | Refusal:
    """Our own operation through its public entry, plan made beforehand as a server does once per step."""
    try:
        chosen = select(problem_of(case, sets[0]), target, name)
    except UnsupportedError as error:
        mine = [f"{kernel}: {'; '.join(why)}" for kernel, why in error.reasons.items() if kernel.startswith(name)]
        return Refusal(name, " | ".join(mine) or error.headline)
    plans = [
        openmla.plan(
            each.q, each.kv_cache, each.block_table, each.cache_seqlens,
            d_v=case.d_v, is_causal=case.is_causal, policy=case.policy,  # type: ignore[arg-type]
            kv_layout=case.kv_layout, backend=chosen.kernel.backend,
        )
        for each in sets
    ]  # fmt: skip
    # NaN until written: an element that the kernel leaves out cannot pass the gate.
    dtype = problem_of(case, sets[0]).out_dtype
    outs = [each.q.new_full((*each.q.shape[:-1], case.d_v), torch.nan, dtype=dtype) for each in sets]

    def call(i: int) -> Result:
        x = sets[i]
        return openmla.decode(
            x.q, x.kv_cache, x.block_table, x.cache_seqlens, d_v=case.d_v, softmax_scale=x.softmax_scale,
            is_causal=case.is_causal, kv_layout=case.kv_layout, plan=plans[i], out=outs[i],
            backend=chosen.kernel.backend,
        )  # fmt: skip

    return Contender(chosen.kernel.backend, "backend", chosen.kernel.name, str(chosen.config), call)


def _gather(x: DecodeInputs, request: int | None = None) -> torch.Tensor:
    """Keys of all requests (or one, cut to its length) out of their pages: [batch, h_kv, s_k, d_qk]."""
    page_size, h_kv, d_qk = x.kv_cache.shape[1:]
    if request is None:
        table, length = x.block_table, max(x.lengths)
    else:
        length = x.lengths[request]
        table = x.block_table[request : request + 1, : -(-length // page_size)]
    rows = x.kv_cache.index_select(0, table.reshape(-1)).view(table.shape[0], -1, h_kv, d_qk)
    return rows[:, :length].transpose(1, 2)


def _pack(q: torch.Tensor, h_kv: int) -> torch.Tensor:
    """[batch, s_q, h_q, d] -> [batch, h_kv, group * s_q, d]: the heads that share keys become rows of one matrix."""
    batch, s_q, h_q, d = q.shape
    return q.view(batch, s_q, h_kv, h_q // h_kv, d).permute(0, 2, 3, 1, 4).reshape(batch, h_kv, -1, d)


def _unpack(out: torch.Tensor, s_q: int, h_q: int) -> torch.Tensor:
    """Inverse of `_pack`."""
    batch, h_kv, _, d = out.shape
    return out.view(batch, h_kv, h_q // h_kv, s_q, d).permute(0, 3, 1, 2, 4).reshape(batch, s_q, h_q, d)


def _mask(case: Case, lengths: Sequence[int], s_k: int, device: torch.device) -> torch.Tensor | None:
    """[batch, 1, group * s_q, s_k] bool of the keys each packed row sees; None when every row sees all."""
    causal = case.is_causal and case.s_q > 1
    if not causal and min(lengths) == s_k:
        return None
    end = torch.tensor(lengths, device=device)[:, None].expand(-1, case.s_q)
    if causal:
        end = end - case.s_q + 1 + torch.arange(case.s_q, device=device)
    seen = torch.arange(s_k, device=device) < end[..., None]
    return seen.repeat(1, case.h_q // case.h_kv, 1)[:, None]


def _all_or_each(
    case: Case, sets: Sets, attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
) -> dict[str, Callable[[int], Result]]:
    """Two ways to gather and attend: the padded batch at once, or request by request without padding."""
    device = sets[0].device
    lengths = sets[0].lengths
    whole_mask = _mask(case, lengths, max(lengths), device)
    each_mask = [_mask(case, [length], length, device) for length in lengths]

    def at_once(i: int) -> Result:
        x = sets[i]
        return _unpack(attend(_pack(x.q, case.h_kv), _gather(x), whole_mask), case.s_q, case.h_q), None

    def one_by_one(i: int) -> Result:
        x = sets[i]
        q = _pack(x.q, case.h_kv)
        outs = [attend(q[r : r + 1], _gather(x, r), each_mask[r]) for r in range(case.batch)]
        return _unpack(torch.cat(outs), case.s_q, case.h_q), None

    return {"batched": at_once, "per request": one_by_one}


def _fastest(who: str, kernel: str, ways: dict[str, Callable[[int], Result]], device: torch.device) -> Contender:
    """The contender in the form that is fastest on the first input set, among those that run."""
    times: dict[str, float] = {}
    failed: list[str] = []
    for name, call in ways.items():
        try:
            times[name] = best_seconds(lambda call=call: call(0), device, budget=0.1)  # type: ignore[misc]
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            failed.append(f"{name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
    if not times:
        raise RuntimeError(f"no form of {who} runs; {'; '.join(failed)}")
    best = min(times, key=times.__getitem__)
    kind: Literal["peer", "ceiling"] = "ceiling" if who == "matmul" else "peer"
    return Contender(who, kind, kernel, f"{best} (fastest of {len(times)})", ways[best])


def _sdpa(case: Case, sets: Sets, target: Target) -> Contender | Refusal:
    def narrow(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, k[..., : case.d_v], mask, scale=sets[0].softmax_scale)

    def wide(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        # torch's flash kernel for CPUs asks for d_v = d_qk: 12 % more arithmetic in PV, and no score matrix in memory.
        return F.scaled_dot_product_attention(q, k, k, mask, scale=sets[0].softmax_scale)[..., : case.d_v]

    def heads(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        split = q.view(q.shape[0], case.h_q, case.s_q, -1)
        k = k.repeat_interleave(case.h_q // case.h_kv, 1) if case.h_kv > 1 else k.expand(-1, case.h_q, -1, -1)
        out = F.scaled_dot_product_attention(split, k, k, mask, scale=sets[0].softmax_scale)[..., : case.d_v]
        return out.reshape(q.shape[0], case.h_kv, -1, case.d_v)

    forms = {"heads as rows": narrow, "heads as rows, V padded to the key": wide}
    if not target.is_cuda and not (case.is_causal and case.s_q > 1):
        # On a GPU this form would copy the keys once per head: no kernel there takes 576 columns.
        forms["heads apart, V padded to the key"] = heads
    ways = {
        f"{form}, {how}": call
        for form, attend in forms.items()
        for how, call in _all_or_each(case, sets, attend).items()
        if not (form.startswith("heads apart") and case.lengths == "varlen" and how == "batched")
    }
    return _fastest("sdpa", "gather + scaled_dot_product_attention", ways, sets[0].device)


def _eager(case: Case, sets: Sets, target: Target) -> Contender | Refusal:
    def attend(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        scores = torch.matmul(q, k.transpose(-1, -2)).float() * sets[0].softmax_scale
        if mask is not None:
            scores.masked_fill_(~mask, -torch.inf)
        return torch.matmul(scores.softmax(-1).to(q.dtype), k[..., : case.d_v])

    return _fastest("eager", "gather + matmul + softmax + matmul", _all_or_each(case, sets, attend), sets[0].device)


def _matmul(case: Case, sets: Sets, target: Target) -> Contender | Refusal:
    rows = case.h_q // case.h_kv * case.s_q
    stacked = [_gather(x).contiguous() for x in sets]
    keys = [[padded[r, :, :length] for r, length in enumerate(sets[0].lengths)] for padded in stacked]
    queries = [_pack(x.q, case.h_kv) for x in sets]
    like = sets[0].q
    scores = [like.new_empty(case.h_kv, rows, length) for length in sets[0].lengths]
    weights = [torch.rand_like(each) for each in scores]
    out = like.new_empty(case.batch, case.h_kv, rows, case.d_v)

    def each(i: int) -> Result:
        for r, k in enumerate(keys[i]):
            torch.matmul(queries[i][r], k.transpose(-1, -2), out=scores[r])
            torch.matmul(weights[r], k[..., : case.d_v], out=out[r])
        return None, None

    # Padded to the longest request: more arithmetic, two launches instead of two per request.
    all_scores = like.new_empty(case.batch, case.h_kv, rows, max(sets[0].lengths))
    all_weights = torch.rand_like(all_scores)

    def batched(i: int) -> Result:
        torch.matmul(queries[i], stacked[i].transpose(-1, -2), out=all_scores)
        torch.matmul(all_weights, stacked[i][..., : case.d_v], out=out)
        return None, None

    ways: dict[str, Callable[[int], Result]] = {"per request": each, "batched": batched}
    return _fastest("matmul", "torch.matmul twice, keys contiguous", ways, like.device)


def _gemm(case: Case, sets: Sets, target: Target) -> Contender | Refusal:
    size = 8192 if target.is_cuda else 2048
    like = sets[0].q
    a, b = (torch.randn(size, size, device=like.device, dtype=like.dtype) for _ in range(2))
    out = torch.empty_like(a)

    def call(i: int) -> Result:
        torch.mm(a, b, out=out)
        return None, None

    return Contender("gemm", "ceiling", "torch.mm", f"{size}^3", call, flops=2 * size**3)


def _flash_mla(case: Case, sets: Sets, target: Target) -> Contender | Refusal:
    rules = (
        (target.arch == "sm_90a", f"its dense decode is for sm_90a, this is {target.arch}"),
        (
            (case.dtype in ("bf16", "fp16") and case.layout == "plain")
            or (case.dtype, case.layout) == ("e4m3", "fp8_576"),
            f"it takes bf16 and fp16, and e4m3 over fp8_576, the case is {case.dtype} over {case.layout}",
        ),
        (case.page_size == 64, f"it takes pages of 64, the case has {case.page_size}"),
        ((case.d_qk, case.d_v) == (576, 512), f"it takes 576/512, the case is {case.d_qk}/{case.d_v}"),
    )
    broken = [why for holds, why in rules if not holds]
    try:
        module: Any = importlib.import_module("flash_mla")
    except (ImportError, OSError) as error:
        broken.append(f"cannot be imported ({error}); pip install --no-deps sgl-flash-mla")
    else:
        if str(getattr(module, "__name__", "")).startswith("openmla"):
            broken.append("the module named flash_mla here is OpenMLA's own interface; start without install()")
    if broken:
        return Refusal("flash_mla", "; ".join(broken))
    run = module.flash_mla_with_kvcache
    options: dict[str, Any] = {"causal": case.is_causal}
    if "use_legacy" in inspect.signature(run).parameters:
        options["use_legacy"] = True  # SGLang's fork keeps the Hopper kernels behind this name
    rows = case.s_q * case.h_q // case.h_kv
    if case.dtype == "e4m3":
        return _flash_mla_codes(module, case, sets, rows)
    metadata = [module.get_mla_metadata(x.cache_seqlens, rows, case.h_kv) for x in sets]

    def call(i: int) -> Result:
        x = sets[i]
        out, lse = run(
            x.q, x.kv_cache, x.block_table, x.cache_seqlens, case.d_v, *metadata[i],
            softmax_scale=x.softmax_scale, **options,
        )  # fmt: skip
        return out, lse

    version = version_of("sgl-flash-mla") or version_of("flash-mla") or "from source"
    return Contender("flash_mla", "peer", "flash_mla_with_kvcache", version, call)


def _flash_mla_codes(module: Any, case: Case, sets: Sets, rows: int) -> Contender | Refusal:
    """Its dense FP8 decode, a kernel of SGLang's fork: metadata of its own, a scale per tensor."""
    if "descale_k" not in inspect.signature(module.flash_mla_with_kvcache).parameters:
        return Refusal("flash_mla", "this build has no dense FP8 decode; pip install --no-deps sgl-flash-mla")
    one, metadata = torch.ones(1, device=sets[0].device), []
    for x in sets:
        filled, _ = module.get_mla_metadata()
        filled.tile_scheduler_metadata, filled.num_splits = module.get_mla_decoding_metadata(
            x.cache_seqlens, rows, case.h_kv, is_fp8_kvcache=True, use_legacy=True
        )
        metadata.append(filled)

    def call(i: int) -> Result:
        x = sets[i]
        out, lse = module.flash_mla_with_kvcache(
            x.q, x.kv_cache.view(torch.float8_e4m3fn), x.block_table, x.cache_seqlens, case.d_v, metadata[i],
            softmax_scale=x.softmax_scale, causal=case.is_causal, is_fp8_kvcache=True, use_legacy=True, descale_q=one,
            descale_k=one,
        )  # fmt: skip
        return out, lse

    version = version_of("sgl-flash-mla") or version_of("flash-mla") or "from source"
    return Contender("flash_mla", "peer", "flash_mla_with_kvcache, e4m3", version, call)


# FlexAttention's compiled form wants a CUDA device or a C++ compiler, and its first call compiles for seconds.
def _flex(case: Case, sets: Sets, target: Target) -> Contender | Refusal:
    from torch.nn.attention.flex_attention import flex_attention

    if case.is_causal and case.s_q > 1:
        return Refusal("flex", "its causal mask would have to be rebuilt per batch; not written")
    if case.lengths == "varlen":
        return Refusal("flex", "a batch of uneven lengths would compile once per request; not written")
    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def attend(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        out: torch.Tensor = compiled(q, k, k[..., : case.d_v], scale=sets[0].softmax_scale)
        return out

    ways = {"batched": _all_or_each(case, sets, attend)["batched"]}
    return _fastest("flex", "gather + torch.compile(flex_attention)", ways, sets[0].device)


def _import(names: Sequence[str], fix: str) -> tuple[Any, str]:
    """(the first module of these that can be imported, "") or (None, why not)."""
    why = ""
    for name in names:
        try:
            return importlib.import_module(name), ""
        except (ImportError, OSError) as error:
            why = why or f"cannot be imported ({error}); {fix}"
    return None, why


def _fa3(case: Case, sets: Sets, target: Target) -> Contender | Refusal:
    rules = (
        (target.arch == "sm_90a", f"it is for sm_90a, this is {target.arch}"),
        (case.dtype in ("bf16", "fp16"), f"it takes bf16 and fp16, the case is {case.dtype}"),
        ((case.d_qk, case.d_v) == (576, 512), f"its qv takes 576/512, the case is {case.d_qk}/{case.d_v}"),
    )
    broken = [why for holds, why in rules if not holds]
    module, why = _import(("fa3_fwd_interface", "flash_attn_interface"), "pip install --no-deps fa3-fwd")
    if broken or module is None:
        return Refusal("fa3", "; ".join([*broken, *([why] if why else [])]))
    options: dict[str, Any] = {
        "softmax_scale": sets[0].softmax_scale,
        "causal": case.is_causal,
        "return_softmax_lse": True,
    }
    d_v = case.d_v

    def paged(i: int) -> Result:
        x = sets[i]
        out, lse, *_ = module.flash_attn_with_kvcache(
            x.q[..., d_v:], x.kv_cache[..., d_v:], x.kv_cache[..., :d_v], qv=x.q[..., :d_v],
            cache_seqlens=x.cache_seqlens, page_table=x.block_table, **options,
        )  # fmt: skip
        return out, lse

    # Contiguous keys, gathered beforehand and not timed: what a server without pages has. It is given that advantage.
    forms: dict[str, Callable[[int], Result]] = {"pages": paged}
    padded = case.batch * max(sets[0].lengths) * case.h_kv * case.d_qk * 2 * len(sets)
    if padded <= _MOST_CONTIGUOUS:
        keys = [_gather(x).transpose(1, 2).contiguous() for x in sets]

        def contiguous(i: int) -> Result:
            x, k = sets[i], keys[i]
            out, lse, *_ = module.flash_attn_with_kvcache(
                x.q[..., d_v:], k[..., d_v:], k[..., :d_v], qv=x.q[..., :d_v], cache_seqlens=x.cache_seqlens, **options
            )
            return out, lse

        forms["contiguous keys"] = contiguous
    return _fastest("fa3", "flash_attn_with_kvcache(qv=)", forms, sets[0].device)


def _fa4(case: Case, sets: Sets, target: Target) -> Contender | Refusal:
    # Its absorbed MLA (CuTe DSL) has kernels for sm_100 alone; a port to sm_90 is proposed, not released (2026-11).
    if not target.arch.startswith("sm_100"):
        return Refusal("fa4", f"its absorbed MLA is for sm_100, this is {target.arch}; fa3 is its kernel for Hopper")
    return Refusal("fa4", "no adapter: nobody has run it beside OpenMLA on a Blackwell card yet")


_MOST_CONTIGUOUS = 12 << 30  # bytes of the copies; a larger batch runs on its pages


def _flashinfer(case: Case, sets: Sets, target: Target) -> Contender | Refusal:
    rules = (
        (target.is_cuda, f"it is for NVIDIA GPUs, this is {target.arch}"),
        (case.dtype in ("bf16", "fp16"), f"it takes bf16 and fp16, the case is {case.dtype}"),
        (case.h_kv == 1, f"its MLA has one KV head, the case has {case.h_kv}"),
        ((case.d_qk, case.d_v) == (576, 512), f"it takes 576/512, the case is {case.d_qk}/{case.d_v}"),
    )
    broken = [why for holds, why in rules if not holds]
    module, why = _import(("flashinfer.mla",), "pip install flashinfer-python")
    if broken or module is None:
        return Refusal("flashinfer", "; ".join([*broken, *([why] if why else [])]))
    pages = [-(-length // case.page_size) for length in sets[0].lengths]
    total_pages = sum(pages)
    begin = torch.tensor([0, *itertools.accumulate(pages)], dtype=torch.int32)
    runs = []
    for x in sets:
        # The plan reads lengths on the host; made once, as for the others, and reused by every call.
        wrapper = module.BatchMLAPagedAttentionWrapper(
            torch.empty(256 << 20, dtype=torch.int8, device=x.device), backend="auto"
        )
        table = torch.cat([x.block_table[r, :count] for r, count in enumerate(pages)])
        assert table.numel() == total_pages
        wrapper.plan(
            torch.arange(case.batch + 1, dtype=torch.int32) * case.s_q, begin, table,
            torch.tensor(x.lengths, dtype=torch.int32), case.h_q, case.d_v, case.d_qk - case.d_v, case.page_size,
            case.is_causal, x.softmax_scale, case.torch_dtype, case.torch_dtype,
        )  # fmt: skip
        # Two caches, as its users keep them; split here, not timed.
        q, kv = x.q.flatten(0, 1), x.kv_cache[:, :, 0]
        split = [
            t.contiguous() for t in (q[..., : case.d_v], q[..., case.d_v :], kv[..., : case.d_v], kv[..., case.d_v :])
        ]
        runs.append((wrapper, split))

    def call(i: int) -> Result:
        wrapper, split = runs[i]
        return wrapper.run(*split).view(case.batch, case.s_q, case.h_q, case.d_v), None

    version = version_of("flashinfer-python") or "from source"
    return Contender("flashinfer", "peer", "BatchMLAPagedAttentionWrapper", version, call)


def _triton_usual(case: Case, sets: Sets, target: Target) -> Contender | Refusal:
    from openmla.backends.triton.config import is_installed, is_interpreted

    rope = case.d_qk - case.d_v
    rules = (
        (is_installed(), "triton is not installed: pip install openmla[triton]"),
        (target.is_cuda or is_interpreted(), "it needs an NVIDIA GPU, or TRITON_INTERPRET=1 and patience"),
        (
            not is_interpreted() or case.dtype != "bf16",
            "Triton's interpreter multiplies bf16 wrongly; use fp16 or fp32",
        ),
        (case.s_q == 1, f"it takes one query token, the case has {case.s_q}"),
        (case.h_kv == 1, f"it has one KV head, the case has {case.h_kv}"),
        (
            all(n >= 16 and n & (n - 1) == 0 for n in (case.d_v, rope)),
            f"its columns are powers of two of at least 16, the case has {case.d_v} and {rope}",
        ),
    )
    broken = [why for holds, why in rules if not holds]
    if broken:
        return Refusal("triton_usual", "; ".join(broken))
    from openmla.lab import usual_triton

    decode = usual_triton.UsualDecode(case.batch, case.h_q, case.d_v, sets[0].device)

    def call(i: int) -> Result:
        x = sets[i]
        return decode(x.q, x.kv_cache, x.block_table, x.cache_seqlens, x.softmax_scale, case.d_v)

    config = f"{usual_triton.HEADS} heads, {usual_triton.KEYS} keys, {usual_triton.SPLITS} splits"
    return Contender("triton_usual", "peer", "split-KV in two stages", config, call)


PEERS: dict[str, Callable[[Case, Sets, Target], Contender | Refusal]] = {
    "sdpa": _sdpa,
    "eager": _eager,
    "flex": _flex,
    "flash_mla": _flash_mla,
    "fa3": _fa3,
    "fa4": _fa4,
    "flashinfer": _flashinfer,
    "triton_usual": _triton_usual,
    "matmul": _matmul,
    "gemm": _gemm,
}


def peer(case: Case, sets: Sets, target: Target, name: str) -> Contender | Refusal:
    """The peer of that name, ready, or its reason. Raises ConfigError for a name that nobody has."""
    if name not in PEERS:
        raise ConfigError(f"unknown peer {name!r}; use one of: {', '.join(PEERS)}")
    reads = ("plain", "fp8_576") if name == "flash_mla" else ("plain",)
    if case.layout not in reads and name != "gemm":
        return Refusal(name, f"reads plain caches here, the case has the layout {case.layout}")
    try:
        return PEERS[name](case, sets, target)
    except (MemoryError, RuntimeError, AssertionError, ImportError, TypeError) as error:
        return Refusal(
            name, f"failed to start: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        )
