"""The oracle against goldens that share none of its code: 50-digit arithmetic, the non-absorbed form of MLA,
PyTorch's own attention, and a literal row-by-row reading of each operation's definition."""

from __future__ import annotations

import math
from typing import Any

import mpmath
import pytest
import torch

from openmla.reference import attention
from openmla.reference.quant import dequantise
from openmla.testing.cases import OPS, Case, draw

INF = math.inf


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-12) -> None:
    """Equal non-finite places; elsewhere within `tolerance` of the larger of 1 and the value."""
    assert got.shape == want.shape
    for test in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(test(got), test(want)), (got, want)
    finite = want.isfinite()
    error = (got.double() - want.double())[finite].abs() / want[finite].abs().clamp_min(1)
    assert error.numel() == 0 or error.max() <= tolerance, float(error.max())


# 1. Fifty digits.


@pytest.mark.parametrize("spread", [0.1, 1.0, 30.0, 1e6], ids=["flat", "unit", "peaky", "huge"])
@pytest.mark.parametrize("n", [1, 2, 7, 65])
def test_fifty_digits(n, spread):
    generator = torch.Generator().manual_seed(n)
    q = torch.randn(1, 3, 12, generator=generator, dtype=torch.float64) * spread
    k = torch.randn(n, 1, 12, generator=generator, dtype=torch.float64)
    offsets_q, offsets_k = torch.tensor([0, 1]), torch.tensor([0, n])
    got = attention.prefill(q, k, k[..., :8], offsets_q, offsets_k, softmax_scale=0.3)
    with mpmath.workdps(50):
        for head in range(3):
            scores = [mpmath.mpf(0.3) * mpmath.fdot(q[0, head].tolist(), k[j, 0].tolist()) for j in range(n)]
            top = max(scores)
            weights = [mpmath.exp(score - top) for score in scores]
            total = mpmath.fsum(weights)
            lse = top + mpmath.log(total)
            # An fp64 dot product of 12 terms is good to a few ulp of the sum of their sizes.
            reach = 0.3 * float((q[0, head].abs() * k[:, 0].abs()).sum(-1).max())
            assert abs(got.lse[head, 0].item() - float(lse)) <= 2.0**-50 * max(1.0, reach)
            for d in range(8):
                want = mpmath.fsum(w * k[j, 0, d].item() for j, w in enumerate(weights)) / total
                assert abs(got.out[0, head, d].item() - float(want)) <= 2.0**-48 * max(1.0, reach)


# 2. MLA as it is defined before absorption.


