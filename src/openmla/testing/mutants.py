"""Defects on purpose: a small split-KV kernel, and the ways in which such kernels go wrong.

The tolerance rule is worth what it catches. Each mutant is the same emulated kernel with one defect that real MLA
kernels have had: a lost token, a swapped page, a stale scale, partial results merged with the wrong weights. The
gate (`calibrate`) runs all of them over all input families: the kernel itself must never be refused, and every
mutant must be caught.

    for row in calibrate(lengths=(321, 1000), seeds=(0,)):
        print(row.mutant, row.family, row.broken)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch

from openmla.reference import attention
from openmla.reference.attention import online_softmax
from openmla.split.combine import merge
from openmla.testing.budget import check
from openmla.testing.families import FAMILIES, draw_keys, draw_queries

Kind = Literal["value", "index", "softmax", "merge", "plan", "context", "fp8"]
Parts = list[tuple[torch.Tensor, torch.Tensor]]

_BLOCK = attention.BLOCK_KEYS
# Without onehot_v: its q is 0 like zero_q's, which hides the same defects by nature.
GATE_FAMILIES = tuple(family for family in FAMILIES if family != "onehot_v")
_GROUP = 128  # columns per scale of the FP8 input


@dataclass(frozen=True)
class Input:
    """One request of one token: q [h_q, d_qk], keys [n, d_qk] (v: first d_v columns), in `dtype` but held as fp32.

    With FP8 input, codes [n, d_v] and scales [n, d_v / 128] are what a kernel reads, and keys what that means.
    """

    q: torch.Tensor
    keys: torch.Tensor
    d_v: int
    softmax_scale: float
    dtype: torch.dtype
    num_splits: int
    codes: torch.Tensor | None = None
    scales: torch.Tensor | None = None

    @property
    def n(self) -> int:
        """Number of keys."""
        return self.keys.shape[0]


Result = tuple[torch.Tensor, torch.Tensor]  # out [h_q, d_v] in dtype, lse [h_q] fp32


@dataclass(frozen=True)
class Mutant:
    """A kernel with a name; `run` takes an Input and returns (out, lse)."""

    name: str
    kind: Kind
    run: Callable[[Input], Result]


def _range(x: Input, begin: int, end: int, values: torch.Tensor | None = None) -> Result:
    """The partial result (fp32) of keys begin to end; `values` replaces v."""
    v = x.keys[:, : x.d_v] if values is None else values
    seen = torch.ones(x.q.shape[0], end - begin, dtype=torch.bool)
    out, lse, _ = online_softmax(x.q, x.keys[begin:end], v[begin:end], seen, x.softmax_scale, x.dtype)
    return out, lse


def _cuts(x: Input) -> list[tuple[int, int]]:
    """Key range of each split: whole blocks, as even as they allow."""
    blocks = -(-x.n // _BLOCK)
    edges = [min(i * blocks // x.num_splits * _BLOCK, x.n) for i in range(x.num_splits + 1)]
    edges[-1] = x.n
    return list(pairwise(edges))


def _parts(x: Input, values: torch.Tensor | None = None) -> Parts:
    return [_range(x, begin, end, values) for begin, end in _cuts(x)]


def _finish(x: Input, parts: Parts) -> Result:
    out, lse = merge(torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts]))
    return out.to(x.dtype), lse


def kernel(x: Input) -> Result:
    """The kernel without a defect: 64-key blocks, online softmax, rounded weights, fp32 partials merged in order."""
    return _finish(x, _parts(x))


# Value and index defects: the kernel is right, what it was fed is not.


def _zeros(x: Input) -> Result:
    out, lse = kernel(x)
    return torch.zeros_like(out), lse


def _drop_last_token(x: Input) -> Result:
    return kernel(replace(x, keys=x.keys[:-1]))


def _extra_zero_token(x: Input) -> Result:
    return kernel(replace(x, keys=torch.cat([x.keys, torch.zeros_like(x.keys[:1])])))


def _skip_page(x: Input) -> Result:
    return kernel(replace(x, keys=torch.cat([x.keys[:_BLOCK], x.keys[2 * _BLOCK :]])))


def _wrong_token(x: Input) -> Result:
    keys = x.keys.clone()
    keys[x.n // 3] = x.keys[x.n // 3 + 7]
    return kernel(replace(x, keys=keys))


def _scale_one_percent(x: Input) -> Result:
    return kernel(replace(x, softmax_scale=x.softmax_scale * 1.01))


def _rope_lost(x: Input) -> Result:
    keys = x.keys.clone()
    keys[:, x.d_v :] = 0
    return kernel(replace(x, keys=keys))


def _rope_rows_aliased(x: Input) -> Result:
    """Rows K and K + 4 of each eight read the same RoPE: a wrong swizzle."""
    source = torch.arange(x.n)
    source = torch.where(source % 8 >= 4, source - 4, source)
    keys = x.keys.clone()
    keys[:, x.d_v :] = x.keys[source, x.d_v :]
    return kernel(replace(x, keys=keys))


def _value_columns_zero(x: Input) -> Result:
    values = x.keys[:, : x.d_v].clone()
    values[:, :64] = 0
    return _finish(x, _parts(x, values))


def _value_pages_swapped(x: Input) -> Result:
    values = x.keys[:, : x.d_v].clone()
    values[:_BLOCK], values[_BLOCK : 2 * _BLOCK] = x.keys[_BLOCK : 2 * _BLOCK, : x.d_v], x.keys[:_BLOCK, : x.d_v]
    return _finish(x, _parts(x, values))


def _head_duplicated(x: Input) -> Result:
    q = x.q.clone()
    q[-1] = q[0]
    return kernel(replace(x, q=q))


# Softmax and merge defects.


def _missing_rescale(x: Input) -> Result:
    """The accumulator is not rescaled when the third block raises the maximum; the row sum is."""
    parts = []
    for begin, end in _cuts(x):
        top = torch.full((x.q.shape[0],), -torch.inf)
        total, out = torch.zeros_like(top), torch.zeros(x.q.shape[0], x.d_v)
        for step, first in enumerate(range(begin, end, _BLOCK)):
            keys = x.keys[first : min(first + _BLOCK, end)]
            logits = x.softmax_scale * (x.q @ keys.T)
            higher = torch.maximum(top, logits.amax(-1))
            rescale, weights = torch.exp(top - higher), torch.exp(logits - higher[:, None])
            total = total * rescale + weights.sum(-1)
            forgotten = torch.ones_like(rescale) if step == 2 else rescale
            out = out * forgotten[:, None] + weights.to(x.dtype).float() @ keys[:, : x.d_v]
            top = higher
        parts.append((out / total[:, None], top + total.log()))
    return _finish(x, parts)


def _last_split_lost(x: Input) -> Result:
    return _finish(x, _parts(x)[:-1])


def _merge_averaged(x: Input) -> Result:
    parts = _parts(x)
    _, lse = _finish(x, parts)
    return torch.stack([part[0] for part in parts]).mean(0).to(x.dtype), lse


def _merge_base_two(x: Input) -> Result:
    """Weights 2 ** lse for partials whose lse is natural; the reported lse is right."""
    parts = _parts(x)
    _, lse = _finish(x, parts)
    out, _ = merge(torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts]), base=2)
    return out.to(x.dtype), lse


def _lse_base_two(x: Input) -> Result:
    out, lse = kernel(x)
    return out, lse / math.log(2)


# Planner defects.


def _splits_overlap(x: Input) -> Result:
    return _finish(x, [_range(x, max(begin - _BLOCK, 0), end) for begin, end in _cuts(x)])


def _splits_gap(x: Input) -> Result:
    return _finish(x, [_range(x, begin + _BLOCK if i else begin, end) for i, (begin, end) in enumerate(_cuts(x))])


def _empty_split_counted(x: Input) -> Result:
    """A split without keys contributes (0, 0) instead of (0, -inf)."""
    empty = (torch.zeros(x.q.shape[0], x.d_v), torch.zeros(x.q.shape[0]))
    return _finish(x, [*_parts(x), empty])


def _wrong_prefix_sum(x: Input) -> Result:
    """The merge starts one partial too late and ends in the neighbour's first."""
    neighbour = replace(x, keys=x.keys.roll(1, 1))
    return _finish(x, [*_parts(x)[1:], _parts(neighbour)[0]])


