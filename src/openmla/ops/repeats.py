"""A call of a plan, repeated with the tensors of the next layer: what stands between Python and the launch of most calls.

A model calls `decode` with one plan for every layer of a step, and nothing but tensors of the same kinds changes. So what the
first call worked out is kept with the plan, and the calls behind it compare kinds, look at addresses, and launch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch

from openmla.backends.base import DecodeOperands, DecodePlan, Repeatable
from openmla.core import env
from openmla.ops.dispatch import Prepared, check_overlap, extent, ran_elsewhere, signature
from openmla.ops.observers import Observer, around, observers, watching
from openmla.ops.recovery import LOST

_ALIGNED = 15  # address bits that are 0 in what a kernel copies by 16 bytes
_look, _CHECKS, _BACKEND = env.STORE.get, env.CHECKS.key, env.BACKEND.key


class Repeat:
    """A call of a plan, ready for other tensors of the same kinds.

    A kind is everything of a tensor that the rules of `core.problem` look at, but for the address: q, kv_cache and out start at
    multiples of 16 bytes in the call that is repeated, and must in the others.
    """

    def __init__(
        self,
        prepared: Prepared,
        run: Repeatable,
        options: tuple[Any, ...],
        operands: DecodeOperands,
        plan: DecodePlan,
        is_out_given: bool,
    ) -> None:
        self.prepared, self.run, self.options, self.plan = prepared, run, options, plan
        self.tally, self.is_out_given = prepared.tally, is_out_given
        self.backend, self.checks = _look(_BACKEND), _look(_CHECKS)
        self.sink, self.softmax_scale, self.fault_word = operands.attn_sink, operands.softmax_scale, operands.fault_word
        self.sink_at = 0 if self.sink is None else self.sink.data_ptr()
        self.are_alike, self.make_out, self.make_lse, self.spans = _tensors_of(prepared, operands, is_out_given)
        self.is_overlap_checked = is_out_given and env.CHECKS.read() != "off"

    def again(
        self, options: tuple[Any, ...], q: torch.Tensor, kv_cache: torch.Tensor, block_table: torch.Tensor,
        cache_seqlens: torch.Tensor, attn_sink: torch.Tensor | None, out: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:  # fmt: skip
        """(out, lse), or None where this is another call, or where anything is not as usual."""
        if (
            options != self.options
            or attn_sink is not self.sink
            or (out is not None) is not self.is_out_given
            or _look(_CHECKS) != self.checks
            or _look(_BACKEND) != self.backend
            or LOST
        ):
            return None
        try:
            if out is None:
                if not self.are_alike(q, kv_cache, block_table, cache_seqlens):
                    return None
                if (q.data_ptr() | kv_cache.data_ptr()) & _ALIGNED:
                    return None
                out = self.make_out()
            else:
                if not self.are_alike(q, kv_cache, block_table, cache_seqlens, out):
                    return None
                at, at_q, at_kv = out.data_ptr(), q.data_ptr(), kv_cache.data_ptr()
                if (at | at_q | at_kv) & _ALIGNED:
                    return None
                if self.is_overlap_checked:
                    # What `check_overlap` asks, which raises: 0.4 us instead of 1.4 (one core of a server), in every call.
                    of_out, of_q, of_kv, of_table, of_lengths, of_sink = self.spans
                    end = at + of_out
                    if (
                        at - of_q < at_q < end
                        or at - of_kv < at_kv < end
                        or at - of_table < block_table.data_ptr() < end
                        or at - of_lengths < cache_seqlens.data_ptr() < end
                        or at - of_sink < self.sink_at < end
                    ):
                        check_overlap(self.prepared, out, (q, kv_cache, block_table, cache_seqlens, None, attn_sink))
            if attn_sink is not None and attn_sink.data_ptr() != self.sink_at:
                return None
            lse = self.make_lse()
        except torch.OutOfMemoryError:
            return None  # the usual way says so
        self.tally.count()
        try:
            if observers and (seen_by := watching()):
                self._watched(seen_by, q, kv_cache, block_table, cache_seqlens, out, lse)
            else:
                self.run(q, kv_cache, block_table, cache_seqlens, out, lse)
        except Exception as error:
            operands = self._operands(q, kv_cache, block_table, cache_seqlens, out, lse)
            if ran_elsewhere(self.prepared, operands, error):
                return out, lse
            raise
        return out, lse

    def _watched(self, seen_by: list[Observer], *tensors: torch.Tensor) -> None:
        around(seen_by, self.prepared, self._operands(*tensors), self.plan, lambda: self.run(*tensors))

    def _operands(
        self, q: torch.Tensor, kv_cache: torch.Tensor, block_table: torch.Tensor, cache_seqlens: torch.Tensor,
        out: torch.Tensor, lse: torch.Tensor,
    ) -> DecodeOperands:  # fmt: skip
        given = (q, kv_cache, block_table, cache_seqlens)
        return DecodeOperands(*given, self.softmax_scale, out, lse, self.fault_word, None, self.sink)


class Tensors(NamedTuple):
    """What the repeated calls of one signature compare and make; kept with it, for plans come and go with every step."""

    are_alike: Callable[..., bool]  # of q, kv_cache, block_table, cache_seqlens, and out where it is given
    make_out: Callable[[], torch.Tensor]
    make_lse: Callable[[], torch.Tensor]
    spans: tuple[int, ...]  # bytes of out, q, kv_cache, block_table, cache_seqlens, attn_sink


def _tensors_of(prepared: Prepared, operands: DecodeOperands, is_out_given: bool) -> Tensors:
    given = (operands.q, operands.kv_cache, operands.block_table, operands.cache_seqlens)
    compared = (*given, operands.out) if is_out_given else given
    found: Tensors | None = prepared.tensors
    if found is None or not found.are_alike(*compared):  # the comparison may be of another mode, such as inference
        spans = tuple(map(extent, (operands.out, *given, operands.attn_sink)))
        found = Tensors(kinds_of(*compared), maker_of(operands.out), maker_of(operands.lse), spans)
        prepared.tensors = found
    return found


def repeat_of(
    prepared: Prepared, options: tuple[Any, ...], operands: DecodeOperands, plan: DecodePlan, is_out_given: bool
) -> tuple[Repeat, ...]:
    """The Repeat of a call that was just made; none where its kernel or the checks in force do not allow one."""
    prepare_again = getattr(prepared.kernel, "repeatable", None)
    if prepare_again is None or env.CHECKS.read() not in ("off", "fast"):
        return ()
    if (operands.q.data_ptr() | operands.kv_cache.data_ptr() | operands.out.data_ptr()) & _ALIGNED:
        return ()
    run = prepare_again(prepared.compiled, prepared.problem, operands, plan)
    try:
        return () if run is None else (Repeat(prepared, run, options, operands, plan, is_out_given),)
    except torch.OutOfMemoryError:  # this call has its result, and the next one says so
        return ()


def kinds_of(*tensors: torch.Tensor) -> Callable[..., bool]:
    """A function of as many tensors: whether each has the type, dtype, device, shape and strides of the one in its place.

    0.5 us for five, by what `torch.compile` compares the arguments of its graphs with; 1.8 us (one core of a server) by Python where
    that is not there, or where it does not tell apart what it should. It asks more than that: `requires_grad`, and that
    no tensor is given twice. A "no" is always right to give, for then the call is looked at in full.
    """
    guards = _guards()
    if guards is not None:
        is_same = _compared_by(guards, tensors)
        if is_same(*tensors):
            return is_same
    kinds = [signature(each) for each in tensors]
    return lambda *others: all(signature(each) == kind for each, kind in zip(others, kinds, strict=True))


def _compared_by(guards: Any, tensors: tuple[torch.Tensor, ...]) -> Callable[..., bool]:
    sizes, strides = [list(each.shape) for each in tensors], [list(each.stride()) for each in tensors]
    made: Callable[..., bool] = guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    return made


@cache
def _guards() -> Any:
    """PyTorch's comparison of tensors, where this PyTorch has it and it tells apart what the rules do; else None."""
    try:
        guards = torch._C._dynamo.guards.TensorGuards
        with torch.inference_mode(False):
            like = torch.zeros(4, 4)
            others = (
                like[:2], like.t(), like.half(), like.to("meta"), like.to_sparse(), like[None], None
            )  # fmt: skip
            is_same = _compared_by(guards, (like,))
            is_right = is_same(like.clone()) and not any(map(is_same, others))
    except (AttributeError, TypeError, ValueError, RuntimeError, SystemError):  # another PyTorch
        return None
    return guards if is_right else None


