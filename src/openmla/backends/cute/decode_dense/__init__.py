"""Dense decode for at least 64 query rows per KV head: bound by the tensor cores."""
