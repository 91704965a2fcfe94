"""The MLA block: projections, rotary embedding, attention in the form that is cheaper, heads over many ranks.

Parameters bear the names of DeepSeek-V2's and V3's checkpoints, so `model.layers.7.self_attn.` is the only thing to
strip. One block serves training (expanded, differentiable) and inference over a `PagedKVCache`:

    mla = MLA(MLAConfig.from_config(json.load(open("config.json"))))
    mla.load_checkpoint(tensors, "model.layers.7.self_attn.")
    y = mla(x, positions)                                     # [batch, s, hidden]: causal, with gradients
    with torch.inference_mode():
        step = Pass.begin(cache, ["a", "b"], [1, 1])
        y = mla(x, step.positions, step, layer=7)             # [2, hidden]
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed import ProcessGroup

from openmla import distributed
from openmla.core.errors import ProblemError
from openmla.nn import forms
from openmla.nn.passes import Pass
from openmla.nn.rope import Rope, Rotation
from openmla.ops import native
from openmla.ops.prefill import KeyChunk, prefill, prefill_behind

CONTEXT_TOKENS = 16384  # of all requests, expanded at once: 1.3 GB at 128 heads of 192 + 128 columns in bf16
_BLOCK = 128  # DeepSeek-V3's FP8 weights: one fp32 scale per 128 x 128 block


@dataclass(frozen=True)
class MLAConfig:
    """Sizes of an MLA block; the defaults of everything but hidden and heads are DeepSeek's.

    q_lora_rank None projects the query directly (DeepSeek-V2-Lite).
    """

    hidden: int
    heads: int
    q_lora_rank: int | None = None
    d_latent: int = 512
    d_rope: int = 64
    d_nope: int = 128
    d_v: int = 128
    eps: float = 1e-6
    has_bias: bool = False
    rope: Rope = field(default_factory=Rope)

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("hidden", "heads", "d_latent", "d_rope", "d_nope", "d_v")}
        wrong = [f"{name} must be at least 1, got {size}" for name, size in sizes.items() if size < 1]
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            wrong.append(f"q_lora_rank must be at least 1, or None for a direct projection, got {self.q_lora_rank}")
        if self.d_rope % 2 or self.rope.d_rope != self.d_rope:
            wrong.append(f"d_rope must be even and that of rope ({self.rope.d_rope}), got {self.d_rope}")
        if wrong:
            raise ProblemError("MLAConfig", wrong)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> MLAConfig:
        """From the `config.json` of a DeepSeek checkpoint, or `PreTrainedConfig.to_dict()`.

        Raises:
            ProblemError: a size is missing, or the rotary embedding is of another kind.
        """
        needed = (
            "hidden_size",
            "num_attention_heads",
            "kv_lora_rank",
            "qk_rope_head_dim",
            "qk_nope_head_dim",
            "v_head_dim",
        )
        missing = [f"{name} is missing; is this the config of an MLA model?" for name in needed if name not in config]
        if missing:
            raise ProblemError("MLAConfig", missing)
        return cls(
            hidden=config["hidden_size"], heads=config["num_attention_heads"], q_lora_rank=config.get("q_lora_rank"),
            d_latent=config["kv_lora_rank"], d_rope=config["qk_rope_head_dim"], d_nope=config["qk_nope_head_dim"],
            d_v=config["v_head_dim"], has_bias=bool(config.get("attention_bias", False)), rope=Rope.from_config(config),
        )  # fmt: skip

    @property
    def d_qk(self) -> int:
        """Columns of a head's query, expanded."""
        return self.d_nope + self.d_rope

    @property
    def softmax_scale(self) -> float:
        """d_qk ** -0.5, times what YaRN asks for."""
        return self.rope.softmax_factor / math.sqrt(self.d_qk)


