"""What a served model gains: shared prefix, one decode layer, and transformers' generate(), each beside what it replaces.

    python tests/gpu/model_speed.py [--section prefix layer transformers] [--out rows.jsonl]
    python tests/gpu/model_speed.py --small --device cpu          the script itself, anywhere

Each figure compares in one process, interleaved, medians of many runs, behind a check that both compute the same:

    prefix         64 requests over one prefix of 32768 tokens, suffixes of 512, h_q 16: decode_shared_prefix against decode,
                   with a copy of the prefix per request (nothing is shared) and over the same pages (the memory is)
    layer          MLA block of DeepSeek-V2-Lite, batch 64, 8192 tokens: the share of the operator's own speed that
                   attention has inside the block (block minus its projections)
    transformers   DeepSeek-V2-Lite sizes with random weights, batch 32, 4096 tokens of context: new tokens per second of
                   generate() stock and attached, on both caches; and in fp32 with few layers that tokens are equal
    steps          its decoding steps as a CUDA graph, beside the same without one, and stock
    experts        one layer of its experts, both of transformers' ways, by tokens (graphs on a GPU)
    flash3_gate    openmla.prefill by FlashAttention 3: even and uneven batches, both masks, queries without keys and offsets
                   that are wrong, against the fp64 oracle under the tolerance rule
    prefill_gate   the same without it
    prefill        openmla.prefill over expanded K and V, 192/128, causal, beside every engine that is installed, and once more
                   as if FlashAttention 3 were not

Needs PyTorch; the last section transformers too, and says so where it is missing.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

import openmla
from openmla.core.problem import PrefillProblem
from openmla.nn import MLA, MLAConfig, Pass

SCALE = 192**-0.5
Row = dict[str, Any]


def interleaved(calls: dict[str, Callable[[], object]], device: torch.device, runs: int, behind: int = 0) -> Row:
    """Median and spread of each call in microseconds, one after another in every round.

    `behind` clocks of other work, as in a step of a model, the time of the host does not count.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(runs + 2):
        for name, call in calls.items():
            if device.type == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                if behind:
                    torch.cuda._sleep(behind)
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

    def replay(kept: object = call) -> None:  # the graph reads what the call holds
        graph.replay()

    return replay


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

    def same_pages() -> tuple[torch.Tensor, torch.Tensor | None]:
        return openmla.decode(q, pool, table, lengths, softmax_scale=SCALE)

    copies = pool[table.flatten().long()]  # every request has pages of its own
    own_table = torch.arange(table.numel(), dtype=torch.int32, device=device).view(table.shape)

    def unshared() -> tuple[torch.Tensor, torch.Tensor | None]:
        return openmla.decode(q, copies, own_table, lengths, softmax_scale=SCALE)

    for other in (same_pages, unshared):
        torch.testing.assert_close(together()[1], other()[1], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(together()[0].float(), other()[0].float(), rtol=2e-2, atol=2e-3)
    calls = {"shared": together, "same pages": same_pages, "unshared": unshared}
    found = interleaved({name: graphed(call, device) for name, call in calls.items()}, device, 3 if small else 30)
    median = found["median_us"]
    return {
        "what": "shared_prefix", "batch": batch, "prefix": shared, "suffix": own, "h_q": h_q, "dtype": "bf16", **found,
        "speedup": round(median["unshared"] / median["shared"], 3),
        "speedup_over_same_pages": round(median["same pages"] / median["shared"], 3),
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


def v2_lite(device: torch.device, layers: int, dtype: torch.dtype, small: bool) -> Any:
    """A transformers model of DeepSeek-V2-Lite's sizes with random weights."""
    import transformers

    torch.manual_seed(0)
    config = transformers.DeepseekV2Config(
        vocab_size=1024 if small else 102400, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408,
        num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=16, n_shared_experts=2,
        n_routed_experts=64, num_experts_per_tok=6, first_k_dense_replace=layers if small else 1, q_lora_rank=None,
        kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128, max_position_embeddings=8192,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # made in its own dtype: in fp32 first it would fill the card
    try:
        with torch.device(device):
            return transformers.DeepseekV2ForCausalLM(config).to(dtype).eval()
    finally:
        torch.set_default_dtype(before)


def clocked(model: Any, ids: torch.Tensor, new: int, device: torch.device, **options: Any) -> tuple[torch.Tensor, Row]:
    """generate(), with the moments at which each token was there."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    moments: list[float] = []

    class Clock(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            if device.type == "cuda":
                torch.cuda.synchronize()
            moments.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    begin = time.perf_counter()
    criteria = StoppingCriteriaList([Clock()])
    out = model.generate(ids, max_new_tokens=new, do_sample=False, stopping_criteria=criteria, **options)
    steps = [b - a for a, b in pairwise(moments[1:])]  # the first step warms up
    row = {"prompt_s": round(moments[0] - begin, 3), "step_ms": round(1e3 * statistics.median(steps), 3)}
    return out, row | {"worst_step_ms": round(1e3 * max(steps), 3)}


def equal_tokens(device: torch.device, small: bool) -> dict[str, bool]:
    """Whether tokens in fp32 equal those of stock generate(), by cache."""
    from openmla.integrations.transformers import attach

    model = v2_lite(device, 1 if small else 2, torch.float32, small)
    ids = torch.randint(1, 1000, (4, 40), device=device)

    def run(**options: Any) -> torch.Tensor:
        return model.generate(ids, max_new_tokens=24, do_sample=False, **options)

    want = run()
    attached = attach(model)
    return {
        "dynamic": torch.equal(run(), want),
        "pages": torch.equal(run(past_key_values=attached.cache()), want),
    }


def generate(device: torch.device, small: bool) -> Row:
    """transformers, stock and attached."""
    if importlib.util.find_spec("transformers") is None:
        return {"what": "transformers", "skipped": 'transformers is not installed; run: pip install "openmla[hf]"'}
    import transformers

    from openmla.integrations.transformers import attach

    same = equal_tokens(device, small)
    print(f"tokens equal in fp32: {same}", file=sys.stderr, flush=True)
    batch, s_k, new = (2, 32, 6) if small else (32, 4096, 24)
    begin = time.perf_counter()
    model = v2_lite(device, 1 if small else 27, torch.bfloat16, small)
    print(f"built in {time.perf_counter() - begin:.1f} s", file=sys.stderr, flush=True)
    ids = torch.randint(1, 1000, (batch, s_k), device=device)
    found: dict[str, Row] = {}
    for name in ("attached, pages", "attached", "stock", "stock, grouped_mm"):
        attached = attach(model) if "attached" in name else None
        options: Row = {"past_key_values": attached.cache()} if attached and "pages" in name else {}
        if "grouped" in name:  # what stock could do if it did not switch its experts for decoding
            keep_grouped(model)
        found[name] = clocked(model, ids, new, device, **options)[1]
        print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
        if attached:
            attached.detach()
    steps = {name: each["step_ms"] for name, each in found.items()}
    ours = min(steps["attached"], steps["attached, pages"])
    return {
        "what": "transformers_decode", "model": "DeepSeek-V2-Lite sizes, random weights", "batch": batch, "s_k": s_k,
        "layers": model.config.num_hidden_layers, "dtype": "bf16", "new_tokens": new, "tokens_equal_fp32": same,
        "runs": found, "tokens_per_s": {name: round(1e3 * batch / each, 1) for name, each in steps.items()},
        "speedup": round(steps["stock"] / ours, 3),
        "speedup_over_grouped": round(steps["stock, grouped_mm"] / ours, 3), "transformers": transformers.__version__,
    }  # fmt: skip


def steps(device: torch.device, small: bool) -> Row:
    """Decoding steps replayed as a CUDA graph beside the same steps one launch at a time, and stock; the same tokens."""
    from openmla.integrations.transformers import attach

    batch, s_k, new = (2, 32, 6) if small else (32, 4096, 14)
    model = v2_lite(device, 1 if small else 27, torch.bfloat16, small)
    ids = torch.randint(1, 1000, (batch, s_k), device=device)
    outs: dict[str, torch.Tensor] = {}
    found: dict[str, Row] = {}
    for name in ("graph", "eager", "stock"):
        attached = attach(model, step_graphs=name == "graph") if name != "stock" else None
        options = {"past_key_values": attached.cache()} if attached else {}
        outs[name], found[name] = clocked(model, ids, new, device, **options)
        print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
        if attached:
            if attached.steps:
                print(
                    f"replays: {attached.steps.replays}, kept by {attached.steps.strangers}",
                    file=sys.stderr,
                    flush=True,
                )
            attached.detach()
        if name == "eager":
            same = torch.equal(outs["graph"], outs["eager"])
            print(f"tokens equal bit for bit: {same}", file=sys.stderr, flush=True)
    ms = {name: each["step_ms"] for name, each in found.items()}
    return {
        "what": "transformers_step_graphs", "model": "DeepSeek-V2-Lite sizes, random weights", "batch": batch, "s_k": s_k,
        "layers": model.config.num_hidden_layers, "dtype": "bf16", "new_tokens": new, "runs": found,
        "tokens_equal_eager": same, "tokens_per_s": {name: round(1e3 * batch / each, 1) for name, each in ms.items()},
        "speedup": round(ms["stock"] / ms["graph"], 3), "speedup_over_eager": round(ms["eager"] / ms["graph"], 3),
    }  # fmt: skip


def keep_grouped(model: Any) -> None:
    """Stock, but for the experts: grouped_mm while decoding too."""
    from transformers.integrations import moe

    if model.config._experts_implementation == "grouped_mm":
        moe.ExpertsInterface.register("kept", moe.grouped_mm_experts_forward)
        model.set_experts_implementation("kept")


def experts(device: torch.device, small: bool) -> Row:
    """One layer of experts, both ways, by tokens."""
    from transformers.integrations import moe

    model = v2_lite(device, 2, torch.bfloat16, False).requires_grad_(False)
    layer = model.model.layers[1].mlp.experts
    found = {}
    for tokens in (1, 2, 4, 8, 16, 32) if not small else (1,):
        x = torch.randn(tokens, 2048, device=device).to(torch.bfloat16)
        index = torch.rand(tokens, 64, device=device).topk(6).indices
        weight = torch.rand(tokens, 6, device=device).to(torch.bfloat16)
        calls = {
            name: graphed(partial(getattr(moe, f"{name}_experts_forward"), layer, x, index, weight), device)
            for name in ("grouped_mm", "batched_mm")
        }
        found[6 * tokens] = interleaved(calls, device, 20)["median_us"]
    return {"what": "experts", "model": "DeepSeek-V2-Lite sizes", "us_by_pairs": found}


Spans = tuple[list[int], list[int], int, int]  # offsets of q and k, totals
PREFILLS: tuple[Spans, ...] = (
    ([0, 300], [0, 300], 300, 300),
    ([0, 130, 260, 390], [0, 130, 260, 390], 390, 390),
    ([0, 64, 128], [0, 64, 128], 128, 128),
    ([0, 40, 41, 298], [0, 40, 41, 298], 298, 298),
    ([0, 40, 240], [0, 7, 307], 240, 307),  # fewer and more queries than keys: some see none
    ([0, 50, 50, 90], [0, 0, 60, 100], 90, 100),  # no keys, no queries
    ([5, 40, 80], [3, 70, 90], 90, 100),  # rows of nobody, in front and behind
    ([0, 90, 30, 200], [-7, 20, 1 << 30, 60], 120, 100),  # nonsense
)


def prefill_checks(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> int:
    """Each of PREFILLS, both masks, a positive and a negative scale, twice, against the oracle; the number of cases."""
    from openmla.reference import attention
    from openmla.testing import budget

    generator, cases = torch.Generator(device).manual_seed(11), 0
    for dtype in dtypes:
        for starts_q, starts_k, total_q, total_k in PREFILLS:
            q, k, v = (
                torch.randn(total, 4, d, generator=generator, device=device).to(dtype)
                for total, d in ((total_q, 192), (total_k, 192), (total_k, 128))
            )
            offsets_q, offsets_k = (
                torch.tensor(x, dtype=torch.int32, device=device) for x in (starts_q, starts_k)
            )  # fmt: skip
            offsets_k = offsets_q if starts_q == starts_k else offsets_k
            # the longest is announced too short where offsets are wrong anyway
            longest = [
                max(max(b - a for a, b in pairwise(x)), 1) if max(x) <= 400 else 30 for x in (starts_q, starts_k)
            ]  # fmt: skip
            for is_causal in (True, False):
                for scale in (SCALE, -0.05) if is_causal else (SCALE,):
                    options: Row = {"softmax_scale": scale, "is_causal": is_causal}
                    found = [openmla.prefill(q, k, v, offsets_q, offsets_k, *longest, **options) for _ in range(2)]
                    golden = attention.prefill(q, k, v, offsets_q, offsets_k, **options, with_bounds=True)
                    name = f"{dtype}, {starts_q}, {starts_k}, {options}"
                    assert torch.equal(found[0][0], found[1][0]), f"the same bits twice: {name}"
                    budget.check(*found[0], golden, dtype=dtype).require(name)
                    cases += 1
    faults = openmla.check_errors(device)
    assert faults == (openmla.Fault.CU_SEQLENS_NOT_MONOTONE,), f"nonsense in offsets is reported, found {faults}"
    return cases


def flash3_gate(device: torch.device, small: bool) -> Row:
    """Whether dense prefill by FlashAttention 3 is right, and whether that is what ran."""
    from openmla.backends.torch import fused
    from openmla.ops import dispatch

    if not importlib.util.find_spec(fused.FLASH3):
        return {"what": "dense_prefill_gate", "skipped": f"{fused.FLASH3} is not installed"}
    dispatch.forget()
    served, library = [], fused.attend_flash3
    fused.attend_flash3 = lambda q, *rest: (served.append(q.dtype), library(q, *rest))[1]
    count = prefill_checks(device, (torch.bfloat16,))
    fused.attend_flash3 = library
    # Each case ran twice. A gate that another kernel passed would say nothing.
    assert len(served) == 2 * count, f"FlashAttention 3 ran {len(served)} times of {2 * count}"
    return {"what": "dense_prefill_gate", "engine": "prefill_flash3", "cases_right": count, "dtypes": ["bfloat16"]}


def prefill_gate(device: torch.device, small: bool) -> Row:
    """Whether dense prefill is right without FlashAttention 3."""
    from openmla.backends.torch import fused
    from openmla.ops import dispatch

    stock, fused.FLASH3 = fused.FLASH3, "not.installed"
    dispatch.forget()
    dtypes = (torch.bfloat16,) if small else (torch.bfloat16, torch.float16)
    count = prefill_checks(device, dtypes)
    fused.FLASH3 = stock
    return {"what": "dense_prefill_gate", "cases_right": count, "dtypes": [str(dtype)[6:] for dtype in dtypes]}


def prefill(device: torch.device, small: bool) -> Iterator[Row]:
    """Dense prefill, what it takes beside the engines that could do the same."""
    from openmla.backends.torch import fused
    from openmla.ops import dispatch

    generator = torch.Generator(device).manual_seed(11)
    stock = fused.FLASH3
    shapes = ((1, 128, 4),) if small else ((1, 8192, 128), (4, 4096, 128), (8, 4096, 16), (1, 32768, 16))
    for has_flash3 in (True, False) if importlib.util.find_spec(stock) else (False,):
        fused.FLASH3 = stock if has_flash3 else "not.installed"
        dispatch.forget()
        rows = []
        for batch, s, h in shapes:
            q, k, v = (
                torch.randn(batch * s, h, d, generator=generator, device=device).bfloat16() for d in (192, 192, 128)
            )
            offsets = torch.arange(0, batch * s + 1, s, dtype=torch.int32, device=device)
            problem = PrefillProblem.from_tensors(q, k, v, offsets, offsets, s, s, is_causal=True)
            engines = prefill_engines(q, k, v, offsets, batch, s, device)
            if not has_flash3:
                engines.pop("flash 3", None)
            want = engines["openmla"]().float()
            for name, call in list(engines.items()):
                try:
                    torch.testing.assert_close(call().float(), want, rtol=2e-2, atol=2e-2)
                except (RuntimeError, TypeError, AssertionError) as error:
                    print(f"{name}: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
                    del engines[name]
            found = interleaved(engines, device, 3 if small else 15, behind=2_000_000)
            others = {name: us for name, us in found["median_us"].items() if name != "openmla"}
            best = min(others, key=others.__getitem__)
            flop = batch * h * s * (s + 1) / 2 * 2 * (192 + 128)
            rows.append({
                "batch": batch, "s": s, "h": h, "has_flash3": has_flash3, "engine": getattr(openmla.explain(problem).chosen, "kernel", None), **found, "best": best,
                "tflops": {name: round(flop / us / 1e6, 1) for name, us in found["median_us"].items()},
                "share_of_best": round(others[best] / found["median_us"]["openmla"], 3),
            })  # fmt: skip
            print(rows[-1], file=sys.stderr, flush=True)
        yield {"what": "dense_prefill", "shape": "192/128 causal bf16", "rows": rows}
    fused.FLASH3 = stock


def prefill_engines(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offsets: torch.Tensor, batch: int, s: int, device: torch.device
) -> dict[str, Callable[[], torch.Tensor]]:
    """[total, heads, 128] by each engine that is installed, causal."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    dense = [x.unflatten(0, (batch, s)).transpose(1, 2) for x in (q, k, v)]
    padded = torch.nn.functional.pad(v, (0, q.shape[2] - v.shape[2]))
    where = (offsets, offsets, s, s)
    options = {"softmax_scale": SCALE, "is_causal": True}

    def sdpa(backend: SDPBackend) -> torch.Tensor:
        with sdpa_kernel([backend]):
            out = torch.nn.functional.scaled_dot_product_attention(*dense, is_causal=True, scale=SCALE)
        return out.transpose(1, 2).flatten(0, 1)

    engines = {"openmla": lambda: openmla.prefill(q, k, v, *where, **options)[0]}
    if device.type != "cuda":
        return engines | {"sdpa": lambda: sdpa(SDPBackend.MATH)}
    engines |= {
        "sdpa cudnn": partial(sdpa, SDPBackend.CUDNN_ATTENTION),
        "flash 2, padded": lambda: torch.ops.aten._flash_attention_forward(
            q, k, padded, *where, 0.0, True, False, scale=SCALE
        )[0][..., : v.shape[2]],
        "openmla triton": lambda: openmla.prefill(q, k, v, *where, **options, backend="triton")[0],
    }
    for module in ("fa3_fwd_interface", "flash_attn_interface"):
        if importlib.util.find_spec(module):
            call = importlib.import_module(module).flash_attn_varlen_func

            def flash3(call: Any = call) -> torch.Tensor:
                found = call(q, k, v, *where, softmax_scale=SCALE, causal=True)
                return found[0] if isinstance(found, tuple) else found

            engines["flash 3"] = flash3
            break
    return engines


SECTIONS: dict[str, Callable[[torch.device, bool], Row | Iterator[Row]]] = {
    "prefix": prefix,
    "layer": layer,
    "transformers": generate,
    "experts": experts,
    "steps": steps,
    "flash3_gate": flash3_gate,
    "prefill_gate": prefill_gate,
    "prefill": prefill,
}


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
        found = SECTIONS[name](device, options.small)
        for row in [found] if isinstance(found, dict) else found:
            text = json.dumps({**row, "device": machine, "torch": torch.__version__})
            print(text, flush=True)
            if options.out:
                with options.out.open("a") as file:
                    file.write(text + "\n")


if __name__ == "__main__":
    main()
