"""The oracle: attention as every kernel must compute it.

One function does the arithmetic (`_softmax_attention`); the four operations only say which keys a row sees.

    s_j   = softmax_scale * <q, k_j>             for every key j that the row sees
    lse   = ln sum_j exp(s_j)
    out   = sum_j exp(s_j - lse) * v_j           then, with a sink: out *= 1 / (1 + exp(sink - lse))

Precision
    fp64        the golden result; with_bounds=True adds the quantities of the tolerance rule
    fp32        the same lines in fp32
    bf16, fp16  what a kernel does: 64-key blocks, online softmax, fp32 accumulation, weights rounded to the dtype,
                partial results of `num_splits` stretches merged in fp32, output rounded once

What a row sees
    Causal is aligned to the bottom right: query i of s_q sees keys j <= s_k - s_q + i. A window of w keys keeps the
    last w of those, and implies the causal end. Lengths below 0 count as 0, lengths beyond the block table are cut.
    A page id outside [0, num_pages) makes its tokens absent, and so does an index that names no slot.
    A row that sees nothing has out 0, lse -inf, max_logits -inf, with or without a sink.

Numbers that are not finite
    A key that the row does not see never matters, whatever bytes it holds.
    A NaN logit makes the whole row NaN: out, lse and max_logits.
    A +inf logit does so too, except that max_logits is +inf: its weight would be exp(inf - inf).
    A -inf logit has weight 0. A row whose logits are all -inf has out 0 and lse -inf.
    A non-finite v element of a seen key follows IEEE arithmetic in its column: w * inf is inf, 0 * inf is NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal

import torch

from openmla.core.layout import KVLayout, kv_layout, plain_layout
from openmla.mods import Attachable, attach
from openmla.reference.modded import PLAIN, Scores, scores_of
from openmla.reference.quant import read_rows

Precision = Literal["fp64", "fp32", "bf16", "fp16"]
_WIDE: dict[str, torch.dtype] = {"fp64": torch.float64, "fp32": torch.float32}
_NARROW: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}

BLOCK_KEYS = 64  # keys per step of the emulated kernel; Hopper's KV tile


@dataclass(frozen=True)
class Bounds:
    """What the tolerance rule needs to know about each row. A, B, V1, V2 are shaped like out, the rest like lse.

    With p = softmax(s) over the n seen keys: A = sum p|v|, B = sum p^2 v^2, V1 = sum |v|, V2 = sum v^2,
    S = max_j |softmax_scale| * sum_i |q_i||k_ji|, L = sum_j exp(s_j - max s). All fp64; n is a count.
    A sink scales A and V1 by its factor (counted as 2^-96 at least), B and V2 by the factor's square.
    """

    A: torch.Tensor
    B: torch.Tensor
    V1: torch.Tensor
    V2: torch.Tensor
    S: torch.Tensor
    L: torch.Tensor
    n: torch.Tensor


@dataclass(frozen=True)
class Attention:
    """Result of one operation.

    out is shaped as the operation says; lse (natural log) and max_logits are out.shape[:-1], with the last two
    dimensions exchanged (heads before tokens) where `heads_first`.
    """

    out: torch.Tensor
    lse: torch.Tensor
    max_logits: torch.Tensor
    heads_first: bool
    bounds: Bounds | None = None

    def rows(self, per_row: torch.Tensor) -> torch.Tensor:
        """A tensor shaped like lse, rearranged to out.shape[:-1]."""
        return per_row.transpose(-1, -2) if self.heads_first else per_row


def _softmax_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, softmax_scale: float, scores: Scores
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out [..., m, d_v], lse [..., m], max_logits [..., m]) of q [..., m, d_qk] over the keys that each row sees.

    k [..., n, d_qk], v [..., n, d_v], seen [..., m, n] bool. Computes in the dtype of its inputs.
    """
    logits = scores.changed(softmax_scale * (q @ k.transpose(-1, -2))).masked_fill(~seen, -torch.inf)
    top = _max_keys(logits)
    if scores.has_activation:
        weights = scores.weights(logits)
        return _weighted_sum(weights, v, seen), torch.log(weights.sum(-1)), top
    shift = top.masked_fill(top == -torch.inf, 0)
    weights = torch.exp(logits - shift[..., None])
    total = weights.sum(-1)
    lse = shift + torch.log(total)
    out = _weighted_sum(weights, v, seen) / total.masked_fill(total == 0, 1)[..., None]
    return out, lse, top


