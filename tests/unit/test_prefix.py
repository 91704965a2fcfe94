"""Decode over a shared prefix equals decode over prefix and suffix laid out per request."""

from __future__ import annotations

import pytest
import torch

import openmla
from openmla.core.errors import ProblemError
from openmla.reference import attention as reference
from openmla.testing import budget

PAGE = 16


def case(prefixes: list[int], members: list[list[int]], s_q: int, dtype: torch.dtype, seed: int = 0):
    """Prefix lengths per group, suffix lengths per request of each group. Everything in one pool of scattered pages."""
    generator = torch.Generator().manual_seed(seed)
    suffixes = [n for group in members for n in group]
    batch, h_q = len(suffixes), 6
    pages = [-(-n // PAGE) for n in [*prefixes, *suffixes]]
    pool = torch.randn(sum(pages) + 3, PAGE, 1, 576, generator=generator).to(dtype)
    order = iter(torch.randperm(len(pool), generator=generator).tolist())

    def table(counts: list[int]) -> torch.Tensor:
        found = torch.zeros(len(counts), max([1, *counts]), dtype=torch.int32)
        for i, count in enumerate(counts):
            found[i, :count] = torch.tensor([next(order) for _ in range(count)])
        return found

    tables = table(pages[: len(prefixes)]), table(pages[len(prefixes) :])
    q = torch.randn(batch, s_q, h_q, 576, generator=generator).to(dtype)
    lengths = torch.tensor(prefixes, dtype=torch.int32), torch.tensor(suffixes, dtype=torch.int32)
    starts = torch.tensor([0, *[len(group) for group in members]], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return q, pool, tables, lengths, starts


def golden(q, pool, tables, lengths, starts, sink=None):
    """The fp64 oracle over prefix and suffix of every request, copied behind one another."""
    dense, total = [], []
    for b in range(len(q)):
        group = int((starts[1:] <= b).sum())
        rows = [
            pool[table[i].long()].reshape(-1, 576)[: int(length[i])]
            for table, length, i in ((tables[0], lengths[0], group), (tables[1], lengths[1], b))
        ]
        dense.append(torch.cat(rows))
        total.append(len(dense[-1]))
    width = max([1, *total])
    whole = torch.zeros(len(q), width, 1, 576, dtype=q.dtype)
    for b, rows in enumerate(dense):
        whole[b, : len(rows), 0] = rows
    return reference.decode(
        q, whole, torch.arange(len(q), dtype=torch.int32)[:, None], torch.tensor(total, dtype=torch.int32), d_v=512,
        softmax_scale=192**-0.5, is_causal=True, attn_sink=sink, with_bounds=True,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("s_q", [1, 2])
def test_one_prefix_for_all(dtype, s_q) -> None:
    q, pool, tables, lengths, starts = case([130], [[2, 20, 2, 37]], s_q, dtype)
    sink = torch.linspace(-1, 4, 6)
    for given in (None, sink):
        out, lse = openmla.decode_shared_prefix(
            q, pool, tables[0], lengths[0], tables[1], lengths[1], softmax_scale=192**-0.5, attn_sink=given
        )
        want = golden(q, pool, tables, lengths, starts, given)
        budget.check(out, lse, want, dtype=dtype).require(f"sink {given is not None}")


def test_groups_with_empty_prefix_suffix_and_group() -> None:
    """Three prefixes (one of no token), a group of nobody, a request with nothing at all."""
    q, pool, tables, lengths, starts = case([40, 0, 7, 64], [[3, 0], [0, 5], [], [1]], 1, torch.float32)
    out, lse = openmla.decode_shared_prefix(
        q, pool, tables[0], lengths[0], tables[1], lengths[1], cu_requests=starts, max_requests=2,
        softmax_scale=192**-0.5, lse_base="2",
    )  # fmt: skip
    want = golden(q, pool, tables, lengths, starts)
    budget.check(out, lse / 1.4426950408889634, want, dtype=torch.float32).require()
    assert bool((out[2] == 0).all())
    assert bool((lse[2] == -torch.inf).all())


def test_a_table_of_the_cache_splits_by_slicing() -> None:
    """How a serving loop gets there: requests that forked from one parent share their first pages."""
    cache = openmla.PagedKVCache("fp32_576", 32, PAGE)
    cache.alloc("a")
    cache.append(0, "a", torch.randn(40, 576))
    for name in "bc":
        cache.fork("a", name, 2 * PAGE)
    for name, count in zip("abc", (3, 9, 20), strict=True):
        cache.append(0, name, torch.randn(count, 576))
    table, lengths = cache.block_table("abc"), cache.cache_seqlens("abc")
    q = torch.randn(3, 1, 16, 576)
    options = {"softmax_scale": 192**-0.5}
    out, lse = openmla.decode_shared_prefix(
        q, cache.pages(), table[:1, :2].contiguous(), torch.tensor([2 * PAGE], dtype=torch.int32),
        table[:, 2:].contiguous(), lengths - 2 * PAGE, **options,
    )  # fmt: skip
    want, want_lse = openmla.decode(q, cache.pages(), table, lengths, **options)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)


def test_refusals_come_all_at_once() -> None:
    q, pool, tables, lengths, _ = case([16], [[4, 4]], 1, torch.float32)
    with pytest.raises(
        ProblemError,
        match=r"(?s)prefix_table must be \[2, max_pages\].*prefix_seqlens must be \[2\].*batch=2 rows.*max_requests",
    ):
        openmla.decode_shared_prefix(
            q,
            pool,
            tables[0],
            lengths[0],
            tables[1][:1],
            lengths[1],
            cu_requests=torch.tensor([0, 1, 2], dtype=torch.int32),
        )
