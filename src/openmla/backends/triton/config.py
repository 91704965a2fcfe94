"""Which problems the Triton kernels take, with every reason against, and with which tiles. Imports no Triton.

A tile is (BLOCK_M query rows, BLOCK_N keys). BLOCK_M rows share each load of a KV tile, so more rows mean less traffic,
and the accumulator [BLOCK_M, d_v] in fp32 lives in registers, so they are bounded: 64 x 512 takes 128 registers of
each of 256 threads. `tiles.toml` holds what to try, best first, per family of machines, and where that is known from; a
tile whose shared memory does not fit the target is passed over. Reasons: docs/kernels/triton.md.
"""

from __future__ import annotations

import importlib.metadata
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from openmla.backends.base import Verdict, require
from openmla.core import env
from openmla.core.layout import KVLayout
from openmla.core.problem import DecodeProblem, SparseDecodeProblem, SparsePrefillProblem
from openmla.core.target import Target

AnyProblem = DecodeProblem | SparseDecodeProblem | SparsePrefillProblem

MAX_D_V = 512
MAX_BATCH = 65_535
MAX_PADDED = 640  # d_v and the columns behind it, each rounded up to a power of two
OVERHEAD_TOKENS = 320  # cost of starting a piece in keys: filling the pipeline, and storing an fp32 partial
CHUNK_TOKENS = 4096  # piece length of the policy batch_invariant
MIN_SPLIT_KEYS = 256  # a sparse split shorter than this costs more to merge than it saves


_ANY = 1 << 31


@dataclass(frozen=True)
class Config:
    """How to run an attention kernel."""

    block_m: int  # query rows per tile
    block_n: int  # keys per tile
    num_warps: int
    num_stages: int
    ctas_per_sm: int = 1  # programs that are resident together


@cache
def entries(kind: str) -> tuple[dict[str, Any], ...]:
    """The lists of `tiles.toml` of one kind: tiles, prefill or append."""
    return tuple(tomllib.loads((Path(__file__).parent / "tiles.toml").read_text())[kind])


@cache
def table() -> dict[tuple[str, str], tuple[tuple[int, tuple[Config, ...]], ...]]:
    """(family, kind of cache) -> (most rows per request and KV head, configs to try in order), narrowest first."""
    found: dict[tuple[str, str], list[tuple[int, tuple[Config, ...]]]] = {}
    for entry in entries("tiles"):
        configs = tuple(Config(*numbers) for numbers in entry["try"])
        found.setdefault((entry["family"], entry["cache"]), []).append((entry.get("rows", _ANY), configs))
    return {key: tuple(sorted(entries, key=lambda entry: entry[0])) for key, entries in found.items()}


_LATE = {"hopper": 0, "blackwell": 2}  # tiles kept beyond the stages where products of 64 rows run on their own
_INTERPRETED = (Config(16, 16, 1, 1),)


def is_installed() -> bool:
    """True when Triton can be imported; does not import it."""
    return env.is_importable("triton")


def is_interpreted() -> bool:
    """True when kernels run in Triton's interpreter (TRITON_INTERPRET=1)."""
    if not is_installed():
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


@cache
def has_gluon() -> bool:
    """True when this Triton's Gluon is one that `selected_sm90` is known to compile with: tried with 3.6 and 3.9."""
    if not is_installed():
        return False
    try:
        numbers = importlib.metadata.version("triton").split(".")[:2]
    except importlib.metadata.PackageNotFoundError:  # a build under another name
        return False
    return (3, 6) <= tuple(int(each) for each in numbers) < (3, 10)


