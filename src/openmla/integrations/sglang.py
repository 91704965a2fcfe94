"""SGLang (0.5.15 to 0.5.23) on OpenMLA, experimental: OPENMLA_SGLANG=1 beside SGLang's own `--attention-backend flashmla`.

Installing openmla beside SGLang is enough: SGLang finds `register` by the entry point `sglang.srt.plugins` and calls it in each
of its processes, before it makes an attention backend. Without the variable nothing changes.

SGLang reaches FlashMLA through a module, from 0.5.23 on `flash_mla` (package sgl-flash-mla), before `sgl_kernel.flash_mla`.
`register` puts OpenMLA in the place of both. What these modules have beyond `openmla.flash_mla` is here:

    schedule tensors         SGLang asks for them once per step and copies them into static buffers; here they are zeros of the
                             right shape, made without waiting for the device. A captured step plans on the device in its first
                             layer, for the lengths of the replay; an eager call plans for itself
    statistics in base 2     of sparse prefill, where they are asked for
    MegaAttention            SM100 only: refused with the reason when it is called
"""

from __future__ import annotations

import ctypes
import logging
import sys
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

import openmla
from openmla.core import counters, env
from openmla.core.errors import ConfigError, UnsupportedError
from openmla.core.target import Target
from openmla.ops import flash_mla
from openmla.ops.dispatch import LOG2_E

HOMES = ("flash_mla", "sgl_kernel.flash_mla")  # since 0.5.23; before
_MARK = "openmla_serves"
_ACTIVE = 1  # CU_STREAM_CAPTURE_STATUS_ACTIVE
_V32_NO_ROPE_BYTES = 528  # a row of two formats; in the form with schedule tensors SGLang means V3.2 without RoPE

_log = logging.getLogger("openmla.sglang")  # SGLang's handlers are the root's
_said: set[tuple[Any, ...]] = set()


def register() -> None:
    """What SGLang calls in every process, any number of times.

    Raises:
        ConfigError: OPENMLA_SGLANG is neither 0 nor 1, or FlashMLA was imported before: two libraries would mix.
    """
    if env.SGLANG.read() != "1":
        return
    for home in HOMES:
        loaded = sys.modules.get(home)
        if loaded is not None and not hasattr(loaded, _MARK):
            raise ConfigError(
                f"{home} is already loaded from {getattr(loaded, '__file__', 'an unknown place')}, OpenMLA cannot take its "
                "place any more; let SGLang load the plugin before anything imports it, or unset OPENMLA_SGLANG"
            )
    for home in HOMES:
        if home not in sys.modules:
            module = _module(home)
            sys.modules[home] = sys.modules[f"{home}.flash_mla_interface"] = module
    _log.info("OpenMLA %s stands in the place of %s", openmla.__version__, " and ".join(HOMES))


def _module(home: str) -> ModuleType:
    """What `home` offers, by OpenMLA."""
    module = ModuleType(home, __doc__)
    module.__spec__ = ModuleSpec(home, None)  # importlib.util.find_spec reads it
    names = {name: getattr(flash_mla, name) for name in flash_mla.__all__ if name != "install"}
    is_older = home == HOMES[1]
    names |= {
        "get_mla_metadata": get_mla_metadata,
        "get_mla_decoding_metadata": get_mla_decoding_metadata,
        "flash_mla_with_kvcache": flash_mla_with_kvcache,
        "flash_mla_sparse_fwd": _sparse_fwd_base_2 if is_older else flash_mla_sparse_fwd,
        "fused_norm_rope_attn_rope_cast": MegaAttention,
        "has_legacy": lambda: True,
        "__version__": openmla.__version__,
        _MARK: True,
    }
    vars(module).update(names)
    return module


def get_mla_metadata(
    cache_seqlens: torch.Tensor | None = None,
    num_q_tokens_per_head_k: int = 1,
    num_heads_k: int = 1,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
) -> tuple[Any, torch.Tensor | None]:
    """An empty FlashMLASchedMeta and None; with lengths, schedule tensors as `get_mla_decoding_metadata` makes them."""
    if cache_seqlens is None:
        return flash_mla.FlashMLASchedMeta(), None
    return get_mla_decoding_metadata(cache_seqlens, num_q_tokens_per_head_k, num_heads_k)


