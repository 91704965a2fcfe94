"""The native operations: flash_mla's work without its limits.

Any page size, any head count, any KV layout, uniform or varlen queries, `out=`, optional LSE with a base of choice,
reusable plans. All of them write every output row: a row that sees no key is 0 with lse -inf.

Values inside tensors (lengths, page ids, indices) cannot crash the process or reach another request: they are
masked in the kernel and reported by `openmla.check_errors()`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import cast

import torch

from openmla.backends.base import (
    DecodeKernel,
    DecodeOperands,
    DecodePlan,
    SparseDecodeOperands,
    SparsePrefillOperands,
)
from openmla.core import faults
from openmla.core.errors import PlanMismatchError, ProblemError
from openmla.core.layout import KVLayout
from openmla.core.problem import (
    DecodeProblem,
    SparseDecodeProblem,
    SparsePrefillProblem,
)
from openmla.mods import Attachable, Attached, attach
from openmla.ops import dispatch
from openmla.ops.dispatch import LOG2_E, LseBase
from openmla.ops.repeats import Repeat, repeat_of
from openmla.split.schedule import POLICIES, Policy


@dataclass(frozen=True, eq=False)
class Plan:
    """How a batch is cut into pieces; made by `plan()`, reused by `decode(plan=...)` across layers.

    Good for every call with the same shapes, options and `cache_seqlens` values, on one stream at a time: kernels on a
    GPU keep the partial results of split requests in it. The tensors have FlashMLA's form,
    described in `openmla.split.schedule`.
    """

    problem: DecodeProblem
    policy: Policy
    backend: str  # the kernel that the plan was made for
    kernel: str
    pieces: DecodePlan
    cache_seqlens: torch.Tensor  # a copy: the lengths that the plan was made for
    repeats: list[Repeat] = field(default_factory=list, repr=False)  # the last call, if it can be repeated

    @property
    def tile_scheduler_metadata(self) -> torch.Tensor:
        """[num_parts, 8] int32; [ranges * num_parts, 8] where the parts are lists of ranges."""
        return self.pieces.tile_scheduler_metadata.flatten(0, -2)

    @property
    def num_splits(self) -> torch.Tensor:
        """[batch + 1] int32."""
        return self.pieces.num_splits

    def __reduce__(self) -> str:
        raise PlanMismatchError(
            "decode",
            ["a plan holds scratch of the process that made it; make one in each process with openmla.plan(...)"],
        )

    def check(self, prepared: dispatch.Prepared) -> None:
        """Raises PlanMismatchError naming every field in which a call differs from the plan's."""
        problem, kernel = prepared.problem, prepared.kernel
        if problem is self.problem and kernel.name == self.kernel and kernel.backend == self.backend:
            return
        differing = [  # none for an equal problem that is another object, which only an emptied memory leads to
            f"{field.name}: the plan has {getattr(self.problem, field.name)}, the call has {getattr(problem, field.name)}"
            for field in fields(problem)
            if getattr(problem, field.name) != getattr(self.problem, field.name)
            and str(getattr(problem, field.name))
            != str(getattr(self.problem, field.name))  # a layout has d_v in it, too
        ]
        if (kernel.backend, kernel.name) != (self.backend, self.kernel):
            differing.append(
                f"kernel: the plan is for {self.backend}/{self.kernel}, the call runs {kernel.backend}/{kernel.name}"
            )
        if not differing:
            return
        raise PlanMismatchError("decode", [*differing, "make a plan for this call with openmla.plan(...)"])


