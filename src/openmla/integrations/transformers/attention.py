"""`attach`: a transformers model of any MLA family computes its attention with OpenMLA.

transformers caches the latent of a token and calls `expand_kv` before every attention, for all tokens, at every step:
h_q * (d_nope + d_rope + d_v) numbers per token. All MLA families share that seam. `attach` takes it away, so that the
attention function gets latent and RoPE themselves, and computes

    one new token           absorbed, over the latents                   openmla.decode
    a selection of keys     absorbed, over the selected latents          openmla.sparse_decode  (DeepSeek-V3.2)
    a prompt                expanded by the model's own `expand_kv`      openmla.prefill, or SDPA under a mask
    training                as without OpenMLA

    attached = attach(model)
    model.generate(...)                                                  # any cache of transformers
    model.generate(..., past_key_values=attached.cache("fp8_656"))       # pages of latent rows
    model.generate_batch(...)                                            # continuous batching
    attached.detach()
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from openmla.core.errors import ProblemError, UnsupportedError
from openmla.core.layout import KVLayout
from openmla.integrations.transformers import continuous, experts
from openmla.integrations.transformers.cache import PAGE_SIZE, LatentCache, PagedLayer
from openmla.integrations.transformers.steps import StepGraphs
from openmla.nn import forms
from openmla.ops import native
from openmla.ops.prefill import prefill

NAME = "openmla_attached"  # a name with "flash" in it would be taken for FlashAttention


class Attached:
    """What `attach` did to a model; `detach` undoes it."""

    def __init__(self, model: Any, backend: str | None, step_graphs: bool) -> None:
        self.model, self.backend = model, backend
        self.modules = [m for m in model.modules() if hasattr(m, "expand_kv") and hasattr(m, "kv_b_proj")]
        why = []
        if not self.modules:
            why.append("no attention module with expand_kv and kv_b_proj: not an MLA model, or transformers < 5.16")
        if any(hasattr(m, "openmla_seam") for m in self.modules):
            why.append("already attached; call detach() first")
        if why:
            raise UnsupportedError(
                f"{type(model).__name__} cannot run on OpenMLA", {"transformers": tuple(why)}, "attach"
            )
        self._stock_name = model.config._attn_implementation
        for module in self.modules:
            module.openmla_seam = _Seam(module, backend)
            module.expand_kv = _keep_latent
        continuous.repair(model.config)
        self._stock_experts = experts.choose_by_size(model)
        model.set_attn_implementation(NAME)
        self.steps = StepGraphs(model) if step_graphs else None

    def cache(self, layout: KVLayout | str | None = None) -> LatentCache:
        """A new cache of pages for one `generate()`: `past_key_values=attached.cache("fp8_656")`."""
        return LatentCache(self.model, layout)

    def detach(self) -> None:
        """Give the model its own attention back."""
        if self.steps is not None:
            self.steps.close()
        for module in self.modules:
            for hook in module.openmla_seam.hooks:
                hook.remove()
            del module.openmla_seam, module.expand_kv  # the class's own comes to light again
        continuous.forget(self.model.config)
        if self._stock_experts is not None:
            self.model.set_experts_implementation(self._stock_experts)
        self.model.set_attn_implementation(self._stock_name)


def attach(model: Any, *, backend: str | None = None, step_graphs: bool = False) -> Attached:
    """Let a transformers model compute its attention with OpenMLA; `generate()` and all else stay as they are.

    Args:
        model: any MLA family (DeepSeek-V2, V3, V3.2, Kimi, GLM, LongCat, MiniCPM3, ...), transformers >= 5.16.
        backend: of the operators; default OPENMLA_BACKEND. `cute` has no dense prefill: prompts then run as by default.
        step_graphs: replay decoding steps over an `attached.cache()` as a CUDA graph, see `steps`.

    Raises:
        UnsupportedError: not an MLA model, or attached already.
    """
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    return Attached(model, backend, step_graphs)


class _Seam:
    """One attention module: its own `expand_kv`, its up-projections, and the cache of the pass under way."""

    def __init__(self, module: Any, backend: str | None) -> None:
        self.expand: Callable[..., tuple[torch.Tensor, torch.Tensor]] = module.expand_kv
        self.backend = backend
        self.cache: Any = None
        self.hooks = (
            module.register_forward_pre_hook(self._note_cache, with_kwargs=True),
            module.register_forward_hook(self._forget_cache),  # else a model would keep its last cache alive
        )
        self._made: torch.Tensor | None = None

    def _note_cache(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.cache = kwargs.get("past_key_values")

    def _forget_cache(self, module: Any, args: Any, output: Any) -> None:
        self.cache = None

    def up_projections(self, module: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(W_UK, W_UV); of a projection that is no plain Linear, made once by feeding it the identity."""
        linear = module.kv_b_proj
        weight = linear.weight if type(linear) is torch.nn.Linear else self._made
        if weight is None:
            like = next(p for p in module.kv_a_layernorm.parameters())
            weight = linear(torch.eye(module.kv_lora_rank, dtype=like.dtype, device=like.device)).T.contiguous()
            self._made = weight
        return forms.up_projections(weight, module.qk_nope_head_dim, module.v_head_dim)

    def pages(self, module: Any) -> PagedLayer | None:
        """The layer of a LatentCache; None where the cache is one of transformers' own, or there is none."""
        layers = getattr(self.cache, "layers", None)
        if layers is None or module.layer_idx >= len(layers):
            return None
        layer = layers[module.layer_idx]
        return layer if isinstance(layer, PagedLayer) else None


