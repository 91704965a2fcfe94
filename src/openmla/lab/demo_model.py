"""The model and the text of the demo: nothing to download, the same on every machine of one Python version.

The model is transformers' DeepSeek-V3 with the MLA sizes of the real one (latent 512, RoPE 64, per head 128 + 64 key
and 128 value columns) and everything else small. Its weights come from a seed, with two things arranged so that its
output depends on what attention returns:

    look-back heads   most heads of every layer prefer the token a few places back: a constant direction of the
                      residual stream feeds the RoPE part of query and key, whose angle encodes the distance. The other
                      heads are left random; they average over the whole context.
    readout           `lm_head` is fitted to the text in one linear least-squares step.

The result babbles in the manner of its text. A wrong page, a wrong length or a wrong scale changes what it says,
which a model with purely random weights would hardly notice: that one repeats a single byte for ever.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
from typing import Any

import torch

MODULES = ("textwrap", "tokenize", "argparse", "string", "shlex")  # sources that every CPython carries
VOCABULARY = 256  # a token is a byte
HEADS = 16
LAYERS = 3
_HIDDEN = 512
_D_NOPE, _D_ROPE, _D_LATENT, _D_V = 128, 64, 512, 128

# How many tokens back each look-back head of a layer prefers. Four heads per layer are not listed: they stay random.
_LOOK_BACK = (
    (1, 1, 1, 2, 2, 2, 3, 3, 4, 4, 5, 6),
    (1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 8, 9),
    (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12),
)
# The constant direction is column 0 of the embedding, three standard deviations of the others. With _SHARPNESS 6 a
# look-back head gives its place about 98 % of its weight.
_CONSTANT, _SHARPNESS = 3.0, 6.0


def text(length: int) -> bytes:
    """The first `length` bytes of Python's own library, runs of white space folded to one blank."""
    folded = b""
    for name in MODULES:
        folded += re.sub(rb"\s+", b" ", inspect.getsource(importlib.import_module(name)).encode())
        if len(folded) >= length:
            return folded[:length]
    raise ValueError(f"asked for {length} bytes of text, there are {len(folded)}")


def build(seed: int, fit_to: bytes, max_length: int) -> Any:
    """The model in fp32 on the CPU, in eval mode; `lm_head` fitted to predict each next byte of `fit_to`."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        vocab_size=VOCABULARY, hidden_size=_HIDDEN, intermediate_size=1024, moe_intermediate_size=256,
        num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=HEADS,
        n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, n_group=1, topk_group=1,
        first_k_dense_replace=LAYERS - 1, q_lora_rank=None, kv_lora_rank=_D_LATENT, qk_rope_head_dim=_D_ROPE,
        qk_nope_head_dim=_D_NOPE, v_head_dim=_D_V, max_position_embeddings=max_length, num_mtp_layers=0,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DeepseekV3ForCausalLM(config).eval()
        with torch.no_grad():
            _randomise(model)
            for layer, distances in zip(model.model.layers, _LOOK_BACK, strict=True):
                _look_back(layer.self_attn, distances)
    _fit_readout(model, fit_to)
    return model


def _randomise(model: Any) -> None:
    """Variance-keeping random weights (transformers' own start, 0.02, would leave attention without effect)."""
    for name, weight in model.named_parameters():
        if weight.dim() >= 2 and "gate.weight" not in name:
            # Keys and queries of random heads: logits of a spread of about 1, so that they neither peak nor vanish.
            gain = {"q_proj": 0.5, "lm_head": 0.0}.get(name.split(".")[-2], 1.0)
            weight.normal_(0, gain / math.sqrt(weight.shape[-1]))
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight[0] = 0  # column 0 of the residual stream stays the constant
        elif name.endswith("experts.down_proj"):
            weight[:, 0] = 0
    embedding = model.model.embed_tokens.weight
    embedding.normal_()
    embedding[:, 0] = _CONSTANT


def _look_back(attention: Any, distances: tuple[int, ...]) -> None:
    """Let head h prefer the key `distances[h]` places back.

    Rotary pair f turns by angle a_f per place. With key (1, 0) and query (cos d a_f, -sin d a_f) in every pair, the
    score of a key t places back is the sum of cos((t - d) a_f): largest at t = d.
    """
    pairs = torch.arange(0, _D_ROPE, 2, dtype=torch.float32)
    angle = attention.config.rope_parameters["rope_theta"] ** (-pairs / _D_ROPE)
    query = attention.q_proj.weight.view(HEADS, _D_NOPE + _D_ROPE, -1)
    for head, distance in enumerate(distances):
        query[head, _D_NOPE:] = 0
        query[head, _D_NOPE::2, 0] = _SHARPNESS * torch.cos(distance * angle)
        query[head, _D_NOPE + 1 :: 2, 0] = -_SHARPNESS * torch.sin(distance * angle)
    for head in range(len(distances), HEADS):
        query[head, _D_NOPE:] = 0
    key = attention.kv_a_proj_with_mqa.weight
    key[_D_LATENT:] = 0
    key[_D_LATENT::2, 0] = _SHARPNESS


@torch.inference_mode()
def _fit_readout(model: Any, content: bytes, window: int = 512) -> None:
    """Ridge regression from the last hidden state to the one-hot next byte, in fp64."""
    ids = torch.tensor(list(content), dtype=torch.int64)
    hidden = torch.cat([model.model(piece[None], use_cache=False).last_hidden_state[0] for piece in ids.split(window)])
    x = hidden[:-1].double()
    y = torch.nn.functional.one_hot(ids[1:], VOCABULARY).double()
    gram = x.T @ x
    ridge = 1e-7 * float(gram.diagonal().mean())
    weight = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=torch.float64), x.T @ y).T
    # Regression gives values between 0 and 1; a logit of 10 reads as near certainty.
    model.lm_head.weight.copy_(10 * weight)
