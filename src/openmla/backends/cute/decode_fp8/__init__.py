"""Dense decode of FP8 queries over an FP8 cache, on FP8 tensor cores: config, kernel and launch."""
