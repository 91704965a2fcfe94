"""The few-row kernel over index lists behind the four verbs: sparse decode with up to 16 heads.

A call is one launch. The plan depends on shapes alone and is made on the host, once per shape. Partials of lists that several
CTAs share go through an exchange that every launch leaves as it found it; calls that may run at the same time never share one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

import torch

from openmla.backends.base import SparseDecodeOperands, Verdict
from openmla.backends.cute import bundle
from openmla.backends.cute.decode_dense_small import config as small
from openmla.backends.cute.decode_dense_small.launch import launch_gathered
from openmla.core.problem import SparseDecodeProblem
from openmla.core.target import Target

Held = dict[tuple[torch.device, int], tuple[int, torch.Tensor]]  # (device, stream) -> (capture, what launches share)
_exchanges: Held = {}
_captured: Held = {}  # the same, of the latest capture of a stream


@dataclass(frozen=True)
class Compiled:
    """A sparse decode of few heads ready to launch."""

    config: small.Config
    num_parts: int
    decode: Any


@lru_cache(maxsize=256)
def _plan_on(device: torch.device, tokens: int, topk: int, parts: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(metadata, num_splits, pieces) of a shape on a device; kept, so that a CUDA graph may hold the tensors."""
    plan = small.gathered_plan(tokens, topk, parts)
    metadata = plan.tile_scheduler_metadata(device).view(plan.ranges, parts, 8)
    return metadata, plan.num_splits_tensor(device), plan.num_pieces


@cache
def _capture_info() -> Any:
    """CuStreamGetCaptureInfo of the driver, or None where it cannot be had."""
    try:
        return ctypes.CDLL("libcuda.so.1").cuStreamGetCaptureInfo_v2
    except (OSError, AttributeError):
        return None


def _capture_number(stream: int) -> int:
    """A number of the capture under way on a stream, unique in this process; 0 where it is not known."""
    info, state, number = _capture_info(), ctypes.c_int(0), ctypes.c_uint64(0)
    if info is None:
        return 0
    nothing = ctypes.c_void_p(None)
    error = info(ctypes.c_void_p(stream), ctypes.byref(state), ctypes.byref(number), nothing, nothing, nothing)
    return number.value if error == 0 and state.value == 1 else 0


def exchange_on(device: torch.device, slots: int) -> torch.Tensor:
    """int32 [1, slots or more, N * 328], UNWRITTEN when the next launch on the current stream begins: see `held_on`."""
    shape = 1, slots, 16 * small.words_per_row(True, 2)
    return held_on(_exchanges, _captured, device, shape, small.UNWRITTEN)


def held_on(eager: Held, captured: Held, device: torch.device, shape: tuple[int, int, int], fill: int) -> torch.Tensor:
    """int32 of this shape, or with more of the second dimension, that every launch leaves as it found it; full of `fill` at first.

    One per stream: what one stream launches runs in order. In a CUDA graph, which may be replayed on any stream, one per
    captured stream and graph, filled by the graph itself before its first use.
    """
    stream, number = 0, 0
    is_captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device).cuda_stream
    if is_captured:
        number = _capture_number(stream)
    held = captured if is_captured else eager
    known, found = held.get((device, stream), (-1, None))
    if found is None or known != number or found.shape[1] < shape[1] or (is_captured and not number):
        with torch.inference_mode(False):  # it outlives the mode
            found = torch.full(shape, fill, dtype=torch.int32, device=device)
        held[device, stream] = (number, found)
    return found


def _is_aligned(tensor: torch.Tensor) -> bool:
    """Starts at and steps by multiples of 16 bytes; compiled code checks the steps of dimensions of size 1, too."""
    return tensor.data_ptr() % 16 == 0 and all(step % 8 == 0 for step in tensor.stride()[:-1])


@dataclass(frozen=True)
class SparseDecodeFew:
    """`decode_dense_small` over index lists: up to 16 heads, fp8_656 and fp8_528, one cache."""

    op: str = field(default="sparse_decode", init=False)
    backend: str = field(default="cute", init=False)
    name: str = field(default=small.FAMILY, init=False)

    def supports(self, problem: SparseDecodeProblem, target: Target) -> Verdict:
        """The family's own rules, then whether its code can be had here."""
        verdict = small.gathered_supports(problem, target)
        if not verdict:
            return verdict
        return bundle.availability(small.FAMILY, small.gathered_configs(problem, target)[0])

    def configs(self, problem: SparseDecodeProblem, target: Target) -> Sequence[small.Config]:
        """Variants, best first."""
        return small.gathered_configs(problem, target)

    def compile(self, problem: SparseDecodeProblem, config: small.Config, target: Target) -> Compiled:
        """Load the function, compiling it if neither bundle nor cache has it."""
        served = bundle.serve(small.FAMILY, config)
        return Compiled(config, small.gathered_parts(problem, target), served.function)

    def launch(
        self, compiled: Compiled, problem: SparseDecodeProblem, operands: SparseDecodeOperands, plan: None
    ) -> None:
        """One kernel; copies of q and out where they do not step by 16 bytes."""
        device = operands.q.device
        metadata, num_splits, pieces = _plan_on(device, problem.total_q, problem.topk, compiled.num_parts)
        q, out = operands.q, operands.out
        if not _is_aligned(q):
            q = q.clone(memory_format=torch.contiguous_format)
        if not _is_aligned(out):
            out = torch.empty(out.shape, dtype=out.dtype, device=device)
        exchange = exchange_on(device, pieces if pieces > problem.total_q else 1)
        launch_gathered(compiled.decode, operands._replace(q=q, out=out), metadata, num_splits, exchange)
        if out is not operands.out:
            operands.out.copy_(out)


SPARSE_DECODE_FEW = SparseDecodeFew()
