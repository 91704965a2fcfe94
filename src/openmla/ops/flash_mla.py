"""Drop-in for `flash_mla`: its names, signatures and conventions over OpenMLA's operations.

    from openmla import flash_mla            # instead of: import flash_mla
    openmla.flash_mla.install()              # for code that imports the name `flash_mla` itself

Conventions of the border, converted here and nowhere else: a row that sees no key has lse = +inf (inside: -inf), and
argument names are upstream's. Wider than upstream: any page size, any head count, bf16|fp16|fp32, plain caches in the
sparse form, sink and lengths everywhere. Narrower: none known; where upstream asserts, this raises ProblemError.

Metadata: the object form (`FlashMLASchedMeta`, filled by the first call) and the older tuple form (two int32
tensors) are both accepted, everywhere. Neither can go stale here: a call whose lengths differ from the metadata's is
planned anew instead of computing with wrong splits.

Source: deepseek-ai/FlashMLA, flash_mla/flash_mla_interface.py at 02fe0d0 and 9241ae3 (signatures).
"""

from __future__ import annotations

import re
import sys
from types import ModuleType
from typing import Any

import torch

from openmla.core.errors import ConfigError, ProblemError
from openmla.core.layout import KVLayout, kv_layout
from openmla.ops import native
from openmla.ops.flash_mla_metadata import (
    FlashMLASchedMeta,
    check_config,
    get_mla_metadata,
    is_current,
    metadata_of,
    repeated,
)
from openmla.ops.prefill import prefill
from openmla.split.schedule import Policy

__all__ = [
    "FlashMLASchedMeta",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
    "install",
]

# kv_format values of sgl-project/FlashMLA -> our layouts, named by format and size.
_KV_FORMATS = {
    "V32": "fp8_656",
    "V32_NO_ROPE": "fp8_528",
    "V4": "fp8_584",
    "V41": "fp8_528_mx",
    "V41_FP4": "fp4_288",
}
# Words of the native operations in what they raise -> upstream's.
_UPSTREAM_WORDS = {
    "kv_cache": "k_cache",
    "extra_kv_cache": "extra_k_cache",
    "extra_indices": "extra_indices_in_kvcache",
    "d_v": "head_dim_v",
    "is_causal": "causal",
    "kv_layout": "kv_format",
    "extra_kv_layout": "extra_kv_format",
    " unless cu_seqlens_q is given": "",
    "make a plan for this call with openmla.plan(...)": "call get_mla_metadata() for this shape",
}
_NATIVE_WORD = re.compile("|".join(rf"(?<!\w){re.escape(word)}(?!\w)" for word in _UPSTREAM_WORDS))
# What upstream deduces from the bytes of a row. 528 stands for two formats; upstream reads it as V4.1.
_BY_ROW_BYTES = {656: "fp8_656", 584: "fp8_584", 528: "fp8_528_mx", 288: "fp4_288", 576: "fp8_576"}


