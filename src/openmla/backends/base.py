"""What every kernel is: four verbs and a reason.

supports   may it run this problem here? A Verdict: true, or every reason why not
configs    how could it run? Best first; the first is the default
compile    make it ready; never touches tensors, never launches
launch     run it on operands
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from openmla.core.problem import Problem
from openmla.core.target import Target
from openmla.mods import Attached, Rope


@dataclass(frozen=True)
class Verdict:
    """The answer to "may this kernel run?": true when there is no reason against it."""

    reasons: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return not self.reasons


def require(*rules: tuple[bool, str]) -> Verdict:
    """A Verdict from (holds, why not) pairs; every broken rule is a reason."""
    return Verdict(tuple(why for holds, why in rules if not holds))


class DecodePlan(NamedTuple):
    """How a batch is cut, on the device that runs it; the form is described in `openmla.split.schedule`."""

    tile_scheduler_metadata: torch.Tensor  # int32 [num_parts, 8], or [ranges, num_parts, 8]
    num_splits: torch.Tensor  # [batch + 1] int32
    chunk_blocks: int  # 0: pieces end only where parts end
    partials: tuple[torch.Tensor, ...] | None = None  # scratch that stays here, so a plan serves one stream at a time
    arrivals: torch.Tensor | None = None  # int32, 0: counts stored pieces where a kernel merges them itself


class DecodeOperands(NamedTuple):
    """Tensors of one dense decode, checked and complete. `out` and `lse` are written in full.

    Shapes with is_varlen: q [total_q, h_q, d_qk], out [total_q, h_q, d_v], lse [h_q, total_q]; otherwise
    q [batch, s_q, h_q, d_qk], out [batch, s_q, h_q, d_v], lse [batch, h_q, s_q]. Empty rows: out 0, lse -inf.
    """

    q: torch.Tensor
    kv_cache: torch.Tensor  # [num_pages, page_size, h_kv, row_elements]
    block_table: torch.Tensor  # [batch, max_pages] int32
    cache_seqlens: torch.Tensor  # [batch] int32
    softmax_scale: float
    out: torch.Tensor
    lse: torch.Tensor  # fp32, natural log
    fault_word: torch.Tensor  # int32 [1]; bits of core.faults.Fault are OR-ed in
    cu_seqlens_q: torch.Tensor | None = None  # [batch + 1] int32
    attn_sink: torch.Tensor | None = None  # [h_q] fp32
    workspace: torch.Tensor | None = None  # [>= workspace_bytes] uint8, 256-byte aligned, contents undefined
    mods: Attached | None = None  # the tensors of Problem.mods
    descale_q: torch.Tensor | None = None  # one fp32 number: what codes of q are multiplied by; None: 1
    descale_k: torch.Tensor | None = None  # the same of a cache whose scale belongs to the call


class SparseDecodeOperands(NamedTuple):
    """Tensors of one sparse decode. Leading dimensions are (batch, s_q), or (total_q,) with is_varlen."""

    q: torch.Tensor
    kv_cache: torch.Tensor
    indices: torch.Tensor  # [..., topk] int32: page * page_size + offset; -1 is no slot
    softmax_scale: float
    out: torch.Tensor
    lse: torch.Tensor  # [batch, h_q, s_q] or [h_q, total_q]
    fault_word: torch.Tensor
    topk_length: torch.Tensor | None = None  # one per query token or per request
    attn_sink: torch.Tensor | None = None
    extra_kv_cache: torch.Tensor | None = None
    extra_indices: torch.Tensor | None = None
    extra_topk_length: torch.Tensor | None = None


class SparsePrefillOperands(NamedTuple):
    """Tensors of one sparse prefill."""

    q: torch.Tensor  # [s_q, h_q, d_qk]
    kv: torch.Tensor  # [s_kv, h_kv, d_qk]
    indices: torch.Tensor  # [s_q, h_kv, topk] int32
    softmax_scale: float
    out: torch.Tensor  # [s_q, h_q, d_v]
    max_logits: torch.Tensor  # [s_q, h_q] fp32, scaled; -inf for empty rows
    lse: torch.Tensor  # [s_q, h_q] fp32
    fault_word: torch.Tensor
    topk_length: torch.Tensor | None = None  # [s_q] int32
    attn_sink: torch.Tensor | None = None


class PrefillOperands(NamedTuple):
    """Tensors of one varlen prefill (forward)."""

    q: torch.Tensor  # [total_q, h_q, d_qk]
    k: torch.Tensor  # [total_k, h_kv, d_qk]
    v: torch.Tensor  # [total_k, h_kv, d_v]
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    softmax_scale: float
    out: torch.Tensor  # [total_q, h_q, d_v]
    lse: torch.Tensor  # [h_q, total_q] fp32
    fault_word: torch.Tensor


Repeatable = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], object
]  # of q, kv_cache, block_table, cache_seqlens, out, lse


class AppendOperands(NamedTuple):
    """Tensors of one append. `out` is the cache: of its rows, those of the slots are written."""

    out: torch.Tensor  # [num_pages, page_size, 1, row_elements]
    slots: torch.Tensor  # [n] int64 or int32: page * page_size + offset; -1 is no slot
    rows: torch.Tensor  # [n, d_qk]
    fault_word: torch.Tensor
    rope: Rope | None = None
    positions: torch.Tensor | None = None  # [n] int64 or int32, with rope
    descale: torch.Tensor | None = None  # one fp32 number that rows are divided by; None: 1


class Kernel(Protocol):
    """One way to run one operation. `config` is the kernel's own frozen dataclass, opaque to everybody else."""

    @property
    def op(self) -> str:
        """The operation: decode, sparse_decode, sparse_prefill, prefill or append."""
        ...

    @property
    def backend(self) -> str:
        """cute, triton or torch."""
        ...

    @property
    def name(self) -> str:
        """Unique within its operation and backend."""
        ...

    def supports(self, problem: Any, target: Target) -> Verdict:
        """May it run? Needs no DSL and no GPU."""
        ...

    def configs(self, problem: Any, target: Target) -> Sequence[Any]:
        """Ways to run, best first. Called only when `supports` is true."""
        ...

    def compile(self, problem: Any, config: Any, target: Target) -> Any:
        """Make ready to launch; the result is kept by the caller."""
        ...

    def launch(self, compiled: Any, problem: Any, operands: Any, plan: Any) -> None:
        """Run on the operands' device and current stream. `plan` is None for operations without one."""
        ...


