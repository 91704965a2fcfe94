"""transformers models on OpenMLA on a GPU: whether every way to serve one gives the tokens of stock `generate()`.

    python tests/gpu/serve_models.py [--out rows.jsonl]
    python tests/gpu/serve_models.py --device cpu --only v3        the script itself, anywhere

Tiny random models of DeepSeek-V2, V3 and V3.2 with the true latent sizes (512 + 64), prompts of unequal length:

    fp32    tokens equal stock's: transformers' dynamic and static caches, pages, captured steps, continuous batching
    bf16    logits beside those of stock in bf16: its own cache, pages, and FP8 pages; captured steps over both give the eager tokens

One JSON row per case; exit 1 where one is wrong. Needs transformers.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from openmla.core import counters
from openmla.integrations.transformers import attach

SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 16, "num_key_value_heads": 16, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128, "v_head_dim": 128, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1, "max_position_embeddings": 1024,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "v2": ("DeepseekV2", {"q_lora_rank": None}),
    "v3": ("DeepseekV3", {"q_lora_rank": 48}),
    "v32": ("DeepseekV32", {"q_lora_rank": 48, "index_topk": 64, "index_head_dim": 128, "index_n_heads": 4}),
}
STATIC = {"cache_implementation": "static", "disable_compile": True}
NEW = 70  # over the end of a page
APART = {None: 0.02, "fp8_656": 0.1}  # of logits in bf16, by the norm: other rounding, and the rounding of FP8


def build(family: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Random weights, large enough that attention decides the next token."""
    name, options = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES | options)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(3)
    return model.to(device, dtype)


