"""Scheduling metadata in FlashMLA's forms: an object that the first call fills, and the older two tensors.

Source: deepseek-ai/FlashMLA, flash_mla/flash_mla_interface.py at 02fe0d0 and 9241ae3 (names and fields).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from openmla.core.errors import PlanMismatchError, ProblemError
from openmla.core.target import Target
from openmla.ops import native
from openmla.ops.repeats import Repeat
from openmla.split.schedule import plan_decode


@dataclass
class FlashMLASchedMeta:
    """Scheduling metadata: empty at first, filled by the first call that it is passed to."""

    @dataclass
    class Config:
        """Shapes of the call that filled it; a later call must agree."""

        b: int
        s_q: int
        h_q: int
        page_block_size: int
        h_k: int
        causal: bool
        is_fp8_kvcache: bool
        topk: int | None
        extra_page_block_size: int | None
        extra_topk: int | None

    have_initialized: bool = False
    config: Config | None = None
    tile_scheduler_metadata: torch.Tensor | None = None  # [num_sm_parts, 8] int32, or a multiple of num_sm_parts rows
    num_splits: torch.Tensor | None = None  # [batch + 1] int32
    plan: native.Plan | None = None
    repeat: Repeat | None = None  # the last dense call, if it can be repeated
    options: tuple[Any, ...] = ()  # of that call


def get_mla_metadata(
    cache_seqlens: torch.Tensor | None = None,
    num_q_tokens_per_head_k: int | None = None,
    num_heads_k: int | None = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """Scheduling metadata in the form that the caller's code was written for.

    Without arguments: (an empty FlashMLASchedMeta, None), as upstream has it since 2026.
    With arguments (the older form): (tile_scheduler_metadata [num_sm_parts, 8] int32, num_splits [batch + 1] int32),
    computed from cache_seqlens; copies into static buffers work as before.

    Args:
        cache_seqlens: [batch] int32.
        num_q_tokens_per_head_k: s_q * h_q // h_k.
        num_heads_k: KV heads.
        *args, **kwargs: num_heads_q, is_fp8_kvcache, topk of later versions; they do not change the plan.

    Raises:
        ProblemError: arguments given, but not a length tensor and two positive integers.
    """
    if cache_seqlens is None:
        return FlashMLASchedMeta(), None
    wrong = []
    if not isinstance(cache_seqlens, torch.Tensor) or cache_seqlens.dim() != 1:
        wrong.append(f"cache_seqlens must be an int32 tensor [batch], got {type(cache_seqlens).__name__}")
    for name, value in (("num_q_tokens_per_head_k", num_q_tokens_per_head_k), ("num_heads_k", num_heads_k)):
        if not isinstance(value, int) or value < 1:
            wrong.append(f"{name} must be a positive int, got {value!r}")
    if wrong:
        raise ProblemError("get_mla_metadata", wrong)
    assert isinstance(num_q_tokens_per_head_k, int) and isinstance(num_heads_k, int)
    row_blocks = -(-num_q_tokens_per_head_k // 64)
    num_parts = max(Target.detect(cache_seqlens.device).num_sms // (row_blocks * num_heads_k), 1)
    split = plan_decode(cache_seqlens.tolist(), num_parts)
    return split.tile_scheduler_metadata(cache_seqlens.device), split.num_splits_tensor(cache_seqlens.device)


def repeated(
    meta: FlashMLASchedMeta, options: tuple[Any, ...], q: torch.Tensor, k_cache: torch.Tensor, block_table: Any,
    cache_seqlens: Any, attn_sink: torch.Tensor | None, out: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor] | None:  # fmt: skip
    """What the last dense call with this metadata gives for other tensors of the same kinds; None where it is another call."""
    repeat, plan = meta.repeat, meta.plan
    if (
        torch.compiler.is_compiling()
        or repeat is None
        or plan is None
        or repeat.plan is not plan.pieces
        or options != meta.options
        or not isinstance(cache_seqlens, torch.Tensor)
        or not is_current(plan, cache_seqlens)
    ):
        return None
    return repeat.again(repeat.options, q, k_cache, block_table, cache_seqlens, attn_sink, out)


def is_current(plan: native.Plan, cache_seqlens: torch.Tensor) -> bool:
    """Whether a plan is one for these lengths, as far as the host can know."""
    if not cache_seqlens.is_cpu:
        return True  # only the kernel could know
    known = plan.cache_seqlens
    if known.shape != cache_seqlens.shape or known.device != cache_seqlens.device:
        return True  # another shape: let the plan's own check name the difference
    return torch.equal(known, cache_seqlens)


def metadata_of(given: Any, num_splits: Any) -> FlashMLASchedMeta | None:
    """The object form, or None for the tuple form (whose tensors hold nothing that the call does not have)."""
    if isinstance(given, FlashMLASchedMeta):
        if num_splits is not None:
            raise ProblemError(
                "flash_mla_with_kvcache",
                ["num_splits must be None beside a FlashMLASchedMeta; the object holds the splits"],
            )
        return given
    if isinstance(given, torch.Tensor) and isinstance(num_splits, torch.Tensor):
        wrong = []
        if given.dim() != 2 or given.shape[1] != 8 or given.dtype != torch.int32:
            wrong.append(
                f"tile_scheduler_metadata must be [num_sm_parts, 8] int32, got {tuple(given.shape)} {given.dtype}"
            )
        if num_splits.dim() != 1 or num_splits.dtype != torch.int32:
            wrong.append(f"num_splits must be [batch + 1] int32, got {tuple(num_splits.shape)} {num_splits.dtype}")
        if wrong:
            raise ProblemError("flash_mla_with_kvcache", wrong)
        return None
    raise ProblemError(
        "flash_mla_with_kvcache",
        [
            "tile_scheduler_metadata and num_splits must be what get_mla_metadata returned, got "
            f"{type(given).__name__} and {type(num_splits).__name__}"
        ],
    )


def check_config(
    meta: FlashMLASchedMeta, q: Any, k_cache: Any, causal: bool, is_quantised: bool, indices: Any, extra_cache: Any,
    extra_indices: Any,
) -> None:  # fmt: skip
    """Fill the metadata's config on its first call; afterwards every field must agree."""
    if not (isinstance(q, torch.Tensor) and q.dim() == 4 and isinstance(k_cache, torch.Tensor) and k_cache.dim() == 4):
        return  # the problem's own check will say what is wrong
    batch, s_q, h_q, _ = q.shape
    _, page_size, h_k, _ = k_cache.shape
    fields = (
        batch, s_q, h_q, page_size, h_k, causal, is_quantised,
        indices.shape[-1] if isinstance(indices, torch.Tensor) else None,
        extra_cache.shape[1] if isinstance(extra_cache, torch.Tensor) else None,
        extra_indices.shape[-1] if isinstance(extra_indices, torch.Tensor) else None,
    )  # fmt: skip
    if meta.config is None:
        meta.config, meta.have_initialized = FlashMLASchedMeta.Config(*fields), True
        return
    if tuple(vars(meta.config).values()) == fields:
        return
    now = FlashMLASchedMeta.Config(*fields)
    differing = [
        f"{field}: the metadata was filled with {getattr(meta.config, field)}, the call has {getattr(now, field)}"
        for field in FlashMLASchedMeta.Config.__dataclass_fields__
        if getattr(meta.config, field) != getattr(now, field)
    ]
    if differing:
        raise PlanMismatchError("flash_mla_with_kvcache", [*differing, "call get_mla_metadata() for this shape"])
