"""Decoding steps of `generate()` as one CUDA graph: a model of 27 layers is some 2,000 launches, which Python makes slowly.

    attached = attach(model, step_graphs=True)
    model.generate(..., past_key_values=attached.cache())

The first new token comes from the prompt, the second from an ordinary step, which compiles what is missing; from the third
on the captured step is replayed. It is captured anew when pages grow (by doubling) or requests are reordered. Only steps of
one token per request over a `LatentCache` are captured; all else runs as without it.

A captured step gets no attention mask and needs none: pages hold no padding, so lengths say all. The shapes are those of the
step; values (lengths, positions, tokens) are read by the kernels at every replay.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch

from openmla.integrations.transformers.cache import LatentCache, PagedIndexedLayer

# What a step of generate() hands to the model; cache_position, of older releases, follows from the cache.
_PLAIN = {
    "input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "return_dict",
    "cache_position",
}  # fmt: skip
_DEVICES = ("cuda",)


def _captured(step: Callable[[], None]) -> Callable[[], None]:
    """The step as a CUDA graph; it has run once before, on this stream."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


class StepGraphs:
    """Stands in for `model.forward`; `close` gives it back."""

    def __init__(self, model: Any) -> None:
        self.model, self.stock = model, model.forward
        self.replays = 0
        self.strangers: set[str] = set()  # arguments that kept a step from being captured
        self._cache: weakref.ref[LatentCache] | None = None
        self._places: list[int] = []
        self._warm = False
        self._replay: Callable[[], None] | None = None
        self._logits: torch.Tensor | None = None

        @functools.wraps(self.stock)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._forward(*args, **kwargs)

        model.forward = forward

    def close(self) -> None:
        """Give the model its own `forward` back."""
        del self.model.forward  # the class's own comes to light again
        self._forget()

    def _forget(self) -> None:
        """Let go of the graph and its memory; called too when its cache is gone."""
        self._cache, self._replay, self._logits, self._warm = None, None, None, False

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        cache, ids, positions = (kwargs.get(name) for name in ("past_key_values", "input_ids", "position_ids"))
        if args or not self._fits(cache, ids, positions, kwargs):
            return self.stock(*args, **kwargs)
        assert isinstance(cache, LatentCache)
        assert isinstance(ids, torch.Tensor)
        assert isinstance(positions, torch.Tensor)
        for layer in cache.layers:
            layer.make_room(1)
        places = [layer.places for layer in cache.layers]
        known = self._cache() if self._cache is not None else None
        if known is not cache or places != self._places:
            self._forget()
            self._cache, self._places = weakref.ref(cache, lambda _: self._forget()), places
        if not self._warm:
            self._warm = True
            return self.stock(**kwargs | {"attention_mask": None})
        if self._replay is None:
            self._capture(cache, ids, positions)
        assert self._replay is not None
        self._ids.copy_(ids)
        self._positions.copy_(positions)
        self._replay()
        self.replays += 1
        for layer in cache.layers:
            layer.before, layer.seen = layer.seen, layer.seen + 1
        return self._kind(logits=self._logits, past_key_values=cache)

    def _fits(self, cache: Any, ids: Any, positions: Any, kwargs: dict[str, Any]) -> bool:
        """Whether this is a plain step of one token per request."""
        if not isinstance(cache, LatentCache) or not isinstance(ids, torch.Tensor) or ids.shape[1] != 1:
            return False
        strangers = {name for name, value in kwargs.items() if name not in _PLAIN and value is not None}
        self.strangers |= strangers
        if strangers or torch.is_grad_enabled() or ids.device.type not in _DEVICES:
            return False
        if not isinstance(positions, torch.Tensor) or positions.shape != ids.shape:
            return False
        return all(
            layer.is_initialized and layer.seen and not isinstance(layer, PagedIndexedLayer) for layer in cache.layers
        )

    def _capture(self, cache: LatentCache, ids: torch.Tensor, positions: torch.Tensor) -> None:
        self._ids, self._positions = ids.clone(), positions.clone()
        counted = [(layer.before, layer.seen) for layer in cache.layers]

        def step() -> None:
            result = self.stock(
                input_ids=self._ids, position_ids=self._positions, past_key_values=cache, use_cache=True,
                attention_mask=None, logits_to_keep=1, return_dict=True,
            )  # fmt: skip
            self._kind, self._logits = type(result), result.logits  # not the result, which holds the cache

        self._replay = _captured(step)
        # Capturing ran the bookkeeping of the host, but nothing on the device.
        for layer, (before, seen) in zip(cache.layers, counted, strict=True):
            layer.before, layer.seen = before, seen
