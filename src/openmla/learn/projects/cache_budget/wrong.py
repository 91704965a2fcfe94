"""HINT: the budget is"""

from collections.abc import Sequence
from typing import Any


def choose(samples: Sequence[Any], budget: int) -> list[str]:
    """The usual choice, whatever the budget."""
    return ["fp8_656"] * len(samples)