def prompts(device: torch.device) -> dict[str, torch.Tensor]:
    """Three of different lengths, padded on the left."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(1, 128, (n,), generator=generator) for n in (150, 61, 9)]
    ids = torch.stack([torch.nn.functional.pad(row, (150 - len(row), 0)) for row in rows])
    return {"input_ids": ids.to(device), "attention_mask": (ids > 0).long().to(device)}


def tokens(model: Any, batch: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    """What `generate` adds."""
    found: torch.Tensor = model.generate(**batch, max_new_tokens=NEW, do_sample=False, **options)
    return found[:, batch["input_ids"].shape[1] :]


def exact(model: Any, batch: dict[str, torch.Tensor], family: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """fp32."""
    want = tokens(model, batch)
    assert len({tuple(row) for row in want.tolist()}) == len(want), "the model says something"

    def equal(given: Callable[[Any], dict[str, Any]], wanted: torch.Tensor, **how: Any) -> object:
        attached = attach(model, **how)
        try:
            found = tokens(model, batch, **given(attached))
            assert torch.equal(found, wanted), f"{int((found != wanted).sum())} of {wanted.numel()} tokens differ"
            return {"replays": attached.steps.replays} if attached.steps else None
        finally:
            attached.detach()

    yield "dynamic cache", lambda: equal(lambda _: {}, want)
    if family != "v32":  # its indexer breaks ties by the length of the cache: stock differs from itself
        yield "static cache", lambda: equal(lambda _: STATIC, tokens(model, batch, **STATIC))
    yield "pages", lambda: equal(lambda a: {"past_key_values": a.cache()}, want)
    if batch["input_ids"].is_cuda and family != "v32":
        yield (
            "pages, captured steps",
            lambda: equal(lambda a: {"past_key_values": a.cache()}, want, step_graphs=True),
        )
    if family == "v3":
        yield "continuous batching", lambda: continuous(model, batch, want)


def continuous(model: Any, batch: dict[str, torch.Tensor], want: torch.Tensor) -> dict[str, int]:
    """`generate_batch`, on which stock crashes; the launches of each kernel that served it."""
    before = launches()
    rows = [row[mask > 0].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    settings = transformers.GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    fields = transformers.ContinuousBatchingConfig.__dataclass_fields__
    size = "page_size" if "page_size" in fields else "block_size"  # renamed after 5.17
    options = transformers.ContinuousBatchingConfig(**{size: 64}, num_blocks=16, max_batch_tokens=128)
    attached = attach(model)
    try:
        found = model.generate_batch(rows, generation_config=settings, continuous_batching_config=options)
    finally:
        attached.detach()
    by_prompt = {tuple(each.prompt_ids): each.generated_tokens for each in found.values()}
    assert [by_prompt[tuple(row)] for row in rows] == want.tolist(), "tokens differ"
    return since(before)


def launches() -> dict[str, int]:
    """By kernel, in this process so far."""
    found: dict[str, int] = {}
    for each in counters.tallies():
        name = f"{each.backend}/{each.kernel}"
        found[name] = found.get(name, 0) + each.calls
    return found


def since(before: dict[str, int]) -> dict[str, int]:
    """The launches after `before`."""
    return {name: count - before.get(name, 0) for name, count in launches().items() if count > before.get(name, 0)}


def close(model: Any, batch: dict[str, torch.Tensor], family: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """bf16, teacher-forced: the logits of a prompt and of four tokens behind it."""
    count = len(batch["input_ids"])
    fed = torch.randint(1, 128, (4, count, 1), generator=torch.Generator().manual_seed(2)).to(model.device)

    def logits(cache: Any) -> torch.Tensor:
        found = [model(**batch, past_key_values=cache, use_cache=True).logits[:, -1]]
        mask = batch["attention_mask"]
        for each in fed:
            mask = torch.cat([mask, mask.new_ones(count, 1)], 1)
            position = mask.sum(1, keepdim=True) - 1
            found.append(model(each, attention_mask=mask, position_ids=position, past_key_values=cache).logits[:, -1])
        return torch.stack(found).float()

    want = logits(transformers.DynamicCache(config=model.config))

    def compare(layout: str | None, is_own: bool = False) -> object:
        attached, before = attach(model), launches()
        try:
            cache = transformers.DynamicCache(config=model.config) if is_own else attached.cache(layout)
            apart = float((logits(cache) - want).norm() / want.norm())
        finally:
            attached.detach()
        assert apart < APART[layout], f"logits are {apart:.3f} apart, at most {APART[layout]}"
        return {"apart": round(apart, 5), **since(before)}

    def captured(layout: str | None) -> object:
        found = []
        for how in (False, True):
            attached = attach(model, step_graphs=how)
            try:
                found.append(tokens(model, batch, past_key_values=attached.cache(layout)))
                replays = attached.steps.replays if attached.steps else 0
            finally:
                attached.detach()
        assert torch.equal(*found), "captured steps give other tokens"
        # The first token is the prompt's, the second warms up; so does the one at which pages grow, once (192 to 384).
        assert replays == NEW - 3, f"{replays} replays of {NEW} steps"
        return {"replays": replays}

    yield "dynamic cache", lambda: compare(None, is_own=True)
    for layout in APART:
        name = layout or "bf16"
        yield f"{name} pages", lambda layout=layout: compare(layout)
        if batch["input_ids"].is_cuda and family != "v32":
            yield f"{name} pages, captured steps", lambda layout=layout: captured(layout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="*", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--case", nargs="*", help="of these names alone")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device, wrong = torch.device(options.device), 0
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    with torch.no_grad():
        for family in options.only:
            for dtype, cases in ((torch.float32, exact), (torch.bfloat16, close)):
                model, batch = build(family, device, dtype), prompts(device)
                for name, case in cases(model, batch, family):
                    if options.case and name not in options.case:
                        continue
                    row: dict[str, Any] = {
                        "what": "serve_models",
                        "model": family,
                        "dtype": str(dtype)[6:],
                        "case": name,
                    }
                    begin = time.perf_counter()
                    try:
                        row |= {"is_right": True, "found": case()}
                    except Exception as error:  # the next case is worth a look
                        row |= {"is_right": False, "found": f"{type(error).__name__}: {error}"[:300]}
                        wrong += 1
                    row |= {"seconds": round(time.perf_counter() - begin, 1), "device": machine}
                    print(json.dumps(row), flush=True)
                    if options.out:
                        with options.out.open("a") as file:
                            file.write(json.dumps(row) + "\n")
    print(f"{wrong} wrong", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
