"""Adapters of peers that need a GPU, against stand-ins with the peers' own signatures: what we hand over is the case."""

import sys
import types

import pytest
import torch

from openmla.core.target import Target
from openmla.lab import gate, peers, workload
from openmla.lab.suite import Case

H100 = Target.preset("h100_sxm")
CASES = [
    Case(batch=3, s_k=150, h_q=4),
    Case(batch=3, s_k=150, s_q=2, h_q=4, lengths="varlen", is_causal=True, dtype="fp16", page_size=16),
]


def sets_of(case):
    return [workload.decode_inputs(case, torch.device("cpu"), index) for index in range(2)]


def attend(q, keys, d_v, scale, is_causal):
    """One request: q [s_q, h_q, d_qk], keys [s_k, d_qk] -> (out, lse [h_q, s_q]) in fp64."""
    s_q, s_k = q.shape[0], keys.shape[0]
    scores = scale * torch.einsum("ihd,jd->hij", q.double(), keys.double())
    if is_causal:
        seen = torch.arange(s_k) <= torch.arange(s_q)[:, None] + s_k - s_q
        scores = scores.masked_fill(~seen, -torch.inf)
    weights = scores.softmax(-1)
    return torch.einsum("hij,jd->ihd", weights, keys[:, :d_v].double()).to(q.dtype), scores.logsumexp(-1).float()


def stack(parts):
    return torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts])


@pytest.fixture
def module(monkeypatch):
    def install(name, **names):
        made = types.ModuleType(name)
        for key, value in names.items():
            setattr(made, key, value)
        monkeypatch.setitem(sys.modules, name, made)
        if "." in name:
            monkeypatch.setitem(sys.modules, name.split(".")[0], types.ModuleType(name.split(".")[0]))
        return made

    return install


def is_green(case, contender, sets):
    assert isinstance(contender, peers.Contender), contender
    for index, inputs in enumerate(sets):
        verdict = gate.check(case, inputs, *contender.call(index))
        assert verdict.is_green, verdict.text


def fa3(forms):
    def flash_attn_with_kvcache(
        q, k_cache, v_cache, k=None, v=None, qv=None, cache_seqlens=None, page_table=None, softmax_scale=None,
        causal=False, num_splits=0, return_softmax_lse=False,
    ):  # fmt: skip
        assert return_softmax_lse
        assert q.shape[-1] == k_cache.shape[-1] == 64
        assert qv.shape[-1] == v_cache.shape[-1] == 512
        form = "pages" if page_table is not None else "contiguous"
        if form not in forms:
            raise RuntimeError(f"{form} not supported")
        parts = []
        for r, length in enumerate(cache_seqlens.tolist()):
            rows = torch.cat([v_cache, k_cache], -1)
            keys = rows[page_table[r].long()].flatten(0, 1) if form == "pages" else rows[r]
            whole = torch.cat([qv[r], q[r]], -1)
            parts.append(attend(whole, keys[:length, 0], 512, softmax_scale, causal))
        return stack(parts)

    return flash_attn_with_kvcache


@pytest.mark.parametrize("case", CASES, ids=["fixed", "varlen-causal"])
@pytest.mark.parametrize("forms", [("pages",), ("contiguous",), ("pages", "contiguous")], ids="-".join)
def test_fa3_gets_the_case(case, forms, module):
    module("fa3_fwd_interface", flash_attn_with_kvcache=fa3(forms))
    sets = sets_of(case)
    contender = peers.peer(case, sets, H100, "fa3")
    is_green(case, contender, sets)
    assert contender.config.endswith(f"(fastest of {len(forms)})")


def test_fa3_that_runs_in_no_form_says_why(module):
    module("fa3_fwd_interface", flash_attn_with_kvcache=fa3(()))
    refusal = peers.peer(CASES[0], sets_of(CASES[0]), H100, "fa3")
    assert "no form of fa3 runs; pages: pages not supported; contiguous keys: contiguous" in refusal.reason


