"""What `prove_decode.py` proves: sections of items. An item returns what it measured, or raises.

matrix       dense decode, every pair of options of a call: dtype, d_qk, h_q 1 to 128, h_kv, s_q, varlen, causal, page sizes, window,
             sink, lengths (empty, negative, beyond the table), policy, LSE, out=, plan, workspace; strided hostile views,
             NaN in every KV byte that no row reaches, against the fp64 oracle under the tolerance rule;
             first what the backend has a kernel for, then everything
sparse       token-sparse decode: the cases of decode_sparse.py for every variant that ships
gather       the kernel over bf16 rows and pages: the cases of prefill_sparse.py
fuzz         3,000 seeded cases of dense decode at the sizes of real kernels
codes        300 of dense decode over quantised pages
sparse_fuzz  1,000 of sparse decode and sparse prefill
poison       six contents in every place of five calls that may not matter: bits must not change
hostile      64 hostile values in each of five calls, a process for each kernel: it lives, other requests keep their bits, and
             the value is named
plans        device plans against `plan_decode`, field by field
repeats      100,800 runs whose bits must not change, in graphs and without, with other work on the card
graphs       50 CUDA-graph scenarios of dense decode: lengths, queries and tables change between replays; bits as without
sparse_graphs  44 of sparse decode and sparse prefill
invariance   batch_invariant, 300 batches: a request's bits alone, permuted, among more requests, and inside a graph
big          KV pools beyond 2^32 elements, packed and strided; 70,000 requests; a million keys
sparse_big   a quantised pool beyond 2^32 bytes, rows beyond 2^32 elements, 70,000 tokens
threads      eight host threads, each on a stream of its own
border       flash_mla's interface
stale        a plan whose lengths have changed: requests that kept theirs keep their bits, and the plan stays usable
sanitize     compute-sanitizer's four tools over the smallest cases; sanitize_more, if asked for: rings that wrap, one block of
             64 rows, lists in pieces, e4m3 queries
faults       what goes wrong on purpose: the sections of reliability_sections.py, each in a process of its own
soak         random calls for a while: nothing drifts, leaks or goes unexplained
host         time from the Python call to the launch
modes        what validation modes and observers cost
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from big_sections import big, sparse_big
from decode_items import (
    LIST,
    Differences,
    Item,
    Made,
    NotRunError,
    Setup,
    bits,
    captured,
    dense,
    is_light,
    listed_items,
    same_bits,
)
from decode_machine import FAULTS, TOOLS, faults, host, modes, more, sanitize, smallest, soak
from hostile_sections import SUBJECTS, hostile, poison
from sparse_sections import gather, plain, sparse, sparse_fuzz, sparse_graphs

import openmla
from openmla import flash_mla
from openmla.backends import select
from openmla.core.layout import kv_layout
from openmla.core.target import Target
from openmla.split.schedule import plan_decode
from openmla.testing import budget, coverage
from openmla.testing.cases import Case, native_arguments

__all__ = ["DEFAULT", "LANES", "REQUIRED", "SECTIONS", "NotRunError", "Setup"]

FUZZ_CASES = 3000
CODES_CASES = 300
REPEATS = 8400  # of each of twelve problems
EAGER = 400  # of those without a graph
PER_GRAPH = 20


# ------------------------------------------------------------------------------------------- matrix, fuzz, plans


def _judged(case: Case, call: coverage.Call) -> Callable[[Setup], dict[str, Any]]:
    def run(setup: Setup) -> dict[str, Any]:
        here = is_light(case)
        return {"ran": [coverage.judge(case, call, backend=setup.backend, device=setup.device, is_golden_here=here)]}

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
    made += [
        (dense((12400, 0, 64, 8200), h_q, s_q=s_q, no_length=20_000), chunked) for h_q in (16, 128) for s_q in (1, 2)
    ]
    return [(f"{call} {case}", _judged(case, call)) for case, call in dict.fromkeys(made)]


def fuzz(setup: Setup) -> Made:
    """Seeds; an item's number is its seed."""

    def seeded(seed: int) -> Callable[[Setup], dict[str, Any]]:
        return lambda setup: _judged(*coverage.draw(seed))(setup)

    return [("seed", seeded(seed)) for seed in range(FUZZ_CASES)]