# Context-parallel defects, four ranks.

_RANKS = 4


def _rank_offset_by_one(x: Input) -> Result:
    chunk = -(-x.n // _RANKS)
    edges = [min(rank * chunk + 1, x.n) for rank in range(_RANKS + 1)]
    return _finish(x, [_range(x, begin, end) for begin, end in pairwise(edges)])


def _shardings_mixed_up(x: Input) -> Result:
    """Tokens are dealt to ranks in turn, but each rank counts its own as if they were one stretch."""
    chunk, parts = -(-x.n // _RANKS), []
    for rank in range(_RANKS):
        stored = torch.cat([x.keys[rank::_RANKS], torch.zeros(_RANKS, x.keys.shape[1])])
        count = max(min(chunk, x.n - rank * chunk), 0)
        parts.append(_range(replace(x, keys=stored), 0, count))
    return _finish(x, parts)


# FP8 defects: the kernel reads codes and scales wrongly.


def dequantised(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """bf16(fp32(code) * fp32(scale)), held as fp32: what FP8 keys mean."""
    wide = codes.to(torch.float32) * scales.repeat_interleave(_GROUP, 1)
    return wide.to(torch.bfloat16).to(torch.float32)


def _with_fp8(x: Input, codes: torch.Tensor | None = None, scales: torch.Tensor | None = None) -> Result:
    assert x.codes is not None and x.scales is not None
    latent = dequantised(x.codes if codes is None else codes, x.scales if scales is None else scales)
    return kernel(replace(x, keys=torch.cat([latent, x.keys[:, x.d_v :]], 1)))


def _scales_shifted(x: Input) -> Result:
    assert x.scales is not None
    return _with_fp8(x, scales=x.scales.roll(1, 1))


def _saturated_dropped(x: Input) -> Result:
    assert x.codes is not None
    wide = x.codes.to(torch.float32)
    return _with_fp8(x, codes=wide.masked_fill(wide.abs() == 448, 0).to(torch.float8_e4m3fn))


def _scales_floored(x: Input) -> Result:
    assert x.scales is not None
    return _with_fp8(x, scales=x.scales.log2().floor().exp2())


def _scales_rounded(x: Input) -> Result:
    assert x.scales is not None
    return _with_fp8(x, scales=x.scales.to(torch.bfloat16).to(torch.float32))


MUTANTS: tuple[Mutant, ...] = (
    Mutant("zeros", "value", _zeros),
    Mutant("drop_last_token", "index", _drop_last_token),
    Mutant("extra_zero_token", "index", _extra_zero_token),
    Mutant("skip_page", "index", _skip_page),
    Mutant("wrong_token", "index", _wrong_token),
    Mutant("scale_one_percent", "value", _scale_one_percent),
    Mutant("rope_lost", "value", _rope_lost),
    Mutant("rope_rows_aliased", "index", _rope_rows_aliased),
    Mutant("value_columns_zero", "value", _value_columns_zero),
    Mutant("value_pages_swapped", "index", _value_pages_swapped),
    Mutant("head_duplicated", "index", _head_duplicated),
    Mutant("missing_rescale", "softmax", _missing_rescale),
    Mutant("last_split_lost", "merge", _last_split_lost),
    Mutant("merge_averaged", "merge", _merge_averaged),
    Mutant("merge_base_two", "merge", _merge_base_two),
    Mutant("lse_base_two", "merge", _lse_base_two),
    Mutant("splits_overlap", "plan", _splits_overlap),
    Mutant("splits_gap", "plan", _splits_gap),
    Mutant("empty_split_counted", "plan", _empty_split_counted),
    Mutant("wrong_prefix_sum", "plan", _wrong_prefix_sum),
    Mutant("rank_offset_by_one", "context", _rank_offset_by_one),
    Mutant("shardings_mixed_up", "context", _shardings_mixed_up),
    Mutant("scales_shifted", "fp8", _scales_shifted),
    Mutant("saturated_dropped", "fp8", _saturated_dropped),
    Mutant("scales_floored", "fp8", _scales_floored),
    Mutant("scales_rounded", "fp8", _scales_rounded),
)


def draw_input(
    family: str,
    n: int,
    seed: int,
    *,
    h_q: int = 16,
    d_qk: int = 576,
    d_v: int = 512,
    dtype: torch.dtype = torch.bfloat16,
    num_splits: int = 2,
    is_fp8: bool = False,
) -> Input:
    """One request of `family`, rounded to dtype; with is_fp8 the latent goes through e4m3 with free fp32 scales.

    The needle families have as many heads as keys, so that every key is somebody's needle.
    """
    h_q = n if family.startswith("sweep") else h_q
    generator = torch.Generator().manual_seed(seed)
    softmax_scale = d_qk**-0.5
    keys = draw_keys(family, (n, 1, d_qk), d_v, generator)[:, 0].to(dtype).to(torch.float32)
    codes = scales = None
    if is_fp8:
        groups = keys[:, :d_v].reshape(n, -1, _GROUP)
        scales = groups.abs().amax(-1).clamp_min(1e-4) / 448
        codes = (groups / scales[..., None]).to(torch.float8_e4m3fn).reshape(n, d_v)
        keys = torch.cat([dequantised(codes, scales), keys[:, d_v:]], 1)
    q = draw_queries(family, 1, h_q, keys[:, None], d_v, softmax_scale, generator)[0]
    return Input(q.to(dtype).to(torch.float32), keys, d_v, softmax_scale, dtype, num_splits, codes, scales)


def golden(x: Input) -> attention.Attention:
    """The oracle for that input: out [1, h_q, d_v], lse [h_q, 1]."""
    one, keys = torch.tensor([0, 1]), x.keys[:, None]
    return attention.prefill(
        x.q[None],
        keys,
        keys[..., : x.d_v],
        one,
        torch.tensor([0, x.n]),
        softmax_scale=x.softmax_scale,
        with_bounds=True,
    )


@dataclass(frozen=True)
class Row:
    """One run of the gate. `mutant` is "" for the kernel without a defect; `broken` are the rules that refused it."""

    mutant: str
    kind: str
    family: str
    n: int
    seed: int
    broken: tuple[str, ...]
    rms_ratio: float
    lse_ratio: float


def calibrate(
    lengths: Sequence[int] = (321, 1000),
    seeds: Sequence[int] = (0,),
    families: Iterable[str] = GATE_FAMILIES,
    dtype: torch.dtype = torch.bfloat16,
    num_splits: int = 2,
) -> Iterator[Row]:
    """Run the kernel and every mutant over every family, length and seed. Lengths from 193 up reach every defect."""
    correct = Mutant("", "value", kernel)
    for family in families:
        for n in lengths:
            for seed in seeds:
                for is_fp8 in (False, True):
                    x = draw_input(family, n, seed, dtype=dtype, num_splits=num_splits, is_fp8=is_fp8)
                    want = golden(x)
                    chosen = [mutant for mutant in MUTANTS if (mutant.kind == "fp8") == is_fp8]
                    for mutant in (correct, *chosen):
                        out, lse = mutant.run(x)
                        report = check(out[None], lse[:, None], want, dtype=dtype)
                        yield Row(
                            mutant.name,
                            mutant.kind,
                            family,
                            n,
                            seed,
                            report.broken,
                            report.ratio("RMS"),
                            report.ratio("LSE"),
                        )