def test_fa3_leaves_no_copies_of_a_batch_that_is_too_large(module, monkeypatch):
    module("fa3_fwd_interface", flash_attn_with_kvcache=fa3(("pages", "contiguous")))
    monkeypatch.setattr(peers, "_MOST_CONTIGUOUS", 1000)
    contender = peers.peer(CASES[0], sets_of(CASES[0]), H100, "fa3")
    assert contender.config == "pages (fastest of 1)"


class Wrapper:
    def __init__(self, float_workspace_buffer, use_cuda_graph=False, backend="auto"):
        assert float_workspace_buffer.dtype == torch.int8

    def plan(
        self, qo_indptr, kv_indptr, kv_indices, kv_len_arr, num_heads, head_dim_ckv, head_dim_kpe, page_size, causal,
        sm_scale, q_data_type, kv_data_type,
    ):  # fmt: skip
        assert (head_dim_ckv, head_dim_kpe) == (512, 64)
        assert q_data_type == kv_data_type
        self.planned = (qo_indptr.tolist(), kv_indptr.tolist(), kv_indices, kv_len_arr.tolist(), causal, sm_scale)

    def run(self, q_nope, q_pe, ckv_cache, kpe_cache):
        queries, pages, indices, lengths, causal, scale = self.planned
        assert all(each.is_contiguous() for each in (q_nope, q_pe, ckv_cache, kpe_cache))
        rows = torch.cat([ckv_cache, kpe_cache], -1)
        out = []
        for r, length in enumerate(lengths):
            keys = rows[indices[pages[r] : pages[r + 1]].long()].flatten(0, 1)[:length]
            q = torch.cat([q_nope, q_pe], -1)[queries[r] : queries[r + 1]]
            out.append(attend(q, keys, 512, scale, causal)[0])
        return torch.cat(out)


@pytest.mark.parametrize("case", CASES, ids=["fixed", "varlen-causal"])
def test_flashinfer_gets_the_case(case, module):
    module("flashinfer.mla", BatchMLAPagedAttentionWrapper=Wrapper)
    sets = sets_of(case)
    is_green(case, peers.peer(case, sets, H100, "flashinfer"), sets)


def test_flash_mla_gets_the_case(module):
    def get_mla_metadata(cache_seqlens, num_heads_per_head_k, num_heads_k):
        return cache_seqlens, None

    def flash_mla_with_kvcache(
        q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits, softmax_scale=None,
        causal=False, use_legacy=False,
    ):  # fmt: skip
        assert use_legacy
        return stack(
            attend(q[r], k_cache[block_table[r].long()].flatten(0, 1)[:length, 0], head_dim_v, softmax_scale, causal)
            for r, length in enumerate(cache_seqlens.tolist())
        )

    def stack(parts):
        outs, lses = zip(*parts, strict=True)
        return torch.stack(outs), torch.stack(lses)

    module("flash_mla", get_mla_metadata=get_mla_metadata, flash_mla_with_kvcache=flash_mla_with_kvcache)
    sets = sets_of(CASES[0])
    is_green(CASES[0], peers.peer(CASES[0], sets, H100, "flash_mla"), sets)


@pytest.mark.parametrize("name", ["fa3", "fa4", "flashinfer", "flash_mla", "flex", "triton_usual"])
def test_who_cannot_run_here_says_why(name):
    case = Case(batch=2, s_k=70, s_q=2, h_q=4, h_kv=2, dtype="fp32", page_size=16, lengths="varlen", is_causal=True)
    refusal = peers.peer(case, sets_of(case), Target.detect("cpu"), name)
    assert isinstance(refusal, peers.Refusal)
    assert len(refusal.reason) > 20


def test_a_byte_layout_is_for_ours_alone():
    case = Case(batch=2, s_k=70, h_q=4, layout="fp8_656")
    sets = sets_of(case)
    assert "has the layout fp8_656" in peers.peer(case, sets, H100, "sdpa").reason
    is_green(case, peers.backend(case, sets, Target.detect("cpu"), "torch"), sets)
