"""Rates of the demo: what attention took, what moved and multiplied, and how far from this machine's own roofline."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from openmla.core.cost import Cost, cost
from openmla.core.layout import kv_layout
from openmla.core.problem import DecodeProblem
from openmla.kv.cache import PagedKVCache
from openmla.lab import clock
from openmla.lab.ceilings import Ceilings
from openmla.lab.demo.serve import Replay
from openmla.ops import native

_PLAIN = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Rate:
    """One operation, timed. Seconds per call: median, and the 20 % and 80 % quantiles.

    `roofline_percent` is the least time that the measured GEMM and read rates of this machine allow, as a share of
    the median; `bound` says which of the two it is. Data that fits in a cache can go beyond 100.
    """

    name: str
    dtype: str
    batch: int
    s_k: int  # longest context
    seconds: float
    low: float
    high: float
    runs: int
    tflops: float
    gbps: float
    roofline_percent: float
    bound: str


def rate(
    name: str, call: Callable[[], object], work: Cost, roof: Ceilings, *, dtype: torch.dtype, batch: int, s_k: int,
    device: torch.device, budget: float,
) -> Rate:  # fmt: skip
    """Time `call` for about `budget` seconds (at least 5 runs after a warm-up) and set it against the roofline."""
    call()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - begin < budget and len(times) < 200):
        times.append(clock.seconds(call, device))
    times.sort()
    median = clock.quantile(times, 0.5)
    compute = work.flops / (roof.gemm_tflops[_PLAIN[dtype]] * 1e12)
    memory = work.bytes / (roof.read_gbps * 1e9)
    return Rate(
        name, _PLAIN[dtype], batch, s_k, median, clock.quantile(times, 0.2), clock.quantile(times, 0.8), len(times),
        work.flops / median / 1e12, work.bytes / median / 1e9, 100 * max(compute, memory) / median,
        "arithmetic" if compute > memory else "memory",
    )  # fmt: skip


def replay_rate(replay: Replay, roof: Ceilings, backend: str | None, budget: float) -> tuple[Rate, DecodeProblem]:
    """The largest decode step of the served batch, run again on the operands it had."""
    problem = DecodeProblem.from_tensors(
        replay.call.q, replay.pool, replay.block_table, replay.cache_seqlens, d_v=replay.call.out.shape[-1],
        is_causal=True,
    )  # fmt: skip
    lengths = replay.cache_seqlens.tolist()
    found = rate(
        "decode of the served batch", lambda: replay.run(backend=backend), cost(problem, lengths), roof,
        dtype=problem.dtype, batch=problem.batch, s_k=max(lengths), device=replay.call.q.device, budget=budget,
    )  # fmt: skip
    return found, problem


def decode_rate(
    layout_name: str, dtype: torch.dtype, batch: int, h_q: int, s_k: int, roof: Ceilings, *, device: torch.device,
    backend: str | None, budget: float,
) -> Rate:  # fmt: skip
    """One decode step of `batch` requests of s_k tokens each, on random data in scattered pages."""
    layout = kv_layout(layout_name)
    generator = torch.Generator(device).manual_seed(s_k)
    pages = -(-s_k // 64)
    cache = PagedKVCache(layout, batch * pages, device=device)
    rows = torch.randn(batch * pages * 64, layout.d_qk, generator=generator, device=device)
    cache.write(0, torch.arange(len(rows), device=device), rows)
    order = torch.randperm(batch * pages, generator=generator, device=device)
    table = order.view(batch, pages).to(torch.int32)
    lengths = torch.full((batch,), s_k, dtype=torch.int32, device=device)
    q = torch.randn(batch, 1, h_q, layout.d_qk, generator=generator, device=device).to(dtype)
    problem = DecodeProblem.from_tensors(q, cache.pages(), table, lengths, d_v=layout.d_v, layout=layout)

    def call() -> object:
        return native.decode(
            q, cache.pages(), table, lengths, d_v=layout.d_v, kv_layout=layout, backend=backend, softmax_scale=192**-0.5
        )

    work = cost(problem, [s_k] * batch)
    return rate(
        layout.name, call, work, roof, dtype=dtype, batch=batch, s_k=s_k, device=device, budget=budget
    )  # fmt: skip


def expanded_rate(
    attention: Any, expand: Callable[..., tuple[torch.Tensor, torch.Tensor]], batch: int, s_k: int, roof: Ceilings, *,
    budget: float,
) -> Rate:  # fmt: skip
    """The same step as a model without absorption does it: expand all latents to keys and values, then attend."""
    weight = attention.kv_b_proj.weight
    heads, d_qk = attention.num_heads, attention.qk_head_dim
    generator = torch.Generator(weight.device).manual_seed(s_k)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=weight.device).to(weight.dtype)

    latent, rope = random(batch, 1, s_k, attention.kv_lora_rank), random(batch, 1, s_k, attention.qk_rope_head_dim)
    q = random(batch, heads, 1, d_qk)

    def call() -> object:
        key, value = expand(latent, rope)
        return torch.nn.functional.scaled_dot_product_attention(q, key, value, scale=attention.scaling)

    tokens = batch * s_k
    expansion = 2 * tokens * weight.numel()
    scores = 2 * tokens * heads * (d_qk + attention.v_head_dim)
    moved = (latent.numel() + rope.numel() + weight.numel()) * weight.dtype.itemsize
    with torch.inference_mode():
        return rate(
            "expanded", call, Cost(expansion + scores, moved), roof, dtype=weight.dtype, batch=batch, s_k=s_k,
            device=weight.device, budget=budget,
        )  # fmt: skip


@dataclass(frozen=True)
class KVForm:
    """One way to keep the context: bytes per token and layer, in the demo's model and in DeepSeek-V3."""

    name: str
    meaning: str
    demo_bytes: int
    deepseek_v3_bytes: int


DEEPSEEK_V3_LAYERS, DEEPSEEK_V3_HEADS = 61, 128
DEEPSEEK_V3_KEY, DEEPSEEK_V3_VALUE = 192, 128  # columns per head, expanded
_GROUP = 8  # query heads per KV head of the grouped form, as in Llama 3 70B


def kv_forms(heads: int, d_key: int, d_value: int) -> list[KVForm]:
    """Bytes per token and layer of MHA, GQA, MLA and MLA in FP8, for `heads` heads of d_key + d_value columns."""
    mha = (2 * heads * (d_key + d_value), 2 * DEEPSEEK_V3_HEADS * (DEEPSEEK_V3_KEY + DEEPSEEK_V3_VALUE))
    gqa = (mha[0] // _GROUP, mha[1] // _GROUP)
    plain, fp8 = kv_layout("bf16_576").bytes_per_token, kv_layout("fp8_656").bytes_per_token
    return [
        KVForm("MHA", "every head its own key and value, 2 bytes a number", *mha),
        KVForm("GQA", f"{_GROUP} heads share one key and one value, 2 bytes a number", *gqa),
        KVForm("MLA", "all heads share one latent of 512 + 64 numbers, 2 bytes each (bf16_576)", plain, plain),
        KVForm("MLA-FP8", "the same with 1 byte for each of the 512, and scales (fp8_656)", fp8, fp8),
    ]
