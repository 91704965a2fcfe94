"""Sparse attention over gathered bf16 rows. See docs/kernels/prefill_sparse.md."""
