"""The PyTorch backend: against the oracle, over threads, batch mates, hostile values, and in bounded memory."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from openmla.backends.base import DecodeOperands, PrefillOperands
from openmla.backends.torch import (
    DECODE,
    KERNELS,
    PREFILL,
    anywhere,
    attend,
    kernels,
    products,
    reading,
    tiled,
    workers,
)
from openmla.core.faults import Fault
from openmla.core.layout import BYTE_LAYOUT_NAMES, kv_layout
from openmla.core.problem import DecodeProblem, PrefillProblem
from openmla.core.target import Target
from openmla.reference import attention, quant
from openmla.testing import cases
from openmla.testing.budget import check

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def make_decode(lengths, *, h_q=16, s_q=1, page_size=64, dtype=torch.bfloat16, layout=None, seed=0, h_kv=1, **options):
    """(problem, operands, oracle arguments) of a decode whose pages are shuffled and whose spare rows are NaN."""
    make = torch.Generator().manual_seed(seed)
    d_qk = 512 if layout in ("fp8_584", "fp8_528", "fp8_528_mx", "fp4_288") else 576
    batch, max_pages = len(lengths), max(-(-max(length, 1) // page_size) for length in lengths) + 1
    num_pages = batch * max_pages
    table = torch.randperm(num_pages, generator=make).view(batch, max_pages).to(torch.int32)
    latent = torch.full((num_pages, page_size, h_kv, d_qk), torch.nan)
    for request, length in enumerate(lengths):
        for page in range(-(-length // page_size)):
            rows = min(page_size, length - page * page_size)
            latent[table[request, page], :rows] = torch.randn(rows, h_kv, d_qk, generator=make)
    plain = latent.to(dtype)
    cache = plain if layout is None else quant.quantise(latent, layout)
    q = torch.randn(batch, s_q, h_q, d_qk, generator=make).to(dtype)
    sink = torch.randn(h_q, generator=make) if options.pop("sink", False) else None
    seqlens = torch.tensor(lengths, dtype=torch.int32)
    problem = DecodeProblem.from_tensors(q, cache, table, seqlens, layout=layout, attn_sink=sink, **options)
    operands = DecodeOperands(
        q, cache, table, seqlens, d_qk**-0.5, torch.full((batch, s_q, h_q, 512), torch.nan, dtype=dtype),
        torch.full((batch, h_q, s_q), torch.nan), torch.zeros(1, dtype=torch.int32), None, sink,
    )  # fmt: skip
    return problem, operands


def run(problem, operands):
    operands.out.fill_(torch.nan)
    operands.lse.fill_(torch.nan)
    DECODE.launch(None, problem, operands, None)
    return operands.out.clone(), operands.lse.clone()


def oracle(problem, operands):
    return attention.decode(
        operands.q, operands.kv_cache, operands.block_table, operands.cache_seqlens, d_v=problem.d_v,
        softmax_scale=operands.softmax_scale, layout=problem.layout, is_causal=problem.is_causal, window=problem.window,
        attn_sink=operands.attn_sink, with_bounds=True,
    )  # fmt: skip


def require(problem, operands):
    out, lse = run(problem, operands)
    check(out, lse, oracle(problem, operands), dtype=problem.dtype).require(str(problem))


@pytest.fixture(params=["microkernel", "portable"])
def arithmetic(request, monkeypatch):
    """Both ways to multiply; the second is what other machines and other PyTorch versions use."""
    if request.param == "portable":
        monkeypatch.setattr(products, "microkernels", lambda: None)
    elif products.microkernels() is None:
        pytest.skip("this machine or this PyTorch has no microkernel that was tried")
    return request.param


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_kernels_are_named_and_always_willing():
    assert [kernel.op for kernel in KERNELS] == ["decode", "sparse_decode", "sparse_prefill", "prefill", "append"]
    assert len({kernel.name for kernel in KERNELS}) == 5
    problem, _ = make_decode([3])
    for name in ("cpu", "h100_sxm"):
        assert DECODE.supports(problem, Target.preset(name))


@pytest.mark.parametrize("lengths", [[4500], [2048, 2049, 1, 0, 513], [70, 5000, 64]])
@pytest.mark.parametrize("h_q", [1, 16, 40, 128])
def test_long_requests_match_the_oracle(lengths, h_q, arithmetic, threads):
    require(*make_decode(lengths, h_q=h_q))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{"is_causal": True, "s_q": 3}, {"window": 700, "s_q": 2}, {"sink": True}])
def test_masks_and_sinks_match_the_oracle(dtype, options):
    require(*make_decode([2500, 1, 2, 900], dtype=dtype, **options))


@pytest.mark.parametrize("layout", BYTE_LAYOUT_NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_byte_layouts_match_the_oracle(layout, dtype):
    require(*make_decode([2200, 65], layout=layout, dtype=dtype))


@pytest.mark.parametrize("page_size", [1, 7, 16, 100, 4096])
def test_page_sizes_match_the_oracle(page_size):
    require(*make_decode([2300, 640, 3], page_size=page_size))


@pytest.mark.parametrize("layout", BYTE_LAYOUT_NAMES)
@pytest.mark.parametrize("page_size", [64, 3])
def test_every_byte_reads_as_the_oracle_reads_it(layout, page_size):
    layout = kv_layout(layout)
    cache = layout.empty_cache(9, page_size)
    make = torch.Generator().manual_seed(2)
    cache.copy_(torch.randint(0, 256, cache.shape, generator=make, dtype=torch.uint8))
    slots = torch.randperm(9 * page_size, generator=make)
    expected = quant.read_rows(cache, layout, slots)
    for dtype in (torch.bfloat16, torch.float32):
        arithmetic = products.Arithmetic(products.PortableProducts, dtype, 1, 512)
        reader = reading.CacheReader(cache, layout, 0, 512, arithmetic)
        by_slot = reader.slots(slots, None, workers.Scratch()).k
        order = torch.randperm(9, generator=make).to(torch.int32)
        by_page, _ = reader.pages(order, 0, 9 * page_size, workers.Scratch())
        wanted = (order.long()[:, None] * page_size + torch.arange(page_size)).flatten()
        torch.testing.assert_close(by_slot, expected.to(dtype), rtol=0, atol=0, equal_nan=True)
        expected_pages = quant.read_rows(cache, layout, wanted).to(dtype)
        torch.testing.assert_close(by_page.k, expected_pages, rtol=0, atol=0, equal_nan=True)


def test_more_rows_than_a_task_holds():
    require(*make_decode([1500], h_q=128, s_q=5, is_causal=True))


@pytest.mark.parametrize("h_kv", [2, 4])
def test_grouped_heads_read_their_own_keys(h_kv):
    require(*make_decode([1300, 20], h_q=8, h_kv=h_kv))


@pytest.mark.parametrize("pad", [0, 64])
def test_strided_and_offset_caches(pad):
    problem, operands = make_decode([1000, 130])
    pool = torch.full((operands.kv_cache.shape[0], 64 + 3, 1, 576 + pad), torch.nan, dtype=torch.bfloat16)
    pool[:, 2:66, :, pad:] = operands.kv_cache
    strided = operands._replace(kv_cache=pool[:, 2:66, :, pad:])
    assert all(torch.equal(a, b) for a, b in zip(run(problem, operands), run(problem, strided), strict=True))


def test_consecutive_pages_give_the_bits_of_shuffled_ones():
    problem, operands = make_decode([3000, 3000])
    order = operands.block_table.flatten().long()
    sorted_cache = operands.kv_cache[order].contiguous()
    straight = torch.arange(order.numel(), dtype=torch.int32).view_as(operands.block_table)
    moved = operands._replace(kv_cache=sorted_cache, block_table=straight)
    assert all(torch.equal(a, b) for a, b in zip(run(problem, operands), run(problem, moved), strict=True))


@pytest.mark.parametrize("lengths", [[9000], [5000, 100, 3000, 0, 1]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_a_bit(lengths, dtype, arithmetic):
    problem, operands = make_decode(lengths, dtype=dtype)
    before, results = torch.get_num_threads(), []
    for width in (1, 2, 3, 5):
        torch.set_num_threads(width)
        results += [run(problem, operands) for _ in range(2)]
    torch.set_num_threads(before)
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_mates_do_not_change_a_bit(dtype, arithmetic):
    lengths = [4100, 3, 777, 0, 2048]
    problem, operands = make_decode(lengths, dtype=dtype, s_q=2, is_causal=True)
    out, lse = run(problem, operands)
    for i in range(len(lengths)):
        mine = slice(i, i + 1)
        alone = operands._replace(
            q=operands.q[mine], block_table=operands.block_table[mine], cache_seqlens=operands.cache_seqlens[mine],
            out=operands.out[mine].clone(), lse=operands.lse[mine].clone(),
        )  # fmt: skip
        single = DecodeProblem.from_tensors(
            alone.q, alone.kv_cache, alone.block_table, alone.cache_seqlens, is_causal=True
        )
        found_out, found_lse = run(single, alone)
        assert torch.equal(found_out, out[mine])
        assert torch.equal(found_lse, lse[mine])


def test_bad_pages_and_lengths_are_masked_and_reported():
    problem, operands = make_decode([3000, 200, 64])
    expected = run(problem, operands)
    operands.block_table[0, 40] = 2**31 - 1
    operands.block_table[1, 3] = -5
    operands.cache_seqlens[2] = -7
    require(problem, operands)
    assert int(operands.fault_word) == Fault.PAGE_OUT_OF_RANGE | Fault.LENGTH_NEGATIVE
    assert torch.equal(operands.out[2], torch.zeros_like(operands.out[2]))
    operands.fault_word.zero_()
    operands.block_table[1, 3:] = -9
    operands.cache_seqlens[1] = 192
    operands.cache_seqlens[2] = 64
    out, _ = run(problem, operands)
    assert torch.equal(out[2], expected[0][2])
    assert int(operands.fault_word) == Fault.PAGE_OUT_OF_RANGE  # request 0; a bad page behind the length is none


def test_length_beyond_the_table_is_cut():
    problem, operands = make_decode([100])
    operands.kv_cache.nan_to_num_(0.5)
    operands.cache_seqlens[0] = 2**31 - 1
    require(problem, operands)
    assert int(operands.fault_word) == Fault.LENGTH_OVER_CAPACITY


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("position", [2, 1700, 2497, 2499])
def test_a_value_that_is_not_finite_reaches_only_rows_that_see_it(bad, position, arithmetic):
    problem, operands = make_decode([2500, 300], s_q=3, is_causal=True)
    clean = run(problem, operands)
    page, offset = operands.block_table[0, position // 64], position % 64
    operands.kv_cache[page, offset, 0, 5] = bad
    require(problem, operands)
    out, lse = run(problem, operands)
    first = max(position - 2497, 0)  # query i sees keys up to 2497 + i
    assert torch.equal(out[0, :first], clean[0][0, :first])
    assert torch.equal(lse[0, :, :first], clean[1][0, :, :first])
    assert torch.equal(out[1], clean[0][1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_huge_logits_stay_finite_and_weights_sum_to_one(dtype):
    problem, operands = make_decode([2600], dtype=dtype)
    operands.kv_cache.fill_(1.0)
    operands.q.fill_(2.0**32)
    out, lse = run(problem, operands)
    assert torch.equal(out, torch.ones_like(out))
    assert bool(lse.isfinite().all())
    assert float(lse[0, 0, 0]) == pytest.approx(2.0**32 * 24, rel=1e-6)


def test_negative_scale():
    problem, operands = make_decode([700])
    require(problem, operands._replace(softmax_scale=-operands.softmax_scale))


@pytest.mark.parametrize("shape", [(0, 1), (2, 0)])
def test_nothing_to_do(shape):
    batch, s_q = shape
    _, operands = make_decode([5, 6], s_q=max(s_q, 1))
    fewer = operands._replace(
        q=operands.q[:batch, :s_q], block_table=operands.block_table[:batch], out=operands.out[:batch, :s_q],
        cache_seqlens=operands.cache_seqlens[:batch], lse=operands.lse[:batch, :, :s_q],
    )  # fmt: skip
    DECODE.launch(
        None, DecodeProblem.from_tensors(fewer.q, fewer.kv_cache, fewer.block_table, fewer.cache_seqlens), fewer, None
    )  # fmt: skip


@pytest.mark.parametrize("sink", [torch.inf, -torch.inf])
def test_infinite_sinks(sink):
    problem, operands = make_decode([300, 0], sink=True)
    plain, lse = run(problem, operands._replace(attn_sink=None))
    operands.attn_sink.fill_(sink)
    out, sunk_lse = run(problem, operands)
    assert torch.equal(lse, sunk_lse)
    assert torch.equal(out, plain if sink < 0 else torch.zeros_like(out))


def test_the_callers_thread_settings_survive():
    before = torch.get_num_threads()
    seen = []

    def fresh():
        seen.append(torch.get_num_threads())

    for width in (3, 2):
        torch.set_num_threads(width)
        workers.run(lambda: None, 7 - width)
        assert torch.get_num_threads() == width
        thread = threading.Thread(target=fresh)
        thread.start()
        thread.join()
    torch.set_num_threads(before)
    assert seen[0] == 3


def test_a_worker_uses_one_core():
    seen = []

    def look():
        torch.ones(300_000).exp_()  # large enough that PyTorch would share it out
        seen.append(torch.get_num_threads())

    for width in (1, 4, 6):
        workers.run(look, width)
    assert set(seen) == {1}


def test_calls_from_several_threads_at_once():
    problem, operands = make_decode([5000, 30])
    expected = run(problem, operands)
    results: list[tuple[torch.Tensor, torch.Tensor]] = []

    def call():
        mine = operands._replace(out=operands.out.clone(), lse=operands.lse.clone())
        for _ in range(5):
            results.append(run(problem, mine))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 20
    assert all(torch.equal(out, expected[0]) and torch.equal(lse, expected[1]) for out, lse in results)


def test_an_error_in_a_thread_reaches_the_caller_and_ends_the_others():
    def fail(first: int, last: int, scratch: workers.Scratch) -> attend.Tile:
        raise OSError("no such tile")

    spans = attend.tile_spans(0, 8192, 512)
    task = attend.Task(torch.zeros(16, 64), spans, fail, lambda *_: None)
    pending = attend.Pending(len(spans), lambda: task)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    with pytest.raises(OSError, match="no such tile"):
        attend.Attention(products.PortableProducts, 64, 1.0).run([pending])
    torch.set_num_threads(before)


class _Allocations(TorchDispatchMode):
    """Remembers the largest tensor storage that operators make."""

    def __init__(self, known):
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in known if isinstance(x, torch.Tensor)}
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, leaf.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("layout", [None, "fp8_656", "fp4_288"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_extra_memory_is_a_tile_whatever_the_length(layout, dtype, monkeypatch):
    monkeypatch.setattr(workers, "run", lambda job, width: job())
    largest = []
    for length in (4096, 20_000):
        buffers = workers.Scratch()
        monkeypatch.setattr(workers, "scratch", lambda buffers=buffers: buffers)
        problem, operands = make_decode([length], dtype=dtype, layout=layout)
        with _Allocations(operands) as allocations:
            DECODE.launch(None, problem, operands, None)
        largest.append(allocations.largest)
    # 2048 keys of 576 fp32 columns at most; the two runs differ by the slots of a tile or not at all.
    assert max(largest) <= 2048 * 576 * 4
    assert largest[1] <= 1.1 * largest[0]


def test_devices_without_a_kernel_of_their_own_get_the_same_numbers():
    problem, operands = make_decode([900, 70, 0], s_q=2, is_causal=True, sink=True)
    operands.block_table[0, 3] = 10**6
    anywhere.decode(problem, operands)
    check(operands.out, operands.lse, oracle(problem, operands), dtype=problem.dtype).require("anywhere")
    assert int(operands.fault_word) == Fault.PAGE_OUT_OF_RANGE


@pytest.mark.parametrize("op", cases.OPS)
def test_hostile_cases_on_devices_without_a_kernel_of_their_own(op, monkeypatch):
    monkeypatch.setattr(kernels, "tiled", anywhere)
    for seed in range(5000, 5025):
        case = cases.draw(seed, op)
        out, lse, max_logits = case.run(backend="torch")
        check(out, lse, case.golden(), dtype=case.dtype, max_logits=max_logits).require(case.repro)


def make_prefill(seqlens_q, seqlens_k, *, h_q=4, h_kv=4, d_qk=192, d_v=128, dtype=torch.bfloat16, is_causal=True):
    make = torch.Generator().manual_seed(7)
    total_q, total_k = sum(seqlens_q), sum(seqlens_k)
    q = torch.randn(total_q, h_q, d_qk, generator=make).to(dtype)
    k = torch.randn(total_k, h_kv, d_qk, generator=make).to(dtype)
    v = torch.randn(total_k, h_kv, d_v, generator=make).to(dtype)
    cu_q, cu_k = (torch.tensor([0, *s]).cumsum(0).to(torch.int32) for s in (seqlens_q, seqlens_k))
    problem = PrefillProblem.from_tensors(q, k, v, cu_q, cu_k, max(seqlens_q), max(seqlens_k), is_causal=is_causal)
    out, lse = torch.full((total_q, h_q, d_v), torch.nan, dtype=dtype), torch.full((h_q, total_q), torch.nan)
    operands = PrefillOperands(q, k, v, cu_q, cu_k, d_qk**-0.5, out, lse, torch.zeros(1, dtype=torch.int32))
    return problem, operands


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("h_kv", [1, 4])
@pytest.mark.parametrize("is_causal", [False, True])
def test_prefill_matches_the_oracle(dtype, h_kv, is_causal, arithmetic):
    problem, operands = make_prefill([700, 1, 33], [1100, 5, 20], h_kv=h_kv, dtype=dtype, is_causal=is_causal)
    PREFILL.launch(None, problem, operands, None)
    golden = attention.prefill(
        operands.q, operands.k, operands.v, operands.cu_seqlens_q, operands.cu_seqlens_k,
        softmax_scale=operands.softmax_scale, is_causal=is_causal, with_bounds=True,
    )  # fmt: skip
    check(operands.out, operands.lse, golden, dtype=dtype).require(str(problem))


@pytest.mark.parametrize("h_kv", [1, 2])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_match_autograd_in_fp64(h_kv, is_causal, dtype):
    problem, operands = make_prefill(
        [150, 3, 20], [300, 7, 12], h_q=2, h_kv=h_kv, d_qk=24, d_v=16, dtype=dtype, is_causal=is_causal
    )
    PREFILL.launch(None, problem, operands, None)
    grad_out = torch.randn(operands.out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = PREFILL.launch_backward(None, problem, operands, grad_out)
    wide = [x.double().requires_grad_() for x in (operands.q, operands.k, operands.v)]
    golden = attention.prefill(
        *wide, operands.cu_seqlens_q, operands.cu_seqlens_k, softmax_scale=operands.softmax_scale, is_causal=is_causal
    )
    expected = torch.autograd.grad(golden.out, wide, grad_out.double())
    # bf16 rounds out, lse's weights and the result: three roundings of 2^-9 against gradients of order 1.
    limit = 1e-5 if dtype == torch.float32 else 3 * 2.0**-9
    for mine, exact, like in zip(found, expected, wide, strict=True):
        assert mine.dtype == dtype
        assert mine.shape == like.shape
        assert float((mine.double() - exact).abs().max()) <= limit * (1 + float(exact.abs().max()))


def test_gradients_do_not_depend_on_threads():
    problem, operands = make_prefill([300, 40], [300, 40], h_q=4, h_kv=2, d_qk=24, d_v=16)
    PREFILL.launch(None, problem, operands, None)
    before, results = torch.get_num_threads(), []
    for width in (1, 2, 3):
        torch.set_num_threads(width)
        results.append(PREFILL.launch_backward(None, problem, operands, torch.ones_like(operands.out)))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_offsets_never_fall():
    assert tiled.rising_offsets([3, -1, 9, 4, 50], 10) == [3, 3, 9, 9, 10]
