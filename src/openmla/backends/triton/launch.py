"""From operands to launches: strides, grids and constants. No decisions; those are in `config`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from openmla.backends.base import DecodeOperands, DecodePlan, SparseDecodeOperands, SparsePrefillOperands
from openmla.backends.triton.combine import combine_kernel
from openmla.backends.triton.config import (
    CHUNK_TOKENS,
    OVERHEAD_TOKENS,
    AnyProblem,
    Config,
    dims,
    is_scheduled,
    is_wide,
    kept_apart,
    num_parts,
    sparse_splits,
    stored_rows,
    tiles,
)
from openmla.backends.triton.decode import decode_kernel
from openmla.backends.triton.inline import constants as mod_constants
from openmla.backends.triton.inline import rope_arguments, table_arguments
from openmla.backends.triton.schedule import plan_kernel
from openmla.backends.triton.selected import selected_kernel
from openmla.core.layout import KVLayout
from openmla.core.problem import DecodeProblem, SparseDecodeProblem, SparsePrefillProblem
from openmla.core.target import Target

LOG2_E = 1.4426950408889634
MAX_INT32 = 2**31 - 1
COMBINE_ROWS = 4  # rows per program of the merge: 4 x 512 fp32 sums, 16 registers of each of 128 threads
ELEMENT = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@dataclass(frozen=True)
class Ready:
    """What a launch needs beside operands."""

    config: Config
    parts: int  # of a plan; 1 where there is none
    splits: int  # of a selection; 1 where there is none
    constants: dict[str, Any]  # of the attention kernel
    merge: dict[str, Any]  # of the combine kernel
    is_scheduled: bool = False  # by `selected_sm90`, where rows lie at multiples of 16 bytes

    @property
    def options(self) -> dict[str, int]:
        """Compiler options of the attention kernel."""
        return {"num_warps": self.config.num_warps, "num_stages": self.config.num_stages}


def make_ready(problem: AnyProblem, config: Config, target: Target) -> Ready:
    """The constants of a problem; nothing is compiled before the first launch, which knows alignments."""
    group, has_sink = problem.h_q // problem.h_kv, problem.has_sink
    common: dict[str, Any] = {"H_KV": problem.h_kv, "GROUP": group, "HAS_SINK": has_sink, "DIMS": dims(problem)}
    constants = common | {
        "COMPUTE": tl.float32 if is_wide(problem) else ELEMENT[problem.dtype],
        "APART": kept_apart(config, problem, target),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "STAGES": config.num_stages,
    }
    merge = common | {"IS_VARLEN": False, "SPLITS": 0, "IS_SUM": False, "BLOCK_ROWS": COMBINE_ROWS}
    parts = splits = 1
    if isinstance(problem, DecodeProblem):
        parts = num_parts(problem, config, target)
        merge["IS_VARLEN"] = problem.is_varlen
        merge["IS_SUM"] = problem.mods is not None and problem.mods.activation is not None
        constants |= {
            "IS_CAUSAL": problem.is_causal,
            "WINDOW": problem.window,
            "MIXED": _mixed(problem),
            "MODS": mod_constants(problem.mods),
            "IS_VARLEN": problem.is_varlen,
            "LAYOUT": stored_rows(problem.layout, problem.page_size),
            "PAGE_SIZE": problem.page_size,
        }
    else:
        splits = sparse_splits(problem, config, target) if isinstance(problem, SparseDecodeProblem) else 1
        merge["SPLITS"] = splits
        constants |= {"SPLITS": splits, "HAS_LENGTH": problem.has_topk_length, **_sources(problem)}
    return Ready(config, parts, splits, constants, merge, is_scheduled(problem, config, target))


def _mixed(problem: DecodeProblem) -> str:
    """Where rows of a tile may differ in what they see."""
    if problem.mods is not None and problem.mods.masks:
        return "everywhere"
    return "edges" if problem.s_q > 1 and (problem.is_causal or problem.window > 0) else "nowhere"


def _sources(problem: SparseDecodeProblem | SparsePrefillProblem) -> dict[str, Any]:
    """Layout constants of one or two caches; PAGE_SIZE 0 for rows without pages."""
    if isinstance(problem, SparsePrefillProblem):
        plain = ("plain", "none", 0, 0, 0, 0, 0, 0)
        return {
            "HAS_MAX": True, "LAYOUT": plain, "PAGE_SIZE": 0, "EXTRA_LAYOUT": None, "EXTRA_PAGE_SIZE": 1,
            "EXTRA_HAS_LENGTH": False,
        }  # fmt: skip
    extra = problem.extra
    return {
        "HAS_MAX": False,
        "LAYOUT": stored_rows(problem.layout, problem.page_size),
        "PAGE_SIZE": problem.page_size,
        "EXTRA_LAYOUT": stored_rows(extra.layout, extra.page_size) if extra else None,
        "EXTRA_PAGE_SIZE": extra.page_size if extra else 1,
        "EXTRA_HAS_LENGTH": extra is not None and extra.has_topk_length,
    }


@contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Triton launches on the current device; make it the operands' own."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        yield
    else:
        with torch.cuda.device(device):
            yield


def sign_and_scale(softmax_scale: float) -> tuple[float, float]:
    """(sign, scale2). A scale of 0 makes all scores 0; any positive scale2 then gives their equal weights."""
    if softmax_scale == 0:
        return 0.0, 1.0
    return (1.0 if softmax_scale > 0 else -1.0), abs(softmax_scale) * LOG2_E


def _elements(cache: torch.Tensor, layout: KVLayout) -> torch.Tensor:
    """Byte layouts as uint8, whatever 1-byte dtype they came in."""
    return cache.view(torch.uint8) if layout.is_quantised else cache


# ------------------------------------------------------------------------------------------------- dense decode


def chunk_blocks(ready: Ready, policy: str) -> int:
    """KV tiles per piece of batch_invariant; 0 for balanced."""
    return CHUNK_TOKENS // ready.config.block_n if policy == "batch_invariant" else 0


def slots(problem: DecodeProblem, ready: Ready, chunk: int) -> int:
    """Places for partial results: each part adds at most one cut, one part none; chunks are counted at full length."""
    if chunk == 0:
        return problem.batch + ready.parts if ready.parts > 1 else 0
    return problem.batch * max(-(-_capacity(problem) // (chunk * ready.config.block_n)), 1)


def partial_bytes(num_slots: int, num_rows: int, d_v: int) -> int:
    """Bytes of fp32 outs and lses; the lses start at a multiple of 256."""
    return _aligned(4 * num_slots * num_rows * d_v) + 4 * num_slots * num_rows


def _aligned(size: int) -> int:
    return -(-size // 256) * 256


def _capacity(problem: DecodeProblem) -> int:
    return min(problem.max_pages * problem.page_size, MAX_INT32)


def _partials(scratch: torch.Tensor, num_slots: int, num_rows: int, d_v: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(out_accum, lse_accum), flat fp32 views of scratch bytes."""
    outs = 4 * num_slots * num_rows * d_v
    begin = _aligned(outs)
    return scratch[:outs].view(torch.float32), scratch[begin : begin + 4 * num_slots * num_rows].view(torch.float32)


