"""The operations as torch.library ops, for `torch.compile` and `torch.export`.

Eager calls never come through here: the dispatcher costs about 3 us a call and buys nothing there. The native
functions come here, by name, only while a graph is being traced; `openmla.ops` has registered them by then. Fakes state shapes, dtypes and devices, so a graph traces on a
machine that cannot run the kernels.
"""

from __future__ import annotations

from typing import Any

import torch

from openmla.ops import native, prefill

_LIBRARY = torch.library.Library("openmla", "DEF")

_LIBRARY.define(
    "decode(Tensor q, Tensor kv_cache, Tensor block_table, Tensor cache_seqlens, int d_v, float? softmax_scale, "
    "bool is_causal, int? window, Tensor? cu_seqlens_q, int? max_seqlen_q, Tensor? attn_sink, str? kv_layout, "
    "str policy, str lse_base, str? backend, Tensor? descale_q=None, Tensor? descale_k=None) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "sparse_decode(Tensor q, Tensor kv_cache, Tensor indices, str? kv_layout, int d_v, float? softmax_scale, "
    "Tensor? topk_length, Tensor? attn_sink, Tensor? extra_kv_cache, Tensor? extra_indices, "
    "Tensor? extra_topk_length, str? extra_kv_layout, str lse_base, str? backend) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "sparse_prefill(Tensor q, Tensor kv, Tensor indices, int d_v, float? softmax_scale, Tensor? topk_length, "
    "Tensor? attn_sink, str lse_base, str? backend) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "prefill(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_seqlen_q, "
    "int max_seqlen_k, float? softmax_scale, bool is_causal, str? backend) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "prefill_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens_q, "
    "Tensor cu_seqlens_k, int max_seqlen_q, int max_seqlen_k, float? softmax_scale, bool is_causal, str? backend)"
    " -> (Tensor, Tensor, Tensor)"
)


# --- what runs, and what it looks like ------------------------------------------------------------------------------


def _run_decode(
    q: torch.Tensor, kv_cache: torch.Tensor, block_table: torch.Tensor, cache_seqlens: torch.Tensor, d_v: int,
    softmax_scale: float | None, is_causal: bool, window: int | None, cu_seqlens_q: torch.Tensor | None,
    max_seqlen_q: int | None, attn_sink: torch.Tensor | None, kv_layout: str | None, policy: Any, lse_base: Any,
    backend: str | None, descale_q: torch.Tensor | None = None, descale_k: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    return native.decode(
        q, kv_cache, block_table, cache_seqlens, d_v=d_v, softmax_scale=softmax_scale, is_causal=is_causal,
        window=window, cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max_seqlen_q, attn_sink=attn_sink, kv_layout=kv_layout,
        policy=policy, lse_base=lse_base, backend=backend, descale_q=descale_q, descale_k=descale_k,
    )  # fmt: skip


def _run_sparse_decode(
    q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor, kv_layout: str | None, d_v: int,
    softmax_scale: float | None, topk_length: torch.Tensor | None, attn_sink: torch.Tensor | None,
    extra_kv_cache: torch.Tensor | None, extra_indices: torch.Tensor | None, extra_topk_length: torch.Tensor | None,
    extra_kv_layout: str | None, lse_base: Any, backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    return native.sparse_decode(
        q, kv_cache, indices, kv_layout=kv_layout, d_v=d_v, softmax_scale=softmax_scale, topk_length=topk_length,
        attn_sink=attn_sink, extra_kv_cache=extra_kv_cache, extra_indices=extra_indices,
        extra_topk_length=extra_topk_length, extra_kv_layout=extra_kv_layout, lse_base=lse_base, backend=backend,
    )  # fmt: skip


def _run_sparse_prefill(
    q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, d_v: int, softmax_scale: float | None,
    topk_length: torch.Tensor | None, attn_sink: torch.Tensor | None, lse_base: Any, backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    return native.sparse_prefill(
        q, kv, indices, d_v=d_v, softmax_scale=softmax_scale, topk_length=topk_length, attn_sink=attn_sink,
        lse_base=lse_base, backend=backend,
    )  # fmt: skip


def _heads_first(q: torch.Tensor) -> torch.Tensor:
    """An empty fp32 lse for that q."""
    shape = (q.shape[0], q.shape[2], q.shape[1]) if q.dim() == 4 else (q.shape[1], q.shape[0])
    return q.new_empty(shape, dtype=torch.float32)


def _fake_decode(
    q: torch.Tensor, kv_cache: torch.Tensor, block_table: torch.Tensor, cache_seqlens: torch.Tensor, d_v: int,
    *options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    dtype = torch.bfloat16 if q.dtype == torch.float8_e4m3fn else q.dtype
    return q.new_empty((*q.shape[:-1], d_v), dtype=dtype), _heads_first(q)


def _fake_sparse_decode(
    q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor, kv_layout: str | None, d_v: int, *options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty((*q.shape[:-1], d_v)), _heads_first(q)


def _fake_sparse_prefill(
    q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, d_v: int, *options: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    statistic = q.new_empty(q.shape[:2], dtype=torch.float32)
    return q.new_empty((*q.shape[:-1], d_v)), statistic, torch.empty_like(statistic)


def _fake_prefill(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty((q.shape[0], q.shape[1], v.shape[2])), _heads_first(q)


def _fake_prefill_backward(
    grad_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(each.new_empty(each.shape) for each in (q, k, v))  # type: ignore[return-value]


def _save_prefill(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, *ctx.rest = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k)
    ctx.mark_non_differentiable(lse)


def _prefill_gradient(ctx: Any, grad_out: torch.Tensor, _grad_lse: Any) -> tuple[torch.Tensor | None, ...]:
    dq, dk, dv = torch.ops.openmla.prefill_backward(grad_out, *ctx.saved_tensors, *ctx.rest)
    return (dq, dk, dv, *([None] * (2 + len(ctx.rest))))


for _name, _run, _fake in (
    ("decode", _run_decode, _fake_decode),
    ("sparse_decode", _run_sparse_decode, _fake_sparse_decode),
    ("sparse_prefill", _run_sparse_prefill, _fake_sparse_prefill),
    ("prefill", prefill.prefill_forward, _fake_prefill),
    ("prefill_backward", prefill.prefill_backward, _fake_prefill_backward),
):
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"openmla::{_name}", _fake, lib=_LIBRARY)
torch.library.register_autograd(
    "openmla::prefill", _prefill_gradient, setup_context=_save_prefill, lib=_LIBRARY
)  # fmt: skip
