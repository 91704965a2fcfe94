# %% [markdown]
# # 1. Overview: what MLA is, and why decoding is different
#
# A language model that answers you computes one token at a time. For each it has to look at everything that was said before, and what it looks
# at is stored in the *KV cache*. Multi-head Latent Attention, the attention of DeepSeek V2, V3 and V3.2, makes that cache small. This chapter
# counts what this saves, what it costs, and where it does not pay. All counts come from `openmla.core.cost`, which is also what the benchmarks of this
# repository use.

# %%
import torch

from drawings import bars, curves, roofline
from openmla.core.cost import cost
from openmla.core.layout import kv_layout
from openmla.core.problem import DecodeProblem, PrefillProblem
from openmla.core.target import Target
from openmla.nn import forms

torch.manual_seed(0)
BF16 = torch.bfloat16

# %% [markdown]
# ## One row instead of 256
#
# Ordinary multi-head attention (MHA) keeps a key and a value for every head. DeepSeek-V3 has 128 heads with keys of 192 columns (128 without
# position, 64 with) and values of 128 columns: 40,960 numbers per token and layer. MLA keeps one row of 576 numbers for all heads: a *latent* of 512
# columns, from which each head's key and value could be computed by a matrix product, and 64 columns that carry the position (RoPE).
#
# The trick is that the product need not be done. With $W^{UK}_h$ the matrix that makes head $h$'s key out of the latent $c_j$ of token $j$,
#
# $$q_h \cdot (W^{UK}_h c_j) = ((W^{UK}_h)^{T} q_h) \cdot c_j$$
#
# so the matrix can be applied to the query, once, instead of to every token. The same holds for values: the weighted sum is taken over latents, and
# $W^{UV}_h$ is applied to the one result. This is the *absorbed* form. Both forms give the same answer; here they are, on small random matrices.

# %%
heads, d_nope, d_rope, d_v, d_latent, tokens = 4, 16, 8, 16, 64, 50
kv_b = torch.randn(heads * (d_nope + d_v), d_latent, dtype=torch.float64)  # all heads' up-projections
latent, rope = torch.randn(tokens, d_latent).double(), torch.randn(tokens, d_rope).double()
q = torch.randn(heads, d_nope + d_rope).double()
scale = (d_nope + d_rope) ** -0.5

key, value = forms.expand(latent, rope, kv_b, d_nope, d_v)  # expanded: a key and a value per head and token
weights = torch.einsum("hd,nhd->hn", q, key).mul(scale).softmax(-1)
expanded = torch.einsum("hn,nhv->hv", weights, value)

w_uk, w_uv = forms.up_projections(kv_b, d_nope, d_v)  # absorbed: every head reads the same rows
weights = (forms.absorb(q, w_uk) @ torch.cat([latent, rope], -1).T).mul(scale).softmax(-1)
absorbed = forms.project(weights @ latent, w_uv)

print(f"largest difference between the two forms: {(expanded - absorbed).abs().max():.1e}")
assert torch.allclose(expanded, absorbed, atol=1e-10)

# %% [markdown]
# Note what absorbed MLA looks like to a kernel: 128 query heads, **one** key-value head, keys of 576 columns, and values that are the first 512 columns of
# the keys. It is the most extreme form of grouped queries, with the widest rows, and keys and values are the same bytes.
#
# ## Bytes in the cache
#
# GQA (grouped queries) lets several heads share keys and values, MQA lets all of them share. For the same 128 heads, per token and layer:

# %%


def attention_of(h_kv: int, d_qk: int, d_v: int, s_k: int = 4096, h_q: int = 128) -> PrefillProblem:
    """One new token over s_k keys with separate keys and values: MHA, GQA or MQA while decoding."""
    return PrefillProblem(1, 1, s_k, 1, s_k, h_q, h_kv, d_qk, d_v, BF16)


