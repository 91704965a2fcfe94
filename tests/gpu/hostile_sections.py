"""Sections of `prove_decode.py` about bytes and numbers that must not matter: poison, and hostile values.

Five calls, one for each Hopper kernel. In each, request 1 may be spoiled; the others must keep their bits whatever is done
to it, the process must live, and `openmla.check_errors()` and OPENMLA_CHECKS=device must say what was done.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from decode_items import Differences, Made, Setup, same_bits

import openmla
from openmla.core import env, faults
from openmla.core.faults import Fault
from openmla.core.layout import kv_layout
from openmla.reference.quant import write_rows

VICTIM = 1
LOW, HIGH = -(2**31), 2**31 - 1
IDS = (LOW, LOW + 1, -1000, -2, 2**20, 2**24, 2**30, HIGH - 1, HIGH)  # and the first two behind the end
NAN, INF = float("nan"), float("inf")
Views = Callable[[], list[torch.Tensor]]


@dataclass(frozen=True)
class Pattern:
    """Something done to the victim. A check must find `value` in `tensor`, in column `place` if given; no fault: it is legal."""

    name: str
    spoil: Callable[[], Any]
    fault: Fault | None = None
    tensor: str = ""
    place: int | None = None
    value: int = 0
    changes_the_plan: bool = False


@dataclass
class Subject:
    """A call on tensors that tests write into and put back."""

    name: str
    call: Callable[..., tuple[torch.Tensor, ...]]
    tensors: dict[str, torch.Tensor]
    nobody: dict[str, Views]  # place -> views that the result must not depend on
    patterns: list[Pattern] = field(default_factory=list)
    saved: dict[str, torch.Tensor] = field(default_factory=dict)

    def settle(self) -> Subject:
        """Remember the tensors as they are."""
        self.saved = {name: tensor.clone() for name, tensor in self.tensors.items()}
        return self

    def restore(self) -> None:
        """As they were."""
        for name, tensor in self.tensors.items():
            tensor.copy_(self.saved[name])

    def results(self, **options: Any) -> list[torch.Tensor]:
        """Copies of what the call returns."""
        return [tensor.clone() for tensor in self.call(**options)]


def _filled(setup: Setup, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(torch.bfloat16).to(setup.device)


def _apart(content: torch.Tensor, dim: int, gap: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(the same numbers with a gap behind dimension `dim`, the gap)."""
    wide = list(content.shape)
    wide[dim] += gap
    pool = content.new_zeros(wide)
    view = pool.narrow(dim, 0, content.shape[dim])
    view.copy_(content)
    return view, pool.narrow(dim, content.shape[dim], gap)


