"""The SGLang plugin: who is replaced and when, and calls as SGLang makes them, against the oracle.

SGLang itself needs a GPU to start. Its own file over FlashMLA runs in tests/gpu/sglang_interface.py.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import math
import sys
import types
from pathlib import Path

import pytest
import torch

from openmla.core.errors import ConfigError, UnsupportedError
from openmla.integrations import sglang
from openmla.ops import native
from openmla.reference import attention
from openmla.testing import budget

ROOT = Path(__file__).resolve().parents[2]
SCALE = 192**-0.5


@pytest.fixture
def no_flash_mla(monkeypatch):
    """Nobody has imported FlashMLA, and nobody has after the test."""
    names = [*sglang.HOMES, *(f"{home}.flash_mla_interface" for home in sglang.HOMES)]
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))  # so that it is put back or deleted again
        del sys.modules[name]
    yield
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def served(no_flash_mla, monkeypatch):
    """OpenMLA in the place of FlashMLA."""
    monkeypatch.setenv("OPENMLA_SGLANG", "1")
    sglang.register()


def test_sglang_finds_the_plugin() -> None:
    found = [each for each in importlib.metadata.entry_points(group="sglang.srt.plugins") if each.name == "openmla"]
    if not found:  # an installation from before the entry point
        assert (
            '[project.entry-points."sglang.srt.plugins"]\nopenmla = "openmla.integrations.sglang:register"'
            in (ROOT / "pyproject.toml").read_text()
        )
    assert all(each.value == "openmla.integrations.sglang:register" for each in found)


def test_nothing_is_replaced_unless_asked(no_flash_mla, monkeypatch) -> None:
    sglang.register()
    assert not set(sglang.HOMES) & set(sys.modules)
    monkeypatch.setenv("OPENMLA_SGLANG", "yes")
    with pytest.raises(ConfigError, match="use one of: 0, 1"):
        sglang.register()


@pytest.mark.parametrize("home", sglang.HOMES)
def test_a_library_that_was_loaded_before_is_not_mixed_with(no_flash_mla, monkeypatch, home) -> None:
    monkeypatch.setenv("OPENMLA_SGLANG", "1")
    sys.modules[home] = types.ModuleType(home)
    with pytest.raises(ConfigError, match=f"{home} is already loaded"):
        sglang.register()
    assert not (set(sglang.HOMES) - {home}) & set(sys.modules), "all or nothing"


def test_every_process_may_register_again(served) -> None:
    module = sys.modules["flash_mla"]
    sglang.register()
    assert sys.modules["flash_mla"] is module
    assert importlib.util.find_spec("flash_mla") is not None


def dense_step(s_q: int = 1, h_q: int = 4):
    """Queries, a paged cache, a table cut from a wider buffer with -1 behind the last page, lengths."""
    generator = torch.Generator().manual_seed(s_q)
    q = torch.randn(3, s_q, h_q, 576, generator=generator)
    cache = torch.randn(6, 64, 1, 576, generator=generator)
    wide = torch.full((5, 9), -1, dtype=torch.int32)
    wide[:3, :2] = torch.randperm(6, generator=generator).view(3, 2).to(torch.int32)
    return q, cache, wide[:3, :4], torch.tensor([100, 5, 128], dtype=torch.int32)


@pytest.mark.parametrize("s_q", [1, 2])
def test_decode_as_sglang_calls_it_since_0_5_23(served, s_q) -> None:
    """Schedule tensors on a fresh FlashMLASchedMeta, all arguments by name."""
    import flash_mla
    from flash_mla.flash_mla_interface import FlashMLASchedMeta

    q, cache, table, lengths = dense_step(s_q)
    made = flash_mla.get_mla_decoding_metadata(lengths, s_q * 4, 1, None, False, None, use_legacy=True)
    parts, splits = (torch.empty_like(x).copy_(x) for x in made)  # static buffers
    assert (parts.dtype, parts.shape[1], splits.shape) == (torch.int32, 8, (4,))
    for _ in range(2):  # layers
        out, lse = flash_mla.flash_mla_with_kvcache(
            q=q, k_cache=cache, block_table=table, cache_seqlens=lengths, head_dim_v=512,
            tile_scheduler_metadata=FlashMLASchedMeta(tile_scheduler_metadata=parts, num_splits=splits),
            softmax_scale=SCALE, causal=True, is_fp8_kvcache=False, indices=None, attn_sink=None, extra_k_cache=None,
            extra_indices_in_kvcache=None, topk_length=None, extra_topk_length=None, use_legacy=True, kv_format=None,
            descale_q=None, descale_k=None,
        )  # fmt: skip
        golden = attention.decode(
            q, cache, table.clamp(min=0), lengths, d_v=512, softmax_scale=SCALE, is_causal=True, with_bounds=True
        )
        budget.check(out, lse, golden, dtype=torch.float32).require(f"{s_q=}")


def test_decode_as_sglang_called_it_before(served) -> None:
    from sgl_kernel.flash_mla import flash_mla_with_kvcache, get_mla_metadata

    q, cache, table, lengths = dense_step()
    parts, splits = get_mla_metadata(lengths, 4, 1, is_fp8_kvcache=False)
    out, lse = flash_mla_with_kvcache(
        q=q, k_cache=cache, block_table=table, cache_seqlens=lengths, head_dim_v=512, tile_scheduler_metadata=parts,
        num_splits=splits, softmax_scale=SCALE, causal=True,
    )  # fmt: skip
    golden = attention.decode(
        q, cache, table.clamp(min=0), lengths, d_v=512, softmax_scale=SCALE, is_causal=True, with_bounds=True
    )
    budget.check(out, lse, golden, dtype=torch.float32).require("sgl_kernel")


def test_layers_of_a_captured_step_share_one_plan(served, monkeypatch) -> None:
    """A plan is made in each graph, and again behind new schedule tensors; eager calls plan for themselves."""
    import flash_mla

    plans, graph = [], [0]
    stock = native.plan
    monkeypatch.setattr(native, "plan", lambda *a, **o: plans.append(graph[0]) or stock(*a, **o))
    monkeypatch.setattr(sglang, "_capture_number", lambda device: graph[0])
    q, cache, table, lengths = dense_step()
    schedules = [flash_mla.get_mla_decoding_metadata(lengths, 4, 1) for _ in range(2)]
    eager = None

    def layers(*numbers: int) -> None:
        nonlocal eager
        for number in numbers:
            out, _ = flash_mla.flash_mla_with_kvcache(q, cache, table, lengths, 512, *schedules[number], SCALE)
            eager = out if eager is None else eager
            torch.testing.assert_close(out, eager)

    layers(0, 0)
    assert plans == [], "eager calls plan inside"
    for graph[0] in (5, 6):
        layers(0, 0, 0)
        layers(1, 0, 1)
    assert plans == [5, 5, 6, 6]
    flash_mla.get_mla_decoding_metadata(lengths, 4, 1)
    layers(0, 0)
    assert plans[4:] == [6]
    two = dense_step(2)
    for _ in range(2):
        flash_mla.flash_mla_with_kvcache(*two, 512, *schedules[0], SCALE, True)
    assert plans[5:] == [6], "two query tokens are another plan, made once"
    graph[0] = 0
    layers(0)
    assert len(plans) == 6, "eager calls plan inside"


def test_statistics_of_sparse_prefill_in_the_base_that_is_asked_for(served) -> None:
    import flash_mla
    from sgl_kernel.flash_mla import flash_mla_sparse_fwd

    q, kv = torch.randn(3, 4, 576), torch.randn(50, 1, 576)
    indices = torch.randint(0, 50, (3, 1, 16), dtype=torch.int32)
    indices[1] = -1  # a row that sees nothing
    out, max_logits, lse = flash_mla.flash_mla_sparse_fwd(q, kv, indices, SCALE)
    for found in (
        flash_mla.flash_mla_sparse_fwd(q, kv, indices, SCALE, 512, None, None, use_legacy=True, return_log2_lse=True),
        flash_mla_sparse_fwd(q, kv, indices, SCALE),
    ):
        assert torch.equal(found[0], out)
        torch.testing.assert_close(found[1] * math.log(2), max_logits)
        torch.testing.assert_close(found[2] * math.log(2), lse)
    assert flash_mla.flash_mla_sparse_fwd(q, kv, indices, SCALE, return_log2_lse=False)[1:] == (None, None)


def test_what_is_not_there_says_so_when_it_is_called(served) -> None:
    from flash_mla import fused_norm_rope_attn_rope_cast as mega

    for call in (mega.prefill, mega.decode):
        with pytest.raises(UnsupportedError, match="MegaAttention"):
            call(q=None)


def test_the_log_names_what_serves_once(served, caplog, monkeypatch) -> None:
    import flash_mla

    monkeypatch.setattr(sglang, "_said", set())
    caplog.set_level(logging.INFO, "openmla.sglang")
    q, cache, table, lengths = dense_step()
    for _ in range(2):
        flash_mla.flash_mla_with_kvcache(q, cache, table, lengths, 512, *flash_mla.get_mla_metadata(), SCALE)
    assert [each.getMessage() for each in caplog.records] == [
        "OpenMLA serves flash_mla_with_kvcache: 4 query heads in torch.float32 over rows of 576 x torch.float32, "
        "by torch/decode_tiled"
    ]
