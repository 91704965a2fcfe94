"""The four operations on a CPU as tasks of `attend`: which query rows share keys, and where their keys lie.

Values are looked at on the way, which costs nothing on a CPU: lengths are clamped, page ids and indices that name no
slot make their tokens absent, and each kind is reported once per call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise

import torch

from openmla.backends.base import DecodeOperands, PrefillOperands, SparseDecodeOperands, SparsePrefillOperands
from openmla.backends.torch.attend import TASK_ROWS, Attention, Pending, Sight, Task, TaskMods, Tile, tile_spans
from openmla.backends.torch.products import arithmetic_for
from openmla.backends.torch.reading import CacheReader, read_span
from openmla.backends.torch.workers import Scratch
from openmla.core.faults import Fault
from openmla.core.layout import KVLayout, plain_layout
from openmla.core.problem import DecodeProblem, PrefillProblem, SparseDecodeProblem, SparsePrefillProblem
from openmla.mods import Attached

Write = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


class _Found:
    """Faults of one call; threads add to it."""

    def __init__(self) -> None:
        self._kinds: set[Fault] = set()

    def add(self, fault: Fault) -> None:
        self._kinds.add(fault)

    def clamp(self, raw: Sequence[int], most: int, below: Fault, above: Fault) -> list[int]:
        """Lengths within [0, most]."""
        if raw and min(raw) < 0:
            self.add(below)
        if raw and max(raw) > most:
            self.add(above)
        return [min(max(length, 0), most) for length in raw]

    def offsets(self, cu_seqlens: torch.Tensor, total: int) -> list[int]:
        """Offsets within [0, total], none below the one before it."""
        raw = cu_seqlens.tolist()
        offsets = rising_offsets(raw, total)
        if offsets != raw or raw[0] != 0 or raw[-1] != total:
            self.add(Fault.CU_SEQLENS_NOT_MONOTONE)
        return offsets

    def report(self, word: torch.Tensor) -> None:
        """OR into the fault word."""
        bits = 0
        for fault in self._kinds:
            bits |= int(fault)
        if bits:
            word |= bits


def rising_offsets(raw: Sequence[int], total: int) -> list[int]:
    """Offsets clamped to [0, total], none below the one before it."""
    offsets: list[int] = []
    for each in raw:
        offsets.append(max(min(max(each, 0), total), offsets[-1] if offsets else 0))
    return offsets


def _blocks(tokens: int, group: int) -> Iterator[tuple[int, int]]:
    """Query tokens [first, last) that make one task: as many whole tokens as fit into TASK_ROWS rows."""
    step = max(TASK_ROWS // group, 1)
    for first in range(0, tokens, step):
        yield first, min(first + step, tokens)


def _sees(first: int, last: int, s_q: int, s_k: int, is_causal: bool, window: int, group: int) -> Sight | None:
    """The keys of query tokens [first, last) of a request, one row per token and head; None: all s_k."""
    if not is_causal and not window:
        return None
    end = (torch.arange(first, last, device="cpu") + (s_k - s_q + 1)).clamp_(0, s_k)
    begin = (end - window).clamp_(min=0) if window else torch.zeros_like(end)
    return Sight(begin.repeat_interleave(group), end.repeat_interleave(group))


def _reach(sight: Sight | None, s_k: int) -> tuple[int, int]:
    """The keys that any of the rows sees."""
    if sight is None:
        return 0, s_k
    return int(sight.begin.min()), int(sight.end.max())


def _writer(
    out: torch.Tensor, lse: torch.Tensor, attn_sink: torch.Tensor | None, top: torch.Tensor | None = None,
    factor: float = 1.0,
) -> Write:  # fmt: skip
    """Writes rows, times a factor, to out [tokens, group, d_v] and lse, top [tokens, group], views of the results."""
    tokens, group, d_v = out.shape

    def write(rows: torch.Tensor, row_lse: torch.Tensor, row_top: torch.Tensor) -> None:
        shaped = row_lse.view(tokens, group)
        rows = rows if factor == 1.0 else rows * factor
        if attn_sink is not None:
            # An empty row is 0 already, and would be NaN for a sink of -inf.
            share = torch.sigmoid(shaped - attn_sink).masked_fill_(shaped == -torch.inf, 1)
            rows = rows.mul_(share.view(-1, 1))
        out.copy_(rows.view(tokens, group, d_v))
        lse.copy_(shaped)
        if top is not None:
            top.copy_(row_top.view(tokens, group))

    return write


def decode(problem: DecodeProblem, operands: DecodeOperands) -> None:
    """Dense decode; see `DecodeOperands`."""
    found, group, size = _Found(), problem.h_q // problem.h_kv, problem.page_size
    arithmetic = arithmetic_for(problem.out_dtype, problem.d_qk, problem.d_v)
    q, out, lse = operands.q, operands.out, operands.lse
    q = q.to(problem.out_dtype)  # codes are exact in bf16
    of_q, of_k = (1.0 if each is None else each.item() for each in (operands.descale_q, operands.descale_k))
    if operands.cu_seqlens_q is None:
        spans = [(request, 0, problem.s_q) for request in range(problem.batch)]
    else:
        offsets = found.offsets(operands.cu_seqlens_q, problem.total_q)
        spans = [(0, first, last) for first, last in pairwise(offsets)]
        q, out, lse = q[None], out[None], lse[None]
        _clear(out[0], lse[0].t(), offsets)
    lengths = found.clamp(
        operands.cache_seqlens.tolist(), problem.max_pages * size, Fault.LENGTH_NEGATIVE, Fault.LENGTH_OVER_CAPACITY
    )
    readers = [
        CacheReader(operands.kv_cache, problem.layout, head, problem.d_v, arithmetic) for head in range(problem.h_kv)
    ]
    causal, window = problem.is_causal, problem.window
    if operands.mods is not None and operands.mods.rope is not None:
        q = operands.mods.rope.rotated(q, problem.d_v, _positions(spans, lengths, q.shape[:2]))

    def make(request: int, head: int, first: int, last: int, step: int) -> Task:
        row, start, stop = spans[request]
        s_k, tokens = lengths[request], slice(start + first, start + last)
        heads = slice(head * group, (head + 1) * group)
        sight = _sees(first, last, stop - start, s_k, causal, window, group)
        sink = None if operands.attn_sink is None else operands.attn_sink[heads]
        return Task(
            q[row, tokens, heads].reshape(-1, problem.d_qk),
            tile_spans(*_reach(sight, s_k), step),
            _read_pages(operands.block_table[request], size, readers[head], found),
            _writer(out[row, tokens, heads], lse[row, heads, tokens].t(), sink, factor=of_k),
            sight,
            None
            if operands.mods is None
            else _standing(operands.mods, request, heads, s_k - stop + start, first, last),
        )

    tasks = []
    for request, (s_k, (_, start, stop)) in enumerate(zip(lengths, spans, strict=True)):
        seen = min(s_k, window + stop - start) if window else s_k
        for first, last in _blocks(stop - start, group):
            step = arithmetic.tile_keys((last - first) * group)
            for head in range(problem.h_kv):
                tasks.append(Pending(-(-seen // step), partial(make, request, head, first, last, step)))
    Attention(arithmetic.products, problem.d_v, operands.softmax_scale * of_q * of_k).run(tasks)
    found.report(operands.fault_word)


def _positions(spans: Sequence[tuple[int, int, int]], lengths: Sequence[int], shape: torch.Size) -> torch.Tensor:
    """Position of each query token in its request, int32 [rows, tokens]; spans are (row, first token, last)."""
    found = torch.zeros(shape, dtype=torch.int32, device="cpu")
    for (row, start, stop), s_k in zip(spans, lengths, strict=True):
        found[row, start:stop] = torch.arange(s_k - stop + start, s_k, dtype=torch.int32, device="cpu")
    return found


def _standing(mods: Attached, request: int, heads: slice, before: int, first: int, last: int) -> TaskMods:
    """Where the rows of query tokens [first, last) and `heads` stand, token after token; `before`: s_k - s_q."""
    h = torch.arange(heads.start, heads.stop, dtype=torch.int32, device="cpu")
    q_idx = torch.arange(before + first, before + last, dtype=torch.int32, device="cpu")
    return TaskMods(
        mods, torch.tensor(request, dtype=torch.int32, device="cpu"), h.repeat(last - first)[:, None],
        q_idx.repeat_interleave(h.shape[0])[:, None],
    )  # fmt: skip


def _read_pages(
    table: torch.Tensor, page_size: int, reader: CacheReader, found: _Found
) -> Callable[[int, int, Scratch], Tile]:
    def read(first: int, last: int, scratch: Scratch) -> Tile:
        begin = first // page_size
        pages = table[begin : (last - 1) // page_size + 1]
        tile, has_bad_page = reader.pages(pages, first - begin * page_size, last - first, scratch)
        if has_bad_page:
            found.add(Fault.PAGE_OUT_OF_RANGE)
        return tile

    return read


def _clear(out: torch.Tensor, lse: torch.Tensor, offsets: Sequence[int]) -> None:
    """Empty rows for the tokens of out [total_q, ...] and lse [total_q, h_q] that no request owns."""
    ends = (slice(0, offsets[0]), slice(offsets[-1], None)) if offsets else (slice(None),)
    for tokens in ends:
        out[tokens] = 0
        lse[tokens] = -torch.inf


def sparse_decode(problem: SparseDecodeProblem, operands: SparseDecodeOperands) -> None:
    """Sparse decode; see `SparseDecodeOperands`."""
    found, rows = _Found(), operands.q.shape[:-2]
    arithmetic = arithmetic_for(problem.dtype, problem.d_qk, problem.d_v)
    sources = [
        _Selected(
            CacheReader(operands.kv_cache, problem.layout, 0, problem.d_v, arithmetic),
            problem.num_pages * problem.page_size, operands.indices, operands.topk_length, rows, found,
        )
    ]  # fmt: skip
    extra = problem.extra
    if extra is not None and operands.extra_kv_cache is not None and operands.extra_indices is not None:
        sources.append(
            _Selected(
                CacheReader(operands.extra_kv_cache, extra.layout, 0, problem.d_v, arithmetic),
                extra.num_pages * extra.page_size, operands.extra_indices, operands.extra_topk_length, rows, found,
            )
        )  # fmt: skip
    q = operands.q.reshape(-1, problem.h_q, problem.d_qk)
    s_q = rows[1] if len(rows) == 2 else 1
    step = arithmetic.tile_keys(problem.h_q)

    def make(token: int) -> Task:
        out = operands.out[token // s_q, token % s_q] if len(rows) == 2 else operands.out[token]
        lse = operands.lse[token // s_q, :, token % s_q] if len(rows) == 2 else operands.lse[:, token]
        return Task(q[token], *_selected_keys(sources, token, step), _writer(out[None], lse[None], operands.attn_sink))

    tasks = [
        Pending(sum(-(-source.lengths[token] // step) for source in sources), partial(make, token))
        for token in range(rows.numel())
    ]
    Attention(arithmetic.products, problem.d_v, operands.softmax_scale).run(tasks)
    found.report(operands.fault_word)


class _Selected:
    """The slots that query tokens picked from one cache."""

    def __init__(
        self, reader: CacheReader, num_slots: int, indices: torch.Tensor, topk_length: torch.Tensor | None,
        rows: torch.Size, found: _Found,
    ) -> None:  # fmt: skip
        topk = indices.shape[-1]
        self.reader, self.num_slots, self.found = reader, num_slots, found
        self.indices = indices.reshape(rows.numel(), topk)
        self.lengths = [topk] * rows.numel()
        if topk_length is not None:
            if topk_length.dim() < len(rows):
                topk_length = topk_length[:, None].expand(rows)
            fault = Fault.TOPK_LENGTH_OUT_OF_RANGE
            self.lengths = found.clamp(topk_length.reshape(-1).tolist(), topk, fault, fault)

    def slots(self, token: int) -> torch.Tensor:
        """The slots of one token that exist, int64, in order; so a -1 more or less changes no bit."""
        raw = self.indices[token, : self.lengths[token]].long()
        exists = (raw >= 0) & (raw < self.num_slots)
        kept = raw[exists]
        if kept.shape[0] < raw.shape[0] and bool((raw[~exists] != -1).any()):
            self.found.add(Fault.INDEX_OUT_OF_RANGE)
        return kept


def _selected_keys(
    sources: Sequence[_Selected], token: int, step: int
) -> tuple[list[tuple[int, int]], Callable[[int, int, Scratch], Tile]]:
    """Spans over the tokens' slots in one cache after the other, and what reads them. No tile mixes two caches."""
    picked = [source.slots(token) for source in sources]
    split = picked[0].shape[0]
    spans = tile_spans(0, split, step)
    for others in picked[1:]:
        spans += [(split + first, split + last) for first, last in tile_spans(0, others.shape[0], step)]

    def read(first: int, last: int, scratch: Scratch) -> Tile:
        index, start = (0, 0) if first < split else (1, split)
        return sources[index].reader.slots(picked[index][first - start : last - start], None, scratch)

    return spans, read