def codes(setup: Setup) -> Made:
    """Seeds of dense decode over quantised pages."""

    def seeded(seed: int) -> Callable[[Setup], dict[str, Any]]:
        return lambda setup: _judged(*_quantised(seed))(setup)

    return [("seed", seeded(seed)) for seed in range(CODES_CASES)]


def _quantised(seed: int) -> tuple[Case, coverage.Call]:
    """A fuzz case over pages of codes, with as many heads as there are kernels for."""
    pick = random.Random(f"codes {seed}")
    case, call = coverage.draw(seed)
    while case.is_varlen:
        case, call = coverage.draw(pick.randrange(10**6))
    layout = kv_layout(pick.choice(("fp8_656", "fp8_656", "fp8_528")))
    changed = {"h_q": pick.choice((1, 8, 16, 16, 32)), "seqlens_q": tuple(min(tokens, 2) for tokens in case.seqlens_q)}
    changed |= {"layout": layout.name, "d_qk": layout.d_qk, "softmax_scale": layout.d_qk**-0.5}
    return replace(case, dtype=torch.bfloat16, h_kv=1, page_size=64, window=0, **changed), call


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
    """Twelve problems; plans of the dense ones split, deal whole requests, cut chunks."""
    problems = [
        dense((4900,), 16), dense((4900,), 128), dense((700, 0, 64, 3000), 16, s_q=2), dense((700, 0, 64, 3000), 128),
        dense((1300,) * 40, 128, s_q=2), dense((500,) * 128, 16), dense((1,), 1), dense((2000, 70), 8, dtype=torch.float16),
        dense((900, 4500), 128, dtype=torch.float16), dense((333,) * 70, 128), plain("sparse_decode", "fp8_656", 0, 128),
        plain("sparse_prefill", "", 0, 128),
    ]  # fmt: skip

    def check(case: Case, options: dict[str, Any]) -> Callable[[Setup], dict[str, Any]]:
        return lambda setup: _repeat(setup, case, options)

    made: Made = []
    for number, case in enumerate(problems):
        policy = ("balanced", "batch_invariant")[number % 3 == 2]
        options = {"policy": policy} if case.op == "decode" else {}
        made.append((f"{case.op} {options} h_q {case.h_q} {len(case.seqlens_q)} requests", check(case, options)))
    return made


def _repeat(setup: Setup, case: Case, options: dict[str, Any]) -> dict[str, Any]:
    """Without a graph first, then twenty calls to a graph; who differs is counted on the device."""
    given = native_arguments(case.op, coverage.moved(case.tensors(), setup.device))
    first = [tensor.clone() for tensor in _operation(case)(**given, **options, backend=setup.backend)]
    differing = torch.zeros((), dtype=torch.int64, device=setup.device)
    noise = torch.randn(1024, 1024, device=setup.device, dtype=torch.bfloat16) if setup.is_cuda else None
    beside = torch.cuda.Stream() if setup.is_cuda else None

    def again() -> tuple[torch.Tensor, ...]:
        results = _operation(case)(**given, **options, backend=setup.backend)
        for x, y in zip(results, first, strict=True):
            differing.add_((bits(x) != bits(y)).any())
        return results

    def turn(number: int, call: Callable[[], Any]) -> None:
        nonlocal noise
        if noise is not None and number % 7 == 0:
            with torch.cuda.stream(beside):
                noise = noise @ noise * 0.01
        call()

    eager = 5 if setup.is_small else EAGER
    for number in range(eager):
        turn(number, again)
    replays = (REPEATS - EAGER) // PER_GRAPH if setup.is_cuda and not setup.is_small else 0
    if replays:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(PER_GRAPH):
                again()
        for number in range(replays):
            turn(number, graph.replay)
    count = eager + replays * PER_GRAPH
    assert not int(differing), f"bits changed in {int(differing)} of {count * len(first)} results"
    return {"counts": count}


def _operation(case: Case) -> Callable[..., tuple[torch.Tensor, ...]]:
    operation: Callable[..., tuple[torch.Tensor, ...]] = getattr(openmla, case.op)
    return operation


