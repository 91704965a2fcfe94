"""A submission with all points: whole requests where they are even enough, else one line of blocks cut where a part is full."""

import heapq
import math
from collections import Counter

Piece = tuple[int, int, int, int]  # part, request, begin, end
_FIXED = 2  # blocks that a piece costs beside its own
_CHUNK = 14  # of an invariant plan: 16 blocks per piece where 14 are work, and short enough for one long request


def _dealt(pieces: list[tuple[int, int, int]], num_parts: int) -> tuple[list[Piece], int]:
    """Pieces (request, begin, end), the longest first, each to the part with the least; and the busiest part."""
    load = [(0, part) for part in range(num_parts)]
    found = []
    for request, begin, end in sorted(pieces, key=lambda piece: piece[1] - piece[2]):
        busy, part = heapq.heappop(load)
        heapq.heappush(load, (busy + end - begin + _FIXED, part))
        found.append((part, request, begin, end))
    return found, max(load)[0]


def _along_the_line(blocks: list[int], num_parts: int) -> list[Piece]:
    """Requests behind one another; a part takes what fits until it is full."""
    full = math.ceil((sum(blocks) + _FIXED * (len(blocks) + num_parts)) / num_parts)
    found, part, left = list[Piece](), 0, full
    for request, length in enumerate(blocks):
        begin = 0
        while True:
            if left <= _FIXED and part + 1 < num_parts:
                part, left = part + 1, full
            is_last = part + 1 == num_parts
            end = length if is_last else min(length, begin + max(left - _FIXED, 1))
            found.append((part, request, begin, end))
            left -= end - begin + _FIXED
            begin = end
            if begin == length:
                break
    return found


def _merge(pieces: list[Piece]) -> float:
    most = max(Counter(request for _, request, _, _ in pieces).values())
    return 2 + most / 16 if most > 1 else 0


def plan(blocks: list[int], num_parts: int, invariant: bool) -> list[Piece]:
    """Who computes which KV blocks: pieces of requests with blocks[i] blocks, on parts 0 to num_parts - 1."""
    if invariant:
        pieces = []
        for request, length in enumerate(blocks):
            chunk = max(_CHUNK, math.ceil(length / num_parts))
            starts = range(0, max(length, 1), chunk)
            pieces += [(request, begin, min(begin + chunk, length)) for begin in starts]
        return _dealt(pieces, num_parts)[0]
    whole, busiest = _dealt([(request, 0, length) for request, length in enumerate(blocks)], num_parts)
    cut = _along_the_line(blocks, num_parts)
    load = [0] * num_parts
    for part, _, begin, end in cut:
        load[part] += end - begin + _FIXED
    return whole if busiest <= max(load) + _merge(cut) else cut