class MLA(nn.Module):
    """Multi-head Latent Attention, causal.

        c_q = norm(W_DQ x)                    q = (q_nope, rope(q_rope)) = W_UQ c_q       (or W_Q x)
        (c, r) = W_DKV x                      c = norm(c), r = rope(r): the row that is cached
        y = W_O concat_h(attention_h)

    Args:
        config: sizes.
        group: tensor parallelism: this rank holds `heads / world` heads (q, kv_b and o projections), the latent
            projections are whole on every rank, and the output is summed over the ranks.
        backend: of the operators; default OPENMLA_BACKEND. `cute` has no dense prefill: prompts then run as by default.
        device, dtype: of the parameters.

    Raises:
        ProblemError: heads are not divisible by the group's size.

    Notes:
        Determinism: as `openmla.decode` and `openmla.prefill`; the sum over ranks in the order of the backend.
    """

    def __init__(
        self,
        config: MLAConfig,
        *,
        group: ProcessGroup | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        world = group.size() if group is not None else 1
        if config.heads % world:
            raise ProblemError("MLA", [f"heads={config.heads} must be divisible by the {world} ranks of the group"])
        self.config, self.group, self.backend = config, group, backend
        self.heads = config.heads // world  # of this rank

        def linear(columns: int, rows: int, has_bias: bool = False) -> nn.Linear:
            return nn.Linear(columns, rows, bias=has_bias, device=device, dtype=dtype)

        def norm(columns: int) -> nn.RMSNorm:
            return nn.RMSNorm(columns, eps=config.eps, device=device, dtype=dtype)

        rank, all_q = config.q_lora_rank, self.heads * config.d_qk
        if rank is None:
            self.q_proj = linear(config.hidden, all_q)
        else:
            self.q_a_proj = linear(config.hidden, rank, config.has_bias)
            self.q_a_layernorm = norm(rank)
            self.q_b_proj = linear(rank, all_q)
        self.kv_a_proj_with_mqa = linear(config.hidden, config.d_latent + config.d_rope, config.has_bias)
        self.kv_a_layernorm = norm(config.d_latent)
        self.kv_b_proj = linear(config.d_latent, self.heads * (config.d_nope + config.d_v))
        self.o_proj = linear(self.heads * config.d_v, config.hidden, config.has_bias)

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor | Rotation,
        step: Pass | None = None,
        *,
        layer: int = 0,
        form: Literal["auto", "expanded", "absorbed"] = "auto",
    ) -> torch.Tensor:
        """Attention of the tokens in x among themselves, and over what the cache holds of their requests.

        Args:
            x: [batch, s, hidden], or [total, hidden] with `step` (request behind request). bf16|fp16|fp32.
            positions: int [batch, s] (or [s], [total]), or the Rotation that `config.rope(positions)` made of them
                once for all layers.
            step: the pass over a paged cache; None for attention within x alone.
            layer: pool of the cache.
            form: `auto` is expanded without a cache, and the one with fewer FLOPs with one (`forms.cheaper_form`).

        Returns:
            [..., hidden] like x. Differentiable in the expanded form without a cache.

        Raises:
            ProblemError: shapes contradict each other, or gradients are asked of what has none.
            UnsupportedError: no permitted backend.
        """
        self._check(x, step, form)
        config = self.config
        rotation = positions if isinstance(positions, Rotation) else config.rope(positions)
        _check_positions(rotation.cos.shape[:-1], x.shape[:-1])
        if self.config.q_lora_rank is None:
            q = self.q_proj(distributed.shared_input(x, self.group))
        else:
            q = self.q_b_proj(distributed.shared_input(self.q_a_layernorm(self.q_a_proj(x)), self.group))
        q = q.unflatten(-1, (self.heads, config.d_qk))
        q = torch.cat([q[..., : config.d_nope], rotation.unsqueeze(-2)(q[..., config.d_nope :])], -1)
        latent, rope = self.kv_a_proj_with_mqa(x).split([config.d_latent, config.d_rope], -1)
        rows = torch.cat([self.kv_a_layernorm(latent), rotation(rope)], -1)
        rows = distributed.shared_input(rows, self.group)
        if step is None:
            out = self._within(q, rows, "expanded" if form == "auto" else form)
        else:
            step.cache.write(layer, step.slots, rows.reshape(-1, rows.shape[-1]))
            chosen = step.form(config.d_nope, config.d_v) if form == "auto" else form
            run = self._expanded_over if chosen == "expanded" else self._absorbed_over
            out = run(q.reshape(-1, *q.shape[-2:]), rows.reshape(-1, rows.shape[-1]), step, layer)
        return self._project(out.reshape(*x.shape[:-1], -1))

    def _project(self, heads: torch.Tensor) -> torch.Tensor:
        if self.group is None:
            result: torch.Tensor = self.o_proj(heads)
            return result
        summed = distributed.sum_output(nn.functional.linear(heads, self.o_proj.weight), self.group)
        return summed if self.o_proj.bias is None else summed + self.o_proj.bias

    # Attention

    def _within(self, q: torch.Tensor, rows: torch.Tensor, form: str) -> torch.Tensor:
        """Without a cache: q [batch, s, h, d_qk], rows [batch, s, d_latent + d_rope] -> [batch, s, h, d_v]."""
        batch, s_q = q.shape[:2]
        config, device = self.config, q.device
        if form == "expanded":
            offsets = torch.arange(0, batch * s_q + 1, s_q or 1, dtype=torch.int32, device=device)[: batch + 1]
            key, value = self._expand(rows.flatten(0, 1))
            out, _ = prefill(
                q.flatten(0, 1), key, value, offsets, offsets, s_q, s_q, softmax_scale=config.softmax_scale,
                is_causal=True, backend=forms.prefill_backend(self.backend),
            )  # fmt: skip
            return out
        w_uk, w_uv = forms.up_projections(self.kv_b_proj.weight, config.d_nope, config.d_v)
        table = torch.arange(batch, dtype=torch.int32, device=device)[:, None]  # a page holds a whole sequence
        lengths = torch.full((batch,), s_q, dtype=torch.int32, device=device)
        out, _ = native.decode(
            forms.absorb(q, w_uk), rows[:, :, None], table, lengths, d_v=config.d_latent, is_causal=True,
            softmax_scale=config.softmax_scale, return_lse=False, backend=self.backend,
        )  # fmt: skip
        return forms.project(out, w_uv)

    def _expand(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        config = self.config
        latent, rope = rows.split([config.d_latent, config.d_rope], -1)
        return forms.expand(latent, rope, self.kv_b_proj.weight, config.d_nope, config.d_v)

    def _expanded_over(self, q: torch.Tensor, rows: torch.Tensor, step: Pass, layer: int) -> torch.Tensor:
        """Queries [total, h, d_qk] over the new rows, and over what the cache held of the requests before."""
        key, value = self._expand(rows)
        out, _ = prefill_behind(
            q, key, value, step.offsets(step.counts), max(step.counts, default=0), self._context(step, layer, rows.dtype),
            softmax_scale=self.config.softmax_scale, backend=forms.prefill_backend(self.backend),
        )  # fmt: skip
        return out

    def _context(self, step: Pass, layer: int, dtype: torch.dtype) -> Iterator[KeyChunk]:
        """What the cache held of the requests before the pass, expanded, about CONTEXT_TOKENS at a time."""
        each = max(CONTEXT_TOKENS // max(len(step.requests), 1), 1)
        for begin in range(0, max(step.begins, default=0), each):
            ends = [max(min(before, begin + each), begin) for before in step.begins]
            held = [
                step.cache.gather(layer, request, begin, end) for request, end in zip(step.requests, ends, strict=True)
            ]
            key, value = self._expand(torch.cat(held).to(dtype))
            yield KeyChunk(key, value, step.offsets([end - begin for end in ends]), max(ends) - begin)

    def _absorbed_over(self, q: torch.Tensor, rows: torch.Tensor, step: Pass, layer: int) -> torch.Tensor:
        config = self.config
        w_uk, w_uv = forms.up_projections(self.kv_b_proj.weight, config.d_nope, config.d_v)
        absorbed, options = forms.absorb(q, w_uk), dict[str, Any]()
        if step.is_uniform:
            absorbed = absorbed.unflatten(0, (len(step.requests), -1))
        else:
            options = {"cu_seqlens_q": step.offsets(step.counts), "max_seqlen_q": max(step.counts)}
        out, _ = native.decode(
            absorbed, step.cache.pages(layer), step.block_table, step.cache_seqlens, d_v=config.d_latent,
            softmax_scale=config.softmax_scale, is_causal=True, kv_layout=step.cache.layout, return_lse=False,
            backend=self.backend, **options,
        )  # fmt: skip
        return forms.project(out, w_uv)

    def _check(self, x: torch.Tensor, step: Pass | None, form: str) -> None:
        config, wrong = self.config, []
        if form not in ("auto", "expanded", "absorbed"):
            wrong.append(f"form must be auto, expanded or absorbed, got {form!r}")
        if x.shape[-1] != config.hidden or x.dim() not in ((2, 3) if step else (3,)):
            shapes = "[batch, s, hidden] or [total, hidden]" if step else "[batch, s, hidden]"
            wrong.append(f"x must be {shapes} with hidden={config.hidden}, got {tuple(x.shape)}")
        if step is not None:
            if x.numel() != sum(step.counts) * config.hidden:
                wrong.append(f"x must hold the {sum(step.counts)} token(s) of the pass, got {tuple(x.shape)}")
            layout = step.cache.layout
            if (layout.d_qk, layout.d_v) != (config.d_latent + config.d_rope, config.d_latent):
                wrong.append(
                    f"the cache must have d_qk={config.d_latent + config.d_rope} and d_v={config.d_latent}, "
                    f"layout {layout} has {layout.d_qk} and {layout.d_v}"
                )
        if torch.is_grad_enabled() and (x.requires_grad or self.kv_b_proj.weight.requires_grad):
            if step is not None:
                wrong.append("a pass over a cache has no gradient; run it under torch.inference_mode() or no_grad()")
            elif form == "absorbed":
                wrong.append("the absorbed form has no gradient; train in the expanded form, or use torch.no_grad()")
        if wrong:
            raise ProblemError("MLA", wrong)

    # Checkpoints

    @torch.no_grad()
    def load_checkpoint(self, tensors: Mapping[str, torch.Tensor], prefix: str = "") -> None:
        """Copy this rank's share of a DeepSeek-V2 or V3 checkpoint into the parameters.

        Args:
            tensors: by name, whole (not cut by rank). FP8 weights come with `<name>_scale_inv` [rows/128, columns/128].
            prefix: in front of the names, `model.layers.7.self_attn.` say.

        Raises:
            ProblemError: names are missing or shapes differ; lists all of them. Nothing was changed.
        """
        found, wrong = {}, []
        for name, parameter in self.named_parameters():
            whole = tensors.get(prefix + name)
            if whole is None:
                wrong.append(f"{prefix + name} is missing from the checkpoint")
                continue
            dim = self._sharded_dim(name)
            shape = list(parameter.shape)
            if dim is not None and self.group is not None:
                shape[dim] *= self.group.size()
            if list(whole.shape) != shape:
                wrong.append(f"{prefix + name} must be {tuple(shape)} for this config, got {tuple(whole.shape)}")
                continue
            if whole.element_size() == 1:
                scale = tensors.get(f"{prefix + name}_scale_inv")
                if scale is None:
                    wrong.append(f"{prefix + name} is {whole.dtype} and needs {prefix + name}_scale_inv")
                    continue
                whole = _dequantise(whole, scale)
            found[parameter] = self._share(whole, dim)
        if wrong:
            raise ProblemError("load_checkpoint", wrong)
        for parameter, value in found.items():
            parameter.copy_(value)

    def _sharded_dim(self, name: str) -> int | None:
        """Which dimension of a parameter goes over the ranks: rows of the heads, or columns of o_proj."""
        if name in ("q_proj.weight", "q_b_proj.weight", "kv_b_proj.weight"):
            return 0
        return 1 if name == "o_proj.weight" else None

    def _share(self, whole: torch.Tensor, dim: int | None) -> torch.Tensor:
        if dim is None or self.group is None:
            return whole
        return whole.chunk(self.group.size(), dim)[self.group.rank()]


def _dequantise(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """FP8 weight [rows, columns] times one scale per 128 x 128 block, in fp32."""
    spread = scale.float().repeat_interleave(_BLOCK, 0)[: weight.shape[0]]
    return weight.float() * spread.repeat_interleave(_BLOCK, 1)[:, : weight.shape[1]]


def _check_positions(given: tuple[int, ...], tokens: tuple[int, ...]) -> None:
    """One position for each token, or one row of them for all requests."""
    pairs = zip(reversed(given), reversed(tokens), strict=False)
    if len(given) > len(tokens) or any(have not in (1, want) for have, want in pairs):
        raise ProblemError("MLA", [f"positions must be {tuple(tokens)} like x without its columns, got {tuple(given)}"])
