"""The sparse prefill without a GPU: compiled within budget, which lane copies what, and what it takes."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from openmla.backends.base import SparseDecodeOperands, SparsePrefillOperands
from openmla.backends.cute import gathered
from openmla.backends.cute.prefill_sparse import config as gather
from openmla.core.errors import ProblemError
from openmla.core.layout import kv_layout
from openmla.core.problem import ExtraKV, SparseDecodeProblem, SparsePrefillProblem
from openmla.core.target import Target

BUDGET = tomllib.loads(Path(__file__).with_name("budgets_prefill.toml").read_text(encoding="utf-8"))["prefill_sparse"]
H100 = Target.preset("h100_sxm")
BUILT = (*gather.VARIANTS, *gather.CANDIDATES)
PREFILL = SparsePrefillProblem(4096, 32768, 128, 1, 576, 512, torch.bfloat16, 2048)
DECODE = SparseDecodeProblem(
    batch=64, s_q=2, total_q=128, h_q=128, h_kv=1, d_qk=576, d_v=512, dtype=torch.bfloat16,
    layout=kv_layout("bf16_576"), page_size=64, num_pages=100, topk=2048,
)  # fmt: skip


@pytest.fixture
def checked(monkeypatch):
    """As if every variant had passed on a GPU."""
    monkeypatch.setattr(gather, "CHECKED", BUILT)


@pytest.mark.parametrize("config", BUILT, ids=lambda config: config.name)
def test_variant_compiles_within_budget(config, tmp_path):
    pytest.importorskip("cutlass")
    from openmla.backends.cute.prefill_sparse.launch import build
    from openmla.backends.cute.toolchain import disassemble

    compiled = build(config, tmp_path)
    resources = compiled.resources
    assert resources.spills == 0, resources
    assert resources.registers <= BUDGET["registers"], resources
    smem = resources.dynamic_smem_bytes + resources.static_smem_bytes
    assert smem <= BUDGET["smem_bytes"] + BUDGET["static_smem_bytes"] <= gather.SMEM_LIMIT, resources
    # per tile: one wgmma for 16 columns of a score, 2 halves of 128 columns x 4 k-steps of 16 keys for O
    assert resources.sass["HGMMA"] == config.d_qk // 16 + 8, resources
    assert resources.sass["WARPGROUP"] <= BUDGET["warpgroup_instructions"], resources
    # four rows of every slice per lane, once for Q and once for a tile; with q_late the half of a first tile once more
    assert resources.sass["LDGSTS"] == 2 * 4 * config.q_slices + 16 * config.q_late, resources
    sass = disassemble(compiled.cubin_path)
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", sass, flags=re.MULTILINE)
    places = [place for place, text in enumerate(opcodes) if "HGMMA" in text]
    if config.split or config.form == "rows":  # the others are slower for it, all the same
        assert places[config.d_qk // 16 - 1] - places[0] <= BUDGET["scores_instructions"]
    roles = re.findall(r"USETMAXREG\S*\s+(?:UP0, )?(0x[0-9a-f]+)", sass)
    assert sorted(int(value, 16) for value in roles) == sorted(gather.ROLES.values())


def test_registers_of_the_roles_fill_the_file():
    assert sum(gather.ROLES.values()) + gather.ROLES["values"] == 512  # x 128 threads = 65,536
    assert all(count % 8 == 0 for count in gather.ROLES.values())


# ---------------------------------------------------------------------- which lane copies what where


def swizzled(row: int, column: int) -> int:
    """Byte of a bf16 element of a slice of 64 x 64: rows of 128 bytes, chunks of 16 XOR row % 8."""
    return row * 128 + (column // 8 ^ row % 8) * 16 + column % 8 * 2


def test_every_chunk_of_a_slice_is_written_once_where_wgmma_looks_for_it():
    written = Counter()
    for warp in range(4):
        for lane in range(32):
            for i in range(4):
                row = 16 * warp + 4 * i + gather.lane_row(lane)
                place = gather.of_row(gather.lane_place(warp, lane), i)
                assert place == swizzled(row, 8 * gather.lane_chunk(lane))
                written[place] += 1
    assert written == Counter(dict.fromkeys(range(0, 64 * 64 * 2, 16), 1))


def test_eight_lanes_copy_128_bytes_of_one_row():
    for first in range(0, 32, 8):
        lanes = range(first, first + 8)
        assert len({gather.lane_row(lane) for lane in lanes}) == 1
        assert [gather.lane_chunk(lane) for lane in lanes] == list(range(8))


# ---------------------------------------------------------------------- what it takes


@pytest.mark.parametrize("topk", [1, 64, 65, 500, 2048, 16384])
@pytest.mark.parametrize("tokens", [1, 2, 16, 33, 65, 66, 200])
@pytest.mark.parametrize("h_q", [16, 128])
def test_lists_are_cut_where_tokens_do_not_fill_the_machine(topk, tokens, h_q):
    problem = replace(DECODE, batch=tokens, s_q=1, total_q=tokens, h_q=h_q, topk=topk)
    splits, chunk = gather.pieces(problem, H100)
    ctas = tokens * gather.row_blocks(problem)
    assert chunk % 64 == 0 and splits * chunk >= topk > (splits - 1) * chunk  # no piece is empty
    assert splits == 1 or ctas * splits <= H100.num_sms
    assert (splits == 1) == (ctas >= H100.num_sms // 2 or topk <= 128)
    assert gather._variant(problem, H100).split == (splits > 1)
    assert gather.num_parts(problem, H100) <= tokens * splits


@pytest.mark.parametrize("h_q", [1, 8, 64, 128, 200])
@pytest.mark.parametrize("d_qk", [576, 512])
def test_supported_problems_get_a_variant_that_is_built(h_q, d_qk, checked):
    prefill = replace(PREFILL, h_q=h_q, d_qk=d_qk, s_q=3, topk=100, has_sink=True, has_topk_length=True)
    decode = replace(DECODE, h_q=h_q, d_qk=d_qk, layout=kv_layout(f"bf16_{d_qk}"), page_size=7, is_varlen=True)
    for problem in (prefill, decode):
        assert gather.supports(problem, H100), gather.supports(problem, H100)
        assert gather.configs(problem, H100)[0] in BUILT
        parts = gather.num_parts(problem, H100)
        assert 1 <= parts <= gather.tokens(problem)
        assert parts * gather.row_blocks(problem) <= H100.num_sms


def test_a_variant_that_no_gpu_has_run_is_refused(monkeypatch):
    monkeypatch.setattr(gather, "CHECKED", ())
    for problem in (PREFILL, DECODE):
        assert any("checked on a GPU" in reason for reason in gather.supports(problem, H100).reasons)


@pytest.mark.parametrize(
    ("problem", "word"),
    [
        (replace(PREFILL, dtype=torch.float16), "bf16"),
        (replace(PREFILL, d_qk=192), "d_qk"),
        (replace(PREFILL, d_v=256), "d_v"),
        (replace(PREFILL, h_kv=2), "one KV head"),
        (replace(PREFILL, topk=0), "index"),
        (replace(PREFILL, s_kv=0), "row"),
        (replace(PREFILL, s_kv=2**26), "bytes"),
        (replace(DECODE, layout=kv_layout("fp8_656")), "fp8_656"),
        (replace(DECODE, extra=ExtraKV(DECODE.layout, 64, 10, 512)), "second cache"),
    ],
)
def test_refusal_names_the_reason(problem, word, checked):
    verdict = gather.supports(problem, H100)
    assert len(verdict.reasons) == 1 and word in verdict.reasons[0], verdict


def test_other_machines_are_refused_with_their_name(checked):
    assert any("sm_80" in reason for reason in gather.supports(PREFILL, Target.preset("a100_sxm")).reasons)


def test_names_tell_variants_apart():
    assert (
        len({config.name for config in (*BUILT, gather.Config(gate_left=18), gather.Config(fence="joint"))})
        == len(BUILT) + 2
    )


# ---------------------------------------------------------------------- the four verbs, with a function that looks


class Recorded:
    """Stands where the compiled function does."""

    def __init__(self) -> None:
        self.q = self.kv = self.out = torch.empty(0)
        self.rest: tuple[Any, ...] = ()

    def __call__(
        self, q: torch.Tensor, kv: torch.Tensor, indices: Any, length: Any, sink: Any, out: Any, *rest: Any
    ) -> None:
        self.q, self.kv, self.out, self.length, self.rest = q, kv, out, length, rest
        out.fill_(2.0)


def prefill_operands(tokens=5, h_q=3, scale=0.1, out=None):
    q = torch.randn(tokens, h_q, 576).to(torch.bfloat16)
    kv = torch.randn(40, 1, 576).to(torch.bfloat16)
    out = torch.zeros(tokens, h_q, 512, dtype=torch.bfloat16) if out is None else out
    logits = torch.zeros(tokens, h_q)
    indices = torch.zeros(tokens, 1, 9, dtype=torch.int32)
    return SparsePrefillOperands(q, kv, indices, scale, out, logits, logits.clone(), torch.zeros(1, dtype=torch.int32))


@pytest.mark.parametrize("scale", [0.1, -0.1, 0.0])
def test_the_kernel_gets_a_scale_above_zero_and_the_same_scores(scale):
    seen = Recorded()
    operands = prefill_operands(scale=scale)
    gathered.SPARSE_PREFILL.launch(gathered.Compiled(gather.Config(), 5, seen), PREFILL, operands, None)
    given = seen.rest[6]  # behind it: how lists are cut
    assert given > 0
    assert torch.equal(seen.q.float() * given, operands.q.float() * scale)


def test_tensors_that_16_byte_copies_cannot_read_are_copied_and_out_is_written_back():
    seen = Recorded()
    wide = torch.zeros(5, 3, 515, dtype=torch.bfloat16)
    operands = prefill_operands(out=wide[..., 1:513])
    odd = torch.randn(5, 3, 579).to(torch.bfloat16)[..., 3:]
    operands = operands._replace(q=odd, kv=torch.randn(40, 1, 577).to(torch.bfloat16)[..., :576])
    gathered.SPARSE_PREFILL.launch(gathered.Compiled(gather.Config(), 5, seen), PREFILL, operands, None)
    for tensor in (seen.q, seen.kv, seen.out):
        assert tensor.data_ptr() % 16 == 0 and all(step % 8 == 0 for step in tensor.stride()[:-1])
    assert torch.equal(seen.q, odd)
    assert (
        bool((wide[..., 1:513] == 2).all()) and bool((wide[..., 0] == 0).all()) and bool((wide[..., 513:] == 0).all())
    )


def decode_operands(batch=2, s_q=3, h_q=4, **changes):
    q = torch.randn(batch, s_q, h_q, 576).to(torch.bfloat16)
    cache = torch.zeros(5, 16, 1, 576, dtype=torch.bfloat16)
    out, lse = torch.zeros(batch, s_q, h_q, 512, dtype=torch.bfloat16), torch.zeros(batch, h_q, s_q)
    indices = torch.zeros(batch, s_q, 9, dtype=torch.int32)
    operands = SparseDecodeOperands(q, cache, indices, 0.1, out, lse, torch.zeros(1, dtype=torch.int32))
    return operands._replace(**changes)


@pytest.mark.parametrize(
    ("lengths", "want"), [([4, 9], [4, 4, 4, 9, 9, 9]), ([[1, 2, 3], [4, 5, 6]], [1, 2, 3, 4, 5, 6])]
)
def test_a_length_per_request_serves_all_of_its_tokens(lengths, want):
    seen = Recorded()
    operands = decode_operands(topk_length=torch.tensor(lengths, dtype=torch.int32))
    gathered.SPARSE_DECODE_ROWS.launch(gathered.Compiled(gather.Config("pages"), 6, seen), DECODE, operands, None)
    assert seen.length.tolist() == want
    assert seen.q.shape == (6, 4, 576) and bool((operands.out == 2).all())


@pytest.mark.parametrize("is_varlen", [False, True])
def test_pieces_are_merged_per_request(is_varlen):
    """The kernel gets every piece of every token as [request, piece, token]; the merge gets the sink, the kernel none."""
    batch, s_q, splits = (6, 1, 3) if is_varlen else (2, 3, 3)
    seen, merged = Recorded(), []
    operands = decode_operands(attn_sink=torch.randn(4))
    if is_varlen:
        operands = operands._replace(
            q=operands.q.flatten(0, 1), out=operands.out.flatten(0, 1), indices=operands.indices.flatten(0, 1),
            lse=torch.zeros(4, 6),
        )  # fmt: skip
    config = replace(gather.Config("pages"), split=True)
    compiled = gathered.Compiled(config, 6, seen, (splits, 64), lambda *given: merged.append(given))
    gathered.SPARSE_DECODE_ROWS.launch(compiled, DECODE, operands, None)
    assert seen.out.shape == (6 * splits, 4, 512) and seen.out.dtype == torch.float32
    assert seen.rest[5] == 0 and seen.rest[7:] == (splits, 64, s_q)
    (partial, lse2, num_splits, out, lse, sink, h_kv, has_sink), *others = merged
    assert not others and (h_kv, has_sink) == (1, 1) and sink is operands.attn_sink
    assert partial.shape == (batch * splits, s_q * 4, 512) and lse2.shape == (batch * splits, s_q * 4)
    assert num_splits.tolist() == [splits * x for x in range(batch + 1)]
    assert out.shape == (batch, s_q, 4, 512) and lse.shape == (batch, 4, s_q)
    assert out.data_ptr() == operands.out.data_ptr() and lse.data_ptr() == operands.lse.data_ptr()


def test_an_output_whose_tokens_are_not_evenly_spaced_is_written_back():
    seen = Recorded()
    wide = torch.zeros(2, 5, 4, 512, dtype=torch.bfloat16)
    operands = decode_operands(out=wide[:, :3])
    gathered.SPARSE_DECODE_ROWS.launch(gathered.Compiled(gather.Config("pages"), 6, seen), DECODE, operands, None)
    assert bool((wide[:, :3] == 2).all()) and bool((wide[:, 3:] == 0).all())


def test_a_cache_that_16_byte_copies_cannot_read_is_named():
    cache = torch.zeros(5 * 16 * 577 + 8, dtype=torch.bfloat16)
    operands = decode_operands(kv_cache=cache.as_strided((5, 16, 1, 576), (16 * 577, 577, 577, 1)))
    with pytest.raises(ProblemError, match="multiples of 16 bytes"):
        gathered.SPARSE_DECODE_ROWS.launch(
            gathered.Compiled(gather.Config("pages"), 6, Recorded()), DECODE, operands, None
        )
