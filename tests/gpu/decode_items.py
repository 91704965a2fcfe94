"""What the sections of `prove_decode.py` are made of: items, where they run, cases, equality of bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from openmla.backends import select
from openmla.core.errors import UnsupportedError
from openmla.core.problem import DecodeProblem
from openmla.core.target import Target
from openmla.testing.cases import Case

LIST = tuple[int, ...]
LIGHT = 6e8  # multiplications of the scores and the values


class NotRunError(Exception):
    """This machine cannot run an item; says why."""


@dataclass(frozen=True)
class Setup:
    """Where and how much."""

    backend: str
    device: str
    is_small: bool = False
    soak_seconds: float = 60.0

    @property
    def is_cuda(self) -> bool:
        """Whether there are streams and graphs."""
        return self.device == "cuda"

    def takes(self, case: Case) -> bool:
        """Whether the backend has a kernel for a case here."""
        rows, batch = sum(case.seqlens_q), len(case.seqlens_k)
        pages = max(-(-length // case.page_size) for length in (1, *case.seqlens_k) if length < case.no_length)

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


def listed_items(section: str, make: Callable[[Setup], Made], small: int) -> Callable[..., list[Item]]:
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


def is_light(case: Case) -> bool:
    """Whether the oracle takes at most some tenths of a second on a host."""
    keys = sum(length for length in case.seqlens_k if 0 < length < case.no_length)
    if case.topk:
        keys = (case.topk + case.extra_topk) * sum(case.seqlens_q)
        return keys * case.h_q * (case.d_qk + case.d_v) < LIGHT
    return keys * max(case.seqlens_q, default=0) * case.h_q * (case.d_qk + case.d_v) < LIGHT


class Differences:
    """Comparisons of bits that are counted on the device and read once: waiting is what costs where processes share it."""

    def __init__(self) -> None:
        self.kept: list[tuple[str, torch.Tensor]] = []

    def add(self, got: Any, want: Any, what: str) -> None:
        """Compare every tensor of two results."""
        for name, x, y in zip(("out", "lse", "out of the second layer", "its lse"), got, want, strict=False):
            self.kept.append((f"{what}: {{}} of {x.numel()} elements of {name} differ", (bits(x) != bits(y)).sum()))

    def require(self) -> None:
        """Raises AssertionError with every comparison that found a difference."""
        counts = torch.stack([count for _, count in self.kept]).tolist() if self.kept else []
        wrong = [text.format(n) for (text, _), n in zip(self.kept, counts, strict=True) if n]
        self.kept.clear()
        assert not wrong, "\n".join(wrong)


def same_bits(got: Any, want: Any, what: str) -> None:
    """Every tensor of two results has the same bits."""
    differences = Differences()
    differences.add(got, want, what)
    differences.require()


def captured(call: Callable[[], tuple[torch.Tensor, ...]], is_cuda: bool) -> Callable[[], tuple[torch.Tensor, ...]]:
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
    with torch.cuda.stream(side):  # `torch.cuda.graph` would collect garbage and wait for the device
        graph.capture_begin()
        results = call()
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(side)

    def replay() -> tuple[torch.Tensor, ...]:
        for tensor in results:
            tensor.fill_(torch.nan)
        churn = [torch.full((1 << pick,), torch.nan, device=results[0].device) for pick in (10, 16, 20)]
        del churn
        graph.replay()
        return results

    return replay