class DecodeKernel(Kernel, Protocol):
    """A kernel of op "decode" says two more things: how it wants the work cut, and how much scratch it needs."""

    def plan(self, compiled: Any, problem: Any, cache_seqlens: torch.Tensor, policy: str) -> DecodePlan:
        """Cut the batch; on a GPU with a kernel that reads the lengths there, without waiting for the device."""
        ...

    def workspace_bytes(self, compiled: Any, problem: Any, policy: str) -> int:
        """Bytes of `DecodeOperands.workspace`; depends on the problem and policy, never on lengths. 0: none."""
        ...


class RepeatableKernel(DecodeKernel, Protocol):
    """A decode kernel that can prepare a launch for repeating: one plan serves all layers of a model."""

    def repeatable(self, compiled: Any, problem: Any, operands: DecodeOperands, plan: DecodePlan) -> Repeatable | None:
        """`launch`, of which only tensors of the same kind change; None where a call takes more than a launch."""
        ...


@dataclass(frozen=True)
class Unbuilt:
    """A kernel that one would look for and that is not there; its verdict says why, so that nobody wonders."""

    op: str
    backend: str
    name: str
    reason: str

    def supports(self, problem: Problem, target: Target) -> Verdict:
        """Never; the reason says what is missing."""
        return Verdict((self.reason,))

    def configs(self, problem: Problem, target: Target) -> Sequence[Any]:
        """None."""
        return ()

    def compile(self, problem: Problem, config: Any, target: Target) -> Any:
        """Unreachable: `supports` is always false."""
        raise NotImplementedError(self.reason)

    def launch(self, compiled: Any, problem: Problem, operands: Any, plan: Any) -> None:
        """Unreachable: `supports` is always false."""
        raise NotImplementedError(self.reason)
