"""The usual Triton kernel for MLA decode, as serving systems have it when nothing better fits: the peer `triton_usual`.

Two kernels. The first cuts every request into a fixed number of splits and gives each program 16 query heads of one
split; the second merges the splits of one head. Written for this laboratory after the well-known form, with the block
sizes that such kernels ship with (16 heads, 32 keys, 4 warps, 2 stages, 4 splits); it is a yardstick, not a product:
one KV head, one query token, no mask.

Sources of the form: LightLLM's token attention and its descendants in vLLM and SGLang (`decode_attention.py`).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl

HEADS, KEYS, SPLITS, WARPS, STAGES = 16, 32, 4, 4, 2


@triton.jit
def _split(
    q_ptr, kv_ptr, table_ptr, lengths_ptr, partial_ptr, lse_ptr, scale, max_pages, h_q,
    PAGE: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """One split of one request for HEADS query heads: its softmax sum and its weighted values, fp32."""
    request, block, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths_ptr + request)
    each = (length + SPLITS - 1) // SPLITS
    first, last = split * each, tl.minimum(length, (split + 1) * each)
    heads = block * HEADS + tl.arange(0, HEADS)
    real = heads < h_q
    width: tl.constexpr = LATENT + ROPE
    latent, rope = tl.arange(0, LATENT), LATENT + tl.arange(0, ROPE)
    row = (request * h_q + heads).to(tl.int64)
    q = tl.load(q_ptr + row[:, None] * width + latent[None, :], mask=real[:, None], other=0.0)
    q_rope = tl.load(q_ptr + row[:, None] * width + rope[None, :], mask=real[:, None], other=0.0)
    top = tl.full([HEADS], float("-inf"), tl.float32)
    mass = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, LATENT], tl.float32)
    for begin in range(first, last, KEYS):
        at = begin + tl.arange(0, KEYS)
        seen = at < last
        page = tl.load(table_ptr + request * max_pages + at // PAGE, mask=seen, other=0)
        slot = (page * PAGE + at % PAGE).to(tl.int64)
        keys = tl.load(kv_ptr + slot[:, None] * width + latent[None, :], mask=seen[:, None], other=0.0)
        keys_rope = tl.load(kv_ptr + slot[:, None] * width + rope[None, :], mask=seen[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(keys)) + tl.dot(q_rope, tl.trans(keys_rope))
        scores = tl.where(seen[None, :], scores * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        keep = tl.exp(top - higher)
        acc = acc * keep[:, None] + tl.dot(weights.to(keys.dtype), keys)
        mass = mass * keep + tl.sum(weights, 1)
        top = higher
    place = row * SPLITS + split
    empty = mass == 0
    out = acc / tl.where(empty, 1.0, mass)[:, None]
    tl.store(partial_ptr + place[:, None] * LATENT + latent[None, :], out, mask=real[:, None])
    tl.store(lse_ptr + place, tl.where(empty, float("-inf"), top + tl.log(tl.where(empty, 1.0, mass))), mask=real)


@triton.jit
def _merge(partial_ptr, split_lse_ptr, out_ptr, lse_ptr, LATENT: tl.constexpr, SPLITS: tl.constexpr):
    """One (request, head): splits weighted by exp(lse)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, LATENT)
    top = float("-inf")
    for split in tl.static_range(SPLITS):
        top = tl.maximum(top, tl.load(split_lse_ptr + row * SPLITS + split))
    acc = tl.zeros([LATENT], tl.float32)
    mass = 0.0
    for split in tl.static_range(SPLITS):
        weight = tl.exp(tl.load(split_lse_ptr + row * SPLITS + split) - top)
        acc += weight * tl.load(partial_ptr + (row * SPLITS + split) * LATENT + columns)
        mass += weight
    tl.store(out_ptr + row * LATENT + columns, (acc / mass).to(out_ptr.dtype.element_ty))
    tl.store(lse_ptr + row, top + tl.log(mass))


class UsualDecode:
    """Buffers and launches of one shape; requests of length 0 are not its business."""

    def __init__(self, batch: int, h_q: int, d_v: int, device: torch.device) -> None:
        self.partial = torch.empty(batch * h_q * SPLITS * d_v, dtype=torch.float32, device=device)
        self.split_lse = torch.empty(batch * h_q * SPLITS, dtype=torch.float32, device=device)

    def __call__(
        self, q: torch.Tensor, kv_cache: torch.Tensor, block_table: torch.Tensor, cache_seqlens: torch.Tensor,
        softmax_scale: float, d_v: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """(out [batch, 1, h_q, d_v], lse [batch, h_q, 1]) of q [batch, 1, h_q, d_qk] over a contiguous paged cache."""
        batch, _, h_q, d_qk = q.shape
        out = q.new_empty(batch, 1, h_q, d_v)
        lse = torch.empty(batch, h_q, 1, dtype=torch.float32, device=q.device)
        _split[(batch, triton.cdiv(h_q, HEADS), SPLITS)](
            q, kv_cache, block_table, cache_seqlens, self.partial, self.split_lse, softmax_scale, block_table.shape[1],
            h_q, PAGE=kv_cache.shape[1], LATENT=d_v, ROPE=d_qk - d_v, HEADS=HEADS, KEYS=KEYS, SPLITS=SPLITS,
            num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
        _merge[(batch * h_q,)](self.partial, self.split_lse, out, lse, LATENT=d_v, SPLITS=SPLITS, num_warps=WARPS)
        return out, lse
