"""One pass of a model over a paged cache: what every layer of it needs to know, made once."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from openmla.kv.cache import PagedKVCache
from openmla.nn.forms import Form, cheaper_form


@dataclass(frozen=True)
class Pass:
    """`counts[i]` new tokens of `requests[i]` behind the `begins[i]` that the cache holds of it."""

    cache: PagedKVCache
    requests: tuple[Hashable, ...]
    counts: tuple[int, ...]
    begins: tuple[int, ...]
    slots: torch.Tensor  # [sum(counts)] int64, where the new tokens go
    positions: torch.Tensor  # [sum(counts)] int64, of the new tokens
    block_table: torch.Tensor
    cache_seqlens: torch.Tensor  # the new tokens included

    @classmethod
    def begin(cls, cache: PagedKVCache, requests: Sequence[Hashable], counts: Sequence[int]) -> Pass:
        """Make room for the new tokens; every layer then writes them.

        Raises:
            OutOfPagesError: the cache has no room; nothing was changed.
            ProblemError: unknown request, one named twice, negative count.
        """
        begins = tuple(cache.allocator.length(request) for request in requests)
        slots = cache.extend(requests, counts)
        spans = [torch.arange(a, a + n) for a, n in zip(begins, counts, strict=True)]
        positions = torch.cat(spans) if spans else torch.empty(0, dtype=torch.int64)
        return cls(
            cache, tuple(requests), tuple(counts), begins, slots, positions.to(cache.device),
            cache.block_table(requests), cache.cache_seqlens(requests),
        )  # fmt: skip

    @property
    def is_fresh(self) -> bool:
        """True when no request had tokens in the cache before."""
        return not any(self.begins)

    @property
    def is_uniform(self) -> bool:
        """True when all requests have the same number of new tokens."""
        return len(set(self.counts)) <= 1

    @property
    def keys(self) -> tuple[int, ...]:
        """Tokens of each request behind the pass."""
        return tuple(a + n for a, n in zip(self.begins, self.counts, strict=True))

    def offsets(self, lengths: Sequence[int]) -> torch.Tensor:
        """[batch + 1] int32: where each request begins, if they have these lengths."""
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return ends.to(self.cache.device)

    def form(self, d_nope: int, d_v: int) -> Form:
        """The form with fewer FLOPs, see `cheaper_form`."""
        layout = self.cache.layout
        return cheaper_form(
            self.counts, self.keys, d_latent=layout.d_v, d_rope=layout.d_qk - layout.d_v, d_nope=d_nope, d_v=d_v
        )
