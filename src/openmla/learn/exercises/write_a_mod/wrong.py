"""HINT: odd heads"""

from typing import Any

from openmla.mods import m, score_mod


@score_mod
def steered(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    """Every head loses."""
    return 20.0 * m.tanh(score / 20.0) - m.minimum(0.02 * (q_idx - kv_idx), 1.5)
