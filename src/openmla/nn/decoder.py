"""A small language model of MLA blocks: DeepSeek-V3's architecture without experts, in PyTorch alone.

Its parameters bear the names of transformers' dense DeepSeek-V3 (`first_k_dense_replace` = layers, embeddings tied),
so one file of weights serves both. `openmla-tiny` is one of these.

    model = Decoder(DecoderConfig(vocab=2048, layers=4, d_mlp=512, mla=MLAConfig(256, 8)))
    logits = model(ids)                                  # [batch, s, vocab], differentiable
    text = model.generate(prompt, 100)                   # over a paged latent cache
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from openmla.core.errors import ProblemError
from openmla.core.layout import KVLayout, kv_layout, plain_layout
from openmla.kv.cache import PagedKVCache
from openmla.nn.mla import MLA, MLAConfig
from openmla.nn.passes import Pass
from openmla.nn.rope import Rope, Rotation


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder."""

    vocab: int
    layers: int
    d_mlp: int
    mla: MLAConfig
    max_length: int = 1024

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """From the `config.json` of a dense DeepSeek-V3.

        Raises:
            ProblemError: the model has experts, or its embeddings are not tied.
        """
        wrong = []
        if config.get("first_k_dense_replace", 0) < config["num_hidden_layers"]:
            wrong.append("a Decoder has no experts: first_k_dense_replace must be num_hidden_layers or more")
        if not config.get("tie_word_embeddings"):
            wrong.append("a Decoder ties its embeddings: tie_word_embeddings must be true")
        if wrong:
            raise ProblemError("DecoderConfig", wrong)
        return cls(
            config["vocab_size"], config["num_hidden_layers"], config["intermediate_size"],
            MLAConfig.from_config(config), config["max_position_embeddings"],
        )  # fmt: skip

    def as_config(self) -> dict[str, Any]:
        """The `config.json` with which transformers builds the same model."""
        mla = self.mla
        if mla.rope.yarn is not None or mla.has_bias:
            raise ProblemError("DecoderConfig", ["only a plain rotary embedding and no biases can be written"])
        return {
            "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": self.vocab,
            "hidden_size": mla.hidden, "intermediate_size": self.d_mlp, "num_hidden_layers": self.layers,
            "first_k_dense_replace": self.layers, "num_attention_heads": mla.heads, "num_key_value_heads": mla.heads,
            "q_lora_rank": mla.q_lora_rank, "kv_lora_rank": mla.d_latent, "qk_rope_head_dim": mla.d_rope,
            "qk_nope_head_dim": mla.d_nope, "v_head_dim": mla.d_v, "rms_norm_eps": mla.eps, "hidden_act": "silu",
            "max_position_embeddings": self.max_length, "rope_interleave": True, "attention_bias": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": mla.rope.theta}, "tie_word_embeddings": True,
            "moe_intermediate_size": self.d_mlp, "n_routed_experts": 4, "n_shared_experts": 1,
            "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "num_mtp_layers": 0, "bos_token_id": 0,
            "eos_token_id": 0, "pad_token_id": 0, "dtype": "bfloat16",
        }  # fmt: skip


class Decoder(nn.Module):
    """Embedding, `layers` times (norm, MLA, norm, SwiGLU), norm, tied readout.

    Args:
        config: sizes.
        backend: of the operators; default OPENMLA_BACKEND.
    """

    def __init__(self, config: DecoderConfig, *, backend: str | None = None) -> None:
        super().__init__()
        self.config = config
        self.model = _Stack(config, backend)

    def forward(self, ids: torch.Tensor, step: Pass | None = None) -> torch.Tensor:
        """Logits of the next token.

        Args:
            ids: int64 [batch, s], or [total] with `step`.
            step: a pass over a paged cache; None for the tokens of ids alone.

        Returns:
            [..., vocab].
        """
        hidden = self.model(ids, step)
        return functional.linear(hidden, self.model.embed_tokens.weight)

    @torch.inference_mode()
    def generate(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        layout: KVLayout | str | None = None,
    ) -> list[int]:
        """New tokens behind a prompt, over a paged latent cache: a prompt's pass, then one token at a time.

        Args:
            prompt: at least one token id.
            max_new_tokens: how many.
            temperature: 0 takes the likeliest.
            generator: of the random numbers, on the CPU.
            layout: of the cache; default: plain elements in the dtype of the model.

        Raises:
            ProblemError: an empty prompt, or more tokens than the model was trained for.
        """
        total, config = len(prompt) + max_new_tokens, self.config
        if not prompt or total > config.max_length:
            raise ProblemError(
                "generate",
                [
                    f"need a prompt of at least 1 token and {config.max_length} tokens in all, got {len(prompt)} and {total}"
                ],
            )
        weight, mla = self.model.embed_tokens.weight, config.mla
        plain = plain_layout(weight.dtype, mla.d_latent + mla.d_rope, mla.d_latent)
        kind = plain if layout is None else kv_layout(layout)
        cache = PagedKVCache(kind, -(-total // 64), 64, config.layers, device=weight.device)
        cache.alloc("it")
        found: list[int] = []
        fed = list(prompt)
        while len(found) < max_new_tokens:
            step = Pass.begin(cache, ["it"], [len(fed)])
            logits = self(torch.tensor(fed, device=weight.device), step)[-1].float()
            if temperature > 0:
                shares = (logits / temperature).softmax(-1).cpu()
                fed = [int(torch.multinomial(shares, 1, generator=generator))]
            else:
                fed = [int(logits.argmax())]
            found += fed
        return found


class _Stack(nn.Module):
    """What transformers calls `model`."""

    def __init__(self, config: DecoderConfig, backend: str | None) -> None:
        super().__init__()
        self.rope: Callable[[torch.Tensor], Rotation] = config.mla.rope
        self.embed_tokens = nn.Embedding(config.vocab, config.mla.hidden)
        self.layers = nn.ModuleList(_Layer(config, backend) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.mla.hidden, eps=config.mla.eps)

    def forward(self, ids: torch.Tensor, step: Pass | None) -> torch.Tensor:
        positions = torch.arange(ids.shape[-1], device=ids.device) if step is None else step.positions
        rotation = self.rope(positions)
        hidden = self.embed_tokens(ids)
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, rotation, step, index)
        result: torch.Tensor = self.norm(hidden)
        return result


class _Layer(nn.Module):
    def __init__(self, config: DecoderConfig, backend: str | None) -> None:
        super().__init__()
        hidden, eps = config.mla.hidden, config.mla.eps
        self.input_layernorm = nn.RMSNorm(hidden, eps=eps)
        self.self_attn = MLA(config.mla, backend=backend)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps=eps)
        self.mlp = _MLP(hidden, config.d_mlp)

    def forward(self, x: torch.Tensor, rotation: Rotation, step: Pass | None, index: int) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation, step, layer=index)
        result: torch.Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return result


class _MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return result


def tiny() -> DecoderConfig:
    """The sizes of openmla-tiny: the true latent (512 + 64), a low-rank query, all else small. 5.8 million parameters."""
    mla = MLAConfig(hidden=256, heads=8, q_lora_rank=96, d_nope=64, d_v=64, rope=Rope(64))
    return DecoderConfig(vocab=2048, layers=4, d_mlp=512, mla=mla, max_length=1024)
