"""Token-sparse decode over quantised caches. See docs/kernels/decode_sparse.md."""
