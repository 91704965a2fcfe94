"""A submission that passes."""

mla_bytes = (512 + 64) * 2
mha_bytes = 128 * (192 + 128) * 2
flops_per_key = 2 * 128 * (576 + 512)
limit_16_heads = "memory"  # 30 FLOP per byte, the ridge is at 295
limit_128_heads = "memory"  # 235
limit_two_tokens = "arithmetic"  # 460
