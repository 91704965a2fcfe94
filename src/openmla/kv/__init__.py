"""Paged KV cache: page allocator with prefix sharing, and the tensors behind it."""
