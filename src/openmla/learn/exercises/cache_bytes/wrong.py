"""HINT: not cached a second time"""

mla_bytes = (576 + 512) * 2
mha_bytes = 128 * (192 + 128) * 2
flops_per_key = 2 * 128 * (576 + 512)
limit_16_heads = limit_128_heads = "memory"
limit_two_tokens = "arithmetic"
