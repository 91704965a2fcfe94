"""Change `place` so that rows and columns are read without bank conflicts."""


def place(row: int, column: int) -> int:
    """Where piece (row, column) lies: 0 to 511. Row 0 to 63, column 0 to 7."""
    return row * 8 + column
