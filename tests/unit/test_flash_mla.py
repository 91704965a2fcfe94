"""The drop-in interface: upstream's names, both forms of metadata, and its conventions at the border."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import pytest
import torch

import openmla
from openmla import flash_mla
from openmla.core.errors import ConfigError, PlanMismatchError, ProblemError
from openmla.reference import attention, quant
from openmla.testing import budget


def _dense(batch: int = 2, s_q: int = 1, h_q: int = 4, length: int = 100) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(batch + length)
    pages = -(-length // 64)
    return {
        "q": torch.randn(batch, s_q, h_q, 576, generator=generator).bfloat16(),
        "k_cache": torch.randn(batch * pages, 64, 1, 576, generator=generator).bfloat16(),
        "block_table": torch.arange(batch * pages, dtype=torch.int32).view(batch, pages),
        "cache_seqlens": torch.tensor([length] * (batch - 1) + [0], dtype=torch.int32),
    }


def test_signatures_begin_as_upstream_has_them() -> None:
    upstream = {
        "flash_mla_with_kvcache": "q k_cache block_table cache_seqlens head_dim_v tile_scheduler_metadata num_splits "
        "softmax_scale causal is_fp8_kvcache indices attn_sink extra_k_cache extra_indices_in_kvcache topk_length "
        "extra_topk_length",
        "flash_mla_sparse_fwd": "q kv indices sm_scale d_v attn_sink topk_length",
        "flash_attn_varlen_func": "q k v cu_seqlens_qo cu_seqlens_kv max_seqlen_qo max_seqlen_kv dropout_p "
        "softmax_scale causal deterministic is_varlen",
        "flash_attn_varlen_qkvpacked_func": "qkv cu_seqlens max_seqlen head_dim_qk dropout_p softmax_scale causal "
        "deterministic is_varlen",
        "flash_attn_varlen_kvpacked_func": "q kv cu_seqlens_qo cu_seqlens_kv max_seqlen_qo max_seqlen_kv head_dim_qk "
        "dropout_p softmax_scale causal deterministic is_varlen",
    }
    for name, parameters in upstream.items():
        ours = inspect.signature(getattr(flash_mla, name)).parameters.values()
        positional = [p.name for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert positional == parameters.split(), name
        assert all(p.kind is p.KEYWORD_ONLY for p in ours if p.name not in positional), f"{name}: extras by keyword"


def test_object_form_fills_the_metadata_and_empty_rows_are_plus_inf() -> None:
    case = _dense()
    meta, nothing = flash_mla.get_mla_metadata()
    assert nothing is None
    out, lse = flash_mla.flash_mla_with_kvcache(**case, head_dim_v=512, tile_scheduler_metadata=meta)
    assert meta.have_initialized
    assert meta.tile_scheduler_metadata.shape[1] == 8
    assert meta.num_splits.shape == (3,)
    assert not out[1].any()
    assert bool((lse[1] == torch.inf).all())
    golden = attention.decode(
        case["q"], case["k_cache"], case["block_table"], case["cache_seqlens"], softmax_scale=576**-0.5, d_v=512,
        with_bounds=True,
    )  # fmt: skip
    budget.check(out, lse.masked_fill(lse == torch.inf, -torch.inf), golden, dtype=torch.bfloat16).require()


def test_tuple_form_gives_the_same_bits_also_through_copies() -> None:
    case = _dense()
    out, lse = flash_mla.flash_mla_with_kvcache(
        **case, head_dim_v=512, tile_scheduler_metadata=flash_mla.get_mla_metadata()[0]
    )
    parts, splits = flash_mla.get_mla_metadata(case["cache_seqlens"], 4, 1)
    assert parts.dtype == splits.dtype == torch.int32
    assert splits.tolist()[-1] >= 2
    static_parts, static_splits = torch.zeros_like(parts), torch.zeros_like(splits)
    static_parts.copy_(parts)
    static_splits.copy_(splits)
    old, old_lse = flash_mla.flash_mla_with_kvcache(
        case["q"], case["k_cache"], case["block_table"], case["cache_seqlens"], 512, static_parts, static_splits
    )
    assert torch.equal(old, out)
    assert torch.equal(old_lse, lse)


def test_metadata_of_other_lengths_is_planned_anew() -> None:
    case = _dense(length=300)
    meta = flash_mla.get_mla_metadata()[0]
    flash_mla.flash_mla_with_kvcache(**case, head_dim_v=512, tile_scheduler_metadata=meta)
    case["cache_seqlens"] = torch.tensor([17, 299], dtype=torch.int32)
    out, lse = flash_mla.flash_mla_with_kvcache(**case, head_dim_v=512, tile_scheduler_metadata=meta)
    golden = attention.decode(
        case["q"], case["k_cache"], case["block_table"], case["cache_seqlens"], softmax_scale=576**-0.5, d_v=512,
        with_bounds=True,
    )  # fmt: skip
    budget.check(out, lse, golden, dtype=torch.bfloat16).require()


def test_metadata_of_other_shapes_is_refused_field_by_field() -> None:
    meta = flash_mla.get_mla_metadata()[0]
    flash_mla.flash_mla_with_kvcache(**_dense(), head_dim_v=512, tile_scheduler_metadata=meta)
    with pytest.raises(PlanMismatchError) as caught:
        flash_mla.flash_mla_with_kvcache(**_dense(batch=3, s_q=2), head_dim_v=512, tile_scheduler_metadata=meta)
    assert "b: the metadata was filled with 2, the call has 3" in str(caught.value)
    assert "s_q: the metadata was filled with 1, the call has 2" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        pytest.param({"tile_scheduler_metadata": None}, "must be what get_mla_metadata returned", id="no-metadata"),
        pytest.param({"block_table": None}, "block_table and cache_seqlens must be given", id="no-table"),
        pytest.param({"topk_length": torch.zeros(2)}, "topk_length needs indices", id="sparse-only"),
        pytest.param({"is_fp8_kvcache": True}, "k_cache has 1152 bytes per row; byte layouts have 656", id="not-bytes"),
        pytest.param({"kv_format": "V99"}, "unknown KV layout 'V99'", id="unknown-format"),
        pytest.param({"indices": torch.zeros(2, 1, 4, dtype=torch.int32), "causal": True}, "causal must be False", id="causal"),
    ],
)  # fmt: skip
def test_border_errors(change: dict[str, Any], sentence: str) -> None:
    arguments = {**_dense(), "head_dim_v": 512, "tile_scheduler_metadata": flash_mla.FlashMLASchedMeta(), **change}
    with pytest.raises(ProblemError) as caught:
        flash_mla.flash_mla_with_kvcache(**arguments)
    assert sentence in str(caught.value)


def test_errors_speak_upstreams_words() -> None:
    """What the native operations refuse is said with the names of this function's arguments."""
    meta = flash_mla.get_mla_metadata()[0]
    case = _dense()
    flash_mla.flash_mla_with_kvcache(**case, head_dim_v=512, tile_scheduler_metadata=meta)
    with pytest.raises(PlanMismatchError) as caught:
        flash_mla.flash_mla_with_kvcache(**case, head_dim_v=256, tile_scheduler_metadata=meta)
    assert caught.value.op == "flash_mla_with_kvcache"
    assert caught.value.violations == (
        "head_dim_v: the plan has 512, the call has 256", "call get_mla_metadata() for this shape",
    )  # fmt: skip
    with pytest.raises(ProblemError) as wrong:
        flash_mla.flash_mla_with_kvcache(
            **{**case, "k_cache": case["k_cache"].half()}, head_dim_v=512, tile_scheduler_metadata=meta
        )
    assert "k_cache must have the dtype of q (bfloat16), got float16" in str(wrong.value)
    assert "name a byte layout with kv_format=" in str(wrong.value)


