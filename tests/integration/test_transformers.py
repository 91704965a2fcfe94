"""transformers models on OpenMLA: greedy tokens equal stock `generate()` in fp32, whatever the cache.

The models are tiny and random, with weights large enough that attention decides the next token.
"""

from __future__ import annotations

import gc
import itertools
import weakref

import pytest
import torch

pytest.importorskip("transformers", reason='needs transformers: pip install "openmla[hf]"')

import transformers

from openmla.core.errors import ProblemError, UnsupportedError
from openmla.integrations.transformers import LatentCache, attach, continuous
from openmla.integrations.transformers import attention as seam
from openmla.ops import native

SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 32, "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 24, "v_head_dim": 20, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1, "max_position_embeddings": 512,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
NEW = 24


def build(family: str, **changes):
    config_type, model_type, options = {
        "v2": (transformers.DeepseekV2Config, transformers.DeepseekV2ForCausalLM, {"q_lora_rank": None}),
        "v3": (transformers.DeepseekV3Config, transformers.DeepseekV3ForCausalLM, {"q_lora_rank": 48}),
        "v32": (
            transformers.DeepseekV32Config,
            transformers.DeepseekV32ForCausalLM,
            {"q_lora_rank": 48, "index_topk": 8, "index_head_dim": 32, "index_n_heads": 2},
        ),
    }[family]
    torch.manual_seed(0)
    model = model_type(config_type(**SIZES | options | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model


@pytest.fixture(scope="module", params=["v2", "v3", "v32"])
def model(request):
    return build(request.param)


@pytest.fixture(scope="module")
def v3():
    return build("v3")


PROMPTS = [[5, 9, 11, 77, 3, 64, 2, 90, 41, 8], [17, 4, 99, 100, 23, 7], [31]]


def padded() -> dict[str, torch.Tensor]:
    """Three prompts of different lengths, padded on the left as `generate` wants them."""
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    return {"input_ids": ids, "attention_mask": mask}


def plain() -> dict[str, torch.Tensor]:
    ids = torch.tensor([PROMPTS[0], PROMPTS[0][::-1]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def tokens(model, batch, **options) -> list[list[int]]:
    options = {"max_new_tokens": NEW, "do_sample": False} | options
    with torch.random.fork_rng():
        return model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :].tolist()


def sure_tokens(model, batch) -> list[list[int]]:
    """Stock tokens; the test would say nothing if the model repeated itself."""
    found = tokens(model, batch)
    assert len({tuple(row) for row in found}) == len(found)
    assert sum(len(set(row)) > 4 for row in found) >= 2
    return found


STATIC = {"cache_implementation": "static", "disable_compile": True}


@pytest.mark.parametrize("batch", [plain, padded])
@pytest.mark.parametrize("cache", ["dynamic", "static", "pages"])
def test_tokens_equal_stock(model, cache, batch) -> None:
    want = sure_tokens(model, batch())
    if cache == "static":  # V3.2's indexer breaks ties by the length of the cache, so stock differs from itself
        want = tokens(model, batch(), **STATIC)
    attached = attach(model)
    try:
        options = {"dynamic": {}, "static": STATIC, "pages": {"past_key_values": attached.cache()}}[cache]
        assert tokens(model, batch(), **options) == want
    finally:
        attached.detach()
    options = STATIC if cache == "static" else {}
    assert tokens(model, batch(), **options) == want, "detach gives the model its own attention back"


def test_logits_agree_and_a_mistake_is_seen(model, monkeypatch) -> None:
    """The control: the same route with a scale 10 % off is far outside."""
    batch = padded()
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        want = model(**batch).logits[real]
        attached = attach(model)
        try:
            torch.testing.assert_close(model(**batch).logits[real], want, rtol=1e-4, atol=1e-4)
            cache = attached.cache()
            torch.testing.assert_close(model(**batch, past_key_values=cache).logits[real], want, rtol=1e-4, atol=1e-4)
            one = {"input_ids": torch.tensor([[3]] * 3), "past_key_values": cache}
            one["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones(3, 1, dtype=torch.int64)], 1)
            right = model(**one).logits
            for name in ("decode", "sparse_decode"):
                stock = getattr(native, name)
                monkeypatch.setattr(
                    native,
                    name,
                    lambda *a, _stock=stock, softmax_scale, **o: _stock(*a, softmax_scale=1.1 * softmax_scale, **o),
                )
            one["attention_mask"] = torch.cat([one["attention_mask"], torch.ones(3, 1, dtype=torch.int64)], 1)
            wrong = model(**one).logits
            assert (wrong - right).abs().max() > 1e-2
        finally:
            attached.detach()


def test_decoding_runs_on_the_operators(model, monkeypatch) -> None:
    """Not on a fallback: one call per layer and token, in the absorbed form."""
    calls = []
    for name in ("decode", "sparse_decode"):
        stock = getattr(native, name)
        monkeypatch.setattr(
            native, name, lambda q, *a, _n=name, _s=stock, **o: calls.append((_n, q.shape[-1])) or _s(q, *a, **o)
        )
    attached = attach(model)
    try:
        tokens(model, plain(), max_new_tokens=5, past_key_values=attached.cache())
    finally:
        attached.detach()
    is_sparse = hasattr(attached.modules[0], "indexer")
    # The first new token comes from the prompt's pass; V3.2 computes that one over its selection too.
    assert calls == [("sparse_decode" if is_sparse else "decode", 48)] * (
        SIZES["num_hidden_layers"] * (5 if is_sparse else 4)
    )


def test_experts_run_by_the_size_of_the_step(v3, monkeypatch) -> None:
    """The switch that generate() makes on a GPU is not made; tokens stay; detach gives the experts' own way back."""
    from transformers.integrations import moe

    from openmla.integrations.transformers import experts

    monkeypatch.setattr(experts, "DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(experts, "MANY", 5)
    ran = []
    for name in ("grouped_mm", "batched_mm"):
        stock = getattr(moe, f"{name}_experts_forward")
        monkeypatch.setattr(
            moe,
            f"{name}_experts_forward",
            lambda m, x, *a, _n=name, _s=stock: ran.append((_n, x.shape[0])) or _s(m, x, *a),
        )
    want, before = sure_tokens(v3, plain()), v3.config._experts_implementation
    attached = attach(v3)
    try:
        assert v3.config._experts_implementation == experts.NAME
        ran.clear()
        assert tokens(v3, plain()) == want
        assert set(ran) == {("grouped_mm", 20), ("batched_mm", 2)}  # two requests, two experts each: 4 pairs
    finally:
        attached.detach()
    assert v3.config._experts_implementation == before


@pytest.mark.parametrize("batch", [plain, padded])
def test_captured_steps_keep_the_tokens(v3, batch, monkeypatch) -> None:
    """With an eager stand-in for the CUDA graph: the host's bookkeeping, growing pages, a second cache, other calls."""
    from openmla.integrations.transformers import steps

    captured = []

    def fake(step):
        """A replay runs the step and, like a graph, leaves no trace on the host."""
        captured.append(step)
        cache = next(c.cell_contents for c in step.__closure__ if isinstance(c.cell_contents, LatentCache))

        def replay() -> None:
            counted = [(layer.before, layer.seen) for layer in cache.layers]
            step()
            for layer, (before, seen) in zip(cache.layers, counted, strict=True):
                layer.before, layer.seen = before, seen

        return replay

    monkeypatch.setattr(steps, "_captured", fake)
    monkeypatch.setattr(steps, "_DEVICES", ("cpu",))
    want, long = sure_tokens(v3, batch()), tokens(v3, batch(), max_new_tokens=70)
    attached = attach(v3, step_graphs=True)
    try:
        cache = attached.cache()
        assert tokens(v3, batch(), past_key_values=cache) == want
        assert attached.steps.replays == NEW - 2  # the prompt gives the first, the second warms up
        assert cache.get_seq_length() == batch()["input_ids"].shape[1] + NEW - 1
        assert tokens(v3, batch(), past_key_values=attached.cache(), max_new_tokens=70) == long
        assert len(captured) == 3  # one page, then two pages per request
        replays = attached.steps.replays
        held = weakref.ref(cache)
        del cache
        captured.clear()
        attached.steps._replay = None  # the stand-in holds its step, which a graph does not
        gc.collect()
        assert held() is None, "neither the graph nor the model keeps a cache alive"
        assert tokens(v3, batch(), num_beams=2, past_key_values=attached.cache())
        assert tokens(v3, batch()) == want
        assert attached.steps.replays == replays, (
            "beams reorder their requests at every step; a DynamicCache has no pages"
        )
    finally:
        attached.detach()
    assert tokens(v3, batch()) == want
    assert "forward" not in vars(v3)


def test_pages_grow_and_hold_no_padding(v3) -> None:
    attached = attach(v3)
    try:
        cache = attached.cache()
        tokens(v3, padded(), max_new_tokens=70, past_key_values=cache)
    finally:
        attached.detach()
    layer = cache.layers[0]
    assert layer.pages_each == 2
    assert layer.lengths.tolist() == [len(p) + 69 for p in PROMPTS]
    assert cache.get_seq_length() == len(PROMPTS[0]) + 69


def test_fp8_pages_stay_close_in_bf16() -> None:
    """fp8_656 needs the true latent sizes; its logits differ by the rounding of the cache, and are no others."""
    model = build("v3", kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128).to(torch.bfloat16)
    batch = padded()
    attached = attach(model)
    try:
        with torch.no_grad():
            logits = {}
            for layout in (None, "fp8_656"):
                cache = LatentCache(model, layout)
                model(**batch, past_key_values=cache)
                mask = torch.cat([batch["attention_mask"], torch.ones(3, 1, dtype=torch.int64)], 1)
                logits[layout] = model(
                    torch.tensor([[3]] * 3), attention_mask=mask, past_key_values=cache
                ).logits.float()
        assert cache.layers[0].pool.dtype == torch.uint8
    finally:
        attached.detach()
    apart = (logits["fp8_656"] - logits[None]).norm() / logits[None].norm()
    assert 0 < apart < 0.1


@pytest.mark.parametrize("pages", [False, True])
def test_beam_search_and_several_tokens_at_once(v3, pages) -> None:
    """Beams copy requests; a chunk behind a context is several queries at once, with padding in the middle."""
    want = tokens(v3, padded(), num_beams=3)
    batch = padded()
    more = torch.tensor([[7, 8, 9], [0, 8, 9], [7, 8, 9]])
    mask = torch.cat([batch["attention_mask"], (more > 0).long()], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    def chunked(cache):
        with torch.no_grad():
            v3(**batch, past_key_values=cache, position_ids=positions[:, : -more.shape[1]])
            return v3(more, attention_mask=mask, past_key_values=cache, position_ids=positions[:, -3:]).logits[more > 0]

    wanted = chunked(transformers.DynamicCache(config=v3.config))
    attached = attach(v3)
    try:
        cache = attached.cache if pages else lambda: transformers.DynamicCache(config=v3.config)
        assert tokens(v3, padded(), num_beams=3, past_key_values=cache()) == want
        torch.testing.assert_close(chunked(cache()), wanted, rtol=1e-4, atol=1e-4)
    finally:
        attached.detach()


def test_requests_behind_one_another_come_to_lie_in_pages_of_their_own() -> None:
    """Each finds its own rows, whatever lies behind the last request; sizes go in steps."""
    lengths = [1, 64, 0, 130, 65]
    starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    for padding in (0, 5):
        total = sum(lengths) + padding
        rows = torch.arange(total * 6, dtype=torch.float32).view(total, 6)
        pages, table = continuous._in_pages(rows.chunk(2, 1), starts, max(lengths))
        assert (pages.shape[1:], table.dtype) == ((64, 1, 6), torch.int32)
        assert int(table.max()) < len(pages)
        for request, length in enumerate(lengths):
            own = pages[table[request].long()].flatten(0, 2)[:length]
            assert torch.equal(own, rows[starts[request] : starts[request + 1]]), (padding, request)
    assert [continuous._in_steps(n) for n in (1, 3, 33, 64, 65, 129)] == [1, 4, 64, 64, 128, 192]


def test_continuous_batching_is_repaired(v3, monkeypatch) -> None:
    """Stock crashes on MLA; attached, every request gets the tokens of its own `generate()`, by decodes that Hopper kernels
    take: pages of 64, and steps of one token per request in the uniform form.
    """
    asked = []
    stock = native.decode
    monkeypatch.setattr(
        native, "decode", lambda q, kv, *a, **o: asked.append((q.dim(), kv.shape[1])) or stock(q, kv, *a, **o)
    )
    settings = transformers.GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    fields = transformers.ContinuousBatchingConfig.__dataclass_fields__
    size = "page_size" if "page_size" in fields else "block_size"  # renamed after 5.17
    options = transformers.ContinuousBatchingConfig(**{size: 16}, num_blocks=8, max_batch_tokens=24)
    want = [
        tokens(
            v3,
            {"input_ids": torch.tensor([p]), "attention_mask": torch.ones(1, len(p), dtype=torch.int64)},
            max_new_tokens=8,
        )[0]
        for p in PROMPTS
    ]
    attached = attach(v3)
    try:
        found = v3.generate_batch(
            [list(p) for p in PROMPTS], generation_config=settings, continuous_batching_config=options
        )
        assert v3.config._attn_implementation == seam.NAME
    finally:
        attached.detach()
    by_prompt = {tuple(each.prompt_ids): each.generated_tokens for each in found.values()}
    assert [by_prompt[tuple(p)] for p in PROMPTS] == want
    assert {page_size for _, page_size in asked} == {64}
    assert sum(dim == 4 for dim, _ in asked) > len(asked) / 2


def test_a_static_cache_decodes_as_one_compiled_graph(v3) -> None:
    """`fullgraph` raises at the first thing that a graph cannot hold; one graph serves all tokens."""
    ids = torch.tensor([PROMPTS[0]])

    def run(step):
        cache = transformers.StaticCache(config=v3.config, max_cache_len=32)
        with torch.no_grad():
            v3(ids, past_key_values=cache)
            fed = [torch.tensor([[token]]) for token in (3, 4, 5)]
            return torch.cat([step(input_ids=each, past_key_values=cache).logits for each in fed])

    want = run(v3)
    attached = attach(v3)
    try:
        compiled = torch.compile(v3, fullgraph=True, backend="eager")
        torch.testing.assert_close(run(compiled), want, rtol=1e-4, atol=1e-4)
    finally:
        attached.detach()
        torch.compiler.reset()


def test_training_has_the_gradients_of_stock(v3) -> None:
    ids = plain()["input_ids"]

    def gradients():
        v3.zero_grad()
        v3(ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in v3.parameters() if p.grad is not None]

    want = gradients()
    attached = attach(v3)
    try:
        found = gradients()
    finally:
        attached.detach()
        v3.zero_grad()
    assert len(found) == len(want) > 30
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_other_masks_are_respected(v3) -> None:
    """Two sequences packed into one row by their positions: no key of the first may be seen by the second."""
    ids = torch.tensor([PROMPTS[0] + PROMPTS[1]])
    positions = torch.tensor([[*range(len(PROMPTS[0])), *range(len(PROMPTS[1]))]])
    with torch.no_grad():
        want = v3(ids, position_ids=positions, use_cache=False).logits
        attached = attach(v3)
        try:
            torch.testing.assert_close(
                v3(ids, position_ids=positions, use_cache=False).logits, want, rtol=1e-4, atol=1e-4
            )
            with pytest.raises(ProblemError, match="causal attention with padding only"):
                v3.model.layers[0].self_attn(
                    v3.model.embed_tokens(ids), v3.model.rotary_emb(v3.model.embed_tokens(ids), positions),
                    torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool), past_key_values=attached.cache(),
                )  # fmt: skip
        finally:
            attached.detach()


FAMILIES = {
    "Glm4MoeLite": {}, "Youtu": {}, "MiniCPM3": {}, "Mistral4": {}, "AXK1": {}, "AXK2": {},
    "GlmMoeDsa": {"index_topk": 8, "index_head_dim": 32, "index_n_heads": 2},
    "LongcatFlash": {
        "num_layers": 2, "num_hidden_layers": None, "head_dim": 16, "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 32, "zero_expert_num": 1, "moe_topk": 2,
    },
}  # fmt: skip
HYBRID = ["linear_attention", "full_attention", "full_attention"]
# What has layers of another kind, or indices of another layer: it keeps the caches of transformers.
MIXED = {
    "HYV4": {},
    "BailingHybrid": {"layer_types": HYBRID, "head_dim": 16},
    "KimiLinear": {
        "q_lora_rank": None, "layer_types": HYBRID, "linear_head_dim": 16, "linear_num_heads": 2,
        "num_local_experts": 4, "mlp_layer_types": ["dense"] * 3,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", [*FAMILIES, *MIXED])
def test_other_families_through_the_same_seam(name) -> None:
    config_type = getattr(transformers, f"{name}Config", None)
    if config_type is None:
        pytest.skip(f"this transformers has no {name}")
    sizes = SIZES | {"q_lora_rank": 48} | (FAMILIES | MIXED)[name]
    if sizes["num_hidden_layers"] is None:
        del sizes["num_hidden_layers"]
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config_type(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    want = tokens(model, padded())
    attached = attach(model)
    try:
        assert tokens(model, padded()) == want
        if name in MIXED:
            with pytest.raises(UnsupportedError, match=rf"LatentCache cannot hold {name}"):
                attached.cache()
        else:
            assert tokens(model, padded(), past_key_values=attached.cache()) == want
    finally:
        attached.detach()


def test_refusals(v3) -> None:
    with pytest.raises(UnsupportedError, match=r"not an MLA model, or transformers < 5\.16"):
        attach(
            transformers.LlamaForCausalLM(
                transformers.LlamaConfig(
                    vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
                )
            )
        )
    attached = attach(v3)
    try:
        with pytest.raises(UnsupportedError, match=r"already attached; call detach\(\) first"):
            attach(v3)
        with pytest.raises(ProblemError, match=r"latent is d_qk=48 d_v=32, layout fp8_656 has d_qk=576 d_v=512"):
            tokens(v3, plain(), past_key_values=attached.cache("fp8_656"))
    finally:
        attached.detach()
