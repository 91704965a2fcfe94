"""What `prove_decode.py` proves: sections of items. An item returns what it measured, or raises.

matrix       every pair of options of a call: dtype, d_qk, h_q 1 to 128, h_kv, s_q, varlen, causal, page sizes, window,
             sink, lengths (empty, negative, beyond the table), policy, LSE, out=, plan, workspace; strided hostile views,
             NaN in every KV byte that no row reaches, against the fp64 oracle under the tolerance rule
             first what the backend has a kernel for, then everything
fuzz         4,000 seeded cases of the same kind at the sizes of real kernels
plans        device plans against `plan_decode`, field by field
repeats      10,000 runs whose bits must not change, with other work on the card
graphs       50 CUDA-graph scenarios: lengths, queries and tables change between replays; bits as without a graph
invariance   batch_invariant: a request's bits alone, permuted, among more requests, and inside a graph
big          KV pools beyond 2^32 elements, packed and strided
border       flash_mla's interface
host         time from the Python call to the launch
sanitize     compute-sanitizer over the smallest cases
"""

from __future__ import annotations

import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import openmla
from openmla import flash_mla
from openmla.backends import select
from openmla.core.errors import UnsupportedError
from openmla.core.problem import DecodeProblem
from openmla.core.target import Target
from openmla.reference import attention
from openmla.split.schedule import plan_decode
from openmla.testing import budget, coverage
from openmla.testing.cases import Case, native_arguments

FUZZ_CASES = 4000
REPEATS = 1000  # of each of ten problems
HOST_US = 15.0
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
LIST = tuple[int, ...]


class NotRunError(Exception):
    """This machine cannot run an item; says why."""


