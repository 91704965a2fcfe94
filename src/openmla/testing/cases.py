"""Hostile cases: seeded operands in which everything that may be garbage is garbage.

Every case has NaN in each KV byte that no row reaches, nonsense in block-table entries behind the length and in
indices behind topk_length, strided and offset views, shuffled and shared pages, empty requests, odd sizes. An
operation that passes them depends on nothing it was not promised.

    case = draw(17, "decode")
    out, lse, max_logits = case.run(backend="torch")
    check(out, lse, case.golden(), dtype=case.dtype, max_logits=max_logits).require(case.repro)

The same seed gives the same case, bit for bit, on every machine with the same PyTorch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch

from openmla.core.errors import ProblemError
from openmla.core.layout import BYTE_LAYOUT_NAMES, KVLayout, kv_layout, plain_layout
from openmla.reference import attention
from openmla.reference.quant import read_rows, write_rows
from openmla.testing.families import FAMILIES, WEIGHTS, draw_keys, draw_queries, draw_values

OPS = ("decode", "sparse_decode", "sparse_prefill", "prefill")
INVALID_SLOTS = (-1, -(2**31), 114514, 2**31 - 1)  # and num_slots, which depends on the cache
PAGE_SIZES = (1, 2, 16, 53, 61, 64, 69, 128)
_LENGTHS = (0, 1, 1, 2, 5, 17, 63, 64, 65, 100, 127, 129)
# Around the ends of tiles of 64 to 512 keys, and several tiles long.
_LARGE_LENGTHS = (511, 512, 513, 577, 1000, 1024, 1025, 2049)
_SMALL_DIMS = ((16, 8), (24, 16), (40, 32), (64, 64), (72, 64), (7, 5))

T = TypeVar("T")


@dataclass(frozen=True)
class Case:
    """One hostile call. Fields that an operation does not have keep their defaults."""

    op: str
    seed: int
    family: str
    dtype: torch.dtype
    h_q: int
    h_kv: int
    d_qk: int
    d_v: int
    softmax_scale: float
    seqlens_q: tuple[int, ...]  # query tokens per request
    seqlens_k: tuple[int, ...]  # as given to the operation: negative or beyond capacity now and then
    is_varlen: bool = False
    is_causal: bool = False
    window: int = 0
    layout: str = ""  # "" means plain elements in the dtype of q
    page_size: int = 1
    topk: int = 0
    has_topk_length: bool = False
    extra_layout: str = ""
    extra_page_size: int = 1
    extra_topk: int = 0  # 0: no second cache
    has_sink: bool = False
    invalid_share: float = 0.0  # of indices, or of pages in use
    nan_tokens: bool = False  # some attended keys hold NaN
    is_large: bool = False  # several tiles of keys per row
    no_length: int = 5000  # a length of this or more is none: the block table has three pages for it
    poison: int = 0xFF  # what every KV byte holds that no row reaches; 0xFF is NaN in each format

    @property
    def repro(self) -> str:
        """The command that runs this case alone."""
        where = f"tests/unit/test_fuzz_ops.py::test_{'large_' if self.is_large else ''}{self.op}_cases"
        return f"REPRO: python -m pytest {where} --case-seed={self.seed}\n  {self}"

    def tensors(self) -> dict[str, Any]:
        """Keyword arguments of `openmla.reference.attention.<op>`, made afresh."""
        generator = torch.Generator().manual_seed(self.seed)
        return _MAKERS[self.op](self, random.Random(f"{self.op} tensors {self.seed}"), generator)

    def golden(self, operands: dict[str, Any] | None = None) -> attention.Attention:
        """The fp64 oracle on this case's tensors, or on `operands`, with the quantities of the tolerance rule."""
        return self.reference("fp64", operands, with_bounds=True)

    def reference(self, precision: str, operands: dict[str, Any] | None = None, **options: Any) -> attention.Attention:
        """The oracle in any precision; options are with_bounds and num_splits."""
        operation = getattr(attention, self.op)
        result: attention.Attention = operation(**(operands or self.tensors()), precision=precision, **options)
        return result

    def run(
        self, backend: str | None = None, operands: dict[str, Any] | None = None, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The public operation; returns (out, lse, max_logits), max_logits None where it has none."""
        import openmla

        given = native_arguments(self.op, operands or self.tensors())
        result = getattr(openmla, self.op)(**given, **options, backend=backend)
        if self.op == "sparse_prefill":
            return result[0], result[2], result[1]
        return result[0], result[1], None

    def __str__(self) -> str:
        shown = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return " ".join(
            f"{name}={value}"
            for name, value in shown
            if value not in ("", 0, False) and name not in ("op", "poison", "no_length")
        )


def native_arguments(op: str, operands: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `openmla.<op>` for those of the oracle: other names of layouts, None for no window, maxima."""
    names = {"layout": "kv_layout", "extra_layout": "extra_kv_layout"}
    given = {names.get(name, name): value for name, value in operands.items()}
    if op == "decode":
        given["window"] = given["window"] or None
    for side in ("q", "k"):
        offsets = given.get(f"cu_seqlens_{side}")
        if offsets is not None:
            given[f"max_seqlen_{side}"] = int(offsets.diff().max()) if offsets.shape[0] > 1 else 0
    return given


def draw(seed: int, op: str, *, is_large: bool = False) -> Case:
    """The case of that seed; a large one has rows of 511 keys and more. Raises ProblemError for an unknown operation."""
    if op not in OPS:
        raise ProblemError("draw", [f"op must be one of {', '.join(OPS)}, got {op!r}"])
    pick = random.Random(f"{op} {seed}")
    family = pick.choices(FAMILIES, WEIGHTS)[0]
    dtype = pick.choices((torch.bfloat16, torch.float16, torch.float32), (5, 3, 2))[0]
    fields_of_op = {"decode": _draw_decode, "sparse_decode": _draw_sparse_decode}.get(op, _draw_unpaged)
    chosen = fields_of_op(pick, op)
    chosen["softmax_scale"] = chosen["d_qk"] ** -0.5 * pick.choice((1.0, 1.0, 1.73))
    chosen["nan_tokens"] = pick.random() < 0.05
    case = Case(op=op, seed=seed, family=family, dtype=dtype, **chosen)
    return _enlarge(case, pick) if is_large else case


def _enlarge(case: Case, pick: random.Random) -> Case:
    """The same case with one or two requests of long rows and few heads."""
    h_q = case.h_q if case.h_q <= 16 else 16
    h_kv = case.h_kv if h_q % case.h_kv == 0 else 1
    batch = pick.choice((1, 2))
    s_q = pick.choice((1, 2, 5) if case.op != "prefill" else (1, 65, 300))
    sizes: dict[str, Any] = {"seqlens_q": (s_q,) * batch, "seqlens_k": pick.choices(_LARGE_LENGTHS, k=batch)}
    if case.op.startswith("sparse"):
        sizes = {"seqlens_q": (s_q,), "seqlens_k": (1500,), "topk": pick.choice((512, 513, 1000, 2048))}
        sizes["extra_topk"] = pick.choice((64, 513)) if case.extra_topk else 0
    sizes = {name: tuple(value) if isinstance(value, list) else value for name, value in sizes.items()}
    return replace(case, h_q=h_q, h_kv=h_kv, is_large=True, **sizes)


def _draw_heads(pick: random.Random, may_group: bool) -> tuple[int, int]:
    h_q = pick.choices((1, 3, 9, 16, 64, 128), (4, 6, 4, 6, 1, 1))[0]
    h_kv = pick.choice([1, 1, 1, *(x for x in (2, 3, 8) if h_q % x == 0)]) if may_group else 1
    return h_q, h_kv


def _draw_dims(pick: random.Random, byte_share: float) -> tuple[int, int, str]:
    """(d_qk, d_v, layout name or "")."""
    if pick.random() < byte_share:
        found = kv_layout(pick.choice(BYTE_LAYOUT_NAMES))
        return found.d_qk, found.d_v, found.name
    d_qk, d_v = pick.choices(((576, 512), (512, 512), pick.choice(_SMALL_DIMS)), (2, 1, 4))[0]
    return d_qk, d_v, ""


def _draw_lengths(pick: random.Random, batch: int, h_q: int) -> tuple[int, ...]:
    """Up to `batch` lengths; long ones only where few heads keep the case small."""
    longest = 1000 if h_q <= 3 and pick.random() < 0.1 else 130
    drawn = [pick.choice((pick.choice(_LENGTHS), pick.randint(0, longest))) for _ in range(batch)]
    return tuple(drawn)


def _draw_decode(pick: random.Random, op: str) -> dict[str, Any]:
    d_qk, d_v, layout = _draw_dims(pick, 0.25)
    h_q, h_kv = _draw_heads(pick, may_group=not layout)
    batch = pick.choices((0, 1, 2, 3, 5), (1, 8, 8, 6, 3))[0] if h_q < 64 else 1
    is_varlen = pick.random() < 0.25
    s_q = pick.choices((0, 1, 2, 3, 5), (1, 14, 8, 3, 2))[0]
    lengths = list(_draw_lengths(pick, batch, h_q))
    for request in range(batch):
        if pick.random() < 0.04:
            lengths[request] = pick.choice((-1, -(2**31), 2**31 - 1, 10_000))
    return {
        "h_q": h_q,
        "h_kv": h_kv,
        "d_qk": d_qk,
        "d_v": d_v,
        "layout": layout,
        "page_size": pick.choice(PAGE_SIZES),
        "seqlens_q": tuple(pick.choice((0, 1, 1, 2, 4)) if is_varlen else s_q for _ in range(batch)),
        "seqlens_k": tuple(lengths),
        "is_varlen": is_varlen,
        "is_causal": pick.random() < 0.5,
        "window": pick.choice((1, 5, 64, 100)) if pick.random() < 0.15 else 0,
        "has_sink": pick.random() < 0.4,
        "invalid_share": pick.choices((0.0, 0.3, 1.0), (8, 2, 1))[0],
    }


def _draw_sparse_decode(pick: random.Random, op: str) -> dict[str, Any]:
    d_qk, d_v, layout = _draw_dims(pick, 0.45)
    h_q, _ = _draw_heads(pick, may_group=False)
    batch = pick.choices((0, 1, 2, 3), (1, 8, 8, 6))[0] if h_q < 64 else 1
    s_q = pick.choices((0, 1, 2, 3), (1, 14, 8, 4))[0] if h_q < 64 else 1
    has_extra = pick.random() < 0.35
    same_width = [name for name in ("", *BYTE_LAYOUT_NAMES) if not name or kv_layout(name).d_qk == d_qk]
    if (d_qk, d_v) not in ((576, 512), (512, 512)):
        same_width = [""]
    return {
        "h_q": h_q,
        "h_kv": 1,
        "d_qk": d_qk,
        "d_v": d_v,
        "layout": layout,
        "page_size": pick.choice(PAGE_SIZES),
        "seqlens_q": (s_q,) * batch,
        "seqlens_k": (pick.choice((1, 40, 64, 150)),),  # slots that hold tokens
        "is_varlen": pick.random() < 0.3,
        "topk": pick.choices((0, 1, 2, 63, 64, 65, 128, 200), (1, 3, 3, 4, 4, 4, 4, 4))[0],
        "has_topk_length": pick.random() < 0.5,
        "extra_layout": pick.choice(same_width) if has_extra else "",
        "extra_page_size": pick.choice(PAGE_SIZES) if has_extra else 1,
        "extra_topk": pick.choice((1, 2, 64, 100)) if has_extra else 0,
        "has_sink": pick.random() < 0.4,
        "invalid_share": pick.choices((0.0, 0.1, 0.5, 1.0), (4, 6, 3, 1))[0],
    }


def _draw_unpaged(pick: random.Random, op: str) -> dict[str, Any]:
    if op == "sparse_prefill":
        d_qk, d_v, _ = _draw_dims(pick, 0.0)
        h_q, h_kv = _draw_heads(pick, may_group=True)
        return {
            "h_q": h_q,
            "h_kv": h_kv,
            "d_qk": d_qk,
            "d_v": d_v,
            "seqlens_q": (pick.choices((0, 1, 2, 5, 9), (1, 6, 6, 6, 4))[0] if h_q < 64 else 2,),
            "seqlens_k": (pick.choices((0, 1, 63, 64, 65, 200), (1, 4, 4, 4, 4, 6))[0],),
            "topk": pick.choices((0, 1, 2, 63, 64, 65, 128, 200), (1, 3, 3, 4, 4, 4, 4, 4))[0],
            "has_topk_length": pick.random() < 0.5,
            "has_sink": pick.random() < 0.4,
            "invalid_share": pick.choices((0.0, 0.1, 0.5, 1.0), (4, 6, 3, 1))[0],
        }
    d_qk, d_v = pick.choice(((192, 128), (128, 128), *_SMALL_DIMS))
    h_q, h_kv = _draw_heads(pick, may_group=True)
    if h_q >= 64:
        d_qk, d_v = pick.choice(_SMALL_DIMS)
    batch = pick.choices((0, 1, 2, 3), (1, 8, 8, 6))[0]
    return {
        "h_q": h_q,
        "h_kv": h_kv,
        "d_qk": d_qk,
        "d_v": d_v,
        "seqlens_q": tuple(pick.choice((0, 1, 2, 17, 63, 64, 65)) for _ in range(batch)),
        "seqlens_k": tuple(min(length, 200) for length in _draw_lengths(pick, batch, h_q)),
        "is_causal": pick.random() < 0.6,
    }


def _hostile_view(pick: random.Random, content: torch.Tensor, garbage: float) -> torch.Tensor:
    """The same numbers in a tensor with padded strides and a storage offset; the gaps hold `garbage`."""
    if content.dim() == 0 or pick.random() < 0.4:
        return content
    padded = [size + pick.choice((0, 1, 3)) for size in content.shape[:-1]]
    width = content.shape[-1] + pick.choice((0, 8, 16))
    if content.dim() == 1:
        padded, width = [], content.shape[0] + 3
    pool = torch.full((*padded, width), garbage, dtype=content.dtype)
    begin = width - content.shape[-1]
    view = pool[(*(slice(0, size) for size in content.shape[:-1]), slice(begin, begin + content.shape[-1]))]
    view.copy_(content)
    return view


def _poisoned_cache(
    case: Case, pick: random.Random, layout: KVLayout, num_pages: int, page_size: int, h_kv: int
) -> torch.Tensor:
    """A cache of nothing but poison, page padding included, with a random page stride and storage offset."""
    page_elements = page_size * h_kv * layout.row_elements
    slack = pick.choice((0, 16, 48))
    pool = torch.full(
        ((page_elements + slack) * num_pages * layout.dtype.itemsize + 64,), case.poison, dtype=torch.uint8
    )
    elements = pool.view(layout.dtype)
    row = layout.row_elements
    return elements.as_strided(
        (num_pages, page_size, h_kv, row),
        (page_elements + slack, h_kv * row, row, 1),
        pick.choice((0, 16)) if layout.dtype.itemsize <= 2 else 0,
    )


def _store(cache: torch.Tensor, layout: KVLayout, slots: torch.Tensor, keys: torch.Tensor) -> None:
    for head in range(cache.shape[2]):
        write_rows(cache[:, :, head : head + 1], layout, slots, keys[:, head])


def _load(cache: torch.Tensor, layout: KVLayout, slots: torch.Tensor) -> torch.Tensor:
    return torch.stack([read_rows(cache[:, :, head : head + 1], layout, slots) for head in range(cache.shape[2])], 1)


def _sink(case: Case, pick: random.Random) -> torch.Tensor | None:
    if not case.has_sink:
        return None
    drawn = [pick.choice((-torch.inf, torch.inf, 0.0, pick.gauss(0, 3), pick.gauss(5, 3))) for _ in range(case.h_q)]
    return torch.tensor(drawn, dtype=torch.float32)


def _layout(case: Case, name: str) -> KVLayout:
    return kv_layout(name) if name else plain_layout(case.dtype, case.d_qk, case.d_v)


def _queries(case: Case, parts: Sequence[torch.Tensor], pick: random.Random) -> torch.Tensor:
    """Per-request queries as [total_q, h_q, d_qk] or [batch, s_q, h_q, d_qk], in a hostile view."""
    flat = torch.cat([torch.zeros(0, case.h_q, case.d_qk), *parts]).to(case.dtype)
    if not case.is_varlen and case.op in ("decode", "sparse_decode"):
        s_q = case.seqlens_q[0] if case.seqlens_q else 1
        flat = flat.reshape(len(case.seqlens_q), s_q, case.h_q, case.d_qk)
    return _hostile_view(pick, flat, torch.nan)


def _offsets(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def _make_decode(case: Case, pick: random.Random, generator: torch.Generator) -> dict[str, Any]:
    layout, size = _layout(case, case.layout), case.page_size
    batch = len(case.seqlens_k)
    # Lengths that are no lengths (negative, beyond capacity) get a real table of three full pages.
    real = [length if 0 <= length < case.no_length else 3 * size for length in case.seqlens_k]
    used = [-(-length // size) for length in real]
    columns = max(used, default=0) + pick.choice((0, 1, 3))
    num_pages = max(sum(used) + pick.choice((0, 1, 4)), 1)
    cache = _poisoned_cache(case, pick, layout, num_pages, size, case.h_kv)
    is_written = torch.zeros(num_pages * size, dtype=torch.bool)
    free = list(reversed(range(num_pages)))
    if pick.random() < 0.7:  # else pages lie in order, which kernels may read as one stretch
        pick.shuffle(free)
    garbage = (-1, -(2**31), 2_147_480_000, 2**31 - 1, num_pages)
    table = torch.tensor([[pick.choice(garbage) for _ in range(columns)] for _ in range(batch)], dtype=torch.int32)
    table = table.reshape(batch, columns)
    queries: list[torch.Tensor] = []
    spoiled: list[int] = []
    partly: set[int] = set()  # slots that only some queries of a request see
    pages: list[int] = []
    for request in range(batch):
        # Requests share their first pages with the previous one now and then.
        shared = pages[: used[request]] if pick.random() < 0.2 else []
        pages = shared + [free.pop() for _ in range(used[request] - len(shared))]
        table[request, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        if not 0 <= case.seqlens_k[request] < case.no_length:
            # A length beyond capacity reaches every column, so every column holds a page that exists.
            rest = [pick.choice(pages) for _ in range(columns - len(pages))]
            table[request, len(pages) :] = torch.tensor(rest, dtype=torch.int32)
        position = torch.arange(real[request])
        slots = torch.tensor(pages, dtype=torch.int64)[position // size] * size + position % size
        fresh = ~is_written[slots]
        shape = (int(fresh.sum()), case.h_kv, case.d_qk)
        _store(cache, layout, slots[fresh], draw_keys(case.family, shape, case.d_v, generator, position[fresh]))
        is_written[slots] = True
        s_q, keys = case.seqlens_q[request], _load(cache, layout, slots)
        queries.append(draw_queries(case.family, s_q, case.h_q, keys, case.d_v, case.softmax_scale, generator))
        if case.nan_tokens and slots.shape[0]:
            spoiled.append(int(slots[pick.randrange(slots.shape[0])]))
            partly.update(_seen_by_some(case, s_q, slots))
        _spoil(case, pick, table[request, : len(pages)], garbage)
    spoiled = [slot for slot in spoiled if slot not in partly]  # pages may be shared: seen by all, in every request
    nan = torch.full((len(spoiled), case.h_kv, case.d_qk), torch.nan)
    _store(cache, layout, torch.tensor(spoiled, dtype=torch.int64), nan)
    operands: dict[str, Any] = {
        "q": _queries(case, queries, pick),
        "kv_cache": cache,
        "block_table": _hostile_view(pick, table, -(2**31)),
        "cache_seqlens": _hostile_view(pick, torch.tensor(case.seqlens_k, dtype=torch.int32), -7),
        "softmax_scale": case.softmax_scale,
        "d_v": case.d_v,
        "layout": layout if case.layout else None,
        "is_causal": case.is_causal,
        "window": case.window,
        "attn_sink": _sink(case, pick),
    }
    if case.is_varlen:
        operands["cu_seqlens_q"] = _offsets(case.seqlens_q)
    return operands


def _seen_by_some(case: Case, s_q: int, slots: torch.Tensor) -> list[int]:
    """Slots of a request that some of its queries see and others do not: a NaN there may reach all, 0 * NaN is NaN."""
    length = slots.shape[0]
    first = max(length - case.window, 0) if case.window else 0
    end = max(length - s_q + 1, first) if case.is_causal or case.window else length
    if s_q <= 1 and not case.window:
        return []
    return [int(slot) for position, slot in enumerate(slots) if not first <= position < end]


def _spoil(case: Case, pick: random.Random, values: torch.Tensor, garbage: Sequence[int]) -> None:
    """Overwrite `invalid_share` of a row of ids, in place."""
    for i in range(values.shape[0]):
        if pick.random() < case.invalid_share:
            values[i] = pick.choice(garbage)


def _selection(
    case: Case, pick: random.Random, tokens: int, share: int, topk: int, filled: torch.Tensor, num_slots: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Slots that hold tokens, spoiled; garbage behind the length, which `share` tokens have in common.

    Returns:
        indices [tokens, topk] int32, and topk_length [tokens / share] int32 or None.
    """
    generator = torch.Generator().manual_seed(pick.randrange(2**31))
    indices = torch.full((tokens, topk), -1)
    if filled.numel():
        indices = filled[torch.randint(filled.shape[0], (tokens, topk), generator=generator)]
    garbage = torch.tensor((*INVALID_SLOTS, num_slots))
    wrong = torch.rand(tokens, topk, generator=generator) < case.invalid_share
    indices = torch.where(wrong, garbage[torch.randint(5, (tokens, topk), generator=generator)], indices)
    if not case.has_topk_length:
        return indices.to(torch.int32), None
    legal = (0, topk, pick.randint(0, topk), pick.randint(0, topk))
    choices = [(*legal, -3, topk + 7) if pick.random() < 0.2 else legal for _ in range(tokens // share)]
    lengths = [pick.choice(each) for each in choices]
    for token in range(tokens):
        # Behind the length: slots that hold poison, and no slots at all.
        tail = torch.randint(-(2**31), 2**31 - 1, (topk,), generator=generator)
        anywhere = torch.randint(max(num_slots, 1), (topk,), generator=generator)
        tail = torch.where(torch.rand(topk, generator=generator) < 0.5, tail, anywhere)
        begin = min(max(lengths[token // share], 0), topk)
        indices[token, begin:] = tail[begin:]
    return indices.to(torch.int32), torch.tensor(lengths, dtype=torch.int32)


def _sparse_cache(
    case: Case, pick: random.Random, generator: torch.Generator, layout: KVLayout, page_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cache, slots that hold tokens); all other bytes are NaN."""
    count = case.seqlens_k[0]
    num_pages = -(-count // page_size) + pick.choice((1, 2))
    cache = _poisoned_cache(case, pick, layout, num_pages, page_size, 1)
    filled = torch.randperm(num_pages * page_size, generator=generator)[:count]
    _store(cache, layout, filled, draw_keys(case.family, (filled.shape[0], 1, case.d_qk), case.d_v, generator))
    return cache, filled


def _make_sparse_decode(case: Case, pick: random.Random, generator: torch.Generator) -> dict[str, Any]:
    batch = len(case.seqlens_q)
    s_q = case.seqlens_q[0] if batch else 1
    tokens = batch * s_q
    lead = (tokens,) if case.is_varlen else (batch, s_q)
    share = s_q if not case.is_varlen and s_q and pick.random() < 0.5 else 1  # tokens that have a length in common
    operands: dict[str, Any] = {}
    queries: list[torch.Tensor] = []
    for prefix, name, size, topk in (
        ("", case.layout, case.page_size, case.topk),
        ("extra_", case.extra_layout, case.extra_page_size, case.extra_topk),
    ):
        if prefix and not topk:
            continue
        layout = _layout(case, name)
        cache, filled = _sparse_cache(case, pick, generator, layout, size)
        indices, lengths = _selection(case, pick, tokens, share, topk, filled, cache.shape[0] * size)
        if not queries:
            read = _load(cache, layout, filled)
            queries = [draw_queries(case.family, tokens, case.h_q, read, case.d_v, case.softmax_scale, generator)]
        if case.nan_tokens:
            nan = torch.full((1, 1, case.d_qk), torch.nan)
            _store(cache, layout, filled[:1], nan)
        if lengths is not None:
            lengths = lengths if share > 1 else lengths.reshape(lead)
            operands[f"{prefix}topk_length"] = lengths
        operands[f"{prefix}kv_cache"] = cache
        operands[f"{prefix}indices"] = _hostile_view(pick, indices.reshape(*lead, topk), -(2**31))
        operands[f"{prefix}layout"] = layout if name else None
    return {
        "q": _queries(case, queries, pick),
        "softmax_scale": case.softmax_scale,
        "d_v": case.d_v,
        "attn_sink": _sink(case, pick),
        **operands,
    }


def _make_sparse_prefill(case: Case, pick: random.Random, generator: torch.Generator) -> dict[str, Any]:
    s_q, s_kv = case.seqlens_q[0], case.seqlens_k[0]
    kv = draw_keys(case.family, (s_kv, case.h_kv, case.d_qk), case.d_v, generator).to(case.dtype)
    q = draw_queries(case.family, s_q, case.h_q, kv, case.d_v, case.softmax_scale, generator)
    reachable = torch.randperm(s_kv, generator=generator)[: max(s_kv * 3 // 4, 1)]
    indices, lengths = _selection(case, pick, s_q * case.h_kv, case.h_kv, case.topk, reachable, s_kv)
    unreachable = torch.ones(s_kv, dtype=torch.bool)
    for token in range(s_q):
        end = case.topk if lengths is None else min(max(int(lengths[token]), 0), case.topk)
        row = indices.reshape(s_q, case.h_kv, case.topk)[token, :, :end].flatten().long()
        unreachable[row[(row >= 0) & (row < s_kv)]] = False
    kv[unreachable] = torch.nan if case.poison == 0xFF else 0.0
    if case.nan_tokens and s_kv:
        kv[reachable[0]] = torch.nan
    return {
        "q": _queries(case, [q], pick),
        "kv": _hostile_view(pick, kv, torch.nan),
        "indices": _hostile_view(pick, indices.reshape(s_q, case.h_kv, case.topk), -(2**31)),
        "softmax_scale": case.softmax_scale,
        "d_v": case.d_v,
        "topk_length": lengths,
        "attn_sink": _sink(case, pick),
    }


def _make_prefill(case: Case, pick: random.Random, generator: torch.Generator) -> dict[str, Any]:
    queries, keys, values = [], [], []
    for s_q, s_k in zip(case.seqlens_q, case.seqlens_k, strict=True):
        k = draw_keys(case.family if case.family != "onehot_v" else "unit", (s_k, case.h_kv, case.d_qk), 0, generator)
        k = k.to(case.dtype)
        queries.append(draw_queries(case.family, s_q, case.h_q, k, case.d_v, case.softmax_scale, generator))
        values.append(draw_values(case.family, (s_k, case.h_kv, case.d_v), generator))
        if case.nan_tokens and s_k:
            k[pick.randrange(s_k)] = torch.nan
        keys.append(k)
    k = torch.cat([torch.zeros(0, case.h_kv, case.d_qk, dtype=case.dtype), *keys])
    v = torch.cat([torch.zeros(0, case.h_kv, case.d_v), *values]).to(case.dtype)
    return {
        "q": _queries(case, queries, pick),
        "k": _hostile_view(pick, k, torch.nan),
        "v": _hostile_view(pick, v, torch.nan),
        "cu_seqlens_q": _offsets(case.seqlens_q),
        "cu_seqlens_k": _offsets(case.seqlens_k),
        "softmax_scale": case.softmax_scale,
        "is_causal": case.is_causal,
    }


_MAKERS: dict[str, Callable[[Case, random.Random, torch.Generator], dict[str, Any]]] = {
    "decode": _make_decode,
    "sparse_decode": _make_sparse_decode,
    "sparse_prefill": _make_sparse_prefill,
    "prefill": _make_prefill,
}