def family(target: Target) -> str | None:
    """Which table serves a target; None for a target that none does."""
    if target.arch == "cpu":
        return "interpreter" if is_interpreted() else None
    if target.arch == "gfx942":
        return "cdna3"
    digits = target.arch.removeprefix("sm_").rstrip("af")
    if not target.is_cuda or not digits.isdigit() or int(digits) < 80:
        return None
    # 90 and 100 to 109 have 227 KB of shared memory; consumer cards of every generation have about 100 KB.
    return {9: "hopper", 10: "blackwell"}.get(int(digits) // 10, "ampere")


def padded(columns: int) -> int:
    """Columns of a tile: a power of two, at least 16 (the shortest dot product); 0 for none."""
    return max(16, 1 << (columns - 1).bit_length()) if columns else 0


def dims(problem: AnyProblem) -> tuple[int, int, int, int]:
    """(d_qk, d_v, D_LATENT, D_ROPE): sizes, and the padded sizes of the two halves of a key."""
    return (problem.d_qk, problem.d_v, padded(problem.d_v), padded(problem.d_qk - problem.d_v))


def layouts(problem: AnyProblem) -> tuple[KVLayout, ...]:
    """The layouts of a problem's caches; none for rows that are a plain tensor."""
    if isinstance(problem, SparsePrefillProblem):
        return ()
    extra = problem.extra if isinstance(problem, SparseDecodeProblem) else None
    return (problem.layout, extra.layout) if extra else (problem.layout,)


def has_bytes(problem: AnyProblem) -> bool:
    """True when a cache has a byte layout, whose tiles pass through registers on their way to shared memory."""
    return any(layout.is_quantised for layout in layouts(problem))


def is_wide(problem: AnyProblem) -> bool:
    """Dots in fp32: fp32 operands, and byte layouts (whose values are bf16) with queries that are not bf16."""
    return problem.dtype == torch.float32 or (problem.dtype != torch.bfloat16 and has_bytes(problem))


def stored_rows(layout: KVLayout, page_size: int) -> tuple[str, str, int, int, int, int, int, int]:
    """A layout as the constants that `openmla.backends.triton.rows` reads."""
    if not layout.is_quantised:
        return ("plain", "none", 0, 0, 0, 0, 0, 0)
    if layout.has_call_scale:  # groups of nothing: how codes are loaded. RoPE is codes behind the others
        return (layout.data_format, "none", layout.d_quant, 128, layout.bytes_per_token, 0, 0, layout.d_v)
    codes = layout.d_quant // 2 if layout.data_format == "e2m1" else layout.d_quant
    if layout.scales_behind_page:
        row, first, step, rope = layout.data_bytes, page_size * layout.data_bytes, layout.scale_bytes, codes
    else:
        row = layout.bytes_per_token
        first, step, rope = codes, row, codes + layout.scale_bytes
    return (layout.data_format, layout.scale_format, layout.d_quant, layout.scale_group, row, first, step, rope)


def rows(problem: AnyProblem) -> int:
    """Query rows that share one list of keys, at most: of a request where the cache is dense, else of a token."""
    group = problem.h_q // problem.h_kv
    return group * problem.s_q if isinstance(problem, DecodeProblem) else group


def shared_bytes(config: Config, problem: AnyProblem, target: Target) -> int:
    """Shared memory of a tile, from above (tests/compile holds it against what the compiler says).

    Queries, KV tiles and weights during the loop; queries and the turned-over result after it. A loop of s stages keeps
    s - 1 tiles; where products of 64 rows read them while the next ones arrive, s on sm_90, and up to s + 2 on sm_100. A
    byte layout may keep a tile and its transpose. gfx942 holds queries in registers and has 64 KB, so the result is turned over in the dtype of q.
    """
    itemsize = 4 if is_wide(problem) else problem.dtype.itemsize
    _, _, latent, rope = dims(problem)
    q, tile = itemsize * config.block_m * (latent + rope), itemsize * config.block_n * (latent + rope)
    weights = itemsize * config.block_m * config.block_n + 1024
    if kept_apart(config, problem, target) and not rope:
        weights = 8 * config.block_m * config.block_n  # the scores go from one block to the other as fp32, twice
    if isinstance(problem, DecodeProblem) and _reads_by_score(problem):
        weights += 4 * config.block_m * config.block_n  # what a mod reads per score passes through it on its way
    if family(target) == "cdna3":
        return max(tile * config.num_stages + weights, itemsize * config.block_m * latent)
    late = _LATE.get(family(target) or "", -1) if config.block_m >= 64 else -1
    kept = config.num_stages + late
    buffers = 2 if has_bytes(problem) else max(kept, 1)
    return q + max(tile * buffers + weights, 4 * config.block_m * latent)


def _reads_by_score(problem: DecodeProblem) -> bool:
    """Whether a mod may read a table at places that differ by row and by key."""
    functions = problem.mods.functions if problem.mods else ()
    return any(indices > 1 for each in functions for _, indices in each.tables)


def kept_apart(config: Config, problem: AnyProblem, target: Target) -> str:
    """Which products to hide from the compiler (`softmax.fold_tile`) where two warpgroups share 64 rows; "" for none.

    "all" where tiles are copied to shared memory as they are. "scores" where they pass through registers, and without
    RoPE columns, where the compiler spills 600 bytes of "all".
    """
    is_sm90 = target.arch.startswith("sm_90")
    if not (is_sm90 and config.block_m == 64 and config.num_warps == 8) or is_wide(problem):
        return ""
    return "all" if problem.d_qk > problem.d_v and not has_bytes(problem) else "scores"


def is_scheduled(problem: AnyProblem, config: Config, target: Target) -> bool:
    """Whether `selected_sm90`, which orders copies and products itself, may run it: sparse prefill of DeepSeek's rows on sm_90."""
    return (
        isinstance(problem, SparsePrefillProblem)
        and (problem.d_qk, problem.d_v, config.block_n) == (576, 512, 64)
        and kept_apart(config, problem, target) == "all"
        and has_gluon()
    )


def candidates(problem: AnyProblem, target: Target) -> tuple[Config, ...]:
    """Configs that fit the target, best first; empty where none does."""
    name = family(target)
    if name is None:
        return ()
    if name == "interpreter":
        return _INTERPRETED
    key = ("any", "fp32") if is_wide(problem) else (name, "bytes" if has_bytes(problem) else "plain")
    listed = next(configs for most, configs in table()[key] if rows(problem) <= most)
    fits = target.smem_bytes or 1 << 31
    return tuple(each for each in listed if shared_bytes(each, problem, target) <= fits)


def supports(problem: AnyProblem, target: Target) -> Verdict:
    """May a Triton kernel run it? Needs neither Triton nor a GPU to answer."""
    _, d_v, latent, rope = dims(problem)
    found = require(
        (is_installed(), "triton is not installed: pip install openmla[triton]"),
        (d_v <= MAX_D_V, f"holds at most {MAX_D_V} value columns, got d_v={d_v}"),
        (
            not isinstance(problem, DecodeProblem) or problem.batch < MAX_BATCH,
            f"takes fewer than {MAX_BATCH} requests (one axis of a grid), got batch={getattr(problem, 'batch', 0)}",
        ),
        (latent + rope <= MAX_PADDED, f"holds at most {MAX_PADDED} key columns, got {latent} + {rope} after padding"),
    )
    if not found:
        return found
    machine = machine_verdict(problem.dtype, target)
    if not machine or target.arch == "cpu":
        return machine
    return require(
        (bool(candidates(problem, target)), f"no tile fits {target.smem_bytes} bytes of shared memory"),
    )


def machine_verdict(dtype: torch.dtype, target: Target) -> Verdict:
    """Does Triton compile for this machine, and does it compute in that dtype here?"""
    if target.arch == "cpu":
        is_bf16 = dtype == torch.bfloat16
        return require(
            (is_interpreted(), "a CPU runs it only in Triton's interpreter: set TRITON_INTERPRET=1"),
            (not is_bf16 or not is_interpreted(), "Triton's interpreter multiplies bf16 wrongly; use fp16 or fp32"),
        )
    if family(target) is None:
        return Verdict((f"needs an NVIDIA GPU of sm_80 or later or an AMD gfx942, got {target.arch}",))
    return Verdict()


def num_parts(problem: DecodeProblem, config: Config, target: Target) -> int:
    """Parts of a plan: together with the row tiles they occupy every SM once, whatever the lengths are."""
    return max(target.num_sms * config.ctas_per_sm // (tiles(problem, config) * problem.h_kv), 1)


def tiles(problem: AnyProblem, config: Config) -> int:
    """Row tiles per request (token) and KV head."""
    return max(-(-rows(problem) // config.block_m), 1)


def sparse_splits(problem: SparseDecodeProblem, config: Config, target: Target) -> int:
    """Splits of each selection: enough to occupy every SM, none shorter than MIN_SPLIT_KEYS."""
    keys = problem.topk + (problem.extra.topk if problem.extra else 0)
    programs = max(problem.total_q * tiles(problem, config), 1)
    wanted = target.num_sms * config.ctas_per_sm // programs
    return max(min(wanted, keys // MIN_SPLIT_KEYS), 1)
