"""What a served model gains: shared prefix, one decode layer, and transformers' generate(), each beside what it replaces.

    python tests/gpu/model_speed.py [--section prefix layer transformers] [--out rows.jsonl]
    python tests/gpu/model_speed.py --small --device cpu          the script itself, anywhere

Each figure compares in one process, interleaved, medians of many runs, behind a check that both compute the same:

    prefix         64 requests over one prefix of 32768 tokens, suffixes of 512, h_q 16: decode_shared_prefix against decode
    layer          MLA block of DeepSeek-V2-Lite, batch 64, 8192 tokens: the share of the operator's own speed that
                   attention has inside the block (block minus its projections)
    transformers   DeepSeek-V2-Lite sizes with random weights, batch 32, 4096 tokens of context: new tokens per second of
                   generate() stock and attached, on the cache of pages; and in fp32 with few layers that tokens are equal

Needs PyTorch; the last section transformers too, and says so where it is missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

import openmla
from openmla.nn import MLA, MLAConfig, Pass

SCALE = 192**-0.5
Row = dict[str, Any]


def interleaved(calls: dict[str, Callable[[], object]], device: torch.device, runs: int) -> Row:
    """Median and spread of each call in microseconds, one after another in every round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(runs + 2):
        for name, call in calls.items():
            if device.type == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                call()
                end.record()
                end.synchronize()
                took = begin.elapsed_time(end) * 1e3
            else:
                start = time.perf_counter()
                call()
                took = (time.perf_counter() - start) * 1e6
            if turn >= 2:
                times[name].append(took)
    return {
        "median_us": {name: round(statistics.median(each), 2) for name, each in times.items()},
        "spread_us": {name: round(max(each) - min(each), 2) for name, each in times.items()},
        "runs": runs,
    }