@pytest.mark.parametrize("name", ["V32", "V32_NO_ROPE", "V4", "V41"])
def test_sparse_fp8_decode_with_extra_cache(name: str) -> None:
    layout = openmla.kv_layout(flash_mla._KV_FORMATS[name])
    generator = torch.Generator().manual_seed(5)
    main = quant.quantise(torch.randn(3, 64, 1, layout.d_qk, generator=generator).bfloat16(), layout)
    extra = quant.quantise(torch.randn(2, 2, 1, layout.d_qk, generator=generator).bfloat16(), layout)
    q = torch.randn(2, 2, 8, layout.d_qk, generator=generator).bfloat16()
    indices = torch.randint(-1, 192, (2, 2, 48), generator=generator, dtype=torch.int32)
    extra_indices = torch.randint(-1, 4, (2, 2, 8), generator=generator, dtype=torch.int32)
    lengths = torch.tensor([48, 11], dtype=torch.int32)
    sink = torch.randn(8, generator=generator)
    out, lse = flash_mla.flash_mla_with_kvcache(
        q, main, None, None, 512, flash_mla.FlashMLASchedMeta(), None, 0.05, False, True, indices, sink, extra,
        extra_indices, lengths, None, kv_format=name, extra_kv_format=name,
    )  # fmt: skip
    golden = attention.sparse_decode(
        q, main, indices, softmax_scale=0.05, d_v=512, layout=layout, topk_length=lengths, attn_sink=sink,
        extra_kv_cache=extra, extra_indices=extra_indices, extra_layout=layout, with_bounds=True,
    )  # fmt: skip
    budget.check(out, lse, golden, dtype=torch.bfloat16).require()


def test_row_bytes_decide_as_upstream_decides() -> None:
    cache = torch.zeros(2, 64, 1, 528, dtype=torch.float8_e4m3fn)
    layout = flash_mla._layout_of(cache, True, None, "k_cache")
    assert layout is not None
    assert layout.name == "fp8_528_mx"


