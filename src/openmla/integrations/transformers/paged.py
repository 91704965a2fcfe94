"""A transformers DeepSeek model on OpenMLA's paged cache and operators.

transformers (5.16 and later) caches the latent of a token, and expands it to per-head keys and values before every
attention: h_q * (d_nope + d_rope + d_v) numbers per token, for all tokens, at every step. Here decoding leaves the
latent as it is and moves the two halves of `kv_b_proj` to the other side of the product instead (W_UK into the
query, W_UV behind the output): attention of h_q heads over one latent of d_latent + d_rope columns.

    scores   q_nope . (W_UK c) + q_rope . k_rope  =  (W_UK^T q_nope) . c + q_rope . k_rope
    output   sum_j p_j (W_UV c_j)                 =  W_UV (sum_j p_j c_j)

A prompt without context is cheaper expanded (192 + 128 columns per score instead of 576 + 512), so it is.

    paged = PagedModel(model, PagedKVCache("bf16_576", num_pages=1024, num_layers=len(model.model.layers)))
    paged.cache.alloc("a")
    logits = paged.forward(["a"], [prompt])       # prefill
    logits = paged.forward(["a"], [[next_id]])    # decode
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from openmla.core.errors import ProblemError, UnsupportedError
from openmla.kv.cache import PagedKVCache
from openmla.nn import forms
from openmla.nn.passes import Pass
from openmla.ops import native
from openmla.ops.prefill import prefill

NAME = "openmla"  # of the attention implementation; a name with "flash" in it would be taken for FlashAttention


@dataclass(frozen=True)
class AttentionCall:
    """One attention of one layer, operands and results, as an observer gets it.

    decode: q [batch, s_q, h_q, d_qk] absorbed, new_rows [batch, s_q, d_qk] (what was written to the cache just before),
    out [batch, s_q, h_q, d_v], lse [batch, h_q, s_q]. prefill: q [total_q, h_q, d_nope + d_rope], key and value
    expanded likewise, new_rows [1, total_q, d_qk], out [total_q, h_q, d_v], lse [h_q, total_q].
    """

    op: Literal["decode", "prefill"]
    layer: int
    requests: tuple[Hashable, ...]
    q: torch.Tensor
    new_rows: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    softmax_scale: float
    key: torch.Tensor | None = None
    value: torch.Tensor | None = None


Observer = Callable[[AttentionCall], None]


@dataclass(frozen=True)
class _Step:
    """What every layer of one forward pass needs to know; travels through the model as a keyword argument."""

    paged: PagedModel
    over: Pass


class PagedModel:
    """Runs a model of the DeepSeek-V2/V3 family over a PagedKVCache.

    The model's own attention is replaced until `detach()`; its weights stay where they are.

    Args:
        model: transformers `...ForCausalLM` whose attention modules have `expand_kv` and `kv_b_proj`, in eval mode.
        cache: one pool per layer of the model; its layout has d_latent + d_rope columns, d_latent of them values.
        backend: of the operators; default OPENMLA_BACKEND. `cute` has no dense prefill: prompts then run as by default.
        observe: called after every attention.

    Raises:
        UnsupportedError: the model is none of that family, or transformers is too old.
        ProblemError: the cache does not fit the model.
    """

    def __init__(
        self, model: Any, cache: PagedKVCache, *, backend: str | None = None, observe: Observer | None = None
    ) -> None:
        _register()
        self.model, self.cache, self.backend, self.observe = model, cache, backend, observe
        self._attentions = [m for m in model.modules() if hasattr(m, "expand_kv") and hasattr(m, "kv_b_proj")]
        if not self._attentions:
            raise UnsupportedError(
                f"{type(model).__name__} cannot run on OpenMLA's paged cache",
                {"transformers": ("no attention module with expand_kv and kv_b_proj: not an MLA model, or < 5.16",)},
                "attach",
            )
        self._check_fit()
        self._stock_name = model.config._attn_implementation
        self._stock_expand = [m.expand_kv for m in self._attentions]
        for module in self._attentions:
            module.expand_kv = _keep_latent
        model.set_attn_implementation(NAME)

    def _check_fit(self) -> None:
        first, cache = self._attentions[0], self.cache
        d_latent, d_rope = first.kv_lora_rank, first.qk_rope_head_dim
        bad = []
        if cache.num_layers != len(self._attentions):
            bad.append(f"the model has {len(self._attentions)} attention layers, the cache {cache.num_layers}")
        if (cache.layout.d_qk, cache.layout.d_v) != (d_latent + d_rope, d_latent):
            bad.append(
                f"the model's latent is d_qk={d_latent + d_rope} d_v={d_latent}, "
                f"layout {cache.layout} has d_qk={cache.layout.d_qk} d_v={cache.layout.d_v}"
            )
        if cache.device != first.kv_b_proj.weight.device:
            bad.append(f"the model is on {first.kv_b_proj.weight.device}, the cache on {cache.device}")
        if bad:
            raise ProblemError("PagedModel", bad)

    def detach(self) -> None:
        """Give the model its own attention back."""
        for module, expand in zip(self._attentions, self._stock_expand, strict=True):
            module.expand_kv = expand
        self.model.set_attn_implementation(self._stock_name)

    def stock(self, layer: int) -> tuple[Any, Callable[..., tuple[torch.Tensor, torch.Tensor]]]:
        """The attention module of one layer, and its own `expand_kv`."""
        return self._attentions[layer], self._stock_expand[layer]

    @torch.inference_mode()
    def forward(self, requests: Sequence[Hashable], tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """One pass: s_q new tokens of each request, behind what the cache holds of it.

        Args:
            requests: allocated in the cache.
            tokens: [batch][s_q] token ids; the same s_q for all, at least 1.

        Returns:
            [batch, vocab] logits behind the last token of each request.

        Raises:
            OutOfPagesError: the cache has no room; nothing was changed.
            ProblemError: unknown request, or ragged tokens.
        """
        s_q = len(tokens[0]) if tokens else 0
        if s_q < 1 or len(tokens) != len(requests) or any(len(row) != s_q for row in tokens):
            raise ProblemError(
                "forward",
                [
                    f"tokens must be one row of the same length >= 1 per request, got {len(requests)} request(s) and "
                    f"rows of length {[len(row) for row in tokens]}; call once per length"
                ],
            )
        over = Pass.begin(self.cache, requests, [s_q] * len(requests))
        result = self.model(
            input_ids=torch.tensor([list(row) for row in tokens], device=self.cache.device),
            position_ids=over.positions.view(len(requests), s_q),
            use_cache=False,
            logits_to_keep=1,
            openmla_step=_Step(self, over),
        )
        logits: torch.Tensor = result.logits[:, -1]
        return logits

    def attend(
        self, module: Any, query: torch.Tensor, latent: torch.Tensor, rope: torch.Tensor, scale: float, step: Pass
    ) -> torch.Tensor:
        """Attention of one layer. query [batch, h_q, s_q, d_nope + d_rope], latent and rope [batch, 1, s_q, columns].

        Returns [batch, s_q, h_q, d_v of the model].
        """
        layer = module.layer_idx
        new_rows = torch.cat([latent, rope], -1)[:, 0]  # [batch, s_q, d_qk]
        self.cache.write(layer, step.slots, new_rows.flatten(0, 1))
        if step.is_fresh and new_rows.shape[1] > 1:
            return self._attend_expanded(module, query, latent, rope, scale, step, new_rows)
        w_uk, w_uv = forms.up_projections(module.kv_b_proj.weight, module.qk_nope_head_dim, module.v_head_dim)
        q = forms.absorb(query.transpose(1, 2), w_uk)
        out, lse = native.decode(
            q, self.cache.pages(layer), step.block_table, step.cache_seqlens, d_v=module.kv_lora_rank,
            softmax_scale=scale, is_causal=True, kv_layout=self.cache.layout, backend=self.backend,
        )  # fmt: skip
        if self.observe is not None:
            assert lse is not None, "asked for by default"
            self.observe(AttentionCall("decode", layer, step.requests, q, new_rows, out, lse, scale))
        return forms.project(out, w_uv)

    def _attend_expanded(
        self, module: Any, query: torch.Tensor, latent: torch.Tensor, rope: torch.Tensor, scale: float, step: Pass,
        new_rows: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        batch, _, s_q, _ = query.shape
        expand = self._stock_expand[self._attentions.index(module)]
        q, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, *expand(latent, rope)))
        offsets = torch.arange(0, batch * s_q + 1, s_q, dtype=torch.int32, device=q.device)
        run = partial(prefill, softmax_scale=scale, is_causal=True, backend=forms.prefill_backend(self.backend))
        out, lse = run(q, key, value, offsets, offsets, s_q, s_q)
        if self.observe is not None:
            self.observe(
                AttentionCall("prefill", module.layer_idx, step.requests, q, new_rows, out, lse, scale, key, value)
            )
        heads: torch.Tensor = out.unflatten(0, (batch, s_q))
        return heads


def _keep_latent(latent: torch.Tensor, rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Stands in for `expand_kv`: the attention function gets the latent itself."""
    return latent, rope


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    *, scaling: float, openmla_step: _Step | None = None, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """The entry that transformers calls by NAME; key and value are latent and RoPE."""
    if openmla_step is None:
        raise ProblemError(
            "attention", ["an attached model runs through PagedModel.forward; call detach() to use the model directly"]
        )
    return openmla_step.paged.attend(module, query, key, value, scaling, openmla_step.over), None


def _register() -> None:
    """Make NAME known to transformers. Raises ImportError with the command to install it."""
    try:
        from transformers import AttentionInterface
    except ImportError as error:
        raise ImportError('transformers (>= 5.16, < 6) is not installed; run: pip install "openmla[hf]"') from error
    AttentionInterface.register(NAME, _attention)
