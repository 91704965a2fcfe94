"""Plans of forty batches: covered, timed by the task's model against a lower bound, and compared between batches."""

import math
from collections import defaultdict
from collections.abc import Callable
from functools import lru_cache
from random import Random
from typing import Any

from openmla.learn.course import Hint

Piece = tuple[int, int, int, int]
_PARTS = 132


@lru_cache(maxsize=1)
def _batches() -> list[list[int]]:
    random = Random(0)
    fixed = [
        [512],
        [2048],
        [0],
        [0, 0, 300],
        [64] * 128,
        [64] * 133,
        [256] * 16,
        [4] * 600,
        [1000, *[3] * 200],
        [512] * 64,
    ]
    drawn = [
        [max(0, round(random.gauss(64, 32))) for _ in range(random.choice((3, 17, 64, 128, 300)))] for _ in range(24)
    ]
    heavy = [[round(2 ** random.uniform(0, 10)) for _ in range(random.choice((8, 40, 150)))] for _ in range(6)]
    return fixed + drawn + heavy


def _time(pieces: list[Piece]) -> float:
    part_of: defaultdict[int, int] = defaultdict(int)
    cuts: defaultdict[int, int] = defaultdict(int)
    for part, request, begin, end in pieces:
        part_of[part] += end - begin + 2
        cuts[request] += 1
    most = max(cuts.values())
    return max(part_of.values()) + (2 + most / 16 if most > 1 else 0)


def _alone(length: int) -> float:
    """The best time of one request, if it had all parts to itself."""
    return min(math.ceil(length / n) + 2 + (2 + n / 16 if n > 1 else 0) for n in range(1, max(length, 1) + 1))


def _bound(blocks: list[int]) -> float:
    """No plan is faster: the mean of the parts with one piece per request, or the longest request alone."""
    return max((sum(blocks) + 2 * len(blocks)) / _PARTS, _alone(max(blocks)))


def _plans(work: Any, is_invariant: bool) -> list[tuple[list[int], list[Piece]]]:
    return [(each, list(work.plan(list(each), _PARTS, is_invariant))) for each in _batches()]


def _one_covered(blocks: list[int], pieces: list[Piece]) -> None:
    spans = defaultdict(list)
    for piece in pieces:
        part, request, begin, end = piece
        if not (0 <= part < _PARTS and 0 <= request < len(blocks) and 0 <= begin <= end <= blocks[request]):
            raise Hint(f"{piece} is outside: {len(blocks)} request(s), {_PARTS} parts")
        spans[request].append((begin, end))
    for request, length in enumerate(blocks):
        found, at = sorted(spans[request]), 0
        if not found:
            raise Hint(f"request {request} of {length} blocks has no piece; an empty one needs (part, request, 0, 0)")
        for begin, end in found:
            if begin != at or (begin == end and length):
                what = "twice" if begin < at else "by nobody" if begin > at else "in a piece of no block"
                raise Hint(f"blocks around {min(at, begin)} of request {request} ({length} blocks) are computed {what}")
            at = end
        if at != length:
            raise Hint(f"blocks from {at} on of request {request} ({length} blocks) are computed by nobody")


def _covered(work: Any) -> str:
    for is_invariant in (False, True):
        for blocks, pieces in _plans(work, is_invariant):
            _one_covered(blocks, pieces)
    return f"all blocks of {len(_batches())} batches, twice"


def _ratios(work: Any, is_invariant: bool) -> tuple[float, float, list[int]]:
    """(geometric mean, worst, the batch of the worst) of time over bound."""
    found = [(_time(pieces) / _bound(blocks), blocks) for blocks, pieces in _plans(work, is_invariant)]
    worst, batch = max(found, key=lambda each: each[0])
    return math.exp(sum(math.log(ratio) for ratio, _ in found) / len(found)), worst, batch


def _shown(blocks: list[int]) -> str:
    return f"{blocks}" if len(blocks) < 5 else f"{len(blocks)} requests of {min(blocks)} to {max(blocks)} blocks"


def _even(work: Any) -> str:
    mean, worst, batch = _ratios(work, False)
    if mean > 1.25 or worst > 2.2:
        raise Hint(f"{mean:.2f} times the bound in the mean, {worst:.2f} at worst: {_shown(batch)}")
    return f"{mean:.2f} times the bound in the mean, {worst:.2f} at worst"


def _few(work: Any) -> str:
    for blocks, pieces in _plans(work, False):
        if len(pieces) > len(blocks) + _PARTS:
            raise Hint(f"{len(pieces)} pieces for {_shown(blocks)}: cut only where a part is full")
    return "at most one cut per part"


def _cuts(plan: Callable[..., Any], blocks: list[int]) -> list[list[tuple[int, int]]]:
    found: list[list[tuple[int, int]]] = [[] for _ in blocks]
    for _, request, begin, end in plan(list(blocks), _PARTS, True):
        found[request].append((begin, end))
    return [sorted(each) for each in found]


def _invariant(work: Any) -> str:
    alone: dict[int, list[tuple[int, int]]] = {}
    for blocks in _batches():
        for order in (blocks, blocks[::-1]):
            for length, cuts in zip(order, _cuts(work.plan, order), strict=True):
                if alone.setdefault(length, cuts) != cuts:
                    raise Hint(
                        f"a request of {length} blocks is cut in {len(cuts)} here and in {len(alone[length])} there"
                    )
    mean, worst, batch = _ratios(work, True)
    if mean > 1.6:
        raise Hint(f"no batch mate matters, but {mean:.2f} times the bound, worst {worst:.2f}: {_shown(batch)}")
    return f"{len(alone)} lengths, always cut alike; {mean:.2f} times the bound"


CRITERIA = {"covered": _covered, "even": _even, "few pieces": _few, "invariant": _invariant}
