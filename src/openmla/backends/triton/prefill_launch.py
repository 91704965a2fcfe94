"""From operands of a prefill to launches: strides, grids and constants. No decisions; those are in `prefill_config`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from openmla.backends.base import PrefillOperands
from openmla.backends.triton.config import Config
from openmla.backends.triton.launch import ELEMENT, LOG2_E, on_device, sign_and_scale
from openmla.backends.triton.prefill import (
    delta_kernel,
    key_gradient_kernel,
    prefill_kernel,
    query_gradient_kernel,
)
from openmla.backends.triton.prefill_config import PrefillConfig, dims
from openmla.core.problem import PrefillProblem

DELTA_ROWS = 32  # rows per program of the row sums: 32 x 128 products, 32 of each of 128 threads


@dataclass(frozen=True)
class ReadyPrefill:
    """What a launch needs beside operands."""

    config: PrefillConfig
    constants: dict[str, Any]  # of every kernel with tiles


def make_ready(problem: PrefillProblem, config: PrefillConfig) -> ReadyPrefill:
    """The constants of a problem; machine code follows at the first launch."""
    constants = {
        "GROUP": problem.h_q // problem.h_kv,
        "IS_CAUSAL": problem.is_causal,
        "DIMS": dims(problem),
        "STAY": config.keeps_invariants,
    }
    return ReadyPrefill(config, constants)


def _tile(config: Config) -> dict[str, int]:
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _grid(longest: int, total: int, block: int, heads: int, requests: int) -> tuple[int, int, int]:
    """Tiles of the longest request; announced lengths beyond what there is add nothing."""
    return (max(triton.cdiv(min(longest, total), block), 1), heads, requests)


def prefill(problem: PrefillProblem, ready: ReadyPrefill, operands: PrefillOperands) -> None:
    """Forward."""
    o = operands
    if problem.total_q == 0:
        return
    tile = ready.config.forward
    with on_device(o.q.device):
        prefill_kernel[_grid(problem.max_seqlen_q, problem.total_q, tile.block_m, problem.h_q, problem.batch + 1)](
            o.q, o.k, o.v, o.cu_seqlens_q, o.cu_seqlens_k, o.out, o.lse, o.fault_word,
            *sign_and_scale(o.softmax_scale), problem.batch, problem.total_q, problem.total_k, *o.q.stride()[:2],
            *o.k.stride()[:2], *o.v.stride()[:2], *o.out.stride()[:2], *o.lse.stride(), H_Q=problem.h_q,
            COMPUTE=ELEMENT[problem.dtype], **ready.constants, **_tile(tile),
        )  # fmt: skip


def prefill_backward(
    problem: PrefillProblem, ready: ReadyPrefill, operands: PrefillOperands, grad_out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv); zero in rows that no request owns."""
    o = operands
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (o.q, o.k, o.v))
    if problem.total_q == 0 or problem.total_k == 0 or problem.batch == 0:
        return dq, dk, dv
    delta = torch.empty((problem.h_q, problem.total_q), dtype=torch.float32, device=o.q.device)
    scales = (o.softmax_scale, o.softmax_scale * LOG2_E)
    tensors = (o.q, o.k, o.v, o.cu_seqlens_q, o.cu_seqlens_k, grad_out, o.lse, delta)
    strides = (
        *o.q.stride()[:2], *o.k.stride()[:2], *o.v.stride()[:2], *grad_out.stride()[:2], *o.lse.stride()
    )  # fmt: skip
    by_query, by_key = ready.config.query_gradient, ready.config.key_gradient
    with on_device(o.q.device):
        delta_kernel[(triton.cdiv(problem.total_q, DELTA_ROWS), problem.h_q)](
            o.out, grad_out, delta, problem.total_q, *o.out.stride()[:2], *grad_out.stride()[:2],
            DIMS=ready.constants["DIMS"], BLOCK_M=DELTA_ROWS, num_warps=4,
        )  # fmt: skip
        query_gradient_kernel[
            _grid(problem.max_seqlen_q, problem.total_q, by_query.block_m, problem.h_q, problem.batch)
        ](
            *tensors, dq, *scales, problem.total_q, problem.total_k, *strides, *dq.stride()[:2], **ready.constants,
            **_tile(by_query),
        )  # fmt: skip
        key_gradient_kernel[_grid(problem.max_seqlen_k, problem.total_k, by_key.block_n, problem.h_kv, problem.batch)](
            *tensors, dk, dv, *scales, problem.total_q, problem.total_k, *strides, *dk.stride()[:2], *dv.stride()[:2],
            **ready.constants, **_tile(by_key),
        )  # fmt: skip
    return dq, dk, dv
