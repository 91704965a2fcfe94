"""A model of shared memory: 32 banks of 4 bytes, eight reads of 16 bytes at a time."""

from typing import Any

from openmla.learn.course import Hint


def _clocks(pieces: list[int]) -> int:
    groups = [piece % 8 for piece in pieces]
    return max(groups.count(group) for group in groups)


def check(work: Any) -> str:
    """A permutation first; then rows, columns, and columns of every second row."""
    places = [[work.place(row, column) for column in range(8)] for row in range(64)]
    flat = [piece for row in places for piece in row]
    if any(not isinstance(piece, int) for piece in flat):
        raise Hint("place must return an int")
    if max(flat) > 511 or min(flat) < 0:
        raise Hint(f"pieces reach from {min(flat)} to {max(flat)}: that is padding, and the tile has 512 places only")
    if len(set(flat)) != 512:
        twice = next(piece for piece in flat if flat.count(piece) > 1)
        raise Hint(f"two pieces lie at {twice}; every place is taken once")
    along = max(_clocks(row) for row in places)
    down = max(_clocks([places[first + i][c] for i in range(8)]) for first in range(0, 64, 8) for c in range(8))
    paired = max(_clocks([places[first + 2 * i][c] for i in range(8)]) for first in range(0, 48, 16) for c in range(8))
    if along > 1:
        raise Hint(f"a row now takes {along} clocks: the eight pieces of one row must stay in eight different groups")
    if down > 1:
        raise Hint(
            f"a column of eight rows takes {down} clocks: let the group depend on the row as well as on the column"
        )
    if paired > 2:
        raise Hint(
            f"a column of every second row takes {paired} clocks, two are possible: which bits of the row do you use?"
        )
    return f"rows {along}, columns {down}, columns of every second row {paired} clocks; TMA and wgmma do the same in hardware"
