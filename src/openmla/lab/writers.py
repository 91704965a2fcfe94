"""Cases of op "append": `batch` requests get `s_q` new tokens each behind `s_k` that they have, RoPE included.

Beside ours stands `copy`: a plain copy that reads and writes as many bytes together, timed in turn.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from openmla.backends import select
from openmla.core.errors import UnsupportedError
from openmla.core.layout import KVLayout, kv_layout, plain_layout
from openmla.core.problem import AppendProblem
from openmla.core.target import Target
from openmla.lab.gate import Verdict
from openmla.lab.peers import Contender, Refusal, Result
from openmla.lab.suite import Case
from openmla.mods import Rope
from openmla.ops.append import append
from openmla.reference import quant

D_ROPE = 64


@dataclass(frozen=True, eq=False)
class AppendInputs:
    """One set. Pages lie in random order; the new tokens of a request are neighbours."""

    cache: torch.Tensor
    slots: torch.Tensor
    rows: torch.Tensor
    rope: Rope
    positions: torch.Tensor
    lengths: tuple[int, ...]

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.cache.device


def layout_of(case: Case) -> KVLayout:
    """What the cache of a case holds."""
    return plain_layout(case.torch_dtype, case.d_qk, case.d_v) if case.layout == "plain" else kv_layout(case.layout)


def problem(case: Case) -> AppendProblem:
    """The Problem that a case asks."""
    pages = case.batch * -(-(case.s_k + case.s_q) // case.page_size)
    return AppendProblem(case.d_qk, case.torch_dtype, layout_of(case), case.page_size, pages, D_ROPE)


def append_inputs(case: Case, device: torch.device, index: int = 0) -> AppendInputs:
    """Set number `index` of a case: other values and another order of pages in every set."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(f"{case.name}/{index}".encode()))
    layout, asked = layout_of(case), problem(case)
    order = torch.randperm(asked.num_pages, generator=generator, device=device).view(case.batch, -1)
    place = torch.arange(case.s_k, case.s_k + case.s_q, device=device)
    slots = order[:, place // case.page_size] * case.page_size + place % case.page_size
    rows = torch.randn(case.batch * case.s_q, case.d_qk, generator=generator, device=device).to(case.torch_dtype)
    cache = layout.empty_cache(asked.num_pages, case.page_size, device=device)
    rope = Rope.of_base(D_ROPE, case.s_k + case.s_q, device=device)
    return AppendInputs(
        cache, slots.flatten(), rows, rope, place.repeat(case.batch), tuple(case.draw_lengths())
    )  # fmt: skip


def backend(case: Case, sets: Sequence[AppendInputs], target: Target, name: str) -> Contender | Refusal:
    """Our own operation through its entry."""
    try:
        chosen = select(problem(case), target, name)
    except UnsupportedError as error:
        mine = [f"{kernel}: {'; '.join(why)}" for kernel, why in error.reasons.items() if kernel.startswith(name)]
        return Refusal(name, " | ".join(mine) or error.headline)
    layout = layout_of(case)

    def call(i: int) -> Result:
        x = sets[i]
        append(
            x.cache,
            x.slots,
            x.rows,
            kv_layout=layout,
            rope=x.rope,
            positions=x.positions,
            backend=chosen.kernel.backend,
        )
        return x.cache, None

    return Contender(chosen.kernel.backend, "backend", chosen.kernel.name, str(chosen.config), call)


def peer(case: Case, sets: Sequence[AppendInputs], target: Target, name: str) -> Contender | Refusal:
    """`copy`; nobody else writes caches here."""
    if name != "copy":
        return Refusal(name, "computes attention; beside a writer stands copy")
    half = case.batch * case.s_q * (case.d_qk * case.torch_dtype.itemsize + layout_of(case).bytes_per_token) // 2
    pairs = [torch.empty(2, half, dtype=torch.uint8, device=x.device) for x in sets]

    def call(i: int) -> Result:
        pairs[i][1].copy_(pairs[i][0])
        return None, None

    return Contender("copy", "ceiling", "torch.Tensor.copy_", f"{half} bytes", call)


def check(case: Case, x: AppendInputs) -> Verdict:
    """The rows that a run left in the cache against the reference's, byte by byte."""
    layout = layout_of(case)
    turned = x.rope.rotated(x.rows[:, None], case.d_qk - D_ROPE, x.positions)[:, 0]
    want, found = x.cache.clone(), x.cache
    quant.write_rows(want, layout, x.slots, turned)
    differ = int((want.view(torch.uint8) != found.view(torch.uint8)).sum())
    return Verdict(differ == 0, f"{differ} bytes differ" if differ else f"{len(x.slots)} tokens, every byte")
