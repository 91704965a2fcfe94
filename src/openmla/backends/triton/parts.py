"""Merge of whole results over different keys, one launch: shares of ranks, a shared prefix and the suffixes.

    m = max_i lse_i     w_i = exp(lse_i - m)     out = sum_i w_i out_i / sum_i w_i     lse = m + ln sum_i w_i

The law is that of `openmla.split.combine`, in its order: sums run over the parts as they stand, so the bits repeat. The
merge of split requests inside a decode is `openmla.backends.triton.combine`: its parts are fp32, in base 2, of any number.

A program merges one row (token, head). A part without keys (lse -inf) is not read.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl

from openmla.backends.triton.launch import on_device

NUM_WARPS = 2  # 512 columns: eight per thread, one 16-byte load of bf16


@triton.jit
def _share(out_row, lse, shift, column, D_V: tl.constexpr):
    """(weight, weighted fp32 row) of one part; zeros without reading where it has no key."""
    weight = tl.exp(lse - shift)
    held = tl.where(lse == float("-inf"), 0, D_V)
    row = tl.load(out_row + column, mask=column < held, other=0.0)
    return weight, weight * row.to(tl.float32)


# Numbers that grow with the batch; a variant for each that is 1 or a multiple of 16 would be compiled while a server waits.
_FREE = [
    "more", "s_q", "h_q", "first_lse_batch", "first_lse_token", "first_lse_head", "rest_lse_part", "rest_lse_batch",
    "rest_lse_token", "rest_lse_head",
]  # fmt: skip


@triton.jit(do_not_specialize=_FREE)
def merge_kernel(
    first_ptr,  # [batch, s_q, h_q, d_v]
    first_lse_ptr,  # [batch, h_q, s_q] fp32, natural
    rest_ptr,  # [more, batch, s_q, h_q, d_v]
    rest_lse_ptr,  # [more, batch, h_q, s_q] fp32, natural
    sink_ptr,  # [h_q] fp32 with HAS_SINK
    out_ptr,  # [batch, s_q, h_q, d_v] contiguous
    lse_ptr,  # [batch, h_q, s_q] contiguous fp32
    more, s_q, h_q, lse_factor, first_batch, first_token, first_head, first_lse_batch, first_lse_token, first_lse_head,
    rest_part, rest_batch, rest_token, rest_head, rest_lse_part, rest_lse_batch, rest_lse_token, rest_lse_head,
    D_V: tl.constexpr, D_PADDED: tl.constexpr, HAS_SINK: tl.constexpr,
):  # fmt: skip
    """See the module."""
    row = tl.program_id(0).to(tl.int64)
    head = row % h_q
    token = row // h_q % s_q
    request = row // h_q // s_q
    column = tl.arange(0, D_PADDED)
    first_lse = tl.load(
        first_lse_ptr + request * first_lse_batch + token * first_lse_token + head * first_lse_head
    )  # fmt: skip
    lses = rest_lse_ptr + request * rest_lse_batch + token * rest_lse_token + head * rest_lse_head
    top = first_lse
    for part in range(0, more):
        top = tl.maximum(top, tl.load(lses + tl.cast(part, tl.int64) * rest_lse_part))
    shift = tl.where(top == float("-inf"), 0.0, top)
    first_row = first_ptr + request * first_batch + token * first_token + head * first_head
    mass, acc = _share(first_row, first_lse, shift, column, D_V)
    rows = rest_ptr + request * rest_batch + token * rest_token + head * rest_head
    for part in range(0, more):
        place = tl.cast(part, tl.int64)
        weight, weighted = _share(rows + place * rest_part, tl.load(lses + place * rest_lse_part), shift, column, D_V)
        mass += weight
        acc += weighted
    is_empty = mass == 0.0
    total = tl.where(is_empty, 1.0, mass)
    lse = tl.where(is_empty, float("-inf"), shift + tl.log(total))
    out = acc / total
    if HAS_SINK:
        # 1 / (1 + exp(sink - lse)): 0 for a row without keys, whose out is 0 already.
        out = out / (1.0 + tl.exp(tl.load(sink_ptr + head) - tl.where(is_empty, 0.0, lse)))
    tl.store(out_ptr + row * D_V + column, out.to(out_ptr.dtype.element_ty), mask=column < D_V)
    tl.store(lse_ptr + (request * h_q + head) * s_q + token, lse * lse_factor)


def merge(
    first: torch.Tensor, first_lse: torch.Tensor, rest: torch.Tensor, rest_lse: torch.Tensor,
    attn_sink: torch.Tensor | None, lse_factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """As `openmla.ops.parts.merge`, for tensors on one GPU; checks nothing."""
    batch, s_q, h_q, d_v = first.shape
    out = torch.empty(batch, s_q, h_q, d_v, dtype=first.dtype, device=first.device)
    lse = torch.empty(batch, h_q, s_q, dtype=torch.float32, device=first.device)
    if out.shape[:3].numel() == 0:
        return out, lse
    by_token, by_tokens = first_lse.transpose(1, 2), rest_lse.transpose(2, 3)
    with on_device(first.device):
        merge_kernel[(batch * s_q * h_q,)](
            first, first_lse, rest, rest_lse, first_lse if attn_sink is None else attn_sink, out, lse, rest.shape[0], s_q,
            h_q, lse_factor, *first.stride()[:3], *by_token.stride(), *rest.stride()[:4], *by_tokens.stride(),
            D_V=d_v, D_PADDED=1 << max(d_v - 1, 1).bit_length(), HAS_SINK=attn_sink is not None, num_warps=NUM_WARPS,
        )  # fmt: skip
    return out, lse
