"""What `prove_decode.py` proves: sections of items. An item returns what it measured, or raises.

matrix       every pair of options of a call: dtype, d_qk, h_q 1 to 128, h_kv, s_q, varlen, causal, page sizes, window,
             sink, lengths (empty, negative, beyond the table), policy, LSE, out=, plan, workspace; strided hostile views,
             NaN in every KV byte that no row reaches, against the fp64 oracle under the tolerance rule;
             first what the backend has a kernel for, then everything
sparse       token-sparse decode: the cases of decode_sparse.py for every variant that ships, through openmla.sparse_decode
fuzz         4,000 seeded cases of the same kind at the sizes of real kernels
plans        device plans against `plan_decode`, field by field
repeats      10,000 runs whose bits must not change, with other work on the card
graphs       50 CUDA-graph scenarios: lengths, queries and tables change between replays; bits as without a graph
invariance   batch_invariant: a request's bits alone, permuted, among more requests, and inside a graph
big          KV pools beyond 2^32 elements, packed and strided
border       flash_mla's interface
stale        a plan whose lengths have changed: requests that kept theirs keep their bits, and the plan stays usable
host         time from the Python call to the launch
sanitize     compute-sanitizer over the smallest cases
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import decode_sparse
import torch
from decode_items import LIST, Item, Made, NotRunError, Setup, bits, dense, listed_items, same_bits
from decode_machine import TOOLS, host, sanitize, smallest

import openmla
from openmla import flash_mla
from openmla.backends import select
from openmla.backends.cute.decode_sparse.config import VARIANTS
from openmla.core.target import Target
from openmla.reference import attention
from openmla.split.schedule import plan_decode
from openmla.testing import budget, coverage
from openmla.testing.cases import Case, native_arguments

__all__ = ["DEFAULT", "SECTIONS", "SHARDS", "NotRunError", "Setup"]

FUZZ_CASES = 4000
REPEATS = 1000  # of each of ten problems


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
    # Longer than a chunk of batch_invariant, which no other case is.
    chunked = coverage.Call(policy="batch_invariant")
    made += [(dense((12400, 0, 64, 8200), h_q, s_q=s_q), chunked) for h_q in (16, 128) for s_q in (1, 2)]
    return [(f"{call} {case}", _judged(case, call)) for case, call in dict.fromkeys(made)]


def fuzz(setup: Setup) -> Made:
    """Seeds; an item's number is its seed."""

    def seeded(seed: int) -> Callable[[Setup], dict[str, Any]]:
        return lambda setup: _judged(*coverage.draw(seed))(setup)

    return [("seed", seeded(seed)) for seed in range(FUZZ_CASES)]


def sparse(setup: Setup) -> Made:
    """Every layout that the Hopper kernel reads, with and without a second cache."""
    decode_sparse.CUDA = setup.device

    def run(build: Callable[[], Any]) -> Callable[[Setup], dict[str, Any]]:
        def call(setup: Setup) -> dict[str, Any]:
            fine, words = decode_sparse.through_the_api(build(), setup.backend)
            assert fine, words
            return {"worst": words}

        return call

    return [
        (f"{each.layout}{' and a second cache' if each.has_extra else ''}: {title}", run(build))
        for each in VARIANTS
        for title, build in decode_sparse.cases(each.layout, each.has_extra)
    ]


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
        target = Target.detect(setup.device)
        found = select(made.problem, target, setup.backend)
        options = found.kernel.compile(made.problem, found.config, target).options._asdict()
        options |= {"ranges": made.pieces.tile_scheduler_metadata.shape[0], "policy": policy}
        want = plan_decode([min(length, columns * 64) for length in lengths], options.pop("num_parts"), **options)
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
    longest = 16390  # several chunks
    lengths = (longest, 70, 0, 8192, 8193, 64) if not setup.is_small else (longest, 70, 0)
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


def stale(setup: Setup) -> Made:
    """A plan that is no longer true may cost the requests that changed, nobody else."""

    def check(h_q: int, policy: str, lengths: LIST) -> Callable[[Setup], dict[str, Any]]:
        return lambda setup: _stale(setup, h_q, policy, lengths)

    kinds = [(h_q, policy) for h_q in (16, 128) for policy in ("balanced", "batch_invariant")]
    changed = {"longer": (CAPACITY, 64, 1300, 3900), "shorter": (5, 64, 0, 3900)}
    return [
        (f"h_q {h_q} {policy} {name}", check(h_q, policy, lengths))
        for h_q, policy in kinds
        for name, lengths in changed.items()
    ]


def _stale(setup: Setup, h_q: int, policy: str, lengths: LIST) -> dict[str, Any]:
    case = dense((CAPACITY,) * 4, h_q, seed=1)
    given = native_arguments("decode", coverage.moved(case.tensors(), setup.device))
    planned = {name: value for name, value in given.items() if name != "softmax_scale"}
    given["cache_seqlens"].copy_(torch.tensor(CAPTURED))
    plan = openmla.plan(**planned, policy=policy, backend=setup.backend)
    right = openmla.decode(**given, plan=plan, backend=setup.backend)
    given["cache_seqlens"].copy_(torch.tensor(lengths))
    other = openmla.decode(**given, plan=plan, backend=setup.backend)
    kept = [request for request in range(4) if lengths[request] == CAPTURED[request]]
    same_bits([x[kept] for x in other], [x[kept] for x in right], "requests that kept their lengths")
    openmla.check_errors()
    given["cache_seqlens"].copy_(torch.tensor(CAPTURED))
    same_bits(openmla.decode(**given, plan=plan, backend=setup.backend), right, "the plan's own lengths again")
    assert not openmla.check_errors(), "faults without a reason"
    return {}


# name -> items(setup, only=number); the number beside it is how many the small form takes
SECTIONS: dict[str, Callable[..., list[Item]]] = {
    name: listed_items(name, make, small)
    for name, make, small in (
        ("matrix", matrix, 6), ("sparse", sparse, 3), ("fuzz", fuzz, 8), ("plans", plans, 1), ("repeats", repeats, 2), ("graphs", graphs, 5),
        ("invariance", invariance, 1), ("big", big, 2), ("border", border, 2), ("stale", stale, 2), ("host", host, 2),
        ("smallest", smallest, 2), ("sanitize", sanitize, 1),
    )
}  # fmt: skip
DEFAULT = tuple(name for name in SECTIONS if name != "smallest")
SHARDS = {"fuzz": 4, "matrix": 2, "sanitize": len(TOOLS), "graphs": 2}  # processes of a section