def maker_of(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A function that makes tensors of this one's dtype, device, shape and strides, with contents as they come.

    1.0 us by what code of `torch.compile` makes its tensors with, which takes the current GPU; 1.7 by `empty_like`, where that is
    not there or the tensor lies elsewhere; `empty` takes twice that (one core of an H100's host).
    """
    device, shape, strides = tensor.device, tuple(tensor.shape), tensor.stride()
    quick = _quick_empty(device.type)
    if quick is not None and (device.type == "cpu" or torch.cuda.device_count() == 1):
        return partial(quick, shape, strides, tensor.dtype)
    with torch.inference_mode(False):  # it outlives the mode
        like = torch.empty_strided(shape, strides, dtype=tensor.dtype, device=device)
    like.untyped_storage().resize_(0)
    usual = partial(torch.empty_like, like)
    if quick is None:
        return usual
    here, of_many = torch._C._cuda_getDevice, partial(quick, shape, strides, tensor.dtype)
    return lambda: of_many() if here() == device.index else usual()


@cache
def _quick_empty(device: str) -> Any:
    """PyTorch's quick `empty_strided` of a kind of device, where this PyTorch has one that does what it did; else None."""
    try:
        make = getattr(torch._C._dynamo.guards, f"_empty_strided_{device}")
        made = make((2, 3), (1, 2), torch.bfloat16)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return None
    is_right = (made.device.type, made.shape, made.stride(), made.dtype) == (device, (2, 3), (1, 2), torch.bfloat16)
    return make if is_right and not made.requires_grad else None
