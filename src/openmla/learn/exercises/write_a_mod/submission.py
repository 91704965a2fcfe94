"""Write the rule of the task as a score_mod. Expressions only; m.tanh, m.where, m.minimum, m.mod and more are in `m`."""

from typing import Any

from openmla.mods import m, score_mod


@score_mod
def steered(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    """Soft cap at 20; even heads lose 0.02 per token of distance, at most 1.5."""
    return 20.0 * m.tanh(score / 20.0)