def _max_keys(logits: torch.Tensor) -> torch.Tensor:
    """Maximum over the last dimension; -inf where it is empty, NaN where it holds one."""
    if logits.shape[-1] == 0:
        return logits.new_full(logits.shape[:-1], -torch.inf)
    return logits.amax(-1)


def _weighted_sum(weights: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Weights @ v, except that an unseen key adds nothing even where v is not finite (0 * NaN is NaN)."""
    finite = v.isfinite()
    out = weights @ v.masked_fill(~finite, 0)
    suspects = torch.atleast_2d((~finite).any(-1)).flatten(0, -2).any(0)
    if bool(suspects.any()):
        terms = weights[..., suspects, None] * v.masked_fill(finite, 0)[..., None, suspects, :]
        mine = seen[..., suspects, None] & ~finite[..., None, suspects, :]
        out = out + terms.masked_fill(~mine, 0).sum(-2)
    return out


def _emulated_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor,
    softmax_scale: float,
    dtype: torch.dtype,
    num_splits: int,
    scores: Scores,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`_softmax_attention` with the roundings of a kernel: inputs fp32 holding values of `dtype`."""
    blocks = -(-k.shape[-2] // BLOCK_KEYS)
    outs, lses, tops = [], [], []
    for split in range(num_splits):
        begin = split * blocks // num_splits * BLOCK_KEYS
        end = min((split + 1) * blocks // num_splits * BLOCK_KEYS, k.shape[-2])
        out, lse, top = online_softmax(
            q, k[..., begin:end, :], v[..., begin:end, :], seen[..., begin:end], softmax_scale, dtype, scores, begin
        )  # fmt: skip
        outs.append(out)
        lses.append(lse)
        tops.append(top)
    partial_lse, maxima = torch.stack(lses), torch.stack(tops)
    top = partial_lse.amax(0)
    shift = top.masked_fill(top == -torch.inf, 0)
    weights = torch.exp(partial_lse - shift)
    total = weights.sum(0)
    share = torch.ones_like(weights) if scores.has_activation else weights / total.masked_fill(total == 0, 1)
    merged = torch.zeros_like(outs[0])
    for part, weight in zip(outs, share, strict=True):
        merged = merged + weight[..., None] * part
    return merged, shift + torch.log(total), maxima.amax(0)


def online_softmax(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor,
    softmax_scale: float,
    dtype: torch.dtype,
    scores: Scores = PLAIN,
    first: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One split of the emulated kernel: fp32 (out, lse, max_logits) of one stretch of keys, block after block."""
    top = q.new_full(q.shape[:-1], -torch.inf)
    total = q.new_zeros(q.shape[:-1])
    out = q.new_zeros((*q.shape[:-1], v.shape[-1]))
    for begin in range(0, k.shape[-2], BLOCK_KEYS):
        block = slice(begin, begin + BLOCK_KEYS)
        logits = scores.changed(softmax_scale * (q @ k[..., block, :].transpose(-1, -2)), first + begin)
        logits = logits.masked_fill(~seen[..., block], -torch.inf)
        higher = torch.maximum(top, logits.amax(-1))
        if scores.has_activation:
            weights, rescale = scores.weights(logits, first + begin), torch.ones_like(top)
        else:
            shift = higher.masked_fill(higher == -torch.inf, 0)
            weights = torch.exp(logits - shift[..., None])
            rescale = torch.exp(top - shift)
        total = total * rescale + weights.sum(-1)
        rounded = weights.to(dtype).to(torch.float32)
        out = out * rescale[..., None] + _weighted_sum(rounded, v[..., block, :], seen[..., block])
        top = higher
    if scores.has_activation:
        return out, torch.log(total), top
    shift = top.masked_fill(top == -torch.inf, 0)
    return out / total.masked_fill(total == 0, 1)[..., None], shift + torch.log(total), top


def _bounds(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, softmax_scale: float, top: torch.Tensor,
    scores: Scores,
) -> Bounds:  # fmt: skip
    """The quantities of the tolerance rule, shapes as in `_softmax_attention`."""
    raw = softmax_scale * (q @ k.transpose(-1, -2))
    logits = scores.changed(raw).masked_fill(~seen, -torch.inf)
    if scores.has_activation:
        share = scores.weights(logits).abs()
        total = torch.ones_like(top)
    else:
        weights = torch.exp(logits - top.masked_fill(top == -torch.inf, 0)[..., None])
        total = weights.sum(-1)
        share = weights / total.masked_fill(total == 0, 1)[..., None]
    size = v.masked_fill(~v.isfinite(), 0).abs()
    count = seen.to(q.dtype).expand(share.shape)
    reach = scores.reach(raw, abs(softmax_scale) * (q.abs() @ k.abs().transpose(-1, -2))).masked_fill(~seen, 0)
    return Bounds(
        A=share @ size,
        B=share.square() @ size.square(),
        V1=count @ size,
        V2=count @ size.square(),
        S=_max_keys(reach).clamp_min(0),
        L=total,
        n=count.sum(-1),
    )


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor,
    softmax_scale: float,
    attn_sink: torch.Tensor | None,
    precision: Precision,
    with_bounds: bool,
    num_splits: int,
    scores: Scores = PLAIN,
    v_scale: float = 1.0,
) -> Attention:
    """Rows that share their keys: q [rows, h_q, d_qk], k [n, h_kv, d_qk], v [n, h_kv, d_v], seen [rows, n].

    seen may also be [h_kv, rows, n]. Results have [rows, h_q] in front; out is multiplied by v_scale.
    """
    rows, h_q, _ = q.shape
    h_kv = k.shape[1]
    wide = _WIDE.get(precision, torch.float32)
    if precision in _NARROW:
        q, k, v = (x.to(_NARROW[precision]) for x in (q, k, v))
    # [h_kv, rows * group, d]: the query heads of a KV head are rows of one matrix.
    group = h_q // h_kv
    q, k, v = (x.to(wide) for x in (q, k, v))
    q = q.reshape(rows, h_kv, group, q.shape[-1]).transpose(0, 1).reshape(h_kv, rows * group, q.shape[-1])
    k, v = k.transpose(0, 1), v.transpose(0, 1)
    seen = (seen if seen.dim() == 3 else seen[None]).expand(h_kv, rows, k.shape[1]).repeat_interleave(group, 1)
    seen = scores.visible(seen)
    # What nobody sees is masked anyway; zeros keep poisoned caches on the short path of _weighted_sum.
    used = seen.any(1)[..., None]
    k, v = k.masked_fill(~used, 0), v.masked_fill(~used, 0)

    if precision in _NARROW:
        out, lse, top = _emulated_attention(q, k, v, seen, softmax_scale, _NARROW[precision], num_splits, scores)
    else:
        out, lse, top = _softmax_attention(q, k, v, seen, softmax_scale, scores)

    def back(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(h_kv, rows, group, *x.shape[2:]).transpose(0, 1).reshape(rows, h_q, *x.shape[2:])

    bounds = None
    if with_bounds:
        found = _bounds(q, k, v, seen, softmax_scale, top, scores)
        bounds = Bounds(**{field.name: back(getattr(found, field.name)) for field in fields(Bounds)})
    result = _times(Attention(back(out), back(lse), back(top), False, bounds), v_scale, abs(v_scale))
    if attn_sink is not None:
        result = _apply_sink(result, attn_sink.to(wide))
    if precision in _NARROW:
        result = Attention(result.out.to(_NARROW[precision]), result.lse, result.max_logits, False)
    return result


def _times(result: Attention, factor: torch.Tensor | float, reach: torch.Tensor | float) -> Attention:
    """Out times `factor`, bounds as for values that are `reach` times as large."""
    bounds = result.bounds
    if bounds is not None:
        sizes = (bounds.A * reach, bounds.B * reach * reach, bounds.V1 * reach, bounds.V2 * reach * reach)
        bounds = Bounds(*sizes, bounds.S, bounds.L, bounds.n)
    return Attention(result.out * factor, result.lse, result.max_logits, False, bounds)


def _apply_sink(result: Attention, attn_sink: torch.Tensor) -> Attention:
    """Out *= 1 / (1 + exp(sink - lse)); lse and max_logits stay. An empty row stays 0, also for sink -inf."""
    factor = torch.sigmoid(result.lse - attn_sink).masked_fill(result.lse == -torch.inf, 1)[..., None]
    # A kernel has the factor in fp32, where exp overflows and tiny factors vanish: tolerances stop shrinking there.
    return _times(result, factor, factor.clamp_min(2.0**-96))


def _join(parts: list[Attention], lead: tuple[int, ...], heads_first: bool) -> Attention:
    """Groups of rows in order -> one result whose rows are shaped `lead`."""

    def per_row(tensors: list[torch.Tensor]) -> torch.Tensor:
        flat = torch.cat(tensors)
        shaped = flat.reshape(*lead, *flat.shape[1:])
        return shaped.transpose(-1, -2).contiguous() if heads_first else shaped

    def per_element(tensors: list[torch.Tensor]) -> torch.Tensor:
        flat = torch.cat(tensors)
        return flat.reshape(*lead, *flat.shape[1:])

    known = [part.bounds for part in parts if part.bounds is not None]
    bounds = None
    if known:
        shapers = {"A": per_element, "B": per_element, "V1": per_element, "V2": per_element}
        names = [field.name for field in fields(Bounds)]
        bounds = Bounds(**{name: shapers.get(name, per_row)([getattr(b, name) for b in known]) for name in names})
    return Attention(
        per_element([part.out for part in parts]),
        per_row([part.lse for part in parts]),
        per_row([part.max_logits for part in parts]),
        heads_first,
        bounds,
    )


def _spans(cu_seqlens: torch.Tensor, total: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of each request; offsets are clamped to [0, total] and never fall."""
    begin = min(max(int(cu_seqlens[0]), 0), total)
    for offset in cu_seqlens[1:].tolist():
        end = max(min(offset, total), begin)
        yield begin, end
        begin = end


def _end_and_begin(s_q: int, s_k: int, is_causal: bool, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First key and end of the keys that each of the s_q queries sees, int64 [s_q] each."""
    end = torch.full((s_q,), s_k)
    if is_causal or window:
        end = (s_k - s_q + 1 + torch.arange(s_q)).clamp(0, s_k)
    begin = (end - window).clamp_min(0) if window else torch.zeros_like(end)
    return begin, end


def _band(s_q: int, s_k: int, is_causal: bool, window: int, device: torch.device) -> torch.Tensor:
    """Which keys each query sees, bool [s_q, s_k]."""
    begin, end = (x.to(device)[:, None] for x in _end_and_begin(s_q, s_k, is_causal, window))
    keys = torch.arange(s_k, device=device)[None]
    return (keys >= begin) & (keys < end)


def _read_heads(cache: torch.Tensor, layout: KVLayout, slots: torch.Tensor) -> torch.Tensor:
    """Rows of a paged cache, [n, h_kv, d_qk]; a slot of -1 reads zeros."""
    return torch.stack([read_rows(cache[:, :, head : head + 1], layout, slots) for head in range(cache.shape[2])], 1)


def _layout_of(cache: torch.Tensor, layout: KVLayout | str | None, d_v: int) -> KVLayout:
    return plain_layout(cache.dtype, cache.shape[-1], d_v) if layout is None else kv_layout(layout)


def decode(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *,
    softmax_scale: float,
    d_v: int,
    layout: KVLayout | str | None = None,
    is_causal: bool = False,
    window: int = 0,
    cu_seqlens_q: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    mods: Attachable = None,
    descale_q: torch.Tensor | None = None,
    descale_k: torch.Tensor | None = None,
    precision: Precision = "fp64",
    with_bounds: bool = False,
    num_splits: int = 1,
) -> Attention:
    """Dense decode over a paged latent cache; v is the first d_v columns of a key.

    Args:
        q: [batch, s_q, h_q, d_qk], or [total_q, h_q, d_qk] with cu_seqlens_q.
        kv_cache: [num_pages, page_size, h_kv, row_elements] in `layout` (None: plain elements).
        block_table: [batch, max_pages] integer. Page of each logical block.
        cache_seqlens: [batch] integer. Keys of each request, the new tokens' own included.
        softmax_scale: multiplies scores before softmax.
        d_v: columns of v.
        layout: byte format of the cache.
        is_causal, window: see the module docstring; window 0 means all keys.
        cu_seqlens_q: [batch + 1] integer offsets of each request's query rows.
        attn_sink: [h_q] fp32, natural-log units.
        mods: what `openmla.mods` changes; its meaning is `openmla.mods.attached`. An activation has lse = ln sum weights.
        descale_q, descale_k: one number each that codes of q and of the cache stand for the products with; None: 1.
        precision: see the module docstring.
        with_bounds: also return the quantities of the tolerance rule.
        num_splits: stretches of keys whose partial results are merged (bf16, fp16 only).

    Returns:
        out [batch, s_q, h_q, d_v], lse and max_logits [batch, h_q, s_q]; with cu_seqlens_q out
        [total_q, h_q, d_v], lse and max_logits [h_q, total_q]. Rows that belong to no request are empty rows.
    """
    found, (num_pages, page_size) = _layout_of(kv_cache, layout, d_v), kv_cache.shape[:2]
    q = q.to(torch.bfloat16) if q.dtype == torch.float8_e4m3fn else q  # exact
    of_q, v_scale = (1.0 if each is None else float(each) for each in (descale_q, descale_k))
    softmax_scale *= of_q * v_scale
    rows = q.reshape(-1, *q.shape[-2:])
    total = rows.shape[0]
    batch = block_table.shape[0]
    if cu_seqlens_q is None:
        spans = [(i * q.shape[1], (i + 1) * q.shape[1]) for i in range(batch)]
    else:
        spans = list(_spans(cu_seqlens_q, total))
    begin, end = (spans[0][0], spans[-1][1]) if spans else (0, 0)
    capacity = block_table.shape[1] * page_size
    nothing = kv_cache.new_zeros((0, kv_cache.shape[2], found.d_qk), dtype=q.dtype)
    attached = attach(mods)

    def attend(span: tuple[int, int], keys: torch.Tensor, present: torch.Tensor, request: int = 0) -> Attention:
        s_q, s_k = span[1] - span[0], keys.shape[0]
        seen = _band(s_q, s_k, is_causal, window, q.device) & present
        mine, scores = rows[slice(*span)], PLAIN
        if attached is not None and s_k:
            mine, scores = scores_of(attached, mine, request, s_k, kv_cache.shape[2], d_v)
        return _attend(
            mine, keys, keys[..., :d_v], seen, softmax_scale, attn_sink, precision, with_bounds, num_splits, scores, v_scale,
        )  # fmt: skip

    nobody = torch.zeros(0, dtype=torch.bool, device=q.device)
    parts = [attend((0, begin), nothing, nobody)]
    for request, span in enumerate(spans):
        position = torch.arange(min(max(int(cache_seqlens[request]), 0), capacity), device=q.device)
        page = block_table[request].to(torch.int64)[position // page_size]
        present = (page >= 0) & (page < num_pages)
        slots = torch.where(present, page * page_size + position % page_size, -1)
        parts.append(attend(span, _read_heads(kv_cache, found, slots), present, request))
    parts.append(attend((end, total), nothing, nobody))
    return _join(parts, tuple(q.shape[:-2]), heads_first=True)


def _selected(indices: torch.Tensor, length: int, num_slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(slots with -1 where absent, present) of the first `length` indices; the rest is absent."""
    slots = indices.to(torch.int64)
    within = torch.arange(slots.shape[-1], device=slots.device) < length
    present = within & (slots >= 0) & (slots < num_slots)
    return torch.where(present, slots, -1), present


def _lengths(topk_length: torch.Tensor | None, tokens: int, per_request: int, topk: int) -> list[int]:
    """Clamped topk_length of each token; a length per request serves all of its tokens."""
    if topk_length is None:
        return [topk] * tokens
    flat = topk_length.reshape(-1)
    if flat.shape[0] != tokens:
        flat = flat.repeat_interleave(per_request)
    return [min(max(int(length), 0), topk) for length in flat.tolist()]


def sparse_decode(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    indices: torch.Tensor,
    *,
    softmax_scale: float,
    d_v: int,
    layout: KVLayout | str | None = None,
    topk_length: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    extra_kv_cache: torch.Tensor | None = None,
    extra_indices: torch.Tensor | None = None,
    extra_topk_length: torch.Tensor | None = None,
    extra_layout: KVLayout | str | None = None,
    precision: Precision = "fp64",
    with_bounds: bool = False,
    num_splits: int = 1,
) -> Attention:
    """Each query token over its own slots of a paged cache with one KV head, and of a second cache if given.

    Args:
        q: [batch, s_q, h_q, d_qk] or [total_q, h_q, d_qk].
        kv_cache: [num_pages, page_size, 1, row_elements] in `layout` (None: plain elements).
        indices: [..., topk] integer, leading dimensions of q. Slot = page * page_size + offset. A slot listed
            twice counts twice.
        topk_length: [batch] or one per token; only that many first indices count.
        attn_sink: [h_q] fp32.
        extra_kv_cache, extra_indices, extra_topk_length, extra_layout: the same for the second cache; its keys
            follow those of the first.
        softmax_scale, d_v, precision, with_bounds, num_splits: as in `decode`.

    Returns:
        out [..., h_q, d_v]; lse and max_logits [batch, h_q, s_q] or [h_q, total_q].
    """
    rows = q.reshape(-1, *q.shape[-2:])
    tokens = rows.shape[0]
    per_request = q.shape[1] if q.dim() == 4 else 1
    sources = [(kv_cache, _layout_of(kv_cache, layout, d_v), indices, topk_length)]
    if extra_kv_cache is not None and extra_indices is not None:
        sources.append(
            (extra_kv_cache, _layout_of(extra_kv_cache, extra_layout, d_v), extra_indices, extra_topk_length)
        )
    chosen = []
    for cache, found, index, length in sources:
        flat = index.reshape(tokens, index.shape[-1])
        chosen.append((cache, found, flat, _lengths(length, tokens, per_request, flat.shape[1])))
    parts = [_no_rows(q, d_v, precision, with_bounds)]
    for token in range(tokens):
        keys, seen = [], []
        for cache, found, flat, lengths in chosen:
            slots, present = _selected(flat[token], lengths[token], cache.shape[0] * cache.shape[1])
            # Two caches may differ in dtype; fp32 holds bf16 and fp16 exactly.
            keys.append(_read_heads(cache, found, slots).to(torch.promote_types(q.dtype, torch.float32)))
            seen.append(present)
        k = torch.cat(keys)
        mask = torch.cat(seen)[None]
        row = rows[token : token + 1]
        parts.append(_attend(row, k, k[..., :d_v], mask, softmax_scale, attn_sink, precision, with_bounds, num_splits))
    return _join(parts, tuple(q.shape[:-2]), heads_first=True)


def _no_rows(q: torch.Tensor, d_v: int, precision: Precision, with_bounds: bool) -> Attention:
    """The result for zero rows: it fixes shape and dtype of what follows, also when nothing does."""
    key = q.new_zeros((0, 1, q.shape[-1]))
    seen = torch.zeros((0, 0), dtype=torch.bool, device=q.device)
    return _attend(
        q.reshape(-1, *q.shape[-2:])[:0], key, key[..., :d_v], seen, 1.0, None, precision, with_bounds, 1
    )  # fmt: skip


def sparse_prefill(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    *,
    softmax_scale: float,
    d_v: int,
    topk_length: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    precision: Precision = "fp64",
    with_bounds: bool = False,
    num_splits: int = 1,
) -> Attention:
    """Each query token over its own rows of an unpaged latent tensor.

    Args:
        q: [s_q, h_q, d_qk].
        kv: [s_kv, h_kv, d_qk]; v is the first d_v columns.
        indices: [s_q, h_kv, topk] integer rows of kv.
        topk_length: [s_q]; only that many first indices count.
        attn_sink: [h_q] fp32.
        softmax_scale, d_v, precision, with_bounds, num_splits: as in `decode`.

    Returns:
        out [s_q, h_q, d_v]; lse and max_logits [s_q, h_q].
    """
    heads = torch.arange(kv.shape[1], device=q.device)
    lengths = _lengths(topk_length, q.shape[0], 1, indices.shape[-1])
    parts = [_no_rows(q, d_v, precision, with_bounds)]
    for token in range(q.shape[0]):
        slots, present = _selected(indices[token], lengths[token], kv.shape[0])  # [h_kv, topk]
        if kv.shape[0]:
            k = kv[slots.clamp_min(0).transpose(0, 1), heads]  # [topk, h_kv, d_qk]
        else:
            k = kv.new_zeros((slots.shape[1], *kv.shape[1:]))
        row = q[token : token + 1]
        parts.append(
            _attend(
                row, k, k[..., :d_v], present[:, None], softmax_scale, attn_sink, precision, with_bounds, num_splits
            )
        )
    return _join(parts, (q.shape[0],), heads_first=False)


def prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    softmax_scale: float,
    is_causal: bool = False,
    precision: Precision = "fp64",
    with_bounds: bool = False,
    num_splits: int = 1,
) -> Attention:
    """Varlen multi-head attention; h_q may be a multiple of h_kv.

    Args:
        q: [total_q, h_q, d_qk].
        k: [total_k, h_kv, d_qk].
        v: [total_k, h_kv, d_v].
        cu_seqlens_q, cu_seqlens_k: [batch + 1] integer offsets of each request's rows.
        is_causal: bottom-right aligned, per request.
        softmax_scale, precision, with_bounds, num_splits: as in `decode`.

    Returns:
        out [total_q, h_q, d_v]; lse and max_logits [h_q, total_q]. Rows that belong to no request are empty rows.
    """
    total = q.shape[0]
    spans = list(zip(_spans(cu_seqlens_q, total), _spans(cu_seqlens_k, k.shape[0]), strict=True))
    begin, end = (spans[0][0][0], spans[-1][0][1]) if spans else (0, 0)
    parts = []
    for (q0, q1), (k0, k1) in [((0, begin), (0, 0)), *spans, ((end, total), (0, 0))]:
        seen = _band(q1 - q0, k1 - k0, is_causal, 0, q.device)
        parts.append(
            _attend(q[q0:q1], k[k0:k1], v[k0:k1], seen, softmax_scale, None, precision, with_bounds, num_splits)
        )
    return _join(parts, (total,), heads_first=True)
