"""Split-KV: who computes which KV blocks (`schedule`), and the law that merges partial results (`combine`)."""
