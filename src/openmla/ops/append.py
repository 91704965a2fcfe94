"""Writing new tokens into a paged latent cache: RoPE, quantisation and the scatter to pages in one launch."""

from __future__ import annotations

import torch

from openmla.backends.base import AppendOperands
from openmla.core import faults
from openmla.core.layout import KVLayout
from openmla.core.problem import AppendProblem
from openmla.mods import Rope
from openmla.ops import dispatch


def append(
    cache: torch.Tensor,
    slots: torch.Tensor,
    rows: torch.Tensor,
    *,
    kv_layout: KVLayout | str | None = None,
    rope: Rope | None = None,
    positions: torch.Tensor | None = None,
    descale: torch.Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Store tokens in a paged cache, in place.

    cache[slots[i] // page_size, slots[i] % page_size, 0] = pack(rotate(rows[i], positions[i])), the bytes of
    `openmla.reference.quant.write_rows`, bit for bit (a group that holds NaN or inf reads as NaN; its bytes are free).

    Args:
        cache: [num_pages, page_size, 1, row_elements] in `kv_layout`; pages may be padded.
        slots: [n] int64|int32, page * page_size + offset; -1 skips a token. Distinct, else one of the tokens wins.
        rows: [n, d_qk] bf16|fp16|fp32: latent, then RoPE.
        kv_layout: layout of the cache; default: plain elements.
        rope: rotates the last 2 * cos.shape[1] columns in fp32, rounded once to the dtype of rows, before they are stored.
        positions: [n] int64|int32 with rope; one behind the tables makes the rotated columns NaN.
        descale: [1] fp32 that rows are divided by in fp32, where the cache holds codes alone (fp8_576), which saturate at
            448; default 1. The `descale_k` of `decode`.
        backend: auto, cute, triton or torch; default OPENMLA_BACKEND. A named one never falls back.

    Returns:
        Nothing; cache is changed in place.

    Raises:
        ProblemError: shapes, dtypes, devices or strides contradict each other; lists all violations. Backend torch also
            looks at the slots, and raises for one that is neither -1 nor in the cache.
        UnsupportedError: no permitted backend; lists every reason.

    Notes:
        Backends cute and triton do not wait for the device: a bad slot stores nothing and is reported by `openmla.check_errors`.
        Determinism: same inputs, same bits where slots are distinct. CUDA graphs: safe after one warm call. Gradients: none.
        Source: `concat_and_cache_mla` of vLLM, with RoPE and every layout of `openmla.core.layout`.
    """
    tables = (
        (None, None, None) if rope is None else (*map(dispatch.signature, (rope.cos, rope.sin)), rope.is_interleaved)
    )
    prepared = dispatch.prepare(
        ("append", *map(dispatch.signature, (cache, slots, rows, positions, descale)), *tables, kv_layout),
        lambda: AppendProblem.from_tensors(
            cache, slots, rows, layout=kv_layout, rope=rope, positions=positions, descale=descale
        ),
        dispatch.device_of(cache),
        backend,
        tokens=rows.shape[0] if isinstance(rows, torch.Tensor) and rows.dim() else 0,
    )
    operands = AppendOperands(cache, slots, rows, faults.fault_word(cache.device), rope, positions, descale)
    dispatch.launch(prepared, operands)
