"""Cases of the ops "sparse_prefill" and "sparse_decode": every query token attends to its own random selection.

sparse_prefill: `s_q` tokens (batch 1) over `s_k` rows of one tensor, `topk` each, without repetition. sparse_decode:
`batch` requests of `s_q` tokens, each token `topk` slots of the `s_k` of its request, pages in random order; with
`extra_topk` as many more of a second cache of the same layout. Inputs are 0.1 * randn; prefill has an attention sink.
"""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import openmla
from openmla.backends import select
from openmla.core.errors import UnsupportedError
from openmla.core.layout import KVLayout, kv_layout, plain_layout
from openmla.core.problem import ExtraKV, SparseDecodeProblem, SparsePrefillProblem
from openmla.core.target import Target
from openmla.lab.gate import Verdict
from openmla.lab.peers import Contender, Refusal, Result
from openmla.lab.store import version_of
from openmla.lab.suite import Case
from openmla.reference import attention, quant
from openmla.testing import budget

OPS = ("sparse_prefill", "sparse_decode")
EXTRA_PAGE = 64  # page size of a second cache
_GATED = 24  # tokens that the oracle computes
_DRAWN = 512  # tokens whose selections are drawn at once: a permutation's worth of floats each


@dataclass(frozen=True, eq=False)
class SparseInputs:
    """One set. `kv` is [s_kv, 1, d_qk], or a paged cache; `extra` another one and its indices."""

    q: torch.Tensor
    kv: torch.Tensor
    indices: torch.Tensor
    sink: torch.Tensor | None
    softmax_scale: float
    lengths: tuple[int, ...]
    extra: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.q.device


def layout_of(case: Case) -> KVLayout:
    """What the cache of a case holds."""
    return plain_layout(case.torch_dtype, case.d_qk, case.d_v) if case.layout == "plain" else kv_layout(case.layout)


