"""HINT: padding"""


def place(row: int, column: int) -> int:
    """The classical way out, one piece of padding per row."""
    return row * 9 + column
