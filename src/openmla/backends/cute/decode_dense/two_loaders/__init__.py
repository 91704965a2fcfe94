"""Dense decode in clusters of two: two warps load, and a CTA keeps its own share of the merge."""
