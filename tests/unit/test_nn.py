"""The MLA block: equal to transformers' DeepSeek modules, absorbed equal to naive, gradients, caches, checkpoints."""

from __future__ import annotations

import math
from itertools import accumulate

import pytest
import torch

from openmla.core.errors import ProblemError, UnsupportedError
from openmla.core.layout import plain_layout
from openmla.kv.cache import PagedKVCache
from openmla.nn import MLA, MLAConfig, Pass, Rope, YaRN
from openmla.nn import mla as mla_module
from openmla.nn.forms import cheaper_form
from openmla.ops.prefill import KeyChunk, prefill_behind
from openmla.reference import attention
from openmla.testing import budget

YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 64,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.707, "mscale_all_dim": 0.9,
}  # fmt: skip
SIZES = {
    "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 32, "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 24, "v_head_dim": 20, "max_position_embeddings": 2560,
}  # fmt: skip


def stock(family: str, rank: int | None, rope: dict | None, seed: int = 0):
    """transformers' attention of one layer and its rotary embedding, fp64, with weights that matter."""
    transformers = pytest.importorskip("transformers", reason='needs transformers: pip install "openmla[hf]"')
    from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

    kinds = {
        "v2": (transformers.DeepseekV2Config, v2.DeepseekV2Attention, v2.DeepseekV2RotaryEmbedding),
        "v3": (transformers.DeepseekV3Config, v3.DeepseekV3Attention, v3.DeepseekV3RotaryEmbedding),
    }
    config_type, attention_type, rotary_type = kinds[family]
    given = dict(rope) if rope else {"rope_type": "default", "rope_theta": 10000.0}
    config = config_type(**SIZES, q_lora_rank=rank, rope_parameters=given, attention_bias=rank is not None)
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    attention = attention_type(config, 0).double()
    with torch.no_grad():
        for name, weight in attention.named_parameters():
            weight.normal_(0, 1 / math.sqrt(weight.shape[-1])) if weight.dim() > 1 else weight.normal_(1, 0.3)
            if name.endswith("bias"):
                weight.normal_(0, 0.1)
    return config, attention, rotary_type(config)


