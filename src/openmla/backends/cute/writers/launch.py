"""From a compiled writer and tensors to a launch on the current stream. No decisions: those are in config.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from openmla.backends.base import AppendOperands
from openmla.backends.cute.toolchain import CompiledObject, compile_kernel, fake_stream, fake_tensor
from openmla.backends.cute.writers.config import MAX_SLOTS, Config


def fake_arguments(config: Config) -> tuple[Any, ...]:
    """What `compile_kernel` needs to know about the arguments: ranks, fixed extents, alignments. Needs the DSL."""
    import cutlass
    import cutlass.cute as cute
    from cutlass import Int32, Int64

    layout = config.stored
    element, step = (cutlass.Uint8, 16) if layout.is_quantised else (cutlass.BFloat16, 8)
    return (
        fake_tensor(cutlass.BFloat16, (None, layout.d_qk), stride=(cute.sym_int64(divisibility=8), 1)),  # rows
        fake_tensor(
            element, (None, None, 1, layout.row_elements), stride=(cute.sym_int64(divisibility=step), None, None, 1)
        ),  # cache
        fake_tensor(Int32, (1,), align=4),  # fault_word
        Int64(0), Int64(0), Int64(0), Int64(0),  # slots, positions, cos, sin
        # slot_words, position_words, wide, num_slots, num_positions, cos_step, sin_step, rope
        *(Int32(1) for _ in range(8)),
        fake_stream(),
    )  # fmt: skip


def build(config: Config, folder: Path) -> CompiledObject:
    """Compile and export one variant. Needs the DSL, no GPU."""
    from openmla.backends.cute.writers.kernel import Writer

    return compile_kernel(Writer(config), fake_arguments(config), config.name, out_dir=folder)


def launch(function: Any, is_quantised: bool, operands: AppendOperands) -> None:
    """Store tokens.

    Args:
        function: the exported function of a variant.
        is_quantised: whether its layout holds bytes.
        operands: checked tensors; cache, rows and tables are aligned as `supports` asks, rows are bf16, there is at least one.
    """
    cache, slots, rows, fault_word, rope, positions, _ = operands
    wide = int(slots.dtype == torch.int64)
    cos, sin, place, place_words, kind, count = 0, 0, 0, 0, 0, 1
    steps = (0, 0)
    if rope is not None and positions is not None:
        is_wide = positions.dtype == torch.int64
        cos, sin, place, count = rope.cos.data_ptr(), rope.sin.data_ptr(), positions.data_ptr(), rope.cos.shape[0]
        place_words, kind = positions.stride(0) << is_wide, 1 if rope.is_interleaved else 2
        steps = (rope.cos.stride(0), rope.sin.stride(0))
        wide |= is_wide << 1
    function(
        rows, cache.view(torch.uint8) if is_quantised and cache.dtype != torch.uint8 else cache, fault_word,
        slots.data_ptr(), place, cos, sin, slots.stride(0) << (slots.dtype == torch.int64), place_words, int(wide),
        min(cache.shape[0] * cache.shape[1], MAX_SLOTS), count, *steps, kind,
    )  # fmt: skip