@pytest.mark.parametrize("chunk", range(4))
def test_absorbed_equals_non_absorbed(chunk):
    for seed in range(chunk * 50, chunk * 50 + 50):
        generator = torch.Generator().manual_seed(seed)

        def rand(*shape: int, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        heads, d_nope, d_rope, d_latent, d_head = 1 + seed % 5, 6, 4, 16, 5
        n, s_q, page = 1 + seed % 37, 1 + seed % 3, (1, 4, 16)[seed % 3]
        latent, k_rope = rand(n, d_latent), rand(n, d_rope)
        w_uk, w_uv = rand(heads, d_nope, d_latent), rand(heads, d_head, d_latent)
        q_nope, q_rope = rand(s_q, heads, d_nope), rand(s_q, heads, d_rope)
        scale = (d_nope + d_rope) ** -0.5

        # Keys and values of each head, expanded from the latent.
        k = torch.cat([torch.einsum("hdc,nc->hnd", w_uk, latent), k_rope.expand(heads, n, d_rope)], -1)
        v = torch.einsum("hdc,nc->hnd", w_uv, latent)
        q = torch.cat([q_nope, q_rope], -1).transpose(0, 1)
        mask = torch.ones(s_q, n, dtype=torch.bool).tril(n - s_q)
        scores = (scale * q @ k.mT).masked_fill(~mask, -INF)
        # Leading queries see nothing where s_q > n.
        want = torch.softmax(scores, -1).nan_to_num(0) @ v

        pages = -(-n // page)
        order = torch.randperm(pages, generator=generator)
        cache = torch.full((pages, page, 1, d_latent + d_rope), math.nan, dtype=torch.float64)
        for j in range(n):
            cache[order[j // page], j % page, 0] = torch.cat([latent[j], k_rope[j]])
        absorbed = torch.cat([torch.einsum("shd,hdc->shc", q_nope, w_uk), q_rope], -1)
        got = _decode64(absorbed[None], cache, order[None], torch.tensor([n]), scale, d_latent)
        out = torch.einsum("shc,hdc->shd", got.out[0], w_uv)
        close(out, want.transpose(0, 1), 1e-10)
        close(got.lse[0], torch.logsumexp(scores, -1))


def _decode64(q, cache, table, lengths, scale, d_v) -> attention.Attention:
    """`decode` on fp64 values: as two fp32 layouts cannot hold them, through the varlen form."""
    keys = torch.cat([cache[int(page)] for page in table[0]])[: int(lengths[0])]
    s_q = q.shape[1]
    return _batched(
        attention.prefill(
            q[0],
            keys,
            keys[..., :d_v],
            torch.tensor([0, s_q]),
            torch.tensor([0, keys.shape[0]]),
            softmax_scale=scale,
            is_causal=True,
        )
    )


def _batched(result: attention.Attention) -> attention.Attention:
    return attention.Attention(result.out[None], result.lse[None], result.max_logits[None], True)


# 3. PyTorch's own attention.


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("s_q", "s_k"), [(1, 70), (3, 70), (65, 65), (70, 9), (4, 0)])
def test_prefill_equals_scaled_dot_product_attention(s_q, s_k, is_causal):
    generator = torch.Generator().manual_seed(s_q * 100 + s_k)
    q = torch.randn(s_q, 6, 16, generator=generator, dtype=torch.float64)
    k = torch.randn(s_k, 2, 16, generator=generator, dtype=torch.float64)
    v = torch.randn(s_k, 2, 10, generator=generator, dtype=torch.float64)
    mask = torch.ones(s_q, s_k, dtype=torch.bool)
    mask = mask.tril(s_k - s_q) if is_causal else mask
    heads = [x.transpose(0, 1) for x in (q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1))]
    want = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask, scale=0.25).nan_to_num(0)
    offsets = torch.tensor([0, s_q]), torch.tensor([0, s_k])
    got = attention.prefill(q, k, v, *offsets, softmax_scale=0.25, is_causal=is_causal)
    close(got.out, want.transpose(0, 1))


# 4. Each operation by its definition, row by row.


def literal_row(
    q: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor], scale: float, sink: float | None, d_v: int
) -> tuple[torch.Tensor, float, float]:
    """(out, lse, max logit) of one query over the keys it sees, with nothing shared between rows."""
    if not keys:
        return torch.zeros(d_v, dtype=torch.float64), -INF, -INF
    scores = [scale * float(q.double() @ key.double()) for key in keys]
    top = max(scores, key=lambda s: INF if math.isnan(s) else s)
    if math.isnan(top):
        return torch.full((d_v,), math.nan, dtype=torch.float64), math.nan, math.nan
    weights = [math.exp(score - top) for score in scores]
    total = math.fsum(weights)
    out = torch.stack([w / total * value.double() for w, value in zip(weights, values, strict=True)]).sum(0)
    lse = top + math.log(total)
    if sink is not None:
        out = out * (0.0 if sink == INF else 1.0 if sink == -INF else 1 / (1 + math.exp(min(sink - lse, 700))))
    return out, lse, top


