"""Decode of requests that begin alike: the common prefix is read once, not once per request."""

from __future__ import annotations

import torch

from openmla.core.errors import ProblemError
from openmla.core.layout import KVLayout
from openmla.ops import dispatch, native, parts
from openmla.ops.dispatch import LOG2_E, LseBase
from openmla.split.schedule import Policy


def decode_shared_prefix(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    prefix_table: torch.Tensor,
    prefix_seqlens: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *,
    cu_requests: torch.Tensor | None = None,
    max_requests: int | None = None,
    d_v: int = 512,
    softmax_scale: float | None = None,
    is_causal: bool = True,
    attn_sink: torch.Tensor | None = None,
    kv_layout: KVLayout | str | None = None,
    policy: Policy = "balanced",
    lse_base: LseBase = "e",
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`decode` over prefix + suffix per request, where groups of requests share their prefix.

    out[b, i, h] = softmax_j(softmax_scale * <q[b, i, h], k[j]>) @ v[j],  j over the prefix of b's group, then b's suffix

    Two calls of `decode`: one over each prefix, with all queries of its group as the rows of one request, and one over
    the suffixes. Their results are merged by the law of `openmla.split.combine`. KV read: sum(prefix) + sum(suffix)
    tokens instead of sum over requests of both. Worth it where the prefix is long beside the suffixes and shared by many.

    Args:
        q: [batch, s_q, h_q, d_qk] bf16|fp16|fp32.
        kv_cache: [num_pages, page_size, h_kv, d_qk], or bytes in kv_layout, as for `decode`; holds prefixes and suffixes.
        prefix_table: [groups, max_pages] int32.
        prefix_seqlens: [groups] int32, tokens of each prefix; 0 is legal.
        block_table: [batch, max_pages] int32, pages behind the prefix.
        cache_seqlens: [batch] int32, tokens behind the prefix, the s_q new ones included.
        cu_requests: [groups + 1] int32: group g has requests cu_requests[g] to cu_requests[g + 1]; default: one group.
        max_requests: most requests of a group; needed with cu_requests.
        d_v, softmax_scale, kv_layout, policy, backend: as for `decode`.
        is_causal: query i sees its suffix up to cache_seqlens - s_q + i; the prefix is seen whole.
        attn_sink: [h_q] fp32, as for `decode`; counts once.
        lse_base: "e" or "2".

    Returns:
        out: [batch, s_q, h_q, d_v], dtype of q; 0 where a query sees no key.
        lse: [batch, h_q, s_q] fp32; -inf where a query sees no key. Without attn_sink's share.

    Raises:
        ProblemError: shapes contradict each other; lists all violations.
        UnsupportedError: no permitted backend; lists every reason.

    Notes:
        Precision: both parts are rounded to the dtype of q, merged in fp32, and rounded again.
        Determinism: same inputs, same bits. CUDA graphs: safe after one warm call.
        Source: the merge law of FlashDecoding over parts of the keys; Hydragen (arXiv 2402.05099) for the rows.
    """
    _check(q, prefix_table, prefix_seqlens, block_table, cu_requests, max_requests)
    dispatch.check_lse_base("decode_shared_prefix", lse_base)
    batch, s_q, h_q, d_qk = q.shape
    scale = dispatch.scale_of(softmax_scale, d_qk)
    suffix, suffix_lse = native.decode(
        q, kv_cache, block_table, cache_seqlens, d_v=d_v, softmax_scale=scale, is_causal=is_causal,
        kv_layout=kv_layout, policy=policy, backend=backend,
    )  # fmt: skip
    if cu_requests is None:
        prefix, prefix_lse = native.decode(
            q.reshape(1, batch * s_q, h_q, d_qk), kv_cache, prefix_table, prefix_seqlens, d_v=d_v, softmax_scale=scale,
            kv_layout=kv_layout, policy=policy, backend=backend,
        )  # fmt: skip
        assert prefix_lse is not None, "asked for by default"
        prefix_lse = prefix_lse[0]
    else:
        prefix, prefix_lse = native.decode(
            q.reshape(batch * s_q, h_q, d_qk), kv_cache, prefix_table, prefix_seqlens, d_v=d_v, softmax_scale=scale,
            cu_seqlens_q=cu_requests * s_q, max_seqlen_q=(max_requests or 0) * s_q, kv_layout=kv_layout, policy=policy,
            backend=backend,
        )  # fmt: skip
    assert prefix_lse is not None, "asked for by default"
    assert suffix_lse is not None, "asked for by default"
    # The prefix's lse is [h_q, batch * s_q]: read in place, as [batch, h_q, s_q].
    out, lse = parts.merge(
        prefix.reshape(suffix.shape), prefix_lse.unflatten(1, (batch, s_q)).transpose(0, 1), suffix[None],
        suffix_lse[None], attn_sink=attn_sink, lse_factor=LOG2_E if lse_base == "2" else 1.0,
    )  # fmt: skip
    return out, lse


def _check(
    q: torch.Tensor, prefix_table: torch.Tensor, prefix_seqlens: torch.Tensor, block_table: torch.Tensor,
    cu_requests: torch.Tensor | None, max_requests: int | None,
) -> None:  # fmt: skip
    """What the two decodes cannot see; the rest is theirs to refuse."""
    wrong = []
    if q.dim() != 4:
        wrong.append(f"q must be [batch, s_q, h_q, d_qk], got shape {tuple(q.shape)}")
    groups = 1 if cu_requests is None else cu_requests.numel() - 1
    if prefix_table.dim() != 2 or prefix_table.shape[0] != groups:
        hint = "one group without cu_requests" if cu_requests is None else "one row per group of cu_requests"
        wrong.append(f"prefix_table must be [{groups}, max_pages] ({hint}), got {tuple(prefix_table.shape)}")
    if tuple(prefix_seqlens.shape) != (groups,):
        wrong.append(f"prefix_seqlens must be [{groups}], got {tuple(prefix_seqlens.shape)}")
    if q.dim() == 4 and block_table.shape[:1] != q.shape[:1]:
        wrong.append(f"block_table must have batch={q.shape[0]} rows, got {tuple(block_table.shape)}")
    if cu_requests is not None and max_requests is None:
        wrong.append("max_requests must be given beside cu_requests: the most requests of a group")
    if wrong:
        raise ProblemError("decode_shared_prefix", wrong)