def plan(problem: DecodeProblem, ready: Ready, cache_seqlens: torch.Tensor, policy: str) -> DecodePlan:
    """Cut the batch on its device, without waiting for it."""
    device, block = cache_seqlens.device, ready.config.block_n
    chunk = chunk_blocks(ready, policy)
    metadata = torch.empty((ready.parts, 8), dtype=torch.int32, device=device)
    num_splits = torch.empty(problem.batch + 1, dtype=torch.int32, device=device)
    with on_device(device):
        plan_kernel[(ready.parts + 1,)](
            cache_seqlens, metadata, num_splits, problem.batch, ready.parts, _capacity(problem), chunk,
            OVERHEAD_TOKENS // block, OVERHEAD_TOKENS // block, 1, BLOCK_TOKENS=block, num_warps=4,
        )  # fmt: skip
    return DecodePlan(metadata, num_splits, chunk)


def decode(problem: DecodeProblem, ready: Ready, operands: DecodeOperands, pieces: DecodePlan) -> None:
    """Attention over the pieces of the plan, then the merge of split requests."""
    o, device = operands, operands.q.device
    num_rows = problem.s_q * problem.h_q
    num_slots = slots(problem, ready, pieces.chunk_blocks)
    needed = partial_bytes(num_slots, num_rows, problem.d_v)
    scratch = o.workspace
    if scratch is None or scratch.numel() < needed:  # without one, or with a plan of another policy than it was for
        scratch = torch.empty(needed, dtype=torch.uint8, device=device)
    out_accum, lse_accum = _partials(scratch, num_slots, num_rows, problem.d_v)
    q_strides, out_strides = o.q.stride()[:-1], o.out.stride()[:-1]
    if problem.is_varlen:
        q_strides, out_strides = (0, *q_strides), (0, *out_strides)
        lse_strides = (0, o.lse.stride(1), o.lse.stride(0))
    else:
        lse_strides = (o.lse.stride(0), o.lse.stride(2), o.lse.stride(1))
    kv = _elements(o.kv_cache, problem.layout)
    cu, sink = (o.q if x is None else x for x in (o.cu_seqlens_q, o.attn_sink))
    descales = (_or(each, one(device)) for each in (o.descale_q, o.descale_k))
    num_tiles = tiles(problem, ready.config)
    with on_device(device):
        if problem.total_q and problem.s_q and problem.batch:
            decode_kernel[(num_tiles * problem.h_kv, pieces.tile_scheduler_metadata.shape[0])](
                o.q, kv, o.block_table, o.cache_seqlens, cu, sink, *descales, pieces.tile_scheduler_metadata, pieces.num_splits,
                o.out, o.lse, out_accum, lse_accum, o.fault_word, table_arguments(o.mods), rope_arguments(o.mods),
                *(sign_and_scale(o.softmax_scale) if o.mods is None else (1.0, LOG2_E)), o.softmax_scale, problem.total_q,
                problem.s_q, _capacity(problem), problem.num_pages, pieces.chunk_blocks, num_tiles, *q_strides[:2],
                kv.stride(0), kv.stride(2), o.block_table.stride(0), *out_strides[:2], *lse_strides,
                Q_HEAD_STRIDE=q_strides[2], KV_ROW_STRIDE=kv.stride(1), OUT_HEAD_STRIDE=out_strides[2],
                IS_FLAT=problem.h_kv == 1 and _is_flat(problem, q_strides) and _is_flat(problem, out_strides),
                **ready.constants, **ready.options,
            )  # fmt: skip
        _merge(problem, ready, o, (out_accum, lse_accum), pieces.num_splits, out_strides, lse_strides)