def test_sparse_prefill_border() -> None:
    generator = torch.Generator().manual_seed(7)
    q = torch.randn(5, 4, 576, generator=generator).bfloat16()
    kv = torch.randn(70, 1, 576, generator=generator).bfloat16()
    indices = torch.randint(-3, 75, (5, 1, 32), generator=generator, dtype=torch.int32)
    indices[2] = -1
    out, max_logits, lse = flash_mla.flash_mla_sparse_fwd(q, kv, indices, 576**-0.5)
    assert bool((lse[2] == torch.inf).all())
    assert bool((max_logits[2] == -torch.inf).all())
    golden = attention.sparse_prefill(q, kv, indices, softmax_scale=576**-0.5, d_v=512, with_bounds=True)
    budget.check(
        out, lse.masked_fill(lse == torch.inf, -torch.inf), golden, dtype=torch.bfloat16, max_logits=max_logits
    ).require()


def test_packed_forms_equal_the_plain_one() -> None:
    generator = torch.Generator().manual_seed(8)
    starts = torch.tensor([0, 9, 9, 30], dtype=torch.int32)
    qkv = torch.randn(30, 2, 24 + 24 + 16, generator=generator)
    q, k, v = qkv[..., :24], qkv[..., 24:48], qkv[..., 48:]
    out, lse = flash_mla.flash_attn_varlen_func(q, k, v, starts, starts, 21, 21, causal=True)
    assert lse.shape == (30, 2)
    packed, packed_lse = flash_mla.flash_attn_varlen_qkvpacked_func(qkv, starts, 21, 24, causal=True)
    assert torch.equal(packed, out)
    assert torch.equal(packed_lse, lse)
    half, _ = flash_mla.flash_attn_varlen_kvpacked_func(q, qkv[..., 24:], starts, starts, 21, 21, 24, causal=True)
    assert torch.equal(half, out)
    with pytest.raises(ProblemError, match=r"dropout_p must be 0\.0"):
        flash_mla.flash_attn_varlen_func(q, k, v, starts, starts, 21, 21, dropout_p=0.1)
    with pytest.raises(ProblemError, match="more than 64 columns"):
        flash_mla.flash_attn_varlen_qkvpacked_func(qkv, starts, 21, 32)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_varlen_gradients_match_autograd_of_the_definition(is_causal: bool) -> None:
    generator = torch.Generator().manual_seed(9)
    starts_q = torch.tensor([0, 5, 12], dtype=torch.int32)
    starts_k = torch.tensor([0, 8, 15], dtype=torch.int32)
    tensors = [torch.randn(n, 2, d, generator=generator) for n, d in ((12, 24), (15, 24), (15, 16))]
    grad = torch.randn(12, 2, 16, generator=generator)
    ours = [t.clone().requires_grad_() for t in tensors]
    out, lse = flash_mla.flash_attn_varlen_func(*ours, starts_q, starts_k, 7, 8, causal=is_causal)
    assert not lse.requires_grad, "a loss on lse must fail loudly, not lose its gradient"
    out.backward(grad)
    wide = [t.double().requires_grad_() for t in tensors]
    pieces = []
    for begin_q, end_q, begin_k, end_k in ((0, 5, 0, 8), (5, 12, 8, 15)):
        q, k, v = wide[0][begin_q:end_q], wide[1][begin_k:end_k], wide[2][begin_k:end_k]
        scores = torch.einsum("qhd,khd->hqk", q, k) * 24**-0.5
        if is_causal:
            s_q, s_k = end_q - begin_q, end_k - begin_k
            scores = scores.masked_fill(torch.ones(s_q, s_k).triu(s_k - s_q + 1).bool(), -torch.inf)
        pieces.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    torch.cat(pieces).backward(grad.double())
    for mine, exact in zip(ours, wide, strict=True):
        torch.testing.assert_close(mine.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)


def test_install_gives_the_name_and_never_mixes_libraries() -> None:
    code = (
        "import sys, types, openmla\n"
        "openmla.flash_mla.install()\n"
        "import flash_mla\n"
        "from flash_mla.flash_mla_interface import flash_mla_with_kvcache\n"
        "assert flash_mla is openmla.flash_mla\n"
        "sys.modules['flash_mla'] = types.ModuleType('flash_mla')\n"
        "try:\n"
        "    openmla.flash_mla.install()\n"
        "except openmla.core.errors.ConfigError as error:\n"
        "    print('refused:', 'already loaded' in str(error))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "refused: True"


def test_import_alone_leaves_the_name_free() -> None:
    code = "import sys, openmla, openmla.ops.flash_mla; print('flash_mla' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_old_metadata_call_says_what_is_wrong() -> None:
    with pytest.raises(ProblemError, match="num_q_tokens_per_head_k must be a positive int, got None"):
        flash_mla.get_mla_metadata(torch.zeros(2, dtype=torch.int32))
    assert issubclass(ConfigError, ValueError)
