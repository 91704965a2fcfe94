"""torch.library: schemas, fakes, autograd; graphs trace whole and give the eager bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import openmla
from openmla.ops import library
from openmla.reference import quant

assert library is not None


def _decode_arguments(varlen: bool = False) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, 2, 4, 576, generator=generator)
    cache = torch.randn(4, 16, 1, 576, generator=generator)
    table = torch.arange(4, dtype=torch.int32).view(2, 2)
    lengths = torch.tensor([20, 32], dtype=torch.int32)
    starts = torch.tensor([0, 2, 4], dtype=torch.int32) if varlen else None
    return (
        q.flatten(0, 1) if varlen else q, cache, table, lengths, 512, None, True, None, starts, 2 if varlen else None,
        torch.zeros(4), None, "balanced", "e", None,
    )  # fmt: skip


def _sparse_arguments(layout: str | None) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(2)
    cache = torch.randn(3, 16, 1, 576, generator=generator).bfloat16()
    if layout:
        cache = quant.quantise(cache, openmla.kv_layout(layout))
    q = torch.randn(2, 1, 4, 576, generator=generator).bfloat16()
    indices = torch.randint(0, 48, (2, 1, 16), generator=generator, dtype=torch.int32)
    return (q, cache, indices, layout, 512, 0.1, None, None, None, None, None, None, "e", None)


def _sparse_prefill_arguments() -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(3)
    indices = torch.randint(0, 20, (6, 1, 8), generator=generator, dtype=torch.int32)
    return (
        torch.randn(6, 2, 64, generator=generator), torch.randn(20, 1, 64, generator=generator), indices, 32, None,
        None, None, "2", None,
    )  # fmt: skip


def _prefill_arguments(needs_grad: bool) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(4)
    starts = torch.tensor([0, 4, 10], dtype=torch.int32)
    q, k, v = (torch.randn(10, 2, d, generator=generator).requires_grad_(needs_grad) for d in (24, 24, 16))
    return (q, k, v, starts, starts, 6, 6, None, True, None)


CASES = [
    pytest.param("decode", _decode_arguments(), id="decode"),
    pytest.param("decode", _decode_arguments(varlen=True), id="decode-varlen"),
    pytest.param("sparse_decode", _sparse_arguments(None), id="sparse-bf16"),
    pytest.param("sparse_decode", _sparse_arguments("fp8_656"), id="sparse-fp8"),
    pytest.param("sparse_prefill", _sparse_prefill_arguments(), id="sparse-prefill"),
    pytest.param("prefill", _prefill_arguments(False), id="prefill"),
    pytest.param("prefill", _prefill_arguments(True), id="prefill-grad"),
]


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_opcheck(name: str, arguments: tuple[Any, ...]) -> None:
    torch.library.opcheck(getattr(torch.ops.openmla, name).default, arguments)


def test_decode_traces_without_a_graph_break_and_keeps_its_bits() -> None:
    q, cache, table, lengths, *_ = _decode_arguments()

    def step(q: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        out, lse = openmla.decode(q * 2, cache, table, lengths, is_causal=True)
        return out + lse.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, cache), step(q, cache))


def test_every_operation_compiles_fullgraph() -> None:
    sparse = _sparse_arguments("fp8_656")
    prefill = _sparse_prefill_arguments()
    dense = _prefill_arguments(False)

    def everything(q: torch.Tensor) -> torch.Tensor:
        a, _ = openmla.sparse_decode(q, sparse[1], sparse[2], kv_layout="fp8_656", return_lse=False)
        b, _, _ = openmla.sparse_prefill(prefill[0], prefill[1], prefill[2], d_v=32)
        c, _ = openmla.prefill(*dense[:7], is_causal=True, lse_base="2")
        d, _ = openmla.flash_mla.flash_mla_with_kvcache(
            q, sparse[1], None, None, 512, openmla.flash_mla.FlashMLASchedMeta(), is_fp8_kvcache=True, indices=sparse[2]
        )
        return a.float().sum() + b.sum() + c.sum() + d.float().sum()

    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(sparse[0]), everything(sparse[0]))


def test_gradients_flow_through_a_compiled_prefill() -> None:
    eager, traced = _prefill_arguments(True), _prefill_arguments(True)

    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rest: tuple[Any, ...]) -> torch.Tensor:
        out, _ = openmla.prefill(q, k, v, *rest[:4], is_causal=True)
        return out.square().sum()

    loss(*eager[:3], eager[3:]).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*traced[:3], traced[3:]).backward()
    for mine, other in zip(eager[:3], traced[:3], strict=True):
        assert mine.grad is not None
        assert torch.equal(mine.grad, other.grad)


def test_export_with_a_dynamic_batch() -> None:
    q, cache, table, lengths, *_ = _decode_arguments()

    class Step(torch.nn.Module):
        def forward(self, q: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            return openmla.decode(q, cache, table, lengths)[0]

    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(
        Step(), (q, table, lengths), dynamic_shapes={"q": {0: batch}, "table": {0: batch}, "lengths": {0: batch}}
    )
    more = (torch.cat([q, q]), torch.cat([table, table]), torch.cat([lengths, lengths]))
    assert torch.equal(program.module()(*more), Step()(*more))


def test_eager_calls_do_not_touch_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    q, cache, table, lengths, *_ = _decode_arguments()
    with torch.profiler.profile() as profile:
        openmla.decode(q, cache, table, lengths)
    assert not [event for event in profile.events() if event.name.startswith("openmla::")]
