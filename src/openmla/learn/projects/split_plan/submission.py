"""Make `plan` even, and invariant where that is asked for. What stands here gives whole requests to the parts in turn."""

Piece = tuple[int, int, int, int]  # part, request, begin, end


def plan(blocks: list[int], num_parts: int, invariant: bool) -> list[Piece]:
    """Who computes which KV blocks: pieces of requests with blocks[i] blocks, on parts 0 to num_parts - 1."""
    return [(request % num_parts, request, 0, length) for request, length in enumerate(blocks)]