def _keep_latent(latent: torch.Tensor, rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Stands in for `expand_kv`: the attention function gets the latent itself."""
    return latent, rope


def _mask(*args: Any, mask_function: Callable[..., Any] = causal_mask_function, **kwargs: Any) -> torch.Tensor | None:
    """The boolean mask of transformers, [batch, 1, s_q, s_k], and whether it is causality and padding alone."""
    mask: torch.Tensor | None = sdpa_mask(*args, mask_function=mask_function, **kwargs)
    if mask is not None:
        mask.openmla_is_causal = mask_function is causal_mask_function  # type: ignore[attr-defined]
    return mask


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    *, scaling: float, dropout: float = 0.0, indices: torch.Tensor | None = None, s_aux: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """The entry that transformers calls by NAME. query [batch, h_q, s_q, d_nope + d_rope]; key and value are latent and
    RoPE [batch, 1, s_k, columns], or key and value of a module without a latent. Returns [batch, s_q, h_q, d_v].
    """
    seam: _Seam | None = getattr(module, "openmla_seam", None)
    if seam is None:
        stock = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, s_aux=s_aux, **options
        )
        return stock[0], None
    pages = seam.pages(module)
    needs_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    if pages is not None:
        if needs_grad:
            raise ProblemError("attention", ["a LatentCache has no gradient; run under torch.no_grad()"])
        return _over_pages(module, seam, pages, query, key, value, attention_mask, scaling, indices, s_aux), None
    run = partial(_Call, module, seam, query, key, value, attention_mask, scaling, s_aux)
    if needs_grad or (module.training and dropout):
        return run().stock(dropout, indices, options), None
    if indices is not None:
        assert attention_mask is not None, "a model with an indexer always makes one"
        return run().selected(_selected(indices, attention_mask)), None
    s_q = query.shape[2]
    if (
        attention_mask is None
    ):  # one token that sees all keys, or a prompt that sees the first s_q (a static cache has more)
        return (run().prompt() if s_q > 1 else run().recent()), None
    if s_q == 1 and attention_mask.dtype == torch.bool:
        return run().visible(attention_mask[:, 0, 0]), None
    return run().stock(0.0, None, options), None


class _Call:
    """One attention over latents [batch, 1, s_k, d_latent] and RoPE [batch, 1, s_k, d_rope] that lie densely."""

    def __init__(
        self, module: Any, seam: _Seam, query: torch.Tensor, latent: torch.Tensor, rope: torch.Tensor,
        mask: torch.Tensor | None, scale: float, sink: torch.Tensor | None,
    ) -> None:  # fmt: skip
        self.module, self.seam, self.query, self.latent, self.rope = module, seam, query, latent, rope
        self.mask, self.scale, self.sink = mask, scale, None if sink is None else sink.float()

    def stock(self, dropout: float, indices: torch.Tensor | None, options: dict[str, Any]) -> torch.Tensor:
        """Expanded, by SDPA under the mask: training, and the masks that no operator knows."""
        key, value = self.seam.expand(self.latent, self.rope)
        mask = self.mask
        if indices is not None:
            assert mask is not None, "a model with an indexer always makes one"
            chosen = torch.zeros_like(mask).scatter(-1, indices.long()[:, None], True)
            mask = mask & chosen
        out: torch.Tensor
        out, _ = sdpa_attention_forward(
            self.module, self.query, key, value, mask, dropout=dropout, scaling=self.scale, s_aux=self.sink, **options
        )
        return out

    def prompt(self) -> torch.Tensor:
        """Expanded, causal, no padding."""
        if self.sink is not None:
            return self.stock(0.0, None, {})
        batch, _, s_q, _ = self.query.shape
        expanded = self.seam.expand(self.latent[:, :, :s_q], self.rope[:, :, :s_q])
        if (
            self.query.is_cuda and forms.prefill_backend(self.seam.backend) is None
        ):  # prompts of one length are what PyTorch's engines are for
            given, _ = sdpa_attention_forward(
                self.module, self.query, *expanded, None, dropout=0.0, scaling=self.scale, is_causal=True
            )
            whole: torch.Tensor = given
            return whole
        q, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (self.query, *expanded))
        offsets = torch.arange(0, batch * s_q + 1, s_q, dtype=torch.int32, device=q.device)
        out, _ = prefill(
            q, key, value, offsets, offsets, s_q, s_q, softmax_scale=self.scale, is_causal=True,
            backend=forms.prefill_backend(self.seam.backend),
        )  # fmt: skip
        heads: torch.Tensor = out.unflatten(0, (batch, s_q))
        return heads

    def recent(self) -> torch.Tensor:
        """Absorbed; one query per request, which sees all keys."""
        pages, each = self._pages()
        table = torch.arange(len(pages), dtype=torch.int32, device=pages.device).view(-1, each)
        lengths = torch.full((len(table),), self.latent.shape[2], dtype=torch.int32, device=pages.device)
        return self._decode(pages, table, lengths)

    def _pages(self, order: torch.Tensor | None = None) -> tuple[torch.Tensor, int]:
        """Latent and RoPE side by side in pages of PAGE_SIZE [pages, PAGE_SIZE, 1, columns], and pages per request.

        The size is the same at every step, else GPU kernels would be compiled at every token. With `order` [batch, s_k] the
        tokens of a request stand in that order.
        """
        batch, _, s_k, d_latent = self.latent.shape
        each = -(-s_k // PAGE_SIZE)
        rows = self.latent.new_empty(batch, each * PAGE_SIZE, d_latent + self.rope.shape[-1])
        parts = [self.latent[:, 0], self.rope[:, 0]]
        if order is not None:
            parts = [torch.take_along_dim(part, order[:, :, None], 1) for part in parts]
        rows[:, :s_k, :d_latent], rows[:, :s_k, d_latent:] = parts
        return rows.view(batch * each, PAGE_SIZE, 1, -1), each

    def visible(self, seen: torch.Tensor) -> torch.Tensor:
        """Absorbed; the one query of each request sees the keys of `seen` [batch, s_k], whatever their pattern.

        Those that are seen come first, in order: pages of PAGE_SIZE, which Hopper kernels read. A table of single tokens would
        save the copy, but is Triton's alone.
        """
        pages, each = self._pages(torch.argsort(~seen, dim=1, stable=True))
        table = torch.arange(len(pages), dtype=torch.int32, device=pages.device).view(-1, each)
        return self._decode(pages, table, seen.sum(1, dtype=torch.int32))

    def _decode(self, cache: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        q, w_uv = _absorbed(self.module, self.seam, self.query)
        out, _ = native.decode(
            q, cache, table, lengths, d_v=self.module.kv_lora_rank, softmax_scale=self.scale, is_causal=True,
            attn_sink=self.sink, return_lse=False, backend=self.seam.backend,
        )  # fmt: skip
        return forms.project(out, w_uv)

    def selected(self, positions: torch.Tensor) -> torch.Tensor:
        """Absorbed, each query over the keys at its `positions` [batch, s_q, topk]; -1 is none."""
        pages, each = self._pages()
        requests = torch.arange(positions.shape[0], device=pages.device, dtype=torch.int32)[:, None, None]
        slots = torch.where(positions >= 0, positions + requests * (each * PAGE_SIZE), -1)
        return sparse_attention(self.module, self.seam, self.query, pages, None, slots, self.scale, self.sink)


def _absorbed(module: Any, seam: _Seam, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The absorbed query [batch, s_q, h_q, d_latent + d_rope], and W_UV for the output."""
    w_uk, w_uv = seam.up_projections(module)
    return forms.absorb(query.transpose(1, 2), w_uk), w_uv


def _selected(indices: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """An indexer's choice without what the query may not see: it fills up with those where too few are visible."""
    allowed = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > torch.finfo(mask.dtype).min / 2
    return torch.where(allowed.gather(-1, indices.long()), indices, -1)


def sparse_attention(
    module: Any, seam: _Seam, query: torch.Tensor, cache: torch.Tensor, layout: KVLayout | None, slots: torch.Tensor,
    scale: float, sink: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """Absorbed attention over slots [batch, s_q, topk] of a paged cache -> [batch, s_q, h_q, d_v]."""
    q, w_uv = _absorbed(module, seam, query)
    out, _ = native.sparse_decode(
        q, cache, slots.contiguous(), kv_layout=layout, d_v=module.kv_lora_rank, softmax_scale=scale,
        attn_sink=None if sink is None else sink.float(), return_lse=False, backend=seam.backend,
    )  # fmt: skip
    return forms.project(out, w_uv)


def _over_pages(
    module: Any, seam: _Seam, pages: PagedLayer, query: torch.Tensor, latent: torch.Tensor, rope: torch.Tensor,
    mask: torch.Tensor | None, scale: float, indices: torch.Tensor | None, sink: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """Write the new tokens, then attend over the pages."""
    if mask is not None and not getattr(mask, "openmla_is_causal", False):
        raise ProblemError(
            "attention",
            ["a LatentCache takes causal attention with padding only, this mask is another; use a DynamicCache"],
        )
    batch, _, s_q, _ = query.shape
    valid = None if mask is None else mask.diagonal(pages.before, -2, -1)[:, 0]  # a token sees itself, unless padding
    counts = pages.write(torch.cat([latent, rope], -1)[:, 0], valid)
    if indices is not None:
        assert mask is not None, "a model with an indexer always makes one"
        chosen = _selected(indices, mask)
        begin = torch.arange(batch, device=query.device, dtype=torch.int32)[:, None, None]
        slots = torch.where(chosen >= 0, chosen + begin * (pages.pages_each * pages.pool.shape[1]), -1)
        return sparse_attention(module, seam, query, pages.pool, pages.layout, slots, scale, sink)
    if pages.before == 0 and s_q > 1:
        fresh = _Call(module, seam, query, latent, rope, mask, scale, sink)
        return fresh.prompt() if mask is None else fresh.stock(0.0, None, {})
    q, w_uv = _absorbed(module, seam, query)
    table, lengths = pages.block_table, pages.lengths
    if s_q > 1 and mask is not None:  # padding among the new tokens: each query has a length of its own
        q = q.flatten(0, 1)[:, None]
        table, lengths = table.repeat_interleave(s_q, 0), counts.flatten()
    out, _ = native.decode(
        q, pages.pool, table, lengths, d_v=module.kv_lora_rank, softmax_scale=scale, is_causal=True,
        kv_layout=pages.layout, attn_sink=None if sink is None else sink.float(), return_lse=False,
        backend=seam.backend,
    )  # fmt: skip
    return forms.project(out.reshape(batch, s_q, *out.shape[2:]), w_uv)