def graphed(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The call as a CUDA graph, so that launches from Python do not count; itself on a CPU."""
    if device.type != "cuda":
        return call
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def prefix(device: torch.device, small: bool) -> Row:
    """One long prefix, many requests."""
    batch, shared, own, h_q = (4, 256, 64, 16) if small else (64, 32768, 512, 16)
    pages = shared // 64 + batch * (own // 64)
    dtype = torch.bfloat16
    pool = torch.randn(pages, 64, 1, 576, device=device).to(dtype)
    order = torch.randperm(pages, device=device).to(torch.int32)
    head, tails = order[: shared // 64], order[shared // 64 :].view(batch, -1)
    table = torch.cat([head.expand(batch, -1), tails], 1).contiguous()
    lengths = torch.full((batch,), shared + own, dtype=torch.int32, device=device)
    q = torch.randn(batch, 1, h_q, 576, device=device).to(dtype)
    prefix_length = torch.tensor([shared], dtype=torch.int32, device=device)
    suffix_lengths = lengths - shared

    def together() -> tuple[torch.Tensor, torch.Tensor]:
        return openmla.decode_shared_prefix(
            q, pool, head[None], prefix_length, tails, suffix_lengths, softmax_scale=SCALE
        )

    def apart() -> tuple[torch.Tensor, torch.Tensor | None]:
        return openmla.decode(q, pool, table, lengths, softmax_scale=SCALE)

    torch.testing.assert_close(together()[1], apart()[1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(together()[0].float(), apart()[0].float(), rtol=2e-2, atol=2e-3)
    calls = {"shared": graphed(together, device), "apart": graphed(apart, device)}
    found = interleaved(calls, device, 3 if small else 30)
    median = found["median_us"]
    return {
        "what": "shared_prefix", "batch": batch, "prefix": shared, "suffix": own, "h_q": h_q, "dtype": "bf16", **found,
        "speedup": round(median["apart"] / median["shared"], 3),
    }  # fmt: skip


def layer(device: torch.device, small: bool) -> Row:
    """One block, one step."""
    batch, s_k = (2, 128) if small else (64, 8192)
    config = MLAConfig(hidden=2048, heads=16)
    torch.manual_seed(0)
    block = MLA(config, device=device, dtype=torch.bfloat16)
    cache = openmla.PagedKVCache("bf16_576", batch * (s_k // 64), 64, device=device)
    names = list(range(batch))
    for name in names:
        cache.alloc(name)
    cache.extend(names, [s_k - 1] * batch)
    cache.pages().normal_()
    with torch.inference_mode():
        step = Pass.begin(cache, names, [1] * batch)
        x = torch.randn(batch, 1, config.hidden, device=device).to(torch.bfloat16)
        rotation = config.rope(step.positions[:, None])
        q = torch.randn(batch, 1, config.heads, 576, device=device).to(torch.bfloat16)

        def operator() -> object:
            return openmla.decode(
                q, cache.pages(), step.block_table, step.cache_seqlens, softmax_scale=config.softmax_scale,
                is_causal=True, return_lse=False,
            )  # fmt: skip

        right = openmla.ops.native.decode
        ready = torch.zeros(batch, 1, config.heads, 512, device=device, dtype=torch.bfloat16)

        def projections() -> object:
            openmla.ops.native.decode = lambda *a, **o: (ready, None)
            try:
                return block(x, rotation, step)
            finally:
                openmla.ops.native.decode = right

        calls = {
            "block": lambda: block(x, rotation, step), "projections": projections, "operator": operator,
        }  # fmt: skip
        # The cache's writer checks slots on the host, which no graph can hold: it is timed as it is, and left out.
        stock_write = cache.write
        cache.write = lambda *a, **o: None  # type: ignore[method-assign]
        found = interleaved({name: graphed(call, device) for name, call in calls.items()}, device, 3 if small else 30)
        cache.write = stock_write  # type: ignore[method-assign]
    median = found["median_us"]
    inside = median["block"] - median["projections"]
    return {
        "what": "decode_layer", "batch": batch, "s_k": s_k, "h_q": config.heads, "hidden": config.hidden, **found,
        "attention_inside_us": round(inside, 2), "share_of_operator": round(median["operator"] / inside, 3) if inside > 0 else None,
    }  # fmt: skip


def generate(device: torch.device, small: bool) -> Row:
    """transformers, stock and attached."""
    if importlib.util.find_spec("transformers") is None:
        return {"what": "transformers", "skipped": 'transformers is not installed; run: pip install "openmla[hf]"'}
    import transformers

    from openmla.integrations.transformers import attach

    def build(layers: int, dtype: torch.dtype) -> Any:
        torch.manual_seed(0)
        config = transformers.DeepseekV2Config(
            vocab_size=1024 if small else 102400, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408,
            num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=16, n_shared_experts=2,
            n_routed_experts=64, num_experts_per_tok=6, first_k_dense_replace=layers if small else 1, q_lora_rank=None,
            kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128, max_position_embeddings=8192,
            bos_token_id=None, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        with torch.device(device):
            return transformers.DeepseekV2ForCausalLM(config).to(dtype).eval()

    def run(model: Any, ids: torch.Tensor, new: int, **options: Any) -> tuple[torch.Tensor, float]:
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        out = model.generate(ids, max_new_tokens=new, do_sample=False, **options)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return out, time.perf_counter() - begin

    model = build(1 if small else 2, torch.float32)
    ids = torch.randint(1, 1000, (2, 24), device=device)
    want, _ = run(model, ids, 8)
    attached = attach(model)
    same = all(torch.equal(run(model, ids, 8, **o)[0], want) for o in ({}, {"past_key_values": attached.cache()}))
    del model, attached
    batch, s_k, new = (2, 32, 4) if small else (32, 4096, 32)
    model = build(1 if small else 27, torch.bfloat16)
    ids = torch.randint(1, 1000, (batch, s_k), device=device)
    rates: dict[str, float] = {}

    def rate(**options: Any) -> float:
        made = [options | ({"past_key_values": attached.cache()} if "pages" in options else {}) for _ in range(3)]
        made = [{k: v for k, v in each.items() if k != "pages"} for each in made]
        _, first = run(model, ids, 1, **made[0])  # the prompt alone
        run(model, ids, 2, **made[1])
        _, whole = run(model, ids, new, **made[2])
        return batch * (new - 1) / max(whole - first, 1e-9)

    rates["stock"] = rate()
    attached = attach(model)
    rates["attached"], rates["attached, pages"] = rate(), rate(pages=True)
    attached.detach()
    return {
        "what": "transformers_decode", "model": "DeepSeek-V2-Lite sizes, random weights", "batch": batch, "s_k": s_k,
        "layers": model.config.num_hidden_layers, "dtype": "bf16", "new_tokens": new, "tokens_equal_fp32": same,
        "tokens_per_s": {name: round(each, 1) for name, each in rates.items()},
        "speedup": round(max(rates["attached"], rates["attached, pages"]) / rates["stock"], 3),
        "transformers": transformers.__version__,
    }  # fmt: skip


SECTIONS = {"prefix": prefix, "layer": layer, "transformers": generate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", nargs="*", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    for name in options.section:
        row = {**SECTIONS[name](device, options.small), "device": machine, "torch": torch.__version__}
        print(json.dumps(row), flush=True)
        if options.out:
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