def run_stock(attention, rotary, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    angles = rotary(x, positions)
    s = x.shape[1]
    mask = torch.full((s, s), -torch.inf, dtype=x.dtype).triu(1)[None, None]
    return attention(x, position_embeddings=angles, attention_mask=mask)[0]


def ours_like(config, attention, dtype: torch.dtype = torch.float32, **options) -> MLA:
    mla = MLA(MLAConfig.from_config(config.to_dict()), dtype=dtype, **options)
    mla.load_checkpoint(
        {f"model.layers.3.self_attn.{k}": v for k, v in attention.state_dict().items()}, "model.layers.3.self_attn."
    )
    return mla


def small(heads: int = 4, **changes) -> MLA:
    torch.manual_seed(1)
    sizes = {"d_latent": 32, "d_rope": 16, "d_nope": 24, "d_v": 20, "rope": Rope(16)} | changes
    return MLA(MLAConfig(48, heads, **sizes))


@pytest.mark.parametrize("rope", [None, YARN], ids=["plain", "yarn"])
@pytest.mark.parametrize(("family", "rank"), [("v2", None), ("v2", 24), ("v3", None), ("v3", 24)])
def test_equals_transformers_forward_and_backward(family, rank, rope) -> None:
    """fp32 of ours against fp64 of transformers: outputs, and the gradient of every parameter and of x."""
    config, attention, rotary = stock(family, rank, rope)
    mla = ours_like(config, attention)
    # Positions and inputs that fp32 holds exactly enough: angles are fp32 on both sides.
    positions = torch.stack([torch.arange(11), torch.arange(11) + 70])
    x = torch.randn(2, 11, 48, dtype=torch.float32)
    golden_x, our_x = x.double().requires_grad_(), x.clone().requires_grad_()
    golden = run_stock(attention, rotary, golden_x, positions)
    out = mla(our_x, positions)
    torch.testing.assert_close(out.double(), golden, rtol=2e-5, atol=2e-5)
    weights = torch.randn_like(golden)
    (golden * weights).sum().backward()
    (out * weights.float()).sum().backward()
    torch.testing.assert_close(our_x.grad.double(), golden_x.grad, rtol=1e-4, atol=1e-4)
    theirs = dict(attention.named_parameters())
    for name, parameter in mla.named_parameters():
        torch.testing.assert_close(parameter.grad.double(), theirs[name].grad, rtol=2e-4, atol=2e-4, msg=name)


def test_a_wrong_mscale_is_seen() -> None:
    """The negative control of the test above: YaRN without its softmax factor is another function."""
    config, attention, rotary = stock("v3", 24, YARN)
    x, positions = torch.randn(1, 9, 48), torch.arange(9)[None]
    golden = run_stock(attention, rotary, x.double(), positions)
    mla = ours_like(config, attention)
    mla.config = MLAConfig.from_config(config.to_dict() | {"rope_parameters": YARN | {"mscale_all_dim": 0.5}})
    with torch.no_grad():
        assert (mla(x, positions).double() - golden).abs().max() > 1e-2


def test_absorbed_equals_naive() -> None:
    mla, x, positions = small(), torch.randn(2, 13, 48), torch.arange(13)[None].expand(2, -1)
    with torch.no_grad():
        naive = mla(x, positions, form="expanded")
        torch.testing.assert_close(mla(x, positions, form="absorbed"), naive, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mla(x, mla.config.rope(positions)), naive, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("form", "context"), [("auto", 16384), ("expanded", 16384), ("expanded", 4), ("expanded", 1), ("absorbed", 16384)]
)
def test_steps_over_a_cache_equal_one_pass(form, context, monkeypatch) -> None:
    """Prefill, a ragged chunk, then decode, two requests in two layers' pools: as if all tokens came at once."""
    monkeypatch.setattr(mla_module, "CONTEXT_TOKENS", context)
    mla = small()
    cache = PagedKVCache(plain_layout(torch.float32, 48, 32), 16, page_size=4, num_layers=2)
    lengths = {"a": 12, "b": 7}
    x = {name: torch.randn(n, 48) for name, n in lengths.items()}
    with torch.no_grad():
        whole = {name: mla(rows[None], torch.arange(len(rows))[None])[0] for name, rows in x.items()}
        for name in x:
            cache.alloc(name)
        seen = {name: [] for name in x}
        for counts in ((4, 4), (7, 2), (1, 1)):
            begins = [cache.allocator.length(name) for name in x]
            step = Pass.begin(cache, list(x), counts)
            fed = torch.cat([rows[a : a + n] for rows, a, n in zip(x.values(), begins, counts, strict=True)])
            out = mla(fed, step.positions, step, layer=1, form=form)
            cache.write(0, step.slots, torch.zeros(len(fed), 48))
            for name, part in zip(x, out.split(counts), strict=True):
                seen[name].append(part)
    for name in x:
        torch.testing.assert_close(torch.cat(seen[name]), whole[name], rtol=1e-5, atol=1e-5)
    assert cache.check_integrity() == ()


def test_new_tokens_behind_chunks_of_a_context_are_as_accurate_as_all_at_once() -> None:
    gen = torch.Generator().manual_seed(2)
    new, before = [5, 1, 3], [9, 0, 30]
    lengths = [n + c for n, c in zip(new, before, strict=True)]
    k, v = (torch.randn(sum(lengths), 2, d, generator=gen).bfloat16() for d in (24, 16))
    q = torch.randn(sum(new), 4, 24, generator=gen).bfloat16()

    def offsets(counts):
        return torch.tensor([0, *accumulate(counts)], dtype=torch.int32)

    golden = attention.prefill(
        q, k, v, offsets(new), offsets(lengths), softmax_scale=0.2, is_causal=True, with_bounds=True, num_splits=4
    )  # fmt: skip
    starts = offsets(lengths)[:-1].tolist()

    def rows(x, begins, ends):
        return torch.cat([x[s + a : s + b] for s, a, b in zip(starts, begins, ends, strict=True)])

    def context():
        for begin in range(0, max(before), 12):
            begins = [min(begin, c) for c in before]
            ends = [min(begin + 12, c) for c in before]
            counts = [b - a for a, b in zip(begins, ends, strict=True)]
            yield KeyChunk(rows(k, begins, ends), rows(v, begins, ends), offsets(counts), max(counts))

    fresh = (rows(k, before, lengths), rows(v, before, lengths), offsets(new), max(new))
    out, lse = prefill_behind(q, *fresh, context(), softmax_scale=0.2)
    budget.check(out, lse, golden, dtype=torch.bfloat16).require("three chunks")
    with pytest.raises(ProblemError, match="no gradient"):
        prefill_behind(q.requires_grad_(), *fresh, context())


def test_a_uniform_batch_keeps_its_shape() -> None:
    mla = MLA(MLAConfig(64, 4))
    cache = PagedKVCache("fp8_656", 4)
    for name in "ab":
        cache.alloc(name)
    with torch.inference_mode():
        step = Pass.begin(cache, "ab", [3, 3])
        assert mla(torch.randn(2, 3, 64), step.positions.view(2, 3), step).shape == (2, 3, 64)
        step = Pass.begin(cache, "ab", [1, 1])
        assert mla(torch.randn(2, 1, 64), step.positions.view(2, 1), step).shape == (2, 1, 64)


def test_the_cheaper_form_by_phase() -> None:
    v3 = {"d_latent": 512, "d_rope": 64, "d_nope": 128, "d_v": 128}
    assert cheaper_form([4096], [4096], **v3) == "expanded"
    assert cheaper_form([1] * 8, [4096] * 8, **v3) == "absorbed"
    assert cheaper_form([160], [100_000], **v3) == "absorbed"
    assert cheaper_form([180], [100_000], **v3) == "expanded"


def test_yarn_against_the_formula() -> None:
    rope = Rope(64, 10000.0, YaRN(40, 4096, mscale=1.0, mscale_all_dim=1.0))
    assert rope.softmax_factor == pytest.approx((0.1 * math.log(40) + 1) ** 2)
    assert rope.yarn.amplitude == 1
    plain, slow = Rope(64).frequencies(), rope.frequencies()
    assert torch.equal(slow[:10], plain[:10])
    torch.testing.assert_close(slow[-8:], plain[-8:] / 40)
    old_style = {"qk_rope_head_dim": 64, "rope_theta": 10000, "rope_scaling": {
        "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0}}  # fmt: skip
    assert Rope.from_config(old_style) == rope
    with pytest.raises(ProblemError, match="rope_type must be default or yarn, got 'longrope'"):
        Rope.from_config({"qk_rope_head_dim": 64, "rope_parameters": {"rope_type": "longrope"}})
    with pytest.raises(ProblemError, match=r"(?s)factor must be at least 1, got 0\.5.*beta_fast >= beta_slow"):
        YaRN(0.5, 64, beta_fast=1, beta_slow=2)


def test_the_angles_survive_a_cast_of_the_module() -> None:
    """bf16 weights must not mean bf16 frequencies: position 100000 would turn by another angle."""
    mla = small().to(torch.bfloat16)
    positions = torch.tensor([[100_000]])
    torch.testing.assert_close(mla.config.rope(positions).cos, Rope(16)(positions).cos, rtol=0, atol=0)


def test_fp8_checkpoint_is_scaled_block_by_block() -> None:
    mla = MLA(MLAConfig(256, 2, q_lora_rank=160, d_latent=128))
    whole = {name: torch.randn_like(parameter) for name, parameter in mla.named_parameters()}
    mla.load_checkpoint(whole)
    tensors = dict(whole)
    for name in ("q_b_proj.weight", "kv_b_proj.weight", "o_proj.weight"):
        weight = whole[name]
        scale = torch.rand(-(-weight.shape[0] // 128), -(-weight.shape[1] // 128)) + 0.01
        spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: weight.shape[0], : weight.shape[1]]
        tensors[name] = (weight / spread).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
    mla.load_checkpoint(tensors)
    for name, parameter in mla.named_parameters():
        error = (parameter - whole[name]).abs()
        assert bool((error <= whole[name].abs() / 16 + 1e-2).all()), name
    del tensors["o_proj.weight_scale_inv"]
    with pytest.raises(ProblemError, match=r"o_proj\.weight is torch\.float8_e4m3fn and needs"):
        mla.load_checkpoint(tensors)


def test_checkpoint_problems_come_all_at_once_and_change_nothing() -> None:
    mla = small()
    before = {name: parameter.clone() for name, parameter in mla.named_parameters()}
    tensors = {name: torch.zeros_like(p) for name, p in mla.named_parameters()}
    tensors["o_proj.weight"] = torch.zeros(3, 3)
    del tensors["kv_b_proj.weight"]
    with pytest.raises(
        ProblemError, match=r"(?s)kv_b_proj\.weight is missing.*o_proj\.weight must be \(48, 80\).*\(3, 3\)"
    ):
        mla.load_checkpoint(tensors)
    assert all(torch.equal(parameter, before[name]) for name, parameter in mla.named_parameters())


def test_refusals_say_rule_value_and_fix() -> None:
    mla = small()
    x, positions = torch.randn(1, 3, 48), torch.arange(3)[None]
    with pytest.raises(ProblemError, match="train in the expanded form"):
        mla(x, positions, form="absorbed")
    with pytest.raises(ProblemError, match=r"positions must be \(1, 3\) like x without its columns, got \(1, 2\)"):
        mla(x, positions[:, :2])
    with pytest.raises(ProblemError, match=r"(?s)form must be auto.*'fast'.*hidden=48, got \(1, 3, 47\)"):
        mla(x[..., :47], positions, form="fast")
    cache = PagedKVCache("fp32_576", 2)
    cache.alloc("a")
    step = Pass.begin(cache, ["a"], [2])
    with pytest.raises(
        ProblemError, match=r"(?s)2 token\(s\) of the pass, got \(1, 3, 48\).*d_qk=48 and d_v=32.*has no gradient"
    ):
        mla(x, positions, step)
    with pytest.raises(ProblemError, match="kv_lora_rank is missing"):
        MLAConfig.from_config({"hidden_size": 4, "num_attention_heads": 2})
    with pytest.raises(
        ProblemError, match=r"(?s)heads must be at least 1.*q_lora_rank must be at least 1.*d_rope must be even"
    ):
        MLAConfig(4, 0, q_lora_rank=0, d_rope=15)


def test_cute_has_no_dense_prefill_and_a_block_of_it_none_the_less_takes_prompts() -> None:
    """`cute` binds decoding; the expanded form is maintained libraries' there, as by default."""
    config = MLAConfig(hidden=32, heads=2)
    x, rotation = torch.randn(1, 5, 32), torch.arange(5)[None]
    with torch.no_grad():
        want = MLA(config)
        block = MLA(config, backend="cute")
        block.load_state_dict(want.state_dict())
        assert torch.equal(block(x, rotation), want(x, rotation))
        with pytest.raises(UnsupportedError, match="backend='cute'"):
            block(x, rotation, form="absorbed")
