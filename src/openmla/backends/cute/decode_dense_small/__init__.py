"""Dense decode for few query rows per KV head: swapped operands, memory-bound and latency-bound."""