def literal_decode(x: dict[str, Any], case: Case) -> list[Any]:
    cache, table = x["kv_cache"], x["block_table"]
    values = dequantise(cache, x["layout"], torch.float64) if x["layout"] else cache.double()
    num_pages, size = cache.shape[:2]
    rows = []
    start = 0
    for request in range(table.shape[0]):
        s_q = case.seqlens_q[request]
        s_k = min(max(int(x["cache_seqlens"][request]), 0), table.shape[1] * size)
        for i in range(s_q):
            position = s_k - s_q + i
            seen = []
            for j in range(s_k):
                page = int(table[request, j // size])
                if not 0 <= page < num_pages:
                    continue
                if (x["is_causal"] or x["window"]) and j > position:
                    continue
                if x["window"] and j <= position - x["window"]:
                    continue
                seen.append(values[page, j % size])
            q = x["q"][start + i] if case.is_varlen else x["q"][request, i]
            rows.append((q, seen, seen))
        start += s_q
    return rows


def literal_sparse_decode(x: dict[str, Any], case: Case) -> list[Any]:
    lead = x["q"].shape[:-2]
    rows = []
    for token in range(math.prod(lead)):
        seen = []
        for prefix in ("", "extra_"):
            if f"{prefix}kv_cache" not in x:
                continue
            cache, layout = x[f"{prefix}kv_cache"], x[f"{prefix}layout"]
            flat = (dequantise(cache, layout, torch.float64) if layout else cache.double()).reshape(-1, 1, case.d_qk)
            lengths = x.get(f"{prefix}topk_length")
            indices = x[f"{prefix}indices"].reshape(math.prod(lead), -1)[token].tolist()
            if lengths is not None:
                own = lengths.numel() == math.prod(lead)
                length = int(lengths.reshape(-1)[token if own else token // lead[1]])
                indices = indices[: max(length, 0)]
            seen += [flat[index] for index in indices if 0 <= index < flat.shape[0]]
        rows.append((x["q"].reshape(-1, case.h_q, case.d_qk)[token], seen, seen))
    return rows


def literal_sparse_prefill(x: dict[str, Any], case: Case) -> list[Any]:
    rows = []
    for token in range(x["q"].shape[0]):
        end = case.topk if x["topk_length"] is None else max(int(x["topk_length"][token]), 0)
        chosen = [
            [
                x["kv"][index, head]
                for index in x["indices"][token, head, :end].tolist()
                if 0 <= index < x["kv"].shape[0]
            ]
            for head in range(case.h_kv)
        ]
        rows.append((x["q"][token], chosen, chosen))
    return rows


def literal_prefill(x: dict[str, Any], case: Case) -> list[Any]:
    rows = []
    q0 = k0 = 0
    for s_q, s_k in zip(case.seqlens_q, case.seqlens_k, strict=True):
        for i in range(s_q):
            seen = [j for j in range(s_k) if not x["is_causal"] or j <= s_k - s_q + i]
            rows.append((x["q"][q0 + i], [x["k"][k0 + j] for j in seen], [x["v"][k0 + j] for j in seen]))
        q0, k0 = q0 + s_q, k0 + s_k
    return rows


LITERAL = {
    "decode": literal_decode,
    "sparse_decode": literal_sparse_decode,
    "sparse_prefill": literal_sparse_prefill,
    "prefill": literal_prefill,
}


@pytest.mark.parametrize("chunk", range(3))
@pytest.mark.parametrize("op", OPS)
def test_literal_definition(op, chunk):
    checked = 0
    for seed in range(chunk * 1000, chunk * 1000 + 200):
        case = draw(seed, op)
        pairs = (
            sum(case.seqlens_q) * case.h_q * max([case.topk + case.extra_topk, *map(abs, case.seqlens_k)], default=0)
        )
        if pairs > 6000 or (case.d_qk > 200 and pairs > 1000):
            continue
        checked += 1
        operands = case.tensors()
        got = case.golden(operands)
        sinks = operands.get("attn_sink")
        rows = LITERAL[op](operands, case)
        out = got.out.reshape(-1, case.h_q, case.d_v)
        lse, top = (got.rows(t).reshape(-1, case.h_q) for t in (got.lse, got.max_logits))
        assert out.shape[0] == len(rows), case.repro
        for token, (q, keys, values) in enumerate(rows):
            for head in range(case.h_q):
                group = head // (case.h_q // case.h_kv)
                if op == "sparse_prefill":
                    mine, theirs = keys[group], [value[: case.d_v] for value in values[group]]
                else:
                    mine, theirs = [key[group] for key in keys], [value[group][: case.d_v] for value in values]
                sink = None if sinks is None else float(sinks[head])
                want = literal_row(q[head], mine, theirs, case.softmax_scale, sink, case.d_v)
                try:
                    close(out[token, head], want[0], 1e-9)
                    close(lse[token, head], torch.tensor(want[1], dtype=torch.float64), 1e-11)
                    close(top[token, head], torch.tensor(want[2], dtype=torch.float64), 1e-11)
                except AssertionError as error:
                    raise AssertionError(f"{case.repro} token {token} head {head}") from error
    assert checked >= 40, checked


def test_bounds_by_their_definition():
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        n, scale = 1 + seed * 3, 0.4
        q = torch.randn(1, 2, 10, generator=generator, dtype=torch.float64)
        k = torch.randn(n, 2, 10, generator=generator, dtype=torch.float64)
        got = attention.prefill(
            q, k, k[..., :6], torch.tensor([0, 1]), torch.tensor([0, n]), softmax_scale=scale, with_bounds=True
        )
        assert got.bounds is not None
        for head in range(2):
            s = scale * k[:, head] @ q[0, head]
            p, v = torch.softmax(s, 0), k[:, head, :6]
            close(got.bounds.A[0, head], (p[:, None] * v.abs()).sum(0))
            close(got.bounds.B[0, head], (p[:, None] ** 2 * v**2).sum(0))
            close(got.bounds.V1[0, head], v.abs().sum(0))
            close(got.bounds.V2[0, head], (v**2).sum(0))
            close(got.bounds.S[head, 0], scale * (q[0, head].abs() * k[:, head].abs()).sum(-1).max())
            close(got.bounds.L[head, 0], (s - s.max()).exp().sum())
            assert got.bounds.n[head, 0] == n


# 5. Numbers that are not finite.


def _one(keys: torch.Tensor, q: torch.Tensor | None = None, precision: Any = "fp64", **options: Any):
    q = torch.ones(1, 1, keys.shape[-1]) if q is None else q
    offsets = torch.tensor([0, q.shape[0]]), torch.tensor([0, keys.shape[0]])
    return attention.prefill(
        q, keys[:, None], keys[:, None], *offsets, softmax_scale=1.0, precision=precision, **options
    )


@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16", "fp16"])
def test_nan_reaches_exactly_the_rows_that_attend_to_it(precision):
    keys = torch.randn(70, 8, generator=torch.Generator().manual_seed(0))
    q = torch.randn(5, 1, 8, generator=torch.Generator().manual_seed(1))
    clean = _one(keys, q, precision, is_causal=True)
    for bad in (66, 67, 69):
        spoiled = keys.clone()
        spoiled[bad] = math.nan
        got = _one(spoiled, q, precision, is_causal=True)
        hit = torch.arange(5) + 65 >= bad
        assert torch.equal(got.out[:, 0].isnan(), hit[:, None].expand(5, 8))
        assert torch.equal(got.lse[0].isnan(), hit) and torch.equal(got.max_logits[0].isnan(), hit)
        assert torch.equal(got.out[~hit], clean.out[~hit]) and torch.equal(got.lse[:, ~hit], clean.lse[:, ~hit])


@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16", "fp16"])
def test_infinite_logits(precision):
    keys = torch.zeros(3, 4)
    keys[1, 3] = INF
    q = torch.zeros(1, 1, 4)
    q[..., 3] = 1
    got = _one(keys, q, precision)
    assert got.out.isnan().all() and got.lse.isnan().all() and (got.max_logits == INF).all()
    got = _one(keys, -q, precision)  # logit -inf: weight 0, its own column 0 * inf
    assert got.out[0, 0].isnan().tolist() == [False, False, False, True]
    assert abs(float(got.lse[0, 0]) - math.log(2)) < 1e-6
    keys[:, 3] = INF
    got = _one(keys[:, :], -q, precision)
    assert (got.lse == -INF).all() and not got.out[0, 0, :3].any()


@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16", "fp16"])
@pytest.mark.parametrize("size", [1e3, 1e6, 1e12])
def test_large_logits_stay_finite_and_weights_sum_to_one(precision, size):
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(130, 8, generator=generator)
    keys[:, 0] = 1.0
    scale = size if precision != "fp16" else min(size, 1e12)
    q = torch.randn(3, 1, 8, generator=generator)
    offsets = torch.tensor([0, 3]), torch.tensor([0, 130])
    got = attention.prefill(
        q, keys[:, None], keys[:, None], *offsets, softmax_scale=scale, precision=precision, num_splits=2
    )
    assert got.out.isfinite().all() and got.lse.isfinite().all()
    assert (got.out[..., 0].double() - 1).abs().max() <= 2.0**-7  # the mean of a column of ones


# 6. Shapes, dtypes, degenerate sizes.


@pytest.mark.parametrize(("precision", "dtype"), [("fp64", torch.float64), ("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])  # fmt: skip
def test_result_dtypes(precision, dtype):
    for op in OPS:
        case = draw(3, op)
        got = case.reference(precision)
        assert got.out.dtype == dtype and got.lse.dtype == (torch.float64 if precision == "fp64" else torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_emulation_rounds_weights_and_output_and_nothing_else(dtype):
    # Logits 0 and ln(1/3): the weight 1/3 is not representable, the sum 4/3 keeps the unrounded one.
    q, keys = torch.zeros(1, 1, 2), torch.zeros(2, 1, 2)
    q[..., 0] = 1.0
    keys[1, 0, 0] = -1.0
    keys[0, 0, 1], keys[1, 0, 1] = 0.0, 1.0
    offsets = torch.tensor([0, 1]), torch.tensor([0, 2])
    got = attention.prefill(q, keys, keys, *offsets, softmax_scale=math.log(3), precision={torch.bfloat16: "bf16"}.get(dtype, "fp16"))  # fmt: skip
    weight = torch.exp(torch.tensor(-math.log(3)))
    want = weight.to(dtype).float() / (1 + weight)
    assert weight.to(dtype).float() != weight
    assert got.out[0, 0, 1] == want.to(dtype)
    _, lse, _ = attention.online_softmax(
        q.transpose(0, 1),
        keys.transpose(0, 1),
        keys.transpose(0, 1),
        torch.ones(1, 1, 2, dtype=torch.bool),
        math.log(3),
        dtype,
    )
    assert abs(float(lse) - math.log(4 / 3)) <= 2.0**-22
    wide, _, _ = attention.online_softmax(
        q.transpose(0, 1),
        keys.transpose(0, 1),
        keys.transpose(0, 1),
        torch.ones(1, 1, 2, dtype=torch.bool),
        math.log(3),
        dtype,
    )
    assert wide[0, 0, 1] == want  # fp32 until the very end


def test_more_splits_than_blocks_and_the_same_bits_each_time():
    case = next(case for case in (draw(seed, "decode") for seed in range(99)) if max(case.seqlens_k, default=0) > 64)
    operands = case.tensors()
    first, second = (case.reference("bf16", operands, num_splits=9) for _ in range(2))
    assert torch.equal(first.out.nan_to_num(9), second.out.nan_to_num(9)) and torch.equal(first.lse, second.lse)


def test_offsets_that_do_not_rise_are_clamped():
    q = torch.randn(6, 2, 8, generator=torch.Generator().manual_seed(0))
    cache = torch.randn(4, 4, 1, 8, generator=torch.Generator().manual_seed(1))
    table, lengths = torch.tensor([[0, 1], [2, 3], [1, 2]], dtype=torch.int32), torch.tensor([5, 7, 8])
    run = lambda offsets: attention.decode(  # noqa: E731
        q, cache, table, lengths, softmax_scale=0.3, d_v=8, cu_seqlens_q=torch.tensor(offsets, dtype=torch.int32)
    )
    got, same = run([1, 4, 2, 99]), run([1, 4, 4, 6])
    assert torch.equal(got.out, same.out) and torch.equal(got.lse, same.lse)
    assert not got.out[0].any() and (got.lse[:, 0] == -INF).all()  # the row that belongs to nobody
    assert got.out[1:].all()


def test_empty_cache_and_no_tokens():
    q = torch.randn(2, 0, 3, 16)
    cache = torch.zeros(1, 4, 1, 16)
    got = attention.decode(
        q, cache, torch.zeros(2, 0, dtype=torch.int32), torch.tensor([3, 0]), softmax_scale=1.0, d_v=8
    )
    assert got.out.shape == (2, 0, 3, 8) and got.lse.shape == (2, 3, 0)
    got = attention.sparse_prefill(
        q[0, :0], torch.zeros(0, 1, 16), torch.zeros(0, 1, 5, dtype=torch.int32), softmax_scale=1.0, d_v=8
    )
    assert got.out.shape == (0, 3, 8)