def flash_mla_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor | None,
    cache_seqlens: torch.Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta | torch.Tensor,
    num_splits: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool | None = False,
    indices: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    extra_k_cache: torch.Tensor | None = None,
    extra_indices_in_kvcache: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    extra_topk_length: torch.Tensor | None = None,
    *,
    kv_format: str | None = None,
    extra_kv_format: str | None = None,
    enable_batch_invariant: bool = False,
    use_legacy: bool = False,
    descale_q: torch.Tensor | None = None,
    descale_k: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """MLA decode over a paged KV cache, dense (block_table, cache_seqlens) or sparse (indices).

    out[b, i, h] = softmax_j(softmax_scale * <q[b, i, h], k[b, j]>) @ v[b, j],  v = k[..., :head_dim_v]

    Args:
        q: [batch, s_q, h_q, d_qk] bf16|fp16|fp32; e4m3 over a cache of 576 e4m3 codes per token (dense form), as
            sgl-flash-mla has it.
        k_cache: [num_pages, page_size, h_k, d_qk], or [num_pages, page_size, 1, bytes] with is_fp8_kvcache.
        block_table: [batch, max_pages] int32; not read in the sparse form.
        cache_seqlens: [batch] int32; not read in the sparse form.
        head_dim_v: value columns.
        tile_scheduler_metadata: FlashMLASchedMeta, or the tensor of the tuple form.
        num_splits: None with the object form; the second tensor of the tuple form.
        softmax_scale: default d_qk ** -0.5.
        causal: dense form only; bottom-right aligned.
        is_fp8_kvcache: the cache is in a byte layout; None: yes if it has one byte per element.
        indices: [batch, s_q, topk] int32; makes the call sparse.
        attn_sink: [h_q] fp32.
        extra_k_cache, extra_indices_in_kvcache: second cache and its indices (sparse form).
        topk_length, extra_topk_length: [batch] int32 (sparse form).
        kv_format, extra_kv_format: V32, V32_NO_ROPE, V4, V41, V41_FP4, or a layout name of ours. Default: from the bytes
            per row, as upstream does (528 is read as V41).
        enable_batch_invariant: the bits of a row do not depend on its batch mates.
        use_legacy: accepted and ignored: there is one implementation here.
        descale_q, descale_k: [1] fp32, what the codes of q and of k_cache stand for products with; default 1.
        out: output to write into.
        backend: as in `openmla.decode`.

    Returns:
        out: [batch, s_q, h_q, head_dim_v], dtype of q, bf16 for codes; 0 where a query sees no key.
        lse: [batch, h_q, s_q] fp32, natural log; +inf where a query sees no key.

    Raises:
        ProblemError: the inputs contradict each other.
        PlanMismatchError: the metadata was filled by a call with other shapes or options.
        UnsupportedError: no permitted backend.

    Notes:
        Determinism: bitwise for a fixed plan. CUDA graphs: safe after one warm call.
        Source: signature of deepseek-ai/FlashMLA.
    """
    options = (head_dim_v, softmax_scale, causal, is_fp8_kvcache, kv_format, enable_batch_invariant, backend)
    is_plain = (
        indices is None and extra_k_cache is None and extra_indices_in_kvcache is None and topk_length is None
        and extra_topk_length is None and descale_q is None and descale_k is None
    )  # fmt: skip
    if is_plain and num_splits is None and isinstance(tile_scheduler_metadata, FlashMLASchedMeta):
        try:
            again = repeated(
                tile_scheduler_metadata, options, q, k_cache, block_table, cache_seqlens, attn_sink, out
            )  # fmt: skip
        except ProblemError as error:
            raise _in_upstream_words(error) from None
        if again is not None:
            return again[0], _border_lse(again[1])
    is_bytes = isinstance(k_cache, torch.Tensor) and k_cache.dtype.itemsize == 1
    has_codes = isinstance(q, torch.Tensor) and q.dtype == torch.float8_e4m3fn
    is_quantised = is_bytes if is_fp8_kvcache is None or has_codes else bool(is_fp8_kvcache)
    meta = metadata_of(tile_scheduler_metadata, num_splits)
    layout = _layout_of(k_cache, is_quantised, kv_format, "k_cache")
    if meta is not None:
        check_config(meta, q, k_cache, causal, is_quantised, indices, extra_k_cache, extra_indices_in_kvcache)
    if indices is not None and causal:
        raise ProblemError("flash_mla_with_kvcache", ["causal must be False with indices: they are the mask"])
    if indices is not None and (descale_q is not None or descale_k is not None):
        raise ProblemError("flash_mla_with_kvcache", ["descale_q and descale_k are for the dense form; drop them"])
    has_extra = extra_k_cache is not None
    try:
        if indices is not None:
            result, lse = native.sparse_decode(
                q, k_cache, indices, kv_layout=layout, d_v=head_dim_v, softmax_scale=softmax_scale,
                topk_length=topk_length, attn_sink=attn_sink, extra_kv_cache=extra_k_cache,
                extra_indices=extra_indices_in_kvcache, extra_topk_length=extra_topk_length,
                extra_kv_layout=_layout_of(extra_k_cache, is_quantised, extra_kv_format, "extra_k_cache") if has_extra else None,
                out=out, backend=backend,
            )  # fmt: skip
        else:
            result, lse = _dense(
                q, k_cache, block_table, cache_seqlens, head_dim_v, meta, softmax_scale, causal, layout, attn_sink,
                (extra_k_cache, extra_indices_in_kvcache, topk_length, extra_topk_length), enable_batch_invariant, out,
                backend, (descale_q, descale_k),
            )  # fmt: skip
    except ProblemError as error:
        raise _in_upstream_words(error) from None
    assert lse is not None
    if is_plain and meta is not None and meta.plan is not None:
        meta.repeat, meta.options = (meta.plan.repeats or (None,))[0], options
    return result, _border_lse(lse)