@dataclass(frozen=True)
class Setup:
    """Where and how much."""

    backend: str
    device: str
    is_small: bool = False

    @property
    def is_cuda(self) -> bool:
        """Whether there are streams and graphs."""
        return self.device == "cuda"

    def takes(self, case: Case) -> bool:
        """Whether the backend has a kernel for a case here."""
        rows, batch = sum(case.seqlens_q), len(case.seqlens_k)
        pages = max(-(-length // case.page_size) for length in (1, *case.seqlens_k) if length < 5000)

        def like(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        lead = (rows,) if case.is_varlen else (batch, rows // batch)
        problem = DecodeProblem.from_tensors(
            like(case.dtype, *lead, case.h_q, case.d_qk), like(case.dtype, pages, case.page_size, case.h_kv, case.d_qk),
            like(torch.int32, batch, pages), like(torch.int32, batch), d_v=case.d_v, is_causal=case.is_causal,
            window=case.window or None, cu_seqlens_q=like(torch.int32, batch + 1) if case.is_varlen else None,
            max_seqlen_q=max(case.seqlens_q) if case.is_varlen else None,
            attn_sink=like(torch.float32, case.h_q) if case.has_sink else None, softmax_scale=case.softmax_scale,
        )  # fmt: skip
        try:
            select(problem, Target.detect(self.device), self.backend)
        except UnsupportedError:
            return False
        return True

    def some(self, items: list[Any], count: int) -> list[Any]:
        """`count` of the items in the small form, evenly spread; else all."""
        return items[:: max(len(items) // count, 1)][:count] if self.is_small else items


@dataclass(frozen=True)
class Item:
    """One thing to prove."""

    section: str
    number: int
    name: str
    setup: Setup
    call: Callable[[Setup], dict[str, Any]]

    @property
    def backend(self) -> str:
        """Whose."""
        return self.setup.backend

    @property
    def repro(self) -> str:
        """The command that runs it alone."""
        return (
            f"REPRO: python tests/gpu/prove_decode.py --backend {self.backend} --device {self.setup.device} "
            f"--sections {self.section} --case-seed {self.number}"
        )

    def run(self) -> dict[str, Any]:
        """Prove it."""
        return self.call(self.setup)


Made = list[tuple[str, Callable[[Setup], dict[str, Any]]]]


def _items(section: str, make: Callable[[Setup], Made], small: int) -> Callable[..., list[Item]]:
    """The items of a section: all, `small` of them, or only one."""

    def listed(setup: Setup, only: int | None = None) -> list[Item]:
        items = [
            Item(section, number, f"{number} {name}", setup, call) for number, (name, call) in enumerate(make(setup))
        ]
        return setup.some(items, small) if only is None else [items[only]]

    return listed


def dense(lengths: LIST, h_q: int, *, s_q: int = 1, seed: int = 0, **options: Any) -> Case:
    """A case of plain shape: pages of 64, d_qk 576, bf16, causal, standard normal."""
    chosen = {"family": "unit", "dtype": torch.bfloat16, "h_kv": 1, "d_qk": 576, "page_size": 64, "is_causal": True}
    chosen |= {"softmax_scale": 576**-0.5, **options}
    return Case(op="decode", seed=seed, h_q=h_q, d_v=512, seqlens_q=(s_q,) * len(lengths), seqlens_k=lengths, **chosen)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Numbers as integers: NaN equals itself, 0 differs from -0."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize])


def same_bits(got: Any, want: Any, what: str) -> None:
    """Every tensor of two results has the same bits."""
    for name, x, y in zip(("out", "lse", "out of the second layer", "its lse"), got, want, strict=False):
        differing = int((bits(x) != bits(y)).sum())
        assert not differing, f"{what}: {differing} of {x.numel()} elements of {name} differ"


# ------------------------------------------------------------------------------------------- matrix, fuzz, plans


def _judged(case: Case, call: coverage.Call) -> Callable[[Setup], dict[str, Any]]:
    def run(setup: Setup) -> dict[str, Any]:
        return {"ran": [coverage.judge(case, call, backend=setup.backend, device=setup.device)]}

    return run


def matrix(setup: Setup) -> Made:
    """Every pair of the options that each kernel takes alone, then every pair of all options."""
    lists = [coverage.axes_around({"h_q": 16}, setup.takes, is_fixed=False)]
    for base in ({"h_q": 128}, {"h_q": 128, "lengths": "deep"}, {"h_q": 64, "lengths": "deep"}):
        lists.append(coverage.axes_around(base, setup.takes, is_fixed=True))
    made = [pair for axes in lists if axes for pair in coverage.pairs(axes, setup.takes)]
    made += coverage.pairs()
    return [(f"{call} {case}", _judged(case, call)) for case, call in dict.fromkeys(made)]


def fuzz(setup: Setup) -> Made:
    """Seeds; an item's number is its seed."""

    def seeded(seed: int) -> Callable[[Setup], dict[str, Any]]:
        return lambda setup: _judged(*coverage.draw(seed))(setup)

    return [("seed", seeded(seed)) for seed in range(FUZZ_CASES)]


def plans(setup: Setup) -> Made:
    """Batches of every size, twenty to an item."""

    def check(h_q: int, seed: int) -> Callable[[Setup], dict[str, Any]]:
        return lambda setup: _check_plans(setup, h_q, seed)

    return [(f"h_q {h_q}, twenty batches", check(h_q, seed)) for h_q in (1, 16, 128) for seed in range(4)]


def _check_plans(setup: Setup, h_q: int, seed: int) -> dict[str, Any]:
    """The device's plan is the Python function's, for the options that the kernel was compiled with."""
    if setup.backend != "cute":
        raise NotRunError("plans of this backend are compared in tests/interpret and tests/unit")
    pick = random.Random(f"plans {h_q} {seed}")
    for number in range(20):
        batch = pick.choice((1, 2, 3, 17, 64, 128, 129, 511, 512, 513, 1500, pick.randint(1, 300)))
        top = pick.choice((1, 64, 500, 5000))
        lengths = [pick.choice((0, -3, pick.randint(0, top), top, top, top + 70)) for _ in range(batch)]
        if pick.random() < 0.5:
            lengths = [pick.randint(top - top // 8, top) for _ in range(batch)]  # about equal: whole requests
        columns = max(-(-top // 64), 1)
        q = torch.zeros(batch, 1, h_q, 576, dtype=torch.bfloat16, device=setup.device)
        kv = torch.zeros(1, 64, 1, 576, dtype=torch.bfloat16, device=setup.device)
        pages = torch.zeros(batch, columns, dtype=torch.int32, device=setup.device)
        given = torch.tensor(lengths, dtype=torch.int32, device=setup.device)
        policy = pick.choice(("balanced", "balanced", "batch_invariant"))
        made = openmla.plan(q, kv, pages, given, policy=policy, backend=setup.backend)
        openmla.check_errors()
        problem, target = DecodeProblem.from_tensors(q, kv, pages, given), Target.detect(setup.device)
        found = select(problem, target, setup.backend)
        options = found.kernel.compile(problem, found.config, target).options._asdict()
        want = plan_decode(
            [min(length, columns * 64) for length in lengths], options.pop("num_parts"), policy=policy, **options
        )
        where = f"batch {number} of {h_q}, {seed}: {policy} {batch} requests up to {top}, {options}"
        assert torch.equal(made.num_splits.cpu(), want.num_splits_tensor()), f"num_splits differ: {where}"
        assert torch.equal(made.tile_scheduler_metadata.cpu(), want.tile_scheduler_metadata()), f"parts differ: {where}"
    return {"ran": [f"{made.backend}/{made.kernel}"]}


# ------------------------------------------------------------------------------------------- repeats


def repeats(setup: Setup) -> Made:
    """Ten problems; their plans split, deal whole requests, cut chunks."""
    problems = [
        dense((4900,), 16), dense((4900,), 128), dense((700, 0, 64, 3000), 16, s_q=2), dense((700, 0, 64, 3000), 128),
        dense((1300,) * 40, 128, s_q=2), dense((500,) * 128, 16), dense((1,), 1), dense((2000, 70), 8, dtype=torch.float16),
        dense((900, 4500), 128, dtype=torch.float16), dense((333,) * 70, 128),
    ]  # fmt: skip

    def check(case: Case, policy: str) -> Callable[[Setup], dict[str, Any]]:
        return lambda setup: _repeat(setup, case, policy)

    named = [(case, ("balanced", "batch_invariant")[number % 3 == 2]) for number, case in enumerate(problems)]
    return [(f"{policy} h_q {case.h_q} {len(case.seqlens_k)} requests", check(case, policy)) for case, policy in named]


def _repeat(setup: Setup, case: Case, policy: str) -> dict[str, Any]:
    given = native_arguments("decode", coverage.moved(case.tensors(), setup.device))
    first = openmla.decode(**given, policy=policy, backend=setup.backend)
    differing = torch.zeros((), dtype=torch.int64, device=setup.device)
    noise = torch.randn(1024, 1024, device=setup.device, dtype=torch.bfloat16) if setup.is_cuda else None
    beside = torch.cuda.Stream() if setup.is_cuda else None
    count = 5 if setup.is_small else REPEATS
    for number in range(count):
        if noise is not None and number % 7 == 0:
            with torch.cuda.stream(beside):
                noise = noise @ noise * 0.01
        again = openmla.decode(**given, policy=policy, backend=setup.backend)
        differing += sum((bits(x) != bits(y)).any() for x, y in zip(again, first, strict=True))
    assert not int(differing), f"bits changed in {int(differing)} of {2 * count} results"
    return {"measured": {"repeats": count}}


# ------------------------------------------------------------------------------------------- graphs, invariance

CAPACITY = 4200
CAPTURED: LIST = (700, 64, 1, 3900)
STATES: dict[str, tuple[LIST, ...]] = {
    "grow": ((CAPACITY,) * 4, (4199, 1, 4200, 65), CAPTURED),
    "shrink": ((5, 1, 0, 63), (64, 0, 0, 0), CAPTURED),
    "empty": ((0, 0, 0, 0), (0, 0, 0, 1), CAPTURED),
    "permute": ((3900, 700, 64, 1), (1, 3900, 700, 64), CAPTURED),
    "table": (CAPTURED, CAPTURED, CAPTURED),
}


def graphs(setup: Setup) -> Made:
    """Two kernels, five ways to call, five ways to change."""
    forms = [("decode", "balanced"), ("decode", "batch_invariant"), ("plan", "balanced"), ("plan", "batch_invariant")]
    forms.append(("flash_mla", "balanced"))

    def check(h_q: int, form: str, policy: str, change: str) -> Callable[[Setup], dict[str, Any]]:
        return lambda setup: _replay(setup, h_q, form, policy, change)

    return [
        (f"h_q {h_q}, {form}, {policy}, {change}", check(h_q, form, policy, change))
        for h_q in (16, 128)
        for form, policy in forms
        for change in STATES
    ]


def _caller(given: dict[str, Any], form: str, policy: str, backend: str) -> Callable[[], tuple[torch.Tensor, ...]]:
    """A decode of these tensors in one of three forms; `plan` is two layers with one plan."""
    planned = {name: value for name, value in given.items() if name != "softmax_scale"}
    second = given["q"].flip(-1)

    def decode() -> tuple[torch.Tensor, ...]:
        return openmla.decode(**given, policy=policy, backend=backend)

    def two_layers() -> tuple[torch.Tensor, ...]:
        plan = openmla.plan(**planned, policy=policy, backend=backend)
        layers = [openmla.decode(**{**given, "q": q}, plan=plan, backend=backend) for q in (given["q"], second)]
        return (*layers[0], *layers[1])

    def border() -> tuple[torch.Tensor, ...]:
        out, lse = flash_mla.flash_mla_with_kvcache(
            given["q"], given["kv_cache"], given["block_table"], given["cache_seqlens"], given["d_v"],
            flash_mla.get_mla_metadata()[0], softmax_scale=given["softmax_scale"], causal=given["is_causal"],
            backend=backend,
        )  # fmt: skip
        return out, lse.masked_fill(lse == torch.inf, -torch.inf)

    return {"decode": decode, "plan": two_layers, "flash_mla": border}[form]


def _captured(call: Callable[[], tuple[torch.Tensor, ...]], is_cuda: bool) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Replays a graph of `call` into the same tensors every time; on a CPU, calls it again."""
    if not is_cuda:
        return call
    call()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()

    def replay() -> tuple[torch.Tensor, ...]:
        for tensor in results:
            tensor.fill_(torch.nan)
        churn = [torch.full((1 << pick,), torch.nan, device=results[0].device) for pick in (10, 16, 20)]
        del churn
        graph.replay()
        return results

    return replay


def _replay(setup: Setup, h_q: int, form: str, policy: str, change: str) -> dict[str, Any]:
    case = dense((CAPACITY,) * 4, h_q, s_q=2, seed=len(change))
    given = coverage.moved(case.tensors(), setup.device)
    arguments = native_arguments("decode", given)
    lengths, pages = given["cache_seqlens"], given["block_table"]
    lengths.copy_(torch.tensor(CAPTURED))
    call = _caller(arguments, form, policy, setup.backend)
    replay = _captured(call, setup.is_cuda)
    before = None
    for number, state in enumerate((CAPTURED, *STATES[change])):
        lengths.copy_(torch.tensor(state))
        given["q"].copy_(given["q"].roll(number, -1))
        if change == "table":
            pages.copy_(pages.roll(1, 0))
        got = [tensor.clone() for tensor in replay()]
        where = f"replay {number}, lengths {state}"
        same_bits(got, call(), f"{where}: graph against call")
        budget.check(got[0], got[1], case.golden(given), dtype=case.dtype).require(where)
        assert before is None or not any(state) or not torch.equal(bits(before), bits(got[0])), f"{where}: nothing new"
        before = got[0]
    assert not openmla.check_errors(), "faults without a reason"
    return {}


def invariance(setup: Setup) -> Made:
    """Heads, query tokens, dtypes, calls and graphs."""

    def check(h_q: int, s_q: int, dtype: torch.dtype, has_graph: bool) -> Callable[[Setup], dict[str, Any]]:
        return lambda setup: _invariant(setup, h_q, s_q, dtype, has_graph)

    kinds = [(1, 1), (16, 1), (16, 2), (128, 1), (128, 2)]
    return [
        (f"h_q {h_q} s_q {s_q} {dtype} {'graph' if has_graph else 'call'}", check(h_q, s_q, dtype, has_graph))
        for h_q, s_q in kinds
        for dtype in (torch.bfloat16, torch.float16)
        for has_graph in (False, True)
    ]


def _invariant(setup: Setup, h_q: int, s_q: int, dtype: torch.dtype, has_graph: bool) -> dict[str, Any]:
    lengths = (4999, 70, 0, 4096, 4097, 64) if not setup.is_small else (4999, 70, 0)
    case = dense(lengths, h_q, s_q=s_q, dtype=dtype)
    given = native_arguments("decode", coverage.moved(case.tensors(), setup.device))
    rows = ("q", "block_table", "cache_seqlens")

    def of(requests: list[int]) -> tuple[torch.Tensor, ...]:
        chosen = {**given, **{name: given[name][requests].clone() for name in rows}}
        call = _caller(chosen, "decode", "batch_invariant", setup.backend)
        return _captured(call, setup.is_cuda)() if has_graph else call()

    everybody = list(range(len(lengths)))
    full = [tensor.clone() for tensor in of(everybody)]
    shuffled = everybody[::-1]
    same_bits(of(shuffled), [x[shuffled] for x in full], "permuted")
    many = (everybody * 12)[: 12 * len(everybody)] if not setup.is_small else everybody * 2
    same_bits(of(many), [x[many] for x in full], f"among {len(many)} requests")
    for request in everybody:
        same_bits(of([request]), [x[[request]] for x in full], f"request {request} ({lengths[request]} keys) alone")
    return {}


# ------------------------------------------------------------------------------------------- big, border, host


def big(setup: Setup) -> Made:
    """Pools of 8.6 GB, packed or with pages twice as far apart."""

    def check(h_q: int, is_strided: bool) -> Callable[[Setup], dict[str, Any]]:
        return lambda setup: _big(setup, h_q, is_strided)

    kinds = [(h_q, is_strided) for h_q in (16, 128) for is_strided in (False, True)]
    return [(f"h_q {h_q} {'strided' if is_strided else 'packed'}", check(h_q, is_strided)) for h_q, is_strided in kinds]


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


def border(setup: Setup) -> Made:
    """flash_mla's calls."""

    def check(h_q: int, s_q: int, is_tuple: bool) -> Callable[[Setup], dict[str, Any]]:
        return lambda setup: _border(setup, h_q, s_q, is_tuple)

    kinds = [(1, 1), (16, 1), (16, 2), (64, 1), (128, 1), (128, 2)]
    return [
        (f"h_q {h_q} s_q {s_q} {'tensors' if is_tuple else 'object'}", check(h_q, s_q, is_tuple))
        for h_q, s_q in kinds
        for is_tuple in (False, True)
    ]


def _border(setup: Setup, h_q: int, s_q: int, is_tuple: bool) -> dict[str, Any]:
    """Metadata as an object or as two tensors, twice with the same metadata; an empty row has lse +inf."""
    case = dense((700, 0, 65, 1300), h_q, s_q=s_q)
    given = coverage.moved(case.tensors(), setup.device)
    lengths = given["cache_seqlens"]
    meta = flash_mla.get_mla_metadata(lengths, s_q * h_q, 1) if is_tuple else flash_mla.get_mla_metadata()
    results = [
        flash_mla.flash_mla_with_kvcache(
            given["q"], given["kv_cache"], given["block_table"], lengths, 512, *meta, softmax_scale=case.softmax_scale,
            causal=True, backend=setup.backend,
        )
        for _ in range(2)
    ]  # fmt: skip
    same_bits(*results, "the same metadata again")
    out, lse = results[0]
    assert bool((lse[1] == torch.inf).all()), "lse of an empty row is +inf here"
    lse = lse.masked_fill(lse == torch.inf, -torch.inf)
    budget.check(out, lse, case.golden(given), dtype=case.dtype).require(str(case))
    return {}


def host(setup: Setup) -> Made:
    """Both kernels, with and without a plan."""

    def check(h_q: int, is_planned: bool) -> Callable[[Setup], dict[str, Any]]:
        return lambda setup: _host(setup, h_q, is_planned)

    kinds = [(h_q, is_planned) for h_q in (16, 128) for is_planned in (True, False)]
    return [
        (f"h_q {h_q} {'plan given' if is_planned else 'alone'}", check(h_q, is_planned)) for h_q, is_planned in kinds
    ]


def _host(setup: Setup, h_q: int, is_planned: bool) -> dict[str, Any]:
    """Median of calls one behind the other. The bar holds for a call with a plan: one plan serves all layers."""
    case = dense((900,) * 4, h_q, is_causal=False)
    given = native_arguments("decode", coverage.moved(case.tensors(), setup.device))
    planned = {name: value for name, value in given.items() if name != "softmax_scale"}
    plan = openmla.plan(**planned, backend=setup.backend) if is_planned else None
    times = []
    for number in range(30 if setup.is_small else 600):
        if setup.is_cuda and number % 50 == 0:
            torch.cuda.synchronize()
        at = time.perf_counter_ns()
        openmla.decode(**given, plan=plan, backend=setup.backend)
        times.append((time.perf_counter_ns() - at) / 1e3)
    median = statistics.median(times[len(times) // 3 :])
    found = {"measured": {"median us": round(median, 2)}}
    if setup.is_cuda and setup.backend == "cute" and is_planned:
        assert median <= HOST_US, f"host time {median:.1f} us, bar {HOST_US} us"
    return found


# ------------------------------------------------------------------------------------------- sanitizer


def smallest(setup: Setup) -> Made:
    """What the sanitizer watches: a run, no oracle; inputs come from the host, so that every byte was written."""
    problems = [
        dense((130,), 16), dense((0, 65, 1), 16, s_q=2), dense((130,), 128), dense((0, 65, 1), 128, s_q=2),
        dense((700,), 16), dense((-1, 70, 2**31 - 1), 16, invalid_share=0.3),
    ]  # fmt: skip

    def check(case: Case) -> Callable[[Setup], dict[str, Any]]:
        return lambda setup: _once(setup, case)

    return [(f"h_q {case.h_q} {case.seqlens_k}", check(case)) for case in problems]


def _once(setup: Setup, case: Case) -> dict[str, Any]:
    given = native_arguments("decode", coverage.moved(case.tensors(), setup.device))
    openmla.decode(**given, backend=setup.backend)
    if setup.is_cuda:
        torch.cuda.synchronize()
    return {}


def sanitize(setup: Setup) -> Made:
    """One item per tool."""

    def check(tool: str) -> Callable[[Setup], dict[str, Any]]:
        return lambda setup: _sanitize(setup, tool)

    return [(tool, check(tool)) for tool in TOOLS]


def _sanitize(setup: Setup, tool: str) -> dict[str, Any]:
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not setup.is_cuda:
        raise NotRunError("compute-sanitizer watches GPUs")
    if not Path(program).exists():
        raise NotRunError("compute-sanitizer is not installed; it comes with the CUDA toolkit")
    script = Path(__file__).with_name("decode_sections.py")
    found = subprocess.run(
        [program, "--tool", tool, "--error-exitcode", "9", "--print-limit", "5", sys.executable, str(script),
         setup.backend],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    text = found.stdout + found.stderr
    counted = re.search(r"ran (\d+) of (\d+)", text)
    summary = [line.strip("= ") for line in text.splitlines() if "SUMMARY" in line]
    if counted is None or found.returncode:
        shown = [line for line in text.splitlines() if line.strip("= ")]
        raise AssertionError(f"{tool} ended with status {found.returncode}\n" + "\n".join(shown[:40] + shown[-10:]))
    assert int(counted[1]), f"{tool}: no case is supported"
    return {"measured": {"cases": counted[0], "says": "; ".join(summary)}}


def watched(backend: str) -> int:
    """The program that the sanitizer runs: every smallest case once."""
    setup, ran = Setup(backend, "cuda"), 0
    items = SECTIONS["smallest"](setup)
    for item in items:
        try:
            item.run()
            ran += 1
        except UnsupportedError as error:
            print(f"{item.name}: {coverage.reasons(error, backend)}")
    print(f"ran {ran} of {len(items)}")
    return 0


# name -> items(setup, only=number); the number beside it is how many the small form takes
SECTIONS: dict[str, Callable[..., list[Item]]] = {
    name: _items(name, make, small)
    for name, make, small in (
        ("matrix", matrix, 6), ("fuzz", fuzz, 8), ("plans", plans, 1), ("repeats", repeats, 2), ("graphs", graphs, 5),
        ("invariance", invariance, 1), ("big", big, 2), ("border", border, 2), ("host", host, 2),
        ("smallest", smallest, 2), ("sanitize", sanitize, 1),
    )
}  # fmt: skip
DEFAULT = tuple(name for name in SECTIONS if name != "smallest")
SHARDS = {"fuzz": 4, "matrix": 2, "sanitize": len(TOOLS), "graphs": 2}  # processes of a section

if __name__ == "__main__":
    raise SystemExit(watched(sys.argv[1]))
