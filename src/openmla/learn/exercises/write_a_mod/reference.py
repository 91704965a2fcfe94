"""A submission that passes."""

from typing import Any

from openmla.mods import m, score_mod


@score_mod
def steered(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    """Soft cap at 20; even heads lose 0.02 per token of distance, at most 1.5."""
    capped = 20.0 * m.tanh(score / 20.0)
    lost = m.minimum(0.02 * (q_idx - kv_idx), 1.5)
    return m.where(m.mod(h, 2) == 0, capped - lost, capped)
