"""Problems: what is asked, without tensors. Frozen, hashable; one class per operation.

`from_tensors` is the only validation in the library: it raises one ProblemError that lists every violation. It
looks at metadata alone (shape, dtype, device, stride), never at values: those are guarded inside the kernels and
reported through `openmla.core.faults`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Integral
from typing import TYPE_CHECKING

import torch

from openmla.core.errors import ConfigError
from openmla.core.layout import KVLayout, kv_layout, plain_layout
from openmla.core.violations import Violations as _Violations
from openmla.core.violations import got as _got
from openmla.core.violations import short as _short

if TYPE_CHECKING:  # a layer above
    from openmla.mods import Attached, Mods, Rope

QUERY_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CODES = torch.float8_e4m3fn  # of queries too, where dense decode reads a cache in layout fp8_576


def _describe(problem: object) -> str:
    shown = []
    for field in fields(problem):  # type: ignore[arg-type]
        value = getattr(problem, field.name)
        if value is None or value is False or value == 0 or (value is True and field.default is True):
            continue  # what is absent or as usual says nothing
        shown.append(f"{field.name}={_short(value) if isinstance(value, torch.dtype) else value}")
    shown += [f"{f.name}=False" for f in fields(problem) if f.default is True and not getattr(problem, f.name)]  # type: ignore[arg-type]
    return " ".join(shown)


def _heads(bad: _Violations, h_q: int, h_kv: int) -> None:
    bad.rule(h_kv >= 1, f"h_kv must be at least 1, got {h_kv}")
    if h_kv >= 1:
        bad.rule(
            h_q >= 1 and h_q % h_kv == 0,
            f"h_q must be a positive multiple of h_kv={h_kv}, got {h_q}; query heads are shared evenly by KV heads",
        )


def _cache(
    bad: _Violations, name: str, cache: object, layout: KVLayout | str | None, dtype: torch.dtype, d_qk: int, d_v: int,
    device: torch.device, beside: str = "q",
) -> KVLayout | None:  # fmt: skip
    """Checks one paged cache and returns its layout, or None after recording what is wrong; `beside` has its columns."""
    if not isinstance(cache, torch.Tensor) or cache.dim() != 4:
        bad.found.append(f"{name} must be a tensor [num_pages, page_size, h_kv, row], got {_got(cache, 4)}")
        return None
    if not bad.rule(cache.layout == torch.strided, f"{name} must be a strided tensor, got {cache.layout}"):
        return None
    try:
        if layout is None:
            found = plain_layout(cache.dtype, cache.shape[-1], d_v)
        else:
            found = kv_layout(layout)
            if not found.is_quantised:
                found = plain_layout(found.dtype, found.d_qk, d_v)
    except ConfigError as error:
        bad.found.append(f"{name}: {error}")
        return None
    bad.rule(cache.device == device, f"{name} must be on {device} like q, got {cache.device}")
    if found.is_quantised:
        dtype_got = f"{_short(cache.dtype)}; drop kv_layout= for plain elements"
        bad.rule(cache.dtype.itemsize == 1, f"{name} in layout {found} must have a 1-byte dtype, got {dtype_got}")
        bad.rule(cache.shape[2] == 1, f"{name} in layout {found} has one KV head, got h_kv={cache.shape[2]}")
        page_bytes = cache.shape[1] * found.bytes_per_token
        is_packed = cache.stride(-1) == 1 and (cache.shape[1] <= 1 or cache.stride(1) == found.row_elements)
        bad.rule(
            cache.shape[-1] != found.row_elements  # said below
            or (is_packed and (cache.shape[0] <= 1 or cache.stride(0) >= page_bytes)),
            f"{name} in layout {found} must hold each page as {page_bytes} contiguous bytes, got strides {cache.stride()}",
        )
        aligned = {"fp32": 4}.get(found.scale_format, 2 if found.d_rope_stored else 1)
        bad.rule(
            cache.shape[0] <= 1 or cache.stride(0) % aligned == 0,
            f"{name} in layout {found} needs a page stride that is a multiple of {aligned} bytes, got {cache.stride(0)}",
        )
    else:
        bad.rule(
            cache.dtype == found.dtype and cache.dtype == dtype,
            f"{name} must have the dtype of q ({_short(dtype)}), got {_short(cache.dtype)}; "
            "convert one of them or name a byte layout with kv_layout=",
        )
        bad.rule(cache.stride(-1) == 1, f"{name} must be contiguous in its last dimension, got {cache.stride()}")
    bad.rule(
        cache.shape[-1] == found.row_elements,
        f"{name} in layout {found} must have {found.row_elements} elements per row, got {cache.shape[-1]}",
    )
    bad.rule(
        found.d_qk == d_qk,
        f"{beside} has d_qk={d_qk} columns but {name} in layout {found} has {found.d_qk}; both must agree",
    )
    bad.rule(
        1 <= d_v <= found.d_qk and (not found.is_quantised or d_v == found.d_v),
        f"d_v must be {found.d_v if found.is_quantised else f'1 to {found.d_qk}'} for layout {found}, got {d_v}",
    )
    bad.rule(cache.shape[1] >= 1, f"{name} must have page_size >= 1, got {cache.shape[1]}")
    return found


def _query(
    bad: _Violations, q: object, cu_seqlens_q: object, max_seqlen_q: int | None, dtypes: tuple[torch.dtype, ...]
) -> tuple[int, int, int, int] | None:
    """(batch, s_q, total_q, varlen?) is not decided here: returns (leading, s_q, h_q, d_qk) or None."""
    if not isinstance(q, torch.Tensor):
        bad.found.append(f"q must be a tensor [batch, s_q, h_q, d_qk], got {type(q).__name__}")
        return None
    if cu_seqlens_q is None:
        if not bad.tensor("q", q, 4, dtypes, q.device, "[batch, s_q, h_q, d_qk] unless cu_seqlens_q is given"):
            return None
        return (q.shape[0], q.shape[1], q.shape[2], q.shape[3])
    fine = bad.tensor("q", q, 3, dtypes, q.device, "[total_q, h_q, d_qk] when cu_seqlens_q is given")
    fine &= bad.tensor("cu_seqlens_q", cu_seqlens_q, 1, (torch.int32,), q.device, "[batch + 1]")
    fine &= bad.rule(
        isinstance(max_seqlen_q, int) and max_seqlen_q >= 0,
        f"max_seqlen_q must be given beside cu_seqlens_q (the longest query of the batch), got {max_seqlen_q!r}",
    )
    if not fine:
        return None
    return (q.shape[0], int(max_seqlen_q or 0), q.shape[1], q.shape[2])


def _is_aligned(tensor: torch.Tensor) -> bool:
    """Every row begins at a multiple of 16 bytes; the step of a dimension of size 1 counts, compiled kernels check it."""
    steps = tensor.stride()[:-1]
    return tensor.data_ptr() % 16 == 0 and all(step * tensor.element_size() % 16 == 0 for step in steps)


def _pages_are_aligned(cache: torch.Tensor | None) -> bool:
    """Every page begins at a multiple of 16 bytes."""
    assert cache is not None
    return cache.data_ptr() % 16 == 0 and (cache.shape[0] <= 1 or cache.stride(0) * cache.element_size() % 16 == 0)


def _sink(bad: _Violations, attn_sink: object, h_q: int, device: torch.device) -> None:
    if attn_sink is not None and bad.tensor("attn_sink", attn_sink, 1, (torch.float32,), device, "[h_q]"):
        assert isinstance(attn_sink, torch.Tensor)
        bad.rule(attn_sink.shape[0] == h_q, f"attn_sink must have h_q={h_q} entries, got {attn_sink.shape[0]}")


def _descale(
    bad: _Violations, layout: KVLayout | None, q: torch.Tensor, descales: dict[str, object], mods: object
) -> None:
    """Codes of q, and the scales that belong to the call."""
    has_codes, is_coded = q.dtype == CODES, layout is not None and layout.has_call_scale
    bad.rule(is_coded or not has_codes, f"q in e4m3 needs kv_cache in layout fp8_576, got {layout}; convert q to bf16")
    bad.rule(mods is None or not has_codes, "mods must be None where q is e4m3; convert q to bf16")
    for name, each, fits in (("descale_q", "q in e4m3", has_codes), ("descale_k", "layout fp8_576", is_coded)):
        value = descales[name]
        if value is None:
            continue
        bad.rule(fits, f"{name} is for {each} alone, got q in {_short(q.dtype)} and layout {layout}; drop it")
        if bad.tensor(name, value, getattr(value, "ndim", 0), (torch.float32,), q.device, "[1]"):
            bad.rule(value.numel() == 1, f"{name} must be one number for the tensor, got shape {tuple(value.shape)}")  # type: ignore[attr-defined]


def _scale(bad: _Violations, softmax_scale: object) -> None:
    if softmax_scale is not None:
        fine = isinstance(softmax_scale, (int, float)) and math.isfinite(softmax_scale)
        bad.rule(fine, f"softmax_scale must be a finite number, got {softmax_scale!r}")


def _options(bad: _Violations, *, whole: dict[str, object], flags: dict[str, object]) -> None:
    """Types of what is no tensor; raises at once, because every later rule calculates with them."""
    for name, value in whole.items():
        fine = isinstance(value, Integral) and not isinstance(value, bool)
        bad.rule(fine, f"{name} must be an integer, got {value!r}")
    for name, value in flags.items():
        bad.rule(isinstance(value, bool), f"{name} must be True or False, got {value!r}")
    bad.raise_if_any()


def _narrower(window: int, promised: int) -> int:
    """Of two windows, where 0 is none."""
    return min(window, promised) if window and promised else window or promised


@dataclass(frozen=True)
class DecodeProblem:
    """s_q new tokens per request over a dense paged latent cache."""

    op = "decode"
    batch: int
    s_q: int  # tokens per request; with is_varlen the longest of the batch
    total_q: int  # query tokens in all; batch * s_q unless is_varlen
    h_q: int
    h_kv: int
    d_qk: int
    d_v: int
    dtype: torch.dtype  # of q, and of out unless that is e4m3
    layout: KVLayout
    page_size: int
    num_pages: int
    max_pages: int  # columns of block_table
    is_causal: bool = False
    is_varlen: bool = False
    window: int = 0  # a query sees the last `window` keys up to its own position; 0 means all
    has_sink: bool = False
    is_aligned: bool = True  # q and kv_cache start at, and step by, multiples of 16 bytes: what bulk copies need
    is_scale_positive: bool = True  # softmax_scale > 0: the largest score belongs to the largest dot product
    is_batch_invariant: bool = False  # nothing that moves bits may depend on batch: neither the cuts nor the kernel
    mods: Mods | None = None  # functions to inline, equal by fingerprint

    @property
    def out_dtype(self) -> torch.dtype:
        """Of out: that of q, bf16 for codes."""
        return torch.bfloat16 if self.dtype == CODES else self.dtype

    @classmethod
    def from_tensors(
        cls,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        cache_seqlens: torch.Tensor,
        *,
        d_v: int = 512,
        layout: KVLayout | str | None = None,
        is_causal: bool = False,
        window: int | None = None,
        cu_seqlens_q: torch.Tensor | None = None,
        max_seqlen_q: int | None = None,
        attn_sink: torch.Tensor | None = None,
        softmax_scale: float | None = None,
        is_batch_invariant: bool = False,
        mods: Attached | None = None,
        descale_q: torch.Tensor | None = None,
        descale_k: torch.Tensor | None = None,
    ) -> DecodeProblem:
        """Raises ProblemError with every violation at once."""
        bad = _Violations("decode")
        _options(bad, whole={"d_v": d_v, "window": 1 if window is None else window}, flags={"is_causal": is_causal})
        dtypes = (CODES,) if getattr(q, "dtype", None) == CODES else QUERY_DTYPES
        shape = _query(bad, q, cu_seqlens_q, max_seqlen_q, dtypes)
        _scale(bad, softmax_scale)
        bad.rule(window is None or window >= 1, f"window must be at least 1 key or None, got {window}")
        if shape is None:
            bad.raise_if_any()
            raise AssertionError("unreachable: a missing shape is a violation")
        leading, s_q, h_q, d_qk = shape
        device = q.device
        found = _cache(bad, "kv_cache", kv_cache, layout, q.dtype, d_qk, d_v, device)
        table_ok = bad.tensor("block_table", block_table, 2, (torch.int32,), device, "[batch, max_pages]")
        lens_ok = bad.tensor("cache_seqlens", cache_seqlens, 1, (torch.int32,), device, "[batch]")
        batch = leading if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
        if table_ok:
            bad.rule(
                block_table.shape[0] == batch, f"block_table must have batch={batch} rows, got {block_table.shape[0]}"
            )
        if lens_ok:
            bad.rule(
                cache_seqlens.shape[0] == batch,
                f"cache_seqlens must have batch={batch} entries, got {cache_seqlens.shape[0]}",
            )
        bad.rule(batch >= 0, f"cu_seqlens_q must have batch + 1 entries, got {batch + 1}")
        h_kv = kv_cache.shape[2] if isinstance(kv_cache, torch.Tensor) and kv_cache.dim() == 4 else 1
        _heads(bad, h_q, h_kv)
        _sink(bad, attn_sink, h_q, device)
        _descale(bad, found, q, {"descale_q": descale_q, "descale_k": descale_k}, mods)
        if mods is not None and table_ok and found is not None:
            bad.found += mods.violations(
                d_rope=d_qk - d_v, capacity=block_table.shape[1] * kv_cache.shape[1], page_size=kv_cache.shape[1],
                device=device, has_sink=attn_sink is not None,
            )  # fmt: skip
        bad.raise_if_any()
        assert found is not None
        return cls(
            batch=batch, s_q=s_q, total_q=leading * s_q if cu_seqlens_q is None else leading, h_q=h_q, h_kv=h_kv,
            d_qk=d_qk, d_v=d_v, dtype=q.dtype, layout=found, page_size=kv_cache.shape[1], num_pages=kv_cache.shape[0],
            max_pages=block_table.shape[1], is_causal=is_causal, is_varlen=cu_seqlens_q is not None,
            window=_narrower(window or 0, mods.form.window if mods else 0), has_sink=attn_sink is not None, is_aligned=_is_aligned(q) and _is_aligned(kv_cache),
            is_scale_positive=softmax_scale is None or softmax_scale > 0, is_batch_invariant=is_batch_invariant, mods=None if mods is None else mods.form,
        )  # fmt: skip

    __str__ = _describe


@dataclass(frozen=True)
class ExtraKV:
    """A second cache of a sparse decode, with its own layout, pages and indices."""

    layout: KVLayout
    page_size: int
    num_pages: int
    topk: int
    has_topk_length: bool = False

    def __str__(self) -> str:
        return f"({_describe(self)})"


@dataclass(frozen=True)
class SparseDecodeProblem:
    """s_q new tokens per request, each over its own `topk` slots of a paged latent cache."""

    op = "sparse_decode"
    batch: int
    s_q: int
    total_q: int
    h_q: int
    h_kv: int
    d_qk: int
    d_v: int
    dtype: torch.dtype
    layout: KVLayout
    page_size: int
    num_pages: int
    topk: int
    is_varlen: bool = False
    has_topk_length: bool = False
    has_sink: bool = False
    extra: ExtraKV | None = None
    is_aligned: bool = True  # both caches start at, and step from page to page by, multiples of 16 bytes

    @classmethod
    def from_tensors(
        cls,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        indices: torch.Tensor,
        *,
        d_v: int = 512,
        layout: KVLayout | str | None = None,
        topk_length: torch.Tensor | None = None,
        attn_sink: torch.Tensor | None = None,
        extra_kv_cache: torch.Tensor | None = None,
        extra_indices: torch.Tensor | None = None,
        extra_topk_length: torch.Tensor | None = None,
        extra_layout: KVLayout | str | None = None,
        softmax_scale: float | None = None,
    ) -> SparseDecodeProblem:
        """Q and indices are [batch, s_q, ...] or, varlen, [total_q, ...]. Raises ProblemError with every violation."""
        bad = _Violations("sparse_decode")
        _options(bad, whole={"d_v": d_v}, flags={})
        is_varlen = isinstance(q, torch.Tensor) and q.dim() == 3
        lead = "total_q" if is_varlen else "batch, s_q"
        _scale(bad, softmax_scale)
        if not isinstance(q, torch.Tensor) or q.dim() not in (3, 4):
            bad.found.append(f"q must be a tensor [batch, s_q, h_q, d_qk] or [total_q, h_q, d_qk], got {_got(q, 4)}")
            bad.raise_if_any()
        bad.tensor("q", q, q.dim(), QUERY_DTYPES, q.device, f"[{lead}, h_q, d_qk]")
        h_q, d_qk, rows = q.shape[-2], q.shape[-1], tuple(q.shape[:-2])
        found = _cache(bad, "kv_cache", kv_cache, layout, q.dtype, d_qk, d_v, q.device)
        bad.rule(
            found is None or not found.has_call_scale, f"{found} is read by dense decode alone; name another layout"
        )
        topk = _selection(bad, "", indices, topk_length, rows, lead, q.device)
        h_kv = kv_cache.shape[2] if isinstance(kv_cache, torch.Tensor) and kv_cache.dim() == 4 else 1
        bad.rule(h_kv == 1, f"sparse decode reads one KV head, got h_kv={h_kv}; call once per head")
        _heads(bad, h_q, h_kv)
        _sink(bad, attn_sink, h_q, q.device)
        extra = None
        if extra_kv_cache is None:
            for name, value in (("extra_indices", extra_indices), ("extra_topk_length", extra_topk_length)):
                bad.rule(value is None, f"{name} was given without extra_kv_cache; give both or neither")
        else:
            extra_found = _cache(bad, "extra_kv_cache", extra_kv_cache, extra_layout, q.dtype, d_qk, d_v, q.device)
            extra_topk = _selection(bad, "extra_", extra_indices, extra_topk_length, rows, lead, q.device)
            heads = extra_kv_cache.shape[2] if extra_found is not None else 1
            bad.rule(heads == 1, f"sparse decode reads one KV head, got extra_kv_cache with {heads}")
            fits = extra_found is None or not extra_found.has_call_scale
            bad.rule(fits, f"{extra_found} is read by dense decode alone; name another extra_kv_layout")
            if extra_found is not None:
                extra = ExtraKV(
                    extra_found, extra_kv_cache.shape[1], extra_kv_cache.shape[0], extra_topk,
                    extra_topk_length is not None,
                )  # fmt: skip
        bad.raise_if_any()
        assert found is not None
        batch, s_q = (rows[0], 1) if is_varlen else (rows[0], rows[1])
        return cls(
            batch=batch, s_q=s_q, total_q=batch * s_q, h_q=h_q, h_kv=h_kv, d_qk=d_qk, d_v=d_v, dtype=q.dtype,
            layout=found, page_size=kv_cache.shape[1], num_pages=kv_cache.shape[0], topk=topk, is_varlen=is_varlen,
            has_topk_length=topk_length is not None, has_sink=attn_sink is not None, extra=extra,
            is_aligned=_pages_are_aligned(kv_cache) and (extra is None or _pages_are_aligned(extra_kv_cache)),
        )  # fmt: skip

    __str__ = _describe


def _selection(
    bad: _Violations, prefix: str, indices: object, topk_length: object, rows: tuple[int, ...], lead: str,
    device: torch.device,
) -> int:  # fmt: skip
    """Checks `indices` and `topk_length` of one cache; returns topk."""
    name = f"{prefix}indices"
    if not bad.tensor(name, indices, len(rows) + 1, (torch.int32,), device, f"[{lead}, topk]"):
        return 0
    assert isinstance(indices, torch.Tensor)
    bad.rule(
        tuple(indices.shape[:-1]) == rows,
        f"{name} must be [{lead}, topk] = {rows} + (topk,), got {tuple(indices.shape)}",
    )
    if topk_length is not None:
        # One length per request, as FlashMLA has it, or one per query token.
        length_name = f"{prefix}topk_length"
        if not isinstance(topk_length, torch.Tensor):
            bad.found.append(f"{length_name} must be a tensor [{lead}] or [batch], got {type(topk_length).__name__}")
        elif bad.tensor(length_name, topk_length, topk_length.dim(), (torch.int32,), device, f"[{lead}]"):
            bad.rule(
                tuple(topk_length.shape) in (rows, rows[:1]),
                f"{length_name} must be [{lead}] = {rows} or [batch] = {rows[:1]}, got {tuple(topk_length.shape)}",
            )
    return int(indices.shape[-1])


@dataclass(frozen=True)
class SparsePrefillProblem:
    """s_q tokens, each over its own `topk` rows of an unpaged latent KV tensor."""

    op = "sparse_prefill"
    s_q: int
    s_kv: int
    h_q: int
    h_kv: int
    d_qk: int
    d_v: int
    dtype: torch.dtype
    topk: int
    has_topk_length: bool = False
    has_sink: bool = False

    @classmethod
    def from_tensors(
        cls,
        q: torch.Tensor,
        kv: torch.Tensor,
        indices: torch.Tensor,
        *,
        d_v: int = 512,
        topk_length: torch.Tensor | None = None,
        attn_sink: torch.Tensor | None = None,
        softmax_scale: float | None = None,
    ) -> SparsePrefillProblem:
        """Q [s_q, h_q, d_qk], kv [s_kv, h_kv, d_qk], indices [s_q, h_kv, topk]. Raises ProblemError."""
        bad = _Violations("sparse_prefill")
        _options(bad, whole={"d_v": d_v}, flags={})
        _scale(bad, softmax_scale)
        device = q.device if isinstance(q, torch.Tensor) else torch.device("cpu")
        fine = bad.tensor("q", q, 3, QUERY_DTYPES, device, "[s_q, h_q, d_qk]")
        fine &= bad.tensor("kv", kv, 3, QUERY_DTYPES, device, "[s_kv, h_kv, d_qk]")
        fine &= bad.tensor("indices", indices, 3, (torch.int32,), device, "[s_q, h_kv, topk]")
        if not fine:
            bad.raise_if_any()
        s_q, h_q, d_qk = q.shape
        s_kv, h_kv, _ = kv.shape
        bad.rule(kv.dtype == q.dtype, f"kv must have the dtype of q ({_short(q.dtype)}), got {_short(kv.dtype)}")
        bad.rule(kv.shape[2] == d_qk, f"q has d_qk={d_qk} columns but kv has {kv.shape[2]}; both must agree")
        bad.rule(1 <= d_v <= d_qk, f"d_v must be 1 to d_qk={d_qk}, got {d_v}")
        bad.rule(
            tuple(indices.shape[:2]) == (s_q, h_kv),
            f"indices must be [s_q, h_kv, topk] = ({s_q}, {h_kv}, topk), got {tuple(indices.shape)}",
        )
        _heads(bad, h_q, h_kv)
        _sink(bad, attn_sink, h_q, device)
        if topk_length is not None and bad.tensor("topk_length", topk_length, 1, (torch.int32,), device, "[s_q]"):
            bad.rule(
                topk_length.shape[0] == s_q, f"topk_length must have s_q={s_q} entries, got {topk_length.shape[0]}"
            )
        bad.raise_if_any()
        return cls(
            s_q=s_q, s_kv=s_kv, h_q=h_q, h_kv=h_kv, d_qk=d_qk, d_v=d_v, dtype=q.dtype, topk=indices.shape[2],
            has_topk_length=topk_length is not None, has_sink=attn_sink is not None,
        )  # fmt: skip

    __str__ = _describe


@dataclass(frozen=True)
class PrefillProblem:
    """Varlen multi-head attention over expanded K and V: the prefill (and training) form of MLA."""

    op = "prefill"
    batch: int
    total_q: int
    total_k: int
    max_seqlen_q: int
    max_seqlen_k: int
    h_q: int
    h_kv: int
    d_qk: int
    d_v: int
    dtype: torch.dtype
    is_causal: bool = False
    needs_grad: bool = False

    @classmethod
    def from_tensors(
        cls,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        *,
        is_causal: bool = False,
        softmax_scale: float | None = None,
    ) -> PrefillProblem:
        """Q [total_q, h_q, d_qk], k [total_k, h_kv, d_qk], v [total_k, h_kv, d_v]. Raises ProblemError."""
        bad = _Violations("prefill")
        _options(
            bad, whole={"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}, flags={"is_causal": is_causal}
        )
        _scale(bad, softmax_scale)
        device = q.device if isinstance(q, torch.Tensor) else torch.device("cpu")
        fine = bad.tensor("q", q, 3, QUERY_DTYPES, device, "[total_q, h_q, d_qk]")
        fine &= bad.tensor("k", k, 3, QUERY_DTYPES, device, "[total_k, h_kv, d_qk]")
        fine &= bad.tensor("v", v, 3, QUERY_DTYPES, device, "[total_k, h_kv, d_v]")
        fine &= bad.tensor("cu_seqlens_q", cu_seqlens_q, 1, (torch.int32,), device, "[batch + 1]")
        fine &= bad.tensor("cu_seqlens_k", cu_seqlens_k, 1, (torch.int32,), device, "[batch + 1]")
        if not fine:
            bad.raise_if_any()
        bad.rule(
            k.dtype == q.dtype == v.dtype,
            f"q, k and v must share a dtype, got {_short(q.dtype)}, {_short(k.dtype)}, {_short(v.dtype)}",
        )
        bad.rule(q.shape[2] >= 1 and v.shape[2] >= 1, f"q and v must have columns, got {q.shape[2]} and {v.shape[2]}")
        bad.rule(k.shape[2] == q.shape[2], f"q has d_qk={q.shape[2]} columns but k has {k.shape[2]}; both must agree")
        bad.rule(
            k.shape[:2] == v.shape[:2],
            f"k and v must share [total_k, h_kv], got {tuple(k.shape[:2])} and {tuple(v.shape[:2])}",
        )
        bad.rule(
            cu_seqlens_q.shape == cu_seqlens_k.shape and cu_seqlens_q.shape[0] >= 1,
            f"cu_seqlens_q and cu_seqlens_k must both be [batch + 1], got {tuple(cu_seqlens_q.shape)} and {tuple(cu_seqlens_k.shape)}",
        )
        for name, value in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
            bad.rule(isinstance(value, int) and value >= 0, f"{name} must be an int of at least 0, got {value!r}")
        _heads(bad, q.shape[1], k.shape[1])
        bad.raise_if_any()
        return cls(
            batch=cu_seqlens_q.shape[0] - 1, total_q=q.shape[0], total_k=k.shape[0], max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k, h_q=q.shape[1], h_kv=k.shape[1], d_qk=q.shape[2], d_v=v.shape[2], dtype=q.dtype,
            is_causal=is_causal, needs_grad=q.requires_grad or k.requires_grad or v.requires_grad,
        )  # fmt: skip

    __str__ = _describe


@dataclass(frozen=True)
class AppendProblem:
    """New tokens for a paged latent cache. Their number is no part of it."""

    op = "append"
    d_qk: int
    dtype: torch.dtype  # of the rows
    layout: KVLayout
    page_size: int
    num_pages: int
    d_rope: int = 0  # last columns of a row that are rotated on their way; 0: none
    is_aligned: bool = True  # rows, pages, tables start at and step by multiples of 16 bytes

    @classmethod
    def from_tensors(
        cls, cache: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor, *, layout: KVLayout | str | None,
        rope: Rope | None = None, positions: torch.Tensor | None = None, descale: torch.Tensor | None = None,
    ) -> AppendProblem:  # fmt: skip
        """Raises ProblemError with every violation at once."""
        bad = _Violations("append")
        device = cache.device if isinstance(cache, torch.Tensor) else torch.device("cpu")
        fine = bad.tensor("rows", rows, 2, QUERY_DTYPES, device, "[n, d_qk]")
        for name, each in ({"slots": slots} | ({} if positions is None else {"positions": positions})).items():
            if bad.tensor(name, each, 1, (torch.int64, torch.int32), device, "[n]") and fine:
                bad.rule(len(each) == len(rows), f"{name} must have {len(rows)} entries like rows, got {len(each)}")
        bad.rule((rope is None) == (positions is None), "rope and positions belong together; give both or neither")
        if not fine:
            bad.raise_if_any()
        d_qk = rows.shape[1]
        dtype = getattr(cache, "dtype", rows.dtype)
        found = _cache(bad, "cache", cache, layout, dtype, d_qk, min(d_qk, 512), device, "rows")
        if found is not None:
            bad.rule(cache.shape[2] == 1, f"cache must have one KV head, got {cache.shape[2]}; append head by head")
        if descale is not None:
            fits = found is not None and found.has_call_scale
            bad.rule(fits, f"descale is for layout fp8_576 alone, got {found}; drop it")
            if bad.tensor("descale", descale, getattr(descale, "ndim", 0), (torch.float32,), device, "[1]"):
                bad.rule(descale.numel() == 1, f"descale must be one number, got shape {tuple(descale.shape)}")
        d_rope = 0 if rope is None else 2 * rope.cos.shape[1]
        bad.found += [] if rope is None else rope.violations(d_rope, 0, 0, device)
        bad.rule(d_rope <= d_qk, f"rope rotates {d_rope} columns, but rows have {d_qk}")
        bad.raise_if_any()
        assert found is not None
        read = [rows, cache[:, 0, 0] if found.is_quantised else cache[:, :, 0], *([rope.cos, rope.sin] if rope else [])]
        return cls(d_qk, rows.dtype, found, cache.shape[1], cache.shape[0], d_rope, all(map(_is_aligned, read)))

    __str__ = _describe


Problem = DecodeProblem | SparseDecodeProblem | SparsePrefillProblem | PrefillProblem | AppendProblem
