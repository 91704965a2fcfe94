"""Relations between two calls that hold whatever the right answer is (MET-01 to MET-19 of the test plan).

Each runs on every entry of ENGINES: the emulated kernel of the oracle, and the public operations. Another backend
joins with one more entry: a function (op, operands) -> (out, lse, max_logits) in the dtype of q.
`==` means bit for bit; elsewhere both calls are judged by the tolerance rule. MET-18 (absorbed = non-absorbed) is in
test_reference.py, MET-20 (laws of the merge) in test_combine.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import openmla
from openmla.reference import attention
from openmla.split.combine import merge
from openmla.testing import budget
from openmla.testing.cases import native_arguments

Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
Engine = Callable[[str, dict[str, Any]], Result]
PRECISION = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
SEEDS = (0, 20)  # chunk and cases of `seeds_of`
INF = math.inf


def emulated(op: str, operands: dict[str, Any]) -> Result:
    got = getattr(attention, op)(**operands, precision=PRECISION[operands["q"].dtype], num_splits=2)
    return got.out, got.lse, got.max_logits


def public(op: str, operands: dict[str, Any]) -> Result:
    options = {"policy": "batch_invariant"} if op == "decode" else {}
    got = getattr(openmla, op)(**native_arguments(op, operands), **options)
    return (got[0], got[2], got[1]) if op == "sparse_prefill" else (got[0], got[1], None)


ENGINES: dict[str, Engine] = {"emulated": emulated, "public": public}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(params=ENGINES)
def run(request) -> Engine:
    return ENGINES[request.param]


@pytest.fixture(params=DTYPES)
def dtype(request) -> torch.dtype:
    return DTYPES[request.param]


class Setup:
    """Logical keys of a few requests, paged in a random order; MLA sizes every fourth seed, small ones else."""

    def __init__(self, seed: int, dtype: torch.dtype, page_size: int | None = None) -> None:
        self.seed, self.dtype = seed, dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.d_qk, self.d_v = ((576, 512), (24, 16), (72, 64), (40, 32))[seed % 4]
        self.scale = self.d_qk**-0.5
        self.h_q = (4, 1, 9, 16)[seed // 4 % 4]
        self.s_q = 1 + seed % 3
        self.page_size = page_size or (1, 16, 64, 53)[seed // 2 % 4]
        lengths = [(3, 65, 130, 200)[(seed + i) % 4] for i in range(1 + seed % 3)]
        self.keys = [self.rand(n, 1, self.d_qk) for n in lengths]
        self.q = self.rand(len(lengths), self.s_q, self.h_q, self.d_qk)

    def rand(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.dtype)

    def paged(self, page_size: int | None = None, seed: int = 0, garbage: int = -1) -> dict[str, Any]:
        """cache, block_table, cache_seqlens of the keys; pages placed by `seed`, unused table entries `garbage`."""
        size = page_size or self.page_size
        used = [-(-keys.shape[0] // size) for keys in self.keys]
        order = torch.randperm(sum(used) + 2, generator=torch.Generator().manual_seed(seed)).tolist()
        cache = torch.full((len(order), size, 1, self.d_qk), math.nan, dtype=self.dtype)
        table = torch.full((len(self.keys), max(used) + 1), garbage, dtype=torch.int32)
        for request, keys in enumerate(self.keys):
            for column, rows in enumerate(keys.split(size)):
                page = order.pop()
                cache[page, : rows.shape[0]] = rows
                table[request, column] = page
        lengths = torch.tensor([keys.shape[0] for keys in self.keys], dtype=torch.int32)
        return {"kv_cache": cache, "block_table": table, "cache_seqlens": lengths}

    def decode(self, is_causal: bool = False, window: int = 0, **changes: Any) -> dict[str, Any]:
        return {
            "q": self.q,
            **self.paged(),
            "softmax_scale": self.scale,
            "d_v": self.d_v,
            "is_causal": is_causal,
            "window": window,
            "attn_sink": None,
            **changes,
        }

    def sparse(self, topk: int = 70, **changes: Any) -> dict[str, Any]:
        """A sparse decode over the tokens of all requests."""
        pool = torch.cat(self.keys).reshape(-1, 1, 1, self.d_qk)
        lead = self.q.shape[:2]
        indices = torch.randint(pool.shape[0], (*lead, topk), generator=self.generator, dtype=torch.int32)
        return {
            "q": self.q,
            "kv_cache": pool,
            "indices": indices,
            "softmax_scale": self.scale,
            "d_v": self.d_v,
            **changes,
        }


def judged(run: Engine, op: str, operands: dict[str, Any], golden: attention.Attention | None = None) -> Result:
    """Run, judge by the rule against `golden` (default: the oracle on the same operands), return the result."""
    got = run(op, operands)
    want = golden or getattr(attention, op)(**operands, with_bounds=True)
    budget.check(got[0], got[1], want, dtype=operands["q"].dtype, max_logits=got[2]).require(op)
    return got


def oracle(op: str, operands: dict[str, Any]) -> attention.Attention:
    result: attention.Attention = getattr(attention, op)(**operands, with_bounds=True)
    return result


def same(a: Result, b: Result) -> None:
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def lse_slack(golden: attention.Attention) -> torch.Tensor:
    assert golden.bounds is not None
    return 24 * 2.0**-24 * golden.bounds.S + 2.0**-22 * golden.lse.abs() + 2.0**-19


def test_met_01_zero_query_gives_the_mean(run, dtype, seeds_of):
    for seed in seeds_of(*SEEDS):
        x = Setup(seed, dtype)
        x.q.zero_()
        out, lse, _ = judged(run, "decode", x.decode())
        for request, keys in enumerate(x.keys):
            n = keys.shape[0]
            assert (lse[request] - math.log(n)).abs().max() <= 2.0**-20 + 2.0**-22 * math.log(n)
            mean = keys[:, 0, : x.d_v].double().mean(0)
            unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11  # all weights are 1: only the output is rounded
            assert ((out[request].double() - mean).abs() <= 1.01 * unit * mean.abs() + 2.0**-18).all()


def test_met_02_needle_returns_its_value(run, dtype, seeds_of):
    for seed in seeds_of(*SEEDS):
        x = Setup(4 * seed, dtype)  # 576 columns: needles stand clear of each other
        for request, keys in enumerate(x.keys):
            needle = (torch.arange(x.s_q * x.h_q) * 7 + seed) % keys.shape[0]
            aim = keys[needle, 0].double()
            aim = aim * (300 / x.scale) / aim.square().sum(-1, keepdim=True)
            x.q[request] = aim.reshape(x.s_q, x.h_q, -1).to(dtype)
            x.q[request].nan_to_num_(0)
        out, _, _ = judged(run, "decode", x.decode())
        for request, keys in enumerate(x.keys):
            needle = (torch.arange(x.s_q * x.h_q) * 7 + seed) % keys.shape[0]
            value = keys[needle, 0, : x.d_v].float().reshape(x.s_q, x.h_q, -1)
            ulp = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-10
            assert ((out[request].float() - value).abs() <= ulp * value.abs()).all()


def test_met_03_constant_value_stays(run, dtype, seeds_of):
    for seed in seeds_of(*SEEDS):
        x = Setup(seed, dtype)
        for keys in x.keys:
            keys[:] = keys[0]
        out, _, _ = run("decode", x.decode())
        for request, keys in enumerate(x.keys):
            assert torch.equal(out[request], keys[0, 0, : x.d_v].expand_as(out[request]))  # ==
        for keys in x.keys:  # whatever the logits
            keys[..., x.d_v :] = x.rand(*keys[..., x.d_v :].shape)
        judged(run, "decode", x.decode())


@pytest.mark.parametrize("power", [-2, 3])
def test_met_04_scaling_keys_against_queries(run, dtype, power, seeds_of):
    for seed in seeds_of(*SEEDS):
        x = Setup(seed, dtype)
        for t in (x.q, *x.keys):
            t.masked_fill_(t.abs() < 2.0**-6, 0)  # away from fp16's subnormals, where halving rounds
        first = run("decode", x.decode())
        x.q = x.q * 2.0**-power
        x.keys = [keys * 2.0**power for keys in x.keys]
        out, lse, _ = run("decode", x.decode())
        assert torch.equal(lse, first[1])  # ==
        big = first[0].abs() > 2.0**-9
        assert torch.equal(out[big], (first[0] * 2.0**power)[big])


def test_met_05_duplicated_keys(run, dtype, seeds_of):
    for seed in seeds_of(*SEEDS):
        x = Setup(seed, dtype)
        golden = oracle("decode", x.decode())
        x.keys = [torch.cat([keys, keys]) for keys in x.keys]
        out, lse, _ = run("decode", x.decode())
        twice = oracle("decode", x.decode())
        assert ((twice.lse - golden.lse - math.log(2)).abs() <= 1e-12).all()
        assert ((lse - golden.lse - math.log(2)).abs() <= lse_slack(golden)).all()
        budget.check(out, lse, twice, dtype=dtype).require()


def test_met_06_pages_renamed_moved_and_garbage_behind_the_length(run, dtype, seeds_of):
    for seed in seeds_of(*SEEDS):
        x = Setup(seed, dtype)
        first = judged(run, "decode", x.decode())
        for moved in (1, 2):
            same(first, run("decode", x.decode(**x.paged(seed=moved))))  # ==
        for garbage in (0, 2**31 - 1, -(2**31)):
            same(first, run("decode", x.decode(**x.paged(garbage=garbage))))  # ==


def test_met_07_permuted_heads_and_requests(run, dtype, seeds_of):
    for seed in seeds_of(*SEEDS):
        x = Setup(seed, dtype)
        golden, first = oracle("decode", x.decode()), run("decode", x.decode())
        order = torch.randperm(x.h_q, generator=x.generator)
        out, lse, _ = judged(run, "decode", x.decode(q=x.q[:, :, order]))
        back = order.argsort()
        budget.check(out[:, :, back], lse[:, back], golden, dtype=dtype).require("heads")
        operands = x.decode()
        turn = list(reversed(range(len(x.keys))))
        turned = {name: operands[name][turn] for name in ("q", "block_table", "cache_seqlens")}
        got = run("decode", {**operands, **turned})
        same((got[0][turn], got[1][turn], None), first)  # ==


def test_met_07_a_batch_is_its_requests(run, dtype, seeds_of):
    for seed in seeds_of(*SEEDS):
        x = Setup(seed, dtype)
        operands = x.decode(is_causal=True)
        whole = judged(run, "decode", operands)
        for request in range(len(x.keys)):
            alone = {name: operands[name][request : request + 1] for name in ("q", "block_table", "cache_seqlens")}
            out, lse, _ = run("decode", {**operands, **alone})
            same((out, lse, None), (whole[0][request : request + 1], whole[1][request : request + 1], None))  # ==


def test_met_08_page_sizes(run, dtype, seeds_of):
    for seed in seeds_of(*SEEDS):
        x = Setup(seed, dtype)
        first = judged(run, "decode", x.decode(**x.paged(64)))
        for size in (1, 16, 32, 53, 128):
            same(first, run("decode", x.decode(**x.paged(size))))  # ==: tiles follow tokens, not pages


def test_met_09_permuted_tokens(run, dtype, seeds_of):
    for seed in seeds_of(*SEEDS):
        x = Setup(seed, dtype)
        golden = oracle("decode", x.decode())
        x.keys = [keys[torch.randperm(keys.shape[0], generator=x.generator)] for keys in x.keys]
        judged(run, "decode", x.decode(), golden)


def test_met_10_a_constant_in_rope_shifts_lse_alone(run, dtype, seeds_of):
    for seed in seeds_of(*SEEDS):
        x = Setup(seed, dtype)
        x.q[..., -1] = 2.0
        for keys in x.keys:
            keys[..., -1] = 0
        golden = oracle("decode", x.decode())
        for keys in x.keys:
            keys[..., -1] = 1.5
        shifted = oracle("decode", x.decode())
        assert ((shifted.lse - golden.lse - 3 * x.scale).abs() <= 1e-12).all()
        assert ((shifted.out - golden.out).abs() <= 1e-12).all()
        judged(run, "decode", x.decode(), shifted)


def test_met_11_any_number_of_splits(dtype, seeds_of):
    for seed in seeds_of(*SEEDS):
        x = Setup(seed, dtype)
        golden = oracle("decode", x.decode())
        for num_splits in (1, 2, 3, 5, 9):
            results = [
                attention.decode(**x.decode(), precision=PRECISION[dtype], num_splits=num_splits) for _ in range(2)
            ]
            budget.check(results[0].out, results[0].lse, golden, dtype=dtype).require(f"num_splits={num_splits}")
            assert torch.equal(results[0].out, results[1].out) and torch.equal(results[0].lse, results[1].lse)  # ==


def test_met_11_any_policy_and_plan(dtype, seeds_of):
    for seed in seeds_of(*SEEDS):
        x = Setup(seed, dtype)
        operands = native_arguments("decode", x.decode())
        golden = oracle("decode", x.decode())
        for policy in ("balanced", "batch_invariant"):
            arguments = {name: value for name, value in operands.items() if name != "softmax_scale"}
            plan = openmla.plan(**arguments, policy=policy)
            planned, auto = openmla.decode(**operands, plan=plan), openmla.decode(**operands, policy=policy)
            budget.check(*planned, golden, dtype=dtype).require(policy)
            assert torch.equal(planned[0], auto[0]) and torch.equal(planned[1], auto[1])  # ==


def test_met_12_causal_rows_are_shorter_requests(run, dtype, seeds_of):
    for seed in seeds_of(*SEEDS):
        x = Setup(seed, dtype)
        x.keys = [keys[:65] if keys.shape[0] > 3 else torch.cat([keys] * 2) for keys in x.keys]
        out, lse, _ = judged(run, "decode", x.decode(is_causal=True))
        for i in range(x.s_q):
            one = x.decode(is_causal=True, q=x.q[:, i : i + 1])
            one["cache_seqlens"] = one["cache_seqlens"] - (x.s_q - 1 - i)
            golden = oracle("decode", one)
            budget.check(out[:, i : i + 1], lse[:, :, i : i + 1], golden, dtype=dtype).require(f"row {i}")


def test_met_12_a_window_is_a_later_first_key(run, dtype, seeds_of):
    for seed in seeds_of(*SEEDS):
        x = Setup(seed, dtype)
        for window in (1, 5, 64, 1000):
            got = judged(run, "decode", x.decode(window=window, q=x.q[:, :1]))
            cut = Setup(seed, dtype)
            cut.keys = [keys[-window:] for keys in x.keys]
            golden = oracle("decode", cut.decode(q=x.q[:, :1]))
            budget.check(got[0], got[1], golden, dtype=dtype).require(f"window={window}")


def test_met_13_sparse_over_everything_is_dense(run, dtype, seeds_of):
    for seed in seeds_of(*SEEDS):
        x = Setup(seed, dtype)
        x.keys, x.q = x.keys[:1], x.q[:1]
        golden = oracle("decode", x.decode())
        n = x.keys[0].shape[0]
        everything = torch.arange(n, dtype=torch.int32).expand(1, x.s_q, n)
        judged(run, "sparse_decode", x.sparse(indices=everything), golden)
        rows = {"q": x.q[0], "kv": x.keys[0], "indices": everything[0, :, None]}
        out, lse, _ = run("sparse_prefill", {**rows, "softmax_scale": x.scale, "d_v": x.d_v})
        budget.check(out[None], lse.T[None].contiguous(), golden, dtype=dtype).require("sparse_prefill")


def test_met_13_prefill_is_decode(run, dtype, seeds_of):
    for seed in seeds_of(*SEEDS):
        x = Setup(seed, dtype)
        golden = oracle("decode", x.decode(is_causal=True))
        k = torch.cat(x.keys)
        lengths = torch.tensor([0] + [keys.shape[0] for keys in x.keys]).cumsum(0).to(torch.int32)
        out, lse, _ = run(
            "prefill",
            {
                "q": x.q.flatten(0, 1),
                "k": k,
                "v": k[..., : x.d_v],
                "cu_seqlens_q": (torch.arange(len(x.keys) + 1) * x.s_q).to(torch.int32),
                "cu_seqlens_k": lengths,
                "softmax_scale": x.scale,
                "is_causal": True,
            },
        )
        lse = lse.reshape(x.h_q, len(x.keys), x.s_q).transpose(0, 1)
        budget.check(out.reshape(golden.out.shape), lse, golden, dtype=dtype).require("prefill")


def test_met_14_order_of_indices_and_places_of_nothing(run, dtype, seeds_of):
    for seed in seeds_of(*SEEDS):
        x = Setup(seed, dtype)
        operands = x.sparse()
        golden = oracle("sparse_decode", operands)
        indices = operands["indices"]
        spread = torch.cat([indices, torch.full_like(indices[..., :30], -1)], -1)
        spread = spread[..., torch.randperm(100, generator=x.generator)]
        judged(run, "sparse_decode", {**operands, "indices": spread}, golden)
        holes = indices.clone()
        holes[..., ::3] = -1
        with_minus_one = judged(run, "sparse_decode", {**operands, "indices": holes})
        for nothing in (-(2**31), 2**31 - 1, operands["kv_cache"].shape[0]):
            holes[..., ::3] = nothing
            same(with_minus_one, run("sparse_decode", {**operands, "indices": holes}))  # ==


def test_met_15_sinks(run, dtype, seeds_of):
    for seed in seeds_of(*SEEDS):
        x = Setup(seed, dtype)
        plain = run("decode", x.decode())
        same(plain, run("decode", x.decode(attn_sink=torch.full((x.h_q,), -INF))))  # ==
        out, lse, _ = run("decode", x.decode(attn_sink=torch.full((x.h_q,), INF)))
        assert not out.any() and torch.equal(lse, plain[1])
        sink = torch.randn(x.h_q, generator=x.generator) * 3
        out, lse, _ = judged(run, "decode", x.decode(attn_sink=sink))
        assert torch.equal(lse, plain[1])  # ==
        sparse = x.sparse()
        same(run("sparse_decode", sparse), run("sparse_decode", {**sparse, "attn_sink": torch.full((x.h_q,), -INF)}))


def test_met_16_topk_length_is_a_cut(run, dtype, seeds_of):
    for seed in seeds_of(*SEEDS):
        x = Setup(seed, dtype)
        operands = x.sparse()
        lengths = torch.randint(71, x.q.shape[:2], generator=x.generator, dtype=torch.int32)
        beyond = torch.arange(70) >= lengths[..., None]
        cut = operands["indices"].masked_fill(beyond, -1)
        same(
            run("sparse_decode", {**operands, "topk_length": lengths}),
            run("sparse_decode", {**operands, "indices": cut}),
        )  # ==
        per_request = lengths[:, 0].contiguous()
        same(
            run("sparse_decode", {**operands, "topk_length": per_request}),
            run("sparse_decode", {**operands, "topk_length": per_request[:, None].repeat(1, x.s_q)}),
        )  # ==


def test_met_17_two_caches_are_one(run, dtype, seeds_of):
    for seed in seeds_of(*SEEDS):
        x = Setup(seed, dtype)
        operands = x.sparse()
        golden = oracle("sparse_decode", operands)
        for at in (0, 1, 35, 64, 69):
            split = {
                "indices": operands["indices"][..., :at].contiguous(),
                "extra_kv_cache": operands["kv_cache"].clone(),
                "extra_indices": operands["indices"][..., at:].contiguous(),
            }
            judged(run, "sparse_decode", {**operands, **split}, golden)


@pytest.mark.parametrize("interleaved", [False, True], ids=["stretches", "in_turn"])
def test_met_19_context_parallel(run, interleaved, seeds_of):
    """Ranks keep fp32 partials, so this runs in fp32; with more ranks than keys some ranks are empty."""
    for seed in seeds_of(*SEEDS):
        x = Setup(seed, torch.float32)
        golden = oracle("decode", x.decode())
        whole = x.keys
        for ranks in (1, 2, 3, 8):
            outs, lses = [], []
            for rank in range(ranks):
                x.keys = [
                    keys[rank::ranks]
                    if interleaved
                    else keys[rank * keys.shape[0] // ranks : (rank + 1) * keys.shape[0] // ranks]
                    for keys in whole
                ]
                out, lse, _ = run("decode", x.decode())
                outs.append(out)
                lses.append(lse.transpose(1, 2))
            out, lse = merge(torch.stack(outs), torch.stack(lses))
            budget.check(out, lse.transpose(1, 2), golden, dtype=torch.float32).require(f"ranks={ranks}")


# Not relations but extremes, which every engine owes as well.


@pytest.mark.parametrize("size", [2.0**10, 2.0**14], ids=["2^10", "2^14"])
def test_large_logits_stay_within_the_rule(run, dtype, size, seeds_of):
    for seed in seeds_of(*SEEDS):
        x = Setup(seed, dtype)
        judged(run, "decode", x.decode(softmax_scale=size / x.d_qk))


@pytest.mark.parametrize("size", [1e6, 1e9, 1e12])
def test_huge_logits_stay_finite_and_weights_sum_to_one(run, dtype, size, seeds_of):
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    for seed in seeds_of(*SEEDS):
        x = Setup(seed, dtype)
        for keys in x.keys:
            keys[..., 0] = 1.0
        out, lse, _ = run("decode", x.decode(softmax_scale=size))
        assert out.isfinite().all() and lse.isfinite().all()
        # The mean of ones: weights and output are rounded once each.
        assert ((out[..., 0].double() - 1).abs() <= 2.1 * unit).all()


def test_nan_reaches_exactly_the_rows_that_attend_to_it(run, dtype, seeds_of):
    for seed in seeds_of(*SEEDS):
        x = Setup(seed, dtype)
        x.q = x.rand(len(x.keys), 5, x.h_q, x.d_qk)
        clean = run("decode", x.decode(is_causal=True))
        n = x.keys[0].shape[0]
        bad = n - 1 - seed % 3
        x.keys[0][bad] = math.nan
        out, lse, _ = run("decode", x.decode(is_causal=True))
        hit = torch.zeros(out.shape[:2], dtype=torch.bool)
        hit[0] = n - 5 + torch.arange(5) >= bad
        assert hit.any() and out[hit].isnan().all() and lse.transpose(1, 2)[hit].isnan().all()
        assert torch.equal(out[~hit], clean[0][~hit])  # ==
        assert torch.equal(lse.transpose(1, 2)[~hit], clean[1].transpose(1, 2)[~hit])