def plan(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *,
    policy: Policy = "balanced",
    d_v: int = 512,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    window: int | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    attn_sink: torch.Tensor | None = None,
    mods: Attachable = None,
    kv_layout: KVLayout | str | None = None,
    backend: str | None = None,
) -> Plan:
    """Cut the KV of a batch into pieces, once for all layers of a step. Takes the arguments of `decode`.

    Args:
        q, kv_cache, block_table, cache_seqlens: as for `decode`; only their metadata and the lengths are read.
        policy: `balanced`, or `batch_invariant` where the bits of a row must not depend on its batch mates.
        softmax_scale: as for `decode`; only its sign counts here, so the default serves every positive one.
        d_v, is_causal, window, cu_seqlens_q, max_seqlen_q, attn_sink, mods, kv_layout, backend: as for `decode`.

    Returns:
        A Plan for `decode(plan=...)`: good for every call with these shapes, options and lengths.

    Raises:
        ProblemError: as `decode`.
        UnsupportedError: no permitted backend; lists every reason.

    Notes:
        Determinism: same lengths, same pieces. On a GPU they are computed there: no wait for the device, and safe inside a CUDA graph
        after one warm call.
        Source: the tile scheduler of deepseek-ai/FlashMLA, whose tensors it makes (`openmla.split.schedule`).
    """
    _check_policy(policy)
    prepared = _prepare_decode(
        q, kv_cache, block_table, cache_seqlens, d_v, softmax_scale, is_causal, window, cu_seqlens_q, max_seqlen_q,
        attn_sink, attach(mods), kv_layout, backend, policy,
    )  # fmt: skip
    kernel, pieces = prepared.kernel, dispatch.plan_pieces(prepared, cache_seqlens, policy)
    return Plan(prepared.problem, policy, kernel.backend, kernel.name, pieces, cache_seqlens.clone())


def _prepare_decode(
    q: torch.Tensor, kv_cache: torch.Tensor, block_table: torch.Tensor, cache_seqlens: torch.Tensor, d_v: int,
    softmax_scale: float | None, is_causal: bool, window: int | None, cu_seqlens_q: torch.Tensor | None,
    max_seqlen_q: int | None, attn_sink: torch.Tensor | None, mods: Attached | None,
    kv_layout: KVLayout | str | None, backend: str | None, policy: str, out: torch.Tensor | None = None,
    descale_q: torch.Tensor | None = None, descale_k: torch.Tensor | None = None,
) -> dispatch.Prepared:  # fmt: skip
    """The checked and compiled decode of these tensors."""

    def build() -> DecodeProblem:
        problem = DecodeProblem.from_tensors(
            q, kv_cache, block_table, cache_seqlens, d_v=d_v, layout=kv_layout, is_causal=is_causal, window=window,
            cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max_seqlen_q, attn_sink=attn_sink, softmax_scale=softmax_scale,
            is_batch_invariant=policy == "batch_invariant", mods=mods, descale_q=descale_q, descale_k=descale_k,
        )  # fmt: skip
        dispatch.check_out("decode", out, (*q.shape[:-1], problem.d_v), problem.out_dtype, q.device)
        return problem

    try:  # `dispatch.signature` of the tensors that every call has, written out: 0.8 us less
        key = (
            "decode",
            q.shape, q.stride(), q.dtype, q.device, q.data_ptr() % 16 == 0,
            kv_cache.shape, kv_cache.stride(), kv_cache.dtype, kv_cache.device, kv_cache.data_ptr() % 16 == 0,
            block_table.shape, block_table.stride(), block_table.dtype, block_table.device,
            block_table.data_ptr() % 16 == 0,
            cache_seqlens.shape, cache_seqlens.stride(), cache_seqlens.dtype, cache_seqlens.device,
            cache_seqlens.data_ptr() % 16 == 0,
            None if cu_seqlens_q is None else dispatch.signature(cu_seqlens_q),
            None if attn_sink is None else dispatch.signature(attn_sink), None if out is None else dispatch.signature(out),
            None if descale_q is None else dispatch.signature(descale_q),
            None if descale_k is None else dispatch.signature(descale_k),
            d_v, is_causal, window, max_seqlen_q, kv_layout, policy,
            type(softmax_scale), softmax_scale == softmax_scale, _is_positive(softmax_scale),
            None if mods is None else (mods.form, *map(dispatch.signature, mods.tensors())),
        )  # fmt: skip
    except (AttributeError, RuntimeError):  # not a tensor, or a sparse one: let the problem's own check name it
        build()
        raise
    return dispatch.prepare(key, build, q.device, backend)


def _is_positive(softmax_scale: float | None) -> bool:
    return softmax_scale is None or (isinstance(softmax_scale, (int, float)) and softmax_scale > 0)


