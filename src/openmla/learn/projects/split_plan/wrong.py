"""HINT: by nobody"""

Piece = tuple[int, int, int, int]  # part, request, begin, end


def plan(blocks: list[int], num_parts: int, invariant: bool) -> list[Piece]:
    """Rounds the share of a part down: the last blocks of a request are lost."""
    return [
        (part, request, part * (length // num_parts), (part + 1) * (length // num_parts))
        for request, length in enumerate(blocks)
        for part in range(num_parts)
        if length // num_parts or (not part and not length)
    ] + [(0, request, 0, length) for request, length in enumerate(blocks) if 0 < length < num_parts]
