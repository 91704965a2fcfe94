"""A cache for transformers' `generate()` that keeps rows of latent and RoPE in pages, in any latent KV layout.

transformers' own caches hold latent and RoPE as two tensors, in the model's dtype, and DynamicCache copies both of
them at every token. Here a token is written once, quantised if the layout is, and left padding is not stored at all.

    out = model.generate(ids, attention_mask=mask, past_key_values=LatentCache(model, "fp8_656"))

The pages of a request grow by doubling; request b owns the same stretch of pages in every layer.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicIndexedLayer

from openmla.core.errors import ProblemError, UnsupportedError
from openmla.core.layout import KVLayout, kv_layout, plain_layout
from openmla.ops.append import append

PAGE_SIZE = 64  # what the Hopper kernels read; one place more is kept for tokens that are not stored


class PagedLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's pages. The attention function writes them: it alone sees which new tokens are padding."""

    is_compileable, is_sliding, is_croppable, supports_early_init = False, False, False, False

    def __init__(self, layout: KVLayout | str | None = None, **_: Any) -> None:
        super().__init__()
        self.wanted = layout
        self.seen = 0  # tokens that went through `update`, padding included
        self.before = 0  # the same, before the last `update`
        self.keeps_padding = False
        self.places = 0  # how often its tensors moved: what was captured with the old ones is of no use

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take sizes, dtype and device from the first latent [batch, 1, s, d_latent] and RoPE [batch, 1, s, d_rope]."""
        d_latent, d_rope = key_states.shape[-1], value_states.shape[-1]
        plain = plain_layout(key_states.dtype, d_latent + d_rope, d_latent)
        self.layout = plain if self.wanted is None else kv_layout(self.wanted)
        if (self.layout.d_qk, self.layout.d_v) != (d_latent + d_rope, d_latent):
            raise ProblemError(
                "LatentCache",
                [
                    f"the model's latent is d_qk={d_latent + d_rope} d_v={d_latent}, layout {self.layout} has "
                    f"d_qk={self.layout.d_qk} d_v={self.layout.d_v}"
                ],
            )
        self.dtype, self.device, self.batch = key_states.dtype, key_states.device, key_states.shape[0]
        self.pages_each = 0
        self._known_ordinals = torch.empty(0, dtype=torch.int32, device=self.device)
        self.lengths = torch.zeros(self.batch, dtype=torch.int32, device=self.device)
        self.pool = self.layout.empty_cache(1, PAGE_SIZE, device=self.device)  # the last page is for what is not kept
        self._grow(1)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Make room; returns the new tokens as they are."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.make_room(key_states.shape[-2])
        self.before = self.seen
        self.seen += key_states.shape[-2]
        return key_states, value_states

    def make_room(self, count: int) -> None:
        """Pages for so many more tokens; twice as many pages as there are, where there are too few."""
        if self.seen + count > self.pages_each * PAGE_SIZE:
            self._grow(max(2 * self.pages_each, -(-(self.seen + count) // PAGE_SIZE)))

    def write(self, rows: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
        """Append rows [batch, s, d_qk], of which `valid` [batch, s] are stored.

        Returns [batch, s] int32: tokens of the request that stand up to and including each new one.
        """
        if valid is None or self.keeps_padding:
            counts = self.lengths[:, None] + self._ordinals(rows.shape[1])
            self._store(self._begins[:, None] + counts, rows)
        else:
            new = valid.to(torch.int32)
            counts = self.lengths[:, None] + new.cumsum(1, dtype=torch.int32)
            slots = self._begins[:, None] + counts
            self._store(torch.where(valid.bool(), slots, -1), rows)
        self.lengths.copy_(counts[:, -1])  # in place: a captured step goes on with this very tensor
        return counts

    def _store(self, slots: torch.Tensor, rows: torch.Tensor) -> None:
        """Rows [batch, s, d_qk] into slots [batch, s]; -1 keeps nothing."""
        if self.layout.is_quantised:
            append(self.pool, slots.flatten(), rows.flatten(0, 1), kv_layout=self.layout)
        else:  # slot -1 is the last of the pool, which is for what is not kept
            self.pool.view(-1, self.layout.d_qk)[slots.flatten()] = rows.flatten(0, 1).to(self.pool.dtype)

    def _ordinals(self, count: int) -> torch.Tensor:
        """int32 1 to count: made once per length, since every step of decoding asks for the same."""
        if self._known_ordinals.numel() != count:
            self._known_ordinals = torch.arange(1, count + 1, dtype=torch.int32, device=self.device)
        return self._known_ordinals

    def _lay_out(self) -> None:
        """What follows from batch and pages_each: the table, and per request the slot before its first."""
        self.places += 1
        pages = torch.arange(self.batch * self.pages_each, dtype=torch.int32, device=self.device)
        self.block_table = pages.view(self.batch, self.pages_each)
        self._begins = torch.arange(self.batch, device=self.device) * (self.pages_each * PAGE_SIZE) - 1

    def _grow(self, pages_each: int) -> None:
        pool = self.layout.empty_cache(self.batch * pages_each + 1, PAGE_SIZE, device=self.device)
        if self.pages_each:
            row = self.pool.shape[1:]
            held = self.pool[:-1].view(self.batch, self.pages_each, *row)
            pool[:-1].view(self.batch, pages_each, *row)[:, : self.pages_each] = held
        self.pool, self.pages_each = pool, pages_each
        self._lay_out()

    # What transformers asks of a layer

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the mask."""
        return self.seen + int(query_length), 0

    def get_seq_length(self) -> int:
        """Tokens so far, padding included."""
        return self.seen

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.seen = self.before = 0
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Beam search: request i continues what request beam_idx[i] had."""
        self._pick(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every request `repeats` times."""
        self._pick(torch.arange(self.batch, device=self.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Only these requests."""
        self._pick(torch.arange(self.batch, device=self.device)[indices])

    def _pick(self, requests: torch.Tensor) -> None:
        if not self.is_initialized:
            return
        pages = torch.cat([self.block_table[requests.to(self.device)].flatten(), self.block_table.new_tensor([-1])])
        self.pool = self.pool[pages.long()]
        self.lengths = self.lengths[requests.to(self.device)]
        self.batch = len(requests)
        self._lay_out()


class PagedIndexedLayer(PagedLayer):
    """The same for a layer with an indexer (DeepSeek-V3.2), whose indices count padding: so it is stored too."""

    def __init__(self, layout: KVLayout | str | None = None, **_: Any) -> None:
        super().__init__(layout)
        self.keeps_padding = True
        self._indexer = DynamicIndexedLayer()

    def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
        """Append the indexer's keys; returns all of them."""
        keys: torch.Tensor = self._indexer.update_indexer(indexer_key_states)
        return keys

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._indexer = DynamicIndexedLayer()

    def _pick(self, requests: torch.Tensor) -> None:
        super()._pick(requests)
        if self._indexer.is_indexer_initialized:
            self._indexer.indexer_keys = self._indexer.indexer_keys[requests.to(self.device)]


class LatentCache(Cache):  # type: ignore[misc]
    """Pages of latent rows for every layer of an attached model.

    Args:
        model: that `attach` was called on.
        layout: `bf16_576`, `fp8_656`, ...; None for plain elements in the model's dtype.

    Raises:
        UnsupportedError: the model has layers without a latent, or that see a window only: leave the cache to
            transformers, `attach` serves its caches too.
    """

    def __init__(self, model: Any, layout: KVLayout | str | None = None) -> None:
        config = model.config.get_text_config()
        attentions = [m for m in model.modules() if hasattr(m, "expand_kv") and hasattr(m, "kv_b_proj")]
        layers = {m.layer_idx: PagedIndexedLayer if hasattr(m, "indexer") else PagedLayer for m in attentions}
        why = []
        if sorted(layers) != list(range(len(layers))) or not layers:
            why.append(f"MLA in layers {sorted(layers)} only: the others need a cache of their own kind")
        if any(getattr(m, "sliding_window", None) for m in attentions) or getattr(config, "sliding_window", None):
            why.append("some layers see a window only")
        if any(getattr(m, "skip_topk", False) for m in attentions):
            why.append("layers share another layer's indices")
        if why:
            raise UnsupportedError(f"LatentCache cannot hold {type(model).__name__}", {"cache": tuple(why)}, "attach")
        super().__init__(layers=[layers[index](layout) for index in sorted(layers)])