@cache
def one(device: torch.device) -> torch.Tensor:
    """The scale of codes that count as they are."""
    return torch.ones(1, device=device)


def _is_flat(problem: DecodeProblem, strides: tuple[int, ...]) -> bool:
    """Tokens follow one another like heads do, and distances within a tile fit 32 bits."""
    _, token, head = strides
    return token == problem.h_q * head and 64 * abs(head) <= MAX_INT32


def _merge(
    problem: DecodeProblem | SparseDecodeProblem, ready: Ready, operands: Any,
    partials: tuple[torch.Tensor, torch.Tensor], num_splits: torch.Tensor, out_strides: tuple[int, ...],
    lse_strides: tuple[int, ...],
) -> None:  # fmt: skip
    """Launch the combine kernel; with varlen queries one more program looks after rows of no request."""
    cu, sink = getattr(operands, "cu_seqlens_q", None), operands.attn_sink
    is_varlen = ready.merge["IS_VARLEN"]
    blocks = max(triton.cdiv(problem.s_q * problem.h_q, COMBINE_ROWS), 1)
    if problem.total_q == 0 or (problem.batch == 0 and not is_varlen):
        return
    combine_kernel[(blocks, problem.batch + is_varlen)](
        *partials, num_splits, num_splits if cu is None else cu, operands.lse if sink is None else sink, operands.out,
        operands.lse, operands.fault_word, problem.batch, problem.total_q, problem.s_q, *out_strides, *lse_strides,
        **ready.merge, num_warps=4,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ selected keys


def sparse_decode(problem: SparseDecodeProblem, ready: Ready, operands: SparseDecodeOperands) -> None:
    """Attention over selected slots, then the merge where a selection was split."""
    o = operands
    if problem.total_q == 0:
        return
    # A varlen token is a request of one token.
    spread = (lambda strides: (strides[0], 0, *strides[1:])) if problem.is_varlen else (lambda strides: strides)
    out_strides = spread(o.out.stride()[:-1])
    lse_strides = (o.lse.stride(1), 0, o.lse.stride(0)) if problem.is_varlen else (
        o.lse.stride(0), o.lse.stride(2), o.lse.stride(1)
    )  # fmt: skip
    kv = _elements(o.kv_cache, problem.layout)
    extra_kv, extra_indices, extra_topk, extra_slots = kv, o.indices, 0, 0
    if problem.extra is not None and o.extra_kv_cache is not None and o.extra_indices is not None:
        extra_kv, extra_indices = _elements(o.extra_kv_cache, problem.extra.layout), o.extra_indices
        extra_topk, extra_slots = problem.extra.topk, problem.extra.num_pages * problem.extra.page_size
    num_rows, num_slots = problem.s_q * problem.h_q, problem.batch * ready.splits if ready.splits > 1 else 0
    scratch = torch.empty(partial_bytes(num_slots, num_rows, problem.d_v), dtype=torch.uint8, device=o.q.device)
    partials = _partials(scratch, num_slots, num_rows, problem.d_v)
    num_tiles = tiles(problem, ready.config)
    with on_device(o.q.device):
        selected_kernel[(problem.total_q * num_tiles, ready.splits)](
            o.q, kv, o.indices, _or(o.topk_length, o.indices), extra_kv, extra_indices,
            _or(o.extra_topk_length, o.indices), _or(o.attn_sink, o.lse), o.out, o.lse, o.lse, *partials,
            o.fault_word, *sign_and_scale(o.softmax_scale), 0.0, problem.s_q, num_tiles, problem.topk,
            min(problem.num_pages * problem.page_size, MAX_INT32), extra_topk, min(extra_slots, MAX_INT32),
            *spread(o.q.stride()[:-1]), kv.stride(0), 0, *spread(o.indices.stride()[:-1]), 0,
            *_length_strides(o.topk_length), extra_kv.stride(0),
            *spread(extra_indices.stride()[:-1]), *_length_strides(o.extra_topk_length), *out_strides, *lse_strides,
            KV_ROW_STRIDE=kv.stride(1), EXTRA_ROW_STRIDE=extra_kv.stride(1), **ready.constants, **ready.options,
        )  # fmt: skip
        if ready.splits > 1:
            _merge(problem, ready, o, partials, o.indices, out_strides, lse_strides)


def _or(given: torch.Tensor | None, instead: torch.Tensor) -> torch.Tensor:
    """A pointer argument that the kernel never reads stands in for an absent one."""
    return instead if given is None else given


def _length_strides(length: torch.Tensor | None) -> tuple[int, int]:
    """(batch, token) strides of topk_length; one length per request serves all of its tokens."""
    if length is None:
        return (0, 0)
    return (length.stride(0), length.stride(1) if length.dim() == 2 else 0)


def sparse_prefill(problem: SparsePrefillProblem, ready: Ready, operands: SparsePrefillOperands) -> None:
    """Attention of s_q tokens over selected rows; a token is finished by its own programs."""
    o = operands
    if problem.s_q == 0:
        return
    num_tiles = tiles(problem, ready.config)
    if ready.is_scheduled and _is_aligned(o.q) and _is_aligned(o.kv):
        _sparse_prefill_sm90(problem, ready, o, num_tiles)
        return
    with on_device(o.q.device):
        selected_kernel[(problem.s_q * problem.h_kv * num_tiles, 1)](
            o.q, o.kv, o.indices, _or(o.topk_length, o.indices), o.kv, o.indices, o.indices, _or(o.attn_sink, o.lse),
            o.out, o.lse, o.max_logits, o.lse, o.lse, o.fault_word, *sign_and_scale(o.softmax_scale), abs(o.softmax_scale),
            problem.s_q, num_tiles, problem.topk, min(problem.s_kv, MAX_INT32), 0, 0, 0, o.q.stride(0), o.q.stride(1),
            0, o.kv.stride(1), 0, o.indices.stride(0), o.indices.stride(1), 0, 1, 0, 0, 0, 0, 0, 0,
            o.out.stride(0), o.out.stride(1), 0, o.lse.stride(0), o.lse.stride(1), KV_ROW_STRIDE=o.kv.stride(0), EXTRA_ROW_STRIDE=0,
            **ready.constants, **ready.options,
        )  # fmt: skip


def _is_aligned(rows: torch.Tensor) -> bool:
    """Whether every row of a 2-byte tensor begins at a multiple of 16 bytes, so that copies of 16 bytes may be asked for."""
    return rows.data_ptr() % 16 == 0 and all(step % 8 == 0 for step in rows.stride()[:-1])


@cache
def sm90_kernel() -> Any:
    """Imported by whoever runs it alone: Gluon is younger than the oldest Triton that serves the others."""
    from openmla.backends.triton.selected_sm90 import selected_sm90_kernel

    return selected_sm90_kernel


def _sparse_prefill_sm90(
    problem: SparsePrefillProblem, ready: Ready, o: SparsePrefillOperands, num_tiles: int
) -> None:  # fmt: skip
    with on_device(o.q.device):
        sm90_kernel()[(problem.s_q * problem.h_kv * num_tiles,)](
            o.q, o.kv, o.indices, _or(o.topk_length, o.indices), _or(o.attn_sink, o.lse), o.out, o.lse, o.max_logits,
            o.fault_word, *sign_and_scale(o.softmax_scale), abs(o.softmax_scale), num_tiles, problem.topk,
            min(problem.s_kv, MAX_INT32), o.q.stride(0) // 8, o.q.stride(1) // 8, o.kv.stride(1) // 8, o.indices.stride(0),
            o.indices.stride(1), o.out.stride(0), o.out.stride(1), o.lse.stride(0), o.lse.stride(1),
            KV_ROW_STRIDE=o.kv.stride(0), H_KV=problem.h_kv, GROUP=problem.h_q // problem.h_kv,
            HAS_LENGTH=problem.has_topk_length, HAS_SINK=problem.has_sink, num_warps=8,
        )  # fmt: skip
