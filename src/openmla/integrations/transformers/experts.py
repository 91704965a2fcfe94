"""The experts of a mixture while decoding: which of transformers' own two ways runs is chosen by the size of the step.

`generate()` replaces `grouped_mm` by `batched_mm` on a GPU for the whole of decoding. batched_mm copies the weights of an
expert once per (token, expert) pair: 32 tokens with 6 experts each of DeepSeek-V2-Lite are 3.3 GB per layer, written and
read again, where all 64 experts are 1.1 GB. grouped_mm reads every expert that is asked for once. So a model that
`attach` was called on keeps grouped_mm from MANY pairs on; below, copying is little and batched_mm has fewer steps.

This goes through a name that transformers offers for it (`ExpertsInterface.register`). Where it is missing, or the model
was told to use another way, nothing changes.
"""

from __future__ import annotations

from typing import Any

NAME = "openmla_by_size"
DEVICES = ("cuda",)  # on a CPU generate() leaves grouped_mm alone
MANY = 12  # pairs: at 6 the two are equal, at 12 grouped_mm is 1.26 times as fast, at 192 4.4 times; bench/results/model_speed.jsonl


def _by_size(module: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any, *args: Any, **options: Any) -> Any:
    """The experts' forward that transformers calls by NAME: hidden_states [tokens, hidden], top_k_* [tokens, top_k]."""
    from transformers.integrations import moe

    run = moe.grouped_mm_experts_forward if top_k_index.numel() >= MANY else moe.batched_mm_experts_forward
    return run(module, hidden_states, top_k_index, top_k_weights, *args, **options)


def choose_by_size(model: Any) -> str | None:
    """Let the experts of a model on a GPU run by size; returns what was set before, None where nothing was changed."""
    try:
        from transformers.integrations.moe import (
            ExpertsInterface,
            batched_mm_experts_forward,
            grouped_mm_experts_forward,
        )
    except ImportError:
        return None
    known = getattr(model.config, "_experts_implementation", None)
    has_both = callable(batched_mm_experts_forward) and callable(grouped_mm_experts_forward)
    if known != "grouped_mm" or not has_both or model.device.type not in DEVICES:
        return None
    ExpertsInterface.register(NAME, _by_size)
    model.set_experts_implementation(NAME)
    return known if model.config._experts_implementation == NAME else None
