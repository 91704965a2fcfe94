"""The four operations on any device, through `batched.attend`: which keys each query token reads, as tensors.

Bad values are masked and reported as they are met: a page id or index that names no slot makes its tokens absent,
lengths and offsets are clamped.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from openmla.backends.base import DecodeOperands, PrefillOperands, SparseDecodeOperands, SparsePrefillOperands
from openmla.backends.torch.batched import Modded, ReadKeys, apply_sink, attend, note
from openmla.backends.torch.rows import read_slots
from openmla.core.faults import Fault
from openmla.core.layout import KVLayout
from openmla.core.problem import DecodeProblem, PrefillProblem, SparseDecodeProblem, SparsePrefillProblem


def _requests(cu_seqlens: torch.Tensor, total: int, word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Clamped, rising offsets [batch + 1] int64, and the request of each of `total` tokens (batch: of none)."""
    raw = cu_seqlens.long()
    offsets = raw.clamp(0, total).cummax(0).values if raw.numel() else raw
    note(word, torch.cat((raw != offsets, raw[:1] != 0, raw[-1:] != total)), Fault.CU_SEQLENS_NOT_MONOTONE)
    tokens = torch.arange(total, device=raw.device)
    request = torch.searchsorted(offsets, tokens, right=True) - 1
    batch = raw.shape[0] - 1
    return offsets, torch.where((request < 0) | (request >= batch), batch, request)


def _clamp(raw: torch.Tensor, most: int, word: torch.Tensor, below: Fault, above: Fault) -> torch.Tensor:
    lengths = raw.long()
    note(word, lengths < 0, below)
    note(word, lengths > most, above)
    return lengths.clamp(0, most)


def decode(problem: DecodeProblem, operands: DecodeOperands) -> None:
    """Dense decode; see `DecodeOperands`."""
    word, batch = operands.fault_word, problem.batch
    capacity = problem.max_pages * problem.page_size
    lengths = _clamp(
        operands.cache_seqlens, capacity, word, Fault.LENGTH_NEGATIVE, Fault.LENGTH_OVER_CAPACITY
    )  # fmt: skip
    q = operands.q.reshape(problem.total_q, problem.h_q, problem.d_qk)
    for each in (operands.descale_q, operands.descale_k):
        q = q if each is None else q.to(torch.float32) * each
    tokens = torch.arange(problem.total_q, device=q.device)
    if operands.cu_seqlens_q is None:
        request = tokens // max(problem.s_q, 1)
        position, s_q = tokens % max(problem.s_q, 1), torch.full_like(tokens, problem.s_q)
    else:
        offsets, request = _requests(operands.cu_seqlens_q, problem.total_q, word)
        real = request.clamp_max(max(batch - 1, 0))
        first = offsets[real] if batch else torch.zeros_like(tokens)
        position, s_q = tokens - first, (offsets[real + 1] - first if batch else torch.zeros_like(tokens))
    owned = request < batch
    request = request.clamp_max(max(batch - 1, 0))
    s_k = torch.where(owned, lengths[request], 0) if batch else torch.zeros_like(tokens)
    end = s_k
    if problem.is_causal or problem.window:
        end = torch.minimum((s_k - s_q + position + 1).clamp_min(0), s_k)
    begin = (end - problem.window).clamp_min(0) if problem.window else torch.zeros_like(end)
    modded = None
    if operands.mods is not None:
        q_idx = (s_k - s_q + position).int()
        heads = torch.arange(problem.h_q, dtype=torch.int32, device=q.device)
        modded = Modded(operands.mods, request.int(), heads, q_idx)
        if operands.mods.rope is not None:
            q = operands.mods.rope.rotated(q, problem.d_v, q_idx)
    out, lse, _ = _per_head(
        q, problem.h_kv, problem.d_v, operands.softmax_scale, capacity if batch else 0,
        lambda head: _paged_keys(problem, operands, request, begin, end, head), modded,
    )  # fmt: skip
    out = out if operands.descale_k is None else out * operands.descale_k
    out = apply_sink(out, lse, operands.attn_sink)
    _store(operands.out, operands.lse, out, lse)


