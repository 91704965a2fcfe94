"""Who holds which page of the KV cache. Python integers only: no tensor, no device, no clock.

A request is a list of pages and a length; token t lies in slot `pages[t // page_size] * page_size + t % page_size`.
Every page is in exactly one of four states:

    free      nobody holds it, its content means nothing
    held      `refs` requests hold it; more than one after `fork`, or when a cached prefix was found
    cached    nobody holds it, but its tokens are known, so a later request with the same prefix gets it back
    reserved  never handed out (page 0 as the target of padding rows, say)

Sharing is safe because a page is written by its only holder or not at all: a request about to write into a page that
others hold too gets a copy of it first (copy-on-write). Full pages are never written again, so only the last page of
a request can need that.

The prefix cache finds pages by a digest of all tokens from the start of the request to the end of the page. Only
full pages are kept. Among cached pages the least recently freed goes first, and of one request the last page first,
because a page without the pages in front of it cannot be found.

Every method either succeeds or raises and leaves the state as it was. Not safe for use from two threads at once.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from openmla.core.errors import OutOfPagesError, ProblemError


@dataclass
class _Holding:
    """What one request holds."""

    pages: list[int] = field(default_factory=list)
    length: int = 0


@dataclass(frozen=True)
class Growth:
    """What `append` gave: where the tokens go, and the page copies (source, target) to make before writing any."""

    slots: list[int]
    copies: tuple[tuple[int, int], ...]


class PageAllocator:
    """Hands out `num_pages - reserved` pages of `page_size` tokens to requests (any hashable ids).

    Raises:
        ProblemError: num_pages, page_size or reserved make no sense.
    """

    def __init__(self, num_pages: int, page_size: int, *, reserved: int = 0) -> None:
        bad = []
        if num_pages < 1:
            bad.append(f"num_pages must be at least 1, got {num_pages}")
        if page_size < 1:
            bad.append(f"page_size must be at least 1 token, got {page_size}")
        if not 0 <= reserved <= max(num_pages, 0):
            bad.append(f"reserved must be 0 to num_pages={num_pages}, got {reserved}")
        if bad:
            raise ProblemError("PageAllocator", bad)
        self.num_pages, self.page_size, self.reserved = num_pages, page_size, reserved
        self._free = list(range(num_pages - 1, reserved - 1, -1))  # a stack: low ids first, warm pages again soon
        self._refs = [0] * num_pages
        self._holdings: dict[Hashable, _Holding] = {}
        self._page_of: dict[bytes, int] = {}  # digest -> page, for held and cached pages alike
        self._digest_of: dict[int, bytes] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # refs 0 and a digest; oldest first

    # What is there

    @property
    def num_free(self) -> int:
        """Pages that hold nothing."""
        return len(self._free)

    @property
    def num_evictable(self) -> int:
        """Pages that nobody holds but whose prefix can still be found."""
        return len(self._cached)

    @property
    def cached_pages(self) -> tuple[int, ...]:
        """The evictable pages, next to go first."""
        return tuple(self._cached)

    @property
    def num_held(self) -> int:
        """Pages that at least one request holds."""
        return self.num_pages - self.reserved - self.num_free - self.num_evictable

    @property
    def requests(self) -> tuple[Hashable, ...]:
        """Requests that were allocated and not freed, oldest first."""
        return tuple(self._holdings)

    def __contains__(self, request: Hashable) -> bool:
        return request in self._holdings

    def length(self, request: Hashable) -> int:
        """Tokens of a request. Raises ProblemError for an unknown one, as every method below does."""
        return self._holding("length", request).length

    def pages(self, request: Hashable) -> tuple[int, ...]:
        """Page ids of a request, in token order."""
        return tuple(self._holding("pages", request).pages)

    def refs(self, page: int) -> int:
        """How many requests hold a page."""
        if not 0 <= page < self.num_pages:
            raise ProblemError("refs", [f"page must be 0 to {self.num_pages - 1}, got {page}"])
        return self._refs[page]

    def slots(self, request: Hashable, begin: int = 0, end: int | None = None) -> list[int]:
        """Slots of tokens [begin, end) of a request; `end` defaults to its length."""
        holding = self._holding("slots", request)
        end = holding.length if end is None else end
        if not 0 <= begin <= end <= holding.length:
            raise ProblemError(
                "slots",
                [f"need 0 <= begin <= end <= {holding.length} (the length of {request!r}), got [{begin}, {end})"],
            )
        return self._slots(holding, begin, end)

    # Verbs

    def alloc(self, request: Hashable, tokens: Sequence[int] = ()) -> int:
        """Begin a request, with as many full cached pages as match the start of `tokens`.

        Returns:
            Number of tokens that are there already (a multiple of page_size). To have at least one token left to
            compute, pass all tokens but the last.
        """
        if request in self._holdings:
            raise ProblemError("alloc", [f"request {request!r} exists already; free it first or use another id"])
        holding = _Holding()
        for digest in self._digests(tokens):
            page = self._page_of.get(digest)
            if page is None:
                break
            holding.pages.append(page)
        for page in holding.pages:
            self._hold(page)
        holding.length = len(holding.pages) * self.page_size
        self._holdings[request] = holding
        return holding.length

    def pages_needed(self, counts: Mapping[Hashable, int]) -> int:
        """Pages that `append` would take for these numbers of tokens per request, copies included."""
        refs = Counter[int]()  # what earlier requests of this call gave up, as (negative) differences
        needed = 0
        for request, count in counts.items():
            holding = self._holding("append", request)
            if count < 0:
                raise ProblemError("append", [f"the number of tokens must be at least 0, got {count} for {request!r}"])
            needed += -(-(holding.length + count) // self.page_size) - len(holding.pages)
            if count and holding.length % self.page_size:
                last = holding.pages[-1]
                if self._refs[last] + refs[last] > 1:
                    needed += 1
                    refs[last] -= 1
        return needed

    def append(self, request: Hashable, count: int) -> Growth:
        """Grow a request by `count` tokens, evicting cached prefixes when no page is free.

        Raises:
            OutOfPagesError: fewer pages are free and evictable than needed; nothing was changed.
        """
        needed = self.pages_needed({request: count})
        if needed > self.num_free + self.num_evictable:
            raise OutOfPagesError(needed, self.num_free, self.num_evictable)
        holding = self._holdings[request]
        begin, copies = holding.length, []
        if count and begin % self.page_size:
            last = holding.pages[-1]
            if self._refs[last] > 1:
                target = self._take()
                copies.append((last, target))
                holding.pages[-1] = target
                self._refs[last] -= 1
            else:
                # A fork may end in the middle of a page that was kept as a full one: its content is about to change.
                self._forget(last)
        holding.length += count
        while len(holding.pages) * self.page_size < holding.length:
            holding.pages.append(self._take())
        return Growth(self._slots(holding, begin, holding.length), tuple(copies))

    def fork(self, parent: Hashable, child: Hashable, length: int | None = None) -> None:
        """Begin `child` with the first `length` tokens of `parent` (default: all). Copies nothing, takes no page."""
        holding = self._holding("fork", parent)
        length = holding.length if length is None else length
        bad = []
        if child in self._holdings:
            bad.append(f"request {child!r} exists already; free it first or use another id")
        if not 0 <= length <= holding.length:
            bad.append(f"length must be 0 to {holding.length} (the length of {parent!r}), got {length}")
        if bad:
            raise ProblemError("fork", bad)
        shared = holding.pages[: -(-length // self.page_size)]
        for page in shared:
            self._hold(page)
        self._holdings[child] = _Holding(list(shared), length)

    def free(self, request: Hashable, tokens: Sequence[int] | None = None) -> None:
        """End a request. With its `tokens`, its full pages are kept in the prefix cache until they are evicted."""
        holding = self._holding("free", request)
        if tokens is not None and len(tokens) != holding.length:
            raise ProblemError(
                "free", [f"tokens must be all {holding.length} tokens of {request!r}, got {len(tokens)}; or pass None"]
            )
        del self._holdings[request]
        digests = list(self._digests(tokens)) if tokens is not None else []
        for index in reversed(range(len(holding.pages))):
            page = holding.pages[index]
            if index < len(digests):
                self._remember(page, digests[index])
            self._release(page)

    def evict(self, num_pages: int | None = None) -> int:
        """Forget up to `num_pages` cached pages (default: all), least recently used first; returns how many."""
        wanted = self.num_evictable if num_pages is None else min(num_pages, self.num_evictable)
        for _ in range(wanted):
            self._free.append(self._pop_oldest())
        return max(wanted, 0)

    def check_integrity(self) -> tuple[str, ...]:
        """Everything that contradicts the rules at the top of this file; empty when all is well. O(pages)."""
        found: list[str] = []

        def rule(holds: bool, sentence: str) -> None:
            if not holds:
                found.append(sentence)

        held: Counter[int] = Counter()
        places: dict[int, int] = {}
        for request, holding in self._holdings.items():
            held.update(holding.pages)
            rule(
                len(holding.pages) == -(-holding.length // self.page_size),
                f"request {request!r} holds {len(holding.pages)} page(s) for {holding.length} token(s)",
            )
            rule(len(set(holding.pages)) == len(holding.pages), f"request {request!r} holds a page twice")
            for index, page in enumerate(holding.pages):
                rule(places.setdefault(page, index) == index, f"page {page} is shared at two different positions")
        free, cached = Counter(self._free), set(self._cached)
        for page in range(self.num_pages):
            rule(self._refs[page] == held[page], f"page {page} has refs {self._refs[page]}, held by {held[page]}")
            states = [page < self.reserved, free[page] > 0, held[page] > 0, page in cached]
            rule(sum(states) == 1, f"page {page} is in {sum(states)} states (reserved, free, held, cached): {states}")
            rule(free[page] <= 1, f"page {page} is free {free[page]} times over")
            known = self._digest_of.get(page)
            rule(page not in cached or known is not None, f"page {page} is cached without a digest")
            rule(known is None or self._page_of.get(known) == page, f"page {page} cannot be found by its digest")
            rule(known is None or not free[page], f"page {page} is free but still has a digest")
        rule(len(self._page_of) == len(self._digest_of), "digests and pages do not pair up")
        return tuple(found)

    # Inside

    def _holding(self, op: str, request: Hashable) -> _Holding:
        holding = self._holdings.get(request)
        if holding is None:
            raise ProblemError(
                op, [f"request {request!r} is not allocated (never, or freed already); call alloc first"]
            )
        return holding

    def _slots(self, holding: _Holding, begin: int, end: int) -> list[int]:
        size = self.page_size
        return [holding.pages[token // size] * size + token % size for token in range(begin, end)]

    def _digests(self, tokens: Sequence[int]) -> Iterator[bytes]:
        """One digest per full page; each covers all tokens before it, so equal digests mean equal prefixes."""
        size = self.page_size
        chain = b""
        for begin in range(0, len(tokens) - size + 1, size):
            content = array("q", tokens[begin : begin + size]).tobytes()
            # 128 bits of a cryptographic hash: a collision would hand one user's prefix to another.
            chain = hashlib.blake2b(chain + content, digest_size=16).digest()
            yield chain

    def _take(self) -> int:
        page = self._free.pop() if self._free else self._pop_oldest()
        self._refs[page] = 1
        return page

    def _pop_oldest(self) -> int:
        page, _ = self._cached.popitem(last=False)
        self._forget(page)
        return page

    def _hold(self, page: int) -> None:
        self._cached.pop(page, None)
        self._refs[page] += 1

    def _release(self, page: int) -> None:
        self._refs[page] -= 1
        if self._refs[page] == 0:
            if page in self._digest_of:
                self._cached[page] = None
            else:
                self._free.append(page)

    def _remember(self, page: int, digest: bytes) -> None:
        """Make a page findable, unless another page with the same prefix is; that one then counts as just used."""
        twin = self._page_of.get(digest)
        if twin is None:
            self._forget(page)
            self._page_of[digest] = page
            self._digest_of[page] = digest
        elif twin in self._cached:
            self._cached.move_to_end(twin)

    def _forget(self, page: int) -> None:
        digest = self._digest_of.pop(page, None)
        if digest is not None:
            del self._page_of[digest]
