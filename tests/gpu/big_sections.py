"""Sections of `prove_decode.py` about sizes: caches beyond 2^31 and 2^32 elements, many requests, many tokens, many keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from decode_items import Made, NotRunError, Setup

import openmla
from openmla.core.layout import kv_layout
from openmla.reference import attention
from openmla.reference.quant import write_rows
from openmla.testing import budget


def big(setup: Setup) -> Made:
    """Pools of 8.6 GB, packed or with pages twice as far apart; more requests than a grid dimension; a million keys."""

    def check(h_q: int, is_strided: bool) -> Callable[[Setup], dict[str, Any]]:
        return lambda setup: _big(setup, h_q, is_strided)

    kinds = [(h_q, is_strided) for h_q in (16, 128) for is_strided in (False, True)]
    made = [(f"h_q {h_q} {'strided' if is_strided else 'packed'}", check(h_q, is_strided)) for h_q, is_strided in kinds]
    return [
        *made,
        ("70000 requests", _many_requests),
        *((f"a million keys, h_q {h_q}", _long(h_q)) for h_q in (16, 128)),
    ]


def _many_requests(setup: Setup) -> dict[str, Any]:
    """All rows are written; 256 of them, the first and the last among them, are judged."""
    batch, pages = 300 if setup.is_small else 70_000, 1000
    if setup.is_cuda and torch.cuda.mem_get_info()[0] < 2**33:
        raise NotRunError("needs 8 GB of free device memory")
    generator = torch.Generator(setup.device).manual_seed(1)
    kv = torch.randn(pages, 64, 1, 576, generator=generator, device=setup.device).bfloat16()
    q = torch.randn(batch, 1, 16, 576, generator=generator, device=setup.device).bfloat16()
    table = torch.randint(0, pages, (batch, 3), generator=generator, device=setup.device, dtype=torch.int32)
    lengths = torch.randint(0, 193, (batch,), generator=generator, device=setup.device, dtype=torch.int32)
    out, lse = openmla.decode(q, kv, table, lengths, backend=setup.backend)
    assert not bool(out.isnan().any()) and not bool(lse.isnan().any()), "NaN in rows that nobody poisoned"
    chosen = torch.randperm(batch, generator=torch.Generator().manual_seed(2))[:254].tolist()
    some = torch.tensor([0, batch - 1, *chosen], device=setup.device)
    golden = attention.decode(
        q[some], kv, table[some], lengths[some], softmax_scale=576**-0.5, d_v=512, with_bounds=True
    )
    budget.check(out[some], lse[some], golden, dtype=torch.bfloat16).require(f"{batch} requests")
    return {"measured": {"requests": batch}}


def _long(h_q: int) -> Callable[[Setup], dict[str, Any]]:
    return lambda setup: _million(setup, h_q)


def _million(setup: Setup, h_q: int) -> dict[str, Any]:
    """The same 64 pages again and again: the output of once, an lse that is larger by the logarithm of how often."""
    times = 3 if setup.is_small else 245
    generator = torch.Generator(setup.device).manual_seed(1)
    kv = torch.randn(64, 64, 1, 576, generator=generator, device=setup.device).bfloat16()
    q = torch.randn(1, 1, h_q, 576, generator=generator, device=setup.device).bfloat16()
    once = torch.arange(64, dtype=torch.int32, device=setup.device)[None]
    length = torch.tensor([4096], dtype=torch.int32, device=setup.device)
    out, lse = openmla.decode(q, kv, once.repeat(1, times), length * times, backend=setup.backend)
    golden = attention.decode(q, kv, once, length, softmax_scale=576**-0.5, d_v=512, with_bounds=True)
    known = golden.bounds
    assert known is not None
    longer = {name: getattr(known, name) * times for name in ("V1", "V2", "L", "n")}
    bounds = replace(known, B=known.B / times, **longer)
    budget.check(
        out, lse, replace(golden, lse=golden.lse + math.log(times), bounds=bounds), dtype=torch.bfloat16
    ).require(f"{4096 * times} keys")
    return {"measured": {"keys": 4096 * times}}


def _big(setup: Setup, h_q: int, is_strided: bool) -> dict[str, Any]:
    """Pages around 2^31 and 2^32 elements and at both ends hold keys, all others NaN."""
    elements = 64 * 576
    num_pages = 60 if setup.is_small else 2**32 // elements + 300
    if setup.is_cuda and torch.cuda.mem_get_info()[0] < 2 * num_pages * elements + 2**31:
        raise NotRunError(f"needs {2 * num_pages * elements / 1e9:.1f} GB of free device memory")
    pool = torch.empty(num_pages * elements * 2, dtype=torch.uint8, device=setup.device).fill_(0xFF)
    kv = pool.view(torch.bfloat16).view(num_pages, 64, 1, 576)
    step = 2 if is_strided else 1
    kv = kv[::step]
    edges = [0, 1, 2**31 // elements // step - 1, 2**31 // elements // step, 2**32 // elements // step - 1]
    edges += [2**32 // elements // step, kv.shape[0] - 2, kv.shape[0] - 1]
    pages = [page % kv.shape[0] for page in edges] if not setup.is_small else list(range(8))
    generator = torch.Generator(setup.device).manual_seed(1)
    keys = torch.randn(8, 64, 1, 576, generator=generator, device=setup.device).bfloat16()
    for index, page in enumerate(pages):
        kv[page] = keys[index]
    q = torch.randn(2, 1, h_q, 576, generator=generator, device=setup.device).bfloat16()
    lengths = torch.tensor([64 * 8, 64 * 5 - 7], dtype=torch.int32, device=setup.device)
    order = [list(range(8)), [7, 5, 3, 1, 6, 0, 2, 4]]
    where = torch.tensor([[pages[i] for i in row] for row in order], dtype=torch.int32, device=setup.device)
    compact = torch.tensor(order, dtype=torch.int32, device=setup.device)
    plan = openmla.plan(q, kv, where, lengths, backend=setup.backend)
    out, lse = openmla.decode(q, kv, where, lengths, plan=plan, backend=setup.backend)
    golden = attention.decode(q, keys, compact, lengths, softmax_scale=576**-0.5, d_v=512, with_bounds=True)
    budget.check(out, lse, golden, dtype=torch.bfloat16).require(f"{num_pages} pages, step {step}")
    return {"ran": [f"{plan.backend}/{plan.kernel}"], "measured": {"elements": pool.numel() // 2}}


# ------------------------------------------------------------------------------------------- selected keys


def sparse_big(setup: Setup) -> Made:
    """A quantised pool beyond 2^32 bytes, rows beyond 2^32 elements, and 70,000 tokens."""
    return [
        ("fp8_656 beyond 2^32 bytes", _big_pages),
        ("rows beyond 2^32 elements", _big_rows),
        ("70000 tokens", _many_tokens),
    ]


def _edges(rows: int, boundary: int) -> list[int]:
    """Rows at both ends and around the one that holds the boundary."""
    return sorted({0, 1, boundary - 1, boundary, rows - 2, rows - 1} & set(range(rows)))


def _room(setup: Setup, size: int) -> None:
    if setup.is_cuda and torch.cuda.mem_get_info()[0] < size + 2**31:
        raise NotRunError(f"needs {size / 1e9:.1f} GB of free device memory")


def _lists(setup: Setup, where: list[int], shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """(indices into the pool, the same into the rows `where` alone)."""
    chosen = torch.randint(0, len(where), shape, generator=torch.Generator().manual_seed(1))
    found = torch.tensor(where)[chosen]
    return found.to(torch.int32).to(setup.device), chosen.to(torch.int32).to(setup.device)


def _big_pages(setup: Setup) -> dict[str, Any]:
    layout, size = kv_layout("fp8_656"), 64 * 656
    pages = 60 if setup.is_small else 2**32 // size + 300
    _room(setup, pages * size)
    pool = torch.full((pages, 64, 1, 656), 0xFF, dtype=torch.uint8, device=setup.device)
    where = _edges(pages * 64, 2**32 // 656) if not setup.is_small else _edges(pages * 64, 2000)
    where += [slot + 64 for slot in where if slot + 64 < pages * 64]
    keys = torch.randn(len(where), 576, generator=torch.Generator().manual_seed(2)).bfloat16().to(setup.device)
    write_rows(pool, layout, torch.tensor(where, device=setup.device), keys)
    small = layout.empty_cache(1, 64, device=setup.device)
    write_rows(small, layout, torch.arange(len(where), device=setup.device), keys)
    indices, compact = _lists(setup, where, (3, 1, 200))
    q = torch.randn(3, 1, 64, 576, generator=torch.Generator().manual_seed(3)).bfloat16().to(setup.device)
    out, lse = openmla.sparse_decode(q, pool, indices, kv_layout=layout, backend=setup.backend)
    options = {"softmax_scale": 576**-0.5, "d_v": 512, "with_bounds": True}
    golden = attention.sparse_decode(q, small, compact, layout=layout, **options)
    budget.check(out, lse, golden, dtype=torch.bfloat16).require(f"{pages} pages")
    return {"measured": {"bytes": pool.numel()}}


def _big_rows(setup: Setup) -> dict[str, Any]:
    rows = 4000 if setup.is_small else 2**32 // 576 + 300
    _room(setup, 2 * rows * 576)
    kv = (
        torch.empty(rows * 576 * 2, dtype=torch.uint8, device=setup.device)
        .fill_(0xFF)
        .view(torch.bfloat16)
        .view(rows, 1, 576)
    )
    where = _edges(rows, 2**32 // 576) + (_edges(rows, 2**31 // 576)[2:4] if not setup.is_small else [])
    keys = torch.randn(len(where), 1, 576, generator=torch.Generator().manual_seed(2)).bfloat16().to(setup.device)
    kv[torch.tensor(where, device=setup.device)] = keys
    indices, compact = _lists(setup, where, (3, 1, 200))
    q = torch.randn(3, 128, 576, generator=torch.Generator().manual_seed(3)).bfloat16().to(setup.device)
    out, largest, lse = openmla.sparse_prefill(q, kv, indices, backend=setup.backend)
    golden = attention.sparse_prefill(q, keys, compact, softmax_scale=576**-0.5, d_v=512, with_bounds=True)
    budget.check(out, lse, golden, dtype=torch.bfloat16, max_logits=largest).require(f"{rows} rows")
    return {"measured": {"elements": kv.numel()}}


def _many_tokens(setup: Setup) -> dict[str, Any]:
    tokens = 300 if setup.is_small else 70_000
    _room(setup, 3 * tokens * 16 * 576 * 2)
    generator = torch.Generator(setup.device).manual_seed(1)
    kv = torch.randn(2000, 1, 576, generator=generator, device=setup.device).bfloat16()
    q = torch.randn(tokens, 16, 576, generator=generator, device=setup.device).bfloat16()
    indices = torch.randint(0, 2000, (tokens, 1, 64), generator=generator, device=setup.device, dtype=torch.int32)
    out, largest, lse = openmla.sparse_prefill(q, kv, indices, backend=setup.backend)
    chosen = torch.randperm(tokens, generator=torch.Generator().manual_seed(2))[:254].tolist()
    some = torch.tensor([0, tokens - 1, *chosen], device=setup.device)
    golden = attention.sparse_prefill(q[some], kv, indices[some], softmax_scale=576**-0.5, d_v=512, with_bounds=True)
    budget.check(out[some], lse[some], golden, dtype=torch.bfloat16, max_logits=largest[some]).require(
        f"{tokens} tokens"
    )
    return {"measured": {"tokens": tokens}}
