"""Coverage of dense decode: every pair of options that a call can have, and a fuzz at the sizes of real kernels.

`cases.draw` spends its seeds on shapes of every kernel, small ones above all. Here every case has the columns, heads
and page sizes that tensor-core kernels are built for, is called in every way a caller may call, and is judged where it
ran: the oracle computes on the device of the kernel, so that two thousand cases take a minute on a GPU.

    for case, call in pairs():
        print(judge(case, call, backend="cute", device="cuda"))     # which kernel ran; AssertionError if it is wrong
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, Literal, cast

import torch

from openmla.core.faults import Fault, check_errors
from openmla.split.schedule import Policy
from openmla.testing import budget
from openmla.testing.cases import Case, native_arguments
from openmla.testing.families import FAMILIES, WEIGHTS


@dataclass(frozen=True)
class Call:
    """How a case is called. Outputs and scratch of the caller hold NaN beforehand."""

    policy: Policy = "balanced"
    lse: Literal["e", "2", "none"] = "e"
    out: Literal["new", "strided", "odd"] = "new"  # odd: rows that do not start at multiples of 16 bytes
    has_plan: bool = False
    has_workspace: bool = False

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in asdict(self).items())


LENGTHS: dict[str, tuple[int, ...]] = {
    "zeros": (0, 64, 0),
    "ragged": (1, 63, 65, 130),
    "tiles": (64, 128, 576),
    "long": (2049,),
    "deep": (4900, 0, 64, 4097),
    "fewer keys than queries": (2, 1),
    "no lengths": (-1, 70, 2**31 - 1),
}

AXES: dict[str, tuple[Any, ...]] = {
    "dtype": (torch.bfloat16, torch.float16),
    "d_qk": (576, 512),
    "h_q": (1, 2, 3, 8, 9, 16, 17, 24, 32, 33, 48, 64, 96, 126, 127, 128),
    "h_kv": (1, 2, 4, 8),
    "s_q": (1, 2, 3, 4),
    "is_varlen": (False, True),
    "is_causal": (False, True),
    "page_size": (64, 1, 16, 32, 53, 128),
    "window": (0, 1, 70),
    "has_sink": (False, True),
    "lengths": tuple(LENGTHS),
    "policy": ("balanced", "batch_invariant"),
    "lse": ("e", "2", "none"),
    "out": ("new", "strided", "odd"),
    "has_plan": (False, True),
    "has_workspace": (False, True),
}


def _fits(chosen: dict[str, Any]) -> bool:
    return "h_q" not in chosen or "h_kv" not in chosen or chosen["h_q"] % chosen["h_kv"] == 0


def pairs(
    axes: Mapping[str, tuple[Any, ...]] = AXES, takes: Callable[[Case], bool] = lambda case: True
) -> Iterator[tuple[Case, Call]]:
    """Calls that hold every possible pair of values of two axes; about 120 for all of AXES, the same ones every time.

    Args:
        axes: AXES, or fewer values of each.
        takes: whether a kernel takes a case. Pairs that 40 draws find in no such case are left out.
    """
    pick = random.Random(0)
    missing = {
        ((a, x), (b, y)): None
        for a, b in combinations(axes, 2)
        for x in axes[a]
        for y in axes[b]
        if _fits({a: x, b: y})
    }
    number = 0
    while missing:
        best: dict[str, Any] = {}
        most = 0
        hardest = next(iter(missing))
        fixed = dict(hardest)
        for attempt in range(40):
            if attempt >= 20 and best:
                break
            chosen = {name: fixed[name] if name in fixed else pick.choice(values) for name, values in axes.items()}
            gained = sum(pair in missing for pair in combinations(chosen.items(), 2)) if _fits(chosen) else 0
            if gained > most and takes(_from_axes(chosen, number)[0]):
                best, most = chosen, gained
        for pair in combinations(best.items(), 2):
            missing.pop(pair, None)
        missing.pop(hardest, None)
        if best:
            yield _from_axes(best, number)
            number += 1


def axes_around(
    base: Mapping[str, Any], takes: Callable[[Case], bool], *, is_fixed: bool
) -> dict[str, tuple[Any, ...]]:
    """The values that a kernel takes one at a time.

    Args:
        base: values that differ from the first of each axis.
        takes: whether the kernel takes a case.
        is_fixed: whether the axes of the base keep their one value.

    Returns:
        AXES with the values v for which the base with that axis at v is taken; {} if the base itself is not.
    """
    plain = {name: values[0] for name, values in AXES.items()} | {"lengths": "ragged"} | dict(base)

    def is_taken(chosen: dict[str, Any]) -> bool:
        return _fits(chosen) and takes(_from_axes(chosen, 0)[0])

    if not is_taken(plain):
        return {}
    axes = {name: (base[name],) if is_fixed and name in base else values for name, values in AXES.items()}
    return {name: tuple(value for value in values if is_taken(plain | {name: value})) for name, values in axes.items()}


def _from_axes(chosen: dict[str, Any], seed: int) -> tuple[Case, Call]:
    pick = random.Random(f"axes {seed}")
    call = Call(*(chosen[name] for name in ("policy", "lse", "out", "has_plan", "has_workspace")))
    lengths, s_q = LENGTHS[chosen["lengths"]], chosen["s_q"]
    tokens = [s_q] * len(lengths)
    if chosen["is_varlen"]:
        tokens = [s_q, *(pick.randint(0, s_q) for _ in lengths[1:])]
    same = {name: chosen[name] for name in ("dtype", "h_q", "h_kv", "d_qk", "is_varlen", "is_causal", "page_size")}
    case = Case(
        op="decode", seed=seed, family=pick.choices(FAMILIES, WEIGHTS)[0], d_v=512, softmax_scale=chosen["d_qk"] ** -0.5,
        seqlens_q=tuple(tokens), seqlens_k=lengths, window=chosen["window"], has_sink=chosen["has_sink"], **same,
    )  # fmt: skip
    return case, call


def draw(seed: int) -> tuple[Case, Call]:
    """The fuzz case of that seed: real columns and heads, lengths around tiles, now and then thousands of keys.

    Half of the seeds are plain (pages of 64, 576 columns, one KV head, equally many queries, no window): what every
    kernel takes, and what is most often run.
    """
    pick = random.Random(f"dense decode {seed}")
    is_plain = pick.random() < 0.5
    h_q = pick.choice((1, 8, 16, 16, 32, 64, 128, 128, 128, 128, pick.randint(1, 128)))
    s_q = pick.choices((0, 1, 2, 3, 4, 7), (1, 12, 8, 3, 2, 1))[0]
    is_long = pick.random() < 0.25
    batch = pick.choice((1, 2, 4)) if is_long else pick.choices((1, 2, 3, 5, 9, 40), (5, 5, 4, 3, 2, 1))[0]
    lengths = [pick.choice((pick.choice(_RESIDUES), pick.randint(0, 4900 if is_long else 300))) for _ in range(batch)]
    for request in range(batch):
        if pick.random() < 0.03:
            lengths[request] = pick.choice((-1, -(2**31), 2**31 - 1, 10_000))
    odd: dict[str, Any] = {"d_qk": 576, "h_kv": 1, "page_size": 64}
    if not is_plain:
        odd = {
            "d_qk": pick.choice((576, 512)), "is_varlen": pick.random() < 0.4, "has_sink": pick.random() < 0.4,
            "h_kv": pick.choice([1, 1, 1, 1, *(x for x in (2, 3, 4, 8) if h_q % x == 0)]),
            "window": pick.choice((1, 5, 64, 100, 1000)) if pick.random() < 0.25 else 0,
            "page_size": pick.choice((64, 64, 64, 1, 2, 16, 32, 53, 61, 128, 256)),
        }  # fmt: skip
    case = Case(
        op="decode", seed=seed, family=pick.choices(FAMILIES, WEIGHTS)[0],
        dtype=pick.choice((torch.bfloat16, torch.bfloat16, torch.float16)), h_q=h_q, d_v=512,
        softmax_scale=odd["d_qk"] ** -0.5 * pick.choice((1.0, 1.0, 1.73)),
        seqlens_q=tuple(pick.choice((0, 1, 1, 2, 4)) if odd.get("is_varlen") else s_q for _ in range(batch)),
        seqlens_k=tuple(lengths), is_causal=pick.random() < 0.5,
        invalid_share=pick.choices((0.0, 0.3, 1.0), (10, 2, 1))[0], nan_tokens=pick.random() < 0.05, **odd,
    )  # fmt: skip
    call = Call(
        pick.choice(("balanced", "balanced", "batch_invariant")), pick.choice(("e", "e", "2", "none")),
        pick.choice(("new", "strided", "odd")), pick.random() < 0.5, pick.random() < 0.5,
    )  # fmt: skip
    return case, call


_RESIDUES = (0, 1, 2, 63, 64, 65, 127, 128, 129, 191, 255, 256, 257, 320, 511, 513, 640)


def moved(operands: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    """Operands on another device with the strides, offsets and gaps that they have: `Tensor.to` would pack them."""
    pools: dict[int, torch.Tensor] = {}

    def move(tensor: torch.Tensor) -> torch.Tensor:
        pool = tensor.untyped_storage()
        key = pool.data_ptr() if pool.nbytes() else -1
        if key not in pools:
            content = torch.empty(0, dtype=torch.uint8).set_(pool)
            if torch.device(device).type == "cuda" and pool.nbytes():
                content = content.pin_memory()  # else the copy waits for everything that the device has to do
            pools[key] = content.to(device, non_blocking=True)
        elements = pools[key].view(tensor.dtype) if pool.nbytes() else pools[key].new_empty(0, dtype=tensor.dtype)
        return elements.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    return {name: move(value) if isinstance(value, torch.Tensor) else value for name, value in operands.items()}


def arguments_on(op: str, host: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`native_arguments` of operands on a device, with the maxima of those on the host: nothing waits."""
    tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
    return native_arguments(op, host) | tensors


