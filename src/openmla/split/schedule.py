"""Plans of dense decode: which part computes which KV blocks of which request.

Work is a line: the KV blocks of request 0, then of request 1, and so on. A *part* (a CTA group on a GPU, a
task group on a CPU) takes one contiguous stretch of that line, or a list of ranges of it; where a boundary falls inside a
request, the request is split and its pieces are merged by `openmla.split.combine`.

The plan's device form is the one that FlashMLA introduced, so that code which stores or copies it keeps working:

    tile_scheduler_metadata  int32 [num_parts, 8]  begin_req, end_req (inclusive), begin_block, end_block (exclusive,
                             of end_req), begin_split (index of the first piece within its request), 0, 0, 0.
                             An empty part has begin_req > end_req; it may stand anywhere.
    num_splits               int32 [batch + 1]     prefix sum of the number of pieces of each request

With lists of ranges it has `ranges * num_parts` rows: part p works on the rows p, p + num_parts, p + 2 num_parts, ... up to
its first empty one.

A request of length 0 has one piece, of zero blocks, so that its output rows are written by somebody.

Splitting has a price for the whole batch, `merge_blocks`: fp32 partials out and back, and their merge. In the model
T = busiest part + merge, in blocks of 64 tokens, a batch of 128 has (varlen: lengths from N(s, s / 2), mean of 20 draws;
mixed: the best plan that splits some requests only, its merge in proportion, found by trying every makespan):

    rows  parts  s      lengths   even + merge  whole  mixed  chosen
     128     66   4096  fixed         139 + 20    138    138  whole
     128     66  16384  fixed         512 + 20    522    522  whole
     128     66  32768  fixed        1008 + 20   1034   1028  even
     128     66   4096  varlen        141 + 20    222    157  even
     256     33   4096  fixed         273 + 40    276    276  whole
     256     33  16384  fixed        1018 + 40   1044   1044  whole
     256     33   4096  varlen        277 + 40    346    303  even (whole in 1 draw of 20)

Lists of ranges even out what stretches cannot. Requests are cut at multiples of one length or not at all; the whole chunks
as they come, then the last pieces of all requests, longest first, go over the parts there and back again. Every piece has
its seat by its rank alone, so a GPU deals all at once. T with the merge in proportion to the pieces that need one (varlen
cut to 2 s, mean of 10 draws):

    rows  parts  s      stretches  lists
     128     66   4096        152    141
     128     66   8192        277    272
     256     33   4096        289    278
     256     33   8192        539    534
      64    132   4096         77     75

Giving each piece to the least busy part instead, one after the other, is no better: 141, 271, 285, 548 and 74. From 16384
on even cuts are as good as lists.

Policies
    balanced         cost of a part = blocks + `overhead_blocks` per piece (pipeline fill and epilogue). Stretches: whole
                     requests where the busiest part then costs at most `merge_blocks` more than an even one
                     (`overhead_blocks` where there are no more requests than parts: parts would idle, and little is
                     merged); else even cuts. Lists: the cheapest of even cuts, whole requests dealt, and requests cut
                     near an even share (or that fraction of it which is nearest to two mean requests), where few
                     requests may be made to pay as well (`merge_from`).
    batch_invariant  requests are cut at multiples of `chunk_blocks` and nowhere else: which pieces a request has
                     depends on its own length only, so a row's bits do not depend on its batch mates. Lists deal them
                     longest first; stretches take about equally many each.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal, get_args

import torch

from openmla.core.errors import ProblemError

Policy = Literal["balanced", "batch_invariant"]
POLICIES: tuple[str, ...] = get_args(Policy)
# Even cuts of few requests give parts an end of one and a beginning of the next, whose rows they merge one after the other:
# 140.8 us in 68 pieces, 137.1 in 64, of four requests of 65536 (context_parallel.jsonl, look).
TWICE_BLOCKS = 2
MARGIN = 75  # thousandths
LONGEST_SORTED = 2**19 - 1  # blocks; longer pieces count as equal, so that a length and a request fit 32 bits


@dataclass(frozen=True)
class Piece:
    """KV blocks [begin_block, end_block) of one request, computed by one part."""

    part: int
    request: int
    split: int
    begin_block: int
    end_block: int


@dataclass(frozen=True)
class SplitPlan:
    """The result of `plan_decode`; immutable. `parts[i]` = (begin_req, end_req, begin_block, end_block, begin_split)."""

    policy: Policy
    block_tokens: int
    chunk_blocks: int  # 0 when pieces are cut only at part boundaries
    blocks: tuple[int, ...]  # KV blocks per request
    parts: tuple[tuple[int, int, int, int, int], ...]
    num_splits: tuple[int, ...]  # prefix sum, batch + 1 entries
    ranges: int = 1  # rows of a part: `parts` holds the first of every part, then the second of every part, ...

    @property
    def batch(self) -> int:
        """Number of requests."""
        return len(self.blocks)

    @property
    def num_pieces(self) -> int:
        """Pieces over all requests; the number of partial results when every piece stores one."""
        return self.num_splits[-1]

    def pieces(self) -> Iterator[Piece]:
        """Every piece, row by row: in the order of the line where parts are single stretches."""
        num_parts = len(self.parts) // self.ranges
        for index, (begin_req, end_req, begin_block, end_block, begin_split) in enumerate(self.parts):
            for request in range(begin_req, end_req + 1):
                begin = begin_block if request == begin_req else 0
                end = end_block if request == end_req else self.blocks[request]
                split = begin_split if request == begin_req else 0
                step = self.chunk_blocks or max(end - begin, 1)
                for start in range(begin, max(end, begin + 1), step):
                    yield Piece(index % num_parts, request, split, start, min(start + step, end))
                    split += 1

    def tile_scheduler_metadata(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """The parts as int32 [ranges * num_parts, 8]."""
        return torch.tensor([[*part, 0, 0, 0] for part in self.parts], dtype=torch.int32, device=device).view(-1, 8)

    def num_splits_tensor(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """num_splits as int32 [batch + 1]."""
        return torch.tensor(self.num_splits, dtype=torch.int32, device=device)


_EMPTY_PART = (0, -1, 0, 0, 0)


def plan_decode(
    cache_seqlens: Sequence[int],
    num_parts: int,
    *,
    policy: Policy = "balanced",
    block_tokens: int = 64,
    overhead_blocks: int = 5,
    merge_blocks: int | None = None,
    min_share_blocks: int = 1,
    margin: int = MARGIN,
    merge_from: int | None = None,
    chunk_tokens: int = 4096,
    ranges: int | None = None,
) -> SplitPlan:
    """Give the KV blocks of a batch to `num_parts` parts of about equal cost. A pure function.

    Args:
        cache_seqlens: tokens of each request; negative counts as 0.
        num_parts: number of workers, at least 1.
        policy: `balanced` or `batch_invariant` (module docstring).
        block_tokens: tokens per KV block, the unit of cutting.
        overhead_blocks: cost of starting one piece, in blocks (`balanced`). FlashMLA uses 5.
        merge_blocks: cost of splitting requests, in blocks (`balanced`): more requests than parts stay whole where the
            busiest part then costs at most this much more than an even one. None: overhead_blocks.
        min_share_blocks: use fewer parts rather than giving one less than this on average (`balanced`).
        margin: what a piece of a request that is cut where it is long may have more than an even share, in thousandths of it.
        merge_from: with `ranges`, the smallest batch that pays merge_blocks; smaller ones pay overhead_blocks. None:
            num_parts + 1.
        chunk_tokens: piece length of `batch_invariant`, a multiple of block_tokens.
        ranges: rows per part, see `ranges_needed`. None: a part is one stretch of the line.

    Raises:
        ProblemError: an argument is out of range.
    """
    wrong = []
    if num_parts < 1:
        wrong.append(f"num_parts must be at least 1, got {num_parts}; pass the number of workers")
    if policy not in POLICIES:
        wrong.append(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
    if block_tokens < 1:
        wrong.append(f"block_tokens must be at least 1, got {block_tokens}")
    elif chunk_tokens < block_tokens or chunk_tokens % block_tokens:
        wrong.append(f"chunk_tokens must be a positive multiple of block_tokens={block_tokens}, got {chunk_tokens}")
    if overhead_blocks < 0:
        wrong.append(f"overhead_blocks must be at least 0, got {overhead_blocks}")
    if merge_blocks is not None and merge_blocks < 0:
        wrong.append(f"merge_blocks must be at least 0, got {merge_blocks}")
    if min_share_blocks < 1:
        wrong.append(f"min_share_blocks must be at least 1, got {min_share_blocks}")
    if margin < 0:
        wrong.append(f"margin must be at least 0, got {margin}")
    if ranges is not None and ranges * num_parts < len(cache_seqlens):
        wrong.append(f"ranges * num_parts must be at least batch={len(cache_seqlens)}, got {ranges} * {num_parts}")
    if wrong:
        raise ProblemError("plan_decode", wrong)
    blocks = tuple(-(-max(int(length), 0) // block_tokens) for length in cache_seqlens)
    merge = overhead_blocks if merge_blocks is None else merge_blocks
    if policy == "batch_invariant":
        chunk = chunk_tokens // block_tokens
        if ranges is None:
            return _fixed_chunks(blocks, num_parts, block_tokens, chunk)
        pieces = sum(max(-(-count // chunk), 1) for count in blocks)
        if pieces > ranges * num_parts:
            raise ProblemError(
                "plan_decode", [f"ranges * num_parts must hold {pieces} pieces, got {ranges} * {num_parts}"]
            )
        return _deal(policy, blocks, num_parts, ranges, block_tokens, chunk)
    if ranges is not None:
        twice = TWICE_BLOCKS if 2 * len(blocks) < num_parts and merge > overhead_blocks else 0
        paid = merge if len(blocks) >= (num_parts + 1 if merge_from is None else merge_from) else overhead_blocks
        return _balanced_ranges(
            blocks, num_parts, ranges, block_tokens, overhead_blocks, paid, twice, min_share_blocks, margin
        )
    return _balanced(blocks, num_parts, block_tokens, overhead_blocks, merge, min_share_blocks)


def ranges_needed(batch: int, num_parts: int) -> int:
    """Rows per part that `balanced` plans of a batch can use: as many pieces as even cuts make."""
    return -(-batch // num_parts) + 1


def _balanced_ranges(
    blocks: tuple[int, ...], num_parts: int, ranges: int, block_tokens: int, overhead: int, merge: int, twice: int,
    min_share: int, margin: int,
) -> SplitPlan:  # fmt: skip
    """The cheapest of: whole requests dealt, requests cut where they are long dealt, even cuts of the line."""
    batch, spare = len(blocks), (_EMPTY_PART,) * ((ranges - 1) * num_parts)
    if not blocks:
        return SplitPlan("balanced", block_tokens, 0, blocks, (_EMPTY_PART,) * (ranges * num_parts), (0,), ranges)
    ends = list(accumulate(max(count + overhead, 1) for count in blocks))
    line = ends[-1] - overhead
    cuts = min(num_parts, max(line // min_share, 1))
    # Costs are in units of 1 / pieces of a block; even cuts make batch + num_parts - 1 pieces and pay for all.
    most = batch + num_parts
    least, chosen = (-(-line // cuts) + overhead + merge + twice) * most, 0
    for chunk in _chunks_to_try(blocks, ends[-1], num_parts, overhead, min_share, margin):
        whole = [max(count - 1, 0) // chunk for count in blocks]
        if batch + sum(whole) > min(most, ranges * num_parts):
            continue
        split = sum(count + 1 for count in whole if count)
        cost = _busiest(blocks, whole, chunk, num_parts, overhead) * most + merge * split
        if cost < least or (cost == least and not chosen):
            least, chosen = cost, chunk
    if chosen:
        return _deal("balanced", blocks, num_parts, ranges, block_tokens, chosen)
    parts, pieces = _even_cuts(blocks, ends, cuts, overhead)
    rows = (*parts, *(_EMPTY_PART,) * (num_parts - cuts), *spare)
    return SplitPlan("balanced", block_tokens, 0, blocks, rows, (0, *accumulate(pieces)), ranges)


def _chunks_to_try(
    blocks: Sequence[int], work: int, num_parts: int, overhead: int, min_share: int, margin: int
) -> list[int]:
    """Lengths at whose multiples requests may be cut: nowhere, then `margin` above an even share or two mean requests.

    Of fewer requests than half of the parts: the shortest, from `min_share` on, that gives no part two pieces. Even cuts of
    the line put the end of one request and the beginning of the next into the same part, two epilogues and two merges.

    Exactly an even share leaves no room for the last pieces beside whole chunks: 77 instead of 74 blocks with 64 rows of
    128 requests around 4096. Trying several lengths gains 0.4 % at most. The longer requests are, the less room they need:
    of 128 around 16384 the busiest of 132 parts has 275 blocks with 75 thousandths, 261 with 20.
    """
    batch, chunks = len(blocks), [max(*blocks, 1)]
    if 2 * batch >= num_parts:
        each = max((batch + num_parts) // (2 * num_parts), 1)  # pieces of that length in an even share
        share = -(-work // num_parts)
        chunks.append(max(share * (1000 + margin) // (1000 * each) - overhead, 1))
    else:
        low, high = min_share, chunks[0]
        while low < high:
            middle = (low + high) // 2
            if batch + sum(max(count - 1, 0) // middle for count in blocks) <= num_parts:
                high = middle
            else:
                low = middle + 1
        chunks.append(low)
    return chunks


def _by_length(blocks: Sequence[int], chunk: int) -> list[int]:
    """Requests in the order of their last pieces, longest first, then as they come."""
    last = [count - max(count - 1, 0) // chunk * chunk for count in blocks]
    return sorted(range(len(blocks)), key=lambda request: (-min(last[request], LONGEST_SORTED), request))


def _seat(rank: int, num_parts: int) -> tuple[int, int]:
    """(row, part) of the piece that comes as number `rank`: there and back again over the parts."""
    row, place = divmod(rank, num_parts)
    return row, num_parts - 1 - place if row % 2 else place


def _busiest(blocks: Sequence[int], whole: Sequence[int], chunk: int, num_parts: int, overhead: int) -> int:
    """Cost of the busiest part when whole chunks and then the last pieces of requests are dealt."""
    dealt = sum(whole)
    rows = dealt // num_parts
    load = [rows * (chunk + overhead)] * num_parts
    for rank in range(rows * num_parts, dealt):
        load[_seat(rank, num_parts)[1]] += chunk + overhead
    for rank, request in enumerate(_by_length(blocks, chunk), dealt):
        load[_seat(rank, num_parts)[1]] += blocks[request] - whole[request] * chunk + overhead
    return max(load)


def _deal(
    policy: Policy, blocks: tuple[int, ...], num_parts: int, ranges: int, block_tokens: int, chunk: int
) -> SplitPlan:
    """Cut requests at multiples of `chunk`; deal whole chunks as they come, then the last pieces, longest first."""
    rows = [_EMPTY_PART] * (ranges * num_parts)
    rank = 0

    def put(request: int, begin: int, end: int) -> None:
        row, part = _seat(rank, num_parts)
        rows[row * num_parts + part] = (request, request, begin, end, begin // chunk)

    whole = [max(count - 1, 0) // chunk for count in blocks]
    for request, count in enumerate(whole):
        for index in range(count):
            put(request, index * chunk, (index + 1) * chunk)
            rank += 1
    for request in _by_length(blocks, chunk):
        put(request, whole[request] * chunk, blocks[request])
        rank += 1
    splits = (0, *accumulate(count + 1 for count in whole))
    return SplitPlan(policy, block_tokens, chunk * (policy != "balanced"), blocks, tuple(rows), splits, ranges)


def _balanced(
    blocks: tuple[int, ...], num_parts: int, block_tokens: int, overhead: int, merge: int, min_share: int
) -> SplitPlan:
    """Whole requests where that is nearly even, else even cuts. Each part has a closed form: a GPU does all at once."""
    if not blocks:
        return SplitPlan("balanced", block_tokens, 0, blocks, (_EMPTY_PART,) * num_parts, (0,))
    ends = list(accumulate(max(count + overhead, 1) for count in blocks))  # where each request ends on the line
    line = ends[-1] - overhead  # without the first head
    cuts = min(num_parts, max(line // min_share, 1))
    dealt = _whole_requests(ends, num_parts, cuts)
    busiest = max(ends[end - 1] - (ends[begin - 1] if begin else 0) for begin, end in dealt if begin < end)
    if busiest <= -(-line // cuts) + overhead + (merge if len(blocks) > num_parts else overhead):
        whole = [(begin, end - 1, 0, blocks[end - 1], 0) if begin < end else _EMPTY_PART for begin, end in dealt]
        return SplitPlan("balanced", block_tokens, 0, blocks, tuple(whole), tuple(range(len(blocks) + 1)))
    parts, pieces = _even_cuts(blocks, ends, cuts, overhead)
    parts += [_EMPTY_PART] * (num_parts - cuts)
    return SplitPlan("balanced", block_tokens, 0, blocks, tuple(parts), (0, *accumulate(pieces)))


def _whole_requests(ends: list[int], num_parts: int, cuts: int) -> list[tuple[int, int]]:
    """[begin, end) of the requests of each part: one each where they suffice, else even cuts moved to the nearest end.

    The cut of part p stands at p / cuts of the line; a request belongs to the part in which its middle lies.
    """
    batch, line = len(ends), ends[-1]
    if batch <= num_parts:
        return [(min(part, batch), min(part + 1, batch)) for part in range(num_parts)]
    middles = [begin + end for begin, end in pairwise((0, *ends))]  # doubled
    bounds = [bisect_left(middles, part * 2 * line, key=lambda middle: middle * cuts) for part in range(cuts + 1)]
    return [*pairwise(bounds), *[(batch, batch)] * (num_parts - cuts)]


def _even_cuts(
    blocks: tuple[int, ...], ends: list[int], cuts: int, overhead: int
) -> tuple[list[tuple[int, int, int, int, int]], list[int]]:
    """Parts, and pieces per request, of even cuts of a virtual timeline.

    Request i occupies `overhead + blocks[i]` units (its head, then its blocks); a request without blocks occupies
    at least one, so that some part owns it. Part p takes the stretch [cut[p], cut[p + 1]) of that line and with it
    the blocks that lie inside. A part that starts in the middle of a request pays a head that is not on the line,
    the first part pays one that is: leaving the first head out before cutting evenly makes all parts cost the same.
    """
    line = ends[-1] - overhead  # without the first head

    def cut(part: int) -> int:
        return 0 if part == 0 else overhead + part * line // cuts

    def cuts_before(position: int) -> int:
        """How many of the cuts 0, 1, ... lie before a position that is past the first head."""
        return -(-(position - overhead) * cuts // line)

    # the line position of each request's first block, or of the piece that an empty request is
    first = [end - (count or max(overhead, 1)) for end, count in zip(ends, blocks, strict=True)]
    last = [begin + max(count, 1) - 1 for begin, count in zip(first, blocks, strict=True)]
    pieces = [
        cuts_before(begin + count) - cuts_before(begin + 1) + 1 if count else 1
        for begin, count in zip(first, blocks, strict=True)
    ]
    parts = []
    for part in range(cuts):
        low, high = cut(part), cut(part + 1)
        begin_request, end_request = bisect_left(last, low), bisect_left(first, high) - 1
        if begin_request > end_request:
            parts.append(_EMPTY_PART)
            continue
        begin_block = max(low - first[begin_request], 0)
        end_block = min(high - first[end_request], blocks[end_request])
        begin_split = part - cuts_before(first[begin_request] + 1) + 1 if begin_block else 0
        parts.append((begin_request, end_request, begin_block, end_block, begin_split))
    return parts, pieces


def _fixed_chunks(blocks: tuple[int, ...], num_parts: int, block_tokens: int, chunk: int) -> SplitPlan:
    """Cut every request into chunks; deal the chunks to the parts in order, as evenly as whole chunks allow."""
    chunks = [max(-(-count // chunk), 1) for count in blocks]
    starts = (0, *accumulate(chunks))
    total, parts, request = starts[-1], [], 0
    for index in range(num_parts):
        begin, end = index * total // num_parts, (index + 1) * total // num_parts
        if begin == end:
            parts.append(_EMPTY_PART)
            continue
        while starts[request + 1] <= begin:
            request += 1
        first, split = request, begin - starts[request]
        while starts[request + 1] < end:
            request += 1
        end_block = min((end - starts[request]) * chunk, blocks[request])
        parts.append((first, request, split * chunk, end_block, split))
    return SplitPlan("batch_invariant", block_tokens, chunk, blocks, tuple(parts), tuple(starts))