def problem(case: Case) -> SparsePrefillProblem | SparseDecodeProblem:
    """The Problem that a case asks."""
    if case.op == "sparse_prefill":
        return SparsePrefillProblem(
            case.s_q, case.s_k, case.h_q, 1, case.d_qk, case.d_v, case.torch_dtype, case.topk, has_sink=True
        )
    layout, pages = layout_of(case), case.batch * -(-case.s_k // case.page_size)
    extra = None
    if case.extra_topk:
        extra = ExtraKV(layout, EXTRA_PAGE, case.batch * -(-case.s_k // EXTRA_PAGE), case.extra_topk)
    return SparseDecodeProblem(
        batch=case.batch, s_q=case.s_q, total_q=case.batch * case.s_q, h_q=case.h_q, h_kv=1, d_qk=case.d_qk,
        d_v=case.d_v, dtype=case.torch_dtype, layout=layout, page_size=case.page_size, num_pages=pages, topk=case.topk,
        extra=extra,
    )  # fmt: skip


def _selection(tokens: int, topk: int, rows: int, generator: torch.Generator) -> torch.Tensor:
    """[tokens, topk] int32, `topk` of `rows` without repetition (with, where there are fewer rows)."""
    device = generator.device
    if topk > rows:
        return torch.randint(0, rows, (tokens, topk), generator=generator, device=device, dtype=torch.int32)
    found = torch.empty(tokens, topk, dtype=torch.int32, device=device)
    for first in range(0, tokens, _DRAWN):
        many = min(_DRAWN, tokens - first)
        dice = torch.rand(many, rows, generator=generator, device=device)
        found[first : first + many] = dice.topk(topk, dim=1).indices.to(torch.int32)
    return found


def inputs(case: Case, device: torch.device, index: int = 0) -> SparseInputs:
    """Set number `index` of a case: other values and selections in every set."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(f"{case.name}/{index}".encode()))

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).mul_(0.1).to(case.torch_dtype)

    lengths, scale = tuple(case.draw_lengths()), case.d_qk**-0.5
    if case.op == "sparse_prefill":
        q, kv = randn(case.s_q, case.h_q, case.d_qk), randn(case.s_k, 1, case.d_qk)
        sink = torch.randn(case.h_q, generator=generator, device=device)
        return SparseInputs(q, kv, _selection(case.s_q, case.topk, case.s_k, generator)[:, None], sink, scale, lengths)

    def side(page_size: int, topk: int) -> tuple[torch.Tensor, torch.Tensor]:
        layout, pages = layout_of(case), -(-case.s_k // page_size)
        cache = layout.empty_cache(case.batch * pages, page_size, device=device)
        order = torch.randperm(case.batch * pages, generator=generator, device=device).view(case.batch, pages)
        for request in range(case.batch):  # one request at a time: a whole batch in fp32 would not fit
            slots = order[request][:, None] * page_size + torch.arange(page_size, device=device)
            quant.write_rows(cache, layout, slots.flatten(), randn(pages * page_size, case.d_qk))
        place = _selection(case.batch * case.s_q, topk, case.s_k, generator).view(case.batch, -1).long()
        indices = order.gather(1, place // page_size) * page_size + place % page_size
        return cache, indices.to(torch.int32).view(case.batch, case.s_q, topk)

    cache, indices = side(case.page_size, case.topk)
    extra = side(EXTRA_PAGE, case.extra_topk) if case.extra_topk else None
    return SparseInputs(randn(case.batch, case.s_q, case.h_q, case.d_qk), cache, indices, None, scale, lengths, extra)


def backend(case: Case, sets: Sequence[SparseInputs], target: Target, name: str) -> Contender | Refusal:
    """Our own operation through its entry."""
    try:
        chosen = select(problem(case), target, name)
    except UnsupportedError as error:
        mine = [f"{kernel}: {'; '.join(why)}" for kernel, why in error.reasons.items() if kernel.startswith(name)]
        return Refusal(name, " | ".join(mine) or error.headline)
    which, outs = chosen.kernel.backend, [x.q.new_full((*x.q.shape[:-1], case.d_v), torch.nan) for x in sets]

    def prefill(i: int) -> Result:
        x = sets[i]
        out, _, lse = openmla.sparse_prefill(
            x.q, x.kv, x.indices, d_v=case.d_v, softmax_scale=x.softmax_scale, attn_sink=x.sink, out=outs[i],
            backend=which,
        )  # fmt: skip
        return out, lse

    def decode(i: int) -> Result:
        x = sets[i]
        cache, indices = x.extra or (None, None)
        return openmla.sparse_decode(
            x.q, x.kv, x.indices, kv_layout=case.kv_layout, d_v=case.d_v, softmax_scale=x.softmax_scale,
            extra_kv_cache=cache, extra_indices=indices, extra_kv_layout=case.kv_layout if x.extra else None,
            out=outs[i], backend=which,
        )  # fmt: skip

    call = prefill if case.op == "sparse_prefill" else decode
    return Contender(which, "backend", chosen.kernel.name, str(chosen.config), call)


def peer(case: Case, sets: Sequence[SparseInputs], target: Target, name: str) -> Contender | Refusal:
    """`flash_mla`, with 64 or 128 heads: fewer are padded beforehand. Its LSE is not held against anything."""
    rules = (
        (name == "flash_mla", "has no sparse attention; beside it stands flash_mla"),
        (target.arch == "sm_90a", f"its sparse kernels here are for sm_90a, this is {target.arch}"),
        (case.dtype == "bf16", f"it takes bf16, the case is {case.dtype}"),
        (case.h_q <= 128, f"it takes up to 128 heads, the case has {case.h_q}"),
        (case.op == "sparse_prefill" or case.layout in ("fp8_656", "fp8_584"), f"it has no sparse decode over {case.layout}"),
    )  # fmt: skip
    broken = [why for holds, why in rules if not holds]
    try:
        module: Any = importlib.import_module("flash_mla")
    except (ImportError, OSError) as error:
        broken.append(f"cannot be imported ({error}); pip install --no-deps sgl-flash-mla")
    if broken:
        return Refusal(name, "; ".join(broken))
    wide = 64 if case.h_q <= 64 else 128
    short = wide - case.h_q

    def widened(x: SparseInputs) -> tuple[torch.Tensor, torch.Tensor | None]:
        q, sink = x.q, x.sink
        if short:
            q = torch.cat([q, q.new_zeros(*q.shape[:-2], short, q.shape[-1])], -2)
            sink = None if sink is None else torch.cat([sink, sink.new_zeros(short)])
        return q, sink

    call = _peer_call(case, sets, module, [widened(x) for x in sets])
    version = version_of("sgl-flash-mla") or version_of("flash-mla") or "from source"
    return Contender("flash_mla", "peer", "sparse, legacy path", version, call)


def _peer_call(
    case: Case, sets: Sequence[SparseInputs], module: Any, wide: Sequence[tuple[torch.Tensor, torch.Tensor | None]]
) -> Callable[[int], Result]:
    metadata = [module.get_mla_metadata()[0] for _ in sets]

    def prefill(i: int) -> Result:
        x, (q, sink) = sets[i], wide[i]
        out = module.flash_mla_sparse_fwd(
            q, x.kv, x.indices, x.softmax_scale, d_v=case.d_v, attn_sink=sink, use_legacy=True
        )[0]
        return out[..., : case.h_q, :], None

    def decode(i: int) -> Result:
        x, q = sets[i], wide[i][0]
        cache, indices = x.extra or (None, None)
        out, _ = module.flash_mla_with_kvcache(
            q, x.kv, None, None, case.d_v, metadata[i], softmax_scale=x.softmax_scale, is_fp8_kvcache=True,
            indices=x.indices, extra_k_cache=cache, extra_indices_in_kvcache=indices, use_legacy=True,
        )  # fmt: skip
        return out[..., : case.h_q, :], None

    return prefill if case.op == "sparse_prefill" else decode


def check(case: Case, x: SparseInputs, out: torch.Tensor | None, lse: torch.Tensor | None) -> Verdict:
    """Some tokens (sparse_decode: requests) against the oracle, under the tolerance rule."""
    if out is None:
        return Verdict(False, "returned nothing")
    count = x.q.shape[0]
    chosen = sorted({i * (count - 1) // max(_GATED - 1, 1) for i in range(_GATED)})
    q, indices = x.q[chosen], x.indices[chosen]
    if case.op == "sparse_prefill":
        want = attention.sparse_prefill(
            q, x.kv, indices, softmax_scale=x.softmax_scale, d_v=case.d_v, attn_sink=x.sink, with_bounds=True
        )
        lse = None if lse is None else lse[chosen]
    else:
        cache, extra = x.extra or (None, None)
        want = attention.sparse_decode(
            q, x.kv, indices, softmax_scale=x.softmax_scale, d_v=case.d_v, layout=layout_of(case), with_bounds=True,
            extra_kv_cache=cache, extra_indices=None if extra is None else extra[chosen],
            extra_layout=None if extra is None else layout_of(case),
        )  # fmt: skip
        lse = None if lse is None else lse[chosen]
    report = budget.check(out[chosen], lse, want, dtype=case.torch_dtype)
    worst = max(report.findings, key=lambda finding: finding.ratio)
    where = f"{len(chosen)} of {count} {'tokens' if case.op == 'sparse_prefill' else 'requests'}"
    if report.passed:
        return Verdict(True, f"within {worst.ratio:.2f} of the tolerance ({worst.rule}), {where}")
    sentences = "; ".join(f"{each.rule}: {each.sentence}" for each in report.findings if not each.holds)
    return Verdict(False, f"outside the tolerance on {where}: {sentences}")