def _policy_of(plan: Plan) -> Policy:
    if not isinstance(plan, Plan):
        raise ProblemError("decode", [f"plan must come from openmla.plan(...), got {type(plan).__name__}"])
    return plan.policy


def _check_policy(policy: str) -> None:
    if policy not in POLICIES:
        raise ProblemError("decode", [f"policy must be one of {', '.join(POLICIES)}, got {policy!r}"])


def decode(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *,
    d_v: int = 512,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    window: int | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    attn_sink: torch.Tensor | None = None,
    mods: Attachable = None,
    descale_q: torch.Tensor | None = None,
    descale_k: torch.Tensor | None = None,
    kv_layout: KVLayout | str | None = None,
    plan: Plan | None = None,
    policy: Policy = "balanced",
    out: torch.Tensor | None = None,
    return_lse: bool = True,
    lse_base: LseBase = "e",
    workspace: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of s_q new tokens per request over a dense paged latent cache.

    out[b, i, h] = softmax_j(softmax_scale * <q[b, i, h], k[b, j]>) @ v[b, j],  v = k[..., :d_v]
    lse[b, h, i] = ln sum_j exp(softmax_scale * <q[b, i, h], k[b, j]>)

    Args:
        q: [batch, s_q, h_q, d_qk] bf16|fp16|fp32, or e4m3 codes over a cache in layout fp8_576; with cu_seqlens_q
            [total_q, h_q, d_qk].
        kv_cache: [num_pages, page_size, h_kv, d_qk] in the dtype of q, or [num_pages, page_size, 1, bytes] in a byte
            layout named by kv_layout. Page and row strides are free; h_kv must divide h_q.
        block_table: [batch, max_pages] int32. Page of each logical block; entries behind the length are never read.
        cache_seqlens: [batch] int32. Valid KV tokens, the s_q new ones included; 0 is legal.
        d_v: value columns, the first of the key.
        softmax_scale: multiplies scores; default d_qk ** -0.5 (a model with d_nope + d_rope = 192 passes 192 ** -0.5).
        is_causal: query i sees keys up to cache_seqlens - s_q + i.
        window: a query sees only the last `window` keys up to its own position.
        cu_seqlens_q: [batch + 1] int32, start of each request's queries in q, for varlen queries.
        max_seqlen_q: longest query of the batch; needed with cu_seqlens_q.
        attn_sink: [h_q] fp32 extra logit per head with value 0: out is multiplied by 1 / (1 + exp(sink - lse)).
        mods: Python functions that the kernel inlines, and RoPE of q: one or several of `openmla.mods`. With an
            activation in place of softmax, out = sum_j weight_j v_j and lse = ln sum_j weight_j.
        descale_q: [1] fp32, what codes of q stand for a product with; default 1. Read on the device.
        descale_k: [1] fp32, the same of a cache in layout fp8_576, for keys and values.
        kv_layout: layout of kv_cache; default: plain elements.
        plan: from `openmla.plan(...)`; default: made for this call.
        policy: `balanced` or `batch_invariant`, when no plan is given.
        out: output to write into; must not overlap an input.
        return_lse: False returns None instead of lse.
        lse_base: "e" or "2".
        workspace: [bytes] uint8 scratch of your own, at least `openmla.workspace_bytes(...)`; default: allocated.
        backend: auto, cute, triton or torch; default OPENMLA_BACKEND. A named one never falls back.

    Returns:
        out: [batch, s_q, h_q, d_v] ([total_q, h_q, d_v]), dtype of q, bf16 for codes; 0 where a query sees no key.
        lse: [batch, h_q, s_q] ([h_q, total_q]) fp32; -inf where a query sees no key. Without attn_sink's share.

    Raises:
        ProblemError: shapes, dtypes, devices or strides contradict each other; lists all violations.
        PlanMismatchError: the plan was made for another problem.
        UnsupportedError: no permitted backend; lists every reason.

    Notes:
        Determinism: same inputs and plan, same bits; with `batch_invariant` also whatever the batch mates are.
        CUDA graphs: safe after one warm call. Values inside tensors are guarded, see `openmla.check_errors`.
        Gradients: none, the result is detached from q; `openmla.prefill` and `openmla.nn` in the expanded form have them.
        NaN: what no query of a request attends to never matters. A NaN key that one query attends to may reach the other
        queries of the same request, which is_causal or window keep from it: weight 0 times NaN is NaN.
        Source: MLA decode in the absorbed form, DeepSeek-V2 (arXiv 2405.04434), section 2.1.
    """
    options = (d_v, softmax_scale, is_causal, window, max_seqlen_q, kv_layout, lse_base, backend)
    repeats = None  # the plan's, where this call could be one
    is_bare = mods is None and workspace is None and cu_seqlens_q is None and descale_q is None and descale_k is None
    if plan is not None and is_bare and not torch.compiler.is_compiling():
        repeats = getattr(plan, "repeats", None)  # what is no plan is refused below
        again = repeats[0].again(options, q, kv_cache, block_table, cache_seqlens, attn_sink, out) if repeats else None
        if again is not None:
            return again if return_lse and lse_base == "e" else (again[0], _finish_lse(again[1], return_lse, lse_base))
    is_traced = torch.compiler.is_compiling()
    if is_traced and mods is not None:
        torch._dynamo.graph_break("a graph stores no Python functions: mods run eagerly")
    elif is_traced and out is None and plan is None and workspace is None:
        traced, traced_lse = torch.ops.openmla.decode(
            q, kv_cache, block_table, cache_seqlens, d_v, softmax_scale, is_causal, window, cu_seqlens_q, max_seqlen_q,
            attn_sink, dispatch.layout_name(kv_layout), policy, lse_base, backend, descale_q, descale_k,
        )  # fmt: skip
        return traced, traced_lse if return_lse else None
    if plan is not None:
        policy = _policy_of(plan)
    _check_policy(policy)
    dispatch.check_lse_base("decode", lse_base)
    attached = None if mods is None else attach(mods)
    prepared = _prepare_decode(
        q, kv_cache, block_table, cache_seqlens, d_v, softmax_scale, is_causal, window, cu_seqlens_q, max_seqlen_q,
        attn_sink, attached, kv_layout, backend, policy, out, descale_q, descale_k,
    )  # fmt: skip
    problem: DecodeProblem = prepared.problem
    tables = attached.tensors() if attached else ()
    tables = (*tables, *(each for each in (descale_q, descale_k) if each is not None))
    inputs = (q, kv_cache, block_table, cache_seqlens, cu_seqlens_q, attn_sink, *tables)
    result, lse = _outputs(prepared, q, out, inputs, problem.out_dtype)
    pieces = _pieces(plan, prepared, cache_seqlens, policy)
    if workspace is not None or pieces.partials is None:
        workspace = _workspace(prepared, workspace, q.device, policy)
    operands = DecodeOperands(
        q, kv_cache, block_table, cache_seqlens, dispatch.scale_of(softmax_scale, problem.d_qk), result, lse,
        faults.fault_word(q.device), cu_seqlens_q, attn_sink, workspace, attached, descale_q, descale_k,
    )  # fmt: skip
    dispatch.launch(prepared, operands, pieces)
    if plan is not None and repeats is not None and pieces is plan.pieces:
        repeats[:] = repeat_of(prepared, options, operands, pieces, out is not None)
    return result, _finish_lse(lse, return_lse, lse_base)


def _pieces(given: Plan | None, prepared: dispatch.Prepared, cache_seqlens: torch.Tensor, policy: str) -> DecodePlan:
    """The caller's plan if it is still true, else a new one; on a CPU a stale plan is found and reported here."""
    if given is not None:
        given.check(prepared)
        if given.cache_seqlens.device != cache_seqlens.device:
            rule = f"the plan lies on {given.cache_seqlens.device}, the call is on {cache_seqlens.device}"
            raise PlanMismatchError("decode", [rule, "make a plan for this call with openmla.plan(...)"])
        if cache_seqlens.device.type != "cpu" or torch.equal(given.cache_seqlens, cache_seqlens):
            return given.pieces
        faults.report(cache_seqlens.device, faults.Fault.PLAN_STALE)
    return dispatch.plan_pieces(prepared, cache_seqlens, policy)


def _workspace(
    prepared: dispatch.Prepared, given: torch.Tensor | None, device: torch.device, policy: str
) -> torch.Tensor | None:
    """The caller's scratch, checked, or one from PyTorch's allocator; None where the kernel needs none."""
    needed = prepared.workspace.get(policy, -1)
    if needed < 0:
        needed = cast(DecodeKernel, prepared.kernel).workspace_bytes(prepared.compiled, prepared.problem, policy)
        prepared.workspace[policy] = needed
    if given is None:
        try:
            return torch.empty(needed, dtype=torch.uint8, device=device) if needed else None
        except torch.OutOfMemoryError as error:
            dispatch.note_memory(error, device)
            raise
    if not isinstance(given, torch.Tensor) or given.layout != torch.strided:
        raise ProblemError("decode", [f"workspace must be a strided tensor or None, got {type(given).__name__}"])
    wrong = []
    if given.dtype != torch.uint8 or given.dim() != 1 or not given.is_contiguous():
        fix = "torch.empty(openmla.workspace_bytes(...), dtype=torch.uint8, device=q.device) makes one"
        wrong.append(
            f"workspace must be a contiguous uint8 tensor [bytes], got {given.dtype} {tuple(given.shape)}; {fix}"
        )
    if given.device != device:
        wrong.append(f"workspace must be on {device} like q, got {given.device}")
    if given.numel() < needed:
        wrong.append(f"workspace must have {needed} bytes (openmla.workspace_bytes), got {given.numel()}")
    if given.data_ptr() % 256:
        wrong.append(
            f"workspace must start at a multiple of 256 bytes, got {given.data_ptr() % 256} beyond one; cut it there"
        )
    if wrong:
        raise ProblemError("decode", wrong)
    return given


def workspace_bytes(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *,
    policy: Policy = "balanced",
    d_v: int = 512,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    window: int | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    attn_sink: torch.Tensor | None = None,
    mods: Attachable = None,
    kv_layout: KVLayout | str | None = None,
    backend: str | None = None,
) -> int:
    """Bytes of scratch that `decode` with these arguments needs; the same for all lengths, 0 on a CPU.

    Args:
        q, kv_cache, block_table, cache_seqlens: as for `decode`; only their metadata is read.
        policy: as for `plan`.
        softmax_scale: as for `decode`; only its sign counts here, so the default serves every positive one.
        d_v, is_causal, window, cu_seqlens_q, max_seqlen_q, attn_sink, mods, kv_layout, backend: as for `decode`.

    Returns:
        Bytes, for `workspace=` of `decode`: torch.empty(bytes, dtype=torch.uint8, device=q.device).

    Raises:
        ProblemError: as `decode`.
        UnsupportedError: no permitted backend; lists every reason.

    Notes:
        Determinism: a function of shapes and options alone.
        Source: fp32 partials (out, lse) of every piece of a split request, `openmla.split.combine`.
    """
    _check_policy(policy)
    prepared = _prepare_decode(
        q, kv_cache, block_table, cache_seqlens, d_v, softmax_scale, is_causal, window, cu_seqlens_q, max_seqlen_q,
        attn_sink, attach(mods), kv_layout, backend, policy,
    )  # fmt: skip
    return cast(DecodeKernel, prepared.kernel).workspace_bytes(prepared.compiled, prepared.problem, policy)


def _outputs(
    prepared: dispatch.Prepared, q: torch.Tensor, out: torch.Tensor | None, inputs: tuple[torch.Tensor | None, ...],
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`out` (the caller's or a new one) and a new lse [batch, h_q, s_q], or [h_q, total_q] for varlen q."""
    *leading, h_q, _ = q.shape
    if out is not None:
        dispatch.check_overlap(prepared, out, inputs)
    heads_first = (leading[0], h_q, leading[1]) if len(leading) == 2 else (h_q, leading[0])
    try:
        if out is None:
            out = torch.empty((*leading, h_q, prepared.problem.d_v), dtype=dtype, device=q.device)
        return out, torch.empty(heads_first, dtype=torch.float32, device=q.device)
    except torch.OutOfMemoryError as error:
        dispatch.note_memory(error, q.device)
        raise


def _finish_lse(lse: torch.Tensor, return_lse: bool, base: LseBase) -> torch.Tensor | None:
    if not return_lse:
        return None
    return lse.mul_(LOG2_E) if base == "2" else lse


def sparse_decode(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    indices: torch.Tensor,
    *,
    kv_layout: KVLayout | str | None = None,
    d_v: int = 512,
    softmax_scale: float | None = None,
    topk_length: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    extra_kv_cache: torch.Tensor | None = None,
    extra_indices: torch.Tensor | None = None,
    extra_topk_length: torch.Tensor | None = None,
    extra_kv_layout: KVLayout | str | None = None,
    out: torch.Tensor | None = None,
    return_lse: bool = True,
    lse_base: LseBase = "e",
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of new tokens, each over its own selection of slots of a paged latent cache.

    out[t, h] = softmax_j(softmax_scale * <q[t, h], k[indices[t, j]]>) @ v[indices[t, j]],  v = k[..., :d_v]

    Args:
        q: [batch, s_q, h_q, d_qk] or [total_q, h_q, d_qk], bf16|fp16|fp32.
        kv_cache: [num_pages, page_size, 1, row] in layout kv_layout. Any page size; page stride is free.
        indices: [batch, s_q, topk] or [total_q, topk] int32: page * page_size + offset. -1 selects nothing; any other
            value outside the cache is treated as -1 and reported. A slot listed twice counts twice.
        kv_layout: name or KVLayout; default: plain elements in the dtype of q. Never guessed from a byte count.
        d_v: value columns; the layout's own for byte layouts.
        softmax_scale: default d_qk ** -0.5.
        topk_length: int32, [batch] or one per query token: only that many leading indices count.
        attn_sink: [h_q] fp32, as for `decode`.
        extra_kv_cache, extra_indices, extra_topk_length, extra_kv_layout: a second cache, attended together with the
            first under one softmax.
        out: output to write into; must not overlap an input.
        return_lse: False returns None instead of lse.
        lse_base: "e" or "2".
        backend: auto, cute, triton or torch; default OPENMLA_BACKEND.

    Returns:
        out: q's shape with d_v columns, dtype of q; 0 where nothing is selected.
        lse: [batch, h_q, s_q] or [h_q, total_q] fp32; -inf where nothing is selected.

    Raises:
        ProblemError: the inputs contradict each other; lists all violations.
        UnsupportedError: no permitted backend; lists every reason.

    Notes:
        Determinism: same inputs, same bits. CUDA graphs: safe after one warm call. Gradients: none, as `decode`.
        Source: DeepSeek-V3.2 sparse attention as in deepseek-ai/FlashMLA, sparse decoding.
    """
    if torch.compiler.is_compiling() and out is None:
        traced, traced_lse = torch.ops.openmla.sparse_decode(
            q, kv_cache, indices, dispatch.layout_name(kv_layout), d_v, softmax_scale, topk_length, attn_sink,
            extra_kv_cache, extra_indices, extra_topk_length, dispatch.layout_name(extra_kv_layout), lse_base, backend,
        )  # fmt: skip
        return traced, traced_lse if return_lse else None
    dispatch.check_lse_base("sparse_decode", lse_base)
    tensors = (q, kv_cache, indices, topk_length, attn_sink, extra_kv_cache, extra_indices, extra_topk_length)

    def build() -> SparseDecodeProblem:
        problem = SparseDecodeProblem.from_tensors(
            q, kv_cache, indices, d_v=d_v, layout=kv_layout, topk_length=topk_length, attn_sink=attn_sink,
            extra_kv_cache=extra_kv_cache, extra_indices=extra_indices, extra_topk_length=extra_topk_length,
            extra_layout=extra_kv_layout, softmax_scale=softmax_scale,
        )  # fmt: skip
        dispatch.check_out("sparse_decode", out, (*q.shape[:-1], problem.d_v), q.dtype, q.device)
        return problem

    prepared = dispatch.prepare(
        (
            "sparse_decode", *map(dispatch.signature, (*tensors, out)), d_v, kv_layout, extra_kv_layout, softmax_scale,
        ),
        build,
        dispatch.device_of(q),
        backend,
    )  # fmt: skip
    problem: SparseDecodeProblem = prepared.problem
    result, lse = _outputs(prepared, q, out, tensors, q.dtype)
    dispatch.launch(
        prepared,
        SparseDecodeOperands(
            q, kv_cache, indices, dispatch.scale_of(softmax_scale, problem.d_qk), result, lse, faults.fault_word(q.device),
            topk_length, attn_sink, extra_kv_cache, extra_indices, extra_topk_length,
        ),
    )  # fmt: skip
    return result, _finish_lse(lse, return_lse, lse_base)


def sparse_prefill(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    *,
    d_v: int = 512,
    softmax_scale: float | None = None,
    topk_length: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    lse_base: LseBase = "e",
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention of s_q tokens, each over its own selection of rows of an unpaged latent KV tensor.

    out[i, h] = softmax_j(softmax_scale * <q[i, h], kv[indices[i, g, j], g]>) @ kv[indices[i, g, j], g, :d_v]

    Args:
        q: [s_q, h_q, d_qk] bf16|fp16|fp32.
        kv: [s_kv, h_kv, d_qk] in the dtype of q; head h reads KV head g = h // (h_q / h_kv).
        indices: [s_q, h_kv, topk] int32 row numbers. -1 and s_kv or more select nothing.
        d_v: value columns, the first of the key.
        softmax_scale: default d_qk ** -0.5.
        topk_length: [s_q] int32: only that many leading indices count.
        attn_sink: [h_q] fp32, as for `decode`; no effect on lse and max_logits.
        out: output to write into; must not overlap an input.
        lse_base: "e" or "2", of max_logits and lse alike.
        backend: auto, cute, triton or torch; default OPENMLA_BACKEND.

    Returns:
        out: [s_q, h_q, d_v], dtype of q; 0 where nothing is selected.
        max_logits: [s_q, h_q] fp32, the largest scaled score; -inf where nothing is selected.
        lse: [s_q, h_q] fp32; -inf where nothing is selected.

    Raises:
        ProblemError: the inputs contradict each other; lists all violations.
        UnsupportedError: no permitted backend; lists every reason.

    Notes:
        Determinism: same inputs, same bits. CUDA graphs: safe after one warm call. Gradients: none, as `decode`.
        Source: sparse prefill of deepseek-ai/FlashMLA.
    """
    if torch.compiler.is_compiling() and out is None:
        traced, traced_logits, traced_lse = torch.ops.openmla.sparse_prefill(
            q, kv, indices, d_v, softmax_scale, topk_length, attn_sink, lse_base, backend
        )  # fmt: skip
        return traced, traced_logits, traced_lse
    dispatch.check_lse_base("sparse_prefill", lse_base)
    tensors = (q, kv, indices, topk_length, attn_sink)

    def build() -> SparsePrefillProblem:
        problem = SparsePrefillProblem.from_tensors(
            q, kv, indices, d_v=d_v, topk_length=topk_length, attn_sink=attn_sink, softmax_scale=softmax_scale
        )
        dispatch.check_out("sparse_prefill", out, (*q.shape[:-1], problem.d_v), q.dtype, q.device)
        return problem

    prepared = dispatch.prepare(
        ("sparse_prefill", *map(dispatch.signature, (*tensors, out)), d_v, softmax_scale),
        build,
        dispatch.device_of(q),
        backend,
    )
    problem: SparsePrefillProblem = prepared.problem
    if out is None:
        out = q.new_empty((*q.shape[:-1], problem.d_v))
    else:
        dispatch.check_overlap(prepared, out, tensors)
    max_logits = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    lse = torch.empty_like(max_logits)
    dispatch.launch(
        prepared,
        SparsePrefillOperands(
            q, kv, indices, dispatch.scale_of(softmax_scale, problem.d_qk), out, max_logits, lse, faults.fault_word(q.device),
            topk_length, attn_sink,
        ),
    )  # fmt: skip
    if lse_base == "2":
        return out, max_logits.mul_(LOG2_E), lse.mul_(LOG2_E)
    return out, max_logits, lse
