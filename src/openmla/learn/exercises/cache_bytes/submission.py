"""Fill in what stands as None. Numbers are per token and layer unless said otherwise."""

mla_bytes: int | None = None  # that MLA caches
mha_bytes: int | None = None  # that MHA would cache

# One new token, 128 heads, absorbed MLA: FLOPs for each cached token (a multiply-add is two).
flops_per_key: int | None = None

# Decoding 8192 cached tokens on an H100: is it limited by "memory" or by "arithmetic"?
limit_16_heads: str | None = None  # 16 heads, 1 new token
limit_128_heads: str | None = None  # 128 heads, 1 new token
limit_two_tokens: str | None = None  # 128 heads, 2 new tokens
