"""A submission that passes: the 128-byte swizzle of the hardware."""


def place(row: int, column: int) -> int:
    """The column, exclusive-ored with the last three bits of the row."""
    return row * 8 + (column ^ (row % 8))
