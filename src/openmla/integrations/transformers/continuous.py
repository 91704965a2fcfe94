"""Continuous batching of transformers (`generate_batch`) for MLA, which stock transformers crashes on.

Its cache has room for `num_key_value_heads` keys and values of `head_dim` numbers. MLA caches one row of d_latent +
d_rope numbers, in two tensors of different widths. Here the row is cut in two equal halves: the cache is told of one
head of (d_latent + d_rope) / 2 columns, keeps one half as "key" and the other as "value", and a token takes exactly
d_latent + d_rope numbers. Its paged route is named `paged|eager`; modules that are attached go to OpenMLA from there.

transformers has no public door for this. What is replaced, all of it checked by name when a model is attached:

    find_num_key_value_heads (5.17: find_num_kv_heads),    in the cache and in its allocator, for attached configs only
    find_head_dim
    ContinuousBatchingManager.switch_to_cb_friendly_attn   lets an attached model through to `paged|eager`
    the attention function `paged|eager`                   attached modules to OpenMLA, all others as before
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.eager_paged import eager_paged_attention_forward

from openmla.core.errors import UnsupportedError
from openmla.integrations.transformers.cache import PAGE_SIZE
from openmla.nn import forms
from openmla.ops import native
from openmla.ops.prefill import prefill

PAGED = "paged|eager"
_MARK = "_openmla_row"  # on the config of an attached model: d_latent + d_rope
_HOME = "transformers.generation.continuous_batching"
_HEADS = ("find_num_key_value_heads", "find_num_kv_heads")  # the second in 5.17


def repair(config: Any) -> None:
    """Make continuous batching work for models of this config; installs the replacements once per process.

    Does nothing where this transformers has no continuous batching that looks as expected: `generate_batch` then says
    what it says without OpenMLA.
    """
    text = config.get_text_config()
    if hasattr(text, "kv_lora_rank") and (text.kv_lora_rank + text.qk_rope_head_dim) % 2 == 0 and _install():
        setattr(text, _MARK, text.kv_lora_rank + text.qk_rope_head_dim)


def forget(config: Any) -> None:
    """Undo `repair` for this config."""
    text = config.get_text_config()
    if hasattr(text, _MARK):
        delattr(text, _MARK)


def _install() -> bool:
    """Put the replacements in place, unless they are; False where a name to replace is missing."""
    try:
        cache = importlib.import_module(f"{_HOME}.cache")
        heads = next(name for name in _HEADS if hasattr(cache, name))
        places = [(cache, heads), (cache, "find_head_dim")]
        if importlib.util.find_spec(f"{_HOME}.cache_allocators"):  # since 5.23
            places.append((importlib.import_module(f"{_HOME}.cache_allocators.full_attention"), "find_head_dim"))
        manager = importlib.import_module(f"{_HOME}.continuous_api").ContinuousBatchingManager
        stock = [getattr(module, name) for module, name in places]
        switch = manager.switch_to_cb_friendly_attn
    except (ImportError, AttributeError, StopIteration):
        return False
    if hasattr(switch, "openmla_stock"):
        return True
    for (module, name), function in zip(places, stock, strict=True):
        setattr(module, name, _sized(function, 1 if name == heads else None))
    manager.switch_to_cb_friendly_attn = _let_through(switch)
    AttentionInterface.register(PAGED, _attention)
    return True


def _sized(stock: Callable[[Any], int], heads: int | None) -> Callable[[Any], int]:
    """`stock`, but for attached configs 1 head, or half a row."""

    def size(config: Any) -> int:
        row: int | None = getattr(config, _MARK, None)
        if row is None:
            return stock(config)
        return heads if heads is not None else row // 2

    return size


def _let_through(stock: Callable[..., None]) -> Callable[..., None]:
    """`stock`, but an attached model goes to the paged route and back to where it was afterwards."""

    def switch(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        if not hasattr(model.config.get_text_config(), _MARK):
            stock(self, model, *args, **kwargs)
        elif model.config._attn_implementation != PAGED:
            self._original_attn_impl = model.config._attn_implementation
            model.set_attn_implementation(PAGED)

    switch.openmla_stock = stock  # type: ignore[attr-defined]
    return switch


@functools.cache
def _takes_options(update: Callable[..., Any]) -> bool:
    """Whether `update` of the paged cache takes all options in one; 5.17 has indices as arguments of their own."""
    return "kwargs" in inspect.signature(update).parameters


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, Any]:  # fmt: skip
    """Requests behind one another: query [1, h_q, total_q, d_nope + d_rope], latent and RoPE [1, 1, total_q, columns]."""
    seam = getattr(module, "openmla_seam", None)
    if seam is None:
        stock: tuple[torch.Tensor, Any] = eager_paged_attention_forward(
            module, query, key, value, attention_mask, **options
        )
        return stock
    cache = options.pop("cache", None)
    if cache is None:
        raise UnsupportedError(
            f"{PAGED} is the route of continuous batching",
            {"transformers": ("there is no paged cache in this call; use generate() or generate_batch()",)},
            "attention",
        )
    scale, d_latent = options["scaling"], module.kv_lora_rank
    row = torch.cat([key, value], -1)
    halves = row.chunk(2, -1)
    takes_options = _takes_options(type(cache).update)
    places = {"kwargs": options} if takes_options else {n: options[n] for n in ("read_index", "write_index")}
    held = cache.update(key_states=halves[0], value_states=halves[1], layer_idx=module.layer_idx, **places)
    held = [half.flatten(0, -2) for half in held]  # [total_k, columns] each, request behind request; one head
    starts_q, starts_k = options["cu_seq_lens_q"].to(torch.int32), options["cu_seq_lens_k"].to(torch.int32)
    total_q, total_k = query.shape[2], held[0].shape[0]
    q = query[0].transpose(0, 1)  # [total_q, h_q, d]
    if total_q == total_k:  # nobody has a context
        rows = torch.cat(held, -1)  # [total_k, d_latent + d_rope]
        whole_key, whole_value = seam.expand(rows[None, None, :, :d_latent], rows[None, None, :, d_latent:])
        out, _ = prefill(
            q, whole_key[0].transpose(0, 1), whole_value[0].transpose(0, 1), starts_q, starts_k, total_q, total_k,
            softmax_scale=scale, is_causal=True, backend=forms.prefill_backend(seam.backend),
        )  # fmt: skip
        return out[None], None
    w_uk, w_uv = seam.up_projections(module)
    pages, table = _in_pages(held, starts_k, _longest(options, "k", total_k))
    longest_q = _longest(options, "q", total_q)
    absorbed = forms.absorb(q, w_uk)
    ways: dict[str, Any] = {"cu_seqlens_q": starts_q, "max_seqlen_q": longest_q}
    if longest_q == 1 and total_q == len(table):  # a step of decoding: the form that every kernel takes
        absorbed, ways = absorbed[:, None], {}
    out, _ = native.decode(
        absorbed, pages, table, starts_k.diff(), d_v=d_latent, softmax_scale=scale, is_causal=True, return_lse=False,
        backend=seam.backend, **ways,
    )  # fmt: skip
    return forms.project(out.view(total_q, *out.shape[-2:]), w_uv)[None], None


def _longest(options: dict[str, Any], side: str, total: int) -> int:
    """Tokens of the longest request, as the host knows it; all tokens where this transformers does not say."""
    given = options.get(f"max_length_{side}", options.get(f"max_seqlen_{side}"))  # the second in 5.17
    return min(given, total) if isinstance(given, int) and given > 0 else total


def _in_pages(halves: Sequence[torch.Tensor], starts: torch.Tensor, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages [pages, PAGE_SIZE, 1, columns] and table [batch, columns of it] of rows that lie request behind request.

    A request begins a page: requests begin anywhere in `halves` [total, columns / 2], and pages of one token, the other way
    to say so, are for no Hopper kernel. Sizes come from numbers of the host, in steps, so that few problems are ever seen.
    Rows behind the last request (padding) land behind its own.
    """
    total, half = halves[0].shape[0], halves[0].shape[-1]
    batch, device = starts.numel() - 1, starts.device
    each = (starts.diff() + (PAGE_SIZE - 1)) // PAGE_SIZE
    first = each.cumsum(0, dtype=torch.int32) - each
    row = torch.arange(total, dtype=torch.int32, device=device)
    owner = (torch.searchsorted(starts, row, right=True, out_int32=True) - 1).clamp_(0, batch - 1)
    slots = (first * PAGE_SIZE - starts[:-1])[owner] + row
    pages = halves[0].new_empty(_in_steps(-(-total // PAGE_SIZE) + batch), PAGE_SIZE, 1, 2 * half)
    rows = pages.view(-1, 2 * half)
    rows[slots, :half], rows[slots, half:] = halves
    columns = torch.arange(_in_steps(-(-longest // PAGE_SIZE)), dtype=torch.int32, device=device)
    return pages, (first[:, None] + columns).clamp_(max=len(pages) - 1)


def _in_steps(count: int) -> int:
    """Up to the next power of two, from 64 on to the next multiple of 64."""
    return 1 << (count - 1).bit_length() if count < 64 else -(-count // 64) * 64
