"""One decode step of one layer, between vLLM's shapes and OpenMLA's; needs PyTorch alone."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch

from openmla.core.errors import ProblemError
from openmla.ops import native
from openmla.ops.native import Plan

_log = logging.getLogger("vllm.openmla")  # below "vllm", whose handlers show it in the server's log


@cache
def _say_once(h_q: int, d_qk: int, dtype: torch.dtype, kernel: str) -> None:
    """One line per process, form of call and kernel: that OpenMLA decodes, whatever vLLM calls the backend, and by what."""
    _log.info("OpenMLA decodes: %d query heads over rows of %d, %s%s", h_q, d_qk, dtype, kernel)


def decode(
    q: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    num_decodes: int,
    d_latent: int,
    scale: float,
    is_causal: bool = True,
    plans: dict[tuple[Any, ...], Plan] | None = None,
    with_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Absorbed decode as vLLM's `forward_mqa` wants it.

    Args:
        q: [tokens, h_q, d_latent + d_rope], or its two parts; tokens = num_decodes * s_q, request behind request.
        kv_cache: [num_blocks, block_size, d_latent + d_rope].
        block_table: [num_decodes, max_blocks] int32.
        seq_lens: [num_decodes] int32, the new tokens included.
        num_decodes: requests.
        d_latent: columns of the value.
        scale: of the softmax.
        is_causal: query i of a request sees up to seq_lens - s_q + i.
        plans: kept by the step's metadata; the first layer plans, the others reuse. Made on the device, so that a
            captured graph plans anew at every replay.
        with_lse: vLLM's context parallelism asks for it.

    Returns:
        out [tokens, h_q, d_latent] and lse [tokens, h_q] fp32 or None.

    Raises:
        ProblemError: tokens are no multiple of num_decodes, or what `openmla.decode` refuses.
    """
    whole = torch.cat(q, -1) if isinstance(q, tuple) else q
    if num_decodes < 1 or whole.shape[0] % num_decodes:
        raise ProblemError(
            "decode", [f"the {whole.shape[0]} query token(s) must be a multiple of the {num_decodes} request(s)"]
        )
    query = whole.view(num_decodes, -1, *whole.shape[1:])
    pages = kv_cache.unsqueeze(-2)
    options: dict[str, Any] = {"d_v": d_latent, "is_causal": is_causal}
    plan = None
    if plans is not None:
        key = (query.shape, pages.shape, pages.stride(), pages.dtype, is_causal)
        plan = plans.get(key)
        if plan is None:
            plan = plans[key] = native.plan(query, pages, block_table, seq_lens, **options)
    kernel = "" if plan is None else f", by {plan.backend}/{plan.kernel}"
    _say_once(query.shape[2], query.shape[3], query.dtype, kernel)
    out, lse = native.decode(
        query, pages, block_table, seq_lens, softmax_scale=scale, plan=plan, return_lse=with_lse, **options
    )
    rows = None if lse is None else lse.transpose(1, 2).flatten(0, 1).contiguous()
    return out.flatten(0, 1), rows