def sparse_prefill(problem: SparsePrefillProblem, operands: SparsePrefillOperands) -> None:
    """Sparse prefill; see `SparsePrefillOperands`."""
    found, group = _Found(), problem.h_q // problem.h_kv
    arithmetic = arithmetic_for(problem.dtype, problem.d_qk, problem.d_v)
    step = arithmetic.tile_keys(group)
    layout: KVLayout = plain_layout(problem.dtype, problem.d_qk, problem.d_v)
    sources = [
        _Selected(
            CacheReader(operands.kv[:, None], layout, head, problem.d_v, arithmetic),
            problem.s_kv, operands.indices[:, head], operands.topk_length, torch.Size((problem.s_q,)), found,
        )
        for head in range(problem.h_kv)
    ]  # fmt: skip

    def make(head: int, token: int) -> Task:
        heads, row = slice(head * group, (head + 1) * group), slice(token, token + 1)
        sink = None if operands.attn_sink is None else operands.attn_sink[heads]
        write = _writer(operands.out[row, heads], operands.lse[row, heads], sink, operands.max_logits[row, heads])
        return Task(operands.q[token, heads], *_selected_keys((sources[head],), token, step), write)

    tasks = [
        Pending(-(-source.lengths[token] // step), partial(make, head, token))
        for head, source in enumerate(sources)
        for token in range(problem.s_q)
    ]
    Attention(arithmetic.products, problem.d_v, operands.softmax_scale).run(tasks)
    found.report(operands.fault_word)


def prefill(problem: PrefillProblem, operands: PrefillOperands) -> None:
    """Varlen prefill; see `PrefillOperands`."""
    found, group = _Found(), problem.h_q // problem.h_kv
    arithmetic = arithmetic_for(problem.dtype, problem.d_qk, problem.d_v)
    offsets_q = found.offsets(operands.cu_seqlens_q, problem.total_q)
    offsets_k = found.offsets(operands.cu_seqlens_k, problem.total_k)
    _clear(operands.out, operands.lse.t(), offsets_q)

    def make(request: int, head: int, first: int, last: int, step: int) -> Task:
        start, stop = offsets_q[request : request + 2]
        keys, heads = slice(*offsets_k[request : request + 2]), slice(head * group, (head + 1) * group)
        s_k, tokens = keys.stop - keys.start, slice(start + first, start + last)
        sight = _sees(first, last, stop - start, s_k, problem.is_causal, 0, group)
        return Task(
            operands.q[tokens, heads].reshape(-1, problem.d_qk),
            tile_spans(*_reach(sight, s_k), step),
            read_span(operands.k[keys, head], operands.v[keys, head], arithmetic),
            _writer(operands.out[tokens, heads], operands.lse[heads, tokens].t(), None),
            sight,
        )

    tasks = []
    for request in range(problem.batch):
        s_q = offsets_q[request + 1] - offsets_q[request]
        s_k = offsets_k[request + 1] - offsets_k[request]
        for head in range(problem.h_kv):
            for first, last in _blocks(s_q, group):
                step = arithmetic.tile_keys((last - first) * group)
                seen = min(s_k, s_k - s_q + last) if problem.is_causal else s_k
                tasks.append(Pending(max(-(-seen // step), 0), partial(make, request, head, first, last, step)))
    Attention(arithmetic.products, problem.d_v, operands.softmax_scale).run(tasks)
    found.report(operands.fault_word)
