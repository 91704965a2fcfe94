"""Tiles of the varlen prefill, and which problems it takes. Imports no Triton.

Forward and both halves of the backward pass have their own tiles in `tiles.toml`. The forward's accumulator
[BLOCK_M, d_v] is 64 registers of each of 256 threads at 128 x 128; that of dk and dv, [BLOCK_N, d_qk + d_v], 80 at 64 x 320.
The order is reasoned, see docs/kernels/triton.md, not measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from openmla.backends.base import Verdict, require
from openmla.backends.triton import config
from openmla.backends.triton.config import Config
from openmla.core.problem import PrefillProblem
from openmla.core.target import Target

MAX_COLUMNS = 256  # of q, k and v
MAX_GRID = 65_535  # second and third axis of a grid


@dataclass(frozen=True)
class PrefillConfig:
    """How to run a prefill: the forward pass, dq, and dk with dv."""

    forward: Config
    query_gradient: Config
    key_gradient: Config
    keeps_invariants: bool  # loops over tiles compute again what does not change: fewer registers


@cache
def table() -> dict[str, tuple[tuple[Config, ...], tuple[tuple[Config, Config], ...]]]:
    """Family, or fp32 -> (forward; dq, and dk with dv), to try in order. The backward holds four tiles of operands."""
    found = {}
    for entry in config.entries("prefill"):
        forward = tuple(Config(*numbers) for numbers in entry["forward"])
        backward = tuple((Config(*dq), Config(*dkv)) for dq, dkv in entry["backward"])
        found[entry.get("dtype", entry["family"])] = (forward, backward)
    return found


# Where operands come from shared memory by descriptors, their addresses cost registers when they are hoisted; with
# mma.sync the compiler stops fetching tiles ahead when they are not.
_STAYS = ("hopper", "blackwell")
_INTERPRETED = Config(16, 16, 1, 1)


def dims(problem: PrefillProblem) -> tuple[int, int, int, int, int]:
    """(d_qk, d_v, D_VALUE, D_LOW, D_HIGH): d_v padded to a power of two, the largest one in d_qk, its rest padded."""
    low = 1 << (problem.d_qk.bit_length() - 1)
    return (problem.d_qk, problem.d_v, config.padded(problem.d_v), low, config.padded(problem.d_qk - low))


def forward_bytes(tile: Config, problem: PrefillProblem) -> int:
    """Shared memory of a forward tile, from above: queries, keys and values of every stage, weights; then the result."""
    _, _, value, low, high = dims(problem)
    item = problem.dtype.itemsize
    q, kv = item * tile.block_m * (low + high), item * tile.block_n * (low + high + value)
    weights = item * tile.block_m * tile.block_n + 1024
    return max(q + kv * tile.num_stages + weights, q + 4 * tile.block_m * value)


def backward_bytes(tile: Config, problem: PrefillProblem, rows_kept: int, rows_passed: int) -> int:
    """Shared memory of a backward tile, from above: what is kept, what passes by in stages, P and dS."""
    _, _, value, low, high = dims(problem)
    item, columns = problem.dtype.itemsize, low + high + value
    passing = item * rows_passed * columns * max(tile.num_stages, 1)
    return item * rows_kept * columns + passing + 2 * 4 * tile.block_m * tile.block_n + 4096


def candidates(problem: PrefillProblem, target: Target) -> tuple[PrefillConfig, ...]:
    """Configs that fit the target, best first; empty where none does."""
    name = config.family(target)
    if name is None:
        return ()
    if name == "interpreter":
        return (PrefillConfig(_INTERPRETED, _INTERPRETED, _INTERPRETED, False),)
    fits = target.smem_bytes or 1 << 31
    forward_tiles, backward_tiles = table()["fp32" if problem.dtype == torch.float32 else name]
    forward = [each for each in forward_tiles if forward_bytes(each, problem) <= fits]
    backward = [
        (dq, dkv)
        for dq, dkv in backward_tiles
        if backward_bytes(dq, problem, dq.block_m, dq.block_n) <= fits
        and backward_bytes(dkv, problem, dkv.block_n, dkv.block_m) <= fits
    ]
    return tuple(PrefillConfig(tile, *backward[0], name in _STAYS) for tile in forward) if backward else ()


def supports(problem: PrefillProblem, target: Target) -> Verdict:
    """May the Triton prefill run it? Needs neither Triton nor a GPU to answer."""
    found = require(
        (config.is_installed(), "triton is not installed: pip install openmla[triton]"),
        (16 <= problem.d_qk <= MAX_COLUMNS, f"takes d_qk from 16 to {MAX_COLUMNS}, got {problem.d_qk}"),
        (1 <= problem.d_v <= MAX_COLUMNS, f"takes d_v up to {MAX_COLUMNS}, got {problem.d_v}"),
        (problem.batch < MAX_GRID, f"takes fewer than {MAX_GRID} requests (an axis of the grid), got {problem.batch}"),
        (problem.h_q <= MAX_GRID, f"takes up to {MAX_GRID} heads (an axis of the grid), got {problem.h_q}"),
    )
    if not found:
        return found
    machine = config.machine_verdict(problem.dtype, target)
    if not machine or target.arch == "cpu":
        return machine
    return require((bool(candidates(problem, target)), f"no tile fits {target.smem_bytes} bytes of shared memory"))