def _freed(setup: Setup) -> Views:
    """Memory that PyTorch's allocator will hand out again."""
    sizes = (1 << 12, 1 << 16, 1 << 20, 1 << 22, 1 << 24) if setup.is_cuda else (1 << 12, 1 << 16)
    return lambda: [torch.empty(size // 2, dtype=torch.bfloat16, device=setup.device) for size in sizes]


def _dense(setup: Setup, h_q: int) -> Subject:
    """Four requests on pages that lie apart."""
    lengths, columns = (300, 257, 65, 700), 12
    used = [-(-length // 64) for length in lengths]
    pages = sum(used)
    kv, between = _apart(_filled(setup, (pages + 5, 64, 1, 576), 1), 1, 16)
    q, beside = _apart(_filled(setup, (4, 1, h_q, 576), 2), 2, 1)
    table = torch.zeros(4, columns, dtype=torch.int32)
    order, first = torch.randperm(pages, generator=torch.Generator().manual_seed(3)), 0
    for request, count in enumerate(used):
        table[request, :count] = order[first : first + count]
        first += count
    table = table.to(setup.device)
    seqlens = torch.tensor(lengths, dtype=torch.int32, device=setup.device)
    given = {"q": q, "kv_cache": kv, "block_table": table, "cache_seqlens": seqlens, "backend": setup.backend}
    pool = torch.zeros(4, 1, h_q, 528, dtype=torch.bfloat16, device=setup.device)
    scratch = torch.zeros(
        max(openmla.workspace_bytes(**given, policy=policy) for policy in ("balanced", "batch_invariant")),
        dtype=torch.uint8, device=setup.device,
    )  # fmt: skip

    def call(policy: str = "balanced") -> tuple[torch.Tensor, ...]:
        return openmla.decode(**given, out=pool[..., :512], workspace=scratch, policy=policy)

    tails = [kv[int(order[sum(used[: r + 1]) - 1]), n % 64 :] for r, n in enumerate(lengths) if n % 64]
    nobody = {
        "pages of nobody": lambda: [kv[pages:]], "behind the length": lambda: tails, "between pages": lambda: [between],
        "between heads": lambda: [beside], "out": lambda: [pool], "scratch": lambda: [scratch], "freed memory": _freed(setup),
        "table behind the length": lambda: [table[r, count:] for r, count in enumerate(used)],
    }  # fmt: skip
    tensors = {"kv": kv, "between": between, "q": q, "beside": beside, "table": table, "lengths": seqlens, "pool": pool}
    subject = Subject(f"decode {h_q} heads", call, {**tensors, "scratch": scratch}, nobody).settle()
    row, mine = table[VICTIM], used[VICTIM]
    for value in (*IDS, -1, pages + 5, pages + 6):
        for place in (0, 2, mine - 1, None):
            where = slice(0, mine) if place is None else slice(place, place + 1)
            name = f"{'every page' if place is None else f'page {place}'} is {value}"
            spoil = lambda value=value, where=where: row[where].fill_(value)  # noqa: E731
            subject.patterns.append(Pattern(name, spoil, Fault.PAGE_OUT_OF_RANGE, "block_table", place, value))
    for value in (LOW, -1, 64 * columns + 1, 10**6, 2**24, 2**30, HIGH - 63, HIGH):
        fault = Fault.LENGTH_NEGATIVE if value < 0 else Fault.LENGTH_OVER_CAPACITY
        spoil = lambda value=value: seqlens[VICTIM].fill_(value)  # noqa: E731
        subject.patterns.append(
            Pattern(f"length {value}", spoil, fault, "cache_seqlens", None, value, changes_the_plan=True)
        )
    own = kv[row[:mine].long().tolist()[0]]
    subject.patterns += [
        Pattern("every page the same", lambda: row[:mine].copy_(row[0].clone().expand(mine))),
        Pattern("pages of another request", lambda: row[:mine].copy_(table[3, :mine])),
        Pattern("garbage behind the length", lambda: row[mine:].fill_(HIGH)),
        Pattern("NaN queries", lambda: q[VICTIM].fill_(NAN)),
        Pattern("infinite queries", lambda: q[VICTIM].fill_(INF)),
        Pattern("a NaN key", lambda: own[0].fill_(NAN)),
        Pattern("keys of 3e38", lambda: own.fill_(3e38)),
        Pattern("a length of 0", lambda: seqlens[VICTIM].fill_(0), changes_the_plan=True),
    ]
    return subject


def _selecting(setup: Setup, name: str) -> Subject:
    """Tokens that select: from fp8 pages, from bf16 pages (enough tokens that no list is split), from rows."""
    topk, reachable, h_q = 300, 1900, 64 if name != "rows" else 128
    tokens = 70 if name == "bf16 pages" else 4
    q, beside = _apart(_filled(setup, (tokens, 1, h_q, 576), 2), 2, 1)
    generator = torch.Generator().manual_seed(4)
    slots = 2048
    indices = torch.randint(0, reachable, (tokens, 1, topk), generator=generator).to(torch.int32).to(setup.device)
    counts = (300, 257, 65, 300)
    lengths = torch.tensor([counts[token % 4] for token in range(tokens)], dtype=torch.int32, device=setup.device)
    keys = _filled(setup, (slots, 1, 576), 5)
    pool = torch.zeros(tokens, 1, h_q, 528, dtype=torch.bfloat16, device=setup.device)
    if name == "fp8 pages":
        layout = kv_layout("fp8_656")
        packed = layout.empty_cache(slots // 64, 64, device=setup.device)
        write_rows(packed, layout, torch.arange(slots, device=setup.device), keys[:, 0])
        kv, between = _apart(packed, 1, 2)
    elif name == "bf16 pages":
        kv, between = _apart(keys.view(slots // 64, 64, 1, 576), 1, 16)
    else:
        kv, between = _apart(keys, 2, 64)
    options = {"topk_length": lengths, "backend": setup.backend}

    def call(**_: Any) -> tuple[torch.Tensor, ...]:
        if name == "rows":
            return openmla.sparse_prefill(q[:, 0], kv, indices, out=pool[:, 0, :, :512], **options)
        return openmla.sparse_decode(
            q, kv, indices, kv_layout="fp8_656" if name == "fp8 pages" else None, out=pool[..., :512], **options
        )

    last = kv[reachable // 64 + 1 :] if name != "rows" else kv[reachable:]
    behind = [indices[token, 0, counts[token % 4] :] for token in range(tokens) if counts[token % 4] < topk]
    nobody = {
        "slots of nobody": lambda: [last], "between slots": lambda: [between], "between heads": lambda: [beside],
        "indices behind the length": lambda: behind, "out": lambda: [pool], "freed memory": _freed(setup),
    }  # fmt: skip
    tensors = {
        "kv": kv,
        "between": between,
        "q": q,
        "beside": beside,
        "indices": indices,
        "lengths": lengths,
        "pool": pool,
    }
    subject = Subject({"rows": "sparse prefill"}.get(name, f"sparse decode, {name}"), call, tensors, nobody).settle()
    row, mine = indices[VICTIM, 0], counts[VICTIM]
    for value in (*IDS, slots, slots + 1):
        for place in (0, 63, 64, mine - 1, None):
            where = slice(0, mine) if place is None else slice(place, place + 1)
            title = f"{'every index' if place is None else f'index {place}'} is {value}"
            spoil = lambda value=value, where=where: row[where].fill_(value)  # noqa: E731
            subject.patterns.append(Pattern(title, spoil, Fault.INDEX_OUT_OF_RANGE, "indices", place, value))
    for value in (LOW, -1, topk + 1, 2**24, HIGH):
        spoil = lambda value=value: lengths[VICTIM].fill_(value)  # noqa: E731
        subject.patterns.append(
            Pattern(f"topk_length {value}", spoil, Fault.TOPK_LENGTH_OUT_OF_RANGE, "topk_length", None, value)
        )
    subject.patterns += [
        Pattern("nothing selected", lambda: row.fill_(-1)),
        Pattern("one slot, many times", lambda: row.fill_(7)),
        Pattern("garbage behind the length", lambda: row[mine:].fill_(HIGH)),
        Pattern("NaN queries", lambda: q[VICTIM].fill_(NAN)),
    ]
    return subject


SUBJECTS: tuple[tuple[str, Callable[[Setup], Subject]], ...] = (
    ("decode 16 heads", lambda setup: _dense(setup, 16)),
    ("decode 128 heads", lambda setup: _dense(setup, 128)),
    ("sparse decode, fp8 pages", lambda setup: _selecting(setup, "fp8 pages")),
    ("sparse decode, bf16 pages", lambda setup: _selecting(setup, "bf16 pages")),
    ("sparse prefill", lambda setup: _selecting(setup, "rows")),
)
PATTERNS = 64  # of each
POISONS = ("NaN", "inf", "-inf", "3e38", "0xFF", "another request's")


@cache
def _subject(setup: Setup, number: int) -> Subject:
    return SUBJECTS[number][1](setup)


def _poison(view: torch.Tensor, kind: str, live: torch.Tensor) -> None:
    """Fill a view: numbers, the bytes of a quantised format, or ids."""
    if view.dtype == torch.int32:
        ids = dict(zip(POISONS, (-1, LOW, HIGH, 2_147_480_000, 2**30, 0), strict=True))
        view.fill_(ids[kind])
    elif kind == "another request's":
        source = live.flatten().view(view.dtype) if live.dtype != view.dtype else live.flatten()
        view.copy_(source.repeat(-(-view.numel() // source.numel()))[: view.numel()].view(view.shape))
    elif view.dtype == torch.uint8:
        view.fill_({"NaN": 0x7F, "inf": 0x7E, "-inf": 0xFE, "3e38": 0x80, "0xFF": 0xFF}[kind])
    elif kind == "0xFF":
        view.view(torch.int16).fill_(-1)
    else:
        view.fill_(float(kind))


def poison(setup: Setup) -> Made:
    """Every place of every call in which nothing may matter, with six contents each."""

    def check(number: int, place: int) -> Callable[[Setup], dict[str, Any]]:
        return lambda setup: _check_poison(setup, number, place)

    places = (8, 8, 6, 6, 6)
    return [
        (f"{name}, place {place}", check(number, place))
        for number, (name, _) in enumerate(SUBJECTS)
        for place in range(places[number])
    ]


def _check_poison(setup: Setup, number: int, place: int) -> dict[str, Any]:
    subject = _subject(setup, number)
    openmla.check_errors()
    want = subject.results()
    name, views = list(subject.nobody.items())[place]
    found = Differences()
    for kind in POISONS:
        for view in views():
            _poison(view, kind, subject.saved["kv"][:1])
        del view
        found.add(subject.results(), want, f"{kind} in {name}")
        subject.restore()
    found.require()
    assert not openmla.check_errors(), "faults without a reason"
    return {"counts": len(POISONS)}


def hostile(setup: Setup) -> Made:
    """64 things done to one request of each call. Dealt so that five processes have one kernel each."""

    def check(number: int, pattern: int) -> Callable[[Setup], dict[str, Any]]:
        return lambda setup: _check_hostile(setup, number, pattern)

    return [
        (f"{name}, pattern {pattern}", check(number, pattern))
        for pattern in range(PATTERNS)
        for number, (name, _) in enumerate(SUBJECTS)
    ]


def _check_hostile(setup: Setup, number: int, index: int) -> dict[str, Any]:
    subject = _subject(setup, number)
    pattern = subject.patterns[index]
    # Other lengths make another plan, and another plan other bits, except where a row does not depend on its mates.
    options = {"policy": "batch_invariant" if pattern.changes_the_plan else "balanced"}
    openmla.check_errors()
    want = subject.results(**options)
    pattern.spoil()
    got = subject.results(**options)
    others = [each for each in range(want[0].shape[0]) if each != VICTIM]
    what = f"{subject.name}: {pattern.name}"
    try:
        same_bits([x[others] for x in got], [x[others] for x in want], what)
        expected = () if pattern.fault is None else (pattern.fault,)
        assert openmla.check_errors() == expected, f"{what}: faults, expected {expected}"
        if pattern.fault is not None:
            with _checking("device"):
                subject.call(**options)
                openmla.check_errors()
            found = faults.findings()
            named = [(each.tensor, each.place[0], each.value) for each in found]
            assert named == [(pattern.tensor, VICTIM, pattern.value)], f"{what}: found {found}"
            assert pattern.place is None or found[0].place[-1] == pattern.place, f"{what}: found {found}"
    finally:
        subject.restore()
        faults.findings()
    return {}


class _checking:
    """OPENMLA_CHECKS for a while."""

    def __init__(self, mode: str) -> None:
        self.mode = mode

    def __enter__(self) -> None:
        self.before = os.environ.get(env.CHECKS.name)
        os.environ[env.CHECKS.name] = self.mode

    def __exit__(self, *_: object) -> None:
        if self.before is None:
            del os.environ[env.CHECKS.name]
        else:
            os.environ[env.CHECKS.name] = self.before
