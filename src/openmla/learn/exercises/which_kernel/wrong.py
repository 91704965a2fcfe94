"""HINT: torch/decode_tiled could run"""

kernels = {"16 heads": "torch/decode_tiled", "128 heads": "torch/decode_tiled", "fp32": "x", "an A100": "x"}
why_not_fp32 = "?"