def judge(
    case: Case,
    call: Call,
    *,
    backend: str | None,
    device: torch.device | str,
    operands: dict[str, Any] | None = None,
    is_golden_here: bool = False,
) -> str:
    """Run a decode case as `call` says and judge everything that it promises.

    Args:
        case: of dense decode.
        call: how to call.
        backend: as for `openmla.decode`.
        device: where to run.
        operands: `case.tensors()` on that device, changed perhaps; default: made here.
        is_golden_here: the oracle computes on the host if operands are made here, else where the case ran. Many processes that
            share a GPU wait long for it each time, and the oracle asks it often.

    Returns:
        "backend/kernel" that ran.

    Raises:
        AssertionError: out or lse outside the tolerance, memory around `out` or of an input written, or faults other
            than those that the values in the tensors deserve.
        UnsupportedError: from the operation.
    """
    import openmla

    host = case.tensors() if operands is None else operands
    given = moved(host, device) if operands is None else operands
    arguments = arguments_on("decode", host, given)
    planned = {name: value for name, value in arguments.items() if name != "softmax_scale"}
    plan = openmla.plan(**planned, policy=call.policy, backend=backend)
    if not call.has_plan:
        check_errors(given["q"].device)  # what the other plan has seen
    scratch = None
    if call.has_workspace:
        size = openmla.workspace_bytes(**planned, policy=call.policy, backend=backend)
        scratch = torch.full((size,), 0xFF, dtype=torch.uint8, device=device)
    pool, out = _poisoned_out(call, given["q"], case.d_v)
    inputs = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
    before = {name: _bytes(value).clone() for name, value in inputs.items()}
    result, lse = openmla.decode(
        **arguments, plan=plan if call.has_plan else None, policy=call.policy, out=out, return_lse=call.lse != "none",
        lse_base="2" if call.lse == "2" else "e", workspace=scratch, backend=backend,
    )  # fmt: skip
    found = set(check_errors(given["q"].device))  # the plan's too where the call has one: whoever saw it first
    where = f"{plan.backend}/{plan.kernel}, {call}\n  {case}"
    written = torch.stack([(_bytes(value) != before[name]).any() for name, value in inputs.items()]).tolist()
    for name, is_written in zip(inputs, written, strict=True):  # a GPU is waited for once
        assert not is_written, f"{where}\n  {name} was written"
    if lse is not None and call.lse == "2":
        lse = lse * math.log(2)
    assert (lse is None) == (call.lse == "none"), f"{where}\n  lse returned against return_lse"
    got = result
    if is_golden_here:
        got, lse = result.cpu(), None if lse is None else lse.cpu()
    budget.check(got, lse, case.golden(host if is_golden_here else given), dtype=case.dtype).require(where)
    if pool is not None:
        result.fill_(torch.nan)
        assert bool(pool.isnan().all()), f"{where}\n  memory beside out was written"
    must, may = _faults(case, host)
    assert must <= found <= may, f"{where}\n  faults {found}, expected {must} and at most {may}"
    return f"{plan.backend}/{plan.kernel}"


