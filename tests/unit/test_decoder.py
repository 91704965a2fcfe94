"""The dense decoder: the function of transformers' DeepSeek-V3 with the same weights, and generation over pages."""

from __future__ import annotations

import pytest
import torch

from openmla.core.errors import ProblemError
from openmla.nn import Decoder, DecoderConfig, MLAConfig, Rope
from openmla.nn.decoder import tiny


@pytest.fixture(scope="module")
def model() -> Decoder:
    torch.manual_seed(0)
    mla = MLAConfig(48, 4, q_lora_rank=24, d_nope=24, d_v=20)
    found = Decoder(DecoderConfig(vocab=96, layers=2, d_mlp=64, mla=mla, max_length=128)).eval()
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return found


def test_equals_transformers_with_the_same_weights(model) -> None:
    transformers = pytest.importorskip("transformers", reason='needs transformers: pip install "openmla[hf]"')
    config = transformers.DeepseekV3Config(**model.config.as_config())
    theirs = transformers.DeepseekV3ForCausalLM(config).eval().float()
    missing, unexpected = theirs.load_state_dict(model.state_dict(), strict=False)
    assert unexpected == []
    assert set(missing) <= {"lm_head.weight"}
    theirs.tie_weights()
    ids = torch.randint(96, (2, 17))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
    again = DecoderConfig.from_config(config.to_dict())
    assert again == model.config


def test_generation_over_pages_equals_recomputing(model) -> None:
    prompt = [5, 17, 3, 80, 41]
    fed = list(prompt)
    with torch.no_grad():
        for _ in range(70):
            fed.append(int(model(torch.tensor([fed]))[0, -1].argmax()))
    assert model.generate(prompt, 70) == fed[len(prompt) :]
    assert len(set(fed)) > 8


def test_fp8_pages_and_sampling(model) -> None:
    narrow = Decoder(model.config).to(torch.bfloat16)
    narrow.load_state_dict(model.state_dict())
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    made = [narrow.generate([1, 2], 12, temperature=1.0, generator=g, layout="fp8_656") for g in seeds]
    assert made[0] == made[1] != made[2]


def test_refusals(model) -> None:
    with pytest.raises(ProblemError, match=r"at least 1 token and 128 tokens in all, got 0 and 4"):
        model.generate([], 4)
    with pytest.raises(ProblemError, match="got 100 and 200"):
        model.generate([1] * 100, 100)
    with pytest.raises(ProblemError, match=r"(?s)no experts.*must be true"):
        DecoderConfig.from_config({"num_hidden_layers": 4, "first_k_dense_replace": 1})
    with pytest.raises(ProblemError, match="no biases can be written"):
        DecoderConfig(8, 1, 8, MLAConfig(8, 1, has_bias=True)).as_config()


def test_openmla_tiny_fits_in_12_mb() -> None:
    config = tiny()
    count = sum(p.numel() for p in Decoder(config).parameters())
    assert (config.mla.d_latent, config.mla.d_rope) == (512, 64)
    assert 5.7e6 < count < 5.9e6
    assert 2 * count < 12e6 - 200_000
    assert config.mla.rope == Rope(64)