def _in_upstream_words(error: ProblemError) -> ProblemError:
    """The same error, of this function and with the names of its arguments."""
    said = [_NATIVE_WORD.sub(lambda found: _UPSTREAM_WORDS[found[0]], each) for each in error.violations]
    return type(error)("flash_mla_with_kvcache", said)


def _border_lse(lse: torch.Tensor) -> torch.Tensor:
    """-inf inside, +inf at this border: upstream's mark of a row that sees no key. In place: one launch instead of three."""
    return lse.nan_to_num_(nan=torch.nan, posinf=torch.inf, neginf=torch.inf)


def _dense(
    q: torch.Tensor, k_cache: torch.Tensor, block_table: torch.Tensor | None, cache_seqlens: torch.Tensor | None,
    head_dim_v: int, meta: FlashMLASchedMeta | None, softmax_scale: float | None, causal: bool,
    layout: KVLayout | None, attn_sink: torch.Tensor | None, sparse_only: tuple[torch.Tensor | None, ...],
    enable_batch_invariant: bool, out: torch.Tensor | None, backend: str | None,
    descales: tuple[torch.Tensor | None, torch.Tensor | None],
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    if block_table is None or cache_seqlens is None or any(value is not None for value in sparse_only):
        names = ("extra_k_cache", "extra_indices_in_kvcache", "topk_length", "extra_topk_length")
        wrong = [
            f"{name} needs indices (the sparse form); drop it or pass indices"
            for name, value in zip(names, sparse_only, strict=True)
            if value is not None
        ]
        if block_table is None or cache_seqlens is None:
            wrong.append("block_table and cache_seqlens must be given when indices are not")
        raise ProblemError("flash_mla_with_kvcache", wrong)
    policy: Policy = "batch_invariant" if enable_batch_invariant else "balanced"
    # A cache of one query token sees everything up to its end with and without the causal mask.
    is_causal = causal and (not isinstance(q, torch.Tensor) or q.dim() != 4 or q.shape[1] != 1)
    plan = None
    if meta is not None and not torch.compiler.is_compiling():  # a traced graph plans inside the operation
        if meta.plan is not None and not is_current(meta.plan, cache_seqlens):
            meta.plan = None
        if meta.plan is None:
            meta.plan = native.plan(
                q, k_cache, block_table, cache_seqlens, policy=policy, d_v=head_dim_v, softmax_scale=softmax_scale, is_causal=is_causal,
                attn_sink=attn_sink, kv_layout=layout, backend=backend,
            )  # fmt: skip
            meta.tile_scheduler_metadata, meta.num_splits = meta.plan.tile_scheduler_metadata, meta.plan.num_splits
        plan = meta.plan
    return native.decode(
        q, k_cache, block_table, cache_seqlens, d_v=head_dim_v, softmax_scale=softmax_scale, is_causal=is_causal,
        attn_sink=attn_sink, kv_layout=layout, plan=plan, policy=policy, out=out, backend=backend,
        descale_q=descales[0], descale_k=descales[1],
    )  # fmt: skip


def _layout_of(cache: Any, is_quantised: bool, kv_format: str | None, name: str) -> KVLayout | None:
    if kv_format is not None:
        try:
            return kv_layout(_KV_FORMATS.get(kv_format, kv_format))
        except ConfigError as error:
            raise ProblemError("flash_mla_with_kvcache", [f"{error}, or {', '.join(_KV_FORMATS)}"]) from None
    if not is_quantised or not isinstance(cache, torch.Tensor):
        return None
    row_bytes = cache.shape[-1] * cache.dtype.itemsize
    if row_bytes not in _BY_ROW_BYTES:
        raise ProblemError(
            "flash_mla_with_kvcache",
            [
                f"{name} has {row_bytes} bytes per row; byte layouts have {', '.join(map(str, _BY_ROW_BYTES))}; "
                "pass is_fp8_kvcache=False for a plain cache or name the layout with kv_format="
            ],
        )
    return kv_layout(_BY_ROW_BYTES[row_bytes])


def flash_mla_sparse_fwd(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    *,
    use_legacy: bool = False,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sparse prefill over an unpaged latent KV tensor.

    out[i, h] = softmax_j(sm_scale * <q[i, h], kv[indices[i, g, j], g]>) @ kv[indices[i, g, j], g, :d_v]

    Args:
        q: [s_q, h_q, d_qk] bf16|fp16|fp32.
        kv: [s_kv, h_kv, d_qk], dtype of q.
        indices: [s_q, h_kv, topk] int32; -1 and s_kv or more select nothing.
        sm_scale: multiplies scores.
        d_v: value columns.
        attn_sink: [h_q] fp32.
        topk_length: [s_q] int32.
        use_legacy: accepted and ignored.
        out: output to write into.
        backend: as in `openmla.sparse_prefill`.

    Returns:
        out: [s_q, h_q, d_v], dtype of q.
        max_logits: [s_q, h_q] fp32; -inf where nothing is selected.
        lse: [s_q, h_q] fp32, natural log; +inf where nothing is selected.

    Raises:
        ProblemError: the inputs contradict each other.
        UnsupportedError: no permitted backend.

    Notes:
        Determinism: bitwise. CUDA graphs: safe after one warm call.
        Source: signature of deepseek-ai/FlashMLA.
    """
    result, max_logits, lse = native.sparse_prefill(
        q, kv, indices, d_v=d_v, softmax_scale=sm_scale, topk_length=topk_length, attn_sink=attn_sink, out=out,
        backend=backend,
    )  # fmt: skip
    return result, max_logits, _border_lse(lse)


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_qo: torch.Tensor,
    cu_seqlens_kv: torch.Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Varlen multi-head attention, differentiable.

    out[i, h] = softmax_j(softmax_scale * <q[i, h], k[j, g]>) @ v[j, g] within i's own sequence

    Args:
        q: [total_q, h_q, d_qk] bf16|fp16|fp32.
        k: [total_k, h_kv, d_qk], dtype of q.
        v: [total_k, h_kv, d_v], dtype of q.
        cu_seqlens_qo: [batch + 1] int32.
        cu_seqlens_kv: [batch + 1] int32.
        max_seqlen_qo, max_seqlen_kv: longest sequence of each side.
        dropout_p: must be 0.
        softmax_scale: default d_qk ** -0.5.
        causal: bottom-right aligned within each sequence.
        deterministic: accepted: both passes are always deterministic here.
        is_varlen: accepted: cu_seqlens are always honoured.
        backend: as in `openmla.prefill`.

    Returns:
        out: [total_q, h_q, d_v], dtype of q.
        lse: [total_q, h_q] fp32, natural log, strides (1, total_q); +inf where a query sees no key.

    Raises:
        ProblemError: the inputs contradict each other, or dropout_p is not 0.
        UnsupportedError: no permitted backend.

    Notes:
        Determinism: bitwise, forward and backward. CUDA graphs: forward safe after one warm call.
        Source: signature of deepseek-ai/FlashMLA.
    """
    if dropout_p != 0.0:
        raise ProblemError("flash_attn_varlen_func", [f"dropout_p must be 0.0: dropout is not built, got {dropout_p}"])
    out, lse = prefill(
        q, k, v, cu_seqlens_qo, cu_seqlens_kv, max_seqlen_qo, max_seqlen_kv, softmax_scale=softmax_scale,
        is_causal=causal, backend=backend,
    )  # fmt: skip
    return out, _border_lse(lse.clone()).T  # its own: backward reads what prefill gave


def flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    head_dim_qk: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`flash_attn_varlen_func` over q, k and v side by side in one tensor.

    qkv[i, h] = (q[i, h], k[i, h], v[i, h]) with head_dim_qk, head_dim_qk and the remaining columns

    Args:
        qkv: [total, heads, 2 * head_dim_qk + d_v] bf16|fp16|fp32.
        cu_seqlens: [batch + 1] int32.
        max_seqlen: longest sequence.
        head_dim_qk: columns of q and of k.
        dropout_p, softmax_scale, causal, deterministic, is_varlen, backend: as in `flash_attn_varlen_func`.

    Returns:
        out: [total, heads, d_v], dtype of qkv.
        lse: [total, heads] fp32, natural log.

    Raises:
        ProblemError: the inputs contradict each other.
        UnsupportedError: no permitted backend.

    Notes:
        Determinism: bitwise. Source: signature of deepseek-ai/FlashMLA.
    """
    _check_packed("flash_attn_varlen_qkvpacked_func", "qkv", qkv, 2 * head_dim_qk)
    q, k, v = qkv[..., :head_dim_qk], qkv[..., head_dim_qk : 2 * head_dim_qk], qkv[..., 2 * head_dim_qk :]
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, deterministic,
        is_varlen, backend=backend,
    )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    cu_seqlens_qo: torch.Tensor,
    cu_seqlens_kv: torch.Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    head_dim_qk: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`flash_attn_varlen_func` over k and v side by side in one tensor.

    kv[j, g] = (k[j, g], v[j, g]) with head_dim_qk and the remaining columns

    Args:
        q: [total_q, h_q, head_dim_qk] bf16|fp16|fp32.
        kv: [total_k, h_kv, head_dim_qk + d_v], dtype of q.
        cu_seqlens_qo: [batch + 1] int32.
        cu_seqlens_kv: [batch + 1] int32.
        max_seqlen_qo, max_seqlen_kv: longest sequence of each side.
        head_dim_qk: columns of k.
        dropout_p, softmax_scale, causal, deterministic, is_varlen, backend: as in `flash_attn_varlen_func`.

    Returns:
        out: [total_q, h_q, d_v], dtype of q.
        lse: [total_q, h_q] fp32, natural log.

    Raises:
        ProblemError: the inputs contradict each other.
        UnsupportedError: no permitted backend.

    Notes:
        Determinism: bitwise. Source: signature of deepseek-ai/FlashMLA.
    """
    _check_packed("flash_attn_varlen_kvpacked_func", "kv", kv, head_dim_qk)
    return flash_attn_varlen_func(
        q, kv[..., :head_dim_qk], kv[..., head_dim_qk:], cu_seqlens_qo, cu_seqlens_kv, max_seqlen_qo, max_seqlen_kv,
        dropout_p, softmax_scale, causal, deterministic, is_varlen, backend=backend,
    )  # fmt: skip


def _check_packed(op: str, name: str, packed: Any, taken: int) -> None:
    """A packed tensor is 3-d and has columns left for v."""
    if not isinstance(packed, torch.Tensor) or packed.dim() != 3 or taken < 1 or packed.shape[-1] <= taken:
        got = tuple(packed.shape) if isinstance(packed, torch.Tensor) else type(packed).__name__
        raise ProblemError(
            op, [f"{name} must be [total, heads, columns] with more than {taken} columns (head_dim_qk), got {got}"]
        )


def install() -> ModuleType:
    """Put this module into `sys.modules` as `flash_mla`, for code that imports that name.

    Call it before that code is imported. Raises ConfigError if another `flash_mla` is already loaded, so that two
    libraries never mix unnoticed.
    """
    here = sys.modules[__name__]
    loaded = sys.modules.get("flash_mla")
    if loaded is not None and loaded is not here:
        raise ConfigError(
            f"flash_mla is already loaded from {getattr(loaded, '__file__', 'an unknown place')}; "
            "call openmla.flash_mla.install() before it is imported, or uninstall that package"
        )
    sys.modules["flash_mla"] = here
    sys.modules["flash_mla.flash_mla_interface"] = here
    return here
