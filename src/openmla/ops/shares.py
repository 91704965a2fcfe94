"""A decode over one rank's tokens whose kernel ends by exchanging rows with the other ranks, for `openmla.distributed`."""

from __future__ import annotations

from dataclasses import replace

import torch

from openmla.backends.base import DecodeOperands
from openmla.core import faults
from openmla.core.layout import KVLayout
from openmla.ops import dispatch, native
from openmla.split.schedule import Policy


def decode_exchanged(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *,
    mail: torch.Tensor,
    staged_out: torch.Tensor,
    staged_lse: torch.Tensor,
    d_v: int,
    softmax_scale: float,
    kv_layout: KVLayout | str | None,
    plan: native.Plan | None,
    policy: Policy,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(out, lse) over the tokens of all ranks, or None where the kernel of this call does not exchange.

    Args:
        q, kv_cache, block_table, cache_seqlens, d_v, softmax_scale, kv_layout, plan, policy, backend: as for `decode`.
        mail: int64, what the kernel needs to know of the mailboxes (`openmla.distributed.mailbox`).
        staged_out, staged_lse: [batch, s_q, h_q, d_v] in the dtype of q and [batch, h_q, s_q] fp32, unwritten words of the
            mailbox; the same after the launch.
    """
    policy = policy if plan is None else plan.policy
    prepared = native._prepare_decode(
        q, kv_cache, block_table, cache_seqlens, d_v, softmax_scale, False, None, None, None, None, None, kv_layout, backend,
        policy,
    )  # fmt: skip
    make = getattr(prepared.kernel, "exchanging", None)
    if make is None:
        return None
    pieces = native._pieces(plan, prepared, cache_seqlens, policy)
    if pieces.partials is None:
        return None
    rows, words = staged_lse.numel(), staged_out.numel() * staged_out.element_size() // 4
    merged = torch.empty(words + rows, dtype=torch.int32, device=q.device)
    kernel = make(prepared.compiled, pieces, mail, merged)
    if kernel is None:
        return None
    operands = DecodeOperands(
        q, kv_cache, block_table, cache_seqlens, softmax_scale, staged_out, staged_lse, faults.fault_word(q.device)
    )
    # Another kernel would leave rows that nobody sends: a refused launch is an error here.
    dispatch.launch(replace(prepared, kernel=kernel, asked="cute"), operands, pieces)
    out, lse = merged.split([words, rows])
    return out.view(q.dtype).view(staged_out.shape), lse.view(torch.float32).view(staged_lse.shape)