def mla(s_k: int = 4096, h_q: int = 128, s_q: int = 1, layout: str = "bf16_576") -> DecodeProblem:
    """s_q new tokens of one request over s_k cached rows."""
    pages = -(-s_k // 64)
    return DecodeProblem(1, s_q, s_q, h_q, 1, 576, 512, BF16, kv_layout(layout), 64, pages, pages)


cache_bytes = {
    "MHA, 128 KV heads": 128 * (192 + 128) * 2,
    "GQA, 8 KV heads": 8 * (192 + 128) * 2,
    "MQA, 1 KV head": 1 * (192 + 128) * 2,
    "MLA, bf16": kv_layout("bf16_576").bytes_per_token,
    "MLA, fp8_656": kv_layout("fp8_656").bytes_per_token,
}
for name, size in cache_bytes.items():
    print(f"{name:18} {size:>7,} bytes   {size / cache_bytes['MLA, bf16']:6.1f} x MLA")
bars(
    cache_bytes, unit="bytes per token and layer (logarithmic)", is_log=True, salt="bytes",
    caption="MLA stores 71 times less than MHA of the same heads. MQA stores less still, but gives up what heads can tell apart.",
)  # fmt: skip

# %% [markdown]
# Over the 61 layers of DeepSeek-V3 that decides how many conversations fit into one GPU.

# %%
free = 40 * 2**30  # bytes left for the cache beside the weights, say
for name in ("MHA, 128 KV heads", "MLA, bf16", "MLA, fp8_656"):
    per_token = 61 * cache_bytes[name]
    print(f"{name:18} {per_token / 1024:8.1f} KiB per token; 40 GiB hold {free // per_token:>9,} tokens")

# %% [markdown]
# ## A GPU in nine words
#
# The rest of the guide uses these. None of them has to be known beforehand.
#
# | word | is |
# | --- | --- |
# | SM | one of the 132 processors of an H100, each with its own registers and *shared memory* |
# | HBM | the memory of the card: large, and the slowest of them to read |
# | L2 | a cache of 50 MB between HBM and all SMs |
# | tensor core | the part of an SM that multiplies small matrices; nearly all of the card's arithmetic is there |
# | warp | 32 threads that run the same instruction; four of them together are a *warpgroup* |
# | CTA | the threads (here some hundred) that share one SM's shared memory; also called a block |
# | kernel | a program for the GPU; starting one (a *launch*) takes microseconds |
# | FP8 | numbers of 8 bits, such as `e4m3`; with a scale for each group of columns they hold a cache in half the bytes |
# | RoPE | how a position gets into queries and keys: pairs of columns are rotated by an angle that grows with the position |
#
# ## Why decoding is different
#
# While it reads a prompt (*prefill*), a model has thousands of query tokens; every key that is loaded is used thousands of times. While it
# writes (*decode*), it has one query token per request, and every request has its own cache: a key is loaded, used by the heads that
# share it, and dropped. What matters is how much arithmetic there is per byte, the *intensity*. A machine has a ratio of its own, the *ridge*: below it,
# memory is the limit, above it, arithmetic.

# %%
h100 = Target.preset("h100_sxm")  # data-sheet rates; what cards really reach is chapter 4
ridge = 1e3 * h100.bf16_tflops / h100.hbm_gbps
shapes = {
    "MHA": cost(attention_of(128, 192, 128)),
    "GQA 8": cost(attention_of(8, 192, 128)),
    "MQA": cost(attention_of(1, 192, 128)),
    "MLA, 16 heads": cost(mla(h_q=16)),
    "MLA": cost(mla()),
    "MLA, 2 tokens": cost(mla(s_q=2)),
}
print(f"ridge of an H100: {ridge:.0f} FLOP per byte")
for name, found in shapes.items():
    limit = "arithmetic" if found.intensity > ridge else "memory"
    print(
        f"{name:14} {found.flops / 1e6:8.1f} MFLOP {found.bytes / 1e6:8.2f} MB {found.intensity:6.1f} FLOP/byte  {limit}"
    )
roofline(
    [(name, found.intensity) for name, found in shapes.items()],
    tflops=h100.bf16_tflops, gbps=h100.hbm_gbps, salt="roof",
    caption="Decoding 4096 keys. MHA uses a three-hundredth of the tensor cores. MLA with 128 heads stands near the ridge: both limits at once.",
)  # fmt: skip

# %% [markdown]
# This is the special thing about MLA kernels. Decode attention is usually a matter of memory alone, and any kernel that reads fast is a good one. MLA with
# 128 heads has 228 FLOP per byte here (queries and results included), so it needs nearly full bandwidth **and** nearly full tensor cores. With 16 heads (the same model over 8 GPUs with tensor
# parallelism, or a small model) it is memory alone. With two query tokens (speculative decoding) it is arithmetic alone. One kernel cannot be
# best at all of these, which is why this repository has several.
#
# ## The price
#
# Absorbed attention multiplies rows of 576 and 512 columns where expanded attention multiplies 192 and 128.

# %%
pair_absorbed, pair_expanded = 2 * (576 + 512), 2 * (192 + 128)
print(
    f"per head and key: absorbed {pair_absorbed} FLOP, expanded {pair_expanded}: {pair_absorbed / pair_expanded:.1f} times as many"
)

sizes = {"d_latent": 512, "d_rope": 64, "d_nope": 128, "d_v": 128}
print("a prompt of 4096 tokens:          ", forms.cheaper_form([4096], [4096], **sizes))
print("one new token behind 4096:        ", forms.cheaper_form([1], [4097], **sizes))
change = next(n for n in range(1, 2000) if forms.cheaper_form([n], [100_000 + n], **sizes) == "expanded")
print(f"a chunk behind 100,000 tokens changes over at {change} tokens")
assert pair_absorbed / pair_expanded == 3.4
assert forms.cheaper_form([4096], [4096], **sizes) == "expanded"
assert forms.cheaper_form([1], [4097], **sizes) == "absorbed"

# %% [markdown]
# So a good implementation uses both forms: expanded for prompts, where keys are used often enough to pay for their expansion, absorbed for decoding.
# `openmla.nn.MLA` asks `cheaper_form` in every pass.
#
# ## Is it FlashAttention?
#
# FlashAttention is a way to compute attention without ever writing the matrix of scores: tile by tile, with a running maximum and a running sum
# (chapter 3). MLA is a way to define keys and values. A fast MLA kernel does what FlashAttention does, but the usual kernels do not fit: they
# expect keys of up to 256 columns and load keys and values separately, where here they are the same bytes. And they have no room for the output: 64 rows of
# 512 fp32 numbers take half of the registers of a Hopper SM. Hence kernels of their own.
#
# ## When does it pay?
#
# A step of decoding reads the weights once and the caches of all requests. Below, the bytes that one layer's attention reads for a batch of 64 against the length of
# the conversations, beside the attention weights of the layer itself (which every step reads, however long the conversation).

# %%
weight_bytes = 2 * (
    7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168
)  # DeepSeek-V3, bf16
lengths = [2**n for n in range(7, 18)]
reads = {
    "MHA": [(n, 64 * n * cache_bytes["MHA, 128 KV heads"] / 1e9) for n in lengths],
    "GQA 8": [(n, 64 * n * cache_bytes["GQA, 8 KV heads"] / 1e9) for n in lengths],
    "MLA": [(n, 64 * n * cache_bytes["MLA, bf16"] / 1e9) for n in lengths],
    "weights": [(n, weight_bytes / 1e9) for n in lengths],
}
even = weight_bytes / (64 * cache_bytes["MLA, bf16"])
print(
    f"attention weights of a layer: {weight_bytes / 1e6:.0f} MB; a batch of 64 reads as much MLA cache at {even:,.0f} tokens"
)
curves(
    reads, x="tokens of each conversation", y="GB read per layer and step, batch 64", salt="reads",
    caption="Below 5,000 tokens an MLA cache costs less than the attention weights. MHA is past that point at 71.",
)  # fmt: skip

# %% [markdown]
# Reading the figure:
#
# - **Long conversations, many of them**: MLA pays most. Memory holds 71 times more of them than with MHA.
# - **Short ones**: the cache is not what costs. Weights are, and MLA's own projections are no smaller than others'.
# - **Training and prompts**: the expanded form is ordinary attention with 192 and 128 columns; nothing is saved but the cache.
# - **A machine with little arithmetic per byte**: the ridge of an H20 is at 37 FLOP per byte, so there 128 heads are a matter of arithmetic, not of memory.
#
# Exercise: `openmla learn cache_bytes`. The last lines hold this chapter to its words.

# %%
h20 = Target.preset("h20")
assert cache_bytes["MHA, 128 KV heads"] // cache_bytes["MLA, bf16"] == 71
assert round(shapes["MLA"].intensity) == 228
assert shapes["MHA"].intensity < 1.01
assert shapes["MLA"].intensity < ridge < shapes["MLA, 2 tokens"].intensity
assert round(1e3 * h20.bf16_tflops / h20.hbm_gbps) == 37
assert change == 171
assert 4500 < even < 5500
