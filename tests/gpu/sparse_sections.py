"""Sections of `prove_decode.py` about selected keys: sparse decode over fp8 and bf16 pages, sparse prefill over rows."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import decode_sparse
import prefill_sparse
import torch
from decode_items import Made, Setup, captured, is_light, same_bits

import openmla
from openmla.backends.cute.decode_sparse.config import SERVED
from openmla.core import counters
from openmla.core.faults import Fault
from openmla.core.layout import kv_layout
from openmla.ops import checks
from openmla.testing import budget, coverage
from openmla.testing.cases import Case
from openmla.testing.families import FAMILIES, WEIGHTS

FUZZ_CASES = 500  # of each operation
FILL = 70  # tokens for which the kernel over bf16 pages has a CTA each


def sparse(setup: Setup) -> Made:
    """Every layout that the Hopper kernel reads, with and without a second cache."""
    decode_sparse.CUDA = setup.device

    def run(build: Callable[[], Any]) -> Callable[[Setup], dict[str, Any]]:
        def call(setup: Setup) -> dict[str, Any]:
            fine, words = decode_sparse.through_the_api(build(), setup.backend)
            assert fine, words
            return {}

        return call

    return [
        (f"{layout}{' and a second cache' if has_extra else ''}: {title}", run(build))
        for layout, has_extra in SERVED
        for title, build in decode_sparse.cases(layout, has_extra)
    ]


def gather(setup: Setup) -> Made:
    """The cases of prefill_sparse.py through the public calls: rows, and bf16 pages, most of them with lists in pieces."""
    prefill_sparse.CUDA = setup.device

    def run(build: Callable[[], Any]) -> Callable[[Setup], dict[str, Any]]:
        return lambda setup: _gathered(build(), setup)

    return [
        (f"{form} d_qk {d_qk}: {title}", run(build))
        for form in ("rows", "pages")
        for d_qk in (576, 512)
        for title, build in prefill_sparse.cases(form, d_qk)
    ]


def _gathered(c: Any, setup: Setup) -> dict[str, Any]:
    o = c.operands
    options = {"softmax_scale": o.softmax_scale, "topk_length": o.topk_length, "attn_sink": o.attn_sink}
    openmla.check_errors()
    if c.form == "rows":
        out, max_logits, lse = openmla.sparse_prefill(o.q, o.kv, o.indices, **options, backend=setup.backend)
        o = o._replace(out=out, max_logits=max_logits, lse=lse)
    else:
        out, lse = openmla.sparse_decode(o.q, o.kv_cache, o.indices, **options, backend=setup.backend)
        o = o._replace(out=out, lse=lse)
    fine, words = prefill_sparse.judged(SimpleNamespace(**{**vars(c), "operands": o}))
    assert fine, words
    expected = (Fault.INDEX_OUT_OF_RANGE,) if c.is_hostile else ()
    found = openmla.check_errors()
    assert found == expected, f"faults {found}, expected {expected}"
    return {}


# ------------------------------------------------------------------------------------------- fuzz


def real_case(seed: int, op: str) -> Case:
    """The fuzz case of that seed: columns, heads and list lengths of real kernels."""
    pick = random.Random(f"real {op} {seed}")
    d_qk, layout, extra = 576, "", 0
    batch, s_q = (1,), pick.choice((1, 2, 5, 9, 140))
    if op == "sparse_decode":
        layout = pick.choice(("fp8_656", "fp8_656", "fp8_656", "fp8_584", "fp8_584", "fp8_528", "fp8_528_mx", "", ""))
        if layout in ("fp8_656", "fp8_584", "fp8_528_mx") and (layout == "fp8_528_mx" or pick.random() < 0.25):
            extra = pick.choice((1, 64, 200, 700))
        batch = (pick.choice((1, 2, 3, 5)) if layout else FILL if seed % 2 else 1 + seed % 6,)
        s_q = pick.choices((1, 2, 3), (6, 3, 1))[0]
    lists = (1, 2, 63, 64, 65, 128, 200, 333, 700)  # the long ones of few tokens: the oracle gathers every key
    lists = lists[:-2] if batch[0] * s_q >= FILL else lists
    if layout:
        d_qk = kv_layout(layout).d_qk
    elif pick.random() < 0.3:
        d_qk = 512
    return Case(
        op=op, seed=seed, family=pick.choices(FAMILIES, WEIGHTS)[0], dtype=torch.bfloat16, h_kv=1, d_qk=d_qk, d_v=512,
        h_q=pick.choice((1, 8, 16, 17, 64, 64, 128, 128)), softmax_scale=d_qk**-0.5 * pick.choice((1.0, 1.0, 1.73)),
        seqlens_q=(s_q,) * batch[0], seqlens_k=(pick.choice((1, 64, 65, 500, 1500)),), layout=layout,
        page_size=pick.choice((64, 64, 2, 16, 128)), topk=pick.choice(lists),
        has_topk_length=pick.random() < 0.5, extra_layout=layout if extra else "", extra_page_size=pick.choice((2, 64)),
        extra_topk=extra, has_sink=pick.random() < 0.4, invalid_share=pick.choices((0.0, 0.1, 0.5, 1.0), (4, 6, 3, 1))[0],
        is_varlen=op == "sparse_decode" and pick.random() < 0.3, nan_tokens=pick.random() < 0.05,
    )  # fmt: skip


def sparse_fuzz(setup: Setup) -> Made:
    """Seeded cases of both operations."""

    def check(op: str, seed: int) -> Callable[[Setup], dict[str, Any]]:
        return lambda setup: {"ran": [judge(real_case(seed, op), setup)]}

    seeds = [(op, seed) for seed in range(FUZZ_CASES) for op in ("sparse_decode", "sparse_prefill")]
    return [(f"{op} {seed}", check(op, seed)) for op, seed in seeds]


def call_of(
    case: Case, host: dict[str, Any], given: dict[str, Any], setup: Setup
) -> Callable[[], tuple[torch.Tensor, ...]]:
    """The public call: (out, lse) or (out, max_logits, lse)."""
    arguments = coverage.arguments_on(case.op, host, given)
    return lambda: getattr(openmla, case.op)(**arguments, backend=setup.backend)


def require(case: Case, got: tuple[torch.Tensor, ...], given: dict[str, Any], where: str) -> None:
    """The tolerance rule on a result of `call_of`."""
    largest = got[1] if len(got) == 3 else None
    report = budget.check(got[0], got[-1], case.golden(given), dtype=case.dtype, max_logits=largest)
    report.require(f"{where}\n  {case}")


def judge(case: Case, setup: Setup) -> str:
    """One case against the oracle where it ran, with the faults that its indices deserve; returns who ran."""
    host = case.tensors()
    given = coverage.moved(host, setup.device)
    before = {id(each): each.calls for each in counters.tallies()}
    got = call_of(case, host, given, setup)()
    found, expected = set(openmla.check_errors()), set()
    here = is_light(case)
    require(case, tuple(x.cpu() for x in got) if here else got, host if here else given, case.op)
    for prefix in ("", "extra_"):
        indices, length = host.get(f"{prefix}indices"), host.get(f"{prefix}topk_length")
        if indices is not None:
            cache = host[f"{prefix}kv_cache"] if "kv_cache" in host else host["kv"]
            slots = cache.shape[0] * (cache.shape[1] if "kv_cache" in host else 1)
            expected |= {each.fault for each in checks._selected(case.op, prefix, indices, length, slots)}
    assert found == expected, f"faults {found}, expected {expected}\n  {case}"
    ran = [f"{each.backend}/{each.kernel}" for each in counters.tallies() if each.calls > before.get(id(each), 0)]
    return f"{case.op} {ran[0]}"


# ------------------------------------------------------------------------------------------- graphs, repeats

KINDS: tuple[tuple[str, str, int, int], ...] = (  # operation, layout, second list, heads
    ("sparse_decode", "fp8_656", 0, 128), ("sparse_decode", "fp8_656", 0, 64), ("sparse_decode", "fp8_584", 300, 64),
    ("sparse_decode", "fp8_528", 0, 128), ("sparse_decode", "", 0, 128), ("sparse_decode", "", 0, 64),
    ("sparse_decode", "bf16_576", 0, 128), ("sparse_decode", "bf16_512", 0, 64),  # few tokens: lists in pieces
    ("sparse_prefill", "", 0, 128), ("sparse_prefill", "", 0, 64), ("sparse_prefill", "", 0, 16),
)  # fmt: skip
CHANGES = ("indices", "lengths", "absent", "queries")


def plain(op: str, layout: str, extra: int, h_q: int, *, d_qk: int = 0) -> Case:
    """One call of that kind with lists of 600 and lengths."""
    d_qk = d_qk or (kv_layout(layout).d_qk if layout else 576)
    tokens = 4 if layout else FILL
    return Case(
        op=op, seed=1, family="unit", dtype=torch.bfloat16, h_q=h_q, h_kv=1, d_qk=d_qk, d_v=512, softmax_scale=d_qk**-0.5,
        seqlens_q=(1,) * tokens if op == "sparse_decode" else (tokens,), seqlens_k=(1500,), layout=layout, page_size=64,
        topk=600, has_topk_length=True, extra_layout=layout if extra else "", extra_page_size=2, extra_topk=extra,
    )  # fmt: skip


def sparse_graphs(setup: Setup) -> Made:
    """Each kind of call, four ways to change what a graph reads."""

    def check(case: Case, change: str) -> Callable[[Setup], dict[str, Any]]:
        return lambda setup: _replay(setup, case, change)

    return [
        (f"{op} {layout or 'bf16'} {extra} h_q {h_q}, {change}", check(plain(op, layout, extra, h_q), change))
        for op, layout, extra, h_q in KINDS
        for change in CHANGES
    ]


def _replay(setup: Setup, case: Case, change: str) -> dict[str, Any]:
    host = case.tensors()
    given = coverage.moved(host, setup.device)
    indices, lengths, topk = given["indices"], given["topk_length"], case.topk
    lengths.fill_(topk)
    indices.clamp_(0, 1400)  # what lay behind the lengths was garbage
    call = call_of(case, host, given, setup)
    replay = captured(call, setup.is_cuda)
    generator = torch.Generator().manual_seed(1)
    before = None
    for number in range(4):
        if number and change == "indices":
            indices.copy_(indices.roll(1, 0).flip(-1))
        elif number and change == "lengths":
            lengths.copy_(torch.randint(0, topk + 1, lengths.shape, generator=generator))
        elif number and change == "absent":
            indices.masked_fill_((torch.rand(indices.shape, generator=generator) < 0.3).to(setup.device), -1)
        elif number:
            given["q"].copy_(given["q"].roll(number, -1))
        got = tuple(tensor.clone() for tensor in replay())
        same_bits(got, call(), f"replay {number}: graph against call")
        if number == 3:
            require(case, got, given, f"replay {number}")
        assert before is None or not torch.equal(before, got[0]), f"replay {number}: nothing new"
        before = got[0]
    openmla.check_errors()
    return {}
