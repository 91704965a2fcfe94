"""Fill in the kernels ("backend/kernel") that an H100 takes; everything not named is as `openmla explain decode` has it."""

kernels: dict[str, str | None] = {
    "16 heads": None,  # --h-q 16
    "128 heads": None,  # --h-q 128
    "fp32": None,  # --h-q 16 --dtype fp32
    "an A100": None,  # --target a100_sxm --h-q 16
}

# Why does cute/decode_dense not take fp32? Words from the reason that explain prints.
why_not_fp32: str | None = None