def _poisoned_out(call: Call, q: torch.Tensor, d_v: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(memory, the `out` in it), all NaN; (None, None) where the operation makes its own."""
    if call.out == "new":
        return None, None
    margin = 8 if call.out == "strided" else 3
    pool = torch.full((*q.shape[:-1], d_v + 2 * margin), torch.nan, dtype=q.dtype, device=q.device)
    return pool, pool[..., margin : margin + d_v]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _faults(case: Case, operands: dict[str, Any]) -> tuple[set[Fault], set[Fault]]:
    """(faults that must be reported, faults that may be): a page that no row reaches may be seen or not."""
    table, lengths = operands["block_table"].cpu(), operands["cache_seqlens"].tolist()
    num_pages, size = operands["kv_cache"].shape[:2]
    capacity = table.shape[1] * size
    must: set[Fault] = set()
    if any(length < 0 for length in lengths):
        must.add(Fault.LENGTH_NEGATIVE)
    if any(length > capacity for length in lengths):
        must.add(Fault.LENGTH_OVER_CAPACITY)
    may = set(must)
    for row, length in zip(table, lengths, strict=True):
        used = row[: -(-min(max(length, 0), capacity) // size)]
        if bool(((used < 0) | (used >= num_pages)).any()):
            may.add(Fault.PAGE_OUT_OF_RANGE)
    has_all_rows = not case.is_varlen and bool(case.seqlens_q) and case.seqlens_q[0] > 0
    if not has_all_rows:
        return set(), may
    return (must if case.window or case.is_causal else set(may)), may


def reasons(error: Any, backend: str) -> str:
    """Why no kernel of a backend takes a case, in one line; without the case's own values, so that cases can be counted."""
    mine = [(kernel, why) for kernel, why in error.reasons.items() if kernel.startswith(f"{backend}/")]
    text = "; ".join(f"{kernel}: {', '.join(cast(tuple[str, ...], why))}" for kernel, why in mine) or error.headline
    return re.sub(r", got [^,;(]*", "", text)
