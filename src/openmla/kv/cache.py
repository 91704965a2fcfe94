"""The paged latent KV cache: one pool of pages per model layer, one allocator for all of them.

A token has the same slot in every layer, so a request has one block table whatever the depth of the model. Typical
step of a serving loop:

    cache.alloc("a", prompt[:-1])                 # finds a cached prefix, if there is one
    slots = cache.extend(["a", "b"], [1, 1])      # room for one token each; copies shared pages that are written next
    for layer in range(num_layers):
        cache.write(layer, slots, rows)           # rows [2, 576]: latent and RoPE of the new tokens
        out, lse = openmla.decode(q, cache.pages(layer), cache.block_table(["a", "b"]), cache.cache_seqlens(["a", "b"]))

`append` does both for one request and one layer.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from openmla.core.errors import OutOfPagesError, ProblemError
from openmla.core.layout import KVLayout, kv_layout
from openmla.core.target import Target
from openmla.kv.allocator import PageAllocator
from openmla.mods import Rope
from openmla.ops.append import append
from openmla.reference import quant


class PagedKVCache:
    """Paged storage for the latent KV of many requests, in any KV layout.

    Memory is `num_layers * num_pages * layout.page_bytes(page_size)` bytes, allocated once and not initialised: what
    lies outside the tokens of a request is never read.

    Args:
        layout: a KVLayout or its name (`bf16_576`, `fp8_656`, ...).
        num_pages: pages per layer.
        page_size: tokens per page.
        num_layers: pools; every layer of the model that attends needs one.
        device: where the pools live.
        reserved: pages at the front that no request gets, for padding rows to point at.

    Raises:
        ProblemError: a size makes no sense. ConfigError: unknown layout, or a device that is not there.
    """

    def __init__(
        self,
        layout: KVLayout | str,
        num_pages: int,
        page_size: int = 64,
        num_layers: int = 1,
        *,
        device: torch.device | str = "cpu",
        reserved: int = 0,
    ) -> None:
        if num_layers < 1:
            raise ProblemError("PagedKVCache", [f"num_layers must be at least 1, got {num_layers}"])
        Target.detect(device)  # a device that is not there has a name here, not in an assertion of PyTorch's
        self.layout = kv_layout(layout)
        self.allocator = PageAllocator(num_pages, page_size, reserved=reserved)
        self._pools = tuple(self.layout.empty_cache(num_pages, page_size, device=device) for _ in range(num_layers))
        self.device = self._pools[0].device  # with its index: "cuda" and "cuda:0" compare unequal
        self._written: dict[Hashable, list[int]] = {}  # per request and layer: tokens that `append` or `write` covered

    @property
    def num_layers(self) -> int:
        """Pools of pages."""
        return len(self._pools)

    @property
    def num_pages(self) -> int:
        """Pages per layer, reserved ones included."""
        return self.allocator.num_pages

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self.allocator.page_size

    @property
    def num_bytes(self) -> int:
        """Bytes of all pools, page padding included."""
        return self.num_layers * self.num_pages * self.layout.page_bytes(self.page_size)

    def pages(self, layer: int = 0) -> torch.Tensor:
        """The pool of one layer: [num_pages, page_size, 1, row_elements], what `openmla.decode` takes as kv_cache."""
        if not 0 <= layer < self.num_layers:
            raise ProblemError("pages", [f"layer must be 0 to {self.num_layers - 1}, got {layer}"])
        return self._pools[layer]

    # Life of a request

    def alloc(self, request: Hashable, tokens: Sequence[int] = ()) -> int:
        """Begin a request; returns how many of `tokens` are in the cache already (see `PageAllocator.alloc`)."""
        found = self.allocator.alloc(request, tokens)
        self._written[request] = [found] * self.num_layers
        return found

    def extend(self, requests: Sequence[Hashable], counts: Sequence[int]) -> torch.Tensor:
        """Make room for `counts[i]` more tokens of `requests[i]`, in all layers; all of them or none.

        Pages that are shared and about to be written are copied first. The caller then writes every layer.

        Returns:
            [sum(counts)] int64 slots of the new tokens, request by request, on the device of the cache.

        Raises:
            OutOfPagesError: not enough pages for all; nothing was changed.
            ProblemError: unknown request, one named twice, negative count.
        """
        wanted = dict(zip(requests, counts, strict=False))
        bad = []
        if len(requests) != len(counts):
            bad.append(f"requests and counts must have the same length, got {len(requests)} and {len(counts)}")
        if len(wanted) != len(requests):
            bad.append(f"a request may be named once per call, got {list(requests)!r}; add its counts up")
        if bad:
            raise ProblemError("extend", bad)
        slots = self._grow(wanted)
        for request in wanted:
            self._written[request] = [self.allocator.length(request)] * self.num_layers
        return torch.tensor(slots, dtype=torch.int64, device=self.device)

    def write(
        self,
        layer: int,
        slots: torch.Tensor,
        rows: torch.Tensor,
        *,
        rope: Rope | None = None,
        positions: torch.Tensor | None = None,
    ) -> None:
        """Write rows into slots of one layer, quantised if the layout is; on a GPU with Triton in one launch, without waiting.

        Args:
            layer: which pool.
            slots: [n] int64, page * page_size + offset, from `extend` or `slots`. A slot of -1 is skipped.
            rows: [n, d_qk] bf16|fp16|fp32: latent, then RoPE, of each token.
            rope, positions: rotate the RoPE columns on their way, see `openmla.append`; default: they are rotated.

        Raises:
            ProblemError: shapes contradict each other or the layout; on a CPU also a slot outside of the cache, which on a
                GPU is skipped and reported by `openmla.check_errors`.
        """
        pool = self.pages(layer)
        bad = []
        if slots.dim() != 1:
            bad.append(f"slots must be [n], got shape {tuple(slots.shape)}")
        if tuple(rows.shape) != (*slots.shape, self.layout.d_qk):
            bad.append(
                f"rows must be [n, d_qk] = [{slots.numel()}, {self.layout.d_qk}] for layout {self.layout}, "
                f"got {tuple(rows.shape)}"
            )
        if bad:
            raise ProblemError("write", bad)
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        append(pool, slots, rows, kv_layout=self.layout, rope=rope, positions=positions)

    def append(self, layer: int, request: Hashable, rows: torch.Tensor) -> torch.Tensor:
        """Add tokens of one request to one layer; the first layer to get them makes room in all.

        Args:
            layer: which pool.
            request: an allocated request.
            rows: [n, d_qk], as for `write`.

        Returns:
            [n] int64 slots that were written.

        Raises:
            OutOfPagesError: not enough pages; nothing was changed.
            ProblemError: unknown request or layer, or rows that do not fit the layout.
        """
        self.pages(layer)
        if rows.dim() != 2 or rows.shape[1] != self.layout.d_qk:
            raise ProblemError("append", [f"rows must be [n, {self.layout.d_qk}], got {tuple(rows.shape)}"])
        length = self.allocator.length(request)
        begin = self._written[request][layer]
        end = begin + rows.shape[0]
        if end > length:
            self._grow({request: end - length})
        slots = self.slots(request, begin, end)
        self.write(layer, slots, rows)
        self._written[request][layer] = end
        return slots

    def fork(self, parent: Hashable, child: Hashable, length: int | None = None) -> None:
        """Begin `child` with the first `length` tokens of `parent` (default: all), sharing its pages.

        Raises:
            ProblemError: unknown parent, child exists, bad length, or tokens not written to every layer yet.
        """
        wanted = self.allocator.length(parent) if length is None else length
        behind = [f"layer {i} holds {n}" for i, n in enumerate(self._written[parent]) if n < wanted]
        if behind:
            raise ProblemError(
                "fork", [f"{wanted} token(s) of {parent!r} must be written in every layer, but {', '.join(behind)}"]
            )
        self.allocator.fork(parent, child, length)
        self._written[child] = [wanted] * self.num_layers

    def free(self, request: Hashable, tokens: Sequence[int] | None = None) -> None:
        """End a request; with its token ids, its full pages stay findable by later requests until evicted.

        Raises:
            ProblemError: unknown request, tokens of another length, or tokens not written to every layer yet.
        """
        if tokens is not None and min(self._written.get(request, [0])) < len(tokens):
            self.allocator.length(request)
            raise ProblemError("free", [f"{request!r} is not written in every layer; pass tokens=None to drop it"])
        self.allocator.free(request, tokens)
        del self._written[request]

    def evict(self, num_pages: int | None = None) -> int:
        """Forget cached prefixes, least recently used first; returns the number of pages that became free."""
        return self.allocator.evict(num_pages)

    # What a kernel asks for

    def block_table(self, requests: Sequence[Hashable], max_pages: int | None = None) -> torch.Tensor:
        """[batch, max_pages] int32 page ids; `max_pages` defaults to the longest request (at least 1), the rest is 0."""
        held = [self.allocator.pages(request) for request in requests]
        longest = max((len(pages) for pages in held), default=0)
        width = max(longest, 1) if max_pages is None else max_pages
        if width < longest:
            raise ProblemError("block_table", [f"max_pages={width} is too small: a request holds {longest} pages"])
        rows = [[*pages, *[0] * (width - len(pages))] for pages in held]
        return torch.tensor(rows, dtype=torch.int32, device=self.device).reshape(len(held), width)

    def cache_seqlens(self, requests: Sequence[Hashable]) -> torch.Tensor:
        """[batch] int32 tokens per request."""
        lengths = [self.allocator.length(request) for request in requests]
        return torch.tensor(lengths, dtype=torch.int32, device=self.device)

    def slots(self, request: Hashable, begin: int = 0, end: int | None = None) -> torch.Tensor:
        """[n] int64 slots of tokens [begin, end) of a request; `end` defaults to its length."""
        return torch.tensor(self.allocator.slots(request, begin, end), dtype=torch.int64, device=self.device)

    def gather(self, layer: int, request: Hashable, begin: int = 0, end: int | None = None) -> torch.Tensor:
        """[end - begin, d_qk] tokens of a request in one layer, dequantised; for prefill, tests and migrations."""
        return quant.read_rows(self.pages(layer), self.layout, self.slots(request)[begin:end])

    def check_integrity(self) -> tuple[str, ...]:
        """Everything that contradicts the rules of allocator and cache; empty when all is well."""
        found = list(self.allocator.check_integrity())
        if set(self._written) != set(self.allocator.requests):
            found.append("cache and allocator know different requests")
        for request in self.allocator.requests:
            length = self.allocator.length(request)
            for layer, written in enumerate(self._written.get(request, [])):
                if written != length:
                    found.append(f"layer {layer} holds {written} of {length} token(s) of request {request!r}")
        return tuple(found)

    # Inside

    def _grow(self, wanted: dict[Hashable, int]) -> list[int]:
        needed = self.allocator.pages_needed(wanted)
        free, evictable = self.allocator.num_free, self.allocator.num_evictable
        if needed > free + evictable:
            raise OutOfPagesError(needed, free, evictable)
        growths = [self.allocator.append(request, count) for request, count in wanted.items()]
        copies = [pair for growth in growths for pair in growth.copies]
        if copies:
            source, target = torch.tensor(copies, dtype=torch.int64, device=self.device).unbind(1)
            for pool in self._pools:
                pool[target] = pool[source]
        return [slot for growth in growths for slot in growth.slots]