def _paged_keys(
    problem: DecodeProblem, operands: DecodeOperands, request: torch.Tensor, begin: torch.Tensor, end: torch.Tensor,
    head: int,
) -> ReadKeys:  # fmt: skip
    def read(tokens: torch.Tensor, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        position = first + torch.arange(count, device=tokens.device)
        wanted = (position >= begin[tokens, None]) & (position < end[tokens, None])
        pages = operands.block_table[request[tokens, None], position[None] // problem.page_size].long()
        exists = (pages >= 0) & (pages < problem.num_pages)
        note(operands.fault_word, wanted & ~exists, Fault.PAGE_OUT_OF_RANGE)
        slots = pages * problem.page_size + position % problem.page_size
        return _keys(operands.kv_cache, problem.layout, slots, wanted & exists, head, problem.d_v)

    return read


def _keys(
    cache: torch.Tensor, layout: KVLayout, slots: torch.Tensor, seen: torch.Tensor, head: int, d_v: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of slots [t, n]; where `seen` is false anything."""
    if cache.shape[0] == 0:
        k = torch.zeros((*slots.shape, layout.d_qk), device=slots.device)
    else:
        k = read_slots(cache, layout, torch.where(seen, slots, 0).flatten(), head).view(*slots.shape, -1)
    return k, k[..., :d_v], seen


def _per_head(
    q: torch.Tensor, h_kv: int, d_v: int, softmax_scale: float, capacity: int, reader: Callable[[int], ReadKeys],
    modded: Modded | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """`attend` per KV head; q [total, h_q, d_qk] -> out [total, h_q, d_v], lse and top [total, h_q]."""
    parts = []
    for head, each in enumerate(q.tensor_split(h_kv, 1)):
        mine = modded and modded._replace(h=modded.h.tensor_split(h_kv)[head])
        parts.append(attend(each, reader(head), capacity, d_v, softmax_scale, mine))
    outs, lses, tops = zip(*parts, strict=True)
    return torch.cat(outs, 1), torch.cat(lses, 1), torch.cat(tops, 1)


def _store(out: torch.Tensor, lse: torch.Tensor, found: torch.Tensor, found_lse: torch.Tensor) -> None:
    """Rows [total, h_q] into out [..., h_q, d_v] and lse [..., h_q, tokens]."""
    out.copy_(found.view(out.shape))
    lse.copy_(found_lse.view(out.shape[:-1]).transpose(-1, -2))


def sparse_decode(problem: SparseDecodeProblem, operands: SparseDecodeOperands) -> None:
    """Sparse decode; see `SparseDecodeOperands`."""
    lead = operands.q.shape[:-2]
    q = operands.q.reshape(-1, problem.h_q, problem.d_qk)
    word = operands.fault_word

    flat, lengths = _selection(operands.indices, operands.topk_length, lead, word)
    sources = [(operands.kv_cache, problem.layout, flat, lengths)]
    if problem.extra is not None and operands.extra_kv_cache is not None and operands.extra_indices is not None:
        flat, lengths = _selection(operands.extra_indices, operands.extra_topk_length, lead, word)
        sources.append((operands.extra_kv_cache, problem.extra.layout, flat, lengths))
    splits = [found[2].shape[1] for found in sources]

    def read(tokens: torch.Tensor, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        found, start = [], 0
        for (cache, layout, flat, lengths), topk in zip(sources, splits, strict=True):
            low, high = max(first - start, 0), min(first + count - start, topk)
            start += topk
            if low < high:
                num_slots = cache.shape[0] * cache.shape[1]
                slots, listed = _picked(flat[tokens, low:high], low, lengths[tokens], num_slots, word)
                found.append(_keys(cache, layout, slots, listed, 0, problem.d_v))
        ks, vs, seens = zip(*found, strict=True)
        return torch.cat([k.float() for k in ks], 1), torch.cat([v.float() for v in vs], 1), torch.cat(seens, 1)

    out, lse, _ = attend(q, read, sum(splits), problem.d_v, operands.softmax_scale)
    _store(operands.out, operands.lse, apply_sink(out, lse, operands.attn_sink), lse)


def _selection(
    indices: torch.Tensor, topk_length: torch.Tensor | None, lead: torch.Size, word: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(indices [total, topk], lengths [total]): the first `length` entries of a token count."""
    topk = indices.shape[-1]
    flat = indices.reshape(lead.numel(), topk)
    if topk_length is None:
        return flat, torch.full((flat.shape[0],), topk, device=flat.device)
    lengths = _clamp(topk_length, topk, word, Fault.TOPK_LENGTH_OUT_OF_RANGE, Fault.TOPK_LENGTH_OUT_OF_RANGE)
    if lengths.dim() < len(lead):
        lengths = lengths[:, None].expand(lead)
    return flat, lengths.reshape(-1)


def _picked(
    raw: torch.Tensor, first: int, lengths: torch.Tensor, num_slots: int, word: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(slots, seen) of indices raw [t, n] that begin at entry `first` of each token's list."""
    slots = raw.long()
    listed = first + torch.arange(raw.shape[1], device=raw.device) < lengths[:, None]
    exists = (slots >= 0) & (slots < num_slots)
    note(word, listed & ~exists & (slots != -1), Fault.INDEX_OUT_OF_RANGE)
    return slots, listed & exists


def sparse_prefill(problem: SparsePrefillProblem, operands: SparsePrefillOperands) -> None:
    """Sparse prefill; see `SparsePrefillOperands`."""
    word = operands.fault_word

    def reader(head: int) -> ReadKeys:
        flat, lengths = _selection(operands.indices[:, head], operands.topk_length, torch.Size((problem.s_q,)), word)

        def read(tokens: torch.Tensor, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            slots, seen = _picked(flat[tokens, first : first + count], first, lengths[tokens], problem.s_kv, word)
            k = operands.kv[torch.where(seen, slots, 0), head] if problem.s_kv else None
            if k is None:
                k = torch.zeros((*slots.shape, problem.d_qk), device=slots.device)
            return k, k[..., : problem.d_v], seen

        return read

    out, lse, top = _per_head(
        operands.q, problem.h_kv, problem.d_v, operands.softmax_scale, problem.topk, reader
    )  # fmt: skip
    operands.out.copy_(apply_sink(out, lse, operands.attn_sink))
    operands.lse.copy_(lse)
    operands.max_logits.copy_(top)


def prefill(problem: PrefillProblem, operands: PrefillOperands) -> None:
    """Varlen prefill; see `PrefillOperands`."""
    word = operands.fault_word
    offsets_q, request = _requests(operands.cu_seqlens_q, problem.total_q, word)
    offsets_k, _ = _requests(operands.cu_seqlens_k, problem.total_k, word)
    owned, request = request < problem.batch, request.clamp_max(max(problem.batch - 1, 0))
    tokens = torch.arange(problem.total_q, device=operands.q.device)
    if problem.batch:
        first = offsets_k[request]
        s_k = torch.where(owned, offsets_k[request + 1] - first, 0)
        end = s_k
        if problem.is_causal:
            s_q = offsets_q[request + 1] - offsets_q[request]
            end = torch.minimum((s_k - s_q + tokens - offsets_q[request] + 1).clamp_min(0), s_k)
    else:
        first = end = torch.zeros_like(tokens)

    def reader(head: int) -> ReadKeys:
        def read(block: torch.Tensor, begin: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            position = begin + torch.arange(count, device=block.device)
            seen = position < end[block, None]
            places = torch.where(seen, first[block, None] + position, 0)
            return operands.k[places, head], operands.v[places, head], seen

        return read

    out, lse, _ = _per_head(
        operands.q, problem.h_kv, problem.d_v, operands.softmax_scale, problem.total_k, reader
    )  # fmt: skip
    operands.out.copy_(out)
    operands.lse.copy_(lse.t())