def get_mla_decoding_metadata(
    seqlens_k: torch.Tensor,
    num_q_tokens_per_head_k: int,
    h_k: int,
    h_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
    use_legacy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[num_sm_parts, 8] and [batch + 1] int32, all zero: a form to copy around, since calls plan themselves."""
    _capture.shared = {}  # whatever lengths calls had until now, those behind this one may have others
    blocks = -(-num_q_tokens_per_head_k // 64) * h_k
    parts = max(Target.detect(seqlens_k.device).num_sms // blocks, 1)
    return seqlens_k.new_zeros(parts, 8, dtype=torch.int32), seqlens_k.new_zeros(len(seqlens_k) + 1, dtype=torch.int32)


def flash_mla_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor | None,
    cache_seqlens: torch.Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: Any,
    num_splits: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`openmla.flash_mla.flash_mla_with_kvcache`; a FlashMLASchedMeta may carry schedule tensors from elsewhere."""
    meta, is_sparse = tile_scheduler_metadata, options.get("indices") is not None
    if isinstance(meta, flash_mla.FlashMLASchedMeta) and not meta.have_initialized and meta.num_splits is not None:
        num_splits, meta = meta.num_splits, meta.tile_scheduler_metadata
    row_bytes = k_cache.shape[-1] * k_cache.dtype.itemsize
    if num_splits is not None and is_sparse and options.get("kv_format") is None:
        if (row_bytes, q.shape[-1]) == (_V32_NO_ROPE_BYTES, 512):
            options["kv_format"] = "V32_NO_ROPE"
    elif num_splits is not None and not is_sparse and block_table is not None:
        form = (q.shape, q.dtype, k_cache.shape, k_cache.stride(), block_table.shape, causal)
        shared = _of_this_capture(num_splits, form)
        if shared is not None:
            meta, num_splits = shared, None
    with _Saying("flash_mla_with_kvcache", q, k_cache, is_sparse):
        return flash_mla.flash_mla_with_kvcache(
            q, k_cache, block_table, cache_seqlens, head_dim_v, meta, num_splits, softmax_scale, causal, **options
        )


@dataclass
class _Capture:
    """What calls share in the CUDA graph that is being captured, and the schedule tensors that they share it over."""

    number: int = 0
    shared: dict[tuple[Any, ...], tuple[flash_mla.FlashMLASchedMeta, torch.Tensor]] = field(default_factory=dict)


_capture = _Capture()


def _of_this_capture(num_splits: torch.Tensor, form: tuple[Any, ...]) -> flash_mla.FlashMLASchedMeta | None:
    """The metadata that calls of this form share in the graph that is being captured; None where none is.

    Calls over the same schedule tensors have the same lengths until new ones are made: FlashMLA's own rule. The plan is made
    by the first of the calls, in the graph, so every replay makes it anew. It must not outlive its graph: another graph never
    runs that first call.
    """
    number = _capture_number(num_splits.device)
    if not number:
        return None
    if number != _capture.number:
        _capture.number, _capture.shared = number, {}
    key = (num_splits.data_ptr(), *form)  # the tensor is kept, so that no other one takes its address
    return _capture.shared.setdefault(key, (flash_mla.FlashMLASchedMeta(), num_splits))[0]


def _capture_number(device: torch.device) -> int:
    """The driver's number of the capture under way on the current stream, unique in a process; 0: none, or it does not say."""
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        return 0
    try:
        ask = ctypes.CDLL("libcuda.so.1").cuStreamGetCaptureInfo_v2
    except (OSError, AttributeError):
        return 0
    status, number = ctypes.c_int(), ctypes.c_uint64()
    stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
    failed = ask(stream, ctypes.byref(status), ctypes.byref(number), None, None, None)
    return 0 if failed or status.value != _ACTIVE else number.value


def flash_mla_sparse_fwd(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    use_legacy: bool = False,
    return_log2_lse: bool | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """`openmla.flash_mla.flash_mla_sparse_fwd`; statistics in natural logarithms, base 2 (True), or None (False)."""
    with _Saying("flash_mla_sparse_fwd", q, kv, True):
        out, max_logits, lse = flash_mla.flash_mla_sparse_fwd(
            q, kv, indices, sm_scale, d_v, attn_sink, topk_length, **options
        )
    if return_log2_lse is False:
        return out, None, None
    return (out, max_logits * LOG2_E, lse * LOG2_E) if return_log2_lse else (out, max_logits, lse)


def _sparse_fwd_base_2(*args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """sgl_kernel's statistics are base 2."""
    return flash_mla_sparse_fwd(*args, **{"return_log2_lse": True} | options)


class MegaAttention:
    """Norm, RoPE, attention and cast in one kernel, of sgl-flash-mla for SM100; nothing here."""

    @staticmethod
    def _refuse(*args: Any, **options: Any) -> None:
        raise UnsupportedError(
            "OpenMLA has no MegaAttention",
            {"openmla": ("norm, RoPE, attention and cast in one kernel were not built here, and need SM100 upstream",)},
            "run SGLang with --dsv4-attn-backend flashmla, or without OPENMLA_SGLANG",
        )

    prefill = decode = _refuse


class _Saying:
    """One line in the log per form of call: that OpenMLA serves it, and by which kernel."""

    def __init__(self, name: str, q: torch.Tensor, cache: torch.Tensor, is_sparse: bool) -> None:
        self.form = (name, q.shape[-2], q.dtype, cache.shape[-1], cache.dtype, is_sparse)
        self.is_new = self.form not in _said

    def __enter__(self) -> None:
        if self.is_new:
            self.before = _launches()

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if not self.is_new or error is not None:
            return
        _said.add(self.form)
        ran = sorted(name for name, count in _launches().items() if count > self.before.get(name, 0))
        name, heads, dtype, columns, stored, is_sparse = self.form
        _log.info(
            "OpenMLA serves %s%s: %d query heads in %s over rows of %d x %s, by %s", name, " (indices)" if is_sparse else "",
            heads, dtype, columns, stored, " and ".join(ran),
        )  # fmt: skip


def _launches() -> dict[str, int]:
    found: dict[str, int] = {}
    for each in counters.tallies():
        found[f"{each.backend}/{each.kernel}"] = found.get(f"{each.backend}/{each.kernel}", 0) + each.calls
    return found