def threads(setup: Setup) -> Made:
    """Four mixes of calls."""

    def check(number: int) -> Callable[[Setup], dict[str, Any]]:
        return lambda setup: _beside(setup, number)

    return [(f"mix {number}", check(number)) for number in range(4)]


def _beside(setup: Setup, number: int) -> dict[str, Any]:
    """Eight threads call at once; each result has the bits that it has alone."""
    shapes = [(16, (700, 64)), (128, (4900,)), (128, (65, 3000, 1)), (16, (500,) * 30)]
    cases = [dense(lengths, h_q, seed=number) for h_q, lengths in shapes]
    given = [native_arguments("decode", coverage.moved(case.tensors(), setup.device)) for case in cases]
    want = [[x.clone() for x in openmla.decode(**each, backend=setup.backend)] for each in given]
    wrong: list[str] = []

    def work(thread: int) -> None:
        stream = torch.cuda.Stream() if setup.is_cuda else None
        try:
            with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
                for turn in range(2 if setup.is_small else 50):
                    which = (thread + turn) % len(cases)
                    got = openmla.decode(**given[which], backend=setup.backend)
                    if turn % 10 == 0:
                        same_bits(got, want[which], f"thread {thread}, call {turn}")
        except Exception as error:
            wrong.append(f"{type(error).__name__}: {error}")

    if setup.is_cuda:
        torch.cuda.synchronize()
    running = [threading.Thread(target=work, args=(thread,)) for thread in range(8)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert not wrong, "\n".join(wrong)
    return {}


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


def _replay(setup: Setup, h_q: int, form: str, policy: str, change: str) -> dict[str, Any]:
    case = dense((CAPACITY,) * 4, h_q, s_q=2, seed=len(change))
    given = coverage.moved(case.tensors(), setup.device)
    arguments = native_arguments("decode", given)
    lengths, pages = given["cache_seqlens"], given["block_table"]
    lengths.copy_(torch.tensor(CAPTURED))
    call = _caller(arguments, form, policy, setup.backend)
    replay = captured(call, setup.is_cuda)
    before = None
    for number, state in enumerate((CAPTURED, *STATES[change])):
        lengths.copy_(torch.tensor(state))
        given["q"].copy_(given["q"].roll(number, -1))
        if change == "table":
            pages.copy_(pages.roll(1, 0))
        got = [tensor.clone() for tensor in replay()]
        where = f"replay {number}, lengths {state}"
        same_bits(got, call(), f"{where}: graph against call")
        if number == len(STATES[change]):
            budget.check(got[0], got[1], case.golden(given), dtype=case.dtype).require(where)
        assert before is None or not any(state) or not torch.equal(bits(before), bits(got[0])), f"{where}: nothing new"
        before = got[0]
    assert not openmla.check_errors(), "faults without a reason"
    return {}


def invariance(setup: Setup) -> Made:
    """Heads, query tokens, dtypes, calls and graphs; fifteen batches of lengths around the ends of chunks and tiles."""

    def check(
        h_q: int, s_q: int, dtype: torch.dtype, has_graph: bool, lengths: LIST
    ) -> Callable[[Setup], dict[str, Any]]:
        return lambda setup: _invariant(setup, h_q, s_q, dtype, has_graph, lengths)

    kinds = [(1, 1), (16, 1), (16, 2), (128, 1), (128, 2)]
    return [
        (
            f"h_q {h_q} s_q {s_q} {dtype} {'graph' if has_graph else 'call'} {lengths}",
            check(h_q, s_q, dtype, has_graph, lengths),
        )
        for lengths in _batches(15)
        for h_q, s_q in kinds
        for dtype in (torch.bfloat16, torch.float16)
        for has_graph in (False, True)
    ]


def _batches(count: int) -> list[LIST]:
    """The first one has several chunks; the others draw lengths within a tile of a chunk's end."""
    found: list[LIST] = [(16390, 70, 0, 8192, 8193, 64)]
    pick = random.Random("invariance")
    ends = [chunk * 4096 + step for chunk in (1, 2, 3) for step in (-64, -1, 0, 1, 63, 64)]
    while len(found) < count:
        found.append((pick.choice(ends), pick.choice(ends), pick.choice((0, 1, 63, 64, 65)), pick.randint(1, 5000)))
    return found


def _invariant(setup: Setup, h_q: int, s_q: int, dtype: torch.dtype, has_graph: bool, lengths: LIST) -> dict[str, Any]:
    if setup.is_small:
        lengths = lengths[:3]
    case = dense(lengths, h_q, s_q=s_q, dtype=dtype, no_length=20_000)
    given = native_arguments("decode", coverage.moved(case.tensors(), setup.device))
    rows = ("q", "block_table", "cache_seqlens")

    def of(requests: list[int]) -> tuple[torch.Tensor, ...]:
        chosen = {**given, **{name: given[name][requests].clone() for name in rows}}
        call = _caller(chosen, "decode", "batch_invariant", setup.backend)
        return captured(call, setup.is_cuda)() if has_graph else call()

    everybody = list(range(len(lengths)))
    full = [tensor.clone() for tensor in of(everybody)]
    shuffled = everybody[::-1]
    found = Differences()
    found.add(of(shuffled), [x[shuffled] for x in full], "permuted")
    many = (everybody * 12)[: 12 * len(everybody)] if not setup.is_small else everybody * 2
    found.add(of(many), [x[many] for x in full], f"among {len(many)} requests")
    assert not openmla.check_errors(), "faults without a reason"
    for request in everybody:
        found.add(of([request]), [x[[request]] for x in full], f"request {request} ({lengths[request]} keys) alone")
    found.require()
    return {}


# ------------------------------------------------------------------------------------------- border, stale


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
        ("soak", soak, 1), ("matrix", matrix, 6), ("fuzz", fuzz, 8), ("codes", codes, 3), ("sparse_fuzz", sparse_fuzz, 8), ("sparse", sparse, 3),
        ("gather", gather, 3), ("sanitize", sanitize, 1), ("faults", faults, 1), ("invariance", invariance, 1),
        ("hostile", hostile, 10), ("poison", poison, 5), ("repeats", repeats, 2), ("graphs", graphs, 5),
        ("sparse_graphs", sparse_graphs, 3), ("big", big, 3), ("sparse_big", sparse_big, 3), ("plans", plans, 1),
        ("threads", threads, 1), ("border", border, 2), ("stale", stale, 2), ("host", host, 2), ("modes", modes, 1),
        ("smallest", smallest, 2), ("more", more, 2), ("sanitize_more", lambda setup: sanitize(setup, "more"), 1),
    )
}  # fmt: skip
DEFAULT = tuple(name for name in SECTIONS if name not in ("smallest", "more", "sanitize_more"))
# Processes that share the device, by what they are for: (sections, how many). What an item of `programs` starts is a process
# of its own; `hostile` has one for each kernel. The items of every section are dealt over the processes of its lane.
LANES: dict[str, tuple[tuple[str, ...], int]] = {
    "soak": (("soak",), 1),
    "programs": (("faults", "sanitize", "sanitize_more"), 6),
    "calls": (
        ("big", "sparse_big", "repeats", "gather", "plans", "threads", "border", "stale", "sparse", "poison", "invariance",
         "graphs", "sparse_graphs", "codes", "matrix", "sparse_fuzz", "fuzz", "smallest", "more"),
        7,
    ),
    "hostile": (("hostile",), len(SUBJECTS)),
    "alone": (("host", "modes"), 1),
}  # fmt: skip
ALONE = "alone"  # measures time, when the others are done
# What a record must reach before it is signed off: items that passed, or what they counted.
REQUIRED = {
    "matrix": 230, "sparse": 80, "gather": 90, "fuzz": 2500, "codes": 200, "sparse_fuzz": 900, "poison": 120, "hostile": 320, "plans": 12,
    "repeats": 100_000, "graphs": 50, "sparse_graphs": 40, "invariance": 300, "big": 6, "sparse_big": 3, "threads": 4,
    "border": 12, "stale": 8, "sanitize": len(TOOLS), "faults": len(FAULTS), "soak": 1, "modes": 1, "host": 4,
}  # fmt: skip
